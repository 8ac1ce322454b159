"""How similar frames of different utterances are at equal positions, compared with unequal ones."""

from typing import Any

import numpy as np
import torch

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.diagnostics.views import chosen_layers, content_frames
from pi_finetune.errors import UserError
from pi_finetune.files import json_number

__all__ = ["content_free_similarity", "similarity_by_offset"]


def similarity_by_offset(reps: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean centred cosine similarity of frames of different utterances by difference of position.

    Frames are centred by the mean over all frames and utterances. The mean is over all pairs of
    different utterances and, for offset d, over frames n and n + d.

    Arguments
    ---------
    reps : Tensor
        [U, N, D], U >= 2.

    Returns
    -------
    (np.ndarray, np.ndarray)
        Similarity [N] at offsets of 0 to N - 1 frames, and the number of pairs of frames [N].
    """
    reps = reps.double()
    utterances, frames, _ = reps.shape
    unit = torch.nn.functional.normalize(reps - reps.mean(dim=(0, 1)), dim=-1)
    # All pairs, less those of an utterance with itself.
    total = unit.sum(0)
    gram = total @ total.T - torch.einsum("und,umd->nm", unit, unit)
    pairs = utterances * (utterances - 1)
    sums = np.array([float(gram.diagonal(d).sum()) for d in range(frames)])
    counts = pairs * (frames - np.arange(frames))
    return sums / counts, counts


def content_free_similarity(
    teacher: Any,
    wavs: torch.Tensor,
    far_seconds: float = 1.5,
    layers: Any = None,
    batch_size: int = 8,
) -> tuple[list[dict], list[dict]]:
    """The part of the similarity of unrelated frames that comes from equal positions.

    Arguments
    ---------
    teacher, wavs, layers, batch_size
        As for :func:`shift_curve`.
    far_seconds : float
        Offsets from this on count as unequal positions.

    Returns
    -------
    (list of dict, list of dict)
        ``layer, offset, similarity, frame_pairs``, and per layer ``layer, equal, far, difference``.
        ``far`` is the mean over all pairs of frames at least ``far_seconds`` apart, ``difference``
        is ``equal - far``: 0 without position, 1 for a code of it whose far values are unlike one
        another, and more where they are opposed, as those of slow sinusoids.
    """
    whole = torch.cat(list(content_frames(teacher, wavs, batch_size, layers=layers)))
    first_far = round(far_seconds * SAMPLE_RATE / teacher.hop)
    if not 0 < first_far < whole.shape[1]:
        raise UserError(
            f"far_seconds: {far_seconds:g} s are not within the crops, which have "
            f"{whole.shape[1]} frames. Choose segment_seconds longer than far_seconds."
        )
    curve, headline = [], []
    for i, layer in enumerate(chosen_layers(teacher, layers)):
        similarity, counts = similarity_by_offset(whole[:, :, i])
        for d, value in enumerate(similarity):
            offset = round(d * teacher.hop / SAMPLE_RATE, 4)
            values: dict = {"similarity": json_number(value), "frame_pairs": int(counts[d])}
            curve.append({"layer": layer, "offset": offset, **values})
        far = np.average(similarity[first_far:], weights=counts[first_far:])
        values = {"equal": similarity[0], "far": far, "difference": similarity[0] - far}
        headline.append({"layer": layer, **{k: json_number(v) for k, v in values.items()}})
    return curve, headline
