"""Write docs/robustness.md: what each bad input of the tests gets.

    python tests/robustness_table.py > docs/robustness.md

Each row of tests/test_bad_*.py is tried as the tests try it, in an empty folder.
"""

import os
import sys
import tempfile
from pathlib import Path

from bad_input import attempt, line, rows

HEAD = """# What bad input gets

Each row was tried in an empty folder; `python tests/robustness_table.py > docs/robustness.md`
writes this table, and the tests (`tests/test_bad_*.py`) compare every row with what is said now.
A message is on standard error, in one paragraph, without a traceback. The exit status is 2 where
the input is refused before anything is done, 1 where one file of several failed (`error:`), and 0
where the input is handled and a `warning:` says how. Files and lines are those of the row's
folder, PROJECT is where the project lies, and ` ... ` stands for the middle of a long message.
"""


def main():
    """Print the page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = []
    for case in rows():
        with tempfile.TemporaryDirectory() as folder:
            status, said = attempt(case, Path(folder))
        if status != case.get("status", 2) or not said:
            sys.exit(f"{case['area']}: {case['input']}: status {status}, {said!r}")
        lines.append(line(case, said))
    print(f"{HEAD}\n{len(lines)} inputs:\n\n| Area | Input | Message |\n|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
