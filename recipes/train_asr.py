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

from pi_finetune.brains.recognition import (
    EncodedSpeech,
    RecognitionBrain,
    error_rate,
    transcribe_set,
    write_lines,
)
from pi_finetune.brains.updates import start_run
from pi_finetune.commands import parse
from pi_finetune.config import build
from pi_finetune.data.checking import check_pairs
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import choose, collate
from pi_finetune.distributed import on_main
from pi_finetune.errors import command
from pi_finetune.recognizers import load_recognizer
from pi_finetune.results import metrics


def dataio_prepare(hparams):
    """The encoded speech of training and of development, and the manifest of the test.

    The corpus is listed by the main process alone.
    """
    train, valid, test = (
        on_main(prepare_speech, hparams[folder], hparams[f"{part}_splits"])
        for part, folder in (
            ("train", "train_folder"),
            ("valid", "data_folder"),
            ("test", "data_folder"),
        )
    )
    valid = choose(valid, hparams["valid_utterances"])
    test = choose(test, hparams["test_utterances"])
    mixer = on_main(build, hparams["train_mixer"])
    if hparams["check_data"]:
        on_main(check_pairs, train, valid, test, mixer)
    parts = {"encoder": hparams["encoder"], "tokenizer": hparams["tokenizer"]}
    train_data = EncodedSpeech(
        train,
        **parts,
        augmentation=build(hparams["augmentation"], mixer=mixer),
        views=hparams["views"],
        seed=hparams["seed"],
        cache_gb=hparams["cache_gb"],
        trainable=True,
    )
    return train_data, EncodedSpeech(valid, **parts), test


def load_pretrained(hparams):
    """Load the frozen encoder, and make the head that is trained on it: ``modules``."""
    hparams["encoder"] = build(hparams["encoder"])
    return {"head": build(hparams["head"], encoder=hparams["encoder"])}


def train_asr(experiment, overrides=None, run_opts=None):
    """Train a recogniser on a frozen encoder, then test it on clean and noisy speech.

    The best model is kept in output_folder; the same call resumes the run.

    Arguments
    ---------
    experiment, overrides, run_opts
        As of ``pi_finetune.recipes.train.train``.

    Returns
    -------
    str
        The run folder.
    """
    hparams, run_opts = start_run(
        __file__, experiment, overrides, run_opts, needs=("encoder", "train_mixer")
    )
    modules = load_pretrained(hparams)
    train_data, valid_data, test_manifest = dataio_prepare(hparams)
    hparams["checkpointer"].add_recoverable("head", modules["head"])
    brain = RecognitionBrain(
        modules=modules,
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    hparams["encoder"].to(brain.device)
    # No loader workers: the datasets keep the encoded speech in memory.
    brain.fit(
        hparams["epoch_counter"],
        brain.make_train_loader(train_data),
        valid_data,
        valid_loader_kwargs={"batch_size": hparams["batch_size"], "collate_fn": collate},
    )
    test(hparams, test_manifest)
    return hparams["output_folder"]


def test(hparams, manifest):
    """Errors of the exported model on clean speech and at each SNR, into ``test.jsonl``."""
    folder = Path(hparams["output_folder"])
    recognizer, records = load_recognizer(folder), []
    mixer = build(hparams["test_mixer"])
    for snr in (None, *(mixer.snrs if mixer else [])):
        errors = transcribe_set(
            recognizer, manifest, mixer if snr is not None else None, snr, hparams["data_seed"]
        )
        records += errors
        condition = "clean" if snr is None else f"{snr:g} dB"
        rate = error_rate(recognizer).upper()
        print(f"{rate} on {len(errors)} test utterances, {condition}: {metrics.wer(errors):.2f} %")
    write_lines(folder / "test.jsonl", records)


@command
def main(argv):
    """The command line."""
    train_asr(*parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
