"""Log-mel energies, in an encoder's place."""

from typing import Self

import torch
from torch import nn
from torchaudio.functional import melscale_fbanks

from pi_finetune.lengths import Lengths, Waveforms
from pi_finetune.teacher import SAMPLE_RATE

__all__ = ["LogMel"]


class LogMel(nn.Module):
    """Log-mel energies in an encoder's place, for a recogniser that needs no other model.

    80 bands of 25 ms windows every 10 ms, three neighbours side by side: a frame is 30 ms. Its
    methods and attributes are those of :class:`pi_finetune.teacher.Teacher` that a
    :class:`CTCHead` is trained on.
    """

    source = "log-mel"
    num_layers = 0
    window, step, bands, stacked = 400, 160, 80, 3
    dim = bands * stacked
    hop = step * stacked
    receptive_field = window + step * (stacked - 1)
    max_length = None
    filters: torch.Tensor
    taper: torch.Tensor

    def __init__(self):
        super().__init__()
        filters = melscale_fbanks(257, 0.0, SAMPLE_RATE / 2, self.bands, SAMPLE_RATE)
        self.register_buffer("filters", filters)
        self.register_buffer("taper", torch.hann_window(self.window))

    @property
    def encoder(self) -> Self:
        """The weights by which a recogniser knows its encoder: the filters."""
        return self

    def frames(self, lengths: torch.Tensor | None) -> torch.Tensor:
        """Number of frames [B] (int64) of utterances of ``lengths`` [B] samples."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        windows = (lengths - self.window).div(self.step, rounding_mode="floor") + 1
        return windows.div(self.stacked, rounding_mode="floor").clamp(min=0)

    def hidden_states(
        self, wavs: torch.Tensor | Waveforms, lengths: Lengths | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States [1, B, F, 240] and frame lengths [B] of ``Waveforms``, or of wavs [B, T]."""
        wavs = Waveforms.of(wavs, lengths)
        frames = self.frames(wavs.lengths)
        pieces = wavs.data.float().unfold(1, self.window, self.step) * self.taper
        power = torch.fft.rfft(pieces, 512).abs().square() @ self.filters
        power = power[:, : int(frames.max()) * self.stacked]
        return (power + 1e-6).log().unflatten(1, (-1, self.stacked)).flatten(2)[None], frames
