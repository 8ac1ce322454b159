"""From a corpus folder to a manifest.

A manifest is a plain mapping ``{id: {"wav": path, "duration": seconds, "speaker":
..., "text": str or None}}``, the form of SpeechBrain's JSON manifests. Corpora
with ready-made mixtures (VoiceBank-DEMAND) also have ``"noisy"`` and, where
the corpus states it, ``"snr"`` and ``"noise_class"``.
"""

import fnmatch
import logging
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, audio_info, find_audio
from pi_finetune.data.layouts import is_listed, prepare_listed
from pi_finetune.data.shards import is_shards, prepare_shards
from pi_finetune.data.texts import read_lines, read_transcripts
from pi_finetune.errors import UserError

__all__ = ["prepare_noise", "prepare_speech", "read_transcripts"]


logger = logging.getLogger(__name__)


def prepare_speech(
    folder: str | Path, splits: str | Sequence[str], min_seconds: float = 0.1
) -> dict:
    """Make the manifest of some splits of a corpus whose layout is recognised by its folders.

    Arguments
    ---------
    folder : str or Path
        LibriSpeech layout (``SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac``) or
        VoiceBank-DEMAND layout (``clean_*_wav`` beside ``noisy_*_wav``), or shards (see
        :mod:`pi_finetune.data.shards`); or lists of files of any rate and channel count:
        SpeechBrain's CSV, lhotse's cuts, a Kaldi data folder, a data set of the hub (``hf:NAME``
        or ``hf:NAME:SPLIT``), or a folder of such files (see
        :func:`pi_finetune.data.layouts.prepare_listed`).
    splits : str or list of str
        Names or glob patterns of the splits, e.g. ``"train-*"``; a single list of files is one
        split, whatever they say. For
        VoiceBank-DEMAND, ``train``, ``dev`` (speakers p226 and p287 of the training
        set, as is usual) and ``test``; a trailing ``*`` is allowed. Where the sets of 28 and of
        56 speakers are both there, ``train`` is both of them, ``train_28spk`` the one.
    min_seconds : float
        Shorter utterances are refused: the teacher could make no frame of them.

    Returns
    -------
    dict
        The manifest, sorted by id.
    """
    splits = [splits] if isinstance(splits, str) else list(splits)
    source, folder = folder, Path(folder)
    listed = is_listed(source, splits)
    if not listed and not is_shards(folder) and not folder.is_dir():
        raise UserError(f"data_folder: {folder} is no folder.")
    if listed:
        manifest = prepare_listed(source, splits)
    elif is_shards(folder):
        manifest = prepare_shards(folder, splits)
    elif any(folder.glob("clean_*_wav")):
        manifest = _voicebank(folder, splits)
    else:
        manifest = prepare_librispeech(folder, splits)
    short = [k for k, v in manifest.items() if v["duration"] < min_seconds]
    if short:
        first = manifest[short[0]]
        raise UserError(
            f"{first['wav']}: {first['duration']:.3f} s is too short, needed are {min_seconds} s "
            f"({len(short)} such files). Remove them from the corpus folder."
        )
    return manifest


def prepare_librispeech(folder, splits):
    """Make the manifest of a LibriSpeech-layout corpus; ``text`` is None without a transcript."""
    folder = Path(folder)
    chosen = _matching_folders(folder, splits)
    manifest: dict = {}
    for split in chosen:
        files = find_audio(split)
        texts = read_transcripts(split)
        for path in tqdm(
            files, desc=f"reading {split.name}", leave=False, disable=len(files) < 500
        ):
            if path.stem in manifest:
                raise UserError(f"{path}: the id {path.stem} is also {manifest[path.stem]['wav']}.")
            manifest[path.stem] = {
                "wav": str(path),
                "duration": audio_info(path).frames / SAMPLE_RATE,
                "speaker": path.stem.split("-")[0],
                "text": texts.get(path.stem),
            }
        untranscribed = [path for path in files if path.stem not in texts]
        if texts and untranscribed:
            logger.warning(
                f"{split}: {len(untranscribed)} of {len(files)} utterances have no line in a "
                f"*.trans.txt, the first is {untranscribed[0]}. They count in no word error rate."
            )
    if not manifest:
        raise UserError(
            f"data_folder: no audio in {', '.join(str(s) for s in chosen)}; expected "
            "SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac."
        )
    return dict(sorted(manifest.items()))


def _matching_folders(folder, patterns):
    if not folder.is_dir():
        raise UserError(f"data_folder: {folder} is no folder.")
    present = sorted(p for p in folder.iterdir() if p.is_dir())
    chosen = []
    for pattern in patterns:
        matches = [p for p in present if fnmatch.fnmatch(p.name, pattern)]
        if not matches:
            raise UserError(
                f"{folder} has no split {pattern!r}; it has: "
                f"{', '.join(p.name for p in present) or 'no folders at all'}. "
                "Name the splits with --train_splits, --valid_splits, --test_splits."
            )
        chosen += [p for p in matches if p not in chosen]
    return chosen


_VOICEBANK_DEV_SPEAKERS = ("p226", "p287")


def _voicebank(folder, splits):
    """VoiceBank-DEMAND (Valentini-Botinhao 2017), resampled to 16 kHz, transcripts in ``*_txt``."""
    manifest: dict = {}
    for split in splits:
        named = re.fullmatch(r"(train|dev|valid|test)(?:set)?[-_]?(\w*)\*?", split)
        if named is None:
            raise UserError(
                f"data_folder: {folder} is VoiceBank-DEMAND, whose splits are train, dev and test; "
                f"there is no {split!r}. Set --train_splits, --valid_splits, --test_splits."
            )
        name, speakers = named.groups()
        kind = "testset" if name == "test" else "trainset"
        clean_folders = sorted(folder.glob(f"clean_{kind}*{speakers}_wav"))
        if not clean_folders:
            raise UserError(f"data_folder: {folder} has no clean_{kind}*_wav for split {split!r}.")
        log = _voicebank_log(folder, kind)
        before, untranscribed = len(manifest), []
        for clean_folder in clean_folders:
            noisy_folder = folder / clean_folder.name.replace("clean_", "noisy_", 1)
            text_folder = folder / f"{clean_folder.name[len('clean_') : -len('_wav')]}_txt"
            for clean in find_audio(clean_folder):
                speaker = clean.stem.split("_")[0]
                is_dev = speaker in _VOICEBANK_DEV_SPEAKERS
                if kind == "trainset" and is_dev != (name != "train"):
                    continue
                noisy = noisy_folder / clean.name
                if not noisy.is_file():
                    raise UserError(f"{noisy}: missing; it is the noisy version of {clean}.")
                frames = audio_info(clean).frames
                if audio_info(noisy).frames != frames:
                    raise UserError(f"{noisy}: not as long as {clean}.")
                text = text_folder / f"{clean.stem}.txt"
                if text_folder.is_dir() and not text.is_file():
                    untranscribed.append(text)
                manifest[clean.stem] = {
                    "wav": str(clean),
                    "noisy": str(noisy),
                    "duration": frames / SAMPLE_RATE,
                    "speaker": speaker,
                    "text": _voicebank_text(text) if text.is_file() else None,
                    **log.get(clean.stem, {}),
                }
        if untranscribed:
            logger.warning(
                f"{len(untranscribed)} utterances of split {split!r} have no transcript, the first "
                f"is {untranscribed[0]}. They count in no word error rate."
            )
        if len(manifest) == before and kind == "trainset" and name != "train":
            raise UserError(
                f"data_folder: {folder} has no utterance of {' or '.join(_VOICEBANK_DEV_SPEAKERS)}"
                ", the speakers of the training set that are its dev set. Put their files into "
                f"{clean_folders[0].name} and its noisy folder, or choose another split, e.g. "
                '--valid_splits "[test]".'
            )
    if not manifest:
        raise UserError(f"data_folder: {folder} holds no utterance of the splits {splits}.")
    return dict(sorted(manifest.items()))


def _voicebank_text(path):
    text = " ".join(line for _, line in read_lines(path))
    if not text:
        raise UserError(f"{path}: is empty. Write the transcript into it, or remove the file.")
    return text


def _voicebank_log(folder, kind):
    """Noise class and SNR from the corpus's own log files, lines ``p232_001 bus 12.5``."""
    entries: dict = {}
    origin: dict = {}
    for path in sorted(folder.glob(f"log_{kind}*.txt")):
        for number, line in read_lines(path):
            place = f"{path}, line {number}"
            fields = line.split()
            try:
                key, noise, snr = fields
                snr = float(snr)
            except ValueError:
                snr = math.nan
            if not math.isfinite(snr):
                raise UserError(
                    f"{place}: expected id, noise and SNR in dB, like 'p232_001 bus 12.5', "
                    f"found {line!r}. Correct the line, or remove the file."
                )
            entry = {"noise_class": noise, "snr": snr}
            if entries.setdefault(key, entry) != entry:
                raise UserError(f"{place}: {key} has another line already, {origin[key]}.")
            origin[key] = place
    return entries


#: Shares of each class's recordings, or of the time of a single recording, per split.
_NOISE_SHARES = (("test", 0.2), ("dev", 0.15), ("train", 1.0))


def prepare_noise(folder: str | Path, split: str, classes: Sequence[str] | None = None) -> dict:
    """Make the noise manifest of one split; no recording second is in two splits.

    The class of ``CLASS-anything.flac`` is CLASS; of DEMAND's ``CLASS/ch01.wav`` it is the
    folder, less a final ``_16k`` (channels 2 to 16 are the same moment again and are left out); of
    any other file, its stem. Within a class, recordings are divided between train, dev and test by
    a hash of their name; takes ``-A``, ``-B`` of one ESC recording stay together. A class with
    fewer than four recordings is divided in time.

    Arguments
    ---------
    folder : str or Path
        Searched recursively.
    split : str
        ``train``, ``dev`` or ``test``.
    classes : list of str, optional
        Keep these classes only. Default: all.

    Returns
    -------
    dict
        ``{id: {"wav", "class", "start", "frames"}}``, start and frames in samples.
    """
    folder = Path(folder)
    by_class: dict = {}
    for path in find_audio(folder):
        name = _noise_class(path)
        if name is not None:
            by_class.setdefault(name, []).append(path)
    if not by_class:
        raise UserError(f"noise_folder: no audio file in {folder}.")
    if classes is not None:
        missing = sorted(set(classes) - set(by_class))
        if missing:
            raise UserError(
                f"noise_classes: {folder} has no {', '.join(missing)}; "
                f"it has: {', '.join(sorted(by_class))}."
            )
        by_class = {name: by_class[name] for name in classes}

    manifest = {}
    for name, paths in sorted(by_class.items()):
        groups: dict = {}
        for path in paths:
            groups.setdefault(_recording(path), []).append(path)
        order = sorted(groups, key=lambda recording: (zlib.crc32(recording.encode()), recording))
        by_time = len(order) < 4
        cuts = _cuts(len(order))
        for rank, recording in enumerate(order):
            for path in groups[recording]:
                frames = audio_info(path).frames
                start, stop = 0, frames
                if by_time:
                    start, stop = (int(edge * frames) for edge in _time_cut(split))
                elif not cuts[split][0] <= rank < cuts[split][1]:
                    continue
                manifest[str(path.relative_to(folder))] = {
                    "wav": str(path),
                    "class": name,
                    "start": start,
                    "frames": stop - start,
                }
    return manifest


def _noise_class(path):
    if path.stem.startswith("ch") and path.stem[2:].isdigit():
        return re.sub("_(16|48)k$", "", path.parent.name) if path.stem == "ch01" else None
    return path.stem.split("-")[0]


def _recording(path):
    # ESC names clips CLASS-FOLD-RECORDING-TAKE; takes of one recording sound alike.
    parts = path.stem.split("-")
    return "-".join(parts[:-1]) if len(parts) == 4 and len(parts[-1]) == 1 else path.stem


def _cuts(count):
    edges, start = {}, 0
    for split, share in _NOISE_SHARES:
        stop = count if split == "train" else start + max(1, round(share * count))
        edges[split] = (start, stop)
        start = stop
    return edges


def _time_cut(split):
    edges, start = {}, 0.0
    for name, share in _NOISE_SHARES:
        edges[name] = (start, min(1.0, start + share))
        start = edges[name][1]
    return edges[split]
