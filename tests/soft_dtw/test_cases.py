"""The ways in which soft-DTW implementations are known to fail, one group of tests for each."""

import threading

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    by_hand,
    features,
    unit_features,
    value_and_alignment,
    value_and_gradients,
)

from pi_finetune.soft_dtw import alignment, soft_dtw, soft_dtw_from_cost
from pi_finetune.soft_dtw.recursion import Recursion
from pi_finetune.soft_dtw.reference import band_mask as reference_mask

COSTS = ["sqeuclidean", "cosine", "l1"]


def band_mask(n, m, bandwidth, N, M):
    return reference_mask(n, m, Recursion(bandwidth=bandwidth), N, M)


both = pytest.mark.parametrize("backend", ["reference", "cpu"])


# 1. Sequences of different lengths in a narrow band.


@both
@pytest.mark.parametrize("N, M", [(1, 1), (1, 6), (6, 1), (9, 9), (14, 5), (5, 14), (9, 8)])
@pytest.mark.parametrize("bandwidth", [None, 0, 1, 3])
def test_any_band_agrees_with_the_recursion_by_hand(backend, N, M, bandwidth):
    cost = torch.rand(1, N, M, dtype=torch.float64, requires_grad=True)
    inside = band_mask(torch.tensor([N]), torch.tensor([M]), bandwidth, N, M)[0]
    want = by_hand(cost[0], 0.3, lambda i, j: bool(inside[i, j]))
    (want_gradient,) = torch.autograd.grad(want, cost)
    got, gradient = value_and_alignment(cost, gamma=0.3, bandwidth=bandwidth, backend=backend)
    assert_close("loss", got, want[None], 1e-12)
    assert_close("gradient", gradient, want_gradient, 1e-12)


@both
def test_band_0_is_the_diagonal_and_a_wide_band_is_none(backend):
    cost = torch.rand(2, 70, 70, dtype=torch.float64)
    diagonal = soft_dtw_from_cost(cost, bandwidth=0, backend=backend)
    assert_close("loss", diagonal, cost.diagonal(dim1=1, dim2=2).sum(1), 1e-12)
    cost = torch.rand(2, 70, 30, dtype=torch.float64)
    wide = soft_dtw_from_cost(cost, bandwidth=99, backend=backend)
    assert_close("loss", wide, soft_dtw_from_cost(cost, backend=backend), 1e-12)


# 2. A band together with lengths.


@both
@pytest.mark.parametrize("bandwidth", [None, 0, 5])
@pytest.mark.parametrize("divergence", [False, True])
def test_item_in_a_padded_batch_equals_item_alone(backend, bandwidth, divergence):
    x, y = features(4, 80, 70)
    n, m = torch.tensor([80, 65, 1, 33]), torch.tensor([7, 70, 20, 1])
    options = {"gamma": 0.2, "bandwidth": bandwidth, "divergence": divergence, "backend": backend}
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    loss, gx, gy = value_and_gradients(x, y, n, m, weights=weights, **options)
    for b in range(4):
        alone = x[b : b + 1, : n[b]], y[b : b + 1, : m[b]]
        want = value_and_gradients(*alone, weights=weights[b], **options)
        assert_close("loss", loss[b : b + 1], want[0], 1e-5)
        assert_close("gradient of x", gx[b : b + 1, : n[b]], want[1], 1e-5)
        assert_close("gradient of y", gy[b : b + 1, : m[b]], want[2], 1e-5)


# 3. NaN from cells outside the band.


@both
@pytest.mark.parametrize("gamma", [1.0, 1e-3])
def test_backward_with_a_band_is_finite_and_zero_outside_it(backend, gamma):
    n, m = torch.tensor([150, 90]), torch.tensor([40, 131])
    _, e = value_and_alignment(
        torch.rand(2, 150, 131), n, m, gamma=gamma, bandwidth=2, backend=backend
    )
    assert torch.isfinite(e).all()
    assert (e[~band_mask(n, m, 2, 150, 131)] == 0).all()


# 4. Garbage in the padding.


@both
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("cost", COSTS)
def test_garbage_in_the_padding_changes_nothing(backend, garbage, cost):
    x, y = features(3, 40, 37)
    n, m = torch.tensor([40, 17, 3]), torch.tensor([20, 37, 1])
    options = {"gamma": 0.1, "cost": cost, "divergence": True, "backend": backend}
    want = value_and_gradients(x, y, n, m, **options)
    for z, lengths in ((x, n), (y, m)):
        for b, length in enumerate(lengths):
            z[b, length:] = garbage
    got = value_and_gradients(x, y, n, m, **options)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert torch.equal(a, b), name
    for gradient, lengths in ((got[1], n), (got[2], m)):
        for b, length in enumerate(lengths):
            assert (gradient[b, length:] == 0).all()
    matrix = torch.rand(3, 40, 37)
    inside = band_mask(n, m, None, 40, 37)
    _, e = value_and_alignment(matrix.masked_fill(~inside, garbage), n, m, backend=backend)
    assert torch.isfinite(e).all() and (e[~inside] == 0).all()


# 5. A backward pass that is not the derivative of the forward pass.


@both
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("bandwidth", [None, 1])
def test_gradcheck(backend, cost, divergence, bandwidth):
    x, y = (z.requires_grad_() for z in features(2, 6, 4, D=3, dtype=torch.float64))
    n, m = torch.tensor([6, 3]), torch.tensor([2, 4])

    def loss(x, y):
        return soft_dtw(
            x, y, n, m, gamma=0.5, bandwidth=bandwidth, cost=cost, divergence=divergence,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)


@both
def test_gradcheck_of_cost_matrices(backend):
    cost = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)  # any sign
    n, m = torch.tensor([5, 2]), torch.tensor([6, 7])
    assert torch.autograd.gradcheck(
        lambda c: soft_dtw_from_cost(c, n, m, gamma=0.2, backend=backend), cost
    )


# 6. Differentiating twice, or backward twice.


@both
def test_double_backward_raises(backend):
    x, y = (z.requires_grad_() for z in features(1, 5, 4))
    for loss, z in (
        (soft_dtw(x, y, backend=backend), x),
        (soft_dtw_from_cost(x, backend=backend), x),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.square().sum().backward()


@both
def test_backward_twice_gives_the_same(backend):
    x, y = (z.requires_grad_() for z in features(2, 70, 30))
    loss = soft_dtw(x, y, divergence=True, backend=backend).sum()
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# 7. float32 that drowns in R at length, or at a small gamma.


def long_cost(kind):
    if kind == "raw":
        return torch.rand(1, 1500, 1400) * 200
    x, y = unit_features(1, 1500, 1400)
    return torch.cdist(x, y).square()


@pytest.fixture(scope="module")
def cpu_float64_is_exact():
    """Ties the float64 CPU path, then used as the truth, to the reference at full length."""
    cost = torch.rand(
        1, 1500, 1400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    got = value_and_alignment(cost, gamma=0.01, backend="cpu")
    want = value_and_alignment(cost, gamma=0.01, backend="reference")
    assert_close("loss", got[0], want[0], 1e-12)
    assert_close("gradient", got[1], want[1], 1e-9)


@pytest.mark.parametrize("gamma", [1.0, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("kind", ["raw", "normalised"])
def test_float32_is_exact_at_length(gamma, kind, cpu_float64_is_exact):
    cost = long_cost(kind)
    got = value_and_alignment(cost, gamma=gamma, backend="cpu")
    want = value_and_alignment(cost.double(), gamma=gamma, backend="cpu")
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.1, 0.01])
def test_float32_gradients_of_features_are_exact_at_length(gamma):
    x, y = unit_features(1, 1500, 1400)
    got = value_and_gradients(x, y, gamma=gamma, backend="cpu")
    want = value_and_gradients(x.double(), y.double(), gamma=gamma, backend="cpu")
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-4)


# 8. The divergence.


@both
@pytest.mark.parametrize("cost", COSTS)
def test_divergence_is_its_definition_with_unequal_lengths(backend, cost):
    x, y = features(3, 33, 21, dtype=torch.float64)
    n, m = torch.tensor([33, 5, 12]), torch.tensor([2, 21, 12])
    options = {"gamma": 0.3, "cost": cost, "backend": backend}
    got = soft_dtw(x, y, n, m, divergence=True, **options)
    selves = soft_dtw(x, x, n, n, **options) + soft_dtw(y, y, m, m, **options)
    assert_close("loss", got, soft_dtw(x, y, n, m, **options) - selves / 2, 1e-12)


@both
@pytest.mark.parametrize("gamma", [1.0, 0.01])
def test_divergence_of_equals_is_0_and_so_is_its_gradient(backend, gamma):
    x, _ = unit_features(2, 90, 1)
    loss, gx, gy = value_and_gradients(x, x, gamma=gamma, divergence=True, backend=backend)
    plain = value_and_gradients(x, x + 0.1, gamma=gamma, backend=backend)
    assert loss.abs().max() <= 1e-5 * plain[0].abs().max()
    assert max(gx.abs().max(), gy.abs().max()) <= 1e-5 * plain[1].abs().max()


@both
def test_divergence_is_symmetric_and_not_negative(backend):
    x, y = features(8, 24, 35)
    for noise in (1.0, 1e-2, 1e-4):
        z = torch.nn.functional.interpolate(x.transpose(1, 2), 35).transpose(1, 2)
        z = z + noise * (y - z)
        loss = soft_dtw(x, z, gamma=0.5, divergence=True, backend=backend)
        swapped = soft_dtw(z, x, gamma=0.5, divergence=True, backend=backend)
        assert_close("swapped", swapped, loss, 1e-5)
        assert (loss >= -1e-4).all()


# 9. Half precision and autocast.


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(backend, dtype):
    x, y = features(2, 70, 40, dtype=dtype)
    loss, gx, gy = value_and_gradients(x, y, gamma=0.1, backend=backend)
    want = value_and_gradients(x.float(), y.float(), gamma=0.1, backend=backend)
    assert loss.dtype == torch.float32 and gx.dtype == gy.dtype == dtype
    assert torch.equal(loss, want[0])
    assert torch.equal(gx, want[1].to(dtype)) and torch.equal(gy, want[2].to(dtype))
    e = value_and_alignment(torch.rand(1, 9, 9, dtype=dtype), backend=backend)[1]
    assert e.dtype == dtype


@both
def test_autocast_does_not_reach_the_cost(backend):
    x, y = features(2, 40, 30)
    want = value_and_gradients(x, y, gamma=0.1, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradients(x, y, gamma=0.1, backend=backend)
        mixed = soft_dtw(x.bfloat16(), y, gamma=0.1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert mixed.dtype == torch.float32


# 10. Sizes at the seams of blocks, strips and tiles.


@pytest.mark.parametrize(
    "N, M",
    [(1, 1), (1, 40), (40, 1), (2, 3), (31, 33), (32, 64), (33, 32), (63, 65), (64, 64), (65, 127),
     (128, 129), (200, 31), (1023, 40), (30, 1024), (1025, 64), (70, 1500)],
)  # fmt: skip
def test_sizes_at_the_seams(N, M):
    cost = torch.rand(2, N, M)
    n, m = torch.tensor([N, (N + 1) // 2]), torch.tensor([(M + 1) // 2, M])
    weights = torch.tensor([2.0, -0.5])
    got = value_and_alignment(cost, n, m, gamma=0.1, weights=weights, backend="cpu")
    want = value_and_alignment(cost.double(), n, m, gamma=0.1, weights=weights, backend="reference")
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@both
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("divergence", [False, True])
def test_features_agree_with_the_float64_reference(backend, cost, divergence):
    x, y = features(3, 130, 70)
    n, m = torch.tensor([130, 64, 65]), torch.tensor([2, 70, 69])
    options = {"gamma": 0.2, "cost": cost, "divergence": divergence}
    got = value_and_gradients(x, y, n, m, backend=backend, **options)
    want = value_and_gradients(x.double(), y.double(), n, m, backend="reference", **options)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-5)


@both
@pytest.mark.parametrize("divergence", [False, True])
def test_empty_batch(backend, divergence):
    loss, gx, _ = value_and_gradients(
        torch.rand(0, 5, 3), torch.rand(0, 4, 3), divergence=divergence, backend=backend
    )
    assert loss.shape == (0,) and gx.shape == (0, 5, 3)
    loss, e = value_and_alignment(torch.rand(0, 5, 4), backend=backend)
    assert loss.shape == (0,) and e.shape == (0, 5, 4)


@both
def test_inputs_need_not_be_contiguous(backend):
    x, y = features(2, 40, 30)
    want = value_and_gradients(x, y, divergence=True, backend=backend)
    strided = (z.permute(2, 1, 0).contiguous().permute(2, 1, 0) for z in (x, y))
    x, y = (z.requires_grad_() for z in strided)
    loss = soft_dtw(x, y, divergence=True, backend=backend)
    loss.sum().backward()
    for a, b in zip((loss, x.grad, y.grad), want):
        assert_close("strided", a, b, 1e-6)
    cost = torch.rand(2, 30, 40)
    turned = cost.transpose(1, 2)
    a, b = (value_and_alignment(c, backend=backend) for c in (turned, turned.contiguous()))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@both
@pytest.mark.parametrize("length", [0, 6, -1])
def test_length_outside_the_sequence_is_an_error(backend, length):
    x, y = features(2, 5, 4)
    with pytest.raises(ValueError, match=rf"x_lengths\[1\] is {length}, but must be from 1 to 5"):
        soft_dtw(x, y, torch.tensor([5, length]), backend=backend)
    with pytest.raises(ValueError, match=r"y_lengths\[0\]"):
        soft_dtw_from_cost(torch.rand(1, 9, 5), None, torch.tensor([length]), backend=backend)


# 11. The caller's tensors.


@both
def test_inputs_are_not_written(backend):
    x, y = features(3, 70, 30)
    n, m = torch.tensor([70, 4, 6]), torch.tensor([30, 30, 1])
    cost = torch.rand(3, 70, 30)
    inputs = x, y, n, m, cost
    before, versions = [z.clone() for z in inputs], [z._version for z in inputs]
    for z in (x, y, cost):
        z.requires_grad_()
    soft_dtw(x, y, n, m, bandwidth=3, divergence=True, backend=backend).sum().backward()
    soft_dtw_from_cost(cost, n, m, bandwidth=3, backend=backend).sum().backward()
    alignment(x, y, n, m, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert [z._version for z in inputs] == versions


# 12. Compilers, shape-only tensors and large offsets. (Streams and devices: test_gpu.py.)


@both
@pytest.mark.parametrize("y_grad", [False, True])
def test_compiles_into_one_graph_for_all_shapes(backend, y_grad):
    def loss(x, y, n):
        return soft_dtw(x * 2, y, n, gamma=0.1, divergence=True, backend=backend).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for N, M in ((20, 10), (70, 30)):
        results = []
        for function in (compiled, loss):
            torch.manual_seed(N)
            x, y = features(2, N, M)
            x.requires_grad_(), y.requires_grad_(y_grad)
            value = function(x, y, torch.tensor([N, 4]))
            value.backward()
            results.append((value.detach(), x.grad, y.grad if y_grad else value.detach()))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@both
def test_operators_pass_opcheck(backend):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, y = (z.requires_grad_() for z in features(2, 7, 5))
    n = torch.tensor([7, 3])
    for divergence, y_grad in ((False, True), (True, True), (True, False)):
        torch.library.opcheck(
            torch.ops.pi_finetune.soft_dtw.default,
            (x, y.detach().requires_grad_(y_grad), n, None, backend, "sqeuclidean", divergence,
             False, *Recursion(0.5), False, True, y_grad),
            test_utils=tests,
        )  # fmt: skip
    torch.library.opcheck(
        torch.ops.pi_finetune.soft_dtw_from_cost.default,
        (
            torch.rand(2, 7, 5, requires_grad=True),
            n,
            None,
            backend,
            *Recursion(0.5, 1),
            False,
            True,
        ),
        test_utils=tests,
    )


def test_offsets_past_2_to_the_31():
    try:  # 12.9 GB of address space, of which a few pages are ever touched
        cost = torch.from_numpy(np.zeros((3, 1 << 15, 1 << 15), np.float32))
    except MemoryError:
        pytest.skip("the operating system does not hand out 12.9 GB of untouched memory")
    cost[2, :2, :2] = torch.tensor([[1.0, 9.0], [9.0, 2.0]])
    two = torch.tensor([2, 2, 2])
    got = soft_dtw_from_cost(cost, two, two, gamma=0.01, backend="cpu")
    assert_close("loss", got[2], torch.tensor(3.0), 1e-6)


# 13. Features with an offset, the limit of hard DTW, gradients only where asked.


def test_features_with_an_offset():
    x, y = unit_features(2, 200, 180)
    x, y = x + 10, y + 10
    got = value_and_gradients(x, y, gamma=0.1, backend="cpu")
    want = value_and_gradients(x.double(), y.double(), gamma=0.1, backend="reference")
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-4)


@both
def test_small_gamma_is_hard_dtw(backend):
    cost = torch.rand(1, 40, 33)
    hard = np.full((41, 34), np.inf)
    hard[0, 0] = 0
    for i in range(40):
        for j in range(33):
            hard[i + 1, j + 1] = float(cost[0, i, j]) + hard[i : i + 2, j : j + 2].ravel()[:3].min()
    loss, e = value_and_alignment(cost, gamma=1e-6, backend=backend)
    assert_close("loss", loss, torch.tensor([hard[-1, -1]]), 1e-5)
    assert ((e < 1e-3) | (e > 0.999)).all()  # one path


@both
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("divergence", [False, True])
def test_gradients_only_where_asked(backend, cost, divergence):
    x, y = features(2, 70, 30)
    options = {"cost": cost, "divergence": divergence, "backend": backend}
    _, *want = value_and_gradients(x, y, **options)
    for asked in (0, 1):
        a, b = x.clone(), y.clone()
        (a, b)[asked].requires_grad_()
        soft_dtw(a, b, **options).sum().backward()
        assert_close("gradient", (a, b)[asked].grad, want[asked], 1e-6)
        assert (b, a)[asked].grad is None
    assert not soft_dtw(x, y, **options).requires_grad
    with torch.no_grad():
        assert not soft_dtw(x.clone().requires_grad_(), y, **options).requires_grad


# 14. Races. No kernel here synchronises between programs; the CPU backend runs on threads.


def test_repeats_and_concurrent_callers_are_bit_identical():
    x, y = features(5, 150, 140)
    n = torch.tensor([150, 3, 64, 65, 128])
    want = value_and_gradients(x, y, n, gamma=0.1, divergence=True, backend="cpu")
    wrong = []

    def work():
        for _ in range(10):
            got = value_and_gradients(x, y, n, gamma=0.1, divergence=True, backend="cpu")
            wrong.extend(1 for a, b in zip(got, want) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
