"""What a recogniser is, and what those here share."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

import torch

from pi_finetune.lengths import Waveforms

__all__ = [
    "Latest",
    "LikelyRecognizer",
    "Recognizer",
    "checked_texts",
    "finite_items",
    "gives_likelihood",
    "likelihoods",
]


class Recognizer(Protocol):
    """What the project asks of a recogniser.

    Attributes
    ----------
    name : str
        Under which its results are kept.
    unit : str
        What a text is made of: ``word``, or ``phoneme`` (separated by blanks).
    """

    name: str
    unit: str

    def __call__(self, wavs: Waveforms, /) -> list[str]:
        """Texts of the waveforms, B of them."""


class LikelyRecognizer(Recognizer, Protocol):
    """A recogniser that can say how likely a transcript is."""

    def nll(self, wavs: Waveforms, texts: Sequence[str], /) -> list[tuple[float | None, int]]:
        """Negative log-likelihood in nats of the true transcripts, and the tokens of each.

        Arguments
        ---------
        wavs : Waveforms
        texts : sequence of str
            True transcripts, B of them.

        Returns
        -------
        list of (float or None, int)
            None where there is none, as of a waveform with a non-finite sample.
        """


def likelihoods(
    recognizer: Recognizer | None, wavs: Waveforms, texts: Sequence[str | None]
) -> list[dict]:
    """Negative log-likelihood of the transcripts that are there, as fields of a score line.

    Arguments
    ---------
    recognizer : Recognizer or None
    wavs : Waveforms
    texts : sequence of (str or None)
        True transcripts, B of them; None where there is none.

    Returns
    -------
    list of dict
        ``{"nll": nats or None, "tokens": int}`` of each utterance; empty without a transcript, or
        from a recogniser that gives no likelihood.
    """
    fields: list[dict] = [{} for _ in texts]
    known = {i: text for i, text in enumerate(texts) if text is not None}
    if known and gives_likelihood(recognizer):
        # The same object, where it can be: a recogniser may still know what it has computed of it.
        heard = wavs if len(known) == len(texts) else wavs.taken(torch.tensor(list(known)))
        found = recognizer.nll(heard, list(known.values()))
        for i, (nll, tokens) in zip(known, found, strict=True):
            fields[i] = {"nll": nll, "tokens": tokens}
    return fields


def gives_likelihood(recognizer: Recognizer | None) -> TypeGuard[LikelyRecognizer]:
    """Whether a recogniser can say how likely a transcript is."""
    return hasattr(recognizer, "nll")


class Latest:
    """What was computed last, for as long as the waveforms that it was computed of are the same.

    A text and a likelihood are mostly asked for of the same waveforms, one after the other, and
    the encoder is most of the work of the second.
    """

    def __init__(self):
        #: One tuple, so that threads see both or neither.
        self._kept: tuple[weakref.ref | None, Any] = None, None

    def of(self, wavs: Waveforms, compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave when it was called for this very object."""
        reference, value = self._kept
        if reference is None or reference() is not wavs:
            value = compute()
            self._kept = weakref.ref(wavs, self._forget), value
        return value

    def _forget(self, reference):
        if self._kept[0] is reference:
            self._kept = None, None


def finite_items(wavs: Waveforms) -> dict[int, torch.Tensor]:
    """Waveforms [T] in float32 by their index in the batch; those not finite are left out."""
    if not isinstance(wavs, Waveforms):
        raise TypeError(
            f"a recogniser takes Waveforms, got {type(wavs).__name__}; of a tensor [B, T] and "
            "lengths [B], pi_finetune.lengths.Waveforms.of(wavs, lengths) makes them"
        )
    items = {i: wav.detach().float() for i, wav in enumerate(wavs.items())}
    return {i: wav for i, wav in items.items() if len(wav) and torch.isfinite(wav).all()}


def checked_texts(wavs: Waveforms, texts: Sequence[str]) -> Sequence[str]:
    """The transcripts, if there is one for each waveform."""
    if len(texts) != len(wavs) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"a likelihood takes a transcript, a str, for each of {len(wavs)} waveforms, "
            f"got {[type(text).__name__ for text in texts]}"
        )
    return texts
