"""Soft-DTW once more, cell by cell as the papers write it, and asserts that name what is off."""

import torch
import torch.nn.functional as F

from pi_finetune.soft_dtw import soft_dtw, soft_dtw_from_cost


def by_hand(cost, gamma, inside=lambda i, j: True):
    """Loss of one cost matrix [N, M] through autograd alone; `inside` is the band."""
    r = {(-1, -1): cost.new_zeros(())}
    for i in range(cost.shape[0]):
        for j in range(cost.shape[1]):
            if inside(i, j):
                before = [r[c] for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if c in r]
                if before:
                    softmin = -gamma * torch.logsumexp(-torch.stack(before) / gamma, 0)
                    r[i, j] = cost[i, j] + softmin
    return r[cost.shape[0] - 1, cost.shape[1] - 1]


def assert_close(name, got, want, tolerance):
    """Largest error, relative to the largest entry of `want`, at most `tolerance`."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, want {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if want.numel():
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
        assert error <= tolerance, f"{name} is off by {error:.1e}, allowed {tolerance:.0e}"


def features(B, N, M, D=8, dtype=torch.float32, offset=0.0):
    """Two batches that resemble sequences: neighbouring frames are alike."""
    x, y = (torch.randn(B, L, D).cumsum(1) / L**0.5 + torch.randn(B, L, D) / 4 for L in (N, M))
    return (x + offset).to(dtype), (y + offset).to(dtype)


def unit_features(B, N, M, D=64):
    return tuple(F.normalize(torch.randn(B, L, D), dim=-1) for L in (N, M))


def value_and_gradients(x, y, *lengths, weights=None, **options):
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    loss = soft_dtw(x, y, *lengths, **options)
    (loss if weights is None else loss * weights.to(loss)).sum().backward()
    return loss.detach(), x.grad, y.grad


def value_and_alignment(cost, *lengths, weights=None, **options):
    cost = cost.detach().clone().requires_grad_()
    loss = soft_dtw_from_cost(cost, *lengths, **options)
    (loss if weights is None else loss * weights.to(loss)).sum().backward()
    return loss.detach(), cost.grad
