"""Rooms: speech convolved with impulse responses, the target being the early part."""

import numpy as np
import pytest
import soundfile
import torch
from running import HPARAMS, validations

from pi_finetune.data.audio import read_audio
from pi_finetune.data.loading import SpeechPairs, load_pairs
from pi_finetune.data.mixing import mix_at_snr
from pi_finetune.data.rooms import (
    FolderRIRs,
    Reverberator,
    SimulatedRIRs,
    load_reverberator,
    reverberate,
)
from pi_finetune.errors import UserError
from pi_finetune.run_folder import data_digest
from pi_finetune.seeding import utterance_rng


def decaying(delay=100, length=6000, seed=0):
    """A response: the direct path at ``delay``, then noise that decays by 60 dB."""
    rng = np.random.default_rng(seed)
    rir = np.zeros(delay + length)
    rir[delay] = 1
    tail = 0.2 * rng.standard_normal(length - 1) * 10 ** (-3 * np.arange(1, length) / length)
    rir[delay + 1 :] = tail
    return rir


def speech(length=12000, seed=0):
    return 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def rirs(tmp_path_factory):
    """Eight rooms of two responses, at 48 kHz, with a second channel that must not be heard."""
    folder = tmp_path_factory.mktemp("rirs")
    for room in range(8):
        (folder / f"room-{room}").mkdir()
        for place in range(2):
            rir = decaying(300, 9000, seed=10 * room + place)
            both = np.stack([rir, np.ones_like(rir)], axis=1).astype(np.float32)
            path = folder / f"room-{room}" / f"{place}.wav"
            soundfile.write(path, both, 48000, subtype="FLOAT")
    return folder


class TestReverberate:
    @pytest.mark.parametrize("delay", [0, 1, 777])
    @pytest.mark.parametrize("gain", [1.0, -0.03])
    def test_an_identity_changes_nothing(self, delay, gain):
        rir = np.zeros(2000)
        rir[delay] = gain
        clean = speech()
        for wav in reverberate(clean, rir):
            assert wav.dtype == clean.dtype
            torch.testing.assert_close(wav, clean * np.sign(gain), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("delay", [0, 100, 900])
    def test_nothing_is_delayed(self, delay):
        clean = speech()
        heard, target = reverberate(clean, decaying(delay))
        for one, other in ((heard, target), (heard, clean), (target, clean)):
            lags = np.correlate(one.numpy(), other.numpy(), "full")
            assert np.argmax(np.abs(lags)) == len(clean) - 1  # lag 0

    def test_values_and_level(self):
        """Against a plain convolution, sample by sample."""
        clean, rir = speech(3000).double(), decaying(50, 2000)
        heard, target = reverberate(clean, rir, early_seconds=0.05)
        early = np.where(np.arange(len(rir)) < 50 + 800, rir, 0)
        plain = [np.convolve(clean.numpy(), part)[50 : 50 + 3000] for part in (rir, early)]
        gain = float(clean.square().mean().sqrt()) / np.sqrt(np.mean(plain[1] ** 2))
        np.testing.assert_allclose(heard.numpy(), gain * plain[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(target.numpy(), gain * plain[1], rtol=0, atol=1e-12)
        assert float(target.square().mean()) == pytest.approx(float(clean.square().mean()))

    def test_all_that_is_early_is_the_target(self):
        heard, target = reverberate(speech(), decaying(100, 700), early_seconds=0.05)
        assert torch.equal(heard, target)

    def test_the_late_part_does_not_enter_the_target(self):
        rir, other = decaying(seed=1), decaying(seed=1)
        other[100 + 800 :] *= -3
        assert torch.equal(reverberate(speech(), rir)[1], reverberate(speech(), other)[1])


class TestPairs:
    def test_snr_is_of_what_is_heard(self):
        heard, noise, target = speech(seed=1), speech(seed=2), speech(seed=3)
        noisy, scaled = mix_at_snr(heard, noise, 5, target=target)
        added = noisy - heard
        ratio = heard.square().mean() / added.square().mean()
        assert 10 * float(ratio.log10()) == pytest.approx(5, abs=1e-3)
        assert torch.equal(scaled, target)
        noisy, scaled = mix_at_snr(20 * heard, noise, 5, target=target)
        assert float(noisy.abs().max()) == pytest.approx(0.99)
        factor = float(scaled.norm() / target.norm())
        assert factor < 1
        torch.testing.assert_close(mix_at_snr(20 * heard, noise, 5)[0], noisy)

    def test_draws_are_of_seed_pass_and_utterance(self, corpus, noises, rirs):
        def pair(address=(1, 2), seed=5, **options):
            pairs = load_pairs(corpus, ["train"], "train", noises, seed=seed, **options)
            return pairs[address]

        one = pair(rir_folder=str(rirs))
        again = pair(rir_folder=str(rirs))
        assert torch.equal(one["noisy"], again["noisy"])
        assert torch.equal(one["clean"], again["clean"])
        dry = pair()
        # The same utterance, crop, noise and SNR as without rooms.
        assert one["snr"] == dry["snr"] and one["noise_class"] == dry["noise_class"]
        assert len(one["noisy"]) == len(dry["noisy"]) == len(one["clean"])
        for other in (pair((1, 3), rir_folder=str(rirs)), pair(seed=6, rir_folder=str(rirs))):
            assert not torch.allclose(other["clean"], one["clean"])

    def test_a_pair_has_the_early_part_as_its_target(self, corpus, noises, rirs):
        pairs = load_pairs(corpus, ["train"], "train", noises, seed=5, rir_folder=str(rirs))
        key, _ = pairs.items[1]
        speech = read_audio(pairs.manifest[key]["wav"])
        heard, target = pairs.reverberator(speech, utterance_rng(5, 2, key, "room"))
        assert not torch.allclose(heard, target)
        found = pairs[1, 2]["clean"]  # scaled with its mixture, should that be over full scale
        torch.testing.assert_close(found / found.norm(), target / target.norm())

    def test_off_is_as_it_was(self, corpus, noises, rirs):
        dry = load_pairs(corpus, ["train"], "train", noises, seed=5)
        off = load_pairs(
            corpus, ["train"], "train", noises, seed=5, rir_folder=str(rirs), rir_probability=0
        )
        for address in ((0, 0), (3, 1)):
            assert torch.equal(dry[address]["noisy"], off[address]["noisy"])
            assert torch.equal(dry[address]["clean"], off[address]["clean"])
        assert dry.fingerprint() == SpeechPairs(dry.manifest, dry.mixer, seed=5).fingerprint()

    def test_rooms_are_part_of_what_the_pairs_are(self, corpus, noises, rirs):
        def pairs(**options):
            return load_pairs(corpus, ["test"], "test", noises, **options)

        found = {
            function(pairs(**options))
            for function in (SpeechPairs.fingerprint, data_digest)
            for options in (
                {},
                {"rir_folder": str(rirs)},
                {"rir_folder": str(rirs), "rir_probability": 0.5},
                {"rir_folder": str(rirs), "rir_early_seconds": 0.02},
            )
        }
        assert len(found) == 8

    def test_share(self, rirs):
        reverberator = load_reverberator(str(rirs), "train", probability=0.3)
        clean = speech(400)
        rooms = [
            reverberator(clean, utterance_rng(0, 0, str(i), "room"))[0] is not clean
            for i in range(200)
        ]
        assert 40 < sum(rooms) < 80  # 60 are expected, with a deviation of 6.5

    def test_clean_speech_in_a_room_stays_below_full_scale(self, corpus, noises, rirs):
        options = {"snrs": [np.inf], "rir_folder": str(rirs)}
        pair = load_pairs(corpus, ["train"], "train", noises, **options)[0]
        assert float(pair["noisy"].abs().max()) <= 0.9901
        assert not torch.allclose(pair["noisy"], pair["clean"])


class TestFolder:
    def test_rooms_are_in_one_part_only(self, rirs):
        parts = {part: FolderRIRs(rirs, part).paths for part in ("train", "dev", "test")}
        rooms = [{path.parent.name for path in paths} for paths in parts.values()]
        assert sum(map(len, rooms)) == len(set().union(*rooms)) == 8
        assert sum(map(len, parts.values())) == 16

    def test_few_files_are_heard_by_all(self, rirs):
        room = rirs / "room-0"
        assert FolderRIRs(room, "train").paths == FolderRIRs(room, "test").paths

    def test_rate_and_channel(self, rirs):
        rir = FolderRIRs(rirs / "room-0", "train").draw(np.random.default_rng(0))
        assert len(rir) == 3100 and np.abs(rir).argmax() == 100

    @pytest.mark.parametrize(
        "samples, message",
        [(np.zeros(100), "empty, silent"), (np.full(100, np.nan), "not finite")],
    )
    def test_bad_responses(self, tmp_path, samples, message):
        soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
        with pytest.raises(UserError, match=rf"rir_folder: .*bad\.wav.*{message}"):
            FolderRIRs(tmp_path, "train").draw(np.random.default_rng(0))


@pytest.mark.needs("pyroomacoustics")
class TestSimulated:
    def test_reproducible_and_different(self):
        rooms = SimulatedRIRs()
        one, again, other = (
            rooms.draw(utterance_rng(1, 0, name, "room")) for name in ("a", "a", "b")
        )
        np.testing.assert_array_equal(one, again)
        assert len(one) != len(other) or not np.allclose(one, other)

    @pytest.mark.parametrize("rt60", [0.3, 0.6])
    def test_reverberation_time(self, rt60):
        """The decay from -5 to -25 dB (Schroeder 1965), over some rooms, is about as asked."""
        rooms, times = SimulatedRIRs((rt60, rt60), max_order=40), []
        for i in range(5):
            energy = np.cumsum(rooms.draw(utterance_rng(0, 0, str(i), "room"))[::-1] ** 2)[::-1]
            level = 10 * np.log10(energy / energy[0] + 1e-12)
            times.append(3 * (np.argmax(level < -25) - np.argmax(level < -5)) / 16000)
        assert np.median(times) == pytest.approx(rt60, rel=0.4)

    def test_too_short_a_time_for_a_room(self):
        rir = SimulatedRIRs((0.01, 0.01)).draw(np.random.default_rng(0))
        heard, target = reverberate(speech(), rir)
        assert torch.equal(heard, target)  # nothing but the direct path


def test_training_and_evaluation_in_rooms(train, evaluate, rirs):
    run = train("mse", rir_folder=rirs, check_data=True)
    assert validations(run)
    results = evaluate(["noisy", "clean"], rir_folder=rirs, asr_source="null")
    scores = (results / "noisy" / "0" / "scores" / "test.jsonl").read_text()
    dry = evaluate(["noisy"], asr_source="null", test_set="dry") / "noisy" / "0" / "scores"
    assert scores != (dry / "dry.jsonl").read_text()


def test_parameters():
    rirs = FolderRIRs.__new__(FolderRIRs)
    with pytest.raises(UserError, match="rir_probability"):
        Reverberator(rirs, probability=2)
    with pytest.raises(UserError, match="rir_early_seconds"):
        Reverberator(rirs, early_seconds=0)
    for name in ("finetune", "evaluate"):
        assert "\nrir_folder: null " in (HPARAMS / f"{name}.yaml").read_text()
