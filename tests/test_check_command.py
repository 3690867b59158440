"""The command `captioner check`: its table, its file, its exit codes."""

import json
import shutil

import pytest
from seeded_faults import SEEDS, draw, table

from captioner.annotation_files import AnyFormat
from captioner.cli import main

CHOSEN = ("a truncated image", "bytes that are no UTF-8", "a small image", "a doubled caption")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "data"
    table(root, draw(tmp_path_factory.mktemp("drawn")))
    return root


@pytest.fixture
def faulty(tmp_path):
    root = tmp_path / "faulty"
    table(root, draw(tmp_path / "drawn"))
    seeds = {seed.name: seed for seed in SEEDS}
    seeds["bytes that are no UTF-8"].put(root)
    seeds["a truncated image"].put(root)
    return root


def check(*flags):
    return main(["check", *map(str, flags), "--workers", "0", "--minimum-count", "2"])


def test_a_clean_dataset_exits_with_0(clean, capsys):
    assert check(clean, "--strict") == 0
    said = capsys.readouterr().out
    assert "captions.csv: CaptionTable" in said and "0 errors and 0 remarks on 24 captioned images" in said
    assert check(clean / "captions.csv") == check(clean, "--format", "CaptionTable") == 0


def test_errors_exit_with_1_and_are_all_in_the_file_for_machines(faulty, tmp_path, capsys):
    assert check(faulty, "--json", tmp_path / "found.json") == 1
    said = capsys.readouterr().out
    assert "captions.csv, line 4" in said and "train_000001.png" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["errors"], found["remarks"], found["format"]) == (2, 0, "CaptionTable")
    places = [(one["kind"], one["severity"], one["file"], one["line"]) for one in found["findings"]]
    assert places == [
        ("damaged image", "error", str(faulty / "images" / "train_000001.png"), None),
        ("encoding", "error", str(faulty / "captions.csv"), 4),
    ]
    assert found["splits"]["train"]["images"] == 14 and len(found["vocabulary"]) == 5


def test_remarks_exit_with_1_if_they_are_asked_to(clean, capsys):
    assert check(clean, "--references", 6) == 0
    assert "and 21 more" in capsys.readouterr().out
    assert check(clean, "--references", 6, "--strict") == 1


def test_words_and_split_are_those_that_training_is_given(clean, tmp_path, capsys):
    """A table whose column of splits is gone, and whose captions the two tokenizers cut otherwise."""
    root = tmp_path / "data"
    shutil.copytree(clean / "images", root / "images")
    lines = [line.rpartition(",")[0] for line in (clean / "captions.csv").read_text().splitlines()]
    (root / "captions.csv").write_text("\n".join(f"{line} don't" if k else line for k, line in enumerate(lines)))
    flags = ["--shares", 0.5, 0.25, 0.25, "--seed", 3]

    def examined(*flags):
        check(root, "--json", tmp_path / "found.json", *flags)
        return json.loads((tmp_path / "found.json").read_text())

    found, named, others = examined(*flags), examined("--format", "CaptionTable", *flags), examined("--seed", 4)
    files = AnyFormat(root, (0.5, 0.25, 0.25), 3)
    images = {split: len(files.read(split)) for split in ("train", "val", "test")}
    assert {name: split["images"] for name, split in found["splits"].items()} == images
    assert named["splits"] == found["splits"] != others["splits"]
    assert found["tokenizer"] == "ptb" and examined("--tokenizer", "unicode")["tokenizer"] == "unicode"
    assert "Annex 29" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "fits no format"),
        (["--format", "COCOCaptions", "--json", "none/found.json"], "cannot be written"),
        (["--workers", "-1"], "not a whole number"),
        (["--format", "Flickr9k"], "invalid choice"),
        (["--format", "Flickr8k", "--seed", "1"], "the format Flickr8k has splits of its own: leave out --seed"),
        (["--format", "ImageFolder", "--shares", "1", "1", "1"], "which together make 1"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exits_with_2(flags, said, tmp_path, capsys):
    assert main(["check", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
