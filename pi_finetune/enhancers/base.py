"""The base of all enhancers."""

import torch
import torch.nn.functional as F
from torch import nn

SAMPLE_RATE = 16000


REGISTRY: dict[str, type] = {}


def class_path(cls):
    """The public path of a class: those of this package are named without their file."""
    module = cls.__module__
    package = __name__.rpartition(".")[0]
    return f"{package if module.startswith(package + '.') else module}.{cls.__qualname__}"


def rms(wavs, lengths):
    """Root mean square [B, 1] of wavs [B, T] (zero beyond lengths) over their valid samples."""
    return (wavs.square().sum(1) / lengths.clamp(min=1) + 1e-10).sqrt()[:, None]


def valid_mask(lengths, size):
    """Mask [B, size] of the positions before ``lengths`` [B]."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


class WaveformEnhancer(nn.Module):
    """Base of all enhancers: argument checks, padding and cropping, the config.

    A subclass passes its constructor arguments to ``super().__init__`` and
    implements ``enhance(wavs [B, T], lengths [B]) -> [B, T]``, where wavs are
    zero beyond their lengths and the longest length is T > 0. What it returns
    beyond an item's length is ignored. Defining a subclass registers it, so that
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

    context = None
    grid = 256

    def __init__(self, **arguments):
        super().__init__()
        self.config = {"class": class_path(type(self)), "arguments": arguments}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY[class_path(cls)] = cls

    def enhance(self, wavs, lengths):
        """Enhance wavs [B, T], zero beyond lengths [B], the longest of which is T."""
        raise NotImplementedError

    def extra_files(self):
        """Text files that ``rebuild`` needs beside config and weights: {name: text}."""
        return {}

    @classmethod
    def rebuild(cls, folder, arguments, trust):
        """Build the model saved in ``folder``, without its weights."""
        return cls(**arguments)

    def forward(self, wavs, lengths=None):
        """Enhance a batch.

        Arguments
        ---------
        wavs : torch.Tensor [B, T]
            Noisy waveforms, 16 kHz. What lies beyond ``lengths`` is ignored.
        lengths : torch.Tensor [B], optional
            Lengths in samples, 0 to T (default: all T).

        Returns
        -------
        torch.Tensor [B, T]
            Enhanced waveforms, zero beyond ``lengths``.
        """
        if wavs.dim() != 2 or not wavs.is_floating_point():
            raise ValueError(
                f"wavs must be a float tensor [B, T], got {wavs.dtype} {list(wavs.shape)}"
            )
        batch, time = wavs.shape
        if lengths is None:
            lengths = torch.full((batch,), time, device=wavs.device)
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be {batch} whole numbers of samples (not relative lengths), "
                f"got {lengths.dtype} {list(lengths.shape)}"
            )
        longest = int(lengths.max()) if batch else 0
        if longest > time:
            raise ValueError(f"lengths go up to {longest}, but wavs have {time} samples")
        if longest <= 0:
            return torch.zeros_like(wavs)
        lengths = lengths.to(wavs.device)
        mask = valid_mask(lengths, longest)
        # masked_fill and not a product: padding may hold anything, NaN included.
        noisy = wavs[:, :longest].masked_fill(~mask, 0.0)
        enhanced = self.enhance(noisy, lengths).masked_fill(~mask, 0.0)
        return F.pad(enhanced, (0, time - longest))
