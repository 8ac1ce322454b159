"""Frozen, differentiable, padding-exact speech encoders.

SpeechBrain's wrappers of the same models are not used: a frozen one runs under ``no_grad`` (no
gradient for the enhancer), and all of them let padding into the representation of an utterance.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from pi_finetune.errors import UserError
from pi_finetune.files import replacing_files
from pi_finetune.lengths import Waveforms, content_frames, length_mask, on_device, zero_beyond
from pi_finetune.run_folder import weights_digest

__all__ = [
    "CNN",
    "FAMILIES",
    "SAMPLE_RATE",
    "Teacher",
    "quiet_transformers",
    "save_random_hubert",
    "standardised",
]

SAMPLE_RATE = 16000

# Peaks below this (-100 dBFS, under the resolution of 16-bit audio) are digital silence.
SILENCE = 1e-5

CONV_FAMILIES = ("hubert", "wavlm", "wav2vec2", "data2vec-audio")
FAMILIES = (*CONV_FAMILIES, "whisper")

#: The layer before all others: what the convolutions made, before anything tells the position.
CNN = "cnn"


class Teacher(nn.Module):
    """A frozen self-supervised (or Whisper) encoder as a differentiable feature extractor.

    Gradient flows to the waveforms and never to the weights. The encoder is always in eval mode
    and is deliberately not a submodule: it is in neither ``parameters()`` nor ``state_dict()``,
    so no optimiser updates it and no checkpoint carries it, while ``to(device)`` moves it.

    What an item becomes does not depend on what it is batched with, nor on what lies beyond its
    length: waveform statistics, group norms, attention, positional convolutions and Whisper's
    dynamic-range clamp see the valid part of each item only.

    Where :class:`~pi_finetune.lengths.Waveforms` say that only a part is content (zero padding put
    the rest around it), the frames of the content are returned. Attention and positional
    convolutions hear everything; the convolutional front end makes of the content what it would
    make of it alone: waveform statistics and group norms are taken over the content, and zeros
    around it stay zeros. So nothing but the position differs. ``padding_counts`` takes the
    statistics over everything instead.

    Layer 0 is what enters the first transformer layer, layer k what leaves layer k. The last one
    includes the final layer norm of those architectures that have one, i.e. it is
    ``last_hidden_state``. Layer ``cnn`` is what the convolutional front end makes, projected to D
    frame by frame, before anything tells the position: the input of the positional convolution,
    or with Whisper the output of its convolutions, before the positional embedding.

    Silence: frames that see only samples below 1e-5 (-100 dBFS) pass no gradient. The layer norms
    of the convolutional front end would multiply it by 316 each, which is 1e24 in the end.

    Arguments
    ---------
    source : str
        A folder holding ``config.json`` and weights as ``transformers`` saves them, or the name
        of a model on the hub. Families: HuBERT, WavLM, wav2vec 2.0, data2vec-audio, Whisper (its
        encoder). Weights are used in float32 whatever they are stored in.
    layers : int or "cnn", or a list of these
        The layer to return, or layers to average; negative counts from the end. Default -1.
    revision : str, optional
        Branch, tag or commit, for a hub name.
    cache_dir : str, optional
        Where files from the hub are kept; default: that of ``huggingface_hub``.

    Attributes
    ----------
    hop, receptive_field : int
        Samples between frames, and samples seen by the convolutions for one frame.
    num_layers, dim : int
        Number of transformer layers and width of the representation.
    layer_names : tuple
        All layers: ``"cnn"``, and 0 to ``num_layers``.
    family : str
        ``model_type`` of the checkpoint.
    max_length : int or None
        Longest utterance in samples; None if unlimited (Whisper: 30 s).
    hears_level : bool
        Whether a scaled waveform becomes something else; not where it is standardised first.

    Raises
    ------
    UserError
        If ``source`` cannot be loaded or ``layers`` does not exist; in use, if an utterance is
        shorter than the receptive field or longer than ``max_length``.

    Notes
    -----
    Whether the waveform is normalised to zero mean and unit variance is read from the
    checkpoint's ``preprocessor_config.json`` (``do_normalize``); where the file or the key is
    absent it is, which is the default of ``transformers.Wav2Vec2FeatureExtractor``.

    Whisper sees each utterance followed by silence, as in its training, but only the frames of
    the utterance itself are encoded, not 30 s of them: frames of padding are not attended to.

    Example
    -------
    >>> teacher = Teacher("facebook/hubert-base-ls960", layers=9)  # doctest: +SKIP
    >>> reps, frame_lengths = teacher(wavs, lengths)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str,
        layers: int | str | Sequence[int | str] = -1,
        revision: str | None = None,
        cache_dir: str | None = None,
    ):
        super().__init__()
        self.source = str(source)
        model, preprocessor = _load(self.source, revision, cache_dir)
        config = model.config
        self.family = config.model_type
        rate = preprocessor.get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UserError(
                f"teacher '{self.source}' works at {rate} Hz; only {SAMPLE_RATE} Hz is supported"
            )

        if self.family == "whisper":
            model = model.get_encoder()
            self.num_layers, self.dim = config.encoder_layers, config.d_model
            self._mel = _LogMel(config.num_mel_bins)
            # Two convolutions of 3 mel frames around each output frame, whose stride is 2.
            self.hop = 2 * self._mel.HOP
            self.receptive_field = 4 * self._mel.HOP + self._mel.WINDOW
            self.max_length = config.max_source_positions * self.hop
            self.hears_level = True
        else:
            self.num_layers, self.dim = config.num_hidden_layers, config.hidden_size
            self.normalize = bool(preprocessor.get("do_normalize", True))
            self.hop, self.receptive_field = 1, 1
            for kernel, stride in zip(config.conv_kernel, config.conv_stride):
                self.receptive_field += (kernel - 1) * self.hop
                self.hop *= stride
            self.max_length = None
            self.hears_level = not self.normalize

        model.requires_grad_(False).eval()
        self._encoder = (model,)  # a tuple hides it from nn.Module
        self.layer_names: tuple[int | str, ...] = (CNN, *range(self.num_layers + 1))
        self.layers = [self._layer_index(k) for k in _as_list(layers)]

    @property
    def encoder(self) -> Any:
        """The ``transformers`` model."""
        return self._encoder[0]

    def _apply(self, fn, recurse=True):
        # to(), cuda(), double(): all of them arrive here.
        self.encoder._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"source={self.source!r}, family={self.family!r}, layers={self.layers}"

    def _layer_index(self, layer: int | str) -> int | str:
        if isinstance(layer, str):
            return layer
        if not -self.num_layers - 1 <= layer <= self.num_layers:
            raise UserError(
                f"teacher '{self.source}' has {self.num_layers} layers, asked for layer {layer}: "
                f"choose 0 (input of the first) to {self.num_layers}, -1 to "
                f"{-self.num_layers - 1} from the end, or '{CNN}'"
            )
        return layer % (self.num_layers + 1)

    def digest(self) -> str:
        """A short digest of all that decides what a waveform becomes: weights, layers, config."""
        config = self.encoder.config.to_dict()
        # Where it was loaded from, and by which version.
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        described = [config, self.layers, self.hears_level]
        return weights_digest(described, self.encoder.state_dict())

    def frames(self, lengths: Tensor) -> Tensor:
        """Number of frames [B] (int64) of utterances of ``lengths`` [B] samples."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        if self.family == "whisper":
            return lengths.div(self.hop, rounding_mode="floor")
        frames = (lengths - self.receptive_field).div(self.hop, rounding_mode="floor") + 1
        return frames.clamp(min=0)

    def forward(self, wavs: Tensor | Waveforms, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Representation of the chosen layer, or mean of the chosen layers.

        Arguments
        ---------
        wavs : Waveforms or Tensor
            [B, T], 16 kHz, in [-1, 1].
        lengths : Tensor or list, optional
            [B], in samples; of a tensor. Default: all T.

        Returns
        -------
        tuple of Tensor
            Representations [B, F, D] of the content in float32, zero beyond the frame lengths, and
            the frame lengths [B], int64 on the CPU. F is the number of frames of the longest item.
        """
        waveforms = self._checked(wavs, lengths)
        states = self._run(waveforms, self.layers)
        reps = states[0] if len(states) == 1 else torch.stack(states).mean(0)
        frame_lengths = self.frames(waveforms.content_lengths)
        return content_frames(reps.float(), waveforms, self.hop, frame_lengths), frame_lengths

    def hidden_states(
        self,
        wavs: Tensor | Waveforms,
        lengths: Any = None,
        layers: Sequence[int | str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Many layers at once: [L, B, F, D], and the frame lengths [B]; otherwise as ``forward``.

        ``layers`` are names from ``layer_names``; default: all transformer layers, 0 first.
        """
        waveforms = self._checked(wavs, lengths)
        states = self._run(waveforms, range(self.num_layers + 1) if layers is None else layers)
        frame_lengths = self.frames(waveforms.content_lengths)
        contents = [content_frames(x.float(), waveforms, self.hop, frame_lengths) for x in states]
        return torch.stack(contents), frame_lengths

    def _run(self, wavs: Waveforms, layers: Sequence[int | str]) -> list[Tensor]:
        """Those of the hidden states, [B, F, D] each, of all that is heard."""
        frame_lengths = self.frames(wavs.lengths)
        longest = int(frame_lengths.max())
        padded = bool((frame_lengths != longest).any())
        mask = length_mask(frame_lengths, longest, wavs.data.device) if padded else None
        whisper = self.family == "whisper"
        states: dict[int | str, Tensor] = {}
        states[CNN] = self._whisper_features(wavs) if whisper else self._conv_input(wavs, mask)
        last = max((k for k in layers if isinstance(k, int)), default=-1)
        if last >= 0:
            states[0] = self._with_position(states[CNN], mask)
            states.update(enumerate(self._transformer(states[0], mask, last), start=1))
        return [states[k] for k in layers]

    def _checked(self, wavs: Tensor | Waveforms, lengths: Any) -> Waveforms:
        """The waveforms, cut to the longest and zero beyond each length."""
        waveforms = Waveforms.of(wavs, lengths)
        shortest, longest = int(waveforms.content_lengths.min()), int(waveforms.lengths.max())
        if shortest < self.receptive_field:
            raise UserError(
                f"an utterance of {shortest} samples is shorter than the receptive field of "
                f"teacher '{self.source}', {self.receptive_field} samples: leave such files out"
            )
        if self.max_length is not None and longest > self.max_length:
            raise UserError(
                f"an utterance of {longest} samples ({longest / SAMPLE_RATE:.1f} s) is longer than "
                f"teacher '{self.source}' can take, {self.max_length} samples "
                f"({self.max_length / SAMPLE_RATE:g} s): crop it or choose another teacher"
            )
        if bool((waveforms.content_start % self.hop).any()):
            raise ValueError(
                f"the content must begin after whole hops of {self.hop} samples, where the frame "
                f"grid stays: it begins at {waveforms.content_start.tolist()}"
            )
        data = waveforms.data[:, :longest].float()
        return waveforms.with_data(zero_beyond(data, waveforms.lengths))

    # -- what enters the first transformer layer ---------------------------------------------

    def _conv_input(self, wavs: Waveforms, mask: Tensor | None) -> Tensor:
        """Waveform [B, T] to projected features [B, F, D] of HuBERT and its relatives."""
        x = self.encoder.feature_projection(self._conv_features(wavs))
        x = x[0] if isinstance(x, tuple) else x
        return x if mask is None else x * mask[..., None]

    def _with_position(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, F, D] to layer 0."""
        model = self.encoder
        if self.family == "whisper":
            return x + model.embed_positions.weight[: x.shape[1]]
        x = x + _positional_convolution(model.encoder.pos_conv_embed, x, mask)
        return x if self._pre_norm else model.encoder.layer_norm(x)

    def _conv_features(self, wavs: Waveforms) -> Tensor:
        data, lengths = wavs.data, wavs.lengths
        # What counts in statistics: the first sample or frame of each item, and how many.
        start, counts = torch.zeros_like(lengths), lengths
        if not wavs.padding_counts:
            start, counts = wavs.content_start, wavs.content_lengths
        peaks = data.detach().abs()[:, None]
        with torch.autocast(data.device.type, enabled=False):
            # A silent item has no representation worth a gradient, and a huge one (see above).
            silent = peaks.amax(dim=(1, 2)) < SILENCE
            data = torch.where(silent[:, None], data.detach(), data)
            x = (standardised(wavs.with_data(data)) if self.normalize else data)[:, None]
        for layer in self.encoder.feature_extractor.conv_layers:
            kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            x = layer.conv(x)
            start = start // stride  # whole hops are whole strides
            lengths, counts = ((n - kernel) // stride + 1 for n in (lengths, counts))
            peaks = F.max_pool1d(peaks, kernel, stride)
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                spans = zip(lengths.tolist(), start.tolist(), counts.tolist())
                x = _group_norm(norm, x, list(spans))
            elif norm is not None:
                x = norm(x.transpose(1, 2)).transpose(1, 2)
                if x.requires_grad:
                    x.register_hook(
                        lambda grad, silent=peaks < SILENCE: grad.masked_fill(silent, 0)
                    )
            x = layer.activation(x)
        return x.transpose(1, 2)

    def _whisper_features(self, wavs: Waveforms) -> Tensor:
        """Waveform [B, T] to the output [B, F, D] of Whisper's convolutions."""
        heard = self._whisper_convolutions(wavs.data)
        if wavs.content is None or wavs.padding_counts:
            return heard
        # Convolutions reach a frame beyond the content, and its spectrogram half a window: the
        # content's frames are those it has by itself, those around it what is heard there.
        alone = self._whisper_convolutions(wavs.contents().data)
        first = (wavs.content_start // self.hop).tolist()
        counts = self.frames(wavs.content_lengths).tolist()
        rows = zip(heard, alone, first, counts)
        return torch.stack([torch.cat([x[:s], y[:n], x[s + n :]]) for x, y, s, n in rows])

    def _whisper_convolutions(self, wavs: Tensor) -> Tensor:
        model = self.encoder
        frames = wavs.shape[1] // self.hop
        with torch.autocast(wavs.device.type, enabled=False):
            mel = self._mel(wavs, self.max_length)
        # Frame F - 1 sees mel frames up to 2 F; the convolutions' own padding comes after them.
        x = F.gelu(model.conv1(mel))
        return F.gelu(model.conv2(x))[..., :frames].transpose(1, 2)

    # -- the transformer layers -----------------------------------------------------------------

    @property
    def _pre_norm(self) -> bool:
        return self.family == "whisper" or getattr(self.encoder.config, "do_stable_layer_norm", 0)

    def _transformer(self, x: Tensor, mask: Tensor | None, last: int) -> list[Tensor]:
        """Outputs of layers 1 to ``last``; ``mask`` [B, F] is True at valid frames."""
        body = self.encoder if self.family == "whisper" else self.encoder.encoder
        options = {}
        if self.family == "wavlm":  # masks keys itself, and its first layer makes the bias
            options = {"position_bias": None}
        elif mask is not None:
            mask = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        outputs = []
        for layer in body.layers[:last]:
            x = layer(x, attention_mask=mask, **options)
            if self.family == "wavlm":
                x, options["position_bias"] = x
            elif isinstance(x, tuple):
                x = x[0]
            outputs.append(x)
        if self._pre_norm and last == self.num_layers:
            outputs[-1] = body.layer_norm(outputs[-1])
        return outputs


class _LogMel(nn.Module):
    """Whisper's log-mel spectrogram, differentiable, each item clamped by its own maximum.

    The values are those of ``transformers.WhisperFeatureExtractor`` on the item padded with zeros
    to 30 s: log10 of mel power, not below 8 under the maximum, then (x + 4) / 4.
    """

    HOP = 160
    WINDOW = 400
    mel: Tensor
    window: Tensor

    def __init__(self, num_mel_bins: int):
        super().__init__()
        bank = mel_filter_bank(
            num_frequency_bins=1 + self.WINDOW // 2,
            num_mel_filters=num_mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        mel = torch.from_numpy(bank.T.copy()).float()
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)

    def forward(self, wavs: Tensor, max_length: int) -> Tensor:
        """[B, T], zero beyond each item, to [B, mel, N]; N goes at least a frame beyond T."""
        # Zeros follow, as many as a window: torch.stft's reflection at the end mirrors them.
        # At the full 30 s there is no room, and the extractor reflects speech as well.
        wavs = F.pad(wavs, (0, min(self.WINDOW, max_length - wavs.shape[1])))
        spectrum = torch.stft(wavs, self.WINDOW, self.HOP, window=self.window, return_complex=True)
        spectrum = spectrum[..., : max_length // self.HOP]
        power = spectrum.real.square() + spectrum.imag.square()
        log = (self.mel @ power).clamp(min=1e-10).log10()
        peak = log.amax(dim=(1, 2), keepdim=True)  # never in the padding: zeros are the minimum
        return (torch.maximum(log, peak - 8.0) + 4.0) / 4.0


def standardised(wavs: Waveforms) -> Tensor:
    """Waveforms [B, T] at zero mean and unit variance over each item's content, zero beyond.

    The values are those of ``transformers.Wav2Vec2FeatureExtractor`` with ``do_normalize``. What
    lies around the content is scaled with it and not shifted: zeros stay zeros.
    """
    data = zero_beyond(wavs.data, wavs.lengths)
    if wavs.content is None or wavs.padding_counts:
        n = wavs.device_lengths[:, None]
        centred = inner = zero_beyond(data - data.sum(1, keepdim=True) / n, wavs.lengths)
    else:
        start, counts = wavs.content
        inside = length_mask(counts, data.shape[1], data.device, start)
        n = on_device(counts, data.device)[:, None]
        inner = data.masked_fill(~inside, 0)
        centred = data - inside * (inner.sum(1, keepdim=True) / n)
        inner = centred.masked_fill(~inside, 0)
    variance = inner.square().sum(1, keepdim=True) / n
    return centred * (variance + 1e-7).rsqrt()


def _group_norm(norm: nn.GroupNorm, x: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
    """A group norm over time [B, C, N] whose statistics see a part of each item.

    ``spans`` are [B] times an item's number of frames, and the first and the number of those
    that count.
    """
    if all(span == (x.shape[-1], 0, x.shape[-1]) for span in spans):
        return norm(x)
    rows = []
    for item, (length, start, count) in zip(x.split(1), spans):
        if start == 0 and count == length:
            rows.append(F.pad(norm(item[..., :length]), (0, x.shape[-1] - length)))
        else:
            rows.append(_normalised_by(norm, item, item[..., start : start + count]))
    return torch.cat(rows)


def _normalised_by(norm: nn.GroupNorm, x: Tensor, part: Tensor) -> Tensor:
    """A group norm of ``x`` [1, C, N] by the statistics of ``part`` [1, C, M]."""
    groups = part.float().reshape(1, norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=-1, correction=0)
    repeats = x.shape[1] // norm.num_groups
    scale, mean = (
        each.repeat_interleave(repeats, dim=1)[..., None]
        for each in ((variance + norm.eps).rsqrt(), mean)
    )  # [1, C, 1]
    x = (x.float() - mean) * scale
    return x if norm.weight is None else x * norm.weight[:, None] + norm.bias[:, None]


def _positional_convolution(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Positional embedding of ``x`` [B, F, D]; every convolution sees zeros beyond the item."""
    x = x.transpose(1, 2)
    keep = 1 if mask is None else mask[:, None]
    if hasattr(block, "layers"):  # data2vec: a stack, with a layer norm after each
        for layer in block.layers:
            x = layer(x) * keep
    else:
        if getattr(block, "batch_norm", None) is not None:
            x = block.batch_norm(x) * keep
        x = block.activation(block.padding(block.conv(x)))
    return x.transpose(1, 2)


def _as_list(layers: int | str | Sequence[int | str]) -> list[int | str]:
    chosen = [layers] if isinstance(layers, int | str) else list(layers)
    known = (k == CNN or (isinstance(k, int) and not isinstance(k, bool)) for k in chosen)
    if not chosen or not all(known):
        raise UserError(
            f"teacher layers must be an integer, '{CNN}', or a list of integers and '{CNN}', "
            f"got {layers!r}"
        )
    return chosen


@contextmanager
def quiet_transformers(bars: bool = False) -> Iterator[None]:
    """No warnings of ``transformers`` inside, and no progress bars unless ``bars``."""
    verbosity = transformers_logging.get_verbosity()
    hide = transformers_logging.is_progress_bar_enabled() and not bars
    transformers_logging.set_verbosity_error()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hide:
            transformers_logging.enable_progress_bar()


def save_random_hubert(folder: str | Path, seed: int = 0, **config: Any) -> None:
    """Save a HuBERT with random weights, for a run that tests everything but the results.

    Arguments
    ---------
    folder : str or Path
        Its files appear whole or not at all.
    seed : int
        Default: 0. The state of the generators is left as it was.
    **config
        Keys of ``transformers.HubertConfig``. Default: HuBERT Base.
    """
    with torch.random.fork_rng(devices=[]), replacing_files(folder) as temporary:
        torch.manual_seed(seed)
        HubertModel(HubertConfig(**config)).save_pretrained(temporary)
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(temporary)


def _load(source: str, revision: str | None, cache_dir: str | None) -> tuple[Any, dict]:
    """The model in float32 and the contents of its preprocessor_config.json ({} if absent)."""
    folder = Path(source).expanduser()
    local = folder.is_dir()
    if local:
        _check_folder(folder)
        source = str(folder)
    elif source.startswith((".", "~", os.sep)) or source.count("/") > 1 or folder.exists():
        raise UserError(f"teacher folder '{source}' does not exist (or is not a folder)")

    hub = {"revision": revision, "cache_dir": cache_dir}
    try:
        with quiet_transformers(bars=not local):  # downloads show; what matters is checked below
            config = AutoConfig.from_pretrained(source, **hub)
            family = config.model_type
            if family not in FAMILIES:
                raise UserError(
                    f"teacher '{source}' is a '{family}' model; supported: {', '.join(FAMILIES)}"
                )
            model, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager" if family == "wavlm" else "sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                **hub,
            )
            found = cached_file(
                source,
                "preprocessor_config.json",
                _raise_exceptions_for_missing_entries=False,
                **hub,
            )
            preprocessor = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ...
        hint = (
            "is it damaged?"
            if local
            else (
                "it is neither a folder here nor a model that can be had from the hub. Check the "
                "name; without a network, name a local folder or a model already in the cache"
            )
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"teacher '{source}' cannot be loaded: {hint} ({reason})") from error

    # masked_spec_embed belongs to pre-training alone and is often left out.
    missing = [k for k in report["missing_keys"] if not k.endswith("masked_spec_embed")]
    unfit = sorted({*missing, *(entry[0] for entry in report["mismatched_keys"])})
    if unfit:
        raise UserError(
            f"the weights of teacher '{source}' do not fit its config.json: {len(unfit)} tensors "
            f"are missing or of another shape, first '{unfit[0]}'"
        )
    return model, preprocessor


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"teacher folder '{folder}' has no config.json: save the model with save_pretrained"
        )
    weights = ("model.safetensors", "pytorch_model.bin")
    if not any(
        (folder / f"{name}{tail}").is_file() for name in weights for tail in ("", ".index.json")
    ):
        raise UserError(
            f"teacher folder '{folder}' has no weights (model.safetensors or pytorch_model.bin): "
            "save the model with save_pretrained"
        )
