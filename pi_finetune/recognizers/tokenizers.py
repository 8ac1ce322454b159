"""Text to indices for CTC, and back."""

import string
from collections.abc import Iterable

from speechbrain.decoders.ctc import ctc_greedy_decode

from pi_finetune.errors import UserError
from pi_finetune.lengths import shares
from pi_finetune.phonemes import inventory, phonemes

__all__ = ["CharacterTokenizer", "PhonemeTokenizer"]


#: LibriSpeech's characters.
CHARACTERS = " '" + string.ascii_uppercase


class _CTCTokenizer:
    def decode(self, indices: Iterable[int]) -> str:
        raise NotImplementedError

    def greedy(self, log_probs, frame_lengths):
        """Texts of the best path through log_probs [B, F, V], lengths [B] in frames."""
        relative = shares(frame_lengths, log_probs.shape[1])
        return [self.decode(best) for best in ctc_greedy_decode(log_probs, relative, blank_id=0)]


class CharacterTokenizer(_CTCTokenizer):
    """Characters to indices for CTC and back; index 0 is the blank.

    Arguments
    ---------
    characters : str
        Default: upper case letters, apostrophe and space, as in LibriSpeech.
    """

    unit = "word"

    def __init__(self, characters: str = CHARACTERS):
        if len(set(characters)) != len(characters) or " " not in characters:
            raise UserError("characters: name each once, the space among them.")
        self.characters = characters
        self.config = {"characters": characters}

    def __len__(self):
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """List of indices of ``text`` in upper case; punctuation without an index is a space.

        Raises
        ------
        UserError
            A letter or digit has no index.
        """
        text = text if any(map(str.islower, self.characters)) else text.upper()
        unknown = sorted({c for c in text if c.isalnum() and c not in self.characters})
        if unknown:
            raise UserError(
                f"the transcript {text!r} has {unknown}, which are not among the recogniser's "
                "characters: spell them out, or add them to `characters`"
            )
        text = "".join(c if c in self.characters else " " for c in text)
        return [self.characters.index(c) + 1 for c in " ".join(text.split())]

    def decode(self, indices: Iterable[int]) -> str:
        """Text of a list of indices, without blanks."""
        return " ".join("".join(self.characters[i - 1] for i in indices).split())


class PhonemeTokenizer(_CTCTokenizer):
    """English text to the indices of its phonemes for CTC; back to phonemes, not to text.

    Arguments
    ---------
    phonemes : list of str, optional
        Index 1 first; 0 is the blank. Default: those of :mod:`pi_finetune.phonemes`.
    """

    unit = "phoneme"

    def __init__(self, phonemes: list[str] | None = None):
        self.phonemes = list(phonemes or inventory())
        self.indices = {phoneme: i for i, phoneme in enumerate(self.phonemes, start=1)}
        self.config = {"phonemes": self.phonemes}

    def __len__(self):
        return len(self.phonemes) + 1

    def encode(self, text: str) -> list[int]:
        """List of indices of the phonemes of ``text``."""
        return [self.indices[phoneme] for phoneme in phonemes(text)]

    def decode(self, indices: Iterable[int]) -> str:
        """Phonemes of a list of indices, separated by blanks."""
        return " ".join(self.phonemes[i - 1] for i in indices)
