"""Objectives: what training minimises."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.attention import Annotations
from captioner.vocabulary import PAD, SPECIAL


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

    Where several processes train, words and captions count alike in whichever process they are; see :func:`share`.

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

    @property
    def needs_weights(self) -> bool:
        """Whether the attention enters the loss."""
        return self.doubly_stochastic != 0

    def forward(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None = None, mask: Tensor | None = None
    ) -> Loss:
        """Return the loss of a batch.

        Parameters
        ----------
        logits : Tensor
            (B, Q, T, V), or (K, V) of the K targets that are no padding.
        targets : Tensor
            (B, Q, T) ids, padded.
        weights : Tensor or None
            (B, Q, T, N) attention.
        mask : Tensor or None
            (B, N), True where a region exists; None: all exist.
        """
        if logits.dim() == 2 and logits.device.type == "cpu":
            words = targets[targets != PAD]
            cross_entropy: Tensor = _CrossEntropy.apply(logits, words, self.label_smoothing)
        else:
            words = targets.flatten() if logits.dim() == 4 else targets[targets != PAD]
            exact = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
            cross_entropy = F.cross_entropy(exact, words, ignore_index=PAD, label_smoothing=self.label_smoothing)
        cross_entropy = cross_entropy * share((words != PAD).sum())
        attention = cross_entropy.new_zeros(()) if weights is None else doubly_stochastic(weights, targets, mask)
        return Loss(cross_entropy + self.doubly_stochastic * attention, cross_entropy, attention)


class _CrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of logits (K, V) and targets (K,), in float32 at least, row by row.

    Some rows at a time stay in a processor's cache from the logits to their gradient, which is taken on the way. Torch
    writes and reads the whole matrix in float32 several times instead. There is no second derivative.
    """

    rows = 128

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        if len(logits) != len(targets):
            raise ValueError(f"There are {len(logits)} rows of logits for {len(targets)} targets.")
        exact = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=exact)
        for first in range(0, len(logits), _CrossEntropy.rows):
            some = slice(first, first + _CrossEntropy.rows)
            target = targets[some, None]
            likely = logits[some].to(exact).log_softmax(-1)
            total -= (1 - smoothing) * likely.gather(1, target).sum()
            if smoothing:
                total -= smoothing / logits.size(1) * likely.sum()
            slope = likely.exp_().sub_(smoothing / logits.size(1))
            slope.scatter_add_(1, target, slope.new_full(target.shape, smoothing - 1))
            gradient[some] = slope
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * (gradient / len(slopes)), None, None  # a scalar of float32 rounds nothing


def doubly_stochastic(weights: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (1 - sum_t alpha_ti)^2 over captions and existing regions; see :class:`CrossEntropy`."""
    spoken = targets != PAD  # (B, Q, T)
    looked = (weights * spoken[..., None]).sum(2)  # (B, Q, N)
    counts = spoken.any(2)[..., None].expand_as(looked)
    if mask is not None:
        counts = counts & mask[:, None]
    count = counts.sum()
    return ((1 - looked).square() * counts).sum() / count * share(count)


def share(count: Tensor) -> Tensor:
    """Return the number of a process's items by their average number per process: 1 where one process trains.

    DDP averages gradients as if every process had equally many words. A mean over a process's own items, times this,
    gives the gradient of the mean over the items of all. A mean over images needs it not: the sampler gives every
    process as many.
    """
    return count / average(count)


def average(values: Tensor) -> Tensor:
    """Return the averages of values over the processes, without gradient; where there is one, they are the values."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values.detach()
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


class WordPresence(nn.Module):
    """Which words an image's captions hold, told from its regions alone: a second teacher for an encoder that learns.

    At first attention is spread over all regions, so a caption teaches each of them next to nothing. Here every region
    gives every word a score, and the largest decide (a smooth maximum, log-mean-exp over the regions), so the region
    that shows a thing is the one that learns its name: multiple-instance learning, as Fang et al. (2015, section 3)
    detect words. The head is used in training only.

    Parameters
    ----------
    annotation_dim : int
        Size of the encoder's annotation vectors.
    vocabulary_size : int
        Number of ids.
    """

    def __init__(self, annotation_dim: int, vocabulary_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(annotation_dim, vocabulary_size - len(SPECIAL))

    def forward(self, annotations: Annotations, tokens: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the words and averaged over the images.

        Parameters
        ----------
        annotations : Annotations
            Of B images, as the encoder gives them.
        tokens : Tensor
            (B, Q, T) ids of their captions, padded.
        """
        mask = annotations.existing()
        scores = self.score(annotations.values).float().masked_fill(~mask[..., None], -torch.inf)  # (B, N, V)
        scores = scores.logsumexp(1) - mask.sum(1, keepdim=True).log()
        said = torch.zeros(len(scores), scores.size(1) + len(SPECIAL), device=scores.device)
        said = said.scatter(1, tokens.flatten(1), 1.0)[:, len(SPECIAL) :]
        return F.binary_cross_entropy_with_logits(scores, said, reduction="sum") / len(scores)
