import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from odd_images import REFUSED, encoded, png_bomb, write_good, write_odd
from PIL import Image

from captioner import image_stream
from captioner.errors import InputError, in_one_line
from captioner.image_stream import START, read_images
from captioner.images import Preprocessing, find_images, read_image

SQUARES = [Preprocessing("crop", 24), Preprocessing("squash", 32)]
# Before a process serves, it is made to do something else for an image of some name.
FAULT = """
import captioner.image_stream as stream
read = stream._squares
def fault(path, *rest):
    if "bad" in path:
        {}
    return read(path, *rest)
stream._squares = fault
"""


def faulty(monkeypatch, action):
    start, last = START.strip().rsplit("\n", 1)
    monkeypatch.setattr(image_stream, "START", f"{start}\n{FAULT.format(action)}\n{last}")


@pytest.fixture
def started(monkeypatch):
    """All processes that were started."""
    processes, popen = [], subprocess.Popen

    def start(*args, **settings):
        processes.append(popen(*args, **settings))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


@pytest.fixture
def photographs(tmp_path):
    return list(write_good(tmp_path, count=11))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 4), (1, 11), (2, 3), (2, 1)])
def test_images_come_in_order_and_as_they_are_read_one_by_one(photographs, workers, batch_size):
    photographs.insert(5, photographs[5].with_name("none.jpg"))
    batches = list(read_images(photographs, SQUARES, workers, batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    read = [entry for batch in batches for entry in batch]
    assert [(index, path) for index, path, _ in read] == list(enumerate(photographs))
    for index, path, squares in read:
        if index == 5:
            assert isinstance(squares, InputError) and "none.jpg cannot be opened (No such file" in str(squares)
        else:
            expected = [preprocessing.pixels(read_image(path)) for preprocessing in SQUARES]
            assert len(squares) == 2 and all(map(torch.equal, squares, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_images_are_no_batches(workers):
    assert list(read_images([], SQUARES, workers)) == []


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, write_good(folder) | write_odd(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pillow's, of what it meets in some of the files
@pytest.mark.parametrize("workers", [0, 2])
def test_of_hundreds_of_odd_files_each_comes_to_what_it_must(odd, workers):
    folder, expected = odd[0], dict(odd[1])
    found = find_images([folder])
    assert len(found) >= 300 and set(found) == set(expected)
    for batch in read_images(found, SQUARES, workers):
        for _, path, squares in batch:
            outcome = expected.pop(path)
            if isinstance(squares, InputError):
                assert outcome != "read", squares
                reason = str(squares)
                assert reason.startswith(f"{in_one_line(path)} ") and reason.isprintable() and reason.endswith(".")
            else:
                assert outcome != REFUSED, path
                assert [square.shape for square in squares] == [(3, 24, 24), (3, 32, 32)]
    assert not expected


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"its decoder crashed \(SIGKILL\)"),
        ("import ctypes; ctypes.string_at(0)", r"its decoder crashed \(SIGSEGV\)"),
        ("import os; os._exit(7)", r"its decoder crashed \(exit code 7\)"),
        ("raise SystemError", r"its decoder crashed \(exit code 1\)"),
        ("print('said ' * 20_000); return read(path.replace('bad', 'good'), *rest)", None),
    ],
)
def test_a_decoder_that_crashes_costs_its_image_alone(photographs, monkeypatch, capfd, action, reason):
    faulty(monkeypatch, action)
    for number in (0, 5, 6):
        photographs[number] = photographs[number].rename(str(photographs[number]).replace("good", "bad"))
        os.link(photographs[number], str(photographs[number]).replace("bad", "good"))
    read = [squares for batch in read_images(photographs, SQUARES, 2, 4) for _, _, squares in batch]
    failed = {index: str(squares) for index, squares in enumerate(read) if isinstance(squares, InputError)}
    if reason is None:
        assert not failed
    else:
        assert set(failed) == {0, 5, 6}
        for number, message in failed.items():
            assert photographs[number].name in message and re.search(reason, message)
    assert capfd.readouterr() == ("", "")


def test_a_decoder_that_takes_too_long_is_given_up(photographs, monkeypatch, started):
    # In C, with the interpreter's lock held, where no exception and no signal handler would come through.
    faulty(monkeypatch, "import ctypes; ctypes.PyDLL(None).sleep(60)")
    monkeypatch.setattr(image_stream, "SECONDS", 0.5)
    photographs[3] = photographs[3].rename(photographs[3].with_name("bad.png"))
    start = time.monotonic()
    read = [squares for batch in read_images(photographs, SQUARES, 2, 4) for _, _, squares in batch]
    assert time.monotonic() - start < 10
    assert [index for index, squares in enumerate(read) if isinstance(squares, InputError)] == [3]
    assert "bad.png takes more than 0.5 seconds to read" in str(read[3])
    assert all(process.poll() is not None for process in started)


def test_a_process_that_ends_between_images_costs_none(photographs, started):
    batches = read_images(photographs * 4, SQUARES, 1, 2)
    for number, batch in enumerate(batches):
        assert not any(isinstance(squares, InputError) for _, _, squares in batch)
        if number == 2:
            time.sleep(0.5)  # until it has read ahead and waits
            started[0].kill()
            started[0].wait()
    assert len(started) == 2


def test_a_process_that_cannot_start_is_no_fault_of_the_image(photographs, monkeypatch, started):
    monkeypatch.setattr(image_stream, "START", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3 before"):
        list(read_images(photographs, SQUARES, 2))
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("ending", ["close", "error", "forget"])
def test_no_process_is_left_when_the_consumer_stops_early(photographs, monkeypatch, started, ending):
    faulty(monkeypatch, "import time; time.sleep(60)")
    photographs[7] = photographs[7].rename(photographs[7].with_name("bad.png"))
    start = time.monotonic()
    batches = read_images(photographs, SQUARES, 2, 2)
    next(batches)
    if ending == "close":
        batches.close()
    elif ending == "error":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    else:
        del batches
    assert time.monotonic() - start < 10
    assert len(started) == 2 and all(process.poll() is not None for process in started)


CONSUMER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
from pathlib import Path
import captioner.image_stream as stream
from captioner.images import Preprocessing
stream.START = sys.argv[1]
paths = sorted(Path(sys.argv[2]).iterdir())
for batch in stream.read_images(paths, [Preprocessing(size=24)], 2, 2):
    print(flush=True)
"""


def children(pid):
    """The processes that a process has started, by any of its threads."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            pass  # it has ended meanwhile
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
@pytest.mark.parametrize(
    ("sent", "seconds"), [(signal.SIGINT, 60), pytest.param(signal.SIGKILL, 5, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_at_once_and_no_process_outlives_its_parent(photographs, monkeypatch, sent, seconds):
    faulty(monkeypatch, f"import time; time.sleep({seconds})")
    photographs[7].rename(photographs[7].with_name("zbad.png"))
    consumer = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, image_stream.START, str(photographs[0].parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(4):
        consumer.stdout.readline()
    readers = children(consumer.pid)
    # Not of the group that Ctrl-C is for: else a consumer that goes on would find its images crashed.
    assert len(readers) == 2 and consumer.pid not in map(os.getpgid, readers)
    start = time.monotonic()
    os.killpg(consumer.pid, sent)  # as a terminal does: to all of the group
    _, errors = consumer.communicate(timeout=20)
    if sent == signal.SIGINT:
        assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    while any(map(alive, readers)):  # what it is reading, one without a parent reads to the end
        assert time.monotonic() - start < 30
        time.sleep(0.05)


def test_what_is_decoded_at_a_time_has_room(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path in paths:
        path.write_bytes(png_bomb(2000))  # of 16 MB
    monkeypatch.setattr(image_stream, "MEMORY", 33_000_000)
    claimed, claim = [], image_stream._Readers._claim

    @contextmanager
    def recorded(self, number):
        with claim(self, number):
            claimed.append(self._claimed)
            yield

    monkeypatch.setattr(image_stream._Readers, "_claim", recorded)
    read = [squares for batch in read_images(paths, SQUARES, 4) for _, _, squares in batch]
    assert not any(isinstance(squares, InputError) for squares in read)
    assert len(claimed) == 6 and max(claimed) == 32_000_000


READER = """
import sys
from captioner.image_stream import read_images
from captioner.images import Preprocessing, find_images
import torch
paths = find_images(sys.argv[1:])
count = sum(not isinstance(squares, Exception) for b in read_images(paths, [Preprocessing()], 2) for _, _, squares in b)
print(len(paths), count)
"""


def peak_memory(folders):
    """Bytes that a process that reads the images of folders, and those that it starts, hold together at most."""
    process = subprocess.Popen([sys.executable, "-c", READER, *map(str, folders)], stdout=subprocess.PIPE, text=True)
    most = 0
    while process.poll() is None:
        total = 0
        for pid in [process.pid, *children(process.pid)]:
            try:
                # Of pages that several processes share, each its part.
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)[1])
            except (OSError, TypeError):  # it has ended
                pass
        most = max(most, total)
        time.sleep(0.002)
    found, read = map(int, process.communicate()[0].split())
    return most, found, read


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
def test_odd_files_take_400_mb_more_at_most(tmp_path):
    good, odd = tmp_path / "good", tmp_path / "odd"
    good.mkdir()
    odd.mkdir()
    write_good(good)
    expected = write_odd(odd)
    # As large as they may be, and some more, two of each so that both processes have one.
    side = 9000
    plain = Image.new("RGB", (side, side), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    large = {
        "rgb.png": png_bomb(side),
        "rgba.png": png_bomb(side, kind=6),
        "grey.png": png_bomb(side, kind=0),
        "turned.jpg": encoded(plain, "JPEG", exif=exif),
        "float.tif": encoded(Image.new("F", (side, side), 9), "TIFF", compression="tiff_lzw"),
        "strip.tif": encoded(plain, "TIFF", compression="tiff_lzw", tiffinfo={278: side}),
        "largest.webp": encoded(plain.crop((0, 0, 4500, 4500)), "WEBP", lossless=True, method=0),
    }
    for name, content in large.items():
        (odd / f"large-{name}").write_bytes(content)
        (odd / f"large-again-{name}").write_bytes(content)
    alone, found, read = peak_memory([good])
    assert found == read == 40
    together, found, read = peak_memory([good, odd])
    assert found == 40 + len(expected) + 2 * len(large)
    assert read >= 40 + list(expected.values()).count("read") + 2 * (len(large) - 1)  # not the TIFF of one strip
    print(f"{alone / 1e6:.0f} MB alone, {(together - alone) / 1e6:.0f} MB more with the odd ones")
    assert together - alone < 400_000_000
