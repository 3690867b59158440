"""What the turns of a loop over the words of given captions share: under teacher forcing on a CPU.

Autograd differentiates such a loop turn by turn: one product, one addition and one new tensor for every weight, key and
annotation at every turn. Here the turns leave what these gradients are made of, and after the last of them each
gradient is taken at once: :func:`linear` and :func:`additive` stand in a loop for a linear layer and for an
additive attention, give the same values and, but for rounding, the same gradients.

A *turn* is one step of a loop. Its *anchor* is a scalar without a value that enters every turn, so that autograd takes
the node that made it, the *total*, after all of them. There is no second derivative, and one graph's backward pass is
for one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LIMIT = 40.0  # e^80 is finite in float32; a product of two may be infinite, whose reciprocal is 0, as it should be
CACHED_BYTES = 3 * 2**20  # of scores at a time: with 1 MiB of cache a core, faster than all at once and than less


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
    """Return a linear layer for the turns of one loop, whose parameters' gradients are one product after it.

    A layer that is more than a linear one (a class of its own, hooks) and a layer on a GPU come back as they are.
    """
    if layer.weight.device.type != "cpu" or not torch.is_grad_enabled() or not is_plain(layer, nn.Linear):
        return layer
    loop = _LinearLoop(layer)
    anchor = _LinearTotal.apply(loop, layer.weight, layer.bias)

    def turn(x: Tensor) -> Tensor:
        product: Tensor = _LinearTurn.apply(x, loop.weight, anchor, loop)
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
    loop = _AdditiveLoop(keys.detach(), values.detach(), mask, score.detach())
    anchor = _AdditiveTotal.apply(loop, keys, values, score)

    def turn(block: Block, queries: Tensor) -> tuple[Tensor, Tensor]:
        contexts, weights = _AdditiveTurn.apply(queries, loop.values, anchor, loop, block)
        return contexts, weights

    return turn


def additive_scores(queries: Tensor, keys: Tensor, score: Tensor) -> Tensor:
    """Return v^T tanh(q + k), (B, Q, N) in float32 at least, without a gradient.

    Parameters
    ----------
    queries, keys : Tensor
        (B, Q, A) and (B, N, A), projected.
    score : Tensor
        (1, A), the vector v.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    queries, keys, score = exponential(queries.to(exact)), exponential(keys.to(exact)), score[0].to(exact)
    met = meet(queries, keys, queries.new_empty(*queries.shape[:2], *keys.shape[1:]))
    return score.sum() - 2 * torch.mv(met.flatten(0, -2), score).view(met.shape[:-1])


def exponential(x: Tensor) -> Tensor:
    """Return e^{2x}. Beyond +-40 x counts as 40: two such that are opposed no longer differ, the others have tanh 1."""
    return x.clamp(-LIMIT, LIMIT).mul_(2).exp_()


def meet(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """Return u = 1 / (1 + e^{2q} e^{2k}) of exponentials (B, Q, A) and (B, N, A), in `out` (B, Q, N, A).

    tanh(q + k) is 1 - 2u, so that a pair of query and key costs a product and a division. A tanh of each pair costs
    a CPU several times as much, and more than the decoder's other work between two products of matrices.
    """
    one = queries.new_ones(())
    return torch.addcmul(one, queries[:, :, None], keys[:, None], out=out).reciprocal_()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module does what its class says and nothing else, so that something may stand in for it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    replaced = any(callable(getattr(kind, name, None)) for name in vars(module))  # a method of this one alone
    return type(module) is kind and not hooked and not replaced


def _dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor: autocast's where that is on, which leaves float64 alone."""
    if like.dtype == torch.float64 or not torch.is_autocast_enabled("cpu"):
        return like.dtype
    return torch.get_autocast_dtype("cpu")


class _Loop:
    """What the turns of a loop share, and what they have left in a backward pass."""

    def __init__(self) -> None:
        self._entered = False
        self.forget()

    def forget(self) -> None:
        """Drop what a backward pass has left."""
        self._entered = False

    def enter(self) -> None:
        """Begin a backward pass, or go on with it.

        At its end all is dropped: the total may not be part of it, and then nothing else would do so.
        """
        if not self._entered:
            self._entered = True
            torch.autograd.Variable._execution_engine.queue_callback(self.forget)


class _LinearLoop(_Loop):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        dtype = _dtype(layer.weight)
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forget(self) -> None:
        super().forget()
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []


class _LinearTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, loop: _LinearLoop) -> Tensor:
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)  # the weight, too, so that autograd notices where it has changed since
        ctx.loop = loop
        return F.linear(x, weight, loop.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.loop.enter()
            ctx.loop.inputs.append(x.detach())  # with its history it would keep the whole graph alive
            ctx.loop.gradients.append(gradient.detach())
        with torch.autocast("cpu", enabled=False):
            return gradient @ weight, None, gradient.new_zeros(()), None


class _LinearTotal(torch.autograd.Function):
    """Makes the anchor, and takes the gradients of weight and bias after all turns."""

    @staticmethod
    def forward(ctx: Any, loop: _LinearLoop, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.loop, ctx.dtype = loop, weight.dtype
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        loop = ctx.loop
        gradients = torch.cat(loop.gradients)
        with torch.autocast("cpu", enabled=False):
            weight = (gradients.t() @ torch.cat(loop.inputs)).to(ctx.dtype)
        bias = None if loop.bias is None else gradients.sum(0, dtype=ctx.dtype)
        loop.forget()
        return None, weight, bias


class _AdditiveLoop(_Loop):
    """The keys as exponentials, the values, `slope` (A,), which is -2v, and sums of gradients."""

    def __init__(self, keys: Tensor, values: Tensor, mask: Tensor, score: Tensor) -> None:
        self.values = values.to(_dtype(values))
        self.exact = torch.promote_types(self.values.dtype, torch.float32)
        self.keys, self.slope = exponential(keys.to(self.exact)), -2 * score[0].to(self.exact)
        self.missing = None if mask.all() else ~mask
        super().__init__()

    def forget(self) -> None:
        super().forget()
        self._room = self.keys.new_empty(0)
        self.keys_gradient = self.slope_gradient = self.keys.new_zeros(())
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
    """Scores s = v^T tanh(q + k) = v^T (1 - 2u), of which the softmax cancels v^T 1; weights; contexts.

    ds/dv is -2u, but for a constant that cancels as well, and ds/dq = ds/dk = 4v u(1 - u). With the slope -2v: s is
    slope^T u, ds/dslope is u, and ds/dq is -2 slope u(1 - u).
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, values: Tensor, anchor: Tensor, loop: _AdditiveLoop, block: Block
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # none where the weights do not enter the loss
        ctx.loop, ctx.block, ctx.dtype = loop, block, queries.dtype
        queries = block.fill(exponential(queries.to(loop.exact)))
        scores = queries.new_empty(*queries.shape[:2], loop.keys.size(1))
        for images, met in loop.meet(queries):
            torch.mv(met.flatten(0, -2), loop.slope, out=scores[images].view(-1))
        if loop.missing is not None:
            scores.masked_fill_(loop.missing[: block.images, None], -torch.inf)
        weights = scores.softmax(-1)
        contexts = torch.bmm(weights.to(values.dtype), values[: block.images])
        ctx.save_for_backward(queries, weights, values)
        return block.take(contexts), block.take(weights)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, contexts_gradient: Tensor | None, weights_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _AdditiveTurn._backward(ctx, contexts_gradient, weights_gradient)

    @staticmethod
    def _backward(
        ctx: Any, contexts_gradient: Tensor | None, weights_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        loop, block = ctx.loop, ctx.block
        queries, weights, values = ctx.saved_tensors
        learns = ctx.needs_input_grad[2]  # keys, values or v
        if learns:
            loop.enter()
            if not loop.keys_gradient.dim():
                loop.keys_gradient, loop.slope_gradient = torch.zeros_like(loop.keys), torch.zeros_like(loop.slope)
        gradient = torch.zeros_like(weights)
        if weights_gradient is not None:
            gradient += block.fill(weights_gradient)
        if contexts_gradient is not None:
            contexts_gradient = block.fill(contexts_gradient.detach())
            gradient += torch.bmm(contexts_gradient, values[: block.images].mT)
            if learns:
                loop.weights.append(weights.to(values.dtype))
                loop.contexts_gradients.append(contexts_gradient)
        gradient = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))  # through the softmax
        queries_gradient = torch.empty_like(queries)
        for images, met in loop.meet(queries):
            one_query = gradient[images].flatten(0, 1)[:, None]  # (b * q, 1, N)
            if learns:
                loop.slope_gradient += torch.bmm(one_query, met.flatten(0, 1)).sum((0, 1))
            met.addcmul_(met, met, value=-1)  # u (1 - u)
            if learns:
                keys_gradient = loop.keys_gradient[images]
                for query in range(block.queries):
                    keys_gradient.addcmul_(met[:, query], gradient[images, query, :, None])
            queries_gradient[images] = torch.bmm(one_query, met.flatten(0, 1)).view(-1, block.queries, met.size(-1))
        queries_gradient *= -2 * loop.slope
        return block.take(queries_gradient).to(ctx.dtype), None, gradient.new_zeros(()), None, None


class _AdditiveTotal(torch.autograd.Function):
    """Makes the anchor, and takes the gradients of keys, values and v after all turns."""

    @staticmethod
    def forward(ctx: Any, loop: _AdditiveLoop, keys: Tensor, values: Tensor, score: Tensor) -> Tensor:
        ctx.loop, ctx.dtypes = loop, (keys.dtype, values.dtype, score.dtype)
        return keys.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        loop = ctx.loop
        images, regions, dim = loop.values.shape
        # All turns side by side, so that one product serves all: an image that a turn did not ask reads zeros there.
        queries = sum(weights.size(1) for weights in loop.weights)
        weights = loop.values.new_zeros(images, queries, regions)
        contexts = loop.values.new_zeros(images, queries, dim)
        first = 0
        for some, gradient in zip(loop.weights, loop.contexts_gradients, strict=True):
            asked, last = len(some), first + some.size(1)
            weights[:asked, first:last], contexts[:asked, first:last] = some, gradient
            first = last
        with torch.autocast("cpu", enabled=False):
            values_gradient = torch.bmm(weights.mT, contexts)
        gradients = loop.keys_gradient.mul_(-2 * loop.slope), values_gradient, -2 * loop.slope_gradient[None]
        loop.forget()
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
