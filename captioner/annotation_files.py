"""Caption files of every format that is known: the classes, and which of them a folder or a file is for."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from captioner.caption_formats import (
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    CaptionedImage,
    CaptionFiles,
    CaptionList,
    CaptionTable,
    COCOCaptions,
    Flickr8k,
    Flickr30k,
    ImageFolder,
    Karpathy,
    column_of,
    found_beside,
    split_folders,
)
from captioner.content_splits import SPLITS
from captioner.errors import InputError
from captioner.text_files import Report, stop

__all__ = [
    "AnyFormat",
    "COCOCaptions",
    "CaptionFiles",
    "CaptionList",
    "CaptionTable",
    "CaptionedImage",
    "Flickr8k",
    "Flickr30k",
    "ImageFolder",
    "Karpathy",
    "open_captions",
]

PART = 2**16  # bytes at the beginning and at the end of a file that it is recognised by
SHARES = (0.8, 0.1, 0.1)
COCO_FILE = re.compile(r"captions_([A-Za-z]+)(\d{4})?\.json")
SOUGHT = (
    "Flickr8k.token.txt, a Kaggle captions.txt, Flickr30k's results.csv, Karpathy's dataset_*.json, COCO's "
    "annotations/captions_*.json or another JSON file of captions, metadata.jsonl, a CSV file or JSON lines with "
    "columns such as image and caption, and .txt files beside the images"
)


class AnyFormat(CaptionFiles):
    """A dataset in whichever of the formats below it is; the format is recognised.

    `Flickr8k`, `Flickr30k`, `Karpathy`, `COCOCaptions`, `CaptionTable` (CSV, JSON lines), and `ImageFolder`
    (``metadata.jsonl``, or text files beside the images).

    Parameters
    ----------
    root
        The dataset's folder, or its caption file.
    shares
        Where no split comes with it: the shares of train, val and test, see `CaptionList`.
    seed
        Another one gives another split.

    Raises
    ------
    InputError
        If it is of none of them, or of several.
    """

    def __init__(self, root: Path, shares: tuple[float, float, float] = SHARES, seed: int = 0) -> None:
        self.root = Path(root)
        self.files = _recognise(self.root, shares, seed)
        self.splits = self.files.splits

    def __str__(self) -> str:
        return str(self.files)

    @property
    def format(self) -> str:
        """The name of the format that was recognised."""
        return self.files.format

    def read(self, split: str) -> list[CaptionedImage]:
        """Return the captioned images of a split, see `CaptionFiles.read`."""
        return self.files.read(split)

    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return the images of a split, or all, see `CaptionFiles.records`."""
        return self.files.records(split, report)

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return the images of every split, see `CaptionFiles.by_split`."""
        return self.files.by_split(report)


def open_captions(path: Path) -> CaptionFiles:
    """Return the reader of a dataset's folder or of a caption file alone, whose format is recognised.

    Parameters
    ----------
    path
        As the root of `AnyFormat`. A COCO file has no splits here, since there need not be images to make them of.

    Raises
    ------
    InputError
        If there is no such file or folder, or it is of no format or of several.
    """
    files = _recognise(path, SHARES, 0)
    if isinstance(files, COCOCaptions) and path.is_file():
        files.splits = ()
    return files


def _recognise(path: Path, shares: tuple[float, float, float], seed: int) -> CaptionFiles:
    if path.is_file():
        return _of_file(path, shares, seed)
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give a dataset's folder or its caption file.")
    found = list(_in_folder(path, shares, seed))
    if not found:  # as archives are unpacked: in a folder of its own
        for folder in sorted(inside for inside in path.iterdir() if inside.is_dir() and inside.name[0] not in "._"):
            found += _listed_in(folder, shares, seed)
    if not found:
        raise InputError(
            f"{path} fits no format of captions: there is none of {SOUGHT}; give the folder that holds one."
        )
    if len(found) > 1:
        fit = "; ".join(f"{files.format} ({files})" for files in found)
        raise InputError(
            f"{path} fits several formats: {fit}: name one, such as --data.files {found[0].format}, or give the "
            "caption file itself."
        )
    return found[0]


def _in_folder(folder: Path, shares: tuple[float, float, float], seed: int) -> Iterator[CaptionFiles]:
    """Give a reader for each format that a folder fits."""
    yield from _listed_in(folder, shares, seed)
    if found_beside(folder) is not None or any(found_beside(folder / name) for name in split_folders(folder)):
        yield ImageFolder(folder, shares=shares, seed=seed)


def _listed_in(folder: Path, shares: tuple[float, float, float], seed: int) -> Iterator[CaptionFiles]:
    """Give a reader for each caption file in a folder, but for those that belong to its images one by one."""
    if (folder / "Flickr8k.token.txt").is_file():
        yield Flickr8k(folder)
    yield from _coco_splits(folder)
    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        suffix = file.suffix.lower()
        if suffix == ".json" and not COCO_FILE.fullmatch(file.name):
            if b'"sentences"' in (part := _ends(file)):
                yield Karpathy(folder, file.name)
            elif b'"caption"' in part and b'"file_name"' in part:
                yield COCOCaptions(folder, file.name, None, SPLITS, shares, seed)
        elif suffix in (".csv", ".tsv", ".jsonl", ".ndjson") or file.name.lower() == "captions.txt":
            if file.stem != "metadata" and _is_table(file):
                yield _of_file(file, shares, seed)


def _coco_splits(folder: Path) -> Iterator[CaptionFiles]:
    """Give a reader for each set of files in COCO's format, one for each split: captions_train2017.json and so on."""
    groups: dict[str, list[str]] = {}
    for file in sorted([*folder.glob("annotations/*.json"), *folder.glob("*.json")]):
        if name := COCO_FILE.fullmatch(file.name):
            before = file.relative_to(folder).as_posix().removesuffix(file.name)
            groups.setdefault(f"{before}captions_{{split}}{name[2] or ''}.json", []).append(name[1])
    for captions, splits in groups.items():
        year = captions.rpartition("}")[2].removesuffix(".json")
        first = splits[0]
        layouts = ("{split}" + year, "images/{split}" + year)
        images = next((one for one in layouts if (folder / one.replace("{split}", first)).is_dir()), None)
        yield COCOCaptions(folder, captions, images, tuple(sorted(splits, key=_place)))


def _place(split: str) -> tuple[int, str]:
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS)), split


def _of_file(path: Path, shares: tuple[float, float, float], seed: int) -> CaptionFiles:
    suffix = path.suffix.lower()
    if suffix == ".json":
        if b'"sentences"' in _ends(path):
            return Karpathy(path.parent, path.name)
        return COCOCaptions(path.parent, path.name, None, SPLITS, shares, seed)
    if _first_line(path).startswith("image_name|"):
        return Flickr30k(path.parent, path.name, shares=shares, seed=seed)
    if suffix in (".csv", ".tsv", ".jsonl", ".ndjson") or _is_table(path):
        return CaptionTable(path.parent, path.name, shares=shares, seed=seed)
    return Flickr8k(path.parent, captions_file=path.name)


def _is_table(path: Path) -> bool:
    """Tell whether a file names an image and a caption in its first line."""
    first = _first_line(path)
    names = re.findall(r'"(\w+)"\s*:', first) if first.startswith("{") else re.split(r"[,;\t|]", first)
    columns = [name.strip(' "\ufeff') for name in names]
    return None not in (column_of(columns, None, IMAGE_COLUMNS), column_of(columns, None, TEXT_COLUMNS))


def _first_line(path: Path) -> str:
    part = _ends(path)[:PART]
    # A table that was saved as UTF-16 is recognised, so that its reader can say so.
    encoding = "utf-16" if part.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return part.decode(encoding, errors="replace").lstrip().partition("\n")[0].rstrip()


def _ends(path: Path) -> bytes:
    """Return how a file begins and ends."""
    try:
        with open(path, "rb") as file:
            part = file.read(PART)
            file.seek(max(PART, path.stat().st_size - PART))
            return part + file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
