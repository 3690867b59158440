"""Results of any system against references: scores with intervals, two systems compared, and what scores hide."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

from captioner.annotation_files import CaptionedImage, open_captions
from captioner.errors import InputError
from captioner.metrics import (
    Comparison,
    Diversity,
    Interval,
    Score,
    bootstrap,
    diversity,
    meteor,
    paired_bootstrap,
    ptb_tokenize,
    score_tokens,
)
from captioner.metrics.bootstrap import RESAMPLES
from captioner.results import Result, read_results

TOKENIZER = "Penn Treebank as COCO's evaluation: lower case, without punctuation"
DOCUMENT_FREQUENCIES = "of these references"

ImageId = str | int


class References(NamedTuple):
    """What results are scored against.

    Attributes
    ----------
    path : Path
        Where the references came from.
    records : dict
        The captioned images by their id.
    tokens : dict
        For each of these images the tokens of its references.
    without : list
        The ids of images that the file lists without any reference. They are not scored.
    """

    path: Path
    records: dict[ImageId, CaptionedImage]
    tokens: dict[ImageId, list[list[str]]]
    without: list[ImageId]

    @classmethod
    def read(cls, path: Path, split: str | None = None) -> References:
        """Read a dataset's folder or caption file, see `open_captions` and `CaptionFiles.records`.

        Raises
        ------
        InputError
            If the file cannot be read, or no image in it has a reference.
        """
        records = {record.image_id: record for record in open_captions(path).records(split)}
        captioned = {image_id: record for image_id, record in records.items() if record.captions}
        if not captioned:
            raise InputError(f"{path} has no reference: give a file of captions.")
        tokens = {
            image_id: [ptb_tokenize(caption) for caption in record.captions] for image_id, record in captioned.items()
        }
        return cls(path, captioned, tokens, [image_id for image_id in records if image_id not in captioned])


class Evaluation(NamedTuple):
    """A system's results, scored.

    Attributes
    ----------
    path : Path
        The file of results.
    captions : dict
        The caption of each image.
    scores : dict
        The scores under "BLEU-1" to "BLEU-4", "ROUGE-L", "CIDEr-D" and, where asked for, "METEOR".
    diversity : Diversity
        What the scores hide.
    empty : list
        The ids of images whose caption has no token. It is scored as it is.
    """

    path: Path
    captions: dict[ImageId, str]
    scores: dict[str, Score]
    diversity: Diversity
    empty: list[ImageId]


def evaluate(
    references: References,
    path: Path,
    *,
    training: Sequence[Sequence[str]] | None = None,
    with_meteor: bool = False,
) -> Evaluation:
    """Score a file of results.

    Parameters
    ----------
    references
        What it is scored against.
    path
        The results, see `read_results`.
    training
        The tokens of each training caption.
    with_meteor
        Whether to compute METEOR too, which takes Java and time.

    Raises
    ------
    InputError
        If the file cannot be read, or if it captions an image twice, one without references, or not all that have some:
        a score over a part of the images compares with nothing.
    """
    captions = match(read_results(path), references, path)
    tokens = {image_id: ptb_tokenize(caption) for image_id, caption in captions.items()}
    scores = score_tokens(references.tokens, tokens)
    if with_meteor:
        scores["METEOR"] = meteor(references.tokens, tokens)
    return Evaluation(
        path,
        captions,
        scores,
        diversity([*tokens.values()], training),
        [image_id for image_id, caption in tokens.items() if not caption],
    )


def match(results: Sequence[Result], references: References, path: Path) -> dict[ImageId, str]:
    """Return the caption of each image of the references, in their order.

    A result belongs to the image whose id it names, be it as a number or as text, or else whose file name it ends with,
    if no other image has that name.

    Raises
    ------
    InputError
        If an image has several results, none, or no references.
    """
    names = Counter(record.path.name for record in references.records.values())
    named: dict[str, ImageId] = {str(image_id): image_id for image_id in references.records}
    for image_id, record in references.records.items():
        if names[record.path.name] == 1:  # two folders may each have their own 1.jpg
            named.setdefault(record.path.name, image_id)
    ids = [named.get(str(result.image), named.get(Path(str(result.image)).name)) for result in results]

    unknown = [result.image for result, image_id in zip(results, ids, strict=True) if image_id is None]
    if unknown:
        raise InputError(
            f"{path} captions {len(unknown)} of its {len(results)} images for which {references.path} has no reference "
            f"({listed(unknown)}): leave them out, or give their references."
        )
    doubled = [image_id for image_id, times in Counter(ids).items() if times > 1]
    if doubled:
        raise InputError(f"{path} captions {len(doubled)} images more than once ({listed(doubled)}): keep one caption.")
    captions = {image_id: result.caption for result, image_id in zip(results, ids, strict=True)}
    missing = [image_id for image_id in references.records if image_id not in captions]
    if missing:
        raise InputError(
            f"{path} has no caption for {len(missing)} of the {len(references.records)} images with references "
            f"({listed(missing)}): caption them too, or score another split (--split)."
        )
    return {image_id: captions[image_id] for image_id in references.records}


def read_training(path: Path) -> list[list[str]]:
    """Return the tokens of each training caption of a dataset's folder, or of each caption of a file.

    Raises
    ------
    InputError
        If there are none that can be read.
    """
    files = open_captions(path)
    records = files.records("train" if path.is_dir() else None)
    return [ptb_tokenize(caption) for record in records for caption in record.captions]


def remarks(references: References, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Yield a sentence for what was scored although it is odd, and for what was not scored."""
    if references.without:
        yield (
            f"{references.path} lists {len(references.without)} images without any reference "
            f"({listed(references.without)}); they are not scored."
        )
    for evaluation in evaluations:
        if evaluation.empty:
            yield (
                f"{evaluation.path} has {len(evaluation.empty)} captions without a word ({listed(evaluation.empty)}); "
                "they are scored as they are."
            )


def listed(ids: Sequence[object]) -> str:
    """Return the first ids, and how many more there are."""
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more


def intervals(evaluation: Evaluation, seed: int) -> dict[str, Interval]:
    """Return the 95 % interval of each score that has one."""
    return {name: bootstrap(score, seed=seed) for name, score in evaluation.scores.items() if score.over}


def compare(first: Evaluation, second: Evaluation, *, seed: int) -> dict[str, Comparison]:
    """Return by how much the first system is ahead of the second, for each score that can be resampled."""
    return {
        name: paired_bootstrap(score, second.scores[name], seed=seed)
        for name, score in first.scores.items()
        if score.over
    }


def human(references: References, training: Sequence[Sequence[str]] | None) -> Diversity:
    """Describe the first reference of each image, as a measure for the captions."""
    return diversity([captions[0] for captions in references.tokens.values()], training)


def as_json(
    references: References, evaluations: Sequence[Evaluation], training: Sequence[Sequence[str]] | None, seed: int
) -> dict[str, Any]:
    """Return everything that `show` prints, for a JSON file. Scores are in COCO's units (a BLEU-4 of 0.3, not 30).

    The scores and counts of a second system stand under "other", the differences under "difference".
    """
    first, *others = (_system(evaluation, seed) for evaluation in evaluations)
    report: dict[str, Any] = {
        **first,
        "images": len(references.records),
        "references": sum(map(len, references.tokens.values())),
        "without_references": references.without,
        "reference_diversity": human(references, training)._asdict(),
        "tokenizer": TOKENIZER,
        "document_frequencies": DOCUMENT_FREQUENCIES,
        "resamples": RESAMPLES,
        "seed": seed,
    }
    for other in others:
        report["other"] = other
        report["difference"] = {
            name: {**comparison._asdict(), "distinguishable": comparison.distinguishable}
            for name, comparison in compare(evaluations[0], evaluations[1], seed=seed).items()
        }
    return report


def _system(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    return {
        **{name: score.corpus for name, score in evaluation.scores.items()},
        "intervals": {name: list(interval) for name, interval in intervals(evaluation, seed).items()},
        "results": str(evaluation.path),
        "empty": evaluation.empty,
        "diversity": evaluation.diversity._asdict(),
    }


def per_image(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Yield a JSON line for each image of each system: its id, its caption and its scores, in COCO's units."""
    for evaluation in evaluations:
        for row, (image_id, caption) in enumerate(evaluation.captions.items()):
            scores = {name: float(score.per_image[row]) for name, score in evaluation.scores.items()}
            record = {"results": str(evaluation.path), "image_id": image_id, "caption": caption, **scores}
            yield json.dumps(record, ensure_ascii=False) + "\n"


def show(
    references: References,
    evaluations: Sequence[Evaluation],
    training: Sequence[Sequence[str]] | None,
    seed: int,
    console: Console,
) -> None:
    """Print the scores and what they hide as tables, and all that one must know to compare them."""
    names = [evaluation.path.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        names = [str(evaluation.path) for evaluation in evaluations]
    count = sum(map(len, references.tokens.values()))
    differ = ["Two systems differ where the interval of their difference, on the same samples, leaves out 0."]
    if len(evaluations) == 1:
        differ = []
    console.print(
        Group(
            _scores(names, evaluations, seed),
            _hidden(names, [evaluation.diversity for evaluation in evaluations], human(references, training)),
            f"{len(references.records):,} images, {count:,} references; every image counts once. Scores are times 100, "
            f"[with their 95 % intervals] ({RESAMPLES:,} bootstrap samples of the images, seed {seed}).",
            *differ,
            f"Tokens: {TOKENIZER}. Document frequencies of CIDEr-D: {DOCUMENT_FREQUENCIES}.",
        ),
        highlight=False,
        markup=False,
    )


def _scores(names: Sequence[str], evaluations: Sequence[Evaluation], seed: int) -> Table:
    table = Table("", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="right")
    if len(evaluations) == 2:
        table.add_column("difference", justify="right")
        table.add_column("differ")
    between = [intervals(evaluation, seed) for evaluation in evaluations]
    comparisons = compare(evaluations[0], evaluations[1], seed=seed) if len(evaluations) == 2 else {}
    for name in evaluations[0].scores:
        row = [name]
        for evaluation, interval in zip(evaluations, between, strict=True):
            row.append(_with_interval(evaluation.scores[name].corpus, interval.get(name)))
        if comparison := comparisons.get(name):
            row.append(_with_interval(comparison.difference, Interval(comparison.low, comparison.high), sign="+"))
            row.append("yes" if comparison.distinguishable else "no")
        table.add_row(*row)
    return table


def _hidden(names: Sequence[str], systems: Sequence[Diversity], references: Diversity) -> Table:
    table = Table("", box=SIMPLE_HEAD)
    for name in (*names, "first references"):
        table.add_column(name, justify="right")
    columns = [*systems, references]
    table.add_row("distinct captions", *(f"{one.distinct:,} of {one.captions:,}" for one in columns))
    table.add_row("vocabulary used", *(f"{one.vocabulary:,}" for one in columns))
    table.add_row("mean length in tokens", *(f"{one.mean_length:.1f}" for one in columns))
    table.add_row('bad endings ("on a", "with the")', *(f"{one.bad_endings:.1%}" for one in columns))
    if references.new is not None:
        table.add_row("not among the training captions", *(f"{one.new:.1%}" for one in columns))
    return table


def _with_interval(value: float, interval: Interval | None, sign: str = "-") -> str:
    between = "" if interval is None else f" [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
    return f"{100 * value:{sign}.1f}{between}"
