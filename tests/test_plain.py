"""The short table at the end of the demo."""

from types import SimpleNamespace

from pi_finetune.report.plain import plain_summary
from pi_finetune.results.statistics import Difference, Interval


def comparison(low, high):
    def system(level, difference=None):
        return SimpleNamespace(level=Interval(level, level - 2, level + 2), difference=difference)

    change = Difference(-12.0, low, high, 0.99, 0.01, False)
    wer = {
        "noisy": system(41.0),
        "clean": system(2.0),
        "mse": system(33.0, Difference(-8.0, -10.0, -6.0, 0.99, 0.01, False)),
        "soft_dtw": system(29.0, change),
    }
    return SimpleNamespace(
        baseline="noisy",
        metrics=[SimpleNamespace(name="wer", label="WER", digits=2)],
        summary={"wer": wer},
        bootstrap=SimpleNamespace(confidence=0.95),
    )


def test_best_first_and_a_sentence_of_what_was_gained():
    text = plain_summary(comparison(-15.0, -9.0))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert [row.split()[0] for row in rows[2:]] == ["clean", "soft_dtw", "mse", "noisy"]
    assert "soft_dtw lowers wrong words from 41.0 %" in text and "to 29.0 %" in text
    assert "95 % interval -15.0 to -9.0" in text and "more than chance" in text


def test_what_may_be_chance_is_said_to_be():
    assert "may be chance" in plain_summary(comparison(-25.0, 1.0))
