"""Text to phonemes: what the lexicon says, what is predicted, always offline and the same."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_finetune import phonemes as lexicon
from pi_finetune.errors import UserError
from pi_finetune.phonemes import inventory, phonemes


@pytest.mark.needs("gruut")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("THE CAT", "ð ə k æ t"),
        ("don't", "d oʊ n t"),
        ("don’t", "d oʊ n t"),
        ("'Please,' she said.", "p l i z ʃ i s ɛ d"),
        ("half-past 25", "h æ f p æ s t t w ɛ n t i f aɪ v"),
        ("café", "k æ f eɪ"),
        ("record", "ɹ ɛ k ɚ d"),
        ("", ""),
        (" ... ", ""),
    ],
)
def test_phonemes(text, expected):
    assert " ".join(phonemes(text)) == expected


@pytest.mark.needs("gruut")
def test_words_outside_the_lexicon_are_predicted():
    spoken = phonemes("Bragelonne Britannula")
    assert len(spoken) > 10 and set(spoken) <= set(inventory())
    assert phonemes("bragelonne") == spoken[: len(phonemes("bragelonne"))]


@pytest.mark.needs("gruut")
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_has_phonemes_of_the_inventory(text):
    assert set(phonemes(text)) <= set(inventory())
    assert phonemes(f"{text} cat")[-3:] == ["k", "æ", "t"]


def test_what_brings_a_missing_lexicon_is_named(monkeypatch):
    for cached in (inventory, lexicon._lexicon, lexicon._pronounce):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "gruut_lang_en", None)
    for ask in (inventory, lambda: phonemes("cat")):
        with pytest.raises(UserError, match=r"gruut_lang_en.*'pi_finetune\[phonemes\]'"):
            ask()


@pytest.mark.needs("gruut")
def test_no_network_is_needed():
    """A fresh process whose sockets fail, so that nothing is cached from other tests."""
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from pi_finetune.phonemes import phonemes\n"
        "print(len(phonemes('the bragelonne 7')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(phonemes("the bragelonne 7"))
