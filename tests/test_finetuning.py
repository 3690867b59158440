"""Fine-tuning through the command line: first the decoder, then with it the last stages of the CNN."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_task import rows
from test_training import one_line
from torch.optim.optimizer import register_optimizer_step_post_hook

from captioner.checkpoint import read
from captioner.cli import main
from captioner.encoders import ResNet
from captioner.model import Captioner

CONFIGS = Path(__file__).parents[1] / "configs"
RESNET = ("--model.encoder", "captioner.encoders.ResNet", "--model.encoder.depth", "18", "--model.encoder.stage", "2")
RESNET += ("--model.encoder.preprocessing.fit", "squash", "--model.encoder.preprocessing.size", "32")
TUNED = (*RESNET, "--model.encoder.learns", "layer2")
NO_STEP = ("--trainer.num_sanity_val_steps", "-1", "--trainer.limit_train_batches", "0")


@pytest.fixture(scope="module")
def first(fit):
    """The first of the two runs: a decoder behind a frozen CNN."""
    cli = fit(*RESNET, "--model.encoder.learns", "false", "--trainer.max_epochs", "3")
    return cli.trainer.checkpoint_callback.best_model_path


@pytest.fixture(scope="module")
def tuned(fit, first):
    """The second."""
    return fit(*TUNED, "--model.initial_weights", first, "--model.encoder_learning_rate", "2e-3", "--data.crop", "0.8")


@pytest.fixture(scope="module")
def last(tuned):
    return tuned.trainer.checkpoint_callback.last_model_path


def tensors(path):
    return read(path).tensors


@pytest.fixture
def norms():
    """The length of the gradient that each step of an optimiser has used."""
    found = []

    def measure(optimizer, args, kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    hook = register_optimizer_step_post_hook(measure)
    yield found
    hook.remove()


def said(command, flags, recipe, folder, capsys):
    """What a mistake is answered with."""
    assert main([command, "--config", str(recipe), "--trainer.default_root_dir", str(folder), *flags]) == 2
    return one_line(capsys)


def test_the_second_recipe_tunes_the_model_of_the_first():
    models = [
        yaml.safe_load((CONFIGS / name).read_text())["model"] for name in ("flickr8k.yaml", "flickr8k_finetune.yaml")
    ]
    learns = models[1]["encoder"]["init_args"].pop("learns")
    rates = [models[1].pop("encoder_learning_rate"), *(model.pop("learning_rate") for model in models)]
    assert models[0] == models[1] and learns == "layer3" and rates == [1e-5, 1e-3, 1e-4]


def test_the_self_critical_recipe_goes_on_with_the_model_of_the_first():
    models = [yaml.safe_load((CONFIGS / name).read_text())["model"] for name in ("flickr8k.yaml", "flickr8k_scst.yaml")]
    objectives = [model.pop("objective")["class_path"] for model in models]
    rates = [model.pop("learning_rate") for model in models]
    assert models[0] == models[1] and objectives == ["CrossEntropy", "SelfCritical"] and rates == [1e-3, 2e-4]


# What learns


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_named_stage_is_tuned_and_nothing_before_it(precision, fit, first, norms):
    clip = ("--trainer.precision", precision, "--trainer.gradient_clip_val", "1e-3")
    cli = fit(*TUNED, "--model.initial_weights", first, "--data.crop", "0.8", *clip)
    before, after = tensors(first), tensors(cli.trainer.checkpoint_callback.last_model_path)
    encoder = {name for name in before if name.startswith("encoder.")}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Neither statistics nor anything else of batch norm, and no map of the stages before.
    kinds = ("conv1.weight", "conv2.weight", "downsample.0.weight")
    wanted = {name for name in encoder if ".layer2." in name and name.endswith(kinds)}
    assert changed & encoder == wanted and len(wanted) == 5
    assert changed - encoder == before.keys() - encoder
    (optimizer,) = cli.trainer.optimizers
    assert all(group["fused"] for group in optimizer.param_groups)
    assert all(parameter.dtype == torch.float32 for parameter in cli.model.parameters())
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)  # clipped, from far above


def test_with_a_scaler_for_float16_gradients_are_clipped_too(fit, norms):
    plugin = "lightning.pytorch.plugins.precision.MixedPrecision"
    flags = ("--trainer.plugins", plugin, "--trainer.plugins.precision", "16-mixed", "--trainer.plugins.device", "cpu")
    cli = fit(*flags, "--trainer.gradient_clip_val", "1e-3")
    assert not any(group["fused"] for group in cli.trainer.optimizers[0].param_groups)
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)


@pytest.mark.slow
def test_computing_again_trains_the_same_weights(fit, first):
    flags = (*TUNED, "--model.initial_weights", first, "--trainer.precision", "bf16-mixed")
    runs = [fit(*flags, "--model.encoder.recompute", recompute) for recompute in ("false", "true")]
    plain, again = (tensors(cli.trainer.checkpoint_callback.last_model_path) for cli in runs)
    assert runs[1].model.captioner.encoder.recompute
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


# Learning rates


@pytest.mark.slow
def test_the_encoders_learning_rate_rises_and_falls_with_the_other(fit, first):
    rates = ("--model.learning_rate", "1e-2", "--model.encoder_learning_rate", "1e-4", "--model.warmup", "0.25")
    epochs = ("--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "4")
    cli = fit(*TUNED, "--model.initial_weights", first, *rates, *epochs)
    lines = [line for line in rows(cli) if line["lr-AdamW/pg1"]]
    decoder, encoder = ([float(line[f"lr-AdamW/pg{group}"]) for line in lines] for group in (1, 3))
    assert len(lines) == 12 and encoder == pytest.approx([rate / 100 for rate in decoder])
    assert encoder[:3] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4]) and encoder[2:] == sorted(encoder[2:], reverse=True)


def test_the_encoders_matrices_decay_as_the_others(fit):
    cli = fit("--model.encoder_learning_rate", "1e-3", "--trainer.fast_dev_run", "true")
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [cli.model.weight_decay, 0, cli.model.weight_decay, 0]
    assert [group["initial_lr"] for group in groups] == [0.02, 0.02, 1e-3, 1e-3]
    encoder = {id(parameter) for parameter in cli.model.captioner.encoder.parameters()}
    assert [{id(p) in encoder for p in group["params"]} for group in groups] == [{False}, {False}, {True}, {True}]
    assert all(parameter.dim() > 1 for group in groups[::2] for parameter in group["params"])
    assert all(parameter.dim() == 1 for parameter in groups[3]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(cli.model.parameters()))


# Where it starts from


@pytest.mark.slow
def test_before_any_step_it_says_what_the_weights_said_that_it_starts_from(fit, first, last, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(ResNet, "load_weights", lambda self: loaded.append(self))
    begun = fit(*TUNED, "--model.initial_weights", first, *NO_STEP)
    assert begun.model.scores == read(first).scores and begun.model.scores["BLEU-1"] > 0
    # A checkpoint to go on from wins, and the other file is not needed any more.
    gone = ("--model.initial_weights", str(tmp_path / "gone.ckpt"), "--model.encoder_learning_rate", "2e-3")
    resumed = fit(*TUNED, *gone, "--ckpt_path", last, "--trainer.max_epochs", "2", *NO_STEP)
    assert resumed.model.scores == read(last).scores
    assert not loaded  # the pretrained weights would have been for nothing
    alone = fit(*TUNED, *NO_STEP)
    assert loaded == [alone.model.captioner.encoder] and alone.model.scores != begun.model.scores


def test_a_resumed_run_goes_on_where_it_ended(fit, last, tmp_path):
    shutil.copy(last, tmp_path / "last.ckpt")
    flags = ("--model.encoder_learning_rate", "2e-3", "--ckpt_path", str(tmp_path / "last.ckpt"))
    resumed = fit(*TUNED, *flags, "--trainer.max_epochs", "2")
    assert resumed.trainer.global_step == 6
    assert {int(state["step"]) for state in resumed.trainer.optimizers[0].state.values()} == {6}


def test_a_second_fit_in_python_goes_on_with_what_was_learnt(tuned):
    before = {name: value.clone() for name, value in tuned.model.state_dict().items()}
    tuned.model.configure_optimizers()
    assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())


def test_a_checkpoint_knows_what_learns(tuned, last):
    trained, again = tuned.model.captioner.eval(), Captioner.from_checkpoint(last)
    assert again.encoder.learns == "layer2" and again.contents().settings == trained.contents().settings
    pictures = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.annotate(pictures).values, trained.annotate(pictures).values)
    learns = {name for name, parameter in again.encoder.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, parameter in trained.encoder.named_parameters() if parameter.requires_grad}
    again.train()
    assert again.encoder.body.layer2.training and not again.encoder.body.layer1.training


# Mistakes


def test_another_vocabulary_is_said(first, recipe, tmp_path, capsys):
    flags = [*TUNED, "--model.initial_weights", first, "--data.minimum_count", "40"]
    message = said("fit", flags, recipe, tmp_path, capsys)
    assert "model.initial_weights knows" in message and "minimum_count" in message


@pytest.mark.parametrize("other", [("--model.embedding_dim", "16"), ("--model.encoder.stage", "3")])
def test_weights_of_another_model_are_said(other, first, recipe, tmp_path, capsys):
    message = said("fit", [*TUNED, "--model.initial_weights", first, *other], recipe, tmp_path, capsys)
    assert "weights in" in message and "another model's" in message and Path(first).name in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.initial_weights", "missing.ckpt"), "no checkpoint missing.ckpt"),
        (("--model.encoder.learns", "layer3"), "conv1, layer1, layer2, true or false"),
        (("--model.encoder.learns", "false", "--model.encoder_learning_rate", "1e-5"), "this one is frozen"),
        (("--model.encoder_learning_rate=-1e-5",), "model.encoder_learning_rate is -1e-05"),
        (("--data.cache", "cache"), "data.cache to null"),
    ],
)
def test_a_wrong_setting_is_one_line(flags, words, recipe, tmp_path, capsys):
    assert words in said("fit", [*TUNED, *flags], recipe, tmp_path, capsys)


@pytest.mark.parametrize("other", [("--model.encoder.learns", "layer1"), ("--model.encoder_learning_rate", "null")])
def test_going_on_with_other_parts_is_said(other, last, recipe, tmp_path, capsys):
    flags = [*TUNED, "--model.encoder_learning_rate", "2e-3", "--ckpt_path", last, *other]
    assert "has trained other parts" in said("fit", flags, recipe, tmp_path, capsys)


def test_the_words_of_captions_can_teach_a_part(fit):
    assert fit(*TUNED, "--model.word_presence", "0.3", "--trainer.fast_dev_run", "true").model.presence is not None
