"""Noise mixing at an exact SNR, with a clean target scaled like the mixture."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from pi_finetune.data.audio import SAMPLE_RATE, is_silent, read_audio
from pi_finetune.errors import UserError

__all__ = ["NoiseMixer", "mix_at_snr", "random_filter"]

#: No mixture has a sample of a larger magnitude.
PEAK = 0.99


def mix_at_snr(
    clean: torch.Tensor,
    noise: torch.Tensor,
    snr: float,
    peak: float = PEAK,
    target: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise to speech.

    SNR is the ratio of the mean powers over the whole signal, in dB. If the
    mixture would exceed ``peak``, mixture *and* clean signal are scaled by the
    same factor, so that ``noisy - clean`` is exactly the added noise
    (SpeechBrain's AddNoise scales the speech alone).

    Arguments
    ---------
    clean, noise : torch.Tensor
        [T] each, of the same length; neither may be silent.
    snr : float
        In dB.
    peak : float
        Largest absolute sample allowed in the mixture.
    target : torch.Tensor, optional
        [T]: returned, scaled like the mixture, in the place of ``clean``.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        The mixture and the clean signal, [T] each.
    """
    gain = (clean.square().mean() / noise.square().mean() / 10 ** (snr / 10)).sqrt()
    return below(peak, clean + gain * noise, clean if target is None else target)


def below(
    peak: float, noisy: torch.Tensor, clean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale both by the one factor by which ``noisy`` stays below ``peak``; 1 if it does."""
    scale = min(1.0, peak / float(noisy.abs().max()))
    return noisy * scale, clean * scale


def random_filter(
    wav: torch.Tensor, rng: np.random.Generator, depth: float = 12.0, knots: int = 6
) -> torch.Tensor:
    """Colour a signal as another room, microphone or distance would.

    The gain in dB is linear in the logarithm of the frequency between ``knots`` points from
    50 Hz to 8 kHz; at each it is drawn evenly from -``depth`` to ``depth``.

    Arguments
    ---------
    wav : torch.Tensor
        [T].
    rng : numpy.random.Generator
    depth : float
        In dB. Default: 12.
    knots : int
        Default: 6.

    Returns
    -------
    torch.Tensor
        [T]; zero phase, so nothing moves in time.
    """
    frequencies = np.fft.rfftfreq(len(wav), 1 / SAMPLE_RATE).clip(min=1.0)
    places = np.linspace(np.log(50), np.log(SAMPLE_RATE / 2), knots)
    gain = np.interp(np.log(frequencies), places, rng.uniform(-depth, depth, knots))
    spectrum = torch.fft.rfft(wav) * torch.from_numpy(10 ** (gain / 20)).to(wav)
    return torch.fft.irfft(spectrum, len(wav))


class NoiseMixer:
    """Draws a noise, a place in it and an SNR, and mixes.

    Every noise class is equally likely, whatever its number of recordings.

    Arguments
    ---------
    noises : dict
        From :func:`pi_finetune.data.corpora.prepare_noise`.
    snrs : list of float
        In dB, equally likely. ``inf`` (``.inf`` in YAML) is clean speech, left as it is.
    filtered : float
        Share of the noises that go through a random filter (:func:`random_filter`). Default: 0.
    """

    def __init__(self, noises: dict, snrs: Sequence[float], filtered: float = 0.0):
        if not noises:
            raise UserError("noise_folder: no noise recording is left after the choice of classes.")
        if not snrs:
            raise UserError("snrs: name at least one SNR in dB.")
        self.by_class: dict = {}
        for _, entry in sorted(noises.items()):
            self.by_class.setdefault(entry["class"], []).append(entry)
        self.classes = sorted(self.by_class)
        self.snrs = [float(snr) for snr in snrs]
        if any(math.isnan(snr) or snr == -math.inf for snr in self.snrs):
            raise UserError(f"snrs: {self.snrs} must be numbers in dB, or .inf for clean speech.")
        if not 0 <= filtered <= 1:
            raise UserError(f"noise_filtered: {filtered} must be a share from 0 to 1.")
        self.filtered = filtered

    def __call__(
        self,
        clean: torch.Tensor,
        rng: np.random.Generator,
        snr: float | None = None,
        target: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Mix ``clean`` [T] with noise drawn by ``rng``; ``snr`` fixes the SNR (in dB).

        Where ``clean`` is speech in a room, ``target`` [T] is what an enhancer is to make of it.

        Returns
        -------
        (torch.Tensor, torch.Tensor, dict)
            Mixture [T], clean signal or target [T], and ``{"snr", "noise_class"}``, both None if
            clean.
        """
        drawn = self.snrs[rng.integers(len(self.snrs))]  # drawn always: same noise for any snr
        snr = drawn if snr is None else float(snr)
        noise_class = self.classes[rng.integers(len(self.classes))]
        if math.isinf(snr):
            pair = (clean.clone(), clean) if target is None else below(PEAK, clean, target)
            return *pair, {"snr": None, "noise_class": None}
        entries = self.by_class[noise_class]
        for _ in range(20):
            entry = entries[rng.integers(len(entries))]
            noise = self._segment(entry, clean.shape[-1], rng)
            # Event sounds (a dog's bark) have silent stretches, where no SNR is defined.
            if not is_silent(noise):
                if self.filtered and rng.random() < self.filtered:
                    noise = random_filter(noise, rng)
                noisy, clean = mix_at_snr(clean, noise, snr, target=target)
                return noisy, clean, {"snr": snr, "noise_class": noise_class}
        raise UserError(
            f"{entry['wav']}: silent in 20 draws. Remove silent files from noise_folder."
        )

    @staticmethod
    def _segment(entry, length, rng):
        available = entry["frames"]
        if available >= length:
            start = entry["start"] + int(rng.integers(available - length + 1))
            return read_audio(entry["wav"], start, length)
        noise = read_audio(entry["wav"], entry["start"], available)
        noise = noise.roll(int(rng.integers(available)))
        return noise.repeat(-(-length // available))[:length]


class Interference:
    """Disturbs a share of the utterances: noise, or another speaker for a while.

    The augmentation with which WavLM is pre-trained (Chen et al., 2022, algorithm 1). As there, a
    second speaker is heard for half of the utterance at most, so that the first stays the main
    one, and the energy of the whole utterance counts in the ratio. Unlike there, noise is heard
    throughout.

    Arguments
    ---------
    probability : float
        Share of the utterances that are disturbed.
    mixer : NoiseMixer, optional
        Adds noise. Needed unless ``speech_share`` is 1.
    speech : dict, optional
        Manifest whose utterances interfere. Needed unless ``speech_share`` is 0.
    speech_share : float
        Share of the disturbed utterances that hear a second speaker instead of noise. Default: 0.
    speech_snrs : list of float
        Ratios of the first speaker to the second, in dB, equally likely.
    """

    def __init__(
        self,
        probability: float,
        mixer: NoiseMixer | None = None,
        speech: dict | None = None,
        speech_share: float = 0.0,
        speech_snrs: Sequence[float] = (0.0,),
    ):
        if probability and speech_share < 1 and mixer is None:
            raise UserError(
                "noise_folder: needed for noise_probability above 0 (or set speech_noise_share: 1)."
            )
        self.keys = list(speech or ()) if probability and speech_share else []
        self.speech = speech or {}
        if probability and speech_share and len({self.speech[k]["speaker"] for k in self.keys}) < 2:
            raise UserError(
                "speech_noise_share: needs speech of two speakers or more; set it to 0."
            )
        self.probability = probability
        self.mixer = mixer
        self.speech_share = speech_share
        self.speech_snrs = [float(snr) for snr in speech_snrs]

    def __call__(self, wav: torch.Tensor, speaker: str, rng: np.random.Generator) -> torch.Tensor:
        """``wav`` [T] of ``speaker``, disturbed or as it is, by draws from ``rng``."""
        if rng.random() >= self.probability or is_silent(wav):
            return wav
        if rng.random() >= self.speech_share:
            assert self.mixer is not None
            return self.mixer(wav, rng)[0]
        snr = self.speech_snrs[rng.integers(len(self.speech_snrs))]
        if math.isinf(snr):
            return wav
        length = int(rng.integers(1, len(wav) // 2 + 1))
        start = int(rng.integers(len(wav) - length + 1))
        other = torch.zeros_like(wav)
        piece = self._other_speech(speaker, length, rng)
        other[start : start + len(piece)] = piece
        # The ratio is one of powers where each is heard: mix_at_snr sees the second diluted.
        return mix_at_snr(wav, other, snr + 10 * math.log10(len(wav) / len(piece)))[0]

    def _other_speech(self, speaker, length, rng):
        """Up to ``length`` samples of another speaker, not silent."""
        for _ in range(100):
            entry = self.speech[self.keys[rng.integers(len(self.keys))]]
            if entry["speaker"] == speaker:
                continue
            total = round(entry["duration"] * SAMPLE_RATE)
            start = int(rng.integers(max(1, total - length + 1)))
            piece = read_audio(entry["wav"], start, min(length, total))
            if not is_silent(piece):
                return piece
        raise UserError("speech_noise_share: 100 draws found no speech of another speaker.")
