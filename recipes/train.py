"""Fine-tune a speech enhancer so that a teacher hears in its output what it hears in clean speech.

    python recipes/train.py hparams/soft_dtw.yaml
    python recipes/train.py hparams/mse.yaml --data_folder LibriSpeech --noise_folder DEMAND

Any top-level key of the YAML file can be set on the command line. The run goes
to ``output_folder`` (results/STRATEGY/SEED); the same command resumes it.
"""

import logging
import sys

from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.brains.updates import start_run
from pi_finetune.commands import parse
from pi_finetune.config import build
from pi_finetune.data.checking import check_pairs
from pi_finetune.distributed import on_main
from pi_finetune.enhancers import load_weights
from pi_finetune.errors import command
from pi_finetune.objectives import load_teachers, measure_projections

logger = logging.getLogger(__name__)


def dataio_prepare(hparams):
    """The noisy/clean pairs of training and of development.

    The corpus is listed by the main process alone.
    """
    train_data, valid_data = (on_main(build, hparams[key]) for key in ("train_data", "valid_data"))
    manifests = [getattr(data, "manifest", {}) for data in (train_data, valid_data)]
    shared = len(manifests[0].keys() & manifests[1].keys())
    if shared:
        logger.warning(
            f"{shared} of {len(manifests[1])} dev utterances are trained on too: dev scores will "
            "look better than they are. Name others by --valid_splits; a data_folder that is one "
            "file, or hf:NAME:SPLIT, has but one split."
        )
    return train_data, valid_data


def load_pretrained(hparams):
    """Make the models that the experiment declares, and load their weights: ``modules``."""
    modules = {name: build(module) for name, module in hparams["modules"].items()}
    load_weights(modules["enhancer"], hparams["enhancer_weights"])
    load_teachers(modules["objective"])
    hparams["recognizers"] = build(hparams["recognizers"])
    return modules


def train(experiment, overrides=None, run_opts=None):
    """Fine-tune an enhancer so that a teacher hears in its output what it hears in clean speech.

    The run goes to output_folder (results/STRATEGY/SEED); the same call resumes it.

    Arguments
    ---------
    experiment : str or Path
        An experiment file, or the name of a shipped one.
    overrides : dict, optional
        Values of its top-level keys.
    run_opts : dict, optional
        SpeechBrain's run options, e.g. ``{"device": "cuda"}``.

    Returns
    -------
    str
        The run folder.
    """
    hparams, run_opts = start_run(
        __file__, experiment, overrides, run_opts, needs=("train_data", "enhancer")
    )
    train_data, valid_data = dataio_prepare(hparams)
    if hparams["check_data"]:
        on_main(check_pairs, train_data, valid_data)
    modules = load_pretrained(hparams)
    hparams["checkpointer"].add_recoverable("enhancer", modules["enhancer"])
    if any(parameter.requires_grad for parameter in modules["objective"].parameters()):
        hparams["checkpointer"].add_recoverable("objective", modules["objective"])
    brain = EnhancementBrain(
        modules=modules,
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    measure_projections(modules["objective"], train_data, hparams["output_folder"])
    workers = hparams["num_workers"]
    valid_loader = brain.make_valid_loader(
        valid_data, batch_size=hparams["valid_batch_size"], num_workers=workers
    )
    brain.fit(
        hparams["epoch_counter"],
        brain.make_train_loader(train_data, num_workers=workers),
        valid_loader,
    )
    if brain.test_only:
        brain.evaluate(valid_loader, min_key="selection")
    return hparams["output_folder"]


@command
def main(argv):
    """The command line."""
    train(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
