"""Contracts that every enhancer keeps, and saving and loading."""

from pathlib import Path

import pytest
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from safetensors.torch import load_file, save_file

from pi_finetune import enhancers
from pi_finetune.enhancers import MaskEnhancer, load_enhancer, load_weights, save_enhancer
from pi_finetune.errors import UserError

HPARAMS = Path(__file__).parent.parent / "hparams"


def small_mask():
    return MaskEnhancer(channels=[4, 8], dim=24, dilations=[1, 2, 4], level_frames=20)


MODELS = {"mask": small_mask}


def build(name, seed=0):
    """A small enhancer whose weights are far from initialisation, so that leaks show."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def test_batch_composition_changes_nothing(model):
    lengths = torch.tensor([9000, 4801, 255, 8191, 8192])
    wavs = noise(5, 9300)
    wavs[:, 9000:] = float("nan")  # padding may hold anything
    wavs[1, 4801:] = 5.0
    with torch.no_grad():
        together = model(wavs, lengths)
        assert together.shape == wavs.shape
        for i, length in enumerate(lengths.tolist()):
            alone = model(wavs[i : i + 1, :length], lengths[i : i + 1])[0]
            assert alone.abs().max() > 1e-4
            assert relative(together[i, :length], alone) < 1e-5
            assert (together[i, length:] == 0).all()


def test_no_gradient_from_or_to_padding(model):
    wavs = noise(2, 6000).requires_grad_()
    model(wavs, torch.tensor([6000, 3500]))[1].square().sum().backward()
    assert (wavs.grad[1, 3500:] == 0).all() and (wavs.grad[0] == 0).all()
    assert wavs.grad[1, :3500].abs().min() >= 0 and wavs.grad[1, :3500].abs().sum() > 0


@pytest.mark.parametrize("length", [1, 2, 17, 255, 256, 257, 511, 4000, 16001])
def test_any_length(model, length):
    with torch.no_grad():
        out = model(noise(1, length), torch.tensor([length]))
    assert out.shape == (1, length) and out.isfinite().all()


def test_zero_length_item_and_silence(model):
    wavs = noise(3, 5000)
    wavs[1] = 0
    wavs.requires_grad_()
    out = model(wavs, torch.tensor([5000, 5000, 0]))
    assert (out[2] == 0).all() and out.isfinite().all()
    out.square().sum().backward()
    assert wavs.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert (model(wavs, torch.tensor([0, 0, 0])) == 0).all()


def test_every_parameter_learns(model):
    model.train()
    out = model(noise(2, 8000), torch.tensor([8000, 7000]))
    (out - noise(2, 8000, seed=2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_lower_the_error(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    time = torch.arange(8000) / 16000
    clean = 0.3 * torch.sin(2 * torch.pi * torch.tensor([[300.0], [700.0]]) * time)
    noisy, lengths = clean + noise(2, 8000), torch.tensor([8000, 6000])
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = (model(noisy, lengths) - clean)[:, :6000].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_output_scales_with_input(model):
    wavs, lengths = noise(2, 6000), torch.tensor([6000, 4000])
    with torch.no_grad():
        out = model(wavs, lengths)
        for factor in (0.01, 3.0):
            assert relative(model(factor * wavs, lengths), factor * out) < 1e-3


@pytest.mark.parametrize(
    ("wavs", "lengths", "message"),
    [
        (torch.zeros(4), None, "float tensor"),
        (torch.zeros(1, 4, dtype=torch.int16), None, "float tensor"),
        (torch.zeros(2, 4), torch.tensor([1.0, 0.5]), "not relative"),
        (torch.zeros(2, 4), torch.tensor([4]), "2 whole numbers"),
        (torch.zeros(2, 4), torch.tensor([5, 1]), "up to 5"),
    ],
)
def test_misuse(wavs, lengths, message):
    with pytest.raises(ValueError, match=message):
        small_mask()(wavs, lengths)


class TestMask:
    def test_default_size_and_yaml(self):
        model = MaskEnhancer()
        assert 5e5 < sum(p.numel() for p in model.parameters()) < 8e5
        text = f"width: 64\nenhancer: !include:{HPARAMS}/enhancers/mask.yaml\n"
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


def test_save_and_load(model, tmp_path):
    folder = tmp_path / "deep" / "run"
    save_enhancer(folder, model)
    assert sorted(p.name for p in folder.iterdir()) == ["enhancer.safetensors", "enhancer.yaml"]
    again = load_enhancer(folder)
    assert not again.training and again.config == model.config
    wavs, lengths = noise(2, 4000), torch.tensor([4000, 3000])
    with torch.no_grad():
        assert torch.equal(again(wavs, lengths), model(wavs, lengths))
    save_enhancer(folder, again)  # over the old one


def test_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    model = build("mask")
    save_enhancer(tmp_path, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(weights, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(enhancers, "save_file", broken)
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

    def test_a_file_can_be_named(self, folder):
        source, target = load_enhancer(folder), build("mask")
        assert load_weights(target, folder / "enhancer.safetensors") is target
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
