"""The one exception whose text alone is shown to a user."""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["DivergedError", "UserError", "command", "optional"]


class UserError(ValueError):
    """A mistake in what the user gave: a file, a folder, a YAML key, an option.

    The message names the culprit and says what to do. Command lines print the
    message without a traceback; library callers can catch it as ``ValueError``.
    """


class DivergedError(UserError):
    """Training stopped, since too many updates in a row were not finite."""


def optional(module: str, extra: str, what: str) -> ModuleType:
    """Import what an installation may lack.

    Arguments
    ---------
    module : str
        Of a package that ``extra`` brings.
    extra : str
        Of ``pyproject.toml``.
    what : str
        The key, option or file that needs it.

    Returns
    -------
    module

    Raises
    ------
    UserError
        It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs a package that is missing ({error}): pip install 'pi_finetune[{extra}]'"
        ) from None


def command(main: Callable) -> Callable:
    """Decorator of a command's ``main``: what a user did is told in words, without a traceback.

    A :class:`UserError` is shown as its text, exit status 2; Ctrl-C says how to go on, status 130.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # A DataLoader worker wraps the message in its traceback.
            message = str(error).rsplit("UserError: ", 1)[-1].strip()
            if message:  # of several processes the main one has it
                print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted\nThe same command goes on from what is finished.", file=sys.stderr)
            sys.exit(130)

    return run
