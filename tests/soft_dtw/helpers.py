"""Soft-DTW once more, cell by cell as the papers write it, and asserts that name what is off."""

import itertools

import torch
import torch.nn.functional as F

from pi_finetune.soft_dtw import soft_dtw, soft_dtw_from_cost
from pi_finetune.soft_dtw.recursion import Recursion
from pi_finetune.soft_dtw.reference import band_mask


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


def all_paths(mask, open_begin=False, open_end=False):
    """Every path of cells where mask [N, M] holds, as soft_dtw defines one."""
    N, M = mask.shape

    def onward(path):
        i, j = path[-1]
        if i == N - 1 and (j == M - 1 or open_end):
            yield path
        for cell in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if cell[0] < N and cell[1] < M and mask[cell]:
                yield from onward([*path, cell])

    starts = range(M) if open_begin else [0]
    return [path for j in starts if mask[0, j] for path in onward([(0, j)])]


def over_all_paths(
    cost, gamma, bandwidth=None, itakura=None, step_penalty=0.0, open_begin=False, open_end=False
):
    """Loss and expected alignment of one cost matrix [N, M], path by path."""
    N, M = cost.shape
    recursion = Recursion(
        bandwidth=bandwidth, itakura=None if itakura is None else round(1000 * itakura)
    )
    mask = band_mask(torch.tensor([N]), torch.tensor([M]), recursion, N, M)[0]
    penalties = step_penalty if isinstance(step_penalty, tuple) else (step_penalty,) * 2 + (0.0,)
    price = dict(zip(((1, 0), (0, 1), (1, 1)), penalties))
    paths, totals = all_paths(mask, open_begin, open_end), []
    for path in paths:
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(path)]
        totals.append(sum(cost[cell] for cell in path) + sum(price[step] for step in steps))
    totals, e = torch.stack(totals), torch.zeros_like(cost)
    if gamma == 0:
        weights = (torch.arange(len(paths)) == totals.argmin()).to(cost.dtype)
        loss = totals.min()
    else:
        weights = torch.softmax(-totals / gamma, 0)
        loss = -gamma * torch.logsumexp(-totals / gamma, 0)
    for path, weight in zip(paths, weights):
        for cell in path:
            e[cell] += weight
    return loss, e
