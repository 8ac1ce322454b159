"""Choose how much of an enhancer's output to mix with its input: by likelihood, on dev mixtures.

    python tools/choose_mix.py --enhancer results/enhance/1234 --asr_source openai/whisper-tiny.en \
        --data_folder LibriSpeech --splits dev-clean --noise_folder noise

For each share it prints by how much the negative log-likelihood per token of the true transcripts
differs from that of the unprocessed mixtures, with a paired interval that resamples utterances: at
each SNR, up to 0 dB, from 5 dB on, and in all. Below 0 is better. Beside it stand the mean PESQ,
and by how much the level of the output differs from that of the clean speech in the mixture. With
``--part test --each_snr`` it is a test; ``--draws`` of noise make it a sharper one.
"""

import argparse
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from pi_finetune.data.loading import load_pairs
from pi_finetune.enhancers import load_enhancer
from pi_finetune.enhancers.base import mixed
from pi_finetune.errors import command
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics
from pi_finetune.results.statistics import bootstrap_ratio


@command
def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--enhancer", required=True)
    parser.add_argument("--asr_source", required=True)
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--splits", nargs="+", required=True)
    parser.add_argument("--noise_folder", required=True)
    parser.add_argument("--part", default="dev", help="of the noises (%(default)s)")
    parser.add_argument(
        "--snrs", nargs="+", type=float, default=[-5, 0, 5, 10, 15, 20, math.inf], help="in dB"
    )
    parser.add_argument("--each_snr", action="store_true", help="every utterance at every SNR")
    parser.add_argument("--draws", type=int, default=1, help="of noise for each utterance and SNR")
    parser.add_argument("--mixes", nargs="+", type=float, default=[0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--count", type=int, help="utterances. Default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pairs = load_pairs(
        args.data_folder,
        args.splits,
        args.part,
        args.noise_folder,
        snrs=args.snrs,
        seed=args.seed,
        count=args.count,
        each_snr=args.each_snr,
    )
    enhancer, recognizer = load_enhancer(args.enhancer).eval(), load_recognizer(args.asr_source)
    found, snrs, heard, utterances = [], [], [], []
    addresses = [(index, draw) for index in range(len(pairs)) for draw in range(args.draws)]
    for address in tqdm(addresses, desc="mixtures", disable=None):
        pair = pairs[address]
        if pair["text"] is None:
            continue
        noisy, length = pair["noisy"], torch.tensor([len(pair["noisy"])])
        with torch.no_grad():
            enhanced = enhancer(noisy[None], length)[0]
        wavs = torch.stack([noisy, *(mixed(enhanced, noisy, mix) for mix in args.mixes)])
        found.append(recognizer.nll(Waveforms.of(wavs), [pair["text"]] * len(wavs)))
        clean = pair["clean"].numpy()
        power = wavs.square().sum(1) / pair["clean"].square().sum()
        heard.append([[metrics.pesq_wb(clean, wav.numpy()) for wav in wavs], 10 * power.log10()])
        snrs.append(math.inf if pair["snr"] is None else pair["snr"])
        utterances.append(pairs.items[address[0]][0])
    nats = np.array([[nll for nll, _ in row] for row in found])
    tokens = np.array([row[0][1] for row in found])
    snrs, utterances = np.array(snrs), np.array(utterances)
    pesq = np.array([row[0] for row in heard], dtype=float)  # NaN: none, as of silence
    level = np.array([row[1].numpy() for row in heard])
    groups = {f"{snr:g} dB": snrs == snr for snr in sorted(set(snrs))}
    groups |= {"up to 0 dB": snrs <= 0, "from 5 dB": snrs >= 5, "all": snrs > -math.inf}
    for name, chosen in groups.items():
        counts = tokens[chosen]
        plain = nats[chosen, 0].sum() / counts.sum() if len(counts) else math.nan
        signal = [
            f"PESQ {np.nanmean(scores):.2f}, level {levels.mean():+.2f} dB"
            for scores, levels in zip(pesq[chosen].T, level[chosen].T)
        ]
        print(f"{name}: {len(counts)} mixtures, unprocessed {plain:.3f}, {signal[0]}")
        for column, mix in enumerate(args.mixes, start=1):
            found = _change(nats[chosen, column] - nats[chosen, 0], counts, utterances[chosen])
            change = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            print(f"  mix {mix:.2f}: {change}, {signal[column]}")


def _change(nats, tokens, utterances):
    """Nats a token, with an interval that keeps all mixtures of an utterance together."""
    rows = np.unique(utterances, return_inverse=True)[1]
    return bootstrap_ratio(np.bincount(rows, nats), np.bincount(rows, tokens))


if __name__ == "__main__":
    main(sys.argv[1:])
