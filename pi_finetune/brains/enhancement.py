"""The Brain that fine-tunes an enhancer. What it optimises is declared in YAML."""

import math
from typing import Any

import speechbrain as sb
import torch

from pi_finetune import settings
from pi_finetune.brains.updates import UpdateBrain
from pi_finetune.distributed import gather_in_turn, rank
from pi_finetune.enhancers import config_text, save_enhancer
from pi_finetune.errors import UserError
from pi_finetune.recognizers import gives_likelihood, likelihoods
from pi_finetune.results import metrics
from pi_finetune.results.declarations import higher_is_better
from pi_finetune.results.pool import ScorePool
from pi_finetune.seeding import perturbation_rngs

__all__ = ["EnhancementBrain"]


logger = sb.utils.logger.get_logger(__name__)


class EnhancementBrain(UpdateBrain):
    """Fine-tunes ``modules.enhancer`` by ``modules.objective``.

    From YAML it uses, besides what :class:`UpdateBrain` does: ``data_seed, wer_every, recognizers,
    select_by, log_examples, validation_callbacks`` and, if they are there, ``valid_metrics``: which
    signal scores a validation has, and ``workers``: processes that compute them while the model
    goes on. A callback is called with the first batch of each validation, ``callback(objective,
    enhanced [B, T], clean [B, T], lengths [B], ids) -> dict``; what it returns is logged with the
    scores.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config_text(self.modules.enhancer)  # one that could not be saved fails here
        callbacks = self.hparams.validation_callbacks or []
        self.callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        settings.check_choice("select_by", self.hparams.select_by, metrics.DEV_SCORES)
        names = getattr(self.hparams, "valid_metrics", None) or metrics.SIGNAL_SCORES
        for name in names:
            settings.check_choice("valid_metrics", name, metrics.SIGNAL_SCORES)
        if self.hparams.select_by in set(metrics.SIGNAL_SCORES) - set(names):
            raise UserError(
                f"select_by: {self.hparams.select_by} is not among valid_metrics "
                f"({', '.join(names)}). Add it there, or set select_by."
            )
        self.pool = ScorePool(getattr(self.hparams, "workers", 0), names)
        self.recognizer: Any = next(iter(self.hparams.recognizers), None)
        if self.hparams.select_by == "wer" and self.recognizer is None:
            raise UserError("select_by: wer needs a recogniser; set asr_source or select_by.")
        if self.hparams.select_by == "nll" and not gives_likelihood(self.recognizer):
            raise UserError(
                "select_by: nll needs a recogniser that gives likelihoods, one of "
                "recipes/train_asr.py or a Whisper model; set asr_source or select_by."
            )
        if self.debug:
            for module in self.modules.objective.modules():
                if hasattr(module, "check_values"):
                    module.check_values()

    def make_valid_loader(self, dataset: Any, **loader_kwargs: Any) -> Any:
        """As :class:`UpdateBrain`'s; speech that cannot choose the best model is refused."""
        if self.hparams.select_by in metrics.TEXT_SCORES and not any(
            (entry.get("text") or "").strip() for entry in dataset.manifest.values()
        ):
            raise UserError(
                f"select_by: {self.hparams.select_by} needs transcripts, and none of the "
                f"{len(dataset.manifest)} dev utterances (valid_splits) has one. Add transcripts, "
                "or set select_by to objective, say."
            )
        return super().make_valid_loader(dataset, **loader_kwargs)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """As :class:`UpdateBrain`'s; an error ends the processes that compute scores."""
        with self.pool:
            super().fit(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As SpeechBrain's; an error ends the processes that compute scores."""
        with self.pool:
            return super().evaluate(*args, **kwargs)

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Any:
        """Enhance the noisy waveforms, to ``Waveforms`` of the same lengths."""
        batch = batch.to(self.device)
        enhancer = self.modules.enhancer
        if stage != sb.Stage.TRAIN:  # processes validate different numbers of batches
            enhancer = self.plain_modules["enhancer"]
        return enhancer(batch.noisy)

    def compute_objectives(self, enhanced: Any, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Mean over the batch of the objective; validation also scores each utterance."""
        training = stage == sb.Stage.TRAIN
        seed = self.hparams.seed if training else self.hparams.data_seed
        rngs = perturbation_rngs(seed, batch)
        objective = self.modules.objective if training else self.plain_modules["objective"]
        losses = objective(enhanced, batch.clean, rngs=rngs)
        if not training:
            if not self.scores:  # the first batch stands for all
                for callback in self.callbacks:
                    self.added |= callback(objective, enhanced, batch.clean, None, batch.id)
            self._score(enhanced, batch, losses)
        return losses.mean()

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start the scores of a validation."""
        super().on_stage_start(stage, epoch)
        self.scores: list = []
        self.examples: dict = {}
        self.added: dict = {}
        every = self.hparams.wer_every
        self.with_wer = (
            self.recognizer is not None
            and every is not None
            and (epoch is None or epoch % every == 0)
        )

    def _score(self, enhanced, batch, losses):
        wavs = {"noisy": batch.noisy, "enhanced": enhanced, "clean": batch.clean}
        wavs = {kind: each.to("cpu", torch.float32).items() for kind, each in wavs.items()}
        waiting = []
        for i, utterance in enumerate(batch.id):
            own = {kind: rows[i].numpy() for kind, rows in wavs.items()}
            if len(self.examples) < self.hparams.log_examples:
                self.examples[utterance] = own
            waiting.append(self.pool.submit(utterance, own["clean"], own["enhanced"]))
        texts: list = [None] * len(enhanced)
        if self.with_wer:
            texts = self.recognizer(enhanced)
        nlls = likelihoods(self.recognizer, enhanced, batch.text)
        for i, signal in enumerate(waiting):
            score = {"signal": signal, "objective": float(losses[i]), "likelihood": nlls[i]}
            if self.with_wer and batch.text[i] is not None:
                score["words"] = metrics.recognition_errors(
                    self.recognizer, batch.text[i], texts[i]
                )
            self.scores.append(score)

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """After validation log, save a checkpoint, and export the model if it is the best."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN:
            self.train_objective = float(stage_loss)
            return
        self.scores = [{**score.pop("signal").result(), **score} for score in self.scores]
        self.scores = gather_in_turn(self.scores)
        scores = self._summary()
        if stage == sb.Stage.TEST:
            for train_logger in self.hparams.train_loggers:
                train_logger.log_stats({"stage": "best model"}, valid_stats=scores)
            return
        record = self.log_validation(epoch, {"objective": self.train_objective}, scores)
        for train_logger in self.hparams.train_loggers:
            if rank() == 0 and hasattr(train_logger, "log_example"):
                for name, wavs in self.examples.items():
                    train_logger.log_example(record["update"], name, wavs)
        selection = self._selection(record)
        by = self.hparams.select_by
        if math.isinf(selection) and (self.with_wer or by not in metrics.TEXT_SCORES):
            logger.warning(f"No {by} at this validation, so that its model cannot be the best.")
        if selection <= min(map(self._selection, self.history.validations)) and rank() == 0:
            save_enhancer(self.hparams.output_folder, self.plain_modules["enhancer"])
        self.checkpointer.save_and_keep_only(
            meta={**record, "selection": selection}, min_keys=["selection"], num_to_keep=1
        )

    def _summary(self):
        """Means over the utterances that have a score; how many have none is counted."""
        summary = {}
        for name in ("objective", *self.pool.names):
            summary[name], missing = metrics.mean_score(score[name] for score in self.scores)
            if missing:
                summary[f"{name}_missing"] = missing
        if self.with_wer:
            summary["wer"] = metrics.wer(score.get("words") for score in self.scores)
        likelihood = [score["likelihood"] for score in self.scores if score["likelihood"]]
        if likelihood:
            summary["nll"] = metrics.nll_per_token(likelihood)
            missing = sum(fields["nll"] is None for fields in likelihood)
            if missing:
                summary["nll_missing"] = missing
        return {**summary, **self.added}

    def _selection(self, record):
        """The chosen score as a number to be minimised; infinite where it was not computed."""
        value = record.get(self.hparams.select_by)
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if higher_is_better(self.hparams.select_by) else value
