"""An exponential moving average of weights, which is often better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MovingAverage:
    """The average of tensors over the steps of their training (Polyak and Juditsky, 1992, with forgetting).

    After n updates the next one keeps the share min(`decay`, (1 + n) / (10 + n)) of the average. So a short run
    averages over its last tenth or so, and does not drag along what it began with.

    Parameters
    ----------
    decay : float
        Largest share that is kept, below 1.
    tensors : mapping of str to Tensor
        What the average starts with; copied, floating-point values in float32 at least.
    updates : int
        n to begin with, of an average that goes on.
    """

    def __init__(self, decay: float, tensors: Mapping[str, Tensor], updates: int = 0) -> None:
        self.decay, self.updates = decay, updates
        self.values = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Take another step's tensors in."""
        share = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = list(self.values.values())
        torch._foreach_lerp_(own, [tensors[name].to(value.dtype) for name, value in self.values.items()], 1 - share)
        self.updates += 1

    @torch.no_grad()
    def swap(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the average in the tensors' place and keep theirs, or the other way round again."""
        for name, value in self.values.items():
            kept = tensors[name].to(value.dtype, copy=True)
            tensors[name].copy_(value)
            value.copy_(kept)

    def to(self, tensors: Mapping[str, Tensor]) -> None:
        """Move the average to where the tensors are."""
        self.values = {name: value.to(tensors[name].device) for name, value in self.values.items()}
