"""The one exception that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used: a path, a checkpoint, a plan, a data file, a flag.

    The message is one sentence that says what is wrong and what to do about it. Commands print it as
    ``error: <message>`` and exit with code 2; ``--debug`` shows the traceback instead.
    """
