"""A user's mistake, a signal, and how text that somebody else wrote is printed."""

import unicodedata


class InputError(Exception):
    """Something that the user gave cannot be used.

    The message is one sentence that says what is wrong, where, and how to mend it. The command line prints it
    without a traceback and ends with a non-zero exit code.
    """


class Interrupted(BaseException):
    """A signal has ended a training.

    The message is one sentence that says what is saved and how to go on, which the command line prints.

    Parameters
    ----------
    message : str
        The sentence.
    code : int
        What the command ends with: 128 and the signal's number, as shells have it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


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
