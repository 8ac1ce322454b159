"""Where shipped files are; files that appear whole or not at all; numbers as JSON has them."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "PROJECT_ROOT",
    "json_number",
    "replacing",
    "replacing_files",
    "shown",
    "why_not_written",
    "write_text",
]


_PACKAGE = Path(__file__).resolve().parent

#: What shipped files are found against: recipes/, hparams/ and assets/ lie beside the package in a
#: checkout, and inside it where a wheel was installed.
PROJECT_ROOT = _PACKAGE if (_PACKAGE / "hparams").is_dir() else _PACKAGE.parent

_UMASK = os.umask(0)  # it can be read only by setting it
os.umask(_UMASK)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    The folder is made if missing. Whatever ends the block early, the temporary
    file is removed and an older ``path`` stays as it was.

    Arguments
    ---------
    path : str or Path
        The file to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # safetensors leaves its files to their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder; move its files into ``folder`` if the block succeeds.

    ``folder`` is made if missing; other files in it stay. Each file appears whole, one after the
    other, so that a reader may for a moment see some of the new ones beside some of the old.

    Arguments
    ---------
    folder : str or Path
        The folder to write into.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            file.chmod(0o666 & ~_UMASK)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def why_not_written(path: str | Path, error: Exception) -> str:
    """What to tell a user whose file could not be written.

    libsndfile calls a full disk "System error." and PyTorch calls it an unexpected position, so
    the disk is looked at.

    Arguments
    ---------
    path : str or Path
        The file.
    error : Exception
        What was raised.

    Returns
    -------
    str
        One or two sentences that name the file, and for a full disk what to do.
    """
    folder = next(f for f in Path(path).absolute().parents if f.is_dir())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or shutil.disk_usage(folder).free < 2**20:
        return (
            f"Cannot write {shown(path)}: the disk of {shown(folder)} is full. "
            "Free space there, or name a place on another disk."
        )
    return f"Cannot write {shown(path)}: {getattr(error, 'strerror', None) or error}."


def shown(path: str | Path) -> str:
    """A path as text that can be printed: bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def json_number(value: float) -> float | None:
    """A number as JSON has it: a float, or None where it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None
