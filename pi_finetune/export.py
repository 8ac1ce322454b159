"""A trained enhancer in forms that others load: SpeechBrain, the hub, ONNX, ``torch.export``.

    pi-finetune export results/soft_dtw/1234 -o my-enhancer --format speechbrain onnx torch

The folder always holds what :meth:`pi_finetune.inference.Enhancer.from_run` loads, and a model
card, so that it can be uploaded to the hub as it is.
"""

import copy
import importlib.util
import io
import math
import warnings
from pathlib import Path

import ruamel.yaml
import torch
import torch.nn.functional as F
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from speechbrain.inference.enhancement import WaveformEnhancement
from speechbrain.processing.features import ISTFT, STFT
from torch import nn

from pi_finetune import __version__
from pi_finetune.enhancers import (
    SAMPLE_RATE,
    SpeechBrainEnhancer,
    load_enhancer,
    save_enhancer,
)
from pi_finetune.errors import UserError
from pi_finetune.files import replacing, write_text
from pi_finetune.inference import find_model
from pi_finetune.metrics import SIGNAL_SCORES
from pi_finetune.report.runs import Run, read_json_lines
from pi_finetune.report.scores import metric_scores, metrics_of

FORMATS = ("speechbrain", "onnx", "torch")
HPARAMS_FILE, CARD_FILE = "hyperparams.yaml", "README.md"
ONNX_FILE, TORCH_FILE = "enhancer.onnx", "enhancer.pt2"

_MARK = "Written by pi_finetune export"  # in both files: an export may replace them


class WaveformModel(nn.Module):
    """An enhancer as SpeechBrain's ``WaveformEnhancement`` calls one.

    Arguments
    ---------
    enhancer : WaveformEnhancer
    """

    def __init__(self, enhancer):
        super().__init__()
        self.enhancer = enhancer

    def forward(self, wavs):
        """Return the enhanced wavs [B, T], and None in the place of features."""
        return self.enhancer(wavs), None


def export_run(run, folder, formats=("speechbrain",), trust=False, license=None):
    """Write a run's best model into a folder.

    Arguments
    ---------
    run : str or Path
        A run folder, or what else :func:`pi_finetune.inference.find_model` knows.
    folder : str or Path
        Where to; made if missing. An earlier export is replaced file by file.
    formats : sequence of str
        Of ``speechbrain`` (``hyperparams.yaml`` and ``enhancer.ckpt``), ``onnx``
        (``enhancer.onnx``) and ``torch`` (``enhancer.pt2``); see the functions here.
    trust : bool
        See :func:`pi_finetune.enhancers.load_enhancer`.
    license : str, optional
        Identifier for the model card, e.g. ``cc-by-4.0`` (default: none is stated).

    Returns
    -------
    list of Path
        The files in the folder.

    Raises
    ------
    UserError
        The run has no model, the folder belongs to something else, or the model cannot be
        had in a format.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise UserError(f"--format {min(unknown)}: choose from {', '.join(FORMATS)}.")
    source, folder = Path(find_model(run)), Path(folder)
    for name in (HPARAMS_FILE, CARD_FILE):
        path = folder / name
        if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
            raise UserError(f"{folder} holds a {name} that is no export's: name another folder.")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the run itself: name another folder with -o.")
    enhancer = load_enhancer(source, trust=trust)
    if "speechbrain" in formats:
        write_speechbrain(folder, enhancer)
    program = export_program(enhancer) if {"onnx", "torch"} & set(formats) else None
    if "onnx" in formats:
        write_onnx(folder / ONNX_FILE, program)
    if "torch" in formats:
        with replacing(folder / TORCH_FILE) as path:
            torch.export.save(program, str(path))
    save_enhancer(folder, enhancer)
    there = [name for name in (HPARAMS_FILE, ONNX_FILE, TORCH_FILE) if (folder / name).exists()]
    write_text(folder / CARD_FILE, str(model_card(source, enhancer, there, license)))
    return sorted(folder.iterdir())


# SpeechBrain


def write_speechbrain(folder, enhancer):
    """Write what ``speechbrain.inference.enhancer.WaveformEnhancement.from_hparams`` loads.

    ``hyperparams.yaml`` names classes of this package, which therefore has to be installed where
    it is loaded. That of a :class:`SpeechBrainEnhancer` is its source's own, for the interface it
    was made for, with other weights.

    Arguments
    ---------
    folder : str or Path
        Made if missing.
    enhancer : WaveformEnhancer
    """
    head = f"# {_MARK} {__version__}; where it is loaded, pi_finetune has to be installed.\n"
    if isinstance(enhancer, SpeechBrainEnhancer):
        head = f"# {_MARK} {__version__}, after the model's own file.\n"
        text, weights = _with_new_weights(enhancer), enhancer.interface.mods.state_dict()
    else:
        model = _yaml({"enhancer": enhancer.config["arguments"] or None}).split("\n", 1)[1]
        text = _WAVEFORM_YAML.format(SAMPLE_RATE, enhancer.config["class"], model)
        weights = enhancer.state_dict()
    folder = Path(folder)
    with replacing(folder / "enhancer.ckpt") as path:
        torch.save(weights, path)
    write_text(folder / HPARAMS_FILE, head + text)


_WAVEFORM_YAML = """\
# from speechbrain.inference.enhancement import WaveformEnhancement
# WaveformEnhancement.from_hparams(source="this folder").enhance_file("noisy.wav", "enhanced.wav")
sample_rate: {}

enhancer: !new:{}
{}
modules:
    enhance_model: !new:pi_finetune.export.WaveformModel
        enhancer: !ref <enhancer>

# SpeechBrain looks for enhancer.ckpt beside this file.
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        enhancer: !ref <enhancer>
"""


def _with_new_weights(enhancer):
    """The YAML file of a model in SpeechBrain's format, changed to load ``enhancer.ckpt``."""
    tree = ruamel.yaml.YAML().load(enhancer.hparams_text)
    tree.pop("pretrainer", None)
    resynth = getattr(enhancer.interface.hparams, "resynth", None)
    if "normalize_wavs" in getattr(resynth, "keywords", {}):  # as SpeechBrainEnhancer calls it
        tree["resynth"]["normalize_wavs"] = False
    return (
        _yaml(tree)
        + """
fine_tuned: !new:torch.nn.ModuleDict
    modules: !ref <modules>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        enhancer: !ref <fine_tuned>
"""
    )


# ONNX and torch.export


class _Transform(nn.Module):
    """SpeechBrain's STFT as a convolution with the windowed Fourier basis.

    The exporters know ``torch.stft`` for one length only, and ``torch.istft`` not at all.

    Arguments
    ---------
    stft : speechbrain.processing.features.STFT or ISTFT
        Centred, padded by zeros, with a window as long as the transform.
    """

    def __init__(self, stft):
        super().__init__()
        size, window = stft.n_fft, stft.window.double()
        if not stft.center or len(window) != size or size % 2:
            raise UserError("Only centred STFTs with a window of n_fft samples can be exported.")
        self.half, self.hop = size // 2, stft.hop_length
        time = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi / size * torch.arange(self.half + 1)[:, None] * time
        basis = torch.cat([angle.cos(), -angle.sin()]) * window  # [2 bins, n_fft]
        self.register_buffer("window", window.float()[None, None])
        self.register_buffer("basis", basis.float()[:, None])

    def forward(self, wavs):
        """Spectra [B, N, bins, 2] of wavs [B, T]."""
        frames = F.conv1d(F.pad(wavs, (self.half, self.half))[:, None], self.basis, stride=self.hop)
        return frames.unflatten(1, (2, -1)).permute(0, 3, 2, 1)


class _Inverse(_Transform):
    """SpeechBrain's ISTFT as a transposed convolution; see :class:`_Transform`."""

    def __init__(self, stft):
        super().__init__(stft)
        twice = torch.full((self.half + 1, 1, 1), 2.0)
        twice[0] = twice[-1] = 1.0
        self.basis *= torch.cat([twice, twice]) / (2 * self.half)

    def forward(self, spectra, sig_length):
        """Waveforms [B, sig_length] of spectra [B, N, bins, 2]."""
        frames = spectra.permute(0, 3, 2, 1).flatten(1, 2)
        wavs = F.conv_transpose1d(frames, self.basis, stride=self.hop)
        ones = torch.ones_like(frames[:1, :1])
        weight = F.conv_transpose1d(ones, self.window.square(), stride=self.hop)
        return (wavs / weight.clamp(min=1e-11))[:, 0, self.half : self.half + sig_length]


class _Exportable(nn.Module):
    """``wavs [B, T] -> [B, T]``, all of them T samples long, in operations that can be exported."""

    SUBSTITUTES = ((ISTFT, _Inverse), (STFT, _Transform))

    def __init__(self, enhancer):
        super().__init__()
        self.enhancer = copy.deepcopy(enhancer).eval()
        for parent in list(self.enhancer.modules()):
            for name, child in list(parent.named_children()):
                for theirs, ours in self.SUBSTITUTES:
                    if type(child) is theirs:
                        setattr(parent, name, ours(child))

    def forward(self, wavs):
        lengths = torch.full((wavs.shape[0],), wavs.shape[1], device=wavs.device)
        return self.enhancer.enhance(wavs, lengths)


def export_program(enhancer):
    """Trace an enhancer for any batch size and length, and check the result at another length.

    ``MaskEnhancer`` and ``ConvTasNet`` can be traced; ``UNetEnhancer`` cannot, since PyTorch fixes
    the number of steps of its LSTM, nor can ``SpeechBrainEnhancer``.

    Arguments
    ---------
    enhancer : WaveformEnhancer

    Returns
    -------
    torch.export.ExportedProgram
        ``program.module()(wavs [B, T]) -> [B, T]``; every row is T samples long.

    Raises
    ------
    UserError
        The model cannot be traced.
    """
    if isinstance(enhancer, SpeechBrainEnhancer):
        raise UserError(
            "--format onnx and torch: not possible for models in SpeechBrain's format, whose "
            "interface is no traceable module."
        )
    dynamic = {"wavs": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    rows = [
        0.1 * torch.randn(1, n, generator=torch.Generator().manual_seed(0)) for n in (16000, 10007)
    ]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            example = (rows[0].expand(2, -1).clone(),)
            program = torch.export.export(_Exportable(enhancer), example, dynamic_shapes=dynamic)
            traced, expected = program.module()(rows[1]), enhancer(rows[1])
    except Exception as error:  # whatever the tracer raises on code it cannot follow
        raise UserError(
            f"--format onnx and torch: PyTorch cannot trace {type(enhancer).__name__} for any "
            f"length ({str(error).strip().splitlines()[0]})."
        ) from error
    torch.testing.assert_close(traced, expected, rtol=1e-3, atol=1e-5)
    return program


def write_onnx(path, program):
    """Write an ONNX graph with input ``noisy`` [B, T] and output ``enhanced`` [B, T].

    Arguments
    ---------
    path : str or Path
    program : torch.export.ExportedProgram
        From :func:`export_program`.

    Raises
    ------
    UserError
        A package is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("--format onnx needs two more packages: pip install onnx onnxscript.")
    names = {"input_names": ["noisy"], "output_names": ["enhanced"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    with replacing(path) as temporary:
        graph.save(str(temporary))


# Model card

_CARD = """\
---
{{ card_data }}
---

# {{ name }}

A speech enhancer of {{ size }} M parameters, class `{{ kind }}`: 16 kHz waveform in, waveform of
the same length out. {{ mark }} {{ version }}.

## Training

{% if facts -%}
| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- else -%}
The folder that this was exported from holds no record of its training.
{% endif %}
## Scores

{% for set in sets -%}
Test set `{{ set.name }}`, {{ set.count }} utterances:

| |{% for row in set.rows %} {{ row.label }} |{% endfor %}
|---|{% for row in set.rows %}---|{% endfor %}
{% if set.has_noisy -%}
| noisy input |{% for row in set.rows %} {{ row.noisy }} |{% endfor %}
{% endif -%}
| this model |{% for row in set.rows %} {{ row.value }} |{% endfor %}

{% else -%}
None were found beside the model.

{% endfor -%}
## Licence

{{ licence }}

## Use

With pi_finetune installed; a folder or the name of a repository on the hub:

```python
from pi_finetune.inference import Enhancer

Enhancer.from_run("FOLDER_OR_NAME"{{ trust }}).enhance_file("noisy.wav", "enhanced.wav")
```
{% if "hyperparams.yaml" in files %}
With SpeechBrain, which runs the classes that `hyperparams.yaml` names{% if not trust %}, so
pi_finetune has to be installed as well{% endif %}:

```python
from {{ interface.__module__ }} import {{ interface.__name__ }}

model = {{ interface.__name__ }}.from_hparams(source="FOLDER_OR_NAME")
```
{% endif %}{% if "enhancer.onnx" in files %}
Without either: `enhancer.onnx` takes `noisy` [B, T] (float32, 16 kHz, all rows of equal length) and
gives `enhanced` [B, T].
{% endif %}{% if "enhancer.pt2" in files %}
With PyTorch alone: `torch.export.load("enhancer.pt2").module()(wavs)` for wavs [B, T].
{% endif %}"""


def model_card(source, enhancer, files=(), license=None):
    """The model card of a run, of what its folder records and nothing else.

    Arguments
    ---------
    source : Path
        The run folder: ``hyperparams.yaml``, ``valid.jsonl`` and ``scores/*.jsonl`` are used where
        they are there; scores of ``noisy/0`` beside the strategy's folder are shown too.
    enhancer : WaveformEnhancer
    files : sequence of str
        Which of the exported files there are.
    license : str, optional
        Identifier of the licence.

    Returns
    -------
    huggingface_hub.ModelCard
    """
    record, wrapped = _record(source), isinstance(enhancer, SpeechBrainEnhancer)
    sets = [scores for path in sorted(source.glob("scores/*.jsonl")) if (scores := _scores(path))]
    name = f"{record['strategy']}-{record['seed']}" if record else source.resolve().name
    results = [
        EvalResult("audio-to-audio", scores["name"], scores["name"], row["name"], row["number"])
        for scores in sets
        for row in scores["rows"]
    ]
    data = ModelCardData(
        license=license,
        library_name="speechbrain" if HPARAMS_FILE in files else "pi_finetune",
        pipeline_tag="audio-to-audio",
        tags=["speech-enhancement", "pi_finetune"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_CARD,
        name=name,
        size=f"{sum(p.numel() for p in enhancer.parameters()) / 1e6:.2f}",
        kind=enhancer.config["class"],
        mark=_MARK,
        version=__version__,
        facts=_facts(record, source),
        sets=sets,
        licence=license or "None was stated at the export.",
        trust=", trust=True" if wrapped else "",
        files=list(files),
        interface=type(enhancer.interface) if wrapped else WaveformEnhancement,
    )


def _record(source):
    """The settings of a training, as plain YAML: nothing in it is executed."""
    path = source / HPARAMS_FILE
    if not path.is_file():
        return {}
    record = ruamel.yaml.YAML().load(path.read_text(encoding="utf-8"))
    return record if isinstance(record, dict) and {"strategy", "seed"} <= record.keys() else {}


_LABELS = {"teacher_source": "teacher", "enhancer_weights": "started from", "snrs": "SNR (dB)"}


def _facts(record, source):
    """Rows of the card's table."""
    if not record:
        return {}
    names = "strategy seed perturbation distance signal_loss teacher_source teacher_layers"
    names += " enhancer_weights data_folder train_splits noise_folder noise_classes snrs"
    names += " segment_seconds updates batch_size lr precision select_by"
    unused = set()
    if record.get("teacher") is None or not record.get("representation_weight"):
        unused |= {"perturbation", "distance", "teacher_source", "teacher_layers"}
    if not record.get("signal_weight"):
        unused.add("signal_loss")
    facts = {}
    for name in names.split():
        if name in record and name not in unused:
            label = _LABELS.get(name, name.replace("_", " "))
            facts[label] = _plain(
                record[name], is_path=name.endswith(("_folder", "_source", "_weights"))
            )
    if record.get("noise_classes", ...) is None:
        facts["noise classes"] = "all"
    best = _best(source / "valid.jsonl", record.get("select_by"))
    if best:
        facts["kept at update"] = f"{best['update']}, the best by {record['select_by']}"
    return facts


def _plain(value, is_path=False):
    """A value of the settings as it is shown: !new:a.B with c: 1 as B(c=1)."""
    tag = getattr(getattr(value, "tag", None), "value", None)
    if tag and tag.startswith("!new:"):
        arguments = value.items() if isinstance(value, dict) else ()
        return f"{tag.split('.')[-1]}({', '.join(f'{k}={_plain(v)}' for k, v in arguments)})"
    if is_path and value is not None:  # hub names have two parts; more would tell of a machine
        return "/".join(Path(str(value)).parts[-2:])
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _best(path, score):
    """The validation whose model was kept."""
    records = read_json_lines(path) if path.is_file() else []
    records = [r for r in records if isinstance(r.get(score), float | int)]
    sign = 1 if score in SIGNAL_SCORES else -1
    return max(records, key=lambda r: (sign * r[score], r["update"]), default=None)


def _scores(path):
    """Means of one scores file, and of the noisy input where it has been scored too."""
    run = Run("this", 0, path.parent, {line["id"]: line for line in read_json_lines(path)})
    noisy_path = path.parent.parent.parent.parent / "noisy" / "0" / "scores" / path.name
    runs = [run]
    if noisy_path.is_file():
        lines = {line["id"]: line for line in read_json_lines(noisy_path)}
        if lines.keys() == run.scores.keys():
            runs.append(Run("noisy", 0, noisy_path.parent, lines))
    rows = []
    for metric in metrics_of(runs):
        scores = metric_scores(runs, list(run.scores), metric)
        value, noisy = scores.mean("this"), scores.mean("noisy")
        if value is not None:
            label = metric.label  # of WER only further ones name their recogniser
            if metric.recognizer and metric.recognizer not in label:
                label += f", {metric.recognizer}"
            shown = "–" if noisy is None else f"{noisy:.{metric.digits}f}"
            rows.append(
                {"name": metric.name, "label": label, "number": round(value, metric.digits),
                 "value": f"{value:.{metric.digits}f}", "noisy": shown}
            )  # fmt: skip
    if not rows:
        return None
    return {"name": path.stem, "count": len(run.scores), "rows": rows, "has_noisy": len(runs) > 1}


def _yaml(tree):
    stream = io.StringIO()
    yaml = ruamel.yaml.YAML()
    yaml.indent(mapping=4, sequence=4, offset=2)
    yaml.dump(tree, stream)
    return stream.getvalue()
