"""Bad input of the commands: audio, models, folders and experiment files of another recipe."""

import os
import shutil

import numpy as np
import pytest
import soundfile
from bad_input import check
from synthetic import write_audio

from pi_finetune.files import PROJECT_ROOT

SHIPPED = PROJECT_ROOT / "assets" / "models" / "enhancer"
CASES = []


def row(area, input, command, expect, make=lambda folder: None, **more):
    CASES.append(
        {"area": area, "input": input, "command": command.split(), "make": make, **more}
        | {"expect": expect}
    )


def noise(seconds=0.3, channels=None, scale=0.1):
    shape = int(16000 * seconds) if channels is None else (int(16000 * seconds), channels)
    return scale * np.random.default_rng(0).standard_normal(shape).astype("float32")


def audio(wav=None, rate=16000, name="a.wav", kept=1.0, **encoding):
    """Makes an audio file, of which a share of the bytes is kept."""

    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise() if wav is None else wav, rate, **encoding)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])

    return make


def text(*names, content="a text"):
    def make(folder):
        for name in names:
            (folder / name).write_text(content)

    return make


def folders(*names):
    return lambda folder: [(folder / name).mkdir() for name in names]


def both(*makes):
    return lambda folder: [make(folder) for make in makes]


def model(**files):
    """Makes a copy of the shipped enhancer with other content in a file (``_`` for the dot)."""

    def make(folder):
        write_audio(folder / "a.wav", noise())
        shutil.copytree(SHIPPED, folder / "m")
        for name, content in files.items():
            (folder / "m" / name.replace("_", ".")).write_text(content)

    return make


def name_in_bytes(folder):
    audio(name="d/a.wav")(folder)
    os.rename(os.fsencode(folder / "d" / "a.wav"), os.fsencode(folder / "d") + b"/\xe9.wav")
    (folder / "d" / "b.wav").write_text("a text")


A_FILE = audio()


def enhance(input, command, expect, make=A_FILE, **more):
    row("enhance", input, f"enhance {command}", expect, make, **more)


FAILED = {"status": 1}
HANDLED = {"status": 0}
enhance("a file that is not there", "no.wav -o out.wav", r"There is no file or folder no\.wav")
enhance(
    "a text named .wav",
    "a.wav -o out.wav",
    r"a\.wav cannot be read as audio: Format",
    text("a.wav"),
    **FAILED,
)
enhance("no samples", "a.wav -o out.wav", r"a\.wav holds no samples", audio(noise(0)), **FAILED)
enhance(
    "a truncated FLAC file",
    "a.flac -o out.wav",
    r"a\.flac cannot be read to its end",
    audio(noise(2), name="a.flac", kept=0.5),
    **FAILED,
)
enhance(
    "a sample that is NaN",
    "a.wav -o out.wav",
    r"a\.wav holds samples that are NaN or inf",
    audio(np.array([0, np.nan] * 99, "float32"), subtype="FLOAT"),
    **FAILED,
)
enhance("the output is the input", "a.wav -o a.wav", r"a\.wav is the input itself", **FAILED)
enhance(
    "an output that is no audio", "a.wav -o out.mp4", r"out\.mp4: its suffix is no audio format"
)
enhance(
    "a folder into a file",
    "d -o out.wav",
    r"out\.wav: its suffix is for one input file alone",
    audio(name="d/a.wav"),
)
enhance(
    "an output below a file",
    "a.wav -o out/x.wav",
    r"Cannot write out/x\.wav: File exists",
    both(audio(), text("out")),
    **FAILED,
)
enhance(
    "two inputs of one name",
    "x/a.wav y/a.wav -o out",
    r"x/a\.wav and y/a\.wav would both",
    both(audio(name="x/a.wav"), audio(name="y/a.wav")),
)
enhance("a folder without audio", "d -o out", r"There is no audio file in d", folders("d"))
enhance(
    "one bad file of two",
    "a.wav b.wav -o out",
    r"b\.wav cannot be read as audio",
    both(audio(), text("b.wav")),
    **FAILED,
)
enhance(
    "names that are not UTF-8, and a bad file beside them",
    "d -o out",
    r"b\.wav cannot be read",
    name_in_bytes,
    **FAILED,
)
enhance("no output", "a.wav", r"arguments are required: -o/--output")
enhance("--mix 2", "a.wav -o o.wav --mix 2", r"--mix: 2 is no number from 0 to 1")
enhance("--mix nan", "a.wav -o o.wav --mix nan", r"--mix: nan is no number from 0 to 1")
enhance("--mix half", "a.wav -o o.wav --mix half", r"--mix: half is no number from 0 to 1")
enhance("a misspelt option", "a.wav -o o.wav --modle x", r"unrecognized arguments: --modle x")
enhance("a device that is no device", "a.wav -o o.wav --device gpu", r"--device gpu cannot be used")
enhance("a device without memory", "a.wav -o o.wav --device meta", r"--device meta cannot be used")
enhance(
    "a device that PyTorch was not built for",
    "a.wav -o o.wav --device xpu",
    r"--device xpu cannot be used",
)
enhance(
    "too many channels for MP3",
    "a.wav -o o.mp3",
    r"o\.mp3: MP3 MPEG_LAYER_III takes no 9",
    audio(noise(channels=9)),
    **FAILED,
)
enhance(
    "a rate that Opus has not",
    "a.wav -o o.opus",
    r"o\.opus: OGG OPUS takes no 1 channels at 96000",
    audio(rate=96000),
    **FAILED,
)
enhance(
    "over full scale into FLAC",
    "a.wav -o o.flac --mix 0",
    r"the peak is .* a limiter bent",
    audio(noise(scale=0.5), subtype="FLOAT"),
    **HANDLED,
)
enhance("a model that is not there", "a.wav -o o.wav --model no", r"No enhancer\.yaml in no")
enhance(
    "a model that is a file", "a.wav -o o.wav --model a.wav", r"Cannot read a\.wav/enhancer\.yaml"
)
enhance(
    "a model that is no YAML",
    "a.wav -o o.wav --model m",
    r"Cannot read m/enhancer\.yaml: while parsing",
    model(enhancer_yaml="[1"),
)
enhance(
    "a model without a class",
    "a.wav -o o.wav --model m",
    r"must hold the keys 'class' and",
    model(enhancer_yaml="a: 1"),
)
enhance(
    "a model of one's own class",
    "a.wav -o o.wav --model m",
    r"names the class mine\.Net, .*--trust",
    model(enhancer_yaml="class: mine.Net\narguments: {}\n"),
)
enhance(
    "a model's class that is not there",
    "a.wav -o o.wav --trust --model m",
    r"Cannot import the class mine\.Net",
    model(enhancer_yaml="class: mine.Net\narguments: {}\n"),
)
enhance(
    "a model's class that is no network",
    "a.wav -o o.wav --trust --model m",
    r"must be a torch\.nn\.Module, got Counter",
    model(enhancer_yaml="class: collections.Counter\narguments: {}\n"),
)
enhance(
    "a model with a wrong argument",
    "a.wav -o o.wav --model m",
    r"do not fit pi_finetune\.enhancers\.MaskEnhancer.*dims",
    model(enhancer_yaml="class: pi_finetune.enhancers.MaskEnhancer\narguments: {dims: 3}\n"),
)
enhance(
    "a model of other sizes",
    "a.wav -o o.wav --model m",
    r"do not fit MaskEnhancer",
    model(enhancer_yaml="class: pi_finetune.enhancers.MaskEnhancer\narguments: {dim: 8}\n"),
)
enhance(
    "weights that are no weights",
    "a.wav -o o.wav --model m",
    r"not a readable safetensors file",
    model(enhancer_safetensors="x"),
)

row("export", "a run that is not there", "export no -o x", r"No enhancer\.yaml in no")
row(
    "export",
    "a format there is not",
    "export m -o x --format wav",
    r"--format: invalid choice: 'wav'",
    model(),
)
row(
    "export",
    "a folder with another README",
    "export m -o x",
    r"x holds a README\.md that is no export's",
    both(model(), folders("x"), text("x/README.md")),
)
row(
    "export",
    "a folder with another README in Latin-1",
    "export m -o x",
    r"x holds a README\.md that is no export's",
    both(model(), folders("x"), lambda f: (f / "x" / "README.md").write_bytes(b"\xe9")),
)
row(
    "export",
    "a folder below a file",
    "export m -o a.wav/x",
    r"a\.wav/x cannot be a folder",
    model(),
)
row(
    "export",
    "a file in the folder's place",
    "export m -o a.wav",
    r"a\.wav cannot be a folder",
    model(),
)

row("command line", "a misspelt command", "trian mse", r"invalid choice: 'trian'")
row("command line", "no experiment", "train", r"Name an experiment first")
row("command line", "no value where one must be given", "evaluate", r"'run' is a !PLACEHOLDER")
row(
    "command line",
    "--seed larger than NumPy takes",
    "train mse --seed 99999999999",
    r"seed: got 99999999999, needed is a whole number, 0 or more, 4294967295 at most",
)
row(
    "command line",
    "a tag that YAML does not know",
    "train mse --lr !foo",
    r"could not determine a constructor for the tag '!foo'",
)
row(
    "command line",
    "--validation_callbacks x",
    "train mse --validation_callbacks x",
    r"validation_callbacks: got x, needed is a list of functions",
)
for key, given in (
    ("distance", "mse"),
    ("enhancer", "null"),
    ("teacher", "null"),
    ("train_data", "null"),
    ("valid_data", "null"),
    ("opt_class", "adam"),
    ("lr_schedule", "null"),
    ("checkpointer", "null"),
    ("epoch_counter", "null"),
):
    row(
        "settings",
        f"--{key} {given}",
        f"train mse --{key} {given}",
        rf"{key}: got {given}, needed is a block",
    )
row(
    "settings",
    "--modules null",
    "train mse --modules null",
    r"modules: got null, needed is a block",
)
row(
    "folders",
    "results below a file",
    "train mse --results_folder f",
    r"f/mse/1234 cannot be written",
    text("f"),
)
row(
    "folders",
    "a file in the run folder's place",
    "train mse --output_folder f",
    r"f cannot be written",
    text("f"),
)
row(
    "folders",
    "a place where no folder can be made",
    "train mse --results_folder /proc/x",
    r"/proc/x/mse/1234 cannot be written",
)
row(
    "folders",
    "scores below a file",
    "evaluate --run noisy --results_folder f --test_utterances 1 --asr_source null",
    r"f/noisy/0/scores cannot be written",
    text("f"),
)

for command, other in (
    ("train", "ablation"),
    ("train", "asr_ctc"),
    ("train", "probe_position"),
    ("train", "evaluate"),
    ("evaluate", "ablation"),
    ("ablate", "mse"),
    ("probe", "mse"),
    ("recipes/train_asr.py", "mse"),
    ("recipes/pretrain_teacher.py", "mse"),
):
    row(
        "experiment file",
        f"{other}.yaml for {command}",
        f"{command} {other}",
        rf"{other}\.yaml is no experiment file for this command: it has no key",
    )
for name, content, expect in (
    ("an empty file", "", r"own\.yaml holds no mapping"),
    ("a list", "- 1\n", r"own\.yaml holds no mapping"),
    ("extends itself", "extends: own.yaml\n", r"'extends' goes round in a circle"),
    (
        "extends what is not there",
        "extends: no.yaml\n",
        r"Cannot read the experiment file no\.yaml",
    ),
    ("extends a list", "extends: [mse.yaml]\n", r"own\.yaml: extends names one file"),
    (
        "includes what is not there",
        "extends: mse.yaml\nenhancer: !include:no.yaml\n",
        r"!include names a file that is not there",
    ),
):
    row("experiment file", name, "train own.yaml", expect, text("own.yaml", content=content))
row(
    "experiment file",
    "Latin-1",
    "train own.yaml",
    r"own\.yaml: it is not UTF-8",
    lambda f: (f / "own.yaml").write_bytes(b"# \xe9\n"),
)

row(
    "evaluate", "a run that is not there", "evaluate --run nowhere", r"No enhancer\.yaml in nowhere"
)
row(
    "evaluate",
    "one of two runs is not there",
    "evaluate --run [noisy,nowhere]",
    r"No enhancer\.yaml in nowhere",
)
row("evaluate", "--run 3", "evaluate --run 3", r"run: got 3, needed is a text or a list")
row("evaluate", "--runs for --run", "evaluate --runs noisy", r"no such key\. Did you mean --run\?")
row(
    "evaluate",
    "a corpus that is not there",
    "evaluate --run noisy --data_folder nowhere",
    r"data_folder: nowhere is no folder",
)
row(
    "evaluate",
    "an empty corpus",
    "evaluate --run noisy --data_folder d",
    r"d has no split 'test\*'; it has: no folders",
    folders("d"),
)
row(
    "evaluate",
    "no noise",
    "evaluate --run noisy --noise_folder null",
    r"noise_folder: needed, since",
)
row(
    "evaluate",
    "a split that is not there",
    "evaluate --run noisy --test_splits [tset]",
    r"has no split 'tset'; it has: dev, test, train",
)
row(
    "evaluate",
    "a noise class that is not there",
    "evaluate --run noisy --noise_classes [x]",
    r"noise_classes: .* has no x; it has: babble",
)
row(
    "evaluate",
    "utterances that are too long",
    "evaluate --run noisy --max_seconds 0.5",
    r"is longer than max_seconds \(0\.5\)",
)
row(
    "evaluate",
    "an empty recogniser folder",
    "evaluate --run noisy --asr_source d",
    r"d.*",
    folders("d"),
)

row(
    "evaluate",
    "recordings that are not there",
    "evaluate --run noisy --recordings nowhere --asr_source null",
    r"nowhere: there is no such file or folder",
)
row(
    "evaluate",
    "clean speech of recordings",
    "evaluate --run clean --recordings d --asr_source null",
    r"run: clean: there is no clean speech of recordings",
    audio(name="d/a.wav"),
)
row(
    "evaluate",
    "--channel left",
    "evaluate --run noisy --recordings d --channel left",
    r"channel: got left, needed is a whole number",
)
row(
    "evaluate",
    "audio saved below a file",
    "evaluate --run noisy --recordings d --asr_source null --save_audio f",
    r"Cannot write f/inputs/settings\.json: Not a directory",
    both(audio(name="d/a.wav"), text("f")),
)

row("check", "no recordings", "check", r"arguments are required: RECORDINGS")
row("check", "recordings that are not there", "check nowhere", r"nowhere: there is no such file")
row("check", "--mix 2", "check d --mix 1 2", r"2 is no share above 0 and up to 1")
row("check", "--mix half", "check d --mix half", r"half is no share above 0 and up to 1")
row("check", "--utterances 0", "check d --utterances 0", r"--utterances 0: give a whole number")
row(
    "check",
    "a run that is not there",
    "check d --run nowhere",
    r"No enhancer\.yaml in nowhere",
    audio(name="d/a.wav"),
)
row(
    "check",
    "two runs of one name",
    "check d --run x/m m",
    r"--run m: its results would be called m, which something else is",
    both(audio(name="d/a.wav"), folders("m", "x", "x/m")),
)
row(
    "check",
    "a recogniser that is not there",
    "check d --asr_source ./nowhere",
    r"recogniser folder '\./nowhere' does not exist",
    both(audio(name="d/a.wav"), text("d/a.trans.txt", content="a ONE\n")),
)
row(
    "check",
    "results below a file",
    "check d --output_folder f",
    r"f cannot be written",
    both(audio(name="d/a.wav"), text("f")),
)

row("resample", "a folder that is not there", "recipes/resample.py no new", r"no: no such folder")
row(
    "resample",
    "into itself",
    "recipes/resample.py d d/new",
    r"d/new lies in d",
    audio(name="d/a.wav"),
)
row(
    "resample",
    "--channel 0",
    "recipes/resample.py d new --channel 0",
    r"--channel 0: channels count from 1",
    audio(name="d/a.wav"),
)
row(
    "resample",
    "a channel that is not there",
    "recipes/resample.py d new --channel 3",
    r"--channel 3 is not there; it has 2",
    audio(noise(channels=2), name="d/a.wav"),
)
row(
    "resample",
    "--jobs 0",
    "recipes/resample.py d new --jobs 0",
    r"--jobs 0: give the number of processes",
    audio(name="d/a.wav"),
)
row(
    "resample",
    "a pattern that fits nothing",
    "recipes/resample.py d new --pattern x*",
    r"no audio file matches --pattern",
    audio(name="d/a.wav"),
)
row(
    "resample",
    "a text named .wav",
    "recipes/resample.py d new",
    r"a\.wav: cannot be read as audio",
    both(folders("d"), text("d/a.wav")),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['area']}: {case['input']}")
def test_bad_input_gets_its_message(case, tmp_path):
    check(case, tmp_path)
