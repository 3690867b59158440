"""What the metrics share: the score they give, and hypotheses next to their references."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from captioner.errors import InputError

ImageId = TypeVar("ImageId", bound=Hashable)
References = TypeVar("References", bound=Sequence[object])
Hypothesis = TypeVar("Hypothesis")


class Score(NamedTuple):
    """A metric's value for a set of images, and for each of them.

    Attributes
    ----------
    corpus : float
        The published number. The mean over the images for ROUGE-L and CIDEr-D, but not for BLEU.
    per_image : float64 array of shape (B,)
        In the order of the hypotheses' ids.
    over : callable, optional
        The corpus score of a set that has each image a given number of times, an int64 array of shape (B,). None for a
        score that is not computed from figures for each image.
    """

    corpus: float
    per_image: NDArray[np.float64]
    over: Callable[[NDArray[np.int64]], float] | None = None

    @classmethod
    def mean(cls, per_image: NDArray[np.float64]) -> Score:
        """Return a score that is the mean over the images."""
        return cls(float(per_image.mean()), per_image, partial(_mean, per_image))


def _mean(per_image: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    return float(counts @ per_image / counts.sum())


def pair(
    references: Mapping[ImageId, References], hypotheses: Mapping[ImageId, Hypothesis]
) -> list[tuple[References, Hypothesis]]:
    """Return every image's references with its hypothesis, in the order of the hypotheses.

    Raises
    ------
    InputError
        If there is nothing to score, or if an image has references but no hypothesis or the reverse: a score over a
        part of the images compares with nothing.
    """
    if not hypotheses and not references:
        raise InputError("There is nothing to score: give at least one image with its caption and its references.")
    alone = [image_id for image_id in hypotheses if not references.get(image_id)]
    if alone:
        raise InputError(
            f"{len(alone)} of {len(hypotheses)} captioned images have no reference, the first is {alone[0]!r}: "
            "give the references of every image that is scored, under the same ids."
        )
    missing = [image_id for image_id in references if image_id not in hypotheses]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(references)} images with references have no caption to score, the first is "
            f"{missing[0]!r}: caption them too, or leave their references out."
        )
    return [(references[image_id], hypothesis) for image_id, hypothesis in hypotheses.items()]
