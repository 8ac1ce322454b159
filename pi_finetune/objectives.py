"""Objectives of fine-tuning, one value per utterance.

A *distance* compares two sequences of frames, ``distance(x [B, N, D],
x_lengths, y [B, M, D], y_lengths) -> [B]``. An *objective* compares waveforms,
``objective(enhanced, clean, rngs=rngs) -> [B]`` with :class:`~pi_finetune.lengths.Waveforms`, or
``objective(enhanced [B, T], clean [B, T], lengths [B], rngs)``. A strategy is
a :class:`RepresentationObjective` with one perturbation and one distance. Lengths on the CPU cost
no synchronisation with a device.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pi_finetune.config import build
from pi_finetune.errors import UserError
from pi_finetune.lengths import (
    Lengths,
    Waveforms,
    as_lengths,
    as_pair,
    length_mask,
    on_device,
    zero_beyond,
)
from pi_finetune.perturbations import NoPerturbation, Perturbation
from pi_finetune.projections import Projection
from pi_finetune.representations import FolderStore, MemoryStore, Store, represented
from pi_finetune.soft_dtw import soft_dtw

if TYPE_CHECKING:
    from pi_finetune.data.loading import SpeechPairs

__all__ = [
    "CompressedSpectralLoss",
    "L1STFTLoss",
    "MSEDistance",
    "RepresentationObjective",
    "SISDRLoss",
    "SNRLoss",
    "SoftDTWDistance",
    "SoftDTWLAVDistance",
    "WarpedMSEDistance",
    "WeightedSum",
    "contrastive_idm",
    "load_teachers",
    "measure_projections",
]

Rngs = Sequence[np.random.Generator] | None

#: Added to powers, since roots have no gradient at digital silence.
_SILENT = 1e-10


class MSEDistance:
    """Mean over valid frames and dimensions of (x - y)^2; needs equal frame lengths.

    Arguments
    ---------
    sum_dimensions : bool
        Sum over dimensions instead, D times as large; still the mean over frames. Default: False.

    Example
    -------
    >>> x, y, lengths = torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.tensor([3, 2])
    >>> y[1, 2] = torch.nan  # beyond the length: not looked at
    >>> MSEDistance()(x, lengths, y, lengths)
    tensor([1., 1.])
    """

    def __init__(self, sum_dimensions: bool = False):
        self.sum_dimensions = sum_dimensions

    def __call__(self, x: Tensor, x_lengths: Tensor, y: Tensor, y_lengths: Tensor) -> Tensor:
        x_lengths, y_lengths = as_lengths(x_lengths), as_lengths(y_lengths)
        if not torch.equal(x_lengths, y_lengths):
            raise ValueError(
                "MSEDistance compares frame k with frame k, but the branches have "
                f"{x_lengths.tolist()} and {y_lengths.tolist()} frames. With a perturbation that "
                "changes lengths use WarpedMSEDistance or SoftDTWDistance."
            )
        frames = int(x_lengths.max())
        squared = (x[:, :frames].float() - y[:, :frames].float()).square()
        squared = squared.sum(dim=-1) if self.sum_dimensions else squared.mean(dim=-1)
        return zero_beyond(squared, x_lengths).sum(dim=1) / on_device(x_lengths, x.device)


class WarpedMSEDistance:
    """MSE after the frames of ``y`` are stretched linearly in time to those of ``x``.

    The control for speed perturbation without an alignment: the true warp is
    linear, so frame n of ``x`` is compared with ``y`` interpolated at (n + 1/2) M/N - 1/2.
    """

    def __call__(self, x: Tensor, x_lengths: Tensor, y: Tensor, y_lengths: Tensor) -> Tensor:
        x_lengths = as_lengths(x_lengths)
        frames = int(x_lengths.max())
        last = on_device(as_lengths(y_lengths), x.device)[:, None] - 1
        n = torch.arange(frames, device=x.device)
        place = (n + 0.5) * ((last + 1) / on_device(x_lengths, x.device)[:, None]) - 0.5  # [B, N]
        place = place.clamp(min=0.0).minimum(last.to(place.dtype))
        left = place.floor().long()
        right = (left + 1).minimum(last)
        weight = (place - left)[..., None]
        batch = torch.arange(len(y), device=y.device)[:, None]
        warped = torch.lerp(y[batch, left].float(), y[batch, right].float(), weight)
        return MSEDistance()(x, x_lengths, warped, x_lengths)


class SoftDTWDistance:
    """Soft-DTW (Cuturi & Blondel, ICML 2017) on frames, by default as LASER uses it.

    Arguments
    ---------
    gamma : float
        Smoothing; default 0.1.
    divergence : bool
        sdtw(x, y) - (sdtw(x, x) + sdtw(y, y)) / 2, which is zero for x = y and
        not negative (Blondel, Mensch & Vert, AISTATS 2021). Default: True.
    normalize : bool
        L2-normalise each frame first, so that gamma means the same for any
        teacher. Default: True.
    length_normalize : bool
        Divide by (N + M) / 2, so that long utterances do not dominate. Default: True.
    bandwidth, cost, backend
        As in :func:`pi_finetune.soft_dtw.soft_dtw`.

    Example
    -------
    >>> x, lengths = torch.eye(3)[None], torch.tensor([3])
    >>> slower = x.repeat_interleave(2, dim=1)  # [1, 6, 3]
    >>> to_slower = SoftDTWDistance()(x, lengths, slower, 2 * lengths)
    >>> to_reverse = SoftDTWDistance()(x, lengths, x.flip(1), lengths)
    >>> bool(to_slower < 0.1 * to_reverse)
    True
    """

    def __init__(
        self,
        gamma: float = 0.1,
        divergence: bool = True,
        normalize: bool = True,
        length_normalize: bool = True,
        bandwidth: int | None = None,
        cost: str = "sqeuclidean",
        backend: str = "auto",
    ):
        self.normalize = normalize
        self.length_normalize = length_normalize
        self.options: dict[str, Any] = {
            "gamma": gamma,
            "divergence": divergence,
            "bandwidth": bandwidth,
            "cost": cost,
            "backend": backend,
        }

    def __call__(self, x: Tensor, x_lengths: Tensor, y: Tensor, y_lengths: Tensor) -> Tensor:
        x_lengths, y_lengths = as_lengths(x_lengths), as_lengths(y_lengths)
        if self.normalize:
            x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
        value = soft_dtw(x, y, x_lengths, y_lengths, **self.options)
        if self.length_normalize:
            value = value / (on_device(x_lengths + y_lengths, x.device) / 2)
        return value


def contrastive_idm(x: Tensor, lengths: Tensor, margin: float = 1.1, window: int = 0) -> Tensor:
    """Contrastive inverse difference moment: frames near in time be near, others ``margin`` apart.

    With ``d_ij = |x_i - x_j|`` and w_ij = (i - j)^2 + 1, the sum over all i, j of
    d_ij / w_ij where ``|i - j| <= window``, and of w_ij max(0, margin - d_ij) elsewhere, divided by
    N^2. From Haresh et al., "Learning by Aligning Videos in Time" (CVPR 2021), with the distance
    and the divisor of LASER's code (Meghanani & Hain, Interspeech 2024): theirs are
    the squared distance and, with the other terms, the number of frames.

    Arguments
    ---------
    x : Tensor
        [B, N, D], L2-normalised frame by frame in LASER.
    lengths : Tensor
        [B]; what lies beyond is not looked at.
    margin : float
        Default: 1.1, LASER's for HuBERT.
    window : int
        In frames. Default: 0, LASER's.

    Returns
    -------
    Tensor
        [B], not negative.
    """
    lengths = as_lengths(lengths)
    frames = int(lengths.max())
    mask = length_mask(lengths, frames, x.device)
    x = zero_beyond(x[:, :frames], lengths)
    # By differences, not by products: a root of what is left of two large numbers has no gradient.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # [B, N, N]
    place = torch.arange(frames, device=x.device, dtype=x.dtype)
    apart = (place[:, None] - place).abs()
    weight = apart.square() + 1
    near, far = distance / weight, weight * F.relu(margin - distance)
    each = torch.where(apart <= window, near, far)
    pairs = mask[:, :, None] & mask[:, None]
    return each.masked_fill(~pairs, 0.0).sum(dim=(1, 2)) / on_device(lengths, x.device).square()


class SoftDTWLAVDistance(SoftDTWDistance):
    """Soft-DTW with LASER's temporal regulariser: + alpha (IDM(x) + IDM(y)).

    The regulariser keeps what is learned from becoming the same at all times, above all where a
    projection is learned. A branch without gradient adds a constant.

    Arguments
    ---------
    alpha : float
        Weight; LASER: 0.4 for HuBERT, the default, and 0.15 for WavLM.
    margin, window
        As of :func:`contrastive_idm`.
    **soft_dtw
        As of :class:`SoftDTWDistance`.
    """

    def __init__(self, alpha: float = 0.4, margin: float = 1.1, window: int = 0, **soft_dtw: Any):
        super().__init__(**soft_dtw)
        if alpha < 0 or margin <= 0 or window < 0:
            raise UserError(
                f"alpha {alpha}, margin {margin}, window {window}: needed are a weight of 0 or "
                "more, a distance above 0 and a number of frames, 0 or more."
            )
        self.alpha, self.margin, self.window = alpha, margin, window

    def __call__(self, x: Tensor, x_lengths: Tensor, y: Tensor, y_lengths: Tensor) -> Tensor:
        value = super().__call__(x, x_lengths, y, y_lengths)
        for reps, lengths in ((x, x_lengths), (y, y_lengths)):
            reps = F.normalize(reps.float(), dim=-1) if self.normalize else reps.float()
            moment = contrastive_idm(reps, lengths, self.margin, self.window)
            value = value + self.alpha * moment
        return value


class RepresentationObjective(nn.Module):
    """Distance between the teacher's representations of enhanced and of clean speech.

    Arguments
    ---------
    teacher : pi_finetune.teacher.Teacher
    distance : callable
        One of the distances of this module, or any callable with their signature.
    perturbation : callable, optional
        From :mod:`pi_finetune.perturbations`; applied to one branch only, so
        that the branches differ in position. Default: none.
    perturbed_branch : str
        ``"clean"`` (default) or ``"enhanced"``.
    projection : pi_finetune.projections.Projection, optional
        Applied to the representations of both branches before the distance. Default: none.
    cache_mb : float
        Memory for the clean branch in evaluation mode, where the same utterances come back at every
        validation. They are known by the ``ids`` of the waveforms; without ids nothing is kept,
        and what does not fit is computed again. Default: 512.
    cache_folder : str or Path, optional
        Keep the clean branch of training there, in half precision, where it is the same in every
        pass: see :class:`~pi_finetune.representations.FolderStore`. Default: it is computed.

    Raises
    ------
    UserError
        ``cache_folder`` with a perturbation of clean speech that makes another of it every time.
    """

    def __init__(
        self,
        teacher: Any,
        distance: Callable[..., Tensor] | None,
        perturbation: Callable[..., Waveforms] | None = None,
        perturbed_branch: str = "clean",
        cache_mb: float = 512.0,
        projection: Projection | None = None,
        cache_folder: str | Path | None = None,
    ):
        super().__init__()
        if perturbed_branch not in ("clean", "enhanced"):
            raise ValueError(
                f"perturbed_branch: got {perturbed_branch!r}, needed is 'clean' or 'enhanced'."
            )
        self.teacher = teacher
        self.distance: Any = distance
        self.projection = projection
        self.perturbation = perturbation or NoPerturbation()
        self.perturbed_branch = perturbed_branch
        self._plain = NoPerturbation()
        on_clean = self.perturbation if perturbed_branch == "clean" else self._plain
        if cache_folder is not None and not getattr(on_clean, "recurs", False):
            raise UserError(
                f"representation_cache: perturbation {type(on_clean).__name__} makes another of "
                "the clean speech in every pass, so that nothing could be kept. Set "
                "representation_cache: null, or perturbed_branch: enhanced."
            )
        self._cache_mb, self._cache_folder = cache_mb, cache_folder
        self._stores: dict[Any, Store] = {}

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        enhanced, clean = as_pair(enhanced, clean, lengths)
        y = self.represent_clean(clean, rngs)
        return self.distance(*self.represent_enhanced(enhanced, rngs), *y)

    def _perturbation_of(self, branch: str) -> Perturbation:
        return self.perturbation if branch == self.perturbed_branch else self._plain

    def _projected(self, reps: Tensor, frame_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return reps if self.projection is None else self.projection(reps), frame_lengths

    def represent_enhanced(self, enhanced: Waveforms, rngs: Rngs) -> tuple[Tensor, Tensor]:
        """As :meth:`represent`, of the enhanced branch with its perturbation."""
        return self.represent(enhanced, rngs, self._perturbation_of("enhanced"))

    def represent_clean(self, clean: Waveforms, rngs: Rngs) -> tuple[Tensor, Tensor]:
        """As :meth:`represent`, of the clean branch: no gradient, and kept where that is asked."""
        with torch.no_grad():
            wavs = self._perturbation_of("clean")(clean, rngs=rngs)
            store = self._store(wavs)
            made = self.teacher(wavs) if store is None else represented(self.teacher, wavs, store)
        return self._projected(*made)

    def _store(self, wavs: Waveforms) -> Store | None:
        """Where the clean branch is kept; one for each teacher that was here."""
        folder = self._cache_folder
        if (self.training and folder is None) or (not self.training and wavs.ids is None):
            return None
        key = self.training, self.teacher
        if key not in self._stores:
            self._stores[key] = (
                FolderStore(folder, self.teacher)
                if self.training and folder is not None
                else MemoryStore(self._cache_mb)
            )
        return self._stores[key]

    def check_values(self) -> None:
        """For debugging: raise where a representation given to soft-DTW is not finite."""
        if isinstance(self.distance, SoftDTWDistance):
            self.distance.options["check_finite"] = True

    def represent(
        self, wavs: Waveforms, rngs: Rngs, perturbation: Perturbation
    ) -> tuple[Tensor, Tensor]:
        """The teacher's frames of the content of a perturbed batch, projected.

        Returns
        -------
        (torch.Tensor, torch.Tensor)
            [B, F, D], and frame lengths [B] as the teacher gives them.
        """
        return self._projected(*self.teacher(perturbation(wavs, rngs=rngs)))


def load_teachers(objective: torch.nn.Module) -> torch.nn.Module:
    """Make the teachers that an experiment file declares by ``!name:`` in an objective.

    Arguments
    ---------
    objective : nn.Module
        Every module in it whose attribute ``teacher`` is a declaration gets the teacher itself;
        one declaration makes one teacher. A projection beside it gets its weights.

    Returns
    -------
    nn.Module
        ``objective``.
    """
    made = {}
    for module in list(objective.modules()):
        declared = vars(module).get("teacher")  # a teacher that is made is a submodule
        if declared is not None:
            if id(declared) not in made:
                made[id(declared)] = build(declared)
            module.teacher = made[id(declared)]
            projection: Any = getattr(module, "projection", None)
            if projection is not None:
                projection.fit_to(module.teacher)
    return objective


def measure_projections(
    objective: torch.nn.Module, pairs: "SpeechPairs", folder: str | Path
) -> None:
    """Let the projections in an objective measure what they need on training speech.

    Arguments
    ---------
    objective : nn.Module
        With its teachers made.
    pairs : pi_finetune.data.loading.SpeechPairs
        The training data.
    folder : str or Path
        The run folder, which keeps what was measured.
    """
    for module in objective.modules():
        if isinstance(module, RepresentationObjective) and module.projection is not None:
            module.projection.measure(module.teacher, pairs, folder)


def _valid_samples(
    enhanced: Tensor | Waveforms, clean: Tensor | Waveforms, lengths: Lengths | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides in float32, [B, T] each and zero beyond their lengths [B], and the lengths."""
    enhanced, clean = as_pair(enhanced, clean, lengths)
    x, y = (zero_beyond(wavs.data.float(), enhanced.lengths) for wavs in (enhanced, clean))
    return x, y, enhanced.lengths


def _bounded_decibels(error: Tensor, max_snr: float) -> Tensor:
    """A relative error [B] in dB; below ``-max_snr`` it hardly falls."""
    return 10 * torch.log10(error + 10 ** (-max_snr / 10))


class SISDRLoss(nn.Module):
    """Negative SI-SDR in dB (Le Roux et al., ICASSP 2019), means removed over valid samples."""

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        *pair, samples = _valid_samples(enhanced, clean, lengths)
        x, y = (self._centre(wavs, samples) for wavs in pair)
        eps = 1e-8
        scale = (x * y).sum(1) / (y.square().sum(1) + eps)
        target = scale[:, None] * y
        error = (x - target).square().sum(1)
        return -10 * torch.log10((target.square().sum(1) + eps) / (error + eps))

    @staticmethod
    def _centre(wavs: Tensor, lengths: Tensor) -> Tensor:
        count = on_device(lengths, wavs.device)[:, None]
        return zero_beyond(wavs - wavs.sum(1, keepdim=True) / count, lengths)


class SNRLoss(nn.Module):
    """Negative SNR in dB, bounded: ``10 log10(|y - x|^2 / |y|^2 + 10^(-max_snr / 10))``.

    Unlike SI-SDR it fixes the level. The bound is the threshold of Wisdom et al. (MixIT,
    NeurIPS 2020, eq. 1): without it, pairs that are almost clean outweigh all others.

    Arguments
    ---------
    max_snr : float
        No more than this is rewarded, in dB. Default: 30.

    Example
    -------
    >>> clean, lengths = torch.sin(torch.arange(100.0))[None], torch.tensor([100])
    >>> louder, same = (SNRLoss()(gain * clean, clean, lengths) for gain in (1.5, 1.0))
    >>> round(float(louder), 1), round(float(same), 1)
    (-6.0, -30.0)
    """

    def __init__(self, max_snr: float = 30.0):
        super().__init__()
        self.max_snr = max_snr

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        x, y, _ = _valid_samples(enhanced, clean, lengths)
        noise = (x - y).square().sum(1) / (y.square().sum(1) + 1e-8)
        return _bounded_decibels(noise, self.max_snr)


class L1STFTLoss(nn.Module):
    """Multi-resolution L1 between magnitudes, plus L1 between waveforms.

    The signal loss of Demucs denoisers (Défossez et al., Interspeech 2020) with
    plain magnitude distances. Means run over valid frames and samples.

    Arguments
    ---------
    window_lengths : list of int
        In samples; the hop is a quarter. Default [400, 800, 1600].
    """

    def __init__(self, window_lengths: Sequence[int] = (400, 800, 1600)):
        super().__init__()
        self.window_lengths = tuple(window_lengths)

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        a, b, samples = _valid_samples(enhanced, clean, lengths)
        loss = (a - b).abs().sum(1) / on_device(samples, a.device)
        for window_length in self.window_lengths:
            x, y = self._magnitude(a, window_length), self._magnitude(b, window_length)
            frames = _stft_frames(samples, window_length)
            total = zero_beyond((x - y).abs().mean(dim=1), frames).sum(1)
            loss = loss + total / on_device(frames, x.device) / len(self.window_lengths)
        return loss

    @staticmethod
    def _magnitude(wavs: Tensor, window_length: int) -> Tensor:
        power = _power(_stft(wavs, window_length))
        return (power + _SILENT).sqrt()


class CompressedSpectralLoss(nn.Module):
    """Error between spectra compressed by a power law, relative to the clean one's, in dB.

    With ``X_c = |X|^c exp(j arg X)`` it is ``10 log10(e + 10^(-max_snr / 10))``, where ``e`` is
    ``(1 - complex_share) ||X|^c - |Y|^c|^2 + complex_share |X_c - Y_c|^2``, summed over valid
    frames and bins, over the sum of ``|Y|^(2c)``. The sum is that of Braun and Tashev ("Data
    augmentation and loss normalization for deep noise suppression", SPECOM 2020, eq. 5); the
    logarithm and its bound are those of :class:`SNRLoss`. The compression weights bins as loudness
    does, so weak speech counts beside strong; the complex part fixes phase, both fix the level.

    Arguments
    ---------
    compression : float
        c. Default: 0.3.
    complex_share : float
        Weight of the complex part, from 0 to 1. Default: 0.3.
    max_snr : float
        No more than this is rewarded, in dB. Default: 30.
    window_length : int
        In samples; the hop is a quarter. Default: 512.

    Example
    -------
    >>> clean, lengths = torch.sin(torch.arange(1000.0))[None], torch.tensor([1000])
    >>> louder, same = (CompressedSpectralLoss()(gain * clean, clean, lengths) for gain in (2, 1))
    >>> round(float(louder), 1), round(float(same), 1)
    (-12.6, -30.0)
    """

    def __init__(
        self,
        compression: float = 0.3,
        complex_share: float = 0.3,
        max_snr: float = 30.0,
        window_length: int = 512,
    ):
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be above 0 and at most 1, got {compression}")
        if not 0 <= complex_share <= 1:
            raise ValueError(f"complex_share must be from 0 to 1, got {complex_share}")
        self.compression, self.complex_share = compression, complex_share
        self.max_snr = max_snr
        self.window_length = window_length

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        *pair, samples = _valid_samples(enhanced, clean, lengths)
        (x, x_magnitude), (y, y_magnitude) = (self._compressed(wavs) for wavs in pair)
        apart = (x_magnitude - y_magnitude).square()
        apart = apart + self.complex_share * (_power(x - y) - apart)
        frames = _stft_frames(samples, self.window_length)
        error, energy = (
            zero_beyond(of_bins.sum(dim=1), frames).sum(1)
            for of_bins in (apart, y_magnitude.square())
        )
        return _bounded_decibels(error / energy, self.max_snr)

    def _compressed(self, wavs: Tensor) -> tuple[Tensor, Tensor]:
        """Spectra of the wavs [B, T] and their magnitudes, compressed, [B, F, N] each."""
        spectrum = _stft(wavs, self.window_length)
        power = _power(spectrum) + _SILENT
        compressed = spectrum * power.pow((self.compression - 1) / 2)
        return compressed, power.pow(self.compression / 2)


def _stft(wavs: Tensor, window_length: int) -> Tensor:
    """Of the wavs [B, T], complex [B, F, N]; Hann window, a quarter of it as hop."""
    return torch.stft(
        wavs,
        window_length,
        hop_length=window_length // 4,
        window=torch.hann_window(window_length, device=wavs.device),
        pad_mode="constant",
        return_complex=True,
    )


def _stft_frames(samples: Tensor, window_length: int) -> Tensor:
    """How many frames of ``_stft`` the valid samples [B] have."""
    return samples // (window_length // 4) + 1


def _power(spectrum: Tensor) -> Tensor:
    return spectrum.real.square() + spectrum.imag.square()


class WeightedSum(nn.Module):
    """Sum of objectives with weights; a zero weight costs nothing.

    Arguments
    ---------
    terms : dict
        ``{name: objective}``.
    weights : dict
        ``{name: float}``; every name of ``terms``.

    Example
    -------
    >>> terms = {"signal": SISDRLoss(), "spectrum": L1STFTLoss()}
    >>> list(WeightedSum(terms, {"signal": 0.0, "spectrum": 1.0}).terms)
    ['spectrum']
    """

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float]):
        super().__init__()
        if set(terms) != set(weights):
            raise ValueError(
                f"weights: got {sorted(weights)}, needed is one for each of {sorted(terms)}."
            )
        if not any(weights.values()):
            raise ValueError("weights: all are zero; nothing would be learned.")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.terms = nn.ModuleDict({name: terms[name] for name in self.weights})

    def forward(
        self,
        enhanced: Tensor | Waveforms,
        clean: Tensor | Waveforms,
        lengths: Lengths | None = None,
        rngs: Rngs = None,
    ) -> Tensor:
        enhanced, clean = as_pair(enhanced, clean, lengths)
        values = (
            weight * self.terms[name](enhanced, clean, rngs=rngs)
            for name, weight in self.weights.items()
        )
        return sum(values, start=torch.zeros((), device=enhanced.data.device))
