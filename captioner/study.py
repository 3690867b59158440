"""A study: one recipe, trained once for each row of a table with other settings; and the YAML file that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from captioner.errors import InputError
from captioner.text_files import read_text

# Settings that a study makes for each run: nobody else can.
OWN = ("seed_everything", "trainer.default_root_dir", "trainer.devices", "checkpoint.dirpath", "ckpt_path")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes
    ----------
    name, group : str
        What it is called, and of what kind it is.
    seeds : tuple of int
        It is trained once with each.
    flags : tuple of str
        Of `captioner fit`: its difference from the other rows.
    """

    name: str
    group: str
    seeds: tuple[int, ...]
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of the folder of its runs: small letters, digits and hyphens."""
        return re.sub(r"[\W_]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes
    ----------
    recipe : Path
        What every run is laid over.
    budget : dict
        Settings of `captioner fit` that hold in every run, by their dotted names.
    reference : str
        Name of the row that the others are held against.
    rows : tuple of Row
        In the order of the table.
    """

    recipe: Path
    budget: dict[str, Any]
    reference: str
    rows: tuple[Row, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of `captioner fit` that hold in every run."""
        return ("--config", str(self.recipe), *_flags(self.budget))

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study from YAML, in which paths are relative to its folder.

        Raises
        ------
        InputError
            If the file cannot be read or is no study; the row is named.
        """
        try:
            given = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise InputError(f"The study {path} is no YAML: {' '.join(str(error).split())}.") from None
        except (RecursionError, ValueError):  # lists in lists in lists, a number of thousands of digits
            raise InputError(f"The study {path} is no YAML that can be read: write it again.") from None
        given = _mapping(given, f"The study {path}", {"recipe", "reference", "rows"}, {"budget"})
        recipe = _file(given["recipe"], f"The recipe of {path}", path.parent)
        budget = _settings(given.get("budget"), f"The budget of {path}")
        if not isinstance(given["rows"], list) or not given["rows"]:
            raise InputError(f"The study {path} has no list of rows: give one or more, as in configs/study.yaml.")
        rows = tuple(_row(row, f"Row {number} of {path}", path.parent) for number, row in enumerate(given["rows"], 1))
        for number, row in enumerate(rows):
            if row.folder in (other.folder for other in rows[:number]):
                raise InputError(f"Row {number + 1} of {path}, {row.name!r}, is named like another: call it otherwise.")
        if given["reference"] not in (row.name for row in rows):
            raise InputError(
                f"The reference of {path} is {given['reference']!r}, which is no row: give the name of one."
            )
        return cls(recipe, budget, given["reference"], rows)


def _row(given: Any, where: str, folder: Path) -> Row:
    given = _mapping(given, where, {"name", "group"}, {"seeds", "configs", "settings"})
    for key in ("name", "group"):
        if not isinstance(given[key], str) or not re.search(r"[^\W_]", given[key]):
            raise InputError(f"{where} has the {key} {given[key]!r}: give one with letters or digits.")
    seeds = given.get("seeds", [1])
    valid = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not valid or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"{where} has the seeds {seeds!r}: give a list of different whole numbers, such as [1, 2, 3].")
    configs = given.get("configs", [])
    if not isinstance(configs, list):
        raise InputError(f"{where} has the configs {configs!r}: give a list of files, such as [decoders/gru.yaml].")
    files = (str(_file(config, f"A configuration of {where[0].lower()}{where[1:]}", folder)) for config in configs)
    flags = (flag for file in files for flag in ("--config", file))
    return Row(given["name"], given["group"], tuple(seeds), (*flags, *_flags(_settings(given.get("settings"), where))))


def _mapping(given: Any, where: str, required: Collection[str], optional: Collection[str]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where} holds no settings: write some, as in configs/study.yaml.")
    unknown = [key for key in given if key not in {*required, *optional}]
    missing = sorted(key for key in required if key not in given)
    if unknown or missing:
        fault = f"has {unknown[0]!r}, which is unknown" if unknown else f"lacks {missing[0]!r}"
        raise InputError(f"{where} {fault}: give {', '.join(sorted(required))}, and if need be {', '.join(optional)}.")
    return given


def _settings(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(f"{where} has settings that are no names with values: write model.decoder.gate: false.")
    if own := [name for name in given if name in OWN]:
        raise InputError(f"{where} sets {own[0]}, which the study does for each run: leave it out.")
    return given


def _file(given: Any, where: str, folder: Path) -> Path:
    if not isinstance(given, str) or not (folder / given).is_file():
        raise InputError(f"{where} is {given!r}, which is no file in {folder}: give one, relative to that folder.")
    return folder / given


def _flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Give the settings as flags; what is no text is written as JSON, which is YAML."""
    for name, value in settings.items():
        yield f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
