"""Datasets of noisy/clean pairs, and the sampler that counts in updates."""

import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.sampler import DynamicBatchSampler
from torch.utils.data import Dataset, Sampler

from pi_finetune.data.audio import SAMPLE_RATE, is_silent, read_audio
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.mixing import NoiseMixer
from pi_finetune.data.rooms import load_reverberator
from pi_finetune.errors import UserError
from pi_finetune.lengths import Lasting, Padded, Waveforms
from pi_finetune.seeding import utterance_rng

__all__ = [
    "ShareOfSampler",
    "SpeechPairs",
    "UpdateBatchSampler",
    "UpdateSampler",
    "choose",
    "collate",
    "load_pairs",
]


class SpeechPairs(Dataset):
    """Noisy/clean pairs of a speech manifest.

    An item is addressed by its index (development and test sets: the same
    mixture always) or by ``(index, data_pass)`` as :class:`UpdateSampler`
    yields them (training: another crop and mixture in every pass).

    Arguments
    ---------
    manifest : dict
        From :func:`pi_finetune.data.corpora.prepare_speech`. Entries with a ``noisy`` file are
        taken as they are; the others are mixed on the fly.
    mixer : pi_finetune.data.mixing.NoiseMixer, optional
        Needed unless every entry has a ``noisy`` file.
    seed : int
        Seed of all draws; see :mod:`pi_finetune.seeding`.
    segment_seconds : float, optional
        Length of a random crop; shorter utterances are taken whole. Default: no cropping.
    each_snr : bool
        Mix every utterance at every SNR of the mixer (ids get a suffix ``@5dB``)
        instead of drawing one. Default: False.
    reverberator : pi_finetune.data.rooms.Reverberator, optional
        Puts speech into rooms before noise is added; the target is then its early part. SNRs are
        those of the reverberant speech. Default: no rooms.
    """

    has_clean = True

    def __init__(
        self,
        manifest: dict,
        mixer: NoiseMixer | None = None,
        seed: int = 0,
        segment_seconds: float | None = None,
        each_snr: bool = False,
        reverberator: Any = None,
    ):
        if not manifest:
            raise UserError("The manifest is empty: no utterance matches the chosen splits.")
        self.manifest = manifest
        self.mixer = mixer
        self.reverberator = reverberator
        self.seed = seed
        self.segment = None if segment_seconds is None else int(segment_seconds * SAMPLE_RATE)
        snrs = mixer.snrs if each_snr and mixer is not None else [None]
        self.items = [(key, snr) for key in manifest for snr in snrs]

    def __len__(self):
        return len(self.items)

    def item_id(self, index: int) -> str:
        """The id of the pair at ``index``, without reading audio."""
        key, snr = self.items[index]
        return key if snr is None else f"{key}@{snr:g}dB"

    def item_text(self, index: int) -> None:
        """The transcript of the pair at ``index``, or None."""
        return self.manifest[self.items[index][0]]["text"]

    def seconds(self) -> Any:
        """Length of each pair in seconds, as it is loaded."""
        longest = float("inf") if self.segment is None else self.segment / SAMPLE_RATE
        return [min(self.manifest[key]["duration"], longest) for key, _ in self.items]

    def fingerprint(self) -> str:
        """A short digest of everything that determines the pairs, file contents aside."""
        noises = None
        if self.mixer is not None:
            recordings = [
                (name, Path(entry["wav"]).name, entry["start"], entry["frames"])
                for name, entries in self.mixer.by_class.items()
                for entry in entries
            ]
            noises = (self.mixer.snrs, recordings)
            if self.mixer.filtered:
                noises += (self.mixer.filtered,)
        entries = [(key, self.manifest[key]["duration"], snr) for key, snr in self.items]
        described = [entries, noises, self.seed, self.segment]
        if self.reverberator is not None:
            described.append(self.reverberator.described())
        described = json.dumps(described)
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def __getitem__(self, address):
        index, data_pass = address if isinstance(address, tuple) else (address, 0)
        key, snr = self.items[index]
        entry = self.manifest[key]
        rng = utterance_rng(self.seed, data_pass, key, "mixture")
        start, frames = self._crop(entry, rng)
        clean = read_audio(entry["wav"], start, frames)
        if is_silent(clean):
            if self.segment is not None and start + frames < entry["duration"] * SAMPLE_RATE:
                clean = read_audio(entry["wav"], 0, frames)  # a pause: take the beginning instead
                start = 0
            if is_silent(clean):
                raise UserError(
                    f"{entry['wav']}: silent from sample {start} on. Remove or replace it."
                )
        read = clean
        info = {"snr": entry.get("snr"), "noise_class": entry.get("noise_class")}
        if "noisy" in entry:
            noisy = read_audio(entry["noisy"], start, frames)
        elif self.reverberator is None:
            assert self.mixer is not None  # what has no noisy file needs one
            noisy, clean, info = self.mixer(clean, rng, snr)
        else:
            # A generator of its own: crop, noise and SNR are those that are drawn without rooms.
            room = utterance_rng(self.seed, data_pass, key, "room")
            heard, target = self.reverberator(clean, room)
            assert self.mixer is not None
            noisy, clean, info = self.mixer(heard, rng, snr, target)
        return {
            "id": self.item_id(index),
            "names": self._names(key, read, clean),
            "data_pass": data_pass,
            "noisy": noisy,
            "clean": clean,
            "recording": key,
            "speaker": entry.get("speaker"),
            "text": entry["text"],
            "duration": clean.shape[-1] / SAMPLE_RATE,
            **info,
        }

    def _names(self, key, read, clean):
        """Names of waveforms that are the same in every pass: whole clean speech without rooms."""
        if self.segment is not None or self.reverberator is not None:
            return {}
        name: Any = Lasting(key, zlib.crc32(read.numpy()))
        if not torch.equal(read, clean):  # scaled with its mixture
            name = (name, "gain", float(clean.abs().max() / read.abs().max()))
        return {"clean": name}

    def _crop(self, entry, rng):
        total = round(entry["duration"] * SAMPLE_RATE)
        if self.segment is None or total <= self.segment:
            return 0, total
        return int(rng.integers(total - self.segment + 1)), self.segment


class UpdateSampler(Sampler):
    """Goes through a dataset in shuffled passes, cut into epochs of a fixed number of items.

    An "epoch" of the Brain is then a fixed number of updates, whatever the
    corpus size, which puts all runs on one axis. Passes do not repeat an
    utterance before all others were seen. The order depends on the seed alone.

    Yields
    ------
    (int, int)
        Index of the utterance, and number of the pass over the data, from 0.
    """

    def __init__(self, dataset_size: int, items_per_epoch: int, seed: int):
        self.dataset_size = dataset_size
        self.items_per_epoch = items_per_epoch
        self.seed = seed
        self.epoch = 1

    def set_epoch(self, epoch: int | None) -> None:
        """Called by SpeechBrain's Brain before each epoch (the first is 1)."""
        self.epoch = epoch or 1

    def __len__(self):
        return self.items_per_epoch

    def __iter__(self):
        order: list[int] = []
        order_pass = None
        first = (self.epoch - 1) * self.items_per_epoch
        for position in range(first, first + self.items_per_epoch):
            data_pass, index = divmod(position, self.dataset_size)
            if data_pass != order_pass:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + data_pass)
                order = torch.randperm(self.dataset_size, generator=generator).tolist()
                order_pass = data_pass
            yield order[index], data_pass


class UpdateBatchSampler(Sampler):
    """Like :class:`UpdateSampler`, in batches of utterances of similar length.

    Every pass is divided anew into batches by SpeechBrain's DynamicBatchSampler, in buckets that
    hold equally many utterances each. An utterance is in one batch of a pass; the last batch of a
    bucket may be small. The order depends on the seed alone.

    Arguments
    ---------
    seconds : list of float
        Length of each utterance as it is loaded.
    batches_per_epoch : int
    seed : int
    max_batch_seconds : float
        Most seconds in a batch, padding included; a longer utterance is a batch by itself.
    max_batch_size : int
        Most utterances in a batch.
    buckets : int
        Default 20.

    Yields
    ------
    list of (int, int)
        A batch: index of each utterance, and number of the pass over the data, from 0.
    """

    def __init__(
        self,
        seconds: list[float],
        batches_per_epoch: int,
        seed: int,
        max_batch_seconds: float,
        max_batch_size: int,
        buckets: int = 20,
    ):
        self.seconds = [float(value) for value in seconds]
        self.batches_per_epoch = batches_per_epoch
        self.seed = seed
        shares = np.arange(1, buckets + 1) / buckets
        self.options = {
            "max_batch_length": max_batch_seconds,
            "max_batch_ex": max_batch_size,
            "bucket_boundaries": sorted({*np.quantile(self.seconds, shares, method="higher")}),
        }
        self.epoch = 1
        # The pass under way: an epoch is seldom a whole one.
        self._made: tuple[int | None, list] = (None, [])

    def set_epoch(self, epoch: int | None) -> None:
        """Called by SpeechBrain's Brain before each epoch (the first is 1)."""
        self.epoch = epoch or 1

    def __len__(self):
        return self.batches_per_epoch

    def batches(self, data_pass: int) -> list[list[int]]:
        """The batches of a pass; equally many in each, since the buckets stay the same."""
        if self._made[0] == data_pass:
            return self._made[1]
        sampler = DynamicBatchSampler(
            self.seconds,
            lengths_list=self.seconds,
            seed=self.seed * 1_000_003 + data_pass,
            epoch=1,  # at 0 it logs statistics of every bucket
            **self.options,
        )
        self._made = data_pass, list(sampler)
        return self._made[1]

    def __iter__(self):
        per_pass = len(self._made[1] or self.batches(0))
        first = (self.epoch - 1) * self.batches_per_epoch
        for position in range(first, first + self.batches_per_epoch):
            data_pass, index = divmod(position, per_pass)
            yield [(i, data_pass) for i in self.batches(data_pass)[index]]


class ShareOfSampler(Sampler):
    """What process ``rank`` of ``processes`` gets of a sampler: every ``processes``-th from it."""

    def __init__(self, sampler: Any, rank: int, processes: int):
        self.sampler = sampler
        self.rank = rank
        self.processes = processes

    def set_epoch(self, epoch: int | None) -> None:
        """Called by SpeechBrain's Brain before each epoch (the first is 1)."""
        self.sampler.set_epoch(epoch)

    def __len__(self):
        return len(self.sampler) // self.processes

    def __iter__(self):
        return itertools.islice(self.sampler, self.rank, None, self.processes)


def collate(examples: list[dict]) -> PaddedBatch:
    """Make a batch of examples: what a loader's ``collate_fn`` is here.

    Arguments
    ---------
    examples : list of dict
        Of equal keys. One-dimensional float tensors are waveforms.

    Returns
    -------
    speechbrain.dataio.batch.PaddedBatch
        Its tensors are :class:`~pi_finetune.lengths.Padded`, or
        :class:`~pi_finetune.lengths.Waveforms`, in place of SpeechBrain's ``PaddedData``, whose
        lengths are float shares. Waveforms are named as ``names`` of their example says for their
        key, or by their key, ``id`` and ``data_pass``. The SNRs are a list: clean speech among them
        has None.
    """
    tensors = {key for key, value in examples[0].items() if isinstance(value, torch.Tensor)}
    left_out = {"snr", "names"}
    known = [{k: v for k, v in example.items() if k not in left_out} for example in examples]
    batch = PaddedBatch(known, padded_keys=tensors, padding_func=_unpadded)
    if "snr" in examples[0]:
        batch.snr = [example["snr"] for example in examples]
    for key in tensors:
        rows = [example[key] for example in examples]
        if rows[0].dim() == 1 and rows[0].is_floating_point():
            names = tuple(
                x.get("names", {}).get(key, (key, x["id"], x.get("data_pass", 0)))
                for x in examples
                if "id" in x
            )
            setattr(batch, key, Waveforms.collate(rows, ids=names or None))
        else:
            setattr(batch, key, Padded.collate(rows))
    return batch


def _unpadded(rows):
    return rows, None


def choose(
    manifest: dict, count: int | None, max_seconds: float | None = None, seed: int = 0
) -> dict:
    """Keep ``count`` utterances (all if None) of at most ``max_seconds``, spread over speakers.

    Speakers take turns; within a speaker the order is drawn with ``seed``. The
    choice of a smaller count is contained in that of a larger one.
    """
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UserError(
            f"{count} utterances were asked for. Give a whole number from 1 on, or null for all "
            "(valid_utterances, test_utterances)."
        )
    by_speaker: dict = {}
    for key, entry in manifest.items():
        if max_seconds is None or entry["duration"] <= max_seconds:
            by_speaker.setdefault(entry["speaker"], []).append(key)
    if not by_speaker:
        raise UserError(f"No utterance is at most {max_seconds} s long. Raise the limit.")
    queues = []
    for speaker in sorted(by_speaker):
        keys = sorted(by_speaker[speaker])
        utterance_rng(seed, 0, speaker, "choice").shuffle(keys)
        queues.append(keys)
    rounds = max(map(len, queues))
    turns = [keys[i] for i in range(rounds) for keys in queues if i < len(keys)]
    return {key: manifest[key] for key in sorted(turns[:count])}


def load_pairs(
    data_folder: str | Path,
    splits: str | Sequence[str],
    part: str,
    noise_folder: str | Path | None = None,
    noise_classes: Sequence[str] | None = None,
    snrs: Sequence[float] = (0, 5, 10),
    seed: int = 0,
    segment_seconds: float | None = None,
    count: int | None = None,
    max_seconds: float | None = None,
    too_long: str = "drop",
    each_snr: bool = False,
    noise_filtered: float = 0.0,
    rir_folder: str | Path | None = None,
    rir_probability: float = 1.0,
    rir_early_seconds: float = 0.05,
    rir_rt60: Sequence[float] = (0.2, 0.8),
) -> SpeechPairs:
    """Make the noisy/clean pairs of one part of an experiment, from folders.

    Arguments
    ---------
    data_folder, splits
        As for :func:`pi_finetune.data.corpora.prepare_speech`.
    part : str
        ``train``, ``dev`` or ``test``: which noise recordings may be heard.
    noise_folder, noise_classes
        As for :func:`pi_finetune.data.corpora.prepare_noise`; no folder is needed for a corpus
        with noisy files of its own.
    snrs : list of float
        In dB.
    seed, segment_seconds, each_snr
        As for :class:`SpeechPairs`.
    count, max_seconds
        As for :func:`choose`.
    too_long : str
        ``drop`` (default) leaves utterances above ``max_seconds`` out, ``error`` raises.
    noise_filtered : float
        ``filtered`` of :class:`~pi_finetune.data.mixing.NoiseMixer`.
    rir_folder, rir_probability, rir_early_seconds, rir_rt60
        As for :func:`pi_finetune.data.rooms.load_reverberator`. Default: no rooms.

    Returns
    -------
    SpeechPairs
    """
    manifest = prepare_speech(data_folder, splits)
    if too_long == "error" and max_seconds is not None:
        longest = max(manifest.values(), key=lambda entry: entry["duration"])
        if longest["duration"] > max_seconds:
            raise UserError(
                f"{longest['wav']}: {longest['duration']:.1f} s is longer than max_seconds "
                f"({max_seconds}). Raise max_seconds if memory allows, or cut the file."
            )
    if count is not None or max_seconds is not None:
        manifest = choose(manifest, count, max_seconds)
    mixer = None
    reverberator = load_reverberator(rir_folder, part, rir_probability, rir_early_seconds, rir_rt60)
    if reverberator is not None and any("noisy" in entry for entry in manifest.values()):
        raise UserError(
            f"rir_folder: {data_folder} has noisy files of its own, which are in no other room. "
            "Set it to null."
        )
    if not all("noisy" in entry for entry in manifest.values()):
        if noise_folder is None:
            raise UserError(f"noise_folder: needed, since {data_folder} has no noisy files.")
        mixer = NoiseMixer(prepare_noise(noise_folder, part, noise_classes), snrs, noise_filtered)
    return SpeechPairs(manifest, mixer, seed, segment_seconds, each_snr, reverberator)
