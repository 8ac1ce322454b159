"""The two PyTorch operators behind the public functions, and the choice of a backend.

As registered operators they are opaque to torch.compile, run under autocast in the dtype they
are given, and have shape-only ("fake") versions. Lengths are checked here and not in the public
functions because their values are data: a compiled graph reads them only when it runs.

A backend is a module with features_forward, features_backward, cost_forward, cost_backward and
the sizes of what they save; `reference` documents them.
"""

import functools
import importlib

import torch
from torch import Tensor

from .cost import matrix

BACKENDS = ("reference", "cpu", "triton")


@functools.cache
def _load(name):
    """The backend module, or the exception that importing what it needs raised."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except Exception as error:  # numba and triton raise more than ImportError when half installed
        return error


def resolve(backend, device):
    """The backend module to run on `device`; "auto" takes the fastest that is there.

    Called inside the operators, never while a graph is traced.
    """
    if backend == "auto":
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        module = _load(fastest)
        return _load("reference") if isinstance(module, Exception) else module
    module = _load(backend)
    if isinstance(module, Exception):
        needs = {"cpu": "numba", "triton": "triton"}[backend]
        raise RuntimeError(
            f"backend={backend!r} cannot be loaded ({type(module).__name__}: {module}); "
            f"install {needs!r}, or use backend='auto' or 'reference'"
        ) from module
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend='cpu' takes CPU tensors, got device {device}; use backend='auto'"
        )
    if backend == "triton" and device.type != "cuda" and not module.INTERPRETED:
        raise ValueError(
            f"backend='triton' takes GPU tensors, got device {device}; use backend='auto', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run it in its interpreter"
        )
    return module


def _lengths(lengths, name, z, axis, check_finite):
    """Lengths [B] as int64 on z's device, checked where that does not stall a GPU."""
    B, L = z.shape[0], z.shape[axis]
    if lengths is None:
        return torch.full((B,), L, dtype=torch.int64, device=z.device)
    if lengths.device.type == "cpu" or check_finite:
        bad = ((lengths < 1) | (lengths > L)).nonzero()
        if len(bad):
            b = int(bad[0])
            raise ValueError(
                f"{name}[{b}] is {int(lengths[b])}, but must be from 1 to {L}, the padded length "
                f"of the input; drop empty items from the batch"
            )
    return lengths.to(z.device, torch.int64, non_blocking=True).clamp(1, L)


def _require_finite(z, mask, name):
    if not bool(torch.isfinite(z).masked_fill(~mask, True).all()):
        b, *at = (~torch.isfinite(z) & mask).nonzero()[0].tolist()
        raise ValueError(f"{name}[{b}] has a NaN or an infinity at {at}, inside its valid region")


def _compute_dtype(*tensors):
    """float64 if any input is; else float32, also for half inputs: R outgrows 11 bits at once."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _exact(device):
    """Autocast off: it would redo the cost's matrix products in half precision."""
    return torch.autocast(device.type, enabled=False)


# --------------------------------------------------------------------------------------------------
# From features


@torch.library.custom_op("pi_finetune::soft_dtw", mutates_args=())
def soft_dtw_op(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    gamma: float,
    bandwidth: int | None,
    cost: str,
    divergence: bool,
    backend: str,
    check_finite: bool,
    x_grad: bool,
    y_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _lengths(x_lengths, "x_lengths", x, 1, check_finite)
    m = _lengths(y_lengths, "y_lengths", y, 1, check_finite)
    if check_finite:
        for z, k, name in ((x, n, "x"), (y, m, "y")):
            _require_finite(
                z, (torch.arange(z.shape[1], device=z.device) < k[:, None])[..., None], name
            )
    dtype = _compute_dtype(x, y)
    with torch.no_grad(), _exact(x.device):
        return resolve(backend, x.device).features_forward(
            x.detach().to(dtype), y.detach().to(dtype), n, m,
            gamma, bandwidth, cost, divergence, x_grad, y_grad,
        )  # fmt: skip


@soft_dtw_op.register_fake
def _(
    x,
    y,
    x_lengths,
    y_lengths,
    gamma,
    bandwidth,
    cost,
    divergence,
    backend,
    check_finite,
    x_grad,
    y_grad,
):
    module, dtype = resolve(backend, x.device), _compute_dtype(x, y)
    sizes = module.saved_sizes(x.shape[0], x.shape[1], y.shape[1], divergence, x_grad, y_grad)
    dtypes = (dtype, module.STATE_DTYPE or dtype)
    saved = (x.new_empty(size, dtype=kind) for size, kind in zip(sizes, dtypes))
    return x.new_empty(x.shape[0], dtype=dtype), *saved


@torch.library.custom_op("pi_finetune::soft_dtw_backward", mutates_args=())
def soft_dtw_backward_op(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    saved: Tensor,
    state: Tensor,
    gamma: float,
    bandwidth: int | None,
    cost: str,
    divergence: bool,
    backend: str,
    x_grad: bool,
    y_grad: bool,
) -> tuple[Tensor, Tensor]:
    n = _lengths(x_lengths, "x_lengths", x, 1, False)
    m = _lengths(y_lengths, "y_lengths", y, 1, False)
    dtype = _compute_dtype(x, y)
    with torch.no_grad(), _exact(x.device):
        gx, gy = resolve(backend, x.device).features_backward(
            grad, x.to(dtype), y.to(dtype), n, m, saved, state,
            gamma, bandwidth, cost, divergence, x_grad, y_grad,
        )  # fmt: skip
    return gx.to(x.dtype), gy.to(y.dtype)


@soft_dtw_backward_op.register_fake
def _(
    grad,
    x,
    y,
    x_lengths,
    y_lengths,
    saved,
    state,
    gamma,
    bandwidth,
    cost,
    divergence,
    backend,
    x_grad,
    y_grad,
):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else x.new_empty(0),
        torch.empty_like(y, memory_format=torch.contiguous_format) if y_grad else y.new_empty(0),
    )


def _keep(ctx, inputs, output):
    x, y, n, m, gamma, bandwidth, cost, divergence, backend, _, x_grad, y_grad = inputs
    ctx.save_for_backward(x, y, n, m, *output[1:])
    ctx.options = gamma, bandwidth, cost, divergence, backend, x_grad, y_grad
    ctx.set_materialize_grads(False)  # else zeros as large as the saved buffers are made


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    *_, x_grad, y_grad = ctx.options
    gx, gy = soft_dtw_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return gx if x_grad else None, gy if y_grad else None, *(None,) * 10


# --------------------------------------------------------------------------------------------------
# From a cost matrix


@torch.library.custom_op("pi_finetune::soft_dtw_from_cost", mutates_args=())
def from_cost_op(
    cost: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    gamma: float,
    bandwidth: int | None,
    backend: str,
    check_finite: bool,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    n = _lengths(x_lengths, "x_lengths", cost, 1, check_finite)
    m = _lengths(y_lengths, "y_lengths", cost, 2, check_finite)
    if check_finite:
        from .reference import band_mask

        _require_finite(cost, band_mask(n, m, None, *cost.shape[1:]), "cost")
    with torch.no_grad():
        d = cost.detach().to(_compute_dtype(cost)).contiguous()
        return resolve(backend, cost.device).cost_forward(d, n, m, gamma, bandwidth, grad)


@from_cost_op.register_fake
def _(cost, x_lengths, y_lengths, gamma, bandwidth, backend, check_finite, grad):
    module, dtype = resolve(backend, cost.device), _compute_dtype(cost)
    state = cost.new_empty(
        module.cost_saved_sizes(*cost.shape, grad), dtype=module.STATE_DTYPE or dtype
    )
    return cost.new_empty(cost.shape[0], dtype=dtype), state


@torch.library.custom_op("pi_finetune::soft_dtw_from_cost_backward", mutates_args=())
def from_cost_backward_op(
    grad: Tensor,
    cost: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    state: Tensor,
    gamma: float,
    bandwidth: int | None,
    backend: str,
) -> Tensor:
    n = _lengths(x_lengths, "x_lengths", cost, 1, False)
    m = _lengths(y_lengths, "y_lengths", cost, 2, False)
    with torch.no_grad():
        d = cost.to(_compute_dtype(cost)).contiguous()
        return (
            resolve(backend, cost.device)
            .cost_backward(grad, d, n, m, state, gamma, bandwidth)
            .to(cost.dtype)
        )


@from_cost_backward_op.register_fake
def _(grad, cost, x_lengths, y_lengths, state, gamma, bandwidth, backend):
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


def _keep_cost(ctx, inputs, output):
    cost, n, m, gamma, bandwidth, backend, *_ = inputs
    ctx.save_for_backward(cost, n, m, output[1])
    ctx.options = gamma, bandwidth, backend
    ctx.set_materialize_grads(False)


def _backward_cost(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    return from_cost_backward_op(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7


def alignment(x, y, x_lengths, y_lengths, gamma, bandwidth, cost, backend, check_finite):
    """Expected alignment [B, N, M]: the gradient of the losses for their cost matrices."""
    with torch.no_grad(), _exact(x.device):
        if check_finite:  # on the features, so that the message names them
            soft_dtw_op(
                x, y, x_lengths, y_lengths, gamma, bandwidth, cost, False,
                backend, True, False, False,
            )  # fmt: skip
        dtype = _compute_dtype(x, y)
        n = _lengths(x_lengths, "x_lengths", x, 1, check_finite)
        m = _lengths(y_lengths, "y_lengths", y, 1, check_finite)
        d = matrix(x.to(dtype), y.to(dtype), n, m, cost)
        loss, state = from_cost_op(d, n, m, gamma, bandwidth, backend, False, True)
        return from_cost_backward_op(
            torch.ones_like(loss), d, n, m, state, gamma, bandwidth, backend
        )


def _no_double_backward(ctx, *_):
    raise NotImplementedError(
        "soft_dtw has no second derivative: its backward pass cannot be differentiated "
        "(create_graph=True, or a gradient penalty through the loss)"
    )


soft_dtw_op.register_autograd(_backward, setup_context=_keep)
from_cost_op.register_autograd(_backward_cost, setup_context=_keep_cost)
soft_dtw_backward_op.register_autograd(_no_double_backward)
from_cost_backward_op.register_autograd(_no_double_backward)
