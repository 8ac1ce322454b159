"""The shipped default: a compact convolutional mask network."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from speechbrain.nnet.CNN import Conv1d, Conv2d
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.processing.features import ISTFT, STFT
from torch import nn

from pi_finetune.enhancers.base import SAMPLE_RATE, WaveformEnhancer
from pi_finetune.lengths import length_mask

__all__ = ["MaskEnhancer"]


class _TimeBlock(nn.Module):
    """Residual block over time: LayerNorm, GLU, dilated depthwise convolution, projection.

    Arguments
    ---------
    dim : int
        Features per frame.
    kernel_size, dilation : int
        Of the depthwise convolution, in frames.
    """

    def __init__(self, dim, kernel_size, dilation):
        super().__init__()
        self.norm = LayerNorm(input_size=dim)
        self.expand = Linear(n_neurons=2 * dim, input_size=dim)
        # SpeechBrain's default padding mode reflects: that would mix padding in.
        self.depthwise = Conv1d(
            in_channels=dim,
            out_channels=dim,
            kernel_size=kernel_size,
            dilation=dilation,
            groups=dim,
            padding_mode="constant",
        )
        self.project = Linear(n_neurons=dim, input_size=dim)

    def forward(self, x, mask):
        """Map x [B, N, dim] to the same shape; mask [B, N, 1] is True at valid frames."""
        y = F.glu(self.expand(self.norm(x)), dim=-1).masked_fill(~mask, 0.0)
        return x + self.project(F.gelu(self.depthwise(y)))


class MaskEnhancer(WaveformEnhancer):
    """Compact convolutional network that estimates a bounded complex ratio mask.

    STFT, magnitudes compressed by a power law, strided convolutions over
    frequency, dilated convolutions over time, and back by sub-pixel convolutions
    over frequency with skip connections. The mask is ``m tanh(|m|)/|m|`` times
    ``max_gain`` (Hu et al., DCCRN, Interspeech 2020, with a gain), so no bin is
    amplified by more than ``max_gain``; at initialisation it is about 1.

    Convolutions, rather than a recurrent layer, because their reach is finite:
    what was trained on crops works at any length, and a long file enhanced in
    chunks comes out as if it were enhanced whole. The features are divided by the
    mean level around each frame, which makes the output scale with the input:
    ``enhancer(a * x) = a * enhancer(x)`` for levels above about -100 dBFS.

    Arguments
    ---------
    channels : list of int
        Channels of the convolutions over frequency; each halves the bins.
    dim : int
        Features per frame between encoder and decoder.
    dilations : list of int
        One block over time for each, in frames.
    kernel_size : int
        Of the blocks over time, in frames.
    n_fft, hop : int
        STFT window and hop in samples; n_fft is a power of two, hop at most half of it.
    compression : float
        Exponent of the magnitudes.
    level_frames : int
        The level of a frame is taken over this many frames before and after it.
    max_gain : float
        Bound of the mask's magnitude, above 1.
    mix : float
        Share of the mask; the rest is the input as it is. Below 1 less noise is removed, and what
        is wrongly taken for noise is not lost.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 24, 32),
        dim: int = 144,
        dilations: Sequence[int] = (1, 2, 4, 8, 16, 32),
        kernel_size: int = 5,
        n_fft: int = 512,
        hop: int = 256,
        compression: float = 0.3,
        level_frames: int = 94,
        max_gain: float = 2.0,
        mix: float = 1.0,
    ):
        super().__init__(
            channels=list(channels),
            dim=dim,
            dilations=list(dilations),
            kernel_size=kernel_size,
            n_fft=n_fft,
            hop=hop,
            compression=compression,
            level_frames=level_frames,
            max_gain=max_gain,
            mix=mix,
        )
        bins = n_fft // 2
        if n_fft & (n_fft - 1) or bins % 2 ** len(channels) or not 0 < hop <= bins:
            raise ValueError(
                f"n_fft must be a power of two with n_fft/2 divisible by 2**len(channels), and hop "
                f"at most n_fft/2; got n_fft={n_fft}, hop={hop}, {len(channels)} channels"
            )
        if max_gain <= 1:
            raise ValueError(f"max_gain must be above 1, got {max_gain}")
        if not 0 < mix <= 1:
            raise ValueError(f"mix must be above 0 and at most 1, got {mix}")
        self.n_fft, self.hop, self.grid = n_fft, hop, hop
        self.compression, self.level_frames, self.max_gain = compression, level_frames, max_gain
        self.mix = mix
        milliseconds = 1000 / SAMPLE_RATE
        shape = dict(
            sample_rate=SAMPLE_RATE,
            n_fft=n_fft,
            win_length=n_fft * milliseconds,
            hop_length=hop * milliseconds,
            window_fn=torch.hann_window,
        )
        self.stft, self.istft = STFT(**shape), ISTFT(**shape)

        def conv(inputs, outputs, kernel, stride=1):
            return Conv2d(
                in_channels=inputs,
                out_channels=outputs,
                kernel_size=kernel,
                stride=(1, stride),
                padding_mode="constant",
                skip_transpose=True,
            )

        widths = [3, *channels]
        self.encoder = nn.ModuleList(
            conv(a, b, (3, 5) if i == 0 else (1, 5), stride=2)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.bottom = (channels[-1], bins // 2 ** len(channels))
        flat = self.bottom[0] * self.bottom[1]
        self.reduce = Linear(n_neurons=dim, input_size=flat)
        self.blocks = nn.ModuleList(_TimeBlock(dim, kernel_size, d) for d in dilations)
        self.restore = Linear(n_neurons=flat, input_size=dim)
        # Twice the outputs: they are folded into twice the bins.
        outputs = [max(8, channels[0] // 2), *channels[:-1]]
        self.decoder = nn.ModuleList(
            conv(a, 2 * b, (1, 3)) for a, b in zip(channels[::-1], outputs[::-1])
        )
        self.mask = conv(outputs[0], 2, (1, 3))
        with torch.no_grad():
            self.mask.conv.weight.mul_(0.1)
            self.mask.conv.bias.copy_(torch.tensor([math.atanh(1 / max_gain), 0.0]))

        reach = 1 + sum(d * (kernel_size // 2) for d in dilations) + level_frames
        self.context = reach * hop + n_fft

    def enhance(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See ``WaveformEnhancer``."""
        time = wavs.shape[1]
        # As many frames as touch a valid sample: then an item has the same frames, and the
        # inverse transform the same window sum, whatever it is padded to.
        frames = (lengths + self.n_fft // 2 + self.hop - 1) // self.hop
        count = (time + self.n_fft // 2 + self.hop - 1) // self.hop
        size = (count - 1) * self.hop
        spectra = self.stft(F.pad(wavs.float(), (0, size - time)))  # [B, N, bins + 1, 2]
        mask = self._mask(spectra, length_mask(frames, count, spectra.device))
        real, imag = spectra.unbind(-1)
        gain, turn = (self.mix * mask).unbind(-1)
        gain = gain + (1 - self.mix)
        enhanced = torch.stack([real * gain - imag * turn, real * turn + imag * gain], dim=-1)
        return self.istft(enhanced, sig_length=size)[:, :time].to(wavs.dtype)

    def _mask(self, spectra, valid):
        """Estimate the mask [B, N, bins + 1, 2] of spectra of that shape; valid is [B, N]."""
        batch, count = valid.shape
        x = self._features(spectra, valid)[..., :-1]  # the Nyquist bin follows its neighbour
        skips = []
        for conv in self.encoder:
            x = F.gelu(conv(x))
            skips.append(x)
        x = self.reduce(x.transpose(1, 2).flatten(2))  # [B, N, dim]
        for block in self.blocks:
            x = block(x, valid[..., None])
        x = self.restore(x).reshape(batch, count, *self.bottom).transpose(1, 2)
        for conv, skip in zip(self.decoder, reversed(skips)):
            x = conv(x + skip)
            x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).flatten(3)
            x = F.gelu(x)
        x = self.mask(x).float()
        x = torch.cat([x, x[..., -1:]], dim=-1).permute(0, 2, 3, 1)
        size = (x.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        return self.max_gain * torch.tanh(size) / size * x

    def _features(self, spectra, valid):
        """Compressed magnitude, real and imaginary part [B, 3, N, bins + 1], zero where padded."""
        power = spectra.square().sum(-1)  # [B, N, bins + 1]
        around: dict = {
            "kernel_size": 2 * self.level_frames + 1, "stride": 1, "padding": self.level_frames
        }  # fmt: skip
        weight = valid.to(power.dtype)
        level = F.avg_pool1d(power.mean(-1), **around)  # padded frames have no power
        level = level / F.avg_pool1d(weight, **around).clamp(min=1e-6) + 1e-10
        power = power / level[..., None] + 1e-6
        scale = power ** ((self.compression - 1) / 2) / level.sqrt()[..., None]
        parts = spectra * scale[..., None]
        features = torch.stack([power ** (self.compression / 2), *parts.unbind(-1)], dim=1)
        return features.masked_fill(~valid[:, None, :, None], 0.0)
