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
from .recursion import Recursion

__all__ = [
    "CHECKPOINTS",
    "INTERPRETED",
    "MAX_BLOCK",
    "STATE_DTYPE",
    "TILE_STEPS",
    "cost_backward",
    "cost_forward",
    "cost_saved_sizes",
    "features_backward",
    "features_forward",
    "saved_sizes",
]


INTERPRETED = triton.knobs.runtime.interpret
STATE_DTYPE = None  # the inputs'
CHECKPOINTS = False
MAX_BLOCK = 1024
TILE_STEPS = 64  # of a tile of 32 rows that changes its storage
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


@triton.jit
def _cells_before(x):
    """Cells (k, j), both from 0, with k + j < x."""
    x = tl.maximum(x, 0)
    return x * (x + 1) // 2


@triton.jit
def _place(t, rows, m):
    """Place of cell (0, t) of a strip of `rows` rows, stored one anti-diagonal after the other.

    Cell (k, t - k) lies k places on: what the lanes touch at one step lies side by side.
    """
    m = m.to(tl.int64)
    t = t + m * 0
    before = _cells_before(t) - _cells_before(t - rows) - _cells_before(t - m)
    return before + _cells_before(t - rows - m) - tl.maximum(t - m + 1, 0)


# Sizes vary from batch to batch: no variants for those divisible by 16 or equal to 1.
_SIZES = ["B", "N", "M", "band"]


@triton.jit
def _tile(n, m, stride, band, ITAKURA: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """Of a tile of T steps and 32 rows: (row-major, diagonal) places, inside?, rows, columns."""
    i0 = tl.program_id(1) * 32
    i = i0 + tl.arange(0, 32)
    strip = i0 // BLOCK
    k = i - strip * BLOCK
    rows = tl.minimum(n - strip * BLOCK, BLOCK)
    t = i0 % BLOCK + tl.program_id(2) * T + tl.arange(0, T)
    j = t[:, None] - k[None, :]
    lo, hi = _band(i, n, m, band, ITAKURA)
    inside = (j >= lo[None, :]) & (j < hi[None, :])
    start = strip.to(tl.int64) * BLOCK * m + _place(t, rows, m)
    place = start[:, None] + k[None, :]
    return i.to(tl.int64)[None, :] * stride + j, place, inside, i, j


@triton.jit(do_not_specialize=_SIZES)
def skew_kernel(
    p, diagonals, n_ptr, m_ptr, B, N, M, band,
    SECOND: tl.constexpr, ITAKURA: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Costs, row-major in p, into `diagonals`, in the order in which the programs read them."""
    _b, _kind, n, m, offset, stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    at, place, inside, _i, _j = _tile(n, m, stride, band, ITAKURA, BLOCK, T)
    tl.store(diagonals + offset + place, tl.load(p + offset + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def unskew_kernel(
    diagonals, e, n_ptr, m_ptr, B, N, M, band,
    SECOND: tl.constexpr, ITAKURA: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """E back to row-major, 0 outside the band and the lengths."""
    _b, kind, n, m, offset, stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    at, place, inside, i, j = _tile(n, m, stride, band, ITAKURA, BLOCK, T)
    value = tl.load(diagonals + offset + place, mask=inside, other=0.0)
    height = tl.where(kind == 2, M, N)
    tl.store(e + offset + at, value, mask=(j >= 0) & (j < stride) & (i < height)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    d, left, loss, border, ends, steps, n_ptr, m_ptr, B, N, M, band,
    SECOND: tl.constexpr, CLAMP: tl.constexpr, SAVE: tl.constexpr, FAST_LOG: tl.constexpr,
    HARD: tl.constexpr, PENALISED: tl.constexpr, ITAKURA: tl.constexpr,
    OPEN_BEGIN: tl.constexpr, OPEN_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss[program] of the costs in d, both in units of gamma * ln(2), which makes the base 2.

    d and left are stored along diagonals. CLAMP: raise costs to 0. SAVE: the weights of the upper
    neighbours over d, the left ones' to `left`. steps: penalties (down, right, diagonal). ends
    [programs, max(N, M)]: with an open end, the part of the paths through (n - 1, 0) to
    (n - 1, j) or on from there that ends at j.
    """
    _b, _kind, n, m, offset, _stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    border += tl.program_id(0).to(tl.int64) * tl.maximum(N, M)
    ends += tl.program_id(0).to(tl.int64) * tl.maximum(N, M)
    dtype = d.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    lane_above = tl.maximum(lane - 1, 0)
    total, carry = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    going_on = tl.full([BLOCK], BIG, dtype)
    if PENALISED:
        down, right, diagonal = tl.load(steps), tl.load(steps + 1), tl.load(steps + 2)
    for strip in range(0, tl.cdiv(n, BLOCK)):
        i = strip * BLOCK + lane
        lo, hi = _band(i, n, m, band, ITAKURA)
        lo_above, hi_above = _band(i - 1, n, m, band, ITAKURA)
        lo_below, _hi = _band(i + 1, n, m, band, ITAKURA)
        # The loss is summed along one path of the differences: down the band's left edge.
        row_end = tl.where(i == n - 1, m, lo_below)
        rows = tl.minimum(n - strip * BLOCK, BLOCK)
        base = offset + m.to(tl.int64) * BLOCK * strip
        h = tl.zeros([BLOCK], dtype)
        v = tl.where(i == 0, BIG, 0.0).to(dtype)
        # Two steps ahead of use.
        d0 = tl.load(d + base + _place(0, rows, m) + lane, mask=(lane <= 0) & (hi > 0), other=0.0)
        ahead = (lane <= 1) & (1 - lane >= lo) & (1 - lane < hi)
        d1 = tl.load(d + base + _place(1, rows, m) + lane, mask=ahead, other=0.0)
        for t in range(0, m + rows - 1):
            j = t - lane
            ahead = (j + 2 >= lo) & (j + 2 < hi)
            d2 = tl.load(d + base + _place(t + 2, rows, m) + lane, mask=ahead, other=0.0)
            top = tl.load(border + t, mask=(strip > 0) & (t < m), other=0.0)
            top = tl.where((strip == 0) & ((t == 0) | OPEN_BEGIN), BIG, top)
            h_in = tl.where(lane == 0, top, tl.gather(h, lane_above, 0))
            if PENALISED:
                start = (i == 0) & ((j == 0) | OPEN_BEGIN)
                u, w, c = h_in + down, v + right, tl.where(start, 0.0, diagonal)
            else:
                u, w, c = h_in, v, tl.zeros([BLOCK], dtype)
            best = tl.minimum(tl.minimum(u, w), c)
            if HARD:
                corner = (best == c).to(dtype)
                up = tl.where(best == u, 1.0 - corner, 0.0)
                beside = 1.0 - corner - up
                weight_sum = tl.full([BLOCK], 1.0, dtype)
            else:
                up, beside, corner = tl.exp2(best - u), tl.exp2(best - w), tl.exp2(best - c)
                weight_sum = up + beside + corner
            if CLAMP:
                d0 = tl.maximum(d0, 0.0, propagate_nan=tl.PropagateNan.ALL)
            rise = d0
            if not HARD:
                rise -= _log2(weight_sum, FAST_LOG)
            inside = (j >= lo) & (j < hi)
            if PENALISED:  # a difference of two infinite ones would lose the penalty
                h_next = rise + tl.where(best == w, right, best - v)
                v_next = rise + tl.where(best == u, down, best - h_in)
            else:
                h_next, v_next = rise + (best - v), rise + (best - h_in)
            if OPEN_BEGIN:
                v_next = tl.where(i == 0, rise + best, v_next)
            # The sum, with what rounding took from it in `carry`.
            first = tl.where(i == 0, rise + best, tl.where(lo == lo_above, v_next, rise + best))
            term = tl.where(j == lo, first, tl.where((j > lo) & (j < row_end), h_next, 0.0))
            term = tl.where(inside, term - carry, 0.0)
            grown = total + term
            carry = tl.where(inside, (grown - total) - term, carry)
            total = grown
            if SAVE:
                here = base + _place(t, rows, m) + lane
                tl.store(d + here, up / weight_sum, mask=inside)
                tl.store(left + here, beside / weight_sum, mask=inside)
            if OPEN_END:  # relative to R of the cell: softmin over those of the row so far
                last = inside & (i == n - 1)
                before = going_on - h_next
                least = tl.minimum(before, 0.0)
                if HARD:
                    part = tl.where(before > 0, 1.0, 0.0).to(dtype)
                    going_on = tl.where(last, least, going_on)
                else:
                    part, other = tl.exp2(least), tl.exp2(least - before)
                    softmin = least - _log2(part + other, FAST_LOG)
                    going_on = tl.where(last, softmin, going_on)
                    part = part / (part + other)
                if SAVE:
                    tl.store(ends + j, part, mask=last)
            h = tl.where(inside, h_next, tl.where((j > lo) & (j <= hi), BIG, 0.0))
            v = tl.where(inside, v_next, tl.where((j >= lo_above) & (j < hi_above), BIG, 0.0))
            tl.store(border + j, h, mask=(lane == BLOCK - 1) & (j >= 0) & (j < m))
            d0, d1 = d1, d2
        tl.debug_barrier()  # the next strip's lane 0 reads what this one's last lane wrote
    if OPEN_END:
        total += tl.where(lane == (n - 1) % BLOCK, going_on, 0.0)
    tl.store(loss + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    up, left, e, border, ends, n_ptr, m_ptr, B, N, M, band,
    SECOND: tl.constexpr, ITAKURA: tl.constexpr, OPEN_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """e = E inside the band, from the saved weights: the forward's strips and steps, reversed.

    All three are stored along diagonals.
    """
    b, kind, n, m, offset, _stride = _pair(n_ptr, m_ptr, B, N, M, SECOND)
    border += tl.program_id(0).to(tl.int64) * tl.maximum(N, M)
    ends += (kind.to(tl.int64) * B + b) * tl.maximum(N, M)
    dtype = up.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    lane_below = tl.minimum(lane + 1, BLOCK - 1)
    strips = tl.cdiv(n, BLOCK)
    flow = tl.full([BLOCK], 1.0, dtype)
    for back in range(0, strips):
        strip = strips - 1 - back
        i = strip * BLOCK + lane
        lo, hi = _band(i, n, m, band, ITAKURA)
        rows = tl.minimum(n - strip * BLOCK, BLOCK)
        base = offset + m.to(tl.int64) * BLOCK * strip
        steps = m + rows - 1
        # What a cell passes to the left, to the one above, and, a step later, to the corner.
        to_left, to_up = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
        to_corner = tl.zeros([BLOCK], dtype)
        j = steps - 1 - lane
        inside = (j >= lo) & (j < hi)
        here = base + _place(steps - 1, rows, m) + lane
        up0 = tl.load(up + here, mask=inside, other=0.0)
        left0 = tl.load(left + here, mask=inside, other=0.0)
        inside = (j - 1 >= lo) & (j - 1 < hi)
        here = base + _place(steps - 2, rows, m) + lane
        up1 = tl.load(up + here, mask=inside, other=0.0)
        left1 = tl.load(left + here, mask=inside, other=0.0)
        for step in range(0, steps):
            t = steps - 1 - step
            j = t - lane
            ahead = (j - 2 >= lo) & (j - 2 < hi)
            here = base + _place(t - 2, rows, m) + lane
            up2 = tl.load(up + here, mask=ahead, other=0.0)
            left2 = tl.load(left + here, mask=ahead, other=0.0)
            j_last = t - (BLOCK - 1)
            below = tl.load(
                border + j_last, mask=(back > 0) & (j_last >= 0) & (j_last < m), other=0.0
            )
            from_below = tl.where(lane == BLOCK - 1, below, tl.gather(to_up, lane_below, 0))
            value = to_left + from_below
            inside = (j >= lo) & (j < hi)
            if OPEN_END:
                last = inside & (i == n - 1)
                part = tl.load(ends + j, mask=last, other=0.0)
                value += flow * part
                flow = tl.where(last, flow * (1.0 - part), flow)
            else:
                value = tl.where((i == n - 1) & (j == m - 1), 1.0, value)
            value = tl.where(inside, value, 0.0)
            tl.store(e + base + _place(t, rows, m) + lane, value, mask=inside)
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


class _Launch:
    """The kernels over the matrices of some kinds, of which all B lie in one flat buffer."""

    def __init__(self, n, m, B, N, M, kinds, recursion):
        self.n, self.m, self.B, self.N, self.M, self.kinds = n, m, B, N, M, kinds
        self.recursion, self.programs = recursion, len(kinds) * B
        self.longest = max(N, M)
        self.options = _options(self.longest if len(kinds) > 1 else N)
        band = recursion.bandwidth if recursion.itakura is None else recursion.itakura
        self.sizes = (n, m, B, N, M, -1 if band is None else band)
        self.constants = {
            "SECOND": kinds[1] if len(kinds) > 1 else 1,
            "ITAKURA": recursion.itakura is not None,
        }

    def _move(self, kernel, source, target):
        """Between row-major and diagonal storage; all of a buffer's kinds have the same tiles."""
        longest = self.longest if len(self.kinds) > 1 else self.N
        widest = self.longest if len(self.kinds) > 1 else self.M
        grid = self.programs, triton.cdiv(longest, 32), triton.cdiv(widest + 31, TILE_STEPS)
        if self.B:
            with _device(source):
                kernel[grid](
                    source, target, *self.sizes, **self.constants,
                    BLOCK=self.options["BLOCK"], T=TILE_STEPS, num_warps=4,
                )  # fmt: skip

    def forward(self, p, d, left, unit, clamp, save):
        """Losses [kinds * B] of the costs p, row-major and over unit, and the ends of open paths.

        With `save` their weights are left in d and `left`, which may be p.
        """
        recursion, loss = self.recursion, p.new_empty(self.programs)
        penalties = recursion.down, recursion.right, recursion.diagonal
        steps = p
        if any(penalties):
            steps = torch.stack([p.new_full((), penalty / unit) for penalty in penalties])
        ends = p.new_empty(self.programs * self.longest if recursion.open_end and save else 0)
        self._move(skew_kernel, p, d)
        if self.B:
            border = p.new_empty(self.programs * self.longest)
            with _device(p):
                forward_kernel[(self.programs,)](
                    d, left, loss, border, ends, steps, *self.sizes, **self.constants,
                    CLAMP=clamp, SAVE=save, FAST_LOG=_fast_log(p), HARD=recursion.gamma == 0,
                    PENALISED=any(penalties), OPEN_BEGIN=recursion.open_begin,
                    OPEN_END=recursion.open_end, **self.options,
                )  # fmt: skip
        return loss * unit, ends

    def backward(self, up, left, ends):
        """E of the matrices, flat and row-major, laid out as those of all kinds."""
        e = torch.empty_like(up)
        diagonals = torch.empty_like(up)
        if self.B:
            border = up.new_empty(self.programs * self.longest)
            with _device(up):
                backward_kernel[(self.programs,)](
                    up, left, diagonals, border, ends, *self.sizes, **self.constants,
                    OPEN_END=self.recursion.open_end, **self.options,
                )  # fmt: skip
        self._move(unskew_kernel, diagonals, e)
        return e


def _unit(recursion):
    """What costs are divided by."""
    return recursion.gamma * math.log(2) if recursion.gamma else 1.0


# --------------------------------------------------------------------------------------------------
# From a cost matrix. What is saved: the weights of the upper neighbours, then of the left ones,
# then the ends of open paths.


def cost_saved_sizes(B: int, N: int, M: int, grad: bool) -> int:
    """As of the reference."""
    return B * (2 * N * M + max(N, M)) if grad else 0


def cost_forward(
    d: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion, grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As of the reference."""
    B, N, M = d.shape
    unit, size = _unit(recursion), d.numel()
    state = d.new_empty(cost_saved_sizes(B, N, M, grad) or 2 * size)
    diagonals, p = state[:size], state[size : 2 * size]
    torch.mul(d.reshape(-1), 1 / unit, out=p)
    launch = _Launch(n, m, B, N, M, [0], recursion)
    loss, ends = launch.forward(p, diagonals, p, unit, clamp=False, save=grad)
    if not grad:
        return loss, d.new_empty(0)
    state[2 * size : 2 * size + len(ends)] = ends
    return loss, state


def cost_backward(
    grad: torch.Tensor,
    d: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    state: torch.Tensor,
    recursion: Recursion,
) -> torch.Tensor:
    """As of the reference."""
    size = d.numel()
    launch = _Launch(n, m, *d.shape, [0], recursion)  # type: ignore[call-arg]
    e = launch.backward(state[:size], state[size : 2 * size], state[2 * size :])
    return e.view(d.shape).mul_(grad[:, None, None])


# --------------------------------------------------------------------------------------------------
# From features


def _matrices(B, N, M, divergence):
    return B * (N * M + (N * N + M * M if divergence else 0))


def saved_sizes(
    B: int, N: int, M: int, divergence: bool, checkpointed: bool, x_grad: bool, y_grad: bool
) -> tuple[int, int]:
    """As of the reference."""
    if not (x_grad or y_grad):
        return 0, 0
    size = _matrices(B, N, M, divergence)
    return size, size + B * max(N, M)  # an open end has no divergence


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
    """As of the reference."""
    B, N, M = len(x), x.shape[1], y.shape[1]
    kinds, save, unit = [0, 1, 2] if divergence else [0], x_grad or y_grad, _unit(recursion)
    scale, size = 1 / unit, _matrices(B, N, M, divergence)
    diagonals = x.new_empty(size)
    saved = x.new_empty(saved_sizes(B, N, M, divergence, checkpointed, True, True)[1])
    p = saved[:size]  # then the left weights
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
    launch = _Launch(n, m, B, N, M, kinds, recursion)
    loss, ends = launch.forward(p, diagonals, p, unit, cost == "sqeuclidean", save)
    loss = loss.view(len(kinds), B)
    loss = loss[0] - (loss[1] + loss[2]) / 2 if divergence else loss[0].clone()
    if not save:
        return loss, x.new_empty(0), x.new_empty(0)
    saved[size : size + len(ends)] = ends
    return loss, diagonals, saved


def features_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    up: torch.Tensor,
    saved: torch.Tensor,
    recursion: Recursion,
    cost: str,
    divergence: bool,
    checkpointed: bool,
    x_grad: bool,
    y_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """As of the reference."""
    B, N, M = len(x), x.shape[1], y.shape[1]
    kinds = [0] + [1] * (divergence and x_grad) + [2] * (divergence and y_grad)
    launch = _Launch(n, m, B, N, M, kinds, recursion)
    e = _views(launch.backward(up, saved[: len(up)], saved[len(up) :]), B, N, M)
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
