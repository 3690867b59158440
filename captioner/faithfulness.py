"""Faithfulness: whether a captioner uses its attention, or the maps only look as if.

Maps that move prove nothing: random weights move more than trained ones. What proves something is what a change costs.
Captions are decoded again with the weights replaced (uniform, or permuted at random), and the regions that a word
looked at are hidden to see what its log-probability loses. How all this is summed up, and when it gives cause for a
warning, stands in :mod:`captioner.attention_health`.

All is told by word, as people read them. Where characters or byte pairs say a word, its weights are the mean over these
units, and its log-probability is their sum.

Shapes: B images, N regions, T units of a caption, the end counted as one, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import torch
from rich.progress import track
from torch import Tensor

from captioner.annotation_files import CaptionedImage
from captioner.attention import Annotations, Attention, Memory, NoAttention, Uniform
from captioner.attention_health import ImageId, Look, Report, report
from captioner.errors import InputError
from captioner.grammar import language_of
from captioner.images import read_image
from captioner.model import Captioner, by_word
from captioner.scenes import Pointing, Scene, judge, pointing
from captioner.tokens import choose_tokenizer, tokenize
from captioner.vocabulary import BEGIN, Word, pad

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


def attends(model: Captioner) -> bool:
    """Tell whether a captioner has attention whose weights it could have learnt."""
    fixed = (NoAttention, Uniform)
    return any(isinstance(part, Attention) and not isinstance(part, fixed) for part in model.modules())


class Hiding(NamedTuple):
    """How the deletion test is done.

    Attributes
    ----------
    share : float
        Of the regions to hide.
    draws : int
        Random sets of regions per word that the strongest ones are held against.
    seed : int
        Of them. An image's draws follow from it and from the image's id, whatever else is examined.
    """

    share: float = 0.2
    draws: int = 5
    seed: int = 0


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
        Where the decoder has no attention, or captions hold no content word.
    """
    if not attends(model):
        raise InputError("This checkpoint's decoder has no attention, so there is none to measure.")
    hiding = Hiding(hidden, draws, seed)
    generator = torch.Generator().manual_seed(seed)
    captions: dict[ImageId, str] = {}
    looks: dict[ImageId, Look] = {}
    for first in track(range(0, len(records), batch_size), "Measuring"):
        batch = records[first : first + batch_size]
        image_ids = [record.image_id for record in batch]
        pixels = torch.stack([model.preprocessing.pixels(read_image(record.path)) for record in batch])
        annotations = model.annotate(pixels.to(model.device))
        best = [hypotheses[0].tokens for hypotheses in model.search(annotations, beam_size=beam_size)]
        captions |= zip(image_ids, texts(model, best), strict=True)
        looks |= probe(model, annotations, image_ids, best, hiding=hiding, generator=generator, beam_size=beam_size)
    tokenizer = choose_tokenizer(caption for record in records for caption in record.captions)
    tokens = {record.image_id: [tokenize(caption, tokenizer) for caption in record.captions] for record in records}
    found = report(tokens, captions, looks, tokenizer=tokenizer, beam_size=beam_size, seed=seed, hidden=hidden)
    if found is None:
        raise InputError("These captions hold no content word, so there is nothing to hide from: take more images.")
    return found


def texts(model: Captioner, captions: Sequence[Sequence[int]]) -> list[str]:
    """Return captions given as ids as people read them."""
    return [model.vocabulary.text(ids) for ids in captions]


def probe(
    model: Captioner,
    annotations: Annotations,
    image_ids: Sequence[ImageId],
    captions: Sequence[Sequence[int]],
    *,
    hiding: Hiding,
    generator: torch.Generator,
    scenes: Mapping[ImageId, Scene] | None = None,
    **search: Any,
) -> dict[ImageId, Look]:
    """Do as :func:`examine` does, and caption the images with replaced weights, too.

    Parameters
    ----------
    generator : torch.Generator
        Of permutations.
    **search
        Settings of :meth:`Captioner.search`, those that gave the captions.
    """
    looks = examine(model, annotations, image_ids, captions, scenes=scenes, hiding=hiding)
    for name, change in {"uniform": uniform, "permuted": permuted(generator)}.items():
        with intervene(model, change):
            found = [hypotheses[0].tokens for hypotheses in model.search(annotations, **search)]
        for image_id, text in zip(image_ids, texts(model, found), strict=True):
            looks[image_id] = looks[image_id]._replace(**{name: text})  # type: ignore[arg-type]
    return looks


@torch.no_grad()
def examine(
    model: Captioner,
    annotations: Annotations,
    image_ids: Sequence[ImageId],
    captions: Sequence[Sequence[int]],
    *,
    scenes: Mapping[ImageId, Scene] | None = None,
    hiding: Hiding | None = None,
) -> dict[ImageId, Look]:
    """Examine how a captioner looked at B images while it said a caption of each.

    Parameters
    ----------
    model : Captioner
        In evaluation mode, one that :func:`attends`.
    annotations : Annotations
        Of the images.
    image_ids : sequence
        Of the images.
    captions : sequence of sequences of int
        The ids of each caption, without ``<bos>``.
    scenes : dict, optional
        Those of the images that are known, by their id: then words that point are counted, too.
    hiding : Hiding, optional
        By default the deletion test, which takes by far the longest, is left out.
    """
    memory = model.memory(annotations)
    tokens = pad([[[BEGIN, *ids]] for ids in captions]).to(model.device)
    lengths = torch.tensor([[len(ids)] for ids in captions]) if model.device.type == "cpu" else None
    whole, weights = _log_probabilities(model, memory, tokens, lengths)
    with intervene(model, uniform):
        evenly, _ = _log_probabilities(model, memory, tokens, lengths)
    assert weights is not None
    exists, bridged = annotations.existing(), annotations
    if hiding is not None and model.bridge.regionwise:  # what is hidden changes no other region: once is enough
        bridged = model.bridge(annotations)
    losses = (whole - evenly).tolist()
    looks = {}
    for image, (image_id, ids) in enumerate(zip(image_ids, captions, strict=True)):
        units, words = model.vocabulary.decode(ids), content_words(model, ids)
        said, read = weights[image, : len(ids)], model.vocabulary.read(units)
        points: list[Pointing] = []
        if scenes is not None and image_id in scenes and annotations.grid is not None:
            points = _point(model, read, said, annotations.grid, scenes[image_id])
        if exists[image].sum() < 2:  # there is nothing to choose from
            words, points = [], []
        hidden: list[tuple[float, float, float]] = []
        if hiding is not None and words:
            alone = Annotations(bridged.values[image : image + 1], exists[image : image + 1], bridged.grid)
            generator = torch.Generator().manual_seed(crc32(f"{hiding.seed} {image_id}".encode()))
            hidden = _hide(model, alone, tokens[image, 0], words, whole[image], said, hiding, generator)
        end = Word("", len(units), len(ids))
        mean, meant = by_word(said, [*read, end] if end.start < end.stop else read).mean(0), by_word(said, words)
        looks[image_id] = Look(
            entropies=tuple(relative_entropies(meant[None], exists[image : image + 1])[0].tolist()),
            movements=tuple(((meant - mean).abs().sum(-1) / 2).tolist()),
            peaks=tuple(meant.argmax(-1).tolist()),
            uniform_losses=tuple(sum(losses[image][word.start : word.stop]) for word in words),
            hidden=tuple(hidden),
            points=tuple((point.hit, point.chance) for point in points),
        )
    return looks


def content_words(model: Captioner, ids: Sequence[int]) -> list[Word]:
    """Return a caption's words that are about things: all but function words.

    These are known of English alone. In another language all words count.
    """
    vocabulary = model.vocabulary
    read = vocabulary.read(vocabulary.decode(ids))
    if vocabulary.units == "words":
        return [word for word in read if word.text not in FUNCTION_WORDS]
    # With capitals and punctuation, and "it's" is one word here.
    return [word for word in read if any(part not in FUNCTION_WORDS for part in tokenize(word.text))]


def relative_entropies(weights: Tensor, exists: Tensor) -> Tensor:
    """Return the (B, W) entropy of weights (B, W, N) relative to that of uniform ones, of existing regions (B, N).

    It is no number where an image has a single region.
    """
    weights = weights.double()
    return -torch.xlogy(weights, weights).sum(-1) / exists.sum(-1, keepdim=True).log()


def _log_probabilities(
    model: Captioner, memory: Memory, tokens: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the (B, T) log-probability of each token of one caption per image, and the weights (B, T, N)."""
    words = model.embed(tokens[:, 0, :-1])
    outputs, weights, _ = model.decoder(words, memory, lengths=lengths)
    chosen = _scores(model, outputs).gather(-1, tokens[:, 0, 1:, None])
    return chosen[..., 0], None if weights is None else weights[:, 0]


def _scores(model: Captioner, outputs: Tensor) -> Tensor:
    logits: Tensor = model.output(outputs)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _point(
    model: Captioner, read: Sequence[Word], weights: Tensor, grid: tuple[int, int], scene: Scene
) -> list[Pointing]:
    """Play the pointing game with a caption of a scene, if regions divide the whole scene, as it wants them to."""
    words, side = [word.text for word in read], scene.side
    if model.preprocessing.visible_box(side, side) != (0.0, 0.0, side, side):
        return []
    language = language_of(words)
    judgement, looked = judge(words, scene, language), by_word(weights, read).float().cpu().numpy()
    return pointing(judgement, looked, grid, scene, language)


def _hide(
    model: Captioner,
    bridged: Annotations,
    tokens: Tensor,
    words: Sequence[Word],
    whole: Tensor,
    weights: Tensor,
    hiding: Hiding,
    generator: torch.Generator,
) -> list[tuple[float, float, float]]:
    """Hide regions of one image from each of some words of its caption, and return what each word loses.

    A triple holds the loss with a word's strongest regions hidden, the mean loss with random ones, and the share of the
    draws whose loss is smaller than the first.

    Parameters
    ----------
    bridged : Annotations
        Of the image, behind the bridge if that takes each region by itself, and else before it.
    tokens : Tensor
        (T + 1,) of the caption, from ``<bos>`` on.
    words : sequence of Word
        W words of it.
    whole, weights : Tensor
        (T,) log-probabilities and (T, N), with nothing hidden.
    """
    exists = bridged.existing()[0]
    regions, variants = int(exists.sum()), 1 + hiding.draws
    count = max(1, round(hiding.share * regions))
    if count == regions:
        return []
    order = torch.rand(len(words), variants, len(exists), generator=generator).to(weights)
    order[:, 0] = by_word(weights, words)
    order.masked_fill_(~exists, -1)
    masks = exists.expand(order.shape).scatter(-1, order.topk(count).indices, False).flatten(0, 1)
    # A hidden region does not exist for the model: not for the first state, nor for any word.
    seen = Annotations(bridged.values.expand(len(masks), -1, -1), masks, bridged.grid)
    memory = model.decoder.memory(seen if model.bridge.regionwise else model.bridge(seen))
    stops = torch.tensor([word.stop for word in words], device=tokens.device).repeat_interleave(variants)
    before = model.embed(tokens[: max(word.stop for word in words)]).expand(len(masks), -1, -1)
    lengths = stops[:, None] if model.device.type == "cpu" else None  # what comes later changes nothing
    outputs = model.decoder(before, memory, need_weights=False, lengths=lengths).outputs
    # A row for each unit of a word, in each variant.
    units = [(row, t) for row in range(len(masks)) for t in range(*words[row // variants][1:])]
    rows, places = torch.tensor(units, device=outputs.device).T
    lost = whole[places] - _scores(model, outputs[rows, places]).gather(-1, tokens[places + 1, None])[:, 0]
    losses = lost.new_zeros(len(masks)).index_add(0, rows, lost).view(len(words), variants).double().cpu()
    strongest, random = losses[:, 0], losses[:, 1:]
    smaller = (random < strongest[:, None]).double().mean(1)
    return list(zip(strongest.tolist(), random.mean(1).tolist(), smaller.tolist(), strict=True))
