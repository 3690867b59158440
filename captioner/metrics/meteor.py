"""METEOR (Denkowski and Lavie, 2014), by its authors' own program, which pycocoevalcap carries and which needs Java."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from captioner.errors import InputError
from captioner.metrics.score import ImageId, Score, pair


def check_meteor() -> None:
    """Say what METEOR lacks here.

    Raises
    ------
    InputError
        If pycocoevalcap is not installed, or there is no Java.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise InputError("METEOR needs pycocoevalcap, which is not installed: pip install 'captioner[java]'.")
    if shutil.which("java") is None:
        raise InputError("METEOR needs Java, and there is no command 'java': install a Java runtime.")


def meteor(references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]) -> Score:
    """Return METEOR 1.5 with its settings for English, as COCO's tools compute it.

    METEOR aligns words by their form, stem, synonym or paraphrase, so it takes its authors' tables and program
    (`pycocoevalcap.meteor`). nltk's function of that name computes another score, 15 to 25 points higher.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    hypotheses
        For each image the tokens of its caption.

    Returns
    -------
    Score
        The corpus score is not the mean over the images, and has no interval.

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, if there are none, or if pycocoevalcap or Java is missing.
    """
    check_meteor()
    pairs = pair(references, hypotheses)
    from pycocoevalcap.meteor.meteor import Meteor

    # By number, since its order of images is that of a dictionary's keys, and as texts, which it cuts at the spaces.
    corpus, per_image = Meteor().compute_score(
        {number: [" ".join(reference) for reference in image] for number, (image, _) in enumerate(pairs)},
        {number: [" ".join(hypothesis)] for number, (_, hypothesis) in enumerate(pairs)},
    )
    return Score(float(corpus), np.array(per_image, np.float64))
