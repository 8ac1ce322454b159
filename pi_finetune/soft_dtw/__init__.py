"""Soft-DTW: a differentiable distance between sequences of different lengths.

    loss = soft_dtw(x, y, x_lengths, y_lengths, gamma=0.1, divergence=True)  # [B]

Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017;
the divergence: Blondel, Mensch and Vert, "Differentiable divergences between time series",
AISTATS 2021. See docs/soft_dtw.md for usage, numerics and measurements.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch

from . import _op

__all__ = ["SoftDTW", "alignment", "soft_dtw", "soft_dtw_from_cost"]

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


def _check_options(gamma, bandwidth, backend):
    _choice(backend, "backend", ("auto", *_op.BACKENDS))
    if not isinstance(gamma, Real) or isinstance(gamma, bool):
        raise TypeError(f"gamma must be a number, got {type(gamma).__name__}; use float(gamma)")
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be positive and finite, got {gamma}; hard DTW is its limit 0")
    if bandwidth is not None:
        if not isinstance(bandwidth, Integral) or isinstance(bandwidth, bool):
            raise TypeError(
                f"bandwidth must be None or a whole number of frames, got {bandwidth!r}"
            )
        if bandwidth < 0:
            raise ValueError(f"bandwidth must be 0 or more, got {bandwidth}; None switches it off")


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
        gamma: Smoothing, > 0, in units of the cost. Hard DTW is the limit 0.
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
    _check_options(gamma, bandwidth, backend)
    grad = torch.is_grad_enabled()
    return _op.soft_dtw_op(
        x, y, x_lengths, y_lengths, float(gamma), bandwidth, cost, bool(divergence),
        backend, check_finite,
        grad and x.requires_grad, grad and y.requires_grad,
    )[0]  # fmt: skip


def soft_dtw_from_cost(
    cost: torch.Tensor,
    x_lengths: torch.Tensor | None = None,
    y_lengths: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    bandwidth: int | None = None,
    backend: str = "auto",
    check_finite: bool = False,
) -> torch.Tensor:
    """Soft-DTW of given cost matrices.

    Args:
        cost: Cost [B, N, M] of aligning frame i with frame j, any floating dtype, any sign.
            Differentiable; its gradient is the expected alignment. bfloat16 costs are too coarse
            for small gamma (prefer float32).
        x_lengths: Valid rows of each matrix, integers [B] from 1 to N; None: all.
        y_lengths: Valid columns, from 1 to M.
        gamma, bandwidth, backend, check_finite: As in `soft_dtw`.

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
    _check_options(gamma, bandwidth, backend)
    return _op.from_cost_op(
        cost, x_lengths, y_lengths, float(gamma), bandwidth, backend,
        check_finite, torch.is_grad_enabled() and cost.requires_grad,
    )[0]  # fmt: skip


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
) -> torch.Tensor:
    """Expected alignment of every x[b] with y[b], for plots: no gradient flows through it.

    Args: As in `soft_dtw`.

    Returns:
        E [B, N, M], the probability that an alignment drawn in proportion to
        exp(-cost / gamma) pairs frame i with frame j: from 0 to 1, 1 at both ends, 0 in padding.
        It is the gradient of the loss for the cost matrix. float64 if an input is, else float32.
        Raises as `soft_dtw`.
    """
    x_lengths, y_lengths = _check_features(x, y, x_lengths, y_lengths, cost)
    _check_options(gamma, bandwidth, backend)
    return _op.alignment(
        x, y, x_lengths, y_lengths, float(gamma), bandwidth, cost,
        backend, check_finite,
    )  # fmt: skip


class SoftDTW(torch.nn.Module):
    """`soft_dtw` as a module.

    Args:
        gamma, bandwidth, cost, divergence, backend, check_finite: As in `soft_dtw`.
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
    ):
        super().__init__()
        _check_options(gamma, bandwidth, backend)
        _choice(cost, "cost", _COSTS)
        _choice(reduction, "reduction", _REDUCTIONS)
        self.reduction = reduction
        self.options = {
            "gamma": gamma, "bandwidth": bandwidth, "cost": cost, "divergence": divergence,
            "backend": backend, "check_finite": check_finite,
        }  # fmt: skip

    def forward(self, x, y, x_lengths=None, y_lengths=None):
        loss = soft_dtw(x, y, x_lengths, y_lengths, **self.options)
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def extra_repr(self):
        return ", ".join(
            f"{k}={v!r}" for k, v in {**self.options, "reduction": self.reduction}.items()
        )
