"""Fine-tune a speech enhancer so that a teacher hears in its output what it hears in clean speech.

    python recipes/train.py hparams/soft_dtw.yaml
    python recipes/train.py hparams/mse.yaml --data_folder LibriSpeech --noise_folder DEMAND

Any top-level key of the YAML file can be set on the command line. The run goes
to ``output_folder`` (results/STRATEGY/SEED); the same command resumes it.
"""

import os
import sys
from pathlib import Path

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch

from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.config import load_hparams, refuse_other_settings
from pi_finetune.data.loading import UpdateSampler
from pi_finetune.errors import UserError, command


@command
def main(argv):
    """Run one experiment."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams, resolved = load_hparams(hparams_file, overrides)
    if hparams["updates"] % hparams["valid_every"]:
        raise UserError("updates: must be a multiple of valid_every, so that the end is validated.")

    folder = Path(hparams["output_folder"])
    sb.utils.distributed.run_on_main(refuse_other_settings, args=[folder, resolved])
    sb.create_experiment_directory(experiment_directory=str(folder))
    sb.utils.distributed.run_on_main((folder / "hyperparams.yaml").write_text, args=[resolved])

    brain = EnhancementBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    # One epoch of the Brain is valid_every updates, on all processes together.
    processes = int(os.environ.get("WORLD_SIZE", 1))
    sampler = UpdateSampler(
        len(hparams["train_data"]),
        hparams["valid_every"] * hparams["batch_size"] * brain.grad_accumulation_factor * processes,
        hparams["seed"],
    )
    loader = {"collate_fn": PaddedBatch, "num_workers": hparams["num_workers"]}
    train_loader = brain.make_dataloader(
        hparams["train_data"],
        stage=sb.Stage.TRAIN,
        sampler=sampler,
        batch_size=hparams["batch_size"],
        **loader,
    )
    brain.train_sampler = brain.train_sampler or sampler
    valid_loader = {"batch_size": hparams["valid_batch_size"], **loader}
    brain.fit(
        hparams["epoch_counter"], train_loader, hparams["valid_data"],
        valid_loader_kwargs=valid_loader,
    )  # fmt: skip
    if brain.test_only:
        brain.evaluate(hparams["valid_data"], min_key="selection", test_loader_kwargs=valid_loader)


if __name__ == "__main__":
    main(sys.argv[1:])
