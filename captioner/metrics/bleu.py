"""BLEU (Papineni et al., 2002) with the choices of the COCO evaluation server (Chen et al., 2015)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from captioner.metrics.ngrams import LONGEST, Ngram, ngrams, split
from captioner.metrics.score import ImageId, Score, pair

# The server adds these so that no division is by zero. They move the last digits of a corpus score; an image's BLEU-n
# is small but not 0 where its caption has fewer than n words or no n-gram in common.
TINY = 1e-15
SMALL = 1e-9


def bleu(
    references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]
) -> dict[str, Score]:
    """Return BLEU-1 to BLEU-4.

    BLEU-n is exp(min(0, 1 - r / c)) times the geometric mean of the clipped precisions of the 1-grams to n-grams
    (Papineni et al., section 2.3). The counts, the length c of the hypotheses and the length r of the references are
    summed over the images first; r takes for each image the reference closest in length, of two as close the shorter.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    hypotheses
        For each image the tokens of its caption.

    Returns
    -------
    dict
        The scores under "BLEU-1" to "BLEU-4".

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, or if there are none.
    """
    images = [_statistics(*one) for one in pair(references, hypotheses)]
    statistics = np.array(images, np.float64)  # (B, 2 + 2 * LONGEST)
    per_image = _from_statistics(statistics)
    once = np.ones(len(statistics), np.int64)
    over = [partial(_corpus, statistics, n) for n in range(LONGEST)]
    return {f"BLEU-{n + 1}": Score(over[n](once), per_image[:, n], over[n]) for n in range(LONGEST)}


def _corpus(statistics: NDArray[np.float64], n: int, counts: NDArray[np.int64]) -> float:
    """Return BLEU-(n + 1) of a set that has each image a number of times, (B,)."""
    return float(_from_statistics(counts @ statistics)[n])


def _statistics(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> list[int]:
    """Return what BLEU sums over images: both lengths, the clipped matches for each n, the n-grams for each n."""
    words = split(hypothesis)
    length = len(words)
    counts = Counter(ngrams(words))
    others = [split(reference) for reference in references]
    _, closest = min((abs(len(other) - length), len(other)) for other in others)
    most: dict[Ngram, int] = {}  # in any one reference, of the n-grams that the hypothesis has
    for other in others:
        for ngram, count in Counter(filter(counts.__contains__, ngrams(other))).items():
            if count > most.get(ngram, 0):
                most[ngram] = count
    matches = [0] * LONGEST
    for ngram, count in most.items():
        matches[len(ngram) - 1] += min(count, counts[ngram])
    return [length, closest, *matches, *(max(length - n, 0) for n in range(LONGEST))]


def _from_statistics(statistics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return BLEU-1 to BLEU-4 in the last dimension, (..., 2 + 2 * LONGEST) -> (..., LONGEST)."""
    length, closest = statistics[..., :1], statistics[..., 1:2]
    matches, total = statistics[..., 2 : 2 + LONGEST], statistics[..., 2 + LONGEST :]
    precisions = np.cumprod((matches + TINY) / (total + SMALL), axis=-1)
    ratio = (length + TINY) / (closest + SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    result: NDArray[np.float64] = brevity * precisions ** (1 / np.arange(1, LONGEST + 1))
    return result
