"""The power analysis against simulated experiments of known truth, and against compare's tests."""

import json
import re
import textwrap

import numpy as np
import pytest
from scipy import stats

from pi_finetune.__main__ import main as command_line
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT
from pi_finetune.recipes.power import main, power
from pi_finetune.results.power import (
    Pilot,
    VarianceComponents,
    _behrens_fisher,
    load_pilots,
    variance_components,
)
from pi_finetune.results.statistics import Bootstrap


def experiment(rng, seeds, utterances, parts, difference=0.0):
    """Paired differences [S, N] with these standard deviations."""
    return (
        difference
        + parts.seed * rng.normal(size=(seeds, 1))
        + parts.utterance * rng.normal(size=(1, utterances))
        + parts.both * rng.normal(size=(seeds, utterances))
    )


def pilot(parts):
    return Pilot(None, "recording", 3, 80, 1.0, 0.0, None, parts)


def test_the_components_are_those_of_the_simulation():
    rng, truth = np.random.default_rng(0), VarianceComponents(0.5, 2.0, 1.0)
    found = [variance_components(experiment(rng, 6, 60, truth), np.ones(60)) for _ in range(400)]
    for name in ("seed", "utterance", "both"):
        variances = [getattr(one, name) ** 2 for one in found]
        assert np.mean(variances) == pytest.approx(getattr(truth, name) ** 2, rel=0.06)


def test_the_standard_error_is_that_of_repeated_experiments():
    rng, parts = np.random.default_rng(1), VarianceComponents(0.1, 1.0, 2.0)
    for seeds, utterances in ((2, 50), (5, 200)):
        means = [experiment(rng, seeds, utterances, parts).mean() for _ in range(2000)]
        expected = parts.standard_error(seeds, utterances)
        assert np.std(means) == pytest.approx(expected, rel=0.06)
        assert expected**2 == pytest.approx(0.01 / seeds + 1 / utterances + 4 / seeds / utterances)


def test_a_ratio_of_sums_is_made_linear():
    """WER with utterances of 3 to 40 words: the spread over test sets is what one of them says."""
    rng = np.random.default_rng(2)

    def test_set(seeds=3, utterances=150):
        words = rng.integers(3, 41, utterances)
        hard = rng.beta(2, 8, utterances)
        rates = [np.clip(hard + 0.05 * rng.normal(), 0, 1) for _ in range(2 * seeds)]
        errors = np.array([rng.binomial(words, rate) for rate in rates])
        return 100.0 * (errors[:seeds] - errors[seeds:]), words

    ratios, predicted = [], []
    for _ in range(400):
        differences, words = test_set()
        ratios.append(differences.mean(0).sum() / words.sum())
        predicted.append(variance_components(differences, words).standard_error(3, 150) ** 2)
    assert np.sqrt(np.mean(predicted)) == pytest.approx(np.std(ratios), rel=0.1)
    differences, words = test_set()
    longer = variance_components(np.repeat(differences, 3, 1) * 2, np.repeat(words, 3) * 2)
    once = variance_components(differences, words)
    assert longer.seed >= once.seed  # the ratio's unit stays: twice the words, twice the errors
    assert longer.utterance == pytest.approx(once.utterance, rel=0.2)


@pytest.mark.parametrize(
    ("seeds", "parts"), [(2, (0.0, 1.0, 1.0)), (3, (0.05, 1.0, 1.0)), (5, (0.3, 1.0, 0.3))]
)
def test_compare_decides_as_often_as_predicted(seeds, parts):
    rng, parts = np.random.default_rng(seeds), VarianceComponents(*parts)
    bootstrap, trials, utterances = Bootstrap(replicates=1999), 200, 100
    difference = (12, 4, 3.5)[(2, 3, 5).index(seeds)] * parts.standard_error(seeds, utterances)
    found = same = 0
    for _ in range(trials):
        here = experiment(rng, seeds, utterances, parts, difference)
        test = bootstrap.difference(
            here, 0 * here, np.ones(utterances), True, margin=2 * difference
        )
        found += test.p_value < 0.05
        same += test.p_equivalence < 0.05
    predicted = parts.power_of_difference(seeds, utterances, difference)
    assert 0.5 < predicted < 0.95
    assert found / trials == pytest.approx(predicted, abs=0.08)
    predicted = parts.power_of_equivalence(seeds, utterances, 2 * difference, difference)
    assert same / trials == pytest.approx(predicted, abs=0.08)


def test_the_answer_has_the_power_that_was_asked_for():
    several, one = VarianceComponents(0.05, 1.0, 2.0), VarianceComponents(np.nan, 2.0, np.nan)
    for seeds, parts in ((1, one), (5, several), (20, several)):
        plan = pilot(parts)
        needed = plan.utterances_for(0.8, seeds, difference=0.3)
        assert parts.power_of_difference(seeds, needed, 0.3) >= 0.8
        assert parts.power_of_difference(seeds, needed - 1, 0.3) < 0.8
        needed = plan.utterances_for(0.8, seeds, margin=0.3)
        assert parts.power_of_equivalence(seeds, needed, 0.3) >= 0.8
        assert parts.power_of_equivalence(seeds, needed - 1, 0.3) < 0.8
    assert plan.utterances_for(0.8, 20, difference=9.0) == 20  # compare warns under that


def test_utterances_cannot_make_up_for_seeds():
    assert pilot(VarianceComponents(1.0, 1.0, 1.0)).utterances_for(0.8, 3, difference=1.0) is None
    assert pilot(VarianceComponents(1.0, 1.0, 1.0)).utterances_for(0.8, 30, difference=0.6) > 20


def test_limits_against_closed_forms():
    # No spread over seeds: a z test. None over utterances: a t test, whose power is noncentral.
    z = VarianceComponents(0.0, 1.0, 0.0).power_of_difference(5, 100, 0.25)
    shift = stats.norm.ppf(0.975)
    assert z == pytest.approx(stats.norm.sf(shift - 2.5) + stats.norm.cdf(-shift - 2.5), abs=1e-3)
    t = VarianceComponents(1.0, 0.0, 0.0).power_of_difference(5, 100, 2.0)
    limit, center = stats.t.ppf(0.975, 4), 2.0 * np.sqrt(5)
    expected = stats.nct.sf(limit, 4, center) + stats.nct.cdf(-limit, 4, center)
    assert t == pytest.approx(expected, abs=2e-3)
    # Between them, by simulation.
    angles, limits = _behrens_fisher(2, 0.025)
    rng = np.random.default_rng(0)
    drawn = np.cos(angles[30]) * rng.normal(size=400_000)
    drawn += np.sin(angles[30]) * rng.standard_t(2, 400_000)
    assert (drawn > limits[30]).mean() == pytest.approx(0.025, abs=0.001)


def entry(errors, words, nll):
    counts = {"hits": words - errors, "substitutions": errors, "deletions": 0, "insertions": 0}
    return {"hypothesis": "", "reference": "", **counts, "nll": nll, "tokens": 2 * words}


def write_pilot(folder, seeds=(1, 2, 3), utterances=40, strategies=("mse", "soft_dtw")):
    rng = np.random.default_rng(0)
    words = rng.integers(5, 30, utterances)
    for number, name in enumerate(strategies):
        for seed in [0] if name == "noisy" else seeds:
            path = folder / name / str(seed) / "scores" / "test.jsonl"
            path.parent.mkdir(parents=True)
            lines = [
                {
                    "id": f"u{i}",
                    "asr": {
                        "ctc": entry(
                            int(rng.integers(0, 3)), int(n), n * 1.5 + number + rng.random()
                        )
                    },
                }
                for i, n in enumerate(words)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_pilot_is_read_as_compare_reads_it(tmp_path, capsys):
    write_pilot(tmp_path)
    found = power(tmp_path / "soft_dtw", tmp_path / "mse")
    assert [p.metric.name for p in found] == ["wer", "nll"]
    assert all((p.seeds, p.utterances, p.unit) == (3, 40, "recording") for p in found)
    assert found[1].margin == pytest.approx(0.02 * found[1].level)
    text = capsys.readouterr().out
    assert "standard deviations: by seed" in text and "0.5 points" in text
    # The difference and its standard error are those of compare, but for its resampling.
    nll = found[1]
    assert nll.difference > 0
    swapped = load_pilots(tmp_path / "mse", tmp_path / "soft_dtw")[1]
    assert swapped.difference == pytest.approx(-nll.difference)
    assert swapped.components == nll.components
    main([str(tmp_path / "soft_dtw"), str(tmp_path / "mse"), "--metric", "nll", "--seeds", "4"])
    assert "| 4 " in capsys.readouterr().out


def test_of_one_seed_nothing_is_said_of_others(tmp_path, capsys):
    write_pilot(tmp_path, seeds=(1,))
    (found,) = power(tmp_path / "soft_dtw", tmp_path / "mse", metric="nll")
    assert found.seeds == 1 and np.isnan([found.components.seed, found.components.both]).all()
    text = capsys.readouterr().out
    assert "how much training varies cannot be known" in text
    assert "| 1 " in text and "| 2 " not in text


def test_a_system_that_is_not_trained_stands_for_every_seed(tmp_path):
    write_pilot(tmp_path, strategies=("mse", "noisy"))
    found = load_pilots(tmp_path / "mse", tmp_path / "noisy")
    assert [p.seeds for p in found] == [3, 3]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ({}, {"metric": "pesq"}, "--metric pesq: both systems have scores in wer, nll"),
        ({}, {"difference": 0}, "--difference must not be 0"),
        ({}, {"margin": -1}, "--margin must be above 0"),
        ({}, {"power": 1}, "--power must be between 0 and 1"),
        ({}, {"seeds": [1]}, "--seeds must be at least 2"),
        ({}, {"sead": 1}, "no option 'sead'"),
        ({"utterances": 1}, {}, "one recording is no pilot"),
        ({"strategies": ("mse", "mse2")}, {}, "soft_dtw: no such folder"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, make, options, message):
    write_pilot(tmp_path, **make)
    with pytest.raises(UserError, match=message):
        power(tmp_path / "soft_dtw", tmp_path / "mse", **options)


def test_systems_that_cannot_be_paired(tmp_path):
    write_pilot(tmp_path)
    with pytest.raises(UserError, match=r"has scores of mse, soft_dtw\. Name one system"):
        power(tmp_path, tmp_path / "mse")
    with pytest.raises(UserError, match="are one system"):
        power(tmp_path / "mse", tmp_path / "mse")
    with pytest.raises(UserError, match="share no seed"):
        power(tmp_path / "mse" / "1", tmp_path / "soft_dtw" / "2")


def test_the_guide_shows_what_is_printed(capsys, monkeypatch):
    guide = (PROJECT_ROOT / "docs" / "howto" / "results.md").read_text()
    monkeypatch.chdir(PROJECT_ROOT)
    words = re.search(r"^    \$ pi-finetune (power .*)$", guide, re.M)[1]
    assert not command_line(words.split())
    shown = textwrap.indent(capsys.readouterr().out, "    ", lambda line: line.strip())
    assert f"{words}\n{shown.rstrip()}\n" in guide
