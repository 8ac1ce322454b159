"""Score enhancers on a test set: signal metrics and WER, one JSON line per utterance.

    python recipes/evaluate.py hparams/evaluate.yaml --run results/soft_dtw/1234
    python recipes/evaluate.py hparams/evaluate.yaml --run "[noisy, pretrained, results/mse/1234]"

`noisy` scores the unprocessed mixtures, `pretrained` the enhancer that
fine-tuning starts from. Interrupted, the same command continues. With `torchrun
--nproc_per_node=N --` in place of `python`, N processes share the utterances.
"""

import sys
from pathlib import Path

import speechbrain as sb

from pi_finetune.config import load_hparams
from pi_finetune.distributed import rank, start_processes
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import command
from pi_finetune.results.evaluation import evaluate_system


@command
def main(argv):
    """Evaluate the systems one after the other on the same mixtures."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    run_opts = start_processes(run_opts)
    hparams, _ = load_hparams(hparams_file, overrides)
    device = run_opts.get("device", "cpu")
    runs = hparams["run"] if isinstance(hparams["run"], list) else [hparams["run"]]

    systems = []  # all are loaded before the first is scored, so that a wrong name fails at once
    for run in runs:
        weights = {"noisy": None, "pretrained": hparams["enhancer_weights"]}.get(run, run)
        folder = Path(run)
        if run in ("noisy", "pretrained"):
            folder = Path(hparams["results_folder"], run, "0")
        enhancer = None
        if weights is not None:
            enhancer = load_enhancer(weights, trust=hparams["trust"]).to(device).eval()
        systems.append((folder, enhancer, weights))

    for folder, enhancer, weights in systems:
        path = evaluate_system(
            folder,
            enhancer,
            hparams["test_data"],
            hparams["recognizers"],
            test_set=hparams["test_set"],
            weights=weights,
            batch_size=hparams["batch_size"],
            workers=hparams["workers"],
            audio_examples=hparams["audio_examples"],
            overwrite=hparams["overwrite"],
            device=device,
        )
        if rank() == 0:
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
