"""What scoring costs beside the models: one by one, as it was, and by a pool of processes.

    python benchmarks/scoring.py --speech LibriSpeech --split dev-mini --noise noise --utterances 80
    python benchmarks/scoring.py ... --asr whisper-tiny.en --utterances 262

Both ways enhance and recognise the same mixtures in one run, and give the same scores; `models` is
the enhancer and the recogniser alone. Times are wall seconds, the best of `--runs`; the load of the
machine is printed with them, since on a busy one the pool has no core to itself.
"""

import argparse
import functools
import os
import time

import pystoi
import torch

from pi_finetune.config import PROJECT_ROOT
from pi_finetune.data.loading import collate, load_pairs
from pi_finetune.enhancers import load_enhancer
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics
from pi_finetune.results.pool import ScorePool

MODELS = PROJECT_ROOT / "assets" / "models"


def run(batches, enhancer, recognizer, submit):
    """Enhance, recognise and score all batches; the seconds it took, and the scores."""
    started, waiting = time.perf_counter(), []
    for batch in batches:
        enhanced = enhancer(batch.noisy)
        rows = zip(batch.id, batch.clean.items(), enhanced.items())
        waiting += [submit(name, clean.numpy(), wav.numpy()) for name, clean, wav in rows]
        recognizer(enhanced)
    scores = [scores() for scores in waiting]
    return time.perf_counter() - started, scores


def one_by_one(_, clean, wav):
    """PESQ, and STOI and ESTOI by a call of pystoi each, at once."""
    rate = metrics.SAMPLE_RATE
    scores = {
        "pesq": metrics.pesq_wb(clean, wav),
        "stoi": float(pystoi.stoi(clean, wav, rate)),
        "estoi": float(pystoi.stoi(clean, wav, rate, extended=True)),
        "si_sdr": metrics.si_sdr(clean, wav),
    }
    return lambda: scores


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech", required=True)
    parser.add_argument("--split", default="dev*")
    parser.add_argument("--noise", required=True)
    parser.add_argument("--asr", default=str(MODELS / "asr"))
    parser.add_argument("--utterances", type=int, default=80)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; default: its own")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = load_pairs(
        options.speech, [options.split], "dev", options.noise, count=options.utterances
    )
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=collate)
    batches = list(loader)
    models = load_enhancer(MODELS / "enhancer").eval(), load_recognizer(options.asr)
    best, found = {}, {}
    without = ScorePool(options.workers, ["stoi", "estoi", "si_sdr"])  # the same processes
    with torch.inference_mode(), ScorePool(options.workers) as pool:
        pool.submit(
            "first", batches[0].clean.items()[0].numpy(), batches[0].noisy.items()[0].numpy()
        )
        ways = {
            "models": lambda *_: dict,
            "one by one": one_by_one,
            "pool": lambda *job: pool.submit(*job).result,
            "pool, no PESQ": lambda *job: without.submit(*job).result,
        }
        for _ in range(options.runs):
            for name, submit in ways.items():
                seconds, found[name] = run(batches, *models, submit)
                best[name] = min(seconds, best.get(name, seconds))
    for one, other in zip(found["one by one"], found["pool"], strict=True):
        for name, value in one.items():
            assert abs(value - other[name]) < 1e-6, (name, value, other[name])
    print(
        f"{len(pairs)} utterances, {sum(pairs.seconds()):.0f} s; {options.workers} workers, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    ratio = functools.partial(
        "{:13} {:8.2f} s  {:5.2f} of one by one  {:5.2f} of the models".format
    )
    for name, seconds in best.items():
        print(ratio(name, seconds, seconds / best["one by one"], seconds / best["models"]))


if __name__ == "__main__":
    main()
