"""Training without content, to see what an objective wins all the same."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pi_finetune.data.loading import collate
from pi_finetune.diagnostics.views import Offset
from pi_finetune.errors import UserError
from pi_finetune.files import json_number
from pi_finetune.lengths import Lengths, Waveforms, as_pair
from pi_finetune.objectives import RepresentationObjective
from pi_finetune.results.statistics import Interval, bootstrap_ratio, ratio_fields
from pi_finetune.seeding import perturbation_rngs

if TYPE_CHECKING:
    from pi_finetune.data.loading import SpeechPairs

__all__ = ["TARGETS", "MismatchedTargets", "falls_of_matched", "held_out_losses"]


class MismatchedTargets(torch.nn.Module):
    """An objective whose clean side is another utterance: content cannot lower it.

    Utterance i is compared with clean speech i - 1 of the batch, both cut to the shorter of the
    two. What training still wins comes from position and from the statistics of speech; with
    random offsets of the clean side from statistics alone. In YAML it takes the place of a
    strategy's objective.

    Arguments
    ---------
    objective : RepresentationObjective
    offset_seconds : float
        If above 0, 0 to this many seconds of zeros are put before the perturbed branch, drawn per
        utterance, after the strategy's own perturbation. Default: 0.
    """

    def __init__(self, objective: RepresentationObjective, offset_seconds: float = 0.0):
        super().__init__()
        self.objective = objective
        self.offset_seconds = offset_seconds
        # Made when the teacher is there, whose hop it needs.
        self._moved: RepresentationObjective | None = None

    def forward(
        self,
        enhanced: torch.Tensor | Waveforms,
        clean: torch.Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> torch.Tensor:
        """As of the objective; B is at least 2."""
        enhanced, clean = as_pair(enhanced, clean, lengths)
        if len(enhanced) < 2:
            raise UserError(
                "A mismatched target needs two utterances in every batch, and one batch has a "
                "single one. Choose valid_utterances and valid_batch_size so that none is left."
            )
        if self.offset_seconds and self._moved is None:
            own = self.objective
            offset = Offset(self.offset_seconds, own.perturbation, own.teacher.hop, random=True)
            self._moved = RepresentationObjective(
                own.teacher, own.distance, offset, own.perturbed_branch
            ).train(self.training)
        objective = self._moved or self.objective
        others = clean.taken(torch.arange(len(clean)).roll(1))
        lengths = torch.minimum(enhanced.lengths, others.lengths)
        return objective(enhanced.cut(lengths), others.cut(lengths), rngs=rngs)


#: The arms of the causal test: what stands in the place of a strategy's objective.
TARGETS = ("matched", "mismatched", "mismatched_moved")


@torch.no_grad()
def held_out_losses(
    objective: torch.nn.Module,
    enhancer: torch.nn.Module,
    pairs: "SpeechPairs",
    batch_size: int = 4,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """An objective on development mixtures, with perturbations as validation draws them.

    Arguments
    ---------
    objective : torch.nn.Module
    enhancer : torch.nn.Module
    pairs : pi_finetune.data.loading.SpeechPairs
    batch_size, seed, device
        As in training; ``seed`` is its ``data_seed``.

    Returns
    -------
    np.ndarray
        [V], one value per utterance.
    """
    objective, enhancer = objective.to(device), enhancer.to(device).eval()
    losses = []
    for batch in torch.utils.data.DataLoader(pairs, batch_size, collate_fn=collate):
        batch = batch.to(device)
        rngs = perturbation_rngs(seed, batch)
        losses.append(objective(enhancer(batch.noisy), batch.clean, rngs=rngs).cpu())
    return torch.cat(losses).double().numpy()


def falls_of_matched(losses: dict, seed: int = 0) -> list[dict]:
    """By how much the arms lowered their objectives, over the fall with matched targets.

    Parts of *falls*, since what the arms start from differs: with unrelated targets an objective
    is larger, and the same fall a smaller part of it. What position won is the fall with mismatched
    targets less that with mismatched targets at random offsets.

    Arguments
    ---------
    losses : dict
        ``{targets: (before [V], after [V])}`` for all of :data:`TARGETS`, on the same utterances.
    seed : int
        Of the bootstrap over utterances.

    Returns
    -------
    list of dict
        A line for each of :data:`TARGETS`, ``targets, before, after, fall, of_matched, low, high,
        utterances``, and one with ``targets`` "position". ``of_matched`` and its 95 % interval are
        None where training with matched targets lowered nothing.
    """
    falls = {
        targets: np.asarray(before, np.float64) - np.asarray(after, np.float64)
        for targets, (before, after) in losses.items()
    }
    matched = falls["matched"]
    parts = {**falls, "position": falls["mismatched"] - falls["mismatched_moved"]}
    records = []
    for targets, fall in parts.items():
        found = bootstrap_ratio(fall, matched, seed)
        if matched.mean() <= 0:
            found = Interval(math.nan, math.nan, math.nan)
        before, after = (np.mean(each) for each in losses.get(targets, (math.nan, math.nan)))
        records.append(
            {
                "targets": targets,
                "before": json_number(before),
                "after": json_number(after),
                "fall": json_number(fall.mean()),
                **ratio_fields("of_matched", found),
                "utterances": len(fall),
            }
        )
    return records
