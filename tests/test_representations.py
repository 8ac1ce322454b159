"""representation_cache: the clean branch of training, made once and kept on disk."""

import json
import logging
import multiprocessing

import numpy as np
import pytest
import torch
from running import validations
from safetensors.torch import load_file, save_file
from synthetic import save_tiny_teacher

from pi_finetune import settings
from pi_finetune.brains.enhancement import EnhancementBrain
from pi_finetune.data.loading import collate, load_pairs
from pi_finetune.errors import UserError
from pi_finetune.lengths import Lasting, Waveforms
from pi_finetune.objectives import MSEDistance, RepresentationObjective, SoftDTWDistance
from pi_finetune.perturbations import SpeedPerturbation, ZeroPadding
from pi_finetune.projections import LearnedProjection
from pi_finetune.representations import MADE_FROM_FILE
from pi_finetune.teacher import Teacher


class Counting(Teacher):
    """A teacher that counts the rows it is given."""

    rows = 0

    def forward(self, wavs, lengths=None):
        self.rows += len(wavs)
        return super().forward(wavs, lengths)


def speech(sizes=(8000, 6000, 7000), seed=0):
    """Clean speech with names that hold."""
    generator = torch.Generator().manual_seed(seed)
    rows = [0.1 * torch.randn(size, generator=generator) for size in sizes]
    names = [Lasting(f"utterance {i}", 100 * seed + i) for i in range(len(rows))]
    return Waveforms.collate(rows, ids=tuple(names))


def draws(seed, count=3):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def loss_and_gradient(objective, clean, seed):
    noise = torch.randn(clean.data.shape, generator=torch.Generator().manual_seed(1000 + seed))
    enhanced = (0.9 * clean.data + 0.05 * noise).requires_grad_()
    losses = objective(clean.with_data(enhanced), clean, rngs=draws(seed, len(clean)))
    losses.sum().backward()
    return losses.detach(), enhanced.grad


def entries(folder):
    return sorted(folder.glob("*/*/*.safetensors"))


def test_values_are_those_without_within_half_precision(tiny_teacher, tmp_path):
    clean, teacher = speech(), Counting(tiny_teacher)
    arguments = teacher, SoftDTWDistance(), SpeedPerturbation([0.9, 1.1])
    plain = RepresentationObjective(*arguments)
    kept = RepresentationObjective(*arguments, cache_folder=tmp_path)
    again = RepresentationObjective(*arguments, cache_folder=tmp_path)  # another run
    for seed in range(6):
        expected, gradient = loss_and_gradient(plain, clean, seed)
        for objective in (kept, again):
            losses, found = loss_and_gradient(objective, clean, seed)
            torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
            assert not torch.equal(losses, expected)  # or nothing is kept
            assert (found - gradient).norm() < 2e-3 * gradient.norm()
    assert len(entries(tmp_path)) == 6  # three utterances at two speeds
    assert load_file(entries(tmp_path)[0])["reps"].dtype == torch.float16
    teacher.rows = 0
    loss_and_gradient(kept, clean, 0)
    assert teacher.rows == 3  # the enhanced ones alone
    # Another batch: what is there is taken, the rest is made.
    more = Waveforms.collate(
        [*clean.items()[:2], 0.1 * torch.randn(9000)], ids=(*clean.ids[:2], Lasting("new", 7))
    )
    expected, _ = loss_and_gradient(plain, more, 0)
    teacher.rows = 0
    losses, _ = loss_and_gradient(kept, more, 0)
    assert teacher.rows == 4
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)


def test_a_learned_projection_goes_on_learning_from_what_is_kept(tiny_teacher, tmp_path):
    """The teacher's own output is kept, not the projected: that changes with every update."""
    clean, projection = speech(), LearnedProjection(8)
    arguments = Teacher(tiny_teacher), SoftDTWDistance(), SpeedPerturbation([0.9, 1.1])
    projection.fit_to(arguments[0])
    plain = RepresentationObjective(*arguments, projection=projection)
    kept = RepresentationObjective(*arguments, projection=projection, cache_folder=tmp_path)
    for seed in (0, 1, 0):  # the third pass takes all from the folder
        found = []
        for objective in (plain, kept):
            projection.zero_grad()
            losses, _ = loss_and_gradient(objective, clean, seed)
            found.append((losses, [weight.grad.clone() for weight in projection.parameters()]))
        (expected, gradients), (losses, kept_gradients) = found
        torch.testing.assert_close(losses, expected, rtol=5e-3, atol=1e-4)
        for gradient, kept_gradient in zip(gradients, kept_gradients):
            assert gradient.norm() > 0
            assert (kept_gradient - gradient).norm() < 1e-2 * gradient.norm()
        with torch.no_grad():
            for weight in projection.parameters():
                weight += 0.1 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(0)
                )


def test_an_empty_folder_and_a_full_one_give_the_same_bits(tiny_teacher, tmp_path):
    objectives = [
        RepresentationObjective(Teacher(tiny_teacher), MSEDistance(), cache_folder=tmp_path)
        for _ in range(2)
    ]
    first, second = (loss_and_gradient(objective, speech(), 0) for objective in objectives)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_another_teacher_made_is_not_taken(tiny_teacher, tmp_path, caplog):
    other = str(save_tiny_teacher(tmp_path / "other", seed=1))
    folder, clean = tmp_path / "kept", speech()
    precise = torch.autocast("cpu", torch.bfloat16, enabled=False)
    coarse = torch.autocast("cpu", torch.bfloat16)
    for source, layers, precision, told in (
        (str(tiny_teacher), -1, precise, ""),
        (other, -1, precise, f"by a teacher of other weights ({tiny_teacher}, now {other})"),
        (str(tiny_teacher), [0, 1], precise, "with layers [2], now [0, 1]"),
        (str(tiny_teacher), -1, coarse, "in float32, now bfloat16"),
    ):
        caplog.clear()
        teacher, before = Teacher(source, layers), len(entries(folder))
        with precision, caplog.at_level(logging.WARNING):
            expected, _ = loss_and_gradient(
                RepresentationObjective(teacher, MSEDistance()), clean, 0
            )
            objective = RepresentationObjective(teacher, MSEDistance(), cache_folder=folder)
            for _ in range(2):
                losses, _ = loss_and_gradient(objective, clean, 0)
        tolerance = 2e-3 if precision is precise else 2e-2
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
        assert len(entries(folder)) == before + 3
        assert told in caplog.text and (caplog.text.count("is not used") > 0) == bool(told)


def test_other_samples_under_a_known_id_are_not_taken_for_it(tiny_teacher, tmp_path):
    objective = RepresentationObjective(Teacher(tiny_teacher), MSEDistance(), cache_folder=tmp_path)
    loss_and_gradient(objective, speech(), 0)
    loss_and_gradient(objective, speech(seed=1), 0)
    assert len(entries(tmp_path)) == 6


@pytest.mark.parametrize("standardises", [True, False])
def test_the_gain_of_a_mixture(standardises, tiny_teacher, tmp_path):
    """A teacher that standardises hears none; of another, what is scaled is made every time."""
    if not standardises:
        preprocessor = save_tiny_teacher(tmp_path / "teacher") / "preprocessor_config.json"
        text = json.loads(preprocessor.read_text())
        preprocessor.write_text(json.dumps({**text, "do_normalize": False}))
        tiny_teacher = tmp_path / "teacher"
    teacher, clean, folder = Counting(tiny_teacher), speech(), tmp_path / "kept"
    assert teacher.hears_level != standardises
    quiet = clean.with_data(0.5 * clean.data).named((i, "gain", 0.5) for i in clean.ids)
    plain = RepresentationObjective(teacher, MSEDistance())
    kept = RepresentationObjective(teacher, MSEDistance(), cache_folder=folder)
    for wavs, written, rows in (
        (quiet, 3 * standardises, 6),
        (clean, 3, 3 if standardises else 6),
        (quiet, 3, 3 if standardises else 6),
    ):
        expected, _ = loss_and_gradient(plain, wavs, 0)
        teacher.rows = 0
        losses, _ = loss_and_gradient(kept, wavs, 0)
        torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
        assert (len(entries(folder)), teacher.rows) == (written, rows)


def test_damaged_and_unfinished_files_are_made_again(tiny_teacher, tmp_path, caplog):
    objective = RepresentationObjective(Teacher(tiny_teacher), MSEDistance(), cache_folder=tmp_path)
    expected, _ = loss_and_gradient(objective, speech(), 0)
    whole = [path.read_bytes() for path in entries(tmp_path)]
    cut, empty, other = entries(tmp_path)
    cut.write_bytes(whole[0][:-100])  # a crash of the machine before its disk had all
    empty.write_bytes(b"")
    save_file({"reps": torch.zeros(3, 32)}, other)  # not ours
    unfinished = cut.with_name(f"{cut.name}.1.part")
    unfinished.write_bytes(whole[0][:-100])
    losses, _ = loss_and_gradient(objective, speech(), 0)
    assert torch.equal(losses, expected)
    assert caplog.text.count("is damaged") == 3
    assert [path.read_bytes() for path in entries(tmp_path)] == whole


def _fill(source, folder, barrier):
    torch.set_num_threads(1)
    objective = RepresentationObjective(Teacher(source), MSEDistance(), cache_folder=folder)
    barrier.wait()
    for seed in range(3):
        loss_and_gradient(objective, speech(seed=seed), 0)


def test_two_processes_fill_one_folder(tiny_teacher, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    arguments = (str(tiny_teacher), tmp_path, barrier)
    both = [context.Process(target=_fill, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(entries(tmp_path)) == 9 and not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.glob(f"*/{MADE_FROM_FILE}"))) == 1
    for path in entries(tmp_path):
        assert load_file(path)["reps"].shape[1] == 32


def test_names_hold_where_clean_speech_is_the_same_in_every_pass(corpus, noises):
    def clean(data_pass, **options):
        pairs = load_pairs(corpus, ["train"], "train", noises, seed=3, **options)
        return collate([pairs[i, data_pass] for i in range(4)]).clean

    assert clean(0).ids == clean(1).ids
    assert torch.equal(clean(0).data, clean(1).data)
    assert all(isinstance(name, Lasting) for name in clean(0).ids)
    assert not set(clean(0, segment_seconds=1).ids) & set(clean(1, segment_seconds=1).ids)
    rooms = noises  # any short sound is a response
    assert not set(clean(0, rir_folder=rooms).ids) & set(clean(1, rir_folder=rooms).ids)
    # Loud noise: speech is scaled with its mixture, and says so.
    loud = [clean(data_pass, snrs=[-15]) for data_pass in range(2)]
    assert not set(loud[0].ids) & set(loud[1].ids)
    for wavs in loud:
        for (name, what, gain), row, whole in zip(wavs.ids, wavs.items(), clean(0).items()):
            assert (name, what) in [(own, "gain") for own in clean(0).ids]
            torch.testing.assert_close(row, gain * whole)


def refused(match, clean=None, teacher=None, **options):
    with pytest.raises(UserError, match=match):
        objective = RepresentationObjective(teacher, MSEDistance(), **options)
        loss_and_gradient(objective, speech() if clean is None else clean, 0)


def test_what_cannot_be_kept_is_refused(tiny_teacher, tmp_path):
    keep, teacher = {"cache_folder": tmp_path / "kept"}, Teacher(tiny_teacher)
    refused("ZeroPadding makes another of the clean", perturbation=ZeroPadding(), **keep)
    RepresentationObjective(
        teacher, MSEDistance(), ZeroPadding(), "enhanced", **keep
    )  # hears it as it is
    crops = speech().named([("clean", "a", 0)] * 3)
    for clean in (crops, speech().named(None)):
        refused("is not known to be the same in every pass", clean, teacher, **keep)
    refused(r"Linear has no digest\(\)", teacher=torch.nn.Linear(1, 1), **keep)
    with torch.no_grad():
        teacher.encoder.encoder.layer_norm.weight.mul_(1e6)
    refused("not finite in half precision", teacher=teacher, **keep)
    (tmp_path / "file").write_text("")
    refused(r"representation_cache: Cannot write", teacher=teacher, cache_folder=tmp_path / "file")
    for key, value in (("segment_seconds", 3.0), ("rir_folder", "rooms")):
        with pytest.raises(UserError, match=f"representation_cache: {key} is {value}"):
            settings.check_values({"representation_cache": "kept", key: value})


def test_a_training_keeps_and_resumes(train, tmp_path, monkeypatch):
    options = {"segment_seconds": "null", "batch_size": 4, "updates": 6, "valid_every": 3}
    options |= {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}  # a pass is 3 updates
    plain = validations(train("soft_dtw", "plain", **options))
    rows = []
    forward = Teacher.forward

    def count(self, wavs, lengths=None):
        rows.append(len(wavs))
        return forward(self, wavs, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "forward", count)
        kept = train("soft_dtw", "kept", representation_cache=tmp_path / "a", **options)
        made = sum(rows)
        rows.clear()
        train("soft_dtw", "again", representation_cache=tmp_path / "a", **options)
        assert made - sum(rows) == len(entries(tmp_path / "a"))
    for with_it, without in zip(validations(kept), plain):
        for score in ("objective", "train_objective"):
            assert with_it[score] == pytest.approx(without[score], rel=5e-3)

    step = EnhancementBrain.optimizers_step

    def die(self):
        if self.optimizer_step == 4:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(EnhancementBrain, "optimizers_step", die)
        train("soft_dtw", "killed", representation_cache=tmp_path / "b", **options)
    killed = train("soft_dtw", "killed", representation_cache=tmp_path / "b", **options)
    expected, got = (load_file(run / "enhancer.safetensors") for run in (kept, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_training_with_crops_is_refused_at_once(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("mse", representation_cache=tmp_path / "kept")
    assert "representation_cache: segment_seconds is 1.0" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
