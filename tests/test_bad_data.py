"""What bad corpora and recordings get: one message that names the culprit, no traceback.

Each of CASES has ``area``, ``input`` (in words), ``call`` (makes the input in a folder and uses it)
and ``expect`` (a regular expression that the message must match).
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from bad_input import TABLE, check, rows
from running import recipe
from synthetic import write_audio

from pi_finetune.data.checking import check_pairs, fault
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.loading import choose, load_pairs
from pi_finetune.data.shard_writer import main as pack
from pi_finetune.data.shards import index_shard
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT, replacing_files
from pi_finetune.results.evaluation import load_recognizers

CASES = []


def case(area, given, expect, **arguments):
    """Register a function ``(folder, **arguments)`` as the call of a case."""

    def register(call):
        CASES.append(
            {
                "area": area,
                "input": given,
                "call": lambda folder: call(folder, **arguments),
                "expect": expect,
            }
        )
        return call

    return register


def tone(seconds=0.5, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds)).astype("float32")


def librispeech(folder, transcript=None, names=("1-1-0000", "1-1-0001")):
    """A split ``dev`` of one chapter; ``transcript`` is bytes of its file."""
    chapter = folder / "dev" / "1" / "1"
    for i, name in enumerate(names):
        write_audio(chapter / f"{name}.flac", tone(seed=i))
    if transcript is not None:
        (chapter / "1-1.trans.txt").write_bytes(transcript)
    return folder


def voicebank(folder, speakers=("p226", "p230"), log=b"p226_001 bus 5\np230_001 cafe 10\n"):
    for speaker in speakers:
        for kind in ("clean", "noisy"):
            write_audio(folder / f"{kind}_trainset_28spk_wav" / f"{speaker}_001.wav", tone())
    (folder / "log_trainset_28spk.txt").write_bytes(log)
    return folder


@case(
    "transcripts",
    "a transcript in Latin-1",
    r"1-1\.trans\.txt, line 2: is not UTF-8 \(byte 0xe9 at 13\).*iconv",
    text=b"1-1-0000 ONE\n1-1-0001 CAF\xe9\n",
)
@case(
    "transcripts",
    "a line with an id alone",
    r"1-1\.trans\.txt, line 2: there is nothing after '1-1-0001'",
    text=b"1-1-0000 ONE\n1-1-0001\n",
)
@case(
    "transcripts",
    "a second line for an id",
    r"1-1\.trans\.txt, line 3: 1-1-0000 has a line already, line 1",
    text=b"1-1-0000 ONE\n1-1-0001 TWO\n1-1-0000 THREE\n",
)
def bad_transcript(folder, text):
    prepare_speech(librispeech(folder, text), ["dev"])


@case(
    "transcripts",
    "an id in the transcripts of two folders",
    r"0\.trans\.txt, line 1: 1-1-0000 has a line already, .*1-1\.trans\.txt, line 1",
)
def transcripts_of_two_folders(folder):
    librispeech(folder, b"1-1-0000 ONE\n1-1-0001 TWO\n")
    (folder / "dev" / "1" / "2").mkdir()
    (folder / "dev" / "1" / "2" / "0.trans.txt").write_bytes(b"1-1-0000 OTHER\n")
    prepare_speech(folder, ["dev"])


@case(
    "VoiceBank",
    "an SNR in the log that is no number",
    r"log_trainset_28spk\.txt, line 2: expected id, noise and SNR in dB.*'p230_001 cafe loud'",
    log=b"p226_001 bus 5\np230_001 cafe loud\n",
)
@case(
    "VoiceBank",
    "a line of the log with two columns",
    r"log_trainset_28spk\.txt, line 1: expected id, noise and SNR.*'p226_001 5'",
    log=b"p226_001 5\n",
)
@case(
    "VoiceBank",
    "an SNR in the log that is NaN",
    r"log_trainset_28spk\.txt, line 1: expected id",
    log=b"p226_001 bus nan\n",
)
@case(
    "VoiceBank",
    "two lines of the log for an id",
    r"line 2: p226_001 has another line already, .*line 1",
    log=b"p226_001 bus 5\np226_001 bus 10\n",
)
@case("VoiceBank", "a log in Latin-1", r"txt, line 1: is not UTF-8", log=b"p226_001 caf\xe9 5\n")
def bad_log(folder, log):
    prepare_speech(voicebank(folder, log=log), ["train"])


@case("VoiceBank", "no dev speakers", r"no utterance of p226 or p287.*--valid_splits")
def no_dev_speakers(folder):
    prepare_speech(voicebank(folder, ("p230",)), ["train", "dev"])


@case("VoiceBank", "an empty transcript", r"p226_001\.txt: is empty", text=b"\n")
@case("VoiceBank", "a Latin-1 transcript", r"p226_001\.txt, line 1: is not UTF-8", text=b"\xe9\n")
def bad_text(folder, text):
    (folder / "trainset_28spk_txt").mkdir()
    (folder / "trainset_28spk_txt" / "p226_001.txt").write_bytes(text)
    prepare_speech(voicebank(folder), ["dev"])


@case("files", "a file name that is not UTF-8", r"1-1-\\xe9\.flac: the name is not UTF-8. Rename")
def bad_name(folder):
    librispeech(folder)
    chapter = os.fsencode(folder / "dev" / "1" / "1")
    os.rename(chapter + b"/1-1-0000.flac", chapter + b"/1-1-\xe9.flac")
    prepare_speech(folder, ["dev"])


@case("counts", "-1 utterances", r"-1 utterances were asked for.*valid_utterances", count=-1)
@case("counts", "0 utterances", r"0 utterances were asked for", count=0)
@case("counts", "2.5 utterances", r"2\.5 utterances were asked for", count=2.5)
def bad_count(folder, count):
    choose(prepare_speech(librispeech(folder), ["dev"]), count)


@case("counts", "a test set of -3 utterances", r"-3 utterances were asked for")
def bad_test_count(folder):
    load_pairs(librispeech(folder), ["dev"], "test", folder, count=-3)


@case("recognisers", "two of one name", r"models/asr and .*copy are both named")
def two_recognizers(folder):
    shipped = PROJECT_ROOT / "assets" / "models" / "asr"
    shutil.copytree(shipped, folder / "copy")
    load_recognizers([str(shipped), str(folder / "copy")])


@case("shards", "a size of 0 MB", r"--megabytes 0\.0")
def no_megabytes(folder):
    from pi_finetune.data.shard_writer import write_shards

    write_shards(librispeech(folder), folder / "shards", ["dev"], 0.0)


@case(
    "shards",
    "two audio files in a sample",
    r"x\.tar: a has two audio files, a\.wav and a\.flac",
    names=("a.wav", "a.flac"),
)
@case("shards", "a JSON list", r"a\.json is no JSON mapping", names=("a.wav", "a.json"))
@case("shards", "a text in Latin-1", r"a\.txt is not UTF-8", names=("a.wav", "a.txt"))
def bad_sample(folder, names):
    import tarfile

    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in names:
            path = folder / name
            content = {"json": b"[1]", "txt": b"caf\xe9"}.get(name.split(".")[1])
            write_audio(path, tone()) if content is None else path.write_bytes(content)
            tar.add(path, name)
    index_shard(folder / "x.tar")


@case("noise", "a folder without audio", r"no audio file in")
def no_noise(folder):
    prepare_noise(folder, "train")


def audio_pair(folder, name="1-1-0001.flac", wav=None, kept=1.0):
    """A corpus whose file of that name is ``wav``, of which a share of the bytes is left."""
    librispeech(folder)
    path = folder / "dev" / "1" / "1" / name
    if wav is not None or path.suffix != ".flac":
        path.with_suffix(".flac").unlink()
        kind = {"wav": ("WAV", "FLOAT"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", None)}
        container, subtype = kind.get(path.suffix[1:], ("FLAC", None))
        wav = tone(2) if wav is None else wav
        soundfile.write(path, wav, 16000, format=container, subtype=subtype)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    write_audio(folder / "noise" / "hiss-1.wav", tone(2))
    return folder


NOT_FINITE = np.concatenate([tone(), [np.nan], tone()]).astype("float32")


@case("check_data", "a truncated FLAC file", r"0001\.flac: cannot be read to its end", kept=0.5)
@case(
    "check_data",
    "a truncated WAV file",
    r"0001\.wav: truncated, \d+ bytes are missing",
    name="1-1-0001.wav",
    kept=0.5,
)
@case(
    "check_data",
    "a truncated Ogg file",
    r"0001\.ogg: truncated after \d\.\d\d s",
    name="1-1-0001.ogg",
    kept=0.8,
)
@case(
    "check_data",
    "a truncated MP3 file",
    r"0001\.mp3: truncated after \d\.\d\d s",
    name="1-1-0001.mp3",
    kept=0.5,
)
@case("check_data", "a silent file", r"0001\.flac: is silent", wav=np.zeros(8000, "float32"))
@case(
    "check_data",
    "a sample that is NaN",
    r"1 of 3 audio files are bad.*0001\.wav: sample 8000 is NaN or infinite",
    name="1-1-0001.wav",
    wav=NOT_FINITE,
)
def bad_audio(folder, **how):
    check_pairs(load_pairs(audio_pair(folder, **how), ["dev"], "dev", folder / "noise"))


@case("check_data", "a silent noise recording", r"bark-1\.wav: is silent")
def silent_noise(folder):
    audio_pair(folder)
    write_audio(folder / "noise" / "bark-1.wav", np.zeros(8000, "float32"))
    check_pairs(load_pairs(folder, ["dev"], "dev", folder / "noise"))


@case(
    "lists", "a CSV file without a column wav", r"x\.csv, line 1: a header", text="ID,file\na,b\n"
)
@case(
    "lists",
    "a CSV file that names a file that is not there",
    r"x\.csv, line 3: gone\.wav is missing",
    text="ID,wav\na,a.wav\nb,gone.wav\n",
)
@case(
    "lists",
    "a CSV file with a segment beyond the end",
    r"x\.csv, line 2: 0\.1 to 7 s is not within .*a\.wav, which has 0\.5 s",
    text="ID,wav,start,stop\na,a.wav,0.1,7\n",
)
@case(
    "lists",
    "a CSV file that states another duration",
    r"x\.csv, line 2: the duration is 7, but",
    text="ID,wav,duration\na,a.wav,7\n",
)
def bad_list(folder, text):
    write_audio(folder / "a.wav", tone())
    (folder / "x.csv").write_text(text)
    prepare_speech(folder / "x.csv", [])


@case("lists", "a split that a folder of CSV files lacks", r"no split 'dev'; it has: test, train")
def list_that_is_not_there(folder):
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("ID,wav\n")
    prepare_speech(folder, ["dev"])


@case("rooms", "a folder without audio", r"rir_folder: no audio file in", kept="nothing.txt")
@case("rooms", "a text named .wav", r"rir_folder: .*a\.wav cannot be read as audio", kept="a.wav")
def bad_rooms(folder, kept):
    (folder / "rooms").mkdir()
    (folder / "rooms" / kept).write_text("no audio")
    load_pairs(audio_pair(folder), ["dev"], "dev", folder / "noise", rir_folder=folder / "rooms")


@case("rooms", "a folder that is not there", r"rir_folder: .*gone is no folder, nor is it simul")
def no_rooms(folder):
    load_pairs(audio_pair(folder), ["dev"], "dev", folder / "noise", rir_folder=folder / "gone")


@case("rooms", "a silent response", r"rir_folder: .*a\.wav is empty, silent or not finite")
def silent_room(folder):
    write_audio(folder / "rooms" / "a.wav", np.zeros(800, "float32"))
    pairs = load_pairs(
        audio_pair(folder), ["dev"], "dev", folder / "noise", rir_folder=folder / "rooms"
    )
    pairs[0]


@case("rooms", "a corpus with noisy files", r"rir_folder: .* has noisy files of its own.*null")
def room_of_voicebank(folder):
    write_audio(folder / "rooms" / "a.wav", tone())
    load_pairs(voicebank(folder), ["train"], "train", rir_folder=folder / "rooms")


def test_the_table_has_each_row_once_and_no_other():
    lines = [text for text in TABLE.read_text(encoding="utf-8").splitlines() if text[:2] == "| "]
    described = [(case["area"], case["input"]) for case in rows()]
    assert len(set(described)) == len(described) == len(lines) - 1 >= 120


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['area']}: {case['input']}")
def test_bad_input_gets_its_message(case, tmp_path):
    check(case, tmp_path)


def test_links_to_speaker_folders_are_followed(tmp_path):
    elsewhere = librispeech(tmp_path / "elsewhere", b"1-1-0000 ONE\n1-1-0001 TWO\n")
    (tmp_path / "corpus" / "dev").mkdir(parents=True)
    link = tmp_path / "corpus" / "dev" / "1"
    link.symlink_to(elsewhere / "dev" / "1", target_is_directory=True)
    manifest = prepare_speech(tmp_path / "corpus", ["dev"])
    assert [entry["text"] for entry in manifest.values()] == ["ONE", "TWO"]
    # A link back to where it lies goes round in a circle: it is passed over.
    (elsewhere / "dev" / "1" / "loop").symlink_to(elsewhere / "dev")
    (elsewhere / "dev" / "1" / "self").symlink_to(".")
    assert list(prepare_speech(tmp_path / "corpus", ["dev"])) == list(manifest)
    linked = prepare_speech(elsewhere, ["dev"])
    assert list(linked) == list(manifest)


def test_links_to_noise_folders_are_followed(tmp_path):
    write_audio(tmp_path / "elsewhere" / "ch01.wav", tone(2))
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "TBUS").symlink_to(tmp_path / "elsewhere")
    assert [entry["class"] for entry in prepare_noise(tmp_path / "noise", "dev").values()] == [
        "TBUS"
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"1-1-0000\tONE MORE\n1-1-0001\tTWO\n",
        b"\xef\xbb\xbf1-1-0000 ONE MORE\r\n\r\n1-1-0001  TWO \r\n",
        b"1-1-0000 ONE MORE\n\n1-1-0001 TWO",
    ],
    ids=["tabs", "byte-order mark and DOS ends", "no end"],
)
def test_transcripts_as_editors_leave_them(tmp_path, text):
    manifest = prepare_speech(librispeech(tmp_path, text), ["dev"])
    assert [entry["text"] for entry in manifest.values()] == ["ONE MORE", "TWO"]


def test_a_line_that_is_missing_is_named_in_the_log(tmp_path, caplog):
    manifest = prepare_speech(librispeech(tmp_path, b"1-1-0000 ONE\n"), ["dev"])
    assert manifest["1-1-0001"]["text"] is None
    assert "1 of 2 utterances have no line" in caplog.text and "1-1-0001.flac" in caplog.text
    caplog.clear()
    (tmp_path / "dev" / "1" / "1" / "1-1.trans.txt").unlink()
    assert prepare_speech(tmp_path, ["dev"])["1-1-0000"]["text"] is None
    assert not caplog.text  # a corpus without transcripts is no mistake


def test_data_without_fault_passes_the_check(tmp_path):
    pairs = load_pairs(audio_pair(tmp_path), ["dev"], "dev", tmp_path / "noise")
    assert check_pairs(pairs, pairs) == 3
    # A WAV that was written to a pipe has an impossible size in its header, and lacks nothing.
    path = tmp_path / "dev" / "1" / "1" / "1-1-0001.flac"
    wav = path.with_suffix(".wav")
    soundfile.write(wav, soundfile.read(path)[0], 16000)
    content = wav.read_bytes()
    place = content.index(b"data") + 4
    for size in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        wav.write_bytes(content[:place] + size + content[place + 4 :])
        assert fault(wav) is None


def test_check_data_names_many_at_once(tmp_path):
    librispeech(tmp_path, names=[f"1-1-{i:04d}" for i in range(30)])
    for path in (tmp_path / "dev" / "1" / "1").iterdir():
        write_audio(path, np.zeros(8000, np.float32))
    write_audio(tmp_path / "noise" / "hiss-1.wav", tone(2))
    pairs = load_pairs(tmp_path, ["dev"], "dev", tmp_path / "noise")
    with pytest.raises(UserError, match=r"30 of 31 audio files") as caught:
        check_pairs(pairs)
    text = str(caught.value)
    assert text.count("is silent") == 20 and text.endswith("... and 10 more")


def test_training_checks_its_data_where_it_is_told(train, corpus, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    path = sorted((copy / "train").rglob("*.flac"))[3]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit):
        train("mse", data_folder=copy, check_data=True)
    error = capsys.readouterr().err
    assert "check_data: 1 of " in error and f"{path}: cannot be read to its end" in error
    assert not list(tmp_path.rglob("CKPT*"))


@pytest.mark.parametrize(
    ("name", "experiment"), [("train_asr", "asr_ctc"), ("pretrain_teacher",) * 2]
)
def test_the_other_trainings_check_their_data_too(name, experiment, corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "copy")
    path = sorted((tmp_path / "copy" / "train").rglob("*.flac"))[3]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    options = {
        "data_folder": tmp_path / "copy",
        "output_folder": tmp_path / "run",
        "check_data": "True",
        **({"noise_folder": "null"} if name == "train_asr" else {}),
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    with pytest.raises(SystemExit):
        recipe(name)([experiment, *words])
    error = capsys.readouterr().err
    assert "check_data: 1 of " in error and f"{path}: cannot be read to its end" in error
    assert not (tmp_path / "run" / "targets.pt").exists()


def test_files_of_a_folder_are_replaced_when_all_are_written(tmp_path):
    for name in ("README.md", "a", "b"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError), replacing_files(tmp_path) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("README.md", "a", "b"), "old"
    )
    with replacing_files(tmp_path) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "README.md": "old", "a": "new", "b": "new"
    }  # fmt: skip


def test_old_words_of_the_shard_writer_say_what_to_type(tmp_path):
    words = [str(librispeech(tmp_path / "a corpus")), str(tmp_path / "shards"), "--splits", "dev*"]
    done = subprocess.run(
        [sys.executable, "-m", "pi_finetune.data.shards", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    _, _, typed = done.stderr.strip().partition("error: type: ")
    assert typed.startswith("python -m pi_finetune.data.shard_writer ") and "'dev*'" in typed
    pack(words)
    assert (tmp_path / "shards" / "dev-000000.tar").is_file()
