"""The n-grams of captions, one by one and counted in arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ngram = tuple[str, ...]
LONGEST = 4  # words in the longest n-gram that BLEU and CIDEr-D count


def split(tokens: Sequence[str]) -> list[str]:
    """Return the words that BLEU and CIDEr-D see in a caption's tokens."""
    # The server joins the tokens by spaces and, for these two, splits at white space of every kind: a token with a
    # no-break space, as in "5\xa01/2", is two words.
    return " ".join(tokens).split()


def ngrams(words: Sequence[str]) -> Iterator[Ngram]:
    """Return every n-gram of a caption for n from 1 to 4, as often as it occurs."""
    second, third, fourth = words[1:], words[2:], words[3:]
    return chain(
        zip(words, strict=False),
        zip(words, second, strict=False),
        zip(words, second, third, strict=False),
        zip(words, second, third, fourth, strict=False),
    )


@dataclass(frozen=True)
class Trie:
    """The distinct n-grams of captions as a prefix tree, numbered level by level: words, bigrams, and so on.

    An n-gram is its prefix of n - 1 words and a last word. Arrays of such pairs are several times as fast to make and
    to look up as a dictionary of tuples.

    Attributes
    ----------
    words : dict
        The number of each word.
    levels : list of int64 arrays
        For each n the n-grams in ascending order: the prefix's place in the level above times the number of words, plus
        the number of the last word.
    """

    words: dict[str, int]
    levels: list[NDArray[np.int64]]

    @property
    def size(self) -> int:
        """How many there are."""
        return sum(map(len, self.levels))

    def ngrams(self) -> list[Ngram]:
        """Return the n-grams in the order of their numbers."""
        words = list(self.words)
        result: list[Ngram] = []
        level: list[Ngram] = [()]
        for keys in self.levels:
            prefixes, last = np.divmod(keys, max(len(words), 1))
            level = [
                (*level[prefix], words[word]) for prefix, word in zip(prefixes.tolist(), last.tolist(), strict=True)
            ]
            result += level
        return result

    def find(self, other: Trie) -> NDArray[np.int64]:
        """Return the number that each n-gram of another trie has here, and `size` for one that is not here."""
        words = np.array([self.words.get(word, -1) for word in other.words], np.int64)
        result: list[NDArray[np.int64]] = []
        offset = 0
        place = np.zeros(1, np.int64)  # where each n-gram of the other's last level is in ours, -1 for nowhere
        for ours, theirs in zip(self.levels, other.levels, strict=True):
            prefixes, last = np.divmod(theirs, max(len(words), 1))
            prefix, word = place[prefixes], words[last]
            keys = np.where((prefix < 0) | (word < 0), -1, prefix * len(self.words) + word)
            place = np.searchsorted(ours, keys)
            place[np.append(ours, -2)[place] != keys] = -1
            result.append(np.where(place < 0, self.size, place + offset))
            offset += len(ours)
        return np.concatenate(result)


class Counts(NamedTuple):
    """How often n-grams occur in captions: the Z entries of a sparse matrix, by caption and by the n-gram's number."""

    caption: NDArray[np.int64]  # (Z,)
    ngram: NDArray[np.int64]  # (Z,)
    times: NDArray[np.int64]  # (Z,)
    length: NDArray[np.int64]  # of each caption, in words


def count_ngrams(captions: Sequence[Sequence[str]], others: Sequence[Sequence[str]] = ()) -> tuple[Trie, Counts]:
    """Count the n-grams of captions. The trie has those of the others too."""
    everything = [*captions, *others]
    words = {word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(everything)))}
    text = np.fromiter(map(words.__getitem__, chain.from_iterable(everything)), np.int64)
    lengths = np.array([len(caption) for caption in everything], np.int64)
    caption = np.repeat(np.arange(len(everything)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(text))  # words from here to the caption's end

    levels: list[NDArray[np.int64]] = []
    occurrences = []
    prefix = np.zeros(len(text), np.int64)  # where in the last level the n-gram is that starts here
    for n in range(LONGEST):
        start = np.flatnonzero(left > n)
        level, prefix[start] = np.unique(prefix[start] * len(words) + text[start + n], return_inverse=True)
        counted = start[caption[start] < len(captions)]  # the others' n-grams have a number but no entry
        occurrences.append((caption[counted], prefix[counted] + sum(map(len, levels))))
        levels.append(level)
    trie = Trie(words, levels)

    keys, times = np.unique(np.concatenate([row * trie.size + ngram for row, ngram in occurrences]), return_counts=True)
    row, ngram = np.divmod(keys, max(trie.size, 1))
    return trie, Counts(row, ngram, times, lengths[: len(captions)])
