"""Bad input of evaluation and comparison: one clear message.

Each row of CASES is one that tests/bad_input.py describes.
"""

import json

import pytest
from bad_input import check

REFERENCE = "the cat sat"


def line(id_, **fields):
    counts = {"hits": 3, "substitutions": 0, "deletions": 0, "insertions": 0}
    entry = {"hypothesis": REFERENCE, "reference": REFERENCE, **counts, "nll": 3.0, "tokens": 4}
    return {"id": id_, "snr": 5.0, "pesq": 2.0, "asr": {"ctc": entry}, **fields}


def write(folder, name, lines):
    path = folder / name / "scores" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))


def two_runs(one, other):
    """Makes the score lines of mse/1 and soft_dtw/1."""

    def make(folder):
        write(folder, "mse/1", one)
        write(folder, "soft_dtw/1", other)

    return make


def spoilt(id_, **changes):
    entry = line(id_)
    entry["asr"]["ctc"].update(changes)
    return entry


GOOD = [line("a"), line("b")]


def compare(input, make, expect, *options):
    """A row: score files that cannot be compared, or an option of compare.py."""
    command = ["compare", ".", *options]
    return {
        "area": "comparison",
        "input": input,
        "make": make,
        "command": command,
        "expect": expect,
    }


CASES = [
    {
        "area": "comparison",
        "input": "a folder that is not there",
        "command": ["compare", "nowhere"],
        "expect": "nowhere: no such folder",
    },
    compare("an empty folder", lambda f: None, r"No run under \.: .* Train and evaluate first"),
    compare("a folder that is no seed", lambda f: write(f, "mse/one", GOOD), "its name is no seed"),
    compare(
        "a set that nobody scored", two_runs(GOOD, GOOD), "there is test: choose", "--set", "dev"
    ),
    compare(
        "a broken line in the middle",
        two_runs(["{", line("a")], GOOD),
        r"test\.jsonl, line 1: no JSON object",
    ),
    compare("a line without id", two_runs([{"pesq": 1.0}], GOOD), "a line has no id"),
    compare("no line at all", two_runs([], []), "hold no utterance. Evaluate anew"),
    compare("other utterances", two_runs(GOOD, GOOD[:1]), r"soft_dtw/1 lacks 1 of 2.*--intersect"),
    compare(
        "other utterances, all of them",
        two_runs(GOOD, [line("c")]),
        "share no utterance",
        "--intersect",
    ),
    compare(
        "other mixtures",
        two_runs(GOOD, [line("a", snr=0.0), line("b")]),
        "snr is 5.0 in mse/1 and 0.0",
    ),
    compare(
        "other transcripts",
        two_runs(GOOD, [spoilt("a", hits=5), line("b")]),
        "has 3 words in mse/1",
    ),
    compare(
        "likelihoods of other tokens",
        two_runs(GOOD, [spoilt("a", tokens=9), line("b")]),
        "the transcript has 4 tokens in mse/1 and 9 in soft_dtw/1",
    ),
    compare("a recogniser nobody used", two_runs(GOOD, GOOD), "there is ctc", "--recognizer", "x"),
    compare(
        "an unknown dev metric",
        two_runs(GOOD, GOOD),
        "choose one of wer, nll",
        "--dev_metric",
        "cer",
    ),
    compare("no replicates", two_runs(GOOD, GOOD), "at least 1", "--replicates", "0"),
    compare("certainty", two_runs(GOOD, GOOD), "between 0 and 1", "--confidence", "1"),
]


@pytest.mark.parametrize("case", CASES, ids=[case["input"] for case in CASES])
def test_bad_input_gets_one_clear_message(case, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    check(case, folder)
    assert not list(folder.glob("table.*"))
