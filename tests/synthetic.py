"""Audio files for the tests."""

import numpy as np
import torch
from speechbrain.dataio import audio_io


def voice(seconds, pitch, rng):
    """A buzz with syllables and formants: enough speech for PESQ, STOI and a teacher to accept."""
    time = np.arange(int(seconds * 16000)) / 16000
    wav = sum(
        np.sin(2 * np.pi * pitch * k * time) * np.exp(-(((pitch * k - f) / 300) ** 2))
        for k in range(1, 25)
        for f in rng.uniform(300, 3000, size=3)
    )
    wav = wav * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time + rng.uniform(0, 6)))
    wav = wav + 0.01 * rng.standard_normal(len(time))
    return (0.3 * wav / np.abs(wav).max()).astype(np.float32)


def write_audio(path, wav, rate=16000):
    """Write [T] or [C, T] as the suffix of ``path`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio_io.save(str(path), torch.as_tensor(np.atleast_2d(wav)), rate)
