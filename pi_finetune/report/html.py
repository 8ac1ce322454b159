"""A comparison as one HTML file that needs nothing else: no network, no server, no neighbours."""

import base64
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from pi_finetune import spectrograms
from pi_finetune.files import write_text
from pi_finetune.report import examples as audio
from pi_finetune.report import plots, tables
from pi_finetune.report.position import position_section
from pi_finetune.results.comparison import DEV_METRICS
from pi_finetune.results.runs import UNTRAINED
from pi_finetune.run_folder import package_versions

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison

__all__ = ["Breakdown", "breakdowns", "findings", "group_utterances", "write_report"]


_PACKAGES = "pi_finetune torch speechbrain transformers jiwer pesq pystoi scipy numpy".split()
#: Distinct values up to which utterances are grouped by value and not by thirds.
_MAX_GROUPS = 8


def write_report(
    path: str | Path,
    comparison: "Comparison",
    command: str = "",
    utterances: list[str] | None = None,
    extra_sections: Sequence[tuple[str, str]] = (),
    position_folders: Sequence[str | Path] = (),
    title: str = "",
    answer: str = "",
) -> Path:
    """Write the HTML report.

    Arguments
    ---------
    path : str or Path
        The file.
    comparison : pi_finetune.results.comparison.Comparison
    command : str
        The command line that made it, to be shown.
    utterances : list of str, optional
        Examples to show. Default: three of those whose audio was kept.
    extra_sections : list of (str, str)
        Further sections: title and HTML, trusted as it is.
    position_folders : list of (str or Path)
        What recipes/probe_position.py wrote, ``.../position``: a section each. One that holds
        nothing is passed over.
    title : str
        Default: that strategies are compared.
    answer : str
        What the report says, in a paragraph, to stand first.

    Returns
    -------
    Path
    """
    sections: list[tuple[str, str]] = []
    for folder in map(Path, position_folders):
        name = "Position diagnostics"
        if len(position_folders) > 1:
            name += f": {folder.resolve().parent.name}"
        body = position_section(folder)
        if body:
            sections.append((name, body))
    sections.extend(extra_sections)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pi_finetune.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = audio.load_examples(comparison, comparison.metrics[0].recognizer, utterances)
    page = environment.get_template("report.html.j2").render(
        c=comparison,
        title=title or f"Speech enhancement strategies compared on “{comparison.test_set}”",
        answer=answer,
        hours=_duration(comparison),
        seeds=sorted({run.seed for run in comparison.runs if run.strategy not in UNTRAINED}),
        palette=_palette(comparison),
        findings=findings(comparison),
        forest=_forest(comparison),
        summary=tables.summary_table(comparison, tables.html_table),
        differences=comparison.baseline and tables.difference_table(comparison, tables.html_table),
        runs=tables.run_table(comparison, tables.html_table),
        explanation=tables.explanation(comparison),
        breakdowns=breakdowns(comparison),
        curves=_curve_charts(comparison),
        curve_names={name for curves in comparison.curves.values() for name, _ in curves},
        convergence=comparison.convergence
        and tables.convergence_table(comparison, tables.html_table),
        examples=_example_cards(shown),
        alignment=_alignment(shown, comparison),
        sections=[(title, Markup(body)) for title, body in sections],
        settings=_settings(comparison),
        command=command,
        versions={"Python": platform.python_version(), **package_versions(_PACKAGES)},
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    )
    write_text(path, page)
    return Path(path)


def _palette(comparison):
    """{system: place in the palette}, the same in every figure."""
    names = dict.fromkeys(name for name, _ in comparison.expected)
    return {name: i % plots.SERIES for i, name in enumerate(names)}


def _duration(comparison):
    seconds = [line.get("duration") or 0 for line in next(iter(comparison.records.values()))]
    return sum(seconds) / 3600


def findings(comparison: "Comparison") -> list[tuple[str, str, str]]:
    """What the numbers say of each trained strategy, in sentences.

    Returns
    -------
    list of (str, str, str)
        Strategy, verdict (``better``, ``worse`` or ``undecided``) and sentence.
    """
    result = []
    for strategy, found in comparison.summary["wer"].items():
        if found.p_holm is None:
            continue
        texts = [
            _finding(comparison, metric, other)
            for metric in comparison.main_metrics
            if metric.margin is not None
            and (other := comparison.summary[metric.name].get(strategy)) is not None
            and other.p_holm is not None
        ]
        text = " ".join(texts)
        if not comparison.of_models and 1 in (
            len(found.seeds),
            len(comparison.summary["wer"][comparison.baseline].seeds),
        ):
            text += " With one training seed this is about these runs, not about the strategy."
        result.append((strategy, found.verdict, text + _speed(comparison, strategy)))
    return result


def _finding(comparison, metric, found):
    """A sentence of one difference."""
    d, unit = found.difference, "points" if metric.unit == "%" else metric.unit
    text = (
        f"{metric.title} {tables.signed(d.estimate, metric.digits)} {unit}"
        f"{tables.interval_text(d, metric.digits)} against "
        f"{comparison.baseline}; better in {_percent(d.p_improvement)} of replicates, "
        f"p = {tables.p_text(found.p_holm)} after Holm's correction"
    ).replace("p = <", "p <")
    if found.verdict == "equivalent":
        text += f"; within the margin of {metric.margin_text()} all the same"
    return f"{text}: {found.verdict}."


def _percent(value):
    if not math.isfinite(value):
        return tables.MISSING
    if 0.001 <= value <= 0.999:
        return f"{100 * value:.1f} %"
    return "more than 99.9 %" if value > 0.5 else "less than 0.1 %"


def _speed(comparison, strategy):
    found = comparison.convergence.get(strategy)
    base = comparison.convergence.get(comparison.baseline)
    if found is None or base is None or base.updates_mean is None:
        return ""
    name, needed = comparison.dev_metric.label.split(" (")[0], base.updates_mean.estimate
    if found.updates_mean is None:
        reached = sum(map(math.isfinite, found.updates))
        return (
            f" {reached} of {len(found.seeds)} seeds reached {comparison.baseline}'s best {name} "
            f"within {found.budget:.0f} updates."
        )
    return (
        f" It reached {comparison.baseline}'s best {name} after {found.updates_mean.estimate:.0f} "
        f"updates ({comparison.baseline}: {needed:.0f})."
    )


def _forest(comparison):
    """Charts of the differences in the main metrics, trained strategies only."""
    palette, charts = _palette(comparison), []
    for metric in comparison.main_metrics:
        rows = [
            (strategy, found.difference, palette[strategy])
            for strategy, found in comparison.summary[metric.name].items()
            if found.p_holm is not None
        ]
        if rows:
            better = "right" if metric.higher_is_better else "left"
            label = f"{metric.label}: difference from {comparison.baseline} ({better} is better)"
            charts.append(Markup(plots.interval_chart(rows, label, label)))
    return charts


# Breakdown


@dataclass
class Breakdown:
    """Scores by group of utterances: tables of the main metrics, the first with intervals."""

    title: str
    tables: list[tuple[str, Markup]]
    chart: Markup | None = None


def breakdowns(comparison: "Comparison") -> list[Breakdown]:
    """By SNR, noise class and duration, where the scores say these and they vary.

    Returns
    -------
    list of Breakdown
    """
    lines = next(iter(comparison.records.values()))
    result = []
    for key, title, unit in (
        ("snr", "SNR", " dB"),
        ("noise_class", "Noise class", ""),
        ("duration", "Duration", " s"),
    ):
        groups = group_utterances({line["id"]: line.get(key) for line in lines}, unit)
        if len(groups) < 2:
            continue
        found = Breakdown(title, [])
        for metric in comparison.main_metrics:
            if comparison.scores[metric.name].values:
                table = _breakdown_table(comparison, metric, groups)
                found.tables.append((metric.label, table))
        if key == "snr" and all(label.endswith(unit) for label, _ in groups):
            found.chart = _snr_chart(comparison, groups, [float(g[0].split()[0]) for g in groups])
        result.append(found)
    return result


def group_utterances(values: dict, unit: str = "") -> list[tuple[str, list[str]]]:
    """Group utterances by a value: one group per value, or thirds where there are many numbers.

    Arguments
    ---------
    values : dict
        {utterance id: number, str or None}.
    unit : str
        Written behind numbers.

    Returns
    -------
    list of (str, list of str)
        Label and ids, in ascending order; utterances without a value are last, as "none".
    """
    known = {id_: value for id_, value in values.items() if value is not None}
    groups = []
    distinct = sorted(set(known.values()), key=lambda v: (isinstance(v, str), v))
    numeric = all(isinstance(value, int | float) for value in distinct)
    if numeric and len(distinct) > _MAX_GROUPS:
        low, high = (round(q, 1) for q in np.quantile(list(known.values()), [1 / 3, 2 / 3]))
        parts = [(f"up to {low:g}{unit}", -math.inf, low), (f"over {high:g}{unit}", high, math.inf)]
        if low < high:
            parts.insert(1, (f"{low:g} to {high:g}{unit}", low, high))
        for label, above, to in parts:
            groups.append((label, [id_ for id_, value in known.items() if above < value <= to]))
    else:
        for value in distinct:
            label = f"{value:g}{unit}" if numeric else str(value)
            groups.append((label, [id_ for id_, other in known.items() if other == value]))
    groups.append(("none", [id_ for id_ in values if id_ not in known]))
    return [(label, ids) for label, ids in groups if ids]


def _breakdown_table(comparison, metric, groups):
    scores = comparison.scores[metric.name]
    masks = [np.isin(scores.ids, ids) for _, ids in groups]
    systems = [s for s in comparison.systems if scores.seeds(s)]
    columns = []
    for mask in masks:
        means = [scores.mean(system, only=mask) for system in systems]
        cells = []
        for system, (text, best) in zip(systems, tables.best_cells(means, metric)):
            cells.append((text + _change(comparison, scores, system, mask), best))
        columns.append(cells)
    header = [f"{label} ({mask.sum()})" for (label, _), mask in zip(groups, masks)]
    return tables.html_table(
        ["strategy", *header], [[s, *row] for s, row in zip(systems, zip(*columns))]
    )


def _change(comparison, scores, system, mask):
    """`` [Δ low, high]`` of what a recogniser heard, against the baseline; else nothing."""
    base, metric = comparison.baseline, scores.metric
    if metric.recognizer is None or system in (base, *UNTRAINED) or not scores.seeds(base):
        return ""
    values, weights = scores.resampling_units(system, mask)
    if not weights.sum():
        return ""
    reference, _ = scores.resampling_units(base, mask)
    paired = scores.seeds(system) == scores.seeds(base)
    d = comparison.bootstrap.difference(values, reference, weights, False, paired)
    digits = metric.digits - 1
    interval = tables.interval_text(d, digits).strip(" []")
    return f" [Δ {tables.signed(d.estimate, digits)}: {interval}]" if interval else ""


def _snr_chart(comparison, groups, snrs):
    scores, palette = comparison.scores["wer"], _palette(comparison)
    masks = [np.isin(scores.ids, ids) for _, ids in groups]
    lines = []
    for system in comparison.systems:
        means = [scores.mean(system, only=mask) for mask in masks]
        if None not in means:
            lines.append(plots.Line(system, snrs, np.array(means), palette[system]))
    if not lines:
        return None
    label = scores.metric.label
    title = f"{scores.metric.title} against SNR, by system"
    return Markup(plots.line_chart(lines, "SNR (dB)", label, title))


# Convergence


def _curve_charts(comparison):
    """[(caption, svg)]: dev scores against updates and seconds, seeds thin and their mean bold."""
    charts = []
    ordered = sorted(DEV_METRICS, key=lambda metric: metric != comparison.dev_metric)
    for metric in ordered:
        for axis, label in (("updates", "updates"), ("seconds", "training seconds")):
            lines = _curve_lines(comparison, metric, axis)
            if lines:
                title = f"{metric.label} against {label}"
                svg = plots.line_chart(lines, label, metric.label, title)
                charts.append((title, Markup(svg)))
    return charts


def _curve_lines(comparison, metric, axis):
    curves, palette, lines = comparison.curves[metric.name], _palette(comparison), []
    for strategy in dict.fromkeys(name for name, _ in curves):
        own = [curve for (name, _), curve in curves.items() if name == strategy]
        own = [curve for curve in own if np.isfinite(getattr(curve, axis)).all()]
        if not own:
            continue
        # The mean is over validations that every seed has made.
        shared = sorted(set.intersection(*(set(curve.updates) for curve in own)))
        picked = [np.isin(curve.updates, shared) for curve in own]
        x = np.mean([getattr(curve, axis)[p] for curve, p in zip(own, picked)], axis=0)
        y = np.mean([curve.scores[p] for curve, p in zip(own, picked)], axis=0)
        if len(own) > 1:
            for curve in own:
                at = getattr(curve, axis)
                lines.append(plots.Line("", at, curve.scores, palette[strategy], thin=True))
        lines.append(plots.Line(strategy, x, y, palette[strategy]))
    return lines


# Examples


def _example_cards(examples):
    """What the template needs of each example, with audio and images as data URIs."""
    encoded, kind = audio.encode_all(examples)
    cards = []
    for example in examples:
        loudest = max(
            spectrograms.spectrogram(v.wav, example.sample_rate).max() for v in example.versions
        )
        versions = []
        for v in example.versions:
            image = plots.spectrogram_image(v.wav, example.sample_rate, loudest)
            versions.append(
                {
                    "system": v.system,
                    "seed": v.seed,
                    "image": _data_uri("image/webp", image),
                    "audio": _data_uri(kind, encoded[example.id, v.system]),
                    "words": v.words,
                    "errors": _errors(v.words),
                    "scores": [
                        f"{label} {tables.number(v.scores[key], digits)}"
                        for key, label, digits in (
                            ("pesq", "PESQ", 2),
                            ("stoi", "STOI", 3),
                            ("si_sdr", "SI-SDR", 1),
                        )
                        if v.scores.get(key) is not None
                    ],
                }
            )
        described = [example.info.get("noise_class")]
        if example.info.get("snr") is not None:
            described.append(f"{example.info['snr']:g} dB SNR")
        described.append(f"{len(example.versions[0].wav) / example.sample_rate:.1f} s")
        cards.append(
            {
                "id": example.id,
                "about": ", ".join(str(text) for text in described if text),
                "reference": example.reference,
                "kilohertz": example.sample_rate / 2000,
                "versions": versions,
            }
        )
    return cards


def _errors(words):
    if words is None:
        return None
    count = 0
    for kind, reference, hypothesis in words:
        if kind != "equal":
            count += max(len(reference.split()), len(hypothesis.split()))
    return count


def _data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _alignment(examples, comparison):
    """(caption, svg) of the first example with clean speech and a strategy's output, or None."""
    strategies = [s for s in comparison.systems if s not in UNTRAINED]
    strategies.sort(key=lambda name: "dtw" not in name)
    for example in examples:
        clean = example.wav("clean")
        system = next((s for s in strategies if example.wav(s) is not None), None)
        if clean is None or system is None:
            continue
        speed = 0.9
        found, x, y = spectrograms.expected_alignment(
            example.wav(system), clean, example.sample_rate, speed
        )
        caption = (
            f"{example.id}: expected soft-DTW alignment (gamma 0.1, log-mel features) of the "
            f"output of {system} with the clean speech played at speed {speed}. The dashed line is "
            "what a frame-by-frame loss compares, the bright path where the content is."
        )
        svg = plots.alignment_chart(
            found, x, y, spectrograms.ALIGNMENT_HOP, f"{system} (s)", f"clean, speed {speed} (s)",
            f"Expected alignment of {system} and clean speech",
        )  # fmt: skip
        return caption, Markup(svg)
    return None


# Provenance


def _settings(comparison):
    """[(run, YAML)]: the settings of each trained strategy's first run, home folder left out."""
    found = {}
    for run in comparison.runs:
        path = run.folder / "hyperparams.yaml"
        if run.strategy not in found and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            text = text.replace(f"{Path.cwd()}/", "").replace(str(Path.home()), "~")
            found[run.strategy] = (run.name, text)
    return list(found.values())
