"""The caches in a directory: found, shown in a table, and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioner.cache_folder import FILES, NAME, CacheFault, CacheFolder, in_gigabytes, say
from captioner.errors import InputError, in_one_line


class Found(NamedTuple):
    """A cache in a directory.

    Attributes
    ----------
    folder : CacheFolder
        Where it is.
    obstacle : str
        Why it is not deleted, as in "holds other files, too"; empty where nothing is in the way.
    readable : bool
        Whether its contents can be told.
    """

    folder: CacheFolder
    obstacle: str = ""
    readable: bool = True


def find_caches(directory: Path) -> list[Found]:
    """Return the folders of a directory that are caches, in the order of their names.

    A cache is called by 16 hexadecimal digits and holds files of ours. One that holds others, too, is used by training
    all the same, and so is told of.

    Raises
    ------
    InputError
        If there is no such directory, or it cannot be read.
    """
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"There is no folder {directory}: give the one that data.cache names.") from None
    except OSError as error:
        raise InputError(f"The folder {directory} cannot be read ({error.strerror}): see to its permissions.") from None
    return [found for path in paths if NAME.fullmatch(path.name) and (found := _find(path))]


def _find(path: Path) -> Found | None:
    """Return the cache that a path is, if it is one."""
    try:
        if not path.is_dir() or path.is_symlink():
            return None
        ours = [bool(FILES.fullmatch(file.name)) for file in path.iterdir()]
    except OSError as error:
        return Found(CacheFolder(path), _unreadable(error), readable=False)
    if not any(ours):
        return None
    return Found(CacheFolder(path), "" if all(ours) else "holds other files, too")


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def show(caches: Sequence[Found], console: Console) -> None:
    """Print what each cache holds, what it takes of the disk, and whether it is complete."""
    table = Table()
    for header in ("fingerprint", "dataset", "split", "encoder"):
        table.add_column(header, overflow="fold", no_wrap=header == "fingerprint")
    for header in ("images", "regions x size", "view", "GB", "made", "state"):
        table.add_column(header, justify="right" if header in ("images", "regions x size", "GB") else "left")
    for cache in caches:
        table.add_row(cache.folder.path.name, *(escape(in_one_line(cell)) for cell in _cells(cache)))
    console.print(table)


def _cells(cache: Found) -> tuple[str, ...]:
    if not cache.readable:
        return *[""] * 8, cache.obstacle
    try:
        *known, state = _contents(cache.folder)
    except OSError as error:  # its files may be listed but not looked at
        return *[""] * 8, _unreadable(error)
    return *known, f"{state}, {cache.obstacle}" if cache.obstacle else state


def _contents(cache: CacheFolder) -> tuple[str, ...]:
    size = in_gigabytes(cache.disk_bytes).removesuffix(" GB")
    try:
        index = cache.read()
    except CacheFault as fault:
        return *[""] * 6, size, "", "being filled" if cache.is_being_filled else fault.what
    if index is None:
        return *[""] * 6, size, "", "being filled" if cache.is_being_filled else "empty"
    state = "complete"
    if not index.complete:
        state = f"{'being filled' if cache.is_being_filled else 'interrupted'} at {index.done:,}"
    shape = f"{index.regions:,} x {index.size:,}"
    source = (index.dataset, index.split, index.encoder)
    return *source, f"{index.images:,}", shape, index.view, size, index.made, state


def clear(directory: Path, names: Sequence[str] | None) -> None:
    """Delete caches, say which, and how much that freed.

    Parameters
    ----------
    directory : Path
        Where they are.
    names : sequence of str, optional
        The fingerprints as :func:`show` prints them; by default all.

    Raises
    ------
    InputError
        Where one is not there, is no cache, or is being filled by a running process, or where one that is named cannot
        be read or holds files that are not ours; then nothing is deleted. Of all, such are left alone.
    """
    caches = {cache.folder.path.name: cache for cache in find_caches(directory)}
    chosen = list(caches) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in caches:
            raise InputError(f"There is no cache {name} in {directory}: `captioner cache list {directory}` shows them.")
        if names is not None and caches[name].obstacle:
            raise InputError(
                f"The cache {caches[name].folder.path} {caches[name].obstacle}: see to that, or delete it by hand."
            )
        if caches[name].folder.is_being_filled:
            raise InputError(
                f"The cache {caches[name].folder.path} is being filled by a running process: end that, or wait."
            )
    freed = 0
    for cache in (caches[name] for name in chosen):
        if cache.obstacle:
            say(f"Left {cache.folder.path}, which {cache.obstacle}")
            continue
        freed += (size := cache.folder.delete())
        say(f"Deleted {cache.folder.path}, {in_gigabytes(size)}")
    say(f"Freed {in_gigabytes(freed)} in {directory}")
