"""The one exception that a user's mistake raises."""


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong, where, and how to mend it. The command line prints it
    without a traceback and ends with a non-zero exit code.
    """


def in_one_line(text: object) -> str:
    r"""Return text, such as a file's name, in one line: line breaks and all that cannot be printed as escapes (\n)."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))
