"""How many utterances and seeds decide a difference, from the scores of a pilot.

python recipes/power.py results/soft_dtw results/mse
python recipes/power.py results/soft_dtw results/mse --metric nll --difference 0.02
"""

import inspect
import sys
from typing import Any

from pi_finetune.commands import options_parser, read_options
from pi_finetune.errors import UserError, command
from pi_finetune.report.tables import MISSING, markdown, number, signed
from pi_finetune.results.power import Pilot, load_pilots

#: Name of each option, and how argparse reads it.
OPTIONS: dict[str, dict[str, Any]] = {
    "metric": {"help": "e.g. wer, nll, pesq; default: the main ones that have a margin"},
    "difference": {
        "type": float,
        "help": "true difference that is to be found, in the metric's unit; default: the margin",
    },
    "margin": {"type": float, "help": "of equivalence; default: the one that compare tests"},
    "seeds": {
        "type": int,
        "nargs": "+",
        "default": [2, 3, 5, 10, 20],
        "help": "numbers of seeds to plan for (2 3 5 10 20)",
    },
    "power": {"type": float, "default": 0.8, "help": "wanted probability (%(default)s)"},
    "confidence": {"type": float, "default": 0.95, "help": "as of compare (%(default)s)"},
    "set": {"help": "which scores/SET.jsonl; default: test, or the only one"},
    "recognizer": {"metavar": "NAME", "help": "whose WER is the main one; default: the first"},
}


def power(system, baseline, **options) -> list[Pilot]:
    """Say how many utterances and seeds decide a difference, from the scores of a pilot.

    Prints, for each metric, the parts of the difference's variance and the utterances that it takes
    for a true difference to be found, and for none to be shown equivalent within the margin.

    Arguments
    ---------
    system, baseline : str or Path
        Folders of one system each, e.g. results/soft_dtw and results/mse, evaluated on one set.
    options
        The options below by their names, e.g. ``metric="nll", difference=0.02``.

    Returns
    -------
    list of Pilot
        What was printed, as numbers.
    """
    args, _ = read_options("power", OPTIONS, options)
    if not (0 < args.power < 1 and 0.5 < args.confidence < 1):
        raise UserError("--power must be between 0 and 1, --confidence between 0.5 and 1.")
    if args.difference == 0 or (args.margin is not None and not args.margin > 0):
        raise UserError("--difference must not be 0, and --margin must be above 0.")
    if min(args.seeds) < 2:
        raise UserError("--seeds must be at least 2: one says nothing of how much training varies.")
    notes: list[str] = []
    pilots = load_pilots(system, baseline, args.set, args.recognizer, notes)
    names = [pilot.metric.name for pilot in pilots]
    if args.metric is not None and args.metric not in names:
        raise UserError(
            f"--metric {args.metric}: both systems have scores in {', '.join(names) or 'none'}."
        )
    chosen = [
        pilot
        for pilot in pilots
        if pilot.metric.name == args.metric
        or (args.metric is None and pilot.margin and not pilot.metric.names_recognizer)
    ]
    if not chosen:
        raise UserError(f"Choose one with --metric: {', '.join(names) or 'there is no score'}.")
    for pilot in chosen:
        print(report(pilot, args))
    for note in notes:
        print(f"note: {note}")
    return chosen


def report(pilot, args):
    """A pilot's variance, and the table of what decides."""
    metric, alpha, parts = pilot.metric, 1 - args.confidence, pilot.components
    margin = args.margin or pilot.margin
    difference = args.difference or margin
    if difference is None:
        raise UserError(f"{metric.name} has no margin: give --difference, and --margin if wanted.")
    digits = metric.digits + 1
    unit = " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
    error = parts.standard_error(pilot.seeds, pilot.utterances)
    lines = [
        f"{metric.label}: {signed(pilot.difference, digits)} from {number(pilot.level, digits)}, "
        f"standard error {number(error, digits)}, in a pilot of {pilot.seeds} "
        f"seed{'s' * (pilot.seeds > 1)} and {pilot.utterances} {pilot.unit}s",
    ]
    seeds = args.seeds
    if pilot.seeds == 1:
        seeds = [1]
        lines += [
            f"standard deviation by {pilot.unit}: {number(parts.utterance, digits)}",
            "One seed: how much training varies cannot be known from it. What follows is about "
            "these two models alone; train both with two seeds more.",
        ]
    else:
        lines += [
            f"standard deviations: by seed {number(parts.seed, digits)}, by {pilot.unit} "
            f"{number(parts.utterance, digits)}, both {number(parts.both, digits)}"
        ]
        if pilot.seeds < 5:
            lines += [f"that by seed, from {pilot.seeds} seeds, is a rough estimate"]
    header = ["seeds", f"{pilot.unit}s to find {abs(difference):.3g}{unit}"]
    if margin is not None:
        header.append(f"{pilot.unit}s to show equivalence within {margin:.3g}{unit}")
    body = []
    for count in seeds:
        found = [pilot.utterances_for(args.power, count, difference=difference, alpha=alpha)]
        if margin is not None:
            found.append(pilot.utterances_for(args.power, count, margin=margin, alpha=alpha))
        body.append([str(count), *(MISSING if n is None else f"{n}" for n in found)])
    if any(MISSING in row for row in body):
        lines.append(f"{MISSING}: no number of {pilot.unit}s is enough with so few seeds")
    lines.append(f"power {args.power:g}, level {alpha:.2g}, before any correction for many tests")
    return "\n".join([*lines, "", markdown(header, body)])


def parser(program="python recipes/power.py"):
    """The command line: two systems, and the options."""
    about = inspect.getdoc(power).split("\n\nArguments")[0]
    arguments = [
        {
            "dest": "system",
            "metavar": "SYSTEM",
            "help": "folder of one system, e.g. results/soft_dtw",
        },
        {
            "dest": "baseline",
            "metavar": "BASELINE",
            "help": "folder of the system it is compared with",
        },
    ]
    examples = [
        "results/soft_dtw results/mse",
        "results/soft_dtw results/mse --metric nll --difference 0.02",
    ]
    return options_parser(program, arguments, about, examples, OPTIONS)


@command
def main(argv, program="python recipes/power.py"):
    """The command line."""
    power(**vars(parser(program).parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
