"""How many utterances and seeds decide a difference, from a pilot's scores.

The paired difference of two systems, trained with S seeds each and scored on N utterances, varies
with both, in three parts: what a seed does to all utterances, what an utterance does to all seeds,
and what is left. Its squared standard error is

    seed^2 / S + utterance^2 / N + both^2 / (N S)

(seeds and utterances are crossed random effects; Searle, Casella & McCulloch, Variance Components,
1992, section 4.2). More utterances do nothing to the first part, and more seeds nothing to the
second.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from pi_finetune.errors import UserError
from pi_finetune.results.comparison import FEW_RECORDINGS
from pi_finetune.results.declarations import Metric
from pi_finetune.results.runs import UNTRAINED, common_utterances, load_runs
from pi_finetune.results.scores import metric_scores, metrics_of, resampling_units

__all__ = ["Pilot", "VarianceComponents", "load_pilots", "variance_components"]

#: No answer is sought beyond.
MOST_UTTERANCES = 1_000_000
#: Gauss-Legendre nodes and weights on (0, 1), which make an integral over a distribution a sum.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_NODES, _WEIGHTS = (1 + _NODES) / 2, _WEIGHTS / 2


@dataclass(frozen=True)
class VarianceComponents:
    """Standard deviations of a paired difference between two systems.

    Arguments
    ---------
    seed : float
        Of what a seed does to all utterances. NaN where the pilot has one seed.
    utterance : float
        Of what an utterance does to all seeds; with one seed, and what both do, which cannot be
        told from it.
    both : float
        Of what is left. NaN where the pilot has one seed.
    """

    seed: float
    utterance: float
    both: float

    def standard_error(self, seeds: int, utterances: int) -> float:
        """Of the mean difference over that many. A pilot of one seed says nothing of others."""
        return float(np.hypot(*self._parts(seeds, utterances)[1:]))

    def _parts(self, seeds, utterances):
        """Standard errors: from seeds as a test sees it, from utterances, and the true rest."""
        both = 0.0 if np.isnan(self.both) else self.both**2 / (seeds * utterances)
        seed = 0.0 if np.isnan(self.seed) else self.seed**2 / seeds
        # A test takes the spread over seeds from their means, each of which has its share of both.
        return np.sqrt(seed + both), np.sqrt(self.utterance**2 / utterances + both), np.sqrt(seed)

    def power_of_difference(
        self, seeds: int, utterances: int, difference: float, alpha: float = 0.05
    ) -> float:
        """Probability that the test of a difference is significant.

        The test is that of :class:`~pi_finetune.results.statistics.Bootstrap`: two-sided, of the
        sum of a normal variable (utterances) and a Student one with ``seeds - 1`` degrees of
        freedom, whose scale is the spread that the seeds happen to have.

        Arguments
        ---------
        seeds, utterances : int
            Of the experiment that is planned.
        difference : float
            The true one.
        alpha : float
            Level. Default: 0.05.

        Returns
        -------
        float
        """
        error, limits = self._limits(seeds, utterances, alpha / 2)
        above, below = (stats.norm.sf((limits - d) / error) for d in (difference, -difference))
        return float(_WEIGHTS @ (above + below))

    def power_of_equivalence(
        self,
        seeds: int,
        utterances: int,
        margin: float,
        difference: float = 0.0,
        alpha: float = 0.05,
    ) -> float:
        """Probability that two one-sided tests put the difference within +-``margin``.

        Arguments
        ---------
        seeds, utterances, alpha
            As of :meth:`power_of_difference`.
        margin : float
            Above 0.
        difference : float
            The true one. Default: 0.

        Returns
        -------
        float
        """
        error, limits = self._limits(seeds, utterances, alpha)
        upper, lower = (
            (margin - limits - difference) / error,
            (limits - margin - difference) / error,
        )
        return float(_WEIGHTS @ np.maximum(0, stats.norm.cdf(upper) - stats.norm.cdf(lower)))

    def _limits(self, seeds, utterances, tail):
        """The estimate's standard error, and beyond what a test's tail has this probability: an
        array over the quantiles of the spread over seeds."""
        student, normal, seed = self._parts(seeds, utterances)
        # An estimate of no spread at all is still no division by zero.
        error = max(float(np.hypot(normal, seed)), np.finfo(float).tiny)
        if seeds == 1:
            return error, np.full(len(_NODES), normal * stats.norm.isf(tail))
        spread = student * np.sqrt(stats.chi2.ppf(_NODES, seeds - 1) / (seeds - 1))
        angles, limits = _behrens_fisher(seeds - 1, tail)
        return error, np.hypot(normal, spread) * np.interp(
            np.arctan2(spread, normal), angles, limits
        )


@functools.cache
def _behrens_fisher(freedom, tail):
    """Angles a [A], and quantiles [A] of cos(a) Z + sin(a) T, Z normal and T Student's."""
    angles = np.linspace(0, np.pi / 2, 61)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    z, t = stats.norm.ppf(_NODES), stats.t.ppf(_NODES, freedom)
    low, high = np.zeros(len(angles)), np.full(len(angles), 2 * stats.t.isf(tail, freedom))
    for _ in range(40):
        middle = (low + high) / 2
        # The sum runs over the narrower of the two; the other's tail is a smooth function.
        with np.errstate(divide="ignore"):
            over_z = stats.t.sf((middle[:, None] - cosine * z) / sine, freedom) @ _WEIGHTS
            over_t = stats.norm.sf((middle[:, None] - sine * t) / cosine) @ _WEIGHTS
        beyond = np.where(sine[:, 0] > cosine[:, 0], over_z, over_t) > tail
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return angles, (low + high) / 2


def variance_components(differences: np.ndarray, weights: np.ndarray) -> VarianceComponents:
    """Estimate the components of a paired difference by analysis of variance.

    A score that is a ratio of sums (WER, likelihood per token) is made linear about the whole
    difference R: an utterance counts (difference - R weight) / mean weight (Cochran, Sampling
    Techniques, 1977, section 6.3). A negative estimate of a variance is 0.

    Arguments
    ---------
    differences : np.ndarray
        Numerators of one system less those of the other [S, N], with one seed in a row.
    weights : np.ndarray
        Denominators [N].

    Returns
    -------
    VarianceComponents
        In the score's unit.

    Raises
    ------
    ValueError
        There are fewer than two utterances, or the shapes do not fit.

    Example
    -------
    >>> found = variance_components([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], [1, 1, 1])
    >>> round(found.seed, 3), found.utterance, found.both
    (0.707, 1.0, 0.0)
    """
    differences, weights = np.asarray(differences, float), np.asarray(weights, float)
    if differences.ndim != 2 or weights.shape != differences.shape[1:] or len(weights) < 2:
        raise ValueError("differences must be [S, N] and weights [N], with at least two utterances")
    ratio = differences.mean(0).sum() / weights.sum()
    effects = (differences - ratio * weights) / weights.mean()
    seeds, utterances = effects.shape
    if seeds == 1:
        return VarianceComponents(np.nan, float(effects.std(ddof=1)), np.nan)
    rows, columns = effects.mean(1), effects.mean(0)
    rest = effects - rows[:, None] - columns + effects.mean()
    both = (rest**2).sum() / ((seeds - 1) * (utterances - 1))
    seed = rows.var(ddof=1) - both / utterances
    utterance = columns.var(ddof=1) - both / seeds
    return VarianceComponents(*(float(np.sqrt(max(0.0, v))) for v in (seed, utterance, both)))


@dataclass(frozen=True)
class Pilot:
    """Two systems' scores in one metric, and what can be planned from them.

    ``unit`` is what a test draws, and what is counted as an utterance here: ``recording`` or
    ``speaker``. ``level`` is the baseline's score, ``difference`` the pilot's own; ``margin`` the
    metric's, in its unit, or None.
    """

    metric: Metric
    unit: str
    seeds: int
    utterances: int
    level: float
    difference: float
    margin: float | None
    components: VarianceComponents

    def utterances_for(
        self,
        power: float,
        seeds: int,
        difference: float = 0.0,
        margin: float | None = None,
        alpha: float = 0.05,
    ) -> int | None:
        """The fewest utterances that decide, with that many seeds.

        Arguments
        ---------
        power : float
            Wanted probability of the decision, above 0 and below 1.
        seeds : int
            Of either system.
        difference : float
            The true one. Default: 0.
        margin : float, optional
            Plan for the equivalence tests with this margin. Default: for the test of a difference.
        alpha : float
            Level of the tests. Default: 0.05.

        Returns
        -------
        int or None
            At least ``FEW_RECORDINGS``, under which no comparison is to be relied on. None: no
            number does, since seeds alone vary too much.
        """

        def enough(utterances):
            plan = self.components
            if margin is None:
                return plan.power_of_difference(seeds, utterances, difference, alpha) >= power
            return plan.power_of_equivalence(seeds, utterances, margin, difference, alpha) >= power

        if not enough(MOST_UTTERANCES):
            return None
        low, high = FEW_RECORDINGS - 1, MOST_UTTERANCES  # low is too few, or under the floor
        while high - low > 1:
            middle = round(np.sqrt(low * high)) if high > 2 * low else (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def load_pilots(
    system: str | Path,
    baseline: str | Path,
    test_set: str | None = None,
    recognizer: str | None = None,
    notes: list[str] | None = None,
) -> list[Pilot]:
    """Read a pilot's scores, in every metric that both systems have.

    Arguments
    ---------
    system, baseline : str or Path
        A run folder STRATEGY/SEED or a folder above runs of one strategy. The seeds that both have
        are paired; a system that is not trained (``noisy``, ``pretrained``) stands for all.
    test_set, recognizer : str, optional
        As of :func:`~pi_finetune.results.comparison.compare_runs`.
    notes : list of str, optional
        Receives what a reader should know.

    Returns
    -------
    list of Pilot

    Raises
    ------
    UserError
        A folder holds several strategies or no scores, the systems share no seed, or what
        :func:`~pi_finetune.results.runs.common_utterances` refuses.
    """
    notes = [] if notes is None else notes
    sides, sets = [], set()
    for path in (system, baseline):
        runs, found = load_runs([path], test_set, notes)
        runs = [run for run in runs if run.scores]
        if len({run.strategy for run in runs}) != 1:
            names = ", ".join(sorted({run.strategy for run in runs})) or "no utterance"
            raise UserError(
                f"{path}: has scores of {names}. Name one system's folder, e.g. results/mse."
            )
        # Two folders may hold one strategy, trained in two ways.
        name = str(Path(runs[0].folder).resolve().parent)
        sides.append((name, runs, runs[0].strategy in UNTRAINED))
        sets.add(found)
    if len(sets) > 1:
        raise UserError(
            f"{system} and {baseline} have scores of {' and '.join(sorted(sets))}: choose with "
            "--set."
        )
    (one, *_), (other, *_) = sides
    if one == other:
        raise UserError(f"{system} and {baseline} are one system. Name two.")
    trained = [{run.seed for run in runs} for _, runs, untrained in sides if not untrained]
    shared = set.intersection(*trained) if trained else {0}
    if not shared:
        raise UserError(
            f"{system} and {baseline} share no seed. Train both with the same seeds: equal seeds "
            "mean equal data, so that differences are paired."
        )
    every = []
    for name, runs, untrained in sides:
        by_seed = dict.fromkeys(shared, runs[0]) if untrained else {r.seed: r for r in runs}
        every += [replace(by_seed[s], strategy=name, seed=s) for s in sorted(shared)]
    ids = common_utterances(every, notes=notes)
    units, unit = resampling_units(every, ids, notes)
    pilots = []
    for metric in metrics_of(every, recognizer):
        scores = metric_scores(every, ids, metric, notes, units)
        seeds = [seed for seed in scores.seeds(one) if seed in scores.seeds(other)]
        if not seeds:
            continue
        (first, weights), (second, _) = map(scores.resampling_units, (one, other))
        rows = [[scores.seeds(name).index(seed) for seed in seeds] for name in (one, other)]
        differences = first[rows[0]] - second[rows[1]]
        if len(weights) < 2:
            raise UserError(f"{system}: one {unit} is no pilot. Evaluate on more.")
        level = float(second[rows[1]].mean(0).sum() / weights.sum())
        pilots.append(
            Pilot(
                metric=metric,
                unit=unit,
                seeds=len(seeds),
                utterances=len(weights),
                level=level,
                difference=float(differences.mean(0).sum() / weights.sum()),
                margin=metric.margin_of(level) or None,
                components=variance_components(differences, weights),
            )
        )
    return pilots
