"""`captioner caption`: images from anywhere to captions in the files that people use, whatever happens on the way."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captioner.caption_files import FORMATS, CaptionFile, Outcome, Sidecars, counted, format_of, settings_of
from captioner.errors import InputError, in_one_line, without_control
from captioner.images import SUFFIXES
from captioner.output_files import check_writable

if TYPE_CHECKING:
    from rich.progress import Progress

    from captioner.decoding import Decoding
    from captioner.ensemble import Ensemble
    from captioner.model import Captioner

REGIONS = (".npy", ".npz")
HELP = """\
usage: captioner caption PATH... --checkpoint FILE [options]

PATH is an image, a folder (with all that are in it), a pattern such as 'trip/*.jpg', @list.txt with
a path in each line, or - for such a list on standard input. Three examples:

  captioner caption photo.jpg --checkpoint best.ckpt
      prints the path and the caption
  captioner caption holiday/ --checkpoint best.ckpt --output captions.jsonl
      writes a file; the same command goes on where it was stopped, or with images added since
  captioner caption holiday/ --checkpoint best.ckpt --sidecar
      writes photo.txt beside photo.png; images that have theirs are skipped

  --checkpoint FILE ...  what `captioner fit` wrote; several write each caption together
  --output FILE          ending in .jsonl, .csv, .json (COCO), or metadata.jsonl (Hugging Face)
  --sidecar [.EXT]       a text file beside each image (.txt), for training sets
  --overlay DIR          draw each image with the attention of each word
  --overwrite            replace files of earlier runs

  --captions N           several for each image, the best first
  --beam-size K          hypotheses (default 5); 1 is greedy and faster
  --max-words N          the longest caption (default 20 words, 120 characters or 40 byte pairs)
  --begin-with TEXT      how every caption begins, such as "a photo of"
  --ban WORD,...         words that no caption may say
  --sample               draw captions instead of searching the likeliest
  --device DEVICE        cpu (default), cuda, ...

Images that cannot be read are named and skipped, and the exit code is then 1.
All options: captioner caption --help all
"""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


class Flag(NamedTuple):
    """An option of the command line: a field of `captioner.decoding.Decoding`, whose default it leaves alone."""

    field: str
    help: str
    type: Callable[[str], Any] = int
    metavar: str | None = "N"

    @property
    def name(self) -> str:
        """Return it as it is given."""
        return f"--{self.field.replace('_', '-')}"


DECODING = (
    Flag("beam_size", "hypotheses (default 5); 1 is greedy", metavar="K"),
    Flag("length_penalty", "0 favours short captions, 1 long ones (default 0.7)", float, "X"),
    Flag("min_words", "the shortest caption (default 0), in words, or else in characters or byte pairs"),
    Flag("max_words", "the longest caption, likewise (default 20 words, 120 characters, 40 byte pairs)"),
    Flag("no_repeat_ngram", "say no N words in a row twice (default 0: allowed)"),
    Flag("ban", "words that no caption may say; may be given more than once", _words, "WORD,..."),
    Flag("begin_with", 'how every caption begins, such as "a photo of"', str, "TEXT"),
    Flag("captions", "captions for each image, the best first (default 1)"),
    Flag("groups", "split the beam into groups that avoid each other's words (default 1)"),
    Flag("diversity", "how strongly they avoid them (default 0.5)", float, "X"),
    Flag("sample", "draw captions instead of searching the likeliest", bool, None),
    Flag("temperature", "of the draws; below 1 is more careful (default 1.0)", float, "X"),
    Flag("top_k", "draw among the K likeliest words (default 0: all)", metavar="K"),
    Flag("top_p", "draw among the likeliest words that reach probability P (default 1.0)", float, "P"),
    Flag("seed", "of the draws, which follow from it and the image's file name (default 0)"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Define the options of the command, but for --help."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="an image, a folder, a pattern, @list.txt, or -")
    model = add_model(parser)
    model.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default 32)")
    model.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images (default here %(default)s); 0 reads in this one",
    )
    model.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        metavar="NAME",
        help="of the encoder: float32 or bfloat16 (default: the faster one here); what differs is rounding",
    )
    model.add_argument(
        "--compile", action="store_true", help="compile the model: takes a minute, pays for thousands of images"
    )
    output = parser.add_argument_group("where captions go (by default they are printed: path, tab, caption)")
    output.add_argument("--output", type=Path, metavar="FILE", help=".jsonl, .csv, .json or metadata.jsonl")
    output.add_argument("--format", choices=list(FORMATS), help="of the output, where its name does not tell")
    output.add_argument("--overlay", type=Path, metavar="DIR", help="draw each image with the attention of each word")
    output.add_argument("--overwrite", action="store_true", help="replace files of earlier runs")
    output.add_argument(
        "--sidecar",
        nargs="?",
        const=".txt",
        metavar=".EXT",
        help="a text file beside each image, photo.txt for photo.png; several captions are several lines",
    )
    output.add_argument(
        "--prefix", dest="before", metavar="TEXT", help="before each caption in it, as it is, spaces too"
    )
    output.add_argument("--suffix", dest="after", metavar="TEXT", help="after it")
    add_decoding(parser)


def add_model(parser: argparse.ArgumentParser) -> Any:
    """Define the options that say which model captions, and where; return their group."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        nargs="+",
        action="append",
        type=Path,
        required=True,
        metavar="FILE",
        help="what `captioner fit` wrote; several of the same words choose each word by their mean probability",
    )
    model.add_argument(
        "--encoder",
        metavar="PACKAGE:CLASS",
        help="the encoder's class, for a checkpoint that was trained with one of your own",
    )
    model.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, ...")
    return model


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Define the options that say how captions are found."""
    decoding = parser.add_argument_group("decoding")
    for flag in DECODING:
        kind: dict[str, Any] = {"type": flag.type, "metavar": flag.metavar}
        if flag.type is bool:
            kind = {"action": "store_true"}
        elif flag.type is _words:
            kind["action"] = "extend"
        decoding.add_argument(flag.name, dest=flag.field, default=argparse.SUPPRESS, help=flag.help, **kind)


def understand(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse the command's arguments, and see to what can be seen to without a model.

    Options that take one value or more swallow paths that follow them. Those that cannot be meant for them are given
    back: after --checkpoint a folder, or a name that ends otherwise than the first; after --sidecar what is no
    extension.

    Raises
    ------
    InputError
        Where they do not fit together.
    """
    options = parse(parser, args)
    if options.sidecar is not None and not re.fullmatch(r"\.\w+", options.sidecar):
        options.paths.append(options.sidecar)
        options.sidecar = ".txt"
    if not options.paths:
        raise InputError("There is no PATH: name images or folders first, as in 'captioner caption holiday/ ...'.")
    if options.sidecar is None and (options.before is not None or options.after is not None):
        raise InputError(
            "--prefix and --suffix stand around the captions of sidecar files: give --sidecar, too, or tell the model "
            "how to begin by --begin-with."
        )
    if options.format is not None and options.output is None:
        raise InputError("--format is that of the file: give --output FILE, too.")
    for flag, value, least in (("--batch-size", options.batch_size, 1), ("--workers", options.workers, 0)):
        if value < least:
            raise InputError(f"{flag} is {value}: it must be at least {least}.")
    if options.output is not None:
        check_writable(options.output)
        options.format = options.format or format_of(options.output)
    return options


def parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse arguments of which some are paths, and some follow --checkpoint, which takes several.

    A checkpoint that cannot be meant to be one is given back as a path: a folder, or what ends otherwise than the
    first.
    """
    # What stands after -- is a path, though it begin with a dash; parse_intermixed_args takes it for options.
    before, after = (list(args), []) if "--" not in args else (args[: args.index("--")], args[args.index("--") + 1 :])
    options = parser.parse_intermixed_args(list(before))
    options.paths += after
    members = []
    for first, *others in options.checkpoint:
        members.append(first)
        for path in others:
            if path.suffix == first.suffix and not path.is_dir():
                members.append(path)
            else:
                options.paths.append(str(path))
    options.checkpoint = members
    return options


def run(options: argparse.Namespace, open_model: Callable[[], Captioner | Ensemble]) -> int:
    """Caption images.

    Parameters
    ----------
    options
        From `understand`.
    open_model
        Opens the checkpoints; called when all else has been looked at.

    Returns
    -------
    int
        The exit code: 1 where an image could not be read, 130 where the user interrupted.

    Raises
    ------
    InputError
        Where an option, a checkpoint or a file cannot be used.
    """
    work = _Work(options, _find(options.paths), decoding_of(options))
    with ExitStack() as held:
        todo = work.begin(held)
        try:
            if todo:
                work.caption(todo, checked(open_model(), work.decoding))
            return work.end()
        except KeyboardInterrupt:
            say(work.interrupted())
            return 130


def _find(paths: Sequence[str]) -> list[Path]:
    """Find images, or else files of regions, which some models see in place of images."""
    from captioner.images import find_images

    try:
        return find_images(paths)
    except InputError:
        with suppress(InputError):
            return find_images(paths, REGIONS)
        raise


def decoding_of(options: argparse.Namespace) -> Decoding:
    """Return how captions are to be found, by the options of `add_decoding`.

    Raises
    ------
    InputError
        Where they do not fit together.
    """
    from captioner.decoding import Decoding

    given = {flag.field: value for flag in DECODING if (value := getattr(options, flag.field, None)) is not None}
    try:
        return Decoding(**given)
    except InputError as error:
        raise InputError(_in_flags(str(error))) from error


def checked(model: Captioner | Ensemble, decoding: Decoding) -> Captioner | Ensemble:
    """Return a model that can keep the limits of a decoding.

    Raises
    ------
    InputError
        Where it cannot, as where it does not know what captions are to begin with.
    """
    from captioner.model import limits_of

    try:
        limits_of(decoding, model.captioners[0].vocabulary)
    except InputError as error:
        raise InputError(_in_flags(str(error))) from error
    return model


def _in_flags(sentence: str) -> str:
    """Call what are `fields` in Python what they are on the command line."""
    flags = {f"`{flag.field}`": flag.name for flag in DECODING}
    return re.sub(r"`\w+`", lambda found: flags.get(found[0], found[0]), sentence)


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def say(sentence: str, progress: Progress | None = None) -> None:
    """Print a line to standard error, above the bar if there is one."""
    line = f"captioner: {in_one_line(sentence)}"
    if progress is not None and not progress.disable:
        progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def saying_of_fonts(progress: Progress | None = None) -> Iterator[None]:
    """Print what is to be said of fonts as the command's own sentence, once."""
    from captioner.fonts import FontWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", FontWarning)
        others, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, FontWarning):
                others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                say(str(message), progress)

        warnings.showwarning = show
        yield


class _Work:
    """What is to be captioned, and where to; and how far it is."""

    def __init__(self, options: argparse.Namespace, paths: Sequence[Path], decoding: Any) -> None:
        self.options, self.paths, self.decoding = options, list(paths), decoding
        self.printed = options.output is None and options.sidecar is None
        self.output: CaptionFile | None = None
        self.sidecars: Sidecars | None = None
        self.pictures: dict[Path, Path] = {}
        self.listed: set[Path] = set()  # images that are still to go into the file
        self.done = 0
        self.failed: set[Path] = set()
        if options.overlay is not None:
            self.pictures = self._choose_pictures(options.overlay)
        if options.sidecar is not None:
            self.sidecars = Sidecars(options.sidecar, options.before or "", options.after or "")
            self._check_sidecars(self.sidecars)
        if options.overlay is not None:
            make_folder(options.overlay)
        if options.output is not None:
            form = FORMATS[options.format](options.output, decoding.captions)
            form.check(self.paths)
            self.output = CaptionFile(form, self._settings())

    def _settings(self) -> dict[str, object]:
        """Return all that decides captions, and how they are written; but for what is as it is by default."""
        options, decoding = self.options, asdict(self.decoding)
        # Which precision is faster is found by timing, and a run goes on in the one that it was begun in.
        begun = settings_of(options.output, options.overwrite).get("precision")
        options.precision = options.precision or begun or _faster_precision(options.device)
        for name in ("beam_size",) if self.decoding.sample else ("seed",):
            del decoding[name]  # which is idle
        return {
            "format": options.format,
            "checkpoints": [_fingerprint(path) for path in options.checkpoint],
            "precision": options.precision,
            **({"encoder": options.encoder} if options.encoder else {}),
            **({"compile": f"for batches of {options.batch_size}"} if options.compile else {}),
            **{name: value for name, value in decoding.items() if value != getattr(type(self.decoding), name)},
        }

    def _choose_pictures(self, folder: Path) -> dict[Path, Path]:
        """Name the overlay of each image, and keep those of an earlier run from getting captions themselves.

        They are among the images when a folder is captioned that holds the one for overlays, or is it.
        """
        named = {os.path.realpath(path) for path in self.options.paths}
        inside = [
            path
            for path in self.paths
            if path.suffix == ".png"
            and os.path.realpath(path.parent) == os.path.realpath(folder)
            and os.path.realpath(path) not in named
        ]
        names = set(picture_names([path for path in self.paths if path not in set(inside)]).values())
        left = {path for path in inside if path.name in names}
        self.paths = [path for path in self.paths if path not in left]
        pictures = {path: folder / name for path, name in picture_names(self.paths).items()}
        images = {os.path.realpath(path): path for path in self.paths}
        for picture in pictures.values():
            if (image := images.get(os.path.realpath(picture))) is not None:
                raise InputError(f"--overlay {folder} would replace the image {image}: give a folder of its own.")
        if left:
            say(f"{counted(len(left))} in {folder}, where overlays go, {_are(len(left))} left out.")
        return pictures

    def _check_sidecars(self, sidecars: Sidecars) -> None:
        """Keep text from images' names, and two images from one name; see before the work that all can be written."""
        if sidecars.extension.lower() in chain.from_iterable(SUFFIXES.values()):
            raise InputError(
                f"--sidecar {sidecars.extension} is what images are called, and would replace some: choose another "
                "extension, such as .txt."
            )
        owners: dict[Path, Path] = {}
        shared = []
        for path in self.paths:
            sidecar = sidecars.path(path)
            if owners.setdefault(sidecar, path) != path:
                shared.append(path)
        for folder in {sidecar.parent: sidecar for sidecar in owners}.values():
            check_writable(folder)
        if shared:
            first = sidecars.path(shared[0])
            say(
                f"{counted(len(shared))} would share a text file with another, as {shared[0]} with {owners[first]}: "
                "the first of them has it."
            )
        self.owners = owners

    def begin(self, held: ExitStack) -> list[Path]:
        """Return the images to caption. The file is kept from other processes until `held` is closed."""
        if self.output is not None:
            held.enter_context(self.output.held())
            todo = self.output.begin(self.paths, self.options.overwrite)
            self.listed = set(todo)
            if self.output.gone:
                gone = self.output.gone
                say(f"{counted(gone)} {_are(gone)} no longer there: their captions leave {self.output.file}.")
            if self.output.edited:
                say(f"{self.output.file} was changed since it was written, and is left as it is.")
            if not self.options.overwrite:
                # Of a complete file, whose captions are found again for what is now wanted beside it.
                todo += [path for path in self.paths if path not in self.listed and self._lacks_files(path)]
        elif self.printed:
            todo = self.paths
        else:
            todo = [path for path in self.paths if self._lacks_files(path)]
        self.done = len(self.paths) - len(todo)
        if self.done and (self.output is not None or self.sidecars is not None):
            anew = "" if self.options.overwrite else "; --overwrite captions them anew"
            say(f"{self.done:,} of {counted(len(self.paths))} {_are(self.done)} done already{anew}.")
        return todo

    def _lacks_files(self, path: Path) -> bool:
        picture = self.pictures.get(path)
        return self._wants_sidecar(path) or (picture is not None and (self.options.overwrite or not picture.exists()))

    def _wants_sidecar(self, path: Path) -> bool:
        if self.sidecars is None:
            return False
        sidecar = self.sidecars.path(path)
        changed = self.output is not None and path in self.output.changed  # and its text no longer that of the file
        return self.owners[sidecar] == path and (self.options.overwrite or changed or not sidecar.exists())

    def caption(self, todo: Sequence[Path], model: Any) -> None:
        """Caption images, and hand the captions on batch by batch."""
        from captioner.fast_captioner import FastCaptioner
        from captioner.image_stream import read_images
        from captioner.region_files import read_region_files

        options, region_dim = self.options, model.region_dim
        if region_dim is not None and self.pictures:
            raise InputError("--overlay draws on images, and this model sees regions without a place: leave it out.")
        compiled_for = options.batch_size if options.compile else None
        options.precision = options.precision or _faster_precision(options.device)
        fast = FastCaptioner(model, options.precision, compiled_for=compiled_for)
        expected = math.ceil(len(self.paths) / options.batch_size)
        with (
            progress_bar(self.printed) as progress,
            saying_of_fonts(progress) if self.pictures else nullcontext(),
            closing(
                read_images(todo, model.preprocessings, options.workers, options.batch_size)
                if region_dim is None
                else read_region_files(todo, region_dim, options.batch_size)
            ) as batches,
            closing(fast.work_through(batches, partial(self._caption_batch, fast), expected)) as captioned,
        ):
            bar = progress.add_task("Captioning", total=len(self.paths), completed=self.done)
            for outcomes, found in captioned:
                for path, captions in found:
                    outcomes[path] = self._hand_on(path, captions, model.preprocessings[0])
                for outcome in outcomes.values():
                    if outcome.fault:
                        self.failed.add(outcome.image)
                        say(outcome.fault, progress)
                if self.output is not None and (
                    listed := [outcome for path, outcome in outcomes.items() if path in self.listed]
                ):
                    self.output.add(listed)
                self.done += len(outcomes)
                progress.advance(bar, len(outcomes))

    def _caption_batch(
        self, fast: Any, batch: Sequence[tuple[int, Path, Any]]
    ) -> tuple[dict[Path, Outcome], list[tuple[Path, Any]]]:
        """Return all images, with what is wrong with them if anything is, and the captions of the others."""
        import torch

        from captioner.region_files import pad_regions

        outcomes, readable = {}, []
        for _, path, given in batch:
            outcomes[path] = Outcome(path)
            if isinstance(given, InputError):
                outcomes[path] = Outcome(path, fault=in_one_line(given))
            else:
                readable.append((path, given))
        if not readable:
            return outcomes, []
        each_way = zip(*(given for _, given in readable), strict=True)
        if fast.model.region_dim is None:
            seen = fast.annotate_pixels([torch.stack(squares) for squares in each_way])
        else:
            seen = fast.model.annotate_regions(pad_regions(next(each_way)))
        # What is drawn for an image follows from its name, whatever else is captioned with it.
        numbers = [zlib.crc32(os.fsencode(path.name)) for path, _ in readable]
        found = fast.caption_seen(seen, self.decoding, numbers=numbers, with_attention=bool(self.pictures))
        return outcomes, [(path, captions) for (path, _), captions in zip(readable, found, strict=True)]

    def _hand_on(self, path: Path, captions: Sequence[Any], preprocessing: Any) -> Outcome:
        """Draw, print, and write beside the image what is wanted of its captions."""
        outcome = Outcome(path, [(caption.text, caption.log_probability) for caption in captions])
        if path in self.pictures:
            from captioner.images import read_image
            from captioner.overlay import draw_overlay

            try:
                image = read_image(path)
            except InputError as error:  # it was there a moment ago
                return Outcome(path, fault=in_one_line(error))
            _save(draw_overlay(image, captions[0], preprocessing), self.pictures[path])
        if self.sidecars is not None and self._wants_sidecar(path):
            self.sidecars.write(outcome)
        if self.printed:
            for text, _ in outcome.captions:
                print(f"{_printable(path)}\t{without_control(text)}", flush=True)
        return outcome

    def end(self) -> int:
        """Complete the file, say what failed, and return the exit code."""
        if self.output is not None:
            self.output.finish(self.paths)
            self.failed |= set(self.output.failed)
        if self.failed:
            where = f"; {self.output.failures} lists them" if self.output is not None and self.output.failed else ""
            say(f"{len(self.failed):,} of {len(self.paths):,} images could not be read{where}.")
        return 1 if self.failed else 0

    def interrupted(self) -> str:
        """Return what the user is told."""
        if self.printed:
            return "interrupted."
        anew = self.output is None and self.options.overwrite
        then = "with --overwrite the same command begins anew" if anew else "the same command goes on from there"
        return f"interrupted after {self.done:,} of {counted(len(self.paths))}: {then}."


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a file name for each image's overlay: its own, and where several have it, one with a hash of the path.

    So a name never passes from one image to another, whatever images there are more of the next time.
    """
    times = Counter(path.stem for path in paths)
    return {
        path: f"{path.stem}.png" if times[path.stem] == 1 else f"{path.stem}-{zlib.crc32(os.fsencode(path)):08x}.png"
        for path in paths
    }


def make_folder(path: Path) -> None:
    """Make a folder that may exist.

    Raises
    ------
    InputError
        If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {path} cannot be made ({error.strerror}): give another one.") from error


def _save(picture: Any, path: Path) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    try:
        picture.save(unfinished, format="PNG")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path.parent} takes no picture ({error.strerror}): choose another folder.") from error


def _fingerprint(path: Path) -> str:
    """Return what tells a checkpoint from others, whatever it is called."""
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}: give the file whose path 'captioner fit' prints at its end.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _faster_precision(device: str) -> str:
    import torch

    from captioner.precision import faster_precision

    try:
        return str(faster_precision(torch.device(device))).removeprefix("torch.")
    except (RuntimeError, AssertionError):  # there is no such device, as opening the model will say
        return "float32"


def _printable(path: Path) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return in_one_line(path).encode(encoding, "backslashreplace").decode(encoding)


def progress_bar(printed: bool) -> Progress:
    """Return a bar for a terminal. Captions that are printed go above it, or into a file or a pipe without it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} images/s")

    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        redirect_stdout=printed and sys.stdout.isatty(),
    )
