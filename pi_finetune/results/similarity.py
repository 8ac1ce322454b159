"""How alike models find enhanced and clean speech: SpeechBERTScore, phonemes, speakers.

A measure is called with the clean and the enhanced :class:`~pi_finetune.lengths.Waveforms`, the ids
of the utterances, and what recognisers heard in the enhanced speech, ``{name: texts}``; it returns
``[float or None]``. None: one side is silent, not finite, or too short for the model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.phonemes import phonemes
from pi_finetune.results.metrics import SILENCE, token_errors

if TYPE_CHECKING:
    from pi_finetune.recognizers import Recognizer
    from pi_finetune.teacher import Teacher

__all__ = [
    "PhonemeSimilarity",
    "SpeakerSimilarity",
    "SpeechBERTScore",
    "bert_score",
    "load_measures",
]


def load_measures(
    names: Sequence[str],
    teacher: Callable | None = None,
    recognizers: "Sequence[Recognizer]" = (),
    speaker_source: str | None = None,
    trust: bool = False,
) -> dict:
    """Make the measures that are asked for.

    Arguments
    ---------
    names : sequence of str
        Metrics; those that need no model are passed over.
    teacher : callable, optional
        Makes the :class:`~pi_finetune.teacher.Teacher` of ``speech_bert_score``.
    recognizers : sequence of Recognizer
        The first that writes phonemes, else the first, is that of ``phoneme_similarity``.
    speaker_source : str, optional
        Folder of the model of ``speaker_similarity``, as SpeechBrain publishes
        ``spkrec-ecapa-voxceleb``.
    trust : bool
        Whether the code that its ``hyperparams.yaml`` names may run. Default: False.

    Returns
    -------
    dict
        ``{name: measure}``, each with an attribute ``source`` that names its model.

    Raises
    ------
    UserError
        A model is not given or cannot be loaded.
    """
    measures: dict = {}
    if "speech_bert_score" in names:
        if teacher is None:
            raise UserError("metrics: speech_bert_score needs a teacher; set teacher_source.")
        measures["speech_bert_score"] = SpeechBERTScore(teacher())
    if "phoneme_similarity" in names:
        if not recognizers:
            raise UserError("metrics: phoneme_similarity needs a recogniser; set asr_source.")
        of_phonemes = (r for r in recognizers if r.unit == "phoneme")
        recognizer = next(of_phonemes, recognizers[0])
        measures["phoneme_similarity"] = PhonemeSimilarity(recognizer)
    if "speaker_similarity" in names:
        measures["speaker_similarity"] = SpeakerSimilarity(speaker_source, trust)
    return measures


class SpeechBERTScore:
    """Precision of SpeechBERTScore (Saeki et al. 2024): higher is better, 1 at most.

    The mean, over the enhanced frames of a teacher, of the cosine with the most similar clean
    frame, wherever in the utterance that is.

    Arguments
    ---------
    teacher : pi_finetune.teacher.Teacher
        Its layer is that of the score. (The authors use layer 14 of WavLM Large.)
    """

    def __init__(self, teacher: "Teacher"):
        self.teacher = teacher
        self.source = f"{teacher.source}, {teacher.layers}"

    @torch.no_grad()
    def __call__(
        self, clean: Waveforms, enhanced: Waveforms, ids: Sequence[str], heard: dict
    ) -> list[float | None]:
        """See the module."""
        longest = self.teacher.max_length or float("inf")
        pairs = {
            i: pair
            for i, pair in _audible(clean, enhanced).items()
            if self.teacher.receptive_field <= len(pair[0]) <= longest
        }
        scores: list[float | None] = [None] * len(ids)
        if not pairs:
            return scores
        self.teacher.to(clean.data.device)
        sides = [self.teacher(Waveforms.collate(side)) for side in zip(*pairs.values())]
        for row, i in enumerate(pairs):
            reference, estimate = (reps[row, : int(frames[row])] for reps, frames in sides)
            scores[i] = bert_score(reference, estimate)
        return scores


def bert_score(reference: torch.Tensor, estimate: torch.Tensor) -> float:
    """Mean over the frames of ``estimate`` [F, D] of the largest cosine with one of ``reference``.

    Arguments
    ---------
    reference, estimate : torch.Tensor
        [F', D] and [F, D].

    Returns
    -------
    float
    """
    cosines = F.normalize(estimate.double(), dim=1) @ F.normalize(reference.double(), dim=1).T
    return float(cosines.amax(1).mean())


class PhonemeSimilarity:
    """Levenshtein phoneme similarity (Pirklbauer et al. 2023): higher is better, 1 at most.

    ``1 - edits / phonemes`` of what a recogniser hears in the enhanced and in the clean speech,
    insertions included, so that it can be negative. The words of a recogniser of words are taken
    to phonemes by the lexicon. None where it hears nothing in the clean speech.

    Arguments
    ---------
    recognizer : Recognizer
    """

    def __init__(self, recognizer: "Recognizer"):
        self.recognizer = recognizer
        self.source = recognizer.name
        self._clean: dict = {}  # of clean speech, which is the same for every system

    def __call__(
        self, clean: Waveforms, enhanced: Waveforms, ids: Sequence[str], heard: dict
    ) -> list[float | None]:
        """See the module."""
        pairs = _audible(clean, enhanced)
        new = [i for i in pairs if ids[i] not in self._clean]
        if new:
            texts = self.recognizer(clean.taken(torch.tensor(new)))
            self._clean |= {ids[i]: self._phonemes(text) for i, text in zip(new, texts)}
        texts = heard.get(self.recognizer.name) or self.recognizer(enhanced)
        scores: list[float | None] = [None] * len(ids)
        for i in pairs:
            reference = self._clean[ids[i]]
            if reference:
                estimate = self._phonemes(texts[i])
                edits = token_errors(" ".join(reference), " ".join(estimate))
                scores[i] = 1 - edits / len(reference)
        return scores

    def _phonemes(self, text):
        return text.split() if self.recognizer.unit == "phoneme" else phonemes(text)


class SpeakerSimilarity:
    """Cosine of the embeddings of a speaker recogniser, -1 to 1, higher is better.

    Arguments
    ---------
    source : str or Path
        Folder of a model of SpeechBrain with an ``embedding_model``, e.g. ECAPA-TDNN.
    trust : bool
        Its ``hyperparams.yaml`` names classes, whose code runs when it is read.
    """

    #: The fewest samples that are given to it: 0.1 s.
    LEAST = 1600

    def __init__(self, source: str | Path | None, trust: bool = False):
        from speechbrain.inference.classifiers import EncoderClassifier
        from speechbrain.utils.fetching import LocalStrategy

        if source is None:
            raise UserError(
                "metrics: speaker_similarity needs a model of speakers; set speaker_source to a "
                "folder of SpeechBrain's spkrec-ecapa-voxceleb."
            )
        if not trust:
            raise UserError(
                f"speaker_source: loading {source} runs the code that its hyperparams.yaml names. "
                "Add --trust if you trust it."
            )
        try:
            self.model = EncoderClassifier.from_hparams(
                source=str(source),
                # The published file names the hub's folder as the place of the weights.
                overrides={"pretrained_path": str(source)},
                overrides_must_match=False,
                local_strategy=LocalStrategy.NO_LINK,
            )
        except Exception as error:  # whatever the YAML or the classes in it raise
            raise UserError(
                f"speaker_source: cannot load {source}: {type(error).__name__}: {error}. Needed is "
                "a folder with hyperparams.yaml and the weights that it names."
            ) from error
        self.source = str(source)

    @torch.no_grad()
    def __call__(
        self, clean: Waveforms, enhanced: Waveforms, ids: Sequence[str], heard: dict
    ) -> list[float | None]:
        """See the module."""
        device = clean.data.device
        if str(self.model.device) != str(device):
            self.model.device = str(device)
            self.model.to(device)
        scores: list[float | None] = [None] * len(ids)
        for i, pair in _audible(clean, enhanced).items():
            if len(pair[0]) >= self.LEAST:  # one by one: its statistics know no exact lengths
                one, other = (self.model.encode_batch(wav[None].float()).flatten() for wav in pair)
                scores[i] = float(F.cosine_similarity(one.double(), other.double(), dim=0))
        return scores


def _audible(clean, enhanced):
    """``{row: (clean [T], enhanced [T])}`` where both are finite and not silent."""
    pairs = enumerate(zip(clean.items(), enhanced.items()))
    return {i: pair for i, pair in pairs if all(map(_is_audible, pair))}


def _is_audible(wav):
    return (
        bool(len(wav) and wav.isfinite().all()) and float((wav - wav.mean()).abs().max()) >= SILENCE
    )
