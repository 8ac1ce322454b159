"""Scores that are computed on processes: their order, their errors, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pi_finetune.errors import UserError
from pi_finetune.results import evaluation, metrics, pool
from pi_finetune.results.pool import ScorePool, ScoringError

RATE = metrics.SAMPLE_RATE


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    clean = [rng.standard_normal(RATE // 2 * (2 + i % 2)) for i in range(6)]
    clean[4] = np.zeros(RATE)
    return {
        f"utt{i}": (wav, wav + rng.standard_normal(len(wav)) / 2**i) for i, wav in enumerate(clean)
    }


@pytest.fixture(scope="module")
def alone(pairs):
    return {name: metrics.signal_scores(*pair) for name, pair in pairs.items()}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_scores_are_those_of_one_process_in_order(pairs, alone, workers):
    with ScorePool(workers) as scorer:
        waiting = [scorer.submit(name, *pair) for name, pair in pairs.items()]
        assert {scores.utterance: scores.result() for scores in waiting} == alone
        assert all(scores.done() for scores in waiting)
    assert alone["utt0"]["pesq"] < alone["utt3"]["pesq"] and alone["utt4"]["pesq"] is None
    json.dumps(alone, allow_nan=False)


def test_processes_are_kept_and_import_little(pairs):
    find = (lambda: sorted({"torch", "speechbrain"} & set(sys.modules)), os.getpid)
    seen = []
    for _ in range(2):
        with ScorePool(1) as scorer:
            scorer.submit("first", *pairs["utt0"]).result()
            process = pool._processes(os.getpid(), 1)
            assert process.submit(find[0]).result() == []
            seen.append(process.submit(find[1]).result())
    assert seen[0] == seen[1] != os.getpid()


def test_other_scores_can_be_asked_for(pairs):
    with ScorePool(1, names=("si_sdr",)) as scorer:
        assert scorer.submit("a", *pairs["utt0"]).result().keys() == {"si_sdr"}
        assert scorer.submit("b", None, pairs["utt0"][1]).result() == {"si_sdr": None}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_utterance(pairs, workers):
    reference, estimate = pairs["utt0"]
    with pytest.raises(ScoringError, match=r"^utt0: ValueError: .* of one length"):
        with ScorePool(workers) as scorer:
            scorer.submit("utt0", reference, estimate[:-1]).result()


def test_a_dead_process_names_the_utterance_and_the_next_pool_works(pairs, alone):
    with pytest.raises(UserError, match=r"died near utt0 .*lower workers"):
        with ScorePool(1) as scorer:
            process = pool._processes(os.getpid(), 1)
            process.submit(os.kill, process.submit(os.getpid).result(), signal.SIGKILL)
            scorer.submit("utt0", *pairs["utt0"]).result()
    with ScorePool(1) as scorer:
        assert scorer.submit("utt0", *pairs["utt0"]).result() == alone["utt0"]


def test_nothing_waits_for_ever(pairs, monkeypatch):
    monkeypatch.setattr(pool, "TIMEOUT", 0.2)
    with pytest.raises(ScoringError, match=r"utt0: not scored within 0.2 s"):
        with ScorePool(1) as scorer:
            pool._processes(os.getpid(), 1).submit(time.sleep, 60)
            scorer.submit("utt0", *pairs["utt0"]).result()


def test_memory_is_bounded(pairs):
    with ScorePool(1) as scorer:
        waiting = [scorer.submit(str(i), *pairs["utt0"]) for i in range(60)]
        assert sum(not scores.done() for scores in waiting) <= 20
        assert len({tuple(scores.result().values()) for scores in waiting}) == 1


def test_pytorch_has_the_cores_that_the_processes_leave(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for workers, threads in ((0, 4), (4, 4), (5, 3), (8, 1), (99, 1)):
            with pytest.raises(KeyboardInterrupt), evaluation._threads_beside(workers):
                assert torch.get_num_threads() == threads
                raise KeyboardInterrupt
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_loaders_that_fork_meanwhile_do_not_disturb(pairs, alone):
    with ScorePool(1) as scorer:
        waiting = [scorer.submit(name, *pair) for name, pair in pairs.items()]
        loader = torch.utils.data.DataLoader(list(range(4)), num_workers=1)
        assert [int(batch) for batch in loader] == [0, 1, 2, 3]
        assert [scores.result() for scores in waiting] == list(alone.values())


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_an_interruption_ends_the_processes(how):
    code = """
import os, signal, time, numpy as np
from pi_finetune.results import pool
# Where the tests run in a shell's background, Ctrl-C is ignored by all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
with pool.ScorePool(2) as scorer:
    scorer.submit("a", np.ones(9), np.ones(9)).result()
    processes = pool._processes(os.getpid(), 2)
    workers = {processes.submit(os.getpid).result() for _ in range(9)}
    processes.submit(time.sleep, 60)
    print(*workers, flush=True)
    time.sleep(60)
"""
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in started.stdout.readline().split()]
    assert workers
    if how == "SIGINT":  # as Ctrl-C in a terminal: all of them get it
        os.killpg(started.pid, signal.SIGINT)
    else:
        started.kill()
    assert "Process LokyProcess" not in started.communicate(timeout=60)[1]
    deadline = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
