"""The benchmark runs; what it takes for exact is the gradient of ours."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_of_the_readme_on_a_small_shape(tmp_path):
    command = [sys.executable, "benchmarks/soft_dtw.py", "--shapes", "2,40,36,8", "--against"]
    command += ["--device", "cpu", "--repeats", "2", "--json", tmp_path / "rows.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pi_finetune (cpu)" in done.stdout
    results = json.loads((tmp_path / "rows.json").read_text())["shapes"]["2,40,36,8"]["results"]
    assert [row["name"] for row in results] == ["products", "pi_finetune (cpu)"]
    assert results[1]["gradient_error"] < 1e-5
