"""The one rule by which random draws in training are made.

A draw depends on nothing but ``(seed, pass over the data, utterance id,
purpose)``. It is therefore the same for every strategy, for any number of
loader workers or processes, and after a resume; no generator state has to be
saved.
"""

import zlib

import numpy as np


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
    """
    words = [zlib.crc32(utterance.encode()), zlib.crc32(purpose.encode())]
    return np.random.default_rng([int(seed), int(data_pass), *words])
