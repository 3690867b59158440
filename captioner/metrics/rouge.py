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
    references are taken, which may come from two of them. An empty hypothesis scores 0.

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
    return Score(float(per_image.mean()), per_image)


def _f_measure(references: Sequence[Sequence[str]], hypothesis: Sequence[str]) -> float:
    common = [longest_common_subsequence(reference, hypothesis) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(hypothesis)
    recall = max(length / max(len(reference), 1) for length, reference in zip(common, references, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of tokens that two captions have in common in the same order, gaps allowed."""
    row = [0] * (len(second) + 1)  # row[j]: for the tokens of `first` seen so far and the first j of `second`
    for token in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if token == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
