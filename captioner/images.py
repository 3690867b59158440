"""Reading an image safely, making it the square a model sees, and the way back from a region to its pixels."""

from __future__ import annotations

import math
import random
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captioner.errors import InputError

if TYPE_CHECKING:
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
        If the file is missing, of another format, damaged, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels. A
        truncated file is damaged: half a photograph would get a caption that nobody could explain.
    """
    try:
        # Pillow only warns up to twice its limit of pixels; a picture made to fill the memory should not get that far.
        with open(path, "rb") as file:
            # What is done with warnings is done in all threads: one after the other they open, and together decode.
            with _OPENING, warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
                image = Image.open(file, formats=list(SUFFIXES))
            image.load()
            return to_rgb(_upright(image))
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that can be read: give a file of the format {FORMATS}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path} has more than {limit} pixels: make it smaller and try again.") from None
    except Exception as error:  # given damaged bytes, a decoder raises whatever it trips over
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path} cannot be opened ({error.strerror}): give the path of an image file.") from None
        raise InputError(f"{path} is damaged ({error}): replace the file or leave it out.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its camera was held; a broken EXIF block is no reason to refuse a good picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    What is transparent becomes white. Grey values of 16 bits (and whole numbers of 32) are scaled from 0..65535, where
    pillow's own conversion would clip them at 255; floating-point ones, which have no agreed range, from their minimum
    to their maximum.
    """
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = (values.min(), values.max()) if image.mode == "F" else (0, 65535)
        scaled = (values - low) / (high - low or 1) * 255
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """List the image files that are given or lie in given folders.

    Parameters
    ----------
    paths
        Files, taken as they are, and folders, searched recursively for files with an image's suffix, hidden ones left
        out.

    Returns
    -------
    list of Path
        In the order given, within a folder sorted by name; a file that is reached twice stands where it came first.

    Raises
    ------
    InputError
        If a path does not exist or a folder holds no image.
    """
    known = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in known
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not files:
                raise InputError(f"The folder {path} holds no image: it needs files ending in {', '.join(known)}.")
        elif path.exists():
            files = [path]
        else:
            raise InputError(f"There is no file or folder {path}: check the path.")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


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
        if self.size < 1:
            raise InputError(f"The preprocessing's size is {self.size}: it must be at least 1 pixel.")
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
        # One resampling from the visible box instead of resizing and then cropping: `visible_box` is exact by
        # construction, and a strip of 1 x 5,000 pixels does not become one of 224 x 1,120,000 on the way.
        box = box or self.visible_box(image.width, image.height)
        square = to_rgb(image).resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

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
