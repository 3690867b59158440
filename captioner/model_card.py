"""The model card beside a checkpoint: what the model is, how it was trained, how good it is, what its limits are."""

from __future__ import annotations

import html
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from captioner import __version__
from captioner.attention_health import Health
from captioner.checkpoint_files import replacing
from captioner.datamodule import CaptionData
from captioner.encoders import ForeignEncoder
from captioner.errors import in_one_line
from captioner.metrics import diversity, interval, resample
from captioner.metrics.bootstrap import RESAMPLES
from captioner.model import Captioner, describe
from captioner.task import CaptioningTask
from captioner.tokens import TOKENIZERS, tokenize

UNKNOWN = {"words": "a word", "characters": "a character", "byte_pairs": "a pair of bytes"}


def write_card(checkpoint: Path, task: CaptioningTask, seconds: float) -> Path:
    """Write a checkpoint's model card beside it, whole or not at all, and return its path.

    Parameters
    ----------
    checkpoint : Path
        The file that was written.
    task : CaptioningTask
        In training, with what its last validation gave.
    seconds : float
        How long it has been trained, validation included.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    path = checkpoint.with_suffix(".md")
    with replacing(path) as file:
        file.write(model_card(checkpoint.name, task, seconds).encode(errors="backslashreplace"))
    return path


def model_card(name: str, task: CaptioningTask, seconds: float) -> str:
    """Return the model card, as Markdown, of the checkpoint of that name; see :func:`write_card`."""
    sections = {
        "Model": _table(_model(task.captioner)),
        "Data": _data(task.data),
        "Recipe": _table(_recipe(task, seconds)),
        "Scores": _scores(task),
        "Limits": _limits(task),
        "Use": _use(name, task.captioner),
    }
    head = (
        f"# {name}\n\nAn image captioner: an encoder turns an image into annotation vectors, one per region, from "
        f"which a decoder writes a caption word by word. Written by captioner {__version__} with torch "
        f"{torch.__version__}.\n"
    )
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def _model(captioner: Captioner) -> Iterator[tuple[str, str]]:
    encoder, decoder = captioner.encoder, describe(captioner.decoder)
    kind = encoder.module_name if isinstance(encoder, ForeignEncoder) else type(encoder).__name__
    learns = f"learns from {encoder.learns} on" if isinstance(encoder.learns, str) else "frozen"
    if encoder.learns is True:
        learns = "learns"
    unsaid = ("preprocessing", "learns", "recompute")
    settings = {name: value for name, value in describe(encoder).items() if name not in unsaid}
    if settings.get("weights"):
        settings["weights"] = Path(settings["weights"]).name
    preprocessing = encoder.preprocessing
    yield (
        "encoder",
        f"{_in_words({**settings, 'class': kind})}; {learns}; images of {preprocessing.size} x {preprocessing.size} "
        f"pixels ({preprocessing.fit}); annotation vectors of {encoder.annotation_dim:,} values",
    )
    yield "bridge", _in_words(describe(captioner.bridge))
    attention = decoder.pop("attention", None)
    yield "attention", "the decoder's own" if attention is None else _in_words(attention)
    yield "decoder", _in_words(decoder)
    tied = ", and the output layer has the same matrix" if captioner.tie_weights else ""
    yield "embedding", f"{captioner.embedding_dim} values a word{tied}; dropout {captioner.dropout}"
    yield "vocabulary", str(captioner.vocabulary)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in captioner.parameters()]
    learnt = sum(size for size, learns in sizes if learns)
    yield "parameters", f"{sum(size for size, _ in sizes):,}, of which {learnt:,} learn"


def _data(data: CaptionData) -> str:
    root = getattr(data.files, "root", None)  # the user's own kind of files need not have one
    place = "" if root is None else f", folder `{in_one_line(Path(root).resolve().name).replace('`', chr(39))}`"
    rows = [
        (data.splits[name], purpose, f"{len(data.records[name]):,}", f"{_captions(data, name):,}")
        for name, purpose in (("train", "training"), ("val", "validation"))
    ]
    said = data.units.replace("_", " ")
    notes = [
        f"Training captions are cut after {data.longest} {said}; {UNKNOWN[data.units]} that they hold fewer than "
        f"{data.minimum_count} times is {'not joined' if data.units == 'byte_pairs' else 'unknown'}."
    ]
    if data.flip:
        notes.append("Each image is mirrored half of the time, with left and right exchanged in its captions.")
    if data.crop < 1:
        notes.append(f"Random parts of the images are shown, of at least {data.crop:g} of their area.")
    table = _table(rows, ("split", "for", "images", "captions"))
    return f"{data.files.format}{place}:\n\n{table}\n\n{' '.join(notes)}"


def _captions(data: CaptionData, name: str) -> int:
    return sum(len(record.captions) for record in data.records[name])


def _recipe(task: CaptioningTask, seconds: float) -> Iterator[tuple[str, str]]:
    trainer, data = task.trainer, task.data
    objective = task.objective
    settings = {name: getattr(objective, name, None) for name in inspect.signature(type(objective)).parameters}
    yield "objective", _in_words({"class": type(objective).__name__, **settings})
    if task.word_presence > 0:
        yield "word presence", f"{task.word_presence:g}"
    yield (
        "learning rate",
        f"{task.learning_rate:g} at most, AdamW with weight decay {task.weight_decay:g}; it rises over a "
        f"share of {task.warmup:g} of the steps and falls along a cosine",
    )
    if task.encoder_learning_rate is not None:
        yield "the encoder's", f"{task.encoder_learning_rate:g} at most"
    limit = trainer.max_epochs
    most = "" if limit is None or limit < 0 else f" of at most {limit}"
    yield "epochs", f"{trainer.current_epoch + 1}{most}, {trainer.global_step:,} steps"
    accumulated = trainer.accumulate_grad_batches
    more = f", {accumulated} batches a step" if accumulated > 1 else ""
    more += f", in each of {trainer.world_size} processes" if trainer.world_size > 1 else ""
    yield "batch size", f"{data.batch_size} images with up to {data.captions_per_image} captions each{more}"
    if trainer.gradient_clip_val:
        yield "gradients", f"clipped at {trainer.gradient_clip_val:g}"
    yield "precision", str(trainer.precision)
    yield "seed", os.environ.get("PL_GLOBAL_SEED", "none")  # where Lightning keeps it
    if task.initial_weights is not None:
        given = Path(task.initial_weights)
        yield "initial weights", given.name if given.is_absolute() else given.as_posix()
    yield "training time so far", f"{timedelta(seconds=round(seconds))} (h:mm:ss), validation included"


def _scores(task: CaptioningTask) -> str:
    if not task.scored:
        return "Not scored yet."
    split, monitor = task.data.splits["val"], getattr(task.trainer.checkpoint_callback, "monitor", None) or ""
    chosen = ""
    if monitor.startswith("val/"):
        chosen = f" The checkpoint was chosen among those of its run by {monitor.removeprefix('val/')} on these images."
    rows = []
    values = resample(list(task.scored.values()))  # the same draws for all, which takes half the time
    for index, (name, score) in enumerate(task.scored.items()):
        low, high = interval(values[:, index])
        rows.append((name, f"{100 * score.corpus:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"))
    attention = "" if task.health is None else f"\n\n{_attention(task.health)}"
    found = diversity([tokenize(caption, task.scored_by) for caption in task.captions.values()])
    return (
        f"Validation split `{split}`: {len(task.captions):,} images, decoded greedily, against their raw references; "
        f"times 100, with 95 % intervals from {RESAMPLES:,} bootstrap samples of the images.{chosen}\n\n"
        f"{_table(rows, ('', 'score', '95 % interval'))}\n\n"
        f"{found.distinct:,} of the {found.captions:,} captions differ. They use {found.vocabulary:,} words in all and "
        f"{found.mean_length:.1f} on average; {100 * found.bad_endings:.1f} % break off (on a, with the).{attention}"
    )


def _attention(health: Health) -> str:
    pointing = ""
    if health.pointing is not None:
        pointing = (
            f" For {100 * health.pointing:.1f} % of the words that speak of an object whose place is known the "
            f"strongest region overlaps it, by chance for {100 * (health.pointing_uniform or 0):.1f} %."
        )
    return (
        f"Attention, over the {health.content_words:,} content words of these captions: the entropy of its weights is "
        f"{health.entropy:.2f} of that of uniform ones, which would take {health.uniform_loss:.2f} from a word's "
        f"log-probability.{pointing}"
    )


def _limits(task: CaptioningTask) -> str:
    said = task.captioner.vocabulary
    tokens = (
        "cut into tokens by rules for English"
        if task.scored_by == "ptb"
        else f"cut into tokens in a way of its own ({TOKENIZERS[task.scored_by]})"
    )
    limits = (
        f"It writes in the language and the style of its training captions, with their {said} and no others.",
        "Nothing is known of images of other sources than those above, nor was anything measured for some people, "
        "places or things apart.",
        f"The scores compare captions with people's by their words, {tokens}. They do not say whether a caption is "
        "true. A wrong caption reads as sure as a right one.",
        "What it says of people in photographs, such as their sex, age or doing, repeats how annotators guessed from "
        "looks: it says nothing of who somebody is.",
    )
    return "\n".join(f"- {limit}" for limit in limits)


def _use(name: str, captioner: Captioner) -> str:
    encoder = captioner.encoder
    command = f"captioner caption photos/ --checkpoint {name}"
    if not isinstance(encoder, ForeignEncoder):
        return f"```sh\n{command}\n```"
    return (
        f"```sh\n{command} --encoder {encoder.module_name}\n```\n\n"
        "The encoder's code is not in the file: the class must be on the Python path."
    )


def _in_words(settings: Mapping[str, Any]) -> str:
    """Return a part's settings for people, such as "LSTMDecoder: hidden_dim 512, gate true"."""
    said = [
        f"{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
        if name != "class" and isinstance(value, str | int | float)
    ]
    return f"{settings['class']}: {', '.join(said)}" if said else str(settings["class"])


def _table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ("", "")) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    """Return a text, such as a folder's name, as a cell of a table, in which no markup of its own is heeded."""
    return html.escape(in_one_line(text), quote=False).replace("|", "\\|")
