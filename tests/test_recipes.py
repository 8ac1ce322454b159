"""The recipes' READMEs and blocks, run on generated corpora and checkpoints of the real layouts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
import torch
import transformers
from running import recipe
from safetensors.torch import load_file
from synthetic import voice, write_audio

from pi_finetune.config import load_hparams
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.loading import load_pairs
from pi_finetune.enhancers import load_enhancer
from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import (
    CharacterTokenizer,
    CTCHead,
    PhonemeTokenizer,
    load_recognizer,
    save_recognizer,
)
from pi_finetune.results.metrics import recognition_errors
from pi_finetune.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "hparams" / "teachers").glob("*.yaml"))
ENVIRONMENTS = (
    "DKITCHEN DLIVING DWASHING NFIELD NPARK NRIVER OHALLWAY OMEETING OOFFICE PCAFETER PRESTO "
    "PSTATION SCAFE SPSQUARE STRAFFIC TBUS TCAR TMETRO"
).split()


# Resampling.


def test_resampling_keeps_what_16_khz_can_hold(tmp_path):
    time = np.arange(48000) / 48000
    wav = 0.3 * np.sin(2 * np.pi * 1000 * time) + 0.3 * np.sin(2 * np.pi * 12000 * time)
    source, target = tmp_path / "48", tmp_path / "16"
    write_audio(source / "a" / "x.wav", wav.astype(np.float32), rate=48000)
    write_audio(source / "a" / "y.flac", wav[::3].astype(np.float32), rate=16000)
    (source / "log.txt").write_text("x bus 5\n")
    recipe("resample")([str(source), str(target)])
    found, rate = soundfile.read(target / "a" / "x.wav")
    assert rate == 16000 and len(found) == 16000
    expected = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[400:-400].max() < 1e-3
    same = soundfile.read(target / "a" / "y.flac")[0]
    assert np.array_equal(same, soundfile.read(source / "a" / "y.flac")[0])
    assert (target / "log.txt").read_text() == "x bus 5\n"


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus"])
def test_resampling_makes_one_channel_of_several(tmp_path, suffix):
    """The mean, or the one that is named."""
    time = np.arange(24000) / 48000
    left, right = (0.3 * np.sin(2 * np.pi * f * time) for f in (500, 1500))
    source = tmp_path / "48" / f"x.{suffix}"
    source.parent.mkdir()
    opus = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(source, np.stack([left, right], axis=1), 48000, **opus)
    for words, expected in (
        ([], (left + right) / 2),
        (["--channel", "1"], left),
        (["--channel", "2"], right),
    ):
        target = tmp_path / f"16{''.join(words)}"
        recipe("resample")([str(tmp_path / "48"), str(target), *words])
        found, rate = soundfile.read(target / f"x.{suffix}")
        assert rate == 16000 and found.ndim == 1
        cut = slice(1000, 7000)
        assert np.corrcoef(found[cut], expected[::3][cut])[0, 1] > 0.99


def test_interrupted_resampling_continues(tmp_path, monkeypatch, capsys):
    for name in "abc":
        write_audio(tmp_path / "48" / f"{name}.wav", np.zeros(4800, np.float32), rate=48000)
    arguments = [str(tmp_path / "48"), str(tmp_path / "16")]
    write, calls = soundfile.write, []

    def die(file, *rest, **options):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half a file")
            raise KeyboardInterrupt
        write(file, *rest, **options)

    monkeypatch.setattr(soundfile, "write", die)
    with pytest.raises(SystemExit):
        recipe("resample")(arguments)
    assert [path.name for path in (tmp_path / "16").iterdir()] == ["a.wav"]
    recipe("resample")(arguments)
    assert sorted(path.name for path in (tmp_path / "16").iterdir()) == ["a.wav", "b.wav", "c.wav"]
    assert len(calls) == 4 and "2 files made, 1 were there" in capsys.readouterr().out


def test_resampling_names_what_is_wrong(tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit):
            recipe("resample")([str(argument) for argument in arguments])
        return capsys.readouterr().err

    source = tmp_path / "48"
    assert "no such folder" in error(source, tmp_path / "16")
    write_audio(source / "ch01.wav", np.zeros((2, 480), np.float32), rate=48000)
    assert "no audio file matches --pattern 'x*'" in error(source, tmp_path / "16", "--pattern=x*")
    assert "ch01.wav: --channel 3 is not there; it has 2" in error(
        source, tmp_path / "16", "--channel=3"
    )
    assert "--channel 0: channels count from 1" in error(source, tmp_path / "16", "--channel=0")
    assert "--jobs 0: give the number" in error(source, tmp_path / "16", "--jobs=0")
    assert "lies in" in error(source, source / "16")
    (source / "ch01.wav").write_bytes(b"no audio")
    assert "ch01.wav: cannot be read" in error(source, tmp_path / "16")


# Teachers.


def published(folder, preset):
    """A random checkpoint in the files, names and kind of norm of the one that a preset names."""
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_codevectors_per_group": 4,
    }
    base = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    make = {
        "hubert_base": lambda: transformers.HubertModel(transformers.HubertConfig(**size, **base)),
        "hubert_large": lambda: transformers.HubertModel(
            transformers.HubertConfig(**size, **large)
        ),
        "wavlm_base_plus": lambda: transformers.WavLMModel(
            transformers.WavLMConfig(**size, **base)
        ),
        "wavlm_large": lambda: transformers.WavLMModel(transformers.WavLMConfig(**size, **large)),
        "wav2vec2_base": lambda: transformers.Wav2Vec2ForPreTraining(
            transformers.Wav2Vec2Config(**size, **base)
        ),
        "whisper_small_en": lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                d_model=32,
                encoder_layers=2,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                vocab_size=60,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
    }
    torch.manual_seed(0)
    model = make[preset]()
    model.save_pretrained(folder)
    if preset.startswith("whisper"):
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        return model.model.encoder
    transformers.Wav2Vec2FeatureExtractor(
        do_normalize=preset != "wavlm_base_plus", return_attention_mask="group" not in base
    ).save_pretrained(folder)
    # The hub has these as pickles, with weight norm under its names of before PyTorch 2.
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    assert any(name.endswith("weight_g") for name in old)
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    return getattr(model, "wav2vec2", model)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_teacher_preset_trains(preset, corpus, noises, pretrained, tmp_path, monkeypatch):
    original = published(tmp_path / "teacher", preset)
    monkeypatch.chdir(ROOT)  # where a user stands; the include is relative to it
    options = {
        "teacher_preset": f"!include:hparams/teachers/{preset}.yaml",
        "teacher_source": tmp_path / "teacher",
        "data_folder": corpus,
        "noise_folder": noises,
        "enhancer": f"!include:{pretrained}/block.yaml",
        "enhancer_weights": pretrained,
        "asr_source": "null",
        "select_by": "si_sdr",
        "results_folder": tmp_path / "results",
        "updates": 2,
        "valid_every": 2,
        "segment_seconds": 1.0,
        "batch_size": 2,
        "num_workers": 0,
        "valid_utterances": 2,
        "warmup_updates": 0,
    }
    arguments = [str(ROOT / "hparams/soft_dtw.yaml"), "--noprogressbar"]
    recipe("train")([*arguments, *(f"--{key}={value}" for key, value in options.items())])
    run = tmp_path / "results/soft_dtw/1234"
    record = json.loads((run / "valid.jsonl").read_text())
    assert record["update"] == 2 and record["skipped_updates"] == 0
    assert np.isfinite(record["objective"])
    before, after = (load_file(f / "enhancer.safetensors") for f in (pretrained, run))
    assert any(not torch.equal(before[name], after[name]) for name in before)

    teacher = Teacher(str(tmp_path / "teacher"))
    kept = original.state_dict()
    for name, tensor in teacher.encoder.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    if not preset.startswith("whisper"):
        assert teacher.normalize == (preset != "wavlm_base_plus")


def test_presets_say_what_they_change():
    def settings(overrides=None, experiment="soft_dtw"):
        hparams, text = load_hparams(ROOT / f"hparams/{experiment}.yaml", overrides)
        assert "!ref" not in text
        return hparams

    def speeds(hparams):
        return [float(factor) for factor in hparams["perturbation"].factors]

    usual = settings()
    assert usual["teacher_source"] == str(ROOT / "assets/models/teacher")
    assert usual["teacher_layers"] == -1 and usual["gamma"] == 0.1
    assert speeds(usual) == [0.9, 1.0, 1.1]
    preset = f"teacher_preset: !include:{quote(str(ROOT))}/hparams/teachers/wavlm_large.yaml\n"
    large = settings(preset)
    assert large["teacher_source"] == "microsoft/wavlm-large"
    assert speeds(large) == [0.8, 0.85, 0.9, 1.0, 1.1, 1.15, 1.2]
    own = settings(preset + "gamma: 0.5\nteacher_layers: 9\nspeed_factors: [1.0, 2.0]\n")
    assert own["gamma"] == own["distance"].options["gamma"] == 0.5 and own["teacher_layers"] == 9
    assert speeds(own) == [1.0, 2.0]
    assert own["teacher_source"] == "microsoft/wavlm-large"
    assert speeds(settings(preset, "speed_mse"))[0] == 0.8
    named = settings("teacher_preset: wavlm_large", "mse")  # which has no gamma
    assert named["teacher_source"] == "microsoft/wavlm-large"
    with pytest.raises(UserError, match=r"teacher_preset: name a file .* by --gamma 1\.0"):
        settings("teacher_preset:\n  gamma: 2.0\n", "zero_pad_soft_dtw")
    with pytest.raises(UserError, match="no preset wavlm_larg"):
        settings("teacher_preset: wavlm_larg")


@pytest.mark.slow
def test_hubert_of_base_size_passes_gradient(tmp_path):
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig()).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    assert (teacher.num_layers, teacher.dim, teacher.hop) == (12, 768, 320)
    wav = torch.tensor(voice(0.5, 120, np.random.default_rng(0)))[None].requires_grad_()
    reps, frames = teacher(wav, torch.tensor([8000]))
    assert reps.shape == (1, 24, 768) and frames.tolist() == [24]
    reps.square().mean().backward()
    assert torch.isfinite(wav.grad).all() and wav.grad.abs().max() > 0


# Joint use of enhancer and recognisers.


@pytest.fixture(scope="module")
def recognizer_folders(tiny_teacher, tmp_path_factory):
    """Random recognisers of words and, with gruut, of phonemes, without a blank's lead."""
    encoder, folders = Teacher(str(tiny_teacher)), []
    kinds = [("ctc", CharacterTokenizer(), 2)]
    if importlib.util.find_spec("gruut"):
        kinds.append(("pr", PhonemeTokenizer(), 0))
    for name, tokenizer, depth in kinds:
        torch.manual_seed(1)
        head = CTCHead.for_encoder(encoder, tokenizer, hidden=16, depth=depth)
        with torch.no_grad():
            head.output.weight *= 20
        folders.append(tmp_path_factory.mktemp(name))
        save_recognizer(folders[-1], name, encoder, head, tokenizer)
    return folders


@pytest.mark.parametrize(
    ("system", "share"), [("noisy", 0.5), ("pretrained", 1.0), ("pretrained", 0.5)]
)
def test_recognition_through_evaluation_is_that_of_the_recogniser_alone(
    system, share, corpus, noises, pretrained, recognizer_folders, tmp_path
):
    options = {
        "run": system,
        "mix": share,
        "results_folder": tmp_path,
        "enhancer_weights": pretrained,
        "data_folder": corpus,
        "noise_folder": noises,
        "asr_source": json.dumps([str(folder) for folder in recognizer_folders]),
        "workers": 1,
        "audio_examples": 0,
        "batch_size": 4,
    }
    arguments = [str(ROOT / "hparams/evaluate.yaml")]
    recipe("evaluate")([*arguments, *(f"--{key}={value}" for key, value in options.items())])
    path = tmp_path / system / "0/scores/test.jsonl"
    lines = {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}
    pairs = load_pairs(corpus, ["test"], "test", noises)
    assert len(lines) == len(pairs) == 6
    enhancer = load_enhancer(pretrained).eval() if system == "pretrained" else None
    for folder in recognizer_folders:
        recognizer = load_recognizer(folder)
        heard = set()
        for pair in map(pairs.__getitem__, range(len(pairs))):
            wavs = Waveforms.of(pair["noisy"][None])
            if enhancer is not None:
                with torch.no_grad():
                    enhanced = enhancer(wavs)
                    wavs = wavs.with_data(share * enhanced.data + (1 - share) * wavs.data)
            (text,) = recognizer(wavs)
            expected = recognition_errors(recognizer, pair["text"], text)
            stored = lines[pair["id"]]["asr"][recognizer.name]
            assert {key: stored[key] for key in expected} == expected and stored["tokens"] > 0
            assert expected.get("unit", "word") == recognizer.unit
            heard.add(text)
        assert len(heard) > 1


# The READMEs' commands, on folders of the published layouts.


def sh_blocks(readme, since="#"):
    text = (ROOT / readme).read_text()
    text = text[text.index(since) :]
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))


def typed(script, folder):
    """What bash calls ``python`` with, one list of arguments a call; nothing is downloaded."""
    log = folder / "calls"
    shims = (
        f'python() {{ printf "%s\\0" "$@" >> {log}; printf "\\n\\0" >> {log}; }}\n'
        "wget() { :; }\nunzip() { :; }\nset -eu\n"
    )
    environment = {**os.environ, "HOME": str(folder)}
    subprocess.run(["bash", "-c", shims + script], check=True, cwd=folder, env=environment)
    calls = log.read_text().split("\0\n\0")
    return [call.split("\0") for call in calls if call]


def run_small(call, changes):
    """Run a recipe in this process with some of its options exchanged."""
    script, *arguments = call
    for key, value in changes.items():
        if f"--{key}" in arguments:
            arguments[arguments.index(f"--{key}") + 1] = str(value)
        else:
            arguments += [f"--{key}", str(value)]
    if "--device" in arguments:
        arguments[arguments.index("--device") + 1] = "cpu"
    recipe(Path(script).stem)(arguments)


SMALL = {"updates": 2, "valid_every": 2, "batch_size": 2, "warmup_updates": 0}


@pytest.fixture
def small(pretrained, tiny_teacher):
    """Options that make each command of the READMEs a matter of a second."""
    train = {
        **SMALL,
        "num_workers": 0,
        "valid_utterances": 2,
        "segment_seconds": 0.5,
        "enhancer": f"!include:{pretrained}/block.yaml",
    }
    return {
        "pretrain": train,
        "train": {**train, "teacher_source": tiny_teacher},
        "train_asr": {**SMALL, "encoder_source": tiny_teacher, "hidden": 8},
        "evaluate": {"batch_size": 4, "workers": 1, "audio_examples": 1},
        "compare": {"replicates": 99},
    }


def run_readme(calls, small, strategies):
    """Run all commands but those of other strategies and seeds; returns how many there are of each.

    A run that is left out is left out of the evaluation as well.
    """
    count = {}
    for call in calls:
        name = Path(call[0]).stem
        count[name] = count.get(name, 0) + 1
        if name == "-c":  # torchaudio downloads nothing where the corpus is there
            code = [sys.executable, *call]
            subprocess.run(code, check=True)
        elif name == "train" and "pretrain" in call[1]:
            run_small(call, small["pretrain"])
        elif name == "train":
            if Path(call[1]).stem in strategies and call[call.index("--seed") + 1] == "1":
                run_small(call, small["train"])
        elif name == "evaluate":
            runs = call[call.index("--run") + 1].strip("[]").split(", ")
            assert len(runs) == 2 + 8 * 3
            there = [run for run in runs if "/" not in run or Path(run).exists()]
            assert len(there) == 2 + len(strategies)
            run_small(call, {**small["evaluate"], "run": f"[{', '.join(there)}]"})
        else:
            run_small(call, small.get(name, {}))
    return count


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that looks like the project's from inside, for results of its own."""
    for name in ("hparams", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def read_scores(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.needs("gruut")
def test_librispeech_readme_from_corpus_to_table(project, corpus, small):
    speech = project / "corpora/LibriSpeech"
    for split, name in (("train", "train-clean-100"), ("dev", "dev-clean"), ("test", "test-clean")):
        shutil.copytree(corpus / split, speech / name)
    rng = np.random.default_rng(0)
    for environment in ENVIRONMENTS:
        rate, folder = (48000, "DEMAND-48k") if environment == "SCAFE" else (16000, "DEMAND")
        for channel in range(1, 17):
            noise = 0.1 * rng.standard_normal(12 * rate // 4).astype(np.float32)
            write_audio(
                project / "corpora" / folder / environment / f"ch{channel:02d}.wav", noise, rate
            )
    calls = typed(sh_blocks("recipes/LibriSpeech/README.md", "## train-clean-100"), project)
    count = run_readme(calls, small, {"mse", "soft_dtw"})
    assert count == {"-c": 1, "resample": 1, "train": 1 + 8 * 3, "train_asr": 2, "evaluate": 3,
                     "compare": 3}  # fmt: skip

    evaluate = next(call for call in calls if "seen" in call)
    seen = evaluate[evaluate.index("--noise_classes") + 1].strip("[]").split(", ")
    unseen = set(ENVIRONMENTS) - set(seen)
    assert len(seen) == 12 and len(unseen) == 6
    heard = prepare_noise(project / "corpora/DEMAND", "train", seen)
    results = project / "results/librispeech"
    for system in ("noisy/0", "pretrained/0", "mse/1", "soft_dtw/1"):
        sets = {s: read_scores(results / system / f"scores/{s}.jsonl") for s in
                ("clean", "seen", "unseen")}  # fmt: skip
        assert {len(lines) for lines in sets.values()} == {6}
        assert {line["noise_class"] for line in sets["clean"]} == {None}
        assert {line["noise_class"] for line in sets["seen"]} <= set(seen)
        assert {line["noise_class"] for line in sets["unseen"]} <= unseen
        assert {line["snr"] for line in sets["seen"] + sets["unseen"]} <= {20, 10, 5}
        for line in sets["seen"]:
            assert line["asr"]["ctc"].keys() >= {"hits"} and line["asr"]["pr"]["unit"] == "phoneme"
    clean = read_scores(results / "noisy/0/scores/clean.jsonl")
    assert all(line["si_sdr"] > 100 and line["stoi"] > 0.999 for line in clean)
    test = prepare_noise(project / "corpora/DEMAND", "test", seen)
    for name, entry in test.items():
        assert entry["start"] + entry["frames"] <= heard[name]["start"]
    for name in ("clean", "seen", "unseen"):
        table = (project / f"results/librispeech-tables/{name}/summary.csv").read_text()
        assert "soft_dtw" in table
    settings = (results / "soft_dtw/1/hyperparams.yaml").read_text()
    assert "0.85" in settings and "teacher_preset: wavlm_base_plus" in settings


def test_voicebank_readme_from_corpus_to_table(project, small, monkeypatch):
    rng, folder = np.random.default_rng(0), project / "corpora/VoiceBank-DEMAND-48k"
    sets = {
        "trainset_28spk": [f"{s}_{i:03d}" for s in ("p226", "p230", "p287") for i in (1, 2, 3)],
        "testset": [f"p232_{i:03d}" for i in (1, 2, 3)],
    }
    for kind, names in sets.items():
        (folder / f"{kind}_txt").mkdir(parents=True)
        for name in names:
            clean = voice(1, 120, rng).repeat(3)
            noise = 0.02 * rng.standard_normal(len(clean)).astype(np.float32)
            write_audio(folder / f"clean_{kind}_wav" / f"{name}.wav", clean, 48000)
            write_audio(folder / f"noisy_{kind}_wav" / f"{name}.wav", clean + noise, 48000)
            (folder / f"{kind}_txt" / f"{name}.txt").write_text("Please call Stella.\n")
        log = "".join(f"{name} bus 12.5\n" for name in names)
        (folder / f"log_{kind}.txt").write_text(log)
    with pytest.raises(UserError, match=r"48000 Hz.*recipes/resample\.py"):
        prepare_speech(folder, ["train"])

    class Parrot:
        name, unit = "whisper", "word"

        def __call__(self, wavs):
            return ["please call"] * len(wavs)

    monkeypatch.setattr("pi_finetune.results.evaluation.load_recognizer", lambda source: Parrot())
    calls = typed(sh_blocks("recipes/VoiceBank/README.md"), project)
    calls[0][-1] = "1"  # jobs
    assert "--jobs" in calls[0]
    count = run_readme(calls, small, {"mse", "zero_pad"})
    assert count == {"resample": 1, "train": 1 + 8 * 3, "evaluate": 1, "compare": 1}
    for system in ("noisy/0", "pretrained/0", "mse/1", "zero_pad/1"):
        lines = read_scores(project / f"results/voicebank/{system}/scores/test.jsonl")
        assert [line["id"] for line in lines] == sets["testset"]
        assert {(line["snr"], line["noise_class"]) for line in lines} == {(12.5, "bus")}
        assert {line["asr"]["whisper"]["hits"] for line in lines} == {2}
    assert (project / "results/voicebank/report.html").is_file()
    converted = project / "corpora/VoiceBank-DEMAND"
    train = prepare_speech(converted, ["train_28spk"])
    assert {entry["speaker"] for entry in train.values()} == {"p230"}
    assert {entry["text"] for entry in train.values()} == {"Please call Stella."}
    assert {entry["snr"] for entry in train.values()} == {12.5}
    assert {entry["speaker"] for entry in prepare_speech(converted, ["dev"]).values()} == {
        "p226", "p287",
    }  # fmt: skip
