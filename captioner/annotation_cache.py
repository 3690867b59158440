"""Annotations on disk: with a frozen encoder, the CNN sees each image once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioner.attention import Annotations
from captioner.errors import InputError


class AnnotationCache:
    """The annotations of a list of images, as float16, memory-mapped.

    Parameters
    ----------
    folder : Path
        Where :meth:`open` put them.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.folder = folder
        self.fingerprint: str = index["fingerprint"]
        self._grid = None if index["grid"] is None else (index["grid"][0], index["grid"][1])
        self._values = np.load(folder / "values.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._values)

    def __reduce__(self) -> tuple[type[AnnotationCache], tuple[Path]]:
        """Go to another process as a path, not as a copy of the values."""
        return AnnotationCache, (self.folder,)

    def rows(self, indices: Sequence[int]) -> Annotations:
        """Return the annotations of some of the images, float32."""
        return Annotations(torch.from_numpy(self._values[list(indices)].astype(np.float32)), grid=self._grid)

    @classmethod
    def open(
        cls, directory: Path, fingerprint: str, images: int, compute: Callable[[], Iterable[Annotations]]
    ) -> AnnotationCache:
        """Open the cache of a fingerprint, and fill it first where it is not there yet.

        Parameters
        ----------
        directory : Path
            Each fingerprint has a folder of its own in it.
        fingerprint : str
            Of all that decides the annotations: encoder, weights, preprocessing and images.
        images : int
            Number of images.
        compute : callable
            Gives the annotations batch by batch, in the order of the images.

        Raises
        ------
        InputError
            Where they cannot be kept: regions that differ in number from image to image, values beyond float16.
        """
        folder = directory / fingerprint[:16]
        if not _holds(folder, fingerprint, images):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"The cache folder {folder} cannot be made ({error.strerror}): give another data.cache."
                ) from error
            # A name of its own for each process: two runs that start at once must not write into one file.
            unfinished = folder / f"values.{os.getpid()}.tmp"
            try:
                grid = _write(unfinished, images, compute())
                os.replace(unfinished, folder / "values.npy")
            finally:
                unfinished.unlink(missing_ok=True)
            # The index comes last: where it stands, the values are whole.
            index = folder / f"index.{os.getpid()}.tmp"
            index.write_text(json.dumps({"fingerprint": fingerprint, "images": images, "grid": grid}))
            os.replace(index, folder / "index.json")
        return cls(folder)


def _holds(folder: Path, fingerprint: str, images: int) -> bool:
    try:
        index = json.loads((folder / "index.json").read_text())
        return index["fingerprint"] == fingerprint and index["images"] == images and (folder / "values.npy").is_file()
    except (OSError, ValueError, KeyError):
        return False


def _write(path: Path, images: int, batches: Iterable[Annotations]) -> tuple[int, int] | None:
    values, grid, first = None, None, 0
    for batch in batches:
        with np.errstate(over="ignore"):  # said below, and in words
            half = batch.values.detach().float().cpu().numpy().astype(np.float16)
        if values is None:
            grid = batch.grid
            values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(images, *half.shape[1:]))
        if batch.mask is not None or half.shape[1:] != values.shape[1:]:
            raise InputError(
                "These annotations differ in the number of regions from image to image, which a cache cannot hold: "
                "set data.cache to null."
            )
        if not np.isfinite(half).all():
            raise InputError(
                "The encoder gives values that are not finite, or too large for the 16 bits of a cache: check its "
                "weights and preprocessing, or set data.cache to null."
            )
        values[first : first + len(half)] = half
        first += len(half)
    if values is None or first != images:
        raise RuntimeError(f"The encoder gave the annotations of {first} images, not of {images}.")
    values.flush()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return grid


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
