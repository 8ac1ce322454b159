"""The Triton backend on a machine without a GPU: interpreted, and compiled for named GPUs."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
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


FLAGS = ("HARD", "PENALISED", "ITAKURA", "OPEN_BEGIN", "OPEN_END")
POINTERS = {"n_ptr": "*i64", "m_ptr": "*i64"}
SIZES = dict.fromkeys(("B", "N", "M", "band"), "i32")


def compiled(target, kernel, block, dtype="fp32", **flags):
    """`kernel` compiled as for blocks of `block` rows; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pi_finetune.soft_dtw import triton as backend

    function = getattr(backend, f"{kernel}_kernel")
    names = function.arg_names
    fast = target.startswith("sm") and dtype == "fp32"
    constants = {"SECOND": 1, "BLOCK": block, "CLAMP": True, "SAVE": True, "FAST_LOG": fast}
    constants |= {"T": backend.TILE_STEPS, **dict.fromkeys(FLAGS, False), **flags}
    kinds = POINTERS | SIZES
    signature = {k: "constexpr" if k in constants else kinds.get(k, f"*{dtype}") for k in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
    )
    options = {"num_warps": 4 if "T" in names else max(1, block // 128)}
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


def offsets(name, lines):
    """What each lane adds to an address, in elements; what all lanes share counts as 0."""
    operation = re.sub(r"^.*? = ", "", lines[name])
    operands = re.findall(r"%[\w#-]+", operation)
    if operation.startswith("tt.make_range"):
        end, start = (int(k) for k in re.findall(r"(?:end|start) = (\d+)", operation))
        return np.arange(start, end)
    if operation.startswith(("tt.splat", "arith.constant")):
        return np.zeros(1, int)
    if operation.startswith(("arith.extsi", "arith.trunci")):
        return offsets(operands[0], lines)
    a, b = (offsets(operand, lines) for operand in operands[:2])
    if operation.startswith("arith.subi"):
        return a - b
    assert operation.startswith(("arith.addi", "tt.addptr")), operation
    return a + b


@compiles
@pytest.mark.parametrize("kernel, accesses", [("forward", 6), ("backward", 8)])
def test_a_warp_touches_four_or_five_sectors(kernel, accesses):
    """Of 32 bytes, per access, wherever its first element lies. Row by row it would be 32."""
    ttgir = compiled("sm_90", kernel, 1024).asm["ttgir"]
    layout = re.search(r"#blocked = #ttg.blocked<\{(.*?)\}>", ttgir)[1]
    assert layout.startswith("sizePerThread = [1], threadsPerWarp = [32]")
    lines = {}
    for line in ttgir.splitlines():
        if found := re.match(r"\s*(%[\w-]+) = ", line):
            lines[found[1]] = line.strip()
    pointers = re.findall(r"tt\.(?:load|store) (%[\w-]+).*tensor<1024x!tt.ptr", ttgir)
    assert len(pointers) == accesses
    for pointer in pointers:
        warps = offsets(pointer, lines).reshape(-1, 32)
        for first in range(8):
            sectors = [len(np.unique((warp + first) // 8)) for warp in warps]
            assert max(sectors) <= 5, (lines[pointer], max(sectors))


@compiles
@pytest.mark.parametrize("kernel", ["skew", "unskew"])
def test_changes_of_storage_are_coalesced_on_both_sides(kernel):
    """Row-major memory is walked along rows, diagonals along diagonals; a tile is turned between
    the two in shared memory."""
    code = compiled("sm_90", kernel, 1024)
    orders = {
        name: re.search(r"order = (\[.*?\])", layout)[1]
        for name, layout in re.findall(r"(#blocked\d?) = #ttg.blocked<\{(.*)\}>", code.asm["ttgir"])
    }
    access = r"tt\.(load|store) .*tensor<64x32x!tt.ptr<f32>, (#blocked\d?)>"
    found = {kind: orders[name] for kind, name in re.findall(access, code.asm["ttgir"])}
    along_rows, along_diagonals = "[0, 1]", "[1, 0]"
    skew = kernel == "skew"
    assert found["load"] == (along_rows if skew else along_diagonals)
    assert found["store"] == (along_diagonals if skew else along_rows)
    assert code.metadata.shared > 0


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
@pytest.mark.parametrize("flag", FLAGS)
def test_compiles_with_every_option(flag, tmp_path):
    for kernel in ("forward", "backward"):
        ptx = compiled("sm_90", kernel, 1024, **{flag: True}).asm["ptx"]
        assert not re.search(r"\.local\b", ptx) and spilled(ptx, "sm_90", tmp_path) == 0


@compiles
def test_compiles_in_float64():
    for kernel in ("forward", "backward"):
        assert ".local" not in compiled("sm_80", kernel, 1024, "fp64").asm["ptx"]
