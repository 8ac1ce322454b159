"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference.

Not collected by itself: test_triton.py runs it in a process of its own, since the choice of the
interpreter is made when triton is first imported. One step of a kernel takes about a millisecond,
so shapes are small and blocks are cut to 32 rows where several strips are wanted.
"""

import pytest
import torch
from helpers import (
    assert_close,
    features,
    unit_features,
    value_and_alignment,
    value_and_gradients,
)

from pi_finetune.soft_dtw import alignment, soft_dtw, triton

COSTS = ["sqeuclidean", "cosine", "l1"]
SMALL = pytest.mark.parametrize(
    "N, M, bandwidth", [(1, 1, None), (1, 5, 0), (5, 1, 0), (6, 7, None), (9, 4, 0), (4, 9, 1)]
)


@SMALL
@pytest.mark.parametrize("gamma", [1.0, 1e-3])
def test_cost_matrices(N, M, bandwidth, gamma):
    cost = torch.rand(2, N, M) - 0.2
    n, m = torch.tensor([N, (N + 1) // 2]), torch.tensor([(M + 1) // 2, M])
    options = {"gamma": gamma, "bandwidth": bandwidth, "weights": torch.tensor([2.0, -0.5])}
    got = value_and_alignment(cost, n, m, backend="triton", **options)
    want = value_and_alignment(cost.double(), n, m, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@pytest.mark.parametrize(
    "N, M, bandwidth", [(33, 9, None), (70, 20, 2), (40, 40, 0), (65, 3, None)]
)
def test_several_strips(N, M, bandwidth, monkeypatch):
    monkeypatch.setattr(triton, "MAX_BLOCK", 32)
    cost = torch.rand(2, N, M)
    n = torch.tensor([N, 32])
    options = {"gamma": 0.1, "bandwidth": bandwidth}
    got = value_and_alignment(cost, n, backend="triton", **options)
    want = value_and_alignment(cost.double(), n, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


OPTIONS = [
    {"gamma": 0.0},
    {"step_penalty": (0.2, 0.5, 0.1)},
    {"open_begin": True, "step_penalty": (0.2, 0.5, 0.1)},
    {"open_end": True},
    {"open_begin": True, "open_end": True, "gamma": 0.0, "step_penalty": 0.2},
    {"itakura": 2.0, "step_penalty": 0.2},
    {"bandwidth": 2, "gamma": 0.0, "step_penalty": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=map(str, OPTIONS))
@pytest.mark.parametrize("N, M", [(1, 5), (7, 5), (34, 6)])
def test_options(options, N, M, monkeypatch):
    monkeypatch.setattr(triton, "MAX_BLOCK", 32)
    cost = torch.rand(2, N, M) - 0.2
    n, m = torch.tensor([N, (N + 1) // 2]), torch.tensor([(M + 1) // 2, M])
    options = {"gamma": 0.3, "weights": torch.tensor([2.0, -0.5]), **options}
    got = value_and_alignment(cost, n, m, backend="triton", **options)
    want = value_and_alignment(cost.double(), n, m, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=map(str, OPTIONS))
def test_options_of_features_in_float64(options):
    x, y = features(1, 6, 4, D=3, dtype=torch.float64)
    options = {"gamma": 0.3, **options}
    got = value_and_gradients(x, y, backend="triton", **options)
    want = value_and_gradients(x, y, backend="reference", **options)
    for a, b in zip(got, want):
        assert_close("float64", a, b, 1e-12)
    if not any("open" in name for name in options):
        got = value_and_gradients(x, y, divergence=True, backend="triton", **options)
        want = value_and_gradients(x, y, divergence=True, backend="reference", **options)
        for a, b in zip(got, want):
            assert_close("float64 divergence", a, b, 1e-12)


def test_float32_is_exact_at_length():
    """A cost of up to 200 over 600 steps: float32 R would be off by 1e-2 at this gamma."""
    cost = torch.rand(1, 300, 300) * 200
    got = value_and_alignment(cost, gamma=0.01, backend="triton")
    want = value_and_alignment(cost.double(), gamma=0.01, backend="reference")
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-4)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("divergence", [False, True])
def test_features(cost, divergence):
    x, y = features(2, 7, 9, D=4, offset=10.0)
    n, m = torch.tensor([7, 4]), torch.tensor([3, 9])
    options = {"gamma": 0.5, "cost": cost, "divergence": divergence}
    x[1, 4:], y[0, 3:] = float("nan"), float("inf")
    got = value_and_gradients(x, y, n, m, backend="triton", **options)
    want = value_and_gradients(x.double(), y.double(), n, m, backend="reference", **options)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-4)
    assert (got[1][1, 4:] == 0).all() and (got[2][0, 3:] == 0).all()


@pytest.mark.parametrize("asked", [0, 1])
def test_gradient_of_one_side_only(asked):
    x, y = features(2, 7, 5, D=4)
    want = value_and_gradients(x, y, divergence=True, backend="reference")
    (x, y)[asked].requires_grad_()
    soft_dtw(x, y, divergence=True, backend="triton").sum().backward()
    assert_close("gradient", (x, y)[asked].grad, want[1 + asked], 1e-5)
    assert (y, x)[asked].grad is None


def test_divergence_of_equals_is_0():
    x, _ = unit_features(1, 12, 1)
    loss, gx, gy = value_and_gradients(x, x, gamma=0.1, divergence=True, backend="triton")
    assert max(loss.abs().max(), gx.abs().max(), gy.abs().max()) < 1e-4


def test_nan_in_a_valid_frame_reaches_the_loss_and_no_other_item():
    x, y = features(2, 5, 4)
    x[0, 2, 1] = float("nan")
    loss = soft_dtw(x, y, backend="triton")
    assert loss[0].isnan() and loss[1].isfinite()


def test_float64_is_exact():
    x, y = features(1, 5, 4, D=3, dtype=torch.float64)
    got = value_and_gradients(x, y, gamma=0.1, divergence=True, backend="triton")
    want = value_and_gradients(x, y, gamma=0.1, divergence=True, backend="reference")
    for a, b in zip(got, want):
        assert_close("float64", a, b, 1e-12)


def test_half_empty_backward_twice_and_alignment():
    x, y = features(1, 5, 4, dtype=torch.bfloat16)
    loss, gx, _ = value_and_gradients(x, y, backend="triton")
    assert loss.dtype == torch.float32 and gx.dtype == torch.bfloat16
    empty, _, _ = value_and_gradients(torch.rand(0, 5, 3), torch.rand(0, 4, 3), backend="triton")
    assert empty.shape == (0,)
    x, y = (z.requires_grad_() for z in features(1, 5, 4))
    before = x.detach().clone(), y.detach().clone()
    loss = soft_dtw(x, y, backend="triton").sum()
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second[0].sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    e = alignment(x, y, backend="triton")
    assert_close("E", e, alignment(x.double(), y.double(), backend="reference"), 1e-5)
