"""The files that captions of images go to, and how a run that was stopped at any moment goes on."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout

from captioner.errors import InputError, in_one_line
from captioner.output_files import check_writable, write, write_parts

JOURNAL = 1  # the version of its form
COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")  # as in COCO_val2014_000000000042.jpg, since 2017 alone


class Outcome(NamedTuple):
    """What became of an image.

    Attributes
    ----------
    image : Path
        Its file.
    captions : sequence of tuple
        Each caption's text and natural log-probability, the best first; empty where there is none.
    fault : str
        Why there is none: one line, empty where there is one.
    """

    image: Path
    captions: Sequence[tuple[str, float]] = ()
    fault: str = ""


def counted(number: int) -> str:
    """Return a number of images, for people to read."""
    return f"{number:,} image{'s' * (number != 1)}"


# The formats


class Format(ABC):
    """A format of files of captions.

    Parameters
    ----------
    file : Path
        The file that is to be written.
    captions : int
        How many captions an image may have.
    """

    def __init__(self, file: Path, captions: int) -> None:
        self.file = file
        self.captions = captions

    @abstractmethod
    def name(self, image: Path) -> str | int:
        """Return what the file calls an image.

        Raises
        ------
        InputError
            Where the format has no name for it.
        """

    @abstractmethod
    def parts(self, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Return the file's text, part by part, of images that have captions."""

    def check(self, images: Sequence[Path]) -> None:
        """See before the work that the format can hold what is to come.

        Raises
        ------
        InputError
            If it cannot, such as where two images have one name in it.
        """
        named: dict[str | int, Path] = {}
        for image in images:
            name = self.name(image)
            if name in named:
                raise InputError(
                    f"{self.file} would call both {named[name]} and {image} {name!r}: choose JSON lines, which keep "
                    "the paths, or caption these folders into a file each."
                )
            named[name] = image


class JSONLines(Format):
    """An object in each line: "image" (the path), "caption" and "log_probability" of the best, "captions" of several.

    "captions" holds objects with "caption" and "log_probability", the best among them.
    """

    def name(self, image: Path) -> str:
        """Return the path, see `Format.name`."""
        return str(image)

    def parts(self, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Return the lines, see `Format.parts`."""
        for image, captions, _ in outcomes:
            several = [{"caption": text, "log_probability": value} for text, value in captions]
            record = {"image": self.name(image), **several[0], **({"captions": several} if self.captions > 1 else {})}
            yield json.dumps(record, ensure_ascii=False) + "\n"


class CSV(Format):
    """A row for each image: image (the path), caption and log_probability, then caption_2, log_probability_2, ..."""

    def name(self, image: Path) -> str:
        """Return the path, see `Format.name`."""
        # CSV has no escapes of its own for half a character, and UTF-8 has no place for it.
        return str(image).encode("utf-8", "backslashreplace").decode()

    def parts(self, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Return the rows, see `Format.parts`."""
        numbers = ["", *(f"_{number}" for number in range(2, self.captions + 1))]
        yield _row(["image", *(f"{column}{number}" for number in numbers for column in ("caption", "log_probability"))])
        for image, captions, _ in outcomes:
            values = [value for caption in captions for value in caption]
            yield _row([self.name(image), *values, *[""] * (2 * self.captions - len(values))])


class COCOResults(Format):
    """COCO's results: a JSON list of "image_id" and "caption", one for each image.

    The id is the number in a name such as COCO_val2014_000000000042.jpg or 000000000042.jpg, and else the file's name.
    """

    def name(self, image: Path) -> str | int:
        """Return the number or the name, see `Format.name`."""
        number = COCO_NAME.fullmatch(image.stem)
        return int(number[1]) if number else image.name

    def parts(self, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Return the list, see `Format.parts`."""
        before = "[\n"
        for image, captions, _ in outcomes:
            yield before + json.dumps({"image_id": self.name(image), "caption": captions[0][0]}, ensure_ascii=False)
            before = ",\n"
        yield "[]\n" if before == "[\n" else "\n]\n"

    def check(self, images: Sequence[Path]) -> None:
        """See that it can hold what is to come, see `Format.check`."""
        if self.captions > 1:
            raise InputError(
                f"{self.file} is to hold COCO results, which are one caption of each image, and not {self.captions}: "
                "leave out --captions, or choose .jsonl or .csv."
            )
        super().check(images)


class Metadata(Format):
    """The metadata.jsonl of Hugging Face's image folders: "file_name", seen from its own folder, and "text".

    Of several captions "text" is the list, the best first.
    """

    def name(self, image: Path) -> str:
        """Return the path from the file's folder on, see `Format.name`."""
        folder = Path(os.path.abspath(self.file)).parent  # not resolved: a link inside the folder is inside
        try:
            return Path(os.path.abspath(image)).relative_to(folder).as_posix()
        except ValueError:
            raise InputError(
                f"{self.file} can name no image outside its own folder, such as {image}: write the file into a folder "
                "that holds all of them."
            ) from None

    def parts(self, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Return the lines, see `Format.parts`."""
        for image, captions, _ in outcomes:
            texts = [text for text, _ in captions]
            record = {"file_name": self.name(image), "text": texts if self.captions > 1 else texts[0]}
            yield json.dumps(record, ensure_ascii=False) + "\n"


FORMATS: dict[str, type[Format]] = {"jsonl": JSONLines, "csv": CSV, "coco": COCOResults, "metadata": Metadata}
SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".json": "coco"}


def format_of(file: Path) -> str:
    """Return the key in `FORMATS` of what a file's name promises.

    Raises
    ------
    InputError
        If it promises none.
    """
    if file.name == "metadata.jsonl":
        return "metadata"
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"The format of {file} is not known from its name: end it in {', '.join(SUFFIXES)}, call it "
            f"metadata.jsonl, or give --format {', '.join(FORMATS)}."
        )
    return SUFFIXES[file.suffix.lower()]


def _row(values: Sequence[object]) -> str:
    row = io.StringIO(newline="")
    csv.writer(row).writerow(values)
    return row.getvalue()


# The journal, and the file that becomes of it


class CaptionFile:
    """A file of captions that is written whole, and the journal beside it that a run goes on from.

    The journal ``FILE.journal`` has a line with the run's settings and one for each image that is done. Lines are added
    batch by batch and are on the disk before the next batch begins. Each counts how many of its batch follow it, so
    that a batch whose writing was cut off is known and dropped. In the end the file is made of it and takes its place,
    and a last line says so. The journal stays: from it the file grows when there are more images, or mended ones.
    While a process writes, it holds ``FILE.lock``, which the system takes from a process that is killed.

    Parameters
    ----------
    form : Format
        Names the file and its format.
    settings : mapping
        All that decides the captions, as plain JSON: the file holds captions of these alone.
    beside : mapping
        What is written of each image beside the file, before it counts as done: a run that was stopped goes on with
        the same, a file that is complete may grow with another.

    Attributes
    ----------
    failed : int
        How many images could not be read, once the file is finished; `failures` lists them.
    """

    def __init__(
        self, form: Format, settings: Mapping[str, object], beside: Mapping[str, object] | None = None
    ) -> None:
        self.form = form
        self.file = form.file
        self.journal = _journal(self.file)
        self.failures = self.file.with_name(self.file.name + ".failures.txt")
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._beside: dict[str, Any] = json.loads(json.dumps(beside or {}))
        self.failed = 0
        self._places: dict[str, int] = {}  # in the journal, of each image's last line
        self._end = 0  # of its last whole batch
        self._finished: list[int] | None = None  # what the file was when it was made of the journal

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Keep other processes from writing the file.

        Raises
        ------
        InputError
            Where another one does, or nothing can be written there.
        """
        check_writable(self.file)
        path = self.file.with_name(self.file.name + ".lock")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{self.file} is being written by another process: wait for it, or write elsewhere."
            ) from None
        except OSError as error:
            raise InputError(f"The file {path} cannot be made ({error.strerror}): write elsewhere.") from error
        try:
            yield self
        finally:
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()
            lock.release()

    def begin(self, images: Sequence[Path], overwrite: bool = False) -> list[Path]:
        """Return the images that are still to be captioned.

        An image is done when it has captions in the journal and was not changed since. New images come first, and then
        those that failed in an earlier run, which may have been mended.

        Parameters
        ----------
        images
            All that the file shall hold, in its order.
        overwrite
            Whether a file that is there, or a journal of other settings, gives way.

        Raises
        ------
        InputError
            Where these are there and do not give way, or the file would lose captions.
        """
        found = self._read_journal()
        if self._finished and (overwrite or not self.file.exists()):
            self._places, self._finished = {}, None
        if self._places and found is not None:
            others, beside = found
            if different := _differences(others, self._settings) or (
                "" if self._finished else _differences(beside, self._beside)
            ):
                if not overwrite:
                    made = f"{self.file} was made" if self._finished else f"{self.journal} was begun"
                    raise InputError(
                        f"{made} with other settings ({different}): give those to go on, write elsewhere, or give "
                        "--overwrite to begin anew."
                    )
                self._places = {}
        if not self._places:
            if self.file.exists() and not overwrite:
                raise InputError(
                    f"{self.file} is there already, and nothing beside it says how it was made: write elsewhere, or "
                    "give --overwrite to replace it."
                )
            return list(images)
        there = {outcome.image: bool(outcome.fault) for outcome in self._outcomes(images, unchanged=True)}
        todo = [image for image in images if image not in there] + [image for image, failed in there.items() if failed]
        if todo:
            self._check_nothing_is_lost(images)
        return todo

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what became of a batch of images. When this returns, it is on the disk.

        Raises
        ------
        InputError
            If it cannot be written. What was written down before stays.
        """
        if not self._places or self._finished:
            # Not before: a run that comes to nothing, since a word is not known, say, leaves nothing behind.
            self._begin_journal()
        lines = [
            {"image": str(image), "state": _state(image), "captions": captions, "fault": fault, "left": left}
            for left, (image, captions, fault) in zip(reversed(range(len(outcomes))), outcomes, strict=True)
        ]
        self._append(lines)

    def finish(self, images: Sequence[Path]) -> None:
        """Write the file, and beside it a list of the images that have failed, if any have.

        A file that was finished before stays as it is, unless something was added since.

        Parameters
        ----------
        images
            As for `begin`. All are done.

        Raises
        ------
        InputError
            If a file cannot be written. What was done stays in the journal.
        """
        faults = [f"{in_one_line(image)}\t{fault}\n" for image, _, fault in self._outcomes(images) if fault]
        self.failed = len(faults)
        if self._finished:
            return
        if faults:
            write(self.failures, "".join(faults))
        else:
            self.failures.unlink(missing_ok=True)
        parts = self.form.parts(outcome for outcome in self._outcomes(images) if outcome.captions)
        write_parts(self.file, parts, to_disk=True)
        self._append([{"finished": _state(self.file)}])

    def _begin_journal(self) -> None:
        """Write a journal of what is done already, and of nothing if that is nothing."""
        header = {"captioner journal": JOURNAL, "settings": self._settings, "beside": self._beside}
        places = {}

        def parts() -> Iterator[str]:
            self._end = 0
            for image, record in chain([("", header)], self._records()):
                line = json.dumps(record) + "\n"
                if image:
                    places[image] = self._end
                self._end += len(line)
                yield line

        write_parts(self.journal, parts(), to_disk=True)
        self._places, self._finished = places, None

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the last line of each image that is done, as one of a batch of its own."""
        if self._places:
            with open(self.journal, "rb") as file:
                for image, place in self._places.items():
                    file.seek(place)
                    yield image, {**json.loads(file.readline()), "left": 0}

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        data = memoryview(b"".join(lines))
        try:
            with open(self.journal, "r+b", buffering=0) as file:
                file.truncate(self._end)  # a batch that was cut off
                file.seek(self._end)
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"The file {self.journal} cannot be written ({error.strerror}): see to it, and the same command goes "
                "on where it stopped."
            ) from error
        for record, line in zip(records, lines, strict=True):
            if "image" in record:
                self._places[record["image"]] = self._end
            self._end += len(line)

    def _read_journal(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Find the places of the images in the journal, and return its settings; None where there is no journal."""
        self._places, self._finished = {}, None
        try:
            with open(self.journal, "rb") as file:
                header = file.readline()
                self._end = len(header)
                batch, place = {}, self._end
                for line in file:
                    try:
                        record = json.loads(line) if line.endswith(b"\n") else None
                    except ValueError:
                        break
                    if record is None:
                        break
                    if "finished" in record:
                        self._finished = record["finished"]
                        break
                    batch[record["image"]] = place
                    place += len(line)
                    if not record["left"]:
                        self._places |= batch
                        self._end = place
                        batch = {}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"The file {self.journal} cannot be read ({error.strerror}): see to it.") from error
        try:
            found = json.loads(header)
            if found["captioner journal"] != JOURNAL:
                raise ValueError
            return dict(found["settings"]), dict(found["beside"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.journal} stands where a run writes down what it has done, and is not of this captioner: move "
                "it away, or write elsewhere."
            ) from None

    def _outcomes(self, images: Iterable[Path], unchanged: bool = False) -> Iterator[Outcome]:
        """Return what the journal holds of images; with `unchanged` of those alone that are what they were."""
        with open(self.journal, "rb") as file:
            for image in images:
                if (place := self._places.get(str(image))) is not None:
                    file.seek(place)
                    record = json.loads(file.readline())
                    if not unchanged or record["state"] == _state(image):
                        yield Outcome(image, [(text, value) for text, value in record["captions"]], record["fault"])

    def _check_nothing_is_lost(self, images: Sequence[Path]) -> None:
        if self._finished and self._finished != _state(self.file):
            raise InputError(
                f"{self.file} was changed since it was written, which would be lost with more captions in it: write "
                "elsewhere, or give --overwrite to replace it."
            )
        given = set(map(str, images))
        if others := [image for image in self._places if image not in given and os.path.lexists(image)]:
            raise InputError(
                f"{self.file} would lose the captions of {counted(len(others))} not given now, such as {others[0]}: "
                "give them, too, write elsewhere, or give --overwrite to replace it."
            )


def _journal(file: Path) -> Path:
    return file.with_name(file.name + ".journal")


def _differences(others: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name what was set otherwise, as the command's flags do."""
    return ", ".join(
        "another checkpoint"
        if name == "checkpoints"
        else f"--{name.replace('_', '-')} {others.get(name)!r} and not {value!r}"
        for name, value in settings.items()
        if others.get(name) != value
    )


def settings_of(file: Path) -> Mapping[str, Any]:
    """Return the settings that a file was made with, or of the run that was stopped; none if they are not known."""
    try:
        with open(_journal(file), "rb") as journal:
            settings: dict[str, Any] = json.loads(journal.readline())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings


def _state(image: Path) -> list[int] | None:
    """Return what changes when another image takes a file's place."""
    try:
        status = image.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


# A text file beside each image


class Sidecars(NamedTuple):
    """Text files beside the images, as those who prepare training sets use them: ``photo.txt`` for ``photo.png``.

    Attributes
    ----------
    extension : str
        With its dot.
    before, after : str
        What stands around each caption, as it is.
    """

    extension: str = ".txt"
    before: str = ""
    after: str = ""

    def path(self, image: Path) -> Path:
        """Return the file that belongs to an image."""
        return image.with_suffix(self.extension)

    def write(self, outcome: Outcome) -> None:
        """Write an image's captions, each in a line, whole or not at all.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        write(self.path(outcome.image), "".join(f"{self.before}{text}{self.after}\n" for text, _ in outcome.captions))
