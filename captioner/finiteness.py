"""The watch over a training's figures: it stops before a loss or a gradient that is not finite reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from captioner.errors import InputError


class Seen(NamedTuple):
    """A batch whose gradients have been taken and not been used yet.

    Attributes
    ----------
    image_ids : sequence
        Of its images.
    loss : Tensor
        Scalar, of this process.
    mean : Tensor
        Scalar, the average over the processes.
    """

    image_ids: Sequence[str | int]
    loss: Tensor
    mean: Tensor


class Watch:
    """Keeps what the batches since the last step gave, and looks at it once, before the next one.

    A device is waited for at a look, so there is one for all figures. Where several processes train, the figures that
    decide are the same in all of them, and so all of them stop.
    """

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    def note(self, image_ids: Sequence[str | int], loss: Tensor, mean: Tensor) -> None:
        """Keep the loss of a batch; see :class:`Seen`."""
        self._seen.append(Seen(image_ids, loss.detach(), mean))

    def look(self, gradients: Sequence[Tensor], norm: Tensor | None, *, when: str, saved: str) -> None:
        """See whether all is finite that was noted since the last look.

        Parameters
        ----------
        gradients : sequence of Tensor
            Of all that learns, summed over the batches and averaged over the processes.
        norm : Tensor or None
            Scalar, their norm; None where gradients need not be finite.
        when : str
            Which step it is, for people.
        saved : str
            Where one can go on from, as the end of a sentence.

        Raises
        ------
        InputError
            If a loss or a gradient is not finite. It names the images.
        """
        seen, self._seen = self._seen, []
        figures = [each.mean for each in seen] + ([] if norm is None else [norm])
        if not figures or torch.stack([figure.float() for figure in figures]).isfinite().all():
            return
        everywhere = _gather([(list(each.image_ids), float(each.loss)) for each in seen])
        if at_fault := [(images, loss) for images, loss in everywhere if not math.isfinite(loss)]:
            found = f"The loss is {at_fault[0][1]} in {when}"
        elif all(gradient.isfinite().all() for gradient in gradients):
            return  # large ones, whose norm is too large a number
        else:
            found, at_fault = f"The gradients are not finite in {when}, although the loss is", everywhere
        named = ", ".join(str(image_id) for images, _ in at_fault for image_id in images)
        raise InputError(
            f"{found}, where the images were {named}; the step was not taken, and {saved}: look at these images and "
            "their captions, or go on with a lower model.learning_rate or trainer.gradient_clip_val 1."
        )


def _gather(own: list[Any]) -> list[Any]:
    """Return the items of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return [item for part in gathered for item in part]
