"""Decoders: the equations of *Show, Attend and Tell* (Xu et al., ICML 2015), by number.

Words in, words out, both in embedding space: a decoder knows neither the vocabulary nor the encoder.

Shapes: B images, Q captions per image, N regions, D annotation size, E embedding size, H hidden size, T words. A memory
has B rows. Words and states have B * Q rows, image by image. Nothing of a memory is ever repeated Q times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from captioner.attention import Additive, Annotations, Attention, Memory
from captioner.errors import InputError

State = tuple[Tensor, ...]


class Step(NamedTuple):
    """One step of a decoder.

    Attributes
    ----------
    output : Tensor
        (B * Q, E), from which the output layer scores the next word.
    state : tuple of Tensor
        B * Q rows each.
    weights : Tensor or None
        (B, Q, N) attention.
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
        (B, Q, T, N) attention.
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
    """

    def __init__(self, embedding_dim: int, annotation_dim: int) -> None:
        super().__init__()
        self.embedding_dim, self.annotation_dim = embedding_dim, annotation_dim

    def memory(self, annotations: Annotations) -> Memory:
        """Return what a caption does not change, B rows: computed once per image."""
        raise NotImplementedError

    def start(self, memory: Memory, queries: int) -> State:
        """Return the state before the first word, B * queries rows."""
        raise NotImplementedError

    def step(self, word: Tensor, memory: Memory, state: State) -> Step:
        """Take the embedding of the previous word (B * Q, E) and return the step to the next."""
        raise NotImplementedError

    def forward(self, words: Tensor, memory: Memory) -> Outputs:
        """Teacher forcing: the steps over given words (B * Q, T, E), equal to :meth:`step` word by word."""
        raise NotImplementedError


class LSTMDecoder(Decoder):
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
        super().__init__(embedding_dim, annotation_dim)
        self.attention = attention(hidden_dim, annotation_dim)
        self.hidden_dim, self.attend, self.feed_previous = hidden_dim, attend, feed_previous
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

    def memory(self, annotations: Annotations) -> Memory:
        """Return the first h and c (B, H) followed by the attention's memory."""
        if self.first_state == "mean":
            mean = annotations.mean()
            h, c = torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))
        else:
            h = c = annotations.values.new_zeros(len(annotations.values), self.hidden_dim)
        return h, c, *self.attention.memory(annotations)

    def start(self, memory: Memory, queries: int) -> State:
        """Return h_0 and c_0, (B * queries, H) each."""
        h, c = memory[:2]
        return h.repeat_interleave(queries, 0), c.repeat_interleave(queries, 0)

    def step(self, word: Tensor, memory: Memory, state: State) -> Step:  # noqa: D102
        state, context, weights, gate = self._advance(self._word_gates(word), memory, state)
        return Step(self._output(word, state[0], context), state, weights, gate)

    def forward(self, words: Tensor, memory: Memory) -> Outputs:  # noqa: D102
        images = len(memory[0])
        state = self.start(memory, len(words) // images)
        word_gates = self._word_gates(words)  # of all words at once: out of the loop
        hs, contexts, all_weights, gates = [], [], [], []
        for t in range(words.size(1)):
            state, context, weights, gate = self._advance(
                None if word_gates is None else word_gates[:, t], memory, state
            )
            hs.append(state[0])
            contexts.append(context)
            if weights is not None:
                all_weights.append(weights)
            if gate is not None:
                gates.append(gate)
        return Outputs(
            self._output(words, torch.stack(hs, 1), torch.stack(contexts, 1)),  # all steps at once, too
            torch.stack(all_weights, 2) if all_weights else None,
            torch.stack(gates, 2) if gates else None,
        )

    def _advance(
        self, word_gates: Tensor | None, memory: Memory, state: State
    ) -> tuple[State, Tensor, Tensor | None, Tensor | None]:
        """Return the next state, its context (B * Q, C), the weights (B, Q, N) and beta (B, Q)."""
        h, c = state
        if self.attend == "before":
            context, weights, gate = self._attend(h, memory)
            h, c = self._recur(word_gates, torch.cat((context, h), 1), c)
        else:
            h, c = self._recur(word_gates, h, c)
            context, weights, gate = self._attend(h, memory)
        return (h, c), context, weights, gate

    def _attend(self, h: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None, Tensor | None]:
        images = len(memory[0])
        context, weights = self.attention(h.view(images, -1, h.size(-1)), memory[2:])  # eq. 4 to 6, 13
        context = context.flatten(0, 1)
        if not self.gate:
            return context, weights, None
        beta = torch.sigmoid(self.beta(h))  # beta_t = sigmoid(f_beta(h_{t-1}))
        return beta * context, weights, beta.view(images, -1)

    def _word_gates(self, words: Tensor) -> Tensor | None:
        return None if self.word_to_gates is None else self.word_to_gates(words)

    def _recur(self, word_gates: Tensor | None, recurrent: Tensor, c: Tensor) -> State:
        gates = self.state_to_gates(recurrent)  # eq. 1
        if word_gates is not None:
            gates = gates + word_gates
        i, f, o, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # eq. 2
        return torch.sigmoid(o) * torch.tanh(c), c  # eq. 3

    def _output(self, words: Tensor, h: Tensor, context: Tensor) -> Tensor:
        """Return what L_o of eq. 7 is applied to; the tanh is the authors' code's, not the equation's."""
        output = self.state_to_output(h)  # L_h h_t
        if self.context_to_output is not None:
            output = output + self.context_to_output(context)  # L_z z_t
        if self.deep_output and self.feed_previous:
            output = output + words  # E y_{t-1}
        return torch.tanh(output)
