"""The built-in data set: drawn scenes, captions of them, and the true place of every word.

A scene is two to four coloured shapes on a textured background. Since we drew it, we know what no photograph tells:
whether a caption is *right*, and which part of the image each of its words speaks of. Some colour-shape pairs never
occur in training, so that naming them cannot be memory. Everything follows from a seed; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, cos, floor, pi, sin
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from captioner.errors import InputError
from captioner.grammar import COUNTS, GRAMMARS, LONGEST, SHAPES, Count, Grammar, Mention, Name, Sentence
from captioner.text_files import read_data

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

COLOURS = {
    "red": (208, 28, 36),
    "green": (24, 148, 48),
    "blue": (32, 72, 214),
    "yellow": (244, 222, 36),
    "purple": (138, 36, 164),
    "orange": (248, 128, 16),
    "white": (244, 244, 244),
    "black": (16, 16, 16),
}
SIZES = {"small": (0.19, 0.2), "large": (0.26, 0.27)}  # the box's side in sides of the image: 4 % and 7 % of its area
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
UNSEEN_PAIRS = (  # every colour and every shape is in at most one, so each is still seen often with others
    ("orange", "circle"),
    ("purple", "square"),
    ("red", "triangle"),
    ("green", "star"),
    ("yellow", "cross"),
    ("blue", "ring"),
)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)
SPLITS = ("train", "val", "seen", "unseen")

RELATIONS = {"above": (1, -1), "below": (1, 1), "to the left of": (0, -1), "to the right of": (0, 1)}  # axis, sign

STATED_MARGIN = 0.1  # a caption states a relation only where the centres differ by this many sides of the image,
JUDGED_MARGIN = 0.05  # and half of it is enough for a judge who is to be fair
SUBPIXELS = 4  # per pixel and axis: shapes are drawn finer and averaged, and boxes lie on this finer grid
IMAGES_PER_SPLIT = 1_000_000  # ids of split k start here times k, whatever the sizes of the others


# Scenes


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; ``box`` is the tight box of what is drawn, in pixels."""

    shape: str
    colour: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of the box, (x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A square image of ``side`` pixels: its objects, and the seed of its background, tints and tilts."""

    side: int
    objects: tuple[SceneObject, ...]
    seed: int

    def draw(self) -> Image.Image:
        """Draw the scene: the same RGB image of (side, side) pixels at every call."""
        generator = np.random.default_rng(self.seed)
        image = _background(self.side, generator)
        for item in self.objects:
            tint = np.array(COLOURS[item.colour]) + generator.integers(-10, 11, 3)
            red, green, blue = np.clip(tint, 0, 255).tolist()
            left, top = floor(item.box[0]), floor(item.box[1])
            image.paste((red, green, blue), (left, top), _mask(item, tilt=generator.uniform(-pi / 18, pi / 18)))
        return image

    def to_json(self) -> dict[str, Any]:
        """Return the scene as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scene:
        """Build the scene that `to_json` wrote; other keys are ignored."""
        objects = tuple(SceneObject(**{**item, "box": tuple(item["box"])}) for item in values["objects"])
        return cls(values["side"], objects, values["seed"])


def compose(
    generator: np.random.Generator,
    *,
    unseen: bool,
    side: int = 96,
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS,
) -> Scene:
    """Compose a scene of two to four objects, no two of the same colour and shape, none touching another.

    Parameters
    ----------
    generator
        The source of all choices.
    unseen
        True: at least one object is of `UNSEEN_PAIRS`; False: none is.
    side
        The image's width and height in pixels.
    pairs
        The colours and shapes that objects have where `unseen` is False: four or more of `PAIRS`.

    Raises
    ------
    InputError
        If the side is too small for shapes to be told apart, or the pairs are too few or others.
    """
    if not 4 <= len(pairs) == len(set(pairs) & set(PAIRS)):
        raise InputError(
            "the pairs of a colour and a shape that objects are to have must be four or more, each of them once and "
            "one that can be drawn: choose among captioner.scenes.PAIRS"
        )
    if side < 32:
        raise InputError(f"a scene of {side} pixels is too small to tell shapes apart: choose a side of 32 or more")
    number = int(generator.integers(2, 5))
    if unseen:
        first = UNSEEN_PAIRS[generator.integers(len(UNSEEN_PAIRS))]
        others = [pair for pair in PAIRS if pair != first]
        chosen = [first, *(others[k] for k in generator.choice(len(others), number - 1, replace=False))]
    else:
        chosen = [pairs[k] for k in generator.choice(len(pairs), number, replace=False)]
    sizes = [tuple(SIZES)[k] for k in generator.integers(len(SIZES), size=number)]
    extents = [int(generator.uniform(*SIZES[size]) * side * SUBPIXELS) for size in sizes]
    boxes = _place(extents, side * SUBPIXELS, generator)
    objects = [
        SceneObject(shape, colour, size, box) for (colour, shape), size, box in zip(chosen, sizes, boxes, strict=True)
    ]
    order = generator.permutation(number)
    return Scene(side, tuple(objects[k] for k in order), int(generator.integers(2**32)))


def _place(extents: Sequence[int], side: int, generator: np.random.Generator) -> list[Box]:
    """Place square boxes anywhere in the image, at least a pixel apart; in subpixels, the answer in pixels."""
    while True:  # a layout in which one finds no room is given up as a whole, so that no place is favoured
        corners = [generator.integers(0, side - extent + 1, 2).tolist() for extent in extents]
        boxes = [(x, y, x + extent, y + extent) for (x, y), extent in zip(corners, extents, strict=True)]
        if not any(_overlap(_grown(a), b) for k, a in enumerate(boxes) for b in boxes[:k]):
            return [(a / SUBPIXELS, b / SUBPIXELS, c / SUBPIXELS, d / SUBPIXELS) for a, b, c, d in boxes]


def _grown(box: Box) -> Box:
    return box[0] - SUBPIXELS, box[1] - SUBPIXELS, box[2] + SUBPIXELS, box[3] + SUBPIXELS


def _overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a positive area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Drawing


def _spokes(*radii: float, corners: int) -> NDArray[np.float64]:
    """Corners around the origin, the first on top, their distances cycling through the radii: (corners, 2)."""
    angles = 2 * pi * np.arange(corners) / corners - pi / 2
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(directions * np.resize(radii, (corners, 1)))


_ARM = 0.36  # half the width of the cross's arms, in half its extent
POLYGONS = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _spokes(1, corners=3),
    "star": _spokes(1, 0.42, corners=10),
    "cross": np.array(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
}


def _mask(item: SceneObject, tilt: float) -> Image.Image:
    """Draw the object's coverage of the pixels from the one that holds its upper left corner on, tilted by radians."""
    left, top = floor(item.box[0]), floor(item.box[1])
    size = (ceil(item.box[2]) - left) * SUBPIXELS, (ceil(item.box[3]) - top) * SUBPIXELS
    origin = np.array([left, top, left, top])
    # Pillow fills up to and including the last coordinate, hence the one less on the right and below.
    box = np.rint((np.array(item.box) - origin) * SUBPIXELS) - np.array([0, 0, 1, 1])
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    if item.shape in POLYGONS:
        turn = np.array([(cos(tilt), sin(tilt)), (-sin(tilt), cos(tilt))])
        corners = POLYGONS[item.shape] @ turn
        low, high = corners.min(axis=0), corners.max(axis=0)
        corners = box[:2] + (corners - low) / (high - low) * (box[2:] - box[:2])  # the box stays tight when tilted
        pen.polygon(np.rint(corners).ravel().tolist(), fill=255)
    else:
        pen.ellipse(box.tolist(), fill=255)
        if item.shape == "ring":
            inset = 0.24 * (box[2] - box[0])
            pen.ellipse((box + inset * np.array([1, 1, -1, -1])).tolist(), fill=0)
    return mask.reduce(SUBPIXELS)


def _background(side: int, generator: np.random.Generator) -> Image.Image:
    """Draw a gradient between two muted colours under two textures: greyish and mid-bright, as no object is."""
    colours = generator.uniform(95, 155, (2, 1)) + generator.uniform(-12, 12, (2, 3))
    ramp = _waves(side, generator.uniform(0, 2 * pi)) + 0.5
    canvas = colours[0] + ramp[:, :, None] * (colours[1] - colours[0])
    for k in generator.choice(len(TEXTURES), 2, replace=False):
        canvas += TEXTURES[k](side, generator)[:, :, None] * generator.uniform(0.8, 1.0, 3)
    return Image.fromarray(np.clip(canvas, 64, 186).astype(np.uint8))


def _waves(side: int, angle: float) -> NDArray[np.float64]:
    """Return every pixel's distance from the middle along a direction, in sides: (side, side)."""
    line = (np.arange(side) + 0.5) / side - 0.5
    return cos(angle) * line[None, :] + sin(angle) * line[:, None]


def _stripes(side: int, generator: np.random.Generator) -> NDArray[np.float64]:
    distance = _waves(side, generator.uniform(0, pi)) * generator.uniform(4, 14)
    return generator.uniform(5, 12) * np.where((distance + generator.uniform()) % 1 < 0.5, 1.0, -1.0)


def _speckle(side: int, generator: np.random.Generator) -> NDArray[np.float64]:
    return generator.uniform(5, 11) * generator.standard_normal((side, side), dtype=np.float32).astype(np.float64)


def _blotches(side: int, generator: np.random.Generator) -> NDArray[np.float64]:
    cells = int(generator.integers(4, 10))
    coarse = Image.fromarray(generator.uniform(-22, 22, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


def _lines(side: int, generator: np.random.Generator) -> NDArray[np.float64]:
    layer = Image.new("F", (side, side))
    pen = ImageDraw.Draw(layer)
    for _ in range(generator.integers(4, 10)):
        ends = generator.uniform(0, side, 4).tolist()
        pen.line(ends, fill=float(generator.uniform(-26, 26)), width=int(generator.integers(1, 3)))
    return np.asarray(layer, dtype=np.float64)


TEXTURES = (_stripes, _speckle, _blotches, _lines)


# Captions


class Description(NamedTuple):
    """A true caption of a scene, and for each of its words the boxes it speaks of (none for a function word)."""

    text: str
    words: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


def describe(scene: Scene, generator: np.random.Generator, number: int = 5, language: str = "en") -> list[Description]:
    """Write distinct true captions, each of two or three objects by colour and shape and of one relation.

    Parameters
    ----------
    scene
        A scene of two to four objects.
    generator
        The source of all choices: objects, relation, order of mention, articles, sizes, counts.
    number
        How many captions.
    language
        Theirs: "en" or "ko".

    Raises
    ------
    InputError
        If no two objects of the scene stand clearly apart.
    """
    grammar = grammar_of(language)
    related = [(a, b, _relation(a, b, scene.side)) for a in scene.objects for b in scene.objects if a is not b]
    clear = [(a, b, relation) for a, b, relation in related if relation]
    if not clear:
        raise InputError("no two objects of this scene stand clearly apart: place them further from each other")
    count = next(word for word, value in COUNTS.items() if value == len(scene.objects))
    texts: dict[str, None] = {}  # an ordered set
    while len(texts) < number:
        a, b, relation = clear[generator.integers(len(clear))]
        third = {
            grammar.of_subjects: [c for c, other, r in clear if other is b and r == relation and c is not a],
            grammar.of_objects: [c for other, c, r in clear if other is a and r == relation and c is not b],
        }
        templates = [*grammar.of_two, *(template for template, objects in third.items() if objects)]
        template = templates[generator.integers(len(templates))]
        objects = third.get(template, [b])
        sentence = Sentence(_name(a), _name(b), tuple(map(_name, objects)), relation, count)
        text = grammar.write(template, sentence, generator)
        if len(text.split()) <= LONGEST:
            texts[text] = None
    words = [tuple(text.split()) for text in texts]
    return [Description(" ".join(each), each, judge(each, scene, language).boxes) for each in words]


def _name(item: SceneObject) -> Name:
    return Name(item.size, item.colour, item.shape)


def grammar_of(language: str) -> Grammar:
    """Return the grammar of a language.

    Raises
    ------
    InputError
        Where there is none.
    """
    if language not in GRAMMARS:
        raise InputError(f"The scenes have no captions in {language!r}: choose among {', '.join(GRAMMARS)}.")
    return GRAMMARS[language]


def _relation(a: SceneObject, b: SceneObject, side: int) -> str | None:
    """Return how A clearly stands to B, along the axis on which they are further apart; None if too close."""
    offset = [abs(p - q) for p, q in zip(a.centre, b.centre, strict=True)]
    dominant = int(offset[1] > offset[0])
    for relation, (axis, _) in RELATIONS.items():
        if axis == dominant and _holds(relation, a, b, STATED_MARGIN * side):
            return relation
    return None


def _holds(relation: str, a: SceneObject, b: SceneObject, margin: float) -> bool:
    axis, sign = RELATIONS[relation]
    return sign * (a.centre[axis] - b.centre[axis]) >= margin


# Judging


@dataclass(frozen=True)
class Judgement:
    """What `judge` found in a caption.

    Attributes
    ----------
    right
        Whether all that the caption says is true, and it says enough.
    reason
        Why it is not right; empty if it is.
    words
        The caption's words.
    mentions
        The objects named, in order, whether or not they exist.
    boxes
        For each word the boxes of the scene that it speaks of: for the words of a mention the object of that colour
        and shape (none if there is none), for a relation both its objects, for a count all objects.
    """

    right: bool
    reason: str
    words: tuple[str, ...]
    mentions: tuple[Mention, ...]
    boxes: tuple[tuple[Box, ...], ...]


def judge(words: Sequence[str], scene: Scene, language: str = "en") -> Judgement:
    """Judge a caption, whoever wrote it, by the scene itself.

    It is right if every object named exists (with the size said, if one is), every relation and every count is true,
    and it names at least two objects and one relation. It is read phrase by phrase, not matched to templates;
    a caption that cannot be read to its end (a colour without a shape, a relation without an object, an unknown
    word, an object related to itself) is not right. Grammar beyond that is not judged.

    Parameters
    ----------
    words
        The caption's words, lower case.
    scene
        What it should describe.
    language
        The caption's: "en" or "ko".
    """
    items, links, problems = grammar_of(language).read(words)
    mentions = tuple(item for item in items if isinstance(item, Mention))
    found = {mention: _find(mention, scene) for mention in mentions}
    boxes: list[tuple[Box, ...]] = [()] * len(words)

    for mention, named in found.items():
        if named is None or mention.size not in (None, named.size):
            problems.append(f"there is no {' '.join(words[mention.start : mention.stop])}")
        if named is not None:
            boxes[mention.start : mention.stop] = [(named.box,)] * (mention.stop - mention.start)
    for relation, subjects, target in links:
        ends = [found[mention] for mention in (*subjects, target)]
        before = boxes[relation.start]  # a relation to two objects is linked twice
        spoken_of = tuple(dict.fromkeys([*before, *(item.box for item in ends if item is not None)]))
        boxes[relation.start : relation.stop] = [spoken_of] * (relation.stop - relation.start)
        b = ends[-1]
        for a in ends[:-1]:
            if a is not None and a is b:
                problems.append(f"the {a.colour} {a.shape} is related to itself")
            elif a is not None and b is not None and not _holds(relation.name, a, b, JUDGED_MARGIN * scene.side):
                problems.append(f"the {a.colour} {a.shape} is not {relation.name} the {b.colour} {b.shape}")
    for item in items:
        if isinstance(item, Count):
            boxes[item.start : item.stop] = [tuple(each.box for each in scene.objects)] * (item.stop - item.start)
            if item.value != len(scene.objects):
                problems.append(f"there are {len(scene.objects)} objects, not {item.value}")
    if len({(mention.colour, mention.shape) for mention in mentions}) < 2:
        problems.append("fewer than two objects are named")
    if not links:
        problems.append("no relation is stated")
    return Judgement(not problems, problems[0] if problems else "", tuple(words), mentions, tuple(boxes))


def _find(mention: Mention, scene: Scene) -> SceneObject | None:
    named = (mention.colour, mention.shape)
    return next((item for item in scene.objects if (item.colour, item.shape) == named), None)


# Pointing


class Pointing(NamedTuple):
    """Whether one word's attention points at what the word speaks of.

    Attributes
    ----------
    word
        The word's place in the caption.
    hit
        Whether the region of the largest weight overlaps the true box; False if the scene has no such object.
    chance
        The share of all regions that overlap it, which is what a uniform map reaches; 0 if there is no such object.
    """

    word: int
    hit: bool
    chance: float


def pointing(
    judgement: Judgement, weights: NDArray[np.floating[Any]], grid: tuple[int, int], scene: Scene, language: str = "en"
) -> list[Pointing]:
    """Play the pointing game (Zhang et al., 2016) with every colour and shape word of a caption.

    Parameters
    ----------
    judgement
        What `judge` found in the caption.
    weights : (T, N)
        Each word's attention weights over the regions, row-major.
    grid
        Rows and columns of the regions, which divide the whole image evenly; their product is N.
    scene
        The scene that was captioned.
    language
        The caption's.

    Raises
    ------
    ValueError
        If the weights do not fit the words or the grid.
    """
    grammar = grammar_of(language)
    rows, columns = grid
    if weights.shape != (len(judgement.words), rows * columns):
        raise ValueError(f"weights of {weights.shape} do not fit {len(judgement.words)} words and a grid of {grid}")
    height, width = scene.side / rows, scene.side / columns
    cells = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(rows) for x in range(columns)]
    pointings = []
    for k, word in enumerate(judgement.words):
        if grammar.names(word):
            overlaps = [any(_overlap(cell, box) for box in judgement.boxes[k]) for cell in cells]
            pointings.append(Pointing(k, overlaps[int(weights[k].argmax())], sum(overlaps) / len(overlaps)))
    return pointings


# Files


def write_scenes(
    directory: Path,
    sizes: Mapping[str, int],
    seed: int,
    side: int = 96,
    progress: Callable[[int], None] | None = None,
    pairs: Sequence[tuple[str, str]] = SEEN_PAIRS,
    language: str = "en",
) -> None:
    """Draw and caption scenes and write them as a data set in COCO's captions format.

    For each split: ``<split>/000001.png`` and so on, ``captions_<split>.json`` (what pycocotools reads) and
    ``scenes_<split>.json`` (by image id the scene, and for each word of its captions the numbers of the objects it
    speaks of). A split's scenes depend on the seed alone, not on other splits; a larger split starts with the scenes
    of a smaller one.

    Parameters
    ----------
    directory
        Where to write; it is made if it does not exist.
    sizes
        The number of scenes of each split: of "train", "val" and "seen" (no unseen pair) and of "unseen" (each scene
        has one).
    seed
        Chooses the data set.
    side
        The images' width and height in pixels.
    progress
        Called after each scene with the number of scenes written so far, over all splits.
    pairs
        As for `compose`: fewer make an easier data set.
    language
        The captions': "en" or "ko".

    Raises
    ------
    InputError
        If a split is unknown or of an impossible size, the language is unknown, or as `compose`.
    """
    for split, size in sizes.items():
        if split not in SPLITS:
            raise InputError(f"there is no split '{split}' of the scenes: choose among {', '.join(SPLITS)}")
        if not 0 <= size < IMAGES_PER_SPLIT:
            raise InputError(f"split '{split}' cannot have {size} scenes: choose 0 to {IMAGES_PER_SPLIT - 1}")
    grammar_of(language)
    spoken = {} if language == "en" else {"language": language}
    written = 0
    for split, size in sizes.items():
        (directory / split).mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng([seed, SPLITS.index(split)])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        scenes: dict[int, dict[str, Any]] = {}
        for number in range(1, size + 1):
            scene = compose(generator, unseen=split == "unseen", side=side, pairs=pairs)
            descriptions = describe(scene, generator, language=language)
            image_id = SPLITS.index(split) * IMAGES_PER_SPLIT + number
            name = f"{number:06d}.png"
            scene.draw().save(directory / split / name, compress_level=1)
            images.append({"id": image_id, "file_name": name, "width": side, "height": side})
            for k, description in enumerate(descriptions):
                annotation_id = image_id * len(descriptions) + k
                annotations.append({"id": annotation_id, "image_id": image_id, "caption": description.text})
            scenes[image_id] = scene.to_json() | {"captions": [_caption_json(each, scene) for each in descriptions]}
            written += 1
            if progress is not None:
                progress(written)
        captions = {
            "info": {"description": f"captioner's drawn scenes: {split}, seed {seed}"} | spoken,
            "licenses": [],
            "images": images,
            "annotations": annotations,
        }
        (directory / f"captions_{split}.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
        (directory / f"scenes_{split}.json").write_text(json.dumps(scenes, ensure_ascii=False), encoding="utf-8")


def _caption_json(description: Description, scene: Scene) -> dict[str, Any]:
    numbers = {item.box: number for number, item in enumerate(scene.objects)}
    return {"text": description.text, "objects": [[numbers[box] for box in boxes] for boxes in description.boxes]}


def read_scenes(directory: Path, split: str) -> dict[int, Scene]:
    """Read the scenes of a split that `write_scenes` wrote, by image id.

    Raises
    ------
    InputError
        If the directory holds no such split, or a file of that name that is something else.
    """
    path = directory / f"scenes_{split}.json"
    if not path.is_file():
        raise InputError(f"There is no {path}: write the scenes of split '{split}' first.")
    try:
        values = json.loads(read_data(path))
        return {int(image_id): Scene.from_json(scene) for image_id, scene in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path} does not hold the boxes of drawn scenes, as its name says: write them again, or give a file of "
            "your own another name."
        ) from None
