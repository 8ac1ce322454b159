"""English text to phonemes, without a network: one pronunciation a word, as in a lexicon.

The lexicon is gruut's for American English (made from CMUdict), in IPA without stress marks. A word
it lacks is pronounced as gruut's grapheme-to-phoneme model for it, a conditional random field,
predicts; so every text has phonemes, and the same ones always. Of several pronunciations the
lexicon's first is taken, whatever the sentence.
"""

import functools
import re
import sqlite3
import unicodedata

from pi_finetune.errors import optional

__all__ = ["inventory", "phonemes"]


STRESS = re.compile("[ˈˌ]")


def phonemes(text: str) -> list[str]:
    """Phonemes of an English text.

    Arguments
    ---------
    text : str
        Case and punctuation do not matter; numbers are read as words ("25", "twenty five").

    Returns
    -------
    list of str
        E.g. ``["ð", "ə", "k", "æ", "t"]``; word boundaries are not marked.

    Raises
    ------
    UserError
        The packages of the extra ``phonemes`` are missing.
    """
    text = unicodedata.normalize(
        "NFKD", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    text = re.sub(r"\d+", _spelled, "".join(c for c in text if not unicodedata.combining(c)))
    words = (word.strip("'") for word in re.findall("[a-z']+", text))
    return [phoneme for word in words if word for phoneme in _pronounce(word)]


@functools.cache
def inventory() -> tuple[str, ...]:
    """All phonemes of the lexicon, a sorted tuple."""
    return tuple(sorted({phoneme for word in _lexicon().values() for phoneme in word}))


def _spelled(match):
    return f" {_needed('num2words').num2words(int(match.group()))} "


@functools.cache
def _pronounce(word):
    return _lexicon().get(word) or _split_stress(_guesser()(word))


def _split_stress(marked):
    return tuple(STRESS.sub("", phoneme) for phoneme in marked)


@functools.cache
def _lexicon():
    """``{word: phonemes}``. gruut's own look-up of a word reads its whole table each time."""
    folder = _needed("gruut_lang_en").get_lang_dir()
    query = "SELECT word, phonemes FROM word_phonemes ORDER BY pron_order DESC"
    connection = sqlite3.connect((folder / "lexicon.db").as_uri() + "?mode=ro", uri=True)
    try:
        return {word: _split_stress(marked.split()) for word, marked in connection.execute(query)}
    finally:
        connection.close()


@functools.cache
def _guesser():
    folder = _needed("gruut_lang_en").get_lang_dir()
    return _needed("gruut.g2p").GraphemesToPhonemes(folder / "g2p" / "model.crf")


def _needed(module):
    return optional(module, "phonemes", "a recogniser or score of phonemes")
