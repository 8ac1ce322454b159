"""Perturbations, distances and objectives against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_finetune.lengths import Waveforms
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
from pi_finetune.perturbations import SpeedPerturbation, ZeroPadding
from pi_finetune.results.metrics import si_sdr
from pi_finetune.seeding import utterance_rng
from pi_finetune.teacher import Teacher


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def batch(lengths, seed=0, dim=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths)) if dim is None else (len(lengths), max(lengths), dim)
    x = torch.randn(shape, generator=generator)
    for i, length in enumerate(lengths):
        x[i, length:] = 0
    return x, torch.tensor(lengths)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(400, 3000), min_size=1, max_size=4), st.integers(0, 1000))
def test_zero_padding_keeps_content_on_the_frame_grid(lengths, seed):
    wavs, lengths = batch(lengths, seed)
    out = ZeroPadding(max_seconds=0.1)(wavs, lengths, rngs(len(lengths), seed))
    assert (out.content_start % 320 == 0).all() and torch.equal(out.content_lengths, lengths)
    assert out.data.shape[1] == out.lengths.max()
    for i in range(len(lengths)):
        start, length = int(out.content_start[i]), int(lengths[i])
        torch.testing.assert_close(out.data[i, start : start + length], wavs[i, :length])
        assert out.data[i].count_nonzero() == wavs[i].count_nonzero()
        before, after = start, int(out.lengths[i]) - start - length
        assert 0 <= before <= 1600 and 0 <= after <= 1600 and after % 320 == 0


def test_zero_padding_draws_every_number_of_hops():
    wavs, lengths = batch([400] * 300)
    out = ZeroPadding(max_seconds=0.1)(wavs, lengths, rngs(300))
    assert set((out.content_start // 320).tolist()) == set(range(6))


def test_speed_changes_lengths_per_utterance_and_keeps_pitch_ratio():
    time = torch.arange(16000) / 16000
    wavs = torch.sin(2 * torch.pi * 440 * time).repeat(40, 1)
    lengths = torch.full((40,), 16000)
    out = SpeedPerturbation([0.8, 1.0, 1.25])(wavs, lengths, rngs(40))
    assert set(out.lengths.tolist()) == {12800, 16000, 20000}
    for wav, length in zip(out.data, out.lengths.tolist()):
        peak = torch.fft.rfft(wav[:length]).abs().argmax() * 16000 / length
        assert peak == pytest.approx(440 * 16000 / length, abs=2)
        assert not wav[length:].any()


@pytest.mark.parametrize("perturbation", [ZeroPadding(0.1), SpeedPerturbation([0.9, 1.1])])
def test_perturbation_is_differentiable_and_independent_of_the_batch(perturbation):
    wavs, lengths = batch([2000, 1500, 900])
    wavs.requires_grad_()
    whole = perturbation(wavs, lengths, rngs(3))
    whole.data.square().sum().backward()
    assert wavs.grad[1, :1500].abs().sum() > 0 and not wavs.grad[1, 1500:].any()
    alone = perturbation(wavs[1:2, :1500], lengths[1:2], rngs(3)[1:2])
    size = int(alone.lengths)
    torch.testing.assert_close(whole.data[1, :size], alone.data[0, :size])


def test_bad_perturbation_arguments():
    with pytest.raises(ValueError, match="max_seconds"):
        ZeroPadding(max_seconds=-1)
    with pytest.raises(ValueError, match="factors"):
        SpeedPerturbation([0.9, 0])


def test_mse_is_the_mean_over_valid_frames_and_ignores_padding():
    x, lengths = batch([7, 4], dim=5)
    y, _ = batch([7, 4], seed=1, dim=5)
    expected = torch.stack([(x[i, :n] - y[i, :n]).square().mean() for i, n in enumerate([7, 4])])
    x[1, 4:] = torch.nan
    torch.testing.assert_close(MSEDistance()(x, lengths, y, lengths), expected)
    with pytest.raises(ValueError, match="frame k with frame k"):
        MSEDistance()(x, lengths, y, lengths - 1)


def test_warped_mse_of_a_linear_ramp_is_zero_at_any_length():
    def ramp(frames):
        return (torch.arange(frames) + 0.5)[None, :, None] / frames

    x, y = ramp(40), ramp(50)
    value = WarpedMSEDistance()(x, torch.tensor([40]), y, torch.tensor([50]))
    assert value.item() < 1e-4
    shifted = WarpedMSEDistance()(x, torch.tensor([40]), y + 1, torch.tensor([50]))
    assert shifted.item() == pytest.approx(1, abs=0.02)
    same, lengths = batch([9, 5], dim=3)
    assert WarpedMSEDistance()(same, lengths, same, lengths).abs().max() == 0


def test_warped_mse_is_that_of_interpolated_frames():
    """NumPy in float64, utterance by utterance, beside padding that holds what must not be read."""
    (x, x_lengths), (y, y_lengths) = batch([9, 4, 7, 1], dim=3), batch([6, 10, 7, 3], 1, dim=3)
    expected = []
    for a, b, n, m in zip(x.double(), y.double(), x_lengths.tolist(), y_lengths.tolist()):
        places = (np.arange(n) + 0.5) * m / n - 0.5
        warped = np.stack([np.interp(places, np.arange(m), b[:m, d]) for d in range(3)], axis=1)
        expected.append(((a[:n].numpy() - warped) ** 2).mean())
    for i, (n, m) in enumerate(zip(x_lengths, y_lengths)):
        x[i, n:], y[i, m:] = 1e3, -1e3
    found = WarpedMSEDistance()(x, x_lengths, y, y_lengths)
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_soft_dtw_distance_is_a_divergence_and_sees_no_scale():
    x, x_lengths = batch([20, 15], dim=8)
    y, y_lengths = batch([25, 12], seed=1, dim=8)
    distance = SoftDTWDistance(gamma=0.1)
    torch.testing.assert_close(
        distance(x, x_lengths, x, x_lengths), torch.zeros(2), atol=1e-4, rtol=0
    )
    value = distance(x, x_lengths, y, y_lengths)
    assert (value > 0).all()
    torch.testing.assert_close(distance(3 * x, x_lengths, y, y_lengths), value)
    raw = SoftDTWDistance(gamma=0.1, length_normalize=False)(x, x_lengths, y, y_lengths)
    torch.testing.assert_close(raw / torch.tensor([22.5, 13.5]), value)


def test_soft_dtw_forgives_a_change_of_speed_that_mse_does_not():
    steps = torch.linspace(0, 6, 60)
    path = torch.stack([steps.sin(), steps.cos(), (0.7 * steps).sin()], dim=-1)[None]
    slow = torch.stack([path[0, (k * 59) // 74] for k in range(75)])[None]
    x_lengths, y_lengths = torch.tensor([60]), torch.tensor([75])
    unrelated = slow.flip(1)
    distance = SoftDTWDistance(gamma=0.01)
    near = distance(path, x_lengths, slow, y_lengths)
    far = distance(path, x_lengths, unrelated, y_lengths)
    assert near < 0.05 * far


def test_si_sdr_loss_equals_the_metric():
    x, lengths = batch([1600, 1200])
    y = x + 0.3 * batch([1600, 1200], seed=3)[0] + 0.2
    loss = SISDRLoss()(y, x, lengths)
    for i, n in enumerate([1600, 1200]):
        expected = si_sdr(x[i, :n].numpy(), y[i, :n].numpy())
        assert -loss[i].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("loss", [SISDRLoss(), L1STFTLoss(), CompressedSpectralLoss()])
def test_signal_losses_do_not_depend_on_padding(loss):
    x, lengths = batch([4000, 2400])
    y, _ = batch([4000, 2400], seed=1)
    y.requires_grad_()
    whole = loss(y, x, lengths)
    alone = loss(y[1:, :2400], x[1:, :2400], lengths[1:])
    torch.testing.assert_close(whole[1:], alone, rtol=1e-5, atol=1e-6)
    whole.sum().backward()
    assert torch.isfinite(y.grad).all() and not y.grad[1, 2400:].any()
    assert loss(x, x, lengths).max() < whole.min()


def spectra(wav, size):
    """NumPy in float64, one utterance and one frame at a time."""
    hop, padded = size // 4, np.pad(wav, size // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    starts = range(0, len(wav) // hop * hop + 1, hop)
    return np.array([np.fft.rfft(window * padded[s : s + size]) for s in starts])


def assert_close_to_plain(loss, plain):
    lengths = [2000, 1777, 600]
    (x, lengths_), (y, _) = batch(lengths), batch(lengths, seed=1)
    pairs = zip(x.double().numpy(), y.double().numpy(), lengths)
    expected = [plain(a[:length], b[:length]) for a, b, length in pairs]
    found = loss(y, x, lengths_)
    torch.testing.assert_close(found.double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_l1_stft_is_that_of_plain_fourier_sums():
    sizes = (400, 600)

    def plain(a, b):
        distances = [abs(abs(spectra(a, size)) - abs(spectra(b, size))).mean() for size in sizes]
        return abs(a - b).mean() + np.mean(distances)

    assert_close_to_plain(L1STFTLoss(sizes), plain)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compressed_spectral_is_that_of_plain_fourier_sums(share):
    def plain(a, b):
        y, x = spectra(a, 256), spectra(b, 256)
        apart = (abs(x) ** 0.5 - abs(y) ** 0.5) ** 2
        directed = abs(
            abs(x) ** 0.5 * np.exp(1j * np.angle(x)) - abs(y) ** 0.5 * np.exp(1j * np.angle(y))
        )
        error = ((1 - share) * apart + share * directed**2).sum() / abs(y).sum()
        return 10 * np.log10(error + 0.01)

    loss = CompressedSpectralLoss(0.5, share, max_snr=20, window_length=256)
    assert_close_to_plain(loss, plain)


@pytest.mark.parametrize(
    ("argument", "value"), [("compression", 0), ("compression", 1.1), ("complex_share", -0.1)]
)
def test_compressed_spectral_refuses_what_makes_no_sense(argument, value):
    with pytest.raises(ValueError, match=argument):
        CompressedSpectralLoss(**{argument: value})


def test_signal_losses_survive_silence():
    clean = torch.zeros(1, 4000)
    for loss in (SISDRLoss(), L1STFTLoss(), CompressedSpectralLoss()):
        y = torch.zeros(1, 4000, requires_grad=True)
        loss(y, clean, torch.tensor([4000])).sum().backward()
        assert torch.isfinite(y.grad).all()


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return Teacher(str(tiny_teacher))


def test_zero_padded_frames_see_the_same_samples(tiny_teacher):
    """What enters the transformer is the same frame by frame, but for the edges.

    There the positional convolution (8 frames to each side) reaches beyond the content.
    """
    teacher = Teacher(str(tiny_teacher), layers=0)
    assert teacher.normalize
    wavs, lengths = batch([16000, 12000])
    waveforms = Waveforms(wavs + 0.1, lengths)
    objective = RepresentationObjective(teacher, MSEDistance())
    x, x_lengths = objective.represent(waveforms, rngs(2), ZeroPadding(0.0))
    y, y_lengths = objective.represent(waveforms, rngs(2), ZeroPadding(0.4))
    assert torch.equal(x_lengths, y_lengths) and torch.equal(x_lengths, teacher.frames(lengths))
    for i, frames in enumerate(x_lengths.tolist()):
        torch.testing.assert_close(x[i, 8 : frames - 8], y[i, 8 : frames - 8])
    assert not torch.allclose(x[0, :8], y[0, :8])


@pytest.mark.parametrize("branch", ["clean", "enhanced"])
@pytest.mark.parametrize(
    ("perturbation", "distance"),
    [
        (None, MSEDistance()),
        (ZeroPadding(0.1), MSEDistance()),
        (SpeedPerturbation(), SoftDTWDistance()),
        (None, SoftDTWDistance()),
        (SpeedPerturbation(), WarpedMSEDistance()),
        (ZeroPadding(0.1), SoftDTWDistance()),
    ],
)
def test_every_strategy_has_a_gradient_and_does_not_depend_on_the_batch(
    teacher, perturbation, distance, branch
):
    objective = RepresentationObjective(teacher, distance, perturbation, branch)
    clean, lengths = batch([8000, 5000])
    enhanced = (clean + 0.1 * batch([8000, 5000], seed=2)[0]).requires_grad_()
    value = objective(enhanced, clean, lengths, rngs(2))
    assert value.shape == (2,) and torch.isfinite(value).all()
    value.sum().backward()
    assert enhanced.grad.abs().sum() > 0 and not enhanced.grad[1, 5000:].any()
    with torch.no_grad():
        alone = objective(enhanced[1:, :5000], clean[1:, :5000], lengths[1:], rngs(2)[1:])
    torch.testing.assert_close(value[1:].detach(), alone, rtol=1e-3, atol=1e-5)


def test_the_perturbed_branch_is_the_one_that_is_named(teacher):
    a, lengths = batch([8000, 5000])
    b = a + 0.1 * batch([8000, 5000], seed=2)[0]

    def value(enhanced, clean, branch):
        objective = RepresentationObjective(teacher, MSEDistance(), ZeroPadding(0.1), branch)
        return objective(enhanced, clean, lengths, rngs(2))

    # An MSE is symmetric: only which of the two is padded tells the branches apart.
    torch.testing.assert_close(value(a, b, "enhanced"), value(b, a, "clean"))
    assert not torch.isclose(value(a, b, "enhanced"), value(a, b, "clean"), rtol=1e-3).any()


def test_bad_objective_arguments(teacher):
    with pytest.raises(ValueError, match="perturbed_branch"):
        RepresentationObjective(teacher, MSEDistance(), perturbed_branch="noisy")
    with pytest.raises(ValueError, match="weights"):
        WeightedSum({"a": SISDRLoss()}, {"b": 1})
    with pytest.raises(ValueError, match="all are zero"):
        WeightedSum({"a": SISDRLoss()}, {"a": 0})


def test_weighted_sum_drops_zero_weights():
    x, lengths = batch([2000])
    y, _ = batch([2000], seed=1)
    total = WeightedSum({"a": SISDRLoss(), "b": L1STFTLoss()}, {"a": 2, "b": 0})
    torch.testing.assert_close(total(y, x, lengths, None), 2 * SISDRLoss()(y, x, lengths))
    assert list(total.terms) == ["a"]


def test_weighted_sum_hands_on_the_draws(teacher):
    objective = RepresentationObjective(teacher, MSEDistance(), ZeroPadding(0.1))
    total = WeightedSum({"a": objective, "b": SISDRLoss()}, {"a": 0.5, "b": 1})
    x, lengths = batch([8000, 5000])
    y, _ = batch([8000, 5000], seed=1)
    expected = 0.5 * objective(y, x, lengths, rngs(2)) + SISDRLoss()(y, x, lengths)
    torch.testing.assert_close(total(y, x, lengths, rngs(2)), expected)


def test_draws_depend_on_all_parts_of_the_key():
    def draw(*key):
        return utterance_rng(*key).integers(1 << 62)

    base = (1, 2, "utt", "noise")
    others = [(2, 2, "utt", "noise"), (1, 3, "utt", "noise"), (1, 2, "utu", "noise"),
              (1, 2, "utt", "crop")]  # fmt: skip
    assert draw(*base) == draw(*base)
    assert len({draw(*base), *(draw(*key) for key in others)}) == 5
