"""Per-utterance scores of enhanced speech, and errors of what a recogniser heard.

The reference comes first everywhere, as in ``pesq``, ``pystoi`` and ``jiwer``.
A score that cannot be computed (silence on either side, too short, not finite)
is None: it is to be counted, never replaced by a number.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pesq import pesq
from pystoi import utils as stoi_parts
from pystoi.stoi import BETA, DYN_RANGE, FS, N_FRAME, NFFT, NUMBAND, OBM
from pystoi.stoi import N as SEGMENT

from pi_finetune.errors import optional
from pi_finetune.results.declarations import NLL, SIGNAL_METRICS, WAVEFORM_METRICS, WER

if TYPE_CHECKING:
    import torch

    from pi_finetune.recognizers import CharacterTokenizer, PhonemeTokenizer, Recognizer

__all__ = [
    "DEV_SCORES",
    "SAMPLE_RATE",
    "SIGNAL_SCORES",
    "STOI_SEGMENTS",
    "TEXT_SCORES",
    "dnsmos",
    "estoi",
    "intelligibility",
    "mean_score",
    "nll_per_token",
    "normalise_text",
    "pesq_wb",
    "phoneme_errors",
    "recognition_errors",
    "si_sdr",
    "signal_scores",
    "stoi",
    "wer",
    "word_errors",
]


SAMPLE_RATE = 16000
#: Peak (after removing the mean) under which a signal counts as silent: -120 dBFS.
SILENCE = 1e-6
#: Longest signal given to PESQ at once. Its reference implementation keeps 50 utterances and
#: overwrites memory beyond them; 50 need at least 50 * (0.200 + 0.188) s = 19.4 s.
PESQ_SECONDS = 19.0
#: STOI compares 30 frames of 256 samples, hop 128, at 10 kHz.
STOI_SECONDS = (29 * 128 + 256) / 10000
#: Segments of which STOI's correlations are taken at once.
STOI_SEGMENTS = 100

#: Names of what :func:`signal_scores` computes unless it is asked for others.
SIGNAL_SCORES = tuple(metric.name for metric in SIGNAL_METRICS)
#: What can choose the best model and the best learning rate on dev speech; these need transcripts.
TEXT_SCORES = (WER.name, NLL.name)
DEV_SCORES = (*TEXT_SCORES, "objective", *SIGNAL_SCORES)


def pesq_wb(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Wide-band PESQ (ITU-T P.862.2), MOS-LQO, 1.04 to 4.64, higher is better.

    A signal of more than 19 s is scored in equal consecutive pieces of at most
    19 s, and the mean over the pieces that can be scored is returned.

    Arguments
    ---------
    reference, estimate : np.ndarray
        Clean and degraded waveform [T], 16 kHz, of one length.

    Returns
    -------
    float or None
        None for a silent or non-finite signal, for less than 0.25 s and where
        PESQ finds no utterance.

    Raises
    ------
    ValueError
        The arrays are not one-dimensional or differ in length.
    """
    reference, estimate = _pair(reference, estimate)
    pieces = max(1, math.ceil(len(reference) / (PESQ_SECONDS * SAMPLE_RATE)))
    scores = [
        score
        for piece in zip(np.array_split(reference, pieces), np.array_split(estimate, pieces))
        if (score := _pesq_piece(*piece)) is not None
    ]
    return float(np.mean(scores)) if scores else None


def _pesq_piece(reference, estimate):
    if not (_scorable(reference) and _scorable(estimate)):
        return None
    try:
        score = float(pesq(SAMPLE_RATE, reference, estimate, "wb"))
    except (
        Exception
    ):  # the package raises its own errors, and ValueError where the model yields NaN
        return None
    return score if math.isfinite(score) else None


def stoi(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Short-time objective intelligibility, about 0 to 1, higher is better (Taal et al. 2011).

    Arguments, returns and errors as :func:`pesq_wb`; None for less than 0.4 s
    of speech (STOI drops silent frames first).
    """
    return intelligibility(reference, estimate)["stoi"]


def estoi(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Extended STOI (Jensen & Taal 2016); as :func:`stoi`."""
    return intelligibility(reference, estimate)["estoi"]


def intelligibility(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float | None]:
    """STOI and ESTOI of one utterance, ``{"stoi", "estoi"}``; see :func:`stoi`.

    What both have in common is done once, by the parts of ``pystoi``: resampling, leaving out
    silent frames, spectra. The rest is ``pystoi``'s too, without loops; and without the noise of
    1e-16 that it adds for ESTOI, so that a segment without any change in a band counts 0.
    """
    reference, estimate = _pair(reference, estimate)
    nothing: dict[str, float | None] = dict.fromkeys(("stoi", "estoi"))
    if not (_scorable(reference) and _scorable(estimate)):
        return nothing
    if len(reference) < STOI_SECONDS * SAMPLE_RATE:
        return nothing
    both = (stoi_parts.resample_oct(w, FS, SAMPLE_RATE) for w in (reference, estimate))
    hop = N_FRAME // 2
    both = stoi_parts.remove_silent_frames(*both, DYN_RANGE, N_FRAME, hop)
    bands = [_bands(wav, hop) for wav in both if len(wav) > N_FRAME]
    if not bands or len(bands[0]) < SEGMENT:
        return nothing
    segments = len(bands[0]) - SEGMENT + 1
    sums = np.zeros(2)
    for start in range(0, segments, STOI_SEGMENTS):  # or a long recording would fill the memory
        end = min(start + STOI_SEGMENTS, segments) + SEGMENT - 1
        x, y = (np.lib.stride_tricks.sliding_window_view(b[start:end], SEGMENT, 0) for b in bands)
        sums += _correlations(x, y), _extended_correlations(x, y)
    scores = sums / segments / (NUMBAND, SEGMENT)
    return {
        name: float(score) if math.isfinite(score) else None for name, score in zip(nothing, scores)
    }


def _bands(wav, hop):
    """Magnitudes [frames, bands] in thirds of octaves; as in pystoi, the last frame is left out."""
    frames = _frames(wav[:-1], N_FRAME, hop)
    window = np.hanning(N_FRAME + 2)[1:-1]
    spectrum = np.fft.rfft(frames * window, NFFT)
    return np.sqrt((spectrum.real**2 + spectrum.imag**2) @ OBM.T)


def _correlations(x, y):
    """Sum of STOI's correlations over segments and bands: x, y [segments, bands, N]."""
    norms = [np.sqrt(np.einsum("sbn,sbn->sb", part, part)) for part in (x, y)]
    limit = 1 + 10 ** (-BETA / 20)
    y = np.minimum(y * (norms[0] / (norms[1] + stoi_parts.EPS))[..., None], x * limit)
    x, y = (part - part.mean(2, keepdims=True) for part in (x, y))
    norms = [np.sqrt(np.einsum("sbn,sbn->sb", part, part)) + stoi_parts.EPS for part in (x, y)]
    return np.sum(np.einsum("sbn,sbn->sb", x, y) / norms[0] / norms[1])


def _extended_correlations(x, y):
    """Sum of ESTOI's: rows, then columns are brought to mean 0 and norm 1."""
    for axis, kept in ((2, "sb"), (1, "sn")):
        x, y = (part - part.mean(axis, keepdims=True) for part in (x, y))
        least = stoi_parts.EPS * math.sqrt(x.shape[axis])
        norms = [np.sqrt(np.einsum(f"sbn,sbn->{kept}", part, part)) for part in (x, y)]
        scales = [np.expand_dims(1 / np.where(n > least, n, np.inf), axis) for n in norms]
        x, y = x * scales[0], y * scales[1]
    return np.einsum("sbn,sbn->", x, y)


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019).

    Both signals' means are removed first. The ratio is bounded by the float64
    resolution, at +-156.5 dB, so that a perfect estimate has a finite score.
    Arguments, returns and errors as :func:`pesq_wb`; None for silence.
    """
    reference, estimate = _pair(reference, estimate)
    if not (_scorable(reference) and _scorable(estimate)):
        return None
    reference = reference - reference.mean()
    estimate = estimate - estimate.mean()
    target = np.sum(estimate * reference) / _energy(reference) * reference
    floor = np.finfo(np.float64).eps * _energy(estimate)
    ratio = (_energy(target) + floor) / (_energy(estimate - target) + floor)
    return float(10 * np.log10(ratio))


def _energy(wav):
    # Not a BLAS product, whose last digits depend on its number of threads.
    return np.sum(wav * wav)


def lsd(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Log-spectral distance, 0 or more, lower is better, as the URGENT challenge computes it.

    ``mean_t sqrt(mean_f ln(|X|^2 / |a Y|^2)^2)`` of spectra of 32 ms every 16 ms, ``a`` being the
    scale that brings the estimate closest to the reference. (In dB it is 4.34 times as much.)
    Arguments, returns and errors as :func:`pesq_wb`.
    """
    reference, estimate = _pair(reference, estimate)
    if not (_scorable(reference) and _scorable(estimate)):
        return None
    eps, size, hop = 1e-8, 512, 256
    estimate = estimate * (np.sum(reference * estimate) / (_energy(estimate) + eps))
    window = np.hanning(size + 1)[:-1]
    both = (np.pad(wav, size // 2) for wav in (reference, estimate))
    x, y = (np.abs(np.fft.rfft(_frames(wav, size, hop) * window)) for wav in both)
    distance = np.log(x**2 / (y + eps) ** 2 + eps) ** 2
    return float(np.mean(np.sqrt(np.mean(distance, 1))))


#: Of the mel-cepstrum at 16 kHz: highest coefficient, warping of the frequencies, and the power
#: that is added to a spectrum, under which differences are not heard.
MCD_ORDER, MCD_WARPING, MCD_FLOOR = 23, 0.42, 1e-6


def mcd(reference: np.ndarray, estimate: np.ndarray) -> float | None:
    """Mel-cepstral distortion in dB, 0 or more, lower is better (Kubichek 1993).

    ``10 / ln 10 * sqrt(2 sum_d (c_d - c'_d)^2)`` over coefficients 1 to 23 of mel-cepstra, the mean
    over frames of 64 ms every 16 ms. Frames are compared where they are: enhanced speech keeps its
    time, so that nothing is warped. Coefficient 0, the level, is left out.
    Arguments, returns and errors as :func:`pesq_wb`; None for less than 64 ms.
    """
    reference, estimate = _pair(reference, estimate)
    if not (_scorable(reference) and _scorable(estimate)) or len(reference) < 1024:
        return None
    x, y = mel_cepstra(reference), mel_cepstra(estimate)
    distances = np.sqrt(2 * np.sum((x - y)[:, 1:] ** 2, 1))
    return float(10 / np.log(10) * np.mean(distances))


def mel_cepstra(wav: "torch.Tensor", size: int = 1024, hop: int = 256) -> np.ndarray:
    """Mel-cepstra [frames, 24]: cepstra of the log spectrum on a warped axis, as SPTK's ``sp2mc``.

    Tokuda et al., "Mel-generalized cepstral analysis", ICSLP 1994; the warping by Oppenheim &
    Johnson, "Discrete representation of signals", Proc. IEEE 60(6), 1972.
    """
    power = np.abs(np.fft.rfft(_frames(wav, size, hop) * np.hamming(size))) ** 2 + MCD_FLOOR
    cepstra = np.fft.irfft(np.log(power))[:, : size // 2 + 1]
    cepstra[:, 0] /= 2
    cepstra[:, -1] /= 2
    return cepstra @ _warping(cepstra.shape[1]).T


@functools.cache
def _warping(size):
    """What makes mel-cepstra [24] of cepstra [size]: the recursion of Oppenheim & Johnson."""
    a, warped = MCD_WARPING, np.zeros((MCD_ORDER + 1, size))
    for k in reversed(range(size)):
        before = warped.copy()
        warped[0] = a * before[0]
        warped[0, k] += 1
        warped[1] = (1 - a * a) * before[0] + a * before[1]
        for m in range(2, MCD_ORDER + 1):
            warped[m] = before[m - 1] + a * (before[m] - warped[m - 1])
    return warped


def _frames(wav, size, hop):
    return np.lib.stride_tricks.sliding_window_view(wav, size)[::hop]


@functools.cache
def _dnsmos():
    """The models of ``speechmos``, on one thread: utterances are scored side by side."""
    dnsmos = optional("speechmos.dnsmos", "metrics", "DNSMOS")
    runtime = optional("onnxruntime", "metrics", "DNSMOS")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    folder = Path(str(dnsmos.__file__)).parent / "dnsmos_models"
    model = dnsmos.DNSMOS.__new__(dnsmos.DNSMOS)  # its own sessions take all threads there are
    model.onnx_sess = runtime.InferenceSession(folder / "sig_bak_ovr.onnx", options)
    model.p808_onnx_sess = runtime.InferenceSession(folder / "model_v8.onnx", options)
    return model


def dnsmos(estimate: np.ndarray) -> dict:
    """DNSMOS, a model of listeners' opinions, 1 to 5, higher is better; no reference is needed.

    By ``speechmos``: means over windows of 9 s, a shorter signal being repeated. A signal over
    full scale is scaled down to it.

    Arguments
    ---------
    estimate : np.ndarray
        Waveform [T], 16 kHz.

    Returns
    -------
    dict
        ``dnsmos_sig``, ``dnsmos_bak`` and ``dnsmos_ovrl`` (speech, background and overall quality
        after ITU-T P.835; Reddy et al. 2022) and ``dnsmos_p808`` (Reddy et al. 2021). All are None
        for a silent or non-finite signal.
    """
    names = {
        "dnsmos_sig": "sig_mos",
        "dnsmos_bak": "bak_mos",
        "dnsmos_ovrl": "ovrl_mos",
        "dnsmos_p808": "p808_mos",
    }
    estimate = _waveform(estimate)
    if not _scorable(estimate):
        return dict.fromkeys(names)
    estimate = estimate / max(1.0, np.abs(estimate).max())
    found = _dnsmos()(estimate, SAMPLE_RATE, False)
    return {name: float(found[original]) for name, original in names.items()}


def signal_scores(
    reference: np.ndarray, estimate: np.ndarray, names: Sequence[str] = SIGNAL_SCORES
) -> dict[str, float | None]:
    """Signal scores of one utterance.

    Arguments
    ---------
    reference : np.ndarray or None
        Clean waveform [T], 16 kHz. None: there is none, and what needs it is None.
    estimate : np.ndarray
        Enhanced waveform [T], 16 kHz.
    names : sequence of str
        Which: names of ``declarations.WAVEFORM_METRICS``. Default: PESQ, STOI, ESTOI and SI-SDR.

    Returns
    -------
    dict
        ``{name: float or None}``, in the order of ``names``.

    Raises
    ------
    ValueError
        The waveforms are not one-dimensional or differ in length; a name is unknown.
    """
    unknown = set(names) - {metric.name for metric in WAVEFORM_METRICS}
    if unknown:
        raise ValueError(f"no metric of waveforms: {', '.join(sorted(unknown))}")
    scores: dict = {}
    for needed, compute in _COMPUTED:
        wanted = [name for name in needed if name in names]
        if not wanted:
            continue
        if compute is dnsmos:
            found = dnsmos(estimate)
        elif reference is None:
            found = dict.fromkeys(wanted)
        else:
            found = compute(reference, estimate)
            found = found if isinstance(found, dict) else {wanted[0]: found}
        scores |= found
    return {name: scores[name] for name in names}


#: What computes which scores; several that share most of their work are computed at once.
_COMPUTED: tuple[tuple[tuple[str, ...], Callable], ...] = (
    (("pesq",), pesq_wb),
    (("stoi", "estoi"), intelligibility),
    (("si_sdr",), si_sdr),
    (("lsd",), lsd),
    (("mcd",), mcd),
    (("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl", "dnsmos_p808"), dnsmos),
)


def mean_score(values: Iterable[float | None]) -> tuple[float | None, int]:
    """Mean over the scores that are there.

    Arguments
    ---------
    values : iterable of (float or None)

    Returns
    -------
    (float or None, int)
        The mean (None if there is none) and how many were missing.
    """
    values = list(values)
    present = [value for value in values if value is not None]
    return (float(np.mean(present)) if present else None), len(values) - len(present)


@functools.cache
def _normaliser():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def normalise_text(text: str) -> str:
    """Whisper's English text normalisation, applied to both sides before words are compared.

    Lower case; punctuation, diacritics, bracketed remarks and fillers (uh, um)
    dropped; contractions written out ("don't" to "do not", "'s" to "is");
    spelled-out numbers to digits ("twenty five" to "25"). Of OpenAI's steps the
    one left out is British to American spelling, whose table `transformers`
    does not ship.

    Arguments
    ---------
    text : str

    Returns
    -------
    str
        Words separated by single spaces; "" where nothing is left.

    Example
    -------
    >>> normalise_text("Uh, I don't have twenty-five.")
    'i do not have 25'
    """
    # It leaves the lone "." of an ellipsis, which is no word.
    return " ".join(w for w in _normaliser()(text).split() if any(map(str.isalnum, w)))


def word_errors(reference: str, hypothesis: str) -> dict:
    """Word errors of one utterance, counted by `jiwer` on normalised text.

    An empty hypothesis is all deletions; under an empty reference every word is
    an insertion.

    Arguments
    ---------
    reference, hypothesis : str
        Raw texts.

    Returns
    -------
    dict
        ``hypothesis``, ``reference`` (as given) and the counts ``hits``,
        ``substitutions``, ``deletions``, ``insertions``.
    """
    _check_texts(reference, hypothesis)
    counts = _edits(normalise_text(reference), normalise_text(hypothesis))
    return {"hypothesis": hypothesis, "reference": reference, **counts}


def phoneme_errors(reference: str, hypothesis: str) -> dict:
    """Phoneme errors of one utterance.

    Arguments
    ---------
    reference : str
        Raw text, of which :func:`pi_finetune.phonemes.phonemes` makes phonemes.
    hypothesis : str
        Phonemes separated by blanks.

    Returns
    -------
    dict
        As of :func:`word_errors`, with the reference's phonemes as ``reference``, and
        ``"unit": "phoneme"``.
    """
    from pi_finetune.phonemes import phonemes

    _check_texts(reference, hypothesis)
    reference = " ".join(phonemes(reference))
    counts = _edits(reference, hypothesis)
    return {"hypothesis": hypothesis, "reference": reference, "unit": "phoneme", **counts}


def character_errors(reference: str, hypothesis: str) -> dict:
    """Character errors of one utterance, on the normalised texts of :func:`word_errors`.

    Arguments
    ---------
    reference, hypothesis : str
        Raw texts.

    Returns
    -------
    dict
        ``character_errors``, and the reference's ``characters``, blanks between words counted.
    """
    _check_texts(reference, hypothesis)
    reference, hypothesis = normalise_text(reference), normalise_text(hypothesis)
    errors = len(hypothesis)
    if reference:
        import jiwer

        found = jiwer.process_characters(reference, hypothesis)
        errors = found.substitutions + found.deletions + found.insertions
    return {"character_errors": errors, "characters": len(reference)}


def token_errors(reference: str, hypothesis: str) -> int:
    """Least substitutions, deletions and insertions between texts of tokens, split at blanks."""
    counts = _edits(reference, hypothesis)
    return counts["substitutions"] + counts["deletions"] + counts["insertions"]


def recognition_errors(
    recognizer: "Recognizer | CharacterTokenizer | PhonemeTokenizer",
    reference: str,
    hypothesis: str,
) -> dict:
    """Errors of one utterance in the unit that a recogniser writes.

    Arguments
    ---------
    recognizer : Recognizer, CharacterTokenizer or PhonemeTokenizer
        Its attribute ``unit`` says which: ``word`` or ``phoneme``.
    reference, hypothesis : str
        Raw text of the utterance, and what the recogniser wrote.

    Returns
    -------
    dict
        Of :func:`word_errors` or :func:`phoneme_errors`.
    """
    errors = {"word": word_errors, "phoneme": phoneme_errors}
    return errors[recognizer.unit](reference, hypothesis)


def _check_texts(reference, hypothesis):
    for name, text in (("reference", reference), ("hypothesis", hypothesis)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")


def _edits(reference, hypothesis):
    """Counts of the best alignment of two texts, token by token."""
    counts = {"hits": 0, "substitutions": 0, "deletions": 0, "insertions": 0}
    if reference:
        import jiwer

        output = jiwer.process_words(reference, hypothesis)
        return {name: getattr(output, name) for name in counts}
    # jiwer refuses an empty reference
    return {**counts, "insertions": len(hypothesis.split())}


def wer(records: Iterable[dict | None]) -> float | None:
    """Word or phoneme error rate of a set in percent: all errors over all reference tokens.

    Arguments
    ---------
    records : iterable of (dict or None)
        What :func:`word_errors` or :func:`phoneme_errors` returned, of one unit; None (no
        transcript) is passed over.

    Returns
    -------
    float or None
        None where the references are empty. Insertions can push it over 100.

    Example
    -------
    >>> wer([word_errors("the red door", "the bread door"), word_errors("open", "Open."), None])
    25.0
    """
    known = [record for record in records if record is not None]
    errors = sum(r["substitutions"] + r["deletions"] + r["insertions"] for r in known)
    words = sum(r["hits"] + r["substitutions"] + r["deletions"] for r in known)
    return 100 * errors / words if words else None


def nll_per_token(records: Iterable[dict]) -> float | None:
    """Negative log-likelihood of a set's transcripts in nats a token: all nats over all tokens.

    Arguments
    ---------
    records : iterable of dict
        Of :func:`pi_finetune.recognizers.likelihoods`; those without a likelihood are passed over.

    Returns
    -------
    float or None
        None where no record has one.

    Example
    -------
    >>> nll_per_token([{"nll": 6.0, "tokens": 3}, {"nll": None, "tokens": 9}, {}])
    2.0
    """
    records = [record for record in records if record.get("nll") is not None]
    tokens = sum(record["tokens"] for record in records)
    return sum(record["nll"] for record in records) / tokens if tokens else None


def _waveform(signal):
    signal = np.asarray(signal, np.float64)
    if signal.ndim != 1:
        raise ValueError(f"a waveform must be of shape [T], got {list(signal.shape)}")
    return signal


def _pair(reference, estimate):
    reference, estimate = np.asarray(reference, np.float64), np.asarray(estimate, np.float64)
    if reference.ndim != 1 or reference.shape != estimate.shape:
        raise ValueError(
            "reference and estimate must be waveforms [T] of one length, "
            f"got shapes {list(reference.shape)} and {list(estimate.shape)}"
        )
    return reference, estimate


def _scorable(signal):
    return bool(
        len(signal)
        and np.isfinite(signal).all()
        and np.abs(signal - signal.mean()).max() >= SILENCE
    )
