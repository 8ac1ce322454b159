"""Fine-tune, evaluate and compare every strategy on the shipped corpus, in minutes on a CPU.

    python recipes/demo.py

Stages whose result is there and was made with the same settings are not run
again; an interrupted demo continues where it was.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

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


def main():
    """Run the stages as the commands a user would type, and show each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_folder", default="results/demo")
    folder = Path(parser.parse_args().output_folder)
    started = time.monotonic()
    inputs = digest()

    for i, strategy in enumerate(STRATEGIES, start=1):
        run = folder / strategy / str(SEED)
        stage(
            f"[{i}/{len(STRATEGIES)}] fine-tuning with {strategy}",
            run / "demo.json",
            inputs,
            ["recipes/train.py", f"hparams/{strategy}.yaml", *TRAINING,
             "--seed", str(SEED), "--results_folder", str(folder)],
        )  # fmt: skip
    runs = ["noisy", "pretrained", *(str(folder / s / str(SEED)) for s in STRATEGIES)]
    stage(
        f"evaluating {len(runs)} systems on the test set",
        folder / "evaluation.json",
        inputs,
        ["recipes/evaluate.py", "hparams/evaluate.yaml", "--run", json.dumps(runs),
         "--results_folder", str(folder), "--overwrite", "True"],
    )  # fmt: skip
    stage(
        "comparing",
        None,
        inputs,
        ["recipes/compare.py", str(folder), "--output_folder", str(folder), "--html"],
    )
    print(f"\nDone in {time.monotonic() - started:.0f} s. Report: {folder / 'report.html'}")


def stage(title, stamp, inputs, command):
    """Run a command unless its stamp says that it was run with these inputs."""
    print(f"== {title}", flush=True)
    made_by = {"command": command, "inputs": inputs}
    if stamp is not None and stamp.exists() and json.loads(stamp.read_text()) == made_by:
        print("   up to date", flush=True)
        return
    started = time.monotonic()
    code = subprocess.call(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    if code:
        sys.exit(f"error: this stage failed: python {' '.join(command)}")
    if stamp is not None:
        temporary = stamp.with_name(stamp.name + ".tmp")
        temporary.write_text(json.dumps(made_by))
        os.replace(temporary, stamp)
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


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
