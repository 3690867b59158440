"""Annotations on disk: with a frozen encoder, the CNN sees each image once."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from captioner.attention import Annotations
from captioner.cache_folder import CacheFault, CacheFolder, Index, in_gigabytes, say
from captioner.errors import InputError

RECORD_SECONDS = 2.0  # what a killed run loses at most, besides a batch; waiting for the disk after each one costs time
SAY_SECONDS = 300.0  # between the lines in a log file


class AnnotationCache:
    """The annotations of a list of images, as float16, memory-mapped.

    Parameters
    ----------
    folder : Path
        Where :meth:`open` put them.

    Attributes
    ----------
    missing : tuple of int
        The rows without annotations, in order, since their images could not be read.

    Raises
    ------
    InputError
        Where the folder holds no complete cache.
    """

    def __init__(self, folder: Path) -> None:
        directory = CacheFolder(folder)
        index = directory.read()
        if index is None or not index.complete:
            raise InputError(f"The cache {folder} is not complete: it has to be built first.")
        self.folder = folder
        self.fingerprint = index.fingerprint
        self._grid = index.grid
        self.missing = index.missing
        self._values = directory.values()
        self._counts = torch.tensor(directory.counts(index)).long() if index.ragged else None
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._values)

    def __reduce__(self) -> tuple[type[AnnotationCache], tuple[Path]]:
        """Go to another process as a path, not as a copy of the values."""
        return AnnotationCache, (self.folder,)

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self._values.nbytes

    @property
    def device(self) -> torch.device:
        """Where :meth:`rows` gives its tensors."""
        return torch.device("cpu") if self._kept is None else self._kept.device

    def to(self, device: torch.device) -> AnnotationCache:
        """Return a cache that keeps the values, float16, in the memory of a device and gives its rows there."""
        cache = AnnotationCache(self.folder)
        cache._kept = torch.empty(self._values.shape, dtype=torch.float16, device=device)
        for first in range(0, len(self), 1024):  # not a second copy of all in the memory of the host
            part = slice(first, first + 1024)
            cache._kept[part] = torch.from_numpy(np.array(self._values[part]))
            self._check(cache._kept[part].sum(dtype=torch.float32))
        return cache

    def rows(self, indices: Sequence[int]) -> Annotations:
        """Return the annotations of some of the images, float32.

        Raises
        ------
        InputError
            Where the file is damaged, so far as its values tell.
        """
        if self._kept is not None:
            places = torch.tensor(indices, dtype=torch.long, device=self.device)
            return self._masked(self._kept[places].float(), indices)
        values = torch.from_numpy(self._values[list(indices)].astype(np.float32))
        self._check(values.sum())
        return self._masked(values, indices)

    def _masked(self, values: Tensor, indices: Sequence[int]) -> Annotations:
        """Return the values with what tells which regions exist, and no more regions than one of the images has."""
        if self._counts is None:
            return Annotations(values, grid=self._grid)
        counts = self._counts[list(indices)]
        most = int(counts.max()) if len(counts) else 0
        return Annotations(values[:, :most], (torch.arange(most) < counts[:, None]).to(values.device))

    def _check(self, total: Tensor) -> None:
        """See that values are finite by their float32 sum, which takes no memory and which float16 never exceeds."""
        if not math.isfinite(total.item()):  # none such is ever written
            raise InputError(
                f"The cache {self.folder} is damaged, since it holds values that are not finite: delete it with "
                f"`captioner cache clear {self.folder.parent} {self.folder.name}`, and the next run builds it anew."
            )

    @classmethod
    def open(
        cls,
        directory: Path,
        wanted: Index,
        compute: Callable[[int], Iterable[Annotations]],
        *,
        say_waiting: bool = True,
        missing: Callable[[], Iterable[int]] = tuple,
    ) -> AnnotationCache:
        """Open a cache, and fill it first where it is not there or not complete.

        One process fills it, and others wait. What a killed process recorded is gone on from.

        Parameters
        ----------
        directory : Path
            Each fingerprint has a folder of its own in it.
        wanted : Index
            What is to be in it; nothing is done yet.
        compute : callable
            Gives the annotations batch by batch, in the order of the images, from the image of the given number on. Of
            a ragged cache all are filled up to the same number of regions, and those that exist come first.
        say_waiting : bool
            Print a line before waiting for another process.
        missing : callable
            Gives the images that could not be read so far, whose rows are marked as missing.

        Raises
        ------
        InputError
            Where they cannot be kept: no room on the disk, regions that differ in number from image to image, values
            beyond float16.
        """
        folder = CacheFolder(directory / wanted.fingerprint[:16])
        if not _is_complete(folder, wanted):
            with folder.locked(say_waiting=say_waiting):
                if not _is_complete(folder, wanted):  # or another process has filled it meanwhile
                    _fill(folder, wanted, compute, missing)
        return cls(folder.path)


def _is_complete(folder: CacheFolder, wanted: Index) -> bool:
    try:
        index = folder.read_for(wanted)
    except CacheFault:
        return False
    return index is not None and index.complete


def _fill(
    folder: CacheFolder,
    wanted: Index,
    compute: Callable[[int], Iterable[Annotations]],
    missing: Callable[[], Iterable[int]],
) -> None:
    index = _begun(folder, wanted)
    batches = iter(compute(index.done))
    if index.regions:
        _announce(folder, index)
    elif (first := next(batches, None)) is not None:  # it shows how much there will be
        index = _begin(folder, wanted, first)
        batches = chain([first], batches)
    with _progress(index) as show:
        index = _write(folder, index, batches, show, missing)
    if not index.complete:
        raise RuntimeError(f"The encoder gave the annotations of {index.done} images, not of {index.images}.")


def _begun(folder: CacheFolder, wanted: Index) -> Index:
    """Return the index of what a killed process left, or else what is wanted, of which the regions are not known."""
    try:
        index = folder.read_for(wanted)
    except CacheFault as fault:
        say(str(fault))
        index = None
    if index is not None:
        return index
    with _writing(folder, wanted):
        folder.empty()
    return wanted


def _begin(folder: CacheFolder, wanted: Index, first: Annotations) -> Index:
    """Make room for annotations like those of the first batch, and return their index."""
    values = _half(first, wanted)
    try:
        index = replace(wanted, regions=values.shape[1], size=values.shape[2], grid=first.grid)
    except (TypeError, ValueError):
        raise InputError(
            f"The encoder gives {values.shape[1]} regions and the grid {first.grid}: it has to give (rows, columns) "
            "whose product is the number of regions, or None."
        ) from None
    _announce(folder, index)
    with _writing(folder, index):
        folder.allocate(index)
    return index


def _write(
    folder: CacheFolder,
    index: Index,
    batches: Iterable[Annotations],
    show: Callable[[int], None],
    missing: Callable[[], Iterable[int]],
) -> Index:
    """Write batch after batch, and return the index with them."""
    at, unrecorded = time.monotonic(), False
    try:
        for batch in batches:
            try:
                values = _half(batch, index)
            except InputError:  # the next run would come to the same end
                unrecorded = False
                folder.empty()
                raise
            counts = batch.existing().sum(1).cpu().numpy().astype(np.int32) if index.ragged else None
            with _writing(folder, index):
                index, unrecorded = folder.write(index, values, counts), True
                lacking = {*index.missing, *(row for row in missing() if row < index.done)}  # of more is read ahead
                index = replace(index, missing=tuple(sorted(lacking)))
                if index.complete or time.monotonic() - at >= RECORD_SECONDS:
                    unrecorded = False  # even if it fails: asked again, the disk may forget that it lost something
                    folder.record(index)
                    at = time.monotonic()
            show(index.done)
    finally:
        if unrecorded:  # Ctrl-C, or an image that cannot be read: the batches until then are whole
            with suppress(OSError):
                folder.record(index)
    return index


def _half(batch: Annotations, index: Index) -> NDArray[np.float16]:
    """Return the values of a batch, (B, N, D) float16, if a cache can hold them."""
    with np.errstate(over="ignore"):  # said below, and in words
        half = batch.values.detach().float().cpu().numpy().astype(np.float16)
    if (batch.mask is not None and not index.ragged) or (
        index.regions and half.shape[1:] != (index.regions, index.size)
    ):
        raise InputError(
            "These annotations differ in the number of regions from image to image, which a cache cannot hold: "
            "set data.cache to null."
        )
    if not np.isfinite(half).all():
        raise InputError(
            "The encoder gives values that are not finite, or too large for the 16 bits of a cache: check its "
            "weights and preprocessing, or set data.cache to null."
        )
    return half


def _announce(folder: CacheFolder, index: Index) -> None:
    """Say what is about to be written, and see that the disk has room for it."""
    size = index.images * index.row_bytes
    begun = f", from image {index.done + 1:,} on" if index.done else ""
    say(
        f"Annotating {index.subject} once{begun}: {'at most ' * index.ragged}{index.regions:,} regions x "
        f"{index.size:,} values, {in_gigabytes(size)} in {folder.path}"
    )
    free = shutil.disk_usage(folder.path).free
    if size - index.done * index.row_bytes > free:
        raise InputError(
            f"The disk of {folder.path} has {in_gigabytes(free)} free, which is not enough for these annotations: make "
            "room, give another data.cache, or set it to null."
        )


@contextmanager
def _writing(folder: CacheFolder, index: Index) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "see to its permissions and the disk, or delete that folder"
        raise InputError(
            f"The cache {folder.path} cannot be written ({error.strerror}) after {index.done:,} of {index.images:,} "
            f"images: {advice}, and the same command goes on."
        ) from error


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s", style="progress.data.speed")


@contextmanager
def _progress(index: Index) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line now and then in a pipe or a log file; it is told how many are done."""
    console = Console()
    if not console.is_terminal:
        yield _Lines(index)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Annotating", total=index.images, completed=index.done)
        yield lambda done: progress.update(bar, completed=done)


class _Lines:
    def __init__(self, index: Index) -> None:
        self._images, self._said, self._at = index.images, index.done, time.monotonic()

    def __call__(self, done: int) -> None:
        seconds = time.monotonic() - self._at
        if seconds < SAY_SECONDS or done == self._images:  # the end is told by what comes next
            return
        rate = (done - self._said) / seconds  # since the last line, so that one that falls is seen
        say(f"Annotating: {done:,} of {self._images:,} images, {rate:,.0f} images/s")
        self._said, self._at = done, self._at + seconds


def fingerprint(settings: object, tensors: Iterable[tuple[str, Tensor]], files: Iterable[Path]) -> str:
    """Return a hash of all that decides annotations.

    Parameters
    ----------
    settings : object
        Plain JSON: the encoder and its preprocessing.
    tensors : iterable of (str, Tensor)
        The encoder's weights.
    files : iterable of Path
        The images, told apart by name, size and time of the last change.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
