"""The recipes as modules: ``from pi_finetune.recipes.train import train``.

This file stands for the folder ``recipes/``, which lies beside the package in a checkout and inside
it where a wheel was installed. A recipe's module holds a function that is called with values, and
``main(argv)``, its command line.
"""

from pi_finetune.files import PROJECT_ROOT

__path__ = [str(PROJECT_ROOT / "recipes")]
