"""Choose how much of an enhancer's output to mix with its input: by likelihood, on dev mixtures.

    python tools/choose_mix.py --enhancer results/enhance/1234 --asr_source openai/whisper-tiny.en \
        --data_folder LibriSpeech --splits dev-clean --noise_folder noise

For each share it prints by how much the negative log-likelihood per token of the true transcripts
differs from that of the unprocessed mixtures, with a paired interval that resamples utterances: at
each SNR, up to 0 dB, from 5 dB on, and in all. Below 0 is better. Beside it stand the mean PESQ,
and by how much the level of the output differs from that of the clean speech in the mixture. With
``--part test --each_snr`` it is a test; ``--draws`` of noise make it a sharper one. Of several
splits there is a table of each, and one of all.
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
from pi_finetune.errors import UserError, command
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics
from pi_finetune.results.statistics import bootstrap_ratio, sum_by_unit


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
    parser.add_argument("--count", type=int, help="utterances of a split. Default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    parts = {
        split: load_pairs(
            args.data_folder,
            split,
            args.part,
            args.noise_folder,
            snrs=args.snrs,
            seed=args.seed,
            count=args.count,
            each_snr=args.each_snr,
        )
        for split in args.splits
    }
    enhancer, recognizer = load_enhancer(args.enhancer).eval(), load_recognizer(args.asr_source)
    addresses = [
        (split, index, draw)
        for split, pairs in parts.items()
        for index in range(len(pairs))
        for draw in range(args.draws)
    ]
    rows = []
    for split, index, draw in tqdm(addresses, desc="mixtures", disable=None):
        pair = parts[split][index, draw]
        if pair["text"] is None:
            continue
        row = _scores(pair, enhancer, recognizer, args.mixes)
        utterance, _ = parts[split].items[index]
        snr = math.inf if pair["snr"] is None else pair["snr"]
        rows.append({"split": split, "utterance": utterance, "snr": snr, **row})
    if not rows:
        raise UserError(f"--splits: no utterance of {', '.join(args.splits)} has a transcript.")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    for name, chosen in _groups(columns["split"], columns["snr"]).items():
        if chosen.any():
            _print(name, {column: values[chosen] for column, values in columns.items()}, args.mixes)


def _scores(pair, enhancer, recognizer, mixes):
    """Nats, PESQ and level of the mixture as it is, and of each mix with its enhancement."""
    noisy, length = pair["noisy"], torch.tensor([len(pair["noisy"])])
    with torch.no_grad():
        enhanced = enhancer(noisy[None], length)[0]
    wavs = torch.stack([noisy, *(mixed(enhanced, noisy, mix) for mix in mixes)])
    likelihoods = recognizer.nll(Waveforms.of(wavs), [pair["text"]] * len(wavs))
    clean = pair["clean"].numpy()
    scores = [metrics.pesq_wb(clean, wav.numpy()) for wav in wavs]
    level = 10 * (wavs.square().sum(1) / pair["clean"].square().sum()).log10()
    return {
        "nats": [nats for nats, _ in likelihoods],
        "tokens": likelihoods[0][1],
        "pesq": [math.nan if score is None else score for score in scores],  # None: as of silence
        "level": level.numpy(),
    }


def _groups(splits, snrs):
    """Which mixtures each line of the table is about, by its name."""
    groups = {f"{snr:g} dB": snrs == snr for snr in sorted(set(snrs))}
    groups |= {"up to 0 dB": snrs <= 0, "from 5 dB": snrs >= 5, "all": snrs > -math.inf}
    names = sorted(set(splits))
    if len(names) == 1:
        return groups
    each = {(split, name): groups[name] & (splits == split) for split in names for name in groups}
    return {f"{split}, {name}": chosen for (split, name), chosen in each.items()} | groups


def _print(name, columns, mixes):
    """Print the lines of one group."""
    nats, tokens = columns["nats"], columns["tokens"]
    signal = [
        f"PESQ {np.nanmean(pesq):.2f}, level {level.mean():+.2f} dB"
        for pesq, level in zip(columns["pesq"].T, columns["level"].T)
    ]
    plain = nats[:, 0].sum() / tokens.sum()
    print(f"{name}: {len(nats)} mixtures, unprocessed {plain:.3f}, {signal[0]}")
    for column, mix in enumerate(mixes, start=1):
        found = _change(nats[:, column] - nats[:, 0], tokens, columns["utterance"])
        change = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        print(f"  mix {mix:.2f}: {change}, {signal[column]}")


def _change(nats, tokens, utterances):
    """Nats a token, with an interval that keeps all mixtures of an utterance together."""
    return bootstrap_ratio(*sum_by_unit(utterances, nats, tokens))


if __name__ == "__main__":
    main(sys.argv[1:])
