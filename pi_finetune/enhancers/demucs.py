"""Demucs, the waveform enhancer of facebookresearch/denoiser, to the number.

Source: Défossez, Synnaeve and Adi, "Real Time Speech Enhancement in the Waveform Domain",
Interspeech 2020 (arXiv 2006.12847). The code here is the project's own; its modules are named as in
the published checkpoints, so that these can be loaded.
"""

import math
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi_finetune.enhancers.base import WaveformEnhancer
from pi_finetune.errors import UserError
from pi_finetune.lengths import on_device, zero_beyond

__all__ = [
    "CHECKPOINTS",
    "Demucs",
    "Stream",
    "cut",
    "deviation",
    "downsample",
    "encoder_level",
    "half_sample_filter",
    "load_denoiser_checkpoint",
    "read_denoiser_checkpoint",
    "rescale_convolutions",
    "upsample",
]


#: The published causal checkpoints. They are under CC BY-NC 4.0: not for commercial use.
CHECKPOINTS = {
    name: f"https://dl.fbaipublicfiles.com/adiyoss/denoiser/{file}"
    for name, file in (
        ("dns48", "dns48-11decc9d8e3f0998.th"),
        ("dns64", "dns64-a7761ff99a7d5bb6.th"),
        ("master64", "master64-8a5dfb4bb92753dd.th"),
    )
}

#: Zero crossings of the resampling filter on either side.
_ZEROS = 56


def half_sample_filter(zeros: int = _ZEROS) -> Tensor:
    """Windowed sinc [1, 1, 2 zeros] that interpolates half-way between samples.

    sin(pi t) / (pi t) at t = -zeros + 1/2, ..., zeros - 1/2 times a Hann window over
    [-zeros, zeros] (Smith and Gossett, ICASSP 1984).
    """
    t = torch.arange(-zeros, zeros, dtype=torch.float64) + 0.5
    window = 0.5 + 0.5 * torch.cos(math.pi * t / zeros)
    return (torch.sinc(t) * window).float()[None, None]


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """[B, 1, T] at twice the rate, [B, 1, 2 T]: the samples, and those between them."""
    between = F.conv1d(x, kernel, padding=kernel.shape[-1] // 2)[..., 1:]
    return torch.stack([x, between], dim=-1).flatten(-2)


def downsample(x: Tensor, kernel: Tensor) -> Tensor:
    """[B, 1, T] at half the rate, [B, 1, ceil(T / 2)]."""
    x = F.pad(x, (0, x.shape[-1] % 2))
    even, odd = x[..., ::2], x[..., 1::2]
    return (even + F.conv1d(odd, kernel, padding=kernel.shape[-1] // 2)[..., :-1]) / 2


class Stream(NamedTuple):
    """Where the enhancement of a long recording is.

    Arguments
    ---------
    scale : Tensor
        [B, 1], standard deviation of each row over the whole recording.
    frame : int
        Frames of the LSTM that are behind.
    lstm : tuple of Tensor, optional
        Its state after them; None at the beginning.
    """

    scale: Tensor
    frame: int = 0
    lstm: tuple[Tensor, Tensor] | None = None


class Demucs(WaveformEnhancer):
    """Waveform U-Net with a causal LSTM, as published for denoising.

    Each of ``depth`` encoder levels is a strided convolution, ReLU, a 1x1 convolution and GLU; the
    decoder mirrors it with skip connections added; an LSTM joins them. Inside, the signal has
    ``resample`` times the rate. The waveform is divided by ``floor`` plus its standard deviation
    over the valid samples, and multiplied by the deviation again. An item is padded to the next
    length that the levels take whole, as in the original, whatever it is batched with.

    The defaults are those of the checkpoints ``dns64`` and ``master64``, 33.5 M parameters
    ("Demucs-64"); :func:`load_denoiser_checkpoint` loads them.

    Arguments
    ---------
    hidden : int
        Channels of the first level. Default: 64.
    depth : int
        Number of levels. Default: 5.
    kernel_size, stride : int
        Of the strided convolutions, in samples of their level; stride <= kernel_size.
        Default: 8 and 4.
    resample : int
        1, 2 or 4. Default: 4.
    growth : float
        Factor on the channels from level to level. Default: 2.
    max_hidden : int
        Bound on the channels. Default: 10000.
    lstm_layers : int
        Default: 2.
    floor : float
        Added to the standard deviation. Default: 0.001.
    rescale : float
        Reference standard deviation of the initial weights; 0 leaves them. Default: 0.1.
    """

    half_sample: Tensor

    def __init__(
        self,
        hidden: int = 64,
        depth: int = 5,
        kernel_size: int = 8,
        stride: int = 4,
        resample: int = 4,
        growth: float = 2,
        max_hidden: int = 10_000,
        lstm_layers: int = 2,
        floor: float = 1e-3,
        rescale: float = 0.1,
    ):
        super().__init__(
            hidden=hidden,
            depth=depth,
            kernel_size=kernel_size,
            stride=stride,
            resample=resample,
            growth=growth,
            max_hidden=max_hidden,
            lstm_layers=lstm_layers,
            floor=floor,
            rescale=rescale,
        )
        if resample not in (1, 2, 4):
            raise ValueError(f"resample: got {resample}, needed is 1, 2 or 4.")
        if not 0 < stride <= kernel_size or depth < 1 or hidden < 1:
            raise ValueError(
                f"needed are 0 < stride <= kernel_size, depth >= 1 and hidden >= 1; got stride "
                f"{stride}, kernel_size {kernel_size}, depth {depth}, hidden {hidden}."
            )
        self.depth, self.kernel_size, self.stride = depth, kernel_size, stride
        self.resample, self.floor = resample, floor
        # Frames of the LSTM begin at multiples of ``grid``; a sample is reached through the filters
        # and the levels from frames that begin this much before it, and these hear as much after.
        self.grid = max(1, stride**depth // resample)
        span = 1 + (kernel_size - 1) * sum(stride**level for level in range(depth))
        self.reach = -(-span // resample) + (_ZEROS + 1) * (resample.bit_length() - 1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        inputs, outputs = 1, hidden
        for level in range(depth):
            self.encoder.append(encoder_level(inputs, outputs, kernel_size, stride))
            decode = [
                nn.Conv1d(outputs, 2 * outputs, 1),
                nn.GLU(dim=1),
                nn.ConvTranspose1d(outputs, inputs, kernel_size, stride),
            ]
            self.decoder.insert(0, nn.Sequential(*decode, *([nn.ReLU()] if level else [])))
            inputs, outputs = outputs, min(int(growth * outputs), max_hidden)
        self.lstm = nn.ModuleDict({"lstm": nn.LSTM(inputs, inputs, lstm_layers)})
        self.register_buffer("half_sample", half_sample_filter(), persistent=False)
        if rescale:
            rescale_convolutions(self, rescale)

    def valid_length(self, length: int) -> int:
        """The least number of samples, ``length`` or more, that all levels take whole."""
        size = length * self.resample
        for _ in range(self.depth):
            size = max(1, -(-(size - self.kernel_size) // self.stride) + 1)
        for _ in range(self.depth):
            size = (size - 1) * self.stride + self.kernel_size
        return -(-size // self.resample)

    def enhance(self, wavs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See ``WaveformEnhancer``."""
        scale = deviation(wavs, lengths)
        sizes = torch.tensor([self.valid_length(n) for n in lengths.tolist()])
        x = (wavs / (self.floor + scale))[:, None]
        x = F.pad(x, (0, self.valid_length(wavs.shape[1]) - wavs.shape[1]))
        skips, sizes = self._encode(x, sizes)
        x = self.lstm["lstm"](skips[-1].permute(2, 0, 1))[0].permute(1, 2, 0)
        return scale * self._decode(x, skips, sizes)[:, 0, : wavs.shape[1]]

    @staticmethod
    def beginning(scale: Tensor) -> Stream:
        """The stream at the beginning of recordings with standard deviations ``scale`` [B, 1]."""
        return Stream(scale)

    def enhance_window(
        self, wavs: Tensor, origin: int, stream: Stream, resume_at: int
    ) -> tuple[Tensor, Stream]:
        """Enhance a window of a recording as if it were enhanced whole.

        The LSTM goes on from where ``stream`` stands, so a long recording can be enhanced in
        windows that overlap by ``2 * reach`` samples or more on either side: of the result, what
        is at least so far from a cut is exact.

        Arguments
        ---------
        wavs : Tensor
            [B, T], the recording from sample ``origin`` on; the last window ends where it ends.
        origin : int
            A multiple of ``grid``.
        stream : Stream
            ``Stream(scale)`` for the first window, then what the last call returned.
        resume_at : int
            Where the next window is to go on: a sample at least ``2 * reach`` before what is to be
            taken of it, and ``reach`` after its origin.

        Returns
        -------
        (Tensor, Stream)
            [B, T], exact from ``stream.frame * grid + 2 * reach`` on; in the first window from 0.
        """
        if origin % self.grid:
            raise ValueError(f"origin must be a multiple of {self.grid}, got {origin}")
        time = wavs.shape[1]
        x = (wavs / (self.floor + stream.scale))[:, None]
        x = F.pad(x, (0, self.valid_length(time) - time))
        skips, sizes = self._encode(x, torch.full((len(x),), x.shape[2]))
        frames = skips[-1].permute(2, 0, 1)
        first = stream.frame - origin // self.grid
        then = min(len(frames), max(first, resume_at // self.grid - origin // self.grid))
        lstm, state = self.lstm["lstm"], stream.lstm
        parts = [torch.zeros_like(frames[:first])]
        if then > first:
            part, state = lstm(frames[first:then], state)
            parts.append(part)
        if then < len(frames):
            parts.append(lstm(frames[then:], state)[0])
        enhanced = self._decode(torch.cat(parts).permute(1, 2, 0), skips, sizes)
        following = Stream(stream.scale, then + origin // self.grid, state)
        return stream.scale * enhanced[:, 0, :time], following

    def _encode(self, x: Tensor, sizes: Tensor) -> tuple[list[Tensor], Tensor]:
        """Outputs of the levels [B, C, N] of x [B, 1, T], zero beyond items, and items' frames."""
        for _ in range(self.resample.bit_length() - 1):
            sizes = 2 * sizes
            x = cut(upsample(x, self.half_sample.to(x.dtype)), sizes)
        skips = []
        for encode in self.encoder:
            sizes = (sizes - self.kernel_size).div(self.stride, rounding_mode="floor") + 1
            x = cut(encode(x), sizes)
            skips.append(x)
        return skips, sizes

    def _decode(self, x: Tensor, skips: list[Tensor], sizes: Tensor) -> Tensor:
        """Waveforms [B, 1, T] of what leaves the LSTM [B, C, N], ``sizes`` [B] frames of it."""
        for decode, skip in zip(self.decoder, reversed(skips)):
            assert isinstance(decode, nn.Sequential)
            # The bias of the narrow part is not to reach the frames of an item from beyond it.
            x = cut(decode[:2](x + skip[..., : x.shape[-1]]), sizes)
            x = decode[2:](x)
            sizes = (sizes - 1) * self.stride + self.kernel_size
            x = cut(x, sizes)
        for _ in range(self.resample.bit_length() - 1):
            sizes = (sizes + 1) // 2
            x = cut(downsample(x, self.half_sample.to(x.dtype)), sizes)
        return x


def deviation(wavs: Tensor, lengths: Tensor) -> Tensor:
    """Unbiased standard deviation [B, 1] of wavs [B, T], zero beyond lengths [B]."""
    count = on_device(lengths, wavs.device)[:, None]
    mean = wavs.sum(1, keepdim=True) / count.clamp(min=1)
    centred = zero_beyond(wavs - mean, lengths)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    silent = variance == 0  # the root has no gradient there
    return variance.masked_fill(silent, 1.0).sqrt().masked_fill(silent, 0.0)


def encoder_level(inputs: int, outputs: int, kernel_size: int, stride: int) -> nn.Sequential:
    """A level of the encoder: [B, ``inputs``, T] to [B, ``outputs``, N]."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel_size, stride),
        nn.ReLU(),
        nn.Conv1d(outputs, 2 * outputs, 1),
        nn.GLU(dim=1),
    )


@torch.no_grad()
def rescale_convolutions(model: nn.Module, reference: float) -> None:
    """Divide each convolution's weights and bias by sqrt(std(weight) / reference)."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            assert module.bias is not None
            scale = (module.weight.std() / reference).sqrt()
            module.weight.div_(scale)
            module.bias.div_(scale)


def cut(x: Tensor, sizes: Tensor) -> Tensor:
    """x [B, C, N], zero from sizes [B] on."""
    return zero_beyond(x.transpose(1, 2), sizes).transpose(1, 2)


def load_denoiser_checkpoint(source: str | Path) -> Demucs:
    """A :class:`Demucs` with the weights of a checkpoint of facebookresearch/denoiser.

    The published checkpoints are under **CC BY-NC 4.0**: they, and what is fine-tuned from them,
    are not for commercial use. Nothing in the file is executed (``weights_only=True``).

    Arguments
    ---------
    source : str or Path
        A file; or ``master64``, ``dns64``, ``dns48`` or a URL, which is downloaded once into the
        cache of ``torch.hub``.

    Returns
    -------
    Demucs
        In eval mode, on the CPU.

    Raises
    ------
    UserError
        The file cannot be had or read, or holds another architecture.
    """
    weights = read_denoiser_checkpoint(source)
    lstm = "lstm.lstm.weight_ih_l"
    try:
        hidden = len(weights["encoder.0.0.weight"])
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("encoder."))
        layers = sum(key.startswith(lstm) for key in weights)
        # Of a model without an internal rate no weight says so: the published ones resample by 4.
        model = Demucs(hidden=hidden, depth=depth, lstm_layers=layers)
        model.load_state_dict(weights)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        said = str(error).strip().replace("\n\t", " ")
        raise UserError(
            f"{source} is no checkpoint of the causal Demucs of facebookresearch/denoiser "
            f"({type(error).__name__}: {said[:200]}): give master64, dns64, dns48, or a file of "
            "that architecture."
        ) from error
    return model.eval()


def read_denoiser_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint; see :func:`load_denoiser_checkpoint`."""
    url = CHECKPOINTS.get(str(source), str(source))
    try:
        if url.startswith(("http://", "https://")):
            file = url.rsplit("/", 1)[1]
            package = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash="-" in file, weights_only=True
            )
        else:
            package = torch.load(url, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        known = ", ".join(sorted(CHECKPOINTS))
        raise UserError(
            f"There is no checkpoint {source}: give a file, a URL, or one of {known}."
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"The checkpoint {source} cannot be read: {reason}. Offline, download it elsewhere and "
            "give the file."
        ) from error
    # Training packages of denoiser keep the best model's weights under "state" or "best_state".
    for key in ("best_state", "state"):
        if isinstance(package, dict) and isinstance(package.get(key), dict):
            package = package[key]
    if not isinstance(package, dict) or not all(isinstance(v, Tensor) for v in package.values()):
        raise UserError(f"The checkpoint {source} holds no state dict of tensors.")
    return package
