"""Golden curves: the losses and dev scores of 20 updates of each strategy, kept in tests/golden/.

    python tests/golden_curves.py               # write them anew, after a change that means to

The curves depend on no shipped file: corpus, noise, teacher and enhancer are generated from fixed
seeds, tiny, and not shared with other tests. They belong to the versions in constraints.txt.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import speechbrain as sb
import torch
from running import HPARAMS, recipe, validations
from synthetic import save_tiny_enhancer, save_tiny_teacher, voice, write_audio

GOLDEN = Path(__file__).resolve().parent / "golden"
UPDATES = 20
#: Every strategy, and what no strategy's file sets.
CASES = {
    "mse": {},
    "zero_pad": {},
    "zero_pad_heard": {},
    "soft_dtw": {},
    "soft_dtw_no_speed": {},
    "speed_mse": {},
    "zero_pad_soft_dtw": {},
    "mse_cnn": {},
    "mse_projected": {"position_seconds": 0.8, "position_rotations": 40},
    "si_sdr": {},
    "l1_stft": {},
    "soft_dtw.enhanced_branch": {"perturbed_branch": "enhanced"},
    "mse.signal_weight": {"signal_weight": 0.1},
}
SCORES = ("update", "lr", "train_objective", "objective", "si_sdr", "stoi", "pesq")


def make_world(folder):
    """Generate corpus, noise, teacher and enhancer; returns the settings that name them."""
    rng = np.random.default_rng(2601)
    for split, speakers, count in (("train", (100, 140, 190), 2), ("dev", (120, 170), 1)):
        for pitch in speakers:
            for i in range(count):
                wav = voice(rng.uniform(0.9, 1.3), pitch, rng)
                write_audio(folder / f"speech/{split}/{pitch}/1/{pitch}-1-{i:04d}.flac", wav)
    for i in range(6):
        hiss = 0.1 * rng.standard_normal(12000).astype(np.float32)
        write_audio(folder / f"noise/hiss-{i}.flac", hiss)
    save_tiny_teacher(folder / "teacher", seed=2602)
    save_tiny_enhancer(folder / "enhancer", seed=2603)
    return {
        "data_folder": folder / "speech",
        "noise_folder": folder / "noise",
        "teacher_source": folder / "teacher",
        "enhancer": f"!include:{quote(str(folder))}/enhancer/block.yaml",
        "enhancer_weights": folder / "enhancer",
    }


@contextlib.contextmanager
def losses_of_updates():
    """The list to which every training step adds its loss."""
    losses, fit_batch = [], sb.Brain.fit_batch

    def spy(self, batch):
        loss = fit_batch(self, batch)
        losses.append(float(loss))
        return loss

    sb.Brain.fit_batch = spy
    try:
        yield losses
    finally:
        sb.Brain.fit_batch = fit_batch


def curve(case, world, results, updates=UPDATES):
    """Train as a user does; returns the losses of all updates, and the scores of both validations.

    The first half of the updates is the same whatever ``updates`` is.
    """
    strategy = case.split(".")[0]
    settings = {
        **world,
        "results_folder": results,
        "asr_source": "null",
        "select_by": "si_sdr",
        "seed": 1,
        "updates": updates,
        "valid_every": UPDATES // 2,
        "segment_seconds": 0.8,
        "batch_size": 2,
        "valid_batch_size": 2,
        "valid_utterances": 2,
        "num_workers": 0,
        "lr": 0.01,
        "warmup_updates": 0,
        "log_examples": 0,
        **CASES[case],
    }
    words = [str(HPARAMS / f"{strategy}.yaml"), "--device", "cpu", "--noprogressbar"]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    with losses_of_updates() as losses:
        recipe("train")(words)
    records = validations(results / strategy / str(settings["seed"]))
    return {"losses": losses, "valid": [{key: r[key] for key in SCORES} for r in records]}


def main():
    """Write the curves of the cases named on the command line, or of all."""
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for case in sys.argv[1:] or CASES:
            found = curve(case, world, Path(folder) / case)
            (GOLDEN / f"{case}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
