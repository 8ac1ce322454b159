"""Make the mini corpus: about 20 minutes of synthesised speech, and noise.

    python tools/mini/synthesize.py --output_folder assets/mini --seed 1234

Speech comes out in LibriSpeech's layout, noise as one folder of CLASS-NNN.ogg. The
same seed and engine versions give the same files, byte for byte. An earlier
``speech`` or ``noise`` folder is replaced only when the new one is complete.

    python tools/mini/synthesize.py --output_folder assets/mini --only speech --speakers 302 304

has these speakers speak anew and keeps the files of the others, of which pico's are never the same
twice.

    python tools/mini/synthesize.py --output_folder more --seed 1234 --more 3000

makes instead hours of speech by many voices, for a recogniser: ``more/speech`` with the training
split alone. No test or dev voice speaks in it, and none of their sentences is said.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import struct
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import noises
import numpy as np
import soundfile as sf
from grammar import VOCABULARY, sentences
from tqdm import tqdm
from voices import MORE_VOICES, SAMPLE_RATE, VOICES, require_engines, speak, varied

from pi_finetune.brains.recognition import transcribe_set
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.errors import UserError, command
from pi_finetune.files import replacing, write_text
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results.metrics import wer
from pi_finetune.seeding import utterance_rng

SPLITS = ("train", "dev", "test")
NOISE_SECONDS = 24.0
RECORDINGS = 6
BABBLE_SENTENCES = 360
# soundfile's 0 to 1; 0.9 is about 32 kbit/s, transparent to the ear for 16 kHz mono.
OPUS_COMPRESSION = 0.9
COLORS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
NOISES = ("babble", *COLORS, "hum", "impulsive", "music")


@command
def main(argv=None):
    """Make what is asked for, each part in a temporary folder that is renamed at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_folder", default="assets/mini")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--only", choices=("speech", "noise"), help="leave the other part as it is")
    parser.add_argument("--speakers", nargs="+", help="who speaks anew. Default: all")
    parser.add_argument(
        "--more", type=int, metavar="N", help="N training utterances of many voices, nothing else"
    )
    parser.add_argument(
        "--measure",
        metavar="ASR",
        help="only: word errors of this recogniser on dev and test voices",
    )
    parser.add_argument("--processes", type=int, default=1, help="with --more. Default: 1")
    args = parser.parse_args(argv)

    folder = Path(args.output_folder)
    if args.measure is not None:
        measure(folder, args.measure)
        write_readme(folder)
        return
    versions = require_engines()  # babble is spoken too
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_folder: {folder} is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    texts = split_texts(args.seed)
    if args.speakers:
        missing = set(args.speakers) - {voice.speaker for voice in texts if voice is not None}
        if missing or not (folder / "speech").is_dir():
            raise UserError(
                f"--speakers: {', '.join(sorted(missing) or args.speakers)}: no such voice, or no "
                f"speech in {folder} of which the others could be kept."
            )
    if args.more is not None:
        make_more(folder, texts, args.seed, args.more, args.processes)
        return
    speak_anew = partial(make_speech, old=folder / "speech", anew=args.speakers)
    for part, make in (("speech", speak_anew), ("noise", make_noise)):
        if args.only not in (None, part):
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{part}-") as temporary:
            new = Path(temporary) / part
            new.mkdir()
            facts = {"seed": args.seed, "engines": versions, **make(new, texts, args.seed)}
            write_text(new / "about.json", json.dumps(facts, indent=2) + "\n")
            if (folder / part).exists():
                os.rename(folder / part, Path(temporary) / "old")
            os.rename(new, folder / part)
    write_readme(folder)


def split_texts(seed, voices=VOICES):
    """Return ``{voice: its sentences}``, no sentence twice, and every word in train.

    ``None`` stands for the crowd in the babble, whose sentences are nobody else's.
    """
    rng = np.random.default_rng(seed)
    texts, used = {}, set()
    for split in SPLITS:
        members = [voice for voice in voices if voice.split == split]
        drawn = sentences(rng, sum(voice.utterances for voice in members), used)
        used.update(drawn)
        if split == "train":
            missing = VOCABULARY - {word for text in drawn for word in text.split()}
            if missing:
                raise UserError(
                    f"--seed {seed}: the training sentences lack {', '.join(sorted(missing))}; "
                    "take another seed."
                )
        # The rarest words are drawn first: no voice is to have them all.
        drawn = [drawn[i] for i in rng.permutation(len(drawn))]
        for voice in members:
            texts[voice], drawn = drawn[: voice.utterances], drawn[voice.utterances :]
    texts[None] = sentences(rng, BABBLE_SENTENCES, used)
    return texts


def make_speech(folder, texts, seed, old=None, anew=None):
    """Write every utterance and transcript into ``folder``; return what is worth knowing.

    Where speakers are named to speak ``anew``, the files of all others are copied from ``old``.
    """
    facts = {split: {"speakers": 0, "utterances": 0, "minutes": 0.0} for split in SPLITS}
    speakers = ["; ID | SEX | SUBSET | MINUTES | NAME (engine and voice)"]
    voices = [voice for voice in texts if voice is not None]
    with tqdm(total=sum(len(texts[v]) for v in voices), desc="speech", unit="utt") as progress:
        for voice in voices:
            chapter = folder / voice.split / voice.speaker / "1"
            chapter.mkdir(parents=True)
            seconds, lines = 0.0, []
            for number, text in enumerate(texts[voice]):
                name = f"{voice.speaker}-1-{number:04d}"
                path = chapter / f"{name}.ogg"
                if anew and voice.speaker not in anew:
                    shutil.copyfile(old / path.relative_to(folder), path)
                else:
                    rng = utterance_rng(seed, 0, name, "synthesis")
                    write_opus(path, utterance(voice, text, rng))
                lines.append(f"{name} {text}\n")
                seconds += sf.info(path).duration
                progress.update()
            write_text(chapter / f"{voice.speaker}-1.trans.txt", "".join(lines))
            speakers.append(
                f"{voice.speaker} | {voice.sex} | {voice.split:5} | {seconds / 60:5.2f} | {voice}"
            )
            facts[voice.split]["speakers"] += 1
            facts[voice.split]["utterances"] += len(lines)
            facts[voice.split]["minutes"] += seconds / 60
    write_text(folder / "SPEAKERS.TXT", "\n".join(speakers) + "\n")
    counts = Counter(w for v in voices if v.split == "train" for t in texts[v] for w in t.split())
    facts["vocabulary"] = {"words": len(counts), "fewest uses in train": min(counts.values())}
    return facts


def make_more(folder, texts, seed, count, processes):
    """Write ``count`` training utterances; those of an interrupted run are kept."""
    rng = np.random.default_rng(seed)
    held_out = {
        line for voice, lines in texts.items() if voice and voice.split != "train" for line in lines
    }
    lines = sentences(rng, count, held_out, candidates=20)
    voices = [v for v in VOICES if v.split == "train"]
    # Half of the speech is by voices of real speakers, of which there are few.
    human = [v for v in voices if v.engine != "espeak-ng"]
    robots = [v for v in (*voices, *MORE_VOICES) if v.engine == "espeak-ng"]
    human += [v for v in MORE_VOICES if v.engine != "espeak-ng"] * 2
    jobs, texts_of = [], {}
    for number, text in enumerate(lines):
        group = human if number % 2 else robots
        voice = group[number // 2 % len(group)]
        name = f"{voice.speaker}-1-{number:05d}"
        jobs.append((folder / "speech" / "train" / voice.speaker / "1", name, voice, text, seed))
        texts_of.setdefault(voice.speaker, []).append(f"{name} {text}\n")
    for chapter in {job[0] for job in jobs}:
        chapter.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(processes) as pool:
        list(tqdm(pool.imap_unordered(_one_more, jobs, 8), total=count, desc="speech", unit="utt"))
    for speaker, said in texts_of.items():
        chapter = folder / "speech" / "train" / speaker / "1"
        write_text(chapter / f"{speaker}-1.trans.txt", "".join(said))


def _one_more(job):
    chapter, name, voice, text, seed = job
    path = chapter / f"{name}.flac"
    if not path.exists():
        rng = utterance_rng(seed, 0, name, "more")
        with replacing(path) as temporary:
            samples = utterance(varied(voice, rng), text, rng)
            sf.write(temporary, samples, SAMPLE_RATE, format="FLAC")


def utterance(voice, text, rng):
    """Return ``text`` as this voice may have recorded it: float32 [T], 16 kHz.

    Rate varies by 8 %, pitch by 6 %, level by 3 dB around -26 dBFS (all uniform). Before
    and after speech are 0.1 to 0.3 s of a noise floor 46 dB below it: real recordings have
    one, and gradients through digital silence are unbounded.
    """
    speech = speak(voice, text, rate=rng.uniform(0.92, 1.08), pitch=rng.uniform(0.94, 1.06))
    before, after = (round(rng.uniform(0.1, 0.3) * SAMPLE_RATE) for _ in range(2))
    samples = np.pad(noises.set_level(speech, 0.0, peak=np.inf), (before, after))
    samples += 10 ** (-46 / 20) * rng.standard_normal(len(samples))
    return noises.set_level(samples, rng.uniform(-29, -23))


def make_noise(folder, texts, seed):
    """Write `RECORDINGS` recordings of each noise class into ``folder``."""
    talkers = [voice for voice in texts if voice is not None and voice.split == "train"]
    with tqdm(total=len(NOISES) * RECORDINGS, desc="noise", unit="file") as progress:
        for kind in NOISES:
            for number in range(RECORDINGS):
                rng = utterance_rng(seed, 0, f"{kind}-{number:03d}", "noise")
                if kind == "babble":
                    samples = crowd(rng, talkers, texts[None][number::RECORDINGS])
                else:
                    samples = generator(kind, rng)(rng, NOISE_SECONDS)
                write_opus(folder / f"{kind}-{number:03d}.ogg", samples)
                progress.update()
    minutes = len(NOISES) * RECORDINGS * NOISE_SECONDS / 60
    return {"classes": list(NOISES), "recordings": RECORDINGS, "minutes": minutes}


def generator(kind, rng):
    """Return the generator of a noise class with parameters of its own for one recording."""
    if kind in COLORS:
        exponent = COLORS[kind] + rng.uniform(-0.1, 0.1)
        return partial(noises.colored, exponent=exponent, drift_db=rng.uniform(0, 3))
    if kind == "hum":
        return partial(noises.hum, mains=rng.choice([50.0, 60.0]))
    return getattr(noises, kind)


def crowd(rng, voices, texts):
    """Return babble of four to eight of ``voices``, who share out ``texts`` among themselves."""
    count = min(int(rng.integers(4, 9)), len(voices), len(texts))
    chosen = rng.choice(len(voices), size=count, replace=False)
    return noises.babble(
        rng,
        NOISE_SECONDS,
        [
            np.concatenate([speak(voices[who], text) for text in texts[place::count]])
            for place, who in enumerate(chosen)
        ],
    )


def write_opus(path, samples):
    """Write ``samples`` [T] as Ogg Opus, with a stream number that depends on nothing but the name.

    The encoder's library draws the number at random, which would make two runs differ.
    """
    path = Path(path)
    sf.write(
        path,
        samples,
        SAMPLE_RATE,
        format="OGG",
        subtype="OPUS",
        compression_level=OPUS_COMPRESSION,
    )
    data, at = bytearray(path.read_bytes()), 0
    number = sum(path.stem.encode()) & 0xFFFFFFFF
    while at < len(data):  # RFC 3533: a page is a 27-byte header, its lacing values, its body
        segments = data[at + 26]
        size = 27 + segments + sum(data[at + 27 : at + 27 + segments])
        data[at + 14 : at + 18] = struct.pack("<I", number)
        data[at + 22 : at + 26] = bytes(4)
        data[at + 22 : at + 26] = struct.pack("<I", _crc(data[at : at + size]))
        at += size
    path.write_bytes(data)


def _crc_table():
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_CRC = _crc_table()


def _crc(data):
    """Ogg's CRC-32: polynomial 0x04c11db7, no reflection, from zero."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ _CRC[value >> 24 ^ byte]
    return value


def measure(folder, source):
    """Add to ``about.json`` what a recogniser gets wrong of the clean speech of each voice."""
    recognizer = load_recognizer(source)
    manifest = prepare_speech(folder / "speech", ["dev", "test"])
    errors = {}
    for record in transcribe_set(recognizer, manifest):
        errors.setdefault(manifest[record["id"]]["speaker"], []).append(record)
    path = folder / "speech" / "about.json"
    about = json.loads(path.read_text())
    rates = {speaker: round(wer(records), 1) for speaker, records in sorted(errors.items())}
    about["word errors"] = {"recogniser": recognizer.name, "percent": rates}
    write_text(path, json.dumps(about, indent=2) + "\n")


def write_readme(folder):
    """Write the README from the ``about.json`` of the parts that are there."""
    text = [_README_HEAD]
    about = {
        part: json.loads((folder / part / "about.json").read_text())
        for part in ("speech", "noise")
        if (folder / part).is_dir()
    }
    if speech := about.get("speech"):
        text.append("\n## Speech\n\n| split | speakers | utterances | minutes |\n|---|---|---|---|")
        for split in SPLITS:
            row = speech[split]
            text.append(
                f"| {split} | {row['speakers']} | {row['utterances']} | {row['minutes']:.1f} |"
            )
        text.append(
            f"\n{speech['vocabulary']['words']} words, each at least "
            f"{speech['vocabulary']['fewest uses in train']} times in train. No sentence is in two "
            "splits, no\nspeaker either. `speech/SPEAKERS.TXT` says which engine and voice a "
            "speaker is."
        )
        if heard := speech.get("word errors"):
            text.append(
                f"\nWord errors of {heard['recogniser']} on the clean speech of each dev and test "
                "voice\n(`--measure` of the script):\n\n| speaker | voice | WER |\n|---|---|---|"
            )
            names = {voice.speaker: f"{voice.split}: {voice}, {voice.sex}" for voice in VOICES}
            for speaker, percent in heard["percent"].items():
                text.append(f"| {speaker} | {names[speaker]} | {percent:.1f} % |")
    if noise := about.get("noise"):
        text.append(
            f"\n## Noise\n\n{', '.join(noise['classes'])}: {noise['recordings']} recordings of "
            f"each, {noise['minutes']:.1f} minutes\nin all. Babble is spoken by training voices "
            "only, in sentences that are nowhere in `speech`."
        )
    text.append("\n## How it was made\n")
    for part, facts in about.items():
        engines = ", ".join(f"{name} ({version})" for name, version in facts["engines"].items())
        text.append(
            f"- {part}: `python tools/mini/synthesize.py --output_folder assets/mini "
            f"--seed {facts['seed']} --only {part}`\n  with {engines}"
        )
    size = sum(path.stat().st_size for path in folder.rglob("*.ogg"))
    text.append(f"\nAudio in all: {size / 1e6:.1f} MB.")
    write_text(folder / "README.md", "\n".join(text) + "\n")


_README_HEAD = """# The mini corpus

Synthesised speech with transcripts, and computed noise: enough to run every recipe of this
project from end to end without a download. Made by `tools/mini/synthesize.py`, which also
wrote this page. Scores on it say whether something works; they say little about human speech.

16 kHz, mono, Ogg Opus of about 32 kbit/s. Speech is in LibriSpeech's layout. Opus is decoded
with a state: read a file from its beginning where samples are to be the same on every read.

## Licence

The sentences come from the grammar in `tools/mini/grammar.py`, the noises from the formulas in
`tools/mini/noises.py`: the project's own, under its licence (Apache-2.0). The speech is the
output of four engines:

- flite (Carnegie Mellon University, a permissive licence of BSD kind) with its voices awb, rms and
  slt, all of Carnegie Mellon University and distributed with it under the same terms.
- festival (University of Edinburgh and others, of BSD kind) with the voice kal of
  Carnegie Mellon University, under such terms too.
- pico (SVOX, Apache-2.0) with the voices that it comes with, by way of the Python package ttspico.
- espeak-ng (GPL-3.0-or-later). The licence covers the program; what it speaks is not a
  work based on it.

No part of an engine or a voice is contained here but the sound of the sentences."""


if __name__ == "__main__":
    main(sys.argv[1:])
