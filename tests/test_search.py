import math
from collections import Counter
from dataclasses import fields
from itertools import pairwise, product

import pytest
import torch

from captioner.search import BLOCK, Hypothesis, Limits, beam_search, draw, largest

BEGIN, END, A, B = range(4)

# The probability of the next word (column) after a word (row), as in allennlp's tests: worked out on paper below.
MATRIX = torch.tensor(
    [
        [0.0, 0.0, 0.6, 0.4],  # BEGIN
        [0.0, 1.0, 0.0, 0.0],  # END
        [0.0, 0.4, 0.3, 0.3],  # A
        [0.0, 0.9, 0.05, 0.05],  # B
    ]
)


def by_matrix(matrix, search=beam_search, **settings):
    """Search where the next word depends on the last alone."""
    log_probabilities = matrix.double().log()
    return find(lambda words, memory, state: (log_probabilities[words], state), torch.zeros(1), (), search, **settings)


def find(step, memory, start, search=beam_search, **settings):
    limits = {field.name: settings.pop(field.name) for field in fields(Limits) if field.name in settings}
    return search(step, (memory,), start, begin=BEGIN, end=END, limits=Limits(**limits), **settings)


# The next word depends on the image and on all words before it, which the state carries as one number to the base V.
V, WORDS, IMAGES = 4, 3, 3
TABLE = torch.randn(IMAGES, V**WORDS, V, generator=torch.Generator().manual_seed(0)).double().mul(2).log_softmax(-1)


def by_history(images=range(IMAGES), search=beam_search, **settings):
    def step(words, memory, state):
        (images,), (history,) = memory, state
        history = history * V + words
        return TABLE[images.repeat_interleave(len(words) // len(images)), history], (history,)

    memory = torch.tensor(list(images))
    return find(step, memory, (torch.zeros_like(memory),), search, **{"max_words": WORDS} | settings)


def log_probability_of(tokens, image):
    total, history = 0.0, BEGIN
    for token in tokens:
        total += TABLE[image, history, token].item()
        history = history * V + token
    return total


def all_captions(words=(A, B)):
    for length in range(WORDS + 1):
        for said in product(words, repeat=length):
            yield [*said, END]


def test_a_beam_finds_what_greedy_misses():
    # Greedy: A (0.6), END (0.4). The best: B (0.4), END (0.9).
    (greedy,) = by_matrix(MATRIX, max_words=2)
    assert [hypothesis.tokens for hypothesis in greedy] == [[A, END]]
    assert greedy[0].log_probability == pytest.approx(math.log(0.24))
    (beam,) = by_matrix(MATRIX, max_words=2, beam_size=2)
    assert [hypothesis.tokens for hypothesis in beam] == [[B, END], [A, END]]
    assert [hypothesis.log_probability for hypothesis in beam] == pytest.approx([math.log(0.36), math.log(0.24)])


def test_the_length_penalty_can_prefer_the_longer_caption():
    # B END has 0.45, A B END 0.55 * 0.7 = 0.385.
    matrix = torch.tensor([[0, 0, 0.55, 0.45], [0, 1, 0, 0], [0, 0, 0.3, 0.7], [0, 1, 0, 0]])
    (by_sum,) = by_matrix(matrix, max_words=2, beam_size=4)
    assert [hypothesis.tokens for hypothesis in by_sum] == [[B, END], [A, B, END]]
    (by_mean,) = by_matrix(matrix, max_words=2, beam_size=4, length_penalty=1)
    assert [hypothesis.tokens for hypothesis in by_mean] == [[A, B, END], [B, END]]
    assert [hypothesis.score for hypothesis in by_mean] == pytest.approx([math.log(0.385) / 3, math.log(0.45) / 2])
    assert [hypothesis.log_probability for hypothesis in by_mean] == pytest.approx([math.log(0.385), math.log(0.45)])


@pytest.mark.parametrize("banned", [(), (A,)])
def test_a_beam_of_one_is_greedy(banned):
    for image, (hypothesis,) in enumerate(by_history(banned=banned)):
        tokens, history = [], BEGIN
        while END not in tokens:
            allowed = [word for word in (END, A, B) if word not in banned] if len(tokens) < WORDS else [END]
            tokens.append(max(allowed, key=lambda word, history=history: TABLE[image, history, word]))
            history = history * V + tokens[-1]
        assert hypothesis.tokens == tokens


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_a_wide_beam_is_brute_force(length_penalty):
    for image, found in enumerate(by_history(beam_size=V**WORDS, length_penalty=length_penalty)):
        scores = {
            tuple(tokens): log_probability_of(tokens, image) / len(tokens) ** length_penalty
            for tokens in all_captions()
        }
        best_first = sorted(scores, key=lambda tokens: -scores[tokens])
        assert [tuple(hypothesis.tokens) for hypothesis in found] == best_first
        assert [hypothesis.score for hypothesis in found] == pytest.approx([scores[tokens] for tokens in best_first])


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_rows_of_the_state_follow_their_hypotheses(beam_size):
    for image, found in enumerate(by_history(beam_size=beam_size)):
        for tokens, log_probability, _ in found:
            assert log_probability == pytest.approx(log_probability_of(tokens, image), abs=1e-12)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_hypotheses_differ_come_best_first_and_are_at_most_the_beam(beam_size):
    for found in by_history(beam_size=beam_size, length_penalty=0.7):
        assert 1 <= len(found) <= beam_size
        assert len({tuple(hypothesis.tokens) for hypothesis in found}) == len(found)
        assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)


def test_one_that_ends_at_every_step_does_not_overfill_the_beam():
    matrix = torch.tensor([[0, 0.4, 0.6, 0], [0, 1, 0, 0], [0, 0.4, 0.6, 0], [0, 1, 0, 0]])
    (found,) = by_matrix(matrix, max_words=6, beam_size=2)
    # 0.4, then 0.6 * 0.4, and at the longest, where nothing but the end can follow, 0.6^6 * 0.4.
    assert [hypothesis.tokens for hypothesis in found] == [[END], [A, END]]


@pytest.mark.parametrize("beam_size", [1, 3, 20])
def test_a_batch_of_images_equals_one_at_a_time(beam_size):
    together = by_history(beam_size=beam_size, length_penalty=0.7)
    assert together == [by_history([image], beam_size=beam_size, length_penalty=0.7)[0] for image in range(IMAGES)]
    assert len({tuple(found[0].tokens) for found in together}) > 1


def test_an_image_that_is_finished_waits_for_the_others():
    # The first image ends at once with either place, the second never before it must.
    now, never = torch.tensor([0.0, 1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 1e-9, 0.5, 0.5]).log()

    def step(words, memory, state):
        image = memory[0].repeat_interleave(len(words) // len(memory[0]))
        return torch.where(image[:, None] == 0, now, never), state

    first, second = find(step, torch.tensor([0, 1]), (), beam_size=2, max_words=5)
    assert [hypothesis.tokens for hypothesis in first] == [[END]]
    assert [len(hypothesis.tokens) for hypothesis in second] == [6, 6]


def test_banned_words_are_never_said_and_the_rest_is_not_renormalised():
    for image, found in enumerate(by_history(beam_size=V**WORDS, banned=(B,))):
        said = {tuple(hypothesis.tokens): hypothesis.log_probability for hypothesis in found}
        assert said == {
            tuple(tokens): pytest.approx(log_probability_of(tokens, image)) for tokens in all_captions(words=(A,))
        }


def test_the_begin_token_is_never_said():
    matrix = torch.tensor([[0.9, 0.01, 0.05, 0.04]]).expand(4, -1)
    (found,) = by_matrix(matrix, max_words=3, beam_size=4)
    assert not any(BEGIN in hypothesis.tokens for hypothesis in found)


@pytest.mark.parametrize("banned", [(), (END,)])
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("max_words", [0, 1, 4])
def test_there_is_always_a_caption_and_after_the_last_word_comes_the_end(max_words, beam_size, banned):
    unwilling = torch.tensor([[0.0, 1e-30, 0.7, 0.3]]).expand(4, -1)
    (found,) = by_matrix(unwilling, max_words=max_words, beam_size=beam_size, banned=banned)
    longest = max(found, key=lambda hypothesis: len(hypothesis.tokens))
    assert longest.tokens == [A] * max_words + [END]
    assert longest.log_probability == pytest.approx(max_words * math.log(0.7) + math.log(1e-30))


def test_a_beam_may_be_wider_than_the_vocabulary():
    (found,) = by_matrix(MATRIX, max_words=1, beam_size=9)
    assert [hypothesis.tokens for hypothesis in found] == [[B, END], [A, END]]


# Limits


LIMITS = {
    "at least 2": {"min_words": 2},
    "just 3": {"min_words": 3},
    "at most 1": {"max_words": 1},
    "no word twice": {"no_repeat_ngram": 1},
    "no pair twice": {"no_repeat_ngram": 2},
    "at least 2, no word twice": {"min_words": 2, "no_repeat_ngram": 1},
    "without A": {"banned": (A,)},
    "B first": {"prefix": (B,)},
    "B B first, no word twice": {"prefix": (B, B), "no_repeat_ngram": 1},
    "B first, without B, at least 2": {"prefix": (B,), "banned": (B,), "min_words": 2},
}
every_limit = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)


def is_allowed(tokens, min_words=0, max_words=WORDS, no_repeat_ngram=0, banned=(), prefix=()):
    """Whether a caption, which ends, is one that the limits allow: its words after the prefix, one by one."""
    words = tokens[:-1]
    if tuple(words[: len(prefix)]) != prefix or not min_words <= len(words) <= max_words:
        return False
    for place in range(len(prefix), len(words)):
        ngram = words[place + 1 - no_repeat_ngram : place + 1] if place + 1 >= no_repeat_ngram > 0 else None
        before = [words[first : first + no_repeat_ngram] for first in range(place + 1 - no_repeat_ngram)]
        if words[place] in banned or ngram in before:
            return False
    return True


@every_limit
@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_a_wide_beam_is_brute_force_within_each_limit(length_penalty, limits):
    for image, found in enumerate(by_history(beam_size=V**WORDS, length_penalty=length_penalty, **limits)):
        scores = {
            tuple(tokens): log_probability_of(tokens, image) / len(tokens) ** length_penalty
            for tokens in all_captions()
            if is_allowed(tokens, **limits)
        }
        best_first = sorted(scores, key=lambda tokens: -scores[tokens])
        assert [tuple(hypothesis.tokens) for hypothesis in found] == best_first
        assert [hypothesis.score for hypothesis in found] == pytest.approx([scores[tokens] for tokens in best_first])
        for tokens, log_probability, _ in found:
            assert log_probability == pytest.approx(log_probability_of(tokens, image), abs=1e-12)


@pytest.mark.parametrize("search", [beam_search, draw])
@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"banned": (A, B), "min_words": 2}, [END]),
        ({"no_repeat_ngram": 1, "min_words": 3, "prefix": (B,)}, [B, A, END]),
        ({"banned": (A, B, END), "prefix": (A,)}, [A, END]),
    ],
)
def test_where_no_word_may_follow_the_caption_ends(limits, said, search):
    settings = {"beam_size": 3} if search is beam_search else {"samples": 3}
    for image, found in enumerate(by_history(search=search, **limits, **settings)):
        assert {tuple(hypothesis.tokens) for hypothesis in found} == {tuple(said)}
        assert found[0].log_probability == pytest.approx(log_probability_of(said, image))


def test_a_caption_that_may_not_go_on_does_not_stand_for_one_that_may():
    # After A comes A alone, which is not to be said twice, and the end, which comes too soon. B goes on.
    matrix = torch.tensor([[0, 0, 0.9, 0.1], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0.2, 0.4, 0.4]])
    (found,) = by_matrix(matrix, beam_size=2, min_words=2, max_words=2, no_repeat_ngram=1)
    assert [hypothesis.tokens for hypothesis in found if hypothesis.log_probability > -math.inf] == [[B, A, END]]


# A search that is plain


class Toy:
    """A recurrent model of some images, each row of which is computed alone, and so exactly as in any batch."""

    def __init__(self, images, vocabulary=7, seed=0, eager=1.0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.images, self.words, self.recur = draw(images, 5), draw(vocabulary, 5), draw(5, 5)
        self.score = 2 * draw(5, vocabulary)
        self.end = eager * draw(images).abs()
        self.rows, self.known = [], {}

    def step(self, words, memory, state):
        queries = len(words) // len(memory[0])
        self.rows.append((len(memory[0]), queries))
        image = memory[0].repeat_interleave(queries)
        mixed = (state[0][:, :, None] * self.recur).sum(1) + self.words[words] + self.images[image]
        hidden = mixed.tanh()
        scores = (hidden[:, :, None] * self.score).sum(1)
        scores[:, END] += self.end[image] * state[1] - 3
        return scores.log_softmax(-1), (hidden, state[1] + 1)

    def find(self, images, search=beam_search, **settings):
        start = torch.zeros(len(images), 5, dtype=torch.float64), torch.zeros(len(images), dtype=torch.float64)
        return find(self.step, torch.tensor(images), start, search, **settings)

    def next(self, image, said):
        if (image, said) in self.known:
            return self.known[image, said]
        state = torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for word in [BEGIN, *said]:
            log_probabilities, state = self.step(torch.tensor([word]), (torch.tensor([image]),), state)
        self.known[image, said] = log_probabilities[0].tolist()
        return self.known[image, said]


TOY = Toy(12)


def plainly(toy, image, beam_size, max_words, length_penalty, groups=1, diversity=0.0, **limits):
    """The search hypothesis by hypothesis, in lists, to the longest caption."""
    width, limits = beam_size // groups, Limits(max_words=max_words, **limits)
    prefix = list(limits.prefix)
    total = sum(toy.next(image, tuple(prefix[:place]))[word] for place, word in enumerate(prefix))
    beams, finished = [[(total, total, prefix)] for _ in range(groups)], [[] for _ in range(groups)]
    for _ in range(len(prefix), max_words + 1):
        said = Counter()
        for group, beam in enumerate(beams):
            candidates = []
            for rank, total, words in beam:
                for word, log_probability in enumerate(toy.next(image, tuple(words))):
                    ends = word == END and len(words) >= limits.min_words
                    if ends or (word not in (BEGIN, END, *limits.banned) and len(words) < max_words):
                        if ends or is_allowed([*words, word, END], 0, max_words, limits.no_repeat_ngram, (), ()):
                            following = rank + (log_probability - diversity * said[word] * (word != END))
                            candidates.append((following, total + log_probability, [*words, word]))
            best = sorted(candidates, key=lambda one: -one[0])[:width]
            finished[group] += [one for one in best if one[2][-1] == END]
            beams[group] = [one for one in best if one[2][-1] != END]
            said.update(words[-1] for _, _, words in beams[group])
    best = {}
    for group in finished:
        scored = [Hypothesis(words, total, rank / len(words) ** length_penalty) for rank, total, words in group]
        for hypothesis in sorted(scored, key=lambda one: -one.score)[:width]:
            other = best.setdefault(tuple(hypothesis.tokens), hypothesis)
            best[tuple(hypothesis.tokens)] = max(hypothesis, other, key=lambda one: one.score)
    return sorted(best.values(), key=lambda one: -one.score)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"beam_size": 1},
        {"beam_size": 3},
        {"beam_size": 4, "min_words": 4},
        {"beam_size": 3, "no_repeat_ngram": 2, "banned": (4,)},
        {"beam_size": 3, "prefix": (3, 5), "min_words": 3},
        {"beam_size": 4, "groups": 2, "diversity": 0.8},
        {"beam_size": 3, "groups": 3, "diversity": 3.0, "prefix": (3,), "no_repeat_ngram": 1},
    ],
    ids=str,
)
def test_stopping_early_and_leaving_the_batch_change_nothing(settings, length_penalty):
    toy, images = TOY, range(12)
    settings = {"max_words": 8, "length_penalty": length_penalty, **settings}
    toy.rows.clear()
    together = toy.find(images, **settings)
    rows = [*toy.rows]
    for image, found in enumerate(together):
        # Compared without the rounding of sums, whose order is the plain search's own.
        expected = plainly(toy, image, **settings)
        assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
        for one, other in zip(found, expected, strict=True):
            assert one[1:] == pytest.approx(other[1:], abs=1e-12)
        assert toy.find([image], **settings) == [found]
    assert len({len(found[0].tokens) for found in together}) > 1
    present = [images for images, _ in rows]
    assert present == sorted(present, reverse=True) and present[-1] < present[0] == 12


def test_the_search_stops_when_nothing_can_enter_the_best_and_not_before():
    toy = Toy(1, eager=4.0)
    toy.find([0], beam_size=2, max_words=30)
    assert len(toy.rows) < 15
    assert toy.rows[0] == (1, 1) and {*toy.rows[1:]} == {(1, 2)}  # one hypothesis of each image at first


# Diverse groups


def test_the_first_group_is_a_plain_beam_and_the_others_say_something_else():
    toy = Toy(6)
    grouped = toy.find(range(6), beam_size=6, groups=3, diversity=1.5, max_words=6)
    plain, wide = toy.find(range(6), beam_size=2, max_words=6), toy.find(range(6), beam_size=6, max_words=6)
    for found, beam in zip(grouped, plain, strict=True):
        assert len({tuple(hypothesis.tokens) for hypothesis in found}) == len(found) <= 6
        assert [hypothesis for hypothesis in found if hypothesis in beam] == beam
        assert [hypothesis.score for hypothesis in found] == sorted((one.score for one in found), reverse=True)
    first_words = [
        sum(len({hypothesis.tokens[0] for hypothesis in found}) for found in each) for each in (grouped, wide)
    ]
    assert first_words[0] > first_words[1]


def test_groups_that_cost_nothing_find_one_beam_thrice_and_give_it_once():
    toy = Toy(6)
    same = toy.find(range(6), beam_size=6, groups=3, diversity=0.0, max_words=6)
    assert same == toy.find(range(6), beam_size=2, max_words=6)


# Drawing


FILTERS = {
    "all": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top 2": {"top_k": 2},
    "nucleus": {"top_p": 0.7},
    "all three": {"temperature": 1.5, "top_k": 2, "top_p": 0.8},
    "limited": {"top_k": 2, "min_words": 1, "no_repeat_ngram": 1, "prefix": (B,)},
}


def filtered(probabilities, temperature=1.0, top_k=0, top_p=1.0):
    """What is drawn by, word by word."""
    weights = {word: share ** (1 / temperature) for word, share in probabilities.items()}
    best_first = sorted(weights, key=lambda word: -weights[word])[: top_k or None]
    left, whole = {}, sum(weights[word] for word in best_first)
    for word in best_first:
        if sum(left.values()) < top_p * whole:
            left[word] = weights[word]
    return {word: weight / sum(left.values()) for word, weight in left.items()}


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
def test_captions_are_drawn_as_often_as_their_filtered_probability_says(settings):
    limits = {name: settings[name] for name in settings if name in {field.name for field in fields(Limits)}}
    filters = {name: value for name, value in settings.items() if name not in limits}
    expected, prefix = {}, list(limits.get("prefix", ()))

    def go_on(words, probability):
        history = BEGIN
        for word in words:
            history = history * V + word
        following = [word for word in (END, A, B) if word == END or is_allowed([*words, word, END], 0, **limits_of)]
        following = [word for word in following if len(words) < WORDS or word == END]
        following = [word for word in following if len(words) >= limits.get("min_words", 0) or word != END] or [END]
        for word, share in filtered(
            {word: TABLE[0, history, word].exp().item() for word in following}, **filters
        ).items():
            if word == END:
                expected[(*words, END)] = probability * share
            else:
                go_on([*words, word], probability * share)

    limits_of = {name: value for name, value in limits.items() if name in ("no_repeat_ngram", "prefix")}
    go_on(prefix, 1.0)
    count = 20_000
    (drawn,) = by_history([0], draw, samples=count, seed=1, **settings)
    seen = Counter(tuple(hypothesis.tokens) for hypothesis in drawn)
    assert {*seen} <= {*expected} and sum(expected.values()) == pytest.approx(1) and len(drawn) == count
    chi_squared = sum((seen[ids] - count * share) ** 2 / (count * share) for ids, share in expected.items())
    freedom = len(expected) - 1
    assert chi_squared < freedom + 3.5 * math.sqrt(2 * freedom) + 3
    for hypothesis in drawn[:50]:
        assert hypothesis.log_probability == pytest.approx(log_probability_of(hypothesis.tokens, 0), abs=1e-12)


def test_a_nucleus_is_one_of_what_top_k_leaves():
    matrix = torch.tensor([0.0, 0.15, 0.3, 0.55]).expand(4, -1)
    for top_p, said in ((0.6, {B}), (0.7, {A, B})):  # B has 0.647 of the two
        (drawn,) = by_matrix(matrix, draw, samples=100, max_words=1, top_k=2, top_p=top_p)
        assert {hypothesis.tokens[0] for hypothesis in drawn} == said
    (drawn,) = by_matrix(matrix, draw, samples=100, max_words=1, top_p=0.5)  # no more than it takes
    assert {hypothesis.tokens[0] for hypothesis in drawn} == {B}


def test_a_nucleus_wider_than_what_is_asked_first_is_found():
    weights = torch.ones(1000) + torch.arange(1000) / 1e6
    matrix = torch.cat((torch.zeros(2), weights)).log_softmax(0).exp().expand(1002, -1)
    (drawn,) = by_matrix(matrix, draw, samples=2000, max_words=1, min_words=1, top_p=0.5)
    assert 490 < min(hypothesis.tokens[0] for hypothesis in drawn) < 510


def test_an_images_samples_are_its_own_whatever_else_is_in_the_batch():
    toy = Toy(12)
    settings = {"max_words": 8, "length_penalty": 0.7, "seed": 5, "temperature": 0.8, "top_k": 4}
    together = toy.find(range(12), draw, samples=3, **settings)
    assert toy.rows[-1][0] < toy.rows[0][0]  # some have left
    for image, found in enumerate(together):
        assert toy.find([image], draw, samples=3, numbers=[image], **settings) == [found]
        (more,) = toy.find([image], draw, samples=5, numbers=[image], **settings)
        assert Counter(map(str, found)) <= Counter(map(str, more))
        assert [hypothesis.score for hypothesis in found] == sorted((one.score for one in found), reverse=True)
        for tokens, total, score in found:
            assert score == total / len(tokens) ** 0.7
    assert toy.find(range(12), draw, samples=3, **settings | {"seed": 6}) != together
    alike = toy.find([0, 0, 0], draw, samples=4, numbers=[1, 1, 2], **settings)
    assert alike[0] == alike[1] != alike[2]


@pytest.mark.parametrize("search", [beam_search, draw])
def test_what_is_not_a_number_gives_no_caption(search):
    def step(words, memory, state):
        scores = torch.zeros(len(words), 4, dtype=torch.float64).log_softmax(-1)
        scores[memory[0].repeat_interleave(len(words) // len(memory[0])) == 1] = torch.nan
        return scores, state

    first, second = find(step, torch.tensor([0, 1]), (), search, max_words=3)
    assert first and not second


# The largest of long rows


@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("size", [3, BLOCK, 20 * BLOCK, 200 * BLOCK + 7])
def test_the_largest_of_rows_are_those_of_a_sort(size, count):
    scores = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    scores[0, 0, -1], scores[1, 1] = 100, -torch.inf
    scores[0, 1, size // 2 :] = scores[0, 1, 0]  # ties
    values, places = largest(scores, count)
    assert torch.equal(values, scores.sort(-1, descending=True).values[..., :count])
    assert torch.equal(scores.gather(-1, places), values)
    assert all(len({*row}) == len(row) for row in places.flatten(0, 1).tolist())


def test_what_a_filter_forbids_after_what_was_said_does_not_follow():
    seen = []

    def never_twice(tokens):
        seen.append(tuple(tokens))
        return [tokens[-1]] if tokens else [A]

    for beam_size in (1, 3):
        (found,) = by_matrix(MATRIX, max_words=4, beam_size=beam_size, filter=never_twice)
        for hypothesis in found:
            words = hypothesis.tokens[:-1]
            assert not words or words[0] != A
            assert all(one != other for one, other in pairwise(words))
    assert () in seen and max(map(len, seen)) == 3
