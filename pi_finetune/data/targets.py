"""Frame targets of masked-prediction pre-training: k-means clusters of speech features.

HuBERT (Hsu et al., 2021) clusters MFCC at first, and a layer of an earlier model afterwards. Here
that model can be any :class:`~pi_finetune.teacher.Teacher`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy.cluster.vq import kmeans2
from torch.utils.data import Dataset
from tqdm import tqdm

from pi_finetune.data.audio import SAMPLE_RATE, read_audio
from pi_finetune.errors import UserError
from pi_finetune.files import replacing
from pi_finetune.lengths import Waveforms
from pi_finetune.seeding import utterance_rng
from pi_finetune.teacher import Teacher

if TYPE_CHECKING:
    from pi_finetune.data.mixing import Interference

__all__ = [
    "HOP",
    "MFCCFeatures",
    "MaskedSpeech",
    "TeacherFeatures",
    "draw_mask",
    "make_targets",
    "num_frames",
]


# Geometry of the convolutional front end that all targets are aligned with: frame k sees the
# samples from k * HOP on, FIELD of them.
HOP = 320
FIELD = 400


def num_frames(samples: int) -> int:
    """Frames of an utterance of so many samples."""
    return max(0, (samples - FIELD) // HOP + 1)


class MFCCFeatures:
    """13 MFCC and their first and second differences, 39 values a frame (HuBERT, iteration 1)."""

    window = None

    def __init__(self):
        self.mfcc = torchaudio.transforms.MFCC(
            SAMPLE_RATE,
            n_mfcc=13,
            melkwargs={"n_fft": FIELD, "hop_length": HOP, "n_mels": 40, "center": False},
        )

    def __call__(self, wavs: Sequence[torch.Tensor], frames: Sequence[int]) -> list[torch.Tensor]:
        """List of [T] waveforms to list of [frames[i], 39] features."""
        features = []
        for wav in wavs:
            static = self.mfcc(wav)
            delta = torchaudio.functional.compute_deltas(static)
            both = torchaudio.functional.compute_deltas(delta)
            features.append(torch.cat([static, delta, both]).T)
        return features


class TeacherFeatures:
    """A layer of a teacher, at the frames of the convolutional front end."""

    window = 500  # frames, 10 s: what a Whisper encoder takes, and little attention to pay for

    def __init__(self, source: str, layers: int | Sequence[int]):
        self.teacher = Teacher(source, layers)
        if self.teacher.hop != HOP:
            raise UserError(f"targets_source '{source}' has hop {self.teacher.hop}, not {HOP}")
        # Whisper's frame k is centred at k * hop: start where the first frame here is centred.
        self.shift = FIELD // 2 if self.teacher.family == "whisper" else 0

    @torch.no_grad()
    def __call__(self, wavs: Sequence[torch.Tensor], frames: Sequence[int]) -> list[torch.Tensor]:
        """List of [T] waveforms to list of [frames[i], D] features."""
        wavs = [wav[self.shift :] for wav in wavs]
        needed = [max(self.teacher.receptive_field, n * HOP + FIELD - HOP) for n in frames]
        wavs = [F.pad(wav, (0, max(0, n - len(wav)))) for wav, n in zip(wavs, needed)]
        reps, _ = self.teacher(Waveforms.collate(wavs))
        return [item[:n] for item, n in zip(reps, frames)]


def make_targets(
    train: dict,
    valid: dict,
    source: str,
    layers: int | list[int] = -1,
    clusters: int = 100,
    path: str | Path | None = None,
    seed: int = 0,
    sample: int = 100_000,
    batch_size: int = 8,
) -> dict:
    """Cluster the frames of two manifests; clusters are fitted on the first.

    From every feature vector the mean of all vectors at the same frame index is taken first, then
    dimensions are scaled to unit variance. A Whisper encoder writes the absolute position into its
    output, and clusters would otherwise be places in the window instead of sounds; centring does
    no harm to features without that.

    Arguments
    ---------
    train, valid : dict
        Manifests.
    source : str
        ``mfcc``, or the source of a :class:`~pi_finetune.teacher.Teacher`.
    layers : int or list of int
        Layer of that teacher.
    clusters : int
        Their number.
    path : str or Path, optional
        File that keeps the targets; read instead of computing if it was made with the same
        arguments.
    seed : int
        Of the k-means initialisation and of the sample it is fitted on.
    sample : int
        Frames the clusters are fitted on.
    batch_size : int
        Windows the teacher takes at a time.

    Returns
    -------
    dict
        ``{id: int16 tensor [frames]}`` of both manifests.
    """
    made_from: list = [source, layers, clusters, seed, sample]
    made_from += [
        sorted((k, round(v["duration"], 3)) for k, v in m.items()) for m in (train, valid)
    ]
    if path is not None and Path(path).is_file():
        kept = torch.load(path)
        if kept["made_from"] == made_from:
            return kept["targets"]

    extract = MFCCFeatures() if source == "mfcc" else TeacherFeatures(source, layers)
    both = {**valid, **train}
    folder = None if path is None else Path(path).parent
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        features, index, spans = _all_features(both, extract, batch_size, Path(scratch))
        fitted = np.zeros(len(features), dtype=bool)
        for key in train:
            fitted[slice(*spans[key])] = True
        labels = _cluster(features, index, fitted, clusters, sample, seed)
        del features
    targets = {key: torch.from_numpy(labels[start:stop]) for key, (start, stop) in spans.items()}
    if path is not None:
        with replacing(path) as temporary:
            torch.save({"made_from": made_from, "targets": targets}, temporary)
    return targets


def _all_features(manifest, extract, batch_size, scratch):
    """Features of all frames on disk [N, D], frame index in its window [N], span of each id."""
    spans, index, queue, total = {}, [], [], 0
    for key, entry in manifest.items():
        frames = num_frames(round(entry["duration"] * SAMPLE_RATE))
        if frames < 1:
            raise UserError(f"{entry['wav']}: shorter than {FIELD} samples. Remove the file.")
        spans[key] = (total, total + frames)
        # Windows of about equal size, so that none is a short rest.
        windows = 1 if extract.window is None else -(-frames // extract.window)
        for edges in np.array_split(np.arange(frames), windows):
            queue.append((entry["wav"], int(edges[0]), len(edges), total + int(edges[0])))
            index.append(np.arange(len(edges)))
        total += frames
    features = None
    for first in tqdm(range(0, len(queue), batch_size), desc="target features", mininterval=5):
        windows = queue[first : first + batch_size]
        wavs = [read_audio(w, f * HOP, (n - 1) * HOP + FIELD) for w, f, n, _ in windows]
        reps = extract(wavs, [n for _, _, n, _ in windows])
        if features is None:
            shape = (total, reps[0].shape[1])
            features = np.memmap(scratch / "features", np.float16, "w+", shape=shape)
        for item, (_, _, n, row) in zip(reps, windows):
            features[row : row + n] = item.numpy()
    return features, np.concatenate(index), spans


def _cluster(features, index, fitted, clusters, sample, seed):
    """Labels [N] int16 of ``features`` [N, D]; ``fitted`` marks the frames clusters come from."""
    rows = np.flatnonzero(fitted)
    if len(rows) < clusters:
        raise UserError(f"clusters: {clusters} is more than the {len(rows)} frames of the corpus.")
    rng = np.random.default_rng(seed)
    chunks = np.array_split(np.arange(len(features)), max(1, len(features) // 20_000))

    sums = np.zeros((index.max() + 1, features.shape[1]))
    for chunk in chunks:
        chunk = chunk[fitted[chunk]]
        np.add.at(sums, index[chunk], features[chunk].astype(np.float32))
    counts = np.bincount(index[rows], minlength=len(sums))
    # Where few windows are that long, take the last index that many reach.
    reached = np.flatnonzero(counts >= min(50, counts.max()))[-1]
    means = sums[: reached + 1] / np.maximum(counts[: reached + 1], 1)[:, None]
    index = np.minimum(index, reached)

    chosen = np.sort(rng.permutation(rows)[:sample])
    data = features[chosen].astype(np.float32) - means[index[chosen]].astype(np.float32)
    scale = np.maximum(data.std(0), 1e-5)
    data /= scale
    start = rng.choice(len(data), min(len(data), 50 * clusters), replace=False)
    # k-means++ is quadratic in the clusters: start from a small sample.
    centroids, _ = kmeans2(data[start], clusters, iter=5, minit="++", missing="warn", rng=rng)
    centroids, _ = kmeans2(data, centroids, iter=25, minit="matrix", missing="warn")

    centroids = torch.from_numpy(centroids)
    labels = np.empty(len(features), dtype=np.int16)
    for chunk in chunks:
        frames = (features[chunk].astype(np.float32) - means[index[chunk]]) / scale
        distances = torch.cdist(torch.from_numpy(frames).float(), centroids)
        labels[chunk] = distances.argmin(1).numpy().astype(np.int16)
    return labels


def draw_mask(frames: int, probability: float, span: int, rng: np.random.Generator) -> torch.Tensor:
    """Mask [frames] of random spans, True where the input is hidden (wav2vec 2.0, HuBERT).

    Arguments
    ---------
    frames : int
        Length.
    probability : float
        Share that would be hidden if spans did not overlap; 0.65 hides about half.
    span : int
        Frames per span.
    rng : numpy.random.Generator
        Of this utterance.
    """
    span = min(span, frames)
    places = frames - span + 1
    count = max(1, int(probability * frames / span + rng.random()))
    starts = rng.choice(places, min(count, places), replace=False)
    mask = np.zeros(frames, dtype=bool)
    mask[(starts[:, None] + np.arange(span)).ravel()] = True
    return torch.from_numpy(mask)


class MaskedSpeech(Dataset):
    """Crops of speech with their frame targets and masks.

    Addressed like :class:`~pi_finetune.data.loading.SpeechPairs`: by an index (always the same
    crop and mask) or by ``(index, data_pass)``.

    Arguments
    ---------
    manifest : dict
        From :func:`pi_finetune.data.corpora.prepare_speech`.
    targets : dict
        From :func:`make_targets`.
    segment_seconds : float
        Longest crop; shorter utterances are taken whole.
    mask_probability, mask_span
        See :func:`draw_mask`.
    seed : int
        Of crops, masks and interference.
    interference : pi_finetune.data.mixing.Interference, optional
        Disturbs the waveform; targets, crops and masks stay. Default: none.
    """

    def __init__(
        self,
        manifest: dict,
        targets: dict,
        segment_seconds: float,
        mask_probability: float,
        mask_span: int,
        seed: int,
        interference: "Interference | None" = None,
    ):
        self.manifest = manifest
        self.targets = targets
        self.keys = list(manifest)
        self.segment = num_frames(int(segment_seconds * SAMPLE_RATE))
        self.mask = (mask_probability, mask_span)
        self.seed = seed
        self.interference = interference

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, address):
        index, data_pass = address if isinstance(address, tuple) else (address, 0)
        key = self.keys[index]
        rng = utterance_rng(self.seed, data_pass, key, "pretraining")
        targets = self.targets[key].long()
        frames = min(len(targets), self.segment)
        start = int(rng.integers(len(targets) - frames + 1))
        entry = self.manifest[key]
        wav = read_audio(entry["wav"], start * HOP, (frames - 1) * HOP + FIELD)
        if self.interference is not None:
            draws = utterance_rng(self.seed, data_pass, key, "interference")
            wav = self.interference(wav, entry["speaker"], draws)
        return {
            "id": key,
            "wav": wav,
            "targets": targets[start : start + frames],
            "mask": draw_mask(frames, *self.mask, rng),
        }
