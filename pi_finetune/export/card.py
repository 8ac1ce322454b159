"""The model card of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ruamel.yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from speechbrain.inference.enhancement import WaveformEnhancement

from pi_finetune import __version__
from pi_finetune.enhancers import (
    SpeechBrainEnhancer,
)
from pi_finetune.export.speechbrain import HPARAMS_FILE, MARK
from pi_finetune.results.declarations import higher_is_better
from pi_finetune.results.runs import Run, read_json_lines
from pi_finetune.results.scores import metric_scores, metrics_of

if TYPE_CHECKING:
    from pi_finetune.enhancers.base import WaveformEnhancer

__all__ = ["CARD_FILE", "model_card"]


CARD_FILE = "README.md"
#: The tag by which the hub links a model to the paper.
PAPER = "arxiv:2601.21084"

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


def model_card(
    source: Path,
    enhancer: "WaveformEnhancer",
    files: Sequence[str] = (),
    license: str | None = None,
) -> ModelCard:
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
        EvalResult(
            "audio-to-audio",
            scores["name"],
            scores["name"],
            row["name"],
            row["number"],
            metric_name=row["label"],
        )
        for scores in sets
        for row in scores["rows"]
    ]
    data = ModelCardData(
        license=license,
        library_name="speechbrain" if HPARAMS_FILE in files else "pi_finetune",
        pipeline_tag="audio-to-audio",
        tags=["speech-enhancement", "pi_finetune", PAPER],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_CARD,
        name=name,
        size=f"{sum(p.numel() for p in enhancer.parameters()) / 1e6:.2f}",
        kind=enhancer.config["class"],
        mark=MARK,
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
    sign = 1 if higher_is_better(score) else -1
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
