"""A study's results: the file of each run, the scores of each row, and the time that a step of its search takes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from captioner.attention import Annotations
from captioner.encoders import Encoder
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.metrics import CIDErD, Comparison, Score, bleu, interval, resample
from captioner.model import Captioner, rebuild
from captioner.output_files import write
from captioner.study import Row
from captioner.text_files import read_data
from captioner.tokens import Tokenizer, choose_tokenizer, tokenize
from captioner.vocabulary import BEGIN, Vocabulary

ImageId = str | int
Captions = dict[ImageId, str]

# What is timed: the steps to the first words of a caption for one image, and how often.
WORDS_TIMED = 10
ROUNDS = 20


@dataclass(frozen=True)
class Result:
    """All that is kept of a run.

    Attributes
    ----------
    settings : dict
        Those given to `captioner fit`, but for the seed and the folders.
    captions : dict
        Of each validation image.
    uniform_captions : dict or None
        The same with uniform weights; None from a decoder without attention.
    entropy : float or None
        Mean entropy of the weights of the captions' content words, relative to that of uniform ones; None likewise.
    minutes : float
        Of training, and of annotating the images in a run that has filled the cache.
    epochs, best_epoch : int
        How many there were, and after which one the captions are.
    parameters : int
        Of all but the encoder.
    model : dict
        The captioner's settings, see :func:`captioner.model.describe`.
    words, regions, annotation_dim, grid
        The sizes beside them: of the vocabulary without its special words, N, D, and (h, w) or None.
    beam_size : int
        Of the captions.
    data, encoder, command, made : str
        For people: the data set with the split, the encoder with the precision, the command that made the run, and
        when, YYYY-MM-DD.
    """

    settings: dict[str, Any]
    captions: Captions
    uniform_captions: Captions | None
    entropy: float | None
    minutes: float
    epochs: int
    best_epoch: int
    parameters: int
    model: dict[str, Any]
    words: int
    regions: int
    annotation_dim: int
    grid: tuple[int, int] | None
    beam_size: int
    data: str
    encoder: str
    command: str
    made: str

    def write(self, path: Path) -> None:
        """Write it as JSON, the captions as COCO's results, in which an id stays a number or a text."""
        uniform = None if self.uniform_captions is None else _as_list(self.uniform_captions)
        lists = {"captions": _as_list(self.captions), "uniform_captions": uniform}
        write(path, json.dumps({**asdict(self), **lists}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what :meth:`write` has written.

        Raises
        ------
        InputError
            If the file is something else.
        """
        try:
            given = json.loads(read_data(path))
            for name in ("captions", "uniform_captions"):
                given[name] = (
                    None if given[name] is None else {each["image_id"]: each["caption"] for each in given[name]}
                )
            given["grid"] = None if given["grid"] is None else tuple(given["grid"])
            return cls(**given)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is no result of this release ({type(error).__name__}: {error}): delete it, and the run is "
                "made again."
            ) from None


def _as_list(captions: Captions) -> list[dict[str, ImageId]]:
    return [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]


class Estimate(NamedTuple):
    """A figure of a row, the mean over its seeds, and the 95 % interval of this mean over resampled images."""

    value: float
    low: float
    high: float


class Line(NamedTuple):
    """What a row has reached, in COCO's units.

    Attributes
    ----------
    row : Row
        Of the study.
    results : list of Result
        Of its seeds, as far as they are there.
    each : list of float
        CIDEr-D of each of them.
    cider_d, bleu_4 : Estimate
        The mean over them.
    cost : Estimate or None
        What uniform weights take from CIDEr-D; None without attention.
    difference : Comparison or None
        CIDEr-D less the reference's; None where this is the reference, or it is not there.
    """

    row: Row
    results: list[Result]
    each: list[float]
    cider_d: Estimate
    bleu_4: Estimate
    cost: Estimate | None
    difference: Comparison | None

    @property
    def entropy(self) -> float | None:
        """Mean over the seeds; None without attention."""
        found = [result.entropy for result in self.results if result.entropy is not None]
        return fmean(found) if found else None


def score(
    results: Mapping[Row, Sequence[Result]],
    reference: str,
    references: Mapping[ImageId, Sequence[str]],
    *,
    seed: int = 0,
) -> list[Line]:
    """Score every run on the same draws of images, and take the mean over the seeds within each draw.

    Parameters
    ----------
    results
        Of each row, at least one.
    reference
        The name of the row that the others are held against.
    references
        The captions of each image.
    seed
        Of the draws.

    Raises
    ------
    InputError
        If a run has captioned other images.
    """
    tokenizer = choose_tokenizer(chain.from_iterable(references.values()))
    tokens = {
        image_id: [tokenize(caption, tokenizer) for caption in captions] for image_id, captions in references.items()
    }
    scorer = CIDErD(tokens)

    def scores(result: Result) -> list[Score]:
        said = _tokens(result.captions, tokens, tokenizer)
        found = [scorer.score(said), bleu(tokens, said)["BLEU-4"]]
        if result.uniform_captions is not None:
            found.append(scorer.score(_tokens(result.uniform_captions, tokens, tokenizer)))
        return found

    scored = {row: [scores(result) for result in of_row] for row, of_row in results.items()}
    everything = [one for of_row in scored.values() for of_run in of_row for one in of_run]
    columns = iter(resample(everything, seed=seed).T if everything else ())
    drawn = {row: [[next(columns) for _ in of_run] for of_run in of_row] for row, of_row in scored.items()}

    def mean(row: Row, kind: int) -> tuple[float, Any]:
        return (
            fmean(of_run[kind].corpus for of_run in scored[row]),
            sum(of_run[kind] for of_run in drawn[row]) / len(drawn[row]),
        )

    held = next((mean(row, 0) for row in results if row.name == reference), None)
    lines = []
    for row, of_row in results.items():
        (reached, draws), (bleu_4, bleu_draws) = mean(row, 0), mean(row, 1)
        cost = difference = None
        if len(scored[row][0]) == 3:
            uniform, uniform_draws = mean(row, 2)
            cost = Estimate(reached - uniform, *interval(draws - uniform_draws))
        if held is not None and row.name != reference:
            difference = Comparison(reached - held[0], *interval(draws - held[1]))
        each = [of_run[0].corpus for of_run in scored[row]]
        cider_d, bleu_4_estimate = Estimate(reached, *interval(draws)), Estimate(bleu_4, *interval(bleu_draws))
        lines.append(Line(row, list(of_row), each, cider_d, bleu_4_estimate, cost, difference))
    return lines


def _tokens(captions: Captions, references: Mapping[ImageId, Any], tokenizer: Tokenizer) -> dict[ImageId, list[str]]:
    """Return the captions' tokens in the order of the references, without which images could not be drawn alike."""
    if captions.keys() != references.keys():
        raise InputError(
            f"A run has captioned {len(captions)} images that are not the study's {len(references)}: delete its "
            "result, and it is made again."
        )
    return {image_id: tokenize(captions[image_id], tokenizer) for image_id in references}


@torch.inference_mode()
def milliseconds(results: Sequence[Result], rounds: int = ROUNDS) -> list[float]:
    """Time a step of the search with each model, on the CPU in float32 with random weights, which take as long.

    A step is what the beam does for one more word of one image: the decoder, the output layer and its softmax, and the
    state's rows taken in the order of their parents. The models take turns, so that what else the machine does meets
    all of them alike.

    Parameters
    ----------
    results : sequence of Result
        One for each model.
    rounds : int
        How often each has its turn, a caption of WORDS_TIMED words.

    Returns
    -------
    list of float
        For each model the median over the rounds of the mean over the words.
    """
    models = [_like(result) for result in results]
    seconds: list[list[float]] = [[] for _ in models]
    memories = [
        model.memory(Annotations(torch.randn(1, result.regions, result.annotation_dim), grid=result.grid))
        for model, result in zip(models, results, strict=True)
    ]
    for _ in range(rounds + 1):
        for model, memory, result, times in zip(models, memories, results, seconds, strict=True):
            beam = result.beam_size
            words, parents = torch.full((beam,), BEGIN), torch.arange(beam).flip(0)
            state = model.decoder.start(memory, beam)
            begun = time.perf_counter()
            for _ in range(WORDS_TIMED):
                log_probabilities, state = model.step(words, memory, state)
                words = log_probabilities.argmax(-1)
                state = tuple(part.index_select(0, parents) for part in state)
            times.append(time.perf_counter() - begun)
    return [1000 * median(times[1:]) / WORDS_TIMED for times in seconds]  # the first round warms up


class _NoEncoder(Encoder):
    """Says how long annotations are, and makes none."""

    def __init__(self, annotation_dim: int) -> None:
        super().__init__(annotation_dim, Preprocessing(), learns=False)


def _like(result: Result) -> Captioner:
    """Build a run's captioner with random weights and without its encoder."""
    return Captioner(
        _NoEncoder(result.annotation_dim),
        Vocabulary([f"word{number}" for number in range(result.words)]),
        bridge=partial(rebuild, result.model["bridge"]),
        decoder=partial(rebuild, result.model["decoder"]),
        embedding_dim=result.model["embedding_dim"],
        tie_weights=result.model["tie_weights"],
    ).eval()
