import importlib.metadata
import math
import time
from random import Random

import numpy as np
import pytest

from captioner.errors import InputError
from captioner.metrics import bleu, cider_d, paired_bootstrap, rouge_l, score_captions

REFERENCES = {
    "equal": ["a dog runs on the grass", "the brown dog is running"],
    "empty": ["two men sit on a bench", "men sitting"],
    "short": ["a red ball", "a ball on the grass"],
    "repeated": ["the cat sat on the mat", "there is a cat on the mat"],
    "single": ["a child in a pink dress climbs the stairs"],
    "tie": ["a man rides", "a man rides a wave", "a surfer rides a big wave on the sea"],
    "long": ["a bird", "a small bird flies", "bird"],
}
HYPOTHESES = {
    "equal": "a dog runs on the grass",
    "empty": "",
    "short": "red ball",
    "repeated": "the the the cat the the the mat on the mat",
    "single": "a girl in a dress climbs",
    "tie": "a man rides a",
    "long": "a small bird flies over the grass and the red bench",
}
# Computed by pycocoevalcap 1.2 from the tokens above, split at spaces: the corpus, then the images in their order.
GOLDEN = {
    "BLEU-1": (
        0.64999999998375,
        [
            0.9999999996666668,
            0.0,
            0.6065306591061034,
            0.4545454545041323,
            0.5054422162587139,
            0.9999999997500002,
            0.36363636360330587,
        ],
    ),
    "BLEU-2": (
        0.5700877125340593,
        [
            0.9999999996500001,
            0.0,
            0.6065306589544709,
            0.36927447290274934,
            0.35018063953428713,
            0.9999999997083335,
            0.3302891295063807,
        ],
    ),
    "BLEU-3": (
        0.47096570072349253,
        [
            0.999999999627778,
            0.0,
            0.0060653065910610355,
            0.24744880155506502,
            2.649266676956768e-06,
            0.9999999996388892,
            0.28941787401861013,
        ],
    ),
    "BLEU-4": (
        0.3881972923017171,
        [
            0.9999999995958335,
            0.0,
            0.0006065306591819196,
            3.709723313286475e-05,
            7.830277143606022e-09,
            0.9999999994791672,
            0.23462350318023287,
        ],
    ),
    "ROUGE-L": (
        0.6598759970318696,
        [
            1.0,
            0.0,
            0.7721518987341772,
            0.6211812627291243,
            0.6434599156118143,
            1.0,
            0.5823389021479713,
        ],
    ),
    "CIDEr-D": (
        2.5267465142068852,
        [
            5.43490525159923,
            0.0,
            2.7468727401770137,
            1.4115003620773856,
            2.0453633285692154,
            5.021780822227355,
            1.026803094797997,
        ],
    ),
}


def split(references, hypotheses):
    return (
        {image_id: [caption.split() for caption in captions] for image_id, captions in references.items()},
        {image_id: caption.split() for image_id, caption in hypotheses.items()},
    )


def all_scores(references, hypotheses):
    return {
        **bleu(references, hypotheses),
        "ROUGE-L": rouge_l(references, hypotheses),
        "CIDEr-D": cider_d(references, hypotheses),
    }


@pytest.mark.parametrize("metric", GOLDEN)
def test_equals_the_coco_server(metric):
    corpus, per_image = GOLDEN[metric]
    score = all_scores(*split(REFERENCES, HYPOTHESES))[metric]
    assert score.corpus == pytest.approx(corpus, abs=1e-9)
    assert score.per_image == pytest.approx(per_image, abs=1e-9)
    assert score.per_image.dtype == np.float64


def test_equals_pycocoevalcap_on_random_captions():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    random = Random(0)
    for images in range(1, 31):
        words = [f"word{number}" for number in range(random.randint(1, 15))]
        texts = {
            image: [" ".join(random.choices(words, k=random.randint(1, 12))) for _ in range(random.randint(2, 7))]
            for image in range(images)
        }
        theirs_in = (
            {image: rest for image, (_, *rest) in texts.items()},
            {image: [one[0]] for image, one in texts.items()},
        )
        ours = all_scores(*split(theirs_in[0], {image: one[0] for image, one in texts.items()}))
        corpus, per_image = Bleu(4).compute_score(*theirs_in, verbose=0)
        theirs = {f"BLEU-{n + 1}": (corpus[n], per_image[n]) for n in range(4)}
        theirs |= {"ROUGE-L": Rouge().compute_score(*theirs_in), "CIDEr-D": Cider().compute_score(*theirs_in)}
        for metric, (corpus, per_image) in theirs.items():
            assert ours[metric].corpus == pytest.approx(corpus, abs=1e-9), importlib.metadata.version("pycocoevalcap")
            assert ours[metric].per_image == pytest.approx(per_image, abs=1e-9)


def test_bleu_by_hand():
    # 1-grams: "the" counts at most twice, 3 of 3; 2-grams: "the cat" of 2. 3 words against 6: exp(1 - 2).
    references, hypotheses = split({1: ["the cat sat on the mat"]}, {1: "the the cat"})
    scores = bleu(references, hypotheses)
    assert scores["BLEU-1"].corpus == pytest.approx(math.exp(-1), abs=1e-8)
    assert scores["BLEU-2"].corpus == pytest.approx(math.exp(-1) * math.sqrt(1 / 2), abs=1e-8)


def test_bleu_sums_over_images_before_it_divides():
    # 1 of 1 and 1 of 3 words match: 2 of 4, not the mean of 1 and 1/3.
    references, hypotheses = split({1: ["a"], 2: ["a b c"]}, {1: "a", 2: "a x y"})
    scores = bleu(references, hypotheses)
    assert scores["BLEU-1"].corpus == pytest.approx(1 / 2)
    assert scores["BLEU-1"].per_image == pytest.approx([1, 1 / 3])


def test_bleu_takes_of_two_lengths_as_close_the_shorter():
    references, hypotheses = split({1: ["a b c d e", "a b c"]}, {1: "a b c d"})
    assert bleu(references, hypotheses)["BLEU-1"].corpus == pytest.approx(1)


def test_rouge_by_hand():
    # "a b" or "a c": 2 of 3 and 2 of 4.
    references, hypotheses = split({1: ["a b c d"]}, {1: "a c b"})
    expected = (1 + 1.44) * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3)
    assert rouge_l(references, hypotheses).corpus == pytest.approx(expected)


def test_rouge_takes_precision_and_recall_from_different_references():
    references, hypotheses = split({1: ["a b c d", "b"]}, {1: "a b"})
    assert rouge_l(references, hypotheses).corpus == pytest.approx(1)


def test_cider_by_hand():
    # Every n-gram is in one of two images and weighs log 2. Image 1: the cosines of 1-grams and 2-grams are 1, those of
    # 3-grams and 4-grams 0. Image 2: the cosine of 1-grams is 1 / sqrt(2), and a bigram is missing.
    references, hypotheses = split({1: ["a b"], 2: ["c d"]}, {1: "a b", 2: "c"})
    score = cider_d(references, hypotheses)
    expected = [10 * 2 / 4, 10 * math.exp(-1 / (2 * 6**2)) / math.sqrt(2) / 4]
    assert score.per_image == pytest.approx(expected)
    assert score.corpus == pytest.approx(sum(expected) / 2)


def test_cider_of_one_image_is_zero():
    references, hypotheses = split({1: ["a dog runs"]}, {1: "a dog runs"})
    assert cider_d(references, hypotheses).corpus == 0


def test_empty_captions_score_nothing():
    scores = all_scores({1: [[]], 2: [["a"], []]}, {1: [], 2: []})
    assert all(np.all(score.per_image == 0) and score.corpus == 0 for score in scores.values())


def test_per_image_is_in_the_order_of_the_hypotheses():
    references, hypotheses = split(REFERENCES, HYPOTHESES)
    forwards = all_scores(references, hypotheses)
    backwards = all_scores(references, dict(reversed(hypotheses.items())))
    for metric, score in forwards.items():
        assert backwards[metric].per_image[::-1] == pytest.approx(score.per_image)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d])
def test_ids_that_do_not_match_are_named(metric):
    with pytest.raises(InputError, match="2 of 3 captioned images have no reference, the first is 7"):
        metric({1: [["a"]], 8: []}, {1: ["a"], 7: ["a"], 8: ["a"]})
    with pytest.raises(InputError, match="1 of 2 images with references have no caption to score, the first is '1'"):
        metric({1: [["a"]], "1": [["a"]]}, {1: ["a"]})
    with pytest.raises(InputError, match="nothing to score"):
        metric({}, {})


def test_score_captions_tokenises():
    references = {"a": ["A dog's ball .", "Two (brown) dogs!"], "b": ["The sea.", "It isn't red"]}
    scores = score_captions(references, {"a": "a dog 's ball", "b": "the sea"})
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert scores["ROUGE-L"].per_image == pytest.approx([1, 1])
    assert scores["BLEU-2"].corpus == pytest.approx(1)


def test_score_captions_refuses_a_text_for_a_list():
    with pytest.raises(InputError, match="references of image 1 are one text"):
        score_captions({1: "a dog"}, {1: "a dog"})


def test_a_thousand_images_take_seconds():
    random = Random(0)
    words = [f"word{number}" for number in range(500)]

    def caption():
        return " ".join(random.choices(words, k=11))

    references = {image: [caption() for _ in range(5)] for image in range(1000)}
    hypotheses = {image: caption() for image in references}
    start = time.perf_counter()
    score_captions(references, hypotheses)
    assert time.perf_counter() - start < 10  # about 1.5 s; a busy machine may take longer


def test_bootstrap_tells_a_difference_from_noise():
    random = np.random.default_rng(1)
    scores = random.normal(1, 1, size=500)  # images differ by far more than the models
    better = paired_bootstrap(scores + 0.05 + random.normal(0, 0.1, size=500), scores)
    assert 0 < better.low < better.difference < better.high
    assert better.difference == pytest.approx(0.05, abs=0.02)
    assert better.distinguishable
    assert not paired_bootstrap(scores + random.normal(0, 0.1, size=500), scores).distinguishable
    assert not paired_bootstrap(scores, scores).distinguishable


def test_bootstrap_interval_is_that_of_the_mean():
    differences = np.random.default_rng(0).normal(0.3, 1, size=400)
    comparison = paired_bootstrap(differences, np.zeros(400), resamples=4000)
    error = differences.std() / math.sqrt(400)
    assert comparison.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.01)
    assert comparison.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.01)


def test_bootstrap_repeats_itself_and_turns_round():
    first, second = np.random.default_rng(0).normal(size=(2, 50))
    forwards, backwards = paired_bootstrap(first, second, seed=3), paired_bootstrap(second, first, seed=3)
    assert forwards == paired_bootstrap(first, second, seed=3)
    assert backwards == pytest.approx((-forwards.difference, -forwards.high, -forwards.low))


@pytest.mark.parametrize("shapes", [(3, 4), (0, 0)])
def test_bootstrap_needs_the_same_images(shapes):
    with pytest.raises(InputError, match="cannot be compared"):
        paired_bootstrap(*map(np.zeros, shapes))
