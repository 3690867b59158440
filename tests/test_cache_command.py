"""`captioner cache`: it builds what `fit` finds, shows what there is, and deletes nothing but caches."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_annotation_cache import FOREIGN, WANTED, Compute, Counting

from captioner import annotation_cache
from captioner.annotation_cache import AnnotationCache
from captioner.cache_folder import CacheFolder
from captioner.cli import CACHE_HELP, main


def one_line(capsys):
    stderr = capsys.readouterr().err
    assert stderr.startswith("captioner: ") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


# Build


def test_fit_finds_what_was_built_and_building_trains_nothing(recipe, fit, tmp_path, capsys):
    flags = [*FOREIGN, "--data.cache", str(tmp_path / "cache"), "--data.flip", "true", "--trainer.max_epochs", "2"]
    build = ["cache", "build", "--config", str(recipe), *flags, "--trainer.default_root_dir", str(tmp_path / "runs")]
    Counting.seen = 0
    assert main([*build, "--trainer.fast_dev_run", "true"]) == 0
    assert Counting.seen == 1 + 22 + 9 + 22  # 1 on which the annotations' size is measured
    captured = capsys.readouterr()
    assert captured.err == "" and not (tmp_path / "runs").exists()
    lines = captured.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Annotating 22 train images once",
        "Annotating 9 val images once",
        "Annotating 22 mirrored train images once",
        *["Complete"] * 3,
    ]
    assert {line.split()[1].rstrip(",") for line in lines[3:]} == {str(path) for path in (tmp_path / "cache").iterdir()}
    Counting.seen = 0
    fit(*flags)
    assert main(build) == 0 and Counting.seen == 2
    assert "Annotating" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*FOREIGN], "--data.cache data/cache"),
        (["--data.cache", "{empty}"], "learns to false"),
        ([*FOREIGN, "--data.cache", "{empty}", "--data.fliip", "true"], "--data.fliip"),
        (["--config", "missing.yaml"], "no file missing.yaml"),
    ],
)
def test_a_build_that_cannot_be_is_one_line(flags, said, recipe, tmp_path, capsys):
    flags = [flag.format(empty=tmp_path) for flag in flags]
    assert main(["cache", "build", "--config", str(recipe), *flags]) == 2
    assert said in one_line(capsys) and not list(tmp_path.iterdir())


# List and clear


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A complete cache, an interrupted one, one of the first release, a damaged one, and what is no cache."""
    monkeypatch.setattr(annotation_cache, "RECORD_SECONDS", 0.0)
    AnnotationCache.open(tmp_path, WANTED, Compute())
    with pytest.raises(KeyboardInterrupt):
        wanted = type(WANTED)("b" * 64, 5, dataset="COCO [2017]", split="val", encoder="ResNet", view="mirrored")
        AnnotationCache.open(tmp_path, wanted, Compute(until=2))
    for letter, index in (("c", '{"fingerprint": "c", "images": 5, "grid": null}'), ("d", "{")):
        folder = tmp_path / (letter * 16)
        folder.mkdir()
        (folder / "index.json").write_text(index)
    (tmp_path / ("e" * 16)).mkdir()
    (tmp_path / ("e" * 16) / "index.json").write_text("{}")
    (tmp_path / ("e" * 16) / "thesis.txt").write_text("not ours")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "values.npy").write_text("not ours")
    (tmp_path / ("f" * 16)).write_text("not ours")
    (tmp_path / ("0" * 16)).symlink_to(tmp_path / ("a" * 16))
    return tmp_path


def names_in(directory):
    return {path.name for path in directory.iterdir()}


NOT_OURS = {"e" * 16, "photos", "f" * 16, "0" * 16}


def test_the_list_says_what_each_cache_is(directory, capsys):
    assert main(["cache", "list", str(directory)]) == 0
    captured = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.out.splitlines() if "│" in line]
    by_name = {row[0]: row[1:] for row in rows}
    assert captured.err == "" and list(by_name) == [letter * 16 for letter in "abcde"]
    *known, gigabytes, made, state = by_name["a" * 16]
    assert known == ["Flickr8k in photos", "train", "VGG16", "5", "4 x 3", "upright"]
    assert (gigabytes, state) == ("less than 0.01", "complete") and made.startswith("20") and len(made) == 16
    assert by_name["b" * 16][:2] == ["COCO [2017]", "val"]
    assert by_name["b" * 16][5] == "mirrored" and by_name["b" * 16][-1] == "interrupted at 2"
    assert by_name["c" * 16][-1] == "is of the format 1, not 2" and by_name["d" * 16][-1] == "has a damaged index"
    assert by_name["e" * 16][-1] == "is of the format 1, not 2, holds other files, too"
    with CacheFolder(directory / ("b" * 16)).locked(say_waiting=False):
        main(["cache", "list", str(directory)])
        assert "being filled at 2" in capsys.readouterr().out


def test_the_folder_is_that_of_the_recipes(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["list"], ["clear", "a" * 16]):
        assert main(["cache", *command]) == 2 and "no folder data/cache, which is assumed" in one_line(capsys)
    (tmp_path / "data" / "cache").mkdir(parents=True)
    assert main(["cache", "list"]) == 0 and capsys.readouterr().out == "There are no caches in data/cache.\n"
    (directory / ("a" * 16)).rename(tmp_path / "data" / "cache" / ("a" * 16))
    assert main(["cache", "list"]) == 0 and "a" * 16 in capsys.readouterr().out
    assert main(["cache", "clear", "a" * 16]) == 0 and not names_in(tmp_path / "data" / "cache")


def test_the_named_caches_are_deleted_and_no_other(directory, capsys):
    assert main(["cache", "clear", str(directory), "b" * 16, "d" * 16]) == 0
    assert names_in(directory) == {"a" * 16, "c" * 16, *NOT_OURS}
    first, second, end = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Deleted {directory / ('b' * 16)}, ") and "d" * 16 in second and end.startswith("Freed ")


def test_all_are_deleted_and_nothing_that_is_no_cache(directory, capsys):
    assert main(["cache", "clear", str(directory), "--all"]) == 0
    assert names_in(directory) == NOT_OURS
    assert f"Left {directory / ('e' * 16)}, which holds other files, too\n" in capsys.readouterr().out
    assert (directory / "photos" / "values.npy").read_text() == (directory / ("f" * 16)).read_text() == "not ours"
    assert names_in(directory / ("e" * 16)) == {"index.json", "thesis.txt"}


@pytest.fixture
def forbid(monkeypatch):
    """Let a method of paths fail for those that a test names, as it does for who may not read them."""

    def forbid(method, forbidden):
        allowed = getattr(Path, method)

        def called(path, *args, **kwargs):
            if forbidden(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return allowed(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, called)

    return forbid


@pytest.mark.parametrize("method", ["iterdir", "is_dir"])
def test_a_cache_that_may_not_be_read_is_listed_and_left(method, directory, forbid, capsys):
    forbid(method, lambda path: path.name == "b" * 16)
    assert main(["cache", "list", str(directory)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "b" * 16 in line]
    assert "cannot be read (Permission denied)" in row
    assert main(["cache", "clear", str(directory), "b" * 16]) == 2
    assert "cannot be read (Permission denied)" in one_line(capsys) and "a" * 16 in names_in(directory)
    assert main(["cache", "clear", str(directory), "--all"]) == 0 and names_in(directory) == {"b" * 16, *NOT_OURS}
    assert f"Left {directory / ('b' * 16)}, which cannot be read" in capsys.readouterr().out


def test_a_cache_whose_files_may_not_be_looked_at_is_listed(directory, forbid, capsys):
    forbid("stat", lambda path: path.parent.name == "b" * 16)
    assert main(["cache", "list", str(directory)]) == 0
    assert "cannot be read (Permission denied)" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["list"], ["clear", "--all"]])
def test_a_folder_of_caches_that_may_not_be_read_is_one_line(command, directory, forbid, capsys):
    forbid("iterdir", lambda path: path == directory)
    assert main(["cache", *command[:1], str(directory), *command[1:]]) == 2
    assert "cannot be read (Permission denied)" in one_line(capsys)


def test_lines_are_not_broken_where_there_is_no_terminal(tmp_path, capsys):
    encoder = "an encoder of many words " * 40
    AnnotationCache.open(tmp_path, replace(WANTED, encoder=encoder), Compute())
    capsys.readouterr()
    assert main(["cache", "list", str(tmp_path)]) == 0 and encoder.strip() in capsys.readouterr().out


@pytest.mark.parametrize("names", [["--all"], ["a" * 16, "b" * 16]])
def test_a_cache_that_is_being_filled_stays_and_so_do_the_others(names, directory, capsys):
    before = names_in(directory)
    with CacheFolder(directory / ("b" * 16)).locked(say_waiting=False):
        assert main(["cache", "clear", str(directory), *names]) == 2
    said = one_line(capsys)
    assert "b" * 16 in said and "being filled by a running process" in said and names_in(directory) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["clear", "{directory}"], "or --all"),
        (["clear", "{directory}", "a" * 16, "--all"], "or --all"),
        (["clear", "{directory}", "9" * 16], "no cache 9999999999999999"),
        (["clear", "{directory}", "e" * 16], "eeee holds other files, too: see to that"),
        (["clear", "{directory}", "../" + "a" * 16], "no cache ../"),
        (["clear", "{directory}/no", "--all"], "no folder"),
        (["clear", "{directory}", "--force"], "--force"),
        (["list", "{directory}", "more"], "more"),
        (["empty"], "choose from build, list, clear"),
    ],
)
def test_a_mistake_is_one_line_and_deletes_nothing(args, said, directory, capsys):
    before = names_in(directory)
    assert main(["cache", *(arg.format(directory=directory) for arg in args)]) == 2
    assert said in one_line(capsys) and names_in(directory) == before


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["list", "--help"], ["clear", "-h"], ["build", "--help"]])
def test_help_shows_examples(args, capsys):
    assert main(["cache", *args]) == 0 and capsys.readouterr().out == CACHE_HELP
    assert CACHE_HELP.startswith("usage: captioner cache") and CACHE_HELP.count("\n  captioner cache ") == 4
