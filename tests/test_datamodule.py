"""The data: every image once, all its captions, nothing lost and nothing filled up."""

import time

import pytest
import torch
from PIL import Image

from captioner import datamodule
from captioner.annotation_cache import AnnotationCache
from captioner.annotation_files import CaptionedImage, CaptionFiles, COCOCaptions
from captioner.attention import Annotations
from captioner.cache_folder import Index
from captioner.datamodule import CaptionData, CaptionedImages, batches, has_room, read_ahead
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.order import Draw
from captioner.tokens import mirror_text
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


@pytest.fixture
def gradients(files):
    """The same files, every pixel of its own value."""
    rows = torch.arange(60, dtype=torch.uint8)
    for number, record in enumerate(files.images):
        image = torch.stack([rows[:, None].expand(60, 60), rows.expand(60, 60), torch.full((60, 60), number)])
        Image.fromarray(image.byte().permute(1, 2, 0).numpy()).save(record.path)
    return files


def training(data, epoch):
    """The loader of the training images in an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # as Lightning does
    return loader


def parts(data, name="train", epoch=0):
    """Each image's pixels by name, over an epoch."""
    loader = training(data, epoch) if name == "train" else getattr(data, f"{name}_dataloader")()
    return {
        image_id: pixels for batch in loader for image_id, pixels in zip(batch.image_ids, batch.images, strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crop_is_another_part_each_time_and_the_same_in_a_run_repeated(gradients, workers):
    def run():
        torch.manual_seed(5)
        data = ready(gradients, crop=0.3, num_workers=workers)
        return parts(data), parts(data, epoch=1)

    (first, second), (again, _) = run(), run()
    assert all(torch.equal(pixels, again[image_id]) for image_id, pixels in first.items())
    assert not any(torch.equal(pixels, second[image_id]) for image_id, pixels in first.items())
    sides = {
        tuple((pixels[:2].amax((1, 2)).int() - pixels[:2].amin((1, 2)).int()).tolist()) for pixels in first.values()
    }
    assert len(sides) > 5  # every image another part, two of which may be of one size
    for number in range(7):
        pixels = first[f"image {number}"]
        assert pixels.shape == (3, 16, 16) and (pixels[2] == number).all()


def test_only_training_images_are_cropped_and_only_where_it_is_asked_for(gradients):
    data = ready(gradients, crop=0.3)
    wanted = {record.image_id: SQUASH.pixels(Image.open(record.path)) for record in gradients.images}
    for found in (parts(data, "val"), dict(zip(wanted, torch.cat(list(data.images("train"))), strict=True))):
        assert all(torch.equal(found[image_id], pixels) for image_id, pixels in wanted.items())
    whole = parts(ready(gradients))
    assert all(torch.equal(whole[image_id], pixels) for image_id, pixels in wanted.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crop": 0.0}, "data.crop is 0.0"),
        ({"crop": 1.5}, "data.crop is 1.5"),
        ({"crop": float("nan")}, "data.crop is nan"),
        ({"crop": 0.8, "cache": "somewhere"}, "data.crop to 1"),
        ({"crop": 0.8, "keep_in_memory": True}, "data.crop to 1"),
    ],
)
def test_a_crop_that_cannot_be_is_one_sentence(files, settings, said):
    with pytest.raises(InputError, match=said) as error:
        ready(files, **settings)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


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


# Mirrored images


class Sides(CaptionFiles):
    """Six images, red on the left and blue on the right, with captions that say so."""

    splits = ("train", "val", "test")

    def __init__(self, folder):
        image = Image.new("RGB", (16, 16), (0, 0, 200))
        image.paste((200, 0, 0), (0, 0, 8, 16))
        self.images = []
        for number in range(6):
            image.save(folder / f"{number}.png")
            captions = ("Red left, blue right.", "Red lies to the LEFT")
            self.images.append(CaptionedImage(number, folder / f"{number}.png", captions))

    def records(self, split=None):
        return list(self.images)


@pytest.fixture
def sides(tmp_path):
    return Sides(tmp_path)


UPRIGHT = ["red left blue right", "red lies to the left"]
MIRRORED = ["red right blue left", "red lies to the right"]


def shown(data, epoch=0):
    """Of each training image in the order of an epoch: whether it is mirrored, by its pixels and its captions."""
    for batch in training(data, epoch):
        for pixels, captions in zip(batch.images, batch.tokens, strict=True):
            mirrored = bool(pixels[0, 0, 0] == 0)
            assert torch.equal(pixels[0], pixels[2].flip(-1))
            words = [" ".join(data.vocabulary.decode(ids.tolist())) for ids in captions]
            assert words == (MIRRORED if mirrored else UPRIGHT)
            yield mirrored


@pytest.mark.parametrize("settings", [{}, {"keep_in_memory": True}, {"num_workers": 1}])
def test_half_of_the_training_images_are_mirrored_with_left_and_right_exchanged(settings, sides):
    torch.manual_seed(1)
    data = ready(sides, flip=True, **settings)
    rounds = [list(shown(data, epoch)) for epoch in range(2 if "num_workers" in settings else 40)]
    share = sum(map(sum, rounds)) / (6 * len(rounds))
    assert len({*map(tuple, rounds)}) > 1 and (0.4 < share < 0.6 or "num_workers" in settings)
    torch.manual_seed(1)
    again = ready(sides, flip=True, **settings)
    assert [list(shown(again, epoch)) for epoch in range(len(rounds))] == rounds


def test_without_flip_and_in_evaluation_nothing_is_mirrored(sides):
    assert not any(mirrored for epoch in range(5) for mirrored in shown(ready(sides), epoch))
    for stage, loader in (("fit", "val_dataloader"), ("test", "test_dataloader")):
        data = ready(sides, stage, flip=True)
        for _ in range(5):
            assert all((batch.images[:, 0, :, 0] == 200).all() for batch in getattr(data, loader)())


def test_mirrored_images_change_no_word_and_no_id(sides):
    """So that a run with them goes on from one without."""
    for count in (1, 7):  # "left" occurs 12 times, "right" 6
        assert ready(sides, minimum_count=count, flip=True).vocabulary == ready(sides, minimum_count=count).vocabulary


def test_cached_annotations_are_those_of_the_view_that_is_captioned(sides, tmp_path):
    values = torch.arange(1.0, 7.0)[:, None, None].expand(6, 4, 3)
    caches = [
        AnnotationCache.open(
            tmp_path, Index(letter * 64, 6, "", "", ""), lambda first, sign=sign: [Annotations(sign * values[first:])]
        )
        for letter, sign in (("a", 1), ("b", -1))
    ]
    torch.manual_seed(1)
    data = ready(sides, flip=True)
    data.caches["train"], data.mirrored_cache = caches
    seen = set()
    for epoch in range(20):
        for batch in training(data, epoch):
            assert batch.images is None
            for image_id, annotations, captions in zip(
                batch.image_ids, batch.annotations.values, batch.tokens, strict=True
            ):
                mirrored = " ".join(data.vocabulary.decode(captions[0].tolist())) == MIRRORED[0]
                assert (annotations == (-1 if mirrored else 1) * (image_id + 1)).all()
                seen.add((image_id, mirrored))
    assert len(seen) == 12


# Reading ahead


@pytest.mark.parametrize("workers", [0, 1])
def test_all_images_of_a_split_come_in_order(workers, files):
    data = ready(files, num_workers=workers)
    whole = torch.stack([SQUASH.pixels(Image.open(record.path)) for record in files.images])
    for first, sizes in ((0, [3, 3, 1]), (4, [3]), (7, [])):
        found = list(data.images("train", first))
        assert [len(images) for images in found] == sizes
        assert torch.equal(torch.cat([whole[:0], *found]), whole[first:])


def test_mirrored_images_are_mirrored(sides):
    upright, mirrored = (torch.cat(list(ready(sides).images("train", mirrored=m))) for m in (False, True))
    assert torch.equal(mirrored, upright.flip(-1)) and not torch.equal(mirrored, upright)


def test_two_batches_are_read_in_advance_and_no_more(files, monkeypatch):
    read = []
    monkeypatch.setattr(datamodule, "read_image", lambda path: read.append(path) or Image.open(path))
    images = read_ahead(CaptionedImages(files.images, SQUASH), 2)
    next(images)
    end = time.monotonic() + 10
    while len(read) < 6 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(read) == 6
    assert sum(map(len, images)) == 5 and len(read) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_in_advance_is_named(workers, files):
    files.images[4].path.write_text("no image")
    with pytest.raises(InputError, match="4.png is not an image"):
        list(ready(files, num_workers=workers).images("train"))


# Damaged images


def break_images(files, *numbers):
    for number in numbers:
        files.images[number].path.write_text("no image")


def trained_on(data):
    """The images of an epoch, as Lightning hands the batches on."""
    found = []
    for batch in data.train_dataloader():
        batch = data.on_before_batch_transfer(batch, 0)
        assert len(batch.image_ids) == len(batch.images) == len(batch.tokens)
        for image_id, pixels in zip(batch.image_ids, batch.images, strict=True):
            assert pixels[0, 0, 0] == int(image_id.split()[1])
            found.append(image_id)
    return found


OTHERS = [f"image {number}" for number in (0, 1, 2, 3, 5, 6)]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1}, {"keep_in_memory": True}, {"flip": True}])
def test_a_damaged_training_image_is_named_counted_and_left_out(settings, files, capsys):
    break_images(files, 4)
    data = ready(files, max_damaged=0.2, **settings)
    # As sets: where the damaged one makes up the last batch, another image comes twice.
    assert set(trained_on(data)) == set(trained_on(data)) == set(OTHERS) and list(data.damaged) == [4]
    said = capsys.readouterr().out
    assert said.count("Left out, 1 of 7 training images so far") == 1 and "4.png is not an image" in said


def test_a_batch_of_which_nothing_is_left_has_another_image(files):
    break_images(files, 1, 4)
    dataset = ready(files, max_damaged=0.5).train_dataloader().dataset
    for _ in range(3):
        batch = dataset.__getitems__([4, 1])
        assert len(batch.image_ids) == 1 and batch.image_ids[0] not in ("image 1", "image 4")
    other = dataset[Draw([4, 1], [5, 6])]
    knowing = ready(files, max_damaged=0.5).train_dataloader().dataset
    knowing.damaged = {4: "known"}  # as a worker may know that has had it before
    again = knowing[Draw([4, 1], [5, 6])]
    assert again.image_ids == other.image_ids and torch.equal(again.tokens, other.tokens)
    break_images(files, *range(7))
    with pytest.raises(InputError, match="None of the images can be read"):
        dataset.__getitems__(list(range(7)))


def test_more_damaged_images_than_are_allowed_stop_with_their_list(files):
    break_images(files, 2, 4)
    with pytest.raises(InputError, match=r"2 of 7 training images .* data.max_damaged 0.2 allows: .*2.png .*4.png"):
        trained_on(ready(files, max_damaged=0.2))
    assert len(set(trained_on(ready(files, max_damaged=0.3)))) == 5


@pytest.mark.parametrize("name", ["val", "test"])
def test_scores_are_never_over_fewer_images(name, files):
    break_images(files, 4)
    data = ready(files, "fit" if name == "val" else "test", max_damaged=1.0)
    with pytest.raises(InputError, match="4.png is not an image"):
        list(getattr(data, f"{name}_dataloader")())
    with pytest.raises(InputError, match="4.png is not an image"):
        list(data.images(name))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("numbers", [(4,), (3, 4, 5), (6,)])
def test_damaged_images_keep_their_place_where_a_cache_is_filled(workers, numbers, files):
    whole = torch.cat(list(ready(files).images("train")))
    break_images(files, *numbers)
    data = ready(files, num_workers=workers, max_damaged=0.5)
    whole[list(numbers)] = 0
    assert torch.equal(torch.cat(list(data.images("train"))), whole) and sorted(data.damaged) == list(numbers)
    data = ready(files, num_workers=workers, max_damaged=0.5)
    assert torch.equal(torch.cat(list(data.images("train", 2))), whole[2:]) and sorted(data.damaged) == list(numbers)


def test_rows_that_a_cache_lacks_are_left_out(files, tmp_path, capsys):
    values = torch.arange(7.0)[:, None, None].expand(7, 4, 3)
    wanted = Index("a" * 64, 7, "", "", "")
    cache = AnnotationCache.open(tmp_path, wanted, lambda first: [Annotations(values)], missing=lambda: [4])
    data = ready(files, max_damaged=0.2)
    data.caches = {"train": data.keep_cache("train", cache)}
    found = {
        image_id: row[0, 0].item()
        for batch in data.train_dataloader()
        for image_id, row in zip(batch.image_ids, batch.annotations.values, strict=True)
    }
    assert found == {image_id: float(image_id.split()[1]) for image_id in OTHERS}
    assert "4.png cannot be read" in capsys.readouterr().out
    with pytest.raises(InputError, match="4.png cannot be read, and all images"):
        data.keep_cache("val", cache)
    with pytest.raises(InputError, match="1 of 7 training images"):
        ready(files, max_damaged=0.1).keep_cache("train", cache)


def test_a_share_that_cannot_be_is_said(files):
    with pytest.raises(InputError, match="data.max_damaged is 2: "):
        ready(files, max_damaged=2)


# On a GPU


def test_a_gpu_has_room_if_it_is_twice_as_large(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert has_room(torch.device("cuda", 0), 500) and not has_room(torch.device("cuda", 0), 501)
    assert not has_room(torch.device("cpu"), 1)


def test_what_is_on_a_device_is_not_pinned(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = Index("a" * 64, 7, "", "", "")
    cache = AnnotationCache.open(tmp_path, wanted, lambda first: [Annotations(torch.ones(7, 4, 3))])
    elsewhere = AnnotationCache(cache.folder)
    elsewhere._kept = torch.empty(7, 4, 3, dtype=torch.float16, device="meta")
    for of, pinned in ((None, True), (cache, True), (elsewhere, False)):
        assert batches(CaptionedImages(files.images, SQUASH, cache=of), 3).pin_memory is pinned


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


@pytest.mark.slow
def test_drawn_scenes_come_through(scenes):
    files = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("train", "val"))
    data = ready(files)
    found = [batch.tokens.shape[:2] for batch in data.train_dataloader()]
    assert sum(images for images, _ in found) == 22 and {captions for _, captions in found} == {5}


# Characters and byte pairs


@pytest.mark.parametrize("units", ["characters", "byte_pairs"])
def test_captions_are_cut_as_asked_and_their_words_come_beside_them(units, files):
    torch.manual_seed(1)
    data = ready(files, units=units, captions_per_image=2)
    assert data.train_dataloader().dataset.__getitems__([0]).words is None  # unless they are taught
    data = ready(files, units=units, captions_per_image=2)
    data.teaches_words = True
    assert data.vocabulary.units == units and data.words == ready(files).vocabulary
    for batch in data.train_dataloader():
        for row, image_id in enumerate(batch.image_ids):
            published = files.images[int(image_id.split()[1])].captions
            for tokens, words in zip(batch.tokens[row].tolist(), batch.words[row].tolist(), strict=True):
                text = data.vocabulary.text(tokens)  # capitals and signs are kept, and of the same caption
                assert (text in published or text == "") and data.words.decode(words) == data.words.cut(text)
    assert ready(files).train_dataloader().dataset.__getitems__([0]).words is None


def test_a_caption_is_cut_after_as_many_units_as_asked(files):
    data = ready(files, units="characters", max_words=5)
    tokens = data.train_dataloader().dataset.__getitems__([0]).tokens[0, 0].tolist()
    assert data.vocabulary.decode(tokens) == list("Dog o") and END not in tokens
    assert data.longest == 5 and ready(files, units="characters").longest == 120


def test_characters_are_mirrored_in_the_text(sides):
    data = ready(sides, units="characters", flip=True)
    data.teaches_words = True
    dataset = data.train_dataloader().dataset
    texts = [data.vocabulary.text(captions[0]) for captions in dataset.captions]
    mirrored = [data.vocabulary.text(captions[0]) for captions in dataset.mirrored_captions]
    assert mirrored == [mirror_text(text) for text in texts] != texts
    words = [" ".join(data.words.decode(captions[0])) for captions in dataset.mirrored_words]
    assert words == [" ".join(data.words.cut(text)) for text in mirrored]


def test_what_cannot_be_with_other_languages_is_said(files):
    with pytest.raises(InputError, match="data.units is 'letters': give words, characters or byte_pairs"):
        ready(files, units="letters")
    for place, record in enumerate(files.images):
        files.images[place] = record._replace(captions=("개가 달린다",))
    assert ready(files).vocabulary.tokenizer == "unicode"
    assert ready(files, tokenizer="ptb").vocabulary.tokenizer == "ptb"
    with pytest.raises(InputError, match="data.flip exchanges the English words"):
        ready(files, flip=True)
