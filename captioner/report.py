"""An evaluation as tables to read, as JSON to keep, and image by image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioner import __version__
from captioner.evaluation import FEWEST_TO_COMPARE, Evaluation, System, listed
from captioner.metrics.bootstrap import RESAMPLES, Interval
from captioner.tokens import TOKENIZERS

DOCUMENT_FREQUENCIES = "those of these references, in every sample"


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence for what was scored although it is odd, and for what was not scored."""
    references = evaluation.references
    if references.without:
        yield f"{references.path} has no reference of {listed(references.without)}, not scored."
    wordless = [image_id for image_id, captions in references.tokens.items() if not any(captions)]
    if wordless:
        yield f"{references.path} has references without a word of {listed(wordless)}, scored as they are."
    for system in evaluation.systems:
        if system.empty:
            yield f"{system.path} has captions without a word of {listed(system.empty)}, scored as they are."
    if evaluation.training is not None:
        seen = [image_id for image_id in references.records if image_id in evaluation.training.images]
        if seen:
            yield f"{evaluation.training.path} trains on images that are scored: {listed(seen)}."
    if len(references.records) == 1:
        yield "CIDEr-D of one image alone is 0, since every word is in all images."
    elif evaluation.comparisons and len(references.records) < FEWEST_TO_COMPARE:
        images = len(references.records)
        yield f"{images} images are too few to tell two systems apart: give {FEWEST_TO_COMPARE} or more."


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures for a JSON file. Scores are in COCO's units (a BLEU-4 of 0.3, not 30).

    The scores and counts of a second system stand under "other", the differences under "difference".
    """
    references, training = evaluation.references, evaluation.training
    first, *others = map(_system, evaluation.systems)
    report: dict[str, Any] = {
        **first,
        "images": len(references.records),
        "references": sum(map(len, references.tokens.values())),
        "references_path": str(references.path),
        "split": references.split,
        "train": None if training is None else str(training.path),
        "without_references": references.without,
        "reference_diversity": evaluation.human._asdict(),
        "tokenizer": TOKENIZERS[references.tokenizer],
        "document_frequencies": DOCUMENT_FREQUENCIES,
        "document_frequencies_fingerprint": evaluation.fingerprint,
        "resamples": RESAMPLES,
        "seed": evaluation.seed,
        "captioner": __version__,
    }
    for other in others:
        report["other"] = other
        report["difference"] = {
            name: {**comparison._asdict(), "distinguishable": evaluation.verdicts[name]}
            for name, comparison in evaluation.comparisons.items()
        }
    return report


def _system(system: System) -> dict[str, Any]:
    return {
        **{name: score.corpus for name, score in system.scores.items()},
        "intervals": {name: list(one) for name, one in system.intervals.items()},
        "results": str(system.path),
        "empty": system.empty,
        "diversity": system.diversity._asdict(),
    }


def per_image(evaluation: Evaluation) -> Iterator[str]:
    """Yield a JSON line for each image of each system: its id, its caption and its scores, in COCO's units."""
    for system in evaluation.systems:
        for row, (image_id, caption) in enumerate(system.captions.items()):
            scores = {name: float(score.per_image[row]) for name, score in system.scores.items()}
            record = {"results": str(system.path), "image_id": image_id, "caption": caption, **scores}
            yield json.dumps(record, ensure_ascii=False) + "\n"


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the scores and what they hide as one table, and all that one must know to compare them."""
    references = evaluation.references
    console.print(_table(evaluation))
    count = sum(map(len, references.tokens.values()))
    lines = [
        f"{len(references.records):,} images, {count:,} references; every image counts once.",
        f"Scores are times 100, with [95 % intervals] from {RESAMPLES:,} bootstrap samples of the images "
        f"(seed {evaluation.seed}).",
    ]
    if evaluation.comparisons:
        lines.append("Two systems differ where the interval of their difference leaves out 0, each score by itself.")
    lines += [
        "Distinct captions, distinct tokens in them, tokens a caption; captions that break off (on a, with the)"
        + (", and that are no training caption." if evaluation.training else "."),
    ]
    lines += [
        f"Tokens: {TOKENIZERS[references.tokenizer]}.",
        f"Document frequencies of CIDEr-D: {DOCUMENT_FREQUENCIES}.",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _table(evaluation: Evaluation) -> Table:
    systems, human = evaluation.systems, evaluation.human
    table = Table("", box=SIMPLE_HEAD)
    headers = [system.path.name for system in systems]
    if len(set(headers)) < len(headers):
        headers = [str(system.path) for system in systems]
    if len(systems) == 2:
        headers = [f"first: {headers[0]}", f"second: {headers[1]}", "first - second", "differ"]
    for header in [*headers, "people"]:
        table.add_column(escape(header), justify="right", overflow="fold")

    for name in systems[0].scores:
        row = [_with_interval(system.scores[name].corpus, system.intervals.get(name)) for system in systems]
        if comparison := evaluation.comparisons.get(name):
            row.append(_with_interval(comparison.difference, Interval(comparison.low, comparison.high), "+.2f"))
            row.append({True: "yes", False: "no", None: ""}[evaluation.verdicts[name]])
        table.add_row(name, *row)
    table.add_section()
    # Beside the systems' figures those of people, for whom there is no score here and nothing to compare.
    columns = [*(system.diversity for system in systems), *([None, None] if len(systems) == 2 else []), human]
    for title, figure, form in [
        ("distinct", "distinct", ",d"),
        ("vocabulary", "vocabulary", ",d"),
        ("mean length", "mean_length", ".1f"),
        ("bad endings", "bad_endings", ".1%"),
        ("new", "new", ".1%"),
    ]:
        if getattr(human, figure) is not None:
            table.add_row(title, *("" if one is None else format(getattr(one, figure), form) for one in columns))
    return table


def _with_interval(value: float, interval: Interval | None, form: str = ".1f") -> str:
    # Without a space in it, at which a narrow terminal would tear it apart.
    between = "" if interval is None else f" [{100 * interval.low:{form}},{100 * interval.high:{form}}]"
    return escape(f"{100 * value:{form}}{between}")
