"""READMEs and docs name what is there: every YAML, every linked file, every option they print."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import ruamel.yaml

ROOT = Path(__file__).resolve().parent.parent
READMES = [
    ROOT / "README.md",
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
    *sorted((ROOT / "assets").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_every_yaml_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "hparams").glob("*.yaml"):
        assert f"(hparams/{path.name})" in text, f"{path.name} is not in README.md"
    assert "(hparams/paper)" in text and "(docs/paper.md)" in text  # which has a table of each


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", readme.read_text()):
        if not target.startswith("http"):
            assert (readme.parent / target).exists(), f"{readme}: {target} is not there"


def commands(readme):
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", readme.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"([A-Z_]+=\S+ )*python ", line):
                yield shlex.split(line, comments=True)


def _keys(name, readme):
    """Top-level keys of an experiment file, of the project or written in a block of the page."""
    shown = re.search(rf"^```yaml\n# {name}\n(.*?)^```", readme.read_text(), re.M | re.S)
    tree = ruamel.yaml.YAML().load(shown[1] if shown else (ROOT / name).read_text())
    base = tree.pop("extends", None)
    beside = Path(name).parent / base if base else None
    if beside is not None and not (ROOT / beside).is_file():
        beside = Path("hparams") / base
    return set(tree) | (_keys(str(beside), readme) if base else set())


#: Flags of SpeechBrain itself that the READMEs use.
RUN_OPTIONS = {"optimizer_step_limit", "device", "precision", "debug", "test_only", "noprogressbar"}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_recipes_and_keys_that_exist(readme):
    for words in commands(readme):
        script = next((word for word in words if word.startswith("recipes/")), None)
        if script is None:
            continue
        assert (ROOT / script).is_file(), f"{readme}: {script}"
        hparams = [word for word in words if word.startswith("hparams/")]
        options = {word[2:].split("=")[0] for word in words if word.startswith("--")}
        if hparams:
            unknown = options - _keys(hparams[0], readme) - RUN_OPTIONS
        else:
            source = (ROOT / script).read_text()
            unknown = {name for name in options if not re.search(rf'"(--)?{name}"', source)}
        assert not unknown, f"{readme}: {' '.join(words)}: no option {unknown}"


def test_the_workflow_tests_every_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest, below = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    workflow = ruamel.yaml.YAML().load((ROOT / ".github/workflows/tests.yml").read_text())
    allowed = [f"3.{minor}" for minor in range(int(lowest), int(below))]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == allowed


def test_the_citation_is_of_this_version():
    citation = ruamel.yaml.YAML().load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2601.21084"
