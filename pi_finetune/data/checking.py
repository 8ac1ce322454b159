"""Reading all audio of an experiment once, before training meets a bad file hours later."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from tqdm import tqdm

from pi_finetune.data.audio import (
    SAMPLE_RATE,
    SILENCE_RMS,
    Converted,
    audio_info,
    is_silent,
    read_audio,
    source_of,
)
from pi_finetune.errors import UserError

if TYPE_CHECKING:
    from pi_finetune.data.audio import Member

__all__ = ["check_pairs", "fault"]


#: So many bad files are named in a message.
NAMED = 20

# What libsndfile notes of a file that ends before its header says. A WAV written to a pipe has a
# size of about 2 or 4 GiB in its header and lacks nothing.
_CUT_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_CUT_OGG = re.compile(r"ended unexpectedly|lacks an end-of-stream", re.IGNORECASE)
_STREAMED = 2**31 - 2**12


def check_pairs(*datasets: Any, jobs: int | None = None) -> int:
    """Read every file of some :class:`~pi_finetune.data.loading.SpeechPairs`, noise included.

    Arguments
    ---------
    *datasets : SpeechPairs
        Or any datasets with a ``manifest`` and perhaps a ``mixer``; or manifests, or mixers.
    jobs : int, optional
        Threads (default: one a core, at most 8).

    Returns
    -------
    int
        Number of files, each of which was read to its end.

    Raises
    ------
    UserError
        Files are unreadable, truncated, silent, or hold samples that are not finite; or a noisy
        file is not as long as its clean one. The message names up to :data:`NAMED` of them.
    """
    frames: dict = {}  # path: frames it must have, or None
    for dataset in datasets:
        manifest = dataset if isinstance(dataset, dict) else getattr(dataset, "manifest", {})
        for entry in manifest.values():
            frames.setdefault(str(entry["wav"]), (entry["wav"], None))
            if "noisy" in entry:
                expected = round(entry["duration"] * SAMPLE_RATE)
                frames[str(entry["noisy"])] = entry["noisy"], expected
        mixer = getattr(dataset, "mixer", dataset)
        if hasattr(mixer, "by_class"):
            for entries in mixer.by_class.values():
                for entry in entries:
                    frames.setdefault(str(entry["wav"]), (entry["wav"], None))
    with ThreadPoolExecutor(jobs or min(8, os.cpu_count() or 1)) as pool:
        answers = pool.map(lambda item: fault(*item), frames.values())
        found = list(tqdm(answers, total=len(frames), desc="checking audio", unit="file"))
    bad = [(path, what) for (path, _), what in zip(frames.values(), found) if what]
    if bad:
        lines = [f"{path}: {what}" for path, what in bad[:NAMED]]
        lines += [f"... and {len(bad) - NAMED} more"] * (len(bad) > NAMED)
        raise UserError(
            f"check_data: {len(bad)} of {len(frames)} audio files are bad. Remove or replace "
            "them:\n  " + "\n  ".join(lines)
        )
    return len(frames)


def fault(path: "str | Path | Member", frames: int | None = None) -> str | None:
    """What is wrong with an audio file, in words; None if nothing is.

    Arguments
    ---------
    path : str, Path, Member or Converted
    frames : int, optional
        How many samples it must hold.

    Returns
    -------
    str or None
    """
    try:
        if isinstance(path, Converted):
            return "is silent" if is_silent(read_audio(path)) else None
        audio_info(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ").split(". ")[0].rstrip(".")
    held, power = 0, 0.0
    try:
        with soundfile.SoundFile(source_of(path)) as file:
            stated = file.frames
            while len(block := file.read(2**20, dtype="float32")):
                if not np.isfinite(block).all():
                    place = held + int(np.argmin(np.isfinite(block)))
                    return f"sample {place} is NaN or infinite"
                held += len(block)
                power += float(np.square(block, dtype=np.float64).sum())
            cut = _CUT_WAV.search(file.extra_info)
            ended = _CUT_OGG.search(file.extra_info)
    except (OSError, RuntimeError) as error:
        return f"cannot be read to its end ({str(error).strip()})"
    if cut and int(cut[2]) < int(cut[1]) < _STREAMED:
        return f"truncated, {int(cut[1]) - int(cut[2])} bytes are missing"
    if held < stated or ended:
        return f"truncated after {held / SAMPLE_RATE:.2f} s"
    if frames is not None and held != frames:
        return f"has {held} samples, its clean version {frames}"
    if (power / held) ** 0.5 < SILENCE_RMS:
        return "is silent"
    return None
