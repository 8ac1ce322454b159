"""Run an ablation, strategies x teachers x seeds, and compare: tables and a report per teacher.

    python recipes/ablate.py hparams/ablation.yaml
    python recipes/ablate.py hparams/ablation.yaml --workers 4 --strategies "[mse, soft_dtw]"
    python recipes/ablate.py hparams/ablation.yaml --cluster slurm --workers null

The same command continues after an interruption and skips what is finished.
"""

import json
import logging
import sys

import speechbrain as sb
import submitit

from pi_finetune.ablation import Ablation, run_cells, run_recipe
from pi_finetune.config import load_hparams
from pi_finetune.errors import command
from pi_finetune.files import write_text


@command
def main(argv):
    """Search learning rates, train, evaluate and compare."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hparams_file, _, overrides = sb.parse_arguments(argv)
    hparams, resolved = load_hparams(hparams_file, overrides)
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
    for comparison in ablation.comparisons():
        run_recipe(comparison)
    for folder, reason in failed.items():
        print(f"failed: {folder}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
