"""Speech enhancers: waveform in, waveform of the same length out.

Every enhancer is called ``enhancer(wavs, lengths)`` with wavs [B, T] (float32,
16 kHz) and lengths [B] in samples, and returns [B, T], zero beyond ``lengths``.
What an utterance is batched with does not change its output, any length is
taken, and no output is peak-normalised.

The compact mask network is the shipped default. The others are there so that a
result can be checked to hold for more than one kind of model.
"""

from pi_finetune.enhancers.base import SAMPLE_RATE, WaveformEnhancer, mixed
from pi_finetune.enhancers.conv_tasnet import ConvTasNet
from pi_finetune.enhancers.delayed import DelayedMaskEnhancer
from pi_finetune.enhancers.demucs import Demucs, load_denoiser_checkpoint
from pi_finetune.enhancers.mask import MaskEnhancer
from pi_finetune.enhancers.saving import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_text,
    load_enhancer,
    load_weights,
    save_enhancer,
)
from pi_finetune.enhancers.speechbrain import SPEECHBRAIN_FILE, SpeechBrainEnhancer
from pi_finetune.enhancers.unet import UNetEnhancer

__all__ = [
    "CONFIG_FILE",
    "SAMPLE_RATE",
    "SPEECHBRAIN_FILE",
    "WEIGHTS_FILE",
    "ConvTasNet",
    "DelayedMaskEnhancer",
    "Demucs",
    "MaskEnhancer",
    "SpeechBrainEnhancer",
    "UNetEnhancer",
    "WaveformEnhancer",
    "config_text",
    "load_denoiser_checkpoint",
    "load_enhancer",
    "load_weights",
    "mixed",
    "save_enhancer",
]
