"""Whatever needs a GPU, in one command of at most ten minutes: `make gpu`.

    python benchmarks/gpu.py --output build/gpu

Runs the GPU tests, the soft-DTW kernels beside other libraries, a training step in float32 and
bfloat16, and 100 updates of a real run with its evaluation; each as a process of its own, which is
ended when its share of the time is over. Writes gpu.json and gpu.md: what passed, and the end of
what each of them printed. Exits with 1 if anything failed, with 2 if there is no GPU.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pi_finetune.files import write_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEERS = ("maghoumi", "bgu", "ddtw", "pysdtw", "nzxyin", "torchsoftdtw")


def steps(output):
    """(name, arguments of Python, seconds) of everything to run; 600 seconds in all."""
    step = ["benchmarks/train_step.py", "--device", "cuda"]
    run = output / "run"
    return [
        ("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/soft_dtw/test_gpu.py"], 150),
        ("kernels", ["benchmarks/soft_dtw.py", "--device", "cuda", "--against", *PEERS,
                     "--json", str(output / "soft_dtw.json"),
                     "--csv", str(output / "soft_dtw.csv")], 120),
        ("train step, float32", [*step, "--precision", "fp32"], 60),
        ("train step, bfloat16", [*step, "--precision", "bf16"], 60),
        ("100 updates", ["recipes/train.py", "hparams/soft_dtw.yaml",
                         "--results_folder", str(run),
                         "--updates", "100", "--device", "cuda"], 120),
        ("evaluation", ["recipes/evaluate.py", "hparams/evaluate.yaml",
                        "--run", f"[noisy, pretrained, {run}/soft_dtw/1234]"], 90),
    ]  # fmt: skip


def execute(name, arguments, seconds):
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        outcome, text = "passed" if done.returncode == 0 else "failed", done.stdout
    except subprocess.TimeoutExpired as expired:
        outcome, text = f"not done in {seconds} s", expired.stdout or ""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return {
        "name": name,
        "command": " ".join(["python", *arguments]),
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "output": text[-4000:],
    }


def page(result):
    """The results as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [f"# On {result['device']}", "", f"{result['date']}, {versions}.", ""]
    lines += ["| | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['outcome']} | {r['seconds']} |" for r in result["steps"]]
    for r in result["steps"]:
        lines += ["", f"## {r['name']}", "", f"`{r['command']}`", "", "```", r["output"], "```"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("build/gpu"))
    output = parser.parse_args().output.resolve()
    if not torch.cuda.is_available():
        print("error: no GPU that PyTorch can use; nothing was run", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "device": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "CUDA": str(torch.version.cuda)},
        "steps": [],
    }
    for step in steps(output):
        print(f"== {step[0]}", flush=True)
        result["steps"].append(execute(*step))
        print(result["steps"][-1]["outcome"], flush=True)
        write_text(output / "gpu.json", json.dumps(result, indent=1) + "\n")
        write_text(output / "gpu.md", page(result))
    return int(any(r["outcome"] != "passed" for r in result["steps"]))


if __name__ == "__main__":
    sys.exit(main())
