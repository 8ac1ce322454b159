"""Checked reading and writing of audio: every failure names the file and what to do."""

import io
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from speechbrain.dataio import audio_io

from pi_finetune.errors import UserError
from pi_finetune.files import replacing, shown, why_not_written

logger = logging.getLogger(__name__)

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE",
    "SILENCE_RMS",
    "Member",
    "audio_info",
    "find_audio",
    "find_files",
    "is_silent",
    "limit",
    "read_audio",
    "resample",
    "source_of",
]


SAMPLE_RATE = 16000
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")

# Below this RMS (about -100 dBFS) a signal counts as silent: no SNR or score is defined for it.
SILENCE_RMS = 1e-5


class Member:
    """An audio file inside a shard, which is given where a path is expected.

    Arguments
    ---------
    shard : str
        The tar file.
    name : str
        Of the member, for messages.
    offset, size : int
        Where its bytes are.
    """

    def __init__(self, shard: str, name: str, offset: int, size: int):
        self.shard, self.name, self.offset, self.size = shard, name, offset, size

    def __str__(self):
        return f"{self.shard}: {self.name}"

    def open(self) -> io.BytesIO:
        """Its bytes as a file."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


class Converted:
    """Audio that has to be converted to 16 kHz and one channel, given where a path is expected.

    Arguments
    ---------
    name : str
        For messages, and to tell it from others.
    convert : callable
        ``convert(described) -> wav`` [T], float32, 16 kHz: all of it.
    described : object
        What is converted.
    """

    def __init__(self, name: str, convert: Callable, described: Any):
        self.name, self.convert, self.described = name, convert, described

    def __str__(self):
        return self.name

    def read(self) -> torch.Tensor:
        """The samples [T], float32, 16 kHz."""
        return self.convert(self.described)


def source_of(path: "str | Path | Member | Converted") -> str | io.BytesIO:
    """What libsndfile opens: the path as text, or the bytes of a :class:`Member`."""
    return path.open() if isinstance(path, Member) else str(path)


def audio_info(path: "str | Path | Member | Converted") -> Any:
    """Return ``audio_io.info(path)`` after checking that the file is 16 kHz, mono and not empty."""
    try:
        info = audio_io.info(source_of(path))
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as audio ({error}). Remove or replace the file."
        ) from None
    if info.sample_rate != SAMPLE_RATE:
        raise UserError(
            f"{path}: sampled at {info.sample_rate} Hz, needed are {SAMPLE_RATE} Hz. "
            "Convert the folder with: python recipes/resample.py FOLDER NEW_FOLDER"
        )
    if info.channels != 1:
        raise UserError(
            f"{path}: has {info.channels} channels, needed is one. "
            "Convert the folder with: python recipes/resample.py FOLDER NEW_FOLDER"
        )
    if info.frames == 0:
        raise UserError(f"{path}: holds no samples. Remove or replace the file.")
    return info


def read_audio(
    path: "str | Path | Member | Converted", start: int = 0, frames: int = -1
) -> torch.Tensor:
    """Read samples ``start`` to ``start + frames`` of a 16 kHz mono file.

    Of audio that has to be :class:`Converted` all is read, so that a part of it is what it is in
    the whole.

    Returns
    -------
    torch.Tensor
        [T], float32.
    """
    try:
        if isinstance(path, Converted):
            wav, rate = path.read()[None, start:], SAMPLE_RATE
            wav = wav if frames < 0 else wav[:, :frames]
        else:
            wav, rate = audio_io.load(source_of(path), frame_offset=start, num_frames=frames)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read as audio ({error}). Remove or replace the file."
        ) from None
    if rate != SAMPLE_RATE or wav.shape[0] != 1:
        audio_info(path)  # raises the message that fits
    wav = wav[0]
    if wav.numel() == 0 or not torch.isfinite(wav).all():
        raise UserError(
            f"{path}: holds no samples or non-finite ones from sample {start} on. "
            "Remove or replace the file."
        )
    return wav


def libsndfile_says(error: BaseException) -> str:
    """The reason in an error of soundfile, without the path and its bytes."""
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


def limit(wav: np.ndarray, knee: float = 0.8) -> np.ndarray:
    """Bend what is above ``knee`` so that nothing exceeds full scale; the rest stays as it is.

    ``sign(x) (k + (1 - k) tanh((|x| - k) / (1 - k)))`` for ``|x| > k``: continuous in value and
    slope, and without memory, so that pieces of a signal are limited as the whole is.

    Arguments
    ---------
    wav : numpy.ndarray
        Samples; full scale is 1.
    knee : float
        From 0 to 1 (default 0.8).

    Returns
    -------
    numpy.ndarray
        Of the shape and type of ``wav``, within [-1, 1].
    """
    over = np.maximum(np.abs(wav) - knee, 0) / (1 - knee)
    return np.sign(wav) * (np.minimum(np.abs(wav), knee) + (1 - knee) * np.tanh(over))


def save_flac(path: str | Path, wav: np.ndarray) -> None:
    """Write a waveform [T] at 16 kHz as FLAC with 16 bits a sample; the file appears whole.

    FLAC has no float and would clip: a signal over full scale is limited, with a warning.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    peak = float(np.abs(wav).max(initial=0))
    if peak > 1:
        wav = limit(wav)
        logger.warning(f"{path}: the peak is {peak:.2f} times full scale; it was limited.")
    try:
        with replacing(path) as temporary:
            soundfile.write(temporary, wav, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    except (OSError, AssertionError, soundfile.SoundFileError) as error:
        raise UserError(why_not_written(path, error)) from error


def resample(rows: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample rows [C, T]; polyphase, so that odd rates need no huge filter bank."""
    common = math.gcd(rate, new_rate)
    if rate == new_rate:
        return rows
    return resample_poly(rows, new_rate // common, rate // common, axis=1).astype(np.float32)


def is_silent(wav: torch.Tensor) -> bool:
    """Whether the RMS of ``wav`` [T] is below :data:`SILENCE_RMS`."""
    return float(wav.square().mean().sqrt()) < SILENCE_RMS


def find_files(folder: str | Path, chosen: Callable[[str], bool]) -> list[Path]:
    """Return the sorted files under ``folder`` for which ``chosen(name)`` is true.

    Folders that are symbolic links are followed, unless they lead back to where they lie.

    Raises
    ------
    UserError
        There is no such folder, or the name of a chosen file is not UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder.")
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = here.resolve()
        folders[:] = [
            name
            for name in folders
            if not (here / name).is_symlink() or not real.is_relative_to((here / name).resolve())
        ]
        found += [here / name for name in names if chosen(name)]
    for path in found:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{shown(path)}: the name is not UTF-8. Rename the file.") from None
    return sorted(found)


def find_audio(folder: str | Path) -> list[Path]:
    """Return the sorted audio files under ``folder``; see :func:`find_files`."""
    return find_files(folder, lambda name: Path(name).suffix.lower() in AUDIO_SUFFIXES)
