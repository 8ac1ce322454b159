"""Recognisers behind one interface, :class:`Recognizer`: ``recognizer(waveforms) -> list[str]``.

Texts are raw; :func:`pi_finetune.results.metrics.recognition_errors` normalises them.
What an utterance is batched with does not change its text. An utterance with a
non-finite sample (a diverged enhancer's) has the text "".

Those here are :class:`LikelyRecognizer`, which can say how likely the true transcripts are; nothing
is decoded for it. One of your own may come without; :func:`likelihoods` is the one place that
knows.
"""

from pathlib import Path

from pi_finetune.errors import UserError
from pi_finetune.recognizers.base import (
    LikelyRecognizer,
    Recognizer,
    gives_likelihood,
    likelihoods,
)
from pi_finetune.recognizers.ctc import (
    CONFIG_FILE,
    CTCHead,
    CTCRecognizer,
    fingerprint,
    save_recognizer,
)
from pi_finetune.recognizers.log_mel import LogMel
from pi_finetune.recognizers.tokenizers import CharacterTokenizer, PhonemeTokenizer
from pi_finetune.recognizers.whisper import WhisperRecognizer

__all__ = [
    "CTCHead",
    "CTCRecognizer",
    "CharacterTokenizer",
    "LikelyRecognizer",
    "LogMel",
    "PhonemeTokenizer",
    "Recognizer",
    "WhisperRecognizer",
    "fingerprint",
    "gives_likelihood",
    "likelihoods",
    "load_recognizer",
    "save_recognizer",
]


def load_recognizer(source: str | Path) -> CTCRecognizer | WhisperRecognizer:
    """Load the recogniser that ``source`` names, whatever its kind.

    Arguments
    ---------
    source : str or Path
        A folder written by ``recipes/train_asr.py`` (it holds ``asr.yaml``), a
        folder with a Whisper model as ``transformers`` saves it, or the hub name of
        one.

    Returns
    -------
    CTCRecognizer or WhisperRecognizer

    Raises
    ------
    UserError
        The folder is missing or neither kind, its weights are missing or do not fit,
        or the hub cannot be asked.
    """
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return CTCRecognizer(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"recogniser folder '{source}' holds neither {CONFIG_FILE} (as recipes/train_asr.py "
            "writes it) nor config.json (a Whisper model of transformers): name another folder"
        )
    return WhisperRecognizer(str(source))
