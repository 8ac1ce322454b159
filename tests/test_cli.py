"""The command line: which recipe runs on which file, help without PyTorch, one-paragraph errors."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from pi_finetune import __main__ as cli
from pi_finetune.config import find_hparams, load_hparams, resolve
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT

HPARAMS = PROJECT_ROOT / "hparams"


@pytest.fixture
def started(monkeypatch):
    """What each recipe's main was called with, instead of a run."""
    calls = []
    for name in ("train", "evaluate", "compare", "power", "ablate", "probe_position"):
        module = importlib.import_module(f"pi_finetune.recipes.{name}")

        def main(argv, name=name, **_):
            calls.append((name, argv))

        monkeypatch.setattr(module, "main", main)
    return calls


@pytest.mark.parametrize(
    ("argv", "recipe", "passed"),
    [
        (["train", "mse", "--seed", "2"], "train", [f"{HPARAMS}/mse.yaml", "--seed", "2"]),
        (["train", "hparams/mse.yaml"], "train", [f"{HPARAMS}/mse.yaml"]),
        (["train", "own.yaml"], "train", ["own.yaml"]),
        (["train", "soft_dtw"], "train", ["soft_dtw"]),  # a file of that name comes first
        (["evaluate", "--run", "a"], "evaluate", [f"{HPARAMS}/evaluate.yaml", "--run", "a"]),
        (["evaluate", "own.yaml"], "evaluate", ["own.yaml"]),
        (["probe"], "probe_position", [f"{HPARAMS}/probe_position.yaml"]),
        (["ablate", "--workers", "2"], "ablate", [f"{HPARAMS}/ablation.yaml", "--workers", "2"]),
        (["compare", "a", "--html"], "compare", ["a", "--html"]),
        (["power", "a", "b"], "power", ["a", "b"]),
        (["demo"], "ablate", [f"{HPARAMS}/demo.yaml"]),
    ],
)  # fmt: skip
def test_a_command_is_its_recipe(started, tmp_path, monkeypatch, argv, recipe, passed):
    monkeypatch.chdir(tmp_path)
    for name in ("own.yaml", "soft_dtw"):
        (tmp_path / name).write_text("extends: mse.yaml\n")
    assert not cli.main(argv)
    assert started == [(recipe, passed)]


def test_own_file_anywhere_extends_a_shipped_one(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "extends: si_sdr.yaml\nstrategy: own\nenhancer: !include:enhancers/unet.yaml\n"
        "    channels: 2\nasr_source: null\nselect_by: si_sdr\n"
    )
    hparams, _ = load_hparams(tmp_path / "own.yaml", {"results_folder": str(tmp_path)})
    assert hparams["output_folder"].endswith("own/1234")
    assert type(hparams["enhancer"]).__name__ == "UNetEnhancer"
    # What lies beside the file comes first.
    (tmp_path / "si_sdr.yaml").write_text("strategy: beside\nupdates: 3\n")
    (tmp_path / "own.yaml").write_text("extends: si_sdr.yaml\nupdates: 4\n")
    assert load_hparams(tmp_path / "own.yaml")[0] == {"strategy": "beside", "updates": 4}


@pytest.mark.parametrize("name", ["msee", "hparams/msee.yaml"])
def test_unknown_experiment(name):
    with pytest.raises(UserError, match=f"no experiment file {name}.* Did you mean mse\\?"):
        find_hparams(name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "Name an experiment first, e.g. pi-finetune train mse"),
        (["train", "--seed", "2"], "Name an experiment first"),
        (["train", "nothing-like-it"], "no shipped one of that name. Shipped are: ablation, asr"),
        (["train", "mse", "--sead", "2"], "mse.yaml has no such key. Did you mean --seed"),
        (["compare", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_errors_are_one_paragraph(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and re.search(message, text)
    assert not list(tmp_path.iterdir())


OTHERS = (*cli.PROGRAMS, "show", "enhance", "export", "push", "demo-page", "doctor")
HELPS = [[], *([name] for name in (*cli.RECIPES, *OTHERS))]


@pytest.mark.parametrize("argv", [*HELPS, ["train", "mse"]], ids=" ".join)
def test_help_fits_a_screen(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    try:
        assert cli.main([*argv, "--help"]) == 0
    except SystemExit as end:  # argparse
        assert end.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pi-finetune")
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 125
    assert re.search(r"^ +pi-finetune ", text, re.M), "no example"
    for name in re.findall(r"pi-finetune ([a-z]+)", text):
        assert name in cli.RECIPES or name in OTHERS
    assert "python recipes/" not in text and "hparams/" not in text.replace(str(HPARAMS), "")


def test_help_without_pytorch():
    """A fresh process: help of every command imports no PyTorch."""
    script = "import sys\nfrom pi_finetune.__main__ import main\n" + "".join(
        f"try:\n    main({[*argv, '--help']!r})\nexcept SystemExit:\n    pass\n" for argv in HELPS
    )
    script += "assert not {'torch', 'speechbrain', 'transformers'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_an_experiment_names_what_can_be_set(capsys):
    assert cli.main(["train", "zero_pad", "--help"]) == 0
    text = capsys.readouterr().out
    known, blocks = text.split("blocks, ")
    resolved = resolve(HPARAMS / "zero_pad.yaml")
    top = [line.split(":")[0] for line in resolved.splitlines() if re.match("[a-z]", line)]
    for key in set(top) - {"assets"}:
        assert f"--{key} " in known or re.search(rf"\b{key}\b", blocks), key
    assert "--max_pad_seconds 1.0" in known and "--asr_source <assets>/models" in known


def test_commands_of_the_readme_are_understood():
    text = (PROJECT_ROOT / "README.md").read_text()
    lines = re.findall(r"^pi-finetune (.*)$", text, re.M)
    assert len(lines) > 2
    for words in map(shlex.split, lines):
        if words[0] in (*cli.PROGRAMS, "show"):
            assert len(words) > 1
        elif words[0] in cli.RECIPES:
            assert words[1].startswith("--") or find_hparams(words[1])
        else:
            assert cli.parser().parse_args(words).command == words[0]
