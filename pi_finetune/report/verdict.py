"""Whether to enhance before a recogniser: what a comparison of models says, in plain words."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi_finetune.report.tables import number, signed
from pi_finetune.results.comparison import FEW_RECORDINGS

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison

__all__ = ["Verdict", "verdict"]


#: Of the scores without reference, the one that judges the whole impression.
OVERALL = "dnsmos_ovrl"


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Arguments
    ---------
    kind : str
        ``use`` a system, ``leave`` the speech as it is, or ``undecided``.
    system : str or None
        Which, where one is to be used.
    text : str
        A paragraph.
    """

    kind: str
    system: str | None
    text: str


def verdict(comparison: "Comparison", labels: dict) -> Verdict:
    """Judge models against the noisy speech by the word errors of a recogniser.

    A system is recommended where its difference in word errors is significant after Holm's
    correction over all systems and scores of recognition, and larger than the margin that counts as
    equal. Under :data:`~pi_finetune.results.comparison.FEW_RECORDINGS` recordings nothing is.

    Arguments
    ---------
    comparison : pi_finetune.results.comparison.Comparison
        Of models, its baseline ``noisy``.
    labels : dict
        What each system is called in a sentence: ``{system: text}``.

    Returns
    -------
    Verdict
    """
    found = {s: x for s, x in comparison.summary["wer"].items() if s != comparison.baseline}
    if not found:
        return _without_transcripts(comparison, labels)
    scores = comparison.scores["wer"]
    count = len(scores.ids)
    best = min(found, key=lambda system: found[system].level.estimate)
    change = _change(comparison, "wer", best)
    if count < FEW_RECORDINGS:
        return Verdict(
            "undecided",
            None,
            f"Cannot say: {_recordings(count)} too few, from {FEW_RECORDINGS} on an interval means "
            f"something. On these, the fewest errors are with {labels[best]}: {change}."
            + _others(comparison, best),
        )
    better = [system for system in found if found[system].verdict == "better"]
    if better:
        best = min(better, key=lambda system: found[system].level.estimate)
        text = f"Use {labels[best]}: {_change(comparison, 'wer', best)}."
        if len(found) > 1:
            text += (
                f" It is the best of {len(found)} that were tried on the same recordings, so expect"
                " a little less on new ones."
            )
        return Verdict("use", best, text + _others(comparison, best))
    verdicts = {x.verdict for x in found.values()}
    if verdicts == {"worse"}:
        text = f"Do not enhance: with {labels[best]}, {change}."
        if len(found) > 1:
            text += f" It is the mildest of {len(found)} systems, with each of which they rise."
        return Verdict("leave", None, text + _others(comparison, best))
    if "undecided" not in verdicts:
        equal = [system for system in found if found[system].verdict == "equivalent"]
        best = min(equal, key=lambda system: found[system].level.estimate)
        margin = scores.metric.margin_text()
        text = (
            f"Do not enhance: no system lowers word errors by more than {margin}. With "
            f"{labels[best]} they stay within that, so it does no harm where people listen too: "
            f"{_change(comparison, 'wer', best)}."
        )
        return Verdict("leave", None, text + _others(comparison, best))
    best = min(
        (system for system in found if found[system].verdict == "undecided"),
        key=lambda system: found[system].level.estimate,
    )
    text = f"Cannot say: {_recordings(count)} too few for a difference of this size. With "
    text += f"{labels[best]}, {_change(comparison, 'wer', best)}.{_needed(found[best], count)}"
    worse = [labels[system] for system in found if found[system].verdict == "worse"]
    if worse:
        text += f" What is sure: {_and(worse)} {'adds' if len(worse) == 1 else 'add'} errors."
    text += " Until then, leave the speech as it is."
    return Verdict("undecided", None, text + _others(comparison, best))


def _without_transcripts(comparison, labels):
    """The verdict where only scores that need no reference can speak."""
    names = [m.name for m in comparison.metrics if m.reference is None]
    names = [name for name in names if len(comparison.summary[name]) > 1]
    if not names:
        return Verdict(
            "undecided",
            None,
            "Cannot say: there are no transcripts, so word errors cannot be counted, and no score "
            "that needs no reference was computed. Add transcripts, or install the extra for such "
            "scores: pip install 'pi_finetune[metrics]'.",
        )
    name = OVERALL if OVERALL in names else names[0]
    metric, summary = comparison.scores[name].metric, comparison.summary[name]
    others = [system for system in summary if system != comparison.baseline]
    choose = max if metric.higher_is_better else min
    best = choose(others, key=lambda system: summary[system].level.estimate)
    text = (
        "Cannot say what a recogniser makes of it: there are no transcripts, and only scores that "
        "need no reference can speak. They guess what listeners would say. "
    )
    text += f"By these, {labels[best]} sounds best: {_change(comparison, name, best)}."
    return Verdict("undecided", None, text)


def _change(comparison, name, system):
    """``word errors fall from 31.2 % to 27.9 % (95 % interval of the difference ...)``."""
    metric = comparison.scores[name].metric
    level = comparison.summary[name][system].level.estimate
    before = comparison.summary[name][comparison.baseline].level.estimate
    d = comparison.summary[name][system].difference
    unit = " %" if metric.unit == "%" else ""
    digits = 1 if unit else metric.digits - 1
    several = {"WER": "word errors", "PER": "phoneme errors"}
    single = {"NLL": "the negative log-likelihood of the true transcripts"}
    what = {**several, **single}.get(metric.title, metric.title)
    one = metric.title not in several
    a, b = number(before, digits), number(level, digits)
    verb = "stays" if one else "stay"
    if a != b:
        verb = ("rise" if level > before else "fall") + ("s" if one else "")
    moved = (
        f"{what} {verb} from {a}{unit} to {b}{unit}" if a != b else f"{what} {verb} at {a}{unit}"
    )
    if not math.isfinite(d.low):
        return moved
    percent = f"{100 * comparison.bootstrap.confidence:g} %"
    points = " points" if unit else ""
    low, high = signed(d.low, digits), signed(d.high, digits)
    return f"{moved} ({percent} interval of the difference {low} to {high}{points})"


def _others(comparison, system):
    """What the likelihood and the scores without reference say of a system, in sentences."""
    text = ""
    for metric in comparison.main_metrics:
        found = comparison.summary[metric.name].get(system)
        if metric.name == "wer" or metric.reference == "clean" or found is None:
            continue
        if metric.reference is None and metric.name != OVERALL:
            continue
        change = _change(comparison, metric.name, system)
        text += f" {change[0].upper()}{change[1:]}."
    return text


def _needed(found, count):
    """How many recordings would tell, if the difference stays as it is."""
    d = found.difference
    half = (d.high - d.low) / 2
    if not math.isfinite(half) or abs(d.estimate) * 30 < half:
        return ""  # hundreds of times as many
    needed = count * (half / abs(d.estimate)) ** 2
    if needed <= count:
        return " Correction for the number of systems tried takes the certainty: try fewer."
    digits = 1 - math.floor(math.log10(needed))
    return (
        f" If that stays as it is, about {round(needed, digits):.0f} recordings in all would tell."
    )


def _recordings(count):
    return "one recording is" if count == 1 else f"{count} recordings are"


def _and(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
