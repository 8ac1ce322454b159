"""Soft-DTW on GPUs in Triton: one program per pair, all pairs of a divergence in one launch.

A program holds BLOCK rows in registers, one lane per row, and lane k runs k columns behind lane 0,
so that each step advances an anti-diagonal: the upper neighbours are the lanes shifted by one, one
tl.gather. Longer sequences take several such strips one after the other; the last row of one is
handed to the next through global memory.

The state is not R, which grows with the path until float32 no longer resolves the differences
that the softmin sees, but those differences themselves:

    h[i, j] = r[i, j] - r[i, j - 1],     v[i, j] = r[i, j] - r[i - 1, j]

Relative to the corner r[i-1, j-1] the three predecessors are 0 (itself), h_in = h[i-1, j] (the
upper one) and v_in = v[i, j-1] (the left one), so with s = softmin(0, h_in, v_in)

    h[i, j] = d + s - v_in,              v[i, j] = d + s - h_in

and nothing ever grows; no rebasing, no float64. An error in h or v is passed on without gain (the
softmin's weights sum to one). The forward pass saves two of the three weights, the upper ones over
the cost in its buffer; the backward pass only multiplies and adds. Infinite R (outside the matrix
or the band) is a difference of BIG towards finite R and of 0 towards infinite R.

STATUS: checked in Triton's interpreter against the float64 reference and by compiling for sm_80,
sm_90 and gfx942. It has not been run or timed on a GPU.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .cost import centre, unit, unit_backward, zero_padding

INTERPRETED = triton.knobs.runtime.interpret
STATE_DTYPE = None  # the inputs'
MAX_BLOCK = 1024
BIG = tl.constexpr(1e30)


@triton.jit
def _pair(n_ptr, m_ptr, B, N, M, SECOND: tl.constexpr):
    """The program's matrix: (item, kind, rows, columns, offset, stride).

    Kind 0 is x with y, 1 x with itself, 2 y with itself. Programs [0, B) are of kind 0, the next B
    of kind SECOND, the last B of kind 2. The matrices lie one after the other by kind.
    """
    program = tl.program_id(0)
    b = program % B
    kind = tl.where(program < B, 0, tl.where(program < 2 * B, SECOND, 2))
    n, m = tl.load(n_ptr + b).to(tl.int32), tl.load(m_ptr + b).to(tl.int32)
    n, m = tl.where(kind == 2, m, n), tl.where(kind == 1, n, m)
    N, M, B = N.to(tl.int64), M.to(tl.int64), B.to(tl.int64)
    rows, columns = tl.where(kind == 2, M, N), tl.where(kind == 1, N, M)
    start = tl.where(kind == 0, 0, B * N * M) + tl.where(kind == 2, B * N * N, 0)
    return b, kind, n, m, start + b * rows * columns, columns


@triton.jit
def _up(a, b):
    """a / b rounded up, for b > 0; 0 for a < 0."""
    return (tl.maximum(a, 0) + b - 1) // b


@triton.jit
def _band(i, n, m, band, ITAKURA: tl.constexpr):
    """First and last + 1 column of rows i; see reference.band_mask. No band: band < 0."""
    line = 2 * i.to(tl.int64) * (m - 1)
    longest = tl.maximum(n, m) - 1
    scale = tl.maximum(2 * (n - 1), 1)
    if ITAKURA:
        slope, end = band.to(tl.int64), (n - 1).to(tl.int64) * (m - 1)
        lo, hi = _up(line - longest, scale), (line + longest) // scale
        u = i.to(tl.int64) * (m - 1)
        rest, width = tl.maximum(end - u, 0), tl.maximum(n - 1, 1)
        low = tl.maximum(_up(1000 * u, slope), _up(1000 * end - slope * rest, 1000))
        high = tl.minimum(slope * u // 1000, end - _up(1000 * rest, slope))
        lo, hi = tl.minimum(lo, _up(low, width)), tl.maximum(hi, high // width)
        hi = tl.minimum(hi + 1, m)
        lo, hi = tl.where(n == 1, 0, lo), tl.where(n == 1, m, hi)
    else:
        width = (2 * band.to(tl.int64) + 1) * longest
        lo, hi = _up(line - width, scale), tl.minimum((line + width) // scale + 1, m)
        lo, hi = tl.where(band < 0, 0, lo), tl.where(band < 0, m, hi)
    valid = (i >= 0) & (i < n)
    return tl.where(valid, lo, 0).to(tl.int32), tl.where(valid, hi, 0).to(tl.int32)


@triton.jit
def _log2(x, FAST: tl.constexpr):
    # tl.log2 is a polynomial of 20 instructions, the other a single one; x is from 1 to 3.
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


# Sizes vary from batch to batch: no variants for those divisible by 16 or equal to 1.
_SIZES = ["B", "N", "M", "bandwidth"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    p, left, loss, border, n_ptr, m_ptr, B, N, M, bandwidth,
    SECOND: tl.constexpr, CLAMP: tl.constexpr, SAVE: tl.constexpr, FAST_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss[program] of the costs in p, both in units of gamma * ln(2), which makes the base 2.

    CLAMP: raise costs to 0. SAVE: the weights of the upper neighbours over p, the left ones' to
    `left`.
    """
    _b, _kind, n, m, offset, stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    border += tl.program_id(0).to(tl.int64) * tl.maximum(N, M)
    dtype = p.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    lane_above = tl.maximum(lane - 1, 0)
    total, carry = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for strip in range(0, tl.cdiv(n, BLOCK)):
        i = strip * BLOCK + lane
        lo, hi = _band(i, n, m, bandwidth)
        lo_above, hi_above = _band(i - 1, n, m, bandwidth)
        lo_below, _hi = _band(i + 1, n, m, bandwidth)
        # The loss is summed along one path of the differences: down the band's left edge.
        row_end = tl.where(i == n - 1, m, lo_below)
        rows = tl.minimum(n - strip * BLOCK, BLOCK)
        row = offset + i.to(tl.int64) * stride
        h = tl.zeros([BLOCK], dtype)
        v = tl.where(i == 0, BIG, 0.0).to(dtype)
        # Two steps ahead of use.
        d0 = tl.load(p + row - lane, mask=(lane <= 0) & (hi > 0), other=0.0)
        d1 = tl.load(p + row + 1 - lane, mask=(lane <= 1) & (1 - lane < hi), other=0.0)
        for t in range(0, m + rows - 1):
            j = t - lane
            d2 = tl.load(p + row + j + 2, mask=(j + 2 >= lo) & (j + 2 < hi), other=0.0)
            top = tl.load(border + t, mask=(strip > 0) & (t < m), other=0.0)
            top = tl.where((strip == 0) & (t == 0), BIG, top)
            h_in = tl.where(lane == 0, top, tl.gather(h, lane_above, 0))
            best = tl.minimum(tl.minimum(h_in, v), 0.0)
            up, beside, corner = tl.exp2(best - h_in), tl.exp2(best - v), tl.exp2(best)
            weight_sum = up + beside + corner
            if CLAMP:
                d0 = tl.maximum(d0, 0.0, propagate_nan=tl.PropagateNan.ALL)
            rise = d0 - _log2(weight_sum, FAST_LOG)
            inside = (j >= lo) & (j < hi)
            h_next, v_next = rise + (best - v), rise + (best - h_in)
            # The sum, with what rounding took from it in `carry`.
            down = tl.where(i == 0, rise + best, tl.where(lo == lo_above, v_next, rise + best))
            term = tl.where(j == lo, down, tl.where((j > lo) & (j < row_end), h_next, 0.0))
            term = tl.where(inside, term - carry, 0.0)
            grown = total + term
            carry = tl.where(inside, (grown - total) - term, carry)
            total = grown
            if SAVE:
                tl.store(p + row + j, up / weight_sum, mask=inside)
                tl.store(left + row + j, beside / weight_sum, mask=inside)
            h = tl.where(inside, h_next, tl.where((j > lo) & (j <= hi), BIG, 0.0))
            v = tl.where(inside, v_next, tl.where((j >= lo_above) & (j < hi_above), BIG, 0.0))
            tl.store(border + j, h, mask=(lane == BLOCK - 1) & (j >= 0) & (j < m))
            d0, d1 = d1, d2
        tl.debug_barrier()  # the next strip's lane 0 reads what this one's last lane wrote
    tl.store(loss + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    up, left, e, border, n_ptr, m_ptr, B, N, M, bandwidth,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """e = E inside the band, from the saved weights: the forward's strips and steps, reversed."""
    _b, _kind, n, m, offset, stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    border += tl.program_id(0).to(tl.int64) * tl.maximum(N, M)
    dtype = up.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    lane_below = tl.minimum(lane + 1, BLOCK - 1)
    strips = tl.cdiv(n, BLOCK)
    for back in range(0, strips):
        strip = strips - 1 - back
        i = strip * BLOCK + lane
        lo, hi = _band(i, n, m, bandwidth)
        row = offset + i.to(tl.int64) * stride
        steps = m + tl.minimum(n - strip * BLOCK, BLOCK) - 1
        # What a cell passes to the left, to the one above, and, a step later, to the corner.
        to_left, to_up = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
        to_corner = tl.zeros([BLOCK], dtype)
        j = steps - 1 - lane
        inside = (j >= lo) & (j < hi)
        up0 = tl.load(up + row + j, mask=inside, other=0.0)
        left0 = tl.load(left + row + j, mask=inside, other=0.0)
        inside = (j - 1 >= lo) & (j - 1 < hi)
        up1 = tl.load(up + row + j - 1, mask=inside, other=0.0)
        left1 = tl.load(left + row + j - 1, mask=inside, other=0.0)
        for step in range(0, steps):
            t = steps - 1 - step
            j = t - lane
            ahead = (j - 2 >= lo) & (j - 2 < hi)
            up2 = tl.load(up + row + j - 2, mask=ahead, other=0.0)
            left2 = tl.load(left + row + j - 2, mask=ahead, other=0.0)
            j_last = t - (BLOCK - 1)
            below = tl.load(
                border + j_last, mask=(back > 0) & (j_last >= 0) & (j_last < m), other=0.0
            )
            from_below = tl.where(lane == BLOCK - 1, below, tl.gather(to_up, lane_below, 0))
            value = to_left + from_below
            value = tl.where((i == n - 1) & (j == m - 1), 1.0, value)
            inside = (j >= lo) & (j < hi)
            value = tl.where(inside, value, 0.0)
            tl.store(e + row + j, value, mask=inside)
            to_left = value * left0
            to_up = value * up0 + to_corner
            to_corner = value * tl.maximum(1.0 - up0 - left0, 0.0)
            tl.store(border + j, to_up, mask=(lane == 0) & (j < m))
            up0, left0, up1, left1 = up1, left1, up2, left2
        tl.debug_barrier()


def _options(rows):
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(rows)))
    return {"BLOCK": block, "num_warps": max(1, block // 128)}


def _fast_log(tensor):
    nvidia = tensor.is_cuda and torch.version.hip is None
    return nvidia and tensor.dtype == torch.float32


def _device(tensor):
    """Launch where the tensor is, not on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _forward(p, left, n, m, B, N, M, kinds, bandwidth, clamp, save):
    """Losses [kinds * B] of the matrices in p, in its units."""
    loss = p.new_empty(kinds * B)
    if B:
        border = p.new_empty(kinds * B * max(N, M))
        with _device(p):
            forward_kernel[(kinds * B,)](
                p, left, loss, border, n, m, B, N, M, -1 if bandwidth is None else bandwidth,
                SECOND=1, CLAMP=clamp, SAVE=save, FAST_LOG=_fast_log(p),
                **_options(max(N, M) if kinds > 1 else N),
            )  # fmt: skip
    return loss


def _backward(up, left, n, m, B, N, M, kinds, bandwidth):
    """E of the matrices of some kinds, flat, laid out as all of them."""
    e = torch.zeros_like(up)
    if B:
        border = up.new_empty(len(kinds) * B * max(N, M))
        with _device(up):
            backward_kernel[(len(kinds) * B,)](
                up, left, e, border, n, m, B, N, M, -1 if bandwidth is None else bandwidth,
                SECOND=kinds[1] if len(kinds) > 1 else 1,
                **_options(max(N, M) if len(kinds) > 1 else N),
            )  # fmt: skip
    return e


# --------------------------------------------------------------------------------------------------
# From a cost matrix. What is saved: the weights of the upper neighbours, then of the left ones.


def cost_saved_sizes(B, N, M, grad):
    return 2 * B * N * M if grad else 0


def cost_forward(d, n, m, gamma, bandwidth, grad):
    B, N, M = d.shape
    unit = gamma * math.log(2)
    state = d.new_empty((2 if grad else 1) * d.numel())
    p, left = state[: d.numel()], state[-d.numel() :]
    torch.mul(d.reshape(-1), 1 / unit, out=p)
    loss = _forward(p, left, n, m, B, N, M, 1, bandwidth, clamp=False, save=grad) * unit
    return loss, state if grad else d.new_empty(0)


def cost_backward(grad, d, n, m, state, gamma, bandwidth):
    up, left = state.chunk(2) if len(state) else (state, state)
    e = _backward(up, left, n, m, *d.shape, [0], bandwidth).view(d.shape)
    return e.mul_(grad[:, None, None])


# --------------------------------------------------------------------------------------------------
# From features


def saved_sizes(B, N, M, divergence, x_grad, y_grad):
    size = B * (N * M + (N * N + M * M if divergence else 0)) if x_grad or y_grad else 0
    return size, size


def _views(flat, B, N, M):
    """The matrices of every kind in a flat buffer: [B, N, M], and [B, N, N], [B, M, M]."""
    sizes, views, start = [(N, M), (N, N), (M, M)], [], 0
    for rows, columns in sizes:
        if start < flat.numel() or not B:
            views.append(flat[start : start + B * rows * columns].view(B, rows, columns))
        start += B * rows * columns
    return views


def _prepare(x, y, n, m, cost):
    """The factors of the cost's matrix product; padding is zero in them or never looked at."""
    x, y = zero_padding(x, n), zero_padding(y, m)
    if cost == "sqeuclidean":
        mean = centre(x, y, n, m)
        return x - mean, y - mean
    return (unit(x), unit(y)) if cost == "cosine" else (x, y)


def features_forward(x, y, n, m, gamma, bandwidth, cost, divergence, x_grad, y_grad):
    B, N, M = len(x), x.shape[1], y.shape[1]
    kinds, save, scale = 3 if divergence else 1, x_grad or y_grad, 1 / (gamma * math.log(2))
    p = x.new_empty(saved_sizes(B, N, M, divergence, True, True)[0])
    sides = _prepare(x, y, n, m, cost)
    for out, (row, column) in zip(_views(p, B, N, M), ((0, 1), (0, 0), (1, 1))):
        u, v = sides[row], sides[column]
        if cost == "l1":
            torch.mul(torch.cdist(u, v, p=1.0), scale, out=out)
        elif cost == "cosine":
            out.fill_(scale).baddbmm_(u, v.transpose(1, 2), alpha=-scale)
        else:
            squares = [scale * z.square().sum(-1) for z in (u, v)]
            torch.add(squares[0][:, :, None], squares[1][:, None], out=out)
            out.baddbmm_(u, v.transpose(1, 2), alpha=-2 * scale)
    left = torch.empty_like(p) if save else p
    loss = _forward(p, left, n, m, B, N, M, kinds, bandwidth, cost == "sqeuclidean", save) / scale
    loss = loss.view(kinds, B)
    loss = loss[0] - (loss[1] + loss[2]) / 2 if divergence else loss[0].clone()
    return (loss, p, left) if save else (loss, x.new_empty(0), x.new_empty(0))


def features_backward(
    grad, x, y, n, m, up, left, gamma, bandwidth, cost, divergence, x_grad, y_grad
):
    B, N, M = len(x), x.shape[1], y.shape[1]
    kinds = [0] + [1] * (divergence and x_grad) + [2] * (divergence and y_grad)
    e = _views(_backward(up, left, n, m, B, N, M, kinds, bandwidth), B, N, M)
    for kind in kinds:
        # Of a sequence with itself E is symmetric: twice the rows' side does for both.
        e[kind] *= (grad if kind == 0 else -grad)[:, None, None]
    sides, grads = _prepare(x, y, n, m, cost), []
    for side, (z, want) in enumerate(((x, x_grad), (y, y_grad))):
        if not want:
            grads.append(z.new_empty(0))
            continue
        flows = [(e[0] if side == 0 else e[0].transpose(1, 2), sides[1 - side])]
        if divergence:
            flows.append((e[1 + side], sides[side]))
        u = sides[side]
        if cost == "l1":
            g = sum(torch.ops.aten._cdist_backward(f.contiguous(), u, v, 1.0, f) for f, v in flows)
        else:
            g = torch.zeros_like(u)
            if cost == "sqeuclidean":
                torch.mul(u, 2 * sum(f.sum(2) for f, _ in flows)[..., None], out=g)
            for f, v in flows:
                g.baddbmm_(f, v, alpha=-2 if cost == "sqeuclidean" else -1)
            if cost == "cosine":
                g = unit_backward(g, zero_padding(z, n if side == 0 else m))
        grads.append(g)
    return tuple(grads)
