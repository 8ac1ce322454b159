"""The one rule by which random draws in training are made.

A draw depends on nothing but ``(seed, pass over the data, utterance id,
purpose)``. It is therefore the same for every strategy, for any number of
loader workers or processes, and after a resume; no generator state has to be
saved.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from speechbrain.dataio.batch import PaddedBatch

__all__ = ["perturbation_rngs", "utterance_rng"]


def utterance_rng(seed: int, data_pass: int, utterance: str, purpose: str) -> np.random.Generator:
    """Return the generator for one use of one utterance.

    Arguments
    ---------
    seed : int
        The experiment's seed.
    data_pass : int
        How many times the whole training set has been gone through (0 for
        development and test sets).
    utterance : str
        The utterance id.
    purpose : str
        What is drawn, e.g. ``"noise"``; different purposes are independent.

    Example
    -------
    >>> one, again = (utterance_rng(1234, 0, "19-198-0001", "noise").random() for _ in range(2))
    >>> one == again
    True
    >>> one == utterance_rng(1234, 1, "19-198-0001", "noise").random()  # in the next pass
    False
    """
    words = [zlib.crc32(utterance.encode()), zlib.crc32(purpose.encode())]
    return np.random.default_rng([int(seed), int(data_pass), *words])


def perturbation_rngs(seed: int, batch: "PaddedBatch") -> list[np.random.Generator]:
    """The generators with which the utterances of a batch are perturbed.

    Arguments
    ---------
    seed : int
        ``seed`` in training, ``data_seed`` in validation.
    batch : speechbrain.dataio.batch.PaddedBatch
        Of :class:`~pi_finetune.data.loading.SpeechPairs`.

    Returns
    -------
    list of np.random.Generator
        [B].
    """
    return [
        utterance_rng(seed, data_pass, utterance, "perturbation")
        for utterance, data_pass in zip(batch.id, batch.data_pass.tolist())
    ]
