"""Images read ahead of a model, by processes of their own: a file that brings its decoder down costs itself alone."""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from captioner.content_splits import digest_of
from captioner.errors import InputError, in_one_line
from captioner.images import MEMORY, Preprocessing, open_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Read = tuple[int, Path, tuple[Tensor, ...] | InputError]

SECONDS = 120.0  # for opening an image and again for decoding it; a busy core decodes the largest in 20
AHEAD = 2  # batches that are read before they are asked for
SMALL = 8_000_000  # bytes: an image that takes no more is decoded without asking

# What a reading process runs. It imports neither torch nor the script that called us, which may not be written for
# being imported, so that it is there after a quarter of a second and takes 45 MB.
START = """
import json, sys
settings = json.loads(sys.argv[1])
sys.path[:] = settings.pop("path")
from captioner.image_stream import serve
serve(**settings)
"""
# Threads for matrix products, of which it makes none, would take their memory all the same. And glibc's malloc would
# keep that of a large image that was freed, unless told to hand back what is larger than this at once.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
# It is sent the length of a path and the path, and answers with one of these, a number, and as many bytes. No pickles:
# nothing that a decoder is brought to say runs here.
STARTED, PIXELS, REFUSED = b"s", b"p", b"r"
NEEDS = b"n"  # here the number is of bytes of memory, and it goes on when it is sent a byte
ANSWER = struct.Struct("<cQ")
LENGTH = struct.Struct("<I")


def read_images(
    paths: Sequence[Path], preprocessings: Sequence[Preprocessing], workers: int = 0, batch_size: int = 32
) -> Generator[list[Read], None, None]:
    """Read images in batches, the next ones while a model works on the last.

    Parameters
    ----------
    paths
        Image files, see `read_image`.
    preprocessings
        The squares to make of each.
    workers
        Processes that read. 0 reads in this one, unprotected from a decoder that crashes or takes too long.
    batch_size
        Images in a batch.

    Yields
    ------
    list of (int, Path, tuple of Tensor or InputError)
        In the order of the paths: an image's place among them, its path, and a square (3, S, S) uint8 for each
        preprocessing, or why there is none. With workers, that may also be a decoder that crashed or took more than
        `SECONDS`; what they decode at a time takes `MEMORY` bytes together.
    """
    starts = range(0, len(paths), batch_size)
    batches = (list(enumerate(paths[first : first + batch_size], start=first)) for first in starts)
    if workers == 0:
        for batch in batches:
            yield [(index, path, _read_here(path, preprocessings)) for index, path in batch]
        return
    readers = _Readers(preprocessings, workers)
    ahead: deque[list[tuple[int, Path, Future[bytearray | InputError]]]] = deque()
    try:
        for batch in batches:
            ahead.append([(index, path, readers.read(path)) for index, path in batch])
            if len(ahead) > AHEAD:
                yield [(index, path, _unpack(result, preprocessings)) for index, path, result in ahead.popleft()]
        while ahead:
            yield [(index, path, _unpack(result, preprocessings)) for index, path, result in ahead.popleft()]
    finally:
        readers.close()


class ImageFacts(NamedTuple):
    """What an image file is found to be.

    Attributes
    ----------
    digest : str
        The SHA-256 of the file, in hexadecimal digits; empty where it cannot be read.
    fault : str
        Why there is no image, in a sentence; empty where there is one.
    size : tuple of int
        Width and height of the upright image, in pixels.
    pixels : str
        A hash of the upright image's pixels, see `Picture.digest`.
    is_blank : bool
        Whether all its pixels are the same.
    """

    digest: str
    fault: str = ""
    size: tuple[int, int] = (0, 0)
    pixels: str = ""
    is_blank: bool = False


def examine_images(paths: Sequence[Path], workers: int = 0) -> Generator[ImageFacts, None, None]:
    """Read and decode image files whole, each once, and tell what they are.

    Parameters
    ----------
    paths, workers
        As for `read_images`.

    Yields
    ------
    ImageFacts
        In the order of the paths.
    """
    if workers == 0:
        for path in paths:
            yield _examine(path)
        return
    readers = _Readers(None, workers)
    try:
        for path, result in [(path, readers.read(path)) for path in paths]:
            data = result.result()
            if isinstance(data, InputError):  # the decoder crashed
                digest = digest_of(path)
                yield ImageFacts("" if digest is None else digest.hex(), str(data))
            else:
                digest, fault, size, pixels, is_blank = json.loads(data)
                yield ImageFacts(digest, fault, tuple(size), pixels, is_blank)
    finally:
        readers.close()


def _examine(path: str | Path, claim: Callable[[int], None] | None = None) -> ImageFacts:
    """Tell what an image file is; what decoding takes is claimed when its header is read."""
    data = digest = None
    try:
        if os.path.isfile(path):  # reading from a pipe would wait
            with open(path, "rb") as file:
                data = file.read()
            digest = hashlib.sha256(data).hexdigest()
    except (OSError, MemoryError):
        pass  # `open_image` says why
    try:
        with open_image(path, data) as picture:
            if claim is not None:
                claim(picture.memory)
            picture.load()
            return ImageFacts(digest or "", "", picture.size, picture.digest(), picture.is_blank)
    except InputError as error:
        return ImageFacts(digest or "", str(error))


def _read_here(path: Path, preprocessings: Sequence[Preprocessing]) -> tuple[Tensor, ...] | InputError:
    import torch

    try:
        return tuple(map(torch.from_numpy, _squares(path, preprocessings)))
    except InputError as error:
        return error


def _unpack(
    result: Future[bytearray | InputError], preprocessings: Sequence[Preprocessing]
) -> tuple[Tensor, ...] | InputError:
    import torch

    data = result.result()
    if isinstance(data, InputError):
        return data
    sizes = [preprocessing.size for preprocessing in preprocessings]
    squares = torch.split(torch.frombuffer(data, dtype=torch.uint8), [3 * size * size for size in sizes])
    return tuple(square.view(3, size, size) for square, size in zip(squares, sizes, strict=True))


def _squares(
    path: str | Path, preprocessings: Sequence[Preprocessing], claim: Callable[[int], None] | None = None
) -> list[NDArray[np.uint8]]:
    """Make the squares of an image file; what decoding takes is claimed when its header is read."""
    with open_image(path) as picture:
        if claim is not None:
            claim(picture.memory)
        picture.load()
        return [preprocessing.square(picture) for preprocessing in preprocessings]


class _Readers:
    """Processes that read images, or examine them where there are no squares to make, each with a thread here.

    The threads wait for pipes nearly all of their time. They end with the interpreter (they are daemons), and a process
    ends when its pipe does, so that neither outlives a program that forgot them.
    """

    def __init__(self, preprocessings: Sequence[Preprocessing] | None, workers: int) -> None:
        fields = None if preprocessings is None else [dataclasses.asdict(each) for each in preprocessings]
        settings = {
            "path": sys.path,
            "preprocessings": fields,
            "seconds": SECONDS,
        }
        self._command = [sys.executable, "-c", START, json.dumps(settings)]
        self._tasks: queue.SimpleQueue[tuple[Path, Future[bytearray | InputError]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # of what follows
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._claimed = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def read(self, path: Path) -> Future[bytearray | InputError]:
        """Have an image read: its squares, one after the other, or its facts as JSON, or why there are none."""
        result: Future[bytearray | InputError] = Future()
        self._tasks.put((path, result))
        return result

    def close(self) -> None:
        """End all processes at once, whatever they are doing."""
        with self._changed:
            self._closed = True
            for process in self._processes:
                process.kill()
            self._changed.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        while (task := self._tasks.get()) is not None and not self._closed:
            path, result = task
            try:
                # One that ended while it had nothing to do, as the kernel chooses when memory is short, is replaced.
                if process is None or process.poll() is not None:
                    self._end(process)
                    process = self._start()
                answer = self._ask(process, path)
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(answer)
        self._end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._changed:
            if self._closed:
                raise RuntimeError("The images' readers are closed.")
            process = subprocess.Popen(
                self._command,
                pipesize=2**20,  # an image is written in one go
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C in a terminal is for us alone: we end the process
            )
            self._processes.add(process)
        if not _pipe(process.stdout).read(ANSWER.size):
            raise RuntimeError(f"A process that reads images ended with {process.wait()} before it had started.")
        return process

    def _end(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is not None:
            with self._changed:
                self._processes.discard(process)
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    _pipe(pipe).close()
                except OSError:
                    pass  # what was still to be written, nobody reads

    def _ask(self, process: subprocess.Popen[bytes], path: Path) -> bytearray | InputError:
        """Have a process read an image."""
        name, start = os.fsencode(path), time.monotonic()
        try:
            _send(process, LENGTH.pack(len(name)) + name)
            kind, number = _receive(process)
            if kind == NEEDS:
                with self._claim(number):
                    start = time.monotonic()
                    _send(process, b"\0")
                    kind, number = _receive(process)
            data = bytearray(number)
            if _pipe(process.stdout).readinto(data) < number:
                raise EOFError
        except (EOFError, BrokenPipeError):
            seconds = time.monotonic() - start
            code = process.wait()  # or it is taken for one that can be asked for the next image
            if seconds >= SECONDS:
                reason = f"takes more than {SECONDS:g} seconds to read: make it smaller"
            else:
                end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                reason = f"cannot be read, its decoder crashed ({end}): replace the file"
            return InputError(f"{in_one_line(path)} {reason} or leave it out.")
        return InputError(data.decode()) if kind == REFUSED else data

    @contextmanager
    def _claim(self, number: int) -> Iterator[None]:
        """Wait until there is room for so many bytes, of those for all processes together."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._claimed + number <= MEMORY)
            self._claimed += number
        try:
            yield
        finally:
            with self._changed:
                self._claimed -= number
                self._changed.notify_all()


def _pipe(pipe: IO[bytes] | None) -> Any:
    """Return a pipe of a process that was started with one."""
    assert pipe is not None
    return pipe


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    _pipe(process.stdin).write(data)
    _pipe(process.stdin).flush()


def _receive(process: subprocess.Popen[bytes]) -> tuple[bytes, int]:
    header = _pipe(process.stdout).read(ANSWER.size)
    if len(header) < ANSWER.size:
        raise EOFError
    kind, number = ANSWER.unpack(header)
    return kind, number


def serve(preprocessings: Sequence[dict[str, Any]] | None, seconds: float) -> None:
    """Read images for the process that started this one, until it ends.

    Parameters
    ----------
    preprocessings
        Their fields; null examines the images.
    seconds
        The time after which this process gives up an image and itself.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")

    def answer(kind: bytes, data: Sequence[memoryview] = (), number: int | None = None) -> None:
        answers.write(ANSWER.pack(kind, sum(map(len, data)) if number is None else number))
        answers.writelines(data)
        answers.flush()

    squares = [Preprocessing(**fields) for fields in preprocessings or ()]
    answer(STARTED)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # some decoders, libtiff for one, print what they think of a file
        os.dup2(nowhere, descriptor)
    warnings.simplefilter("ignore")
    _limit_memory(2 * MEMORY)

    def arm() -> None:
        # By a thread that needs no lock of the interpreter: it ends the process while a decoder holds that.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)

    def claim(memory: int) -> None:
        if memory > SMALL:
            faulthandler.cancel_dump_traceback_later()
            answer(NEEDS, number=memory)
            if not requests.read(1):
                sys.exit()
            arm()

    while header := requests.read(LENGTH.size):
        path = os.fsdecode(requests.read(*LENGTH.unpack(header)))
        arm()
        try:
            if preprocessings is None:
                kind, data = PIXELS, [memoryview(json.dumps(_examine(path, claim)).encode())]
            else:
                kind, data = PIXELS, [square.data.cast("B") for square in _squares(path, squares, claim)]
        except InputError as error:
            kind, data = REFUSED, [memoryview(str(error).encode())]
        # Only now, without the error, is the image's memory free, which the answer gives back to the others.
        faulthandler.cancel_dump_traceback_later()
        answer(kind, data)


def _limit_memory(more: int) -> None:
    """Have the kernel refuse this process more memory than that, where it can: a file may lie about its size."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return  # no Linux
    limit, most = pages * resource.getpagesize() + more, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
