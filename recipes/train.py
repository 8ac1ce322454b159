"""Fine-tune a speech enhancer so that a teacher hears in its output what it hears in clean speech.

    python recipes/train.py hparams/soft_dtw.yaml
    python recipes/train.py hparams/mse.yaml --data_folder LibriSpeech --noise_folder DEMAND

Any top-level key of the YAML file can be set on the command line. The run goes
to ``output_folder`` (results/STRATEGY/SEED); the same command resumes it.
"""

import sys

from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.brains.updates import start_run
from pi_finetune.errors import command


@command
def main(argv):
    """Run one experiment."""
    hparams, run_opts = start_run(argv)
    brain = EnhancementBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    workers = hparams["num_workers"]
    valid_loader = brain.make_valid_loader(
        hparams["valid_data"], batch_size=hparams["valid_batch_size"], num_workers=workers
    )
    brain.fit(
        hparams["epoch_counter"],
        brain.make_train_loader(hparams["train_data"], num_workers=workers),
        valid_loader,
    )
    if brain.test_only:
        brain.evaluate(valid_loader, min_key="selection")


if __name__ == "__main__":
    main(sys.argv[1:])
