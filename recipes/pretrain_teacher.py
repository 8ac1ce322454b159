"""Pre-train a small HuBERT by masked prediction of k-means targets.

    python recipes/pretrain_teacher.py hparams/pretrain_teacher.yaml \\
        --data_folder LibriSpeech --targets_source mfcc

``targets_source`` is ``mfcc`` or any teacher (folder or hub name). The best model so far is in
OUTPUT_FOLDER/teacher, ready to be used as ``teacher_source``; the same command resumes.
"""

import sys
from pathlib import Path

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch

from pi_finetune.brains.pretraining import PretrainingBrain
from pi_finetune.brains.updates import start_run
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.targets import MaskedSpeech, make_targets
from pi_finetune.errors import command


@command
def main(argv):
    """Run one pre-training."""
    hparams, run_opts = start_run(argv)
    train = prepare_speech(hparams["data_folder"], hparams["train_splits"])
    valid = prepare_speech(hparams["data_folder"], hparams["valid_splits"])

    how = {"source": hparams["targets_source"], "layers": hparams["targets_layers"]}
    how |= {"clusters": hparams["clusters"], "seed": hparams["seed"]}
    path = Path(hparams["output_folder"]) / "targets.pt"
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
    workers = hparams["num_workers"]
    brain.fit(
        hparams["epoch_counter"],
        brain.make_train_loader(dataset(train, hparams["segment_seconds"]), num_workers=workers),
        dataset(valid, hparams["valid_segment_seconds"]),
        valid_loader_kwargs={
            "batch_size": hparams["valid_batch_size"],
            "collate_fn": PaddedBatch,
            "num_workers": workers,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
