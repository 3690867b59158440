"""A study's table, printed and as markdown, and its picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioner.errors import InputError
from captioner.evaluation import FEWEST_TO_COMPARE
from captioner.metrics.bootstrap import RESAMPLES
from captioner.output_files import write
from captioner.study import Study
from captioner.study_results import ROUNDS, WORDS_TIMED, Line

HEADER = ("", "CIDEr-D", "BLEU-4", "difference", "verdict", "uniform costs", "entropy", "ms", "parameters", "seeds")
INK, FAINT, BAND = "#1b1b1f", "#6f6f78", "#e3e3e8"


class Report(NamedTuple):
    """All that a table shows.

    Attributes
    ----------
    study : Study
        What was asked for.
    lines : list of Line
        The rows that are there, in the study's order.
    milliseconds : list of float
        Of a step of each.
    images : int
        That were captioned.
    missing : list of str
        The runs that are not there.
    """

    study: Study
    lines: list[Line]
    milliseconds: list[float]
    images: int
    missing: list[str]

    def verdict(self, line: Line) -> str:
        """Say whether a row differs from the reference, which few images cannot tell."""
        if line.difference is None or self.images < FEWEST_TO_COMPARE:
            return ""
        if not line.difference.distinguishable:
            return "not told apart"
        return "higher" if line.difference.difference > 0 else "lower"

    def cells(self, line: Line, form: str) -> list[str]:
        """Return what stands under :data:`HEADER`, intervals in a form such as "{} ({} to {})"."""

        def figure(found: tuple[float, float, float] | None, sign: str = "") -> str:
            return "" if found is None else form.format(*(f"{100 * value:{sign}z.1f}" for value in found))

        time = self.milliseconds[self.lines.index(line)]
        seeds = str(len(line.each))
        if len(line.each) > 1:
            seeds += f": {100 * min(line.each):.1f} to {100 * max(line.each):.1f}"
        return [
            line.row.name,
            figure(line.cider_d),
            figure(line.bleu_4),
            "reference" if line.row.name == self.study.reference else figure(line.difference, "+"),
            self.verdict(line),
            figure(line.cost),
            "" if line.entropy is None else f"{line.entropy:.2f}",
            f"{time:.2f}",
            f"{line.results[0].parameters / 1e6:.2f}",
            seeds,
        ]

    def notes(self) -> list[str]:
        """Return what one must know to read the table."""
        results = [result for line in self.lines for result in line.results]
        first = results[0]
        budget = ", ".join(f"{name} {value}" for name, value in self.study.budget.items())
        notes = [
            f"{first.data}, {self.images:,} images, captioned with a beam of {first.beam_size} from the epoch of each "
            "run with the best greedy CIDEr-D on these same images.",
            f"Every run: {self.study.recipe.name}{budget and f' with {budget}'}, over which the command's flags "
            f"prevail; {_span([result.epochs for result in results], '')} epochs; encoder and precision: "
            f"{first.encoder}; {_span([result.minutes for result in results], '.1f')} minutes of training; made "
            f"{_span([result.made for result in results], '')}.",
            "Scores are times 100, means over the seeds. Their 95 % intervals are over images alone: "
            f"{RESAMPLES:,} bootstrap samples, the same for all rows. What seeds change is not in them: the last "
            "column has the lowest and the highest CIDEr-D of the seeds; a difference that is no larger may be theirs.",
            f"Difference: CIDEr-D less that of {self.study.reference}, paired by image. A row is higher or lower where "
            "its interval leaves out 0, each row by itself: of twenty rows that are equally good, one is by chance.",
            "Uniform costs: CIDEr-D that is lost when the same captioner's weights are made uniform. Entropy: of the "
            "weights of content words, relative to uniform ones.",
            f"ms: a step of a beam of {first.beam_size} for one image, mean of the first {WORDS_TIMED} words, on a CPU "
            f"(threads: {torch.get_num_threads()}) in float32, median of {ROUNDS} rounds in which the rows take turns.",
            "Parameters: millions, the encoder's left out.",
        ]
        if self.images < FEWEST_TO_COMPARE:
            notes.append(
                f"{self.images} images are too few to tell rows apart: {FEWEST_TO_COMPARE} or more are needed."
            )
        if self.missing:
            notes.append(f"Missing: {'; '.join(self.missing)}.")
        return notes


def _span(values: Sequence[Any], form: str) -> str:
    """Return the lowest and the highest value, or the only one."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def show(report: Report, console: Console) -> None:
    """Print the table and its notes."""
    table = Table(box=SIMPLE_HEAD)
    for header in HEADER:
        table.add_column(header, justify="right" if header else "left", overflow="fold")
    for _, lines in groupby(report.lines, lambda line: line.row.group):
        for line in lines:
            table.add_row(*map(escape, report.cells(line, "{} [{},{}]")))
        table.add_section()
    console.print(table)
    for note in report.notes():
        console.print(note, highlight=False, markup=False)


def markdown(report: Report, picture: str) -> str:
    """Return the table with all that was done as markdown, above the picture of that name."""
    rows = [("kind", "row", *HEADER[1:]), ("---", "---", *["---:"] * (len(HEADER) - 1))]
    for group, lines in groupby(report.lines, lambda line: line.row.group):
        for number, line in enumerate(lines):
            rows.append(("" if number else group, *report.cells(line, "{} ({} to {})")))
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    notes = "\n".join(f"- {note}" for note in report.notes())
    command = report.lines[0].results[0].command
    return (
        f"# What attention is worth\n\nTable made by captioner study on {date.today().isoformat()}:\n\n"
        f"```sh\n{command}\n```\n\n{table}\n\n![CIDEr-D of each row]({picture})\n\n{notes}\n"
    )


def write_report(report: Report, folder: Path) -> None:
    """Write study.md and study.png, each whole or not at all."""
    unfinished = folder / "study.png.tmp"
    draw(report, unfinished)
    try:
        os.replace(unfinished, folder / "study.png")
    except OSError as error:
        raise InputError(f"{folder} takes no picture ({error.strerror}): see to it.") from error
    write(folder / "study.md", markdown(report, "study.png"))


def draw(report: Report, path: Path) -> None:
    """Draw CIDEr-D of each row with its interval, by kind, over a band for the reference."""
    places: list[float] = []  # of the rows, downward
    headings: list[tuple[float, str]] = []
    end = 0.0
    for group, lines in groupby(report.lines, lambda line: line.row.group):
        headings.append((end, group))
        places += [end + 1 + number for number, _ in enumerate(lines)]
        end = places[-1] + 1.5

    names = [line.row.name for line in report.lines]
    # Inches; a letter of 8 points is some 0.065 wide.
    width, per_row, above, below, right = 6.5, 0.2, 0.1, 0.72, 0.15
    left = 0.065 * max(map(len, names)) + 0.35
    height = above + below + end * per_row
    figure = Figure(figsize=(width, height), dpi=300, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)  # without types in matplotlib; needs neither pyplot nor a display
    axes: Any = figure.add_axes(
        (left / width, below / height, 1 - (left + right) / width, 1 - (above + below) / height)
    )
    axes.set_ylim(end - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", color=BAND, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8, labelcolor=INK, color=FAINT)
    axes.set_xlabel("CIDEr-D, 95 % intervals over images", fontsize=8, color=INK)

    labels = blended_transform_factory(figure.transFigure, axes.transData)
    for place, heading in headings:
        axes.text(0.01, place, heading, transform=labels, fontsize=8, weight="bold", va="center_baseline", color=INK)
    for line, place in zip(report.lines, places, strict=True):
        is_reference = line.row.name == report.study.reference
        low, high = 100 * line.cider_d.low, 100 * line.cider_d.high
        if is_reference:
            axes.axvspan(low, high, color=BAND, linewidth=0, zorder=0.5)
            axes.axvline(100 * line.cider_d.value, color=FAINT, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.hlines(place, low, high, color=INK, linewidth=1.2)
        if len(line.each) > 1:
            axes.plot([100 * one for one in line.each], [place] * len(line.each), "|", color=INK, markersize=8)
        told = is_reference or report.verdict(line) in ("higher", "lower")
        face = INK if told else "white"
        axes.plot(100 * line.cider_d.value, place, "D" if is_reference else "o", ms=5, mec=INK, mfc=face, zorder=3)
        axes.text(0.03, place, line.row.name, transform=labels, fontsize=8, va="center_baseline", color=INK)

    def key(marker: str, face: str, label: str) -> Line2D:
        return Line2D([], [], marker=marker, ms=5, mec=INK, mfc=face, linestyle="", label=label)

    keys: list[Line2D | Patch] = [
        key("o", INK, "differs from it"),
        key("o", "white", "not told apart"),
        key("|", INK, "each seed"),
    ]
    if report.study.reference in names:
        keys = [key("D", INK, report.study.reference), Patch(color=BAND, label="its interval"), *keys]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), fontsize=8, frameon=False, handletextpad=0.4)
    canvas.print_png(path)
