"""Processes that score utterances while a model goes on with the next ones."""

import atexit
import collections
import concurrent.futures
import functools
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from loky import ProcessPoolExecutor

from pi_finetune.errors import UserError
from pi_finetune.results import metrics

__all__ = ["TIMEOUT", "ScorePool", "Scores", "ScoringError"]


#: Seconds that an utterance may take; nothing waits for ever.
TIMEOUT = 600
#: Seconds after which a process without work leaves.
IDLE = 300
#: One thread each: there are as many processes as shall compute.
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ScoringError(RuntimeError):
    """What went wrong while the utterance that the text begins with was scored."""


class Scores:
    """The signal scores of one utterance, which may be still on their way."""

    def __init__(self, utterance: str, future: concurrent.futures.Future):
        self.utterance = utterance
        self._future = future

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self._future.done()

    def result(self) -> dict:
        """``{name: float or None}``, waited for.

        Raises
        ------
        ScoringError
            Their computation failed, or took longer than ``TIMEOUT``.
        UserError
            A process was ended from outside.
        """
        try:
            return self._future.result(TIMEOUT)
        except concurrent.futures.TimeoutError:
            raise ScoringError(f"{self.utterance}: not scored within {TIMEOUT} s") from None
        except BrokenProcessPool as error:
            raise _died(self.utterance, error) from error


class ScorePool:
    """Signal scores, computed on processes in the background.

    The processes import no PyTorch. They are shared by all pools of this process with as many, and
    stay for the next validation or evaluation until they had no work for ``IDLE`` seconds.
    As a context it ends them, with what they do, if the block is left by an error or Ctrl-C.

    Arguments
    ---------
    workers : int or None
        Processes. 0: :meth:`submit` computes by itself. None: as many as there are cores.
    names : sequence of str
        Which scores, of ``metrics.signal_scores``. Default: PESQ, STOI, ESTOI and SI-SDR.
    """

    def __init__(self, workers: int | None = 0, names: Sequence[str] = metrics.SIGNAL_SCORES):
        self.workers = len(os.sched_getaffinity(0)) if workers is None else workers
        self.names = tuple(names)
        self._unfinished: collections.deque = collections.deque()

    def submit(self, utterance: str, reference: np.ndarray, estimate: np.ndarray) -> Scores:
        """Ask for the scores of an utterance.

        Waits while many are unfinished, so that memory does not depend on the size of a set.

        Arguments
        ---------
        utterance : str
            What an error calls it.
        reference, estimate : np.ndarray
            As of :func:`pi_finetune.results.metrics.signal_scores`.

        Returns
        -------
        Scores
        """
        job = (_score, utterance, reference, estimate, self.names)
        if self.workers == 0:
            future: concurrent.futures.Future = concurrent.futures.Future()
            future.set_result(job[0](*job[1:]))
            return Scores(utterance, future)
        while len(self._unfinished) >= 16 + 4 * self.workers:
            concurrent.futures.wait([self._unfinished.popleft()], TIMEOUT)
        try:
            future = _processes(os.getpid(), self.workers).submit(*job)
        except BrokenProcessPool as error:
            raise _died(utterance, error) from error
        self._unfinished.append(future)
        return Scores(utterance, future)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._unfinished.clear()
        if kind is not None and self.workers:
            _processes(os.getpid(), self.workers).shutdown(kill_workers=True)
            _processes.cache_clear()


def _died(utterance, error):
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(
        f"A process that computes scores died near {utterance} ({reason}). Most often the system "
        "ended it for want of memory: lower workers. The same command continues."
    )


@functools.cache
def _processes(pid, workers):
    """The processes of this process: those of the one it was forked from are not its own.

    By ``loky``, whose workers do not run the main program's file again, as ``spawn`` and
    ``forkserver`` of the standard library do: it would import PyTorch in each.
    """
    return ProcessPoolExecutor(
        workers, timeout=IDLE, env=_THREADS, initializer=_prepare, initargs=(pid,)
    )


# Their executor must not outlive the modules that it needs to end.
atexit.register(_processes.cache_clear)


def _prepare(parent):
    # Ctrl-C goes to all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent):
    """End this process once its parent was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _score(utterance, reference, estimate, names):
    try:
        return metrics.signal_scores(reference, estimate, names)
    except Exception as error:
        raise ScoringError(f"{utterance}: {type(error).__name__}: {error}") from error
