"""Several processes, gradient accumulation and reduced precision, through the recipes."""

import functools
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from running import ROOT, validations
from safetensors.torch import load_file

from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.brains.updates import UpdateBrain
from pi_finetune.distributed import rank, start_processes
from pi_finetune.errors import UserError
from pi_finetune.run_folder import Lock


def _port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_processes(function, count=2, codes=(0,)):
    """Run ``function()`` in forks of this process, told what ``torchrun`` tells its processes."""
    port = _port()

    def work(rank):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        function()

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        if worker.is_alive():
            worker.kill()
    assert {worker.exitcode for worker in workers} <= set(codes)


def assert_same_training(one, other):
    """Same trajectory and model, up to the order of additions."""
    for a, b in zip(validations(one), validations(other), strict=True):
        assert (a["update"], a["lr"]) == (b["update"], b["lr"])
        for score in ("train_objective", "objective", "si_sdr", "pesq", "stoi"):
            assert a[score] == pytest.approx(b[score], rel=1e-3), score
    expected, got = (load_file(run / "enhancer.safetensors") for run in (one, other))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2, atol=1e-4)


@pytest.fixture
def heard(monkeypatch, tmp_path):
    """Note what every update trains on, in all processes; gives (update, id, pass, sum)."""
    forward = EnhancementBrain.compute_forward
    folder = tmp_path / "heard"
    folder.mkdir()

    def spy(self, batch, stage):
        update = (self.optimizer_step if stage.name == "TRAIN" else "valid",)
        lengths = (batch.noisy.lengths * batch.noisy.data.shape[1]).round().long().tolist()
        lines = [
            json.dumps([*update, key, data_pass, wav[:n].double().abs().sum().item()]) + "\n"
            for key, data_pass, wav, n in zip(
                batch.id, batch.data_pass.tolist(), batch.noisy.data, lengths
            )
        ]
        with (folder / f"{os.getpid()}").open("a") as file:
            file.writelines(lines)
        return forward(self, batch, stage)

    monkeypatch.setattr(EnhancementBrain, "compute_forward", spy)

    def read():
        lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
        for path in folder.iterdir():
            path.unlink()
        return sorted(lines)

    return read


def test_two_processes_train_as_one_with_the_double_batch(train, heard):
    settings = {"valid_utterances": 3, "valid_batch_size": 1}
    one = train("soft_dtw", "one", batch_size=4, **settings)
    by_one = heard()
    in_processes(lambda: train("soft_dtw", "two", batch_size=2, **settings))
    two = one.parents[2] / "two" / "soft_dtw" / "1234"
    assert heard() == by_one  # every utterance once, in the same update, the same mixture
    assert len(by_one) == 4 * 4 + 2 * 3
    assert_same_training(one, two)
    assert len(validations(two)) == 2
    assert not list(two.glob("save/unfinished*"))
    assert len(list(two.glob("save/CKPT*"))) == len(list(one.glob("save/CKPT*"))) == 2


def test_a_shared_run_resumes_with_as_many_processes(train, tmp_path, monkeypatch, capsys):
    settings = {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    in_processes(lambda: train("mse", "straight", **settings))

    step = EnhancementBrain.optimizers_step

    def die(self):
        if self.optimizer_step == 3:
            os._exit(9)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(EnhancementBrain, "optimizers_step", die)
        in_processes(lambda: train("mse", "killed", **settings), codes=(9, 1))
    with pytest.raises(SystemExit):
        train("mse", "killed", **settings)
    assert "started with 2 processes" in capsys.readouterr().err
    in_processes(lambda: train("mse", "killed", **settings))
    straight, killed = (tmp_path / name / "mse" / "1234" for name in ("straight", "killed"))
    for a, b in zip(validations(straight), validations(killed), strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == b
    expected, got = (load_file(run / "enhancer.safetensors") for run in (straight, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


TAKE = """
import sys
from pi_finetune.run_folder import Lock
Lock(sys.argv[1], 'a training').acquire()
"""


def test_processes_of_one_run_share_its_lock_and_a_second_run_is_refused(tmp_path):
    path = tmp_path / "run" / ".lock"

    def train():
        start_processes({"device": "cpu"})
        with Lock(path, "a training"):
            torch.distributed.barrier()  # both are inside
            if rank() == 0:
                command = [sys.executable, "-c", TAKE, str(path)]
                second = subprocess.run(command, capture_output=True, text=True)
                assert f"a training is under way there, by process {os.getpid()} " in second.stderr
            torch.distributed.barrier()

    in_processes(train)

    def train_again():
        start_processes({"device": "cpu"})
        with pytest.raises(UserError) as refused:
            Lock(path, "a training").__enter__()
        # One of them tells it, and neither waits for the other.
        assert ("is under way there" in str(refused.value)) == (rank() == 0)

    hold = TAKE + "print('held', flush=True)\nsys.stdin.read()\n"
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        in_processes(train_again)
        other.stdin.close()
    in_processes(train)


def test_torchrun_starts_the_recipe(train, tmp_path):
    """The command of the documentation, on a CPU without --distributed_backend."""
    run = train("mse", "one", batch_size=4)
    text = (
        (run / "hyperparams.yaml").read_text().replace(str(tmp_path / "one"), str(tmp_path / "two"))
    )
    settings = tmp_path / "settings.yaml"
    settings.write_text(text.replace("batch_size: 4", "batch_size: 2", 1))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={_port()}", "--", str(ROOT / "recipes/train.py"), str(settings)]
    command += ["--noprogressbar"]
    subprocess.run(
        command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert_same_training(run, tmp_path / "two" / "mse" / "1234")
    assert (tmp_path / "two/mse/1234/train.py").exists()  # the recipe, and not the library


def test_accumulated_batches_are_one_update(train, heard):
    one = train("soft_dtw", "one", batch_size=4)
    by_one = heard()
    two = train("soft_dtw", "two", batch_size=2, options=("--grad_accumulation_factor", "2"))
    assert heard() == by_one
    assert_same_training(one, two)


def test_a_bad_batch_spoils_the_update_it_is_part_of(train, monkeypatch):
    objectives = EnhancementBrain.compute_objectives
    calls = []

    def broken(self, predictions, batch, stage):
        loss = objectives(self, predictions, batch, stage)
        if stage.name == "TRAIN":
            calls.append(self.optimizer_step)
            return loss * float("nan") if len(calls) == 3 else loss
        return loss

    monkeypatch.setattr(EnhancementBrain, "compute_objectives", broken)
    run = train("mse", options=("--grad_accumulation_factor", "2"))
    assert [line["skipped_updates"] for line in validations(run)] == [1, 1]
    assert calls == [0, 0, 1, 1, 1, 1, 2, 2]  # the second update was not made


def test_processes_agree_to_skip_what_is_bad_in_one(train, tmp_path, monkeypatch):
    """A batch that is not the last of its update, so that gradients were not being exchanged."""
    objectives, end = EnhancementBrain.compute_objectives, EnhancementBrain.on_stage_end

    def broken(self, predictions, batch, stage):
        loss = objectives(self, predictions, batch, stage)
        bad = stage.name == "TRAIN" and os.environ["RANK"] == "1" and self.optimizer_step == 1
        if bad and self.step == 3 and self.history.skipped == 0:
            return loss * float("nan")
        return loss

    def keep(self, stage, *args):
        end(self, stage, *args)
        state = self.plain_modules["enhancer"].state_dict()
        torch.save([self.history.skipped, state], tmp_path / f"{os.environ['RANK']}.pt")

    monkeypatch.setattr(EnhancementBrain, "compute_objectives", broken)
    monkeypatch.setattr(EnhancementBrain, "on_stage_end", keep)
    in_processes(lambda: train("mse", options=("--grad_accumulation_factor", "2")))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one[0] == other[0] == 1
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_two_processes_score_as_one(evaluate, tmp_path):
    expected = (
        evaluate(["pretrained"], batch_size=1) / "pretrained/0/scores/test.jsonl"
    ).read_text()
    results = tmp_path / "shared"
    in_processes(lambda: evaluate(["pretrained"], batch_size=1, results_folder=results))
    folder = results / "pretrained/0/scores"
    assert (folder / "test.jsonl").read_text() == expected  # in the same order, too
    assert not list(folder.glob("*.part"))
    assert len(list((folder / "test/audio").iterdir())) == 2


def test_an_interrupted_shared_evaluation_continues_in_any_number(evaluate, monkeypatch, tmp_path):
    from pi_finetune.results import metrics

    whole = evaluate(["pretrained"], batch_size=2, results_folder=tmp_path / "whole")
    expected = (tmp_path / "whole/pretrained/0/scores/test.jsonl").read_text()
    del whole
    score, calls = metrics.signal_scores, []

    def die(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os._exit(9)
        return score(*arguments)

    arguments = {"batch_size": 2, "results_folder": tmp_path / "parts"}
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "signal_scores", die)
        in_processes(lambda: evaluate(["pretrained"], **arguments), codes=(9, 1))
    parts = list((tmp_path / "parts/pretrained/0/scores").glob("*.part"))
    assert sum(len(path.read_text().splitlines()) for path in parts) == 4
    evaluate(["pretrained"], **arguments)
    assert (tmp_path / "parts/pretrained/0/scores/test.jsonl").read_text() == expected


@pytest.mark.parametrize("strategy", ["soft_dtw", "l1_stft"])
def test_bf16_trains_and_validates(train, strategy):
    full = train(strategy, "full")
    half = train(strategy, "half", options=("--precision", "bf16", "--eval_precision", "bf16"))
    for a, b in zip(validations(full), validations(half), strict=True):
        assert b["skipped_updates"] == 0
        assert b["objective"] == pytest.approx(a["objective"], rel=0.1)
        assert b["objective"] != a["objective"]  # it was used
    assert all(
        value.dtype == torch.float32 for value in load_file(half / "enhancer.safetensors").values()
    )


@pytest.mark.parametrize(
    ("precision", "has", "warned"),
    [
        ("bf16", {}, True),
        ("bf16", {"amx_bf16": True}, False),
        ("bf16", {"architecture": "aarch64"}, False),
        ("fp32", {}, False),
    ],
)
def test_bf16_that_a_cpu_only_emulates_is_warned_of(precision, has, warned, monkeypatch, caplog):
    lacks = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: lacks | has)
    start_processes({"device": "cpu", "precision": precision})
    assert ("much slower than fp32" in caplog.text) is warned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_dtw_is_float32_under_autocast(dtype):
    from pi_finetune.objectives import SoftDTWDistance

    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 16, dtype=dtype), torch.randn(2, 25, 16, dtype=dtype)
    lengths = torch.tensor([30, 20]), torch.tensor([25, 25])
    expected = SoftDTWDistance()(x.float(), lengths[0], y.float(), lengths[1])
    with torch.autocast("cpu", dtype):
        got = SoftDTWDistance()(x, lengths[0], y, lengths[1])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_the_grad_scaler_leaves_out_is_counted(train, monkeypatch):
    """fp16 on a GPU uses a GradScaler; it is the same one on a CPU."""
    init = EnhancementBrain.__init__

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scaler = torch.GradScaler("cpu", init_scale=2.0**126)  # overflows at first

    monkeypatch.setattr(EnhancementBrain, "__init__", with_scaler)
    run = train("mse", nonfinite_patience=1000, updates=40, valid_every=20)
    skipped = [line["skipped_updates"] for line in validations(run)]
    assert 0 < skipped[0] <= skipped[1] < 20
    assert np.isfinite(validations(run)[1]["objective"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(train, precision):
    run = train("soft_dtw", options=("--device", "cuda", "--precision", precision))
    assert np.isfinite([line["objective"] for line in validations(run)]).all()


def test_a_compiled_enhancer_is_exported_like_any_other(train, monkeypatch):
    compile = torch.compile

    def eager(module, **options):  # the same wrapping, without the minutes of the compiler
        return compile(module, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    plain = train("mse", "plain")
    compiled = train("mse", "compiled", options=("--compile_module_keys", "enhancer", "--compile"))
    assert_same_training(plain, compiled)


def test_only_the_main_process_has_the_text_of_an_error(tmp_path):
    from pi_finetune.distributed import on_main

    def fail():
        raise UserError("the text")

    with pytest.raises(UserError, match="the text"):
        on_main(fail)


def test_batches_of_similar_lengths_train_and_resume(train, tmp_path, monkeypatch):
    settings = {
        "max_batch_seconds": 5,
        "batch_size": 3,
        "segment_seconds": "null",  # whole utterances
        "ckpt_interval_minutes": 0,
        "ckpt_interval_steps": 1,
        "num_workers": 1,
    }
    straight = train("soft_dtw", "straight", **settings)
    step = EnhancementBrain.optimizers_step

    def die(self):
        if self.optimizer_step == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(EnhancementBrain, "optimizers_step", die)
        train("soft_dtw", "killed", **settings)
    killed = train("soft_dtw", "killed", **settings)
    expected, got = (load_file(run / "enhancer.safetensors") for run in (straight, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [line["objective"] for line in validations(straight)] == [
        line["objective"] for line in validations(killed)
    ]


class Slope(UpdateBrain):
    """Its loss is the mean of the batch times a parameter, so the gradient is that mean."""

    def __init__(self, batches, run_opts):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        rate = types.SimpleNamespace(calculate_lr=lambda update: 1.0)
        super().__init__(
            modules={"model": model},
            opt_class=functools.partial(torch.optim.SGD, lr=1.0),
            hparams={"lr_schedule": rate, "nonfinite_patience": 3},
            run_opts=start_processes({"device": "cpu", "max_grad_norm": 1e9, **run_opts}),
        )
        self.equal_batches = False
        self._wrap_distributed()
        self.init_optimizers()
        self.losses = []
        for values in batches:
            self.step += 1
            self.losses.append(float(self.fit_batch(types.SimpleNamespace(id=values, x=values))))

    def compute_forward(self, batch, stage):
        return self.modules.model(torch.tensor(batch.x)[:, None])

    def compute_objectives(self, predictions, batch, stage):
        return predictions.mean() + torch.tensor(batch.x).mean()


def test_an_update_is_the_mean_over_its_utterances():
    # two updates, each of a small and a large batch
    batches = [[1.0], [2.0, 3.0, 6.0], [10.0, 20.0], [3.0, 3.0]]
    brain = Slope(batches, {"grad_accumulation_factor": 2})
    assert brain.plain_modules["model"].weight.item() == pytest.approx(-(3.0 + 9.0))
    assert brain.losses[0] == 1.0  # what is logged is not weighted
    broken = Slope([[1.0], [float("nan")], *batches], {"grad_accumulation_factor": 2})
    assert broken.history.skipped == 1  # and leaves nothing behind
    assert broken.plain_modules["model"].weight.item() == pytest.approx(-(3.0 + 9.0))
    average = math.nan
    for brain.weight, loss in ((1.0, 1.0), (3.0, 5.0), (4.0, math.nan)):
        average = brain.update_average(loss, average)
    assert average == 4.0


def test_an_update_is_the_mean_over_the_utterances_of_all_processes(tmp_path):
    def work():
        mine = [[1.0], [2.0, 3.0, 6.0]]
        brain = Slope([mine[int(os.environ["RANK"])]], {"distributed_backend": "gloo"})
        found = [brain.plain_modules["model"].weight.item(), *brain.losses]
        (tmp_path / str(rank())).write_text(json.dumps(found))

    in_processes(work)
    for each in range(2):
        assert json.loads((tmp_path / str(each)).read_text()) == pytest.approx([-3.0, 3.0])


def test_training_from_shards_is_training_from_the_folder(train, corpus, tmp_path):
    from pi_finetune.data.shard_writer import main

    main([str(corpus), str(tmp_path / "shards"), "--splits", "train", "dev"])
    folder = train("mse", "folder")
    shards = train("mse", "tar", data_folder=tmp_path / "shards", num_workers=1)
    expected, got = (load_file(run / "enhancer.safetensors") for run in (folder, shards))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(("cache_mb", "calls"), [(512, 3), (0.001, 4)])
def test_the_clean_branch_of_a_validation_is_computed_once(tiny_teacher, cache_mb, calls):
    from pi_finetune.lengths import Waveforms
    from pi_finetune.objectives import RepresentationObjective, SoftDTWDistance
    from pi_finetune.perturbations import SpeedPerturbation
    from pi_finetune.teacher import Teacher

    class Counting(Teacher):
        count = 0

        def forward(self, wavs, lengths=None):
            self.count += 1
            return super().forward(wavs, lengths)

    torch.manual_seed(0)
    clean = Waveforms(torch.randn(2, 8000), torch.tensor([8000, 6000]), ids=("a", "b"))
    other = clean.with_data(clean.data * 0.5 + 0.1).named(("c", "d"))
    teacher = Counting(tiny_teacher)
    objective = RepresentationObjective(
        teacher, SoftDTWDistance(), SpeedPerturbation([0.9, 1.1]), cache_mb=cache_mb
    )

    def loss(seed=0, clean=clean):
        rngs = [np.random.default_rng([seed, i]) for i in range(2)]
        return objective(clean.with_data(clean.data * 0.9 + 0.01), clean, rngs=rngs)

    in_training = [loss(seed) for seed in (0, 0, 5)]
    assert teacher.count == 6  # never cached
    teacher.count = 0
    objective.eval()
    first, second = loss(), loss()
    assert teacher.count == calls
    assert torch.equal(first, second) and torch.equal(first, in_training[0])
    # Other draws are not taken for these; an equal row is, from a batch of other lengths.
    torch.testing.assert_close(loss(5), in_training[2], rtol=1e-6, atol=0)
    assert not torch.allclose(loss(5), first, rtol=1e-4)
    assert not torch.equal(loss(0, other), first)
