"""Reading speech from WebDataset shards: few large tar files in place of many small ones.

:mod:`pi_finetune.data.shard_writer` writes them. Those written by others are read, if a sample has
one audio file and at most one ``.txt`` (its transcript) or ``.json`` (``text``, ``speaker``).

Samples are read by their place in the file, not in a stream: so order, crops and mixtures are the
same function of seed, pass and id as with folders, and a resumed run continues exactly.
"""

import fnmatch
import json
import re
import shlex
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import braceexpand
from tqdm import tqdm

from pi_finetune.data.audio import AUDIO_SUFFIXES, SAMPLE_RATE, Member, audio_info
from pi_finetune.errors import UserError
from pi_finetune.files import write_text

__all__ = ["index_shard", "is_shards", "prepare_shards"]


def is_shards(folder: str | Path) -> bool:
    """Whether ``folder`` names shards: a pattern ending in ``.tar``, or a folder of such files."""
    if str(folder).endswith(".tar"):
        return True
    inside = list(Path(folder).glob("*"))
    return any(path.suffix == ".tar" for path in inside) and not any(p.is_dir() for p in inside)


def prepare_shards(source: str | Path, splits: Sequence[str]) -> dict:
    """Make the manifest of shards; see :mod:`pi_finetune.data.corpora` for its form.

    What is in a shard is listed once and kept beside it as ``SHARD.index.json``.

    Arguments
    ---------
    source : str or Path
        A folder of ``.tar`` files, or their names with braces:
        ``shards/train-{000000..000009}.tar``.
    splits : list of str
        Patterns of the shards' names before the number: ``train*`` takes ``train-000000.tar``.

    Returns
    -------
    dict
        The manifest, sorted by id.
    """
    shards = sorted(Path(source).glob("*.tar"))
    if str(source).endswith(".tar"):
        shards = [Path(name) for name in braceexpand.braceexpand(str(source))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"data_folder: {missing[0]} is missing ({len(missing)} such shards).")
    manifest: dict = {}
    for pattern in splits:
        chosen = [shard for shard in shards if fnmatch.fnmatch(_split(shard), pattern)]
        if not chosen:
            names = sorted({_split(shard) for shard in shards})
            raise UserError(
                f"data_folder: no shard of {source} is of split {pattern!r}; there are: "
                f"{', '.join(names)}. Name the splits with --train_splits, --valid_splits, "
                "--test_splits."
            )
        for shard in tqdm(chosen, desc="reading shards", leave=False, disable=len(chosen) < 20):
            for key, entry in index_shard(shard).items():
                if key in manifest and manifest[key]["wav"].shard != str(shard):
                    raise UserError(
                        f"{shard}: the id {key} is also in {manifest[key]['wav'].shard}."
                    )
                member = Member(str(shard), *entry.pop("member"))
                manifest[key] = {"wav": member, **entry}
    return dict(sorted(manifest.items()))


def _split(shard):
    return re.sub(r"-?\d+$", "", shard.stem)


def index_shard(shard: Path) -> dict:
    """What is in a shard, from ``SHARD.index.json`` if that is of this very file.

    Arguments
    ---------
    shard : Path

    Returns
    -------
    dict
        ``{id: {"member": [name, offset, bytes], "duration", "speaker", "text"}}``.

    Raises
    ------
    UserError
        It is no shard, holds no audio, or a sample is damaged or ambiguous.
    """
    index_file = shard.with_name(f"{shard.name}.index.json")
    stat = shard.stat()
    made_from = [stat.st_size, stat.st_mtime_ns]
    if index_file.exists():
        try:
            index = json.loads(index_file.read_text())
            if index["made_from"] == made_from:
                return index["samples"]
        except (ValueError, KeyError):
            pass  # torn or foreign: made anew
    samples: dict = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = Path(member.name).name.partition(".")
                sample = samples.setdefault(key, {})
                place: list = [member.name, member.offset_data, member.size]
                if f".{suffix.lower()}" in AUDIO_SUFFIXES:
                    if "member" in sample:
                        raise UserError(
                            f"{shard}: {key} has two audio files, {sample['member'][0]} and "
                            f"{member.name}. Pack one a sample."
                        )
                    info = audio_info(
                        Member(str(shard), member.name, member.offset_data, member.size)
                    )
                    sample |= {"member": place, "duration": info.frames / SAMPLE_RATE}
                elif suffix == "txt":
                    sample["text"] = _decoded(tar, member, shard).strip()
                elif suffix == "json":
                    try:
                        described = dict(json.loads(_decoded(tar, member, shard)))
                    except (TypeError, json.JSONDecodeError) as error:
                        raise UserError(
                            f"{shard}: {member.name} is no JSON mapping ({error})."
                        ) from None
                    sample |= {k: described[k] for k in ("text", "speaker") if k in described}
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shard}: cannot be read as a shard ({error}). Copy it anew.") from None
    samples = {
        key: {"speaker": key.split("-")[0], "text": None, **sample}
        for key, sample in samples.items()
        if "member" in sample
    }
    if not samples:
        raise UserError(f"{shard}: holds no audio ({', '.join(AUDIO_SUFFIXES)}).")
    try:
        write_text(index_file, json.dumps({"made_from": made_from, "samples": samples}))
    except OSError:
        pass  # a folder one may only read: listed anew each time
    return samples


def _decoded(tar, member, shard):
    try:
        return tar.extractfile(member).read().decode()
    except UnicodeDecodeError:
        raise UserError(
            f"{shard}: {member.name} is not UTF-8. Convert it and pack the shard anew."
        ) from None


if __name__ == "__main__":
    words = ["python", "-m", "pi_finetune.data.shard_writer", *sys.argv[1:]]
    sys.exit(f"error: type: {shlex.join(words)}")
