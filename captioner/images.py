"""Reading an image safely, making it the square a model sees, and the way back from a region to its pixels."""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import io
import math
import os
import random
import stat
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from captioner.errors import InputError, in_one_line

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.transforms._presets import ImageClassification

# Pillow tries every decoder it has on whatever it is given; the formats of photographs are enough, and the rest is
# attack surface (EPS runs Ghostscript).
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
FORMATS = ", ".join(SUFFIXES)
MEMORY = 330_000_000  # bytes for decoding one image: 82 million pixels of most kinds; with the rest 400 MB at most
LONGEST = 65_535  # pixels of a side, a JPEG's longest; of a longer one, a square's first resampling fills the memory
LARGEST_SQUARE = 8192  # pixels of a side that a model sees: 800 MB as floating-point numbers
WHOLE = 2**21  # pixels: an image that has no more is converted at once
STRIP = 2**18  # pixels of a larger one that are converted at a time
ORIENTATION = 0x0112  # the EXIF tag
# What makes an image upright, by that tag (EXIF 2.32, section 4.6.4); 1 is upright, and so is what is not listed.
TURNS: dict[Any, Image.Transpose] = {  # whatever a file says
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPENING = threading.Lock()


def read_image(path: str | Path) -> Image.Image:
    """Read the first frame of an image file, upright, as 8-bit RGB.

    Parameters
    ----------
    path
        A JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM file of any mode and depth, see `to_rgb`.

    Raises
    ------
    InputError
        If the file is missing, no file (a pipe, a device), of another format, damaged, or too large: more than
        `PIL.Image.MAX_IMAGE_PIXELS` pixels, a side of more than `LONGEST`, or `MEMORY` bytes to decode. A truncated
        file is damaged: half a photograph would get a caption that nobody could explain.
    """
    with open_image(path) as picture:
        picture.load()
        return picture.rgb()


@contextmanager
def open_image(path: str | Path, data: bytes | None = None) -> Iterator[Picture]:
    """Open an image file for a `with` statement, in which whatever cannot be read of it raises an `InputError`.

    Parameters
    ----------
    path
        As for `read_image`. Only the file's header is read yet.
    data
        What is in the file, where it was read already.
    """
    name = in_one_line(path)
    with _named_faults(name):
        status = os.stat(path)
        # Opening a pipe waits until somebody writes to it.
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise InputError(f"{name} cannot be opened (a pipe, socket or device): give the path of an image file.")
        if stat.S_ISREG(status.st_mode) and status.st_size == 0:
            raise _empty(name)
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            yield _open_picture(file, name)


def read_image_data(data: bytes, name: str) -> Image.Image:
    """Do for the bytes of an image file, which has no path here, what `read_image` does.

    Parameters
    ----------
    data
        The whole file.
    name
        What errors call it.

    Raises
    ------
    InputError
        As `read_image`.
    """
    name = in_one_line(name)
    with _named_faults(name):
        if not data:
            raise _empty(name)
        picture = _open_picture(io.BytesIO(data), name)
        picture.load()
        return picture.rgb()


def _open_picture(file: IO[bytes], name: str) -> Picture:
    # Pillow only warns up to twice its limit of pixels; a picture made to fill the memory should not get that far.
    # What is done with warnings is done in all threads: one after the other they open, together decode.
    with _OPENING, warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        picture = Picture(image := Image.open(file, formats=list(SUFFIXES)))
    if max(image.size) > LONGEST:
        raise InputError(f"{name} has a side of {max(image.size)} pixels, more than {LONGEST}: cut it and try again.")
    if picture.memory > MEMORY:
        raise InputError(
            f"{name} takes {picture.memory // 10**6} MB of memory to decode, more than {MEMORY // 10**6}: make it "
            "smaller and try again."
        )
    return picture


@contextmanager
def _named_faults(name: str) -> Iterator[None]:
    """Raise whatever an image trips over as an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that can be read: give a file of the format {FORMATS}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{name} has more than {limit} pixels: make it smaller and try again.") from None
    except Exception as error:  # given damaged bytes, a decoder raises whatever it trips over
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{name} cannot be opened ({error.strerror}): give the path of an image file.") from None
        reason = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or "out of memory" in reason:
            raise InputError(f"{name} takes more memory to decode than there is: make it smaller.") from None
        raise InputError(f"{name} is damaged ({reason}): replace the file or leave it out.") from error


def _empty(name: str) -> InputError:
    return InputError(f"{name} is empty: replace the file or leave it out.")


class Picture:
    """An image that gives its pixels upright and as 8-bit RGB, some rows at a time.

    So that a large one is in memory once, as it was decoded, and not a second time converted and a third time turned.

    Parameters
    ----------
    image
        Of any mode. That of a file is decoded, and turned as its camera was held, when `load` is called.
    """

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._turn: Image.Transpose | None = None
        self._range: tuple[float, float] | None = None

    @property
    def memory(self) -> int:
        """Bytes that decoding the file takes, by its header."""
        return _decoding_memory(self._image)

    def load(self) -> None:
        """Decode the pixels of a file, and see which side is up."""
        self._image.load()
        try:
            self._turn = TURNS.get(self._image.getexif().get(ORIENTATION))
        except Exception:
            pass  # a broken EXIF block is no reason to refuse a good picture

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image, in pixels; known after `load`."""
        width, height = self._image.size
        return (height, width) if self._is_sideways else (width, height)

    @property
    def _is_sideways(self) -> bool:
        return self._turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])

    def rows(self, first: int, last: int) -> Image.Image:
        """Return the rows from `first` to before `last`."""
        width, height = self._image.size
        if self._turn in (TURNS[7], TURNS[8]):
            box = (width - last, 0, width - first, height)
        elif self._is_sideways:
            box = (first, 0, last, height)
        elif self._turn in (TURNS[3], TURNS[4]):
            box = (0, height - last, width, height - first)
        else:
            box = (0, first, width, last)
        part = self._image if box == (0, 0, width, height) else self._image.crop(box)
        if self._image.mode == "F" and self._range is None:
            self._range = self._find_range()
        part = _to_rgb(part, self._range)
        return part if self._turn is None else part.transpose(self._turn)

    def rgb(self) -> Image.Image:
        """Return all of it."""
        (width, height), step = self.size, self._rows_at_once
        if height <= step:
            return self.rows(0, height)
        whole = Image.new("RGB", (width, height))
        for first in range(0, height, step):
            whole.paste(self.rows(first, min(first + step, height)), (0, first))
        return whole

    def square(self, size: int, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
        """Resample a part of it, (left, top, right, bottom) in pixels, to a square: (size, size, 3)."""
        left, top, right, bottom = box
        height, step = self.size[1], self._rows_at_once
        if height <= step:
            return np.asarray(self.rows(0, height).resize((size, size), Image.Resampling.BILINEAR, box))
        # Along the rows and then along the columns, rounding between them, as pillow does, which takes a tall image the
        # other way round: there single values differ by one. Needed are the box and one of the square's pixels more.
        edge = max((bottom - top) / size, 1)
        start, end = max(math.floor(top - edge), 0), min(math.ceil(bottom + edge), height)
        narrow = Image.new("RGB", (size, end - start))
        for first in range(start, end, step):
            strip = self.rows(first, min(first + step, end))
            part = (left, 0, right, strip.height)
            narrow.paste(strip.resize((size, strip.height), Image.Resampling.BILINEAR, part), (0, first - start))
        box = (0, top - start, size, bottom - start)
        return np.asarray(narrow.resize((size, size), Image.Resampling.BILINEAR, box))

    def digest(self) -> str:
        """Return a hash of the pixels, the same for files of whatever format that show the same."""
        (width, height), step = self.size, self._rows_at_once
        found = hashlib.sha256(b"%d %d " % (width, height))
        for first in range(0, height, step):
            found.update(self.rows(first, min(first + step, height)).tobytes())
        return found.hexdigest()

    @property
    def is_blank(self) -> bool:
        """Whether all pixels of the file are the same."""
        try:
            return self._image.getcolors(1) is not None  # ends at the second colour
        except ValueError:  # of a rare mode, whose colours are not counted
            return False

    @property
    def _rows_at_once(self) -> int:
        width, height = self.size
        as_it_is = self._image.mode == "RGB" and not self._image.has_transparency_data and self._turn is None
        return max(height, 1) if as_it_is or width * height <= WHOLE else max(STRIP // width, 1)

    def _find_range(self) -> tuple[float, float]:
        """Return the least and the largest finite value of floating-point grey."""
        width, height = self._image.size
        low, high, step = math.inf, -math.inf, max(STRIP // width, 1)
        for first in range(0, height, step):
            values = np.asarray(self._image.crop((0, first, width, min(first + step, height))))
            values = values[np.isfinite(values)]
            low, high = float(values.min(initial=low)), float(values.max(initial=high))
        return (low, high) if low <= high else (0.0, 1.0)


def _decoding_memory(image: Image.Image) -> int:
    """Return about how many bytes it takes to decode an image: those of pillow 13, measured."""
    pixels, details = image.width * image.height, cast(Any, image)
    each: float = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}.get(image.mode, 4)
    if image.format == "WEBP":
        each = 16  # pillow's copy, libwebp's, and two of the canvas
    elif image.format in ("JPEG", "MPO") and "progressive" in image.info:
        samples = [(across, down) for _, across, down, _ in details.layer]
        most = max(across for across, _ in samples) * max(down for _, down in samples)
        each += 2 * sum(across * down for across, down in samples) / max(most, 1)  # all coefficients, at 16 bits
    elif image.format == "PPM" and details.tile and details.tile[0].codec_name != "raw":
        each += 7  # decoded in Python
    elif image.format == "TIFF":
        tags = details.tag_v2
        if tags.get(ORIENTATION, 1) != 1:
            each *= 2  # pillow turns these by itself
        if details.tile and details.tile[0].codec_name == "libtiff":
            # And one tile or strip, as it is in the file and unpacked (TIFF 6.0, sections 3 and 15).
            across, down = tags.get(322, image.width), tags.get(323, min(tags.get(278, image.height), image.height))
            packed = max(tags.get(325, tags.get(279, (0,))))
            return int(pixels * each + across * down * sum(tags.get(258, (1,))) / 8 + packed)
    return round(pixels * each)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    What is transparent becomes white. Grey values of 16 bits (and whole numbers of 32) are scaled from 0..65535, where
    pillow's own conversion would clip them at 255; floating-point ones, which have no agreed range, from their minimum
    to their maximum.
    """
    return Picture(image).rgb()


def _to_rgb(image: Image.Image, limits: tuple[float, float] | None) -> Image.Image:
    """Convert an image, or a part of one, floating-point values from the limits of the whole."""
    if image.mode.startswith(("I", "F")):
        low, high = limits or (0, 65535)
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low, posinf=high, neginf=low)
        scaled = (values - low) / (high - low or 1) * 255
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def find_images(paths: Iterable[str | Path], suffixes: tuple[str, ...] | None = None) -> list[Path]:
    """List the image files, or others, that are given or lie in given folders.

    Nothing is opened. What stands in the list and turns out to be no image, a broken link, a pipe or a folder that may
    not be looked into, is an error of its own when it is read.

    Parameters
    ----------
    paths
        Each the first of these that it can be: a file, taken as it is; a folder, searched with all folders in it, those
        behind links too, for names with an image's suffix, hidden ones left out; "-", standard input, and "@list.txt",
        a file, both of one path a line (or with a zero byte after each, as `find -print0` writes them), where relative
        ones start from the current directory; a pattern like "photos/*.jpg" or "photos/**/*.png", whose matches are
        folders and names with an image's suffix, hidden ones left out. Folders that hold no image are passed over, as
        among what a shell makes of "holiday/*", if there are images elsewhere.
    suffixes
        Of the files, in lower case; by default images'.

    Returns
    -------
    list of Path
        In the order given, within a folder or a pattern sorted by name; a file that is reached twice stands where it
        came first.

    Raises
    ------
    InputError
        If a path does not exist, a list cannot be read or names nothing that exists, a pattern matches nothing, or all
        of them come to no image.
    """
    suffixes = suffixes or _known()
    found: dict[str, Path] = {}
    real = functools.cache(os.path.realpath)
    empty: list[Path] = []
    for path in (path for given in paths for path in _named(os.fspath(given), suffixes)):
        files = _search(path, suffixes) if os.path.isdir(path) else [path]
        for file in files:
            # The folder's real path is looked up once for all files in it.
            same = os.path.realpath(file) if os.path.islink(file) else os.path.join(real(file.parent), file.name)
            found.setdefault(same, file)
        if not files:
            empty.append(path)
    if empty and not found:
        raise InputError(
            f"The folder {in_one_line(empty[0])} holds no image: it needs files ending in {', '.join(suffixes)}."
        )
    return list(found.values())


def _named(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Resolve a list or a pattern to the files and folders that it names."""
    if os.path.lexists(path):
        return [Path(path)]
    if path == "-":
        return _lines(sys.stdin.buffer.read(), "standard input")
    if path.startswith("@"):
        try:
            data = Path(path[1:]).read_bytes()
        except OSError as error:
            reason = f"The list {in_one_line(path[1:])} cannot be read ({error.strerror})"
            raise InputError(f"{reason}: give @ and a text file with one path a line.") from None
        return _lines(data, in_one_line(path[1:]))
    if glob.has_magic(path):
        if not (matches := _matches(path, suffixes)):
            raise InputError(f"Nothing matches {in_one_line(path)}: it needs files ending in {', '.join(suffixes)}.")
        return matches
    raise InputError(f"There is no file or folder {in_one_line(path)}: check the path.")


def _lines(data: bytes, place: str) -> list[Path]:
    """Read a list of paths; one of them may be missing, which is an error when it is read, but not all."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\0" if b"\0" in data else b"\n")
    paths = [Path(os.fsdecode(line.removesuffix(b"\r"))) for line in lines if line.strip()]
    if not any(map(os.path.lexists, paths)):
        raise InputError(f"No path in {place} exists: it needs one a line, relative ones from the current directory.")
    return paths


def _known() -> tuple[str, ...]:
    return tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


def _search(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files of a folder that have such a suffix, and the folders in it that may not be looked into."""
    files: list[Path] = []
    for current, entries in _walk(os.fspath(folder)):
        if isinstance(entries, OSError):
            if current == os.fspath(folder):
                reason = f"The folder {in_one_line(folder)} cannot be looked into ({entries.strerror})"
                raise InputError(f"{reason}: give one that you may read.")
            files.append(Path(current))
        else:
            files += [Path(entry) for entry in entries if entry.lower().endswith(suffixes) and not os.path.isdir(entry)]
    return sorted(files)


def _walk(folder: str) -> Iterator[tuple[str, list[str] | OSError]]:
    """Give a folder and all folders in it, each once, with the paths of what is in it and not hidden.

    A folder behind a link comes after those that are reached without one, and never when it is one of them.
    """
    seen: set[str] = set()
    waiting, links = [(folder, os.path.realpath(folder))], list[str]()
    while waiting or links:
        # Only behind a link is a real path to be looked up, for which each folder on the way is asked.
        current, real = waiting.pop() if waiting else (links[-1], os.path.realpath(links.pop()))
        if real in seen:
            continue
        seen.add(real)
        inside = []
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        inside.append(entry.path)
                        if entry.is_symlink():
                            links += [entry.path] if os.path.isdir(entry.path) else []
                        elif entry.is_dir():
                            waiting.append((entry.path, os.path.join(real, entry.name)))
        except OSError as error:
            yield current, error
        else:
            yield current, inside


def _matches(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """List what matches a pattern, as a shell expands it, "**" standing for any folders.

    Python's own `glob` goes round in the loops that links make.
    """
    path = Path(pattern)
    found = [path.anchor or os.curdir]
    for part in path.parts[bool(path.anchor) :]:
        if part == "**":
            found = [folder for start in found for folder, _ in _walk(start)]
        elif glob.has_magic(part):
            found = [
                os.path.join(folder, name)
                for folder in found
                for name in _list_folder(folder)
                if fnmatch.fnmatch(name, part) and (part.startswith(".") or not name.startswith("."))
            ]
        else:
            found = [name for name in (os.path.join(folder, part) for folder in found) if os.path.lexists(name)]
    return sorted(Path(name) for name in set(found) if os.path.isdir(name) or name.lower().endswith(suffixes))


def _list_folder(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:  # no folder, or none that may be looked into: as in a shell, it has no match
        return []


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the square that a model sees, and the exact way back.

    One object serves training, scoring, captioning and overlays and is stored in the checkpoint. It is hashable and
    `Preprocessing(**dataclasses.asdict(preprocessing))` is an equal one, also by way of JSON.

    Parameters
    ----------
    fit
        "crop" resizes the short side to `resize` and cuts out the centre, as torchvision's weights were trained;
        "squash" resizes the whole image to the square, so that nothing is lost but the proportions.
    size
        Side of the square in pixels.
    resize
        For "crop": the length of the short side in pixels before cropping; `None` stands for `size`.
    mean, std
        Of each channel, red, green and blue, for values in 0..1. The default is ImageNet's.

    Raises
    ------
    InputError
        If the numbers do not fit together.
    """

    fit: Literal["crop", "squash"] = "crop"
    size: int = 224
    resize: int | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON and YAML hand over lists
        object.__setattr__(self, "std", tuple(self.std))
        if self.fit not in ("crop", "squash"):
            raise InputError(f"The preprocessing's fit is {self.fit!r}: choose 'crop' or 'squash'.")
        if not 1 <= self.size <= LARGEST_SQUARE:
            raise InputError(f"The preprocessing's size is {self.size}: it must be from 1 to {LARGEST_SQUARE} pixels.")
        if self.resize is not None and (self.fit == "squash" or self.resize < self.size):
            raise InputError(
                f"The preprocessing's resize is {self.resize}: it needs fit 'crop' and at least its size, {self.size}."
            )
        if not (len(self.mean) == len(self.std) == 3 and min(self.std) > 0):
            raise InputError(
                f"The preprocessing's mean {self.mean} and std {self.std} must be three numbers each, std positive."
            )

    @classmethod
    def from_transforms(cls, transforms: ImageClassification) -> Preprocessing:
        """Read the preprocessing that torchvision's weights were trained with.

        Parameters
        ----------
        transforms
            For example `torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()`.

        Raises
        ------
        InputError
            If they resample in another way than bilinearly.
        """
        if transforms.interpolation.value != "bilinear":
            raise InputError(f"These transforms resample {transforms.interpolation.value}: only bilinear is supported.")
        (size,), (resize,) = transforms.crop_size, transforms.resize_size
        return cls("crop", size, resize, tuple(transforms.mean), tuple(transforms.std))

    def pixels(self, image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Tensor:
        """Make the square of an image.

        Parameters
        ----------
        image
            Of any size.
        box
            (left, top, right, bottom) in pixels: the part to make the square of, in place of `visible_box`.

        Returns
        -------
        Tensor
            (3, size, size) uint8. For "crop" the same as torchvision's `Resize` and `CenterCrop` of a PIL image, up to
            the rounding of single values by one level of 256, seldom two.
        """
        import torch

        return torch.from_numpy(self.square(Picture(image), box))

    def square(self, picture: Picture, box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
        """Make the square of a picture, (3, size, size), as `pixels` does; torch is not imported."""
        if 0 in picture.size:
            raise InputError(f"An image of {picture.size[0]} x {picture.size[1]} pixels shows nothing: leave it out.")
        # One resampling from the visible box instead of resizing and then cropping: `visible_box` is exact by
        # construction, and a strip of 1 x 5,000 pixels does not become one of 224 x 1,120,000 on the way.
        box = box or self.visible_box(*picture.size)
        return np.ascontiguousarray(picture.square(self.size, box).transpose(2, 0, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale pixels to the range that the encoder expects.

        Parameters
        ----------
        pixels
            (B, 3, S, S) uint8, from `pixels`.

        Returns
        -------
        Tensor
            (B, 3, S, S) float32, on the same device.

        Raises
        ------
        ValueError
            If the pixels are not uint8: they were normalised before, and twice makes every image the same grey.
        """
        import torch

        if pixels.dtype != torch.uint8:
            raise ValueError(f"normalise() takes uint8 pixels in 0..255, once, and was given {pixels.dtype}.")
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Tell which part of an image the model sees.

        Parameters
        ----------
        width, height
            Of the original, in pixels.

        Returns
        -------
        tuple of float
            (left, top, right, bottom) in pixels of the original.
        """
        if self.fit == "squash":
            return 0.0, 0.0, float(width), float(height)
        short, size = self.resize or self.size, self.size
        # torchvision's rounding: the long side is cut to whole pixels, so the two axes may differ in scale a little.
        resized_width = short if width <= height else int(short * width / height)
        resized_height = short if height <= width else int(short * height / width)
        left, top = round((resized_width - size) / 2), round((resized_height - size) / 2)
        scale_x, scale_y = width / resized_width, height / resized_height
        return left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y

    def region_boxes(self, width: int, height: int, grid: tuple[int, int]) -> NDArray[np.float64]:
        """Find the place of every region of a grid in the original image.

        A region is taken as its cell of the grid. What its annotation was computed from, the receptive field, is larger
        and centred there.

        Parameters
        ----------
        width, height
            Of the original, in pixels.
        grid
            (h, w) regions, as in `Annotations.grid`.

        Returns
        -------
        array
            (h * w, 4) float64, row-major: (left, top, right, bottom) in pixels of the original.
        """
        left, top, right, bottom = self.visible_box(width, height)
        ys, xs = np.linspace(top, bottom, grid[0] + 1), np.linspace(left, right, grid[1] + 1)
        tops, lefts = np.meshgrid(ys[:-1], xs[:-1], indexing="ij")
        bottoms, rights = np.meshgrid(ys[1:], xs[1:], indexing="ij")
        return np.stack([lefts, tops, rights, bottoms], axis=-1).reshape(-1, 4)


def random_box(width: int, height: int, least: float, seed: int) -> tuple[int, int, int, int]:
    """Draw a part of an image as torchvision's RandomResizedCrop does.

    Parameters
    ----------
    width, height
        Of the image, in pixels.
    least
        Smallest share of its area; the largest is all.
    seed
        What decides the draw, alone: threads that read images share no generator.

    Returns
    -------
    tuple of int
        (left, top, right, bottom), whose sides are as 3 to 4 at most.
    """
    draw = random.Random(seed)
    for _ in range(10):
        area = width * height * draw.uniform(least, 1)
        proportion = math.exp(draw.uniform(-math.log(4 / 3), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < wide <= width and 0 < high <= height:
            left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
            return left, top, left + wide, top + high
    # An image too long for such a part: its middle, as large as the proportions allow.
    wide, high = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
