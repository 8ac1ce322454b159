"""How well a linear map reads the position from a frame."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pi_finetune.diagnostics.views import MIN_UTTERANCES, AllLayers
from pi_finetune.errors import UserError
from pi_finetune.files import json_number
from pi_finetune.lengths import Waveforms

__all__ = ["position_probe", "ridge_probe"]


_FOLDS = 5


#: Ridge penalties tried, relative to the mean squared (standardised) feature.
_PENALTIES = np.logspace(-6, 2, 17)


def ridge_probe(
    features: ArrayLike,
    targets: ArrayLike,
    groups: ArrayLike,
    held_out: float = 1 / 3,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """R^2 of a linear map on groups it has not seen.

    Ridge regression in closed form on features standardised over the training part. The penalty
    is chosen per target by 5-fold cross-validation over the groups of the training part, and R^2
    is taken from held-out groups, against their own mean; it is negative for a bad map.

    Arguments
    ---------
    features : array
        [F, D].
    targets : array
        [F, K].
    groups : array
        [F], the utterance of each frame; frames of an utterance stay together.
    held_out : float
        Share of the groups held out.
    seed : int
        Draws groups and folds.

    Returns
    -------
    (np.ndarray, np.ndarray)
        R^2 [K] and the penalties chosen [K].
    """
    x, y, groups = (
        np.asarray(features, np.float64),
        np.asarray(targets, np.float64),
        np.asarray(groups),
    )
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    testing = names[: round(held_out * len(names))]
    training = names[len(testing) :]
    if len(training) < _FOLDS or not len(testing):
        raise ValueError(f"{len(names)} groups are too few to hold some out of {_FOLDS} folds")
    errors: Any = 0.0
    for fold in range(_FOLDS):
        out = np.isin(groups, training[fold::_FOLDS])
        fit = np.isin(groups, training) & ~out
        predictions = _ridge(x[fit], y[fit], x[out], _PENALTIES)
        errors = errors + np.square(predictions - y[out]).sum(axis=1)  # [penalties, K]
    best = errors.argmin(axis=0)
    fit, out = np.isin(groups, training), np.isin(groups, testing)
    predictions = _ridge(x[fit], y[fit], x[out], _PENALTIES)
    predictions = predictions[best, :, np.arange(y.shape[1])].T  # [F, K]
    spread = np.square(y[out] - y[out].mean(axis=0)).sum(axis=0)
    return 1 - np.square(predictions - y[out]).sum(axis=0) / spread, _PENALTIES[best]


def _ridge(x, y, new, penalties):
    """Predictions [P, F', K] for ``new`` [F', D]: one eigendecomposition for all penalties."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(
        scale > 1e-12 * np.abs(x).max(initial=1e-300), scale, np.inf
    )  # constant: unused
    x, new = (x - mean) / scale, (new - mean) / scale
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ (y - y.mean(axis=0)) / len(x))
    rotated = new @ vectors
    values = values.clip(min=0)
    return np.stack([rotated @ (projected / (values[:, None] + p)) for p in penalties]) + y.mean(0)


@torch.no_grad()
def position_probe(
    teacher: Any, wavs: torch.Tensor, layers: Any = None, batch_size: int = 8, seed: int = 0
) -> list[dict]:
    """How much of a frame's place can be read from it linearly.

    Every crop is cut to a length drawn between half and all of it, so that the distance to the end
    is not the mirror image of the index. The shuffled baseline permutes the targets within each
    utterance: what it reaches comes from knowing the utterance's length, not the place in it.
    ``r2_of_other`` is what exact knowledge of the other target alone would reach linearly: a
    teacher that counts from the start knows the end as well as that.

    Arguments
    ---------
    teacher, wavs, layers, batch_size
        As for :func:`shift_curve`.
    seed : int
        Draws lengths, held-out utterances and permutations.

    Returns
    -------
    list of dict
        ``layer, target (index or to_end), r2, r2_shuffled, r2_of_other, penalty,
        train_utterances, held_out_utterances, frames``.
    """
    if len(wavs) < MIN_UTTERANCES:
        raise UserError(
            f"The position probe needs {MIN_UTTERANCES} utterances, got {len(wavs)}: raise "
            "utterances, lower segment_seconds, or name more splits."
        )
    view = AllLayers(teacher, layers)
    rng = np.random.default_rng(seed)
    total = wavs.shape[1]
    lengths = torch.from_numpy(rng.integers(total // 2, total + 1, len(wavs)))
    states, sizes = [], []
    for batch, batch_lengths in zip(wavs.split(batch_size), lengths.split(batch_size)):
        reps, frame_lengths = view(Waveforms.of(batch, batch_lengths))
        states += [frames[:n].cpu() for frames, n in zip(reps, frame_lengths.tolist())]
        sizes += frame_lengths.tolist()
    states = torch.cat(states)  # [F, L, D]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    index = np.concatenate([np.arange(n) for n in sizes])
    to_end = np.concatenate([np.arange(n)[::-1] for n in sizes])
    orders = [rng.permutation(n) for n in sizes]
    targets = np.stack(
        [
            index,
            to_end,
            np.concatenate(orders),
            np.concatenate([n - 1 - o for n, o in zip(sizes, orders)]),
        ],
        axis=1,
    )
    held_out = round(len(sizes) / 3)
    of_other = np.corrcoef(index, to_end)[0, 1] ** 2
    records = []
    for i, layer in enumerate(view.layers):
        r2, penalties = ridge_probe(states[:, i], targets, groups, seed=seed)
        for k, target in enumerate(("index", "to_end")):
            records.append(
                {
                    "layer": layer,
                    "target": target,
                    "r2": json_number(r2[k]),
                    "r2_shuffled": json_number(r2[k + 2]),
                    "r2_of_other": json_number(of_other),
                    "penalty": json_number(penalties[k]),
                    "train_utterances": len(sizes) - held_out,
                    "held_out_utterances": held_out,
                    "frames": len(index),
                }
            )
    return records
