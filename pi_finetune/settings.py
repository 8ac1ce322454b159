"""What an experiment file may say: the type, range and meaning of a key, and what a resume does.

One table, :data:`SETTINGS`, goes by the name of a key, whatever file it stands in. A key that is
not in it (one of the user's own, a block with a class) is not checked here.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml

from pi_finetune.errors import UserError

__all__ = [
    "DATA",
    "FLAG",
    "IRRELEVANT",
    "NAME",
    "SEED",
    "SETTINGS",
    "SNR",
    "Tagged",
    "check_choice",
    "check_each",
    "check_value",
    "check_values",
    "choice",
    "compare",
    "either",
    "number",
    "plain",
    "read",
    "resume_class",
    "same",
    "sequence",
    "whole",
]


# What a resume does with a key that has another value than the run began with.
#: It is another experiment: refused.
IDENTITY = "identity"
#: Allowed, and kept in ``run.json`` with the update at which it changed.
MAY_CHANGE = "may change"
#: Allowed without a word: results do not depend on it.
IRRELEVANT = "irrelevant"
#: A place: allowed if the same utterances lie there; see :mod:`pi_finetune.run_folder`.
DATA = "data"


@dataclass(frozen=True)
class Kind:
    """A type with its range: how it is called in a message, and whether a value is of it."""

    wanted: str
    fits: Callable[[Any], bool]


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low: float | None = None, high: float | None = None) -> Kind:
    """A whole number of ``low`` or more, and of ``high`` at most."""
    limit = "" if low is None else f", {low} or more"
    limit += "" if high is None else f", {high} at most"
    return Kind(
        f"a whole number{limit}",
        lambda value: (
            _is_whole(value) and (low is None or value >= low) and (high is None or value <= high)
        ),
    )


def number(low: float | None = None, above: float | None = None, high: float | None = None) -> Kind:
    """A finite number within limits: ``low`` and ``high`` are allowed, ``above`` is not."""
    limits = []
    if above is not None:
        limits.append(f"above {above}")
    if low is not None:
        limits.append(f"{low} or more" if high is None else f"from {low}")
    if high is not None:
        limits.append(f"to {high}")
    return Kind(
        " ".join(["a number", *limits]),
        lambda value: (
            _is_number(value)
            and math.isfinite(value)
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        ),
    )


def choice(*values: Any) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


def sequence(item: Kind, of: str, empty: bool = False) -> Kind:
    """A list, or a tuple, whose every element is of the kind ``item``."""
    return Kind(
        f"a list of {of}",
        lambda value: (
            isinstance(value, list | tuple)
            and (empty or len(value) > 0)
            and all(map(item.fits, value))
        ),
    )


def either(*kinds: Any) -> Kind:
    """Any of some kinds."""
    return Kind(
        " or ".join(kind.wanted for kind in kinds),
        lambda value: any(kind.fits(value) for kind in kinds),
    )


NULL = Kind("null", lambda value: value is None)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str) and value != "")
#: Text as the folder's or file's name that is made of it.
NAME = Kind(
    "a name without slashes, as for a folder",
    lambda value: (
        (isinstance(value, str) or _is_whole(value))
        and str(value) not in ("", ".", "..")
        and not any(character in str(value) for character in "/\\\0")
    ),
)
SNR = Kind("", lambda value: _is_number(value) and not math.isnan(value) and value != -math.inf)
SNRS = sequence(SNR, "numbers in dB, e.g. [0, 5, 10], with .inf for clean speech")
SPLITS = either(TEXT, sequence(TEXT, "names or patterns of splits, e.g. [train*]"))
LAYER = either(TEXT, whole())
MAPPING = Kind("a mapping of keys to values", lambda value: isinstance(value, dict))
_OWN_SETTINGS = Kind("a mapping of names to settings", lambda value: isinstance(value, dict))
NAMES = either(sequence(either(NAME, TEXT), "names", empty=True), _OWN_SETTINGS)
VARIANTS = either(
    sequence(either(NAME, TEXT, _OWN_SETTINGS), "names, each with or without settings", empty=True),
    _OWN_SETTINGS,
)


CALLBACKS = Kind(
    "a list of functions, each written as !name:", lambda value: value == [] or value is None
)


def or_null(kind):
    """``kind``, or null."""
    return either(kind, NULL)


@dataclass(frozen=True)
class Setting:
    """A key: what its value may be, what it is, and what a resume does with another value."""

    kind: Kind | None
    meaning: str
    resume: str = IDENTITY


def _table(**settings):
    return {key: Setting(*parts) for key, parts in settings.items()}


SECONDS = number(above=0)
COUNT = whole(1)
SEED = whole(0, high=2**32 - 1)  # what NumPy takes

#: Every plain key of the shipped files, and the run options of SpeechBrain that take a number.
SETTINGS = _table(
    # Seeds, names and places
    seed=(SEED, "draws training data and perturbations"),
    data_seed=(SEED, "fixes the dev or test mixtures"),
    strategy=(NAME, "names the folder of the runs"),
    assets=(TEXT, "folder of the shipped corpus and models", IRRELEVANT),
    results_folder=(TEXT, "where results go", IRRELEVANT),
    output_folder=(TEXT, "the run folder", IRRELEVANT),
    save_folder=(TEXT, "folder of the checkpoints", IRRELEVANT),
    data_folder=(TEXT, "the speech corpus", DATA),
    noise_folder=(or_null(TEXT), "the noise recordings", DATA),
    recordings=(or_null(TEXT), "recordings without clean speech", DATA),
    channel=(or_null(COUNT), "the channel of the recordings; null: the mean of all"),
    train_folder=(or_null(TEXT), "the corpus that is trained on, where it is another", DATA),
    # Data
    train_splits=(SPLITS, "splits that are trained on"),
    valid_splits=(SPLITS, "splits for validation"),
    test_splits=(SPLITS, "splits that are tested", IRRELEVANT),
    splits=(SPLITS, "splits that are measured"),
    noise_classes=(or_null(sequence(TEXT, "noise classes")), "the classes that are heard"),
    snrs=(SNRS, "SNRs of the mixtures"),
    noise_filtered=(number(low=0, high=1), "share of noises with a random filter"),
    rir_folder=(or_null(TEXT), "room impulse responses: a folder, or simulated", DATA),
    rir_probability=(number(low=0, high=1), "share of utterances in a room"),
    rir_early_seconds=(SECONDS, "of a room, what the target keeps after the direct path"),
    rir_rt60=(
        Kind(
            "two numbers of seconds above 0, the smaller one first, e.g. [0.2, 0.8]",
            lambda value: (
                isinstance(value, list | tuple)
                and len(value) == 2
                and all(map(_is_number, value))
                and 0 < value[0] <= value[1] < math.inf
            ),
        ),
        "reverberation time of simulated rooms",
    ),
    each_snr=(FLAG, "every utterance at every SNR"),
    segment_seconds=(or_null(SECONDS), "length of a crop"),
    valid_segment_seconds=(SECONDS, "length of a dev crop"),
    valid_utterances=(or_null(COUNT), "dev utterances; null: all"),
    train_max_seconds=(or_null(SECONDS), "longest utterance in training"),
    valid_max_seconds=(or_null(SECONDS), "longest dev utterance"),
    test_utterances=(or_null(COUNT), "test utterances; null: all"),
    utterances=(or_null(COUNT), "utterances that are measured; null: all"),
    max_seconds=(or_null(SECONDS), "longest utterance that is allowed"),
    check_data=(FLAG, "whether all audio is read once before training", IRRELEVANT),
    num_workers=(whole(0), "processes that load data", IRRELEVANT),
    workers=(or_null(whole(0)), "processes", IRRELEVANT),
    # Training
    updates=(COUNT, "steps of the optimiser in all", MAY_CHANGE),
    valid_every=(COUNT, "updates between validations"),
    wer_every=(or_null(COUNT), "validations between those with WER", MAY_CHANGE),
    batch_size=(COUNT, "utterances in a batch", MAY_CHANGE),
    max_batch_seconds=(or_null(SECONDS), "most seconds in a batch", MAY_CHANGE),
    valid_metrics=(
        sequence(TEXT, "metrics, e.g. [stoi, si_sdr]"),
        "signal scores of a validation",
        MAY_CHANGE,
    ),
    valid_batch_size=(COUNT, "dev utterances in a batch", IRRELEVANT),
    lr=(number(above=0), "learning rate", MAY_CHANGE),
    warmup_updates=(whole(0), "updates until the full learning rate", MAY_CHANGE),
    weight_decay=(number(low=0), "of the optimiser", MAY_CHANGE),
    max_grad_norm=(number(above=0), "gradients are clipped to it", MAY_CHANGE),
    nonfinite_patience=(whole(0), "non-finite updates in a row that are allowed", MAY_CHANGE),
    ckpt_interval_minutes=(number(low=0), "minutes between checkpoints", IRRELEVANT),
    log_examples=(whole(0), "dev utterances in TensorBoard", IRRELEVANT),
    validation_callbacks=(CALLBACKS, "called at each validation", IRRELEVANT),
    wandb_project=(or_null(TEXT), "project at Weights & Biases", IRRELEVANT),
    select_by=(TEXT, "the dev score that keeps the best model"),
    train_loggers=(None, "where training is logged", IRRELEVANT),
    checkpointer=(None, "writes checkpoints", IRRELEVANT),
    # Models and objectives
    enhancer_weights=(or_null(TEXT), "weights that fine-tuning starts from"),
    # Its values are keys of their own, which are compared.
    mix=(number(above=0, high=1), "share of the enhancer's output in what is scored"),
    teacher_preset=(either(TEXT, MAPPING, NULL), "values that suit a teacher", IRRELEVANT),
    teacher_source=(TEXT, "folder or hub name of the teacher"),
    teacher_layers=(either(LAYER, sequence(LAYER, "layers")), "layer of the teacher"),
    representation_cache=(
        or_null(TEXT),
        "folder for what a teacher makes of clean speech",
        MAY_CHANGE,
    ),
    asr_source=(or_null(either(TEXT, sequence(TEXT, "recognisers"))), "the recogniser"),
    perturbed_branch=(choice("clean", "enhanced"), "which side is perturbed"),
    representation_weight=(number(low=0), "of the distance between representations"),
    signal_weight=(number(low=0), "of the signal loss"),
    speed_factors=(sequence(number(above=0), "speeds above 0, e.g. [0.9, 1.0, 1.1]"), "speeds"),
    gamma=(number(above=0), "smoothing of soft-DTW"),
    normalize=(FLAG, "whether frames have norm 1"),
    length_normalize=(FLAG, "whether soft-DTW is divided by the mean length"),
    max_pad_seconds=(number(low=0), "longest padding on a side"),
    pad_share=(
        Kind(
            "two shares from 0 to 0.5, the smaller one first, e.g. [0.02, 0.05]",
            lambda value: (
                isinstance(value, list | tuple)
                and len(value) == 2
                and all(map(_is_number, value))
                and 0 <= value[0] <= value[1] <= 0.5
            ),
        ),
        "padding on a side, as a share of the utterance",
    ),
    idm_alpha=(number(low=0), "weight of the temporal regulariser"),
    idm_margin=(number(above=0), "distance that frames far in time shall have"),
    projection_dim=(COUNT, "dimensions of the learned projection"),
    position_seconds=(SECONDS, "positions that are looked at"),
    position_rotations=(COUNT, "rotations of each, so that content averages out"),
    position_utterances=(whole(2), "utterances by which position is found"),
    position_explained=(number(above=0, high=1), "share of position's variance"),
    # Recognisers
    recognizer_name=(NAME, "names its errors in the scores"),
    test_snrs=(either(SNRS, sequence(SNR, "", empty=True)), "SNRs of the test", IRRELEVANT),
    noise_snrs=(SNRS, "SNRs of the training speech"),
    noise_probability=(number(low=0, high=1), "share of utterances with noise"),
    speech_noise_share=(number(low=0, high=1), "share of these with a second speaker as noise"),
    speech_noise_snrs=(SNRS, "SNRs of a second speaker"),
    speeds=(sequence(whole(1), "percentages, e.g. [90, 100, 110]"), "speeds in percent"),
    views=(COUNT, "versions of each utterance"),
    cache_gb=(number(low=0), "memory for encoded speech", IRRELEVANT),
    encoder_source=(TEXT, "folder or hub name of the encoder"),
    characters=(or_null(TEXT), "the alphabet"),
    hidden=(COUNT, "width of the head"),
    depth=(whole(0), "BLSTM layers"),
    dropout=(number(low=0, high=1), "of the head"),
    # Teachers
    hubert_weights=(or_null(TEXT), "weights that pre-training starts from"),
    targets_source=(TEXT, "mfcc, or folder or hub name of a teacher"),
    targets_layers=(either(LAYER, sequence(LAYER, "layers")), "layer of that teacher"),
    clusters=(whole(2), "classes of frames"),
    mask_probability=(number(low=0, high=1), "share of frames that are hidden"),
    mask_span=(COUNT, "frames hidden at once"),
    unmasked_weight=(number(low=0), "of the loss at frames that are not hidden"),
    # Evaluation
    run=(either(TEXT, sequence(TEXT, "run folders")), "what is evaluated"),
    test_set=(NAME, "names the file of the scores"),
    metrics=(or_null(sequence(TEXT, "metrics, e.g. [pesq, stoi]")), "what is computed"),
    speaker_source=(or_null(TEXT), "folder of a speaker recogniser"),
    audio_examples=(whole(0), "utterances whose audio is kept"),
    save_audio=(or_null(TEXT), "folder for the audio of all systems", IRRELEVANT),
    overwrite=(FLAG, "whether scores made with other settings are discarded"),
    trust=(FLAG, "whether a model's own code may run"),
    # Diagnostics
    diagnostics=(sequence(TEXT, "diagnostics"), "what is measured"),
    objectives=(sequence(TEXT, "strategies", empty=True), "objectives that are measured"),
    layers=(or_null(sequence(whole(), "layers")), "layers that are measured; null: all"),
    shifts=(sequence(number(low=0), "offsets in seconds"), "offsets"),
    far_seconds=(SECONDS, "from this offset on, positions count as unequal"),
    moved_by=(choice("zeros", "speech"), "what precedes moved speech"),
    gradient_objectives=(sequence(TEXT, "strategies"), "whose gradients are compared"),
    gradient_batches=(whole(3), "batches"),
    causal_objectives=(sequence(TEXT, "strategies"), "what is trained"),
    causal_offset_seconds=(SECONDS, "largest offset"),
    training=(MAPPING, "keys of finetune.yaml"),
    # Ablation
    strategies=(VARIANTS, "what is compared"),
    controls=(VARIANTS, "strategies without a teacher"),
    untrained=(NAMES, "systems without a training"),
    teachers=(NAMES, "teachers"),
    seeds=(sequence(SEED, "whole numbers, 0 or more", empty=True), "seeds"),
    lrs=(sequence(number(above=0), "learning rates above 0", empty=True), "learning rates"),
    search_seed=(SEED, "seed of the search"),
    search_updates=(COUNT, "updates of the search"),
    train=(MAPPING, "keys of finetune.yaml"),
    evaluate=(MAPPING, "keys of evaluate.yaml"),
    compare=(MAPPING, "options of compare"),
    test_sets=(or_null(MAPPING), "names of test sets, and their keys of evaluate.yaml"),
    debug_settings=(MAPPING, "keys of the ablation"),
    debug_teacher=(MAPPING, "keys of transformers.HubertConfig"),
    cluster=(TEXT, "local or slurm"),
    cpus_per_worker=(COUNT, "threads of a worker"),
    retries=(whole(0), "of a cell whose worker died"),
    cluster_parameters=(MAPPING, "parameters of submitit"),
    # SpeechBrain's
    grad_accumulation_factor=(COUNT, "batches in an update", MAY_CHANGE),
    optimizer_step_limit=(or_null(COUNT), "updates after which training ends", MAY_CHANGE),
    ckpt_interval_steps=(whole(0), "batches between checkpoints", IRRELEVANT),
    precision=(choice("fp32", "fp16", "bf16"), "of training", MAY_CHANGE),
    eval_precision=(choice("fp32", "fp16", "bf16"), "of validation", MAY_CHANGE),
    debug_batches=(COUNT, "batches of a debug run", IRRELEVANT),
)

#: Keys that hold an object, or what makes one: never null or a word.
_BLOCKS = frozenset(
    "train_data valid_data test_data test_recordings enhancer teacher encoder tokenizer head"
    " distance signal_loss representation objective modules opt_class lr_schedule epoch_counter"
    " checkpointer train_loggers".split()
)

#: Keys whose value is a mapping of keys that stand in this table themselves.
_NESTED = ("train", "evaluate", "training")


def check_value(key: str, value: Any) -> None:
    """Raise a UserError if ``value`` is not what the table asks of ``key``."""
    setting = SETTINGS.get(key)
    if setting is None or setting.kind is None or setting.kind.fits(value):
        return
    shown = "null" if value is None else value if isinstance(value, str) else repr(value)
    raise UserError(
        f"{key}: got {shown or repr(shown)}, needed is {setting.kind.wanted} ({setting.meaning})."
    )


def check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a UserError that suggests the nearest word if ``value`` is none of ``choices``."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"{key}: there is no {value!r}.{hint} Choose from {', '.join(choices)}.")


def check_each(values: dict) -> None:
    """Check the keys of an experiment, each by itself; arguments and errors as of check_values."""
    for key, value in values.items():
        if key in _NESTED and isinstance(value, dict):
            check_each(value)
        elif not _holds_tags(value):
            if key in _BLOCKS and not isinstance(value, dict):
                shown = "null" if value is None else value
                raise UserError(
                    f"{key}: got {shown}, needed is a block that names a class or function, "
                    "!new:... or !name:..."
                )
            check_value(key, value)


def _holds_tags(value):
    """Whether a value, or one in it, is known only when it is resolved or made."""
    if isinstance(value, dict | list):
        return any(map(_holds_tags, value.values() if isinstance(value, dict) else value))
    # In quotes where it is a word of a command line inside `train:`.
    return isinstance(value, Tagged) or (isinstance(value, str) and value.startswith("!"))


def check_values(values: dict) -> None:
    """Check all keys of an experiment, each by itself and those that depend on one another.

    Arguments
    ---------
    values : dict
        Keys with references resolved, as :func:`plain` gives them; an object still to be made
        (``!new:`` and the like) is not looked at.

    Raises
    ------
    UserError
        Names the key, its value, and what is needed.
    """
    check_each(values)
    if values.get("representation_cache") is not None:
        for key in ("segment_seconds", "rir_folder"):
            if values.get(key) is not None:
                raise UserError(
                    f"representation_cache: {key} is {values[key]}, which makes other clean speech "
                    f"in every pass, so that nothing could be kept. Set {key} to null, or "
                    "representation_cache."
                )
    if {"updates", "valid_every"} <= values.keys():
        updates, every = values["updates"], values["valid_every"]
        if updates % every:
            raise UserError(
                f"updates: {updates} must be a multiple of valid_every ({every}), so that the end "
                "is validated."
            )
        if values.get("select_by") == "wer":
            if "asr_source" in values and values["asr_source"] is None:
                raise UserError("select_by: wer needs a recogniser; set asr_source or select_by.")
            wer_every = values.get("wer_every", 1)
            if wer_every is None or wer_every > updates // every:
                raise UserError(
                    f"wer_every: {wer_every}, but there are {updates // every} validations "
                    "(updates / valid_every), so that select_by: wer would choose among none. "
                    "Lower wer_every or set select_by."
                )


@dataclass(frozen=True)
class Tagged:
    """A node with a tag of HyperPyYAML, ``!new:collections.Counter``, say."""

    tag: str
    value: Any


def plain(node: Any) -> Any:
    """A tree that ruamel.yaml read as plain values, without comments; tags are kept.

    Arguments
    ---------
    node : Any
        A mapping, list or scalar of ruamel.yaml.

    Returns
    -------
    dict, list, Tagged, or a scalar
    """
    if isinstance(node, dict):
        value = {str(key): plain(part) for key, part in node.items()}
    elif isinstance(node, list):
        value = [plain(part) for part in node]
    elif isinstance(node, bool) or node is None:
        return node
    elif isinstance(node, int | float):
        return int(node) if isinstance(node, int) else float(node)
    else:
        value = getattr(node, "value", node)
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    return Tagged(tag, value) if str(tag).startswith("!") else value


def read(text: str) -> Any:
    """The plain values of a YAML text."""
    return plain(ruamel.yaml.YAML().load(text))


def same(one: Any, other: Any, folders: tuple[str, str] = ("", "")) -> bool:
    """Whether two plain values mean the same: as values, and paths as the place they lead to.

    Arguments
    ---------
    one, other : Any
        As :func:`plain` gives them.
    folders : (str, str)
        The working folders in which they were given, for relative paths.

    Notes
    -----
    A key of a block that one of them lacks and that is null in the other is a feature not used,
    which an older version did not have.
    """
    if isinstance(one, Tagged) and isinstance(other, Tagged):
        return _named(one.tag) == _named(other.tag) and same(
            one.value or None, other.value or None, folders
        )
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {**one, **other}
        return all(same(one.get(key), other.get(key), folders) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, folders) for pair in zip(one, other))
    if isinstance(one, str) and isinstance(other, str) and one != other:
        places = [Path(folder, path) for folder, path in zip(folders, (one, other))]
        return all(place.exists() for place in places) and places[0].samefile(places[1])
    return one == other


def _named(tag):
    """What a tag names: an older version made at once (``!new:``) what is now made later."""
    kind, colon, name = tag.partition(":")
    return name if kind in ("!new", "!name", "!apply") and colon else tag


def compare(
    old: dict, resolve: Callable, overrides: dict, folders: tuple[str, str] = ("", "")
) -> tuple[dict, dict]:
    """What changed since a run began.

    A block, ``opt_class`` with its ``lr``, say, is compared as it would be with the old values of
    the keys that may change.

    Arguments
    ---------
    old : dict
        Plain values of the run's ``hyperparams.yaml``.
    resolve : callable
        From overrides to the plain values of the experiment as it is now.
    overrides : dict
        Those of this call.
    folders : (str, str)
        See :func:`same`.

    Returns
    -------
    (dict, dict)
        ``{key: (old, new)}`` of the changes that are another experiment, and of the others.
    """
    new = resolve(overrides)
    changed = {
        key: (old[key], new[key])
        for key in new
        if key in old and not same(old[key], new[key], folders)
    }
    free = {
        key: values
        for key, values in changed.items()
        if resume_class(key) != IDENTITY and not any(isinstance(v, Tagged | dict) for v in values)
    }
    as_before = resolve({**overrides, **{key: values[0] for key, values in free.items()}})
    identity = {
        key: values
        for key, values in changed.items()
        if resume_class(key) == IDENTITY
        and (key in SETTINGS or not same(old[key], as_before[key], folders))
    }
    for key in overrides:  # given by name, and not there when the run began
        if key not in old and new.get(key) is not None:
            where = identity if resume_class(key) == IDENTITY else free
            where[key] = (None, new[key])
    return identity, free


def resume_class(key: str) -> str:
    """What a resume does with another value of ``key``; of a key that is not known, refuse it."""
    return SETTINGS[key].resume if key in SETTINGS else IDENTITY
