"""Statistics against hand-computed values, SciPy, and simulated data of known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from pi_finetune.results import statistics
from pi_finetune.results.statistics import (
    Bootstrap,
    area_under_curve,
    bootstrap_ratio,
    holm,
    ratio_fields,
    seed_interval,
    updates_to_reach,
)

FEW = Bootstrap(replicates=999)


def test_level_is_the_corpus_ratio_and_not_the_mean_of_ratios():
    errors = np.array([[100.0, 0.0, 300.0], [0.0, 0.0, 300.0]])
    words = np.array([1.0, 9.0, 10.0])
    level = FEW.level(errors, words)
    assert level.estimate == pytest.approx((400 / 20 + 300 / 20) / 2)
    assert level.low <= level.estimate <= level.high


def test_one_seed_interval_matches_scipys_own_bootstrap():
    scores = np.random.default_rng(0).normal(3, 1, 60)
    ours = Bootstrap(replicates=4000).level(scores[None], np.ones(60))
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


@pytest.mark.parametrize("seeds", ["student", "resample"])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 3), (2, 3)])
def test_the_draws_are_those_of_scipy(monkeypatch, seeds, sizes):
    rng = np.random.default_rng(5)
    values, baseline = (rng.normal(size=(size, 40)) for size in sizes)
    weights = rng.integers(1, 9, 40).astype(float)
    how = Bootstrap(700, seeds=seeds, random_seed=3)
    monkeypatch.setattr(statistics, "_BATCH_ELEMENTS", 40 * 300)  # in three pieces
    paired = sizes[0] == sizes[1]
    ours = how.difference(values, baseline, weights, True)
    parts = [(1, values - baseline)] if paired else [(1, values), (-1, baseline)]
    drawn = [part for _, part in parts if len(part) > 1 and seeds == "resample"]

    def statistic(units, *chosen, axis=-1):
        chosen, total = list(chosen), 0
        for sign, part in parts:
            rows = chosen.pop(0) if drawn else np.arange(len(part))[None]
            means = part[rows].mean(1)  # [R, U]
            means = np.broadcast_to(means, units.shape)
            total = total + sign * np.take_along_axis(means, units, -1).sum(axis)
        return total / weights[units].sum(axis)

    rng = np.random.default_rng(3)
    theirs = stats.bootstrap(
        (np.arange(40), *(np.arange(len(part)) for part in drawn)),
        statistic,
        n_resamples=700,
        batch=300,
        vectorized=True,
        rng=rng,
        method="percentile",
    ).bootstrap_distribution
    for _, part in parts:
        if seeds == "student" and len(part) > 1:
            spread = (part.sum(1) / weights.sum()).std(ddof=1) / len(part) ** 0.5
            theirs = theirs + spread * rng.standard_t(len(part) - 1, 700)
    low, high = np.quantile(theirs, [0.025, 0.975])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    assert ours.p_improvement == np.mean(theirs > 0)


def test_one_draw_serves_all_columns_of_a_table(monkeypatch):
    rng = np.random.default_rng(0)
    how = Bootstrap(500, random_seed=11)
    statistics._draws.cache_clear()
    for _ in range(3):
        values, baseline = rng.normal(size=(2, 3, 30))
        how.level(values, np.ones(30))
        how.difference(values, baseline, rng.integers(1, 5, 30), True)
    assert statistics._draws.cache_info().misses == 1
    counts = statistics._draws(30, (), 500, 11)[0]
    assert counts.shape == (500, 30) and (counts.sum(1) == 30).all()
    # a replicate's numerator and denominator are of the same utterances
    values = rng.integers(1, 9, (1, 30)).astype(float)
    same = how.level(values, values[0])
    assert (same.low, same.high) == pytest.approx((1, 1), abs=1e-12)


def test_pairing_by_utterance_removes_what_utterances_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 80)
    a, b = difficulty + rng.normal(-1, 0.5, (1, 80)), difficulty + rng.normal(0, 0.5, (1, 80))
    difference = FEW.difference(a, b, np.ones(80), higher_is_better=False)
    assert difference.estimate == pytest.approx(a.mean() - b.mean())
    assert difference.high - difference.low < 0.5 < FEW.level(a, np.ones(80)).high
    assert difference.high < 0 and difference.p_improvement == 1
    assert difference.p_value == pytest.approx(2 / 1000)
    assert FEW.difference(a, b, np.ones(80), higher_is_better=True).p_improvement == 0


def test_identical_systems_are_undecided():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    for seeds in ("student", "resample"):
        d = Bootstrap(999, seeds=seeds).difference(scores, scores, np.ones(20), True)
        assert (d.estimate, d.low, d.high) == (0, 0, 0)
        assert d.p_improvement == 0.5 and d.p_value == 1


def test_equal_seeds_give_equal_results_and_others_differ():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    assert FEW.level(scores, np.ones(20)) == FEW.level(scores, np.ones(20))
    other = Bootstrap(replicates=999, random_seed=1)
    assert other.level(scores, np.ones(20)) != FEW.level(scores, np.ones(20))


def test_seeds_are_paired_where_they_correspond():
    rng = np.random.default_rng(0)
    by_seed = rng.normal(0, 5, (4, 1))  # what a seed does to every strategy alike
    a = by_seed + rng.normal(1, 0.1, (4, 50))
    b = by_seed + rng.normal(0, 0.1, (4, 50))
    paired = FEW.difference(a, b, np.ones(50), True)
    unpaired = FEW.difference(a, b, np.ones(50), True, paired_seeds=False)
    assert paired.paired_seeds and not unpaired.paired_seeds
    assert paired.estimate == pytest.approx(unpaired.estimate)
    assert paired.high - paired.low < 0.5 < 5 < unpaired.high - unpaired.low
    one = FEW.difference(a, b[:1], np.ones(50), True)
    assert not one.paired_seeds and one.estimate == pytest.approx(a.mean() - b[0].mean())


def test_resampled_seeds_are_drawn_with_replacement_and_jointly_with_no_utterance_noise():
    # Two seeds that score 0 and 1 on every utterance: replicates can only be 0, 1/2 or 1.
    scores = np.repeat([[0.0], [1.0]], 10, axis=1)
    draw = Bootstrap(4000, seeds="resample")._draw([(1, scores)], np.ones(10))
    values, counts = np.unique(np.round(draw, 9), return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_student_seed_effect_is_the_t_interval_where_utterances_do_not_vary():
    scores = np.repeat([[1.0], [2.0], [4.0]], 10, axis=1)
    ours = Bootstrap(replicates=60_000).level(scores, np.ones(10))
    exact = seed_interval([1, 2, 4])
    assert ours.low == pytest.approx(exact.low, rel=0.06)
    assert ours.high == pytest.approx(exact.high, rel=0.06)


@pytest.mark.parametrize(
    "seeds_sd, utterance_sd, lowest, highest",
    [(0.0, 1.0, 0.90, 1.0), (0.3, 1.0, 0.90, 1.0), (1.0, 0.3, 0.90, 0.99)],
)
def test_interval_covers_the_truth_as_often_as_it_says(seeds_sd, utterance_sd, lowest, highest):
    rng = np.random.default_rng(7)
    bootstrap, trials, covered = Bootstrap(replicates=399), 300, 0
    for _ in range(trials):
        d = (
            2.0
            + seeds_sd * rng.normal(size=(3, 1))
            + utterance_sd * rng.normal(size=(1, 60))
            + rng.normal(size=(3, 60))
        )
        found = bootstrap.difference(d, np.zeros_like(d), np.ones(60), True)
        covered += found.low <= 2.0 <= found.high
    assert lowest <= covered / trials <= highest


def test_resampling_three_seeds_covers_too_little_which_is_why_it_is_not_the_default():
    rng = np.random.default_rng(7)
    bootstrap, covered = Bootstrap(replicates=399, seeds="resample"), 0
    for _ in range(200):
        d = rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(1, 60)) + rng.normal(size=(3, 60))
        level = bootstrap.level(d, np.ones(60))
        covered += level.low <= 0 <= level.high
    assert 0.6 < covered / 200 < 0.88


def test_wer_interval_covers_the_corpus_wer_of_unequal_utterances():
    rng = np.random.default_rng(3)
    bootstrap, covered = Bootstrap(replicates=399), 0
    for _ in range(300):
        words = rng.integers(3, 30, 60)
        rate = rng.beta(2, 8, 60)  # WER of 20 % on average, independent of length
        errors = 100.0 * rng.binomial(words, rate)[None]
        level = bootstrap.level(errors, words)
        covered += level.low <= 20 <= level.high
    assert 0.90 <= covered / 300 <= 0.98


def test_p_value_rejects_a_true_null_at_its_rate():
    rng = np.random.default_rng(5)
    bootstrap, rejected = Bootstrap(replicates=399), 0
    for _ in range(300):
        d = 0.3 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 60))
        rejected += bootstrap.difference(d, 0 * d, np.ones(60), True).p_value < 0.05
    assert rejected / 300 < 0.08


def test_equivalence_is_found_where_the_interval_of_twice_alpha_lies_within_the_margin():
    rng = np.random.default_rng(0)
    baseline = rng.normal(10, 3, (1, 400))
    values = baseline + rng.normal(0.1, 1, (1, 400))
    ones = np.ones(400)
    wide = Bootstrap(replicates=4999, confidence=0.9)  # two one-sided tests at 5 %
    found = wide.difference(values, baseline, ones, True)
    edge = max(abs(found.low), abs(found.high))
    for margin, within in ((edge * 0.98, False), (edge * 1.02, True)):
        d = wide.difference(values, baseline, ones, True, margin=margin)
        assert (d.p_equivalence < 0.05) == within and d.margin == margin
    assert found.p_equivalence is None
    with pytest.raises(ValueError, match="margin must be above 0"):
        wide.difference(values, baseline, ones, True, margin=0)


def test_equivalence_is_claimed_falsely_at_most_as_often_as_it_says():
    """With a true difference right at the margin, the tests err in 5 % of sets."""
    rng = np.random.default_rng(1)
    few = Bootstrap(replicates=199)
    wrong = 0
    for _ in range(400):
        baseline = rng.normal(0, 3, (1, 60))
        values = baseline + rng.normal(0.5, 1, (1, 60))
        d = few.difference(values, baseline, np.ones(60), True, margin=0.5)
        wrong += d.p_equivalence < 0.05
    assert 0.01 < wrong / 400 < 0.08


def test_a_single_utterance_has_no_interval():
    level = FEW.level([[50.0]], [10.0])
    assert level.estimate == 5 and math.isnan(level.low) and math.isnan(level.high)
    d = FEW.difference([[50.0]], [[40.0]], [10.0], False)
    assert d.estimate == 1 and math.isnan(d.p_value) and math.isnan(d.p_improvement)


@pytest.mark.parametrize(
    "values, weights, message",
    [
        ([1.0, 2.0], [1.0, 1.0], "values must be"),
        ([[1.0, 2.0]], [1.0], "values must be"),
        ([[1.0, math.nan]], [1.0, 1.0], "finite"),
        ([[1.0, 2.0]], [0.0, 0.0], "weights"),
        (np.zeros((0, 2)), [1.0, 1.0], "empty"),
    ],
)
def test_bad_input_names_the_argument(values, weights, message):
    with pytest.raises(ValueError, match=message):
        FEW.level(values, weights)


def test_bad_options_name_the_argument():
    wrong = ("replicates", 0), ("confidence", 1), ("confidence", 0), ("seeds", "nested")
    for options in ({key: value} for key, value in wrong):
        with pytest.raises(ValueError, match=next(iter(options))):
            Bootstrap(**options)
    assert Bootstrap(replicates=1, confidence=0.999).replicates == 1
    with pytest.raises(ValueError, match="paired seeds"):
        FEW.difference(np.ones((2, 3)), np.ones((1, 3)), np.ones(3), True, paired_seeds=True)


def test_holm_against_values_computed_by_hand():
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1 = .04 .06 .06 .04, and never falling.
    assert holm([0.01, 0.04, 0.03, 0.02]).tolist() == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == holm([0.8, 0.9]).tolist() == [1.0, 1.0]
    assert holm([0.0, 1.0]).tolist() == [0.0, 1.0]
    assert holm([0.02]).tolist() == [0.02]
    assert holm([]).tolist() == []
    with_gap = holm([0.01, math.nan, 0.02])
    assert with_gap[[0, 2]].tolist() == pytest.approx([0.02, 0.02]) and math.isnan(with_gap[1])
    with pytest.raises(ValueError, match="p_values"):
        holm([1.5])


def test_seed_interval_against_scipys_t_interval():
    values = [10.0, 12.0, 11.0, 15.0]
    ours = seed_interval(values, 0.9)
    theirs = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(theirs) and ours.estimate == 12
    one = seed_interval([3.0])
    assert one.estimate == 3 and math.isnan(one.low) and math.isnan(one.high)
    two = seed_interval([3.0, 4.0])
    assert (two.low, two.high) == pytest.approx(stats.t.interval(0.95, 1, 3.5, 0.5))
    for nothing in ([], 3.0, [[3.0]]):
        with pytest.raises(ValueError, match="values must be a sequence"):
            seed_interval(nothing)


def test_updates_to_reach_in_both_directions():
    updates, wer = [100, 200, 300], [20.0, 15.0, 16.0]
    assert updates_to_reach(updates, wer, 15.0, higher_is_better=False) == 200
    assert updates_to_reach(updates, wer, 14.9, higher_is_better=False) == math.inf
    assert updates_to_reach(updates, wer, 16.0, higher_is_better=True) == 100
    assert updates_to_reach(updates, [15.0, 16.0, 17.0], 16.0, higher_is_better=True) == 200
    assert updates_to_reach(updates, [None, 15.0, None], 15.0, higher_is_better=False) == 200


def test_area_is_the_mean_height_over_the_span():
    assert area_under_curve([0, 100], [0, 10], 0, 100) == pytest.approx(5)
    assert area_under_curve([0, 100], [0, 10], 50, 100) == pytest.approx(7.5)
    assert area_under_curve([0, 50, 100], [4, 0, 4], 25, 75) == pytest.approx(1)
    with pytest.raises(ValueError, match="span"):
        area_under_curve([0, 100], [0, 10], 0, 200)
    with pytest.raises(ValueError, match=r"the span 50\.\.50 must lie in 0\.0\.\.100\.0"):
        area_under_curve([0, 70, 100], [0, 1, 10], 50, 50)


def test_a_ratio_of_means_is_resampled_in_pairs():
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 9, 40)
    same = bootstrap_ratio(3 * bottom, bottom)  # rows resampled apart would not keep the ratio
    assert (same.estimate, same.low, same.high) == pytest.approx((3, 3, 3))
    top = 3 * bottom + rng.normal(0, 1, 40)
    found = bootstrap_ratio(top, bottom, seed=1, replicates=4000)
    assert found.estimate == pytest.approx(top.sum() / bottom.sum())
    theirs = stats.bootstrap(
        (top, bottom), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True,
        n_resamples=4000, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(theirs, abs=0.005)
    narrow = bootstrap_ratio(top, bottom, seed=1, replicates=4000, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    assert bootstrap_ratio(top, bottom, seed=1, replicates=4000) == found
    assert bootstrap_ratio(top, bottom, seed=2, replicates=4000) != found


def test_a_ratio_that_has_none_is_null_in_json():
    found = bootstrap_ratio([1.0, 2.0], [1.0, -1.0])
    assert all(map(math.isnan, (found.estimate, found.low, found.high)))
    one = bootstrap_ratio([1.0], [4.0])
    assert one.estimate == 0.25 and math.isnan(one.low) and math.isnan(one.high)
    assert ratio_fields("share", one) == {"share": 0.25, "low": None, "high": None}
    two = bootstrap_ratio([1.0, 2.0], [1.0, 2.0])
    assert ratio_fields("share", two) == {"share": 1.0, "low": 1.0, "high": 1.0}
