"""Pictures of validation: what stands in TensorBoard's files after a run, and that the run is the same without them."""

import io
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_annotation_cache import FOREIGN, Counting
from test_task import rows
from test_training import one_line

from captioner import validation_pictures
from captioner.cli import main
from captioner.model import Captioner
from captioner.overlay import draw_overlay
from captioner.validation_pictures import ValidationPictures, spread

THREE = ("--pictures.images", "3")
EVERY_OTHER = (*THREE, "--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "2")


def events(cli):
    (logger,) = (logger for logger in cli.trainer.loggers if isinstance(logger, TensorBoardLogger))
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def pictures(cli):
    """The pictures of a run by their tags, each as those of its steps."""
    accumulator = events(cli)
    return {tag: {each.step: each for each in accumulator.Images(tag)} for tag in accumulator.Tags()["images"]}


def pixels(picture):
    image = Image.open(io.BytesIO(picture.encoded_image_string))
    assert image.size == (picture.width, picture.height) and image.mode == "RGB"
    return np.asarray(image, dtype=float)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: image, caption, preprocessing and text."""
    calls = []

    def draw(image, caption, preprocessing, *, beneath):
        calls.append((image, caption, preprocessing, beneath))
        return draw_overlay(image, caption, preprocessing, beneath=beneath)

    monkeypatch.setattr(validation_pictures, "draw_overlay", draw)
    return calls


# What is shown


def test_the_same_images_are_shown_at_the_steps_of_the_scores(fit):
    cli = fit(*EVERY_OTHER)
    found = pictures(cli)
    records = cli.datamodule.records["val"]
    assert list(found) == [f"pictures/{records[index].image_id}" for index in (1, 4, 7)]  # of 9
    steps = [score.step for score in events(cli).Scalars("val/CIDEr-D")]
    assert len(steps) == 2
    for shown in found.values():
        assert list(shown) == steps
        for picture in shown.values():
            assert pixels(picture).std() > 30  # white and black, and the image between
            assert len(picture.encoded_image_string) < 400_000
    first, last = (pixels(picture) for picture in found["pictures/" + str(records[1].image_id)].values())
    assert first.shape != last.shape or np.abs(first - last).mean() > 1


def test_the_captions_are_those_that_were_scored_and_look_where_the_checkpoint_does(fit, drawn):
    cli = fit(*THREE, "--model.dropout", "0.3", "--trainer.max_epochs", "8", "--trainer.check_val_every_n_epoch", "8")
    records = [cli.datamodule.records["val"][index] for index in (1, 4, 7)]
    model = Captioner.from_checkpoint(cli.trainer.checkpoint_callback.best_model_path)
    expected = model.caption([record.path for record in records], beam_size=1)
    assert len(drawn) == 3
    for (image, caption, preprocessing, _), wanted, record in zip(drawn, expected, records, strict=True):
        assert caption.text == wanted.text == cli.model.captions[record.image_id]
        assert caption.words == wanted.words and preprocessing == model.preprocessing
        torch.testing.assert_close(caption.attention, wanted.attention, rtol=1e-4, atol=1e-5)
        assert np.array_equal(image, Image.open(record.path).convert("RGB"))


def test_the_references_stand_below_with_the_epoch(fit, drawn):
    cli = fit(*EVERY_OTHER)
    assert [beneath[0] for *_, beneath in drawn] == ["epoch 2"] * 3 + ["epoch 4"] * 3
    references = cli.datamodule.records["val"][1].captions
    assert drawn[0][-1][1:] == [f"reference: {caption}" for caption in references[:5]]


def test_a_paragraph_is_cut():
    assert validation_pictures._reference("word " * 100) == "reference: " + "word " * 40 + "…"


def test_four_are_shown_unless_another_number_is_asked_for(recipe, capsys):
    assert ValidationPictures().images == 4
    assert main(["fit", "--config", str(recipe), "--pictures.images", "-1"]) == 2
    assert "pictures.images is -1" in one_line(capsys)


@pytest.mark.parametrize(
    ("items", "count", "chosen"),
    [(9, 3, [1, 4, 7]), (1000, 4, [125, 375, 625, 875]), (3, 5, [0, 1, 2]), (4, 1, [2]), (0, 4, []), (5, 0, [])],
)
def test_they_are_spread_over_the_split(items, count, chosen):
    assert spread(range(items), count) == chosen


def test_of_a_validation_of_some_batches_they_are_from_these(fit):
    cli = fit(*THREE, "--trainer.limit_val_batches", "1", "--data.batch_size", "4")
    records = cli.datamodule.records["val"]
    assert list(pictures(cli)) == [f"pictures/{records[index].image_id}" for index in (0, 2, 3)]


# Whatever the run


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_any_precision(precision, fit, drawn):
    cli = fit(*THREE, "--trainer.precision", precision)
    assert len(pictures(cli)) == len(drawn) == 3
    assert all(caption.attention.sum(1).allclose(torch.ones(1), atol=0.02) for _, caption, *_ in drawn)


def test_cached_annotations_are_taken_and_the_cnn_does_not_run_again(fit, drawn, tmp_path):
    flags = (*FOREIGN, *EVERY_OTHER, "--data.cache", str(tmp_path), "--data.flip", "true")
    Counting.seen = 0
    cli = fit(*flags)
    assert Counting.seen == 1 + 2 * 22 + 9  # a blank one to measure, both views of the training images, the others
    assert len(pictures(cli)) == 3
    model = Captioner.from_checkpoint(cli.trainer.checkpoint_callback.last_model_path, encoder=Counting())
    (image, caption, *_) = drawn[-1]
    wanted = model.caption(image, beam_size=1)[0]
    assert caption.words == wanted.words
    torch.testing.assert_close(caption.attention, wanted.attention, rtol=1e-2, atol=1e-3)  # kept in float16


def test_without_a_cache_the_cnn_runs_for_the_pictures_alone_a_second_time(fit):
    Counting.seen = 0
    fit(*FOREIGN, *THREE)
    assert Counting.seen == 1 + 22 + 9 + 3


@pytest.mark.parametrize("images", ["3", "9"])
def test_the_run_is_the_same_without_pictures(images, fit):
    flags = ("--model.dropout", "0.3", "--trainer.max_epochs", "3", "--seed_everything", "5")
    plain, shown = (fit(*flags, "--pictures.images", number) for number in ("0", images))
    assert not pictures(plain) and len(pictures(shown)) == int(images)
    for one, other in zip(rows(plain), rows(shown), strict=True):
        assert one == other
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, shown.model.state_dict()[name])


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_without_tensorboard_nothing_is_drawn(logger, fit, drawn, tmp_path):
    where = [] if logger == "false" else ["--trainer.logger.save_dir", str(tmp_path)]
    assert fit(*THREE, "--trainer.logger", logger, *where).trainer.global_step == 3
    assert not drawn


def test_validation_by_itself_draws_nothing(recipe, best, drawn):
    flags = ["--ckpt_path", str(best), *THREE, "--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger"]
    assert main(["validate", "--config", str(recipe), *flags, "--trainer.logger.save_dir", str(best.parent)]) == 0
    assert not drawn


def test_the_check_before_training_is_not_shown(fit):
    cli = fit(*THREE, "--trainer.num_sanity_val_steps", "1")
    assert all(len(shown) == 1 for shown in pictures(cli).values())


def test_a_decoder_without_attention_has_the_caption_and_references(fit, drawn):
    cli = fit(*THREE, "--model.decoder.attention", "NoAttention")
    with_panels = fit(*THREE)
    for shown in pictures(cli).values():
        (picture,) = shown.values()
        assert pixels(picture).std() > 30
        assert picture.height < min(next(iter(each.values())).height for each in pictures(with_panels).values())
    assert [caption.text for _, caption, *_ in drawn[:3]] == [
        cli.model.captions[cli.datamodule.records["val"][index].image_id] for index in (1, 4, 7)
    ]


def test_a_model_that_says_nothing_yet_is_shown(fit, drawn):
    cli = fit(*THREE, "--model.max_words", "0")
    assert {caption.text for _, caption, *_ in drawn} == {""} and len(pictures(cli)) == 3


def test_an_image_that_has_gone_is_said_once_and_training_goes_on(fit, scenes, tmp_path, monkeypatch, capsys):
    shutil.copytree(scenes, tmp_path / "scenes")
    gone, read_image = [], validation_pictures.read_image

    def read(path):
        if not gone:
            gone.append(path)
            path.unlink()
        return read_image(path)

    monkeypatch.setattr(validation_pictures, "read_image", read)
    flags = ("--data.files.root", str(tmp_path / "scenes"), "--data.cache", str(tmp_path / "cache"))
    cli = fit(*FOREIGN, *EVERY_OTHER, *flags)
    assert gone[0].name in one_line(capsys)
    records = cli.datamodule.records["val"]
    found = pictures(cli)
    assert list(found) == [f"pictures/{records[index].image_id}" for index in (4, 7)]
    assert all(len(shown) == 2 for shown in found.values())


def test_letters_that_no_font_has_are_said_once(fit, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(validation_pictures, "find_fonts", lambda text: asked.append(text) or ([], "Install some."))
    cli = fit(*EVERY_OTHER)
    assert one_line(capsys) == "captioner: Install some.\n" and len(asked) == 2
    assert cli.datamodule.records["val"][1].captions[0] in asked[0]
