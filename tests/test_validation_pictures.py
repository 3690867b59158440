"""Pictures of validation: what stands in TensorBoard's files after a run, and that the run is the same without them."""

import io
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_annotation_cache import FOREIGN, Counting
from test_model import captioner, small_cnn, some_images
from test_task import rows
from test_training import one_line

from captioner import validation_pictures
from captioner.cli import main
from captioner.decoders import LSTMDecoder
from captioner.model import Captioner
from captioner.overlay import draw_overlay
from captioner.validation_pictures import ValidationPictures, spread
from captioner.vocabulary import Characters

ONE, THREE = (("--pictures.images", number) for number in ("1", "3"))
TWICE = ("--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "2")


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


def note_what_is_drawn(setattr):
    """Return a list that image, caption, preprocessing and text of each picture are added to."""
    calls = []

    def draw(image, caption, preprocessing, *, beneath):
        calls.append((image, caption, preprocessing, beneath))
        return draw_overlay(image, caption, preprocessing, beneath=beneath)

    setattr(validation_pictures, "draw_overlay", draw)
    return calls


@pytest.fixture
def drawn(monkeypatch):
    return note_what_is_drawn(monkeypatch.setattr)


@pytest.fixture(scope="module")
def shown(fit):
    """A run with dropout that shows three of nine images twice, and what was drawn."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = note_what_is_drawn(monkeypatch.setattr)
        return fit(*THREE, *TWICE, "--model.dropout", "0.3"), calls


def records_of(cli, *places):
    return [cli.datamodule.records["val"][place] for place in places]


def tags(cli, *places):
    return [f"pictures/{record.image_id}" for record in records_of(cli, *places)]


# What is shown


def test_the_same_images_are_shown_at_the_steps_of_the_scores(shown):
    cli, _ = shown
    found = pictures(cli)
    assert list(found) == tags(cli, 1, 4, 7)
    steps = [score.step for score in events(cli).Scalars("val/CIDEr-D")]
    assert len(steps) == 2 and all(list(each) == steps for each in found.values())
    for each in found.values():
        first, last = (pixels(picture) for picture in each.values())
        assert first.std() > 30 and last.std() > 30  # white and black, and the image between
        assert first.shape != last.shape or np.abs(first - last).mean() > 1
        assert all(len(picture.encoded_image_string) < 400_000 for picture in each.values())


def test_the_captions_are_those_that_were_scored_and_look_where_the_checkpoint_does(shown):
    cli, drawn = shown
    records = records_of(cli, 1, 4, 7)
    model = Captioner.from_checkpoint(cli.trainer.checkpoint_callback.last_model_path)
    expected = model.caption([record.path for record in records], beam_size=1)
    assert len(drawn) == 6
    for (image, caption, preprocessing, _), wanted, record in zip(drawn[3:], expected, records, strict=True):
        assert caption.text == wanted.text == cli.model.captions[record.image_id]
        assert caption.words == wanted.words != [] and preprocessing == model.preprocessing
        torch.testing.assert_close(caption.attention, wanted.attention, rtol=1e-4, atol=1e-5)
        assert np.array_equal(image, Image.open(record.path).convert("RGB"))


def test_the_references_stand_below_with_the_epoch(shown):
    cli, drawn = shown
    assert [beneath[0] for *_, beneath in drawn] == ["epoch 2"] * 3 + ["epoch 4"] * 3
    (record,) = records_of(cli, 1)
    assert drawn[0][-1][1:] == [f"reference: {caption}" for caption in record.captions[:5]]


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


@pytest.mark.slow
def test_of_a_validation_of_some_images_they_are_from_these_and_the_check_before_training_is_not_shown(fit):
    # One of three batches. As "1" it would be a number of batches or the share 1.0, whichever typing saw first.
    some = ("--trainer.limit_val_batches", "0.34", "--data.batch_size", "4")
    cli = fit(*THREE, *some, "--trainer.num_sanity_val_steps", "1")
    assert [(tag, len(each)) for tag, each in pictures(cli).items()] == [(tag, 1) for tag in tags(cli, 0, 2, 3)]


# Whatever the run


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "cached"), [("bf16-mixed", False), ("bf16-true", True)])
def test_any_precision(precision, cached, fit, drawn, tmp_path):
    fit(*ONE, "--trainer.precision", precision, *([*FOREIGN, "--data.cache", str(tmp_path)] if cached else []))
    ((_, caption, *_),) = drawn
    assert caption.attention.sum(1).allclose(torch.ones(1), atol=0.02)


def test_cached_annotations_are_taken_and_the_cnn_does_not_run_again(fit, drawn, tmp_path):
    Counting.seen = 0
    cli = fit(*FOREIGN, *ONE, "--data.cache", str(tmp_path), "--data.flip", "true")
    assert Counting.seen == 1 + 2 * 22 + 9  # a blank one to measure, both views of the training images, the others
    model = Captioner.from_checkpoint(cli.trainer.checkpoint_callback.last_model_path, encoder=Counting())
    ((image, caption, *_),) = drawn
    (wanted,) = model.caption([image], beam_size=1)
    assert caption.words == wanted.words
    torch.testing.assert_close(caption.attention, wanted.attention, rtol=1e-2, atol=1e-3)  # kept in float16


def test_without_a_cache_the_cnn_runs_for_the_pictures_alone_a_second_time(fit):
    Counting.seen = 0
    fit(*FOREIGN, *THREE)
    assert Counting.seen == 1 + 22 + 9 + 3


def test_the_run_is_the_same_without_pictures(shown, fit):
    cli, _ = shown
    plain = fit(*TWICE, "--model.dropout", "0.3")
    assert not pictures(plain)
    assert rows(plain) == rows(cli)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, cli.model.state_dict()[name])


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_without_tensorboard_nothing_is_drawn(logger, fit, drawn, tmp_path):
    where = [] if logger == "false" else ["--trainer.logger.save_dir", str(tmp_path)]
    assert fit(*THREE, "--trainer.logger", logger, *where).trainer.global_step == 3
    assert not drawn


def test_validation_by_itself_draws_nothing(shown, recipe, drawn, tmp_path):
    flags = ["--ckpt_path", shown[0].trainer.checkpoint_callback.last_model_path, *THREE]
    flags += ["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir"]
    assert main(["validate", "--config", str(recipe), *flags, str(tmp_path)]) == 0
    assert not drawn


def test_a_decoder_without_attention_has_the_caption_and_references(shown, fit, drawn):
    cli = fit(*THREE, "--model.decoder.attention", "NoAttention")
    with_panels = min(picture.height for each in pictures(shown[0]).values() for picture in each.values())
    for each in pictures(cli).values():
        (picture,) = each.values()
        assert pixels(picture).std() > 30 and picture.height < with_panels
    said = [cli.model.captions[record.image_id] for record in records_of(cli, 1, 4, 7)]
    assert [caption.text for _, caption, *_ in drawn] == said and all(said)


def test_a_model_that_says_nothing_yet_is_shown(fit, drawn):
    cli = fit(*ONE, "--model.max_words", "0")
    assert [caption.text for _, caption, *_ in drawn] == [""] and len(pictures(cli)) == 1


@pytest.mark.slow
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
    cli = fit(*FOREIGN, *THREE, *TWICE, *flags)
    assert gone[0].name in one_line(capsys)
    assert [(tag, len(each)) for tag, each in pictures(cli).items()] == [(tag, 2) for tag in tags(cli, 4, 7)]


@pytest.mark.slow
def test_letters_that_no_font_has_are_said_once(fit, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(validation_pictures, "find_fonts", lambda text: asked.append(text) or ([], "Install some."))
    cli = fit(*ONE, *TWICE)
    assert one_line(capsys) == "captioner: Install some.\n" and len(asked) == 2
    assert records_of(cli, 4)[0].captions[0] in asked[0]


@pytest.mark.slow
def test_of_a_compiled_decoder_nothing_more_is_compiled_for_pictures(fit, drawn, monkeypatch):
    graphs, compile = [], LSTMDecoder.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(LSTMDecoder, "compile", lambda decoder: compile(decoder, backend=backend))
    counts = []
    for images in ("0", "1"):
        torch._dynamo.reset()
        graphs.clear()
        fit("--model.compile", "true", "--pictures.images", images)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] == counts[1] > 0 and len(drawn) == 1


def test_captions_of_characters_are_shown_by_word():
    model = captioner(encoder=small_cnn(), vocabulary=Characters.train(["a red ball"]))
    records = [SimpleNamespace(image_id=k) for k in range(2)]
    data = SimpleNamespace(records={"val": records}, caches={})
    task = SimpleNamespace(captioner=model, data=data, captions={0: "a red ball", 1: ""}, compiles=False)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    found = validation_pictures._attend(task, trainer, dict(enumerate(some_images(2))))
    assert found[0].words == ["a", "red", "ball"] and len(found[0].attention) == 3 and found[1].words == []
