"""What the table of a study says, printed, as markdown and drawn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_study_results import RESULT

from captioner.metrics import Comparison
from captioner.study import Row, Study
from captioner.study_results import Estimate, Line
from captioner.study_table import Report, markdown, show, write_report

ROWS = (
    Row("additive", "score function", (1, 2), ()),
    Row("dot | product", "score function", (1,), ()),
    Row("better", "[decoder]", (1,), ()),
    Row("blind", "baseline", (1,), ()),
)


def line(row, value, *, each=None, difference=None, cost=None):
    estimate = Estimate(value, value - 0.02, value + 0.03)
    bleu_4 = Estimate(value / 2, value / 2 - 0.01, value / 2 + 0.01)
    of_seeds = each or [value]
    results = [replace(RESULT, entropy=None if cost is None else 0.75, minutes=k + 1.0) for k in range(len(of_seeds))]
    return Line(row, results, of_seeds, estimate, bleu_4, cost, difference)


def report(images=1000, missing=("blind, seed 2",)):
    lines = [
        line(ROWS[0], 0.42, each=[0.4137, 0.4263], cost=Estimate(0.07, 0.05, 0.09)),
        line(ROWS[1], 0.41, difference=Comparison(-0.01, -0.03, 0.01), cost=Estimate(0.06, 0.04, 0.08)),
        line(ROWS[2], 0.45, difference=Comparison(0.03, 0.01, 0.05), cost=Estimate(0.01, -0.0001, 0.02)),
        line(ROWS[3], 0.35, difference=Comparison(-0.07, -0.09, -0.05)),
    ]
    study = Study(Path("configs/recipe.yaml"), {"trainer.max_epochs": 8}, "additive", ROWS)
    return Report(study, lines, [1.234, 0.8, 2.5, 0.4], images, list(missing))


def test_markdown_has_every_figure_and_all_that_was_done():
    text = markdown(report(), "study.png")
    table = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in table}) == 1
    assert table[2:] == [
        "| score function | additive | 42.0 (40.0 to 45.0) | 21.0 (20.0 to 22.0) | reference |  | 7.0 (5.0 to 9.0) "
        "| 0.75 | 1.23 | 0.00 | 2: 41.4 to 42.6 |",
        "|  | dot \\| product | 41.0 (39.0 to 44.0) | 20.5 (19.5 to 21.5) | -1.0 (-3.0 to +1.0) | not told apart "
        "| 6.0 (4.0 to 8.0) | 0.75 | 0.80 | 0.00 | 1 |",
        "| [decoder] | better | 45.0 (43.0 to 48.0) | 22.5 (21.5 to 23.5) | +3.0 (+1.0 to +5.0) | higher "
        "| 1.0 (0.0 to 2.0) | 0.75 | 2.50 | 0.00 | 1 |",
        "| baseline | blind | 35.0 (33.0 to 38.0) | 17.5 (16.5 to 18.5) | -7.0 (-9.0 to -5.0) | lower |  |  | 0.40 "
        "| 0.00 | 1 |",
    ]
    assert RESULT.command in text and "trainer.max_epochs 8" in text and "recipe.yaml" in text
    assert "1,000 images" in text and "beam of 3" in text and RESULT.encoder in text and RESULT.data in text
    assert (
        "1.0 to 2.0 minutes" in text
        and "3 epochs" in text
        and "made 2026-01-31." in text
        and "over images alone" in text
    )
    assert "Missing: blind, seed 2." in text and "(study.png)" in text


def test_few_images_tell_nothing_apart():
    few = report(images=29, missing=())
    assert all(few.verdict(one) == "" for one in few.lines)
    text = markdown(few, "study.png")
    assert "29 images are too few" in text and "Missing" not in text


def test_what_is_printed():
    console = Console(record=True, width=200)
    show(report(), console)
    text = console.export_text()
    for said in (
        "dot | product",
        "42.0 [40.0,45.0]",
        "+3.0 [+1.0,+5.0]",
        "not told apart",
        "2: 41.4 to 42.6",
        "Missing",
    ):
        assert said in text


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_picture_is_grey_and_shows_what_is_there(tmp_path):
    whole = report()
    write_report(whole, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.md", "study.png"]
    drawn = pixels(tmp_path / "study.png")
    assert np.ptp(drawn, axis=2).max() <= 16 and drawn.shape[1] == 1950
    assert (drawn[0] == 255).all() and (drawn[-1] == 255).all() and (drawn[:, 0] == 255).all()  # nothing is cut off

    band = np.array([0xE3, 0xE3, 0xE8])

    def share_of_band(lines):
        write_report(whole._replace(lines=lines, milliseconds=whole.milliseconds[: len(lines)]), tmp_path)
        return (pixels(tmp_path / "study.png") == band).all(2).mean()

    without = share_of_band(whole.lines[1:])  # the grid has its colour, and so has the key
    assert share_of_band(whole.lines) > 0.05 > without
    wide = whole.lines[0]._replace(cider_d=Estimate(0.42, 0.36, 0.47))
    assert share_of_band([wide, *whole.lines[1:]]) > 1.5 * share_of_band(whole.lines)


@pytest.mark.parametrize("count", [1, 4])
def test_a_picture_of_any_number_of_rows(count, tmp_path):
    whole = report()
    write_report(whole._replace(lines=whole.lines[:count], milliseconds=whole.milliseconds[:count]), tmp_path)
    assert pixels(tmp_path / "study.png").shape[0] > 250 + 60 * count
