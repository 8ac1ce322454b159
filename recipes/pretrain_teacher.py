"""Pre-train a small HuBERT by masked prediction of k-means targets.

    python recipes/pretrain_teacher.py hparams/pretrain_teacher.yaml \\
        --data_folder LibriSpeech --targets_source mfcc

``targets_source`` is ``mfcc`` or any teacher (folder or hub name). The best model so far is in
OUTPUT_FOLDER/teacher, ready to be used as ``teacher_source``; the same command resumes.
"""

import os
import sys
from pathlib import Path

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch

from pi_finetune.brains.pretraining import PretrainingBrain
from pi_finetune.config import load_hparams
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import UpdateSampler
from pi_finetune.data.targets import MaskedSpeech, make_targets
from pi_finetune.errors import UserError, command


@command
def main(argv):
    """Run one pre-training."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams, resolved = load_hparams(hparams_file, overrides)
    if hparams["updates"] % hparams["valid_every"]:
        raise UserError("updates: must be a multiple of valid_every, so that the end is validated.")
    train = prepare_speech(hparams["data_folder"], hparams["train_splits"])
    valid = prepare_speech(hparams["data_folder"], hparams["valid_splits"])

    folder = Path(hparams["output_folder"])
    sb.create_experiment_directory(experiment_directory=str(folder))
    (folder / "hyperparams.yaml").write_text(resolved)
    how = {"source": hparams["targets_source"], "layers": hparams["targets_layers"]}
    how |= {"clusters": hparams["clusters"], "seed": hparams["seed"]}
    path = folder / "targets.pt"
    # The main process makes the targets; the others then read them.
    sb.utils.distributed.run_on_main(
        make_targets, args=[train, valid], kwargs={**how, "path": path}
    )
    targets = make_targets(train, valid, path=path, **how)

    def dataset(manifest, seconds):
        masking = (hparams["mask_probability"], hparams["mask_span"])
        return MaskedSpeech(manifest, targets, seconds, *masking, hparams["seed"])

    brain = PretrainingBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    # One epoch of the Brain is valid_every updates, on all processes together.
    updates = hparams["valid_every"] * brain.grad_accumulation_factor
    processes = int(os.environ.get("WORLD_SIZE", 1))
    train_data = dataset(train, hparams["segment_seconds"])
    sampler = UpdateSampler(
        len(train_data), updates * hparams["batch_size"] * processes, hparams["seed"]
    )
    loader = {"collate_fn": PaddedBatch, "num_workers": hparams["num_workers"]}
    train_loader = brain.make_dataloader(
        train_data,
        stage=sb.Stage.TRAIN,
        sampler=sampler,
        batch_size=hparams["batch_size"],
        **loader,
    )
    brain.train_sampler = brain.train_sampler or sampler
    brain.fit(
        hparams["epoch_counter"],
        train_loader,
        dataset(valid, hparams["valid_segment_seconds"]),
        valid_loader_kwargs={"batch_size": hparams["valid_batch_size"], **loader},
    )


if __name__ == "__main__":
    main(sys.argv[1:])
