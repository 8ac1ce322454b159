"""The one exception whose text alone is shown to a user."""

import functools
import sys


class UserError(ValueError):
    """A mistake in what the user gave: a file, a folder, a YAML key, an option.

    The message names the culprit and says what to do. Command lines print the
    message without a traceback; library callers can catch it as ``ValueError``.
    """


def command(main):
    """Decorator of a command's ``main``: show a :class:`UserError` as its text, exit with 2."""

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

    return run
