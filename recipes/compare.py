"""Compare runs on one test set: tables with intervals and tests, and an HTML report.

    python recipes/compare.py results/demo
    python recipes/compare.py results/*/* --set test --baseline mse --html

Writes table.{csv,md,tex} (a row per run), summary.{csv,md,tex} (a row per
system, over seeds), convergence.{csv,md} and, if asked, report.html.
"""

import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

from pi_finetune.commands import options_parser, read_options, words
from pi_finetune.errors import UserError, command
from pi_finetune.report.plain import plain_summary
from pi_finetune.report.tables import (
    difference_table,
    markdown,
    run_table,
    summary_table,
    write_tables,
)
from pi_finetune.results.comparison import common_folder, compare_runs
from pi_finetune.results.statistics import Bootstrap

#: Name of each option, and how argparse reads it.
OPTIONS: dict[str, dict[str, Any]] = {
    "output_folder": {"help": "default: the folder that holds the strategies"},
    "set": {"help": "which scores/SET.jsonl; default: test, or the only one"},
    "baseline": {"default": "mse", "help": "differences are taken from it (%(default)s)"},
    "plain": {
        "action": "store_true",
        "default": False,
        "help": "print a short table, best first, with a sentence",
    },
    "html": {"action": "store_true", "default": False, "help": "write report.html too"},
    "utterances": {"nargs": "+", "metavar": "ID", "help": "examples of the report"},
    "position_folders": {
        "nargs": "+",
        "metavar": "DIR",
        "help": "position diagnostics to show; default: position/ in the output folder",
    },
    "intersect": {
        "action": "store_true",
        "default": False,
        "help": "compare on the utterances all runs share",
    },
    "recognizer": {"metavar": "NAME", "help": "whose WER is the main one; default: the first"},
    "dev_metric": {
        "metavar": "NAME",
        "help": "dev score of convergence: wer, nll, pesq, stoi, estoi, si_sdr",
    },
    "replicates": {"type": int, "default": 9999, "help": "bootstrap replicates (%(default)s)"},
    "confidence": {"type": float, "default": 0.95, "help": "of the intervals (%(default)s)"},
    "seed_level": {
        "choices": ("student", "resample"),
        "default": "student",
        "help": "how training seeds enter the intervals (%(default)s)",
    },
    "random_seed": {"type": int, "default": 0, "help": "of the bootstrap (%(default)s)"},
}


def compare(runs, **options):
    """Compare runs on one test set: tables with intervals and tests, and an HTML report.

    Writes table.{csv,md,tex} (a row per run), summary.{csv,md,tex} (a row per system, over seeds),
    convergence.{csv,md} and, if asked, report.html.

    Arguments
    ---------
    runs : list of str or Path
        Run folders STRATEGY/SEED, or folders above them.
    options
        The options below by their names, e.g. ``baseline="mse", html=True``.

    Returns
    -------
    list of Path
        The files written.
    """
    args, changed = read_options("compare", OPTIONS, options)
    if args.replicates < 1 or not 0 < args.confidence < 1:
        raise UserError("--replicates must be at least 1 and --confidence between 0 and 1.")
    position = [Path(path) for path in args.position_folders or ()]
    for path in position:
        if not path.is_dir():
            raise UserError(f"--position_folders {path}: no such folder.")
    bootstrap = Bootstrap(args.replicates, args.confidence, args.seed_level, args.random_seed)
    comparison = compare_runs(
        [Path(run) for run in runs],
        test_set=args.set,
        baseline=args.baseline,
        intersect=args.intersect,
        recognizer=args.recognizer,
        dev_metric=args.dev_metric,
        bootstrap=bootstrap,
    )
    folder = Path(args.output_folder or common_folder(comparison))
    written = write_tables(comparison, folder)
    if args.html:
        from pi_finetune.report.html import write_report

        written.append(
            write_report(
                folder / "report.html",
                comparison,
                command=shlex.join(["python", *words("compare", runs, flags=changed)]),
                utterances=args.utterances,
                position_folders=position or [folder / "position"],
            )
        )
    if args.plain:
        for note in comparison.notes:
            print(f"note: {note}")
        print(f"\n{plain_summary(comparison)}\n")
        print(f"All numbers: {folder / 'table.csv'}")
        if args.html:
            print(f"Report, with audio: {folder / 'report.html'}")
        return written
    print(run_table(comparison, markdown))
    print(summary_table(comparison, markdown))
    if comparison.baseline is not None:
        print(difference_table(comparison, markdown))
    for note in comparison.notes:
        print(f"note: {note}")
    for path in written:
        print(path)
    return written


def parser(program="python recipes/compare.py"):
    """The command line: runs, and the options."""
    about = inspect.getdoc(compare).split("\n\nArguments")[0]
    runs = {
        "dest": "runs",
        "nargs": "+",
        "metavar": "RUN",
        "help": "run folders STRATEGY/SEED, or folders above them",
    }
    examples = ["results/demo", "results/*/* --set test --baseline mse --html"]
    return options_parser(program, [runs], about, examples, OPTIONS)


@command
def main(argv, program="python recipes/compare.py"):
    """The command line."""
    compare(**vars(parser(program).parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
