"""What models find alike in clean and enhanced speech, against plain formulas."""

import numpy as np
import pytest
import torch
from running import Parrot
from synthetic import voice

from pi_finetune.errors import UserError
from pi_finetune.lengths import Waveforms
from pi_finetune.phonemes import phonemes
from pi_finetune.results import similarity
from pi_finetune.teacher import Teacher

RATE = 16000
ECAPA = """
pretrained_path: some/hub
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 8
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 8
    channels: [8, 8, 8, 8, 24]
    attention_channels: 4
    res2net_scale: 2
    se_channels: 4
    lin_neurons: 6
classifier: !new:torch.nn.Identity
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
"""


@pytest.fixture(scope="module")
def batch():
    """Clean and enhanced speech of unequal lengths, the last utterance silent when enhanced."""
    rng = np.random.default_rng(0)
    clean = [torch.tensor(voice(n, 120, rng), dtype=torch.float32) for n in (1.0, 0.7, 0.8)]
    enhanced = [wav + 0.02 * torch.randn(len(wav)) for wav in clean]
    enhanced[2] = torch.zeros_like(clean[2])
    return Waveforms.collate(clean), Waveforms.collate(enhanced), ["a", "b", "c"]


def test_speech_bert_score_is_the_plain_one(batch, tiny_teacher):
    clean, enhanced, ids = batch
    teacher = Teacher(str(tiny_teacher))
    measure = similarity.load_measures(["speech_bert_score"], teacher=lambda: teacher)
    scores = measure["speech_bert_score"](clean, enhanced, ids, {})
    assert scores[2] is None
    for i in range(2):
        (v_reference,), _ = teacher(clean.items()[i][None])
        (v_generated,), _ = teacher(enhanced.items()[i][None])
        # as the authors' bert_score: a matrix of cosines, the mean of the rows' maxima
        norms = v_generated.norm(dim=1, keepdim=True) * v_reference.norm(dim=1)[None]
        cosines = v_generated @ v_reference.T / norms
        assert scores[i] == pytest.approx(float(cosines.max(1)[0].mean()), abs=1e-5)
    same = measure["speech_bert_score"](clean, clean, ids, {})
    assert same == pytest.approx([1, 1, 1], abs=1e-6)
    # precision: every frame of a part is in the whole, but not the other way round
    part = torch.eye(4)[:2]
    assert similarity.bert_score(torch.eye(4), part) == pytest.approx(1)
    assert similarity.bert_score(part, torch.eye(4)) == pytest.approx(0.5)


class Phones(Parrot):
    unit = "phoneme"


@pytest.mark.needs("gruut")
def test_phoneme_similarity_is_one_less_edits_over_phonemes(batch):
    clean, enhanced, ids = batch
    recognizer, calls = Parrot(), []

    class Counted(Parrot):
        def __call__(self, wavs):
            calls.append(len(wavs))
            return super().__call__(wavs)

    measure = similarity.PhonemeSimilarity(Counted())
    heard = {"parrot": ["one two", "three", ""]}
    scores = measure(clean, enhanced, ids, heard)
    assert calls == [2] and scores[2] is None
    from rapidfuzz.distance.Levenshtein import distance

    for i, said in enumerate(recognizer(clean)[:2]):
        reference, found = phonemes(said), phonemes(heard["parrot"][i])
        assert scores[i] == pytest.approx(1 - distance(found, reference) / len(reference))
    measure(clean, enhanced, ids, heard)
    assert calls == [2]  # what was heard in the clean speech is known
    chosen = similarity.load_measures(["phoneme_similarity"], recognizers=[Parrot(), Phones()])
    assert isinstance(chosen["phoneme_similarity"].recognizer, Phones)
    assert chosen["phoneme_similarity"](clean, clean, ids, {}) == [1, 1, 1]


def test_speaker_similarity_is_the_cosine_of_embeddings(batch, tmp_path):
    from hyperpyyaml import load_hyperpyyaml

    clean, enhanced, ids = batch
    (tmp_path / "hyperparams.yaml").write_text(ECAPA)
    torch.manual_seed(1)
    model = load_hyperpyyaml(ECAPA)["embedding_model"].eval()
    torch.save(model.state_dict(), tmp_path / "embedding_model.ckpt")
    with pytest.raises(UserError, match="Add --trust"):
        similarity.load_measures(["speaker_similarity"], speaker_source=tmp_path)
    with pytest.raises(UserError, match="cannot load"):
        similarity.SpeakerSimilarity(tmp_path / "nowhere", trust=True)
    measure = similarity.SpeakerSimilarity(tmp_path, trust=True)
    found = measure.model.mods.embedding_model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    scores = measure(clean, enhanced, ids, {})
    one, other = (measure.model.encode_batch(w.items()[1][None]).flatten() for w in batch[:2])
    assert scores[1] == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-5)
    assert scores[2] is None
    assert measure(clean, clean, ids, {}) == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_missing_model_says_what_to_set():
    for name, key in (
        ("speech_bert_score", "teacher_source"),
        ("phoneme_similarity", "asr_source"),
        ("speaker_similarity", "speaker_source"),
    ):
        with pytest.raises(UserError, match=f"{name} needs .* {key}"):
            similarity.load_measures([name])
