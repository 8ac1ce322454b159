"""The public API: what can be imported from the package, and one step with it."""

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
