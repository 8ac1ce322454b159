"""Linear projections of both branches between teacher and distance.

A projection maps representations [B, N, D] to [B, N, E], frame by frame and both branches alike.
:class:`LearnedProjection` is trained with the enhancer; :class:`PositionRemoval` takes out the
subspace that carries position, which it measures before training.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pi_finetune.data.audio import SAMPLE_RATE, read_audio
from pi_finetune.distributed import on_main
from pi_finetune.errors import UserError
from pi_finetune.files import replacing
from pi_finetune.lengths import Waveforms
from pi_finetune.seeding import utterance_rng

if TYPE_CHECKING:
    from pi_finetune.data.loading import SpeechPairs
    from pi_finetune.teacher import Teacher

__all__ = [
    "POSITION_FILE",
    "LearnedProjection",
    "PositionRemoval",
    "Projection",
    "position_subspace",
]

#: Of a run folder: the subspace, and how it was found.
POSITION_FILE = "position.safetensors"


class Projection(nn.Module):
    """What a projection has to offer; by itself it changes nothing."""

    def fit_to(self, teacher: "Teacher") -> None:
        """Take the width of a teacher; called when it is made."""

    def measure(self, teacher: "Teacher", pairs: "SpeechPairs", folder: str | Path) -> None:
        """Measure on training speech what is needed; called once before training."""

    def forward(self, reps: Tensor) -> Tensor:
        """[B, N, D] to [B, N, E]."""
        return reps


class LearnedProjection(Projection):
    """A linear map to ``dim`` dimensions, trained with the enhancer and kept in its checkpoints.

    The objective can then be lowered by mapping all to one point, which a temporal regulariser
    forbids: :class:`~pi_finetune.objectives.SoftDTWLAVDistance`.

    Arguments
    ---------
    dim : int
        Default: 256, as in LASER's code (Meghanani & Hain, Interspeech 2024).
    """

    def __init__(self, dim: int = 256):
        super().__init__()
        if dim < 1:
            raise UserError(f"dim: got {dim}, needed is the number of dimensions, 1 or more.")
        self.dim = dim
        self.linear: nn.Linear | None = None

    def fit_to(self, teacher: "Teacher") -> None:
        self.linear = nn.Linear(teacher.dim, self.dim)

    def forward(self, reps: Tensor) -> Tensor:
        if self.linear is None:
            raise ValueError("the projection knows no teacher yet: call fit_to, or load_teachers")
        return self.linear(reps)


class PositionRemoval(Projection):
    """Takes out of representations the subspace that carries position.

    Position is what is left of representations when content is averaged out. Each utterance is
    cut to ``seconds`` and rotated (its end moved to its beginning) by ``rotations`` amounts, evenly
    spaced from a random one, in whole hops. Over them, every frame index hears the same content, so
    means per frame index differ by position alone, and by what the average leaves of content. Two
    halves of the utterances share the former and not the latter: see :func:`position_subspace`.

    The subspace is kept in the run folder and reused when the run is resumed.

    Arguments
    ---------
    seconds : float
        Positions up to here are looked at; shorter utterances are left out. Default: 3.
    utterances : int
        Used at most. Default: 50.
    rotations : int
        Of each. Default: 16.
    explained : float
        Share of the variance by position that is taken out. Default: 0.95.
    min_reliability : float
        Correlation of the two halves' means below which position counts as not found.
        Default: 0.5.
    seed : int
        Draws utterances, crops and rotations. Default: 0.

    Raises
    ------
    UserError
        Position cannot be found; too little speech; the folder's file has other settings.
    """

    basis: Tensor | None

    def __init__(
        self,
        seconds: float = 3.0,
        utterances: int = 50,
        rotations: int = 16,
        explained: float = 0.95,
        min_reliability: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        if seconds is None or seconds <= 0 or utterances < 2 or rotations < 1:
            raise UserError(
                f"seconds {seconds}, utterances {utterances}, rotations {rotations}: needed are a "
                "length above 0, 2 utterances or more, and 1 rotation or more."
            )
        if not 0 < explained <= 1:
            raise UserError(f"explained: got {explained}, needed is a share above 0, to 1.")
        self.settings: dict[str, Any] = {
            "seconds": float(seconds),
            "utterances": utterances,
            "rotations": rotations,
            "explained": float(explained),
            "min_reliability": float(min_reliability),
            "seed": seed,
        }
        # A file of its own keeps it: the state of a module that is loaded has to be there before.
        self.register_buffer("basis", None, persistent=False)

    def measure(self, teacher: "Teacher", pairs: "SpeechPairs", folder: str | Path) -> None:
        path = Path(folder) / POSITION_FILE
        basis = on_main(self._read_or_make, path, teacher, pairs)
        self.basis = basis.to(next(teacher.encoder.parameters()).device)

    def forward(self, reps: Tensor) -> Tensor:
        if self.basis is None:
            raise UserError(
                "the subspace of position is not measured yet; training does it, by "
                "measure_projections(objective, pairs, folder)."
            )
        basis = self.basis.to(reps)
        return reps - (reps @ basis) @ basis.T

    def _read_or_make(self, path: Path, teacher: "Teacher", pairs: "SpeechPairs") -> Tensor:
        made_by = json.dumps(
            {**self.settings, "teacher": teacher.source, "layers": teacher.layers}, sort_keys=True
        )
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    before, basis = file.metadata()["made_by"], file.get_tensor("basis")
            except (SafetensorError, KeyError, TypeError, OSError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}). Remove it, and it is made anew."
                ) from error
            if before != made_by:
                raise UserError(
                    f"{path}: made with {before}, and now it is {made_by}. Give this run another "
                    "place with --results_folder."
                )
            return basis
        halves = self.mean_frames(teacher, pairs)
        try:
            basis, found = position_subspace(
                *halves, self.settings["explained"], self.settings["min_reliability"]
            )
        except UserError as error:
            raise UserError(
                f"teacher '{teacher.source}', layers {teacher.layers}: {error}"
            ) from None
        tensors = {
            "basis": basis.float().contiguous(),
            "variances": found["variances"].float().contiguous(),
        }
        facts = {"made_by": made_by, "reliability": f"{found['reliability']:.4f}"}
        with replacing(path) as temporary:
            save_file(tensors, temporary, facts)
        return tensors["basis"]

    @torch.no_grad()
    def mean_frames(self, teacher: "Teacher", pairs: "SpeechPairs") -> tuple[Tensor, Tensor]:
        """Means per frame index over two halves of the speech, [F, D] each, in float64."""
        size = int(self.settings["seconds"] * SAMPLE_RATE) // teacher.hop * teacher.hop
        seed, rotations = int(self.settings["seed"]), int(self.settings["rotations"])
        long_enough = [
            (key, entry)
            for key, entry in pairs.manifest.items()
            if round(entry["duration"] * SAMPLE_RATE) >= size
        ]
        if len(long_enough) < 2:
            raise UserError(
                f"position: of {len(pairs.manifest)} training utterances {len(long_enough)} have "
                f"{self.settings['seconds']:g} s; at least 2 are needed, and better fifty. "
                "Lower position_seconds, or give more speech."
            )
        order = utterance_rng(seed, 0, "", "position").permutation(len(long_enough))
        chosen = [long_enough[i] for i in order[: self.settings["utterances"]]]
        device = next(teacher.encoder.parameters()).device
        sums: list[Any] = [0.0, 0.0]
        counts = [0, 0]
        for i, (key, entry) in enumerate(chosen):
            rng = utterance_rng(seed, 0, key, "position")
            start = int(rng.integers(round(entry["duration"] * SAMPLE_RATE) - size + 1))
            wav = read_audio(entry["wav"], start, size)
            first, hops = int(rng.integers(size // teacher.hop)), size // teacher.hop
            moves = [(first + r * hops // rotations) % hops for r in range(rotations)]
            rotated = torch.stack([wav.roll(move * teacher.hop) for move in moves])
            reps, _ = teacher(Waveforms.of(rotated.to(device)))
            sums[i % 2] = sums[i % 2] + reps.double().mean(0).cpu()
            counts[i % 2] += 1
        return sums[0] / counts[0], sums[1] / counts[1]


def position_subspace(
    a: Tensor, b: Tensor, explained: float = 0.95, min_reliability: float = 0.5
) -> tuple[Tensor, dict[str, Any]]:
    """The directions in which means per frame index differ, from two independent estimates.

    With A and B the means less their mean over frames, (A'B + B'A) / 2F has the covariance of
    position as its expectation, since what the two halves have of content is independent. Its
    leading eigenvectors are kept until their eigenvalues reach ``explained`` of the trace.

    Arguments
    ---------
    a, b : Tensor
        [F, D], means over different utterances.
    explained : float
        Share of the variance, above 0, to 1. Default: 0.95.
    min_reliability : float
        Least correlation of A and B. Default: 0.5.

    Returns
    -------
    (Tensor, dict)
        Orthonormal basis [D, R]; and ``variances`` [R] and ``reliability``, the correlation.

    Raises
    ------
    UserError
        The estimates do not agree, so that no position is found.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    scale = a.norm() * b.norm()
    reliability = float((a * b).sum() / scale) if scale > 0 else 0.0
    if not reliability >= min_reliability:  # also where it is not a number
        raise UserError(
            "its position cannot be found: means per frame index over two halves of the speech "
            f"correlate by {reliability:.2f}, needed is {min_reliability:g}. Either these layers "
            "carry none (then mse compares no position), or it takes more utterances or rotations "
            "(position_utterances, position_rotations)."
        )
    covariance = (a.T @ b + b.T @ a) / (2 * len(a))
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    wanted = explained * float(values.sum()) * (1 - 1e-9)
    rank = int((values.cumsum(0) < wanted).sum()) + 1
    rank = min(rank, int((values > 0).sum()))
    return vectors[:, :rank], {"variances": values[:rank], "reliability": reliability}
