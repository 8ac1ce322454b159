"""The mask network, late by a random delay in training: not in step with its target."""

from typing import Any

import torch

from pi_finetune.enhancers.base import SAMPLE_RATE
from pi_finetune.enhancers.mask import MaskEnhancer

__all__ = ["DelayedMaskEnhancer"]


class DelayedMaskEnhancer(MaskEnhancer):
    """A mask network whose output is late in training, by a constant that differs by utterance.

    It stands for models whose output can move in time (generative ones, or recurrent ones with a
    delay of their own), where equal content has unequal positions before the first update. The
    delay is drawn anew, uniformly over whole samples, for every utterance and update, from
    PyTorch's global generator; what it pushes beyond the end is lost. There is none in eval mode.
    The weights are those of a :class:`MaskEnhancer`, and load as such.

    Arguments
    ---------
    max_delay_seconds : float
        Largest delay, at least 0. Default: 0.2.
    **arguments
        Of :class:`MaskEnhancer`.

    Raises
    ------
    ValueError
        The delay is below 0, or see :class:`MaskEnhancer`.
    """

    def __init__(self, max_delay_seconds: float = 0.2, **arguments: Any):
        if max_delay_seconds < 0:
            raise ValueError(f"max_delay_seconds must be at least 0, got {max_delay_seconds}")
        super().__init__(**arguments)
        self.config["arguments"]["max_delay_seconds"] = max_delay_seconds
        self.max_delay = round(max_delay_seconds * SAMPLE_RATE)

    def enhance(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See ``WaveformEnhancer``."""
        enhanced = super().enhance(wavs, lengths)
        if not self.training:
            return enhanced
        # On the CPU, as everything that a seed decides.
        delays = torch.randint(self.max_delay + 1, (len(wavs), 1)).to(wavs.device)
        source = torch.arange(wavs.shape[1], device=wavs.device) - delays
        return enhanced.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0.0)
