"""The ablation: which cells there are, and running them with workers that die."""

import io
import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import submitit
from running import HPARAMS, STRATEGIES, Script, recipe
from tqdm import tqdm

from pi_finetune.ablation import SCORING, STAMP, Ablation, Cell, run_cells
from pi_finetune.config import load_hparams
from pi_finetune.errors import UserError


def ablation(tmp_path, **overrides):
    overrides = {"results_folder": str(tmp_path / "results"), **overrides}
    return Ablation(load_hparams(HPARAMS / "ablation.yaml", overrides)[0])


def option(call, key):
    words = call.words()
    return words[words.index(f"--{key}") + 1]


def write_validations(cell, scores):
    cell.folder.mkdir(parents=True)
    lines = [json.dumps({"update": i, "wer": score}) + "\n" for i, score in enumerate(scores)]
    (cell.folder / "valid.jsonl").write_text("".join(lines))


def test_cells_differ_in_nothing_but_strategy_teacher_seed_and_rate(tmp_path):
    plan = ablation(tmp_path, strategies=["mse", "soft_dtw"], controls=["si_sdr"], seeds=[1, 2])
    for searches in plan.searches.values():
        for cell, scores in zip(searches.values(), ([50, 30], [40, 20], [60, None]), strict=True):
            write_validations(cell, scores)
    cells = plan.cells()
    folders = [str(cell.folder.relative_to(plan.results)) for cell in cells]
    controls = [f"controls/si_sdr/{seed}" for seed in (1, 2)]
    runs = [f"hubert/{name}/{seed}" for seed in (1, 2) for name in ("mse", "soft_dtw")]
    assert folders[:2] == ["noisy/0", "pretrained/0"]
    assert [folder for folder in folders[2:] if "search" not in folder] == controls + runs
    assert len(folders) == len(set(folders)) == 2 + 3 * 3 + 6
    searches = [cell for cell in cells if cell.folder.is_relative_to(plan.results / "search")]
    trainings = [cell.calls()[0] for cell in cells[2:] if cell not in searches]
    for training in trainings:
        assert option(training, "lr") == "0.0003"  # the best of its search
        assert option(training, "updates") == "300"
    free = {"seed", "strategy", "results_folder", "teacher_source"}
    settings = [
        {key: value for key, value in call.overrides.items() if key not in free}
        for call in trainings
    ]
    assert all(call.run_opts == {"noprogressbar": True} for call in trainings)
    assert all(each == settings[0] for each in settings)
    # the search: the same for all, with fewer updates, away from the runs that are compared
    for cell in searches:
        (training,) = cell.calls()
        assert (option(training, "updates"), option(training, "seed")) == ("100", "0")


def test_the_rate_with_the_best_dev_score_is_chosen_in_its_direction(tmp_path):
    plan = ablation(tmp_path, strategies=["mse"], controls=[], select_by="stoi")
    for cell, stoi in zip(plan.searches["hubert", "mse"].values(), (0.7, 0.6, 0.9), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / "valid.jsonl").write_text(json.dumps({"update": 1, "stoi": stoi}))
    rate, scores = plan.learning_rate("hubert", "mse")
    assert rate == 0.001 and scores == {0.0001: 0.7, 0.0003: 0.6, 0.001: 0.9}


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_rate_that_diverges_loses_the_search(tmp_path, executor, monkeypatch, all_of_them):
    """Its worker stops with an error; so it did, and the strategy failed with it."""
    plan = ablation(tmp_path, strategies=["mse"], controls=[], lrs=[0.001, 0.1], seeds=[1, 2])
    cells = plan.searches["hubert", "mse"]
    diverge = "from pi_finetune.errors import DivergedError\nraise DivergedError('too often')"
    for rate, cell in cells.items():
        # Either has a fine validation; but what then diverges is no rate to train with.
        write_validations(cell, [50 if rate == 0.001 else 20])
        script = diverge if all_of_them or rate == 0.1 else ""
        monkeypatch.setitem(cells, rate, replace(cell, calls=partial(list, [Script(script, {})])))
    runs = [cell for cell in plan.cells() if "search" not in str(cell.folder)]
    runs = [replace(cell, needs=tuple(cells.values())) for cell in runs if cell.needs]
    assert run_cells([*cells.values()], executor, poll_seconds=0.05) == {}
    assert all(cell.done() for cell in cells.values())
    if not all_of_them:
        assert plan.learning_rate("hubert", "mse") == (0.001, {0.001: 50, 0.1: None})
        return
    failed = run_cells(runs, executor, poll_seconds=0.05)
    assert len(failed) == 2 and len(set(failed.values())) == 1
    message = "no learning rate of hubert/mse (0.001, 0.1) trains to its end with a finite wer"
    assert message in next(iter(failed.values()))


def test_one_rate_is_not_searched(tmp_path):
    plan = ablation(tmp_path, strategies=["mse"], controls=[], lrs=[0.01])
    assert plan.learning_rate("hubert", "mse") == (0.01, {})
    assert len(plan.cells()) == 2 + 3


def test_a_variant_of_a_strategy_has_a_name_of_its_own(tmp_path):
    variant = {"smooth": {"hparams": "soft_dtw.yaml", "gamma": 1.0}}
    plan = ablation(tmp_path, strategies=variant, controls=[], lrs=[0.01])
    training = plan.cells()[-1].calls()[0]
    assert training.experiment.parts[-2:] == ("hparams", "soft_dtw.yaml")
    assert option(training, "gamma") == "1.0" and option(training, "strategy") == "smooth"


def test_a_list_may_hold_variants_beside_names(tmp_path):
    mixed = ["mse", {"smooth": {"hparams": "soft_dtw.yaml", "gamma": 1.0}}]
    plan = ablation(tmp_path, strategies=mixed, controls=[], lrs=[0.01], seeds=[1])
    mse, smooth = (cell.calls()[0] for cell in plan.cells()[-2:])
    assert option(mse, "strategy") == "mse" and option(smooth, "strategy") == "smooth"
    assert smooth.experiment.name == "soft_dtw.yaml" and option(smooth, "gamma") == "1.0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"strategies": ["mse", {"mse": {"lr": 1.0}}]}, "strategies: 'mse' is there twice"),
        ({"strategies": ["nonsense"]}, "no experiment file nonsense"),
        ({"seeds": []}, "seeds: give at least one"),
        ({"controls": ["mse"]}, "mse: both in strategies and in controls"),
        ({"teachers": {"search": {}}}, "'search' is the name of a folder"),
        ({"search_updates": 70}, "search_updates: must be a multiple of valid_every"),
        ({"strategies": {"mse": {"gama": 1.0}}}, r"--gama: .*mse\.yaml has no such key"),
        ({"teachers": {"a": {"teacher": "x", "layers": 3}}}, "--layers: .* has no such key"),
        ({"evaluate": {"test_split": "a"}}, "no such key. Did you mean --test_splits?"),
    ],
)
def test_wrong_settings_are_named(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        ablation(tmp_path, **overrides)


@pytest.fixture
def executor(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)  # for the results of the dead
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # where the workers find Script
    return submitit.AutoExecutor(tmp_path / "logs", cluster="local")


@pytest.fixture
def cell(tmp_path):
    """A cell whose one call runs Python code; by default it appends to a file."""

    def make(name, script="", needs=(), **settings):
        noted = f"import os\nopen({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n"
        call = Script(noted + script, settings)
        return Cell(tmp_path / "runs" / name, lambda: [call], tuple(needs))

    return make


def ran(tmp_path):
    path = tmp_path / "ran"
    return path.read_text().split() if path.exists() else []


def test_finished_cells_are_skipped_and_unfinished_ones_are_run(tmp_path, cell, executor):
    first, second = cell("first"), cell("second")
    assert run_cells([first], executor, poll_seconds=0.05) == {}
    assert first.done() and not second.done()
    assert run_cells([first, second], executor, poll_seconds=0.05) == {}
    assert ran(tmp_path) == ["first", "second"]


def test_a_cell_waits_for_what_it_needs(tmp_path, cell, executor):
    first = cell("first", "import time; time.sleep(0.3)")
    second = cell("second", needs=[first])
    assert run_cells([second, first], executor, poll_seconds=0.05) == {}
    assert ran(tmp_path) == ["first", "second"]


def test_a_validation_that_is_being_written_is_not_counted(tmp_path):
    cell = Cell(tmp_path, list, updates=60)
    (tmp_path / "valid.jsonl").write_text('{"update": 30}\n{"upda')
    assert cell.left() == 30 + SCORING


def test_the_bar_counts_updates_of_runs_under_way(cell, executor, monkeypatch):
    class Bar(tqdm):
        seen: ClassVar[list] = []

        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})

        def refresh(self, *args, **kwargs):
            self.seen.append((self.n, self.total))
            return super().refresh(*args, **kwargs)

    monkeypatch.setattr("pi_finetune.ablation.tqdm", Bar)
    half = "open({!r}, 'w').write('{{\"update\": 30}}\\n')\nimport time; time.sleep(0.5)"
    first, second = cell("first"), cell("second")
    second = replace(cell("second", half.format(f"{second.folder}/valid.jsonl")), updates=60)
    assert run_cells([first, second], executor, workers=1, poll_seconds=0.05) == {}
    whole = 2 * SCORING + 60
    assert {total for _, total in Bar.seen} == {whole}
    made = sorted({n for n, _ in Bar.seen})
    assert made == [0, SCORING, SCORING + 30, whole]


def test_a_cell_made_with_other_settings_is_not_mistaken_for_done(cell, executor):
    run_cells([cell("a", lr="1", seed="2")], executor, poll_seconds=0.05)
    with pytest.raises(UserError, match=r"--lr 1 instead of --lr 3\. Remove it"):
        run_cells([cell("a", lr="3", seed="2")], executor, poll_seconds=0.05)


def test_a_killed_worker_is_replaced(tmp_path, cell, executor):
    die_once = (
        f"import signal\nif open({str(tmp_path / 'ran')!r}).read().count('a ') == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_cells([cell("a", die_once)], executor, retries=1, poll_seconds=0.05) == {}
    assert ran(tmp_path) == ["a", "a"]


def test_a_worker_that_always_dies_and_a_command_that_fails_do_not_stop_the_others(
    tmp_path, cell, executor
):
    die = "import signal\nos.kill(os.getpid(), signal.SIGKILL)"
    broken = "from pi_finetune.errors import UserError\nraise UserError('lr: wrong')"
    dying, failing = cell("dying", die), cell("failing", broken)
    after, other = cell("after", needs=[failing]), cell("other")
    failed = run_cells(
        [dying, failing, after, other], executor, workers=2, retries=1, poll_seconds=0.05
    )
    assert ran(tmp_path).count("dying") == 2 and ran(tmp_path).count("failing") == 1
    assert set(failed) == {dying.folder, failing.folder, after.folder}
    assert "its worker died" in failed[dying.folder]
    assert failed[failing.folder].startswith("lr: wrong\n")
    assert f"{failing.folder} failed" in failed[after.folder]
    assert other.done() and "after" not in ran(tmp_path)
    assert json.loads((failing.folder / STAMP).read_text())["complete"] is False


def test_no_more_workers_than_asked_for(tmp_path, cell, executor):
    script = (
        f"import time, pathlib\np = pathlib.Path({str(tmp_path)!r})\n"
        "me = p / f'busy-{os.getpid()}'\nme.touch()\ntime.sleep(0.3)\n"
        "open(p / 'most', 'a').write(f\"{len(list(p.glob('busy-*')))} \")\nme.unlink()"
    )
    cells = [cell(f"c{i}", script) for i in range(4)]
    assert run_cells(cells, executor, workers=2, poll_seconds=0.05) == {}
    assert max(map(int, (tmp_path / "most").read_text().split())) <= 2


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_cancels_the_workers(tmp_path, cell, executor, kind):
    endless = cell("endless", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                   "import time; time.sleep(60)")  # fmt: skip

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), kind)

    terminated = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_cells([endless], executor, poll_seconds=0.05)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is terminated  # as it was
    pid = int((tmp_path / "pid").read_text())
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("the worker is still there")
    assert not endless.done()


def test_a_second_worker_waits_for_the_first_and_repeats_nothing(tmp_path, cell, executor):
    slow = cell("slow", "import time; time.sleep(1)")
    threads = [
        threading.Thread(target=lambda: results.append(run_cells([slow], executor, retries=0)))
        for _ in range(2)
    ]
    results = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran(tmp_path) == ["slow"]
    assert results == [{}, {}] and slow.done()


def test_the_recipe_leaves_a_comparison(
    corpus,
    noises,
    tiny_teacher,
    pretrained,
    tmp_path,
    capsys,
):
    data = {"data_folder": str(corpus), "noise_folder": str(noises), "asr_source": None}
    training = {
        **data,
        "enhancer": f"!include:{str(pretrained).replace(' ', '%20')}/block.yaml",
        "enhancer_weights": str(pretrained),
        "updates": 2,
        "valid_every": 2,
        "segment_seconds": 1.0,
        "batch_size": 2,
        "num_workers": 0,
        "valid_utterances": 2,
    }
    results = tmp_path / "my results"
    settings = {
        "strategies": ["mse"],
        "controls": [],
        "teachers": {"hubert": {"teacher_source": str(tiny_teacher)}},
        "seeds": [7],
        "lrs": [0.01],
        "select_by": "si_sdr",
        "results_folder": str(results),
        "train": training,
        "evaluate": {**data, "enhancer_weights": str(pretrained), "test_utterances": 2},
        "compare": {"html": False, "replicates": 99},
    }
    arguments = [w for key, value in settings.items() for w in (f"--{key}", json.dumps(value))]
    assert recipe("ablate")([str(HPARAMS / "ablation.yaml"), *arguments]) == 0
    table = (results / "table.csv").read_text()  # of the only teacher
    assert all(system in table for system in ("noisy", "pretrained", "mse"))
    assert json.loads((results / "learning_rates.json").read_text())["hubert/mse"]["lr"] == 0.01
    capsys.readouterr()
    assert recipe("ablate")([str(HPARAMS / "ablation.yaml"), *arguments]) == 0
    assert "done" not in capsys.readouterr().err  # nothing was run again


def test_the_demo_runs_strategies_a_control_and_the_references(tmp_path):
    settings, _ = load_hparams(HPARAMS / "demo.yaml", {"results_folder": str(tmp_path)})
    folders = {str(cell.folder.relative_to(tmp_path)) for cell in Ablation(settings).cells()}
    expected = {f"hubert/{name}/1234" for name in ("mse", "zero_pad", "soft_dtw")}
    untrained = {"noisy/0", "clean/0", "pretrained/0"}
    assert folders == expected | untrained | {"controls/si_sdr/1234"}


@pytest.mark.parametrize(
    "path", (HPARAMS.parent / "recipes").glob("*/*.yaml"), ids=lambda p: p.stem
)
def test_the_ablations_of_the_recipes_can_begin(path, tmp_path):
    settings, _ = load_hparams(path, {"results_folder": str(tmp_path)})
    seeds = settings["seeds"]
    assert len(Ablation(settings).cells()) > 2 + len(seeds)


def test_the_ablation_of_the_evidence_has_every_strategy_teacher_and_seed(tmp_path):
    path = HPARAMS.parent / "recipes" / "LibriSpeech" / "ablation.yaml"
    settings, _ = load_hparams(path, {"results_folder": str(tmp_path)})
    plan = Ablation(settings)
    later = {"pretrain_enhancer", "enhance", "zero_pad_heard", "mse_cnn", "mse_projected"}
    names = set(STRATEGIES) - later
    assert {name for _, name in plan.groups} == names
    assert {place for place, _ in plan.groups} == {"controls", "whisper", "hubert"}
    runs = [cell for cell in plan.cells() if len(cell.needs)]
    assert len(runs) == 3 * (2 * 6 + 2)
