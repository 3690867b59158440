"""`captioner overlay`: what a model looks at while it captions images, as a page or a figure."""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.caption_command import (
    DECODING,
    add_decoding,
    add_model,
    checked,
    decoding_of,
    parse,
    progress_bar,
    say,
    saying_of_fonts,
)
from captioner.errors import InputError, in_one_line
from captioner.output_files import check_writable, replacing

if TYPE_CHECKING:
    from rich.progress import Progress

    from captioner.ensemble import Ensemble
    from captioner.model import Captioner
    from captioner.overlay_page import PageImage

HELP = """\
usage: captioner overlay IMAGE... --checkpoint FILE --output FILE [options]

Shows what a model looks at while it says each word of a caption. IMAGE is an image, a folder (with all
that are in it), a pattern such as 'trip/*.jpg', or @list.txt with a path in each line. Three examples:

  captioner overlay photo.jpg --checkpoint best.ckpt --output photo.html
      a page that opens from disk: point at a word and the image lights up, or the other way round
  captioner overlay holiday/ --checkpoint best.ckpt --output holiday.html
      the same for a whole folder, a tenth of a megabyte for each image
  captioner overlay photo.jpg --checkpoint best.ckpt --output figure.pdf --say "a dog on a sofa"
      a figure, for a paper; where would the model look while it said this?

  --checkpoint FILE ...  what `captioner fit` wrote; of several, the attention of the first is shown
  --output FILE          ending in .html, .png, .webp (small), .svg, or .pdf (a page for each image)
  --say TEXT             a caption of your own, instead of the model's
  --view VIEW            smooth (default), or raw: the regions as blocks
  --shared-scale         one scale for all words, and not each its own

  --beam-size K          hypotheses (default 5); 1 is greedy and faster
  --max-words N          the longest caption (default 20 words, 120 characters or 40 byte pairs)
  --sample               draw a caption instead of searching the likeliest
  --device DEVICE        cpu (default), cuda, ...

Images that cannot be read are named and skipped, and the exit code is then 1.
All options: captioner overlay --help all
"""
FORMS = (".html", ".png", ".webp", ".svg", ".pdf")
BATCH = 8  # images that are captioned at a time


def add_options(parser: argparse.ArgumentParser) -> None:
    """Define the options of the command, but for --help."""
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="an image, a folder, a pattern, @list.txt, or -")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=", ".join(FORMS))
    parser.add_argument("--say", metavar="TEXT", help="a caption of your own, instead of the model's")
    parser.add_argument("--view", choices=("smooth", "raw"), default="smooth", help="interpolated (default), or blocks")
    parser.add_argument("--shared-scale", action="store_true", help="one scale for all words of an image")
    parser.add_argument("--title", metavar="TEXT", help="of an HTML page")
    add_model(parser)
    add_decoding(parser)


def understand(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse the command's arguments, and see to what can be seen to without a model.

    Raises
    ------
    InputError
        Where they do not fit together.
    """
    options = parse(parser, args)
    if not options.paths:
        raise InputError("There is no IMAGE: name images or folders first, as in 'captioner overlay photo.jpg ...'.")
    if options.output.suffix.lower() not in FORMS:
        raise InputError(f"--output {options.output} must end in one of {', '.join(FORMS)}: give it another name.")
    if options.title is not None and options.output.suffix.lower() != ".html":
        raise InputError("--title is that of an HTML page: leave it out, or give an --output that ends in .html.")
    found_by = [flag.name for flag in DECODING if hasattr(options, flag.field)]
    if options.say is not None and found_by:
        raise InputError(f"{found_by[0]} is for captions that the model finds: leave it out, or leave out --say.")
    if getattr(options, "captions", 1) > 1 and options.output.suffix.lower() != ".html":
        raise InputError("--captions is for an HTML page, a figure draws the best: leave it out, or write a .html.")
    check_writable(options.output)
    return options


def run(options: argparse.Namespace, open_model: Callable[[], Captioner | Ensemble]) -> int:
    """Make a page or a figure, and return the exit code; see `captioner.caption_command.run`."""
    from captioner.images import find_images

    decoding, paths, output = decoding_of(options), find_images(options.paths), options.output
    form = output.suffix.lower().removeprefix(".")
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise InputError(f"--output {output} is one of the images, and would replace it: write elsewhere.")
    if form not in ("html", "pdf") and len(paths) > 1:
        raise InputError(
            f"{len(paths)} images do not go into one {form.upper()}: write to a file that ends in .html or .pdf, or "
            "name one image."
        )
    model = checked(open_model(), decoding)
    with progress_bar(printed=False) as progress, saying_of_fonts(progress):
        images = _Overlays(model, paths, options.say, decoding, progress)
        settings: dict[str, Any] = {"view": options.view, "shared_scale": options.shared_scale}
        if form == "html":
            from captioner.overlay_page import write_page

            title = {} if options.title is None else {"title": options.title}
            write_page(output, images, images.preprocessing, **title, **settings)
        else:
            _write_figures(output, form, images, settings)
    if images.failed:
        say(f"{images.failed:,} of {len(paths):,} images could not be read.")
    return 1 if images.failed else 0


def _write_figures(output: Path, form: str, images: _Overlays, settings: dict[str, Any]) -> None:
    from matplotlib.backends.backend_pdf import PdfPages

    from captioner.overlay import make_figure, save_figure

    figures = (make_figure(each.image, each.captions[0], images.preprocessing, **settings) for each in images)
    with replacing(output) as unfinished:
        if form == "pdf":
            with PdfPages(unfinished, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    save_figure(figure, pages, form)
        else:
            (figure,) = figures
            save_figure(figure, unfinished, form)


class _Overlays:
    """Images with their captions, found or given, one after the other.

    Attributes
    ----------
    preprocessing : Preprocessing
        The one that decides where a region is.
    failed : int
        Images that could not be read so far.
    """

    def __init__(
        self, model: Captioner | Ensemble, paths: Sequence[Path], given: str | None, decoding: Any, progress: Progress
    ) -> None:
        self.model, self.paths, self.given, self.decoding, self.progress = model, paths, given, decoding, progress
        self.preprocessing = model.preprocessings[0]
        self.failed = 0

    def __iter__(self) -> Iterator[PageImage]:
        import torch

        from captioner.image_stream import read_images
        from captioner.images import read_image
        from captioner.overlay_page import PageImage

        model: Any = self.model
        workers = min(2, len(self.paths) - 1)  # of one image alone none is read ahead
        if self.given is not None:
            self._warn_of_unknown_words(self.given)
        bar = self.progress.add_task("Looking", total=len(self.paths))
        shown = 0
        for batch in read_images(self.paths, model.preprocessings, workers, BATCH):
            readable = []
            for _, path, pixels in batch:
                if isinstance(pixels, InputError):
                    self._fail(pixels)
                else:
                    readable.append((path, pixels))
            if readable:
                seen = model.annotate_pixels(
                    [torch.stack(pixels) for pixels in zip(*(pixels for _, pixels in readable), strict=True)]
                )
                for (path, _), captions in zip(
                    readable, self._captions(seen, [path for path, _ in readable]), strict=True
                ):
                    try:
                        image = read_image(path)
                    except InputError as error:  # it was there a moment ago
                        self._fail(error)
                        continue
                    shown += 1
                    yield PageImage(path.name, image, captions)
            self.progress.advance(bar, len(batch))
        if not shown:
            raise InputError("No image could be read: nothing is written.")

    def _captions(self, seen: Any, paths: Sequence[Path]) -> Any:
        model: Any = self.model
        if self.given is not None:
            return [[caption] for caption in model.attend_annotations(seen, [self.given] * len(paths))]
        # What is drawn for an image follows from its name, as `captioner caption` has it.
        numbers = [zlib.crc32(os.fsencode(path.name)) for path in paths]
        return model.caption_annotations(seen, self.decoding, numbers=numbers)

    def _warn_of_unknown_words(self, caption: str) -> None:
        from captioner.model import unknown_words

        vocabulary = self.model.captioners[0].vocabulary
        words = vocabulary.cut(caption)
        unknown = vocabulary.unknown(words)
        if 0 < len(unknown) < len(set(words)):  # where none is known, that is an error
            say(unknown_words(unknown), self.progress)

    def _fail(self, error: InputError) -> None:
        self.failed += 1
        say(in_one_line(error), self.progress)
