"""Corpora that are lists of files, in training and in evaluation: CSV, cuts, Kaldi, the hub."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from running import scores, validations

from pi_finetune.data.audio import Converted, read_audio
from pi_finetune.data.checking import check_pairs
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import load_pairs
from pi_finetune.data.shard_writer import write_shards
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT


def csv(path, manifest, root=None):
    """What SpeechBrain's recipes write; with ``$data_root`` for its folder if that is ``root``."""
    rows = ["ID,duration,wav,spk_id,wrd"]
    for key, entry in manifest.items():
        wav = entry["wav"].replace(str(root), "$data_root") if root else entry["wav"]
        rows.append(f'{key},{entry["duration"]},"{wav}",{entry["speaker"]},{entry["text"] or ""}')
    path.write_text("\n".join(rows) + "\n")


def cuts(path, manifest):
    """What lhotse's ``CutSet.to_file`` writes."""
    with gzip.open(path, "wt") as file:
        for key, entry in manifest.items():
            info = soundfile.info(entry["wav"])
            times = {"start": 0.0, "duration": info.duration}
            said = {"id": key, "recording_id": key, **times, "channel": 0, "text": entry["text"]}
            recording = {
                "id": key, "sampling_rate": 16000, "num_samples": info.frames,
                "duration": info.duration, "channel_ids": [0],
                "sources": [{"type": "file", "channels": [0], "source": entry["wav"]}],
            }  # fmt: skip
            cut = {
                "id": key, **times, "channel": 0, "type": "MonoCut", "recording": recording,
                "supervisions": [{**said, "speaker": entry["speaker"]}],
            }  # fmt: skip
            file.write(json.dumps(cut) + "\n")


def kaldi(folder, manifest):
    folder.mkdir()
    for name, column in (("wav.scp", "wav"), ("text", "text"), ("utt2spk", "speaker")):
        lines = [f"{key} {entry[column]}\n" for key, entry in manifest.items() if entry[column]]
        if lines:
            (folder / name).write_text("".join(lines))


def hub(folder, manifest, split, datasets):
    rows = [
        {
            "audio": {"bytes": open(entry["wav"], "rb").read(), "path": f"{key}.flac"},
            "id": key, "text": entry["text"] or "", "speaker_id": entry["speaker"],
        }
        for key, entry in manifest.items()
    ]  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    data = data.cast_column("audio", datasets.Audio(decode=False))
    data.to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def lists(corpus, tmp_path_factory):
    """The corpus of the tests as each kind of list: ``{kind: data_folder}``."""
    folder = tmp_path_factory.mktemp("lists")
    manifests = {split: prepare_speech(corpus, [split]) for split in ("train", "dev", "test")}
    found = {kind: folder / kind for kind in ("csv", "kaldi", "lhotse", "hub")}
    for kind in found:
        found[kind].mkdir()
    for split, manifest in manifests.items():
        csv(found["csv"] / f"{split}.csv", manifest)
        cuts(found["lhotse"] / f"cuts_{split}.jsonl.gz", manifest)
        kaldi(found["kaldi"] / split, manifest)
    return found


def as_given(kind, lists, corpus):
    """The data_folder and the prefix of its splits; skips where a package is missing."""
    if kind == "lhotse":
        pytest.importorskip("lhotse")
        return str(lists[kind]), "cuts_"
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        if not list(lists[kind].iterdir()):
            for split in ("train", "dev", "test"):
                hub(lists[kind], prepare_speech(corpus, [split]), split, datasets)
        return f"hf:{lists[kind]}", ""
    return str(lists[kind]), ""


KINDS = ("csv", "kaldi", "lhotse", "hub")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    if "datasets" in sys.modules:
        place = tmp_path_factory.mktemp("cache")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place))


@pytest.mark.parametrize("kind", KINDS)
def test_each_list_gives_the_pairs_of_the_folder(kind, lists, corpus, noises):
    source, prefix = as_given(kind, lists, corpus)
    dev = "validation" if kind == "hub" else "dev"  # what datasets makes of dev.parquet
    for name, there in (("train", "train"), (dev, "dev")):
        expected = load_pairs(corpus, [there], "train", noises, segment_seconds=1, seed=3)
        pairs = load_pairs(source, [f"{prefix}{name}"], "train", noises, segment_seconds=1, seed=3)
        assert pairs.fingerprint() == expected.fingerprint()
        for address in ((0, 0), (len(pairs) - 1, 2)):
            one, other = pairs[address], expected[address]
            assert torch.equal(one["noisy"], other["noisy"])
            assert {k: one[k] for k in ("id", "speaker", "text")} == {
                k: other[k] for k in ("id", "speaker", "text")
            }
        check_pairs(pairs)


def test_patterns_and_names_of_splits(lists, corpus):
    everything = prepare_speech(lists["csv"], ["tr*", "dev"])
    assert list(everything) == list(prepare_speech(corpus, ["train", "dev"]))
    with pytest.raises(UserError, match=r"no split 'nope'; it has: dev, test, train.*--train_spl"):
        prepare_speech(lists["csv"], ["nope"])
    # One file is one split, whatever the splits say.
    one = prepare_speech(lists["csv"] / "test.csv", ["train*"])
    assert list(one) == list(prepare_speech(corpus, ["test"]))
    with pytest.raises(UserError, match=r"data_folder: .*gone\.csv: there is no such file"):
        prepare_speech(lists["csv"] / "gone.csv", ["train*"])


def test_a_folder_of_splits_may_hold_a_table(corpus, lists):
    """Metadata beside the folders of LibriSpeech's layout are not taken for the corpus."""
    table = corpus / "about.csv"
    table.write_text("speaker,sex\n10,f\n")
    try:
        assert list(prepare_speech(corpus, ["test"])) == list(
            prepare_speech(lists["csv"], ["test"])
        )
    finally:
        table.unlink()


@pytest.mark.parametrize("rate, channels", [(48000, 1), (16000, 2), (44100, 2), (8000, 1)])
def test_any_rate_and_channels(tmp_path, rate, channels):
    time = np.arange(rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a-1.wav", np.stack([tone] * channels, axis=1), rate)
    (tmp_path / "one.csv").write_text("ID,wav,start,stop\na-1,a-1.wav,,\na-2,a-1.wav,0.25,0.75\n")
    manifest = prepare_speech(tmp_path / "one.csv", [])
    whole, part = (read_audio(entry["wav"]) for entry in manifest.values())
    assert [len(whole), len(part)] == [16000, 8000]
    assert [entry["duration"] for entry in manifest.values()] == [1.0, 0.5]
    # A crop is what it is in the whole, to the sample.
    assert torch.equal(read_audio(manifest["a-1"]["wav"], 5001, 777), whole[5001:5778])
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(whole[200:-200], expected[200:-200], atol=2e-3)
    assert isinstance(manifest["a-2"]["wav"], Converted)
    assert "from 0.25 to 0.75 s" in str(manifest["a-2"]["wav"])


def test_shards_of_a_list(tmp_path):
    soundfile.write(
        tmp_path / "a-1.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 8000
    )
    (tmp_path / "one.csv").write_text("ID,wav,wrd\na-1,a-1.wav,HELLO\n")
    write_shards(tmp_path / "one.csv", tmp_path / "shards", ["test"])
    (entry,) = prepare_speech(tmp_path / "shards", ["test"]).values()
    (listed,) = prepare_speech(tmp_path / "one.csv", ["test"]).values()
    assert entry["text"] == "HELLO" and entry["duration"] == listed["duration"]
    difference = read_audio(entry["wav"]) - read_audio(listed["wav"])
    assert float(difference.abs().max()) < 1e-4  # of 16 bits


def test_check_data_names_a_silent_part(tmp_path, noises):
    wav = np.zeros(16000)
    wav[:8000] = 0.1 * np.random.default_rng(0).standard_normal(8000)
    soundfile.write(tmp_path / "a-1.wav", wav, 16000)
    text = "ID,wav,start,stop\na-1,a-1.wav,0,0.5\na-2,a-1.wav,0.6,0.9\n"
    (tmp_path / "one.csv").write_text(text)
    with pytest.raises(UserError, match=r"a-1\.wav from 0\.6 to 0\.9 s: is silent"):
        check_pairs(load_pairs(tmp_path / "one.csv", [], "train", noises))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation(kind, lists, corpus, train, evaluate):
    source, prefix = as_given(kind, lists, corpus)
    dev = "validation" if kind == "hub" else f"{prefix}dev"
    run = train(
        "mse",
        data_folder=source,
        train_splits=f"[{prefix}train]",
        valid_splits=f"[{dev}]",
        num_workers=1 if kind == "hub" else 0,
    )
    assert len(validations(run)) == 2
    one = {"csv": "/test.csv", "kaldi": "/test", "lhotse": "/cuts_test.jsonl.gz", "hub": ":test"}
    results = evaluate(["noisy"], data_folder=f"{source}{one[kind]}")
    found = scores(results / "noisy" / "0")
    assert [line["id"] for line in found] == list(prepare_speech(corpus, ["test"]))


def test_a_data_set_of_the_hub_from_its_cache(lists, corpus, tmp_path):
    """By its name, without a network, as after a download."""
    datasets = pytest.importorskip("datasets")
    source, _ = as_given("hub", lists, corpus)
    shutil.copytree(source.removeprefix("hf:"), tmp_path / "speech")
    loaded = datasets.load_dataset(str(tmp_path / "speech"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation", "test"}
    # What a download of someone/speech leaves.
    (tmp_path / "cache" / "speech").rename(tmp_path / "cache" / "someone___speech")
    code = (
        "from pi_finetune.data.corpora import prepare_speech as p;"
        "print(*p('hf:someone/speech:test', []));"
        "print(*p('hf:someone/speech', ['validation']))"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(PROJECT_ROOT),
    }
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    expected = [" ".join(prepare_speech(corpus, [split])) for split in ("test", "dev")]
    assert said.stdout.split("\n")[:2] == expected


def test_rows_without_ids_are_numbered(tmp_path, corpus):
    datasets = pytest.importorskip("datasets")
    for split in ("train", "test"):
        wavs = [entry["wav"] for entry in prepare_speech(corpus, [split]).values()][:2]
        rows = [{"audio": {"bytes": open(wav, "rb").read(), "path": "x.flac"}} for wav in wavs]
        data = datasets.Dataset.from_list(rows)
        data.cast_column("audio", datasets.Audio(decode=False)).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    manifest = prepare_speech(f"hf:{tmp_path}", ["*"])
    assert list(manifest) == ["test-000000", "test-000001", "train-000000", "train-000001"]
    assert len({entry["speaker"] for entry in manifest.values()}) == 4
