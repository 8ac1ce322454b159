"""Recordings of any rate and channel count in the layouts of others: tables, cuts, the hub.

A manifest of recordings is like that of :func:`pi_finetune.data.corpora.prepare_speech`, with
``rate``, ``start`` and ``channel`` beside ``wav``; :func:`read_recording` reads an entry at 16 kHz.
:func:`prepare_listed` makes one as a corpus has it.
"""

import csv
import fnmatch
import gzip
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from pi_finetune.data.audio import SAMPLE_RATE, Converted, find_audio, libsndfile_says, resample
from pi_finetune.data.texts import read_lines, read_table, read_transcripts
from pi_finetune.errors import UserError, optional
from pi_finetune.files import shown

__all__ = ["is_listed", "prepare_listed", "prepare_recordings", "read_recording"]


#: So much is read of a file at once, in samples: what is kept of it is one channel.
_BLOCK = 1 << 20


def prepare_recordings(
    source: str | Path,
    splits: list[str] | None = None,
    channel: int | None = None,
    min_seconds: float = 0.1,
) -> dict:
    """Make the manifest of a set of recordings that have no clean version.

    Arguments
    ---------
    source : str or Path
        One of

        - a Kaldi data folder: ``wav.scp``, and where they are there ``segments``, ``text``,
          ``utt2spk``; or the ``wav.scp`` itself, beside which the others lie. Paths are relative to
          the working folder, as in Kaldi, or else to that of ``wav.scp``;
        - ``NAME.csv`` as SpeechBrain has it, with columns ``ID``, ``wav`` and perhaps ``duration``,
          ``wrd``, ``spk_id``, ``start`` and ``stop`` (seconds); ``$data_root`` is its folder;
        - ``NAME.jsonl`` or ``NAME.jsonl.gz``, cuts of lhotse (needs the extra ``corpora``);
        - ``hf:NAME`` or ``hf:NAME:SPLIT``, a data set of the hub, which is read from the cache
          alone with HF_HUB_OFFLINE=1 (needs the extra ``corpora``);
        - any other folder of audio files, with LibriSpeech's ``*.trans.txt`` or without.
    splits : list of str, optional
        For such other folders: names or patterns of the folders in ``source`` that are taken.
        Default: all audio in it.
    channel : int, optional
        The channel to take, from 1. Default: that of the manifest, or the mean of all.
    min_seconds : float
        Shorter recordings are refused. Default: 0.1.

    Returns
    -------
    dict
        ``{id: {"wav", "start", "duration", "rate", "channel", "speaker", "text"}}`` sorted by id;
        start and duration in seconds, rate in Hz, channel from 1 or None for the mean, text None
        where there is no transcript.

    Raises
    ------
    UserError
        Something is missing or damaged; the message names file and line.
    """
    if channel is not None and (not isinstance(channel, int) or channel < 1):
        raise UserError(f"channel: {channel!r} is no channel; they count from 1.")
    name, path = str(source), Path(source)
    if splits is not None and (name.startswith("hf:") or not path.is_dir()):
        raise UserError(f"splits: {name} has none; name what is to be read in the source itself.")
    if name.startswith("hf:"):
        manifest = _from_hub(name)
    elif not path.exists():
        raise UserError(f"{shown(path)}: there is no such file or folder.")
    elif path.is_dir():
        scp = path / "wav.scp"
        manifest = _from_kaldi(scp) if scp.is_file() else _from_folder(path, splits)
    else:
        manifest = _from_file(path)
    return _finished(name, manifest, channel, min_seconds)


def is_listed(source: str | Path, splits: Sequence[str] = ()) -> bool:
    """Whether a corpus is given by a list of its files, and not by the folders they lie in.

    Arguments
    ---------
    source : str or Path
        A file, ``hf:NAME``, or a folder.
    splits : list of str
        A folder that has folders of these names, or that match these patterns, is none.

    Returns
    -------
    bool
    """
    path = Path(source)
    if str(source).startswith("hf:") or path.name.endswith(_LISTS):
        return True
    if not path.is_dir():
        return False
    if (path / "wav.scp").is_file() or any(path.glob("*/wav.scp")):
        return True
    folders = [p.name for p in path.iterdir() if p.is_dir()]
    return bool(_lists_in(path)) and not any(fnmatch.filter(folders, s) for s in splits)


def prepare_listed(source: str | Path, splits: list[str]) -> dict:
    """Make the manifest of a corpus that is given by lists of its files.

    Arguments
    ---------
    source : str or Path
        What :func:`is_listed` knows: a file, Kaldi data folder or ``hf:NAME:SPLIT`` is one split,
        which is taken whole; of a folder of such files or Kaldi folders, and of ``hf:NAME``,
        ``splits`` chooses.
    splits : list of str
        Names or patterns: of ``train.csv``, ``train.jsonl.gz`` and ``train/wav.scp`` the name is
        ``train``.

    Returns
    -------
    dict
        ``{id: {"wav", "duration", "speaker", "text"}}`` as of
        :func:`pi_finetune.data.corpora.prepare_speech`. ``wav`` is a path where that is of a file
        of 16 kHz and one channel, taken whole, else :class:`~pi_finetune.data.audio.Converted`.

    Raises
    ------
    UserError
        Something is missing or damaged; the message names file and line.
    """
    name, path = str(source), Path(source)
    if name.startswith("hf:"):
        manifest = _from_hub(name, splits)
    elif not path.exists():
        raise UserError(f"data_folder: {shown(path)}: there is no such file or folder.")
    elif path.is_file() or (path / "wav.scp").is_file():
        manifest = _from_file(path if path.is_file() else path / "wav.scp")
    else:
        named = {p.parent.name: p for p in sorted(path.glob("*/wav.scp"))} or _lists_in(path)
        manifest = {}
        for split in _chosen(path, named, splits):
            for key, entry in _from_file(named[split]).items():
                _add(manifest, key, entry)
    paths = {key for key, entry in manifest.items() if _is_plain(entry)}
    listed = {}
    for key, entry in _finished(name, manifest).items():
        frames = math.ceil(round(entry["duration"] * entry["rate"]) * SAMPLE_RATE / entry["rate"])
        listed[key] = {
            "wav": entry["wav"] if key in paths else _converted(entry),
            "duration": frames / SAMPLE_RATE,  # as resampled
            "speaker": entry["speaker"],
            "text": entry["text"],
        }
    return listed


_LISTS = (".csv", ".jsonl", ".jsonl.gz", "wav.scp")


def _lists_in(folder):
    """The lists of files in a folder, by the name of the split."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(_LISTS[:-1]))
    return {re.sub(r"\.(csv|jsonl|jsonl\.gz)$", "", path.name): path for path in found}


def _chosen(source, present, splits):
    """The names among those that are there that ``splits`` chooses, in the order of ``splits``."""
    chosen = []
    for pattern in splits:
        matches = fnmatch.filter(sorted(present), pattern)
        if not matches:
            raise UserError(
                f"{source} has no split {pattern!r}; it has: {', '.join(sorted(present))}. "
                "Name the splits with --train_splits, --valid_splits, --test_splits."
            )
        chosen += [split for split in matches if split not in chosen]
    return chosen


def _is_plain(entry):
    """Whether an entry is a whole file of 16 kHz and one channel."""
    mono = entry["rate"] == SAMPLE_RATE and entry["channels"] == 1
    return mono and entry["whole"] and isinstance(entry["wav"], str)


def _converted(entry):
    name = f"{entry['wav']} from {entry['start']:g} to {entry['start'] + entry['duration']:g} s"
    return Converted(name, read_recording, entry)


def _from_file(path):
    if path.suffix == ".scp":
        return _from_kaldi(path)
    if path.suffix == ".csv":
        return _from_csv(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _from_lhotse(path)
    raise UserError(
        f"{shown(path)}: is none of a folder, wav.scp, .csv, .jsonl, .jsonl.gz, hf:NAME."
    )


def _finished(name, manifest, channel=None, min_seconds=0.1):
    if not manifest:
        raise UserError(f"{name}: holds no recording.")
    for entry in manifest.values():
        place = entry.pop("place")
        channels = entry.pop("channels")
        del entry["whole"]
        if channel is not None:
            entry["channel"] = channel
        if entry["channel"] is not None and entry["channel"] > channels:
            raise UserError(
                f"{place}: channel {entry['channel']} is not there; {entry['wav']} has {channels}."
            )
        if entry["duration"] < min_seconds:
            raise UserError(
                f"{place}: {entry['duration']:.3f} s is too short, needed are {min_seconds} s."
            )
    return dict(sorted(manifest.items()))


def read_recording(entry: dict) -> torch.Tensor:
    """Read an entry of :func:`prepare_recordings`.

    Arguments
    ---------
    entry : dict

    Returns
    -------
    torch.Tensor
        [T], float32, 16 kHz: the channel of the entry, or the mean of all.

    Raises
    ------
    UserError
        The file cannot be read, ends before the recording does, or holds non-finite samples.
    """
    wav, rate = entry["wav"], entry["rate"]
    start, frames = round(entry["start"] * rate), round(entry["duration"] * rate)
    try:
        with soundfile.SoundFile(_opened(wav)) as file:
            file.seek(start)
            samples = np.concatenate(list(_read_channel(file, frames, entry["channel"])))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{wav}: cannot be read as audio ({libsndfile_says(error)}). Replace the file."
        ) from None
    if len(samples) < frames or not np.isfinite(samples).all():
        raise UserError(
            f"{wav}: ends before, or holds non-finite samples in, {entry['start']:g} to "
            f"{entry['start'] + entry['duration']:g} s. Replace the file."
        )
    resampled = resample(samples[None], rate, SAMPLE_RATE)[0]
    return torch.from_numpy(np.ascontiguousarray(resampled))


def _read_channel(file, frames, channel):
    """Yield the next ``frames`` samples [n] of a channel, from 1, or of the mean of all (None)."""
    yield np.zeros(0, np.float32)
    while frames > 0:
        block = file.read(min(frames, _BLOCK), dtype="float32", always_2d=True)
        if not len(block):
            return  # the file ends early
        yield block.mean(axis=1) if channel is None else block[:, channel - 1]
        frames -= len(block)


class HubAudio:
    """An audio file in a data set of the hub, given where a path is expected.

    Arguments
    ---------
    dataset : datasets.Dataset
        With its audio column not decoded.
    index : int
    column : str
    name : str
        For messages.
    """

    def __init__(self, dataset: Any, index: int, column: str, name: str):
        self.dataset, self.index, self.column, self.name = dataset, index, column, name

    def __str__(self):
        return self.name

    def open(self) -> io.BytesIO:
        """Its bytes as a file."""
        held = self.dataset[self.index][self.column]
        return io.BytesIO(held["bytes"] or Path(held["path"]).read_bytes())


def _opened(wav):
    return wav.open() if isinstance(wav, HubAudio) else os.fsencode(wav)


def _entry(place, wav, start=0.0, stop=None, speaker=None, text=None, channel=None):
    """An entry, of which the file is looked at; ``place`` is what messages begin with."""
    try:
        info = soundfile.info(_opened(wav))
    except (OSError, RuntimeError, TypeError) as error:
        there = isinstance(wav, HubAudio) or os.path.exists(wav)
        what = f"cannot be read as audio ({libsndfile_says(error)})" if there else "is missing"
        raise UserError(f"{place}: {wav} {what}.") from None
    length = info.frames / info.samplerate
    stop = length if stop is None else stop
    # Manifests round to milliseconds, or to the 10 ms of a frame.
    if not 0 <= start < stop <= length + 0.02:
        raise UserError(
            f"{place}: {start:g} to {stop:g} s is not within {wav}, which has {length:g} s."
        )
    return {
        "wav": wav,
        "start": start,
        "duration": min(stop, length) - start,
        "rate": info.samplerate,
        "channel": channel,
        "channels": info.channels,
        "whole": start == 0 and stop >= length,
        "speaker": speaker,
        "text": text,
        "place": place,
    }


def _add(manifest, key, entry):
    if key in manifest:
        raise UserError(f"{entry['place']}: the id {key} is also that of {manifest[key]['place']}.")
    manifest[key] = entry


def _from_folder(folder, splits):
    folders = [folder]
    if splits is not None:
        present = sorted(p for p in folder.iterdir() if p.is_dir())
        folders = []
        for pattern in [splits] if isinstance(splits, str) else splits:
            matches = [p for p in present if fnmatch.fnmatch(p.name, pattern)]
            if not matches:
                raise UserError(
                    f"{shown(folder)} has no split {pattern!r}; it has: "
                    f"{', '.join(p.name for p in present) or 'no folders at all'}."
                )
            folders += [p for p in matches if p not in folders]
    manifest: dict = {}
    for chosen in folders:
        texts = read_transcripts(chosen)
        for path in find_audio(chosen):
            speaker = path.stem.split("-")[0]
            entry = _entry(str(path), str(path), speaker=speaker, text=texts.get(path.stem))
            _add(manifest, path.stem, entry)
    return manifest


def _from_kaldi(scp):
    folder, wavs = scp.parent, {}
    for key, (number, name) in read_table(scp).items():
        if name.endswith("|"):
            raise UserError(
                f"{shown(scp)}, line {number}: is a command, and none is run. Write its output to "
                "a file, and name that."
            )
        beside = folder / name
        wavs[key] = number, str(beside if not Path(name).is_file() and beside.is_file() else name)

    def beside_it(name):
        path = folder / name
        return read_table(path) if path.is_file() else {}

    texts, speakers, segments = map(beside_it, ("text", "utt2spk", "segments"))
    manifest: dict = {}
    if not segments:
        segments = {key: (number, None) for key, (number, _) in wavs.items()}
        listed = scp
    else:
        listed = folder / "segments"
    for key, (number, segment) in segments.items():
        place, recording, start, stop = f"{shown(listed)}, line {number}", key, 0.0, None
        if segment is not None:
            try:
                recording, begin, end = segment.split()
                start, stop = float(begin), float(end)
            except ValueError:
                raise UserError(
                    f"{place}: expected utterance, recording, start and end in seconds, found "
                    f"{key} {segment!r}."
                ) from None
            if recording not in wavs:
                raise UserError(f"{place}: {shown(scp)} has no recording {recording}.")
            stop = None if stop < 0 else stop  # Kaldi's -1: to the end
        _, speaker = speakers.get(key, (0, key.split("-")[0]))
        _, text = texts.get(key, (0, None))
        manifest[key] = _entry(place, wavs[recording][1], start, stop, speaker, text)
    for file, table in (("text", texts), ("utt2spk", speakers)):
        unknown = next((key for key in table if key not in manifest), None)
        if unknown is not None:
            raise UserError(
                f"{shown(folder / file)}, line {table[unknown][0]}: {unknown} is no utterance of "
                f"{shown(listed)}. Correct the id, or remove the line."
            )
    return manifest


def _from_csv(path):
    lines = read_lines(path)  # refuses what is not UTF-8
    rows = csv.DictReader((line for _, line in lines), skipinitialspace=True)
    numbers = [number for number, _ in lines]
    columns = [name.strip() for name in rows.fieldnames or ()]
    if not {"ID", "wav"} <= set(columns):
        raise UserError(
            f"{shown(path)}, line {numbers[0] if numbers else 1}: a header with the columns ID and "
            f"wav is expected, found {', '.join(columns) or 'nothing'}."
        )
    rows.fieldnames = columns
    manifest: dict = {}
    for row in rows:
        place = f"{shown(path)}, line {numbers[rows.line_num - 1]}"
        if None in row or None in row.values():
            raise UserError(f"{place}: has another number of columns than the header.")

        def seconds(name, row=row, place=place):
            value = (row.get(name) or "").strip()
            try:
                return None if not value else float(value)
            except ValueError:
                raise UserError(f"{place}: {name} is {value!r}, no number of seconds.") from None

        start, stop, duration = seconds("start") or 0.0, seconds("stop"), seconds("duration")
        wav = row["wav"].strip().replace("$data_root", str(path.parent))
        beside = path.parent / wav
        wav = str(beside if not Path(wav).is_file() and beside.is_file() else wav)
        key, text = row["ID"].strip(), (row.get("wrd") or "").strip() or None
        speaker = (row.get("spk_id") or "").strip() or key.split("-")[0]
        entry = _entry(place, wav, start, stop, speaker, text)
        if duration is not None and abs(duration - entry["duration"]) > 0.02:
            raise UserError(
                f"{place}: the duration is {duration:g}, but {wav} gives {entry['duration']:g} s."
            )
        _add(manifest, key, entry)
    return manifest


def _from_lhotse(path):
    lhotse = optional("lhotse.serialization", "corpora", f"{shown(path)} (cuts of lhotse)")
    manifest: dict = {}
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)}: cannot be read ({error}). Copy it anew.") from None
    for number, line in lines:
        place = f"{shown(path)}, line {number}"
        try:
            cut = lhotse.deserialize_item(json.loads(line))
        except Exception as error:  # lhotse's constructors raise anything
            raise UserError(f"{place}: is no cut of lhotse ({error!r}).") from None
        sources: Any = getattr(getattr(cut, "recording", None), "sources", ())
        transformed = getattr(getattr(cut, "recording", None), "transforms", None)
        if type(cut).__name__ != "MonoCut" or len(sources) != 1 or sources[0].type != "file":
            raise UserError(
                f"{place}: {getattr(cut, 'id', 'it')} is no plain part of one audio file. Write it "
                "as one, with CutSet.save_audios of lhotse."
            )
        if transformed:
            raise UserError(
                f"{place}: {cut.id} is to be transformed. Write it as audio, with "
                "CutSet.save_audios of lhotse."
            )
        wav = sources[0].source
        beside = path.parent / wav
        wav = str(beside if not Path(wav).is_file() and beside.is_file() else wav)
        supervision = cut.supervisions[0] if cut.supervisions else None
        speaker = getattr(supervision, "speaker", None) or cut.id.split("-")[0]
        text = " ".join(s.text for s in cut.supervisions if s.text) or None
        channel = sources[0].channels.index(cut.channel) + 1
        end = cut.start + cut.duration
        _add(manifest, cut.id, _entry(place, wav, cut.start, end, speaker, text, channel))
    return manifest


_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")
_IDS = ("id", "segment_id", "utterance_id", "file")
_SPEAKERS = ("speaker_id", "speaker", "client_id")


def _from_hub(name, splits=None):
    datasets = optional("datasets", "corpora", name)
    _, rest = name.split(":", 1)
    dataset_name, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(dataset_name, split=split or None)
    except Exception as error:  # network, hub, files, splits: all end here
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: cannot be loaded ({reason}).") from None
    if not isinstance(loaded, dict):
        return _of_dataset(name, loaded, datasets)
    if splits is None and len(loaded) > 1:
        raise UserError(
            f"{name}: has the splits {', '.join(loaded)}. Name one: hf:{dataset_name}:SPLIT"
        )
    manifest: dict = {}
    for split in loaded if splits is None else _chosen(name, loaded, splits):
        for key, entry in _of_dataset(f"{name}:{split}", loaded[split], datasets).items():
            _add(manifest, key, entry)
    return manifest


def _of_dataset(name, loaded, datasets):
    """The manifest of one split of a data set."""
    audio = [key for key, kind in loaded.features.items() if isinstance(kind, datasets.Audio)]
    if len(audio) != 1:
        raise UserError(
            f"{name}: one column of audio is expected, found {', '.join(audio) or 'none'} among "
            f"{', '.join(loaded.features)}."
        )
    loaded = loaded.cast_column(audio[0], datasets.Audio(decode=False))

    def first(names):
        return next((column for column in names if column in loaded.features), None)

    ids, texts, speakers = map(first, (_IDS, _TEXTS, _SPEAKERS))
    manifest: dict = {}
    # Without ids, rows are numbered; the split is in the name, since another may be taken too.
    digits, of_split = max(6, len(str(len(loaded)))), str(loaded.split or "row")
    others = [column for column in (ids, texts, speakers) if column]
    described = loaded.select_columns(others) if others else [{}] * len(loaded)
    for i, row in enumerate(described):
        key = Path(str(row[ids])).stem if ids else f"{of_split}-{i:0{digits}d}"
        place = f"{name}, row {i}"
        wav = HubAudio(loaded, i, audio[0], place)
        speaker = str(row[speakers]) if speakers else key.split("-")[0] if ids else key
        text = (row[texts] or "").strip() or None if texts else None
        _add(manifest, key, _entry(place, wav, speaker=speaker, text=text))
    return manifest
