"""Recognisers behind one interface, :class:`Recognizer`: ``recognizer(waveforms) -> list[str]``.

Texts are raw; :func:`pi_finetune.results.metrics.recognition_errors` normalises them.
What an utterance is batched with does not change its text. An utterance with a
non-finite sample (a diverged enhancer's) has the text "".

Those here are :class:`LikelyRecognizer`, which can say how likely the true transcripts are; nothing
is decoded for it. One of your own may come without; :func:`likelihoods` is the one place that
knows.
"""

import contextlib
import hashlib
import os
import string
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeGuard

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from speechbrain.decoders.ctc import ctc_greedy_decode
from torch import nn
from torchaudio.functional import melscale_fbanks
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from pi_finetune.config import PROJECT_ROOT
from pi_finetune.errors import UserError
from pi_finetune.files import json_number, replacing, write_text
from pi_finetune.lengths import Lengths, Waveforms, as_lengths, length_mask, on_device, shares
from pi_finetune.phonemes import inventory, phonemes
from pi_finetune.teacher import SAMPLE_RATE, Teacher

__all__ = [
    "CTCHead",
    "CTCRecognizer",
    "CharacterTokenizer",
    "LikelyRecognizer",
    "LogMel",
    "PhonemeTokenizer",
    "Recognizer",
    "WhisperRecognizer",
    "fingerprint",
    "gives_likelihood",
    "likelihoods",
    "load_recognizer",
    "save_recognizer",
]


CONFIG_FILE = "asr.yaml"
WEIGHTS_FILE = "asr.safetensors"
#: LibriSpeech's characters.
CHARACTERS = " '" + string.ascii_uppercase


class Recognizer(Protocol):
    """What the project asks of a recogniser.

    Attributes
    ----------
    name : str
        Under which its results are kept.
    unit : str
        What a text is made of: ``word``, or ``phoneme`` (separated by blanks).
    """

    name: str
    unit: str

    def __call__(self, wavs: Waveforms, /) -> list[str]:
        """Texts of the waveforms, B of them."""


class LikelyRecognizer(Recognizer, Protocol):
    """A recogniser that can say how likely a transcript is."""

    def nll(self, wavs: Waveforms, texts: Sequence[str], /) -> list[tuple[float | None, int]]:
        """Negative log-likelihood in nats of the true transcripts, and the tokens of each.

        Arguments
        ---------
        wavs : Waveforms
        texts : sequence of str
            True transcripts, B of them.

        Returns
        -------
        list of (float or None, int)
            None where there is none, as of a waveform with a non-finite sample.
        """


def load_recognizer(source: str | Path) -> "CTCRecognizer | WhisperRecognizer":
    """Load the recogniser that ``source`` names, whatever its kind.

    Arguments
    ---------
    source : str or Path
        A folder written by ``recipes/train_asr.py`` (it holds ``asr.yaml``), a
        folder with a Whisper model as ``transformers`` saves it, or the hub name of
        one.

    Returns
    -------
    CTCRecognizer or WhisperRecognizer

    Raises
    ------
    UserError
        The folder is missing or neither kind, its weights are missing or do not fit,
        or the hub cannot be asked.
    """
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return CTCRecognizer(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"recogniser folder '{source}' holds neither {CONFIG_FILE} (as recipes/train_asr.py "
            "writes it) nor config.json (a Whisper model of transformers): name another folder"
        )
    return WhisperRecognizer(str(source))


def likelihoods(
    recognizer: Recognizer | None, wavs: Waveforms, texts: Sequence[str | None]
) -> list[dict]:
    """Negative log-likelihood of the transcripts that are there, as fields of a score line.

    Arguments
    ---------
    recognizer : Recognizer or None
    wavs : Waveforms
    texts : sequence of (str or None)
        True transcripts, B of them; None where there is none.

    Returns
    -------
    list of dict
        ``{"nll": nats or None, "tokens": int}`` of each utterance; empty without a transcript, or
        from a recogniser that gives no likelihood.
    """
    fields: list[dict] = [{} for _ in texts]
    known = {i: text for i, text in enumerate(texts) if text is not None}
    if known and gives_likelihood(recognizer):
        # The same object, where it can be: a recogniser may still know what it has computed of it.
        heard = wavs if len(known) == len(texts) else wavs.taken(torch.tensor(list(known)))
        found = recognizer.nll(heard, list(known.values()))
        for i, (nll, tokens) in zip(known, found, strict=True):
            fields[i] = {"nll": nll, "tokens": tokens}
    return fields


def gives_likelihood(recognizer: Recognizer | None) -> TypeGuard[LikelyRecognizer]:
    """Whether a recogniser can say how likely a transcript is."""
    return hasattr(recognizer, "nll")


class _Latest:
    """What was computed last, for as long as the waveforms that it was computed of are the same.

    A text and a likelihood are mostly asked for of the same waveforms, one after the other, and
    the encoder is most of the work of the second.
    """

    def __init__(self):
        #: One tuple, so that threads see both or neither.
        self._kept: tuple[weakref.ref | None, Any] = None, None

    def of(self, wavs, compute):
        """``compute()``, or what it gave when it was called for this very object."""
        reference, value = self._kept
        if reference is None or reference() is not wavs:
            value = compute()
            self._kept = weakref.ref(wavs, self._forget), value
        return value

    def _forget(self, reference):
        if self._kept[0] is reference:
            self._kept = None, None


class WhisperRecognizer:
    """Whisper through ``transformers``: greedy, in float32, on the device of the waveforms.

    Up to 30 s are decoded in one go, at most 224 tokens as in OpenAI's own decoding; longer
    utterances go, one by one, through Whisper's sequential long-form decoding.

    Arguments
    ---------
    source : str
        Hub name or folder. English-only and multilingual models.
    language : str
        Code of the language, for a multilingual model. Default: English.

    Attributes
    ----------
    name : str
        Last part of ``source``, e.g. ``whisper-tiny.en``.
    """

    SECONDS = 30
    unit = "word"

    def __init__(self, source: str, language: str = "en"):
        self.name = Path(source).name or str(source)
        self.model, self.extractor, self.tokenizer = _load_whisper(str(source))
        self.options: dict = {"num_beams": 1, "do_sample": False}
        multilingual = _complete_generation_config(self.model, self.tokenizer, language)
        if multilingual:
            self.options.update(language=language, task="transcribe")
        generation = self.model.generation_config
        #: What the decoder is given before the first token of a text.
        self.prompt = [self.model.config.decoder_start_token_id]
        if multilingual:
            self.prompt += [generation.lang_to_id[f"<|{language}|>"]]
            self.prompt += [generation.task_to_id["transcribe"]]
        self.prompt += [generation.no_timestamps_token_id]
        self._encoded = _Latest()

    def __call__(self, wavs: Waveforms) -> list[str]:
        """Transcribe waveforms."""
        texts = [""] * len(wavs)
        places, states = self._encode(wavs)
        if places:
            heard = self._decode(states.device, encoder_outputs=BaseModelOutput(states))
            for i, text in zip(places, heard):
                texts[i] = text
        for i, wav in _finite_items(wavs).items():
            if len(wav) > self.SECONDS * SAMPLE_RATE:
                (texts[i],) = self._decode(wav.device, True, **self._features([wav], long=True))
        return texts

    @torch.no_grad()
    def _encode(self, wavs):
        """Of what can be heard at once: places in the batch, and states [K, F, D]."""

        def compute():
            items = {
                i: wav
                for i, wav in _finite_items(wavs).items()
                if len(wav) <= self.SECONDS * SAMPLE_RATE
            }
            if not items:
                return [], None
            with torch.autocast(wavs.data.device.type, enabled=False):
                features = self._features(list(items.values())).input_features
                return list(items), self.model.get_encoder()(features).last_hidden_state

        return self._encoded.of(wavs, compute)

    @torch.no_grad()
    def _decode(self, device, long=False, **inputs):
        with torch.autocast(device.type, enabled=False), _quiet_transformers():
            tokens = self.model.generate(
                **inputs,
                **self.options,
                max_new_tokens=self.model.config.max_target_positions // 2,
                return_timestamps=long,
            )
        return [t.strip() for t in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _features(self, wavs, long=False):
        """The model's input, the model being moved to the waveforms' device."""
        self.model.to(wavs[0].device)
        return self.extractor(
            [wav.float().cpu().numpy() for wav in wavs],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            **({"truncation": False, "padding": "longest"} if long else {}),
        ).to(wavs[0].device)

    def encode(self, text: str) -> list[int]:
        """Tokens of a transcript, as Whisper would write it, with the end of text.

        A transcript without a lower-case letter (as LibriSpeech's) is taken in lower case, any
        other as it is; blanks are single, and one goes before, since Whisper's texts begin so. No
        punctuation is added and no number written in digits.
        """
        words = " ".join(text.split())
        if not any(map(str.islower, words)):
            words = words.lower()
        tokens = self.tokenizer(f" {words}" if words else "", add_special_tokens=False).input_ids
        return [*tokens, self.tokenizer.eos_token_id]

    @torch.no_grad()
    def nll(self, wavs: Waveforms, texts: Sequence[str]) -> list[tuple[float | None, int]]:
        """Teacher-forced cross-entropy of the transcripts, summed over their tokens.

        The decoder gets the start of transcript (language and task, if multilingual), no
        timestamps, and the text; what is counted are the tokens of :meth:`encode`. All tokens of
        the vocabulary may follow: what decoding suppresses is not suppressed.

        Arguments
        ---------
        wavs : Waveforms
        texts : sequence of str
            True transcripts, B of them.

        Returns
        -------
        list of (float or None, int)
            Nats and number of tokens of each. None over 30 s, which Whisper does not hear at once,
            for more tokens than its decoder has positions, and for non-finite audio.
        """
        targets = [self.encode(text) for text in _texts(wavs, texts)]
        found: list[tuple[float | None, int]] = [(None, len(target)) for target in targets]
        places, states = self._encode(wavs)
        longest = self.model.config.max_target_positions - len(self.prompt) + 1
        rows = [row for row, i in enumerate(places) if len(targets[i]) <= longest]
        if not rows:
            return found
        device = wavs.data.device
        with torch.autocast(device.type, enabled=False), _quiet_transformers():
            chosen = [torch.tensor(targets[places[row]], device=device) for row in rows]
            # Padding is behind what is counted, where the causal decoder cannot look.
            target = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            prompt = target.new_tensor(self.prompt).expand(len(chosen), -1)
            logits = self.model(
                encoder_outputs=BaseModelOutput(states[rows]),
                decoder_input_ids=torch.cat([prompt, target[:, :-1]], dim=1),
            ).logits[:, len(self.prompt) - 1 :]
        for i, row, logit in zip((places[row] for row in rows), chosen, logits):
            loss = F.cross_entropy(logit[: len(row)].double(), row, reduction="sum")
            found[i] = (float(loss), len(row))
        return found


class CTCRecognizer:
    """A frozen encoder with the CTC head that ``recipes/train_asr.py`` trained; greedy decoding.

    Arguments
    ---------
    folder : str or Path
        With ``asr.yaml`` and ``asr.safetensors``. The YAML is read as plain data:
        nothing in it is executed.

    Attributes
    ----------
    name : str
        As given in training.
    unit : str
        ``word`` or ``phoneme``, whatever it was trained to write.
    encoder : Teacher
    head : CTCHead
    """

    def __init__(self, folder: str | Path):
        config = _read_config(Path(folder))
        self.name = config["name"]
        self.encoder = _load_encoder(config["encoder"])
        if fingerprint(self.encoder) != config["encoder_fingerprint"]:
            raise UserError(
                f"recogniser '{folder}' was trained on an encoder that '{self.encoder.source}' "
                "held then and no longer holds: restore that encoder, or train the recogniser "
                "again with recipes/train_asr.py"
            )
        if "phonemes" in config:
            tokenizer: PhonemeTokenizer | CharacterTokenizer = PhonemeTokenizer(config["phonemes"])
        else:
            tokenizer = CharacterTokenizer(config["characters"])
        self.tokenizer = tokenizer
        self.unit = self.tokenizer.unit
        self.head = CTCHead(**config["head"])
        _load_weights(self.head, Path(folder) / WEIGHTS_FILE)
        self.head.requires_grad_(False).eval()
        self._heard = _Latest()

    def __call__(self, wavs: Waveforms) -> list[str]:
        """As of :class:`WhisperRecognizer`; "" for what is too short to be heard."""
        texts = [""] * len(wavs)
        places, log_probs, frames = self._log_probs(wavs)
        if places:
            for i, text in zip(places, self.tokenizer.greedy(log_probs, frames)):
                texts[i] = text
        return texts

    @torch.no_grad()
    def nll(self, wavs: Waveforms, texts: Sequence[str]) -> list[tuple[float | None, int]]:
        """CTC loss of the transcripts: of all paths that spell them.

        Arguments
        ---------
        wavs : Waveforms
        texts : sequence of str
            True transcripts, B of them, which the tokenizer encodes.

        Returns
        -------
        list of (float or None, int)
            Nats and number of characters or phonemes of each. None where the text has a letter or
            digit that the recogniser cannot write, where the utterance has too few frames to spell
            it, and for non-finite audio.
        """
        targets = [self._encode(text) for text in _texts(wavs, texts)]
        found: list[tuple[float | None, int]] = [(None, len(t or ())) for t in targets]
        places, log_probs, frames = self._log_probs(wavs)
        rows = [row for row, i in enumerate(places) if targets[i] is not None]
        if not rows:
            return found
        chosen = [torch.tensor(targets[places[row]], dtype=torch.long) for row in rows]
        losses = F.ctc_loss(
            log_probs[rows].double().transpose(0, 1),
            torch.cat(chosen).to(log_probs.device),
            frames[rows],
            torch.tensor([len(target) for target in chosen]),
            reduction="none",
        )
        for i, loss in zip((places[row] for row in rows), losses.tolist()):
            found[i] = (json_number(loss), len(targets[i]))
        return found

    def _encode(self, text):
        try:
            return self.tokenizer.encode(text)
        except UserError:
            return None

    @torch.no_grad()
    def _log_probs(self, wavs):
        """Of what is long enough: places in the batch, log-probabilities [K, F, V], frames [K]."""

        def compute():
            items = {
                i: wav
                for i, wav in _finite_items(wavs).items()
                if len(wav) >= self.encoder.receptive_field
            }
            if not items:
                return [], None, None
            batch = Waveforms.collate(list(items.values()))
            device = batch.data.device
            self.encoder.to(device)
            self.head.to(device)
            with torch.autocast(device.type, enabled=False):
                states, frames = self.encoder.hidden_states(batch)
                return list(items), self.head(states, frames), frames

        return self._heard.of(wavs, compute)


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


class CTCHead(nn.Module):
    """Learned weighted sum of an encoder's layers, then BLSTM or nothing, and CTC.

    The recipes of SUPERB (Yang et al. 2021) for characters (BLSTM) and phonemes (``depth`` 0: the
    projection and the output layer, linear both): one softmax weight per layer, each
    layer first normalised per frame. The sum is normalised over each utterance, as
    cepstra are: most of what tells speakers apart is constant.

    Arguments
    ---------
    num_layers : int
        Layers of the encoder, its input counted: L + 1.
    dim : int
        Width D of the encoder.
    num_outputs : int
        V, characters or phonemes, and blank.
    hidden : int
        Width of the projection and, each way, of the BLSTM.
    depth : int
        BLSTM layers; 0: none.
    dropout : float
        Before the projection and after each BLSTM layer.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_outputs: int,
        hidden: int = 192,
        depth: int = 2,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.arguments = {
            "num_layers": num_layers,
            "dim": dim,
            "num_outputs": num_outputs,
            "hidden": hidden,
            "depth": depth,
            "dropout": dropout,
        }
        self.layer_weights = nn.Parameter(torch.zeros(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(dim, hidden)
        widths = ([hidden] + [2 * hidden] * (depth - 1))[:depth]
        self.forwards = nn.ModuleList(nn.LSTM(w, hidden, batch_first=True) for w in widths)
        self.backwards = nn.ModuleList(nn.LSTM(w, hidden, batch_first=True) for w in widths)
        self.output = nn.Linear(2 * hidden if depth else hidden, num_outputs)

    @classmethod
    def for_encoder(
        cls,
        encoder: Teacher | LogMel,
        tokenizer: "CharacterTokenizer | PhonemeTokenizer",
        **options: Any,
    ) -> Self:
        """A head that fits a Teacher and a tokenizer; options as of the class."""
        return cls(encoder.num_layers + 1, encoder.dim, len(tokenizer), **options)

    def forward(self, states: torch.Tensor, frame_lengths: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, F, V] from states [L + 1, B, F, D] and lengths [B] in frames."""
        frame_lengths = as_lengths(frame_lengths)
        states = F.layer_norm(states.float(), states.shape[-1:])
        x = torch.einsum("l,lbfd->bfd", self.layer_weights.softmax(0), states)
        x = self.projection(self.dropout(_normalised_over_time(x, frame_lengths)))
        # Each item reversed within its length, and both directions run on plain tensors: exact
        # with right padding, and on a CPU 4 to 8 times as fast as PyTorch's packed sequences.
        time = torch.arange(x.shape[1], device=x.device)
        last = on_device(frame_lengths, x.device)[:, None] - 1
        mirror = torch.where(time <= last, last - time, time)[..., None]
        for forwards, backwards in zip(self.forwards, self.backwards):
            reverse = backwards(x.gather(1, mirror.expand_as(x)))[0]
            x = torch.cat([forwards(x)[0], reverse.gather(1, mirror.expand_as(reverse))], dim=-1)
            x = self.dropout(x)
        return self.output(x).log_softmax(-1)


def _normalised_over_time(x, lengths):
    """x [B, F, D] with zero mean and unit variance of each dimension over the valid frames [B]."""
    valid = length_mask(lengths, x.shape[1], x.device)
    count = on_device(lengths, x.device)[:, None, None]
    x = (x - (x * valid[..., None]).sum(1, keepdim=True) / count) * valid[..., None]
    return x / ((x.square().sum(1, keepdim=True) / count).sqrt() + 1e-3)


class _CTCTokenizer:
    def decode(self, indices: Iterable[int]) -> str:
        raise NotImplementedError

    def greedy(self, log_probs, frame_lengths):
        """Texts of the best path through log_probs [B, F, V], lengths [B] in frames."""
        relative = shares(frame_lengths, log_probs.shape[1])
        return [self.decode(best) for best in ctc_greedy_decode(log_probs, relative, blank_id=0)]


class CharacterTokenizer(_CTCTokenizer):
    """Characters to indices for CTC and back; index 0 is the blank.

    Arguments
    ---------
    characters : str
        Default: upper case letters, apostrophe and space, as in LibriSpeech.
    """

    unit = "word"

    def __init__(self, characters: str = CHARACTERS):
        if len(set(characters)) != len(characters) or " " not in characters:
            raise UserError("characters: name each once, the space among them.")
        self.characters = characters
        self.config = {"characters": characters}

    def __len__(self):
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """List of indices of ``text`` in upper case; punctuation without an index is a space.

        Raises
        ------
        UserError
            A letter or digit has no index.
        """
        text = text if any(map(str.islower, self.characters)) else text.upper()
        unknown = sorted({c for c in text if c.isalnum() and c not in self.characters})
        if unknown:
            raise UserError(
                f"the transcript {text!r} has {unknown}, which are not among the recogniser's "
                "characters: spell them out, or add them to `characters`"
            )
        text = "".join(c if c in self.characters else " " for c in text)
        return [self.characters.index(c) + 1 for c in " ".join(text.split())]

    def decode(self, indices: Iterable[int]) -> str:
        """Text of a list of indices, without blanks."""
        return " ".join("".join(self.characters[i - 1] for i in indices).split())


class PhonemeTokenizer(_CTCTokenizer):
    """English text to the indices of its phonemes for CTC; back to phonemes, not to text.

    Arguments
    ---------
    phonemes : list of str, optional
        Index 1 first; 0 is the blank. Default: those of :mod:`pi_finetune.phonemes`.
    """

    unit = "phoneme"

    def __init__(self, phonemes: list[str] | None = None):
        self.phonemes = list(phonemes or inventory())
        self.indices = {phoneme: i for i, phoneme in enumerate(self.phonemes, start=1)}
        self.config = {"phonemes": self.phonemes}

    def __len__(self):
        return len(self.phonemes) + 1

    def encode(self, text: str) -> list[int]:
        """List of indices of the phonemes of ``text``."""
        return [self.indices[phoneme] for phoneme in phonemes(text)]

    def decode(self, indices: Iterable[int]) -> str:
        """Phonemes of a list of indices, separated by blanks."""
        return " ".join(self.phonemes[i - 1] for i in indices)


def save_recognizer(
    folder: str | Path,
    name: str,
    encoder: Teacher,
    head: CTCHead,
    tokenizer: CharacterTokenizer | PhonemeTokenizer,
) -> None:
    """Write ``asr.yaml`` and ``asr.safetensors``, which :class:`CTCRecognizer` loads.

    The encoder is not copied but named: by its hub name, relative to the project
    if it is shipped with it, else by its absolute path. A fingerprint of its weights
    is kept, so that a replaced encoder is noticed.

    Arguments
    ---------
    folder : str or Path
        Made if missing.
    name : str
        Key of the recogniser's results in the scores.
    encoder : Teacher
    head : CTCHead
    tokenizer : CharacterTokenizer or PhonemeTokenizer
    """
    source = encoder.source
    if Path(source).expanduser().is_dir():
        source = Path(source).expanduser().resolve()
        if source.is_relative_to(PROJECT_ROOT):
            source = source.relative_to(PROJECT_ROOT)
        source = source.as_posix()
    config = {
        "name": name,
        "encoder": source,
        "encoder_fingerprint": fingerprint(encoder),
        **tokenizer.config,
        "head": head.arguments,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG_FILE, text)


def fingerprint(encoder: Teacher | LogMel) -> str:
    """Short hash of an encoder's weights: names, shapes and the first values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.encoder.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _finite_items(wavs):
    """Waveforms [T] in float32 by their index in the batch; those not finite are left out."""
    if not isinstance(wavs, Waveforms):
        raise TypeError(
            f"a recogniser takes Waveforms, got {type(wavs).__name__}; of a tensor [B, T] and "
            "lengths [B], pi_finetune.lengths.Waveforms.of(wavs, lengths) makes them"
        )
    items = {i: wav.detach().float() for i, wav in enumerate(wavs.items())}
    return {i: wav for i, wav in items.items() if len(wav) and torch.isfinite(wav).all()}


def _texts(wavs, texts):
    if len(texts) != len(wavs) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"a likelihood takes a transcript, a str, for each of {len(wavs)} waveforms, "
            f"got {[type(text).__name__ for text in texts]}"
        )
    return texts


def _read_config(folder):
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Name a folder that recipes/train_asr.py wrote."
        ) from error
    keys = {"name", "encoder", "encoder_fingerprint", "head"}
    if (
        not isinstance(config, dict)
        or not keys <= config.keys()
        or not {"characters", "phonemes"} & config.keys()
    ):
        raise UserError(
            f"{path} must hold the keys {', '.join(sorted(keys))}, and characters or phonemes."
        )
    return config


def _load_encoder(source):
    if source == LogMel.source:
        return LogMel()
    shipped = PROJECT_ROOT / source
    return Teacher(str(shipped) if shipped.is_dir() else source)


def _load_weights(head, path):
    try:
        head.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it beside {CONFIG_FILE}.") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged or does not fit {CONFIG_FILE} beside it: {error}"
        ) from error


def _load_whisper(source):
    from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer
    from transformers import WhisperForConditionalGeneration as Whisper

    local = Path(source).expanduser().is_dir()
    if local:
        source = str(Path(source).expanduser())
    elif source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise UserError(f"recogniser folder '{source}' does not exist")
    try:
        with _quiet_transformers():
            kind = AutoConfig.from_pretrained(source).model_type
            if kind != "whisper":
                raise UserError(
                    f"'{source}' is a '{kind}' model, which cannot write text as it is: name a "
                    "Whisper model, or train a recogniser on it with recipes/train_asr.py "
                    f"hparams/asr_ctc.yaml --encoder_source {source}"
                )
            model: Any
            report: Any
            model, report = Whisper.from_pretrained(  # type: ignore[misc]
                source, dtype=torch.float32, output_loading_info=True
            )
            parts = [cls.from_pretrained(source) for cls in (AutoFeatureExtractor, AutoTokenizer)]
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError, ...
        hint = (
            "a Whisper folder holds config.json, model.safetensors, preprocessor_config.json and "
            "the tokenizer's files"
            if local
            else "it is neither a folder here nor a model that can be had from the hub; without a "
            "network, name a local folder or a model already in the cache"
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"recogniser '{source}' cannot be loaded: {hint} ({reason})") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"the weights of recogniser '{source}' do not fit its config.json: {len(missing)} "
            f"tensors are missing, first '{missing[0]}'"
        )
    return (model.requires_grad_(False).eval(), *parts)


def _complete_generation_config(model, tokenizer, language):
    """Fill in what exports often lack, from the vocabulary; say whether the model is multilingual.

    ``save_pretrained`` may mark a generation config as derived from the model's, and
    ``from_pretrained`` then drops what only Whisper has: language, task and timestamp tokens.
    """
    config = model.generation_config
    multilingual = getattr(config, "is_multilingual", model.config.vocab_size >= 51865)
    names = ("notimestamps", language, "transcribe") if multilingual else ("notimestamps",)
    vocabulary = tokenizer.get_vocab()
    unknown = [name for name in names if f"<|{name}|>" not in vocabulary]
    if unknown:
        raise UserError(f"Whisper's vocabulary lacks {', '.join(unknown)}: is `language` a code?")
    ids = {name: vocabulary[f"<|{name}|>"] for name in names}
    lacking = {"is_multilingual": multilingual, "no_timestamps_token_id": ids["notimestamps"]}
    if multilingual:  # an English-only model must not be told a language
        lacking["lang_to_id"] = {f"<|{language}|>": ids[language]}
        lacking["task_to_id"] = {"transcribe": ids["transcribe"]}
    for name, value in lacking.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return multilingual


@contextlib.contextmanager
def _quiet_transformers():
    """Silence advice that transformers gives at every call; errors are raised, not logged."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
