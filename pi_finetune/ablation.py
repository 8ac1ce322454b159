"""Cells of an ablation, strategies x teachers x seeds: what is to run, what is done, running it.

A cell is calls of ``train_asr``, or of ``train`` and ``evaluate``, with the very values a user
would type. It is done when its stamp, ``ablation.json`` in its folder, says so; every other cell is
begun or, since all these recipes resume, continued.
"""

import contextlib
import fcntl
import functools
import importlib
import itertools
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pi_finetune.commands import divide, words
from pi_finetune.config import check_overrides, find_hparams
from pi_finetune.errors import DivergedError, UserError
from pi_finetune.files import write_text
from pi_finetune.results.declarations import higher_is_better
from pi_finetune.settings import check_choice

if TYPE_CHECKING:
    import submitit
    from submitit.helpers import DelayedSubmission

__all__ = ["STAMP", "Ablation", "Call", "Cell", "run_cells"]


logger = logging.getLogger(__name__)

STAMP = "ablation.json"
#: Systems that are scored without a training.
UNTRAINED = ("noisy", "clean", "pretrained")
#: A test set of a hundred utterances takes about as long as so many updates.
SCORING = 100


@dataclass(frozen=True)
class Call:
    """A call of a recipe's function, to be made later and in another process.

    Arguments
    ---------
    recipe : str
        ``train``, ``evaluate`` or ``train_asr``.
    experiment : Path
        The experiment file.
    overrides, run_opts : dict
        As the function takes them.
    """

    recipe: str
    experiment: Path
    overrides: dict
    run_opts: dict

    def words(self) -> list[str]:
        """The command line that does the same, as a list of words without ``python``."""
        return words(self.recipe, [self.experiment], self.overrides, self.run_opts)

    def __call__(self) -> None:
        """Make the call; imports PyTorch."""
        module = importlib.import_module(f"pi_finetune.recipes.{self.recipe}")
        getattr(module, self.recipe)(self.experiment, self.overrides, self.run_opts)


@dataclass(frozen=True)
class Cell:
    """One folder of the ablation and the calls that fill it.

    Arguments
    ---------
    folder : Path
        The run folder.
    calls : callable
        Gives the list of :class:`Call`, once ``needs`` are done.
    needs : tuple of Cell
        What must be done before.
    search : bool
        Whether it tries a learning rate: a training that diverges is then a result, which the stamp
        keeps, and no failure. Default: False.
    updates : int
        Of its training, for the progress bar. Default: 0.
    """

    folder: Path
    calls: Callable[[], list]
    needs: tuple = ()
    search: bool = False
    updates: int = 0

    def done(self) -> bool:
        """Whether the stamp says that these very calls have been made to their end.

        Raises
        ------
        UserError
            The folder was filled by other calls.
        """
        earlier = _read_stamp(self.folder)
        if earlier is None:
            return False
        before, after = (
            {shlex.join(option) for command in commands for option in _options(command)}
            for commands in (earlier["commands"], _commands(self.calls()))
        )
        if before != after:
            raise UserError(
                f"{self.folder} was made with other settings: {', '.join(sorted(before - after))} "
                f"instead of {', '.join(sorted(after - before))}. Remove it, or choose another "
                "results_folder."
            )
        return earlier["complete"]

    def left(self) -> int:
        """Updates still to be made, as of the last validation; scores count as some more."""
        from pi_finetune.results.runs import read_json_lines  # imports much; workers load this

        validations = self.folder / "valid.jsonl"
        lines = read_json_lines(validations) if validations.exists() else []
        made = int(lines[-1]["update"]) if lines else 0
        return max(self.updates - made, 0) + SCORING


def _read_stamp(folder):
    path = folder / STAMP
    return json.loads(path.read_text()) if path.exists() else None


def _commands(calls):
    return [call.words() for call in calls]


def _options(command):
    """[recipe], [yaml], [--key, value] and so on."""
    starts = [i for i, word in enumerate(command) if i < 2 or word.startswith("--")]
    return [command[i:j] for i, j in itertools.pairwise([*starts, len(command)])]


@dataclass(frozen=True)
class Work:
    """What a worker does: make a cell's calls one after the other, in this very process.

    So that killing the worker kills the training. Should another worker be filling the folder
    still, one that outlived the ``ablate.py`` that began it, its end is waited for.
    """

    folder: Path
    calls: list
    threads: int
    search: bool = False

    def __call__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # before torch is imported
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{STAMP}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if Cell(self.folder, lambda: self.calls).done():
                return
            self._stamp(complete=False)
            try:
                for call in self.calls:
                    call()
            except DivergedError as reason:
                if not self.search:
                    raise
                self._stamp(complete=True, diverged=str(reason))
            else:
                self._stamp(complete=True)

    def _stamp(self, complete, **result):
        stamp = {"commands": _commands(self.calls), "complete": complete, **result}
        write_text(self.folder / STAMP, json.dumps(stamp, indent=1))

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit when a cluster takes the worker away: be queued again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Ablation:
    """The cells of an ``ablation.yaml``.

    Cells lie where ``recipes/compare.py`` finds them: ``RESULTS/TEACHER/STRATEGY/SEED``, controls
    that need no teacher in ``RESULTS/controls``, ``noisy/0`` and ``pretrained/0`` in ``RESULTS``,
    and the runs of the learning-rate search apart from all in ``RESULTS/search``. Recognisers that
    are to be trained are in ``RESULTS/recognizers``; all else needs them.

    Arguments
    ---------
    hparams : dict
        The loaded file; its keys are explained there.

    Raises
    ------
    UserError
        A setting is wrong.
    """

    def __init__(self, hparams: dict):
        self.hparams = hparams
        self.results = Path(hparams["results_folder"]).resolve()
        self.strategies = _mapping(hparams, "strategies")
        self.controls = _mapping(hparams, "controls")
        self.teachers = hparams["teachers"]
        for key in ("seeds", "lrs"):
            if not hparams[key]:
                raise UserError(f"{key}: give at least one.")
        both = set(self.strategies) & set(self.controls)
        if both:
            raise UserError(f"{', '.join(sorted(both))}: both in strategies and in controls.")
        if self.strategies and not self.teachers:
            raise UserError("teachers: give at least one, as NAME: {teacher_source: FOLDER}.")
        reserved = {*hparams["untrained"], "controls", "search", "recognizers"}
        for name in reserved & set(self.teachers):
            raise UserError(f"teachers: {name!r} is the name of a folder here; take another.")
        from pi_finetune.results.metrics import DEV_SCORES  # imports much, and workers load this

        check_choice("select_by", hparams["select_by"], DEV_SCORES)
        self.groups = [
            *(("controls", name) for name in self.controls),
            *((teacher, name) for teacher in self.teachers for name in self.strategies),
        ]
        self.test_sets = hparams["test_sets"] or {None: {}}
        self.recognizers = {}
        for name, own in (hparams["recognizers"] or {}).items():
            call = self._recognizer(name, dict(own))
            self.recognizers[name] = Cell(
                self.results / "recognizers" / name, functools.partial(list, [call])
            )
        self.searches = {group: self._search(*group) for group in self.groups}
        place, seed, rate = self.results, hparams["seeds"][0], hparams["lrs"][0]
        for group in self.groups:
            self._training(place, *group, seed, rate)  # a misspelt key is an error before all runs
        for name in hparams["untrained"]:
            check_choice("untrained", name, UNTRAINED)
        self._evaluations("noisy")

    def cells(self) -> list[Cell]:
        """All cells in the order in which they should run: teacher by teacher, seed by seed."""
        needs = tuple(self.recognizers.values())
        cells = [
            *needs,
            *(
                Cell(self.results / name / "0", functools.partial(self._evaluations, name), needs)
                for name in self.hparams["untrained"]
            ),
        ]
        for place, groups in itertools.groupby(self.groups, key=lambda group: group[0]):
            groups = list(groups)
            cells += [cell for group in groups for cell in self.searches[group].values()]
            cells += [
                self._run(place, strategy, seed)
                for seed in self.hparams["seeds"]
                for _, strategy in groups
            ]
        return cells

    def learning_rate(self, teacher: str | None, strategy: str) -> tuple[float, dict]:
        """What the search on dev chose, once it is done: ``(rate, {rate: best dev score})``."""
        cells = self.searches[teacher, strategy]
        if not cells:
            return self.hparams["lrs"][0], {}
        from pi_finetune.results.runs import read_json_lines  # imports much; workers load this

        score = self.hparams["select_by"]
        best = max if higher_is_better(score) else min
        scores: dict = {}
        for rate, cell in cells.items():
            scores[rate] = None
            if "diverged" in (_read_stamp(cell.folder) or {}):
                continue
            values = [line.get(score) for line in read_json_lines(cell.folder / "valid.jsonl")]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            scores[rate] = best(finite, default=None)
        found = {rate: value for rate, value in scores.items() if value is not None}
        if not found:
            raise UserError(
                f"{self.results / 'search'}: no learning rate of {teacher}/{strategy} "
                f"({', '.join(f'{rate:g}' for rate in scores)}) trains to its end with a finite "
                f"{score}, which select_by names. Give lower lrs or another select_by."
            )
        return best(found, key=found.__getitem__), scores

    def comparisons(self) -> list[tuple[list[Path], dict]]:
        """What to compare, over what has been scored: ``(runs, options)``, by teacher and set."""
        comparisons = []
        shared = [self.results / name for name in (*self.hparams["untrained"], "controls")]
        shared = [folder for folder in shared if any(folder.rglob("scores"))]
        for teacher in self.teachers or ["controls"]:
            folder = self.results / teacher
            place = folder if len(self.teachers) > 1 else self.results
            if any(folder.rglob("scores/*.jsonl")):
                paths = dict.fromkeys([*shared, folder])
                for name in self.test_sets:
                    options = {"output_folder": place, **self.hparams["compare"]}
                    if name is not None:
                        options |= {"output_folder": place / f"tables-{name}", "set": name}
                    comparisons.append((list(paths), options))
        return comparisons

    def _search(self, teacher, strategy):
        rates = self.hparams["lrs"]
        if len(rates) == 1:
            return {}
        updates = self.hparams["search_updates"]
        every = self.hparams["train"]["valid_every"]
        if updates % every:
            raise UserError(f"search_updates: must be a multiple of valid_every ({every}).")
        seed = self.hparams["search_seed"]
        cells = {}
        for rate in rates:
            place = self.results / "search" / f"lr_{rate:g}" / teacher
            call = self._training(place, teacher, strategy, seed, rate, updates=updates)
            cells[rate] = Cell(
                place / strategy / str(seed),
                functools.partial(list, [call]),
                tuple(self.recognizers.values()),
                search=True,
                updates=updates,
            )
        return cells

    def _run(self, teacher, strategy, seed):
        place = self.results / teacher
        folder = place / strategy / str(seed)

        def calls():
            rate, _ = self.learning_rate(teacher, strategy)
            training = self._training(place, teacher, strategy, seed, rate)
            return [training, *self._evaluations(str(folder))]

        needs = (*self.recognizers.values(), *self.searches[teacher, strategy].values())
        updates = self._settings(teacher, strategy).get("updates", 0)
        return Cell(folder, calls, needs, updates=updates)

    def _settings(self, teacher, strategy):
        """What a training is given besides its rate, seed and place; later ones go before."""
        own = self.strategies.get(strategy) or self.controls.get(strategy) or {}
        return {**self.hparams["train"], **(self.teachers.get(teacher) or {}), **own}

    def _training(self, place, teacher, strategy, seed, rate, **changes):
        settings = self._settings(teacher, strategy)
        path = find_hparams(settings.pop("hparams", strategy))
        settings |= {
            "lr": rate,
            **changes,
            "select_by": self.hparams["select_by"],
            "strategy": strategy,
            "seed": seed,
            "results_folder": str(place),
        }
        if self.recognizers:
            settings["asr_source"] = str(next(iter(self.recognizers.values())).folder)
        return self._call("train", path, settings, {"noprogressbar": True})

    def _recognizer(self, name, own):
        path = find_hparams(own.pop("hparams", name))
        own["output_folder"] = str(self.results / "recognizers" / name)
        return self._call("train_asr", path, own, {"noprogressbar": True})

    def _evaluations(self, run):
        path = find_hparams("evaluate")
        calls = []
        for name, own in self.test_sets.items():
            settings = {**self.hparams["evaluate"], **(own or {})}
            settings |= {"run": run, "results_folder": str(self.results)}
            if name is not None:
                settings["test_set"] = name
            if self.recognizers:
                settings["asr_source"] = [str(cell.folder) for cell in self.recognizers.values()]
            calls.append(self._call("evaluate", path, settings))
        return calls

    @staticmethod
    def _call(recipe, path, settings, run_opts=None):
        overrides, own = divide(path, settings)
        check_overrides(path, overrides)
        return Call(recipe, path, overrides, {**own, **(run_opts or {})})


def _mapping(hparams, key):
    """{name: own settings}, also of a list: of names, and of NAME: settings."""
    value = hparams[key] or {}
    pairs: list[tuple[str, dict | None]] = []
    for item in value if isinstance(value, list) else [value]:
        pairs += item.items() if isinstance(item, dict) else [(item, None)]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: {name!r} is there twice. Give each a name of its own.")
    return {name: settings or {} for name, settings in pairs}


def run_cells(
    cells: list[Cell],
    executor: "submitit.Executor",
    workers: int | None = None,
    threads: int = 1,
    retries: int = 2,
    poll_seconds: float = 1.0,
) -> dict:
    """Run what is not done, at most ``workers`` cells at once.

    Cells that can begin at the same time are submitted together: on a cluster, an array of jobs. A
    cell whose worker dies is submitted again; one that fails is named, and those that need it are
    left out, while all others go on. On an interruption the workers are cancelled.

    Arguments
    ---------
    cells : list of Cell
    executor : submitit.Executor
    workers : int, optional
        Default: no limit, for a cluster with a queue of its own.
    threads : int
        CPU threads of a worker. Default: 1.
    retries : int
        How often a dead worker is replaced. Default: 2.
    poll_seconds : float
        Default: 1.

    Returns
    -------
    dict
        ``{folder: reason}`` of the cells that failed.
    """
    failed: dict = {}
    tries: dict = {}
    running: dict = {}
    started = time.monotonic()
    waiting = []
    for cell in cells:  # what needs a search is looked at when the search is done
        if cell.needs or not cell.done():
            waiting.append(cell)
    total = len(waiting)
    # A polite kill cancels the workers as Ctrl-C does. Jobs of a shell's background ignore Ctrl-C,
    # and so would their workers, whom submitit cancels by it.
    handlers = {
        signal.SIGTERM: lambda *_: sys.exit(128 + signal.SIGTERM),
        signal.SIGINT: signal.default_int_handler,
    }
    if threading.current_thread() is not threading.main_thread():  # may set no handlers
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    progress = contextlib.ExitStack()
    progress.enter_context(logging_redirect_tqdm())
    work = sum(cell.left() for cell in waiting)
    bar = tqdm(total=work, desc=f"{total} runs", unit="update", disable=None, smoothing=0)
    progress.enter_context(bar)
    try:
        while waiting or running:
            begun: dict = {}
            for cell in list(waiting):
                broken = [need.folder for need in cell.needs if need.folder in failed]
                if broken:
                    waiting.remove(cell)
                    failed[cell.folder] = f"not run, since {broken[0]} failed"
                    continue
                if workers is not None and len(running) + len(begun) >= workers:
                    continue
                if any(need in [*waiting, *running, *begun] for need in cell.needs):
                    continue
                waiting.remove(cell)
                try:
                    if not cell.done():
                        begun[cell] = Work(cell.folder, cell.calls(), threads, cell.search)
                except UserError as error:
                    failed[cell.folder] = str(error)
            with executor.batch() if len(begun) > 1 else contextlib.nullcontext():
                jobs = {cell: executor.submit(work) for cell, work in begun.items()}
            running |= jobs
            for cell in jobs:
                logger.info(f"{cell.folder}: begun")
            for cell, job in list(running.items()):
                if not job.done():
                    continue
                del running[cell]
                reason = _failure(job)
                if reason is None and not cell.done():
                    reason = f"its worker died; the end of its log {job.paths.stderr}:\n{_end(job)}"
                    tries[cell] = tries.get(cell, 0) + 1
                    if tries[cell] <= retries:
                        logger.warning(f"{cell.folder}: the worker died; beginning again.")
                        waiting.insert(0, cell)
                        continue
                if reason is not None:
                    failed[cell.folder] = reason
                finished = total - len(waiting) - len(running)
                state = "failed" if reason else "done"
                minutes = (time.monotonic() - started) / 60
                logger.info(f"[{finished}/{total}, {minutes:.0f} min] {cell.folder}: {state}")
            bar.n = work - sum(cell.left() for cell in [*waiting, *running])
            bar.refresh()
            time.sleep(poll_seconds if running else 0)
    except BaseException:
        for job in running.values():
            job.cancel()
        raise
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return failed


def _failure(job):
    """A user's mistake that a finished job named; None if it succeeded or its worker died."""
    error = job.exception()  # of a worker that was killed it says that there is no result
    if error is None or "UserError: " not in str(error):
        return None
    return str(error).rsplit("UserError: ", 1)[1].strip()


def _end(job, lines=3):
    """The last lines that a worker wrote before submitit reported its end."""
    path = job.paths.stderr
    text = path.read_text(errors="replace") if path.exists() else ""
    said = text.split("submitit ERROR")[0].splitlines()
    return "\n".join([line for line in said if line.strip()][-lines:])
