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

Threads run over the batch, as many as torch.get_num_threads() says, and where they can are those
of PyTorch's own operators.
"""

import ctypes
import functools
import math
import os
import pathlib
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
STEPS = LANES  # steps of a tile; its costs (32 KB) and weights (48 KB) stay in the L2 cache

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


@intrinsic
def _transpose_block(typingctx, source, s, s_stride, target, t, t_stride):
    """target[t + j * t_stride + i] = source[s + i * s_stride + j] for i and j below _BLOCK."""

    def codegen(context, builder, signature, args):
        element = context.get_data_type(signature.args[0].dtype)
        size = signature.args[0].dtype.bitwidth // 8
        width = 32 // size
        vector = ir.VectorType(element, width)
        arrays = [context.make_array(signature.args[k])(context, builder, args[k]) for k in (0, 3)]

        def pointer(array, at, stride, i):
            at = builder.add(at, builder.mul(stride, ir.Constant(stride.type, i)))
            return builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())

        rows = []
        for i in range(width):
            rows.append(builder.load(pointer(arrays[0], args[1], args[2], i)))
            rows[-1].align = size
        distance = 1
        while distance < width:
            halves = [
                [k if not k & distance else width + k - distance for k in range(width)],
                [k + distance if not k & distance else width + k for k in range(width)],
            ]
            low, high = (ir.Constant(ir.VectorType(ir.IntType(32), width), h) for h in halves)
            for i in range(width):
                if not i & distance:
                    pair = rows[i], rows[i + distance]
                    rows[i] = builder.shuffle_vector(*pair, low)
                    rows[i + distance] = builder.shuffle_vector(*pair, high)
            distance *= 2
        for i, row in enumerate(rows):
            builder.store(row, pointer(arrays[1], args[4], args[5], i)).align = size
        return context.get_dummy_value()

    one = types.intp
    return types.void(source, one, one, target, one, one), codegen


@_jit
def _transpose(source, target):
    """Of a tile, [STEPS, LANES] and [LANES, STEPS] or the other way round, both flat."""
    block = 32 // source.itemsize
    for i in range(0, STEPS, block):
        for j in range(0, STEPS, block):
            _transpose_block(  # type: ignore[call-arg]
                source, i * STEPS + j, STEPS, target, j * STEPS + i, STEPS
            )


@_jit
def _load_tile(
    tile, by_lane, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi
):
    """tile[t, k] = cost of (i0 + k, t0 + t - k) in base 2, BIG outside. False if all is outside.

    The cost is max(a[i] + b[j] + scale * p[i, j], floor). `by_lane` holds it transposed.
    """
    some = False
    for k in range(LANES):
        lane = by_lane[k * STEPS : (k + 1) * STEPS]
        i = i0 + k
        first = max(lo[i], t0 - k) if k < rows else 0
        last = min(hi[i], t0 - k + STEPS) if k < rows else 0
        if first >= last:
            lane[:] = BIG
            continue
        some = True
        at, begin, end = offset + i * stride, first + k - t0, last + k - t0
        product, own, a_i = p[at + first : at + last], b[first:last], np.float64(a[i])
        lane[:begin] = BIG
        costs = lane[begin:end]
        for j in range(len(product)):
            costs[j] = max(a_i + own[j] + scale * product[j], floor) * per_unit
        lane[end:] = BIG
    if some:
        _transpose(by_lane, tile)
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


@_jit
def _tiles(m):
    return (m + LANES - 1 + STEPS - 1) // STEPS


@_jit
def _forward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, paths, first, total, border, state, save
):
    """R of n rows from `first` of the pair's `total`, in base 2, given R of the row above them in
    border[0].

    border [strips + 1, m], or [1, m] without `save`, gets R of each strip's last row; to save,
    `state` gets what enters each tile.
    """
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty(STEPS * LANES)
    by_lane = np.empty(LANES * STEPS)
    down, right, diagonal, hard, open_begin, bandwidth, itakura = paths
    penalised = down != 0 or right != 0 or diagonal != 0
    lo, hi = _band(first, n, total, m, bandwidth, itakura)
    tiles = _tiles(m)
    for s in range((n + LANES - 1) // LANES):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        above, here = (s * m, (s + 1) * m) if save else (0, 0)
        start = first + s == 0
        _enter_strip(r, -diagonal if start else BIG)
        for u in range(tiles):
            t0 = u * STEPS
            if save:
                at = (s * tiles + u) * 2 * LANES
                for k in range(LANES):
                    state[at + k] = r[LAST + k + 1]
                    state[at + LANES + k] = r[DIAGONAL + k]
            inside = _load_tile(
                tile, by_lane, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi
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
                    _step(
                        r,
                        work,
                        tile[(t - t0) * LANES : (t - t0 + 1) * LANES],
                        down,
                        right,
                        diagonal,
                        penalised,
                        hard,
                    )
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


@_jit_sums
def _write(values, weight, zero, e, column_sums):
    """e = weight * values; column_sums += values; the values' sum."""
    total = zero
    for j in range(len(values)):
        e[j] = weight * values[j]
        column_sums[j] += values[j]
        total += values[j]
    return total


@_jit
def _backward(
    p, offset, stride, n, m, a, b, scale, floor, per_unit, paths, first, total, border, state,
    weight, negligible, below, e, e_offset, e_stride, row_sums, column_sums, spans,
):  # fmt: skip
    """Write weight * E of all n rows into e, at e_offset + i * e_stride + j, and add to its sums.

    `below` [m] is what flows into the last row from what lies below it, and then what flows out
    of the first row. spans [strips, 2] are the columns that each strip's E lies in.
    """
    r, work, tile = np.empty(R_SIZE), np.empty(WORK_SIZE, p.dtype), np.empty(STEPS * LANES)
    by_lane, weights = np.empty(LANES * STEPS), np.empty((STEPS, 3 * LANES), p.dtype)
    e_tile, e_by_lane = np.zeros(STEPS * LANES, p.dtype), np.empty(LANES * STEPS, p.dtype)
    flow, next_below, strip_sums = (
        np.empty(FLOW_SIZE, p.dtype), np.zeros(m, p.dtype), np.empty(m, p.dtype),
    )  # fmt: skip
    down, right, diagonal, hard, open_begin, bandwidth, itakura = paths
    penalised = down != 0 or right != 0 or diagonal != 0
    lo, hi = _band(first, n, total, m, bandwidth, itakura)
    tiles, zero = _tiles(m), negligible - negligible
    for s in range((n + LANES - 1) // LANES - 1, -1, -1):
        i0 = s * LANES
        rows = min(LANES, n - i0)
        start = first + s == 0
        flow[:] = 0
        next_below[:] = 0
        strip_sums[:] = 0
        for k in range(rows):
            row = e_offset + (i0 + k) * e_stride
            e[row : row + m] = 0
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
            _load_tile(
                tile, by_lane, i0, rows, t0, p, offset, stride, a, b, scale, floor, per_unit, lo, hi
            )
            at = (s * tiles + u) * 2 * LANES
            for k in range(LANES):
                r[LAST + k + 1] = state[at + k]
                r[DIAGONAL + k] = state[at + LANES + k]
            for t in range(t0, t1):
                r[LAST] = border[s * m + t] if t < m else BIG
                if open_begin and start:
                    r[DIAGONAL] = -diagonal
                _step(
                    r,
                    work,
                    tile[(t - t0) * LANES : (t - t0 + 1) * LANES],
                    down,
                    right,
                    diagonal,
                    penalised,
                    hard,
                )
                _save_weights(work, weights[t - t0])
            # Backward.
            for t in range(t1 - 1, t0 - 1, -1):
                j = t - rows + 1
                flow[FROM_BELOW + rows] = below[j] if 0 <= j < m else 0
                flow[FROM_CORNER + rows] = 0
                diagonal_e = e_tile[(t - t0) * LANES : (t - t0 + 1) * LANES]
                _step_back(flow, weights[t - t0], diagonal_e, negligible, zero)
                if t < m:
                    next_below[t] += flow[FROM_BELOW]
                    next_below[t - 1 if t > 0 else 0] += flow[SOON] if t > 0 else 0
            _transpose(e_tile, e_by_lane)
            for k in range(rows):
                i = i0 + k
                j0, j1 = max(lo[i], t0 - k), min(hi[i], t0 - k + STEPS)
                if j0 < j1:
                    at = k * STEPS + k - t0
                    lane, row = e_by_lane[at + j0 : at + j1], e_offset + i * e_stride
                    row_sums[i] += weight * _write(
                        lane, weight, zero, e[row + j0 : row + j1], strip_sums[j0:j1]
                    )
        below[:] = next_below
        begin, end = 0, m
        while end > 0 and strip_sums[end - 1] == 0:
            end -= 1
        while begin < end and strip_sums[begin] == 0:
            begin += 1
        for j in range(begin, end):
            column_sums[j] += weight * strip_sums[j]
        spans[s, 0], spans[s, 1] = begin, end


# --------------------------------------------------------------------------------------------------
# From tensors to kernels


def _strips(n):
    return -(-n // LANES)


def _state_size(N, M):
    """What a problem saves: `border` and `state` of `_forward`."""
    return (_strips(N) + 1) * M + _strips(N) * -(-(M + LANES - 1) // STEPS) * 2 * LANES


_pool: Any = None
_threads_of_pool = None
_PROCESS = os.getpid()
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp():
    """`GOMP_parallel(task, data, threads, flags)` of the OpenMP library that PyTorch runs on, or
    None where it runs on another kind."""
    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # its own or of a library that it needs
    except (OSError, AttributeError):
        return None
    parallel.argtypes = _TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


def _for_each(items, start):
    """[run(b) for b in range(items)], on as many threads as PyTorch uses: each has start() make
    its `run`, and with that what it writes to.

    The kernels and PyTorch's operators free the threads of the GIL. Whole items run in
    parallel, each operator on one thread (more where there are fewer items than threads): nothing
    waits at the barriers of a parallel matrix product, which on a busy machine is most of the time.
    What Python itself does for an item runs on one thread at a time: there is to be little of it.
    """
    threads = torch.get_num_threads()
    if threads == 1 or items <= 1:
        run = start()
        return [run(b) for b in range(items)]
    results = [None] * items
    waiting = iter(range(items))  # next() is atomic

    def work():
        with torch.no_grad():  # a setting of each thread
            run = start()
            for b in waiting:
                results[b] = run(b)

    parallel = _openmp()
    if parallel and items >= threads and os.getpid() == _PROCESS:
        _in_openmp(parallel, work, threads)
    else:
        _in_pool(work, threads, items)
    return results


def _in_openmp(parallel, work, threads):
    """work() in each of PyTorch's own threads.

    After its last operator such a thread waits for the next at full load, for up to some ten
    milliseconds; threads of ours would share its core meanwhile.
    """
    errors = []

    def task(_):
        try:
            work()
        except BaseException as error:  # one that leaves the task would be printed and lost
            errors.append(error)

    parallel(_TASK(task), None, threads, 0)
    if errors:
        raise errors[0]


def _in_pool(work, threads, items):
    """work() in the calling thread and in some of Python's; one that gets no processor costs
    nothing."""
    global _pool, _threads_of_pool
    if _threads_of_pool != (os.getpid(), threads):  # a forked process has none of the threads
        _pool = ThreadPoolExecutor(threads, "soft_dtw")
        _threads_of_pool = os.getpid(), threads
    pool = _pool

    def work_on_few():
        torch.set_num_threads(max(1, threads // items))
        work()

    helpers = [pool.submit(work_on_few) for _ in range(min(threads, items) - 1)]
    try:
        work_on_few()
    finally:
        torch.set_num_threads(threads)  # also the default of threads to come
        for helper in helpers:
            # One that has not started finds nothing left to do.
            if not helper.cancel():
                helper.result()


class _Paths(NamedTuple):
    """A Recursion as the kernels take it."""

    numbers: tuple[float | bool | int, ...]  # down, right, diagonal, hard, open_begin, two bands
    unit: float  # of R and of costs
    hard: bool
    open_end: bool


def _paths(recursion):
    hard = recursion.gamma == 0
    unit = 1.0 if hard else recursion.gamma * math.log(2)
    bands = (-1 if k is None else k for k in (recursion.bandwidth, recursion.itakura))
    steps = (penalty / unit for penalty in (recursion.down, recursion.right, recursion.diagonal))
    return _Paths((*steps, hard, recursion.open_begin, *bands), unit, hard, recursion.open_end)


class _Problem:
    """A pair of sequences, or some of its rows, in the form that the kernels take.

    p: flat array whose entries offset + i * stride + j make the matrix of n rows from `start` of
    the pair's `total`, and m columns; a, b, scale, floor: the cost is
    max(a[i] + b[j] + scale * p[i, j], floor); state: flat float64, None to save nothing; top: R of
    the row above, None at the start.
    """

    def __init__(
        self, p, offset, stride, n, m, a, b, scale, floor, state, paths, start, total, top=None
    ):
        self.m, self.paths, self.save = m, paths, state is not None
        rows = _strips(n) + 1 if self.save else 1
        if state is None:
            state = np.empty(m)
        self.border = state[: rows * m]
        self.border[:m] = BIG if top is None else top
        self.arguments = (
            p, offset, stride, n, m, a, b, scale, floor, 1 / paths.unit, paths.numbers,
            start, total, self.border, state[rows * m :],
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
        return _end(row, self.paths.hard, self.paths.open_end, weights) * self.paths.unit, weights

    def backward(self, weight, below, e, offset, stride, row_sums, column_sums):
        """Write weight * E at offset + i * stride + j of e; add to its sums; each strip's span."""
        spans = np.empty((_strips(self.arguments[3]), 2), np.int64)
        negligible = e.dtype.type(NEGLIGIBLE if e.dtype == np.float32 else 0)
        _backward(
            *self.arguments, e.dtype.type(weight), negligible, below, e, offset, stride,
            row_sums, column_sums, spans,
        )  # fmt: skip
        return spans


# --------------------------------------------------------------------------------------------------
# From a cost matrix


def cost_saved_sizes(B: int, N: int, M: int, grad: bool) -> int:
    """As of the reference."""
    return B * _state_size(N, M) if grad else 0


def _cost_problems(d, n, m, state, recursion):
    """A function that makes the problem of item b."""
    B, N, M = d.shape
    each, paths = len(state) // max(B, 1), _paths(recursion)
    flat, zeros, n, m = (
        d.numpy().reshape(-1),
        np.zeros(max(N, M), d.numpy().dtype),
        *(k.tolist() for k in (n, m)),
    )
    state = state.numpy()

    def problem(b):
        own = state[b * each : (b + 1) * each] if each else None
        return _Problem(
            flat, b * N * M, M, n[b], m[b], zeros, zeros, 1.0, -math.inf, own, paths, 0, n[b]
        )

    return problem


def cost_forward(
    d: torch.Tensor, n: torch.Tensor, m: torch.Tensor, recursion: Recursion, grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As of the reference."""
    B, N, M = d.shape
    state = torch.empty(cost_saved_sizes(B, N, M, grad), dtype=STATE_DTYPE)
    problem = _cost_problems(d, n, m, state, recursion)

    def run(b):
        of_item = problem(b)
        return of_item.end(of_item.forward())[0]

    return torch.tensor(_for_each(B, lambda: run), dtype=d.dtype), state


def cost_backward(
    grad: torch.Tensor,
    d: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    state: torch.Tensor,
    recursion: Recursion,
) -> torch.Tensor:
    """As of the reference."""
    B, N, M = d.shape
    problem, weights = _cost_problems(d, n, m, state, recursion), grad.tolist()
    e = np.zeros(d.numel(), d.numpy().dtype)

    def start():
        sums = np.zeros(N, e.dtype), np.zeros(M, e.dtype)  # not used

        def run(b):
            of_item = problem(b)
            _, below = of_item.end(of_item.last_row())
            of_item.backward(weights[b], below, e, b * N * M, M, *sums)

        return run

    _for_each(B, start)
    return torch.from_numpy(e).view(d.shape)


# --------------------------------------------------------------------------------------------------
# From features. Per item: its valid frames alone, centred (or scaled to unit length), then one
# matrix product per problem, into the buffer from which the kernels take their costs.
#
# Checkpointed, neither that product nor what the kernels save is kept: only R of one row in
# `_chunk(n)`. The backward pass computes the product anew from each such row to the next.

CHECKPOINTS = True

_SCALE_FLOOR = {"sqeuclidean": (-2.0, 0.0), "cosine": (-1.0, -math.inf), "l1": (1.0, -math.inf)}


@_jit_sums
def _centre(x, y, u, v, x_squares, y_squares):
    """u, v = x, y without the mean of both, and the sums of their rows' squares."""
    mean = np.zeros(x.shape[1], x.dtype)
    for z in (x, y):
        for i in range(z.shape[0]):
            for k in range(z.shape[1]):
                mean[k] += z[i, k]
    mean /= x.shape[0] + y.shape[0]
    for z, out, squares in ((x, u, x_squares), (y, v, y_squares)):
        for i in range(z.shape[0]):
            total = mean[0] * 0
            for k in range(z.shape[1]):
                value = z[i, k] - mean[k]
                out[i, k] = value
                total += value * value
            squares[i] = total


@_jit
def _add_scaled_rows(out, u, sums):
    """out += 2 * sums * u, row by row."""
    for i in range(u.shape[0]):
        scale = 2 * sums[i]
        for k in range(u.shape[1]):
            out[i, k] += scale * u[i, k]


def _preparing(x, y, n, m, cost):
    """A function of b: for either sequence of item b the factor of the product and the part of the
    cost that is its own, in memory that the next call overwrites."""
    dtype, lengths = x.numpy().dtype, (n, m)
    if cost == "sqeuclidean":
        factors = [z.new_empty(z.shape[1:]) for z in (x, y)]
        squares = [np.empty(z.shape[1], dtype) for z in (x, y)]
        x_array, y_array, u_array, v_array = (z.numpy() for z in (x, y, *factors))

        def centred(b):
            N, M = n[b], m[b]
            a, c = squares[0][:N], squares[1][:M]
            _centre(x_array[b, :N], y_array[b, :M], u_array[:N], v_array[:M], a, c)
            return (factors[0][:N], a), (factors[1][:M], c)

        return centred
    constant = 0.5 if cost == "cosine" else 0.0
    constants = [np.full(z.shape[1], constant, dtype) for z in (x, y)]

    def others(b):
        valid = (z[b, : length[b]] for z, length in zip((x, y), lengths))
        factors = (unit(z) if cost == "cosine" else z for z in valid)
        return tuple((z, own[: len(z)]) for z, own in zip(factors, constants))

    return others


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


class _Call(NamedTuple):
    """What the problems of a batch share."""

    cost: str
    paths: _Paths
    checkpointed: bool
    padded: tuple[int, int]
    products: torch.Tensor
    products_array: np.ndarray
    state: np.ndarray

    def rows(self, n):
        """Of a chunk."""
        return min(_chunk(n), n) if self.checkpointed else n


class _Pair:
    """One of an item's problems, by chunks of rows: all of them at once unless checkpointed."""

    def __init__(self, call, b, kind, sides):
        self.call = call
        (self.u, self.a), (self.v, self.c) = sides[kind.row], sides[kind.column]
        self.n, self.m = len(self.a), len(self.c)
        state_at = kind.state_at + b * kind.state_size
        self.state: Any = call.state[state_at : state_at + kind.state_size] if kind.saved else None
        # A state is laid out for the item's own lengths, which need no more than the padded ones.
        self.rows = call.rows(self.n)
        if kind.size:
            self.product, self.array = call.products, call.products_array
            self.offset, self.stride = kind.at + b * kind.size, call.padded[kind.column]
        else:
            self.product = self.u.new_empty(self.rows * self.m)
            self.array, self.offset, self.stride = self.product.numpy(), 0, self.m

    def _problem(self, start, fill, state, top):
        rows = min(self.rows, self.n - start)
        if fill:
            out = self.product.as_strided((rows, self.m), (self.stride, 1), self.offset)
            _product(self.u[start : start + rows], self.v, self.call.cost, out)
        return _Problem(
            self.array, self.offset, self.stride, rows, self.m,
            self.a[start : start + rows], self.c, *_SCALE_FLOOR[self.call.cost],
            state, self.call.paths, start, self.n, top,
        )  # fmt: skip

    def forward(self):
        """Loss."""
        row, kept = None, not self.call.checkpointed
        for index, start in enumerate(range(0, self.n, self.rows)):
            problem = self._problem(start, True, self.state if kept else None, row)
            row = problem.forward()
            if self.state is not None and not kept:
                self.state[index * self.m : (index + 1) * self.m] = row
        return problem.end(row)[0]

    def backward(self, weight, e, row_sums, column_sums):
        """Blocks of weight * E that hold all that is not 0; their sums are added to those given.

        Of each: its first row, the first of its columns and the block itself, which lies in `e`
        until the next chunk.
        """
        starts, below, array = range(0, self.n, self.rows), None, e.numpy()
        for index in reversed(range(len(starts))):
            start, top = starts[index], None
            rows = min(self.rows, self.n - start)
            if not self.call.checkpointed:
                problem = self._problem(start, False, self.state, None)
                row = problem.last_row()
            else:
                if index:
                    top = self.state[(index - 1) * self.m : index * self.m]
                problem = self._problem(start, True, np.empty(_state_size(rows, self.m)), top)
                row = problem.forward()
            if below is None:
                below = problem.end(row)[1]
            spans = problem.backward(
                weight, below, array, 0, self.m, row_sums[start : start + rows], column_sums
            )
            for i, end, j, last in _blocks(spans.tolist(), rows):
                size, at = (end - i, last - j), i * self.m + j
                yield start + i, j, e.as_strided(size, (self.m, 1), at)


def _blocks(spans, rows):
    """Strips with their spans [strips, 2] as blocks (row, last row + 1, column, last column + 1).

    Neighbours are one block where it holds little more than they do: a product less.
    """
    blocks: list[tuple[int, int, int, int]] = []
    area = 0
    for s, (first, last) in enumerate(spans):
        top, end = s * LANES, min((s + 1) * LANES, rows)
        if first >= last:
            continue
        own = (end - top) * (last - first)
        if blocks and blocks[-1][1] == top:
            above, _, left, right = blocks[-1]
            left, right = min(left, first), max(right, last)
            if (end - above) * (right - left) <= 1.1 * (area + own):
                blocks[-1], area = (above, end, left, right), area + own
                continue
        blocks.append((top, end, first, last))
        area = own
    return blocks


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
    call = _Call(
        cost, _paths(recursion), checkpointed, padded, products, products.numpy(), state.numpy()
    )
    sides = x.contiguous(), y.contiguous(), n.tolist(), m.tolist(), cost

    def start():
        prepare = _preparing(*sides)

        def run(b):
            prepared = prepare(b)
            return sum(kind.sign * _Pair(call, b, kind, prepared).forward() for kind in layout)

        return run

    return torch.tensor(_for_each(len(x), start), dtype=x.dtype), products, state


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
    layout = [kind for kind in layout if kind.saved]
    call = _Call(
        cost, _paths(recursion), checkpointed, padded, products, products.numpy(), state.numpy()
    )
    grads = [
        torch.empty_like(z, memory_format=torch.contiguous_format) if k else z.new_empty(0)
        for z, k in ((x, x_grad), (y, y_grad))
    ]
    x, y, weights = x.contiguous(), y.contiguous(), grad.tolist()
    sides = x, y, n.tolist(), m.tolist(), cost
    size = max(call.rows(padded[kind.row]) * padded[kind.column] for kind in layout)

    def start():
        prepare, e = _preparing(*sides), x.new_empty(size)

        def run(b):
            prepared = prepare(b)
            pairs = [(kind, _Pair(call, b, kind, prepared)) for kind in layout]
            outs = [
                out[b].zero_()[: len(own)] if len(out) else None
                for out, (_, own) in zip(grads, prepared)
            ]
            _gradients(outs, pairs, weights[b], prepared, e, cost)
            if cost == "cosine":
                for out, z in zip(outs, (x[b], y[b])):
                    if out is not None:
                        out.copy_(unit_backward(out, z[: len(out)]))

        return run

    _for_each(len(x), start)
    return tuple(grads)


def _gradients(outs, pairs, weight, sides, e, cost):
    """Add the gradients for an item's two factors to those of `outs` [L, D] that are not None."""
    sums = [np.zeros_like(own) for _, own in sides]
    for kind, pair in pairs:
        # Of a sequence with itself E is symmetric: twice the rows' side does for both.
        own = kind.row == kind.column
        into = sums[kind.row], np.empty_like(pair.c) if own else sums[kind.column]
        rows, columns = outs[kind.row], None if own else outs[kind.column]
        for at, first, block in pair.backward(-weight if own else weight, e, *into):
            i, j = slice(at, at + block.shape[0]), slice(first, first + block.shape[1])
            u, v = pair.u[i], pair.v[j]
            if rows is not None:
                _add_product(rows[i], block, u, v, cost)
            if columns is not None:
                _add_product(columns[j], block.t(), v, u, cost)
    if cost == "sqeuclidean":
        for out, (factor, _), own_sums in zip(outs, sides, sums):
            if out is not None:
                _add_scaled_rows(out.numpy(), factor.numpy(), own_sums)


def _add_product(out, e, u, v, cost):
    """out += the part of the gradient for u that e [len(u), len(v)] gives."""
    if cost == "l1":
        e = e.contiguous()
        out += torch.ops.aten._cdist_backward(e, u, v, 1.0, e)
    else:
        out.addmm_(e, v, alpha=_SCALE_FLOOR[cost][0])
