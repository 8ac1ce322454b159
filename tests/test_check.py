"""pi-finetune check: the verdict on hand-made scores, and the command from end to end."""

import json
import re

import numpy as np
import pytest
import soundfile
from running import LikelyParrot
from synthetic import save_tiny_enhancer, voice

from pi_finetune.__main__ import main
from pi_finetune.data.recordings import load_recordings
from pi_finetune.enhancers import load_enhancer
from pi_finetune.inference import Enhancer
from pi_finetune.recipes import check as recipe
from pi_finetune.report.verdict import verdict
from pi_finetune.results.comparison import compare_runs
from pi_finetune.results.statistics import Bootstrap

LABELS = {f"a-mix{mix}": f"A at mix {mix}" for mix in ("0.5", "1")}


def judged(folder, noisy, systems, nll=None, transcripts=True, **scores):
    """The verdict on errors of ten words: ``noisy`` [U], and of each system."""
    for name, errors in {"noisy": noisy, **systems}.items():
        place = folder / name / "0" / "scores"
        place.mkdir(parents=True)
        lines = []
        for i, count in enumerate(errors):
            counts = {"hits": 10 - int(count), "substitutions": int(count), "deletions": 0}
            entry = {"hypothesis": "", "reference": "", "insertions": 0, **counts}
            if nll:
                entry |= {"nll": 10.0 * nll[name] + 0.1 * (i % 3), "tokens": 10}
            own = {key: values[name] + 0.01 * (i % 5) for key, values in scores.items()}
            asr = {"asr": entry} if transcripts else {}
            lines.append({"id": f"u{i:03}", "recording": f"u{i:03}", **own, "asr": asr})
        (place / "recordings.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    comparison = compare_runs(
        [folder], "recordings", "noisy", bootstrap=Bootstrap(replicates=999), of_models=True
    )
    return verdict(comparison, LABELS)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_system_with_fewer_errors_is_recommended(tmp_path, rng):
    noisy = rng.integers(3, 7, 60)
    systems = {"a-mix0.5": noisy - 2 * (rng.random(60) < 0.8), "a-mix1": noisy - 1}
    nll = {"noisy": 2.0, "a-mix0.5": 1.8, "a-mix1": 1.9}
    found = judged(tmp_path, noisy, systems, nll)
    assert (found.kind, found.system) == ("use", "a-mix0.5")
    a, b = (10 * errors.mean() for errors in (noisy, systems["a-mix0.5"]))
    low, high = re.search(
        r"95 % interval of the difference −(\S+) to −(\S+) points", found.text
    ).groups()
    assert f"Use A at mix 0.5: word errors fall from {a:.1f} % to {b:.1f} %" in found.text
    assert float(high) < a - b < float(low) and "best of 2 that were tried" in found.text
    assert "The negative log-likelihood of the true transcripts falls from 2.0" in found.text


def test_systems_with_more_errors_are_not(tmp_path, rng):
    noisy = rng.integers(1, 4, 60)
    found = judged(tmp_path, noisy, {"a-mix0.5": noisy + 1, "a-mix1": noisy + 3})
    assert (found.kind, found.system) == ("leave", None)
    assert found.text.startswith("Do not enhance: with A at mix 0.5, word errors rise from")
    assert "the mildest of 2 systems" in found.text


def test_equal_systems_do_no_harm(tmp_path, rng):
    noisy = rng.integers(1, 4, 400)
    same = noisy.copy()
    same[0] += 1
    found = judged(tmp_path, noisy, {"a-mix0.5": same, "a-mix1": noisy + 3})
    assert found.kind == "leave" and "by more than 0.5 points. With A at mix 0.5" in found.text


def test_a_difference_that_may_be_chance_says_how_much_speech_would_tell(tmp_path, rng):
    noisy = rng.integers(2, 6, 40)
    change = rng.integers(-2, 3, 40)
    change -= round(change.sum() / 40 + 0.2)  # a slight gain among much noise
    change[:4] -= 1
    found = judged(tmp_path, noisy, {"a-mix0.5": noisy + change, "a-mix1": noisy + 3})
    assert found.kind == "undecided" and found.system is None
    assert found.text.startswith("Cannot say: 40 recordings are too few for a difference of this")
    assert "What is sure: A at mix 1 adds errors. Until then, leave the speech" in found.text
    needed = re.search(r"about (\d+) recordings in all would tell", found.text)
    assert needed and int(needed[1]) > 40


def test_few_recordings_decide_nothing(tmp_path):
    noisy = np.full(19, 5)
    found = judged(tmp_path, noisy, {"a-mix1": noisy - 4})
    assert found.kind == "undecided"
    assert "19 recordings are too few, from 20 on" in found.text
    assert "from 50.0 % to 10.0 %" in found.text


def test_without_transcripts_nothing_is_said_of_recognition(tmp_path):
    noisy = np.full(30, 5)
    found = judged(tmp_path, noisy, {"a-mix1": noisy - 4}, transcripts=False)
    assert found.kind == "undecided" and "pi_finetune[metrics]" in found.text
    assert "word errors fall" not in found.text


def test_scores_without_reference_speak_where_there_are_no_transcripts(tmp_path):
    noisy = np.full(30, 5)
    found = judged(
        tmp_path, noisy, {"a-mix0.5": noisy, "a-mix1": noisy}, transcripts=False,
        dnsmos_sig={"noisy": 3.0, "a-mix0.5": 3.5, "a-mix1": 2.5},
        dnsmos_ovrl={"noisy": 2.0, "a-mix0.5": 2.25, "a-mix1": 2.5},
    )  # fmt: skip
    assert found.kind == "undecided" and "Cannot say what a recogniser makes of it" in found.text
    assert "A at mix 1 sounds best: DNSMOS OVRL rises from 2.02 to 2.52 (95 %" in found.text


# The command


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Noisy voices at 22.05 kHz in two channels, LibriSpeech's layout, a silent one among them."""
    folder = tmp_path_factory.mktemp("own") / "calls"
    rng = np.random.default_rng(3)
    lines = []
    for i in range(21):
        wav = voice(0.5, 120 + 5 * i, rng) + 0.02 * rng.standard_normal(8000)
        wav = np.zeros(8000) if i == 5 else wav
        name = f"{i % 3}-1-{i:04}"
        path = folder / str(i % 3) / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.stack([wav, wav], 1), 22050)
        lines.append(f"{name} ONE TWO THREE\n")
    (folder / "calls.trans.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def tiny(pretrained, tmp_path, monkeypatch):
    """The command with tiny models, in an empty folder; counts what is recognised."""
    heard = []

    class Counting(LikelyParrot):
        def __call__(self, wavs):
            heard.append(len(wavs))
            return super().__call__(wavs)

    monkeypatch.setattr("pi_finetune.inference.DEFAULT_MODEL", pretrained)
    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda _: Counting())
    # DNSMOS takes a second of computing an utterance
    monkeypatch.setattr("pi_finetune.results.evaluation.without_reference", lambda: [])
    monkeypatch.chdir(tmp_path)
    save_tiny_enhancer(tmp_path / "results" / "mse" / "7", seed=1)
    return heard


def test_the_command_answers_with_tables_and_a_report(recordings, tiny, tmp_path, capsys):
    command = ["check", str(recordings), "--run", "results/mse/7", "--mix", "0.5", "1"]
    command += ["--output_folder", "out", "--batch_size", "6"]
    assert not main(command)
    out = capsys.readouterr().out
    assert "21 recordings, 0.1 min, 21 transcribed" in out
    answer = next(x for x in out.splitlines() if re.match("(Use|Do not|Cannot say)", x))
    for system in ("shipped-mix0.5", "shipped-mix1", "mse-7-mix0.5", "mse-7-mix1", "noisy"):
        assert re.search(rf"^\| {system} ", out, re.M)
    assert "wer: 1 of 21 utterances are left out" not in out  # null in all of them, not in one
    assert "needs a clean reference" in out and "no run of" not in out and "one seed" not in out
    page = (tmp_path / "out" / "report.html").read_text()
    text = answer.replace("'", "&#39;")
    assert text in page and page.count("<audio") >= 3 and "Does enhancement help on" in page
    assert "training seed" not in page and "recipes/check.py" in page
    table = (tmp_path / "out" / "table.csv").read_text()
    assert ",1," in table.splitlines()[1]  # the silent one, counted
    assert sum(tiny) == 21 * 5
    main(command)  # nothing is recognised again, and the answer stands
    assert sum(tiny) == 21 * 5 and answer in capsys.readouterr().out


def test_the_scores_are_of_the_mix_that_is_named(recordings, tiny, pretrained, tmp_path):
    """The parrot's likelihood is the power of what it hears; ``enhance --mix`` makes the same."""
    recipe.check(recordings, mix=[0.25, 1.0], utterances=4, output_folder="out")
    enhancer = Enhancer(load_enhancer(pretrained), "cpu")
    data = load_recordings(recordings, count=4)
    for mix in (0.25, 1.0):
        scores = tmp_path / "out" / f"shipped-mix{mix:g}" / "0/scores/recordings.jsonl"
        for i, line in enumerate(map(json.loads, scores.read_text().splitlines())):
            wav = enhancer.enhance(data[i]["noisy"], mix=mix)
            assert line["id"] == data.item_id(i)
            assert line["asr"]["parrot"]["nll"] == pytest.approx(1 + float(wav.square().mean()))


def test_an_interrupted_check_goes_on(recordings, tiny, monkeypatch, capsys):
    call = LikelyParrot._say
    said = []

    def die(self, wav):
        said.append(1)
        if len(said) == 30:
            raise KeyboardInterrupt
        return call(self, wav)

    words = ["check", str(recordings), "--mix", "1", "--output_folder", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(LikelyParrot, "_say", die)
        with pytest.raises(SystemExit) as stopped:
            main(words)
    assert stopped.value.code == 130
    before = sum(tiny)
    main(words)
    assert sum(tiny) - before < 21
    with pytest.raises(SystemExit):
        main([*words, "--utterances", "4"])
    assert "was made with other pairs. Add --overwrite" in capsys.readouterr().err
    main([*words, "--utterances", "4", "--overwrite"])
    assert "4 recordings are too few" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--no_dnsmos"]])
def test_dnsmos_can_be_left_out(recordings, tiny, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr("pi_finetune.results.evaluation.without_reference", lambda: ["dnsmos_ovrl"])
    monkeypatch.setattr("pi_finetune.results.pool.metrics.dnsmos", lambda wav: {"dnsmos_ovrl": 2.5})
    main(["check", str(recordings), "--mix", "1", "--utterances", "2", "--workers", "0", *words])
    assert ("DNSMOS" in capsys.readouterr().out) == (not words)
    (tmp_path / "list.csv").write_text(f"ID,wav\na,{next(recordings.rglob('*.flac'))}\n")
    if words:
        with pytest.raises(SystemExit):
            main(["check", "list.csv", *words])
        assert "--no_dnsmos: without transcripts" in capsys.readouterr().err


def test_without_transcripts_no_recogniser_is_loaded(recordings, tiny, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(
        "ID,wav\n" + "".join(f"{p.stem},{p}\n" for p in sorted(recordings.rglob("*.flac"))[:4])
    )
    main(["check", "list.csv", "--mix", "1", "--asr_source", "/nowhere"])
    out = capsys.readouterr().out
    assert not tiny and "0 transcribed" in out and "Cannot say" in out
    assert (tmp_path / "checks/list.csv/report.html").is_file()
