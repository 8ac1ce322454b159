"""Resuming: what may change and what may not; a test follows each message's advice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import HPARAMS, ROOT, recipe, validations

from pi_finetune import settings
from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.config import resolve
from pi_finetune.enhancers import MaskEnhancer
from pi_finetune.errors import UserError
from pi_finetune.inference import Enhancer
from pi_finetune.run_folder import RECORD_FILE, Lock, data_digest, open_run, session


def record(run):
    return json.loads((run / RECORD_FILE).read_text())


def refused(train, capsys, *args, **changes):
    """What a training that is refused says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(*args, **changes)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error


# The comparison.


def compared(tmp_path, old, new, overrides=None):
    (tmp_path / "old.yaml").write_text(old)
    (tmp_path / "new.yaml").write_text(new)
    before = settings.read(resolve(tmp_path / "old.yaml"))
    identity, free = settings.compare(
        before,
        lambda given: settings.read(resolve(tmp_path / "new.yaml", given)),
        overrides or {},
        (tmp_path, tmp_path),
    )
    return sorted(identity), sorted(free)


def test_values_are_compared_and_not_text(tmp_path):
    old = "gamma: 0.1   # a comment\nsnrs: [0, 5]\nlr: 1.0e-3\nblock: !new:a.B\n    x: 1\n"
    new = "snrs:\n        # moved\n    - 0.0\n    - 5\ngamma: 1e-1\nlr: 0.001\n"
    assert compared(tmp_path, old, new + "block: !new:a.B {x: 1}\n") == ([], [])
    assert compared(tmp_path, old, new + "block: !new:a.B {x: 2}\n") == (["block"], [])
    assert compared(tmp_path, old, new + "block: !new:a.C {x: 1}\n") == (["block"], [])


def test_a_key_that_may_change_is_no_difference_of_the_blocks_that_use_it(tmp_path):
    text = "lr: 1\ngamma: 2\nblock: !new:a.B {lr: !ref <lr>, gamma: !ref <gamma>}\n"
    assert compared(tmp_path, text, text, {"lr": 5}) == ([], ["lr"])
    assert compared(tmp_path, text, text, {"lr": 5, "gamma": 3}) == (["block", "gamma"], ["lr"])


def test_a_path_is_where_it_leads(tmp_path):
    (tmp_path / "teacher").mkdir()
    old, new = "teacher_source: teacher\n", f"teacher_source: {tmp_path}/./teacher\n"
    assert compared(tmp_path, old, new) == ([], [])
    assert compared(tmp_path, old, f"teacher_source: {tmp_path}/other\n") == (
        ["teacher_source"],
        [],
    )


def test_what_an_older_version_did_not_have_does_not_matter(tmp_path):
    old, new = "lr: 1\nblock: {a: 1}\n", "lr: 1\nblock: {a: 1, b: null}\nsegment_seconds: 3\n"
    assert compared(tmp_path, old, new) == ([], [])
    assert compared(tmp_path, old, new, {"segment_seconds": 2}) == (["segment_seconds"], [])


def test_all_plain_keys_of_the_shipped_files_are_declared():
    for path in sorted(HPARAMS.glob("*.yaml")):
        values = settings.read(resolve(path, placeholders(path)))
        settings.check_values(values)
        plain = [k for k, v in values.items() if not isinstance(v, settings.Tagged | dict)]
        unknown = {k for k in plain if k not in settings.SETTINGS and not k.startswith("__")}
        # Null stands for a block there.
        assert unknown <= {"perturbation", "projection", "teacher"}, path.name


def placeholders(path):
    text = path.read_text()
    return {key: "x" for key in ("strategy", "run") if f"{key}: !PLACEHOLDER" in text}


def test_every_setting_says_what_it_is():
    for key, setting in settings.SETTINGS.items():
        assert setting.meaning and (setting.kind is None or setting.kind.wanted), key


# Trainings.


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.005},
        {"batch_size": 1},
        {"warmup_updates": 1},
        {"max_grad_norm": 2.0},
        {"nonfinite_patience": 3},
        {"precision": "bf16"},
        {"lr": 0.005, "batch_size": 1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_may_change_is_logged_with_its_update(train, changes):
    run = train("mse", updates=2)
    train("mse", **{"updates": 4, **changes})
    assert [line["update"] for line in validations(run)] == [2, 4]
    log = record(run)["changes"]
    assert {(entry["update"], entry["key"]) for entry in log} == {
        (2, key) for key in ("updates", *changes)
    }
    assert all(entry["now"] == changes[entry["key"]] for entry in log if entry["key"] != "updates")
    if "lr" in changes:
        assert validations(run)[1]["lr"] < 0.01
    again = len(log)
    train("mse", **{"updates": 4, **changes})  # nothing changed this time
    assert len(record(run)["changes"]) == again and len(record(run)["resumed"]) == 2


def test_what_is_irrelevant_changes_without_a_word(train, corpus, noises, tmp_path):
    run = train("mse", updates=2)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    train("mse", updates=2, num_workers=1, valid_batch_size=1, log_examples=0, data_folder=moved)
    log = record(run)["changes"]
    assert [entry["key"] for entry in log] == ["data_folder"] and log[0]["now"] == str(moved)
    train("mse", updates=2, data_folder=moved)  # as it is now
    assert len(record(run)["changes"]) == 1


def test_a_corpus_that_moved_and_changed_is_refused(train, corpus, tmp_path, capsys):
    run = train("mse", updates=2)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    next(moved.glob("train/10/1/*.flac")).unlink()
    for _ in range(2):  # a refusal leaves nothing that would let it pass next time
        error = refused(train, capsys, "mse", updates=2, data_folder=moved)
        assert "noises of train are not those that the run began with" in error
        assert f"data_folder was {corpus} and is {moved}" in error
    shutil.copytree(corpus, moved, dirs_exist_ok=True)  # "Restore them"
    train("mse", updates=2, data_folder=moved)
    (run / RECORD_FILE).unlink()  # an older version kept none: it cannot be known
    error = refused(train, capsys, "mse", updates=2, data_folder=corpus)
    assert "not those that the run began with" in error
    train("mse", "elsewhere", updates=2, data_folder=corpus)  # "--results_folder"


def test_another_experiment_is_refused_and_its_advice_works(train, tmp_path, capsys):
    run = train("mse", updates=2)
    before = {path: path.read_bytes() for path in run.glob("[!.]*") if path.is_file()}
    error = refused(train, capsys, "mse", updates=2, segment_seconds=0.5, lr=0.02)
    assert "other settings: segment_seconds (1.0 before, now 0.5)." in error
    assert "--results_folder or --strategy or --seed" in error and "hyperparams.yaml" in error
    assert {path: path.read_bytes() for path in before} == before
    # "give those of its hyperparams.yaml"
    kept = settings.read((run / "hyperparams.yaml").read_text())
    train("mse", updates=2, segment_seconds=kept["segment_seconds"])
    for strategy, results, seed in (("mse", "other", 1234), ("mse", "results", 5)):
        other = train(strategy, results, updates=2, segment_seconds=0.5, seed=seed)
        assert len(validations(other)) == 1
    train("mse", updates=2, segment_seconds=0.5, options=["--strategy", "mse_short"])
    assert len(validations(tmp_path / "results/mse_short/1234")) == 1
    shutil.rmtree(run)  # "remove the folder"
    train("mse", updates=2, segment_seconds=0.5)
    assert len(validations(run)) == 1


def test_fewer_updates_than_made_are_refused_and_the_advice_works(train, capsys):
    run = train("mse", updates=4)
    error = refused(train, capsys, "mse", updates=2)
    assert "made 4 already. Set updates to 4 or more" in error
    train("mse", updates=4)
    assert len(validations(run)) == 2


def test_a_run_of_an_older_version_is_resumed(train):
    run = train("mse", updates=2)
    path = run / "hyperparams.yaml"
    lines = [
        line
        for line in path.read_text().splitlines()
        if not re.match(r"(max_batch_seconds|log_examples|wandb_project|valid_max_seconds):", line)
    ]
    path.write_text("\n".join(lines))
    (run / RECORD_FILE).unlink()
    train("mse", updates=4)
    assert [line["update"] for line in validations(run)] == [2, 4]
    assert record(run)["begun"]["versions"]["torch"] in torch.__version__


def test_too_many_non_finite_updates_advise_what_a_resume_accepts(train, monkeypatch, capsys):
    objectives = EnhancementBrain.compute_objectives
    run = train("mse", updates=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            EnhancementBrain,
            "compute_objectives",
            lambda *args, **how: objectives(*args, **how) * float("nan"),
        )
        error = refused(train, capsys, "mse", updates=4, nonfinite_patience=1)
    assert "continue with a lower --lr or a higher --nonfinite_patience" in error
    train("mse", updates=4, lr=0.001, nonfinite_patience=5)
    assert [line["update"] for line in validations(run)] == [2, 4]
    changed = [(entry["key"], entry["now"]) for entry in record(run)["changes"]]
    assert ("lr", 0.001) in changed and ("nonfinite_patience", 5) in changed


def test_a_debug_run_leaves_a_run_as_it_is(train):
    run = train("mse", updates=4)
    before = {p: p.read_bytes() for p in run.glob("*") if p.is_file() and p.suffix != ".txt"}
    train("mse", updates=4, options=["--debug"], lr=0.5)
    assert {path: path.read_bytes() for path in before} == before
    assert (run / "debug" / "valid.jsonl").exists()


def test_the_record_says_what_made_a_run(train):
    run = train("mse", updates=2, options=["--device", "cpu"])
    begun = record(run)["begun"]
    assert {"python", "torch", "speechbrain", "transformers", "pi_finetune"} <= {*begun["versions"]}
    assert begun["device"] == "cpu" and begun["run_options"]["device"] == "cpu"
    assert begun["run_options"]["noprogressbar"] is True
    assert begun["process"] == os.getpid() and begun["host"] and begun["time"] and begun["command"]
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", begun["git"])
    assert "resumed" not in record(run)
    train("mse", updates=4)
    assert [entry["update"] for entry in record(run)["resumed"]] == [2]
    assert record(run)["begun"] == begun


def test_digests_are_of_content_and_not_of_places():
    def dataset(folder, seconds=1.0, names=("a", "b")):
        manifest = {name: {"wav": f"{folder}/{name}.wav", "duration": seconds} for name in names}
        return type("Set", (), {"manifest": manifest})()

    assert data_digest(dataset("x")) == data_digest(dataset("y"))
    assert data_digest(dataset("x")) == data_digest(dataset("x", names=("b", "a")))
    assert data_digest(dataset("x")) != data_digest(dataset("x", 1.1))
    assert data_digest(dataset("x")) != data_digest(dataset("x", names=("a",)))
    assert data_digest([]) is None


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "save" / "CKPT+1").mkdir(parents=True)
    (tmp_path / "hyperparams.yaml").write_text("lr: 1\n")
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read\. Restore it, or remove it"):
        open_run(tmp_path, lambda overrides: "lr: 1\n", {}, session({}, "cpu"))
    (tmp_path / RECORD_FILE).unlink()
    assert open_run(tmp_path, lambda overrides: "lr: 1\n", {}, session({}, "cpu")).resumed


# Locks, folders, Ctrl-C.

HOLD = """
import sys, time
from pi_finetune.run_folder import Lock
Lock(sys.argv[1], "a training").acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process():
    """Another process that holds a lock."""
    started = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_training_names_the_first_and_goes_on_after_its_end(
    train, other_process, tmp_path, capsys
):
    other = other_process(tmp_path / "results/mse/1234/.lock")
    error = refused(train, capsys, "mse", updates=2)
    assert f"results/mse/1234: a training is under way there, by process {other.pid} of " in error
    assert "Wait for its end, or stop it" in error
    other.send_signal(signal.SIGKILL)  # it cannot clean up
    other.wait()
    run = train("mse", updates=2)
    assert len(validations(run)) == 1
    other_process(run / ".lock").kill()  # and a training that ended holds nothing


def test_a_second_evaluation_names_the_first(evaluate, other_process, tmp_path, capsys):
    other = other_process(tmp_path / "results/noisy/0/scores/.test.lock")
    error = refused(evaluate, capsys, ["noisy"])
    assert f"an evaluation is under way there, by process {other.pid}" in error
    evaluate(["noisy"], test_set="another")
    other.kill()
    other.wait()
    evaluate(["noisy"])


def test_a_lock_is_for_other_processes_and_is_given_back(tmp_path, other_process):
    with Lock(tmp_path / "a" / ".lock", "a training"):
        with Lock(tmp_path / "a" / ".lock", "a training"):
            pass
    assert other_process(tmp_path / "a" / ".lock").poll() is None


def test_a_folder_that_cannot_be_written_is_named(train, tmp_path, capsys):
    (tmp_path / "results").write_text("a file")
    error = refused(train, capsys, "mse")
    assert "results/mse/1234 cannot be written (Not a directory). Set --results_folder" in error
    train("mse", "elsewhere", updates=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be another user")
def test_a_read_only_folder_is_named(tmp_path):
    shared = Path("/tmp") / f"read-only-{os.getpid()}"
    shared.mkdir(mode=0o555)
    try:
        os.seteuid(65534)
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)\. Set --res"):
            Lock(shared / "run" / ".lock", "a training").acquire()
    finally:
        os.seteuid(0)
        shared.rmdir()


def test_ctrl_c_says_how_to_go_on(train, monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EnhancementBrain, "optimizers_step", stop)
        with pytest.raises(SystemExit) as stopped:
            train("mse")
    assert stopped.value.code == 130
    said = capsys.readouterr().err.strip().splitlines()[-2:]
    assert said == ["interrupted", "The same command goes on from what is finished."]
    assert len(validations(train("mse"))) == 2


def test_ctrl_c_in_an_ablation_says_how_to_go_on(tmp_path, corpus, noises, tiny_teacher):
    settings = {
        "strategies": "[mse]", "controls": "[]", "seeds": "[1]", "lrs": "[0.1]",
        "data_folder": corpus, "noise_folder": noises, "asr_source": "null",
        "select_by": "si_sdr", "results_folder": tmp_path / "ablation",
        "teachers": json.dumps({"tiny": {"teacher_source": str(tiny_teacher)}}),
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [sys.executable, ROOT / "recipes/ablate.py", HPARAMS / "ablation.yaml", *words],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    said = ""
    while "begun" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert rest.strip().splitlines()[-2:] == [
        "interrupted",
        "The same command goes on from what is finished.",
    ]
    assert "Traceback" not in rest


# Choosing the best.


def test_untranscribed_dev_speech_cannot_select_by_wer(train, corpus, tmp_path, capsys):
    folder = shutil.copytree(corpus, tmp_path / "untranscribed")
    for path in folder.glob("dev/**/*.trans.txt"):
        path.unlink()
    asr = str(ROOT / "assets/models/asr")
    error = refused(train, capsys, "mse", data_folder=folder, asr_source=asr, select_by="wer")
    assert "select_by: wer needs transcripts, and none of the 2 dev utterances" in error
    assert not (tmp_path / "results/mse/1234/valid.jsonl").exists()
    train("mse", data_folder=folder, select_by="objective")  # "set select_by to objective"


def test_a_misspelt_score_cannot_select(train, capsys):
    error = refused(train, capsys, "mse", select_by="si_sdrr")
    assert "select_by: there is no 'si_sdrr'. Did you mean si_sdr?" in error


def test_validations_never_hold_a_bare_nan(train, monkeypatch):
    objectives = EnhancementBrain.compute_objectives
    monkeypatch.setattr(
        EnhancementBrain,
        "compute_objectives",
        lambda *args, **how: objectives(*args, **how) * float("nan"),
    )
    run = train("mse", updates=2)
    text = (run / "valid.jsonl").read_text()
    assert "NaN" not in text and json.loads(text)["train_objective"] is None


# The device.


@pytest.fixture
def accelerator(monkeypatch):
    """A GPU that is there: the CPU by another name."""
    monkeypatch.setattr("speechbrain.utils.distributed.infer_device", lambda: "cpu:0")


def test_every_recipe_uses_the_accelerator_that_is_there(
    train, evaluate, accelerator, monkeypatch, capsys
):
    devices = []
    init = EnhancementBrain.__init__

    def spy(self, *args, **kwargs):
        init(self, *args, **kwargs)
        devices.append(self.device)

    monkeypatch.setattr(EnhancementBrain, "__init__", spy)
    run = train("mse", updates=2)
    assert devices == ["cpu:0"] and "device: cpu:0\n" in capsys.readouterr().out
    evaluated = []
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *args: evaluated.append(args) or to(self, *args)
    )
    evaluate([str(run)])
    assert (torch.device("cpu:0"),) in evaluated and "device: cpu:0\n" in capsys.readouterr().out
    evaluated.clear()
    evaluate([str(run)], test_set="again", device="cpu")
    assert (torch.device("cpu"),) in evaluated and "device: cpu\n" in capsys.readouterr().out


def test_inference_uses_the_accelerator(accelerator):
    assert str(Enhancer(MaskEnhancer()).device) == "cpu:0"
    assert str(Enhancer(MaskEnhancer(), device="cpu").device) == "cpu"
    with pytest.raises(UserError, match="--device cuda:99 cannot be used"):
        Enhancer(MaskEnhancer(), device="cuda:99")


def test_the_probe_uses_the_accelerator(accelerator, corpus, tiny_teacher, tmp_path, capsys):
    options = {
        "data_folder": corpus, "splits": "[train]", "utterances": 12, "segment_seconds": 1.0,
        "teacher_source": tiny_teacher, "diagnostics": "[shift]", "objectives": "[]",
        "shifts": "[0, 0.1]", "output_folder": tmp_path,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    recipe("probe_position")([str(HPARAMS / "probe_position.yaml"), *words, "--noprogressbar"])
    assert "device: cpu:0\n" in capsys.readouterr().out
