"""Reading run folders, and making sure that what is compared is comparable."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pi_finetune.errors import UserError

__all__ = [
    "UNTRAINED",
    "Run",
    "common_utterances",
    "find_runs",
    "load_runs",
    "rank",
    "read_json_lines",
    "reference_words",
]


#: Systems that are not trained here: one "seed", first in every table.
UNTRAINED = ("noisy", "pretrained", "clean")
#: The strategies that come first, in this order; others follow by name.
ORDER = ("mse", "zero_pad", "soft_dtw")


@dataclass
class Run:
    """One run folder ``.../STRATEGY/SEED``.

    ``scores`` maps utterance id to its score line; ``validations`` are ``valid.jsonl``'s lines by
    update.
    """

    strategy: str
    seed: int
    folder: Path
    scores: dict[str, dict] = field(default_factory=dict)
    validations: list[dict] = field(default_factory=list)
    fingerprint: str | None = None

    @property
    def name(self) -> str:
        """``STRATEGY/SEED``."""
        return f"{self.strategy}/{self.seed}"


def read_json_lines(path: str | Path, notes: list[str] | None = None) -> list[dict]:
    """Read a JSON-lines file.

    A broken last line, left by a run that was cut off or is still writing, is left out and said in
    ``notes``.

    Arguments
    ---------
    path : str or Path
        The file.
    notes : list of str, optional
        Receives what was left out.

    Returns
    -------
    list of dict

    Raises
    ------
    UserError
        A line other than the last is no JSON object; the message names file and line.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                if notes is not None:
                    notes.append(f"{path}: the last line is cut off and was left out")
                break
            raise UserError(
                f"{path}, line {number}: no JSON object ({error}). Make the file anew."
            ) from None
        records.append(record)
    return records


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """Find run folders: the paths themselves or what lies under them.

    A run folder is called ``.../STRATEGY/SEED`` and holds ``scores/`` or the ``valid.jsonl`` of an
    enhancer's training.

    Arguments
    ---------
    paths : list of (str or Path)
        Run folders or parents. Files are passed over, so that a shell's ``*`` can be used.

    Returns
    -------
    list of Path

    Raises
    ------
    UserError
        A path does not exist, there is no run under any of them, or a folder with scores is not
        called by a seed.
    """
    found: dict = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such folder. Give run folders or a folder above them.")
        for folder in _walk(path):
            found.setdefault(folder.resolve(), folder)
    if not found:
        raise UserError(
            f"No run under {', '.join(map(str, paths))}: a run folder is called STRATEGY/SEED and "
            "holds scores/ or valid.jsonl. Train and evaluate first."
        )
    return list(found.values())


def _walk(path):
    if not path.is_dir():
        return
    if (path / "scores").is_dir():
        if not path.resolve().name.isdecimal():
            raise UserError(
                f"{path}: holds scores, but its name is no seed. Call run folders STRATEGY/SEED."
            )
        yield path
        return
    if path.resolve().name.isdecimal() and (path / "valid.jsonl").is_file():
        # Other trainings validate too; an enhancer's validation has an SI-SDR.
        if any("si_sdr" in line for line in read_json_lines(path / "valid.jsonl")):
            yield path
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith("."):
            yield from _walk(child)


def load_runs(
    paths: Sequence[str | Path], test_set: str | None = None, notes: list[str] | None = None
) -> tuple[list[Run], str]:
    """Read runs, in the order of tables: untrained systems, then strategies, by seed.

    Arguments
    ---------
    paths : list of (str or Path)
        As for :func:`find_runs`.
    test_set : str, optional
        Which ``scores/SET.jsonl``. Default: ``test``, or the only one there is.
    notes : list of str, optional
        Receives what a reader of the result should know.

    Returns
    -------
    (list of Run, str)
        All runs, those without scores of the set too, and the name of the set.

    Raises
    ------
    UserError
        No run has scores of the set, or two folders are of one strategy and seed.
    """
    notes = [] if notes is None else notes
    folders = find_runs(paths)
    sets = sorted({file.stem for folder in folders for file in folder.glob("scores/*.jsonl")})
    if test_set is None:
        test_set = sets[0] if len(sets) == 1 else "test"
    if test_set not in sets:
        raise UserError(
            f"No run has scores of the set {test_set!r}; "
            + (f"there is {', '.join(sets)}: choose with --set." if sets else "evaluate first.")
        )
    runs: dict = {}
    for folder in folders:
        full = folder.resolve()
        run = Run(full.parent.name, int(full.name), folder)
        other = runs.setdefault((run.strategy, run.seed), run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {folder} are both {run.name}. Compare one of them at a time."
            )
        _read_scores(run, test_set, notes)
        if (folder / "valid.jsonl").is_file():
            lines = read_json_lines(folder / "valid.jsonl", notes)
            by_update = {line["update"]: line for line in lines if "update" in line}
            run.validations = [by_update[update] for update in sorted(by_update)]
    return sorted(runs.values(), key=lambda run: (rank(run.strategy), run.seed)), test_set


def rank(strategy: str) -> tuple:
    """Sort key of a system: untrained ones, the strategies of ``ORDER``, the others by name."""
    if strategy in UNTRAINED:
        return 0, UNTRAINED.index(strategy), strategy
    return 1, ORDER.index(strategy) if strategy in ORDER else len(ORDER), strategy


def _read_scores(run, test_set, notes):
    path = run.folder / "scores" / f"{test_set}.jsonl"
    if not path.is_file():
        return
    for line in read_json_lines(path, notes):
        if "id" not in line:
            raise UserError(f"{path}: a line has no id. Evaluate this run anew.")
        if line["id"] in run.scores:
            notes.append(f"{path}: {line['id']} is there twice; the later line counts")
        run.scores[line["id"]] = line
    settings = path.with_name(f"{test_set}.settings.json")
    if settings.is_file():
        try:
            run.fingerprint = json.loads(settings.read_text()).get("pairs")
        except (ValueError, AttributeError):
            notes.append(f"{settings}: unreadable, so the mixtures' fingerprint was not compared")


def common_utterances(
    runs: list[Run], intersect: bool = False, notes: list[str] | None = None
) -> list[str]:
    """The utterances that every run has scores of, after checking that they are the same mixtures.

    Arguments
    ---------
    runs : list of Run
        Those with scores.
    intersect : bool
        Go on with the common utterances where the sets differ, instead of raising.
    notes : list of str, optional
        Receives a warning where sets were intersected.

    Returns
    -------
    list of str
        Utterance ids in the order of the first run's file.

    Raises
    ------
    UserError
        The sets differ (or have nothing in common), or an utterance was mixed or transcribed
        differently in two runs.
    """
    everything = set().union(*(run.scores for run in runs))
    common = [id_ for id_ in runs[0].scores if all(id_ in run.scores for run in runs)]
    lacking = [
        f"{run.name} lacks {len(everything) - len(run.scores)} of {len(everything)}"
        for run in runs
        if len(run.scores) < len(everything)
    ]
    if lacking and not intersect:
        raise UserError(
            f"The runs were not scored on the same utterances: {'; '.join(lacking)}. Evaluate them "
            "on one set, leave them out, or add --intersect to compare on the "
            f"{len(common)} utterances they share."
        )
    if not common:
        raise UserError("The runs share no utterance. Evaluate them on one set.")
    if lacking and notes is not None:
        notes.append(
            f"the runs were not scored on the same utterances ({'; '.join(lacking)}); every number "
            f"is over the {len(common)} they share"
        )
    for run in runs[1:]:
        _check_same_mixtures(runs[0], run, common, same_sets=not lacking)
    return common


def _check_same_mixtures(first, other, ids, same_sets):
    for id_ in ids:
        a, b = first.scores[id_], other.scores[id_]
        for key in ("snr", "noise_class", "duration"):
            if key in a and key in b and not _same(a[key], b[key]):
                raise UserError(
                    f"{id_}: {key} is {a[key]} in {first.name} and {b[key]} in {other.name}. They "
                    "were evaluated on different mixtures; evaluate both with the same settings."
                )
        for name in set(a.get("asr") or {}) & set(b.get("asr") or {}):
            counts = [reference_words(line["asr"][name]) for line in (a, b)]
            if None not in counts and counts[0] != counts[1]:
                raise UserError(
                    f"{id_}: the reference has {counts[0]} words in {first.name} and {counts[1]} "
                    f"in {other.name} ({name}). Evaluate both with the same transcripts."
                )
            tokens = [line["asr"][name].get("tokens") for line in (a, b) if line["asr"][name]]
            if None not in tokens and len(set(tokens)) > 1:
                raise UserError(
                    f"{id_}: the transcript has {tokens[0]} tokens in {first.name} and {tokens[1]} "
                    f"in {other.name} ({name}). Evaluate both with the same recogniser."
                )
    prints = (first.fingerprint, other.fingerprint)
    if same_sets and None not in prints and prints[0] != prints[1]:
        raise UserError(
            f"{first.name} and {other.name} were evaluated on different mixtures of the same "
            "utterances (other noise, SNR or seed). Evaluate both with the same settings."
        )


def _same(a, b):
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-4)
    return a == b


def reference_words(entry: dict | None) -> int | None:
    """Words of the reference of a recogniser's entry in a score line; None without entry."""
    if not entry:
        return None
    return entry["hits"] + entry["substitutions"] + entry["deletions"]
