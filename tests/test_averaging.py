"""The moving average of the weights: its values, and that it is what a run validates, keeps and goes on from."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback
from test_training import one_line

from captioner.averaging import MovingAverage
from captioner.cli import main
from captioner.model import Captioner

AVERAGING = ["--model.averaging", "0.9", "--model.tie_weights", "true"]


def test_the_average_by_hand():
    weight = {"w": torch.tensor([1.0, 2.0])}
    average = MovingAverage(0.15, weight)
    weight["w"] += 10
    average.update(weight)  # keeps 1 / 10
    assert average.values["w"].tolist() == pytest.approx([0.1 * 1 + 0.9 * 11, 0.1 * 2 + 0.9 * 12])
    weight["w"].zero_()
    average.update(weight)  # would keep 2 / 11, but at most 0.15
    assert average.values["w"].tolist() == pytest.approx([0.15 * 10.0, 0.15 * 11.0])
    assert average.updates == 2


def test_swapping_twice_changes_nothing():
    weight = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    average = MovingAverage(0.999, {"w": torch.tensor([3.0, 4.0])})
    pointer = weight["w"].data_ptr()
    average.swap(weight)
    assert weight["w"].tolist() == [3, 4] and average.values["w"].tolist() == [1, 2]
    average.swap(weight)
    assert weight["w"].tolist() == [1, 2] and weight["w"].data_ptr() == pointer and weight["w"].dtype == torch.bfloat16


class Watch(Callback):
    """Averages by itself, and notes what is trained and what is validated."""

    def __init__(self):
        self.average, self.updates, self.validated = None, 0, None

    def on_train_start(self, trainer, task):
        if self.average is None:
            self.average = self.weights(task)

    def on_train_batch_end(self, trainer, task, *_):
        share = min(0.9, (1 + self.updates) / (10 + self.updates))
        for name, value in self.weights(task).items():
            self.average[name] = share * self.average[name] + (1 - share) * value
        self.updates += 1

    def on_validation_batch_start(self, trainer, task, *_):
        self.validated = self.weights(task)

    @staticmethod
    def weights(task):
        tensors = task.captioner.state_dict()
        return {name: value.detach().clone() for name, value in tensors.items() if value.is_floating_point()}


def same(some, others):
    assert some
    for name, value in some.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def averaged(recipe, tmp_path_factory):
    """A run of three steps an epoch, watched."""
    from captioner import training

    watch, folder = Watch(), tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ScoreLines", lambda: watch)
        flags = ["--config", str(recipe), "--trainer.default_root_dir", str(folder), "--trainer.max_epochs", "2"]
        cli = training.train(["fit", *flags, *AVERAGING])
    return cli, watch


def test_a_run_validates_and_keeps_the_average(averaged):
    cli, watch = averaged
    saved = torch.load(cli.trainer.checkpoint_callback.last_model_path, weights_only=True)
    same(watch.average, saved["captioner"]["tensors"])
    same(watch.average, watch.validated)
    same(watch.average, {name.removeprefix("model."): value for name, value in saved["state_dict"].items()})
    same(watch.average, cli.model.captioner.state_dict())  # whoever uses the model after the run has what was scored
    trained = {name.removeprefix("model."): value for name, value in saved["averaging"]["trained"].items()}
    assert any((value - watch.average[name]).abs().max() > 1e-3 for name, value in trained.items())
    tensors = saved["captioner"]["tensors"]
    assert tensors["embedding.weight"].data_ptr() == tensors["output.weight"].data_ptr()  # written once
    Captioner.from_checkpoint(cli.trainer.checkpoint_callback.last_model_path)


def test_a_run_trains_as_it_would_without(averaged, fit):
    cli, _ = averaged
    plain = fit("--model.tie_weights", "true", "--trainer.max_epochs", "2").model.captioner.state_dict()
    saved = torch.load(cli.trainer.checkpoint_callback.last_model_path, weights_only=True)["averaging"]["trained"]
    same({name.removeprefix("model."): value for name, value in saved.items()}, plain)


def test_a_run_goes_on_with_both(averaged, recipe, tmp_path, monkeypatch):
    from captioner import training

    cli, before = averaged
    last = cli.trainer.checkpoint_callback.last_model_path
    saved = torch.load(last, weights_only=True)
    started = {}

    class Begin(Watch):
        def on_train_start(self, trainer, task):
            started.update(self.weights(task))
            self.average, self.updates = before.average, before.updates

    watch = Begin()
    monkeypatch.setattr(training, "ScoreLines", lambda: watch)
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "3"]
    on = training.train(["fit", *flags, *AVERAGING, "--ckpt_path", last])
    same({name.removeprefix("model."): value for name, value in saved["averaging"]["trained"].items()}, started)
    same(watch.average, on.model.captioner.state_dict())


def without_prefix(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items()}


class Begin(Callback):
    """Notes what the first step of a run starts from."""

    weights = None

    def on_train_batch_start(self, trainer, task, *_):
        self.weights = self.weights or Watch.weights(task)


def test_a_model_that_was_trained_before_goes_on_from_a_file(fit):
    cli, begin = fit(*AVERAGING), Begin()  # the average stands in the model
    last = cli.trainer.checkpoint_callback.last_model_path
    trained = torch.load(last, weights_only=True)["averaging"]["trained"]
    cli.trainer.callbacks.append(begin)
    cli.trainer.fit_loop.max_epochs = 2
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=True)
    same(without_prefix(trained), begin.weights)


def test_a_run_that_averages_no_more_goes_on_with_what_was_trained(averaged, recipe, tmp_path, monkeypatch):
    from captioner import training

    last, begin = tmp_path / "last.ckpt", Begin()
    shutil.copy(averaged[0].trainer.checkpoint_callback.last_model_path, last)
    trained = torch.load(last, weights_only=True)["averaging"]["trained"]
    monkeypatch.setattr(training, "ScoreLines", lambda: begin)
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "4"]
    training.train(["fit", *flags, "--model.tie_weights", "true", "--ckpt_path", str(last)])
    same(without_prefix(trained), begin.weights)


def test_a_checkpoint_between_validations_has_the_average_of_all_steps(fit):
    flags = ["--checkpoint.every_n_train_steps", "2", "--checkpoint.monitor", "null"]
    cli = fit(*AVERAGING, *flags)
    saved = torch.load(cli.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["averaging"]["updates"] == saved["global_step"] == 2
    assert cli.model._average.updates == cli.trainer.global_step == 3


def test_weights_that_start_a_run_are_averaged_ones(averaged, fit):
    cli, watch = averaged
    best = cli.trainer.checkpoint_callback.last_model_path
    flags = ["--model.initial_weights", best, "--model.learning_rate", "0", "--model.tie_weights", "true"]
    started = fit(*flags).model.captioner.state_dict()
    same({name: value for name, value in watch.average.items() if "running" not in name}, started)


def test_a_share_that_averages_nothing_is_refused(recipe, tmp_path, capsys):
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", *flags, "--model.averaging", "1"]) == 2
    assert "model.averaging is 1" in one_line(capsys)
