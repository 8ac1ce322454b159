"""The benchmark runs; what it takes for exact is the gradient of ours."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_of_the_readme_on_a_small_shape(tmp_path):
    # beside the last commit, where this is a checkout
    base = ["--base", "HEAD"] if (ROOT / ".git").exists() else []
    command = [sys.executable, "benchmarks/soft_dtw.py", "--shapes", "2,40,36,8", "--against"]
    command += ["--device", "cpu", "--repeats", "2", "--json", tmp_path / "rows.json"]
    command += ["--csv", tmp_path / "rows.csv", *base]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pi_finetune (cpu)" in done.stdout
    results = json.loads((tmp_path / "rows.json").read_text())["shapes"]["2,40,36,8"]["results"]
    names = ["products", "pi_finetune (cpu)", *["pi_finetune at HEAD"] * bool(base)]
    assert [row["name"] for row in results] == names
    assert all(row["gradient_error"] < 1e-5 for row in results[1:])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert all(float(row["median_ms"]) > 0 and row["shape"] == "2,40,36,8" for row in rows)


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/soft_dtw.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_page_are_those_of_the_results(bench):
    page = (ROOT / "docs/soft_dtw.md").read_text()
    assert len(bench.TABLES.findall(page)) == page.count("<!-- benchmarks/results/") >= 3
    assert bench.with_tables(page) == page, "run benchmarks/soft_dtw.py --page docs/soft_dtw.md"


def test_an_empty_table_takes_nothing_of_the_page_with_it(bench):
    page = "<!-- benchmarks/results/cpu.json -->\n<!-- end -->\n\nkept\n\n<!-- end -->\n"
    made = bench.with_tables(page)
    assert made.endswith("\n\n<!-- end -->\n\nkept\n\n<!-- end -->\n") and "tslearn" in made


def test_parts_of_a_call_add_up_to_it(bench):
    rows = bench.measure(("pi_finetune (cpu)",), (2, 40, 36, 8), 0.1, 3, torch.device("cpu"))
    spent = rows["pi_finetune (cpu)"]["parts"]
    assert set(spent) == {*bench.PARTS, "the rest", "together", "products"}
    assert all(ms > 0 for ms in spent.values())
    # each is the least of its own repeats
    assert sum(spent[part] for part in (*bench.PARTS, "the rest")) <= 1.001 * spent["together"]


def test_the_divergence_takes_the_products_of_three_problems(bench, monkeypatch):
    products = []
    monkeypatch.setattr(torch, "bmm", lambda a, b: products.append((*a.shape, b.shape[-1])))
    bench.Case((2, 7, 5, 3), 0.1, torch.device("cpu"), True).products()
    pairs = [(7, 5), (7, 7), (5, 5)]
    assert products == [
        shape for n, m in pairs for shape in ((2, n, 3, m), (2, n, m, 3), (2, m, n, 3))
    ]
    monkeypatch.undo()
    rows = bench.measure(
        ("pi_finetune (cpu)",), (2, 20, 18, 4), 0.1, 2, torch.device("cpu"), divergence=True
    )
    assert rows["pi_finetune (cpu)"]["gradient_error"] < 1e-5


def test_what_is_wrong_is_not_timed(bench, monkeypatch, capsys):
    def nearly(gamma, divergence=False):
        return lambda x, y: 1.05 * bench.soft_dtw(x, y, gamma=gamma)

    monkeypatch.setitem(bench.PEERS, "nearly", nearly)
    case = ("nearly",), (2, 20, 18, 4), 0.1, 2, torch.device("cpu")
    assert list(bench.measure(*case)) == ["products"]
    assert "nearly: left out" in capsys.readouterr().err
    monkeypatch.setitem(bench.OURS, "nearly", nearly)
    with pytest.raises(ValueError, match="not timed"):
        bench.measure(*case)
