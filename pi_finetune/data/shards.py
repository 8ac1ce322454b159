"""Speech in WebDataset shards: few large tar files in place of many small ones.

    python -m pi_finetune.data.shards LibriSpeech shards --splits "train*"

writes ``shards/train-clean-100-000000.tar`` and so on, which any WebDataset reader takes; in turn
shards written by others are read, if a sample has an audio file and at most one ``.txt`` (its
transcript) or ``.json`` (``text``, ``speaker``).

Samples are read by their place in the file, not in a stream: so order, crops and mixtures are the
same function of seed, pass and id as with folders, and a resumed run continues exactly.
"""

import argparse
import fnmatch
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import braceexpand
from tqdm import tqdm

from pi_finetune.data.audio import AUDIO_SUFFIXES, SAMPLE_RATE, Member, audio_info
from pi_finetune.errors import UserError, command
from pi_finetune.files import replacing, write_text


def is_shards(folder):
    """Whether ``folder`` names shards: a pattern ending in ``.tar``, or a folder of such files."""
    if str(folder).endswith(".tar"):
        return True
    inside = list(Path(folder).glob("*"))
    return any(path.suffix == ".tar" for path in inside) and not any(p.is_dir() for p in inside)


def prepare_shards(source, splits):
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
    manifest = {}
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
            for key, entry in _index(shard).items():
                if key in manifest and manifest[key]["wav"].shard != str(shard):
                    raise UserError(
                        f"{shard}: the id {key} is also in {manifest[key]['wav'].shard}."
                    )
                member = Member(str(shard), *entry.pop("member"))
                manifest[key] = {"wav": member, **entry}
    return dict(sorted(manifest.items()))


def _split(shard):
    return re.sub(r"-?\d+$", "", shard.stem)


def _index(shard):
    """What is in a shard; from its index if that is of this very file."""
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
    samples = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, suffix = Path(member.name).name.partition(".")
                sample = samples.setdefault(key, {})
                place = [member.name, member.offset_data, member.size]
                if f".{suffix.lower()}" in AUDIO_SUFFIXES:
                    info = audio_info(Member(str(shard), *place))
                    sample |= {"member": place, "duration": info.frames / SAMPLE_RATE}
                elif suffix == "txt":
                    sample["text"] = tar.extractfile(member).read().decode().strip()
                elif suffix == "json":
                    described = json.loads(tar.extractfile(member).read())
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


def write_shards(folder, output, splits, megabytes=500):
    """Copy a corpus folder into shards, without changing its audio.

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
    """
    import webdataset  # reading does without

    from pi_finetune.data.corpora import prepare_speech  # which imports this module

    written = []
    for split in splits:
        name = split.strip("*-_ ") or "speech"
        manifest = prepare_speech(folder, [split])
        if any("noisy" in entry for entry in manifest.values()):
            raise UserError(
                f"{folder}: has noisy files of its own, for which shards have no place."
            )
        batch, size = [], 0
        batches = [batch]
        for key, entry in manifest.items():
            if size > megabytes * 1e6:
                batch, size = [], 0
                batches.append(batch)
            batch.append((key, entry))
            size += os.path.getsize(entry["wav"])
        for number, batch in enumerate(batches):
            path = Path(output) / f"{name}-{number:06d}.tar"
            with replacing(path) as temporary, webdataset.TarWriter(str(temporary)) as tar:
                for key, entry in batch:
                    if "." in key:
                        raise UserError(f"{entry['wav']}: WebDataset allows no dot in an id.")
                    wav = Path(entry["wav"])
                    described = {"text": entry["text"], "speaker": entry["speaker"]}
                    audio = {wav.suffix[1:].lower(): wav.read_bytes()}
                    tar.write({"__key__": key, **audio, "json": json.dumps(described).encode()})
            _index(path)
            written.append(path)
    return written


@command
def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pi_finetune.data.shards", description=__doc__)
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
