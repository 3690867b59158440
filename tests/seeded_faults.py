"""Clean datasets of drawn scenes in several forms, and faults that are seeded into copies of them, one of each kind."""

import csv
import io
import json
import os
import shutil
from typing import NamedTuple

from PIL import Image

from captioner.scenes import write_scenes

SIZES = {"train": 14, "val": 5, "seen": 5}
SPLITS = {"train": "train", "val": "val", "seen": "test"}


def draw(folder):
    """Draw the scenes; return for each split's name the captions of each image file."""
    write_scenes(folder, SIZES, seed=1, side=48)
    drawn = {}
    for split, name in SPLITS.items():
        listed = json.loads((folder / f"captions_{split}.json").read_text())
        captions = {image["id"]: [] for image in listed["images"]}
        for one in listed["annotations"]:
            captions[one["image_id"]].append(f"{one['caption'].rstrip('.')} {len(captions[one['image_id']])}.")
        drawn[name] = {folder / split / one["file_name"]: captions[one["id"]] for one in listed["images"]}
    return drawn


def rows_of(drawn):
    return [
        (split, f"{split}_{file.name}", caption)
        for split, images in drawn.items()
        for file, captions in images.items()
        for caption in captions
    ]


def copy_images(root, drawn):
    root.mkdir(parents=True)
    for split, images in drawn.items():
        for file in images:
            shutil.copyfile(file, root / f"{split}_{file.name}")


def table(root, drawn):
    """`captions.csv` with a column of splits beside `images/`: line 1 is the header, each image has five lines."""
    copy_images(root / "images", drawn)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption", "split"])
    writer.writerows((name, caption, split) for split, name, caption in rows_of(drawn))
    (root / "captions.csv").write_text(text.getvalue())


def json_lines(root, drawn):
    copy_images(root / "images", drawn)
    lines = [json.dumps({"image": n, "caption": c, "split": s}) for s, n, c in rows_of(drawn)]
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")


def flickr8k(root, drawn):
    copy_images(root / "Images", drawn)
    rows = rows_of(drawn)
    (root / "Flickr8k.token.txt").write_text("".join(f"{n}#{i % 5}\t{c}\n" for i, (_, n, c) in enumerate(rows)))
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = dict.fromkeys(n for s, n, _ in rows if s == split)
        (root / f"Flickr_8k.{name}Images.txt").write_text("\n".join(names) + "\n")


def coco(root, drawn):
    (root / "annotations").mkdir(parents=True)
    for split, images in drawn.items():
        copy_images(root / f"{split}2017", {split: images})
        listed = [{"id": i, "file_name": f"{split}_{file.name}"} for i, file in enumerate(images)]
        notes = [
            {"id": 10 * i + k, "image_id": i, "caption": caption}
            for i, captions in enumerate(images.values())
            for k, caption in enumerate(captions)
        ]
        (root / "annotations" / f"captions_{split}2017.json").write_text(
            json.dumps({"images": listed, "annotations": notes}, indent=0)
        )


def sidecars(root, drawn):
    for split, images in drawn.items():
        copy_images(root / split, {split: images})
        for file, captions in images.items():
            (root / split / f"{split}_{file.stem}.txt").write_text("\n".join(captions) + "\n")


TREES = (table, json_lines, flickr8k, coco, sidecars)


class Seed(NamedTuple):
    """A fault: what puts it into which tree, and where it is to be found."""

    name: str
    tree: object
    put: object
    kind: str
    file: str
    line: int | None = None
    further: tuple[str, ...] = ()  # kinds that follow from it

    def __str__(self):
        return self.name


def edit(name, number, change):
    """Return what changes a line of a file, as bytes; None deletes it."""

    def put(root):
        lines = (root / name).read_bytes().split(b"\n")
        changed = change(lines[number - 1])
        lines[number - 1 : number] = [] if changed is None else [changed]
        (root / name).write_bytes(b"\n".join(lines))

    return put


def image(name, change):
    """Return what changes an image's file."""
    return lambda root: change(root / "images" / name)


def caption(text, number=4):
    """Return what puts another caption into a line of the table, that of the first image's third caption."""

    def change(line):
        name, *_, split = line.split(b",")
        return b'%b,"%b",%b' % (name, text.encode() if isinstance(text, str) else text, split)

    return edit("captions.csv", number, change)


def shown(width, height, colours=True):
    """Return what draws another image into a file."""

    def change(path):
        drawn = Image.new("RGB", (width, height), "navy")
        if colours:
            drawn.putpixel((1, 1), (255, 255, 255))
        drawn.save(path)

    return change


def copied(source, target, convert=False):
    def put(root):
        if convert:
            Image.open(root / "images" / source).save(root / "images" / target, compress_level=9)
        else:
            shutil.copyfile(root / "images" / source, root / "images" / target)

    return put


def linked(root):
    outside = root.parent / f"{root.name} outside.png"
    path = root / "images" / FIRST
    path.rename(outside)
    path.symlink_to(outside)


def in_place_of(new):
    def change(path):
        path.unlink()
        if new is not None:
            path.mkdir()

    return change


def split_gone(name):
    def put(root):
        file = root / "captions.csv"
        file.write_text("".join(line for line in file.open() if not line.endswith(f",{name}\n")))
        for path in (root / "images").glob(f"{name}_*"):
            path.unlink()

    return put


def as_utf_16(root):
    (root / "captions.csv").write_text((root / "captions.csv").read_text(), encoding="utf-16")


def coco_changed(change):
    def put(root):
        path = root / "annotations" / "captions_train2017.json"
        dataset = json.loads(path.read_text())
        change(dataset)
        path.write_text(json.dumps(dataset))

    return put


FIRST, SECOND, OTHER = "train_000001.png", "train_000002.png", "val_000001.png"
TEST = "test_000001.png"
TRUNCATE = [
    ("a truncated image", lambda path: os.truncate(path, path.stat().st_size // 2)),
    ("an image that lacks its end", lambda path: os.truncate(path, path.stat().st_size - 200)),
    ("an empty image", lambda path: os.truncate(path, 0)),
    ("a text called .png", lambda path: path.write_text("no image")),
    (
        "an image with a flipped byte",
        lambda path: path.write_bytes(path.read_bytes()[:60] + b"!" + path.read_bytes()[61:]),
    ),
    ("a folder in place of an image", in_place_of("folder")),
]
# Lines of the table: 2 to 6 are of train_000001.png, 7 to 11 of train_000002.png.
SEEDS = [
    *(Seed(name, table, image(FIRST, change), "damaged image", FIRST) for name, change in TRUNCATE),
    Seed("a missing image", table, image(FIRST, in_place_of(None)), "missing image", FIRST),
    Seed(
        "a name in another case",
        table,
        image(FIRST, lambda path: path.rename(path.with_name(FIRST.upper()))),
        "missing image",
        FIRST,
        None,
        ("image without captions",),
    ),
    Seed("an image twice in a split", table, copied(FIRST, SECOND), "doubled image", SECOND),
    Seed("the same image in two splits", table, copied(FIRST, OTHER), "image in two splits", OTHER),
    Seed("the same pixels in two splits", table, copied(FIRST, TEST, convert=True), "image in two splits", TEST),
    Seed("a small image", table, image(FIRST, shown(40, 20)), "small image", FIRST),
    Seed("an image of an extreme shape", table, image(FIRST, shown(400, 40)), "extreme shape", FIRST),
    Seed("an image of one colour", table, image(FIRST, shown(48, 48, colours=False)), "blank image", FIRST),
    Seed(
        "an image without captions", table, copied(FIRST, "new.png", convert=True), "image without captions", "new.png"
    ),
    Seed("a link that leads out", table, linked, "path", FIRST),
    Seed(
        "a name that leads out",
        table,
        edit("captions.csv", 4, lambda line: b"../" + line),
        "path",
        "captions.csv",
        4,
        ("few references",),
    ),
    Seed("an empty caption", table, caption(" "), "empty caption", "captions.csv", 4, ("few references",)),
    Seed(
        "a caption without words",
        table,
        caption("... !"),
        "caption without words",
        "captions.csv",
        4,
        ("short caption",),
    ),
    Seed(
        "a doubled caption",
        table,
        lambda root: caption((root / "captions.csv").read_text().split("\n")[1].split(",")[1])(root),
        "doubled caption",
        "captions.csv",
        4,
    ),
    Seed("unknown words", table, caption("Ubi bene ibi patria est"), "unknown words", "captions.csv", 4),
    Seed("a long caption", table, caption("a red circle " * 20), "long caption", "captions.csv", 4),
    Seed("a short caption", table, caption("circle"), "short caption", "captions.csv", 4),
    Seed("too few references", table, edit("captions.csv", 4, lambda line: None), "few references", FIRST),
    Seed("bytes that are no UTF-8", table, caption(b"a red circle f\xfcnf 2"), "encoding", "captions.csv", 4),
    Seed("UTF-16", table, as_utf_16, "encoding", "captions.csv"),
    Seed("replacement characters", table, caption("a red circle f\ufffdnf 2"), "garbled characters", "captions.csv", 4),
    Seed(
        "UTF-8 that was encoded twice", table, caption("a red circle fÃ¼nf 2"), "garbled characters", "captions.csv", 4
    ),
    Seed("markup", table, caption("a red circle &amp; a square 2"), "markup", "captions.csv", 4),
    Seed(
        "a comma too many",
        table,
        edit("captions.csv", 4, lambda line: line + b",more"),
        "CSV",
        "captions.csv",
        4,
        ("few references",),
    ),
    Seed(
        "a quote within quotes",
        table,
        caption('a "red" circle'),
        "CSV",
        "captions.csv",
        4,
        ("few references",),
    ),
    Seed(
        "columns of other names",
        table,
        edit("captions.csv", 1, lambda line: b"bild,text,split"),
        "column",
        "captions.csv",
        1,
    ),
    Seed("no validation split", table, split_gone("val"), "missing split", "captions.csv"),
    Seed("no test split", table, split_gone("test"), "no test split", "captions.csv"),
    Seed(
        "another split than in a line before",
        table,
        edit("captions.csv", 4, lambda line: line.replace(b",train", b",val")),
        "split",
        "captions.csv",
        4,
    ),
    Seed(
        "a line that is no JSON",
        json_lines,
        edit("captions.jsonl", 3, lambda line: line[:-1]),
        "JSON",
        "captions.jsonl",
        3,
        ("few references",),
    ),
    Seed(
        "a caption that is a number",
        json_lines,
        edit("captions.jsonl", 3, lambda line: json.dumps(json.loads(line) | {"caption": 7}).encode()),
        "line",
        "captions.jsonl",
        3,
        ("few references",),
    ),
    Seed(
        "a line without a tab",
        flickr8k,
        edit("Flickr8k.token.txt", 3, lambda line: line.replace(b"\t", b" ")),
        "line",
        "Flickr8k.token.txt",
        3,
        ("few references",),
    ),
    Seed(
        "a list that names an image without captions",
        flickr8k,
        edit("Flickr_8k.devImages.txt", 2, lambda line: b"none.png\n" + line),
        "uncaptioned image",
        "Flickr_8k.devImages.txt",
        2,
    ),
    Seed(
        "a missing list",
        flickr8k,
        lambda root: (root / "Flickr_8k.devImages.txt").unlink(),
        "missing file",
        "Flickr_8k.devImages.txt",
        None,
        ("no split", "missing split"),
    ),
    Seed(
        "an image in two lists",
        flickr8k,
        edit("Flickr_8k.testImages.txt", 2, lambda line: line + b"\n" + FIRST.encode()),
        "image in two splits",
        FIRST,
    ),
    Seed(
        "an image in no list",
        flickr8k,
        edit("Flickr_8k.trainImages.txt", 2, lambda line: None),
        "no split",
        "Flickr8k.token.txt",
    ),
    Seed(
        "damaged JSON",
        coco,
        edit("annotations/captions_val2017.json", 4, lambda line: line.replace(b":", b"")),
        "JSON",
        "captions_val2017.json",
        4,
        ("missing split",),
    ),
    Seed(
        "JSON without a key",
        coco,
        coco_changed(lambda dataset: dataset["annotations"][0].pop("caption")),
        "key",
        "captions_train2017.json",
        None,
        ("missing split",),
    ),
    Seed(
        "captions of an image that is not listed",
        coco,
        coco_changed(lambda dataset: dataset["annotations"][0].update(image_id=99)),
        "unlisted image",
        "captions_train2017.json",
        None,
        ("few references",),
    ),
    Seed(
        "an image that is listed twice",
        coco,
        coco_changed(lambda dataset: dataset["images"].append(dataset["images"][0])),
        "image listed twice",
        "captions_train2017.json",
    ),
    Seed(
        "an empty text beside an image",
        sidecars,
        lambda root: (root / "train" / "train_000001.txt").write_text(""),
        "empty caption",
        "train_000001.txt",
        1,
        ("image without captions",),
    ),
    Seed(
        "an image without a text",
        sidecars,
        lambda root: (root / "train" / "train_000001.txt").unlink(),
        "image without captions",
        FIRST,
    ),
    Seed(
        "a text without an image",
        sidecars,
        lambda root: (root / "train" / "train_000001.png").unlink(),
        "captions without image",
        "train_000001.txt",
    ),
]
