"""Arguments, messages, dispatch, the module and the alignment."""

import pathlib
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, features, value_and_alignment

from pi_finetune.soft_dtw import SoftDTW, _op, alignment, soft_dtw, soft_dtw_from_cost

X, Y = torch.rand(2, 5, 3), torch.rand(2, 4, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor \[B, N, D\], got list"),
        ({"x": X.long()}, TypeError, r"x must have a floating dtype, got torch.int64"),
        ({"y": Y[0]}, ValueError, r"y must have shape \[B, M, D\], got \[4, 3\]"),
        ({"y": Y[:1]}, ValueError, r"x and y must agree .* got \[2, 5, 3\] and \[1, 4, 3\]"),
        ({"y": Y[..., :2]}, ValueError, r"x and y must agree"),
        ({"x": X[:, :0]}, ValueError, r"x must have at least one entry on every axis"),
        ({"y": Y.to("meta")}, ValueError, r"on one device, got cpu and meta"),
        ({"x_lengths": torch.tensor([1.0, 0.5])}, TypeError, r"x_lengths must count frames"),
        ({"y_lengths": torch.tensor([4])}, ValueError, r"y_lengths must have shape \[2\]"),
        ({"y_lengths": 4}, TypeError, r"y_lengths must be None, an integer tensor"),
        ({"y_lengths": [4, 5]}, ValueError, r"y_lengths\[1\] is 5, but must be from 1 to 4"),
        ({"gamma": -1}, ValueError, r"gamma must be 0 \(hard DTW\) or more, and finite, got -1"),
        ({"gamma": float("nan")}, ValueError, r"gamma must be 0 .* got nan"),
        ({"gamma": torch.tensor(1.0)}, TypeError, r"gamma must be a number, got Tensor"),
        ({"bandwidth": -1}, ValueError, r"bandwidth must be 0 or more, got -1"),
        ({"bandwidth": 0.1}, TypeError, r"bandwidth must be None or a whole number"),
        ({"cost": "l2"}, ValueError, r"cost must be one of 'sqeuclidean', .* got 'l2'"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', .* got 'cuda'"),
        pytest.param(
            {"backend": "triton"},
            ValueError,
            r"backend='triton' takes GPU tensors, got device cpu",
            marks=pytest.mark.needs("triton"),
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"x": X, "y": Y, **change}
    with pytest.raises(error, match=message):
        soft_dtw(**arguments)
    if set(change) <= {"gamma", "bandwidth", "backend"}:
        with pytest.raises(error, match=message):
            soft_dtw_from_cost(torch.rand(1, 3, 3), **change)
        if "triton" not in change.values():
            with pytest.raises(error, match=message):
                SoftDTW(**change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_finite_names_the_place_and_ignores_padding(bad):
    x = X.clone()
    x[1, 3, 2] = bad
    with pytest.raises(ValueError, match=r"x\[1\] has a NaN or an infinity at \[3, 2\]"):
        soft_dtw(x, Y, check_finite=True)
    with pytest.raises(ValueError, match=r"y\[1\] has a NaN"):
        alignment(Y, x, check_finite=True)
    soft_dtw(x, Y, [5, 3], check_finite=True)
    with pytest.raises(ValueError, match=r"cost\[1\] has a NaN or an infinity at \[3, 2\]"):
        soft_dtw_from_cost(x, check_finite=True)
    soft_dtw_from_cost(x, [5, 3], check_finite=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_in_a_valid_frame_reaches_the_loss_and_no_other_item(backend):
    x = X.clone()
    x[0, 2, 1] = float("nan")
    loss = soft_dtw(x, Y, backend=backend)
    assert loss[0].isnan() and loss[1].isfinite()


def test_lengths_may_be_lists_or_small_integers():
    want = soft_dtw(X, Y, torch.tensor([5, 2]), torch.tensor([1, 4]))
    assert torch.equal(soft_dtw(X, Y, [5, 2], (1, 4)), want)
    lengths = torch.tensor([5, 2], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.uint8)
    assert torch.equal(soft_dtw(X, Y, *lengths), want)


@pytest.fixture
def loaded(monkeypatch):
    """Stands for the backend modules; what resolve() has found out is forgotten afterwards."""

    def module(name):
        return SimpleNamespace(name=name, INTERPRETED=False, CHECKPOINTS=name == "cpu")

    modules = {name: module(name) for name in _op.BACKENDS}
    monkeypatch.setattr(_op, "_load", modules.get)
    monkeypatch.setattr(_op, "_usable", lambda name, device: modules[name])
    _op._warn_of_fallback.cache_clear()
    yield modules
    _op._warn_of_fallback.cache_clear()


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_the_fastest_backend(loaded):
    got = [_op.resolve("auto", d).name for d in (CPU, GPU, torch.device("meta"))]
    assert got == ["cpu", "triton", "reference"]
    with pytest.raises(ValueError, match="backend='cpu' takes CPU tensors, got device cuda:0"):
        _op.resolve("cpu", GPU)
    with pytest.raises(ValueError, match=r"checkpointed=True needs .* here is 'triton'"):
        _op.resolve("auto", GPU, checkpointed=True)


@pytest.mark.parametrize("device, name", [(CPU, "cpu"), (GPU, "triton")])
def test_auto_warns_once_with_the_reason_before_it_falls_back(loaded, device, name):
    loaded[name] = ImportError(f"no {name} here")
    with pytest.warns(UserWarning, match=f"'{name}' cannot be used .ImportError: no {name} here"):
        assert _op.resolve("auto", device).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _op.resolve("auto", device).name == "reference"
    needs = {"cpu": "numba", "triton": "triton"}[name]
    with pytest.raises(RuntimeError, match=rf"'{name}' cannot be loaded .* install '{needs}'"):
        _op.resolve(name, device)


def test_a_backend_that_loads_but_fails_at_its_first_launch_is_not_usable(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_op, "_load", lambda name: SimpleNamespace(cost_forward=refuse))
    found = _op._usable.__wrapped__("triton", CPU)
    assert isinstance(found, RuntimeError) and "C compiler" in str(found)


def test_loads_neither_numba_triton_nor_speechbrain():
    """Nor runs with them: only a backend that is used is imported."""
    script = (
        "import sys, torch\n"
        "from pi_finetune.soft_dtw import soft_dtw\n"
        "names = 'numba', 'llvmlite', 'triton', 'speechbrain', 'scipy'\n"
        "before = [n for n in names if n in sys.modules]\n"
        "x = torch.rand(1, 3, 2, requires_grad=True)\n"
        "soft_dtw(x, x, backend='reference').sum().backward()\n"
        "print(before, [n for n in names if n in sys.modules])\n"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == "[] []"


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_module(reduction):
    module = SoftDTW(gamma=0.3, divergence=True, cost="cosine", reduction=reduction)
    want = soft_dtw(X, Y, [5, 2], gamma=0.3, divergence=True, cost="cosine")
    got = module(X, Y, [5, 2])
    assert torch.equal(got, want if reduction == "none" else getattr(want, reduction)())
    assert "gamma=0.3" in repr(module)
    with pytest.raises(ValueError, match="reduction must be one of"):
        SoftDTW(reduction="average")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "l1"])
def test_alignment_is_the_gradient_for_the_cost(backend, cost):
    x, y = features(2, 20, 30, dtype=torch.float64)
    n = torch.tensor([20, 7])
    e = alignment(x, y, n, gamma=0.2, cost=cost, backend=backend)
    if cost == "cosine":
        d = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    else:
        d = torch.cdist(x, y, p=1) if cost == "l1" else torch.cdist(x, y).square()
    assert_close("E", e, value_and_alignment(d, n, gamma=0.2, backend=backend)[1], 1e-6)
    assert not e.requires_grad


def test_zero_frames_cost_1_by_cosine_and_get_no_gradient():
    x = torch.zeros(1, 4, 3, requires_grad=True)
    soft_dtw(x, Y[:1], cost="cosine", bandwidth=0).sum().backward()
    assert (x.grad == 0).all()
    assert_close("loss", soft_dtw(x, Y[:1], cost="cosine", bandwidth=0), torch.tensor([4.0]), 1e-6)


def test_kernels_cache_is_optional(monkeypatch):
    """A read-only installation without a writable cache folder still compiles."""
    from pi_finetune.soft_dtw import cpu

    njit = cpu.numba.njit

    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(cpu.numba, "njit", refuse)
    assert cpu._jit(lambda a: a + 1)(1) == 2
