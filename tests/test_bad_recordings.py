"""What bad recordings and lists of them get: one message that names file and line.

Rows as of bad_input.py; they are tried in a folder with ``a-1.wav`` and ``b-2.wav``, a second long.
"""

import numpy as np
import pytest
import soundfile
from bad_input import check

from pi_finetune.data.recordings import prepare_recordings, read_recording

CASES = []
KALDI = {
    "wav.scp": "rec1 a-1.wav\nrec2 b-2.wav\n",
    "segments": "a-x rec1 0.25 0.75\nb-y rec2 0 1\n",
    "text": "a-x ONE\n",
}


def row(given, expect, files, source=".", make=lambda folder: None, **options):
    def call(folder):
        make(folder)
        for entry in prepare_recordings(folder / source, **options).values():
            read_recording(entry)

    def fill(folder):
        for name in ("a-1", "b-2"):
            soundfile.write(folder / f"{name}.wav", np.full((8000, 2), 0.1), 8000)
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    CASES.append({"area": "recordings", "input": given, "make": fill, "call": call})
    CASES[-1]["expect"] = expect


def kaldi(given, expect, **files):
    row(given, expect, {**KALDI, **{name.replace("_", "."): text for name, text in files.items()}})


def table(given, expect, name, content):
    row(given, expect, {name: content}, name)


kaldi(
    "a command in wav.scp",
    r"wav\.scp, line 2: is a command, and none is run",
    wav_scp="rec1 a-1.wav\nrec2 sph2pipe x |\n",
)
kaldi(
    "a file of wav.scp that is not there",
    r"segments, line 1: gone\.wav is missing",
    wav_scp="rec1 gone.wav\nrec2 b-2.wav\n",
)
kaldi("an id alone in wav.scp", r"wav\.scp, line 1: there is nothing after", wav_scp="rec1\n")
kaldi(
    "a segment of no recording",
    r"segments, line 2: .*wav\.scp has no recording rec9",
    segments="a-x rec1 0.25 0.75\nb-y rec9 0 1\n",
)
kaldi(
    "a segment that begins at a word",
    r"segments, line 1: expected utterance",
    segments="a-x rec1 zero 1\n",
)
kaldi(
    "a segment beyond the end",
    r"segments, line 1: 0\.5 to 3 s is not within",
    segments="a-x rec1 0.5 3\n",
)
kaldi(
    "a segment that ends before it begins",
    r"segments, line 1: 0\.5 to 0\.2 s is not within",
    segments="a-x rec1 0.5 0.2\n",
)
kaldi(
    "a segment of 50 ms",
    r"segments, line 1: 0\.050 s is too short",
    segments="a-x rec1 0.5 0.55\n",
)
kaldi(
    "two lines for a segment",
    r"segments, line 2: a-x has a line already, line 1",
    segments="a-x rec1 0 1\na-x rec2 0 1\n",
)
kaldi(
    "a transcript of nobody",
    r"text, line 2: nobody is no utterance of .*segments",
    text="a-x ONE\nnobody TWO\n",
)
kaldi("a transcript in Latin-1", r"text, line 1: is not UTF-8", text=b"a-x CAF\xe9\n")
kaldi("a speaker of nobody", r"utt2spk, line 1: nobody is no utterance", utt2spk="nobody speaker\n")
table("a CSV file without the columns", r"x\.csv, line 1: a header", "x.csv", "ID,file\na,b\n")
table("an empty CSV file", r"x\.csv, line 1: a header .* found nothing", "x.csv", "")
table(
    "an id twice in a CSV file",
    r"x\.csv, line 3: the id a-x is also that of .*line 2",
    "x.csv",
    "ID,wav\na-x,a-1.wav\na-x,b-2.wav\n",
)
table(
    "a start that is a word",
    r"x\.csv, line 2: start is 'now'",
    "x.csv",
    "ID,wav,start\na-x,a-1.wav,now\n",
)
table(
    "a CSV line with a column too many",
    r"x\.csv, line 2: has another number of columns",
    "x.csv",
    "ID,wav\na-x,a-1.wav,7\n",
)
table(
    "a duration that is not the file's",
    r"x\.csv, line 2: the duration is 7, but",
    "x.csv",
    "ID,wav,duration\na-x,a-1.wav,7\n",
)
table(
    "a line of JSON that is no cut",
    r"y\.jsonl, line 2: is no cut of lhotse",
    "y.jsonl",
    '\n{"no": 1}\n',
)
table("a list of no known kind", r"x\.txt: is none of a folder", "x.txt", "a-1.wav\n")
row("a source that is not there", r"nowhere: there is no such file", {}, "nowhere")
row("a folder without audio", r"d: holds no recording", {}, "d", lambda f: (f / "d").mkdir())
row("a channel that is not there", r"a-1\.wav: channel 3 is not there; .* has 2", {}, channel=3)
row("channel 0", r"channel: 0 is no channel; they count from 1", {}, channel=0)
row("a text named .wav", r"c\.wav cannot be read as audio", {"c.wav": "a text"})


def cut(folder):
    """A FLAC file that ends early: its header says how long it was."""
    rng = np.random.default_rng(0)
    soundfile.write(folder / "c.flac", 0.1 * rng.standard_normal(16000), 8000)
    content = (folder / "c.flac").read_bytes()
    (folder / "c.flac").write_bytes(content[: len(content) // 2])


row("a file that ends early", r"c\.flac: .*Replace the file", {}, make=cut)


def not_finite(folder):
    wav = np.zeros(8000, np.float32)
    wav[100] = np.nan
    soundfile.write(folder / "c.wav", wav, 8000, subtype="FLOAT")


row("a sample that is NaN", r"c\.wav: .*non-finite samples in, 0 to 1 s", {}, make=not_finite)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["input"])
def test_bad_input_gets_its_message(case, tmp_path):
    if "cut of lhotse" in case["expect"]:
        pytest.importorskip("lhotse")
    check(case, tmp_path)
