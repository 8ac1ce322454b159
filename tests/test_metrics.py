"""Scores against values worked out by hand, and everything that cannot be scored."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_finetune.errors import UserError
from pi_finetune.results import declarations, metrics

RATE = metrics.SAMPLE_RATE
DNSMOS = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl", "dnsmos_p808")
needs_dnsmos = pytest.mark.needs(*declarations.CHOICES[DNSMOS[0]].packages)


@pytest.fixture
def speech():
    """Two seconds of noise in syllable-like bursts."""
    rng = np.random.default_rng(0)
    time = np.arange(2 * RATE) / RATE
    envelope = np.clip(np.sin(2 * np.pi * 3 * time), 0, None) + 0.01
    return 0.2 * envelope * rng.standard_normal(len(time))


def noisy(speech, snr, seed=1):
    noise = np.random.default_rng(seed).standard_normal(len(speech))
    noise *= np.linalg.norm(speech) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    return speech + noise


def test_si_sdr_by_hand():
    # reference and error orthogonal and free of mean: ratio of energies 100 to 1.
    reference = np.array([1.0, -1.0, 1.0, -1.0])
    error = np.array([0.1, 0.1, -0.1, -0.1])
    assert metrics.si_sdr(reference, reference + error) == pytest.approx(20.0)
    # a scale and a mean on either side change nothing
    assert metrics.si_sdr(3 * reference + 5, -0.2 * (reference + error) + 7) == pytest.approx(20.0)


def test_si_sdr_bounds_are_finite(speech):
    assert metrics.si_sdr(speech, speech) == pytest.approx(156.5, abs=0.1)
    orthogonal = np.array([1.0, 1.0, -1.0, -1.0])
    assert metrics.si_sdr(np.array([1.0, -1.0, 1.0, -1.0]), orthogonal) == pytest.approx(
        -156.5, abs=0.1
    )


@pytest.mark.parametrize("name", metrics.SIGNAL_SCORES)
def test_scores_fall_with_noise(speech, name):
    scores = [metrics.signal_scores(speech, noisy(speech, snr))[name] for snr in (30, 10, -5)]
    assert scores[0] > scores[1] > scores[2]


def test_identical_signals_have_the_best_score(speech):
    assert metrics.pesq_wb(speech, speech) == pytest.approx(4.644, abs=1e-3)
    assert metrics.stoi(speech, speech) == pytest.approx(1.0)
    assert metrics.estoi(speech, speech) == pytest.approx(1.0)


def test_estoi_is_not_stoi(speech):
    degraded = noisy(speech, 5)
    assert abs(metrics.stoi(speech, degraded) - metrics.estoi(speech, degraded)) > 0.01


def test_clipped_signal_is_scored(speech):
    loud = 20 * speech
    scores = metrics.signal_scores(speech, np.clip(loud, -1, 1))
    assert all(np.isfinite(score) for score in scores.values())
    assert scores["si_sdr"] < metrics.si_sdr(speech, loud)
    assert scores["pesq"] < 4.6


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: np.zeros_like(x),
        lambda x: np.full_like(x, 0.3),
        lambda x: np.where(np.arange(len(x)) == 7, np.nan, x),
        lambda x: np.where(np.arange(len(x)) == 7, np.inf, x),
        lambda x: 1e-8 * x,
    ],
    ids=["silent", "constant", "nan", "inf", "inaudible"],
)
def test_what_cannot_be_scored_is_none_on_either_side(speech, spoil):
    nothing = dict.fromkeys(metrics.SIGNAL_SCORES)
    assert metrics.signal_scores(speech, spoil(speech)) == nothing
    assert metrics.signal_scores(spoil(speech), speech) == nothing


@pytest.mark.parametrize("samples", [0, 1, 100, 3999])
def test_too_short_is_none_but_si_sdr_needs_no_length(speech, samples):
    reference = speech[3000 : 3000 + samples]
    scores = metrics.signal_scores(reference, noisy(speech, 10)[3000 : 3000 + samples])
    assert scores["pesq"] is None and scores["stoi"] is None and scores["estoi"] is None
    assert (scores["si_sdr"] is None) == (samples <= 1)


def test_stoi_of_little_speech_in_silence_is_none(speech):
    reference = np.zeros(2 * RATE)
    reference[:4000] = speech[:4000]
    assert metrics.stoi(reference, noisy(reference, 10)) is None
    assert metrics.estoi(reference, noisy(reference, 10)) is None


@pytest.mark.parametrize("snr", [30, 0, -20])
def test_stoi_and_estoi_are_those_of_pystoi(speech, snr, monkeypatch):
    from pystoi import stoi

    pairs = [
        (speech, noisy(speech, snr)),
        (1e-3 * np.tile(speech, 3), np.tile(noisy(speech, snr), 3)),  # longer, and soft
        (np.r_[np.zeros(RATE), speech], noisy(np.r_[np.zeros(RATE), speech], snr)),  # a pause
        (speech[:14000], noisy(speech[:14000], snr)),  # hardly long enough
        (speech, np.clip(4 * speech, -0.1, 0.1)),
    ]
    for many in (metrics.STOI_SEGMENTS, 7):  # at once, and in pieces
        monkeypatch.setattr(metrics, "STOI_SEGMENTS", many)
        for reference, estimate in pairs:
            found = metrics.intelligibility(reference, estimate)
            assert found["stoi"] == pytest.approx(stoi(reference, estimate, RATE), abs=1e-9)
            extended = stoi(reference, estimate, RATE, extended=True)
            assert found["estoi"] == pytest.approx(extended, abs=1e-9)
            assert metrics.stoi(reference, estimate) == found["stoi"]
            assert metrics.estoi(reference, estimate) == found["estoi"]


def test_estoi_of_a_pause_in_the_estimate_is_finite(speech):
    gated = np.where(np.arange(len(speech)) < RATE, 0, speech)
    found = metrics.intelligibility(speech, gated)
    assert 0.2 < found["estoi"] < 0.8 and 0.2 < found["stoi"] < 0.8
    assert found == metrics.intelligibility(speech, gated)


def test_estoi_neither_uses_nor_moves_the_global_generator(speech):
    np.random.seed(3)
    first = metrics.estoi(speech, noisy(speech, 0))
    drawn = np.random.rand()
    np.random.seed(3)
    assert drawn == np.random.rand()
    assert first == metrics.estoi(speech, noisy(speech, 0))


def test_pesq_survives_more_utterances_than_its_buffers_hold():
    # 120 half-second bursts: given to PESQ at once they overwrite its memory and end the process.
    code = (
        "import numpy as np; from pi_finetune.results.metrics import pesq_wb\n"
        "t = np.arange(60 * 16000); x = np.random.default_rng(0).standard_normal(t.size)\n"
        "x = 0.1 * x * (t % 8000 < 4000)\n"
        "print(pesq_wb(x, x))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4.644, abs=1e-3)


def test_unequal_lengths_are_an_error(speech):
    for score in (metrics.pesq_wb, metrics.stoi, metrics.estoi, metrics.si_sdr):
        with pytest.raises(ValueError, match="one length"):
            score(speech, speech[:-1])
        with pytest.raises(ValueError, match="one length"):
            score(speech[None], speech[None])


@needs_dnsmos
def test_without_a_reference_what_needs_one_is_none(speech):
    scores = metrics.signal_scores(None, speech, ("si_sdr", "dnsmos_ovrl", "pesq"))
    assert list(scores) == ["si_sdr", "dnsmos_ovrl", "pesq"]
    assert scores["si_sdr"] is None and scores["pesq"] is None and scores["dnsmos_ovrl"] > 0
    assert declarations.CHOICES["pesq"].needs_reference
    assert not declarations.CHOICES["dnsmos_ovrl"].needs_reference
    with pytest.raises(ValueError, match="no metric of waveforms: wer"):
        metrics.signal_scores(speech, speech, ("pesq", "wer"))


@needs_dnsmos
def test_dnsmos_is_that_of_speechmos(speech):
    from speechmos import dnsmos

    for samples in (5 * RATE, 11 * RATE):  # shorter and longer than its window of 9 s
        signal = np.resize(noisy(speech, 10), samples)
        signal = signal / np.abs(signal).max()
        original = dnsmos.run(signal, RATE)
        scores = metrics.signal_scores(None, signal, DNSMOS)
        for name in DNSMOS:
            key = name.removeprefix("dnsmos_") + "_mos"
            assert scores[name] == pytest.approx(original[key], abs=1e-5)
    # what is over full scale, which speechmos refuses, is scaled down
    loud = metrics.signal_scores(None, 3 * signal, DNSMOS)
    assert loud == pytest.approx(scores, abs=1e-5)
    silent = metrics.signal_scores(None, np.zeros(RATE), DNSMOS)
    assert silent == dict.fromkeys(DNSMOS)


@pytest.mark.needs("librosa")
@pytest.mark.parametrize("snr", [30, 0])
def test_lsd_is_that_of_the_urgent_challenge(speech, snr):
    import librosa

    estimate = -0.3 * noisy(speech, snr)  # the scale and the sign do not matter
    scaled = estimate * (speech @ estimate) / (estimate @ estimate + 1e-8)
    x, y = (np.abs(librosa.stft(w, n_fft=512, hop_length=256)) for w in (speech, scaled))
    distance = np.log(x**2 / (y + 1e-8) ** 2 + 1e-8) ** 2
    expected = np.mean(np.sqrt(np.mean(distance, axis=0)))
    assert metrics.lsd(speech, estimate) == pytest.approx(expected, rel=1e-9)
    assert metrics.lsd(speech, 2 * speech) < 1e-3 < metrics.lsd(speech, estimate)


def test_mel_cepstra_are_those_of_the_log_spectrum_on_a_warped_axis(speech):
    found = metrics.mel_cepstra(speech[:1024])[0]
    power = np.abs(np.fft.rfft(speech[:1024] * np.hamming(1024))) ** 2 + metrics.MCD_FLOOR
    # the log amplitude between the bins, as the cepstrum gives it, on a fine axis
    cepstrum = np.fft.irfft(np.log(power) / 2)
    fine = (np.arange(20000) + 0.5) / 20000 * np.pi  # of the warped frequency
    a = metrics.MCD_WARPING
    frequency = fine - 2 * np.arctan(a * np.sin(fine) / (1 + a * np.cos(fine)))
    k = np.arange(1, 512)[:, None]
    log_amplitude = cepstrum[0] + 2 * (cepstrum[1:512, None] * np.cos(k * frequency)).sum(0)
    log_amplitude += cepstrum[512] * np.cos(512 * frequency)
    orders = np.arange(metrics.MCD_ORDER + 1)[:, None]
    expected = 2 * (log_amplitude * np.cos(orders * fine)).mean(1)
    expected[0] /= 2
    assert found == pytest.approx(expected, abs=1e-6)


def test_mcd_by_hand(speech, monkeypatch):
    monkeypatch.setattr(metrics, "MCD_FLOOR", 1e-30)
    # twice the amplitude moves coefficient 0 alone, which is left out
    assert metrics.mcd(speech, 2 * speech) == pytest.approx(0, abs=1e-9)
    x, y = metrics.mel_cepstra(speech), metrics.mel_cepstra(noisy(speech, 5))
    frames = [
        10 / np.log(10) * np.sqrt(2 * sum((a - b) ** 2 for a, b in zip(p[1:], q[1:])))
        for p, q in zip(x, y)
    ]
    assert metrics.mcd(speech, noisy(speech, 5)) == pytest.approx(np.mean(frames))
    assert metrics.mcd(speech[:1000], speech[:1000]) is None


@pytest.mark.parametrize("name", ["lsd", "mcd"])
def test_spectral_distances_rise_with_noise(speech, name):
    scores = [
        metrics.signal_scores(speech, noisy(speech, snr), (name,))[name] for snr in (30, 10, -5)
    ]
    assert scores[0] < scores[1] < scores[2]
    assert metrics.signal_scores(speech, np.zeros(len(speech)), (name,)) == {name: None}


def test_character_errors():
    assert metrics.character_errors("THE DOG", "the dogs!") == {
        "character_errors": 1,
        "characters": 7,
    }
    found = metrics.character_errors("", "ab")
    assert found == {"character_errors": 2, "characters": 0}
    assert metrics.character_errors("a b", "")["character_errors"] == 3


def test_the_page_of_metrics_holds_the_declared_table():
    page = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
    assert declarations.metrics_table() in page.read_text()


@needs_dnsmos
def test_a_metric_without_its_package_names_the_extra(monkeypatch):
    declarations.check_metrics(["pesq", "cer", *DNSMOS])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "speechmos" else find(name)
    )
    with pytest.raises(UserError, match=r"dnsmos_bak needs speechmos.*pi_finetune\[metrics\]"):
        declarations.check_metrics(["pesq", "dnsmos_bak"])
    with pytest.raises(UserError, match="no 'dnsmos_ovr'"):
        declarations.check_metrics(["dnsmos_ovr"])


def test_mean_score_counts_what_is_missing():
    assert metrics.mean_score([1.0, None, 3.0]) == (2.0, 1)
    assert metrics.mean_score([None]) == (None, 1)
    assert metrics.mean_score([]) == (None, 0)


def counts(record):
    return tuple(record[k] for k in ("hits", "substitutions", "deletions", "insertions"))


@pytest.mark.parametrize(
    "reference, hypothesis, expected",
    [
        ("THE DOG SAW A FOX", "the dog saw a fox.", (5, 0, 0, 0)),
        ("THE DOG SAW A FOX", "the hog saw fox", (3, 1, 1, 0)),
        ("THE DOG", "the big dog", (2, 0, 0, 1)),
        ("THE DOG SAW A FOX", "", (0, 0, 5, 0)),
        ("THE DOG", " ... ", (0, 0, 2, 0)),
        ("", "the dog", (0, 0, 0, 2)),
        ("", "", (0, 0, 0, 0)),
        ("[noise]", "uh", (0, 0, 0, 0)),
        ("DON'T STOP", "do not stop", (3, 0, 0, 0)),
        ("TWENTY FIVE BOOKS", "25 books", (2, 0, 0, 0)),
        ("ÉCLAIR", "eclair", (1, 0, 0, 0)),
    ],
)
def test_word_errors(reference, hypothesis, expected):
    record = metrics.word_errors(reference, hypothesis)
    assert counts(record) == expected
    assert record["reference"] == reference and record["hypothesis"] == hypothesis


def test_word_errors_wants_text():
    with pytest.raises(TypeError, match="hypothesis must be a str, got NoneType"):
        metrics.word_errors("A", None)


def test_wer_pools_words_and_passes_over_what_has_no_transcript():
    records = [metrics.word_errors("a b c d", "a b c"), metrics.word_errors("e", "x y"), None]
    # 1 deletion, then 1 substitution and 1 insertion, over 5 words
    assert metrics.wer(records) == pytest.approx(60.0)
    assert metrics.wer([metrics.word_errors("a", "b c d")]) == pytest.approx(300.0)
    assert metrics.wer([]) is None
    assert metrics.wer([metrics.word_errors("", "a")]) is None


@pytest.mark.needs("gruut")
def test_phoneme_errors_take_the_reference_to_phonemes():
    record = metrics.phoneme_errors("The cat!", "ð ə k æ p s")
    assert counts(record) == (4, 1, 0, 1) and record["unit"] == "phoneme"
    assert record["reference"] == "ð ə k æ t" and record["hypothesis"] == "ð ə k æ p s"
    assert counts(metrics.phoneme_errors("the cat", "")) == (0, 0, 5, 0)
    assert counts(metrics.phoneme_errors("...", "k")) == (0, 0, 0, 1)
    with pytest.raises(TypeError, match="hypothesis must be a str"):
        metrics.phoneme_errors("A", None)


@pytest.mark.needs("gruut")
def test_phoneme_error_rate_is_that_of_speechbrain():
    from speechbrain.utils.metric_stats import ErrorRateStats

    pairs = [("the cat sat", "ð ə k æ t s æ"), ("on a mat", "ɑ n ə b m æ d"), ("dog", "k æ t s")]
    records = [metrics.phoneme_errors(*pair) for pair in pairs]
    stats = ErrorRateStats()
    stats.append(
        list("abc"),
        [record["hypothesis"].split() for record in records],
        [record["reference"].split() for record in records],
    )
    assert metrics.wer(records) == pytest.approx(stats.summarize()["WER"])


@pytest.mark.needs("gruut")
def test_errors_are_in_the_unit_of_the_recogniser():
    class Phones:
        unit = "phoneme"

    class Words:
        unit = "word"

    assert counts(metrics.recognition_errors(Phones(), "cat", "k æ t")) == (3, 0, 0, 0)
    assert counts(metrics.recognition_errors(Words(), "CAT", "cat")) == (1, 0, 0, 0)


WORDS = st.lists(
    st.sampled_from(["dog", "twenty", "five", "o'clock", "the", "$", "3.5", "uh"]), max_size=8
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_counts_add_up(reference, hypothesis):
    record = metrics.word_errors(reference, hypothesis)
    hits, substitutions, deletions, insertions = counts(record)
    assert hits + substitutions + deletions == len(metrics.normalise_text(reference).split())
    assert hits + substitutions + insertions == len(metrics.normalise_text(hypothesis).split())
