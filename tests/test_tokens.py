import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.annotation_files import Flickr8k
from captioner.tokens import choose_tokenizer, detokenize, mirror, mirror_text, normalise, tokenize

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


# Other languages

WORDS = {
    "빨간 원이 파란 별 위에 있다.": "빨간 원이 파란 별 위에 있다",
    "草地上的狗。": "草 地 上 的 狗",
    "これはカメラの犬です": "こ れ は カメラ の 犬 で す",
    "คนไทย": "ค น ไ ท ย",
    "หมา ดี": "ห ม า ดี",
    "हिन्दी में": "हिन्दी में",
    "שלום, עולם!": "שלום עולם",
    "Кошка и 3.14 т. п.": "кошка и 3.14 т п",
    "L’homme, the well-known dog's ball": "l’homme the well known dog's ball",
    "Ein Hund 👩‍👩‍👧🇰🇷 ½ €5": "ein hund 👩‍👩‍👧 🇰🇷 ½ € 5",
    "می‌خواهم": "می‌خواهم",
}


@pytest.mark.parametrize("caption", WORDS)
def test_words_of_other_languages(caption):
    words = WORDS[caption].split(" ")
    assert tokenize(caption, "unicode") == words
    for form in ("NFD", "NFC"):
        assert tokenize(unicodedata.normalize(form, caption), "unicode") == words


@pytest.mark.parametrize("caption", ["草地上的狗和iPhone", "これはカメラの犬です", "빨간 원이 있다", "คนไทย"])
def test_words_are_joined_as_their_script_does(caption):
    joined = detokenize(tokenize(caption, "unicode"), "unicode")
    assert joined == caption.lower().replace("和i", "和 i")


ANYTHING = st.text(st.characters() | st.sampled_from("가각한ᄒ\u0301\u200d\ud83d 草カナーกำ🇰👩"), max_size=12)


@settings(deadline=None, max_examples=50)
@given(ANYTHING)
def test_words_joined_and_cut_again_are_the_same(text):
    words = tokenize(text, "unicode")
    assert all(words) and not any(word.isspace() for word in words)
    assert tokenize(unicodedata.normalize("NFD", normalise(text)), "unicode") == words
    letters = regex.compile(r"\p{L}+")  # marks that stand alone may join a neighbour
    if all(letters.fullmatch(word) for word in words):
        assert tokenize(detokenize(words, "unicode"), "unicode") == words


@settings(deadline=None, max_examples=50)
@given(ANYTHING)
def test_a_normalised_caption_stays_so_and_can_be_written(text):
    once = normalise(text)
    assert normalise(once) == once and once.encode() is not None
    whole = "".join("\ufffd" if unicodedata.category(character) == "Cs" else character for character in text)
    assert once.split() == unicodedata.normalize("NFC", whole).split()


@pytest.mark.parametrize(
    ("captions", "chosen"),
    [
        (["A dog runs."], "ptb"),
        (["Ein Hund läuft über die Straße."], "ptb"),
        (["빨간 원"], "unicode"),
        (["iPhone의 사진이 있다"], "ptb"),  # six letters of twelve
        (["iPhone의 사진들이 있다"], "unicode"),
        (["A dog", "草地上的狗"], "unicode"),
        (["123 👩 !"], "ptb"),
        ([], "ptb"),
    ],
)
def test_the_script_chooses_the_tokenizer_where_nobody_does(captions, chosen):
    assert choose_tokenizer(captions) == chosen
    for choice in ("ptb", "unicode"):
        assert choose_tokenizer(captions, choice) == choice


def test_a_mirrored_text_exchanges_left_and_right():
    text = "Left of the dog, a left-handed man; leftover right."
    assert mirror_text(text) == "Right of the dog, a right-handed man; leftover left."
    assert mirror_text(mirror_text(text)) == text
