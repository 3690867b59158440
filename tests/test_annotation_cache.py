"""The cache: the CNN sees each image once, and a cache that does not fit is never used."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from captioner import annotation_cache, cache_folder, datamodule, task
from captioner.annotation_cache import AnnotationCache, fingerprint
from captioner.attention import Annotations
from captioner.cache_folder import CacheFault, CacheFolder, Index, in_gigabytes
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import describe

VALUES = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))


WANTED = Index("a" * 64, 5, dataset="Flickr8k in photos", split="train", encoder="VGG16")


class Compute:
    """Gives the annotations in batches of two and keeps the image it is asked to begin with."""

    def __init__(self, values=VALUES, grid=(2, 2), mask=None, until=5):
        self.values, self.grid, self.mask, self.until, self.firsts = values, grid, mask, until, []

    def __call__(self, first):
        self.firsts.append(first)
        for start in range(first, 5, 2):
            if start >= self.until:
                raise KeyboardInterrupt
            yield Annotations(self.values[start : start + 2], self.mask, self.grid)


@pytest.fixture(autouse=True)
def record_each_batch(monkeypatch):
    monkeypatch.setattr(annotation_cache, "RECORD_SECONDS", 0.0)


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message


def files_in(tmp_path):
    return {file.name for file in (tmp_path / ("a" * 16)).iterdir()} - {"lock"}


def holds_the_values(cache, values=VALUES):
    torch.testing.assert_close(cache.rows(range(5)).values, values, atol=1e-3, rtol=1e-3)


def test_rows_are_what_was_computed_and_computed_once(tmp_path):
    compute = Compute()
    first = AnnotationCache.open(tmp_path, WANTED, compute)
    again = AnnotationCache.open(tmp_path, WANTED, compute)
    assert compute.firsts == [0] and len(first) == len(again) == 5 and again.nbytes == 5 * 4 * 3 * 2
    rows = again.rows([4, 0, 4])
    assert rows.values.dtype == torch.float32 and rows.grid == (2, 2) and rows.mask is None
    torch.testing.assert_close(rows.values, VALUES[[4, 0, 4]], atol=1e-3, rtol=1e-3)
    rows.values.zero_()  # the caller's own copy
    assert again.rows([4]).values.any() and files_in(tmp_path) == {"values.npy", "index.json"}


def test_rows_of_damaged_images_are_marked_where_a_run_goes_on_too(tmp_path):
    known = []  # of images that are read ahead

    def compute(first):
        for start in range(first, 5, 2):
            known.extend({0: [1, 2]}.get(start, []))
            if start == 2 and first == 0:
                raise KeyboardInterrupt
            yield Annotations(VALUES[start : start + 2], None, (2, 2))

    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, WANTED, compute, missing=lambda: known)
    folder = CacheFolder(tmp_path / ("a" * 16))
    assert folder.read().missing == (1,) and folder.read().done == 2
    known = [2]
    cache = AnnotationCache.open(tmp_path, WANTED, compute, missing=lambda: known)
    assert cache.missing == AnnotationCache(cache.folder).missing == cache.to(torch.device("cpu")).missing == (1, 2)


def test_rows_that_are_not_there_cannot_be_missing():
    for rows in ((5,), (-1,), ("1",)):
        with pytest.raises(ValueError, match="no index"):
            replace(WANTED, done=5, regions=4, size=3, missing=rows)


def test_regions_without_a_grid(tmp_path):
    assert AnnotationCache.open(tmp_path, WANTED, Compute(grid=None)).rows([0]).grid is None


def test_a_cache_goes_to_another_process_as_a_path(tmp_path):
    cache = AnnotationCache.open(tmp_path, WANTED, Compute()).to(torch.device("cpu"))
    pickled = pickle.dumps(cache)
    assert len(pickled) < 300
    holds_the_values(pickle.loads(pickled))


def test_in_a_devices_memory_it_gives_the_same_rows_there(tmp_path):
    cache = AnnotationCache.open(tmp_path, WANTED, Compute())
    kept = cache.to(torch.device("cpu"))
    assert kept._kept.dtype == torch.float16 and kept._kept.shape == (5, 4, 3)
    for indices in ([4, 0, 4], []):
        assert torch.equal(kept.rows(indices).values, cache.rows(indices).values)
    assert kept.rows([1]).grid == (2, 2) and kept.rows([1]).values.dtype == torch.float32
    (tmp_path / ("a" * 16) / "values.npy").write_bytes(b"")
    holds_the_values(kept)  # it needs the file no more


def test_it_says_what_it_is_about_to_write(tmp_path, capsys):
    AnnotationCache.open(tmp_path, replace(WANTED, view="mirrored"), Compute())
    (line,) = capsys.readouterr().out.splitlines()  # and draws no bar where there is no terminal
    assert line == (
        f"Annotating 5 mirrored train images once: 4 regions x 3 values, less than 0.01 GB in {tmp_path / ('a' * 16)}"
    )
    AnnotationCache.open(tmp_path, WANTED, Compute())
    assert capsys.readouterr().out == ""
    assert in_gigabytes(587_000_000) == "0.59 GB" and in_gigabytes(0) == "0.00 GB"


def test_a_log_file_gets_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(annotation_cache, "SAY_SECONDS", 0.0)
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines = annotation_cache._Lines(replace(WANTED, images=117_000, done=11_000, regions=4))
    for done in (11_100, 11_140, 117_000):
        lines(done)
    assert capsys.readouterr().out.splitlines() == [
        "Annotating: 11,100 of 117,000 images, 50 images/s",
        "Annotating: 11,140 of 117,000 images, 20 images/s",
    ]
    monkeypatch.setattr(annotation_cache, "SAY_SECONDS", 5.0)
    for done in (11_200, 11_300, 11_400):  # 2, 4 and 6 seconds after the last line
        lines(done)
    said = capsys.readouterr().out
    assert said.startswith("Annotating: 11,") and said.count("\n") == 1


def test_a_terminal_sees_images_rate_and_time_left(tmp_path, monkeypatch):
    terminal = Console(force_terminal=True, file=io.StringIO(), width=120)
    for module in (annotation_cache, cache_folder):
        monkeypatch.setattr(module, "Console", lambda: terminal)
    AnnotationCache.open(tmp_path, WANTED, Compute())
    shown = Text.from_ansi(terminal.file.getvalue()).plain
    assert re.search(r"Annotating .* 5/5 .*[\d,]+ images/s \d:\d\d:\d\d", shown), shown
    announced = shown.splitlines()[0]
    assert announced.startswith("Annotating 5 train images once: ") and "0/5" not in announced, shown


# What is damaged, and what is broken off

DAMAGES = {
    "index cut": "damaged index",
    "index no JSON object": "damaged index",
    "index of other numbers": "damaged index",
    "index without words": "damaged index",
    "index of a grid of other regions": "damaged index",
    "index of half regions": "damaged index",
    "index of no regions": "damaged index",
    "index of a format that is no number": "damaged index",
    "index missing": "values without an index",
    "values missing": "damaged values",
    "values cut": "damaged values",
    "values too long": "damaged values",
    "values empty": "damaged values",
    "values of another type": "other values than its index",
    "values of another shape": "other values than its index",
    "another fingerprint": "another encoder",
    "fewer images": "another encoder",
    "first release": "format 1, not 2",
    "later release": "format 3, not 2",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_of_another_format_is_said_and_built_anew(damage, tmp_path, capsys):
    AnnotationCache.open(tmp_path, WANTED, Compute(VALUES + 1))
    folder = tmp_path / ("a" * 16)
    index, values = folder / "index.json", folder / "values.npy"
    fields = json.loads(index.read_text())
    if damage == "index cut":
        index.write_text(index.read_text()[:9])
    elif damage == "index no JSON object":
        index.write_text("[1, 2]")
    elif damage == "index of other numbers":
        index.write_text(json.dumps(fields | {"done": "5"}))
    elif damage == "index without words":
        index.write_text(json.dumps(fields | {"encoder": 5}))
    elif damage == "index of a grid of other regions":
        index.write_text(json.dumps(fields | {"grid": [2, 3]}))
    elif damage == "index of half regions":
        index.write_text(json.dumps(fields | {"grid": [8, 0.5]}))
    elif damage == "index of no regions":
        index.write_text(json.dumps(fields | {"regions": 0}))
    elif damage == "index of a format that is no number":
        index.write_text(json.dumps(fields | {"format": []}))
    elif damage == "index missing":
        index.unlink()
    elif damage == "values missing":
        values.unlink()
    elif damage == "values cut":
        values.write_bytes(values.read_bytes()[:-1])
    elif damage == "values too long":
        values.write_bytes(values.read_bytes() + b"0")
    elif damage == "values empty":
        values.write_bytes(b"")
    elif damage == "values of another type":
        np.save(values, np.load(values).astype(np.float32))
    elif damage == "values of another shape":
        np.save(values, np.load(values)[:, :3])
    elif damage == "another fingerprint":  # of which the folder's name shows a part only
        index.write_text(json.dumps(fields | {"fingerprint": "a" * 63 + "b"}))
    elif damage == "fewer images":
        index.write_text(json.dumps(fields | {"images": 4, "done": 4}))
        np.save(values, np.load(values)[:4])
    elif damage == "first release":
        index.write_text(json.dumps({"fingerprint": "a" * 64, "images": 5, "grid": [2, 2]}))
    else:
        index.write_text(json.dumps(fields | {"format": 3}))
    for name in ("values.4242.tmp", "index.4242.tmp"):  # as killed runs of the first release left them
        (folder / name).write_bytes(b"half")
    if damage not in ("another fingerprint", "fewer images"):
        with pytest.raises(InputError, match=DAMAGES[damage]) as error:
            AnnotationCache(folder)
        one_sentence(error)
    capsys.readouterr()
    compute = Compute()
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, compute))
    assert compute.firsts == [0]
    said, announced = capsys.readouterr().out.splitlines()
    assert DAMAGES[damage] in said and said.endswith("has to be built anew.") and "Annotating" in announced
    assert files_in(tmp_path) == {"values.npy", "index.json"}


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_rows_that_no_cache_holds_are_said_to_be_damaged(value, tmp_path):
    cache = AnnotationCache.open(tmp_path, WANTED, Compute())
    values = np.load(cache.folder / "values.npy", mmap_mode="r+")
    values[3, 1, 2] = value
    values[3, 1, 1] = -value  # which adds up to nothing that is finite, either
    values.flush()
    command = f"`captioner cache clear {tmp_path} {'a' * 16}`"
    for read in (lambda: cache.rows([0, 3]), lambda: cache.to(torch.device("cpu"))):
        with pytest.raises(InputError, match=re.escape(command)) as error:
            read()
        one_sentence(error)
    assert torch.isfinite(cache.rows([0, 1, 2, 4]).values).all()


def test_the_largest_values_that_a_cache_holds_are_not_taken_for_damaged(tmp_path):
    cache = AnnotationCache.open(tmp_path, WANTED, Compute(torch.full((5, 4, 3), 65504.0)))
    assert (cache.rows(range(5)).values == 65504).all() and len(cache.to(torch.device("cpu"))) == 5


def test_a_run_that_uses_a_cache_keeps_it_while_another_builds_it_anew(tmp_path):
    used = AnnotationCache.open(tmp_path, WANTED, Compute())
    (tmp_path / ("a" * 16) / "index.json").unlink()
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, Compute(VALUES + 1)), VALUES + 1)
    holds_the_values(used)


@pytest.mark.parametrize("until", [0, 2, 4])
def test_a_run_that_breaks_off_is_gone_on_from(until, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, WANTED, Compute(VALUES, until=until))
    assert files_in(tmp_path) == ({"values.npy", "progress.json"} if until else set())
    with pytest.raises(InputError, match="not complete"):
        AnnotationCache(tmp_path / ("a" * 16))
    capsys.readouterr()
    compute = Compute(torch.cat([VALUES[:until] + 9, VALUES[until:]]))
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, compute))
    assert compute.firsts == [until] and files_in(tmp_path) == {"values.npy", "index.json"}
    (line,) = capsys.readouterr().out.splitlines()
    assert (f"once, from image {until + 1} on: 4 regions" if until else "once: 4 regions") in line


def test_what_is_written_is_recorded_where_a_run_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_cache, "RECORD_SECONDS", 3600.0)
    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, WANTED, Compute(until=4))
    compute = Compute()
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, compute))
    assert compute.firsts == [4]


def test_a_disk_that_fails_to_record_is_not_asked_again(tmp_path, monkeypatch):
    record, asked = CacheFolder.record, []

    def failing(folder, index):
        asked.append(index.done)
        if index.done == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        record(folder, index)

    monkeypatch.setattr(CacheFolder, "record", failing)
    with pytest.raises(InputError, match="see to its permissions and the disk"):
        AnnotationCache.open(tmp_path, WANTED, Compute())
    assert asked == [0, 2] and CacheFolder(tmp_path / ("a" * 16)).read().done == 0


def test_who_may_not_record_at_an_interruption_is_interrupted_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_cache, "RECORD_SECONDS", 3600.0)
    record = CacheFolder.record

    def full(folder, index):
        if index.done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        record(folder, index)

    monkeypatch.setattr(CacheFolder, "record", full)
    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, WANTED, Compute(until=4))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the name of an open file")
def test_what_is_recorded_is_on_the_disk_before(tmp_path, monkeypatch):
    """The values are synchronised first, then the index that speaks of them, then it takes its name."""
    order = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(number):
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def noted_rename(old, new):
        order.append(new.name)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    AnnotationCache.open(tmp_path, WANTED, Compute())
    kept = ["values.npy", "progress.tmp", "progress.json"]
    assert order == [*kept * 3, "values.npy", "progress.tmp", "index.json"]  # nothing, two images, four, all


# A full disk


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 4 * 3 * 2 - 1))
    with pytest.raises(InputError, match="free") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute())
    one_sentence(error)
    assert not files_in(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 4 * 3 * 2))
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, Compute()))


def test_a_run_that_goes_on_needs_room_for_the_rest_only(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, WANTED, Compute(until=4))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 3 * 2))
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, Compute()))


def test_a_disk_that_fills_up_is_said_and_what_was_done_stays(tmp_path, monkeypatch):
    write = CacheFolder.write

    def full(folder, index, values, counts):
        if index.done >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, index, values, counts)

    monkeypatch.setattr(CacheFolder, "write", full)
    with pytest.raises(InputError, match="No space left on device.* after 2 of 5 images: make room,") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute())
    one_sentence(error)
    monkeypatch.setattr(CacheFolder, "write", write)
    compute = Compute()
    holds_the_values(AnnotationCache.open(tmp_path, WANTED, compute))
    assert compute.firsts == [2]


@pytest.mark.parametrize("name", ["index.json", "values.npy"])
def test_what_is_no_lack_of_room_is_not_said_to_be_one(name, tmp_path):
    (tmp_path / ("a" * 16) / name).mkdir(parents=True)
    with pytest.raises(InputError, match="see to its permissions") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute())
    one_sentence(error)
    assert "make room" not in str(error.value)
    with pytest.raises(InputError, match="see to its permissions, or delete it by hand") as error:
        CacheFolder(tmp_path / ("a" * 16)).delete()
    one_sentence(error)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="another data.cache") as error:
        AnnotationCache.open(tmp_path / "file", WANTED, Compute())
    one_sentence(error)


# What a cache cannot hold


@pytest.mark.parametrize("value", [1e5, -1e5, float("nan"), float("inf")])
def test_values_that_16_bits_cannot_hold_are_refused(value, tmp_path, recwarn):
    values = VALUES.clone()
    values[4, 1, 2] = value
    with pytest.raises(InputError, match="data.cache to null") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute(values))
    one_sentence(error)
    assert not files_in(tmp_path) and not recwarn.list


def test_regions_that_differ_in_number_are_refused(tmp_path):
    with pytest.raises(InputError, match="number of regions") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute(mask=torch.ones(2, 4, dtype=torch.bool)))
    one_sentence(error)

    def compute(first):
        yield Annotations(VALUES[:2], None, (2, 2))
        yield Annotations(VALUES[2:, :3], None, None)

    with pytest.raises(InputError, match="number of regions"):
        AnnotationCache.open(tmp_path, WANTED, compute)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("grid", [(2, 3), (4,), 4, (8, 0.5)])
def test_a_grid_of_other_regions_is_refused(grid, tmp_path):
    with pytest.raises(InputError, match="4 regions and the grid") as error:
        AnnotationCache.open(tmp_path, WANTED, Compute(grid=grid))
    one_sentence(error)
    assert not files_in(tmp_path)


# Several processes

FORK = multiprocessing.get_context("fork")  # which has torch imported


def fill(folder, notes, printed, pause):
    """Fill the cache, an image at a time, and note each image that is computed."""

    def compute(first):
        for start in range(first, 5):
            with notes.open("a") as file:
                file.write(f"{start} ")
            yield Annotations(VALUES[start : start + 1], None, (2, 2))
            time.sleep(pause)

    with printed.open("w", buffering=1) as sys.stdout:
        AnnotationCache.open(folder, WANTED, compute)


@pytest.fixture
def filler(tmp_path):
    """Start a process that fills the cache; it comes with its notes and what it prints."""
    started = []

    def start(pause):
        files = [tmp_path / f"{name}{len(started)}" for name in ("notes", "printed")]
        for file in files:
            file.touch()
        process = FORK.Process(target=fill, args=(tmp_path, *files, pause))
        process.start()
        started.append(process)
        return process, *files

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def done_in(folder):
    """The number of images that are recorded, of a cache that another process is just making."""
    try:
        index = folder.read()
    except CacheFault:
        return 0
    return 0 if index is None else index.done


def test_a_killed_process_leaves_no_lock_and_its_work_is_gone_on_from(filler, tmp_path):
    folder = CacheFolder(tmp_path / ("a" * 16))
    process, *_ = filler(60)
    wait_for(lambda: done_in(folder) == 1)
    assert folder.is_being_filled
    with pytest.raises(InputError, match="being filled by a running process") as error:
        folder.delete()
    one_sentence(error)
    process.kill()  # SIGKILL
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not folder.is_being_filled and not folder.read().complete
    compute = Compute()
    cache = AnnotationCache.open(tmp_path, WANTED, compute)
    assert compute.firsts == [1]
    whole = AnnotationCache.open(tmp_path / "other", WANTED, Compute())
    assert np.array_equal(cache._values, whole._values)


def test_of_several_that_start_at_once_one_fills_and_the_others_wait(filler, tmp_path):
    started = [filler(0.1) for _ in range(3)]
    for process, *_ in started:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(notes.read_text().split() for _, notes, _ in started) == [[], [], list("01234")]
    printed = sorted(printed.read_text() for *_, printed in started)
    assert printed[0].startswith("Annotating 5 train images") and printed[0].count("\n") == 1
    waiting = f"Waiting for another process, which is filling the cache {tmp_path / ('a' * 16)}.\n"
    assert printed[1:] == [waiting, waiting]
    holds_the_values(AnnotationCache(tmp_path / ("a" * 16)))


def test_who_waits_takes_over_from_a_killed_process(filler, tmp_path):
    folder = CacheFolder(tmp_path / ("a" * 16))
    first, *_ = filler(60)
    wait_for(lambda: done_in(folder) == 1)
    second, notes, printed = filler(0)
    wait_for(lambda: "Waiting" in printed.read_text())
    assert notes.read_text() == ""
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and notes.read_text().split() == list("1234")
    holds_the_values(AnnotationCache(folder.path))


# The fingerprint


def test_the_fingerprint_knows_images_weights_and_preprocessing(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"picture")
        os.utime(file, ns=(10**18, 10**18))
    settings = {"class": "SmallCNN", "preprocessing": {"size": 96}}
    tensors = [("w", torch.arange(4.0)), ("count", torch.tensor(3)), ("half", torch.ones(2, dtype=torch.bfloat16))]
    whole = fingerprint(settings, tensors, files)
    assert whole == fingerprint(dict(reversed(settings.items())), [(n, t.clone()) for n, t in tensors], list(files))

    others = [
        fingerprint(settings | {"preprocessing": {"size": 64}}, tensors, files),
        fingerprint(settings, [("w", torch.tensor([0.0, 1.0, 2.0, 3.0001])), *tensors[1:]], files),
        fingerprint(settings, [("v", torch.arange(4.0)), *tensors[1:]], files),
        fingerprint(settings, tensors, files[::-1]),
        fingerprint(settings, tensors, files[:1]),
    ]
    os.utime(files[1], ns=(10**18, 10**18 + 1))
    others.append(fingerprint(settings, tensors, files))
    files[1].write_bytes(b"another picture")
    os.utime(files[1], ns=(10**18, 10**18))
    others.append(fingerprint(settings, tensors, files))
    assert len({whole, *others}) == 1 + len(others)


# In training


class Counting(nn.Module):
    """A frozen encoder that counts the images it sees."""

    seen = 0
    preprocessing = Preprocessing("squash", 32)

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.map = nn.Conv2d(3, 12, 8, 8)

    def forward(self, x):
        type(self).seen += len(x)
        return self.map(x)


FOREIGN = ("--model.encoder", "captioner.encoders.ForeignEncoder", "--model.encoder.module", f"{__name__}.Counting")


def captions_of(cli):
    return cli.model.captions, cli.model.scores


@pytest.mark.slow
def test_the_cnn_runs_once_per_image_and_not_at_all_in_the_second_run(fit, tmp_path):
    def images_seen(*flags):
        Counting.seen = 0
        cli = fit(*FOREIGN, "--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "5", *flags)
        assert not cli.model.captioner.encoder.learns
        return Counting.seen, captions_of(cli)

    blank = 1  # on which the annotations' size is measured
    cache = ("--data.cache", str(tmp_path))
    uncached, found = images_seen()
    assert uncached == blank + 10 * 22 + 2 * 9
    first, found_filling = images_seen(*cache)
    assert first == blank + 22 + 9
    second, found_cached = images_seen(*cache)
    assert second == blank
    assert found == found_filling == found_cached
    assert len({*found[0].values()}) > 1  # or the comparison would say little

    assert images_seen(*cache, "--model.encoder.grid", "2")[0] == blank + 22 + 9
    assert images_seen(*cache, "--trainer.max_epochs", "1", "--data.num_workers", "1")[0] == blank


def test_the_same_weights_from_another_file_are_found_and_listed_by_name(fit, tmp_path, monkeypatch):
    seen = []
    for weights in ("a.pt", "other/a.pt"):
        described = {"weights": weights}
        monkeypatch.setattr(task, "describe", lambda encoder, said=described: {**describe(encoder), **said})
        Counting.seen = 0
        fit(*FOREIGN, "--data.cache", str(tmp_path))
        seen.append(Counting.seen)
    assert seen == [1 + 22 + 9, 1]
    assert all("weights a.pt" in CacheFolder(path).read().encoder for path in tmp_path.iterdir())


@pytest.mark.slow
def test_a_damaged_training_image_is_left_out_and_a_second_run_knows(fit, scenes, tmp_path, capsys):
    root = shutil.copytree(scenes, tmp_path / "scenes")
    (root / "train" / "000003.png").write_bytes(b"")
    flags = ["--data.files.init_args.root", str(root), "--data.cache", str(tmp_path / "cache"), *FOREIGN]
    with pytest.raises(InputError, match="1 of 22 training images .*000003.png is empty"):
        fit(*flags)
    for told in ("000003.png is empty", "000003.png cannot be read"):
        cli = fit(*flags, "--data.max_damaged", "0.1")
        assert told in capsys.readouterr().out and list(cli.datamodule.damaged) == [2]
        assert cli.datamodule.caches["train"].missing == (2,)
    (root / "val" / "000003.png").write_bytes(b"")
    with pytest.raises(InputError, match="000003.png is empty"):
        fit(*flags, "--data.max_damaged", "0.5")


def test_the_cache_holds_what_the_encoder_gives(fit, tmp_path):
    cli = fit(*FOREIGN, "--data.cache", str(tmp_path))
    data, captioner = cli.datamodule, cli.model.captioner.eval()
    for name in ("train", "val"):
        whole = torch.cat([captioner.annotate(images).values for images in data.images(name)])
        cached = data.caches[name].rows(range(len(whole)))
        assert np.allclose(cached.values, whole, atol=2e-3) and cached.grid == (4, 4)


@pytest.mark.slow
def test_the_cache_of_the_mirrored_images_is_one_more_and_training_takes_from_both(fit, tmp_path):
    flags = (*FOREIGN, "--data.cache", str(tmp_path), "--data.flip", "true", "--trainer.max_epochs", "2")
    Counting.seen = 0
    cli = fit(*flags)
    assert Counting.seen == 1 + 2 * 22 + 9 and len(list(tmp_path.iterdir())) == 3
    data, captioner = cli.datamodule, cli.model.captioner.eval()
    mirrored = torch.cat([captioner.annotate(images.flip(-1)).values for images in data.images("train")])
    assert np.allclose(data.mirrored_cache.rows(range(22)).values, mirrored, atol=2e-3)
    assert data.train_dataloader().dataset.mirrored_cache is data.mirrored_cache
    assert data.val_dataloader().dataset.mirrored_cache is None

    # The two runs draw the same: the one that fills the caches and the one that finds them.
    again = fit(*flags)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in cli.model.state_dict().items())
    assert Counting.seen == 1 + 2 * 22 + 9 + len(mirrored) + 1

    upright = fit(*flags, "--data.flip", "false")  # finds the cache of the images as they are
    assert upright.datamodule.mirrored_cache is None and len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_on_a_device_with_room_training_takes_from_its_memory(fit, tmp_path, monkeypatch):
    flags = (*FOREIGN, "--data.cache", str(tmp_path), "--data.flip", "true", "--trainer.max_epochs", "2")
    mapped = fit(*flags)
    assert mapped.datamodule.train_dataloader().dataset.cache._kept is None
    asked = []
    monkeypatch.setattr(datamodule, "has_room", lambda *of: asked.append(of) or True)
    kept = fit(*flags)
    dataset = kept.datamodule.train_dataloader().dataset
    assert asked == [(torch.device("cpu"), 2 * 22 * 16 * 12 * 2)]
    assert dataset.cache._kept.dtype == dataset.mirrored_cache._kept.dtype == torch.float16
    assert kept.datamodule.val_dataloader().dataset.cache._kept is None
    assert all(torch.equal(value, kept.model.state_dict()[name]) for name, value in mapped.model.state_dict().items())


@pytest.mark.slow
def test_two_experiments_started_at_once_share_a_cache_that_is_not_there_yet(recipe, tmp_path):
    """Each in a process of its own, as from two terminals: one fills, both train."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    flags = ["--config", str(recipe), *FOREIGN, "--data.cache", str(tmp_path / "cache")]
    program = "import sys; from captioner.cli import main; sys.exit(main(sys.argv[1:]))"
    runs = []
    for decoder in ("LSTMDecoder", "GRUDecoder"):
        own = ["--model.decoder", decoder, "--trainer.default_root_dir", str(tmp_path / decoder)]
        command = [sys.executable, "-c", program, "fit", *flags, *own]
        runs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    found = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and [stderr for _, stderr in found] == ["", ""], found
    printed = [line for stdout, _ in found for line in stdout.splitlines()]
    assert sum(line.startswith("Annotating 22 train images once: ") for line in printed) == 1
    assert sum(line.startswith("Annotating 9 val images once: ") for line in printed) == 1
    assert sum(line.startswith("Checkpoint: ") for line in printed) == 2


def test_an_encoder_that_learns_cannot_be_cached(fit, tmp_path):
    with pytest.raises(InputError, match="data.cache to null") as error:
        fit("--data.cache", str(tmp_path))
    one_sentence(error)
