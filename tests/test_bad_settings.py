"""Wrong settings: one paragraph that names the key and says what is needed, before anything runs.

Each row of CASES is tried as a user would type it, in an empty folder that holds its ``files``.
"""

import pytest
from bad_input import check

WHOLE = r"needed is a whole number, 1 or more"


def value(command, key, given, expect):
    """A row: an option with a wrong value."""
    return {
        "area": "settings",
        "input": f"{command.split()[0]} --{key} {given}",
        "command": [*command.split(), f"--{key}", given],
        "expect": expect,
    }


def typed(input, command, expect):
    """A row: a command line of another kind."""
    return {"area": "command line", "input": input, "command": command.split(), "expect": expect}


def own(input, text, expect, command="train own.yaml"):
    """A row: a file of the user's own."""
    return {
        "area": "experiment file",
        "input": input,
        "files": {"own.yaml": text},
        "command": command.split(),
        "expect": expect,
    }


CASES = [
    value("train mse", "batch_size", "0", rf"batch_size: got 0, {WHOLE} \(utterances in a batch\)"),
    value("train mse", "batch_size", "-2", rf"batch_size: got -2, {WHOLE}"),
    value("train mse", "batch_size", "two", rf"batch_size: got two, {WHOLE}"),
    value("train mse", "batch_size", "2.5", rf"batch_size: got 2\.5, {WHOLE}"),
    value("train mse", "batch_size", "True", rf"batch_size: got True, {WHOLE}"),
    value("train mse", "batch_size", "null", rf"batch_size: got null, {WHOLE}"),
    value("train mse", "valid_batch_size", "0", rf"valid_batch_size: got 0, {WHOLE}"),
    value("train mse", "updates", "-2", rf"updates: got -2, {WHOLE}"),
    value("train mse", "updates", "0", rf"updates: got 0, {WHOLE}"),
    value("train mse", "updates", "75", r"updates: 75 must be a multiple of valid_every \(50\)"),
    value("train mse", "valid_every", "0", rf"valid_every: got 0, {WHOLE}"),
    value("train mse", "wer_every", "0", rf"wer_every: got 0, {WHOLE}"),
    value("train mse", "wer_every", "9", r"wer_every: 9, but there are 4 validations"),
    value("train mse", "lr", "-0.1", r"lr: got -0\.1, needed is a number above 0"),
    value("train mse", "lr", "0", r"lr: got 0, needed is a number above 0"),
    value("train mse", "lr", "fast", r"lr: got fast, needed is a number above 0"),
    value("train mse", "lr", ".nan", r"lr: got nan, needed is a number above 0"),
    value("train mse", "lr", ".inf", r"lr: got inf, needed is a number above 0"),
    value("train mse", "warmup_updates", "-1", r"warmup_updates: got -1, needed is a whole number"),
    value("train mse", "max_grad_norm", "0", r"max_grad_norm: got 0\.0, needed is .* above 0"),
    value("train mse", "max_grad_norm", "x", r"max_grad_norm: invalid float value: 'x'"),
    value("train mse", "nonfinite_patience", "-1", r"nonfinite_patience: got -1"),
    value(
        "train mse", "grad_accumulation_factor", "0", rf"grad_accumulation_factor: got 0, {WHOLE}"
    ),
    value("train mse", "precision", "fp8", r"precision: invalid choice: 'fp8'"),
    value("train mse", "device", "gpu", r"--device gpu cannot be used"),
    value(
        "train mse", "snrs", "[loud]", r"snrs: got \['loud'\], needed is a list of numbers in dB"
    ),
    value("train mse", "snrs", "5", r"snrs: got 5, needed is a list of numbers in dB"),
    value("train mse", "snrs", "[]", r"snrs: got \[\], needed is a list of numbers in dB"),
    value("train mse", "snrs", "[.nan]", r"snrs: got \[nan\], needed is a list of numbers in dB"),
    value("train mse", "snrs", "[1", r"--snrs is not valid YAML"),
    value(
        "train mse", "rir_probability", "2", r"rir_probability: got 2, needed is a number from 0"
    ),
    value("train mse", "rir_rt60", "[0.8, 0.2]", r"rir_rt60: got \[0\.8, 0\.2\], needed is two"),
    value("train mse", "segment_seconds", "0", r"segment_seconds: got 0, needed is a number above"),
    value("train mse", "valid_utterances", "0", rf"valid_utterances: got 0, {WHOLE} or null"),
    value("train mse", "valid_utterances", "-1", rf"valid_utterances: got -1, {WHOLE} or null"),
    value("train mse", "valid_max_seconds", "-1", r"valid_max_seconds: got -1, needed is a number"),
    value("train mse", "num_workers", "-1", r"num_workers: got -1, needed is a whole number, 0"),
    value("train mse", "log_examples", "-1", r"log_examples: got -1, needed is a whole number, 0"),
    value("train mse", "seed", "-1", r"seed: got -1, needed is a whole number, 0 or more"),
    value("train mse", "strategy", "a/b", r"strategy: got a/b, needed is a name without slashes"),
    value("train mse", "perturbed_branch", "noisy", r"perturbed_branch: got noisy, .* clean, enha"),
    value("train mse", "asr_source", "null", r"select_by: wer needs a recogniser; set asr_source"),
    value("train mse", "train_splits", "3", r"train_splits: got 3, needed is a text or a list"),
    value(
        "train mse", "btach_size", "2", r"--btach_size: .*no such key\. Did you mean --batch_size"
    ),
    value("train soft_dtw", "gamma", "0", r"gamma: got 0, needed is a number above 0"),
    value(
        "train soft_dtw", "speed_factors", "[-1]", r"speed_factors: got \[-1\], needed is a list"
    ),
    value("train soft_dtw", "normalize", "maybe", r"normalize: got maybe, needed is True or False"),
    value(
        "train zero_pad", "max_pad_seconds", "-1", r"max_pad_seconds: got -1, needed is a number"
    ),
    value("evaluate --run noisy", "batch_size", "0", rf"batch_size: got 0, {WHOLE}"),
    value(
        "evaluate --run noisy", "test_set", "a/b", r"test_set: got a/b, needed is a name without"
    ),
    value(
        "evaluate --run noisy", "test_utterances", "-1", r"test_utterances: got -1, needed is a w"
    ),
    value(
        "evaluate --run noisy", "audio_examples", "-1", r"audio_examples: got -1, needed is a who"
    ),
    value(
        "evaluate --run noisy",
        "workers",
        "-1",
        "workers: got -1, needed is a whole number, 0 or more or null",
    ),
    value(
        "evaluate --run noisy", "overwrite", "perhaps", r"overwrite: got perhaps, needed is True"
    ),
    value("evaluate", "run", "[]", r"run: got \[\], needed is a text or a list of run folders"),
    value("probe", "utterances", "-1", r"utterances: got -1, needed is a whole number, 1 or more"),
    value("probe", "moved_by", "noise", r"moved_by: got noise, needed is one of zeros, speech"),
    value("probe", "gradient_batches", "2", r"gradient_batches: got 2, needed is .* 3 or more"),
    value("ablate", "lrs", "[-1]", r"lrs: got \[-1\], needed is a list of learning rates above 0"),
    value("ablate", "seeds", "[a]", r"seeds: got \['a'\], needed is a list of whole numbers"),
    value("ablate", "workers", "0", rf"workers: got 0, {WHOLE} or null"),
    value("ablate", "retries", "-1", r"retries: got -1, needed is a whole number, 0 or more"),
    value("ablate", "search_updates", "0", rf"search_updates: got 0, {WHOLE}"),
    value("ablate", "select_by", "wr", r"select_by: there is no 'wr'\. Did you mean wer\?"),
    value("ablate", "train", "{batch_size: 0, valid_every: 50}", rf"batch_size: got 0, {WHOLE}"),
    typed("--lr at the end", "train mse --lr", r"--lr: its value is missing"),
    typed("--lr before an option", "train mse --lr --seed 1", r"--lr: its value is missing"),
    typed("--lr= and nothing", "train mse --lr= --seed 1", r"--lr: its value is missing"),
    typed("an option twice", "train mse --lr 1 --lr 2", r"--lr is given twice"),
    typed("a run option twice", "train mse --device cpu --device cpu", r"--device is given twice"),
    typed("one dash", "train mse -lr 1", r"-lr: an option begins with two dashes"),
    typed("two experiments", "train mse zero_pad", r"[Uu]nrecognized arguments: zero_pad"),
    typed("an experiment that is not there", "train mze", r"no experiment file mze.* Did you mean"),
    own(
        "a misspelt key",
        "extends: mse.yaml\nbatch_sise: 2\n",
        r"own\.yaml: batch_sise is no key of"
        r" the file that it extends.*Did you mean batch_size\?",
    ),
    own(
        "a key of another file",
        "extends: mse.yaml\ntest_set: a\n",
        r"own\.yaml: test_set is no key",
    ),
    own(
        "a misspelt class",
        "extends: mse.yaml\ndistance: !new:pi_finetune.objectives.MSEDistanc\n",
        r"no such class as pi_finetune\.objectives\.MSEDistanc\. Did you mean .*MSEDistance\?",
    ),
    own(
        "a misspelt module",
        "extends: mse.yaml\ndistance: !new:pi_finetune.objetives.MSEDistance\n",
        r"no such class as pi_finetune\.objetives\.MSEDistance",
    ),
    own(
        "a misspelt function",
        "extends: mse.yaml\nlr: !applyref:math.sqr [4]\n",
        r"no such callable as math\.sqr\. Did you mean math\.sqrt",
    ),
    own(
        "a module for a class",
        "extends: mse.yaml\ndistance: !new:pi_finetune.objectives\n",
        r"pi_finetune\.objectives should be a class",
    ),
    own(
        "an argument a class does not take",
        "extends: mse.yaml\ndistance: !new:pi_finetune.objectives.SoftDTWDistance\n    gama: 1\n",
        r"SoftDTWDistance.* unexpected keyword argument 'gama'",
    ),
    own("a value of a wrong type", "extends: mse.yaml\nbatch_size: two\n", rf"got two, {WHOLE}"),
    own("a key twice", "extends: mse.yaml\nlr: 1\nlr: 2\n", r"own\.yaml.*duplicate key \"lr\""),
    own("a reference to nothing", "extends: mse.yaml\nlr: !ref <rate>\n", r"own\.yaml.*\"rate\""),
    own("no YAML", "extends: mse.yaml\nlr: [1\n", r"own\.yaml is not valid YAML"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['command'][0]}: {case['input']}")
def test_a_wrong_setting_is_one_paragraph(case, tmp_path):
    check(case, tmp_path)
    assert not list(tmp_path.rglob("hyperparams.yaml"))
