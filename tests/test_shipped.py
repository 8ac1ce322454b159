"""The shipped models load with today's code and do something sensible."""

from pathlib import Path

import pytest
import torch

from pi_finetune.data.loading import load_pairs
from pi_finetune.enhancers import load_enhancer
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics
from pi_finetune.teacher import Teacher

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@pytest.fixture(scope="module")
def pairs():
    data = load_pairs(ASSETS / "mini/speech", ["test"], "test", ASSETS / "mini/noise", count=8)
    return [data[i] for i in range(len(data))]


def test_the_enhancer_enhances(pairs):
    enhancer = load_enhancer(ASSETS / "models/enhancer").eval()
    gains = []
    for pair in pairs:
        with torch.no_grad():
            enhanced = enhancer(pair["noisy"][None])[0]
        before, after = (
            metrics.si_sdr(pair["clean"].numpy(), wav.numpy()) for wav in (pair["noisy"], enhanced)
        )
        gains.append(after - before)
    assert sum(gains) / len(gains) > 3


def test_the_recogniser_hears_words(pairs):
    recognizer = load_recognizer(ASSETS / "models/asr")
    words = []
    for pair in pairs:
        text = recognizer(Waveforms.of(pair["clean"][None]))[0]
        words.append(metrics.word_errors(pair["text"], text))
    assert metrics.wer(words) < 90


def test_the_teacher_hears_speech_in_noise(pairs):
    """Frames are nearer to those of the same utterance in noise than to those of another."""
    teacher = Teacher(str(ASSETS / "models/teacher"))

    def frames(wav):
        reps, _ = teacher(wav[None, :24000], torch.tensor([24000]))
        return reps[0]

    same = [(frames(p["clean"]) - frames(p["noisy"])).square().mean() for p in pairs]
    other = [
        (frames(p["clean"]) - frames(q["noisy"])).square().mean()
        for p, q in zip(pairs, pairs[1:] + pairs[:1])
    ]
    assert sum(same) < 0.8 * sum(other)
