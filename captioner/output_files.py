"""Files that a command leaves to its user: written whole or not at all, and refused before the work if they cannot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captioner.errors import InputError


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str], to_disk: bool = False) -> None:
    """Write a file of parts that are made one after the other, whole or not at all.

    Parameters
    ----------
    path, parts
        Where to, and what.
    to_disk
        Wait until it is there, so that what it was made of may be deleted.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    with replacing(path) as unfinished:
        # Half characters, such as a file's name may hold, stand in JSON as its own escapes.
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.writelines(parts)
            if to_disk:
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to be made, which takes the place of `path` at the end, or goes if there is an error.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise InputError(f"The file {path} cannot be written ({error.strerror}): write elsewhere.") from error
        raise


def check_writable(path: Path) -> None:
    """See before the work, and not after it, that its result can be written.

    Raises
    ------
    InputError
        If it cannot.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{folder} is no folder in which files can be made"
        raise InputError(f"The file {path} cannot be written, since {reason}: write elsewhere.")
