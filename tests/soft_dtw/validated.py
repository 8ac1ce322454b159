"""Triton's compilation of every kernel, pass by pass: `make kernels-validate`.

The module that each compiler pass receives is executed by ttsem on the inputs of a real launch and
compared with what that launch gave; the first pass that changes the result is named. The tool's own
command stops a program whose passes take more than 300 seconds to print, prints them once for every
launch, and runs the passes of all kernels on each; so its functions are called here instead: one
print, and each kernel with its own passes alone. Tiles of two steps keep the modules small.
"""

import collections
import pathlib
import re
import sys
import time

import torch

from pi_finetune.soft_dtw import soft_dtw, triton

SECONDS = 3600  # for Triton to print what every pass receives: a minute on a free core


def main(device="cpu"):
    """One launch of every kernel; ttsem calls it, once to record it and once to compile it."""
    triton.INTERPRETED = True  # takes CPU tensors
    triton._fast_log = lambda tensor: False  # ttsem knows no libdevice
    triton.TILE_STEPS = 2
    torch.manual_seed(0)
    x, y = (torch.rand(1, L, 3).requires_grad_() for L in (3, 2))
    soft_dtw(x, y, gamma=0.3, backend="triton").sum().backward()


def validate():
    """Print each kernel's verdicts; 1 if one changes the meaning or nothing could be compared."""
    from ttsem import harness, validate

    program = pathlib.Path(__file__)
    stages = collections.defaultdict(list)
    for name, module in validate.split_dump(validate.capture_dump(program, "cpu", timeout=SECONDS)):
        kernel = re.search(r'sym_name = "(\w+_kernel)"', module)
        stages[kernel and kernel[1]].append((name, module))
    seen, failed = set(), False
    for record in harness.capture_launches(program, "cpu", harness.DEFAULT_CC):
        if record.fn_name in seen:
            continue
        seen.add(record.fn_name)
        start = time.perf_counter()
        report = validate.validate_stages(record, stages[record.fn_name], name=record.fn_name)
        verdicts = collections.Counter(result.verdict for result in report.passes)
        print(f"{record.fn_name}: {dict(verdicts)}, {time.perf_counter() - start:.0f} s")
        for result in report.passes:
            if result.verdict not in ("match", "approx"):
                print(
                    f"  {result.pass_name}: {result.verdict} {result.message} {result.unsupported}"
                )
        print(*(f"  {line}" for line in validate.summary_lines(report)), sep="\n", flush=True)
        failed |= not verdicts["match"] or bool(verdicts["mismatch"] or verdicts["error"])
    return int(failed or len(seen) < 4)


if __name__ == "__main__":
    sys.exit(validate())
