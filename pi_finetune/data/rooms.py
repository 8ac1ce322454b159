"""Speech as a room makes it: convolution with room impulse responses (RIRs) on the fly.

The noisy input is heard in the room; the target is the early part of the same response, the direct
path and what arrives shortly after it, which listeners hear as one with it. So an enhancer learns
to take the late reverberation away, and noisy and target stay aligned.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import fftconvolve

from pi_finetune.data.audio import SAMPLE_RATE, find_audio, libsndfile_says, resample
from pi_finetune.errors import UserError, optional

__all__ = ["FolderRIRs", "Reverberator", "SimulatedRIRs", "load_reverberator", "reverberate"]


#: In the place of a folder: rooms are drawn and simulated by pyroomacoustics.
SIMULATED = "simulated"
#: A RIR whose largest sample is below this is empty.
_EMPTY = 1e-8


class Reverberator:
    """Puts an utterance into a room.

    Arguments
    ---------
    rirs : FolderRIRs or SimulatedRIRs
        ``rirs.draw(rng) -> [T]``.
    probability : float
        Share of the utterances that are put into a room; the others stay as they are. Default: 1.
    early_seconds : float
        So much of a response after its direct path makes the target. Default: 0.05, the limit
        that the clarity index C50 uses (ISO 3382-1).
    """

    def __init__(
        self,
        rirs: "FolderRIRs | SimulatedRIRs",
        probability: float = 1.0,
        early_seconds: float = 0.05,
    ):
        if not 0 <= probability <= 1:
            raise UserError(f"rir_probability: {probability} must be a share from 0 to 1.")
        if not early_seconds > 0:
            raise UserError(f"rir_early_seconds: {early_seconds} must be above 0.")
        self.rirs = rirs
        self.probability = probability
        self.early_seconds = early_seconds

    def __call__(
        self, clean: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``clean`` [T] into a room that ``rng`` draws.

        Returns
        -------
        (torch.Tensor, torch.Tensor)
            The speech as it is heard in the room, and its early part, the target: [T] each. The
            direct path comes without delay, and the target has the level (RMS) of ``clean``.
        """
        if rng.random() >= self.probability:
            return clean, clean
        return reverberate(clean, self.rirs.draw(rng), self.early_seconds)

    def described(self) -> list:
        """What determines the rooms, as JSON has it."""
        return [self.probability, self.early_seconds, self.rirs.described()]


def reverberate(
    clean: torch.Tensor, rir: np.ndarray, early_seconds: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve speech with a room impulse response, and with the early part of it.

    The direct path is the largest sample of the response, at ``d``. Both results are taken from
    ``d`` on, so that neither is delayed against ``clean``; the early part is the response up to
    ``d + early_seconds``. Both are scaled by one factor, with which the target has the RMS of
    ``clean``.

    Arguments
    ---------
    clean : torch.Tensor
        [T].
    rir : numpy.ndarray
        [R], 16 kHz.
    early_seconds : float
        Default: 0.05.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        Reverberant speech and target, [T] each, of the type of ``clean``.
    """
    direct = int(np.abs(rir).argmax())
    end = direct + round(early_seconds * SAMPLE_RATE)
    speech = clean.double().numpy()
    early, late = (
        fftconvolve(speech, part)[direct : direct + len(speech)]
        for part in (rir[:end], np.concatenate([np.zeros(end), rir[end:]]))
    )
    power = float(np.square(early).mean())
    if power == 0:
        return clean, clean
    gain = math.sqrt(float(np.square(speech).mean()) / power)
    heard, target = (torch.from_numpy(gain * wav).to(clean) for wav in (early + late, early))
    return heard, target


class FolderRIRs:
    """Recorded responses.

    Those of one folder count as one room, and whole rooms go to train, dev or test, by a hash of
    their name; with fewer than four folders single files do. With fewer than four files, all parts
    hear them all.

    Arguments
    ---------
    folder : str or Path
        Searched recursively. Audio of any rate; of several channels the first is taken.
    part : str
        ``train``, ``dev`` or ``test``.
    """

    def __init__(self, folder: str | Path, part: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"rir_folder: {folder} is no folder, nor is it {SIMULATED}.")
        paths = find_audio(self.folder)
        if not paths:
            raise UserError(f"rir_folder: no audio file in {folder}.")
        for path in paths:
            try:
                soundfile.info(path)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"rir_folder: {path} cannot be read as audio ({libsndfile_says(error)}). "
                    "Remove or replace it."
                ) from None
        rooms: dict = {}
        for path in paths:
            rooms.setdefault(str(path.parent.relative_to(self.folder)), []).append(path)
        if len(rooms) < 4:
            rooms = {str(path.relative_to(self.folder)): [path] for path in paths}
        if len(rooms) >= 4:
            order = sorted(rooms, key=lambda room: (zlib.crc32(room.encode()), room))
            test, dev = (max(1, round(share * len(order))) for share in (0.2, 0.15))
            parts = {"test": order[:test], "dev": order[test : test + dev]}
            rooms = {room: rooms[room] for room in parts.get(part, order[test + dev :])}
        self.paths = sorted(path for room in rooms.values() for path in room)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A response [R] at 16 kHz."""
        path = self.paths[rng.integers(len(self.paths))]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        rir = resample(np.ascontiguousarray(samples.T[:1]), rate, SAMPLE_RATE)[0]
        if not len(rir) or not np.isfinite(rir).all() or np.abs(rir).max() < _EMPTY:
            raise UserError(
                f"rir_folder: {path} is empty, silent or not finite. Remove or replace it."
            )
        return rir.astype(np.float64)

    def described(self) -> list:
        """Names of the responses."""
        return [str(path.relative_to(self.folder)) for path in self.paths]


class SimulatedRIRs:
    """Responses of box-shaped rooms by the image source method, as pyroomacoustics has it.

    Drawn evenly for each: length 3 to 10 m, width 3 to 8 m, height 2.4 to 4 m, the reverberation
    time, and places of speaker and microphone at least 0.3 m from the walls and 0.5 m apart.

    Arguments
    ---------
    rt60 : (float, float)
        Shortest and longest reverberation time in seconds (by Sabine's formula). A room that is
        too large for so short a time gets walls that absorb all. Default: 0.2 to 0.8.
    max_order : int
        Most reflections of a path that are followed, since their number grows with its cube; what
        comes later is left out. Default: 20.
    """

    def __init__(self, rt60: Sequence[float] = (0.2, 0.8), max_order: int = 20):
        optional("pyroomacoustics", "rooms", f"rir_folder: {SIMULATED}")
        self.rt60 = [float(seconds) for seconds in rt60]
        self.max_order = max_order

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A response [R] at 16 kHz."""
        import pyroomacoustics

        size = rng.uniform(np.array([3, 3, 2.4]), np.array([10, 8, 4]))
        rt60 = rng.uniform(self.rt60[0], self.rt60[1])
        source, microphone = rng.uniform(0.3, size - 0.3, (2, 3))
        while np.linalg.norm(source - microphone) < 0.5:
            microphone = rng.uniform(0.3, size - 0.3)
        try:
            absorption, order = pyroomacoustics.inverse_sabine(rt60, size)
        except ValueError:  # the time is too short for so large a room
            absorption, order = 1.0, 0
        room = pyroomacoustics.ShoeBox(
            size,
            fs=SAMPLE_RATE,
            materials=pyroomacoustics.Material(absorption),
            max_order=min(order, self.max_order),
        )
        room.add_source(source)
        room.add_microphone(microphone)
        room.compute_rir()
        return np.asarray(room.rir[0][0], dtype=np.float64)

    def described(self) -> list:
        """What the rooms are drawn from."""
        return [SIMULATED, self.rt60, self.max_order]


def load_reverberator(
    folder: str | Path | None,
    part: str,
    probability: float = 1.0,
    early_seconds: float = 0.05,
    rt60: Sequence[float] = (0.2, 0.8),
) -> Reverberator | None:
    """The reverberation that an experiment declares.

    Arguments
    ---------
    folder : str, Path or None
        A folder of responses, ``simulated``, or None for no rooms.
    part : str
        See :class:`FolderRIRs`.
    probability, early_seconds
        See :class:`Reverberator`.
    rt60 : (float, float)
        See :class:`SimulatedRIRs`.

    Returns
    -------
    Reverberator or None
    """
    if folder is None:
        return None
    rirs = SimulatedRIRs(rt60) if folder == SIMULATED else FolderRIRs(folder, part)
    return Reverberator(rirs, probability, early_seconds)
