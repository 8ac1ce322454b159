"""What moving the same content costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.diagnostics.views import chosen_layers, content_frames
from pi_finetune.files import json_number
from pi_finetune.results.statistics import bootstrap_ratio, ratio_fields

__all__ = ["SHIFTS", "shift_curve", "unrelated_distance"]


#: Moves of the shift curve, in seconds.
SHIFTS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)


def unrelated_distance(reps: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between random frames of each utterance and of the others.

    The exact mean over all pairs of frames, from means and mean squares.

    Arguments
    ---------
    reps : Tensor
        [U, N, D], U >= 2.

    Returns
    -------
    Tensor
        [U] in float64: of utterance i to all j != i, mean over D.
    """
    reps = reps.double()
    others = len(reps) - 1
    square = reps.square().mean(dim=(1, 2))
    means = reps.mean(dim=1)
    cross = (means * (means.sum(0) - means)).mean(dim=1) / others
    return square + (square.sum() - square) / others - 2 * cross


def shift_curve(
    teacher: Any,
    wavs: torch.Tensor,
    shifts: Sequence[float] = SHIFTS,
    layers: Any = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict]:
    """How far moving an utterance moves its representation.

    The mean squared difference between T(y) and T(y after k hops of zeros) on the same content
    frames, over that between random frames of different utterances: 0 if position does not
    matter, 1 if the moved utterance is as far from itself as from any other.

    Arguments
    ---------
    teacher
        See the module's text.
    wavs : Tensor
        [U, T], from :func:`load_crops`.
    shifts : sequence of float
        Seconds; rounded to whole hops. Default: 0 to 2 s.
    layers : None, int, "cnn", or a list of these
        Default: all.
    batch_size : int
        Utterances at once.
    seed : int
        Of the bootstrap over utterances.

    Returns
    -------
    list of dict
        ``layer, shift, distance, unrelated, ratio, low, high``.
    """
    names = chosen_layers(teacher, layers)
    base = list(content_frames(teacher, wavs, batch_size, layers=layers))
    whole = torch.cat(base)
    unrelated = np.stack([unrelated_distance(whole[:, :, i]).cpu() for i in range(len(names))])
    records = []
    for hops in sorted({round(shift * SAMPLE_RATE / teacher.hop) for shift in shifts}):
        shift = hops * teacher.hop / SAMPLE_RATE
        moved = content_frames(teacher, wavs, batch_size, shift, layers)
        distances = [
            (x.double() - y.double()).square().mean(dim=(1, 3)) for x, y in zip(base, moved)
        ]
        distances = torch.cat(distances).T.cpu().numpy()  # [L, U]
        for layer, distance, reference in zip(names, distances, unrelated):
            found = bootstrap_ratio(distance, reference, seed)
            records.append(
                {
                    "layer": layer,
                    "shift": round(shift, 4),
                    "distance": json_number(distance.mean()),
                    "unrelated": json_number(reference.mean()),
                    **ratio_fields("ratio", found),
                }
            )
    return sorted(records, key=lambda record: (names.index(record["layer"]), record["shift"]))
