"""The wheel: what is in it, and that its commands work where there is no checkout."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pi_finetune", "recipes", "hparams")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=skip)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    shutil.copytree(ROOT / "assets" / "models", folder / "source" / "assets" / "models")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


def pip(*arguments):
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", arguments[0], *offline, *map(str, arguments[1:])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run the entry point of an environment that has the wheel, and the dependencies of this one.

    A path in a .pth file does not bring the .pth files that lie there, so not this checkout.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    packages.joinpath("dependencies.pth").write_text("\n".join(site.getsitepackages()))
    pip("install", "--target", packages, wheel)
    script = packages / "bin" / "pi-finetune"
    lines = script.read_text().splitlines()
    script.write_text("\n".join([f"#!{folder}/env/bin/python", *lines[1:]]))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    work = folder / "work"
    work.mkdir()

    def run(*arguments, returncode=0):
        done = subprocess.run(
            [script, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=work,
            env=environment,
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        assert str(ROOT) not in done.stdout + done.stderr
        return done.stdout if returncode == 0 else done.stderr

    run.folder, run.packages = work, packages
    return run


def test_holds_what_the_commands_need_and_is_small(wheel):
    assert wheel.stat().st_size < 16e6
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = [
        *(path.relative_to(ROOT) for path in (ROOT / "pi_finetune").rglob("*.py")),
        *(path.relative_to(ROOT) for path in (ROOT / "pi_finetune").rglob("*.j2")),
        *(path.relative_to(ROOT) for path in (ROOT / "hparams").rglob("*.yaml")),
        *(path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*.py")),
        *(path.relative_to(ROOT) for path in (ROOT / "assets/models").rglob("*.*")),
    ]
    assert len(wanted) > 60
    for path in wanted:
        name = path.as_posix()
        assert (name if name.startswith("pi_finetune/") else f"pi_finetune/{name}") in inside
    assert not [name for name in inside if not name.startswith(("pi_finetune/", "pi_finetune-"))]


def test_doctor_and_help(run):
    text = run("doctor")
    assert f"{run.packages}/pi_finetune/assets/models/enhancer" in text
    assert "Nothing is missing." in text
    assert "--segment_seconds 3.0" in run("train", "mse", "--help")


def test_enhance(run):
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    soundfile.write(run.folder / "in.wav", 0.1 * noise, 16000)
    assert "1 of 1 files enhanced" in run("enhance", "in.wav", "-o", "out.wav")
    # The shipped enhancer leaves a share of the input as it is (see its README).
    assert 0 < soundfile.read(run.folder / "out.wav")[0].std() < 0.5 * 0.1


def test_train_from_the_shipped_models(run, corpus, noises):
    data = ["--data_folder", corpus, "--noise_folder", noises, "--noprogressbar"]
    few = ["--updates", 2, "--valid_every", 2, "--segment_seconds", 1, "--valid_utterances", 2]
    run("train", "mse", *data, *few, "--num_workers", 0, "--batch_size", 2)
    made = run.folder / "results" / "mse" / "1234"
    assert (made / "enhancer.safetensors").is_file()
    assert len((made / "valid.jsonl").read_text().splitlines()) == 1


def test_the_demo_says_that_its_corpus_is_left_out(run):
    assert "leaves out for its size" in run("demo", returncode=2)
