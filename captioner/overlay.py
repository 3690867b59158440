"""The attention of a caption's words, drawn on the image they came from."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.transforms import Bbox, TransformedBbox
from numpy.typing import NDArray
from PIL import Image

from captioner.errors import InputError
from captioner.fonts import FontWarning, find_fonts
from captioner.images import Preprocessing, to_rgb

if TYPE_CHECKING:
    from captioner.model import Caption

View: TypeAlias = Literal["smooth", "raw"]

# Lengths of the picture, in pixels at 100 to the inch.
PANEL = 250  # the longer side of each panel
NARROWEST = 200  # of the place for a panel: its word needs room, however narrow the image
MAX_COLUMNS = 6
FEWEST_COLUMNS = 3  # that text below the panels is as wide as
MARGIN = 24  # around everything
GAP = 14  # between panels
LABEL = 54  # below a panel: the word and its numbers
TITLE = 32  # a line of the title
LINE = 22  # a line of text below the panels
NOTE = 18  # a line of the note
SCALE = 150  # the colour scale beside the note
STRIPE = 5  # of what was not seen
DPI = 100

COLOURS = (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3), from none to most
INK, FAINT_INK = "#1b1b1f", "#6f6f78"


def attention_map(
    caption: Caption,
    word: int,
    image_size: tuple[int, int],
    preprocessing: Preprocessing,
    view: View = "smooth",
) -> NDArray[np.float64]:
    """Lay one word's attention over the pixels of the original image.

    This is the array for those who draw themselves. Divided by its maximum it is what `draw_overlay` colours.

    Parameters
    ----------
    caption
        From a decoder that attends to a grid of regions.
    word
        Index into `caption.words`.
    image_size
        (width, height) of the original in pixels, as `PIL.Image.Image.size`.
    preprocessing
        The one that the caption was made with; of an ensemble, the first member's.
    view
        "smooth": the weights stand at the centres of their regions (`Preprocessing.region_boxes`) and are interpolated
        between them by cubic Hermite splines that are level at the centres, along the rows and the columns. No value
        lies outside those of the regions around it, as with cubic convolution, so the map peaks in the centre of the
        region of the largest weight. "raw": each weight is spread evenly over its region.

    Returns
    -------
    array
        (height, width) float64, not negative, of sum 1 over the pixels that the model saw; 0 where it saw nothing.

    Raises
    ------
    InputError
        If the caption carries no attention, its regions are not a grid, or there is no such view.
    """
    width, height = image_size
    return _spread(region_weights(caption)[word], (height, width), preprocessing.visible_box(width, height), view)


def relative_entropy(caption: Caption) -> NDArray[np.float64]:
    """Tell how far the attention of each word of a caption is spread.

    Parameters
    ----------
    caption
        From a decoder that attends to a grid of regions.

    Returns
    -------
    array
        (T,) float64, the entropy relative to that of equal weights: 0 where one region has all, 1 where all have the
        same.

    Raises
    ------
    InputError
        If the caption carries no attention or its regions are not a grid.
    """
    words, height, width = (weights := region_weights(caption)).shape
    if height * width == 1:
        return np.ones(words)
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy: NDArray[np.float64] = -(weights * logarithms).sum((1, 2)) / np.log(height * width)
    return entropy.clip(0, 1)


def draw_overlay(
    image: Image.Image,
    caption: Caption,
    preprocessing: Preprocessing,
    *,
    view: View = "smooth",
    shared_scale: bool = False,
    beneath: Sequence[str] = (),
) -> Image.Image:
    """Draw an image, and for each word of its caption what the model looked at.

    Parameters
    ----------
    image, caption, preprocessing, view, shared_scale, beneath
        As for `make_figure`.

    Returns
    -------
    PIL.Image.Image
        RGB, up to six panels of 250 pixels side by side, whatever the size of the original.

    Raises
    ------
    InputError
        As `make_figure`.

    Warns
    -----
    FontWarning
        As `make_figure`.
    """
    settings: Any = {"view": view, "shared_scale": shared_scale, "beneath": beneath}
    return _drawn(make_figure(image, caption, preprocessing, **settings, detail=1))


def _drawn(figure: Figure) -> Image.Image:
    canvas: Any = FigureCanvasAgg(figure)  # without types in matplotlib; needs neither pyplot nor a display
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the FontWarning says it once
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_figure(figure: Figure, path: Path | Any, form: str | None = None) -> None:
    """Write a figure as PNG, SVG, PDF or, where it is to be small, WebP; of one figure always the same bytes.

    Parameters
    ----------
    figure
        From `make_figure`.
    path
        A file, or what matplotlib writes to as to one.
    form
        "png", "svg", "pdf" or "webp", where the path's suffix does not tell.

    Raises
    ------
    InputError
        If it is another format.
    """
    form = form or Path(path).suffix.removeprefix(".").lower()
    pixels: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 1, "compress_type": 3},  # photographs shrink little further, and take long
        "webp": {"quality": 80},
    }
    undated: dict[str, dict[str, Any]] = {
        "svg": {"metadata": {"Date": None}},
        "pdf": {"metadata": {"CreationDate": None}},
    }
    if form in pixels:  # not by matplotlib, which would write how opaque each pixel is, too
        _drawn(figure).save(path, form.upper(), dpi=(figure.dpi, figure.dpi), **pixels[form])
        return
    if form not in undated:
        known = ", ".join((*pixels, *undated))
        raise InputError(f"A figure is written as {known}, and not as {form!r}: choose one of these.")
    settings: Any = {"svg.hashsalt": "captioner", "savefig.bbox": None}  # whatever a user's matplotlibrc says
    with warnings.catch_warnings(action="ignore", category=UserWarning), rc_context(settings):
        figure.savefig(path, format=form, dpi=figure.dpi, **undated[form])


def make_figure(
    image: Image.Image,
    caption: Caption,
    preprocessing: Preprocessing,
    *,
    view: View = "smooth",
    shared_scale: bool = False,
    beneath: Sequence[str] = (),
    detail: int = 2,
) -> Figure:
    """Make matplotlib's figure of an image and, for each word of its caption, of what the model looked at.

    Below each word stand the gate beta (Xu et al., 2015, section 4.2.1) where the decoder has one, the entropy of the
    map, see `relative_entropy`, and the largest weight of a region. What the crop cut off, the model did not see: it is
    striped.

    Parameters
    ----------
    image
        The original, upright, as `read_image` returns it.
    caption
        From a decoder that attends to a grid of regions.
    preprocessing
        The one that the caption was made with; of an ensemble, the first member's.
    view
        "smooth" or "raw", see `attention_map`.
    shared_scale
        Colour all maps by one scale, so that words can be compared, and not each up to its own maximum.
    beneath
        What is written below the panels, each on a line of its own, such as other captions of the image.
    detail
        Pixels of the panels for each of the 250 that they have in `draw_overlay`.

    Returns
    -------
    matplotlib.figure.Figure
        Without a canvas: `save_figure` writes it, and so does its own `savefig`. Letters of scripts with lines from
        right to left and with joined letters are set so, which needs matplotlib 3.11 or later. Where the caption begins
        with such a letter, the panels run from right to left, too.

    Raises
    ------
    InputError
        If the caption carries no attention, its regions are not a grid, or there is no such view.

    Warns
    -----
    FontWarning
        If no installed font has some of the letters.
    """
    weights, entropies = region_weights(caption), relative_entropy(caption)
    scale = PANEL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    size = width * detail, height * detail
    # Each axis by its own scale: both are rounded to whole pixels.
    box = tuple(
        edge * size[axis % 2] / image.size[axis % 2] for axis, edge in enumerate(preprocessing.visible_box(*image.size))
    )
    photograph = np.asarray(to_rgb(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    seen = _spread(np.ones((1, 1)), size[::-1], box, "raw")
    # In even shares: what a pixel has of the attention, over what it would have if all that was seen had the same. So
    # a pixel that the crop's edge cuts through is not darker than its neighbour.
    maps = [
        np.divide(_spread(weight, size[::-1], box, view), seen, out=np.zeros_like(seen), where=seen > 0)
        for weight in weights
    ]
    tops = [density.max() for density in maps]
    if shared_scale and maps:
        tops = [max(tops)] * len(tops)
    muted, unseen = _muted(photograph), _unseen(photograph, STRIPE * detail)
    panels = [
        photograph.astype(np.uint8),
        *(_blend(muted, unseen, seen, density / top) for density, top in zip(maps, tops, strict=True)),
    ]

    note = "attention, one scale for all words" if shared_scale else "attention, each word by its own scale"
    if view == "raw":
        note += "; blocks: the regions"
    if caption.gates is not None:
        note += "; β: how much the word draws on the image"
    note += "; entropy of the map: 0 one region, 1 spread evenly; max: the largest weight of a region"
    if not seen.all():
        note += "; striped: outside the crop, not seen"

    rows = -(-len(panels) // MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    cell = max(width, NARROWEST)
    # Lines of text need room, however few the panels.
    total_width = 2 * MARGIN + max(columns, FEWEST_COLUMNS if beneath else 1) * (cell + GAP) - GAP
    titles = _wrap(caption.text, (total_width - 2 * MARGIN) // 14)
    lines = [line for text in beneath for line in _wrap(text, (total_width - 2 * MARGIN) // 9)]
    notes = _wrap(note, (total_width - 2 * MARGIN - SCALE) // 7)
    top = MARGIN + TITLE * len(titles)
    below = top + rows * (height + LABEL)
    bottom = below + LINE * len(lines) + GAP // 2
    total_height = bottom + (NOTE * max(len(notes), 2) if maps else 0) + MARGIN

    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI * detail, facecolor="white")
    families, hint = find_fonts("".join([caption.text, *caption.words, *beneath]))
    if hint is not None:
        warnings.warn(hint, FontWarning, stacklevel=2)

    def show(pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> None:
        left, bottom = x / total_width, 1 - (y + height) / total_height
        place = Bbox.from_bounds(left, bottom, width / total_width, height / total_height)
        picture = _Panel(TransformedBbox(place, figure.transFigure), interpolation="nearest")
        picture.set_data(pixels)
        figure.add_artist(picture)

    def write(
        text: str, x: float, y: int, points: float, colour: str = INK, weight: str = "normal", **more: Any
    ) -> None:
        label = figure.text(x / total_width, 1 - y / total_height, text, verticalalignment="top", **more)
        label.set(size=points, color=colour, weight=weight, family=families)
        label.set_usetex(False)  # whatever a user's matplotlibrc says
        label.set_parse_math(False)  # "$5 or $6" is no formula

    # Where lines begin, of the title and below each panel: on the left, or on the right.
    leftward = _runs_leftward(caption.text)
    begin = {"horizontalalignment": "right" if leftward else "left"}
    for index, line in enumerate(titles):
        x = total_width - MARGIN if leftward else MARGIN
        write(line, x, MARGIN - 4 + index * TITLE, 16, weight="bold", **begin)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        y, x = top + row * (height + LABEL), MARGIN + column * (cell + GAP)
        if leftward:
            x = total_width - x
        show(panel, x - width if leftward else x, y, width, height)
        if index > 0:
            word = caption.words[index - 1]
            write(word, x, y + height + 6, min(12, cell / (0.9 * max(_width(word), 1))), weight="bold", **begin)
            gate = "" if caption.gates is None else f"β {caption.gates[index - 1]:.2f}   "
            numbers = f"{gate}entropy {entropies[index - 1]:.2f}   max {weights[index - 1].max():.2f}"
            write(numbers, x, y + height + 26, 8.5, FAINT_INK, **begin)
    for index, line in enumerate(lines):
        write(line, MARGIN, below + index * LINE, 11)
    if not maps:
        return figure
    bar = SCALE - GAP
    show(COLOURS[None], MARGIN, bottom + 3, bar, 10)
    most = f"{tops[0]:.1f} × even share" if shared_scale else "its maximum"
    write("0", MARGIN, bottom + NOTE, 8.5, FAINT_INK)
    write(most, MARGIN + bar, bottom + NOTE, 8.5, FAINT_INK, horizontalalignment="right")
    for index, line in enumerate(notes):
        write(line, MARGIN + SCALE, bottom + index * NOTE, 8.5, FAINT_INK)
    return figure


class _Panel(BboxImage):
    """An image that is drawn as it is where it has the pixels of its place, which takes less time than resampling."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        pixels: Any = self.get_array()
        place = self.get_window_extent(renderer)
        corner, size = (round(place.x0), round(place.y0)), (round(place.width), round(place.height))
        exact = np.allclose((*corner, *size), place.bounds, rtol=0, atol=1e-6)
        if unsampled or magnification != 1 or not exact or size != pixels.shape[1::-1]:
            return super().make_image(renderer, magnification, unsampled)
        opaque = np.full((*pixels.shape[:2], 1), 255, dtype=np.uint8)
        return np.concatenate([pixels, opaque], axis=-1)[::-1], *corner, None  # from the bottom up


def region_weights(caption: Caption) -> NDArray[np.float64]:
    """Take the caption's attention as (T, h, w)."""
    if caption.attention is None:
        raise InputError("This caption carries no attention to draw: caption with a decoder that attends to regions.")
    if caption.grid is None:
        raise InputError("This caption's regions are not a grid and cannot be drawn: use an encoder that gives a grid.")
    weights: NDArray[np.float64] = caption.attention.double().numpy()
    return weights.reshape(len(weights), *caption.grid)


def _spread(
    weights: NDArray[np.float64], shape: tuple[int, int], box: tuple[float, ...], view: View
) -> NDArray[np.float64]:
    """Lay (h, w) weights over the box (left, top, right, bottom) in an image of (height, width), to sum 1."""
    if view not in ("smooth", "raw"):
        raise InputError(f"There is no view {view!r}: choose 'smooth' or 'raw'.")
    left, top, right, bottom = box
    coefficients = _interpolation if view == "smooth" else _blocks
    rows = coefficients(shape[0], top, bottom, weights.shape[0])
    columns = coefficients(shape[1], left, right, weights.shape[1])
    cells = _bordered(weights) if view == "smooth" else weights
    spread: NDArray[np.float64] = rows @ cells @ columns.T
    spread /= spread.sum()
    return spread


def _blocks(length: int, start: float, stop: float, cells: int) -> NDArray[np.float64]:
    """Give the (length, cells) parts of the pixels that lie in each of the cells between start and stop."""
    edges, pixels = np.linspace(start, stop, cells + 1), np.arange(length)[:, None]
    return (np.minimum(pixels + 1, edges[1:]) - np.maximum(pixels, edges[:-1])).clip(min=0)


def _bordered(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Put (h, w) weights into a border of cells, (h + 2, w + 2).

    Were they the outermost weights once more, a peak in the outermost region would be level from its centre to the edge
    of the image. The lesser of the two outermost keeps it in place.
    """
    bordered = np.pad(weights, 1, mode="edge")
    for cells in (bordered, bordered.T):
        if len(cells) > 3:
            cells[0], cells[-1] = np.minimum(cells[1], cells[2]), np.minimum(cells[-2], cells[-3])
    return bordered


def _interpolation(length: int, start: float, stop: float, cells: int) -> NDArray[np.float64]:
    """Give the coefficients of the splines from cells between start and stop, and a border, to pixels.

    They are (length, cells + 2).
    """
    centres = np.arange(length) + 0.5
    position = (centres - start) / (stop - start) * cells - 0.5  # in cells, 0 at the centre of the first
    first = np.floor(position).astype(int)
    coefficients = np.zeros((length, cells + 2))
    for neighbour in range(2):
        distance = np.abs(position - first - neighbour)
        at = (first + neighbour + 1).clip(0, cells + 1)  # beyond the border it goes on
        np.add.at(coefficients, (np.arange(length), at), (2 * distance - 3) * distance**2 + 1)
    # A pixel counts by the part of it that lies inside, so that the thinnest box still covers something.
    inside = (np.minimum(centres + 0.5, stop) - np.maximum(centres - 0.5, start)).clip(min=0)
    coefficients *= inside[:, None]
    return coefficients


def _muted(photograph: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take light and colour from a photograph, (height, width, 3) in 0..255, so that maps stand out."""
    grey = photograph.mean(axis=-1, keepdims=True)
    muted: NDArray[np.float32] = 0.65 * (0.6 * photograph + 0.4 * grey)
    return muted


def _unseen(photograph: NDArray[np.float32], stripe: int) -> NDArray[np.float32]:
    """Wash out a photograph under slanting stripes of so many pixels."""
    height, width = photograph.shape[:2]
    slant = (np.arange(height)[:, None] + np.arange(width)) // stripe % 2
    light = np.where(slant == 0, 0.85, 0.95).astype(np.float32)[..., None]
    washed: NDArray[np.float32] = 255 * light + (1 - light) * photograph.mean(axis=-1, keepdims=True)
    return washed


def _blend(
    muted: NDArray[np.float32],
    unseen: NDArray[np.float32],
    seen: NDArray[np.float64],
    strength: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """Colour what was seen by its attention (height, width) in 0..1: the stronger, the more colour."""
    opacity = (0.08 + 0.67 * strength).astype(np.float32)[..., None]
    blended = COLOURS[(strength * 255).round().astype(np.uint8)].astype(np.float32)
    blended -= muted  # in place: a figure has millions of pixels
    blended *= opacity
    blended += muted
    if not seen.all():
        blended = np.where(seen[..., None] > 0, blended, unseen)
    return np.rint(blended, out=blended).astype(np.uint8)


def _runs_leftward(text: str) -> bool:
    """Tell whether a text runs from right to left: its first letter that has a direction does."""
    directions = map(unicodedata.bidirectional, text)
    return next((direction != "L" for direction in directions if direction in ("L", "R", "AL")), False)


def _width(text: str) -> int:
    """Return how many letters of the Latin alphabet a text is about as wide as."""
    marks = sum(unicodedata.category(letter) in ("Mn", "Cf") for letter in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _wrap(text: str, columns: int) -> list[str]:
    """Break a text into lines between words, and within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        pieces = [word] if _width(word) <= columns else list(word)
        for place, piece in enumerate(pieces):
            longer = f"{lines[-1]} {piece}" if lines[-1] and place == 0 else lines[-1] + piece
            if lines[-1] and _width(longer) > columns:
                lines.append(piece)
            else:
                lines[-1] = longer
    return lines if lines[0] else []
