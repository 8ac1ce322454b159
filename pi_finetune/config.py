"""Loading of experiment YAML files: HyperPyYAML plus ``extends`` and checked overrides."""

import difflib
import functools
import inspect
import io
import pydoc
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import hyperpyyaml.core
import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update

from pi_finetune import settings
from pi_finetune.errors import UserError
from pi_finetune.files import PROJECT_ROOT

__all__ = [
    "asset_folder",
    "build",
    "check_needs",
    "check_overrides",
    "find_hparams",
    "keys",
    "load_hparams",
    "new",
    "parse_yaml",
    "ref",
    "resolve",
]


#: The key whose value names a file of hparams/teachers/, which sets other keys.
PRESET = "teacher_preset"

#: Keys of earlier versions, and what to type now.
RETIRED = {
    "__load_weights": "the recipe loads what enhancer_weights names; set enhancer_weights: null "
    "to start without",
    "log_position": "type --validation_callbacks '!name:pi_finetune.diagnostics.training_scores'",
}


def load_hparams(
    path: str | Path, overrides: dict | str | None = None, needs: Sequence[str] = ()
) -> tuple[dict, str]:
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
    needs : sequence of str
        Keys that the caller will read: a file without one belongs to another recipe.

    Returns
    -------
    (dict, str)
        The instantiated hyperparameters, and the text of :func:`resolve`. What a shipped file
        declares by ``!name:`` is for the recipe to :func:`build`.

    Raises
    ------
    UserError
        A file is missing or is no YAML, a key is unknown or lacking, a reference is wrong.
    """
    check_needs(path, needs)
    text = resolve(path, overrides)
    settings.check_values(settings.read(text))
    try:
        return load_hyperpyyaml(text), text
    except UserError:
        raise
    except ruamel.yaml.constructor.ConstructorError as error:  # a tag that there is not
        raise UserError(f"{path}: {error.problem}.") from None
    except (ImportError, TypeError, ValueError) as error:
        raise _mistake_in_yaml(path, error) from error


def _mistake_in_yaml(path, error):
    """A UserError if HyperPyYAML found the mistake; what a class raised itself is a bug in it.

    A wrong name has no frame below HyperPyYAML's, and neither has an argument that a class does not
    take: the call fails before the class's own code runs.
    """
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    if innermost.f_globals.get("__name__") != hyperpyyaml.core.__name__:
        return error
    message = " ".join(str(part) for part in error.args).rstrip(".")
    return UserError(f"{path}: {message}.{_nearest_name(message)}")


def _nearest_name(message):
    """`` Did you mean X?`` where a message ends in the dotted name of what is not there."""
    module, _, name = message.split()[-1].rpartition(".")
    found = pydoc.locate(module) if module and message.startswith("There is no such") else None
    close = difflib.get_close_matches(name, dir(found), n=1) if found is not None else []
    return f" Did you mean {module}.{close[0]}?" if close else ""


def resolve(path: str | Path, overrides: dict | str | None = None) -> str:
    """An experiment file as it will run, as text that ``load_hyperpyyaml`` opens.

    Arguments as of :func:`load_hparams`. Every ``extends``, include, preset and reference is
    replaced by what it stands for; nothing is instantiated. A run folder keeps this text.
    """
    tree = _overridden_tree(path, overrides)
    settings.check_each(settings.plain(tree))  # references compute with them
    try:
        text = _dump(tree)
        # One pass leaves a reference to what is itself a reference further down.
        for _ in range(2):
            text = resolve_references(io.StringIO(text)).getvalue()
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: !include names a file that is not there: {error.filename}"
        ) from None
    except (ImportError, ValueError, TypeError) as error:
        if f"<{PRESET}[" in text:
            reason = f"<{PRESET}[...]> has no values: write the value itself, or <teacher_source>"
            raise UserError(f"{path}: {reason}") from None
        raise _mistake_in_yaml(path, error) from error
    return text


def check_overrides(path: str | Path, overrides: dict | str | None) -> None:
    """Raise a UserError, as :func:`load_hparams` would, if a key or a value is wrong."""
    settings.check_values(settings.read(resolve(path, overrides)))


def check_needs(path: str | Path, needs: Sequence[str]) -> None:
    """Raise a UserError if the experiment file lacks a key of ``needs``: another recipe's file."""
    lacking = sorted(set(needs) - set(keys(path))) if needs else []
    if lacking:
        raise UserError(
            f"{path} is no experiment file for this command: it has no key {lacking[0]}."
        )


def keys(path: str | Path) -> list[str]:
    """The top-level keys of an experiment file, those of the files it extends included."""
    return list(_merged_tree(Path(path)))


def build(declared: Any, **arguments: Any) -> Any:
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


def new(name: str, **arguments: Any) -> Any:
    """``!new:NAME`` with its arguments, as the value of an override."""
    node = ruamel.yaml.comments.CommentedMap(arguments)
    node.yaml_set_ctag(ruamel.yaml.Tag(suffix=f"!new:{name}"))
    return node


def ref(key: str) -> Any:
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
        tagged = getattr(getattr(value, "tag", None), "value", None)  # another block, not its keys
        if isinstance(value, dict) and isinstance(tree[key], dict) and not tagged:
            recursive_update(tree[key], value)
        else:  # a list may become a mapping, a block a word
            tree[key] = str(value) if isinstance(value, Path) else value
    return tree


def _is_tagged(value):
    return isinstance(value, str) and value.startswith("!")


def parse_yaml(text: str, name: str) -> Any:
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


def _merged_tree(path):
    """The file with what it extends; a key of its own that nothing would read is an error."""
    texts: list = []
    own: list = []
    tree = _extended(path, (), texts, own)
    for file, key, base in own:
        used = re.compile(rf"<{re.escape(key)}[>.\[]")
        if any(used.search(text) for text in texts) or _is_run_option(key):
            continue
        close = difflib.get_close_matches(key, base, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{file}: {key} is no key of the file that it extends, and no !ref <{key}> uses it, so "
            f"that it would do nothing.{hint}"
        )
    return tree


def _is_run_option(key):
    from speechbrain.utils.run_opts import RunOptions  # imports PyTorch

    return key in RunOptions()


def _extended(path, seen, texts, own):
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"Cannot read the experiment file {path}: {reason}.") from None
    # Includes become absolute here, since the merged text has no folder of its own. A YAML tag
    # ends at a blank, which %20 stands for.
    text = re.sub(
        r"(#.*)|!include:([^\s,}\]]+)",  # not in a comment
        lambda found: found[1] or f"!include:{quote(str(_beside(path, found[2])))}",
        text,
    )
    tree = parse_yaml(text, path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping of keys to values.")
    _refuse_retired(tree, path)
    texts.append(text)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends names one file, got {base!r}.")
    merged = _extended(_beside(path, base), (*seen, path.resolve()), texts, own)
    known = [str(key) for key in merged]
    own += [(path, str(k), known) for k in tree if k not in merged and not str(k).startswith("__")]
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
    _mappings_in_lists_as_blocks(tree)
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(tree, stream)
    return stream.getvalue()


def _mappings_in_lists_as_blocks(node):
    """ruamel.yaml writes [!new:X {a: 1}] without the braces, which is no YAML any more."""
    if isinstance(node, ruamel.yaml.comments.CommentedSeq):
        for item in node:
            if isinstance(item, ruamel.yaml.comments.CommentedMap):
                node.fa.set_block_style()
                item.fa.set_block_style()
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            _mappings_in_lists_as_blocks(child)


def asset_folder() -> str:
    """The folder of the shipped corpus and models, as text, for use in YAML."""
    return str(PROJECT_ROOT / "assets")


def find_hparams(name: str | Path) -> Path:
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
