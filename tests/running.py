"""Running recipes in the tests, and reading what they leave."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HPARAMS = ROOT / "hparams"
STRATEGIES = (
    "mse", "zero_pad", "zero_pad_heard", "soft_dtw", "soft_dtw_no_speed", "speed_mse",
    "zero_pad_soft_dtw", "mse_cnn", "mse_projected", "si_sdr", "l1_stft", "pretrain_enhancer",
    "enhance",
)  # fmt: skip


def recipe(name):
    """The ``main`` of a recipe, in this process: importing PyTorch again takes seconds."""
    return importlib.import_module(f"pi_finetune.recipes.{name}").main


def validations(run):
    return [json.loads(line) for line in (run / "valid.jsonl").read_text().splitlines()]


def scores(run):
    return [json.loads(line) for line in (run / "scores" / "test.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Script:
    """Python code in the place of an ablation's call."""

    code: str
    settings: dict

    def words(self):
        return ["script", "yaml", *(w for k, v in self.settings.items() for w in (f"--{k}", v))]

    def __call__(self):
        exec(self.code, {})


class Parrot:
    """A recogniser that says of each third of an utterance how loud it is, as one of seven words.

    A step of a decibel is another word, so noisy, enhanced and clean speech, two utterances, and
    what is heard beyond the end of an utterance all differ.
    """

    name, unit = "parrot", "word"
    words = "one two three four five six seven".split()

    def __call__(self, wavs):
        return [self._say(wav.double()) for wav in wavs.items()]

    def _say(self, wav):
        levels = [10 * part.square().mean().clamp(min=1e-10).log10() for part in wav.chunk(3)]
        return " ".join(self.words[round(float(level)) % 7] for level in levels)


class LikelyParrot(Parrot):
    """One that finds a transcript the less likely the louder it is: nats depend on the waveform."""

    def nll(self, wavs, texts):
        levels = [float(wav.square().mean()) for wav in wavs.items()]
        return [(1 + level, len(text.split())) for level, text in zip(levels, texts, strict=True)]
