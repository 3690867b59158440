"""The data: captioned images in batches that hold each image once, with all its captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.annotation_cache import AnnotationCache
from captioner.annotation_files import CaptionedImage, CaptionFiles
from captioner.attention import Annotations
from captioner.errors import InputError
from captioner.images import Preprocessing, random_box, read_image
from captioner.tokens import tokenize
from captioner.vocabulary import Vocabulary, pad


class Batch(NamedTuple):
    """B images, each once.

    Attributes
    ----------
    image_ids : list
        Of the B images.
    images : Tensor or None
        (B, 3, S, S) uint8; None where the annotations come from a cache.
    annotations : Annotations or None
        From a cache.
    tokens : Tensor or None
        (B, Q, T + 1) ids of their captions from ``<bos>`` on, padded; None where captions are to be found.
    """

    image_ids: list[str | int]
    images: Tensor | None
    annotations: Annotations | None
    tokens: Tensor | None


class CaptionedImages(Dataset[Batch]):
    """The images of a split, fetched a batch at a time.

    Parameters
    ----------
    records : sequence of CaptionedImage
        The images with their captions.
    preprocessing : Preprocessing
        What an image goes through.
    captions : list of list of list of int, optional
        The ids of each image's captions, in training.
    captions_per_image : int
        Q at most: from an image with more captions, as many are drawn at random each time.
    cache : AnnotationCache, optional
        Where the annotations are, in the order of the records.
    keep_in_memory : bool
        Read all images now and keep them, 3 * S * S bytes each.
    crop : float
        Take a random part of each image that holds this share of its area at least, anew each time; 1 takes what the
        preprocessing does.
    """

    def __init__(
        self,
        records: Sequence[CaptionedImage],
        preprocessing: Preprocessing,
        *,
        captions: list[list[list[int]]] | None = None,
        captions_per_image: int = 5,
        cache: AnnotationCache | None = None,
        keep_in_memory: bool = False,
        crop: float = 1.0,
    ) -> None:
        self.records, self.preprocessing, self.captions = records, preprocessing, captions
        self.captions_per_image, self.cache, self.crop = captions_per_image, cache, crop
        self.kept = self._read_all() if keep_in_memory and cache is None else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        """Return one image as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch, which torch's loader asks for as a whole."""
        images = annotations = None
        if self.cache is not None:
            annotations = self.cache.rows(indices)
        elif self.kept is not None:
            images = self.kept[indices]
        else:
            images = torch.stack([self._pixels(*place) for place in zip(indices, self._seeds(indices), strict=True)])
        tokens = None if self.captions is None else pad([self._draw(self.captions[index]) for index in indices])
        return Batch([self.records[index].image_id for index in indices], images, annotations, tokens)

    def _draw(self, captions: list[list[int]]) -> list[list[int]]:
        if len(captions) <= self.captions_per_image:
            return captions
        return [captions[place] for place in torch.randperm(len(captions))[: self.captions_per_image].tolist()]

    def _seeds(self, indices: list[int]) -> list[int | None]:
        """Draw what decides each image's part, from torch's generator, which the loader seeds in every worker."""
        return [None] * len(indices) if self.crop == 1 else torch.randint(2**62, (len(indices),)).tolist()

    def _pixels(self, index: int, seed: int | None = None) -> Tensor:
        image = read_image(self.records[index].path)
        box = None if seed is None else random_box(image.width, image.height, self.crop, seed)
        return self.preprocessing.pixels(image, box)

    def _read_all(self) -> Tensor:
        size = self.preprocessing.size
        kept = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # pillow decodes outside the interpreter's lock
            for index, pixels in enumerate(pool.map(self._pixels, range(len(self)))):
                kept[index] = pixels
        return kept


def batches(dataset: CaptionedImages, batch_size: int, workers: int = 0, *, shuffle: bool = False) -> DataLoader[Batch]:
    """Return a loader of whole batches; the last one holds what is left, so that no image is lost."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_as_is,  # type: ignore[arg-type]  # not a list of items: the images give whole batches
    )


def _as_is(batch: Batch) -> Batch:
    return batch


class CaptionData(LightningDataModule):
    """Captioned images for training, validation and test.

    It knows no encoder: the task tells it the preprocessing, and hands it a cache of annotations if there is one.

    Parameters
    ----------
    files : CaptionFiles
        Where images and captions are: Flickr8k or COCOCaptions.
    train_split, val_split, test_split : str
        Names of the splits, as `files` calls them.
    batch_size : int
        Images per batch in training; all their captions come along.
    captions_per_image : int
        Captions of an image per batch, at most.
    minimum_count : int
        A word that the training captions hold less often is left to ``<unk>``.
    max_words : int
        A longer training caption is cut.
    num_workers : int
        Processes that read images.
    cache : Path, optional
        Directory for the annotations of a frozen encoder, so that the CNN sees each image once and not once an epoch.
    keep_in_memory : bool
        Keep the images in memory after the first reading, for small ones.
    crop : float
        Smallest share of its area that a random part of a training image keeps, drawn anew each time, for an encoder
        that learns; 1 means none.

    Raises
    ------
    InputError
        Where a number is out of range, or images that are kept are to be cut anew each time.
    """

    def __init__(
        self,
        files: CaptionFiles,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        batch_size: int = 32,
        captions_per_image: int = 5,
        minimum_count: int = 5,
        max_words: int = 20,
        num_workers: int = 0,
        cache: Path | None = None,
        keep_in_memory: bool = False,
        crop: float = 1.0,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "captions_per_image": captions_per_image, "max_words": max_words}
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"data.{name} is {number}: give a whole number above 0.")
        if not 0 < crop <= 1:
            raise InputError(
                f"data.crop is {crop}: give the smallest share of an image to keep, above 0 and at most 1."
            )
        if crop < 1 and (cache is not None or keep_in_memory):
            raise InputError(
                f"data.crop {crop} takes another part of an image each time, which data.cache and data.keep_in_memory "
                "cannot give: set them to null and false, or data.crop to 1."
            )
        self.files = files
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.batch_size, self.captions_per_image, self.minimum_count = batch_size, captions_per_image, minimum_count
        self.max_words, self.num_workers, self.cache = max_words, num_workers, cache
        self.keep_in_memory, self.crop = keep_in_memory, crop
        self.preprocessing: Preprocessing | None = None
        self.vocabulary: Vocabulary | None = None
        self.records: dict[str, list[CaptionedImage]] = {}
        self.caches: dict[str, AnnotationCache] = {}
        self._datasets: dict[str, CaptionedImages] = {}

    def setup(self, stage: str) -> None:
        """Read the caption files; for training, build the vocabulary from the training captions."""
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if name not in self.records:
                self.records[name] = self.files.read(self.splits[name])
        if stage == "fit" and self.vocabulary is None:
            self._tokens = [[tokenize(caption) for caption in record.captions] for record in self.records["train"]]
            self.vocabulary = Vocabulary.from_captions(
                (tokens for image in self._tokens for tokens in image), self.minimum_count
            )
            if not self.vocabulary.words:
                raise InputError(
                    f"No word occurs {self.minimum_count} times in the captions of the split "
                    f"{self.splits['train']!r}: set data.minimum_count lower."
                )

    def references(self, name: str) -> dict[str | int, tuple[str, ...]]:
        """Return the raw captions of "train", "val" or "test" by image."""
        return {record.image_id: record.captions for record in self.records[name]}

    def images(self, name: str) -> Iterator[Tensor]:
        """Give all images of "train", "val" or "test" in order, as batches (B, 3, S, S) uint8."""
        for batch in batches(self._dataset(name, cached=False), self.batch_size, self.num_workers):
            assert batch.images is not None
            yield batch.images

    def train_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return batches(self._dataset("train"), self.batch_size, self._workers("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return batches(self._dataset("val"), self.batch_size, self._workers("val"))

    def test_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return batches(self._dataset("test"), self.batch_size, self._workers("test"))

    def _workers(self, name: str) -> int:
        return 0 if name in self.caches or self.keep_in_memory else self.num_workers  # slicing needs no help

    def _dataset(self, name: str, *, cached: bool = True) -> CaptionedImages:
        assert self.preprocessing is not None, "the task tells the preprocessing before it asks for images"
        if cached and name in self._datasets:
            return self._datasets[name]
        captions = None
        if cached and name == "train":
            assert self.vocabulary is not None
            captions = [[self.vocabulary.encode(tokens, self.max_words) for tokens in image] for image in self._tokens]
        dataset = CaptionedImages(
            self.records[name],
            self.preprocessing,
            captions=captions,
            captions_per_image=self.captions_per_image,
            cache=self.caches.get(name) if cached else None,
            keep_in_memory=self.keep_in_memory and cached,
            crop=self.crop if cached and name == "train" else 1.0,
        )
        if cached:
            self._datasets[name] = dataset
        return dataset
