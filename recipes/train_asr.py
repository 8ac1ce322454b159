"""Train a downstream recogniser: a frozen encoder, a weighted sum of its layers, a CTC head.

    python recipes/train_asr.py hparams/asr_ctc.yaml
    python recipes/train_asr.py hparams/pr_ctc.yaml
    python recipes/train_asr.py hparams/asr_ctc.yaml --data_folder LibriSpeech \
        --train_splits "[train-clean-100]" --encoder_source facebook/hubert-base-ls960

Any top-level key of the YAML file can be set on the command line. The best
model is kept in ``output_folder`` as asr.yaml + asr.safetensors, which
``--asr_source`` of the other recipes takes; the same command resumes the run.
"""

import sys
from pathlib import Path

from speechbrain.dataio.batch import PaddedBatch

from pi_finetune.brains.recognition import (
    RecognitionBrain,
    error_rate,
    transcribe_set,
    write_lines,
)
from pi_finetune.brains.updates import start_run
from pi_finetune.errors import command
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics


@command
def main(argv):
    """Train, then test what was exported on clean and noisy speech."""
    hparams, run_opts = start_run(argv)
    brain = RecognitionBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    hparams["encoder"].to(brain.device)
    # No loader workers: the datasets keep the encoded speech in memory.
    brain.fit(
        hparams["epoch_counter"],
        brain.make_train_loader(hparams["train_data"]),
        hparams["valid_data"],
        valid_loader_kwargs={"batch_size": hparams["batch_size"], "collate_fn": PaddedBatch},
    )
    test(hparams, Path(hparams["output_folder"]))


def test(hparams, folder):
    """Errors of the exported model on clean speech and at each SNR, into ``test.jsonl``."""
    recognizer, records = load_recognizer(folder), []
    mixer = hparams["test_mixer"]
    for snr in (None, *(mixer.snrs if mixer else [])):
        errors = transcribe_set(
            recognizer,
            hparams["test_manifest"],
            mixer if snr is not None else None,
            snr,
            hparams["data_seed"],
        )
        records += errors
        condition = "clean" if snr is None else f"{snr:g} dB"
        rate = error_rate(recognizer).upper()
        print(f"{rate} on {len(errors)} test utterances, {condition}: {metrics.wer(errors):.2f} %")
    write_lines(folder / "test.jsonl", records)


if __name__ == "__main__":
    main(sys.argv[1:])
