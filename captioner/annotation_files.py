"""Caption files as they are published, read into one record per image. One class per format."""

from __future__ import annotations

import contextlib
import io
import json
import mimetypes
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from captioner.errors import InputError


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


class CaptionFiles(ABC):
    """A dataset on disk: what every format's class offers.

    Attributes
    ----------
    splits : tuple of str
        The names that `read` and `records` take.
    """

    splits: tuple[str, ...]

    def read(self, split: str) -> list[CaptionedImage]:
        """Return the captioned images of a split, in the order of its files. Their files exist.

        Raises
        ------
        InputError
            If the split is unknown, has no captioned image, or a file or an image is missing or damaged.
        """
        records = [record for record in self.records(split) if record.captions]
        if not records:
            file = str(self).replace("{split}", split)
            raise InputError(f"{file} has no image with a caption: give the captions of the split '{split}'.")
        return _on_disk(records)

    @abstractmethod
    def records(self, split: str | None = None) -> list[CaptionedImage]:
        """Return all images of a split, those without a caption too, and look for no image file.

        Parameters
        ----------
        split
            By default all that the caption file holds, where there is one file for all splits.

        Raises
        ------
        InputError
            If the split is unknown, or the caption file is missing or damaged.
        """


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

    def records(self, split: str | None = None) -> list[CaptionedImage]:
        """Return the images of a split, or all, see `CaptionFiles.records`."""
        _check_folder(self.root)
        captions = self._read_captions()
        names = list(captions) if split is None else self._names(split, captions)
        published = self.root / "Flicker8k_Dataset"
        folder = published if published.is_dir() else self.root / "Images"
        return [CaptionedImage(name, folder / name, tuple(captions[name])) for name in names]

    def _names(self, split: str, captions: dict[str, list[str]]) -> list[str]:
        _check_split("Flickr8k", split, self.splits)
        list_file = self.root / f"Flickr_8k.{split}Images.txt"
        # Without repetitions: every image counts once.
        names = list(dict.fromkeys(line.strip() for line in _read_lines(list_file) if line.strip()))
        if not names:
            raise InputError(f"{list_file} names no image: take the list of the published dataset.")
        uncaptioned = [name for name in names if name not in captions]
        if uncaptioned:
            raise InputError(
                f"{list_file} names {len(uncaptioned)} images that have no caption in {self.captions_file}, the first "
                f"is {uncaptioned[0]}: take both files from the same release."
            )
        return names

    def _read_captions(self) -> dict[str, list[str]]:
        path = self.root / self.captions_file
        captions: dict[str, list[str]] = {}
        for number, line in enumerate(_read_lines(path), 1):
            if not line.strip():
                continue
            key, tab, caption = line.partition("\t")
            name, mark, _ = key.rpartition("#")
            if not tab or not mark:
                raise InputError(f"{path}, line {number} is not 'name.jpg#number', a tab and a caption: mend the line.")
            captions.setdefault(name, []).append(caption)
        if not captions:
            raise InputError(f"{path} has no caption: take the file of the published dataset.")
        return captions


class COCOCaptions(CaptionFiles):
    """Captions in COCO's JSON (Chen et al., 2015), read with pycocotools.

    Parameters
    ----------
    root
        The folder that `captions` and `images` are relative to.
    captions
        The annotation file of a split, where ``{split}`` stands for its name.
    images
        The folder with a split's images, likewise.
    splits
        The splits there are.

    Notes
    -----
    Ids are COCO's integers. `read` leaves out an image that the file lists without any caption.
    """

    def __init__(
        self,
        root: Path,
        captions: str = "annotations/captions_{split}2017.json",
        images: str = "{split}2017",
        splits: tuple[str, ...] = ("train", "val"),
    ) -> None:
        self.root = Path(root)
        self.captions = captions
        self.images = images
        self.splits = tuple(splits)

    def __str__(self) -> str:
        return str(self.root / self.captions)

    def records(self, split: str | None = None) -> list[CaptionedImage]:
        """Return the images of a split, see `CaptionFiles.records`."""
        from pycocotools.coco import COCO

        if split is None and "{split}" in self.captions:
            raise InputError(f"{self} is one file for each split: choose from {', '.join(self.splits)}.")
        if split is not None:
            _check_split("This dataset", split, self.splits)
        _check_folder(self.root)
        path = self.root / self.captions.replace("{split}", split or "")
        folder = self.root / self.images.replace("{split}", split or "")
        # Read here and not by pycocotools, which would decode the file by the computer's language settings.
        try:
            dataset = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} is not valid JSON at line {error.lineno}, column {error.colno}: download it again."
            ) from None
        except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
            raise InputError(f"{path} is not JSON that can be read: download it again.") from None
        coco = COCO()
        try:
            coco.dataset = {key: dataset[key] for key in ("images", "annotations")}
            with contextlib.redirect_stdout(io.StringIO()):
                coco.createIndex()
            annotations = dataset["annotations"]
            unreadable = [one["id"] for one in annotations if not isinstance(one["caption"], str)]
            unknown = list(dict.fromkeys(one["image_id"] for one in annotations if one["image_id"] not in coco.imgs))
            doubled = [
                image_id for image_id, times in Counter(one["id"] for one in dataset["images"]).items() if times > 1
            ]
            records = [
                CaptionedImage(
                    image_id,
                    folder / image["file_name"],
                    tuple(annotation["caption"] for annotation in coco.imgToAnns[image_id]),
                )
                for image_id, image in coco.imgs.items()
            ]
        except KeyError as error:
            raise InputError(
                f"{path} lacks the key {error} where one is needed: give a caption file in COCO's format."
            ) from None
        except (TypeError, AttributeError):
            raise InputError(f"{path} is JSON but not COCO's: give 'images' and 'annotations' as lists.") from None
        if unreadable:
            raise InputError(f"{path}, annotation {unreadable[0]} has a caption that is not text: mend or remove it.")
        if unknown:
            raise InputError(
                f"{path} has captions of {len(unknown)} images that its 'images' do not list, the first is "
                f"{unknown[0]!r}: list them, under the same ids."
            )
        if doubled:
            raise InputError(f"{path} lists the image {doubled[0]!r} more than once: keep one entry.")
        return records


class ImageFolder(CaptionFiles):
    """Images with their captions beside them, as ``captioner caption`` writes them.

    Parameters
    ----------
    root
        The folder with a folder for each split.
    captions
        The file in a split's folder that names images in it and their captions, as Hugging Face's ``metadata.jsonl``
        does: "file_name" and "text", which is a caption or a list of them. Or the extension of text files beside the
        images, such as ``.txt``, with a caption in each line.
    splits
        The splits there are.

    Notes
    -----
    An image's id is its path, seen from the folder of its split.
    """

    def __init__(
        self, root: Path, captions: str = "metadata.jsonl", splits: tuple[str, ...] = ("train", "val")
    ) -> None:
        self.root = Path(root)
        self.captions = captions
        self.splits = tuple(splits)

    def __str__(self) -> str:
        return str(self.root / "{split}" / ("*" * self.captions.startswith(".") + self.captions))

    def records(self, split: str | None = None) -> list[CaptionedImage]:
        """Return the images of a split, or those of the root itself, see `CaptionFiles.records`."""
        if split is not None:
            _check_split("This dataset", split, self.splits)
        folder = self.root / (split or "")
        _check_folder(folder)
        read = self._sidecars if self.captions.startswith(".") else self._metadata
        return [CaptionedImage(name, folder / name, captions) for name, captions in read(folder).items()]

    def _metadata(self, folder: Path) -> dict[str, tuple[str, ...]]:
        path = folder / self.captions
        found: dict[str, tuple[str, ...]] = {}
        for number, line in enumerate(_read_lines(path), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                name, text = record["file_name"], record["text"]
            except (ValueError, RecursionError, KeyError, TypeError):
                name = text = None
            captions = [text] if isinstance(text, str) else text
            is_list = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
            if not isinstance(name, str) or not is_list:
                raise InputError(f"{path}, line {number} is not JSON with 'file_name' and 'text': mend the line.")
            if name in found:
                raise InputError(f"{path}, line {number} names the image {name} again: give its captions as one list.")
            found[name] = tuple(captions)
        return found

    def _sidecars(self, folder: Path) -> dict[str, tuple[str, ...]]:
        # Not strict: in Python 3.11 WebP is no registered type yet.
        kinds = {file: mimetypes.guess_type(file, strict=False)[0] for file in folder.rglob("*")}
        files = sorted(file for file, kind in kinds.items() if kind is not None and kind.startswith("image/"))
        texts = {file: file.with_suffix(self.captions) for file in files}
        return {
            file.relative_to(folder).as_posix(): tuple(line for line in _read_lines(text) if line.strip())
            for file, text in texts.items()
            if text.is_file()
        }


def open_captions(path: Path) -> CaptionFiles:
    """Return the reader of a dataset's folder or of a caption file alone, whose format is recognised.

    Parameters
    ----------
    path
        A folder as `Flickr8k` or `COCOCaptions` describe it, a COCO caption file (``.json``), or a file of Flickr8k's
        lines (any other name), with the lists of its splits beside it if these are asked for.

    Raises
    ------
    InputError
        If there is no such file or folder, or it is neither.
    """
    if path.is_dir():
        if (path / "Flickr8k.token.txt").is_file():
            return Flickr8k(path)
        if (path / "annotations").is_dir():
            return COCOCaptions(path)
        raise InputError(
            f"{path} holds neither Flickr8k.token.txt nor COCO's folder annotations: "
            "give the folder that holds one, or the caption file itself."
        )
    if not path.exists():
        raise InputError(f"{path} does not exist: give a dataset's folder or its caption file.")
    if path.suffix.lower() == ".json":
        return COCOCaptions(path.parent, captions=path.name, images=".", splits=())
    return Flickr8k(path.parent, captions_file=path.name)


def _check_split(dataset: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        there_are = f"choose from {', '.join(splits)}" if splits else "it is one file for all, leave the split out"
        raise InputError(f"{dataset} has no split '{split}'; {there_are}.")


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: give the folder that holds the dataset.")


def _read_lines(path: Path) -> list[str]:
    # Not splitlines, which would cut a caption at U+2028 and the like.
    return read_text(path).replace("\r\n", "\n").split("\n")


def read_text(path: Path) -> str:
    """Return a file's text, which is UTF-8, line ends as they are.

    Raises
    ------
    InputError
        If the file cannot be read or is not UTF-8.
    """
    try:
        # Bytes first: text mode would turn a carriage return inside a caption into a line break.
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text at byte {error.start}: convert it to UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None


def _on_disk(records: list[CaptionedImage]) -> list[CaptionedImage]:
    """Return the records, or raise an `InputError` if an image of theirs is missing."""
    # One listing of each folder: asking for 100,000 files one by one takes minutes on a network drive.
    folders = {record.path.parent for record in records}
    present = {folder: {file.name for file in folder.iterdir()} if folder.is_dir() else set() for folder in folders}
    missing = [record.path for record in records if record.path.name not in present[record.path.parent]]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(records)} images are missing, the first is {missing[0]}: put the images there."
        )
    return records
