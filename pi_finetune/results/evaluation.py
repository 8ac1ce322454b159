"""Scoring of systems on one test set: a JSON line per utterance, resumable."""

import collections
import contextlib
import glob
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from speechbrain.utils.distributed import ddp_barrier
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, is_silent, save_flac
from pi_finetune.data.loading import collate
from pi_finetune.distributed import on_main, processes, rank
from pi_finetune.enhancers import mixed
from pi_finetune.errors import UserError
from pi_finetune.files import replacing, write_text
from pi_finetune.recognizers import Recognizer, likelihoods, load_recognizer
from pi_finetune.results import metrics
from pi_finetune.results.declarations import CER, CHOICES, WAVEFORM_METRICS, without_reference
from pi_finetune.results.handover import SavedAudio
from pi_finetune.results.pool import ScorePool
from pi_finetune.run_folder import weights_digest

if TYPE_CHECKING:
    from pi_finetune.data.loading import SpeechPairs
    from pi_finetune.data.recordings import Recordings

__all__ = ["evaluate_system", "load_recognizers"]


logger = logging.getLogger(__name__)


def load_recognizers(sources: str | list[str] | None) -> list[Recognizer]:
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
    recognizers: list[Recognizer] = [load_recognizer(str(source)) for source in sources]
    named: dict = {}
    for source, recognizer in zip(sources, recognizers):
        if recognizer.name in named:
            raise UserError(
                f"asr_source: {named[recognizer.name]} and {source} are both named "
                f"{recognizer.name!r}, under which their scores are kept. Rename one of the "
                "folders (of one that train_asr.py wrote, the name in its asr.yaml)."
            )
        named[recognizer.name] = source
    return recognizers


#: A longer utterance is a batch by itself.
LONG_SECONDS = 60


def evaluate_system(
    folder: str | Path,
    enhancer: Callable | str | None,
    pairs: "SpeechPairs | Recordings",
    recognizers: Sequence[Recognizer],
    mix: float = 1.0,
    **options: Any,
) -> Path:
    """Score a system and write ``FOLDER/scores/TEST_SET.jsonl``.

    Arguments
    ---------
    folder : str or Path
        ``.../STRATEGY/SEED``, from which strategy and seed of the lines are taken.
    mix : float
        Share of the enhanced signal; the rest is the input. Default: 1.
    enhancer, pairs, recognizers, options
        As of :func:`evaluate_mixes`, and so are the errors.

    Returns
    -------
    Path
        The scores file.
    """
    return evaluate_mixes({mix: folder}, enhancer, pairs, recognizers, **options)[0]


def evaluate_mixes(
    folders: dict,
    enhancer: Callable | str | None,
    pairs: "SpeechPairs | Recordings",
    recognizers: Sequence[Recognizer],
    test_set: str = "test",
    batch_size: int = 4,
    workers: int | None = 0,
    num_workers: int = 0,
    audio_examples: int = 0,
    overwrite: bool = False,
    device: "str | torch.device" = "cpu",
    save_audio: str | Path | None = None,
    bar: tqdm | None = None,
    max_batch_seconds: float | None = None,
    names: Sequence[str] | None = None,
    measures: dict | None = None,
) -> list[Path]:
    """Score systems that differ in the share of the enhanced signal; speech is enhanced once.

    Each gets a file ``FOLDER/scores/TEST_SET.jsonl``. While it runs, lines go to
    ``TEST_SET.jsonl.part``; the same call after an interruption
    continues there. Finished scores made with the same settings are left as they are. Under
    ``torchrun`` every process scores its share, into a ``.part`` of its own; the finished file
    is the same for any number of processes.

    Arguments
    ---------
    folders : dict
        ``{mix: folder}``: the share of the enhanced signal, from 0 to 1 (the rest is the input),
        and ``.../STRATEGY/SEED``, from which strategy and seed of the lines are taken.
    enhancer : callable, None or "clean"
        ``enhancer(Waveforms) -> Waveforms``; None scores the noisy input, "clean" the target. A
        digest of its weights is kept with the scores, so that those of others are not taken for
        its.
    pairs : pi_finetune.data.loading.SpeechPairs or pi_finetune.data.recordings.Recordings
        The test set. Recordings have no clean speech: they are scored by what needs none
        (``declarations.without_reference``), and their lines lack the rest.
        Of a silent recording, which says nothing, a recogniser's scores are null.
    recognizers : list
        From :mod:`pi_finetune.recognizers`; the first one's WER is the table's.
    test_set : str
        Name of the set, for the file and the lines.
    batch_size : int
        Utterances enhanced at once; one longer than a minute goes by itself.
    workers : int or None
        Processes that compute PESQ and the like while the models go on; see
        :class:`pi_finetune.results.pool.ScorePool`. Default: 0, none.
    num_workers : int
        Processes that load and mix. Default: 0.
    audio_examples : int
        Keep the audio of this many utterances, spread over the set, for listening.
    overwrite : bool
        Discard scores made with other settings instead of raising.
    device : str or torch.device
        Of the waveforms.
    save_audio : str or Path, optional
        A folder for all audio and its lists, see :mod:`pi_finetune.results.handover`.
    bar : tqdm, optional
        Counts utterances of several calls. Default: one for this call.
    max_batch_seconds : float, optional
        Most seconds in a batch, padding included; batches are then of similar lengths, the longest
        first, and ``batch_size`` is the most utterances. Default: batches are cut in order.
    names : sequence of str, optional
        Metrics, of ``declarations.CHOICES``. Default: PESQ, STOI, ESTOI and SI-SDR, and of
        recordings what needs no clean speech. What needs it is passed over for recordings.
    measures : dict, optional
        Those of :func:`pi_finetune.results.similarity.load_measures`. Default: none.

    Returns
    -------
    list of Path
        The scores files.

    Raises
    ------
    UserError
        Scores or audio made with other settings are there, or clean speech is asked for where
        there is none.
    """
    if enhancer == "clean" and not pairs.has_clean:
        raise UserError("run: clean: there is no clean speech of recordings. Leave it out.")
    names = _applicable(names, pairs)
    measures = {name: each for name, each in (measures or {}).items() if name in names}
    settings = _settings(pairs, enhancer, recognizers, audio_examples, names, measures)
    ids = [pairs.item_id(i) for i in range(len(pairs))]
    kinds = ("enhanced", "noisy", "clean")[: 3 if pairs.has_clean else 2]
    give = "noisy" if enhancer is None else "clean" if enhancer == "clean" else "enhanced"
    examples = {ids[i * len(ids) // audio_examples] for i in range(audio_examples)}

    systems = [_System(mix, Path(folder), test_set) for mix, folder in folders.items()]
    for system in systems:
        audio = None if save_audio is None else SavedAudio(save_audio, system.name, give, ids)
        system.begin(ids, settings, audio, kinds, overwrite)

    todo = set().union(*(system.todo for system in systems))
    batches = _batches(pairs, batch_size, max_batch_seconds, todo)[rank() :: processes()]
    loader = torch.utils.data.DataLoader(
        pairs, batch_sampler=batches, collate_fn=collate, num_workers=num_workers if batches else 0
    )
    with contextlib.ExitStack() as stack:
        if bar is None:
            about = ", ".join(system.name for system in systems)
            bar = tqdm(desc=about, unit="utt", total=0, disable=rank() > 0)
            bar.total = sum(
                len(ids) - len(s.todo) + sum(i in s.todo for batch in batches for i in batch)
                for s in systems
            )
            stack.enter_context(bar)
        if not bar.disable:  # as that of any process but the first
            before = sum(len(ids) - len(system.todo) for system in systems)
            bar.initial += before  # what was done before took no time now
            bar.n += before
            bar.refresh()
        for system in systems:
            if not system.finished:
                system.file = stack.enter_context(_part(system.final, rank()).open("a"))
        pool = ScorePool(workers, [m.name for m in WAVEFORM_METRICS if m.name in names])
        stack.enter_context(pool)
        if pool.names:
            stack.enter_context(_threads_beside(pool.workers))
        stack.enter_context(torch.inference_mode())
        lines = _Lines(bar)
        for places, batch in zip(batches, loader):
            noisy = batch.noisy.to(device)
            given = batch.clean.to(device) if enhancer == "clean" else noisy
            enhanced = enhancer(noisy) if callable(enhancer) else given
            for system in systems:
                rows = [row for row, i in enumerate(places) if i in system.todo]
                if not rows:
                    continue
                wavs = enhanced
                if system.mix != 1:
                    wavs = noisy.with_data(mixed(enhanced.data, noisy.data, system.mix))
                wavs = wavs.taken(torch.tensor(rows))
                if system.audio is not None:
                    _save(system.audio, batch, rows, wavs)
                known = sum(batch.id[row] in system.scored for row in rows)
                bar.update(known)
                if known == len(rows):
                    continue
                lines += _score(
                    system, batch, rows, wavs, recognizers, pool, measures, CER.name in names
                )
                for row, wav in zip(rows, wavs.items()):
                    if batch.id[row] in examples and batch.id[row] not in system.scored:
                        _keep_example(system, batch, row, wav, give)
                lines.write()
        lines.write(all_of_them=True)
    ddp_barrier()
    for system in systems:
        if not system.finished:
            on_main(_merge, system.final, ids)
        if system.audio is not None:
            texts = {id_: pairs.item_text(i) for i, id_ in enumerate(ids)}
            on_main(system.audio.finish, kinds, texts)
    return [system.final for system in systems]


@contextlib.contextmanager
def _threads_beside(workers):
    """PyTorch on the cores that processes leave: its threads wait for the one that has none."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(os.sched_getaffinity(0)) - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _applicable(names, pairs):
    """The metrics asked for, or the default, that there is a reference for."""
    default: Sequence[str] = metrics.SIGNAL_SCORES if pairs.has_clean else without_reference()
    return [
        name
        for name in (default if names is None else names)
        if pairs.has_clean or not CHOICES[name].needs_reference
    ]


def _settings(pairs, enhancer, recognizers, audio_examples, names, measures):
    """What is kept beside scores, and must be the same for them to be continued."""
    settings = {
        "pairs": pairs.fingerprint(),
        "recognizers": [recognizer.name for recognizer in recognizers],
        "weights": _digest(enhancer),
        "audio_examples": audio_examples,
    }
    if not pairs.has_clean or set(names) != set(metrics.SIGNAL_SCORES):
        settings["metrics"] = sorted(names)
    if measures:
        settings["models"] = {name: measure.source for name, measure in measures.items()}
    return settings


class _System:
    """A system while it is scored: where its scores and its audio go, and what is there."""

    def __init__(self, mix, folder, test_set):
        self.mix = mix
        self.strategy, self.seed = folder.parent.name, folder.name
        self.name = f"{self.strategy}/{self.seed}"
        self.test_set = test_set
        self.final = folder / "scores" / f"{test_set}.jsonl"
        self.scored = set()
        self.todo = set()
        self.finished = False
        self.audio = None
        self.file = None

    def begin(self, ids, settings, audio, kinds, overwrite):
        """Find what an earlier call left of scores and audio; ``todo`` are the places to do."""
        own = settings if self.mix == 1 else {**settings, "mix": self.mix}
        self.scored = on_main(_begin, self.final, own, overwrite)
        self.finished = self.scored is None
        if self.finished:
            self.scored = set(ids)
        self.audio = audio
        if audio is not None:
            wanted = {key: own.get(key) for key in ("pairs", "weights", "mix")}
            on_main(audio.begin, wanted, overwrite)
        self.todo = {
            i
            for i, id_ in enumerate(ids)
            if id_ not in self.scored or (audio and not audio.has(id_, kinds))
        }


class _Lines(collections.deque):
    """Score lines that may wait for their signal scores: written in order, counted by a bar."""

    def __init__(self, bar):
        super().__init__()
        self.bar = bar

    def write(self, all_of_them=False):
        """Write the first lines, as far as they are scored; or wait for all of them."""
        while self and (all_of_them or self[0][1].done()):
            system, signal, before, after = self.popleft()
            system.file.write(json.dumps({**before, **signal.result(), **after}) + "\n")
            system.file.flush()
            self.bar.update()


def _batches(pairs, batch_size, max_seconds, todo):
    """Batches of indices, without those that are not in ``todo``.

    They are cut from the whole set, before anything is left out: so an utterance has the same
    neighbours, and the same last digits, in any number of processes.
    """
    batches: list = []
    batch: list = []
    seconds = pairs.seconds()
    order = range(len(seconds))
    if max_seconds is not None:
        order = sorted(order, key=lambda i: -seconds[i])
    for i in order:
        if seconds[i] > LONG_SECONDS:
            batches.append([i])
            continue
        if batch and max_seconds is not None and (len(batch) + 1) * seconds[batch[0]] > max_seconds:
            batches.append(batch)
            batch = []
        batch.append(i)
        if len(batch) == batch_size:
            batches.append(batch)
            batch = []
    batches.append(batch)
    left = [[i for i in batch if i in todo] for batch in batches]
    return [batch for batch in left if batch]


def _score(system, batch, rows, wavs, recognizers, pool, measures, characters):
    """Score lines of some rows of a batch, of which ``wavs`` is what is scored.

    Yields
    ------
    (_System, pi_finetune.results.pool.Scores, dict, dict)
        The signal scores, and what a line has before and after them: of the recognisers, with
        character errors if asked for, and of the measures.
    """
    texts = [batch.text[row] for row in rows]
    clean = _numpy(batch.clean, rows) if hasattr(batch, "clean") else [None] * len(rows)
    estimates = _numpy(wavs)
    signals = [pool.submit(batch.id[row], *pair) for row, *pair in zip(rows, clean, estimates)]
    heard = [(r, r(wavs), likelihoods(r, wavs, texts)) for r in recognizers]
    found = {}
    if measures:
        reference = batch.clean.taken(torch.tensor(rows)).to(wavs.data.device)
        ids, texts_of = [batch.id[row] for row in rows], {r.name: said for r, said, _ in heard}
        found = {name: each(reference, wavs, ids, texts_of) for name, each in measures.items()}
    for i, row in enumerate(rows):
        if batch.id[row] in system.scored:
            continue
        silent = is_silent(batch.noisy.items()[row])
        before = {
            "id": batch.id[row],
            "recording": batch.recording[row],
            "speaker": batch.speaker[row],
            "strategy": system.strategy,
            "seed": system.seed,
            "set": system.test_set,
            "snr": None if batch.snr[row] is None else float(batch.snr[row]),
            "noise_class": batch.noise_class[row],
            "duration": round(len(estimates[i]) / SAMPLE_RATE, 4),
        }
        recognised = {
            r.name: None if silent else {**_errors(r, texts[i], said[i], characters), **nlls[i]}
            for r, said, nlls in heard
            if texts[i] is not None
        }
        of_models = {name: values[i] for name, values in found.items()}
        yield system, signals[i], before, {**of_models, "asr": recognised}


def _errors(recognizer, reference, hypothesis, characters):
    errors = metrics.recognition_errors(recognizer, reference, hypothesis)
    if characters and recognizer.unit == "word":
        errors |= metrics.character_errors(reference, hypothesis)
    return errors


def _save(audio, batch, rows, wavs):
    kinds = {"enhanced": _numpy(wavs), "noisy": _numpy(batch.noisy, rows)}
    if hasattr(batch, "clean"):
        kinds["clean"] = _numpy(batch.clean, rows)
    for i, row in enumerate(rows):
        audio.write(batch.id[row], {kind: items[i] for kind, items in kinds.items()})


def _keep_example(system, batch, row, wav, give):
    """Keep the audio of an utterance for the report: of noisy speech the clean too."""
    kinds = {"enhanced": wav}
    if give == "noisy":
        kinds = {"noisy": wav}
        if hasattr(batch, "clean"):
            kinds["clean"] = batch.clean.items()[row]
    for kind, item in kinds.items():
        path = system.final.with_suffix("") / "audio" / f"{batch.id[row]}.{kind}.flac"
        save_flac(path, item.cpu().numpy())


def _numpy(wavs, rows=None):
    """Some rows of ``Waveforms``, or all, as arrays [T]."""
    items = wavs.to("cpu").items()
    return [items[row].numpy() for row in (range(len(items)) if rows is None else rows)]


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
        keys = dict.fromkeys([*settings, *({"metrics", "models"} & earlier.keys())])
        changed = [key for key in keys if earlier.get(key) != settings.get(key)]
        if changed and not overwrite:
            raise UserError(
                f"{final} was made with other {', '.join(changed)}. Add --overwrite to score anew, "
                "or name another place (--test_set of evaluate, --output_folder of check)."
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


def _digest(enhancer):
    """Of the model in memory: its file may hold another by now, if its training still goes on."""
    enhancer = getattr(enhancer, "module", enhancer)
    if not isinstance(enhancer, torch.nn.Module):
        return None
    return weights_digest(getattr(enhancer, "config", None), enhancer.state_dict())
