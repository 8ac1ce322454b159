"""Python without the project's optional packages, where this folder is on PYTHONPATH.

They cannot be imported or found, nor can their version be told, as if they were not installed.
PI_FINETUNE_WITHOUT names others than all of them: "gruut,triton".
"""

import os
import re
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

#: Those that no extra brings: of the tests, of CUDA builds of PyTorch, of loggers, of gruut.
NO_EXTRA = ("webdataset", "triton", "wandb", "gruut_lang_en")
#: Brought by an extra, but by SpeechBrain too.
NOT_OPTIONAL = ("requests",)


def refused():
    """Names of the packages, as they are imported."""
    if "PI_FINETUNE_WITHOUT" in os.environ:
        return set(os.environ["PI_FINETUNE_WITHOUT"].split(","))
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"].values()
    brought = {re.match(r"\w+", requirement)[0] for extra in extras for requirement in extra}
    return (brought | {*NO_EXTRA}) - {*NOT_OPTIONAL}


class Installed(PathFinder):
    """What finds installed modules and their versions, and passes over those refused."""

    names = refused()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """None for a refused module."""
        return None if fullname in cls.names else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        """All but the refused."""
        for found in super().find_distributions(*args, **kwargs):
            if found.name.replace("-", "_").lower() not in cls.names:
                yield found


sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
