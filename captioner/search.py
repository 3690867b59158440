"""Search: from a step function to captions. Knows neither model nor vocabulary.

One vectorised search serves greedy decoding (a beam of one), beam search and diverse beams, for all images of a batch
at once; beside it captions are drawn at random, from what a filter leaves or from the model's own distribution.

Shapes: B images in the batch, Q hypotheses of each, T words said so far, V vocabulary. A memory has B rows, which no
hypothesis repeats; words and states have B * Q, image by image. Images that are finished leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioner.errors import InputError

Memory = tuple[Tensor, ...]
State = tuple[Tensor, ...]
# Takes the last words (B * Q,), a memory and a state, and returns the log-probabilities (B * Q, V) of the next words,
# a tensor that the search may write into, and the next state.
StepFunction = Callable[[Tensor, Memory, State], tuple[Tensor, State]]

LEAVING = 8  # images leave once they are this part of the batch: a memory is copied without them, which takes time, too
BLOCK = 64  # of a row of scores, so that most of it is only asked for its largest
NUCLEUS = 64  # words that are asked for first, and four times as many as long as these do not suffice


class Hypothesis(NamedTuple):
    """One finished caption.

    Attributes
    ----------
    tokens : list of int
        The ids, without the begin token, up to and with the end token.
    log_probability : float
        The model's own, natural logarithm, of all `tokens`: nothing renormalised, nothing added.
    score : float
        What hypotheses are ranked by: `log_probability` / len(`tokens`) ** length_penalty. In diverse groups what the
        words that earlier groups said have cost is taken from the log-probability first.
    """

    tokens: list[int]
    log_probability: float
    score: float


@dataclass(frozen=True)
class Limits:
    """What a caption may be, in ids.

    Where no word may follow the caption ends, whatever else is asked: there is always a caption.

    Attributes
    ----------
    min_words, max_words : int
        Shortest and longest caption, the end token not counted.
    no_repeat_ngram : int
        No sequence of so many words occurs twice; 0: whatever occurs.
    banned : tuple of int
        Ids that are never chosen. What is left is not renormalised.
    prefix : tuple of int
        The first words, at most `max_words`; they count as others do. They alone may be banned, or repeat themselves.
    filter : callable, optional
        Takes the ids that a hypothesis has said and returns those that may not follow. It is asked for each hypothesis
        by itself, which takes time.
    """

    min_words: int = 0
    max_words: int = 20
    no_repeat_ngram: int = 0
    banned: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    filter: Callable[[Sequence[int]], Sequence[int]] | None = None


class _Batch:
    """The images that are still searched, and their hypotheses in the making.

    Attributes
    ----------
    images : Tensor
        (B,) their places among all images.
    tokens : Tensor
        (B, Q, T) ids said so far. There is one hypothesis of each image at first, which has said the prefix.
    totals : Tensor
        (B, Q) float64, the log-probabilities of these.
    """

    def __init__(self, step: StepFunction, memory: Memory, start: State, begin: int, end: int, limits: Limits) -> None:
        self._step, self._memory, self._state, self._limits = step, memory, start, limits
        images, device = len(memory[0]), memory[0].device
        self.images = torch.arange(images, device=device)
        self.tokens = torch.empty(images, 1, 0, dtype=torch.long, device=device)
        self.totals = torch.zeros(images, 1, dtype=torch.float64, device=device)
        self._begin, self._end = begin, end
        self._never = torch.tensor(sorted({begin, *limits.banned}), device=device)
        self._parents: Tensor | None = None  # (B, Q) the rows that the state has yet to follow; None: the state's own
        for word in limits.prefix:
            log_probabilities = self._take_step()
            words = torch.full((images, 1), word, device=device)
            self.say(None, words, self.totals + log_probabilities[..., word].double())

    def next_words(self) -> tuple[Tensor, Tensor | None]:
        """Take a step.

        Returns
        -------
        log_probabilities : Tensor
            (B, Q, V) of the next words; minus infinity where one may not follow.
        ends : Tensor or None
            (B, Q) that of the end, where it may not follow.
        """
        log_probabilities, limits, said = self._take_step(), self._limits, self.tokens.size(2)
        ends = log_probabilities[..., self._end].clone()
        if said >= limits.max_words:
            log_probabilities.fill_(-torch.inf)
            log_probabilities[..., self._end] = ends
            return log_probabilities, None
        log_probabilities.index_fill_(2, self._never, -torch.inf)
        if 0 < limits.no_repeat_ngram <= said:
            ngrams = self.tokens.unfold(2, limits.no_repeat_ngram, 1)  # (B, Q, places, n)
            unfinished = self.tokens[:, :, None, said + 1 - limits.no_repeat_ngram :]
            again = (ngrams[..., :-1] == unfinished).all(3)
            # The begin token, which may not follow anyway, stands for none.
            log_probabilities.scatter_(2, ngrams[..., -1].where(again, self._begin), -torch.inf)
        if limits.filter is not None:
            for scores, tokens in zip(log_probabilities.flatten(0, 1), self.tokens.flatten(0, 1).tolist(), strict=True):
                scores[limits.filter(tokens)] = -torch.inf
        if said >= limits.min_words and self._end not in limits.banned:
            return log_probabilities, None
        log_probabilities[..., self._end] = -torch.inf
        return log_probabilities, ends

    def say(self, parents: Tensor | None, words: Tensor, totals: Tensor) -> None:
        """Go on from the hypotheses `parents` (B, Q), or each from itself, with words and totals (B, Q)."""
        if parents is not None:
            images, queries, _ = self.tokens.shape
            self._parents = parents + queries * torch.arange(images, device=parents.device)[:, None]
            self.tokens = self.tokens.take_along_dim(parents[..., None], 1)
        self.tokens, self.totals = torch.cat((self.tokens, words[..., None]), 2), totals

    def keep(self, places: Tensor) -> None:
        """Let all images leave but those at these places."""
        queries = self.tokens.size(1)
        if self._parents is None:
            rows = torch.arange(len(self.images) * queries, device=places.device)
            self._parents = rows.view(-1, queries)
        self.images, self.tokens, self.totals, self._parents = (
            part[places] for part in (self.images, self.tokens, self.totals, self._parents)
        )
        self._memory = tuple(part.index_select(0, places) for part in self._memory)

    def _take_step(self) -> Tensor:
        images, queries, said = self.tokens.shape
        if self._parents is not None:
            rows = self._parents.flatten()
            self._state, self._parents = tuple(part.index_select(0, rows) for part in self._state), None
        words = self.tokens[..., -1].flatten() if said else torch.full_like(self.images, self._begin)
        log_probabilities, self._state = self._step(words, self._memory, self._state)
        return log_probabilities.view(images, queries, -1)


def _part(is_open: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the places of images (B,) that stay in the batch, and of those that leave; None: too few would leave."""
    staying = is_open.nonzero().squeeze(1)
    if LEAVING * (len(is_open) - len(staying)) < len(is_open):
        return None
    return staying, (~is_open).nonzero().squeeze(1)


def _complete(tokens: list[int], end: int) -> list[int]:
    """Return the tokens up to and with the end."""
    return tokens[: tokens.index(end) + 1]


class _Finished:
    """The best finished hypotheses of images, so many of each group, best first.

    Attributes
    ----------
    scores : Tensor
        (B, groups, width) float64, minus infinity where there is none yet.
    """

    def __init__(self, images: int, groups: int, width: int, longest: int, end: int, device: torch.device) -> None:
        self.scores = torch.full((images, groups, width), -torch.inf, dtype=torch.float64, device=device)
        self._totals = self.scores
        self._tokens = torch.full((images, groups, width, longest), end, device=device)
        self._end = end

    def add(self, scores: Tensor, totals: Tensor, tokens: Tensor) -> None:
        """Take hypotheses (B, Q), Q / groups of each group, whose scores are minus infinity where they go on."""
        images, groups, width, longest = self._tokens.shape
        missing = longest - tokens.size(2)
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=self._end).view(images, groups, -1, longest)
        scores = torch.cat((self.scores, scores.view(images, groups, -1)), 2)
        totals = torch.cat((self._totals, totals.view(images, groups, -1)), 2)
        # Stable: of two with one score the one that was there first.
        self.scores, order = scores.sort(stable=True, dim=2, descending=True)
        self.scores, order = self.scores[..., :width], order[..., :width]
        self._totals = totals.gather(2, order)
        self._tokens = torch.cat((self._tokens, tokens), 2).take_along_dim(order[..., None], 2)

    def keep(self, places: Tensor) -> None:
        """Forget all images but those at these places."""
        self.scores, self._totals, self._tokens = self.scores[places], self._totals[places], self._tokens[places]

    def of(self, places: Tensor) -> list[list[Hypothesis]]:
        """Return the hypotheses of images, best first, each once whatever groups have found it."""
        parts = [part[places].flatten(1, 2).tolist() for part in (self._tokens, self._totals, self.scores)]
        found = []
        for image in zip(*parts, strict=True):
            best: dict[tuple[int, ...], Hypothesis] = {}
            for tokens, total, score in sorted(zip(*image, strict=True), key=lambda one: -one[2]):
                if score > -torch.inf:
                    ids = _complete(tokens, self._end)
                    best.setdefault(tuple(ids), Hypothesis(ids, total, score))
            found.append([*best.values()])
        return found


@torch.no_grad()
def beam_search(
    step: StepFunction,
    memory: Memory,
    start: State,
    *,
    begin: int,
    end: int,
    limits: Limits,
    beam_size: int = 1,
    length_penalty: float = 0.0,
    groups: int = 1,
    diversity: float = 0.5,
) -> list[list[Hypothesis]]:
    """Find the best captions of a batch of images.

    Every image has `beam_size` places. At each step the best continuations of all its open hypotheses fill them; one
    that ends is kept aside and goes on no more, so a beam of one is greedy decoding. After the most words only the end
    can follow, so each hypothesis ends and every image gets a caption. An image is done as soon as no open hypothesis
    can still enter its best `beam_size`, which changes no result.

    With several groups the places are shared out among them (Vijayakumar et al., 2016): each is a beam of its own, but
    for a word it loses `diversity` for every hypothesis of the groups before it that says the same word at the same
    place, in what it is ranked by. The first group is a plain beam. The end of a caption costs nothing.

    Parameters
    ----------
    step : callable
        A :data:`StepFunction`, which is asked for one hypothesis of each image first, and for `beam_size` later.
    memory : tuple of Tensor
        What it reads of the images, B rows each.
    start : tuple of Tensor
        The first state, B rows each.
    begin, end : int
        Ids of the tokens that open and close a caption.
    limits : Limits
        What a caption may be.
    beam_size : int
        Hypotheses per image; 1 is greedy.
    length_penalty : float
        0 ranks by the log-probability, 1 by its mean per token; not negative.
    groups : int
        A divisor of `beam_size`; 1: a plain beam.
    diversity : float
        Of groups, not negative.

    Returns
    -------
    list of list of Hypothesis
        For each image its hypotheses, all different, best first: at least one and at most `beam_size`. None where
        log-probabilities are not numbers.
    """
    batch, longest, width = _Batch(step, memory, start, begin, end, limits), limits.max_words + 1, beam_size // groups
    finished = _Finished(len(memory[0]), groups, width, longest, end, memory[0].device)
    found: list[list[Hypothesis]] = [[]] * len(memory[0])
    ranks = batch.totals  # less what words have cost; minus infinity where a hypothesis goes on no more
    while True:
        log_probabilities, ends = batch.next_words()
        if ends is not None:
            # No hypothesis has a word left, and none has ended, since none might.
            stuck = (ranks + log_probabilities.amax(2) == -torch.inf).all(1)
            log_probabilities[..., end] = ends.where(stuck[:, None], -torch.inf)
        parents, words, totals, ranks = _choose(log_probabilities, batch.totals, ranks, width, groups, diversity, end)
        batch.say(None if beam_size == 1 else parents, words, totals)
        ended = words == end
        if ended.any():
            scores = ranks / batch.tokens.size(2) ** length_penalty
            finished.add(scores.where(ended & scores.isfinite(), -torch.inf), totals, batch.tokens)
        ranks = ranks.masked_fill(ended, -torch.inf)
        # An open hypothesis only loses by its words, so this is the best score that it can still reach. One that is not
        # a number reaches none.
        reach = ranks.view(len(ranks), groups, -1).amax(2) / longest**length_penalty
        parts = _part((reach > finished.scores[..., -1]).any(1))
        if parts is None:
            continue
        staying, leaving = parts
        for image, hypotheses in zip(batch.images[leaving].tolist(), finished.of(leaving), strict=True):
            found[image] = hypotheses
        if not len(staying):
            return found
        batch.keep(staying)
        finished.keep(staying)
        ranks = ranks[staying]


def _choose(
    log_probabilities: Tensor, totals: Tensor, ranks: Tensor, width: int, groups: int, diversity: float, end: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the best continuations of each group of each image.

    Parameters
    ----------
    log_probabilities : Tensor
        (B, Q, V) of the next words.
    totals, ranks : Tensor
        (B, Q) log-probability of what was said before, and what it is ranked by.
    width : int
        How many of each group are wanted.

    Returns
    -------
    parents, words, totals, ranks : Tensor
        (B, Q') group by group, each best first; Q' is `groups` * `width` unless there are not so many words.
    """
    images, queries, _ = log_probabilities.shape
    size = max(1, queries // groups)
    chosen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for group in range(groups):
        first = group * size if queries > 1 else 0  # the first step goes on from the one hypothesis of all groups
        own = slice(first, first + size)
        raw = costed = log_probabilities[:, own]
        if chosen:
            said, before = (torch.cat([one[part] for one in chosen], 1) for part in (1, 3))
            cost = raw.new_full((), -diversity).where((said != end) & (before > -torch.inf), 0)
            costed = raw.scatter_add(2, said[:, None].expand(-1, size, -1), cost[:, None].expand(-1, size, -1))
        # The best of an image are among the best of its hypotheses.
        values, words = largest(costed, width)
        candidates = (ranks[:, own, None] + values.double()).flatten(1)
        rank, order = candidates.sort(stable=True, dim=1, descending=True)
        rank, order = rank[:, :width], order[:, :width]
        total = (totals[:, own, None] + raw.gather(2, words).double()).flatten(1).gather(1, order)
        chosen.append((first + order // values.size(2), words.flatten(1).gather(1, order), total, rank))
    parents, words, totals, ranks = (torch.cat(part, 1) for part in zip(*chosen, strict=True))
    return parents, words, totals, ranks


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest of scores (..., V), descending, and their places: (..., count), or V if that is less.

    Long rows are cut into blocks. The largest scores stand in those whose own largest are so: all else is read once.
    """
    blocks, count = scores.size(-1) // BLOCK, min(count, scores.size(-1))
    if blocks <= 2 * count:
        values, places = scores.topk(count)
        return values, places
    whole = scores[..., : blocks * BLOCK].reshape(*scores.shape[:-1], blocks, BLOCK)
    best = whole.amax(-1).topk(count).indices[..., None]  # (..., count, 1)
    inside = torch.arange(BLOCK, device=scores.device)
    rest = torch.arange(blocks * BLOCK, scores.size(-1), device=scores.device).expand(*scores.shape[:-1], -1)
    places = torch.cat(((best * BLOCK + inside).flatten(-2), rest), -1)
    values, order = scores.gather(-1, places).topk(count)
    return values, places.gather(-1, order)


@torch.no_grad()
def draw(
    step: StepFunction,
    memory: Memory,
    start: State,
    *,
    begin: int,
    end: int,
    limits: Limits,
    samples: int = 1,
    length_penalty: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Draw captions at random from the words that a filter leaves.

    Of the words that may follow, their probabilities raised to the power 1 / `temperature`, the `top_k` most probable
    are left, and of these the fewest that together have `top_p` of their probability: the nucleus (Holtzman et al.,
    2020). An image's chances are its own: what else is in the batch changes none of its captions.

    Parameters
    ----------
    step, memory, start, begin, end, limits
        As for :func:`beam_search`.
    samples : int
        Captions of each image; some may be equal.
    length_penalty : float
        As for :func:`beam_search`: of the score.
    temperature : float
        Below 1 the probable becomes more so, above 1 less; positive.
    top_k : int
        0: all words.
    top_p : float
        Above 0; 1: all words.
    seed : int
        Not negative. With one seed an image's captions are always the same.
    numbers : sequence of int, optional
        Not negative, one for each image, so that those with different numbers have different chances; their places in
        the batch by default.

    Returns
    -------
    list of list of Hypothesis
        The captions of each image, by their score. None where log-probabilities are not numbers.
    """
    batch, images, device = _Batch(step, memory, start, begin, end, limits), len(memory[0]), memory[0].device
    # Numpy's, since torch's generator heeds 32 bits of a seed on a CPU, and gives other numbers on a GPU.
    generators = [np.random.default_rng((seed, number)) for number in (range(images) if numbers is None else numbers)]
    each = [generator.random((samples, limits.max_words + 1)) for generator in generators]
    chances = torch.from_numpy(np.stack(each)).to(device)
    going = torch.ones(images, samples, dtype=torch.bool, device=device)
    parents: Tensor | None = torch.zeros(images, samples, dtype=torch.long, device=device)
    found: list[list[Hypothesis]] = [[]] * images
    while True:
        log_probabilities, ends = batch.next_words()
        if ends is not None:
            stuck = log_probabilities.amax(2) == -torch.inf
            log_probabilities[..., end] = ends.where(stuck, -torch.inf)
        shares, kept = _filter(log_probabilities, temperature, top_k, top_p)
        ladder = shares.cumsum(2, dtype=torch.float64)  # (B, Q, words)
        heights = chances[..., batch.tokens.size(2)].view(*ladder.shape[:2], -1) * ladder[..., -1:]
        # The first rung above, which has a share. There is none above what is not a number, which ends.
        places = torch.searchsorted(ladder, heights, right=True).clamp(max=ladder.size(2) - 1)
        words = places if kept is None else kept.gather(2, places)
        gains = log_probabilities.gather(2, words).double().view(going.shape)
        words = words.view(going.shape).where(going & ~gains.isnan(), end)
        batch.say(parents, words, batch.totals + gains.where(going, 0))
        going, parents = going & (words != end), None
        parts = _part(going.any(1))
        if parts is None:
            continue
        staying, leaving = parts
        rows = (part[leaving].tolist() for part in (batch.images, batch.tokens, batch.totals))
        for image, tokens, totals in zip(*rows, strict=True):
            complete = [_complete(ids, end) for ids in tokens]
            hypotheses = [
                Hypothesis(ids, total, total / len(ids) ** length_penalty)
                for ids, total in zip(complete, totals, strict=True)
                if math.isfinite(total)
            ]
            found[image] = sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)
        if not len(staying):
            return found
        batch.keep(staying)
        chances, going = chances[staying], going[staying]


def _filter(log_probabilities: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """Return what is drawn by, and what may be drawn.

    Returns
    -------
    shares : Tensor
        (..., M), not negative, to be divided by their sum: those of the words left, 0 of words that are not.
    kept : Tensor or None
        (..., M) the ids of these words; None: they are those of the vocabulary, M = V.
    """
    # From the largest on, which stays what it is at the lowest temperature.
    shares = ((log_probabilities - log_probabilities.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if not top_k and top_p >= 1:
        return shares, None
    everything, count = shares, top_k or NUCLEUS
    shares, kept = largest(everything, count)
    if top_k:
        shares = shares / shares.sum(-1, keepdim=True)
    while not top_k and count < everything.size(-1) and (shares.sum(-1) < top_p).any():
        count *= 4
        shares, kept = largest(everything, count)
    more_probable = shares.cumsum(-1, dtype=torch.float64) - shares  # together
    return shares.where(more_probable < top_p, 0), kept


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
    step: StepFunction, memory: Memory, start: State, *, begin: int, end: int, samples: int, max_tokens: int
) -> Samples:
    """Draw captions from the model's own distribution: nothing banned, nothing sharpened.

    A caption that has not ended after `max_tokens` tokens is broken off there. No end is put to it, since its
    probability would not be the model's. Torch's generator of the device decides. Where log-probabilities are not
    numbers, those of the captions are none either.

    Parameters
    ----------
    step : callable
        A :data:`StepFunction`.
    memory : tuple of Tensor
        What it reads of the images, B rows each.
    start : tuple of Tensor
        The first state, B * samples rows each, image by image.
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
    images = len(memory[0])
    state, words = start, torch.full((images * samples,), begin, device=memory[0].device)
    going = torch.ones_like(words, dtype=torch.bool)
    lengths = torch.zeros_like(words)
    totals = torch.zeros_like(words, dtype=torch.float64)
    drawn: list[Tensor] = []
    while len(drawn) < max_tokens and going.any():
        log_probabilities, state = step(words, memory, state)
        # Of exponential times at these rates the first, as torch.multinomial draws, which stops a GPU for its checks.
        rates = log_probabilities.exp()
        words = (rates / torch.empty_like(rates).exponential_()).argmax(1)
        totals += log_probabilities.gather(1, words[:, None]).squeeze(1) * going
        lengths += going
        going = going & (words != end)
        drawn.append(words)
    return Samples(*(part.view(images, samples, *part.shape[1:]) for part in (torch.stack(drawn, 1), lengths, totals)))
