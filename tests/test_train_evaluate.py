"""Fine-tuning and evaluation through the recipes, as a user runs them, on a generated corpus."""

import json

import numpy as np
import pytest
import torch
from running import HPARAMS, ROOT, STRATEGIES, LikelyParrot, Parrot, scores, validations
from safetensors.torch import load_file

from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.data.audio import read_audio
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.enhancers import load_enhancer, save_enhancer
from pi_finetune.lengths import Waveforms


def test_every_yaml_is_tested():
    fine_tuning = {path.stem for path in HPARAMS.glob("*.yaml") if "updates" in _keys(path)}
    others = {"finetune", "asr_ctc", "asr_mini", "pr_ctc", "pretrain_teacher"}
    assert fine_tuning - others == set(STRATEGIES)


def _keys(path):
    text = path.read_text()
    if "extends: " in text:
        base = text.split("extends: ")[1].split()[0]
        return _keys(path.parent / base) | {"extends"}
    return {line.split(":")[0] for line in text.splitlines()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains(train, pretrained, strategy):
    run = train(strategy)
    records = validations(run)
    assert [record["update"] for record in records] == [2, 4]
    for record in records:
        assert np.isfinite([record[k] for k in ("objective", "si_sdr", "stoi", "seconds")]).all()
    before = load_file(pretrained / "enhancer.safetensors")
    after = load_enhancer(run).state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert "strategy: " + strategy in (run / "hyperparams.yaml").read_text()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_with_debug(train, strategy):
    run = train(strategy, options=["--debug"], updates=8, valid_every=4, log_examples=0)
    records = validations(run)  # two updates of each of two epochs are made
    assert len(records) == 2 and np.isfinite([record["objective"] for record in records]).all()


def test_the_share_of_position_can_be_logged(train):
    logged = {"validation_callbacks": "!name:pi_finetune.diagnostics.training_scores"}
    for record in validations(train("mse", **logged)):
        assert record["position_unequal"] > 0 and np.isfinite(record["position_share"])
    assert "position_share" not in validations(train("zero_pad"))[0]
    assert "position_share" not in validations(train("si_sdr", **logged))[0]


def test_no_strategy_is_named_in_the_brain():
    source = (ROOT / "pi_finetune" / "brains" / "enhancement.py").read_text()
    for strategy in {*STRATEGIES} - {"si_sdr", "enhance"}:  # a metric, and what an enhancer does
        assert strategy not in source


def test_all_strategies_start_from_the_same_mixtures(train, monkeypatch):
    heard = {}
    forward = EnhancementBrain.compute_forward
    for strategy in ("mse", "soft_dtw"):
        inputs = heard.setdefault(strategy, [])

        def spy(self, batch, stage, inputs=inputs):
            inputs.append(batch.noisy.data.clone())
            return forward(self, batch, stage)

        monkeypatch.setattr(EnhancementBrain, "compute_forward", spy)
        train(strategy)
    assert len(heard["mse"]) == len(heard["soft_dtw"]) == 6
    for one, other in zip(heard["mse"], heard["soft_dtw"]):
        assert torch.equal(one, other)


def test_whole_utterances_up_to_a_length(train, corpus, monkeypatch):
    heard = set()
    fit_batch = EnhancementBrain.fit_batch

    def spy(self, batch):
        heard.update(batch.id)
        return fit_batch(self, batch)

    monkeypatch.setattr(EnhancementBrain, "fit_batch", spy)
    manifest = prepare_speech(corpus, ["train*"])
    durations = sorted(entry["duration"] for entry in manifest.values())
    limit = durations[len(durations) // 2]
    train("mse", segment_seconds="null", train_max_seconds=limit, updates=len(durations))
    assert heard == {key for key, entry in manifest.items() if entry["duration"] <= limit}


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_killed_run_ends_as_an_uninterrupted_one(train, monkeypatch, killed_at):
    straight = train("soft_dtw", "straight", ckpt_interval_minutes=0, ckpt_interval_steps=1)
    steps = []
    step = EnhancementBrain.optimizers_step

    def die(self):
        steps.append(1)
        if len(steps) == killed_at:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(EnhancementBrain, "optimizers_step", die)
        with pytest.raises(SystemExit):
            train("soft_dtw", "killed", ckpt_interval_minutes=0, ckpt_interval_steps=1)
    resumed = train("soft_dtw", "killed", ckpt_interval_minutes=0, ckpt_interval_steps=1)
    expected, got = (torch.load(_last(run), weights_only=True) for run in (straight, resumed))
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for one, other in zip(validations(straight), validations(resumed), strict=True):
        assert one["objective"] == other["objective"]


def _last(run):
    return max(run.glob("save/CKPT*/enhancer.ckpt"), key=lambda p: p.stat().st_mtime)


@pytest.mark.parametrize(
    ("select_by", "values", "best"),
    [("si_sdr", [3.0, 9.0, -5.0, 7.0], 1), ("objective", [3.0, 9.0, 1.0, 7.0], 2),
     ("wer", [None, 20.0, None, 60.0], 1)],
)  # fmt: skip
def test_the_best_model_is_exported_and_kept(train, monkeypatch, select_by, values, best):
    states, log_validation = [], EnhancementBrain.log_validation

    def scripted(self, epoch, train, scores):
        state = self.modules["enhancer"].state_dict()
        states.append({key: value.clone() for key, value in state.items()})
        return log_validation(self, epoch, train, {**scores, select_by: values[epoch - 1]})

    monkeypatch.setattr(EnhancementBrain, "log_validation", scripted)
    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda source: Parrot())
    source = "any" if select_by == "wer" else "null"
    run = train("mse", select_by=select_by, asr_source=source, valid_every=1, valid_utterances=1)
    assert [line.get(select_by) for line in validations(run)] == values

    def made_at(state):
        return [i for i, s in enumerate(states) if all(torch.equal(s[k], state[k]) for k in s)]

    assert made_at(load_enhancer(run).state_dict()) == [best]
    kept = [torch.load(path, weights_only=True) for path in run.glob("save/CKPT*/enhancer.ckpt")]
    assert {best, len(values) - 1} <= {i for state in kept for i in made_at(state)}


def _break(monkeypatch, calls):
    """Make the loss of the named calls NaN."""
    count = iter(range(1000))
    objectives = EnhancementBrain.compute_objectives

    def broken(self, predictions, batch, stage):
        loss = objectives(self, predictions, batch, stage)
        return loss * float("nan") if stage.name == "TRAIN" and next(count) in calls else loss

    monkeypatch.setattr(EnhancementBrain, "compute_objectives", broken)


def test_a_non_finite_loss_skips_the_update_and_is_counted(train, monkeypatch):
    _break(monkeypatch, {1, 2})
    run = train("mse")
    assert [record["skipped_updates"] for record in validations(run)] == [1, 2]
    weights = load_enhancer(run).state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_too_many_non_finite_losses_stop_with_a_clear_message(train, monkeypatch, capsys):
    _break(monkeypatch, set(range(100)))
    with pytest.raises(SystemExit):
        train("mse", nonfinite_patience=2)
    error = capsys.readouterr().err
    assert "3 updates in a row had a non-finite loss" in error and "nonfinite_patience" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_folder": "/nowhere"}, "data_folder: /nowhere is no folder"),
        ({"noise_folder": "/nowhere"}, "/nowhere: no such folder"),
        ({"valid_splits": "[nope]"}, "no split 'nope'"),
        ({"teacher_source": "/nowhere"}, "/nowhere"),
        ({"teacher_layers": 7}, "has 2 layers, asked for layer 7"),
        ({"enhancer_weights": "/nowhere"}, "No weights at /nowhere"),
        (
            {"enhancer": "!new:torch.nn.Identity", "enhancer_weights": "null"},
            "Identity cannot be saved",  # said before training, not at the first save
        ),
        ({"updates": 5}, "multiple of valid_every"),
        ({"select_by": "wer"}, "select_by: wer needs a recogniser"),
        ({"gama": 1}, "--gama: "),
    ],
)
def test_bad_input_is_one_clear_error_before_training(train, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        train("soft_dtw", **changes)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_likelihood_alone_can_choose_the_best_model(train, monkeypatch):
    """It is there at every validation, and nothing is decoded for it."""

    class Undecoded(LikelyParrot):
        def __call__(self, wavs):
            raise AssertionError("decoded")

    monkeypatch.setattr(
        "pi_finetune.results.evaluation.load_recognizer", lambda source: Undecoded()
    )
    run = train("mse", asr_source="any", select_by="nll", wer_every="null")
    lines = validations(run)
    assert len(lines) == 2 and all(line["nll"] > 1 / 3 and "wer" not in line for line in lines)
    kept = [path.read_text() for path in (run / "save").glob("CKPT*/CKPT.yaml")]
    assert all(any(f"selection: {line['nll']}" in text for text in kept) for line in lines)


def test_likelihood_is_not_asked_of_a_recogniser_that_has_none(train, monkeypatch, capsys):
    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda source: Parrot())
    for source in ("any", "null"):
        with pytest.raises(SystemExit):
            train("mse", asr_source=source, select_by="nll")
        assert "select_by: nll needs a recogniser that gives" in capsys.readouterr().err


def test_likelihood_is_in_every_score_line(evaluate, monkeypatch):
    recognizer = LikelyParrot()
    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda source: recognizer)
    for entry in scores(evaluate(["noisy"]) / "noisy/0"):
        assert entry["asr"]["parrot"]["nll"] > 1 and entry["asr"]["parrot"]["tokens"] == 3


def test_scores_of_all_systems_are_of_the_same_mixtures(train, evaluate):
    run = train("mse")
    results = evaluate(["noisy", "pretrained", str(run)])
    noisy, pretrained, trained = (
        scores(results / name) for name in ("noisy/0", "pretrained/0", "mse/1234")
    )
    assert len(noisy) == 6
    keys = ("id", "set", "snr", "noise_class", "duration")
    for a, b, c in zip(noisy, pretrained, trained, strict=True):
        assert [a[k] for k in keys] == [b[k] for k in keys] == [c[k] for k in keys]
        assert a["si_sdr"] == pytest.approx(a["snr"], abs=0.5)
        assert len({x["si_sdr"] for x in (a, b, c)}) == 3
    heard = [[x["asr"]["parrot"]["hypothesis"] for x in lines] for lines in (noisy, trained)]
    assert heard[0] != heard[1] and len(set(heard[0])) > 3
    assert {x["strategy"] for x in trained} == {"mse"} and {x["seed"] for x in trained} == {"1234"}
    audio = {path.name for path in (results / "noisy/0/scores/test/audio").iterdir()}
    assert len(audio) == 4 and {name.split(".")[1] for name in audio} == {"noisy", "clean"}
    assert len(list((run / "scores/test/audio").glob("*.enhanced.flac"))) == 2
    for kind, lines in (("noisy", noisy), ("enhanced", trained)):  # each line is of its own audio
        folder = results / lines[0]["strategy"] / lines[0]["seed"] / "scores/test/audio"
        said = {x["id"]: x["asr"]["parrot"] for x in lines}
        for path in folder.glob(f"*.{kind}.flac"):
            wav = read_audio(path)
            words, spoken = Parrot()(Waveforms.of(wav[None]))[0], said[path.name.split(".")[0]]
            assert spoken["hypothesis"] == words
            hits = sum(a == b for a, b in zip(words.split(), spoken["reference"].split()))
            assert hits <= spoken["hits"] < 3
    # the order of lines does not matter, their content does not depend on the batch
    again = scores(evaluate([str(run)], batch_size=1, overwrite=True) / "mse/1234")
    for one, other in zip(trained, again, strict=True):
        assert one["si_sdr"] == pytest.approx(other["si_sdr"], abs=1e-3)


def test_an_interrupted_evaluation_continues(evaluate, monkeypatch):
    from pi_finetune.results import metrics

    calls = []
    score = metrics.signal_scores

    def die(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "signal_scores", die)
        with pytest.raises(SystemExit):
            evaluate(["noisy"], batch_size=2)
    calls.clear()

    def count(*arguments):
        calls.append(1)
        return score(*arguments)

    monkeypatch.setattr(metrics, "signal_scores", count)
    results = evaluate(["noisy"], batch_size=2)
    assert len(calls) == 2  # four of six were there
    assert len({record["id"] for record in scores(results / "noisy/0")}) == 6
    assert not list((results / "noisy/0/scores").glob("*.part"))


def test_scores_made_with_other_settings_are_not_mixed(evaluate, capsys):
    evaluate(["noisy"])
    with pytest.raises(SystemExit):
        evaluate(["noisy"], data_seed=1)
    assert "was made with other pairs. Add --overwrite to score anew" in capsys.readouterr().err
    results = evaluate(["noisy"], data_seed=1, overwrite=True)
    assert len(scores(results / "noisy/0")) == 6


def test_scores_of_a_run_that_still_trains_are_filed_under_the_weights_that_made_them(
    evaluate, pretrained, tmp_path, monkeypatch, capsys
):
    """The run gets better weights after its model was loaded, while another system is scored."""
    from pi_finetune.results import metrics

    run = tmp_path / "results" / "mse" / "1"
    enhancer = load_enhancer(pretrained)
    save_enhancer(run, enhancer)
    score = metrics.signal_scores

    def train_on(*arguments):
        with torch.no_grad():
            for parameter in enhancer.parameters():
                parameter.mul_(1.1)
        save_enhancer(run, enhancer)
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "signal_scores", train_on)
        evaluate(["noisy", str(run)], batch_size=6)
    before = scores(run)
    with pytest.raises(SystemExit):
        evaluate([str(run)])
    assert "was made with other weights" in capsys.readouterr().err
    evaluate([str(run)], overwrite=True)
    assert scores(run) != before
    evaluate([str(run)])  # and nothing more to be done


def test_batches_of_similar_lengths_hold_each_utterance_once():
    from pi_finetune.results.evaluation import _batches

    class Pairs:
        def seconds(self):
            return [3.0, 70.0, 9.0, 4.0, 2.0, 12.0, 3.5]

    batches = _batches(Pairs(), 3, 12.0, set(range(7)))
    assert batches == [[1], [5], [2], [3, 6, 0], [4]]
    assert _batches(Pairs(), 3, None, {0, 1, 3, 5}) == [[1], [0, 3], [5]]


@pytest.mark.needs("gruut")
def test_the_metrics_that_are_asked_for_are_in_lines_and_tables(evaluate, tiny_teacher):
    from pi_finetune.results.comparison import compare_runs

    asked = "[cer, si_sdr, lsd, mcd, speech_bert_score, phoneme_similarity]"
    results = evaluate(
        ["noisy", "clean"], metrics=asked, teacher_source=tiny_teacher, max_batch_seconds=9
    )
    for line in scores(results / "clean/0"):
        assert {"pesq", "stoi"}.isdisjoint(line)
        assert line["speech_bert_score"] == pytest.approx(1, abs=1e-5)
        assert line["phoneme_similarity"] == 1 and line["lsd"] < 1e-3 and line["mcd"] == 0
        assert line["asr"]["parrot"]["characters"] > 0
    comparison = compare_runs([results], baseline="noisy")
    table = comparison.summary
    assert not {"pesq", "stoi"} & {metric.name for metric in comparison.metrics}
    assert not any("needs" in note for note in comparison.notes)
    assert table["mcd"]["noisy"].level.estimate > 1 > table["lsd"]["clean"].level.estimate
    assert table["cer"]["clean"].level.estimate > 0
    with pytest.raises(SystemExit):  # with other metrics these are other scores
        evaluate(["noisy"])


def rounded(lines):
    """To nine digits: sums of arrays that lie elsewhere in memory may differ in the sixteenth."""
    return json.loads(json.dumps(lines), parse_float=lambda text: round(float(text), 9))


def test_processes_change_no_line(evaluate, tmp_path):
    alone = scores(evaluate(["pretrained"], batch_size=2) / "pretrained/0")
    many = {"workers": 2, "num_workers": 1, "batch_size": 2, "results_folder": tmp_path / "many"}
    evaluate(["pretrained"], **many)
    assert rounded(scores(tmp_path / "many/pretrained/0")) == rounded(alone)


def test_validation_on_processes_is_that_of_one(train, tmp_path):
    records = [
        validations(train("mse", results=f"results{workers}", workers=workers))
        for workers in (0, 1)
    ]
    for one, other in zip(*records, strict=True):
        one, other = ({k: v for k, v in r.items() if k != "seconds"} for r in (one, other))
        assert rounded(one) == rounded(other)


def test_a_validation_computes_the_metrics_that_are_asked_for(train, capsys):
    options = {"updates": 2, "valid_metrics": "[si_sdr, stoi]"}
    (line,) = validations(train("mse", **options))
    assert line["si_sdr"] and line["stoi"] and not {"pesq", "estoi"} & line.keys()
    for changes, said in (
        ({"select_by": "pesq"}, "select_by: pesq is not among valid_metrics (si_sdr, stoi)"),
        ({"valid_metrics": "[stoy]"}, "valid_metrics: there is no 'stoy'. Did you mean stoi?"),
    ):
        with pytest.raises(SystemExit):
            train("mse", "refused", **{**options, **changes})
        assert said in capsys.readouterr().err


def test_lines_say_recording_and_speaker(evaluate):
    lines = scores(evaluate(["noisy"], each_snr=True, snrs="[5, 10]") / "noisy/0")
    assert len(lines) == 12 and len({entry["recording"] for entry in lines}) == 6
    for entry in lines:
        assert entry["id"].split("@")[0] == entry["recording"]
        assert entry["speaker"] == entry["recording"].split("-")[0]


def test_evaluation_of_nothing_is_an_error(evaluate, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate([str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err
