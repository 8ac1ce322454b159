"""An enhancer as an ONNX graph and as a ``torch.export`` program."""

import copy
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from speechbrain.processing.features import ISTFT, STFT
from torch import nn

from pi_finetune.enhancers import (
    SpeechBrainEnhancer,
)
from pi_finetune.errors import UserError, optional
from pi_finetune.files import replacing

if TYPE_CHECKING:
    from pi_finetune.enhancers.base import WaveformEnhancer

__all__ = ["export_program", "write_onnx"]


class _Transform(nn.Module):
    """SpeechBrain's STFT as a convolution with the windowed Fourier basis.

    The exporters know ``torch.stft`` for one length only, and ``torch.istft`` not at all.

    Arguments
    ---------
    stft : speechbrain.processing.features.STFT or ISTFT
        Centred, padded by zeros, with a window as long as the transform.
    """

    window: torch.Tensor
    basis: torch.Tensor

    def __init__(self, stft):
        super().__init__()
        size, window = stft.n_fft, stft.window.double()
        if not stft.center or len(window) != size or size % 2:
            raise UserError("Only centred STFTs with a window of n_fft samples can be exported.")
        self.middle, self.hop = size // 2, stft.hop_length
        time = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi / size * torch.arange(self.middle + 1)[:, None] * time
        basis = torch.cat([angle.cos(), -angle.sin()]) * window  # [2 bins, n_fft]
        self.register_buffer("window", window.float()[None, None])
        self.register_buffer("basis", basis.float()[:, None])

    def forward(self, wavs):
        """Spectra [B, N, bins, 2] of wavs [B, T]."""
        frames = F.conv1d(
            F.pad(wavs, (self.middle, self.middle))[:, None], self.basis, stride=self.hop
        )
        return frames.unflatten(1, (2, -1)).permute(0, 3, 2, 1)


class _Inverse(_Transform):
    """SpeechBrain's ISTFT as a transposed convolution; see :class:`_Transform`."""

    def __init__(self, stft):
        super().__init__(stft)
        twice = torch.full((self.middle + 1, 1, 1), 2.0)
        twice[0] = twice[-1] = 1.0
        self.basis *= torch.cat([twice, twice]) / (2 * self.middle)

    def forward(self, spectra, sig_length):  # type: ignore[override]
        """Waveforms [B, sig_length] of spectra [B, N, bins, 2]."""
        frames = spectra.permute(0, 3, 2, 1).flatten(1, 2)
        wavs = F.conv_transpose1d(frames, self.basis, stride=self.hop)
        ones = torch.ones_like(frames[:1, :1])
        weight = F.conv_transpose1d(ones, self.window.square(), stride=self.hop)
        return (wavs / weight.clamp(min=1e-11))[:, 0, self.middle : self.middle + sig_length]


class _Exportable(nn.Module):
    """``wavs [B, T] -> [B, T]``, all of them T samples long, in operations that can be exported."""

    SUBSTITUTES = ((ISTFT, _Inverse), (STFT, _Transform))

    def __init__(self, enhancer):
        super().__init__()
        self.enhancer = copy.deepcopy(enhancer).eval()
        for parent in list(self.enhancer.modules()):
            for name, child in list(parent.named_children()):
                for theirs, ours in self.SUBSTITUTES:
                    if type(child) is theirs:
                        setattr(parent, name, ours(child))

    def forward(self, wavs):
        lengths = torch.full((wavs.shape[0],), wavs.shape[1], device=wavs.device)
        return self.enhancer.enhance(wavs, lengths)


def export_program(enhancer: "WaveformEnhancer") -> torch.export.ExportedProgram:
    """Trace an enhancer for any batch size and length, and check the result at another length.

    ``MaskEnhancer`` and ``ConvTasNet`` can be traced; ``UNetEnhancer`` cannot, since PyTorch fixes
    the number of steps of its LSTM, nor can ``SpeechBrainEnhancer``.

    Arguments
    ---------
    enhancer : WaveformEnhancer

    Returns
    -------
    torch.export.ExportedProgram
        ``program.module()(wavs [B, T]) -> [B, T]``; every row is T samples long.

    Raises
    ------
    UserError
        The model cannot be traced.
    """
    if isinstance(enhancer, SpeechBrainEnhancer):
        raise UserError(
            "--format onnx and torch: not possible for models in SpeechBrain's format, whose "
            "interface is no traceable module."
        )
    dynamic = {"wavs": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    rows = [
        0.1 * torch.randn(1, n, generator=torch.Generator().manual_seed(0)) for n in (16000, 10007)
    ]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            example = (rows[0].expand(2, -1).clone(),)
            program = torch.export.export(_Exportable(enhancer), example, dynamic_shapes=dynamic)
            traced, expected = program.module()(rows[1]), enhancer(rows[1])
    except Exception as error:  # whatever the tracer raises on code it cannot follow
        raise UserError(
            f"--format onnx and torch: PyTorch cannot trace {type(enhancer).__name__} for any "
            f"length ({str(error).strip().splitlines()[0]})."
        ) from error
    torch.testing.assert_close(traced, expected, rtol=1e-3, atol=1e-5)
    return program


def write_onnx(path: str | Path, program: torch.export.ExportedProgram) -> None:
    """Write an ONNX graph with input ``noisy`` [B, T] and output ``enhanced`` [B, T].

    Arguments
    ---------
    path : str or Path
    program : torch.export.ExportedProgram
        From :func:`export_program`.

    Raises
    ------
    UserError
        A package is missing.
    """
    for package in ("onnx", "onnxscript"):
        optional(package, "onnx", "--format onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["noisy"], output_names=["enhanced"]
        )
    assert graph is not None  # as with dynamo=False
    with replacing(path) as temporary:
        graph.save(str(temporary))
