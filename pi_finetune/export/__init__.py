"""A trained enhancer in forms that others load: SpeechBrain, the hub, ONNX, ``torch.export``.

    pi-finetune export results/soft_dtw/1234 -o my-enhancer --format speechbrain onnx torch
    pi-finetune push results/soft_dtw/1234 OWNER/NAME --license cc-by-4.0 --dry_run

The folder always holds what :meth:`pi_finetune.inference.Enhancer.from_run` loads, and a model
card, so that it can be uploaded to the hub as it is.
"""

from pi_finetune.export.card import model_card
from pi_finetune.export.folder import FORMATS, export_run
from pi_finetune.export.hub import Pushed, push_run
from pi_finetune.export.speechbrain import WaveformModel, write_speechbrain
from pi_finetune.export.traced import export_program, write_onnx

__all__ = [
    "FORMATS",
    "Pushed",
    "WaveformModel",
    "export_program",
    "export_run",
    "model_card",
    "push_run",
    "write_onnx",
    "write_speechbrain",
]
