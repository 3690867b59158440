"""The data: captioned images in batches that hold each image once, with all its captions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.annotation_cache import AnnotationCache
from captioner.annotation_files import CaptionedImage, CaptionFiles
from captioner.attention import Annotations
from captioner.cache_folder import say
from captioner.errors import InputError, in_one_line
from captioner.images import Preprocessing, random_box, read_image
from captioner.order import Draw, Order, mix
from captioner.region_files import check_dim, count_regions, find_regions, pad_regions, read_regions
from captioner.scenes import Scene, read_scenes
from captioner.tokens import Tokenizer, TokenizerChoice, choose_tokenizer, mirror, mirror_text, tokenize
from captioner.vocabulary import BYTES, BytePairs, Characters, Units, Vocabulary, WordBeginnings, pad

Read = TypeVar("Read")
UNTOLD = "the task tells the preprocessing before it asks for images"


class Batch(NamedTuple):
    """B images, each once.

    Attributes
    ----------
    image_ids : list
        Of the B images.
    images : Tensor or None
        (B, 3, S, S) uint8; None where there are annotations.
    annotations : Annotations or None
        From a cache, or from files of regions.
    tokens : Tensor or None
        (B, Q, T + 1) ids of their captions from ``<bos>`` on, padded; None where captions are to be found.
    words : Tensor or None
        (B, Q, T' + 1) what is taught of the images (`CaptionData.words`), where it is not the `tokens`.
    damaged : dict
        The images that were found damaged and left out: why, by their place among all.
    """

    image_ids: list[str | int]
    images: Tensor | None
    annotations: Annotations | None
    tokens: Tensor | None
    words: Tensor | None = None
    damaged: dict[int, str] = {}  # never changed


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
    words : list of list of list of int, optional
        The ids of what is taught of each image, where it is not the captions themselves.
    captions_per_image : int
        Q at most: from an image with more captions, as many are drawn at random each time.
    cache : AnnotationCache, optional
        Where the annotations are, in the order of the records.
    keep_in_memory : bool
        Read all images now and keep them, 3 * S * S bytes each.
    mirrored_captions, mirrored_words : list of list of list of int, optional
        The ids of the captions, and of their words, of each image's mirrored view. Where they are given, an image is
        mirrored with probability one half each time.
    mirrored_cache : AnnotationCache, optional
        Where the annotations of the mirrored images are, beside `cache`.
    crop : float
        Take a random part of each image that holds this share of its area at least, anew each time; 1 takes what the
        preprocessing does.
    region_dim : int, optional
        D, where the records' files hold regions and not images.
    leave_out_damaged : bool
        Leave an image that cannot be read out of its batch, which is otherwise an error. A batch of which nothing is
        left has another image.

    Attributes
    ----------
    damaged : dict
        The images that are known to be damaged: why, by their place among the records.
    """

    def __init__(
        self,
        records: Sequence[CaptionedImage],
        preprocessing: Preprocessing,
        *,
        captions: list[list[list[int]]] | None = None,
        words: list[list[list[int]]] | None = None,
        captions_per_image: int = 5,
        cache: AnnotationCache | None = None,
        keep_in_memory: bool = False,
        mirrored_captions: list[list[list[int]]] | None = None,
        mirrored_words: list[list[list[int]]] | None = None,
        mirrored_cache: AnnotationCache | None = None,
        crop: float = 1.0,
        region_dim: int | None = None,
        leave_out_damaged: bool = False,
    ) -> None:
        self.records, self.preprocessing, self.captions = records, preprocessing, captions
        self.captions_per_image, self.cache, self.crop = captions_per_image, cache, crop
        self.mirrored_captions, self.mirrored_cache = mirrored_captions, mirrored_cache
        self.region_dim, self.leave_out_damaged = region_dim, leave_out_damaged
        self.damaged = {row: "" for each in (cache, mirrored_cache) if each is not None for row in each.missing}
        self.words, self.mirrored_words = words, mirrored_words
        self.kept = self._read_all() if keep_in_memory and cache is None else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def __getitem__(self, index: int | Draw) -> Batch:
        """Return one image as a batch of one, or a batch of which it is said what is drawn for each of its images."""
        return self._batch(index) if isinstance(index, Draw) else self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch, which torch's loader asks for as a whole; what is drawn for it follows from torch's state."""
        return self._batch(Draw(indices, torch.randint(2**62, (len(indices),)).tolist()))

    def _batch(self, draw: Draw) -> Batch:
        images = annotations = None
        known = len(self.damaged)  # which only grows, by what is found here
        if self.cache is None and self.kept is None:
            if self.region_dim is None:
                draw, pixels = self._read(draw, self.pixels)
                images = torch.stack(pixels)
            else:
                draw, regions = self._read(draw, self.regions)
                annotations = pad_regions(regions)
        elif known:
            draw = self._left(draw)
        indices = draw.indices
        mirrored = None if self.mirrored_captions is None else torch.tensor([seed % 2 == 1 for seed in draw.seeds])
        if self.cache is not None:
            annotations = self._rows(self.cache, indices, mirrored)
        elif self.kept is not None:
            images = self.kept[indices]
        if images is not None and mirrored is not None:
            images[mirrored] = images[mirrored].flip(-1)
        tokens, words = self._tokens(draw, mirrored)
        damaged = dict(list(self.damaged.items())[known:])
        return Batch([self.records[index].image_id for index in indices], images, annotations, tokens, words, damaged)

    def _left(self, draw: Draw) -> Draw:
        """Return those of some images that are not known to be damaged, or else another one.

        That is the first in an order of its own that can be read: the same one, whatever is known by now.
        """
        left = [(index, seed) for index, seed in zip(*draw, strict=True) if index not in self.damaged]
        if not left:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(draw.seeds[0]))
            others = [index for index in order.tolist() if index not in self.damaged]
            if not others:
                raise InputError("None of the images can be read: `captioner check` says why.")
            left = [(others[0], draw.seeds[0])]
        return Draw(*map(list, zip(*left, strict=True)))

    def _read(self, draw: Draw, read: Callable[[int, int], Read]) -> tuple[Draw, list[Read]]:
        """Return which of some images can be read, and what was read of them."""
        while True:
            found = [
                (index, seed, one)
                for index, seed in zip(*self._left(draw), strict=True)
                if (one := self.if_readable(index, partial(read, index, seed))) is not None
            ]
            if found:
                indices, seeds, images = map(list, zip(*found, strict=True))
                return Draw(indices, seeds), images

    def if_readable(self, index: int, read: Callable[[], Read]) -> Read | None:
        """Return what is read of an image, or note why there is nothing, if such images are left out."""
        try:
            return read()
        except InputError as error:
            if not self.leave_out_damaged:
                raise
            self.damaged[index] = str(error)
            return None

    def _rows(self, cache: AnnotationCache, indices: list[int], mirrored: Tensor | None) -> Annotations:
        if mirrored is None:
            return cache.rows(indices)
        assert self.mirrored_cache is not None
        rows = torch.tensor(indices)
        upright, other = cache.rows(rows[~mirrored].tolist()), self.mirrored_cache.rows(rows[mirrored].tolist())
        # Each view is read for its own images only, one view after the other: back to the order of the batch.
        places = mirrored.int().argsort(stable=True).argsort()
        values = torch.cat([upright.values, other.values])
        return upright._replace(values=values[places.to(values.device)])

    def _tokens(self, draw: Draw, mirrored: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.captions is None:
            return None, None
        is_mirrored = [False] * len(draw.indices) if mirrored is None else mirrored.tolist()
        shown = [self._some(len(self.captions[index]), seed) for index, seed in zip(*draw, strict=True)]

        def padded(upright: list[list[list[int]]], other: list[list[list[int]]] | None) -> Tensor:
            sides = [other if other is not None and is_other else upright for is_other in is_mirrored]
            return pad(
                [
                    [side[index][place] for place in places]
                    for side, index, places in zip(sides, draw.indices, shown, strict=True)
                ]
            )

        words = None if self.words is None else padded(self.words, self.mirrored_words)
        return padded(self.captions, self.mirrored_captions), words

    def _some(self, captions: int, seed: int) -> list[int]:
        """Return the places of the captions to show."""
        if captions <= self.captions_per_image:
            return list(range(captions))
        order = torch.randperm(captions, generator=torch.Generator().manual_seed(mix("captions", seed)))
        return order[: self.captions_per_image].tolist()

    def pixels(self, index: int, seed: int | None = None) -> Tensor:
        """Return an image, (3, S, S) uint8, or the part of it that a seed decides, if a part is asked for."""
        image = read_image(self.records[index].path)
        if seed is None or self.crop == 1:
            return self.preprocessing.pixels(image)
        box = random_box(image.width, image.height, self.crop, mix("crop", seed))
        return self.preprocessing.pixels(image, box)

    def regions(self, index: int, seed: int = 0) -> NDArray[np.float32]:
        """Return an image's regions, (N, D); of them nothing is drawn."""
        assert self.region_dim is not None
        return read_regions(self.records[index].path, self.region_dim)

    def pixels_if_readable(self, index: int) -> Tensor | None:
        """Return an image as `pixels` does, or note why there is none, if such are left out."""
        return self.if_readable(index, partial(self.pixels, index))

    def _read_all(self) -> Tensor:
        size = self.preprocessing.size
        kept = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # pillow decodes outside the interpreter's lock
            for index, pixels in enumerate(pool.map(self.pixels_if_readable, range(len(self)))):
                if pixels is not None:
                    kept[index] = pixels
        return kept


def read_ahead(dataset: CaptionedImages, batch_size: int) -> Iterator[Tensor]:
    """Give the pixels of all images in batches (B, 3, S, S) uint8, of which threads read two in advance.

    Those of images that are left out, see `CaptionedImages.damaged`, are zeros.
    """
    pool = ThreadPoolExecutor()  # pillow decodes outside the interpreter's lock
    ahead: deque[list[Future[Tensor | None]]] = deque()
    size = dataset.preprocessing.size

    def stacked(batch: list[Future[Tensor | None]]) -> Tensor:
        read = [pixels.result() for pixels in batch]
        return torch.stack([torch.zeros(3, size, size, dtype=torch.uint8) if one is None else one for one in read])

    try:
        for first in range(0, len(dataset), batch_size):
            last = min(first + batch_size, len(dataset))
            ahead.append([pool.submit(dataset.pixels_if_readable, index) for index in range(first, last)])
            if len(ahead) > 2:
                yield stacked(ahead.popleft())
        while ahead:
            yield stacked(ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def read_by_workers(dataset: CaptionedImages, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Give the pixels of all images as `read_ahead` does, read by processes."""
    first, size = 0, dataset.preprocessing.size
    for batch in batches(dataset, batch_size, workers):
        assert batch.images is not None
        images = batch.images
        if batch.damaged:
            dataset.damaged |= batch.damaged
            rows = range(first, min(first + batch_size, len(dataset)))
            images = torch.zeros(len(rows), 3, size, size, dtype=torch.uint8)
            if there := [place for place, row in enumerate(rows) if row not in batch.damaged]:
                images[there] = batch.images
        yield images
        first += len(images)


def batches(
    dataset: CaptionedImages, batch_size: int, workers: int = 0, *, order: Order | None = None
) -> DataLoader[Batch]:
    """Return a loader of whole batches; the last one holds what is left, so that no image is lost.

    They come in the order of the images, or in one that is given, which then makes up the batches.
    """
    return DataLoader(
        dataset,
        batch_size if order is None else None,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        # What is on the device already cannot be pinned, and need not be.
        pin_memory=torch.cuda.is_available() and (dataset.cache is None or dataset.cache.device.type == "cpu"),
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
        Where images and captions are: AnyFormat, or the class of one format such as Flickr8k.
    train_split, val_split, test_split : str
        Names of the splits, as `files` calls them.
    batch_size : int
        Images per batch in training; all their captions come along.
    captions_per_image : int
        Captions of an image per batch, at most.
    minimum_count : int
        A word, or a character, that the training captions hold less often is left to ``<unk>``; a pair of bytes is not
        joined.
    units : str
        What the model says one after the other: "words", in lower case and without punctuation, or "characters" or
        "byte_pairs", which keep captions as they are written.
    byte_pairs : int
        How many of them there are at most.
    tokenizer : str
        What cuts captions into words, of the vocabulary and to score them: "ptb" is COCO's for English, "unicode" for
        other languages, and "auto" chooses by the captions' script; see :func:`captioner.tokens.choose_tokenizer`.
    max_words : int, optional
        A training caption of more words is cut, of more characters or byte pairs where these are said; by default
        after 20 words, 120 characters or 40 byte pairs.
    num_workers : int
        Processes that read images.
    regions : Path, optional
        Folder with the regions of each image, computed beforehand, in a .npy or .npz file (N, D) that is called as the
        image; for the encoder PrecomputedRegions. The images themselves need not be there.
    cache : Path, optional
        Directory for the annotations of a frozen encoder, so that the CNN sees each image once and not once an epoch.
    keep_in_memory : bool
        Keep the images in memory after the first reading, for small ones.
    flip : bool
        Show each training image mirrored with probability one half, with "left" and "right" exchanged in its captions,
        which is for English ones; writing in an image is mirrored, too.
    crop : float
        Smallest share of its area that a random part of a training image keeps, drawn anew each time, with proportions
        from 3:4 to 4:3 of which the preprocessing makes a square; for an encoder that learns. 1 means none.

    max_damaged : float
        Share of the training images that may be damaged, or of their files of regions: each such image is named and
        left out, and more stop the run.
        One in another split stops it in any case, since scores over fewer images do not compare.

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
        units: Units = "words",
        byte_pairs: int = 1000,
        tokenizer: TokenizerChoice = "auto",
        max_words: int | None = None,
        num_workers: int = 0,
        cache: Path | None = None,
        keep_in_memory: bool = False,
        flip: bool = False,
        crop: float = 1.0,
        regions: Path | None = None,
        max_damaged: float = 0.01,
    ) -> None:
        super().__init__()
        numbers = {"batch_size": batch_size, "captions_per_image": captions_per_image, "max_words": max_words}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise InputError(f"data.{name} is {number}: give a whole number above 0.")
        if not 0 < crop <= 1:
            raise InputError(
                f"data.crop is {crop}: give the smallest share of an image to keep, above 0 and at most 1."
            )
        if not 0 <= max_damaged <= 1:
            raise InputError(
                f"data.max_damaged is {max_damaged}: give the share of the training images that may be left out, from "
                "0 to 1."
            )
        if crop < 1 and (cache is not None or keep_in_memory):
            raise InputError(
                f"data.crop {crop} takes another part of an image each time, which data.cache and data.keep_in_memory "
                "cannot give: set them to null and false, or data.crop to 1."
            )
        if regions is not None and (flip or crop < 1 or keep_in_memory):
            raise InputError(
                "data.regions are read as they are, in place of images: set data.flip and data.keep_in_memory to false "
                "and data.crop to 1."
            )
        if units not in ("words", "characters", "byte_pairs"):
            raise InputError(f"data.units is {units!r}: give words, characters or byte_pairs.")
        if byte_pairs < len(BYTES):
            raise InputError(f"data.byte_pairs is {byte_pairs}: give {len(BYTES)} or more, since each byte is one.")
        self.files, self.regions = files, regions
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.batch_size, self.captions_per_image, self.minimum_count = batch_size, captions_per_image, minimum_count
        self.max_words, self.num_workers, self.cache = max_words, num_workers, cache
        self.keep_in_memory, self.flip, self.crop = keep_in_memory, flip, crop
        self.max_damaged = max_damaged
        self.damaged: dict[int, str] = {}  # of the training images those left out, by their place, and why
        self.preprocessing: Preprocessing | None = None
        self.region_dim: int | None = None  # told by the task, as the preprocessing is
        self.units, self.byte_pairs, self.tokenizer = units, byte_pairs, tokenizer
        self.vocabulary: Vocabulary | None = None
        self.words: Vocabulary | None = None  # what is taught of an image, whatever the model says
        self.teaches_words = False  # told by the task: batches of characters or byte pairs then have the words, too
        self.records: dict[str, list[CaptionedImage]] = {}
        self.caches: dict[str, AnnotationCache] = {}
        self.mirrored_cache: AnnotationCache | None = None  # of the training images
        self.seed: int | None = None  # of the order of training and of what is drawn for its images
        self._begin = (0, 0)
        self._datasets: dict[str, CaptionedImages] = {}

    def setup(self, stage: str) -> None:
        """Read the caption files; for training, build the vocabulary from the training captions."""
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if name not in self.records:
                split = self.splits[name]
                self.records[name] = (
                    self.files.read(split)
                    if self.regions is None
                    else find_regions(Path(self.regions), self.files.captioned(split))
                )
        if stage == "fit":
            # That of seed_everything, or the one that torch has drawn where nobody gave it one.
            self.seed, self._begin = torch.initial_seed(), (0, 0)
            if self.trainer is not None:
                self.seed = self.trainer.strategy.broadcast(self.seed)
        if stage == "fit" and self.vocabulary is None:
            captions = [caption for record in self.records["train"] for caption in record.captions]
            tokenizer = choose_tokenizer(captions, self.tokenizer)
            if self.flip and tokenizer != "ptb":
                raise InputError(
                    "data.flip exchanges the English words left and right in mirrored images' captions, and these are "
                    "in another language, by their script or by data.tokenizer: set it to false."
                )
            # Of the captions as they are, mirrored or not: a run with mirrored images can go on from one without.
            words = [tokenize(caption, tokenizer) for caption in captions]
            self.vocabulary = self.words = Vocabulary.from_captions(words, self.minimum_count, tokenizer)
            if tokenizer == "unicode":
                self.words = WordBeginnings(words, self.minimum_count)
            if self.units == "characters":
                self.vocabulary = Characters.train(captions, self.minimum_count)
            elif self.units == "byte_pairs":
                self.vocabulary = BytePairs.train(captions, self.byte_pairs, self.minimum_count)
            if not self.vocabulary.words:
                raise InputError(
                    f"No {self.units.removesuffix('s')} occurs {self.minimum_count} times in the captions of the split "
                    f"{self.splits['train']!r}: set data.minimum_count lower."
                )

    @property
    def longest(self) -> int:
        """Units of the longest training caption that is not cut, once the vocabulary is known."""
        assert self.vocabulary is not None
        return self.vocabulary.longest if self.max_words is None else self.max_words

    def frequencies(self) -> Tensor:
        """Return how often the training captions hold each id, and once more: (V,)."""
        assert self.vocabulary is not None
        counts = Counter(chain.from_iterable(ids[1:] for image in self._encode(self.vocabulary) for ids in image))
        return torch.tensor([1.0 + counts[index] for index in range(len(self.vocabulary))])

    def references(self, name: str) -> dict[str | int, tuple[str, ...]]:
        """Return the raw captions of "train", "val" or "test" by image."""
        return {record.image_id: record.captions for record in self.records[name]}

    def scored_by(self, name: str) -> Tokenizer:
        """Return what cuts the captions of "train", "val" or "test" into the words that are scored."""
        captions = chain.from_iterable(record.captions for record in self.records[name])
        return choose_tokenizer(captions, self.tokenizer)

    def scenes(self, name: str) -> dict[str | int, Scene]:
        """Return by image the drawn scenes of "train", "val" or "test", whose boxes are known; none of other data."""
        root = getattr(self.files, "root", None)  # the user's own kind of files need not have one
        # Beside their captions, where `write_scenes` puts them.
        if root is None or not Path(root, f"scenes_{self.splits[name]}.json").is_file():
            return {}
        return {image_id: scene for image_id, scene in read_scenes(Path(root), self.splits[name]).items()}

    def images(self, name: str, first: int = 0, *, mirrored: bool = False) -> Iterator[Tensor]:
        """Give the images of "train", "val" or "test" in order, as batches (B, 3, S, S) uint8.

        Those of the next batches are read while the caller works, by `num_workers` processes, or by threads where there
        are none.

        Parameters
        ----------
        name : str
            "train", "val" or "test".
        first : int
            Number of images left out at the beginning.
        mirrored : bool
            Give each image mirrored.

        Raises
        ------
        InputError
            Where an image cannot be read, or of the training images more than `max_damaged`; those fewer are zeros.
        """
        assert self.preprocessing is not None, UNTOLD
        dataset = CaptionedImages(
            self.records[name][first:], self.preprocessing, leave_out_damaged=self._leaves_out(name)
        )
        read = read_ahead(dataset, self.batch_size)
        if self.num_workers:
            read = read_by_workers(dataset, self.batch_size, self.num_workers)
        for images in read:
            if dataset.damaged:
                self.leave_out({first + row: fault for row, fault in dict(dataset.damaged).items()})
            yield images.flip(-1) if mirrored else images

    def _leaves_out(self, name: str) -> bool:
        return name == "train" and self.max_damaged > 0

    def leave_out(self, damaged: Mapping[int, str]) -> None:
        """Name training images that are left out, and stop where they are too many.

        Parameters
        ----------
        damaged : mapping from int to str
            Why, by their place; empty for a row that a cache lacks.

        Raises
        ------
        InputError
            Where they and those before are more than `max_damaged` of the training images.
        """
        records = self.records["train"]
        for row, fault in damaged.items():
            if row not in self.damaged:
                self.damaged[row] = fault or f"{in_one_line(records[row].path)} cannot be read."
                say(f"Left out, {len(self.damaged):,} of {len(records):,} training images so far: {self.damaged[row]}")
        if len(self.damaged) > self.max_damaged * len(records):
            named = "; ".join(self.damaged[row].rstrip(".") for row in sorted(self.damaged))
            raise InputError(
                f"{len(self.damaged):,} of {len(records):,} training images cannot be read, a larger share than "
                f"data.max_damaged {self.max_damaged:g} allows: {named}."
            )

    def keep_cache(self, name: str, cache: AnnotationCache) -> AnnotationCache:
        """Return a cache of "train" or "val", whose missing rows are named; in "val" there may be none.

        Raises
        ------
        InputError
            Where there are too many.
        """
        if cache.missing and not self._leaves_out(name):
            path = in_one_line(self.records[name][cache.missing[0]].path)
            raise InputError(f"{path} cannot be read, and all images of this split are needed: replace the file.")
        if cache.missing:
            self.leave_out(dict.fromkeys(cache.missing, ""))
        return cache

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Name the images that were left out of a batch."""
        if batch.damaged:
            self.leave_out(batch.damaged)
        return batch

    def region_batches(self, name: str, first: int = 0) -> Iterator[Annotations]:
        """Give the regions of the images of "train", "val" or "test" in order, all filled up to the same number.

        A damaged training image that is left out has one region of zeros.

        Parameters
        ----------
        name, first
            As for :meth:`images`.

        Raises
        ------
        InputError
            Where a file cannot be read, or of the training images more than `max_damaged`.
        """
        assert self.preprocessing is not None and self.region_dim is not None, UNTOLD
        records, dim = self.records[name], self.region_dim
        check_dim([record.path for record in records], dim)
        dataset = CaptionedImages(records, self.preprocessing, region_dim=dim, leave_out_damaged=self._leaves_out(name))
        rows = range(len(records))
        most = max(dataset.if_readable(row, partial(count_regions, records[row].path, dim)) or 1 for row in rows)
        for start in range(first, len(records), self.batch_size):
            batch = [
                dataset.if_readable(row, partial(dataset.regions, row)) for row in rows[start : start + self.batch_size]
            ]
            if dataset.damaged:
                self.leave_out(dataset.damaged)
            nothing = np.zeros((1, dim), np.float32)
            yield pad_regions([nothing if regions is None else regions for regions in batch], most)

    def go_on(self, seed: int, epoch: int, position: int) -> None:
        """Begin training with an epoch's batch of this position, in the order and with the draws of a run's seed."""
        self.seed, self._begin = seed, (epoch, position)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader whose batches follow from seed, epoch and position alone."""
        assert self.seed is not None
        dataset, workers = self._dataset("train"), self._workers("train")
        trainer = self.trainer
        if trainer is not None and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return batches(dataset, self.batch_size, workers)  # the same ones again and again, as Lightning wants them
        processes, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        epoch, position = self._begin
        if trainer is not None and trainer.current_epoch > epoch:  # by trainer.reload_dataloaders_every_n_epochs
            epoch, position = trainer.current_epoch, 0
        order = Order(
            len(dataset),
            self.batch_size,
            self.seed,
            processes=processes,
            rank=rank,
            epoch=epoch,
            position=position,
        )
        return batches(dataset, self.batch_size, workers, order=order)

    def val_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return batches(self._dataset("val"), self.batch_size, self._workers("val"))

    def test_dataloader(self) -> DataLoader[Batch]:  # noqa: D102
        return batches(self._dataset("test"), self.batch_size, self._workers("test"))

    def _workers(self, name: str) -> int:
        return 0 if name in self.caches or self.keep_in_memory else self.num_workers  # slicing needs no help

    def _dataset(self, name: str) -> CaptionedImages:
        assert self.preprocessing is not None, UNTOLD
        if name in self._datasets:
            return self._datasets[name]
        captions = mirrored_captions = words = mirrored_words = None
        cache, mirrored_cache = self.caches.get(name), None
        if name == "train":
            assert self.vocabulary is not None and self.words is not None
            apart = self.teaches_words and self.vocabulary is not self.words
            captions, words = self._encode(self.vocabulary), self._encode(self.words) if apart else None
            if self.flip:
                mirrored_captions = self._encode(self.vocabulary, mirrored=True)
                mirrored_words = self._encode(self.words, mirrored=True) if apart else None
                mirrored_cache = self.mirrored_cache
            cache, mirrored_cache = self._near(cache, mirrored_cache)
        region_dim = None if self.regions is None else self.region_dim
        if region_dim is not None and cache is None:
            check_dim([record.path for record in self.records[name]], region_dim)
        self._datasets[name] = CaptionedImages(
            self.records[name],
            self.preprocessing,
            captions=captions,
            words=words,
            captions_per_image=self.captions_per_image,
            cache=cache,
            keep_in_memory=self.keep_in_memory,
            mirrored_captions=mirrored_captions,
            mirrored_words=mirrored_words,
            mirrored_cache=mirrored_cache,
            crop=self.crop if name == "train" else 1.0,
            region_dim=region_dim,
            leave_out_damaged=self._leaves_out(name),
        )
        if found := self._datasets[name].damaged:
            self.leave_out(found)
        return self._datasets[name]

    def _encode(self, vocabulary: Vocabulary, *, mirrored: bool = False) -> list[list[list[int]]]:
        """Return the ids of the training captions, by image."""
        limit = self.longest if vocabulary is self.vocabulary else vocabulary.longest

        def encoded(caption: str) -> list[int]:
            if vocabulary.units == "words":
                words = vocabulary.cut(caption)
                return vocabulary.encode(mirror(words) if mirrored else words, limit)
            return vocabulary.encode(vocabulary.cut(mirror_text(caption) if mirrored else caption), limit)

        return [[encoded(caption) for caption in record.captions] for record in self.records["train"]]

    def _near(self, *caches: AnnotationCache | None) -> list[AnnotationCache | None]:
        """Return the caches, in the memory of the trainer's device if it has room for them."""
        size = sum(cache.nbytes for cache in caches if cache is not None)
        if self.trainer is None or not size or not has_room(device := self.trainer.strategy.root_device, size):
            return list(caches)
        return [None if cache is None else cache.to(device) for cache in caches]


def has_room(device: torch.device, size: int) -> bool:
    """Tell whether a device is a GPU whose free memory is at least twice as large as the caches; the rest trains."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= 2 * size
