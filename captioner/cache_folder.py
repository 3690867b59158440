"""A cache's folder on disk: its values, what says how far they are made, and who may write them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.console import Console

from captioner.errors import InputError, without_control
from captioner.text_files import read_data

FORMAT = 2  # 1 is that of the first release, which wrote no number
NAME = re.compile("[0-9a-f]{16}")
MOST_INDEX = 100_000_000  # bytes; what is long in one is the list of missing images
# The last are what killed runs of the first release left behind.
FILES = re.compile(r"lock|(values|counts)\.npy|(index|progress)\.json|progress\.tmp|(values|index)\.\d+\.tmp")


class CacheFault(InputError):
    """A cache is not what its index says, or not what is asked for.

    Parameters
    ----------
    path : Path
        The cache.
    what : str
        What is wrong, as in "has a damaged index".
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"The cache {path} {what}: it has to be built anew.")
        self.what = what


@dataclass(frozen=True)
class Index:
    """What a folder holds: the annotations of a list of images, or of the first of them.

    Attributes
    ----------
    fingerprint : str
        Of all that decides the annotations.
    images : int
        Number of images.
    dataset, split, encoder, view : str
        Where the annotations come from, for people to read; the view is "upright" or "mirrored".
    done : int
        Number of images whose annotations are in the file; the cache is complete when it equals `images`.
    regions, size : int
        N and D: an image's annotations are (N, D).
    grid : tuple of int or None
        (h, w) with h * w == N where the regions are a grid, row by row.
    made : str
        When, as YYYY-MM-DD HH:MM.
    ragged : bool
        Whether images differ in their number of regions, of which N is then the largest.
    missing : tuple of int
        The rows of images that could not be read, in order: what stands in them is nothing.
    """

    fingerprint: str
    images: int
    dataset: str
    split: str
    encoder: str
    view: str = "upright"
    done: int = 0
    regions: int = 0
    size: int = 0
    grid: tuple[int, int] | None = None
    made: str = ""
    ragged: bool = False
    missing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.images, self.done, self.regions, self.size)
        texts = (self.fingerprint, self.dataset, self.split, self.encoder, self.view, self.made)
        if not all(type(number) is int and number >= 0 for number in numbers) or self.done > self.images:
            raise ValueError("These numbers are no index's.")
        if self.done and not self.regions:
            raise ValueError("Whose annotations are there, their regions are known.")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("These texts are no index's.")
        if type(self.ragged) is not bool:
            raise ValueError("This is no index's.")
        missing = tuple(self.missing)  # JSON hands over a list
        if not all(type(row) is int and 0 <= row < self.done for row in missing):
            raise ValueError("These rows are no index's.")
        object.__setattr__(self, "missing", missing)
        if self.grid is not None:
            height, width = self.grid  # JSON hands over a list
            if not all(type(side) is int and side > 0 for side in (height, width)):
                raise ValueError("These sides are no grid's.")
            if self.regions and height * width != self.regions:
                raise ValueError("These regions are no such grid.")
            object.__setattr__(self, "grid", (height, width))

    @property
    def complete(self) -> bool:
        """Whether the annotations of all images are there."""
        return self.done == self.images

    @property
    def subject(self) -> str:
        """What was annotated, as in "6,000 mirrored train images"."""
        return f"{self.images:,} {'mirrored ' if self.view == 'mirrored' else ''}{self.split} images"

    @property
    def row_bytes(self) -> int:
        """Size of an image's annotations on disk."""
        return 2 * self.regions * self.size


class CacheFolder:
    """A folder with the annotations of one fingerprint.

    ``values.npy`` has its full length from the beginning. Which of its rows hold annotations stands in
    ``progress.json`` while it is being filled, and in ``index.json`` in the end; both are replaced as a whole, after
    the values that they speak of are on the disk. ``lock`` is locked by the process that writes. Where images differ in
    their number of regions, it stands in ``counts.npy``, and zeros fill up the values.

    Parameters
    ----------
    path : Path
        The folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values_file = path / "values.npy"
        self.counts_file = path / "counts.npy"

    def read(self) -> Index | None:
        """Return what is there, complete or not; None where nothing is.

        Raises
        ------
        CacheFault
            Where an index or the values are damaged, or of another format.
        """
        for name in ("index.json", "progress.json"):
            try:
                text = read_data(self.path / name, MOST_INDEX)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._fault(f"cannot be read ({error.strerror})") from error
            index = self._parse(text)
            values = self.values()
            if values.dtype != np.float16 or values.shape != (index.images, index.regions, index.size):
                raise self._fault("holds other values than its index says")
            if index.ragged:
                self.counts(index)
            return index
        if self.values_file.exists():
            raise self._fault("has values without an index")
        return None

    def read_for(self, wanted: Index) -> Index | None:
        """Return what is there like :meth:`read`, and see that it is what is wanted."""
        index = self.read()
        if index is not None and (index.fingerprint, index.images) != (wanted.fingerprint, wanted.images):
            raise self._fault("is of another encoder or of other images")
        return index

    def _parse(self, text: bytes) -> Index:
        try:
            fields = json.loads(text)
            if (number := fields.pop("format", 1)) == FORMAT:
                return Index(**fields)
            if type(number) is not int:
                raise TypeError("A format is a number.")
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise self._fault("has a damaged index") from None
        raise self._fault(f"is of the format {number}, not {FORMAT}")

    def values(self) -> np.memmap[tuple[int, ...], np.dtype[np.float16]]:
        """Return the values, (images, N, D) float16, memory-mapped.

        Raises
        ------
        CacheFault
            Where the file is missing, truncated or otherwise damaged.
        """
        try:
            values = np.load(self.values_file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # given damaged bytes, NumPy raises whatever it trips over
            raise self._fault("has damaged values or none") from error
        if not isinstance(values, np.memmap) or values.offset + values.nbytes != self.values_file.stat().st_size:
            raise self._fault("has damaged values or none")
        return values

    def counts(self, index: Index) -> NDArray[np.int32]:
        """Return the number of regions of each image, (images,) int32, memory-mapped.

        Raises
        ------
        CacheFault
            Where the file is missing, truncated or otherwise damaged.
        """
        try:
            counts: NDArray[np.int32] = np.load(self.counts_file, mmap_mode="r", allow_pickle=False)
        except Exception as error:
            raise self._fault("has damaged counts or none") from error
        if not isinstance(counts, np.memmap) or counts.dtype != np.int32 or counts.shape != (index.images,):
            raise self._fault("has damaged counts or none")
        done = counts[: index.done]
        if done.size and not 1 <= done.min() <= done.max() <= index.regions:
            raise self._fault("has damaged counts or none")
        return counts

    def _fault(self, what: str) -> CacheFault:
        return CacheFault(self.path, what)

    def allocate(self, index: Index) -> None:
        """Make the file of the values, at its full length, of which nothing is done yet."""
        shape = (index.images, index.regions, index.size)
        np.lib.format.open_memmap(self.values_file, "w+", np.float16, shape)
        if index.ragged:
            np.lib.format.open_memmap(self.counts_file, "w+", np.int32, (index.images,))
        self.record(index)

    def write(self, index: Index, values: NDArray[np.float16], counts: NDArray[np.int32] | None = None) -> Index:
        """Put the values (B, N, D) of the next images after those that are done, and return the index with them.

        Where images differ in their number of regions, `counts` (B,) are these.
        """
        # Not through the memory map: where the disk is full, that ends the process instead of raising.
        with self.values_file.open("r+b") as file:
            file.seek(-(index.images - index.done) * index.row_bytes, os.SEEK_END)
            file.write(values.tobytes())
        if counts is not None:
            with self.counts_file.open("r+b") as file:
                file.seek(-(index.images - index.done) * counts.itemsize, os.SEEK_END)
                file.write(counts.tobytes())
        return replace(index, done=index.done + len(values))

    def record(self, index: Index) -> None:
        """Keep how far the values are, so that it outlasts a killed process and a power failure."""
        for path in (self.values_file, self.counts_file) if index.ragged else (self.values_file,):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        unfinished = self.path / "progress.tmp"
        with unfinished.open("w") as text:
            made = time.strftime("%Y-%m-%d %H:%M")
            json.dump({"format": FORMAT, **asdict(replace(index, made=made))}, text, indent=2)
            text.flush()
            os.fsync(text.fileno())
        os.replace(unfinished, self.path / ("index.json" if index.complete else "progress.json"))
        if index.complete:
            (self.path / "progress.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, say_waiting: bool) -> Iterator[None]:
        """Make the folder and hold its lock, which the system takes from a process that is killed.

        Parameters
        ----------
        say_waiting : bool
            Print a line where another process has it.

        Raises
        ------
        InputError
            Where the folder cannot be made or written.
        """
        lock = FileLock(self.path / "lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if say_waiting:
                    say(f"Waiting for another process, which is filling the cache {self.path}.")
                lock.acquire()
        except OSError as error:
            raise InputError(
                f"The cache folder {self.path} cannot be made or written ({error.strerror}): give another data.cache."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def is_being_filled(self) -> bool:
        """Whether a process holds the lock."""
        try:
            if not (self.path / "lock").exists():
                return False
            with FileLock(self.path / "lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a lock that is not ours to take, or to see
            return False

    @property
    def disk_bytes(self) -> int:
        """What the files take of the disk: a file of which little is written takes little."""
        total = 0
        for file in self.path.iterdir():
            with suppress(FileNotFoundError):  # whoever fills the cache renames files
                status = file.stat()
                total += 512 * getattr(status, "st_blocks", (status.st_size + 511) // 512)
        return total

    def empty(self) -> None:
        """Delete what is there, but for the lock; to be called by who holds it."""
        # The indices first, so that no one takes what is left for whole. Whoever has the values open keeps them.
        for file in sorted(self.path.iterdir(), key=lambda file: file.name == self.values_file.name):
            if FILES.fullmatch(file.name) and file.name != "lock":
                file.unlink()

    def delete(self) -> int:
        """Delete the folder and return the bytes that this frees.

        Raises
        ------
        InputError
            Where a process is filling it, or something cannot be deleted.
        """
        try:
            with FileLock(self.path / "lock", timeout=0):
                freed = self.disk_bytes
                self.empty()
                (self.path / "lock").unlink()
            self.path.rmdir()
        except Timeout:
            raise InputError(
                f"The cache {self.path} is being filled by a running process: end that first, or wait."
            ) from None
        except OSError as error:
            raise InputError(
                f"The cache {self.path} cannot be deleted ({error.strerror}): see to its permissions, or delete it by "
                "hand."
            ) from error
        return freed


def in_gigabytes(size: int) -> str:
    """Return a number of bytes for people to read, in units of 10 ** 9."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 or not size else "less than 0.01 GB"


def say(line: str) -> None:
    """Print a line that is not broken."""
    Console().print(without_control(line), highlight=False, markup=False, soft_wrap=True)
