"""A run's folder: who is at work in it, what it began with, what changed on a resume."""

import datetime
import fcntl
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from pi_finetune import settings
from pi_finetune.distributed import device_name, on_main
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT, write_text

__all__ = [
    "RECORD_FILE",
    "SETTINGS_FILE",
    "Lock",
    "data_digest",
    "open_run",
    "package_versions",
    "session",
    "weights_digest",
]


#: Versions, host, device, options, start and resumes of a run, and what changed between them.
RECORD_FILE = "run.json"
SETTINGS_FILE = "hyperparams.yaml"

_PACKAGES = ("pi_finetune", "torch", "speechbrain", "transformers", "numpy")


class Lock:
    """A file that one process at a time holds, so that no two write into one folder.

    It holds for other processes, not within one. The system releases it when the process ends,
    however it ends; the file stays and says who had it last.

    Arguments
    ---------
    path : str or Path
        The lock file; its folder is made if missing.
    doing : str
        What is done under it, for the message to others: ``"training"``, say.
    """

    _held: ClassVar[dict] = {}

    def __init__(self, path: str | Path, doing: str):
        self.path = Path(path).absolute()
        self.doing = doing

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        UserError
            Another process has it, which is named; or the folder cannot be written.
        """
        if self.path in self._held:  # opening the file once more would release the lock
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
        except OSError as error:
            raise UserError(
                f"{self.path.parent} cannot be written ({error.strerror}). Set --results_folder or "
                "--output_folder to a folder that can."
            ) from None
        try:
            # A record lock, unlike flock's, is not inherited by processes that load data: these
            # outlive a killed training by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{self.path.parent}: {self.doing} is under way there, by {holder}. Wait for its "
                "end, or stop it; then the same command goes on."
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return
        file.truncate(0)
        file.write(
            f"process {os.getpid()} of {getpass.getuser()} on {socket.gethostname()}, "
            f"since {_now()}: {_command()}\n"
        )
        file.flush()
        self._held[self.path] = file

    def release(self) -> None:
        """Give the lock back; nothing if it is not held."""
        file = self._held.pop(self.path, None)
        if file is not None:
            file.close()

    def __enter__(self):
        """Take it for all processes that work together: the main one holds it."""
        on_main(self.acquire)
        return self

    def __exit__(self, *_):
        self.release()


class RunRecord:
    """``run.json`` of a run folder, and what is to be written into it when training begins.

    Arguments
    ---------
    folder : str or Path
        The run folder.
    session : dict
        From :func:`session`.
    changes : dict
        ``{key: (old, new)}`` of settings that changed since the run began.
    resumed : bool
        Whether the run goes on; otherwise an older record is replaced.
    resolved : str
        The experiment's YAML text, for ``hyperparams.yaml``.
    """

    def __init__(
        self,
        folder: str | Path,
        session: dict,
        changes: dict | None = None,
        resumed: bool = False,
        resolved: str = "",
    ):
        self.path = Path(folder) / RECORD_FILE
        self.resolved = resolved
        self.session = session
        self.changes = changes or {}
        self.resumed = resumed
        self.content = load_record(folder) if resumed else {}
        self.before = {**self.content.get("data", {})}

    def check_data(self, part: str, dataset: Any) -> None:
        """Keep the digest of a part's utterances; on a resume, refuse others.

        Arguments
        ---------
        part : str
            ``"train"`` or ``"valid"``.
        dataset : Any
            With a ``manifest``; anything else is not looked at.

        Raises
        ------
        UserError
            The utterances are not those that the run began with.
        """
        digest = data_digest(dataset)
        if digest is None:
            return
        places = {
            key: change
            for key, change in self.changes.items()
            if settings.resume_class(key) == settings.DATA
        }
        known = self.before.get(part)
        if self.resumed and ((known is None and places) or known not in (None, digest)):
            moved = [f" {key} was {old} and is {new}." for key, (old, new) in places.items()]
            raise UserError(
                f"{self.path.parent}: the utterances or noises of {part} are not those that the "
                f"run began with.{''.join(moved)} A corpus may move, its files must stay the same. "
                "Restore them, or give this run another place with --results_folder or "
                "--output_folder."
            )
        self.content.setdefault("data", {})[part] = digest

    def write(self, update: int) -> None:
        """Write the record, and ``hyperparams.yaml``.

        Arguments
        ---------
        update : int
            Updates made so far.
        """
        if not self.resumed or "begun" not in self.content:
            self.content["begun"] = self.session
        else:
            self.content.setdefault("resumed", []).append({"update": update, **self.session})
        log = self.content.setdefault("changes", [])
        for key, (old, new) in self.changes.items():
            if settings.resume_class(key) != settings.IRRELEVANT:
                log.append(
                    {"update": update, "time": _now(), "key": key, "before": old, "now": new}
                )
        write_text(self.path.with_name(SETTINGS_FILE), self.resolved)
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")


def load_record(folder):
    """The content of ``run.json``; empty for a run of a version that kept none."""
    path = Path(folder) / RECORD_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} cannot be read. Restore it, or remove it to go on.") from None


def open_run(folder: str | Path, resolve: Callable, overrides: dict, session: dict) -> RunRecord:
    """Compare a run folder with the settings of this call.

    Arguments
    ---------
    folder : str or Path
        ``hyperparams.yaml`` in it is what a run began with, ``save`` its checkpoints.
    resolve : callable
        From overrides to the YAML text of the experiment.
    overrides : dict
        Those of this call.
    session : dict
        From :func:`session`.

    Returns
    -------
    RunRecord

    Raises
    ------
    UserError
        The folder holds a run of another experiment.
    """
    folder = Path(folder)
    path = folder / SETTINGS_FILE
    resolved = resolve(overrides)
    if not path.exists() or not any(folder.glob("save/CKPT*")):
        return RunRecord(folder, session, resolved=resolved)
    record = load_record(folder)
    last = (record.get("resumed") or [record.get("begun") or {}])[-1]
    old = settings.read(path.read_text(encoding="utf-8"))
    folders = (last.get("working_folder", ""), os.getcwd())
    identity, changes = settings.compare(
        old, lambda overrides: settings.read(resolve(overrides)), overrides, folders
    )
    if identity:
        words = {
            key: f"{key} ({_shown(values[0])} before, now {_shown(values[1])})"
            for key, values in identity.items()
            if not any(isinstance(value, settings.Tagged | dict) for value in values)
        }
        ways = [f"--{key}" for key in ("results_folder", "strategy", "seed") if key in old]
        raise UserError(
            f"{folder} holds a run with other settings: {', '.join(words.values() or identity)}. "
            f"To continue it, give those of its {SETTINGS_FILE}. For another run remove the "
            f"folder, or choose another place with {' or '.join(ways) or '--output_folder'}."
        )
    before, now = last.get("run_options", {}), session["run_options"]
    for key in {**before, **now}:
        if key in settings.SETTINGS and before.get(key) != now.get(key) and key not in old:
            changes[key] = (before.get(key), now.get(key))
    return RunRecord(folder, session, changes, True, resolved)


def _shown(value):
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."


def session(run_options: dict, device: str) -> dict:
    """What is kept of a start: time, command, versions, revision, host, device, run options.

    Arguments
    ---------
    run_options : dict
        SpeechBrain's that were given.
    device : str
    """
    return {
        "time": _now(),
        "command": _command(),
        "working_folder": os.getcwd(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "device": device_name(device),
        "run_options": run_options,
        "versions": {"python": platform.python_version(), **package_versions(_PACKAGES)},
        "git": _git_revision(),
    }


def data_digest(dataset: Any) -> str | None:
    """A digest of ids and durations, of noises and rooms, wherever they lie; None without any."""
    manifest = getattr(dataset, "manifest", None)
    if manifest is None:
        return None
    mixer = getattr(getattr(dataset, "augmentation", None) or dataset, "mixer", None)
    noises = sorted(
        (name, Path(entry["wav"]).name, entry["start"], entry["frames"])
        for name, entries in (mixer.by_class if mixer is not None else {}).items()
        for entry in entries
    )
    utterances = sorted((key, round(entry["duration"], 3)) for key, entry in manifest.items())
    described = [utterances, noises]
    reverberator = getattr(dataset, "reverberator", None)
    if reverberator is not None:
        described.append(reverberator.described())
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def weights_digest(described: Any, weights: Mapping[str, torch.Tensor]) -> str:
    """A digest of a model: of what describes it, as JSON has it, and of all its weights."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def _now():
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _command():
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """``{package: version}`` of those that are installed; the project's own in a checkout too."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "pi_finetune":  # run from a checkout
                from pi_finetune import __version__

                found[name] = __version__
    return found


def _git_revision():
    """The revision of the checkout, with ``+changes`` where files differ; None without git."""

    def git(*words):
        words = ["git", "-C", str(PROJECT_ROOT), *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != PROJECT_ROOT:
            return None  # installed within another repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
