"""An ensemble: several captioners of the same words that write one caption, each word by their mean probability.

Shapes: B images, Q hypotheses per image, M members, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.attention import Annotations, Memory
from captioner.checkpoint import read
from captioner.decoders import State
from captioner.decoding import Decoding
from captioner.encoders import Encoder, ForeignEncoder
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import (
    Caption,
    Captioner,
    ImageCaptioner,
    attend_together,
    describe,
    evaluating,
    find_captions,
)
from captioner.search import Hypothesis
from captioner.vocabulary import Vocabulary, restore

# What decides how an encoder came by its tensors, and not what it makes of an image.
OF_TRAINING = ("weights", "learns", "recompute")


class Ensemble(ImageCaptioner[list[Annotations]]):
    """Captioners that choose every word together.

    Their encoders, bridges, attentions and decoders may differ. Members whose encoders are the same share one look at
    the image.

    Parameters
    ----------
    captioners : sequence of Captioner
        The M members, in evaluation mode and on one device. The first leads: its attention is the ensemble's.

    Raises
    ------
    InputError
        Where there is none, or they do not give the same ids to the same words.
    """

    def __init__(self, captioners: Sequence[Captioner]) -> None:
        if not captioners:
            raise InputError("An ensemble of no captioners says nothing: give one at least.")
        for number, member in enumerate(captioners, 1):
            if member.vocabulary != captioners[0].vocabulary:
                raise _other_words(f"Captioner {number} of the ensemble", member.vocabulary)
        self.captioners = list(captioners)
        encoders = [member.encoder for member in captioners]
        # For each member the first one whose annotations are also its own.
        self._looks = [
            next(first for first, other in enumerate(encoders) if _same(encoder, other)) for encoder in encoders
        ]

    @classmethod
    def open(cls, first: Captioner, paths: Sequence[str | Path]) -> Ensemble:
        """Open checkpoints as the members beside a first one, on its device and in its precision.

        Parameters
        ----------
        first : Captioner
            The one that leads. A member with a foreign encoder of the same class gets a copy of the first one's module,
            filled with its own tensors.
        paths : sequence of str or Path
            The checkpoints.

        Raises
        ------
        InputError
            Where a file is missing, damaged or not ours, its words are others, or it needs another foreign encoder.
        """
        return cls([first, *(_open_beside(first, path) for path in paths)])

    @torch.no_grad()
    def annotate(self, pixels: Callable[[Preprocessing], Tensor]) -> list[Annotations]:
        """Return the annotations of B images for each of the M members.

        Parameters
        ----------
        pixels : callable
            Gives the images (B, 3, S, S) as a preprocessing makes them, uint8, where the members are. It is called once
            for each encoder that differs from those before it.
        """
        seen: dict[int, Annotations] = {}
        for look in self._looks:
            if look not in seen:
                member = self.captioners[look]
                seen[look] = member.annotate(pixels(member.preprocessing))
        return [seen[look] for look in self._looks]

    @property
    def preprocessings(self) -> list[Preprocessing]:
        """Those of the members' looks, all different, in the order of the members."""
        wanted = [self.captioners[look].preprocessing for look in self._looks]
        return [each for place, each in enumerate(wanted) if each not in wanted[:place]]

    def annotate_pixels(self, pixels: Sequence[Tensor]) -> list[Annotations]:  # noqa: D102
        made, device = self.preprocessings, self.captioners[0].device
        with evaluating(*self.captioners):
            seen = self.annotate(lambda preprocessing: pixels[made.index(preprocessing)].to(device))
        dtype = self.captioners[0].embedding.weight.dtype
        return [each._replace(values=each.values.to(dtype)) for each in seen]

    def annotate_regions(self, regions: Annotations) -> list[Annotations]:  # noqa: D102
        if self.region_dim is None:
            raise InputError("The models of this ensemble see images, not regions: give images.")
        return [member.annotate_regions(regions) for member in self.captioners]

    @torch.no_grad()
    def caption_annotations(  # noqa: D102
        self,
        annotations: list[Annotations],
        decoding: Decoding | None = None,
        *,
        numbers: Sequence[int] | None = None,
        with_attention: bool = True,
    ) -> list[list[Caption]]:
        decoding = decoding or Decoding()
        with evaluating(*self.captioners):
            memories = self._memories(annotations)
            found = [image[: decoding.captions] for image in self._find(memories, decoding, numbers)]
            return self.captioners[0].explain(found, memories[0] if with_attention else None, annotations[0].grid)

    def attend_annotations(self, annotations: list[Annotations], captions: Sequence[str]) -> list[Caption]:  # noqa: D102
        return attend_together(self.captioners, annotations, captions)

    @torch.no_grad()
    def search(
        self,
        annotations: Sequence[Annotations],
        decoding: Decoding | None = None,
        *,
        numbers: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[Hypothesis]]:
        """Find captions of B images; see :meth:`Captioner.search`.

        A hypothesis's log-probability is the sum over its words of the logarithm of the members' mean probability.

        Parameters
        ----------
        annotations : sequence of Annotations
            Of the B images, for each of the M members.
        decoding, numbers, options
            As for :meth:`Captioner.search`.
        """
        return self._find(self._memories(annotations), replace(decoding or Decoding(), **options), numbers)

    def _memories(self, annotations: Sequence[Annotations]) -> list[Memory]:
        return [member.memory(each) for member, each in zip(self.captioners, annotations, strict=True)]

    def _find(
        self, memories: Sequence[Memory], decoding: Decoding, numbers: Sequence[int] | None
    ) -> list[list[Hypothesis]]:
        starts = [member.decoder.start(memory, 1) for member, memory in zip(self.captioners, memories, strict=True)]
        # The search knows one memory and one state only: those of the members, one behind the other.
        parts = [*zip(self.captioners, _slices(memories), _slices(starts), strict=True)]

        def step(words: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
            steps = [member.step(words, memory[own], state[of_own]) for member, own, of_own in parts]
            log_probabilities = torch.stack([one for one, _ in steps])  # (M, B * Q, V)
            mean = log_probabilities.logsumexp(0) - math.log(len(steps))
            return mean, tuple(tensor for _, state in steps for tensor in state)

        memory, start = (tuple(chain.from_iterable(each)) for each in (memories, starts))
        return find_captions(step, memory, start, self.captioners[0].vocabulary, decoding, numbers)


def _slices(parts: Sequence[tuple[Tensor, ...]]) -> list[slice]:
    """Return where each of several tuples stands in all of them, one behind the other."""
    ends = list(accumulate(len(part) for part in parts))
    return [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]


def _open_beside(first: Captioner, path: str | Path) -> Captioner:
    contents = read(path)
    vocabulary = restore(contents.words, contents.vocabulary, path)
    if vocabulary != first.vocabulary:
        raise _other_words(path, vocabulary)
    name, encoder = contents.settings["encoder"].get("module"), None
    if name is not None:
        if not isinstance(first.encoder, ForeignEncoder) or first.encoder.module_name != name:
            raise InputError(
                f"{path} needs an encoder of its author's, {name}, which is not that of the ensemble's first model: "
                "let a model with that encoder be the first, or leave this one out."
            )
        encoder = copy.deepcopy(first.encoder.module)
    try:
        member = Captioner.from_contents(contents, encoder=encoder)
    except InputError as error:
        raise InputError(f"{path} cannot join the ensemble: {error}") from error
    return member.to(first.embedding.weight)  # its device and its precision


def _other_words(who: str | Path, vocabulary: Vocabulary) -> InputError:
    return InputError(
        f"{who} knows {vocabulary}, but not those of the ensemble's first model: give checkpoints that were trained on "
        "the same captions with the same units and minimum_count."
    )


def _same(one: Encoder, other: Encoder) -> bool:
    """Tell whether two encoders make the same of an image: their settings and their tensors are equal."""
    if one is other:
        return True
    settings = [
        {name: value for name, value in describe(encoder).items() if name not in OF_TRAINING}
        | ({"module": [encoder.module_name, repr(encoder.module)]} if isinstance(encoder, ForeignEncoder) else {})
        for encoder in (one, other)
    ]
    tensors, others = one.state_dict(), other.state_dict()
    return (
        settings[0] == settings[1]
        and tensors.keys() == others.keys()
        and all(torch.equal(value, others[name]) for name, value in tensors.items())
    )
