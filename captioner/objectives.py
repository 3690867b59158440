"""Objectives: what training minimises."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from captioner.vocabulary import PAD


class Loss(NamedTuple):
    """A loss and its parts, each a scalar tensor."""

    total: Tensor
    cross_entropy: Tensor
    attention: Tensor


class CrossEntropy(nn.Module):
    """Cross-entropy per word with the doubly stochastic term (Xu et al., 2015, eq. 14).

    The term asks each region to be looked at as often as every other over a caption. Its reduction here: the square
    (1 - sum_t alpha_ti)^2, t over the words of the caption and its end, is averaged over the captions and over the
    regions that exist. Padding adds nothing to the sum, and captions that are padding alone do not count.

    Parameters
    ----------
    label_smoothing : float
        Share of the probability spread over all words.
    doubly_stochastic : float
        Weight of the term, lambda in the paper.
    """

    def __init__(self, label_smoothing: float = 0.0, doubly_stochastic: float = 1.0) -> None:
        super().__init__()
        self.label_smoothing, self.doubly_stochastic = label_smoothing, doubly_stochastic

    def forward(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None = None, mask: Tensor | None = None
    ) -> Loss:
        """Return the loss of a batch.

        Parameters
        ----------
        logits : Tensor
            (B, Q, T, V).
        targets : Tensor
            (B, Q, T) ids, padded.
        weights : Tensor or None
            (B, Q, T, N) attention.
        mask : Tensor or None
            (B, N), True where a region exists; None: all exist.
        """
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 2).float(), targets.flatten(), ignore_index=PAD, label_smoothing=self.label_smoothing
        )
        attention = cross_entropy.new_zeros(()) if weights is None else doubly_stochastic(weights, targets, mask)
        return Loss(cross_entropy + self.doubly_stochastic * attention, cross_entropy, attention)


def doubly_stochastic(weights: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (1 - sum_t alpha_ti)^2 over captions and existing regions; see :class:`CrossEntropy`."""
    spoken = targets != PAD  # (B, Q, T)
    looked = (weights * spoken[..., None]).sum(2)  # (B, Q, N)
    counts = spoken.any(2)[..., None].expand_as(looked)
    if mask is not None:
        counts = counts & mask[:, None]
    return ((1 - looked).square() * counts).sum() / counts.sum()
