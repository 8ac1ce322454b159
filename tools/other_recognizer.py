"""Word errors of a recogniser that had no part in training, on the audio of an evaluation.

    python recipes/evaluate.py hparams/evaluate.yaml --run "[noisy, RUN]" --save_audio audio ...
    pip install pocketsphinx==5.1.1
    python tools/other_recognizer.py --noisy results/noisy/0 --system RUN --audio audio

PocketSphinx's wheel holds an acoustic model of US English and a trigram model, so nothing is
downloaded. It is a recogniser of the time before neural networks, and far less robust to noise than
Whisper. Printed are its word error rates, and their difference from that of the noisy speech with
a paired interval over mixtures, at each SNR, up to 0 dB, up to 5 dB, and in all.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.errors import UserError, command
from pi_finetune.results.metrics import word_errors
from pi_finetune.results.runs import read_json_lines
from pi_finetune.results.statistics import bootstrap_ratio

ERRORS = ("substitutions", "deletions", "insertions")


@command
def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noisy", required=True, help="folder of the noisy speech's scores")
    parser.add_argument("--system", required=True, help="run folder, STRATEGY/SEED")
    parser.add_argument("--audio", required=True, help="--save_audio of the evaluation")
    parser.add_argument("--test_set", default="test")
    args = parser.parse_args(argv)

    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise UserError("pocketsphinx is missing: pip install pocketsphinx==5.1.1") from None
    snrs = {
        line["id"]: line["snr"]
        for line in read_json_lines(Path(args.noisy) / "scores" / f"{args.test_set}.jsonl")
    }
    audio = Path(args.audio)
    texts = _listed(audio / _name(args.noisy) / "text")
    systems = [
        _listed(audio / _name(args.noisy) / "noisy.scp"),
        _listed(audio / _name(args.system) / "enhanced.scp"),
    ]
    if not all(texts.keys() == system.keys() == snrs.keys() for system in systems):
        raise UserError(
            f"--audio {audio}: the lists and the scores are not of the same utterances."
        )
    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    errors, words = [], []
    for name, text in tqdm(texts.items(), desc="mixtures", disable=None):
        counts = [word_errors(text, _recognise(decoder, system[name])) for system in systems]
        errors.append([sum(count[kind] for kind in ERRORS) for count in counts])
        words.append(sum(counts[0][kind] for kind in ("hits", "substitutions", "deletions")))
    errors, words = np.array(errors), np.array(words)
    at = np.array([snrs[name] for name in texts], dtype=float)
    groups = {f"{snr:g} dB": at == snr for snr in sorted(set(at))}
    groups |= {"up to 0 dB": at <= 0, "up to 5 dB": at <= 5, "all": at > -np.inf}
    for name, chosen in groups.items():
        noisy, system = 100 * errors[chosen].sum(0) / words[chosen].sum()
        change = bootstrap_ratio(100 * (errors[chosen, 1] - errors[chosen, 0]), words[chosen])
        print(
            f"{name}: {chosen.sum()} mixtures, noisy {noisy:.1f} %, system {system:.1f} %, "
            f"difference {change.estimate:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
        )


def _name(folder):
    return Path(*Path(folder).absolute().parts[-2:])


def _listed(path):
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


def _recognise(decoder, path):
    samples, _rate = sf.read(path, dtype="int16")
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


if __name__ == "__main__":
    main(sys.argv[1:])
