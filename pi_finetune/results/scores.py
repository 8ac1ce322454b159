"""One metric of all runs, over the same utterances."""

import math
import re
from dataclasses import dataclass, replace

import numpy as np

from pi_finetune.errors import UserError
from pi_finetune.results.runs import reference_words


@dataclass(frozen=True)
class Metric:
    """A column: its name, heading, direction and digits after the point."""

    name: str
    label: str
    higher_is_better: bool
    digits: int
    recognizer: str | None = None


SIGNAL_METRICS = (
    Metric("pesq", "PESQ", True, 3),
    Metric("stoi", "STOI", True, 4),
    Metric("estoi", "ESTOI", True, 4),
    Metric("si_sdr", "SI-SDR (dB)", True, 2),
)
#: Of the true transcript under a recogniser, whose tokens are Whisper's, characters or phonemes.
LIKELIHOOD = Metric("nll", "NLL (nats/token)", False, 3)


def metrics_of(runs, recognizer=None):
    """The metrics that the runs can be compared by: those of the main recogniser, the signal
    metrics, those of further recognisers.

    A recogniser has a word error rate and, where the scores hold one, the negative log-likelihood
    of the true transcripts (``nll``). One of phonemes has a phoneme error rate (PER) as ``wer``.

    Arguments
    ---------
    runs : list of Run
        Those with scores.
    recognizer : str, optional
        Whose metrics are called ``wer`` and ``nll``. Default: the first in the scores. The others'
        are ``wer_NAME`` and ``nll_NAME``.

    Returns
    -------
    list of Metric

    Raises
    ------
    UserError
        No score is by that recogniser.
    """
    units, likely = {}, set()
    for run in runs:
        for line in run.scores.values():
            for name, entry in (line.get("asr") or {}).items():
                units[name] = (entry or {}).get("unit", "word")
                if "nll" in (entry or {}):
                    likely.add(name)
    names = list(units)
    if recognizer is not None:
        if recognizer not in names:
            there = ", ".join(names) or "none"
            raise UserError(f"No score is by the recogniser {recognizer!r}; there is {there}.")
        names.sort(key=lambda name: name != recognizer)
    main, *others = [_recognition(name, units[name], name in likely) for name in names] or [
        [Metric("wer", "WER (%)", False, 2)]
    ]
    others = [
        replace(m, name=f"{m.name}_{m.recognizer}", label=f"{m.label}, {m.recognizer}")
        for group in others
        for m in group
    ]
    return [*main, *SIGNAL_METRICS, *others]


def _recognition(name, unit, likely):
    rate = Metric("wer", "PER (%)" if unit == "phoneme" else "WER (%)", False, 2, name)
    return [rate, replace(LIKELIHOOD, recognizer=name)] if likely else [rate]


def recording(utterance):
    """The recording of an utterance: ids of one recording at several SNRs end in ``@5dB``."""
    return re.sub(r"@-?[\d.]+dB$", "", utterance)


@dataclass
class MetricScores:
    """One metric of every run that has it, over the same utterances.

    ``values[strategy, seed]`` [U] are numerators and ``weights`` [U] denominators: a run's score is
    the ratio of their sums. For WER these are 100 x errors and reference words, for the likelihood
    nats and tokens, for a signal metric its value and 1. ``failed`` counts, for every run, the
    scores that could not be computed.
    """

    metric: Metric
    ids: list[str]
    weights: np.ndarray
    values: dict[tuple[str, int], np.ndarray]
    failed: dict[tuple[str, int], int]

    def seeds(self, strategy):
        """Seeds of a strategy that have this metric."""
        return [seed for name, seed in self.values if name == strategy]

    def stacked(self, strategy, only=slice(None)):
        """Numerators [S, U] of a strategy, of the utterances that ``only`` picks."""
        return np.stack([self.values[strategy, seed][only] for seed in self.seeds(strategy)])

    def mean(self, strategy, seed=None, only=slice(None)):
        """Score of a run, or the mean over a strategy's seeds; None without weight."""
        weight = self.weights[only].sum()
        seeds = self.seeds(strategy) if seed is None else [seed]
        if not weight or not seeds or (strategy, seeds[0]) not in self.values:
            return None
        return float(np.mean([self.values[strategy, s][only].sum() for s in seeds]) / weight)

    def resampling_units(self, strategy, only=slice(None)):
        """Numerators [S, U'] and weights [U'] per recording: what a bootstrap may resample."""
        names = [recording(id_) for id_ in np.array(self.ids)[only]]
        _, unit = np.unique(names, return_inverse=True)
        sums = [
            np.bincount(unit, row) for row in (*self.stacked(strategy, only), self.weights[only])
        ]
        return np.stack(sums[:-1]), sums[-1]


def metric_scores(runs, ids, metric, notes=None):
    """Collect one metric over the utterances that all runs have it for.

    A score that is null in one run is left out of every run, so that all means are over the same
    utterances. A run without the metric in at least half of the utterances has no score instead.

    Arguments
    ---------
    runs : list of Run
        Those with scores.
    ids : list of str
        From :func:`common_utterances`.
    metric : Metric
        Which.
    notes : list of str, optional
        Receives what was left out.

    Returns
    -------
    MetricScores
    """
    table, failed = {}, {}
    for run in runs:
        scores = [_score(run.scores[id_], metric) for id_ in ids]
        table[run.strategy, run.seed] = scores
        failed[run.strategy, run.seed] = sum(score is None for score in scores)
    scorable = {
        id_ for i, id_ in enumerate(ids) if any(row[i] is not None for row in table.values())
    }
    unscorable = len(ids) - len(scorable)
    missing = [key for key in table if failed[key] - unscorable > len(scorable) / 2]
    if metric.recognizer is not None:  # no transcript is no failure
        failed = {key: count - unscorable for key, count in failed.items()}
    kept = {key: row for key, row in table.items() if key not in missing and scorable}
    used = [i for i in range(len(ids)) if kept and all(row[i] is not None for row in kept.values())]
    weights = [next(iter(kept.values()))[i][1] for i in used] if kept else []
    if not used or not sum(weights):
        kept, used, weights, missing = {}, [], [], list(table)
    if notes is not None:
        dropped = len(scorable) - len(used)
        if not used:
            notes.append(f"{metric.name}: no score")
        elif dropped:
            culprits = [f"{s}/{n} ({failed[s, n]})" for s, n in kept if failed[s, n]]
            notes.append(
                f"{metric.name}: {dropped} of {len(ids)} utterances are left out of every row, for "
                f"want of a score in {', '.join(culprits)}"
            )
        if used and missing:
            names = ", ".join(f"{s}/{n}" for s, n in missing)
            notes.append(f"{metric.name}: missing for most utterances in {names}, marked –")
    values = {key: np.array([row[i][0] for i in used], np.float64) for key, row in kept.items()}
    return MetricScores(metric, [ids[i] for i in used], np.array(weights, float), values, failed)


def _score(line, metric):
    """(numerator, denominator) of one utterance, or None."""
    if metric.name.startswith(("wer", "nll")):
        entry = (line.get("asr") or {}).get(metric.recognizer)
        if not entry:
            return None
        if metric.name.startswith("nll"):
            return None if entry.get("nll") is None else (entry["nll"], entry["tokens"])
        errors = entry["substitutions"] + entry["deletions"] + entry["insertions"]
        return 100.0 * errors, reference_words(entry)
    value = line.get(metric.name)
    return (value, 1.0) if value is not None and math.isfinite(value) else None
