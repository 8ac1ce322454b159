"""Figures of the report: SVG that takes its colours from the page, and small spectrogram images.

Figures are drawn by matplotlib in placeholder colours, which are then replaced by CSS variables
(``--series-0`` .. ``--series-9``, ``--grid``) and ``currentColor``, so that one SVG serves a light
and a dark page.
"""

import io
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pi_finetune.spectrograms import spectrogram

if TYPE_CHECKING:
    from pi_finetune.results.statistics import Interval

__all__ = ["SERIES", "Line", "alignment_chart", "interval_chart", "line_chart", "spectrogram_image"]


SERIES = 10
_MARKERS = "osD^vPX<>*"
_INK, _GRID = "#010203", "#040506"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "pi_finetune",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_numbers = itertools.count()


@dataclass
class Line:
    """A curve: a label, points [V], and its place in the palette; ``thin`` ones have no label."""

    label: str
    x: np.ndarray
    y: np.ndarray
    series: int
    thin: bool = False


def line_chart(lines: list[Line], x_label: str, y_label: str, title: str) -> str:
    """Curves over a common axis.

    Arguments
    ---------
    lines : list of Line
    x_label, y_label : str
        Axis labels with units.
    title : str
        What the chart shows, for screen readers.

    Returns
    -------
    str
        An ``<svg>`` element.
    """

    def draw(figure):
        axes = figure.add_subplot()
        for line in lines:
            style: dict = {"linewidth": 0.8, "alpha": 0.35}
            if not line.thin:
                marker = _MARKERS[line.series % len(_MARKERS)]
                style = {"linewidth": 1.8, "marker": marker, "markersize": 4.5, "label": line.label}
            axes.plot(line.x, line.y, color=_placeholder(line.series), **style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6))

    return _svg(draw, title, (4.6, 3.1))


def interval_chart(rows: "list[tuple[str, Interval, int]]", x_label: str, title: str) -> str:
    """Estimates with intervals, one under the other, against a line at 0.

    Arguments
    ---------
    rows : list of (str, Interval, int)
        Label, interval and place in the palette.
    x_label : str
        Axis label with unit.
    title : str
        What the chart shows, for screen readers.

    Returns
    -------
    str
        An ``<svg>`` element.
    """

    def draw(figure):
        axes = figure.add_subplot()
        axes.axvline(0, color=_INK, linewidth=1)
        for i, (_, interval, series) in enumerate(rows):
            colour = _placeholder(series)
            if np.isfinite(interval.low):
                axes.plot([interval.low, interval.high], [i, i], color=colour, linewidth=2.5)
            marker = _MARKERS[series % len(_MARKERS)]
            axes.plot([interval.estimate], [i], marker, color=colour, markersize=7)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)

    return _svg(draw, title, (4.6, 0.9 + 0.32 * len(rows)))


def alignment_chart(
    alignment: np.ndarray,
    x_features: np.ndarray,
    y_features: np.ndarray,
    hop_seconds: float,
    x_label: str,
    y_label: str,
    title: str,
) -> str:
    """An expected alignment with the features of both sides along its edges.

    A dashed line marks equal times on both sides.

    Arguments
    ---------
    alignment : np.ndarray
        [N, M], values from 0 to 1.
    x_features, y_features : np.ndarray
        [N, D] and [M, D], e.g. log-mel.
    hop_seconds : float
        Seconds per frame.
    x_label, y_label : str
        What the N and the M frames are.
    title : str
        What the chart shows, for screen readers.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    alignment = np.asarray(alignment)
    ends = hop_seconds * np.array(alignment.shape)

    def draw(figure):
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 5), height_ratios=(5, 1))
        main = figure.add_subplot(grid[0, 1])
        side = figure.add_subplot(grid[0, 0], sharey=main)
        below = figure.add_subplot(grid[1, 1], sharex=main)
        options = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        extent = (0, ends[1], 0, ends[0])
        # The square root shows where probability is spread thin.
        main.imshow(np.sqrt(alignment), cmap="magma", extent=extent, vmin=0, vmax=1, **options)
        main.plot([0, ends.min()], [0, ends.min()], "--", color="#dddddd", linewidth=0.8)
        side.imshow(x_features, cmap="magma", extent=(0, 1, 0, ends[0]), **options)
        below.imshow(y_features.T, cmap="magma", extent=(0, ends[1], 0, 1), **options)
        for axes in (main, side, below):
            axes.grid(visible=False)
        main.tick_params(labelleft=False, labelbottom=False)
        side.set_xticks([])
        below.set_yticks([])
        side.set_ylabel(x_label)
        below.set_xlabel(y_label)

    return _svg(draw, title, (5.4, 5.0))


def _placeholder(series):
    return f"#0a0b{series % SERIES:02x}"


def _svg(draw, title, size):
    """Draw a figure and make its SVG fit to stand in a page among others."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda m: f"var(--series-{int(m[1], 16)})", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    prefix = f"f{next(_numbers)}-"  # ids are the page's, not the figure's
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    # A numeric width would not shrink on a phone; viewBox keeps the proportions.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = round(size[0] * 96)
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{label}" style="max-width:{width}px"', 1
    ).strip()


def spectrogram_image(
    wav: np.ndarray,
    sample_rate: int,
    loudest: float,
    dynamic_range: float = 70.0,
    width: int = 480,
    height: int = 160,
) -> bytes:
    """A spectrogram as a WebP image, low frequencies at the bottom.

    Arguments
    ---------
    wav : np.ndarray
        [T].
    sample_rate : int
        Hz.
    loudest : float
        dB of the brightest colour: one value for all images that are to be compared.
    dynamic_range : float
        dB from brightest to darkest. Default: 70.
    width, height : int
        Pixels.

    Returns
    -------
    bytes
    """
    level = (spectrogram(wav, sample_rate) - loudest) / dynamic_range + 1
    colours = matplotlib.colormaps["magma"](np.clip(level[::-1], 0, 1))[..., :3]
    image = Image.fromarray((255 * colours).astype(np.uint8))
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BILINEAR).save(out, "WEBP", quality=55)
    return out.getvalue()
