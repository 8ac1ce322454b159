"""The voices of the mini corpus and the free engines that speak them.

``flite`` and ``festival`` have English voices of real speakers, made of statistics (awb, rms,
slt) or of diphones (kal, ked); ``pico``, the engine of early Android phones, has two women's.
``espeak-ng`` is a formant synthesiser whose accents and variants make many clearly different, if
robotic, voices. More speakers are made of a voice by scaling its vocal tract (`Voice.warp`); such
a voice is always in the same split as the one it is made of.
"""

import dataclasses
import functools
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
#: How each engine is installed, besides its voices.
ENGINES = {
    "flite": "apt install flite",
    "espeak-ng": "apt install espeak-ng",
    "festival": "apt install festival festvox-kallpc16k festvox-kdlpc16k",
    "pico": "pip install ttspico",
}


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
        One of `ENGINES`.
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
    Voice("101", "M", "train", "flite", "awb", 32, rate=0.88),
    Voice("102", "F", "train", "pico", "en-US", 32),
    Voice("103", "F", "train", "flite", "awb", 26, rate=0.88, warp=1.18),
    Voice("104", "M", "train", "pico", "en-US", 26, warp=0.86),
    Voice("105", "F", "train", "pico", "en-US", 26, warp=1.12),
    Voice("106", "F", "train", "espeak-ng", "en-us+f2", 17),
    Voice("107", "F", "train", "espeak-ng", "en-us+Annie", 17),
    Voice("108", "M", "train", "espeak-ng", "en-us+m3", 17),
    Voice("109", "M", "train", "espeak-ng", "en-gb-x-rp", 17),
    Voice("110", "M", "train", "espeak-ng", "en-us-nyc", 17),
    Voice("111", "M", "train", "espeak-ng", "en-us+klatt3", 17),
    Voice("112", "M", "train", "espeak-ng", "en-us+m8", 17),
    Voice("113", "F", "train", "espeak-ng", "en+f4", 17),
    Voice("201", "F", "dev", "flite", "slt", 14, rate=0.88),
    Voice("202", "M", "dev", "flite", "rms", 14),
    Voice("203", "F", "dev", "pico", "en-GB", 13),
    Voice("204", "M", "dev", "espeak-ng", "en-us+robert", 13),
    Voice("301", "F", "test", "espeak-ng", "en-us+f3", 22),
    Voice("302", "M", "test", "espeak-ng", "en-us+adam", 22, rate=0.85),
    Voice("303", "M", "test", "espeak-ng", "en-us+benjamin", 22),
    Voice("304", "M", "test", "espeak-ng", "en-us+klatt4", 22, rate=0.85),
)

#: More training voices, for hours of speech that are not shipped; the first is a diphone voice.
MORE_VOICES = (
    Voice("401", "M", "train", "festival", "ked_diphone", 0, rate=0.9),
    *(
        Voice(str(402 + i), "F" if name[-2] == "f" else "M", "train", "espeak-ng", name, 0)
        for i, name in enumerate(
            "en-us+f1 en-us+m1 en-us+m2 en-us+m4 en-us+m5 en-us+m6 en-us+m7 en-us+f5 en-gb+m3 "
            "en-us+klatt en-us+klatt2 en-us+klatt5 en-us+Alex en-us+Denis en-us+Gene "
            "en-us+Henrique en-us+iven en-us+Jacky en-us+john en-us+Lee en-us+linda en-us+marcelo "
            "en-us+Marco en-us+Michael en-us+norbert en-us+pablo en-us+quincy en-us+rob "
            "en-us+shelby en-us+travis en-us+victor en-us+zac en-us+anika en-us+belinda "
            "en-us+david en-us+edward en-us+gustave en-us+max en-us+miguel en-us+paul".split()
        )
    ),
)


def varied(voice, rng):
    """A person like ``voice`` but of another size: vocal tract and pitch drawn by ``rng``."""
    return dataclasses.replace(
        voice,
        warp=voice.warp * rng.uniform(0.88, 1.18),
        pitch=int(np.clip(voice.pitch + rng.integers(-25, 26), 0, 99)),
    )


def require_engines(engines=tuple(ENGINES)) -> dict[str, str]:
    """Return the version of each engine; `UserError` says how to install one that is missing."""
    versions = {}
    for engine in engines:
        try:
            versions[engine] = _version(engine)
        except (FileNotFoundError, ImportError):
            raise UserError(
                f"speech engine '{engine}' is not installed: {ENGINES[engine]}. The corpus in "
                "assets/mini needs no engine unless it is to be made anew."
            ) from None
    return versions


def _version(engine):
    if engine == "pico":
        from importlib import metadata

        return f"ttspico {metadata.version('ttspico')}"
    if shutil.which(engine) is None:
        raise FileNotFoundError(engine)
    out = subprocess.run([engine, "--version"], capture_output=True, text=True).stdout
    lines = [line.strip() for line in out.splitlines()]
    found = (x for x in lines if "version" in x or "speech:" in x or x.startswith("festival"))
    return next(found, lines[0]).split("Data at")[0].removeprefix("version:").strip()


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
    text = f"{text.lower()}."
    try:
        samples, found = (
            _pico(voice, text, rate, pitch)
            if voice.engine == "pico"
            else _command(voice, text, rate, pitch)
        )
    except (FileNotFoundError, ImportError):
        require_engines([voice.engine])
        raise
    ratio = Fraction(SAMPLE_RATE / (found * voice.warp)).limit_denominator(1000)
    samples = resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)
    return trim(samples)


def _command(voice, text, rate, pitch):
    """What a program says: samples [T] and their rate."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        if voice.engine == "flite":
            command = ["flite", "-voice", voice.name, "--setf", f"duration_stretch={1 / rate:.4f}"]
            command += ["--setf", f"f0_shift={pitch:.4f}", "-t", text, str(path)]
        elif voice.engine == "festival":
            setup = f"(begin (voice_{voice.name}) (Parameter.set 'Duration_Stretch {1 / rate:.4f}))"
            command = ["text2wave", "-eval", setup, "-o", str(path)]
        else:
            tone = str(round(np.clip(voice.pitch + 100 * (pitch - 1), 0, 99)))
            speed = str(round(ESPEAK_WORDS_PER_MINUTE * rate))
            command = ["espeak-ng", "-v", voice.name, "-s", speed, "-p", tone]
            command += ["-g", str(ESPEAK_WORD_GAP), "-w", str(path), text]
        try:
            subprocess.run(
                command, check=True, capture_output=True, timeout=60, input=text.encode()
            )
            return sf.read(path, dtype="float32")
        except (subprocess.SubprocessError, sf.SoundFileError) as error:
            raise UserError(f"{' '.join(command)!r} failed: {error}") from error


@functools.cache
def _pico_engine(language):
    import ttspico

    return ttspico.TtsEngine(language)


def _pico(voice, text, rate, pitch):
    engine = _pico_engine(voice.name)
    engine.rate = round(np.clip(100 * rate, 20, 500))
    engine.pitch = round(np.clip(100 * pitch, 50, 200))
    return np.frombuffer(engine.speak(text), "<i2").astype(np.float32) / 2**15, SAMPLE_RATE


def trim(samples: np.ndarray, floor_db: float = -45.0, margin: float = 0.02) -> np.ndarray:
    """Cut from both ends what is ``floor_db`` below the peak, less ``margin`` seconds."""
    loud = np.flatnonzero(np.abs(samples) > 10 ** (floor_db / 20) * np.abs(samples).max())
    if not len(loud):
        raise UserError("the engine wrote silence; is the voice installed?")
    keep = round(margin * SAMPLE_RATE)
    return samples[max(0, loud[0] - keep) : loud[-1] + keep + 1]
