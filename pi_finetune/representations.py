"""Where a teacher's representations of clean speech are kept, row by row, to be made once.

A row goes by its name (``ids`` of :class:`~pi_finetune.lengths.Waveforms`): within a process by any
name, on disk by one that holds in every pass and process (:class:`~pi_finetune.lengths.Lasting`).
"""

import hashlib
import json
import logging
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi_finetune.errors import UserError
from pi_finetune.files import replacing, why_not_written, write_text
from pi_finetune.lengths import Lasting, Waveforms

__all__ = ["MADE_FROM_FILE", "FolderStore", "MemoryStore", "Store", "represented"]

logger = logging.getLogger(__name__)

#: In a folder of kept representations: what made them.
MADE_FROM_FILE = "made_from.json"
#: Raised when a teacher of the same weights makes something else of a waveform.
_VERSION = 1


class Store(Protocol):
    """Keeps rows [F, D]."""

    def key(self, wavs: Waveforms, row: int) -> Hashable:
        """What a row goes by; None if it is not to be kept."""

    def get(self, key: Hashable) -> Tensor | None:
        """A row that is kept, or None."""

    def put(self, key: Hashable, reps: Tensor) -> Tensor:
        """Keep a row, and return it as :meth:`get` will."""


def represented(teacher: Any, wavs: Waveforms, store: Store) -> tuple[Tensor, Tensor]:
    """What ``teacher(wavs)`` is, with the rows that ``store`` has taken from there.

    Only the others are run, as one batch, and kept.

    Arguments
    ---------
    teacher : pi_finetune.teacher.Teacher
        Or another whose output of an item does not depend on what it is batched with.
    wavs : Waveforms
        With ``ids``.
    store : Store

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        [B, F, D] in float32 on the device of ``wavs``, zero beyond the frame lengths [B], which
        are on the CPU.
    """
    keys = [store.key(wavs, row) for row in range(len(wavs))]
    rows = [None if key is None else store.get(key) for key in keys]
    missing = [row for row, reps in enumerate(rows) if reps is None]
    if missing:
        made, counts = teacher(wavs.taken(torch.tensor(missing)))
        for row, reps, count in zip(missing, made, counts.tolist()):
            rows[row] = reps[:count] if keys[row] is None else store.put(keys[row], reps[:count])
    device = wavs.data.device
    found = [reps.to(device, torch.float32) for reps in rows if reps is not None]
    lengths = torch.tensor([len(reps) for reps in found])
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), lengths


class MemoryStore:
    """Keeps rows of one teacher as they are, as long as there is room.

    Arguments
    ---------
    megabytes : float
        What does not fit is made again.
    """

    def __init__(self, megabytes: float):
        self._rows: dict = {}
        self._room = megabytes * 1e6

    def key(self, wavs: Waveforms, row: int) -> Hashable:
        """See :class:`Store`."""
        assert wavs.ids is not None
        precision = _precision(wavs.data.device)
        return wavs.ids[row], int(wavs.lengths[row]), wavs.padding_counts, precision

    def get(self, key: Hashable) -> Tensor | None:
        """See :class:`Store`."""
        return self._rows.get(key)

    def put(self, key: Hashable, reps: Tensor) -> Tensor:
        """See :class:`Store`."""
        if reps.nbytes <= self._room:
            self._room -= reps.nbytes
            self._rows[key] = reps = reps.clone()  # the batch's other rows are not kept with it
        return reps


class FolderStore:
    """Keeps rows of one teacher on disk in half precision, one memory-mapped safetensors file each.

    Below ``folder`` each teacher (its weights, layers and precision) has a folder of its own, in
    which a row goes by its name: the utterance, a digest of its samples, and what was done to it
    (its speed). So what was made by another teacher or from other audio is never taken. A file
    appears whole or not at all, several processes may fill one folder, and a damaged file is made
    again.

    Arguments
    ---------
    folder : str or Path
        Made if missing.
    teacher : pi_finetune.teacher.Teacher
        Or another with ``digest() -> str``, of all that decides what it makes of a waveform, and
        ``hears_level``: False if a waveform and a scaled one become the same.

    Raises
    ------
    UserError
        The teacher has no digest, or the folder cannot be written; in use, if speech is another in
        every pass, or a value is too large for half precision.
    """

    def __init__(self, folder: str | Path, teacher: Any):
        if not hasattr(teacher, "digest"):
            raise UserError(
                f"representation_cache: {type(teacher).__name__} has no digest(), by which "
                "representations of another teacher could be told from its own. Give it one, or "
                "set representation_cache: null."
            )
        self.folder = Path(folder)
        self.hears_level = getattr(teacher, "hears_level", True)
        self._made_from = {
            "teacher": str(getattr(teacher, "source", type(teacher).__name__)),
            "layers": getattr(teacher, "layers", None),
            "digest": teacher.digest(),
            "version": _VERSION,
        }
        self._folders: dict[str, Path] = {}  # by precision

    def key(self, wavs: Waveforms, row: int) -> Hashable:
        """See :class:`Store`."""
        name = None if wavs.ids is None else wavs.ids[row]
        steps: list = []
        while not isinstance(name, Lasting):
            if not (isinstance(name, tuple) and len(name) == 3):
                raise UserError(
                    "representation_cache: the clean speech of the training data is not known to "
                    f"be the same in every pass (it is named {name!r}). Set "
                    "representation_cache: null."
                )
            name, *step = name
            if step[0] != "gain":
                steps.insert(0, step)
            elif self.hears_level:
                return None  # drawn anew with the noise
        precision = _precision(wavs.data.device)
        return precision, repr((*name, int(wavs.lengths[row]), steps, wavs.padding_counts))

    def get(self, key: Any) -> Tensor | None:
        """See :class:`Store`."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                if file.metadata()["name"] == key[1]:
                    return file.get_tensor("reps")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            logger.warning(f"representation_cache: {path} is damaged ({error}) and made again.")
        return None

    def put(self, key: Any, reps: Tensor) -> Tensor:
        """See :class:`Store`."""
        half = reps.to("cpu", torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise UserError(
                "representation_cache: the teacher's representations are not finite in half "
                f"precision (largest value {float(reps.abs().max()):g}). Choose another layer "
                "(teacher_layers), or set representation_cache: null."
            )
        path = self._path(key)
        try:
            with replacing(path) as temporary:
                save_file({"reps": half}, temporary, {"name": key[1]})
        except (OSError, SafetensorError) as error:
            raise UserError(f"representation_cache: {why_not_written(path, error)}") from None
        return half

    def _path(self, key: Any) -> Path:
        name = hashlib.sha256(key[1].encode()).hexdigest()[:32]
        if key[0] not in self._folders:
            self._folders[key[0]] = self._own_folder(key[0])
        return self._folders[key[0]] / name[:2] / f"{name}.safetensors"

    def _own_folder(self, precision: str) -> Path:
        """The folder of this teacher in this precision; what is new in it is told."""
        made_from = {**self._made_from, "precision": precision}
        decisive = {key: made_from[key] for key in ("digest", "version", "precision")}
        name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
        folder = self.folder / name
        if not (folder / MADE_FROM_FILE).is_file():
            for other in sorted(self.folder.glob(f"*/{MADE_FROM_FILE}")):
                logger.warning(
                    f"representation_cache: {other.parent} was made {_difference(other, made_from)}"
                    f" and is not used; those of this run are made anew, in {folder}."
                )
            try:
                write_text(folder / MADE_FROM_FILE, json.dumps(made_from, indent=1) + "\n")
            except OSError as error:
                raise UserError(
                    f"representation_cache: {why_not_written(folder / MADE_FROM_FILE, error)}"
                ) from None
        return folder


def _difference(path, made_from):
    """In which way what a file tells is not ``made_from``."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "in an unknown way"
    words = {
        "layers": "with layers {}, now {}",
        "precision": "in {}, now {}",
        "version": "by another version of this project",
        "digest": "by a teacher of other weights ({}, now {})",
    }
    for key, text in words.items():
        if other.get(key) != made_from[key]:
            key = "teacher" if key == "digest" else key
            return text.format(other.get(key), made_from[key])
    return "in another way"


def _precision(device: torch.device) -> str:
    """The type in which models run there now."""
    if torch.is_autocast_enabled(device.type):
        return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    return "float32"
