"""The folder of a run: found again by its configuration, and its log gone on with."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from captioner.checkpoint import Progress, is_plain, read_progress
from captioner.errors import InputError
from captioner.output_files import write
from captioner.text_files import read_data

CONFIG, LAST = "config.yaml", "last.ckpt"
NAMED = 4  # settings that differ
# What changes nothing of a run's results: how it goes on, where its folder was found, who reads its images.
INDIFFERENT = {"ckpt_path", "config", "trainer.default_root_dir", "data.num_workers"}


class Run(NamedTuple):
    """A run that was begun.

    Attributes
    ----------
    folder : Path
        Where its configuration and its logs are.
    settings : dict
        Its configuration.
    checkpoint : Path
        What to go on from; there need not be such a file yet.
    """

    folder: Path
    settings: dict[str, Any]
    checkpoint: Path

    @property
    def time(self) -> float:
        """When it was begun or wrote a checkpoint, which is later."""
        times = [0.0]
        for path in (self.folder / CONFIG, self.checkpoint):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    @property
    def has_checkpoint(self) -> bool:
        """Tell whether its checkpoint is there, and not that of another run that wrote into the same folder.

        Raises
        ------
        InputError
            Where the file is no checkpoint of ours.
        """
        if not self.checkpoint.is_file():
            return False
        if self.settings.get("ckpt_path") == str(self.checkpoint):  # which it was to go on from, whosever it was
            return True
        return read_progress(self.checkpoint).settings in ("", digest(self.settings))


def find_last(settings: Mapping[str, Any]) -> Run | None:
    """Return the last run with a configuration, or None where there is no run at all.

    Parameters
    ----------
    settings : mapping
        Those of `captioner fit`, all of them. Which checkpoint it goes on from is not compared, and neither is a seed
        that is to be drawn.

    Raises
    ------
    InputError
        Where there are runs, and none with this configuration.
    """
    folders = _folders(settings)
    runs: list[Run] = sorted((run for folder in folders for run in _runs(folder)), key=lambda run: run.time)
    if not runs:
        return None
    same = [run for run in runs if not _differing(run.settings, settings)]
    if same:
        return same[-1]
    newest = runs[-1]
    names = _differing(newest.settings, settings)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise InputError(
        f"No run in {' or '.join(map(str, folders))} has this configuration, the newest, {newest.folder}, not in "
        f"{', '.join(names[:NAMED])}{more}: to go on with a run name its file, --ckpt_path {newest.checkpoint}."
    )


def _folders(settings: Mapping[str, Any]) -> list[Path]:
    """Return where runs write their configuration: the root, and the folders of loggers that are named."""
    trainer = settings["trainer"]
    loggers = trainer.get("logger")
    loggers = loggers if isinstance(loggers, list) else [loggers]
    named = [logger.get("init_args", {}).get("save_dir") for logger in loggers if isinstance(logger, dict)]
    return list(dict.fromkeys(Path(folder) for folder in (trainer["default_root_dir"], *named) if folder))


def _runs(folder: Path) -> Iterator[Run]:
    for pattern in (CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}"):
        for path in folder.glob(pattern):
            try:
                settings = yaml.safe_load(read_data(path))
            except (OSError, ValueError, RecursionError, yaml.YAMLError):  # something else's, or half of one
                continue
            if isinstance(settings, dict) and isinstance(settings.get("trainer"), dict) and is_plain(settings):
                yield Run(path.parent, settings, _checkpoints(path.parent, settings) / LAST)


def _checkpoints(folder: Path, settings: Mapping[str, Any]) -> Path:
    chosen = settings.get("checkpoint")
    if isinstance(chosen, dict) and isinstance(chosen.get("dirpath"), str):
        return Path(chosen["dirpath"])
    if isinstance(resumed := settings.get("ckpt_path"), str):
        return Path(resumed).parent  # where it went on
    return folder / "checkpoints"


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ, other than those of going on."""
    first, second = dict(flat(one)), dict(flat(other))
    ignored = set(INDIFFERENT)
    if isinstance(second.get("seed_everything"), bool):
        ignored.add("seed_everything")
    absent = object()
    names = sorted(first.keys() | second.keys())
    return [name for name in names if name not in ignored and first.get(name, absent) != second.get(name, absent)]


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Give nested settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def digest(settings: Mapping[str, Any]) -> str:
    """Return what is the same for the settings of a run, however it goes on, and another one for those of others."""
    ignored = {*INDIFFERENT, "seed_everything"}  # the seed may have been drawn
    kept = sorted((name, repr(value)) for name, value in flat(settings) if name not in ignored)
    return hashlib.blake2b(repr(kept).encode(), digest_size=16).hexdigest()


def make_folder(folder: Path) -> Path:
    """Make a folder of this name, or, where there is one, of the next that is free: -2, -3 and so on."""
    for number in itertools.count(1):
        free = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            free.mkdir(parents=True)
            return free
    raise AssertionError


def finished(run: Run) -> bool:
    """Tell whether a run has come to its end."""
    progress, trainer = read_progress(run.checkpoint), run.settings["trainer"]
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs is None:
        epochs = 1000 if steps == -1 else -1  # as Lightning has it
    return progress.stopped or progress.epochs >= epochs >= 0 or progress.steps >= steps >= 0


class RunLog(CSVLogger):
    """Lightning's log in a CSV file, gone on with where the run is: Lightning's own begins anew.

    Parameters
    ----------
    begin : Progress, optional
        How far the run has come. What was logged after that, before it was killed, will be logged again.
    **where
        The folder, as for Lightning's.
    """

    def __init__(self, begin: Progress | None = None, **where: Any) -> None:
        super().__init__(**where)
        self._begin = begin

    @property
    def experiment(self) -> Any:
        """What writes."""
        if self._begin is not None and self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            rows = _before(path, self._begin) if path.is_file() else []
            writer = super().experiment
            if rows:
                writer.metrics_keys = list(rows[0])
                text = io.StringIO(newline="")
                lines = csv.DictWriter(text, writer.metrics_keys)
                lines.writeheader()
                lines.writerows(rows)
                write(path, text.getvalue())
        return super().experiment

    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        """Write what is logged, too: it would be lost if the run were killed, and not be logged again."""
        self.save()


def _before(path: Path, progress: Progress) -> list[dict[str, str]]:
    """Return the lines of a log up to some point."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = []
    for row in rows:
        step = row.get("step") or ""
        # Counted from 0, validations with the step before them.
        last = step == str(progress.steps - 1)
        again = progress.validates and last and any(row.get(name) for name in row if name.startswith("val/"))
        if step.isdecimal() and int(step) < progress.steps and not again:
            kept.append(row)
    return kept
