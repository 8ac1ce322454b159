"""Demucs against the class it is to equal, in batches, in windows, and its checkpoints."""

import pytest
import soundfile
import torch

from pi_finetune.enhancers import Demucs, load_denoiser_checkpoint, load_weights
from pi_finetune.enhancers.demucs import Stream, deviation, downsample, half_sample_filter, upsample
from pi_finetune.errors import UserError
from pi_finetune.inference import Enhancer

SMALL = {"hidden": 4, "depth": 3}
CONFIGURATIONS = {
    "published shape, narrow": {"hidden": 6},
    "no internal rate": {"hidden": 4, "depth": 2, "resample": 1},
    "twice the rate": {"hidden": 4, "depth": 3, "resample": 2},
    "bounded channels": {"hidden": 4, "depth": 4, "max_hidden": 10},
    "odd kernel": {"hidden": 4, "depth": 2, "kernel_size": 7, "stride": 3},
}


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def original(**arguments):
    return pytest.importorskip(
        "denoiser.demucs", reason="the package denoiser is not installed"
    ).Demucs(**arguments)


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_equals_the_original(arguments):
    torch.manual_seed(0)
    theirs, ours = original(**arguments).eval(), Demucs(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    lengths = [5003, 1234, 257, 3001]
    wavs = noise(len(lengths), max(lengths))
    wavs[1, lengths[1] :] = torch.nan  # padding
    with torch.no_grad():
        batch = ours(wavs, torch.tensor(lengths))
        for row, wav, length in zip(batch, wavs, lengths):
            expected = theirs(wav[None, None, :length])[0, 0]
            torch.testing.assert_close(
                row[:length], expected, rtol=0, atol=1e-5 * expected.abs().max()
            )
            assert not row[length:].any()


def test_gradients_equal_the_originals():
    torch.manual_seed(0)
    theirs, ours = original(**SMALL), Demucs(**SMALL)
    ours.load_state_dict(theirs.state_dict())
    target = noise(2, 3000, seed=1)
    wavs = [noise(2, 3000).requires_grad_() for _ in range(2)]
    (theirs(wavs[0][:, None])[:, 0] - target).square().sum().backward()
    (ours(wavs[1]) - target).square().sum().backward()
    torch.testing.assert_close(wavs[0].grad, wavs[1].grad, rtol=1e-4, atol=1e-5)
    for expected, parameter in zip(theirs.parameters(), ours.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000, 16000, 123457])
def test_valid_length_is_the_originals(length):
    assert Demucs(**SMALL).valid_length(length) == original(**SMALL).valid_length(length)


def test_demucs_64_has_the_published_size():
    with torch.device("meta"):
        model = Demucs(rescale=0)
    assert sum(p.numel() for p in model.parameters()) == 33_533_569


def test_resampling_keeps_a_tone():
    time = torch.arange(4000) / 16000
    tone = torch.sin(2 * torch.pi * 1000 * time)[None, None]
    kernel = half_sample_filter()
    double = upsample(tone, kernel)
    exact = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 32000)
    middle = slice(200, -200)
    torch.testing.assert_close(double[0, 0, middle], exact[middle], rtol=0, atol=1e-3)
    again = downsample(double, kernel)
    torch.testing.assert_close(again[..., middle], tone[..., middle], rtol=0, atol=1e-3)


def test_silence_stays_silence_and_has_a_gradient():
    wavs = torch.zeros(2, 3000, requires_grad=True)
    model = Demucs(**SMALL)
    enhanced = model(wavs, torch.tensor([3000, 1]))
    enhanced.sum().backward()
    assert not enhanced.any() and wavs.grad.isfinite().all()


@pytest.mark.parametrize("window", [6144, 20480])
def test_windows_equal_the_whole(window):
    torch.manual_seed(0)
    model = Demucs(hidden=4, depth=5).eval()
    wavs = noise(2, 50_001)
    wavs[:, 20_000:] *= 3  # the scale is that of the recording, not of a window
    lengths = torch.full((2,), wavs.shape[1])
    margin = -(-3 * model.reach // model.grid) * model.grid
    assert 2 * margin < window
    pieces, start = [], 0
    stream = Stream(deviation(wavs, lengths))
    with torch.no_grad():
        while start < wavs.shape[1]:
            origin, end = max(0, start - margin), start + window
            piece, stream = model.enhance_window(
                wavs[:, origin : end + margin], origin, stream, end - 2 * model.reach
            )
            pieces.append(piece[:, start - origin : end - origin])
            start = end
        whole = model(wavs)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5 * whole.std())


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
@pytest.mark.parametrize("seconds", [1, 5, 6.5, 9.3])
def test_a_recording_in_chunks_equals_the_whole(rate, seconds):
    """6.5 s end where a fade does."""
    torch.manual_seed(0)
    model = Demucs(hidden=4, depth=5)
    wavs = noise(5, int(seconds * rate))  # five channels: two groups
    wavs[1] *= 3
    wavs[:, : rate // 2] *= 0.1
    whole = Enhancer(model, chunk_seconds=30, device="cpu").enhance(wavs, rate)
    chunks = Enhancer(model, chunk_seconds=2, device="cpu").enhance(wavs, rate)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=2e-5 * whole.std().item())
    if rate == 16000:
        with torch.no_grad():
            exact = model(wavs)
        torch.testing.assert_close(whole, exact, rtol=0, atol=2e-5 * exact.std().item())


def test_a_file_in_chunks_equals_the_whole(tmp_path):
    torch.manual_seed(0)
    model = Demucs(hidden=4, depth=5)
    wav = noise(16000 * 7)
    soundfile.write(tmp_path / "in.wav", wav.numpy(), 16000, subtype="FLOAT")
    Enhancer(model, chunk_seconds=2, device="cpu").enhance_file(
        tmp_path / "in.wav", tmp_path / "out.wav"
    )
    found = torch.from_numpy(soundfile.read(tmp_path / "out.wav", dtype="float32")[0])
    with torch.no_grad():
        exact = model(wav[None])[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-5 * exact.std().item())


def test_a_window_off_the_grid_is_refused():
    with pytest.raises(ValueError, match="origin must be a multiple of 16"):
        Demucs(**SMALL).enhance_window(noise(1, 5000), 17, Stream(torch.ones(1, 1)), 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"resample": 3}, "resample: got 3"), ({"stride": 9}, "stride 9"), ({"depth": 0}, "depth 0")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Demucs(**arguments)


def test_checkpoints(tmp_path):
    torch.manual_seed(0)
    model = Demucs(hidden=4, depth=5)
    path = tmp_path / "a checkpoint.th"
    torch.save(model.state_dict(), path)
    loaded = load_denoiser_checkpoint(path)
    assert loaded.config["arguments"]["hidden"] == 4 and not loaded.training
    wavs = noise(1, 2000)
    assert torch.equal(loaded(wavs), model.eval()(wavs))
    other = Demucs(hidden=4, depth=5)
    load_weights(other, path)
    assert torch.equal(other.eval()(wavs), model(wavs))
    torch.save({"best_state": model.state_dict(), "epoch": torch.tensor(3)}, path)
    assert torch.equal(load_denoiser_checkpoint(path)(wavs), model(wavs))


def test_bad_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint nowhere.th.*dns48, dns64, master64"):
        load_denoiser_checkpoint("nowhere.th")
    path = tmp_path / "x.th"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        load_denoiser_checkpoint(path)
    torch.save({"layer.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="no checkpoint of the causal Demucs"):
        load_denoiser_checkpoint(path)
    torch.save({"weights": [1, 2]}, path)
    with pytest.raises(UserError, match="no state dict"):
        load_denoiser_checkpoint(path)
    torch.save({"cls": Demucs}, path)  # code is not run
    with pytest.raises(UserError, match="cannot be read"):
        load_denoiser_checkpoint(path)
    torch.save(Demucs(hidden=4).state_dict(), path)
    with pytest.raises(UserError, match="do not fit Demucs"):
        load_weights(Demucs(hidden=6), path)
