"""YAML loading: extends, includes, overrides, and what is said when they are wrong."""

import io
import re
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import pytest
from hyperpyyaml import resolve_references

from pi_finetune.config import (
    PROJECT_ROOT,
    _dump,
    _merged_tree,
    asset_folder,
    load_hparams,
)
from pi_finetune.errors import UserError

SHIPPED = sorted((PROJECT_ROOT / "hparams").glob("*.yaml"))

BASE = """
seed: 1
name: base
output: !ref results/<name>/<seed>
block: !include:blocks/block.yaml
    x: !ref <seed>
made: !new:collections.Counter
    a: 3
"""


@pytest.fixture(params=["plain", "with a blank"])
def folder(tmp_path, request):
    tmp_path = tmp_path / request.param
    tmp_path.mkdir()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "block.yaml").write_text("!new:collections.Counter\nx: 5\ny: 2\n")
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(
        "extends: base.yaml\nname: child\nmade: !new:collections.Counter\n    z: !ref <factor>\n"
        "factor: 4\n"
    )
    return tmp_path


def test_extends_replaces_whole_values_and_keeps_references(folder):
    hparams, text = load_hparams(folder / "child.yaml", "seed: 7\n")
    assert hparams["output"] == "results/child/7"
    assert hparams["made"] == Counter(z=4)
    assert hparams["block"] == Counter(x=7, y=2)
    assert "!ref" not in text and "!include" not in text
    again, _ = load_hparams(_write(folder / "again.yaml", text))
    assert again == hparams


def test_a_block_can_be_exchanged_on_the_command_line(folder):
    override = f"made: !include:{quote(str(folder))}/blocks/block.yaml"
    hparams, _ = load_hparams(folder / "child.yaml", override)
    assert hparams["made"] == Counter(x=5, y=2)


def test_a_list_of_objects_can_be_given_on_the_command_line(folder):
    """ruamel.yaml alone writes a mapping of one key without its braces."""
    override = "made: [!new:collections.Counter {a: 1, b: {c: 2}}, !new:collections.Counter {a: 2}]"
    hparams, _ = load_hparams(folder / "child.yaml", override)
    assert hparams["made"] == [Counter(a=1, b={"c": 2}), Counter(a=2)]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("seed: 1", "sead: 2", r"--sead: .* no such key\. Did you mean --seed\?"),
        ("seed: !PLACEHOLDER", "", "'seed' is a !PLACEHOLDER"),
        ("a: [1", "", "is not valid YAML"),
        ("- 1", "", "holds no mapping"),
        ("extends: nowhere.yaml", "", r"Cannot read the experiment file .*nowhere\.yaml"),
        ("extends: bad.yaml", "", "goes round in a circle"),
        ("a: !include:nowhere.yaml", "", r"names a file that is not there: .*nowhere\.yaml"),
        ("a: !new:collections.deque\n    size: 1", "", "collections.deque"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message):
        load_hparams(_write(tmp_path / "bad.yaml", text), overrides)


def _write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_name_assets_that_are_there(path):
    tree = _merged_tree(path)
    tree |= {key: "x" for key in ("strategy", "run") if key in tree}  # placeholders
    text = resolve_references(io.StringIO(_dump(tree))).getvalue()
    named = re.findall(r"(?<=/)(?:mini|models)/\w+", text)
    assert named and text.count(asset_folder()) >= len(named)
    for asset in named:
        assert Path(asset_folder(), asset).exists(), f"{path.name}: {asset} is not there"
