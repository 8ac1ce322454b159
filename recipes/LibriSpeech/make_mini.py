"""Make the LibriSpeech-mini folders of this recipe's results out of the official downloads.

    python recipes/LibriSpeech/make_mini.py --librispeech LibriSpeech --output_folder mini

Needs `test-clean` (346 MB) and `train-clean-100` (6.3 GB) from https://www.openslr.org/12.
`mini_ids.txt` lists which utterance goes where: train-mini (12 speakers of
test-clean), dev-mini and test-mini (40 utterances each of 2 other speakers
of test-clean), and train-untranscribed (one utterance of each speaker of
train-clean-100, as Ogg Opus, without transcript).
"""

import argparse
import os
import shutil
from pathlib import Path

import soundfile
from tqdm import tqdm

from pi_finetune.errors import UserError, command

SOURCES = {"train-untranscribed": "train-clean-100"}


@command
def main():
    """Copy or encode every listed utterance; a folder is renamed when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--librispeech", type=Path, required=True)
    parser.add_argument("--output_folder", type=Path, required=True)
    arguments = parser.parse_args()
    splits = {}
    for line in Path(__file__).with_name("mini_ids.txt").read_text().split("\n")[:-1]:
        split, utterance = line.split()
        splits.setdefault(split, []).append(utterance)
    for split, utterances in splits.items():
        source = arguments.librispeech / SOURCES.get(split, "test-clean")
        if not source.is_dir():
            raise UserError(f"--librispeech: {source} is no folder; get it from openslr.org/12.")
        make_split(source, arguments.output_folder / split, utterances)


def make_split(source, folder, utterances):
    """Fill one split from the official one."""
    if folder.exists():
        print(f"{folder}: is there")
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    encode = source.name == "train-clean-100"
    transcripts = {}
    for utterance in tqdm(utterances, desc=folder.name):
        speaker, chapter, _ = utterance.split("-")
        original = source / speaker / chapter / f"{utterance}.flac"
        if not original.is_file():
            raise UserError(f"{original}: missing from the official corpus.")
        target = temporary / speaker / chapter
        target.mkdir(parents=True, exist_ok=True)
        if encode:
            wav, rate = soundfile.read(original, dtype="float32")
            soundfile.write(target / f"{utterance}.ogg", wav, rate, format="OGG", subtype="OPUS")
        else:
            shutil.copyfile(original, target / original.name)
            listed = original.with_name(f"{speaker}-{chapter}.trans.txt").read_text().splitlines()
            text = next(line for line in listed if line.startswith(utterance + " "))
            transcripts.setdefault(target / f"{speaker}-{chapter}.trans.txt", []).append(text)
    for path, lines in transcripts.items():
        path.write_text("\n".join(lines) + "\n")
    os.replace(temporary, folder)


if __name__ == "__main__":
    main()
