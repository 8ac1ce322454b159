"""How much of an objective on representations is position instead of content.

Five diagnostics of a teacher, each for every layer at once:

1. :func:`shift_curve`: what moving the same content costs.
2. :func:`content_free_similarity`: how similar frames of different utterances are at equal
   positions, compared with unequal ones.
3. :func:`position_probe`: how well a linear map reads the position from a frame.
4. :func:`objective_share`: which share of what an objective can win is position.
5. :class:`MismatchedTargets`: training without content, to see what an objective wins all the same.

The first four work on crops of equal length, cut at random places of utterances, so that what is
usual at the beginning of an utterance (silence) is not mistaken for position. "Moved by k" means
preceded by k hops of zeros, of which the teacher hears all and the comparison sees none: the frame
grid stays, so frame n of the content has the same samples and another position.

A *teacher* here is anything with ``hidden_states``, ``frames``, ``hop`` and ``num_layers`` as
:class:`pi_finetune.teacher.Teacher` has them. Results are lists of flat dicts, ready to be JSON
lines; times are in seconds, and NaN is None.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from speechbrain.dataio.batch import PaddedBatch

from pi_finetune.config import PROJECT_ROOT, load_hparams
from pi_finetune.data.audio import SAMPLE_RATE, is_silent, read_audio
from pi_finetune.data.corpora import prepare_speech
from pi_finetune.data.loading import choose, sample_lengths
from pi_finetune.errors import UserError
from pi_finetune.files import json_number
from pi_finetune.objectives import RepresentationObjective
from pi_finetune.perturbations import NoPerturbation, Perturbed
from pi_finetune.report.statistics import Interval
from pi_finetune.seeding import perturbation_rngs, utterance_rng

#: Fewer utterances leave too little for the probe's folds or for a bootstrap over pairs.
MIN_UTTERANCES = 12
#: Moves of the shift curve, in seconds.
SHIFTS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
_FOLDS = 5
#: Ridge penalties tried, relative to the mean squared (standardised) feature.
_PENALTIES = np.logspace(-6, 2, 17)


class Crops(NamedTuple):
    """Equally long pieces of different utterances."""

    ids: list
    #: [U, T], 16 kHz.
    wavs: torch.Tensor


def load_crops(data_folder, splits, seconds, count=None, seed=0, needed=MIN_UTTERANCES):
    """Cut one piece out of each utterance, at a random place.

    Arguments
    ---------
    data_folder, splits
        As for :func:`pi_finetune.data.corpora.prepare_speech`.
    seconds : float
        Length of the pieces; shorter utterances are left out.
    count : int, optional
        Utterances, spread over speakers. Default: all.
    seed : int
        Draws the places.
    needed : int
        The least number of utterances.

    Returns
    -------
    Crops

    Raises
    ------
    UserError
        There are too few utterances of that length, or one is silent.
    """
    manifest = prepare_speech(data_folder, splits)
    samples = round(seconds * SAMPLE_RATE)
    enough = {k: v for k, v in manifest.items() if _samples(v) >= samples}
    available = len(enough) if count is None else min(count, len(enough))
    if available < needed:
        raise UserError(
            f"{data_folder}: {available} utterances of at least {seconds:g} s are to be used "
            f"(splits {splits}; {len(manifest)} of any length), needed are {needed}. Lower "
            "segment_seconds, or raise utterances, or name more splits."
        )
    chosen = choose(enough, count)
    wavs = [
        _crop(entry, samples, utterance_rng(seed, 0, key, "crop")) for key, entry in chosen.items()
    ]
    return Crops(list(chosen), torch.stack(wavs))


def _samples(entry):
    return round(entry["duration"] * SAMPLE_RATE)


def _crop(entry, samples, rng):
    for _ in range(20):
        start = int(rng.integers(_samples(entry) - samples + 1))
        wav = read_audio(entry["wav"], start, samples)
        if not is_silent(wav):
            return wav
    raise UserError(f"{entry['wav']}: silent in 20 draws. Remove or replace it.")


def chosen_layers(teacher, layers=None):
    """Layer numbers from 0, all by default; a UserError if the teacher has no such layer."""
    count = teacher.num_layers
    if layers is None:
        return list(range(count + 1))
    layers = [layers] if isinstance(layers, int) else list(layers)
    for layer in layers:
        if not isinstance(layer, int) or not -count - 1 <= layer <= count:
            raise UserError(
                f"layers: the teacher has {count} layers, asked for layer {layer}. Choose 0 (input "
                f"of the first) to {count}, -1 to {-count - 1} from the end, or null for all."
            )
    return [layer % (count + 1) for layer in layers]


class AllLayers:
    """A teacher seen by :class:`RepresentationObjective` as having frames of [L, D], not of [D].

    With :class:`EachLayer` as its distance, an objective is evaluated on all layers in one pass.
    """

    def __init__(self, teacher, layers=None):
        self.teacher = teacher
        self.layers = chosen_layers(teacher, layers)
        self.hop, self.frames = teacher.hop, teacher.frames

    def __call__(self, wavs, lengths):
        states, frame_lengths = self.teacher.hidden_states(wavs, lengths)
        return states[self.layers].permute(1, 2, 0, 3), frame_lengths


class _Remembering:
    """Runs a teacher once on each input of a batch: objectives with one perturbation share it."""

    def __init__(self, teacher):
        self.teacher, self.seen = teacher, {}
        self.hop, self.frames = teacher.hop, teacher.frames

    def __call__(self, wavs, lengths):
        content = wavs.detach().contiguous().cpu().numpy().tobytes()
        key = (wavs.shape, tuple(lengths.tolist()), hashlib.sha1(content).digest())
        if key not in self.seen:
            self.seen[key] = self.teacher(wavs, lengths)
        return self.seen[key]


class EachLayer:
    """A distance applied to each layer of [B, N, L, D]; returns [B, L]."""

    def __init__(self, distance):
        self.distance = distance

    def __call__(self, x, x_lengths, y, y_lengths):
        layers = range(x.shape[2])
        return torch.stack(
            [self.distance(x[:, :, i], x_lengths, y[:, :, i], y_lengths) for i in layers], dim=1
        )


class Offset:
    """Moves content to later positions: zeros before whatever another perturbation made.

    Arguments
    ---------
    seconds : float
        How far; rounded to whole hops.
    perturbation : callable, optional
        Applied first. Default: none.
    hop : int
        The teacher's hop in samples; default 320.
    random : bool
        Draw the number of hops per utterance from 0 to ``seconds`` instead. It is drawn after the
        draws of ``perturbation``, which are therefore the same with and without offset.
    context : Tensor, optional
        [B, seconds] as samples, heard before the content instead of zeros; not with ``random``.
    """

    def __init__(self, seconds, perturbation=None, hop=320, random=False, context=None):
        if seconds < 0:
            raise ValueError(f"seconds: got {seconds}, needed is a number >= 0.")
        if random and context is not None:
            raise ValueError("context: has one length, so random must be False.")
        self.context = context
        self.hops = round(seconds * SAMPLE_RATE / hop)
        self.perturbation = perturbation or NoPerturbation()
        self.hop = hop
        self.random = random

    def __call__(self, wavs, lengths, rngs=None):
        inner = self.perturbation(wavs, lengths, rngs)
        if not self.random:
            before = self.hops * self.hop
            heard = inner.wavs.new_zeros(len(wavs), before)
            if self.context is not None:
                heard = self.context
            moved = torch.cat([heard, inner.wavs], dim=1)
        else:
            hops = [int(rng.integers(self.hops + 1)) for rng in rngs]
            before = torch.tensor(hops, device=inner.lengths.device) * self.hop
            rows = zip(inner.wavs, inner.lengths.tolist(), before.tolist())
            rows = [torch.nn.functional.pad(wav[:size], (start, 0)) for wav, size, start in rows]
            moved = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        start, lengths = inner.content_start + before, inner.lengths + before
        return Perturbed(moved, lengths, start, inner.content_lengths)


def _full_lengths(wavs):
    return torch.full((len(wavs),), wavs.shape[1], device=wavs.device)


@torch.no_grad()
def _states(teacher, wavs, batch_size, offset_seconds=0.0, layers=None):
    """Yield the content frames [B, N, L, D] of batches of equally long ``wavs`` [U, T]."""
    view = RepresentationObjective(AllLayers(teacher, layers), distance=None)
    offset = Offset(offset_seconds, hop=teacher.hop)
    for batch in wavs.split(batch_size):
        yield view.represent(batch, _full_lengths(batch), None, offset)[0]


# 1. The same content at other positions


def unrelated_distance(reps):
    """Mean squared difference between random frames of each utterance and of the others.

    The exact mean over all pairs of frames, from means and mean squares.

    Arguments
    ---------
    reps : Tensor
        [U, N, D], U >= 2.

    Returns
    -------
    Tensor
        [U] in float64: of utterance i to all j != i, mean over D.
    """
    reps = reps.double()
    others = len(reps) - 1
    square = reps.square().mean(dim=(1, 2))
    means = reps.mean(dim=1)
    cross = (means * (means.sum(0) - means)).mean(dim=1) / others
    return square + (square.sum() - square) / others - 2 * cross


def shift_curve(teacher, wavs, shifts=SHIFTS, layers=None, batch_size=8, seed=0):
    """How far moving an utterance moves its representation.

    The mean squared difference between T(y) and T(y after k hops of zeros) on the same content
    frames, over that between random frames of different utterances: 0 if position does not
    matter, 1 if the moved utterance is as far from itself as from any other.

    Arguments
    ---------
    teacher
        See the module's text.
    wavs : Tensor
        [U, T], from :func:`load_crops`.
    shifts : sequence of float
        Seconds; rounded to whole hops. Default: 0 to 2 s.
    layers : None, int or list of int
        Default: all.
    batch_size : int
        Utterances at once.
    seed : int
        Of the bootstrap over utterances.

    Returns
    -------
    list of dict
        ``layer, shift, distance, unrelated, ratio, low, high``.
    """
    names = chosen_layers(teacher, layers)
    base = list(_states(teacher, wavs, batch_size, layers=layers))
    whole = torch.cat(base)
    unrelated = np.stack([unrelated_distance(whole[:, :, i]).cpu() for i in range(len(names))])
    records = []
    for hops in sorted({round(shift * SAMPLE_RATE / teacher.hop) for shift in shifts}):
        shift = hops * teacher.hop / SAMPLE_RATE
        moved = _states(teacher, wavs, batch_size, shift, layers)
        distances = [
            (x.double() - y.double()).square().mean(dim=(1, 3)) for x, y in zip(base, moved)
        ]
        distances = torch.cat(distances).T.cpu().numpy()  # [L, U]
        for layer, distance, reference in zip(names, distances, unrelated):
            found = bootstrap_ratio(distance, reference, seed)
            records.append(
                {
                    "layer": layer,
                    "shift": round(shift, 4),
                    "distance": json_number(distance.mean()),
                    "unrelated": json_number(reference.mean()),
                    **_interval("ratio", found),
                }
            )
    return sorted(records, key=lambda record: (record["layer"], record["shift"]))


# 2. Different content at equal and unequal positions


def similarity_by_offset(reps):
    """Mean centred cosine similarity of frames of different utterances by difference of position.

    Frames are centred by the mean over all frames and utterances. The mean is over all pairs of
    different utterances and, for offset d, over frames n and n + d.

    Arguments
    ---------
    reps : Tensor
        [U, N, D], U >= 2.

    Returns
    -------
    (np.ndarray, np.ndarray)
        Similarity [N] at offsets of 0 to N - 1 frames, and the number of pairs of frames [N].
    """
    reps = reps.double()
    utterances, frames, _ = reps.shape
    unit = torch.nn.functional.normalize(reps - reps.mean(dim=(0, 1)), dim=-1)
    # All pairs, less those of an utterance with itself.
    total = unit.sum(0)
    gram = total @ total.T - torch.einsum("und,umd->nm", unit, unit)
    pairs = utterances * (utterances - 1)
    sums = np.array([float(gram.diagonal(d).sum()) for d in range(frames)])
    counts = pairs * (frames - np.arange(frames))
    return sums / counts, counts


def content_free_similarity(teacher, wavs, far_seconds=1.5, layers=None, batch_size=8):
    """The part of the similarity of unrelated frames that comes from equal positions.

    Arguments
    ---------
    teacher, wavs, layers, batch_size
        As for :func:`shift_curve`.
    far_seconds : float
        Offsets from this on count as unequal positions.

    Returns
    -------
    (list of dict, list of dict)
        ``layer, offset, similarity, frame_pairs``, and per layer ``layer, equal, far, difference``.
        ``far`` is the mean over all pairs of frames at least ``far_seconds`` apart, ``difference``
        is ``equal - far``: 0 without position, 1 for a code of it whose far values are unlike one
        another, and more where they are opposed, as those of slow sinusoids.
    """
    whole = torch.cat(list(_states(teacher, wavs, batch_size, layers=layers)))
    first_far = round(far_seconds * SAMPLE_RATE / teacher.hop)
    if not 0 < first_far < whole.shape[1]:
        raise UserError(
            f"far_seconds: {far_seconds:g} s are not within the crops, which have "
            f"{whole.shape[1]} frames. Choose segment_seconds longer than far_seconds."
        )
    curve, headline = [], []
    for i, layer in enumerate(chosen_layers(teacher, layers)):
        similarity, counts = similarity_by_offset(whole[:, :, i])
        for d, value in enumerate(similarity):
            offset = round(d * teacher.hop / SAMPLE_RATE, 4)
            values = {"similarity": json_number(value), "frame_pairs": int(counts[d])}
            curve.append({"layer": layer, "offset": offset, **values})
        far = np.average(similarity[first_far:], weights=counts[first_far:])
        values = {"equal": similarity[0], "far": far, "difference": similarity[0] - far}
        headline.append({"layer": layer, **{k: json_number(v) for k, v in values.items()}})
    return curve, headline


# 3. Position read from a frame


def ridge_probe(features, targets, groups, held_out=1 / 3, seed=0):
    """R^2 of a linear map on groups it has not seen.

    Ridge regression in closed form on features standardised over the training part. The penalty
    is chosen per target by 5-fold cross-validation over the groups of the training part, and R^2
    is taken from held-out groups, against their own mean; it is negative for a bad map.

    Arguments
    ---------
    features : array
        [F, D].
    targets : array
        [F, K].
    groups : array
        [F], the utterance of each frame; frames of an utterance stay together.
    held_out : float
        Share of the groups held out.
    seed : int
        Draws groups and folds.

    Returns
    -------
    (np.ndarray, np.ndarray)
        R^2 [K] and the penalties chosen [K].
    """
    x, y, groups = (
        np.asarray(features, np.float64),
        np.asarray(targets, np.float64),
        np.asarray(groups),
    )
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    testing = names[: round(held_out * len(names))]
    training = names[len(testing) :]
    if len(training) < _FOLDS or not len(testing):
        raise ValueError(f"{len(names)} groups are too few to hold some out of {_FOLDS} folds")
    errors = 0.0
    for fold in range(_FOLDS):
        out = np.isin(groups, training[fold::_FOLDS])
        fit = np.isin(groups, training) & ~out
        predictions = _ridge(x[fit], y[fit], x[out], _PENALTIES)
        errors = errors + np.square(predictions - y[out]).sum(axis=1)  # [penalties, K]
    best = errors.argmin(axis=0)
    fit, out = np.isin(groups, training), np.isin(groups, testing)
    predictions = _ridge(x[fit], y[fit], x[out], _PENALTIES)
    predictions = predictions[best, :, np.arange(y.shape[1])].T  # [F, K]
    spread = np.square(y[out] - y[out].mean(axis=0)).sum(axis=0)
    return 1 - np.square(predictions - y[out]).sum(axis=0) / spread, _PENALTIES[best]


def _ridge(x, y, new, penalties):
    """Predictions [P, F', K] for ``new`` [F', D]: one eigendecomposition for all penalties."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(
        scale > 1e-12 * np.abs(x).max(initial=1e-300), scale, np.inf
    )  # constant: unused
    x, new = (x - mean) / scale, (new - mean) / scale
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ (y - y.mean(axis=0)) / len(x))
    rotated = new @ vectors
    values = values.clip(min=0)
    return np.stack([rotated @ (projected / (values[:, None] + p)) for p in penalties]) + y.mean(0)


@torch.no_grad()
def position_probe(teacher, wavs, layers=None, batch_size=8, seed=0):
    """How much of a frame's place can be read from it linearly.

    Every crop is cut to a length drawn between half and all of it, so that the distance to the end
    is not the mirror image of the index. The shuffled baseline permutes the targets within each
    utterance: what it reaches comes from knowing the utterance's length, not the place in it.
    ``r2_of_other`` is what exact knowledge of the other target alone would reach linearly: a
    teacher that counts from the start knows the end as well as that.

    Arguments
    ---------
    teacher, wavs, layers, batch_size
        As for :func:`shift_curve`.
    seed : int
        Draws lengths, held-out utterances and permutations.

    Returns
    -------
    list of dict
        ``layer, target (index or to_end), r2, r2_shuffled, r2_of_other, penalty,
        train_utterances, held_out_utterances, frames``.
    """
    if len(wavs) < MIN_UTTERANCES:
        raise UserError(
            f"The position probe needs {MIN_UTTERANCES} utterances, got {len(wavs)}: raise "
            "utterances, lower segment_seconds, or name more splits."
        )
    view = AllLayers(teacher, layers)
    rng = np.random.default_rng(seed)
    total = wavs.shape[1]
    lengths = torch.from_numpy(rng.integers(total // 2, total + 1, len(wavs))).to(wavs.device)
    states, sizes = [], []
    for batch, batch_lengths in zip(wavs.split(batch_size), lengths.split(batch_size)):
        reps, frame_lengths = view(batch, batch_lengths)
        states += [frames[:n].cpu() for frames, n in zip(reps, frame_lengths.tolist())]
        sizes += frame_lengths.tolist()
    states = torch.cat(states)  # [F, L, D]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    index = np.concatenate([np.arange(n) for n in sizes])
    to_end = np.concatenate([np.arange(n)[::-1] for n in sizes])
    orders = [rng.permutation(n) for n in sizes]
    targets = np.stack(
        [
            index,
            to_end,
            np.concatenate(orders),
            np.concatenate([n - 1 - o for n, o in zip(sizes, orders)]),
        ],
        axis=1,
    )
    held_out = round(len(sizes) / 3)
    of_other = np.corrcoef(index, to_end)[0, 1] ** 2
    records = []
    for i, layer in enumerate(view.layers):
        r2, penalties = ridge_probe(states[:, i], targets, groups, seed=seed)
        for k, target in enumerate(("index", "to_end")):
            records.append(
                {
                    "layer": layer,
                    "target": target,
                    "r2": json_number(r2[k]),
                    "r2_shuffled": json_number(r2[k + 2]),
                    "r2_of_other": json_number(of_other),
                    "penalty": json_number(penalties[k]),
                    "train_utterances": len(sizes) - held_out,
                    "held_out_utterances": held_out,
                    "frames": len(index),
                }
            )
    return records


# 4. The share of an objective that is position


def representation_objective(objective):
    """The part of an objective that compares representations.

    Arguments
    ---------
    objective : torch.nn.Module
        A :class:`~pi_finetune.objectives.RepresentationObjective`, or a module that holds one with
        a weight, as :class:`~pi_finetune.objectives.WeightedSum` does.

    Returns
    -------
    RepresentationObjective
        None if there is none (a signal loss alone).
    """
    found = (m for m in objective.modules() if isinstance(m, RepresentationObjective))
    return next(found, None)


def strategy_file(name):
    """The YAML file of a strategy: ``hparams/NAME.yaml``, or a path that ends in ``.yaml``."""
    is_path = str(name).endswith(".yaml")
    path = Path(name).resolve() if is_path else PROJECT_ROOT / "hparams" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"objectives: {path} does not exist. Name a file of hparams/, or a path.")
    return path


#: Keys of a training file that cost time or write files, and are no part of its objective.
_NOT_THE_OBJECTIVE = (
    "__set_seed", "teacher", "enhancer", "recognizers", "modules", "__load_weights", "train_data",
    "valid_data", "checkpointer", "train_loggers",
)  # fmt: skip


def load_objective(name, teacher):
    """The representation objective a strategy's YAML file declares, with another teacher.

    Arguments
    ---------
    name : str
        As for :func:`strategy_file`.
    teacher : pi_finetune.teacher.Teacher

    Returns
    -------
    RepresentationObjective
    """
    path = strategy_file(name)
    hparams, _ = load_hparams(path, dict.fromkeys(_NOT_THE_OBJECTIVE))
    declared = representation_objective(hparams["objective"])
    if declared is None:
        raise UserError(f"objectives: {path} compares no representations, so leave it out.")
    return RepresentationObjective(
        teacher, declared.distance, declared.perturbation, declared.perturbed_branch
    )


@torch.no_grad()
def moved_values(
    objective, enhanced, clean, partners, ids, offset_seconds=1.5, seed=0, context=None
):
    """An objective against unrelated speech at unequal and equal positions, and against the right.

    The three are ``objective(enhanced_i, clean_j)`` with the clean branch moved by
    ``offset_seconds`` of zeros, the same unmoved, and ``objective(enhanced_i, clean_i)``. The
    objective's own perturbation is applied in all three with the same draws, and the zeros come
    before what it made: zero padding by p becomes an offset of p and of offset + p, speech at
    another speed is moved by the whole offset.

    Arguments
    ---------
    objective : RepresentationObjective
    enhanced, clean : Tensor
        [B, T] each, equally long.
    partners : Tensor
        [B], the unrelated j of each i.
    ids : list of str
        Of the rows of ``enhanced``; with ``seed`` they fix the perturbation's draws.
    offset_seconds, seed
        The move, and the seed of perturbations.
    context : Tensor, optional
        [B, offset], what precedes ``clean`` and is heard before it instead of zeros.

    Returns
    -------
    dict
        ``unequal``, ``equal`` and ``right``, each as the objective's distance returns it ([B]).
    """
    lengths = _full_lengths(enhanced)
    on_clean = objective.perturbed_branch == "clean"
    own, plain = objective.perturbation, NoPerturbation()
    target = own if on_clean else plain

    def represent(wavs, perturbation):
        rngs = [utterance_rng(seed, 0, utterance, "perturbation") for utterance in ids]
        return objective.represent(wavs, lengths, rngs, perturbation)

    compared = represent(enhanced, plain if on_clean else own)
    context = None if context is None else context[partners]
    offset = Offset(offset_seconds, target, objective.teacher.hop, context=context)
    targets = {
        "unequal": (clean[partners], offset),
        "equal": (clean[partners], target),
        "right": (clean, target),
    }
    return {
        key: objective.distance(*compared, *represent(wavs, perturbation))
        for key, (wavs, perturbation) in targets.items()
    }


def share_of_fall(unequal, equal, right, seed=0):
    """(unequal - equal) / (unequal - right) of the means, with its bootstrap interval over rows.

    Arguments
    ---------
    unequal, equal, right : array
        [P] each, from :func:`moved_values`; rows must be independent of one another.
    seed : int
        Of the bootstrap.

    Returns
    -------
    Interval
        0: equal positions win nothing; 1: they win all that the right content does.
    """
    unequal, equal, right = (np.asarray(v, np.float64) for v in (unequal, equal, right))
    return bootstrap_ratio(unequal - equal, unequal - right, seed)


def objective_share(
    teacher,
    objectives,
    crops,
    offset_seconds=1.5,
    moved_by="zeros",
    layers=None,
    batch_size=8,
    seed=0,
):
    """The share of each objective, at each layer, that position explains.

    Utterances are paired at random, each in one pair, and each is compared with its partner both
    ways; the pairs, not the utterances, are resampled for the intervals. Pairs and the draws of
    perturbations are the same for all objectives.

    Arguments
    ---------
    teacher, layers, batch_size
        As for :func:`shift_curve`.
    objectives : dict
        ``{name: RepresentationObjective}``; their teacher is not used.
    crops : Crops
    offset_seconds : float
        How far an unequal position is away.
    moved_by : str
        What precedes moved speech: ``zeros``, or ``speech``. The latter is the beginning of the
        same crop, so that the rest of it is what is compared; it shows how much of a share is due
        to the silence of zeros and not to position.
    seed : int
        Of pairs, perturbations and the bootstrap.

    Returns
    -------
    list of dict
        ``objective, layer, unequal, equal, right, share, low, high, pairs``.
    """
    order = np.random.default_rng(seed).permutation(len(crops.ids))
    pairs = len(order) // 2
    if pairs < 2:
        raise UserError(f"{len(order)} utterances make {pairs} pairs: name more speech.")
    hop = teacher.hop
    before = round(offset_seconds * SAMPLE_RATE / hop) * hop if moved_by == "speech" else 0
    if moved_by not in ("zeros", "speech") or before >= crops.wavs.shape[1]:
        raise UserError(
            f"moved_by: {moved_by!r}; needed is 'zeros', or 'speech' with crops longer than the "
            f"offset of {offset_seconds:g} s (segment_seconds above far_seconds)."
        )
    order = order[: 2 * pairs]
    ids, wavs = [crops.ids[i] for i in order], crops.wavs[torch.from_numpy(order)]
    step = 2 * max(1, batch_size // 2)  # pairs are rows 2i and 2i + 1: never cut one
    view = _Remembering(AllLayers(teacher, layers))
    values = {name: {} for name in objectives}
    for start in range(0, 2 * pairs, step):
        view.seen.clear()
        batch = wavs[start : start + step, before:]
        context = wavs[start : start + step, :before] if before else None
        partners = torch.arange(len(batch), device=batch.device) ^ 1
        names = ids[start : start + step]
        for name, own in objectives.items():
            every_layer = RepresentationObjective(
                view, EachLayer(own.distance), own.perturbation, own.perturbed_branch
            )
            found = moved_values(
                every_layer, batch, batch, partners, names, offset_seconds, seed, context
            )
            for key, value in found.items():
                values[name].setdefault(key, []).append(value.double().cpu())
    records = []
    for name, found in values.items():
        found = {
            key: torch.cat(value).unflatten(0, (pairs, 2)).mean(dim=1).T.numpy()
            for key, value in found.items()
        }  # [L, P]
        for i, layer in enumerate(chosen_layers(teacher, layers)):
            own = {key: value[i] for key, value in found.items()}
            records.append(
                {
                    "objective": name,
                    "layer": layer,
                    **{key: json_number(value.mean()) for key, value in own.items()},
                    **_interval("share", share_of_fall(**own, seed=seed)),
                    "pairs": pairs,
                }
            )
    return records


def training_scores(objective, enhanced, clean, lengths, ids, offset_seconds=1.5, seed=0):
    """The share of position in an objective on one batch of a validation, for its log.

    Costs four passes of the teacher. Call it on the same dev utterances at every validation; the
    share is one of means over them, so larger batches are steadier.

    Arguments
    ---------
    objective : torch.nn.Module
        As trained with; what compares representations is found in it.
    enhanced, clean : Tensor
        [B, T], B >= 2. All are cut to the shortest, so that each can be compared with each.
    lengths : Tensor
        [B], in samples.
    ids : list of str
        Utterance ids.
    offset_seconds, seed
        As for :func:`moved_values`.

    Returns
    -------
    dict
        ``position_share`` (0 to 1) and its parts ``position_unequal, position_equal,
        position_right``, floats; empty without a representation objective or for B < 2.
    """
    objective = representation_objective(objective)
    if objective is None or len(lengths) < 2:
        return {}
    common = int(lengths.min())
    partners = torch.arange(len(lengths), device=enhanced.device).roll(1)
    values = moved_values(
        objective, enhanced[:, :common], clean[:, :common], partners, ids, offset_seconds, seed
    )
    means = {f"position_{key}": float(value.mean()) for key, value in values.items()}
    won = means["position_unequal"] - means["position_right"]
    share = (means["position_unequal"] - means["position_equal"]) / won if won else math.nan
    return {"position_share": share, **means}


# 5. Training without content


class MismatchedTargets(torch.nn.Module):
    """An objective whose clean side is another utterance: content cannot lower it.

    Utterance i is compared with clean speech i - 1 of the batch, both cut to the shorter of the
    two. What training still wins comes from position and from the statistics of speech; with
    random offsets of the clean side from statistics alone. In YAML it takes the place of a
    strategy's objective.

    Arguments
    ---------
    objective : RepresentationObjective
    offset_seconds : float
        If above 0, 0 to this many seconds of zeros are put before the perturbed branch, drawn per
        utterance, after the strategy's own perturbation. Default: 0.
    """

    def __init__(self, objective, offset_seconds=0.0):
        super().__init__()
        if offset_seconds:
            hop = objective.teacher.hop
            objective = RepresentationObjective(
                objective.teacher,
                objective.distance,
                Offset(offset_seconds, objective.perturbation, hop, random=True),
                objective.perturbed_branch,
            )
        self.objective = objective

    def forward(self, enhanced, clean, lengths, rngs):
        """``[B, T], [B, T], [B]`` and a generator per utterance to [B]; B is at least 2."""
        if len(lengths) < 2:
            raise UserError(
                "A mismatched target needs two utterances in every batch, and one batch has a "
                "single one. Choose valid_utterances and valid_batch_size so that none is left."
            )
        lengths = torch.minimum(lengths, lengths.roll(1))
        longest = int(lengths.max())
        return self.objective(enhanced[:, :longest], clean.roll(1, 0)[:, :longest], lengths, rngs)


#: The arms of the causal test: what stands in the place of a strategy's objective.
TARGETS = ("matched", "mismatched", "mismatched_moved")

_REPRESENTATION = """!new:pi_finetune.objectives.RepresentationObjective
{indent}    teacher: !ref <teacher>
{indent}    distance: !ref <distance>
{indent}    perturbation: !ref <perturbation>
{indent}    perturbed_branch: !ref <perturbed_branch>
"""


def causal_yaml(strategy, targets, offset_seconds=2.0):
    """The text of a training file that differs from a strategy's in its targets alone.

    Arguments
    ---------
    strategy : str
        As for :func:`strategy_file`.
    targets : str
        ``matched``, ``mismatched`` or ``mismatched_moved`` (at random offsets).
    offset_seconds : float
        The largest random offset.

    Returns
    -------
    str
    """
    if targets not in TARGETS:
        raise ValueError(f"targets: got {targets!r}, needed is one of {', '.join(TARGETS)}.")
    path = strategy_file(strategy)
    text = f"extends: {path}\nstrategy: {path.stem}-{targets}\nobjective: "
    if targets == "matched":
        return text + _REPRESENTATION.format(indent="")
    text += "!new:pi_finetune.position.MismatchedTargets\n    objective: "
    text += _REPRESENTATION.format(indent="    ")
    return text + f"    offset_seconds: {offset_seconds * (targets == 'mismatched_moved')}\n"


@torch.no_grad()
def held_out_losses(objective, enhancer, pairs, batch_size=4, seed=0, device="cpu"):
    """An objective on development mixtures, with perturbations as validation draws them.

    Arguments
    ---------
    objective : torch.nn.Module
    enhancer : torch.nn.Module
    pairs : pi_finetune.data.loading.SpeechPairs
    batch_size, seed, device
        As in training; ``seed`` is its ``data_seed``.

    Returns
    -------
    np.ndarray
        [V], one value per utterance.
    """
    objective, enhancer = objective.to(device), enhancer.to(device).eval()
    losses = []
    for batch in torch.utils.data.DataLoader(pairs, batch_size, collate_fn=PaddedBatch):
        batch = batch.to(device)
        lengths = sample_lengths(batch.noisy)
        rngs = perturbation_rngs(seed, batch)
        enhanced = enhancer(batch.noisy.data, lengths)
        losses.append(objective(enhanced, batch.clean.data, lengths, rngs).cpu())
    return torch.cat(losses).double().numpy()


def falls_of_matched(losses, seed=0):
    """By how much the arms lowered their objectives, over the fall with matched targets.

    Parts of *falls*, since what the arms start from differs: with unrelated targets an objective
    is larger, and the same fall a smaller part of it. What position won is the fall with mismatched
    targets less that with mismatched targets at random offsets.

    Arguments
    ---------
    losses : dict
        ``{targets: (before [V], after [V])}`` for all of :data:`TARGETS`, on the same utterances.
    seed : int
        Of the bootstrap over utterances.

    Returns
    -------
    list of dict
        A line for each of :data:`TARGETS`, ``targets, before, after, fall, of_matched, low, high,
        utterances``, and one with ``targets`` "position". ``of_matched`` and its 95 % interval are
        None where training with matched targets lowered nothing.
    """
    falls = {
        targets: np.asarray(before, np.float64) - np.asarray(after, np.float64)
        for targets, (before, after) in losses.items()
    }
    matched = falls["matched"]
    parts = {**falls, "position": falls["mismatched"] - falls["mismatched_moved"]}
    records = []
    for targets, fall in parts.items():
        found = bootstrap_ratio(fall, matched, seed)
        if matched.mean() <= 0:
            found = Interval(math.nan, math.nan, math.nan)
        before, after = (np.mean(each) for each in losses.get(targets, (math.nan, math.nan)))
        records.append(
            {
                "targets": targets,
                "before": json_number(before),
                "after": json_number(after),
                "fall": json_number(fall.mean()),
                **_interval("of_matched", found),
                "utterances": len(fall),
            }
        )
    return records


# Intervals and lines


def bootstrap_ratio(numerators, denominators, seed=0, confidence=0.95, replicates=9999):
    """Ratio of means with a percentile bootstrap interval; rows are resampled together.

    Arguments
    ---------
    numerators, denominators : array
        [P] each.
    seed, confidence, replicates
        Of the bootstrap.

    Returns
    -------
    Interval
        NaN where the denominators' mean is 0, NaN bounds for P = 1.
    """
    numerators = np.asarray(numerators, np.float64)
    denominators = np.asarray(denominators, np.float64)
    total = denominators.sum()
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(numerators.sum() / total)
    if len(numerators) < 2:
        return Interval(estimate, math.nan, math.nan)

    def ratio(top, bottom, axis):
        with np.errstate(divide="ignore", invalid="ignore"):
            return top.sum(axis) / bottom.sum(axis)

    drawn = stats.bootstrap(
        (numerators, denominators),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=replicates,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(drawn.low), float(drawn.high))


def _interval(name, found):
    values = {name: found.estimate, "low": found.low, "high": found.high}
    return {key: json_number(value) for key, value in values.items()}
