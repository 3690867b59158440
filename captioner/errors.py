"""The one exception that a user's mistake raises, and how text that somebody else wrote is printed."""

import unicodedata


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong, where, and how to mend it. The command line prints it
    without a traceback and ends with a non-zero exit code.
    """


def in_one_line(text: object) -> str:
    r"""Return text, such as a file's name, in one line: line breaks and all that cannot be printed as escapes (\n)."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


def without_control(text: str) -> str:
    r"""Return a text, such as a caption, with characters that command a terminal as escapes (\x1b).

    All that is written stays, joiners, wide spaces and the like among it.
    """
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in text
    )
