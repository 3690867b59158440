"""A model's look at images, made fast: by the precision that the machine multiplies faster, and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal

import torch
from torch import Tensor

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
    compiled : bool
        Compile the encoders for batches of the size of the first, with their weights as constants. Others, such as a
        smaller last one, take the plain way.
    """

    def __init__(self, model: ImageCaptioner[Seen], precision: str | None = None, *, compiled: bool = False) -> None:
        self.model = model
        self.device = model.captioners[0].device
        self.precision = faster_precision(self.device) if precision is None else getattr(torch, precision)
        self._stance: Literal["default", "eager_on_recompile"] = "default"
        if compiled:
            for captioner in model.captioners:
                captioner.encoder.compile(dynamic=False, options={"freezing": True})

    def __call__(self, pixels: Sequence[Tensor]) -> Seen:
        """Look at images, see :meth:`ImageCaptioner.annotate_pixels`."""
        lower = self.precision != torch.float32
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.precision if lower else None, enabled=lower),
            torch.compiler.set_stance(self._stance),
        ):
            seen = self.model.annotate_pixels(pixels)
        self._stance = "eager_on_recompile"
        return seen
