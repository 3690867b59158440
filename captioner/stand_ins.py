# ruff: noqa: D101, D102, D103
"""Stand-ins for what other branches bring: to be deleted when they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.images import Preprocessing, read_image
from captioner.model import Caption, Captioner


@dataclass(frozen=True)
class Decoding:
    beam_size: int = 5
    length_penalty: float = 0.7
    min_words: int = 0
    max_words: int = 20
    no_repeat_ngram: int = 0
    banned: tuple[str, ...] = ()
    prefix: str = ""
    captions: int = 1
    groups: int = 1
    diversity: float = 0.5
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise InputError(f"The beam size is {self.beam_size}: it must be at least 1.")


def read_images(
    paths: Sequence[Path], preprocessings: Sequence[Preprocessing], workers: int, batch_size: int
) -> Iterator[list[tuple[int, Path, tuple[Tensor, ...] | InputError]]]:
    for first in range(0, len(paths), batch_size):
        batch: list[tuple[int, Path, tuple[Tensor, ...] | InputError]] = []
        for index, path in enumerate(paths[first : first + batch_size], first):
            try:
                image = read_image(path)
                batch.append((index, path, tuple(one.pixels(image) for one in preprocessings)))
            except InputError as error:
                batch.append((index, path, error))
        yield batch


class StandIn:
    def __init__(self, model: Captioner | Ensemble) -> None:
        self.model = model.captioners[0] if isinstance(model, Ensemble) else model

    @property
    def preprocessings(self) -> list[Preprocessing]:
        return [self.model.preprocessing]

    @torch.no_grad()
    def annotate_pixels(self, pixels: Sequence[Tensor]) -> Any:
        return self.model.annotate(pixels[0].to(self.model.device))

    @torch.no_grad()
    def caption_annotations(
        self, annotations: Any, decoding: Decoding, *, numbers: Sequence[int] | None = None
    ) -> list[list[Caption]]:
        found = self.model.search(
            annotations,
            beam_size=decoding.beam_size,
            max_words=decoding.max_words,
            length_penalty=decoding.length_penalty,
        )
        counts = [min(decoding.captions, len(hypotheses)) for hypotheses in found]
        lists: list[list[Caption]] = [[] for _ in found]
        for rank in range(max(counts)):
            best = [hypotheses[min(rank, count - 1)] for hypotheses, count in zip(found, counts, strict=True)]
            for captions, caption, count in zip(lists, self.model._explain(annotations, best), counts, strict=True):
                captions += [caption] if rank < count else []
        return lists
