"""Search: from a step function to captions. Knows neither model nor vocabulary.

One vectorised search serves greedy decoding (a beam of one) and beam search, for all images of a batch at once; beside
it captions are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioner.errors import InputError

State = tuple[Tensor, ...]
StepFunction = Callable[[Tensor, State], tuple[Tensor, State]]


class Hypothesis(NamedTuple):
    """One finished caption.

    Attributes
    ----------
    tokens : list of int
        The ids, without the begin token, up to and with the end token.
    log_probability : float
        The model's own, natural logarithm, of all `tokens`: nothing renormalised, nothing added.
    score : float
        What hypotheses are ranked by: `log_probability` / len(`tokens`) ** length_penalty.
    """

    tokens: list[int]
    log_probability: float
    score: float


@torch.no_grad()
def beam_search(
    step: StepFunction,
    start: State,
    images: int,
    *,
    begin: int,
    end: int,
    beam_size: int = 1,
    max_words: int = 20,
    length_penalty: float = 0.0,
    banned: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Find the best captions of a batch of images.

    Every image has `beam_size` places. At each step the best continuations of all its open hypotheses fill them; one
    that ends is kept aside and goes on no more, so a beam of one is greedy decoding. After `max_words` words only the
    end can follow, so each hypothesis ends and every image gets a caption. The search stops as soon as no open
    hypothesis can still enter the best `beam_size`, which changes no result.

    Parameters
    ----------
    step : callable
        Takes the last words (images * beam_size,) and a state, and returns the log-probabilities
        (images * beam_size, V) of the next words and the next state.
    start : tuple of Tensor
        The first state, images * beam_size rows each, image by image.
    images : int
        Number of images.
    begin, end : int
        Ids of the tokens that open and close a caption.
    beam_size : int
        Hypotheses per image; 1 is greedy.
    max_words : int
        Longest caption, the end token not counted.
    length_penalty : float
        0 ranks by the log-probability, 1 by its mean per token; not negative.
    banned : sequence of int
        Ids that are never chosen. What is left is not renormalised.

    Raises
    ------
    InputError
        Where there is no beam, or the longest caption or the length penalty is negative.

    Returns
    -------
    list of list of Hypothesis
        For each image its hypotheses, at least one and at most `beam_size`, best first.
    """
    if beam_size < 1 or max_words < 0 or length_penalty < 0:
        raise InputError(
            f"No caption can be searched with beam_size {beam_size}, max_words {max_words} and length_penalty "
            f"{length_penalty}: give at least 1, 0 and 0."
        )
    device = start[0].device
    rows = torch.arange(images, device=device)[:, None] * beam_size  # first row of each image
    words = torch.full((images * beam_size,), begin, device=device)
    tokens = torch.empty(images, beam_size, 0, dtype=torch.long, device=device)
    # All places hold the same empty hypothesis at first: only one of them may go on, or the beam holds copies.
    totals = torch.full((images, beam_size), -torch.inf, dtype=torch.float64, device=device)
    totals[:, 0] = 0.0
    finished: list[list[Hypothesis]] = [[] for _ in range(images)]
    state = start
    for length in range(1, max_words + 2):
        log_probabilities, state = step(words, state)
        vocabulary = log_probabilities.size(-1)
        allowed = torch.ones(vocabulary, dtype=torch.bool, device=device)
        if length > max_words:
            allowed[:] = False
            allowed[end] = True
        else:
            allowed[[begin, *banned]] = False
        candidates = totals[..., None] + log_probabilities.view(images, beam_size, vocabulary).double()
        candidates = candidates.masked_fill(~allowed, -torch.inf).flatten(1)  # (images, beam_size * V)
        totals, choices = candidates.topk(beam_size, dim=1)
        parents, words_grid = choices // vocabulary, choices % vocabulary
        tokens = torch.cat((tokens.gather(1, parents[..., None].expand(-1, -1, length - 1)), words_grid[..., None]), 2)
        ended = (words_grid == end) & totals.isfinite()
        for image, place in ended.nonzero().tolist():
            total = totals[image, place].item()
            score = total / length**length_penalty
            finished[image].append(Hypothesis(tokens[image, place].tolist(), total, score))
        totals = totals.masked_fill(words_grid == end, -torch.inf)
        # An open hypothesis only loses log-probability, so this is the best score that it can still reach.
        best_open = totals.amax(1) / (max_words + 1) ** length_penalty
        if all(
            reach == -torch.inf or reach <= _worst_of_best(hypotheses, beam_size)
            for reach, hypotheses in zip(best_open.tolist(), finished, strict=True)
        ):
            break
        words = words_grid.flatten()
        state = tuple(part.index_select(0, (rows + parents).flatten()) for part in state)
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[:beam_size] for hypotheses in finished]


def _worst_of_best(hypotheses: Sequence[Hypothesis], beam_size: int) -> float:
    """Return the score that a hypothesis must beat to be among the best `beam_size`."""
    if len(hypotheses) < beam_size:
        return -torch.inf
    return sorted((hypothesis.score for hypothesis in hypotheses), reverse=True)[beam_size - 1]


class Samples(NamedTuple):
    """Captions drawn at random, K of each of B images.

    Attributes
    ----------
    tokens : Tensor
        (B, K, T) ids, without the begin token. Behind a caption's own tokens they mean nothing.
    lengths : Tensor
        (B, K) number of a caption's tokens, the end token counted if it was drawn.
    log_probabilities : Tensor
        (B, K) float64, natural logarithm of the probability of these tokens.
    """

    tokens: Tensor
    lengths: Tensor
    log_probabilities: Tensor


@torch.no_grad()
def sample(
    step: StepFunction, start: State, images: int, *, begin: int, end: int, samples: int, max_tokens: int
) -> Samples:
    """Draw captions from the model's own distribution: nothing banned, nothing sharpened.

    A caption that has not ended after `max_tokens` tokens is broken off there. No end is put to it, since its
    probability would not be the model's. Torch's generator of the device decides. Where log-probabilities are not
    numbers, those of the captions are none either.

    Parameters
    ----------
    step : callable
        As for :func:`beam_search`, with images * samples rows.
    start : tuple of Tensor
        The first state, images * samples rows each, image by image.
    images : int
        B, number of images.
    begin, end : int
        Ids of the tokens that open and close a caption.
    samples : int
        K, captions per image.
    max_tokens : int
        Most tokens of a caption, the end token counted.

    Raises
    ------
    InputError
        Where there is nothing to draw.

    Returns
    -------
    Samples
        T is the length of the longest one.
    """
    if samples < 1 or max_tokens < 1:
        raise InputError(f"No caption is drawn with samples {samples} and max_tokens {max_tokens}: give at least 1.")
    state, words = start, torch.full((images * samples,), begin, device=start[0].device)
    going = torch.ones_like(words, dtype=torch.bool)
    lengths = torch.zeros_like(words)
    totals = torch.zeros_like(words, dtype=torch.float64)
    drawn: list[Tensor] = []
    while len(drawn) < max_tokens and going.any():
        log_probabilities, state = step(words, state)
        # Of exponential times at these rates the first, as torch.multinomial draws, which stops a GPU for its checks.
        rates = log_probabilities.exp()
        words = (rates / torch.empty_like(rates).exponential_()).argmax(1)
        totals += log_probabilities.gather(1, words[:, None]).squeeze(1) * going
        lengths += going
        going = going & (words != end)
        drawn.append(words)
    return Samples(*(part.view(images, samples, *part.shape[1:]) for part in (torch.stack(drawn, 1), lengths, totals)))
