"""The training command line: `captioner fit | validate | test`, from YAML files and flags, through Lightning."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from captioner import attention_health, checkpoint
from captioner.cache_folder import in_gigabytes, say
from captioner.checkpoint_files import (
    check_folder,
    claim,
    clear_unfinished,
    explaining,
    replacing,
    use_checkpoint_files,
)
from captioner.datamodule import CaptionData
from captioner.errors import InputError, Interrupted
from captioner.interruption import Interruption
from captioner.model_card import write_card
from captioner.report import remarks, show
from captioner.run_folder import Run, RunLog, digest, find_last, finished, make_folder
from captioner.task import CaptioningTask
from captioner.tokens import TOKENIZERS, Tokenizer
from captioner.validation_pictures import ValidationPictures

MONITOR = "val/CIDEr-D"
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # of a terminal that was closed; Windows has none
EARLIEST = 3  # the first epoch whose attention is warned of
EXAMPLES = """\
Five examples:

  captioner fit --config configs/flickr8k.yaml --data.files.root data/flickr8k
      trains the recipe on Flickr8k's official files

  captioner fit --config configs/own.yaml --data.files.root photos
      trains on your own captions, whose format is recognised

  captioner fit --config configs/flickr8k.yaml --data.files COCOCaptions --data.files.root data/coco \\
      --data.val_split val --model.decoder.attention MultiHead
      the same recipe on COCO's files, with another attention

  captioner fit --config configs/flickr8k.yaml --config configs/decoders/transformer.yaml
      the same recipe with another decoder

  captioner test --config runs/2026-01-31_12-00-00/config.yaml \\
      --ckpt_path runs/2026-01-31_12-00-00/checkpoints/best.ckpt --data.test_split dev
      scores a checkpoint, with a beam, on a split
"""


class Parser(LightningArgumentParser):
    """Says what is wrong with an argument in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message instead of printing the usage."""
        hint = " A recipe gives them: --config configs/flickr8k.yaml." if "are required" in message else ""
        message = " ".join(message.split()).rstrip(".")
        raise InputError(f"{message}.{hint} The settings there are: captioner {self._command} --help.") from ex

    @property
    def _command(self) -> str:
        return next((name for name in ("validate", "test") if name in self.prog.split()), "fit")


@dataclass
class Interval:
    """A span of time.

    Parameters
    ----------
    minutes : float
        Its length, above 0.
    """

    minutes: float


class BestAndLast(ModelCheckpoint):
    """Writes best.ckpt, with its model card, after the best validation, and last.ckpt after every one and in between.

    Lightning's class writes last.ckpt only together with a new best, which is too old to go on from after a plateau,
    and neither of them between two validations if the best is to be kept.

    Parameters
    ----------
    every_n_train_steps : int, optional
        Write last.ckpt after every so many steps, too.
    train_time_interval : Interval, optional
        Write last.ckpt so long after it was written, too.
    save_last : bool
        Write last.ckpt at all.
    **settings
        Of Lightning's class, about best.ckpt.

    Raises
    ------
    InputError
        Where an interval is no interval, or there is no last.ckpt to write in between.
    """

    _seconds_before = 0.0  # of training, in the runs that this one goes on from
    _started: float | None = None
    is_kept = False  # the folder, for this process
    _claim: int | None = None  # what keeps it, if it was not kept before

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        train_time_interval: Interval | None = None,
        save_last: bool = True,
        **settings: Any,
    ) -> None:
        # Lightning's own two intervals are of best.ckpt, and put an end to saving after validations.
        super().__init__(every_n_train_steps=None, train_time_interval=None, save_last=save_last, **settings)
        self._every, self._interval = every_n_train_steps or 0, train_time_interval
        if self._every < 0:
            raise InputError(
                f"checkpoint.every_n_train_steps is {self._every}: give a whole number above 0, or null for never."
            )
        if self._interval is not None and not self._interval.minutes > 0:
            raise InputError(
                f"checkpoint.train_time_interval.minutes is {self._interval.minutes}: give a number above 0."
            )
        if (self._every or self._interval) and not save_last:
            raise InputError(
                "checkpoint.every_n_train_steps and checkpoint.train_time_interval write last.ckpt, which "
                "checkpoint.save_last false leaves out: set it to true."
            )
        self._step = 0  # the last one that was seen to its end
        self._saved_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that checkpoints can be written, and clear away what a killed run has left beside them."""
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING and self._writes(trainer):
            check_folder(Path(str(self.dirpath)))
            clear_unfinished(Path(str(self.dirpath)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the folder to others."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the folder to others."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _writes(self, trainer: Trainer) -> bool:
        """Tell whether this process writes files of this machine."""
        is_trial = bool(getattr(trainer, "fast_dev_run", False))
        return trainer.is_global_zero and not is_trial and "://" not in str(self.dirpath)

    def _leave(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the folder for this run, and begin to measure the time."""
        super().on_train_start(trainer, pl_module)
        if self._writes(trainer) and not self.is_kept:
            self._claim = claim(Path(str(self.dirpath)))
        self._started = self._saved_at = time.monotonic()
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Write last.ckpt where it is due by steps or by time."""
        super().on_train_batch_end(trainer, *args)
        step = trainer.global_step
        if step == self._step:  # gradients are being added up
            return
        self._step = step
        due = self._every > 0 and step % self._every == 0
        if self._interval is not None:
            late = time.monotonic() - self._saved_at >= 60 * self._interval.minutes
            due = due or trainer.strategy.broadcast(late)  # the clock of one process decides for all
        if due and not self._should_skip_saving_checkpoint(trainer):
            # A validation that follows upon this step saves as if nothing had been saved here.
            before = self._last_global_step_saved, self._last_checkpoint_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved, self._last_checkpoint_saved = before

    @property
    def seconds(self) -> float:
        """How long the model has been trained, validation included."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """Keep the time, too."""
        return {**super().state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score and the time of the run that this one goes on from, whose folder may have moved."""
        super().load_state_dict(self._moved(state_dict))
        self._seconds_before = state_dict.get("seconds", 0.0)  # which earlier releases did not keep

    def _moved(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state with the paths of files in this folder, as far as they are there, in place of others."""
        folder = Path(str(self.dirpath))
        there = {path: str(folder / Path(path).name) for path in state.get("best_k_models", {})}
        if not all(Path(path).is_file() for path in there.values()):
            return {**state, "dirpath": ""}  # for which Lightning forgets the best score
        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        return {
            **state,
            "dirpath": self.dirpath,
            "best_k_models": {there[path]: score for path, score in state.get("best_k_models", {}).items()},
            **{name: state[name] and str(folder / Path(state[name]).name) for name in names if name in state},
        }

    def save_now(self, trainer: Trainer) -> str | None:
        """Write last.ckpt, whatever is set, and return its path; None in a trial that writes nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
        self.last_model_path = path
        self._save_checkpoint(trainer, path)
        return path

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._saved_at = time.monotonic()

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self._last_global_step_saved == trainer.global_step and trainer.is_global_zero:  # it has written one
            assert isinstance(trainer.lightning_module, CaptioningTask)
            write_card(Path(self._last_checkpoint_saved), trainer.lightning_module, self.seconds)
        self._last_global_step_saved = trainer.global_step  # what it asks before it writes last.ckpt

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            Path(filepath).with_suffix(".md").unlink(missing_ok=True)


class SaveConfiguration(SaveConfigCallback):
    """Lightning's, which writes the file whole or not at all."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, and clear away what killed runs have left beside it."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # which all processes ask for together
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, in the first process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        clear_unfinished(self._folder)
        with replacing(self._folder / self.config_filename) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())


class TrainingCLI(LightningCLI):
    """LightningCLI with the best checkpoint and early stopping by CIDEr-D, and nothing but weights out of a file."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make checkpointing, early stopping and pictures settable by flags of their own."""
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ValidationPictures, "pictures")
        parser.set_defaults(
            {
                "checkpoint.monitor": MONITOR,
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "early_stopping.monitor": MONITOR,
                "early_stopping.mode": "max",
                "early_stopping.patience": 10,
                "early_stopping.strict": False,  # an epoch without validation is no reason to break off
                "data.files": {"class_path": "AnyFormat"},  # so that --data.files.root alone is enough
                "trainer.default_root_dir": "runs",
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out the flag that would let a checkpoint run code."""
        return {
            name: {*skipped, "weights_only"}
            for name, skipped in LightningCLI.subcommands().items()
            if name in ("fit", "validate", "test")
        }

    finished: Run | None = None  # that was to be gone on with, and has come to its end
    _run_folder: Path | None = None  # the folder of the run that is gone on with
    _digest = ""  # of the configuration
    _claim: int | None = None  # what keeps the checkpoints' folder for this process
    _writes = True

    def before_instantiate_classes(self) -> None:
        """Find the run that `--ckpt_path last` means."""
        if self.subcommand != "fit":
            return
        settings = yaml.safe_load(self._parser("fit").dump(self.config["fit"], skip_none=False))
        self._digest = digest(settings)
        if self._get(self.config, "ckpt_path") != "last":
            return
        if not settings["checkpoint"]["save_last"]:
            raise InputError(
                "--ckpt_path last goes on from last.ckpt, which checkpoint.save_last false leaves out: set it to true."
            )
        run = find_last(settings)
        self.config["fit"]["ckpt_path"] = None
        if run is None or not run.has_checkpoint:
            why = "There is no run yet" if run is None else f"{run.folder} was stopped before its first checkpoint"
            _say_once(f"{why}: this one begins anew.")
            return
        self._keep(run.checkpoint.parent)  # before its progress is read, or its log gone on with
        with self._leaving_if_it_fails():
            if finished(run):
                self.finished = run
                self._leave()
                return
        _say_once(f"Going on with {run.folder}.")
        self.config["fit"]["ckpt_path"], self._run_folder = str(run.checkpoint), run.folder
        self.save_config_callback = None  # it is there

    def _keep(self, folder: Path) -> None:
        """Keep a folder of checkpoints for this run, in the first of its processes, until :meth:`_leave`."""
        if self._writes and _is_first():
            self._claim = claim(folder)

    def _leave(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    @contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._leave()
            raise

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, if there is something to do."""
        if self.finished is None:
            with self._leaving_if_it_fails():
                super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to CSV and TensorBoard in one folder per run, unless the configuration names loggers of its own."""
        self.model.check_settings(self.subcommand)
        if resumed := self._get(self.config_init, "ckpt_path"):
            checkpoint.read(resumed)  # before anything is built: it must be there, and ours
        checkpoints = self._get(self.config_init, "checkpoint")
        if self.subcommand == "fit" and checkpoints.dirpath is None and resumed:
            # Where the run goes on: in a folder of its own Lightning would forget the best score reached before.
            checkpoints.dirpath = str(Path(resumed).parent)
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = False if self.subcommand != "fit" else self._logs(resumed, checkpoints.dirpath)
        if self.subcommand == "fit":
            self.model.configuration = self._digest
            checkpoints.is_kept = self._claim is not None
        if self._get(self.config_init, "trainer.logger") is False:  # to which no rate can be logged
            callbacks = self.trainer_defaults["callbacks"]
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        trainer = super().instantiate_trainer(**kwargs)
        use_checkpoint_files(trainer)
        return trainer

    def _logs(self, resumed: str | None, checkpoints: str | None) -> list[RunLog | TensorBoardLogger]:
        """Return the logs of a run, in a folder of its own that is made here, or in that which is gone on with."""
        root = Path(self._get(self.config_init, "trainer.default_root_dir"))
        writes = _is_first() and not self._get(self.config_init, "trainer.fast_dev_run")
        folder = self._run_folder
        progress = None if folder is None or resumed is None else checkpoint.read_progress(Path(resumed))
        if folder is None:
            folder = root / time.strftime("%Y-%m-%d_%H-%M-%S")
            if writes:
                check_folder(root)
                with explaining(root):
                    folder = make_folder(folder)
                    if checkpoints is None:
                        self._keep(folder / "checkpoints")
        where: dict[str, Any] = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
        # Of what was logged after the checkpoint, and will be again, TensorBoard shows the last.
        purge = None if progress is None else progress.steps
        return [RunLog(progress, **where), TensorBoardLogger(**where, purge_step=purge)]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; where several processes do and one fails, that one says why and the others end with it, silently."""
        if self.finished is not None:
            return
        try:
            with self._leaving_if_it_fails(), _faults_of_restoring(), explaining(self.trainer.default_root_dir):
                super()._run_subcommand(subcommand)
            self._leave()
        except SystemExit as end:
            # What Lightning makes of Ctrl-C, which reaches all processes.
            if isinstance(end.__context__, KeyboardInterrupt) and self.trainer.is_global_zero:
                raise KeyboardInterrupt from None
            raise
        except Interrupted:
            self._end_others()
            if not self.trainer.is_global_zero:
                raise SystemExit(0) from None  # any other code, and Lightning kills the one that says how to go on
            raise
        except Exception:
            if not _fails_first():
                raise SystemExit(2) from None
            self._end_others()
            raise

    def _end_others(self) -> None:
        for process in getattr(self.trainer.strategy.launcher, "procs", ()):
            process.kill()  # it could wait for this one for ever

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Leave the table of scores to :func:`print_scores`, and code in a checkpoint alone."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True  # whatever torch takes as its default, which a variable of the shell can change
        return kwargs if subcommand == "fit" else {**kwargs, "verbose": False}

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: the YAML is the only configuration.

        Lightning would feed the file's hyper-parameters to the parser, which runs the constructors that they name.
        """


@contextmanager
def _faults_of_restoring() -> Iterator[None]:
    """Raise as an `InputError` whatever Lightning trips over in a checkpoint that holds other things than it wrote."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if any(
            code.co_filename == checkpoint_connector.__file__ and code.co_name.startswith(("restore", "resume"))
            for code in frames
        ):
            raise InputError(
                f"The file of --ckpt_path is damaged, or was not written by captioner ({type(error).__name__} in what "
                "stands beside the model): take another copy of it."
            ) from error
        raise


class ScoreLines(Callback):
    """Where a run can be watched, and one line per validation, which a log file keeps and a progress bar does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None  # of attention, as far as it was said
        self.started = time.monotonic()
        self.watched = "loss"
        self.values: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Keep what the next line is made of."""
        values = torch.stack(self.values).cpu() if self.values else torch.empty(0)
        return {"fault": self.fault, "seconds": time.monotonic() - self.started, "values": values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the line where it was left."""
        self.fault, self.values = state_dict["fault"], list(state_dict["values"])
        self.started = time.monotonic() - state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how to see the curves and pictures, of which TensorBoard by itself shows ten epochs only."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                folder = shlex.quote(str(logger.root_dir).rstrip("/"))
                line = f"To watch {logger.log_dir}: tensorboard --logdir {folder} --samples_per_plugin images=100"
                Console().print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Keep the loss, or the reward, of a batch for the mean."""
        if trainer.is_global_zero:  # which prints it
            # Self-critical training has a loss that says nothing: its samples are held against each other.
            self.watched = "reward" if "train/reward" in trainer.callback_metrics else "loss"
            self.values.append(trainer.callback_metrics[f"train/{self.watched}"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch, the mean loss or reward since the last line, the scores and the time since the start.

        A fault of attention is said once, when it is first seen from the epoch EARLIEST on, and again only where it
        comes back: early in training attention is yet to be learnt, and a line in every epoch is soon overlooked.
        """
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        scores = "  ".join(
            f"{name.removeprefix('val/')} {100 * value:.1f}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        )
        # Those of before a run was gone on with lie in another memory than those of a GPU.
        mean = torch.stack([value.cpu() for value in self.values]).mean().item() if self.values else float("nan")
        minutes, seconds = divmod(round(time.monotonic() - self.started), 60)
        self.values = []
        line = f"epoch {trainer.current_epoch + 1}  {minutes}:{seconds:02}  {self.watched} {mean:.3f}  {scores}"
        assert isinstance(pl_module, CaptioningTask)
        if pl_module.health is None:
            Console().print(line, highlight=False, soft_wrap=True)
            return
        Console().print(f"{line}  {attention_health.in_words(pl_module.health)}", highlight=False, soft_wrap=True)
        if trainer.current_epoch + 1 >= EARLIEST:
            fault = attention_health.find_fault(pl_module.health)
            if fault is not None and fault.kind != self.fault:
                print(f"captioner: {fault.sentence}", file=sys.stderr)
            self.fault = None if fault is None else fault.kind


class _QuietBar(RichProgressBar):
    """Lightning's progress bar on a terminal, and nothing in a pipe or a log file."""

    def __init__(self) -> None:
        super().__init__()
        if not Console().is_terminal:
            self.disable()


def train(args: Sequence[str]) -> TrainingCLI:
    """Run `fit`, `validate` or `test`.

    Parameters
    ----------
    args : sequence of str
        The subcommand and its flags, as on the command line.

    Returns
    -------
    TrainingCLI
        With its trainer, model and datamodule.

    Raises
    ------
    InputError
        Where a setting, a file or a checkpoint cannot be used.
    """
    if list(args[:1]) == ["fit"]:
        cli = _fit(args)
        if (run := cli.finished) is not None:
            _say_once(
                f"{run.folder} has come to its end: there is nothing to go on with. To train it longer: --ckpt_path "
                f"{run.checkpoint} and a larger trainer.max_epochs."
            )
            return cli
    else:
        cli = _run(TrainingCLI, args, None)  # a test has no run of its own to keep a configuration in
    if cli.trainer.is_global_zero:
        if cli.subcommand == "fit":
            path = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
            if path:  # none after a run without validation
                scores = checkpoint.read(path).scores
                print_scores(scores, f"Best of {cli.datamodule.splits['val']}, greedy", cli.datamodule.scored_by("val"))
                Console().print(f"Checkpoint: {path}", soft_wrap=True, highlight=False)
        elif cli.subcommand == "validate":
            split = cli.datamodule.splits["val"]
            images = f"{split}, {cli.model.scored_images} images, beam 1"
            print_scores(cli.model.scores, images, cli.model.scored_by)
            if cli.model.health is not None:
                say(f"Attention: {attention_health.in_words(cli.model.health)}")
                attention_health.warn(cli.model.health)
        else:
            _print_test(cli.model, cli.trainer)
    return cli


def _fit(args: Sequence[str]) -> TrainingCLI:
    """Train, until it is done or a signal comes."""
    kept = [arg for arg, before in zip(args, ["", *args], strict=False) if "--ckpt_path" not in (arg, before)]
    kept = [arg for arg in kept if not arg.startswith("--ckpt_path=")]
    interruption = Interruption(shlex.join(["captioner", *kept, "--ckpt_path", "last"]))
    interruption.listen(signal.SIGTERM, signal.SIGINT, HANGUP)
    try:
        return _run(TrainingCLI, args, SaveConfiguration, [interruption])  # beside the checkpoints
    finally:
        interruption.stop_listening()


def _is_first() -> bool:
    """Tell whether this is the first process of a run, before the trainer knows."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def _say_once(line: str) -> None:
    """Say something in the first process; the others of a run are not yet known to each other."""
    say(line)


def _print_test(task: CaptioningTask, trainer: Trainer) -> None:
    if task.evaluation is None:
        raise InputError("The test had no image: set trainer.limit_test_batches higher.")
    for line in remarks(task.evaluation):
        print(f"captioner: {line}", file=sys.stderr)
    members = f"mean probability of {1 + len(task.ensemble)} models, " if task.ensemble else ""
    say(
        f"{task.evaluation.references.split}, {task.scored_images:,} images, {members}beam {task.beam_size}, length "
        f"penalty {task.length_penalty:g}, precision {trainer.precision}"
    )
    # A file or a pipe has no width: lines are not broken for it.
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(task.evaluation, console)
    if task.report is not None:
        attention_health.show(task.report, str(task.evaluation.references.split), console)
        attention_health.warn(task.report.health)
    else:
        say(task.why_no_health or "Attention was not measured, since no caption holds a content word.")
    if task.results is not None:
        say(f"Captions: {task.results}")


def build_caches(args: Sequence[str]) -> None:
    """Fill the caches of annotations that `fit` with these flags will find, and train nothing.

    Parameters
    ----------
    args : sequence of str
        The flags of `fit`.

    Raises
    ------
    InputError
        Where a setting or a file cannot be used, or no cache is asked for.
    """
    # The caches are filled before the first step, of which there is none.
    nothing = {"logger": "false", "fast_dev_run": "false", "overfit_batches": "0.0", "limit_train_batches": "0"}
    cli = _run(_CacheCLI, ["fit", *args, *(f"--trainer.{name}={value}" for name, value in nothing.items())], None)
    if cli.trainer.is_global_zero:
        caches = [*cli.datamodule.caches.values(), cli.datamodule.mirrored_cache]
        for cache in (cache for cache in caches if cache is not None):
            say(f"Complete: {cache.folder}, {len(cache):,} images, {in_gigabytes(cache.nbytes)}")


def settings(args: Sequence[str]) -> dict[str, Any]:
    """Return the settings that flags of `fit` give, so far as they differ from the defaults; nothing is built.

    Parameters
    ----------
    args : sequence of str
        The flags of `fit`.

    Returns
    -------
    dict
        Nested, plain JSON.

    Raises
    ------
    InputError
        Where a setting or a configuration file cannot be used.
    """
    cli = _run(_SettingsCLI, ["fit", *args], None)
    given: dict[str, Any] = yaml.safe_load(cli._parser("fit").dump(cli.config["fit"], skip_default=True))
    return given


class _SettingsCLI(TrainingCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out what there is no need to know."""
        return {"fit": TrainingCLI.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """Seed nothing, since nothing is drawn."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class _CacheCLI(TrainingCLI):
    _writes = False

    def before_fit(self) -> None:
        """See that there is something to build."""
        if self.datamodule.cache is None:
            raise InputError("No cache is asked for: give its folder, such as --data.cache data/cache.")


def _run(
    kind: type[TrainingCLI],
    args: Sequence[str],
    save_config_callback: type[SaveConfigCallback] | None,
    callbacks: Sequence[Callback] = (),
) -> TrainingCLI:
    args = list(args)
    torch.set_float32_matmul_precision("high")
    _quiet()
    if args[1:] and not {"-h", "--help", "--print_config"} & set(args):
        check_files(args)
    try:
        return kind(
            CaptioningTask,
            CaptionData,
            args=args,
            parser_class=Parser,
            trainer_defaults={"callbacks": [_QuietBar(), ScoreLines(), LearningRateMonitor(), *callbacks]},
            save_config_callback=save_config_callback,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=1,
        )
    except FileExistsError as error:
        raise InputError(f"{error.filename} is a file where a folder is needed: choose another folder.") from error
    except MisconfigurationException as error:
        raise InputError(f"The trainer's settings do not fit together: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # neither is loaded for this
            raise
        said = " ".join(str(error).partition("Set TORCH")[0].split()).rstrip(".")
        raise InputError(
            f"The decoder could not be compiled ({said}): install a C++ compiler, or set model.compile to false."
        ) from error


def _fails_first() -> bool:
    """Tell whether no other process of this run has failed before; most failures are met by all, or follow from one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        return store.add("captioner/failed", 1) == 1
    except RuntimeError:  # the first process held the store, and is gone
        return False


def _quiet() -> None:
    """Silence what Lightning tells its own users and ours can neither use nor change."""
    for message in (
        "does not have many workers",  # batches of cached annotations are slices of memory: processes would only cost
        "args parameter is intended to run from within Python",
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",  # which RunLog goes on with
        "Found .* in eval mode at the start of training",  # a frozen encoder
        "You're resuming from a checkpoint that ended before the epoch ended",  # which ours can, see Resumption
        "The dirpath has changed from",  # on validating and testing, which save nothing
        "Using `DistributedSampler` with the dataloaders",  # which gives an image twice: it is scored once
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", f".*{message}")
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    # It prints the code that could not be compiled; the error, which is told, says why.
    logging.getLogger("torch._inductor.scheduler").setLevel(logging.CRITICAL + 1)


def check_files(args: Sequence[str]) -> None:
    """See that the configuration files can be read, which the libraries below report at length."""
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, _, joined = flag.partition("=")
        if name in ("--config", "-c"):
            path = Path(joined or value)
            if not path.is_file():
                raise InputError(f"There is no file {path} for {name}: check the path.")
            try:
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"The configuration {path} is not a text file: give a YAML file.") from None
            except yaml.YAMLError as error:
                raise InputError(f"The configuration {path} is no YAML: {' '.join(str(error).split())}.") from None
            except (RecursionError, ValueError):  # lists in lists in lists, a number of thousands of digits
                raise InputError(f"The configuration {path} is no YAML that can be read: write it again.") from None
            if not isinstance(settings, dict):
                raise InputError(f"The configuration {path} holds no settings: write some, as in configs/scenes.yaml.")


def print_scores(scores: Mapping[str, float], title: str, tokenizer: Tokenizer) -> None:
    """Print scores as people quote them, times 100, and by which tokens."""
    table = Table(title=f"{title} (times 100)")
    for name in scores:
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * value:.1f}" for value in scores.values()))
    console = Console()
    console.print(table)
    console.print(f"Tokens: {TOKENIZERS[tokenizer]}.", highlight=False, soft_wrap=True)
