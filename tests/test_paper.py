"""The paper's experiment: its parts against their definitions, its files, and running it all."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import HPARAMS, ROOT, recipe
from safetensors import safe_open
from synthetic import voice, write_audio

from pi_finetune.config import load_hparams
from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.objectives import (
    MSEDistance,
    RepresentationObjective,
    SoftDTWDistance,
    SoftDTWLAVDistance,
    contrastive_idm,
    load_teachers,
    measure_projections,
)
from pi_finetune.perturbations import ZeroPadding
from pi_finetune.projections import POSITION_FILE, PositionRemoval
from pi_finetune.projections import position_subspace as subspace


def rngs(count):
    return [np.random.default_rng(i) for i in range(count)]


# -- padding by a share ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)).map(sorted),
    st.lists(st.integers(400, 9000), min_size=1, max_size=3),
)
def test_a_share_of_the_utterance_is_padded_in_whole_hops(share, lengths):
    wavs = Waveforms.collate([torch.ones(n) for n in lengths])
    out = ZeroPadding(share=share)(wavs, rngs=rngs(len(lengths)))
    assert torch.equal(out.content_lengths, wavs.lengths)
    for before, length, total in zip(out.content_start, wavs.lengths, out.lengths):
        for side in (int(before), int(total - length - before)):
            assert side % 320 == 0
            assert share[0] * length - 160 <= side <= share[1] * length + 160


@pytest.mark.parametrize(("share", "hops"), [([0.0, 0.0], 0), ([0.1, 0.1], 5), ([0.5, 0.5], 25)])
def test_a_share_may_be_one_number_or_none_or_a_half(share, hops):
    out = ZeroPadding(share=share)(torch.ones(1, 16000), rngs=rngs(1))
    assert int(out.content_start) == 320 * hops and int(out.lengths) == 16000 + 2 * 320 * hops


def test_shares_are_uniform_and_the_sides_differ():
    wavs = Waveforms.collate([torch.ones(160000)] * 400)
    out = ZeroPadding(share=[0.02, 0.05])(wavs, rngs=rngs(400))
    before = out.content_start // 320
    after = (out.lengths - out.content_lengths - out.content_start) // 320
    for side in (before, after):
        assert side.min() == 10 and side.max() == 25
        assert float(side.float().mean()) == pytest.approx(17.5, abs=0.7)
    assert abs(float(torch.corrcoef(torch.stack([before, after]).float())[0, 1])) < 0.2


@pytest.mark.parametrize("share", [[-0.1, 0.2], [0.2, 0.1], [0.1, 0.6], [0.1], [math.nan, 0.1]])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match=r"share: got \[.*from 0 to 0.5"):
        ZeroPadding(share=share)
    with pytest.raises(UserError, match=r"pad_share: got .*from 0 to 0.5"):
        load_hparams(HPARAMS / "paper" / "zero_pad.yaml", {"pad_share": share})


# -- distances -------------------------------------------------------------------------------------


def test_mse_with_the_sum_over_dimensions_is_the_mean_over_frames():
    x, y = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    lengths = torch.tensor([5, 3])
    found = MSEDistance(sum_dimensions=True)(x, lengths, y, lengths)
    for i, n in enumerate(lengths.tolist()):
        each = [float((x[i, k] - y[i, k]).square().sum()) for k in range(n)]
        assert float(found[i]) == pytest.approx(sum(each) / n, rel=1e-6)


def idm_reference(x, margin, window):
    total, n = 0.0, len(x)
    for i in range(n):
        for j in range(n):
            distance, weight = (x[i] - x[j]).square().sum(), (i - j) ** 2 + 1
            distance = distance.sqrt() if i != j else 0 * distance
            near = abs(i - j) <= window
            total = total + (distance / weight if near else weight * (margin - distance).relu())
    return total / n**2


@pytest.mark.parametrize("window", [0, 2])
def test_the_temporal_regulariser_is_its_definition(window):
    """Haresh et al. in float64: values and gradients, one frame, and what lies beyond."""
    lengths = torch.tensor([6, 1, 4])
    x = torch.nn.functional.normalize(torch.randn(3, 6, 5, dtype=torch.float64), dim=-1)
    x[1, 1:] = torch.nan
    x[2, 4:] = torch.nan
    own, fast = x.clone().requires_grad_(), x.float().requires_grad_()
    wanted = torch.stack(
        [idm_reference(own[i, :n], 1.1, window) for i, n in enumerate(lengths.tolist())]
    )
    found = contrastive_idm(fast, lengths, 1.1, window)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert wanted[0] > 0 and wanted[1] == 0
    valid = ~x.isnan()
    gradients = [
        torch.autograd.grad(v.sum(), w)[0][valid] for v, w in ((found, fast), (wanted, own))
    ]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-5)


def test_gradcheck_of_the_temporal_regulariser():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda x: contrastive_idm(x, lengths, 2.0, 1), x)


def test_equal_frames_have_a_finite_gradient():
    x = torch.ones(1, 4, 3, requires_grad=True)
    contrastive_idm(x, torch.tensor([4])).sum().backward()
    assert x.grad.isfinite().all()


def test_lav_is_soft_dtw_and_both_moments():
    x, y = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    lengths = torch.tensor([6, 4]), torch.tensor([5, 5])
    found = SoftDTWLAVDistance(alpha=0.4)(x, lengths[0], y, lengths[1])
    x, y = (torch.nn.functional.normalize(each, dim=-1) for each in (x, y))
    moments = contrastive_idm(x, lengths[0]) + contrastive_idm(y, lengths[1])
    wanted = SoftDTWDistance()(x, lengths[0], y, lengths[1]) + 0.4 * moments
    torch.testing.assert_close(found, wanted)
    with pytest.raises(UserError, match="alpha -1"):
        SoftDTWLAVDistance(alpha=-1)


# -- projections -----------------------------------------------------------------------------------


class ContentAndPosition(torch.nn.Module):
    """A teacher whose frames are a function of their samples, plus a code of their index."""

    hop, dim, layers, source = 320, 12, [-1], "synthetic"

    def __init__(self, rank=3, strength=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = torch.nn.Linear(320, 12, bias=False).requires_grad_(False)
        self.encoder.weight.copy_(torch.randn(12, 320, generator=generator))
        codes = torch.randn(200, rank, generator=generator) @ torch.randn(
            rank, 12, generator=generator
        )
        self.codes = strength * codes

    def forward(self, wavs):
        frames = wavs.data.unfold(1, 320, 320)
        return self.encoder(frames).tanh() + self.codes[: frames.shape[1]], wavs.lengths // 320


class Pairs:
    def __init__(self, folder, count=6, seconds=0.4):
        rng, self.manifest = np.random.default_rng(0), {}
        for i in range(count):
            path = folder / f"{i}.flac"
            write_audio(path, voice(seconds, 100 + 10 * i, rng))
            self.manifest[str(i)] = {"wav": str(path), "duration": seconds}


def test_removal_takes_out_the_position_and_nothing_else(tmp_path):
    teacher, projection = ContentAndPosition(), PositionRemoval(0.32, rotations=16, explained=1.0)
    projection.measure(teacher, Pairs(tmp_path), tmp_path)
    assert projection.basis.shape == (12, 3)
    codes = teacher.codes[:16]
    assert projection(codes - codes.mean(0)).abs().max() < 1e-5 * codes.abs().max()
    # The same content at two places has equal projections; what is orthogonal stays.
    wav = torch.randn(1, 320)
    one = teacher(Waveforms.of(torch.cat([wav, torch.zeros(1, 640)], 1)))[0][0, 0]
    other = teacher(Waveforms.of(torch.cat([torch.zeros(1, 640), wav], 1)))[0][0, 2]
    assert (one - other).norm() > 0.5
    torch.testing.assert_close(projection(one), projection(other), atol=1e-5, rtol=0)
    x = torch.randn(5, 12)
    rest = x - (x @ projection.basis) @ projection.basis.T
    torch.testing.assert_close(projection(rest), rest)


def test_rank_goes_by_explained_variance():
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(50, 3, generator=generator, dtype=torch.float64))[0]
    rows = torch.linalg.qr(rows - rows.mean(0))[0]
    means = torch.zeros(50, 8, dtype=torch.float64)
    means[:, :3] = rows * torch.tensor([8.0, 1.9, 0.1]).sqrt()  # 80 %, 19 % and 1 %
    ranks = [subspace(means, means, share)[0].shape[1] for share in (0.7, 0.95, 0.995, 1.0)]
    assert ranks == [1, 2, 3, 3]


def test_position_that_is_not_there_is_not_found(tmp_path):
    teacher = ContentAndPosition(strength=0.0)
    with pytest.raises(UserError, match=r"'synthetic'.*position cannot be found.*correlate by"):
        PositionRemoval(0.32, rotations=1).measure(teacher, Pairs(tmp_path), tmp_path)
    assert not (tmp_path / POSITION_FILE).exists()


def test_too_little_speech_and_no_measurement_are_said(tmp_path):
    with pytest.raises(UserError, match=r"of 6 training utterances 0 have 1 s.*position_seconds"):
        PositionRemoval(1.0).measure(ContentAndPosition(), Pairs(tmp_path), tmp_path)
    with pytest.raises(UserError, match="not measured yet"):
        PositionRemoval()(torch.zeros(1, 2, 3))


def test_the_subspace_is_kept_and_reused(tmp_path, monkeypatch):
    teacher, pairs = ContentAndPosition(), Pairs(tmp_path)
    first = PositionRemoval(0.32, rotations=16)
    first.measure(teacher, pairs, tmp_path)
    with safe_open(tmp_path / POSITION_FILE, "pt") as file:
        assert float(file.metadata()["reliability"]) > 0.9
    again = PositionRemoval(0.32, rotations=16)
    monkeypatch.setattr(PositionRemoval, "mean_frames", None)  # would be called
    again.measure(teacher, pairs, tmp_path)
    torch.testing.assert_close(again.basis, first.basis)
    with pytest.raises(UserError, match=r"position.safetensors: made with .*rotations"):
        PositionRemoval(0.32, rotations=8).measure(teacher, pairs, tmp_path)
    (tmp_path / POSITION_FILE).write_bytes(b"half")
    with pytest.raises(UserError, match=r"cannot be read.*made anew"):
        again.measure(teacher, pairs, tmp_path)


def test_both_branches_are_projected(tmp_path):
    teacher, projection = ContentAndPosition(), PositionRemoval(0.32, rotations=16)
    objective = RepresentationObjective(teacher, MSEDistance(), projection=projection)
    measure_projections(objective, Pairs(tmp_path), tmp_path)
    x, y = torch.randn(2, 1, 1600)
    found = objective(x, y, torch.tensor([1600]))
    reps = (projection(teacher(Waveforms.of(each))[0]) for each in (x, y))
    torch.testing.assert_close(found[0], (next(reps) - next(reps)).square().mean())


def test_a_learned_projection_gets_the_teacher_s_width(tiny_teacher):
    objective, _ = load_hparams(
        HPARAMS / "paper" / "soft_dtw_lav.yaml",
        {"teacher_source": str(tiny_teacher), "projection_dim": 5, "enhancer_weights": None},
    )
    objective = load_teachers(objective["objective"])
    assert [tuple(p.shape) for p in objective.parameters()] == [(5, 32), (5,)]
    wavs = 0.1 * torch.randn(2, 1, 4000)
    objective(*wavs, torch.tensor([4000]), rngs(1)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())


def _latest(results):
    return max(results.rglob("CKPT*/objective.ckpt"), key=lambda path: path.stat().st_mtime)


def test_a_learned_projection_is_trained_and_resumed(train, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "extends: soft_dtw.yaml\nprojection: !new:pi_finetune.projections.LearnedProjection\n"
        "    dim: 4\n"
    )
    states = []
    for own in ({"updates": 2}, {"updates": 4, "lr": 1e-12}):  # the second moves nothing
        train(tmp_path / "own", "results", **own)
        checkpoint = _latest(tmp_path / "results")
        states.append(torch.load(checkpoint, weights_only=True))
    assert len(states[0]) == 2 and all("projection.linear" in key for key in states[0])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=1e-8)
    train(tmp_path / "own", "untrained", updates=2, lr=1e-12)
    checkpoint = _latest(tmp_path / "untrained")
    for key, value in torch.load(checkpoint, weights_only=True).items():
        assert (value - states[0][key]).abs().max() > 1e-3  # so it was trained, and resumed


def test_mse_projected_trains_and_keeps_its_subspace(train):
    own = {"position_seconds": 1.0, "position_rotations": 50, "position_explained": 0.9}
    run = train("mse_projected", **own)
    with safe_open(run / POSITION_FILE, "pt") as file:
        assert json.loads(file.metadata()["made_by"])["seconds"] == 1.0
    before = (run / POSITION_FILE).stat().st_mtime_ns
    train("mse_projected", **own, updates=6)
    assert (run / POSITION_FILE).stat().st_mtime_ns == before


# -- the files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("make_paper", ROOT / "docs" / "make_paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_made_of_the_files(page):
    text = (ROOT / "docs" / "paper.md").read_text()
    assert text == page.with_tables(text), "run `python docs/make_paper.py`"


def test_a_value_without_a_source_is_refused(page, tmp_path):
    (tmp_path / "a.yaml").write_text("extends: mse.yaml\nstrategy: a\nlr: 1  # just so\n")
    with pytest.raises(ValueError, match=r"a.yaml: lr: .*its comment must begin with a source"):
        page.rows(tmp_path / "a.yaml")


# -- all of it -------------------------------------------------------------------------------------


def run_all(experiment, results, *options):
    words = [str(experiment), "--debug", "--results_folder", str(results)]
    assert not recipe("ablate")([*words, *options])
    return results / "debug"


def check_all(results, strategies):
    for name in ("clean", "seen", "unseen"):
        for system in ("noisy/0", "pretrained/0", *(f"hubert_base/{s}/1" for s in strategies)):
            lines = (results / system / "scores" / f"{name}.jsonl").read_text().splitlines()
            assert len(lines) == 2
            assert json.loads(lines[0])["asr"].keys() == {"words", "phonemes"}
        table = (results / f"tables-{name}" / "summary.md").read_text()
        assert all(strategy in table for strategy in strategies)


@pytest.mark.needs("gruut")
def test_the_whole_experiment_runs(tmp_path):
    """Narrow models, two strategies, in this process."""
    lines = ["extends: paper/ablation.yaml", "cluster: debug", "strategies:"]
    for name in ("mse", "soft_dtw_lav"):
        (tmp_path / f"{name}.yaml").write_text(
            f"extends: paper/{name}.yaml\nenhancer: !new:pi_finetune.enhancers.Demucs\n"
            "    hidden: 4\n    depth: 3\n    lstm_layers: 1\n"
        )
        lines.append(f'    {name}: {{hparams: {json.dumps(str(tmp_path / name))[:-1]}.yaml"}}')
    lines += ["debug_teacher:", "    hidden_size: 24", "    num_hidden_layers: 2"]
    lines += ["    num_attention_heads: 2", "    intermediate_size: 24"]
    lines += ["    conv_dim: [8, 8, 8, 8, 8, 8, 8]", "    num_conv_pos_embedding_groups: 4"]
    (tmp_path / "narrow.yaml").write_text("\n".join(lines) + "\n")
    results = run_all(tmp_path / "narrow.yaml", tmp_path / "results")
    check_all(results, ("mse", "soft_dtw_lav"))


@pytest.mark.slow
def test_the_whole_experiment_runs_at_its_true_size(tmp_path):
    hparams, _ = load_hparams(HPARAMS / "paper" / "ablation.yaml")
    check_all(run_all(HPARAMS / "paper" / "ablation.yaml", tmp_path), hparams["strategies"])
