"""Enhancers as files: ``enhancer.yaml`` and ``enhancer.safetensors``."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pi_finetune.enhancers.base import REGISTRY
from pi_finetune.enhancers.demucs import (
    CHECKPOINTS,
    load_denoiser_checkpoint,
    read_denoiser_checkpoint,
)
from pi_finetune.errors import UserError
from pi_finetune.files import replacing

if TYPE_CHECKING:
    from pi_finetune.enhancers.base import WaveformEnhancer

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "config_text",
    "load_enhancer",
    "load_weights",
    "save_enhancer",
]


CONFIG_FILE = "enhancer.yaml"


WEIGHTS_FILE = "enhancer.safetensors"


def config_text(enhancer: torch.nn.Module, config: dict | None = None) -> str:
    """The text of ``enhancer.yaml``; training asks for it before it begins.

    Arguments
    ---------
    enhancer : torch.nn.Module
        The model; a ``DistributedDataParallel`` wrapper is taken off.
    config : dict, optional
        ``{"class": ..., "arguments": {...}}`` (default: ``enhancer.config``).

    Raises
    ------
    UserError
        Where there is no config, or one that is no plain data.
    """
    if isinstance(enhancer, nn.parallel.DistributedDataParallel):
        enhancer = enhancer.module
    config = getattr(enhancer, "config", None) if config is None else config
    if not isinstance(config, dict) or not {"class", "arguments"} <= config.keys():
        raise UserError(
            f"{type(enhancer).__name__} cannot be saved so that it can be loaded again: derive it "
            "from pi_finetune.enhancers.WaveformEnhancer, or give it an attribute config with the "
            "keys 'class' and 'arguments'."
        )
    try:
        return yaml.safe_dump(dict(config), sort_keys=False)
    except yaml.YAMLError as error:
        raise UserError(
            f"{type(enhancer).__name__} cannot be saved so that it can be loaded again: its config "
            f"must be numbers, texts, lists and dicts alone ({error})."
        ) from error


def save_enhancer(
    folder: str | Path, enhancer: "WaveformEnhancer", config: dict | None = None
) -> None:
    """Write ``enhancer.yaml`` and ``enhancer.safetensors`` into a folder.

    Arguments
    ---------
    folder : str or Path
        Made if missing.
    enhancer : WaveformEnhancer
        The model; a ``DistributedDataParallel`` wrapper is taken off.
    config : dict, optional
        ``{"class": ..., "arguments": {...}}`` (default: ``enhancer.config``).

    Raises
    ------
    UserError
        See ``config_text``.
    """
    text = config_text(enhancer, config)
    if isinstance(enhancer, nn.parallel.DistributedDataParallel):
        enhancer = enhancer.module
    # Cloned, since safetensors refuses tensors that share memory.
    weights = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in enhancer.state_dict().items()
    }
    folder = Path(folder)
    with replacing(folder / WEIGHTS_FILE) as path:
        save_file(weights, path)
    for name, content in {**getattr(enhancer, "extra_files", dict)(), CONFIG_FILE: text}.items():
        with replacing(folder / name) as path:
            path.write_text(content, encoding="utf-8")


def load_enhancer(folder: str | Path, trust: bool = False) -> "WaveformEnhancer":
    """Build the enhancer that ``save_enhancer`` wrote, in eval mode, on the CPU.

    The config is read as plain YAML: nothing in it is executed.

    Arguments
    ---------
    folder : str or Path
        With ``enhancer.yaml`` and ``enhancer.safetensors``; or a checkpoint of
        facebookresearch/denoiser (its name, URL or ``.th`` file).
    trust : bool
        Whether code that the folder names may be run (default False): a class that
        is not registered is imported, a SpeechBrain model's YAML file is executed.

    Raises
    ------
    UserError
        Where a file is missing or unreadable, the class is unknown, an argument
        is wrong, or the weights do not fit.
    """
    if str(folder) in CHECKPOINTS or Path(folder).suffix == ".th":
        return load_denoiser_checkpoint(folder).eval()
    path = Path(folder) / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"No {CONFIG_FILE} in {folder}: give a run folder in which training saved a model, "
            "or a folder written by save_enhancer."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(config, dict) or not {"class", "arguments"} <= config.keys():
        raise UserError(f"{path} must hold the keys 'class' and 'arguments'.")
    name, arguments = config["class"], config["arguments"] or {}
    cls = REGISTRY.get(name) or (trust and _import_class(name, path))
    if not cls:
        raise UserError(
            f"{path} names the class {name}, which is not an enhancer known here (known: "
            f"{', '.join(sorted(REGISTRY))}). Import the module that defines it first; or, if "
            "you trust the file, pass trust=True (--trust on the command line)."
        )
    try:
        rebuild = getattr(cls, "rebuild", None)
        enhancer = rebuild(folder, arguments, trust) if rebuild else cls(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"The arguments in {path} do not fit {name}: {error}") from error
    enhancer.config = config
    load_weights(enhancer, folder)
    return enhancer.eval()


def load_weights(enhancer: torch.nn.Module, source: str | Path | None) -> torch.nn.Module:
    """Load weights into an enhancer in place, e.g. to start fine-tuning from them.

    Arguments
    ---------
    enhancer : torch.nn.Module
        The model; every key and shape must fit.
    source : str or Path or None
        A folder with ``enhancer.safetensors``, a ``.safetensors`` file, or a checkpoint of
        facebookresearch/denoiser for a ``Demucs`` (its name, URL or ``.th`` file). None
        leaves the enhancer as it is: to train from scratch, or from the weights
        that ``SpeechBrainEnhancer`` brings.

    Returns
    -------
    torch.nn.Module
        ``enhancer``.

    Raises
    ------
    UserError
        Where the file is missing, broken, or of another architecture.
    """
    if source is None:
        return enhancer
    if not isinstance(enhancer, nn.Module):
        raise UserError(f"The enhancer must be a torch.nn.Module, got {type(enhancer).__name__}.")
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if str(source) in CHECKPOINTS or path.suffix == ".th":
        weights = read_denoiser_checkpoint(source)
    elif path.is_file():
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    else:
        raise UserError(f"No weights at {path}: give a folder with {WEIGHTS_FILE}, or such a file.")
    own = enhancer.state_dict()
    faults = [f"{key} is missing" for key in own.keys() - weights.keys()]
    faults += [f"{key} is unknown" for key in weights.keys() - own.keys()]
    faults += [
        f"{key} is {list(weights[key].shape)} and should be {list(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:3]) + (
            f"; and {len(faults) - 3} more" if faults[3:] else ""
        )
        raise UserError(
            f"The weights in {path} do not fit {type(enhancer).__name__}: {shown}. Use the "
            f"architecture and arguments they were trained with (see {CONFIG_FILE} beside them)."
        )
    enhancer.load_state_dict(weights)
    return enhancer


def _import_class(name, path):
    module, _, attribute = str(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"Cannot import the class {name} that {path} names: {error}") from error
