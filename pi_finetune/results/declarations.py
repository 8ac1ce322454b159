"""The metrics, each declared once; score files, tables, reports and dev curves come from here.

What computes them is in :mod:`pi_finetune.results.metrics`.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from pi_finetune.errors import UserError
from pi_finetune.settings import check_choice

__all__ = [
    "CHOICES",
    "NLL",
    "PER",
    "SIGNAL_METRICS",
    "WAVEFORM_METRICS",
    "WER",
    "Metric",
    "check_metrics",
    "higher_is_better",
]


@dataclass(frozen=True)
class Metric:
    """A score of an utterance, and of a set of them.

    Arguments
    ---------
    name : str
        Its key in score lines, tables and ``valid.jsonl``.
    title : str
        Of its column.
    unit : str
        "" where it has none.
    higher_is_better : bool
        Its direction.
    digits : int
        After the point, in tables.
    reference : str or None
        What it needs beside the enhanced speech: ``clean`` speech, a ``transcript``, or nothing.
    source : str
        Where it is defined.
    margin : float, optional
        Difference within which two systems count as equivalent, in the metric's unit. Default:
        none is stated, and no equivalence is tested.
    margin_is_relative : bool
        Whether ``margin`` is a share of the baseline's score. Default: False.
    recognizer : str, optional
        Whose it is.
    names_recognizer : bool
        Whether the label does. Default: False.
    packages : tuple of str
        What it needs beside the packages of every installation; the extra ``metrics`` brings them.
    model : str, optional
        Key of ``evaluate.yaml`` that says by which model it is measured. Default: by none.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    digits: int
    reference: str | None
    source: str
    margin: float | None = None
    margin_is_relative: bool = False
    recognizer: str | None = None
    names_recognizer: bool = False
    packages: tuple[str, ...] = ()
    model: str | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether clean speech is needed: real recordings have none."""
        return self.reference == "clean"

    @property
    def label(self) -> str:
        """Title, unit and, if asked for, recogniser."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.title}{unit}" + (f", {self.recognizer}" if self.names_recognizer else "")

    def margin_of(self, level: float) -> float | None:
        """The margin in the metric's unit, where the baseline's score is ``level``; or None."""
        if self.margin is None:
            return None
        return self.margin * abs(level) if self.margin_is_relative else self.margin

    def margin_text(self) -> str:
        """``0.5 points``, ``2 %``, or "" without a margin."""
        if self.margin is None:
            return ""
        if self.margin_is_relative:
            return f"{100 * self.margin:g} %"
        return f"{self.margin:g} {'points' if self.unit == '%' else self.unit}".strip()


WER = Metric(
    "wer", "WER", "%", False, 2, "transcript",
    "word errors over reference words, after Whisper's English normalisation", margin=0.5,
)  # fmt: skip
#: Of a recogniser of phonemes; its key is that of WER.
PER = Metric(
    "wer", "PER", "%", False, 2, "transcript", "phoneme errors over reference phonemes", margin=0.5
)
NLL = Metric(
    "nll", "NLL", "nats/token", False, 3, "transcript",
    "negative log-likelihood of the true transcript under the recogniser, a token being Whisper's, "
    "a character or a phoneme",
    margin=0.02, margin_is_relative=True,
)  # fmt: skip
CER = Metric(
    "cer", "CER", "%", False, 2, "transcript",
    "character errors over reference characters, blanks among them, after the normalisation of WER",
)  # fmt: skip
#: Those of every evaluation and validation: what compares the enhanced with the clean waveform.
SIGNAL_METRICS = (
    Metric("pesq", "PESQ", "", True, 3, "clean", "wide-band MOS-LQO, ITU-T P.862.2 (2007)"),
    Metric("stoi", "STOI", "", True, 4, "clean", "Taal et al., IEEE TASLP 19(7), 2011"),
    Metric("estoi", "ESTOI", "", True, 4, "clean", "Jensen & Taal, IEEE/ACM TASLP 24(11), 2016"),
    Metric("si_sdr", "SI-SDR", "dB", True, 2, "clean", "Le Roux et al., ICASSP 2019"),
)
_DNSMOS = ("speechmos", "librosa", "onnxruntime", "requests")
_P835 = "Reddy et al., DNSMOS P.835, ICASSP 2022"
#: What else waveforms alone give, if it is asked for.
WAVEFORM_METRICS = (
    *SIGNAL_METRICS,
    Metric(
        "lsd", "LSD", "", False, 3, "clean",
        "log-spectral distance (Gray & Markel, IEEE TASSP 24(5), 1976) as in the URGENT challenge",
    ),
    Metric(
        "mcd", "MCD", "dB", False, 2, "clean",
        "mel-cepstral distortion, Kubichek, IEEE PacRim 1993; coefficients 1 to 23",
    ),
    Metric("dnsmos_sig", "DNSMOS SIG", "", True, 3, None, _P835, packages=_DNSMOS),
    Metric("dnsmos_bak", "DNSMOS BAK", "", True, 3, None, _P835, packages=_DNSMOS),
    Metric("dnsmos_ovrl", "DNSMOS OVRL", "", True, 3, None, _P835, packages=_DNSMOS),
    Metric(
        "dnsmos_p808", "DNSMOS P.808", "", True, 3, None, "Reddy et al., DNSMOS, ICASSP 2021",
        packages=_DNSMOS,
    ),
)  # fmt: skip
#: What models make of the clean and of the enhanced speech.
MODEL_METRICS = (
    Metric(
        "speech_bert_score", "SpeechBERTScore", "", True, 4, "clean",
        "Saeki et al., Interspeech 2024: its precision", model="teacher_source",
    ),
    Metric(
        "phoneme_similarity", "phoneme similarity", "", True, 4, "clean",
        "Levenshtein phoneme similarity, Pirklbauer et al., ITG Speech Communication 2023",
        model="asr_source",
    ),
    Metric(
        "speaker_similarity", "speaker similarity", "", True, 4, "clean",
        "cosine of ECAPA-TDNN's embeddings (Desplanques et al., Interspeech 2020)",
        model="speaker_source",
    ),
)  # fmt: skip
#: What a score line keeps under the metric's own name.
LINE_METRICS = (*WAVEFORM_METRICS, *MODEL_METRICS)
METRICS = (WER, PER, CER, NLL, *LINE_METRICS)
#: What ``metrics`` of ``evaluate.yaml`` may name: a recogniser's WER and likelihood are there if it
#: is.
CHOICES = {metric.name: metric for metric in (CER, *LINE_METRICS)}


def higher_is_better(score: str) -> bool:
    """The direction of a score by its name; what is no declared metric is a loss, and lower is."""
    return any(metric.higher_is_better for metric in METRICS if metric.name == score)


def metrics_table() -> str:
    """The declared metrics as a table in Markdown: that of ``docs/metrics.md``."""
    needs = {"clean": "clean speech", "transcript": "transcript, recogniser", None: ""}
    rows = ["| name | metric | better | needs | defined by |", "|---|---|---|---|---|"]
    for metric in METRICS:
        needed = [needs[metric.reference], f"`{metric.model}`" if metric.model else ""]
        needed.append("the extra `metrics`" if metric.packages else "")
        needed_text = ", ".join(filter(None, needed)) or "nothing"
        better = "higher" if metric.higher_is_better else "lower"
        rows.append(
            f"| `{metric.name}` | {metric.label} | {better} | {needed_text} | {metric.source} |"
        )
    return "\n".join(rows) + "\n"


def check_metrics(names: Sequence[str]) -> None:
    """See whether an installation can compute some metrics.

    Arguments
    ---------
    names : sequence of str
        Of ``CHOICES``.

    Raises
    ------
    UserError
        One is not known, or lacks a package.
    """
    for name in names:
        check_choice("metrics", name, CHOICES)
        lacking = _lacking(CHOICES[name])
        if lacking:
            raise UserError(
                f"metrics: {name} needs {' and '.join(lacking)}, not installed here. The extra "
                "metrics brings them: pip install 'pi_finetune[metrics]'."
            )


def without_reference() -> list[str]:
    """Names of the metrics of waveforms that need no clean speech, as far as their packages are
    installed: what real recordings are scored by.
    """
    return [m.name for m in WAVEFORM_METRICS if not m.needs_reference and not _lacking(m)]


def _lacking(metric):
    return [name for name in metric.packages if importlib.util.find_spec(name) is None]
