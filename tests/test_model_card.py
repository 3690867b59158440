"""The model card: what it says is what the checkpoint is, and it stands beside each best one."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_annotation_cache import FOREIGN

from captioner import model_card, training
from captioner.checkpoint import read
from captioner.metrics import bootstrap, score_captions
from captioner.model import Captioner


@pytest.fixture(scope="module")
def card(best):
    return best.with_suffix(".md").read_text()


def rows(card):
    """The cells behind the first one of each row of each table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_it_describes_the_checkpoint(card, best, scenes):
    cells, model = rows(card), Captioner.from_checkpoint(best)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert cells["parameters"][0] == f"{parameters:,}, of which {parameters:,} learn"
    assert cells["encoder"][0].startswith("SmallCNN: size 32") and "32 x 32" in cells["encoder"][0]
    assert cells["bridge"][0].startswith("LinearBridge: dim 32") and cells["attention"] == ["Additive: dim 16"]
    assert cells["decoder"][0].startswith("LSTMDecoder: hidden_dim 32, attend before")
    assert cells["vocabulary"] == [f"{len(model.vocabulary.words)} words"]
    assert cells["train"] == ["training", "22", "110"] and cells["val"] == ["validation", "9", "45"]
    assert cells["objective"] == ["CrossEntropy: label_smoothing 0.0, doubly_stochastic 1.0"]
    assert cells["learning rate"][0].startswith("0.02 ") and cells["batch size"][0].startswith("8 images")
    steps = torch.load(best, weights_only=True)["global_step"]
    assert cells["epochs"] == [f"{steps // 3} of at most 24, {steps} steps"]
    assert (cells["precision"], cells["seed"]) == (["32-true"], ["1"]) and "initial weights" not in cells
    assert re.match(r"0:\d\d:\d\d ", cells["training time so far"][0])


def test_it_gives_the_checkpoints_scores_with_their_intervals(card, best, scenes, recipe):
    cells = rows(card)
    cli = training.train(["validate", "--config", str(recipe), "--ckpt_path", str(best)])
    captions = cli.model.captions
    references = {image_id: cli.datamodule.references("val")[image_id] for image_id in captions}
    for name, score in score_captions(references, captions).items():
        low, high = (100 * value for value in bootstrap(score))
        assert cells[name] == [f"{100 * read(best).scores[name]:.1f}", f"{low:.1f} to {high:.1f}"]
    assert f"{len(set(captions.values()))} of the 9 captions differ" in card


def test_it_names_no_place_of_this_machine(card, best, scenes):
    assert f"folder `{scenes.name}`" in card
    assert not any(part in card for part in (str(scenes.parent), str(best.parent), os.path.expanduser("~")))


def test_it_says_how_to_caption_and_what_the_limits_are(card):
    assert "captioner caption photos/ --checkpoint best.ckpt\n" in card
    assert "--encoder" not in card and "## Limits\n" in card and "annotators guessed" in card


@pytest.mark.slow
def test_a_foreign_encoders_class_and_where_training_began_are_said(fit):
    cli = fit(*FOREIGN, "--data.flip", "true")
    best = Path(cli.trainer.checkpoint_callback.best_model_path)
    card = best.with_suffix(".md").read_text()
    name = cli.model.captioner.encoder.module_name
    assert rows(card)["encoder"][0].startswith(f"{name}; frozen") and f"best.ckpt --encoder {name}\n" in card
    assert "mirrored" in card
    again = fit(*FOREIGN, "--model.initial_weights", str(best))
    card = Path(again.trainer.checkpoint_callback.best_model_path).with_suffix(".md").read_text()
    assert rows(card)["initial weights"] == ["best.ckpt"] and str(best.parent) not in card


@pytest.mark.slow
def test_it_is_written_anew_with_each_best_checkpoint_and_only_then(fit, monkeypatch):
    written = []

    def noting(checkpoint, task, seconds):
        written.append((checkpoint.name, task.trainer.global_step, seconds))
        return model_card.write_card(checkpoint, task, seconds)

    monkeypatch.setattr(training, "write_card", noting)
    cli = fit("--trainer.max_epochs", "5", "--early_stopping.patience", "99")
    values = [float(value) for value in scores_of(cli)]
    better = [epoch for epoch, value in enumerate(values, 1) if value > max([-1.0, *values[: epoch - 1]])]
    assert [(name, step) for name, step, _ in written] == [("best.ckpt", 3 * epoch) for epoch in better]
    assert 1 < len(better) < 5
    seconds = [each for *_, each in written]
    assert seconds == sorted(seconds) and seconds[0] > 0
    folder = Path(cli.trainer.checkpoint_callback.best_model_path).parent
    assert f"{100 * max(values):.1f}" in rows((folder / "best.md").read_text())["CIDEr-D"]


def scores_of(cli):
    from test_task import rows as lines

    return [line["val/CIDEr-D"] for line in lines(cli) if line["val/CIDEr-D"]]


def test_each_of_several_best_checkpoints_has_its_own_and_takes_it_along(fit):
    flags = ["--checkpoint.save_top_k", "2", "--checkpoint.filename", "best-{epoch}", "--early_stopping.patience", "99"]
    cli = fit("--trainer.max_epochs", "3", *flags)
    folder = Path(cli.trainer.checkpoint_callback.best_model_path).parent
    kept = sorted(path.stem for path in folder.glob("best-*.ckpt"))
    assert len(kept) == 2 and sorted(path.stem for path in folder.glob("*.md")) == kept


def test_the_time_goes_on_where_a_run_goes_on(last, fit, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(last.parent, folder)
    contents = torch.load(folder / "last.ckpt", weights_only=True)
    (state,) = (each for key, each in contents["callbacks"].items() if key.startswith("BestAndLast"))
    assert 0 < state["seconds"] < 3600
    state["seconds"] = 7200.0
    torch.save(contents, folder / "last.ckpt")
    flags = ["--trainer.max_epochs", "25", "--early_stopping.patience", "99"]
    cli = fit("--ckpt_path", str(folder / "last.ckpt"), *flags, folder=tmp_path)
    assert 7200 < cli.trainer.checkpoint_callback.seconds < 10800


def test_a_model_that_was_not_scored_says_so(run, monkeypatch):
    monkeypatch.setattr(run.model, "scored", {})
    card = model_card.model_card("best.ckpt", run.model, 1.0)
    assert "Not scored yet." in card and "CIDEr-D" not in card
