"""Soft-DTW: a differentiable distance between sequences of different lengths.

    loss = soft_dtw(x, y, x_lengths, y_lengths, gamma=0.1, divergence=True)  # [B]

Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017;
the divergence: Blondel, Mensch and Vert, "Differentiable divergences between time series",
AISTATS 2021. See docs/soft_dtw.md for usage, numerics and measurements.
"""

import math
import sys
import types
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from . import _op
from .recursion import Recursion

__all__ = [
    "SoftDTW",
    "alignment",
    "dtw_path",
    "gamma_heuristic",
    "soft_dtw",
    "soft_dtw_from_cost",
    "soft_dtw_pairwise",
]

_COSTS = ("sqeuclidean", "cosine", "l1")
_REDUCTIONS = ("none", "mean", "sum")


def _shape(z):
    return "[" + ", ".join(str(size) for size in z.shape) + "]"


def _choice(value, name, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _floating(z, name, axes):
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {axes}, got {type(z).__name__}")
    if not z.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {z.dtype}; use {name}.float()")
    if z.dim() != 3:
        raise ValueError(f"{name} must have shape {axes}, got {_shape(z)}; add the missing axes")
    if z.shape[0] and 0 in z.shape[1:]:
        raise ValueError(f"{name} must have at least one entry on every axis, got {_shape(z)}")


def _check_lengths(lengths, name, B):
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor):
        if not isinstance(lengths, Sequence) or not all(isinstance(k, Integral) for k in lengths):
            raise TypeError(
                f"{name} must be None, an integer tensor [B] or a list of ints, "
                f"got {type(lengths).__name__}"
            )
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if lengths.dtype.is_floating_point or lengths.dtype in (torch.bool, torch.complex64):
        raise TypeError(
            f"{name} must count frames as integers, got {lengths.dtype}; for lengths relative to "
            f"the longest item, pass ({name} * frames).round().long()"
        )
    if lengths.shape != (B,):
        raise ValueError(f"{name} must have shape [{B}], one per item, got {_shape(lengths)}")
    return lengths


def _number(value, name):
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; use float({name})")
    return float(value)


def _flag(value, name):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _check_penalties(step_penalty):
    """Penalties of a step down, right and diagonally."""
    if isinstance(step_penalty, Sequence) and not isinstance(step_penalty, str):
        penalties = tuple(_number(value, "step_penalty") for value in step_penalty)
        if len(penalties) != 3:
            raise ValueError(
                f"step_penalty must be one number or three (down, right, diagonal), "
                f"got {len(penalties)}"
            )
    else:
        penalty = _number(step_penalty, "step_penalty")
        penalties = penalty, penalty, 0.0
    if not all(0 <= penalty < math.inf for penalty in penalties):
        raise ValueError(f"step_penalty must be 0 or more and finite, got {step_penalty}")
    return penalties


def _check_options(
    gamma, bandwidth, itakura, step_penalty, open_begin, open_end, divergence, backend
):
    _choice(backend, "backend", ("auto", *_op.BACKENDS))
    gamma = _number(gamma, "gamma")
    if not 0 <= gamma < math.inf:  # of math.isfinite a compiled graph makes an operator
        raise ValueError(f"gamma must be 0 (hard DTW) or more, and finite, got {gamma}")
    if bandwidth is not None:
        if not isinstance(bandwidth, Integral) or isinstance(bandwidth, bool):
            raise TypeError(
                f"bandwidth must be None or a whole number of frames, got {bandwidth!r}"
            )
        if bandwidth < 0:
            raise ValueError(f"bandwidth must be 0 or more, got {bandwidth}; None switches it off")
    if itakura is not None:
        slope = _number(itakura, "itakura")
        if not 1 <= slope <= 1000:
            raise ValueError(
                f"itakura must be a largest slope from 1 to 1000, got {itakura}; "
                "None switches it off"
            )
        if bandwidth is not None:
            raise ValueError("itakura and bandwidth are two bands; set one of them to None")
        itakura = round(slope * 1000)
    down, right, diagonal = _check_penalties(step_penalty)
    ends = [
        name
        for name, value in (("open_begin", open_begin), ("open_end", open_end))
        if _flag(value, name)
    ]
    if ends and (bandwidth is not None or itakura is not None):
        raise ValueError(
            f"{ends[0]}=True lets a path leave the line between the corners, around which "
            f"{'bandwidth' if itakura is None else 'itakura'} lays its band; use one or the other"
        )
    if ends and divergence:
        raise ValueError(
            f"{ends[0]}=True has no divergence: the loss of a sequence with itself would be that "
            "of a part of it; use divergence=False"
        )
    if divergence and gamma == 0 and diagonal > down + right:
        raise ValueError(
            "step_penalty makes a diagonal step dearer than one down and one right, and then the "
            "best path of a sequence with itself is not symmetric, as the gradient of the "
            "divergence takes it to be; use a gamma above 0"
        )
    bandwidth = None if bandwidth is None else int(bandwidth)
    return Recursion(gamma, bandwidth, itakura, down, right, diagonal, open_begin, open_end)


def _check_features(x, y, x_lengths, y_lengths, cost):
    _floating(x, "x", "[B, N, D]")
    _floating(y, "y", "[B, M, D]")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x and y must agree in the batch and the feature axis, got {_shape(x)} and {_shape(y)}"
        )
    if x.device != y.device:
        raise ValueError(
            f"x and y must be on one device, got {x.device} and {y.device}; use y.to(x.device)"
        )
    _choice(cost, "cost", _COSTS)
    B = x.shape[0]
    return _check_lengths(x_lengths, "x_lengths", B), _check_lengths(y_lengths, "y_lengths", B)


def soft_dtw(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    cost: str = "sqeuclidean",
    divergence: bool = False,
    backend: str = "auto",
    check_finite: bool = False,
    itakura: float | None = None,
    step_penalty: float | Sequence[float] = 0.0,
    open_begin: bool = False,
    open_end: bool = False,
    checkpointed: bool = False,
) -> torch.Tensor:
    """Soft-DTW, or its divergence, between every x[b] and y[b].

    The soft minimum over all monotone alignments of the summed cost of the aligned frames. The
    plain loss can be negative (it is lowered by the number of alignments that are nearly as good
    as the best) and is not least at x = y. The divergence
    sdtw(x, y) - (sdtw(x, x) + sdtw(y, y)) / 2 is 0 at x = y and not negative.

    Args:
        x: Features [B, N, D], any floating dtype. Differentiable.
        y: Features [B, M, D]. Differentiable. N and M may differ.
        x_lengths: Valid frames of each x[b], integers [B] from 1 to N; None: all N. What lies
            beyond is never read into a result, may be NaN, and gets a gradient of exactly 0.
            Values are checked where they are on the CPU (or with `check_finite`); on a GPU that
            would stall it, so there they are clamped into range.
        y_lengths: The same for y, from 1 to M.
        gamma: Smoothing, in units of the cost. 0 is hard DTW: the least cost of a path, with the
            subgradient that one such path gives (of equals the diagonal step's, then the one down).
        bandwidth: Half width, in frames of the shorter sequence, of a Sakoe-Chiba band around the
            line from the first pair of frames to the last; it follows the slope where lengths
            differ. 0 is that line alone, None no band.
        cost: Of two frames: "sqeuclidean" `|a - b|^2`, "cosine" `1 - cos(a, b)` (1 for a zero
            frame), or "l1" `sum |a - b|`.
        divergence: Return the divergence.
        backend: "auto" (Triton on GPUs, the compiled CPU code on CPUs), "reference", "cpu" or
            "triton". The Triton backend has so far been checked in Triton's interpreter and
            compiler only, not run on a GPU.
        check_finite: Raise where a valid frame holds a NaN or an infinity, and check lengths on
            any device. Costs a synchronisation; meant for debugging.
        itakura: Largest slope, from 1 to 1000 and to a thousandth, of an Itakura parallelogram:
            from either corner a path is at most so much steeper, and at most so much flatter, than
            the line between the corners. Not with a `bandwidth`. None: no such band.
        step_penalty: Added for each step of a path that is not diagonal, in which one sequence
            waits for the other (a warp penalty), in units of the cost, 0 or more. Or three
            numbers: of a step down (the next frame of x), right (of y), and diagonally (of both).
        open_begin: Let y begin earlier: x is aligned with a part of y that begins anywhere.
        open_end: Let y go on: that part ends anywhere. Neither with a band nor the divergence.
        checkpointed: Keep no matrix [B, N, M] for the backward pass but one row in about
            sqrt(2 N), and compute the rest again there: memory grows with (N + M) sqrt(N) instead
            of N M, the values stay the same. On the CPU backend alone.

    Returns:
        Loss [B], not divided by any length; float64 if an input is, else float32.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, device or value; the message names it.
        NotImplementedError: On differentiating twice.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [2.0]]])  # [1, 3, 1]
        >>> y = torch.tensor([[[0.0], [0.0], [1.0], [2.0], [2.0]]])  # the same, slower
        >>> round(soft_dtw(x, y, gamma=0.001).item(), 3)
        0.0
        >>> soft_dtw(x, x, gamma=1.0).item() < 0  # the plain loss can be negative,
        True
        >>> soft_dtw(x, x, gamma=1.0, divergence=True).item()  # the divergence is not
        0.0

    Sources: Cuturi and Blondel, ICML 2017; Blondel, Mensch and Vert, AISTATS 2021.
    """
    x_lengths, y_lengths = _check_features(x, y, x_lengths, y_lengths, cost)
    recursion = _check_options(
        gamma, bandwidth, itakura, step_penalty, open_begin, open_end, divergence, backend
    )
    return _op.soft_dtw(
        x, y, x_lengths, y_lengths, backend, cost, bool(divergence), bool(checkpointed),
        recursion, check_finite,
    )  # fmt: skip


def soft_dtw_from_cost(
    cost: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
    check_finite: bool = False,
    itakura: float | None = None,
    step_penalty: float | Sequence[float] = 0.0,
    open_begin: bool = False,
    open_end: bool = False,
) -> torch.Tensor:
    """Soft-DTW of given cost matrices.

    Args:
        cost: Cost [B, N, M] of aligning frame i with frame j, any floating dtype, any sign.
            Differentiable; its gradient is the expected alignment. bfloat16 costs are too coarse
            for small gamma (prefer float32).
        x_lengths: Valid rows of each matrix, integers [B] from 1 to N; None: all.
        y_lengths: Valid columns, from 1 to M.
        gamma, bandwidth, backend, check_finite, itakura, step_penalty, open_begin, open_end: As in
            `soft_dtw`.

    Returns:
        Loss [B]; float64 if `cost` is, else float32. Raises as `soft_dtw`.

    Example:
        >>> cost = torch.tensor([[[0.0, 5.0], [5.0, 1.0]]], requires_grad=True)  # [1, 2, 2]
        >>> loss = soft_dtw_from_cost(cost, gamma=0.01)
        >>> round(loss.item(), 3)  # by way of the diagonal
        1.0
        >>> loss.sum().backward()
        >>> cost.grad  # the expected alignment
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    _floating(cost, "cost", "[B, N, M]")
    x_lengths = _check_lengths(x_lengths, "x_lengths", cost.shape[0])
    y_lengths = _check_lengths(y_lengths, "y_lengths", cost.shape[0])
    recursion = _check_options(
        gamma, bandwidth, itakura, step_penalty, open_begin, open_end, False, backend
    )
    return _op.soft_dtw_from_cost(cost, x_lengths, y_lengths, backend, recursion, check_finite)


def alignment(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    cost: str = "sqeuclidean",
    backend: str = "auto",
    check_finite: bool = False,
    itakura: float | None = None,
    step_penalty: float | Sequence[float] = 0.0,
    open_begin: bool = False,
    open_end: bool = False,
) -> torch.Tensor:
    """Expected alignment of every x[b] with y[b], for plots: no gradient flows through it.

    Args: As in `soft_dtw`.

    Returns:
        E [B, N, M], the probability that an alignment drawn in proportion to
        exp(-cost / gamma) pairs frame i with frame j: from 0 to 1, 1 at both ends (unless they are
        open), 0 in padding. With gamma = 0, 1 on one best path and 0 elsewhere.
        It is the gradient of the loss for the cost matrix. float64 if an input is, else float32.
        Raises as `soft_dtw`.
    """
    x_lengths, y_lengths = _check_features(x, y, x_lengths, y_lengths, cost)
    recursion = _check_options(
        gamma, bandwidth, itakura, step_penalty, open_begin, open_end, False, backend
    )
    return _op.alignment(x, y, x_lengths, y_lengths, backend, cost, recursion, check_finite)[1]


def dtw_path(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    bandwidth: int | None = None,
    cost: str = "sqeuclidean",
    backend: str = "auto",
    check_finite: bool = False,
    itakura: float | None = None,
    step_penalty: float | Sequence[float] = 0.0,
    open_begin: bool = False,
    open_end: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hard DTW with its path: a best alignment of every x[b] with y[b]. Not differentiable.

    Args: As in `soft_dtw`.

    Returns:
        Loss [B], as of `soft_dtw` with gamma = 0, and for each item its path [K, 2]: pairs (i, j)
        of aligned frames from the first to the last, int64, on the device of x. Where several
        paths are best, one of them. Raises as `soft_dtw`.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [2.0]]])  # [1, 3, 1]
        >>> y = torch.tensor([[[0.0], [0.0], [1.0], [2.0]]])  # [1, 4, 1]
        >>> loss, paths = dtw_path(x, y)
        >>> loss.item(), paths[0].tolist()
        (0.0, [[0, 0], [0, 1], [1, 2], [2, 3]])
    """
    x_lengths, y_lengths = _check_features(x, y, x_lengths, y_lengths, cost)
    recursion = _check_options(
        0.0, bandwidth, itakura, step_penalty, open_begin, open_end, False, backend
    )
    loss, e = _op.alignment(x, y, x_lengths, y_lengths, backend, cost, recursion, check_finite)
    # The cells of a monotone path come in its order, row by row.
    return loss, [path.nonzero() for path in e]


def _pairs(x, y, x_lengths, y_lengths, i, j, options):
    """Losses [K] of the pairs (x[i[k]], y[j[k]]), as many at a time as 512 MB of matrices hold."""
    (_, N, D), M = x.shape, y.shape[1]
    size = max(1, 2**27 // (N * M + (N + M) * D))
    losses = [
        soft_dtw(
            x[a], y[b],
            None if x_lengths is None else x_lengths[a.to(x_lengths.device)],
            None if y_lengths is None else y_lengths[b.to(y_lengths.device)],
            **options,
        )
        for a, b in zip(i.split(size), j.split(size))
    ]  # fmt: skip
    return torch.cat(losses)


def soft_dtw_pairwise(
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    divergence: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Soft-DTW, or its divergence, of every x[a] with every y[b]; differentiable.

    Args:
        x: Features [A, N, D].
        y: Features [B, M, D]; None: x, with half the work where the loss is symmetric.
        x_lengths: Valid frames of each x[a], integers [A]; None: all N.
        y_lengths: Valid frames of each y[b], integers [B]; None: all M.
        divergence: Return the divergence. The losses of each sequence with itself are computed
            once for all pairs.
        options: As in `soft_dtw`.

    Returns:
        Losses [A, B]. Raises as `soft_dtw`.
    """
    _floating(x, "x", "[A, N, D]")
    if y is None and y_lengths is not None:
        raise ValueError("y_lengths are given without y; leave both out to compare x with itself")
    itself = y is None
    if y is None:
        y, y_lengths = x, x_lengths
    _floating(y, "y", "[B, M, D]")
    if x.shape[2] != y.shape[2]:
        raise ValueError(f"x and y must agree in the feature axis, got {_shape(x)} and {_shape(y)}")
    x_lengths = _check_lengths(x_lengths, "x_lengths", len(x))
    y_lengths = x_lengths if itself else _check_lengths(y_lengths, "y_lengths", len(y))
    A, B = len(x), len(y)
    if A == 0 or B == 0:
        return (x.sum() + y.sum()) * x.new_zeros(A, B, dtype=_op._compute_dtype(x, y))
    rows = torch.arange(A, device=x.device)
    columns = torch.arange(B, device=x.device)
    down, right, _ = _check_penalties(options.get("step_penalty", 0.0))
    ends_open = options.get("open_begin", False) or options.get("open_end", False)
    if divergence and ends_open:  # one message for it
        return soft_dtw(x[:1], y[:1], divergence=True, **options)
    if itself and down == right and not ends_open:
        i, j = torch.triu_indices(A, A, device=x.device)
        upper = _pairs(x, x, x_lengths, x_lengths, i, j, options)
        place = torch.zeros(A, A, dtype=torch.int64, device=x.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=x.device)
        losses = upper[place]
    else:
        i, j = (k.flatten() for k in torch.meshgrid(rows, columns, indexing="ij"))
        losses = _pairs(x, y, x_lengths, y_lengths, i, j, options).view(A, B)
    if not divergence:
        return losses
    own_x = _pairs(x, x, x_lengths, x_lengths, rows, rows, options)
    own_y = own_x if itself else _pairs(y, y, y_lengths, y_lengths, columns, columns, options)
    return losses - (own_x[:, None] + own_y[None]) / 2


def gamma_heuristic(
    x: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    *,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> float:
    """A gamma in proportion to a data set's costs and lengths: ``2 T median(|a - b|)^2``.

    Cuturi's rule for the bandwidth of the global alignment kernel (ICML 2011), which soft-DTW is
    -gamma times the logarithm of, as tslearn's `gamma_soft_dtw` computes it: T is the length of
    the shortest sequence, the median is over pairs of sampled frames. It is large: all alignments
    count. For one that follows the best alignment, divide it by T or more.

    Args:
        x: Features [B, N, D], any floating dtype.
        x_lengths: Valid frames of each x[b], integers [B]; None: all N.
        samples: Frames to draw, without replacement, from the first T of each sequence; all of
            them where there are no more.
        generator: For the draw, on the CPU; None: PyTorch's global one.

    Returns:
        gamma, > 0. Raises a ValueError where all sampled frames are equal, so that it would be 0.

    Example:
        >>> gamma_heuristic(torch.tensor([[[0.0], [1.0], [3.0]]]))  # 2 * 3 * median(1, 2, 3)^2
        24.0
    """
    _floating(x, "x", "[B, N, D]")
    x_lengths = _check_lengths(x_lengths, "x_lengths", len(x))
    if not isinstance(samples, Integral) or isinstance(samples, bool) or samples < 2:
        raise ValueError(f"samples must be a whole number from 2, got {samples!r}")
    if len(x) == 0:
        raise ValueError("x must hold at least one sequence, got an empty batch")
    T = x.shape[1] if x_lengths is None else int(x_lengths.min())
    if not 1 <= T <= x.shape[1]:
        raise ValueError(f"x_lengths must be from 1 to {x.shape[1]}, the shortest is {T}")
    frames = x.detach()[:, :T].reshape(-1, x.shape[2]).double()
    if len(frames) > samples:
        chosen = torch.randperm(len(frames), generator=generator)[:samples]
        frames = frames[chosen.to(frames.device)]
    distances = torch.pdist(frames)
    gamma = 2 * T * float(distances.quantile(0.5)) ** 2 if len(distances) else 0.0
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(
            f"x gives a gamma of {gamma}: its frames are equal, too few or not finite; choose a "
            "gamma by hand"
        )
    return gamma


class SoftDTW(torch.nn.Module):
    """`soft_dtw` as a module.

    Args:
        gamma, bandwidth, cost, divergence, backend, check_finite: As in `soft_dtw`.
        itakura, step_penalty, open_begin, open_end, checkpointed: As in `soft_dtw`.
        reduction: Over the batch: "none" [B], "mean" or "sum" (scalars).

    Shapes: x [B, N, D], y [B, M, D], x_lengths [B], y_lengths [B].
    """

    def __init__(
        self,
        gamma: float = 1.0,
        bandwidth: int | None = None,
        cost: str = "sqeuclidean",
        divergence: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        check_finite: bool = False,
        itakura: float | None = None,
        step_penalty: float | Sequence[float] = 0.0,
        open_begin: bool = False,
        open_end: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        _check_options(
            gamma, bandwidth, itakura, step_penalty, open_begin, open_end, divergence, backend
        )
        _choice(cost, "cost", _COSTS)
        _choice(reduction, "reduction", _REDUCTIONS)
        self.reduction = reduction
        self.options: dict[str, Any] = {
            "gamma": gamma, "bandwidth": bandwidth, "cost": cost, "divergence": divergence,
            "backend": backend, "check_finite": check_finite, "itakura": itakura,
            "step_penalty": step_penalty, "open_begin": open_begin, "open_end": open_end,
            "checkpointed": checkpointed,
        }  # fmt: skip

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_lengths: torch.Tensor | None = None,
        y_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        loss = soft_dtw(x, y, x_lengths, y_lengths, **self.options)
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def extra_repr(self) -> str:
        return ", ".join(
            f"{k}={v!r}" for k, v in {**self.options, "reduction": self.reduction}.items()
        )


class _Module(types.ModuleType):
    """`from pi_finetune import soft_dtw` is this module, called as the function of its name."""

    __call__ = staticmethod(soft_dtw)


sys.modules[__name__].__class__ = _Module
