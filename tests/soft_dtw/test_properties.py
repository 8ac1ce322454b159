"""What must hold for any input, with inputs drawn by Hypothesis."""

import math

import pytest
import torch
from helpers import assert_close, features, value_and_alignment
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_finetune.soft_dtw import soft_dtw, soft_dtw_from_cost

fast = settings(max_examples=25, deadline=None, derandomize=True)
size = st.integers(1, 80)
gammas = st.sampled_from([2.0, 0.3, 0.01])
bands = st.sampled_from([None, 0, 2, 9])
backends = pytest.mark.parametrize("backend", ["cpu"])


@fast
@given(size, size, gammas, bands, st.integers(0, 99))
def test_backends_agree(N, M, gamma, bandwidth, seed):
    torch.manual_seed(seed)
    cost = torch.rand(2, N, M)
    n, m = torch.randint(1, N + 1, (2,)), torch.randint(1, M + 1, (2,))
    options = {"gamma": gamma, "bandwidth": bandwidth}
    got = value_and_alignment(cost, n, m, backend="cpu", **options)
    want = value_and_alignment(cost.double(), n, m, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-5)


@fast
@given(size, size, gammas, bands, st.integers(0, 99))
def test_transposed_cost(N, M, gamma, bandwidth, seed):
    torch.manual_seed(seed)
    cost = torch.rand(1, N, M, dtype=torch.float64)
    options = {"gamma": gamma, "bandwidth": bandwidth, "backend": "cpu"}
    loss, e = value_and_alignment(cost, **options)
    turned, e_turned = value_and_alignment(cost.transpose(1, 2), **options)
    assert_close("loss", turned, loss, 1e-12)
    assert_close("alignment", e_turned.transpose(1, 2), e, 1e-9)


@fast
@given(
    size, size, st.sampled_from(["sqeuclidean", "cosine", "l1"]), st.booleans(), st.integers(0, 99)
)
def test_swapped_sequences(N, M, cost, divergence, seed):
    torch.manual_seed(seed)
    x, y = features(1, N, M, dtype=torch.float64)
    options = {"gamma": 0.4, "cost": cost, "divergence": divergence, "backend": "cpu"}
    assert_close("loss", soft_dtw(y, x, **options) + 1, soft_dtw(x, y, **options) + 1, 1e-9)


@fast
@given(size, size, st.integers(0, 90), st.integers(0, 90), bands, st.integers(0, 99))
def test_padding(N, M, more_x, more_y, bandwidth, seed):
    torch.manual_seed(seed)
    cost = torch.rand(1, N, M, dtype=torch.float64)
    padded = torch.nn.functional.pad(cost, (0, more_y, 0, more_x), value=float("nan"))
    options = {"gamma": 0.1, "bandwidth": bandwidth, "backend": "cpu"}
    want = value_and_alignment(cost, **options)
    got = value_and_alignment(padded, torch.tensor([N]), torch.tensor([M]), **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1][:, :N, :M], want[1])
    assert (got[1].sum() - want[1].sum()).abs() < 1e-9


@fast
@given(st.permutations(range(5)), st.integers(0, 99))
def test_permuted_batch(order, seed):
    torch.manual_seed(seed)
    x, y = features(5, 70, 30)
    n, m = torch.randint(1, 71, (5,)), torch.randint(1, 31, (5,))
    loss = soft_dtw(x, y, n, m, divergence=True, backend="cpu")
    permuted = soft_dtw(x[order], y[order], n[order], m[order], divergence=True, backend="cpu")
    assert torch.equal(permuted, loss[order])


@fast
@given(size, size, st.sampled_from([5.0, 1.0, 0.1]), st.floats(0, 2))
def test_constant_cost_counts_paths(N, M, gamma, cost):
    """-gamma log of the number of paths, each weighted by its length: Delannoy's, if cost = 0."""
    a, b = N - 1, M - 1
    logs = [
        math.lgamma(a + b - d + 1) - math.lgamma(d + 1) - math.lgamma(a - d + 1)
        - math.lgamma(b - d + 1) - cost * (a + b - d + 1) / gamma
        for d in range(min(a, b) + 1)
    ]  # fmt: skip
    want = -gamma * torch.logsumexp(torch.tensor(logs, dtype=torch.float64), 0)
    got = soft_dtw_from_cost(torch.full((1, N, M), cost, dtype=torch.float64), gamma=gamma)
    assert_close("loss", got + 1, want[None] + 1, 1e-9)


@fast
@given(size, size, st.integers(0, 99))
def test_gamma_to_zero_approaches_hard_dtw_from_below(N, M, seed):
    torch.manual_seed(seed)
    cost = torch.rand(1, N, M, dtype=torch.float64)
    hard = soft_dtw_from_cost(cost, gamma=1e-9)
    values = [soft_dtw_from_cost(cost, gamma=gamma) for gamma in (1.0, 0.1, 0.01)]
    for lower, upper in zip(values, [*values[1:], hard]):
        assert lower <= upper + 1e-9
    # At most gamma * log(number of paths) below; there are at most 3^(N + M) of them.
    assert hard - values[-1] <= 0.01 * (N + M) * math.log(3) + 1e-9


@fast
@given(size, size, gammas, bands, st.integers(0, 99))
def test_alignment_visits_every_frame(N, M, gamma, bandwidth, seed):
    torch.manual_seed(seed)
    _, e = value_and_alignment(torch.rand(1, N, M), gamma=gamma, bandwidth=bandwidth)
    assert_close("corners", e[0, [0, -1], [0, -1]], torch.ones(2), 1e-5)
    assert (e >= 0).all() and (e <= 1 + 1e-5).all()
    assert (e.sum(1) >= 1 - 1e-5).all() and (e.sum(2) >= 1 - 1e-5).all()
