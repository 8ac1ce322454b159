"""The tables of paper.md, made of the comments in hparams/paper/.

python docs/make_paper.py           # write them anew
"""

import re
from pathlib import Path

import ruamel.yaml

DOCS = Path(__file__).resolve().parent
FILES = DOCS.parent / "hparams" / "paper"
SOURCES = ("paper", "second-hand", "authors' earlier code", "ours")
TABLE = re.compile(r"<!-- (\S+\.yaml) -->\n.*?<!-- end -->", re.S)


def rows(path):
    """``(key, value, comment)`` of every key of a file; a ValueError where a source is missing."""
    text = path.read_text(encoding="utf-8")
    tree = ruamel.yaml.YAML().load(text)
    found = []
    for key in tree:
        if key in ("extends", "strategy"):
            continue
        line = re.search(rf"^{re.escape(key)}:(.*)$", text, re.M)[1]
        value, _, comment = line.partition("#")
        comment = comment.strip()
        if re.split("[:;]", comment)[0] not in SOURCES:
            raise ValueError(
                f"{path.name}: {key}: {comment!r}: its comment must begin with a source, one of "
                f"{', '.join(SOURCES)}."
            )
        found.append((key, value.strip() or "(a mapping)", comment))
    return found


def table(path):
    """Of one file, in Markdown."""
    lines = ["| key | value | source |", "|---|---|---|"]
    lines += [f"| `{key}` | `{value}` | {comment} |" for key, value, comment in rows(path)]
    return "\n".join(lines)


def with_tables(page):
    """The page with its tables as the files now are; every file has one."""
    named = TABLE.findall(page)
    missing = sorted({path.name for path in FILES.glob("*.yaml")} - set(named))
    if missing:
        raise ValueError(f"paper.md: no table of {', '.join(missing)}.")
    return TABLE.sub(
        lambda found: f"<!-- {found[1]} -->\n\n{table(FILES / found[1])}\n\n<!-- end -->", page
    )


if __name__ == "__main__":
    (DOCS / "paper.md").write_text(with_tables((DOCS / "paper.md").read_text()))
