"""ROUGE-L (Lin, 2004) with the choices of the COCO evaluation server (Chen et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from captioner.metrics.score import ImageId, Score, pair

BETA = 1.2  # recall counts beta times as much as precision


def rouge_l(
    references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]
) -> Score:
    """Return ROUGE-L, the F-measure of the longest common subsequence, averaged over the images.

    With precision P = lcs / len(hypothesis) and recall R = lcs / len(reference) it is
    (1 + beta^2) P R / (R + beta^2 P) (Lin, equations 2 to 4). As on the server the best P and the best R over the
    references are taken, which may come from two of them. An empty caption is one empty word, as there: it scores 1
    where a reference is empty too, and else 0.

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
    per_image = np.array([_f_measure(*one) for one in pair(references, hypotheses)])
    return Score.mean(per_image)


def _f_measure(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
    words = _split(hypothesis)
    others = [_split(reference) for reference in references]
    common = longest_common_subsequences(words, others)
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _split(tokens: Sequence[str]) -> list[str]:
    # The server joins the tokens by spaces and, for ROUGE alone, splits at nothing but these: a token with a no-break
    # space is one word, and a caption without tokens is one empty word.
    return " ".join(tokens).split(" ")


def longest_common_subsequences(words: Sequence[str], others: Sequence[Sequence[str]]) -> list[int]:
    """Return for each of the others how many words it has in common with the first in the same order, gaps allowed.

    A row of the table of lengths that dynamic programming fills is held as one number (Crochemore et al., 2001): bit i
    is 0 where the length grows with word i. A word's row follows from the last one by a sum, whose carries do what the
    loop over the columns did.
    """
    places: dict[str, int] = {}  # bit i of a word's number: it is word i
    for index, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(words)) - 1
    lengths = []
    for other in others:
        row = every
        for word in other:
            if word in places:
                matches = row & places[word]
                row = (row + matches) | (row - matches)
        lengths.append(len(words) - (row & every).bit_count())
    return lengths
