"""Perturbations of one branch before the teacher: zero padding and speed.

A perturbation is called as ``perturb(wavs, rngs=rngs)``, with ``Waveforms``
and one ``numpy.random.Generator`` per utterance, or as ``perturb(wavs [B, T], lengths [B], rngs)``,
and returns ``Waveforms`` that say which part is to be compared. Gradients flow through to ``wavs``.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
import torchaudio
from torch import Tensor

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.errors import UserError
from pi_finetune.lengths import Lengths, Waveforms

__all__ = ["NoPerturbation", "Perturbation", "SpeedPerturbation", "ZeroPadding"]


class Perturbation(Protocol):
    """Anything with the signature of a perturbation.

    One with an attribute ``recurs`` that is true makes but a few versions of an utterance, which
    come back in other passes: what is made of them may be kept.
    """

    def __call__(
        self,
        wavs: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> Waveforms: ...


class NoPerturbation:
    """Hands the batch on as it is."""

    recurs = True

    def __call__(
        self,
        wavs: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> Waveforms:
        return Waveforms.of(wavs, lengths)


class ZeroPadding:
    """Random zeros before and after the signal: position randomisation, and nothing else.

    Draws p ~ U{0..P} whole hops before and q ~ U{0..P} after, per utterance; or shares of it.
    Whole hops keep the frame grid, so frame k of the content sees the same
    samples as without padding; only its position differs. Frames of the padding
    are not compared. Known from SSL pre-training (SPIRAL, Huang et al., ICLR 2022).

    Arguments
    ---------
    max_seconds : float
        P as a time; default 1 s.
    share : (float, float), optional
        Instead: a share of the utterance, drawn uniformly between these two and rounded to whole
        hops, before and after; 0 to 0.5. Default: none.
    hop : int
        The teacher's hop in samples; default 320.
    heard : bool
        Whether the zeros count in the teacher's statistics too (the mean and variance of the
        waveform, group norms over time), as in an implementation that pads and knows no more of
        it. Then padding changes the features of the content, not only their position. Default:
        False.

    Example
    -------
    >>> from numpy.random import default_rng
    >>> wavs, lengths, rngs = torch.ones(1, 1600), torch.tensor([1600]), [default_rng(0)]
    >>> perturbed = ZeroPadding(max_seconds=0.1)(wavs, lengths, rngs)
    >>> start, length = int(perturbed.content_start), int(perturbed.content_lengths)
    >>> start % 320, length, bool((perturbed.data[0, start : start + length] == 1).all())
    (0, 1600, True)
    """

    def __init__(
        self,
        max_seconds: float = 1.0,
        hop: int = 320,
        heard: bool = False,
        share: Sequence[float] | None = None,
    ):
        if max_seconds < 0:
            raise ValueError(f"max_seconds: got {max_seconds}, needed is a number >= 0.")
        if share is not None and not (len(share) == 2 and 0 <= share[0] <= share[1] <= 0.5):
            raise UserError(
                f"share: got {list(share)}, needed are the smallest and the largest share of the "
                "utterance that is padded on a side, from 0 to 0.5, e.g. [0.02, 0.05]."
            )
        self.share = None if share is None else (share[0], share[1])
        self.max_hops = round(max_seconds * SAMPLE_RATE / hop)
        self.hop = hop
        self.heard = heard

    def __call__(
        self,
        wavs: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> Waveforms:
        waveforms = Waveforms.of(wavs, lengths)
        rngs = _one_for_each(waveforms, rngs)
        if self.share is None:
            hops = [rng.integers(self.max_hops + 1, size=2) for rng in rngs]
        else:
            (low, high), sizes = self.share, zip(rngs, waveforms.lengths.tolist())
            hops = [np.rint(rng.uniform(low, high, size=2) * n / self.hop) for rng, n in sizes]
        before, after = torch.from_numpy(np.stack(hops, axis=1).astype(np.int64)) * self.hop
        return waveforms.surrounded(before, after, padding_counts=self.heard)


class SpeedPerturbation:
    """Resampling by a factor drawn per utterance: tempo and pitch change together.

    Factor s > 1 is faster: N samples become about N / s. Resampling is
    torchaudio's windowed sinc; SpeechBrain's ``SpeedPerturb`` draws one factor
    per batch, which would tie the utterances of a batch to one another.

    Arguments
    ---------
    factors : list of float
        Equally likely; each at most two decimals. Default [0.9, 1.0, 1.1]
        (LASER, Meghanani & Hain, Interspeech 2024, for HuBERT).

    Example
    -------
    >>> from numpy.random import default_rng
    >>> wavs, lengths, rngs = torch.ones(1, 1600), torch.tensor([1600]), [default_rng(0)]
    >>> SpeedPerturbation([0.8])(wavs, lengths, rngs).lengths
    tensor([2000])
    """

    recurs = True

    def __init__(self, factors: Sequence[float] = (0.9, 1.0, 1.1)):
        if not factors or min(factors) <= 0:
            raise ValueError(f"factors: got {factors}, needed are positive numbers.")
        self.factors = [Fraction(str(factor)).limit_denominator(100) for factor in factors]

    def __call__(
        self,
        wavs: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Sequence[np.random.Generator] | None = None,
    ) -> Waveforms:
        waveforms = Waveforms.of(wavs, lengths)
        rngs = _one_for_each(waveforms, rngs)
        factors = [self.factors[rng.integers(len(self.factors))] for rng in rngs]
        # resample() reduces the ratio; a factor a/b is the step from rate a to rate b.
        rows = [
            torchaudio.functional.resample(
                wav, factor.numerator, factor.denominator, lowpass_filter_width=16
            )
            for wav, factor in zip(waveforms.items(), factors)
        ]
        return Waveforms.collate(rows, ids=waveforms.renamed("speed", factors))


def _one_for_each(
    waveforms: Waveforms, rngs: Sequence[np.random.Generator] | None
) -> Sequence[np.random.Generator]:
    if rngs is None or len(rngs) != len(waveforms):
        raise ValueError(
            f"rngs: needed is one numpy.random.Generator for each of {len(waveforms)} utterances, "
            f"got {'none' if rngs is None else len(rngs)}"
        )
    return rngs
