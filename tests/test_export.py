"""Exports give what the project itself gives: SpeechBrain, the hub, ONNX, torch.export."""

import importlib.util
import inspect
import io
import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import ruamel.yaml
import soundfile
import torch
from huggingface_hub import ModelCard
from hyperpyyaml import resolve_references
from speechbrain.inference.enhancement import WaveformEnhancement
from test_enhancers import SPEECHBRAIN, write_speechbrain_model

from pi_finetune import __main__ as cli
from pi_finetune import config
from pi_finetune.enhancers import (
    ConvTasNet,
    SpeechBrainEnhancer,
    UNetEnhancer,
    load_enhancer,
    save_enhancer,
)
from pi_finetune.errors import UserError
from pi_finetune.export import export_run, push_run
from pi_finetune.files import PROJECT_ROOT
from pi_finetune.inference import DEFAULT_MODEL, Enhancer

#: Optional packages: the rest is tested without them too.
ONNX = ("onnx", "onnxscript", "onnxruntime")
HAS_ONNX = all(map(importlib.util.find_spec, ONNX))
LENGTHS = (1, 300, 16000, 25777)


def noise(batch, time, seed=0):
    return 0.1 * torch.randn(batch, time, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training and evaluation leave it, with the shipped weights."""
    run = tmp_path_factory.mktemp("results") / "zero_pad" / "7"
    save_enhancer(run, load_enhancer(DEFAULT_MODEL))
    tree = config._merged_tree(PROJECT_ROOT / "hparams" / "zero_pad.yaml")
    tree.update(seed=7, teacher_source="facebook/hubert-base-ls960", data_folder="/a/b/LibriSpeech")
    resolved = resolve_references(io.StringIO(config._dump(tree))).getvalue()
    (run / "hyperparams.yaml").write_text(resolved)
    records = [{"update": u, "wer": w} for u, w in ((50, 30.0), (100, 20.0), (150, 25.0))]
    (run / "valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for folder, gain in ((run, 1.0), (run.parent.parent / "noisy" / "0", 0.0)):
        (folder / "scores").mkdir(parents=True)
        lines = [
            {"id": str(i), "pesq": 1.5 + gain + i / 8, "stoi": 0.75, "estoi": None}
            | {"si_sdr": i + gain}
            for i in range(3)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "scores" / "test-set.jsonl").write_text(text)
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    formats = ["speechbrain", "torch", *(["onnx"] if HAS_ONNX else [])]
    assert cli.main(["export", str(run), "-o", str(folder), "--format", *formats]) == 0
    return folder


@pytest.fixture(scope="module")
def enhancer():
    return load_enhancer(DEFAULT_MODEL)


@torch.no_grad()
def assert_same(other, enhancer, lengths=LENGTHS):
    for batch, time in zip((1, 3, 2, 1), lengths):
        wavs = noise(batch, time, time)
        expected = enhancer(wavs)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(other(wavs), expected, rtol=1e-4, atol=2e-6)


def conv_tasnet():
    torch.manual_seed(0)
    return ConvTasNet(filters=16, kernel=16, bottleneck=8, hidden=16, blocks=3, repeats=1)


class TestFormats:
    def test_speechbrain(self, exported, enhancer, tmp_path):
        model = WaveformEnhancement.from_hparams(source=str(exported))
        assert_same(model.enhance_batch, enhancer)
        soundfile.write(tmp_path / "in.wav", noise(1, 9000)[0].numpy(), 16000, "FLOAT")
        enhanced = model.enhance_file(str(tmp_path / "in.wav"))
        torch.testing.assert_close(enhanced, enhancer(noise(1, 9000))[0])

    @pytest.mark.parametrize(
        "other",
        [
            conv_tasnet,
            lambda: UNetEnhancer(channels=2, depth=2),
        ],
        ids=["conv_tasnet", "unet"],
    )
    def test_other_enhancers_in_speechbrain(self, other, tmp_path):
        torch.manual_seed(0)
        enhancer = other().eval()
        save_enhancer(tmp_path / "run", enhancer)
        export_run(tmp_path / "run", tmp_path / "out")
        model = WaveformEnhancement.from_hparams(source=str(tmp_path / "out"))
        assert_same(model.enhance_batch, enhancer)

    @pytest.mark.parametrize("kind", SPEECHBRAIN)
    def test_models_that_came_from_speechbrain(self, kind, tmp_path):
        write_speechbrain_model(tmp_path / "source", SPEECHBRAIN[kind])
        enhancer = SpeechBrainEnhancer(tmp_path / "source").eval()
        with torch.no_grad():  # "fine-tuned"
            for parameter in enhancer.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        save_enhancer(tmp_path / "run", enhancer)
        shutil.rmtree(tmp_path / "source")
        export_run(tmp_path / "run", tmp_path / "out", trust=True)
        loaded = load_enhancer(tmp_path / "out", trust=True)
        again = SpeechBrainEnhancer(tmp_path / "out").eval()  # through SpeechBrain's own loading
        assert type(again.interface) is type(enhancer.interface)
        assert_same(again, enhancer, (4096, 8000, 8000, 8192))
        assert_same(loaded, enhancer, (4096, 8000, 8000, 8192))
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"{type(enhancer.interface).__name__}.from_hparams" in card and "trust=True" in card
        text = (tmp_path / "out" / "hyperparams.yaml").read_text()
        assert "resynth" not in text or "normalize_wavs: false" in text.lower()

    def test_own_folder(self, exported, enhancer):
        loaded = Enhancer.from_run(exported, device="cpu")
        assert_same(loaded.module, enhancer)

    @pytest.mark.needs(*ONNX)
    def test_onnx(self, exported, enhancer):
        assert_same(onnx(exported / "enhancer.onnx"), enhancer)

    def test_program(self, exported, enhancer):
        assert_same(torch.export.load(exported / "enhancer.pt2").module(), enhancer)

    @pytest.mark.needs(*ONNX)
    def test_conv_tasnet_in_onnx(self, tmp_path):
        enhancer = conv_tasnet()
        save_enhancer(tmp_path / "run", enhancer.eval())
        export_run(tmp_path / "run", tmp_path / "out", ["onnx"])
        assert not (tmp_path / "out" / "hyperparams.yaml").exists()
        assert_same(onnx(tmp_path / "out" / "enhancer.onnx"), enhancer)

    def test_what_cannot_be_traced_is_refused(self, tmp_path):
        save_enhancer(tmp_path / "run", UNetEnhancer(channels=2, depth=2))
        with pytest.raises(UserError, match="cannot trace UNetEnhancer for any length"):
            export_run(tmp_path / "run", tmp_path / "out", ["torch"])
        assert not (tmp_path / "out").exists()


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda wavs: torch.from_numpy(session.run(["enhanced"], {"noisy": wavs.numpy()})[0])


class TestCard:
    def test_states_what_the_run_recorded(self, exported):
        card = ModelCard.load(exported / "README.md")
        for row in (
            "| strategy | zero_pad |",
            "| seed | 7 |",
            "| perturbation | ZeroPadding(max_seconds=1.0) |",
            "| distance | MSEDistance() |",
            "| noise classes | all |",
            "| teacher | facebook/hubert-base-ls960 |",
            "| data folder | b/LibriSpeech |",
            "| kept at update | 100, the best by wer |",
            "| | PESQ | STOI | SI-SDR (dB) |",
            "| noisy input | 1.625 | 0.7500 | 1.00 |",
            "| this model | 2.625 | 0.7500 | 2.00 |",
        ):
            assert f"\n{row}\n" in card.text, row
        assert "signal loss" not in card.text and "ESTOI" not in card.text
        values = {r.metric_type: r.metric_value for r in card.data.eval_results}
        assert values == {"pesq": 2.625, "stoi": 0.75, "si_sdr": 2.0}
        assert card.data.license is None and "None was stated" in card.text
        assert ("enhancer.onnx" in card.text) is HAS_ONNX and "enhancer.pt2" in card.text

    def test_without_records_it_says_so(self, tmp_path):
        export_run(DEFAULT_MODEL, tmp_path / "out", license="cc-by-4.0")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert "holds no record of its training" in card.text and "None were found" in card.text
        assert card.data.license == "cc-by-4.0" and card.data.eval_results is None
        assert "enhancer.onnx" not in card.text and card.data.library_name == "speechbrain"
        export_run(DEFAULT_MODEL, tmp_path / "out")  # what an export wrote, another may replace
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["RUN", "-o", "RUN"], "hyperparams.yaml that is no export's"),
            (["RUN", "-o", "other"], "hyperparams.yaml that is no export's"),
            (["RUN", "-o", "."], "README.md that is no export's"),
            (["nowhere", "-o", "x"], "No enhancer.yaml in nowhere"),
            (["owner/nowhere", "-o", "x"], "no folder owner/nowhere, and no model of that name"),
        ],
    )
    def test_one_paragraph(self, run, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "README.md").write_text("# My project\n")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "hyperparams.yaml").write_text("seed: 1\n")
        before = (run / "hyperparams.yaml").read_text()
        with pytest.raises(SystemExit):
            cli.main(["export", *(str(run) if word == "RUN" else word for word in arguments)])
        text = capsys.readouterr().err
        assert text.startswith("error: ") and message in text and text.count("\n") == 1
        assert (run / "hyperparams.yaml").read_text() == before and not (tmp_path / "x").exists()


class TestHub:
    @pytest.fixture
    def cache(self, exported, tmp_path, monkeypatch):
        """The hub's cache as a download leaves it; whatever reaches for the network fails."""
        repository = tmp_path / "cache" / "models--owner--name"
        shutil.copytree(exported, repository / "snapshots" / "0123456789abcdef")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123456789abcdef")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

        def connect(*_):
            raise AssertionError("the network was contacted")

        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.chdir(tmp_path)
        return repository / "snapshots" / "0123456789abcdef"

    def test_name_is_found_in_the_cache(self, cache, enhancer, tmp_path):
        wav = noise(1, 8000)
        enhanced = Enhancer.from_run("owner/name", device="cpu").enhance(wav)
        torch.testing.assert_close(enhanced, enhancer(wav), rtol=1e-4, atol=1e-6)
        soundfile.write("in.wav", wav[0].numpy(), 16000)
        assert cli.main(["enhance", "in.wav", "-o", "out.wav", "--model", "owner/name"]) == 0
        assert np.abs(soundfile.read("out.wav")[0] - enhanced[0].numpy()).max() < 1e-3

    def test_a_folder_comes_first(self, cache, tmp_path):
        save_enhancer(tmp_path / "owner" / "name", UNetEnhancer(channels=2, depth=2))
        assert isinstance(Enhancer.from_run("owner/name").module, UNetEnhancer)

    def test_nothing_in_it_is_executed(self, cache, tmp_path):
        trap = f"!apply:pathlib.Path.touch\n- !new:pathlib.Path [{tmp_path}/executed]\n"
        (cache / "hyperparams.yaml").write_text(f"modules: {trap}")
        Enhancer.from_run("owner/name")
        (cache / "enhancer.yaml").write_text(f"class: x\narguments: {trap}")
        with pytest.raises(UserError, match=r"Cannot read .*enhancer\.yaml"):
            Enhancer.from_run("owner/name")
        (cache / "enhancer.yaml").write_text("class: subprocess.Popen\narguments: {args: ls}\n")
        with pytest.raises(UserError, match="not an enhancer known here"):
            Enhancer.from_run("owner/name")
        assert not (tmp_path / "executed").exists()

    def test_not_in_the_cache(self, cache):
        with pytest.raises(UserError, match="no folder owner/other, and no model of that name"):
            Enhancer.from_run("owner/other")


def test_exported_yaml_is_what_the_config_says(exported, enhancer):
    tree = ruamel.yaml.YAML().load((exported / "hyperparams.yaml").read_text())
    assert dict(tree["enhancer"]) == enhancer.config["arguments"]
    assert tree["enhancer"].tag.value == f"!new:{enhancer.config['class']}"


class FakeHub:
    """Takes what HfApi would send; ``fails`` is raised by the upload."""

    def __init__(self, fails=None):
        self.calls, self.files, self.fails = [], {}, fails

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.fails:
            raise self.fails
        self.calls.append(("upload_folder", repo_id, options))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


class TestPush:
    def test_upload(self, run, tmp_path):
        hub = FakeHub()
        pushed = push_run(run, "zero-pad", license="cc-by-4.0", private=True, api=hub)
        assert pushed.repo == "me/zero-pad" and pushed.url == "hub/me/zero-pad/commit/1"
        assert hub.calls[0] == (
            "create_repo", "zero-pad", {"private": True, "repo_type": "model", "exist_ok": True}
        )  # fmt: skip
        message = {"repo_type": "model", "commit_message": "pi_finetune: zero_pad-7"}
        assert hub.calls[1:] == [("upload_folder", "me/zero-pad", message)]
        assert pushed.files == {name: len(content) for name, content in sorted(hub.files.items())}
        # What was sent is what an export writes, and what loads again.
        (tmp_path / "got").mkdir()
        for name, content in hub.files.items():
            (tmp_path / "got" / name).write_bytes(content)
        export_run(run, tmp_path / "exported", license="cc-by-4.0")
        for path in (tmp_path / "exported").iterdir():
            # PyTorch's archive holds the name of its temporary file.
            assert path.suffix == ".ckpt" or path.read_bytes() == hub.files[path.name]
        Enhancer.from_run(tmp_path / "got")

    def test_the_signatures_are_those_of_the_hub(self):
        for name in ("create_repo", "upload_folder"):
            theirs = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
            used = {"private", "repo_type", "exist_ok"} if name == "create_repo" else {
                "repo_id", "folder_path", "repo_type", "commit_message"
            }  # fmt: skip
            assert used <= set(theirs)

    def test_card(self, run):
        hub = FakeHub()
        push_run(run, "me/model", license="mit", api=hub)
        card = ModelCard(hub.files["README.md"].decode())
        assert card.data.license == "mit" and "arxiv:2601.21084" in card.data.tags
        (model,) = card.data.to_dict()["model-index"]
        metrics = {m["type"]: m["value"] for r in model["results"] for m in r["metrics"]}
        assert metrics["pesq"] == pytest.approx(2.62, abs=0.01) and metrics["si_sdr"] == 2.0
        assert model["results"][0]["dataset"]["name"] == "test-set"

    def test_dry_run_sends_nothing(self, run, capsys, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        words = ["push", str(run), "me/model", "--license", "mit", "--private", "--dry_run"]
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        hub = FakeHub()
        push_run(run, "me/model", license="mit", private=True, api=hub)
        for name, content in hub.files.items():
            assert f"{len(content):,} bytes  {name}\n" in said
        assert said.startswith("me/model: a model, private\n")
        assert "- arxiv:2601.21084\n" in said and "model-index:" in said
        assert said.endswith("Nothing was uploaded: this was a dry run.\n")

    def test_what_the_hub_refuses(self, run, monkeypatch):
        with pytest.raises(UserError, match=r"me/model: the hub did not take it \(403 Forbidden\)"):
            push_run(run, "me/model", api=FakeHub(OSError("403 Forbidden\nlong")))
        with pytest.raises(UserError, match=r"me/model: the hub did not take it .*hf auth login"):
            push_run(run, "me/model")  # HF_HUB_OFFLINE is set in the tests
        with pytest.raises(UserError, match=r"'a b' is no name of a repository"):
            push_run(run, "a b", api=FakeHub())
