"""Loading of experiment YAML files: HyperPyYAML plus ``extends`` and checked overrides."""

import difflib
import functools
import inspect
import io
import re
from pathlib import Path
from urllib.parse import quote, unquote

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update

from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT

#: The key whose value names a file of hparams/teachers/, which sets other keys.
PRESET = "teacher_preset"

#: Keys of earlier versions, and what to type now.
RETIRED = {
    "__load_weights": "the recipe loads what enhancer_weights names; set enhancer_weights: null "
    "to start without",
    "log_position": "type --validation_callbacks '!name:pi_finetune.diagnostics.training_scores'",
}


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
        Values that replace top-level keys; as text, YAML. A text that begins with ``!`` is a tag,
        as in a file. A key the file does not have is an error.

    Returns
    -------
    (dict, str)
        The instantiated hyperparameters, and the text of :func:`resolve`. What a shipped file
        declares by ``!name:`` is for the recipe to :func:`build`.

    Raises
    ------
    UserError
        A file is missing or is no YAML, a key is unknown, a reference is wrong.
    """
    text = resolve(path, overrides)
    try:
        return load_hyperpyyaml(text), text
    except UserError:
        raise
    except TypeError as error:
        # HyperPyYAML's "Invalid argument to class X" wraps the constructor's own error.
        raise UserError(f"{path}: {' '.join(str(part) for part in error.args)}") from error


def resolve(path, overrides=None):
    """An experiment file as it will run, as text that ``load_hyperpyyaml`` opens.

    Arguments as of :func:`load_hparams`. Every ``extends``, include, preset and reference is
    replaced by what it stands for; nothing is instantiated. A run folder keeps this text.
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
    except (ValueError, TypeError) as error:
        reason = " ".join(str(part) for part in error.args)
        if f"<{PRESET}[" in text:
            reason = f"<{PRESET}[...]> has no values: write the value itself, or <teacher_source>"
        raise UserError(f"{path}: {reason}") from None
    return text


def check_overrides(path, overrides):
    """Raise a UserError, as :func:`load_hparams` would, if the file lacks one of the keys."""
    _overridden_tree(path, overrides)


def keys(path):
    """The top-level keys of an experiment file, those of the files it extends included."""
    return list(_merged_tree(Path(path)))


def build(declared, **arguments):
    """What a ``!name:`` of an experiment file declares, made; any other value as it is.

    Arguments
    ---------
    declared : Any
        A class or function, or one with some arguments given (``functools.partial``).
    arguments
        Further arguments.

    Raises
    ------
    UserError
        It takes no such arguments.
    """
    is_partial = isinstance(declared, functools.partial)
    function = declared.func if is_partial else declared
    if not (is_partial or inspect.isclass(function) or inspect.isroutine(function)):
        return declared
    given = {**(declared.keywords if is_partial else {}), **arguments}
    try:
        inspect.signature(function).bind(*(declared.args if is_partial else ()), **given)
    except TypeError as error:
        raise UserError(f"!name:{function.__module__}.{function.__qualname__}: {error}") from None
    return declared(**arguments)


def new(name, **arguments):
    """``!new:NAME`` with its arguments, as the value of an override."""
    node = ruamel.yaml.comments.CommentedMap(arguments)
    node.yaml_set_ctag(ruamel.yaml.Tag(suffix=f"!new:{name}"))
    return node


def ref(key):
    """``!ref <KEY>``, as the value of an override or in it."""
    node = ruamel.yaml.comments.TaggedScalar(f"<{key}>")
    node.yaml_set_ctag(ruamel.yaml.Tag(suffix="!ref"))
    return node


def _overridden_tree(path, overrides):
    tree = _merged_tree(Path(path))
    if isinstance(overrides, str):
        overrides = parse_yaml(overrides, "overrides")
    overrides = {
        key: parse_yaml(value, f"--{key}") if _is_tagged(value) else value
        for key, value in (overrides or {}).items()
    }
    _check_keys(overrides, tree, path)
    _apply_preset(tree, overrides, Path.cwd())
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(tree[key], dict):
            recursive_update(tree[key], value)
        else:  # a list may become a mapping, a block a word
            tree[key] = str(value) if isinstance(value, Path) else value
    return tree


def _is_tagged(value):
    return isinstance(value, str) and value.startswith("!")


def parse_yaml(text, name):
    """The tree of a YAML text, with its tags; ``name`` is for the error."""
    try:
        return ruamel.yaml.YAML().load(text)
    except ruamel.yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {error}") from None


def _apply_preset(tree, given, folder):
    """Set the keys that the preset of ``given`` names, as far as ``tree`` has them."""
    preset = given.get(PRESET)
    if preset is None:
        return
    name, tag = preset, getattr(getattr(preset, "tag", None), "value", None) or ""
    if tag.startswith("!include:") and not (isinstance(preset, dict) and preset):
        name = unquote(tag.removeprefix("!include:"))
    if not isinstance(name, str):
        raise UserError(
            f"{PRESET}: name a file of hparams/teachers, e.g. wavlm_large; its values are keys of "
            "their own, so set gamma, say, by --gamma 1.0."
        )
    shipped = PROJECT_ROOT / "hparams" / "teachers"
    found = [folder / name, shipped / Path(name).name, shipped / f"{name}.yaml"]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise UserError(f"{PRESET}: there is no preset {name}. Shipped are: {known}; or a file.")
    values = _merged_tree(path)
    if "source" in values or "layers" in values:
        raise UserError(f"{path}: write teacher_source for source, and teacher_layers for layers.")
    tree.update({key: value for key, value in values.items() if key in tree})
    given[PRESET] = name


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
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of keys to values.")
    _refuse_retired(tree, path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    merged = _merged_tree(_beside(path, base), (*_seen, path.resolve()))
    _apply_preset(merged, tree, path.parent)
    for key, value in tree.items():
        # Whole values are replaced: a strategy's block must not inherit half of the base's.
        merged[key] = value
    return merged


def _beside(path, name):
    """The file ``name`` relative to ``path``, or the shipped one of that name."""
    own = (path.parent / name).resolve()
    shipped = PROJECT_ROOT / "hparams" / name
    return shipped if not own.is_file() and shipped.is_file() else own


def _refuse_retired(given, path):
    for key in given:
        if key in RETIRED:
            raise UserError(f"{path}: {key} is no key any more: {RETIRED[key]}.")


def _check_keys(overrides, tree, path):
    _refuse_retired(overrides, path)
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
    for harmless in ("num_workers", "check_data", "ckpt_interval_minutes", "checkpointer"):
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
