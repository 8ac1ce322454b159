"""Time soft-DTW, forward and backward through the cost to both inputs, beside other libraries.

    python benchmarks/soft_dtw.py --shapes S M L --against tslearn pysdtw --json FILE

All run in one process and take turns, so that what else the machine does falls on all of them;
compare figures of one run only. "products" is the floor of the usual way to a gradient: the three
matrix products of a squared Euclidean cost (x y', E y and E' x) and nothing else. Others are given
the same cost through one product, where their own would materialise [B, N, M, D]. The gradient
error is that of the first pair's gradient for x, relative to its largest entry, against float64.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pi_finetune.soft_dtw import soft_dtw

SHAPES = {"S": (8, 150, 150, 768), "M": (8, 500, 450, 768), "L": (16, 1000, 900, 768)}


def squared_distances(x, y):
    squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
    return torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Implementations: a function of gamma that returns a function (x, y) -> losses [B]


def ours(backend):
    return lambda gamma: lambda x, y: soft_dtw(x, y, gamma=gamma, backend=backend)


def tslearn(gamma):
    from tslearn.metrics import SoftDTWLossPyTorch

    return SoftDTWLossPyTorch(gamma=gamma, dist_func=squared_distances)


def pysdtw(gamma):
    from pysdtw import SoftDTW

    return SoftDTW(gamma=gamma, dist_func=squared_distances, use_cuda=torch.cuda.is_available())


def maghoumi(gamma):
    from dtw_loss_functions.soft_dtw_implementations.soft_dtw_cuda_mag import SoftDTW

    return SoftDTW(torch.cuda.is_available(), gamma=gamma, dist_func=squared_distances)


def bgu(gamma):
    from dtw_loss_functions.soft_dtw_implementations.soft_dtw_cuda_ron import SoftDTW

    return SoftDTW(gamma=gamma)


def ddtw(gamma):
    from ddtw.ddtw_variants import SDTW

    backend = "cuda_cpp" if torch.cuda.is_available() else "cpu_numba"
    loss = SDTW(gamma=gamma, backend=backend, normalization="none")
    return lambda x, y: loss(C=squared_distances(x, y)) * len(x)  # it returns the mean


OURS = {f"pi_finetune ({name})": ours(name) for name in ("cpu", "triton", "reference")}
PEERS = {f.__name__: f for f in (tslearn, pysdtw, maghoumi, bgu, ddtw)}
PACKAGES = {"maghoumi": "dtw_loss_functions", "bgu": "dtw_loss_functions"}


# --------------------------------------------------------------------------------------------------
# Measuring


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device, call):
    """MB taken at most during `call` beyond what was there before it; None where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
        call()
        return (status("VmHWM") - before) / 1e3
    except (OSError, AttributeError):  # not Linux
        return None


def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])


def exact_gradient(x, y, gamma):
    """Gradient for x [N, D] of one pair, in float64 by the reference."""
    x, y = x[None].double().cpu().requires_grad_(), y[None].double().cpu()
    return torch.autograd.grad(soft_dtw(x, y, gamma=gamma, backend="reference"), x)[0][0]


def measure(names, shape, gamma, repeats, device):
    B, N, M, D = shape
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(B, N, D), dim=-1).to(device).requires_grad_()
    y = torch.nn.functional.normalize(torch.randn(B, M, D), dim=-1).to(device).requires_grad_()
    e = torch.rand(B, N, M, device=device)
    exact = exact_gradient(x.detach()[0], y.detach()[0], gamma)

    def products():
        with torch.no_grad():
            torch.bmm(x, y.transpose(1, 2)), torch.bmm(e, y), torch.bmm(e.transpose(1, 2), x)

    def run(loss):
        def call():
            x.grad = y.grad = None
            loss(x, y).sum().backward()

        return call

    calls, rows = {"products": products}, {}
    for name in names:
        try:
            call = run({**OURS, **PEERS}[name](gamma))
            call()  # compiles
        except Exception as error:
            print(f"{name}: left out, {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        calls[name] = call
    for name, call in calls.items():
        x.grad = y.grad = None
        rows[name] = {"memory_mb": peak_memory(device, call), "times": []}
        if name != "products":
            error = (x.grad[0].double().cpu() - exact).abs().max() / exact.abs().max()
            rows[name]["gradient_error"] = float(error)
    for _ in range(repeats):
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            rows[name]["times"].append((time.perf_counter() - start) * 1e3)
    return rows


def summary(rows):
    floor = statistics.median(rows["products"]["times"])
    for name, row in rows.items():
        times = row.pop("times")
        low, middle, high = statistics.quantiles(times, n=4)
        yield {
            "name": name,
            "median_ms": round(middle, 3),
            "quartiles_ms": [round(low, 3), round(high, 3)],
            "to_products": round(middle / floor, 3),
            **{k: v if v is None else float(f"{v:.4g}") for k, v in row.items()},
        }


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(names):
    packages = {"torch", "numba", "numpy", "triton", *(PACKAGES.get(n, n) for n in names)}
    found = {}
    for package in sorted(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(result):
    """Print a results file as it was printed when it was made."""
    print(f"{result['device']}, {result['threads']} threads, gamma {result['gamma']}, ", end="")
    print(", ".join(f"{package} {version}" for package, version in result["versions"].items()))
    for label, part in result["shapes"].items():
        show_shape(label, part)


def show_shape(label, part):
    load = "" if part["load_before"] is None else f", load average {part['load_before']:.1f}"
    print(f"\n{label}: B, N, M, D = {', '.join(map(str, part['B, N, M, D']))}{load}\n")
    print("| | median ms | quartiles ms | to products | peak MB | gradient error |")
    print("|---|---|---|---|---|---|")
    for row in part["results"]:
        low, high = row["quartiles_ms"]
        memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
        error = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        print(
            f"| {row['name']} | {row['median_ms']:.1f} | {low:.1f} to {high:.1f} "
            f"| {row['to_products']:.2f} | {memory} | {error} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["S", "M", "L"], help="S, M, L or B,N,M,D")
    parser.add_argument("--against", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gamma", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reference", action="store_true", help="also time the plain reference")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--show", type=pathlib.Path, help="print a results file and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        return show(json.loads(arguments.show.read_text()))

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    names = ["pi_finetune (triton)" if device.type == "cuda" else "pi_finetune (cpu)"]
    names += ["pi_finetune (reference)"] * arguments.reference + arguments.against
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": arguments.threads,
        "versions": versions(arguments.against),
        "gamma": arguments.gamma,
        "repeats": arguments.repeats,
        "dtype": "float32",
        "shapes": {},
    }
    show(result)
    for label in arguments.shapes:
        shape = SHAPES.get(label) or tuple(map(int, label.split(",")))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        rows = list(summary(measure(names, shape, arguments.gamma, arguments.repeats, device)))
        part = {"B, N, M, D": shape, "load_before": load, "results": rows}
        result["shapes"][label] = part
        show_shape(label, part)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
