"""The tool that chooses a mix, and tests an enhancer, by likelihood."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pi_finetune.config import asset_folder
from pi_finetune.results.statistics import bootstrap_ratio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import choose_mix


def test_draws_of_one_utterance_are_no_further_utterances():
    rng = np.random.default_rng(0)
    nats, tokens = rng.normal(size=12), rng.integers(5, 20, 12)
    names = np.array([f"speaker-{i:02}" for i in range(12)])
    once = choose_mix._change(nats, tokens, names)
    assert once == bootstrap_ratio(nats, tokens)
    assert once.low < once.estimate < once.high
    order = rng.permutation(36)
    thrice = choose_mix._change(*(np.tile(each, 3)[order] for each in (nats, tokens, names)))
    assert vars(thrice) == pytest.approx(vars(once))


def table(capsys, options):
    """The lines of a table of the shipped mini corpus."""
    models, mini = Path(asset_folder()) / "models", Path(asset_folder()) / "mini"
    arguments = ["--enhancer", models / "enhancer_mini", "--asr_source", models / "asr"]
    arguments += ["--data_folder", mini / "speech", "--noise_folder", mini / "noise"]
    choose_mix.main([str(each) for each in [*arguments, *options.split()]])
    return capsys.readouterr().out.splitlines()


def test_table_of_draws(capsys):
    lines = table(capsys, "--splits dev* --count 2 --each_snr --snrs 0 20 --draws 2 --mixes 0 1")
    groups = [line for line in lines if "mixtures" in line]
    assert [line.split(",")[0] for line in groups] == [
        "0 dB: 4 mixtures",
        "20 dB: 4 mixtures",
        "up to 0 dB: 4 mixtures",
        "from 5 dB: 4 mixtures",
        "all: 8 mixtures",
    ]
    shares = [line for line in lines if line.startswith("  mix")]
    assert all("+0.000 [+0.000, +0.000]" in line for line in shares[::2])  # the input as it is
    assert not any("+0.000 [" in line for line in shares[1::2])


def test_each_split_has_a_table(capsys):
    lines = table(capsys, "--splits dev test --count 1 --each_snr --snrs 0 --mixes 0.8")
    found = [line.split(" mixtures")[0] for line in lines if "mixtures" in line]
    assert found == [
        *("dev, 0 dB: 1", "dev, up to 0 dB: 1", "dev, all: 1"),
        *("test, 0 dB: 1", "test, up to 0 dB: 1", "test, all: 1"),
        *("0 dB: 2", "up to 0 dB: 2", "all: 2"),
    ]
