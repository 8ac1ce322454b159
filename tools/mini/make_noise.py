"""Make a folder of many kinds of noise, to train an enhancer or to try one.

    python tools/mini/make_noise.py --speech_folder LibriSpeech --splits train-clean-100 \
        --recorded noise --output_folder noise-train

It holds computed noise (the kinds of the mini corpus but its babble), babble of 2, 4 and 8
talkers of the named splits as three classes, and links to recorded noises, if given.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import noises
import numpy as np
import soundfile as sf
from synthesize import COLORS, generator
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, find_audio, read_audio
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.errors import UserError, command
from pi_finetune.seeding import utterance_rng

TALKERS = (2, 4, 8)
KINDS = (*COLORS, "hum", "impulsive", "music")


@command
def main(argv=None):
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech_folder", required=True, help="who talks in the babble")
    parser.add_argument("--splits", nargs="+", required=True, help="of the speech folder")
    parser.add_argument("--recorded", help="a folder of recorded noises, to link to")
    parser.add_argument("--leave_out", nargs="+", default=[], help="classes of the recorded noises")
    parser.add_argument("--output_folder", required=True, help="a new folder")
    parser.add_argument("--recordings", type=int, default=40, help="of each class")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each recording")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)

    folder = Path(args.output_folder)
    if folder.exists():
        raise UserError(f"--output_folder: {folder} exists; name a new folder.")
    speakers = {}
    for entry in prepare_speech(args.speech_folder, args.splits).values():
        speakers.setdefault(entry["speaker"], []).append(entry["wav"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Half a folder must not be taken for a whole one, by a training that is started too early.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "noise"
        (new / "made").mkdir(parents=True)
        if args.recorded:
            _link(Path(args.recorded), new / "recorded", args.leave_out)
        _make(new / "made", speakers, args)
        os.rename(new, folder)


def _link(recorded, folder, leave_out):
    """Link to recorded noises, but for some classes."""
    for path in find_audio(recorded):
        if path.stem.split("-")[0] not in leave_out:
            link = folder / path.relative_to(recorded)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), link)


def _make(folder, speakers, args):
    """Write the computed noises and the babble."""
    names = [*KINDS, *(f"babble{count}" for count in TALKERS)]
    for name in tqdm(names, desc="noise", unit="class"):
        for number in range(args.recordings):
            stem = f"{name}-{number:03d}"
            rng = utterance_rng(args.seed, 0, stem, "noise")
            if name in KINDS:
                samples = generator(name, rng)(rng, args.seconds)
            else:
                count = int(name.removeprefix("babble"))
                talkers = [_talk(rng, speakers, args.seconds) for _ in range(count)]
                samples = noises.babble(rng, args.seconds, talkers)
            sf.write(folder / f"{stem}.flac", samples, SAMPLE_RATE)


def _talk(rng, speakers, seconds):
    """``seconds`` of utterances of one speaker, back to back, any of them more than once."""
    names = sorted(speakers)
    files = speakers[names[rng.integers(len(names))]]
    pieces, have = [], 0
    while have < seconds * SAMPLE_RATE:
        pieces.append(read_audio(files[rng.integers(len(files))]).numpy())
        have += len(pieces[-1])
    return np.concatenate(pieces)


if __name__ == "__main__":
    main(sys.argv[1:])
