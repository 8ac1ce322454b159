"""What a soft-DTW problem is beside its costs: smoothing, band, penalties of steps, open ends."""

from typing import NamedTuple

__all__ = ["Recursion"]


class Recursion(NamedTuple):
    """Which paths count, and what they cost beside their cells.

    A path leads from (0, 0) to (n - 1, m - 1) by steps down (i + 1), right (j + 1) and diagonal
    (both). With `open_begin` it starts at any (0, j), with `open_end` it ends at any (n - 1, j).
    """

    gamma: float = 1.0  # 0 is hard DTW
    bandwidth: int | None = None  # half width of a Sakoe-Chiba band
    itakura: int | None = None  # largest slope of an Itakura parallelogram, in thousandths
    down: float = 0.0  # penalty of each such step
    right: float = 0.0
    diagonal: float = 0.0
    open_begin: bool = False
    open_end: bool = False
