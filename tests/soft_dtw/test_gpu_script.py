"""`make gpu`, as far as it goes without a GPU."""

import importlib.util
import json
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_says_that_there_is_no_gpu(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--output", str(tmp_path / "out")])
    assert script.main() == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_writes_what_passed_failed_and_took_too_long(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--output", str(tmp_path)])
    parts = [
        ("good", ["-c", "print('fine')"], 60),
        ("bad", ["-c", "raise SystemExit(1)"], 60),
        ("slow", ["-c", "import time; time.sleep(60)"], 1),
    ]
    monkeypatch.setattr(script, "steps", lambda output: parts)
    assert script.main() == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [r["outcome"] for r in result["steps"]] == ["passed", "failed", "not done in 1 s"]
    assert "| good | passed |" in (tmp_path / "gpu.md").read_text()


def test_takes_ten_minutes_at_most_and_names_files_that_exist(script, tmp_path):
    parts = script.steps(tmp_path)
    assert sum(seconds for *_, seconds in parts) <= 600
    for _, arguments, _ in parts:
        for name in arguments:
            if name.endswith((".py", ".yaml")):
                assert (ROOT / name).exists(), name
