"""A waveform U-Net with an LSTM."""

from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.RNN import LSTM
from torch import nn

from pi_finetune.enhancers.base import WaveformEnhancer, rms
from pi_finetune.enhancers.demucs import cut, encoder_level, rescale_convolutions
from pi_finetune.lengths import shares

__all__ = ["UNetEnhancer"]


class UNetEnhancer(WaveformEnhancer):
    """Waveform U-Net of the Demucs family, with a recurrent bottleneck.

    After Défossez, Synnaeve and Adi, "Real Time Speech Enhancement in the
    Waveform Domain", Interspeech 2020: each encoder level is a strided
    convolution, ReLU, a 1x1 convolution and GLU; the decoder mirrors it with skip
    connections added; an LSTM joins them; convolutions are rescaled at
    initialisation. Unlike the paper it has no internal upsampling, and it is
    bidirectional unless ``causal``. Every level pads to whole strides and masks
    what lies beyond an item's own frames. The waveform is brought to unit level
    over its valid samples and back, so the output scales with the input.

    Arguments
    ---------
    channels : int
        Channels of the first level.
    depth : int
        Number of levels.
    growth : int
        Factor on the channels from level to level.
    kernel, stride : int
        Of the strided convolutions, in samples of their level; stride <= kernel.
    lstm_layers : int
        Layers of the bottleneck.
    causal : bool
        A one-directional LSTM (the level is still taken over the utterance).
    rescale : float
        Reference standard deviation of the initial weights.
    """

    def __init__(
        self,
        channels: int = 24,
        depth: int = 4,
        growth: int = 2,
        kernel: int = 8,
        stride: int = 4,
        lstm_layers: int = 1,
        causal: bool = False,
        rescale: float = 0.1,
    ):
        super().__init__(
            channels=channels,
            depth=depth,
            growth=growth,
            kernel=kernel,
            stride=stride,
            lstm_layers=lstm_layers,
            causal=causal,
            rescale=rescale,
        )
        if not 0 < stride <= kernel or depth < 1:
            raise ValueError(
                f"need 0 < stride <= kernel and depth >= 1, got stride={stride}, "
                f"kernel={kernel}, depth={depth}"
            )
        self.kernel, self.stride, self.grid = kernel, stride, stride**depth
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        inputs, outputs = 1, channels
        for level in range(depth):
            self.encoder.append(encoder_level(inputs, outputs, kernel, stride))
            # The transposed convolution is a step of its own: a mask comes before it.
            before = nn.Sequential(nn.Conv1d(outputs, 2 * outputs, 1), nn.GLU(dim=1))
            up = nn.ConvTranspose1d(outputs, inputs, kernel, stride)
            after = nn.ReLU() if level else nn.Identity()
            self.decoder.insert(0, nn.ModuleList([before, up, after]))
            inputs, outputs = outputs, outputs * growth
        self.lstm = LSTM(
            hidden_size=inputs,
            input_size=inputs,
            num_layers=lstm_layers,
            bidirectional=not causal,
        )
        self.join = nn.Identity() if causal else Linear(n_neurons=inputs, input_size=2 * inputs)
        rescale_convolutions(self, rescale)

    def enhance(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See ``WaveformEnhancer``."""
        level = rms(wavs, lengths)
        x = (wavs / level)[:, None]  # [B, C, T]
        skips, sizes = [], [(lengths, wavs.shape[1])]
        for encode in self.encoder:
            lengths = self._frames(lengths)
            size = (self._frames(x.shape[2]) - 1) * self.stride + self.kernel
            x = cut(encode(F.pad(x, (0, size - x.shape[2]))), lengths)
            skips.append(x)
            sizes.append((lengths, x.shape[2]))
        # SpeechBrain packs by relative lengths, truncating: half a frame more is safe.
        relative = shares(lengths.clamp(min=1) + 0.5, x.shape[2])
        x = self.join(self.lstm(x.transpose(1, 2), lengths=relative)[0]).transpose(1, 2)
        decoder: Any = self.decoder
        for before, up, after in decoder:
            lengths, _ = sizes.pop()
            x = up(cut(before(x + skips.pop()), lengths))
            x = after(x[..., : sizes[-1][1]])
        return x[:, 0] * level

    def _frames(self, lengths):
        """Frames that cover ``lengths`` samples (int or tensor): at least one, if any."""
        if not isinstance(lengths, torch.Tensor):
            return (max(lengths - self.kernel, 0) + self.stride - 1) // self.stride + 1
        frames = (lengths - self.kernel + self.stride - 1).div(self.stride, rounding_mode="floor")
        return (frames.clamp(min=0) + 1) * (lengths > 0)
