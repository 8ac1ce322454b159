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

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .cost import unit, unit_backward

STATE_DTYPE = torch.float64

LANES = 64  # rows of a strip: 4 AVX-512 or 8 AVX2 vectors of float32, enough to hide latencies
STEPS = 64  # steps of a tile; its costs (32 KB) and weights (48 KB) stay in the L2 cache

# "Infinite" R and cost, finite so that differences are never NaN. Sums of BIG stay far above any
# real R, and float32 holds both.
BIG = 1e30

# E below this is stored as 0 in float32: were all cells of a 4096 x 4096 matrix dropped, the sum
# would still change by less than one part in 2^24.
NEGLIGIBLE = 2.0**-48


def _jit(function):
    """Compile without the GIL; keep the machine code on disk where some place is writable."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


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
        return _times_power(np.float32(1.0) + f * p, shifted)

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
TILE = LANES * STEPS


@_jit
def _load_tile(tile, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi):
    """tile[t, k] = cost of (i0 + k, t0 + t - k) in base 2, BIG outside. False if all is outside.

    The cost is max(a[i] + b[j] + scale * p[i, j], floor).
    """
    tile[:] = BIG
    some = False
    for k in range(rows):
        i = i0 + k
        first, last = max(lo[i], t0 - k), min(hi[i], t0 - k + STEPS)
        at, row, a_i = (first + k - t0) * LANES + k, offset + i * stride, np.float64(a[i])
        for j in range(first, last):
            tile[at] = max(a_i + b[j] + scale * p[row + j], floor) * per_unit
            at += LANES
        some = some or first < last
    return some


@_jit
def _step(r, work, tile, at):
    """R of the next anti-diagonal of a strip; leaves the terms of its softmin in `work`."""
    for k in range(LANES):
        up, left, corner = r[LAST + k], r[LAST + k + 1], r[DIAGONAL + k]
        best = up if up < left else left
        best = corner if corner < best else best
        r[BEST + k] = best + tile[at + k]
        r[DIAGONAL + k] = up
        work[UP + k] = best - up
        work[LEFT + k] = best - left
        work[CORNER + k] = best - corner
    for k in range(LANES):
        up, left, corner = _exp2(work[UP + k]), _exp2(work[LEFT + k]), _exp2(work[CORNER + k])
        work[UP + k], work[LEFT + k], work[CORNER + k] = up, left, corner
        work[SOFT + k] = _log2(up + left + corner)
    for k in range(LANES):
        r[LAST + k + 1] = r[BEST + k] - work[SOFT + k]


@_jit
def _enter_strip(r, first):
    """R left of a strip: infinite, but for the 0 before the first cell of all."""
    r[:] = BIG
    if first:
        r[DIAGONAL] = 0.0


@_jit
def _forward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, lo, hi, border, state, save
):  # fmt: skip
    """R of the last cell, in base 2. Fills `border` [strips or 1, m] and, to save, `state`."""
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty(TILE)
    tiles = (m + LANES - 1 + STEPS - 1) // STEPS
    for s in range((n + LANES - 1) // LANES):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        above, here = (max(s - 1, 0) * m, s * m) if save else (0, 0)
        _enter_strip(r, s == 0)
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
                if s > 0 and t0 + STEPS - 1 < m:
                    r[DIAGONAL] = border[above + t0 + STEPS - 1]
            for t in range(t0, t0 + STEPS):
                if inside:
                    r[LAST] = border[above + t] if s > 0 and t < m else BIG
                    _step(r, work, tile, (t - t0) * LANES)
                j = t - rows + 1  # the column that the strip's last row has reached
                if 0 <= j < m:
                    border[here + j] = r[LAST + rows]
    return border[here + m - 1]


# In the backward pass `flow` holds what flows into the next cells from the neighbours below, right
# and below right. A corner's share arrives a step late and waits in SOON.
FROM_BELOW, FROM_RIGHT, FROM_CORNER, SOON, FLOW_SIZE = 0, 80, 160, 240, 320


@_jit
def _step_back(flow, weights, e, at, negligible):
    """E of the anti-diagonal before, and what flows on from it."""
    for k in range(LANES):
        value = flow[FROM_BELOW + k + 1] + flow[FROM_RIGHT + k] + flow[FROM_CORNER + k + 1]
        value = negligible * 0 if value < negligible else value  # NaN stays
        e[at + k] = value
        flow[FROM_CORNER + k] = flow[SOON + k]
        flow[FROM_BELOW + k] = value * weights[3 * at + k]
        flow[FROM_RIGHT + k] = value * weights[3 * at + LANES + k]
        flow[SOON + k] = value * weights[3 * at + 2 * LANES + k]


@_jit
def _backward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, lo, hi, border, state,
    weight, negligible, e, e_offset, e_strip, e_row, e_column, row_sums, column_sums, spans,
):  # fmt: skip
    """Add up weight * E where it is not 0: into e, at the given strides, and its two sums.

    spans [strips, 2] are the columns that each strip's E lies in.
    """
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty(TILE)
    weights, e_tile = np.empty(3 * TILE, p.dtype), np.empty(TILE, p.dtype)
    flow, below, next_below = (
        np.empty(FLOW_SIZE, p.dtype),
        np.zeros(m, p.dtype),
        np.zeros(m, p.dtype),
    )
    below[m - 1] = 1  # E of the last cell
    tiles = (m + LANES - 1 + STEPS - 1) // STEPS
    for s in range((n + LANES - 1) // LANES - 1, -1, -1):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        flow[:] = 0
        next_below[:] = 0
        first, last = m, 0
        for u in range(tiles - 1, -1, -1):
            t0 = u * STEPS
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
            for t in range(t0, t0 + STEPS):
                r[LAST] = border[(s - 1) * m + t] if s > 0 and t < m else BIG
                at = (t - t0) * LANES
                _step(r, work, tile, at)
                for k in range(LANES):
                    up, left, corner = work[UP + k], work[LEFT + k], work[CORNER + k]
                    share = 1 / (up + left + corner)
                    weights[3 * at + k] = up * share
                    weights[3 * at + LANES + k] = left * share
                    weights[3 * at + 2 * LANES + k] = corner * share
            # Backward.
            for t in range(t0 + STEPS - 1, t0 - 1, -1):
                j = t - rows + 1
                flow[FROM_BELOW + rows] = below[j] if 0 <= j < m else 0
                flow[FROM_CORNER + rows] = 0
                _step_back(flow, weights, e_tile, (t - t0) * LANES, negligible)
                if t < m:
                    next_below[t] += flow[FROM_BELOW]
                    next_below[t - 1 if t > 0 else 0] += flow[SOON] if t > 0 else 0
            for k in range(rows):
                i = i0 + k
                j0, j1 = max(lo[i], t0 - k), min(hi[i], t0 - k + STEPS)
                for j in range(j0, j1):
                    value = e_tile[(j + k - t0) * LANES + k]
                    if value != 0:
                        value *= weight
                        e[e_offset + s * e_strip + k * e_row + j * e_column] = value
                        row_sums[i] += value
                        column_sums[j] += value
                        first, last = min(first, j), max(last, j + 1)
        below, next_below = next_below, below
        spans[s, 0], spans[s, 1] = min(first, last), last


# --------------------------------------------------------------------------------------------------
# From tensors to kernels


def _strips(n):
    return -(-n // LANES)


def _state_size(N, M):
    return _strips(N) * (M + -(-(M + LANES - 1) // STEPS) * 2 * LANES)


def _band(n, m, bandwidth):
    """First and last + 1 column of each row's cells; see reference.band_mask."""
    if bandwidth is None or n == 1:
        return np.zeros(n, np.int64), np.full(n, m)
    line, width = 2 * (m - 1) * np.arange(n), (2 * bandwidth + 1) * (max(n, m) - 1)
    lo, hi = -((width - line) // (2 * (n - 1))), (width + line) // (2 * (n - 1))
    return np.maximum(lo, 0), np.minimum(hi + 1, m)


_pool = threads_of_pool = None


def _for_each(items, function):
    """[function(b) for b in range(items)], on as many threads as PyTorch uses.

    Python threads, which the kernels and PyTorch's operators free of the GIL. Whole items run in
    parallel, each operator on one thread (more where there are fewer items than threads): nothing
    waits at the barriers of a parallel matrix product, which on a busy machine is most of the time.
    """
    global _pool, threads_of_pool
    threads = torch.get_num_threads()
    if threads == 1 or items <= 1:
        return [function(b) for b in range(items)]
    if threads_of_pool != (os.getpid(), threads):  # a forked process has none of the threads
        _pool = ThreadPoolExecutor(threads, "soft_dtw")
        threads_of_pool = os.getpid(), threads

    def run(b):
        torch.set_num_threads(max(1, threads // items))
        with torch.no_grad():  # a setting of each thread
            return function(b)

    try:
        return list(_pool.map(run, range(items)))
    finally:
        torch.set_num_threads(threads)  # also the default of threads to come


class _Problem:
    """One pair of sequences in the form that the kernels take.

    p: flat tensor whose entries offset + i * stride + j make the matrix; a, b, scale, floor: the
    cost is max(a[i] + b[j] + scale * p[i, j], floor); state: flat float64, None to save nothing.
    """

    def __init__(self, p, offset, stride, n, m, a, b, scale, floor, state, gamma, bandwidth):
        self.n, self.m, self.unit, self.save = n, m, gamma * math.log(2), state is not None
        if state is None:
            state = torch.empty(m, dtype=STATE_DTYPE)
        border = _strips(n) * m if self.save else m
        state = state.numpy()
        self.arguments = (
            p.numpy(), offset, stride, n, m, a, b, scale, floor, 1 / self.unit,
            *_band(n, m, bandwidth), state[:border], state[border:],
        )  # fmt: skip

    def forward(self):
        return _forward(*self.arguments, self.save) * self.unit

    def backward(self, weight, e, e_offset, e_strip, e_row, e_column):
        """Write weight * E into the flat array e; returns row and column sums and spans."""
        sums = np.zeros(self.n, e.dtype), np.zeros(self.m, e.dtype)
        spans = np.empty((_strips(self.n), 2), np.int64)
        negligible = e.dtype.type(NEGLIGIBLE if e.dtype == np.float32 else 0)
        _backward(
            *self.arguments, e.dtype.type(weight), negligible,
            e, e_offset, e_strip, e_row, e_column, *sums, spans,
        )  # fmt: skip
        return *sums, spans

    def backward_in_strips(self, weight):
        """E as [strips, m, LANES], mostly untouched zeros, so that a strip's span is one block."""
        dtype = self.arguments[0].dtype
        e = np.zeros(_strips(self.n) * self.m * LANES, dtype)  # calloc: no page until written
        return e, *self.backward(weight, e, 0, self.m * LANES, 1, LANES)


# --------------------------------------------------------------------------------------------------
# From a cost matrix


def cost_saved_sizes(B, N, M, grad):
    return B * _state_size(N, M) if grad else 0


def _cost_problems(d, n, m, state, gamma, bandwidth):
    _, N, M = d.shape
    zeros = np.zeros(max(N, M), d.numpy().dtype)
    each = _state_size(N, M)
    problems = []
    for b, (n_b, m_b) in enumerate(zip(n.tolist(), m.tolist())):
        part = state[b * each : (b + 1) * each] if len(state) else None
        p = _Problem(
            d.view(-1), b * N * M, M, n_b, m_b, zeros, zeros, 1.0, -math.inf,
            part, gamma, bandwidth,
        )  # fmt: skip
        problems.append(p)
    return problems


def cost_forward(d, n, m, gamma, bandwidth, grad):
    state = torch.empty(cost_saved_sizes(*d.shape, grad), dtype=STATE_DTYPE)
    problems = _cost_problems(d, n, m, state, gamma, bandwidth)
    return torch.tensor(
        _for_each(len(problems), lambda b: problems[b].forward()), dtype=d.dtype
    ), state


def cost_backward(grad, d, n, m, state, gamma, bandwidth):
    _, N, M = d.shape
    problems = _cost_problems(d, n, m, state, gamma, bandwidth)
    e = np.zeros(d.numel(), d.numpy().dtype)
    weights = grad.tolist()

    def run(b):
        problems[b].backward(weights[b], e, b * N * M, LANES * M, M, 1)

    _for_each(len(problems), run)
    return torch.from_numpy(e).view(d.shape)


# --------------------------------------------------------------------------------------------------
# From features. Per item: its valid frames alone, centred (or scaled to unit length), then one
# matrix product per problem, into the buffer from which the kernels take their costs.

_SCALE_FLOOR = {"sqeuclidean": (-2.0, 0.0), "cosine": (-1.0, -math.inf), "l1": (1.0, -math.inf)}


def _prepare(x, y, cost):
    """The two factors of the product, each with the part of the cost that is its own."""
    if cost == "sqeuclidean":
        mean = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
        x, y = x - mean, y - mean
        return (x, (x * x).sum(1)), (y, (y * y).sum(1))
    if cost == "cosine":
        return tuple((unit(z), z.new_full((len(z),), 0.5)) for z in (x, y))
    return tuple((z.contiguous(), z.new_zeros(len(z))) for z in (x, y))


def _layout(B, N, M, divergence, x_grad, y_grad):
    """Per item's problem: (its two sequences, their padded lengths, saved?), and where it is saved.

    Then the sizes of the two buffers.
    """
    kinds = [(0, 1, N, M, x_grad or y_grad)]
    if divergence:
        kinds += [(0, 0, N, N, x_grad), (1, 1, M, M, y_grad)]
    layout, at, state_at = [], 0, 0
    for row, column, P, Q, saved in kinds:
        layout.append((row, column, P, Q, saved, at, state_at))
        if saved:
            at, state_at = at + B * P * Q, state_at + B * _state_size(P, Q)
    return layout, (at, state_at)


def saved_sizes(B, N, M, divergence, x_grad, y_grad):
    return _layout(B, N, M, divergence, x_grad, y_grad)[1]


def _problem(b, kind, sides, products, state, cost, gamma, bandwidth, fill):
    row, column, P, Q, saved, at, state_at = kind
    (u, a), (v, c) = sides[row], sides[column]
    if saved:
        p, offset, stride = products, at + b * P * Q, Q
        state_at += b * _state_size(P, Q)
        state = state[state_at : state_at + _state_size(P, Q)]
        # A state is laid out for the item's own lengths, which need no more than the padded ones.
    else:
        p, offset, stride, state = u.new_empty(len(u) * len(v)), 0, len(v), None
    if fill:
        out = p.as_strided((len(u), len(v)), (stride, 1), offset)
        if cost == "l1":
            out.copy_(torch.cdist(u, v, p=1.0))
        else:
            torch.mm(u, v.t(), out=out)
    return _Problem(
        p, offset, stride, len(u), len(v), a.numpy(), c.numpy(), *_SCALE_FLOOR[cost],
        state, gamma, bandwidth,
    )  # fmt: skip


def features_forward(x, y, n, m, gamma, bandwidth, cost, divergence, x_grad, y_grad):
    layout, sizes = _layout(len(x), x.shape[1], y.shape[1], divergence, x_grad, y_grad)
    products, state = x.new_empty(sizes[0]), torch.empty(sizes[1], dtype=STATE_DTYPE)
    n, m = n.tolist(), m.tolist()

    def run(b):
        sides, loss = _prepare(x[b, : n[b]], y[b, : m[b]], cost), 0.0
        for kind in layout:
            problem = _problem(b, kind, sides, products, state, cost, gamma, bandwidth, fill=True)
            loss += problem.forward() * (1.0 if kind is layout[0] else -0.5)
        return loss

    return torch.tensor(_for_each(len(x), run), dtype=x.dtype), products, state


def features_backward(
    grad, x, y, n, m, products, state, gamma, bandwidth, cost, divergence, x_grad, y_grad
):
    layout, _ = _layout(len(x), x.shape[1], y.shape[1], divergence, x_grad, y_grad)
    grads = [torch.empty_like(z) if k else z.new_empty(0) for z, k in ((x, x_grad), (y, y_grad))]
    weights, lengths = grad.tolist(), (n.tolist(), m.tolist())

    def run(b):
        valid = [z[b, : length[b]] for z, length in zip((x, y), lengths)]
        sides, flows = _prepare(*valid, cost), []
        for kind in layout:
            if kind[4]:
                problem = _problem(
                    b, kind, sides, products, state, cost, gamma, bandwidth, fill=False
                )
                # Of a sequence with itself E is symmetric: twice the rows' side does for both.
                weight = weights[b] * (1 if kind is layout[0] else -1)
                flows.append((kind, problem.backward_in_strips(weight)))
        for side, out in enumerate(grads):
            if len(out):
                length = lengths[side][b]
                out[b, length:] = 0
                _gradient(out[b, :length], side, flows, sides, valid[side], cost)

    _for_each(len(x), run)
    return tuple(grads)


def _gradient(out, side, problems, sides, z, cost):
    """Gradient for z, one side of an item's problems, into out: both [length, D]."""
    u = sides[side][0]
    sums = sum(
        torch.from_numpy(result[1 + (kind[0] != side)])
        for kind, result in problems
        if side in kind[:2]
    )
    if cost == "sqeuclidean":
        torch.mul(u, 2 * sums[:, None], out=out)
    else:
        out.zero_()
    for (row, column, *_), (e, _, _, spans) in problems:
        if side not in (row, column):
            continue
        v = sides[column if row == side else row][0]
        e = torch.from_numpy(e).view(len(spans), -1, LANES)
        for s, (first, last) in enumerate(spans.tolist()):
            rows = slice(s * LANES, min((s + 1) * LANES, len(u if row == side else v)))
            block = e[s, first:last, : rows.stop - rows.start]  # E transposed
            if row == side:
                _add_product(out[rows], block.t(), u[rows], v[first:last], cost)
            else:
                _add_product(out[first:last], block, u[first:last], v[rows], cost)
    if cost == "cosine":
        out.copy_(unit_backward(out, z))


def _add_product(out, e, u, v, cost):
    """out += the part of the gradient for u that e [len(u), len(v)] gives."""
    if cost == "l1":
        e = e.contiguous()
        out += torch.ops.aten._cdist_backward(e, u, v, 1.0, e)
    else:
        out.addmm_(e, v, alpha=_SCALE_FLOOR[cost][0])
