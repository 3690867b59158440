import io
import itertools
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from captioner import fonts
from captioner.errors import InputError
from captioner.fonts import FontWarning
from captioner.images import ORIENTATION, TURNS, Preprocessing, read_image
from captioner.model import Caption
from captioner.overlay import (
    DPI,
    LINE,
    PANEL,
    _spread,
    attention_map,
    draw_overlay,
    make_figure,
    relative_entropy,
    save_figure,
)

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


# From regions to pixels

INVERSE = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(
        st.tuples(st.integers(150, 400), st.integers(60, 150)),  # landscape
        st.tuples(st.integers(60, 150), st.integers(150, 400)),  # portrait
        st.tuples(st.integers(1, 20), st.integers(1, 20)),  # tiny
        st.sampled_from([(1, 300), (300, 2)]),
    ),
    orientation=st.integers(1, 8),
    preprocessing=st.sampled_from(
        [SQUASH, Preprocessing("squash", 100), CROP, Preprocessing("crop", 128), Preprocessing("crop", 96, 200)]
    ),
    grid=st.sampled_from([(7, 7), (14, 14), (3, 5), (12, 4)]),
    view=st.sampled_from(["smooth", "raw"]),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_bright_square_is_found_where_it_is(size, orientation, preprocessing, grid, view, place, tmp_path_factory):
    """The whole way: a turned file, read, made a square, pooled to regions, and back to the pixels of the original."""
    left, top, right, bottom = preprocessing.visible_box(*size)
    half = (right - left) / grid[1] / 2, (bottom - top) / grid[0] / 2  # of a region
    edges = []
    for start, stop, side, share in zip((left, top), (right, bottom), half, place, strict=True):
        last = int(np.floor(stop + 1e-9))  # of the pixels that are seen whole, if there are such
        first = min(int(np.ceil(start - 1e-9)), int(np.ceil(stop - 1e-9)) - 1)
        wide = max(1, round(2 * side))
        begin = first + round(share * max(last - first - wide, 0))
        edges.append((begin, min(begin + wide, round(stop + 0.5))))
    (x0, x1), (y0, y1) = edges
    image = np.zeros((size[1], size[0]), dtype=np.uint8)
    image[y0:y1, x0:x1] = 255
    picture, exif = Image.fromarray(image), Image.Exif()
    exif[ORIENTATION] = orientation
    if orientation in INVERSE:
        picture = picture.transpose(INVERSE[orientation])
    path = tmp_path_factory.getbasetemp() / "square.png"
    picture.save(path, exif=exif)

    upright = read_image(path)
    assert upright.size == size
    pixels = preprocessing.pixels(upright)[:1].double()
    weights = torch.nn.functional.adaptive_avg_pool2d(pixels, grid).flatten()
    assert weights.sum() > 0
    found = attention_map(attending_to((weights / weights.sum()).numpy(), grid), 0, size, preprocessing, view)
    peak = np.argwhere(found >= found.max() * (1 - 1e-9)).mean(axis=0) + 0.5  # of a block, its middle
    for at, truth, side in zip(peak, ((y0 + y1) / 2, (x0 + x1) / 2), half[::-1], strict=True):
        # Half a region, and the half pixel by which no pixel's centre may be nearer.
        assert abs(at - truth) <= max(side, 0.5) + 0.5


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 64), (1000, 1000)])
@pytest.mark.parametrize("preprocessing", [CROP, SQUASH])
def test_the_peak_lies_in_the_region_attended_to(preprocessing, size):
    grid = (3, 4)
    for region, (left, top, right, bottom) in enumerate(preprocessing.region_boxes(*size, grid)):
        attention = attention_map(attending_to(np.eye(12)[region], grid), 0, size, preprocessing)
        row, column = np.unravel_index(attention.argmax(), attention.shape)
        assert left < column + 0.5 < right and top < row + 0.5 < bottom
        # Splines spread a single region's weight over its neighbours, and keep most of it at home.
        home = attention[round(top) : round(bottom), round(left) : round(right)].sum()
        assert 0.4 < home < 1


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 5)])
@pytest.mark.parametrize("preprocessing", [CROP, SQUASH])
def test_the_peak_is_that_of_the_largest_weight_whatever_the_others_are(preprocessing, grid):
    random = np.random.default_rng(0)
    cells = grid[0] * grid[1]
    plateau = np.full(cells, 0.1)
    plateau[[0, *(row * grid[1] + column for row in (1, 2) for column in (1, 2))]] = [1.0, *[0.95] * 4]
    for weights in (plateau, *random.random((20, cells))):
        attention = attention_map(attending_to(weights / weights.sum(), grid), 0, (640, 480), preprocessing)
        left, top, right, bottom = preprocessing.region_boxes(640, 480, grid)[weights.argmax()]
        # Of a pixel that lies beside the centre a little is missing.
        assert attention[int((top + bottom) / 2), int((left + right) / 2)] >= 0.99 * attention.max()


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


@pytest.mark.parametrize("view", ["smooth", "raw"])
def test_equal_weights_make_an_even_map(view):
    attention = attention_map(attending_to(np.full(49, 1 / 49), (7, 7)), 0, (300, 200), SQUASH, view)
    assert np.allclose(attention, 1 / 60_000)


def test_a_raw_map_is_blocks_of_the_regions():
    weights = np.random.default_rng(0).dirichlet(np.ones(12))
    attention = attention_map(attending_to(weights, (3, 4)), 0, (40, 60), SQUASH, "raw")
    assert np.allclose(attention, np.kron(weights.reshape(3, 4), np.ones((20, 10))) / 200, atol=1e-9)
    # A pixel on the edge of two regions has its part of both.
    box = (3.3, 1.7, 29.2, 17.9)
    coarse = _spread(weights.reshape(3, 4), (20, 30), box, "raw")
    fine = _spread(weights.reshape(3, 4), (200, 300), tuple(10 * edge for edge in box), "raw")
    assert np.allclose(coarse, fine.reshape(20, 10, 30, 10).sum((1, 3)), atol=1e-12)


def test_a_view_that_does_not_exist_is_an_error():
    with pytest.raises(InputError, match="no view 'round': choose 'smooth' or 'raw'"):
        attention_map(caption_of("word"), 0, (30, 20), SQUASH, "round")


def test_entropy_is_relative_to_that_of_equal_weights():
    weights = np.array([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]])
    caption = replace(caption_of("a b c d", (2, 2)), attention=torch.tensor(weights))
    last = -(0.7 * np.log(0.7) + 0.3 * np.log(0.1)) / np.log(4)
    assert np.allclose(relative_entropy(caption), [0, 1, 0.5, last])
    assert relative_entropy(attending_to([1.0], (1, 1))) == [1]


def test_the_map_passes_through_the_weights():
    # With one pixel per region, pixel centres are region centres: nothing is left to interpolate.
    weights = np.random.default_rng(0).dirichlet(np.ones(12))
    attention = attention_map(attending_to(weights, (3, 4)), 0, (4, 3), SQUASH)
    assert np.allclose(attention, weights.reshape(3, 4), atol=1e-7)


# Pictures


@pytest.mark.parametrize(("words", "columns", "rows"), [(3, 4, 1), (12, 5, 3), (20, 6, 4)])
def test_panels_wrap(words, columns, rows):
    picture = draw_overlay(Image.new("RGB", (96, 96)), caption_of(" ".join(["word"] * words)), SQUASH)
    assert picture.mode == "RGB"
    assert columns * PANEL < picture.width < columns * (PANEL + 30)
    assert rows * PANEL < picture.height < rows * (PANEL + 60) + 160


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


@pytest.mark.parametrize("size", [(480, 360), (360, 481), (7, 1000)])
def test_of_a_whole_image_all_is_seen(size):
    figure = make_figure(Image.new("RGB", size), caption_of("word"), SQUASH)
    assert not any("not seen" in text.get_text() for text in figure.texts)
    figure = make_figure(Image.new("RGB", size), caption_of("word"), CROP)
    assert any("not seen" in text.get_text() for text in figure.texts)


def test_the_strongest_region_is_the_brightest_place():
    weights = np.full(49, 0.001)
    weights[8] = 1  # second row, second column
    picture = draw_overlay(Image.new("RGB", (96, 96), "black"), attending_to(weights, (7, 7)), SQUASH)
    panel = picture.crop((24 + PANEL + 14, 56, 24 + 2 * PANEL + 14, 56 + PANEL)).convert("L")
    row, column = np.unravel_index(np.asarray(panel).argmax(), (PANEL, PANEL))
    assert PANEL / 7 < row < 2 * PANEL / 7 and PANEL / 7 < column < 2 * PANEL / 7


def second_panel(caption, **more):
    picture = draw_overlay(Image.new("RGB", (96, 96), "black"), caption, SQUASH, **more)
    left = 24 + 2 * (PANEL + 14)
    return np.asarray(picture.crop((left, 56, left + PANEL, 56 + PANEL)).convert("L"), dtype=int)


def test_one_scale_lets_words_be_compared():
    caption = replace(caption_of("far near", (2, 2)), attention=torch.tensor([[1.0, 0, 0, 0], [0.25] * 4]))
    own, shared = (second_panel(caption, shared_scale=scale) for scale in (False, True))
    assert own.min() > 150 and shared.max() < 100  # an even map: all of its own maximum, and a quarter of the other's


def test_a_raw_view_draws_blocks():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    panel = second_panel(replace(caption_of("a b", (2, 2)), attention=weights), view="raw")
    for row, column in itertools.product(range(2), range(2)):
        block = panel[row * 125 : row * 125 + 125, column * 125 : column * 125 + 125]
        assert block.min() == block.max()
    assert len(set(panel[::125, ::125].flatten())) == 4


@pytest.mark.parametrize(
    ("form", "beginning"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("webp", b"RIFF")]
)
def test_a_figure_is_written_in_any_form_and_always_alike(form, beginning, tmp_path):
    image, caption = Image.new("RGB", (60, 40), "red"), caption_of("one two three")
    written = [io.BytesIO(), io.BytesIO()]
    for file in written:
        save_figure(make_figure(image, caption, CROP, detail=1), file, form)
    save_figure(make_figure(image, caption, CROP, detail=1), tmp_path / f"figure.{form.upper()}")
    assert written[0].getvalue() == written[1].getvalue() == (tmp_path / f"figure.{form.upper()}").read_bytes()
    assert written[0].getvalue().startswith(beginning)


def test_the_photograph_of_a_figure_is_not_resampled_again():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2 * PANEL, 2 * PANEL, 3), dtype=np.uint8))
    file = io.BytesIO()
    save_figure(make_figure(image, caption_of("one two three"), SQUASH), file, "png")
    left, top = 2 * 24, 2 * 56
    picture = Image.open(file).convert("RGB").crop((left, top, left + 2 * PANEL, top + 2 * PANEL))
    assert np.array_equal(np.asarray(picture), np.asarray(image))


def test_a_caption_of_twelve_words_is_drawn_in_half_a_second():
    image, caption = Image.new("RGB", (640, 480)), caption_of(" ".join(["word"] * 12), (14, 14))

    def seconds():
        start = time.process_time()
        draw_overlay(image, caption, CROP)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.5


# Letters


@pytest.fixture
def without_fonts(monkeypatch):
    """No font but matplotlib's own."""
    fonts._cover.cache_clear()
    own = next(font for font in fonts.fontManager.ttflist if font.name == fonts.DEFAULT and font.style == "normal")
    monkeypatch.setattr(fonts.fontManager, "ttflist", [own])
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    yield
    fonts._cover.cache_clear()


def test_of_letters_that_no_font_has_it_warns_once(without_fonts):
    caption = caption_of("빨간 공을 가진 개")
    with pytest.warns(UserWarning) as warned:
        draw_overlay(Image.new("RGB", (96, 96)), caption, SQUASH)
    (warning,) = warned
    assert warning.category is FontWarning and "Korean" in str(warning.message)
    with warnings.catch_warnings(action="error"):
        draw_overlay(Image.new("RGB", (96, 96)), caption_of("كلب يركض שלום ёлка"), SQUASH)


@pytest.mark.parametrize("text", ["빨간 공을 가진 개", "costs $5 or $6 \\frac{", "supercalifragilistic" * 4, ""])
def test_any_word_can_be_drawn(text):
    with warnings.catch_warnings(action="ignore"):  # of a letter that no installed font has
        picture = draw_overlay(Image.new("RGB", (96, 96)), caption_of(text, gates=False), SQUASH)
    assert picture.width > PANEL


def test_text_beneath_the_panels_has_its_lines():
    image, caption = Image.new("RGB", (96, 96)), caption_of("one two three")
    plain = make_figure(image, caption, SQUASH)
    figure = make_figure(image, caption, SQUASH, beneath=["another caption", "word " * 60])
    written = [text.get_text() for text in figure.texts]
    wrapped = [line for line in written if line.startswith("word")]
    assert "another caption" in written and " ".join(wrapped).split() == ["word"] * 60 and len(wrapped) > 1
    taller = (figure.get_figheight() - plain.get_figheight()) * DPI
    assert taller == pytest.approx((1 + len(wrapped)) * LINE)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


def test_of_a_caption_without_words_there_is_the_image_and_no_colour_scale():
    figure = make_figure(Image.new("RGB", (96, 96)), caption_of(""), SQUASH, beneath=["a caption"])
    assert [text.get_text() for text in figure.texts] == ["a caption"] and len(figure.artists) == 1


@pytest.mark.parametrize(
    ("text", "leftward"),
    [("كلب يركض على العشب مع كرة حمراء", True), ("a dog كلب on the grass with it", False), ("5 שלום b c d e f", True)],
)
def test_panels_run_as_the_caption_does(text, leftward):
    image = Image.new("RGB", (100, 60), "black")
    caption = caption_of(text, (1, 1))
    figure = make_figure(image, caption, SQUASH, detail=1)
    width = round(figure.get_figwidth() * 100)
    begins = {label.get_text(): round(label.get_position()[0] * width) for label in figure.texts}
    columns = (width - 48 + 14) // (PANEL + 14)
    assert 2 <= columns < len(caption.words) + 1
    for index, word in enumerate(caption.words, 1):
        begin = 24 + index % columns * (PANEL + 14)
        assert begins[word] == (width - begin if leftward else begin)
    assert begins[text] == (width - 24 if leftward else 24)
    picture = np.asarray(draw_overlay(image, caption, SQUASH))
    top = 24 + 32
    photograph, beside = (slice(width - 24 - PANEL, width - 24), slice(24, 24 + PANEL))[:: 1 if leftward else -1]
    assert picture[top : top + 150, photograph].max() == 0 and picture[top : top + 150, beside].max() > 0


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
