"""Targets, masks and the Brain of pre-training, and the recipe from a folder to a teacher."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModel, HubertConfig, HubertModel, WhisperConfig

from pi_finetune.brains.pretraining import export_teacher, load_hubert
from pi_finetune.data import targets as module
from pi_finetune.data.mixing import Interference, NoiseMixer
from pi_finetune.data.targets import (
    MaskedSpeech,
    MFCCFeatures,
    TeacherFeatures,
    draw_mask,
    make_targets,
    num_frames,
)
from pi_finetune.errors import UserError
from pi_finetune.recipes import pretrain_teacher
from pi_finetune.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent


def tones(rng, samples):
    """A waveform whose 'phones' are tones of 0.1 to 0.3 s from an inventory of four."""
    parts = []
    while sum(map(len, parts)) < samples:
        time = np.arange(int(rng.integers(1600, 4800))) / 16000
        parts.append(0.3 * np.sin(2 * np.pi * rng.choice([300, 700, 1500, 3000]) * time))
    wav = np.concatenate(parts)[:samples]
    return (wav + 0.003 * rng.standard_normal(samples)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """LibriSpeech layout: two splits, six and two utterances of unequal length."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for split, speaker, count in (("train-x", "1", 6), ("dev-x", "2", 2)):
        folder = root / split / speaker / "10"
        folder.mkdir(parents=True)
        for i in range(count):
            wav = tones(rng, 16000 + 4321 * i)
            soundfile.write(folder / f"{speaker}-10-{i:04d}.flac", wav, 16000)
    return root


@pytest.fixture
def manifests(corpus):
    def manifest(split):
        entries = {}
        for path in sorted((corpus / split).rglob("*.flac")):
            info = soundfile.info(path)
            entries[path.stem] = {"wav": str(path), "duration": info.frames / 16000}
            entries[path.stem]["speaker"] = path.stem.split("-")[0]
        return entries

    return manifest("train-x"), manifest("dev-x")


def test_mfcc_frames_are_those_of_the_front_end():
    config = HubertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=16, conv_dim=(4,) * 7)  # fmt: skip
    model = HubertModel(config)
    for samples in (400, 719, 720, 16000, 16039, 16080):
        features = MFCCFeatures()([torch.randn(samples)], None)[0]
        frames = int(model._get_feat_extract_output_lengths(samples))
        assert features.shape == (frames, 39)
        assert num_frames(samples) == frames
    assert num_frames(399) == 0


def test_whisper_features_are_centred_on_the_frames(tmp_path):
    torch.manual_seed(0)
    config = WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2,
                           encoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
                           decoder_ffn_dim=16, vocab_size=60, pad_token_id=0, bos_token_id=1,
                           eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    extract = TeacherFeatures(str(tmp_path), 0)
    position = extract.teacher.encoder.embed_positions.weight
    # A click at the centre of frame 20 is loudest there, and evenly spread to both sides.
    wav = torch.zeros(16000)
    wav[20 * 320 + 200] = 1.0
    frames = num_frames(16000)
    reps = extract([wav], [frames])[0] - position[:frames]
    energy = (reps - reps[2]).norm(dim=1)
    energy[0] = 0  # sees the edge
    assert energy.argmax() == 20
    assert {int(k) for k in energy.topk(3).indices} == {19, 20, 21}
    # An utterance of one frame is shorter than Whisper's receptive field: it is padded.
    assert extract([torch.randn(400)], [1])[0].shape == (1, 16)


def test_targets_follow_the_sounds_not_the_position(manifests, monkeypatch):
    """Features that are mostly position still give clusters of sounds: position is removed."""
    train, valid = manifests

    class Positional(MFCCFeatures):
        window = 30

        def __call__(self, wavs, frames):
            features = super().__call__(wavs, frames)
            ramps = [torch.arange(len(f))[:, None].expand(-1, 80) for f in features]
            return [torch.cat(pair, dim=1) for pair in zip(features, ramps)]

    plain = make_targets(train, valid, "mfcc", clusters=4)
    monkeypatch.setattr(module, "MFCCFeatures", Positional)
    positional = make_targets(train, valid, "mfcc", clusters=4)
    agreement = mutual_information(
        torch.cat([plain[k] for k in train]), torch.cat([positional[k] for k in train])
    )
    assert agreement > 0.5


def mutual_information(a, b):
    """Normalised by the entropy of ``a``."""
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a.numpy(), b.numpy()), 1)
    joint /= joint.sum()
    rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    here = joint > 0
    information = (joint[here] * np.log(joint[here] / (rows * columns)[here])).sum()
    return information / -(rows[rows > 0] * np.log(rows[rows > 0])).sum()


def test_targets_are_kept_and_remade_when_the_question_changes(manifests, tmp_path, monkeypatch):
    train, valid = manifests
    path = tmp_path / "targets.pt"
    first = make_targets(train, valid, "mfcc", clusters=5, path=path)
    assert sorted(first) == sorted({**train, **valid})
    for key, entry in {**train, **valid}.items():
        assert len(first[key]) == num_frames(round(entry["duration"] * 16000))
        assert 0 <= first[key].min() and first[key].max() < 5
    made = []
    original = module._all_features
    monkeypatch.setattr(module, "_all_features", lambda *args: made.append(1) or original(*args))
    again = make_targets(train, valid, "mfcc", clusters=5, path=path)
    assert not made and all(torch.equal(first[k], again[k]) for k in first)
    make_targets(train, valid, "mfcc", clusters=4, path=path)
    assert made
    assert [p.name for p in tmp_path.iterdir()] == ["targets.pt"]


def test_too_many_clusters(manifests):
    with pytest.raises(UserError, match="clusters: 100000 is more than"):
        make_targets(*manifests, "mfcc", clusters=100_000)


def test_mask():
    rng = np.random.default_rng(0)
    masks = torch.stack([draw_mask(200, 0.65, 10, rng) for _ in range(300)])
    assert masks.dtype == torch.bool
    assert 0.4 < masks.float().mean() < 0.55  # 1 - exp(-0.65) = 0.48 if starts were independent
    edges = torch.diff(torch.nn.functional.pad(masks.int(), (1, 1)))
    for row in edges:
        runs = (row == -1).nonzero() - (row == 1).nonzero()
        assert runs.min() >= 10
    for frames in (1, 5, 10, 11):
        assert draw_mask(frames, 0.65, 10, rng).any()


def test_dataset_crops_waveform_and_targets_together(manifests):
    train, valid = manifests
    targets = make_targets(train, valid, "mfcc", clusters=5)
    data = MaskedSpeech(train, targets, 0.5, 0.65, 10, seed=3)
    item, other, same = data[4, 0], data[4, 1], data[4, 0]
    assert torch.equal(item["wav"], same["wav"]) and torch.equal(item["mask"], same["mask"])
    assert not torch.equal(item["wav"], other["wav"])
    frames = num_frames(8000)
    assert len(item["targets"]) == len(item["mask"]) == frames == num_frames(len(item["wav"]))
    whole = torch.from_numpy(soundfile.read(train[item["id"]]["wav"], dtype="float32")[0])
    (start,) = [
        k for k in range(num_frames(len(whole)) - frames + 1)
        if torch.equal(whole[320 * k : 320 * k + len(item["wav"])], item["wav"])
    ]  # fmt: skip
    assert torch.equal(item["targets"], targets[item["id"]][start : start + frames].long())


@pytest.fixture
def hiss(tmp_path):
    """A mixer of one noise at 3 dB."""
    path = tmp_path / "hiss-0.flac"
    wav = 0.1 * np.random.default_rng(4).standard_normal(16000)
    soundfile.write(path, wav, 16000)
    entry = {"wav": str(path), "class": "hiss", "start": 0, "frames": 16000}
    return NoiseMixer({"hiss": entry}, [3])


def snr(clean, noisy):
    """In dB; the mixture may be scaled as a whole."""
    scale = float(noisy @ clean / clean.square().sum())
    return float(10 * torch.log10(clean.square().mean() / (noisy / scale - clean).square().mean()))


def test_interference_leaves_targets_crops_and_masks_alone(manifests, hiss):
    train, valid = manifests
    targets = make_targets(train, valid, "mfcc", clusters=5)
    plain = MaskedSpeech(train, targets, 0.5, 0.65, 10, seed=3)
    # Half of the utterances get noise; the others are as they were.
    half = MaskedSpeech(train, targets, 0.5, 0.65, 10, 3, Interference(0.5, hiss))
    addresses = [(i, p) for i in range(6) for p in range(20)]
    disturbed = 0
    for address in addresses:
        clean, item, again = plain[address], half[address], half[address]
        assert torch.equal(item["wav"], again["wav"])
        assert torch.equal(item["targets"], clean["targets"])
        assert torch.equal(item["mask"], clean["mask"])
        if not torch.equal(item["wav"], clean["wav"]):
            disturbed += 1
            assert snr(clean["wav"], item["wav"]) == pytest.approx(3, abs=0.5)
    assert 40 < disturbed < 80
    never = MaskedSpeech(train, targets, 0.5, 0.65, 10, 3, Interference(0.0, hiss))
    assert all(torch.equal(never[a]["wav"], plain[a]["wav"]) for a in addresses)


def test_a_second_speaker_is_heard_for_half_of_the_time_at_most(manifests):
    train, valid = manifests
    interfere = Interference(1.0, None, {**train, **valid}, 1.0, [-2])
    wav = torch.from_numpy(tones(np.random.default_rng(1), 12000))
    heard = []
    for seed in range(30):
        mixed = interfere(wav, "1", np.random.default_rng(seed))
        scale = float((mixed / wav).median())  # most samples are the first speaker alone
        added = mixed / scale - wav
        places = (added.abs() > 1e-5).nonzero()[:, 0]
        length = int(places[-1] - places[0]) + 1
        assert length <= 6000
        if length > 100:  # the ends may be below the threshold
            power = added.square().sum() / length
            assert 10 * torch.log10(wav.square().mean() / power) == pytest.approx(-2, abs=0.2)
            heard.append(length)
    assert len(heard) > 20 and max(heard) > 4000
    # Speaker 2 alone speaks to speaker 1.
    only = Interference(1.0, None, {**train, **valid}, 1.0, [-2])
    read = []
    only.speech = {k: v | {"wav": Recorded(v["wav"], read)} for k, v in only.speech.items()}
    for seed in range(20):
        only(wav, "1", np.random.default_rng(seed))
    assert len(read) >= 20 and {Path(path).stem.split("-")[0] for path in read} == {"2"}


class Recorded:
    """A path that notes when it is read."""

    def __init__(self, path, read):
        self.path, self.read = path, read

    def __str__(self):
        self.read.append(self.path)
        return self.path


def test_interference_says_what_it_lacks(manifests):
    with pytest.raises(UserError, match="noise_folder: needed for noise_probability"):
        Interference(0.5)
    with pytest.raises(UserError, match="two speakers or more"):
        Interference(0.5, None, manifests[0], 1.0)
    Interference(0.0)


def small_hubert(seed, **changed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 16, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8,
             "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
             "do_stable_layer_norm": True}  # fmt: skip
    return HubertModel(HubertConfig(**{**shape, **changed})).eval()


def test_weights_to_start_from(tmp_path):
    old, new = small_hubert(0), small_hubert(1)
    export_teacher(old, tmp_path)
    before = {key: value.clone() for key, value in new.state_dict().items()}
    load_hubert(new, None)
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())
    load_hubert(new, str(tmp_path))
    for key, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[key], value.bfloat16().float())
    assert all(parameter.requires_grad for parameter in new.parameters())
    with pytest.raises(UserError, match=r"hubert_weights: .* does not fit .*intermediate"):
        load_hubert(small_hubert(0, intermediate_size=24), str(tmp_path))
    with pytest.raises(UserError, match=r"layers\.2.* is missing and should be"):
        load_hubert(small_hubert(0, num_hidden_layers=3), str(tmp_path))


def test_export_keeps_the_model_and_a_readme(tmp_path):
    model = small_hubert(0)
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "README.md").write_text("kept")
    export_teacher(model, folder)
    assert (folder / "README.md").read_text() == "kept"
    assert next(model.parameters()).dtype == torch.float32
    teacher = Teacher(str(folder))
    wavs = 0.1 * torch.randn(1, 8000)
    reps, _ = teacher(wavs, torch.tensor([8000]))
    values = (wavs - wavs.mean()) / (wavs.var(correction=0) + 1e-7).sqrt()
    with torch.no_grad():
        expected = model(values).last_hidden_state
    assert (reps - expected).norm() / expected.norm() < 1e-2  # bfloat16 weights
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    plain = AutoModel.from_pretrained(folder)
    assert next(plain.parameters()).dtype == torch.float32
    assert isinstance(plain, HubertModel) and plain.config.num_hidden_layers == 2


TINY = [
    "--config", "{conv_dim: [8, 8, 8, 8, 8, 8, 16], hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 2, num_conv_pos_embeddings: 16, "
    "num_conv_pos_embedding_groups: 4}",
    "--head", "{in_features: 32}",
    "--clusters", "4",
    "--segment_seconds", "1",
    "--batch_size", "3",
    "--valid_every", "15",
    "--warmup_updates", "5",
    "--lr", "0.01",
    "--num_workers", "0",
]  # fmt: skip


def recipe(corpus, output, *options):
    """Call the recipe's main, as the command line does."""
    hparams = str(ROOT / "hparams" / "pretrain_teacher.yaml")
    folders = ["--data_folder", str(corpus), "--output_folder", str(output)]
    pretrain_teacher.main([hparams, "--device", "cpu", *folders, *TINY, *options])


def validations(output):
    return [json.loads(line) for line in (output / "valid.jsonl").read_text().splitlines()]


def test_recipe_learns_resumes_and_its_teacher_makes_targets(corpus, tmp_path):
    recipe(corpus, tmp_path / "a", "--updates", "30")
    lines = validations(tmp_path / "a")
    assert [line["update"] for line in lines] == [15, 30]
    assert lines[1]["unmasked_loss"] < lines[0]["unmasked_loss"] < np.log(4)
    assert lines[1]["unmasked_accuracy"] > 0.4
    source = str(tmp_path / "a" / "teacher")
    assert Teacher(source, layers=1).num_layers == 2

    # Cut off after the first validation, then resumed: the same numbers, to rounding.
    recipe(corpus, tmp_path / "b", "--updates", "30", "--optimizer_step_limit", "15")
    recipe(corpus, tmp_path / "b", "--updates", "30")
    resumed = validations(tmp_path / "b")
    assert [line["update"] for line in resumed] == [15, 30]
    assert resumed[1]["masked_loss"] == pytest.approx(lines[1]["masked_loss"], rel=1e-4)

    recipe(corpus, tmp_path / "c", "--updates", "15", "--targets_source", source)
    assert len(torch.load(tmp_path / "c" / "targets.pt")["targets"]) == 8


def test_recipe_with_noise_from_weights_in_a_second_round(corpus, tmp_path, hiss):
    """Round 2 as the shipped teacher's: from round 1's weights, to its clusters, with noise."""
    recipe(corpus, tmp_path / "one", "--updates", "15")
    first = str(tmp_path / "one" / "teacher")
    noise = tmp_path / "noise"
    noise.mkdir()
    (tmp_path / "hiss-0.flac").rename(noise / "hiss-0.flac")
    options = ("--updates", "15", "--hubert_weights", first, "--targets_source", first)
    disturbed = ("--noise_folder", str(noise), "--noise_probability", "0.5")
    # One training speaker: nobody could interfere.
    disturbed += ("--speech_noise_share", "0")
    recipe(corpus, tmp_path / "two", *options, *disturbed)
    recipe(corpus, tmp_path / "again", *options, *disturbed)
    recipe(corpus, tmp_path / "clean", *options)
    losses = [
        [validations(tmp_path / name)[0][key] for key in ("train_masked_loss", "masked_loss")]
        for name in ("two", "again", "clean")
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_recipe_errors(corpus, tmp_path, capsys):
    for folder, options, message in [
        (tmp_path / "nowhere", ("--updates", "15"), "nowhere"),
        (corpus, ("--updates", "20"), "must be a multiple of valid_every"),
        (corpus, ("--updates", "15", "--targets_source", str(tmp_path)), "no config.json"),
        (corpus, ("--updates", "15", "--hubert_weights", str(tmp_path)), "no config.json"),
        (corpus, ("--updates", "15", "--noise_probability", "0.2"), "noise_folder: needed"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            recipe(folder, tmp_path / "a", *options)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
