"""Packing a corpus into WebDataset shards.

    python -m pi_finetune.data.shard_writer LibriSpeech shards --splits "train*"

writes ``shards/train-000000.tar`` and so on, which any WebDataset reader takes.

Only packing is done here; :mod:`pi_finetune.data.shards` reads.
"""

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import soundfile

from pi_finetune.data.audio import SAMPLE_RATE, Converted, limit, read_audio
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.shards import index_shard
from pi_finetune.errors import UserError, command
from pi_finetune.files import replacing

__all__ = ["main", "write_shards"]


def write_shards(
    folder: str | Path, output: str | Path, splits: str | Sequence[str], megabytes: float = 500
) -> list[Path]:
    """Copy a corpus folder into shards, without changing its audio.

    What is not 16 kHz and one channel (see :func:`pi_finetune.data.layouts.prepare_listed`) is
    converted, to FLAC of 16 bits.

    Arguments
    ---------
    folder, splits
        As for :func:`pi_finetune.data.corpora.prepare_speech`.
    output : str or Path
        Folder for ``SPLIT-NNNNNN.tar``; a split's name has its pattern's ``*`` taken off.
    megabytes : float
        About the size of a shard.

    Returns
    -------
    list of Path
        The shards. Each appears when it is complete.

    Raises
    ------
    UserError
        The corpus has noisy files of its own, an id has a dot, or ``megabytes`` is not positive.
    """
    if not megabytes > 0:
        raise UserError(f"--megabytes {megabytes}: give the size of a shard, above 0.")
    written = []
    for split in splits:
        name = split.strip("*-_ ") or "speech"
        manifest = prepare_speech(folder, [split])
        if any("noisy" in entry for entry in manifest.values()):
            raise UserError(
                f"{folder}: has noisy files of its own, for which shards have no place."
            )
        size = 0
        batches: list[list] = [[]]
        for key, entry in manifest.items():
            if "." in key:
                raise UserError(f"{entry['wav']}: WebDataset allows no dot in an id.")
            if size > megabytes * 1e6:
                size = 0
                batches.append([])
            batches[-1].append((key, entry))
            is_file = not isinstance(entry["wav"], Converted)
            size += os.path.getsize(entry["wav"]) if is_file else entry["duration"] * SAMPLE_RATE
        for number, batch in enumerate(batches):
            path = Path(output) / f"{name}-{number:06d}.tar"
            with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
                for key, entry in batch:
                    suffix, content = _encoded(entry["wav"])
                    described = {"text": entry["text"], "speaker": entry["speaker"]}
                    _add(tar, f"{key}{suffix}", content)
                    _add(tar, f"{key}.json", json.dumps(described).encode())
            index_shard(path)
            written.append(path)
    return written


def _encoded(wav):
    """The suffix and the bytes of an audio file."""
    if not isinstance(wav, Converted):
        return Path(wav).suffix.lower(), Path(wav).read_bytes()
    file = io.BytesIO()
    samples = read_audio(wav).numpy()
    over = abs(samples).max() > 1  # FLAC would clip
    soundfile.write(file, limit(samples) if over else samples, SAMPLE_RATE, format="FLAC")
    return ".flac", file.getvalue()


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    tar.addfile(member, io.BytesIO(content))


@command
def main(argv: list[str] | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi_finetune.data.shard_writer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", help="a corpus folder, e.g. in LibriSpeech's layout")
    parser.add_argument("output", help="folder of the shards")
    parser.add_argument("--splits", nargs="+", required=True, help="names or patterns")
    parser.add_argument("--megabytes", type=float, default=500, help="size of a shard; default 500")
    arguments = parser.parse_args(argv)
    for path in write_shards(
        arguments.folder, arguments.output, arguments.splits, arguments.megabytes
    ):
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
