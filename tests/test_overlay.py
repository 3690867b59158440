import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import Caption
from captioner.overlay import PANEL, attention_map, draw_overlay

CROP, SQUASH = Preprocessing("crop", 224, 256), Preprocessing("squash", 224)


def caption_of(text, grid=(7, 7), gates=True, seed=0):
    words = text.split()
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(len(words), grid[0] * grid[1], generator=generator).pow(4)
    return Caption(
        text=text,
        words=words,
        log_probability=-1.0,
        score=-1.0,
        attention=attention / attention.sum(dim=1, keepdim=True),
        grid=grid,
        gates=torch.rand(len(words), generator=generator) if gates else None,
    )


def attending_to(weights, grid):
    return replace(caption_of("word", grid), attention=torch.tensor(weights, dtype=torch.float32)[None])


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 64), (1000, 1000)])
@pytest.mark.parametrize("preprocessing", [CROP, SQUASH])
def test_the_peak_lies_in_the_region_attended_to(preprocessing, size):
    grid = (3, 4)
    for region, (left, top, right, bottom) in enumerate(preprocessing.region_boxes(*size, grid)):
        attention = attention_map(attending_to(np.eye(12)[region], grid), 0, size, preprocessing)
        row, column = np.unravel_index(attention.argmax(), attention.shape)
        assert left < column + 0.5 < right and top < row + 0.5 < bottom
        # Cubic convolution spreads a single region's weight over its neighbours, and keeps most of it at home.
        home = attention[round(top) : round(bottom), round(left) : round(right)].sum()
        assert 0.4 < home < 1


@pytest.mark.parametrize("size", [(300, 200), (64, 97), (1, 5000)])
@pytest.mark.parametrize("preprocessing", [CROP, SQUASH])
def test_a_map_sums_to_one_and_is_zero_where_nothing_was_seen(preprocessing, size):
    attention = attention_map(caption_of("two words", (14, 14)), 1, size, preprocessing)
    assert attention.shape == size[::-1]
    assert attention.min() >= 0 and np.isclose(attention.sum(), 1)
    left, top, right, bottom = preprocessing.visible_box(*size)
    outside = np.ones(size[::-1], dtype=bool)
    outside[int(top + 1e-9) : int(np.ceil(bottom - 1e-9)), int(left + 1e-9) : int(np.ceil(right - 1e-9))] = False
    assert outside.any() == (preprocessing is CROP)
    assert np.all(attention[outside] < 1e-12)


def test_equal_weights_make_an_even_map():
    attention = attention_map(attending_to(np.full(49, 1 / 49), (7, 7)), 0, (300, 200), SQUASH)
    assert np.allclose(attention, 1 / 60_000)


def test_the_map_passes_through_the_weights():
    # With one pixel per region, pixel centres are region centres: nothing is left to interpolate.
    weights = np.random.default_rng(0).dirichlet(np.ones(12))
    attention = attention_map(attending_to(weights, (3, 4)), 0, (4, 3), SQUASH)
    assert np.allclose(attention, weights.reshape(3, 4), atol=1e-7)


@pytest.mark.parametrize(("words", "columns", "rows"), [(3, 4, 1), (12, 5, 3), (20, 6, 4)])
def test_panels_wrap(words, columns, rows):
    picture = draw_overlay(Image.new("RGB", (96, 96)), caption_of(" ".join(["word"] * words)), SQUASH)
    assert picture.mode == "RGB"
    assert columns * PANEL < picture.width < columns * (PANEL + 30)
    assert rows * PANEL < picture.height < rows * (PANEL + 60) + 130


@pytest.mark.parametrize("size", [(96, 96), (640, 480), (3000, 300), (2, 900)])
def test_any_image_gives_panels_of_one_size(size):
    picture = draw_overlay(Image.new("L", size), caption_of("one two three"), CROP)
    assert 500 < picture.width < 1200 and picture.height < 450


def test_what_the_crop_cut_off_is_faded():
    image = Image.new("RGB", (400, 200), (90, 90, 90))
    cropped, whole = (draw_overlay(image, caption_of("word"), preprocessing) for preprocessing in (CROP, SQUASH))
    # In the second panel, near its left edge and half-way down the 125 pixels that the image is high.
    place = (24 + PANEL + 14 + 5, 56 + 62)
    assert min(cropped.getpixel(place)) > 210
    assert min(whole.getpixel(place)) < 150


def test_the_strongest_region_is_the_brightest_place():
    weights = np.full(49, 0.001)
    weights[8] = 1  # second row, second column
    picture = draw_overlay(Image.new("RGB", (96, 96), "black"), attending_to(weights, (7, 7)), SQUASH)
    panel = picture.crop((24 + PANEL + 14, 56, 24 + 2 * PANEL + 14, 56 + PANEL)).convert("L")
    row, column = np.unravel_index(np.asarray(panel).argmax(), (PANEL, PANEL))
    assert PANEL / 7 < row < 2 * PANEL / 7 and PANEL / 7 < column < 2 * PANEL / 7


@pytest.mark.parametrize("text", ["빨간 공을 가진 개", "costs $5 or $6 \\frac{", "supercalifragilistic" * 4, ""])
def test_any_word_can_be_drawn(text):
    with warnings.catch_warnings(action="ignore"):  # of a letter that no installed font has
        picture = draw_overlay(Image.new("RGB", (96, 96)), caption_of(text, gates=False), SQUASH)
    assert picture.width > PANEL


@pytest.mark.slow
def test_drawn_without_a_display():
    # pyplot is what would look for a display.
    code = "import sys, captioner.overlay; assert 'matplotlib.pyplot' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_caption_without_a_map_is_an_error():
    image, caption = Image.new("RGB", (96, 96)), caption_of("one two")
    with pytest.raises(InputError, match="carries no attention"):
        draw_overlay(image, replace(caption, attention=None), SQUASH)
    with pytest.raises(InputError, match="not a grid"):
        attention_map(replace(caption, grid=None), 0, image.size, SQUASH)
