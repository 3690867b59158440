"""The demo: the whole job on built-in scenes, which say by themselves whether a caption is right.

It runs the commands that a user would run, on data that it draws: `captioner fit` with `configs/scenes.yaml`, then the
best checkpoint on two held-out splits, with and without colour-shape pairs that training never showed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from captioner.annotation_files import COCOCaptions
from captioner.errors import InputError
from captioner.grammar import Mention
from captioner.images import read_image
from captioner.metrics import score_captions
from captioner.model import Caption, Captioner
from captioner.overlay import draw_overlay
from captioner.precision import faster_precision
from captioner.scenes import UNSEEN_PAIRS, Scene, judge, pointing, read_scenes, write_scenes
from captioner.tokens import TOKENIZERS, choose_tokenizer
from captioner.training import check_files, train

SIZES = {"train": 8000, "val": 200, "seen": 500, "unseen": 500}
BEAM_SIZE = 5
SHUFFLES = 5  # other scenes that each caption is held against
OVERLAYS = 6  # of each test split


class SceneScores(NamedTuple):
    """What a captioner reached on scenes; shares and scores between 0 and 1, CIDEr-D in COCO's units.

    Attributes
    ----------
    bleu4, cider_d : float
        Against the scenes' own five captions.
    right : float
        Share of captions in which all that is said is true of the scene, and at least two objects and one relation are
        named.
    right_shuffled : float
        The same captions held against other scenes: what saying likely things would reach.
    new_pair_named : float
        Share of captions that name a colour-shape pair which training never showed.
    new_pair_right : float
        Share of those that are right: a caption of a scene with a new pair may avoid it.
    pointing : float or None
        Share of colour and shape words whose strongest region overlaps the box of the object that they speak of; a word
        for an object that is not there counts as a miss. None where there is no attention.
    pointing_uniform : float or None
        What a uniform map reaches on the same words, by chance.
    """

    bleu4: float
    cider_d: float
    right: float
    right_shuffled: float
    new_pair_named: float
    new_pair_right: float
    pointing: float | None
    pointing_uniform: float | None


def score_scenes(
    captions: Sequence[Caption], scenes: Sequence[Scene], references: Sequence[Sequence[str]], language: str = "en"
) -> SceneScores:
    """Score captions of scenes by the references and by the scenes themselves.

    Parameters
    ----------
    captions, scenes, references
        In the same order; each scene has several references.
    language
        The captions'.
    """
    tokenizer = choose_tokenizer(chain.from_iterable(references))
    texts = {k: caption.text for k, caption in enumerate(captions)}
    scores = score_captions(dict(enumerate(references)), texts, tokenizer)
    judgements = [judge(caption.words, scene, language) for caption, scene in zip(captions, scenes, strict=True)]
    shuffled = [
        judge(caption.words, scene, language).right
        for distance in range(1, min(SHUFFLES, len(scenes) - 1) + 1)
        for caption, scene in zip(captions, [*scenes[distance:], *scenes[:distance]], strict=True)
    ]
    new = [judgement for judgement in judgements if any(_is_new(mention) for mention in judgement.mentions)]
    pointings = []
    for caption, judgement, scene in zip(captions, judgements, scenes, strict=True):
        if caption.attention is not None and caption.grid is not None:
            pointings += pointing(judgement, caption.attention.numpy(), caption.grid, scene, language)
    return SceneScores(
        bleu4=scores["BLEU-4"].corpus,
        cider_d=scores["CIDEr-D"].corpus,
        right=float(np.mean([judgement.right for judgement in judgements])),
        right_shuffled=float(np.mean(shuffled)) if shuffled else 0.0,
        new_pair_named=len(new) / len(judgements),
        new_pair_right=float(np.mean([judgement.right for judgement in new])) if new else 0.0,
        pointing=float(np.mean([point.hit for point in pointings])) if pointings else None,
        pointing_uniform=float(np.mean([point.chance for point in pointings])) if pointings else None,
    )


def run(output: Path, seed: int, started: float, configs: Sequence[Path] = (), language: str = "en") -> None:
    """Draw scenes, train, score, caption and overlay, all under one folder.

    Parameters
    ----------
    output : Path
        Where everything goes; made if it does not exist.
    seed : int
        Of scenes and training.
    started : float
        When the command began, by `time.monotonic`.
    configs : sequence of Path
        YAML files laid over the recipe, in this order: another decoder, another bridge.
    language : str
        The captions': "en" or "ko".

    Raises
    ------
    InputError
        Where the folder holds something that is not the demo's, or a configuration is none.
    """
    console = Console()
    arguments = ["fit"]
    for config in (recipe("scenes.yaml"), *configs):
        arguments += ["--config", str(config)]
    check_files(arguments)
    _claim(output)
    scenes = output / "scenes"
    with Progress(console=console) as progress:
        bar = progress.add_task("Drawing scenes", total=sum(SIZES.values()))
        shown = partial(progress.update, bar)
        write_scenes(scenes, SIZES, seed, progress=lambda number: shown(completed=number), language=language)

    arguments += ["--data.files.root", str(scenes)]
    arguments += ["--trainer.default_root_dir", str(output / "runs"), "--seed_everything", str(seed)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16-mixed" if faster_precision(device) == torch.bfloat16 else "32-true"
    arguments += ["--trainer.precision", precision]
    console.print(f"captioner {' '.join(arguments)}", highlight=False, soft_wrap=True)
    cli = train(arguments)
    checkpoint = Path(cli.trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    model = Captioner.from_checkpoint(checkpoint)

    results: dict[str, object] = {}
    overlays = output / "overlays"
    overlays.mkdir(exist_ok=True)
    for split in ("seen", "unseen"):
        records = COCOCaptions(scenes, "captions_{split}.json", "{split}", (split,)).read(split)
        truths = read_scenes(scenes, split)
        captions = model.caption([record.path for record in records], beam_size=BEAM_SIZE)
        reached = score_scenes(
            captions,
            [truths[int(record.image_id)] for record in records],
            [record.captions for record in records],
            language,
        )
        results[split] = {**reached._asdict(), "images": len(records)}
        console.print(f"\n{split}: {'with' if split == 'unseen' else 'without'} a colour-shape pair new to the model")
        for record, caption in list(zip(records, captions, strict=True))[:OVERLAYS]:
            picture = overlays / f"{split}-{record.path.stem}.png"
            if caption.attention is not None and caption.grid is not None:
                draw_overlay(read_image(record.path), caption, model.preprocessing).save(picture)
            console.print(f"  {record.path.name}  {caption.text}", highlight=False, soft_wrap=True)
    results |= {"seed": seed, "beam_size": BEAM_SIZE, "precision": precision, "configs": list(map(str, configs))}
    tokenizer = choose_tokenizer(chain.from_iterable(record.captions for record in records))
    results |= {"language": language, "tokenizer": TOKENIZERS[tokenizer]}
    results["seconds"] = round(time.monotonic() - started, 1)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _print(console, results)
    console.print(
        f"Tokens       {TOKENIZERS[tokenizer]}\nScores       {output / 'results.json'}\n"
        f"Overlays     {overlays}\nScenes       {scenes}\nCheckpoint   {checkpoint}\n\n"
        "Caption an image of your own making:\n"
        f"  captioner caption {scenes / 'seen'} --checkpoint {checkpoint} --overlay my-overlays",
        highlight=False,
        soft_wrap=True,
    )


def _is_new(mention: Mention) -> bool:
    return (mention.colour, mention.shape) in UNSEEN_PAIRS


def recipe(name: str) -> Path:
    """Return the path of a recipe: in the installed package, or in the checkout that it is imported from."""
    package = Path(__file__).parent
    installed = package / "configs" / name
    return installed if installed.is_file() else package.parent / "configs" / name


def _claim(output: Path) -> None:
    """Make the folder, and refuse one that holds other people's things."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give --output the name of a folder.")
    ours = {"scenes", "runs", "overlays", "results.json"}
    if output.is_dir() and not {path.name for path in output.iterdir()} <= ours:
        raise InputError(f"The folder {output} holds something else already: give --output an empty or a new one.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {output} cannot be made ({error.strerror}): give another --output.") from error


def _print(console: Console, results: dict[str, object]) -> None:
    table = Table(title=f"Test scenes, beam {BEAM_SIZE}, seed {results['seed']}, {results['seconds']} s in all")
    table.add_column("")
    for split in ("seen", "unseen"):
        table.add_column(split, justify="right")
    for name in ("images", *SceneScores._fields):
        values = [results[split][name] for split in ("seen", "unseen")]  # type: ignore[index]
        table.add_row(name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
