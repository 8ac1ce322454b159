"""The teacher: equal to transformers on one item, exact with padding, clear in its errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    Data2VecAudioConfig,
    HubertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.teacher import Teacher

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embedding_groups": 4,
}
POSITIONS = {"num_conv_pos_embeddings": 16}
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}

CONFIGS = {
    "hubert-group": lambda: HubertConfig(**SHAPE, **POSITIONS, **GROUP),
    "hubert-layer": lambda: HubertConfig(**SHAPE, **POSITIONS, **LAYER),
    "hubert-batchnorm": lambda: HubertConfig(
        **SHAPE, **POSITIONS, **GROUP, conv_pos_batch_norm=True
    ),
    "wavlm-group": lambda: WavLMConfig(**SHAPE, **POSITIONS, **GROUP),
    "wavlm-layer": lambda: WavLMConfig(**SHAPE, **POSITIONS, **LAYER),
    "wav2vec2-group": lambda: Wav2Vec2Config(**SHAPE, **POSITIONS, **GROUP),
    "wav2vec2-layer": lambda: Wav2Vec2Config(**SHAPE, **POSITIONS, **LAYER, conv_bias=True),
    "data2vec": lambda: Data2VecAudioConfig(
        **SHAPE, num_conv_pos_embeddings=3, conv_pos_kernel_size=7
    ),
    "whisper": lambda: WhisperConfig(
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        vocab_size=60,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
}
CONV = [name for name in CONFIGS if name != "whisper"]


def save_random(folder, config):
    """A random checkpoint whose biases, gains and statistics are not the trivial ones."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {name: save_random(root / name, config()) for name, config in CONFIGS.items()}


def batch(lengths=(16000, 9100, 4321), seed=1):
    """Items of unlike level and offset, with garbage where the padding is."""
    rng = np.random.default_rng(seed)
    wavs = 0.1 * rng.standard_normal((len(lengths), max(lengths)))
    wavs *= np.linspace(0.3, 2, len(lengths))[:, None]
    wavs += np.linspace(-0.02, 0.05, len(lengths))[:, None]
    return torch.tensor(wavs, dtype=torch.float32), torch.tensor(lengths)


def relative(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_equals_alone(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    wavs, lengths = batch()
    states, frame_lengths = teacher.hidden_states(wavs, lengths)
    assert states.shape == (4, 3, frame_lengths.max(), 32)
    assert torch.equal(frame_lengths, teacher.frames(lengths))
    for i, (n, f) in enumerate(zip(lengths.tolist(), frame_lengths.tolist())):
        alone, alone_frames = teacher.hidden_states(wavs[i : i + 1, :n], lengths[i : i + 1])
        assert alone_frames.item() == f == alone.shape[2]
        for layer in range(4):
            assert relative(states[layer, i, :f], alone[layer, 0]) < 5e-6
        assert not states[:, i, f:].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_padded_equals_alone(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    wavs, lengths = batch()
    weights = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))

    def gradient(wavs, lengths):
        wavs = wavs.clone().requires_grad_()
        reps, frames = teacher(wavs, lengths)
        loss = sum((r[:f] * weights[:f]).sum() for r, f in zip(reps, frames.tolist()))
        return torch.autograd.grad(loss, wavs)[0]

    together = gradient(wavs, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = gradient(wavs[i : i + 1, :n], lengths[i : i + 1])[0]
        assert alone.abs().max() > 0
        assert relative(together[i, :n], alone) < 1e-4
        assert not together[i, n:].any()


def padded(wavs, lengths, before, after, padding_counts=False):
    """The items with so many hops of zeros around them."""
    before, after = (320 * torch.tensor(hops) for hops in (before, after))
    return Waveforms.of(wavs, lengths).surrounded(before, after, padding_counts)


@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_around_the_content_change_its_position_and_nothing_else(checkpoints, name):
    """Up to the first layer that knows the position; every teacher normalises the waveform."""
    teacher = Teacher(checkpoints[name])
    assert name == "whisper" or teacher.normalize
    wavs, lengths = batch()
    wavs[1] += 0.2  # an offset
    moved = padded(wavs, lengths, (50, 7, 3), (13, 0, 50))
    with torch.no_grad():
        plain, frame_lengths = teacher.hidden_states(wavs, lengths, ["cnn", 0])
        found, found_lengths = teacher.hidden_states(moved, layers=["cnn", 0])
        heard, _ = teacher.hidden_states(replace(moved, padding_counts=True), layers=["cnn"])
    assert torch.equal(frame_lengths, found_lengths) and plain.shape == found.shape
    assert torch.equal(frame_lengths, teacher.frames(lengths))
    assert (plain[0] - found[0]).abs().max() < 1e-5 * plain[0].abs().max()
    for i, n in enumerate(frame_lengths.tolist()):
        assert relative(found[0, i, :n], plain[0, i, :n]) < 1e-5
        assert relative(found[1, i, :n], plain[1, i, :n]) > 1e-3
        # A plain implementation takes statistics over the zeros as well.
        assert relative(heard[0, i, :n], plain[0, i, :n]) > (1e-4 if name == "whisper" else 0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_that_counts_is_part_of_the_utterance(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    wavs, lengths = batch()
    moved = padded(wavs, lengths, (50, 7, 3), (13, 0, 50), padding_counts=True)
    with torch.no_grad():
        found, frame_lengths = teacher.hidden_states(moved)
        whole, _ = teacher.hidden_states(moved.data, moved.lengths)
    for i, (start, n) in enumerate(zip((50, 7, 3), frame_lengths.tolist())):
        assert torch.equal(found[:, i, :n], whole[:, i, start : start + n])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_item_does_not_depend_on_its_batch(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    wavs, lengths = batch()
    weights = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))

    def gradient(rows):
        own = wavs[rows].clone().requires_grad_()
        hops = [[h[i] for i in rows] for h in ((50, 7, 3), (13, 0, 50))]
        reps, frames = teacher(padded(own, lengths[rows], *hops))
        loss = sum((r[:n] * weights[:n]).sum() for r, n in zip(reps, frames.tolist()))
        return reps.detach(), torch.autograd.grad(loss, own)[0]

    together, gradients = gradient([0, 1, 2])
    for i, n in enumerate(lengths.tolist()):
        alone, own = gradient([i])
        frames = int(teacher.frames(lengths)[i])
        assert relative(together[i, :frames], alone[0, :frames]) < 5e-6
        assert relative(gradients[i, :n], own[0, :n]) < 1e-4
        assert not gradients[i, n:].any()


def test_speech_around_the_content_is_heard_and_does_not_change_its_features(checkpoints):
    for name in CONFIGS:
        teacher = Teacher(checkpoints[name])
        wavs, lengths = batch((9920,))
        inside = Waveforms(wavs, lengths, content=(torch.tensor([3200]), torch.tensor([4000])))
        with torch.no_grad():
            found, frames = teacher.hidden_states(inside, layers=["cnn", 0])
            alone, own = teacher.hidden_states(wavs[:, 3200:7200], layers=["cnn", 0])
        assert torch.equal(frames, own)
        assert relative(found[0], alone[0]) < 1e-5
        assert relative(found[1], alone[1]) > 1e-2


def test_content_off_the_frame_grid_is_refused(checkpoints):
    teacher = Teacher(checkpoints["hubert-group"])
    wavs, lengths = batch((9920,))
    inside = Waveforms(wavs, lengths, content=(torch.tensor([100]), torch.tensor([4000])))
    with pytest.raises(ValueError, match="whole hops of 320 samples"):
        teacher(inside)


@pytest.mark.parametrize("name", ["hubert-group", "whisper"])
def test_the_features_before_any_position_are_a_layer(checkpoints, name):
    wavs, lengths = batch()
    teacher = Teacher(checkpoints[name], layers="cnn")
    assert teacher.layer_names == ("cnn", 0, 1, 2, 3)
    reps, frame_lengths = teacher(wavs, lengths)
    assert reps.shape == (3, frame_lengths.max(), 32)
    encoder = teacher.encoder
    if name == "whisper":
        mel = teacher._mel(wavs[:1], teacher.max_length)
        x = torch.nn.functional.gelu(encoder.conv1(mel))
        x = torch.nn.functional.gelu(encoder.conv2(x))[..., : frame_lengths[0]].transpose(1, 2)
        entered = x + encoder.embed_positions.weight[: x.shape[1]]
    else:
        x = wavs[:1] - wavs[:1].mean()
        x = encoder.feature_extractor(x / (x.var(correction=0) + 1e-7).sqrt()).transpose(1, 2)
        x = encoder.feature_projection(x)
        entered = encoder.encoder.layer_norm(x + encoder.encoder.pos_conv_embed(x))
    assert relative(reps[:1], x) < 1e-5
    assert relative(Teacher(checkpoints[name], layers=0)(wavs[:1])[0], entered) < 1e-5
    mixed, _ = Teacher(checkpoints[name], layers=["cnn", -1])(wavs, lengths)
    last, _ = Teacher(checkpoints[name])(wavs, lengths)
    assert torch.allclose(mixed, (reps + last) / 2, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CONV)
def test_equals_transformers_on_one_item(checkpoints, name, normalize, tmp_path):
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    folder = save_random(tmp_path, CONFIGS[name]())
    extractor.save_pretrained(folder)
    teacher = Teacher(folder)
    wavs, lengths = batch((8000,))
    values = extractor(wavs[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        plain = AutoModel.from_pretrained(folder).eval()(values, output_hidden_states=True)
        states, frames = teacher.hidden_states(wavs, lengths)
    assert states.shape[2] == frames.item() == plain.last_hidden_state.shape[1]
    for layer in range(3):
        assert relative(states[layer], plain.hidden_states[layer]) < 1e-5
    assert relative(states[3], plain.last_hidden_state) < 1e-5


def test_whisper_equals_transformers_on_30_s(checkpoints):
    rng = np.random.default_rng(3)
    wavs = 0.1 * rng.standard_normal((1, 480000)).astype(np.float32)
    wavs[:, 200000:350000] *= 1e-6  # under the dynamic range: the clamp works
    extractor = WhisperFeatureExtractor()
    features = extractor(wavs[0], sampling_rate=16000, return_tensors="pt").input_features
    teacher = Teacher(checkpoints["whisper"])
    lengths = torch.tensor([480000])
    mel = teacher._mel(torch.from_numpy(wavs), teacher.max_length)
    assert mel.shape == features.shape
    assert (mel - features).abs().max() < 1e-4
    with torch.no_grad():
        plain = (
            AutoModel.from_pretrained(checkpoints["whisper"])
            .get_encoder()
            .eval()(features, output_hidden_states=True)
        )
        states, frames = teacher.hidden_states(torch.from_numpy(wavs), lengths)
    assert frames.item() == 1500
    for layer in range(4):
        assert relative(states[layer], plain.hidden_states[layer]) < 1e-4


def test_whisper_mel_of_a_short_item_is_that_of_30_s(checkpoints):
    wavs, lengths = batch((8050,))
    extractor = WhisperFeatureExtractor()
    features = extractor(wavs[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
    teacher = Teacher(checkpoints["whisper"])
    mel = teacher._mel(wavs, teacher.max_length)
    assert mel.shape[-1] >= 2 * teacher.frames(lengths).item() + 1
    assert (mel - features[..., : mel.shape[-1]]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["hubert-layer", "whisper"])
def test_layers(checkpoints, name):
    wavs, lengths = batch()
    states, _ = Teacher(checkpoints[name]).hidden_states(wavs, lengths)
    for layer, index in [(0, 0), (2, 2), (3, 3), (-1, 3), (-4, 0)]:
        reps, _ = Teacher(checkpoints[name], layers=layer)(wavs, lengths)
        assert torch.allclose(reps, states[index], atol=1e-6)
    mean, _ = Teacher(checkpoints[name], layers=[0, -2])(wavs, lengths)
    assert torch.allclose(mean, (states[0] + states[2]) / 2, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_geometry(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    assert (teacher.hop, teacher.num_layers, teacher.dim) == (320, 3, 32)
    assert teacher.receptive_field == (1040 if name == "whisper" else 400)
    wavs, lengths = batch((teacher.receptive_field,))
    reps, frames = teacher(wavs, lengths)
    assert reps.shape[1] == frames.item() == teacher.frames(lengths).item() >= 1


def test_frozen_hidden_and_always_eval(checkpoints):
    teacher = Teacher(checkpoints["hubert-group"])
    owner = torch.nn.ModuleDict({"teacher": teacher, "other": torch.nn.Linear(2, 2)})
    owner.train()
    assert not teacher.encoder.training
    assert not any(m.training for m in teacher.encoder.modules())
    assert not any(p.requires_grad for p in teacher.encoder.parameters())
    assert list(owner.state_dict()) == ["other.weight", "other.bias"]
    assert len(list(owner.parameters())) == 2
    owner.double()
    assert all(p.dtype == torch.float64 for p in teacher.encoder.parameters())
    wavs, lengths = batch()
    assert torch.equal(*(Teacher(checkpoints["whisper"]).train()(wavs, lengths)[0] for _ in "ab"))


def test_half_precision_weights_are_used_in_float32(checkpoints, tmp_path):
    AutoModel.from_pretrained(checkpoints["whisper"]).half().save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in teacher.encoder.parameters())
    wavs, lengths = batch()
    full, _ = Teacher(checkpoints["whisper"])(wavs, lengths)
    half, _ = teacher(wavs, lengths)
    assert half.dtype == torch.float32
    assert relative(half, full) < 5e-3


@pytest.mark.parametrize("name", ["hubert-group", "wavlm-layer", "data2vec", "whisper"])
def test_autocast(checkpoints, name):
    teacher = Teacher(checkpoints[name])
    wavs, lengths = batch()
    wavs.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reps, _ = teacher(wavs, lengths)
    assert reps.dtype == torch.float32
    assert relative(reps, teacher(wavs, lengths)[0]) < 0.1
    reps.square().sum().backward()
    assert wavs.grad.isfinite().all()


@pytest.mark.parametrize("silent", ["all", "head", "gap"])
@pytest.mark.parametrize("name", CONFIGS)
def test_silence_does_not_explode(tmp_path, name, silent):
    # Freshly initialised: with zero biases nothing but the guard bounds the layer norms' gain.
    AutoModel.from_config(CONFIGS[name]()).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    wavs, lengths = batch((12000, 9000))
    part = {"all": slice(0, 12000), "head": slice(0, 6000), "gap": slice(3000, 6001)}[silent]
    wavs = wavs - wavs.mean(1, keepdim=True)
    wavs[:, part] = 0
    if silent != "all":
        wavs[:, part.stop :] -= wavs[:, part.stop :].mean(1, keepdim=True)
    wavs.requires_grad_()
    reps, _ = teacher(wavs, lengths)
    target, _ = teacher(batch((12000, 9000), seed=5)[0], lengths)
    (reps - target).square().mean().backward()
    assert reps.isfinite().all() and wavs.grad.isfinite().all()
    assert wavs.grad.abs().max() < 1e3
    if silent != "all":
        assert wavs.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, "has 3 layers, asked for layer 7"),
        (-5, "asked for layer -5"),
        ([], "list of integers"),
        ("conv", "'cnn'"),
    ],
)
def test_bad_layers(checkpoints, layers, message):
    with pytest.raises(UserError, match=message):
        Teacher(checkpoints["hubert-group"], layers=layers)


def test_bad_folders(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        Teacher(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        Teacher(str(tmp_path / "nowhere"))
    HubertConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        Teacher(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="damaged"):
        Teacher(str(tmp_path))
    deeper = Wav2Vec2Config(**{**SHAPE, "num_hidden_layers": 4}, **POSITIONS, **GROUP)
    wider = Wav2Vec2Config(**{**SHAPE, "intermediate_size": 50}, **POSITIONS, **GROUP)
    AutoModel.from_config(CONFIGS["wav2vec2-group"]()).save_pretrained(tmp_path)
    for other in (deeper, wider):
        other.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="do not fit its config"):
            Teacher(str(tmp_path))
    tiny = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    AutoModel.from_config(tiny).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'bert' model; supported: hubert"):
        Teacher(str(tmp_path))


def test_wrong_sampling_rate(checkpoints, tmp_path):
    save_random(tmp_path, CONFIGS["hubert-group"]())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(UserError, match="8000 Hz"):
        Teacher(str(tmp_path))


def test_hub_name_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"some/model.*network"):
        Teacher("some/model", cache_dir=str(tmp_path))


def test_bad_lengths(checkpoints):
    teacher = Teacher(checkpoints["hubert-group"])
    wavs, lengths = batch((4000, 399))
    with pytest.raises(UserError, match=r"399 samples.*400 samples"):
        teacher(wavs, lengths)
    with pytest.raises(ValueError, match="whole numbers"):
        teacher(wavs, torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="exceeds the 4000"):
        teacher(wavs, torch.tensor([4000, 4001]))
    with pytest.raises(ValueError, match="B, T"):
        teacher(wavs[0], lengths)
    whisper = Teacher(checkpoints["whisper"])
    with pytest.raises(UserError, match=r"30\.0 s.*can take, 480000"):
        whisper(torch.zeros(1, 480320), torch.tensor([480320]))
