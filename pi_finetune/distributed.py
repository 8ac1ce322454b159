"""Several processes, as ``torchrun`` starts them: what SpeechBrain leaves open."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.run_opts import RunOptions

from pi_finetune.errors import UserError

__all__ = [
    "choose_device",
    "device_name",
    "gather_in_turn",
    "mean_over_processes",
    "on_main",
    "processes",
    "rank",
    "start_processes",
]

logger = logging.getLogger(__name__)


def start_processes(run_opts: dict | None) -> RunOptions:
    """Join the group of processes if ``torchrun`` started this one, and choose the device.

    Without a GPU the backend is gloo, whatever ``--distributed_backend`` defaults to. The device
    is ``--device``, or a GPU where there is one (of several processes each takes the GPU of its
    own number); it is printed.

    Arguments
    ---------
    run_opts : dict or None
        SpeechBrain's run options that differ from their defaults.

    Returns
    -------
    speechbrain.utils.run_opts.RunOptions
        With the backend and the device that are used.

    Raises
    ------
    UserError
        The device that was asked for is not there.
    """
    run_opts = RunOptions.from_dictionary(run_opts or {})
    if "RANK" in os.environ and not torch.cuda.is_available():
        run_opts = dataclasses.replace(
            run_opts,
            distributed_backend="gloo",
            overridden_args=run_opts.overridden_args | {"distributed_backend"},
        )
    sb.utils.distributed.ddp_init_group(run_opts)
    # SpeechBrain's default is None, which .to() takes for "stay where you are".
    device = choose_device(run_opts.device)
    if rank() == 0:
        print(f"device: {device_name(device)}", flush=True)
        if "bf16" in (run_opts.precision, run_opts.eval_precision):
            _warn_of_emulation(device)
    return dataclasses.replace(
        run_opts, device=device, overridden_args=run_opts.overridden_args | {"device"}
    )


def _warn_of_emulation(device):
    """Say so where bfloat16 is emulated: a step then takes tens of times as long as in float32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return
    has = torch.cpu.get_capabilities()
    native = has["architecture"] != "x86_64" or has["avx512_bf16"] or has["amx_bf16"]
    if torch.device(device).type == "cpu" and not native:
        logger.warning(
            "--precision bf16: this CPU has no bfloat16 arithmetic (AVX-512 BF16 or AMX), so that "
            "it will be much slower than fp32. Leave the option out here."
        )


def choose_device(device: str | torch.device | None = None) -> str:
    """The device that was asked for, or a GPU where there is one, or the CPU.

    Of several processes each takes the GPU of its own number.

    Raises
    ------
    UserError
        The device cannot compute here.
    """
    device = str(device or sb.utils.distributed.infer_device())
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used: {reason}") from None
    return device


def device_name(device: str | torch.device) -> str:
    """A device for people: ``cuda:0 (NVIDIA H100)``, ``cpu``."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def processes() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0, the main one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def on_main(function: Callable, *args: Any) -> Any:
    """Run ``function(*args)`` on the main process; all return its value or raise its UserError.

    (SpeechBrain's ``run_on_main`` leaves the others waiting if it raises.) Only the main one's
    error has a text, so that :func:`pi_finetune.errors.command` shows it once.
    """
    value = error = None
    if rank() == 0:
        try:
            value = function(*args)
        except UserError as reason:
            error = str(reason)
    value, error = sb.utils.distributed.ddp_broadcast((value, error))
    if error is not None:
        raise UserError(error if rank() == 0 else "")
    return value


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, on each of them."""
    if processes() == 1:
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else value.device
    total = value.detach().clone().to(device)
    torch.distributed.all_reduce(total)
    return total.to(value.device) / processes()


def gather_in_turn(items: list) -> list:
    """The lists of all processes as one: first of each in order of rank, second of each, ...

    The order of the whole, if process r was given its items r, r + P, r + 2 P, ...
    """
    if processes() == 1:
        return items
    lists: list = [None] * processes()
    torch.distributed.all_gather_object(lists, items)
    longest = max(map(len, lists))
    return [part[i] for i in range(longest) for part in lists if i < len(part)]
