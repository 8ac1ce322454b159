"""Copy a corpus at 16 kHz: the same folders and file names, audio resampled, texts as they are.

    python recipes/resample.py VoiceBank-DEMAND-48k VoiceBank-DEMAND
    python recipes/resample.py DEMAND-48k DEMAND --pattern "*/ch01.wav"
    python recipes/resample.py STEREO MONO --channel 1

Of several channels the mean is taken, or the one that ``--channel`` names, from 1.

Every file appears whole or not at all, and what is there is not made again: after an interruption
the same command continues.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from joblib import Parallel, delayed
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, find_audio
from pi_finetune.errors import UserError, command
from pi_finetune.files import replacing, why_not_written

# What torchaudio's documentation gives as the equal of librosa's "kaiser_best".
KAISER_BEST = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}


@command
def main(argv):
    """Convert what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, help="a corpus folder")
    add("target", type=Path, help="the new folder")
    add("--pattern", default="*", help="paths in the corpus to convert, default: all")
    add("--channel", type=int, help="the channel to take, from 1; default: the mean of all")
    add("--jobs", type=int, default=1, help="processes (%(default)s); -1: one a core")
    args = parser.parse_args(argv)
    if args.jobs < -1 or args.jobs == 0:
        raise UserError(f"--jobs {args.jobs}: give the number of processes, or -1 for one a core.")
    if args.channel is not None and args.channel < 1:
        raise UserError(f"--channel {args.channel}: channels count from 1.")
    source, target = args.source.resolve(), args.target.resolve()
    if target.is_relative_to(source):
        raise UserError(f"target: {args.target} lies in {args.source}. Name a folder outside it.")
    files = [p for p in find_audio(source) if p.relative_to(source).match(args.pattern)]
    if not files:
        raise UserError(f"{args.source}: no audio file matches --pattern {args.pattern!r}.")
    for text in sorted(source.rglob("*.txt")):
        copy = target / text.relative_to(source)
        if not copy.exists():
            with replacing(copy) as temporary:
                shutil.copyfile(text, temporary)
    todo = [(p, target / p.relative_to(source)) for p in files]
    todo = [pair for pair in todo if not pair[1].exists()]
    run = Parallel(n_jobs=args.jobs, return_as="generator_unordered")
    for _ in tqdm(
        run(delayed(convert)(*pair, args.channel) for pair in todo), total=len(todo), unit="file"
    ):
        pass
    print(f"{target}: {len(todo)} files made, {len(files) - len(todo)} were there.")


def convert(source, target, channel=None):
    """Write one file at 16 kHz, with 16 bits a sample: a channel, or the mean of all."""
    try:
        wav, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UserError(
            f"{source}: cannot be read as audio ({error}). Remove or replace the file."
        ) from None
    if channel is not None and channel > wav.shape[1]:
        raise UserError(f"{source}: --channel {channel} is not there; it has {wav.shape[1]}.")
    wav = wav.mean(axis=1) if channel is None else wav[:, channel - 1]
    if rate != SAMPLE_RATE:
        torch.set_num_threads(1)  # one file a process
        signal = torch.from_numpy(np.ascontiguousarray(wav))
        wav = torchaudio.functional.resample(signal, rate, SAMPLE_RATE, **KAISER_BEST).numpy()
    try:
        with replacing(target) as temporary:
            soundfile.write(temporary, wav, SAMPLE_RATE, **_encoding(target))
    except (OSError, AssertionError, soundfile.SoundFileError) as error:
        raise UserError(why_not_written(target, error)) from error


def _encoding(target):
    """Format and subtype; the lossy ones have no 16 bits a sample."""
    kind = target.suffix[1:].upper()
    if kind == "OPUS":
        return {"format": "OGG", "subtype": "OPUS"}
    return {"format": kind, "subtype": "PCM_16" if kind in ("WAV", "FLAC") else None}


if __name__ == "__main__":
    main(sys.argv[1:])
