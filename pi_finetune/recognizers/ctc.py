"""Recognisers that ``recipes/train_asr.py`` trains: a frozen encoder and a CTC head."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pi_finetune.config import PROJECT_ROOT
from pi_finetune.errors import UserError
from pi_finetune.files import json_number, replacing, write_text
from pi_finetune.lengths import Waveforms, as_lengths, length_mask, on_device
from pi_finetune.recognizers.base import Latest, checked_texts, finite_items
from pi_finetune.recognizers.log_mel import LogMel
from pi_finetune.recognizers.tokenizers import CharacterTokenizer, PhonemeTokenizer
from pi_finetune.teacher import Teacher

__all__ = ["CONFIG_FILE", "CTCHead", "CTCRecognizer", "fingerprint", "save_recognizer"]


CONFIG_FILE = "asr.yaml"
WEIGHTS_FILE = "asr.safetensors"


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
        self._heard = Latest()

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
        targets = [self._encode(text) for text in checked_texts(wavs, texts)]
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
                for i, wav in finite_items(wavs).items()
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
