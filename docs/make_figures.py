"""Compute and draw the figures of docs/method.md, from the shipped models and corpus.

python docs/make_figures.py
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration

from pi_finetune.config import asset_folder
from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.diagnostics import content_free_similarity, load_crops, shift_curve
from pi_finetune.objectives import SoftDTWDistance, WarpedMSEDistance
from pi_finetune.perturbations import SpeedPerturbation, ZeroPadding
from pi_finetune.seeding import utterance_rng
from pi_finetune.soft_dtw import alignment, soft_dtw
from pi_finetune.teacher import Teacher, quiet_transformers

GAMMA = 0.1
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "pi_finetune",  # with no date: the same figure is the same file
    "svg.fonttype": "path",
}


def main(argv=None):
    """Draw all figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_folder", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--utterances", type=int, default=24)
    args = parser.parse_args(argv)
    args.output_folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    teacher = Teacher(f"{asset_folder()}/models/teacher")
    crops = load_crops(f"{asset_folder()}/mini/speech", ["dev*", "test*"], 2.5, args.utterances)
    with torch.no_grad(), matplotlib.rc_context(STYLE):
        for draw in (position, remedies, divergence, speed):
            figure = draw(teacher, crops.wavs)
            path = args.output_folder / f"{draw.__name__}.svg"
            figure.savefig(path, metadata={"Date": None})
            print(path)


def position(teacher, wavs):
    """Position in the last layer: of the shipped teacher, and of a code of position alone."""
    figure = Figure(figsize=(7, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, model in (
        ("HuBERT (shipped)", teacher),
        ("Whisper's encoder, untrained", untrained_whisper(wavs)),
    ):
        curve = shift_curve(model, wavs, shifts=np.arange(0, 1.3, 0.2), layers=-1)
        left.plot([c["shift"] for c in curve], [c["ratio"] for c in curve], label=name)
        curve, _ = content_free_similarity(model, wavs, layers=-1)
        right.plot([c["offset"] for c in curve], [c["similarity"] for c in curve], label=name)
    left.set(xlabel="the same speech, moved by (s)", ylabel="distance to itself, relative")
    right.set(xlabel="difference of position (s)", ylabel="similarity of unrelated frames")
    left.legend()
    return figure


def untrained_whisper(wavs):
    """A teacher with Whisper's sinusoidal positions and random weights: it knows little else."""
    frames = -(-wavs.shape[1] // 320) + 100  # the longest move is longer than a second
    config = WhisperConfig(
        d_model=96, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=192,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=64,
        max_source_positions=frames, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            WhisperForConditionalGeneration(config).save_pretrained(folder)
        return Teacher(folder)


def remedies(teacher, wavs):
    """What each strategy compares: waveforms above, pairs of frames below."""
    clean, lengths = wavs[:1], torch.tensor([wavs.shape[1]])
    rngs = [utterance_rng(8, 0, "figure", "perturbation")]
    padded = ZeroPadding(max_seconds=0.8)(clean, lengths, rngs)
    fast = SpeedPerturbation([1.1])(clean, lengths, rngs)
    x, x_lengths = frames(teacher, clean)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots(2, 3, height_ratios=[1, 2.2])
    count = int(x_lengths)
    columns = (
        ("mse", clean, 0),
        ("zero_pad", padded.data, int(padded.content_start)),
        ("soft_dtw", fast.data, 0),
    )
    for (name, wav, start), above, below in zip(columns, *axes):
        time = np.arange(wav.shape[1]) / SAMPLE_RATE
        above.plot(time, wav[0], linewidth=0.3, color="C0", rasterized=True)
        stop = start + (fast.data if name == "soft_dtw" else clean).shape[1]
        above.axvspan(start / SAMPLE_RATE, stop / SAMPLE_RATE, color="C1", alpha=0.15, linewidth=0)
        above.set(title=name, yticks=[], xlim=(0, padded.data.shape[1] / SAMPLE_RATE))
        if name == "soft_dtw":
            y, y_lengths = frames(teacher, fast.data)
            weights = alignment(x, y, x_lengths, y_lengths, gamma=GAMMA)[0].numpy()
        else:  # frame k of the enhanced speech with frame k of the content
            offset = start // teacher.hop
            total = (padded.data.shape[1] if start else clean.shape[1]) // teacher.hop
            weights = np.zeros((count, total))
            weights[np.arange(count), offset + np.arange(count)] = 1
        seconds = teacher.hop / SAMPLE_RATE
        below.imshow(
            weights, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto",
            extent=(0, weights.shape[1] * seconds, 0, count * seconds),
        )  # fmt: skip
        below.plot([0, count * seconds], [0, count * seconds], ":", color="gray", linewidth=0.8)
        below.set(xlabel="clean branch (s)", xlim=above.get_xlim())
    axes[0, 0].set_ylabel("clean branch")
    axes[1, 0].set_ylabel("enhanced (s)")
    return figure


def divergence(teacher, wavs):
    """Soft-DTW of a sequence and a blurred copy of itself, plain and as a divergence."""
    figure = Figure(figsize=(7, 2.7), layout="constrained")
    axes = figure.subplots(1, 2)
    x, lengths = frames(teacher, wavs[:4])
    widths = np.arange(1, 12, 2)
    blurred = [
        F.normalize(F.avg_pool1d(x.mT, int(w), 1, int(w) // 2, count_include_pad=False).mT, dim=-1)
        for w in widths
    ]
    for ax, title, option in zip(axes, ("plain", "divergence"), (False, True)):
        for gamma in (0.05, 0.1, 0.2):
            values = [
                soft_dtw(y, x, lengths, lengths, gamma=gamma, divergence=option) / lengths
                for y in blurred
            ]
            ax.plot(widths, [v.mean() for v in values], ".-", label=f"gamma {gamma}")
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set(title=title, xlabel="blurred over (frames)", ylabel="loss per frame")
    axes[1].legend()
    return figure


def speed(teacher, wavs):
    """Distance of an utterance to itself at other speeds, over that to another utterance."""
    figure = Figure(figsize=(5, 2.7), layout="constrained")
    ax = figure.subplots()
    wavs = wavs[: 2 * (len(wavs[:12]) // 2)]
    x, lengths = frames(teacher, wavs)
    factors = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
    for name, distance in (
        ("soft-DTW divergence", SoftDTWDistance(gamma=GAMMA)),
        ("MSE after a linear warp", WarpedMSEDistance()),
    ):
        other = distance(x, lengths, x.flip(0), lengths).mean()
        values = []
        for factor in factors:
            count = torch.full((len(wavs),), wavs.shape[1])
            perturbed = SpeedPerturbation([factor])(
                wavs, count, [np.random.default_rng(0)] * len(wavs)
            )
            y, y_lengths = frames(teacher, perturbed.data)
            values.append(distance(x, lengths, y, y_lengths).mean() / other)
        ax.plot(factors, values, ".-", label=name)
    ax.axhline(1, color="gray", linewidth=0.8)
    ax.set(xlabel="speed of the same speech", ylabel="distance, relative", ylim=(0, 1.05))
    ax.legend(loc="center right")
    return figure


def frames(teacher, wavs):
    """Frames of equally long wavs [B, T], of length 1, and their numbers [B]."""
    reps, lengths = teacher(wavs, torch.full((len(wavs),), wavs.shape[1]))
    return F.normalize(reps, dim=-1), lengths


if __name__ == "__main__":
    main()
