"""Text files that people give: lines, JSON and tables, UTF-8 all of them, whose faults are named by file and line."""

from __future__ import annotations

import codecs
import csv
import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from captioner.errors import InputError

LARGEST = 4_000_000_000  # bytes of a text file, all of which are in memory at once; COCO's largest has a fortieth
# What a spreadsheet takes for a formula, by OWASP's list, with the apostrophes that were put before it.
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
QUOTED_FORMULA = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")


class Fault(InputError):
    """Something that is wrong in a file.

    Parameters
    ----------
    message : str
        The sentence of an `InputError`.
    kind : str
        What it is, in a word or two, such as "encoding" or "empty caption": for counting.
    path : Path, optional
        The file.
    line : int, optional
        The line, counted from 1, where it has one.
    """

    def __init__(self, message: str, kind: str = "", path: Path | None = None, line: int | None = None) -> None:
        super().__init__(message)  # the message alone, so that it goes from process to process
        self.kind, self.path, self.line = kind, path, line

    @classmethod
    def at(cls, path: Path, line: int, what: str, kind: str) -> Fault:
        """Return the fault of a line, whose sentence begins with it."""
        return cls(f"{path}, line {line} {what}", kind, path, line)


# What is done with a fault. What goes on after it leaves out what is wrong.
Report = Callable[[Fault], None]


def stop(fault: Fault) -> None:
    """Raise the fault: the first one ends the reading."""
    raise fault


def read_data(path: Path, largest: int = LARGEST) -> bytes:
    """Return what is in a file.

    Raises
    ------
    OSError
        If it cannot be read, is a device, which may have no end, or larger than `largest`.
    """
    with open(path, "rb", opener=_open_no_device) as file:
        if os.fstat(file.fileno()).st_size <= largest and len(data := file.read(largest + 1)) <= largest:
            return data
    raise OSError(errno.EFBIG, f"it has more than {largest // 10**6:,} MB")


def _open_no_device(path: str, flags: int) -> int:
    mode = os.stat(path).st_mode  # before it is opened, which some devices and pipes do not come back from
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.ENODEV, "it is a device")
    # What a shell makes of <(command) is a pipe, too; it lies there.
    if stat.S_ISFIFO(mode) and not os.path.realpath(os.path.dirname(path)).startswith(("/dev", "/proc")):
        raise OSError(errno.ENODEV, "it is a pipe")
    return os.open(path, flags)


def read_text(path: Path, report: Report = stop) -> str:
    """Return a file's text, which is UTF-8, line ends as they are.

    Parameters
    ----------
    path
        The file. A byte order mark is left out.
    report
        What is done with each line that is not UTF-8; if it goes on, U+FFFD stands where the bytes are none.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    try:
        # Bytes first: text mode would turn a carriage return inside a caption into a line break.
        data = read_data(path)
    except FileNotFoundError:
        raise Fault(f"{path} does not exist: check the path.", "missing file", path) from None
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        raise Fault(reason, "unreadable file", path) from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        report(Fault(f"{path} is UTF-16 text, by its first two bytes: save it as UTF-8.", "encoding", path))
        return data.decode("utf-16", errors="replace")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError:
        for number, line in enumerate(data.split(b"\n"), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                wrong = f"byte {error.start + 1} of it is 0x{line[error.start]:02x}"
                report(Fault.at(path, number, f"is not UTF-8 text ({wrong}): convert the file to UTF-8.", "encoding"))
        return data.decode(errors="replace")


def read_lines(path: Path, report: Report = stop) -> Iterator[tuple[int, str]]:
    """Give the lines that are not blank, with their numbers; see `read_text`."""
    # Not splitlines, which would cut a caption at U+2028 and the like.
    for number, line in enumerate(read_text(path, report).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def read_json(path: Path, report: Report = stop) -> Any:
    """Return what a JSON file holds; see `read_text`.

    Raises
    ------
    InputError
        If it is not JSON.
    """
    try:
        return json.loads(read_text(path, report))
    except json.JSONDecodeError as error:
        raise Fault(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno}: write or download it again.",
            "JSON",
            path,
            error.lineno,
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        raise Fault(f"{path} is not JSON that can be read: write or download it again.", "JSON", path) from None


def read_json_lines(path: Path, report: Report = stop) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the objects of a file that has one in each line, with the lines' numbers; see `read_text`."""
    for number, line in read_lines(path, report):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, record
        else:
            report(Fault.at(path, number, "is not a JSON object: mend the line.", "JSON"))


def read_rows(path: Path, report: Report = stop, delimiter: str | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """Give the rows of a CSV file by its columns, with the numbers of the lines that they begin in; see `read_text`.

    Parameters
    ----------
    path, report
        As for `read_text`.
    delimiter
        By default that one of comma, semicolon, tab and vertical bar of which the first line has most.
    """
    text = read_text(path, report)
    first = text.partition("\n")[0]
    # Lines end with a line feed alone: a carriage return in a quoted caption begins no line that an editor would count.
    lines = io.StringIO(text, newline="\n")
    rows = csv.reader(lines, delimiter=delimiter or max(",;\t|", key=first.count), strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            advice = "put a caption with commas, quotes or line breaks in double quotes, and double those inside it"
            report(Fault.at(path, number, f"is not valid CSV ({error}): {advice}.", "CSV"))
            row = []
        number, begun = rows.line_num + 1, number
        if not any(value.strip() for value in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            if doubled := next((name for name in header if header.count(name) > 1), None):
                report(Fault.at(path, begun, f"names the column {doubled!r} twice: rename one.", "column"))
        elif len(row) > len(header):
            advice = "put a caption with commas in double quotes"
            report(Fault.at(path, begun, f"has {len(row)} values for {len(header)} columns: {advice}.", "CSV"))
        else:
            yield begun, dict(zip_longest(header, row, fillvalue=""))  # values may be left out at a row's end


def as_cell(text: str) -> str:
    """Return a text as a cell of a CSV file that no spreadsheet takes for a formula: with an apostrophe before it."""
    return f"'{text}" if FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Return the text that `as_cell` has made a cell of."""
    return cell[1:] if QUOTED_FORMULA.match(cell) else cell
