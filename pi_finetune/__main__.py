"""The command line: ``pi-finetune COMMAND``, the same as ``python -m pi_finetune COMMAND``.

demo, train, evaluate, compare, power, ablate and probe are the recipes of that name; their help
comes from the recipe's docstring and the experiment file. Nothing here imports PyTorch before a
command needs it.
"""

import argparse
import ast
import importlib
import inspect
import itertools
import os
import signal
import sys
import textwrap
from typing import NamedTuple

from pi_finetune import __version__
from pi_finetune.errors import UserError, command
from pi_finetune.files import PROJECT_ROOT, shown

__all__ = ["PROGRAMS", "RECIPES", "main", "parser"]

OVERVIEW_EXAMPLES = """examples:
  pi-finetune train soft_dtw --data_folder LibriSpeech --noise_folder noise
  pi-finetune evaluate --run results/soft_dtw/1234
  pi-finetune compare results --html
  pi-finetune check recordings --asr_source openai/whisper-tiny.en
  pi-finetune enhance noisy.wav -o enhanced.wav --model results/soft_dtw/1234
"""


class Recipe(NamedTuple):
    """A command that is a recipe: its module, its function, and the experiment if none is named."""

    module: str
    function: str
    experiment: str | None  # None: one must be named
    examples: tuple[str, ...]


RECIPES = {
    "train": Recipe("train", "train", None, (
        "soft_dtw", "mse --data_folder LibriSpeech --noise_folder DEMAND",
    )),
    "evaluate": Recipe("evaluate", "evaluate", "evaluate", (
        "--run results/soft_dtw/1234", '--run "[noisy, pretrained, results/mse/1234]"',
    )),
    "ablate": Recipe("ablate", "ablate", "ablation", (
        "", '--workers 4 --strategies "[mse, soft_dtw]"', "--cluster slurm --workers null",
    )),
    "demo": Recipe("ablate", "ablate", "demo", ("",)),
    "probe": Recipe("probe_position", "probe", "probe_position", (
        "--teacher_source openai/whisper-tiny.en --data_folder LibriSpeech",
        '--diagnostics "[gradients, causal]"',
    )),
}  # fmt: skip

#: Recipes that take no experiment file: they parse their own options.
PROGRAMS = ("check", "compare", "power")

ENHANCE_EXAMPLES = """examples:
  pi-finetune enhance noisy.wav -o enhanced.wav
  pi-finetune enhance recordings more.flac -o enhanced --skip-existing
  pi-finetune enhance meeting.mp3 -o out.wav --model results/soft_dtw/1234 --mix 0.8
"""

SHOW_HELP = """usage: pi-finetune show EXPERIMENT [--KEY VALUE ...]

Print an experiment file as it will run: with what it extends and includes, the overrides, and every
reference replaced by its value. HyperPyYAML's load_hyperpyyaml opens what is printed, and so does
pi-finetune train.

examples:
  pi-finetune show soft_dtw
  pi-finetune show soft_dtw --teacher_preset wavlm_large --seed 2"""

EXPORT_EXAMPLES = """examples:
  pi-finetune export results/soft_dtw/1234 -o my-enhancer
  pi-finetune export results/soft_dtw/1234 -o my-enhancer --format speechbrain onnx torch
  pi-finetune enhance noisy.wav -o enhanced.wav --model my-enhancer
"""

PUSH_EXAMPLES = """examples:
  pi-finetune push results/soft_dtw/1234 me/my-enhancer --license cc-by-4.0 --dry_run
  pi-finetune push results/soft_dtw/1234 me/my-enhancer --license cc-by-4.0 --private
"""

PAGE_EXAMPLES = """examples:
  pi-finetune demo-page
  pi-finetune demo-page --run results/soft_dtw/1234 --asr_source openai/whisper-tiny.en --mix 0.8
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; the recipes parse their own arguments."""
    top = argparse.ArgumentParser(
        prog="pi-finetune",
        description="Position-invariant fine-tuning of speech enhancement models.",
        epilog=OVERVIEW_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"pi_finetune {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    abouts = {name: recipe_text(recipe.module, recipe.function) for name, recipe in RECIPES.items()}
    abouts |= {name: recipe_text(name, name) for name in PROGRAMS}
    abouts["show"] = inspect.getdoc(run_show)
    for name, text in abouts.items():
        commands.add_parser(name, help=text.split("\n")[0], add_help=False)

    enhance = commands.add_parser(
        "enhance",
        help="enhance audio files",
        description="Enhance audio files and folders of them: any rate, channels and length.",
        epilog=ENHANCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    enhance.add_argument("inputs", nargs="+", metavar="IN", help="audio files or folders of them")
    enhance.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="output file for one input file, else the folder to write into",
    )
    enhance.add_argument(
        "--model",
        metavar="RUN_OR_HUB",
        help="run folder, exported folder, or name on the hub (default: the shipped model)",
    )
    enhance.add_argument(
        "--mix",
        type=_share,
        default=1.0,
        metavar="0..1",
        help="share of the enhanced signal, the rest is the input (default 1)",
    )
    enhance.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    enhance.add_argument(
        "--skip-existing", action="store_true", help="leave outputs alone that are there already"
    )
    enhance.add_argument(
        "--trust",
        action="store_true",
        help="allow the model folder to run code of its own (SpeechBrain models need it)",
    )
    enhance.set_defaults(run=run_enhance)

    export = commands.add_parser(
        "export",
        help="write a trained model for SpeechBrain, the hub, ONNX or torch.export",
        description="Write a run's best model and its model card into a folder that SpeechBrain "
        "and pi_finetune load,\nand that can be uploaded to the hub as it is.",
        epilog=EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run_or_hub", metavar="RUN", help="run folder, or name on the hub")
    export.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write")
    _add_export_options(export)
    export.set_defaults(run=run_export)

    push = commands.add_parser(
        "push",
        help="upload a trained model to the hub",
        description="Export a run, see pi-finetune export, and upload the folder to the hub, with "
        "a model card\nthat has the scores of its evaluation.",
        epilog=PUSH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("run_or_hub", metavar="RUN", help="run folder, or name on the hub")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; made if missing")
    _add_export_options(push)
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument(
        "--dry_run",
        action="store_true",
        help="show what would be uploaded; needs no network and no login",
    )
    push.set_defaults(run=run_push)

    page = commands.add_parser(
        "demo-page",
        help="hear and see in the browser what a model does",
        description="Serve a page: upload or record, hear noisy and enhanced, see spectrograms, "
        "and what a recogniser hears.\nIt needs gradio (the extra `page`); nothing is fetched "
        "from or sent to the internet.",
        epilog=PAGE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    page.add_argument("--run", metavar="RUN", dest="model", help="as --model of enhance")
    page.add_argument(
        "--asr_source",
        metavar="SOURCE",
        default=str(PROJECT_ROOT / "assets" / "models" / "asr"),
        help="recogniser, as of evaluate; null for none (default: the shipped one)",
    )
    page.add_argument("--mix", type=_share, default=1.0, metavar="0..1", help="first value")
    page.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    page.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    page.add_argument(
        "--trust", action="store_true", help="allow the model folder to run code of its own"
    )
    page.set_defaults(run=run_page)

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and what is missing",
        description="Show versions, devices and soft-DTW backends, and what is missing with its "
        "remedy.\nThe exit status is 0 if nothing needed is missing.",
        epilog="example:\n  pi-finetune doctor\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.set_defaults(run=run_doctor)
    return top


def _add_export_options(command):
    """The options that export and push share."""
    command.add_argument(
        "--format",
        nargs="+",
        choices=("speechbrain", "onnx", "torch"),
        default=["speechbrain"],
        help="speechbrain: hyperparams.yaml and enhancer.ckpt (default); onnx: enhancer.onnx; "
        "torch: enhancer.pt2, a torch.export program",
    )
    command.add_argument(
        "--license", metavar="ID", help="for the model card, e.g. cc-by-4.0 (default: none stated)"
    )
    command.add_argument(
        "--trust", action="store_true", help="allow the run's folder to run code of its own"
    )


def recipe_text(module, function):
    """The docstring of a recipe's function, up to its arguments; read without importing PyTorch."""
    source = (PROJECT_ROOT / "recipes" / f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").split("\n\nArguments\n")[0]
    raise LookupError(f"recipes/{module}.py has no function {function}")


def run_recipe(name, argv):
    """Run a recipe's own ``main``; what is named first may be a shipped experiment file."""
    recipe = RECIPES[name]
    named = argv and not argv[0].startswith("-")
    if any(word in ("-h", "--help") for word in argv):
        print(recipe_help(name, argv[0] if named else recipe.experiment))
        return 0
    argv = _with_experiment(name, argv)
    if name == "demo" and not (PROJECT_ROOT / "assets" / "mini").is_dir():
        raise UserError(
            "The demo needs the mini corpus, which an installed package leaves out for its "
            "size: run it in a clone of the project."
        )
    module = importlib.import_module(f"pi_finetune.recipes.{recipe.module}")
    return module.main(argv)


def _with_experiment(name, argv):
    """The words with the experiment's file before the options."""
    named = bool(argv) and not argv[0].startswith("-")
    default = RECIPES[name].experiment if name in RECIPES else None
    if not named and default is None:
        raise UserError(
            f"Name an experiment first, e.g. pi-finetune {name} mse, or a YAML file of your "
            "own; pi-finetune train --help lists the shipped ones."
        )
    from pi_finetune.config import find_hparams

    path = find_hparams(argv[0] if named else default or "")
    return [str(path), *(argv[1:] if named else argv)]


def run_show(argv):
    """Print an experiment file as it will run: complete, with the overrides, without references."""
    if not argv or argv[0] in ("-h", "--help"):
        print(SHOW_HELP)
        return 0
    from pi_finetune.commands import parse
    from pi_finetune.config import resolve

    experiment, overrides, _ = parse(_with_experiment("show", argv))
    print(resolve(experiment, overrides), end="")
    return 0


def recipe_help(name, experiment):
    """Help of a recipe that takes an experiment file; of one such file if it is named."""
    from pi_finetune.config import find_hparams

    recipe = RECIPES[name]
    named = "EXPERIMENT" if recipe.experiment is None else "[EXPERIMENT]"
    lines = [f"usage: pi-finetune {name} {named} [--KEY VALUE ...]", ""]
    if experiment is None or experiment == recipe.experiment:
        lines += [recipe_text(recipe.module, recipe.function), "", "examples:"]
        lines += [f"  pi-finetune {name} {words}".rstrip() for words in recipe.examples]
        lines += [""]
    if experiment is None:
        lines += ["EXPERIMENT is a YAML file, or one of the shipped ones:"]
        for path in sorted((PROJECT_ROOT / "hparams").glob("*.yaml")):
            if "\nstrategy: " in path.read_text(encoding="utf-8") and path.stem != "finetune":
                lines.append(f"  {path.stem:<19}{_about(path)}")
        lines += [
            "",
            f"pi-finetune {name} mse --help    the keys of one of them",
            "pi-finetune show mse            all of it, as it will run",
        ]
    else:
        path = find_hparams(experiment)
        lines += [str(path), *textwrap.wrap(_about(path), 98), "", *_keys(path)]
        if experiment != recipe.experiment:
            lines += ["", "example:", f"  pi-finetune {name} {experiment} --device cpu --debug"]
    lines += [
        "",
        "Options of SpeechBrain work as well, among them --device cuda, --precision bf16,",
        "--noprogressbar, --debug (a few updates, to see whether it runs).",
    ]
    return "\n".join(lines)


def _about(path):
    """The comment at the head of an experiment file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in head)


def _keys(path):
    """What can be set on the command line, with its value in the file."""
    from pi_finetune.config import _merged_tree

    values, blocks = [], []
    for key, value in _merged_tree(path).items():
        tag = getattr(getattr(value, "tag", None), "value", None)  # !ref, !new, ...
        nested = isinstance(value, dict) or tag not in (None, "!ref", "!PLACEHOLDER")
        nested = nested or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        if nested and key != "assets":
            blocks.append(key)
        elif not nested and not key.startswith("__"):
            shown = "null" if value is None else getattr(value, "value", value)
            if isinstance(value, list):
                shown = f'"[{", ".join(map(str, value))}]"'
            values.append(f"--{key} {'...' if tag == '!PLACEHOLDER' else shown}")

    def filled(items, separator):
        # A key and its value stay on one line.
        text = separator.join(item.replace(" ", "\0") for item in items)
        lines = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
        return ["  " + line.replace("\0", " ") for line in lines]

    return [
        "keys and their values in the file (<key> is the value of another, ... must be given):",
        *filled(values, "   "),
        f"blocks, to be set in a file of your own that begins with `extends: {path.name}`:",
        *filled([key for key in blocks if not key.startswith("__")], ", "),
    ]


def _share(text):
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def run_enhance(options):
    """Enhance all inputs; a file that fails is named and the others go on."""
    import soundfile
    import torch
    from tqdm import tqdm

    from pi_finetune.inference import Enhancer, output_paths

    pairs = output_paths(options.inputs, options.output)
    if options.skip_existing:
        pairs = [(source, target) for source, target in pairs if not target.exists()]
    enhancer = Enhancer.from_run(options.model, device=options.device, trust=options.trust)

    def seconds(path):
        try:
            return soundfile.info(os.fsencode(path)).duration
        except (OSError, RuntimeError, TypeError):
            return 0  # named when its turn comes

    failures = []
    total = sum(seconds(source) for source, _ in pairs)
    layout = (
        "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    )
    with tqdm(total=total, bar_format=layout, disable=None) as bar:
        for source, target in pairs:
            bar.set_description(shown(source.name))
            try:
                written = enhancer.enhance_file(source, target, options.mix, progress=bar.update)
                if written.notice:
                    tqdm.write(f"warning: {written.notice}", file=sys.stderr)
            except (UserError, torch.OutOfMemoryError) as error:
                failures.append(source)
                tqdm.write(f"error: {error}", file=sys.stderr)
    done = len(pairs) - len(failures)
    print(f"{done} of {len(pairs)} files enhanced: {shown(options.output)}")
    return 1 if failures else 0


def run_export(options):
    """Export a run and print the files."""
    from pi_finetune.export import export_run

    files = export_run(
        options.run_or_hub, options.output, options.format, options.trust, options.license
    )
    for path in files:
        print(path)
    return 0


def run_push(options):
    """Upload a run, or show what would be uploaded."""
    from pi_finetune.export import push_run

    pushed = push_run(
        options.run_or_hub,
        options.repo,
        options.format,
        options.trust,
        options.license,
        private=True if options.private else None,
        message=options.message,
        dry_run=options.dry_run,
    )
    print(f"{pushed.repo}: a model{', private' if pushed.private else ''}")
    for name, size in pushed.files.items():
        print(f"  {size:>12,} bytes  {name}")
    print(f"\n{pushed.card}\n")
    print(pushed.url or "Nothing was uploaded: this was a dry run.")
    return 0


def run_page(options):
    """Serve the page until it is interrupted."""
    from pi_finetune.page import Page

    asr = None if options.asr_source == "null" else options.asr_source
    Page(options.model, asr, options.mix, options.trust).launch(options.host, options.port)
    return 0


def run_doctor(options):
    """Print the state of the installation; return 1 if something needed is missing."""
    from pi_finetune.doctor import examine

    return examine()


@command
def main(argv: list[str] | None = None) -> int | None:
    """Entry point: run the command line, return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in RECIPES:
            return run_recipe(argv[0], argv[1:])
        if argv and argv[0] in PROGRAMS:
            module = importlib.import_module(f"pi_finetune.recipes.{argv[0]}")
            return module.main(argv[1:], program=f"pi-finetune {argv[0]}")
        if argv and argv[0] == "show":
            return run_show(argv[1:])
        options = parser().parse_args(argv or ["--help"])
        # A polite kill unwinds like Ctrl-C, so that half-written files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
