"""One metric of all runs, over the same utterances."""

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pi_finetune.errors import UserError
from pi_finetune.results.declarations import (
    CER,
    LINE_METRICS,
    NLL,
    PER,
    SIGNAL_METRICS,
    WER,
    Metric,
)
from pi_finetune.results.runs import reference_words
from pi_finetune.results.statistics import sum_by_unit

if TYPE_CHECKING:
    from pi_finetune.results.runs import Run

__all__ = ["MetricScores", "metric_scores", "metrics_of", "recording", "resampling_units"]


#: Under this many, speakers are not resampled.
FEW_SPEAKERS = 10


def metrics_of(runs: "list[Run]", recognizer: str | None = None) -> list[Metric]:
    """The metrics that the runs can be compared by: those of the main recogniser, the signal
    metrics and what else the lines hold, those of further recognisers.

    A recogniser has a word error rate and, where the scores hold them, a character error rate and
    the negative log-likelihood of the true transcripts (``nll``). One of phonemes has a phoneme
    error rate (PER) as ``wer``.

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
    units: dict = {}
    held: dict = {}
    there: set = set()
    for run in runs:
        for line in run.scores.values():
            there |= line.keys()
            for name, entry in (line.get("asr") or {}).items():
                units[name] = (entry or {}).get("unit", "word")
                held.setdefault(name, set()).update(entry or {})
    names = list(units)
    if recognizer is not None:
        if recognizer not in names:
            known = ", ".join(names) or "none"
            raise UserError(f"No score is by the recogniser {recognizer!r}; there is {known}.")
        names.sort(key=lambda name: name != recognizer)
    main, *others = [_recognition(name, units[name], held[name]) for name in names] or [[WER]]
    others = [
        replace(m, name=f"{m.name}_{m.recognizer}", names_recognizer=True)
        for group in others
        for m in group
    ]
    # Of recordings there are none: their columns are there and empty.
    empty = () if any(m.name in there for m in SIGNAL_METRICS) else SIGNAL_METRICS
    lines = [m for m in LINE_METRICS if m.name in there or m in empty]
    return [*main, *lines, *others]


def _recognition(name, unit, fields):
    found = [PER if unit == "phoneme" else WER]
    found += [CER] if "characters" in fields else []
    found += [NLL] if "nll" in fields else []
    return [replace(metric, recognizer=name) for metric in found]


def recording(line: dict) -> str:
    """The recording of a score line, of which there may be mixtures at several SNRs.

    Lines of older evaluations do not say it; there, ids of mixtures end in ``@5dB``.
    """
    return line.get("recording") or re.sub(r"@(-?[\d.]+|-?inf)dB$", "", line["id"])


def resampling_units(
    runs: "list[Run]", ids: list[str], notes: list[str] | None = None
) -> tuple[dict, str]:
    """What a bootstrap draws: speakers if there are enough, else recordings.

    Utterances of one speaker are alike in how hard they are, so that an interval which is to hold
    for other speakers must come from drawing speakers (Bisani & Ney 2004). With fewer than
    ``FEW_SPEAKERS`` the interval over them would be too narrow (one of nominal 95 % holds the truth
    in about 80 % of simulated sets of 4 speakers, 90 % of 10 and 94 % of 20): recordings are drawn,
    and the notes say that the intervals are about these speakers.

    Arguments
    ---------
    runs : list of Run
        Those with scores.
    ids : list of str
        From :func:`~pi_finetune.results.runs.common_utterances`.
    notes : list of str, optional
        Receives what the intervals are about.

    Returns
    -------
    (dict, str)
        {utterance: name of its unit}, and the units' kind: ``speaker`` or ``recording``.
    """
    recordings = {id_: recording(runs[0].scores[id_]) for id_ in ids}
    speakers = {}
    for id_ in ids:
        said = (run.scores[id_].get("speaker") for run in runs)
        speakers[id_] = next((speaker for speaker in said if speaker is not None), None)
    count = len(set(speakers.values()))
    if None in speakers.values():
        problem = "the scores do not say who speaks"
    elif count < FEW_SPEAKERS:
        problem = f"only {count} speaker{'s' if count > 1 else ''}, too few to resample"
    else:
        return speakers, "speaker"
    if notes is not None:
        notes.append(f"{problem}: intervals are about utterances, and not about other speakers")
    return recordings, "recording"


@dataclass
class MetricScores:
    """One metric of every run that has it, over the same utterances.

    ``values[strategy, seed]`` [U] are numerators and ``weights`` [U] denominators: a run's score is
    the ratio of their sums. For WER these are 100 x errors and reference words, for the likelihood
    nats and tokens, for a signal metric its value and 1. ``failed`` counts, for every run, the
    scores that could not be computed; one that was not asked for (no transcript, no clean speech,
    another recogniser) is no failure. ``asked`` says whether any was asked for. ``units`` [U] are
    what :func:`resampling_units` found.
    """

    metric: Metric
    ids: list[str]
    weights: np.ndarray
    values: dict[tuple[str, int], np.ndarray]
    failed: dict[tuple[str, int], int]
    units: np.ndarray
    asked: bool = True

    def seeds(self, strategy: str) -> list[int]:
        """Seeds of a strategy that have this metric."""
        return [seed for name, seed in self.values if name == strategy]

    def stacked(self, strategy: str, only: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Numerators [S, U] of a strategy, of the utterances that ``only`` picks."""
        return np.stack([self.values[strategy, seed][only] for seed in self.seeds(strategy)])

    def mean(
        self, strategy: str, seed: int | None = None, only: slice | np.ndarray = slice(None)
    ) -> float | None:
        """Score of a run, or the mean over a strategy's seeds; None without weight."""
        weight = self.weights[only].sum()
        seeds = self.seeds(strategy) if seed is None else [seed]
        if not weight or not seeds or (strategy, seeds[0]) not in self.values:
            return None
        return float(np.mean([self.values[strategy, s][only].sum() for s in seeds]) / weight)

    def resampling_units(
        self, strategy: str, only: slice | np.ndarray = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numerators [S, U'] and weights [U'] per unit: what a bootstrap may resample."""
        rows = (*self.stacked(strategy, only), self.weights[only])
        *sums, weights = sum_by_unit(self.units[only], *rows)
        return np.stack(sums), weights


def metric_scores(
    runs: "list[Run]",
    ids: list[str],
    metric: Metric,
    notes: list[str] | None = None,
    units: dict | None = None,
) -> MetricScores:
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
    units : dict, optional
        From :func:`resampling_units`. Default: recordings.

    Returns
    -------
    MetricScores
    """
    units = units or {id_: recording(runs[0].scores[id_]) for id_ in ids}
    table, lacking, failed, asked_for = {}, {}, {}, False
    for run in runs:
        found = [_score(run.scores[id_], metric) for id_ in ids]
        asked_for = asked_for or any(asked for asked, _ in found)
        table[run.strategy, run.seed] = [score for _, score in found]
        failed[run.strategy, run.seed] = sum(asked and score is None for asked, score in found)
    scorable = {
        id_ for i, id_ in enumerate(ids) if any(row[i] is not None for row in table.values())
    }
    for key, row in table.items():
        lacking[key] = row.count(None) - (len(ids) - len(scorable))
    missing = [key for key in table if lacking[key] > len(scorable) / 2]
    kept = {key: row for key, row in table.items() if key not in missing and scorable}
    used = [i for i in range(len(ids)) if kept and all(row[i] is not None for row in kept.values())]
    weights = [next(iter(kept.values()))[i][1] for i in used] if kept else []
    if not used or not sum(weights):
        kept, used, weights, missing = {}, [], [], list(table)
    if notes is not None:
        dropped = len(scorable) - len(used)
        if not used and asked_for:
            notes.append(f"{metric.name}: no score")
        elif dropped:
            culprits = [f"{s}/{n} ({lacking[s, n]})" for s, n in kept if lacking[s, n]]
            notes.append(
                f"{metric.name}: {dropped} of {len(ids)} utterances are left out of every row, for "
                f"want of a score in {', '.join(culprits)}"
            )
        if used and missing:
            names = ", ".join(f"{s}/{n}" for s, n in missing)
            notes.append(f"{metric.name}: missing for most utterances in {names}, marked –")
    values = {key: np.array([row[i][0] for i in used], np.float64) for key, row in kept.items()}
    used_ids = [ids[i] for i in used]
    names = np.array([units[id_] for id_ in used_ids])
    weights = np.array(weights, float)
    return MetricScores(metric, used_ids, weights, values, failed, names, asked_for)


def _score(line, metric):
    """Whether the metric was asked for, and (numerator, denominator) of one utterance, or None."""
    if metric.reference == "transcript":
        heard = line.get("asr") or {}
        entry = heard.get(metric.recognizer)
        if not entry:  # null for a silent recording
            return metric.recognizer in heard, None
        if metric.title == NLL.title:
            nll = entry.get("nll")
            return "nll" in entry, None if nll is None else (nll, entry["tokens"])
        if metric.title == CER.title:
            if "characters" not in entry:
                return False, None
            return True, (100.0 * entry["character_errors"], entry["characters"])
        errors = entry["substitutions"] + entry["deletions"] + entry["insertions"]
        return True, (100.0 * errors, reference_words(entry))
    value = line.get(metric.name)
    scored = value is not None and math.isfinite(value)
    return metric.name in line, (value, 1.0) if scored else None
