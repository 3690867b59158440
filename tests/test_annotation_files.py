import json
from pathlib import Path

import pytest

from captioner.annotation_files import COCOCaptions, Flickr8k, ImageFolder
from captioner.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "flickr8k"


@pytest.fixture
def flickr8k(tmp_path):
    """Three images in two splits, and no list of the test split."""
    (tmp_path / "Images").mkdir()
    for name in ("a.jpg", "b.jpg", "c#1.jpg"):
        (tmp_path / "Images" / name).touch()
    (tmp_path / "Flickr8k.token.txt").write_text(
        "a.jpg#0\tA dog .\na.jpg#1\tOne\u2028dog\nb.jpg#0\tA\tcat\nc#1.jpg#0\tA bird\n\n", encoding="utf-8"
    )
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("b.jpg\na.jpg\nb.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("c#1.jpg")
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    """Two images with captions and one without, under the names that COCO uses."""
    images = [{"id": 9, "file_name": "9.jpg"}, {"id": 3, "file_name": "3.jpg"}, {"id": 4, "file_name": "4.jpg"}]
    captions = [(3, "A dog."), (9, "A cat\r\n on a mat\u2028"), (3, "Ein Hündchen")]
    annotations = [{"id": key, "image_id": one, "caption": text} for key, (one, text) in enumerate(captions)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("3.jpg", "9.jpg"):
        (tmp_path / "val2017" / name).touch()
    write(tmp_path, {"images": images, "annotations": annotations})
    return tmp_path


def write(root, dataset):
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset, ensure_ascii=False), encoding="utf-8")


def test_flickr8k(flickr8k):
    images = flickr8k / "Images"
    assert Flickr8k(flickr8k).read("train") == [
        ("b.jpg", images / "b.jpg", ("A\tcat",)),
        ("a.jpg", images / "a.jpg", ("A dog .", "One\u2028dog")),
    ]
    assert [image.image_id for image in Flickr8k(flickr8k).read("dev")] == ["c#1.jpg"]


def test_flickr8k_as_published_or_with_the_line_ends_of_windows(flickr8k):
    expected = [image.captions for image in Flickr8k(flickr8k).read("train")]
    (flickr8k / "Images").rename(flickr8k / "Flicker8k_Dataset")
    for path in flickr8k.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    images = Flickr8k(flickr8k).read("train")
    assert images[0].path == flickr8k / "Flicker8k_Dataset" / "b.jpg"
    assert [image.captions for image in images] == expected


def test_flickr8k_unknown_split(flickr8k):
    with pytest.raises(InputError, match="no split 'foo'; choose from train, dev, test"):
        Flickr8k(flickr8k).read("foo")


def test_flickr8k_without_its_test_list(flickr8k):
    with pytest.raises(InputError, match=r"Flickr_8k\.testImages\.txt does not exist"):
        Flickr8k(flickr8k).read("test")


def test_flickr8k_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"folder .*nowhere does not exist"):
        Flickr8k(tmp_path / "nowhere").read("train")


@pytest.mark.parametrize("line", ["a.jpg#2 no tab", "a.jpg\tno number"])
def test_flickr8k_bad_line(flickr8k, line):
    with (flickr8k / "Flickr8k.token.txt").open("a") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"Flickr8k\.token\.txt, line 6 is not"):
        Flickr8k(flickr8k).read("train")


def test_flickr8k_not_utf8(flickr8k):
    (flickr8k / "Flickr8k.token.txt").write_bytes(b"a.jpg#0\tcoffee\na.jpg#1\tcaf\xe9")
    with pytest.raises(InputError, match=r"Flickr8k\.token\.txt, line 2 is not UTF-8 text \(byte 12 of it is 0xe9\)"):
        Flickr8k(flickr8k).read("train")


def test_flickr8k_list_names_an_image_without_captions(flickr8k):
    (flickr8k / "Flickr_8k.trainImages.txt").write_text("a.jpg\nd.jpg\ne.jpg\n")
    with pytest.raises(InputError, match=r"2 images that have no caption in Flickr8k\.token\.txt, the first is d\.jpg"):
        Flickr8k(flickr8k).read("train")


def test_flickr8k_empty_list(flickr8k):
    (flickr8k / "Flickr_8k.trainImages.txt").write_text("\n")
    with pytest.raises(InputError, match="names no image"):
        Flickr8k(flickr8k).read("train")


def test_flickr8k_missing_images(flickr8k):
    (flickr8k / "Images" / "b.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are missing, the first is .*b\.jpg"):
        Flickr8k(flickr8k).read("train")
    for image in (flickr8k / "Images").iterdir():
        image.unlink()
    (flickr8k / "Images").rmdir()
    with pytest.raises(InputError, match=r"2 of 2 images are missing, the first is .*b\.jpg"):
        Flickr8k(flickr8k).read("train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs Flickr8k in ../shared")
@pytest.mark.parametrize(("split", "size"), [("train", 6000), ("dev", 1000)])
def test_flickr8k_itself(split, size):
    images = Flickr8k(SHARED).read(split)
    assert len({image.image_id for image in images}) == len(images) == size
    assert all(len(image.captions) == 5 for image in images)


def test_coco(coco, capsys):
    images = coco / "val2017"
    assert COCOCaptions(coco).read("val") == [
        (9, images / "9.jpg", ("A cat\r\n on a mat\u2028",)),
        (3, images / "3.jpg", ("A dog.", "Ein Hündchen")),
    ]
    assert capsys.readouterr().out == ""


def test_coco_other_names(coco):
    (coco / "annotations" / "captions_val2017.json").rename(coco / "mine.json")
    (coco / "val2017").rename(coco / "pictures")
    mine = COCOCaptions(coco, captions="{split}.json", images="pictures", splits=("mine",))
    assert [image.path.parent for image in mine.read("mine")] == [coco / "pictures"] * 2


def test_coco_unknown_split(coco):
    with pytest.raises(InputError, match="no split 'test'; choose from train, val"):
        COCOCaptions(coco).read("test")


def test_coco_missing_file(coco):
    with pytest.raises(InputError, match=r"captions_train2017\.json does not exist"):
        COCOCaptions(coco).read("train")


def test_coco_missing_image(coco):
    (coco / "val2017" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are missing, the first is .*3\.jpg"):
        COCOCaptions(coco).read("val")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ('{"images": [', "is not valid JSON at line 1, column 13"),
        ({"images": []}, "lacks the key 'annotations'"),
        (
            {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]},
            "lacks the key 'file_name'",
        ),
        (
            {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1}]},
            "lacks the key 'caption'",
        ),
        (
            {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 5, "image_id": 1, "caption": None}]},
            "annotation 5 has a caption that is not",
        ),
        ({"images": [], "annotations": []}, "no image with a caption"),
        ({"images": 1, "annotations": []}, "is JSON but not COCO's"),
        ([], "is JSON but not COCO's"),
    ],
)
def test_coco_damaged_file(coco, dataset, message):
    write(coco, dataset)
    with pytest.raises(InputError, match=message) as raised:
        COCOCaptions(coco).read("val")
    assert "captions_val2017.json" in str(raised.value)


# Captions beside the images


@pytest.fixture
def image_folder(tmp_path):
    """Three images, one of them in a folder of its own."""
    folder = tmp_path / "train"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.WEBP", "sub/c.png"):
        (folder / name).touch()
    return folder


def test_image_folder_of_metadata(image_folder):
    lines = [{"file_name": "sub/c.png", "text": ["A\u2028cat", "Kätzchen"]}, {"file_name": "a.jpg", "text": "A dog"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (image_folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    records = ImageFolder(image_folder.parent).read("train")
    assert [record.image_id for record in records] == ["sub/c.png", "a.jpg"]
    assert [record.captions for record in records] == [("A\u2028cat", "Kätzchen"), ("A dog",)]
    assert records[0].path == image_folder / "sub" / "c.png" and ImageFolder(image_folder).records() == records


def test_image_folder_of_text_files(image_folder):
    (image_folder / "b.txt").write_text("a dog\n")
    (image_folder / "sub" / "c.txt").write_bytes("a cat\r\n\nKätzchen".encode())
    (image_folder / "notes.txt").write_text("no image's")
    records = ImageFolder(image_folder.parent, captions=".txt").read("train")
    assert [record.image_id for record in records] == ["b.WEBP", "sub/c.png"]
    assert [record.captions for record in records] == [("a dog",), ("a cat", "Kätzchen")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.jpg"}', r"line 1 has no caption \(captions, caption, text, .*\) among 'file_name'"),
        ('{"text": "a"}', r"line 1 has no image \(file_name, image, .*\) among 'text'"),
        ('\n{"file_name": "a.jpg", "text": 5}', "line 2 has a 'file_name' or a 'text' that is no text"),
        ('{"file_name": 5, "text": "a"}', "line 1 has a 'file_name' or a 'text' that is no text"),
        ('{"file_name": "a.jpg", "text": ["a", null]}', "line 1 has a 'file_name' or a 'text' that is no text"),
        ('{"file_name": "a.jpg", "text": " "}', "line 1 has an empty caption"),
        ('{"file_name": "a.jpg", "text": "\\ud83d"}', "line 1 has half a character"),
        ('{"file_name": "../a.jpg", "text": "a"}', r"line 1 names the image \.\./a\.jpg, which is outside"),
        ("[1]", "line 1 is not a JSON object"),
        ("{", "line 1 is not a JSON object"),
        ('{"file_name": "d.jpg", "text": "a"}', "1 of 1 images are missing"),
        ("", "has no image with a caption"),
    ],
)
def test_image_folder_of_damaged_metadata(image_folder, text, message):
    (image_folder / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        ImageFolder(image_folder.parent).read("train")
    assert "train" in str(raised.value)


def test_image_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="train does not exist"):
        ImageFolder(tmp_path, splits=("train", "val")).read("train")
    with pytest.raises(InputError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere").read("train")
    with pytest.raises(InputError, match="has no split 'seen'"):
        ImageFolder(tmp_path, splits=("train", "val")).read("seen")
