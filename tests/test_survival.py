"""What ends a training in the middle: kills, full disks, damaged files, dead workers."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time

import pytest
import torch
from running import validations

from pi_finetune.brains.checkpoints import SUMS_FILE, Checkpointer
from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.brains.updates import History
from pi_finetune.data import loading
from pi_finetune.errors import UserError

EVERY_STEP = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
STRAIGHT = {}


def in_a_process(function, run=None, delay=0.0):
    """Run ``function()`` in a process of its own; its exit code.

    With ``run`` it gets SIGKILL ``delay`` seconds after its first new checkpoint.
    """
    process = multiprocessing.get_context("fork").Process(target=function)
    before = set() if run is None else set(checkpoints(run))
    process.start()
    while run is not None and process.is_alive():
        if set(checkpoints(run)) - before:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.002)
    process.join(120)
    return process.exitcode


def checkpoints_of(folder):
    """Oldest first. Not by name: within a second, a name that was deleted is given again."""
    return sorted(folder.glob("CKPT*"), key=lambda path: path.stat().st_mtime_ns)


def checkpoints(run):
    return checkpoints_of(run / "save")


def assert_same_end(one, other):
    expected, got = (
        torch.load(checkpoints(run)[-1] / "enhancer.ckpt", weights_only=True)
        for run in (one, other)
    )
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    keys = ("update", "objective", "train_objective", "si_sdr", "lr")
    for a, b in zip(validations(one), validations(other), strict=True):
        assert [a[key] for key in keys] == [b[key] for key in keys]


@pytest.fixture
def straight(train):
    """An uninterrupted run, made once."""
    if "mse" not in STRAIGHT:
        STRAIGHT["mse"] = train("mse", "straight", **EVERY_STEP)
    return STRAIGHT["mse"]


def test_sigkill_at_random_moments_changes_nothing(train, tmp_path):
    straight = train("soft_dtw", "straight", **EVERY_STEP)
    run = tmp_path / "killed" / "soft_dtw" / "1234"
    draw, codes = random.Random(0), []
    while not codes or codes[-1] != 0:
        delay = draw.uniform(0, 0.05)
        codes.append(in_a_process(lambda: train("soft_dtw", "killed", **EVERY_STEP), run, delay))
    assert codes[0] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 0}
    assert_same_end(straight, run)


@pytest.mark.parametrize("file", ["enhancer.ckpt", SUMS_FILE])
def test_sigkill_while_a_checkpoint_is_written(train, straight, tmp_path, file):
    """Killed when the third checkpoint's ``file`` is half written."""
    killed = tmp_path / "killed" / "mse" / "1234"

    def train_and_die():
        finish, save_file, made = Checkpointer._finish, torch.save, []

        def die(path):
            path.write_bytes(path.read_bytes()[:20])
            os.kill(os.getpid(), signal.SIGKILL)

        def count(checkpoint):
            made.append(1)
            if file == SUMS_FILE and len(made) == 3:
                (checkpoint.path / SUMS_FILE).write_text("{" * 30)
                die(checkpoint.path / SUMS_FILE)
            return finish(checkpoint)

        def half(state, path, *args, **kwargs):
            save_file(state, path, *args, **kwargs)
            if len(made) == 2 and str(path).endswith(file):
                die(path)

        Checkpointer._finish = staticmethod(count)
        torch.save = half
        train("mse", "killed", **EVERY_STEP)

    assert in_a_process(train_and_die) == -signal.SIGKILL
    assert len(checkpoints(killed)) == 2 and list(killed.glob("save/unfinished*"))
    train("mse", "killed", **EVERY_STEP)
    assert_same_end(straight, killed)
    assert not list(killed.glob("save/unfinished*"))


def _full_disk(monkeypatch, at):
    """The ``at``-th checkpoint meets a full disk."""
    save, calls = torch.save, []

    def full(state, path, *args, **kwargs):
        if str(path).endswith("enhancer.ckpt"):
            calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)


def test_a_full_disk_is_named_and_the_last_checkpoint_used(
    train, straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        _full_disk(patch, 3)
        with pytest.raises(SystemExit):
            train("mse", "full", **EVERY_STEP)
    error = capsys.readouterr().err
    assert "No space left on device" in error and "The ones before are intact" in error
    run = tmp_path / "full" / "mse" / "1234"
    assert len(checkpoints(run)) == 2 and not list(run.glob("save/unfinished*"))
    train("mse", "full", **EVERY_STEP)
    assert_same_end(straight, run)


def test_a_damaged_checkpoint_falls_back_on_the_one_before(train, straight, tmp_path):
    def stop(self):
        if self.optimizer_step == 3:
            raise KeyboardInterrupt
        step(self)

    step = EnhancementBrain.optimizers_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(EnhancementBrain, "optimizers_step", stop)
        train("mse", "damaged", **EVERY_STEP)
    run = tmp_path / "damaged" / "mse" / "1234"
    latest = checkpoints(run)[-1]
    (latest / "enhancer.ckpt").write_bytes((latest / "enhancer.ckpt").read_bytes()[:100])
    train("mse", "damaged", **EVERY_STEP)
    log = (run / "log.txt").read_text()
    assert f"Damaged checkpoints ({latest.name}: enhancer.ckpt has 100 of " in log
    assert_same_end(straight, run)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-500] + bytes([content[-500] ^ 1]) + content[-499:])


@pytest.mark.parametrize("do", [_cut, _flip, os.remove])
@pytest.mark.parametrize("file", ["layer.ckpt", "CKPT.yaml"])
def test_every_damage_is_seen(tmp_path, do, file):
    layer = torch.nn.Linear(100, 1)
    checkpointer = Checkpointer(tmp_path, {"layer": layer})
    checkpointer.save_checkpoint(meta={"text": "x" * 1000})
    good = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.weight.data.zero_()
    checkpointer.save_checkpoint(meta={"text": "x" * 1000})
    do(checkpoints_of(tmp_path)[-1] / file)
    checkpointer.recover_if_possible()
    assert all(torch.equal(good[name], value) for name, value in layer.state_dict().items())
    do(checkpoints_of(tmp_path)[0] / file)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpointer.recover_if_possible()


@pytest.mark.parametrize("left", ["end-of-epoch: true\n", "unixtime: 1.0\n"])
def test_a_description_that_lost_lines_is_no_checkpoint(tmp_path, left):
    """Such a text is still YAML, without the time or the kind that the choice goes by."""
    checkpointer = Checkpointer(tmp_path, {"layer": torch.nn.Linear(1, 1)})
    for update in range(2):
        checkpointer.save_checkpoint(meta={"update": update})
    (checkpoints_of(tmp_path)[-1] / "CKPT.yaml").write_text(left)
    assert [found.meta["update"] for found in checkpointer.list_checkpoints()] == [0]
    assert checkpointer.recover_if_possible().meta["update"] == 0


def test_a_checkpoint_of_the_same_name_takes_the_place_of_the_first(tmp_path):
    checkpointer = Checkpointer(tmp_path, {"layer": torch.nn.Linear(1, 1)})
    for update in range(2):
        checkpointer.save_checkpoint(meta={"update": update}, name="named")
    assert [found.meta["update"] for found in checkpointer.list_checkpoints()] == [1]


def test_no_whole_checkpoint_is_an_error_and_no_new_start(train, capsys):
    run = train("mse", **EVERY_STEP)
    for folder in checkpoints(run):
        (folder / "optimizer.ckpt").write_bytes(b"")
    before = (run / "valid.jsonl").read_text()
    with pytest.raises(SystemExit):
        train("mse", **EVERY_STEP)
    error = capsys.readouterr().err
    assert "no checkpoint is whole" in error and "optimizer.ckpt has 0 of" in error
    assert "remove this folder to start training anew" in error
    assert (run / "valid.jsonl").read_text() == before


def test_seconds_before_a_checkpoint_within_an_epoch_are_kept(tmp_path, monkeypatch):
    clock = iter([100.0, 107.0, 500.0, 503.0])
    monkeypatch.setattr("pi_finetune.brains.updates.time.monotonic", lambda: next(clock))
    killed, resumed = History(), History()
    killed.start()
    killed._save(tmp_path / "history")  # after 7 s of the epoch
    resumed._load(tmp_path / "history", end_of_epoch=False)
    resumed.start()
    resumed.stop()
    assert resumed.seconds == 10.0 and resumed.started is None


@pytest.mark.parametrize("best_of, best", [("min", 1), ("max", 0)])
def test_the_best_and_the_latest_two_are_kept(tmp_path, best_of, best):
    counter = torch.nn.Linear(1, 1)
    checkpointer = Checkpointer(tmp_path, {"counter": counter})
    for update, selection in enumerate([9, 1, 4, 3, 6, 7]):
        checkpointer.save_and_keep_only(
            meta={"update": update, "selection": selection},
            num_to_keep=1,
            **{f"{best_of}_keys": ["selection"]},
        )
        checkpointer.save_and_keep_only(  # as the Brain does within an epoch
            meta={"within": True, "update": update},
            end_of_epoch=False,
            ckpt_predicate=lambda c: "within" in c.meta,
        )
    kept = sorted((c.meta["update"], "within" in c.meta) for c in checkpointer.list_checkpoints())
    assert kept == [(best, False), (5, False), (5, True)]
    found = checkpointer.recover_if_possible(**{f"{best_of}_key": "selection"})
    assert found.meta["update"] == best


def test_as_many_of_the_best_are_kept_as_are_asked_for(tmp_path):
    checkpointer = Checkpointer(tmp_path, {"counter": torch.nn.Linear(1, 1)})
    for update, selection in enumerate([2, 1, 5, 4, 6, 7, 8]):
        checkpointer.save_checkpoint(meta={"update": update, "selection": selection})
    checkpointer.delete_checkpoints(num_to_keep=3, min_keys=["selection"])
    kept = sorted(checkpoint.meta["update"] for checkpoint in checkpointer.list_checkpoints())
    assert kept == [0, 1, 3, 4, 5, 6]  # the best three and the latest three


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_audio_in_the_middle_of_an_epoch_is_named(train, corpus, tmp_path, capsys, workers):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    bad = folder / "train" / "10" / "1" / "10-1-0003.flac"
    content = bad.read_bytes()
    bad.write_bytes(content[:600] + bytes(len(content) - 600))  # a whole header, no frames
    with pytest.raises(SystemExit):
        train("mse", data_folder=folder, updates=8, valid_every=4, num_workers=workers)
    error = capsys.readouterr().err
    assert "10-1-0003.flac" in error and "Remove or replace" in error
    assert "Traceback" not in error


def test_a_loader_worker_killed_by_the_system_is_explained(train, monkeypatch, capsys):
    read = loading.SpeechPairs.__getitem__

    def killed(self, address):
        if torch.utils.data.get_worker_info() is not None and isinstance(address, tuple):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, address)

    monkeypatch.setattr(loading.SpeechPairs, "__getitem__", killed)
    with pytest.raises(SystemExit):
        train("mse", num_workers=1)
    error = capsys.readouterr().err
    assert "a process that loads data died" in error and "lower num_workers" in error


def test_nothing_opens_a_socket(train, evaluate, monkeypatch):
    """With HF_HUB_OFFLINE=1 (set for all tests) no connection is tried, let alone made."""

    def refuse(self, address, *args):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run = train("soft_dtw")
    evaluate(["noisy", str(run)])
