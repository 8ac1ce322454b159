"""The examples of tslearn's soft-DTW, with ours in the place of theirs: `make benchmarks-test`."""

import numpy as np
import pytest
import torch

from pi_finetune.soft_dtw import (
    alignment,
    dtw_path,
    gamma_heuristic,
    soft_dtw,
    soft_dtw_from_cost,
    soft_dtw_pairwise,
)

tslearn = pytest.importorskip("tslearn.metrics")


def series(*values):
    return torch.tensor(values, dtype=torch.float64)[:, :, None]


@pytest.mark.parametrize(
    "x, y, gamma",
    [
        ([1, 2, 2, 3], [1.0, 2.0, 3.0, 4.0], 1.0),
        ([1, 2, 3, 3], [1.0, 2.0, 2.1, 3.2], 0.01),
        ([1, 2, 3], [1.0, 2.0, 2.0, 3.0, 4.0], 0.1),
        ([1, 2, 2, 3], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_soft_dtw_and_alignment(x, y, gamma):
    want = tslearn.soft_dtw(np.array(x, float), np.array(y), gamma=gamma)
    got = soft_dtw(series(x), series(y), gamma=gamma).item()
    # With gamma = 0 theirs is DTW, the square root of the sum, squared again.
    assert got == pytest.approx(want, abs=1e-9)
    if gamma:
        path, _ = tslearn.soft_dtw_alignment(np.array(x, float), np.array(y), gamma=gamma)
        assert np.allclose(alignment(series(x), series(y), gamma=gamma)[0], path, atol=1e-6)


def test_pairwise_plain_and_normalised():
    x, y = series([1, 2, 2, 3], [1.0, 2.0, 3.0, 4.0]), series([1, 2, 2, 3], [5.0, 1.0, 3.0, 4.0])
    for gamma in (0.01, 1.0):
        want = tslearn.cdist_soft_dtw(x.numpy(), y.numpy(), gamma=gamma)
        assert np.allclose(soft_dtw_pairwise(x, y, gamma=gamma), want)
        want = tslearn.cdist_soft_dtw_normalized(x.numpy(), gamma=gamma)
        assert np.allclose(soft_dtw_pairwise(x, divergence=True, gamma=gamma), want, atol=1e-9)


def test_gradient_of_the_torch_loss():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, n, 2, generator=rng, dtype=torch.float64) for n in (9, 7))
    loss = tslearn.SoftDTWLossPyTorch(gamma=0.5)
    gradients = []
    for function in (lambda a: loss(a, y).mean(), lambda a: soft_dtw(a, y, gamma=0.5).mean()):
        a = x.clone().requires_grad_()
        function(a).backward()
        gradients.append(a.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_hard_dtw_and_its_path():
    rng = np.random.RandomState(0)
    x, y = rng.randn(11, 2), rng.randn(8, 2)
    path, distance = tslearn.dtw_path(x, y)
    loss, (ours,) = dtw_path(torch.tensor(x)[None], torch.tensor(y)[None])
    assert loss.item() == pytest.approx(distance**2)
    assert ours.tolist() == [list(cell) for cell in path]


def test_costs_given():
    d = np.random.RandomState(0).rand(6, 5)
    want = tslearn.SoftDTW(d.copy(), gamma=0.3).compute()
    assert soft_dtw_from_cost(torch.tensor(d)[None], gamma=0.3).item() == pytest.approx(want)


def test_gamma_heuristic():
    """Theirs draws with a generator of NumPy's: all frames at once leave nothing to chance."""
    x = np.random.RandomState(0).randn(5, 6, 2)
    want = tslearn.gamma_soft_dtw(x, n_samples=30, random_state=0)
    assert gamma_heuristic(torch.tensor(x), samples=30) == pytest.approx(want)
