"""A model's captions, made faster: by the precision that the machine multiplies faster, by threads, and compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import MethodType
from typing import Generic, TypeVar

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

from captioner.attention import Annotations, Memory
from captioner.decoders import State
from captioner.decoding import Decoding
from captioner.errors import InputError
from captioner.model import Caption, Captioner, ImageCaptioner, Seen
from captioner.search import StepFunction

SHAPES = 64  # that one function is compiled for: a few for each member of an ensemble
THREADS = 8  # batches at a time: with many more they would wait for the interpreter's lock

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class FastCaptioner(Generic[Seen]):
    """Captions many batches of images as an :class:`ImageCaptioner` does, faster.

    Encoders take most of the time, and only they compute in the lower precision. What they give is float32 again, which
    decoders search by; so captions differ from those of the plain way by the rounding of annotations alone.

    Parameters
    ----------
    model : ImageCaptioner
        Whose encoders and steps are compiled in place, if they are.
    precision : {"float32", "bfloat16"}
        Of the encoders' products and convolutions.
    compiled_for : int, optional
        Compile the encoders for batches of this size, and the steps of the search for any, with weights as constants,
        unless it was done before. Smaller batches are filled up, as another size would be compiled anew; those of less
        than half the size take the plain way.

    Raises
    ------
    InputError
        Where the device has no such precision, or, when it is called, where nothing can be compiled.
    """

    def __init__(self, model: ImageCaptioner[Seen], precision: str, *, compiled_for: int | None = None) -> None:
        self.model = model
        self.device = model.captioners[0].device
        self.precision = getattr(torch, precision)
        self._lower = self.precision != torch.float32
        if self._lower and not torch.amp.is_autocast_available(self.device.type):
            raise InputError(f"The device {self.device} has no {precision}: leave out the precision.")
        self._size = compiled_for
        self._is_ready = compiled_for is None or all(_is_compiled(each, compiled_for) for each in model.captioners)
        if compiled_for is not None and not self._is_ready:
            for captioner in model.captioners:
                captioner.annotate = _CompiledLook(captioner, compiled_for)  # type: ignore[method-assign]
                captioner.step = _compiled_step(captioner)  # type: ignore[assignment, method-assign]

    def annotate_pixels(self, pixels: Sequence[Tensor]) -> Seen:
        """Look at images, see :meth:`ImageCaptioner.annotate_pixels`."""
        images, size = len(pixels[0]), self._size or 0
        lower = torch.autocast(self.device.type, self.precision if self._lower else None, enabled=self._lower)
        with torch.no_grad(), lower, self._compiling():
            if images < size <= 2 * images:
                return _first(self.model.annotate_pixels([_filled(each, size) for each in pixels]), images)
            return self.model.annotate_pixels(pixels)

    def caption_pixels(
        self,
        pixels: Sequence[Tensor],
        decoding: Decoding,
        *,
        numbers: Sequence[int] | None = None,
        with_attention: bool = True,
    ) -> list[list[Caption]]:
        """Caption images, given as for :meth:`annotate_pixels`; see :meth:`ImageCaptioner.caption_annotations`."""
        seen = self.annotate_pixels(pixels)
        return self.caption_seen(seen, decoding, numbers=numbers, with_attention=with_attention)

    def caption_seen(
        self,
        seen: Seen,
        decoding: Decoding,
        *,
        numbers: Sequence[int] | None = None,
        with_attention: bool = True,
    ) -> list[list[Caption]]:
        """Caption images by what was seen of them; see :meth:`ImageCaptioner.caption_annotations`."""
        with self._compiling():
            return self.model.caption_annotations(seen, decoding, numbers=numbers, with_attention=with_attention)

    def work_through(
        self, batches: Iterable[Batch], work: Callable[[Batch], Result], expected: int
    ) -> Generator[Result, None, None]:
        """Do what calls for captions of each batch, several at a time where that is faster.

        A CPU's cores take a batch each: an encoder computes no slower so, and what keeps only one core busy, as much of
        a search does, keeps none idle. Where there are more cores than batches to share, several take one together.

        Parameters
        ----------
        batches
            A few are taken ahead of what is given.
        work : callable
            Called with a batch in a thread of its own. It may use this captioner.
        expected : int
            Number of batches, by which the cores are shared out. A run that goes on from another has to name the same
            one for the same rounding.

        Yields
        ------
        Result
            What `work` returns, in the order of the batches.
        """
        cores = torch.get_num_threads()
        threads = min(cores, THREADS, expected // 2) if self.device.type == "cpu" else 1
        if threads < 2:
            yield from map(work, batches)
            return
        ahead: deque[Future[Result]] = deque()
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,))
        try:
            for number, batch in enumerate(batches):
                ahead.append(pool.submit(work, batch))
                if number == 0 and not self._is_ready:
                    ahead[0].result()  # or each thread would compile by itself
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)  # which is for this thread, too, and those to come

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        if self._size is None:
            yield
            return
        # Not options of compile(): dynamo reads the settings themselves.
        constants, shapes = (
            torch._inductor.config.patch(freezing=True),
            torch._dynamo.config.patch(recompile_limit=SHAPES),
        )
        try:
            with constants, shapes:
                yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"The model cannot be compiled here ({reason}): see that a C++ compiler is installed, or do without."
            ) from error


class _CompiledLook:
    """A captioner's `annotate`, compiled for batches of one size; others take the plain way."""

    def __init__(self, captioner: Captioner, size: int) -> None:
        self.size = size
        self._plain: Callable[[Tensor], Annotations] = MethodType(type(captioner).annotate, captioner)
        self._fast: Callable[[Tensor], Annotations] = torch.compile(self._plain, dynamic=False)

    def __call__(self, images: Tensor) -> Annotations:
        return (self._fast if len(images) == self.size else self._plain)(images)


def _is_compiled(captioner: Captioner, size: int) -> bool:
    look = captioner.annotate
    return isinstance(look, _CompiledLook) and look.size == size


def _compiled_step(captioner: Captioner) -> StepFunction:
    step: StepFunction = MethodType(type(captioner).step, captioner)
    fast: StepFunction = torch.compile(step, dynamic=True)

    def faster(words: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
        # For one image it would be compiled by itself: sizes of one are no sizes like others, nor are other strides.
        return (fast if len(memory[0]) > 1 else step)(words.contiguous(), memory, state)

    return faster


def _filled(pixels: Tensor, size: int) -> Tensor:
    """Repeat the last image until there are so many."""
    return torch.cat((pixels, pixels[-1:].expand(size - len(pixels), *pixels.shape[1:])))


def _first(seen: Seen, images: int) -> Seen:
    """Keep what was seen of so many images."""
    if isinstance(seen, Annotations):
        mask = None if seen.mask is None else seen.mask[:images]
        return seen._replace(values=seen.values[:images], mask=mask)
    return [_first(each, images) for each in seen]  # type: ignore[attr-defined, return-value]
