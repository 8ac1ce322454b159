"""What a training leaves in TensorBoard and sends to Weights & Biases."""

import sys
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pi_finetune.brains.loggers import train_loggers
from pi_finetune.errors import UserError


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    events.Reload()
    return events


def test_tensorboard_holds_scores_audio_spectrograms_and_alignment_by_update(train):
    run = train("mse", log_examples=1)
    events = read(run)
    assert [e.step for e in events.Scalars("valid/si_sdr")] == [2, 4]
    (audio,) = {tag for tag in events.Tags()["audio"] if tag.endswith("/enhanced")}
    example = audio.removesuffix("/enhanced")
    for kind in ("noisy", "enhanced", "clean"):
        records = events.Audio(f"{example}/{kind}")
        assert [record.step for record in records] == [2, 4]
        assert records[0].sample_rate == 16000 and records[0].encoded_audio_string[:4] == b"RIFF"
    for kind in ("spectrograms", "alignment"):
        images = events.Images(f"{example}/{kind}")
        assert [image.step for image in images] == [2, 4] and min(images[0].height, 400) == 400
    # the numbers go on where they were after a resume
    train("mse", log_examples=1)
    assert [e.step for e in read(run).Scalars("valid/si_sdr")] == [2, 4]


def test_no_examples_are_logged_when_none_are_asked_for(train):
    run = train("mse", log_examples=0)
    assert not read(run).Tags()["audio"] and not read(run).Tags()["images"]


class Run:
    def __init__(self):
        self.logged = []

    def log(self, values, step=None):
        self.logged.append((step, values))


def test_one_key_logs_to_wandb_too(tmp_path, monkeypatch):
    runs, settings = [], []

    def init(**options):
        settings.append(options)
        runs.append(Run())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):  # the second time is a resume: the same W&B run
        *_, logger = train_loggers(tmp_path / "mse" / "1", "speech")
    logger.log_stats({"update": 50, "lr": 0.1}, {"objective": 2.0}, {"wer": 10.0})
    ((step, values),) = runs[-1].logged
    assert step == 50 and values["valid"] == {"wer": 10.0} and values["train"]["objective"] == 2.0
    assert settings[0]["project"] == "speech" and settings[0]["name"] == "mse/1"
    assert settings[0]["id"] == settings[1]["id"] and settings[0]["resume"] == "allow"
    train_loggers(tmp_path / "mse" / "2", "speech")
    assert settings[2]["id"] != settings[0]["id"]


def test_wandb_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb_project: the package wandb is not installed"):
        train_loggers(tmp_path, "speech")


def test_silence_and_very_short_speech_can_be_logged(tmp_path):
    *_, logger = train_loggers(tmp_path)
    wav = np.zeros(4000, np.float32)
    logger.log_example(1, "x", {"noisy": wav, "enhanced": wav, "clean": wav})
    assert len(read(tmp_path).Tags()["audio"]) == 3
