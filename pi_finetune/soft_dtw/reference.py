"""Soft-DTW in plain PyTorch: the specification that the fast backends are tested against.

Any floating dtype, any device, no tricks. Every function takes padded batches and integer
lengths and never looks at padding. Shapes: B pairs, N frames of x, M frames of y, D features.
"""

import torch
import torch.nn.functional as F

from .cost import unit, unit_backward, zero_padding
from .recursion import Recursion

__all__ = [
    "CHECKPOINTS",
    "STATE_DTYPE",
    "backward",
    "band_mask",
    "cost_backward",
    "cost_forward",
    "cost_saved_sizes",
    "features_backward",
    "features_forward",
    "forward",
    "saved_sizes",
    "softmin",
]


STATE_DTYPE = None  # the inputs'
CHECKPOINTS = False


def band_mask(
    n: torch.Tensor, m: torch.Tensor, recursion: Recursion, N: int, M: int
) -> torch.Tensor:
    """Valid cells [B, N, M] of matrices padded to N x M: inside the lengths and the band.

    Bands follow the straight line from corner to corner, so they keep its slope when n != m. In
    Sakoe and Chiba's a cell (i, j) is inside if its distance to that line, in frames of the
    shorter sequence, is at most `bandwidth` plus the half frame that keeps the line connected.
    Itakura's parallelogram holds the cells that the lines from both corners with `itakura` times
    and 1 / `itakura` times that slope enclose, and the line itself (a band of width 0).
    In integers, hence the same on every device, and symmetric in x and y.
    """
    i = torch.arange(N, device=n.device)[None, :, None]
    j = torch.arange(M, device=n.device)[None, None, :]
    n, m = n.long()[:, None, None], m.long()[:, None, None]
    mask = (i < n) & (j < m)
    longest = torch.maximum(n, m) - 1
    if recursion.bandwidth is not None:
        width = (2 * recursion.bandwidth + 1) * longest
        mask &= 2 * (i * (m - 1) - j * (n - 1)).abs() <= width
    if recursion.itakura is not None:
        slope, end = recursion.itakura, (n - 1) * (m - 1)
        u, v = i * (m - 1), j * (n - 1)
        inside = (1000 * v <= slope * u) & (1000 * u <= slope * v)
        inside &= (1000 * (end - v) <= slope * (end - u)) & (1000 * (end - u) <= slope * (end - v))
        mask &= inside | (2 * (u - v).abs() <= longest)
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


def softmin(a: torch.Tensor, gamma: float, dim: int) -> torch.Tensor:
    """-gamma log sum exp(-a / gamma) over one axis; the minimum where gamma is 0."""
    return -gamma * torch.logsumexp(-a / gamma, dim) if gamma else a.amin(dim)


def softmin_weights(a, gamma):
    """Gradient of softmin over the first axis, 0 where all is infinite.

    A minimum that several share belongs to the first of them: a subgradient.
    """
    if gamma:
        return torch.softmax(-a / gamma, 0).nan_to_num(0.0)
    first = torch.zeros_like(a)
    taken = ~torch.isfinite(a.amin(0))
    for weight, is_least in zip(first, a == a.amin(0)):
        weight[is_least & ~taken] = 1
        taken = taken | is_least
    return first


def forward(
    cost: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] and R [B, N, M] of cost matrices [B, N, M].

    r[i, j] = d[i, j] + softmin(r[i-1, j-1] + diagonal, r[i-1, j] + down, r[i, j-1] + right)
    """
    B, N, M = cost.shape
    inf, steps = float("inf"), recursion
    d = skew(cost.masked_fill(~band_mask(n, m, recursion, N, M), inf), inf)
    r = torch.full_like(d, inf)
    one = two = d.new_full((B, N), inf)  # the last diagonal and the one before
    for t in range(N + M - 1):
        start = 0.0 if t == 0 or steps.open_begin else inf  # a start is no step
        diagonal = F.pad(two[:, :-1] + steps.diagonal, (1, 0), value=start)
        up = F.pad(one[:, :-1] + steps.down, (1, 0), value=inf)
        two, one = (
            one,
            d[t] + softmin(torch.stack([diagonal, up, one + steps.right]), steps.gamma, 0),
        )
        r[t] = one
    r = unskew(r, M)
    ends = r[torch.arange(B, device=r.device), n.long() - 1]
    if steps.open_end:
        return softmin(ends, steps.gamma, 1), r
    return ends.gather(1, m.long()[:, None] - 1)[:, 0], r


def backward(
    r: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion
) -> torch.Tensor:
    """Expected alignment E [B, N, M]: the gradient of each loss for its own cost matrix.

    A cell hands its E to its three predecessors in proportion to softmin's weights, the softmax
    of -r / gamma over them. Nearly all other code takes exp((r' - r - d) / gamma) instead: equal
    on paper, but those weights no longer sum to one in float32 once r has grown. `r` is infinite
    outside the band and the lengths, so nothing flows there.
    """
    B, N, M = r.shape
    above, steps = F.pad(r, (1, 0, 1, 0), value=float("inf")), recursion
    diagonal = above[:, :-1, :-1] + steps.diagonal
    diagonal[:, 0, : M if steps.open_begin else 1] = 0
    predecessors = [diagonal, above[:, :-1, 1:] + steps.down, above[:, 1:, :-1] + steps.right]
    weights = [skew(w, 0.0) for w in softmin_weights(torch.stack(predecessors), steps.gamma)]
    end, items = torch.zeros_like(r), torch.arange(B, device=r.device)
    if steps.open_end:
        end[items, n.long() - 1] = softmin_weights(r[items, n.long() - 1].T, steps.gamma).T
    else:
        end[items, n.long() - 1, m.long() - 1] = 1
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


def saved_sizes(
    B: int, N: int, M: int, divergence: bool, checkpointed: bool, x_grad: bool, y_grad: bool
) -> tuple[int, int]:
    """Elements of the two buffers that `features_forward` saves."""
    if not (x_grad or y_grad):
        return 0, 0
    return B * (N * M + (N * N + M * M if divergence else 0)), 0


def features_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    recursion: Recursion,
    cost: str,
    divergence: bool,
    checkpointed: bool,
    x_grad: bool,
    y_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [B] of features x [B, N, D] and y [B, M, D], and what the backward pass needs."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    loss, saved = x.new_zeros(len(x)), []
    for a, b, p, q, weight in _problems(x, y, n, m, divergence):
        value, r = forward(pairwise_cost(a, b, cost), p, q, recursion)
        loss = loss + weight * value
        saved.append(r.flatten())
    keep = x_grad or y_grad
    return loss, torch.cat(saved) if keep else x.new_empty(0), x.new_empty(0)


def features_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    saved: torch.Tensor,
    _: torch.Tensor,
    recursion: Recursion,
    cost: str,
    divergence: bool,
    checkpointed: bool,
    x_grad: bool,
    y_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of sum(grad * loss) for x and y (an empty tensor where not asked for)."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    gx, gy, start = torch.zeros_like(x), torch.zeros_like(y), 0
    targets = [(gx, gy), (gx, gx), (gy, gy)]
    for (a, b, p, q, weight), (ga, gb) in zip(_problems(x, y, n, m, divergence), targets):
        r = saved[start : start + len(x) * a.shape[1] * b.shape[1]]
        start += r.numel()
        e = backward(r.view(len(x), a.shape[1], b.shape[1]), p, q, recursion)
        da, db = pairwise_cost_backward(e * (weight * grad[:, None, None]), a, b, cost)
        ga += da
        gb += db
    return gx if x_grad else x.new_empty(0), gy if y_grad else y.new_empty(0)


def cost_saved_sizes(B: int, N: int, M: int, grad: bool) -> int:
    """As `saved_sizes`, for `cost_forward`."""
    return B * N * M if grad else 0


def cost_forward(
    d: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion, grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] of cost matrices d [B, N, M], and what the backward pass needs."""
    loss, r = forward(d, n, m, recursion)
    return loss, r.flatten() if grad else d.new_empty(0)


def cost_backward(
    grad: torch.Tensor,
    d: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    saved: torch.Tensor,
    recursion: Recursion,
) -> torch.Tensor:
    """Gradient of sum(grad * loss) for d; with grad = 1, the expected alignment."""
    return backward(saved.view(d.shape), n, m, recursion) * grad[:, None, None]
