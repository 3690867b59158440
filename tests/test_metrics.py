import importlib.metadata
import math
import shutil
import time
from random import Random

import numpy as np
import pytest

from captioner.errors import InputError
from captioner.metrics import (
    CIDErD,
    Diversity,
    DocumentFrequencies,
    Score,
    bleu,
    bootstrap,
    cider_d,
    diversity,
    paired_bootstrap,
    rouge_l,
    score_captions,
)

REFERENCES = {
    "equal": ["a dog runs on the grass", "the brown dog is running"],
    "empty": ["two men sit on a bench", "men sitting"],
    "short": ["a red ball", "a ball on the grass"],
    "repeated": ["the cat sat on the mat", "there is a cat on the mat"],
    "single": ["a child in a pink dress climbs the stairs"],
    "tie": ["a man rides", "a man rides a wave", "a surfer rides a big wave on the sea"],
    "long": ["a bird", "a small bird flies", "bird"],
    "both empty": ["a dog", ""],
    "no-break space": ["5\xa01/2 red balls", "about 1/2 of a red ball"],  # as the tokenizer writes "5 1/2"
}
HYPOTHESES = {
    "equal": "a dog runs on the grass",
    "empty": "",
    "short": "red ball",
    "repeated": "the the the cat the the the mat on the mat",
    "single": "a girl in a dress climbs",
    "tie": "a man rides a",
    "long": "a small bird flies over the grass and the red bench",
    "both empty": "",
    "no-break space": "5\xa01/2 balls",
}
# Computed by pycocoevalcap 1.2 from the captions above: the corpus, then the images in their order.
GOLDEN = {
    "BLEU-1": (
        0.6744186046354786,
        [
            0.9999999996666668,
            0.0,
            0.6065306591061034,
            0.4545454545041323,
            0.5054422162587139,
            0.9999999997500002,
            0.36363636360330587,
            0.0,
            0.7165313100961022,
        ],
    ),
    "BLEU-2": (
        0.5806972552960556,
        [
            0.9999999996500001,
            0.0,
            0.6065306589544709,
            0.36927447290274934,
            0.35018063953428713,
            0.9999999997083335,
            0.3302891295063807,
            0.0,
            0.5066641482592128,
        ],
    ),
    "BLEU-3": (
        0.47124637164924665,
        [
            0.999999999627778,
            0.0,
            0.0060653065910610355,
            0.24744880155506502,
            2.649266676956768e-06,
            0.9999999996388892,
            0.28941787401861013,
            0.0,
            5.687112775493775e-06,
        ],
    ),
    "BLEU-4": (
        0.388370788342033,
        [
            0.9999999995958335,
            0.0,
            0.0006065306591819196,
            3.709723313286475e-05,
            7.830277143606022e-09,
            0.9999999994791672,
            0.23462350318023287,
            0.0,
            3.388267370133672e-06,
        ],
    ),
    "ROUGE-L": (
        0.7101426531063627,
        [
            1.0,
            0.0,
            0.7721518987341772,
            0.6211812627291243,
            0.6434599156118143,
            1.0,
            0.5823389021479713,
            1.0,
            0.7721518987341772,
        ],
    ),
    "CIDEr-D": (
        2.143317425447462,
        [
            5.266157190774584,
            0.0,
            2.618176522570281,
            1.3387876144249877,
            2.040731280664663,
            5.019795243913948,
            1.0354938628186612,
            0.0,
            1.9707151138600312,
        ],
    ),
}
# "a" is in every image, "girl" in two of this corpus and in no reference above.
CORPUS = {
    1: ["a dog runs", "the dog on the grass"],
    2: ["a man rides a horse", "the man"],
    3: ["a small bird flies over the sea", "the girl sees a bird"],
    4: ["a girl in the red dress", "the girl climbs"],
    5: ["a cat", ""],
}
# CIDEr-D by its document frequencies, by pycocoevalcap 1.2 too.
GOLDEN_BY_CORPUS = [
    5.312611711743854,
    0.0,
    2.5533624480372223,
    1.6996968386613023,
    2.1773465007912463,
    4.998840831804056,
    1.0046637811758712,
    0.0,
    1.8556968829998597,
]


def tokens(caption):
    return [token for token in caption.split(" ") if token]


def split(references, hypotheses):
    return (
        {image_id: [tokens(caption) for caption in captions] for image_id, captions in references.items()},
        {image_id: tokens(caption) for image_id, caption in hypotheses.items()},
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


def random_captions(random, images, words):
    """What is hard: few words, so that n-grams repeat, no words, a reference twice, and as many of them as it happens.

    As the server holds them, tokens joined by spaces.
    """

    def caption():
        return " ".join(random.choices(words, k=random.randint(1, 12) if random.random() < 0.9 else 0))

    references = {image: [caption() for _ in range(random.randint(1, 6))] for image in range(images)}
    for captions in random.sample([*references.values()], images // 4):
        captions.append(random.choice(captions))
    references[0].append(words[0])  # pycocoevalcap's CIDEr fails where all references are empty
    return references, {image: caption() for image in references}


def assert_equals_pycocoevalcap(references, hypotheses):
    theirs_in = references, {image_id: [caption] for image_id, caption in hypotheses.items()}
    assert_same_scores(all_scores(*split(references, hypotheses)), *theirs_in)


def assert_same_scores(ours, references, hypotheses):
    """Compare our scores with theirs over captions that their tokenizer gave, or tokens joined by spaces."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    corpus, per_image = Bleu(4).compute_score(references, hypotheses, verbose=0)
    theirs = {f"BLEU-{n + 1}": (corpus[n], per_image[n]) for n in range(4)}
    theirs["ROUGE-L"] = Rouge().compute_score(references, hypotheses)
    theirs["CIDEr-D"] = Cider().compute_score(references, hypotheses)
    for metric, (corpus, per_image) in theirs.items():
        version = importlib.metadata.version("pycocoevalcap")
        assert ours[metric].corpus == pytest.approx(corpus, abs=1e-9), (metric, version)
        np.testing.assert_allclose(ours[metric].per_image, per_image, rtol=0, atol=1e-9, err_msg=f"{metric} {version}")


def test_equals_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    assert_equals_pycocoevalcap(REFERENCES, HYPOTHESES)
    random = Random(0)
    words = ["5\xa01/2", "\xa0", "a\u2003b", "x\x1cy", *(f"word{number}" for number in range(11))]
    for images in range(1, 61):
        random.shuffle(words)
        some = [f"word{images}", *words[: random.randint(0, len(words))]]
        assert_equals_pycocoevalcap(*random_captions(random, images, some))


SEPARATORS = "\r\v\f\x85\u2028\u2029"


def written_captions(images):
    """Five references and a hypothesis for each image, as people write: with what is hard to score here and there."""
    random = Random(0)
    words = ["a", "the", "The", "dog's", "isn't", "T-shirt,", "(left)", "5 1/2", *(f"word{n}" for n in range(2000))]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's law, as in a language

    def caption():
        return " ".join(random.choices(words, weights, k=random.randint(4, 16))).capitalize() + " outside."

    def vary(reference):
        some = reference.split(" ")
        some[random.randrange(len(some))] = random.choice(["a", "dog", "red,"])
        return " ".join(some[: random.randint(3, 14)])

    references = {image: [caption() for _ in range(5)] for image in range(images)}
    hypotheses = {}
    for image, captions in references.items():
        kind = random.randrange(20)
        hypotheses[image] = {0: "", 1: captions[0], 2: " .", 3: captions[1].upper()}.get(kind, vary(captions[2]))
        if kind in (4, 5):
            captions[1] = captions[0]
        if kind == 6:  # as long as two references are apart from it: a tie
            captions[3:] = [captions[2] + " again", " ".join(captions[2].split(" ")[1:])]
            hypotheses[image] = captions[2]
        if kind == 7:
            captions[4] = "..."
        if kind in (8, 9):
            separator = random.choice(SEPARATORS)
            captions[0] = captions[0].replace(" ", separator, 1)
            hypotheses[image] = hypotheses[image].replace(" ", separator)
    return references, hypotheses


def one_line(caption):
    return caption.translate(dict.fromkeys(map(ord, SEPARATORS), " "))


def tokens_of_pycocoevalcap(captions, monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    return PTBTokenizer().tokenize({key: [{"caption": one} for one in some] for key, some in captions.items()})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's tokenizer is a Java program")
def test_equals_pycocoevalcap_from_raw_captions_of_five_thousand_images(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    references, hypotheses = written_captions(5000)
    ours = score_captions(references, hypotheses)
    # It cannot read captions that hold a line separator; what it should have made of them is that these are spaces.
    theirs_in = (
        tokens_of_pycocoevalcap({key: [*map(one_line, some)] for key, some in references.items()}, monkeypatch),
        tokens_of_pycocoevalcap({key: [one_line(caption)] for key, caption in hypotheses.items()}, monkeypatch),
    )
    assert_same_scores(ours, *theirs_in)


@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's tokenizer is a Java program")
@pytest.mark.parametrize("separator", "\r\v\f\u2028")
def test_pycocoevalcap_moves_captions_behind_a_line_separator_and_we_do_not(monkeypatch, separator):
    pytest.importorskip("pycocoevalcap")
    captions = {"a": f"a dog{separator}runs", "b": "two cats", "c": "a red ball"}
    theirs = tokens_of_pycocoevalcap({key: [caption] for key, caption in captions.items()}, monkeypatch)
    assert theirs["b"] != ["two cats"]
    scores = score_captions({key: [caption] for key, caption in captions.items()}, captions)
    assert scores["ROUGE-L"].per_image == pytest.approx(1)
    other = score_captions({key: [one_line(caption)] for key, caption in captions.items()}, captions)
    assert other["CIDEr-D"].per_image == pytest.approx(scores["CIDEr-D"].per_image)


def test_equals_pycocoevalcap_by_given_document_frequencies():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    class Sized(list):  # the scorer takes the number of images from its list of references
        def __len__(self):
            return len(corpus)

    random = Random(1)
    words = [f"word{number}" for number in range(12)]
    for images in range(1, 21):
        corpus, _ = random_captions(random, 3 * images, [*words, "elsewhere", "5\xa01/2"])
        references, hypotheses = random_captions(random, images, [*words, "here", "5\xa01/2"])
        counted, scorer = CiderScorer(), CiderScorer()
        for captions in corpus.values():
            counted += ("", captions)
        counted.compute_doc_freq()
        for image, captions in references.items():
            scorer += (hypotheses[image], captions)
        scorer.document_frequency, scorer.crefs = counted.document_frequency, Sized(scorer.crefs)

        frequencies = DocumentFrequencies.from_references(split(corpus, {})[0])
        assert frequencies.images == len(corpus) and frequencies.counts == dict(counted.document_frequency)
        ours = cider_d(*split(references, hypotheses), document_frequencies=frequencies)
        np.testing.assert_allclose(ours.per_image, scorer.compute_cider(), rtol=0, atol=1e-9)


def test_bleu_agrees_with_nltk():
    # Another hand's code, without the constants that the server adds.
    from nltk.translate.bleu_score import corpus_bleu

    random = Random(1)
    texts = {image: [random.choices("abcdefgh", k=random.randint(4, 12)) for _ in range(6)] for image in range(200)}
    references = {image: captions[1:] for image, captions in texts.items()}
    hypotheses = {image: captions[0] for image, captions in texts.items()}
    scores = bleu(references, hypotheses)
    for n in range(1, 5):
        expected = corpus_bleu([*references.values()], [*hypotheses.values()], weights=[1 / n] * n)
        assert scores[f"BLEU-{n}"].corpus == pytest.approx(expected, abs=1e-8)


def test_bleu_by_hand():
    # 1-grams: "the" counts at most twice, 3 of 3; 2-grams: "the cat" of 2. 3 words against 6: exp(1 - 2).
    references, hypotheses = split({1: ["the cat sat on the mat"]}, {1: "the the cat"})
    scores = bleu(references, hypotheses)
    assert scores["BLEU-1"].corpus == pytest.approx(math.exp(-1), abs=1e-8)
    assert scores["BLEU-2"].corpus == pytest.approx(math.exp(-1) * math.sqrt(1 / 2), abs=1e-8)


def test_bleu_clips_by_the_reference_that_has_most():
    references, hypotheses = split({1: ["the cat", "the the", "the dog"]}, {1: "the the the the"})
    assert bleu(references, hypotheses)["BLEU-1"].corpus == pytest.approx(2 / 4)


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


def test_empty_captions_score_nothing_but_rouge_against_one_another():
    scores = all_scores({1: [[]], 2: [["a"], []], 3: [["a"]]}, {1: [], 2: [], 3: []})
    assert scores.pop("ROUGE-L").per_image.tolist() == [1, 1, 0]
    assert all(np.all(score.per_image == 0) and score.corpus == 0 for score in scores.values())


def test_a_no_break_space_is_between_words_but_not_for_rouge():
    references, hypotheses = {1: [["5\xa01/2", "balls"]], 2: [["a"]]}, {1: ["5"], 2: ["a"]}
    scores = all_scores(references, hypotheses)
    assert scores["BLEU-1"].per_image[0] == pytest.approx(math.exp(1 - 3))
    assert scores["ROUGE-L"].per_image[0] == 0
    # One of three words that weigh the same, and no bigram against two.
    assert scores["CIDEr-D"].per_image[0] == pytest.approx(10 * math.exp(-(2**2) / (2 * 6**2)) / math.sqrt(3) / 4)


def test_rewards_are_the_scores_of_the_images():
    references, hypotheses = split(REFERENCES, HYPOTHESES)
    scorer = CIDErD(references)
    score = scorer.score(hypotheses)
    assert score.corpus == pytest.approx(GOLDEN["CIDEr-D"][0], abs=1e-9)
    assert score.per_image == pytest.approx(GOLDEN["CIDEr-D"][1], abs=1e-9)
    expected = dict(zip(hypotheses, score.per_image, strict=True))
    image_ids = ["tie", "short", "empty", "tie", "no-break space", "short"]
    rewards = scorer.rewards(image_ids, [hypotheses[image_id] for image_id in image_ids])
    assert rewards == pytest.approx([expected[image_id] for image_id in image_ids], abs=1e-12)
    assert rewards.dtype == np.float64
    assert scorer.rewards([], []).shape == (0,)


def test_rewards_of_several_hypotheses_of_an_image():
    references = {1: [["a", "b"], ["a", "b"]], 2: [["c"], ["d"]]}
    rewards = CIDErD(references).rewards([2, 1, 2, 1, 1], [["c"], ["a", "b"], ["x"], [], ["x", "x"]])
    assert rewards == pytest.approx([10 / 4 / 2, 10 * 2 / 4, 0, 0, 0])


def test_two_unknown_ngrams_are_not_one_twice():
    # The words of a hypothesis weigh log 2 each, also those that no reference has: 1 / sqrt(3), or 1 / sqrt(5).
    references = {1: [["a", "b", "c"]], 2: [["d"]]}
    rewards = CIDErD(references).rewards([1, 1], [["a", "x", "y"], ["a", "x", "x"]])
    assert rewards == pytest.approx([10 / math.sqrt(3) / math.sqrt(3) / 4, 10 / math.sqrt(3) / math.sqrt(5) / 4])


def test_an_unknown_word_makes_no_known_ngram():
    # "x" counts in the norm and as a word only; the one bigram of the references is "a b".
    rewards = CIDErD({1: [["c"]], 2: [["a", "b"]]}).rewards([2, 2, 2], [["b", "x"], ["x", "b"], ["c", "x"]])
    assert rewards == pytest.approx([10 / 2 / 4, 10 / 2 / 4, 0])


def test_cider_by_given_document_frequencies():
    references, hypotheses = split(REFERENCES, HYPOTHESES)
    frequencies = DocumentFrequencies.from_references(split(CORPUS, {})[0])
    score = cider_d(references, hypotheses, document_frequencies=frequencies)
    assert score.per_image == pytest.approx(GOLDEN_BY_CORPUS, abs=1e-9)
    scorer = CIDErD(references, frequencies)
    assert scorer.score(hypotheses).per_image == pytest.approx(GOLDEN_BY_CORPUS, abs=1e-9)
    assert scorer.rewards([*hypotheses], [*hypotheses.values()]) == pytest.approx(GOLDEN_BY_CORPUS, abs=1e-9)
    own = DocumentFrequencies.from_references(references)
    score = cider_d(references, hypotheses, document_frequencies=own)
    assert score.per_image == pytest.approx(GOLDEN["CIDEr-D"][1], abs=1e-9)


def test_one_image_has_a_score_by_the_frequencies_of_others():
    frequencies = DocumentFrequencies.from_references({1: [["a", "dog"]], 2: [["a", "cat"]]})
    assert cider_d({7: [["dog"]]}, {7: ["dog"]}, document_frequencies=frequencies).corpus == pytest.approx(10 / 4)
    assert cider_d({7: [["a"]]}, {7: ["a"]}, document_frequencies=frequencies).corpus == 0  # in every image


def test_document_frequencies_count_an_image_once():
    frequencies = DocumentFrequencies.from_references({1: [["a", "b", "a"], ["a"], []], "2": [["5\xa0a"]]})
    assert frequencies.images == 2
    assert frequencies.counts == {
        ("a",): 2,
        ("b",): 1,
        ("5",): 1,
        ("a", "b"): 1,
        ("b", "a"): 1,
        ("5", "a"): 1,
        ("a", "b", "a"): 1,
    }
    assert set(map(len, DocumentFrequencies.from_references({1: [[*"abcdef"]]}).counts)) == {1, 2, 3, 4}


def test_the_fingerprint_is_that_of_the_frequencies_in_any_order():
    corpus, _ = split(CORPUS, {})
    frequencies = DocumentFrequencies.from_references(corpus)
    assert frequencies.fingerprint == "c4ad6196ef4f3622"  # in every process and every release
    other_order = {image_id: captions[::-1] for image_id, captions in reversed(corpus.items())}
    others = [
        DocumentFrequencies.from_references(other_order),
        DocumentFrequencies.from_references({f"image {image_id}": captions for image_id, captions in corpus.items()}),
        DocumentFrequencies(5, dict(reversed(frequencies.counts.items()))),
    ]
    assert {other.fingerprint for other in others} == {frequencies.fingerprint}

    counts = {**frequencies.counts}
    different = [
        DocumentFrequencies(6, counts),
        DocumentFrequencies(5, {**counts, ("dog",): 2}),
        DocumentFrequencies(5, {**counts, ("dogs",): 1}),
        DocumentFrequencies(5, {ngram: count for ngram, count in counts.items() if ngram != ("dog",)}),
    ]
    assert len({frequencies.fingerprint, *(one.fingerprint for one in different)}) == 5


def test_document_frequencies_that_no_corpus_has():
    with pytest.raises(InputError, match="no references to count"):
        DocumentFrequencies.from_references({})
    with pytest.raises(InputError, match="Image 8 has no reference"):
        DocumentFrequencies.from_references({1: [["a"]], 8: []})
    with pytest.raises(InputError, match="1 to 3 do not fit 2 images"):
        DocumentFrequencies(2, {("a",): 3, ("b",): 1})
    with pytest.raises(InputError, match="0 to 1 do not fit 2 images"):
        DocumentFrequencies(2, {("a",): 0, ("b",): 1})
    with pytest.raises(InputError, match="do not fit 0 images"):
        DocumentFrequencies(0, {})


def test_rewards_name_what_is_wrong():
    with pytest.raises(InputError, match="no references to count"):
        CIDErD({})
    with pytest.raises(InputError, match="Image 8 has no reference"):
        CIDErD({1: [["a"]], 8: []}, DocumentFrequencies(1, {}))
    scorer = CIDErD({1: [["a"]], 2: [["b"]]})
    with pytest.raises(InputError, match="Image '1' has no references .* give the references of every image"):
        scorer.rewards([1, "1"], [["a"], ["a"]])
    with pytest.raises(InputError, match="1 hypotheses have 2 image ids"):
        scorer.rewards([1, 2], [["a"]])
    with pytest.raises(InputError, match="1 of 2 images with references have no caption to score, the first is 2"):
        scorer.score({1: ["a"]})
    with pytest.raises(InputError, match="1 of 3 captioned images have no reference, the first is 3"):
        scorer.score({1: ["a"], 2: ["b"], 3: ["c"]})


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


def test_five_thousand_images_take_seconds_and_a_batch_of_rewards_milliseconds():
    random = Random(0)
    words = [f"word{number}" for number in range(2000)]

    def caption():
        return random.choices(words, k=11)

    references = {image: [caption() for _ in range(5)] for image in range(5000)}
    hypotheses = {image: caption() for image in references}
    start = time.perf_counter()
    all_scores(references, hypotheses)
    assert time.perf_counter() - start < 8  # about 1 s; a busy machine may take longer

    scorer = CIDErD(references)
    image_ids = [image for image in range(32) for _ in range(5)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        scorer.rewards(image_ids, [hypotheses[image] for image in image_ids])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # about 3 ms


def test_bootstrap_tells_a_difference_from_noise():
    random = np.random.default_rng(1)
    scores = random.normal(1, 1, size=500)  # images differ by far more than the models
    ours = Score.mean(scores)
    better = paired_bootstrap(Score.mean(scores + 0.05 + random.normal(0, 0.1, size=500)), ours)
    assert 0 < better.low < better.difference < better.high
    assert better.difference == pytest.approx(0.05, abs=0.02)
    assert better.distinguishable
    assert not paired_bootstrap(Score.mean(scores + random.normal(0, 0.1, size=500)), ours).distinguishable
    assert not paired_bootstrap(ours, ours).distinguishable


def test_bootstrap_interval_is_that_of_the_mean():
    scores = np.random.default_rng(0).normal(0.3, 1, size=400)
    error = scores.std() / math.sqrt(400)
    interval = bootstrap(Score.mean(scores), resamples=4000)
    comparison = paired_bootstrap(Score.mean(scores), Score.mean(np.zeros(400)), resamples=4000)
    for low, high in (interval, (comparison.low, comparison.high)):
        assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.01)
        assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.01)


def test_a_resampled_score_is_that_of_the_images_repeated():
    references, hypotheses = split(REFERENCES, HYPOTHESES)
    counts = np.random.default_rng(2).integers(0, 4, size=len(hypotheses))
    repeated = [(image, time) for image, count in zip(hypotheses, counts, strict=True) for time in range(count)]
    again = (
        {(image, time): references[image] for image, time in repeated},
        {(image, time): hypotheses[image] for image, time in repeated},
    )
    scores = {**bleu(references, hypotheses), "ROUGE-L": rouge_l(references, hypotheses)}
    for metric, expected in {**bleu(*again), "ROUGE-L": rouge_l(*again)}.items():
        assert scores[metric].over(counts) == pytest.approx(expected.corpus)
    # Of CIDEr-D the document frequencies stay those of the whole set.
    frequencies = DocumentFrequencies.from_references(references)
    expected = cider_d(*again, document_frequencies=frequencies)
    assert cider_d(references, hypotheses).over(counts) == pytest.approx(expected.corpus)


def test_a_score_over_every_image_once_is_the_score():
    references, hypotheses = split(REFERENCES, HYPOTHESES)
    for score in all_scores(references, hypotheses).values():
        assert score.over(np.ones(len(hypotheses), np.int64)) == pytest.approx(score.corpus)


def test_bootstrap_repeats_itself_and_turns_round():
    first, second = map(Score.mean, np.random.default_rng(0).normal(size=(2, 50)))
    forwards, backwards = paired_bootstrap(first, second, seed=3), paired_bootstrap(second, first, seed=3)
    assert forwards == paired_bootstrap(first, second, seed=3)
    assert bootstrap(first, seed=3) == bootstrap(first, seed=3) != bootstrap(first, seed=4)
    assert backwards == pytest.approx((-forwards.difference, -forwards.high, -forwards.low))


def test_bootstrap_needs_the_same_images():
    with pytest.raises(InputError, match="Scores of 3 and 4 images cannot be compared"):
        paired_bootstrap(Score.mean(np.zeros(3)), Score.mean(np.zeros(4)))


def test_bootstrap_needs_figures_for_each_image():
    with pytest.raises(InputError, match="cannot be resampled"):
        bootstrap(Score(0.3, np.zeros(3)))


def test_diversity_by_hand():
    captions = [caption.split() for caption in ("a dog on a", "a dog", "a dog", "")]
    described = diversity(captions, training=[["a", "dog"], ["a", "cat"]])
    assert described == Diversity(captions=4, distinct=3, vocabulary=3, mean_length=2.0, bad_endings=0.25, new=0.5)
    assert diversity(captions).new is None
    with pytest.raises(InputError, match="no caption to describe"):
        diversity([])
