"""Which share of what an objective can win is position."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.diagnostics.views import (
    AllLayers,
    EachLayer,
    Offset,
    Remembering,
    chosen_layers,
)
from pi_finetune.errors import UserError
from pi_finetune.files import json_number
from pi_finetune.lengths import Waveforms, as_pair
from pi_finetune.objectives import RepresentationObjective
from pi_finetune.perturbations import NoPerturbation
from pi_finetune.results.statistics import bootstrap_ratio, ratio_fields
from pi_finetune.seeding import utterance_rng

if TYPE_CHECKING:
    from pi_finetune.diagnostics.views import Crops
    from pi_finetune.results.statistics import Interval

__all__ = [
    "moved_values",
    "objective_share",
    "representation_objective",
    "share_of_fall",
    "training_scores",
]


def representation_objective(objective: torch.nn.Module) -> RepresentationObjective | None:
    """The part of an objective that compares representations.

    Arguments
    ---------
    objective : torch.nn.Module
        A :class:`~pi_finetune.objectives.RepresentationObjective`, or a module that holds one with
        a weight, as :class:`~pi_finetune.objectives.WeightedSum` does.

    Returns
    -------
    RepresentationObjective or None
        None if there is none (a signal loss alone).
    """
    found = (m for m in objective.modules() if isinstance(m, RepresentationObjective))
    return next(found, None)


@torch.no_grad()
def moved_values(
    objective: RepresentationObjective,
    enhanced: torch.Tensor,
    clean: torch.Tensor,
    partners: torch.Tensor,
    ids: list[str],
    offset_seconds: float = 1.5,
    seed: int = 0,
    context: torch.Tensor | None = None,
) -> dict:
    """An objective against unrelated speech at unequal and equal positions, and against the right.

    The three are ``objective(enhanced_i, clean_j)`` with the clean branch moved by
    ``offset_seconds`` of zeros, the same unmoved, and ``objective(enhanced_i, clean_i)``. The
    objective's own perturbation is applied in all three with the same draws, and the zeros come
    before what it made: zero padding by p becomes an offset of p and of offset + p, speech at
    another speed is moved by the whole offset.

    Arguments
    ---------
    objective : RepresentationObjective
    enhanced, clean : Tensor
        [B, T] each, equally long. May be one tensor.
    partners : Tensor
        [B], the unrelated j of each i.
    ids : list of str
        Of the rows of ``clean``; with ``seed`` they fix the perturbation's draws.
    offset_seconds, seed
        The move, and the seed of perturbations.
    context : Tensor, optional
        [B, offset], what precedes ``clean`` and is heard before it instead of zeros.

    Returns
    -------
    dict
        ``unequal``, ``equal`` and ``right``, each as the objective's distance returns it ([B]).
    """
    targets = Waveforms.of(clean).named(ids)
    compared = targets if enhanced is clean else Waveforms.of(enhanced)
    unrelated = targets.taken(partners)
    on_clean = objective.perturbed_branch == "clean"
    own, plain = objective.perturbation, NoPerturbation()
    target = own if on_clean else plain

    def represent(wavs, perturbation):
        rngs = [utterance_rng(seed, 0, utterance, "perturbation") for utterance in ids]
        return objective.represent(wavs, rngs, perturbation)

    frames = represent(compared, plain if on_clean else own)
    if context is not None:
        context = Waveforms.of(context).named(ids).taken(partners)
    offset = Offset(offset_seconds, target, objective.teacher.hop, context=context)
    against = {
        "unequal": (unrelated, offset),
        "equal": (unrelated, target),
        "right": (targets, target),
    }
    return {
        key: objective.distance(*frames, *represent(wavs, perturbation))
        for key, (wavs, perturbation) in against.items()
    }


def share_of_fall(
    unequal: ArrayLike, equal: ArrayLike, right: ArrayLike, seed: int = 0
) -> "Interval":
    """(unequal - equal) / (unequal - right) of the means, with its bootstrap interval over rows.

    Arguments
    ---------
    unequal, equal, right : array
        [P] each, from :func:`moved_values`; rows must be independent of one another.
    seed : int
        Of the bootstrap.

    Returns
    -------
    Interval
        0: equal positions win nothing; 1: they win all that the right content does.
    """
    unequal, equal, right = (np.asarray(v, np.float64) for v in (unequal, equal, right))
    return bootstrap_ratio(unequal - equal, unequal - right, seed)


def objective_share(
    teacher: Any,
    objectives: dict,
    crops: "Crops",
    offset_seconds: float = 1.5,
    moved_by: str = "zeros",
    layers: Any = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict]:
    """The share of each objective, at each layer, that position explains.

    Utterances are paired at random, each in one pair, and each is compared with its partner both
    ways; the pairs, not the utterances, are resampled for the intervals. Pairs and the draws of
    perturbations are the same for all objectives.

    Arguments
    ---------
    teacher, layers, batch_size
        As for :func:`shift_curve`.
    objectives : dict
        ``{name: RepresentationObjective}``; their teacher is not used.
    crops : Crops
    offset_seconds : float
        How far an unequal position is away.
    moved_by : str
        What precedes moved speech: ``zeros``, or ``speech``. The latter is the beginning of the
        same crop, so that the rest of it is what is compared; it shows how much of a share is due
        to the silence of zeros and not to position.
    seed : int
        Of pairs, perturbations and the bootstrap.

    Returns
    -------
    list of dict
        ``objective, layer, unequal, equal, right, share, low, high, pairs``.
    """
    order = np.random.default_rng(seed).permutation(len(crops.ids))
    pairs = len(order) // 2
    if pairs < 2:
        raise UserError(f"{len(order)} utterances make {pairs} pairs: name more speech.")
    hop = teacher.hop
    before = round(offset_seconds * SAMPLE_RATE / hop) * hop if moved_by == "speech" else 0
    if moved_by not in ("zeros", "speech") or before >= crops.wavs.shape[1]:
        raise UserError(
            f"moved_by: {moved_by!r}; needed is 'zeros', or 'speech' with crops longer than the "
            f"offset of {offset_seconds:g} s (segment_seconds above far_seconds)."
        )
    order = order[: 2 * pairs]
    ids, wavs = [crops.ids[i] for i in order], crops.wavs[torch.from_numpy(order)]
    step = 2 * max(1, batch_size // 2)  # pairs are rows 2i and 2i + 1: never cut one
    view = Remembering(AllLayers(teacher, layers))
    values: dict[str, dict] = {name: {} for name in objectives}
    for start in range(0, 2 * pairs, step):
        view.seen.clear()
        batch = wavs[start : start + step, before:]
        context = wavs[start : start + step, :before] if before else None
        partners = torch.arange(len(batch)) ^ 1
        names = ids[start : start + step]
        for name, own in objectives.items():
            every_layer = RepresentationObjective(
                view, EachLayer(own.distance), own.perturbation, own.perturbed_branch
            )
            found = moved_values(
                every_layer, batch, batch, partners, names, offset_seconds, seed, context
            )
            for key, value in found.items():
                values[name].setdefault(key, []).append(value.double().cpu())
    records = []
    for name, found in values.items():
        found = {
            key: torch.cat(value).unflatten(0, (pairs, 2)).mean(dim=1).T.numpy()
            for key, value in found.items()
        }  # [L, P]
        for i, layer in enumerate(chosen_layers(teacher, layers)):
            own = {key: value[i] for key, value in found.items()}
            records.append(
                {
                    "objective": name,
                    "layer": layer,
                    **{key: json_number(value.mean()) for key, value in own.items()},
                    **ratio_fields("share", share_of_fall(**own, seed=seed)),
                    "pairs": pairs,
                }
            )
    return records


def training_scores(
    objective: torch.nn.Module,
    enhanced: torch.Tensor | Waveforms,
    clean: torch.Tensor | Waveforms,
    lengths: torch.Tensor | None,
    ids: list[str],
    offset_seconds: float = 1.5,
    seed: int = 0,
) -> dict:
    """The share of position in an objective on one batch of a validation, for its log.

    Costs four passes of the teacher. Call it on the same dev utterances at every validation; the
    share is one of means over them, so larger batches are steadier.

    Arguments
    ---------
    objective : torch.nn.Module
        As trained with; what compares representations is found in it.
    enhanced, clean : Tensor or Waveforms
        [B, T], B >= 2. All are cut to the shortest, so that each can be compared with each.
    lengths : Tensor, optional
        [B], in samples, of tensors.
    ids : list of str
        Utterance ids.
    offset_seconds, seed
        As for :func:`moved_values`.

    Returns
    -------
    dict
        ``position_share`` (0 to 1) and its parts ``position_unequal, position_equal,
        position_right``, floats; empty without a representation objective or for B < 2.
    """
    compared = representation_objective(objective)
    enhanced, clean = as_pair(enhanced, clean, lengths)
    if compared is None or len(enhanced) < 2:
        return {}
    common = int(enhanced.lengths.min())
    partners = torch.arange(len(enhanced)).roll(1)
    one, other = (each.data[:, :common] for each in (enhanced, clean))
    values = moved_values(compared, one, other, partners, ids, offset_seconds, seed)
    means = {f"position_{key}": float(value.mean()) for key, value in values.items()}
    won = means["position_unequal"] - means["position_right"]
    share = (means["position_unequal"] - means["position_equal"]) / won if won else math.nan
    return {"position_share": share, **means}
