"""The base of all enhancers."""

from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_finetune.lengths import Lengths, Waveforms, length_mask, on_device

__all__ = ["REGISTRY", "SAMPLE_RATE", "WaveformEnhancer", "rms"]


SAMPLE_RATE = 16000


REGISTRY: dict[str, type] = {}


def class_path(cls):
    """The public path of a class: those of this package are named without their file."""
    module = cls.__module__
    package = __name__.rpartition(".")[0]
    return f"{package if module.startswith(package + '.') else module}.{cls.__qualname__}"


def rms(wavs: Tensor, lengths: Tensor) -> Tensor:
    """Root mean square [B, 1] of wavs [B, T] (zero beyond lengths) over their valid samples."""
    samples = on_device(lengths.clamp(min=1), wavs.device)
    return (wavs.square().sum(1) / samples + 1e-10).sqrt()[:, None]


def mixed(enhanced: Any, noisy: Any, mix: float) -> Any:
    """The share ``mix``, from 0 to 1, of the enhanced signal; the rest is the input."""
    return mix * enhanced + (1 - mix) * noisy


class WaveformEnhancer(nn.Module):
    """Base of all enhancers: argument checks, padding and cropping, the config.

    A subclass passes its constructor arguments to ``super().__init__`` and
    implements ``enhance(wavs [B, T], lengths [B]) -> [B, T]``, where wavs are
    zero beyond their lengths, which are int64 on the CPU, and the longest length is T > 0.
    What it returns beyond an item's length is ignored. Defining a subclass registers it, so that
    ``load_enhancer`` can build it again.

    Attributes
    ----------
    config : dict
        ``{"class": "module.Class", "arguments": {...}}``, what rebuilds it.
    context : int or None
        How many samples before and after a sample its output can depend on;
        None where that is unbounded. Inference in chunks overlaps that much.
    grid : int
        Frames begin at multiples of this many samples; chunks do so too.
    """

    context: int | None = None
    grid: int = 256

    def __init__(self, **arguments: Any):
        super().__init__()
        self.config = {"class": class_path(type(self)), "arguments": arguments}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY[class_path(cls)] = cls

    def enhance(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Enhance wavs [B, T], zero beyond lengths [B] (on the CPU), the longest of which is T."""
        raise NotImplementedError

    def extra_files(self) -> dict:
        """Text files that ``rebuild`` needs beside config and weights: {name: text}."""
        return {}

    @classmethod
    def rebuild(cls, folder: str | Path, arguments: dict, trust: bool) -> "WaveformEnhancer":
        """Build the model saved in ``folder``, without its weights."""
        return cls(**arguments)

    @overload
    def forward(self, wavs: Waveforms) -> Waveforms: ...

    @overload
    def forward(self, wavs: Tensor, lengths: Lengths | None = None) -> Tensor: ...

    def forward(
        self, wavs: Waveforms | torch.Tensor, lengths: Lengths | None = None
    ) -> Waveforms | torch.Tensor:
        """Enhance a batch.

        Arguments
        ---------
        wavs : Waveforms or torch.Tensor [B, T]
            Noisy, 16 kHz. What lies beyond ``lengths`` is ignored.
        lengths : torch.Tensor [B] or list, optional
            Lengths in samples, 0 to T, of a tensor (default: all T).

        Returns
        -------
        Waveforms or torch.Tensor [B, T], as ``wavs`` is
            Enhanced, zero beyond the lengths.
        """
        noisy = Waveforms.of(wavs, lengths)
        time = noisy.data.shape[1]
        longest = int(noisy.lengths.max()) if len(noisy) else 0
        if longest <= 0:
            enhanced = torch.zeros_like(noisy.data)
        else:
            mask = length_mask(noisy.lengths, longest, noisy.data.device)
            # masked_fill and not a product: padding may hold anything, NaN included.
            valid = noisy.data[:, :longest].masked_fill(~mask, 0.0)
            enhanced = self.enhance(valid, noisy.lengths).masked_fill(~mask, 0.0)
            enhanced = F.pad(enhanced, (0, time - longest))
        if isinstance(wavs, Waveforms):
            return noisy.with_data(enhanced)
        return enhanced
