"""Run an ablation, strategies x teachers x seeds, and compare: tables and a report per teacher.

    python recipes/ablate.py hparams/ablation.yaml
    python recipes/ablate.py hparams/ablation.yaml --workers 4 --strategies "[mse, soft_dtw]"
    python recipes/ablate.py hparams/ablation.yaml --cluster slurm --workers null
    python recipes/ablate.py hparams/paper/ablation.yaml --debug

The same command continues after an interruption and skips what is finished.
"""

import json
import logging
import sys
from pathlib import Path

import submitit
from hyperpyyaml.core import recursive_update

from pi_finetune.ablation import Ablation, run_cells
from pi_finetune.commands import parse
from pi_finetune.config import find_hparams, load_hparams
from pi_finetune.errors import UserError, command
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
        ``{"debug": True}`` runs the same with the file's ``debug_settings``, from random weights of
        the architectures that it names. Those of the trainings go into ``train``.

    Returns
    -------
    dict
        ``{folder: reason}`` of the cells that failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path, needs = find_hparams(experiment), ("strategies", "lrs", "cluster")
    hparams, resolved = load_hparams(path, overrides, needs=needs)
    if (run_opts or {}).get("debug"):
        models = Path(hparams["results_folder"], "debug").resolve()
        changes = hparams["debug_settings"]
        recursive_update(changes, overrides or {})
        changes["results_folder"] = str(models)
        hparams, resolved = load_hparams(path, changes)
        with_random_weights(hparams, models / "models")
    if hparams["workers"] == 0:
        raise UserError("workers: got 0, needed is a whole number, 1 or more or null (processes).")
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
            try:
                rate, scores = ablation.learning_rate(teacher, strategy)
            except UserError:  # for which its runs have failed
                continue
            chosen[f"{teacher}/{strategy}"] = {"lr": rate, hparams["select_by"]: scores}
    write_text(ablation.results / "learning_rates.json", json.dumps(chosen, indent=1))
    for runs, options in ablation.comparisons():
        compare(runs, **options)
    for reason in dict.fromkeys(failed.values()):
        folders = ", ".join(str(folder) for folder, why in failed.items() if why == reason)
        print(f"failed: {folders}: {reason}", file=sys.stderr)
    return failed


def with_random_weights(hparams, folder):
    """Let an ablation use random weights: of a HuBERT, and of the enhancer that it fine-tunes.

    Arguments
    ---------
    hparams : dict
        Of the ablation, changed in place.
    folder : Path
        Where the models are written, unless they are there.
    """
    from pi_finetune.enhancers import save_enhancer  # these import much
    from pi_finetune.teacher import save_random_hubert

    teacher, enhancer = folder / "teacher", folder / "enhancer"
    if not (teacher / "config.json").exists():
        save_random_hubert(teacher, **hparams["debug_teacher"])
    name, own = next(iter(hparams["strategies"].items()))
    settings = {**hparams["train"], **own}
    experiment = find_hparams(settings.pop("hparams", name))
    given = {"enhancer": settings["enhancer"]} if "enhancer" in settings else {}
    if not (enhancer / "enhancer.safetensors").exists():
        save_enhancer(enhancer, load_hparams(experiment, given)[0]["enhancer"])
    for each in (hparams["train"], hparams["evaluate"]):
        each["enhancer_weights"] = str(enhancer)
    for each in hparams["teachers"].values():
        each["teacher_source"] = str(teacher)
    for each in hparams["recognizers"].values():
        each["encoder_source"] = str(teacher)


@command
def main(argv):
    """The command line; the exit status is 1 if a cell failed."""
    return 1 if ablate(*parse(argv)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
