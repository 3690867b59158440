"""How sure a score is, and whether two systems' scores differ by more than the choice of images explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.errors import InputError
from captioner.metrics.score import Score

RESAMPLES = 1000
NEGLIGIBLE = 1e-6  # BLEU's constants against a division by 0 make differences of this size out of nothing


class Interval(NamedTuple):
    """Between these lie 95 % of a score's values over resampled images.

    Attributes
    ----------
    low, high : float
        The 2.5th and the 97.5th percentile.
    """

    low: float
    high: float


class Comparison(NamedTuple):
    """The difference of two systems' scores, with its 95 % interval.

    Attributes
    ----------
    difference : float
        The first system's score minus the second's.
    low, high : float
        Between these lie 95 % of the differences over resampled images.
    """

    difference: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0: another set of such images would hardly turn the order round.

        Of few images the interval is too narrow. Of two systems that are equally good, one in twenty is told apart by
        chance, for each score that is looked at.
        """
        return self.low > NEGLIGIBLE or self.high < -NEGLIGIBLE


def bootstrap(score: Score, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the 95 % interval of a score by the bootstrap (Efron, 1979; the percentile method).

    Images are drawn with replacement, as many as there are, and the corpus score is computed anew over each draw. The
    document frequencies of CIDEr-D are held at those of the whole set.

    Parameters
    ----------
    score
        One that can be resampled, see `Score.over`.
    resamples
        How many sets of images are drawn, at least 1.
    seed
        The same seed gives the same answer.

    Raises
    ------
    InputError
        If the score cannot be resampled.
    """
    return interval(resample([score], resamples=resamples, seed=seed)[:, 0])


def paired_bootstrap(first: Score, second: Score, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two systems by the paired bootstrap (Koehn, 2004): both are scored on the same draws of images.

    Parameters
    ----------
    first, second
        The same metric of two systems, for the same images in the same order.
    resamples, seed
        As for `bootstrap`.

    Raises
    ------
    InputError
        If the two do not score equally many images, or one cannot be resampled.
    """
    values = resample([first, second], resamples=resamples, seed=seed)
    return Comparison(first.corpus - second.corpus, *interval(values[:, 0] - values[:, 1]))


def resample(scores: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Return corpus scores over draws of images, the same draws for all, (resamples, len(scores)).

    Raises
    ------
    InputError
        If the scores are not of equally many images, or one cannot be resampled.
    """
    images = len(scores[0].per_image)
    for score in scores:
        if len(score.per_image) != images:
            raise InputError(
                f"Scores of {images} and {len(score.per_image)} images cannot be compared: "
                "score both systems on the same images in the same order."
            )
    over = [score.over for score in scores if score.over is not None]
    if len(over) < len(scores):
        raise InputError("This score cannot be resampled: it is not computed from figures for each image.")
    random = np.random.default_rng(seed)
    values = np.empty((resamples, len(scores)))
    for row in values:
        counts = np.bincount(random.integers(images, size=images), minlength=images)  # how often the draw has each
        row[:] = [one(counts) for one in over]
    return values


def interval(values: NDArray[np.float64]) -> Interval:
    """Return between what lie 95 % of resampled values, (resamples,)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))
