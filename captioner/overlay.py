"""The attention of a caption's words, drawn on the image they came from."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from captioner.errors import InputError
from captioner.images import Preprocessing, to_rgb

if TYPE_CHECKING:
    from captioner.model import Caption

# Pixels of the picture.
PANEL = 250  # the longer side of each panel
MAX_COLUMNS = 6
MARGIN = 24  # around everything
GAP = 14  # between panels
LABEL = 54  # below a panel: the word and its numbers
TITLE = 32  # a line of the title
NOTE = 18  # a line of the note
SCALE = 112  # the colour scale beside the note
DPI = 100

COLOURS = colormaps["inferno"]
INK, FAINT_INK = "#1b1b1f", "#6f6f78"
# matplotlib's own font has no letters of these scripts; whichever of the usual ones is installed helps out.
FALLBACK_FONTS = (
    *("Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans KR", "NanumGothic", "Malgun Gothic"),
    *("Apple SD Gothic Neo", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "WenQuanYi Zen Hei"),
    *("Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans", "Arial Unicode MS", "Droid Sans Fallback", "Unifont"),
)


def attention_map(
    caption: Caption, word: int, image_size: tuple[int, int], preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """Lay one word's attention over the pixels of the original image.

    The weights stand at the centres of their regions (`Preprocessing.region_boxes`) and are interpolated between them
    by cubic convolution (Keys, 1981), negative overshoot removed.

    Parameters
    ----------
    caption
        From a decoder that attends to a grid of regions.
    word
        Index into `caption.words`.
    image_size
        (width, height) of the original in pixels, as `PIL.Image.Image.size`.
    preprocessing
        The one that the caption was made with.

    Returns
    -------
    array
        (height, width) float64, not negative, of sum 1 over the pixels that the model saw; 0 where it saw nothing.

    Raises
    ------
    InputError
        If the caption carries no attention or its regions are not a grid.
    """
    width, height = image_size
    return _spread(_weights(caption)[word], (height, width), preprocessing.visible_box(width, height))


def draw_overlay(image: Image.Image, caption: Caption, preprocessing: Preprocessing) -> Image.Image:
    """Draw an image, and for each word of its caption what the model looked at.

    Each map has its own scale from 0 to the word's largest weight, which is written below the word together with the
    gate beta (Xu et al., 2015, section 4.2.1) where the decoder has one. What the crop cut off, the model did not see:
    it is faded.

    Parameters
    ----------
    image
        The original, upright, as `read_image` returns it.
    caption
        From a decoder that attends to a grid of regions.
    preprocessing
        The one that the caption was made with.

    Returns
    -------
    PIL.Image.Image
        RGB, up to six panels of 250 pixels side by side, whatever the size of the original.

    Raises
    ------
    InputError
        If the caption carries no attention or its regions are not a grid.
    """
    weights = _weights(caption)
    scale = PANEL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    box = tuple(edge * scale for edge in preprocessing.visible_box(*image.size))
    visible = _spread(np.ones((1, 1)), (height, width), box)
    photograph = np.asarray(to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)) / 255
    panels = [photograph, *(_blend(photograph, visible, _spread(weight, (height, width), box)) for weight in weights)]

    note = "attention from 0 to each word's max"
    if caption.gates is not None:
        note += "; β: how much the word draws on the image"
    if not visible.all():
        note += "; faded: outside the crop, not seen"

    rows = -(-len(panels) // MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    cell = max(width, PANEL // 2)  # a narrow image still needs room for its word
    total_width = 2 * MARGIN + columns * (cell + GAP) - GAP
    titles = textwrap.wrap(caption.text, (total_width - 2 * MARGIN) // 14)
    notes = textwrap.wrap(note, (total_width - 2 * MARGIN - SCALE) // 7)
    top = MARGIN + TITLE * len(titles)
    bottom = top + rows * (height + LABEL) + GAP // 2
    total_height = bottom + NOTE * len(notes) + MARGIN

    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)  # without types in matplotlib; needs neither pyplot nor a display
    installed = set(get_font_names())
    fonts = ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in installed)]

    def show(pixels: NDArray[np.float64], x: int, y: int) -> None:
        figure.figimage(pixels, x, total_height - y - len(pixels), origin="upper")

    def write(text: str, x: int, y: int, points: float, colour: str = INK, weight: str = "normal") -> None:
        label = figure.text(x, total_height - y, text, transform=IdentityTransform(), verticalalignment="top")
        label.set(size=points, color=colour, weight=weight, family=fonts)
        label.set_parse_math(False)  # "$5 or $6" is no formula

    for index, line in enumerate(titles):
        write(line, MARGIN, MARGIN - 4 + index * TITLE, 16, weight="bold")
    for index, panel in enumerate(panels):
        x, y = MARGIN + index % columns * (cell + GAP), top + index // columns * (height + LABEL)
        show(panel, x, y)
        if index > 0:
            word = caption.words[index - 1]
            write(word, x, y + height + 6, min(12, cell / (0.9 * len(word))), weight="bold")
            gate = "" if caption.gates is None else f"β {caption.gates[index - 1]:.2f}   "
            write(f"{gate}max {weights[index - 1].max():.2f}", x, y + height + 26, 8.5, FAINT_INK)
    show(np.tile(COLOURS(np.linspace(0, 1, SCALE - 12))[:, :3], (10, 1, 1)), MARGIN, bottom + 3)
    for index, line in enumerate(notes):
        write(line, MARGIN + SCALE, bottom + index * NOTE, 8.5, FAINT_INK)

    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _weights(caption: Caption) -> NDArray[np.float64]:
    """Take the caption's attention as (T, h, w)."""
    if caption.attention is None:
        raise InputError("This caption carries no attention to draw: caption with a decoder that attends to regions.")
    if caption.grid is None:
        raise InputError("This caption's regions are not a grid and cannot be drawn: use an encoder that gives a grid.")
    weights: NDArray[np.float64] = caption.attention.double().numpy()
    return weights.reshape(len(weights), *caption.grid)


def _spread(weights: NDArray[np.float64], shape: tuple[int, int], box: tuple[float, ...]) -> NDArray[np.float64]:
    """Interpolate (h, w) weights over the box (left, top, right, bottom) in an image of (height, width), to sum 1."""
    left, top, right, bottom = box
    rows = _interpolation(shape[0], top, bottom, weights.shape[0])
    columns = _interpolation(shape[1], left, right, weights.shape[1])
    spread: NDArray[np.float64] = (rows @ weights @ columns.T).clip(min=0)
    spread /= spread.sum()
    return spread


def _interpolation(length: int, start: float, stop: float, cells: int) -> NDArray[np.float64]:
    """Give the (length, cells) coefficients of cubic convolution from cells between start and stop to pixels."""
    centres = np.arange(length) + 0.5
    position = (centres - start) / (stop - start) * cells - 0.5  # in cells, 0 at the centre of the first
    first = np.floor(position).astype(int) - 1
    coefficients = np.zeros((length, cells))
    for neighbour in range(4):
        distance = np.abs(position - first - neighbour)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        at = (first + neighbour).clip(0, cells - 1)  # beyond the edge the last cell goes on
        np.add.at(coefficients, (np.arange(length), at), np.where(distance <= 1, near, far))
    # A pixel counts by the part of it that lies inside, so that the thinnest box still covers something.
    inside = (np.minimum(centres + 0.5, stop) - np.maximum(centres - 0.5, start)).clip(min=0)
    coefficients *= inside[:, None]
    return coefficients


def _blend(
    photograph: NDArray[np.float64], visible: NDArray[np.float64], attention: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Colour (height, width, 3) by its attention; the stronger, the more colour; wash out what was not seen."""
    # For what was seen of a pixel: one that the crop's edge cuts through is not darker than its neighbour.
    density = np.divide(attention, visible, out=np.zeros_like(attention), where=visible > 0)[..., None]
    strength = density / density.max()
    grey = photograph.mean(axis=-1, keepdims=True)
    muted = 0.65 * (0.6 * photograph + 0.4 * grey)
    opacity = 0.08 + 0.67 * strength
    seen = (1 - opacity) * muted + opacity * COLOURS(strength[..., 0])[..., :3]
    blended: NDArray[np.float64] = np.where(visible[..., None] > 0, seen, 0.85 + 0.15 * grey)
    return blended
