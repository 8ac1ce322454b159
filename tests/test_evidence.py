"""The tables of docs/evidence.md are what compare.py makes of the scores that lie beside it."""

import json
import re
from pathlib import Path

import pytest

from pi_finetune.report.comparison import compare_runs
from pi_finetune.report.tables import convergence_table, markdown, summary_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = (DOCS / "evidence.md").read_text()


def rows(table):
    """Cells of a Markdown table's rows, without their padding."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


@pytest.mark.parametrize("teacher", ["whisper", "hubert"])
def test_tables_are_computed(teacher):
    folder = DOCS / "evidence"
    shared = [folder / name for name in ("noisy", "pretrained", "controls")]
    comparison = compare_runs([*shared, folder / teacher])
    written = set(rows(TEXT))
    summary = rows(summary_table(comparison, markdown))
    wanted = [row for row in summary if row[0] in comparison.systems or row[0].startswith("WER")]
    wanted += rows(convergence_table(comparison, markdown))[2:]
    assert len(wanted) > 8
    for row in wanted:
        assert row in written, f"docs/evidence.md lacks or differs in: {' | '.join(row)}"


def test_the_training_without_content_is_as_measured():
    records = (DOCS / "evidence" / "causal.jsonl").read_text().splitlines()
    for record in map(json.loads, records):
        fall, low, high = (100 * record[key] for key in ("relative_fall", "low", "high"))
        (row,) = (
            line for line in TEXT.splitlines() if line.startswith(f"| `{record['objective']}`")
        )
        assert f"{fall:.1f} [{low:.1f}, {high:.1f}]" in row


def test_learning_rates_are_the_best_of_their_search():
    for name, found in json.loads((DOCS / "evidence" / "learning_rates.json").read_text()).items():
        scores = found["dev_wer"]
        assert found["lr"] == float(min(scores, key=scores.get))
        cells = "".join(rf"[^|]*{wer:.2f}[^|]*\|" for wer in scores.values())
        assert re.search(rf"\| {re.escape(name)} \|{cells}", TEXT), name
