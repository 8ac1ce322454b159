"""Measure how much of a teacher, and of the objectives on it, is position instead of content.

    python recipes/probe_position.py hparams/probe_position.yaml \\
        --teacher_source openai/whisper-tiny.en --data_folder LibriSpeech --splits "[dev-clean]"
    python recipes/probe_position.py hparams/probe_position.yaml --diagnostics "[gradients, causal]"

JSON lines and a figure per diagnostic go to OUTPUT_FOLDER/position, where recipes/compare.py
finds them for its report. docs/position.md says what the numbers mean.
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from pi_finetune import diagnostics
from pi_finetune.commands import parse
from pi_finetune.config import build, find_hparams, load_hparams, new, ref
from pi_finetune.diagnostics.gradients import batch_gradients, gradient_agreement
from pi_finetune.distributed import start_processes
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import UserError, command
from pi_finetune.files import write_text
from pi_finetune.objectives import RepresentationObjective
from pi_finetune.recipes.train import dataio_prepare, load_pretrained, train
from pi_finetune.report.position import summary_rows, write_figures
from pi_finetune.report.tables import markdown

DIAGNOSTICS = ("shift", "similarity", "probe", "share", "gradients", "causal")


def probe(experiment="probe_position", overrides=None, run_opts=None):
    """Measure how much of a teacher, and of the objectives on it, is position instead of content.

    JSON lines and a figure per diagnostic go to position/ in output_folder, where compare finds
    them for its report. docs/position.md says what the numbers mean.

    Arguments
    ---------
    experiment, overrides, run_opts
        As of ``pi_finetune.recipes.train.train``.

    Returns
    -------
    Path
        The folder of the lines and figures.
    """
    run_opts = start_processes(run_opts)
    hparams, resolved = load_hparams(
        find_hparams(experiment), overrides, needs=("diagnostics", "shifts")
    )
    wanted = hparams["diagnostics"]
    unknown = [name for name in wanted if name not in DIAGNOSTICS]
    if unknown:
        raise UserError(f"diagnostics: no {unknown[0]!r}; choose from {', '.join(DIAGNOSTICS)}.")
    folder = Path(hparams["output_folder"]) / "position"
    device = run_opts.device
    teacher = build(hparams["teacher"]).to(device)
    layers, seed = hparams["layers"], hparams["seed"]
    diagnostics.chosen_layers(teacher, layers)  # a wrong one fails before the first diagnostic
    objectives = {name: load_objective(name, teacher) for name in hparams["objectives"]}
    common = {"layers": layers, "batch_size": hparams["batch_size"]}
    write_text(folder / "hyperparams.yaml", resolved)

    if set(wanted) - {"gradients", "causal"}:
        crops = diagnostics.load_crops(
            hparams["data_folder"],
            hparams["splits"],
            hparams["segment_seconds"],
            hparams["utterances"],
            seed,
        )
        crops = crops._replace(wavs=crops.wavs.to(device))
    for name in tqdm(wanted, desc="diagnostics", disable=run_opts.noprogressbar):
        if name == "shift":
            curve = diagnostics.shift_curve(
                teacher, crops.wavs, hparams["shifts"], seed=seed, **common
            )
            write(folder / "shift.jsonl", curve)
        elif name == "similarity":
            curve, headline = diagnostics.content_free_similarity(
                teacher, crops.wavs, hparams["far_seconds"], **common
            )
            write(folder / "similarity.jsonl", curve)
            write(folder / "similarity_summary.jsonl", headline)
        elif name == "probe":
            write(
                folder / "probe.jsonl",
                diagnostics.position_probe(teacher, crops.wavs, seed=seed, **common),
            )
        elif name == "share":
            move = (hparams["far_seconds"], hparams["moved_by"])
            shares = diagnostics.objective_share(
                teacher, objectives, crops, *move, seed=seed, **common
            )
            write(folder / "share.jsonl", shares)
        elif name == "gradients":
            write(folder / "gradients.jsonl", gradients(hparams, device))
        else:
            write(folder / "causal.jsonl", causal(hparams, folder / "causal", device))

    header, rows = summary_rows(folder)
    if rows:
        print(markdown(header, rows))
    for path in write_figures(folder):
        print(path)
    return folder


def strategy_file(name):
    """The file of a strategy: ``hparams/NAME.yaml``, or a path that ends in ``.yaml``."""
    try:
        return find_hparams(Path(name).resolve() if str(name).endswith(".yaml") else name)
    except UserError as error:
        raise UserError(f"objectives: {error}") from None


def load_objective(name, teacher):
    """The representation objective that a strategy's file declares, with this teacher."""
    path = strategy_file(name)
    hparams, _ = load_hparams(path)
    declared = diagnostics.representation_objective(hparams["objective"])
    if declared is None:
        raise UserError(f"objectives: {path} compares no representations, so leave it out.")
    return RepresentationObjective(
        teacher, declared.distance, declared.perturbation, declared.perturbed_branch
    )


def gradients(hparams, device):
    """The agreement of the objectives' gradients at the enhancer that training starts from."""
    batches = hparams["gradient_batches"]
    settings = {**hparams["training"], "asr_source": None, "select_by": "objective"}
    if "updates" in settings:  # nothing is trained or validated here
        settings["valid_every"] = settings["updates"]
    found = {}
    for name in hparams["gradient_objectives"]:
        path = strategy_file(name)
        loaded, _ = load_hparams(path, settings)
        modules = load_pretrained(loaded)
        found[path.stem] = batch_gradients(
            modules["objective"],
            modules["enhancer"],
            dataio_prepare(loaded)[0],
            batches,
            loaded["batch_size"],
            loaded["seed"],
            loaded["max_grad_norm"],
            device,
        )
    return gradient_agreement(found, hparams["seed"])


def targets_overrides(path, targets, offset_seconds):
    """What an arm of the causal test changes in a strategy: its targets, and its name."""
    objective = ref("representation")
    if targets != "matched":
        objective = new(
            "pi_finetune.diagnostics.MismatchedTargets",
            objective=objective,
            offset_seconds=offset_seconds if targets == "mismatched_moved" else 0.0,
        )
    return {"strategy": f"{path.stem}-{targets}", "objective": objective}


def causal(hparams, folder, device):
    """Train every arm and compare its objective on dev mixtures before and after."""
    settings = {**hparams["training"], "results_folder": str(folder), "asr_source": None}
    # One validation, at the end: the model that is kept is the last one, chosen by nothing.
    settings |= {"select_by": "objective", "valid_every": settings["updates"]}
    records = []
    for name in hparams["causal_objectives"]:
        path = strategy_file(name)
        losses = {}
        for targets in diagnostics.TARGETS:
            changed = targets_overrides(path, targets, hparams["causal_offset_seconds"])
            changed = {**settings, **changed}
            arm, _ = load_hparams(path, changed)
            modules = load_pretrained(arm)
            _, valid_data = dataio_prepare(arm)
            held_out = {"pairs": valid_data, "batch_size": arm["valid_batch_size"]}
            held_out |= {"seed": arm["data_seed"], "device": device}
            before = diagnostics.held_out_losses(
                modules["objective"], modules["enhancer"], **held_out
            )
            # What is finished is not trained again.
            run = train(path, changed, {"device": device, "noprogressbar": True})
            after = diagnostics.held_out_losses(
                modules["objective"], load_enhancer(run), **held_out
            )
            losses[targets] = before, after
        common = {"objective": path.stem, "updates": settings["updates"]}
        falls = diagnostics.falls_of_matched(losses, hparams["seed"])
        records += [{**common, **record} for record in falls]
        write(folder.parent / "causal.jsonl", records)
    return records


def write(path, records):
    """JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


@command
def main(argv):
    """The command line."""
    probe(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
