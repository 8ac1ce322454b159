"""Hard DTW, penalties of steps, open ends, Itakura's band, checkpoints: against all paths.

The groups of test_cases.py that an option could break are repeated here for each of them.
"""

import itertools
import math

import pytest
import torch
from helpers import (
    all_paths,
    assert_close,
    features,
    over_all_paths,
    value_and_alignment,
    value_and_gradients,
)

from pi_finetune.soft_dtw import (
    SoftDTW,
    alignment,
    dtw_path,
    gamma_heuristic,
    soft_dtw,
    soft_dtw_from_cost,
    soft_dtw_pairwise,
)
from pi_finetune.soft_dtw.recursion import Recursion
from pi_finetune.soft_dtw.reference import band_mask

both = pytest.mark.parametrize("backend", ["reference", "cpu"])
OPTIONS = {
    "plain": {},
    "penalty": {"step_penalty": 0.3},
    "three penalties": {"step_penalty": (0.2, 0.5, 0.1)},
    "open begin": {"open_begin": True},
    "open end": {"open_end": True},
    "open, penalty": {"open_begin": True, "open_end": True, "step_penalty": (0.1, 0.3, 0.2)},
    "itakura": {"itakura": 2.0},
    "itakura, penalty": {"itakura": 1.5, "step_penalty": 0.2},
    "band, penalty": {"bandwidth": 1, "step_penalty": 0.2},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
closed = pytest.mark.parametrize(
    "options", [o for k, o in OPTIONS.items() if "open" not in k],
    ids=[k for k in OPTIONS if "open" not in k],
)  # fmt: skip


@both
@each
@pytest.mark.parametrize("N, M", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 6), (6, 3), (5, 4)])
@pytest.mark.parametrize("gamma", [0.4, 0.0])
def test_sum_over_all_paths(backend, options, N, M, gamma):
    cost = torch.rand(1, N, M, dtype=torch.float64) - 0.2
    want, want_gradient = over_all_paths(cost[0], gamma, **options)
    got, gradient = value_and_alignment(cost, gamma=gamma, backend=backend, **options)
    assert_close("loss", got, want[None], 1e-12)
    assert_close("gradient", gradient, want_gradient[None], 1e-11)


@pytest.mark.parametrize("N, M", [(5, 5), (4, 8), (9, 3), (7, 11), (1, 4), (2, 9), (30, 4)])
@pytest.mark.parametrize("slope", [1.0, 1.3, 2.0, 7.0])
def test_itakura_is_the_parallelogram_and_the_line(N, M, slope):
    n, m = torch.tensor([N]), torch.tensor([M])
    mask = band_mask(n, m, Recursion(itakura=round(1000 * slope)), N, M)[0]
    line = band_mask(n, m, Recursion(bandwidth=0), N, M)[0]
    for i, j in itertools.product(range(N), range(M)):
        u, v = (i / (N - 1) if N > 1 else 0.0), (j / (M - 1) if M > 1 else 0.0)
        steep = [v - slope * u, u - slope * v, (1 - v) - slope * (1 - u), (1 - u) - slope * (1 - v)]
        if N > 1 and M > 1:
            assert mask[i, j] == (max(steep) <= 1e-9 or line[i, j]), (i, j)
    assert mask.T.equal(band_mask(m, n, Recursion(itakura=round(1000 * slope)), M, N)[0])
    assert all_paths(mask), "no path is left"
    if slope == 1.0:
        assert mask.equal(line)


@both
@each
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradcheck(backend, options, cost):
    x, y = (z.requires_grad_() for z in features(2, 6, 4, D=3, dtype=torch.float64))
    n, m = torch.tensor([6, 3]), torch.tensor([2, 4])
    options = {"gamma": 0.5, "cost": cost, "backend": backend, **options}
    assert torch.autograd.gradcheck(
        lambda x, y: soft_dtw(x, y, n, m, **options), (x, y), fast_mode=True
    )
    if not any("open" in name for name in options):
        options["divergence"] = True
        assert torch.autograd.gradcheck(
            lambda x, y: soft_dtw(x, y, n, m, **options), (x, y), fast_mode=True
        )


@both
def test_gradcheck_of_hard_dtw(backend):
    """Away from ties hard DTW is differentiable."""
    x, y = (z.requires_grad_() for z in features(2, 6, 4, D=3, dtype=torch.float64))
    for divergence in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, y: soft_dtw(x, y, gamma=0, divergence=divergence, backend=backend),  # noqa: B023
            (x, y), fast_mode=True,
        )  # fmt: skip


@both
@each
@pytest.mark.parametrize("gamma", [0.2, 0.0])
def test_item_in_a_padded_batch_of_garbage_equals_item_alone(backend, options, gamma):
    x, y = features(4, 80, 70)
    n, m = torch.tensor([80, 65, 1, 33]), torch.tensor([7, 70, 20, 1])
    for z, lengths in ((x, n), (y, m)):
        for b, length in enumerate(lengths):
            z[b, length:] = float("nan")
    options = {"gamma": gamma, "backend": backend, **options}
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    loss, gx, gy = value_and_gradients(x, y, n, m, weights=weights, **options)
    for b in range(4):
        alone = x[b : b + 1, : n[b]], y[b : b + 1, : m[b]]
        want = value_and_gradients(*alone, weights=weights[b], **options)
        assert_close("loss", loss[b : b + 1], want[0], 1e-5)
        assert_close("gradient of x", gx[b : b + 1, : n[b]], want[1], 1e-5)
        assert_close("gradient of y", gy[b : b + 1, : m[b]], want[2], 1e-5)
        assert (gx[b, n[b] :] == 0).all() and (gy[b, m[b] :] == 0).all()


@each
@pytest.mark.parametrize("gamma", [0.1, 0.0])
@pytest.mark.parametrize("N, M", [(64, 64), (65, 127), (200, 31), (30, 300), (129, 66)])
def test_cpu_agrees_with_the_reference_at_the_seams(options, gamma, N, M):
    cost = torch.rand(2, N, M)
    n, m = torch.tensor([N, (N + 1) // 2]), torch.tensor([(M + 1) // 2, M])
    options = {"gamma": gamma, "weights": torch.tensor([2.0, -0.5]), **options}
    got = value_and_alignment(cost, n, m, backend="cpu", **options)
    want = value_and_alignment(cost.double(), n, m, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@each
def test_float32_is_exact_at_length(options):
    cost = torch.rand(1, 1500, 1400) * 200
    got = value_and_alignment(cost, gamma=0.01, backend="cpu", **options)
    want = value_and_alignment(cost.double(), gamma=0.01, backend="cpu", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@both
@each
def test_half_inputs_autocast_one_side_and_untouched_inputs(backend, options):
    x, y = features(2, 40, 30)
    options = {"gamma": 0.1, "backend": backend, **options}
    before = x.clone(), y.clone()
    want = value_and_gradients(x, y, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(x, y, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    half = value_and_gradients(x.bfloat16(), y.bfloat16(), **options)
    assert half[1].dtype == torch.bfloat16
    assert torch.equal(half[0], soft_dtw(x.bfloat16().float(), y.bfloat16().float(), **options))
    x.requires_grad_()
    loss = soft_dtw(x, y, **options).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(first, second) and torch.equal(first, want[1])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second.sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert soft_dtw(x[:0], y[:0], **options).shape == (0,)


@both
@pytest.mark.parametrize("name", ["open, penalty", "itakura, penalty"])
def test_compiles_into_one_graph(backend, name):
    options = {"gamma": 0.0 if "open" in name else 0.1, "backend": backend, **OPTIONS[name]}

    def loss(x, y):
        return soft_dtw(x * 2, y, **options).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, loss):
        torch.manual_seed(0)
        x, y = (z.requires_grad_() for z in features(2, 20, 30))
        function(x, y).backward()
        results.append((x.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# Hard DTW and its path.


@each
def test_small_gamma_approaches_hard_dtw(options):
    cost = torch.rand(2, 40, 33, dtype=torch.float64)
    hard, e = value_and_alignment(cost, gamma=0, backend="cpu", **options)
    soft, e_soft = value_and_alignment(cost, gamma=1e-6, backend="cpu", **options)
    assert_close("loss", soft, hard, 1e-4)
    assert_close("alignment", e_soft, e, 1e-3)
    assert ((e == 0) | (e == 1)).all()


@both
@each
def test_path_costs_what_the_loss_says(backend, options):
    x, y = features(3, 30, 40)
    n, m = torch.tensor([30, 7, 1]), torch.tensor([40, 12, 9])
    loss, paths = dtw_path(x, y, n, m, backend=backend, **options)
    hard = soft_dtw(x, y, n, m, gamma=0, backend=backend, **options)
    assert_close("loss", loss, hard, 1e-6)
    penalties = options.get("step_penalty", 0.0)
    down, right, diagonal = (
        penalties if isinstance(penalties, tuple) else (penalties, penalties, 0.0)
    )
    price = {(1, 0): down, (0, 1): right, (1, 1): diagonal}
    for b, path in enumerate(paths):
        assert path.dtype == torch.int64
        steps = [tuple(step) for step in path.diff(dim=0).tolist()]
        d = (x[b, path[:, 0]] - y[b, path[:, 1]]).double().square().sum()
        total = d + sum(price[step] for step in steps)  # any other step is a KeyError
        assert_close("loss", loss[b], total, 1e-5)
        assert path[0, 0] == 0 and path[-1, 0] == n[b] - 1
        assert path[0, 1] == 0 or options.get("open_begin")
        assert path[-1, 1] == m[b] - 1 or options.get("open_end")


@both
def test_ties_give_one_path_diagonal_first(backend):
    _, paths = dtw_path(torch.zeros(1, 3, 2), torch.zeros(1, 5, 2), backend=backend)
    assert paths[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 3], [2, 4]]
    x = torch.zeros(1, 3, 2)
    loss, gx, _ = value_and_gradients(x, x, gamma=0, divergence=True, backend=backend)
    assert loss.item() == 0 and (gx == 0).all()


@both
def test_open_ends_find_a_part(backend):
    y = torch.randn(1, 50, 4)
    x = y[:, 20:31]
    loss, (path,) = dtw_path(x, y, open_begin=True, open_end=True, backend=backend)
    assert loss.item() < 1e-4 and path.tolist() == [[k, 20 + k] for k in range(11)]
    e = alignment(x, y, gamma=0.01, open_begin=True, open_end=True, backend=backend)
    assert_close("visits every frame of x", e.sum(2).clamp(max=1), torch.ones(1, 11), 1e-4)


def test_large_step_penalty_forbids_waiting():
    cost = torch.rand(1, 9, 9, dtype=torch.float64)
    got = soft_dtw_from_cost(cost, gamma=0.1, step_penalty=1e4)
    assert_close("loss", got, cost[0].diagonal().sum()[None], 1e-9)


# Checkpoints.


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "l1"])
@pytest.mark.parametrize("divergence", [False, True])
@each
def test_checkpointed_gives_the_same(cost, divergence, options):
    if divergence and any("open" in name for name in options):
        pytest.skip("no divergence with open ends")
    x, y = features(2, 200, 150)
    n, m = torch.tensor([200, 65]), torch.tensor([130, 150])
    options = {"gamma": 0.2, "cost": cost, "divergence": divergence, **options}
    options |= {"weights": torch.tensor([1.0, -2.0]), "backend": "cpu"}
    want = value_and_gradients(x, y, n, m, **options)
    got = value_and_gradients(x, y, n, m, checkpointed=True, **options)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-5)


def test_checkpointed_hard_gradcheck_one_side_and_compiled():
    x, y = features(1, 70, 5, D=2, dtype=torch.float64)
    x.requires_grad_()
    for gamma in (0.3, 0.0):
        assert torch.autograd.gradcheck(
            lambda x: soft_dtw(x, y, gamma=gamma, divergence=True, checkpointed=True),  # noqa: B023
            x, fast_mode=True,
        )  # fmt: skip
    module = SoftDTW(gamma=0.1, checkpointed=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x, y), x)
    assert torch.equal(got, torch.autograd.grad(module(x, y), x)[0])


def test_checkpointed_saves_a_row_in_sqrt_of_n():
    from pi_finetune.soft_dtw import cpu

    product, state = cpu.saved_sizes(1, 20_000, 20_000, False, True, True, True)
    assert product == 0 and 8 * state < 20e6  # bytes; a matrix of float32 has 1.6e9
    with pytest.raises(ValueError, match="checkpointed=True needs the backend 'cpu'"):
        soft_dtw(*features(1, 5, 4), checkpointed=True, backend="reference")


# Pairs and gamma.


@pytest.mark.parametrize("divergence", [False, True])
def test_pairwise_is_every_pair(divergence):
    x, y = (z.requires_grad_() for z in (features(3, 20, 1)[0], features(4, 1, 15)[1]))
    n, m = torch.tensor([20, 3, 11]), torch.tensor([15, 15, 1, 8])
    options = {"gamma": 0.3, "divergence": divergence, "cost": "cosine", "step_penalty": 0.1}
    got = soft_dtw_pairwise(x, y, n, m, **options)
    want = torch.stack(
        [soft_dtw(x[a].expand(4, -1, -1), y, n[a].expand(4), m, **options) for a in range(3)]
    )
    assert_close("losses", got, want, 1e-6)
    weights = torch.randn(3, 4)
    gradients = [torch.autograd.grad((z * weights).sum(), (x, y)) for z in (got, want)]
    for a, b in zip(*gradients):
        assert_close("gradient", a, b, 1e-5)


@pytest.mark.parametrize("options", [{}, {"step_penalty": (0.1, 0.4, 0.0)}, {"open_end": True}])
@pytest.mark.parametrize("divergence", [False, True])
def test_pairwise_with_itself(options, divergence):
    if divergence and options.get("open_end"):
        pytest.skip("no divergence with open ends")
    x = features(4, 12, 1)[0].requires_grad_()
    n = torch.tensor([12, 3, 7, 12])
    options = {"gamma": 0.3, "divergence": divergence, **options}
    got, want = soft_dtw_pairwise(x, None, n, **options), soft_dtw_pairwise(x, x, n, n, **options)
    assert_close("losses", got, want, 1e-5)
    weights = torch.randn(4, 4)
    gradients = [torch.autograd.grad((z * weights).sum(), x)[0] for z in (got, want)]
    assert_close("gradient", *gradients, 1e-5)
    if divergence:
        assert got.diagonal().abs().max() < 1e-4


def test_pairwise_in_several_parts_empty_and_bad(monkeypatch):
    x, y = features(3, 9, 8)
    want = soft_dtw_pairwise(x, y, gamma=0.5)
    sizes, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda z, size: sizes.append(size) or split(z, 2))
    assert torch.equal(soft_dtw_pairwise(x, y, gamma=0.5), want) and sizes
    monkeypatch.undo()
    assert soft_dtw_pairwise(x[:0], y).shape == (0, 3)
    with pytest.raises(ValueError, match=r"agree in the feature axis"):
        soft_dtw_pairwise(x, y[..., :2])
    with pytest.raises(ValueError, match="y_lengths are given without y"):
        soft_dtw_pairwise(x, None, None, [9, 9, 9])
    with pytest.raises(ValueError, match="open_begin=True has no divergence"):
        soft_dtw_pairwise(x, y, divergence=True, open_begin=True)
    with pytest.raises(ValueError, match="x_lengths must have shape"):
        soft_dtw_pairwise(x, y, [9, 9])


def test_gamma_heuristic():
    x = torch.randn(3, 8, 2)
    frames = x[:, :5].reshape(-1, 2).double()
    distances = sorted(math.dist(a, b) for a, b in itertools.combinations(frames.tolist(), 2))
    middle = len(distances) // 2
    median = (distances[middle] + distances[~middle]) / 2
    got = gamma_heuristic(x, torch.tensor([8, 5, 7]))
    assert got == pytest.approx(2 * 5 * median**2)
    draw = [
        gamma_heuristic(x, samples=6, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]
    for bad, message in (
        ({"x": torch.zeros(2, 4, 3)}, "x gives a gamma of 0.0"),
        ({"x": x, "samples": 1}, "samples must be a whole number from 2, got 1"),
        ({"x": x[:0]}, "x must hold at least one sequence"),
        ({"x": x, "x_lengths": [8, 9, 0]}, "x_lengths must be from 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            gamma_heuristic(**bad)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"itakura": 0.5}, ValueError, "itakura must be a largest slope from 1 to 1000, got 0.5"),
        ({"itakura": "2"}, TypeError, "itakura must be a number, got str"),
        ({"itakura": 2, "bandwidth": 3}, ValueError, "itakura and bandwidth are two bands"),
        ({"step_penalty": -1}, ValueError, "step_penalty must be 0 or more and finite, got -1"),
        ({"step_penalty": float("inf")}, ValueError, "step_penalty must be 0 or more and finite"),
        ({"step_penalty": [1, 2]}, ValueError, "step_penalty must be one number or three"),
        ({"step_penalty": "1"}, TypeError, "step_penalty must be a number, got str"),
        ({"open_end": 1}, TypeError, "open_end must be True or False, got 1"),
        ({"open_end": True, "bandwidth": 3}, ValueError, "open_end=True lets a path leave the"),
        ({"open_begin": True, "itakura": 3}, ValueError, "open_begin=True lets a path leave the"),
        ({"open_begin": True, "divergence": True}, ValueError, "open_begin=True has no diverg"),
        ({"gamma": 0, "step_penalty": (0, 0, 1), "divergence": True}, ValueError, "step_penalty m"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, error, message):
    for function in (lambda: soft_dtw(*features(1, 5, 4), **options), lambda: SoftDTW(**options)):
        with pytest.raises(error, match=message):
            function()
