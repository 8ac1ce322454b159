"""Fine-tune, evaluate and compare every strategy on the shipped corpus, in minutes on a CPU.

    python recipes/demo.py

Stages whose result is there and was made with the same settings are not run
again; an interrupted demo continues where it was.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pi_finetune.errors import UserError, command
from pi_finetune.files import write_text

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = [
    "si_sdr",
    "mse",
    "zero_pad",
    "soft_dtw",
    "soft_dtw_no_speed",
    "speed_mse",
    "zero_pad_soft_dtw",
]
TRAINING = ["--updates", "60", "--valid_every", "20", "--segment_seconds", "2.0"]
SEED = 1234


@command
def main(argv=None):
    """Run the stages as the commands a user would type, and show each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_folder", default="results/demo")
    arguments = parser.parse_args(argv)
    if not (ROOT / "assets" / "mini").is_dir():
        raise UserError(
            "The demo needs the mini corpus, which an installed package leaves out for its size: "
            "run it in a clone of the project."
        )
    # The stages run in the project's folder, as their commands are printed.
    folder = Path(os.path.relpath(arguments.output_folder, ROOT))
    os.chdir(ROOT)
    started = time.monotonic()
    inputs = digest()

    for i, strategy in enumerate(STRATEGIES, start=1):
        stage(
            f"[{i}/{len(STRATEGIES)}] fine-tuning with {strategy}",
            folder / strategy / str(SEED),
            inputs,
            ["recipes/train.py", f"hparams/{strategy}.yaml", *TRAINING,
             "--seed", str(SEED), "--results_folder", str(folder)],
        )  # fmt: skip
    for system in ("noisy", "pretrained", *STRATEGIES):
        trained = system in STRATEGIES
        run = folder / system / (str(SEED) if trained else "0")
        stage(
            f"evaluating {system}",
            run / "scores" if trained else run,
            inputs,
            ["recipes/evaluate.py", "hparams/evaluate.yaml", "--results_folder", str(folder),
             "--run", str(run) if trained else system],
        )  # fmt: skip
    print("== comparing", flush=True)
    run_python(["recipes/compare.py", str(folder), "--output_folder", str(folder), "--html"])
    print(f"\nDone in {time.monotonic() - started:.0f} s. Report: {folder / 'report.html'}")


def stage(title, folder, inputs, command):
    """Run a command, unless ``folder`` holds its result, made with these inputs.

    What was made with other inputs is removed first; what was interrupted is continued.
    """
    print(f"== {title}", flush=True)
    stamp = folder / "demo.json"
    state = json.loads(stamp.read_text()) if stamp.exists() else {}
    if state.get("command") != command or state.get("inputs") != inputs:
        if stamp.exists():  # else it is not the demo's to remove
            shutil.rmtree(folder)
    elif state["complete"]:
        print("   up to date", flush=True)
        return
    started = time.monotonic()
    for complete in (False, True):
        if complete:
            run_python(command)
        made_by = {"command": command, "inputs": inputs, "complete": complete}
        write_text(stamp, json.dumps(made_by))
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def run_python(command):
    """Run a recipe; end the demo if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.call([sys.executable, *command], env=environment):
        sys.exit(f"error: this stage failed: python {shlex.join(command)}")


def digest():
    """Of the code, settings and assets that a result depends on."""
    total = hashlib.sha256()
    for part in ("pi_finetune", "hparams", "assets", "recipes"):
        for path in sorted((ROOT / part).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
