"""The downstream recogniser: CTC on a frozen encoder's layers, as in SUPERB (Yang et al. 2021)."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import speechbrain as sb
import torch
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.nnet.losses import ctc_loss
from torch.utils.data import Dataset

from pi_finetune.brains.updates import UpdateBrain
from pi_finetune.data.audio import SAMPLE_RATE, read_audio
from pi_finetune.data.corpora import prepare_noise
from pi_finetune.data.mixing import NoiseMixer
from pi_finetune.distributed import rank
from pi_finetune.errors import UserError
from pi_finetune.files import write_text
from pi_finetune.lengths import Waveforms, shares
from pi_finetune.recognizers import (
    CharacterTokenizer,
    PhonemeTokenizer,
    Recognizer,
    save_recognizer,
)
from pi_finetune.results import metrics
from pi_finetune.seeding import utterance_rng

if TYPE_CHECKING:
    from pi_finetune.teacher import Teacher

__all__ = [
    "Augmentation",
    "EncodedSpeech",
    "RecognitionBrain",
    "error_rate",
    "load_mixer",
    "transcribe_set",
    "write_lines",
]


logger = sb.utils.logger.get_logger(__name__)


class Augmentation:
    """Speed, then noise, drawn for every utterance by itself.

    SpeechBrain's Augmenter draws once per batch; its SpeedPerturb is used here
    with one speed each.

    Arguments
    ---------
    speeds : list of int
        In percent, equally likely. Default: 100 alone.
    mixer : pi_finetune.data.mixing.NoiseMixer, optional
        Adds noise. Default: none.
    noise_probability : float
        Share of utterances that get noise.
    """

    def __init__(
        self,
        speeds: Sequence[int] = (100,),
        mixer: NoiseMixer | None = None,
        noise_probability: float = 0.5,
    ):
        self.speeds = [SpeedPerturb(SAMPLE_RATE, [speed]) for speed in speeds]
        self.mixer = mixer
        self.noise_probability = noise_probability

    def __call__(self, wav: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Augment wav [T] with draws from ``rng``; speed changes T."""
        wav = self.speeds[rng.integers(len(self.speeds))](wav[None])[0]
        if self.mixer is not None and rng.random() < self.noise_probability:
            wav = self.mixer(wav, rng)[0]
        return wav


def load_mixer(
    noise_folder: str | Path | None,
    part: str,
    snrs: Sequence[float],
    noise_classes: Sequence[str] | None = None,
) -> NoiseMixer | None:
    """The NoiseMixer of one part (``train``, ``dev``, ``test``); None without a folder or SNRs."""
    if noise_folder is None or not snrs:
        return None
    return NoiseMixer(prepare_noise(noise_folder, part, noise_classes), snrs)


class EncodedSpeech(Dataset):
    """Transcribed utterances as a frozen encoder's hidden states, each computed once and kept.

    Augmentation is drawn in a few ``views`` of each utterance, over which the
    passes over the data go round: so it, too, is encoded only once.
    Use it without loader workers, which would each keep states of their own.

    Arguments
    ---------
    manifest : dict
        From :func:`pi_finetune.data.corpora.prepare_speech`. Utterances without a transcript are
        left out, and so are those to be trained on that are too short for CTC to spell.
    encoder : pi_finetune.teacher.Teacher
    tokenizer : pi_finetune.recognizers.CharacterTokenizer or PhonemeTokenizer
    augmentation : Augmentation, optional
        Default: none, and one view.
    views : int
        Versions of each utterance.
    seed : int
        Seed of the augmentation.
    cache_gb : float
        Memory for the states, kept as float16; what does not fit is computed again.
    trainable : bool
        Whether utterances too short for their text or too long for the encoder, at any speed, are
        left out (set it for training). Default: False.
    """

    def __init__(
        self,
        manifest: dict,
        encoder: "Teacher",
        tokenizer: Any,
        augmentation: Augmentation | None = None,
        views: int = 1,
        seed: int = 0,
        cache_gb: float = 1.0,
        trainable: bool = False,
    ):
        self.manifest = manifest
        self.encoder = encoder
        self.augmentation = augmentation
        self.views = views if augmentation is not None else 1
        self.seed = seed
        self.room = cache_gb * 1e9
        self.cache: dict = {}
        self.items = []
        for key, entry in manifest.items():
            try:
                tokens = tokenizer.encode(entry["text"] or "")
            except UserError as error:
                raise UserError(f"{entry['wav']}: {error}") from None
            if tokens and (not trainable or self._fits(entry, tokens)):
                self.items.append((key, entry, tokens))
        if not self.items:
            raise UserError(
                "data_folder: none of the utterances has a transcript that can be trained on or "
                "scored. LibriSpeech keeps them in SPEAKER-CHAPTER.trans.txt beside the audio."
            )
        if len(self.items) < len(manifest):
            logger.info(
                f"Left out {len(manifest) - len(self.items)} utterances: no text, or of a length "
                "that cannot be trained on."
            )

    def _fits(self, entry, tokens):
        # CTC needs a frame for each token, and a blank between equal ones.
        needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
        speeds = [100]
        if self.augmentation is not None:
            speeds = [speed.speeds[0] for speed in self.augmentation.speeds]
        shortest, longest = (
            math.ceil(entry["duration"] * SAMPLE_RATE * 100 / speed)
            for speed in (max(speeds), min(speeds))
        )
        limit = self.encoder.max_length
        return self.encoder.frames(shortest) >= needed and (limit is None or longest <= limit)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, address):
        """``id``, ``text``, ``tokens`` [N] and ``states`` [F, L + 1, D] (float16).

        The address is an index, or ``(index, data_pass)`` in training.
        """
        index, data_pass = address if isinstance(address, tuple) else (address, 0)
        key, entry, tokens = self.items[index]
        view = data_pass % self.views
        states = self.cache.get((index, view))
        if states is None:
            states = self._encode(key, entry, view)
            self.room -= states.nbytes
            if self.room >= 0:
                self.cache[index, view] = states
        return {
            "id": key,
            "text": entry["text"],
            "tokens": torch.tensor(tokens),
            "states": states,
        }

    @torch.no_grad()
    def _encode(self, key, entry, view):
        wav = read_audio(entry["wav"])
        if self.augmentation is not None:
            wav = self.augmentation(wav, utterance_rng(self.seed, view, key, "augmentation"))
        device = next(iter(self.encoder.encoder.state_dict().values())).device
        states, _ = self.encoder.hidden_states(wav[None].to(device))
        return states[:, 0].transpose(0, 1).half().cpu()


class RecognitionBrain(UpdateBrain):
    """Trains ``modules.head`` with CTC; the best head by dev error rate goes to the run folder.

    The error rate is ``wer``, or ``per`` where the tokenizer's unit is the phoneme.

    An epoch is ``valid_every`` updates. From YAML it uses: ``output_folder, recognizer_name,
    encoder, tokenizer, lr_schedule, valid_every, train_loggers``.
    """

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Any:
        """Log-probabilities [B, F, V] from a batch of encoded speech."""
        states = batch.to(self.device).states
        return self.modules.head(states.data.permute(2, 0, 1, 3), states.lengths)

    def compute_objectives(self, log_probs: Any, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """CTC loss per token; validation also counts errors."""
        frame_lengths = batch.states.lengths
        if stage != sb.Stage.TRAIN:
            tokenizer = self.hparams.tokenizer
            texts = tokenizer.greedy(log_probs, frame_lengths)
            self.errors += [
                metrics.recognition_errors(tokenizer, *pair) for pair in zip(batch.text, texts)
            ]
        tokens = batch.tokens
        return ctc_loss(
            log_probs,
            tokens.data,
            shares(frame_lengths, log_probs.shape[1], log_probs.device),
            shares(tokens.lengths, tokens.data.shape[1], log_probs.device),
            blank_index=0,
        )

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start the errors of a validation."""
        super().on_stage_start(stage, epoch)
        self.errors: list = []

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """After validation log, save a checkpoint, and export the head if it is the best."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN:
            self.train_loss = float(stage_loss)
            return
        rate = error_rate(self.hparams.tokenizer)
        scores = {"loss": float(stage_loss), rate: metrics.wer(self.errors)}
        earlier = [(line[rate], line["loss"]) for line in self.history.validations]
        record = self.log_validation(epoch, {"loss": self.train_loss}, scores)
        if all((record[rate], record["loss"]) < line for line in earlier) and rank() == 0:
            save_recognizer(
                self.hparams.output_folder,
                self.hparams.recognizer_name,
                self.hparams.encoder,
                self.plain_modules["head"],
                self.hparams.tokenizer,
            )
        self.checkpointer.save_and_keep_only(meta=record, min_keys=[rate], num_to_keep=1)


def error_rate(recognizer: Recognizer | CharacterTokenizer | PhonemeTokenizer) -> str:
    """``wer`` or ``per``: what the errors of a recogniser (or of its tokenizer) add up to."""
    return {"word": "wer", "phoneme": "per"}[recognizer.unit]


def transcribe_set(
    recognizer: Recognizer,
    manifest: dict,
    mixer: NoiseMixer | None = None,
    snr: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict]:
    """Errors of a recogniser on a set, clean or with noise at one SNR.

    The mixtures are those of :class:`pi_finetune.data.loading.SpeechPairs` with the same seed.

    Arguments
    ---------
    recognizer : Recognizer
    manifest : dict
        Utterances without a transcript are passed over.
    mixer : NoiseMixer, optional
        Default: clean speech.
    snr : float, optional
        In dB, with ``mixer``.
    seed : int
        Seed of the mixtures.
    batch_size : int

    Returns
    -------
    list of dict
        ``id, snr, noise_class`` and :func:`pi_finetune.results.metrics.recognition_errors` of each.
    """
    records, items = [], [(k, v) for k, v in manifest.items() if v["text"] is not None]
    for start in range(0, len(items), batch_size):
        batch, wavs = items[start : start + batch_size], []
        noises = [{"snr": None, "noise_class": None} for _ in batch]
        for i, (key, entry) in enumerate(batch):
            wavs.append(read_audio(entry["wav"]))
            if mixer is not None:
                rng = utterance_rng(seed, 0, key, "mixture")
                wavs[i], _, noises[i] = mixer(wavs[i], rng, snr)
        texts = recognizer(Waveforms.collate(wavs))
        for (key, entry), noise, text in zip(batch, noises, texts):
            errors = metrics.recognition_errors(recognizer, entry["text"], text)
            records.append({"id": key, **noise, **errors})
    return records


def write_lines(path: str | Path, records: Iterable[dict]) -> None:
    """Write JSON lines, atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
