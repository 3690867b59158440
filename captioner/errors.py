"""The one exception that a user's mistake raises."""


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong, where, and how to mend it. The command line prints it
    without a traceback and ends with a non-zero exit code.
    """
