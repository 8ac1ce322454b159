"""Figures and report section of the position diagnostics, from their JSON lines."""

import base64
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pi_finetune.files import replacing
from pi_finetune.report import tables
from pi_finetune.results.runs import read_json_lines

__all__ = ["DIAGNOSTICS", "position_section", "summary_rows", "write_figures"]


_STYLE: Any = {
    "svg.hashsalt": "pi_finetune",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Okabe & Ito's palette, told apart with any colour vision; markers for print.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
#: More layers than this share a colour bar instead of a legend.
_LEGEND_LAYERS = 8
#: Rows of a table in the report; more are cut off, and said so.
_MAX_ROWS = 200

#: {diagnostic: (title, what the figure and its table say)}, in the order of the report.
DIAGNOSTICS = {
    "shift": (
        "Shift curve",
        "Distance between the representation of speech and of the same speech moved later by "
        "zeros, on the same content frames, over the distance between random frames of different "
        "utterances. 0: position does not matter; 1: as far as unrelated speech.",
    ),
    "similarity": (
        "Content-free similarity",
        "Mean centred cosine similarity of frames of different utterances against the offset of "
        "their positions. A peak at 0 s is similarity that no content explains; the table gives "
        "its height over large offsets.",
    ),
    "probe": (
        "Position probe",
        "Held-out R² of a linear map from a frame to its index and to its distance from the end, "
        "and of the same with positions shuffled within each utterance.",
    ),
    "share": (
        "Share of the objective that is position",
        "Fall of the objective when an unrelated utterance moves from an unequal to the equal "
        "position, over the fall when the right content takes its place. Bars: 95 % bootstrap "
        "intervals over pairs of utterances.",
    ),
    "gradients": (
        "Agreement of gradients",
        "Cosine between the expected gradients of two objectives with respect to the enhancer, "
        "where training starts. 1: both pull it the same way; 0: at right angles. In the table: "
        "95 % bootstrap intervals over batches, and the part of one batch's squared gradient that "
        "is signal.",
    ),
    "causal": (
        "Training without content",
        "Fall of the objective on held-out mixtures after equally long training with targets "
        "from another utterance, and with those at random positions, over the fall with matched "
        "targets. Their difference is what position won. Bars: 95 % bootstrap intervals over "
        "utterances.",
    ),
}


def write_figures(folder: str | Path) -> list[Path]:
    """Draw a PNG and an SVG for every diagnostic whose lines are in a folder.

    Arguments
    ---------
    folder : str or Path
        With ``shift.jsonl``, ``similarity.jsonl``, ...; figures go beside them.

    Returns
    -------
    list of Path
        The files written.
    """
    draw = {
        "shift": _draw_shift,
        "similarity": _draw_similarity,
        "probe": _draw_probe,
        "share": _draw_share,
        "gradients": _draw_gradients,
        "causal": _draw_causal,
    }
    written = []
    for name, path in _present(folder):
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(5.2, 3.3), layout="constrained")
            axes = figure.add_subplot()
            draw[name](axes, read_json_lines(path))
            axes.set_title(DIAGNOSTICS[name][0], fontsize=10)
            for suffix, metadata in ((".svg", {"Date": None}), (".png", None)):
                target = path.with_suffix(suffix)
                with replacing(target) as temporary:
                    figure.savefig(temporary, format=suffix[1:], dpi=160, metadata=metadata)
                written.append(target)
    return written


def _present(folder):
    for name in DIAGNOSTICS:
        path = Path(folder) / f"{name}.jsonl"
        if path.is_file() and read_json_lines(path):
            yield name, path


def _column(records, key):
    """Numbers for matplotlib, which leaves NaN out."""
    return [float("nan") if record[key] is None else record[key] for record in records]


def _place(layer):
    """Where a layer stands on an axis: "cnn", which is before all others, one before layer 0."""
    return -1 if layer == "cnn" else layer


def _layer_lines(axes, records, x, y):
    """A curve per layer, dark for the first and light for the last."""
    layers = sorted({record["layer"] for record in records}, key=_place)
    first, last = _place(layers[0]), _place(layers[-1])
    scale = Normalize(first, first + max(last - first, 1) * 1.1)
    colours = matplotlib.colormaps["viridis"]
    for layer in layers:
        own = [record for record in records if record["layer"] == layer]
        colour = colours(scale(_place(layer)))
        label = f"layer {layer}"
        axes.plot(_column(own, x), _column(own, y), color=colour, linewidth=1.5, label=label)
        if "low" in own[0]:
            axes.fill_between(
                _column(own, x), _column(own, "low"), _column(own, "high"),
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
    if len(layers) <= _LEGEND_LAYERS:
        axes.legend()
    else:
        axes.figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="layer")


def _draw_shift(axes, records):
    _layer_lines(axes, records, "shift", "ratio")
    axes.set(xlabel="shift (s)", ylabel="distance / unrelated", ylim=(0, None))


def _draw_similarity(axes, records):
    _layer_lines(axes, records, "offset", "similarity")
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set(xlabel="offset of positions (s)", ylabel="mean similarity")


def _draw_probe(axes, records):
    for i, (target, label) in enumerate(
        (("index", "frame index"), ("to_end", "frames to the end"))
    ):
        own = [record for record in records if record["target"] == target]
        layers = [_place(record["layer"]) for record in own]
        style = {"color": _COLOURS[i], "marker": _MARKERS[i], "markersize": 4}
        axes.plot(layers, _column(own, "r2"), label=label, **style)
        axes.plot(layers, _column(own, "r2_shuffled"), "--", label=f"{label}, shuffled", **style)
    axes.axhline(0, color="#555555", linewidth=0.8)
    low = min(_column(records, "r2") + _column(records, "r2_shuffled"))
    axes.set(xlabel="layer", ylabel="R² on held-out utterances", ylim=(max(low, -1) - 0.05, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(record["layer"] == "cnn" for record in records):
        axes.xaxis.set_major_formatter(lambda x, _: "cnn" if x == -1 else f"{x:g}")
    axes.legend()


def _dodged(axes, records, group, place, value):
    """Estimates with intervals: places on the x axis, groups side by side."""
    groups = list(dict.fromkeys(record[group] for record in records))
    places = list(dict.fromkeys(record[place] for record in records))
    width = 0.7 / len(groups)
    for i, name in enumerate(groups):
        own = [record for record in records if record[group] == name]
        x = [places.index(record[place]) + (i - (len(groups) - 1) / 2) * width for record in own]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.vlines(x, _column(own, "low"), _column(own, "high"), color=colour, linewidth=1.4)
        marker = _MARKERS[i % len(_MARKERS)]
        label = str(name).replace("_", " ")
        axes.plot(x, _column(own, value), marker, color=colour, markersize=4.5, label=label)
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(places)), [str(name).replace("_", " ") for name in places])
    axes.grid(visible=False, axis="x")
    axes.figure.legend(loc="outside lower center", ncols=4)


def _draw_share(axes, records):
    _dodged(axes, records, "objective", "layer", "share")
    axes.set(xlabel="layer", ylabel="share that is position")


def _draw_gradients(axes, records):
    names = list(dict.fromkeys(record["objective"] for record in records))
    cosines = np.full((len(names), len(names)), np.nan)
    for record, cosine in zip(records, _column(records, "cosine"), strict=True):
        i, j = names.index(record["objective"]), names.index(record["other"])
        cosines[i, j] = cosines[j, i] = cosine
    axes.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
    for (i, j), cosine in np.ndenumerate(cosines):
        text = "" if np.isnan(cosine) else tables.number(cosine, 2)
        colour = "white" if abs(cosine) > 0.6 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    labels = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _draw_causal(axes, records):
    unmatched = [record for record in records if record["targets"] != "matched"]
    _dodged(axes, unmatched, "targets", "objective", "of_matched")
    axes.set(ylabel="fall / fall with matched targets")


def summary_rows(folder: str | Path) -> tuple[list[str], list[list[str]]]:
    """The headline numbers of a folder of diagnostics, a row per layer.

    Returns
    -------
    (list of str, list of list of str)
        Header and cells, as :mod:`~pi_finetune.report.tables` takes them; no rows if there is
        nothing.
    """
    folder = Path(folder)
    columns: dict = {}
    layers: dict = {}

    def add(layer, column, value, low=None, high=None):
        text = tables.number(value, 2) if value is not None else tables.MISSING
        if low is not None and high is not None:
            text += f" [{tables.number(low, 2)}, {tables.number(high, 2)}]"
        layers.setdefault(layer, {})[column] = text
        columns[column] = True

    records = {name: read_json_lines(path) for name, path in _present(folder)}
    headline = folder / "similarity_summary.jsonl"
    for record in _nearest_half_second(records.get("shift", [])):
        values = (record["ratio"], record["low"], record["high"])
        add(record["layer"], f"moved by {record['shift']:g} s", *values)
    for record in read_json_lines(headline) if headline.is_file() else []:
        add(record["layer"], "similarity, equal − far", record["difference"])
    for record in records.get("probe", []):
        add(record["layer"], f"R² {record['target'].replace('_', ' ')}", record["r2"])
    for record in records.get("share", []):
        values = (record["share"], record["low"], record["high"])
        add(record["layer"], f"share {record['objective']}", *values)
    header = ["layer", *columns]
    return header, [
        [str(layer), *(layers[layer].get(column, tables.MISSING) for column in columns)]
        for layer in sorted(layers, key=_place)
    ]


def _nearest_half_second(records):
    if not records:
        return []
    shift = min((record["shift"] for record in records), key=lambda value: abs(value - 0.5))
    return [record for record in records if record["shift"] == shift]


def position_section(folder: str | Path) -> Markup:
    """The report's section on a folder of diagnostics: text, figures, and all lines as tables.

    Arguments
    ---------
    folder : str or Path
        As :func:`write_figures` takes it; figures that are missing are left out.

    Returns
    -------
    Markup
        Empty if the folder holds no diagnostics.
    """
    parts = []
    header, rows = summary_rows(folder)
    if rows:
        parts.append(_scroll("Headline numbers by layer", tables.html_table(header, rows)))
    for name, path in _present(folder):
        title, text = DIAGNOSTICS[name]
        parts.append(Markup("<h3>{}</h3>\n<p>{}</p>").format(title, text))
        figure = path.with_suffix(".svg")
        if figure.is_file():
            content = base64.b64encode(figure.read_bytes()).decode()
            image = (
                '<figure class="paper"><img src="data:image/svg+xml;base64,{}" alt="{}"></figure>'
            )
            parts.append(Markup(image).format(content, title))
        records = read_json_lines(path)
        columns = list(dict.fromkeys(key for record in records for key in record))
        body = [[_cell(record.get(key)) for key in columns] for record in records[:_MAX_ROWS]]
        lines = f"{path.name}: {len(records)} lines"
        if len(records) > _MAX_ROWS:
            lines += f", the first {_MAX_ROWS} of them"
        summary = Markup("<summary>{}</summary>").format(lines)
        table = _scroll(path.name, tables.html_table(columns, body))
        parts.append(Markup("<details>{}{}</details>").format(summary, table))
    return Markup("\n").join(parts)


def _scroll(label, table):
    block = '<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>'
    return Markup(block).format(label, table)


def _cell(value):
    if value is None:
        return tables.MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
