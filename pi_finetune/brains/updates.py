"""What the Brains of this project share: training is counted in updates and survives bad ones."""

import json
import math
import os
import time
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks

from pi_finetune.config import load_hparams, refuse_other_settings
from pi_finetune.data.loading import UpdateSampler
from pi_finetune.errors import UserError
from pi_finetune.files import write_text

logger = sb.utils.logger.get_logger(__name__)


def start_run(argv):
    """Read a recipe's command line, and open its run folder.

    Returns
    -------
    (dict, dict)
        Hyperparameters, and SpeechBrain's run options.

    Raises
    ------
    UserError
        The settings are wrong, or the folder holds a run with others.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams, resolved = load_hparams(hparams_file, overrides)
    if hparams["updates"] % hparams["valid_every"]:
        raise UserError("updates: must be a multiple of valid_every, so that the end is validated.")
    folder = Path(hparams["output_folder"])
    sb.utils.distributed.run_on_main(refuse_other_settings, args=[folder, resolved])
    sb.create_experiment_directory(experiment_directory=str(folder))
    sb.utils.distributed.run_on_main((folder / "hyperparams.yaml").write_text, args=[resolved])
    return hparams, run_opts


class NonFiniteStep(Exception):
    """The loss or the gradient of this update is not finite."""


@register_checkpoint_hooks
class History:
    """Training seconds, skipped updates and validations so far; part of every checkpoint."""

    def __init__(self):
        self.seconds = 0.0  # validation excluded
        self.skipped = 0
        self.validations = []

    @mark_as_saver
    def _save(self, path):
        Path(path).write_text(json.dumps(vars(self)))

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        vars(self).update(json.loads(Path(path).read_text()))


class UpdateBrain(sb.Brain):
    """A Brain whose epoch is ``valid_every`` updates, so that all runs compare on one axis.

    Every validation adds a line to ``valid.jsonl``. A step with a non-finite loss or gradient is
    skipped (SpeechBrain makes it) and counted; too many in a row end the training with an error.

    From YAML it uses: ``output_folder, seed, lr_schedule, valid_every, batch_size,
    nonfinite_patience, train_loggers``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.optimizer_step_limit is not None:  # SpeechBrain 1.1 reads it as a string
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self.history = History()
        self.skipped_in_a_row = 0
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("history", self.history)

    def make_train_loader(self, dataset, **loader_kwargs):
        """A loader that goes through ``dataset`` in shuffled passes, cut into epochs of updates."""
        # valid_every updates on all processes together
        processes = int(os.environ.get("WORLD_SIZE", 1))
        items = self.hparams.batch_size * self.grad_accumulation_factor * processes
        sampler = UpdateSampler(len(dataset), self.hparams.valid_every * items, self.hparams.seed)
        loader = self.make_dataloader(
            dataset,
            stage=sb.Stage.TRAIN,
            sampler=sampler,
            batch_size=self.hparams.batch_size,
            collate_fn=PaddedBatch,
            **loader_kwargs,
        )
        self.train_sampler = self.train_sampler or sampler
        return loader

    def init_optimizers(self):
        """Give the optimiser the trainable parameters only."""
        self.optimizer = self.opt_class([p for p in self.modules.parameters() if p.requires_grad])
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

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
            self.history.skipped += 1
            self.skipped_in_a_row += 1
            logger.warning(
                f"Update skipped: {reason} on utterances {batch.id} "
                f"({self.skipped_in_a_row} in a row, {self.history.skipped} in all)."
            )
            if self.skipped_in_a_row > self.nonfinite_patience:
                raise UserError(
                    f"{self.skipped_in_a_row} updates in a row had {reason}, the last on "
                    f"utterances {batch.id}. Lower lr (raise gamma, with soft-DTW), or look for "
                    "broken audio among them; nonfinite_patience sets how many are allowed. The "
                    "last checkpoint is intact."
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

    def on_stage_start(self, stage, epoch=None):
        """Start the clock of an epoch."""
        self.started = time.monotonic()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Stop the clock of a training epoch."""
        if stage == sb.Stage.TRAIN:
            self.history.seconds += time.monotonic() - self.started

    def log_validation(self, epoch, train, scores):
        """Log a validation everywhere.

        Arguments
        ---------
        epoch : int
        train, scores : dict
            Of the training epoch and of the validation; None values are not logged.

        Returns
        -------
        dict
            The record that was added to ``history.validations`` and ``valid.jsonl``.
        """
        meta = {
            "update": epoch * self.hparams.valid_every,
            "seconds": round(self.history.seconds, 2),
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_updates": self.history.skipped,
        }
        logged = {name: value for name, value in scores.items() if value is not None}
        for train_logger in self.hparams.train_loggers:
            train_logger.log_stats(meta, train, logged)
        record = {**meta, **{f"train_{name}": value for name, value in train.items()}, **scores}
        self.history.validations.append(record)
        if sb.utils.distributed.if_main_process():
            lines = "".join(json.dumps(line) + "\n" for line in self.history.validations)
            write_text(Path(self.hparams.output_folder) / "valid.jsonl", lines)
        return record
