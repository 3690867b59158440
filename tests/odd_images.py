"""Writes a folder of good, odd and damaged image files, and says of each what must come of it.

    python tests/odd_images.py FOLDER

prints each name with "read", "refused" or "either" (a flipped bit may hit what nobody looks at).
"""

import io
import os
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

READ, REFUSED, EITHER = "read", "refused", "either"
LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def noise(width, height, channels=3, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def encoded(image, image_format, **settings):
    file = io.BytesIO()
    if "append_images" in settings:  # copies: saving leaves its marks on an image
        settings["append_images"] = [frame.copy() for frame in settings["append_images"]]
    image.copy().save(file, image_format, **settings)
    return file.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height, depth=8, kind=2):
    data = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", data)


def png_bomb(side, kind=2):
    """A whole black PNG in about a thousandth of its size, without ever holding it."""
    length = side * (side * {0: 1, 2: 3, 6: 4}[kind] + 1)
    piece = 2**22
    compress = zlib.compressobj(9, wbits=-15)
    block = compress.compress(bytes(piece)) + compress.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, wbits=-15)
    check = 1
    for _ in range(length // piece):
        check = zlib.adler32(bytes(piece), check)
    tail = bytes(length % piece)
    data = b"\x78\xda" + block * (length // piece) + rest.compress(tail) + rest.flush()
    data += struct.pack(">I", zlib.adler32(tail, check))
    return png_header(side, side, kind=kind) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def bases():
    """One small file for each format, and each way of packing one, by name."""
    colour, grey = Image.fromarray(noise(48, 36)), Image.fromarray(noise(48, 36, 1))
    frames = [Image.fromarray(noise(48, 36, seed=seed)) for seed in (1, 2)]
    deep = Image.fromarray(noise(48, 36, 1, np.uint16))
    return {
        "baseline.jpg": encoded(colour, "JPEG"),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True),
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "colour.png": encoded(colour, "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "lossy.webp": encoded(colour, "WEBP"),
        "lossless.webp": encoded(colour, "WEBP", lossless=True),
        "animated.webp": encoded(colour, "WEBP", save_all=True, append_images=frames, lossless=True),
        "grey.gif": encoded(grey, "GIF"),
        "colour.bmp": encoded(colour, "BMP"),
        "plain.tif": encoded(colour, "TIFF"),
        "lzw.tif": encoded(colour, "TIFF", compression="tiff_lzw"),
        "deep.tiff": encoded(deep, "TIFF"),
        "colour.ppm": encoded(colour, "PPM"),
    }


def damaged(files):
    """Those files cut off at many lengths and with bits flipped: name, content, what must come of it."""
    draw = random.Random(1)
    for name, content in files.items():
        for share in LENGTHS:
            yield f"cut-{share}-{name}", content[: int(share * len(content))], REFUSED
        for number in range(12):
            flipped = bytearray(content)
            for _ in range(1 + number // 3):
                # Every third time at the beginning, where the header is.
                place = draw.randrange(min(64, len(content)) if number % 3 == 0 else len(content))
                flipped[place] ^= 1 << draw.randrange(8)
            yield f"flip-{number}-{name}", bytes(flipped), EITHER


def unusual():
    """Good pictures that many programs trip over: name, content."""
    colour, grey = Image.fromarray(noise(48, 36)), Image.fromarray(noise(48, 36, 1))
    frames = [Image.fromarray(noise(48, 36, seed=seed)) for seed in (1, 2)]
    alpha, with_alpha = Image.fromarray(noise(48, 36, 4)), Image.fromarray(noise(48, 36, 2))
    palette = colour.quantize(16)
    yield "palette.png", encoded(palette, "PNG")
    yield "palette-transparent.png", encoded(palette, "PNG", transparency=3)
    yield "palette-alphas.png", encoded(palette, "PNG", transparency=bytes(range(16)))
    yield "colour-key.png", encoded(colour, "PNG", transparency=(1, 2, 3))
    yield "la.png", encoded(with_alpha, "PNG")
    yield "rgba.png", encoded(alpha, "PNG")
    yield "rgba.webp", encoded(alpha, "WEBP", lossless=True)
    yield "rgba.tif", encoded(alpha, "TIFF")
    yield "one-bit.png", encoded(grey.convert("1"), "PNG")
    yield "one-bit.tif", encoded(grey.convert("1"), "TIFF", compression="group4")
    yield "one-bit.pbm", encoded(grey.convert("1"), "PPM")
    yield "deep.pgm", b"P5 48 36 65535\n" + noise(48, 36, 1, np.uint16).astype(">u2").tobytes()
    yield "text.ppm", b"P3 2 1 255 1 2 3 4 5 6"
    yield "deep-big-endian.tif", encoded(Image.fromarray(noise(48, 36, 1, np.uint16).astype(">u2")), "TIFF")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in noise(48, 36, 3, np.uint16))
    yield (
        "deep-colour.png",
        png_header(48, 36, 16) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""),
    )
    yield "int32.tif", encoded(Image.fromarray(noise(48, 36, 1, np.int32)), "TIFF")
    values = np.random.default_rng(0).normal(size=(36, 48)).astype(np.float32)
    yield "float.tif", encoded(Image.fromarray(values), "TIFF")
    values[0, :3] = np.nan, np.inf, -np.inf
    yield "float-nan.tif", encoded(Image.fromarray(values), "TIFF")
    yield "lab.tif", encoded(Image.merge("LAB", colour.split()), "TIFF")
    yield "cmyk.tif", encoded(colour.convert("CMYK"), "TIFF")
    yield "ycbcr.tif", encoded(colour.convert("YCbCr"), "TIFF")
    adobe = encoded(colour.convert("CMYK"), "JPEG")
    place = adobe.index(b"Adobe")
    yield "ycck.jpg", adobe[: place + 11] + b"\2" + adobe[place + 12 :]
    yield "cmyk-without-adobe.jpg", adobe[: place - 4] + adobe[place + 12 :]
    yield "grey.jpg", encoded(grey, "JPEG")
    yield "phone.jpg", encoded(colour, "MPO", save_all=True, append_images=frames)
    for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
        name = f"animated.{image_format.lower()}"
        yield name, encoded(colour, image_format, save_all=True, append_images=frames)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for image_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield f"turned-{orientation}.{image_format.lower()}", encoded(colour, image_format, exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 9
    yield "turned-9.jpg", encoded(colour, "JPEG", exif=exif)
    for number, block in enumerate(
        [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"no exif at all", b"MM\0*\0\0\0\x08\xff\xff"]
    ):
        yield f"broken-exif-{number}.jpg", encoded(colour, "JPEG", exif=b"Exif\0\0" + block)
    yield "profile.jpg", encoded(colour, "JPEG", icc_profile=b"no profile" * 10_000)
    yield "tall.png", encoded(Image.fromarray(noise(1, 5000)), "PNG")
    yield "wide.png", encoded(Image.fromarray(noise(5000, 1)), "PNG")
    yield "one-pixel.png", encoded(Image.fromarray(noise(1, 1)), "PNG")
    yield "jpeg-called.png", encoded(colour, "JPEG")
    yield "png-called.jpg", encoded(colour, "PNG")
    yield "LOUD.JPG", encoded(colour, "JPEG")


def refused():
    """What is no picture that can be read: name, content."""
    colour = Image.fromarray(noise(48, 36))
    yield "empty.jpg", b""
    yield "empty.png", b""
    yield "text.jpg", b"A dog runs.\n"
    yield "page.png", b"<html><body>404 Not Found</body></html>"
    yield "zeros.jpg", bytes(5000)
    yield "random.png", random.Random(0).randbytes(5000)
    yield "drawing.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    yield "icon.png", encoded(colour, "ICO")
    yield "bomb.png", png_bomb(14_000)
    yield "signature-only.png", b"\x89PNG\r\n\x1a\n"
    yield "header-only.png", png_header(48, 36)
    yield "huge-header.png", png_header(2**31 - 1, 2**31 - 1)
    yield "below-the-limit.png", png_header(9000, 9000) + png_chunk(b"IDAT", zlib.compress(bytes(10)))
    yield "long.png", png_header(1, 80_000_000) + png_chunk(b"IDAT", zlib.compress(bytes(10)))
    yield "no-width.png", png_header(0, 36)
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8), 9))
    picture = encoded(colour, "PNG")
    yield "text-bomb.png", picture[:33] + text + picture[33:]
    jpeg = encoded(colour, "JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    yield "huge-header.jpg", jpeg[:place] + b"\xff\xff\xff\xff" + jpeg[place + 4 :]
    yield "no-height.jpg", jpeg[:place] + b"\0\0" + jpeg[place + 2 :]
    yield "huge-header.gif", b"GIF89a\xff\xff\xff\xff\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;"
    yield (
        "huge-header.bmp",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 10**8, 10**8, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield "huge-header.ppm", b"P6 1000000 1000000 255\n" + bytes(100)
    tiff = encoded(colour, "TIFF")
    place = tiff.index(struct.pack("<HHII", 256, 4, 1, 48))
    yield "huge-header.tif", tiff[: place + 8] + struct.pack("<I", 2**31) + tiff[place + 12 :]
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2
    yield "huge-header.webp", b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x


NAMES = [
    "a name with spaces.jpg",
    " leading and trailing .jpg",
    'it\'s "quoted".jpg',
    "two\nlines.jpg",
    "tab\tand\rreturn.jpg",
    "-rf.jpg",
    "--checkpoint.jpg",
    "@list.jpg",
    "*.jpg",
    "[1].jpg",
    "$HOME `id`;.jpg",
    "back\\slash.jpg",
    "comma, semicolon; percent %s {0}.jpg",
    "강아지.jpg",
    "\u1100\u1161\u11bc.jpg",  # Hangul as it comes from a Mac, letter by letter
    "👩\u200d👧 emoji.jpg",
    "right\u202eto left.jpg",
    b"latin1-\xe9t\xe9.jpg",
    b"\xff\xfe.jpg",
    "x" * 250 + ".jpg",
]


def write_good(folder, count=40):
    """Ordinary photographs; returns what must come of each path."""
    expected = {}
    for number in range(count):
        path = Path(folder) / f"good-{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
        Image.fromarray(noise(100 + number, 140 - number, seed=number)).save(path)
        expected[path] = READ
    return expected


def write_odd(folder):
    """All the others; returns what must come of each path that a search of the folder is to find."""
    folder = Path(folder)
    expected = {}

    def write(name, content, outcome):
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name))))
        path.write_bytes(content)
        expected[path] = outcome

    for name, content, outcome in damaged(bases()):
        write(name, content, outcome)
    for name, content in bases().items():
        write(f"whole-{name}", content, READ)
    for name, content in unusual():
        write(name, content, READ)
    for name, content in refused():
        write(name, content, REFUSED)
    picture = encoded(Image.fromarray(noise(48, 36)), "JPEG")
    for name in NAMES:
        write(name, picture, READ)

    (folder / "photo.jpg").mkdir()
    write("photo.jpg/inside.jpg", picture, READ)
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "up").symlink_to(folder)
    (folder / "a" / "itself").symlink_to("itself")
    write("a/b/deep.jpg", picture, READ)
    (folder / "linked.jpg").symlink_to("a/b/deep.jpg")  # the same file, reached twice
    for name, target in [("loop-1.jpg", "loop-2.jpg"), ("loop-2.jpg", "loop-1.jpg"), ("dangling.jpg", "none.jpg")]:
        (folder / name).symlink_to(target)
        expected[folder / name] = REFUSED
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    expected |= {folder / "endless.jpg": REFUSED, folder / "pipe.jpg": REFUSED}
    if os.geteuid() != 0:  # root may read everything
        write("secret.jpg", picture, REFUSED)
        (folder / "secret.jpg").chmod(0)
    return expected


if __name__ == "__main__":
    for path, outcome in (write_good(sys.argv[1]) | write_odd(sys.argv[1])).items():
        print(f"{outcome}\t{str(path)!r}")
