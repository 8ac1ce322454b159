"""Reading of text files that come with a corpus: every failure names the file and the line."""

from pathlib import Path

from pi_finetune.data.audio import find_files
from pi_finetune.errors import UserError
from pi_finetune.files import shown

__all__ = ["read_lines", "read_table"]


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that hold more than blanks.

    A byte-order mark is dropped; only line feeds and carriage returns end a line.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    list of (int, str)
        Number of the line, from 1, and the line without the blanks around it.

    Raises
    ------
    UserError
        The file cannot be read, or a line is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}).") from None
    lines = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{shown(path)}, line {number}: is not UTF-8 (byte 0x{raw[error.start]:02x} at "
                f"{error.start + 1}). Convert the file, e.g. from Latin-1: "
                "iconv -f latin1 -t utf-8 OLD > NEW"
            ) from None
        if line:
            lines.append((number, line))
    return lines


def read_table(path: str | Path) -> dict:
    """A file of two columns, ``KEY VALUE``, of which the value may hold blanks.

    Blanks or tabs part the columns, as in LibriSpeech's ``*.trans.txt`` and Kaldi's ``text``.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    dict
        ``{key: (number of the line, value)}``.

    Raises
    ------
    UserError
        Beside those of :func:`read_lines`: a line has a key alone, or a key has two lines.
    """
    table: dict = {}
    for number, line in read_lines(path):
        key, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(
                f"{shown(path)}, line {number}: there is nothing after {key!r}. Complete the line "
                "or remove it."
            )
        if key in table:
            raise UserError(
                f"{shown(path)}, line {number}: {key} has a line already, line {table[key][0]}. "
                "Remove one of them."
            )
        table[key] = number, rest[0]
    return table


def read_transcripts(folder: str | Path) -> dict[str, str]:
    """The transcripts ``{id: text}`` of all ``*.trans.txt`` under a folder.

    Raises
    ------
    UserError
        A line is damaged (see :func:`read_table`), or an id has two lines.
    """
    texts: dict = {}
    origin: dict = {}
    for path in find_files(folder, lambda name: name.endswith(".trans.txt")):
        for key, (number, text) in read_table(path).items():
            if key in texts:
                raise UserError(
                    f"{path}, line {number}: {key} has a line already, {origin[key]}. "
                    "Remove one of them."
                )
            texts[key], origin[key] = text, f"{path}, line {number}"
    return texts
