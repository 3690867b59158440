"""CIDEr-D (Vedantam et al., 2015), the "CIDEr" of the COCO evaluation server."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from captioner.metrics.score import LONGEST, ImageId, Score, count_ngrams, pair

SIGMA = 6.0  # the standard deviation of the length penalty
SCALE = 10.0

Ngram = tuple[str, ...]


def cider_d(
    references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]
) -> Score:
    """Return CIDEr-D, averaged over the images.

    Every n-gram weighs its count times its inverse document frequency log(images / images with it in a reference). An
    image's score is 10 times the mean over n = 1 to 4 and over its references of

        exp(-(l_c - l_s)^2 / (2 sigma^2)) * min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)

    for the weighted n-grams g of the hypothesis c and the reference s (Vedantam et al., equation 4 in section 8). As in
    the server's code a caption's length l is its number of bigrams, and words are not stemmed. The document
    frequencies are those of the references given, so the score depends on the set of images; one image alone scores 0.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    hypotheses
        For each image the tokens of its caption.

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, or if there are none.
    """
    pairs = [
        ([count_ngrams(reference) for reference in image], count_ngrams(hypothesis))
        for image, hypothesis in pair(references, hypotheses)
    ]
    frequencies = Counter(
        ngram for image, _ in pairs for ngram in {key for caption in image for counts in caption for key in counts}
    )
    rarity = {ngram: math.log(len(pairs) / frequency) for ngram, frequency in frequencies.items()}
    unseen = math.log(len(pairs))  # an n-gram of no reference counts as one of a single image

    per_image = np.empty(len(pairs))
    for index, (image, hypothesis) in enumerate(pairs):
        weighted = _weigh(hypothesis, rarity, unseen)
        per_image[index] = np.mean([_similarity(weighted, _weigh(caption, rarity, unseen)) for caption in image])
    return Score(float(per_image.mean()), per_image)


class _Weighted(NamedTuple):
    weights: list[dict[Ngram, float]]  # one for each n
    norms: list[float]
    length: int


def _weigh(caption: list[Counter[Ngram]], rarity: Mapping[Ngram, float], unseen: float) -> _Weighted:
    weights = [{ngram: count * rarity.get(ngram, unseen) for ngram, count in counts.items()} for counts in caption]
    return _Weighted(weights, [math.hypot(*one.values()) for one in weights], caption[1].total())


def _similarity(hypothesis: _Weighted, reference: _Weighted) -> float:
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms, strict=True
    ):
        if our_norm and their_norm:
            common = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs
            )
            total += common / (our_norm * their_norm)
    return SCALE * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * SIGMA**2)) * total / LONGEST
