"""The files that captions of images go to, and how a run that was stopped at any moment goes on."""

from __future__ import annotations

import csv
import hashlib
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
from captioner.text_files import as_cell

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
        """Return the rows, see `Format.parts`.

        A path or a caption that a spreadsheet would take for a formula has an apostrophe before it, which the readers
        of this program take away again.
        """
        numbers = ["", *(f"_{number}" for number in range(2, self.captions + 1))]
        yield _row(["image", *(f"{column}{number}" for number in numbers for column in ("caption", "log_probability"))])
        for image, captions, _ in outcomes:
            values = [value for text, number in captions for value in (as_cell(text), number)]
            yield _row([as_cell(self.name(image)), *values, *[""] * (2 * self.captions - len(values))])


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
    and a last line says so: the file then holds what the journal does. It stays, so that the file can grow when there
    are more images, or mended ones. While a process writes, it holds ``FILE.lock``, which the system takes from a
    process that is killed.

    Parameters
    ----------
    form : Format
        Names the file and its format.
    settings : mapping
        All that decides the captions and is not as by default, as plain JSON: the file holds captions of these alone.

    Attributes
    ----------
    changed : set of Path
        After `begin`: the images that are to be captioned again since they are others than they were.
    gone : int
        After `begin`: of how many images captions leave the file, since they are neither given nor there any longer.
    edited : bool
        After `begin`: whether the file is complete but was changed by others since it was written. It is left so.
    failed : list of Path
        After `finish`: the images that could not be read; `failures` lists them.
    """

    def __init__(self, form: Format, settings: Mapping[str, object]) -> None:
        self.form = form
        self.file = form.file
        self.journal = _journal(self.file)
        self.failures = self.file.with_name(self.file.name + ".failures.txt")
        self.changed: set[Path] = set()
        self.gone = 0
        self.edited = False
        self.failed: list[Path] = []
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._states: dict[Path, list[int] | None] = {}  # of images before they are read
        # Of the journal:
        self._places: dict[str, int] = {}  # of each image's last line
        self._end = 0  # of its last whole batch
        self._overwrites = False  # whether it was begun to overwrite a file
        self._replaces: str | None = None  # the digest of the file that its own will replace
        self._finished: str | None = None  # the digest of the file that was made of it
        self._open = False  # whether it can be added to as it stands on the disk

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
            Whether all are captioned anew, whatever is there. A run that does so and was stopped is gone on with.

        Raises
        ------
        InputError
            Where the file was made in other settings, is not known, was changed by others, or would lose captions.
        """
        settings = self._read_journal()
        given = {str(image) for image in images}
        others = [image for image in map(Path, self._places) if str(image) not in given]
        others = [image for image, record in self._found(others) if record["captions"]]
        there = [image for image in others if os.path.lexists(image)]
        if overwrite:
            goes_on = self._overwrites and not self._finished and settings == self._settings and not there
        else:
            goes_on = bool(self._places) and (self.file.exists() or not self._finished)
            self._check(settings if goes_on else None)
        if not goes_on:
            self._places, others, there = {}, [], []
            self._replaces = self._finished = None
        self._overwrites = overwrite

        self._states = {image: _state(image) for image in images}
        done: dict[Path, bool] = {}  # and whether it failed
        self.changed = set()
        for image, record in self._found(images):
            if record["state"] == self._states[image]:
                done[image] = bool(record["fault"])
            elif record["captions"]:
                self.changed.add(image)
        todo = [image for image in images if image not in done]
        failed = [image for image, is_failed in done.items() if is_failed]
        self.gone = len(others) - len(there)
        written = self._finished or self._replaces
        self.edited = written is not None and self.file.exists() and _digest(self.file) != written
        if todo or self.gone or not self._finished:
            if there:
                raise InputError(
                    f"{self.file} would lose the captions of {counted(len(there))} not given now, such as {there[0]}: "
                    "give them, too, write elsewhere, or give --overwrite to replace it."
                )
            if self.edited:
                raise InputError(
                    f"{self.file} was changed since it was written, which would be lost when it is written again: "
                    "write elsewhere, or give --overwrite to replace it."
                )
        elif there or self.edited:
            failed = []  # one that is mended by now could not get into the file
        self._places = {image: place for image, place in self._places.items() if image in given}
        self._open = goes_on and not self._finished and not self.gone
        return todo + failed

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what became of a batch of images. When this returns, it is on the disk.

        Raises
        ------
        InputError
            If it cannot be written. What was written down before stays.
        """
        if self._finished:  # images that have failed once more change nothing
            outcomes = [each for each in outcomes if each.captions or str(each.image) not in self._places]
        if not outcomes:
            return
        if not self._open:
            # Not before: a run that comes to nothing, since a word is not known, say, leaves nothing behind.
            self._write_journal()
        self._append(
            [
                {
                    "image": str(image),
                    "state": self._states[image],
                    "captions": captions,
                    "fault": fault,
                    "left": left,
                }
                for left, (image, captions, fault) in zip(reversed(range(len(outcomes))), outcomes, strict=True)
            ]
        )

    def finish(self, images: Sequence[Path]) -> None:
        """Write the file, and beside it a list of the images that have failed, if any have.

        A file that is complete stays as it is.

        Parameters
        ----------
        images
            As for `begin`. All are done.

        Raises
        ------
        InputError
            If a file cannot be written. What was done stays in the journal.
        """
        faults = {image: f"{in_one_line(image)}\t{fault}\n" for image, _, fault in self._outcomes(images) if fault}
        self.failed = list(faults)
        if self._finished and not self.gone:
            return
        if not self._open:
            self._write_journal()
        if faults:
            write(self.failures, "".join(faults.values()))
        else:
            self.failures.unlink(missing_ok=True)
        if self._replaces is not None:
            self._append([{"replaces": None}])  # from now on another file may be there
        parts = self.form.parts(outcome for outcome in self._outcomes(images) if outcome.captions)
        write_parts(self.file, parts, to_disk=True)
        self._append([{"finished": _digest(self.file)}])

    def _check(self, settings: Mapping[str, Any] | None) -> None:
        """See that what a run has done, or else nothing, can be gone on with."""
        if settings is None:
            if self.file.exists():
                raise InputError(
                    f"{self.file} is there already, and nothing beside it says how it was made: write elsewhere, or "
                    "give --overwrite to replace it."
                )
        elif different := _differences(settings, self._settings):
            made = f"{self.file} was made" if self._finished else f"{self.journal} was begun"
            raise InputError(
                f"{made} with other settings ({different}): give those to go on, write elsewhere, or give --overwrite "
                "to begin anew."
            )
        elif self._overwrites and not self._finished and self.file.exists():
            raise InputError(
                f"{self.file} was being overwritten by a run that was stopped: give --overwrite again to go on, or "
                f"delete {self.journal}."
            )

    def _write_journal(self) -> None:
        """Write a journal of what is done already, and of nothing if that is nothing."""
        self._replaces = self._finished or self._replaces
        header = {
            "captioner journal": JOURNAL,
            "settings": self._settings,
            "overwrites": self._overwrites,
            "replaces": self._replaces,
        }
        places: dict[str, int] = {}
        end = 0

        def parts() -> Iterator[str]:
            nonlocal end
            for image, record in chain([("", header)], self._records()):
                line = json.dumps(record) + "\n"
                if image:
                    places[image] = end
                end += len(line)
                yield line

        write_parts(self.journal, parts(), to_disk=True)
        self._places, self._end, self._finished, self._open = places, end, None, True

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

    def _read_journal(self) -> dict[str, Any] | None:
        """Find the places of the images in the journal, and return its settings; None where there is no journal."""
        self._places, self._finished, self._replaces, self._overwrites = {}, None, None, False
        header = _header(self.journal)
        if header is None:
            return None
        self._overwrites, self._replaces = header["overwrites"], header["replaces"]
        with open(self.journal, "rb") as file:
            self._end = len(file.readline())
            batch, place = {}, self._end
            for line in file:
                record = _record(line)
                if record is None:  # cut off
                    break
                if "finished" in record:
                    self._finished = record["finished"]
                    break
                if "replaces" in record:
                    self._replaces = record["replaces"]
                else:
                    batch[record["image"]] = place
                place += len(line)
                if "replaces" in record or not record["left"]:
                    self._places |= batch
                    self._end = place
                    batch = {}
        return dict(header["settings"])

    def _found(self, images: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Return the last line of each image that has one."""
        if self._places:
            with open(self.journal, "rb") as file:
                for image in images:
                    if (place := self._places.get(str(image))) is not None:
                        file.seek(place)
                        yield image, json.loads(file.readline())

    def _outcomes(self, images: Iterable[Path]) -> Iterator[Outcome]:
        for image, record in self._found(images):
            yield Outcome(image, [(text, value) for text, value in record["captions"]], record["fault"])


def settings_of(file: Path, overwrite: bool = False) -> Mapping[str, Any]:
    """Return the settings that a file was made with, or that a run was in that was stopped; none if it begins anew.

    Raises
    ------
    InputError
        Where what stands in the journal's place is none.
    """
    header = _header(_journal(file))
    return {} if header is None or (overwrite and not header["overwrites"]) else dict(header["settings"])


def _journal(file: Path) -> Path:
    return file.with_name(file.name + ".journal")


def _header(journal: Path) -> dict[str, Any] | None:
    """Read a journal's first line; None where there is no journal."""
    try:
        with open(journal, "rb") as file:
            line = file.readline()
        if not line:
            return None
        header: dict[str, Any] = json.loads(line)
        if (
            header["captioner journal"] != JOURNAL
            or not isinstance(header["settings"], dict)
            or not isinstance(header["overwrites"], bool)
            or not isinstance(header["replaces"], str | None)
        ):
            raise ValueError
        return header
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"The file {journal} cannot be read ({error.strerror}): see to it.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{journal} stands where a run writes down what it has done, and is not of this captioner: move it away, "
            "or write elsewhere."
        ) from None


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line of a journal behind its first says; None where it is cut off, or not of this program."""
    try:
        record: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if "finished" in record or "replaces" in record:
            is_one = isinstance(record.get("finished", record.get("replaces")), str | None)
        else:
            captions = [(text, value) for text, value in record["captions"]]
            is_one = (
                isinstance(record["image"], str)
                and isinstance(record["fault"], str)
                and isinstance(record["left"], int)
                and "state" in record
                and all(isinstance(text, str) and isinstance(value, int | float) for text, value in captions)
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if is_one else None


def _differences(others: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name what was set otherwise, as the command's flags do; what is not there was as it is by default."""
    return ", ".join(
        "another checkpoint"
        if name == "checkpoints"
        else f"--{name.replace('_', '-')} {_value(others, name)} and not {_value(settings, name)}"
        for name in {**settings, **others}
        if others.get(name) != settings.get(name)
    )


def _value(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "by default"


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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
