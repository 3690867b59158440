import math
from dataclasses import fields
from itertools import product

import pytest
import torch

from captioner.search import Limits, beam_search

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
