"""The data: every image once, all its captions, nothing lost and nothing filled up."""

import pytest
import torch
from PIL import Image

from captioner.annotation_files import CaptionedImage, CaptionFiles, COCOCaptions
from captioner.datamodule import CaptionData, CaptionedImages, batches
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN

SQUASH = Preprocessing("squash", 16)


class Files(CaptionFiles):
    """Seven images with one to four captions each, in memory but for the pixels."""

    splits = ("train", "val", "test")

    def __init__(self, folder):
        self.images = []
        for number in range(7):
            path = folder / f"{number}.png"
            Image.new("RGB", (16, 16), (number, 2 * number, 3)).save(path)
            captions = tuple(f"Dog {word}, runs!" for word in ("one", "two", "three", "four")[: number % 4 + 1])
            self.images.append(CaptionedImage(f"image {number}", path, captions))

    def records(self, split=None):
        return list(self.images)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def ready(files, stage="fit", **settings):
    data = CaptionData(files, batch_size=3, **{"minimum_count": 1, **settings})
    data.preprocessing = SQUASH
    data.setup(stage)
    return data


def test_each_image_comes_once_with_all_its_captions_the_last_ones_too(files):
    torch.manual_seed(1)
    data = ready(files)
    seen = {}
    sizes = []
    for batch in data.train_dataloader():
        sizes.append(len(batch.image_ids))
        assert batch.images.shape == (sizes[-1], 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.annotations is None and batch.tokens.shape[0] == sizes[-1]
        for image_id, pixels, captions in zip(batch.image_ids, batch.images, batch.tokens, strict=True):
            assert image_id not in seen and pixels[0, 0, 0] == int(image_id.split()[1])
            seen[image_id] = [data.vocabulary.decode(ids.tolist()) for ids in captions if ids[0] != PAD]
    assert sizes == [3, 3, 1]
    assert seen == {
        record.image_id: [caption.lower().replace(",", "").replace("!", "").split() for caption in record.captions]
        for record in files.images
    }
    assert list(seen) != [record.image_id for record in files.images]  # shuffled


def test_an_image_with_fewer_captions_is_padded(files):
    data = ready(files)
    dataset = data.train_dataloader().dataset
    tokens = dataset.__getitems__([0, 3]).tokens  # one caption, and four
    assert tokens.shape == (2, 4, 5)
    assert (tokens[0, 1:] == PAD).all() and (tokens[1, :, 0] == BEGIN).all() and (tokens[1, :, -1] == END).all()


def test_captions_per_image_draws_anew_each_time(files):
    torch.manual_seed(1)
    dataset = ready(files, captions_per_image=2).train_dataloader().dataset
    whole = {tuple(ids) for ids in dataset.captions[3]}
    drawn = [{tuple(ids.tolist()) for ids in dataset.__getitems__([3]).tokens[0]} for _ in range(40)]
    assert all(len(pair) == 2 and pair <= whole for pair in drawn)
    assert len({frozenset(pair) for pair in drawn}) == 6  # every pair of four
    assert dataset.__getitems__([0]).tokens.shape[1] == 1


@pytest.mark.parametrize("name", ["val", "test"])
def test_evaluation_sees_each_image_once_and_in_order(files, name):
    data = ready(files, "fit" if name == "val" else "test")
    found = list(getattr(data, f"{name}_dataloader")())
    assert [image_id for batch in found for image_id in batch.image_ids] == [r.image_id for r in files.images]
    assert all(batch.tokens is None for batch in found)
    assert data.references(name) == {record.image_id: record.captions for record in files.images}


def test_references_are_raw(files):
    assert ready(files, "test").references("test")["image 0"] == ("Dog one, runs!",)


@pytest.mark.parametrize("workers", [0, 2])
def test_keeping_in_memory_and_workers_change_nothing(files, workers):
    reading = CaptionedImages(files.images, SQUASH)
    kept = CaptionedImages(files.images, SQUASH, keep_in_memory=True)
    for file in files.images[:1]:
        assert torch.equal(kept[0].images[0], SQUASH.pixels(Image.open(file.path)))
    for one, other in zip(batches(reading, 3, workers), batches(kept, 3), strict=True):
        assert one.image_ids == other.image_ids and torch.equal(one.images, other.images)


def test_what_is_kept_in_memory_is_read_once(files):
    data = ready(files, keep_in_memory=True)
    before = torch.cat([batch.images for batch in data.val_dataloader()])
    for record in files.images:
        record.path.unlink()
    assert torch.equal(torch.cat([batch.images for batch in data.val_dataloader()]), before)


def test_the_vocabulary_is_that_of_the_training_captions(files):
    assert set(ready(files).vocabulary.words) == {"dog", "runs", "one", "two", "three", "four"}
    data = ready(files, minimum_count=4)
    assert set(data.vocabulary.words) == {"dog", "runs", "one"} | {
        word for word, count in {"two": 5, "three": 3, "four": 1}.items() if count >= 4
    }
    assert UNKNOWN in torch.cat([batch.tokens.flatten() for batch in data.train_dataloader()])
    assert ready(files, "test").vocabulary is None


def test_a_long_caption_is_cut_and_does_not_teach_to_end(files):
    tokens = ready(files, max_words=2).train_dataloader().dataset.__getitems__([0]).tokens
    assert tokens.shape == (1, 1, 3) and END not in tokens


def test_a_vocabulary_without_words_is_said(files):
    with pytest.raises(InputError, match="data.minimum_count lower"):
        ready(files, minimum_count=99)


def test_an_unknown_split_is_said(scenes):
    files = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("train", "val"))
    with pytest.raises(InputError, match="no split 'nope'; choose from train, val"):
        ready(files, train_split="nope")


def test_an_image_that_a_worker_cannot_read_is_named(files):
    files.images[4].path.write_text("no image")
    with pytest.raises(InputError, match="4.png is not an image"):
        list(batches(CaptionedImages(files.images, SQUASH), 3, workers=1))


def test_drawn_scenes_come_through(scenes):
    files = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("train", "val"))
    data = ready(files)
    found = [batch.tokens.shape[:2] for batch in data.train_dataloader()]
    assert sum(images for images, _ in found) == 22 and {captions for _, captions in found} == {5}
