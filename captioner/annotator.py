"""A model's look at images, made fast: by the precision that the machine multiplies faster, and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

from captioner.attention import Annotations
from captioner.errors import InputError
from captioner.model import ImageCaptioner, Seen
from captioner.precision import faster_precision


class Annotator(Generic[Seen]):
    """Does for many batches of images what :meth:`ImageCaptioner.annotate_pixels` does.

    Encoders alone are made faster: they take most of the time. What they give is float32 again, which decoders search
    by; so captions differ from those of the plain way by the rounding of annotations.

    Parameters
    ----------
    model : ImageCaptioner
        Whose encoders are compiled in place, if they are.
    precision : {"float32", "bfloat16"}, optional
        Of the encoders' products and convolutions; by default the one that is faster on the model's device.
    compiled_for : int, optional
        Compile the encoders for batches of this size, with their weights as constants. Smaller batches are filled up
        for them: another size would be compiled anew.

    Raises
    ------
    InputError
        Where the device has no such precision, or, when it is called, where nothing can be compiled.
    """

    def __init__(
        self, model: ImageCaptioner[Seen], precision: str | None = None, *, compiled_for: int | None = None
    ) -> None:
        self.model = model
        self.device = model.captioners[0].device
        self.precision = faster_precision(self.device) if precision is None else getattr(torch, precision)
        self._lower = self.precision != torch.float32
        if self._lower and not torch.amp.is_autocast_available(self.device.type):
            raise InputError(f"The device {self.device} has no {precision}: leave out the precision.")
        self._size = compiled_for
        if compiled_for is not None:
            for captioner in model.captioners:
                captioner.encoder.compile(dynamic=False)

    def __call__(self, pixels: Sequence[Tensor]) -> Seen:
        """Look at images, see :meth:`ImageCaptioner.annotate_pixels`."""
        images = len(pixels[0])
        constants: AbstractContextManager[object] = nullcontext()
        if self._size is not None:
            pixels = [_filled(each, self._size) for each in pixels]
            # Not an option of compile(): dynamo reads the setting itself.
            constants = torch._inductor.config.patch(freezing=True)
        lower = torch.autocast(self.device.type, self.precision if self._lower else None, enabled=self._lower)
        try:
            with torch.no_grad(), lower, constants:
                seen = self.model.annotate_pixels(pixels)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"The encoder cannot be compiled here ({reason}): see that a C++ compiler is installed, or do without."
            ) from error
        return seen if self._size is None else _first(seen, images)


def _filled(pixels: Tensor, size: int) -> Tensor:
    """Repeat the last image until there are so many."""
    return torch.cat((pixels, pixels[-1:].expand(size - len(pixels), *pixels.shape[1:])))


def _first(seen: Seen, images: int) -> Seen:
    """Keep what was seen of so many images."""
    if isinstance(seen, Annotations):
        mask = None if seen.mask is None else seen.mask[:images]
        return seen._replace(values=seen.values[:images], mask=mask)
    return [_first(each, images) for each in seen]  # type: ignore[attr-defined, return-value]
