"""Position-invariant fine-tuning of speech enhancement with self-supervised representations.

The names below are what most programs need; each is imported when it is first used, so that
``import pi_finetune`` and ``pi_finetune.soft_dtw`` stay light (the latter needs torch alone).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi_finetune.enhancers import load_enhancer
    from pi_finetune.inference import Enhancer
    from pi_finetune.lengths import Waveforms
    from pi_finetune.objectives import MSEDistance, RepresentationObjective, SoftDTWDistance
    from pi_finetune.perturbations import SpeedPerturbation, ZeroPadding
    from pi_finetune.results.comparison import compare_runs
    from pi_finetune.soft_dtw import soft_dtw
    from pi_finetune.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "Enhancer",
    "MSEDistance",
    "RepresentationObjective",
    "SoftDTWDistance",
    "SpeedPerturbation",
    "Teacher",
    "Waveforms",
    "ZeroPadding",
    "compare_runs",
    "load_enhancer",
    "soft_dtw",
]

_HOMES = {
    "Enhancer": "inference",
    "MSEDistance": "objectives",
    "RepresentationObjective": "objectives",
    "SoftDTWDistance": "objectives",
    "SpeedPerturbation": "perturbations",
    "Teacher": "teacher",
    "Waveforms": "lengths",
    "ZeroPadding": "perturbations",
    "compare_runs": "results.comparison",
    "load_enhancer": "enhancers",
}


def __getattr__(name: str) -> Any:
    if name == "soft_dtw":  # the module, which is called as the function of its name
        return importlib.import_module("pi_finetune.soft_dtw")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
