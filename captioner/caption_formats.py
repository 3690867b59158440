"""Datasets of captioned images as they are published and as people make them: a class for each format."""

from __future__ import annotations

import contextlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from captioner.content_splits import SPLITS, ContentSplit, digests_of
from captioner.errors import InputError
from captioner.images import find_images
from captioner.text_files import Fault, Report, from_cell, read_json, read_json_lines, read_lines, read_rows, stop

# What splits are called elsewhere; restval are images of COCO's validation part that the papers train on.
MEANINGS = {"training": "train", "restval": "train", "dev": "val", "valid": "val", "validation": "val", "eval": "val"}
IMAGE_COLUMNS = ("file_name", "image", "filename", "image_name", "image_path", "path", "file")
TEXT_COLUMNS = ("captions", "caption", "text", "texts", "comment", "sentences", "sentence", "description")
OWN_COLUMN = "log_probability"  # of the tables that `captioner caption` writes
SIDECARS = (".txt", ".caption")
FLICKR30K_ROW = re.compile(r"([^|]+)\|\s*(\d+)\s*(?:\||\s)(.*)", re.DOTALL)


class CaptionedImage(NamedTuple):
    """An image with all its captions.

    Attributes
    ----------
    image_id : str or int
        As the dataset names it; references and captions are matched by it.
    path : Path
        The image file.
    captions : tuple of str
        The raw captions as published, line breaks and all.
    """

    image_id: str | int
    path: Path
    captions: tuple[str, ...]


class CaptionLine(str):
    """A caption as published that knows where it stands.

    Parameters
    ----------
    caption : str
        The raw caption, which it equals.
    file : Path
        The caption file.
    line : int
        The line that it, or the row that holds it, begins in, counted from 1.
    """

    __slots__ = ("file", "line")
    file: Path
    line: int

    def __new__(cls, caption: str, file: Path, line: int) -> CaptionLine:  # noqa: D102
        self = super().__new__(cls, caption)
        self.file, self.line = file, line
        return self

    def __reduce__(self) -> tuple[type[CaptionLine], tuple[str, Path, int]]:
        """Go to another process with the place."""
        return CaptionLine, (str(self), self.file, self.line)


class CaptionFiles(ABC):
    """A dataset on disk: what every format's class offers.

    Attributes
    ----------
    folders : frozenset of Path
        The folders that names of images start from, so far as captions were read.
    splits : tuple of str
        The names that `read` and `records` take. "dev", "valid" and "validation" may be said for "val", and "val" for
        them.
    """

    splits: tuple[str, ...]
    folders: frozenset[Path] = frozenset()

    @property
    def format(self) -> str:
        """The name of the format."""
        return type(self).__name__

    def read(self, split: str) -> list[CaptionedImage]:
        """Return the captioned images of a split, in the order of its files. Their files exist.

        Raises
        ------
        InputError
            If the split is unknown, has no captioned image, or a file or an image is missing or damaged.
        """
        records = self.captioned(split)
        check_on_disk(records, self.folders)
        return records

    def captioned(self, split: str) -> list[CaptionedImage]:
        """Return the captioned images of a split as `read` does, but look for no image file.

        Raises
        ------
        InputError
            If the split is unknown, has no captioned image, or a file is missing or damaged.
        """
        records = [record for record in self.records(split) if record.captions]
        if not records:
            file = str(self).replace("{split}", split)
            raise InputError(f"{file} has no image with a caption: give the captions of the split '{split}'.")
        return records

    @abstractmethod
    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return all images of a split, those without a caption too, and look for no image file.

        Parameters
        ----------
        split
            By default all that the caption file holds, where there is one file for all splits. A split that follows
            from the images' content needs their files.
        report
            What is done with each faulty line, caption or name; if it goes on, they are left out.

        Raises
        ------
        InputError
            If the split is unknown, or the caption file is missing or damaged.
        """

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return all images of every split, and look for no image file.

        Parameters
        ----------
        report
            What is done with each fault, which goes on; a split that cannot be read is one.

        Returns
        -------
        dict
            The images of each split; under None those whose split follows from their contents, and under "" those that
            are in none.
        """
        found: dict[str | None, list[CaptionedImage]] = {}
        for split in self.splits:
            try:
                found[split] = self.records(split, report)
            except InputError as error:
                report(_of_split(split, error))
        return found

    def _path(self, folder: Path, name: str) -> Path:
        """Return where an image is, whose name does not lead out of the folder."""
        self.folders |= {folder}
        return folder / name


class Flickr8k(CaptionFiles):
    """Flickr8k (Hodosh, Young and Hockenmaier, 2013): five captions for each of 8,000 photographs.

    Parameters
    ----------
    root
        The folder with ``Flickr8k.token.txt``, the lists ``Flickr_8k.{train,dev,test}Images.txt``, and the photographs
        in ``Images/`` or ``Flicker8k_Dataset/`` (the spelling of the published archive).
    captions_file
        The caption file in that folder.

    Notes
    -----
    An image's id is its file name. A list is needed only when its split is read.
    """

    splits = ("train", "dev", "test")

    def __init__(self, root: Path, captions_file: str = "Flickr8k.token.txt") -> None:
        self.root = Path(root)
        self.captions_file = captions_file

    def __str__(self) -> str:
        return str(self.root / self.captions_file)

    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return the images of a split, or all, see `CaptionFiles.records`."""
        _check_folder(self.root)
        captions = self._read_captions(report)
        names = list(captions) if split is None else self._names(split, captions, report)
        published = self.root / "Flicker8k_Dataset"
        folder = published if published.is_dir() else self.root / "Images"
        return [CaptionedImage(name, self._path(folder, name), tuple(captions[name])) for name in names]

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return the images of every split, and those in no list, see `CaptionFiles.by_split`."""
        found = super().by_split(report)
        if found:
            listed = {record.image_id for records in found.values() for record in records}
            found[""] = [record for record in self.records(None, report) if record.image_id not in listed]
        return found

    def _names(self, split: str, captions: dict[str, list[str]], report: Report) -> list[str]:
        split = _own_name("Flickr8k", split, self.splits)
        list_file = self.root / f"Flickr_8k.{split}Images.txt"
        names: dict[str, int] = {}  # without repetitions: every image counts once
        for number, line in read_lines(list_file, report):
            names.setdefault(line.strip(), number)
        if not names:
            raise InputError(f"{list_file} names no image: take the list of the published dataset.")
        if uncaptioned := [name for name in names if name not in captions]:
            report(
                Fault(
                    f"{list_file} names {len(uncaptioned)} images that have no caption in {self.captions_file}, the "
                    f"first is {uncaptioned[0]}: take both files from the same release.",
                    "uncaptioned image",
                    list_file,
                    names[uncaptioned[0]],
                )
            )
        return [name for name in names if name in captions]

    def _read_captions(self, report: Report) -> dict[str, list[str]]:
        path = self.root / self.captions_file
        captions: dict[str, list[str]] = {}
        for number, line in read_lines(path, report):
            key, tab, caption = line.partition("\t")
            name, mark, _ = key.rpartition("#")
            if not tab or not mark:
                report(Fault.at(path, number, "is not 'name.jpg#number', a tab and a caption: mend the line.", "line"))
            elif _is_inside(path, number, name, report) and _is_caption(path, f"line {number}", caption, report):
                captions.setdefault(name, []).append(CaptionLine(caption, path, number))
        if not captions:
            raise InputError(f"{path} has no caption: take the file of the published dataset.")
        return captions


class Entry(NamedTuple):
    """An image in a list of images.

    Attributes
    ----------
    image_id : str or int
        As the dataset names it.
    name : str
        Of its file, seen from the folder of the images.
    captions : list of str
        All its captions.
    split : str or None
        Its split, where the list says so.
    """

    image_id: str | int
    name: str
    captions: list[str]
    split: str | None = None


class CaptionList(CaptionFiles):
    """Captioned images of all splits in one place.

    An image's split is the one that stands beside its captions. Where none stands, it is the folder that the image is
    in, if these are called as splits are; and else it follows from the image's content, see
    :class:`~captioner.content_splits.ContentSplit`.
    """

    splits: tuple[str, ...] = SPLITS

    def __init__(self, root: Path, images: str | None, shares: tuple[float, float, float], seed: int) -> None:
        self.root = Path(root)
        self.images = images
        self.content_split = ContentSplit(shares, seed)
        self._digests: dict[Path, bytes | None] = {}

    @abstractmethod
    def _entries(self, folder: Path, report: Report) -> Iterable[Entry]:
        """Return the images that are listed in a folder, each once."""

    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return the images of a split, or all, see `CaptionFiles.records`."""
        _check_folder(self.root)
        entries = list(self._entries(self.root, report))
        records = self._located(entries, self.root, self.images)
        if split is None:
            return records
        own = _own_splits(str(self), entries)
        if own is None:
            wanted = _own_name("This dataset", split, self.splits)
            records, own = self._by_content(records, report)
        else:
            wanted = _own_name("This dataset", split, tuple(dict.fromkeys(own)))
        chosen = [record for record, name in zip(records, own, strict=True) if name == wanted]
        if records and not chosen:
            raise InputError(
                f"By their contents none of the {len(records)} images of {self} falls into the split '{split}': set "
                "other data.files.shares or another data.files.seed, or say in a column 'split' where each belongs."
            )
        return chosen

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return the images of every split, see `CaptionFiles.by_split`."""
        _check_folder(self.root)
        entries = list(self._entries(self.root, report))
        records = self._located(entries, self.root, self.images)
        try:
            own = _own_splits(str(self), entries)
        except InputError as error:
            report(Fault(str(error), "split"))
            own = [meaning_of(entry.split or "") for entry in entries]
        if own is None:
            return {None: records}
        found: dict[str | None, list[CaptionedImage]] = {}
        for record, split in zip(records, own, strict=True):
            found.setdefault(split, []).append(record)
        return found

    def _located(self, entries: Sequence[Entry], root: Path, images: str | None) -> list[CaptionedImage]:
        folder, before = _find_folder(root, images, [entry.name for entry in entries])
        return [
            CaptionedImage(entry.image_id, self._path(folder, entry.name.removeprefix(before)), tuple(entry.captions))
            for entry in entries
        ]

    def _by_content(self, records: list[CaptionedImage], report: Report) -> tuple[list[CaptionedImage], list[str]]:
        """Return the records whose files can be read, and their splits."""
        unknown = [record.path for record in records if record.path not in self._digests]
        self._digests |= zip(unknown, digests_of(unknown), strict=True)
        digests = [self._digests[record.path] for record in records]
        if missing := [record.path for record, digest in zip(records, digests, strict=True) if digest is None]:
            for path in missing:
                del self._digests[path]
            report(_missing(missing, len(records)))
        found = [(record, digest) for record, digest in zip(records, digests, strict=True) if digest is not None]
        return [record for record, _ in found], [self.content_split.of(digest) for _, digest in found]


class COCOCaptions(CaptionList):
    """Captions in COCO's JSON (Chen et al., 2015), read with pycocotools.

    Parameters
    ----------
    root
        The folder that `captions` and `images` are relative to.
    captions
        The annotation file of a split, where ``{split}`` stands for its name; or, without that, of all images.
    images
        The folder with a split's images, likewise; null finds it.
    splits
        The splits there are.
    shares, seed
        Of a file of all images: how they are split by their content, see `CaptionList`.

    Notes
    -----
    Ids are COCO's integers. `read` leaves out an image that the file lists without any caption.
    """

    def __init__(
        self,
        root: Path,
        captions: str = "annotations/captions_{split}2017.json",
        images: str | None = "{split}2017",
        splits: tuple[str, ...] = ("train", "val"),
        shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> None:
        super().__init__(root, images, shares, seed)
        self.captions = captions
        self.splits = tuple(splits)

    def __str__(self) -> str:
        return str(self.root / self.captions)

    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return the images of a split, see `CaptionFiles.records`."""
        if "{split}" not in self.captions:
            if split is not None:
                _own_name("This dataset", split, self.splits)
            return super().records(split, report)
        if split is None:
            raise InputError(f"{self} is one file for each split: choose from {', '.join(self.splits)}.")
        split = _own_name("This dataset", split, self.splits)
        _check_folder(self.root)
        entries = self._read(self.root / self.captions.replace("{split}", split), report)
        images = None if self.images is None else self.images.replace("{split}", split)
        return self._located(entries, self.root, images)

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return the images of every split, see `CaptionFiles.by_split`."""
        return CaptionFiles.by_split(self, report) if "{split}" in self.captions else super().by_split(report)

    def _entries(self, folder: Path, report: Report) -> list[Entry]:
        return self._read(folder / self.captions, report)

    def _read(self, path: Path, report: Report) -> list[Entry]:
        from pycocotools.coco import COCO

        # Read here and not by pycocotools, which would decode the file by the computer's language settings.
        dataset = read_json(path, report)
        coco = COCO()
        try:
            coco.dataset = {key: dataset[key] for key in ("images", "annotations")}
            with contextlib.redirect_stdout(io.StringIO()):
                coco.createIndex()
            listed = Counter(one["id"] for one in dataset["images"])
            entries = [
                Entry(
                    image_id,
                    image["file_name"],
                    [
                        one["caption"]
                        for one in coco.imgToAnns[image_id]
                        if _is_caption(path, f"annotation {one['id']}", one["caption"], report)
                    ],
                )
                for image_id, image in coco.imgs.items()
                if _is_inside(path, None, image["file_name"], report)
            ]
            unknown = list(dict.fromkeys(key for key in coco.imgToAnns if key not in coco.imgs))
        except KeyError as error:
            raise Fault(
                f"{path} lacks the key {error} where one is needed: give a caption file in COCO's format.", "key", path
            ) from None
        except (TypeError, AttributeError):
            raise Fault(
                f"{path} is JSON but not COCO's: give 'images' and 'annotations' as lists.", "key", path
            ) from None
        if unknown:
            report(
                Fault(
                    f"{path} has captions of {len(unknown)} images that its 'images' do not list, the first is "
                    f"{unknown[0]!r}: list them, under the same ids.",
                    "unlisted image",
                    path,
                )
            )
        for image_id in (image_id for image_id, times in listed.items() if times > 1):
            report(
                Fault(
                    f"{path} lists the image {image_id!r} more than once: keep one entry.", "image listed twice", path
                )
            )
        return entries


class Karpathy(CaptionList):
    """The splits of Karpathy and Fei-Fei (2015): ``dataset_coco.json``, ``dataset_flickr8k.json``, ``..._flickr30k``.

    Parameters
    ----------
    root
        The folder with the file and the images.
    captions
        The file in it; by default the one that is called ``dataset_*.json``.
    images
        The folder that file names (of COCO with their ``filepath``, as in ``val2014/``) are seen from, itself seen from
        `root`. By default it is found.

    Notes
    -----
    The splits are train, val and test; the images that the file calls ``restval`` are train's, too. Ids are COCO's
    integers, or else file names.
    """

    def __init__(self, root: Path, captions: str | None = None, images: str | None = None) -> None:
        super().__init__(root, images, (0.8, 0.1, 0.1), 0)
        self.captions = captions

    def __str__(self) -> str:
        return str(self.root / (self.captions or "dataset_*.json"))

    def _entries(self, folder: Path, report: Report) -> Iterator[Entry]:
        path = folder / (self.captions or _one_file(folder, "dataset_*.json"))
        dataset = read_json(path, report)
        images = dataset.get("images") if isinstance(dataset, dict) else None
        if not isinstance(images, list):
            raise Fault(f"{path} is JSON but not Karpathy's: give 'images' as a list.", "key", path)
        seen: set[str] = set()
        for number, image in enumerate(images, 1):
            where = f"image {number}"
            try:
                name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
                split, texts = image["split"], [sentence["raw"] for sentence in image["sentences"]]
            except (KeyError, TypeError, AttributeError):
                advice = "give 'filename', 'split' and 'sentences' that each have 'raw'"
                report(Fault(f"{path}, {where} is not as in Karpathy's files: {advice}.", "key", path))
                continue
            if name in seen:
                report(Fault(f"{path}, {where} is {name} again: keep one entry.", "image listed twice", path))
            elif isinstance(split, str) and _is_inside(path, None, name, report):
                seen.add(name)
                captions = [text for text in texts if _is_caption(path, where, text, report)]
                yield Entry(image.get("cocoid", image["filename"]), name, captions, split)


class Flickr30k(CaptionList):
    """Flickr30k (Young et al., 2014) as Kaggle gives it out: ``results.csv``, whose columns are parted by bars.

    Parameters
    ----------
    root
        The folder with the file and the photographs.
    captions
        The file in it.
    images
        The folder with the photographs, seen from `root`. By default it is found.
    shares, seed
        How images are split by their content, since no split was published with the data; see `CaptionList`.

    Notes
    -----
    In one published row the bar before the caption is missing; it is read as it was meant. An image's id is its name.
    """

    def __init__(
        self,
        root: Path,
        captions: str = "results.csv",
        images: str | None = None,
        shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> None:
        super().__init__(root, images, shares, seed)
        self.captions = captions

    def __str__(self) -> str:
        return str(self.root / self.captions)

    def _entries(self, folder: Path, report: Report) -> Iterator[Entry]:
        path = folder / self.captions
        captions: dict[str, list[str]] = {}
        for number, line in read_lines(path, report):
            if number == 1 and line.startswith("image_name"):
                continue
            row = FLICKR30K_ROW.fullmatch(line)
            if row is None:
                advice = "write the image's name, the caption's number and the caption, with | between them"
                report(Fault.at(path, number, f"has not three columns: {advice}.", "line"))
                continue
            name, caption = row[1].strip(), row[3].strip(" ")
            if _is_inside(path, number, name, report) and _is_caption(path, f"line {number}", caption, report):
                captions.setdefault(name, []).append(CaptionLine(caption, path, number))
        return (Entry(name, name, texts) for name, texts in captions.items())


class CaptionTable(CaptionList):
    """A table of images and captions, as CSV or JSON lines: Kaggle's ``captions.txt``, and what people make themselves.

    Parameters
    ----------
    root
        The folder with the table.
    captions
        Its name: ``.jsonl`` has an object in each line, other files are CSV, with columns in the first line.
    images
        The folder that images are named from, seen from `root`. By default it is found.
    image_column, text_column
        Their names. By default they are recognised, such as "image" and "caption". A caption may be a list of them, in
        CSV also in columns caption_2, caption_3 and so on; an image may stand in several rows.
    shares, seed
        How images are split by their content, where the table has no column "split"; see `CaptionList`.

    Notes
    -----
    An image's id is its name as the table gives it.
    """

    def __init__(
        self,
        root: Path,
        captions: str = "captions.csv",
        images: str | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> None:
        super().__init__(root, images, shares, seed)
        self.captions = captions
        self.image_column, self.text_column = image_column, text_column

    def __str__(self) -> str:
        return str(self.root / self.captions)

    def _entries(self, folder: Path, report: Report) -> Iterable[Entry]:
        return read_table(folder / self.captions, self.image_column, self.text_column, report)


class ImageFolder(CaptionList):
    """Images with their captions beside them, as ``captioner caption`` writes them.

    Parameters
    ----------
    root
        The folder with a folder for each split, or with all images.
    captions
        The file in a split's folder that names images in it and their captions, as Hugging Face's ``metadata.jsonl``
        does: "file_name" and "text", which is a caption or a list of them. Or the extension of text files beside the
        images, such as ``.txt``, with a caption in each line. By default the one that is there.
    splits
        The folders of the splits. By default those that are called as splits are.
    text_column
        Of that file, where it is called otherwise than captions are.
    shares, seed
        How images are split by their content, where there is no folder for each split; see `CaptionList`.

    Notes
    -----
    An image's id is its path, seen from the folder of its split.
    """

    def __init__(
        self,
        root: Path,
        captions: str | None = None,
        splits: tuple[str, ...] | None = None,
        text_column: str | None = None,
        shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
    ) -> None:
        super().__init__(root, "", shares, seed)
        self.captions = captions
        self.text_column = text_column
        self._split_folders = split_folders(self.root) if splits is None else tuple(splits)
        self.splits = self._split_folders or SPLITS

    def __str__(self) -> str:
        folder = self.root / "{split}" if self._split_folders else self.root
        captions = self.captions or "metadata.jsonl"
        return str(folder / ("*" * captions.startswith(".") + captions)) if self.captions else str(folder)

    def records(self, split: str | None = None, report: Report = stop) -> list[CaptionedImage]:
        """Return the images of a split, or those of the root itself, see `CaptionFiles.records`."""
        if split is None or not self._split_folders:
            return super().records(split, report)
        folder = self.root / _own_name("This dataset", split, self.splits)
        _check_folder(folder)
        return self._located(list(self._entries(folder, report)), folder, self.images)

    def by_split(self, report: Report) -> dict[str | None, list[CaptionedImage]]:
        """Return the images of every split, see `CaptionFiles.by_split`."""
        return CaptionFiles.by_split(self, report) if self._split_folders else super().by_split(report)

    def _entries(self, folder: Path, report: Report) -> Iterable[Entry]:
        captions = self.captions or found_beside(folder) or SIDECARS[0]
        if not captions.startswith("."):
            return read_table(folder / captions, None, self.text_column, report)
        return self._read_sidecars(folder, captions, report)

    def _read_sidecars(self, folder: Path, extension: str, report: Report) -> Iterator[Entry]:
        for image in find_images([folder]):
            text = image.with_suffix(extension)
            lines = list(read_lines(text, report)) if text.is_file() else []
            captions: list[str] = [
                CaptionLine(line, text, number)
                for number, line in lines
                if _is_caption(text, f"line {number}", line, report)
            ]
            if not lines and text.is_file():
                report(Fault.at(text, 1, "is empty: write a caption, or delete the file.", "empty caption"))
            name = image.relative_to(folder).as_posix()
            yield Entry(name, name, captions)


def found_beside(folder: Path) -> str | None:
    """Return what names a folder's captions: a metadata file, or the extension of the text files beside its images."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return name
    try:
        images = find_images([folder])
    except InputError:  # there is none
        return None
    # One listing of each folder, see `check_on_disk`.
    names = {parent: {path.name for path in parent.iterdir()} for parent in {image.parent for image in images}}
    beside = ((image.with_suffix(extension), extension) for extension in SIDECARS for image in images)
    return next((extension for text, extension in beside if text.name in names[text.parent]), None)


def split_folders(root: Path) -> tuple[str, ...]:
    """Return the folders in a folder that are called as splits are, those of training first."""
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return tuple(
        sorted((name for name in names if meaning_of(name) in SPLITS), key=lambda one: SPLITS.index(meaning_of(one)))
    )


def read_table(path: Path, image_column: str | None, text_column: str | None, report: Report) -> Iterator[Entry]:
    """Give the images of a CSV file or of one of JSON lines, each once with all its captions; see `CaptionTable`."""
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    rows: Iterator[tuple[int, dict[str, Any]]] = (read_json_lines if is_json else read_rows)(path, report)
    entries: dict[str, Entry] = {}
    header: list[str] = []
    image = text = None
    is_ours = False
    further: list[str] = []
    for number, row in rows:
        if [*row] != header:  # in JSON each line may have others
            header = [*row]
            image, text = column_of(row, image_column, IMAGE_COLUMNS), column_of(row, text_column, TEXT_COLUMNS)
            further = [column for column in row if text and re.fullmatch(rf"{re.escape(text)}_\d+", column)]
            is_ours = not is_json and OWN_COLUMN in row
        if image is None or text is None:
            what = f"no image ({image_column or ', '.join(IMAGE_COLUMNS)})"
            if image is not None:
                what = f"no caption ({text_column or ', '.join(TEXT_COLUMNS)})"
            fault = Fault.at(
                path,
                number if is_json else 1,
                f"has {what} among {', '.join(map(repr, row)) or 'nothing'}: name the columns so, or set "
                "data.files.image_column and data.files.text_column.",
                "column",
            )
            if not is_json:  # which is said of all rows at once
                raise fault
            report(fault)
            continue
        if is_ours:  # whose cells are no formulas
            row = {column: from_cell(cell) for column, cell in row.items()}
        texts = _texts([row[text], *(row[column] for column in further if row[column])])
        name, split = row[image], row.get("split") or None
        if not isinstance(name, str) or not name or not isinstance(split, str | None) or texts is None:
            report(Fault.at(path, number, f"has a {image!r} or a {text!r} that is no text: mend the line.", "line"))
            continue
        if not _is_inside(path, number, name, report):
            continue
        captions = [
            CaptionLine(caption, path, number)
            for caption in texts
            if _is_caption(path, f"line {number}", caption, report)
        ]
        entry = entries.setdefault(name, Entry(name, name, [], split))
        entry.captions.extend(captions)
        if entry.split != split:
            report(Fault.at(path, number, f"has another split for {name} than a line before: mend one.", "split"))
    yield from entries.values()


def column_of(row: Iterable[str], named: str | None, known: Sequence[str]) -> str | None:
    """Return the column that is named, or else the first one known, in whatever case it is written."""
    columns = {column.lower(): column for column in row}
    return next((columns[name.lower()] for name in ([named] if named else known) if name.lower() in columns), None)


def _texts(values: Sequence[object], depth: int = 3) -> list[str] | None:
    """Return captions, which stand one by one, in lists, or under "caption" or "raw"; None if one is no text."""
    texts: list[str] = []
    for value in values:
        if isinstance(value, dict):
            value = value.get("caption", value.get("raw"))
        if isinstance(value, str):
            texts.append(value)
        elif not isinstance(value, list) or not depth or (inside := _texts(value, depth - 1)) is None:
            return None
        else:
            texts += inside
    return texts


def _is_caption(path: Path, where: str, caption: object, report: Report) -> bool:
    """Tell whether a caption can be learnt from and written again; if not, report it."""
    line = int(where.removeprefix("line ")) if where.startswith("line ") else None
    if not isinstance(caption, str):
        report(Fault(f"{path}, {where} has a caption that is not text: mend or remove it.", "line", path, line))
    elif not caption.strip():
        report(Fault(f"{path}, {where} has an empty caption: write or remove it.", "empty caption", path, line))
    else:
        try:
            caption.encode()
            return True
        except UnicodeEncodeError:
            what = "has half a character (a lone surrogate)"
            report(Fault(f"{path}, {where} {what}: write it again.", "encoding", path, line))
    return False


def _is_inside(path: Path, line: int | None, name: str, report: Report) -> bool:
    """Tell whether an image's name can be one, and leads nowhere but into the dataset's folder; if not, report it."""
    where = f"{path}" if line is None else f"{path}, line {line}"
    if not isinstance(name, str) or "\0" in name or (len(name) > 200 and _is_too_long(name)):
        report(Fault(f"{where} names an image as no file is called: mend the name.", "path", path, line))
        return False
    suspicious = ".." in name or name[:1] in ("/", "\\", "~") or name[1:2] == ":"  # for speed: few are
    if not suspicious:
        return True
    windows = PureWindowsPath(name)
    if ".." in windows.parts or (
        (windows.drive or windows.root) and not PurePosixPath(name).is_relative_to(os.path.abspath(path.parent))
    ):
        report(
            Fault(
                f"{where} names the image {name}, which is outside the dataset's folder: move it there, and name it "
                "as seen from there.",
                "path",
                path,
                line,
            )
        )
        return False
    return True


def _is_too_long(name: str) -> bool:
    """Tell whether a path is longer than Linux takes them; asked for one, it answers with an error of its own."""
    encoded = name.encode(errors="surrogatepass")
    return len(encoded) > 3000 or max(map(len, encoded.split(b"/"))) > 255


def _find_folder(root: Path, images: str | None, names: Sequence[str]) -> tuple[Path, str]:
    """Return the folder that images are named from, and what is to be left out before their names."""
    if images is not None:
        return root / images, ""
    tried = names[:20]  # a few of them may be missing
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    further = (path for folder in inside if folder.name.lower() == "images" for path in sorted(folder.iterdir()))
    for folder in (root, *inside, *further):
        if any((folder / name).is_file() for name in tried):
            return folder, ""
    # As `captioner caption` names them, seen from where it was started: "data/mine/a.jpg" for a.jpg in data/mine.
    own = Path(os.path.abspath(root)).parts
    for depth in range(len(own) - 1, 0, -1):
        before = "/".join(own[-depth:]) + "/"
        if any(name.startswith(before) and (root / name.removeprefix(before)).is_file() for name in tried):
            return root, before
    return next((root / name for name in ("Images", "images") if (root / name).is_dir()), root), ""


def _own_splits(dataset: str, entries: Sequence[Entry]) -> list[str] | None:
    """Return the split of each image that is said beside it or by its folder; None where neither is."""
    said = [entry.split for entry in entries]
    if any(said):
        if unsaid := [entry.name for entry in entries if not entry.split]:
            raise InputError(
                f"{dataset} has no split of {len(unsaid)} of {len(entries)} images, the first is {unsaid[0]}: write "
                "one for each, or for none."
            )
        return [meaning_of(split) for split in said if split]
    tops = [meaning_of(entry.name.partition("/")[0]) if "/" in entry.name else "" for entry in entries]
    return tops if set(tops) <= set(SPLITS) and len(set(tops)) > 1 else None


def meaning_of(split: str) -> str:
    """Return which of train, val and test a dataset's name of a split stands for, or the name if for none."""
    split = split.strip().lower()
    return MEANINGS.get(split, split)


def _own_name(dataset: str, split: str, splits: tuple[str, ...]) -> str:
    """Return what a dataset calls a split."""
    if split in splits:
        return split
    same = [name for name in splits if meaning_of(name) == meaning_of(split)]
    if len(same) != 1:
        there_are = f"choose from {', '.join(splits)}" if splits else "it is one file for all, leave the split out"
        raise InputError(f"{dataset} has no split '{split}'; {there_are}.")
    return same[0]


def _of_split(split: str, error: InputError) -> Fault:
    """Return what is wrong with a split as a whole. Training goes without a test split."""
    kind = error.kind if isinstance(error, Fault) else "split"
    if kind == "missing file" and meaning_of(split) not in ("train", "val"):
        kind = "no test split"
    return Fault(str(error), kind, getattr(error, "path", None), getattr(error, "line", None))


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: give the folder that holds the dataset.")


def _one_file(folder: Path, pattern: str) -> str:
    found = sorted(path.name for path in folder.glob(pattern))
    if len(found) != 1:
        there_are = f"are {', '.join(found)}" if found else "is none"
        raise InputError(f"One file {pattern} is needed in {folder}, and there {there_are}: set data.files.captions.")
    return found[0]


def _missing(paths: Sequence[Path], of: int) -> Fault:
    return Fault(
        f"{len(paths)} of {of} images are missing, the first is {paths[0]}: put the images there.",
        "missing image",
        paths[0],
    )


def check_on_disk(records: Sequence[CaptionedImage], folders: Iterable[Path], report: Report = stop) -> None:
    """See that the images are there, and that no link leads out of the folders that they belong in.

    These folders themselves may be links, as to a larger disk.

    Parameters
    ----------
    records, folders
        The images, and these folders.
    report
        What is done with the missing images, which are one fault, and with each link.
    """
    homes = [os.path.realpath(folder) for folder in folders]

    def leaves(path: Path) -> bool:
        real = os.path.realpath(path)
        return bool(homes) and not any(os.path.commonpath((real, home)) == home for home in homes)

    # One listing of each folder: asking for 100,000 files one by one takes minutes on a network drive.
    present: dict[Path, dict[str, bool]] = {}  # of each folder the names, and whether they are links
    for folder in dict.fromkeys(record.path.parent for record in records):
        present[folder] = {}
        if folder.is_dir():
            with os.scandir(folder) as listing:
                present[folder] = {entry.name: entry.is_symlink() for entry in listing}
    if missing := [record.path for record in records if record.path.name not in present[record.path.parent]]:
        report(_missing(missing, len(records)))
    outside = {folder for folder in present if leaves(folder)}
    for record in records:
        folder = record.path.parent
        if folder in outside or (present[folder].get(record.path.name) and leaves(record.path)):
            report(
                Fault(
                    f"{record.path} is a link that leads out of the dataset, to {os.path.realpath(record.path)}: copy "
                    "the image there instead.",
                    "path",
                    record.path,
                )
            )
