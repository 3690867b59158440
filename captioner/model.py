"""The captioner: encoder, bridge, embedding, decoder and output layer in one, and how it writes captions of images.

Shapes: B images, Q captions per image, N regions, D annotation size, E embedding size, T words, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from captioner import attention, bridges, decoders, encoders
from captioner.attention import Annotations, Memory
from captioner.bridges import Bridge, NoBridge
from captioner.checkpoint import Contents, read
from captioner.decoders import Decoder, LSTMDecoder, State
from captioner.decoding import Decoding
from captioner.encoders import Encoder, ForeignEncoder, PrecomputedRegions
from captioner.errors import InputError
from captioner.images import Preprocessing, read_image
from captioner.region_files import check_regions, pad_regions, read_regions
from captioner.search import Hypothesis, Limits, Samples, StepFunction, beam_search, draw, sample
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary, Word, pad, restore

# All that a checkpoint can name. Nothing else is ever built from a file.
PARTS: dict[str, type] = {
    part.__name__: part
    for part in (
        attention.Additive,
        attention.Dot,
        attention.General,
        attention.MultiHead,
        attention.NoAttention,
        attention.ScaledDot,
        attention.Uniform,
        bridges.LinearBridge,
        bridges.NoBridge,
        bridges.TransformerBridge,
        decoders.GRUDecoder,
        decoders.LSTMDecoder,
        decoders.TransformerDecoder,
        encoders.ForeignEncoder,
        encoders.PrecomputedRegions,
        encoders.ResNet,
        encoders.SmallCNN,
        encoders.VGG16,
        Preprocessing,
    )
}


def describe(part: object) -> dict[str, Any]:
    """Return a part's settings as plain JSON, from which :func:`rebuild` makes its like.

    The convention that carries this: positional parameters are what the neighbours decide (sizes, a foreign module),
    keyword-only parameters are settings, and each is kept as an attribute of the same name.
    """
    if isinstance(part, Preprocessing):
        return {"class": "Preprocessing", **asdict(part)}
    names = [name for name, kind in inspect.signature(type(part)).parameters.items() if kind.kind == kind.KEYWORD_ONLY]
    values = {name: getattr(part, name) for name in names}
    settings = {
        name: describe(value) if isinstance(value, nn.Module | Preprocessing) else value
        for name, value in values.items()
    }
    return {"class": type(part).__name__, **settings}


def rebuild(settings: Mapping[str, Any], *neighbours: object) -> Any:
    """Build what :func:`describe` described, from the table :data:`PARTS` alone."""
    values = {
        name: tuple(value) if isinstance(value, list) else _nested(value)
        for name, value in settings.items()
        if name != "class"
    }
    return _part(settings["class"])(*neighbours, **values)


def _nested(value: object) -> object:
    if not isinstance(value, dict):
        return value
    # A module inside a module gets its sizes from the outer one; a preprocessing has none.
    return rebuild(value) if _part(value["class"]) is Preprocessing else partial(rebuild, value)


def _numbers(settings: object, wanted: str) -> Iterator[int]:
    """Give the whole numbers that stand under a name anywhere in settings."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name == wanted and isinstance(value, int):
                yield value
            yield from _numbers(value, wanted)


def _part(name: str) -> type:
    if not isinstance(name, str) or name not in PARTS:
        raise InputError(
            f"The checkpoint names a part {name!r} that this captioner does not know: install the release that wrote "
            "it."
        )
    return PARTS[name]


def find_captions(
    step: StepFunction,
    memory: Memory,
    start: State,
    vocabulary: Vocabulary,
    decoding: Decoding,
    numbers: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Find captions of B images; see :func:`captioner.search.beam_search` and :func:`captioner.search.draw`.

    What is no word, as ``<unk>``, is never said. A search gives all that its beam holds, whatever `decoding.captions`.

    Raises
    ------
    InputError
        Where the limits are none that the vocabulary can keep, see :func:`limits_of`, or an image has no caption, since
        the log-probabilities are not numbers.
    """
    limits = limits_of(decoding, vocabulary)
    settings: dict[str, Any] = {
        "begin": BEGIN,
        "end": END,
        "limits": limits,
        "length_penalty": decoding.length_penalty,
    }
    if decoding.sample:
        found = draw(
            step,
            memory,
            start,
            samples=decoding.captions,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            seed=decoding.seed,
            numbers=numbers,
            **settings,
        )
    else:
        found = beam_search(
            step,
            memory,
            start,
            beam_size=decoding.beam_size,
            groups=decoding.groups,
            diversity=decoding.diversity,
            **settings,
        )
    if not all(found):
        raise _diverged()
    return found


def limits_of(decoding: Decoding, vocabulary: Vocabulary) -> Limits:
    """Return what a caption may be, in the ids of a vocabulary.

    Raises
    ------
    InputError
        Where captions are to begin with what is not in the vocabulary, with more than their longest, or with what is
        banned, or several words are banned as one by a model that says words.
    """
    longest = vocabulary.longest if decoding.max_words is None else decoding.max_words
    if decoding.min_words > longest:
        raise InputError(
            f"`min_words` {decoding.min_words} is more than `max_words` {longest}: lower the first or raise the second."
        )
    first = vocabulary.cut(decoding.begin_with)
    if unknown := vocabulary.unknown(first):
        raise InputError(
            f"Captions are to begin with {unknown[0]!r}, which the model does not know: choose another word."
        )
    if len(first) > longest:
        raise InputError(
            f"`begin_with` {decoding.begin_with!r} is longer than `max_words` {longest}: shorten the one or raise the "
            "other."
        )
    banned = {index: said for said in decoding.ban for index in vocabulary.ban(said)}
    prefix = vocabulary.encode(first, max_words=len(first))[1:-1]  # without begin and end
    for index in prefix:
        if index in banned:
            raise InputError(f"{banned[index]!r} is in both `ban` and `begin_with`: take it out of one of them.")
    said_first = vocabulary.filter(decoding.ban, 0)
    if said_first and any(index in said_first(prefix[:place]) for place, index in enumerate(prefix)):
        raise InputError(
            f"`begin_with` {decoding.begin_with!r} holds a word that is in `ban`: take it out of one of them."
        )
    parts = vocabulary.filter(decoding.ban, decoding.no_repeat_ngram)
    return Limits(
        decoding.min_words,
        longest,
        0 if parts else decoding.no_repeat_ngram,
        (PAD, UNKNOWN, *banned),
        tuple(prefix),
        parts,
    )


def _diverged() -> InputError:
    return InputError(
        "The model's word scores are not numbers, since its training diverged: train it again at a lower learning rate."
    )


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Caption:
    """A caption and where its words came from.

    Attributes
    ----------
    text : str
        The caption, to be read.
    words : list of str
        Its T words, as people read them, whether the model says words, characters or byte pairs.
    log_probability : float
        The model's natural log-probability of the words and the end after them.
    score : float
        What the search ranked it by: the log-probability, normalised by length, and less what diversity cost. Of a
        caption that was given and not found, the log-probability.
    attention : Tensor or None
        (T, N) float32 on the CPU, each row summing to 1; None from a decoder without attention, or if not wanted. Of a
        word that is said by several characters or byte pairs it is the mean over these.
    grid : tuple of int or None
        (h, w) with h * w == N where the regions are a grid, row by row.
    gates : Tensor or None
        (T,) values of the gate beta, likewise; None from a decoder without it.
    """

    text: str
    words: list[str]
    log_probability: float
    score: float
    attention: Tensor | None
    grid: tuple[int, int] | None
    gates: Tensor | None


# A file, an opened image, a (H, W, 3) or (H, W) uint8 array or a (3, H, W) uint8 tensor.
ImageSource: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
Seen = TypeVar("Seen")  # what is made of images before captions are searched


class ImageCaptioner(ABC, Generic[Seen]):
    """What captions images, of whatever parts it is made.

    Attributes
    ----------
    captioners : list of Captioner
        The models that it is made of, on one device.
    """

    captioners: list[Captioner]

    @property
    @abstractmethod
    def preprocessings(self) -> list[Preprocessing]:
        """The ways in which an image is made a square before it is seen, all different."""

    @abstractmethod
    def annotate_pixels(self, pixels: Sequence[Tensor]) -> Seen:
        """Look at B images: (B, 3, S, S) uint8, on any device, as each of `preprocessings` makes them.

        Under autocast encoders compute in its precision. What is given is in the model's own.
        """

    @property
    def region_dim(self) -> int | None:
        """D of the regions that it sees in place of images; None where it sees images."""
        encoders = [captioner.encoder for captioner in self.captioners]
        dims = {one.annotation_dim if isinstance(one, PrecomputedRegions) else None for one in encoders}
        if len(dims) > 1:
            raise InputError(
                "Some models of the ensemble see regions that were computed beforehand, and others see images or other "
                "regions: give models that see the same."
            )
        return dims.pop()

    @abstractmethod
    def annotate_regions(self, regions: Annotations) -> Seen:
        """Take regions that were computed beforehand, on any device, for what is seen of B images."""

    @abstractmethod
    def caption_annotations(
        self,
        annotations: Seen,
        decoding: Decoding | None = None,
        *,
        numbers: Sequence[int] | None = None,
        with_attention: bool = True,
    ) -> list[list[Caption]]:
        """Caption images by what :meth:`annotate_pixels` gave.

        The attention of all captions is read from one teacher-forced pass over them.

        Parameters
        ----------
        annotations
            Of B images.
        decoding : Decoding, optional
            How.
        numbers : sequence of int, optional
            Of the images, 0 to B - 1 by default: where captions are drawn, those of one number have the same chances.
        with_attention : bool
            Whether captions shall have their attention and gates; the pass is left out if not.

        Returns
        -------
        list of list of Caption
            For each image at most `decoding.captions`, at least one, best first.

        Raises
        ------
        InputError
            Where captions are to begin with a word that the model does not know, or its scores are not numbers.
        """

    @abstractmethod
    def attend_annotations(self, annotations: Seen, captions: Sequence[str]) -> list[Caption]:
        """Do for B images, and a caption for each, what :meth:`attend` does, by what :meth:`annotate_pixels` gave.

        Words that the model does not know are read as ``<unk>`` without a warning: `Vocabulary.unknown` finds them.
        """

    def attend(self, image: ImageSource, caption: str) -> Caption:
        """Tell where the model looks while it says a given caption, whoever wrote it.

        All is read from one teacher-forced pass.

        Parameters
        ----------
        image : image
            One of those that :meth:`caption` takes.
        caption : str
            To be cut into words, characters or byte pairs as the captions of training were (`Vocabulary.cut`): words in
            lower case, without punctuation. One that the model does not know is read as ``<unk>``, and warned of: it
            says little where the model would look for that word.

        Returns
        -------
        Caption
            Its `words` are those that were given, also where the model does not know them, its `log_probability` is
            that of saying them, with ``<unk>`` in place of the unknown ones, and so is its `score`.

        Raises
        ------
        InputError
            Where the image cannot be read, the caption has no word that the model knows, or it has more words than the
            decoder's positions reach.
        """
        vocabulary = self.captioners[0].vocabulary
        (attended,) = self.attend_annotations(self._see([image], 0), [caption])
        if unknown := vocabulary.unknown(vocabulary.cut(caption)):
            warnings.warn(unknown_words(unknown), stacklevel=2)
        return attended

    def caption(
        self,
        images: Iterable[ImageSource] | ImageSource,
        decoding: Decoding | None = None,
        *,
        batch_size: int = 32,
        **options: Any,
    ) -> list[Caption]:
        """Caption images.

        Parameters
        ----------
        images : sequence of images
            Paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, (3, H, W) uint8 tensors. Or one of them. For a model
            that sees regions: paths of .npy or .npz files, or (N, D) arrays or tensors.
        decoding : Decoding, optional
            How captions are found.
        batch_size : int
            Images at a time.
        **options
            Settings of :class:`~captioner.decoding.Decoding`, as ``beam_size=1``, in place of those of `decoding`.

        Returns
        -------
        list of Caption
            The best caption of each image, in their order. :meth:`caption_stream` gives several.

        Raises
        ------
        InputError
            Where an image cannot be read, or the options are not to be had.
        """
        return [captions[0] for captions in self.caption_stream(images, decoding, batch_size=batch_size, **options)]

    def caption_stream(
        self,
        images: Iterable[ImageSource] | ImageSource,
        decoding: Decoding | None = None,
        *,
        batch_size: int = 32,
        **options: Any,
    ) -> Iterator[list[Caption]]:
        """Caption images one batch after the other, as they come: only one batch is held at a time.

        Parameters
        ----------
        images, decoding, batch_size, options
            As for :meth:`caption`.

        Yields
        ------
        list of Caption
            Of the next image at most `decoding.captions` captions, at least one, best first.

        Raises
        ------
        InputError
            As :meth:`caption`.
        """
        decoding = replace(decoding or Decoding(), **options)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give 1 or more.")
        several: Iterable[Any] = [images] if _is_one(images) else images  # type: ignore[assignment]
        return self._stream(iter(several), decoding, batch_size)

    def _stream(self, images: Iterator[ImageSource], decoding: Decoding, batch_size: int) -> Iterator[list[Caption]]:
        first = 0
        while batch := list(islice(images, batch_size)):
            numbers = range(first, first + len(batch))
            yield from self.caption_annotations(self._see(batch, first), decoding, numbers=numbers)
            first += len(batch)

    def _see(self, images: Sequence[ImageSource], first: int) -> Seen:
        """Look at images, or at their regions, of which the first has this number."""
        if (dim := self.region_dim) is not None:
            opened = [_open_regions(image, first + place, dim) for place, image in enumerate(images)]
            return self.annotate_regions(pad_regions(opened))
        pictures = [_open_image(image, first + place) for place, image in enumerate(images)]
        return self.annotate_pixels(
            [torch.stack([preprocessing.pixels(image) for image in pictures]) for preprocessing in self.preprocessings]
        )


def unknown_words(words: Sequence[str]) -> str:
    """Return what is said of words in a given caption that the model does not know."""
    named = ", ".join(map(repr, words))
    return f"The model does not know {named}, and reads <unk> there: of these words its attention says little."


@torch.no_grad()
def attend_together(
    members: Sequence[Captioner], annotations: Sequence[Annotations], captions: Sequence[str]
) -> list[Caption]:
    """Do for members of an ensemble, given the annotations of each, what :meth:`ImageCaptioner.attend` does.

    The attention is the first member's.
    """
    vocabulary = members[0].vocabulary
    said = [vocabulary.cut(caption) for caption in captions]
    for caption, words in zip(captions, said, strict=True):
        if len(vocabulary.unknown(words)) == len(set(words)):
            raise InputError(
                f"The caption {caption!r} has no word that the model knows: give it words of the captions that it was "
                "trained on."
            )
    tokens = pad([[vocabulary.encode(words, max_words=len(words))] for words in said]).to(members[0].device)
    following = tokens[..., 1:, None]  # (B, 1, T + 1, 1)
    with evaluating(*members):
        passes = [
            member(seen, tokens, need_weights=member is members[0])
            for member, seen in zip(members, annotations, strict=True)
        ]
    chosen = torch.stack([logits.double().log_softmax(-1).gather(-1, following) for logits, _, _ in passes])
    mean = (chosen.logsumexp(0) - math.log(len(members))).masked_fill(following == PAD, 0)
    _, weights, gates = passes[0]
    weights, gates = (None if part is None else part.float().cpu() for part in (weights, gates))
    if not mean.isfinite().all():
        raise _diverged()
    attended = []
    for row, (units, log_probability) in enumerate(zip(said, mean.flatten(1).sum(1).tolist(), strict=True)):
        read = vocabulary.read(units)
        seen, opened = (None if part is None else by_word(part[row, 0], read) for part in (weights, gates))
        grid, words = annotations[0].grid, [word.text for word in read]
        attended.append(Caption(vocabulary.join(units), words, log_probability, log_probability, seen, grid, opened))
    return attended


def by_word(values: Tensor, words: Sequence[Word]) -> Tensor:
    """Return the means over the units of each of W words, (W, ...), of values by unit (T, ...)."""
    if all(word.stop == word.start + 1 for word in words):
        return values[[word.start for word in words]]
    return torch.stack([values[word.start : word.stop].mean(0) for word in words])


def _is_one(images: object) -> bool:
    """Tell one image from several: text is a path and has letters, an array of one has no first axis for images."""
    one = isinstance(images, str | Path | Image.Image)
    return one or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)


def _open_image(image: ImageSource, number: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return read_image(image)
    array = image.detach().cpu().movedim(0, -1).numpy() if isinstance(image, Tensor) and image.ndim == 3 else image
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.size:
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
            return Image.fromarray(np.ascontiguousarray(array))
    kind = (
        f"{'a tensor' if isinstance(image, Tensor) else 'an array'} {tuple(image.shape)} of {image.dtype}"
        if isinstance(image, np.ndarray | Tensor)
        else f"of type {type(image).__name__}"
    )
    raise InputError(
        f"Image {number} is {kind}: give a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor "
        "(3, H, W)."
    )


def _open_regions(regions: ImageSource, number: int, dim: int) -> NDArray[np.float32]:
    if isinstance(regions, str | Path):
        return read_regions(Path(regions), dim)
    array = regions.detach().cpu().numpy() if isinstance(regions, Tensor) else regions
    if isinstance(array, np.ndarray):
        return check_regions(array, dim, f"Image {number}")
    raise InputError(
        f"Image {number} is of type {type(regions).__name__}: give its regions, a path or an array (N, D)."
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode, and back into the mode in which they were."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


class Captioner(ImageCaptioner[Annotations], nn.Module):
    """An image captioner.

    Each part receives the sizes of the part before it; the vocabulary's size is known here alone.

    Parameters
    ----------
    encoder : nn.Module
        An :class:`~captioner.encoders.Encoder`, or any module that :class:`~captioner.encoders.ForeignEncoder` takes.
    vocabulary : Vocabulary
        The words it can say.
    bridge : callable
        Builds the bridge from the encoder's annotation size.
    decoder : callable
        Builds the decoder from E and the bridge's annotation size.
    embedding_dim : int
        E, size of a word's embedding.
    dropout : float
        Share of values dropped from embeddings and from what the output layer reads.
    tie_weights : bool
        Use the embedding's matrix as the output layer's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        vocabulary: Vocabulary,
        *,
        bridge: Callable[[int], Bridge] = NoBridge,
        decoder: Callable[[int, int], Decoder] = LSTMDecoder,
        embedding_dim: int = 512,
        dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder if isinstance(encoder, Encoder) else ForeignEncoder(encoder)
        self.vocabulary = vocabulary
        self.embedding_dim, self.dropout, self.tie_weights = embedding_dim, dropout, tie_weights
        self.bridge = bridge(self.encoder.annotation_dim)
        self.embedding = nn.Embedding(len(vocabulary), embedding_dim, padding_idx=PAD)
        self.decoder = decoder(embedding_dim, self.bridge.annotation_dim)
        self.output = nn.Linear(embedding_dim, len(vocabulary))  # L_o of eq. 7
        self.drop = nn.Dropout(dropout)
        self.word_scale = math.sqrt(embedding_dim) if tie_weights and self.decoder.scales_words else 1.0
        if tie_weights:
            # Scaled for its use as the output's; an embedding of unit variance would make the first scores enormous.
            nn.init.normal_(self.embedding.weight, std=embedding_dim**-0.5)
            nn.init.zeros_(self.embedding.weight[PAD].detach())
            self.output.weight = self.embedding.weight

    @property
    def preprocessing(self) -> Preprocessing:
        """What an image goes through before the encoder."""
        return self.encoder.preprocessing

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.weight.device

    def annotate(self, images: Tensor) -> Annotations:
        """Return the encoder's annotations of images (B, 3, S, S), uint8 as :class:`Preprocessing` gives them."""
        normalised = self.preprocessing.normalise(images).to(self.embedding.weight.dtype)
        # Convolutions run about twice as fast on this layout, on a CPU and on a GPU; others do not care.
        annotations: Annotations = self.encoder(normalised.contiguous(memory_format=torch.channels_last))
        return annotations

    def memory(self, annotations: Annotations) -> Memory:
        """Return what the decoder remembers of the images: B rows, computed once per image."""
        return self.decoder.memory(self.bridge(annotations))

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the words (..., E) of ids (...) as the decoder takes them."""
        words: Tensor = self.drop(self.word_scale * self.embedding(tokens))
        return words

    def forward(
        self, annotations: Annotations, tokens: Tensor, need_weights: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score given captions: teacher forcing.

        Parameters
        ----------
        annotations : Annotations
            Of B images.
        tokens : Tensor
            (B, Q, T + 1) ids, from ``<bos>`` on, padded.
        need_weights : bool
            Return the attention, too, which fused kernels never form.

        Returns
        -------
        logits : Tensor
            (B, Q, T, V): at t the scores of token t + 1.
        weights : Tensor or None
            (B, Q, T, N) attention while that token was chosen.
        gates : Tensor or None
            (B, Q, T), the gate beta.
        """
        words = self.embed(tokens[..., :-1].flatten(0, 1))  # (B * Q, T, E)
        outputs, weights, gates = self.decoder(words, self.memory(annotations), need_weights)
        logits = self.output(self.drop(outputs)).unflatten(0, tokens.shape[:2])
        return logits, weights, gates

    def score_words(
        self, annotations: Annotations, tokens: Tensor, need_weights: bool = True, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Do as :meth:`forward` does, but score no padding: the logits are (K, V), of the K tokens that are none.

        With `lengths` (B, Q) these are the first so many tokens after ``<bos>`` of each caption, whatever their ids.
        Weights and gates mean nothing behind a caption's end.
        """
        if lengths is None:
            spoken = tokens[..., 1:] != PAD  # (B, Q, T)
        else:
            spoken = torch.arange(tokens.size(-1) - 1, device=tokens.device) < lengths[..., None]
        # On a GPU the steps wait for each other and not for their rows, and asking it for lengths would stop them all.
        lengths = spoken.sum(-1) if tokens.device.type == "cpu" else None
        words = self.embed(tokens[..., :-1].flatten(0, 1))  # (B * Q, T, E)
        outputs, weights, gates = self.decoder(words, self.memory(annotations), need_weights, lengths)
        # Not by a mask: the gradient of that is scattered one value after the other.
        heard = outputs.flatten(0, 1).index_select(0, spoken.flatten().nonzero().squeeze(1))
        return self.output(self.drop(heard)), weights, gates

    def step(self, words: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
        """Return the log-probabilities (B * Q, V) of the words after `words` (B * Q,), and the next state."""
        step = self.decoder.step(self.embed(words), memory, state, need_weights=False)
        logits = self.output(self.drop(step.output))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)), step.state

    @torch.no_grad()
    def search(
        self,
        annotations: Annotations,
        decoding: Decoding | None = None,
        *,
        numbers: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """Find captions of B images as ids; see :func:`find_captions`, :meth:`caption_annotations`, :meth:`caption`."""
        return self._find(self.memory(annotations), replace(decoding or Decoding(), **options), numbers)

    def _find(self, memory: Memory, decoding: Decoding, numbers: Sequence[int] | None = None) -> list[list[Hypothesis]]:
        return find_captions(self.step, memory, self.decoder.start(memory, 1), self.vocabulary, decoding, numbers)

    @torch.no_grad()
    def sample(self, annotations: Annotations, *, samples: int, max_tokens: int) -> Samples:
        """Draw captions of B images, `samples` of each; see :func:`captioner.search.sample`.

        They are drawn from the model as it stands: in training mode with its dropout.

        Raises
        ------
        InputError
            Where the log-probabilities are not numbers.
        """
        memory = self.memory(annotations)
        drawn = sample(
            self.step,
            memory,
            self.decoder.start(memory, samples),
            begin=BEGIN,
            end=END,
            samples=samples,
            max_tokens=max_tokens,
        )
        if not drawn.log_probabilities.isfinite().all():
            raise _diverged()
        return drawn

    @property
    def preprocessings(self) -> list[Preprocessing]:
        """The one preprocessing, as a list."""
        return [self.preprocessing]

    @property
    def captioners(self) -> list[Captioner]:  # type: ignore[override]
        """The model alone."""
        return [self]

    @torch.no_grad()
    def annotate_pixels(self, pixels: Sequence[Tensor]) -> Annotations:  # noqa: D102
        (images,) = pixels
        with evaluating(self):
            annotations = self.annotate(images.to(self.device))
        return annotations._replace(values=annotations.values.to(self.embedding.weight.dtype))

    def annotate_regions(self, regions: Annotations) -> Annotations:  # noqa: D102
        values = regions.values.to(self.embedding.weight)  # its device and its precision
        return regions._replace(values=values, mask=regions.existing().to(values.device))

    @torch.no_grad()
    def caption_annotations(  # noqa: D102
        self,
        annotations: Annotations,
        decoding: Decoding | None = None,
        *,
        numbers: Sequence[int] | None = None,
        with_attention: bool = True,
    ) -> list[list[Caption]]:
        decoding = decoding or Decoding()
        with evaluating(self):
            memory = self.memory(annotations)
            found = [image[: decoding.captions] for image in self._find(memory, decoding, numbers)]
            return self.explain(found, memory if with_attention else None, annotations.grid)

    def attend_annotations(self, annotations: Annotations, captions: Sequence[str]) -> list[Caption]:  # noqa: D102
        return attend_together([self], [annotations], captions)

    @torch.no_grad()
    def head_weights(self, image: str | Path | Image.Image, words: Sequence[str]) -> Tensor | None:
        """Return where every layer and head of the decoder looks while it says the words of a caption.

        Parameters
        ----------
        image : path or PIL image
            What it looks at.
        words : sequence of str
            T units of the vocabulary, words or others; one that the model does not know is read as ``<unk>``.

        Returns
        -------
        Tensor or None
            (layers, heads, T, N), each row summing to 1; None from a decoder without attention.

        Raises
        ------
        InputError
            Where the image cannot be read.
        """
        with evaluating(self):
            memory = self.memory(self._see([image], 0))
            ids = self.vocabulary.encode(words, max_words=len(words))[:-1]  # the end is never fed
            weights = self.decoder.head_weights(self.embed(torch.tensor([ids], device=self.device)), memory)
        return None if weights is None else weights[0, 0, :, :, : len(words)]  # without the look before the end

    def explain(
        self, found: Sequence[Sequence[Hypothesis]], memory: Memory | None, grid: tuple[int, int] | None
    ) -> list[list[Caption]]:
        """Read the attention of finished captions of B images from one teacher-forced pass.

        Parameters
        ----------
        found : sequence of sequences of Hypothesis
            Of each image.
        memory : tuple of Tensor, optional
            What :meth:`memory` gave for the images. Without it captions have neither attention nor gates.
        grid : tuple of int or None
            That of the annotations.
        """
        weights = gates = None
        if memory is not None:
            # Neither the last word nor the end is followed by one that looks.
            tokens = pad([[[BEGIN, *hypothesis.tokens[:-2]] for hypothesis in image] for image in found])
            lengths = (tokens != PAD).sum(-1) if self.device.type == "cpu" else None  # see score_words
            words = self.embed(tokens.to(self.device).flatten(0, 1))
            _, weights, gates = self.decoder(words, memory, lengths=lengths)
            weights, gates = (None if part is None else part.float().cpu() for part in (weights, gates))
        captions: list[list[Caption]] = []
        for image, hypotheses in enumerate(found):
            captions.append([])
            for place, (ids, log_probability, score) in enumerate(hypotheses):
                units = self.vocabulary.decode(ids)
                read = self.vocabulary.read(units)
                seen, opened = (
                    None if part is None else by_word(part[image, place], read) for part in (weights, gates)
                )
                text, said = self.vocabulary.join(units), [word.text for word in read]
                captions[-1].append(Caption(text, said, log_probability, score, seen, grid, opened))
        return captions

    def contents(self, scores: Mapping[str, float] | None = None) -> Contents:
        """Return what a checkpoint holds of this model."""
        settings = {**describe(self), "encoder": describe(self.encoder)}
        if isinstance(self.encoder, ForeignEncoder):
            settings["encoder"]["module"] = self.encoder.module_name
        return Contents(
            settings,
            list(self.vocabulary.words),
            dict(self.state_dict()),
            dict(scores or {}),
            self.vocabulary.stored,
        )

    @classmethod
    def from_contents(cls, contents: Contents, *, encoder: nn.Module | None = None) -> Captioner:
        """Rebuild a model from what a checkpoint holds; see :meth:`from_checkpoint`."""
        described = contents.settings.get("encoder")
        described = dict(described) if isinstance(described, dict) else {}
        name = described.pop("module", None)
        if name is not None and encoder is None:
            raise InputError(
                f"This checkpoint needs an encoder of its author's, {name}, whose code is never loaded from a file: "
                "give it as --encoder package:Class on the command line, or as encoder= in Python."
            )
        if name is None and encoder is not None:
            raise InputError("This checkpoint brings its own encoder: leave out the encoder that was given beside it.")
        neighbours = () if encoder is None else (encoder,)
        vocabulary = restore(contents.words, contents.vocabulary, "the checkpoint")

        def build(own: nn.Module | None = None) -> Captioner:
            settings: dict[str, Any] = {
                name: _nested(value) for name, value in contents.settings.items() if name not in ("class", "encoder")
            }
            return cls(rebuild(described, *neighbours) if own is None else own, vocabulary, **settings)

        misfit = InputError(
            f"The checkpoint's tensors do not fit the encoder {name}: give the class that it was trained with."
            if name
            else "The checkpoint's tensors do not fit its own settings: the file is damaged, so take another copy."
        )
        if max(_numbers(contents.settings, "layers"), default=0) > len(contents.tensors):  # each layer has some
            raise misfit
        try:
            # First without memory: a file whose settings speak of terabytes is refused before they are asked for.
            own = rebuild(described, *neighbours) if neighbours else None
            with torch.device("meta"):
                planned = {name: tensor.shape for name, tensor in build(own).state_dict().items()}
            if planned != {name: tensor.shape for name, tensor in contents.tensors.items()}:
                raise misfit
            model = build(own)
        except InputError:
            raise
        except Exception as error:  # settings of any type may stand in the file
            raise InputError(
                f"The checkpoint's settings are no model's ({type(error).__name__}): the file is damaged, so take "
                "another copy."
            ) from error
        try:
            model.load_state_dict(contents.tensors)
        except RuntimeError as error:
            raise misfit from error
        return model.eval()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, encoder: nn.Module | None = None, device: str | torch.device = "cpu"
    ) -> Captioner:
        """Open a checkpoint: all there is to know.

        Parameters
        ----------
        path : str or Path
            The file, whose code-free contents are all that is read.
        encoder : nn.Module, optional
            The module that was plugged in as the encoder, if one was: files bring tensors, never code.
        device : str or torch.device
            Where the model shall live.

        Returns
        -------
        Captioner
            In evaluation mode.

        Raises
        ------
        InputError
            Where the file is missing, damaged or not ours, or the encoder is missing.
        """
        return cls.from_contents(read(path), encoder=encoder).to(device)
