"""The command line. Each command imports what it needs, so that help and mistakes are answered at once."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from captioner.errors import InputError, Interrupted, in_one_line
from captioner.output_files import check_writable, write

if TYPE_CHECKING:
    import torch
    from torch import nn

    from captioner.ensemble import Ensemble
    from captioner.model import Captioner

HELP = """\
usage: captioner COMMAND ...

Captions images, and shows where each word came from.

  captioner demo                  train, score, caption and overlay on drawn scenes, in minutes on a CPU
  captioner caption PATH...       caption images with a trained checkpoint
  captioner overlay IMAGE...      see what a checkpoint looks at, as a page or a figure
  captioner app                   the same in a browser, on this machine: drop an image, or type a caption
  captioner fit                   train
  captioner validate, test        score a checkpoint on a split
  captioner check DATASET         find what is wrong with images and captions before they are trained on
  captioner cache                 build, list and clear the cached annotations of frozen encoders
  captioner score                 score any system's captions, and compare two systems
  captioner faithfulness          measure whether a checkpoint uses its attention
  captioner study                 train every row of a table, and see what each kind of attention is worth

  captioner COMMAND --help        the options of a command
"""

CACHES = Path("data/cache")  # as in the recipes
CACHE_HELP = """\
usage: captioner cache build [the flags of captioner fit]
       captioner cache list [DIRECTORY]
       captioner cache clear [DIRECTORY] [FINGERPRINT ...] [--all]

Caches hold what a frozen encoder gives for the images of a split, so that it sees each image once. They lie in the
folder that data.cache names; DIRECTORY is data/cache where none is given.

Four examples:

  captioner cache build --config configs/flickr8k.yaml --data.files.root data/flickr8k
      fills the caches that `captioner fit` with the same flags will find, and trains nothing; where it was stopped, the
      same command goes on

  captioner cache list
      prints what there is, complete or interrupted

  captioner cache clear 0123456789abcdef
      deletes the cache that the list calls so; one that a running process is filling stays

  captioner cache clear other/folder --all
      deletes all caches in that folder, and nothing else in it

  captioner fit --help            the settings of captioner cache build
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    args : sequence of str, optional
        By default those of the process.
    """
    args = sys.argv[1:] if args is None else list(args)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "fit": _train,
        "validate": _train,
        "test": _train,
        "caption": _caption,
        "overlay": _overlay,
        "app": _app,
        "demo": _demo,
        "faithfulness": _faithfulness,
        "score": _score,
        "cache": _cache,
        "check": _check,
        "study": _study,
    }
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from captioner import __version__

        print(f"captioner {__version__}")
        return 0
    if args[0] not in commands:
        print(f"captioner: there is no command {args[0]!r}: choose from {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        return commands[args[0]](args)
    except InputError as error:
        print(f"captioner: {in_one_line(_sentence(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 0
    except Interrupted as end:
        print(f"captioner: {end}", file=sys.stderr)
        return end.code
    except KeyboardInterrupt:
        print("captioner: interrupted.", file=sys.stderr)
        return 130


def _sentence(error: InputError) -> str:
    """Return the message; one that comes out of a loader's process stands at the end of that process's traceback."""
    if "Traceback (most recent call last)" not in str(error):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{InputError.__module__}.InputError: ") if lines else ""


def _train(args: Sequence[str]) -> int:
    from captioner.training import EXAMPLES, train

    if "--help" in args or "-h" in args:
        print(EXAMPLES)
    train(args)
    return 0


def _cache(args: Sequence[str]) -> int:
    commands = {"build": _cache_build, "list": _cache_list, "clear": _cache_clear}
    if not args[1:] or {"-h", "--help"} & set(args):
        print(CACHE_HELP, end="")
        return 0
    if args[1] not in commands:
        raise InputError(f"There is no command 'cache {args[1]}': choose from {', '.join(commands)}.")
    return commands[args[1]](args[1:])


def _cache_build(args: Sequence[str]) -> int:
    from captioner.training import build_caches

    build_caches(args[1:])
    return 0


def _cache_list(args: Sequence[str]) -> int:
    parser = _parser("cache list", "List the cached annotations in a folder.")
    parser.add_argument("directory", type=Path, nargs="?")
    options = parser.parse_args(args[1:])
    directory = _assumed_caches() if options.directory is None else options.directory

    from rich.console import Console

    from captioner.cache_listing import find_caches, show

    caches = find_caches(directory)
    if caches:
        # A file or a pipe has no width: lines are not broken for it.
        show(caches, Console(width=None if sys.stdout.isatty() else 10**6))
    else:
        print(f"There are no caches in {directory}.")
    return 0


def _assumed_caches() -> Path:
    if not os.path.isdir(CACHES):
        raise InputError(
            f"There is no folder {CACHES}, which is assumed where no DIRECTORY is given: give the one that data.cache "
            "names."
        )
    return CACHES


def _cache_clear(args: Sequence[str]) -> int:
    parser = _parser("cache clear", "Delete cached annotations.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(args[1:])

    from captioner.cache_folder import NAME
    from captioner.cache_listing import clear

    directory, names = None, options.names
    if names and not NAME.fullmatch(names[0]):
        directory, names = Path(names[0]), names[1:]
    if options.all == bool(names):
        raise InputError(
            "Say which caches to delete: give either fingerprints, as `captioner cache list` prints them, or --all."
        )
    clear(_assumed_caches() if directory is None else directory, None if options.all else names)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see '{self.prog} --help'.")


def _parser(command: str, description: str, add_help: bool = True) -> _Parser:
    return _Parser(prog=f"captioner {command}", description=description, allow_abbrev=False, add_help=add_help)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="what `captioner fit` wrote")
    parser.add_argument(
        "--encoder",
        metavar="PACKAGE:CLASS",
        help="the encoder's class, for a checkpoint that was trained with one of your own",
    )
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, ...")


def _caption(args: Sequence[str]) -> int:
    from captioner import caption_command

    return _on_images(caption_command, _parser("caption", "Caption images.", add_help=False), args)


def _overlay(args: Sequence[str]) -> int:
    from captioner import overlay_command

    return _on_images(overlay_command, _parser("overlay", "Show what a model looks at.", add_help=False), args)


def _on_images(command: ModuleType, parser: _Parser, args: Sequence[str]) -> int:
    """Run a command whose module says what it is told and what it does, with the checkpoints of its options."""
    command.add_options(parser)
    if {"-h", "--help"} & set(args):
        print(parser.format_help() if "all" in args else command.HELP, end="")
        return 0
    options = command.understand(parser, args[1:])
    code: int = command.run(options, lambda: _open_together(options))
    return code


def _app(args: Sequence[str]) -> int:
    from captioner.app_command import add_options, run, understand

    parser = _parser("app", "Caption images in a browser on this machine, and see what the model looks at.")
    add_options(parser)
    options = understand(parser, args[1:])
    return run(options, lambda: _open_together(options))


def _open(options: argparse.Namespace) -> Captioner:
    from captioner.model import Captioner

    return Captioner.from_checkpoint(
        options.checkpoint, encoder=_foreign_encoder(options.encoder), device=_device(options.device)
    )


def _open_together(options: argparse.Namespace) -> Captioner | Ensemble:
    """Open the checkpoints that write each caption together."""
    first, *others = options.checkpoint
    model = _open(argparse.Namespace(checkpoint=first, encoder=options.encoder, device=options.device))
    if not others:
        return model

    from captioner.ensemble import Ensemble

    return Ensemble.open(model, others)


def _device(name: str) -> torch.device:
    import torch

    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name!r} cannot be used here: choose cpu, or see that {name} works.") from error


def _foreign_encoder(name: str | None) -> nn.Module | None:
    """Import and construct the user's own encoder, which lies on the path or in the current directory."""
    if name is None:
        return None
    import importlib

    package, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        encoder: nn.Module = getattr(importlib.import_module(package), attribute)()
    except Exception as error:  # it is the user's code: whatever it trips over
        raise InputError(
            f"The encoder {name!r} cannot be made ({error}): give package:Class, importable from here and "
            "constructible without arguments."
        ) from error
    finally:
        sys.path.pop(0)
    return encoder


def _faithfulness(args: Sequence[str]) -> int:
    parser = _parser("faithfulness", "Measure whether a checkpoint's captions depend on its attention.")
    _add_checkpoint(parser)
    parser.add_argument(
        "--files", choices=("Flickr8k", "COCOCaptions"), default="Flickr8k", help="form of the captions"
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="where images and captions are")
    parser.add_argument("--split", default="dev", help="which images (default dev)")
    parser.add_argument("--beam-size", type=_positive, default=5, metavar="K", help="hypotheses (default 5)")
    parser.add_argument("--images", type=_positive, metavar="N", help="only the first N images")
    parser.add_argument("--seed", type=_seed, default=0, help="of permutations, hidden regions and the bootstrap")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    options = parser.parse_args(args[1:])
    if options.json is not None:
        check_writable(options.json)

    from captioner import annotation_files

    files = getattr(annotation_files, options.files)(options.root)
    records = files.read(options.split)[: options.images]
    model = _open(options)

    from rich.console import Console

    from captioner.attention_health import show, warn
    from captioner.faithfulness import measure

    report = measure(model, records, beam_size=options.beam_size, seed=options.seed)
    if options.json is not None:
        write(options.json, json.dumps(report.as_json(), indent=2) + "\n")
    # A file or a pipe has no width: lines are not broken for it.
    show(report, options.split, Console(width=None if sys.stdout.isatty() else 160))
    warn(report.health)
    return 0


def _score(args: Sequence[str]) -> int:
    parser = _parser("score", "Score the captions of any system, or compare two systems, as COCO's evaluation does.")
    parser.add_argument(
        "references",
        type=Path,
        metavar="REFERENCES",
        help="a dataset's folder or caption file",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="one or two files with a caption for each image: COCO results, JSON lines or CSV",
    )
    parser.add_argument("--split", metavar="NAME", help="the images of one split only, such as dev")
    parser.add_argument(
        "--train", type=Path, metavar="PATH", help="folder (its split train) or file: how many captions are new?"
    )
    parser.add_argument(
        "--tokenizer",
        choices=("auto", "ptb", "unicode"),
        default="auto",
        metavar="NAME",
        help="ptb (COCO's, English), unicode, or auto: by script",
    )
    parser.add_argument("--meteor", action="store_true", help="METEOR too; needs Java and the extra 'java'")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the bootstrap (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in COCO's units (0.3, not 30)")
    parser.add_argument("--per-image", type=Path, metavar="FILE", help="write the scores of each image as JSON lines")
    options = parser.parse_args(args[1:])
    if len(options.results) > 2:
        raise InputError(f"{len(options.results)} files of results are too many: give one, or two to compare.")
    read = [path for path in (options.references, options.train, *options.results) if path is not None]
    for number, path in enumerate(written := [path for path in (options.json, options.per_image) if path is not None]):
        check_writable(path)
        if path.resolve() in [other.resolve() for other in (*read, *written[:number])]:
            raise InputError(f"The file {path} is named twice: write to one of its own.")

    from rich.console import Console

    from captioner.evaluation import ReferenceCaptions, TrainingCaptions, evaluate
    from captioner.metrics import find_meteor
    from captioner.report import as_json, per_image, remarks, show

    if options.meteor:
        find_meteor()
    references = ReferenceCaptions.read(options.references, options.split, options.tokenizer)
    if options.meteor and references.tokenizer != "ptb":
        raise InputError("METEOR is for English captions: leave out --meteor, or give --tokenizer ptb if they are.")
    evaluation = evaluate(
        references,
        options.results,
        training=None if options.train is None else TrainingCaptions.read(options.train, references.tokenizer),
        with_meteor=options.meteor,
        seed=options.seed,
    )
    # The files first: who reads our output may stop reading.
    if options.json is not None:
        write(options.json, json.dumps(as_json(evaluation), indent=2, ensure_ascii=False) + "\n")
    if options.per_image is not None:
        write(options.per_image, "".join(per_image(evaluation)))
    for line in remarks(evaluation):
        print(f"captioner: {line}", file=sys.stderr)
    # A file or a pipe has no width: lines are not broken for it.
    show(evaluation, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def _check(args: Sequence[str]) -> int:
    from captioner.check_command import add_options, run

    parser = _parser("check", "Find what is wrong with a dataset's images and captions before they are trained on.")
    add_options(parser)
    return run(parser.parse_args(args[1:]))


def _study(args: Sequence[str]) -> int:
    parser = _parser(
        "study", "Train every row of a table with one budget, score them all, and show what each is worth."
    )
    parser.epilog = (
        "Other flags are those of captioner fit and hold in every run, such as --data.files.root data/flickr8k. Runs "
        "that are done are not made again: a command that was stopped goes on, and two on one folder share the runs."
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="such as configs/study.yaml")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study"), metavar="DIR", help="where all goes (default %(default)s)"
    )
    parser.add_argument("--table-only", action="store_true", help="train nothing: make the table of what is there")
    options, flags = parser.parse_known_args(args[1:])

    from captioner.study import Study

    study = Study.read(options.config)

    from captioner.study_runs import make, plan, tabulate

    command = shlex.join(["captioner", *args])
    try:
        complete = options.table_only or make(plan(study, options.output, flags, command), options.output)
    except Interrupted as end:  # which speaks of the one run
        raise Interrupted(f"The study is stopped: to go on, {command}", end.code) from None
    tabulate(study, options.output)
    return 0 if complete else 1


def _demo(args: Sequence[str]) -> int:
    parser = _parser("demo", "Draw scenes, train a captioner on them, score it, and show where its words came from.")
    parser.add_argument(
        "--output", type=Path, default=Path("captioner-demo"), metavar="DIR", help="(default %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=1, metavar="N", help="of scenes and training (default 1)")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="laid over configs/scenes.yaml, such as configs/decoders/transformer.yaml; may be given more than once",
    )
    parser.add_argument("--language", choices=("en", "ko"), default="en", help="of the captions (default en)")
    options = parser.parse_args(args[1:])

    started = time.monotonic()

    from captioner.demo import run

    run(options.output, options.seed, started, options.config, options.language)
    return 0
