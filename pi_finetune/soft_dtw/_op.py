"""The PyTorch operators behind the public functions, and the choice of a backend.

As registered operators they are opaque to torch.compile, run under autocast in the dtype they
are given, and have shape-only ("fake") versions. Dispatching to one takes a fifth of a
millisecond, as long as a small problem itself; eager code calls the same functions through
torch.autograd.Function instead. Lengths are checked here and not in the public functions because
their values are data: a compiled graph reads them only when it runs.

A backend is a module with features_forward, features_backward, cost_forward, cost_backward and
the sizes of what they save; `reference` documents them.
"""

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from .cost import matrix
from .recursion import Recursion

__all__ = ["BACKENDS", "alignment", "resolve", "soft_dtw", "soft_dtw_from_cost"]


BACKENDS = ("reference", "cpu", "triton")
FASTEST = {"cpu": "cpu", "cuda": "triton"}


@functools.cache
def _load(name):
    """The backend module, or the exception that importing what it needs raised."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except Exception as error:  # numba and triton raise more than ImportError when half installed
        return error


@functools.cache
def _usable(name, device):
    """The backend module, or the exception that loading it or running it on `device` raised."""
    module = _load(name)
    if name != "triton" or isinstance(module, Exception):
        return module
    try:  # Triton compiles at the first launch: for want of a compiler, say, it fails only there
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            d, one = torch.zeros(1, 1, 1, device=device), torch.ones(1, dtype=torch.int64)
            one = one.to(device)
            _, state = module.cost_forward(d, one, one, Recursion(), True)
            module.cost_backward(d[0, 0], d, one, one, state, Recursion())
        return module
    except Exception as error:
        return error


@functools.cache
def _warn_of_fallback(name, reason):
    warnings.warn(
        f"soft_dtw: the backend {name!r} cannot be used ({reason}); falling back to 'reference', "
        f"which is slower. `pi-finetune doctor` tries each backend",
        stacklevel=2,
    )


def resolve(backend: str, device: torch.device, checkpointed: bool = False) -> Any:
    """The backend module to run on `device`; "auto" takes the fastest that works there.

    Called inside the operators, never while a graph is traced.
    """
    if backend == "auto":
        name = FASTEST.get(device.type, "reference")
        module = _usable(name, device)
        if isinstance(module, Exception):
            _warn_of_fallback(name, f"{type(module).__name__}: {module}")
            name, module = "reference", _load("reference")
    else:
        name, module = backend, _load(backend)
    if isinstance(module, Exception):
        needs = {"cpu": "numba", "triton": "triton"}[backend]
        raise RuntimeError(
            f"backend={backend!r} cannot be loaded ({type(module).__name__}: {module}); "
            f"install {needs!r}, or use backend='auto' or 'reference'"
        ) from module
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend='cpu' takes CPU tensors, got device {device}; use backend='auto'"
        )
    if name == "triton" and device.type != "cuda" and not module.INTERPRETED:
        raise ValueError(
            f"backend='triton' takes GPU tensors, got device {device}; use backend='auto', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run it in its interpreter"
        )
    if checkpointed and not module.CHECKPOINTS:
        raise ValueError(
            f"checkpointed=True needs the backend 'cpu' and tensors on the CPU; the backend here "
            f"is {name!r}, which holds whole cost matrices"
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


def _eager(*tensors):
    """Whether nothing traces, transforms or intercepts operators here."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


# --------------------------------------------------------------------------------------------------
# From features. The arguments after the lengths are `options`: backend, cost, divergence,
# checkpointed, the fields of a Recursion; then what is asked for.


def _forward(x, y, x_lengths, y_lengths, backend, cost, divergence, checkpointed, *rest):
    *recursion, check_finite, x_grad, y_grad = rest
    n = _lengths(x_lengths, "x_lengths", x, 1, check_finite)
    m = _lengths(y_lengths, "y_lengths", y, 1, check_finite)
    if check_finite:
        for z, k, name in ((x, n, "x"), (y, m, "y")):
            _require_finite(
                z, (torch.arange(z.shape[1], device=z.device) < k[:, None])[..., None], name
            )
    dtype = _compute_dtype(x, y)
    with torch.no_grad(), _exact(x.device):
        return resolve(backend, x.device, checkpointed).features_forward(
            x.detach().to(dtype), y.detach().to(dtype), n, m,
            Recursion(*recursion), cost, divergence, checkpointed, x_grad, y_grad,
        )  # fmt: skip


def _backward(
    grad, x, y, x_lengths, y_lengths, saved, state, backend, cost, divergence, checkpointed, *rest
):
    *recursion, x_grad, y_grad = rest
    n = _lengths(x_lengths, "x_lengths", x, 1, False)
    m = _lengths(y_lengths, "y_lengths", y, 1, False)
    dtype = _compute_dtype(x, y)
    with torch.no_grad(), _exact(x.device):
        gx, gy = resolve(backend, x.device, checkpointed).features_backward(
            grad, x.detach().to(dtype), y.detach().to(dtype), n, m, saved, state,
            Recursion(*recursion), cost, divergence, checkpointed, x_grad, y_grad,
        )  # fmt: skip
    return gx.to(x.dtype), gy.to(y.dtype)


@torch.library.custom_op("pi_finetune::soft_dtw", mutates_args=())
def soft_dtw_op(
    x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None,
    backend: str, cost: str, divergence: bool, checkpointed: bool,
    gamma: float, bandwidth: int | None, itakura: int | None,
    down: float, right: float, diagonal: float, open_begin: bool, open_end: bool,
    check_finite: bool, x_grad: bool, y_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(
        x, y, x_lengths, y_lengths, backend, cost, divergence, checkpointed,
        gamma, bandwidth, itakura, down, right, diagonal, open_begin, open_end,
        check_finite, x_grad, y_grad,
    )  # fmt: skip


@soft_dtw_op.register_fake
def _(x, y, x_lengths, y_lengths, backend, cost, divergence, checkpointed, *rest):
    *_, x_grad, y_grad = rest
    module, dtype = resolve(backend, x.device, checkpointed), _compute_dtype(x, y)
    sizes = module.saved_sizes(
        x.shape[0], x.shape[1], y.shape[1], divergence, checkpointed, x_grad, y_grad
    )
    dtypes = (dtype, module.STATE_DTYPE or dtype)
    saved = (x.new_empty(size, dtype=kind) for size, kind in zip(sizes, dtypes))
    return x.new_empty(x.shape[0], dtype=dtype), *saved


@torch.library.custom_op("pi_finetune::soft_dtw_backward", mutates_args=())
def soft_dtw_backward_op(
    grad: Tensor, x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None,
    saved: Tensor, state: Tensor,
    backend: str, cost: str, divergence: bool, checkpointed: bool,
    gamma: float, bandwidth: int | None, itakura: int | None,
    down: float, right: float, diagonal: float, open_begin: bool, open_end: bool,
    x_grad: bool, y_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward(
        grad, x, y, x_lengths, y_lengths, saved, state, backend, cost, divergence, checkpointed,
        gamma, bandwidth, itakura, down, right, diagonal, open_begin, open_end, x_grad, y_grad,
    )  # fmt: skip


@soft_dtw_backward_op.register_fake
def _(grad, x, y, *rest):
    *_, x_grad, y_grad = rest
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else x.new_empty(0),
        torch.empty_like(y, memory_format=torch.contiguous_format) if y_grad else y.new_empty(0),
    )


def _keep(ctx, inputs, output):
    x, y, n, m, *options, _, x_grad, y_grad = inputs
    ctx.save_for_backward(x, y, n, m, *output[1:])
    ctx.options = *options, x_grad, y_grad
    ctx.set_materialize_grads(False)  # else zeros as large as the saved buffers are made


def _differentiate(backward):
    """The backward pass of `soft_dtw_op`, by a function like `_backward`."""

    def function(ctx, grad, *_):
        nothing = (None,) * (2 + len(ctx.options) + 1)  # lengths, options, check_finite
        if grad is None:
            return None, None, *nothing
        *_, x_grad, y_grad = ctx.options
        gx, gy = backward(grad, *ctx.saved_tensors, *ctx.options)
        return gx if x_grad else None, gy if y_grad else None, *nothing

    return function


# --------------------------------------------------------------------------------------------------
# From a cost matrix


def _forward_cost(cost, x_lengths, y_lengths, backend, *rest):
    *recursion, check_finite, grad = rest
    n = _lengths(x_lengths, "x_lengths", cost, 1, check_finite)
    m = _lengths(y_lengths, "y_lengths", cost, 2, check_finite)
    if check_finite:
        from .reference import band_mask

        _require_finite(cost, band_mask(n, m, Recursion(), *cost.shape[1:]), "cost")
    with torch.no_grad():
        d = cost.detach().to(_compute_dtype(cost)).contiguous()
        return resolve(backend, cost.device).cost_forward(d, n, m, Recursion(*recursion), grad)


def _backward_cost(grad, cost, x_lengths, y_lengths, state, backend, *recursion):
    n = _lengths(x_lengths, "x_lengths", cost, 1, False)
    m = _lengths(y_lengths, "y_lengths", cost, 2, False)
    with torch.no_grad():
        d = cost.detach().to(_compute_dtype(cost)).contiguous()
        module = resolve(backend, cost.device)
        return module.cost_backward(grad, d, n, m, state, Recursion(*recursion)).to(cost.dtype)


@torch.library.custom_op("pi_finetune::soft_dtw_from_cost", mutates_args=())
def from_cost_op(
    cost: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, backend: str,
    gamma: float, bandwidth: int | None, itakura: int | None,
    down: float, right: float, diagonal: float, open_begin: bool, open_end: bool,
    check_finite: bool, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward_cost(
        cost, x_lengths, y_lengths, backend,
        gamma, bandwidth, itakura, down, right, diagonal, open_begin, open_end, check_finite, grad,
    )  # fmt: skip


@from_cost_op.register_fake
def _(cost, x_lengths, y_lengths, backend, *rest):
    module, dtype = resolve(backend, cost.device), _compute_dtype(cost)
    state = cost.new_empty(
        module.cost_saved_sizes(*cost.shape, rest[-1]), dtype=module.STATE_DTYPE or dtype
    )
    return cost.new_empty(cost.shape[0], dtype=dtype), state


@torch.library.custom_op("pi_finetune::soft_dtw_from_cost_backward", mutates_args=())
def from_cost_backward_op(
    grad: Tensor, cost: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None,
    state: Tensor, backend: str,
    gamma: float, bandwidth: int | None, itakura: int | None,
    down: float, right: float, diagonal: float, open_begin: bool, open_end: bool,
) -> Tensor:  # fmt: skip
    return _backward_cost(
        grad, cost, x_lengths, y_lengths, state, backend,
        gamma, bandwidth, itakura, down, right, diagonal, open_begin, open_end,
    )  # fmt: skip


@from_cost_backward_op.register_fake
def _(grad, cost, *_):
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


def _keep_cost(ctx, inputs, output):
    cost, n, m, *options, _, _ = inputs
    ctx.save_for_backward(cost, n, m, output[1])
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate_cost(backward):
    def function(ctx, grad, _):
        nothing = (None,) * (2 + len(ctx.options) + 2)  # lengths, options, check_finite, grad
        if grad is None:
            return None, *nothing
        return backward(grad, *ctx.saved_tensors, *ctx.options), *nothing

    return function


# --------------------------------------------------------------------------------------------------
# Both ways to run them


def _no_double_backward(ctx, *_):
    raise NotImplementedError(
        "soft_dtw has no second derivative: its backward pass cannot be differentiated "
        "(create_graph=True, or a gradient penalty through the loss)"
    )


for op, differentiate, backward, keep in (
    (soft_dtw_op, _differentiate, soft_dtw_backward_op, _keep),
    (from_cost_op, _differentiate_cost, from_cost_backward_op, _keep_cost),
):
    op.register_autograd(differentiate(backward), setup_context=keep)
    backward.register_autograd(_no_double_backward)


def _function(name, forward, backward, differentiate, keep):
    """A torch.autograd.Function of the same parts as the operator."""
    once = type(
        f"{name}Backward",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda ctx, *inputs: backward(*inputs)),
            "backward": staticmethod(_no_double_backward),
        },
    )

    def differentiable(*inputs):
        apply = once.apply  # type: ignore[attr-defined]
        return (apply if torch.is_grad_enabled() else backward)(*inputs)

    def run(ctx, *inputs):
        output = forward(*inputs)
        keep(ctx, inputs, output)
        return output

    parts = {
        "forward": staticmethod(run),
        "backward": staticmethod(differentiate(differentiable)),
    }
    return type(name, (torch.autograd.Function,), parts)


_SoftDTW = _function("SoftDTW", _forward, _backward, _differentiate, _keep)
_SoftDTWFromCost = _function(
    "SoftDTWFromCost", _forward_cost, _backward_cost, _differentiate_cost, _keep_cost
)


def soft_dtw(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: torch.Tensor,
    y_lengths: torch.Tensor,
    backend: str,
    cost: str,
    divergence: bool,
    checkpointed: bool,
    recursion: Recursion,
    check_finite: bool,
) -> torch.Tensor:
    """Loss [B] of features, differentiable once."""
    grad = torch.is_grad_enabled()
    x_grad, y_grad = grad and x.requires_grad, grad and y.requires_grad
    run = (_SoftDTW.apply if x_grad or y_grad else _forward) if _eager(x, y) else soft_dtw_op
    return run(
        x, y, x_lengths, y_lengths, backend, cost, divergence, checkpointed, *recursion,
        check_finite, x_grad, y_grad,
    )[0]  # fmt: skip


def soft_dtw_from_cost(
    cost: torch.Tensor,
    x_lengths: torch.Tensor,
    y_lengths: torch.Tensor,
    backend: str,
    recursion: Recursion,
    check_finite: bool,
) -> torch.Tensor:
    """Loss [B] of cost matrices, differentiable once."""
    grad = torch.is_grad_enabled() and cost.requires_grad
    run = (_SoftDTWFromCost.apply if grad else _forward_cost) if _eager(cost) else from_cost_op
    return run(cost, x_lengths, y_lengths, backend, *recursion, check_finite, grad)[0]


def alignment(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: torch.Tensor,
    y_lengths: torch.Tensor,
    backend: str,
    cost: str,
    recursion: Recursion,
    check_finite: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B] and expected alignment [B, N, M], the gradient of the losses for their costs."""
    with torch.no_grad(), _exact(x.device):
        if check_finite:  # on the features, so that the message names them
            soft_dtw(x, y, x_lengths, y_lengths, backend, cost, False, False, recursion, True)
        dtype = _compute_dtype(x, y)
        n = _lengths(x_lengths, "x_lengths", x, 1, check_finite)
        m = _lengths(y_lengths, "y_lengths", y, 1, check_finite)
        d = matrix(x.to(dtype), y.to(dtype), n, m, cost)
        loss, state = from_cost_op(d, n, m, backend, *recursion, False, True)
        return loss, from_cost_backward_op(
            torch.ones_like(loss), d, n, m, state, backend, *recursion
        )
