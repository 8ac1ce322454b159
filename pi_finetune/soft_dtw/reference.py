"""Soft-DTW in plain PyTorch: the specification that the fast backends are tested against.

Any floating dtype, any device, no tricks. Every function takes padded batches and integer
lengths and never looks at padding. Shapes: B pairs, N frames of x, M frames of y, D features.
"""

import torch
import torch.nn.functional as F

from .cost import unit, unit_backward, zero_padding

STATE_DTYPE = None  # the inputs'


def band_mask(n, m, bandwidth, N, M):
    """Valid cells [B, N, M] of matrices padded to N x M: inside the lengths and the band.

    The band is Sakoe and Chiba's around the straight line from corner to corner, so it follows
    the slope when n != m. A cell (i, j) is inside if its distance to that line, in frames of the
    shorter sequence, is at most `bandwidth` plus the half frame that keeps the line connected.
    In integers, hence the same on every device, and symmetric in x and y.
    """
    i = torch.arange(N, device=n.device)[None, :, None]
    j = torch.arange(M, device=n.device)[None, None, :]
    n, m = n.long()[:, None, None], m.long()[:, None, None]
    mask = (i < n) & (j < m)
    if bandwidth is not None:
        longest = torch.maximum(n, m) - 1
        mask &= 2 * (i * (m - 1) - j * (n - 1)).abs() <= (2 * bandwidth + 1) * longest
    return mask


def pairwise_cost(x, y, cost, block=16):
    """Cost [B, N, M] of every pair of frames of x [B, N, D] and y [B, M, D].

    Differences are formed before anything is summed, so nothing cancels; `block` rows of x at a
    time bound the memory to B * block * M * D.
    """
    if cost == "cosine":
        return 1 - unit(x) @ unit(y).transpose(1, 2)
    rows = []
    for part in x.split(block, dim=1):
        difference = part[:, :, None] - y[:, None]
        rows.append((difference.square() if cost == "sqeuclidean" else difference.abs()).sum(-1))
    return torch.cat(rows, 1)


def pairwise_cost_backward(e, x, y, cost, block=16):
    """Gradients of sum(e * pairwise_cost(x, y)) for x and y, given e [B, N, M]."""
    if cost == "cosine":
        u, v = unit(x), unit(y)
        return unit_backward(-(e @ v), x), unit_backward(-(e.transpose(1, 2) @ u), y)
    gx, gy = [], torch.zeros_like(y)
    for part, e_part in zip(x.split(block, dim=1), e.split(block, dim=1)):
        difference = part[:, :, None] - y[:, None]
        slope = 2 * difference if cost == "sqeuclidean" else difference.sign()
        flow = e_part[..., None] * slope
        gx.append(flow.sum(2))
        gy -= flow.sum(1)
    return torch.cat(gx, 1), gy


def skew(a, fill):
    """[B, N, M] -> [N + M - 1, B, N] with out[t, b, i] = a[b, i, t - i]: anti-diagonals first."""
    B, N, M = a.shape
    flat = F.pad(a, (0, N), value=fill).flatten(1)[:, : N * (M + N - 1)]
    return flat.view(B, N, M + N - 1).permute(2, 0, 1).contiguous()


def unskew(s, M):
    """The inverse of `skew`."""
    T, B, N = s.shape
    return F.pad(s.permute(1, 2, 0).flatten(1), (0, N)).view(B, N, T + 1)[..., :M].contiguous()


def forward(cost, n, m, gamma, bandwidth=None):
    """Loss [B] and R [B, N, M], r[i, j] = d[i, j] + softmin(r[i-1, j-1], r[i-1, j], r[i, j-1])."""
    B, N, M = cost.shape
    inf = float("inf")
    d = skew(cost.masked_fill(~band_mask(n, m, bandwidth, N, M), inf), inf)
    r = torch.full_like(d, inf)
    one = two = d.new_full((B, N), inf)  # the last diagonal and the one before
    for t in range(N + M - 1):
        diagonal = F.pad(two[:, :-1], (1, 0), value=0.0 if t == 0 else inf)
        up = F.pad(one[:, :-1], (1, 0), value=inf)
        softmin = -gamma * torch.logsumexp(-torch.stack([diagonal, up, one]) / gamma, 0)
        two, one = one, d[t] + softmin
        r[t] = one
    r = unskew(r, M)
    return r[torch.arange(B, device=r.device), n.long() - 1, m.long() - 1], r


def backward(r, n, m, gamma):
    """Expected alignment E [B, N, M]: the gradient of each loss for its own cost matrix.

    A cell hands its E to its three predecessors in proportion to softmin's weights, the softmax
    of -r / gamma over them. Nearly all other code takes exp((r' - r - d) / gamma) instead: equal
    on paper, but those weights no longer sum to one in float32 once r has grown. `r` is infinite
    outside the band and the lengths, so nothing flows there.
    """
    B, N, M = r.shape
    above = F.pad(r, (1, 0, 1, 0), value=float("inf"))
    above[:, 0, 0] = 0
    predecessors = torch.stack([above[:, :-1, :-1], above[:, :-1, 1:], above[:, 1:, :-1]])
    weights = [skew(w, 0.0) for w in torch.softmax(-predecessors / gamma, 0).nan_to_num(0.0)]
    end = torch.zeros_like(r)
    end[torch.arange(B, device=r.device), n.long() - 1, m.long() - 1] = 1
    e = skew(end, 0.0)
    for t in range(N + M - 2, 0, -1):  # a cell on diagonal t gives to t - 1 and t - 2
        diagonal, up, left = (w[t] * e[t] for w in weights)
        e[t - 1] += left + F.pad(up[:, 1:], (0, 1))
        if t >= 2:
            e[t - 2] += F.pad(diagonal[:, 1:], (0, 1))
    return unskew(e, M)


# What the dispatcher calls. The divergence is three problems per pair, each with its own weight.


def _problems(x, y, n, m, divergence):
    problems = [(x, y, n, m, 1.0)]
    if divergence:
        problems += [(x, x, n, n, -0.5), (y, y, m, m, -0.5)]
    return problems


def saved_sizes(B, N, M, divergence, x_grad, y_grad):
    """Elements of the two buffers that `features_forward` saves."""
    if not (x_grad or y_grad):
        return 0, 0
    return B * (N * M + (N * N + M * M if divergence else 0)), 0


def features_forward(x, y, n, m, gamma, bandwidth, cost, divergence, x_grad, y_grad):
    """Loss [B] of features x [B, N, D] and y [B, M, D], and what the backward pass needs."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    loss, saved = x.new_zeros(len(x)), []
    for a, b, p, q, weight in _problems(x, y, n, m, divergence):
        value, r = forward(pairwise_cost(a, b, cost), p, q, gamma, bandwidth)
        loss = loss + weight * value
        saved.append(r.flatten())
    keep = x_grad or y_grad
    return loss, torch.cat(saved) if keep else x.new_empty(0), x.new_empty(0)


def features_backward(
    grad, x, y, n, m, saved, _, gamma, bandwidth, cost, divergence, x_grad, y_grad
):
    """Gradients of sum(grad * loss) for x and y (an empty tensor where not asked for)."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    gx, gy, start = torch.zeros_like(x), torch.zeros_like(y), 0
    targets = [(gx, gy), (gx, gx), (gy, gy)]
    for (a, b, p, q, weight), (ga, gb) in zip(_problems(x, y, n, m, divergence), targets):
        r = saved[start : start + len(x) * a.shape[1] * b.shape[1]]
        start += r.numel()
        e = backward(r.view(len(x), a.shape[1], b.shape[1]), p, q, gamma)
        da, db = pairwise_cost_backward(e * (weight * grad[:, None, None]), a, b, cost)
        ga += da
        gb += db
    return gx if x_grad else x.new_empty(0), gy if y_grad else y.new_empty(0)


def cost_saved_sizes(B, N, M, grad):
    """As `saved_sizes`, for `cost_forward`."""
    return B * N * M if grad else 0


def cost_forward(d, n, m, gamma, bandwidth, grad):
    """Loss [B] of cost matrices d [B, N, M], and what the backward pass needs."""
    loss, r = forward(d, n, m, gamma, bandwidth)
    return loss, r.flatten() if grad else d.new_empty(0)


def cost_backward(grad, d, n, m, saved, gamma, bandwidth):
    """Gradient of sum(grad * loss) for d; with grad = 1, the expected alignment."""
    return backward(saved.view(d.shape), n, m, gamma) * grad[:, None, None]
