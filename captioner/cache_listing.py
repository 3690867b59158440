"""The caches in a directory: found, shown in a table, and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioner.cache_folder import FILES, NAME, CacheFault, CacheFolder, in_gigabytes, say
from captioner.errors import InputError


def find_caches(directory: Path) -> list[CacheFolder]:
    """Return the folders of a directory that are caches, in the order of their names.

    A cache is called by 16 hexadecimal digits and holds files of ours only.

    Raises
    ------
    InputError
        If there is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"There is no folder {directory}: give the one that data.cache names.")
    return [
        CacheFolder(path)
        for path in sorted(directory.iterdir())
        if NAME.fullmatch(path.name)
        and path.is_dir()
        and not path.is_symlink()
        and (names := [file.name for file in path.iterdir()])
        and all(FILES.fullmatch(name) for name in names)
    ]


def show(caches: Sequence[CacheFolder], console: Console) -> None:
    """Print what each cache holds, what it takes of the disk, and whether it is complete."""
    table = Table()
    for header in ("fingerprint", "dataset", "split", "encoder"):
        table.add_column(header, overflow="fold", no_wrap=header == "fingerprint")
    for header in ("images", "regions x size", "view", "GB", "made", "state"):
        table.add_column(header, justify="right" if header in ("images", "regions x size", "GB") else "left")
    for cache in caches:
        table.add_row(cache.path.name, *map(escape, _cells(cache)))
    console.print(table)


def _cells(cache: CacheFolder) -> tuple[str, ...]:
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
        Where one is not there, is no cache, or is being filled by a running process; then nothing is deleted.
    """
    caches = {cache.path.name: cache for cache in find_caches(directory)}
    chosen = list(caches) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in caches:
            raise InputError(f"There is no cache {name} in {directory}: `captioner cache list {directory}` shows them.")
        if caches[name].is_being_filled:
            raise InputError(f"The cache {caches[name].path} is being filled by a running process: end that, or wait.")
    freed = 0
    for name in chosen:
        freed += (size := caches[name].delete())
        say(f"Deleted {caches[name].path}, {in_gigabytes(size)}")
    say(f"Freed {in_gigabytes(freed)} in {directory}")
