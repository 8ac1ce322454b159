"""What the Brains of this project share: training is counted in updates and survives bad ones."""

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch.utils.data import DataLoader, Subset

from pi_finetune import settings
from pi_finetune.config import build, check_needs, find_hparams, keys, load_hparams, resolve
from pi_finetune.data.loading import ShareOfSampler, UpdateBatchSampler, UpdateSampler, collate
from pi_finetune.distributed import (
    mean_over_processes,
    on_main,
    processes,
    rank,
    start_processes,
)
from pi_finetune.errors import DivergedError, UserError
from pi_finetune.files import json_number, write_text
from pi_finetune.run_folder import SETTINGS_FILE, Lock, open_run
from pi_finetune.run_folder import session as describe_session

if TYPE_CHECKING:
    from speechbrain.utils.run_opts import RunOptions

__all__ = ["History", "UpdateBrain", "start_run"]


logger = sb.utils.logger.get_logger(__name__)


def start_run(
    recipe: str,
    experiment: str | Path,
    overrides: dict | None = None,
    run_opts: dict | None = None,
    needs: Sequence[str] = (),
) -> "tuple[dict, RunOptions]":
    """Load an experiment, and open its run folder: settings, checkpoints and logs.

    The folder is locked until the end of ``fit``.

    Arguments
    ---------
    recipe : str
        The recipe's file, of which the folder keeps a copy.
    experiment : str or Path
        An experiment file, or the name of a shipped one.
    overrides : dict, optional
        Values of its keys.
    run_opts : dict, optional
        SpeechBrain's run options, e.g. ``{"device": "cuda"}``. One that is a key of the file too
        is an override of it.
    needs : sequence of str
        Keys that the recipe reads, besides those of every training.

    Returns
    -------
    (dict, speechbrain.utils.run_opts.RunOptions)
        Hyperparameters, with ``checkpointer`` and ``train_loggers`` made; and the run options.

    Raises
    ------
    UserError
        The settings are wrong, or the folder holds a run with others or is in use.
    """
    path, given = find_hparams(experiment), dict(run_opts or {})
    needs = ("output_folder", "checkpointer", *needs)
    check_needs(path, needs)  # before values are asked for
    for key, value in given.items():
        settings.check_value(key, value)
    shared = {key: given[key] for key in keys(path) if key in given}
    overrides = {**(overrides or {}), **shared}
    run_opts = start_processes(given)
    if run_opts.debug and not run_opts.debug_persistently:
        folder = Path(settings.read(resolve(path, overrides))["output_folder"])
        if any(folder.glob("save/CKPT*")):  # a few updates must not replace a run's results
            overrides["output_folder"] = str(folder / "debug")
    hparams, resolved = load_hparams(path, overrides)
    folder = Path(hparams["output_folder"])
    lock = Lock(folder / ".lock", "a training")
    on_main(lock.acquire)
    try:
        session = describe_session(given, run_opts.device)
        record = on_main(open_run, folder, functools.partial(resolve, path), overrides, session)
        sb.create_experiment_directory(experiment_directory=str(folder))
        on_main(_keep_recipe, folder, recipe)
        if not record.resumed:
            on_main(write_text, folder / SETTINGS_FILE, resolved)
        for key in ("checkpointer", "train_loggers"):
            hparams[key] = build(hparams[key])
    except (FileExistsError, NotADirectoryError) as error:
        lock.release()
        raise UserError(
            f"{error.filename} cannot be a folder: a file of that name is in the way."
        ) from None
    except BaseException:
        lock.release()
        raise
    return {**hparams, "run_record": record, "run_lock": lock}, run_opts


def _keep_recipe(folder, recipe):
    """Keep the recipe; SpeechBrain copied its caller, which is this module."""
    (folder / Path(__file__).name).unlink(missing_ok=True)
    shutil.copy(recipe, folder)


class NonFiniteStep(Exception):
    """The loss or the gradient of this update is not finite."""


@register_checkpoint_hooks
class History:
    """Training seconds, skipped updates and validations so far; part of every checkpoint.

    Arguments
    ---------
    batches_per_update : list of int
        Processes, and batches accumulated on each. Their place in the data is counted in both, so
        a checkpoint made with others is refused.
    """

    def __init__(self, batches_per_update: Sequence[int] = (1, 1)):
        self.batches_per_update = list(batches_per_update)
        self.seconds = 0.0  # validation excluded
        # Of the stretch of training under way, on this process's clock.
        self.started: float | None = None
        self.skipped = 0
        self.finite_losses = 0.0  # of the epoch under way, each counted with its weight
        self.validations: list = []

    def start(self) -> None:
        """Training goes on from here."""
        self.started = time.monotonic()

    def stop(self) -> None:
        """It rests: validation, or the end."""
        self.seconds, self.started = self.seconds_so_far(), None

    def seconds_so_far(self) -> float:
        """Training seconds, with those of the stretch under way."""
        running = 0.0 if self.started is None else time.monotonic() - self.started
        return self.seconds + running

    @mark_as_saver
    def _save(self, path):
        # A checkpoint within an epoch must not lose the seconds since the epoch's start.
        saved = {**vars(self), "seconds": self.seconds_so_far()}
        del saved["started"]
        Path(path).write_text(json.dumps(saved))

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        saved = json.loads(Path(path).read_text())
        before = saved.get("batches_per_update", self.batches_per_update)
        if before != self.batches_per_update:
            raise UserError(
                f"{path}: the run was started with {before[0]} processes and "
                f"--grad_accumulation_factor {before[1]}; now they are "
                f"{self.batches_per_update[0]} and {self.batches_per_update[1]}. Continue it as it "
                "was started, or give this run another place with --results_folder."
            )
        vars(self).update(saved)


class UpdateBrain(sb.Brain):
    """A Brain whose epoch is ``valid_every`` updates, so that all runs compare on one axis.

    Every validation adds a line to ``valid.jsonl``. A step with a non-finite loss or gradient is
    skipped (SpeechBrain makes it) and counted; too many in a row end the training with an error.
    An update is the mean over its utterances, however they are spread over batches and processes.

    From YAML it uses: ``output_folder, seed, lr_schedule, valid_every, batch_size,
    nonfinite_patience, train_loggers``.
    """

    optimizer_step_limit: Any  # set by SpeechBrain

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.optimizer_step_limit is not None:  # SpeechBrain 1.1 reads it as a string
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        #: Modules as they were given, neither compiled nor wrapped for several processes.
        self.plain_modules = dict(self.modules.items())
        self.history = History([processes(), self.grad_accumulation_factor])
        self.skipped_in_a_row = 0
        self.spoilt: str | None = None  # why the update under way must be skipped
        self.equal_batches = True
        self.weight = 1.0  # of the batch under way: its utterances, where batches differ in them
        self.update_weight = 0.0  # of the batches of the update so far
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("history", self.history)

    def make_train_loader(self, dataset: Any, **loader_kwargs: Any) -> Any:
        """A loader that goes through ``dataset`` in shuffled passes, cut into epochs of updates.

        Each process has its share: batch b of process r of P is made of items that one process
        with a batch P times as large would have had in its batch b.
        """
        self._check_data("train", dataset)
        # SpeechBrain's make_dataloader would wrap the sampler in its own DistributedSampler, which
        # lists an epoch beforehand and shuffles batches once more.
        batches = self.hparams.valid_every * self.grad_accumulation_factor * processes()
        max_seconds: float | None = getattr(self.hparams, "max_batch_seconds", None)
        self.equal_batches = max_seconds is None
        if max_seconds is None:
            sampler = UpdateSampler(
                len(dataset), batches * self.hparams.batch_size, self.hparams.seed
            )
            how = {"batch_size": self.hparams.batch_size}
        else:
            sampler = UpdateBatchSampler(
                dataset.seconds(), batches, self.hparams.seed, max_seconds, self.hparams.batch_size
            )
            how = {}
        self.train_sampler = ShareOfSampler(sampler, rank(), processes())
        how["sampler" if how else "batch_sampler"] = self.train_sampler
        loader = sb.dataio.dataloader.make_dataloader(
            dataset, collate_fn=collate, **how, **loader_kwargs
        )
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("dataloader-TRAIN", loader)
        return loader

    def make_valid_loader(self, dataset: Any, **loader_kwargs: Any) -> Any:
        """A loader of this process's share of ``dataset``, in order.

        Scores are put back in the order of ``dataset`` by
        :func:`pi_finetune.distributed.gather_in_turn`.
        """
        self._check_data("valid", dataset)
        if processes() > 1:
            dataset = Subset(dataset, range(rank(), len(dataset), processes()))
        return DataLoader(dataset, collate_fn=collate, **loader_kwargs)

    def _check_data(self, part, dataset):
        record = getattr(self.hparams, "run_record", None)
        if record is not None:
            record.check_data(part, dataset)

    def on_fit_start(self) -> None:
        """Resume, and note in the run folder from where and with what."""
        super().on_fit_start()
        done = self.optimizer_step
        if done > getattr(self.hparams, "updates", math.inf):
            raise UserError(
                f"updates: {self.hparams.updates}, but the run in {self.hparams.output_folder} "
                f"made {done} already. Set updates to {done} or more."
            )
        record = getattr(self.hparams, "run_record", None)
        if record is not None and not self.debug:
            on_main(record.write, done)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """As SpeechBrain's; a loader worker that died is an error one can read."""
        try:
            super().fit(*args, **kwargs)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that loads data died ({str(error).splitlines()[0]}). Most often the "
                "system ended it for want of memory: lower num_workers, batch_size or "
                "valid_batch_size. The last checkpoint is intact; the same command continues."
            ) from error
        finally:
            lock = getattr(self.hparams, "run_lock", None)
            if lock is not None:
                lock.release()

    @contextlib.contextmanager
    def no_sync(self, use: bool = True) -> Any:
        """As SpeechBrain's, which leaves synchronisation off for ever after an exception."""
        wrapped = [m for m in self.modules.values() if hasattr(m, "require_backward_grad_sync")]
        before = [module.require_backward_grad_sync for module in wrapped]
        try:
            for module in wrapped if use else []:
                module.require_backward_grad_sync = False
            yield
        finally:
            for module, value in zip(wrapped, before):
                module.require_backward_grad_sync = value

    def init_optimizers(self) -> None:
        """Give the optimiser the trainable parameters only."""
        self.optimizer = self.opt_class([p for p in self.modules.parameters() if p.requires_grad])
        self.optimizers_dict = {"optimizer": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Set the learning rate from the number of updates made, which a resume knows."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def fit_batch(self, batch: Any) -> torch.Tensor:
        """One step; a non-finite one is skipped, logged and, too often in a row, an error.

        With gradient accumulation one bad batch spoils the update it is part of.
        """
        if not self.equal_batches:
            self.weight = float(len(batch.id))
        try:
            loss = super().fit_batch(batch)
            if self.equal_batches:
                return mean_over_processes(loss)
            total, weight = mean_over_processes(loss.new_tensor([loss * self.weight, self.weight]))
            self.weight = float(weight)  # of the mean, which is what is averaged on
            return total / weight
        except NonFiniteStep as reason:
            self.zero_grad()
            self.spoilt = f"{reason} on utterances {batch.id}"
            if self.step % self.grad_accumulation_factor == 0:
                self._skip()
            return torch.tensor(math.nan)

    def _skip(self):
        self.zero_grad()
        self.update_weight = 0.0
        self.history.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(
            f"Update skipped: {self.spoilt} "
            f"({self.skipped_in_a_row} in a row, {self.history.skipped} in all)."
        )
        if self.skipped_in_a_row > self.nonfinite_patience:
            raise DivergedError(
                f"{self.skipped_in_a_row} updates in a row had {self.spoilt} (the last). The last "
                "checkpoint is intact: continue with a lower --lr or a higher "
                "--nonfinite_patience, or look for broken audio among them. With soft-DTW a larger "
                "gamma is steadier; that is another run, with another --results_folder."
            )
        self.spoilt = None

    def check_loss_isfinite(self, loss: torch.Tensor) -> None:
        """Called by ``fit_batch`` before the backward pass."""
        # All processes must agree to skip: what is not finite in one is not in the mean.
        if not torch.isfinite(mean_over_processes(loss.detach())):
            raise NonFiniteStep("a non-finite loss")
        if not self.equal_batches:
            # SpeechBrain and DDP take plain means over batches: each is weighted here, and their
            # sum of weights is taken out again before the step.
            weight = self.weight
            loss.register_hook(lambda gradient: gradient * weight)
            self.update_weight += weight

    def optimizers_step(self) -> None:
        """Clip and step, unless the update is spoilt or its gradient not finite."""
        if self.spoilt is not None:
            self._skip()
            return
        if not self.equal_batches:
            weight = float(mean_over_processes(torch.tensor(self.update_weight)))
            for parameter in self.modules.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.grad_accumulation_factor / weight
            self.update_weight = 0.0
        if not self.scaler.is_enabled():
            gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                raise NonFiniteStep("a non-finite gradient")
        scale = self.scaler.get_scale()
        super().optimizers_step()
        if self.scaler.get_scale() < scale:  # fp16: the scaler made no step and lowered its scale
            self.optimizer_step -= 1
            self.history.skipped += 1
            return
        self.skipped_in_a_row = 0

    def update_average(self, loss: torch.Tensor, avg_loss: float) -> float:
        """The weighted mean of the finite losses, NaN without any; SpeechBrain's begins at 0."""
        if not math.isfinite(loss):
            return avg_loss if self.history.finite_losses else math.nan
        before = avg_loss if self.history.finite_losses else 0.0
        self.history.finite_losses += self.weight
        return before + (float(loss) - before) * self.weight / self.history.finite_losses

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start the clock of a training epoch."""
        if stage == sb.Stage.TRAIN:
            self.history.start()

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Stop the clock of a training epoch, and begin a new average of the loss."""
        self.history.finite_losses = 0.0
        if stage == sb.Stage.TRAIN:
            self.history.stop()

    def log_validation(self, epoch: int | None, train: dict, scores: dict) -> dict:
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
        record = {
            name: json_number(value) if isinstance(value, float) else value
            for name, value in record.items()
        }
        self.history.validations.append(record)
        if sb.utils.distributed.if_main_process():
            lines = "".join(
                json.dumps(line, allow_nan=False) + "\n" for line in self.history.validations
            )
            write_text(Path(self.hparams.output_folder) / "valid.jsonl", lines)
        return record
