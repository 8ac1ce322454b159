"""The Brain that pre-trains a small HuBERT by masked prediction of cluster targets."""

import json
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
import torch.nn.functional as F
from transformers import HubertModel, Wav2Vec2FeatureExtractor

from pi_finetune.brains.updates import UpdateBrain
from pi_finetune.distributed import mean_over_processes, rank
from pi_finetune.errors import UserError
from pi_finetune.files import replacing_files
from pi_finetune.teacher import Teacher, quiet_transformers, standardised

__all__ = ["PretrainingBrain", "export_teacher"]


class PretrainingBrain(UpdateBrain):
    """Trains ``modules.hubert`` and the linear layer ``modules.head`` to name hidden frames.

    The loss is the cross entropy at masked frames plus ``unmasked_weight`` times that at the
    others (HuBERT, equation 3, with weights that need not sum to one).

    From YAML it uses, besides what :class:`UpdateBrain` does: ``unmasked_weight``.
    """

    def compute_forward(self, batch: Any, stage: sb.Stage) -> Any:
        """Logits [B, F, clusters]."""
        batch = batch.to(self.device)
        wavs = standardised(batch.wav)
        padded = bool((batch.wav.lengths < wavs.shape[1]).any())
        hidden = self.modules.hubert(
            wavs,
            attention_mask=batch.wav.mask().long() if padded else None,
            mask_time_indices=batch.mask.data.bool(),
        ).last_hidden_state
        return self.modules.head(hidden)

    def compute_objectives(self, logits: Any, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Weighted cross entropy; counts correct frames on the way."""
        targets, mask = batch.targets.data, batch.mask.data.bool()
        valid = batch.targets.mask()
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        correct = logits.detach().argmax(-1) == targets
        loss = losses.new_zeros(())
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

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start the counts."""
        super().on_stage_start(stage, epoch)
        self.sums = {"masked": torch.zeros(3), "unmasked": torch.zeros(3)}

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """After validation log, save a checkpoint, and export the model if it is the best."""
        super().on_stage_end(stage, stage_loss, epoch)
        stats = {"loss": float(stage_loss)}
        for part, sums in self.sums.items():
            count, loss, correct = mean_over_processes(sums)
            stats[f"{part}_loss"] = float(loss / count.clamp(min=1))
            stats[f"{part}_accuracy"] = float(correct / count.clamp(min=1))
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            return
        record = self.log_validation(epoch, self.train_stats, stats)
        best = max(line["masked_accuracy"] for line in self.history.validations)
        if stats["masked_accuracy"] == best and rank() == 0:
            export_teacher(
                self.plain_modules["hubert"], Path(self.hparams.output_folder) / "teacher"
            )
        self.checkpointer.save_and_keep_only(
            meta=record, max_keys=["masked_accuracy"], num_to_keep=1
        )


def load_hubert(hubert: HubertModel, source: str | None) -> None:
    """Load weights into ``hubert`` in place, to start pre-training from them.

    Arguments
    ---------
    hubert : HubertModel
        Every shape must fit.
    source : str or None
        As of :class:`~pi_finetune.teacher.Teacher`. None leaves the weights as they are.

    Raises
    ------
    UserError
        The source cannot be loaded, or is a model of another family or shape.
    """
    if source is None:
        return
    teacher = Teacher(source)
    weights = teacher.encoder.state_dict()
    own, found = (
        {key: list(value.shape) for key, value in state.items()}
        for state in (hubert.state_dict(), weights)
    )
    faults = [
        f"{key} is {found.get(key, 'missing')} and should be {own.get(key, 'missing')}"
        for key in sorted({*own, *found})
        if own.get(key) != found.get(key)
    ]
    if faults:
        raise UserError(
            f"hubert_weights: {source} (a {teacher.family} model) does not fit the model that "
            f"config describes: {len(faults)} tensors differ, first: {faults[0]}."
        )
    hubert.load_state_dict(weights)


def export_teacher(hubert: HubertModel, folder: str | Path) -> None:
    """Write ``hubert`` as bfloat16 safetensors with its configs; replaces the files of ``folder``.

    ``transformers.AutoModel`` and :class:`~pi_finetune.teacher.Teacher` both load the folder, in
    float32. Of the two half precisions bfloat16 is the one whose files can be compressed.
    """
    half = HubertModel(hubert.config)
    half.load_state_dict(hubert.state_dict())
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    with replacing_files(folder) as temporary:
        with quiet_transformers():
            half.bfloat16().save_pretrained(temporary)
        # What a model is loaded as: transformers writes there what it is stored as.
        config = json.loads((temporary / "config.json").read_text()) | {"dtype": "float32"}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        extractor.save_pretrained(temporary)
