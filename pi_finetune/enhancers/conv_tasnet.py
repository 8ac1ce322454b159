"""Conv-TasNet."""

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from speechbrain.lobes.models import conv_tasnet
from speechbrain.nnet.CNN import Conv1d
from torch import nn

from pi_finetune.enhancers.base import WaveformEnhancer, rms
from pi_finetune.lengths import length_mask

if TYPE_CHECKING:
    import torch

__all__ = ["ConvTasNet"]


class _MaskedNorm(nn.Module):
    """Conv-TasNet's global or channel-wise layer norm over the valid frames alone.

    SpeechBrain's ``GlobalLayerNorm`` averages over the padding too. Here the
    statistics run over an item's own frames, and the frames beyond are set to zero,
    which is what the depthwise convolution after it sees at the end of an unpadded item.

    Arguments
    ---------
    norm : GlobalLayerNorm or ChannelwiseLayerNorm
        The module that this one replaces; its parameters keep their names.
    """

    def __init__(self, norm):
        super().__init__()
        self.gamma, self.beta = norm.gamma, norm.beta
        self.over_time = isinstance(norm, conv_tasnet.GlobalLayerNorm)
        self.valid: Any = None  # bool [B, K, 1], set by ConvTasNet for the time of one call

    def forward(self, y):
        """Normalise y [B, K, N]."""
        if self.over_time:
            weight = self.valid / (self.valid.sum(1, keepdim=True).clamp(min=1) * y.shape[2])
            mean = (y * weight).sum((1, 2), keepdim=True)
            var = ((y - mean).square() * weight).sum((1, 2), keepdim=True)
        else:
            mean = y.mean(2, keepdim=True)
            var = y.var(2, keepdim=True, unbiased=False)
        y = self.gamma * (y - mean) / (var + conv_tasnet.EPS).sqrt() + self.beta
        return y.masked_fill(~self.valid, 0.0)


class ConvTasNet(WaveformEnhancer):
    """SpeechBrain's Conv-TasNet with one source (Luo and Mesgarani, TASLP 2019).

    The parts are ``speechbrain.lobes.models.conv_tasnet`` as they are, but for
    three things that let padding in: the global layer norm (see ``_MaskedNorm``),
    convolutions padded by reflection, and an output that lags by half a filter.
    The waveform is brought to unit level over its valid samples and back, so the
    output scales with the input.

    Arguments
    ---------
    filters : int
        Filters of the learned front end (N in the paper).
    kernel : int
        Their length in samples, even; they overlap by half (L).
    bottleneck, hidden : int
        Channels between and inside the convolutional blocks (B and H).
    blocks, repeats : int
        Blocks in a repeat, with dilations 1, 2, 4, ..., and repeats (X and R).
    block_kernel : int
        Kernel size of the blocks, odd (P).
    norm : str
        ``"gLN"`` (over time and channels) or ``"cLN"`` (over channels, frame by frame).
    """

    def __init__(
        self,
        filters: int = 192,
        kernel: int = 32,
        bottleneck: int = 96,
        hidden: int = 192,
        blocks: int = 7,
        repeats: int = 2,
        block_kernel: int = 3,
        norm: str = "gLN",
    ):
        super().__init__(
            filters=filters,
            kernel=kernel,
            bottleneck=bottleneck,
            hidden=hidden,
            blocks=blocks,
            repeats=repeats,
            block_kernel=block_kernel,
            norm=norm,
        )
        if norm not in ("gLN", "cLN"):
            raise ValueError(f"norm must be 'gLN' or 'cLN', got {norm!r}")
        if kernel < 2 or kernel % 2 or block_kernel % 2 == 0:
            raise ValueError(
                f"kernel must be even and block_kernel odd, got {kernel} and {block_kernel}"
            )
        self.stride = self.grid = kernel // 2
        self.encoder = conv_tasnet.Encoder(kernel, filters)
        self.masknet = conv_tasnet.MaskNet(
            filters, bottleneck, hidden, block_kernel, blocks, repeats, C=1, norm_type=norm
        )
        self.decoder = conv_tasnet.Decoder(kernel, filters)
        for parent in list(self.modules()):
            if isinstance(parent, Conv1d):
                parent.padding_mode = "constant"
            for name, child in list(parent.named_children()):
                if isinstance(
                    child, conv_tasnet.GlobalLayerNorm | conv_tasnet.ChannelwiseLayerNorm
                ):
                    parent.add_module(name, _MaskedNorm(child))
        self._norms = [module for module in self.modules() if isinstance(module, _MaskedNorm)]

    def enhance(self, wavs: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
        """See ``WaveformEnhancer``."""
        time = wavs.shape[1]
        level = rms(wavs, lengths)
        # Frame k spans samples [(k - 1) stride, (k + 1) stride).
        frames = (lengths + self.stride - 1) // self.stride + 1
        size = (time + self.stride - 1) // self.stride * self.stride
        mixture = self.encoder(F.pad(wavs / level, (0, size - time)))  # [B, K, N]
        valid = length_mask(frames, mixture.shape[1], mixture.device)[..., None]
        for norm in self._norms:
            norm.valid = valid
        mask = self.masknet(mixture.transpose(1, 2))[0].transpose(1, 2)  # [B, K, N]
        for norm in self._norms:
            norm.valid = None
        enhanced = self.decoder(mixture, mask[:, :, None])[..., 0]
        return enhanced[:, self.stride : self.stride + time] * level
