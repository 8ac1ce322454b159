"""Fixtures that stand in for a corpus and models: generated, tiny, of the real format."""

import importlib.util
import json
import os
import sys
from urllib.parse import quote

import numpy as np
import pytest
import torch
from running import HPARAMS, Parrot, recipe
from speechbrain.utils.importutils import LazyModule
from synthetic import save_tiny_enhancer, save_tiny_teacher, voice, write_audio

# SpeechBrain registers lazy modules that fail on any attribute access when an optional package is
# missing; hypothesis asks every module for its __file__.
for module in list(sys.modules.values()):
    if isinstance(module, LazyModule):
        module.__dict__.setdefault("__file__", None)

#: The corpus is small, and the tiny teacher's position faint: content has to average out.
POSITION = {"position_seconds": 1.0, "position_rotations": 50}

# Nothing in the tests may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models: a second thread costs more than it brings, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what needs an optional package that is not installed."""
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """LibriSpeech layout: 3 splits, 2 speakers each; dev and test have transcripts."""
    folder = tmp_path_factory.mktemp("a corpus") / "speech"  # a path with a space, as users have
    rng = np.random.default_rng(0)
    words = "one two three four five six seven".split()
    for split, speakers, count in (
        ("train", ("10", "11"), 6),
        ("dev", ("20", "21"), 2),
        ("test", ("30", "31"), 3),
    ):
        for speaker in speakers:
            lines = []
            for i in range(count):
                name = f"{speaker}-1-{i:04d}"
                wav = voice(rng.uniform(1.2, 2.4), 80 + 5 * int(speaker), rng)
                write_audio(folder / split / speaker / "1" / f"{name}.flac", wav)
                lines.append(f"{name} {' '.join(rng.choice(words, 3)).upper()}")
            transcript = folder / split / speaker / "1" / f"{speaker}-1.trans.txt"
            transcript.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def noises(tmp_path_factory):
    """Three classes: many short recordings, one long one, and one with silence inside."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    for i in range(8):
        write_audio(folder / f"hiss-{i}.wav", 0.1 * rng.standard_normal(8000).astype(np.float32))
    write_audio(folder / "rumble.flac", 0.1 * rng.standard_normal(80000).astype(np.float32))
    for i in range(5):
        bark = 0.1 * rng.standard_normal(48000).astype(np.float32)
        bark[8000:40000] = 0
        write_audio(folder / "dog" / f"bark-{i}.wav", bark)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """A randomly initialised HuBERT of the layer-norm type, saved as ``transformers`` does."""
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A tiny enhancer with random weights, and the YAML block that declares it."""
    return save_tiny_enhancer(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def train(corpus, noises, tiny_teacher, pretrained, tmp_path):
    """Run train.py with small settings; returns the run folder."""

    def run(strategy, results="results", options=(), **changes):
        settings = {
            "data_folder": corpus,
            "noise_folder": noises,
            "teacher_source": tiny_teacher,
            "enhancer": f"!include:{quote(str(pretrained))}/block.yaml",
            "enhancer_weights": pretrained,
            "asr_source": "null",
            "select_by": "si_sdr",
            "results_folder": tmp_path / results,
            "updates": 4,
            "valid_every": 2,
            "segment_seconds": 1.0,
            "batch_size": 2,
            "num_workers": 0,
            "workers": 0,
            "valid_utterances": 2,
            "lr": 0.01,
            "warmup_updates": 0,
            **(POSITION if strategy == "mse_projected" else {}),
            **changes,
        }
        arguments = [str(HPARAMS / f"{strategy}.yaml"), "--noprogressbar", *options]
        for key, value in settings.items():
            arguments += [f"--{key}", str(value)]
        recipe("train")(arguments)
        return tmp_path / results / strategy / str(settings.get("seed", 1234))

    return run


@pytest.fixture
def evaluate(corpus, noises, pretrained, tmp_path, monkeypatch):
    """Run evaluate.py; returns the results folder."""
    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda source: Parrot())

    def run(systems, **changes):
        settings = {
            "run": json.dumps(systems),
            "results_folder": tmp_path / "results",
            "enhancer_weights": pretrained,
            "data_folder": corpus,
            "noise_folder": noises,
            "workers": 0,
            "num_workers": 0,
            "audio_examples": 2,
            **changes,
        }
        arguments = [str(HPARAMS / "evaluate.yaml")]
        for key, value in settings.items():
            arguments += [f"--{key}", str(value)]
        recipe("evaluate")(arguments)
        return tmp_path / "results"

    return run
