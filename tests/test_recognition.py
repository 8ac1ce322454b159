"""Recognisers and the training of the CTC head, on generated speech and random models."""

import json
import math
import re
import shutil
import string
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from running import Parrot, recipe
from safetensors.torch import load_file, save_file
from synthetic import write_audio

from pi_finetune import recognizers
from pi_finetune.brains.recognition import (
    Augmentation,
    EncodedSpeech,
    RecognitionBrain,
    transcribe_set,
)
from pi_finetune.data.audio import read_audio
from pi_finetune.data.corpora import prepare_noise, prepare_speech
from pi_finetune.data.loading import load_pairs
from pi_finetune.data.mixing import NoiseMixer
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT
from pi_finetune.lengths import Waveforms
from pi_finetune.recognizers import (
    CharacterTokenizer,
    CTCHead,
    CTCRecognizer,
    LogMel,
    PhonemeTokenizer,
    WhisperRecognizer,
    gives_likelihood,
    likelihoods,
    load_recognizer,
    save_recognizer,
)
from pi_finetune.results import metrics
from pi_finetune.teacher import Teacher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def encoder(tiny_teacher):
    return Teacher(str(tiny_teacher))


def random_recognizer(folder, name, encoder, tokenizer, depth):
    """A recogniser that says something else for every utterance: random, without a blank's lead."""
    torch.manual_seed(1)
    head = CTCHead.for_encoder(encoder, tokenizer, hidden=16, depth=depth)
    with torch.no_grad():
        head.output.weight *= 20
    save_recognizer(folder, name, encoder, head, tokenizer)
    return folder


@pytest.fixture(scope="module")
def ctc_folder(encoder, tmp_path_factory):
    return random_recognizer(
        tmp_path_factory.mktemp("asr"), "tiny", encoder, CharacterTokenizer(), depth=2
    )


@pytest.fixture(scope="module")
def pr_folder(encoder, tmp_path_factory):
    pytest.importorskip("gruut", reason="gruut is not installed")
    return random_recognizer(
        tmp_path_factory.mktemp("pr"), "phones", encoder, PhonemeTokenizer(), depth=0
    )


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A random English-only Whisper over bytes, in the files of a real one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("models") / "whisper-random.en"
    folder.mkdir()
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    special += [f"<|{0.02 * i:.2f}|>" for i in range(1501)]
    vocabulary = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], unk_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(special)
    letters = string.ascii_letters
    torch.manual_seed(2)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=len(tokenizer),
            num_mel_bins=80,
            max_target_positions=24,
            decoder_start_token_id=ids[1],
            bos_token_id=ids[0],
            eos_token_id=ids[0],
            pad_token_id=ids[0],
            begin_suppress_tokens=None,
            suppress_tokens=[i for c, i in tokenizer.get_vocab().items() if c not in letters],
        )
    )
    with torch.no_grad():  # what it says is to depend on what it hears
        model.model.encoder.conv1.weight *= 100
        attention = model.model.decoder.layers[0].encoder_attn
        for part in (attention.q_proj, attention.k_proj, attention.out_proj):
            part.weight *= 1000
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def waves(corpus):
    manifest = prepare_speech(corpus, ["dev", "test"])
    items = [read_audio(entry["wav"]) for entry in list(manifest.values())[:4]]
    assert len({len(item) for item in items}) == 4
    return Waveforms.collate(items)


# The interface, for both kinds.


@pytest.fixture(params=["ctc", "pr", "whisper"])
def recognizer(request):
    return load_recognizer(request.getfixturevalue(f"{request.param}_folder"))


def test_a_batch_is_heard_as_its_items_alone(recognizer, waves):
    texts = recognizer(waves)
    assert len(set(texts)) > 1 and all(isinstance(text, str) for text in texts)
    assert recognizer(waves.with_data(waves.data.masked_fill(~waves.mask(), torch.nan))) == texts
    assert [recognizer(Waveforms.collate([wav]))[0] for wav in waves.items()] == texts


def test_unusable_waveforms_are_heard_as_nothing(recognizer, waves):
    whole = recognizer(waves)
    items = [wav.clone() for wav in waves.items()]
    items[1][50] = torch.nan
    items[2] = items[2][:0]
    assert recognizer(Waveforms.collate(items)) == [whole[0], "", "", whole[3]]
    assert recognizer(Waveforms.collate(items[1:2])) == [""]


def test_wrong_arguments_are_named(recognizer, waves):
    with pytest.raises(TypeError, match=r"takes Waveforms, got Tensor; .*Waveforms\.of"):
        recognizer(waves.data)
    with pytest.raises(TypeError, match="takes Waveforms, got list"):
        recognizer.nll(waves.items(), TEXTS)


def test_names(ctc_folder, whisper_folder):
    assert load_recognizer(ctc_folder).name == "tiny"
    assert load_recognizer(str(whisper_folder)).name == "whisper-random.en"


def test_units(ctc_folder, pr_folder, whisper_folder):
    folders = (ctc_folder, pr_folder, whisper_folder)
    assert [load_recognizer(f).unit for f in folders] == ["word", "phoneme", "word"]


def test_ctc_of_less_than_a_frame_is_nothing(ctc_folder):
    assert CTCRecognizer(ctc_folder)(Waveforms.of(0.1 * torch.ones(2, 399), [399, 1])) == ["", ""]


def test_whisper_hears_beyond_thirty_seconds(whisper_folder, waves, monkeypatch):
    recognizer = WhisperRecognizer(str(whisper_folder))
    wavs = waves.data[:1].repeat(1, 20)[:, : 40 * 16000]
    assert wavs.shape[1] > 30 * 16000
    seen = []
    generate = recognizer.model.generate

    def spy(**options):
        given = options.get("input_features")
        given = options["encoder_outputs"].last_hidden_state if given is None else given
        seen.append((tuple(given.shape), options["return_timestamps"]))
        return generate(**options)

    monkeypatch.setattr(recognizer.model, "generate", spy)
    both = torch.cat([wavs, wavs])
    texts = recognizer(Waveforms.of(both, [wavs.shape[1], 16000]))
    assert len(texts) == 2
    frames = wavs.shape[1] // 160
    states = recognizer.model.config.max_source_positions, recognizer.model.config.d_model
    assert seen == [((1, *states), False), ((1, 80, frames), True)]


def test_whisper_decodes_with_the_options_of_the_user(whisper_folder, waves):
    def texts(**options):
        return WhisperRecognizer(str(whisper_folder), generation=options)(waves)

    plain = texts()
    assert texts(num_beams=1) == plain
    assert all(len(text) < len(other) for text, other in zip(texts(max_new_tokens=2), plain))
    with pytest.raises(UserError, match="generation: 'no_repeat' is no option of"):
        WhisperRecognizer(str(whisper_folder), generation={"no_repeat": 5})


def test_multilingual_whisper_is_told_language_and_task(whisper_folder, tmp_path):
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    folder = tmp_path / "whisper-random"
    shutil.copytree(whisper_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|en|>", "<|transcribe|>"]})
    tokenizer.save_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config["is_multilingual"] = True
    del config["_from_model_config"]  # else from_pretrained drops is_multilingual
    (folder / "generation_config.json").write_text(json.dumps(config))
    recognizer = WhisperRecognizer(str(folder))
    assert recognizer.options["language"] == "en" and recognizer.options["task"] == "transcribe"
    # start, language, task: Whisper's prompt
    features = torch.zeros(1, 80, 3000)
    tokens = recognizer.model.generate(features, **recognizer.options, max_new_tokens=1)
    ids = tokenizer.convert_tokens_to_ids(["<|en|>", "<|transcribe|>"])
    config = recognizer.model.generation_config
    assert config.lang_to_id == {"<|en|>": ids[0]} and config.task_to_id == {"transcribe": ids[1]}
    assert tokens.shape[0] == 1
    with pytest.raises(UserError, match="lacks xx"):
        WhisperRecognizer(str(folder), language="xx")


# Likelihoods.

TEXTS = ["ONE TWO", "THREE THREE, THREE", "", "It's four!"]


def test_likelihood_in_a_batch_is_that_alone(recognizer, waves):
    found = recognizer.nll(waves, TEXTS)
    assert all(nll > 0 and math.isfinite(nll) for nll, _ in found)
    padded = waves.with_data(waves.data.masked_fill(~waves.mask(), torch.nan))
    assert recognizer.nll(padded, TEXTS) == found
    for wav, text, (nll, tokens) in zip(waves.items(), TEXTS, found):
        (alone,) = recognizer.nll(Waveforms.collate([wav]), [text])
        assert alone == (pytest.approx(nll, rel=1e-5), tokens)


def test_likelihood_of_what_cannot_be_heard_is_none(recognizer, waves):
    whole = recognizer.nll(waves, TEXTS)
    items = [wav.clone() for wav in waves.items()]
    items[1][50] = torch.nan
    items[2] = items[2][:0]
    found = recognizer.nll(Waveforms.collate(items), TEXTS)
    assert [nll for nll, _ in found] == [
        pytest.approx(whole[0][0], rel=1e-5), None, None, pytest.approx(whole[3][0], rel=1e-5)
    ]  # fmt: skip
    assert [tokens for _, tokens in found] == [tokens for _, tokens in whole]
    assert recognizer.nll(Waveforms.collate(items[1:2]), TEXTS[1:2]) == [(None, whole[1][1])]


def test_likelihood_wants_a_text_for_each_waveform(recognizer, waves):
    with pytest.raises(ValueError, match="a transcript, a str, for each of 4"):
        recognizer.nll(waves, TEXTS[:3])
    with pytest.raises(ValueError, match="NoneType"):
        recognizer.nll(waves, [*TEXTS[:3], None])


def test_whispers_likelihood_is_transformers_own_loss(whisper_folder, waves):
    recognizer = WhisperRecognizer(str(whisper_folder))
    found = recognizer.nll(waves, TEXTS)
    for wav, text, (nll, tokens) in zip(waves.items(), TEXTS, found):
        features = recognizer.extractor([wav.numpy()], sampling_rate=16000, return_tensors="pt")
        spoken = " " + text.lower() if text.isupper() else f" {text}" if text else ""
        labels = torch.tensor([recognizer.tokenizer(spoken).input_ids])
        assert (
            labels[0, 0] == recognizer.prompt[0] and labels[0, -1] == 256
        )  # start and end of text
        labels = labels[:, 1:]  # transformers puts the start in front of them
        labels[0, 0] = -100  # "no timestamps" is given, not guessed
        given = torch.tensor([[*recognizer.prompt, *recognizer.encode(text)[:-1]]])
        loss = recognizer.model(**features, decoder_input_ids=given, labels=labels).loss
        assert (nll / tokens, tokens) == (pytest.approx(float(loss), rel=1e-5), len(labels[0]) - 1)


def test_whisper_takes_shouted_transcripts_in_lower_case(whisper_folder):
    recognizer = WhisperRecognizer(str(whisper_folder))
    assert recognizer.encode("IT'S  TWO") == recognizer.encode("it's two")
    assert recognizer.encode("It's two") != recognizer.encode("it's two")
    decoded = recognizer.tokenizer.decode(recognizer.encode("IT'S TWO"))
    assert decoded == " it's two<|endoftext|>"
    assert recognizer.encode(" ") == [recognizer.tokenizer.eos_token_id]


def test_whisper_gives_no_likelihood_over_thirty_seconds_or_its_positions(whisper_folder, waves):
    recognizer = WhisperRecognizer(str(whisper_folder))
    wavs = waves.data[:1].repeat(1, 30)[:, : 31 * 16000]
    limit = recognizer.model.config.max_target_positions
    text = "a" * (limit - 2 - 1)  # two of the prompt, a blank; the end of text is not put in
    half = Waveforms.of(wavs[:, : wavs.shape[1] // 2])
    assert recognizer.nll(Waveforms.of(wavs), ["a"]) == [(None, 3)]
    (most,), (over,) = (recognizer.nll(half, [t]) for t in (text, text + "a"))
    assert most[0] > 0 and over == (None, limit)


def test_ctc_likelihood_is_that_of_all_paths(ctc_folder, waves):
    """Against the forward algorithm of Graves et al. (2006), written plainly in float64."""
    recognizer = CTCRecognizer(ctc_folder)
    texts = ["ONE TWO", "SEE ALL", "", "A"]
    for wav, text in zip(waves.items(), texts):
        log_probs = recognizer._log_probs(Waveforms.collate([wav]))[1][0].double()
        target = [0]
        for index in recognizer.tokenizer.encode(text):
            target += [index, 0]
        paths = log_probs.new_full((len(target),), -torch.inf)
        paths[:2] = log_probs[0, target[:2]]
        for frame in log_probs[1:]:
            before = paths.clone()
            for i, token in enumerate(target):
                ways = [before[j] for j in (i, i - 1) if j >= 0]
                if i > 1 and token not in (0, target[i - 2]):
                    ways.append(before[i - 2])
                paths[i] = torch.logsumexp(torch.stack(ways), 0) + frame[token]
        expected = -float(torch.logsumexp(paths[-2:], 0))
        found = recognizer.nll(Waveforms.collate([wav]), [text])
        assert found == [(pytest.approx(expected, rel=1e-5), len(text))]


def test_ctc_gives_no_likelihood_where_it_cannot_spell(ctc_folder, waves):
    recognizer = CTCRecognizer(ctc_folder)
    texts = ["TWO", "2", "TWO " * 100, "TWO"]
    found = recognizer.nll(waves, texts)
    assert found[1:3] == [(None, 0), (None, 399)]
    assert found[0][0] == pytest.approx(recognizer.nll(waves, ["TWO"] * 4)[0][0], rel=1e-6)


def test_text_and_likelihood_of_the_same_waveforms_are_encoded_once(recognizer, waves):
    name = "_features" if isinstance(recognizer, WhisperRecognizer) else "encoder"
    part, calls = getattr(recognizer, name), []
    if name == "_features":
        recognizer._features = lambda *args: calls.append(args) or part(*args)
    else:
        hear = part.hidden_states
        part.hidden_states = lambda *args: calls.append(args) or hear(*args)
    wavs, same = (Waveforms.collate(waves.items()) for _ in range(2))
    texts, found = recognizer(wavs), likelihoods(recognizer, wavs, ["TWO", "TWO", "A", "A"])
    assert len(calls) == 1
    again = likelihoods(recognizer, same, ["TWO", "TWO", "A", "A"])  # other objects, equal or not
    other = Waveforms.collate(waves.items()[::-1])
    assert recognizer(other) == texts[::-1] and recognizer(same) == texts
    assert len(calls) == 4 and again == found
    kept = weakref.ref(same)
    del same
    assert kept() is None  # and nothing is kept of it
    assert recognizer(Waveforms.collate(waves.items())) == texts


def test_likelihoods_are_fields_of_lines_where_there_are_any(recognizer, waves):
    found = likelihoods(recognizer, waves, [None, "TWO", None, "FOUR"])
    assert [set(fields) for fields in found] == [set(), {"nll", "tokens"}, set(), {"nll", "tokens"}]
    (nll, tokens) = recognizer.nll(Waveforms.collate(waves.items()[1:2]), ["TWO"])[0]
    assert found[1] == {"nll": pytest.approx(nll, rel=1e-5), "tokens": tokens}
    assert likelihoods(recognizer, waves, [None] * 4) == [{}] * 4
    assert not gives_likelihood(Parrot())
    assert likelihoods(Parrot(), waves, TEXTS) == [{}] * 4


# Sources that cannot be loaded.


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: [p.unlink() for p in f.iterdir()], "neither asr.yaml .* nor config.json"),
        (lambda f: (f / "asr.safetensors").unlink(), "asr.safetensors is missing"),
        (lambda f: (f / "asr.safetensors").write_bytes(b"abc"), "damaged"),
        (lambda f: (f / "asr.yaml").write_text("name: x"), "must hold the keys"),
        (lambda f: _without(f / "asr.yaml", "characters"), "characters or phonemes"),
        (lambda f: (f / "asr.yaml").write_text("a: [1"), "cannot be read"),
        (lambda f: (f / "asr.yaml").write_text("!new:os.system {}"), "cannot be read"),
    ],
    ids=["gone", "empty", "no weights", "damaged", "keys", "no tokens", "no yaml", "tag"],
)
def test_broken_ctc_folders(ctc_folder, tmp_path, spoil, message):
    folder = tmp_path / "asr"
    shutil.copytree(ctc_folder, folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_recognizer(folder)
    assert str(folder) in str(error.value)


def _without(path, key):
    config = yaml.safe_load(path.read_text())
    del config[key]
    path.write_text(yaml.safe_dump(config))


def test_weights_of_another_shape_are_named(ctc_folder, tmp_path):
    folder = tmp_path / "asr"
    shutil.copytree(ctc_folder, folder)
    weights = load_file(folder / "asr.safetensors")
    weights["layer_weights"] = torch.zeros(9)
    save_file(weights, folder / "asr.safetensors")
    with pytest.raises(UserError, match="layer_weights"):
        load_recognizer(folder)


def test_a_replaced_encoder_is_noticed(ctc_folder, tiny_teacher, tmp_path):
    encoder, folder = tmp_path / "encoder", tmp_path / "asr"
    shutil.copytree(tiny_teacher, encoder)
    shutil.copytree(ctc_folder, folder)
    config = yaml.safe_load((folder / "asr.yaml").read_text())
    config["encoder"] = str(encoder)
    (folder / "asr.yaml").write_text(yaml.safe_dump(config))
    load_recognizer(folder)
    weights = load_file(encoder / "model.safetensors")
    name = max(weights)
    weights[name] = weights[name] + 0.01
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no longer holds"):
        load_recognizer(folder)


def test_models_that_write_no_text_are_named(tiny_teacher, whisper_folder, tmp_path):
    with pytest.raises(UserError, match=r"'hubert' model.*train_asr"):
        load_recognizer(tiny_teacher)
    folder = tmp_path / "whisper"
    shutil.copytree(whisper_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_recognizer(folder)
    # Offline (see conftest.py), a hub name that is in no cache:
    with pytest.raises(UserError, match=r"neither a folder here nor .* hub"):
        load_recognizer("nobody/no-such-whisper")


def test_a_shipped_encoder_is_named_relative_to_the_project(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(recognizers.ctc, "PROJECT_ROOT", Path(encoder.source).parent)
    tokenizer = CharacterTokenizer()
    save_recognizer(tmp_path, "x", encoder, CTCHead.for_encoder(encoder, tokenizer), tokenizer)
    config = yaml.safe_load((tmp_path / "asr.yaml").read_text())
    assert config["encoder"] == Path(encoder.source).name
    assert load_recognizer(tmp_path).encoder.source == encoder.source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["asr.safetensors", "asr.yaml"]


# Characters and head.


def test_the_example_of_a_recogniser_of_ones_own_loads_as_it_says(monkeypatch, waves):
    """With a stand-in for the engine, which no other test needs."""
    heard = SimpleNamespace(hypstr="read(2) me")
    calls = {name: lambda *_, **__: None for name in ("start_utt", "process_raw", "end_utt")}
    engine = SimpleNamespace(hyp=lambda: heard, **calls)
    package = SimpleNamespace(Decoder=lambda **_: engine)
    monkeypatch.setitem(sys.modules, "pocketsphinx", package)
    monkeypatch.syspath_prepend(PROJECT_ROOT / "examples")
    text = (PROJECT_ROOT / "examples" / "pocketsphinx_recognizer.py").read_text()
    value = re.search(r'--recognizers "(.+)"', text)[1]
    (recognizer,) = load_hyperpyyaml(f"recognizers: {value}")["recognizers"]
    assert recognizer(waves) == ["read me"] * len(waves)
    assert (recognizer.name, recognizer.unit) == ("pocketsphinx", "word")


def test_tokenizer():
    tokenizer = CharacterTokenizer()
    assert len(tokenizer) == 29
    assert tokenizer.decode(tokenizer.encode(" it's  Half-past,  nine. ")) == "IT'S HALF PAST NINE"
    assert 0 not in tokenizer.encode("A B")
    with pytest.raises(UserError, match=r"\['2', 'É'\]"):
        tokenizer.encode("2 éclairs")
    with pytest.raises(UserError, match="characters"):
        CharacterTokenizer("ABCA ")
    # one character per frame: blank, A, A (one A), blank, A, space, B, then padding
    best = torch.tensor([[0, 3, 3, 0, 3, 1, 4, 5, 5]])
    log_probs = torch.nn.functional.one_hot(best, 29).float()
    assert tokenizer.greedy(log_probs, torch.tensor([7])) == ["AA B"]


@pytest.mark.needs("gruut")
def test_phoneme_tokenizer():
    tokenizer = PhonemeTokenizer()
    assert len(tokenizer) == 41
    indices = tokenizer.encode("THE CAT")
    assert 0 not in indices and tokenizer.decode(indices) == "ð ə k æ t"
    assert PhonemeTokenizer(["k", "æ", "t"]).encode("cat") == [1, 2, 3]
    best = torch.tensor([[3, 3, 0, 3, 1, 0, 0, 2]])
    log_probs = torch.nn.functional.one_hot(best, 41).float()
    expected = " ".join(tokenizer.phonemes[i - 1] for i in (3, 3, 1))
    assert tokenizer.greedy(log_probs, torch.tensor([7])) == [expected]


def test_head_without_blstm_is_linear():
    torch.manual_seed(0)
    head = CTCHead(2, 8, 5, hidden=6, depth=0).eval()
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {
        "layer_weights", "projection", "output",
    }  # fmt: skip
    # frames do not see each other, but for the statistics of the utterance
    states, lengths = torch.randn(2, 1, 6, 8), torch.tensor([6])
    swapped = states[:, :, [0, 1, 3, 2, 4, 5]]
    torch.testing.assert_close(
        head(states, lengths)[:, 2:4].flip(1), head(swapped, lengths)[:, 2:4]
    )


@pytest.mark.parametrize("depth", [0, 2])
def test_head_sums_layers_by_weight_and_keeps_items_apart(depth):
    torch.manual_seed(0)
    head = CTCHead(3, 8, 5, hidden=6, depth=depth).eval()
    states = torch.randn(3, 2, 7, 8)
    lengths = torch.tensor([7, 4])
    both = head(states, lengths)
    assert both.shape == (2, 7, 5)
    torch.testing.assert_close(both.exp().sum(-1), torch.ones(2, 7))
    states[:, 1, 4:] = 1e6  # padding
    alone = head(states[:, 1:, :4], lengths[1:])
    torch.testing.assert_close(head(states, lengths)[1, :4], alone[0])
    torch.testing.assert_close(both[1, :4], alone[0])
    with torch.no_grad():
        head.layer_weights.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    changed = states.clone()
    changed[[0, 2]] = torch.randn(2, 2, 7, 8)
    torch.testing.assert_close(head(states, lengths), head(changed, lengths))
    # all layers equal: the weights do not matter, whatever the layers' scales
    same = states[:1] * torch.tensor([1.0, 5.0, 0.1])[:, None, None, None]
    one = CTCHead(1, 8, 5, hidden=6, depth=depth).eval()
    one.load_state_dict({**head.state_dict(), "layer_weights": torch.zeros(1)})
    torch.testing.assert_close(head(same, lengths), one(same[:1], lengths), atol=1e-3, rtol=1e-3)


# Data.


@pytest.fixture
def manifest(corpus):
    return prepare_speech(corpus, ["train"])


def test_encoded_speech_is_what_the_encoder_says_and_is_encoded_once(manifest, encoder):
    data = EncodedSpeech(manifest, encoder, CharacterTokenizer())
    item = data[3]
    wav = read_audio(manifest[item["id"]]["wav"])
    states, frames = encoder.hidden_states(wav[None], torch.tensor([len(wav)]))
    assert item["states"].shape == (int(frames), 3, 32) and item["states"].dtype == torch.float16
    torch.testing.assert_close(
        item["states"].float(), states[:, 0].transpose(0, 1), atol=2e-3, rtol=2e-3
    )
    assert data[3]["states"] is item["states"] and data[(3, 5)]["states"] is item["states"]
    assert CharacterTokenizer().decode(item["tokens"].tolist()) == item["text"]


def test_views_go_round_and_a_full_cache_changes_nothing(manifest, encoder, noises):
    mixer = NoiseMixer(prepare_noise(noises, "train"), [10])

    def data(cache_gb):
        return EncodedSpeech(
            manifest,
            encoder,
            CharacterTokenizer(),
            Augmentation([90, 100, 110], mixer, 1.0),
            views=3,
            seed=7,
            cache_gb=cache_gb,
        )

    kept, computed = data(1.0), data(1e-6)
    states = [kept[(2, data_pass)]["states"] for data_pass in range(6)]
    assert states[0] is states[3] and states[2] is states[5]
    assert len({(*s.shape, float(s.float().sum())) for s in states[:3]}) == 3
    again = [computed[(2, data_pass)]["states"] for data_pass in range(6)]
    assert not computed.cache
    for a, b in zip(states, again):
        assert torch.equal(a, b)


def test_augmentation_draws_for_itself(noises):
    wav = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
    augmentation = Augmentation([80, 125])
    lengths = {len(augmentation(wav, np.random.default_rng(i))) for i in range(20)}
    assert lengths == {20000, 12800}
    mixer = NoiseMixer(prepare_noise(noises, "train"), [5])
    always = Augmentation([100], mixer, 1.0)
    noise = always(wav, np.random.default_rng(0)) - wav
    assert 10 * torch.log10(wav.square().mean() / noise.square().mean()) == pytest.approx(
        5, abs=0.1
    )
    never = Augmentation([100], mixer, 0.0)
    assert torch.equal(never(wav, np.random.default_rng(0)), wav)


def test_what_cannot_be_trained_on_is_left_out_or_named(manifest, encoder, monkeypatch):
    first, second, third = list(manifest)[:3]
    changed = {key: dict(manifest[key]) for key in (first, second, third)}
    changed[first]["text"] = None
    changed[second]["text"] = "A" * 60  # with blanks 119 frames; 2.4 s at most have 119
    changed[second]["duration"] = 2.0
    train = EncodedSpeech(changed, encoder, CharacterTokenizer(), trainable=True)
    valid = EncodedSpeech(changed, encoder, CharacterTokenizer())
    assert [item[0] for item in train.items] == [third]
    assert [item[0] for item in valid.items] == [second, third]
    monkeypatch.setattr(encoder, "max_length", 16000)  # Whisper has 30 s
    with pytest.raises(UserError, match="transcript"):
        EncodedSpeech({third: changed[third]}, encoder, CharacterTokenizer(), trainable=True)
    with pytest.raises(UserError, match="transcript"):
        EncodedSpeech({first: changed[first]}, encoder, CharacterTokenizer())
    changed[third]["text"] = "ROOM 5"
    with pytest.raises(UserError, match=r"\.flac.*'5'"):
        EncodedSpeech(changed, encoder, CharacterTokenizer())


def test_noisy_sets_are_those_of_evaluation(corpus, noises):
    manifest = prepare_speech(corpus, ["test"])
    mixer = NoiseMixer(prepare_noise(noises, "test"), [0, 5])
    heard = []

    class Listener(Parrot):
        def __call__(self, wavs):
            heard.extend(wavs.items())
            return ["ONE"] * len(wavs)

    recognizer = Listener()
    records = transcribe_set(recognizer, manifest, mixer, snr=5, seed=3, batch_size=4)
    pairs = load_pairs(corpus, ["test"], "test", noises, snrs=[0, 5], seed=3, each_snr=True)
    expected = [pair for pair in map(pairs.__getitem__, range(len(pairs))) if pair["snr"] == 5]
    assert len(records) == len(heard) == len(expected) == 6
    for record, wav, pair in zip(records, heard, expected):
        assert pair["id"] == record["id"] + "@5dB"
        assert torch.equal(wav, pair["noisy"])
        assert record["noise_class"] == pair["noise_class"]
        assert record["reference"] == pair["text"] and record["hypothesis"] == "ONE"
    clean = transcribe_set(recognizer, manifest)
    assert all(record["snr"] is None for record in clean)


# Training, as a user runs it.


@pytest.fixture
def train(corpus, noises, tiny_teacher, tmp_path):
    def run(results="results", experiment="asr_ctc", **changes):
        settings = {
            "data_folder": corpus,
            "noise_folder": noises,
            "encoder_source": tiny_teacher,
            "results_folder": tmp_path / results,
            "updates": 4,
            "valid_every": 2,
            "batch_size": 4,
            "warmup_updates": 0,
            "hidden": 16,
            "test_snrs": [0],
            **changes,
        }
        arguments = [str(ROOT / "hparams" / f"{experiment}.yaml"), "--noprogressbar"]
        for key, value in settings.items():
            arguments += [f"--{key}", str(value)]
        recipe("train_asr")(arguments)
        return tmp_path / results / experiment / "1234"

    return run


def validations(run):
    return [json.loads(line) for line in (run / "valid.jsonl").read_text().splitlines()]


@pytest.fixture
def tones(tmp_path):
    """A corpus whose words are tones: even a random encoder tells them apart."""
    rng = np.random.default_rng(5)
    for split, count in (("train", 16), ("dev", 8), ("test", 8)):
        lines = []
        for i in range(count):
            word, pitch = list(zip("ABCD", (300, 800, 2000, 5000)))[i % 4]
            time = np.arange(rng.integers(5000, 9000)) / 16000
            wav = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(len(time))
            write_audio(tmp_path / "tones" / split / "1" / "1" / f"1-1-{i:04d}.wav", wav)
            lines.append(f"1-1-{i:04d} {word}\n")
        (tmp_path / "tones" / split / "1" / "1" / "1-1.trans.txt").write_text("".join(lines))
    return tmp_path / "tones"


def test_training_learns_to_spell_what_it_has_not_seen(train, tones):
    run = train(
        data_folder=tones, updates=200, valid_every=100, batch_size=8, lr=0.02, weight_decay=0.0,
        warmup_updates=10, hidden=24, depth=1, dropout=0.0, views=1, speeds=[100],
        noise_probability=0.0,
    )  # fmt: skip
    lines = validations(run)
    assert [line["update"] for line in lines] == [100, 200]
    # Less than what guessing one of four letters costs: it has learnt to tell the tones apart.
    assert lines[-1]["loss"] < 0.95 * np.log(4)
    records = [json.loads(line) for line in (run / "test.jsonl").read_text().splitlines()]
    assert [record["snr"] for record in records] == [None] * 8 + [0] * 8
    assert all(record["reference"] in "ABCD" for record in records)


def test_fewer_utterances_of_dev_and_test(train, tones, monkeypatch):
    held = []
    fit = RecognitionBrain.fit

    def spy(self, epochs, train_set, valid_set, **options):
        held.append(len(valid_set))
        return fit(self, epochs, train_set, valid_set, **options)

    monkeypatch.setattr(RecognitionBrain, "fit", spy)
    run = train(data_folder=tones, updates=2, valid_utterances=5, test_utterances=3)
    assert held == [5]
    assert len((run / "test.jsonl").read_text().splitlines()) == 3 * 2  # clean and at 0 dB


@pytest.mark.needs("gruut")
def test_phoneme_training_is_scored_in_phonemes(train, tones, capsys):
    run = train(
        experiment="pr_ctc", data_folder=tones, updates=60, valid_every=20, batch_size=8, lr=0.02,
        views=1, speeds=[100], noise_probability=0.0,
    )  # fmt: skip
    lines = validations(run)
    assert all("per" in line and "wer" not in line for line in lines)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert "PER on 8 test utterances, clean" in capsys.readouterr().out
    records = [json.loads(line) for line in (run / "test.jsonl").read_text().splitlines()]
    assert {r["reference"] for r in records} == {"ə", "b i", "s i", "d i"}  # A, B, C, D
    assert {r["unit"] for r in records} == {"phoneme"}
    best = min(line["per"] for line in lines)
    recognizer = load_recognizer(run)
    again = transcribe_set(recognizer, prepare_speech(tones, ["dev"]), batch_size=3)
    assert metrics.wer(again) == pytest.approx(best)


def test_a_killed_run_resumes_as_if_nothing_had_happened(train, monkeypatch):
    whole = train("whole", updates=6)
    step, made = RecognitionBrain.fit_batch, []

    def killed(self, batch):
        made.append(batch.id)
        if len(made) == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(RecognitionBrain, "fit_batch", killed)
    with pytest.raises(SystemExit):
        train("killed", updates=6)
    monkeypatch.setattr(RecognitionBrain, "fit_batch", step)
    resumed = train("killed", updates=6)
    for a, b in zip(validations(whole), validations(resumed), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    a, b = load_file(whole / "asr.safetensors"), load_file(resumed / "asr.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "test.jsonl").read_text() == (resumed / "test.jsonl").read_text()


def test_corpus_without_transcripts_or_noise(train, corpus, tmp_path, capsys):
    run = train(noise_folder="null", updates=2)
    assert all(json.loads(x)["snr"] is None for x in (run / "test.jsonl").read_text().splitlines())
    silent = tmp_path / "untranscribed"
    shutil.copytree(corpus, silent)
    for path in (silent / "train").rglob("*.trans.txt"):
        path.unlink()
    with pytest.raises(SystemExit):
        train("other", data_folder=silent)
    assert "none of the utterances has a transcript" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("other", updates=3)
    assert "multiple of valid_every" in capsys.readouterr().err


def test_log_mel_frames_do_not_depend_on_padding():
    encoder = LogMel()
    wavs = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9000, 5200])
    states, frames = encoder.hidden_states(wavs, lengths)
    assert states.shape == (1, 2, int(frames.max()), encoder.dim)
    assert torch.equal(frames, encoder.frames(lengths))
    alone, count = encoder.hidden_states(wavs[1:, :5200])
    assert count[0] == frames[1]
    assert torch.allclose(alone[0, 0], states[0, 1, : frames[1]], atol=1e-5)
    assert encoder.frames(torch.tensor([0, encoder.receptive_field])).tolist() == [0, 1]
