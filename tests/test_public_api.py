"""The public API: what can be imported from the package, and one step with it."""

import importlib
import inspect
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import pi_finetune

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", pi_finetune.__all__)
def test_every_public_name_is_there(name):
    assert callable(getattr(pi_finetune, name)) and name in dir(pi_finetune)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="no attribute 'Tutor'"):
        _ = pi_finetune.Tutor


def test_the_package_and_soft_dtw_are_light():
    code = """
import sys
import pi_finetune
assert "torch" not in sys.modules
from pi_finetune import soft_dtw
import torch
x = torch.randn(2, 5, 3)
for call in (soft_dtw, soft_dtw.soft_dtw, sys.modules["pi_finetune"].soft_dtw):
    assert torch.equal(call(x, x, gamma=0.1, divergence=True), torch.zeros(2))
from pi_finetune.soft_dtw import alignment
heavy = {"speechbrain", "transformers", "torchaudio", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_minimal_example_takes_a_step(tmp_path):
    example = ROOT / "examples" / "minimal.py"
    assert len(example.read_text().splitlines()) <= 60
    main = runpy.run_path(str(example))["main"]
    before, after = main()
    assert before.shape == after.shape == (2,)
    assert after.mean() < before.mean()
    generator = torch.Generator().manual_seed(0)
    for name, size in (("clean", 12000), ("noise", 5000)):
        wav = 0.1 * torch.randn(size, generator=generator)
        soundfile.write(tmp_path / f"{name}.wav", wav.numpy(), 16000)
    losses = main([tmp_path / "clean.wav", tmp_path / "noise.wav"])
    assert all(loss.isfinite().all() for loss in losses)


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pi_finetune.__path__, "pi_finetune.")
    if not module.name.startswith("pi_finetune.recipes.")
)


def public(module):
    """Functions, and methods of classes, that a module exports: (name, object)."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            yield name, value
            for key, member in vars(value).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                ours = getattr(member, "__module__", None) == module.__name__  # not a Protocol's
                if ours and (key in ("__init__", "__call__") or not key.startswith("_")):
                    if inspect.isfunction(member):
                        yield f"{name}.{key}", member
        elif inspect.isroutine(value):
            yield name, value


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_exports_and_describes_it(name):
    if name.endswith("soft_dtw.triton"):
        pytest.importorskip("triton", reason="the Triton backend needs triton")
    module = importlib.import_module(name)
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == name
    ]
    assert hasattr(module, "__all__") or not own, f"no __all__ beside {own}"
    if not hasattr(module, "__all__"):
        return
    assert module.__doc__ and len(set(module.__all__)) == len(module.__all__)
    for key, value in public(module):
        assert inspect.getdoc(value) or key.endswith(("__init__", "forward", "__call__")), key
        if inspect.isclass(value):
            continue
        value = inspect.unwrap(value)
        given = set(inspect.signature(value).parameters) - {"self", "cls"}
        lacking = given - value.__annotations__.keys()
        assert not lacking, f"{key}: no type of {', '.join(sorted(lacking))}"
        assert key.endswith("__init__") or "return" in value.__annotations__, f"{key}: no result"


def test_every_module_can_be_starred():
    """What ``__all__`` names is there, also where it is made when first asked for."""
    for name in MODULES:
        if not name.endswith("soft_dtw.triton"):
            module = importlib.import_module(name)
            for key in getattr(module, "__all__", ()):
                assert hasattr(module, key), f"{name}.{key}"
