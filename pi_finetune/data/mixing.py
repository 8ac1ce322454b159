"""Noise mixing at an exact SNR, with a clean target scaled like the mixture."""

import math

import numpy as np
import torch

from pi_finetune.data.audio import SAMPLE_RATE, is_silent, read_audio
from pi_finetune.errors import UserError


def mix_at_snr(clean, noise, snr, peak=0.99):
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

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        The mixture and the clean signal, [T] each.
    """
    gain = (clean.square().mean() / noise.square().mean() / 10 ** (snr / 10)).sqrt()
    noisy = clean + gain * noise
    scale = min(1.0, peak / float(noisy.abs().max()))
    return noisy * scale, clean * scale


def random_filter(wav, rng, depth=12.0, knots=6):
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

    def __init__(self, noises, snrs, filtered=0.0):
        if not noises:
            raise UserError("noise_folder: no noise recording is left after the choice of classes.")
        if not snrs:
            raise UserError("snrs: name at least one SNR in dB.")
        self.by_class = {}
        for _, entry in sorted(noises.items()):
            self.by_class.setdefault(entry["class"], []).append(entry)
        self.classes = sorted(self.by_class)
        self.snrs = [float(snr) for snr in snrs]
        if any(math.isnan(snr) or snr == -math.inf for snr in self.snrs):
            raise UserError(f"snrs: {self.snrs} must be numbers in dB, or .inf for clean speech.")
        if not 0 <= filtered <= 1:
            raise UserError(f"noise_filtered: {filtered} must be a share from 0 to 1.")
        self.filtered = filtered

    def __call__(self, clean, rng, snr=None):
        """Mix ``clean`` [T] with noise drawn by ``rng``; ``snr`` fixes the SNR (in dB).

        Returns
        -------
        (torch.Tensor, torch.Tensor, dict)
            Mixture [T], clean signal [T], and ``{"snr", "noise_class"}``, both None if clean.
        """
        drawn = self.snrs[rng.integers(len(self.snrs))]  # drawn always: same noise for any snr
        snr = drawn if snr is None else float(snr)
        noise_class = self.classes[rng.integers(len(self.classes))]
        if math.isinf(snr):
            return clean.clone(), clean, {"snr": None, "noise_class": None}
        entries = self.by_class[noise_class]
        for _ in range(20):
            entry = entries[rng.integers(len(entries))]
            noise = self._segment(entry, clean.shape[-1], rng)
            # Event sounds (a dog's bark) have silent stretches, where no SNR is defined.
            if not is_silent(noise):
                if self.filtered and rng.random() < self.filtered:
                    noise = random_filter(noise, rng)
                noisy, clean = mix_at_snr(clean, noise, snr)
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
