"""Where a training's numbers and examples go: a text file, TensorBoard, Weights & Biases."""

import hashlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from speechbrain.utils.distributed import main_process_only
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger, WandBLogger

from pi_finetune.data.audio import SAMPLE_RATE
from pi_finetune.errors import UserError
from pi_finetune.spectrograms import ALIGNMENT_HOP, expected_alignment, spectrogram

__all__ = ["train_loggers"]


#: An example is cut to this many seconds, so that a run's log stays small.
EXAMPLE_SECONDS = 5


def train_loggers(folder: str, wandb_project: str | None = None) -> list:
    """The loggers of a run, for use in YAML.

    Arguments
    ---------
    folder : str
        The run folder; gets ``train_log.txt`` and ``tensorboard/``.
    wandb_project : str, optional
        Project of Weights & Biases to log to as well. Default: none.

    Returns
    -------
    list

    Raises
    ------
    UserError
        ``wandb_project`` is set and wandb is not installed.
    """
    folder = Path(folder)
    loggers = [
        FileTrainLogger(str(folder / "train_log.txt")),
        UpdateTensorboardLogger(str(folder / "tensorboard")),
    ]
    if wandb_project is not None:
        loggers.append(_wandb_logger(folder, wandb_project))
    return loggers


def _wandb_logger(folder, project):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb_project: the package wandb is not installed; pip install wandb"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    return UpdateWandBLogger(
        wandb.init,
        project=project,
        name="/".join(folder.parts[-2:]),
        # one folder, one W&B run, also after a resume
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
    )


class UpdateTensorboardLogger(TensorboardLogger):
    """TensorBoard with the update as its axis.

    SpeechBrain's own logger counts calls and starts again from 1 after a resume.

    Arguments
    ---------
    save_dir : str
    """

    @main_process_only
    def log_stats(
        self,
        stats_meta: dict,
        train_stats: dict | None = None,
        valid_stats: dict | None = None,
        test_stats: dict | None = None,
        verbose: bool = False,
    ) -> None:
        """Write every number under its name and part, at step ``stats_meta["update"]``."""
        if "update" not in stats_meta:
            return
        parts = (("meta", stats_meta), ("train", train_stats), ("valid", valid_stats))
        for part, stats in parts:
            for name, value in (stats or {}).items():
                self.writer.add_scalar(f"{part}/{name}", value, stats_meta["update"])
        self.writer.flush()

    def log_example(self, update: int, name: str, wavs: dict) -> None:
        """Write one dev utterance: audio, spectrograms, and how soft-DTW aligns it.

        For the main process to call, which alone has a writer.

        The alignment is that of :func:`pi_finetune.spectrograms.expected_alignment`: enhanced
        speech against clean speech at 0.9 times the speed.

        Arguments
        ---------
        update : int
        name : str
            The utterance.
        wavs : dict
            ``noisy``, ``enhanced`` and ``clean``: np.ndarray [T] each, 16 kHz.
        """
        wavs = {kind: wav[: EXAMPLE_SECONDS * SAMPLE_RATE] for kind, wav in wavs.items()}
        for kind, wav in wavs.items():
            peak = max(1.0, np.abs(wav).max())
            self.writer.add_audio(f"{name}/{kind}", wav / peak, update, SAMPLE_RATE)
        levels = {kind: spectrogram(wav, SAMPLE_RATE) for kind, wav in wavs.items()}
        loudest = max(level.max() for level in levels.values())
        figure = Figure(figsize=(10, 6), layout="constrained")
        for axes, (kind, level) in zip(figure.subplots(len(levels), sharex=True), levels.items()):
            extent = (0, len(wavs[kind]) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000)
            axes.imshow(
                level, origin="lower", aspect="auto", extent=extent, vmin=loudest - 70, vmax=loudest
            )
            axes.set_ylabel(f"{kind} (kHz)")
        axes.set_xlabel("time (s)")
        self.writer.add_figure(f"{name}/spectrograms", figure, update)
        found, _, _ = expected_alignment(wavs["enhanced"], wavs["clean"], SAMPLE_RATE)
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        rows, columns = (ALIGNMENT_HOP * n for n in found.shape)
        axes.imshow(np.sqrt(found), origin="lower", aspect="auto", extent=(0, columns, 0, rows))
        axes.set_xlabel("clean, at 0.9 times the speed (s)")
        axes.set_ylabel("enhanced (s)")
        self.writer.add_figure(f"{name}/alignment", figure, update)
        self.writer.flush()


class UpdateWandBLogger(WandBLogger):
    """Weights & Biases with the update as its step."""

    @main_process_only
    def log_stats(
        self,
        stats_meta: dict,
        train_stats: dict | None = None,
        valid_stats: dict | None = None,
        test_stats: dict | None = None,
        verbose: bool = False,
    ) -> None:
        """Log all numbers at step ``stats_meta["update"]``."""
        stats_meta = {**stats_meta, "epoch": stats_meta.get("update")}  # its name for the step
        super().log_stats(stats_meta, train_stats, valid_stats, test_stats, verbose)
