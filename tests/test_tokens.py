from pathlib import Path

import pytest

from captioner.annotation_files import Flickr8k
from captioner.tokens import detokenize, mirror, tokenize

FLICKR8K = Path(__file__).parents[2] / "shared" / "flickr8k"

# The expected tokens are those of COCO's own tokenizer (Stanford CoreNLP 3.4.1 as pycocoevalcap 1.2 calls it).
AS_COCO = {
    "A child in a pink dress is climbing .": "a child in a pink dress is climbing",
    "A dog's ball , two dogs' balls": "a dog 's ball two dogs balls",
    "A DOG CAN'T, I'm, don't": "a dog ca n't i 'm do n't",
    "cannot gonna wanna": "can not gon na wan na",
    "its a lens ( almost fish eye )": "its a lens -lrb- almost fish eye -rrb-",
    'A sign that says , " Red Light . "': "a sign that says red light",
    'He said "hi."': "he said hi",
    "word. Word": "word word",
    "one thing. another": "one thing another",
    "A dog. it runs. Mr. Smith vs. St. John": "a dog it runs mr. smith vs. st. john",
    "It is 5 p.m.": "it is 5 p.m.",
    "in Washington D.C.": "in washington d.c.",
    "(a dog).": "-lrb- a dog -rrb-",
    "number 5.": "number 5",
    "“Hi” he said’s": "hi he said 's",
    "don’t go…": "do n't go",
    "a dog .. runs . . . now...": "a dog runs now",
    "mother-in-law - x -- y": "mother-in-law x y",
    "1,000 and 2.5": "1,000 and 2.5",
    "a $5 bill": "a $ 5 bill",
}


@pytest.mark.parametrize("caption", AS_COCO)
def test_tokens_are_those_of_coco(caption):
    assert tokenize(caption) == AS_COCO[caption].split()


@pytest.mark.parametrize(
    "separator", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\t", "\xa0"]
)
def test_line_separators_are_spaces(separator):
    assert tokenize(f"a dog{separator}runs{separator}") == ["a", "dog", "runs"]


def test_composed_and_decomposed_letters_are_the_same():
    assert tokenize("cafe\u0301") == tokenize("caf\u00e9") == ["caf\u00e9"]
    assert tokenize("\u1100\u1161") == ["\uac00"]  # Hangul


@pytest.mark.parametrize("caption", ["", " ", ".", " . \n", "\u2026", "?"])
def test_nothing_is_no_token(caption):
    assert tokenize(caption) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("a dog 's ball is n't red", "a dog's ball isn't red"),
        ("they 're here and i 've seen they 'll run", "they're here and i've seen they'll run"),
        ("we can not go", "we can not go"),
        ("'s ball", "'s ball"),
        ("", ""),
    ],
)
def test_detokenize_closes_contractions(words, text):
    assert detokenize(words.split()) == text
    assert tokenize(text) == words.split()


def test_a_mirrored_caption_exchanges_left_and_right():
    words = tokenize("Left of the dog, a left-handed man turns right.")
    assert mirror(words) == ["right", "of", "the", "dog", "a", "left-handed", "man", "turns", "left"]
    assert mirror(mirror(words)) == words and mirror([]) == []


@pytest.mark.parametrize("caption", AS_COCO)
def test_tokens_survive_detokenizing(caption):
    tokens = tokenize(caption)
    assert tokenize(detokenize(tokens)) == tokens


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k in ../shared")
def test_tokens_of_flickr8k_survive_detokenizing():
    for image in Flickr8k(FLICKR8K).read("dev"):
        for caption in image.captions:
            tokens = tokenize(caption)
            assert tokens, caption
            assert tokenize(detokenize(tokens)) == tokens
