"""The one exception whose text alone is shown to a user."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a folder, a YAML key, an option.

    The message names the culprit and says what to do. Command lines print the
    message without a traceback; library callers can catch it as ``ValueError``.
    """
