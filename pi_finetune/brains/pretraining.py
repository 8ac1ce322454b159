"""The Brain that pre-trains a small HuBERT by masked prediction of cluster targets."""

import json
import os
import shutil
import time
from pathlib import Path

import speechbrain as sb
import torch
import torch.nn.functional as F
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from pi_finetune.data.loading import sample_lengths
from pi_finetune.errors import UserError
from pi_finetune.teacher import quiet_transformers, standardised


class PretrainingBrain(sb.Brain):
    """Trains ``modules.hubert`` and the linear layer ``modules.head`` to name hidden frames.

    The loss is the cross entropy at masked frames plus ``unmasked_weight`` times that at the
    others (HuBERT, equation 3, with weights that need not sum to one). An epoch is ``valid_every``
    updates.

    From YAML it uses: ``output_folder, lr_schedule, valid_every, unmasked_weight, train_logger``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.history = History()
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("history", self.history)

    def compute_forward(self, batch, stage):
        """Logits [B, F, clusters]."""
        batch = batch.to(self.device)
        lengths = sample_lengths(batch.wav)
        wavs = standardised(batch.wav.data, lengths)
        padding = None
        if (lengths < wavs.shape[1]).any():
            padding = torch.arange(wavs.shape[1], device=wavs.device) < lengths[:, None]
        hidden = self.modules.hubert(
            wavs,
            attention_mask=None if padding is None else padding.long(),
            mask_time_indices=batch.mask.data.bool(),
        ).last_hidden_state
        return self.modules.head(hidden)

    def compute_objectives(self, logits, batch, stage):
        """Weighted cross entropy; counts correct frames on the way."""
        targets, mask = batch.targets.data, batch.mask.data.bool()
        frames = (batch.targets.lengths * targets.shape[1]).round().long()
        valid = torch.arange(targets.shape[1], device=targets.device) < frames[:, None]
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        correct = logits.detach().argmax(-1) == targets
        loss = 0.0
        for part, chosen, weight in (
            ("masked", valid & mask, 1.0),
            ("unmasked", valid & ~mask, self.hparams.unmasked_weight),
        ):
            count = int(chosen.sum())
            if count == 0:
                continue
            total = losses[chosen].sum()
            loss = loss + weight * total / count
            sums = self.sums[part]
            sums += torch.tensor([count, float(total.detach()), int(correct[chosen].sum())])
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate from the number of updates made, which a resume knows."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def check_loss_isfinite(self, loss):
        """Stop at once: SpeechBrain would make the step."""
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of update {self.optimizer_step + 1} is not finite: lower lr. "
                "The last checkpoint is intact."
            )

    def on_stage_start(self, stage, epoch=None):
        """Start the counts and the clock."""
        self.sums = {"masked": torch.zeros(3), "unmasked": torch.zeros(3)}
        self.started = time.monotonic()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """After validation log, save a checkpoint, and export the model if it is the best."""
        stats = {"loss": float(stage_loss)}
        for part, (count, loss, correct) in self.sums.items():
            stats[f"{part}_loss"] = float(loss / count.clamp(min=1))
            stats[f"{part}_accuracy"] = float(correct / count.clamp(min=1))
        if stage == sb.Stage.TRAIN:
            self.history.seconds += time.monotonic() - self.started
            self.train_stats = stats
            return
        if not sb.utils.distributed.if_main_process():
            return
        meta = {
            "update": epoch * self.hparams.valid_every,
            "seconds": round(self.history.seconds),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.hparams.train_logger.log_stats(meta, self.train_stats, stats)
        folder = Path(self.hparams.output_folder)
        self.history.validations.append({**meta, **stats})
        self.history.write(folder / "valid.jsonl")
        best = max(line["masked_accuracy"] for line in self.history.validations)
        if stats["masked_accuracy"] == best:
            export_teacher(self.modules.hubert, folder / "teacher")
        self.checkpointer.save_and_keep_only(
            meta={**meta, **stats}, max_keys=["masked_accuracy"], num_to_keep=1
        )


@register_checkpoint_hooks
class History:
    """Training seconds and validations so far; part of every checkpoint."""

    def __init__(self):
        self.seconds = 0.0
        self.validations = []

    def write(self, path):
        """One validation a line, as JSON."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.validations))
        os.replace(temporary, path)

    @mark_as_saver
    def _save(self, path):
        Path(path).write_text(json.dumps(vars(self)))

    @mark_as_loader
    def _load(self, path, end_of_epoch):
        vars(self).update(json.loads(Path(path).read_text()))


def export_teacher(hubert: HubertModel, folder) -> None:
    """Write ``hubert`` as fp16 safetensors with its configs; replaces the files of ``folder``.

    ``transformers.AutoModel`` and :class:`~pi_finetune.teacher.Teacher` both load the folder.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    half = HubertModel(hubert.config)
    half.load_state_dict(getattr(hubert, "module", hubert).state_dict())  # DDP wraps it
    with quiet_transformers():
        half.half().save_pretrained(temporary)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(
        temporary
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in temporary.iterdir():  # file by file: a README beside them stays
        os.replace(file, folder / file.name)
    temporary.rmdir()
