"""An enhancer as SpeechBrain's ``WaveformEnhancement`` loads one."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import ruamel.yaml
import torch
from torch import nn

from pi_finetune import __version__
from pi_finetune.enhancers import (
    SAMPLE_RATE,
    SpeechBrainEnhancer,
)
from pi_finetune.files import replacing, write_text

if TYPE_CHECKING:
    from pi_finetune.enhancers.base import WaveformEnhancer

__all__ = ["HPARAMS_FILE", "MARK", "WaveformModel", "write_speechbrain"]


HPARAMS_FILE = "hyperparams.yaml"


MARK = "Written by pi_finetune export"  # in both files: an export may replace them


class WaveformModel(nn.Module):
    """An enhancer as SpeechBrain's ``WaveformEnhancement`` calls one.

    Arguments
    ---------
    enhancer : WaveformEnhancer
    """

    def __init__(self, enhancer: "WaveformEnhancer"):
        super().__init__()
        self.enhancer = enhancer

    def forward(self, wavs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the enhanced wavs [B, T], and None in the place of features."""
        return self.enhancer(wavs), None


def write_speechbrain(folder: str | Path, enhancer: "WaveformEnhancer") -> None:
    """Write what ``speechbrain.inference.enhancer.WaveformEnhancement.from_hparams`` loads.

    ``hyperparams.yaml`` names classes of this package, which therefore has to be installed where
    it is loaded. That of a :class:`SpeechBrainEnhancer` is its source's own, for the interface it
    was made for, with other weights.

    Arguments
    ---------
    folder : str or Path
        Made if missing.
    enhancer : WaveformEnhancer
    """
    head = f"# {MARK} {__version__}; where it is loaded, pi_finetune has to be installed.\n"
    if isinstance(enhancer, SpeechBrainEnhancer):
        head = f"# {MARK} {__version__}, after the model's own file.\n"
        text, weights = _with_new_weights(enhancer), enhancer.interface.mods.state_dict()
    else:
        model = _yaml({"enhancer": enhancer.config["arguments"] or None}).split("\n", 1)[1]
        text = _WAVEFORM_YAML.format(SAMPLE_RATE, enhancer.config["class"], model)
        weights = enhancer.state_dict()
    folder = Path(folder)
    with replacing(folder / "enhancer.ckpt") as path:
        torch.save(weights, path)
    write_text(folder / HPARAMS_FILE, head + text)


_WAVEFORM_YAML = """\
# from speechbrain.inference.enhancement import WaveformEnhancement
# WaveformEnhancement.from_hparams(source="this folder").enhance_file("noisy.wav", "enhanced.wav")
sample_rate: {}

enhancer: !new:{}
{}
modules:
    enhance_model: !new:pi_finetune.export.WaveformModel
        enhancer: !ref <enhancer>

# SpeechBrain looks for enhancer.ckpt beside this file.
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        enhancer: !ref <enhancer>
"""


def _with_new_weights(enhancer):
    """The YAML file of a model in SpeechBrain's format, changed to load ``enhancer.ckpt``."""
    tree = ruamel.yaml.YAML().load(enhancer.hparams_text)
    tree.pop("pretrainer", None)
    resynth = getattr(enhancer.interface.hparams, "resynth", None)
    if "normalize_wavs" in getattr(resynth, "keywords", {}):  # as SpeechBrainEnhancer calls it
        tree["resynth"]["normalize_wavs"] = False
    return (
        _yaml(tree)
        + """
fine_tuned: !new:torch.nn.ModuleDict
    modules: !ref <modules>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        enhancer: !ref <fine_tuned>
"""
    )


def _yaml(tree):
    stream = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.indent(mapping=4, sequence=4, offset=2)
    yaml.dump(tree, stream)
    return stream.getvalue()
