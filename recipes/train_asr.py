"""Train the downstream recogniser: a frozen encoder, a weighted sum of its layers, a CTC head.

    python recipes/train_asr.py hparams/asr_ctc.yaml
    python recipes/train_asr.py hparams/asr_ctc.yaml --data_folder LibriSpeech \
        --train_splits "[train-clean-100]" --encoder_source facebook/hubert-base-ls960

Any top-level key of the YAML file can be set on the command line. The best
model is kept in ``output_folder`` as asr.yaml + asr.safetensors, which
``--asr_source`` of the other recipes takes; the same command resumes the run.
"""

import sys
from pathlib import Path

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch

from pi_finetune import metrics
from pi_finetune.brains.recognition import RecognitionBrain, transcribe_set, write_lines
from pi_finetune.config import load_hparams
from pi_finetune.data.loading import UpdateSampler
from pi_finetune.errors import UserError, command
from pi_finetune.recognizers import load_recognizer


@command
def main(argv):
    """Train, then test what was exported on clean and noisy speech."""
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    hparams, resolved = load_hparams(hparams_file, overrides)
    if hparams["updates"] % hparams["valid_every"]:
        raise UserError("updates: must be a multiple of valid_every, so that the end is validated.")

    folder = Path(hparams["output_folder"])
    sb.create_experiment_directory(experiment_directory=str(folder))
    (folder / "hyperparams.yaml").write_text(resolved)

    brain = RecognitionBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    hparams["encoder"].to(brain.device)
    items = hparams["valid_every"] * hparams["batch_size"] * brain.grad_accumulation_factor
    sampler = UpdateSampler(len(hparams["train_data"]), items, hparams["seed"])
    # No loader workers: the datasets keep the encoded speech in memory.
    loader = {"collate_fn": PaddedBatch, "batch_size": hparams["batch_size"]}
    train_loader = brain.make_dataloader(
        hparams["train_data"], stage=sb.Stage.TRAIN, sampler=sampler, **loader
    )
    brain.train_sampler = sampler
    brain.fit(
        hparams["epoch_counter"],
        train_loader,
        hparams["valid_data"],
        valid_loader_kwargs=loader,
    )
    test(hparams, folder)


def test(hparams, folder):
    """Word errors of the exported model on clean speech and at each SNR, into ``test.jsonl``."""
    recognizer, records = load_recognizer(folder), []
    mixer = hparams["test_mixer"]
    for snr in (None, *(mixer.snrs if mixer else [])):
        words = transcribe_set(
            recognizer,
            hparams["test_manifest"],
            mixer if snr is not None else None,
            snr,
            hparams["data_seed"],
        )
        records += words
        condition = "clean" if snr is None else f"{snr:g} dB"
        print(f"WER on {len(words)} test utterances, {condition}: {metrics.wer(words):.2f} %")
    write_lines(folder / "test.jsonl", records)


if __name__ == "__main__":
    main(sys.argv[1:])
