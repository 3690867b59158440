import dataclasses
import io
import json
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models import EfficientNet_B1_Weights, ResNet50_Weights
from torchvision.transforms import RandomResizedCrop, functional

from captioner import images
from captioner.errors import InputError, in_one_line
from captioner.images import SUFFIXES, Preprocessing, find_images, random_box, read_image, to_rgb

FITS = [Preprocessing("crop", 224, 256), Preprocessing("crop", 96), Preprocessing("squash", 128)]
SHAPES = [(300, 200), (200, 300), (97, 64), (64, 97), (641, 480), (224, 224), (50, 1000)]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Reading


@pytest.mark.parametrize("image_format", SUFFIXES)
def test_every_format_is_read_as_rgb(tmp_path, image_format):
    path = tmp_path / f"picture{SUFFIXES[image_format][0]}"
    Image.new("RGB", (8, 6), (200, 100, 50)).save(path, image_format)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.allclose(image.getpixel((3, 3)), (200, 100, 50), atol=4)


@pytest.mark.parametrize("dtype_max", [255, 65535])
def test_deep_grey_is_scaled_not_clipped(tmp_path, dtype_max):
    ramp = np.linspace(0, dtype_max, 256).round().reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint8 if dtype_max == 255 else np.uint16)).save(tmp_path / "ramp.png")
    image = np.asarray(read_image(tmp_path / "ramp.png"))
    assert np.array_equal(image, np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))


def test_floating_point_grey_is_stretched(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 3.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(read_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 64, 255]


def test_a_grey_image_of_one_value_is_read(tmp_path):
    Image.fromarray(np.full((2, 2), 7.0, dtype=np.float32)).save(tmp_path / "flat.tif")
    assert read_image(tmp_path / "flat.tif").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_becomes_white(tmp_path, mode):
    channels = len(mode)
    pixels = np.zeros((1, 2, channels), dtype=np.uint8)
    pixels[0, 0, -1] = 255  # opaque black beside transparent black
    Image.fromarray(pixels).save(tmp_path / "half.png")
    assert np.asarray(read_image(tmp_path / "half.png"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "palette.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_cmyk_photograph(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = read_image(tmp_path / "print.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10))
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the left side is the top
    image.save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0) and upright.getpixel((5, 17)) == (0, 0, 0)


def test_a_broken_exif_block_does_not_hide_a_good_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.jpg", exif=b"Exif\0\0not an exif block")
    assert read_image(tmp_path / "exif.jpg").size == (8, 8)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "animated.gif").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [suffixes[0] for suffixes in SUFFIXES.values()])
def test_a_truncated_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"half{suffix}"
    noise(60, 40).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"half\{suffix} is damaged .*replace the file"):
        read_image(path)


def test_what_is_no_image_is_an_error_of_one_sentence(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("A dog runs.")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.ico")
    for path, message in [
        (text, "is not an image"),
        (tmp_path / "other.ico", "is not an image"),  # pillow could, the allow-list does not let it
        (tmp_path, "cannot be opened"),
        (tmp_path / "none.jpg", "No such file"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            read_image(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("limit", [39, 70])  # pillow itself raises above twice its limit and only warns below
def test_too_many_pixels_are_an_error(tmp_path, monkeypatch, limit):
    noise(10, 10).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=f"large.png has more than {limit} pixels"):
        read_image(tmp_path / "large.png")


def test_threads_that_read_at_once_leave_the_warnings_as_they_were(tmp_path, monkeypatch):
    for number in range(8):
        noise(300, 300).save(tmp_path / f"{number}.png")
    noise(400, 400).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120_000)
    before, opened = list(warnings.filters), Image.open

    def slowly(*args, **settings):
        time.sleep(0.002)  # in which another thread comes to the same place
        return opened(*args, **settings)

    monkeypatch.setattr(Image, "open", slowly)

    def refused(path):
        try:
            read_image(path)
        except InputError:
            return True
        return False

    paths = sorted(tmp_path.iterdir()) * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(refused, paths)) == [path.name == "large.png" for path in paths]
    assert warnings.filters == before


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, monkeypatch, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    noise(31, 17).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((31, 17, 3) if orientation > 4 else (17, 31, 3))
    assert np.array_equal(read_image(path), expected)
    monkeypatch.setattr(images, "WHOLE", 0)
    monkeypatch.setattr(images, "STRIP", 100)
    assert np.array_equal(read_image(path), expected)


MODES = {
    "RGB": noise(70, 50),
    "L": noise(70, 50).convert("L"),
    "1": noise(70, 50).convert("1"),
    "P": noise(70, 50).quantize(16),
    "RGBA": Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)),
    "LA": Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 2), dtype=np.uint8)),
    "CMYK": noise(70, 50).convert("CMYK"),
    "I;16": Image.fromarray(np.random.default_rng(0).integers(0, 65536, (50, 70), dtype=np.uint16)),
    "F": Image.fromarray(np.random.default_rng(0).normal(size=(50, 70)).astype(np.float32)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [1, 7])
def test_in_strips_an_image_is_what_it_is_at_once(monkeypatch, mode, step):
    image = MODES[mode]
    assert image.mode == mode
    fits = [Preprocessing("crop", 16, 20), Preprocessing("squash", 24), Preprocessing("crop", 90)]
    whole, squares = to_rgb(image), [fit.pixels(image) for fit in fits]
    monkeypatch.setattr(images, "WHOLE", 0)
    monkeypatch.setattr(images, "STRIP", 70 * step)
    assert np.array_equal(to_rgb(image), whole)
    for fit, square in zip(fits, squares, strict=True):
        assert (fit.pixels(image).int() - square.int()).abs().max() <= 1
        if fit.size < 50:
            # Wider than high: pillow too resamples along the rows first. Up to the rounding of weights.
            assert (fit.pixels(image) != square).float().mean() < 0.01


def test_values_that_are_no_numbers_do_not_stretch_the_others(tmp_path):
    values = np.array([[-1.0, 0.0, 3.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.asarray(read_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 64, 255, 0, 255, 0]


@pytest.mark.parametrize(
    ("name", "settings", "least", "most"),
    [  # bytes a pixel
        ("a.png", {}, 4, 4),
        ("a.jpg", {}, 4, 4),
        ("sharp.jpg", {"progressive": True, "subsampling": 0}, 10, 10),
        ("b.jpg", {"progressive": True}, 7, 7),
        ("a.webp", {}, 16, 16),
        ("a.tif", {}, 4, 4),
        ("turned.tif", {"tiffinfo": {0x0112: 6}}, 8, 8),
        ("strip.tif", {"compression": "tiff_lzw", "tiffinfo": {278: 40}}, 7, 11.5),
    ],
)
def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch, name, settings, least, most):
    noise(60, 40).save(tmp_path / name, **settings)
    monkeypatch.setattr(images, "MEMORY", math.floor(most * 60 * 40))
    read_image(tmp_path / name)
    monkeypatch.setattr(images, "MEMORY", math.ceil(least * 60 * 40) - 1)
    with pytest.raises(InputError, match=f"{name} takes 0 MB of memory to decode"):
        read_image(tmp_path / name)


def test_a_side_that_is_too_long_is_refused(tmp_path):
    Image.new("1", (1, 65_536)).save(tmp_path / "tall.png")
    with pytest.raises(InputError, match="tall.png has a side of 65536 pixels"):
        read_image(tmp_path / "tall.png")


def test_an_image_of_no_size_shows_nothing():
    with pytest.raises(InputError, match="0 x 5 pixels"):
        Preprocessing().pixels(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(
    ("name", "shown"),
    [('강아지 "1" 👩.jpg', '강아지 "1" 👩.jpg'), ("two\nlines", "two\\nlines"), (os.fsdecode(b"\xe9"), "\\udce9")],
)
def test_a_path_is_printable(name, shown):
    assert in_one_line(name) == in_one_line(Path(name)) == shown
    shown.encode()


# Finding


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path):
    for name in ["b.jpg", "a.PNG", "notes.txt", "deep/c.webp", ".hidden.jpg", ".cache/d.jpg", "odd.name"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    in_folder = [tmp_path / name for name in ["a.PNG", "b.jpg", "deep/c.webp"]]
    assert find_images([tmp_path]) == in_folder
    assert find_images([tmp_path / "odd.name", tmp_path / "b.jpg", tmp_path]) == [
        tmp_path / "odd.name",
        tmp_path / "b.jpg",
        tmp_path / "a.PNG",
        tmp_path / "deep/c.webp",
    ]


ALL = ["[1].jpg", "a b.png", "b.jpg", "in/c.jpg", "in/deep/d.PNG", "in/x.jpg/e.jpg"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with some names in it."""
    for name in [
        "b.jpg",
        "a b.png",
        "[1].jpg",
        "notes.txt",
        ".hidden.jpg",
        "in/c.jpg",
        "in/deep/d.PNG",
        "in/x.jpg/e.jpg",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["[1].jpg", "b.jpg"]),
        ("[1].jpg", ["[1].jpg"]),  # a file of that name, not a pattern
        ("[a-b]*", ["a b.png", "b.jpg"]),
        ("i?/*.jpg", ["in/c.jpg", "in/x.jpg/e.jpg"]),
        ("**/*.jpg", ["[1].jpg", "b.jpg", "in/c.jpg", "in/x.jpg/e.jpg"]),
        ("in/**/*.PNG", ["in/deep/d.PNG"]),
        ("**", ALL),
        ("*", ALL),
        (".*.jpg", [".hidden.jpg"]),
        ("{here}/*.png", ["a b.png"]),
    ],
)
def test_a_pattern_is_expanded_as_a_shell_does(folder, pattern, found):
    assert [folder / path for path in find_images([pattern.format(here=folder)])] == [folder / path for path in found]


LISTS = [
    (b"in\n\n  \nb.jpg\na b.png\nnone.jpg\nb.jpg\n", ["in/c.jpg", "in/deep/d.PNG", "in/x.jpg/e.jpg", "b.jpg"]),
    (b"\xef\xbb\xbfb.jpg\r\nnone.jpg\r\na b.png\r\n", ["b.jpg", "none.jpg", "a b.png"]),
    (b"two\nlines.jpg\0[1].jpg\0", ["two\nlines.jpg", "[1].jpg"]),
    (b"b.jpg\n\xff.jpg", ["b.jpg", "\udcff.jpg"]),
]


@pytest.mark.parametrize(("lines", "found"), LISTS)
@pytest.mark.parametrize("given", ["@list.txt", "-"])
def test_a_list_names_what_is_read(folder, monkeypatch, lines, found, given):
    (folder / "list.txt").write_bytes(lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert [str(path) for path in find_images([given])][: len(found)] == found


def test_what_exists_is_meant_by_its_name(folder):
    for name in ("@b.jpg", "-"):
        (folder / name).touch()
    assert find_images(["@b.jpg", "-"]) == [Path("@b.jpg"), Path("-")]


def test_links_are_followed_and_never_in_circles(folder):
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "far.jpg").touch()
    (folder / "a-link").symlink_to("in")
    (folder / "in/deep/up").symlink_to(folder)
    (folder / "in/deep/up-again").symlink_to("..")
    (folder / "in/itself").symlink_to("itself")
    (folder / "in/out").symlink_to(outside)
    (folder / "same.jpg").symlink_to("in/c.jpg")
    found = [str(path) for path in find_images(["."])]
    assert found == [*ALL[:5], "in/out/far.jpg", ALL[5]]
    assert sorted(map(str, find_images(["**/*.[jJpP]*"]))) == sorted(found)


def test_what_cannot_be_read_is_found_and_named(folder):
    (folder / "in/broken.jpg").symlink_to("none")
    os.mkfifo(folder / "in/pipe.jpg")
    found = find_images(["in"])
    assert [path.name for path in found] == ["broken.jpg", "c.jpg", "d.PNG", "pipe.jpg", "e.jpg"]
    for name, reason in [("broken.jpg", "No such file"), ("pipe.jpg", "a pipe"), ("c.jpg", "is empty")]:
        with pytest.raises(InputError, match=f"in/{name} .*{reason}"):
            read_image(folder / "in" / name)


def test_a_folder_that_may_not_be_looked_into_is_found_too(folder, monkeypatch):
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert find_images(["in"]) == [Path("in/c.jpg"), Path("in/deep"), Path("in/x.jpg/e.jpg")]
    with pytest.raises(InputError, match="in/deep cannot be looked into .Permission denied"):
        find_images(["b.jpg", "in/deep"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.jpg", "no file or folder none.jpg"),
        ("two\nlines", r"no file or folder two\\nlines"),
        ("*.gif", r"Nothing matches \*.gif"),
        ("@none.txt", "list none.txt cannot be read .No such file"),
        ("@in", "list in cannot be read .Is a directory"),
        ("@wrong.txt", "No path in wrong.txt exists"),
        ("@blank.txt", "No path in blank.txt exists"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error(folder, given, message):
    (folder / "wrong.txt").write_text("none.jpg\nother.jpg\n")
    (folder / "blank.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=message):
        find_images(["b.jpg", given])


def test_finding_nothing_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no image"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="no file or folder .*missing"):
        find_images([tmp_path / "missing"])


# Preprocessing


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resize", [224, 232, 256])
def test_crop_is_torchvisions(shape, resize):
    image = noise(*shape)
    expected = functional.pil_to_tensor(functional.center_crop(functional.resize(image, [resize]), [224]))
    difference = (Preprocessing("crop", 224, resize).pixels(image).int() - expected.int()).abs()
    # On noise, where a shift by a tenth of a pixel would differ by dozens of levels.
    assert difference.max() <= 2 and difference.float().mean() < 0.35


def test_from_transforms_equals_the_transforms():
    transforms = ResNet50_Weights.IMAGENET1K_V2.transforms()
    preprocessing = Preprocessing.from_transforms(transforms)
    assert preprocessing == Preprocessing("crop", 224, 232)
    image = noise(300, 200)
    assert torch.allclose(
        preprocessing.normalise(preprocessing.pixels(image)[None])[0], transforms(image), atol=2.01 / 255 / 0.224
    )
    with pytest.raises(InputError, match="bicubic"):
        Preprocessing.from_transforms(EfficientNet_B1_Weights.IMAGENET1K_V1.transforms())


def test_normalise_by_hand_and_never_twice():
    preprocessing = Preprocessing(size=1, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    normalised = preprocessing.normalise(pixels)
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised.flatten(), torch.tensor([1.0, -1.0, 0.2]))
    with pytest.raises(ValueError, match="uint8"):
        preprocessing.normalise(normalised)


def test_the_inverse_by_hand():
    # 300 x 200 becomes 348 x 232 and is cropped at (62, 4): one pixel of the square is 200 / 232 of the original.
    crop, scale = Preprocessing("crop", 224, 232), 200 / 232
    visible = [62 * scale, 4 * scale, 286 * scale, 228 * scale]
    assert np.allclose(crop.visible_box(300, 200), visible)
    boxes = crop.region_boxes(300, 200, (7, 7))
    assert boxes.shape == (49, 4)
    assert np.allclose(boxes[0], [62 * scale, 4 * scale, 94 * scale, 36 * scale])
    assert np.allclose(boxes[8], [94 * scale, 36 * scale, 126 * scale, 68 * scale])  # second row, second column
    assert np.allclose(boxes[48][2:], visible[2:])

    squash = Preprocessing("squash", 224)
    assert squash.visible_box(300, 200) == (0, 0, 300, 200)
    assert np.allclose(squash.region_boxes(300, 200, (2, 3))[4], [100, 100, 200, 200])


def test_the_inverse_uses_the_rounded_sizes():
    # 333 x 500 -> 224 x 336 (336.336 cut): the axes differ in scale.
    left, top, right, bottom = Preprocessing("crop", 224).visible_box(333, 500)
    assert (left, right) == (0, 333)
    assert math.isclose(top, 56 * 500 / 336) and math.isclose(bottom, 280 * 500 / 336)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (641, 480), (224, 224)])
@pytest.mark.parametrize("preprocessing", FITS)
def test_a_painted_region_appears_in_its_cell(preprocessing, shape):
    grid = (4, 4)
    cell = preprocessing.size // 4
    for region, box in enumerate(preprocessing.region_boxes(*shape, grid)):
        image = Image.new("RGB", shape)
        image.paste("white", tuple(int(round(edge)) for edge in box))
        brightness = preprocessing.pixels(image)[0].double().view(4, cell, 4, cell).mean(dim=(1, 3)) / 255
        expected = torch.zeros(16, dtype=torch.float64)
        expected[region] = 1
        # Edges of the painted box are whole pixels of the original: at most half a pixel off on each side.
        assert torch.allclose(brightness.flatten(), expected, atol=0.1)


def test_a_strip_of_one_pixel_is_no_trap():
    assert Preprocessing("crop", 224).pixels(Image.new("RGB", (1, 60_000))).shape == (3, 224, 224)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing("crop", 96, 100, mean=(0.1, 0.2, 0.3))
    again = Preprocessing(**json.loads(json.dumps(dataclasses.asdict(preprocessing))))
    assert again == preprocessing and hash(again) == hash(preprocessing)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fit": "stretch"},
        {"size": 0},
        {"size": 224, "resize": 200},
        {"fit": "squash", "resize": 256},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
    ],
)
def test_numbers_that_do_not_fit_are_an_error(wrong):
    with pytest.raises(InputError):
        Preprocessing(**wrong)


# Random parts


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.fit} {fit.size}")
def test_a_part_is_what_torchvision_cuts_out_and_resizes(fit):
    image = noise(320, 240)
    left, top, right, bottom = 31, 20, 281, 220
    found = fit.pixels(image, (left, top, right, bottom)).int()
    size = [fit.size, fit.size]
    wanted = functional.resized_crop(image, top, left, bottom - top, right - left, size)
    difference = (found - functional.pil_to_tensor(wanted).int()).abs()
    assert difference[:, 4:-4, 4:-4].max() <= 1  # at its edges, pillow looks a pixel beyond the part
    assert fit.pixels(image, (0, 0, 320, 240)).shape == found.shape


def test_random_parts_are_spread_as_torchvisions_are():
    width, height, least = 300, 200, 0.4
    boxes = [random_box(width, height, least, seed) for seed in range(3000)]
    ours = torch.tensor([[left, top, right - left, bottom - top] for left, top, right, bottom in boxes]).float()
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    drawn = [RandomResizedCrop.get_params(blank, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor([[left, top, wide, high] for top, left, high, wide in drawn]).float()
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert torch.allclose(ours.quantile(share, dim=0), theirs.quantile(share, dim=0), atol=6)
    area, proportion = ours[:, 2] * ours[:, 3] / (width * height), ours[:, 2] / ours[:, 3]
    assert area.min() > 0.98 * least and proportion.min() > 0.73 and proportion.max() < 1.36


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 900), (900, 2), (30, 20), (20, 30)])
@pytest.mark.parametrize("least", [0.05, 0.8, 0.9999])
def test_a_random_part_lies_within_the_image(width, height, least):
    for seed in range(50):
        left, top, right, bottom = random_box(width, height, least, seed)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert random_box(width, height, least, seed) == (left, top, right, bottom)
