"""Pictures of a few validation images for TensorBoard: what the model says and where it looks, epoch by epoch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from captioner.attention import Annotations
from captioner.errors import InputError, in_one_line
from captioner.fonts import FontWarning, find_fonts
from captioner.images import read_image
from captioner.model import Caption
from captioner.overlay import draw_overlay
from captioner.task import CaptioningTask

REFERENCES = 5  # that are shown, at most
LETTERS = 200  # of a reference, at most: some captions are paragraphs
QUALITY = 75  # of the JPEG: a seventh of the bytes of a PNG, and a fiftieth of the time


class ValidationPictures(Callback):
    """Shows a few validation images in TensorBoard: the caption of each epoch, references, and where each word looked.

    The images are the same in every epoch, spread evenly over those that are validated. Each has a tag of its own, so
    that TensorBoard's slider goes through the epochs. Without a TensorBoard logger nothing is done.

    Parameters
    ----------
    images : int
        How many; 0 means none.

    Raises
    ------
    InputError
        Where the number is negative.
    """

    def __init__(self, images: int = 4) -> None:
        super().__init__()
        if images < 0:
            raise InputError(f"pictures.images is {images}: give a whole number that is not negative.")
        self.images = images
        self._said = set[str]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the captions that were scored looked at."""
        # Only the first process writes. It has the captions of all, and its pictures ask nothing of the others.
        loggers = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if not (self.images and loggers):
            return
        assert isinstance(pl_module, CaptioningTask)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # which Lightning logs the scores with
        for tag, picture in self._draw(pl_module, trainer).items():
            for logger in loggers:
                logger.experiment.file_writer.add_summary(_summary(tag, picture), step)

    def _draw(self, task: CaptioningTask, trainer: Trainer) -> dict[str, Image.Image]:
        """Return pictures by their tags."""
        records, photographs = task.data.records["val"], dict[int, Image.Image]()
        validated = [index for index, record in enumerate(records) if record.image_id in task.captions]
        for index in spread(validated, self.images):
            try:
                photographs[index] = read_image(records[index].path)
            except InputError as error:  # the annotations may come from a cache, or are regions and no images
                if task.data.regions is None:
                    self._say(f"An image of the validation is not shown in TensorBoard: {error}")
        captions = _attend(task, trainer, photographs)
        texts = {
            index: [f"epoch {trainer.current_epoch + 1}", *map(_reference, records[index].captions[:REFERENCES])]
            for index in captions
        }
        _, hint = find_fonts("".join([caption.text for caption in captions.values()] + sum(texts.values(), [])))
        if hint is not None:
            self._say(hint)
        with warnings.catch_warnings(action="ignore", category=FontWarning):
            return {
                f"pictures/{records[index].image_id}": draw_overlay(
                    photographs[index], caption, task.captioner.preprocessing, beneath=texts[index]
                )
                for index, caption in captions.items()
            }

    def _say(self, sentence: str) -> None:
        """Print a warning, once in a run."""
        if sentence not in self._said:
            self._said.add(sentence)
            print(f"captioner: {in_one_line(sentence)}", file=sys.stderr, flush=True)


def spread(items: Sequence[int], count: int) -> list[int]:
    """Choose so many of a sequence, or all, as evenly as can be: the middle one of each of as many equal parts."""
    count = min(count, len(items))
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def _attend(task: CaptioningTask, trainer: Trainer, photographs: dict[int, Image.Image]) -> dict[int, Caption]:
    """Return the captions that were scored, with their attention from one teacher-forced pass."""
    captioner, records = task.captioner, task.data.records["val"]
    vocabulary = captioner.vocabulary
    said = {index: task.captions[records[index].image_id] for index in photographs}
    captions = {index: _silent(text) for index, text in said.items()}
    # An untrained model may say nothing.
    spoken = [
        index
        for index, text in said.items()
        if len(vocabulary.unknown(units := vocabulary.cut(text))) < len(set(units))
    ]
    if not spoken:
        return captions
    # To compile the decoder for these few words would take longer than all else.
    eager: Any = torch.compiler.set_stance("force_eager") if task.compiles else nullcontext()
    with trainer.precision_plugin.forward_context(), eager:
        annotations = _annotations(task, spoken, [photographs[index] for index in spoken])
        attended = captioner.attend_annotations(annotations, [said[index] for index in spoken])
    drawable = {
        index: caption
        for index, caption in zip(spoken, attended, strict=True)
        if caption.attention is not None and caption.grid is not None
    }
    return captions | drawable


def _annotations(task: CaptioningTask, indices: Sequence[int], photographs: Sequence[Image.Image]) -> Annotations:
    captioner, cache = task.captioner, task.data.caches.get("val")
    if cache is None:
        return captioner.annotate_pixels([torch.stack([captioner.preprocessing.pixels(each) for each in photographs])])
    annotations = cache.rows(indices)
    values = annotations.values.to(captioner.device, captioner.embedding.weight.dtype)
    return annotations._replace(values=values)


def _silent(text: str) -> Caption:
    """Return a caption of which no words are drawn, since none looked at anything."""
    return Caption(text, [], 0.0, 0.0, torch.zeros(0, 1), (1, 1), None)


def _reference(caption: str) -> str:
    return f"reference: {caption if len(caption) <= LETTERS else caption[:LETTERS] + '…'}"


def _summary(tag: str, picture: Image.Image) -> Summary:
    """Return a picture as TensorBoard keeps it. Its writer's own `add_image` makes a PNG."""
    encoded = BytesIO()
    picture.save(encoded, "JPEG", quality=QUALITY)
    width, height = picture.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
