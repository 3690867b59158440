"""Regions that were made elsewhere, as by a detector: a file of NumPy's for each image, with as many as it has.

Shapes: B images, N regions, which differ from image to image, D annotation size.
"""

from __future__ import annotations

import errno
import math
import zipfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from captioner.attention import Annotations
from captioner.caption_formats import CaptionedImage
from captioner.errors import InputError

SUFFIXES = (".npy", ".npz")
MOST = 2**26  # bytes of an image's regions: 8,192 of 2,048 values; a file of a thousandth of it may unpack to more
ZIP = b"PK\x03\x04"  # how a .npz begins
NAMES = ("features", "x", "feat", "regions")  # of the array in a .npz that holds several, in this order


def find_regions(folder: Path, records: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """Return the records with the files of their regions in place of their images.

    A file is called as the image, with .npy or .npz for the image's suffix or after it, or else by the image's id. It
    lies in the folder itself, or in the folders inside it that the id names.

    Raises
    ------
    InputError
        If there is no such folder, or an image has no file in it.
    """
    if not folder.is_dir():
        raise InputError(f"The folder {folder} of data.regions does not exist: give the one that holds the regions.")
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.np[yz]")):
        files.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    found = [next((files[name] for name in _names(record) if name in files), None) for record in records]
    if missing := [record for record, file in zip(records, found, strict=True) if file is None]:
        raise InputError(
            f"{len(missing)} of {len(records)} images have no regions in {folder}, the first is {missing[0].image_id}: "
            f"put {missing[0].path.stem}.npy or {missing[0].path.stem}.npz there."
        )
    return [record._replace(path=file) for record, file in zip(records, found, strict=True) if file is not None]


def _names(record: CaptionedImage) -> tuple[str, ...]:
    own = str(record.image_id)
    return str(Path(own).with_suffix("").as_posix()) if own else own, own, record.path.stem, record.path.name


def read_regions(path: Path, dim: int) -> NDArray[np.float32]:
    """Read the regions of an image.

    Parameters
    ----------
    path
        A .npy file, or a .npz file with one array, or with one that is called as in `NAMES`. Pickled objects are
        refused.
    dim
        D.

    Returns
    -------
    array
        (N, D).

    Raises
    ------
    InputError
        If the file is missing or damaged, or holds anything but N >= 1 vectors of D finite floating-point numbers.
    """
    with _opened(path) as (file, shape, dtype):
        _check_form(shape, dtype, dim, str(path))
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
    return check_regions(array, dim, str(path))


def check_regions(array: NDArray[Any], dim: int, name: str) -> NDArray[np.float32]:
    """Return regions (N, D) as float32, if they are such.

    Raises
    ------
    InputError
        If not; the sentence begins with the name.
    """
    _check_form(array.shape, array.dtype, dim, name)
    with np.errstate(over="ignore"):
        regions = array.astype(np.float32)
    if not np.isfinite(regions).all():
        region = int(np.argmin(np.isfinite(regions).all(1)))
        raise InputError(f"{name} holds values that are not finite, in region {region} first: compute it again.")
    return regions


def _check_form(shape: tuple[int, ...], dtype: np.dtype[Any], dim: int, name: str) -> None:
    if len(shape) != 2 or shape[1] != dim or not shape[0]:
        form = " x ".join(map(str, shape)) or "a single value"
        raise InputError(f"{name} holds {form} and not N x {dim} values: give a row of {dim} values for each region.")
    if dtype.kind != "f":
        raise InputError(f"{name} holds values of the type {dtype}: give floating-point numbers.")


def count_regions(path: Path, dim: int) -> int:
    """Return how many regions a file holds, N; only its header is read.

    Raises
    ------
    InputError
        If the file is missing or damaged, or holds anything but N >= 1 vectors of `dim` floating-point numbers.
    """
    with _opened(path) as (_, shape, dtype):
        _check_form(shape, dtype, dim, str(path))
        return shape[0]


def check_dim(paths: Sequence[Path], dim: int) -> None:
    """See that the first of some files that can be read holds vectors of `dim` values.

    Where it does not, hardly any of them will: that is a wrong setting, and no damaged file.

    Raises
    ------
    InputError
        If it does not.
    """
    for path in paths:
        try:
            with _opened(path) as (_, shape, dtype):
                pass
        except InputError:
            continue
        if shape != (0, dim):  # an image in which a detector found nothing
            _check_form(shape, dtype, dim, str(path))
        return


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, tuple[int, ...], np.dtype[Any]]]:
    """Open a file's array, of which only the header is read: the file at its beginning, its shape and its type.

    Raises
    ------
    InputError
        If the file is missing, damaged, or of an array that nobody needs so large.
    """
    try:
        with ExitStack() as stack:
            if not path.is_file():  # nothing comes back from opening a pipe
                raise OSError(errno.ENOENT, "there is no such file")
            file: Any = stack.enter_context(open(path, "rb"))
            if file.read(len(ZIP)) == ZIP:
                archive = stack.enter_context(zipfile.ZipFile(file))
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                file = stack.enter_context(archive.open(f"{_chosen(path, names)}.npy"))
            else:
                file.seek(0)
            shape, dtype = _header(file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects, which could run code")
            if any(side < 0 for side in shape):
                raise ValueError("it has a negative size")
            if math.prod(shape) * dtype.itemsize > MOST:
                size = " x ".join(map(str, shape))
                raise InputError(f"{path} holds {size} values, more than {MOST // 10**6} MB: give fewer regions.")
            yield file, shape, dtype
    except InputError:
        raise
    except Exception as error:  # given damaged bytes, NumPy and zlib raise whatever they trip over
        raise _unreadable(path, error) from None


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _chosen(path: Path, names: Sequence[str]) -> str:
    chosen = names[0] if len(names) == 1 else next((name for name in NAMES if name in names), None)
    if chosen is None:
        more = ", ..." if len(names) > 5 else ""
        there_are = f"{len(names)} arrays ({', '.join(names[:5])}{more})" if names else "no array"
        raise InputError(f"{path} holds {there_are}: save one, or call the regions {NAMES[0]!r}.")
    return chosen


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path} cannot be read ({error.strerror}): give the file of an image's regions.")
    advice = "write it with numpy.save, as an array of numbers"
    return InputError(f"{path} is no .npy or .npz file that can be read ({' '.join(str(error).split())}): {advice}.")


def pad_regions(images: Sequence[NDArray[np.float32]], regions: int | None = None) -> Annotations:
    """Put the regions of B images, (N, D) each, into one batch.

    Parameters
    ----------
    images
        Their regions.
    regions
        To how many each is filled up; by default as many as one of them has.

    Returns
    -------
    Annotations
        Those that exist come first, and zeros fill up.
    """
    length = max(map(len, images)) if regions is None else regions
    values = torch.zeros(len(images), length, images[0].shape[1])
    for row, image in zip(values, images, strict=True):
        row[: len(image)] = torch.from_numpy(image)
    counts = torch.tensor([len(image) for image in images])
    return Annotations(values, torch.arange(length) < counts[:, None])


def read_region_files(
    paths: Sequence[Path], dim: int, batch_size: int
) -> Generator[list[tuple[int, Path, tuple[NDArray[np.float32]] | InputError]], None, None]:
    """Read files of regions in batches, as `captioner.image_stream.read_images` reads images.

    Parameters
    ----------
    paths
        The files; of an image, the .npy or .npz file beside it is read.
    dim
        D.
    batch_size
        Files in a batch.

    Yields
    ------
    list of (int, Path, tuple of one array or InputError)
        In the order of the paths: a file's place among them, its path, and its regions (N, D), or why there are none.
    """
    for first in range(0, len(paths), batch_size):
        batch: list[tuple[int, Path, tuple[NDArray[np.float32]] | InputError]] = []
        for index, path in enumerate(paths[first : first + batch_size], first):
            try:
                batch.append((index, path, (read_regions(beside(path), dim),)))
            except InputError as error:
                batch.append((index, path, error))
        yield batch


def beside(path: Path) -> Path:
    """Return the file with an image's regions, which may be the path itself.

    Raises
    ------
    InputError
        If there is none beside the image.
    """
    if path.suffix in SUFFIXES:
        return path
    file = next((file for suffix in SUFFIXES if (file := path.with_suffix(suffix)).is_file()), None)
    if file is None:
        raise InputError(
            f"{path} has no regions beside it, which this model sees in place of images: put {path.stem}.npy or "
            f"{path.stem}.npz there, or give such files."
        )
    return file
