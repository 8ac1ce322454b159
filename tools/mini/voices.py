"""The voices of the mini corpus and the two free engines that speak them.

``flite`` has four English voices of real speakers: awb, rms and slt are statistical
voices, kal16 is made of diphones. ``espeak-ng`` is a formant synthesiser whose
accents and variants make many clearly different, if robotic, voices. More speakers
are made of two flite voices by scaling their vocal tract (`Voice.warp`); such a voice is
always in the same split as the one it is made of.
"""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

from pi_finetune.errors import UserError

SAMPLE_RATE = 16000
ESPEAK_WORDS_PER_MINUTE = 160
# Pause between espeak-ng's words, in its unit of 10 ms: without one a recogniser trained on human
# speech misses a third of the words, with it a fifth.
ESPEAK_WORD_GAP = 2


@dataclass(frozen=True)
class Voice:
    """A speaker of the corpus.

    Arguments
    ---------
    speaker : str
        The speaker's number, as LibriSpeech numbers its own.
    sex : str
        ``"M"`` or ``"F"``: as which the voice is heard.
    split : str
        ``"train"``, ``"dev"`` or ``"test"``.
    engine : str
        ``"flite"`` or ``"espeak-ng"``, also the name of the Debian package.
    name : str
        The engine's name of the voice.
    utterances : int
        How many sentences it speaks in the corpus.
    rate : float
        The voice's usual rate, a factor on the engine's.
    pitch : int
        Pitch of an ``espeak-ng`` voice, 0 to 99 (default 50).
    warp : float
        Factor on all frequencies, pitch and formants alike (default 1): above one
        the speaker is smaller.
    """

    speaker: str
    sex: str
    split: str
    engine: str
    name: str
    utterances: int
    rate: float = 1.0
    pitch: int = 50
    warp: float = 1.0

    def __str__(self):
        warp = f" warp {self.warp:g}" if self.warp != 1 else ""
        pitch = f" pitch {self.pitch}" if self.pitch != 50 else ""
        return f"{self.engine} {self.name}{pitch}{warp}"


VOICES = (
    Voice("101", "M", "train", "flite", "awb", 26, rate=0.88),
    Voice("102", "M", "train", "flite", "rms", 26),
    Voice("103", "F", "train", "flite", "awb", 26, rate=0.88, warp=1.18),
    Voice("104", "F", "train", "flite", "rms", 26, warp=1.22),
    Voice("105", "M", "train", "flite", "rms", 26, warp=0.92),
    Voice("106", "F", "train", "espeak-ng", "en-us+f2", 17),
    Voice("107", "F", "train", "espeak-ng", "en-us+Annie", 17),
    Voice("108", "M", "train", "espeak-ng", "en-us+m3", 17),
    Voice("109", "M", "train", "espeak-ng", "en-gb", 17),
    Voice("110", "M", "train", "espeak-ng", "en-us-nyc", 17),
    Voice("111", "M", "train", "espeak-ng", "en-us+klatt3", 17),
    Voice("112", "M", "train", "espeak-ng", "en-us+m8", 17),
    Voice("113", "F", "train", "espeak-ng", "en+f4", 17),
    Voice("201", "M", "dev", "flite", "kal16", 20, rate=0.8),
    Voice("202", "F", "dev", "espeak-ng", "en-us+f5", 20),
    Voice("301", "F", "test", "flite", "slt", 28, rate=0.88),
    Voice("302", "M", "test", "espeak-ng", "en-us+m7", 14),
    Voice("303", "M", "test", "espeak-ng", "en-gb-x-gbclan", 14),
    Voice("304", "F", "test", "espeak-ng", "en-us+f1", 14),
)


def require_engines(engines=("flite", "espeak-ng")) -> dict[str, str]:
    """Return the version of each engine; `UserError` names the package of one that is missing."""
    versions = {}
    for engine in engines:
        if shutil.which(engine) is None:
            raise UserError(
                f"speech engine '{engine}' is not installed: install the Debian package "
                f"'{engine}' (apt install {engine}). The corpus in assets/mini needs no engine "
                "unless it is to be made anew."
            )
        out = subprocess.run([engine, "--version"], capture_output=True, text=True).stdout
        lines = [line.strip() for line in out.splitlines()]
        line = next((line for line in lines if "version" in line or "speech:" in line), lines[0])
        versions[engine] = line.split("Data at")[0].removeprefix("version:").strip()
    return versions


def speak(voice: Voice, text: str, rate: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """Return ``text`` spoken by ``voice``, silence at both ends cut off.

    Arguments
    ---------
    voice : Voice
        Who speaks.
    text : str
        Words, in any case.
    rate : float
        Factor on the voice's rate; more is faster.
    pitch : float
        Factor on the voice's pitch (flite's rms has no such control and keeps its own).

    Returns
    -------
    numpy.ndarray
        Float32 samples [T] at 16 kHz.

    Raises
    ------
    UserError
        Where the engine is missing, fails or writes no sound.
    """
    # Warping is done by playing faster, so the engine has to speak that much slower.
    rate = voice.rate * rate / voice.warp
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        if voice.engine == "flite":
            command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / rate:.4f}"]
            command += ["--setf", f"f0_shift={pitch:.4f}", "-t", f"{text.lower()}.", str(path)]
        else:
            tone = str(round(np.clip(voice.pitch + 100 * (pitch - 1), 0, 99)))
            speed = str(round(ESPEAK_WORDS_PER_MINUTE * rate))
            command = ["espeak-ng", "-v", voice.name, "-s", speed, "-p", tone]
            command += ["-g", str(ESPEAK_WORD_GAP), "-w", str(path), f"{text.lower()}."]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            samples, found = sf.read(path, dtype="float32")
        except FileNotFoundError:
            require_engines([voice.engine])
            raise
        except (subprocess.SubprocessError, sf.SoundFileError) as error:
            raise UserError(f"{' '.join(command)!r} failed: {error}") from error
    ratio = Fraction(SAMPLE_RATE / (found * voice.warp)).limit_denominator(1000)
    samples = resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)
    return trim(samples)


def trim(samples: np.ndarray, floor_db: float = -45.0, margin: float = 0.02) -> np.ndarray:
    """Cut from both ends what is ``floor_db`` below the peak, less ``margin`` seconds."""
    loud = np.flatnonzero(np.abs(samples) > 10 ** (floor_db / 20) * np.abs(samples).max())
    if not len(loud):
        raise UserError("the engine wrote silence; is the voice installed?")
    keep = round(margin * SAMPLE_RATE)
    return samples[max(0, loud[0] - keep) : loud[-1] + keep + 1]
