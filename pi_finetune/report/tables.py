"""A comparison as CSV, Markdown and LaTeX.

``table`` has a row per run, ``summary`` a row per system with intervals over seeds and utterances,
``convergence`` a row per trained strategy. A missing number is an empty field in CSV and "–"
elsewhere.
"""

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from pi_finetune.files import write_text

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison
    from pi_finetune.results.declarations import Metric
    from pi_finetune.results.statistics import Interval

__all__ = [
    "MISSING",
    "best_cells",
    "change_text",
    "convergence_rows",
    "convergence_table",
    "difference_table",
    "explanation",
    "html_table",
    "interval_text",
    "latex",
    "markdown",
    "number",
    "p_text",
    "run_rows",
    "run_table",
    "share",
    "signed",
    "summary_rows",
    "summary_table",
    "write_tables",
]


MISSING = "–"


def write_tables(comparison: "Comparison", folder: str | Path) -> list[Path]:
    """Write all tables of a comparison.

    Arguments
    ---------
    comparison : pi_finetune.results.comparison.Comparison
    folder : str or Path
        Made if it is not there.

    Returns
    -------
    list of Path
        What was written: {table,summary}.{csv,md,tex}, and convergence.{csv,md} where runs have
        dev curves.
    """
    folder = Path(folder)
    texts = {
        "table.csv": to_csv(run_rows(comparison)),
        "table.md": run_table(comparison, markdown),
        "table.tex": run_table(comparison, latex),
        "summary.csv": to_csv(summary_rows(comparison)),
        "summary.md": _summary_page(comparison),
        "summary.tex": summary_table(comparison, latex),
    }
    if comparison.convergence:
        texts["convergence.csv"] = to_csv(convergence_rows(comparison))
        texts["convergence.md"] = convergence_table(comparison, markdown)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


# Rows of numbers


def run_rows(comparison: "Comparison") -> list[dict]:
    """A dict per run: ``strategy, seed``, every metric by its name, and counts; None: missing.

    ``wer`` is in percent. ``utterances`` and ``words`` are what WER is over; ``failed_METRIC``
    counts scores that could not be computed.
    """
    wer = comparison.scores["wer"]
    names = [metric.name for metric in comparison.metrics]
    rows = []
    for strategy, seed in comparison.expected:
        row = {"strategy": strategy, "seed": seed}
        for name in names:
            row[name] = _rounded(comparison.scores[name].mean(strategy, seed))
        # An expected system of which there is no run has no seed.
        key = (strategy, -1 if seed is None else seed)
        lines = comparison.records.get(key, [])
        row["utterances"] = len(lines) or None
        counts = dict.fromkeys(("words", "substitutions", "deletions", "insertions"))
        if key in wer.values:
            used = set(wer.ids)
            entries = [line["asr"][wer.metric.recognizer] for line in lines if line["id"] in used]
            counts = {name: sum(entry.get(name, 0) for entry in entries) for name in counts}
            counts["words"] = int(wer.weights.sum())
        row.update(counts)
        for name, table in comparison.scores.items():
            row[f"failed_{name}"] = table.failed.get(key)
        rows.append(row)
    return rows


def summary_rows(comparison: "Comparison") -> list[dict]:
    """A dict per system: seeds, and for every metric mean, interval and difference to baseline."""
    rows = []
    for system in comparison.systems:
        seeds = [seed for name, seed in comparison.records if name == system]
        row = {"strategy": system, "seeds": len(seeds)}
        for name, scores in comparison.scores.items():
            found = comparison.summary[name].get(system)
            level = found and found.level
            by_seed = [scores.mean(system, seed) for seed in found.seeds] if found else []
            row[name] = level and _rounded(level.estimate)
            row[f"{name}_low"] = level and _rounded(level.low)
            row[f"{name}_high"] = level and _rounded(level.high)
            row[f"{name}_seed_sd"] = (
                _rounded(np.std(np.array(by_seed, float), ddof=1)) if len(by_seed) > 1 else None
            )
            difference = found and found.difference
            for key, attribute in (
                ("difference", "estimate"),
                ("difference_low", "low"),
                ("difference_high", "high"),
                ("p_improvement", "p_improvement"),
                ("p", "p_value"),
            ):
                row[f"{name}_{key}"] = difference and _rounded(getattr(difference, attribute))
            row[f"{name}_p_holm"] = found and _rounded(found.p_holm)
        rows.append(row)
    return rows


def convergence_rows(comparison: "Comparison") -> list[dict]:
    """A dict per strategy and seed, then the measures over the strategy's seeds."""
    rows = []
    for strategy, found in comparison.convergence.items():
        for i, seed in enumerate(found.seeds):
            row = {"strategy": strategy, "seed": seed, "metric": comparison.dev_metric.name}
            row["updates_to_target"] = _rounded(found.updates[i])
            row["seconds_to_target"] = _rounded(found.seconds[i])
            row["reached"] = int(math.isfinite(found.updates[i]))
            row["budget"] = found.budget
            for name in ("updates_mean", "area", "area_difference"):
                interval = getattr(found, name)
                for key in ("estimate", "low", "high"):
                    label = name if key == "estimate" else f"{name}_{key}"
                    row[label] = interval and _rounded(getattr(interval, key))
            rows.append(row)
    return rows


def to_csv(rows):
    """Rows (dicts with the same keys) as CSV text; None is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _rounded(value):
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 6)


# Rows of text: a cell is a str, or (str, True) where it is the best of its column


def run_table(comparison: "Comparison", render: Callable[[list, list], str]) -> str:
    """The table of runs, through ``render``: :func:`markdown` or :func:`latex`."""
    rows = run_rows(comparison)
    metrics = comparison.metrics
    cells = {m.name: best_cells([row[m.name] for row in rows], m) for m in metrics}
    failed = [
        sum(row[f"failed_{m.name}"] or 0 for m in metrics) if row["utterances"] else None
        for row in rows
    ]
    counts = ["substitutions", "deletions", "insertions", "utterances"]
    header = ["strategy", "seed", *(heading(m) for m in metrics), "sub", "del", "ins", "utt."]
    body = [
        [row["strategy"], _count(row["seed"]), *(cells[m.name][i] for m in metrics)]
        + [_count(row[key]) for key in counts]
        for i, row in enumerate(rows)
    ]
    if any(failed):
        header.append("failed scores")
        body = [[*row, _count(count)] for row, count in zip(body, failed)]
    return render(header, body)


def summary_table(comparison: "Comparison", render: Callable[[list, list], str]) -> str:
    """The table of systems with intervals, through ``render``."""
    systems, metrics = comparison.systems, comparison.metrics
    columns = []
    for metric in metrics:
        found = [comparison.summary[metric.name].get(system) for system in systems]
        cells = best_cells([f and f.level.estimate for f in found], metric)
        columns.append(
            [
                (f"{text}{interval_text(f.level, metric.digits)}{f.marker}", best) if f else text
                for f, (text, best) in zip(found, cells)
            ]
        )
    seeds = [sum(name == s for name, _ in comparison.records) for s in systems]
    body = [[s, str(n), *row] for s, n, row in zip(systems, seeds, zip(*columns))]
    return render(["strategy", "seeds", *(heading(m) for m in metrics)], body)


def difference_table(comparison: "Comparison", render: Callable[[list, list], str]) -> str:
    """Differences from the baseline, a row per system and metric, through ``render``.

    The column ``family`` says over which, and how many, differences a p-value is adjusted.
    """
    body = []
    for metric in comparison.metrics:
        for system, found in comparison.summary[metric.name].items():
            d = found.difference
            if d is None:
                continue
            change = change_text(d, metric.digits)
            tests = (share(d.p_improvement), p_text(d.p_value), p_text(found.p_holm))
            verdict = (p_text(found.p_equivalence), found.verdict or MISSING)
            family = found.family or MISSING
            body.append([heading(metric), system, change + found.marker, *tests, family, *verdict])
    header = ["metric", "strategy", f"difference from {comparison.baseline}", "P(improvement)"]
    return render([*header, "p", "p (Holm)", "family", "p (equivalence)", "verdict"], body)


def convergence_table(comparison: "Comparison", render: Callable[[list, list], str]) -> str:
    """Convergence to the baseline's best dev score, a row per strategy, through ``render``."""
    digits = comparison.dev_metric.digits
    body = []
    for strategy, found in comparison.convergence.items():
        reached = sum(map(math.isfinite, found.updates))
        if found.updates_mean is not None:
            updates = f"{found.updates_mean.estimate:.0f}{interval_text(found.updates_mean, 0)}"
        else:
            updates = ", ".join(
                f"{n:.0f}" if math.isfinite(n) else f"> {found.budget:.0f}" for n in found.updates
            )
        seconds = found.seconds if np.isfinite(found.seconds).all() else [math.nan]
        area, change = found.area, found.area_difference
        body.append(
            [
                strategy,
                f"{reached} of {len(found.seeds)}",
                updates,
                number(float(np.mean(seconds)), 0),
                number(area.estimate, digits) + interval_text(area, digits) if area else MISSING,
                change_text(change, digits) if change else MISSING,
            ]
        )
    name = comparison.dev_metric.label
    header = ["strategy", "seeds that reach it", "updates", "seconds", f"mean {name}"]
    return render([*header, "difference"], body)


def _summary_page(comparison):
    parts = [summary_table(comparison, markdown)]
    if comparison.baseline is not None:
        parts.append(difference_table(comparison, markdown))
    parts.append(explanation(comparison))
    parts.extend(f"- {note}" for note in comparison.notes)
    return "\n".join(parts) + "\n"


def explanation(comparison: "Comparison") -> str:
    """How to read the summary, in one paragraph of plain text."""
    percent = f"{100 * comparison.bootstrap.confidence:g} %"
    text = (
        f"In brackets: {percent} intervals from {comparison.bootstrap.replicates} bootstrap "
        f"replicates over {comparison.unit}s and seeds."
    )
    if comparison.baseline is not None:
        alpha = f"{1 - comparison.bootstrap.confidence:.2g}"
        text += (
            f" * better, † worse than {comparison.baseline} at p < {alpha} after Holm's correction "
            "over the differences of all trained strategies in one family of metrics: recognition "
            "(what recognisers make of the speech), signal (comparison with the clean waveform) or "
            "quality (opinions of listeners, predicted without a reference). "
            "P(improvement): share of replicates in which the strategy is better."
        )
        margins = {
            m.title: m.margin_text() for m in comparison.main_metrics if m.margin is not None
        }
        stated = " and ".join(f"{text} of {name}" for name, text in margins.items())
        text += (
            " Verdicts: equivalent where two one-sided tests, adjusted likewise, put the "
            f"difference within the margin of {stated}; else better, worse or undecided."
        )
    return text


def heading(metric: "Metric") -> str:
    """A metric's column heading with its good direction."""
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"


def number(value: float | None, digits: int) -> str:
    """A number with a proper minus sign, or "–"."""
    if value is None or not math.isfinite(value):
        return MISSING
    value = round(value, digits) + 0.0  # what rounds to zero has no sign
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int) -> str:
    """As :func:`number`, with a plus sign."""
    text = number(value, digits)
    return text if text == MISSING or text.startswith("−") else f"+{text}"


def interval_text(interval: "Interval", digits: int) -> str:
    """`` [low, high]``, or nothing where there is no interval."""
    if not math.isfinite(interval.low):
        return ""
    return f" [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def change_text(interval: "Interval", digits: int) -> str:
    """A difference with its sign and, where there is one, its interval: ``+0.30 [−2.04, 2.64]``."""
    return signed(interval.estimate, digits) + interval_text(interval, digits)


def p_text(value: float | None) -> str:
    """A p-value to three digits, or "–"."""
    if value is None or math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def share(value: float | None) -> str:
    """A probability to three digits, never rounded to certainty, or "–"."""
    if value is None or math.isnan(value):
        return MISSING
    if value < 0.001:
        return "< 0.001"
    return "> 0.999" if value > 0.999 else f"{value:.3f}"


def _count(value):
    return MISSING if value is None else str(value)


def best_cells(values: list, metric: "Metric") -> list[tuple[str, bool]]:
    """Cells of a column, [(text, is best)]; all that print like the best one are best."""
    present = [value for value in values if value is not None]
    choose = max if metric.higher_is_better else min
    best = number(choose(present), metric.digits) if present else None
    texts = [number(value, metric.digits) for value in values]
    return [(text, text == best) for text in texts]


# Formats


def markdown(header: list, body: list) -> str:
    """A Markdown table whose source is aligned too, so that it can be read in a terminal."""
    rows = [[_markdown_cell(cell) for cell in row] for row in [header, *body]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(_pad(c, w, i) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def _pad(text, width, column):
    return text.ljust(width) if column == 0 else text.rjust(width)


def _markdown_cell(cell):
    text, best = cell if isinstance(cell, tuple) else (cell, False)
    # An underscore within a word means nothing to Markdown, and names stay readable without.
    text = re.sub(r"([\\|*<`]|\b_|_\b)", r"\\\1", text)
    return f"**{text}**" if best else text


def latex(header: list, body: list) -> str:
    """A booktabs tabular, to be read in with ``\\input``."""
    rows = [" & ".join(map(_latex_cell, row)) + r" \\" for row in [header, *body]]
    columns = "l" + "r" * (len(header) - 1)
    lines = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return "\n".join(
        [*lines, rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", ""]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "−": "$-$",
    "–": "--",
    "*": "$^{*}$",
    "†": r"$^{\dagger}$",
}


def escape_latex(text):
    """Text with LaTeX's special characters, and this module's signs, made printable."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(cell):
    text, best = cell if isinstance(cell, tuple) else (cell, False)
    text = escape_latex(text)
    return rf"\textbf{{{text}}}" if best else text


def html_table(header: list, body: list) -> Markup:
    """Rows of cells, as an HTML table."""
    parts = [Markup("<table><thead><tr>")]
    parts += [Markup('<th scope="col">{}</th>').format(text) for text in header]
    parts.append(Markup("</tr></thead><tbody>"))
    for first, *rest in body:
        parts.append(Markup('<tr><th scope="row">{}</th>').format(first))
        parts += [_html_cell(cell) for cell in rest]
        parts.append(Markup("</tr>"))
    parts.append(Markup("</tbody></table>"))
    return Markup("").join(parts)


def _html_cell(cell):
    text, best = cell if isinstance(cell, tuple) else (cell, False)
    parts = re.match(r"(.*?)(?: (\[.*\]))?([*†]?)\Z", text, re.DOTALL)
    value, interval, marker = parts.groups() if parts else (text, None, "")
    value = Markup("<strong>{}</strong>").format(value) if best else escape(value)
    if marker:
        meaning = "significantly better" if marker == "*" else "significantly worse"
        value += Markup('<sup title="{}">{}</sup>').format(meaning, marker)
    if interval:
        value += Markup('<span class="ci">{}</span>').format(interval)
    return Markup("<td>{}</td>").format(value)
