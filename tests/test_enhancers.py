"""Contracts that every enhancer keeps, and saving and loading."""

import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file, save_file
from speechbrain.lobes.models import conv_tasnet
from speechbrain.nnet.CNN import Conv1d

from pi_finetune import config, enhancers
from pi_finetune.enhancers import (
    ConvTasNet,
    DelayedMaskEnhancer,
    Demucs,
    MaskEnhancer,
    SpeechBrainEnhancer,
    UNetEnhancer,
    load_enhancer,
    load_weights,
    save_enhancer,
)
from pi_finetune.errors import UserError

HPARAMS = Path(__file__).parent.parent / "hparams"


def small_mask():
    return MaskEnhancer(channels=[4, 8], dim=24, dilations=[1, 2, 4], level_frames=20)


def small_conv_tasnet(norm="gLN"):
    return ConvTasNet(
        filters=16, kernel=16, bottleneck=8, hidden=16, blocks=3, repeats=1, norm=norm
    )


def small_unet(causal=False):
    return UNetEnhancer(channels=6, depth=3, causal=causal)


OWN = {
    "mask": small_mask,
    "conv_tasnet": small_conv_tasnet,
    "conv_tasnet_cln": lambda: small_conv_tasnet("cLN"),
    "demucs": lambda: Demucs(hidden=4, depth=3, floor=1e-8),
    "unet": small_unet,
    "unet_causal": lambda: small_unet(causal=True),
}

# Hyperparameter files as SpeechBrain's hub models have them, with smaller networks.
SPECTRAL_YAML = """
sample_rate: 16000
compute_stft: !new:speechbrain.processing.features.STFT
    sample_rate: 16000
    win_length: 32
    hop_length: 16
    n_fft: 512
    window_fn: !name:torch.hamming_window
compute_istft: !new:speechbrain.processing.features.ISTFT
    sample_rate: 16000
    win_length: 32
    hop_length: 16
    window_fn: !name:torch.hamming_window
spectral_magnitude: !name:speechbrain.processing.features.spectral_magnitude
    power: 0.5
resynth: !name:speechbrain.processing.signal_processing.resynthesize
    stft: !ref <compute_stft>
    istft: !ref <compute_istft>
enhance_model: !new:speechbrain.lobes.models.MetricGAN.EnhancementGenerator
modules:
    enhance_model: !ref <enhance_model>
"""
WAVEFORM_YAML = """
enhance_model: !new:speechbrain.lobes.models.EnhanceResnet.EnhanceResnet
    channel_counts: [4, 4]
    dense_count: 1
    dense_nodes: 16
modules:
    enhance_model: !ref <enhance_model>
"""
SEPARATION_YAML = """
sample_rate: 8000
num_spks: 1
encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: 8
block: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: 1
    d_model: 8
    nhead: 2
    d_ffn: 16
    norm_before: True
masknet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: 1
    in_channels: 8
    out_channels: 8
    num_layers: 1
    K: 50
    intra_model: !copy <block>
    inter_model: !copy <block>
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: 8
    out_channels: 1
    kernel_size: 16
    stride: 8
    bias: False
modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>
"""
SPEECHBRAIN = {"spectral": SPECTRAL_YAML, "waveform": WAVEFORM_YAML, "separation": SEPARATION_YAML}


def write_speechbrain_model(folder, text):
    """Write a folder in SpeechBrain's pretrained format, weights included; return the modules."""
    torch.manual_seed(0)
    modules = load_hyperpyyaml(text)["modules"]
    names = ", ".join(f"{name}: !ref <{name}>" for name in modules)
    text += (
        "pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer\n"
        f"    loadables: {{{names}}}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.yaml").write_text(text)
    for name, module in modules.items():
        torch.save(module.state_dict(), folder / f"{name}.ckpt")
    return modules


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for threads: waiting for them costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def speechbrain_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speechbrain")
    for name, text in SPEECHBRAIN.items():
        write_speechbrain_model(folder / name, text)
    return folder


def build(name, seed=0):
    """A small enhancer whose weights are far from initialisation, so that leaks show."""
    torch.manual_seed(seed)
    model = OWN[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=[*OWN, *SPEECHBRAIN])
def any_model(request, speechbrain_models):
    if request.param in OWN:
        return build(request.param)
    return SpeechBrainEnhancer(speechbrain_models / request.param).eval()


@pytest.fixture(scope="module", params=OWN)
def model(request):
    return build(request.param)


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def test_batch_composition_changes_nothing(any_model):
    lengths = torch.tensor([9000, 4801, 255, 8191, 8192])
    wavs = noise(5, 9300)
    wavs[:, 9000:] = float("nan")  # padding may hold anything
    wavs[1, 4801:] = 5.0
    with torch.no_grad():
        together = any_model(wavs, lengths)
        assert together.shape == wavs.shape
        for i, length in enumerate(lengths.tolist()):
            alone = any_model(wavs[i : i + 1, :length], lengths[i : i + 1])[0]
            assert alone.abs().max() > 1e-4
            assert relative(together[i, :length], alone) < 1e-5
            assert (together[i, length:] == 0).all()


def test_no_gradient_from_or_to_padding(any_model):
    wavs = noise(2, 6000).requires_grad_()
    any_model(wavs, torch.tensor([6000, 3500]))[1].square().sum().backward()
    assert (wavs.grad[1, 3500:] == 0).all() and (wavs.grad[0] == 0).all()
    assert wavs.grad[1, :3500].abs().min() >= 0 and wavs.grad[1, :3500].abs().sum() > 0


@pytest.mark.parametrize("length", [1, 2, 17, 255, 256, 257, 511, 4000, 16001])
def test_any_length(any_model, length):
    with torch.no_grad():
        out = any_model(noise(1, length), torch.tensor([length]))
    assert out.shape == (1, length) and out.isfinite().all()


def test_zero_length_item_and_silence(any_model):
    wavs = noise(3, 5000)
    wavs[1] = 0
    wavs.requires_grad_()
    out = any_model(wavs, torch.tensor([5000, 5000, 0]))
    assert (out[2] == 0).all() and out.isfinite().all()
    out.square().sum().backward()
    assert wavs.grad.isfinite().all()
    for name, parameter in any_model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert (any_model(wavs, torch.tensor([0, 0, 0])) == 0).all()


def test_every_parameter_learns(model):
    model.train()
    out = model(noise(2, 8000), torch.tensor([8000, 7000]))
    (out - noise(2, 8000, seed=2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", OWN)
def test_a_few_steps_lower_the_error(name):
    torch.manual_seed(0)
    model = OWN[name]().train()
    time = torch.arange(4000) / 16000
    clean = 0.3 * torch.sin(2 * torch.pi * torch.tensor([[300.0], [700.0]]) * time)
    noisy, lengths = clean + noise(2, 4000), torch.tensor([4000, 3000])
    losses = []
    for _ in range(30):
        loss = (model(noisy, lengths) - clean)[:, :3000].square().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1e-2 * parameter.grad.sign())
    assert losses[-1] < 0.6 * losses[0]


def test_output_scales_with_input(model):
    wavs, lengths = noise(2, 6000), torch.tensor([6000, 4000])
    with torch.no_grad():
        out = model(wavs, lengths)
        for factor in (0.01, 3.0):
            assert relative(model(factor * wavs, lengths), factor * out) < 1e-3


def test_half_precision(model):
    wavs, lengths = noise(2, 6000), torch.tensor([6000, 4000])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(wavs, lengths)
    assert out.dtype == torch.float32
    with torch.no_grad():
        expected = model(wavs, lengths)
    assert (out - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("wavs", "lengths", "message"),
    [
        (torch.zeros(4), None, r"float \[B, T\], got torch.float32 \[4\]"),
        (torch.zeros(1, 4, dtype=torch.int16), None, r"float \[B, T\], got torch.int16"),
        (torch.zeros(2, 4), torch.tensor([1.0, 0.5]), "not relative"),
        (torch.zeros(2, 4), torch.tensor([4]), "must be 2, one for each item; got 1"),
        (torch.zeros(2, 4), torch.tensor([5, 1]), "length of 5 exceeds the 4 samples"),
    ],
)
def test_misuse(wavs, lengths, message):
    with pytest.raises(ValueError, match=message):
        small_mask()(wavs, lengths)


class TestMask:
    def test_default_size_and_yaml(self):
        model = MaskEnhancer()
        assert 5e5 < sum(p.numel() for p in model.parameters()) < 8e5
        text = f"width: 64\nenhancer: !include:{quote(str(HPARAMS))}/enhancers/mask.yaml\n"
        assert load_hyperpyyaml(text)["enhancer"].config == model.config
        changed = load_hyperpyyaml(text + "    dim: !ref <width>\n")["enhancer"].config
        assert changed["arguments"] == {**model.config["arguments"], "dim": 64}

    def test_starts_as_identity_and_keeps_the_gain_bound(self):
        torch.manual_seed(0)
        model = MaskEnhancer()
        wavs, lengths = noise(1, 16000), torch.tensor([16000])
        with torch.no_grad():
            assert relative(model(wavs, lengths), wavs) < 0.05
            model.mask.conv.bias.copy_(torch.tensor([50.0, 0.0]))
            assert relative(model(wavs, lengths), 2 * wavs) < 1e-3

    def test_reach_is_as_stated(self):
        model = build("mask")
        wavs = noise(1, 40000).requires_grad_()
        centre = 20000
        model(wavs)[0, centre].backward()
        touched = wavs.grad[0].nonzero()[:, 0]
        assert centre - model.context <= touched.min() < centre - 2000
        assert centre + 2000 < touched.max() <= centre + model.context

    @pytest.mark.parametrize(
        "arguments", [{"n_fft": 500}, {"hop": 300}, {"hop": 0}, {"max_gain": 1.0}, {"n_fft": 8}]
    )
    def test_impossible_arguments(self, arguments):
        with pytest.raises(ValueError, match="must be"):
            MaskEnhancer(**arguments)


class TestDelayedMask:
    def test_is_the_mask_network_late_by_a_constant_of_each_utterance(self, tmp_path):
        plain = build("mask")
        save_enhancer(tmp_path, plain)
        arguments = plain.config["arguments"]
        late = load_weights(DelayedMaskEnhancer(0.05, **arguments), tmp_path).train()
        wavs, lengths = noise(40, 3000), torch.tensor([3000] * 39 + [2000])
        torch.manual_seed(0)
        with torch.no_grad():
            expected, found = plain(wavs, lengths), late(wavs, lengths)
            again = late(wavs, lengths)
        delays = [int(row.nonzero()[0]) for row in found]
        for row, other, delay, length in zip(found, expected, delays, lengths.tolist()):
            assert torch.equal(row[delay:length], other[: length - delay])
            assert (row[length:] == 0).all()
        assert max(delays) <= 800 and max(delays) - min(delays) > 600 and len(set(delays)) > 30
        assert not torch.equal(again, found)
        with torch.no_grad():
            assert torch.equal(late.eval()(wavs, lengths), expected)

    def test_is_saved_and_loaded(self, tmp_path):
        model = DelayedMaskEnhancer(0.1, channels=[4], dim=8, dilations=[1])
        save_enhancer(tmp_path, model)
        loaded = load_enhancer(tmp_path)
        assert type(loaded) is DelayedMaskEnhancer and loaded.max_delay == 1600
        assert loaded.config == model.config

    def test_negative_delay(self):
        with pytest.raises(ValueError, match="max_delay_seconds must be at least 0"):
            DelayedMaskEnhancer(-0.1)


class TestUNet:
    def test_default_size_and_yaml(self):
        text = f"enhancer: !include:{quote(str(HPARAMS))}/enhancers/unet.yaml\n"
        model = load_hyperpyyaml(text)["enhancer"]
        assert model.config == UNetEnhancer().config
        assert sum(p.numel() for p in model.parameters()) < 2e6

    def test_one_layer_against_the_formula(self):
        """Encoder, LSTM and decoder of one level, written out for a length of whole strides."""
        model = UNetEnhancer(channels=5, depth=1, causal=True).eval()
        wavs = noise(2, 4 * 30 + 8)
        level = wavs.square().mean(1, keepdim=True).sqrt()
        (encode,), ((before, up, _),) = model.encoder, model.decoder
        with torch.no_grad():
            skip = encode((wavs / level)[:, None])
            middle = model.lstm.rnn(skip.transpose(1, 2))[0].transpose(1, 2)
            expected = up(before(middle + skip))[:, 0] * level
            assert relative(model(wavs), expected) < 1e-5

    @pytest.mark.parametrize("arguments", [{"stride": 9}, {"stride": 0}, {"depth": 0}])
    def test_impossible_arguments(self, arguments):
        with pytest.raises(ValueError, match="stride <= kernel"):
            UNetEnhancer(**arguments)


class TestConvTasNet:
    def test_yaml(self):
        text = f"enhancer: !include:{quote(str(HPARAMS))}/enhancers/conv_tasnet.yaml\n"
        assert load_hyperpyyaml(text)["enhancer"].config == ConvTasNet().config

    @pytest.mark.parametrize("norm", ["gLN", "cLN"])
    def test_is_speechbrain_s_network(self, norm):
        """On an unpadded input it equals the parts, run as they are with zero padding."""
        ours = small_conv_tasnet(norm).eval()
        encoder = conv_tasnet.Encoder(16, 16)
        masknet = conv_tasnet.MaskNet(16, 8, 16, 3, 3, 1, C=1, norm_type=norm)
        decoder = conv_tasnet.Decoder(16, 16)
        for part, name in ((encoder, "encoder"), (masknet, "masknet"), (decoder, "decoder")):
            part.load_state_dict(getattr(ours, name).state_dict())
            for module in part.modules():
                if isinstance(module, Conv1d):
                    module.padding_mode = "constant"
        wavs = noise(2, 8 * 100)
        wavs = wavs / wavs.square().mean(1, keepdim=True).sqrt()
        with torch.no_grad():
            mixture = encoder(wavs)
            mask = masknet(mixture.transpose(1, 2)).permute(1, 3, 0, 2)
            expected = decoder(mixture, mask)[:, 8:-8, 0]
            assert relative(ours(wavs), expected) < 1e-5

    @pytest.mark.parametrize("arguments", [{"norm": "BN"}, {"kernel": 15}, {"block_kernel": 4}])
    def test_impossible_arguments(self, arguments):
        with pytest.raises(ValueError, match="must be"):
            ConvTasNet(**arguments)


class TestSpeechBrain:
    @pytest.mark.parametrize("kind", SPEECHBRAIN)
    def test_weights_are_the_source_s_and_train(self, kind, speechbrain_models):
        model = SpeechBrainEnhancer(speechbrain_models / kind)
        assert model.training and all(p.requires_grad for p in model.parameters())
        for name, module in model.interface.mods.items():
            saved = torch.load(speechbrain_models / kind / f"{name}.ckpt")
            assert saved.keys() == module.state_dict().keys()
            assert all(torch.equal(saved[k], v) for k, v in module.state_dict().items())
        wavs, lengths = noise(2, 6000), torch.tensor([6000, 5000])
        wavs.requires_grad_()
        model(wavs, lengths).square().sum().backward()
        assert wavs.grad[1, :5000].abs().sum() > 0
        learning = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
        assert len(learning) > 0.8 * len(list(model.parameters()))

    def test_not_peak_normalised(self, speechbrain_models):
        model = SpeechBrainEnhancer(speechbrain_models / "spectral").eval()
        with torch.no_grad():
            assert 0 < model(noise(1, 8000) / 100).abs().max() < 0.02

    def test_incomplete_last_frame_is_kept(self, speechbrain_models):
        """EnhanceResnet alone returns 15872 of 16000 samples."""
        model = SpeechBrainEnhancer(speechbrain_models / "waveform").eval()
        with torch.no_grad():
            assert model(noise(1, 16000))[0, 15880:].abs().max() > 1e-4

    def test_other_rates_are_resampled(self, speechbrain_models):
        model = SpeechBrainEnhancer(speechbrain_models / "separation").eval()
        assert model.rate == 8000
        with torch.no_grad():
            spectrum = torch.fft.rfft(model(noise(1, 16000))).abs()[0]
        assert spectrum[4500:].max() < 0.01 * spectrum[:4000].max()

    def test_loading_needs_trust(self, speechbrain_models, tmp_path):
        save_enhancer(tmp_path, SpeechBrainEnhancer(speechbrain_models / "waveform"))
        with pytest.raises(UserError, match="Pass trust=True"):
            load_enhancer(tmp_path)

    def test_tuned_model_needs_no_source(self, tmp_path):
        write_speechbrain_model(tmp_path / "source", WAVEFORM_YAML)
        model = SpeechBrainEnhancer(tmp_path / "source").eval()
        with torch.no_grad():
            next(model.parameters()).add_(0.5)
        save_enhancer(tmp_path / "run", model)
        shutil.rmtree(tmp_path / "source")
        with torch.no_grad():
            expected = model(noise(1, 4000))
            assert torch.equal(
                load_enhancer(tmp_path / "run", trust=True)(noise(1, 4000)), expected
            )

    def test_yaml_block(self, speechbrain_models):
        text = (
            f"enhancer: !include:{quote(str(HPARAMS))}/enhancers/speechbrain_pretrained.yaml\n"
            f"    source: {speechbrain_models}/waveform\n"
        )
        assert isinstance(config.build(load_hyperpyyaml(text)["enhancer"]), SpeechBrainEnhancer)

    def test_hub_name_without_network(self, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("We couldn't connect to the hub")

        monkeypatch.setattr(enhancers.speechbrain, "fetch", offline)
        with pytest.raises(UserError, match=r"some/model.*connect to the hub.*local folder"):
            SpeechBrainEnhancer("some/model")

    @pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "./a/b", "~/x"])
    def test_no_such_folder(self, source):
        with pytest.raises(UserError, match="There is no folder"):
            SpeechBrainEnhancer(source)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("modules: {}", "its modules are none"),
            (SEPARATION_YAML.replace("num_spks: 1", "num_spks: 2", 1), "separates 2 speakers"),
            ("modules: !new:no.such.Class", "Cannot load the SpeechBrain model"),
        ],
    )
    def test_no_enhancement_model(self, text, message, tmp_path):
        (tmp_path / "hyperparams.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            SpeechBrainEnhancer(tmp_path)

    def test_missing_weights(self, tmp_path):
        write_speechbrain_model(tmp_path, WAVEFORM_YAML)
        (tmp_path / "enhance_model.ckpt").unlink()
        with pytest.raises(UserError, match="Cannot load the SpeechBrain model"):
            SpeechBrainEnhancer(tmp_path)


def test_save_and_load(any_model, tmp_path):
    folder = tmp_path / "deep" / "run"
    save_enhancer(folder, any_model)
    extra = ["speechbrain.yaml"] if isinstance(any_model, SpeechBrainEnhancer) else []
    names = ["enhancer.safetensors", "enhancer.yaml", *extra]
    assert sorted(path.name for path in folder.iterdir()) == names
    again = load_enhancer(folder, trust=bool(extra))
    assert not again.training and again.config == any_model.config
    wavs, lengths = noise(2, 4000), torch.tensor([4000, 3000])
    with torch.no_grad():
        assert torch.equal(again(wavs, lengths), any_model(wavs, lengths))
    save_enhancer(folder, again)  # over the old one


def test_a_module_without_config(tmp_path):
    with pytest.raises(UserError, match="Identity cannot be saved"):
        save_enhancer(tmp_path / "run", torch.nn.Identity())
    assert not (tmp_path / "run").exists()
    save_enhancer(tmp_path, torch.nn.Identity(), {"class": "torch.nn.Identity", "arguments": {}})
    assert isinstance(load_enhancer(tmp_path, trust=True), torch.nn.Identity)


def test_a_config_that_is_no_plain_data(tmp_path):
    model = torch.nn.Identity()
    model.config = {"class": "a.B", "arguments": {"window": torch.hann_window}}
    with pytest.raises(UserError, match="must be numbers, texts, lists"):
        save_enhancer(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_files_are_for_others_too(tmp_path):
    (tmp_path / "plain").touch()
    save_enhancer(tmp_path, build("mask"))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    model = build("mask")
    save_enhancer(tmp_path, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(weights, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(enhancers.saving, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_enhancer(tmp_path, build("mask", seed=1))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class TestLoadingErrors:
    @pytest.fixture
    def folder(self, tmp_path):
        save_enhancer(tmp_path, small_mask())
        return tmp_path

    def change(self, folder, **changes):
        path = folder / "enhancer.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"No enhancer\.yaml in .*nowhere"):
            load_enhancer(tmp_path / "nowhere")

    def test_tags_are_not_executed(self, folder):
        marker = folder / "executed"
        (folder / "enhancer.yaml").write_text(
            f"class: !!python/object/apply:pathlib.Path.touch [{marker}]\narguments: {{}}\n"
        )
        with pytest.raises(UserError, match="Cannot read"):
            load_enhancer(folder)
        assert not marker.exists()

    def test_only_registered_classes(self, folder):
        self.change(folder, **{"class": "torch.nn.Identity"})
        with pytest.raises(UserError, match="not an enhancer known here"):
            load_enhancer(folder)
        with pytest.raises(UserError, match="is unknown"):  # imported, but the weights do not fit
            load_enhancer(folder, trust=True)
        self.change(folder, **{"class": "no.such.Thing"})
        with pytest.raises(UserError, match="Cannot import"):
            load_enhancer(folder, trust=True)

    @pytest.mark.parametrize("text", ["", "[1]", "class: x\n", "class: [unclosed"])
    def test_broken_config(self, folder, text):
        (folder / "enhancer.yaml").write_text(text)
        with pytest.raises(UserError, match=r"enhancer\.yaml"):
            load_enhancer(folder)

    def test_wrong_arguments(self, folder):
        self.change(folder, arguments={"width": 3})
        with pytest.raises(UserError, match="width"):
            load_enhancer(folder)

    def test_weights_of_another_shape(self, folder):
        with pytest.raises(UserError, match=r"do not fit MaskEnhancer: .* should be .* more"):
            load_weights(MaskEnhancer(), folder)

    def test_missing_and_unknown_keys(self, folder):
        path = folder / "enhancer.safetensors"
        weights = load_file(path)
        weights["extra"] = weights.pop("mask.conv.bias")
        save_file(weights, path)
        with pytest.raises(
            UserError, match=r"extra is unknown; mask\.conv\.bias is missing\. Use the"
        ):
            load_enhancer(folder)

    def test_weights_missing_or_broken(self, folder):
        path = folder / "enhancer.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_enhancer(folder)
        path.unlink()
        with pytest.raises(UserError, match="No weights at"):
            load_enhancer(folder)

    def test_no_source_changes_nothing(self):
        model = build("mask")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert load_weights(model, None) is model
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_a_file_can_be_named(self, folder):
        source, target = load_enhancer(folder), build("mask")
        assert load_weights(target, folder / "enhancer.safetensors") is target
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)


def test_a_share_of_the_input_is_kept():
    torch.manual_seed(0)
    whole, mixed = MaskEnhancer().eval(), MaskEnhancer(mix=0.6).eval()
    with torch.no_grad():
        whole.mask.conv.weight.mul_(20)
    mixed.load_state_dict(whole.state_dict())
    wavs = 0.1 * torch.randn(2, 8000)
    with torch.no_grad():
        expected = 0.6 * whole(wavs) + 0.4 * wavs
        assert torch.allclose(mixed(wavs), expected, atol=1e-6)
        assert not torch.allclose(mixed(wavs), whole(wavs), atol=1e-3)
