"""Pre-train a small HuBERT by masked prediction of k-means targets.

    python recipes/pretrain_teacher.py hparams/pretrain_teacher.yaml \\
        --data_folder LibriSpeech --targets_source mfcc

``targets_source`` is ``mfcc`` or any teacher (folder or hub name), e.g. the one that an earlier
round made. The best model so far is in OUTPUT_FOLDER/teacher, ready to be used as
``teacher_source``, ``targets_source`` or ``hubert_weights``; the same command resumes.
"""

import functools
import sys
from pathlib import Path

from pi_finetune.brains.pretraining import PretrainingBrain, load_hubert
from pi_finetune.brains.updates import start_run
from pi_finetune.commands import parse
from pi_finetune.config import build
from pi_finetune.data.checking import check_pairs
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import collate
from pi_finetune.data.targets import MaskedSpeech, make_targets
from pi_finetune.distributed import on_main
from pi_finetune.errors import command


def dataio_prepare(hparams):
    """The masked speech of training and of development, with its targets.

    The main process alone lists the corpus and makes the targets.
    """
    train, valid = (
        on_main(prepare_speech, hparams["data_folder"], hparams[f"{part}_splits"])
        for part in ("train", "valid")
    )
    mixer = interference = None
    if hparams["noise_probability"]:
        mixer = on_main(build, hparams["train_mixer"])
        interference = build(hparams["interference"], mixer=mixer, speech=train)
    if hparams["check_data"]:
        on_main(check_pairs, train, valid, mixer)
    how = {"source": hparams["targets_source"], "layers": hparams["targets_layers"]}
    how |= {"clusters": hparams["clusters"], "seed": hparams["seed"]}
    path = Path(hparams["output_folder"]) / "targets.pt"
    make = functools.partial(make_targets, path=path, **how)
    on_main(make, train, valid)
    targets = make(train, valid)  # reads what was made

    def dataset(manifest, seconds, interference=None):
        masking = (hparams["mask_probability"], hparams["mask_span"])
        return MaskedSpeech(manifest, targets, seconds, *masking, hparams["seed"], interference)

    return (
        dataset(train, hparams["segment_seconds"], interference),
        dataset(valid, hparams["valid_segment_seconds"]),
    )


def pretrain_teacher(experiment="pretrain_teacher", overrides=None, run_opts=None):
    """Pre-train a small HuBERT by masked prediction of k-means targets.

    The best model so far is in output_folder/teacher; the same call resumes the run.

    Arguments
    ---------
    experiment, overrides, run_opts
        As of ``pi_finetune.recipes.train.train``.

    Returns
    -------
    str
        The run folder.
    """
    hparams, run_opts = start_run(
        __file__, experiment, overrides, run_opts, needs=("hubert", "targets_source")
    )
    load_hubert(hparams["hubert"], hparams["hubert_weights"])  # fails before targets are made
    train_data, valid_data = dataio_prepare(hparams)
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
        brain.make_train_loader(train_data, num_workers=workers),
        valid_data,
        valid_loader_kwargs={
            "batch_size": hparams["valid_batch_size"],
            "collate_fn": collate,
            "num_workers": workers,
        },
    )
    return hparams["output_folder"]


@command
def main(argv):
    """The command line."""
    pretrain_teacher(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
