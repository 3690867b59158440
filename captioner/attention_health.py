"""The health of attention: what was measured of a captioner's attention, summed up, with a warning where it is ill.

The measuring stands in :mod:`captioner.faithfulness`. Here are its figures, over all words of all images.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioner.metrics import CIDErD, Comparison, paired_bootstrap
from captioner.tokens import TOKENIZERS, Tokenizer, tokenize

ImageId = str | int

# A warning says that maps are worth nothing, so its bounds are far from those of attention in use: a model of Flickr8k
# moves 0.23 of the weight from word to word, and its words lose 0.34 with uniform weights (entropy 0.93).
# Less than a thousandth of the weight moves. Where the query has no part in the weights, what is left is rounding: some
# 1e-7 in float32, and in bfloat16 less than the 4e-3 of a single score, which a sum over regions evens out.
STILL = 1e-3
# A word's probability falls by less than 1 % with uniform weights. The entropy is not asked for: weights that are sharp
# and cost nothing deceive even more than even ones.
FREE = 0.01
# As of weights that give 0.95 to one region of 49, and the rest to the others evenly.
SHARP = 0.1
# Nineteen words of twenty, over all images.
SAME = 0.95
# What a few images show may be chance: all of them may have their object in the same place.
FEWEST_IMAGES = 30


class Look(NamedTuple):
    """What attention did for the caption of one image: a value for each of its W content words, but where it says so.

    Attributes
    ----------
    entropies : tuple of float
        Of the weights, relative to that of uniform ones.
    movements : tuple of float
        Share of the weight that lies elsewhere than in the mean over all words of the caption.
    peaks : tuple of int
        The region of the largest weight.
    uniform_losses : tuple of float
        Log-probability lost with uniform weights from the first word on.
    hidden : tuple
        The loss with the strongest regions hidden, the mean loss with random ones, and the share of the draws with a
        smaller loss than the first. Empty where no region was hidden.
    points : tuple
        For each word that speaks of a box that is known, whether its strongest region overlaps it, and the share of all
        regions that do.
    uniform, permuted : str
        The captions with replaced weights, if there are any.
    """

    entropies: tuple[float, ...]
    movements: tuple[float, ...]
    peaks: tuple[int, ...]
    uniform_losses: tuple[float, ...]
    hidden: tuple[tuple[float, float, float], ...]
    points: tuple[tuple[bool, float], ...]
    uniform: str = ""
    permuted: str = ""


class Health(NamedTuple):
    """What can be measured at every validation, means over content words.

    Attributes
    ----------
    images, content_words : int
        On which it rests.
    entropy : float
        Of their weights, relative to that of uniform ones: 1 is no attention at all, 0 a single region.
    movement : float
        Share of the weight that moves from word to word: half the sum of the differences to the mean over the caption.
    same_region : float
        Share of the words of all images whose strongest region is the most frequent one.
    uniform_loss : float
        Loss of log-probability with uniform weights.
    pointing, pointing_uniform : float or None
        Share of the words speaking of a known box whose strongest region overlaps it, and what uniform weights would
        reach by chance; None where no box is known.
    """

    images: int
    content_words: int
    entropy: float
    movement: float
    same_region: float
    uniform_loss: float
    pointing: float | None
    pointing_uniform: float | None


class Report(NamedTuple):
    """What a test finds: the health, and what takes longer.

    Attributes
    ----------
    health : Health
        Of the same captions.
    tokenizer : str
        What has cut captions and references to score them.
    beam_size, seed : int
        Of this measurement.
    cider_d, cider_d_uniform, cider_d_permuted : float
        CIDEr-D as trained and with replaced weights, in COCO's units.
    uniform_costs, permuted_costs : Comparison
        The loss in CIDEr-D with its 95 % interval (paired bootstrap over images).
    hiding : float or None
        Share of the content words that lose more log-probability when the `hidden` share of regions that they look at
        most is hidden than when as many random ones are (mean of several draws); None, as the next three, where images
        have too few regions to hide some.
    hiding_each : float or None
        The same against each draw alone, without the mean.
    loss_strongest, loss_random : float or None
        Mean loss of log-probability, strongest and random regions hidden.
    hidden : float
        Share of the regions hidden.
    """

    health: Health
    tokenizer: Tokenizer
    beam_size: int
    seed: int
    cider_d: float
    cider_d_uniform: float
    cider_d_permuted: float
    uniform_costs: Comparison
    permuted_costs: Comparison
    hiding: float | None
    hiding_each: float | None
    loss_strongest: float | None
    loss_random: float | None
    hidden: float

    def as_json(self) -> dict[str, Any]:
        """Return the figures for a JSON file, those of the health among them."""
        return {**self.health._asdict(), **{name: each for name, each in self._asdict().items() if name != "health"}}


def sum_up(looks: Mapping[ImageId, Look]) -> Health | None:
    """Sum up what was seen of images; None where no caption holds a content word."""
    peaks = Counter(chain.from_iterable(look.peaks for look in looks.values()))
    if not peaks:
        return None
    points = [point for look in looks.values() for point in look.points]
    return Health(
        images=len(looks),
        content_words=peaks.total(),
        entropy=fmean(chain.from_iterable(look.entropies for look in looks.values())),
        movement=fmean(chain.from_iterable(look.movements for look in looks.values())),
        same_region=max(peaks.values()) / peaks.total(),
        uniform_loss=fmean(chain.from_iterable(look.uniform_losses for look in looks.values())),
        pointing=_mean([hit for hit, _ in points]),
        pointing_uniform=_mean([chance for _, chance in points]),
    )


def report(
    references: Mapping[ImageId, Sequence[Sequence[str]]],
    captions: Mapping[ImageId, str],
    looks: Mapping[ImageId, Look],
    *,
    tokenizer: Tokenizer,
    beam_size: int,
    seed: int,
    hidden: float,
) -> Report | None:
    """Sum up a test; None where no caption holds a content word.

    Parameters
    ----------
    references
        For each image the tokens of its references.
    captions
        Of the same images, as trained.
    looks
        What was seen of these, with captions by replaced weights.
    tokenizer
        What has cut the references.
    beam_size, hidden
        What they were made with.
    seed
        That, and of the bootstrap.
    """
    health = sum_up(looks)
    if health is None:
        return None
    scorer = CIDErD(references)
    reached, evenly, at_random = (
        scorer.score({image_id: tokenize(text, tokenizer) for image_id, text in said.items()})
        for said in (
            {image_id: captions[image_id] for image_id in references},
            {image_id: looks[image_id].uniform for image_id in references},
            {image_id: looks[image_id].permuted for image_id in references},
        )
    )
    words = list(zip(*chain.from_iterable(looks[image_id].hidden for image_id in references), strict=True))
    strongest, random, smaller = words or ([], [], [])
    return Report(
        health=health,
        tokenizer=tokenizer,
        beam_size=beam_size,
        seed=seed,
        cider_d=reached.corpus,
        cider_d_uniform=evenly.corpus,
        cider_d_permuted=at_random.corpus,
        uniform_costs=paired_bootstrap(reached, evenly, seed=seed),
        permuted_costs=paired_bootstrap(reached, at_random, seed=seed),
        hiding=_mean([one > other for one, other in zip(strongest, random, strict=True)]),
        hiding_each=_mean(smaller),
        loss_strongest=_mean(strongest),
        loss_random=_mean(random),
        hidden=hidden,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


class Fault(NamedTuple):
    """What is wrong with attention.

    Attributes
    ----------
    kind : str
        "collapsed": always the same region; "still": the same weights whatever the word; "idle": nothing is lost
        without it.
    sentence : str
        For people.
    """

    kind: Literal["collapsed", "still", "idle"]
    sentence: str


def find_fault(health: Health) -> Fault | None:
    """Tell whether attention is dead or collapsed; of too few images nothing is told."""
    if health.images < FEWEST_IMAGES:
        return None
    if health.entropy < SHARP and health.same_region >= SAME:
        return Fault(
            "collapsed",
            f"The attention has collapsed: {100 * health.same_region:.0f} % of the content words, whatever the word or "
            f"the image, look at the same region and nearly nowhere else (relative entropy {health.entropy:.2f}), so "
            "its maps say nothing.",
        )
    if health.movement < STILL:
        return Fault(
            "still",
            "The attention is dead: its weights are the same for all words of a caption (from word to word "
            f"{100 * health.movement:.2g} % of the weight moves), so they do not depend on the decoder's state and its "
            "maps say nothing of the words.",
        )
    if health.uniform_loss < FREE:
        return Fault(
            "idle",
            "The attention is dead: with uniform weights in its place a content word loses "
            f"{health.uniform_loss:.3f} of log-probability, which is nothing (relative entropy {health.entropy:.2f}), "
            "so captions do not depend on where it looks.",
        )
    return None


def warn(health: Health) -> None:
    """Print on stderr what is wrong with attention, if anything is."""
    fault = find_fault(health)
    if fault is not None:
        print(f"captioner: {fault.sentence}", file=sys.stderr)


def in_words(health: Health) -> str:
    """Return the figures as part of a line, such as "entropy 0.96  uniform weights cost 0.13"."""
    said = f"entropy {health.entropy:.2f}  uniform weights cost {health.uniform_loss:.2f}"
    if health.pointing is not None:
        said += f"  pointing {health.pointing:.2f} (by chance {health.pointing_uniform:.2f})"
    return said


def show(found: Report, split: str, console: Console) -> None:
    """Print what was found as a table, CIDEr-D times 100, and all that one must know to compare it."""
    health = found.health
    table = Table("attention", box=SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_column("to compare")
    table.add_row("relative entropy", f"{health.entropy:.3f}", "1: uniform weights, 0: a single region")
    for name, reached, cost in (
        ("uniform", found.cider_d_uniform, found.uniform_costs),
        ("permuted", found.cider_d_permuted, found.permuted_costs),
    ):
        # Without a space in it, at which a narrow terminal would tear it apart.
        between = escape(f"{100 * cost.difference:.1f} [{100 * cost.low:.1f},{100 * cost.high:.1f}]")
        left = f"{100 * reached:.1f} instead of {100 * found.cider_d:.1f}"
        table.add_row(f"{name} weights: CIDEr-D lost", between, left)
    table.add_row("uniform weights: log-probability lost by a word", _nats(health.uniform_loss), "")
    if found.loss_strongest is not None and found.loss_random is not None:
        share = f"{100 * found.hidden:.0f} %"
        table.add_row(
            f"strongest {share} of regions hidden: the same",
            _nats(found.loss_strongest),
            f"{_nats(found.loss_random)} with random ones hidden",
        )
        table.add_row(
            "words that lose more so than with random ones",
            f"{100 * (found.hiding or 0):.1f} %",
            f"{100 * (found.hiding_each or 0):.1f} % against each draw alone",
        )
    if health.pointing is not None:
        table.add_row(
            "words whose strongest region overlaps their object",
            f"{100 * health.pointing:.1f} %",
            f"{100 * (health.pointing_uniform or 0):.1f} % by chance",
        )
    console.print(table)
    console.print(
        f"{split}, {health.images:,} images, {health.content_words:,} content words, beam {found.beam_size}, "
        f"seed {found.seed}; [95 % intervals]; tokens: {TOKENIZERS[found.tokenizer]}.",
        highlight=False,
        markup=False,
    )


def _nats(loss: float) -> str:
    return f"{round(loss, 3) + 0.0:.3f}"  # not -0.000
