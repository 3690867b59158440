"""How sure a score is, and whether two systems' scores differ by more than the choice of images explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.errors import InputError
from captioner.metrics.score import Score

RESAMPLES = 1000


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
        """Whether the interval leaves out 0: another set of such images would hardly turn the order round."""
        return self.low > 0 or self.high < 0


def bootstrap(score: Score, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the 95 % interval of a score by the bootstrap (Efron, 1979; the percentile method).

    Images are drawn with replacement, as many as there are, and the corpus score is computed anew over each draw. The
    document frequencies of CIDEr-D are held at those of the whole set.

    Parameters
    ----------
    score
        One that can be resampled, see `Score.over`.
    resamples
        How many sets of images are drawn.
    seed
        The same seed gives the same answer.

    Raises
    ------
    InputError
        If the score cannot be resampled.
    """
    return Interval(*_percentiles(_resampled(score, resamples, seed)))


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
    if first.per_image.shape != second.per_image.shape:
        raise InputError(
            f"Scores of {first.per_image.size} and {second.per_image.size} images cannot be compared: "
            "score both systems on the same images in the same order."
        )
    differences = _resampled(first, resamples, seed) - _resampled(second, resamples, seed)
    return Comparison(first.corpus - second.corpus, *_percentiles(differences))


def _resampled(score: Score, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the corpus score over each draw of images, (resamples,). The draws follow from the seed alone."""
    if score.over is None:
        raise InputError("This score cannot be resampled: it is not computed from figures for each image.")
    return np.array([score.over(counts) for counts in _draws(len(score.per_image), resamples, seed)])


def _draws(images: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield for each draw how often it has each image, (images,)."""
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(random.integers(images, size=images), minlength=images)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
