"""Time and memory of enhancing files, against their length.

    python benchmarks/inference.py
    python benchmarks/inference.py --minutes 1 5 15 60 --model results/soft_dtw/1234 --json FILE

Each length is a process of its own, so that its peak memory is its own. The file is noise at
16 kHz, whose content does not matter to the time; loading the model is timed apart. The real-time
factor is processing time over duration.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(model, seconds, rate, threads, device):
    """Enhance one file; one process each."""
    import numpy as np
    import soundfile
    import torch

    from pi_finetune.inference import Enhancer

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.wav"), Path(folder, "out.wav")
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(source, "w", rate, 1, "PCM_16") as writer:
            for _ in range(int(seconds)):
                writer.write(0.05 * rng.standard_normal(rate).astype(np.float32))
        loaded = _peak()
        started = time.monotonic()
        enhancer = Enhancer.from_run(model, device=device)
        enhancer.enhance(torch.zeros(rate), rate)  # the first call costs more
        load_seconds, started = time.monotonic() - started, time.monotonic()
        cpu = time.process_time()
        enhancer.enhance_file(source, target)
        elapsed, cpu = time.monotonic() - started, time.process_time() - cpu
    return {
        "minutes": seconds / 60,
        "seconds": round(elapsed, 2),
        "cpu_seconds": round(cpu, 2),
        "real_time_factor": round(elapsed / seconds, 4),
        "cpu_real_time_factor": round(cpu / seconds, 4),
        "load_seconds": round(load_seconds, 2),
        "peak_mb": round(_peak() / 1e6),
        "peak_before_loading_mb": round(loaded / 1e6),
        "model": type(enhancer.module).__name__,
        "device": str(enhancer.device),
        "torch": torch.__version__,
    }


def _peak():
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main():
    """Measure every length, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, nargs="+", default=[1, 5, 15], help="lengths (%(default)s)")
    add("--model", metavar="RUN_OR_HUB", help="default: the shipped model")
    add("--rate", type=int, default=16000, help="of the files, in Hz (%(default)s)")
    add("--threads", type=int, default=1, help="of PyTorch (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        settings = (options.rate, options.threads, options.device)
        print(json.dumps(measure(options.model, options.child, *settings)))
        return
    results, load = [], os.getloadavg()[0]
    print("minutes   time s   CPU s    RTF   CPU RTF   peak MB   of which before the model")
    for minutes in options.minutes:
        command = [sys.executable, *sys.argv, "--child", str(60 * minutes)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: {minutes:g} min failed, see above")
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        print(
            f"{minutes:7g} {result['seconds']:8.1f} {result['cpu_seconds']:7.1f} "
            f"{result['real_time_factor']:6.3f} {result['cpu_real_time_factor']:9.3f} "
            f"{result['peak_mb']:9d} {result['peak_before_loading_mb']:9d}",
            flush=True,
        )
    if options.json:
        from soft_dtw import processor

        from pi_finetune.files import write_text

        about = {
            "command": " ".join(["python", *sys.argv]),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "rate": options.rate,
            "load_before": load,  # other work on the machine
            "python": platform.python_version(),
        }
        write_text(options.json, json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
