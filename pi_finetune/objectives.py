"""Objectives of fine-tuning, one value per utterance.

A *distance* compares two sequences of frames, ``distance(x [B, N, D],
x_lengths, y [B, M, D], y_lengths) -> [B]``. An *objective* compares waveforms,
``objective(enhanced [B, T], clean [B, T], lengths, rngs) -> [B]``. A strategy is
a :class:`RepresentationObjective` with one perturbation and one distance.
"""

import hashlib

import torch
from torch.nn import functional as F

from pi_finetune.config import build
from pi_finetune.perturbations import NoPerturbation
from pi_finetune.soft_dtw import soft_dtw


def _frame_mask(lengths, frames):
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


class MSEDistance:
    """Mean over valid frames and dimensions of (x - y)^2; needs equal frame lengths.

    Example
    -------
    >>> x, y, lengths = torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.tensor([3, 2])
    >>> y[1, 2] = torch.nan  # beyond the length: not looked at
    >>> MSEDistance()(x, lengths, y, lengths)
    tensor([1., 1.])
    """

    def __call__(self, x, x_lengths, y, y_lengths):
        if not torch.equal(x_lengths, y_lengths):
            raise ValueError(
                "MSEDistance compares frame k with frame k, but the branches have "
                f"{x_lengths.tolist()} and {y_lengths.tolist()} frames. With a perturbation that "
                "changes lengths use WarpedMSEDistance or SoftDTWDistance."
            )
        frames = int(x_lengths.max())
        squared = (x[:, :frames].float() - y[:, :frames].float()).square().mean(dim=-1)
        mask = _frame_mask(x_lengths, frames)
        return squared.masked_fill(~mask, 0.0).sum(dim=1) / x_lengths


class WarpedMSEDistance:
    """MSE after the frames of ``y`` are stretched linearly in time to those of ``x``.

    The control for speed perturbation without an alignment: the true warp is
    linear, so frame n of ``x`` is compared with ``y`` interpolated at (n + 1/2) M/N - 1/2.
    """

    def __call__(self, x, x_lengths, y, y_lengths):
        frames = int(x_lengths.max())
        n = torch.arange(frames, device=x.device)
        place = (n + 0.5) * (y_lengths / x_lengths)[:, None] - 0.5  # [B, N]
        place = place.clamp(min=0.0).minimum((y_lengths - 1)[:, None].to(place.dtype))
        left = place.floor().long()
        right = (left + 1).minimum((y_lengths - 1)[:, None])
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
        gamma=0.1,
        divergence=True,
        normalize=True,
        length_normalize=True,
        bandwidth=None,
        cost="sqeuclidean",
        backend="auto",
    ):
        self.normalize = normalize
        self.length_normalize = length_normalize
        self.options = {
            "gamma": gamma,
            "divergence": divergence,
            "bandwidth": bandwidth,
            "cost": cost,
            "backend": backend,
        }

    def __call__(self, x, x_lengths, y, y_lengths):
        if self.normalize:
            x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
        value = soft_dtw(x, y, x_lengths, y_lengths, **self.options)
        if self.length_normalize:
            value = value / ((x_lengths + y_lengths) / 2)
        return value


class RepresentationObjective(torch.nn.Module):
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
    cache_mb : float
        Memory for the clean branch in evaluation mode, where the same batches come back at every
        validation; what does not fit is computed again. In training it would never be used:
        crops, noise levels and perturbations are drawn anew in every pass. Default: 512.
    """

    def __init__(
        self, teacher, distance, perturbation=None, perturbed_branch="clean", cache_mb=512.0
    ):
        super().__init__()
        if perturbed_branch not in ("clean", "enhanced"):
            raise ValueError(
                f"perturbed_branch: got {perturbed_branch!r}, needed is 'clean' or 'enhanced'."
            )
        self.teacher = teacher
        self.distance = distance
        self.perturbation = perturbation or NoPerturbation()
        self.perturbed_branch = perturbed_branch
        self._plain = NoPerturbation()
        self._cache, self._room = {}, cache_mb * 1e6

    def forward(self, enhanced, clean, lengths, rngs):
        on_clean = self.perturbed_branch == "clean"
        y, y_lengths = self._represent_clean(
            clean, lengths, rngs, self.perturbation if on_clean else self._plain
        )
        x, x_lengths = self.represent(
            enhanced, lengths, rngs, self._plain if on_clean else self.perturbation
        )
        return self.distance(x, x_lengths, y, y_lengths)

    @torch.no_grad()
    def _represent_clean(self, clean, lengths, rngs, perturbation):
        if self.training:
            return self.represent(clean, lengths, rngs, perturbation)
        digest = hashlib.sha256(clean.cpu().numpy().tobytes())
        digest.update(repr((lengths.tolist(), [r.bit_generator.state for r in rngs])).encode())
        autocast = torch.is_autocast_enabled(clean.device.type)
        key = (digest.digest(), autocast, id(perturbation), id(self.teacher))
        if key not in self._cache:
            reps, frames = self.represent(clean, lengths, rngs, perturbation)
            if reps.nbytes > self._room:
                return reps, frames
            self._room -= reps.nbytes
            self._cache[key] = (reps, frames)
        return self._cache[key]

    def check_values(self):
        """For debugging: raise where a representation given to soft-DTW is not finite."""
        if isinstance(self.distance, SoftDTWDistance):
            self.distance.options["check_finite"] = True

    def represent(self, wavs, lengths, rngs, perturbation):
        """The teacher's frames of the content of a perturbed batch.

        Returns
        -------
        (torch.Tensor, torch.Tensor)
            [B, F, D] and frame lengths [B]; frames beyond a length are arbitrary.
        """
        perturbed = perturbation(wavs, lengths, rngs)
        reps, _ = self.teacher(perturbed.wavs, perturbed.lengths)
        frame_lengths = self.teacher.frames(perturbed.content_lengths)
        first = perturbed.content_start // self.teacher.hop
        index = first[:, None] + torch.arange(int(frame_lengths.max()), device=reps.device)
        batch = torch.arange(len(reps), device=reps.device)[:, None]
        return reps[batch, index.clamp(max=reps.shape[1] - 1)], frame_lengths


def load_teachers(objective):
    """Make the teachers that an experiment file declares by ``!name:`` in an objective.

    Arguments
    ---------
    objective : torch.nn.Module
        Every module in it whose attribute ``teacher`` is a declaration gets the teacher itself;
        one declaration makes one teacher.

    Returns
    -------
    torch.nn.Module
        ``objective``.
    """
    made = {}
    for module in list(objective.modules()):
        declared = vars(module).get("teacher")  # a teacher that is made is a submodule
        if declared is not None:
            if id(declared) not in made:
                made[id(declared)] = build(declared)
            module.teacher = made[id(declared)]
    return objective


class SISDRLoss(torch.nn.Module):
    """Negative SI-SDR in dB (Le Roux et al., ICASSP 2019), means removed over valid samples."""

    def forward(self, enhanced, clean, lengths, rngs=None):
        mask = _frame_mask(lengths, enhanced.shape[1])
        x, y = (self._centre(wav, mask, lengths) for wav in (enhanced, clean))
        eps = 1e-8
        scale = (x * y).sum(1) / (y.square().sum(1) + eps)
        target = scale[:, None] * y
        error = (x - target).square().sum(1)
        return -10 * torch.log10((target.square().sum(1) + eps) / (error + eps))

    @staticmethod
    def _centre(wav, mask, lengths):
        wav = wav.float().masked_fill(~mask, 0.0)
        return (wav - wav.sum(1, keepdim=True) / lengths[:, None]).masked_fill(~mask, 0.0)


class SNRLoss(torch.nn.Module):
    """Negative SNR in dB, bounded: 10 log10(|y - x|^2 / |y|^2 + 10^(-max_snr / 10)).

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

    def __init__(self, max_snr=30.0):
        super().__init__()
        self.threshold = 10 ** (-max_snr / 10)

    def forward(self, enhanced, clean, lengths, rngs=None):
        mask = _frame_mask(lengths, enhanced.shape[1])
        x, y = (wav.float().masked_fill(~mask, 0.0) for wav in (enhanced, clean))
        noise = (x - y).square().sum(1) / (y.square().sum(1) + 1e-8)
        return 10 * torch.log10(noise + self.threshold)


class L1STFTLoss(torch.nn.Module):
    """Multi-resolution L1 between magnitudes, plus L1 between waveforms.

    The signal loss of Demucs denoisers (Défossez et al., Interspeech 2020) with
    plain magnitude distances. Means run over valid frames and samples.

    Arguments
    ---------
    window_lengths : list of int
        In samples; the hop is a quarter. Default [400, 800, 1600].
    """

    def __init__(self, window_lengths=(400, 800, 1600)):
        super().__init__()
        self.window_lengths = tuple(window_lengths)

    def forward(self, enhanced, clean, lengths, rngs=None):
        mask = _frame_mask(lengths, enhanced.shape[1])
        enhanced, clean = (w.float().masked_fill(~mask, 0.0) for w in (enhanced, clean))
        loss = (enhanced - clean).abs().sum(1) / lengths
        for window_length in self.window_lengths:
            x, y = self._magnitude(enhanced, window_length), self._magnitude(clean, window_length)
            frames = lengths // (window_length // 4) + 1
            frame_mask = _frame_mask(frames, x.shape[-1])
            per_frame = (x - y).abs().mean(dim=1).masked_fill(~frame_mask, 0.0)
            loss = loss + per_frame.sum(1) / frames / len(self.window_lengths)
        return loss

    @staticmethod
    def _magnitude(wavs, window_length):
        window = torch.hann_window(window_length, device=wavs.device)
        spectrum = torch.stft(
            wavs,
            window_length,
            hop_length=window_length // 4,
            window=window,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return (power + 1e-10).sqrt()  # the root has no gradient at digital silence


class WeightedSum(torch.nn.Module):
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

    def __init__(self, terms, weights):
        super().__init__()
        if set(terms) != set(weights):
            raise ValueError(
                f"weights: got {sorted(weights)}, needed is one for each of {sorted(terms)}."
            )
        if not any(weights.values()):
            raise ValueError("weights: all are zero; nothing would be learned.")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.terms = torch.nn.ModuleDict({name: terms[name] for name in self.weights})

    def forward(self, enhanced, clean, lengths, rngs):
        return sum(
            weight * self.terms[name](enhanced, clean, lengths, rngs)
            for name, weight in self.weights.items()
        )
