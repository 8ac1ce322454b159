"""Reading runs, tables against hand sums, and the report in a browser."""

import csv
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from running import recipe

from pi_finetune import spectrograms
from pi_finetune.errors import UserError
from pi_finetune.report import examples, html, plots, tables
from pi_finetune.results.comparison import compare_runs
from pi_finetune.results.declarations import NLL, WER
from pi_finetune.results.runs import Run, find_runs, load_runs, read_json_lines
from pi_finetune.results.scores import metric_scores, metrics_of, resampling_units
from pi_finetune.results.statistics import Bootstrap, Interval, holm

FEW = Bootstrap(replicates=199)
REFERENCE = "the cat sat on a mat by an old door"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def line(id_, errors=0, hypothesis=None, **fields):
    """A score line of a ten-word utterance with that many substitutions."""
    words = ["dog"] * errors + REFERENCE.split()[errors:]
    counts = {"hits": 10 - errors, "substitutions": errors, "deletions": 0, "insertions": 0}
    text = " ".join(words) if hypothesis is None else hypothesis
    return {
        "id": id_, "snr": 5.0, "noise_class": "hum", "duration": 2.0,
        "pesq": 2.0, "stoi": 0.8, "estoi": 0.7, "si_sdr": 10.0,
        "asr": {"ctc": {"hypothesis": text, "reference": REFERENCE, **counts}},
        **fields,
    }  # fmt: skip


def write_run(root, name, lines=None, valid=None, test_set="test"):
    """A run folder; ``name`` is STRATEGY/SEED."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if lines is not None:
        (folder / "scores").mkdir(exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        (folder / "scores" / f"{test_set}.jsonl").write_text(text)
    if valid is not None:
        (folder / "valid.jsonl").write_text("".join(json.dumps(v) + "\n" for v in valid))
    return folder


def dev_lines(wers, step=100):
    return [
        {"update": step * i, "seconds": 2.0 * i, "wer": wer, "si_sdr": 5.0 + i, "pesq": 1.5}
        for i, wer in enumerate(wers, 1)
    ]


@pytest.fixture
def results(simulated, tmp_path):
    """A copy of the simulated runs, to be changed at will."""
    return shutil.copytree(simulated, tmp_path / "results")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Simulated runs: soft_dtw has clearly fewer errors than mse, zero_pad as many."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("simulated") / "results"
    difficulty = rng.uniform(0.3, 0.5, 40)
    about = [
        {"snr": float(rng.choice([0, 5])), "noise_class": str(rng.choice(["hum", "babble"])),
         "duration": float(rng.uniform(1, 6))}
        for _ in range(40)
    ]  # fmt: skip
    gains = {"noisy": -0.1, "pretrained": 0, "mse": 0.1, "zero_pad": 0.1, "soft_dtw": 0.25}
    for strategy, gain in gains.items():
        for seed in (0,) if gain <= 0 else (1, 2, 3):
            lines = [
                line(f"u{i:02}", int(rng.binomial(10, difficulty[i] - gain)), **about[i],
                     pesq=1.5 + gain + 0.1 * rng.normal())
                for i in range(40)
            ]  # fmt: skip
            valid = None
            if gain > 0:
                start = 60 - 100 * gain
                valid = dev_lines([start, start - 5, start - 9, start - 8.5])
            folder = write_run(root, f"{strategy}/{seed}", lines, valid)
            write_audio(folder, strategy, ("u03", "u10"), gain)
    return root


def write_audio(folder, strategy, ids, gain):
    """Chirps as speech, so that spectrograms and alignments have something in them."""
    audio = folder / "scores" / "test" / "audio"
    audio.mkdir(parents=True)
    rng = np.random.default_rng(1)
    time = np.arange(16000) / 16000
    for id_ in ids:
        clean = 0.3 * np.sin(2 * np.pi * (300 + 900 * time) * time) * (np.sin(9 * time) > 0)
        noisy = clean + 0.1 * (1 - gain) * rng.normal(size=16000)
        kinds = {"noisy": noisy, "clean": clean} if strategy == "noisy" else {"enhanced": noisy}
        for kind, wav in kinds.items():
            soundfile.write(audio / f"{id_}.{kind}.flac", wav, 16000)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Reading


def test_half_written_last_line_is_left_out_and_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\n{"id": 3, "pe')
    notes = []
    assert read_json_lines(path, notes) == [{"id": 1}, {"id": 2}]
    assert len(notes) == 1 and "a.jsonl" in notes[0]


def test_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read_json_lines(path)


def test_runs_are_found_from_folders_parents_and_globs_once(results):
    (results / "table.csv").write_text("not a run")
    write_run(results, "asr/7", valid=[{"update": 1, "wer": 30.0}])  # a recogniser's training
    found = find_runs([results, results / "mse", results / "mse/1", results / "table.csv"])
    assert len(found) == 11 and results / "mse" / "1" in found


def test_no_run_and_missing_folder_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="No run under"):
        find_runs([tmp_path])
    write_run(tmp_path, "mse/best", [line("a")])
    with pytest.raises(UserError, match=r"best.*no seed"):
        find_runs([tmp_path])


def test_two_folders_of_one_run_are_refused(tmp_path):
    for name in ("a/mse/1", "b/mse/1"):
        write_run(tmp_path, name, [line("u")])
    with pytest.raises(UserError, match="both mse/1"):
        load_runs([tmp_path])


def test_the_set_is_chosen_or_named(tmp_path):
    write_run(tmp_path, "mse/1", [line("u")], test_set="clean")
    assert load_runs([tmp_path])[1] == "clean"
    write_run(tmp_path, "mse/1", [line("u")], test_set="street")
    with pytest.raises(UserError, match="clean, street"):
        load_runs([tmp_path])
    assert load_runs([tmp_path], "street")[1] == "street"


def test_order_is_noisy_pretrained_then_strategies(results):
    for name in ("another/1", "si_sdr/1"):
        shutil.copytree(results / "mse/1", results / name)
    runs, _ = load_runs([results])
    order = list(dict.fromkeys(run.strategy for run in runs))
    assert order == ["noisy", "pretrained", "mse", "zero_pad", "soft_dtw", "another", "si_sdr"]


# Comparability


def test_differing_utterances_are_refused_or_intersected_with_a_warning(tmp_path):
    write_run(tmp_path, "mse/1", [line("a", 5), line("b", 1), line("c", 1)])
    write_run(tmp_path, "soft_dtw/1", [line("b", 2), line("c", 2), line("d", 9)])
    with pytest.raises(
        UserError, match=r"mse/1 lacks 1 of 4; soft_dtw/1 lacks 1 of 4.*2 utterances"
    ):
        compare_runs([tmp_path], bootstrap=FEW)
    comparison = compare_runs([tmp_path], intersect=True, bootstrap=FEW)
    assert comparison.scores["wer"].mean("mse", 1) == pytest.approx(10)
    assert comparison.scores["wer"].mean("soft_dtw", 1) == pytest.approx(20)
    assert any("over the 2 they share" in note for note in comparison.notes)


def test_half_evaluated_run_is_refused(tmp_path):
    write_run(tmp_path, "mse/1", [line("a"), line("b")])
    folder = write_run(tmp_path, "soft_dtw/1", [line("a"), line("b")])
    path = folder / "scores" / "test.jsonl"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match="soft_dtw/1 lacks 1 of 2"):
        compare_runs([tmp_path], bootstrap=FEW)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"snr": 0.0}, "snr is 5"),
        ({"noise_class": "rain"}, "noise_class"),
        ({"duration": 3}, "dur"),
    ],
)
def test_different_mixtures_are_refused(tmp_path, other, message):
    write_run(tmp_path, "mse/1", [line("a")])
    write_run(tmp_path, "soft_dtw/1", [line("a", **other)])
    with pytest.raises(UserError, match=message):
        compare_runs([tmp_path], intersect=True, bootstrap=FEW)


def test_different_fingerprints_and_transcripts_are_refused(tmp_path):
    for name, pairs in (("mse/1", "x"), ("soft_dtw/1", "y")):
        folder = write_run(tmp_path, name, [line("a")])
        (folder / "scores" / "test.settings.json").write_text(json.dumps({"pairs": pairs}))
    with pytest.raises(UserError, match="different mixtures of the same utterances"):
        compare_runs([tmp_path], bootstrap=FEW)
    shorter = line("a")
    shorter["asr"]["ctc"]["hits"] = 4
    (write_run(tmp_path, "soft_dtw/1", [shorter]) / "scores" / "test.settings.json").unlink()
    with pytest.raises(UserError, match="10 words in mse/1 and 4 in soft_dtw/1"):
        compare_runs([tmp_path], bootstrap=FEW)


# Numbers


def test_table_against_hand_sums(tmp_path):
    write_run(tmp_path, "noisy/0", [line("a", 6), line("b", 4)])
    first, second = line("a", 1, pesq=3.0, stoi=0.9), line("b", 2, pesq=2.0, stoi=0.7)
    second["asr"]["ctc"].update(hits=7, deletions=1, insertions=3)
    second["asr"]["whisper"] = second["asr"]["ctc"]
    first["asr"]["whisper"] = {**first["asr"]["ctc"], "insertions": 1}
    write_run(tmp_path, "mse/7", [first, second])
    paths = tables.write_tables(compare_runs([tmp_path], bootstrap=FEW), tmp_path / "out")
    rows = {row["strategy"]: row for row in rows_of(tmp_path / "out" / "table.csv")}
    assert list(rows["mse"])[:7] == "strategy seed wer pesq stoi estoi si_sdr".split()
    assert list(rows) == ["noisy", "pretrained", "mse"]
    assert float(rows["noisy"]["wer"]) == 50
    mse = rows["mse"]
    assert float(mse["wer"]) == 100 * (1 + 2 + 1 + 3) / 20
    assert (float(mse["pesq"]), float(mse["stoi"])) == (2.5, 0.8)
    assert float(mse["wer_whisper"]) == 100 * (2 + 6) / 20
    assert [mse[k] for k in ("substitutions", "deletions", "insertions")] == ["3", "1", "3"]
    assert (mse["utterances"], mse["words"], mse["seed"]) == ("2", "20", "7")
    assert rows["noisy"]["wer_whisper"] == ""  # not recognised by it: missing, not zero
    assert set(rows["pretrained"].values()) == {"pretrained", ""}
    assert {path.name for path in paths} == {
        f"{name}.{kind}" for name in ("table", "summary") for kind in ("csv", "md", "tex")
    }


def test_another_recogniser_can_be_the_main_one(tmp_path):
    entry = line("a", 1)
    entry["asr"]["whisper"] = line("a", 5)["asr"]["ctc"]
    write_run(tmp_path, "mse/1", [entry])
    comparison = compare_runs([tmp_path], recognizer="whisper", bootstrap=FEW)
    assert comparison.scores["wer"].mean("mse") == 50
    assert comparison.scores["wer_ctc"].mean("mse") == 10
    with pytest.raises(UserError, match="there is ctc, whisper"):
        compare_runs([tmp_path], recognizer="kaldi", bootstrap=FEW)


def likely(id_, nlls, **fields):
    """A score line with the likelihood of eleven tokens under each recogniser."""
    entry = line(id_, 1, **fields)
    for name, nll in nlls.items():
        entry["asr"][name] = {**line(id_, 1)["asr"]["ctc"], "nll": nll, "tokens": 11}
    return entry


def test_likelihood_is_a_metric_where_the_scores_hold_one(tmp_path):
    write_run(tmp_path, "mse/1", [likely("a", {"ctc": 11.0}), likely("b", {"ctc": 33.0})])
    lower = [likely("a", {"ctc": 5.5, "whisper": 22.0}), likely("b", {"ctc": 16.5, "whisper": 0.0})]
    write_run(tmp_path, "soft_dtw/1", lower)
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    names = [metric.name for metric in comparison.metrics]
    assert names == "wer nll pesq stoi estoi si_sdr wer_whisper nll_whisper".split()
    assert [metric.name for metric in comparison.main_metrics] == names[:-2]
    assert comparison.metrics[-1].label == "NLL (nats/token), whisper"
    nll = comparison.scores["nll"]
    assert (nll.mean("mse"), nll.mean("soft_dtw")) == (2.0, 1.0)
    assert comparison.scores["nll_whisper"].mean("mse") is None
    found = comparison.summary["nll"]["soft_dtw"].difference
    assert found.estimate == -1.0 and found.p_improvement > 0.9  # lower is better
    (row,) = (row for row in tables.run_rows(comparison) if row["strategy"] == "mse")
    assert (row["nll"], row["failed_nll"]) == (2.0, 0)
    assert "NLL (nats/token) ↓" in tables.summary_table(comparison, tables.markdown)


def test_text_that_a_recogniser_made_up_is_said(tmp_path):
    def of(errors):
        entries = [line(id_) for id_ in "abc"]
        for entry, insertions in zip(entries, errors):
            entry["asr"]["ctc"]["insertions"] = insertions
        return entries

    write_run(tmp_path, "noisy/0", of([30, 10, 20]))  # of ten words each
    write_run(tmp_path, "mse/1", of([19, 19, 19]))
    (note,) = (n for n in compare_runs([tmp_path], bootstrap=FEW).notes if "made up" in n)
    assert note.startswith("wer: ctc made up text") and "in 2 of noisy (83% of its errors);" in note
    write_run(tmp_path, "noisy/0", of([19, 10, 19]))
    assert "made up" not in "".join(compare_runs([tmp_path], bootstrap=FEW).notes)


def test_an_utterance_without_likelihood_is_left_out_of_every_row_and_is_counted(tmp_path):
    nats = {"mse/1": (11.0, 33.0, 44.0), "soft_dtw/1": (22.0, None, 44.0)}
    for name, values in nats.items():
        write_run(tmp_path, name, [likely(i, {"ctc": v}) for i, v in zip("abc", values)])
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    nll = comparison.scores["nll"]
    assert (nll.mean("mse"), nll.mean("soft_dtw"), nll.ids) == (2.5, 3.0, ["a", "c"])
    assert nll.failed["soft_dtw", 1] == 1
    assert any("nll: 1 of 3 utterances" in note for note in comparison.notes)


def test_likelihoods_of_other_transcripts_are_refused(tmp_path):
    for name, tokens in (("mse/1", 11), ("soft_dtw/1", 12)):
        entry = likely("a", {"ctc": 5.0})
        entry["asr"]["ctc"]["tokens"] = tokens
        write_run(tmp_path, name, [entry])
    with pytest.raises(UserError, match="11 tokens in mse/1 and 12 in soft_dtw/1"):
        compare_runs([tmp_path], bootstrap=FEW)


def test_dev_curves_of_likelihood(tmp_path):
    for name, nlls in (("mse/1", (3.0, 2.0)), ("soft_dtw/1", (2.0, 1.5))):
        valid = [{"update": 10 * i, "seconds": 1.0, "nll": nll} for i, nll in enumerate(nlls, 1)]
        write_run(tmp_path, name, [line("a", 1)], valid)
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    assert comparison.dev_metric.label == "dev NLL (nats/token)"
    assert comparison.convergence["soft_dtw"].updates == [10]
    assert comparison.convergence["mse"].updates == [20]


def test_phoneme_errors_are_called_so(tmp_path):
    entry = {"hits": 3, "substitutions": 1, "deletions": 0, "insertions": 0, "unit": "phoneme"}
    lines = [{**line(f"u{i}", 1), "asr": {"pr": entry}} for i in range(3)]
    comparison = compare_runs([write_run(tmp_path, "mse/1", lines)], bootstrap=FEW)
    assert comparison.metrics[0].label == "PER (%)" and comparison.metrics[0].name == "wer"
    assert comparison.scores["wer"].mean("mse") == pytest.approx(25)


def test_a_failed_score_leaves_the_utterance_out_of_every_row_and_is_counted(tmp_path):
    write_run(tmp_path, "mse/1", [line(i, pesq=p) for i, p in zip("abc", (1.0, 2.0, 4.5))])
    broken = [line("a", pesq=1.5), line("b", pesq=2.5), line("c", pesq=None)]
    write_run(tmp_path, "soft_dtw/1", broken)
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    pesq = comparison.scores["pesq"]
    assert (pesq.mean("mse"), pesq.mean("soft_dtw"), pesq.ids) == (1.5, 2.0, ["a", "b"])
    rows = {row["strategy"]: row for row in tables.run_rows(comparison)}
    assert (rows["mse"]["failed_pesq"], rows["soft_dtw"]["failed_pesq"]) == (0, 1)
    assert any("pesq: 1 of 3" in n and "soft_dtw/1 (1)" in n for n in comparison.notes)
    assert "failed scores" in tables.run_table(comparison, tables.markdown)


def test_a_run_that_mostly_failed_does_not_empty_the_others(tmp_path):
    write_run(tmp_path, "mse/1", [line(i, pesq=2.0) for i in "abc"])
    write_run(tmp_path, "soft_dtw/1", [line("a"), line("b", pesq=None), line("c", pesq=math.nan)])
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    assert comparison.scores["pesq"].mean("mse") == 2.0
    assert comparison.scores["pesq"].mean("soft_dtw") is None
    assert len(comparison.scores["pesq"].ids) == 3
    assert any("soft_dtw/1, marked –" in note for note in comparison.notes)
    assert "| –" in re.sub(" +", " ", tables.run_table(comparison, tables.markdown))


def test_utterances_without_transcript_count_in_signal_scores_only(tmp_path):
    lines = [line("a", 1), line("b", pesq=4.0, asr={})]
    write_run(tmp_path, "mse/1", lines)
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    (row,) = (row for row in tables.run_rows(comparison) if row["strategy"] == "mse")
    assert (row["wer"], row["words"], row["pesq"], row["failed_wer"]) == (10, 10, 3.0, 0)


def test_missing_seeds_strategies_and_evaluations_are_marked_and_listed(tmp_path):
    write_run(tmp_path, "noisy/0", [line("a", 5)])
    for name in ("mse/1", "mse/2", "soft_dtw/1"):
        write_run(tmp_path, name, [line("a", 2)])
    write_run(tmp_path, "zero_pad/1", valid=dev_lines([20.0]))
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    rows = [(row["strategy"], row["seed"], row["wer"]) for row in tables.run_rows(comparison)]
    assert rows == [
        ("noisy", 0, 50), ("pretrained", None, None), ("mse", 1, 20), ("mse", 2, 20),
        ("zero_pad", 1, None), ("zero_pad", 2, None), ("soft_dtw", 1, 20), ("soft_dtw", 2, None),
    ]  # fmt: skip
    for note in (
        "no run of pretrained",
        "soft_dtw: no run with seed 2",
        "zero_pad/1: not evaluated on this set",
        "one seed only of soft_dtw, zero_pad",
    ):
        assert note in "\n".join(comparison.notes)


def test_no_baseline_means_no_differences(tmp_path):
    write_run(tmp_path, "soft_dtw/1", [line("a"), line("b", 3)])
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    assert comparison.baseline is None
    assert comparison.summary["wer"]["soft_dtw"].difference is None
    assert any("no scores of the baseline mse" in note for note in comparison.notes)


def test_summary_differences_and_markers(results):
    comparison = compare_runs([results], bootstrap=Bootstrap(999))
    summary = comparison.summary["wer"]
    mean = {s: np.mean([comparison.scores["wer"].mean(s, k) for k in (1, 2, 3)])
            for s in ("mse", "soft_dtw")}  # fmt: skip
    found = summary["soft_dtw"]
    assert found.level.estimate == pytest.approx(mean["soft_dtw"])
    assert found.difference.estimate == pytest.approx(mean["soft_dtw"] - mean["mse"])
    assert found.difference.paired_seeds and found.difference.high < 0
    assert found.marker == "*" and found.p_holm >= found.difference.p_value
    assert summary["zero_pad"].marker == "" and summary["zero_pad"].p_holm > 0.05
    assert summary["mse"].difference is None
    assert summary["pretrained"].p_holm is None  # shown, but not a hypothesis
    reverse = compare_runs([results], baseline="soft_dtw", bootstrap=Bootstrap(999))
    assert reverse.summary["wer"]["mse"].marker == "†"
    against_one = compare_runs([results], baseline="pretrained", bootstrap=FEW)
    assert not against_one.summary["wer"]["mse"].difference.paired_seeds


def test_one_recording_at_several_snrs_is_one_resampling_unit(tmp_path):
    lines = [line(f"{u}@{snr:g}dB", e, snr=snr) for u, e in zip("ab", (1, 3)) for snr in (-5, 2.5)]
    write_run(tmp_path, "mse/1", lines)
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    assert any("only 2 recordings" in note for note in comparison.notes)
    values, weights = comparison.scores["wer"].resampling_units("mse")
    assert values.tolist() == [[200, 600]] and weights.tolist() == [20, 20]


def test_recordings_and_speakers_are_read_from_lines_and_not_from_ids(tmp_path):
    about = [{"recording": f"r{i // 3}", "speaker": f"s{i % 2}"} for i in range(12)]
    lines = [line(f"u{i}@infdB", i % 3, **about[i]) for i in range(12)]
    comparison = compare_runs([write_run(tmp_path, "mse/1", lines)], bootstrap=FEW)
    assert len(comparison.scores["wer"].resampling_units("mse")[1]) == 4
    assert any(note.startswith("only 4 recordings") for note in comparison.notes)
    (note,) = (note for note in comparison.notes if "speaker" in note)
    assert note.startswith("only 2 speakers, too few to resample: intervals are about utterances")
    assert comparison.unit == "recording" and "over recordings and" in tables.explanation(
        comparison
    )


def test_old_ids_of_clean_and_loud_mixtures_are_one_recording(tmp_path):
    lines = [line(f"{name}@{snr}dB") for name in "ab" for snr in ("inf", "-5", "2.5")]
    comparison = compare_runs([write_run(tmp_path, "mse/1", lines)], bootstrap=FEW)
    assert len(comparison.scores["wer"].resampling_units("mse")[1]) == 2
    assert any("do not say who speaks" in note for note in comparison.notes)


def test_enough_speakers_are_what_is_resampled(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 9, 12)  # a speaker's utterances are alike
    lines = [
        line(f"u{i:03}", int(hard[i % 12]), recording=f"u{i:03}", speaker=f"s{i % 12}")
        for i in range(120)
    ]
    comparison = compare_runs([write_run(tmp_path, "mse/1", lines)], bootstrap=Bootstrap(999))
    _, weights = comparison.scores["wer"].resampling_units("mse")
    assert len(weights) == 12 and comparison.unit == "speaker"
    assert not any("speaker" in note for note in comparison.notes)
    level = comparison.summary["wer"]["mse"].level
    apart = [{**entry, "speaker": None} for entry in lines]
    other = compare_runs([write_run(tmp_path / "x", "mse/1", apart)], bootstrap=Bootstrap(999))
    narrow = other.summary["wer"]["mse"].level
    assert level.estimate == narrow.estimate
    assert level.high - level.low > 2 * (narrow.high - narrow.low)


def test_untranscribed_speech_has_no_failed_scores(tmp_path):
    for name in ("noisy/0", "mse/1"):
        write_run(tmp_path, name, [{**line(i), "asr": {}} for i in "ab"])
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    (row,) = (row for row in tables.run_rows(comparison) if row["strategy"] == "mse")
    assert (row["wer"], row["failed_wer"], row["failed_pesq"]) == (None, 0, 0)
    assert "failed scores" not in tables.run_table(comparison, tables.markdown)


def test_a_recogniser_that_was_not_asked_has_not_failed(tmp_path):
    write_run(tmp_path, "mse/1", [line("a"), line("b")])
    both = [line("a"), line("b")]
    for entry in both:
        entry["asr"]["whisper"] = entry["asr"]["ctc"]
    write_run(tmp_path, "soft_dtw/1", both)
    rows = {row["strategy"]: row for row in tables.run_rows(compare_runs([tmp_path]))}
    assert rows["mse"]["failed_wer_whisper"] == 0 and rows["mse"]["wer_whisper"] is None


def test_p_values_are_adjusted_over_what_is_shown_as_a_family(results):
    comparison = compare_runs([results], bootstrap=Bootstrap(999))
    found = {
        (metric.reference, metric.name, system): each
        for metric in comparison.metrics
        for system, each in comparison.summary[metric.name].items()
        if each.p_holm is not None
    }
    assert len(found) == 5 * 2  # WER and four signal metrics of zero_pad and soft_dtw
    for reference, family in (("transcript", "recognition, 2"), ("clean", "signal, 8")):
        members = [each for key, each in found.items() if key[0] == reference]
        expected = holm([each.difference.p_value for each in members])
        assert [each.p_holm for each in members] == expected.tolist()
        assert {each.family for each in members} == {family}
        assert family in tables.difference_table(comparison, tables.markdown)


def heard_lines(errors, nlls):
    lines = [likely(f"u{i:03}", {"ctc": float(nll)}) for i, nll in enumerate(nlls)]
    for entry, wrong in zip(lines, errors):
        entry["asr"]["ctc"].update(hits=10 - int(wrong), substitutions=int(wrong))
    return lines


def test_four_verdicts(tmp_path):
    """Better, worse, equivalent within the stated margin, undecided: each where it is true."""
    rng = np.random.default_rng(0)
    errors = rng.integers(2, 5, 600)
    nlls = 11 * rng.uniform(1, 2, 600)
    noise = lambda size: nlls * (1 + size * rng.normal(size=600))  # noqa: E731
    change = rng.choice([-2, -1, 0, 1, 2], 600)
    runs = {
        "mse": (errors, nlls),
        "better": (errors - rng.integers(0, 2, 600), noise(0.02) * 0.9),
        "worse": (errors + rng.integers(0, 2, 600), noise(0.02) * 1.1),
        "same": (errors, noise(0.02) * 0.995),  # surely better, but by half a percent
        "unclear": (errors + change, noise(0.9)),
    }
    for name, (wrong, nats) in runs.items():
        write_run(tmp_path, f"{name}/1", heard_lines(wrong, nats))
    comparison = compare_runs([tmp_path], bootstrap=Bootstrap(1999))
    for metric in ("wer", "nll"):
        verdicts = {s: f.verdict for s, f in comparison.summary[metric].items() if s != "mse"}
        assert verdicts == {
            "better": "better", "worse": "worse", "same": "equivalent", "unclear": "undecided"
        }  # fmt: skip
    same = comparison.summary["nll"]["same"]
    assert same.marker == "*" and same.p_holm < 0.05  # different, and it does not matter
    base = comparison.summary["nll"]["mse"].level.estimate
    assert same.difference.margin == pytest.approx(0.02 * base)
    assert comparison.summary["wer"]["same"].difference.margin == 0.5
    assert comparison.summary["pesq"]["same"].difference.margin is None
    table = tables.difference_table(comparison, tables.markdown)
    assert "equivalent" in table and "p (equivalence)" in table
    assert "the margin of 0.5 points of WER and 2 % of NLL" in tables.explanation(comparison)


def test_convergence_against_hand_values(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, f"mse/{seed}", [line("a", 2)], dev_lines([40, 30, 20 + seed, 25]))
        wers = [30, 21, 15, 15] if seed == 1 else [40, 30, 24, 23]
        write_run(tmp_path, f"soft_dtw/{seed}", [line("a", 1)], dev_lines(wers))
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    soft = comparison.convergence["soft_dtw"]
    assert soft.updates == [200, math.inf] and soft.seconds == [4, math.inf]
    assert soft.updates_mean is None and soft.budget == 400
    assert comparison.convergence["mse"].updates_mean.estimate == 300
    areas = [(25.5 + 18 + 15) / 3, (35 + 27 + 23.5) / 3]
    assert soft.area.estimate == pytest.approx(np.mean(areas))
    base = [(35 + 25.5 + 23) / 3, (35 + 26 + 23.5) / 3]
    assert soft.area_difference.estimate == pytest.approx(np.mean(areas) - np.mean(base))
    text = tables.convergence_table(comparison, tables.markdown)
    assert "200, > 400" in text.replace("\\", "") and "1 of 2" in text
    rows = tables.convergence_rows(comparison)
    assert [r["updates_to_target"] for r in rows] == [300, 300, 200, None]


def test_updates_needed_are_never_negative(tmp_path):
    for seed, wers in ((1, [20, 30, 30, 30]), (2, [30, 30, 30, 20])):
        write_run(tmp_path, f"mse/{seed}", [line("a")], dev_lines(wers))
    needed = compare_runs([tmp_path], bootstrap=FEW).convergence["mse"].updates_mean
    assert (needed.estimate, needed.low) == (250, 0) and needed.high > 400


def test_dev_curves_of_different_length_share_their_span(tmp_path):
    write_run(tmp_path, "mse/1", [line("a")], dev_lines([40, 30, 20]))
    write_run(tmp_path, "soft_dtw/1", [line("a")], dev_lines([40, 20]))
    comparison = compare_runs([tmp_path], bootstrap=FEW)
    assert comparison.convergence["mse"].area.estimate == pytest.approx(35)
    assert any("soft_dtw/1 end before 300 updates" in note for note in comparison.notes)


def test_dev_metric_falls_back_and_can_be_chosen(tmp_path):
    no_wer = [{k: v for k, v in entry.items() if k != "wer"} for entry in dev_lines([1, 2])]
    write_run(tmp_path, "mse/1", [line("a")], no_wer)
    write_run(tmp_path, "soft_dtw/1", [line("a")], dev_lines([1, 2]))
    assert compare_runs([tmp_path], bootstrap=FEW).dev_metric.name == "pesq"
    chosen = compare_runs([tmp_path], dev_metric="si_sdr", bootstrap=FEW)
    assert chosen.convergence["mse"].updates == [200]
    with pytest.raises(UserError, match="--dev_metric loss"):
        compare_runs([tmp_path], dev_metric="loss", bootstrap=FEW)


# Formats


def test_latex_escapes_and_marks_the_best():
    text = tables.latex(["a_b", "WER (%) ↓"], [["x&y", ("−1.0 [−2, 0]*", True)], ["z~^\\{", "–"]])
    assert r"a\_b & WER (\%) $\downarrow$ \\" in text
    assert r"x\&y & \textbf{$-$1.0 [$-$2, 0]$^{*}$} \\" in text
    assert r"z\textasciitilde{}\textasciicircum{}\textbackslash{}\{ & -- \\" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1


def test_markdown_escapes_and_aligns():
    text = tables.markdown(["zero_pad", "b"], [["x|y", ("1*", True)], ["_z_", "12"]])
    rows = text.splitlines()
    assert len({len(row) for row in rows}) == 1
    assert rows[0].startswith("| zero_pad |") and r"x\|y" in rows[2] and r"**1\***" in rows[2]
    assert r"\_z\_" in rows[3]


def test_equal_looking_scores_are_all_best(tmp_path):
    for name, pesq in (("mse/1", 2.00001), ("soft_dtw/1", 2.00002), ("zero_pad/1", 1.9)):
        write_run(tmp_path, name, [line("a", pesq=pesq)])
    text = tables.run_table(compare_runs([tmp_path], bootstrap=FEW), tables.latex)
    assert text.count(r"\textbf{2.000}") == 2


def test_numbers_p_values_and_shares_as_text():
    assert tables.number(-1.25, 1) == "−1.2" and tables.number(None, 2) == "–"
    assert tables.signed(0.5, 1) == "+0.5"
    assert tables.interval_text(Interval(1, math.nan, math.nan), 1) == ""
    assert tables.p_text(0.0002) == "< 0.001" and tables.p_text(math.nan) == "–"
    assert tables.share(0.9999) == "> 0.999" and tables.share(0.5) == "0.500"


# Plots and examples


def test_charts_take_their_colours_from_the_page():
    lines = [plots.Line("a & b", [0, 1], [1, 2], 2), plots.Line("", [0, 1], [2, 1], 2, thin=True)]
    chart = plots.line_chart(lines, "updates", "WER (%)", 'of "a" <b>')
    assert "var(--series-2)" in chart and "var(--grid)" in chart and "currentColor" in chart
    assert not re.search(r"#(000000|0a0b|01020|04050)", chart)
    assert 'aria-label="of &quot;a&quot; &lt;b>"' in chart and "<metadata" not in chart
    other = plots.line_chart(lines, "updates", "WER (%)", "")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (chart, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', chart)) <= ids[0]


def test_spectrogram_puts_a_tone_at_its_frequency_and_low_ones_below():
    from io import BytesIO

    from PIL import Image

    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    found = spectrograms.spectrogram(tone, 16000)
    assert found[:, 50].argmax() == 32  # 1 kHz in bins of 31.25 Hz
    image = plots.spectrogram_image(tone, 16000, found.max(), width=100, height=80)
    pixels = np.array(Image.open(BytesIO(image)).convert("L"), float)
    assert pixels.shape == (80, 100)
    assert pixels[:, 50].argmax() == pytest.approx(70, abs=1)  # 1 of 8 kHz from the bottom
    assert plots.spectrogram_image(np.zeros(10), 16000, 0.0)  # shorter than a window


def test_word_alignment_of_hard_cases():
    assert examples.align("Twenty five!", "25") == [("equal", "25", "25")]
    assert examples.align("a cat sat", "a dog sat down") == [
        ("equal", "a", "a"), ("substitute", "cat", "dog"), ("equal", "sat", "sat"),
        ("insert", "", "down"),
    ]  # fmt: skip
    assert examples.align("cat", "") == [("delete", "cat", "")]
    assert examples.align("", "cat") == [("insert", "", "cat")]
    assert examples.align("", "") == []
    # phonemes are compared as they are: normalisation is for words
    assert examples.align("ˈaɪ m", "ˈaɪ n", "phoneme") == [
        ("equal", "ˈaɪ", "ˈaɪ"),
        ("substitute", "m", "n"),
    ]


def test_examples_are_the_kept_utterances_with_each_systems_text(results):
    comparison = compare_runs([results], bootstrap=FEW)
    found = examples.load_examples(comparison, "ctc")
    assert [example.id for example in found] == ["u03", "u10"]
    order = [version.system for version in found[0].versions]
    assert order == ["noisy", "clean", "pretrained", "mse", "zero_pad", "soft_dtw"]
    assert found[0].versions[1].words is None  # nobody recognised the clean signal
    assert found[0].versions[3].seed == 1 and found[0].versions[3].words
    assert found[0].wav("mse").shape == (16000,) and found[0].wav("clean2") is None
    (chosen,) = examples.load_examples(comparison, "ctc", ["u10"])
    assert chosen.id == "u10"
    with pytest.raises(UserError, match="There is u03, u10"):
        examples.load_examples(comparison, "ctc", ["u04"])
    (results / "mse/1/scores/test/audio/u03.enhanced.flac").write_text("broken")
    with pytest.raises(UserError, match=r"u03\.enhanced\.flac: unreadable"):
        examples.load_examples(comparison, "ctc")


def test_much_audio_is_compressed_and_little_is_lossless(results, monkeypatch):
    found = examples.load_examples(compare_runs([results], bootstrap=FEW), "ctc")
    lossless, kind = examples.encode_all(found)
    assert kind == "audio/flac" and all(data[:4] == b"fLaC" for data in lossless.values())
    monkeypatch.setattr(examples, "FLAC_BUDGET", 1000)
    small, kind = examples.encode_all(found)
    if "OPUS" not in soundfile.available_subtypes("OGG"):
        pytest.skip("this libsndfile writes no Opus")
    assert kind == "audio/ogg" and small.keys() == lossless.keys()
    assert sum(map(len, small.values())) < 0.5 * sum(map(len, lossless.values()))


def test_expected_alignment_follows_the_speed_change(results):
    (example, _) = examples.load_examples(compare_runs([results], bootstrap=FEW), "ctc")
    clean = example.wav("clean")
    alignment, x, y = spectrograms.expected_alignment(clean, clean, 16000, speed=0.8)
    assert alignment.shape == (len(x), len(y)) and y.shape[0] == pytest.approx(1.25 * 51, abs=2)
    at = alignment @ np.arange(len(y)) / alignment.sum(1)
    middle = slice(len(x) // 4, 3 * len(x) // 4)
    slope = np.polyfit(np.arange(len(x))[middle], at[middle], 1)[0]
    assert slope == pytest.approx(1.25, abs=0.15)


# The page


def test_groups_by_value_or_thirds():
    by_value = html.group_utterances({"a": 5.0, "b": -5.0, "c": None, "d": 5.0}, " dB")
    assert by_value == [("-5 dB", ["b"]), ("5 dB", ["a", "d"]), ("none", ["c"])]
    thirds = html.group_utterances({str(i): i / 10 for i in range(1, 31)}, " s")
    assert [label for label, _ in thirds] == ["up to 1.1 s", "1.1 to 2 s", "over 2 s"]
    assert sorted(id_ for _, ids in thirds for id_ in ids) == sorted(map(str, range(1, 31)))


def test_breakdown_against_hand_sums(tmp_path):
    lines = [line("a", 1, snr=0.0), line("b", 4, snr=0.0), line("c", 8, snr=10.0)]
    write_run(tmp_path, "mse/1", lines)
    (found,) = html.breakdowns(compare_runs([tmp_path], bootstrap=FEW))
    table = str(found.tables[0][1])
    assert found.title == "SNR" and "0 dB (2)" in table and "10 dB (1)" in table
    assert re.findall(r"<td><strong>(.*?)</strong></td>", table) == ["25.00", "80.00"]


@pytest.fixture(scope="module")
def report(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = shutil.copytree(simulated, folder / "results")
    (results / "mse/1/hyperparams.yaml").write_text("lr: 0.0003 # <b>")
    position = folder / "position"
    position.mkdir()
    shift = {"layer": 1, "shift": 0.5, "ratio": 0.123456, "low": 0.1, "high": 0.2}
    text = json.dumps(shift) + "\n" + json.dumps({**shift, "layer": 2}) + "\n"
    (position / "shift.jsonl").write_text(text)
    (position / "shift.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    comparison = compare_runs([results], bootstrap=FEW)
    return html.write_report(
        folder / "report.html",
        comparison,
        command="python recipes/compare.py <results>",
        extra_sections=[("More of it", "<p>kept <b>as is</b></p>")],
        position_folders=[position, folder / "none"],
    )


def test_report_is_one_small_file_with_every_section(report):
    page = report.read_text()
    assert len(page) < 5_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is loaded from elsewhere
    assert "url(http" not in page and "@import" not in page
    for text in (
        'soft_dtw</b> <span class="verdict">better than mse',
        "shift.jsonl: 2 lines",
        "0.1235",
        "<h1>Speech enhancement strategies compared on",
        "Position diagnostics: report",
        "<p>kept <b>as is</b></p>",
        "python recipes/compare.py &lt;results&gt;",
        "lr: 0.0003 # &lt;b&gt;",
        "torch 2",
        "training seeds 1, 2, 3",
    ):
        assert text in page
    for anchor in re.findall(r'href="(#[^"]+)"', page):
        if not anchor.startswith("#f"):
            assert f'id="{anchor[1:]}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_report_escapes_what_recognisers_and_folders_say(tmp_path):
    for name in ("mse/1", "<i>x/1"):
        text = "so <script>alert(1)</script>"
        lines = [line("a", 1, noise_class="<b>"), line("b", 2, noise_class="hum")]
        lines[0]["asr"]["ctc"]["reference"] = text
        folder = write_run(tmp_path, name, lines)
        write_audio(folder, "noisy", ["a"], 0.1)
    page = html.write_report(tmp_path / "r.html", compare_runs([tmp_path], bootstrap=FEW))
    page = page.read_text()
    assert "<script>alert" not in page and "<i>x" not in page
    assert "&lt;b&gt; (1)" in page and "&lt;script&gt;" in page


def test_report_of_the_least_there_can_be(tmp_path):
    bare = {"id": "a", "pesq": 2.0, "stoi": None, "estoi": None, "si_sdr": None}
    write_run(tmp_path, "noisy/0", [bare])
    path = html.write_report(tmp_path / "r.html", compare_runs([tmp_path], bootstrap=FEW))
    assert "2.000" in path.read_text() and "WER: empty, needs transcripts" in path.read_text()


CHECK = """<script>addEventListener("load", () => setTimeout(() => {
  const all = (q) => [...document.querySelectorAll(q)];
  const first = document.querySelector(".scroll");
  first.focus();
  parent.postMessage(JSON.stringify({
    width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
    wide: all(".version").filter((c) => c.scrollWidth > c.clientWidth).length,
    boxes: all("table").filter((t) => !t.closest(".scroll")).length,
    images: all("img").map((i) => i.naturalWidth), svgs: all("main svg").length,
    durations: all("audio").map((a) => a.duration), focused: document.activeElement === first,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("figure svg text")).fill}), "*");
}, 500))</script>"""
# A frame, since a headless window is never narrower than 500 pixels.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
addEventListener("message", (e) => { document.getElementById("found").textContent = e.data });
</script><p id="found"></p><iframe src="checked.html" width="WIDTH" height="900">"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 1200), ("light", 390)])
def test_report_in_chromium(report, scheme, width, tmp_path):
    page = report.read_text().replace("</body>", CHECK + "</body>")
    report.with_name("checked.html").write_text(page)
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--virtual-time-budget=8000", "--enable-logging=stderr", "--window-size=1300,1000",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]  # fmt: skip
    if scheme == "dark":
        flags.append("--blink-settings=preferredColorScheme=0")
    run = subprocess.run(
        [CHROMIUM, *flags, f"file://{frame}"], capture_output=True, text=True, timeout=110
    )
    assert "CONSOLE" not in run.stderr  # script errors, and loads that the page's policy refused
    found = json.loads(re.search(r'<p id="found">(.*?)</p>', run.stdout)[1])
    assert found["width"] == width
    assert found["overflow"] <= 0  # only tables scroll sideways, each in its own box
    assert found["wide"] == 0  # no card's text runs into the next
    assert found["boxes"] == 0
    assert len(found["images"]) == 13 and all(found["images"][:-1])
    assert found["svgs"] > 4
    # Decoded, from the file itself.
    assert found["durations"] == pytest.approx([1.0] * 12, abs=0.1)
    assert found["focused"]  # a table that scrolls can be reached with the keyboard
    shades = [sum(map(int, re.findall(r"\d+", found[k])[:3])) for k in ("background", "ink")]
    dark, light = sorted(shades)
    assert dark < 200 < 600 < light
    assert shades == ([light, dark] if scheme == "light" else [dark, light])


# The command


def run_compare(*argv):
    recipe("compare")([str(word) for word in argv])


def test_command_writes_prints_and_is_reproducible(results, capsys):
    run_compare(*results.glob("*/*"), "--replicates", 99, "--html")
    out = capsys.readouterr().out
    assert "| soft_dtw" in out and str(results / "report.html") in out
    before = {p.name: p.read_text() for p in results.glob("*.*") if p.suffix != ".html"}
    assert set(before) == {
        f"{name}.{kind}" for name in ("table", "summary") for kind in ("csv", "md", "tex")
    } | {"convergence.csv", "convergence.md"}
    shutil.rmtree(results / "mse" / "1" / "scores" / "test")  # audio is not needed
    run_compare(results, "--replicates", 99)
    assert before == {p.name: p.read_text() for p in results.glob("*.*") if p.suffix != ".html"}


def test_command_shows_a_users_mistake_as_its_text(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_compare(tmp_path / "nowhere")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")


def test_command_names_a_position_folder_that_is_not_there(results, capsys):
    with pytest.raises(SystemExit):
        run_compare(results, "--html", "--position_folders", results / "nowhere")
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_findings_from_one_seed_say_that_they_are_about_these_runs(results):
    for seed in (2, 3):
        for strategy in ("mse", "zero_pad", "soft_dtw"):
            shutil.rmtree(results / strategy / str(seed))
    found = html.findings(compare_runs([results], bootstrap=FEW))
    assert all("these runs" in sentence for _, _, sentence in found)
    assert any("one seed only of mse" in n for n in compare_runs([results], bootstrap=FEW).notes)


class TestScoresOfAMetric:
    """``metric_scores`` by hand: what is counted, over which utterances."""

    @staticmethod
    def run(strategy, lines):
        return Run(strategy, 1, Path(strategy), {entry["id"]: entry for entry in lines})

    @staticmethod
    def likelihood(id_, nll, tokens, **fields):
        entry = line(id_, **fields)
        entry["asr"]["ctc"] |= {"nll": nll, "tokens": tokens}
        return entry

    def test_nats_and_tokens_of_the_utterances_that_all_have(self):
        nll = replace(NLL, recognizer="ctc")
        of_one = (("u", 6.0, 2), ("v", 9.0, 4), ("w", 1.0, 1))
        of_other = (("u", 8.0, 2), ("v", None, 4), ("w", 3.0, 1))
        one, other = (
            self.run(name, [self.likelihood(*each) for each in has])
            for name, has in (("a", of_one), ("b", of_other))
        )
        notes = []
        found = metric_scores([one, other], list("uvw"), nll, notes)
        assert found.ids == ["u", "w"] and found.weights.tolist() == [2, 1] and found.asked
        assert {key: value.tolist() for key, value in found.values.items()} == {
            ("a", 1): [6, 1], ("b", 1): [8, 3],
        }  # fmt: skip
        assert found.mean("a") == 7 / 3 and found.failed == {("a", 1): 0, ("b", 1): 1}
        (note,) = notes
        assert note.startswith("nll: 1 of 3 utterances are left out of every row")
        assert note.endswith("for want of a score in b/1 (1)")

    def test_what_no_run_was_asked_for_is_empty_and_no_failure(self):
        runs = [self.run(name, [line("u"), line("v")]) for name in "ab"]
        found = metric_scores(runs, ["u", "v"], replace(NLL, recognizer="ctc"), notes := [])
        assert not found.asked and not found.ids and not found.values and not notes
        assert found.failed == {("a", 1): 0, ("b", 1): 0}

    def test_scores_without_weight_are_none(self):
        runs = [self.run("a", [self.likelihood("u", 0.0, 0), self.likelihood("v", 0.0, 0)])]
        found = metric_scores(runs, ["u", "v"], replace(NLL, recognizer="ctc"), notes := [])
        assert found.values == {} and notes == ["nll: no score"]

    def test_one_score_that_was_asked_for_is_enough(self):
        runs = [
            self.run("a", [line("u"), line("v"), line("w")]),
            self.run("b", [self.likelihood("u", 2.0, 1), self.likelihood("v", 4.0, 1), line("w")]),
        ]
        found = metric_scores(runs, list("uvw"), replace(NLL, recognizer="ctc"), notes := [])
        assert found.asked and found.mean("b") == 3 and found.mean("a") is None
        assert notes == ["nll: missing for most utterances in a/1, marked –"]

    def test_a_silent_recording_has_a_recogniser_and_no_score(self):
        runs = [self.run("a", [line("u"), {**line("v"), "asr": {"ctc": None}}, line("w", 2)])]
        (wer, *_) = metrics_of(runs)
        assert wer.title == WER.title and wer.recognizer == "ctc"
        found = metric_scores(runs, list("uvw"), wer)
        assert found.ids == ["u", "w"] and found.failed == {("a", 1): 1} and found.mean("a") == 10

    def test_recordings_are_those_of_the_first_run(self):
        runs = [
            self.run(name, [line(u, recording=f"{name}{u[0]}") for u in ("x1", "x2", "y1")])
            for name in "ab"
        ]
        units, kind = resampling_units(runs, ["x1", "x2", "y1"])
        assert kind == "recording" and units == {"x1": "ax", "x2": "ax", "y1": "ay"}
