"""Recognisers behind one interface: ``recognizer(wavs [B, T], lengths [B]) -> list[str]``.

Texts are raw; :func:`pi_finetune.results.metrics.recognition_errors` normalises them.
The attribute ``unit`` says what a text is made of: ``word``, or ``phoneme`` (separated by blanks).
What an utterance is batched with does not change its text. An utterance with a
non-finite sample (a diverged enhancer's) has the text "".
"""

import contextlib
import hashlib
import os
import string
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from speechbrain.decoders.ctc import ctc_greedy_decode
from torch import nn
from transformers.utils import logging

from pi_finetune.config import PROJECT_ROOT
from pi_finetune.errors import UserError
from pi_finetune.files import replacing, write_text
from pi_finetune.phonemes import inventory, phonemes
from pi_finetune.teacher import SAMPLE_RATE, Teacher

CONFIG_FILE = "asr.yaml"
WEIGHTS_FILE = "asr.safetensors"
#: LibriSpeech's characters.
CHARACTERS = " '" + string.ascii_uppercase


def load_recognizer(source):
    """Load the recogniser that ``source`` names, whatever its kind.

    Arguments
    ---------
    source : str or Path or None
        A folder written by ``recipes/train_asr.py`` (it holds ``asr.yaml``), a
        folder with a Whisper model as ``transformers`` saves it, or the hub name of
        one. None: no recogniser, None is returned.

    Returns
    -------
    CTCRecognizer or WhisperRecognizer or None

    Raises
    ------
    UserError
        The folder is missing or neither kind, its weights are missing or do not fit,
        or the hub cannot be asked.
    """
    if source is None:
        return None
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return CTCRecognizer(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"recogniser folder '{source}' holds neither {CONFIG_FILE} (as recipes/train_asr.py "
            "writes it) nor config.json (a Whisper model of transformers): name another folder"
        )
    return WhisperRecognizer(str(source))


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

    def __init__(self, source, language="en"):
        self.name = Path(source).name or str(source)
        self.model, self.extractor, self.tokenizer = _load_whisper(str(source))
        self.options = {"num_beams": 1, "do_sample": False}
        if _complete_generation_config(self.model, self.tokenizer, language):
            self.options.update(language=language, task="transcribe")

    def __call__(self, wavs, lengths):
        """Transcribe wavs [B, T] of lengths [B] samples."""
        texts = [""] * len(wavs)
        items = _finite_items(wavs, lengths)
        limit = self.SECONDS * SAMPLE_RATE
        short = [i for i in items if len(items[i]) <= limit]
        batches = [short] if short else []
        batches += [[i] for i in items if len(items[i]) > limit]
        for batch in batches:
            for i, text in zip(batch, self._transcribe([items[i] for i in batch])):
                texts[i] = text
        return texts

    @torch.no_grad()
    def _transcribe(self, wavs):
        device = wavs[0].device
        long = len(wavs[0]) > self.SECONDS * SAMPLE_RATE
        model = self.model.to(device)
        with torch.autocast(device.type, enabled=False), _quiet_transformers():
            inputs = self.extractor(
                [wav.float().cpu().numpy() for wav in wavs],
                sampling_rate=SAMPLE_RATE,
                return_tensors="pt",
                return_attention_mask=True,
                **({"truncation": False, "padding": "longest"} if long else {}),
            ).to(device)
            tokens = model.generate(
                **inputs,
                **self.options,
                max_new_tokens=model.config.max_target_positions // 2,
                return_timestamps=long,
            )
        return [t.strip() for t in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


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

    def __init__(self, folder):
        config = _read_config(Path(folder))
        self.name = config["name"]
        self.encoder = Teacher(_find_encoder(config["encoder"]))
        if fingerprint(self.encoder) != config["encoder_fingerprint"]:
            raise UserError(
                f"recogniser '{folder}' was trained on an encoder that '{self.encoder.source}' "
                "held then and no longer holds: restore that encoder, or train the recogniser "
                "again with recipes/train_asr.py"
            )
        if "phonemes" in config:
            self.tokenizer = PhonemeTokenizer(config["phonemes"])
        else:
            self.tokenizer = CharacterTokenizer(config["characters"])
        self.unit = self.tokenizer.unit
        self.head = CTCHead(**config["head"])
        _load_weights(self.head, Path(folder) / WEIGHTS_FILE)
        self.head.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, wavs, lengths):
        """Transcribe wavs [B, T] of lengths [B] samples; "" for what is too short to be heard."""
        texts = [""] * len(wavs)
        items = _finite_items(wavs, lengths)
        items = {i: w for i, w in items.items() if len(w) >= self.encoder.receptive_field}
        if not items:
            return texts
        batch = nn.utils.rnn.pad_sequence(list(items.values()), batch_first=True)
        self.encoder.to(batch.device)
        self.head.to(batch.device)
        with torch.autocast(batch.device.type, enabled=False):
            states, frames = self.encoder.hidden_states(
                batch, torch.tensor([len(w) for w in items.values()], device=batch.device)
            )
            heard = self.tokenizer.greedy(self.head(states, frames), frames)
        for i, text in zip(items, heard):
            texts[i] = text
        return texts


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

    def __init__(self, num_layers, dim, num_outputs, hidden=192, depth=2, dropout=0.2):
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
    def for_encoder(cls, encoder, tokenizer, **options):
        """A head that fits a Teacher and a tokenizer; options as of the class."""
        return cls(encoder.num_layers + 1, encoder.dim, len(tokenizer), **options)

    def forward(self, states, frame_lengths):
        """Log-probabilities [B, F, V] from states [L + 1, B, F, D] and lengths [B] in frames."""
        states = F.layer_norm(states.float(), states.shape[-1:])
        x = torch.einsum("l,lbfd->bfd", self.layer_weights.softmax(0), states)
        x = self.projection(self.dropout(_normalised_over_time(x, frame_lengths)))
        # Each item reversed within its length, and both directions run on plain tensors: exact
        # with right padding, and on a CPU 4 to 8 times as fast as PyTorch's packed sequences.
        time = torch.arange(x.shape[1], device=x.device)
        last = frame_lengths[:, None] - 1
        mirror = torch.where(time <= last, last - time, time)[..., None]
        for forwards, backwards in zip(self.forwards, self.backwards):
            reverse = backwards(x.gather(1, mirror.expand_as(x)))[0]
            x = torch.cat([forwards(x)[0], reverse.gather(1, mirror.expand_as(reverse))], dim=-1)
            x = self.dropout(x)
        return self.output(x).log_softmax(-1)


def _normalised_over_time(x, lengths):
    """x [B, F, D] with zero mean and unit variance of each dimension over the valid frames [B]."""
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    count = lengths[:, None, None]
    x = (x - (x * valid[..., None]).sum(1, keepdim=True) / count) * valid[..., None]
    return x / ((x.square().sum(1, keepdim=True) / count).sqrt() + 1e-3)


class _CTCTokenizer:
    def greedy(self, log_probs, frame_lengths):
        """Texts of the best path through log_probs [B, F, V], lengths [B] in frames."""
        shares = frame_lengths / log_probs.shape[1]
        return [self.decode(best) for best in ctc_greedy_decode(log_probs, shares, blank_id=0)]


class CharacterTokenizer(_CTCTokenizer):
    """Characters to indices for CTC and back; index 0 is the blank.

    Arguments
    ---------
    characters : str
        Default: upper case letters, apostrophe and space, as in LibriSpeech.
    """

    unit = "word"

    def __init__(self, characters=CHARACTERS):
        if len(set(characters)) != len(characters) or " " not in characters:
            raise UserError("characters: name each once, the space among them.")
        self.characters = characters
        self.config = {"characters": characters}

    def __len__(self):
        return len(self.characters) + 1

    def encode(self, text):
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

    def decode(self, indices):
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

    def __init__(self, phonemes=None):
        self.phonemes = list(phonemes or inventory())
        self.indices = {phoneme: i for i, phoneme in enumerate(self.phonemes, start=1)}
        self.config = {"phonemes": self.phonemes}

    def __len__(self):
        return len(self.phonemes) + 1

    def encode(self, text):
        """List of indices of the phonemes of ``text``."""
        return [self.indices[phoneme] for phoneme in phonemes(text)]

    def decode(self, indices):
        """Phonemes of a list of indices, separated by blanks."""
        return " ".join(self.phonemes[i - 1] for i in indices)


def save_recognizer(folder, name, encoder, head, tokenizer):
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


def fingerprint(encoder):
    """Short hash of an encoder's weights: names, shapes and the first values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.encoder.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _finite_items(wavs, lengths):
    """Waveforms [T] in float32 by their index in the batch; those not finite are left out."""
    lengths = torch.as_tensor(lengths)
    if wavs.dim() != 2 or lengths.shape != wavs.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            "a recogniser takes wavs [B, T] and lengths [B] in whole samples, got "
            f"{list(wavs.shape)} and {lengths.dtype} {list(lengths.shape)}"
        )
    if len(lengths) and int(lengths.max()) > wavs.shape[1]:
        raise ValueError(f"a length of {int(lengths.max())} exceeds {wavs.shape[1]} samples")
    items = {i: wavs[i, :n].detach().float() for i, n in enumerate(lengths.tolist())}
    return {i: wav for i, wav in items.items() if len(wav) and torch.isfinite(wav).all()}


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


def _find_encoder(source):
    shipped = PROJECT_ROOT / source
    return str(shipped) if shipped.is_dir() else source


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
            model, report = Whisper.from_pretrained(
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
