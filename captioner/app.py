"""The web app: captions of an image that a browser sends, and where the model looked. Nothing is kept of anybody's."""

from __future__ import annotations

import asyncio
import io
import math
import os
import re
import zlib
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from captioner.app_page import app_page
from captioner.decoding import Decoding
from captioner.errors import InputError, in_one_line
from captioner.images import SUFFIXES, read_image_data
from captioner.model import unknown_words
from captioner.overlay import View, make_figure, region_weights, save_figure
from captioner.overlay_page import TITLE, PageImage, article, page_parts

if TYPE_CHECKING:
    from captioner.ensemble import Ensemble
    from captioner.model import Caption, Captioner

HOSTS = ["127.0.0.1", "localhost"]  # what this machine is called by those who sit at it, or have a tunnel to it
LARGEST = 20 * 2**20  # bytes of an image
LONGEST = 300  # letters of a caption that a person typed
HYPOTHESES = 20  # of a beam, at most
SHOWN = 5  # captions of an image that the model found
NUMBERS = {"beam_size": int, "temperature": float, "top_p": float, "seed": int}
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Wish(NamedTuple):
    """What is asked for with an image.

    Attributes
    ----------
    name : str
        Of the image.
    caption : str or None
        To attend to; None where captions are to be found.
    decoding : Decoding
        How.
    rank : int
        Of the captions that are found, the one to be drawn.
    view : str
        See `captioner.overlay.make_figure`, as for `shared_scale`.
    shared_scale : bool
        Whether all words have one scale.
    """

    name: str
    caption: str | None
    decoding: Decoding
    rank: int
    view: View
    shared_scale: bool


def make_app(model: Captioner | Ensemble) -> Starlette:
    """Make the app of a model.

    The browser sends the image with everything that it asks, and an answer is made of that alone: there are no
    sessions, no files and nothing to tidy up. One request after the other is worked on, so that the memory which images
    take is that of one.

    Parameters
    ----------
    model
        What captions.

    Raises
    ------
    InputError
        If it has no attention to a grid of regions.
    """
    _see_it_attends(model)
    page = app_page(_readable(), LARGEST, LONGEST, HYPOTHESES)
    turn = asyncio.Lock()

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    def answer(path: str, make: Callable[[Captioner | Ensemble, Wish, Image.Image], Response]) -> Route:
        async def respond(request: Request) -> Response:
            try:
                _see_it_is_our_page(request)
                wish, data = _wish(request), await _body(request)
                async with turn:
                    if await request.is_disconnected():  # who asked wants something else by now
                        return Response(status_code=499)
                    response = await run_in_threadpool(lambda: make(model, wish, read_image_data(data, wish.name)))
            except InputError as error:
                response = JSONResponse({"error": _in_words(str(error))}, 413 if isinstance(error, _TooLarge) else 400)
            response.headers.update(HEADERS)
            return response

        return Route(path, respond, methods=["POST"])

    return Starlette(
        routes=[Route("/", show_page), answer("/look", _look), answer("/figure", _figure), answer("/page", _page)],
        # A name that somebody else lets point to this machine opens no way in from their page.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )


def make_server(model: Captioner | Ensemble) -> uvicorn.Server:
    """Make what serves the app of a model, without a line in the log for each request.

    Raises
    ------
    InputError
        As `make_app`.
    """
    settings = uvicorn.Config(
        make_app(model),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=300,  # seconds: people look at a page for longer than a program would
    )
    return uvicorn.Server(settings)


class _TooLarge(InputError):
    pass


def _see_it_attends(model: Captioner | Ensemble) -> None:
    (caption,) = model.caption(Image.new("RGB", (8, 8)), max_words=1, beam_size=1)
    region_weights(caption)


def _readable() -> str:
    # By name and not as "image/*", so that a telephone makes a JPEG of what is none of them.
    return ",".join([*(f"image/{kind.lower()}" for kind in SUFFIXES), *chain.from_iterable(SUFFIXES.values())])


def _see_it_is_our_page(request: Request) -> None:
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers['host']}":
        raise InputError("This was asked by another page than the app's own: open the app's address.")


async def _body(request: Request) -> bytes:
    """Read what was sent, no further than it may be long."""
    too_large = _TooLarge(f"The image has more than {LARGEST // 2**20} MB: make it smaller and try again.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > LARGEST:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST:
            raise too_large
    return bytes(data)


def _wish(request: Request) -> Wish:
    given = request.query_params
    caption = given.get("caption")
    if caption is not None and len(caption) > LONGEST:
        raise InputError(f"The caption has {len(caption)} letters, more than {LONGEST}: give a shorter one.")
    return Wish(
        given.get("name") or "The image",
        caption,
        _decoding(given) if caption is None else Decoding(),
        _number(given, "rank", int, 0),
        cast(View, given.get("view", "smooth")),  # that it is one is seen when it is drawn
        given.get("scale") == "shared",
    )


def _decoding(given: Any) -> Decoding:
    """Return how captions are to be found, from the parameters of a request."""
    numbers = {
        name: _number(given, name, kind, getattr(Decoding, name)) for name, kind in NUMBERS.items() if name in given
    }
    if numbers.get("beam_size", 1) > HYPOTHESES:
        raise InputError(f"`beam_size` is {numbers['beam_size']}: give {HYPOTHESES} or less.")
    if numbers.get("seed", 0) >= 2**32:
        raise InputError(f"`seed` is {numbers['seed']}: give less than {2**32}.")
    if given.get("way") == "sample":
        return Decoding(sample=True, captions=SHOWN, **numbers)
    size = numbers.get("beam_size", Decoding.beam_size)
    return Decoding(captions=max(1, min(SHOWN, size)), **numbers)


def _number(given: Any, name: str, kind: Callable[[str], Any], default: float) -> Any:
    text = given.get(name, str(default))
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"`{name}` is {text!r}: give a {'whole ' if kind is int else ''}number.") from None


def _in_words(sentence: str) -> str:
    """Call what are `fields` in Python as the page does."""
    return in_one_line(re.sub(r"`(\w+)`", lambda name: f"The {name[1].replace('_', ' ')}", sentence, count=1))


def _captions(model: Captioner | Ensemble, wish: Wish, image: Image.Image) -> list[Caption]:
    """Return the captions that a wish is for, all different, best first."""
    either: Any = model  # which takes its own annotations
    seen = either.annotate_pixels([preprocessing.pixels(image)[None] for preprocessing in model.preprocessings])
    if wish.caption is not None:
        attended: list[Caption] = either.attend_annotations(seen, [wish.caption])
        return attended
    # What is drawn for an image follows from its name, as `captioner caption` has it.
    numbers = [zlib.crc32(os.fsencode(wish.name))]
    (found,) = either.caption_annotations(seen, wish.decoding, numbers=numbers)
    different: dict[tuple[str, ...], Caption] = {}
    for caption in found:
        different.setdefault(tuple(caption.words), caption)
    return list(different.values())


def _chosen(model: Captioner | Ensemble, wish: Wish, image: Image.Image) -> Caption:
    found = _captions(model, wish, image)
    if not 0 <= wish.rank < len(found):
        raise InputError(f"There is no caption {wish.rank} of {len(found)}: look at the image again.")
    return found[wish.rank]


def _look(model: Captioner | Ensemble, wish: Wish, image: Image.Image) -> Response:
    """Answer with captions, and the part of a page that shows them."""
    found = _captions(model, wish, image)
    vocabulary = model.captioners[0].vocabulary
    unknown = [] if wish.caption is None else vocabulary.unknown(vocabulary.cut(wish.caption))
    return JSONResponse(
        {
            "article": article(PageImage(wish.name, image, found), model.preprocessings[0]),
            "captions": [
                {
                    "text": caption.text,
                    "probability": probability(caption.log_probability),
                    "logarithm": f"{caption.log_probability:.2f}".replace("-", "−"),
                }
                for caption in found
            ],
            "note": unknown_words(unknown) if unknown else "",
        }
    )


def _figure(model: Captioner | Ensemble, wish: Wish, image: Image.Image) -> Response:
    settings: Any = {"view": wish.view, "shared_scale": wish.shared_scale}
    figure = make_figure(image, _chosen(model, wish, image), model.preprocessings[0], **settings)
    file = io.BytesIO()
    save_figure(figure, file, "png")
    return Response(file.getvalue(), media_type="image/png")


def _page(model: Captioner | Ensemble, wish: Wish, image: Image.Image) -> Response:
    shown = PageImage(wish.name, image, [_chosen(model, wish, image)])
    parts = page_parts([shown], model.preprocessings[0], title=TITLE, view=wish.view, shared_scale=wish.shared_scale)
    # A name may hold half characters, which are no text.
    page = "".join(parts).encode("utf-8", "backslashreplace")
    # It would run as the app's own page if a browser were to show it from here.
    return HTMLResponse(page, headers={"Content-Disposition": "attachment"})


def probability(logarithm: float) -> str:
    """Return a probability to be read, of its natural logarithm."""
    percent = 100 * math.exp(logarithm)
    if percent < 0.0001:
        return "below 0.0001 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
