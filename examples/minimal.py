"""One step of soft-DTW fine-tuning, from a clean and a noise file, with the public API alone.

python examples/minimal.py [CLEAN.wav NOISE.wav]        # 16 kHz; without files they are made up
"""

import sys
from pathlib import Path

import numpy as np
import torch

from pi_finetune import (
    RepresentationObjective,
    SoftDTWDistance,
    SpeedPerturbation,
    Teacher,
    Waveforms,
    load_enhancer,
)
from pi_finetune.data.audio import read_audio

MODELS = Path(__file__).resolve().parents[1] / "assets" / "models"


def main(files=()):
    """Returns the loss [B] before the step and after it."""
    torch.manual_seed(0)
    if files:
        clean, noise = (read_audio(path) for path in files)
    else:
        time = torch.arange(32000) / 16000
        clean = 0.3 * torch.sin(2 * torch.pi * (150 + 60 * time) * time)
        clean, noise = clean * torch.sin(9 * time).abs(), 0.05 * torch.randn(32000)
    noise = noise.repeat(-(-len(clean) // len(noise)))[: len(clean)]

    # A batch of two utterances of unequal lengths; lengths are whole numbers of samples.
    rows = [clean, clean[: len(clean) // 2]]
    clean = Waveforms.collate(rows)
    noisy = Waveforms.collate([row + noise[: len(row)] for row in rows])

    enhancer = load_enhancer(MODELS / "enhancer").train()
    teacher = Teacher(MODELS / "teacher", layers=-1)  # frozen; gradient flows through it
    objective = RepresentationObjective(
        teacher, SoftDTWDistance(gamma=0.1), SpeedPerturbation([0.9, 1.0, 1.1])
    )
    optimizer = torch.optim.AdamW(enhancer.parameters(), lr=3e-4)
    losses = []
    for _ in range(2):
        rngs = [np.random.default_rng(i) for i in range(2)]  # one for each utterance
        loss = objective(enhancer(noisy), clean, rngs=rngs)  # [B]
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    print(f"loss {losses[0].mean():.4f}, after one step {losses[1].mean():.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1:])
