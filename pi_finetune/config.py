"""Loading of experiment YAML files: HyperPyYAML plus ``extends`` and checked overrides."""

import difflib
import io
import re
from pathlib import Path
from urllib.parse import quote

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update

from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT


def load_hparams(path, overrides=None):
    """Load an experiment file.

    A file may begin with ``extends: OTHER.yaml``; then OTHER (relative to the
    file) is loaded with the rest of this file as overrides. ``!include:``
    paths are relative to the file they stand in. What is not there is looked
    for among the shipped hparams, so that a file of the user's own can lie anywhere.

    Arguments
    ---------
    path : str or Path
        The YAML file.
    overrides : dict or str, optional
        Values that replace top-level keys, as ``speechbrain.parse_arguments``
        returns them. A key the file does not have is an error.

    Returns
    -------
    (dict, str)
        The instantiated hyperparameters, and the YAML text they came from with
        every reference and include resolved (what a run folder keeps).

    Raises
    ------
    UserError
        A file is missing or is no YAML, a key is unknown, a reference is wrong.
    """
    tree = _overridden_tree(path, overrides)
    try:
        text = _dump(tree)
        # One pass leaves a reference to what is itself a reference further down.
        for _ in range(2):
            text = resolve_references(io.StringIO(text)).getvalue()
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: !include names a file that is not there: {error.filename}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(part) for part in error.args)}") from None
    try:
        return load_hyperpyyaml(text), text
    except UserError:
        raise
    except TypeError as error:
        # HyperPyYAML's "Invalid argument to class X" wraps the constructor's own error.
        raise UserError(f"{path}: {' '.join(str(part) for part in error.args)}") from error


def check_overrides(path, overrides):
    """Raise a UserError, as :func:`load_hparams` would, if the file lacks one of the keys."""
    _overridden_tree(path, overrides)


def _overridden_tree(path, overrides):
    tree = _merged_tree(Path(path))
    if isinstance(overrides, str):
        overrides = ruamel.yaml.YAML().load(overrides)
    overrides = overrides or {}
    _check_keys(overrides, tree, path)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(tree[key], dict):
            recursive_update(tree[key], value)
        else:  # a list may become a mapping, a block a word
            tree[key] = value
    return tree


def _merged_tree(path, _seen=()):
    if path.resolve() in _seen:
        raise UserError(f"{path}: 'extends' goes round in a circle.")
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"Cannot read the experiment file {path}: {error.strerror}.") from None
    # Includes become absolute here, since the merged text has no folder of its own. A YAML tag
    # ends at a blank, which %20 stands for.
    text = re.sub(
        r"!include:([^\s,}\]]+)",
        lambda match: f"!include:{quote(str(_beside(path, match.group(1))))}",
        text,
    )
    try:
        tree = ruamel.yaml.YAML().load(text)
    except ruamel.yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of keys to values.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    merged = _merged_tree(_beside(path, base), (*_seen, path.resolve()))
    for key, value in tree.items():
        # Whole values are replaced: a strategy's block must not inherit half of the base's.
        merged[key] = value
    return merged


def _beside(path, name):
    """The file ``name`` relative to ``path``, or the shipped one of that name."""
    own = (path.parent / name).resolve()
    shipped = PROJECT_ROOT / "hparams" / name
    return shipped if not own.is_file() and shipped.is_file() else own


def _check_keys(overrides, tree, path):
    for key in overrides:
        if key not in tree:
            close = difflib.get_close_matches(str(key), [str(k) for k in tree], n=1)
            hint = f" Did you mean --{close[0]}?" if close else ""
            raise UserError(f"--{key}: {path} has no such key.{hint} Its keys: {', '.join(tree)}.")


def _dump(tree):
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    return stream.getvalue()


def refuse_other_settings(folder, resolved):
    """Raise a UserError if ``folder`` holds a run that was started with other settings.

    Otherwise such a run would be resumed, and its results would be of neither.

    Arguments
    ---------
    folder : Path
        A run folder; ``hyperparams.yaml`` is what it was started with, ``save`` its checkpoints.
    resolved : str
        The text :func:`load_hparams` returned.
    """
    path = folder / "hyperparams.yaml"
    if not path.exists() or not any(folder.glob("save/CKPT*")):
        return  # nothing to resume
    old, new = (ruamel.yaml.YAML().load(text) for text in (path.read_text(), resolved))
    for harmless in ("num_workers", "ckpt_interval_minutes", "checkpointer"):
        old.pop(harmless, None), new.pop(harmless, None)
    # A key that an older version did not have and that is null is a feature not used.
    changed = [key for key in {**old, **new} if _text(old.get(key)) != _text(new.get(key))]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings: {', '.join(changed)}. Remove it, or give "
            "this run another place with --results_folder, --strategy or --seed."
        )


def _text(node):
    return _dump({"value": node})


def asset_folder():
    """The folder of the shipped corpus and models, as text, for use in YAML."""
    return str(PROJECT_ROOT / "assets")


def find_hparams(name):
    """The experiment file that a user means.

    Arguments
    ---------
    name : str or Path
        A file; or, where there is none, the name of a shipped one, with or without
        ``hparams/`` before it and ``.yaml`` after it.

    Returns
    -------
    Path

    Raises
    ------
    UserError
        Where there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = PROJECT_ROOT / "hparams"
    shipped = folder / f"{str(name).removeprefix('hparams/').removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(shipped.stem, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(
        f"There is no experiment file {name}, and no shipped one of that name.{hint} Shipped are: "
        f"{', '.join(known)}."
    )
