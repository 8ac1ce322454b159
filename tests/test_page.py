"""The page of demo-page: what it computes, and in headless Chromium."""

from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
import torch
from browser import CHROMIUM, Browser
from running import Parrot

from pi_finetune import __main__ as cli
from pi_finetune import page as pages
from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.page import Page, read_mono


@pytest.fixture
def recording(tmp_path):
    """Two seconds in stereo at 44.1 kHz."""
    wav = 0.1 * np.random.default_rng(0).standard_normal((88200, 2))
    soundfile.write(tmp_path / "in.wav", wav, 44100)
    return tmp_path / "in.wav"


@pytest.fixture
def page(pretrained, monkeypatch):
    monkeypatch.setattr(pages, "load_recognizer", lambda source: Parrot())
    return Page(pretrained, "parrot", mix=0.5)


def test_enhance(page, recording):
    noisy, enhanced, told = page.enhance(str(recording), "the dog barks", 1.0)
    assert noisy.shape == enhanced.shape == (32000,)
    expected = page.enhancer.enhance(torch.from_numpy(noisy)).numpy()
    np.testing.assert_array_equal(enhanced, expected)
    half = page.enhance(str(recording), "", 0.5)[1]
    np.testing.assert_allclose(half, (noisy + enhanced) / 2, atol=1e-6)
    assert told.count("<img") == 2 and told.count(" in 3 (") == 2
    heard = Parrot()(Waveforms.of(torch.from_numpy(noisy)[None]))[0]
    assert f"<td>{heard}</td>" in told


def test_without_a_text_and_without_a_recogniser(page, recording, pretrained):
    assert "errors:" not in page.enhance(str(recording), " ", 1.0)[2]
    told = Page(pretrained).enhance(str(recording), "one", 1.0)[2]
    assert "Heard by" not in told and "<img" in told


def test_texts_are_text(page, recording):
    told = page.enhance(str(recording), "<script>alert(1)</script>", 1.0)[2]
    assert "<script>" not in told and "&lt;script&gt;" in told


def test_bad_recordings(tmp_path, monkeypatch):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "long.wav", np.zeros(16000), 16000)
    monkeypatch.setattr(pages, "LONGEST_SECONDS", 0.5)
    for name, message in (
        (None, "Upload or record"), ("text.wav", r"text\.wav: cannot be read as audio"),
        ("nan.wav", "not finite"), ("empty.wav", "no samples"), ("long.wav", "more than 0.5 s"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_mono(name and str(tmp_path / name))


def test_without_gradio(page, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"demo-page needs .*'pi_finetune\[page\]'"):
        page.blocks()


def test_the_command(monkeypatch):
    seen = {}
    monkeypatch.setattr(pages, "Page", lambda *given: seen.update(given=given) or Served())

    class Served:
        def launch(self, host, port):
            seen.update(host=host, port=port)

    assert cli.main(["demo-page", "--run", "x", "--asr_source", "null", "--mix", "0.8"]) == 0
    assert seen == {"given": ("x", None, 0.8, False), "host": "127.0.0.1", "port": None}


@pytest.mark.needs("gradio")
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_chromium(page, recording, tmp_path):
    server, address = page.launch(block=False)
    try:
        with Browser(tmp_path / "profile") as browser:
            browser.call("Page.navigate", url=address)
            browser.wait("!!document.querySelector('#given input[type=file]')")
            assert browser.evaluate("document.querySelector('#mix input').value") == "0.5"
            browser.upload("#given input[type=file]", recording)
            browser.wait("!document.querySelector('#given input[type=file]')")  # it is shown now
            browser.write("#said textarea", "the dog barks")
            browser.evaluate("document.querySelector('#enhance').click()")
            browser.wait("document.querySelectorAll('#told img').length == 2")
            images = browser.evaluate(
                "[...document.querySelectorAll('#told img')].map(i => i.naturalWidth)"
            )
            assert images == [960, 960]
            for name in ("noisy", "enhanced"):
                # The player has decoded it.
                browser.wait(f"document.querySelector('#{name}').textContent.includes('0:02')")
                told = browser.evaluate(f"document.querySelector('.errors-{name}').textContent")
                assert " in 3 (" in told
            browser.screenshot(tmp_path / "page.png")
            hosts = {urlsplit(url).hostname for url in browser.requests if url[:4] == "http"}
            assert hosts == {"127.0.0.1"}
            assert not browser.errors
    finally:
        server.close()
