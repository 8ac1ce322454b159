"""Scoring of one system on one test set: a JSON line per utterance, resumable."""

import hashlib
import json
import os
from pathlib import Path

import torch
from speechbrain.dataio import audio_io
from speechbrain.dataio.batch import PaddedBatch
from tqdm import tqdm

from pi_finetune import metrics
from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.data.loading import sample_lengths
from pi_finetune.enhancers import WEIGHTS_FILE
from pi_finetune.errors import UserError
from pi_finetune.files import replacing, write_text
from pi_finetune.recognizers import load_recognizer


def load_recognizers(sources):
    """Load recognisers for use in YAML.

    Arguments
    ---------
    sources : None, str or list of str
        Each as for :func:`pi_finetune.recognizers.load_recognizer`.

    Returns
    -------
    list
        One recogniser a source; empty for None.
    """
    sources = [sources] if isinstance(sources, str) else sources or []
    return [load_recognizer(str(source)) for source in sources]


def evaluate_system(
    folder,
    enhancer,
    pairs,
    recognizers,
    test_set="test",
    weights=None,
    batch_size=4,
    workers=1,
    audio_examples=0,
    overwrite=False,
    device="cpu",
):
    """Score a system and write ``FOLDER/scores/TEST_SET.jsonl``.

    While it runs, lines go to ``TEST_SET.jsonl.part``; the same call after an interruption
    continues there. Finished scores made with the same settings are left as they are.

    Arguments
    ---------
    folder : str or Path
        ``.../STRATEGY/SEED``, from which strategy and seed of the lines are taken.
    enhancer : callable or None
        ``enhancer(wavs [B, T], lengths [B]) -> [B, T]``; None scores the noisy input.
    pairs : pi_finetune.data.loading.SpeechPairs
        The test mixtures.
    recognizers : list
        From :mod:`pi_finetune.recognizers`; the first one's WER is the table's.
    test_set : str
        Name of the set, for the file and the lines.
    weights : str or Path, optional
        Folder or file of the enhancer's weights, so that scores of others are not taken for its.
    batch_size, workers : int
        Utterances enhanced at once; processes that compute PESQ and STOI.
    audio_examples : int
        Keep the audio of this many utterances, spread over the set, for listening.
    overwrite : bool
        Discard scores made with other settings instead of raising.

    Returns
    -------
    Path
        The scores file.

    Raises
    ------
    UserError
        Scores made with other settings are there.
    """
    folder = Path(folder)
    scores = folder / "scores"
    scores.mkdir(parents=True, exist_ok=True)
    final, part = scores / f"{test_set}.jsonl", scores / f"{test_set}.jsonl.part"
    settings_file = scores / f"{test_set}.settings.json"
    ids = [pairs.item_id(i) for i in range(len(pairs))]
    settings = {
        "pairs": pairs.fingerprint(),
        "recognizers": [recognizer.name for recognizer in recognizers],
        "weights": _digest(weights),
        "audio_examples": audio_examples,
    }
    if final.exists() or part.exists():
        earlier = json.loads(settings_file.read_text()) if settings_file.exists() else {}
        changed = [key for key in settings if earlier.get(key) != settings[key]]
        if changed and not overwrite:
            raise UserError(
                f"{final} was made with other {', '.join(changed)}. Add --overwrite True to score "
                "anew, or give this evaluation another name with --test_set."
            )
        if changed:
            for path in (final, part):
                path.unlink(missing_ok=True)
    if final.exists():
        return final
    write_text(settings_file, json.dumps(settings, indent=1))

    done = _complete_lines(part)
    todo = [i for i, utterance in enumerate(ids) if utterance not in done]
    examples = {ids[i * len(ids) // audio_examples] for i in range(audio_examples)}
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(pairs, todo), batch_size=batch_size, collate_fn=PaddedBatch
    )
    strategy, seed = folder.parent.name, folder.name
    with (
        part.open("a") as file,
        tqdm(total=len(ids), initial=len(done), desc=f"{strategy}/{seed}", unit="utt") as bar,
        torch.inference_mode(),
    ):
        for batch in loader:
            lengths = sample_lengths(batch.noisy).to(device)
            wavs = batch.noisy.data.to(device)
            if enhancer is not None:
                wavs = enhancer(wavs, lengths)
            texts = [(r, r(wavs, lengths)) for r in recognizers]
            sizes = lengths.tolist()
            estimates = [wav[:n] for wav, n in zip(wavs.cpu().numpy(), sizes)]
            references = [wav[:n] for wav, n in zip(batch.clean.data.numpy(), sizes)]
            for i, signal in enumerate(metrics.score_batch(references, estimates, workers)):
                utterance, reference = batch.id[i], batch.text[i]
                record = {
                    "id": utterance,
                    "strategy": strategy,
                    "seed": seed,
                    "set": test_set,
                    "snr": None if batch.snr[i] is None else float(batch.snr[i]),
                    "noise_class": batch.noise_class[i],
                    "duration": round(sizes[i] / SAMPLE_RATE, 4),
                    **signal,
                    "asr": {
                        r.name: metrics.recognition_errors(r, reference, text[i])
                        for r, text in texts
                        if reference is not None
                    },
                }
                file.write(json.dumps(record) + "\n")
                if utterance in examples:
                    kinds = {"enhanced": estimates[i]}
                    if enhancer is None:
                        noisy = batch.noisy.data[i, : sizes[i]].numpy()
                        kinds = {"noisy": noisy, "clean": references[i]}
                    _keep_audio(scores / test_set / "audio", utterance, kinds)
            file.flush()
            bar.update(len(sizes))
    os.replace(part, final)
    return final


def _complete_lines(path):
    """Ids already scored; a half-written last line is cut off."""
    if not path.exists():
        return set()
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if whole != lines:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(whole))
    return {json.loads(line)["id"] for line in whole}


def _keep_audio(folder, utterance, kinds):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, wav in kinds.items():
        path = folder / f"{utterance}.{kind}.flac"
        audio_io.save(str(path), torch.from_numpy(wav.copy())[None], SAMPLE_RATE)


def _digest(weights):
    if weights is None:
        return None
    path = Path(weights)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: missing. Give a run folder in which training saved a model.")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
