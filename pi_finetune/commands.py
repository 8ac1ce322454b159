"""Command lines of the recipes: words become values here, and values words."""

import argparse
import itertools
import json
from pathlib import Path

from pi_finetune import settings
from pi_finetune.config import keys, parse_yaml
from pi_finetune.errors import UserError

__all__ = ["divide", "parse", "words"]


def parse(argv: list[str]) -> tuple[str, dict, dict]:
    """Read a recipe's command line, ``EXPERIMENT [--KEY VALUE ...] [--FLAG ...]``.

    A key that is True or False may stand without a value, for True.

    Arguments
    ---------
    argv : list of str
        Without the recipe itself.

    Returns
    -------
    (str, dict, dict)
        The experiment, overrides of its keys, and those of SpeechBrain's run options that were
        given: what a recipe's function is called with.

    Raises
    ------
    UserError
        Something is given twice, lacks its value, or is of a wrong type.
    """
    from speechbrain.utils.run_opts import RunOptions  # imports PyTorch

    parser = RunOptions._create_parser()
    parser.error = _refuse
    known = {word: action for action in parser._actions for word in action.option_strings}
    experiment, run_words, overrides, given = [], [], {}, set()
    starts = [i for i, word in enumerate(argv) if i == 0 or _is_option(word)]
    for start, end in itertools.pairwise([*starts, len(argv)]):
        words = argv[start:end]
        if not _is_option(words[0]):
            experiment += words
            continue
        option, equals, value = words[0].partition("=")
        values = ([value] if equals else []) + words[1:]
        if option in known and known[option].nargs == 0:  # a flag: what follows is not its value
            run_words.append(option)
            experiment += values
            continue
        if option in given:
            raise UserError(f"{option} is given twice. Leave one of them out.")
        given.add(option)
        if option in known:
            run_words += [option, *values]
        elif option.startswith("--"):
            overrides[option[2:]] = _value(option, " ".join(values), bool(values))
        else:
            raise UserError(f"{option}: an option begins with two dashes, --KEY VALUE.")
    options = parser.parse_args([*(experiment or [""]), *run_words])
    if not experiment:
        raise UserError("Name an experiment file first, e.g. hparams/mse.yaml.")
    names = {known[word].dest for word in run_words if word in known}
    run_opts = {name: getattr(options, name) for name in sorted(names)}
    for name, value in run_opts.items():  # SpeechBrain leaves some of its numbers text
        if isinstance(value, str) and name in settings.SETTINGS:
            run_opts[name] = parse_yaml(f"value: {value}", f"--{name}")["value"]
    return experiment[0], overrides, run_opts


def _refuse(message):
    raise UserError(f"{message[0].upper()}{message[1:]}.")


def _is_option(word):
    try:
        float(word)  # -2 is a value
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _value(option, text, given):
    setting = settings.SETTINGS.get(option[2:])
    if not given and setting is not None and setting.kind is settings.FLAG:
        return True
    if not given or not text.strip():
        raise UserError(f"{option}: its value is missing; null stands for none.")
    return parse_yaml(f"value: {text}", option)["value"]


def divide(experiment: str | Path, values: dict) -> tuple[dict, dict]:
    """Divide settings as one types them into overrides of a file's keys and run options.

    Arguments
    ---------
    experiment : str or Path
        The experiment file.
    values : dict

    Returns
    -------
    (dict, dict)
        Overrides, among them what neither knows; and run options of SpeechBrain.
    """
    from speechbrain.utils.run_opts import RunOptions

    declared, known = keys(experiment), RunOptions().keys()
    run_opts = {k: v for k, v in values.items() if k not in declared and k in known}
    return {k: v for k, v in values.items() if k not in run_opts}, run_opts


def read_options(recipe: str, declared: dict, given: dict) -> tuple[argparse.Namespace, dict]:
    """The options of a recipe that reads no experiment file, those not given at their defaults.

    Arguments
    ---------
    recipe : str
        For messages.
    declared : dict
        ``{name: arguments of argparse's add_argument}``.
    given : dict
        Values by name; None stands for the default.

    Returns
    -------
    (argparse.Namespace, dict)
        All options, and those whose value is not the default.

    Raises
    ------
    UserError
        There is no such option.
    """
    unknown = given.keys() - declared.keys()
    if unknown:
        raise UserError(f"{recipe}: no option {min(unknown)!r}; there are {', '.join(declared)}.")
    values = {name: how.get("default") for name, how in declared.items()}
    changed = {k: v for k, v in given.items() if v is not None and v != values[k]}
    return argparse.Namespace(**{**values, **changed}), changed


def options_parser(
    program: str, arguments: list[dict], about: str, examples: list[str], declared: dict
) -> argparse.ArgumentParser:
    """The command line of such a recipe.

    Arguments
    ---------
    program : str
    arguments : list of dict
        Of each argument before the options: what ``add_argument`` takes, ``dest`` among it.
    about : str
    examples : list of str
        Words after the program.
    declared : dict
        As for :func:`read_options`.
    """
    named = [
        f"{name} [{name} ...]" if "nargs" in argument else name
        for argument in arguments
        for name in [argument["metavar"]]
    ]
    lines = [f"  %(prog)s {words}" for words in examples]
    made = argparse.ArgumentParser(
        prog=program,
        usage=f"%(prog)s {' '.join(named)} [options]",
        description=about,
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for argument in arguments:
        made.add_argument(**argument)
    for option, how in declared.items():
        made.add_argument(f"--{option}", **how)
    return made


def words(
    recipe: str, arguments: list, overrides: dict | None = None, flags: dict | None = None
) -> list[str]:
    """A command line without ``python``, as a list of words.

    Arguments
    ---------
    recipe : str
        Name of a file of ``recipes/``, without ``.py``.
    arguments : list
        What stands before the options: an experiment file, or run folders.
    overrides : dict, optional
        Keys of the experiment; lists and mappings are written in YAML's flow style, as JSON.
    flags : dict, optional
        Options of a program: True is a flag by itself, a list several words; None and False are
        left out.
    """
    line = [f"recipes/{recipe}.py", *map(str, arguments)]
    for key, value in (overrides or {}).items():
        try:
            value = str(value) if isinstance(value, str | Path) else json.dumps(value)
        except TypeError:
            raise UserError(f"{key}: {value!r} cannot be typed on a command line.") from None
        line += [f"--{key}", value]
    for key, value in (flags or {}).items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            line += [f"--{key}", *map(str, values)]
    return line
