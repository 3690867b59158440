"""Overlays as a page: one HTML file that opens from disk, in which words light up the image and the image the words."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captioner.errors import in_one_line
from captioner.images import Preprocessing, to_rgb
from captioner.output_files import write_parts
from captioner.overlay import COLOURS, View, region_weights, relative_entropy

if TYPE_CHECKING:
    from captioner.model import Caption

SIDE = 640  # pixels of an embedded photograph's longer side, at most
BYTES = 120_000  # of it, at most: a hundred with all their weights stay below 20 MB
FINE = 480  # pixels that a map has at least: a tiny photograph is enlarged, and its map drawn in detail
STEPS = 65_535  # from 0 to a word's largest weight

TITLE = "What the model looked at"
HINT = "Point at a word to see where the model looked while saying it, or at an image to see which words looked there."
HELP = (
    "A click, a tap or Enter keeps a word, Escape lets go; arrow keys go from word to word, or over an image with "
    "the focus. β: how much a word draws on the image. H: the entropy of its map, 0 for one region, 1 for evenly "
    "spread. Striped: cropped away, not seen."
)


class PageImage(NamedTuple):
    """One image of a page.

    Attributes
    ----------
    name : str
        What stands above it, such as its path.
    image : PIL.Image.Image
        The original, upright, as `read_image` returns it.
    captions : sequence of Caption
        From a decoder that attends to a grid of regions.
    """

    name: str
    image: Image.Image
    captions: Sequence[Caption]


def write_page(
    path: Path,
    images: Iterable[PageImage],
    preprocessing: Preprocessing,
    *,
    title: str = TITLE,
    view: View = "smooth",
    shared_scale: bool = False,
) -> None:
    """Write a page of images with the attention of their captions, whole or not at all.

    It needs no network and no other file. Photographs are embedded once, as JPEGs of at most 640 pixels without what
    their files say about them, weights as numbers, from which the browser makes the maps that `attention_map` makes.

    Parameters
    ----------
    path
        Where to.
    images
        Taken one after the other: only one is held at a time.
    preprocessing
        The one that the captions were made with; of an ensemble, the first member's.
    title
        Of the page.
    view, shared_scale
        What the page shows first, see `captioner.overlay.make_figure`; its reader may switch.

    Raises
    ------
    InputError
        If a caption carries no attention or its regions are not a grid, or the file cannot be written.
    """
    write_parts(path, page_parts(images, preprocessing, title=title, view=view, shared_scale=shared_scale))


def page_parts(
    images: Iterable[PageImage], preprocessing: Preprocessing, *, title: str, view: View, shared_scale: bool
) -> Iterator[str]:
    """Give what `write_page` writes, part by part."""
    script = resource("overlay_page.js")
    yield f"""{head(title, resource("overlay_page.css"), script)}
<body>
<h1>{_escape(title)}</h1>
{controls(view, shared_scale)}
<details class="help"><summary>{HINT}</summary><p>{HELP}</p></details>
<main data-colours="{colours()}">
"""
    for image in images:
        yield article(image, preprocessing)
    yield f"""</main>
<script>{script}</script>
</body>
</html>
"""


def head(title: str, style: str, script: str, connects: str = "'none'") -> str:
    """Return a page's beginning.

    Whatever a caption or a file's name says, nothing runs and nothing is styled but by the page's own script and style,
    nothing is fetched.

    Parameters
    ----------
    title, style, script
        Of the page. In the style stands `/*COLOURS*/` for the steps of the colour scale.
    connects
        Whom the script may ask, as a content security policy calls it.
    """
    gradient = ", ".join("#" + bytes(colour).hex() for colour in COLOURS[::15])
    style = style.replace("/*COLOURS*/", gradient)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"connect-src {connects}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_escape(title)}</title>
<style>{style}</style>
</head>"""


def colours() -> str:
    """Return the colours of maps as the script takes them: red, green and blue of 256 steps, in base64."""
    return _base64(COLOURS.tobytes())


def controls(view: View = "smooth", shared_scale: bool = False) -> str:
    """Return what switches between views, scales and colours."""
    most = "the maximum of all words of an image" if shared_scale else "each word's own maximum"
    return f"""<div class="controls">
<fieldset><legend>View</legend>
{_radio("view", "smooth", "smooth", view == "smooth")}
{_radio("view", "raw", "blocks", view == "raw")}
</fieldset>
<fieldset><legend>Scale</legend>
{_radio("scale", "own", "per word", not shared_scale)}
{_radio("scale", "shared", "shared", shared_scale)}
</fieldset>
<div class="legend">0 <span class="scale" role="img" aria-label="colours from dark to bright"></span>
<span id="most">{most}</span></div>
<button type="button" id="theme">Dark or light</button>
</div>
<noscript><p>The maps need JavaScript, which this page brings, to be allowed in the browser.</p></noscript>"""


def article(image: PageImage, preprocessing: Preprocessing) -> str:
    """Return what stands on a page for an image, whose captions' words its script makes light up."""
    photograph, (width, height) = _jpeg(image.image)
    left, top, right, bottom = preprocessing.visible_box(*image.image.size)
    box = (left / image.image.width, top / image.image.height, right / image.image.width, bottom / image.image.height)
    fine = max(1, FINE // max(width, height))
    grid = region_weights(image.captions[0]).shape[1:]
    captions = "\n".join(_words(caption) for caption in image.captions)
    alt = html.escape(image.captions[0].text)
    return f"""<article data-grid="{grid[0]} {grid[1]}" data-box="{" ".join(map(str, box))}">
<h2><bdi>{_escape(image.name)}</bdi></h2>
<div class="stage" tabindex="0" role="group" aria-label="The image: arrow keys point at its parts">
<img src="data:image/jpeg;base64,{_base64(photograph)}" width="{width}" height="{height}" alt="{alt}">
<canvas width="{width * fine}" height="{height * fine}" aria-hidden="true"></canvas>
<div class="marker" hidden></div>
</div>
{captions}
<p class="numbers" aria-live="polite"></p>
</article>
"""


def _words(caption: Caption) -> str:
    weights, entropies = region_weights(caption), relative_entropy(caption)
    buttons = []
    for index, (word, weight, entropy) in enumerate(zip(caption.words, weights, entropies, strict=True)):
        said, under = f"“{word}”: entropy {entropy:.2f}, largest weight {weight.max():.2f}", f"H {entropy:.2f}"
        if caption.gates is not None:
            said, under = f"{said}, gate β {caption.gates[index]:.2f}", f"β {caption.gates[index]:.2f} {under}"
        buttons.append(
            f'<button type="button" class="word" aria-pressed="false" data-said="{html.escape(said)}" '
            f'data-weights="{_base64(_steps(weight))}"><span>{html.escape(word)}</span><small dir="ltr">{under}</small>'
            "</button>"
        )
    # By the first letter that has a direction, words run from the left or from the right.
    return '<div class="caption" dir="auto">' + "\n".join(buttons) + "</div>"


def _steps(weights: NDArray[np.float64]) -> bytes:
    """Return weights as whole numbers of 16 bits, in proportion to the largest: maps do not depend on its size."""
    return (weights / (weights.max() or 1) * STEPS).round().astype("<u2").tobytes()


def _jpeg(image: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """Return an image as a small JPEG, and its size."""
    scale = min(1, SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = to_rgb(image).resize(size, Image.Resampling.LANCZOS)
    for quality in (85, 75, 60, 40, 20, 5):
        file = io.BytesIO()
        small.save(file, format="JPEG", quality=quality, optimize=True)
        if file.tell() <= BYTES:
            break
    return file.getvalue(), size


def _radio(name: str, value: str, label: str, checked: bool) -> str:
    return f'<label><input type="radio" name="{name}" value="{value}"{" checked" * checked}> {label}</label>'


def resource(name: str) -> str:
    """Return the text of a file that the package brings."""
    return files("captioner").joinpath(name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return html.escape(in_one_line(text))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _hash(text: str) -> str:
    return f"'sha256-{_base64(hashlib.sha256(text.encode('utf-8')).digest())}'"
