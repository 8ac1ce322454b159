"""A comparison for readers who do not know the field: one short table, and a sentence under it."""

from typing import TYPE_CHECKING

from pi_finetune.report.tables import interval_text, markdown, number

if TYPE_CHECKING:
    from pi_finetune.results.comparison import Comparison

__all__ = ["plain_summary"]


#: What the rows are that are no strategy.
_EXPLAINED = {
    "noisy": "noisy (no enhancement)",
    "clean": "clean (no noise: the limit)",
    "pretrained": "pretrained (where fine-tuning starts)",
}


def plain_summary(comparison: "Comparison") -> str:
    """The systems, fewest word errors first, and in words what the best strategy gained.

    Arguments
    ---------
    comparison : pi_finetune.results.comparison.Comparison
        Differences in it are from its baseline; ``noisy`` tells the most.

    Returns
    -------
    str
        Markdown; empty where no system has word errors.
    """
    metrics = {metric.name: metric for metric in comparison.metrics}
    found = comparison.summary.get("wer", {})
    order = sorted(found, key=lambda system: found[system].level.estimate)
    if not order:
        return ""
    quality = comparison.summary.get("pesq", {})
    body = [
        [
            _EXPLAINED.get(system, system),
            number(found[system].level.estimate, 1) + interval_text(found[system].level, 1),
            number(quality[system].level.estimate, 2) if system in quality else "",
        ]
        for system in order
    ]
    unit = "phonemes" if metrics["wer"].label.startswith("PER") else "words"
    text = markdown(["system", f"wrong {unit} in %", "PESQ (1 to 4.6, more is better)"], body)
    best = next((system for system in order if system not in _EXPLAINED), "")
    start = found.get(comparison.baseline)
    change = found[best].difference if best else None
    if start is None or change is None:
        return text
    before, after = start.level.estimate, found[best].level.estimate
    verb = "lowers" if after < before else "raises" if after > before else "leaves"
    sure = change.low > 0 or change.high < 0
    percent = round(100 * comparison.bootstrap.confidence)
    baseline = _EXPLAINED.get(comparison.baseline, comparison.baseline)
    return (
        f"{text}\n\n{best} {verb} wrong {unit} from {before:.1f} % of {baseline} to {after:.1f} %; "
        f"the difference is {change.estimate:+.1f}\npoints, {percent} % interval {change.low:+.1f} "
        f"to {change.high:+.1f}: "
        + ("more than chance." if sure else "it may be chance, more test speech would tell.")
    )
