"""The probe of content: what it hears, and that all features are treated alike."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from synthetic import save_tiny_teacher

from pi_finetune.data.targets import num_frames

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import probe_features

# Of one phoneme each, so that a single frame can tell.
WORDS = {"OH": 500, "EYE": 1200, "AWE": 3000}


@pytest.fixture
def corpus(tmp_path):
    """Words that are tones, 0.3 s each, none twice in a row."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("dev", 6), ("test", 6)):
        folder = tmp_path / split / split / "1"
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            words = [*rng.permutation(list(WORDS)), str(rng.choice(["OH", "EYE"]))]
            words = [w for w, before in zip(words, ["", *words]) if w != before]
            time = np.arange(4800) / 16000
            tones = [0.3 * np.sin(2 * np.pi * WORDS[word] * time) for word in words]
            wav = np.concatenate(tones) + 0.003 * rng.standard_normal(4800 * len(words))
            soundfile.write(folder / f"{split}-1-{i:04d}.flac", wav, 16000)
            lines.append(f"{split}-1-{i:04d} {' '.join(words)}\n")
        (folder / f"{split}-1.trans.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.needs("gruut")
def test_table_of_a_teacher_and_log_mel(corpus, tmp_path, capsys):
    save_tiny_teacher(tmp_path / "teacher", seed=3)
    noise = 0.1 * np.random.default_rng(1).standard_normal(32000)
    soundfile.write(tmp_path / "hiss-0.flac", noise, 16000)
    arguments = ["--teacher", str(tmp_path / "teacher"), "--data_folder", str(corpus)]
    arguments += ["--train", "train", "--dev", "dev", "--test", "test", "--epochs", "60"]
    arguments += ["--lrs", "0.0001", "0.03", "--batch_size", "8", "--contexts", "1", "3"]
    # A path of its own: the folder of speech must not count as noise.
    (tmp_path / "noise").mkdir()
    (tmp_path / "hiss-0.flac").rename(tmp_path / "noise" / "hiss-0.flac")
    probe_features.main([*arguments, "--noise_folder", str(tmp_path / "noise"), "--snr", "-20"])
    out = capsys.readouterr().out
    assert "24 train, 6 dev, 6 test, 6 noisy" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    rows = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert {"layer cnn", "layer 0", "log-mel, 1 frame", "log-mel, 3 frames"} < rows.keys()
    assert rows["weighted sum of layers"][0] == rows["layer 0"][0]
    dimensions, rate, _, test, noisy = rows["log-mel, 1 frame"]
    assert (dimensions, rate) == ("80", "0.03") and rows["log-mel, 3 frames"][0] == "240"
    assert float(test) < 20 and float(noisy) > float(test) + 20
    assert len({rows[name][3] for name in rows}) > 1


def test_frames_are_those_of_the_teachers_and_standardised():
    wav = torch.randn(16000)
    mel = probe_features.log_mel(wav)
    assert mel.shape == (num_frames(16000), 80)
    beside = probe_features.stacked(mel, 3)
    assert beside.shape == (len(mel), 240)
    # Bands of a frame lie apart by the number of frames: [band, neighbour].
    middle = beside.unflatten(1, (80, 3))
    assert torch.equal(middle[5], mel[4:7].T) and torch.equal(middle[0, :, 0], mel[0])
    scaled = probe_features.standardised(beside).float()
    assert scaled.mean(0).abs().max() < 1e-2
    assert scaled.std(0).sub(1).abs().max() < 0.02


@pytest.mark.needs("gruut")
def test_the_weights_of_the_layers_are_learned():
    """Layer 1 of three says which phoneme a frame has, the others are noise."""
    tokenizer = probe_features.PhonemeTokenizer()
    generator = torch.Generator().manual_seed(0)
    texts = ["OH EYE AWE", "EYE OH", "AWE EYE OH", "OH AWE"] * 4
    features = []
    for text in texts:
        tokens = torch.tensor(tokenizer.encode(text)).repeat_interleave(4)
        x = torch.randn(len(tokens), 3, len(tokenizer), generator=generator)
        x[:, 1] += 6 * torch.nn.functional.one_hot(tokens, len(tokenizer))
        features.append(x.half())
    probe = probe_features.train_probe(features, texts, tokenizer, 40, 0.05, 4)
    weights = probe.weights.softmax(0)
    assert weights[1] > 2 * max(weights[0], weights[2])
    states = torch.randn(2, 5, 3, len(tokenizer), generator=generator)
    expected = probe.linear(sum(w * states[:, :, i] for i, w in enumerate(weights)))
    torch.testing.assert_close(probe(states), expected)
