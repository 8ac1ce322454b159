"""Run an ablation, strategies x teachers x seeds, and compare: tables and a report per teacher.

    python recipes/ablate.py hparams/ablation.yaml
    python recipes/ablate.py hparams/ablation.yaml --workers 4 --strategies "[mse, soft_dtw]"
    python recipes/ablate.py hparams/ablation.yaml --cluster slurm --workers null

The same command continues after an interruption and skips what is finished.
"""

import json
import logging
import sys

import submitit

from pi_finetune.ablation import Ablation, run_cells
from pi_finetune.commands import parse
from pi_finetune.config import find_hparams, load_hparams
from pi_finetune.errors import command
from pi_finetune.files import write_text
from pi_finetune.recipes.compare import compare


def ablate(experiment="ablation", overrides=None, run_opts=None):
    """Run an ablation, strategies x teachers x seeds, and compare: tables and a report per teacher.

    Searches each strategy's learning rate on dev, trains, evaluates and compares. The same call
    continues after an interruption and skips what is finished.

    Arguments
    ---------
    experiment : str or Path
        An experiment file, or the name of a shipped one.
    overrides : dict, optional
        Values of its top-level keys.
    run_opts : dict, optional
        Not used: those of the trainings go into ``train``.

    Returns
    -------
    dict
        ``{folder: reason}`` of the cells that failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hparams, resolved = load_hparams(
        find_hparams(experiment), overrides, needs=("strategies", "lrs", "cluster")
    )
    ablation = Ablation(hparams)
    ablation.results.mkdir(parents=True, exist_ok=True)
    write_text(ablation.results / "ablation.yaml", resolved)

    executor = submitit.AutoExecutor(ablation.results / "logs", cluster=hparams["cluster"])
    executor.update_parameters(
        cpus_per_task=hparams["cpus_per_worker"], **hparams["cluster_parameters"]
    )
    failed = run_cells(
        ablation.cells(),
        executor,
        hparams["workers"],
        hparams["cpus_per_worker"],
        hparams["retries"],
    )

    chosen = {}
    for teacher, strategy in ablation.groups:
        needs = ablation.searches[teacher, strategy].values()
        if not any(need.folder in failed for need in needs):
            rate, scores = ablation.learning_rate(teacher, strategy)
            chosen[f"{teacher}/{strategy}"] = {"lr": rate, hparams["select_by"]: scores}
    write_text(ablation.results / "learning_rates.json", json.dumps(chosen, indent=1))
    for runs, options in ablation.comparisons():
        compare(runs, **options)
    for folder, reason in failed.items():
        print(f"failed: {folder}: {reason}", file=sys.stderr)
    return failed


@command
def main(argv):
    """The command line; the exit status is 1 if a cell failed."""
    return 1 if ablate(*parse(argv)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
