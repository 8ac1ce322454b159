"""Checkpoints that appear whole or not at all, and are checked before they are used."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME, Checkpoint, ckpt_recency
from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only

from pi_finetune.distributed import on_main
from pi_finetune.errors import UserError

__all__ = ["SUMS_FILE", "Checkpointer"]


logger = sb.utils.logger.get_logger(__name__)

#: Sizes and SHA-256 of a checkpoint's files, written last.
SUMS_FILE = "sums.json"
#: Begins the names of folders being written or removed, which nothing reads.
UNFINISHED = "unfinished-"


class Checkpointer(sb.utils.checkpoints.Checkpointer):
    """SpeechBrain's Checkpointer, made to survive what ends a process in the middle.

    SpeechBrain writes the file that makes a folder count as a checkpoint first, so that a
    checkpoint cut off by a kill or a full disk is the one it resumes from. Here a checkpoint is
    written under another name and renamed when it is complete; its files' digests are kept with
    it and checked before it is loaded. If the latest is damaged all the same (a disk's fault, a
    copy cut short), the one before is used with a warning; if none is whole, that is an error,
    never a silent new start.

    :meth:`delete_checkpoints` keeps the best by each key and the latest **two** of any kind:
    with one, there would be none to fall back on.
    """

    def save_checkpoint(self, *args: Any, verbosity: int = logging.INFO, **kwargs: Any) -> Any:
        """As SpeechBrain's; an error while writing leaves nothing and names the cause."""
        if if_main_process():
            for left_over in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left_over)
        try:
            # At this level SpeechBrain's own message, with the unfinished name, is not shown.
            checkpoint = super().save_checkpoint(*args, verbosity=logging.DEBUG, **kwargs)
            if if_main_process():
                checkpoint = self._finish(checkpoint)
                logger.log(verbosity, f"Saved a checkpoint in {checkpoint.path}")
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            for folder in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(folder, ignore_errors=True)
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"{self.checkpoints_dir}: a checkpoint could not be written ({cause}). The ones "
                "before are intact: make room, then continue with the same command."
            ) from error
        ddp_barrier()  # none may list the folder before the renaming
        return checkpoint

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def _custom_checkpoint_dirpath(self, name):
        path = super()._custom_checkpoint_dirpath(name)
        return path.with_name(UNFINISHED + path.name)

    @staticmethod
    def _finish(checkpoint):
        folder = checkpoint.path
        sums = {path.name: _described(path) for path in sorted(folder.iterdir())}
        (folder / SUMS_FILE).write_text(json.dumps(sums, indent=1))
        for path in (*folder.iterdir(), folder):  # a crash of the machine must not lose them
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        final = folder.with_name(folder.name.removeprefix(UNFINISHED))
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        files = {name: final / path.name for name, path in checkpoint.paramfiles.items()}
        return Checkpoint(final, checkpoint.meta, files)

    def list_checkpoints(self) -> list[Checkpoint]:
        """All checkpoints whose description can be read."""
        checkpoints = []
        for folder in self._list_checkpoint_dirs():
            try:
                found = self._construct_checkpoint_objects([folder])
                if {"unixtime", "end-of-epoch"} <= set(found[0].meta):
                    checkpoints += found
            except Exception as error:  # whatever YAML makes of a torn file
                logger.debug(f"{folder}: {error}")
        return checkpoints

    @main_process_only
    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Sequence[str] | None = None,
        max_keys: Sequence[str] | None = None,
        importance_keys: Sequence = (),
        ckpt_predicate: Callable | None = None,
        verbosity: int = logging.INFO,
    ) -> None:
        """Delete all but the best by each key and the latest ``max(2, num_to_keep)``.

        Decided by the main process alone: SpeechBrain's processes each read the folder, and wait
        for one another for ever if one of them sees it later. ``importance_keys`` is not used.
        """
        newest_first = sorted(self.list_checkpoints(), key=ckpt_recency, reverse=True)
        keep = [checkpoint.path for checkpoint in newest_first[: max(2, num_to_keep)]]
        keys = [{"min_key": key} for key in min_keys or []]
        keys += [{"max_key": key} for key in max_keys or []]
        for key in keys:
            best = self.find_checkpoints(max_num_checkpoints=num_to_keep, **key)
            keep += [checkpoint.path for checkpoint in best]
        for checkpoint in newest_first:
            if checkpoint.path in keep or not (ckpt_predicate or bool)(checkpoint):
                continue
            going = checkpoint.path.with_name(UNFINISHED + checkpoint.path.name)
            checkpoint.path.rename(going)
            shutil.rmtree(going)
            logger.log(verbosity, f"Deleted checkpoint in {checkpoint.path}")

    def recover_if_possible(
        self,
        importance_key: Callable | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: Callable | None = None,
    ) -> Checkpoint | None:
        """Load the first whole checkpoint, best or latest first; see the class for damaged ones.

        Returns
        -------
        Checkpoint or None
            None if there is no checkpoint at all.

        Raises
        ------
        UserError
            There are checkpoints, but none is whole.
        """
        choice = (importance_key, max_key, min_key, ckpt_predicate)
        path = on_main(self._choose, choice)
        if path is None:
            return None
        checkpoint = self._construct_checkpoint_objects([path])[0]
        self.load_checkpoint(checkpoint)
        return checkpoint

    def _choose(self, choice):
        candidates = self.find_checkpoints(*choice)
        folders = sorted(self.checkpoints_dir.glob(f"{CKPT_PREFIX}*"), reverse=True)
        readable = [checkpoint.path for checkpoint in self.list_checkpoints()]
        problems = [
            f"{folder.name}: {METAFNAME} is missing or cannot be read"
            for folder in folders
            if folder not in readable
        ]
        for checkpoint in candidates:
            problem = damage(checkpoint.path)
            if problem is None:
                if problems:
                    logger.warning(
                        f"Damaged checkpoints ({'; '.join(problems)}): continuing from "
                        f"{checkpoint.path.name}, the next one that is whole."
                    )
                return checkpoint.path
            problems.append(f"{checkpoint.path.name}: {problem}")
        if problems:
            raise UserError(
                f"{self.checkpoints_dir}: no checkpoint is whole ({'; '.join(problems)}). Restore "
                "one from a copy; or remove this folder to start training anew."
            )
        return None


def damage(folder):
    """What is wrong with the files of a checkpoint folder, as text; None if nothing is.

    A checkpoint that was written without digests passes.
    """
    sums_file = Path(folder) / SUMS_FILE
    if not sums_file.exists():
        return None
    try:
        sums = json.loads(sums_file.read_text())
    except ValueError:
        return f"{SUMS_FILE} cannot be read"
    for name, (size, digest) in sums.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if _described(path)[1] != digest:
            return f"{name} is not what was written"
    return None


def _described(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]
