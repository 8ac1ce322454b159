"""The pages of evidence say what the scores beside them say: tables, and intervals of the text."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "".join((DOCS / name).read_text() for name in ("evidence.md", "evidence_appendix.md"))
INTERVAL = re.compile(r"\[−?[\d.]+, −?[\d.]+\]")


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("make_evidence", DOCS / "make_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["docs/evidence.md", "docs/evidence_appendix.md", "README.md"])
def test_tables_are_computed(evidence, page):
    text = (DOCS.parent / page).read_text()
    written, computed = text.splitlines(), evidence.with_tables(text).splitlines()
    assert re.search("<!-- (summary|results)", text)
    for line, right in zip(written, computed, strict=True):
        assert line == right, "run `python docs/make_evidence.py`"


def test_every_table_is_computed(evidence):
    """But the first, of the claims, whose intervals the next test looks at."""
    for before, _ in re.findall(r"(.*)\n\n(\|.*\n)\|-", PAGE)[1:]:
        assert before.startswith("<!-- "), before


def test_a_table_ends_with_a_blank_line():
    """Else Markdown takes the next line for a row."""
    assert not re.findall(r"^\|.*\|\n[^|\n].*", PAGE, flags=re.M)


def test_intervals_in_the_text_stand_in_a_table(evidence):
    """In one of this page, in one with another baseline, or in those of position.md."""
    computed = "".join(found[5] for found in evidence.TABLE.finditer(PAGE))
    known = set(INTERVAL.findall(computed + (DOCS / "position.md").read_text()))
    wanted = set(INTERVAL.findall(evidence.TABLE.sub("", PAGE)))
    assert len(wanted) > 5
    groups = dict.fromkeys(found.groups()[1:4:2] for found in evidence.TABLE.finditer(PAGE))
    for baseline in ("soft_dtw", "pretrained", "noisy"):
        for kind, places in groups:
            if kind == "differences" and wanted - known:  # each takes seconds
                known |= set(INTERVAL.findall(evidence.table(kind, baseline, places)))
    assert not wanted - known


def test_learning_rates_are_the_best_of_their_search():
    for found in json.loads((DOCS / "evidence" / "learning_rates.json").read_text()).values():
        scores = found["dev_wer"]
        assert found["lr"] == float(min(scores, key=scores.get))
