"""Whisper, through ``transformers``."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers.base import Latest, checked_texts, finite_items
from pi_finetune.teacher import SAMPLE_RATE

__all__ = ["WhisperRecognizer"]


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
    generation : dict, optional
        Of ``transformers``' ``GenerationConfig``, for the decoding of texts; these go before the
        defaults here. ``{no_repeat_ngram_size: 5}`` ends the loops of a phrase that Whisper falls
        into where there is noise.

    Attributes
    ----------
    name : str
        Last part of ``source``, e.g. ``whisper-tiny.en``.

    Raises
    ------
    UserError
        Where the model cannot be loaded, ``language`` is no code, or an option is not known.
    """

    SECONDS = 30
    unit = "word"

    def __init__(self, source: str, language: str = "en", generation: dict | None = None):
        self.name = Path(source).name or str(source)
        self.model, self.extractor, self.tokenizer = _load_whisper(str(source))
        self.options = _checked_options(generation or {})
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
        self._encoded = Latest()

    def __call__(self, wavs: Waveforms) -> list[str]:
        """Transcribe waveforms."""
        texts = [""] * len(wavs)
        places, states = self._encode(wavs)
        if places:
            heard = self._decode(states.device, encoder_outputs=BaseModelOutput(states))
            for i, text in zip(places, heard):
                texts[i] = text
        for i, wav in finite_items(wavs).items():
            if len(wav) > self.SECONDS * SAMPLE_RATE:
                (texts[i],) = self._decode(wav.device, True, **self._features([wav], long=True))
        return texts

    @torch.no_grad()
    def _encode(self, wavs):
        """Of what can be heard at once: places in the batch, and states [K, F, D]."""

        def compute():
            items = {
                i: wav
                for i, wav in finite_items(wavs).items()
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
                return_timestamps=long,
                **{"max_new_tokens": self.model.config.max_target_positions // 2, **self.options},
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
        targets = [self.encode(text) for text in checked_texts(wavs, texts)]
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


def _checked_options(options):
    """Those of decoding: greedy, unless the user's say otherwise."""
    known = GenerationConfig()
    for name in options:
        if not hasattr(known, name):
            raise UserError(
                f"generation: '{name}' is no option of transformers.GenerationConfig, as num_beams "
                "and no_repeat_ngram_size are"
            )
    return {"num_beams": 1, "do_sample": False, **options}


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
