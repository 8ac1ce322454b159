"""Manifests, mixing and sampling: exact, reproducible, clear about bad folders."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import voice, write_audio

from pi_finetune.data.audio import read_audio
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.loading import (
    ShareOfSampler,
    UpdateBatchSampler,
    UpdateSampler,
    choose,
    collate,
    load_pairs,
)
from pi_finetune.data.mixing import NoiseMixer, mix_at_snr, random_filter
from pi_finetune.data.shard_writer import write_shards
from pi_finetune.errors import UserError


def test_librispeech_manifest(corpus):
    manifest = prepare_speech(corpus, ["tr*"])
    assert len(manifest) == 12
    entry = manifest["10-1-0000"]
    assert entry["speaker"] == "10" and len(entry["text"].split()) == 3
    assert 1.2 <= entry["duration"] <= 2.4


def test_no_transcript_is_none(tmp_path):
    write_audio(tmp_path / "train" / "1" / "1" / "1-1-0000.flac", voice(1, 100, _rng()))
    assert prepare_speech(tmp_path, ["train"])["1-1-0000"]["text"] is None


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("missing", r"nowhere is no folder"),
        ("split", r"no split 'tset'.*it has: dev, test, train.*--test_splits"),
        ("garbage", r"0009\.flac: cannot be read as audio"),
        ("rate", r"0009\.flac: sampled at 8000 Hz"),
        ("stereo", r"0009\.flac: has 2 channels"),
        ("empty", r"0009\.flac: (holds no samples|cannot be read)"),
        ("short", r"0009\.flac: 0\.050 s is too short"),
    ],
)
def test_bad_speech_names_the_file(corpus, tmp_path, breakage, message):
    folder, splits = tmp_path / "copy", ["train"]
    bad = folder / "train" / "9" / "1" / "9-1-0009.flac"
    bad.parent.mkdir(parents=True)
    wav = voice(1, 100, _rng())
    if breakage == "missing":
        folder = tmp_path / "nowhere"
    elif breakage == "split":
        folder, splits = corpus, ["tset"]
    elif breakage == "garbage":
        bad.write_bytes(b"no audio at all")
    elif breakage == "rate":
        write_audio(bad, wav, rate=8000)
    elif breakage == "stereo":
        write_audio(bad, np.stack([wav, wav]))
    elif breakage == "empty":
        bad.write_bytes(b"")
    elif breakage == "short":
        write_audio(bad, wav[:800])
    with pytest.raises(UserError, match=message):
        prepare_speech(folder, splits)


def test_silent_file_is_named(tmp_path, noises):
    write_audio(tmp_path / "train" / "1" / "1" / "1-1-0000.flac", np.zeros(16000, np.float32))
    pairs = load_pairs(tmp_path, ["train"], "train", noises)
    with pytest.raises(UserError, match=r"1-1-0000\.flac: silent"):
        pairs[0]


def test_voicebank_layout(tmp_path):
    rng = _rng()
    for kind, speakers in (("trainset_28spk", ("p226", "p230")), ("testset", ("p232",))):
        for speaker in speakers:
            clean = voice(1, 120, rng)
            write_audio(tmp_path / f"clean_{kind}_wav" / f"{speaker}_001.wav", clean)
            noisy = clean + 0.01 * rng.standard_normal(len(clean)).astype(np.float32)
            write_audio(tmp_path / f"noisy_{kind}_wav" / f"{speaker}_001.wav", noisy)
    (tmp_path / "log_testset.txt").write_text("p232_001 bus 12.5\n")
    (tmp_path / "log_trainset_28spk.txt").write_text("p226_001 cafeteria 0\np230_001 ssn 15\n")
    for kind, speaker in (("trainset_28spk", "p230"), ("testset", "p232")):
        (tmp_path / f"{kind}_txt").mkdir()
        (tmp_path / f"{kind}_txt" / f"{speaker}_001.txt").write_text("Please call Stella.\n")
    train = prepare_speech(tmp_path, ["train*"])
    assert list(train) == ["p230_001"] == list(prepare_speech(tmp_path, ["trainset_28spk"]))
    assert train["p230_001"]["text"] == "Please call Stella."
    assert (train["p230_001"]["noise_class"], train["p230_001"]["snr"]) == ("ssn", 15.0)
    for wrong in ("train_56spk", "trian", "*"):
        with pytest.raises(UserError, match=f"'{re.escape(wrong)}'"):
            prepare_speech(tmp_path, [wrong])
    assert list(prepare_speech(tmp_path, ["dev*"])) == ["p226_001"]
    pair = load_pairs(tmp_path, ["test*"], "test")[0]
    assert (pair["snr"], pair["noise_class"], pair["text"]) == (12.5, "bus", "Please call Stella.")
    assert 0 < (pair["noisy"] - pair["clean"]).abs().max() < 0.1
    (tmp_path / "noisy_testset_wav" / "p232_001.wav").unlink()
    with pytest.raises(UserError, match=r"noisy_testset_wav/p232_001\.wav: missing"):
        prepare_speech(tmp_path, ["test"])


def test_noise_splits_share_no_second(noises):
    heard = {}
    for split in ("train", "dev", "test"):
        manifest = prepare_noise(noises, split)
        assert {entry["class"] for entry in manifest.values()} == {"hiss", "rumble", "bark"}
        for name, entry in manifest.items():
            for start, frames in heard.get(name, []):
                assert entry["start"] >= start + frames or start >= entry["start"] + entry["frames"]
            heard.setdefault(name, []).append((entry["start"], entry["frames"]))
    assert len(heard) == 8 + 1 + 5


def test_noise_classes(noises, tmp_path):
    manifest = prepare_noise(noises, "train", ["hiss"])
    assert {entry["class"] for entry in manifest.values()} == {"hiss"}
    with pytest.raises(UserError, match="has no hum; it has: bark, hiss, rumble"):
        prepare_noise(noises, "train", ["hum"])
    with pytest.raises(UserError, match="no audio file"):
        prepare_noise(tmp_path, "train")


@pytest.mark.parametrize("folder", ["TBUS", "TBUS_16k"])
def test_demand_is_divided_in_time_and_by_first_channel(tmp_path, folder):
    """Its sixteen channels are one scene: parts must differ in time, in whatever channel."""
    steps = 0.05 * np.arange(1, 11).repeat(1600).astype(np.float32)  # tells its place
    for channel in range(1, 17):
        write_audio(tmp_path / folder / f"ch{channel:02d}.wav", steps)
    entries = {}
    for part in ("test", "dev", "train"):
        manifest = prepare_noise(tmp_path, part, ["TBUS"])
        assert list(manifest) == [f"{folder}/ch01.wav"]
        entries[part] = manifest[f"{folder}/ch01.wav"]
        assert entries[part]["class"] == "TBUS"
    parts = [read_audio(e["wav"], e["start"], e["frames"]) for e in entries.values()]
    assert [len(part) for part in parts] == [3200, 2400, 10400]
    torch.testing.assert_close(torch.cat(parts), torch.tensor(steps), atol=1e-4, rtol=0)


def test_an_infinite_snr_is_clean_speech(noises):
    mixer = NoiseMixer(prepare_noise(noises, "train"), [np.inf, 0])
    clean = torch.tensor(voice(1, 100, _rng()))
    noisy, target, info = mixer(clean, _rng(), snr=np.inf)
    assert torch.equal(noisy, clean) and torch.equal(target, clean)
    assert info == {"snr": None, "noise_class": None}
    assert not torch.equal(mixer(clean, _rng(), snr=0)[0], clean)
    for wrong in (-np.inf, np.nan):
        with pytest.raises(UserError, match="snrs"):
            NoiseMixer(prepare_noise(noises, "train"), [wrong])


@pytest.mark.parametrize("snr", [-10, 0, 20])
@pytest.mark.parametrize("level", [1e-3, 0.9])
def test_snr_and_target_are_exact(snr, level):
    rng = _rng()
    clean = level * torch.tensor(voice(1, 100, rng)) / 0.3
    noise = torch.tensor(rng.standard_normal(16000), dtype=torch.float32)
    noisy, target = mix_at_snr(clean, noise, snr)
    added = (noisy - target).double()
    measured = 10 * torch.log10(target.double().square().mean() / added.square().mean())
    assert measured == pytest.approx(snr, abs=1e-3)
    assert noisy.abs().max() <= 0.9901
    scale = target.norm() / clean.norm()
    torch.testing.assert_close(target, clean * scale)


def test_silent_stretches_of_noise_are_not_used(corpus, noises):
    mixer = NoiseMixer(prepare_noise(noises, "train", ["bark"]), [0])
    clean = torch.tensor(voice(0.1, 100, _rng()))
    for seed in range(20):
        noisy, target, info = mixer(clean, np.random.default_rng(seed))
        assert torch.isfinite(noisy).all() and (noisy - target).abs().max() > 0
        assert info == {"snr": 0.0, "noise_class": "bark"}


def test_all_silent_noise_is_named(tmp_path):
    write_audio(tmp_path / "quiet-1.wav", np.zeros(16000, np.float32))
    mixer = NoiseMixer(prepare_noise(tmp_path, "train"), [0])
    with pytest.raises(UserError, match=r"quiet-1\.wav: silent"):
        mixer(torch.ones(1000), _rng())


def test_pairs_depend_on_seed_pass_and_id_only(corpus, noises):
    def item(seed=0, address=(3, 1)):
        return load_pairs(corpus, ["train"], "train", noises, seed=seed, segment_seconds=1)[address]

    again, same = item(), item()
    torch.testing.assert_close(again["noisy"], same["noisy"], rtol=0, atol=0)
    assert not torch.equal(again["noisy"], item(seed=1)["noisy"])
    assert not torch.equal(again["noisy"], item(address=(3, 2))["noisy"])
    assert again["noisy"].shape == (16000,)


def test_each_snr_uses_one_noise_for_an_utterance(corpus, noises):
    pairs = load_pairs(corpus, ["test"], "test", noises, snrs=[0, 10], each_snr=True)
    assert len(pairs) == 12
    assert (pairs.item_id(0), pairs.item_id(1)) == ("30-1-0000@0dB", "30-1-0000@10dB")
    low, high = pairs[0], pairs[1]
    noise = [(p["noisy"] - p["clean"]) / p["clean"].norm() for p in (low, high)]
    torch.testing.assert_close(noise[0], noise[1] * 10**0.5, rtol=1e-2, atol=1e-4)


def test_fingerprint_follows_what_determines_the_pairs(corpus, noises):
    def fingerprint(**options):
        return load_pairs(corpus, ["test"], "test", noises, **options).fingerprint()

    assert fingerprint() == fingerprint()
    changed = [fingerprint(seed=1), fingerprint(snrs=[0]), fingerprint(count=2)]
    assert len({fingerprint(), *changed}) == 4


def test_choose_spreads_over_speakers_and_nests(corpus):
    manifest = prepare_speech(corpus, ["train"])
    four, six = choose(manifest, 4), choose(manifest, 6)
    assert set(four) < set(six)
    assert sorted(entry["speaker"] for entry in four.values()) == ["10", "10", "11", "11"]
    with pytest.raises(UserError, match=r"at most 0\.1 s"):
        choose(manifest, 4, max_seconds=0.1)


def test_too_long_for_a_test_set_is_named(corpus, noises):
    with pytest.raises(UserError, match=r"flac: \d\.\d s is longer than max_seconds \(1\)"):
        load_pairs(corpus, ["test"], "test", noises, max_seconds=1, too_long="error")


def test_no_noise_folder_is_an_error(corpus):
    with pytest.raises(UserError, match="noise_folder: needed"):
        load_pairs(corpus, ["test"], "test")


@pytest.mark.parametrize(("size", "items"), [(10, 4), (3, 8), (5, 5)])
def test_update_sampler_passes(size, items):
    sampler = UpdateSampler(size, items, seed=1)
    stream = []
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        stream += list(sampler)
        assert len(sampler) == items
    for start in range(0, len(stream) - size + 1, size):
        block = stream[start : start + size]
        assert sorted(index for index, _ in block) == list(range(size))
        assert {data_pass for _, data_pass in block} == {start // size}
    sampler.set_epoch(2)
    assert list(sampler) == stream[items : 2 * items]


def _padding(sampler, seconds):
    """Share of padding in what a sampler yields."""
    batches = list(sampler)
    longest = sum(max(seconds[i] for i, _ in batch) * len(batch) for batch in batches)
    return 1 - sum(seconds[i] for batch in batches for i, _ in batch) / longest


def test_batches_of_similar_lengths():
    seconds = np.random.default_rng(0).uniform(1, 16, size=203).tolist()
    sampler = UpdateBatchSampler(seconds, 40, 1, max_batch_seconds=32, max_batch_size=16)
    fixed = UpdateSampler(203, 400, seed=1)
    plain = list(fixed)
    in_tens = [plain[i : i + 10] for i in range(0, 400, 10)]
    assert _padding(sampler, seconds) < 0.1 < 0.3 < _padding(in_tens, seconds)
    stream, per_pass = [], len(sampler.batches(0))
    for epoch in (1, 2, 3, 4):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler)) == 40
        stream += list(sampler)
    for batch in stream:
        assert len(batch) <= 16
        assert len(batch) == 1 or max(seconds[i] for i, _ in batch) * len(batch) <= 32
    for data_pass in range(len(stream) // per_pass):
        whole = stream[data_pass * per_pass : (data_pass + 1) * per_pass]
        assert sorted(item for batch in whole for item in batch) == [
            (i, data_pass) for i in range(203)
        ]
    assert stream[:per_pass] != [
        [(i, 0) for i, _ in batch] for batch in stream[per_pass : 2 * per_pass]
    ]
    again = UpdateBatchSampler(seconds, 40, 1, max_batch_seconds=32, max_batch_size=16)
    again.set_epoch(3)
    assert list(again) == stream[80:120]
    other = UpdateBatchSampler(seconds, 40, 2, max_batch_seconds=32, max_batch_size=16)
    assert list(other) != stream[:40]


def test_an_utterance_longer_than_a_batch_is_a_batch():
    sampler = UpdateBatchSampler([1.0, 1.0, 50.0], 3, 0, max_batch_seconds=4, max_batch_size=4)
    assert sorted(map(len, sampler.batches(0))) == [1, 2]


def test_processes_share_a_sampler():
    whole = list(UpdateSampler(7, 12, seed=3))
    shares = [list(ShareOfSampler(UpdateSampler(7, 12, seed=3), r, 3)) for r in range(3)]
    assert [item for turn in zip(*shares) for item in turn] == whole
    assert {len(share) for share in shares} == {len(ShareOfSampler(UpdateSampler(7, 12, 3), 0, 3))}


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """The corpus, with several shards of the training split."""
    folder = tmp_path_factory.mktemp("shards")
    written = write_shards(corpus, folder, ["train*", "dev", "test"], megabytes=0.1)
    assert len([path for path in written if path.name.startswith("train-")]) > 2
    return folder


def test_shards_give_the_pairs_of_the_folder(corpus, shards, noises):
    for source in (shards, f"{shards}/train-{{000000..000002}}.tar"):
        pairs = load_pairs(source, ["train*"], "train", noises, segment_seconds=1)
        folder = load_pairs(corpus, ["train*"], "train", noises, segment_seconds=1)
        ids = {folder.item_id(i): i for i in range(len(folder))}
        assert len(pairs) == len(folder) or "{" in str(source)
        for i in range(len(pairs)):
            one, other = pairs[i, 3], folder[ids[pairs.item_id(i)], 3]
            assert torch.equal(one.pop("noisy"), other.pop("noisy"))
            assert torch.equal(one.pop("clean"), other.pop("clean"))
            assert one == other
    whole = load_pairs(shards, ["train"], "train", noises)
    assert whole.fingerprint() == load_pairs(corpus, ["train"], "train", noises).fingerprint()


def test_shards_are_webdataset(corpus, shards):
    webdataset = pytest.importorskip("webdataset")
    names = sorted(str(path) for path in shards.glob("train-*.tar"))
    samples = list(webdataset.WebDataset(names, shardshuffle=False).decode())
    manifest = prepare_speech(corpus, ["train"])
    assert [sample["__key__"] for sample in samples] == list(manifest)
    for sample in samples:
        entry = manifest[sample["__key__"]]
        assert sample["flac"] == Path(entry["wav"]).read_bytes()
        assert sample["json"] == {"text": entry["text"], "speaker": entry["speaker"]}


def test_an_index_of_another_shard_is_made_anew(corpus, shards, tmp_path):
    for name in ("test-000000.tar", "test-000000.tar.index.json"):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    index = tmp_path / "test-000000.tar.index.json"
    index.write_text(index.read_text().replace('"text"', '"txet"'))
    manifest = prepare_speech(tmp_path, ["test"])
    assert all(entry["text"] for entry in manifest.values())
    index.write_text("{")
    assert list(prepare_speech(tmp_path, ["test"])) == list(manifest)


def test_bad_shards_are_named(shards, tmp_path):
    with pytest.raises(UserError, match=r"no shard of .* is of split 'nope'; there are: dev, test"):
        prepare_speech(shards, ["nope"])
    with pytest.raises(UserError, match=r"train-00000\d\.tar is missing"):
        prepare_speech(f"{shards}/train-{{000000..000007}}.tar", ["train"])
    content = (shards / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"train-000000\.tar: "):
        prepare_speech(tmp_path, ["train"])


def test_a_batch_has_whole_lengths_on_the_cpu_and_names_of_its_waveforms():
    sizes = [1, 333, 559_999]
    examples = [
        {"id": f"u{i}", "data_pass": 3, "wav": torch.ones(size), "tokens": torch.arange(i)}
        for i, size in enumerate(sizes)
    ]
    batch = collate(examples).to("meta")
    assert batch.wav.lengths.tolist() == sizes and batch.wav.data.is_meta
    assert batch.wav.ids == (("wav", "u0", 3), ("wav", "u1", 3), ("wav", "u2", 3))
    assert batch.tokens.lengths.tolist() == [0, 1, 2] and not batch.tokens.lengths.is_meta
    assert batch.id == ["u0", "u1", "u2"]


def _rng():
    return np.random.default_rng(5)


def test_a_random_filter_colours_and_moves_nothing():
    wav = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    filtered = random_filter(wav, _rng())
    again = random_filter(wav, _rng())
    assert torch.equal(filtered, again) and filtered.shape == wav.shape
    levels = (torch.fft.rfft(filtered).abs() / torch.fft.rfft(wav).abs()).log10() * 20
    assert levels.abs().max() < 12.1 and levels.std() > 2
    draws, step = _rng().uniform(-12, 12, 6), np.log(8000 / 50) / 5
    for hertz in (60, 632, 5000):  # a bin is 1 Hz
        place = np.log(hertz / 50) / step
        knot = int(place)
        expected = draws[knot] + (place - knot) * (draws[knot + 1] - draws[knot])
        assert float(levels[hertz]) == pytest.approx(expected, abs=1e-3)
    assert levels[:51].numpy() == pytest.approx(draws[0], abs=1e-3)
    correlation = torch.fft.irfft(torch.fft.rfft(filtered) * torch.fft.rfft(wav).conj())
    assert int(correlation.argmax()) == 0


def test_noise_as_long_as_the_speech_begins_where_it_begins(tmp_path):
    path = tmp_path / "hum.wav"
    write_audio(path, voice(1.0, 200, np.random.default_rng(3)))
    whole = read_audio(path)
    for before, frames in ((0, 16000), (4000, 12000)):  # a recording, and its second part
        entry = {"wav": str(path), "start": before, "frames": frames, "class": "hum"}
        mixer = NoiseMixer({"hum": entry}, [0])
        clean = torch.randn(frames, generator=torch.Generator().manual_seed(0))
        for rng in map(np.random.default_rng, range(4)):
            noisy, scaled, _ = mixer(0.1 * clean, rng)
            noise = noisy - scaled
            part = whole[before : before + frames]
            torch.testing.assert_close(noise / noise.norm(), part / part.norm(), atol=1e-5, rtol=0)
