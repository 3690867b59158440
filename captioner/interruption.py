"""Signals: a training that is told to end saves at the end of the running step, and says how to go on.

Lightning ends with exit code 0 and nothing saved on SIGTERM, and on SLURM's signal writes a file of another name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from captioner.errors import Interrupted


class Interruption(Callback):
    """Ends a training where SIGTERM, SIGINT or SLURM's requeue signal asks for it; a second one ends it at once.

    A signal that comes before the first step or after the last ends the command where it stands: there is nothing to
    save that is not saved. In several processes all end after the same step, whichever of them has received it.

    Parameters
    ----------
    command : str
        What goes on, as it is typed.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._process = os.getpid()
        self._received = 0  # the number of the first signal
        self._requeues = 0  # the number of the signal that SLURM sends before a job's time is over
        self._is_training = False
        self._trainer: Trainer | None = None
        self._before: dict[int, Any] = {}

    def listen(self, *numbers: int) -> None:
        """Take signals, except those that this process was started to ignore, as what runs in the background may be."""
        if threading.current_thread() is threading.main_thread():  # no other one may
            for number in numbers:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before = signal.signal(number, self._receive)
                    self._before.setdefault(number, before)

    def stop_listening(self) -> None:
        """Leave the signals to whoever had them."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which inherits this and lives until the step is done
            return
        if self._received:
            self._end_at_once(number)
        self._received = number
        if not self._is_training:
            raise self._interrupted(number, "before anything had to be saved")

    def _end_at_once(self, number: int) -> None:
        if self._trainer is not None:
            for process in getattr(self._trainer.strategy.launcher, "procs", ()):
                process.kill()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signal that SLURM sends, before Lightning does."""
        self._trainer = trainer
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            self._requeues = int(environment.requeue_signal)
            self.listen(self._requeues)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the end of a step from now on."""
        self.listen(*self._before)  # Lightning has taken SIGTERM meanwhile
        self._is_training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait no longer."""
        self._is_training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait no longer."""
        self._is_training = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save and end, if a signal has come and no gradients are being summed."""
        if not trainer.fit_loop._should_accumulate() and (number := self._agreed(trainer)):
            # Which Lightning would do after this, for the loggers.
            trainer._logger_connector.update_train_step_metrics()
            self._save_and_end(trainer, number)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save and end, if a signal has come; validation will begin anew."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and (number := self._agreed(trainer)):
            self._save_and_end(trainer, number)

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any process has received, the same in all."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _save_and_end(self, trainer: Trainer, number: int) -> None:
        self._received = number
        self._is_training = False
        saver: Any = trainer.checkpoint_callback
        path = saver.save_now(trainer)
        where = "in a trial, which saves nothing" if path is None else f"saved in {path}"
        raise self._interrupted(number, f"after step {trainer.global_step:,}, {where}")

    def _interrupted(self, number: int, when: str) -> Interrupted:
        sentence = f"Stopped by {signal.Signals(number).name} {when}"
        code = 128 + number
        if number == self._requeues and self._trainer is not None and self._trainer.is_global_zero:
            job = _job()
            fault = _requeue(job)
            if not fault:
                return Interrupted(f"{sentence}; the job {job} is queued again.", code)
            sentence += f"; the job {job} could not be queued again ({fault})"
        return Interrupted(f"{sentence}: to go on, {self._command}", code)


def _job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _requeue(job: str) -> str:
    """Queue a job of SLURM's again, and return what was wrong."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"scontrol: {error.strerror}"
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
