"""Where shipped files are; files that appear whole or not at all; numbers as JSON has them."""

import contextlib
import math
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

#: What shipped files are found against: recipes/, hparams/ and assets/ lie beside the package in a
#: checkout, and inside it where a wheel was installed.
PROJECT_ROOT = _PACKAGE if (_PACKAGE / "hparams").is_dir() else _PACKAGE.parent

_UMASK = os.umask(0)  # it can be read only by setting it
os.umask(_UMASK)


@contextlib.contextmanager
def replacing(path):
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


def write_text(path, text):
    """Write ``text`` (UTF-8) to ``path``; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_number(value):
    """A number as JSON has it: a float, or None where it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None
