"""Compute the tables of docs/evidence*.md and the README, and their figures, from docs/evidence.

    python docs/make_evidence.py

In a page a comment says what the table under it is, and this script writes the table anew:

    <!-- summary mse: noisy pretrained controls whisper -->

Kinds: summary, results (its columns of WER, NLL and PESQ), differences, convergence (with a
baseline, and folders of docs/evidence or runs in them), verdicts (folders, each a setting),
gradients (a file of it), causal (files of it), learning_rates.
"""

import functools
import json
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pi_finetune.files import replacing, write_text
from pi_finetune.report.tables import (
    MISSING,
    change_text,
    convergence_table,
    difference_table,
    markdown,
    number,
    signed,
    summary_table,
)
from pi_finetune.results.comparison import compare_runs
from pi_finetune.results.runs import read_json_lines

DOCS = Path(__file__).resolve().parent
SCORES = DOCS / "evidence"
PAGES = (DOCS / "evidence.md", DOCS / "evidence_appendix.md", DOCS.parent / "README.md")
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
#: Of Okabe and Ito, which most of the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LIMIT = 10  # points of WER that a figure shows
TABLE = re.compile(r"(<!-- (\w+)(?: (\S+))?(?:: ([^>]*))? -->\n\n)((?:\|.*\n)*)")


def main():
    """Write the pages and their figures anew."""
    for page in PAGES:
        write_text(page, with_tables(page.read_text()))
    main_panels = {"in step": "longer/noisy longer/pretrained longer/whisper", "late": "delayed"}
    draw_differences(main_panels, SCORES / "differences.png")
    tables = [found.groups()[1:4] for found in TABLE.finditer(PAGES[1].read_text())]
    panels = {
        places.split()[-1]: places
        for kind, baseline, places in tables
        if (kind, baseline) == ("differences", "mse")
    }
    draw_differences(panels, SCORES / "differences_all.png")
    draw_curves(SCORES / "delayed", SCORES / "delayed.png")


def with_tables(text):
    """The page's text with every table computed, and a blank line after each."""
    text = TABLE.sub(lambda found: found[1] + table(found[2], found[3], found[4] or ""), text)
    return re.sub(r"^(\|.*\|)\n(?=[^|\n])", r"\1\n\n", text, flags=re.MULTILINE)


def table(kind, baseline, places):
    """One table in Markdown."""
    if kind == "learning_rates":
        return _narrow(markdown(*learning_rates()))
    if kind == "causal":
        return _narrow(markdown(*causal(*places.split())))
    if kind == "gradients":
        return _narrow(markdown(*gradients(places)))
    if kind == "verdicts":
        return _narrow(markdown(*verdicts(*places.split())))
    comparison = compared(baseline, tuple(places.split()))
    if kind == "summary":
        return _narrow(summary_table(comparison, markdown))
    if kind == "results":
        return _columns(
            _narrow(summary_table(comparison, markdown)),
            ("strategy", "seeds", "WER", "NLL", "PESQ"),
        )
    if kind == "convergence":
        return _narrow(convergence_table(comparison, markdown))
    if kind == "differences":  # in recognition; the signal metrics' are in compare.py's own output
        lines = difference_table(comparison, markdown).splitlines(keepends=True)
        return _narrow("".join([*lines[:2], *(row for row in lines[2:] if _recognition(row))]))
    raise ValueError(f"A table of the kind {kind!r} is not known.")


@functools.cache
def compared(baseline, places):
    """The comparison of folders of docs/evidence."""
    return compare_runs([SCORES / place for place in places], baseline=baseline)


def verdicts(*settings):
    """Header and rows: what each setting says of the claims C2, C3 and C4."""
    header = ["setting", "seeds", "C2: dev NLL, soft_dtw − mse"]
    header += [
        f"{claim}: {metric}, {difference}"
        for claim, difference in (("C3", "soft_dtw − mse"), ("C4", "zero_pad − soft_dtw"))
        for metric in ("NLL", "WER")
    ]
    rows = []
    for setting in settings:
        mse, soft_dtw = (compared(baseline, (setting,)) for baseline in ("mse", "soft_dtw"))
        trained = [mse.convergence.get(name) for name in ("mse", "zero_pad", "soft_dtw")]
        seeds = sorted({len(each.seeds) for each in trained if each})
        area = mse.convergence["soft_dtw"].area_difference
        cells = [setting, "–".join(map(str, seeds)), change_text(area, mse.dev_metric.digits)]
        for comparison, strategy in ((mse, "soft_dtw"), (soft_dtw, "zero_pad")):
            digits = {metric.name: metric.digits for metric in comparison.metrics}
            for name in ("nll", "wer"):
                found = comparison.summary[name].get(strategy)
                change = found and f"{change_text(found.difference, digits[name])}: {found.verdict}"
                cells.append(change or MISSING)
        rows.append(cells)
    return header, rows


def _recognition(row):
    return "WER" in row or "NLL" in row


def _columns(text, wanted):
    """The columns of a Markdown table whose titles begin with one of ``wanted``."""
    rows = [line.strip("|").split("|") for line in text.splitlines()]
    kept = [i for i, title in enumerate(rows[0]) if title.strip().startswith(wanted)]
    return "".join(f"|{'|'.join(row[i] for i in kept)}|\n" for row in rows)


def learning_rates():
    """Header and rows: what the searches found."""
    found = json.loads((SCORES / "learning_rates.json").read_text())
    rates = list(next(iter(found.values()))["dev_wer"])
    return ["", *(f"{float(rate):g}" for rate in rates), "chosen"], [
        [name, *(number(each["dev_wer"][rate], 2) for rate in rates), f"{each['lr']:g}"]
        for name, each in found.items()
    ]


def causal(*names):
    """Header and rows: falls of each objective, and in percent of that with matched targets."""
    rows = {}
    for name in names:
        for record in read_json_lines(SCORES / name):
            layer = "1" if "layer_1" in name else "last"
            cells = rows.setdefault((record["objective"], layer), [])
            if record["targets"] == "matched":
                cells.append(f"{number(record['before'], 3)} → {number(record['after'], 3)}")
            else:
                share, low, high = (100 * record[key] for key in ("of_matched", "low", "high"))
                cells.append(f"{number(share, 0)} % [{number(low, 0)}, {number(high, 0)}]")
    header = ["objective", "layer", "own targets", "mismatched", "mismatched, moved", "position"]
    return header, [[*key, *cells] for key, cells in rows.items()]


def gradients(name):
    """Header and rows: cosines between expected gradients, and how much of a batch is signal."""
    records = read_json_lines(SCORES / name)
    names = list(dict.fromkeys(record["objective"] for record in records))
    cells, signal = {}, {}
    for record in records:
        text = number(record["cosine"], 2)
        if record["low"] is not None and record["objective"] != record["other"]:
            text += f" [{number(record['low'], 2)}, {number(record['high'], 2)}]"
        cells[record["objective"], record["other"]] = text
        cells[record["other"], record["objective"]] = text
        signal[record["objective"]] = number(record["signal"], 2)
    shown = [other for other in ("mse", "si_sdr") if other in names]
    header = ["", *(f"cosine with {other}" for other in shown), "signal"]
    return header, [[row, *(cells[row, other] for other in shown), signal[row]] for row in names]


def draw_differences(panels, path):
    """WER differences from mse with their intervals, a panel for each ``{title: places}``."""
    comparisons = {
        title: compared("mse", tuple(places.split())) for title, places in panels.items()
    }
    with matplotlib.rc_context(STYLE):
        heights = [len(each.summary["wer"]) for each in comparisons.values()]
        figure = Figure(figsize=(6.4, 0.6 + 0.24 * sum(heights)), layout="constrained")
        rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
        handles = {}
        for axes, (title, comparison) in zip(rows[:, 0], comparisons.items(), strict=True):
            draw_panel(axes, comparison)
            axes.set_title(title, fontsize=9, loc="left")
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
        axes.set_xlim(-LIMIT, LIMIT)  # some controls' intervals are longer
        axes.set_xlabel("WER − WER of mse (points): below 0 is better")
        figure.legend(handles.values(), handles.keys(), loc="outside upper right")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def draw_curves(folder, path):
    """The likelihood on dev over the updates, a thin line a seed and a thick one for their mean."""
    curves = {}
    for file in sorted(folder.glob("*/*/valid.jsonl")):
        lines = read_json_lines(file)
        curve = {line["update"]: line["nll"] for line in lines}
        curves.setdefault(file.parents[1].name, []).append(curve)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.subplots()
        for (name, seeds), colour in zip(curves.items(), COLOURS[: len(curves)], strict=True):
            updates = sorted(set.intersection(*(set(curve) for curve in seeds)))
            for curve in seeds:
                axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.5, alpha=0.5)
            mean = [sum(curve[update] for curve in seeds) / len(seeds) for update in updates]
            axes.plot(updates, mean, color=colour, marker="o", markersize=3, label=name)
        axes.set_xlabel("updates")
        axes.set_ylabel("NLL on dev (nats/token)")
        axes.set_xlim(left=0)
        figure.legend(loc="outside right upper")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def draw_panel(axes, comparison):
    """One comparison: a line per system, a mark per recogniser."""
    wers = [metric for metric in comparison.metrics if metric.name.startswith("wer")]
    systems = [name for name in comparison.systems if name != "mse"]
    for i, (metric, colour, marker) in enumerate(zip(wers, COLOURS, "os")):
        for row, name in enumerate(systems):
            found = comparison.summary[metric.name][name].difference
            y = row + 0.24 * (i - (len(wers) - 1) / 2)
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6)
            label = metric.recognizer if row == 0 else None
            axes.plot(found.estimate, y, marker, color=colour, markersize=4, label=label)
            if abs(found.estimate) > LIMIT:  # beyond the panel: said in words
                above, text = found.estimate > 0, signed(found.estimate, 1)
                axes.text(
                    LIMIT if above else -LIMIT,
                    y,
                    f"{text} →" if above else f"← {text}",
                    color=colour,
                    ha="right" if above else "left",
                    va="bottom",
                    fontsize=7,
                )
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)  # the first on top


def _narrow(text):
    """Without the padding that aligns a table's source, so that a new digit is a small change."""
    return re.sub(r" {2,}", " ", re.sub(r"-{4,}", "---", text))


if __name__ == "__main__":
    sys.exit(main())
