"""A study's runs: each is trained and captioned once, in a folder of its own; the table is of those that are there."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from captioner.attention import Annotations
from captioner.cache_folder import say
from captioner.checkpoint import unpack
from captioner.errors import InputError
from captioner.faithfulness import content_words, intervene, relative_entropies, texts, uniform
from captioner.model import Captioner, by_word, describe
from captioner.output_files import write
from captioner.run_folder import flat
from captioner.study import OWN, Row, Study
from captioner.study_results import Captions, ImageId, Result, milliseconds, score
from captioner.study_table import Report, show, write_report
from captioner.task import in_words
from captioner.text_files import read_data
from captioner.training import TrainingCLI, settings, train
from captioner.vocabulary import BEGIN, pad

References = dict[ImageId, list[str]]


@dataclass(frozen=True)
class Run:
    """A row with one of its seeds.

    Attributes
    ----------
    row : Row
        Of the study.
    seed : int
        Of this run.
    folder : Path
        Of this run alone.
    flags : tuple of str
        Of `captioner fit`, but for what the study sets itself.
    settings : dict
        What these flags give, by dotted names, so far as it differs from the defaults.
    command : str
        Of the study.
    """

    row: Row
    seed: int
    folder: Path
    flags: tuple[str, ...]
    settings: dict[str, Any]
    command: str

    @property
    def result(self) -> Path:
        """The file whose existence says that the run is done."""
        return self.folder / "result.json"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row.name}, seed {self.seed}"


Perform = Callable[[Run], tuple[Result, References]]


def plan(study: Study, output: Path, flags: Sequence[str], command: str) -> list[Run]:
    """Return all runs of a study, every setting of which is known to the program.

    Parameters
    ----------
    study : Study
        What is trained.
    output : Path
        Where.
    flags : sequence of str
        Of `captioner fit`, given to every run; what a row says itself stands behind them and prevails.
    command : str
        For people.

    Raises
    ------
    InputError
        Where a setting is unknown, or the study's own.
    """
    for flag in flags:
        if (name := flag.partition("=")[0].removeprefix("--")) in OWN:
            raise InputError(
                f"The flag --{name} is set by the study for each run: leave it out; seeds stand in the rows."
            )
    runs = []
    for row in study.rows:
        of_row = (*study.flags, *flags, *row.flags)
        try:
            given = given_by(of_row)
        except InputError as error:
            raise InputError(f"The row {row.name!r} cannot be trained: {error}") from error
        runs += [Run(row, seed, output / row.folder / str(seed), of_row, given, command) for seed in row.seeds]
    return runs


def given_by(flags: Sequence[str]) -> dict[str, Any]:
    """Return the settings that flags of `fit` give, by dotted names, but for the study's own; see :func:`settings`."""
    given = {name: value for name, value in flat(settings(flags)) if name not in OWN}
    as_read: dict[str, Any] = json.loads(json.dumps(given, default=str))  # from a result, to compare with
    return as_read


def is_done(run: Run) -> bool:
    """Tell whether a run's result is there.

    Raises
    ------
    InputError
        Where it was made with other settings. It is not made again unasked: hours of work would be lost by a slip.
    """
    if not run.result.is_file():
        return False
    known = Result.read(run.result).settings
    names = sorted(name for name in known.keys() | run.settings.keys() if known.get(name) != run.settings.get(name))
    if names:
        was, now = (json.dumps(one.get(names[0], "the default")) for one in (known, run.settings))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"{run.folder} was made with other settings ({names[0]} was {was} and is {now}{more}): give another "
            "--output, or delete that folder to have the run made again."
        )
    return True


def make(runs: Sequence[Run], output: Path, perform: Perform | None = None) -> bool:
    """Make all runs that are not done, but for those that other processes are making.

    Parameters
    ----------
    runs : sequence of Run
        In this order.
    output : Path
        Of the study.
    perform : callable, optional
        What makes a run; by default :func:`train_and_caption`.

    Returns
    -------
    bool
        Whether all could be made; what fails for one is said, and the others go on.

    Raises
    ------
    InputError
        Where a result was made with other settings, or a run fails before any has succeeded: all would.
    """
    perform = perform or train_and_caption
    done = [is_done(run) for run in runs]  # all, before any is made
    succeeded, failed = any(done), False
    for number, run in enumerate(runs, 1):
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(run.folder / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            say(f"{run.name} ({number} of {len(runs)}) is being made by another process.")
            continue
        except OSError as error:
            raise InputError(f"{run.folder} cannot be written to ({error.strerror}): give another --output.") from error
        try:
            if is_done(run):  # maybe by another process, meanwhile
                continue
            say(f"{run.name} ({number} of {len(runs)})")
            result, references = perform(run)
            keep_references(output, references)
            result.write(run.result)
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            say(f"Kept: {run.result}, without the checkpoints")
            succeeded = True
        except InputError as error:
            if not succeeded:
                raise
            failed = True
            say(f"{run.name} failed: {error}")
        finally:
            lock.release()
    return not failed


def keep_references(output: Path, references: References) -> None:
    """Write the captions that people gave beside the runs, so that the table needs no data set.

    Raises
    ------
    InputError
        Where others are there: the data set has changed.
    """
    path = output / "references.json"
    with FileLock(output / "lock"):
        if not path.is_file():
            lines = [{"image_id": image_id, "captions": captions} for image_id, captions in references.items()]
            write(path, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
        elif read_references(output) != references:
            raise InputError(
                f"The validation images or their captions are no longer those of {path}: give another --output."
            )


def read_references(output: Path) -> References:
    """Read what :func:`keep_references` has written."""
    path = output / "references.json"
    try:
        return {each["image_id"]: each["captions"] for each in json.loads(read_data(path))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): give another --output.") from error


def train_and_caption(run: Run) -> tuple[Result, References]:
    """Train a run from its beginning, and caption the validation images with its best checkpoint.

    Raises
    ------
    InputError
        Where a setting or a file cannot be used, configurations have changed since the run was planned, or there was
        no validation.
    """
    if given_by(run.flags) != run.settings:
        raise InputError("A configuration of the study was changed while it ran: start it again.")
    gc.collect()  # the last run's captioner and trainer, which refer to each other
    logs, checkpoints = run.folder / "logs", run.folder / "checkpoints"
    for folder in (logs, checkpoints):  # of a run that was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    cli = train([
        "fit", *run.flags, "--seed_everything", str(run.seed), "--trainer.devices", "1",
        "--trainer.default_root_dir", str(logs), "--checkpoint.dirpath", str(checkpoints),
    ])  # fmt: skip
    minutes = (time.monotonic() - begun) / 60
    best = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    if not best:
        raise InputError("A study compares captions of the validation images, and there was no validation: have one.")
    saved = torch.load(best, map_location="cpu", weights_only=True, mmap=True)
    task, data = cli.model, cli.datamodule
    model: Captioner = task.captioner
    model.load_state_dict(unpack(saved, best).tensors)
    model.to(cli.trainer.strategy.root_device).eval()
    search = {"beam_size": task.beam_size, "max_words": task.max_words, "length_penalty": task.length_penalty}
    with cli.trainer.precision_plugin.forward_context():  # as `captioner test` does
        found = caption(model, _batches(cli), **search)
    every, encoders = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    result = Result(
        settings=run.settings,
        captions=found.captions,
        uniform_captions=found.uniform_captions,
        entropy=found.entropy,
        minutes=minutes,
        epochs=cli.trainer.current_epoch,
        best_epoch=saved["epoch"] + 1,
        parameters=every - encoders,
        model=describe(model),
        words=len(model.vocabulary.words),
        regions=found.regions,
        annotation_dim=model.encoder.annotation_dim,
        grid=found.grid,
        beam_size=task.beam_size,
        data=f"{data.files.format}, split {data.splits['val']}",
        encoder=in_words(model.encoder, str(cli.trainer.precision)),
        command=run.command,
        made=date.today().isoformat(),
    )
    return result, {image_id: list(captions) for image_id, captions in data.references("val").items()}


def _batches(cli: TrainingCLI) -> Iterator[tuple[list[ImageId], Annotations]]:
    """Give the validation images' ids and annotations: those of the cache, where there is one."""
    model, data = cli.model.captioner, cli.datamodule
    for batch in data.val_dataloader():
        near = data.transfer_batch_to_device(batch, model.device, 0)
        yield batch.image_ids, model.annotate(near.images) if near.annotations is None else near.annotations


class Captioned(NamedTuple):
    """Captions of images, and what of them depends on attention; see :class:`Result`."""

    captions: Captions
    uniform_captions: Captions | None
    entropy: float | None
    regions: int
    grid: tuple[int, int] | None


@torch.no_grad()
def caption(model: Captioner, batches: Iterable[tuple[list[ImageId], Annotations]], **search: Any) -> Captioned:
    """Caption images as trained and with uniform weights.

    Parameters
    ----------
    model : Captioner
        In evaluation mode.
    batches : iterable
        The ids of some images, at least one, and their annotations.
    **search
        Settings of :meth:`Captioner.search`.
    """
    captions: Captions = {}
    uniform_captions: Captions = {}
    entropies: list[float] = []
    attends = False
    for image_ids, seen in batches:
        best = [hypotheses[0].tokens for hypotheses in model.search(seen, **search)]
        captions |= zip(image_ids, texts(model, best), strict=True)
        tokens = pad([[[BEGIN, *ids]] for ids in best]).to(model.device)
        _, weights, _ = model(seen, tokens)
        if weights is not None:
            attends = True
            exists = seen.existing()
            for image, ids in enumerate(best):
                meant = by_word(weights[image, 0], content_words(model, ids))
                entropies += relative_entropies(meant[None], exists[image : image + 1])[0].tolist()
            with intervene(model, uniform):
                found = model.search(seen, **search)
            blind = texts(model, [hypotheses[0].tokens for hypotheses in found])
            uniform_captions |= zip(image_ids, blind, strict=True)
    return Captioned(
        captions,
        uniform_captions if attends else None,
        fmean(entropies) if entropies else None,
        seen.values.size(1),
        seen.grid,
    )


def tabulate(study: Study, output: Path) -> None:
    """Print the table of the runs that are there, and write study.md and study.png.

    Raises
    ------
    InputError
        Where there is none.
    """
    if not output.is_dir():
        raise InputError(f"There is no folder {output}, so no result in it: leave out --table-only, and there will be.")
    results: dict[Row, list[Result]] = {}
    missing = []
    # Who reads last writes last; and no two processes time their steps at once.
    with FileLock(output / "lock"):
        for row in study.rows:
            for seed in row.seeds:
                path = output / row.folder / str(seed) / "result.json"
                if path.is_file():
                    results.setdefault(row, []).append(Result.read(path))
                else:
                    missing.append(f"{row.name}, seed {seed}")
        if not results:
            raise InputError(f"There is no result in {output} yet: leave out --table-only, and there will be.")
        references = read_references(output)
        lines = score(results, study.reference, references)
        times = milliseconds([line.results[0] for line in lines])
        report = Report(study, lines, times, len(references), missing)
        write_report(report, output)
    # A file or a pipe has no width: lines are not broken for it.
    show(report, Console(width=None if sys.stdout.isatty() else 200))
    say(f"Table: {output / 'study.md'}\nPicture: {output / 'study.png'}")
