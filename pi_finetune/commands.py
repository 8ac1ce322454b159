"""Command lines of the recipes: words become values here, and values words."""

import json
from pathlib import Path

from pi_finetune.config import keys, parse_yaml
from pi_finetune.errors import UserError


def parse(argv):
    """Read a recipe's command line, ``EXPERIMENT [--KEY VALUE ...] [--FLAG ...]``.

    Arguments
    ---------
    argv : list of str
        Without the recipe itself.

    Returns
    -------
    (str, dict, dict)
        The experiment, overrides of its keys, and those of SpeechBrain's run options that were
        given: what a recipe's function is called with.
    """
    from speechbrain import parse_arguments  # imports PyTorch

    experiment, run_opts, overrides = parse_arguments(argv)
    given = {name: run_opts[name] for name in run_opts.overridden_args}
    return experiment, parse_yaml(overrides, "the command line") or {}, given


def divide(experiment, settings):
    """Divide settings as one types them into overrides of a file's keys and run options.

    Arguments
    ---------
    experiment : str or Path
        The experiment file.
    settings : dict

    Returns
    -------
    (dict, dict)
        Overrides, among them what neither knows; and run options of SpeechBrain.
    """
    from speechbrain.utils.run_opts import RunOptions

    declared, known = keys(experiment), RunOptions().keys()
    run_opts = {k: v for k, v in settings.items() if k not in declared and k in known}
    return {k: v for k, v in settings.items() if k not in run_opts}, run_opts


def words(recipe, arguments, overrides=None, flags=None):
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
