"""Soft-DTW on CPUs: Numba (which ships its own compiler) for the recursion, BLAS for the cost.

Written for a SIMD machine. The matrix is cut into strips of LANES rows; lane k works on row k of
the strip and runs k columns behind lane 0, so that one step advances a whole anti-diagonal:

    lane 0   c00 c01 c02 c03 ...        step t computes the cells (k, t - k)
    lane 1       c10 c11 c12 ...
    lane 2           c20 c21 ...

A strip runs in tiles of STEPS steps. The forward pass saves what enters each tile (two diagonals
of a strip, one row between strips: a tenth of the matrix) and not the matrix R. The backward pass
walks the tiles in reverse, recomputes R inside one, and sends the expected alignment E through it;
a tile that E does not enter is skipped, and so are its columns in the matrix products behind. Away
from the alignment E falls below any use, so most tiles are.

Precision: R is kept in float64, in which neither its length nor a small gamma hurts, at no cost in
memory since R is never stored. Exponentials and logarithms see differences only and are float32.
Everything is in base 2: costs are multiplied by log2(e) / gamma on the way in.

Threads run over the batch, as many as torch.get_num_threads() says.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .cost import unit, unit_backward
from .recursion import Recursion

__all__ = [
    "CHECKPOINTS",
    "STATE_DTYPE",
    "cost_backward",
    "cost_forward",
    "cost_saved_sizes",
    "features_backward",
    "features_forward",
    "saved_sizes",
]


STATE_DTYPE = torch.float64

LANES = 64  # rows of a strip: 4 AVX-512 or 8 AVX2 vectors of float32, enough to hide latencies
STEPS = 64  # steps of a tile; its costs (32 KB) and weights (48 KB) stay in the L2 cache

# "Infinite" R and cost, finite so that differences are never NaN. Sums of BIG stay far above any
# real R, and float32 holds both.
BIG = 1e30

# E below this is stored as 0 in float32: were all cells of a 4096 x 4096 matrix dropped, the sum
# would still change by less than one part in 2^24.
NEGLIGIBLE = 2.0**-48


def _jit(function, fastmath=("contract",)):
    """Compile without the GIL; keep the machine code on disk where some place is writable."""
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


_jit_sums = functools.partial(_jit, fastmath=("contract", "reassoc"))  # sums in any order


# --------------------------------------------------------------------------------------------------
# Functions of base 2 that vectorise


@intrinsic
def _times_power(typingctx, x, shifted):
    """x * 2**n, given shifted = n + 1.5 * 2**23, whose low bits are n."""

    def codegen(context, builder, signature, args):
        i32, f32 = ir.IntType(32), ir.FloatType()
        bits = builder.shl(builder.bitcast(args[1], i32), ir.Constant(i32, 23))
        power = builder.bitcast(builder.add(bits, ir.Constant(i32, 127 << 23)), f32)
        return builder.fmul(args[0], power)

    return types.float32(types.float32, types.float32), codegen


def _exp2(x):
    """2**x for x <= 0; in float32 to 1e-7, with 2**-126 for all that is smaller."""


def _log2(x):
    """log2(x) for x from 1 to 3, in float32 to 1e-7."""


@overload(_exp2)
def _(x):
    if x == types.float64:
        return lambda x: math.exp(x * 0.6931471805599453)

    def fast(x):
        # Comparisons that are false for NaN pass it on.
        x = np.float32(-126) if x < np.float32(-126) else x
        shifted = x + np.float32(12582912.0)  # 1.5 * 2**23: rounds to whole numbers
        f = x - (shifted - np.float32(12582912.0))
        p = np.float32(0.00133988746) + f * np.float32(0.000153533621)
        p = np.float32(0.00961843736) + f * p
        p = np.float32(0.0555033247) + f * p
        p = np.float32(0.240226479) + f * p
        p = np.float32(0.693147203) + f * p
        return _times_power(np.float32(1.0) + f * p, shifted)  # type: ignore[call-arg]

    return fast


@overload(_log2)
def _(x):
    if x == types.float64:
        return lambda x: math.log(x) * 1.4426950408889634

    def fast(x):
        high = x > np.float32(1.5)
        t = (x * np.float32(0.5) if high else x) - np.float32(1.0)
        p = np.float32(-0.171917907) + t * np.float32(0.0744694534)
        p = np.float32(0.217118887) + t * p
        p = np.float32(-0.243360366) + t * p
        p = np.float32(0.288162977) + t * p
        p = np.float32(-0.360529986) + t * p
        p = np.float32(0.480901969) + t * p
        p = np.float32(-0.721349407) + t * p
        p = np.float32(1.44269503) + t * p
        return t * p + (np.float32(1.0) if high else np.float32(0.0))

    return fast


# --------------------------------------------------------------------------------------------------
# One tile. `r` (float64) and `work` (the input's dtype) hold all of its vectors, each in one array
# at constant places: LLVM then sees by itself that they do not overlap. In `r`, LAST is R on the
# last diagonal, one place further, so that r[LAST + k] is lane k's upper neighbour and
# r[LAST + k + 1] its left one; DIAGONAL the upper neighbours of the step before, which have become
# the diagonal ones. The gaps keep the vectors out of each other's way in the L1 cache.

LAST, DIAGONAL, BEST, R_SIZE = 0, 72, 144, 208
UP, LEFT, CORNER, SOFT, WORK_SIZE = 0, LANES, 2 * LANES, 3 * LANES, 4 * LANES


@_jit
def _load_tile(tile, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi):
    """tile[t, k] = cost of (i0 + k, t0 + t - k) in base 2, BIG outside. False if all is outside.

    The cost is max(a[i] + b[j] + scale * p[i, j], floor).
    """
    tile[:] = BIG
    some = False
    costs = np.empty(STEPS)
    for k in range(rows):
        i = i0 + k
        first, last = max(lo[i], t0 - k), min(hi[i], t0 - k + STEPS)
        if first >= last:
            continue
        some = True
        at = offset + i * stride
        product, own, a_i = p[at + first : at + last], b[first:last], np.float64(a[i])
        for j in range(len(product)):
            costs[j] = max(a_i + own[j] + scale * product[j], floor) * per_unit
        lane = tile[first + k - t0 :, k]
        for j in range(len(product)):
            lane[j] = costs[j]
    return some


@_jit
def _step(r, work, costs, down, right, diagonal, penalised, hard):
    """R of the next anti-diagonal of a strip; leaves the terms of its softmin in `work`."""
    if penalised:
        for k in range(LANES):
            above = r[LAST + k]
            up, left, corner = above + down, r[LAST + k + 1] + right, r[DIAGONAL + k] + diagonal
            best = up if up < left else left
            best = corner if corner < best else best
            r[BEST + k] = best + costs[k]
            r[DIAGONAL + k] = above
            work[UP + k] = best - up
            work[LEFT + k] = best - left
            work[CORNER + k] = best - corner
    else:  # the same for three zeros
        for k in range(LANES):
            up, left, corner = r[LAST + k], r[LAST + k + 1], r[DIAGONAL + k]
            best = up if up < left else left
            best = corner if corner < best else best
            r[BEST + k] = best + costs[k]
            r[DIAGONAL + k] = up
            work[UP + k] = best - up
            work[LEFT + k] = best - left
            work[CORNER + k] = best - corner
    if hard:  # the whole weight for one of the least: the corner's, else the upper one
        for k in range(LANES):
            corner = work[CORNER + k] == 0
            up = work[UP + k] == 0 and not corner
            left = work[LEFT + k] == 0 and not corner and not up
            work[CORNER + k], work[UP + k], work[LEFT + k] = corner, up, left
            r[LAST + k + 1] = r[BEST + k]
        return
    for k in range(LANES):
        up, left, corner = _exp2(work[UP + k]), _exp2(work[LEFT + k]), _exp2(work[CORNER + k])
        work[UP + k], work[LEFT + k], work[CORNER + k] = up, left, corner
        work[SOFT + k] = _log2(up + left + corner)
    for k in range(LANES):
        r[LAST + k + 1] = r[BEST + k] - work[SOFT + k]


@_jit
def _enter_strip(r, corner):
    """R left of a strip: infinite, but for the cell diagonally before the strip's first."""
    r[:] = BIG
    r[DIAGONAL] = corner


@_jit
def _tiles(m):
    return (m + LANES - 1 + STEPS - 1) // STEPS


@_jit
def _forward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, lo, hi,
    steps, hard, open_begin, first, border, state, save,
):  # fmt: skip
    """R of n rows, in base 2, given R of the row above them in border[0].

    border [strips + 1, m], or [1, m] without `save`, gets R of each strip's last row; to save,
    `state` gets what enters each tile. `first`: nothing lies above, a path may start here.
    """
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty((STEPS, LANES))
    down, right, diagonal = steps
    penalised = down != 0 or right != 0 or diagonal != 0
    tiles = _tiles(m)
    for s in range((n + LANES - 1) // LANES):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        above, here = (s * m, (s + 1) * m) if save else (0, 0)
        start = first and s == 0
        _enter_strip(r, -diagonal if start else BIG)
        for u in range(tiles):
            t0 = u * STEPS
            if save:
                at = (s * tiles + u) * 2 * LANES
                for k in range(LANES):
                    state[at + k] = r[LAST + k + 1]
                    state[at + LANES + k] = r[DIAGONAL + k]
            inside = _load_tile(
                tile, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi
            )
            if not inside:  # all of it beyond the band: only what lane 0 finds at its corner passes
                r[:] = BIG
                if t0 + STEPS - 1 < m:
                    r[DIAGONAL] = border[above + t0 + STEPS - 1]
            for t in range(t0, min(t0 + STEPS, m + rows - 1)):
                if inside:
                    r[LAST] = border[above + t] if t < m else BIG
                    if open_begin and start:
                        r[DIAGONAL] = -diagonal
                    _step(r, work, tile[t - t0], down, right, diagonal, penalised, hard)
                j = t - rows + 1  # the column that the strip's last row has reached
                if 0 <= j < m:
                    border[here + j] = r[LAST + rows]


@_jit
def _end(row, hard, open_end, weights):
    """Loss in base 2, given R of the last row, and each of its cells' part in it."""
    weights[:] = 0
    m = len(row)
    if not open_end:
        weights[m - 1] = 1
        return row[m - 1]
    least = np.argmin(row)
    if hard:
        weights[least] = 1
        return row[least]
    total = 0.0
    for j in range(m):
        total += 2.0 ** (row[least] - row[j])
    for j in range(m):
        weights[j] = 2.0 ** (row[least] - row[j]) / total
    return row[least] - math.log(total) * 1.4426950408889634


# In the backward pass `flow` holds what flows into the next cells from the neighbours below, right
# and below right. A corner's share arrives a step late and waits in SOON.
FROM_BELOW, FROM_RIGHT, FROM_CORNER, SOON, FLOW_SIZE = 0, 80, 160, 240, 320


@_jit
def _save_weights(work, weights):
    for k in range(LANES):
        up, left, corner = work[UP + k], work[LEFT + k], work[CORNER + k]
        share = np.float32(1) / (up + left + corner)
        weights[UP + k] = up * share
        weights[LEFT + k] = left * share
        weights[CORNER + k] = corner * share


@_jit
def _step_back(flow, weights, e, negligible, zero):
    """E of the anti-diagonal before, and what flows on from it."""
    for k in range(LANES):
        value = flow[FROM_BELOW + k + 1] + flow[FROM_RIGHT + k] + flow[FROM_CORNER + k + 1]
        value = zero if value < negligible else value  # NaN stays
        e[k] = value
        flow[FROM_CORNER + k] = flow[SOON + k]
        flow[FROM_BELOW + k] = value * weights[UP + k]
        flow[FROM_RIGHT + k] = value * weights[LEFT + k]
        flow[SOON + k] = value * weights[CORNER + k]


@_jit
def _backward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, lo, hi,
    steps, hard, open_begin, first, border, state,
    weight, negligible, below, e, e_offset, e_strip, e_row, e_column, row_sums, column_sums, spans,
):  # fmt: skip
    """Add up weight * E where it is not 0: into e, at the given strides, and its two sums.

    `below` [m] is what flows into the last row from what lies below it, and then what flows out
    of the first row. spans [strips, 2] are the columns that each strip's E lies in.
    """
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty((STEPS, LANES))
    weights, e_tile = np.empty((STEPS, 3 * LANES), p.dtype), np.empty((STEPS, LANES), p.dtype)
    flow, next_below = np.empty(FLOW_SIZE, p.dtype), np.zeros(m, p.dtype)
    down, right, diagonal = steps
    penalised = down != 0 or right != 0 or diagonal != 0
    tiles, zero = _tiles(m), negligible - negligible
    for s in range((n + LANES - 1) // LANES - 1, -1, -1):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        start = first and s == 0
        flow[:] = 0
        next_below[:] = 0
        begin, end = m, 0
        for u in range(tiles - 1, -1, -1):
            t0 = u * STEPS
            t1 = min(t0 + STEPS, m + rows - 1)
            alive = False
            for value in flow:
                alive |= value != 0
            for j in range(max(t0 - rows + 1, 0), min(t0 + STEPS - rows + 1, m)):
                alive |= below[j] != 0
            if not alive:
                continue
            # Forward again inside the tile.
            _load_tile(tile, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi)
            at = (s * tiles + u) * 2 * LANES
            for k in range(LANES):
                r[LAST + k + 1] = state[at + k]
                r[DIAGONAL + k] = state[at + LANES + k]
            for t in range(t0, t1):
                r[LAST] = border[s * m + t] if t < m else BIG
                if open_begin and start:
                    r[DIAGONAL] = -diagonal
                _step(r, work, tile[t - t0], down, right, diagonal, penalised, hard)
                _save_weights(work, weights[t - t0])
            # Backward.
            for t in range(t1 - 1, t0 - 1, -1):
                j = t - rows + 1
                flow[FROM_BELOW + rows] = below[j] if 0 <= j < m else 0
                flow[FROM_CORNER + rows] = 0
                _step_back(flow, weights[t - t0], e_tile[t - t0], negligible, zero)
                if t < m:
                    next_below[t] += flow[FROM_BELOW]
                    next_below[t - 1 if t > 0 else 0] += flow[SOON] if t > 0 else 0
            for k in range(rows):
                i = i0 + k
                j0, j1 = max(lo[i], t0 - k), min(hi[i], t0 - k + STEPS)
                for j in range(j0, j1):
                    value = e_tile[j + k - t0, k]
                    if value != 0:
                        value *= weight
                        e[e_offset + s * e_strip + k * e_row + j * e_column] = value
                        row_sums[i] += value
                        column_sums[j] += value
                        begin, end = min(begin, j), max(end, j + 1)
        below[:] = next_below
        spans[s, 0], spans[s, 1] = min(begin, end), end


# --------------------------------------------------------------------------------------------------
# From tensors to kernels


def _strips(n):
    return -(-n // LANES)


def _state_size(N, M):
    """What a problem saves: `border` and `state` of `_forward`."""
    return (_strips(N) + 1) * M + _strips(N) * -(-(M + LANES - 1) // STEPS) * 2 * LANES


@_jit
def _band(start, rows, n, m, bandwidth, itakura):
    """First and last + 1 column of the cells in each of some rows; see reference.band_mask."""
    lo, hi = np.zeros(rows, np.int64), np.full(rows, m)
    if n > 1 and (bandwidth >= 0 or itakura >= 0):
        longest, end = max(n, m) - 1, (n - 1) * (m - 1)
        width = (2 * max(bandwidth, 0) + 1) * longest
        for k in range(rows):
            u = (start + k) * (m - 1)
            first, last = -((width - 2 * u) // (2 * (n - 1))), (width + 2 * u) // (2 * (n - 1))
            if itakura >= 0:
                low = max(-(-1000 * u // itakura), -((itakura * (end - u) - 1000 * end) // 1000))
                high = min(itakura * u // 1000, end + (-1000 * (end - u)) // itakura)
                first, last = min(first, -(-low // (n - 1))), max(last, high // (n - 1))
            lo[k], hi[k] = max(first, 0), min(last + 1, m)
    return lo, hi


_pool: Any = None
threads_of_pool = None


def _for_each(items, function):
    """[function(b) for b in range(items)], on as many threads as PyTorch uses.

    Python threads, which the kernels and PyTorch's operators free of the GIL. Whole items run in
    parallel, each operator on one thread (more where there are fewer items than threads): nothing
    waits at the barriers of a parallel matrix product, which on a busy machine is most of the time.
    The calling thread works too, so a helper that gets no processor costs nothing.
    """
    global _pool, threads_of_pool
    threads = torch.get_num_threads()
    if threads == 1 or items <= 1:
        return [function(b) for b in range(items)]
    if threads_of_pool != (os.getpid(), threads):  # a forked process has none of the threads
        _pool = ThreadPoolExecutor(threads, "soft_dtw")
        threads_of_pool = os.getpid(), threads
    pool, results = _pool, [None] * items
    waiting = iter(range(items))  # next() is atomic

    def work():
        torch.set_num_threads(max(1, threads // items))
        with torch.no_grad():  # a setting of each thread
            for b in waiting:
                results[b] = function(b)

    helpers = [pool.submit(work) for _ in range(min(threads, items) - 1)]
    try:
        work()
    finally:
        torch.set_num_threads(threads)  # also the default of threads to come
        for helper in helpers:
            # One that has not started finds nothing left to do.
            if not helper.cancel():
                helper.result()
    return results


class _Problem:
    """A pair of sequences, or some of its rows, in the form that the kernels take.

    p: flat array whose entries offset + i * stride + j make the matrix of n rows from `start` of
    the pair's `total`, and m columns; a, b, scale, floor: the cost is
    max(a[i] + b[j] + scale * p[i, j], floor); state: flat float64, None to save nothing; top: R of
    the row above, None at the start.
    """

    def __init__(
        self, p, offset, stride, n, m, a, b, scale, floor, state, recursion, start, total, top=None
    ):
        self.n, self.m, self.recursion = n, m, recursion
        self.hard, self.save = recursion.gamma == 0, state is not None
        self.unit = 1.0 if self.hard else recursion.gamma * math.log(2)
        rows = _strips(n) + 1 if self.save else 1
        if state is None:
            state = np.empty(m)
        self.border = state[: rows * m]
        self.border[:m] = BIG if top is None else top
        steps = (
            recursion.down / self.unit, recursion.right / self.unit,
            recursion.diagonal / self.unit,
        )  # fmt: skip
        band = (-1 if k is None else k for k in (recursion.bandwidth, recursion.itakura))
        self.arguments = (
            p, offset, stride, n, m, a, b, scale, floor, 1 / self.unit,
            *_band(start, n, total, m, *band), steps, self.hard, recursion.open_begin,
            top is None, self.border, state[rows * m :],
        )  # fmt: skip

    def forward(self):
        """R [m] of the last row, in the kernels' units."""
        _forward(*self.arguments, self.save)
        return self.last_row()

    def last_row(self):
        return self.border[-self.m :]

    def end(self, row):
        """Loss, and E that enters the last row, given its R."""
        weights = np.empty(self.m, self.arguments[0].dtype)
        return _end(row, self.hard, self.recursion.open_end, weights) * self.unit, weights

    def backward(self, weight, below, e, e_offset, e_strip, e_row, e_column, *sums):
        """Write weight * E into the flat array e, add to its row and column sums; the spans."""
        spans = np.empty((_strips(self.n), 2), np.int64)
        negligible = e.dtype.type(NEGLIGIBLE if e.dtype == np.float32 else 0)
        _backward(
            *self.arguments, e.dtype.type(weight), negligible, below,
            e, e_offset, e_strip, e_row, e_column, *sums, spans,
        )  # fmt: skip
        return spans

    def backward_in_strips(self, weight, below, *sums):
        """E as [strips, m, LANES], mostly untouched zeros, so that a strip's span is one block."""
        dtype = self.arguments[0].dtype
        e = np.zeros(_strips(self.n) * self.m * LANES, dtype)  # calloc: no page until written
        return e, self.backward(weight, below, e, 0, self.m * LANES, 1, LANES, *sums)


# --------------------------------------------------------------------------------------------------
# From a cost matrix


def cost_saved_sizes(B: int, N: int, M: int, grad: bool) -> int:
    """As of the reference."""
    return B * _state_size(N, M) if grad else 0


def _cost_problem(b, d, n, m, state, recursion):
    _, N, M = d.shape
    each, zeros = _state_size(N, M), np.zeros(max(N, M), d.dtype)
    state = state[b * each : (b + 1) * each] if len(state) else None
    return _Problem(
        d.reshape(-1), b * N * M, M, n[b], m[b], zeros, zeros, 1.0, -math.inf,
        state, recursion, 0, n[b],
    )  # fmt: skip


def cost_forward(
    d: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion, grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As of the reference."""
    B, N, M = d.shape
    state = torch.empty(cost_saved_sizes(B, N, M, grad), dtype=STATE_DTYPE)
    arguments = d.numpy(), n.tolist(), m.tolist(), state.numpy(), recursion

    def run(b):
        problem = _cost_problem(b, *arguments)
        return problem.end(problem.forward())[0]

    return torch.tensor(_for_each(len(d), run), dtype=d.dtype), state


def cost_backward(
    grad: torch.Tensor,
    d: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    state: torch.Tensor,
    recursion: Recursion,
) -> torch.Tensor:
    """As of the reference."""
    _, N, M = d.shape
    arguments = d.numpy(), n.tolist(), m.tolist(), state.numpy(), recursion
    e = np.zeros(d.numel(), d.numpy().dtype)
    weights = grad.tolist()

    def run(b):
        problem = _cost_problem(b, *arguments)
        _, below = problem.end(problem.last_row())
        sums = np.zeros(problem.n, e.dtype), np.zeros(problem.m, e.dtype)
        problem.backward(weights[b], below, e, b * N * M, LANES * M, M, 1, *sums)

    _for_each(len(d), run)
    return torch.from_numpy(e).view(d.shape)


# --------------------------------------------------------------------------------------------------
# From features. Per item: its valid frames alone, centred (or scaled to unit length), then one
# matrix product per problem, into the buffer from which the kernels take their costs.
#
# Checkpointed, neither that product nor what the kernels save is kept: only R of one row in
# `_chunk(n)`. The backward pass computes the product anew from each such row to the next.

CHECKPOINTS = True

_SCALE_FLOOR = {"sqeuclidean": (-2.0, 0.0), "cosine": (-1.0, -math.inf), "l1": (1.0, -math.inf)}


@_jit
def _add_rows(total, z):
    """total += the sum of z's rows."""
    for i in range(z.shape[0]):
        for k in range(z.shape[1]):
            total[k] += z[i, k]


@_jit_sums
def _centred(z, mean, out, squares):
    """out = z - mean, squares = the sum of its squares, row by row."""
    for i in range(z.shape[0]):
        total = squares[i] * 0
        for k in range(z.shape[1]):
            value = z[i, k] - mean[k]
            out[i, k] = value
            total += value * value
        squares[i] = total


@_jit
def _scaled_rows(out, u, sums, add):
    """out = 2 * sums * u, row by row, and 0 below u's rows; or added to it."""
    for i in range(u.shape[0]):
        scale = 2 * sums[i]
        if add:
            for k in range(u.shape[1]):
                out[i, k] += scale * u[i, k]
        else:
            for k in range(u.shape[1]):
                out[i, k] = scale * u[i, k]
    if not add:
        out[u.shape[0] :] = 0


def _prepare(x, y, cost):
    """The two factors of the product, each with the part of the cost that is its own."""
    if cost == "sqeuclidean":
        mean, sides = np.zeros(x.shape[1], x.numpy().dtype), []
        for z in (x, y):
            _add_rows(mean, z.numpy())
        mean /= len(x) + len(y)
        for z in (x, y):
            centred, squares = torch.empty_like(z), np.zeros(len(z), mean.dtype)
            _centred(z.numpy(), mean, centred.numpy(), squares)
            sides.append((centred, squares))
        return sides
    if cost == "cosine":
        return tuple((unit(z), z.new_full((len(z),), 0.5).numpy()) for z in (x, y))
    return tuple((z, z.new_zeros(len(z)).numpy()) for z in (x, y))


def _product(u, v, cost, out):
    if cost == "l1":
        out.copy_(torch.cdist(u, v, p=1.0))
    else:
        torch.mm(u, v.t(), out=out)


def _chunk(n):
    """Rows between checkpoints: as much is then kept for each as a chunk's product takes."""
    return LANES * max(1, round(math.sqrt(2 * n) / LANES))


class _Kind(NamedTuple):
    """One of an item's problems, and where in the two buffers those of all items are saved."""

    row: int  # 0: x, 1: y
    column: int
    sign: float  # of its loss in the divergence
    saved: bool
    size: int
    state_size: int
    at: int
    state_at: int


def _layout(B, N, M, divergence, checkpointed, x_grad, y_grad):
    """The problems of an item, and the sizes of the two buffers."""
    kinds = [(0, 1, 1.0, N, M, x_grad or y_grad)]
    if divergence:
        kinds += [(0, 0, -0.5, N, N, x_grad), (1, 1, -0.5, M, M, y_grad)]
    layout, at, state_at = [], 0, 0
    for row, column, sign, P, Q, saved in kinds:
        size, state_size = 0, 0
        if saved and checkpointed:
            state_size = -(-P // _chunk(P)) * Q
        elif saved:
            size, state_size = P * Q, _state_size(P, Q)
        layout.append(_Kind(row, column, sign, saved, size, state_size, at, state_at))
        at, state_at = at + B * size, state_at + B * state_size
    return layout, (at, state_at)


def saved_sizes(
    B: int, N: int, M: int, divergence: bool, checkpointed: bool, x_grad: bool, y_grad: bool
) -> tuple[int, int]:
    """As of the reference."""
    return _layout(B, N, M, divergence, checkpointed, x_grad, y_grad)[1]


class _Pair:
    """One of an item's problems, by chunks of rows: all of them at once unless checkpointed."""

    def __init__(self, b, kind, sides, padded, products, state, cost, recursion, checkpointed):
        (self.u, a), (self.v, c) = sides[kind.row], sides[kind.column]
        self.n, self.m, self.cost, self.kept = len(self.u), len(self.v), cost, not checkpointed
        self.common = a, c, recursion
        state_at = kind.state_at + b * kind.state_size
        self.state: Any = state[state_at : state_at + kind.state_size] if kind.saved else None
        # A state is laid out for the item's own lengths, which need no more than the padded ones.
        self.rows = _chunk(padded[kind.row]) if checkpointed else self.n
        if kind.size:
            self.product, self.offset, self.stride = (
                products, kind.at + b * kind.size, padded[kind.column],
            )  # fmt: skip
        else:
            self.product = self.u.new_empty(min(self.rows, self.n) * self.m)
            self.offset, self.stride = 0, self.m

    def _problem(self, start, fill, state, top):
        rows = min(self.rows, self.n - start)
        a, c, recursion = self.common
        if fill:
            out = self.product.as_strided((rows, self.m), (self.stride, 1), self.offset)
            _product(self.u[start : start + rows], self.v, self.cost, out)
        return _Problem(
            self.product.numpy(), self.offset, self.stride, rows, self.m,
            a[start : start + rows], c, *_SCALE_FLOOR[self.cost],
            state, recursion, start, self.n, top,
        )  # fmt: skip

    def forward(self):
        """Loss."""
        row = None
        for index, start in enumerate(range(0, self.n, self.rows)):
            problem = self._problem(start, True, self.state if self.kept else None, row)
            row = problem.forward()
            if self.state is not None and not self.kept:
                self.state[index * self.m : (index + 1) * self.m] = row
        return problem.end(row)[0]

    def backward(self, weight, row_sums, column_sums):
        """The strips of weight * E, whose sums are added to those given.

        Of each: its first row, E transposed [columns, rows], the first of these columns.
        """
        starts, below = range(0, self.n, self.rows), None
        for index in reversed(range(len(starts))):
            start, top = starts[index], None
            if self.kept:
                problem = self._problem(start, False, self.state, None)
                row = problem.last_row()
            else:
                rows = min(self.rows, self.n - start)
                if index:
                    top = self.state[(index - 1) * self.m : index * self.m]
                problem = self._problem(start, True, np.empty(_state_size(rows, self.m)), top)
                row = problem.forward()
            if below is None:
                below = problem.end(row)[1]
            e, spans = problem.backward_in_strips(
                weight, below, row_sums[start : start + problem.n], column_sums
            )
            e = torch.from_numpy(e).view(len(spans), self.m, LANES)
            for s, (first, last) in enumerate(spans.tolist()):
                if first < last:
                    at = start + s * LANES
                    yield at, e[s, first:last, : min(LANES, self.n - at)], first


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
    padded = x.shape[1], y.shape[1]
    layout, sizes = _layout(len(x), *padded, divergence, checkpointed, x_grad, y_grad)
    products, state = x.new_empty(sizes[0]), torch.empty(sizes[1], dtype=STATE_DTYPE)
    x, y, n, m, flat_state = x.contiguous(), y.contiguous(), n.tolist(), m.tolist(), state.numpy()

    def run(b):
        sides, loss = _prepare(x[b, : n[b]], y[b, : m[b]], cost), 0.0
        for kind in layout:
            pair = _Pair(
                b, kind, sides, padded, products, flat_state, cost, recursion, checkpointed
            )
            loss += kind.sign * pair.forward()
        return loss

    return torch.tensor(_for_each(len(x), run), dtype=x.dtype), products, state


def features_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    products: torch.Tensor,
    state: torch.Tensor,
    recursion: Recursion,
    cost: str,
    divergence: bool,
    checkpointed: bool,
    x_grad: bool,
    y_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """As of the reference."""
    padded = x.shape[1], y.shape[1]
    layout, _ = _layout(len(x), *padded, divergence, checkpointed, x_grad, y_grad)
    grads = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if k else z.new_empty(0)
        for z, k in ((x, x_grad), (y, y_grad))
    ]
    x, y, state, weights = x.contiguous(), y.contiguous(), state.numpy(), grad.tolist()
    lengths = n.tolist(), m.tolist()

    def run(b):
        valid = [z[b, : length[b]] for z, length in zip((x, y), lengths)]
        sides = _prepare(*valid, cost)  # type: ignore[call-arg]
        outs = [out[b] if len(out) else None for out in grads]
        pairs = [
            (kind, _Pair(b, kind, sides, padded, products, state, cost, recursion, checkpointed))
            for kind in layout
            if kind.saved
        ]
        _gradients(outs, pairs, weights[b], sides, valid, cost, checkpointed)

    _for_each(len(x), run)
    return tuple(grads)


def _gradients(outs, pairs, weight, sides, valid, cost, checkpointed):
    """Gradients [L, D] for an item's two sequences, into those of `outs` that are not None."""
    dtype = valid[0].numpy().dtype
    sums, flows = [np.zeros(len(z), dtype) for z in valid], []
    for kind, pair in pairs:
        # Of a sequence with itself E is symmetric: twice the rows' side does for both.
        own = kind.row == kind.column
        into = sums[kind.row], np.zeros(pair.m, dtype) if own else sums[kind.column]
        flows.append((kind, pair, pair.backward(-weight if own else weight, *into)))
    # The squares' part of the gradient goes in first, in one pass, where the sums that it takes
    # can be had first.
    first = cost == "sqeuclidean" and not checkpointed
    if first:
        flows = [(kind, pair, list(strips)) for kind, pair, strips in flows]
    for out, (side, _), side_sums in zip(outs, sides, sums):
        if out is not None and first:
            _scaled_rows(out.numpy(), side.numpy(), side_sums, False)
        elif out is not None:
            out.zero_()
    for kind, pair, strips in flows:
        rows, columns = outs[kind.row], outs[kind.column] if kind.row != kind.column else None
        for at, e, start in strips:
            i, j = slice(at, at + e.shape[1]), slice(start, start + e.shape[0])
            if rows is not None:
                _add_product(rows[i], e.t(), pair.u[i], pair.v[j], cost)
            if columns is not None:
                _add_product(columns[j], e, pair.v[j], pair.u[i], cost)
    for out, (side, _), side_sums, z in zip(outs, sides, sums, valid):
        if out is not None and cost == "sqeuclidean" and not first:
            _scaled_rows(out.numpy(), side.numpy(), side_sums, True)
        elif out is not None and cost == "cosine":
            out[: len(z)] = unit_backward(out[: len(z)], z)


def _add_product(out, e, u, v, cost):
    """out += the part of the gradient for u that e [len(u), len(v)] gives."""
    if cost == "l1":
        e = e.contiguous()
        out += torch.ops.aten._cdist_backward(e, u, v, 1.0, e)
    else:
        out.addmm_(e, v, alpha=_SCALE_FLOOR[cost][0])
