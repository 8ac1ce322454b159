"""What the diagnostics look at: crops of speech, all layers at once, content moved later.

Crops are of equal length, cut at random places of utterances, so that what is usual at the
beginning of an utterance (silence) is not mistaken for position. "Moved by k" means preceded by
k hops of zeros, of which the teacher hears all and the comparison sees none: the frame grid stays,
so frame n of the content has the same samples and another position.

A *teacher* here is anything with ``hidden_states``, ``hop`` and ``layer_names`` as
:class:`pi_finetune.teacher.Teacher` has them. Results are lists of flat dicts, ready to be JSON
lines; times are in seconds, and NaN is None.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pi_finetune.data.audio import SAMPLE_RATE, is_silent, read_audio
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import choose
from pi_finetune.errors import UserError
from pi_finetune.lengths import Lengths, Waveforms
from pi_finetune.objectives import RepresentationObjective
from pi_finetune.perturbations import NoPerturbation
from pi_finetune.seeding import utterance_rng

__all__ = [
    "MIN_UTTERANCES",
    "AllLayers",
    "Crops",
    "EachLayer",
    "Offset",
    "Remembering",
    "chosen_layers",
    "content_frames",
    "load_crops",
]


#: Fewer utterances leave too little for the probe's folds or for a bootstrap over pairs.
MIN_UTTERANCES = 12


class Crops(NamedTuple):
    """Equally long pieces of different utterances."""

    ids: list
    #: [U, T], 16 kHz.
    wavs: torch.Tensor


def load_crops(
    data_folder: str | Path,
    splits: str | Sequence[str],
    seconds: float,
    count: int | None = None,
    seed: int = 0,
    needed: int = MIN_UTTERANCES,
) -> Crops:
    """Cut one piece out of each utterance, at a random place.

    Arguments
    ---------
    data_folder, splits
        As for :func:`pi_finetune.data.corpora.prepare_speech`.
    seconds : float
        Length of the pieces; shorter utterances are left out.
    count : int, optional
        Utterances, spread over speakers. Default: all.
    seed : int
        Draws the places.
    needed : int
        The least number of utterances.

    Returns
    -------
    Crops

    Raises
    ------
    UserError
        There are too few utterances of that length, or one is silent.
    """
    manifest = prepare_speech(data_folder, splits)
    samples = round(seconds * SAMPLE_RATE)
    enough = {k: v for k, v in manifest.items() if _samples(v) >= samples}
    available = len(enough) if count is None else min(count, len(enough))
    if available < needed:
        raise UserError(
            f"{data_folder}: {available} utterances of at least {seconds:g} s are to be used "
            f"(splits {splits}; {len(manifest)} of any length), needed are {needed}. Lower "
            "segment_seconds, or raise utterances, or name more splits."
        )
    chosen = choose(enough, count)
    wavs = [
        _crop(entry, samples, utterance_rng(seed, 0, key, "crop")) for key, entry in chosen.items()
    ]
    return Crops(list(chosen), torch.stack(wavs))


def _samples(entry):
    return round(entry["duration"] * SAMPLE_RATE)


def _crop(entry, samples, rng):
    for _ in range(20):
        start = int(rng.integers(_samples(entry) - samples + 1))
        wav = read_audio(entry["wav"], start, samples)
        if not is_silent(wav):
            return wav
    raise UserError(f"{entry['wav']}: silent in 20 draws. Remove or replace it.")


def chosen_layers(teacher: Any, layers: Any = None) -> list:
    """Names of layers, all by default; a UserError if the teacher has no such layer.

    They are ``teacher.layer_names``; negative numbers count from the end.
    """
    names = list(teacher.layer_names)
    if layers is None:
        return names
    layers = [layers] if isinstance(layers, int | str) else list(layers)
    count = max(name for name in names if isinstance(name, int))
    found = [k + count + 1 if isinstance(k, int) and -count - 1 <= k < 0 else k for k in layers]
    for layer, name in zip(layers, found):
        if name not in names:
            named = "".join(f"{name!r}, " for name in names if isinstance(name, str))
            raise UserError(
                f"layers: the teacher has {count} layers, asked for layer {layer}. Choose {named}0 "
                f"(input of the first) to {count}, -1 to {-count - 1} from the end, or null for "
                "all."
            )
    return found


class AllLayers:
    """A teacher seen by :class:`RepresentationObjective` as having frames of [L, D], not of [D].

    With :class:`EachLayer` as its distance, an objective is evaluated on all layers in one pass.
    """

    def __init__(self, teacher: Any, layers: Any = None):
        self.teacher = teacher
        self.layers = chosen_layers(teacher, layers)
        self.hop = teacher.hop

    def __call__(self, wavs: Waveforms) -> tuple[torch.Tensor, torch.Tensor]:
        states, frame_lengths = self.teacher.hidden_states(wavs, layers=self.layers)
        return states.permute(1, 2, 0, 3), frame_lengths


class Remembering:
    """Runs a teacher once on each named input: objectives with one perturbation share it."""

    def __init__(self, teacher: Any):
        self.teacher = teacher
        self.seen: dict = {}
        self.hop = teacher.hop

    def __call__(self, wavs: Waveforms) -> tuple[torch.Tensor, torch.Tensor]:
        if wavs.ids is None:
            return self.teacher(wavs)
        key = (wavs.ids, tuple(wavs.lengths.tolist()), wavs.padding_counts)
        if key not in self.seen:
            self.seen[key] = self.teacher(wavs)
        return self.seen[key]


class EachLayer:
    """A distance applied to each layer of [B, N, L, D]; returns [B, L]."""

    def __init__(self, distance: Callable):
        self.distance = distance

    def __call__(
        self,
        x: torch.Tensor,
        x_lengths: torch.Tensor | None,
        y: torch.Tensor,
        y_lengths: torch.Tensor | None,
    ) -> torch.Tensor:
        layers = range(x.shape[2])
        return torch.stack(
            [self.distance(x[:, :, i], x_lengths, y[:, :, i], y_lengths) for i in layers], dim=1
        )


class Offset:
    """Moves content to later positions: zeros before whatever another perturbation made.

    Arguments
    ---------
    seconds : float
        How far; rounded to whole hops.
    perturbation : callable, optional
        Applied first. Default: none.
    hop : int
        The teacher's hop in samples; default 320.
    random : bool
        Draw the number of hops per utterance from 0 to ``seconds`` instead. It is drawn after the
        draws of ``perturbation``, which are therefore the same with and without offset.
    context : Waveforms, optional
        [B, seconds] as samples, heard before the content instead of zeros; not with ``random``.
    """

    def __init__(
        self,
        seconds: float,
        perturbation: Callable | None = None,
        hop: int = 320,
        random: bool = False,
        context: Waveforms | None = None,
    ):
        if seconds < 0:
            raise ValueError(f"seconds: got {seconds}, needed is a number >= 0.")
        if random and context is not None:
            raise ValueError("context: has one length, so random must be False.")
        self.context = context
        self.hops = round(seconds * SAMPLE_RATE / hop)
        self.perturbation = perturbation or NoPerturbation()
        self.hop = hop
        self.random = random

    def __call__(
        self,
        wavs: torch.Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Any = None,
    ) -> Waveforms:
        inner = self.perturbation(wavs, lengths, rngs)
        hops = [self.hops] * len(inner)
        if self.random:
            hops = [int(rng.integers(self.hops + 1)) for rng in rngs]
        moved = inner.surrounded(torch.tensor(hops) * self.hop, torch.zeros_like(inner.lengths))
        if self.context is None:
            return moved
        heard = torch.cat([self.context.data, moved.data[:, self.hops * self.hop :]], dim=1)
        ids = None if self.context.ids is None else moved.renamed("after", self.context.ids)
        return replace(moved, data=heard, ids=ids)


@torch.no_grad()
def content_frames(
    teacher: Any,
    wavs: torch.Tensor,
    batch_size: int,
    offset_seconds: float = 0.0,
    layers: Any = None,
) -> Iterator[torch.Tensor]:
    """Yield the content frames [B, N, L, D] of batches of equally long ``wavs`` [U, T]."""
    view = RepresentationObjective(AllLayers(teacher, layers), distance=None)
    offset = Offset(offset_seconds, hop=teacher.hop)
    for batch in wavs.split(batch_size):
        yield view.represent(Waveforms.of(batch), None, offset)[0]
