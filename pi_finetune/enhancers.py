"""Speech enhancers: waveform in, waveform of the same length out.

Every enhancer is called ``enhancer(wavs, lengths)`` with wavs [B, T] (float32,
16 kHz) and lengths [B] in samples, and returns [B, T], zero beyond ``lengths``.
What an utterance is batched with does not change its output, any length is
taken, and no output is peak-normalised.

The compact mask network is the shipped default. The others are there so that a
result can be checked to hold for more than one kind of model.
"""

import functools
import importlib
import inspect
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from hyperpyyaml import load_hyperpyyaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from speechbrain.inference.enhancement import SpectralMaskEnhancement, WaveformEnhancement
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.models import conv_tasnet
from speechbrain.nnet.CNN import Conv1d, Conv2d
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.nnet.RNN import LSTM
from speechbrain.processing.features import ISTFT, STFT
from speechbrain.utils.callchains import lengths_arg_exists
from speechbrain.utils.fetching import fetch
from torch import nn
from torchaudio.functional import resample

from pi_finetune.errors import UserError
from pi_finetune.files import replacing

SAMPLE_RATE = 16000
CONFIG_FILE = "enhancer.yaml"
WEIGHTS_FILE = "enhancer.safetensors"
SPEECHBRAIN_FILE = "speechbrain.yaml"

_REGISTRY: dict[str, type] = {}


def _class_path(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def _level(wavs, lengths):
    """Root mean square [B, 1] of wavs [B, T] (zero beyond lengths) over their valid samples."""
    return (wavs.square().sum(1) / lengths.clamp(min=1) + 1e-10).sqrt()[:, None]


def _valid(lengths, size):
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
        self.config = {"class": _class_path(type(self)), "arguments": arguments}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _REGISTRY[_class_path(cls)] = cls

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
        mask = _valid(lengths, longest)
        # masked_fill and not a product: padding may hold anything, NaN included.
        noisy = wavs[:, :longest].masked_fill(~mask, 0.0)
        enhanced = self.enhance(noisy, lengths).masked_fill(~mask, 0.0)
        return F.pad(enhanced, (0, time - longest))


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
    """

    def __init__(
        self,
        channels=(16, 24, 32),
        dim=144,
        dilations=(1, 2, 4, 8, 16, 32),
        kernel_size=5,
        n_fft=512,
        hop=256,
        compression=0.3,
        level_frames=94,
        max_gain=2.0,
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
        )
        bins = n_fft // 2
        if n_fft & (n_fft - 1) or bins % 2 ** len(channels) or not 0 < hop <= bins:
            raise ValueError(
                f"n_fft must be a power of two with n_fft/2 divisible by 2**len(channels), and hop "
                f"at most n_fft/2; got n_fft={n_fft}, hop={hop}, {len(channels)} channels"
            )
        if max_gain <= 1:
            raise ValueError(f"max_gain must be above 1, got {max_gain}")
        self.n_fft, self.hop, self.grid = n_fft, hop, hop
        self.compression, self.level_frames, self.max_gain = compression, level_frames, max_gain
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

    def enhance(self, wavs, lengths):
        """See ``WaveformEnhancer``."""
        time = wavs.shape[1]
        # As many frames as touch a valid sample: then an item has the same frames, and the
        # inverse transform the same window sum, whatever it is padded to.
        frames = (lengths + self.n_fft // 2 + self.hop - 1) // self.hop
        count = (time + self.n_fft // 2 + self.hop - 1) // self.hop
        size = (count - 1) * self.hop
        spectra = self.stft(F.pad(wavs.float(), (0, size - time)))  # [B, N, bins + 1, 2]
        mask = self._mask(spectra, _valid(frames, count))
        real, imag = spectra.unbind(-1)
        gain, turn = mask.unbind(-1)
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
        around = dict(kernel_size=2 * self.level_frames + 1, stride=1, padding=self.level_frames)
        weight = valid.to(power.dtype)
        level = F.avg_pool1d(power.mean(-1), **around)  # padded frames have no power
        level = level / F.avg_pool1d(weight, **around).clamp(min=1e-6) + 1e-10
        power = power / level[..., None] + 1e-6
        scale = power ** ((self.compression - 1) / 2) / level.sqrt()[..., None]
        parts = spectra * scale[..., None]
        features = torch.stack([power ** (self.compression / 2), *parts.unbind(-1)], dim=1)
        return features.masked_fill(~valid[:, None, :, None], 0.0)


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
        self.valid = None  # bool [B, K, 1], set by ConvTasNet for the time of one call

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
        filters=192,
        kernel=32,
        bottleneck=96,
        hidden=192,
        blocks=7,
        repeats=2,
        block_kernel=3,
        norm="gLN",
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

    def enhance(self, wavs, lengths):
        """See ``WaveformEnhancer``."""
        time = wavs.shape[1]
        level = _level(wavs, lengths)
        # Frame k spans samples [(k - 1) stride, (k + 1) stride).
        frames = (lengths + self.stride - 1) // self.stride + 1
        size = (time + self.stride - 1) // self.stride * self.stride
        mixture = self.encoder(F.pad(wavs / level, (0, size - time)))  # [B, K, N]
        valid = _valid(frames, mixture.shape[1])[..., None]
        for norm in self._norms:
            norm.valid = valid
        mask = self.masknet(mixture.transpose(1, 2))[0].transpose(1, 2)  # [B, K, N]
        for norm in self._norms:
            norm.valid = None
        enhanced = self.decoder(mixture, mask[:, :, None])[..., 0]
        return enhanced[:, self.stride : self.stride + time] * level


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
        channels=24,
        depth=4,
        growth=2,
        kernel=8,
        stride=4,
        lstm_layers=1,
        causal=False,
        rescale=0.1,
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
            self.encoder.append(
                nn.Sequential(
                    nn.Conv1d(inputs, outputs, kernel, stride),
                    nn.ReLU(),
                    nn.Conv1d(outputs, 2 * outputs, 1),
                    nn.GLU(dim=1),
                )
            )
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
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                    scale = (module.weight.std() / rescale).sqrt()
                    module.weight.div_(scale)
                    module.bias.div_(scale)

    def enhance(self, wavs, lengths):
        """See ``WaveformEnhancer``."""
        level = _level(wavs, lengths)
        x = (wavs / level)[:, None]  # [B, C, T]
        skips, sizes = [], [(lengths, wavs.shape[1])]
        for encode in self.encoder:
            lengths = self._frames(lengths)
            size = (self._frames(x.shape[2]) - 1) * self.stride + self.kernel
            x = self._cut(encode(F.pad(x, (0, size - x.shape[2]))), lengths)
            skips.append(x)
            sizes.append((lengths, x.shape[2]))
        # SpeechBrain packs by relative lengths, truncating: half a frame more is safe.
        relative = (lengths.clamp(min=1) + 0.5) / x.shape[2]
        x = self.join(self.lstm(x.transpose(1, 2), lengths=relative)[0]).transpose(1, 2)
        for before, up, after in self.decoder:
            lengths, _ = sizes.pop()
            x = up(self._cut(before(x + skips.pop()), lengths))
            x = after(x[..., : sizes[-1][1]])
        return x[:, 0] * level

    def _frames(self, lengths):
        """Frames that cover ``lengths`` samples (int or tensor): at least one, if any."""
        if not isinstance(lengths, torch.Tensor):
            return (max(lengths - self.kernel, 0) + self.stride - 1) // self.stride + 1
        frames = (lengths - self.kernel + self.stride - 1).div(self.stride, rounding_mode="floor")
        return (frames.clamp(min=0) + 1) * (lengths > 0)

    @staticmethod
    def _cut(x, lengths):
        """Set x [B, C, N] to zero from lengths [B] on."""
        return x.masked_fill(~_valid(lengths, x.shape[2])[:, None], 0.0)


class SpeechBrainEnhancer(WaveformEnhancer):
    """Any enhancement model in SpeechBrain's pretrained format, ready to be fine-tuned.

    The folder's ``hyperparams.yaml`` decides which SpeechBrain interface runs it:
    ``SepformerSeparation`` where it has the modules encoder, masknet and decoder (one
    source), ``SpectralMaskEnhancement`` where it has ``enhance_model`` and
    ``compute_stft``, ``spectral_magnitude`` and ``resynth``, ``WaveformEnhancement``
    where it has ``enhance_model`` alone. Loading that file runs the code it names, as
    always with SpeechBrain: use sources you trust.

    These models know no lengths, or use them inexactly, so items of unequal length
    are run one after the other; items of equal length run together. Models of another
    rate are resampled to and from. Resynthesis does not normalise by the peak. How the
    output scales with the input is up to the model.

    Arguments
    ---------
    source : str or Path
        A hub name (``speechbrain/metricgan-plus-voicebank``) or a local folder.
    savedir : str or Path, optional
        Where downloads are linked to (default: the hub's cache alone).
    hparams_file : str
        Name of the YAML file in ``source``.
    pretrained : bool
        Whether to load the source's weights (default True); without, the weights are
        those the YAML file initialises.

    Raises
    ------
    UserError
        Where the source cannot be had or is no enhancement model.
    """

    MIN_SAMPLES = 2048  # shorter inputs are padded up to it: SpeechBrain's parts need a few frames

    def __init__(self, source, savedir=None, hparams_file="hyperparams.yaml", pretrained=True):
        source, savedir = str(source), savedir and str(savedir)
        super().__init__(
            source=source, savedir=savedir, hparams_file=hparams_file, pretrained=pretrained
        )
        if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
            raise UserError(
                f"There is no folder {source}: give a local folder with {hparams_file} and the "
                "weights it names, or a hub name such as speechbrain/metricgan-plus-voicebank."
            )
        try:
            path = fetch(hparams_file, source, savedir=savedir)
            self.hparams_text = Path(path).read_text(encoding="utf-8")
            with open(path, encoding="utf-8") as stream:
                hparams = load_hyperpyyaml(stream)
            if pretrained and "pretrainer" in hparams:
                hparams["pretrainer"].set_collect_in(savedir)
                hparams["pretrainer"].collect_files(default_source=source)
                hparams["pretrainer"].load_collected()
        except Exception as error:  # whatever the hub, the YAML or the classes in it raise
            raise UserError(
                f"Cannot load the SpeechBrain model {source}: {type(error).__name__}: {error}. "
                f"Without network, give a local folder with {hparams_file} and its weights."
            ) from error
        interface = self._interface(hparams, f"{source}/{hparams_file}")
        if (
            "resynth" in hparams
            and "normalize_wavs" in inspect.signature(hparams["resynth"]).parameters
        ):
            hparams["resynth"] = functools.partial(hparams["resynth"], normalize_wavs=False)
        self.rate = self._rate(hparams)
        self.interface = interface(
            modules=hparams["modules"],
            hparams=hparams,
            run_opts={"device": "cpu"},
            freeze_params=False,
        )
        self._takes_lengths = "enhance_model" in hparams["modules"] and lengths_arg_exists(
            hparams["modules"]["enhance_model"].forward
        )

    @staticmethod
    def _interface(hparams, where):
        modules = hparams.get("modules") or {}
        if {"encoder", "masknet", "decoder"} <= modules.keys():
            if hparams.get("num_spks", 1) != 1:
                raise UserError(
                    f"{where} separates {hparams['num_spks']} speakers: an enhancer needs a model "
                    "with one source (num_spks: 1)."
                )
            hparams.setdefault("num_spks", 1)
            return SepformerSeparation
        if "enhance_model" in modules:
            if set(SpectralMaskEnhancement.HPARAMS_NEEDED) <= hparams.keys():
                return SpectralMaskEnhancement
            return WaveformEnhancement
        raise UserError(
            f"{where} is no enhancement model known here: its modules are "
            f"{', '.join(modules) or 'none'}; needed are enhance_model, or encoder, masknet and "
            "decoder."
        )

    @staticmethod
    def _rate(hparams):
        stft = hparams.get("compute_stft")
        return int(hparams.get("sample_rate") or getattr(stft, "sample_rate", SAMPLE_RATE))

    def extra_files(self):
        """See ``WaveformEnhancer``: the YAML file travels along, the source is not needed again."""
        return {SPEECHBRAIN_FILE: self.hparams_text}

    @classmethod
    def rebuild(cls, folder, arguments, trust):
        """See ``WaveformEnhancer``."""
        if not trust:
            raise UserError(
                f"The model in {folder} is a SpeechBrain model: loading runs the code that its "
                f"{SPEECHBRAIN_FILE} names. Pass trust=True (--trust) if you trust it."
            )
        return cls(folder, hparams_file=SPEECHBRAIN_FILE, pretrained=False)

    def enhance(self, wavs, lengths):
        """See ``WaveformEnhancer``."""
        self.interface.device = str(wavs.device)  # SpeechBrain moves its input there
        enhanced = torch.zeros_like(wavs)
        for length in lengths.unique().tolist():
            if length:
                rows = (lengths == length).nonzero()[:, 0]
                enhanced = enhanced.index_put(
                    (rows,), F.pad(self._equal(wavs[rows, :length]), (0, wavs.shape[1] - length))
                )
        return enhanced

    def _equal(self, wavs):
        """Enhance wavs [B, T] that are all valid."""
        time = wavs.shape[1]
        wavs = F.pad(wavs, (0, max(0, self.MIN_SAMPLES - time)))
        wavs = resample(wavs, SAMPLE_RATE, self.rate)
        out = self._run(wavs)
        if out.shape[1] < wavs.shape[1]:  # e.g. EnhanceResnet drops the last, incomplete frame
            out = self._run(F.pad(wavs, (0, wavs.shape[1] - out.shape[1])))
        out = resample(out, self.rate, SAMPLE_RATE)[:, :time]
        return F.pad(out, (0, time - out.shape[1]))

    def _run(self, wavs):
        if isinstance(self.interface, SepformerSeparation):
            return self.interface.separate_batch(wavs)[..., 0]
        whole = torch.ones(len(wavs), device=wavs.device) if self._takes_lengths else None
        return self.interface.enhance_batch(wavs, lengths=whole)


def config_text(enhancer, config=None):
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


def save_enhancer(folder, enhancer, config=None):
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


def load_enhancer(folder, trust=False):
    """Build the enhancer that ``save_enhancer`` wrote, in eval mode, on the CPU.

    The config is read as plain YAML: nothing in it is executed.

    Arguments
    ---------
    folder : str or Path
        With ``enhancer.yaml`` and ``enhancer.safetensors``.
    trust : bool
        Whether code that the folder names may be run (default False): a class that
        is not registered is imported, a SpeechBrain model's YAML file is executed.

    Raises
    ------
    UserError
        Where a file is missing or unreadable, the class is unknown, an argument
        is wrong, or the weights do not fit.
    """
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
    cls = _REGISTRY.get(name) or (trust and _import_class(name, path))
    if not cls:
        raise UserError(
            f"{path} names the class {name}, which is not an enhancer known here (known: "
            f"{', '.join(sorted(_REGISTRY))}). Import the module that defines it first, or pass "
            "trust=True if you trust the file."
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


def load_weights(enhancer, source):
    """Load weights into an enhancer in place, e.g. to start fine-tuning from them.

    Arguments
    ---------
    enhancer : torch.nn.Module
        The model; every key and shape must fit.
    source : str or Path or None
        A folder with ``enhancer.safetensors``, or a ``.safetensors`` file. None
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
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"No weights at {path}: give a folder with {WEIGHTS_FILE}, or such a file.")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
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
