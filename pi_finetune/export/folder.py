"""A run's best model, its card and what else others load, in one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pi_finetune.enhancers import load_enhancer, save_enhancer
from pi_finetune.errors import UserError
from pi_finetune.export.card import CARD_FILE, model_card
from pi_finetune.export.speechbrain import HPARAMS_FILE, MARK, write_speechbrain
from pi_finetune.export.traced import export_program, write_onnx
from pi_finetune.files import replacing, write_text
from pi_finetune.inference import find_model

__all__ = ["FORMATS", "export_run"]


FORMATS = ("speechbrain", "onnx", "torch")


ONNX_FILE, TORCH_FILE = "enhancer.onnx", "enhancer.pt2"


def export_run(
    run: str | Path,
    folder: str | Path,
    formats: Sequence[str] = ("speechbrain",),
    trust: bool = False,
    license: str | None = None,
) -> list[Path]:
    """Write a run's best model into a folder.

    Arguments
    ---------
    run : str or Path
        A run folder, or what else :func:`pi_finetune.inference.find_model` knows.
    folder : str or Path
        Where to; made if missing. An earlier export is replaced file by file.
    formats : sequence of str
        Of ``speechbrain`` (``hyperparams.yaml`` and ``enhancer.ckpt``), ``onnx``
        (``enhancer.onnx``) and ``torch`` (``enhancer.pt2``); see the functions here.
    trust : bool
        See :func:`pi_finetune.enhancers.load_enhancer`.
    license : str, optional
        Identifier for the model card, e.g. ``cc-by-4.0`` (default: none is stated).

    Returns
    -------
    list of Path
        The files in the folder.

    Raises
    ------
    UserError
        The run has no model, the folder belongs to something else, or the model cannot be
        had in a format.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise UserError(f"--format {min(unknown)}: choose from {', '.join(FORMATS)}.")
    source, folder = Path(find_model(run)), Path(folder)
    if not next(place for place in (folder, *folder.absolute().parents) if place.exists()).is_dir():
        raise UserError(f"{folder} cannot be a folder: a file of that name is in the way.")
    for name in (HPARAMS_FILE, CARD_FILE):
        path = folder / name
        if path.exists() and MARK.encode() not in path.read_bytes():
            raise UserError(f"{folder} holds a {name} that is no export's: name another folder.")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the run itself: name another folder with -o.")
    enhancer = load_enhancer(source, trust=trust)
    if "speechbrain" in formats:
        write_speechbrain(folder, enhancer)
    program: Any = export_program(enhancer) if {"onnx", "torch"} & set(formats) else None
    if "onnx" in formats:
        write_onnx(folder / ONNX_FILE, program)
    if "torch" in formats:
        with replacing(folder / TORCH_FILE) as path, path.open("wb") as file:
            torch.export.save(program, file)  # it warns of any path that does not end in .pt2
    save_enhancer(folder, enhancer)
    there = [name for name in (HPARAMS_FILE, ONNX_FILE, TORCH_FILE) if (folder / name).exists()]
    write_text(folder / CARD_FILE, str(model_card(source, enhancer, there, license)))
    return sorted(folder.iterdir())
