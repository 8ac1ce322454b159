"""The average of enhancers: its numbers, and what cannot be averaged."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import average_enhancers

from pi_finetune.enhancers import MaskEnhancer, load_enhancer, save_enhancer


@pytest.fixture
def saved(tmp_path):
    def save(name, dim=16):
        save_enhancer(tmp_path / name, MaskEnhancer(channels=[4], dim=dim, dilations=[1]))
        return str(tmp_path / name)

    return save


def test_every_weight_is_the_mean(saved, tmp_path):
    folders = [saved(name) for name in "abc"]
    average_enhancers.main([*folders, "--output_folder", str(tmp_path / "averaged")])
    found = load_enhancer(tmp_path / "averaged").state_dict()
    models = [load_enhancer(folder).state_dict() for folder in folders]
    for name, value in found.items():
        mean = torch.stack([model[name] for model in models]).double().mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_half_precision_of_one(saved, tmp_path):
    one = saved("one")
    average_enhancers.main([one, "--half", "--output_folder", str(tmp_path / "half")])
    whole, half = (load_file(Path(f) / "enhancer.safetensors") for f in (one, tmp_path / "half"))
    assert all(torch.equal(value.half(), half[name]) for name, value in whole.items())
    assert load_enhancer(tmp_path / "half").mask.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("second", "output", "says"),
    [(32, "new", "only equal models"), (16, "first", "--output_folder: .* exists")],
)
def test_refused(saved, tmp_path, capsys, second, output, says):
    folders = [saved("first"), saved("second", dim=second)]
    before = (tmp_path / "first" / "enhancer.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        average_enhancers.main([*folders, "--output_folder", str(tmp_path / output)])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(says, error), error
    assert (tmp_path / "first" / "enhancer.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()
