"""The documentation runs: every code block of the guides and the tutorial, and the figures."""

import doctest
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from running import recipe

from pi_finetune.__main__ import main as command_line

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted(page for page in (DOCS / "howto").glob("*.md") if page.stem != "index")
PAGES = [DOCS / "tutorial.md", *GUIDES]
#: Optional packages that a page shows.
SHOWN = {"corpus": ("lhotse", "datasets", "pyroomacoustics")}
LONGEST = 30  # lines of a block


def blocks(page):
    """The fenced code blocks of a page, in order: (language, text, first line)."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        yield match[1], match[2], text.count("\n", 0, match.start(2))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that looks like the project's, where files may be added; code runs in it."""
    for name in ("assets", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "hparams", tmp_path / "hparams")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # a page's own modules must not meet another's
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_shell(text):
    """Run the commands of a block in this process: importing PyTorch again takes seconds."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "PYTHONPATH=.":
            words = words[1:]
        assert words[0] == "python", f"what is this? {line}"
        if words[1:3] == ["-m", "pi_finetune"]:
            assert not command_line(words[3:]), line
        else:
            options = [] if words[1] == "recipes/compare.py" else ["--noprogressbar"]
            recipe(Path(words[1]).stem)([*words[2:], *options])


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=pytest.mark.needs(*SHOWN.get(p.stem, ()))) for p in PAGES],
)
def test_a_page_runs(page, project):
    names, ran = {"__name__": "__main__"}, 0
    for language, text, line in blocks(page):
        target = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if target:
            path = project / target[1]
            path.parent.mkdir(exist_ok=True)
            assert not path.exists(), f"{page}: {path.name} would be overwritten"
            path.write_text(text)
        elif language == "python":
            # Empty lines before: a traceback then names the line of the page.
            exec(compile("\n" * line + text, str(page), "exec"), names)
            ran += 1
        elif language == "sh":
            run_shell(text)
            ran += 1
        else:
            pytest.fail(f"{page}:{line}: {language} is neither run nor written to a file")
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_short(page):
    for language, text, line in blocks(page):
        assert len(text.splitlines()) < LONGEST, f"{page}:{line}: {language}"


def test_the_figures_are_made_by_the_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import make_figures

    make_figures.main(["--output_folder", str(tmp_path), "--utterances", "12"])
    shown = set(re.findall(r"\(figures/([a-z_]+\.svg)\)", (DOCS / "method.md").read_text()))
    kept = {path.name: path.stat().st_size for path in (DOCS / "figures").iterdir()}
    assert shown == set(kept) == {path.name for path in tmp_path.iterdir()}
    assert max(kept.values()) < 300_000


def test_every_guide_is_listed():
    listed = set(re.findall(r"\(([a-z_]+\.md)\)", (DOCS / "howto/index.md").read_text()))
    assert listed == {page.name for page in GUIDES}


@pytest.mark.parametrize(
    "name",
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "pi_finetune").rglob("*.py"))
        if re.search(r"^ +>>> (?!.*doctest: \+SKIP)", path.read_text(), re.M)
    ],
)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_notebook_runs(tmp_path):
    """It is committed without outputs; they are looked at here."""
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert (DOCS / "tutorial.ipynb").stat().st_size < 100_000
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=place).execute()
    kinds = {kind for cell in cells for out in cell.outputs for kind in out.get("data", {})}
    assert {"text/html", "image/png", "text/markdown"} <= kinds
    text = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    losses = [float(value) for value in re.findall(r"step \d: ([\d.]+)", text)]
    assert losses[-1] < losses[0]
    tables = "".join(
        out["data"]["text/markdown"]
        for cell in cells
        for out in cell.outputs
        if "text/markdown" in out.get("data", {})
    )
    assert all(f"| {name} " in tables for name in ("noisy", "pretrained", "mse", "soft_dtw"))
    assert not list(tmp_path.iterdir())  # nothing is written where it lies
