"""Copy a corpus at 16 kHz: the same folders and file names, audio resampled, texts as they are.

    python recipes/resample.py VoiceBank-DEMAND-48k VoiceBank-DEMAND
    python recipes/resample.py DEMAND-48k DEMAND --pattern "*/ch01.wav"

Every file appears whole or not at all, and what is there is not made again: after an interruption
the same command continues.
"""

import argparse
import shutil
import sys
from pathlib import Path

import soundfile
import torch
import torchaudio
from joblib import Parallel, delayed
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, find_audio
from pi_finetune.errors import UserError, command
from pi_finetune.files import replacing

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
    add("--jobs", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
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
    for _ in tqdm(run(delayed(convert)(*pair) for pair in todo), total=len(todo), unit="file"):
        pass
    print(f"{target}: {len(todo)} files made, {len(files) - len(todo)} were there.")


def convert(source, target):
    """Write one file at 16 kHz, with 16 bits a sample."""
    try:
        wav, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise UserError(
            f"{source}: cannot be read as audio ({error}). Remove or replace the file."
        ) from None
    if wav.shape[1] != 1:
        raise UserError(f"{source}: has {wav.shape[1]} channels, needed is one. Split it first.")
    if rate != SAMPLE_RATE:
        torch.set_num_threads(1)  # one file a process
        signal = torch.from_numpy(wav[:, 0])
        wav = torchaudio.functional.resample(signal, rate, SAMPLE_RATE, **KAISER_BEST).numpy()
    kind = target.suffix[1:].upper()
    with replacing(target) as temporary:
        soundfile.write(temporary, wav, SAMPLE_RATE, subtype="PCM_16", format=kind)


if __name__ == "__main__":
    main(sys.argv[1:])
