"""Faithfulness: whether a captioner uses its attention, or the maps only look as if.

Maps that move prove nothing: random weights move more than trained ones. What proves something is what a change costs.
Captions are decoded again with the weights replaced (uniform, or permuted at random), and the regions that a word
looked at are hidden to see what its log-probability loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from captioner.annotation_files import CaptionedImage
from captioner.attention import Annotations, Attention, Memory
from captioner.errors import InputError
from captioner.images import read_image
from captioner.metrics import paired_bootstrap, score_captions
from captioner.model import Captioner
from captioner.tokens import detokenize
from captioner.vocabulary import BEGIN, pad

# (weights (..., Q, N), mask of existing regions that broadcasts to them) -> weights
Change = Callable[[Tensor, Tensor], Tensor]

FUNCTION_WORDS = frozenset(
    "a an the this that these those some another other each its his her their it he she they them him who which what "
    "is are was be being been has have having do does there to of in on at by for from with without into onto over "
    "under up down out off near through around along across behind beside between against above below and or but as "
    "while not n't 's <unk>".split()
)


@contextmanager
def intervene(model: Captioner, change: Change) -> Iterator[None]:
    """Replace the weights of every attention from words to regions while the context lasts.

    Parameters
    ----------
    model : Captioner
        Whatever its decoder.
    change : callable
        Takes the weights and the mask of existing regions, and gives the weights that contexts are read with.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.weigh = _changed(attention.weigh, change)  # type: ignore[method-assign, assignment]
        # A fused kernel would form no weights that could be replaced.
        attention.contexts = partial(Attention.contexts, attention)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for attention in attentions:
            del attention.weigh, attention.contexts  # the class's own show again


def _changed(weigh: Callable[[Tensor, Memory], Tensor], change: Change) -> Callable[[Tensor, Memory], Tensor]:
    def changed(query: Tensor, memory: Memory) -> Tensor:
        weights = weigh(query, memory)
        mask = memory[-1].view(len(memory[-1]), *[1] * (weights.dim() - 2), -1)
        return change(weights, mask)

    return changed


def uniform(weights: Tensor, mask: Tensor) -> Tensor:
    """Return the same weight for every existing region."""
    share = mask.to(weights.dtype)
    return (share / share.sum(-1, keepdim=True)).expand_as(weights)


def permuted(generator: torch.Generator) -> Change:
    """Return a change that deals each query's weights out anew among the existing regions."""

    def change(weights: Tensor, mask: Tensor) -> Tensor:
        missing = (~mask).expand_as(weights).float()
        draw = torch.rand(weights.shape, generator=generator).to(weights.device)
        sources = (draw + missing).argsort(-1)  # existing regions first, in random order
        places = missing.argsort(dim=-1, stable=True)  # existing regions first, in their order
        return torch.zeros_like(weights).scatter(-1, places, weights.gather(-1, sources))

    return change


class Report(NamedTuple):
    """What :func:`measure` found.

    Attributes
    ----------
    images, beam_size, seed : int
        Of this measurement.
    cider_d, cider_d_uniform, cider_d_permuted : float
        CIDEr-D as trained and with replaced weights, in COCO's units.
    uniform_costs, permuted_costs : tuple of float
        The loss in CIDEr-D with its 95 % interval (paired bootstrap over images): (loss, low, high).
    content_words : int
        Number of content words in the captions, on which the rest rests.
    hiding : float
        Share of them that lose more log-probability when the `hidden` share of regions that they look at most is hidden
        than when as many random ones are (mean of several draws).
    hiding_each : float
        The same against each draw alone, without the mean.
    hidden : float
        Share of the regions hidden.
    loss_strongest, loss_random : float
        Mean loss of log-probability, strongest and random regions hidden.
    entropy : float
        Mean entropy of their weights relative to that of uniform ones: 1 is no attention at all.
    """

    images: int
    beam_size: int
    seed: int
    cider_d: float
    cider_d_uniform: float
    cider_d_permuted: float
    uniform_costs: tuple[float, float, float]
    permuted_costs: tuple[float, float, float]
    content_words: int
    hiding: float
    hiding_each: float
    hidden: float
    loss_strongest: float
    loss_random: float
    entropy: float


@torch.no_grad()
def measure(
    model: Captioner,
    records: Sequence[CaptionedImage],
    *,
    beam_size: int = 5,
    hidden: float = 0.2,
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 32,
) -> Report:
    """Measure what a captioner's attention is worth.

    Parameters
    ----------
    model : Captioner
        In evaluation mode.
    records : sequence of CaptionedImage
        Images with references.
    beam_size : int
        Of all captions.
    hidden : float
        Share of the regions to hide.
    draws : int
        Random sets of regions per word that the strongest ones are held against.
    seed : int
        Of permutations, hidden regions and the bootstrap.
    batch_size : int
        Images at a time.

    Raises
    ------
    InputError
        Where the decoder has no attention.
    """
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change | None] = {"as trained": None, "uniform": uniform, "permuted": permuted(generator)}
    captions: dict[str, dict[str | int, str]] = {name: {} for name in changes}
    words: list[Tensor] = []  # a row per content word, as _hide gives it
    for first in track(range(0, len(records), batch_size), "Measuring"):
        batch = records[first : first + batch_size]
        pixels = torch.stack([model.preprocessing.pixels(read_image(record.path)) for record in batch])
        annotations = model.annotate(pixels.to(model.device))
        for name, change in changes.items():
            if change is None:
                found = model.search(annotations, beam_size=beam_size)
                best = [hypotheses[0].tokens for hypotheses in found]
                words += _hide(model, annotations, best, hidden, draws, generator)
            else:
                with intervene(model, change):
                    found = model.search(annotations, beam_size=beam_size)
            for record, hypotheses in zip(batch, found, strict=True):
                captions[name][record.image_id] = detokenize(model.vocabulary.decode(hypotheses[0].tokens))
    references = {record.image_id: record.captions for record in records}
    cider_d = {name: score_captions(references, found)["CIDEr-D"] for name, found in captions.items()}
    costs = {
        name: paired_bootstrap(cider_d["as trained"], cider_d[name], seed=seed) for name in ("uniform", "permuted")
    }
    if not words:
        raise InputError("These captions hold no content word, so there is nothing to hide from: take more images.")
    rows = torch.stack(words)
    return Report(
        images=len(records),
        beam_size=beam_size,
        seed=seed,
        cider_d=cider_d["as trained"].corpus,
        cider_d_uniform=cider_d["uniform"].corpus,
        cider_d_permuted=cider_d["permuted"].corpus,
        uniform_costs=(costs["uniform"].difference, costs["uniform"].low, costs["uniform"].high),
        permuted_costs=(costs["permuted"].difference, costs["permuted"].low, costs["permuted"].high),
        content_words=len(rows),
        hiding=(rows[:, 0] > rows[:, 1]).float().mean().item(),
        hiding_each=rows[:, 2].mean().item(),
        hidden=hidden,
        loss_strongest=rows[:, 0].mean().item(),
        loss_random=rows[:, 1].mean().item(),
        entropy=rows[:, 3].mean().item(),
    )


def _hide(
    model: Captioner,
    annotations: Annotations,
    captions: Sequence[Sequence[int]],
    hidden: float,
    draws: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return for each content word what it loses and how its attention is spread.

    A row holds the loss with its strongest regions hidden, the mean loss with random ones, the share of the draws whose
    loss is smaller than the first, and the relative entropy.
    """
    tokens = pad([[[BEGIN, *ids]] for ids in captions]).to(model.device)
    exists = annotations.existing()
    whole, weights = _log_probabilities(model, annotations, tokens)
    if weights is None:
        raise InputError("This checkpoint's decoder has no attention, so there is none to measure.")
    rows = []
    for image, ids in enumerate(captions):
        content = [t for t, word in enumerate(model.vocabulary.decode(ids)) if word not in FUNCTION_WORDS]
        regions = int(exists[image].sum())
        count = max(1, round(hidden * regions))
        if not content or count == regions:
            continue
        masks = []
        for t in content:
            draw = torch.rand(draws, exists.size(1), generator=generator).to(model.device) - 2.0 * ~exists[image]
            for order in (weights[image, 0, t][None] - 2.0 * ~exists[image], draw):
                masks.append(exists[image].expand(len(order), -1).scatter(1, order.topk(count).indices, False))
        # A hidden region does not exist for the model: not for the first state, nor for any word.
        variants = Annotations(
            annotations.values[image].expand(len(content) * (1 + draws), -1, -1), torch.cat(masks), annotations.grid
        )
        partly, _ = _log_probabilities(model, variants, tokens[image].expand(len(variants.values), -1, -1))
        for place, t in enumerate(content):
            first = place * (1 + draws)
            loss = whole[image, t] - partly[first : first + 1 + draws, t]
            share = weights[image, 0, t]
            entropy = -torch.xlogy(share, share).sum() / math.log(regions)
            smaller = (loss[1:] < loss[0]).float().mean()
            rows.append(torch.stack((loss[0], loss[1:].mean(), smaller, entropy)).cpu())
    return rows


def _log_probabilities(model: Captioner, annotations: Annotations, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the (B, T) log-probability of each token of one caption per image, and the weights (B, 1, T, N)."""
    logits, weights, _ = model(annotations, tokens)
    chosen = logits.log_softmax(-1).gather(-1, tokens[..., 1:, None])
    return chosen[:, 0, :, 0], weights


def print_report(report: Report, split: str) -> None:
    """Print what was found, CIDEr-D times 100."""
    table = Table(title=f"{split}, {report.images} images, beam {report.beam_size}")
    for column in ("Weights", "CIDEr-D", "cost", "95 % interval"):
        table.add_column(column, justify="left" if column == "Weights" else "right")
    table.add_row("as trained", f"{100 * report.cider_d:.1f}", "", "")
    for name, reached, (loss, low, high) in (
        ("uniform", report.cider_d_uniform, report.uniform_costs),
        ("permuted", report.cider_d_permuted, report.permuted_costs),
    ):
        table.add_row(name, f"{100 * reached:.1f}", f"{100 * loss:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"Hiding the {100 * report.hidden:.0f} % strongest regions of a content word costs it more log-probability "
        f"than hiding as many at random for {100 * report.hiding:.1f} % of {report.content_words} words, against the "
        f"mean of several draws, {100 * report.hiding_each:.1f} % against each draw alone ("
        f"{report.loss_strongest:.2f} against {report.loss_random:.2f} on average). "
        f"Entropy relative to uniform weights: {report.entropy:.2f}.",
        highlight=False,
    )
