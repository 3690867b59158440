"""Whether two models' scores differ by more than the choice of images explains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.errors import InputError


class Comparison(NamedTuple):
    """The difference of two models' mean scores, with its 95 % interval.

    Attributes
    ----------
    difference : float
        The first model's mean minus the second's.
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


def paired_bootstrap(
    per_image_a: NDArray[np.float64], per_image_b: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two models by the paired bootstrap (Koehn, 2004).

    Images are drawn with replacement, as many as there are, and both models are scored on the same draw. This is right
    for a score that is a mean over images: ROUGE-L, and CIDEr-D with the document frequencies held at those of the
    whole set. Of BLEU it compares the mean of the images' scores, which is not the corpus score.

    Parameters
    ----------
    per_image_a, per_image_b : float64 arrays of shape (B,)
        `Score.per_image` of the two models, for the same images in the same order.
    resamples
        How many sets of images are drawn.
    seed
        The same seed gives the same answer.

    Raises
    ------
    InputError
        If the two do not score equally many images, or none.
    """
    if per_image_a.shape != per_image_b.shape or per_image_a.ndim != 1 or not per_image_a.size:
        raise InputError(
            f"Scores of shape {per_image_a.shape} and {per_image_b.shape} cannot be compared: "
            "give one score per image from both models, for the same images in the same order."
        )
    differences = per_image_a - per_image_b
    random = np.random.default_rng(seed)
    images = len(differences)
    means = [differences[random.integers(images, size=images)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(float(differences.mean()), float(low), float(high))
