"""Captions that a system gave for images, in the files that such systems write: COCO results, JSON lines, CSV.

Ours are COCO results.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from captioner.errors import InputError
from captioner.output_files import write
from captioner.text_files import from_cell, read_text

IMAGE_KEYS = ("image_id", "image", "file_name")  # in this order, where a record has several


class Result(NamedTuple):
    """A caption that a system gave.

    Attributes
    ----------
    image : str or int
        The image's id or file name, as the system wrote it.
    caption : str
        The caption, which may be empty.
    """

    image: str | int
    caption: str


def read_results(path: Path) -> list[Result]:
    """Read a file of results, whose format is recognised by how it begins.

    Parameters
    ----------
    path
        A COCO results file (a JSON list of ``{"image_id": ..., "caption": ...}``), JSON lines (one such object in a
        line, as ``captioner caption --output`` writes), or CSV with a header. The image stands under ``image_id``,
        ``image`` or ``file_name``.

    Raises
    ------
    InputError
        If the file cannot be read, or a record lacks its image or its caption. The record is named.
    """
    text = read_text(path)
    beginning = text.lstrip()[:1]
    if not beginning:
        raise InputError(f"{path} is empty: give one record for each image.")
    if beginning == "[":
        records = _json_list(path, text)
    elif beginning == "{":
        records = _json_lines(path, text)
    else:
        records = _csv(path, text)
    return [_result(where, record) for where, record in records]


def write_results(path: Path, captions: Mapping[str | int, str]) -> None:
    """Write a COCO results file of the caption of each image, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    records = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    # A record in each line, which people can read and compare.
    write(path, "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n")


def _json_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): write it again.") from None
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which would cut a caption at U+2028
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}, line {number} is not valid JSON: give a JSON list of records, or one record in each line."
            ) from None


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    first, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=first.count)  # spreadsheets write what their country's comma leaves over
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows)]
        if "caption" not in header or not set(IMAGE_KEYS) & set(header) or len(set(header)) < len(header):
            raise InputError(
                f"{path} is neither JSON nor CSV with the columns image_id and caption: "
                "name them in its first line, each once, or give a COCO results file."
            )
        is_ours = "log_probability" in header  # as `captioner caption` writes tables, whose cells are no formulas
        for row in rows:
            if not any(value.strip() for value in row):
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) > len(header):
                raise InputError(f"{where} has more values than columns: put a caption with commas in double quotes.")
            yield where, dict(zip(header, map(from_cell, row) if is_ours else row, strict=False))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num} is not valid CSV ({error}): mend the line.") from None


def _result(where: str, record: Any) -> Result:
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not an object: give one with 'image_id' and 'caption'.")
    image = next((record[key] for key in IMAGE_KEYS if record.get(key) not in (None, "")), None)
    if isinstance(image, float) and image.is_integer():
        image = int(image)  # what pandas makes of a number's column in which one was missing
    if not isinstance(image, str | int) or isinstance(image, bool):
        raise InputError(f"{where} names no image: give 'image_id', or 'image' or 'file_name', as a text or a number.")
    caption = record.get("caption")
    if not isinstance(caption, str):
        raise InputError(f"{where} (image {image!r}) has no caption: give 'caption' as a text, which may be empty.")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} (image {image!r}) has half a character (a lone surrogate): mend it.") from None
    return Result(image, caption)
