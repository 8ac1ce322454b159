"""Score enhancers on a test set: signal metrics and WER, one JSON line per utterance.

    python recipes/evaluate.py hparams/evaluate.yaml --run results/soft_dtw/1234
    python recipes/evaluate.py hparams/evaluate.yaml --run "[noisy, pretrained, results/mse/1234]"
    python recipes/evaluate.py hparams/evaluate.yaml --run noisy --recordings calls --test_set calls

`noisy` scores the unprocessed mixtures, `clean` the speech in them, `pretrained` the enhancer
that fine-tuning starts from. Real recordings have no clean speech, and so no scores that compare
with it. `--save_audio FOLDER` keeps all audio, with lists that VERSA and ESPnet read. Interrupted,
the same command continues. With `torchrun --nproc_per_node=N --` in place of `python`, N processes
share the utterances.
"""

import sys
from pathlib import Path

from pi_finetune.commands import parse
from pi_finetune.config import build, find_hparams, load_hparams
from pi_finetune.distributed import on_main, rank, start_processes
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import command
from pi_finetune.inference import Enhancer
from pi_finetune.results.declarations import check_metrics
from pi_finetune.results.evaluation import evaluate_system
from pi_finetune.results.similarity import load_measures
from pi_finetune.run_folder import Lock


def dataio_prepare(hparams):
    """The test set: recordings without clean speech if some are named, else pairs."""
    named = hparams.get("recordings") is not None
    return on_main(build, hparams["test_recordings" if named else "test_data"])


def load_pretrained(hparams, device):
    """The systems, ``(folder, enhancer)`` each, and the recognisers.

    All are loaded before the first is scored, so that a wrong name fails at once.
    """
    runs = hparams["run"] if isinstance(hparams["run"], list) else [hparams["run"]]
    systems = []
    for run in runs:
        untrained = {"noisy": None, "clean": None, "pretrained": hparams["enhancer_weights"]}
        weights = untrained.get(run, run)
        folder = Path(run)
        if run in untrained:
            folder = Path(hparams["results_folder"], run, "0")
        enhancer = "clean" if run == "clean" else None
        if weights is not None:
            module = load_enhancer(weights, trust=hparams["trust"])
            enhancer = Enhancer(module, device, whole_seconds=hparams["max_seconds"])
        systems.append((folder, enhancer))
    return systems, build(hparams["recognizers"])


def evaluate(experiment="evaluate", overrides=None, run_opts=None):
    """Score enhancers on a test set: signal metrics and WER, one JSON line per utterance.

    run names a run folder, noisy, clean, pretrained, or a list of these: noisy scores the
    unprocessed mixtures, clean the speech in them, pretrained the enhancer that fine-tuning starts
    from. mix is the share of an enhancer's output in what is scored. recordings names real ones
    without clean speech, in place of the corpus; save_audio a folder for all audio, with lists for
    VERSA and ESPnet. Interrupted, the same call continues.

    Arguments
    ---------
    experiment, overrides, run_opts
        As of ``pi_finetune.recipes.train.train``.

    Returns
    -------
    list of Path
        The files of scores.
    """
    run_opts = start_processes(run_opts)
    hparams, _ = load_hparams(
        find_hparams(experiment), overrides, needs=("run", "test_data", "recognizers")
    )
    device = run_opts.device
    names = hparams.get("metrics")
    check_metrics(names or ())
    systems, recognizers = load_pretrained(hparams, device)
    measures = load_measures(
        names or (),
        hparams.get("teacher"),
        recognizers,
        hparams.get("speaker_source"),
        hparams["trust"],
    )
    test_data = dataio_prepare(hparams)
    paths = []
    for folder, enhancer in systems:
        with Lock(folder / "scores" / f".{hparams['test_set']}.lock", "an evaluation"):
            mix = hparams.get("mix", 1.0) if callable(enhancer) else 1.0
            path = evaluate_system(
                folder,
                enhancer,
                test_data,
                recognizers,
                mix=mix,
                test_set=hparams["test_set"],
                batch_size=hparams["batch_size"],
                max_batch_seconds=hparams.get("max_batch_seconds"),
                workers=hparams["workers"],
                num_workers=hparams["num_workers"],
                audio_examples=hparams["audio_examples"],
                overwrite=hparams["overwrite"],
                device=device,
                save_audio=hparams.get("save_audio"),
                names=names,
                measures=measures,
            )
        paths.append(path)
        if rank() == 0:
            print(path)
    return paths


@command
def main(argv):
    """The command line."""
    evaluate(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
