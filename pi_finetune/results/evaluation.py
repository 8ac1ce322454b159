"""Scoring of one system on one test set: a JSON line per utterance, resumable."""

import collections
import glob
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from speechbrain.dataio import audio_io
from speechbrain.utils.distributed import ddp_barrier
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, limit
from pi_finetune.data.loading import collate
from pi_finetune.distributed import on_main, processes, rank
from pi_finetune.errors import UserError
from pi_finetune.files import replacing, write_text
from pi_finetune.recognizers import likelihoods, load_recognizer
from pi_finetune.results import metrics
from pi_finetune.results.pool import ScorePool

logger = logging.getLogger(__name__)


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

    Raises
    ------
    UserError
        Two have the same name, under which both would keep their scores.
    """
    sources = [sources] if isinstance(sources, str) else sources or []
    recognizers = [load_recognizer(str(source)) for source in sources]
    named = {}
    for source, recognizer in zip(sources, recognizers):
        if recognizer.name in named:
            raise UserError(
                f"asr_source: {named[recognizer.name]} and {source} are both named "
                f"{recognizer.name!r}, under which their scores are kept. Rename one of the "
                "folders (of one that train_asr.py wrote, the name in its asr.yaml)."
            )
        named[recognizer.name] = source
    return recognizers


def evaluate_system(
    folder,
    enhancer,
    pairs,
    recognizers,
    test_set="test",
    batch_size=4,
    workers=0,
    num_workers=0,
    audio_examples=0,
    overwrite=False,
    device="cpu",
):
    """Score a system and write ``FOLDER/scores/TEST_SET.jsonl``.

    While it runs, lines go to ``TEST_SET.jsonl.part``; the same call after an interruption
    continues there. Finished scores made with the same settings are left as they are. Under
    ``torchrun`` every process scores its share, into a ``.part`` of its own; the finished file
    is the same for any number of processes.

    Arguments
    ---------
    folder : str or Path
        ``.../STRATEGY/SEED``, from which strategy and seed of the lines are taken.
    enhancer : callable, None or "clean"
        ``enhancer(Waveforms) -> Waveforms``; None scores the noisy input, "clean" the target. A
        digest of its weights is kept with the scores, so that those of others are not taken for
        its.
    pairs : pi_finetune.data.loading.SpeechPairs
        The test mixtures.
    recognizers : list
        From :mod:`pi_finetune.recognizers`; the first one's WER is the table's.
    test_set : str
        Name of the set, for the file and the lines.
    batch_size : int
        Utterances enhanced at once.
    workers : int or None
        Processes that compute PESQ and the like while the models go on; see
        :class:`pi_finetune.results.pool.ScorePool`. Default: 0, none.
    num_workers : int
        Processes that load and mix. Default: 0.
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
    final = scores / f"{test_set}.jsonl"
    ids = [pairs.item_id(i) for i in range(len(pairs))]
    settings = {
        "pairs": pairs.fingerprint(),
        "recognizers": [recognizer.name for recognizer in recognizers],
        "weights": _digest(enhancer),
        "audio_examples": audio_examples,
    }
    done = on_main(_begin, final, settings, overwrite)
    if done is None:
        return final

    # Batches are cut from the whole set, before anything is left out: so an utterance has the
    # same neighbours, and the same last digits, in any number of processes.
    batches = [range(i, min(i + batch_size, len(ids))) for i in range(0, len(ids), batch_size)]
    todo = [[i for i in batch if ids[i] not in done] for batch in batches]
    todo = [batch for batch in todo if batch][rank() :: processes()]
    examples = {ids[i * len(ids) // audio_examples] for i in range(audio_examples)}
    loader = torch.utils.data.DataLoader(
        pairs, batch_sampler=todo, collate_fn=collate, num_workers=num_workers if todo else 0
    )
    strategy, seed = folder.parent.name, folder.name
    mine = sum(map(len, todo))
    with (
        _part(final, rank()).open("a") as file,
        tqdm(
            total=mine + len(done),
            initial=len(done),
            desc=f"{strategy}/{seed}",
            unit="utt",
            disable=rank() > 0,
        ) as bar,
        torch.inference_mode(),
        ScorePool(workers) as pool,
    ):
        waiting = collections.deque()  # lines that want their signal scores, in order

        def write(all_of_them=False):
            while waiting and (all_of_them or waiting[0][0].done()):
                signal, before, after = waiting.popleft()
                file.write(json.dumps({**before, **signal.result(), **after}) + "\n")
                bar.update()
            file.flush()

        for batch in loader:
            wavs = (batch.clean if enhancer == "clean" else batch.noisy).to(device)
            if callable(enhancer):
                wavs = enhancer(wavs)
            given = (wavs.data, wavs.lengths)
            sizes = wavs.lengths.tolist()
            estimates = [wav.numpy() for wav in wavs.to("cpu").items()]
            references = [wav.numpy() for wav in batch.clean.items()]
            signals = [
                pool.submit(*utterance) for utterance in zip(batch.id, references, estimates)
            ]
            heard = [(r, r(*given), likelihoods(r, *given, batch.text)) for r in recognizers]
            for i, signal in enumerate(signals):
                utterance, reference = batch.id[i], batch.text[i]
                before = {
                    "id": utterance,
                    "recording": batch.recording[i],
                    "speaker": batch.speaker[i],
                    "strategy": strategy,
                    "seed": seed,
                    "set": test_set,
                    "snr": None if batch.snr[i] is None else float(batch.snr[i]),
                    "noise_class": batch.noise_class[i],
                    "duration": round(sizes[i] / SAMPLE_RATE, 4),
                }
                recognised = {
                    r.name: {**metrics.recognition_errors(r, reference, texts[i]), **nlls[i]}
                    for r, texts, nlls in heard
                    if reference is not None
                }
                waiting.append((signal, before, {"asr": recognised}))
                if utterance in examples:
                    kinds = {"enhanced": estimates[i]}
                    if enhancer is None:
                        noisy = batch.noisy.data[i, : sizes[i]].numpy()
                        kinds = {"noisy": noisy, "clean": references[i]}
                    _keep_audio(scores / test_set / "audio", utterance, kinds)
            write()
        write(all_of_them=True)
    ddp_barrier()
    on_main(_merge, final, ids)
    return final


def _part(final, rank):
    """Where a process writes its lines; the main one's name is the oldest."""
    return final.with_name(f"{final.name}.{rank}.part" if rank else f"{final.name}.part")


def _parts(final):
    return list(final.parent.glob(f"{glob.escape(final.name)}.*part"))


def _begin(final, settings, overwrite):
    """Ids scored before, with the same settings; None if all are."""
    final.parent.mkdir(parents=True, exist_ok=True)
    settings_file = final.with_suffix(".settings.json")
    if final.exists() or _parts(final):
        earlier = json.loads(settings_file.read_text()) if settings_file.exists() else {}
        changed = [key for key in settings if earlier.get(key) != settings[key]]
        if changed and not overwrite:
            raise UserError(
                f"{final} was made with other {', '.join(changed)}. Add --overwrite True to score "
                "anew, or give this evaluation another name with --test_set."
            )
        if changed:
            for path in (final, *_parts(final)):
                path.unlink(missing_ok=True)
    if final.exists():
        return None
    write_text(settings_file, json.dumps(settings, indent=1))
    return {utterance for path in _parts(final) for utterance in _complete_lines(path)}


def _merge(final, ids):
    """Put the lines of all processes into one file, in the order of ``ids``."""
    lines = {}
    for path in _parts(final):
        for line in path.read_text().splitlines(keepends=True):
            lines[json.loads(line)["id"]] = line
    missing = [utterance for utterance in ids if utterance not in lines]
    if missing:
        raise UserError(
            f"{final}: {len(missing)} utterances are not scored, first {missing[0]}. With several "
            "nodes, the results folder must be one that all of them see. Give the same command."
        )
    write_text(final, "".join(lines[utterance] for utterance in ids))
    for path in _parts(final):
        path.unlink()


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
        peak = float(np.abs(wav).max())
        if peak > 1:  # FLAC has no float, and would clip
            wav = limit(wav)
            logger.warning(f"{path}: the peak is {peak:.2f} times full scale; it was limited.")
        audio_io.save(str(path), torch.from_numpy(wav.copy())[None], SAMPLE_RATE)


def _digest(enhancer):
    """Of the model in memory: its file may hold another by now, if its training still goes on."""
    if not isinstance(enhancer, torch.nn.Module):
        return None
    config = json.dumps(getattr(enhancer, "config", None), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(enhancer.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
