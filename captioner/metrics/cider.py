"""CIDEr-D (Vedantam et al., 2015), the "CIDEr" of the COCO evaluation server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.errors import InputError
from captioner.metrics.ngrams import LONGEST, Counts, Ngram, Trie, count_ngrams, split
from captioner.metrics.score import ImageId, Score, pair

SIGMA = 6.0  # the standard deviation of the length penalty
SCALE = 10.0


def cider_d(
    references: Mapping[ImageId, Sequence[Sequence[str]]],
    hypotheses: Mapping[ImageId, Sequence[str]],
    *,
    document_frequencies: DocumentFrequencies | None = None,
) -> Score:
    """Return CIDEr-D, averaged over the images.

    Every n-gram weighs its count times its inverse document frequency log(images / images with it in a reference). An
    image's score is 10 times the mean over n = 1 to 4 and over its references of

        exp(-(l_c - l_s)^2 / (2 sigma^2)) * min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)

    for the weighted n-grams g of the hypothesis c and the reference s (Vedantam et al., equation 4 in section 8). The
    lengths l are in words: the server's code counts bigrams, of which the difference is the same. As there words are
    not stemmed.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    hypotheses
        For each image the tokens of its caption.
    document_frequencies
        By default those of the references, as on the server: the score then depends on the set of images, and one image
        alone scores 0.

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, or if there are none.
    """
    pair(references, hypotheses)  # says which ids do not match, before anything is counted
    return CIDErD(references, document_frequencies).score(hypotheses)


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images of a corpus each n-gram occurs.

    Attributes
    ----------
    images : int
        How many the corpus has.
    counts : mapping from n-grams to int
        How many of them have the n-gram, a tuple of 1 to 4 words, in a reference. One that is not here weighs as much
        as one of a single image.

    Raises
    ------
    InputError
        If there is no image, or an n-gram in none or in more images than there are.
    """

    images: int
    counts: Mapping[Ngram, int]

    def __post_init__(self) -> None:
        """Refuse numbers that no corpus has."""
        least, most = min(self.counts.values(), default=1), max(self.counts.values(), default=1)
        if least < 1 or self.images < most:
            raise InputError(
                f"Document frequencies of {least} to {most} do not fit {self.images} images: give the number of images "
                "in which the n-grams were counted."
            )

    @classmethod
    def from_references(cls, references: Mapping[ImageId, Sequence[Sequence[str]]]) -> DocumentFrequencies:
        """Count the n-grams of a corpus.

        Parameters
        ----------
        references
            For each image the tokens of its references.

        Raises
        ------
        InputError
            If there is no image, or one without a reference.
        """
        captions, ranges = _flatten(references)
        trie, counts = count_ngrams(captions)
        frequencies = _document_frequencies(trie, counts, ranges)
        return cls(len(ranges), dict(zip(trie.ngrams(), frequencies.tolist(), strict=True)))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are the same for the same frequencies, in whatever order they were counted.

        Rewards compare only where these do: the same code with the frequencies of another corpus gives other scores,
        and nothing fails.
        """
        content = json.dumps([self.images, sorted(self.counts.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class CIDErD(Generic[ImageId]):
    """CIDEr-D against references that are counted and weighted once, for self-critical training.

    `cider_d` says how it is computed.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    document_frequencies
        By default those of the references.

    Raises
    ------
    InputError
        If there is no image, or one without a reference.
    """

    def __init__(
        self,
        references: Mapping[ImageId, Sequence[Sequence[str]]],
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        captions, self._ranges = _flatten(references)
        given = {} if document_frequencies is None else document_frequencies.counts
        self._trie, counts = count_ngrams(captions, [*given])
        if document_frequencies is None:
            images, frequencies = len(self._ranges), _document_frequencies(self._trie, counts, self._ranges)
        else:
            images = document_frequencies.images
            frequencies = np.array([given.get(ngram, 0) for ngram in self._trie.ngrams()], np.int64)
        # The server's difference of logarithms, so that an n-gram of all images weighs exactly 0. One of no image, for
        # which the last place stands, weighs as much as one of a single image.
        self._rarity = np.log(images) - np.log(np.maximum(1, np.append(frequencies, 0)))
        self._references = _weigh(self._trie, counts, self._rarity)
        self._starts = np.searchsorted(counts.caption, np.arange(len(captions) + 1))  # of each reference's entries

    def score(self, hypotheses: Mapping[ImageId, Sequence[str]]) -> Score:
        """Return CIDEr-D of one caption for every image, averaged over the images.

        Parameters
        ----------
        hypotheses
            For each image the tokens of its caption.

        Raises
        ------
        InputError
            If the ids of references and hypotheses differ.
        """
        ranges, captions = zip(*pair(self._ranges, hypotheses), strict=True)
        per_image = self._compare(ranges, captions)
        return Score.mean(per_image)

    def rewards(self, image_ids: Sequence[ImageId], hypotheses: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return CIDEr-D of each hypothesis against the references of its image.

        Parameters
        ----------
        image_ids
            The image of each hypothesis. An image may come several times or not at all.
        hypotheses
            The tokens of each hypothesis.

        Returns
        -------
        float64 array of shape (K,)
            In the order of the hypotheses.

        Raises
        ------
        InputError
            If an image has no references here, or if the images are not as many as the hypotheses.
        """
        if len(image_ids) != len(hypotheses):
            raise InputError(
                f"{len(hypotheses)} hypotheses have {len(image_ids)} image ids: give for each the id of its image."
            )
        for image_id in image_ids:
            if image_id not in self._ranges:
                raise InputError(
                    f"Image {image_id!r} has no references to reward its hypothesis by: "
                    "give the references of every image that is captioned, under the same ids."
                )
        return self._compare([self._ranges[image_id] for image_id in image_ids], hypotheses)

    def _compare(self, ranges: Sequence[range], hypotheses: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return CIDEr-D of each hypothesis against a range of the references, (K,)."""
        trie, counts = count_ngrams([split(hypothesis) for hypothesis in hypotheses])
        known = self._trie.find(trie)
        ours, theirs = _weigh(trie, counts, self._rarity[known]), self._references

        # All entries of a hypothesis's references, which lie side by side.
        first = self._starts[np.array([one.start for one in ranges], np.int64)]
        sizes = self._starts[np.array([one.stop for one in ranges], np.int64)] - first
        hypothesis = np.repeat(np.arange(len(ranges)), sizes)
        entry = np.arange(len(hypothesis)) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)

        # Of these the ones whose n-gram the hypothesis has too, and its own entry for the n-gram.
        keys = ours.caption * len(self._rarity) + known[ours.ngram]
        ascending = np.argsort(keys)
        sought = hypothesis * len(self._rarity) + theirs.ngram[entry]
        place = np.searchsorted(keys, sought, sorter=ascending)
        common = np.append(keys[ascending], -1)[place] == sought
        hypothesis, entry, own = hypothesis[common], entry[common], ascending[place[common]]

        dot = np.minimum(ours.weight[own], theirs.weight[entry]) * theirs.weight[entry]
        cosine = dot / (ours.norm[own] * theirs.norm[entry])
        longer = ours.length[hypothesis] - theirs.length[theirs.caption[entry]]
        terms = np.exp(-(longer**2) / (2 * SIGMA**2)) * cosine
        total = np.bincount(hypothesis, terms, minlength=len(ranges))
        scores: NDArray[np.float64] = SCALE / LONGEST * total / [len(one) for one in ranges]
        return scores


class _Weights(NamedTuple):
    """The same entries, weighted by the n-grams' rarity."""

    caption: NDArray[np.int64]  # (Z,)
    ngram: NDArray[np.int64]  # (Z,)
    weight: NDArray[np.float64]  # (Z,)
    norm: NDArray[np.float64]  # (Z,), of all the weights of the caption's n-grams with as many words
    length: NDArray[np.int64]  # of each caption, in words


def _flatten(references: Mapping[ImageId, Sequence[Sequence[str]]]) -> tuple[list[list[str]], dict[ImageId, range]]:
    """Return the words of all references, and for each image the range of its own among them."""
    if not references:
        raise InputError("There are no references to count: give at least one image with its references.")
    captions: list[list[str]] = []
    ranges = {}
    for image_id, image in references.items():
        if not image:
            raise InputError(f"Image {image_id!r} has no reference: give one at least, or leave the image out.")
        ranges[image_id] = range(len(captions), len(captions) + len(image))
        captions += map(split, image)
    return captions, ranges


def _weigh(trie: Trie, counts: Counts, rarity: NDArray[np.float64]) -> _Weights:
    """Return the counts weighted by the rarity of each n-gram of the trie."""
    weight = counts.times * rarity[counts.ngram]
    level = np.repeat(np.arange(LONGEST), [len(level) for level in trie.levels])
    vector = counts.caption * LONGEST + level[counts.ngram]  # one for each caption and each n
    norm = np.sqrt(np.bincount(vector, weight**2))
    norm[norm == 0] = 1  # no division by 0: these weights are 0 too
    return _Weights(counts.caption, counts.ngram, weight, norm[vector], counts.length)


def _document_frequencies(trie: Trie, counts: Counts, ranges: Mapping[ImageId, range]) -> NDArray[np.int64]:
    """Return in how many images each n-gram of the trie is."""
    image = np.repeat(np.arange(len(ranges)), [len(one) for one in ranges.values()])
    pairs = np.sort(image[counts.caption] * trie.size + counts.ngram)
    once = pairs[np.diff(pairs, prepend=-1) > 0]  # in one image an n-gram counts once
    return np.bincount(once % max(trie.size, 1), minlength=trie.size)
