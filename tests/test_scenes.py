from collections import Counter

import numpy as np
import pytest
from PIL import ImageChops
from pycocotools.coco import COCO

from captioner import grammar
from captioner.errors import InputError
from captioner.scenes import (
    COLOURS,
    PAIRS,
    RELATIONS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Scene,
    SceneObject,
    compose,
    describe,
    judge,
    pointing,
    read_scenes,
    write_scenes,
)

CIRCLE = (8.0, 40.0, 24.0, 56.0)  # centre (16, 48)
SQUARE = (40.0, 8.0, 64.0, 32.0)  # centre (52, 20)
STAR = (44.0, 60.0, 60.0, 76.0)  # centre (52, 68)
#       circle to the left of square and star, above the star, below the square
BY_HAND = Scene(
    96,
    (
        SceneObject("circle", "red", "small", CIRCLE),
        SceneObject("square", "blue", "large", SQUARE),
        SceneObject("star", "orange", "small", STAR),
    ),
    seed=0,
)


@pytest.fixture(scope="module")
def scenes():
    generator = np.random.default_rng(5)
    return [compose(generator, unseen=k % 2 == 1) for k in range(300)]


def pairs(scene):
    return {(item.colour, item.shape) for item in scene.objects}


def judged(caption):
    return judge(caption.split(), BY_HAND)


def test_there_is_enough_to_tell_apart():
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(SIZES) == 2
    assert len(UNSEEN_PAIRS) == 6 and set(UNSEEN_PAIRS) < set(PAIRS)


def test_composed_scenes_keep_the_rules(scenes):
    for scene in scenes:
        assert 2 <= len(scene.objects) <= 4
        assert len(pairs(scene)) == len(scene.objects)
        for k, item in enumerate(scene.objects):
            left, top, right, bottom = item.box
            assert 0 <= left < right <= scene.side and 0 <= top < bottom <= scene.side
            share = (right - left) * (bottom - top) / scene.side**2
            assert 0.034 < share < 0.041 if item.size == "small" else 0.065 < share < 0.075
            # and the whole pixels it touches are below 8 % too
            assert (np.ceil(right) - np.floor(left)) * (np.ceil(bottom) - np.floor(top)) <= 0.08 * scene.side**2
            for other in scene.objects[:k]:
                a, b = item.box, other.box
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_objects_lie_anywhere(scenes):
    centres = np.array([item.centre for scene in scenes for item in scene.objects])
    cells = Counter(map(tuple, (centres // 24).astype(int).tolist()))  # a 4 x 4 grid
    assert len(cells) == 16
    assert len(np.unique(centres)) > 250  # on no coarse grid


def test_unseen_pairs_are_kept_from_training(scenes):
    seen = Counter(pair for scene in scenes[::2] for pair in pairs(scene))
    assert not set(UNSEEN_PAIRS) & set(seen)
    assert all(pairs(scene) & set(UNSEEN_PAIRS) for scene in scenes[1::2])
    for names in zip(*seen.elements(), strict=True):  # colours, then shapes
        assert min(Counter(names).values()) > 25


def test_scenes_follow_from_the_seed():
    first, again = (compose(np.random.default_rng(3), unseen=True) for _ in range(2))
    assert first == again
    assert first.draw().tobytes() == again.draw().tobytes() == first.draw().tobytes()
    assert describe(first, np.random.default_rng(4)) == describe(again, np.random.default_rng(4))
    assert Scene.from_json(first.to_json()) == first
    assert compose(np.random.default_rng(9), unseen=True).draw().tobytes() != first.draw().tobytes()


def test_a_tiny_image_is_refused():
    with pytest.raises(InputError, match="too small"):
        compose(np.random.default_rng(0), unseen=False, side=20)


@pytest.mark.parametrize("wrong", [PAIRS[:3], [*PAIRS[:3], PAIRS[0]], [*PAIRS[:4], ("grey", "circle")]])
def test_objects_may_be_of_few_pairs(wrong):
    few = PAIRS[5:9]
    scenes = [compose(np.random.default_rng(seed), unseen=False, pairs=few) for seed in range(20)]
    assert {(item.colour, item.shape) for scene in scenes for item in scene.objects} == set(few)
    with pytest.raises(InputError, match="four or more, each of them once"):
        compose(np.random.default_rng(0), unseen=False, pairs=wrong)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("box", [(10.0, 20.0, 36.0, 46.0), (30.25, 7.5, 49.0, 26.25)])
def test_boxes_are_tight(shape, box):
    for seed in range(8):
        bare = Scene(96, (), seed)
        drawn = Scene(96, (SceneObject(shape, "white", "large", box),), seed)
        difference = ImageChops.difference(bare.draw(), drawn.draw()).getbbox()
        assert difference == (int(box[0]), int(box[1]), int(np.ceil(box[2])), int(np.ceil(box[3])))


def test_objects_stand_out_from_the_background(scenes):
    for scene in scenes[:100]:
        image, bare = (np.asarray(each.draw(), dtype=float) for each in (scene, Scene(scene.side, (), scene.seed)))
        for item in scene.objects:
            left, top, right, bottom = (int(edge) for edge in item.box)
            change = np.abs(image - bare)[top:bottom, left:right].sum(axis=2)
            assert np.percentile(change, 90) > 90  # the inner of the shape, of 765 that black and white differ by


def test_captions_are_true_and_various(scenes):
    generator = np.random.default_rng(6)
    texts = []
    for scene in scenes:
        descriptions = describe(scene, generator)
        assert len({description.text for description in descriptions}) == 5
        for description in descriptions:
            judgement = judge(description.words, scene)
            assert judgement.right, f"{description.text}: {judgement.reason}"
            assert 8 <= len(description.words) <= 16
            assert description.text == " ".join(description.words)
            assert len(description.boxes) == len(description.words)
            for word, boxes in zip(description.words, description.boxes, strict=True):
                if word in COLOURS or word in SHAPES or word in SIZES:
                    (item,) = [item for item in scene.objects if (item.box,) == boxes]
                    assert word in (item.colour, item.shape, item.size)
        texts += [description.text for description in descriptions]
    assert len(set(texts)) > 0.9 * len(texts)
    words = {word for text in texts for word in text.split()}
    assert {"a", "an", "the", "it", "above", "below", "left", "right", "two", "three", "four", *SIZES} <= words


def test_captions_are_wrong_about_other_scenes(scenes):
    generator = np.random.default_rng(7)
    captions = [description.words for scene in scenes[:60] for description in describe(scene, generator)]
    others = scenes[60:100]
    right = [judge(words, scene).right for words in captions for scene in others]
    assert np.mean(right) < 0.1


def test_a_description_points_at_what_it_says():
    for description in describe(BY_HAND, np.random.default_rng(0), number=40):
        for word, boxes in zip(description.words, description.boxes, strict=True):
            assert set(boxes) == {
                "red": {CIRCLE}, "circle": {CIRCLE}, "blue": {SQUARE}, "square": {SQUARE}, "large": {SQUARE},
                "orange": {STAR}, "star": {STAR}, "three": {CIRCLE, SQUARE, STAR},
            }.get(word, set(boxes))  # fmt: skip
            if word in ("a", "an", "is", "are", "there", "and", "it"):
                assert boxes == ()


def test_objects_too_close_to_relate_are_refused():
    near = Scene(96, tuple(SceneObject(shape, "red", "small", CIRCLE) for shape in ("circle", "ring")), 0)
    with pytest.raises(InputError, match="apart"):
        describe(near, np.random.default_rng(0))


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle is below a blue square",
        "a red circle is to the left of a blue square",
        "the small red circle is above an orange star",
        "there are three shapes with the large blue square above an orange star",
        "three objects where an orange star is below the blue square",
        "the picture shows a blue square above a red circle and an orange star",
        "a red circle and an orange star are below the blue square",
        "a red circle and a blue square to the right of it",
        "a blue square with an orange star below it",
        "to the left of the blue square is a red circle",
        "below the blue square there is an orange star",
        "a blue square above a red circle above an orange star",
    ],
)
def test_right(caption):
    judgement = judged(caption)
    assert judgement.right, judgement.reason
    assert judgement.reason == ""


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a green circle is below a blue square", "there is no green circle"),
        ("a red circle is below a blue ring", "there is no blue ring"),
        ("a large red circle is below a blue square", "there is no large red circle"),
        ("a red circle is above a blue square", "the red circle is not above the blue square"),
        ("a blue square is to the left of an orange star", "not to the left of"),  # neither is it to the right
        ("to the right of the blue square is a red circle", "not to the right of"),
        ("a red circle and a blue square to the left of it", "the blue square is not to the left of the red circle"),
        ("a blue square and a red circle are above the orange star and a red star", "there is no red star"),
        ("an orange star and a red circle are above the blue square", "not above"),
        ("a blue square and an orange star are below the red circle", "the blue square is not below"),
        ("there are two shapes with a red circle below a blue square", "there are 3 objects, not 2"),
        ("there is a red circle", "fewer than two objects"),
        ("three shapes", "fewer than two objects"),
        ("", "fewer than two objects"),
        ("there is a red circle and a blue square", "no relation"),
        ("a red circle is below", "does not relate"),
        ("a red circle is below it and a blue square", "does not relate"),
        ("there is below a blue square", "does not relate"),
        ("a red circle is below a small red circle with a blue square", "relates an object to itself"),
        ("a red circle and a red circle are below a blue square", "joined to itself"),
        ("a red circle is below a square", "word 7, 'square', is part of no phrase"),
        ("a red is below a blue square", "word 2, 'red', is part of no phrase"),
        ("a red circle is to the left a blue square", "unknown"),
        ("a red circle is below a blue square with two", "'two', is part of no phrase"),
        ("a red circle is below a blue square and", "breaks off after 'and'"),
        ("a red circle is is below a blue square", "repeated"),
        ("a red circle is below a blue square a orange star", "nothing joins"),
        ("a red circle is below a blue dog", "word 7, 'blue', is part of no phrase"),
        ("red circle below blue square dog", "word 6, 'dog', is unknown"),
        ("a red circle is below a blue square with a", "has no noun"),
    ],
)
def test_wrong(caption, reason):
    judgement = judged(caption)
    assert not judgement.right
    assert reason in judgement.reason


def test_a_relation_needs_a_margin():
    def right(distance):
        objects = (
            SceneObject("circle", "red", "small", (10.0, 10.0, 30.0, 30.0)),
            SceneObject("ring", "blue", "small", (40.0, 10.0 + distance, 60.0, 30.0 + distance)),
        )
        return judge("a red circle is above a blue ring".split(), Scene(100, objects, 0)).right

    assert not right(4.75)
    assert right(5.0)


def test_the_boxes_of_words():
    boxes = judged("there are three shapes with the small red circle below a blue square and a white ring").boxes
    every = (CIRCLE, SQUARE, STAR)
    expected = [(), (), every, every, (), (), (CIRCLE,), (CIRCLE,), (CIRCLE,), (CIRCLE, SQUARE)]
    assert list(boxes) == [*expected, (), (SQUARE,), (SQUARE,), (), (), (), ()]


def test_pointing_by_hand():
    judgement = judged("a red circle is below a white square")
    weights = np.zeros((8, 16))
    weights[1, 4] = weights[2, 0] = weights[6, 0] = weights[7, 2] = 1
    # Cells of 24 pixels: the circle's box, x from 8 to 24 and y from 40 to 56, overlaps cells 4 and 8 and only touches
    # cells 5 and 9.
    assert pointing(judgement, weights, (4, 4), BY_HAND) == [
        (1, True, 2 / 16),
        (2, False, 2 / 16),
        (6, False, 0),  # there is no white square
        (7, False, 0),
    ]


def test_pointing_on_an_oblong_grid():
    weights = np.zeros((8, 6))
    weights[1:3, 5] = weights[6:, 1] = 1
    # Two rows of 48 pixels, three columns of 32: the square, x from 40 to 64 and y from 8 to 32, lies in cell 1;
    # the circle, x from 8 to 24 and y from 40 to 56, in cells 0 and 3.
    pointings = pointing(judged("a red circle is below a blue square"), weights, (2, 3), BY_HAND)
    assert [each.hit for each in pointings] == [False, False, True, True]
    assert [each.chance for each in pointings] == [2 / 6, 2 / 6, 1 / 6, 1 / 6]
    with pytest.raises(ValueError, match="do not fit"):
        pointing(judged("a red circle is below a blue square"), weights, (3, 3), BY_HAND)


def test_written_scenes(tmp_path):
    progress = []
    write_scenes(tmp_path, {"train": 6, "val": 2, "unseen": 3}, seed=1, progress=progress.append)
    assert progress == list(range(1, 12))
    ids = set()
    for split, size in {"train": 6, "val": 2, "unseen": 3}.items():
        coco = COCO(tmp_path / f"captions_{split}.json")
        scenes = read_scenes(tmp_path, split)
        assert sorted(scenes) == sorted(coco.getImgIds()) and len(scenes) == size
        assert not ids & set(scenes)
        ids |= set(scenes)
        for image in coco.loadImgs(coco.getImgIds()):
            scene = scenes[image["id"]]
            assert bool(pairs(scene) & set(UNSEEN_PAIRS)) == (split == "unseen")
            captions = [each["caption"] for each in coco.loadAnns(coco.getAnnIds(image["id"]))]
            assert len(captions) == 5
            assert all(judge(caption.split(), scene).right for caption in captions)
        assert len(coco.getAnnIds()) == 5 * size
    assert {path.name for path in (tmp_path / "val").iterdir()} == {"000001.png", "000002.png"}


def test_a_split_depends_on_its_seed_alone(tmp_path):
    write_scenes(tmp_path / "a", {"train": 2, "val": 2}, seed=1)
    write_scenes(tmp_path / "b", {"val": 3}, seed=1)
    write_scenes(tmp_path / "c", {"val": 2}, seed=2)
    a, b, c = (list(read_scenes(tmp_path / name, "val").values()) for name in "abc")
    assert a == b[:2]
    assert not set(a) & set(c)
    assert not set(a) & set(read_scenes(tmp_path / "a", "train").values())
    image = "val/000002.png"
    assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()


def test_mistakes_are_told(tmp_path):
    with pytest.raises(InputError, match="no split 'test'"):
        write_scenes(tmp_path, {"test": 1}, seed=0)
    with pytest.raises(InputError, match="cannot have -1 scenes"):
        write_scenes(tmp_path, {"val": -1}, seed=0)
    with pytest.raises(InputError, match="write the scenes"):
        read_scenes(tmp_path, "val")


def test_a_relation_to_two_objects_must_hold_for_both():
    def item(colour, shape, x, y):
        return SceneObject(shape, colour, "small", (x - 9.0, y - 9.0, x + 9.0, y + 9.0))

    red, blue = item("red", "circle", 20, 20), item("blue", "square", 70, 70)
    words = "the image shows a red circle to the left of a blue square and a green ring".split()
    assert judge(words, Scene(96, (red, blue, item("green", "ring", 70, 40)), 0)).right
    assert not judge(words, Scene(96, (red, blue, item("green", "ring", 20, 75)), 0)).right
    clause = "a red circle is to the left of a blue square and a green ring is below it".split()
    assert not judge(clause, Scene(96, (red, blue, item("green", "ring", 70, 40)), 0)).right


# Korean


def test_korean_captions_are_true_and_various(scenes):
    generator = np.random.default_rng(6)
    texts, endings = [], set()
    for scene, other in zip(scenes[:100], scenes[100:], strict=False):
        descriptions = describe(scene, generator, language="ko")
        assert len({description.text for description in descriptions}) == 5
        for description in descriptions:
            judgement = judge(description.words, scene, "ko")
            assert judgement.right, f"{description.text}: {judgement.reason}"
            assert not judge(description.words, other, "ko").right or pairs(scene) & pairs(other)
            assert description.text == " ".join(description.words) and len(description.words) <= 16
            named = [(mention.colour, mention.shape) for mention in judgement.mentions]
            assert 2 <= len(named) <= 3 and set(named) <= pairs(scene)
            for mention in judgement.mentions:
                (item,) = [item for item in scene.objects if (item.colour, item.shape) == mention[3:]]
                assert set(description.boxes[mention.start : mention.stop]) == {(item.box,)}
        texts += [description.text for description in descriptions]
        endings |= {description.words[-1] for description in descriptions}
    assert len(set(texts)) > 0.9 * len(texts) and {"있다", "보인다", "별이다", "고리다"} <= endings


@pytest.mark.parametrize(
    "caption",
    [
        "빨간 원은 파란 정사각형 아래에 있다",
        "빨간 원은 파란 정사각형의 왼쪽에 있다",
        "주황색 별 위에 작은 빨간 원이 있다",
        "파란 정사각형 아래에는 주황색 별이 있다",
        "파란 정사각형 왼쪽에 있는 것은 빨간 원이다",
        "파란 정사각형과 그 아래에 있는 빨간 원",
        "파란 정사각형이 있고 그 왼쪽에 빨간 원이 있다",
        "그림에 빨간 원의 위에 있는 큰 파란 정사각형이 보인다",
        "도형 세 개 중 빨간 원은 파란 정사각형 아래에 있다",
        "도형 세 개 중 파란 정사각형 아래에 빨간 원이 있다",
        "이미지에 물체가 세 개 보이고 주황색 별의 위에 빨간 원이 있다",
        "물체가 세 개 있고 빨간 원은 주황색 별 위에 있다",
        "이미지에 도형이 세 개 보이고 빨간 원은 파란 정사각형 아래에 있다",
        "빨간 원과 주황색 별은 파란 정사각형 아래에 있다",
        "그림에 빨간 원과 주황색 별 위에 있는 파란 정사각형이 보인다",
    ],
)
def test_right_in_korean(caption):
    judgement = judge(caption.split(), BY_HAND, "ko")
    assert judgement.right, judgement.reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("초록색 원은 파란 정사각형 아래에 있다", "there is no 초록색 원은"),
        ("큰 빨간 원은 파란 정사각형 아래에 있다", "there is no 큰 빨간 원은"),
        ("빨간 원은 파란 정사각형 위에 있다", "the red circle is not above the blue square"),
        ("파란 정사각형 위에 빨간 원이 있다", "the red circle is not above the blue square"),
        ("파란 정사각형과 그 위에 있는 빨간 원", "the red circle is not above the blue square"),
        ("그림에 빨간 원과 파란 정사각형 위에 있는 주황색 별이 보인다", "the orange star is not above"),
        ("파란 정사각형과 주황색 별은 빨간 원 아래에 있다", "the blue square is not below the red circle"),
        ("도형 두 개 중 빨간 원은 파란 정사각형 아래에 있다", "there are 3 objects, not 2"),
        ("빨간 원는 파란 정사각형 아래에 있다", "word 1, '빨간', is unknown"),  # the particle of a vowel
        ("빨간 원은 파란 정사각형가 아래에 있다", "unknown"),
        ("빨간 원은 정사각형 아래에 있다", "word 3, '정사각형', is unknown"),
        ("빨간 원은 파란 정사각형 아래에", "breaks off after '아래에'"),
        ("파란 정사각형과 그 아래에 있는 빨간 원이", "breaks off after '원이'"),
        ("빨간 원이 있다", "fewer than two objects"),
        ("빨간 원과 파란 정사각형", "no relation"),
        ("", "fewer than two objects"),
        ("아래에 있다", "does not relate"),
        ("빨간 원은 아래에 있다", "does not relate"),
        ("빨간 원은 빨간 원 아래에 있다", "joined to itself"),
        ("빨간 원의 아래에 빨간 원이 있다", "relates an object to itself"),
        ("빨간 원 파란 정사각형 아래에 있다", "nothing joins the object at word 3"),
        ("빨간 원은 파란 정사각형 아래에 있다 있다", "'있다', is repeated"),
        ("a red circle is below a blue square", "unknown"),
    ],
)
def test_wrong_in_korean(caption, reason):
    judgement = judge(caption.split(), BY_HAND, "ko")
    assert not judgement.right and reason in judgement.reason


def test_korean_words_are_pointed_at():
    judgement = judge("빨간 원은 하얀 정사각형 아래에 있다".split(), BY_HAND, "ko")
    weights = np.zeros((6, 16))
    weights[0, 4] = weights[1, 0] = weights[2, 0] = 1
    assert pointing(judgement, weights, (4, 4), BY_HAND, "ko") == [
        (0, True, 2 / 16),
        (1, False, 2 / 16),
        (2, False, 0),
        (3, False, 0),
    ]


def test_scenes_are_the_same_in_every_language_but_for_their_captions(tmp_path):
    for language in ("en", "ko"):
        write_scenes(tmp_path / language, {"val": 1}, seed=1, language=language)
    one, other = (read_scenes(tmp_path / language, "val") for language in ("en", "ko"))
    assert one == other
    text = (tmp_path / "ko" / "captions_val.json").read_text(encoding="utf-8")
    assert '"language": "ko"' in text and "있다" in text  # as it is written, without \\u
    with pytest.raises(InputError, match="no captions in 'fr': choose among en, ko"):
        write_scenes(tmp_path, {"val": 1}, seed=1, language="fr")


def test_colours_and_sizes_are_the_grammars():
    assert tuple(COLOURS) == grammar.COLOURS and tuple(SIZES) == grammar.SIZES
    assert tuple(RELATIONS) == grammar.RELATIONS
