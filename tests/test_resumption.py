"""Going on: from any step a run ends with the weights, scores and order of an undisturbed one, bit for bit."""

import random

import pytest
import torch

from captioner.errors import InputError
from captioner.resumption import _understood
from captioner.task import CaptioningTask

STEPS = 18
TINY = ["--data.batch_size", "4", "--trainer.max_epochs", "3", "--trainer.logger", "false", "--model.dropout", "0.3"]
TINY += ["--data.captions_per_image", "2", "--data.flip", "true", "--model.attention_health", "false"]


class Watched:
    """What a run has seen and lost, step by step."""

    def __init__(self, monkeypatch, folder=None, done=0):
        self.images, self.losses, self.validated = {}, {}, []  # the last with the number of batches before

        def after_batch(task, outputs, batch, batch_idx):
            step = (task.trainer.current_epoch, batch_idx)
            assert step not in self.images
            self.images[step] = batch.image_ids
            self.losses[step] = outputs["loss"].item()
            if folder is not None:
                task.trainer.save_checkpoint(folder / f"{len(self.images)}.ckpt")

        def after_validation(task):
            self.validated.append((done + len(self.images), task.scores["CIDEr-D"]))

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


def check(fit, monkeypatch, tmp_path, flags, wanted_steps):
    """See that a run that goes on after any of some steps ends as the undisturbed one does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    whole = Watched(monkeypatch, tmp_path / "saved")
    undisturbed = state(fit(*TINY, *flags))
    steps = len(whole.images)
    for step in wanted_steps(steps):
        rest = Watched(monkeypatch, done=step)
        saved = tmp_path / "saved" / f"{step}.ckpt"
        folder = tmp_path / f"from {step}"
        resumed = state(fit(*TINY, *flags, "--ckpt_path", str(saved), "--checkpoint.dirpath", str(folder)))
        assert rest.images == dict(list(whole.images.items())[step:]), step
        assert rest.losses == dict(list(whole.losses.items())[step:]), step
        assert rest.validated == [each for each in whole.validated if each[0] >= step], step
        # The folder is another one here, in which Lightning forgets the best score of before.
        del resumed["best"]
        assert_equal({name: value for name, value in undisturbed.items() if name != "best"}, resumed)
    return whole


HALF = ["--trainer.val_check_interval", "0.5"]
SUMMED = ["--trainer.accumulate_grad_batches", "2"]
SETTINGS = {
    "validated in mid-epoch": HALF,
    "gradients summed": SUMMED,
    "two epochs without validation between": ["--trainer.check_val_every_n_epoch", "2"],
    "steps counted": ["--trainer.max_epochs", "-1", "--trainer.max_steps", "15"],
    "stopped early": [*HALF, "--early_stopping.patience", "1", "--early_stopping.min_delta", "9"],
    "self-critical": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_goes_on_from_any_step_as_if_nothing_had_been(name, fit, monkeypatch, tmp_path):
    flags = SETTINGS[name]
    if name == "self-critical":
        best = fit(*TINY, "--data.flip", "false").trainer.checkpoint_callback.best_model_path
        flags = ["--data.flip", "false", "--model.objective", "SelfCritical", "--model.initial_weights", best]
    every = 2 if flags == SUMMED else 1
    step = random.Random(name).randrange(every, 12, every)
    check(fit, monkeypatch, tmp_path, flags, lambda steps: sorted({min(6, steps), min(step, steps - 1)}))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_each_of_ten_steps(workers, fit, monkeypatch, tmp_path):
    steps = random.Random(workers).sample(range(1, STEPS), 10)
    whole = check(fit, monkeypatch, tmp_path, ["--data.num_workers", str(workers)], lambda _: sorted(steps))
    for epoch in range(3):
        seen = [image for batch in range(6) for image in whole.images[epoch, batch]]
        assert len(seen) == len(set(seen)) == 22


def test_a_sum_of_gradients_begins_anew(fit, monkeypatch, tmp_path):
    Watched(monkeypatch, tmp_path)
    flags = [*TINY, *SUMMED, "--trainer.max_epochs", "1"]
    fit(*flags)
    rest = Watched(monkeypatch)
    fit(*flags, "--ckpt_path", str(tmp_path / "3.ckpt"), "--checkpoint.dirpath", str(tmp_path / "on"))
    assert next(iter(rest.images)) == (0, 2) and len(rest.images) == 4


@pytest.mark.slow
def test_workers_change_no_loss_over_fifty_steps(fit, monkeypatch):
    def losses(workers):
        watched = Watched(monkeypatch)
        fit(*TINY, "--trainer.max_epochs", "9", "--trainer.limit_val_batches", "0", "--data.num_workers", workers)
        return list(watched.losses.values())

    one, again, two, twice = losses("0"), losses("0"), losses("2"), losses("2")
    assert len(one) == 54 and one == again == two == twice and len(set(one)) > 50


@pytest.fixture
def middle(fit, monkeypatch, tmp_path):
    """A checkpoint in the middle of the first epoch."""
    Watched(monkeypatch, tmp_path)
    fit(*TINY, "--trainer.max_epochs", "1")
    Watched(monkeypatch)
    return tmp_path / "4.ckpt"


def test_other_batches_in_the_middle_of_an_epoch_are_refused(middle, fit):
    with pytest.raises(InputError, match="batches of 4 in each of 1 processes, and there are 22 in batches of 5"):
        fit(*TINY, "--data.batch_size", "5", "--ckpt_path", str(middle))


def test_the_seed_is_that_of_the_checkpoint(middle, fit, monkeypatch):
    losses = []
    for seed in ("1", "false"):
        watched = Watched(monkeypatch)
        fit(*TINY, "--trainer.max_epochs", "1", "--seed_everything", seed, "--ckpt_path", str(middle))
        losses.append(list(watched.losses.values()))
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_damaged_place_is_said(middle):
    whole = torch.load(middle, weights_only=True)["resumption"]
    assert _understood(whole) is whole
    batches = {**whole["batches"], "size": "4"}
    for wrong in ({"seed": "1"}, {"pending": None}, {"metrics": {"a": 1}}, {"batches": batches}, {"batches": [4]}):
        with pytest.raises(InputError, match="damaged"):
            _understood({**whole, **wrong})
    with pytest.raises(InputError, match="damaged"):
        _understood([])


def test_validation_within_a_sum_of_gradients_is_refused(fit):
    with pytest.raises(InputError, match="Validation after every 3 batches"):
        fit(*TINY, *HALF, "--trainer.accumulate_grad_batches", "2")
