"""Going on exactly: what a checkpoint holds of the place in a training, and how Lightning is taken back there.

Nothing random needs to be kept: the order of the images and what is drawn for them follow from seed, epoch and
position, see :mod:`captioner.order`, and so does the state that each step's dropout and samples are drawn from.
Lightning by itself repeats batches of the middle of an epoch, and leaves out a validation that was due where it was
stopped.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops.evaluation_loop import RestartStage as OfValidation
from lightning.pytorch.loops.fit_loop import RestartStage as OfTraining
from lightning.pytorch.loops.training_epoch_loop import RestartStage as OfEpoch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from captioner.checkpoint import PLACE
from captioner.datamodule import CaptionData
from captioner.errors import InputError
from captioner.order import seed_generators


class Resumption(Callback):
    """Keeps the place in a training in its checkpoints, takes it up again, and seeds each step by its place."""

    def __init__(self) -> None:
        self._validated: tuple[int, int] | None = None  # the epoch and batch after which validation was done last
        self._resumed: dict[str, Any] | None = None  # what the checkpoint held, until training starts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed what dropout and samples are drawn from; each process has draws of its own."""
        seed_generators("step", _seed(trainer), trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed what a validation draws, which then does not depend on whether the step before it was done here."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            seed_generators("validation", _seed(trainer), *_done(trainer), trainer.global_rank)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this validation is done."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated = _done(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the place: after how many whole batches of an epoch, and whether validation is still due there.

        What Lightning's loops have counted is written as it stands between two batches, wherever this is called from.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        data, (epoch, batches) = _data(trainer), _done(trainer)
        due = batches > 0 and _validation_is_due(trainer)
        pending = due and self._validated != (epoch, batches)
        loops = checkpoint["loops"]["fit_loop"]
        counted = loops["epoch_loop.batch_progress"]["current"]["processed"]
        # Each count with its four stages, such as ready and completed, which between two batches are the same.
        begun = epoch + (1 if batches else 0)
        _set(loops["epoch_progress"]["current"], epoch, ready=begun, started=begun)
        _set(loops["epoch_progress"]["total"], epoch, ready=begun, started=begun)
        _set(loops["epoch_loop.batch_progress"]["current"], batches)
        total = loops["epoch_loop.batch_progress"]["total"]
        _set(total, total["processed"] - (counted - batches if counted < trainer.num_training_batches else 0))
        if batches == 0:
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        if pending:
            _set(loops["epoch_loop.val_loop.batch_progress"]["current"], 0)
        # Lightning counts the step once more where it goes back to the end of a batch.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - (1 if due else 0)
        checkpoint[PLACE] = {
            "seed": data.seed,
            "settings": getattr(pl_module, "configuration", ""),
            "pending": pending,
            "stopped": trainer.should_stop and any(callback.stopping_reason_message for callback in _early(trainer)),
            "batches": {"of": len(data.records["train"]), "size": data.batch_size, "processes": trainer.world_size},
            # What early stopping and the best checkpoint look at between two validations.
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the order of the images, before the loader is made.

        Raises
        ------
        InputError
            Where it cannot go on in the middle of an epoch, since its batches would be others.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        data, loops = _data(trainer), checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
        epoch = epochs["processed"]
        position = batches["processed"] if epochs["ready"] > epoch else 0
        if PLACE not in checkpoint:  # an earlier release has written it
            data.go_on(_seed(trainer), epoch, position)
            return
        kept = _understood(checkpoint[PLACE])
        before = kept["batches"]
        now = {"of": len(data.records["train"]), "size": data.batch_size, "processes": trainer.world_size}
        if position and before != now:
            raise InputError(
                f"The checkpoint stands in the middle of an epoch of {before['of']:,} training images, in batches of "
                f"{before['size']} in each of {before['processes']} processes, and there are {now['of']:,} in batches "
                f"of {now['size']} in {now['processes']} now: go on with the images, the data.batch_size and the "
                "trainer.devices that it was trained with."
            )
        data.go_on(kept["seed"], epoch, position)
        trainer.should_stop = kept["stopped"]
        self._resumed = kept

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take Lightning's loops to the place, which they understand in part.

        Raises
        ------
        InputError
            Where a validation would stand between two batches whose gradients are summed: a checkpoint has no place
            for the sum of the first.
        """
        _see_that_sums_end(trainer)
        if self._resumed is None:
            return
        kept, self._resumed = self._resumed, None
        trainer.callback_metrics.update(kept["metrics"])
        fit: Any = trainer.fit_loop
        epoch, validation = fit.epoch_loop, fit.epoch_loop.val_loop
        batches = epoch.batch_progress.current.completed
        fit._restart_stage = OfTraining.RESTARTED_MID_EPOCH if batches else OfTraining.NONE
        epoch._restart_stage = OfEpoch.RESTARTED_ON_LAST if batches else OfEpoch.NONE
        validation._restart_stage = OfValidation.RESTARTED_MID_EVALUATION if kept["pending"] else OfValidation.NONE
        fit._restarting = epoch.restarting = batches > 0  # an epoch's with that of the validation in it
        if batches and not kept["pending"] and _validation_is_due(trainer):
            self._validated = _done(trainer)


def _data(trainer: Trainer) -> CaptionData:
    data: CaptionData = trainer.datamodule  # type: ignore[attr-defined]  # see CaptioningTask.data
    return data


def _understood(kept: Any) -> dict[str, Any]:
    """Return what a checkpoint holds of the place, if that is what it should be."""
    if (
        isinstance(kept, dict)
        and isinstance(kept.get("seed"), int)
        and all(isinstance(kept.get(name), bool) for name in ("pending", "stopped"))
        and isinstance(batches := kept.get("batches"), dict)
        and all(isinstance(batches.get(name), int) for name in ("of", "size", "processes"))
        and isinstance(metrics := kept.get("metrics"), dict)
        and all(isinstance(value, Tensor) and value.numel() == 1 for value in metrics.values())
    ):
        return kept
    raise InputError("The place in the training that the checkpoint holds is damaged: go on from another one.")


def _seed(trainer: Trainer) -> int:
    seed = _data(trainer).seed
    assert seed is not None  # since CaptionData.setup
    return seed


def _done(trainer: Trainer) -> tuple[int, int]:
    """Return how many epochs are done, and how many batches of the one that is not.

    Batches whose gradients are not yet a step are not done: they will be seen again.
    """
    fit: Any = trainer.fit_loop
    epochs, batches = fit.epoch_progress.current, fit.epoch_loop.batch_progress.current.processed
    ends = batches == trainer.num_training_batches
    if epochs.ready == epochs.processed and (ends or batches == 0):
        return epochs.processed, 0
    if not ends:
        batches -= batches % trainer.accumulate_grad_batches
    # An epoch that max_steps or max_time have broken off counts as processed, too.
    return epochs.ready - 1, batches


def _early(trainer: Trainer) -> list[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]


def _validation_is_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _set(counts: dict[str, int], number: int, **others: int) -> None:
    counts |= {stage: others.get(stage, number) for stage in counts}


def _see_that_sums_end(trainer: Trainer) -> None:
    summed, every, batches = trainer.accumulate_grad_batches, trainer.val_check_batch, trainer.num_training_batches
    if summed == 1 or every is None or not trainer.enable_validation:
        return
    if trainer.check_val_every_n_epoch is None:
        ends = every % summed == 0 and batches % summed == 0
    else:
        ends = every >= batches or every % summed == 0
    if not ends:
        raise InputError(
            f"Validation after every {every} batches would come while the gradients of {summed} are summed: choose "
            "trainer.val_check_interval so that it is a multiple of trainer.accumulate_grad_batches."
        )
