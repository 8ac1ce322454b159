"""Compare runs on one test set: tables with intervals and tests, and an HTML report.

    python recipes/compare.py results/demo
    python recipes/compare.py results/*/* --set test --baseline mse --html

Writes table.{csv,md,tex} (a row per run), summary.{csv,md,tex} (a row per
system, over seeds), convergence.{csv,md} and, if asked, report.html.
"""

import argparse
import shlex
import sys
from pathlib import Path

from pi_finetune.errors import UserError, command
from pi_finetune.report.tables import markdown, run_table, summary_table, write_tables
from pi_finetune.results.comparison import common_folder, compare_runs
from pi_finetune.results.statistics import Bootstrap


@command
def main(argv):
    """Compare, write, print."""
    args = _parser().parse_args(argv)
    if args.replicates < 1 or not 0 < args.confidence < 1:
        raise UserError("--replicates must be at least 1 and --confidence between 0 and 1.")
    for path in args.position_folders or ():
        if not path.is_dir():
            raise UserError(f"--position_folders {path}: no such folder.")
    bootstrap = Bootstrap(args.replicates, args.confidence, args.seed_level, args.random_seed)
    comparison = compare_runs(
        args.runs,
        test_set=args.set,
        baseline=args.baseline,
        intersect=args.intersect,
        recognizer=args.recognizer,
        dev_metric=args.dev_metric,
        bootstrap=bootstrap,
    )
    folder = args.output_folder or common_folder(comparison)
    written = write_tables(comparison, folder)
    if args.html:
        from pi_finetune.report.html import write_report

        typed = shlex.join(["python", "recipes/compare.py", *argv])
        position = args.position_folders or [folder / "position"]
        written.append(
            write_report(
                folder / "report.html",
                comparison,
                command=typed,
                utterances=args.utterances,
                position_folders=position,
            )
        )
    print(run_table(comparison, markdown))
    print(summary_table(comparison, markdown))
    for note in comparison.notes:
        print(f"note: {note}")
    for path in written:
        print(path)


def _parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [RUN ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders STRATEGY/SEED, or folders above them")
    add("--output_folder", type=Path, help="default: the folder that holds the strategies")
    add("--set", help="which scores/SET.jsonl; default: test, or the only one")
    add("--baseline", default="mse", help="differences are taken from it (%(default)s)")
    add("--html", action="store_true", help="write report.html too")
    add("--utterances", nargs="+", metavar="ID", help="examples of the report")
    add("--position_folders", nargs="+", type=Path, metavar="DIR",
        help="position diagnostics to show; default: position/ in the output folder")  # fmt: skip
    add("--intersect", action="store_true", help="compare on the utterances all runs share")
    add("--recognizer", metavar="NAME", help="whose WER is the main one; default: the first")
    add(
        "--dev_metric",
        metavar="NAME",
        help="dev score of convergence: wer, nll, pesq, stoi, estoi, si_sdr",
    )
    add("--replicates", type=int, default=9999, help="bootstrap replicates (%(default)s)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--seed_level", choices=("student", "resample"), default="student",
        help="how training seeds enter the intervals (%(default)s)")  # fmt: skip
    add("--random_seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
