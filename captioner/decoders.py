"""Decoders: the equations of *Show, Attend and Tell* (Xu et al., ICML 2015), by number, and of its neighbours.

Words in, words out, both in embedding space: a decoder knows neither the vocabulary nor the encoder. The LSTM is that
of the paper, the GRU the one it came from (Bahdanau, Cho and Bengio, ICLR 2015), the Transformer the one that came
after (Vaswani et al., NeurIPS 2017).

Shapes: B images, Q captions per image, N regions, D annotation size, E embedding size, H hidden size, T words. A memory
has B rows. Words and states have B * Q rows, image by image. Nothing of a memory is ever repeated Q times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner import loops
from captioner.attention import Additive, Annotations, Attention, Memory, MultiHead, join_heads, split_heads
from captioner.errors import InputError
from captioner.loops import Block

State = tuple[Tensor, ...]
Look = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# linear(layer)(x) is layer(x); in a loop over given words the layer's gradient is then taken once.
Linear = Callable[[nn.Linear], Callable[[Tensor], Tensor]]


class Step(NamedTuple):
    """One step of a decoder.

    Attributes
    ----------
    output : Tensor
        (B * Q, E), from which the output layer scores the next word.
    state : tuple of Tensor
        B * Q rows each.
    weights : Tensor or None
        (B, Q, N) attention, where it was asked for.
    gate : Tensor or None
        (B, Q), the gate beta.
    """

    output: Tensor
    state: State
    weights: Tensor | None
    gate: Tensor | None


class Outputs(NamedTuple):
    """All steps of a decoder under teacher forcing.

    Attributes
    ----------
    outputs : Tensor
        (B * Q, T, E).
    weights : Tensor or None
        (B, Q, T, N) attention, where it was asked for.
    gates : Tensor or None
        (B, Q, T), the gate beta.
    """

    outputs: Tensor
    weights: Tensor | None
    gates: Tensor | None


class Decoder(nn.Module):
    """What a decoder is: a memory of the image, a first state, and a step from word to word.

    Parameters
    ----------
    embedding_dim : int
        E, size of a word's embedding and of a step's output.
    annotation_dim : int
        D, size of the annotation vectors it attends over.

    Attributes
    ----------
    scales_words : bool
        Whether the decoder wants words of unit variance, those of an embedding that is the output layer's, too, scaled
        by sqrt(E).
    """

    scales_words = False

    def __init__(self, embedding_dim: int, annotation_dim: int) -> None:
        super().__init__()
        self.embedding_dim, self.annotation_dim = embedding_dim, annotation_dim

    def memory(self, annotations: Annotations) -> Memory:
        """Return what a caption does not change, B rows: computed once per image."""
        raise NotImplementedError

    def start(self, memory: Memory, queries: int) -> State:
        """Return the state before the first word, B * queries rows."""
        raise NotImplementedError

    def step(self, word: Tensor, memory: Memory, state: State, need_weights: bool = True) -> Step:
        """Take the embedding of the previous word (B * Q, E) and return the step to the next.

        Without `need_weights` the step carries none, and attention that can be fused is.
        """
        raise NotImplementedError

    def forward(
        self, words: Tensor, memory: Memory, need_weights: bool = True, lengths: Tensor | None = None
    ) -> Outputs:
        """Teacher forcing: the steps over given words (B * Q, T, E), equal to :meth:`step` word by word.

        With the `lengths` (B, Q) of the captions, on the CPU, a decoder need not take the steps behind a caption's end;
        what it returns for these is finite and means nothing.
        """
        raise NotImplementedError

    def head_weights(self, words: Tensor, memory: Memory) -> Tensor | None:
        """Return the attention of every layer and head over given words (B * Q, T, E): (B, Q, layers, heads, T, N).

        A decoder of one attention gives the weights of :meth:`forward` as those of one layer and one head.
        """
        weights = self(words, memory).weights
        return None if weights is None else weights[:, :, None, None]


class _Turn(NamedTuple):
    """One turn of a recurrent decoder: Step without what can be computed for all words at once.

    `spoken` is the state that the output layer reads (B * Q, H), `context` what it reads of the image (B * Q, C).
    """

    state: State
    spoken: Tensor
    context: Tensor
    weights: Tensor | None
    gate: Tensor | None


ROW_MULTIPLE = 8  # of the rows of a step under teacher forcing: a few more of them, and many kernels fewer


class _Plan:
    """Which captions take which step under teacher forcing.

    One that has ended takes a step only to fill up a multiple of ROW_MULTIPLE.

    Captions are sorted by their length, so that those that take a step are the first rows of a state. Packed are the
    rows of all steps, P of them, step by step. Attention is asked image by image, so that a memory is cut and never
    repeated: images are sorted by their longest caption, and the queries of a step have their places in a
    :class:`~captioner.loops.Block` of the first.

    Parameters
    ----------
    images, queries, words : int
        B, Q and T.
    lengths : Tensor or None
        (B, Q) words of each caption, on the CPU; None: all have T, and nothing is sorted.

    Attributes
    ----------
    blocks : list of Block
        Where the queries of each step stand that any caption takes.
    """

    def __init__(self, images: int, queries: int, words: int, lengths: Tensor | None) -> None:
        self.images, self.queries, self.words = images, queries, words
        self.blocks, self._counts = [Block(images, queries)] * words, [images * queries] * words
        # The order of images and captions, and the places (P,) of packed rows among B * Q * T; None: as they come.
        self._images: Tensor | None = None
        self._captions: Tensor | None = None
        self._places: Tensor | None = None
        if lengths is None:
            return
        lengths, captions = lengths.clamp(min=1).sort(1, descending=True)  # an empty caption takes one step
        self._images = lengths[:, 0].argsort(descending=True)
        lengths = lengths[self._images]
        captions = (captions + queries * torch.arange(images)[:, None])[self._images].flatten()
        longest_first = lengths.flatten().argsort(descending=True)
        self._captions = captions[longest_first]
        # A kernel is made anew for every number of rows, so there are few: some captions take a step behind their end.
        active = (lengths > torch.arange(int(lengths[0, 0]))[:, None, None]).sum((1, 2))  # (T,)
        self._counts = (-(-active // ROW_MULTIPLE) * ROW_MULTIPLE).clamp(max=images * queries).tolist()
        image, query = longest_first // queries, longest_first % queries
        most = (torch.stack((image, query), 1).cummax(0).values + 1).tolist()
        self.blocks = [
            Block(rows, columns, image[:count] * columns + query[:count])
            for count, (rows, columns) in ((count, most[count - 1]) for count in self._counts)
        ]
        self._places = torch.cat([self._captions[:count] * words + t for t, count in enumerate(self._counts)])

    def sort(self, memory: Memory) -> Memory:
        """Return a memory with its images in the order of the blocks."""
        return _in_order(memory, self._images)

    def sort_captions(self, state: State) -> State:
        """Return a state with its rows in the order of their lengths."""
        return _in_order(state, self._captions)

    def cut(self, state: State, t: int) -> State:
        """Return the rows of a state before step t that go on."""
        goes_on = self._counts[t]
        return state if goes_on == len(state[0]) else tuple(part[:goes_on] for part in state)

    def pack(self, values: Tensor) -> Tensor:
        """Return the (P, ...) rows of (B * Q, T, ...) that take their step."""
        if self._places is None:
            return values.transpose(0, 1).flatten(0, 1)
        return values.flatten(0, 1).index_select(0, self._places)

    def steps(self, packed: Tensor | None) -> Sequence[Tensor | None]:
        """Return the rows of each step apart, or nothing for each where there is nothing."""
        return [None] * len(self._counts) if packed is None else torch.split(packed, self._counts)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return (B, Q, T, ...) from packed rows, zeros where no step was taken."""
        captions = self.images * self.queries
        if self._places is None:
            values = packed.view(self.words, captions, *packed.shape[1:]).transpose(0, 1)
        else:
            values = packed.new_zeros(captions * self.words, *packed.shape[1:]).index_copy(0, self._places, packed)
        return values.reshape(self.images, self.queries, self.words, *packed.shape[1:])


def _in_order(rows: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return rows if order is None else tuple(part.index_select(0, order) for part in rows)


class RecurrentDecoder(Decoder):
    """What the LSTM and the GRU share: an attention, read once per turn, and as little else as possible in the loop.

    Parameters
    ----------
    embedding_dim, annotation_dim : int
        E and D.
    attention : callable
        Builds the attention from the sizes of its query (H) and of an annotation vector (D).
    hidden_dim : int
        H, size of the state.
    """

    def __init__(
        self,
        embedding_dim: int,
        annotation_dim: int,
        attention: Callable[[int, int], Attention],
        hidden_dim: int,
    ) -> None:
        super().__init__(embedding_dim, annotation_dim)
        self.attention, self.hidden_dim = attention(hidden_dim, annotation_dim), hidden_dim
        self._compiled: Callable[[Tensor | None, Memory, State, bool], _Turn] | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the turn that :meth:`forward` repeats, by :func:`torch.compile`, and not the loop unrolled."""
        self._compiled = torch.compile(self._whole_turn, *args, **kwargs)

    def memory(self, annotations: Annotations) -> Memory:
        """Return the first state (B, H) each, followed by the attention's memory."""
        return *self._first_state(annotations), *self.attention.memory(annotations)

    def start(self, memory: Memory, queries: int) -> State:
        """Return the first state, (B * queries, H) each."""
        return tuple(part.repeat_interleave(queries, 0) for part in memory[: self._states])

    def step(self, word: Tensor, memory: Memory, state: State, need_weights: bool = True) -> Step:  # noqa: D102
        turn = self._whole_turn(self._word_gates(word), memory, state, need_weights)
        weights, gate = (
            None if part is None else part.view(len(memory[0]), -1, *part.shape[1:])
            for part in (turn.weights, turn.gate)
        )
        return Step(self._output(word, turn.spoken, turn.context), turn.state, weights, gate)

    def forward(  # noqa: D102
        self, words: Tensor, memory: Memory, need_weights: bool = True, lengths: Tensor | None = None
    ) -> Outputs:
        if self._compiled is not None:
            lengths = None  # turns of one shape
        plan = _Plan(len(memory[0]), len(words) // len(memory[0]), words.size(1), lengths)
        state = plan.sort_captions(self.start(memory, plan.queries))
        look = self.attention.looks(plan.sort(memory[self._states :]), need_weights)
        words = plan.pack(words)
        word_gates = plan.steps(self._word_gates(words))  # of all words at once: out of the loop
        linear, turns = cache(loops.linear), []
        for t, block in enumerate(plan.blocks):
            if self._compiled is None:
                turn = self._turn(word_gates[t], partial(look, block), plan.cut(state, t), linear)
            else:
                turn = self._compiled(word_gates[t], memory, state, need_weights)
            turns.append(turn)
            state = turn.state
        _, spoken, contexts, weights, gates = zip(*turns, strict=True)
        outputs = self._output(words, torch.cat(spoken), torch.cat(contexts))  # all turns at once, too
        return Outputs(
            plan.unpack(outputs).flatten(0, 1),
            None if weights[0] is None else plan.unpack(torch.cat(weights)),
            None if gates[0] is None else plan.unpack(torch.cat(gates)),
        )

    def _whole_turn(self, word_gates: Tensor | None, memory: Memory, state: State, need_weights: bool) -> _Turn:
        """Take a turn of all captions, B * Q rows."""
        look = Attention.looks(self.attention, memory[self._states :], need_weights)
        block = Block(len(memory[0]), len(state[0]) // len(memory[0]))
        return self._turn(word_gates, partial(look, block), state, linear=lambda layer: layer)

    _states: int  # number of tensors in a state

    def _first_state(self, annotations: Annotations) -> State:
        raise NotImplementedError

    def _word_gates(self, words: Tensor) -> Tensor | None:
        """Return what words give to the gates, (..., gates): it depends on no state, so all words are taken at once."""
        raise NotImplementedError

    def _turn(self, word_gates: Tensor | None, look: Look, state: State, linear: Linear) -> _Turn:
        """Take a turn of some captions (M rows); `linear` gives a layer as this turn shall call it."""
        raise NotImplementedError

    def _output(self, words: Tensor, spoken: Tensor, contexts: Tensor) -> Tensor:
        """Return the outputs (..., E) from words (..., E), states (..., H) and contexts (..., C)."""
        raise NotImplementedError


class LSTMDecoder(RecurrentDecoder):
    """The LSTM with soft attention of Xu et al. (2015), every part of it switchable.

    Parameters
    ----------
    embedding_dim, annotation_dim : int
        E and D.
    attention : callable
        Builds the attention from the sizes of its query (H) and of an annotation vector (D).
    hidden_dim : int
        H, size of the LSTM's state.
    attend : {"before", "after"}
        "before" the recurrent step with the previous state, whose context enters the LSTM (Bahdanau; the paper), or
        "after" it with the current state, whose context enters the output only (Luong et al., 2015, eq. 5).
    feed_previous : bool
        Feed the previous word back. Without it the caption is written blindly: a baseline.
    gate : bool
        Scale the context by beta (section 4.2.1).
    deep_output : bool
        Let the previous word and the context enter the output layer beside the state (eq. 7).
    first_state : {"mean", "zero"}
        From the mean annotation by an MLP (section 3.1.2), or zeros.

    Raises
    ------
    InputError
        Where the settings leave the decoder without any sight of the image.
    """

    def __init__(
        self,
        embedding_dim: int,
        annotation_dim: int,
        *,
        attention: Callable[[int, int], Attention] = Additive,
        hidden_dim: int = 512,
        attend: Literal["before", "after"] = "before",
        feed_previous: bool = True,
        gate: bool = True,
        deep_output: bool = True,
        first_state: Literal["mean", "zero"] = "mean",
    ) -> None:
        super().__init__(embedding_dim, annotation_dim, attention, hidden_dim)
        self.attend, self.feed_previous = attend, feed_previous
        self.deep_output, self.first_state = deep_output, first_state
        context_dim = self.attention.context_dim
        self.gate = gate and context_dim > 0
        if context_dim == 0 and first_state == "zero":
            raise InputError(
                "A decoder without attention whose first state is zero never sees the image: "
                "set first_state to mean, or choose an attention."
            )

        if first_state == "mean":
            self.init_h = nn.Linear(annotation_dim, hidden_dim)  # f_init,h
            self.init_c = nn.Linear(annotation_dim, hidden_dim)  # f_init,c
        # T of eq. 1, its columns split in two: those of the previous word do not depend on the state and are
        # applied to a whole caption at once.
        recurrent_dim = hidden_dim + (context_dim if attend == "before" else 0)
        self.word_to_gates = nn.Linear(embedding_dim, 4 * hidden_dim, bias=False) if feed_previous else None
        self.state_to_gates = nn.Linear(recurrent_dim, 4 * hidden_dim)
        if self.gate:
            self.beta = nn.Linear(hidden_dim, 1)  # f_beta
        self.state_to_output = nn.Linear(hidden_dim, embedding_dim)  # L_h
        # After Luong the context enters nowhere else, so it reaches the output with or without the deep layer.
        sees_context = context_dim > 0 and (deep_output or attend == "after")
        self.context_to_output = nn.Linear(context_dim, embedding_dim, bias=False) if sees_context else None  # L_z

    _states = 2  # h and c

    def _first_state(self, annotations: Annotations) -> State:
        if self.first_state == "zero":
            zeros = annotations.values.new_zeros(len(annotations.values), self.hidden_dim)
            return zeros, zeros
        mean = annotations.mean()
        return torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))

    def _turn(self, word_gates: Tensor | None, look: Look, state: State, linear: Linear) -> _Turn:
        h, c = state
        if self.attend == "before":
            context, weights, gate = self._see(h, look, linear)
            h, c = self._recur(word_gates, torch.cat((context, h), 1), c, linear)
        else:
            h, c = self._recur(word_gates, h, c, linear)
            context, weights, gate = self._see(h, look, linear)
        return _Turn((h, c), h, context, weights, gate)

    def _see(self, h: Tensor, look: Look, linear: Linear) -> tuple[Tensor, Tensor | None, Tensor | None]:
        context, weights = look(h)  # eq. 4 to 6, 13
        if not self.gate:
            return context, weights, None
        beta = torch.sigmoid(linear(self.beta)(h))  # beta_t = sigmoid(f_beta(h_{t-1}))
        return beta * context, weights, beta.squeeze(1)

    def _word_gates(self, words: Tensor) -> Tensor | None:
        return None if self.word_to_gates is None else self.word_to_gates(words)

    def _recur(self, word_gates: Tensor | None, recurrent: Tensor, c: Tensor, linear: Linear) -> State:
        gates = linear(self.state_to_gates)(recurrent)  # eq. 1
        if word_gates is not None:
            gates = gates + word_gates
        # The gates that share a function stand side by side.
        ifo, g = gates.tensor_split((3 * self.hidden_dim,), -1)
        i, f, o = torch.sigmoid(ifo).chunk(3, -1)
        c = f * c + i * torch.tanh(g)  # eq. 2
        return o * torch.tanh(c), c  # eq. 3

    def _output(self, words: Tensor, spoken: Tensor, contexts: Tensor) -> Tensor:
        """Return what L_o of eq. 7 is applied to; the tanh is the authors' code's, not the equation's."""
        output = self.state_to_output(spoken)  # L_h h_t
        if self.context_to_output is not None:
            output = output + self.context_to_output(contexts)  # L_z z_t
        if self.deep_output and self.feed_previous:
            output = output + words  # E y_{t-1}
        return torch.tanh(output)


class GRUDecoder(RecurrentDecoder):
    """The gated recurrent unit with attention of Bahdanau et al. (2015), appendix A.2.2, and its maxout output.

    As that appendix prints it, what scores the word y_i reads the state before it, s_{i-1}, and the context that this
    state read; s_i carries both on to the next word. (Its section 3.1 writes g(y_{i-1}, s_i, c_i).) The appendix does
    not number its equations; the comments print them.

    Parameters
    ----------
    embedding_dim, annotation_dim : int
        E and D.
    attention : callable
        Builds the attention from the sizes of its query (H) and of an annotation vector (D).
    hidden_dim : int
        H, size of the state.
    reset : {"before", "after"}
        Where the reset gate acts: "before" the product with U, as in the paper (Cho et al., 2014), or "after" it, as in
        :class:`torch.nn.GRUCell` and cuDNN, whose weights then fit (z counts the other way round there).
    """

    def __init__(
        self,
        embedding_dim: int,
        annotation_dim: int,
        *,
        attention: Callable[[int, int], Attention] = Additive,
        hidden_dim: int = 512,
        reset: Literal["before", "after"] = "before",
    ) -> None:
        super().__init__(embedding_dim, annotation_dim, attention, hidden_dim)
        self.reset = reset
        context_dim = self.attention.context_dim
        self.init_s = nn.Linear(annotation_dim, hidden_dim)  # W_s
        self.word_to_gates = nn.Linear(embedding_dim, 3 * hidden_dim)  # W_z, W_r, W
        self.state_to_gates = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)  # U_z, U_r
        self.state_to_candidate = nn.Linear(hidden_dim, hidden_dim, bias=reset == "after")  # U
        self.word_to_output = nn.Linear(embedding_dim, 2 * embedding_dim, bias=False)  # V_o
        self.state_to_output = nn.Linear(hidden_dim, 2 * embedding_dim)  # U_o
        self.sees = context_dim > 0
        if self.sees:
            self.context_to_gates = nn.Linear(context_dim, 3 * hidden_dim, bias=False)  # C_z, C_r, C
            self.context_to_output = nn.Linear(context_dim, 2 * embedding_dim, bias=False)  # C_o

    _states = 1

    def _first_state(self, annotations: Annotations) -> State:
        # s_0 = tanh(W_s h_1); the mean annotation stands for the last state of the paper's backward encoder.
        return (torch.tanh(self.init_s(annotations.mean())),)

    def _word_gates(self, words: Tensor) -> Tensor:
        gates: Tensor = self.word_to_gates(words)
        return gates

    def _turn(self, word_gates: Tensor | None, look: Look, state: State, linear: Linear) -> _Turn:
        (s,) = state
        context, weights = look(s)
        assert word_gates is not None
        gates = word_gates + linear(self.context_to_gates)(context) if self.sees else word_gates
        return _Turn((self._recur(gates, s, linear),), s, context, weights, None)

    def _recur(self, gates: Tensor, s: Tensor, linear: Linear) -> Tensor:
        """Return s_i from s_{i-1} (B * Q, H) and what word and context give to z, r and the candidate (B * Q, 3 H)."""
        z_and_r, candidate = gates.tensor_split((2 * self.hidden_dim,), -1)
        # z_i = sigmoid(W_z E y_{i-1} + U_z s_{i-1} + C_z c_i), and r_i alike
        z, r = torch.sigmoid(z_and_r + linear(self.state_to_gates)(s)).chunk(2, -1)
        # s~_i = tanh(W E y_{i-1} + U [r_i * s_{i-1}] + C c_i)
        to_candidate = linear(self.state_to_candidate)
        recurrent = to_candidate(r * s) if self.reset == "before" else r * to_candidate(s)
        return (1 - z) * s + z * torch.tanh(candidate + recurrent)  # s_i = (1 - z_i) * s_{i-1} + z_i * s~_i

    def _output(self, words: Tensor, spoken: Tensor, contexts: Tensor) -> Tensor:
        """Return t_i, the maximum of each pair of values of t~_i = U_o s_{i-1} + V_o E y_{i-1} + C_o c_i."""
        pairs = self.state_to_output(spoken) + self.word_to_output(words)
        if self.sees:
            pairs = pairs + self.context_to_output(contexts)
        output: Tensor = pairs.view(*pairs.shape[:-1], -1, 2).amax(-1)
        return output


class TransformerDecoder(Decoder):
    """The decoder of Vaswani et al. (2017), section 3, whose source is an image: its width is that of the embedding, E.

    The state of a step is the keys and values of the words so far, so that a step costs one word and not the whole
    caption. The weights given are those of the last layer's attention over the regions, mean over the heads;
    :meth:`head_weights` gives all. The paper's embedding is the output layer's, too (its section 3.4): the captioner's
    `tie_weights`.

    Parameters
    ----------
    embedding_dim, annotation_dim : int
        E and D.
    layers : int
        Number of layers.
    heads : int
        Heads of each attention; must divide E.
    feed_forward_dim : int, optional
        Size between the two products of the feed-forward network; 4 E by default, as in the paper.
    positions : {"sinusoidal", "learned"}
        How words know their place (section 3.5).
    max_words : int
        Words of the longest caption that learned positions can count; sinusoidal ones have no end.
    norm_first : bool
        Normalise what enters a sublayer (pre-norm, Xiong et al., 2020), which trains without a long warm-up; False: the
        sum behind it (post-norm), as in the paper.
    dropout : float
        Share of values dropped from the words with their positions, inside the feed-forward network and from what each
        sublayer adds.

    Raises
    ------
    InputError
        Where a setting is out of its range; from :meth:`step` and :meth:`forward` where a caption is longer than
        learned positions reach.
    """

    scales_words = True

    def __init__(
        self,
        embedding_dim: int,
        annotation_dim: int,
        *,
        layers: int = 3,
        heads: int = 8,
        feed_forward_dim: int | None = None,
        positions: Literal["sinusoidal", "learned"] = "sinusoidal",
        max_words: int = 128,
        norm_first: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(embedding_dim, annotation_dim)
        feed_forward_dim = 4 * embedding_dim if feed_forward_dim is None else feed_forward_dim
        if min(layers, feed_forward_dim, max_words) < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"There is no Transformer decoder of {layers} layers, feed_forward_dim {feed_forward_dim}, max_words "
                f"{max_words} and dropout {dropout}: give at least 1 of each, and a dropout from 0 to below 1."
            )
        if heads < 1 or embedding_dim % heads:
            raise InputError(
                f"The Transformer cannot split an embedding of {embedding_dim} values into {heads} heads: set the "
                f"decoder's heads to a divisor of {embedding_dim}, or embedding_dim to a multiple of the heads."
            )
        self.layers, self.heads, self.positions, self.max_words = layers, heads, positions, max_words
        self.feed_forward_dim, self.norm_first, self.dropout = feed_forward_dim, norm_first, dropout
        self.drop = nn.Dropout(dropout)
        if positions == "learned":
            self.position = nn.Embedding(max_words + 1, embedding_dim)  # what begins a caption has a place, too
        sizes = embedding_dim, annotation_dim, heads, feed_forward_dim
        self.stack = nn.ModuleList(TransformerLayer(*sizes, norm_first, dropout) for _ in range(layers))
        # The sums of pre-norm layers grow with depth, so the last one is normalised, too.
        self.norm = nn.LayerNorm(embedding_dim) if norm_first else nn.Identity()

    def memory(self, annotations: Annotations) -> Memory:
        """Return each layer's keys and values (B, heads, N, E / heads) and the existing regions (B, N)."""
        layers = cast("list[TransformerLayer]", self.stack)
        return tuple(part for layer in layers for part in layer.cross_attention.memory(annotations))

    def start(self, memory: Memory, queries: int) -> State:
        """Return each layer's keys and values of the words so far, (B * queries, heads, 0, E / heads): none."""
        keys = memory[0]
        return (keys.new_empty(len(keys) * queries, self.heads, 0, keys.size(-1)),) * 2 * self.layers

    def step(self, word: Tensor, memory: Memory, state: State, need_weights: bool = True) -> Step:  # noqa: D102
        outputs, state, weights = self._run(word[:, None], memory, state, (self.layers - 1,) if need_weights else ())
        return Step(outputs[:, 0], state, weights[0].mean(1)[:, :, 0] if weights else None, None)

    def forward(  # noqa: D102
        self, words: Tensor, memory: Memory, need_weights: bool = True, lengths: Tensor | None = None
    ) -> Outputs:
        state = self.start(memory, len(words) // len(memory[0]))
        outputs, _, weights = self._run(words, memory, state, (self.layers - 1,) if need_weights else ())
        return Outputs(outputs, weights[0].mean(1) if weights else None, None)

    def head_weights(self, words: Tensor, memory: Memory) -> Tensor:
        """Return the attention of every layer and head over given words (B * Q, T, E): (B, Q, layers, heads, T, N)."""
        state = self.start(memory, len(words) // len(memory[0]))
        _, _, weights = self._run(words, memory, state, range(self.layers))
        return torch.stack(weights, 1).movedim(3, 1)

    def _run(
        self, words: Tensor, memory: Memory, state: State, wanted: Collection[int]
    ) -> tuple[Tensor, State, list[Tensor]]:
        """Take the next words (B * Q, T, E), all of a caption or one.

        Return the outputs, the next state, and the weights (B, heads, Q, T, N) of each layer whose index is `wanted`.
        """
        said = state[0].size(2)
        x = self.drop(words + self._positions(words, said))
        following: list[Tensor] = []
        weights: list[Tensor] = []
        seen = len(memory) // self.layers  # tensors of one layer's memory
        for index, layer in enumerate(self.stack):
            past = state[2 * index : 2 * index + 2]
            x, past, looked = layer(x, past, memory[seen * index : seen * index + seen], index in wanted)
            following += past
            if looked is not None:
                weights.append(looked.view(*looked.shape[:2], -1, words.size(1), looked.size(-1)))
        return self.norm(x), tuple(following), weights

    def _positions(self, words: Tensor, first: int) -> Tensor:
        """Return the (T, E) positions of words, the first of which has `first` words before it."""
        last = first + words.size(1)
        if self.positions == "sinusoidal":
            return sinusoidal_positions(first, last, self.embedding_dim, words)
        if last > self.max_words + 1:
            raise InputError(
                f"A caption of {last - 1} words is longer than the {self.max_words} that the decoder's learned "
                "positions can count: set its max_words higher and train again, or its positions to sinusoidal."
            )
        return self.position.weight[first:last]


def sinusoidal_positions(first: int, last: int, dim: int, like: Tensor) -> Tensor:
    """Return the (last - first, dim) positions of Vaswani et al. (2017), section 3.5, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(first, last, device=like.device, dtype=dtype)
    even = torch.arange(0, dim, 2, device=like.device, dtype=dtype)
    angle = place[:, None] * torch.exp(even * (-math.log(10000.0) / dim))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :dim].to(like.dtype)


class TransformerLayer(nn.Module):
    """One layer of :class:`TransformerDecoder`: the words so far, the regions, a feed-forward network (section 3.1)."""

    def __init__(
        self, dim: int, annotation_dim: int, heads: int, feed_forward_dim: int, norm_first: bool, dropout: float
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attention = CausalSelfAttention(dim, heads)
        self.cross_attention = MultiHead(dim, annotation_dim, heads=heads, dim=dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, feed_forward_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feed_forward_dim, dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, past: State, memory: Memory, need_weights: bool
    ) -> tuple[Tensor, State, Tensor | None]:
        """Take the next words (B * Q, T, E), the keys and values of those before, and this layer's memory.

        Return the words, the keys and values so far, and the weights (B, heads, Q * T, N) where they are needed.
        """
        heard, past = self.self_attention(self._enter(x, 0), past)
        x = self._leave(x, heard, 0)
        # All words of all captions of an image are queries of one call.
        query = self._enter(x, 1).reshape(len(memory[0]), -1, x.size(-1))
        if need_weights:
            weights = self.cross_attention.weigh(query, memory)
            context = self.cross_attention.read(weights, memory)
        else:
            weights, context = None, self.cross_attention.contexts(query, memory)
        x = self._leave(x, context.view_as(x), 1)
        return self._leave(x, self.feed_forward(self._enter(x, 2)), 2), past, weights

    def _enter(self, x: Tensor, sublayer: int) -> Tensor:
        return self.norms[sublayer](x) if self.norm_first else x

    def _leave(self, x: Tensor, change: Tensor, sublayer: int) -> Tensor:
        x = x + self.drop(change)
        return x if self.norm_first else self.norms[sublayer](x)


class CausalSelfAttention(nn.Module):
    """Each word reads itself and the words before it, by several heads (Vaswani et al., 2017, section 3.2.3)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, 3 * dim)  # queries, keys, values; the keys' bias is idle, as it is in torch's
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, past: State) -> tuple[Tensor, State]:
        """Take the next words (B * Q, T, E) and the keys and values of those before, (B * Q, heads, P, E / heads) each.

        Either there are none before (P = 0) or there is one next (T = 1).
        """
        queries, *now = (split_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        keys, values = (torch.cat(both, 2) for both in zip(past, now, strict=True))
        causal = queries.size(2) > 1  # one word after all others sees them all
        assert not causal or keys.size(2) == queries.size(2), "either all words at once, or one more"
        read = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return self.output(join_heads(read)), (keys, values)
