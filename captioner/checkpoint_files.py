"""Checkpoints on the disk: a file takes its place whole and safe from a power cut, or what was there before stays.

It is written under a name of its own beside the place that it is to take, and the writer holds a lock on it. A kill
leaves such a file behind, whose lock is gone with its writer: the next run in the folder clears it away.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from captioner.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, which deletes no open file: that serves as the lock
    fcntl = None  # type: ignore[assignment]

UNFINISHED = re.compile(r".+\.[0-9a-f]{16}\.unfinished")
PATIENCE = 15  # seconds; a killed training's processes that read images see it after 5 and end
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM}  # of reading, too


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` once it is on the disk, or goes if there is an error.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    unfinished = None
    try:
        with _begin(path) as file:
            unfinished = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            os.replace(unfinished, path)  # with the lock still held: nobody takes it for a killed run's
        _sync(path.parent)
    except BaseException as error:
        if unfinished is not None:
            with suppress(OSError):
                os.unlink(unfinished)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def clear_unfinished(folder: Path) -> None:
    """Delete what killed writers have left unfinished in a folder, and nothing that a living one is writing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            with suppress(OSError):  # its writer lives, or nobody may delete here
                if fcntl is None:
                    path.unlink()
                else:
                    with open(path, "r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()


def check_folder(folder: Path) -> None:
    """See before the work, and not after it, that files can be made in a folder, which need not be there yet.

    Raises
    ------
    InputError
        If they cannot.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(
            f"Files in {folder} cannot be written: see that they can be made in {there}, or write elsewhere."
        )


def claim(folder: Path) -> int | None:
    """Keep a folder for this process, until it ends or closes the descriptor that is returned.

    There is none where the file system knows no locks of folders, as NFS, and on Windows.

    Raises
    ------
    InputError
        If another process has the folder, and has it still after `PATIENCE`.
    """
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, started = os.open(folder, os.O_RDONLY), time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            taken = error.errno in (errno.EAGAIN, errno.EWOULDBLOCK)
            if taken and time.monotonic() - started < PATIENCE:
                time.sleep(0.2)
                continue
            os.close(descriptor)
            if not taken:
                return None
            raise InputError(
                f"Another training writes its checkpoints in {folder}: wait for its end, or write elsewhere by "
                "--checkpoint.dirpath."
            ) from None


@contextmanager
def explaining(folder: str | Path) -> Iterator[None]:
    """Say in one sentence that a file of a run cannot be written, be it a log whose writer we do not know.

    Parameters
    ----------
    folder : str or Path
        Where the run writes.

    Raises
    ------
    InputError
        In place of the operating system's error, where it is one of writing.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.__context__, InputError):  # loggers that end after a failure meet the next one
            raise error.__context__ from None
        ours = error.filename is not None and Path(folder).absolute() in Path(str(error.filename)).absolute().parents
        if error.errno in FULL | {errno.EROFS} or (error.errno in REFUSED and ours):
            raise _unwritable(Path(str(error.filename or folder)), error) from error
        raise


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints as :func:`replacing` does; in the other ways it is Lightning's."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, without holding a second copy of it in memory.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        if storage_options is not None or "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        with replacing(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # When a write fails, torch goes on to finish its archive and complains of that.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def use_checkpoint_files(trainer: Trainer) -> None:
    """Have a trainer write its checkpoints by :class:`CheckpointFiles`, whatever its strategy.

    A plugin that hands them on, such as AsyncCheckpointIO, hands them on to it; one that writes in its own way stays.
    """
    plugin = trainer.strategy._checkpoint_io  # the property behind it would fill a plugin that hands them on
    if isinstance(plugin, _WrappingCheckpointIO):
        plugin.checkpoint_io = CheckpointFiles()
    elif plugin is None or type(plugin) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFiles()


def _begin(path: Path) -> BinaryIO:
    """Open a file beside `path` under a name that nobody has, and lock it."""
    while True:
        file = open(f"{path}.{secrets.token_hex(8)}.unfinished", "xb")
        if fcntl is not None:
            with suppress(OSError):  # there are disks without locks: nothing is cleared away there
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # not cleared away by another run before it was locked
            return file
        file.close()


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> InputError:
    kept = ", and the one before is kept" if path.is_file() else ""
    what = f"Files in {path}" if path.is_dir() else f"The file {path}"
    mend = "make room on that disk" if error.errno in FULL else "see that files can be made there"
    return InputError(f"{what} cannot be written ({error.strerror}){kept}: {mend}, or write elsewhere.")
