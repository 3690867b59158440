"""A loss or a gradient that is not finite stops training before the step, names the images, and keeps the weights."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from captioner.checkpoint import read
from captioner.errors import InputError
from captioner.finiteness import Watch
from captioner.self_critical import Reward
from captioner.task import CaptioningTask

NAN, INF = float("nan"), float("inf")
WHEN = {"when": "step 7 (epoch 2)", "saved": "the last checkpoint before is last.ckpt"}


def watching(*batches):
    watch = Watch()
    for image_ids, loss in batches:
        watch.note(image_ids, torch.tensor(loss), torch.tensor(loss))
    return watch


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_the_images_of_the_batch_at_fault_are_named_and_no_others(loss):
    watch = watching((["a", "b"], 1.0), (["c", 4], loss), (["e"], 2.0))
    with pytest.raises(InputError) as error:
        watch.look([], torch.tensor(1.0), **WHEN)
    assert str(error.value).startswith(
        f"The loss is {loss} in step 7 (epoch 2), where the images were c, 4; the step was not taken, and the last "
        "checkpoint before is last.ckpt: "
    )


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradients_that_are_not_finite_name_all_images_of_the_step(value):
    gradients = [torch.ones(3), torch.tensor([1.0, value])]
    with pytest.raises(InputError, match=r"gradients are not finite in step 7 \(epoch 2\).* images were a, b; "):
        watching((["a"], 1.0), (["b"], 1.0)).look(gradients, nn.utils.get_total_norm(gradients), **WHEN)


def test_what_is_finite_goes_on():
    large = [torch.full((3,), 3e38)]  # whose norm is no float32
    watch = watching((["a"], 1.0))
    watch.look(large, nn.utils.get_total_norm(large), **WHEN)
    watch.note(["b"], torch.tensor(2e300, dtype=torch.float64), torch.tensor(2e300, dtype=torch.float64))
    watch.look([], None, **WHEN)
    watch.look([torch.tensor(INF)], None, **WHEN)  # which a scaler of float16 meets by a smaller scale


def test_a_look_forgets_what_it_has_seen():
    watch = watching((["a"], NAN))
    with pytest.raises(InputError):
        watch.look([], None, **WHEN)
    watch.look([], None, **WHEN)


def poison(monkeypatch, call, spoil):
    """Spoil the loss of one batch, and return what is known of it."""
    known, objective = {"calls": 0}, CaptioningTask._cross_entropy
    step = CaptioningTask.training_step

    def training_step(task, batch, index):
        known["batch"] = batch.image_ids
        return step(task, batch, index)

    def spoilt(task, *args):
        total, parts = objective(task, *args)
        known["calls"] += 1
        if known["calls"] == call:
            known.update(task=task, images=known["batch"], weights=weights(task))
            total = spoil(total, next(task.parameters()))
        return total, parts

    monkeypatch.setattr(CaptioningTask, "training_step", training_step)
    monkeypatch.setattr(CaptioningTask, "_cross_entropy", spoilt)
    return known


def weights(task):
    return {name: value.detach().clone() for name, value in task.named_parameters()}


def flat(loss, weight):
    """Leave the loss as it is, and give the weight no gradient: the slope of the root at 0 is infinite."""
    return loss + (0 * weight.sum()).sqrt()


@pytest.mark.parametrize(
    ("spoil", "flags", "said"),
    [
        (lambda loss, _: loss * NAN, [], "The loss is nan"),
        (
            flat,
            ["--trainer.gradient_clip_val", "1", "--trainer.precision", "bf16-mixed"],
            "The gradients are not finite",
        ),
        pytest.param(flat, [], "The gradients are not finite", marks=pytest.mark.slow),
        pytest.param(
            flat,
            ["--trainer.gradient_clip_val", "1", "--trainer.gradient_clip_algorithm", "value"],
            "The gradients are not finite",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["loss", "clipped", "gradient", "clipped by value"],
)
def test_training_stops_at_that_step(spoil, flags, said, fit, tmp_path, monkeypatch):
    known = poison(monkeypatch, 5, spoil)
    with pytest.raises(InputError) as error:
        fit("--trainer.max_epochs", "3", "--checkpoint.dirpath", str(tmp_path), *flags)
    images = ", ".join(map(str, known["images"]))
    assert str(error.value).startswith(f"{said} in step 5 (epoch 2), ") and f"images were {images};" in str(error.value)
    path = Path(re.search(r"checkpoint before is (\S+):", str(error.value))[1])
    assert path == tmp_path / "last.ckpt" and torch.load(path, weights_only=True)["global_step"] == 3
    assert all(tensor.isfinite().all() for tensor in read(path).tensors.values())
    now = weights(known["task"])
    assert known["calls"] == 5 and all(torch.equal(value, now[name]) for name, value in known["weights"].items())


def test_of_batches_that_are_added_up_the_one_at_fault_is_named(fit, monkeypatch):
    known = poison(monkeypatch, 1, lambda loss, _: loss * INF)
    with pytest.raises(InputError, match="The loss is inf in step 1 .*no checkpoint was written before") as error:
        fit("--trainer.accumulate_grad_batches", "2")
    assert f"images were {', '.join(map(str, known['images']))};" in str(error.value) and known["calls"] == 2


@pytest.mark.slow
def test_a_scaler_of_float16_leaves_out_a_step_and_a_loss_stops_it_too(fit, monkeypatch):
    plugin = "lightning.pytorch.plugins.precision.MixedPrecision"
    flags = ("--trainer.plugins", plugin, "--trainer.plugins.precision", "16-mixed", "--trainer.plugins.device", "cpu")
    known = poison(monkeypatch, 2, flat)
    fit(*flags)
    assert known["calls"] == 3
    monkeypatch.undo()
    poison(monkeypatch, 2, lambda loss, _: loss * NAN)
    with pytest.raises(InputError, match="The loss is nan in step 2 "):
        fit(*flags)


@pytest.mark.slow
def test_self_critical_training_stops_too(fit, best, monkeypatch):
    monkeypatch.setattr(Reward, "__call__", lambda _, __, samples: torch.full(samples.lengths.shape, NAN))
    objective = ("--model.objective", "SelfCritical", "--model.initial_weights", str(best))
    with pytest.raises(InputError, match="The loss is nan in step 1 .*no checkpoint was written before"):
        fit(*objective)


def test_weights_that_are_not_finite_are_not_saved(fit, tmp_path, monkeypatch, capsys):
    plain = CaptioningTask.optimizer_step

    def too_large(task, *args, **more):
        plain(task, *args, **more)
        if task.trainer.global_step == 1:  # before it is counted
            with torch.no_grad():
                next(task.parameters()).mul_(float("inf"))

    monkeypatch.setattr(CaptioningTask, "optimizer_step", too_large)
    with pytest.raises(InputError, match=r"weights are not finite after step 2 .*the last checkpoint before is"):
        fit("--checkpoint.every_n_train_steps", "1", folder=tmp_path)
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1
