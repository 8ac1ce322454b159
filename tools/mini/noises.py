"""Noises computed from a seed: coloured, hum, impulsive, music-like and babble.

Each function takes a generator, which alone decides the result, and a length in
seconds, and returns float32 samples [T] at 16 kHz of the level `LEVEL_DB`.
"""

import numpy as np
from scipy.signal import fftconvolve, lfilter

SAMPLE_RATE = 16000
LEVEL_DB = -26.0
PEAK = 0.9


def set_level(samples: np.ndarray, level_db: float = LEVEL_DB, peak: float = PEAK) -> np.ndarray:
    """Scale ``samples`` [T] to an RMS of ``level_db`` dBFS, or less where the peak forbids it."""
    rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    gain = min(10 ** (level_db / 20) / rms, peak / np.abs(samples).max())
    return (samples * gain).astype(np.float32)


def colored(rng: np.random.Generator, seconds: float, exponent: float, drift_db=0.0) -> np.ndarray:
    """Gaussian noise with power spectrum 1 / f^exponent above 20 Hz, flat below.

    Arguments
    ---------
    rng : numpy.random.Generator
        Where the draws come from.
    seconds : float
        Length.
    exponent : float
        0 is white, 1 pink, 2 brown (-3.01 dB per octave and unit).
    drift_db : float
        Standard deviation of a slow wandering of the level, in dB (default 0).
    """
    count = round(seconds * SAMPLE_RATE)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(frequency, 20.0) ** (-exponent / 2)
    spectrum[0] = 0
    return set_level(np.fft.irfft(spectrum, count) * _wander(rng, seconds, drift_db))


def hum(rng: np.random.Generator, seconds: float, mains: float = 50.0) -> np.ndarray:
    """The buzz of electric machines: harmonics of ``mains`` Hz up to 3.5 kHz, over faint noise.

    The power falls by 4 to 9 dB per octave, each harmonic has a strength and a slow
    wandering of its own, and the mains frequency itself wanders by some 0.1 %.
    """
    frequency = mains * _wander(rng, seconds, 0.01)
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    tilt = rng.uniform(4, 9)
    samples = np.zeros(len(phase))
    for harmonic in range(1, int(3500 / mains) + 1):
        level_db = -tilt * np.log2(harmonic) + rng.normal(0, 4)
        tone = np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
        samples += 10 ** (level_db / 20) * _wander(rng, seconds, 1.0) * tone
    floor = colored(rng, seconds, 1.0)
    return set_level(set_level(samples) + 10 ** (-25 / 20) * floor)


def impulsive(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Knocks, clicks and clatter at random moments, two to seven a second, over faint noise.

    A recording has four kinds of blow, each a few damped resonances and a burst of
    noise that decays in 10 to 120 ms. The floor, 30 dB below, leaves no moment of digital silence.
    """
    count = round(seconds * SAMPLE_RATE)
    samples = np.zeros(count)
    per_second = rng.uniform(2, 7) / 4
    for _ in range(4):
        decay = np.exp(rng.uniform(np.log(0.01), np.log(0.12)))
        time = np.arange(round(6 * decay * SAMPLE_RATE)) / SAMPLE_RATE
        blow = 0.5 * rng.standard_normal(len(time)) * np.exp(-3 * time / decay)
        for frequency in np.exp(rng.uniform(np.log(200), np.log(6000), size=3)):
            ring = np.exp(-time / (decay * rng.uniform(0.5, 1)))
            blow += ring * np.sin(2 * np.pi * frequency * time)
        moments = np.zeros(count)
        blows = max(1, rng.poisson(per_second * seconds))
        at = rng.integers(count, size=blows)
        moments[at] = np.exp(rng.normal(0, 0.5, size=blows)) * rng.choice([-1, 1], size=blows)
        samples += fftconvolve(moments, blow / np.sqrt(np.sum(blow**2)))[:count]
    return set_level(set_level(samples) + 10 ** (-30 / 20) * colored(rng, seconds, 1.0))


def music(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Plucked strings: bass, chords and a melody in a random key and tempo, with a soft beat.

    Strings are those of Karplus and Strong (1983): a burst of noise in a delay line
    with a two-point average in its loop.
    """
    count = round(seconds * SAMPLE_RATE)
    beat = 60 / rng.uniform(80, 140)
    key = rng.integers(45, 57)  # MIDI note of the tonic, A2 to G#3
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if rng.random() < 0.5 else [0, 2, 3, 5, 7, 8, 10])

    def note(degree):
        return key + 12 * (degree // 7) + scale[degree % 7]

    samples = np.zeros(count)

    def add(at, sound, gain):
        start = round(at * SAMPLE_RATE)
        sound = sound[: count - start]
        samples[start : start + len(sound)] += gain * sound

    degree = 7
    for step in range(int(seconds / (beat / 2))):
        at = step * beat / 2
        if step % 8 == 0:
            root = int(rng.choice([0, 3, 4, 5]))
            add(at, _pluck(rng, note(root) - 12, 4 * beat), 1.0)
            for member in (0, 2, 4):
                add(at + 0.02 * member, _pluck(rng, note(root + member), 4 * beat), 0.6)
        if rng.random() < 0.7:
            degree = int(np.clip(degree + rng.integers(-2, 3), 4, 13))
            add(at, _pluck(rng, note(degree), rng.choice([0.5, 1, 2]) * beat), 0.8)
        if step % 2:
            hiss = rng.standard_normal(800) * np.exp(-np.arange(800) / 150)
            add(at, np.diff(hiss, prepend=0), 0.05)
    return set_level(samples + 10 ** (-45 / 20) * rng.standard_normal(count) * samples.std())


def babble(rng: np.random.Generator, seconds: float, talkers: list[np.ndarray]) -> np.ndarray:
    """Several people talking at once.

    Arguments
    ---------
    rng : numpy.random.Generator
        Draws each talker's level (0 to -6 dB) and the place in the recording to begin at.
    seconds : float
        Length.
    talkers : list of numpy.ndarray
        One stretch of speech [T] at 16 kHz per talker; a short one is repeated.

    Raises
    ------
    ValueError
        Where there is no talker.
    """
    if not talkers:
        raise ValueError("babble needs at least one talker")
    count = round(seconds * SAMPLE_RATE)
    samples = np.zeros(count)
    for talker in talkers:
        turned = np.roll(talker, rng.integers(len(talker)))
        level_db = LEVEL_DB - rng.uniform(0, 6)
        samples += np.resize(set_level(turned, level_db), count)
    return set_level(samples)


def _pluck(rng, midi, seconds):
    """One string's note: float64 [T], decaying, with 10 ms of fading at its end."""
    delay = SAMPLE_RATE / (440 * 2 ** ((midi - 69) / 12)) - 0.5
    whole, part = int(delay), delay % 1
    burst = np.zeros(round(seconds * SAMPLE_RATE))
    burst[:whole] = rng.uniform(-1, 1, size=min(whole, len(burst)))
    # The average y[n-N]/2 + y[n-N-1]/2, moved by a fraction of a sample to be in tune.
    loop = np.zeros(whole + 3)
    loop[0] = 1
    loop[whole:] = -0.996 * 0.5 * np.array([1 - part, 1.0, part])
    sound = lfilter([1.0], loop, burst)
    sound[-160:] *= np.linspace(1, 0, 160)
    return sound


def _wander(rng, seconds, std_db):
    """A slowly changing gain [T] around 1: two independent values a second, joined by lines."""
    knots = rng.normal(0, std_db, size=int(2 * seconds) + 2)
    moments = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return 10 ** (np.interp(2 * moments, np.arange(len(knots)), knots) / 20)
