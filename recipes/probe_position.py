"""Measure how much of a teacher, and of the objectives on it, is position instead of content.

    python recipes/probe_position.py hparams/probe_position.yaml \\
        --teacher_source openai/whisper-tiny.en --data_folder LibriSpeech --splits "[dev-clean]"
    python recipes/probe_position.py hparams/probe_position.yaml --diagnostics "[gradients, causal]"

JSON lines and a figure per diagnostic go to OUTPUT_FOLDER/position, where recipes/compare.py
finds them for its report. docs/position.md says what the numbers mean.
"""

import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import ruamel.yaml
import speechbrain as sb
from tqdm import tqdm

from pi_finetune import diagnostics
from pi_finetune.config import load_hparams
from pi_finetune.diagnostics.gradients import batch_gradients, gradient_agreement
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import UserError, command
from pi_finetune.report.position import summary_rows, write_figures
from pi_finetune.report.tables import markdown

DIAGNOSTICS = ("shift", "similarity", "probe", "share", "gradients", "causal")


@command
def main(argv):
    """Run the chosen diagnostics one after the other."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    hparams, resolved = load_hparams(hparams_file, overrides)
    wanted = hparams["diagnostics"]
    unknown = [name for name in wanted if name not in DIAGNOSTICS]
    if unknown:
        raise UserError(f"diagnostics: no {unknown[0]!r}; choose from {', '.join(DIAGNOSTICS)}.")
    folder = Path(hparams["output_folder"]) / "position"
    device = run_opts.get("device") or "cpu"
    teacher = hparams["teacher"].to(device)
    layers, seed = hparams["layers"], hparams["seed"]
    diagnostics.chosen_layers(teacher, layers)  # a wrong one fails before the first diagnostic
    objectives = {name: diagnostics.load_objective(name, teacher) for name in hparams["objectives"]}
    common = {"layers": layers, "batch_size": hparams["batch_size"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.yaml").write_text(resolved)

    if set(wanted) - {"gradients", "causal"}:
        crops = diagnostics.load_crops(
            hparams["data_folder"],
            hparams["splits"],
            hparams["segment_seconds"],
            hparams["utterances"],
            seed,
        )
        crops = crops._replace(wavs=crops.wavs.to(device))
    for name in tqdm(wanted, desc="diagnostics", disable=run_opts.get("noprogressbar")):
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


def gradients(hparams, device):
    """The agreement of the objectives' gradients at the enhancer that training starts from."""
    batches = hparams["gradient_batches"]
    if batches < 3:
        raise UserError(f"gradient_batches: needed are 3 or more, got {batches}.")
    # What else a training file declares is not needed here.
    settings = {**hparams["training"], "asr_source": None, "select_by": "objective"}
    settings |= dict.fromkeys(("valid_data", "checkpointer", "train_loggers"))
    found = {}
    for name in hparams["gradient_objectives"]:
        path = diagnostics.strategy_file(name)
        loaded, _ = load_hparams(path, settings)
        found[path.stem] = batch_gradients(
            loaded["objective"],
            loaded["enhancer"],
            loaded["train_data"],
            batches,
            loaded["batch_size"],
            loaded["seed"],
            loaded["max_grad_norm"],
            device,
        )
    return gradient_agreement(found, hparams["seed"])


def causal(hparams, folder, device):
    """Train every arm by train.py and compare its objective on dev mixtures before and after."""
    settings = {**hparams["training"], "results_folder": str(folder), "asr_source": None}
    # One validation, at the end: the model that is kept is the last one, chosen by nothing.
    settings |= {"select_by": "objective", "valid_every": settings["updates"]}
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name in hparams["causal_objectives"]:
        losses = {}
        for targets in diagnostics.TARGETS:
            text = diagnostics.causal_yaml(name, targets, hparams["causal_offset_seconds"])
            path = folder / f"{diagnostics.strategy_file(name).stem}-{targets}.yaml"
            path.write_text(text)
            arm, _ = load_hparams(path, {**settings, "train_loggers": []})
            held_out = {"pairs": arm["valid_data"], "batch_size": arm["valid_batch_size"]}
            held_out |= {"seed": arm["data_seed"], "device": device}
            before = diagnostics.held_out_losses(arm["objective"], arm["enhancer"], **held_out)
            arguments = [str(path), "--device", device, "--noprogressbar"]
            for key, value in settings.items():
                arguments += [f"--{key}", flow(value)]
            train(arguments)
            after = diagnostics.held_out_losses(
                arm["objective"], load_enhancer(arm["output_folder"]), **held_out
            )
            losses[targets] = before, after
        stem = diagnostics.strategy_file(name).stem
        common = {"objective": stem, "updates": settings["updates"]}
        falls = diagnostics.falls_of_matched(losses, hparams["seed"])
        records += [{**common, **record} for record in falls]
        write(folder.parent / "causal.jsonl", records)
    return records


def train(arguments):
    """Run the training recipe in this process; what is finished is not trained again."""
    path = Path(__file__).with_name("train.py")
    spec = importlib.util.spec_from_file_location("train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments)


def flow(value):
    """A value as it is typed on the command line."""
    stream = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.default_flow_style, yaml.width = True, 10**6
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n").strip()


def write(path, records):
    """JSON lines, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


if __name__ == "__main__":
    main(sys.argv[1:])
