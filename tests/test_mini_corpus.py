"""The shipped corpus, and what makes it: grammar, noises, engines."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from scipy.signal import welch
from scipy.stats import kurtosis

from pi_finetune.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "assets" / "mini"
sys.path.insert(0, str(ROOT / "tools" / "mini"))

import grammar  # noqa: E402
import noises  # noqa: E402
import synthesize  # noqa: E402
import voices  # noqa: E402

RATE = 16000


def _installed():
    try:
        return bool(voices.require_engines())
    except UserError:
        return False


needs_engines = pytest.mark.skipif(
    not _installed(), reason=f"needs the speech engines {', '.join(voices.ENGINES)}"
)


def rng(seed=0):
    return np.random.default_rng(seed)


# Grammar


def test_same_seed_same_sentences_other_seed_others():
    first, again, other = (grammar.sentences(rng(s), 40) for s in (7, 7, 8))
    assert first == again
    assert len(set(first) & set(other)) < 5


def test_sentences_are_made_of_the_vocabulary_and_plain_letters():
    texts = grammar.sentences(rng(), 300)
    words = {word for text in texts for word in text.split()}
    assert words == grammar.VOCABULARY
    assert all(re.fullmatch(r"[A-Z']+( [A-Z']+)*", text) for text in texts)
    assert 4 <= min(len(t.split()) for t in texts) and max(len(t.split()) for t in texts) <= 16


def test_no_slot_is_filled_twice_alike():
    draws = rng(3)
    for _ in range(300):
        counts = Counter(grammar.sentence(draws).split())
        assert all(counts[name] <= 1 for name in grammar.SLOTS["name"] + grammar.SLOTS["city"])


def test_sentences_are_different_and_avoid_the_excluded():
    first = grammar.sentences(rng(1), 100)
    second = grammar.sentences(rng(1), 100, exclude=first)
    assert len(set(first)) == len(set(second)) == 100
    assert not set(first) & set(second)


def test_choosing_among_candidates_balances_the_words():
    rarest = {}
    for candidates in (2, 60):
        counts = Counter()
        grammar.sentences(rng(5), 266, seen=counts, candidates=candidates)
        rarest[candidates] = min(counts[word] for word in grammar.VOCABULARY)
    assert rarest[60] >= 4 > rarest[2]


def test_an_exhausted_grammar_says_so():
    text = grammar.sentence(rng(9))
    with pytest.raises(ValueError, match="no unused sentence"):
        grammar.sentences(rng(9), 1, exclude={text}, candidates=1)


def test_split_texts_are_disjoint_and_train_has_every_word():
    texts = synthesize.split_texts(11)
    by_split = {split: set() for split in synthesize.SPLITS}
    for voice, lines in texts.items():
        if voice is not None:
            assert len(lines) == voice.utterances
            by_split[voice.split].update(lines)
    everything = [line for lines in texts.values() for line in lines]
    assert len(everything) == len(set(everything))
    assert {w for line in by_split["train"] for w in line.split()} == grammar.VOCABULARY


# Voices


def test_the_split_of_voices():
    by_split = {
        split: [v for v in voices.VOICES if v.split == split] for split in synthesize.SPLITS
    }
    assert len({v.speaker for v in voices.VOICES}) == len(voices.VOICES) >= 6
    for members in by_split.values():
        assert {v.sex for v in members} == {"F", "M"}
    assert len(by_split["dev"]) >= 3 and len(by_split["test"]) >= 4
    by_split["train"] += voices.MORE_VOICES
    # A warped voice is the same person: it may not cross from one split to another.
    names = [{v.name for v in members} for members in by_split.values()]
    assert sum(map(len, names)) == len(set.union(*names))


@needs_engines
@pytest.mark.parametrize("speaker", ["103", "104", "201", "304"])
def test_synthesis_of_an_utterance(speaker):
    # A warped flite voice, a warped pico voice, one of festival, an espeak-ng variant.
    voice = next(voice for voice in voices.VOICES if voice.speaker == speaker)
    text = "THE TRAIN FROM LONDON TO PARIS LEAVES BEFORE TEN"
    first, again = (synthesize.utterance(voice, text, rng(4)) for _ in range(2))
    if voice.engine != "pico":  # whose speech is not the same twice
        assert np.array_equal(first, again)
    assert first.dtype == np.float32 and first.ndim == 1
    assert 2 < len(first) / RATE < 6
    level = 20 * np.log10(first.std())
    assert -29.5 < level < -22.5
    edge = first[: RATE // 20]
    assert 0 < np.abs(edge).max() < 0.02  # a noise floor, neither silence nor speech


@needs_engines
def test_rate_and_warp_change_length_and_pitch_as_stated():
    text = "THE CAPTAIN FOUND NINETY YELLOW FLOWERS"
    plain = next(v for v in voices.VOICES if v.name == "awb" and v.warp == 1)
    smaller = next(v for v in voices.VOICES if v.name == "awb" and v.warp > 1)
    usual, fast, warped = (
        voices.speak(plain, text),
        voices.speak(plain, text, rate=1.25),
        voices.speak(smaller, text),
    )
    assert len(usual) / len(fast) == pytest.approx(1.25, abs=0.08)
    assert len(warped) / len(usual) == pytest.approx(1.0, abs=0.08)
    assert _pitch(warped) / _pitch(usual) == pytest.approx(smaller.warp, rel=0.06)


def _pitch(samples):
    """Median of the autocorrelation's peak between 70 and 250 Hz, over voiced frames."""
    found = []
    for start in range(0, len(samples) - 1024, 512):
        frame = samples[start : start + 1024] * np.hanning(1024)
        lags = np.fft.irfft(np.abs(np.fft.rfft(frame, 4096)) ** 2)
        lag = RATE // 250 + lags[RATE // 250 : RATE // 70].argmax()
        if lags[lag] > 0.5 * lags[0]:
            found.append(RATE / lag)
    return np.median(found)


@needs_engines
def test_all_voices_sound_different():
    # espeak-ng falls back to its default voice, without a word, where a variant does not exist.
    spoken = [voices.speak(voice, "TEN GREEN BOTTLES").tobytes() for voice in voices.VOICES]
    assert len(set(spoken)) == len(voices.VOICES)


def test_a_missing_engine_names_its_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert voices.VOICES[0].engine == "flite"
    with pytest.raises(UserError, match="apt install flite"):
        voices.speak(voices.VOICES[0], "HELLO")
    with pytest.raises(SystemExit):
        synthesize.main(["--output_folder", str(tmp_path / "mini")])
    assert "apt install flite" in capsys.readouterr().err
    assert not (tmp_path / "mini").exists()


# The script


@pytest.fixture
def small(monkeypatch):
    """The script with three short-spoken voices made of tones, so that no engine is needed."""
    chosen = [
        voices.Voice(speaker, "M", split, "flite", name, 2)
        for speaker, split, name in (("1", "train", "a"), ("2", "dev", "b"), ("3", "test", "c"))
    ]

    def tone(voice, text, rate=1.0, pitch=1.0):
        time = np.arange(400 * len(text)) / RATE
        return np.sin(2 * np.pi * 100 * int(voice.speaker) * pitch * time).astype(np.float32)

    texts = grammar.sentences(rng(2), 10)
    monkeypatch.setattr(
        synthesize,
        "split_texts",
        lambda seed: {
            chosen[0]: texts[:2],
            chosen[1]: texts[2:4],
            chosen[2]: texts[4:6],
            None: texts[6:],
        },
    )
    monkeypatch.setattr(synthesize, "speak", tone)
    monkeypatch.setattr(synthesize, "require_engines", lambda: {"tone": "1"})
    monkeypatch.setattr(synthesize, "NOISE_SECONDS", 0.5)
    monkeypatch.setattr(synthesize, "RECORDINGS", 1)
    return texts


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_runs_give_the_same_bytes(small, tmp_path):
    for name in ("one", "two"):
        synthesize.main(["--output_folder", str(tmp_path / name), "--seed", "3"])
    first, second = files(tmp_path / "one"), files(tmp_path / "two")
    assert first == second
    assert len([p for p in first if p.suffix == ".ogg"]) == 6 + len(synthesize.NOISES)
    lines = first[Path("speech/dev/2/1/2-1.trans.txt")].decode().splitlines()
    assert lines == [f"2-1-{i:04d} {text}" for i, text in enumerate(small[2:4])]


def test_only_noise_leaves_speech_alone(small, tmp_path):
    synthesize.main(["--output_folder", str(tmp_path), "--seed", "3"])
    before = files(tmp_path)
    synthesize.main(["--output_folder", str(tmp_path), "--seed", "4", "--only", "noise"])
    after = files(tmp_path)
    changed = {path for path in before if before[path] != after[path]}
    assert before.keys() == after.keys()
    assert changed and not any(path.parts[0] == "speech" for path in changed)
    readme = (tmp_path / "README.md").read_text()
    assert "--seed 3 --only speech" in readme and "--seed 4 --only noise" in readme


def test_some_speakers_speak_anew_and_the_others_stay(small, tmp_path, capsys):
    synthesize.main(["--output_folder", str(tmp_path), "--seed", "3"])
    before = files(tmp_path)
    other = ["--output_folder", str(tmp_path), "--seed", "4", "--only", "speech"]
    synthesize.main([*other, "--speakers", "3"])
    after = files(tmp_path)
    changed = {p for p in before if p.suffix == ".ogg" and before[p] != after[p]}
    assert before.keys() == after.keys()
    assert {p.name for p in changed} == {"3-1-0000.ogg", "3-1-0001.ogg"}
    synthesize.main(other)
    whole = files(tmp_path)
    assert {p: whole[p] for p in changed} == {p: after[p] for p in changed}
    with pytest.raises(SystemExit):
        synthesize.main([*other, "--speakers", "9"])
    assert "--speakers: 9" in capsys.readouterr().err


def test_an_interrupted_run_leaves_what_was_there(small, monkeypatch, tmp_path):
    synthesize.main(["--output_folder", str(tmp_path), "--seed", "3"])
    before = files(tmp_path)

    def broken(rng, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(noises, "music", broken)
    with pytest.raises(SystemExit):
        synthesize.main(["--output_folder", str(tmp_path), "--seed", "4", "--only", "noise"])
    assert files(tmp_path) == before


def test_an_output_folder_that_is_a_file(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        synthesize.main(["--output_folder", str(tmp_path / "file")])
    assert "--output_folder" in capsys.readouterr().err


@needs_engines
def test_more_speech_is_by_training_voices_and_resumes(tmp_path):
    arguments = ["--output_folder", str(tmp_path), "--seed", "3", "--more", "8"]
    synthesize.main(arguments)
    audio = sorted(tmp_path.rglob("*.flac"))
    assert len(audio) == 8
    held_out = {v.speaker for v in voices.VOICES if v.split != "train"}
    assert not held_out & {path.stem.split("-")[0] for path in audio}
    transcripts = [line for p in tmp_path.rglob("*.trans.txt") for line in p.open()]
    assert {line.split()[0] for line in transcripts} == {path.stem for path in audio}
    made = audio[0].read_bytes()
    audio[0].unlink()
    synthesize.main(arguments)
    assert audio[0].read_bytes() == made


# Noises

GENERATORS = {
    "white": lambda r: noises.colored(r, 4.0, 0.0),
    "drifting": lambda r: noises.colored(r, 4.0, 1.0, drift_db=3.0),
    "hum": lambda r: noises.hum(r, 4.0),
    "impulsive": lambda r: noises.impulsive(r, 4.0),
    "music": lambda r: noises.music(r, 4.0),
    "babble": lambda r: noises.babble(r, 4.0, [_speech_like(s) for s in range(5)]),
}


def _speech_like(seed):
    syllables = np.abs(np.sin(2 * np.pi * 3 * np.arange(RATE) / RATE + seed))
    return (syllables * rng(seed).standard_normal(RATE)).astype(np.float32)


@pytest.mark.parametrize("kind", GENERATORS)
def test_noise_is_finite_seeded_and_of_the_stated_level(kind):
    first, again, other = (GENERATORS[kind](rng(s)) for s in (1, 1, 2))
    assert first.shape == (4 * RATE,) and first.dtype == np.float32
    assert np.isfinite(first).all() and np.abs(first).max() <= noises.PEAK + 1e-6
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    level = 20 * np.log10(np.sqrt(np.mean(first.astype(np.float64) ** 2)))
    if np.abs(first).max() < noises.PEAK - 1e-6:
        assert level == pytest.approx(noises.LEVEL_DB, abs=0.01)
    else:
        assert level < noises.LEVEL_DB
    # No moment of silence to which an SNR could be asked.
    windows = first[: len(first) // 1600 * 1600].reshape(-1, 1600)
    assert 20 * np.log10(windows.std(axis=1).min()) > -85


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_slope_of_colored_noise(exponent):
    samples = noises.colored(rng(), 20.0, exponent)
    frequency, power = welch(samples.astype(np.float64), RATE, nperseg=4096)
    band = (frequency > 60) & (frequency < 7000)
    slope = np.polyfit(np.log2(frequency[band]), 10 * np.log10(power[band]), 1)[0]
    assert slope == pytest.approx(-10 * np.log10(2) * exponent, abs=0.25)


@pytest.mark.parametrize("mains", [50.0, 60.0])
def test_hum_has_its_power_at_harmonics_of_the_mains(mains):
    samples = noises.hum(rng(1), 8.0, mains)
    frequency, power = welch(samples.astype(np.float64), RATE, nperseg=16384)
    low = (frequency > 30) & (frequency < 1000)
    nearest = np.abs(frequency / mains - np.round(frequency / mains)) * mains
    at = power[low & (nearest < 5)].sum()
    assert at / power[low].sum() > 0.95
    wrong = 110 - mains
    nearest = np.abs(frequency / wrong - np.round(frequency / wrong)) * wrong
    assert power[low & (nearest < 5)].sum() / power[low].sum() < 0.7


def test_impulsive_noise_is_impulsive_and_others_are_not():
    assert kurtosis(noises.impulsive(rng(), 10.0)) > 10
    assert abs(kurtosis(noises.colored(rng(), 10.0, 0.0))) < 0.2


def test_strings_are_in_tune():
    for midi in (45, 58, 76):
        sound = noises._pluck(rng(), midi, 2.0)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 18))
        wanted = 440 * 2 ** ((midi - 69) / 12)
        around = slice(*(int(wanted * f * (1 << 18) / RATE) for f in (0.8, 1.25)))
        found = (around.start + spectrum[around].argmax()) * RATE / (1 << 18)
        assert abs(1200 * np.log2(found / wanted)) < 10  # cents


def test_babble_is_a_sum_of_its_talkers():
    talkers = [_speech_like(seed) for seed in range(3)]
    mixed = noises.babble(rng(1), 3.0, talkers)
    for talker in talkers:  # each is in there somewhere, at a shift of its own
        shifts = np.fft.irfft(np.fft.rfft(mixed[:RATE]) * np.conj(np.fft.rfft(talker)))
        assert shifts.max() / (np.linalg.norm(mixed[:RATE]) * np.linalg.norm(talker)) > 0.3
    with pytest.raises(ValueError, match="at least one talker"):
        noises.babble(rng(), 1.0, [])


def test_opus_files_differ_in_nothing_but_what_is_in_them(tmp_path):
    samples = noises.colored(rng(), 1.0, 1.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        synthesize.write_opus(tmp_path / name / "x.ogg", samples)
    assert (tmp_path / "a/x.ogg").read_bytes() == (tmp_path / "b/x.ogg").read_bytes()
    read, rate = sf.read(tmp_path / "a/x.ogg")
    assert rate == RATE and len(read) == len(samples)
    assert np.corrcoef(read, samples)[0, 1] > 0.9


# What is shipped


def _transcripts():
    return {
        line.split(" ", 1)[0]: (path.parts[-4], line.split(" ", 1)[1])
        for path in (MINI / "speech").rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    }


def test_every_transcript_has_its_audio_and_the_other_way_round():
    audio = {p.stem: p for p in (MINI / "speech").rglob("*.ogg")}
    texts = _transcripts()
    assert audio.keys() == texts.keys() and len(audio) > 300
    for name, path in audio.items():
        speaker, chapter, _ = name.split("-")
        assert path.relative_to(MINI / "speech").parts[:3] == (texts[name][0], speaker, chapter)


def test_splits_share_neither_speaker_nor_sentence_and_train_has_every_word():
    by_split = {split: {} for split in synthesize.SPLITS}
    for name, (split, text) in _transcripts().items():
        by_split[split][name] = text
    assert len(by_split["test"]) >= 60 and len(by_split["dev"]) >= 30
    for of in (lambda n, t: n.split("-")[0], lambda n, t: t):
        sets = [{of(n, t) for n, t in texts.items()} for texts in by_split.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))
    words = {
        split: {w for t in texts.values() for w in t.split()} for split, texts in by_split.items()
    }
    assert words["dev"] | words["test"] <= words["train"] == grammar.VOCABULARY


def test_speakers_file_lists_the_speakers():
    rows = [
        [field.strip() for field in line.split("|")]
        for line in (MINI / "speech" / "SPEAKERS.TXT").read_text().splitlines()
        if not line.startswith(";")
    ]
    on_disk = {(p.name, p.parent.name) for p in (MINI / "speech").glob("*/*") if p.is_dir()}
    assert {(row[0], row[2]) for row in rows} == on_disk
    assert {row[4].split()[0] for row in rows} <= voices.ENGINES.keys()


def test_shipped_audio_is_16_khz_mono_of_fit_length_and_small():
    total = 0
    for path in MINI.rglob("*.ogg"):
        info = sf.info(path)
        assert (info.samplerate, info.channels, info.format) == (RATE, 1, "OGG"), path
        low, high = (20, 30) if path.parent.name == "noise" else (1.5, 6)
        assert low <= info.duration <= high, path
        total += path.stat().st_size
    assert total < 10e6


def test_shipped_speech_is_of_even_level_and_not_clipped():
    for path in sorted((MINI / "speech").rglob("*.ogg"))[::10]:
        samples, _ = sf.read(path)
        assert np.abs(samples).max() < 0.99, path
        assert -31 < 20 * np.log10(samples.std()) < -22, path


def test_shipped_noise_classes():
    counts = Counter(path.stem.split("-")[0] for path in (MINI / "noise").glob("*.ogg"))
    assert set(counts) == set(synthesize.NOISES)
    assert min(counts.values()) >= 4  # so that train, dev and test have recordings of their own


def test_the_reader_of_corpora_takes_it():
    from pi_finetune.data.corpora import prepare_noise, prepare_speech

    manifest = prepare_speech(MINI / "speech", "test")
    assert len(manifest) >= 60 and all(item["text"] for item in manifest.values())
    parts = [set(prepare_noise(MINI / "noise", split)) for split in ("train", "dev", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(list(MINI.rglob("noise/*.ogg")))
