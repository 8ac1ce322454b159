"""The Triton backend on a machine without a GPU: interpreted, and compiled for named GPUs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    here = pathlib.Path(__file__).parent
    root = here.parents[1]
    path = os.pathsep.join([str(root), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(here / "interpreted.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def compiled(target, kernel, block, dtype="fp32"):
    """`kernel` compiled as for blocks of `block` rows; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pi_finetune.soft_dtw import triton as backend

    function = getattr(backend, f"{kernel}_kernel")
    nvidia = target.startswith("sm")
    constants = {"SECOND": 1, "BLOCK": block}
    if kernel == "forward":
        constants |= {"CLAMP": True, "SAVE": True, "FAST_LOG": nvidia and dtype == "fp32"}
    kinds = {"n_ptr": "*i64", "m_ptr": "*i64", **dict.fromkeys(("B", "N", "M", "bandwidth"), "i32")}
    names = function.arg_names
    signature = {k: "constexpr" if k in constants else kinds.get(k, f"*{dtype}") for k in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(k),): value for k, value in constants.items()},
    )
    options = {"num_warps": max(1, block // 128)}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile"
)


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("block", [32, 1024])
def test_compiles_for_nvidia(target, kernel, block, tmp_path):
    code = compiled(target, kernel, block)
    ptx = code.asm["ptx"]
    assert not re.search(r"\.local\b", ptx), "registers spill to local memory"
    barriers = len(re.findall(r"bar\.sync", ptx))
    if block == 32:  # one warp: the shift by a lane is a shuffle
        assert code.metadata.shared == 0
        assert barriers == 1 and "shfl.sync.idx" in ptx
    else:  # through shared memory: two barriers a step, one a strip, two for the final sum
        assert code.metadata.shared == 4 * block
        assert barriers == (5 if kernel == "forward" else 3)
    if kernel == "forward":  # one instruction each, no polynomials
        assert "ex2.approx" in ptx and "lg2.approx" in ptx
    assert spilled(ptx, target, tmp_path) == 0


def spilled(ptx, target, folder):
    """Bytes that the assembler spills, as it reports them itself."""
    from triton.knobs import nvidia

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [nvidia.ptxas.path, "-v", f"-arch={target}", str(source), "-o", str(folder / "cubin")]
    if "sm_90a" in ptx:
        command[2] = "-arch=sm_90a"
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


@compiles
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("block", [32, 1024])
def test_compiles_for_amd(kernel, block):
    report = compiled("gfx942", kernel, block).asm["amdgcn"]
    assert set(re.findall(r"vgpr_spill_count:\s*(\d+)", report)) == {"0"}
    assert set(re.findall(r"private_segment_fixed_size:\s*(\d+)", report)) == {"0"}


@compiles
def test_compiles_in_float64():
    for kernel in ("forward", "backward"):
        assert ".local" not in compiled("sm_80", kernel, 1024, "fp64").asm["ptx"]
