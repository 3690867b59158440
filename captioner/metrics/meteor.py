"""METEOR (Denkowski and Lavie, 2014), by its authors' own program, which pycocoevalcap carries and which needs Java."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from captioner.errors import InputError
from captioner.metrics.score import ImageId, Score, pair


def find_meteor() -> Path:
    """Return where METEOR's program is.

    Raises
    ------
    InputError
        If pycocoevalcap is not installed, or there is no Java that runs.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or package.submodule_search_locations is None:
        raise InputError("METEOR needs pycocoevalcap, which is not installed: pip install 'captioner[java]'.")
    try:
        subprocess.run(["java", "-version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise InputError("METEOR needs Java, and 'java -version' does not run here: install a Java runtime.") from None
    return Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"


def meteor(references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]) -> Score:
    """Return METEOR 1.5 with its settings for English, as COCO's tools compute it.

    METEOR aligns words by their form, stem, synonym or paraphrase, so it takes its authors' tables and program. nltk's
    function of that name computes another score, 15 to 25 points higher.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    hypotheses
        For each image the tokens of its caption.

    Returns
    -------
    Score
        The corpus score is not the mean over the images, and cannot be resampled.

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, if there are none, or if pycocoevalcap or Java is missing or
        fails.
    """
    program = find_meteor()
    pairs = pair(references, hypotheses)
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", program.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(
            command, cwd=program.parent, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", bufsize=1
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                # An answer for each line, or the two programs would wait for each other when the pipes are full.
                statistics = []
                for image, hypothesis in pairs:
                    process.stdin.write(" ||| ".join(["SCORE", *map(_line, image), _line(hypothesis)]) + "\n")
                    statistics.append(process.stdout.readline().strip())
                process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
                *per_image, corpus = (float(process.stdout.readline()) for _ in range(len(pairs) + 1))
            finally:
                process.kill()
    except (OSError, ValueError):
        raise InputError(
            "METEOR's program gave no score: see that Java has 2 GB of memory to take, or leave --meteor out."
        ) from None
    return Score(corpus, np.array(per_image, np.float64))


def _line(tokens: Sequence[str]) -> str:
    return " ".join(tokens).replace("|||", "")
