"""benchmarks/train_step.py runs, in full and in reduced precision."""

import importlib.util
import json
import sys

import pytest
from running import ROOT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_by_stages(precision, tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks/train_step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    command = [
        "--teacher_source",
        tiny_teacher,
        "--variants",
        "mse",
        "soft_dtw",
        "mse+cache",
        "--repeats",
        "1",
    ]
    command += ["--batch_size", "2", "--seconds", "1", "--loader_workers", "0"]
    step.main([*map(str, command), "--precision", precision, "--json", str(tmp_path / "rows.json")])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["setting"]["precision"] == precision
    assert found["median_seconds"]["soft_dtw"]["backward"] > 0
    assert list(found["ratios"]) == ["soft_dtw / mse", "mse+cache / mse"]
    assert "0 loader workers" in capsys.readouterr().out
    for wrong in ("speechbrain_mse+cache", "mse+fast", "none"):
        with pytest.raises(SystemExit):
            step.main(["--variants", wrong])
