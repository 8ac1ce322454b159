"""The Brain that fine-tunes an enhancer. What it optimises is declared in YAML."""

import json
import math
import os
import time
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

from pi_finetune import metrics
from pi_finetune.data.loading import sample_lengths
from pi_finetune.enhancers import save_enhancer
from pi_finetune.errors import UserError
from pi_finetune.seeding import utterance_rng

#: Scores by which the best model can be chosen; the others are better when lower.
HIGHER_IS_BETTER = ("si_sdr", "pesq", "stoi", "estoi")


class NonFiniteStep(Exception):
    """The loss or the gradient of this update is not finite."""


class EnhancementBrain(sb.Brain):
    """Fine-tunes ``modules.enhancer`` by ``modules.objective``.

    An epoch is ``valid_every`` updates (see :class:`~pi_finetune.data.loading.UpdateSampler`), and
    every validation adds a line to ``valid.jsonl``, so that runs compare on one axis.

    From YAML it uses: ``output_folder, seed, data_seed, lr_schedule, valid_every, wer_every,
    recognizers, select_by, nonfinite_patience, train_loggers``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recognizer = next(iter(self.hparams.recognizers), None)
        if self.hparams.select_by == "wer" and self.recognizer is None:
            raise UserError("select_by: wer needs a recogniser; set asr_source or select_by.")
        if self.debug:
            for module in self.modules.objective.modules():
                if hasattr(module, "check_values"):
                    module.check_values()
        self.progress = Progress()
        self.skipped_in_a_row = 0
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("progress", self.progress)

    def compute_forward(self, batch, stage):
        """Enhance the noisy waveforms: [B, T], and their lengths [B] in samples."""
        batch = batch.to(self.device)
        lengths = sample_lengths(batch.noisy)
        return self.modules.enhancer(batch.noisy.data, lengths), lengths

    def compute_objectives(self, predictions, batch, stage):
        """Mean over the batch of the objective; validation also scores each utterance."""
        enhanced, lengths = predictions
        training = stage == sb.Stage.TRAIN
        seed = self.hparams.seed if training else self.hparams.data_seed
        rngs = [
            utterance_rng(seed, data_pass, utterance, "perturbation")
            for utterance, data_pass in zip(batch.id, batch.data_pass.tolist())
        ]
        losses = self.modules.objective(enhanced, batch.clean.data, lengths, rngs)
        if not training:
            self._score(enhanced, batch, lengths, losses)
        return losses.mean()

    # Updates. SpeechBrain steps on a NaN loss and counts per epoch; here the step is skipped.

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate from the number of updates made, which a resume knows."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def fit_batch(self, batch):
        """One step; a non-finite one is skipped, logged and, too often in a row, an error."""
        try:
            loss = super().fit_batch(batch)
            self.skipped_in_a_row = 0
            return loss
        except NonFiniteStep as reason:
            self.zero_grad()
            self.progress.skipped += 1
            self.skipped_in_a_row += 1
            sb.utils.logger.get_logger(__name__).warning(
                f"Update skipped: {reason} on utterances {batch.id} "
                f"({self.skipped_in_a_row} in a row, {self.progress.skipped} in all)."
            )
            if self.skipped_in_a_row > self.nonfinite_patience:
                raise UserError(
                    f"{self.skipped_in_a_row} updates in a row had {reason}, the last on "
                    f"utterances {batch.id}. Lower lr, raise gamma, or look for broken audio among "
                    "them; nonfinite_patience sets how many are allowed. The last checkpoint is "
                    "intact."
                ) from None
            return torch.tensor(math.nan)

    def check_loss_isfinite(self, loss):
        """Called by ``fit_batch`` before the backward pass."""
        finite = torch.isfinite(loss.detach()).float()
        if torch.distributed.is_initialized():  # all processes must agree to skip
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise NonFiniteStep("a non-finite loss")

    def optimizers_step(self):
        """Clip and step, unless the gradient is not finite (GradScaler sees to that itself)."""
        if not self.scaler.is_enabled():
            gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                raise NonFiniteStep("a non-finite gradient")
        super().optimizers_step()

    def init_optimizers(self):
        """Give the optimiser the trainable parameters only."""
        trainable = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = self.opt_class(trainable)
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    # Validation.

    def on_stage_start(self, stage, epoch=None):
        """Start the clock of a training epoch, or the scores of a validation."""
        if stage == sb.Stage.TRAIN:
            self.started = time.monotonic()
            return
        self.scores = []
        self.with_wer = self.recognizer is not None and (
            epoch is None or epoch % self.hparams.wer_every == 0
        )

    def _score(self, enhanced, batch, lengths, losses):
        texts = [None] * len(lengths)
        if self.with_wer:
            texts = self.recognizer(enhanced, lengths)
        enhanced, clean = enhanced.float().cpu().numpy(), batch.clean.data.cpu().numpy()
        for i, length in enumerate(lengths.tolist()):
            score = metrics.signal_scores(clean[i, :length], enhanced[i, :length])
            score["objective"] = float(losses[i])
            if self.with_wer and batch.text[i] is not None:
                score["words"] = metrics.word_errors(batch.text[i], texts[i])
            self.scores.append(score)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After training note the loss; after validation log, checkpoint, keep the best model."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            self.progress.seconds += time.monotonic() - self.started
            return
        record = self._summary()
        if stage == sb.Stage.TEST:
            self._log({"stage": "best model"}, None, record)
            return
        record = {
            "update": epoch * self.hparams.valid_every,
            "seconds": round(self.progress.seconds, 2),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_objective": float(self.train_loss),
            "skipped_updates": self.progress.skipped,
            **record,
        }
        meta = {k: record[k] for k in ("update", "seconds", "lr", "skipped_updates")}
        scores = {k: v for k, v in record.items() if k not in (*meta, "train_objective")}
        self._log(meta, {"objective": record["train_objective"]}, scores)
        if not sb.utils.distributed.if_main_process():
            return
        history = _append(Path(self.hparams.output_folder) / "valid.jsonl", record)
        selection = self._selection(record)
        if selection <= min(map(self._selection, history)):
            # In the state an earlier run left it, or in the new best one: never in between.
            save_enhancer(self.hparams.output_folder, self._enhancer)
        self.checkpointer.save_and_keep_only(
            meta={**record, "selection": selection}, min_keys=["selection"], num_to_keep=1
        )

    def _summary(self):
        """Means over the utterances that have a score; how many have none is counted."""
        summary = {}
        for name in ("objective", "si_sdr", "pesq", "stoi", "estoi"):
            summary[name], missing = metrics.mean_score(score[name] for score in self.scores)
            if missing:
                summary[f"{name}_missing"] = missing
        if self.with_wer:
            summary["wer"] = metrics.wer(score.get("words") for score in self.scores)
        return summary

    def _selection(self, record):
        """The chosen score as a number to be minimised; infinite where it was not computed."""
        value = record.get(self.hparams.select_by)
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if self.hparams.select_by in HIGHER_IS_BETTER else value

    def _log(self, meta, train, valid):
        for logger in self.hparams.train_loggers:
            logger.log_stats(
                stats_meta=meta,
                train_stats=train,
                valid_stats={k: v for k, v in valid.items() if v is not None},
            )

    @property
    def _enhancer(self):
        return getattr(self.modules.enhancer, "module", self.modules.enhancer)  # DDP wraps it


@register_checkpoint_hooks
class Progress:
    """Training seconds (validation excluded) and skipped updates; part of every checkpoint."""

    def __init__(self):
        self.seconds = 0.0
        self.skipped = 0

    @mark_as_saver
    def _save(self, path):
        Path(path).write_text(json.dumps(vars(self)))

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        vars(self).update(json.loads(Path(path).read_text()))


def _append(path, record):
    """Add a validation to ``valid.jsonl``, dropping later ones of a run that was cut off."""
    history = []
    if path.exists():
        for line in path.read_text().splitlines():
            earlier = json.loads(line)
            if earlier["update"] < record["update"]:
                history.append(earlier)
    history.append(record)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    os.replace(temporary, path)
    return history
