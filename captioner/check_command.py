"""The command `captioner check`: its options, its tables, its file for machines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from captioner import annotation_files
from captioner.dataset_check import Examination, Finding, examine
from captioner.errors import InputError, in_one_line
from captioner.output_files import check_writable, write
from captioner.tokens import TOKENIZERS

SPLITLESS = ("Flickr30k", "COCOCaptions", "CaptionTable", "ImageFolder")  # that may come without splits
FORMATS = ("Flickr8k", "Karpathy", *SPLITLESS)
PLACES = 3  # of each kind that the table shows
EPILOG = (
    "Errors stop training or falsify scores; remarks are what is odd. The exit code is 0 where there is no error, 1 "
    "where there is one, and 2 where there is no dataset."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="a dataset's folder or caption file")
    parser.add_argument("--format", choices=FORMATS, help="its format (default: recognised)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings and figures to a file, too")
    parser.add_argument("--strict", action="store_true", help="remarks set the exit code, too")
    parser.add_argument(
        "--minimum-count",
        type=_number,
        default=5,
        metavar="N",
        help="words that training captions hold less often are unknown, as with data.minimum_count (default 5)",
    )
    parser.add_argument(
        "--references",
        type=_number,
        metavar="N",
        help="captions that each image should have (default: as most have, where nine in ten have as many)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("auto", *TOKENIZERS),
        default="auto",
        help="what cuts captions into words, as data.tokenizer (default: by the script of the training captions)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="where no split comes with the dataset, as data.files.shares (default 0.8 0.1 0.1)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of that split, as data.files.seed (default 0)")
    parser.add_argument(
        "--workers",
        type=_number_or_none,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that decode images (default: one for each core); 0 decodes in this one",
    )


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _number_or_none(text: str) -> int:
    return 0 if text == "0" else _number(text)


def run(options: argparse.Namespace) -> int:
    """Examine a dataset, show what was found, and return the exit code.

    Raises
    ------
    InputError
        If there is no dataset, or the file cannot be written.
    """
    if options.json is not None:
        check_writable(options.json)
    with _bar() as progress:
        examination = examine(
            _opened(options),
            minimum_count=options.minimum_count,
            references=options.references,
            tokenizer=options.tokenizer,
            workers=options.workers,
            progress=progress,
        )
    # The file first: who reads our output may stop reading.
    if options.json is not None:
        write(options.json, json.dumps(as_json(examination), indent=2, ensure_ascii=False) + "\n")
    # A file or a pipe has no width: lines are not broken for it.
    show(examination, Console(width=None if sys.stdout.isatty() else 10**6))
    return 1 if examination.errors or (options.strict and examination.findings) else 0


def _opened(options: argparse.Namespace) -> annotation_files.CaptionFiles:
    path, name = options.dataset, options.format
    split = {key: value for key in ("shares", "seed") if (value := getattr(options, key)) is not None}
    if name is None:
        return annotation_files.AnyFormat(path, **split)
    if split and name not in SPLITLESS:
        raise InputError(f"A dataset of the format {name} has splits of its own: leave out --{' and --'.join(split)}.")
    reader: Callable[..., annotation_files.CaptionFiles] = getattr(annotation_files, name)
    return reader(path.parent, path.name, **split) if path.is_file() else reader(path, **split)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; it is told how many images were read, and of how many."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("Checking images", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show(examination: Examination, console: Console) -> None:
    """Print the splits, the vocabularies, and what was found, grouped by its kind."""
    console.print(f"{examination.dataset}: {examination.format}", highlight=False, markup=False, soft_wrap=True)
    if examination.splits:
        console.print(_splits(examination))
        console.print(_vocabularies(examination))
        console.print(f"Words: {TOKENIZERS[examination.tokenizer]}.", highlight=False, soft_wrap=True)
    if examination.findings:
        console.print(_findings(examination.findings))
    errors, remarks = examination.errors, len(examination.findings) - examination.errors
    images = sum(split.images for split in examination.splits.values())
    captions = sum(split.captions for split in examination.splits.values())
    console.print(
        f"{_counted(errors, 'error')} and {_counted(remarks, 'remark')} on {_counted(images, 'captioned image')} "
        f"and {_counted(captions, 'caption')}.",
        highlight=False,
        soft_wrap=True,
    )


def _splits(examination: Examination) -> Table:
    table = Table()
    for header in ("split", "images", "captions", "words each: mean", "5 %", "median", "95 %", "longest"):
        table.add_column(header, justify="left" if header == "split" else "right")
    for name, split in examination.splits.items():
        percentiles = [f"{words:,}" for words in split.percentiles]
        table.add_row(escape(name), f"{split.images:,}", f"{split.captions:,}", f"{split.mean:.1f}", *percentiles)
    return table


def _vocabularies(examination: Examination) -> Table:
    table = Table()
    names = [name for name in examination.splits if any(name in one.known for one in examination.coverage)]
    for header in ("minimum count", "words", *(f"known in {name}" for name in names)):
        table.add_column(escape(header), justify="right")
    for one in examination.coverage:
        known = (f"{100 * one.known[name]:.1f} %" if name in one.known else "" for name in names)
        table.add_row(str(one.minimum_count), f"{one.words:,}", *known)
    return table


def _findings(findings: list[Finding]) -> Table:
    table = Table(show_lines=True)
    for header in ("", "what", "number", "where"):
        table.add_column(header, justify="right" if header == "number" else "left", overflow="fold")
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    for kind, group in groups.items():
        places = [finding.message for finding in group[:PLACES]]
        if len(group) > PLACES:
            places.append(f"and {len(group) - PLACES:,} more")
        severity = "error" if group[0].is_error else "remark"
        table.add_row(severity, kind, f"{len(group):,}", escape("\n".join(places)))
    return table


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def as_json(examination: Examination) -> dict[str, Any]:
    """Return all that was found as plain JSON; of a place without a line that is null."""
    return {
        "dataset": examination.dataset,
        "format": examination.format,
        "tokenizer": examination.tokenizer,
        "errors": examination.errors,
        "remarks": len(examination.findings) - examination.errors,
        "splits": {
            name: {
                "images": split.images,
                "captions": split.captions,
                "words": {
                    "mean": round(split.mean, 3),
                    **dict(zip(("percentile_5", "median", "percentile_95", "longest"), split.percentiles, strict=True)),
                },
            }
            for name, split in examination.splits.items()
        },
        "vocabulary": [
            {
                "minimum_count": one.minimum_count,
                "words": one.words,
                "known": {name: round(share, 5) for name, share in one.known.items()},
            }
            for one in examination.coverage
        ],
        "findings": [
            {
                "kind": finding.kind,
                "severity": "error" if finding.is_error else "remark",
                "file": None if finding.file is None else in_one_line(finding.file),
                "line": finding.line,
                "message": finding.message,
            }
            for finding in examination.findings
        ],
    }
