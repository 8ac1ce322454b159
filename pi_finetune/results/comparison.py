"""The numbers of a comparison: scores, intervals, differences from a baseline, convergence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi_finetune.errors import UserError
from pi_finetune.results.declarations import NLL, PER, SIGNAL_METRICS, WER, Metric
from pi_finetune.results.runs import UNTRAINED, Run, common_utterances, load_runs, rank
from pi_finetune.results.scores import (
    MetricScores,
    metric_scores,
    metrics_of,
    recording,
    resampling_units,
)
from pi_finetune.results.statistics import (
    Bootstrap,
    Difference,
    Interval,
    area_under_curve,
    holm,
    seed_interval,
    updates_to_reach,
)

__all__ = [
    "DEV_METRICS",
    "FEW_RECORDINGS",
    "Comparison",
    "Convergence",
    "common_folder",
    "compare_runs",
]


#: Under this many, resampling utterances is not to be relied on, and the comparison says so.
FEW_RECORDINGS = 20

#: From so many errors on, no fewer than two a word, an utterance was not misheard but made up.
MADE_UP = 20

#: Dev scores in which runs may converge, the preferred first.
DEV_METRICS = (*(replace(m, title=f"dev {m.title}") for m in (WER, NLL, *SIGNAL_METRICS)),)
#: Families over which p-values are adjusted: all differences of trained strategies in the metrics
#: that need this reference.
FAMILIES = {"transcript": "recognition", "clean": "signal", None: "quality"}


@dataclass
class SystemSummary:
    """A system's score in one metric over its seeds.

    ``p_holm`` is the p-value of the difference, and ``p_equivalence`` that of the equivalence
    tests, each adjusted over the ``family``, which is named with its size; None for the baseline
    and for untrained systems, which are no hypotheses. ``verdict`` is ``equivalent`` (within the
    metric's margin, whatever the p-value of the difference), ``better``, ``worse`` or
    ``undecided``. ``marker`` (* better, † worse) is of the difference alone.
    """

    seeds: list[int]
    level: Interval
    difference: Difference | None = None
    p_holm: float | None = None
    p_equivalence: float | None = None
    family: str = ""
    verdict: str = ""
    marker: str = ""


@dataclass
class Curve:
    """Dev scores of one run: [V] each."""

    updates: np.ndarray
    seconds: np.ndarray
    scores: np.ndarray


@dataclass
class Convergence:
    """How fast a strategy reaches the baseline's best dev score.

    ``updates`` and ``seconds`` have one entry per seed, infinite where the score was not reached
    within the run; ``updates_mean`` only where every seed reached it. ``area`` is the mean height
    of the dev curve over the updates that all runs share.
    """

    seeds: list[int]
    updates: list[float]
    seconds: list[float]
    budget: float
    updates_mean: Interval | None
    area: Interval | None
    area_difference: Interval | None


@dataclass
class Comparison:
    """Everything that tables and report are written from."""

    test_set: str
    baseline: str | Any  # None: it has no scores
    runs: list[Run]
    ids: list[str]
    metrics: list[Metric]
    scores: dict[str, MetricScores]
    summary: dict[str, dict[str, SystemSummary]]
    expected: list[tuple[str, int | None]]
    dev_metric: Metric | Any  # None: no run has a dev curve
    curves: dict[str, dict[tuple[str, int], Curve]]
    convergence: dict[str, Convergence]
    bootstrap: Bootstrap
    unit: str  # what utterances are drawn by: speaker or recording
    of_models: bool = False  # systems are models to choose from, and not strategies of training
    notes: list[str] = field(default_factory=list)

    @property
    def systems(self) -> list[str]:
        """Names of the systems that have scores, in the order of tables."""
        return list(dict.fromkeys(run.strategy for run in self.runs if run.scores))

    @property
    def main_metrics(self) -> list[Metric]:
        """The metrics less those of further recognisers."""
        main = self.metrics[0].recognizer
        return [metric for metric in self.metrics if metric.recognizer in (None, main)]

    @property
    def records(self) -> dict[tuple[str, int], list[dict]]:
        """Score lines of the compared utterances by run: {(strategy, seed): [line]}."""
        return {
            (run.strategy, run.seed): [run.scores[id_] for id_ in self.ids]
            for run in self.runs
            if run.scores
        }


def compare_runs(
    paths: Sequence[str | Path],
    test_set: str | None = None,
    baseline: str = "mse",
    intersect: bool = False,
    recognizer: str | None = None,
    dev_metric: str | None = None,
    bootstrap: Bootstrap | None = None,
    of_models: bool = False,
) -> Comparison:
    """Compare runs on one test set and by their dev curves.

    Arguments
    ---------
    paths : list of (str or Path)
        Run folders, or folders above them.
    test_set : str, optional
        Which scores. Default: ``test``, or the only set there is.
    baseline : str
        The system that differences are taken from. Default: ``mse``.
    intersect : bool
        Where runs were scored on different utterances, compare on the common ones instead of
        raising. Default: False.
    recognizer : str, optional
        Whose WER is the main one. Default: the first in the scores.
    dev_metric : str, optional
        Dev score of the convergence measures. Default: ``wer``, or the first of ``DEV_METRICS``
        that every trained run has logged.
    bootstrap : Bootstrap, optional
        How intervals are drawn.
    of_models : bool
        The systems are models to choose from: nothing is said of systems or seeds that a comparison
        of strategies would have. Default: False.

    Returns
    -------
    Comparison
        What is missing, left out or doubtful is in its ``notes``.

    Raises
    ------
    UserError
        As :func:`~pi_finetune.results.runs.load_runs`,
        :func:`~pi_finetune.results.runs.common_utterances` and
        :func:`~pi_finetune.results.scores.metrics_of`; or ``dev_metric`` is unknown.
    """
    bootstrap = bootstrap or Bootstrap()
    notes: list = []
    runs, test_set = load_runs(paths, test_set, notes)
    scored = [run for run in runs if run.scores]
    if not scored:
        raise UserError(f"The scores of {test_set!r} hold no utterance. Evaluate anew.")
    ids = common_utterances(scored, intersect, notes)
    metrics = metrics_of(scored, recognizer)
    units, unit = resampling_units(scored, ids, notes)
    scores = {m.name: metric_scores(scored, ids, m, notes, units) for m in metrics}
    notes += _never_asked([m for m in metrics if not scores[m.name].asked])
    notes += [note for table in scores.values() for note in _repeating(table)]
    recordings = len({recording(scored[0].scores[id_]) for id_ in ids})
    if recordings < FEW_RECORDINGS:
        notes.append(
            f"only {recordings} recordings: a bootstrap over so few gives intervals that are too "
            "narrow and p-values that are too small"
        )
    expected = _expected(runs, baseline, notes, of_models)
    if baseline not in {run.strategy for run in scored}:
        notes.append(f"no scores of the baseline {baseline}: no differences, no p-values")
    curves = {m.name: _curves(runs, m) for m in DEV_METRICS}
    dev_metric = _choose_dev_metric(curves, dev_metric)
    summary = {name: _summarise(table, baseline, bootstrap) for name, table in scores.items()}
    _judge(metrics, summary, 1 - bootstrap.confidence)
    convergence = {}
    if dev_metric is not None:
        chosen = curves[dev_metric.name]
        convergence = _converge(chosen, dev_metric, baseline, bootstrap.confidence, notes)
    return Comparison(
        test_set=test_set,
        baseline=baseline if baseline in {run.strategy for run in scored} else None,
        runs=runs,
        ids=ids,
        metrics=metrics,
        scores=scores,
        summary=summary,
        expected=expected,
        dev_metric=dev_metric,
        curves=curves,
        convergence=convergence,
        bootstrap=bootstrap,
        unit=unit,
        of_models=of_models,
        notes=notes,
    )


def _never_asked(metrics):
    """Notes on empty columns: what their metrics need."""
    needs = {"clean": "a clean reference", "transcript": "transcripts, and a recogniser"}
    return [
        f"{', '.join(m.title for m in metrics if m.reference == reference)}: empty, needs {what}"
        for reference, what in needs.items()
        if any(m.reference == reference for m in metrics)
    ]


def _repeating(scores):
    """A note on utterances with twice as many errors as words or more, few of which sway a mean.

    A recogniser that makes up text, as Whisper does of noise, repeats itself up to its limit.
    """
    if scores.metric.title not in (WER.title, PER.title):
        return []
    found, recognizer = {}, scores.metric.recognizer
    for name in dict.fromkeys(name for name, _ in scores.values):
        errors = scores.stacked(name) / 100
        wild = errors >= np.maximum(2 * scores.weights, MADE_UP)
        if wild.any():
            count, share = int(wild.sum()), errors[wild].sum() / errors.sum()
            found[name] = f"{count} of {name} ({share:.0%} of its errors)"
    if not found:
        return []
    return [
        f"{scores.metric.name}: {recognizer} made up text, two errors a word or more, "
        f"in {', '.join(found.values())}; a mean hangs on such utterances, a likelihood does not"
    ]


def _expected(runs, baseline, notes, of_models):
    """Rows of the table, (system, seed): every run, and what should be there but is not."""
    have = {(run.strategy, run.seed): run for run in runs}
    if of_models:
        return list(have)
    trained = sorted({name for name, _ in have if name not in UNTRAINED})
    seeds = sorted({seed for name, seed in have if name not in UNTRAINED})
    rows = {*have, *((name, seed) for name in trained for seed in seeds)}
    for name in ("noisy", "pretrained", baseline):
        if name not in {row[0] for row in rows}:
            rows.add((name, None))
            notes.append(f"no run of {name}")
    for name in trained:
        lacking = [str(seed) for seed in seeds if (name, seed) not in have]
        if lacking:
            notes.append(f"{name}: no run with seed {', '.join(lacking)}")
    for (name, seed), run in sorted(have.items()):
        if not run.scores:
            notes.append(f"{name}/{seed}: not evaluated on this set")
    single = [name for name in trained if sum(key[0] == name for key in have) == 1]
    if single:
        notes.append(
            f"one seed only of {', '.join(single)}: their intervals are about the choice of "
            "utterances and say nothing of how much training varies"
        )
    return sorted(rows, key=lambda row: (rank(row[0]), row[1] or 0))


def _summarise(scores, baseline, bootstrap):
    """{system: SystemSummary} of one metric."""
    result = {}
    systems = list(dict.fromkeys(name for name, _ in scores.values))
    for system in systems:
        values, weights = scores.resampling_units(system)
        result[system] = SystemSummary(scores.seeds(system), bootstrap.level(values, weights))
    if baseline not in systems:
        return result
    reference, weights = scores.resampling_units(baseline)
    margin = scores.metric.margin_of(result[baseline].level.estimate) or None
    for system in systems:
        if system != baseline:
            values, _ = scores.resampling_units(system)
            # One seed means one data order and one set of mixtures for every strategy.
            paired = scores.seeds(system) == scores.seeds(baseline)
            result[system].difference = bootstrap.difference(
                values, reference, weights, scores.metric.higher_is_better, paired, margin
            )
    return result


def _judge(metrics, summary, alpha):
    """Adjust the p-values of each family, and reach the verdicts."""
    for reference, name in FAMILIES.items():
        family = [
            (metric, found)
            for metric in metrics
            if metric.reference == reference
            for system, found in summary[metric.name].items()
            if found.difference is not None and system not in UNTRAINED
        ]
        adjusted = holm([found.difference.p_value for _, found in family])
        tested = [found for _, found in family if found.difference.p_equivalence is not None]
        equivalence = holm([found.difference.p_equivalence for found in tested])
        for found, p_value in zip(tested, equivalence.tolist()):
            found.p_equivalence = p_value
        for (metric, found), p_value in zip(family, adjusted.tolist()):
            found.family = f"{name}, {len(family)}"
            found.p_holm = p_value
            found.verdict = "undecided"
            if p_value < alpha:
                better = (found.difference.estimate > 0) == metric.higher_is_better
                found.verdict = "better" if better else "worse"
                found.marker = "*" if better else "†"
            if found.p_equivalence is not None and found.p_equivalence < alpha:
                found.verdict = "equivalent"


def _curves(runs, metric):
    curves = {}
    for run in runs:
        lines = [
            (line["update"], line.get("seconds", math.nan), line[metric.name])
            for line in run.validations
            if line.get(metric.name) is not None and math.isfinite(line[metric.name])
        ]
        if lines:
            curves[run.strategy, run.seed] = Curve(*np.array(lines, np.float64).T)
    return curves


def _choose_dev_metric(curves, name):
    known = {metric.name: metric for metric in DEV_METRICS}
    if name is not None:
        if name not in known:
            raise UserError(f"--dev_metric {name}: choose one of {', '.join(known)}.")
        return known[name] if curves[name] else None
    trained = {key for by_run in curves.values() for key in by_run}
    complete = [m for m in DEV_METRICS if curves[m.name] and set(curves[m.name]) == trained]
    return complete[0] if complete else None


def _converge(curves, metric, baseline, confidence, notes):
    """{strategy: Convergence}; empty without dev curves of the baseline."""
    higher = metric.higher_is_better
    best = {
        seed: float(curve.scores.max() if higher else curve.scores.min())
        for (name, seed), curve in curves.items()
        if name == baseline
    }
    if not best:
        notes.append(f"no dev curve of the baseline {baseline}: convergence was not measured")
        return {}
    start = max(curve.updates[0] for curve in curves.values())
    stop = min(curve.updates[-1] for curve in curves.values())
    longest = max(curve.updates[-1] for curve in curves.values())
    if stop < longest:
        short = [f"{n}/{s}" for (n, s), c in curves.items() if c.updates[-1] < longest]
        notes.append(
            f"dev curves are of different lengths ({', '.join(short)} end before {longest:g} "
            f"updates); areas are over the updates up to {stop:g} that all share"
        )
    areas = {}
    if start < stop:
        for key, curve in curves.items():
            areas[key] = area_under_curve(curve.updates, curve.scores, start, stop)
    result = {}
    for strategy in sorted({name for name, _ in curves}, key=rank):
        seeds = sorted(seed for name, seed in curves if name == strategy)
        # Same seed, same data: the target is that seed's; a seed of its own gets the mean.
        targets = [best.get(seed, float(np.mean(list(best.values())))) for seed in seeds]
        updates, seconds = [], []
        for seed, target in zip(seeds, targets):
            curve = curves[strategy, seed]
            updates.append(updates_to_reach(curve.updates, curve.scores, target, higher))
            at = np.searchsorted(curve.updates, updates[-1])
            seconds.append(float(curve.seconds[at]) if at < len(curve.seconds) else math.inf)
        result[strategy] = Convergence(
            seeds=seeds,
            updates=updates,
            seconds=seconds,
            budget=max(curves[strategy, seed].updates[-1] for seed in seeds),
            updates_mean=_mean_updates(updates, confidence),
            area=None,
            area_difference=None,
        )
        if areas:
            area = [areas[strategy, seed] for seed in seeds]
            result[strategy].area = seed_interval(area, confidence)
            paired = [seed for seed in seeds if seed in best]
            if strategy != baseline and paired:
                differences = [areas[strategy, s] - areas[baseline, s] for s in paired]
                result[strategy].area_difference = seed_interval(differences, confidence)
    return result


def _mean_updates(updates, confidence):
    if not np.isfinite(updates).all():
        return None
    mean = seed_interval(updates, confidence)
    low = float(np.maximum(mean.low, 0))  # no number of updates is negative; NaN stays NaN
    return Interval(mean.estimate, low, mean.high)


def common_folder(comparison: Comparison) -> Path:
    """The folder that holds the compared runs, for output: ``results`` of results/mse/1234."""
    return Path(comparison.runs[0].folder).resolve().parent.parent
