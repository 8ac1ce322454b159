"""Position diagnostics on representations whose answers are known, and the recipe as it is run."""

import json
import math
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from running import recipe

from pi_finetune import diagnostics
from pi_finetune.enhancers import MaskEnhancer, save_enhancer
from pi_finetune.errors import UserError
from pi_finetune.lengths import content_frames
from pi_finetune.objectives import (
    MSEDistance,
    RepresentationObjective,
    SoftDTWDistance,
    WeightedSum,
)
from pi_finetune.perturbations import SpeedPerturbation, ZeroPadding
from pi_finetune.recipes import probe_position
from pi_finetune.report import position as report
from pi_finetune.results import statistics
from pi_finetune.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
HOP, FRAMES, UTTERANCES = 160, 90, 24
SECOND = 16000 // HOP  # frames


class KnownTeacher:
    """Layer 0 is pure content, layer 1 a pure code of position, layer 2 a * position + b * content.

    Content of a frame is its samples, which are white noise of unit variance here; codes too.
    """

    hop, layer_names = HOP, (0, 1, 2)

    def __init__(self, a=1.0, b=1.0):
        generator = torch.Generator().manual_seed(1)
        self.codes = torch.randn(1000, HOP, generator=generator)
        self.a, self.b = a, b

    def hidden_states(self, wavs, layers=(0, 1, 2)):
        content = wavs.data.unfold(1, HOP, HOP)
        code = self.codes[: content.shape[1]].expand_as(content)
        states = [content, code, self.a * code + self.b * content]
        counts = wavs.content_lengths // HOP
        found = [content_frames(states[k], wavs, HOP, counts) for k in layers]
        return torch.stack(found), counts

    def __call__(self, wavs):
        states, frame_lengths = self.hidden_states(wavs, [2])
        return states[0], frame_lengths


@pytest.fixture(scope="module")
def crops():
    wavs = torch.randn(UTTERANCES, FRAMES * HOP, generator=torch.Generator().manual_seed(0))
    return diagnostics.Crops([f"u{i}" for i in range(UTTERANCES)], wavs)


def by(records, **wanted):
    found = [r for r in records if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == 1
    return found[0]


# 1. Shift curve


def test_shift_curve_of_known_representations(crops):
    a, b = 1.0, 2.0
    curve = diagnostics.shift_curve(KnownTeacher(a, b), crops.wavs, shifts=(0, 0.01, 0.3))
    for layer in range(3):
        assert by(curve, layer=layer, shift=0.0)["distance"] == 0.0
    for shift in (0.01, 0.3):
        assert by(curve, layer=0, shift=shift)["ratio"] == 0.0
        # A code's distance to random frames counts the rare equal positions: 1 / (1 - 1/N).
        assert by(curve, layer=1, shift=shift)["ratio"] == pytest.approx(1, abs=0.05)
        mixed = by(curve, layer=2, shift=shift)
        assert mixed["ratio"] == pytest.approx(a**2 / (a**2 + b**2), abs=0.01)
        assert mixed["low"] <= mixed["ratio"] <= mixed["high"]
    assert [r["layer"] for r in curve] == sorted(r["layer"] for r in curve)


def test_unrelated_distance_is_the_mean_over_all_pairs_of_frames():
    reps = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2)) + 2
    expected = [
        np.mean(
            [
                float((reps[i, n] - reps[j, m]).square().mean())
                for j in range(4)
                for n in range(5)
                for m in range(5)
                if j != i
            ]
        )
        for i in range(4)
    ]
    assert diagnostics.unrelated_distance(reps).tolist() == pytest.approx(expected, rel=1e-6)


def test_shift_curve_of_a_real_encoder_starts_at_zero_and_keeps_the_frame_grid(tiny_teacher):
    teacher = Teacher(str(tiny_teacher))
    wavs = torch.randn(5, 8000, generator=torch.Generator().manual_seed(3)) / 10
    curve = diagnostics.shift_curve(teacher, wavs, shifts=(0, 0.5), batch_size=2)
    assert [r["layer"] for r in curve] == ["cnn", "cnn", 0, 0, 1, 1, 2, 2]
    for layer in ("cnn", 0, 1, 2):
        assert by(curve, layer=layer, shift=0.0)["ratio"] == 0.0
    # Up to the first layer that knows the position nothing moves; after it, content meets itself.
    assert by(curve, layer="cnn", shift=0.5)["ratio"] < 1e-10
    for layer in range(3):
        assert 1e-6 < by(curve, layer=layer, shift=0.5)["ratio"] < 0.8


# 2. Similarity


def test_similarity_by_offset_is_the_mean_over_pairs():
    reps = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4)).double()
    unit = reps - reps.mean(dim=(0, 1))
    unit = unit / unit.norm(dim=-1, keepdim=True)
    similarity, counts = diagnostics.similarity_by_offset(reps)
    for d in range(6):
        values = [
            float(unit[i, n] @ unit[j, n + d])
            for i in range(3)
            for j in range(3)
            for n in range(6 - d)
            if i != j
        ]
        assert counts[d] == len(values)
        assert similarity[d] == pytest.approx(np.mean(values), abs=1e-12)


def test_similarity_of_known_representations(crops):
    a, b = 1.5, 1.0
    curve, headline = diagnostics.content_free_similarity(KnownTeacher(a, b), crops.wavs, 0.5)
    assert len(curve) == 3 * FRAMES
    assert by(headline, layer=0)["difference"] == pytest.approx(0, abs=0.01)
    assert by(headline, layer=1)["difference"] == pytest.approx(1, abs=0.02)
    expected = a**2 / (a**2 + b**2)
    assert by(headline, layer=2)["difference"] == pytest.approx(expected, abs=0.02)
    assert by(curve, layer=1, offset=0.0)["similarity"] == pytest.approx(1)


def test_far_offsets_must_be_within_the_crops(crops):
    with pytest.raises(UserError, match="far_seconds: 5 s are not within the crops"):
        diagnostics.content_free_similarity(KnownTeacher(), crops.wavs, 5)


# 3. Probe


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_ridge_finds_the_share_of_variance_that_is_linear(noise):
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), 100)
    x = rng.standard_normal((3000, 10)) * 10.0 ** rng.uniform(-3, 3, 10) + 7
    signal = ((x - x.mean(0)) / x.std(0)) @ rng.standard_normal(10)
    y = signal / signal.std() + noise * rng.standard_normal(3000)
    unrelated = rng.standard_normal(3000)
    r2, _ = diagnostics.ridge_probe(x, np.stack([y, unrelated], axis=1), groups)
    assert r2[0] == pytest.approx(1 / (1 + noise**2), abs=0.03)
    assert -0.05 < r2[1] < 0.02


def test_the_penalty_grows_where_features_are_many_and_useless():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((300, 250))
    r2, penalty = diagnostics.ridge_probe(
        x, rng.standard_normal((300, 1)), np.repeat(range(15), 20)
    )
    assert penalty[0] >= 10 and r2[0] > -0.1


def test_held_out_utterances_are_not_seen():
    # The target is a property of the utterance, and features name it: only leakage could help.
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(20), 40)
    x = np.eye(20)[groups] + 0.01 * rng.standard_normal((800, 20))
    r2, _ = diagnostics.ridge_probe(x, rng.standard_normal(20)[groups][:, None], groups)
    assert r2[0] < 0.1


def test_constant_features_do_no_harm():
    rng = np.random.default_rng(8)
    x = np.concatenate([np.full((600, 3), 0.1), rng.standard_normal((600, 1))], axis=1)
    r2, _ = diagnostics.ridge_probe(x, x[:, 3:], np.repeat(range(20), 30))
    assert r2[0] == pytest.approx(1, abs=1e-4)


def test_probe_of_known_representations(crops):
    records = diagnostics.position_probe(KnownTeacher(), crops.wavs)
    assert by(records, layer=1, target="index")["r2"] == pytest.approx(1, abs=1e-3)
    content = by(records, layer=0, target="index")
    assert abs(content["r2"]) < 0.1 and abs(content["r2_shuffled"]) < 0.1
    for record in records:
        assert abs(record["r2_shuffled"]) < 0.2
        assert record["train_utterances"] + record["held_out_utterances"] == UTTERANCES
    # A code counted from the start knows the end as far as the lengths agree.
    assert 0.2 < by(records, layer=1, target="to_end")["r2"] < 0.95


def test_probe_of_too_few_utterances_says_what_is_needed(crops):
    with pytest.raises(UserError, match="needs 12 utterances, got 5"):
        diagnostics.position_probe(KnownTeacher(), crops.wavs[:5])


# 4. Share


def shares(crops, perturbation=None, distance=None, a=1.0, b=1.0, **options):
    teacher = KnownTeacher(a, b)
    objective = RepresentationObjective(teacher, distance or MSEDistance(), perturbation)
    options = {"offset_seconds": 0.4, **options}
    return diagnostics.objective_share(teacher, {"it": objective}, crops, **options)


@pytest.mark.parametrize("distance", [MSEDistance(), SoftDTWDistance()], ids=["mse", "soft_dtw"])
@pytest.mark.parametrize("branch", ["clean", "enhanced"])
def test_share_is_1_of_pure_position_and_0_of_pure_content(crops, distance, branch):
    teacher = KnownTeacher()
    objective = RepresentationObjective(teacher, distance, perturbed_branch=branch)
    found = diagnostics.objective_share(teacher, {"it": objective}, crops, 0.4, layers=[0, 1])
    assert by(found, layer=0)["share"] == 0.0 == by(found, layer=0)["high"]
    assert by(found, layer=1)["share"] == pytest.approx(1, abs=1e-5)
    assert {record["pairs"] for record in found} == {UTTERANCES // 2}


def test_share_of_a_mixture_under_mse(crops):
    a, b = 1.0, 2.0
    found = by(shares(crops, a=a, b=b), layer=2)
    assert found["share"] == pytest.approx(a**2 / (a**2 + b**2), abs=0.02)
    assert found["unequal"] == pytest.approx(2 * (a**2 + b**2), rel=0.02)
    assert found["equal"] == pytest.approx(2 * b**2, rel=0.02)
    assert found["low"] < found["share"] < found["high"]


def test_share_of_a_mixture_under_zero_padding(crops):
    a, b, most = 1.0, 1.0, 3
    padding = ZeroPadding(most * HOP / 16000, HOP)
    records = [by(shares(crops, padding, a=a, b=b, seed=seed), layer=2) for seed in range(8)]
    # Positions meet with probability 1 / (P + 1); otherwise the right content pays 2 a^2 too.
    moved = most / (most + 1)
    for key, expected in {
        "unequal": 2 * (a**2 + b**2),
        "equal": 2 * b**2 + moved * 2 * a**2,
        "right": moved * 2 * a**2,
    }.items():
        assert np.mean([r[key] for r in records]) == pytest.approx(expected, rel=0.06), key
    expected = (1 - moved) * a**2 / (b**2 + (1 - moved) * a**2)
    assert np.mean([r["share"] for r in records]) == pytest.approx(expected, abs=0.05)


def test_share_of_a_mixture_moved_by_speech(crops):
    a, b = 1.0, 2.0
    found = by(shares(crops, a=a, b=b, moved_by="speech"), layer=2)
    assert found["share"] == pytest.approx(a**2 / (a**2 + b**2), abs=0.03)
    assert by(shares(crops, moved_by="speech"), layer=0)["share"] == 0.0
    for options in ({"moved_by": "noise"}, {"moved_by": "speech", "offset_seconds": 2}):
        with pytest.raises(UserError, match="moved_by: "):
            shares(crops, **options)


def test_share_composes_with_changes_of_speed(crops):
    found = shares(crops, SpeedPerturbation([0.8]), SoftDTWDistance(), layers=0)
    assert found[0]["share"] == pytest.approx(0, abs=1e-6)
    assert found[0]["right"] > 0


def test_objectives_see_the_same_pairs_whatever_the_batch(crops):
    teacher = KnownTeacher(1.0, 1.0)
    objective = RepresentationObjective(teacher, MSEDistance(), ZeroPadding(0.1, HOP))
    options = {"layers": [2], "seed": 3}
    one, two = (
        diagnostics.objective_share(
            teacher, {"a": objective, "b": objective}, crops, batch_size=size, **options
        )
        for size in (2, 7)
    )
    for record in (*one, *two):
        assert record["share"] == pytest.approx(one[0]["share"], rel=1e-6)
    other = diagnostics.objective_share(teacher, {"a": objective}, crops, layers=[2], seed=4)
    assert other[0]["share"] != one[0]["share"]


def test_an_odd_utterance_is_left_out(crops):
    odd = diagnostics.Crops(crops.ids[:7], crops.wavs[:7])
    assert shares(odd)[0]["pairs"] == 3


def test_every_strategy_s_yaml_gives_its_own_objective(tiny_teacher):
    teacher = Teacher(str(tiny_teacher))
    found = {
        name: probe_position.load_objective(name, teacher)
        for name in ("mse", "zero_pad", "soft_dtw", "speed_mse", "zero_pad_soft_dtw")
    }
    assert all(objective.teacher is teacher for objective in found.values())
    assert isinstance(found["zero_pad"].perturbation, ZeroPadding)
    assert isinstance(found["soft_dtw"].distance, SoftDTWDistance)
    assert isinstance(found["soft_dtw"].perturbation, SpeedPerturbation)
    with pytest.raises(UserError, match=r"si_sdr\.yaml compares no representations"):
        probe_position.load_objective("si_sdr", teacher)
    with pytest.raises(UserError, match="objectives: There is no experiment file nope"):
        probe_position.load_objective("nope", teacher)


def test_training_scores_of_a_weighted_objective(crops):
    teacher = KnownTeacher(1.0, 1.0)
    inner = RepresentationObjective(teacher, MSEDistance())
    objective = WeightedSum({"r": inner, "s": torch.nn.Module()}, {"r": 1.0, "s": 0.0})
    lengths = torch.full((UTTERANCES,), FRAMES * HOP)
    lengths[0] -= 10 * HOP
    arguments = (objective, crops.wavs, crops.wavs, lengths, crops.ids)
    found = diagnostics.training_scores(*arguments, offset_seconds=0.3)
    assert found["position_share"] == pytest.approx(0.5, abs=0.03)
    assert found["position_right"] == 0.0
    # Noise in the enhanced speech cannot be won back by position: the share falls no further.
    noisy = crops.wavs + torch.randn(crops.wavs.shape, generator=torch.Generator().manual_seed(9))
    assert diagnostics.training_scores(objective, noisy, *arguments[2:])["position_right"] > 0.9
    assert diagnostics.training_scores(*(v[:1] if i else v for i, v in enumerate(arguments))) == {}


# Intervals


def test_the_interval_covers_the_true_share():
    rng = np.random.default_rng(10)
    covered = 0
    for trial in range(200):
        unequal, right = rng.normal(4, 0.5, 40), rng.normal(1, 0.3, 40)
        found = statistics.bootstrap_ratio(
            unequal - rng.normal(3, 0.5, 40), unequal - right, seed=trial, replicates=400
        )
        covered += found.low <= 1 / 3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_ratios_without_a_denominator_or_a_second_row_have_no_interval():
    assert math.isnan(statistics.bootstrap_ratio([1.0, 2.0], [0.0, 0.0]).estimate)
    single = statistics.bootstrap_ratio([1.0], [2.0])
    assert single.estimate == 0.5 and math.isnan(single.low)


# 5. Mismatched targets


def test_a_mismatched_target_is_the_previous_utterance_at_the_shorter_length(crops):
    objective = RepresentationObjective(KnownTeacher(0.0, 1.0), MSEDistance())
    lengths = torch.tensor([50, 30, 40]) * HOP
    enhanced = crops.wavs[:3].clone().requires_grad_()
    found = diagnostics.MismatchedTargets(objective)(enhanced, crops.wavs[3:6], lengths, [None] * 3)
    for i, (j, frames) in enumerate(((2, 40), (0, 30), (1, 30))):
        size = frames * HOP
        expected = (crops.wavs[i, :size] - crops.wavs[3 + j, :size]).square().mean()
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)
    found.sum().backward()
    assert (enhanced.grad[1, 30 * HOP :] == 0).all() and (enhanced.grad[0, : 40 * HOP] != 0).all()


def test_mismatched_targets_reward_position_until_it_is_random(crops):
    objective = RepresentationObjective(KnownTeacher(1.0, 0.0), MSEDistance())
    arguments = (crops.wavs, crops.wavs, torch.full((UTTERANCES,), 60 * HOP))

    def rngs():
        return [np.random.default_rng(i) for i in range(UTTERANCES)]

    assert diagnostics.MismatchedTargets(objective)(*arguments, rngs()).abs().max() == 0
    moved = diagnostics.MismatchedTargets(objective, 0.3)
    values = moved(*arguments, rngs())
    assert values.mean() == pytest.approx(2 * 30 / 31, rel=0.15)
    assert torch.equal(values, moved(*arguments, rngs()))


def test_a_batch_of_one_cannot_be_mismatched(crops):
    objective = diagnostics.MismatchedTargets(
        RepresentationObjective(KnownTeacher(), MSEDistance())
    )
    with pytest.raises(UserError, match="two utterances in every batch"):
        objective(crops.wavs[:1], crops.wavs[:1], torch.tensor([HOP]), [None])


def test_an_offset_moves_content_and_keeps_the_other_perturbation_s_draws():
    wavs, lengths = torch.randn(2, 50), torch.tensor([50, 40])
    padding = ZeroPadding(4 / 16000, 1)
    plain, moved = (
        make(wavs, lengths, [np.random.default_rng(i) for i in range(2)])
        for make in (padding, diagnostics.Offset(7 / 16000, padding, 1, random=True))
    )
    extra = moved.content_start - plain.content_start
    assert (extra >= 0).all() and (extra <= 7).all() and extra.sum() > 0
    for i, (start, size) in enumerate(zip(moved.content_start, moved.content_lengths)):
        assert torch.equal(moved.data[i, start : start + size], wavs[i, :size])
        assert moved.lengths[i] == plain.lengths[i] + extra[i]
        assert (moved.data[i, :start] == 0).all()
    with pytest.raises(ValueError, match="seconds: got -1"):
        diagnostics.Offset(-1)


# Data and recipe


def test_too_small_a_corpus_says_what_is_there_and_what_is_needed(corpus):
    with pytest.raises(UserError, match=r"4 utterances of at least 1 s .* needed are 12"):
        diagnostics.load_crops(corpus, ["dev"], 1.0)
    with pytest.raises(UserError, match=r": 0 utterances of at least 9 s .*22 of any length"):
        diagnostics.load_crops(corpus, ["*"], 9.0)


def test_crops_are_drawn_from_the_seed(corpus):
    one, two, other = (diagnostics.load_crops(corpus, ["train"], 0.7, seed=s) for s in (0, 0, 1))
    assert one.wavs.shape == (12, 11200) and one.ids == other.ids
    assert torch.equal(one.wavs, two.wavs) and not torch.equal(one.wavs, other.wavs)


def test_layers_the_teacher_does_not_have(crops):
    assert diagnostics.chosen_layers(KnownTeacher(), [-1, 0]) == [2, 0]
    with pytest.raises(UserError, match="has 2 layers, asked for layer 5"):
        diagnostics.shift_curve(KnownTeacher(), crops.wavs, layers=[0, 5])


@pytest.fixture
def probe(corpus, noises, tiny_teacher, tmp_path):
    """Run probe_position.py with small settings; returns OUTPUT/position."""
    torch.manual_seed(0)
    save_enhancer(tmp_path / "pre", MaskEnhancer(channels=(4, 4), dim=8, dilations=(1, 2)))
    (tmp_path / "pre" / "block.yaml").write_text(
        "!new:pi_finetune.enhancers.MaskEnhancer\nchannels: [4, 4]\ndim: 8\ndilations: [1, 2]\n"
    )
    (tmp_path / "small_mse.yaml").write_text(
        f"extends: {ROOT}/hparams/mse.yaml\nstrategy: small_mse\n"
        f"enhancer: !include:{quote(str(tmp_path))}/pre/block.yaml\nvalid_max_seconds: 5\n"
    )
    (tmp_path / "small_si_sdr.yaml").write_text(
        f"extends: {tmp_path}/small_mse.yaml\nrepresentation_weight: 0\nsignal_weight: 1\n"
    )
    training = {
        "noise_folder": str(noises),
        "enhancer_weights": str(tmp_path / "pre"),
        "updates": 2,
        "batch_size": 2,
        "segment_seconds": 1.0,
        "valid_utterances": 4,
        "num_workers": 0,
        "lr": 0.01,
    }
    settings = {
        "data_folder": corpus,
        "splits": "['*']",
        "segment_seconds": 1.0,
        "far_seconds": 0.5,
        "shifts": "[0, 0.5]",
        "teacher_source": tiny_teacher,
        "objectives": "[mse, zero_pad, soft_dtw]",
        "output_folder": tmp_path / "out",
        "causal_objectives": f"[{tmp_path}/small_mse.yaml]",
        "gradient_objectives": f"[{tmp_path}/small_mse.yaml, {tmp_path}/small_si_sdr.yaml]",
        "gradient_batches": 3,
        "training": json.dumps(training),
    }

    def run(**changes):
        arguments = [str(ROOT / "hparams" / "probe_position.yaml"), "--noprogressbar"]
        for key, value in {**settings, **changes}.items():
            arguments += [f"--{key}", str(value)]
        recipe("probe_position")(arguments)
        return tmp_path / "out" / "position"

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_recipe_writes_lines_figures_and_a_section(probe, capsys):
    folder = probe()
    assert "share soft_dtw" in capsys.readouterr().out
    for name in ("shift", "similarity", "probe", "share"):
        assert lines(folder / f"{name}.jsonl")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
    found = lines(folder / "share.jsonl")
    assert [(r["objective"], r["layer"]) for r in found] == [
        (name, layer) for name in ("mse", "zero_pad", "soft_dtw") for layer in ("cnn", 0, 1, 2)
    ]
    assert all(r["pairs"] == 11 and r["low"] <= r["share"] <= r["high"] for r in found)
    shift = lines(folder / "shift.jsonl")
    assert max(r["ratio"] for r in shift if r["layer"] == "cnn") < 1e-10
    section = report.position_section(folder)
    assert section.count("data:image/svg+xml") == 4 and "similarity.jsonl" in section
    first = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    probe(diagnostics="[probe, share]")
    assert first == {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_falls_are_compared_on_one_scale():
    """The same fall is the same, whether it is from 10 or from 100."""
    rng = np.random.default_rng(0)
    own = rng.uniform(1.5, 2.5, 40)
    before = {"matched": 5.0, "mismatched": 10.0, "mismatched_moved": 100.0}
    falls = {"matched": own, "mismatched": own / 2, "mismatched_moved": own / 2 - 0.01 * own}
    losses = {name: (before[name] + 0 * own, before[name] - fall) for name, fall in falls.items()}
    found = {r["targets"]: r for r in diagnostics.falls_of_matched(losses)}
    assert found["matched"]["of_matched"] == 1.0
    for name, share in {"mismatched": 0.5, "mismatched_moved": 0.49, "position": 0.01}.items():
        record = found[name]
        assert record["of_matched"] == pytest.approx(share)
        assert record["low"] == pytest.approx(share) == record["high"]  # paired: it never varies
    assert found["position"]["before"] is None
    worse = {name: (after, start) for name, (start, after) in losses.items()}
    assert diagnostics.falls_of_matched(worse)[1]["of_matched"] is None


def test_the_causal_test_trains_every_arm_and_compares_before_and_after(probe):
    folder = probe(diagnostics="[causal]")
    found = lines(folder / "causal.jsonl")
    assert [r["targets"] for r in found] == [*diagnostics.TARGETS, "position"]
    for record in found:
        assert record["objective"] == "small_mse" and record["utterances"] == 4
        assert record["fall"] != 0
    for record in found[:3]:
        assert record["fall"] == pytest.approx(record["before"] - record["after"])
    assert found[3]["fall"] == pytest.approx(found[1]["fall"] - found[2]["fall"])
    assert found[0]["before"] != found[1]["before"] != found[2]["before"]
    run = folder / "causal" / "small_mse-mismatched" / "1234"
    validated = lines(run / "valid.jsonl")[-1]["objective"]
    assert found[1]["after"] == pytest.approx(validated, rel=1e-4)  # what the Brain computed
    assert (folder / "causal.png").is_file() and not (folder / "shift.jsonl").exists()


def test_the_gradients_of_objectives_are_compared(probe):
    folder = probe(diagnostics="[gradients]")
    found = lines(folder / "gradients.jsonl")
    assert [(r["objective"], r["other"]) for r in found] == [
        ("small_mse", "small_mse"), ("small_mse", "small_si_sdr"), ("small_si_sdr", "small_si_sdr")
    ]  # fmt: skip
    assert all(0 <= r["signal"] <= 1 and r["batches"] == 3 for r in found)
    assert (folder / "gradients.png").is_file()
    assert "Agreement of gradients" in report.position_section(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient_batches": 2, "diagnostics": "[gradients]"},
            "gradient_batches: got 2, needed is a whole number, 3 or more",
        ),
        ({"layers": "[7]"}, "layers: the teacher has 2 layers, asked for layer 7"),
        ({"segment_seconds": 30}, "needed are 12. Lower segment_seconds"),
        ({"diagnostics": "[shifts]"}, "diagnostics: no 'shifts'; choose from shift,"),
        ({"objectives": "[si_sdr]"}, "compares no representations"),
        ({"far_seconds": 3}, "far_seconds: 3 s are not within the crops"),
        ({"data_folder": "/nowhere"}, "/nowhere is no folder"),
        ({"diagnostics": "[causal]", "training": "{updatez: 1}"}, "Did you mean --updates?"),
    ],
)
def test_bad_input_is_one_clear_error(probe, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        probe(**changes)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
