"""The Triton kernels, launch by launch, on a checker that runs their compiled form without a GPU.

    make kernels      (python -m ttsem.sanitize pytest tests/soft_dtw/checked_kernels.py)

ttsem compiles each launch with Triton's own frontend and executes it: an access out of bounds, a
race between programs, or a value computed from memory that nobody wrote (fresh memory holds NaN)
fails at the kernel's line. It knows no libdevice, so what runs is the polynomial logarithm; the
fast one is one instruction in its place, which test_triton.py sees in the code compiled with it.
"""

import pytest
import torch
from helpers import assert_close, features, value_and_alignment, value_and_gradients

from pi_finetune.soft_dtw import triton

short = pytest.mark.short  # what CI runs

OPTIONS = [
    {"gamma": 0.0},
    {"step_penalty": (0.2, 0.5, 0.1)},
    {"open_begin": True, "step_penalty": 0.2},
    {"open_end": True},
    {"open_begin": True, "open_end": True, "gamma": 0.0},
    {"itakura": 2.0},
]


@pytest.fixture(autouse=True)
def _what_the_checker_knows(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(triton, "_fast_log", lambda tensor: False)


def check(N, M, dtype=torch.float32, B=2, **options):
    cost = torch.rand(B, N, M, dtype=dtype) - 0.1
    n, m = torch.randint(1, N + 1, (B,)), torch.randint(1, M + 1, (B,))
    n[0], m[-1] = N, M
    options = {"gamma": 0.1, **options}
    got = value_and_alignment(cost, n, m, backend="triton", **options)
    want = value_and_alignment(cost.double(), n, m, backend="reference", **options)
    assert_close("loss", got[0], want[0], 1e-6)
    assert_close("gradient", got[1], want[1], 1e-4)


@pytest.mark.parametrize("bandwidth", [None, 3])
@pytest.mark.parametrize(
    "L", [pytest.param(1, marks=short), 2, 31, 32, pytest.param(33, marks=short), 65, 130, 1025]
)
def test_lengths(L, bandwidth):
    check(L, max(1, min(L - L // 8, 40)), bandwidth=bandwidth, B=1 if L > 1000 else 3)


def test_length_8192_thinned():
    """Eight strips of 1,024 rows by few columns: offsets and the hand-over between strips."""
    check(8192, 3, B=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_in_several_strips(options, monkeypatch):
    monkeypatch.setattr(triton, "MAX_BLOCK", 32)
    check(70, 20, **options)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=short)])
@pytest.mark.parametrize("divergence", [False, True])
def test_features(dtype, divergence):
    x, y = features(2, 40, 21, dtype=dtype)
    n, m = torch.tensor([40, 7]), torch.tensor([3, 21])
    x[1, 7:], y[0, 3:] = float("nan"), float("nan")
    options = {"gamma": 0.2, "divergence": divergence}
    got = value_and_gradients(x, y, n, m, backend="triton", **options)
    want = value_and_gradients(x.double(), y.double(), n, m, backend="reference", **options)
    for name, a, b in zip(("loss", "gradient of x", "gradient of y"), got, want):
        assert_close(name, a, b, 1e-4 if dtype == torch.float32 else 1e-9)


def test_many_more_pairs_than_programs_in_flight():
    check(5, 4, B=300)
