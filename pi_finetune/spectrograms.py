"""Spectrograms of a waveform, and how soft-DTW aligns two of them: what logs and reports show."""

import numpy as np
import torch
from scipy import signal
from torchaudio.transforms import MelSpectrogram

from pi_finetune.soft_dtw import alignment

__all__ = ["ALIGNMENT_HOP", "expected_alignment", "spectrogram"]


#: Frames of an example's alignment: 20 ms, as of the usual teachers.
ALIGNMENT_HOP = 0.02


def spectrogram(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Magnitudes in dB [257, F]: 32 ms Hann window, 10 ms hop."""
    window = signal.get_window("hann", 512)
    transform = signal.ShortTimeFFT(window, sample_rate // 100, sample_rate)
    wav = np.asarray(wav, np.float64)
    if len(wav) < 256:
        wav = np.pad(wav, (0, 256 - len(wav)))
    return 20 * np.log10(np.abs(transform.stft(wav)) + 1e-7)


def expected_alignment(
    enhanced: np.ndarray,
    clean: np.ndarray,
    sample_rate: int,
    speed: float = 0.9,
    gamma: float = 0.1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected soft-DTW alignment of enhanced speech with clean speech at another speed.

    The features are log-mel instead of a teacher's, mean-free and L2-normalised: enough to show
    what the loss does, with no model at hand.

    Arguments
    ---------
    enhanced, clean : np.ndarray
        [T] each.
    sample_rate : int
        Hz.
    speed : float
        Factor by which the clean side is sped up, by resampling. Default: 0.9.
    gamma : float
        Softness. Default: 0.1.

    Returns
    -------
    (np.ndarray, np.ndarray, np.ndarray)
        Alignment [N, M], features of both sides [N, 40] and [M, 40]; frames of 20 ms.
    """
    changed = signal.resample_poly(clean, 100, round(100 * speed))
    features = [_log_mel(wav, sample_rate) for wav in (enhanced, changed)]
    unit = []
    for x in features:
        x = x - x.mean(0)
        unit.append(
            torch.from_numpy(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6))
        )
    found = alignment(unit[0][None], unit[1][None], gamma=gamma, backend="reference")[0]
    return found.numpy(), *features


def _log_mel(wav, sample_rate, bands=40):
    hop = round(ALIGNMENT_HOP * sample_rate)
    mel = MelSpectrogram(sample_rate, n_fft=512, hop_length=hop, n_mels=bands)
    power = mel(torch.as_tensor(np.asarray(wav), dtype=torch.float32))
    level = 10 * torch.log10(power + 1e-10)
    return level.clamp(min=level.max() - 60).T.numpy()
