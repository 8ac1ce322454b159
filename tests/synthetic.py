"""Audio files and tiny models for the tests."""

import numpy as np
import torch
from speechbrain.dataio import audio_io


def voice(seconds, pitch, rng):
    """A buzz with syllables and formants: enough speech for PESQ, STOI and a teacher to accept."""
    time = np.arange(int(seconds * 16000)) / 16000
    wav = sum(
        np.sin(2 * np.pi * pitch * k * time) * np.exp(-(((pitch * k - f) / 300) ** 2))
        for k in range(1, 25)
        for f in rng.uniform(300, 3000, size=3)
    )
    wav = wav * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time + rng.uniform(0, 6)))
    wav = wav + 0.01 * rng.standard_normal(len(time))
    return (0.3 * wav / np.abs(wav).max()).astype(np.float32)


def write_audio(path, wav, rate=16000):
    """Write [T] or [C, T] as the suffix of ``path`` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio_io.save(str(path), torch.as_tensor(np.atleast_2d(wav)), rate)


def save_tiny_teacher(folder, seed=0):
    """Save a randomly initialised HuBERT of the layer-norm type as ``transformers`` does."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(seed)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


def save_tiny_enhancer(folder, seed=0):
    """Save an enhancer with random weights, and the YAML block that declares it."""
    from pi_finetune.enhancers import MaskEnhancer, save_enhancer

    torch.manual_seed(seed)
    save_enhancer(folder, MaskEnhancer(channels=(4, 4), dim=8, dilations=(1, 2)))
    (folder / "block.yaml").write_text(
        "!new:pi_finetune.enhancers.MaskEnhancer\nchannels: [4, 4]\ndim: 8\ndilations: [1, 2]\n"
    )
    return folder
