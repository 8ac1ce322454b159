"""Real recordings without references: each layout, any rate and channel count."""

import gzip
import json

import numpy as np
import pytest
import soundfile

from pi_finetune.data.recordings import prepare_recordings, read_recording


def tones(seconds=1.0, rate=44100):
    """Two channels: 440 Hz and 880 Hz."""
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * f * time) for f in (440, 880)], axis=1)


@pytest.fixture
def folder(tmp_path):
    for name in ("a-1", "b-2"):
        soundfile.write(tmp_path / f"{name}.wav", tones(), 44100)
    return tmp_path


def kaldi(folder):
    (folder / "wav.scp").write_text("rec1 a-1.wav\nrec2\tb-2.wav\n")
    (folder / "segments").write_text("a-x rec1 0.25 0.75\nb-y rec2 0 1.0\n")
    (folder / "text").write_text("a-x ONE TWO\n")
    (folder / "utt2spk").write_text("a-x speaker\nb-y other\n")
    return folder


def speechbrain(folder):
    (folder / "x.csv").write_text(
        "ID,duration,wav,spk_id,wrd\na-x,1.0,$data_root/a-1.wav,s,ONE\nb-y,1.0,b-2.wav,t,TWO\n"
    )
    return folder / "x.csv"


def lhotse(folder, start=0.25):
    pytest.importorskip("lhotse")
    recording = {
        "id": "r", "sampling_rate": 44100, "num_samples": 44100, "duration": 1.0,
        "channel_ids": [0, 1],
        "sources": [{"type": "file", "channels": [0, 1], "source": str(folder / "a-1.wav")}],
    }  # fmt: skip
    said = {"id": "s", "recording_id": "r", "start": 0, "duration": 0.5, "text": "ONE"}
    cut = {
        "id": "a-x", "start": start, "duration": 0.5, "channel": 1, "type": "MonoCut",
        "recording": recording, "supervisions": [{**said, "channel": 1, "speaker": "s"}],
    }  # fmt: skip
    with gzip.open(folder / "cuts.jsonl.gz", "wt") as file:
        file.write(json.dumps(cut) + "\n")
    return folder / "cuts.jsonl.gz"


def peak_hz(wav):
    return np.argmax(np.abs(np.fft.rfft(wav.numpy()))) * 16000 / len(wav)


def test_folder(folder):
    manifest = prepare_recordings(folder)
    assert list(manifest) == ["a-1", "b-2"] and manifest["a-1"]["text"] is None
    mean = read_recording(manifest["a-1"])
    assert mean.shape == (16000,)
    for channel, hertz in ((1, 440), (2, 880)):
        wav = read_recording(prepare_recordings(folder, channel=channel)["a-1"])
        assert peak_hz(wav) == pytest.approx(hertz, abs=2)
    assert set(prepare_recordings(folder.parent, [folder.name])) == {"a-1", "b-2"}


def test_kaldi(folder):
    manifest = prepare_recordings(kaldi(folder), channel=2)
    assert manifest["a-x"]["text"] == "ONE TWO" and manifest["b-y"]["text"] is None
    assert manifest["a-x"]["speaker"] == "speaker"
    wav = read_recording(manifest["a-x"])
    assert wav.shape == (8000,) and peak_hz(wav) == pytest.approx(880, abs=3)
    assert list(prepare_recordings(folder / "wav.scp")) == ["a-x", "b-y"]


def test_csv(folder):
    manifest = prepare_recordings(speechbrain(folder))
    assert [(e["speaker"], e["text"]) for e in manifest.values()] == [("s", "ONE"), ("t", "TWO")]


def test_lhotse(folder):
    manifest = prepare_recordings(lhotse(folder))
    assert manifest["a-x"]["text"] == "ONE" and manifest["a-x"]["channel"] == 2
    wav = read_recording(manifest["a-x"])
    assert wav.shape == (8000,) and peak_hz(wav) == pytest.approx(880, abs=3)


def test_hub(folder, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    data = datasets.Dataset.from_dict(
        {"audio": [str(folder / "a-1.wav")], "text": ["ONE"], "id": ["a-x"]}
    ).cast_column("audio", datasets.Audio(decode=False))
    data = data.map(
        lambda row: {"audio": {"bytes": (folder / "a-1.wav").read_bytes(), "path": "a-1.wav"}}
    ).cast_column("audio", datasets.Audio(decode=False))
    place = tmp_path_factory.mktemp("hub")
    data.to_parquet(place / "test.parquet")
    manifest = prepare_recordings(f"hf:{place}:test", channel=1)
    assert manifest["a-x"]["text"] == "ONE"
    assert peak_hz(read_recording(manifest["a-x"])) == pytest.approx(440, abs=2)
