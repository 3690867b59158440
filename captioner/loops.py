"""What the turns of a loop over the words of given captions share: under teacher forcing on a CPU.

Autograd differentiates such a loop turn by turn: one product, one addition and one new tensor for every weight, key and
annotation at every turn. Here the turns leave what these gradients are made of, and after the last of them each
gradient is taken at once: :func:`linear` and :func:`additive` stand in a loop for a linear layer and for an
additive attention, give the same values and, but for rounding, the same gradients. A second derivative they have not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 40.0
CACHED_BYTES = 3 * 2**20  # of scores at a time: faster than all at once, and than less


class Block(NamedTuple):
    """Where the queries of a turn stand: it asks the first images of a memory, some queries each.

    Attributes
    ----------
    images, queries : int
        The turn has room for `images * queries` queries.
    places : Tensor or None
        (M,) where its M queries stand among these, counted image by image; None: they are all of them, in order.
    """

    images: int
    queries: int
    places: Tensor | None = None

    def fill(self, rows: Tensor) -> Tensor:
        """Return rows (M, ...) as (images, queries, ...), zeros where there is none."""
        if self.places is not None:
            room = rows.new_zeros(self.images * self.queries, *rows.shape[1:])
            rows = room.index_copy(0, self.places, rows)
        return rows.view(self.images, self.queries, *rows.shape[1:])

    def take(self, values: Tensor) -> Tensor:
        """Return the rows (M, ...) of values (images, queries, ...)."""
        rows = values.flatten(0, 1)
        return rows if self.places is None else rows.index_select(0, self.places)


def linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return a linear layer for the turns of one loop, whose parameters' gradients are one product after it."""
    if layer.weight.device.type != "cpu" or not torch.is_grad_enabled():
        return layer
    turns = _LinearTurns(layer)
    anchor = _LinearTotal.apply(turns, layer.weight, layer.bias)

    def turn(x: Tensor) -> Tensor:
        product: Tensor = _LinearTurn.apply(x, anchor, turns, turns.next())
        return product

    return turn


def additive(
    keys: Tensor, values: Tensor, mask: Tensor, score: Tensor
) -> Callable[[Block, Tensor], tuple[Tensor, Tensor]]:
    """Return additive attention, with the softmax and the read, for the turns of one loop.

    Parameters
    ----------
    keys, values : Tensor
        (B, N, A) and (B, N, D).
    mask : Tensor
        (B, N), True where a region exists.
    score : Tensor
        (1, A), the vector v.

    Returns
    -------
    callable
        Takes a :class:`Block` and its projected queries (M, A); gives the contexts (M, D) and the weights (M, N).
    """
    turns = _AdditiveTurns(keys.detach(), values.detach(), mask, score.detach())
    anchor = _AdditiveTotal.apply(turns, keys, values, score)

    def turn(block: Block, queries: Tensor) -> tuple[Tensor, Tensor]:
        contexts, weights = _AdditiveTurn.apply(queries, anchor, turns, block, turns.next())
        return contexts, weights

    return turn


def additive_scores(queries: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """Return v^T tanh(q + k) but for a constant, which a softmax cancels: (B, Q, N), without a gradient.

    Parameters
    ----------
    queries, keys : Tensor
        (B, Q, A) and (B, N, A), projected.
    score : Tensor
        (1, A), the vector v.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = exponential(queries.to(exact)), exponential(keys.to(exact))
        met = meet(queries, keys, queries.new_empty(*queries.shape[:2], *keys.shape[1:]))
        return _dot(met, -2 * score[0].to(exact))


def exponential(x: Tensor) -> Tensor:
    """Return e^{2x}. Beyond +-40, where it would soon not be finite, x counts as 40: tanh is 1 from 20 on."""
    return x.clamp(-LIMIT, LIMIT).mul_(2).exp_()


def meet(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """Return u = 1 / (1 + e^{2q} e^{2k}) of exponentials (B, Q, A) and (B, N, A), in `out` (B, Q, N, A).

    tanh(q + k) is 1 - 2u, so that a pair of query and key costs a product and a division. A tanh of each pair costs
    a CPU several times as much, and more than the decoder's other work between two products of matrices.
    """
    one = queries.new_ones(())
    return torch.addcmul(one, queries[:, :, None], keys[:, None], out=out).reciprocal_()


def _dot(met: Tensor, score: Tensor) -> Tensor:
    return torch.mv(met.flatten(0, -2), score).view(met.shape[:-1])


def _dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor: autocast's where that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype


class _Turns:
    """Counts the turns of a loop, and knows in the backward pass when one begins anew.

    Each backward pass takes the turns from the last to the first. One that asks for no gradient of what is shared
    leaves its sums behind, which the next must not add to.
    """

    def __init__(self) -> None:
        self.count, self._seen = 0, 0

    def next(self) -> int:
        self.count += 1
        return self.count

    def enter(self, turn: int) -> None:
        if turn >= self._seen:
            self.forget()
        self._seen = turn

    def forget(self) -> None:
        """Drop the sums of a backward pass."""
        raise NotImplementedError


class _LinearTurns(_Turns):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        dtype = _dtype(layer.weight)
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.forget()

    def forget(self) -> None:
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []


class _LinearTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, turns: _LinearTurns, turn: int) -> Tensor:
        x = x.to(turns.weight.dtype)
        ctx.save_for_backward(x)
        ctx.turns, ctx.turn = turns, turn
        return F.linear(x, turns.weight, turns.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        turns = ctx.turns
        turns.enter(ctx.turn)
        turns.inputs += ctx.saved_tensors
        turns.gradients.append(gradient)
        return gradient @ turns.weight, gradient.new_zeros(()), None, None


class _LinearTotal(torch.autograd.Function):
    """Gives the turns an anchor, so that its backward pass comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, turns: _LinearTurns, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.turns, ctx.dtype = turns, weight.dtype
        return weight.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        turns = ctx.turns
        gradients = torch.cat(turns.gradients)
        weight = (gradients.t() @ torch.cat(turns.inputs)).to(ctx.dtype)
        bias = None if turns.bias is None else gradients.sum(0, dtype=ctx.dtype)
        turns.forget()
        return None, weight, bias


class _AdditiveTurns(_Turns):
    """Attributes that are not gradients are constants of the loop; `score` is -2v, that of u in :func:`meet`."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor, score: Tensor) -> None:
        super().__init__()
        self.values = values.to(_dtype(values))
        self.exact = torch.promote_types(self.values.dtype, torch.float32)
        self.keys, self.score = exponential(keys.to(self.exact)), -2 * score[0].to(self.exact)
        self.missing = None if mask.all() else ~mask
        self._room = self.keys.new_empty(0)
        self.forget()

    def forget(self) -> None:
        self.keys_gradient = self.score_gradient = self.keys.new_zeros(())
        self.weights: list[Tensor] = []
        self.contexts_gradients: list[Tensor] = []

    def meet(self, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Give u of a turn's exponentials (b, q, A) and the keys: some images, and their (some, q, N, A).

        All are written to the same small memory, which stays in a processor's cache.
        """
        shape = queries.size(1), *self.keys.shape[1:]
        one = math.prod(shape)
        some = min(max(1, CACHED_BYTES // (one * queries.element_size())), len(queries))
        if self._room.numel() < some * one:
            self._room = queries.new_empty(some * one)
        for first in range(0, len(queries), some):
            images = slice(first, min(first + some, len(queries)))
            asked = queries[images]
            yield images, meet(asked, self.keys[images], self._room[: len(asked) * one].view(len(asked), *shape))


class _AdditiveTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, anchor: Tensor, turns: _AdditiveTurns, block: Block, turn: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # none where the weights do not enter the loss
        ctx.dtype = queries.dtype
        with torch.autocast("cpu", enabled=False):
            queries = block.fill(exponential(queries.to(turns.exact)))
            scores = queries.new_empty(*queries.shape[:2], turns.keys.size(1))
            for images, met in turns.meet(queries):
                torch.mv(met.flatten(0, -2), turns.score, out=scores[images].view(-1))
            if turns.missing is not None:
                scores.masked_fill_(turns.missing[: block.images, None], -torch.inf)
            weights = scores.softmax(-1)
            contexts = torch.bmm(weights.to(turns.values.dtype), turns.values[: block.images])
        ctx.save_for_backward(queries, weights)
        ctx.turns, ctx.block, ctx.turn = turns, block, turn
        return block.take(contexts), block.take(weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, contexts_gradient: Tensor | None, weights_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        turns, block = ctx.turns, ctx.block
        queries, weights = ctx.saved_tensors
        turns.enter(ctx.turn)
        gradient = torch.zeros_like(weights)
        if weights_gradient is not None:
            gradient += block.fill(weights_gradient)
        if contexts_gradient is not None:
            contexts_gradient = block.fill(contexts_gradient)
            gradient += torch.bmm(contexts_gradient, turns.values[: block.images].mT)
            turns.weights.append(weights.to(turns.values.dtype))
            turns.contexts_gradients.append(contexts_gradient)
        # Through the softmax to the scores -2 v^T u, and through u, whose derivative is -2 u (1 - u).
        gradient = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
        if not turns.keys_gradient.dim():
            turns.keys_gradient, turns.score_gradient = torch.zeros_like(turns.keys), torch.zeros_like(turns.score)
        queries_gradient = torch.empty_like(queries)
        for images, met in turns.meet(queries):
            one_query = gradient[images].flatten(0, 1)[:, None]  # (b * q, 1, N)
            turns.score_gradient += torch.bmm(one_query, met.flatten(0, 1)).sum((0, 1))
            slope = met.addcmul_(met, met, value=-1)
            keys_gradient = turns.keys_gradient[images]
            for query in range(block.queries):
                keys_gradient.addcmul_(slope[:, query], gradient[images, query, :, None])
            queries_gradient[images] = torch.bmm(one_query, slope.flatten(0, 1)).view(-1, block.queries, slope.size(-1))
        queries_gradient *= -2 * turns.score
        return block.take(queries_gradient).to(ctx.dtype), gradient.new_zeros(()), None, None, None


class _AdditiveTotal(torch.autograd.Function):
    """Gives the turns an anchor, so that its backward pass comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, turns: _AdditiveTurns, keys: Tensor, values: Tensor, score: Tensor) -> Tensor:
        ctx.turns, ctx.dtypes = turns, (keys.dtype, values.dtype, score.dtype)
        return keys.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        turns = ctx.turns
        images, regions, _ = turns.values.shape
        # All turns side by side, so that one product serves all: an image that a turn did not ask reads zeros there.
        queries = sum(weights.size(1) for weights in turns.weights)
        weights = turns.values.new_zeros(images, queries, regions)
        contexts = turns.values.new_zeros(images, queries, turns.values.size(2))
        first = 0
        for some, gradient in zip(turns.weights, turns.contexts_gradients, strict=True):
            asked, last = len(some), first + some.size(1)
            weights[:asked, first:last], contexts[:asked, first:last] = some, gradient
            first = last
        gradients = (
            turns.keys_gradient.mul_(-2 * turns.score),
            torch.bmm(weights.mT, contexts),
            -2 * turns.score_gradient[None],
        )
        turns.forget()
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
