"""Going on: from any step a run ends with the weights, scores and order of one that nothing has disturbed, bit for bit."""

import random
from pathlib import Path

import pytest
import torch

from captioner.task import CaptioningTask

STEPS = 18
TINY = ["--data.batch_size", "4", "--trainer.max_epochs", "3", "--trainer.logger", "false", "--model.dropout", "0.3"]
TINY += ["--data.captions_per_image", "2", "--data.flip", "true", "--model.attention_health", "false"]


class Watched:
    """What a run has seen and lost, step by step."""

    def __init__(self, monkeypatch, folder=None):
        self.images, self.losses, self.validated, self.folder = {}, {}, [], folder

        def after_batch(task, outputs, batch, batch_idx):
            step = (task.trainer.current_epoch, batch_idx)
            assert step not in self.images
            self.images[step] = batch.image_ids
            self.losses[step] = outputs["loss"].item()
            if folder is not None:
                task.trainer.save_checkpoint(folder / f"{len(self.images)}.ckpt")

        def after_validation(task):
            self.validated.append((task.trainer.global_step, task.scores["CIDEr-D"]))

        monkeypatch.setattr(CaptioningTask, "on_train_batch_end", after_batch, raising=False)
        monkeypatch.setattr(CaptioningTask, "on_validation_end", after_validation, raising=False)


def state(cli):
    """All that a run ends with, flat."""
    trainer = cli.trainer
    (optimizer,) = trainer.optimizers
    moments = optimizer.state_dict()["state"]
    found = {f"weight {name}": value for name, value in cli.model.state_dict().items()}
    found |= {f"{name} {number}": value for number, each in moments.items() for name, value in each.items()}
    found |= {f"rate {number}": group["lr"] for number, group in enumerate(optimizer.param_groups)}
    stopping, best = trainer.early_stopping_callback, trainer.checkpoint_callback
    found |= {"wait": stopping.wait_count, "score": stopping.best_score, "best": best.best_model_score}
    return found | {"epoch": trainer.current_epoch, "step": trainer.global_step, "stopped": trainer.should_stop}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def check(fit, monkeypatch, tmp_path, flags, wanted_steps, resumed_flags=()):
    """See that a run that goes on after any of some steps ends as the undisturbed one does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    whole = Watched(monkeypatch, tmp_path / "saved")
    undisturbed = state(fit(*TINY, *flags))
    steps = len(whole.images)
    for step in wanted_steps(steps):
        rest = Watched(monkeypatch)
        saved = tmp_path / "saved" / f"{step}.ckpt"
        folder = tmp_path / f"from {step}"
        resumed = state(
            fit(*TINY, *flags, *resumed_flags, "--ckpt_path", str(saved), "--checkpoint.dirpath", str(folder))
        )
        assert rest.images == dict(list(whole.images.items())[step:]), step
        assert rest.losses == dict(list(whole.losses.items())[step:]), step
        assert rest.validated == [each for each in whole.validated if each[0] >= step], step
        # The folder is another one here, in which Lightning forgets the best score of before.
        del resumed["best"]
        assert_equal({name: value for name, value in undisturbed.items() if name != "best"}, resumed)
    return whole


HALF = ["--trainer.val_check_interval", "0.5"]
SETTINGS = {
    "validated in mid-epoch": HALF,
    "two epochs without validation between": ["--trainer.check_val_every_n_epoch", "2"],
    "steps counted": ["--trainer.max_epochs", "-1", "--trainer.max_steps", "15"],
    "gradients summed": ["--trainer.accumulate_grad_batches", "2"],
    "stopped early": [*HALF, "--early_stopping.patience", "1", "--early_stopping.min_delta", "9"],
    "workers": ["--data.num_workers", "2"],
}


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_a_run_goes_on_from_any_step_as_if_nothing_had_been(flags, fit, monkeypatch, tmp_path):
    choice = random.Random(str(flags))
    check(fit, monkeypatch, tmp_path, flags, lambda steps: sorted({3, 6, *choice.sample(range(1, steps), 2)} - {steps}))
