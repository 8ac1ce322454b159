"""Evaluation of real recordings without clean speech, and audio handed over to other tools."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch
from running import Parrot, recipe, scores

from pi_finetune.data.recordings import load_recordings, prepare_recordings
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import UserError
from pi_finetune.inference import Enhancer
from pi_finetune.lengths import Waveforms
from pi_finetune.results import declarations
from pi_finetune.results.comparison import compare_runs
from pi_finetune.results.evaluation import evaluate_mixes, evaluate_system
from pi_finetune.results.statistics import Bootstrap

RATE = 44100
WITHOUT_REFERENCE = "pi_finetune.results.evaluation.without_reference"
REAL = declarations.without_reference


@pytest.fixture(autouse=True)
def no_dnsmos(monkeypatch):
    """It takes a second of computing an utterance."""
    monkeypatch.setattr(WITHOUT_REFERENCE, lambda: [])


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A Kaldi data folder: stereo at 44.1 kHz, a silent part, and one part without a transcript."""
    folder = tmp_path_factory.mktemp("calls")
    rng = np.random.default_rng(0)
    wav = rng.uniform(0.02, 0.4, (9, 1, 1)) * rng.standard_normal((9, RATE, 2))
    wav[3] = 0  # the fourth second
    soundfile.write(folder / "call.wav", np.clip(wav.reshape(-1, 2), -1, 1), RATE)
    (folder / "wav.scp").write_text("call call.wav\n")
    names = "abcdefghi"
    spans = [f"{name}-0 call {i} {i + 1}\n" for i, name in enumerate(names)]
    (folder / "segments").write_text("".join(spans))
    (folder / "text").write_text("".join(f"{name}-0 ONE TWO THREE\n" for name in names[:-1]))
    return folder


def test_recordings_are_scored_by_what_needs_no_clean_speech(calls, evaluate, pretrained):
    results = evaluate(
        ["noisy", "pretrained"], recordings=calls, channel=2, noise_folder="null",
        data_folder="/nowhere", batch_size=4,
    )  # fmt: skip
    lines = scores(results / "pretrained/0")
    assert [line["id"][0] for line in lines] == list("abcdefghi")
    for line in lines:
        assert line["snr"] is None and line["duration"] == 1.0 and "pesq" not in line
    heard = [line["asr"].get("parrot", "not asked for") for line in lines]
    assert heard[8] == "not asked for" and heard[3] is None  # silence says nothing
    assert all(entry["reference"] == "ONE TWO THREE" for entry in (*heard[:3], *heard[4:8]))
    second = load_recordings(calls, channel=2)[0]["noisy"]
    assert (
        Parrot()(Waveforms.of(second[None]))[0]
        == (scores(results / "noisy/0")[0]["asr"]["parrot"]["hypothesis"])
    )
    audio = results / "noisy/0/scores/test/audio"
    assert {path.name.split(".")[1] for path in audio.iterdir()} == {"noisy"}

    found = compare_runs([results], baseline="noisy", bootstrap=Bootstrap(replicates=99))
    assert found.scores["wer"].failed["noisy", 0] == 1 and len(found.scores["wer"].ids) == 7
    assert "PESQ, STOI, ESTOI, SI-SDR: empty, needs a clean reference" in found.notes
    recipe("compare")([str(results), "--baseline", "noisy", "--html", "--replicates", "99"])
    with (results / "table.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["strategy"] == "noisy")
    assert row["pesq"] == "" and float(row["wer"]) > 0 and row["failed_pesq"] == "0"
    for page in ("summary.md", "report.html"):
        assert "needs a clean reference" in (results / page).read_text()


@pytest.mark.parametrize(
    "installed",
    [pytest.param(True, marks=pytest.mark.needs("speechmos", "librosa", "onnxruntime")), False],
)
def test_what_needs_no_clean_speech_is_computed_if_installed(tmp_path, monkeypatch, installed):
    for name, scale in (("a-0", 0.1), ("b-0", 0.0)):  # the second is silent
        wav = scale * np.random.default_rng(0).standard_normal(16000)
        soundfile.write(tmp_path / f"{name}.wav", wav, 16000)
    monkeypatch.setattr(WITHOUT_REFERENCE, REAL)
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    evaluate_system(tmp_path / "noisy" / "0", None, load_recordings(tmp_path), [])
    found = compare_runs([tmp_path], baseline="noisy", bootstrap=Bootstrap(replicates=9))
    names = [metric.name for metric in found.metrics if metric.reference is None]
    assert names == (REAL() if installed else [])
    for name in names:
        assert found.scores[name].failed["noisy", 0] == 1
        assert 1 <= found.scores[name].mean("noisy") <= 5


def test_without_transcripts_no_recogniser_is_judged(calls, evaluate):
    found = prepare_recordings(calls / "wav.scp")
    assert len(found) == 9
    lines = scores(evaluate(["noisy"], recordings=calls / "call.csv") / "noisy/0")
    assert [line["asr"] for line in lines] == [{}]


@pytest.fixture(autouse=True, scope="module")
def untranscribed(calls):
    (calls / "call.csv").write_text("ID,wav\nwhole,call.wav\n")


def test_clean_speech_of_recordings_cannot_be_scored(calls, evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate(["clean"], recordings=calls)
    assert "run: clean: there is no clean speech of recordings" in capsys.readouterr().err


def test_long_recordings_are_enhanced_in_chunks_and_alone(calls, pretrained, monkeypatch):
    module = load_enhancer(pretrained)
    whole = load_recordings(calls / "call.csv")[0]["noisy"]
    short = whole[:20000]
    sizes = []
    forward = type(module).forward

    def spy(self, wavs, lengths=None):
        sizes.append(Waveforms.of(wavs, lengths).data.shape[1])
        return forward(self, wavs, lengths)

    monkeypatch.setattr(type(module), "forward", spy)
    enhancer = Enhancer(module, "cpu", chunk_seconds=2, whole_seconds=3)
    with torch.inference_mode():
        batch = enhancer(Waveforms.collate([whole, short]))
        # the chunks overlap by the model's reach, and there are more of them than one
        assert len(sizes) > 3 and max(sizes[:-1]) < len(whole)
        alone = module(whole[None])[0]
        assert torch.equal(batch.items()[1], module(short[None])[0])
    heard = whole.abs() > 0  # silence stays silence
    assert torch.allclose(batch.items()[0][heard], alone[heard], atol=2e-4)

    monkeypatch.setattr("pi_finetune.results.evaluation.LONG_SECONDS", 0.5)
    sizes.clear()
    evaluate_system(calls / "out/x/0", enhancer, load_recordings(calls), [], batch_size=4)
    assert len(sizes) == 9


class Counted:
    """An enhancer that halves, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, wavs):
        self.calls += 1
        return wavs.with_data(wavs.data * -1)


def test_mixes_are_made_of_one_enhancement_and_resume_by_themselves(calls, tmp_path, monkeypatch):
    data, enhancer = load_recordings(calls), Counted()
    folders = {mix: tmp_path / f"half-{mix}" / "0" for mix in (0.25, 0.5, 1.0)}

    class Loudness(Parrot):
        def __call__(self, wavs):
            return [f"{float(w.abs().mean()):.6f}" for w in wavs.items()]

    class Dying(Loudness):
        left = 5

        def __call__(self, wavs):
            type(self).left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__call__(wavs)

    with pytest.raises(KeyboardInterrupt):
        evaluate_mixes(folders, enhancer, data, [Dying()], batch_size=4)
    assert enhancer.calls == 2
    paths = evaluate_mixes(folders, enhancer, data, [Loudness()], batch_size=4)
    assert enhancer.calls == 4  # the second batch again, for one of the three, and the third
    said = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    for quarter, half, all_ in zip(*said):
        assert quarter["strategy"] == "half-0.25"
        if not (all_["asr"] and all_["asr"]["parrot"]):
            continue
        levels = [float(x["asr"]["parrot"]["hypothesis"]) for x in (quarter, half, all_)]
        # mix * -x + (1 - mix) * x: a half and none of what all of it has
        assert levels[0] == pytest.approx(levels[2] / 2, abs=2e-6) and levels[1] < 1e-6
    evaluate_mixes(folders, enhancer, data, [Loudness()], batch_size=4)
    assert enhancer.calls == 4
    with pytest.raises(UserError, match="made with other mix"):
        evaluate_mixes({0.7: folders[0.5]}, enhancer, data, [Loudness()])


# Audio for other tools


def table(path):
    """A list as VERSA (``maxsplit=1``) and the scripts of URGENT (no ``maxsplit``) read it."""
    lines = path.read_text().splitlines()
    if path.suffix == ".scp":
        assert all(len(line.strip().split()) == 2 for line in lines)
    rows = dict(line.strip().split(maxsplit=1) for line in lines)
    assert list(rows) == sorted(rows) and len(rows) == len(lines)
    return rows


def test_saved_audio_is_what_was_scored_in_lists_that_others_read(evaluate, corpus, tmp_path):
    saved = tmp_path / "saved"
    results = evaluate(["noisy", "pretrained"], save_audio=saved, each_snr=True, snrs="[0, 10]")
    lines = {line["id"]: line for line in scores(results / "pretrained/0")}
    folder = saved / "pretrained/0"
    lists = {name: table(folder / f"{name}.scp") for name in ("enhanced", "noisy", "clean")}
    texts = table(folder / "text")
    assert set(texts) == set(lines) == set(lists["enhanced"]) and len(lines) == 12
    for id_, line in lines.items():
        wavs = {}
        for name, rows in lists.items():
            assert rows[id_].startswith(f"{saved}/") and rows[id_].endswith(".flac")
            wavs[name], rate = soundfile.read(rows[id_], dtype="float32")
            assert rate == 16000 and wavs[name].ndim == 1
        assert len({wav.shape for wav in wavs.values()}) == 1
        assert texts[id_] == line["asr"]["parrot"]["reference"]
        said = Parrot()(Waveforms.of(torch.from_numpy(wavs["enhanced"])[None]))[0]
        assert said == line["asr"]["parrot"]["hypothesis"]
    assert table(saved / "noisy/0/enhanced.scp") == lists["noisy"] != lists["enhanced"]
    # such a list is a corpus again
    assert list(prepare_recordings(saved / "noisy/0/noisy.scp")) == sorted(lines)


def test_saved_audio_resumes_and_appears_whole(evaluate, tmp_path, monkeypatch, capsys):
    saved, calls = tmp_path / "saved", []
    write = soundfile.write

    def die(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 8:
            write(*arguments, **options)
            raise KeyboardInterrupt  # what is written has not its name yet
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pi_finetune.data.audio.soundfile.write", die)
        with pytest.raises(SystemExit):
            evaluate(["pretrained"], save_audio=saved, batch_size=2, audio_examples=0)
    there = {path: path.read_bytes() for path in saved.rglob("*.flac")}
    assert len(there) == 7 and not list(saved.rglob("*.scp")) and not list(saved.rglob("*.part"))
    evaluate(["pretrained"], save_audio=saved, batch_size=2, audio_examples=0)
    assert len(list(saved.rglob("*.flac"))) == 18
    assert all(path.read_bytes() == content for path, content in there.items())
    # audio of systems that were scored before is made without scoring them again
    monkeypatch.setattr(Parrot, "__call__", lambda *_: pytest.fail("scored again"))
    evaluate(["pretrained"], save_audio=tmp_path / "again", audio_examples=0)
    assert table(tmp_path / "again/pretrained/0/enhanced.scp")
    monkeypatch.undo()

    with pytest.raises(SystemExit):
        evaluate(["noisy"], save_audio=saved, data_seed=1)
    assert "holds the audio of another test set" in capsys.readouterr().err


def test_other_weights_are_not_mixed_with_saved_audio(calls, tmp_path):
    data = load_recordings(calls, count=1)
    options = {"save_audio": tmp_path / "saved"}
    for weight in (1.0, 2.0):
        enhancer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(enhancer.weight, weight)
        enhancer.forward = lambda wavs: wavs
        folder = tmp_path / f"{weight}" / "x" / "0"
        if weight == 1:
            evaluate_system(folder, enhancer, data, [], **options)
    with pytest.raises(UserError, match="x/0 holds audio made with other weights"):
        evaluate_system(folder, enhancer, data, [], **options)
    evaluate_system(folder, enhancer, data, [], **options, overwrite=True)
    assert len(table(tmp_path / "saved/x/0/enhanced.scp")) == 1
    assert not (tmp_path / "saved/x/0/clean.scp").exists()


def test_names_that_the_lists_cannot_hold(tmp_path):
    for name in ("a b", "a_b"):
        soundfile.write(tmp_path / f"{name}.wav", np.ones(16000) * 0.1, 16000)
    data = load_recordings(tmp_path)
    with pytest.raises(UserError, match=r"blank.* Name another folder"):
        evaluate_system(tmp_path / "n/0", None, data, [], save_audio=tmp_path / "out of here")
    with pytest.raises(UserError, match="'a b' and 'a_b' would both be a_b"):
        evaluate_system(tmp_path / "n/1", None, data, [], save_audio=tmp_path / "out")
    (tmp_path / "a_b.wav").unlink()
    data = load_recordings(tmp_path)
    evaluate_system(tmp_path / "n/2", None, data, [], save_audio=tmp_path / "out")
    assert list(table(tmp_path / "out/n/2/noisy.scp")) == ["a_b"]
