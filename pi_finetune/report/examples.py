"""Utterances to listen to: audio, spectrograms, what the recogniser heard, an alignment."""

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from pi_finetune.errors import UserError

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison

__all__ = ["FLAC_BUDGET", "align", "encode_all", "load_examples"]


#: Above this many bytes of lossless audio the report's players get Opus instead.
FLAC_BUDGET = 2_200_000


@dataclass
class Version:
    """One example as one system has it; ``words`` are pairs (kind, text) as of :func:`align`."""

    system: str
    seed: int | None
    wav: np.ndarray
    words: list | None = None
    scores: dict = field(default_factory=dict)


@dataclass
class Example:
    """One utterance of which audio was kept."""

    id: str
    sample_rate: int
    info: dict
    reference: str | None
    versions: list[Version]

    def wav(self, system: str) -> np.ndarray | None:
        """Waveform [T] of a system's version; None if there is none."""
        return next((v.wav for v in self.versions if v.system == system), None)


def load_examples(
    comparison: "Comparison",
    recognizer: str | None = None,
    chosen: list[str] | None = None,
    limit: int = 3,
) -> list[Example]:
    """Read the utterances whose audio the evaluation kept.

    Arguments
    ---------
    comparison : pi_finetune.results.comparison.Comparison
    recognizer : str, optional
        Whose texts are shown.
    chosen : list of str, optional
        Utterance ids. Default: the first of those that most systems have.
    limit : int
        How many, where none are chosen. Default: 3.

    Returns
    -------
    list of Example
        Versions in the order noisy, clean, then systems, each by its first seed with audio.

    Raises
    ------
    UserError
        A chosen utterance has no audio, or an audio file cannot be read.
    """
    files: dict = {}  # id -> {(system, kind): (run, path)}
    for run in comparison.runs:
        folder = run.folder / "scores" / comparison.test_set / "audio"
        for path in sorted(folder.glob("*.*.*")) if folder.is_dir() else ():
            utterance, kind, _ = path.name.rsplit(".", 2)
            if utterance in run.scores and kind in ("noisy", "clean", "enhanced"):
                name = run.strategy if kind == "enhanced" else kind
                files.setdefault(utterance, {}).setdefault(name, (run, path))
    if chosen:
        for utterance in chosen:
            if utterance not in files:
                there = ", ".join(sorted(files)) or "none"
                raise UserError(
                    f"--utterances {utterance}: no audio was kept. There is {there}; "
                    "audio_examples of recipes/evaluate.py sets how many are kept."
                )
    else:
        order = [id_ for id_ in comparison.ids if id_ in files]
        chosen = sorted(order, key=lambda id_: -len(files[id_]))[:limit]
        chosen = [id_ for id_ in order if id_ in chosen]
    systems = list(dict.fromkeys(["noisy", "clean", *comparison.systems]))
    return [_load(id_, files[id_], systems, recognizer) for id_ in chosen]


def _load(utterance, files, systems, recognizer):
    versions: list[Version] = []
    rate: int = 0
    info: dict = {}
    reference = None
    for system in systems:
        if system not in files:
            continue
        run, path = files[system]
        try:
            wav, found = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise UserError(
                f"{path}: unreadable audio ({error}). Evaluate this run anew."
            ) from None
        rate = rate or found
        if found != rate:
            raise UserError(f"{path}: {found} Hz, but the others are at {rate}. Evaluate anew.")
        line = run.scores[utterance]
        info = {key: line.get(key) for key in ("snr", "noise_class", "duration")}
        version = Version(system, run.seed, wav[:, 0])
        if system != "clean" or run.strategy == "clean":
            version.scores = line
            entry = (line.get("asr") or {}).get(recognizer)
            if entry:
                reference = entry["reference"]
                version.words = align(
                    entry["reference"], entry["hypothesis"], entry.get("unit", "word")
                )
        else:  # the clean signal lies beside the noisy system's scores, which are not its own
            version.seed = None
        versions.append(version)
    return Example(utterance, rate, info, reference, versions)


def align(reference: str, hypothesis: str, unit: str = "word") -> list[tuple[str, str, str]]:
    """Alignment of two texts, normalised as they were when errors were counted.

    Arguments
    ---------
    reference, hypothesis : str
        Raw texts, or phonemes separated by blanks.
    unit : str
        ``word`` (default) or ``phoneme``.

    Returns
    -------
    list of (str, str, str)
        In order: (kind, reference words, hypothesis words); kind is ``equal``, ``substitute``,
        ``delete`` or ``insert``.
    """
    import jiwer

    from pi_finetune.results.metrics import normalise_text

    if unit == "word":
        reference, hypothesis = normalise_text(reference), normalise_text(hypothesis)
    words, heard = reference.split(), hypothesis.split()
    if not words:  # jiwer refuses an empty reference
        return [("insert", "", " ".join(heard))] if heard else []
    chunks = jiwer.process_words(" ".join(words), " ".join(heard)).alignments[0]
    return [
        (
            chunk.type,
            " ".join(words[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in chunks
    ]


def encode_all(examples: list[Example]) -> tuple[dict, str]:
    """Encode the audio of examples, lossless if it is little enough.

    FLAC plays everywhere and hides no artefact; above ``FLAC_BUDGET`` it is Opus in Ogg.

    Arguments
    ---------
    examples : list of Example

    Returns
    -------
    (dict, str)
        {(example id, system): bytes}, and the MIME type.
    """
    parts = [(e.id, v.system, v.wav, e.sample_rate) for e in examples for v in e.versions]
    encoded = {(id_, name): _encode(wav, rate, "FLAC", "PCM_16") for id_, name, wav, rate in parts}
    total = sum(map(len, encoded.values()))
    if total <= FLAC_BUDGET or "OPUS" not in soundfile.available_subtypes("OGG"):
        return encoded, "audio/flac"
    encoded = {(id_, name): _encode(wav, rate, "OGG", "OPUS") for id_, name, wav, rate in parts}
    return encoded, "audio/ogg"


def _encode(wav, sample_rate, container, subtype):
    out = io.BytesIO()
    soundfile.write(out, np.clip(wav, -1, 1), sample_rate, format=container, subtype=subtype)
    return out.getvalue()
