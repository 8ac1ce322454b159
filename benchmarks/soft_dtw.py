"""Time soft-DTW, forward and backward through the cost to both inputs, beside other libraries.

    python benchmarks/soft_dtw.py --shapes S M L --against tslearn pysdtw --json FILE
    python benchmarks/soft_dtw.py --base HEAD~1 --against --csv benchmarks/results/soft_dtw.csv
    python benchmarks/soft_dtw.py --page docs/soft_dtw.md     (writes its tables anew, runs nothing)

All take turns in one run, so that what else the machine does falls on all of them; compare figures
of one run only. Nothing is timed before its value and gradient pass: ours has to, another library
is left out with its error. ``--base`` adds an older revision of this project, in a process of
its own from a throw-away worktree. "products" is the floor of the usual way to a gradient: the
three matrix products of a squared Euclidean cost (x y', E y and E' x) and nothing else. Others are
given the same cost through one product, where their own would materialise [B, N, M, D].
``--divergence`` times the divergence instead, beside the nine products of its three problems. The
gradient error is that of the first pair's gradient for x, relative to its largest entry, against
float64.
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch

# A process that times an older revision is told where that is.
sys.path.insert(
    0, os.environ.get("SOFT_DTW_ROOT", str(pathlib.Path(__file__).resolve().parents[1]))
)

from pi_finetune.files import write_text
from pi_finetune.soft_dtw import soft_dtw

PROJECT = pathlib.Path(__file__).resolve().parents[1]
SHAPES = {"S": (8, 150, 150, 768), "M": (8, 500, 450, 768), "L": (16, 1000, 900, 768)}


def squared_distances(x, y):
    squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
    return torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Implementations: a function of gamma that returns a function (x, y) -> losses [B]


def ours(backend):
    def loss(gamma, divergence=False):
        return lambda x, y: soft_dtw(x, y, gamma=gamma, divergence=divergence, backend=backend)

    return loss


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
    return lambda x, y: loss(C=squared_distances(x, y)) * len(x)  # from the batch's mean to its sum


def nzxyin(gamma):
    from softdtw_cuda import SoftDTW  # github.com/nzxyin/sdtw-cuda-torch

    # Its own advice for as many dimensions as speech representations have.
    return SoftDTW(gamma=gamma, fused=False)


def torchsoftdtw(gamma):
    from torchsoftdtw import soft_dtw  # github.com/angelo-ortiz/torchsoftdtw

    return lambda x, y: soft_dtw(squared_distances(x, y), gamma=gamma)


OURS = {f"pi_finetune ({name})": ours(name) for name in ("cpu", "triton", "reference")}
PEERS = {f.__name__: f for f in (tslearn, pysdtw, maghoumi, bgu, ddtw, nzxyin, torchsoftdtw)}
PACKAGES = {"maghoumi": "dtw_loss_functions", "bgu": "dtw_loss_functions"}


# --------------------------------------------------------------------------------------------------
# Measuring

#: Relative error in float32 that a value and a gradient may have. Peers that clamp or lose digits
#: by subtraction have errors of 1e-3; what is wrong is wrong by much more.
TOLERANCE = 1e-2


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


class Case:
    """The inputs of a shape, the same in every process, and what is timed on them."""

    def __init__(self, shape, gamma, device, divergence=False):
        B, N, M, D = shape
        torch.manual_seed(0)
        self.gamma, self.device, self.divergence = gamma, device, divergence
        x, y = torch.randn(B, N, D), torch.randn(B, M, D)
        self.x, self.y = (
            torch.nn.functional.normalize(side, dim=-1).to(device).requires_grad_()
            for side in (x, y)
        )
        pairs = [(self.x, self.y)]
        pairs += [(self.x, self.x), (self.y, self.y)] * divergence
        self.pairs = [
            (u, v, torch.rand(B, u.shape[1], v.shape[1], device=device)) for u, v in pairs
        ]

    @functools.cached_property
    def exact(self):
        """Sum of the losses, and the first pair's gradient for x [N, D], by the reference."""
        x, y = self.x.detach().double().cpu(), self.y.detach().double().cpu()
        loss = OURS["pi_finetune (reference)"](self.gamma, self.divergence)
        total = loss(x, y).sum().item()
        first = x[:1].requires_grad_()
        value = loss(first, y[:1])
        return total, torch.autograd.grad(value, first)[0][0]

    def products(self):
        with torch.no_grad():
            for u, v, e in self.pairs:
                torch.bmm(u, v.transpose(1, 2)), torch.bmm(e, v), torch.bmm(e.transpose(1, 2), u)

    def prepare(self, name):
        """The call of an implementation, compiled, checked and with its errors and memory."""
        if name == "products":
            return self.products, {"memory_mb": peak_memory(self.device, self.products)}
        loss = OURS[name](self.gamma, self.divergence) if name in OURS else PEERS[name](self.gamma)

        def call():
            self.x.grad = self.y.grad = None
            value = loss(self.x, self.y).sum()
            value.backward()
            return value

        value, gradient = self.exact
        found = call().item()
        error = float((self.x.grad[0].double().cpu() - gradient).abs().max() / gradient.abs().max())
        if not error < TOLERANCE or not abs(found - value) < TOLERANCE * abs(value):
            raise ValueError(
                f"value {found:.6g} instead of {value:.6g}, gradient off by {error:.1e}: not timed"
            )
        return call, {"memory_mb": peak_memory(self.device, call), "gradient_error": error}

    def time(self, call):
        """Milliseconds of one call."""
        synchronise(self.device)
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return (time.perf_counter() - start) * 1e3


class Other:
    """A process that runs this file with the package of another folder, one call at a time."""

    def __init__(self, root, threads):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--threads", str(threads)],
            env={**os.environ, "SOFT_DTW_ROOT": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "it died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def serve():
    """Answer the questions of another process, a line of JSON each."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "shape" in asked:
                device = torch.device(asked["device"])
                case = Case(asked["shape"], asked["gamma"], device, asked["divergence"])
                call, answer = case.prepare(asked["name"])
            else:
                answer = {"ms": case.time(call)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


@contextlib.contextmanager
def revision(name, threads):
    """A process of an older revision, from a worktree that is removed at the end."""
    git = ["git", "-C", str(PROJECT)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", folder, name], check=True)
        other = Other(folder, threads)
        try:
            yield other
        finally:
            other.process.stdin.close()
            other.process.wait(30)
            subprocess.run([*git, "worktree", "remove", "--force", folder], check=True)


#: Functions of the CPU backend, by what they do.
PARTS = {
    "centring": "_centre",
    "cost product": "_product",
    "recursion, forward": "_forward",
    "recursion, backward": "_backward",
    "gradient products": "_add_product",
    "gradient of the squares": "_add_scaled_rows",
}


def processor_time(call):
    """Milliseconds of all threads."""
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def parts(case, call, repeats):
    """Milliseconds of processor in each part of a call: the least of all repeats, of all threads.

    What else a machine does then adds little. The rest is Python, autograd, memory that is new,
    and the threads of PyTorch's own pool, which keep a processor busy for a while after their last
    work. Beside it, the least of the products.
    """
    from pi_finetune.soft_dtw import cpu

    spent, lock = dict.fromkeys(PARTS, 0.0), threading.Lock()

    def timing(part, function):
        def timed(*arguments):
            start = time.thread_time()
            result = function(*arguments)
            seconds = time.thread_time() - start
            with lock:
                spent[part] += seconds * 1e3
            return result

        return timed

    originals = {name: getattr(cpu, name) for name in PARTS.values()}
    times = []
    try:
        for part, name in PARTS.items():
            setattr(cpu, name, timing(part, originals[name]))
        for _ in range(repeats):
            spent.update(dict.fromkeys(PARTS, 0.0))
            total, floor = processor_time(call), processor_time(case.products)
            rest = total - sum(spent.values())
            times.append({**spent, "the rest": rest, "together": total, "products": floor})
    finally:
        for name, function in originals.items():
            setattr(cpu, name, function)
    return {part: round(min(row[part] for row in times), 3) for part in times[0]}


def measure(names, shape, gamma, repeats, device, base=None, divergence=False):
    """Rows by name; ``base`` is a pair of a name and an :class:`Other`, timed in turn with them."""
    case, timed, rows, ours_call = Case(shape, gamma, device, divergence), {}, {}, None
    for name in ("products", *names):
        try:
            call, rows[name] = case.prepare(name)
        except Exception as error:
            if name in OURS:
                raise
            print(f"{name}: left out, {type(error).__name__}: {error}"[:300], file=sys.stderr)
            continue
        timed[name] = lambda call=call: case.time(call)
        ours_call = call if name == "pi_finetune (cpu)" else ours_call
    if base is not None:
        name, other = base
        asked = {"name": names[0], "shape": shape, "gamma": gamma, "device": str(device)}
        rows[name] = other.ask(**asked, divergence=divergence)
        timed[name] = lambda: other.ask()["ms"]
    for row in rows.values():
        row["times"] = []
    for _ in range(repeats):
        for name, milliseconds in timed.items():
            rows[name]["times"].append(milliseconds())
    if "pi_finetune (cpu)" in names:
        rows["pi_finetune (cpu)"]["parts"] = parts(case, ours_call, repeats)
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
            **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()},
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


def append(path, result):
    """Add a row of each measurement to a CSV, which is made if it is not there."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    common = {
        "date": datetime.date.today().isoformat(),
        "revision": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "device": result["device"],
        "threads": result["threads"],
        "versions": " ".join(f"{k}={v}" for k, v in result["versions"].items()),
        "gamma": result["gamma"],
        "divergence": result["divergence"],
        "repeats": result["repeats"],
    }
    columns = "name median_ms quartile_1_ms quartile_3_ms to_products memory_mb gradient_error"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*common, "shape", "load", *columns.split()])
        if new:
            writer.writeheader()
        for part in result["shapes"].values():
            shape = ",".join(map(str, part["B, N, M, D"]))
            for row in map(dict, part["results"]):
                low, high = row.pop("quartiles_ms")
                row.pop("parts", None)
                where = {"shape": shape, "load": part["load_before"]}
                quartiles = {"quartile_1_ms": low, "quartile_3_ms": high}
                writer.writerow({**common, **where, **quartiles, **row})


def shown(result):
    """A results file as Markdown."""
    versions = [f"{package} {version}" for package, version in result["versions"].items()]
    head = f"{result['device']}, {result['threads']} threads, gamma {result['gamma']}"
    head += ", divergence" * result.get("divergence", False)
    return "\n".join(
        [
            ", ".join([head, *versions]),
            *(shown_shape(label, part) for label, part in result["shapes"].items()),
        ]
    )


def shown_shape(label, part):
    load = "" if part["load_before"] is None else f", load average {part['load_before']:.1f}"
    lines = [
        f"\n{label}: B, N, M, D = {', '.join(map(str, part['B, N, M, D']))}{load}\n",
        "| | median ms | quartiles ms | to products | peak MB | gradient error |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["results"]:
        low, high = row["quartiles_ms"]
        memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
        error = f"{row['gradient_error']:.0e}" if "gradient_error" in row else ""
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {low:.1f} to {high:.1f} "
            f"| {row['to_products']:.2f} | {memory} | {error} |"
        )
    return "\n".join(lines)


def shown_parts(result):
    """Where the time of ours goes, of every shape in a results file, as a table."""
    columns = {}
    for part in result["shapes"].values():
        load = f"load average {part['load_before']:.1f}"
        label = f"{', '.join(map(str, part['B, N, M, D']))} ({load})"
        columns[label] = next(row["parts"] for row in part["results"] if "parts" in row)
    lines = [f"| {' | '.join(['', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for part in next(iter(columns.values())):
        each = (
            f"{times[part]:.2f} ({times[part] / times['together']:.0%})"
            for times in columns.values()
        )
        lines.append(f"| {' | '.join([part, *each])} |")
    return "\n".join(lines)


TABLES = re.compile(
    r"(<!-- (benchmarks/results/\S+\.json)( parts)? -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL
)


def with_tables(text):
    """A page's text, what stands between the name of a results file and "end" made from it."""

    def made(found):
        result = json.loads((PROJECT / found[2]).read_text())
        return f"{found[1]}\n{(shown_parts if found[3] else shown)(result)}\n\n{found[4]}"

    return TABLES.sub(made, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["S", "M", "L"], help="S, M, L or B,N,M,D")
    parser.add_argument("--against", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gamma", type=float, default=0.1)
    parser.add_argument("--divergence", action="store_true", help="of this project alone")
    parser.add_argument("--repeats", type=int, default=11, help="at least 2, for quartiles")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reference", action="store_true", help="also time the plain reference")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--csv", type=pathlib.Path, help="add rows of the results to this")
    parser.add_argument("--base", metavar="REV", help="also time this revision of the project")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--page", type=pathlib.Path, help="write its tables anew and run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        return write_text(arguments.page, with_tables(arguments.page.read_text()))
    if arguments.repeats < 2:
        parser.error(f"--repeats {arguments.repeats}: quartiles need at least 2")
    if arguments.divergence and arguments.against:
        parser.error("--divergence times this project alone: add --against without a name")

    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        return serve()
    device = torch.device(arguments.device)
    names = ["pi_finetune (triton)" if device.type == "cuda" else "pi_finetune (cpu)"]
    names += ["pi_finetune (reference)"] * arguments.reference + arguments.against
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": arguments.threads,
        "versions": versions(arguments.against),
        "gamma": arguments.gamma,
        "divergence": arguments.divergence,
        "repeats": arguments.repeats,
        "dtype": "float32",
        "shapes": {},
    }
    print(shown(result))
    with contextlib.ExitStack() as stack:
        base = None
        if arguments.base:
            other = stack.enter_context(revision(arguments.base, arguments.threads))
            base = (f"pi_finetune at {arguments.base}", other)
        for label in arguments.shapes:
            shape = SHAPES.get(label) or tuple(map(int, label.split(",")))
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            how = arguments.gamma, arguments.repeats, device, base, arguments.divergence
            rows = measure(names, shape, *how)
            part = {"B, N, M, D": shape, "load_before": load, "results": list(summary(rows))}
            result["shapes"][label] = part
            print(shown_shape(label, part), flush=True)
        if device.type == "cpu":
            print("\nProcessor time in ms at least:\n", shown_parts(result), sep="\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.csv:
        append(arguments.csv, result)


if __name__ == "__main__":
    main()
