"""Attention: the queries of an image weigh its regions and read one context vector each.

Shapes: B images, Q queries per image (beams, or captions in training), N regions, D annotation size, A attention size.
What does not depend on the query (the keys) is computed by :meth:`Attention.memory`, once per image, and is never
repeated for the queries: every tensor of a memory has B rows.

How the score functions are called elsewhere: *concat* (Luong et al., 2015, section 3.1), ``v^T tanh(W [q; a])``, splits
its matrix into the two of :class:`Additive` and is the same function, so it is not written twice; *multiplicative* is
:class:`General`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner import loops
from captioner.errors import InputError
from captioner.loops import Block

Memory = tuple[Tensor, ...]
Look = Callable[[Block, Tensor], tuple[Tensor, Tensor | None]]


class Annotations(NamedTuple):
    """What any encoder gives for a batch of images.

    Attributes
    ----------
    values : Tensor
        (B, N, D) annotation vectors, one per region.
    mask : Tensor or None
        (B, N), True where a region exists; None where all exist. Every image has at least one region.
    grid : tuple of int or None
        (h, w) with h * w == N where the regions are a grid, row by row.
    """

    values: Tensor
    mask: Tensor | None = None
    grid: tuple[int, int] | None = None

    def existing(self) -> Tensor:
        """Return the (B, N) mask, all True where there is none."""
        return self.values.new_ones(self.values.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    def mean(self) -> Tensor:
        """Return the (B, D) mean of the regions that exist."""
        if self.mask is None:
            return self.values.mean(1)
        share = self.mask.to(self.values.dtype)
        return (self.values * share[..., None]).sum(1) / share.sum(1, keepdim=True)


class Attention(nn.Module):
    """Soft attention with one set of weights per query (Bahdanau et al., 2015; Xu et al., 2015, eq. 4 to 6).

    A score function derives from this class and says what the keys are and how a query scores them.

    Attributes
    ----------
    context_dim : int
        Size of the context vector that a query reads.
    """

    context_dim: int

    def __init__(self, query_dim: int, annotation_dim: int) -> None:
        super().__init__()
        self.query_dim, self.annotation_dim = query_dim, annotation_dim
        self.context_dim = annotation_dim

    def memory(self, annotations: Annotations) -> Memory:
        """Return what does not depend on the query: keys, values (B, N, D) and, last, the existing regions (B, N)."""
        return self.keys(annotations.values), annotations.values, annotations.existing()

    def keys(self, values: Tensor) -> Tensor:
        """Return one key per region from the annotation vectors (B, N, D)."""
        return values

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return the (B, Q, N) scores of the regions for queries (B, Q, query_dim)."""
        raise NotImplementedError

    def weigh(self, query: Tensor, memory: Memory) -> Tensor:
        """Return the (B, Q, N) weights: not negative, sum 1 over the regions, 0 where there is none."""
        keys, _, mask = memory
        return normalise(self.scores(query, keys), mask[:, None])

    def read(self, weights: Tensor, memory: Memory) -> Tensor:
        """Return the (B, Q, context_dim) contexts: the expected annotation under the weights (Xu et al., eq. 13)."""
        values = memory[1]
        return torch.bmm(weights.to(values.dtype), values)

    def contexts(self, query: Tensor, memory: Memory) -> Tensor:
        """Return the (B, Q, context_dim) contexts alone: :meth:`read` of :meth:`weigh`, or a kernel that does both."""
        return self.read(self.weigh(query, memory), memory)

    def forward(self, query: Tensor, memory: Memory, need_weights: bool = True) -> tuple[Tensor, Tensor | None]:
        """Read one context per query.

        Parameters
        ----------
        query : Tensor
            (B, Q, query_dim).
        memory : tuple of Tensor
            What :meth:`memory` gave for the B images.
        need_weights : bool
            Return the weights, too, which a fused kernel never forms.

        Returns
        -------
        context : Tensor
            (B, Q, context_dim).
        weights : Tensor or None
            (B, Q, N); None where they are not needed, and from an attention that has none.
        """
        if not need_weights:
            return self.contexts(query, memory), None
        weights = self.weigh(query, memory)
        return self.read(weights, memory), weights

    def looks(self, memory: Memory, need_weights: bool = True) -> Look:
        """Return :meth:`forward` for the turns of a loop, which all ask one memory.

        It takes a :class:`~captioner.loops.Block` and its queries (M, query_dim), and gives the contexts
        (M, context_dim) and the weights (M, N) or None. An attention may share work between the turns.
        """

        def look(block: Block, query: Tensor) -> tuple[Tensor, Tensor | None]:
            seen = tuple(part[: block.images] for part in memory)
            context, weights = self(block.fill(query), seen, need_weights)
            return block.take(context), None if weights is None else block.take(weights)

        return look


def normalise(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the last dimension, in float32 at least, with exact zeros where `mask` is False."""
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


class Additive(Attention):
    """``v^T tanh(W q + U a + b)``: Bahdanau et al. (2015), appendix A.1.2; the attention of Xu et al. (2015), eq. 4.

    Parameters
    ----------
    query_dim, annotation_dim : int
        Sizes of a query and of an annotation vector.
    dim : int
        Size of the space in which they meet.
    """

    def __init__(self, query_dim: int, annotation_dim: int, *, dim: int = 512) -> None:
        super().__init__(query_dim, annotation_dim)
        self.dim = dim
        # One bias serves both; the softmax cancels one on the score, so it would never receive a gradient.
        self.query = nn.Linear(query_dim, dim, bias=False)
        self.key = nn.Linear(annotation_dim, dim)
        self.score = nn.Linear(dim, 1, bias=False)

    def keys(self, values: Tensor) -> Tensor:  # noqa: D102
        keys: Tensor = self.key(values)  # (B, N, A)
        return keys

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:  # noqa: D102
        queries = self.query(query)
        if keys.device.type == "cpu" and not torch.is_grad_enabled() and loops.is_plain(self.score, nn.Linear):
            return loops.additive_scores(queries, keys, self.score.weight)
        met = torch.tanh(queries[:, :, None] + keys[:, None])  # (B, Q, N, A)
        scores: Tensor = self.score(met).squeeze(-1)
        return scores

    def looks(self, memory: Memory, need_weights: bool = True) -> Look:  # noqa: D102
        keys, values, mask = memory
        plain = loops.is_plain(self, Additive) and loops.is_plain(self.score, nn.Linear)
        if keys.device.type != "cpu" or not torch.is_grad_enabled() or not plain:
            return super().looks(memory, need_weights)
        project, attend = loops.linear(self.query), loops.additive(keys, values, mask, self.score.weight)

        def look(block: Block, query: Tensor) -> tuple[Tensor, Tensor | None]:
            context, weights = attend(block, project(query))
            return context, weights if need_weights else None

        return look


class Dot(Attention):
    """``q . a`` (Luong et al., 2015, eq. 8): no parameters, so a query must be as long as an annotation vector.

    Raises
    ------
    InputError
        Where the two sizes differ.
    """

    def __init__(self, query_dim: int, annotation_dim: int) -> None:
        super().__init__(query_dim, annotation_dim)
        if query_dim != annotation_dim:
            raise InputError(
                f"{type(self).__name__} attention multiplies the decoder's state ({query_dim} values) with an "
                f"annotation vector ({annotation_dim} values), which must be equally long: set the "
                f"bridge's dim to {query_dim}, or choose General, Additive or MultiHead."
            )

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:  # noqa: D102
        return torch.bmm(query, keys.mT)


class ScaledDot(Dot):
    """``q . a / sqrt(d)`` (Vaswani et al., 2017, eq. 1), without projections."""

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:  # noqa: D102
        return super().scores(query, keys) / math.sqrt(self.query_dim)


class General(Attention):
    """``q^T W a`` (Luong et al., 2015, eq. 8), also called multiplicative."""

    def __init__(self, query_dim: int, annotation_dim: int) -> None:
        super().__init__(query_dim, annotation_dim)
        self.key = nn.Linear(annotation_dim, query_dim, bias=False)

    def keys(self, values: Tensor) -> Tensor:  # noqa: D102
        keys: Tensor = self.key(values)  # (B, N, query_dim)
        return keys

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:  # noqa: D102
        return torch.bmm(query, keys.mT)


class MultiHead(Attention):
    """Several scaled dot products side by side, each on its own projections (Vaswani et al., 2017, section 3.2.2).

    The weights returned are the mean over the heads. A context has `dim` values.

    Parameters
    ----------
    query_dim, annotation_dim : int
        Sizes of a query and of an annotation vector.
    heads : int
        Number of heads; must divide `dim`.
    dim : int
        Size of all heads together.

    Raises
    ------
    InputError
        Where `heads` does not divide `dim`.
    """

    def __init__(self, query_dim: int, annotation_dim: int, *, heads: int = 8, dim: int = 512) -> None:
        super().__init__(query_dim, annotation_dim)
        if heads < 1 or dim % heads:
            raise InputError(
                f"MultiHead attention cannot split dim {dim} into {heads} heads: choose a divisor of {dim}."
            )
        self.heads, self.dim = heads, dim
        self.context_dim = dim
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(annotation_dim, dim, bias=False)  # a bias would shift all scores of a query alike
        self.value = nn.Linear(annotation_dim, dim)
        self.output = nn.Linear(dim, dim)

    def memory(self, annotations: Annotations) -> Memory:
        """Return keys and values, both (B, heads, N, dim / heads), and the mask of existing regions (B, N)."""
        projected = (split_heads(project(annotations.values), self.heads) for project in (self.key, self.value))
        return *projected, annotations.existing()

    def weigh(self, query: Tensor, memory: Memory) -> Tensor:
        """Return the (B, heads, Q, N) weights of each head."""
        keys, _, mask = memory
        queries = split_heads(self.query(query), self.heads)
        return normalise(queries @ keys.mT / math.sqrt(keys.size(-1)), mask[:, None, None])

    def read(self, weights: Tensor, memory: Memory) -> Tensor:
        """Return the (B, Q, dim) contexts under the (B, heads, Q, N) weights of each head."""
        values = memory[1]
        contexts: Tensor = self.output(join_heads(weights.to(values.dtype) @ values))
        return contexts

    def contexts(self, query: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        keys, values, mask = memory
        queries = split_heads(self.query(query), self.heads)
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
        contexts: Tensor = self.output(join_heads(read))
        return contexts

    def forward(  # noqa: D102
        self, query: Tensor, memory: Memory, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = super().forward(query, memory, need_weights)
        return context, None if weights is None else weights.mean(1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (B, n, dim) as (B, heads, n, dim / heads)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return (B, heads, n, dim / heads) as (B, n, dim)."""
    return x.transpose(1, 2).flatten(2)


class Uniform(Attention):
    """The mean annotation at every step, whatever the query: the *par-inject* baseline (Tanti et al., 2018)."""

    def weigh(self, query: Tensor, memory: Memory) -> Tensor:  # noqa: D102
        mask = memory[-1]
        share = mask.to(torch.promote_types(query.dtype, torch.float32))
        weights = share / share.sum(1, keepdim=True)
        return weights[:, None].expand(-1, query.size(1), -1)


class NoAttention(Attention):
    """An empty context at every step: the decoder sees the image in its first state only.

    That is the *init-inject* baseline (Tanti et al., 2018), *Show and Tell* (Vinyals et al., 2015) with the image as
    the first state.
    """

    def __init__(self, query_dim: int, annotation_dim: int) -> None:
        super().__init__(query_dim, annotation_dim)
        self.context_dim = 0

    def memory(self, annotations: Annotations) -> Memory:
        """Return one empty (B, 0) tensor, which still says how many images there are."""
        return (annotations.values.new_empty(len(annotations.values), 0),)

    def forward(  # noqa: D102
        self, query: Tensor, memory: Memory, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return query.new_empty(*query.shape[:2], 0), None
