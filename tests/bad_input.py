"""Bad input in the tests: a row describes one, :func:`attempt` tries it as a user would.

A row is a dict:

``area``, ``input``
    What is tried, in words; the two together are its name.
``files``, ``make``
    Texts by name, and a function of the folder; both fill the empty folder that it is tried in.
``command`` or ``call``
    Words of the command line (those that begin with ``recipes/`` name a script), or a function of
    the folder.
``expect``
    A pattern of what is said.
``status``
    The exit status of the command: 2 for a mistake that is refused (the default), 1 where some
    files failed and others were done, 0 where the input is handled and a notice says how.

docs/robustness.md lists what each row gets; see robustness_table.py.
"""

import contextlib
import importlib
import io
import re

from pi_finetune.__main__ import main
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT

TABLE = PROJECT_ROOT / "docs" / "robustness.md"
LONGEST = 400  # characters of a message in the table


def attempt(case, folder):
    """Try a row in an empty folder.

    Returns
    -------
    (int, str)
        The exit status, and what was said, on one line and without the folder's name.
    """
    for name, text in case.get("files", {}).items():
        (folder / name).write_text(text)
    case.get("make", lambda folder: None)(folder)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        if "call" in case:
            try:
                case["call"](folder)
                status = 0
            except UserError as error:
                status = 2
                print(f"error: {error}", file=said)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                status = _run(case["command"])
    return status, shorten(said.getvalue(), folder)


def _run(words):
    name, *arguments = words
    if name.startswith("recipes/"):
        module = name.removeprefix("recipes/").removesuffix(".py")
        function = importlib.import_module(f"pi_finetune.recipes.{module}").main
    else:
        function, arguments = main, words
    try:
        return function(arguments) or 0
    except SystemExit as stopped:
        return stopped.code or 0


def shorten(said, folder):
    """The messages in what a command said on stderr: one line, with paths as anyone has them."""
    assert "Traceback" not in said, said
    found = re.search(
        r"^(?:pi-finetune[ a-z]*: )?(error|warning): ", said.replace("\r", "\n"), re.MULTILINE
    )
    said = said[found.start() :] if found else ""
    for place, name in ((folder.resolve(), ""), (folder, ""), (PROJECT_ROOT, "PROJECT/")):
        said = said.replace(f"{place}/", name).replace(str(place), name.rstrip("/") or ".")
    # Words of PyTorch and of Python's argparse that differ between versions.
    said = re.sub(r"(--device \S+ cannot be used: ).*", r"\1(PyTorch's reason)", said)
    said = re.sub(r"\(choose from .*?\)", lambda found: found[0].replace("'", ""), said)
    return " ".join(said.split())


def rows():
    """The rows of all tests of bad input."""
    names = sorted(path.stem for path in PROJECT_ROOT.glob("tests/test_bad_*.py"))
    return [case for name in names for case in importlib.import_module(name).CASES]


def line(case, said):
    """A line of the table: area, input, message; of a long message the beginning and the end."""
    if len(said) > LONGEST:
        said = f"{said[: LONGEST - 100].rstrip()} ... {said[-80:].lstrip()}"
    cells = [
        re.sub(r"([|*_<>\\`\[\]])", r"\\\1", cell) for cell in (case["area"], case["input"], said)
    ]
    return f"| {' | '.join(cells)} |"


def check(case, folder):
    """Try a row: its status and message are as expected, and docs/robustness.md tells the same."""
    status, said = attempt(case, folder)
    assert status == case.get("status", 2), said
    assert re.search(case["expect"], said), said
    assert said.count("error: ") <= 1 and len(said) < 1200, said
    row = line(case, said)
    told = TABLE.read_text(encoding="utf-8").splitlines()
    assert row in told, f"python tests/robustness_table.py > docs/robustness.md, for: {row}"
