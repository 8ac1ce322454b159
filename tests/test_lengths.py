"""Lengths: whole numbers on the CPU, from the collate function to the loss."""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pi_finetune.data.loading import collate
from pi_finetune.enhancers import ConvTasNet, MaskEnhancer
from pi_finetune.lengths import (
    Waveforms,
    as_pair,
    content_frames,
    length_mask,
    shares,
    zero_beyond,
)
from pi_finetune.objectives import (
    CompressedSpectralLoss,
    L1STFTLoss,
    MSEDistance,
    RepresentationObjective,
    SISDRLoss,
    SoftDTWDistance,
    WarpedMSEDistance,
    WeightedSum,
)
from pi_finetune.perturbations import NoPerturbation, SpeedPerturbation, ZeroPadding
from pi_finetune.teacher import Teacher


def pairs(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "id": f"u{i}",
            "data_pass": 0,
            "noisy": torch.randn(size, generator=generator) / 10,
            "clean": torch.randn(size, generator=generator) / 10,
        }
        for i, size in enumerate(sizes)
    ]


def rngs(count):
    return [np.random.default_rng(i) for i in range(count)]


def test_mask_and_zeros_are_what_they_say():
    lengths, start = torch.tensor([0, 2, 4]), torch.tensor([3, 1, 0])
    mask, inside = length_mask(lengths, 4), length_mask(lengths, 4, start=start)
    for i in range(3):
        for k in range(4):
            assert mask[i, k] == (k < lengths[i])
            assert inside[i, k] == (start[i] <= k < start[i] + lengths[i])
    x = torch.full((3, 4, 2), torch.nan)
    assert torch.equal(zero_beyond(x, lengths).isnan(), mask[..., None].expand(3, 4, 2))
    assert shares(torch.tensor([1, 4]), 4).tolist() == [0.25, 1.0]


def test_content_frames_are_slices():
    reps = torch.arange(20.0).reshape(2, 10, 1)
    wavs = Waveforms(torch.zeros(2, 20), torch.tensor([20, 18]))
    whole = content_frames(reps, wavs, 2, torch.tensor([10, 9]))
    assert torch.equal(whole[0], reps[0]) and whole[1, 9] == 0
    moved = Waveforms(wavs.data, wavs.lengths, content=(torch.tensor([4, 0]), torch.tensor([6, 8])))
    found = content_frames(reps, moved, 2, torch.tensor([3, 4]))
    assert found[..., 0].tolist() == [[2, 3, 4, 0], [10, 11, 12, 13]]


def test_an_unperturbed_branch_is_not_gathered():
    reps = torch.ones(2, 5, 3, requires_grad=True)
    wavs = Waveforms(torch.zeros(2, 10), torch.tensor([10, 8]))
    content_frames(reps, wavs, 2, torch.tensor([5, 4])).sum().backward()
    assert torch.equal(reps.grad.sum(dim=(1, 2)), torch.tensor([15.0, 12.0]))
    assert NoPerturbation()(wavs) is wavs


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0.5, 1.0], "whole numbers"),
        ([[3, 4]], "whole numbers"),
        ([3], "must be 2, one for each item; got 1"),
        ([3, 9], "a length of 9 exceeds the 8 samples"),
    ],
)
def test_lengths_that_do_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        Waveforms.of(torch.zeros(2, 8), lengths)


def test_waveforms_are_made_of_what_a_caller_has():
    wavs = torch.zeros(2, 8)
    assert Waveforms.of(wavs).lengths.tolist() == [8, 8]
    assert Waveforms.of(wavs, [3, 4]).lengths.tolist() == [3, 4]
    x, y = as_pair(wavs, Waveforms.of(wavs, [3, 4]))
    assert x.lengths is y.lengths
    for given in ((torch.zeros(8), None), (wavs.int(), None)):
        with pytest.raises(ValueError, match=r"float \[B, T\]"):
            Waveforms.of(*given)
    with pytest.raises(ValueError, match="lengths of their own"):
        Waveforms.of(x, [3, 4])
    with pytest.raises(ValueError, match="lengths of their own"):
        as_pair(x, y, [3, 4])


def test_rows_taken_keep_their_content_and_what_padding_means():
    wavs = Waveforms.of(torch.arange(1.0, 13).reshape(3, 4), [4, 2, 3])
    before, after = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 3])
    moved = wavs.surrounded(before, after, padding_counts=True)
    assert moved.padding_counts and not wavs.surrounded(before, after).padding_counts
    taken = moved.taken(torch.tensor([2, 1]))
    assert taken.padding_counts and taken.lengths.tolist() == [6, 5]
    assert taken.content_start.tolist() == [0, 2] and taken.content_lengths.tolist() == [3, 2]
    assert [row.tolist() for row in taken.contents().items()] == [[9, 10, 11], [5, 6]]
    again = taken.surrounded(torch.tensor([1, 1]), torch.tensor([0, 0]))
    assert again.padding_counts and again.content_start.tolist() == [1, 3]
    assert not taken.surrounded(before[:2], after[:2], padding_counts=False).padding_counts


def test_names_say_what_was_done_to_a_row():
    wavs = collate(pairs([4000, 3000])).clean
    names = [
        make(wavs, rngs=rngs(2)).ids
        for make in (NoPerturbation(), ZeroPadding(), SpeedPerturbation([0.9]))
    ]
    names += [wavs.taken(torch.tensor([1, 0])).ids, wavs.cut(torch.tensor([10, 10])).ids]
    assert len(set(names)) == len(names) and None not in names
    assert ZeroPadding()(wavs, rngs=rngs(2)).ids == names[1]
    assert ZeroPadding()(wavs, rngs=rngs(3)[1:]).ids != names[1]
    # An enhancer's output is something else.
    assert MaskEnhancer(channels=(4,), dim=8, dilations=(1,))(wavs).ids is None


class Counting(torch.nn.Module):
    """A teacher that counts how often it is asked."""

    hop = 320

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, wavs):
        self.calls += 1
        counts = wavs.content_lengths // 320
        return content_frames(wavs.data.unfold(1, 320, 320), wavs, 320, counts), counts


def test_the_clean_branch_is_kept_by_name_in_evaluation():
    one, other = collate(pairs([6400, 5120])), collate(pairs([6400, 5120], seed=1))
    object.__setattr__(other.clean, "ids", one.clean.ids)  # samples are not looked at
    objective = RepresentationObjective(Counting(), MSEDistance(), ZeroPadding()).eval()
    first = objective(one.noisy, one.clean, rngs=rngs(2))
    assert objective.teacher.calls == 2
    assert torch.equal(objective(one.noisy, one.clean, rngs=rngs(2)), first)
    assert torch.equal(objective(one.noisy, other.clean, rngs=rngs(2)), first)
    assert objective.teacher.calls == 4
    alone = collate(pairs([6400, 5120])[:1])
    for batch, draws, calls in ((one, rngs(3)[1:], 2), (alone, rngs(1), 1)):  # row by row
        before = objective.teacher.calls
        objective(batch.noisy, batch.clean, rngs=draws)
        assert objective.teacher.calls == before + calls
    nameless = one.clean.named(None)
    for training in (False, True):
        objective.train(training)
        before = objective.teacher.calls
        objective(one.noisy, one.clean if training else nameless, rngs=rngs(2))
        assert objective.teacher.calls == before + 2
    objective = RepresentationObjective(Counting(), MSEDistance(), cache_mb=0).eval()
    for _ in range(2):
        objective(one.noisy, one.clean)
    assert objective.teacher.calls == 4


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return Teacher(str(tiny_teacher)).to("meta")


class Reads(TorchDispatchMode):
    """Lets ``torch.equal`` pass, which ``meta`` does not know, and counts it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            self.count += 1
            return False
        return func(*args, **(kwargs or {}))


ENHANCERS = {
    "mask": lambda: MaskEnhancer(channels=(4, 4), dim=8, dilations=(1, 2)),
    "conv_tasnet": lambda: ConvTasNet(8, 16, 8, 8, blocks=1, repeats=1),
}
STRATEGIES = {
    "mse": (None, MSEDistance()),
    "zero_pad": (ZeroPadding(), MSEDistance()),
    "zero_pad_heard": (ZeroPadding(heard=True), MSEDistance()),
    "soft_dtw": (SpeedPerturbation(), SoftDTWDistance()),
    "speed_mse": (SpeedPerturbation(), WarpedMSEDistance()),
}


@pytest.mark.parametrize("enhancer", ENHANCERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_step_reads_nothing_back_from_the_device(
    strategy, enhancer, teacher, monkeypatch
):
    """The device is PyTorch's ``meta``, whose tensors have no values: to read one is an error.

    One read is left, inside PyTorch: ``torch.istft`` looks whether its windows overlap.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no such
    perturbation, distance = STRATEGIES[strategy]
    model = ENHANCERS[enhancer]().to("meta")
    terms = {
        "representation": RepresentationObjective(teacher, distance, perturbation),
        "si_sdr": SISDRLoss(),
        "l1": L1STFTLoss(),
        "compressed": CompressedSpectralLoss(),
    }
    objective = WeightedSum(terms, dict.fromkeys(terms, 1.0))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = collate(pairs([8000, 6000, 7000])).to("meta")
    with Reads() as reads:
        loss = objective(model(batch.noisy), batch.clean, rngs=rngs(3))
        assert loss.is_meta and loss.shape == (3,)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert reads.count == (1 if enhancer == "mask" else 0)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.tolist, torch.Tensor.cpu])
def test_reading_from_that_device_is_an_error(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones((), device="meta"))
