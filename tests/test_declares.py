"""An experiment file declares: loading it reads no audio and no weights, and lists no folder."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hyperpyyaml import load_hyperpyyaml
from running import HPARAMS, ROOT

from pi_finetune import __main__ as cli
from pi_finetune.config import build, load_hparams, new, ref, resolve
from pi_finetune.errors import UserError
from pi_finetune.objectives import RepresentationObjective, load_teachers
from pi_finetune.teacher import Teacher

FILES = sorted(HPARAMS.rglob("*.yaml"))
CONTENT = {".wav", ".flac", ".ogg", ".mp3", ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".tar"}
watching, refused = [], []


def _guard(event, arguments):
    """Refuse what loading an experiment file must not do; imports are not looked at."""
    if not watching or event not in ("open", "os.listdir", "os.scandir", "os.mkdir"):
        return
    path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else None
    if path is None:
        return
    reads = event == "open" and path.suffix in CONTENT
    own = [Path(sys.prefix), Path(sys.base_prefix), ROOT / "pi_finetune"]
    lists = event != "open" and not any(path.absolute().is_relative_to(place) for place in own)
    if reads or lists:
        refused.append(f"{event} {path}")
        raise PermissionError(f"while loading: {event} {path}")


sys.addaudithook(_guard)  # cannot be removed; without `watching` it does nothing


@contextlib.contextmanager
def declaring():
    refused.clear()
    watching.append(True)
    try:
        yield
    finally:
        watching.pop()
    assert not refused


def overrides(path):
    """Folders that are not there, and values for what must be given."""
    text, file = path.read_text(), path
    while base := re.search(r"^extends: (\S+)", file.read_text(), re.M):
        own = file.parent / base[1]
        file = own if own.is_file() and own != file else HPARAMS / base[1]
        text += file.read_text()
    nowhere = {"assets": "/nowhere", "strategy": "any", "run": "any"}
    return {key: value for key, value in nowhere.items() if f"\n{key}: " in f"\n{text}"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(HPARAMS)), marks=pytest.mark.needs(*needed))
        for path in FILES
        for needed in [("gruut",) if path.stem in ("pr", "pr_ctc") else ()]
    ],
)
def test_loading_reads_nothing(path):
    if path.parent.name in ("enhancers", "teachers"):
        key = {"enhancers": "enhancer", "teachers": "teacher_preset"}[path.parent.name]
        changed = {"assets": "/nowhere", "strategy": "any", key: f"!include:{quote(str(path))}"}
        path = HPARAMS / "finetune.yaml"
    else:
        changed = overrides(path)
    text = resolve(path, changed)
    assert not re.search(r"^[^#\n]*!(ref|include)", text, re.M) and "/nowhere" in text
    load_hyperpyyaml(text)  # HyperPyYAML's own, as a stranger would; now all is imported
    with declaring():
        load_hyperpyyaml(text)


def test_the_guard_sees_what_it_must(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    for look in (lambda: open(tmp_path / "a.wav"), lambda: os.listdir(tmp_path)):
        with pytest.raises(PermissionError, match="while loading"), declaring():
            look()
    with pytest.raises(PermissionError), declaring():
        load_hyperpyyaml(f"a: !apply:os.listdir [{tmp_path}]")


def test_what_is_declared_is_made_once_for_an_objective(tiny_teacher):
    hparams, _ = load_hparams(HPARAMS / "mse.yaml", {"teacher_source": str(tiny_teacher)})
    objective = load_teachers(hparams["objective"])
    (own,) = (m for m in objective.modules() if isinstance(m, RepresentationObjective))
    assert own is hparams["representation"] and own.teacher.num_layers == 2
    teacher = own.teacher
    assert load_teachers(objective) is objective and own.teacher is teacher
    assert build(teacher) is teacher
    # With no weight there is no teacher to load.
    load_teachers(
        load_hparams(HPARAMS / "si_sdr.yaml", {"teacher_source": "/nowhere"})[0]["objective"]
    )


def test_a_wrong_argument_is_named():
    with pytest.raises(UserError, match=r"!name:pi_finetune\.teacher\.Teacher: .*'sauce'"):
        build(
            load_hyperpyyaml("a: !name:pi_finetune.teacher.Teacher\n  source: x\n  sauce: y\n")["a"]
        )


def test_a_block_can_be_given_as_a_value(tiny_teacher):
    block = new(
        "pi_finetune.diagnostics.MismatchedTargets",
        objective=ref("representation"),
        offset_seconds=1.0,
    )
    hparams, text = load_hparams(HPARAMS / "soft_dtw.yaml", {"objective": block})
    assert hparams["objective"].objective is hparams["representation"]
    assert "!new:pi_finetune.diagnostics.MismatchedTargets" in text
    again = load_hyperpyyaml(text)
    assert again["objective"].objective is again["representation"]


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [
        ("log_position", True, "--validation_callbacks '!name:pi_finetune.diagnostics.training"),
        ("__load_weights", None, "set enhancer_weights: null"),
    ],
)
def test_a_key_of_before_says_what_to_type_now(tmp_path, key, value, now):
    with pytest.raises(UserError, match=f"{key} is no key any more.*{now}"):
        load_hparams(HPARAMS / "mse.yaml", {key: value})
    (tmp_path / "own.yaml").write_text(f"extends: mse.yaml\n{key}: {value}\n")
    with pytest.raises(UserError, match=f"own.yaml: {key} is no key any more.*{now}"):
        load_hparams(tmp_path / "own.yaml")


def test_references_to_a_preset_s_values_say_what_to_type_now(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "extends: soft_dtw.yaml\ngamma: !ref <teacher_preset[gamma]>\n"
    )
    with pytest.raises(UserError, match=r"own.yaml: <teacher_preset\[...\]> has no values: write"):
        load_hparams(tmp_path / "own.yaml")


def test_a_preset_goes_before_the_keys_beside_it(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "extends: soft_dtw.yaml\nteacher_preset: wavlm_large\ngamma: 0.5\n"
    )
    hparams, text = load_hparams(tmp_path / "own.yaml")
    assert hparams["gamma"] == 0.5 and hparams["speed_factors"][0] == 0.8
    assert hparams["teacher_source"] == "microsoft/wavlm-large"
    (tmp_path / "shown.yaml").write_text(text)  # what is shown runs the same
    assert load_hparams(tmp_path / "shown.yaml")[1] == text


def shown(*argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["show", *argv]) == 0
    return out.getvalue()


def test_show_prints_the_file_that_runs(tmp_path):
    text = shown("soft_dtw", "--gamma", "0.7", "--results_folder", str(tmp_path))
    assert text == resolve(HPARAMS / "soft_dtw.yaml", {"gamma": 0.7, "results_folder": tmp_path})
    hparams = load_hyperpyyaml(text)
    assert hparams["distance"].options["gamma"] == 0.7
    (tmp_path / "own.yaml").write_text(text)
    assert shown(str(tmp_path / "own.yaml")) == text


def test_the_expanded_file_of_the_docs_is_true():
    """Made by: pi-finetune show soft_dtw --assets assets > docs/soft_dtw.yaml."""
    assert shown("soft_dtw", "--assets", "assets") == (ROOT / "docs/soft_dtw.yaml").read_text()


def test_blocks_that_older_files_make_at_once_work_as_they_are(tmp_path, tiny_teacher):
    """``!new:`` and ``!apply:`` where the shipped files have ``!name:``."""
    (tmp_path / "own.yaml").write_text(
        "extends: mse.yaml\n"
        f"teacher_source: {tiny_teacher}\n"
        "teacher: !new:pi_finetune.teacher.Teacher\n    source: !ref <teacher_source>\n"
        "recognizers: !apply:pi_finetune.results.evaluation.load_recognizers\n    sources: null\n"
    )
    hparams, _ = load_hparams(tmp_path / "own.yaml", {"asr_source": None, "select_by": "si_sdr"})
    assert isinstance(hparams["teacher"], Teacher)
    assert build(hparams["teacher"]) is hparams["teacher"]
    assert build(hparams["recognizers"]) == hparams["recognizers"] == []
    objective = hparams["modules"]["objective"]
    load_teachers(objective)
    assert objective.terms["representation"].teacher is hparams["teacher"]
