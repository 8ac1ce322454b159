"""Perturbations of one branch before the teacher: zero padding and speed.

A perturbation is called as ``perturb(wavs [B, T], lengths [B], rngs)`` with one
``numpy.random.Generator`` per utterance and returns a :class:`Perturbed`. All
lengths are in samples. Gradients flow through to ``wavs``.
"""

from fractions import Fraction
from typing import NamedTuple

import torch
import torchaudio

from pi_finetune.data.audio import SAMPLE_RATE


class Perturbed(NamedTuple):
    """A perturbed batch, and which part of it is to be compared."""

    #: [B, T'], zero beyond ``lengths``.
    wavs: torch.Tensor
    #: [B], all that the teacher shall hear.
    lengths: torch.Tensor
    #: [B], where the content begins.
    content_start: torch.Tensor
    #: [B], how long the content is.
    content_lengths: torch.Tensor


class NoPerturbation:
    """Hands the batch on as it is."""

    def __call__(self, wavs, lengths, rngs=None):
        return Perturbed(wavs, lengths, torch.zeros_like(lengths), lengths)


class ZeroPadding:
    """Random zeros before and after the signal: position randomisation.

    Draws p ~ U{0..P} whole hops before and q ~ U{0..P} after, per utterance.
    Whole hops keep the frame grid, so frame k of the content sees the same
    samples as without padding; only its position differs. Frames of the padding
    are not compared. Known from SSL pre-training (SPIRAL, Huang et al., ICLR 2022).

    Arguments
    ---------
    max_seconds : float
        P as a time; default 1 s.
    hop : int
        The teacher's hop in samples; default 320.

    Example
    -------
    >>> from numpy.random import default_rng
    >>> wavs, lengths, rngs = torch.ones(1, 1600), torch.tensor([1600]), [default_rng(0)]
    >>> perturbed = ZeroPadding(max_seconds=0.1)(wavs, lengths, rngs)
    >>> start, length = int(perturbed.content_start), int(perturbed.content_lengths)
    >>> start % 320, length, bool((perturbed.wavs[0, start : start + length] == 1).all())
    (0, 1600, True)
    """

    def __init__(self, max_seconds=1.0, hop=320):
        if max_seconds < 0:
            raise ValueError(f"max_seconds: got {max_seconds}, needed is a number >= 0.")
        self.max_hops = round(max_seconds * SAMPLE_RATE / hop)
        self.hop = hop

    def __call__(self, wavs, lengths, rngs):
        hops = [rng.integers(self.max_hops + 1, size=2) for rng in rngs]
        before = torch.tensor([h[0] for h in hops], device=lengths.device) * self.hop
        after = torch.tensor([h[1] for h in hops], device=lengths.device) * self.hop
        padded_lengths = before + lengths + after
        rows = [
            torch.nn.functional.pad(
                wav[:length], (start, int(padded_lengths.max()) - start - length)
            )
            for wav, length, start in zip(wavs, lengths.tolist(), before.tolist())
        ]
        return Perturbed(torch.stack(rows), padded_lengths, before, lengths)


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

    def __init__(self, factors=(0.9, 1.0, 1.1)):
        if not factors or min(factors) <= 0:
            raise ValueError(f"factors: got {factors}, needed are positive numbers.")
        self.factors = [Fraction(str(factor)).limit_denominator(100) for factor in factors]

    def __call__(self, wavs, lengths, rngs):
        rows = []
        for wav, length, rng in zip(wavs, lengths.tolist(), rngs):
            factor = self.factors[rng.integers(len(self.factors))]
            # resample() reduces the ratio; a factor a/b is the step from rate a to rate b.
            rows.append(
                torchaudio.functional.resample(
                    wav[:length], factor.numerator, factor.denominator, lowpass_filter_width=16
                )
            )
        lengths = torch.tensor([row.shape[-1] for row in rows], device=lengths.device)
        wavs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Perturbed(wavs, lengths, torch.zeros_like(lengths), lengths)
