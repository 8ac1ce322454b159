"""Does enhancement hurt a recogniser, and what to do? On one's own recordings.

    python recipes/check.py recordings --asr_source openai/whisper-tiny.en
    python recipes/check.py wav.scp --run results/soft_dtw/1234 --mix 0.5 0.75 1

The noisy speech, the shipped enhancer and the runs that are named, each at some mixes with the
input, are scored, compared with intervals, and judged in a paragraph.
"""

import argparse
import contextlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from pi_finetune.commands import options_parser, read_options, words
from pi_finetune.errors import UserError, command

#: The name under which scores are filed.
TEST_SET = "recordings"


def _mix(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and up to 1")
    return value


#: Name of each option, and how argparse reads it.
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {
        "nargs": "+",
        "metavar": "RUN",
        "help": "run folders, or names on the hub, beside the shipped enhancer",
    },
    "mix": {
        "nargs": "+",
        "type": _mix,
        "default": [0.4, 0.7, 1.0],
        "metavar": "SHARE",
        "help": "shares of the enhanced signal, the rest is the input (0.4 0.7 1)",
    },
    "asr_source": {
        "default": "openai/whisper-tiny.en",
        "metavar": "NAME",
        "help": "your recogniser: a Whisper hub name or folder, or one of train_asr (%(default)s)",
    },
    "channel": {"type": int, "help": "the channel to take, from 1; default: the mean of all"},
    "utterances": {"type": int, "help": "so many, spread over speakers; default: all"},
    "output_folder": {"metavar": "DIR", "help": "default: checks/NAME"},
    "no_dnsmos": {
        "action": "store_true",
        "default": False,
        "help": "leave DNSMOS out, which takes most of the time on a CPU",
    },
    "batch_size": {"type": int, "default": 8, "help": "utterances at once (%(default)s)"},
    "workers": {"type": int, "help": "processes that compute DNSMOS; default: one a core"},
    "device": {"help": "cpu or cuda; default: a GPU if there is one"},
    "overwrite": {
        "action": "store_true",
        "default": False,
        "help": "discard scores made of other recordings or with other settings",
    },
    "trust": {
        "action": "store_true",
        "default": False,
        "help": "allow a run's folder to run code of its own",
    },
}


def check(recordings, **options):
    """Does enhancement hurt a recogniser, and what to do? On one's own recordings.

    The noisy speech, the shipped enhancer and the runs that are named, each at some mixes with the
    input, are scored, compared with intervals, and judged in a paragraph. Without transcripts only
    scores that need no reference can speak. Interrupted, the same command continues.

    Arguments
    ---------
    recordings : str or Path
        A folder of audio (with ``*.trans.txt`` where there are transcripts), a Kaldi data folder or
        its ``wav.scp``, a CSV of SpeechBrain, cuts of lhotse or ``hf:NAME``; see
        :func:`pi_finetune.data.recordings.prepare_recordings`.
    options
        The options below by their names, e.g. ``mix=[0.5, 1.0]``.

    Returns
    -------
    pi_finetune.report.verdict.Verdict
    """
    args, changed = read_options("check", OPTIONS, options)
    for name in ("utterances", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a whole number from 1 on.")
    shares = sorted(set(args.mix))
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError("--mix: give shares above 0 and up to 1.")
    name = re.sub(r"[^\w.-]+", "_", str(recordings).rstrip("/")).strip("_.") or "here"
    folder = Path(args.output_folder or Path("checks", name))

    from tqdm import tqdm

    from pi_finetune.data.recordings import load_recordings
    from pi_finetune.distributed import on_main, rank, start_processes
    from pi_finetune.report.html import write_report
    from pi_finetune.report.tables import markdown, summary_table, write_tables
    from pi_finetune.report.verdict import verdict
    from pi_finetune.results.comparison import compare_runs
    from pi_finetune.results.evaluation import evaluate_mixes, load_recognizers
    from pi_finetune.run_folder import Lock

    device = start_processes({"device": args.device} if args.device else None).device
    data = on_main(load_recordings, recordings, args.channel, args.utterances)
    texts = [data.item_text(i) for i in range(len(data))]
    transcribed = sum(text is not None for text in texts)
    _say(f"{len(data)} recordings, {sum(data.seconds()) / 60:.1f} min, {transcribed} transcribed")
    if not transcribed:
        _say("Without transcripts no word errors can be counted; no recogniser is loaded.")
        if args.no_dnsmos:
            raise UserError(
                "--no_dnsmos: without transcripts nothing else can speak. Leave it out."
            )
    recognizers = load_recognizers(args.asr_source if transcribed else None)
    systems, labels = [({1.0: folder / "noisy" / "0"}, None)], {}
    for name, label, enhancer in _load(args.run or [], device, args.trust):
        folders = {share: folder / f"{name}-mix{share:g}" / "0" for share in shares}
        labels |= {f"{name}-mix{share:g}": f"{label} at mix {share:g}" for share in shares}
        systems.append((folders, enhancer))
    every = [place for folders, _ in systems for place in folders.values()]
    layout = "{desc}{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}, {remaining} left]"
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lock(folder / ".check.lock", "a check"))
        bar = tqdm(total=len(data) * len(every), bar_format=layout, disable=rank() > 0)
        stack.enter_context(bar)
        for folders, enhancer in systems:
            evaluate_mixes(
                folders,
                enhancer,
                data,
                recognizers,
                test_set=TEST_SET,
                batch_size=args.batch_size,
                workers=args.workers,
                num_workers=1,
                audio_examples=3,
                overwrite=args.overwrite,
                device=device,
                bar=bar,
                names=[] if args.no_dnsmos else None,
            )
    comparison = compare_runs(every, TEST_SET, baseline="noisy", of_models=True)
    found = verdict(comparison, labels)
    if rank() > 0:
        return found
    line = shlex.join(["python", *words("check", [recordings], flags=changed)])
    written = write_tables(comparison, folder)
    title = f"Does enhancement help on {recordings}?"
    report = write_report(
        folder / "report.html", comparison, command=line, title=title, answer=found.text
    )
    print(summary_table(comparison, markdown))
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"\n{found.text}\n")
    print(f"All numbers: {written[0]}")
    print(f"Report, with audio: {report}")
    return found


def _load(runs, device, trust):
    """Name, label and enhancer of the shipped model and of each run; all before any is scored."""
    from pi_finetune.inference import DEFAULT_MODEL, Enhancer
    from pi_finetune.results.evaluation import LONG_SECONDS
    from pi_finetune.results.runs import UNTRAINED

    named = {"shipped": (DEFAULT_MODEL, "the shipped enhancer")}
    for run in runs:
        place = Path(run).resolve() if Path(run).is_dir() else Path(run)
        name = f"{place.parent.name}-{place.name}" if place.name.isdecimal() else place.name
        if name in named or name in UNTRAINED:
            raise UserError(
                f"--run {run}: its results would be called {name}, which something else is. Give "
                "one of the folders another name."
            )
        named[name] = run, str(run)
    options = {"trust": trust, "whole_seconds": LONG_SECONDS}
    return [
        (name, label, Enhancer.from_run(source, device, **options))
        for name, (source, label) in named.items()
    ]


def _say(text):
    from pi_finetune.distributed import rank

    if rank() == 0:
        print(text, flush=True)


def parser(program="python recipes/check.py"):
    """The command line: the recordings, and the options."""
    about = inspect.getdoc(check).split("\n\nArguments")[0]
    argument = {
        "dest": "recordings",
        "metavar": "RECORDINGS",
        "help": "folder of audio, Kaldi data folder or wav.scp, .csv, cuts.jsonl.gz or hf:NAME",
    }
    examples = [
        "recordings --asr_source openai/whisper-tiny.en",
        "data/chime4 --run results/soft_dtw/1234 --mix 0.5 1",
    ]
    return options_parser(program, [argument], about, examples, OPTIONS)


@command
def main(argv, program="python recipes/check.py"):
    """The command line."""
    check(**vars(parser(program).parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
