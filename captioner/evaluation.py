"""Results of any system against references: scores with intervals, two systems compared, and what scores hide."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from captioner.annotation_files import CaptionedImage, open_captions
from captioner.errors import InputError
from captioner.metrics import (
    Comparison,
    Diversity,
    DocumentFrequencies,
    Interval,
    Score,
    diversity,
    interval,
    meteor,
    resample,
    score_tokens,
)
from captioner.results import Result, read_results
from captioner.tokens import Tokenizer, TokenizerChoice, choose_tokenizer, tokenize

# Of fewer images the bootstrap's intervals are too narrow: of two equally good systems too many would be told apart.
FEWEST_TO_COMPARE = 30

ImageId = str | int


class ReferenceCaptions(NamedTuple):
    """What results are scored against.

    Attributes
    ----------
    path : Path
        Where the references came from.
    split : str or None
        Of which split they are, where they are not all that the path holds.
    records : dict
        The captioned images by their id.
    tokens : dict
        For each of these images the tokens of its references.
    without : list
        The ids of images that the file lists without any reference. They are not scored.
    tokenizer : str
        What has cut them, and cuts all that is scored against them.
    """

    path: Path
    split: str | None
    records: dict[ImageId, CaptionedImage]
    tokens: dict[ImageId, list[list[str]]]
    without: list[ImageId]
    tokenizer: Tokenizer = "ptb"

    @classmethod
    def read(cls, path: Path, split: str | None = None, tokenizer: TokenizerChoice = "auto") -> ReferenceCaptions:
        """Read a dataset's folder or caption file, see `open_captions` and `CaptionFiles.records`.

        Raises
        ------
        InputError
            If the file cannot be read, or no image in it has a reference.
        """
        return cls.of(path, split, open_captions(path).records(split), tokenizer)

    @classmethod
    def of(
        cls, path: Path, split: str | None, images: Sequence[CaptionedImage], tokenizer: TokenizerChoice = "auto"
    ) -> ReferenceCaptions:
        """Take the captions of images, which came from a path, as references, and cut them by that tokenizer.

        Raises
        ------
        InputError
            If no image has one.
        """
        records = {record.image_id: record for record in images}
        captioned = {image_id: record for image_id, record in records.items() if record.captions}
        if not captioned:
            raise InputError(f"{path} has no reference: give a file of captions.")
        texts = (caption for record in captioned.values() for caption in record.captions)
        chosen = choose_tokenizer(texts, tokenizer)
        tokens = {
            image_id: [tokenize(caption, chosen) for caption in record.captions]
            for image_id, record in captioned.items()
        }
        without = [image_id for image_id in records if image_id not in captioned]
        return cls(path, split, captioned, tokens, without, chosen)


class TrainingCaptions(NamedTuple):
    """What a system was trained on.

    Attributes
    ----------
    path : Path
        Where the captions came from.
    images : set
        The ids of their images.
    tokens : list
        The tokens of each caption.
    """

    path: Path
    images: set[ImageId]
    tokens: list[list[str]]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer = "ptb") -> TrainingCaptions:
        """Read the split "train" of a dataset's folder, or all captions of a file, and cut them as the references are.

        Raises
        ------
        InputError
            If there is no caption, or the file cannot be read.
        """
        records = open_captions(path).records("train" if path.is_dir() else None)
        tokens = [tokenize(caption, tokenizer) for record in records for caption in record.captions]
        if not tokens:
            raise InputError(f"{path} has no caption: give the training captions.")
        return cls(path, {record.image_id for record in records}, tokens)


class System(NamedTuple):
    """A system's results, scored.

    Attributes
    ----------
    path : Path
        The file of results, or the checkpoint that gave them.
    captions : dict
        The caption of each image, in the order of the references.
    scores : dict
        The scores under "BLEU-1" to "BLEU-4", "ROUGE-L", "CIDEr-D" and, where asked for, "METEOR".
    intervals : dict
        The 95 % interval of each score that can be resampled.
    diversity : Diversity
        What the scores hide.
    empty : list
        The ids of images whose caption has no token. It is scored as it is.
    """

    path: Path
    captions: dict[ImageId, str]
    scores: dict[str, Score]
    intervals: dict[str, Interval]
    diversity: Diversity
    empty: list[ImageId]


class Evaluation(NamedTuple):
    """One or two systems on the same images.

    Attributes
    ----------
    references : ReferenceCaptions
        What they were scored against.
    training : TrainingCaptions or None
        What they were trained on, where that was given.
    systems : list of System
        One or two.
    comparisons : dict
        By how much the first system is ahead of the second, for each score that can be resampled. Empty for one.
    human : Diversity
        Of the first reference of each image, as a measure for the systems'.
    fingerprint : str
        Of the document frequencies, which are those of the references.
    seed : int
        Of the draws of images.
    """

    references: ReferenceCaptions
    training: TrainingCaptions | None
    systems: list[System]
    comparisons: dict[str, Comparison]
    human: Diversity
    fingerprint: str
    seed: int

    @property
    def verdicts(self) -> dict[str, bool | None]:
        """For each comparison whether the systems are told apart; None where there are too few images to say."""
        few = len(self.references.records) < FEWEST_TO_COMPARE
        return {name: None if few else one.distinguishable for name, one in self.comparisons.items()}


def evaluate(
    references: ReferenceCaptions,
    paths: Sequence[Path],
    *,
    training: TrainingCaptions | None = None,
    with_meteor: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Score one or two files of results.

    Parameters
    ----------
    references
        What they are scored against.
    paths
        The results, see `read_results`.
    training
        What the systems were trained on.
    with_meteor
        Whether to compute METEOR too, which takes Java and time.
    seed
        Of the draws of images.

    Raises
    ------
    InputError
        If a file cannot be read, or if it captions an image twice, one without references, or not all that have some:
        a score over a part of the images compares with nothing.
    """
    given = [(path, match(read_results(path), references, path)) for path in paths]
    return evaluate_captions(references, given, training=training, with_meteor=with_meteor, seed=seed)


def evaluate_captions(
    references: ReferenceCaptions,
    systems: Sequence[tuple[Path, dict[ImageId, str]]],
    *,
    training: TrainingCaptions | None = None,
    with_meteor: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Score the captions of one or two systems; see `evaluate`.

    Parameters
    ----------
    references
        What they are scored against.
    systems
        Where each came from, and its caption of each image of the references, in their order.
    training, with_meteor, seed
        As for `evaluate`.
    """
    tokens = [
        {image_id: tokenize(caption, references.tokenizer) for image_id, caption in captions.items()}
        for _, captions in systems
    ]
    scores = [score_tokens(references.tokens, one) for one in tokens]
    names = list(scores[0])
    values = resample([one[name] for one in scores for name in names], seed=seed)
    values = values.reshape(len(values), len(scores), len(names))
    if with_meteor:
        scores = [one | {"METEOR": meteor(references.tokens, some)} for one, some in zip(scores, tokens, strict=True)]
    comparisons = {}
    if len(scores) == 2:
        first, second = scores
        comparisons = {
            name: Comparison(first[name].corpus - second[name].corpus, *interval(values[:, 0, n] - values[:, 1, n]))
            for n, name in enumerate(names)
        }
    known = None if training is None else training.tokens
    return Evaluation(
        references,
        training,
        [
            System(
                path=path,
                captions=captions,
                scores=scores[index],
                intervals={name: interval(values[:, index, n]) for n, name in enumerate(names)},
                diversity=diversity([*tokens[index].values()], known),
                empty=[image_id for image_id, caption in tokens[index].items() if not caption],
            )
            for index, (path, captions) in enumerate(systems)
        ],
        comparisons,
        diversity([captions[0] for captions in references.tokens.values()], known),
        DocumentFrequencies.from_references(references.tokens).fingerprint,
        seed,
    )


def match(results: Sequence[Result], references: ReferenceCaptions, path: Path) -> dict[ImageId, str]:
    """Return the caption of each image of the references, in their order.

    A result belongs to the image whose id it gives, be it as a number or as text. Else it belongs to the image whose
    file it names, if that is one only: of the two paths the shorter must be the end of the longer, where folders that
    all images of the references share do not count.

    Raises
    ------
    InputError
        If an image has several results, none, or no references. All such images are counted.
    """
    ids: dict[str, ImageId] = {str(image_id): image_id for image_id in references.records}
    shared = os.path.commonpath([record.path.parent for record in references.records.values()])
    files: dict[str, list[tuple[ImageId, tuple[str, ...]]]] = defaultdict(list)
    for image_id, record in references.records.items():
        files[record.path.name].append((image_id, record.path.relative_to(shared).parts))

    def find(image: str | int) -> ImageId | None:
        if str(image) in ids:
            return ids[str(image)]
        parts = PurePosixPath(str(image).replace("\\", "/")).parts
        named = [image_id for image_id, others in files.get(parts[-1] if parts else "", ()) if _agree(parts, others)]
        return named[0] if len(named) == 1 else None

    found = [find(result.image) for result in results]
    captions = {image_id: result.caption for result, image_id in zip(results, found, strict=True)}
    of = str(references.path) if references.split is None else f"the split {references.split} of {references.path}"
    faults = [
        (f"captions what is no image with a reference in {of}", [
            result.image for result, image_id in zip(results, found, strict=True) if image_id is None
        ]),
        ("captions more than once", [one for one, times in Counter(found).items() if times > 1 and one is not None]),
        (f"does not caption, of {of},", [image_id for image_id in references.records if image_id not in captions]),
    ]  # fmt: skip
    if any(images for _, images in faults):
        said = "; ".join(f"it {what} {listed(images)}" for what, images in faults if images)
        raise InputError(f"{path} does not fit the references: {said}. Give each image of the references one caption.")
    return {image_id: captions[image_id] for image_id in references.records}


def _agree(parts: Sequence[str], others: Sequence[str]) -> bool:
    shorter = min(len(parts), len(others))
    return tuple(parts[-shorter:]) == tuple(others[-shorter:])


def listed(ids: Sequence[object]) -> str:
    """Return how many ids there are, and the first of them."""
    names = [str(one) if str(one).isprintable() else repr(one) for one in ids[:20]]
    more = f" and {len(ids) - len(names)} more" if len(ids) > len(names) else ""
    return f"{len(ids)} image{'s' * (len(ids) != 1)} ({', '.join(names)}{more})"
