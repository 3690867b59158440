import itertools
import json
import pickle
import random
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captioner.errors import InputError
from captioner.tokens import normalise
from captioner.vocabulary import (
    BEGIN,
    BYTES,
    END,
    PAD,
    SPECIAL,
    UNKNOWN,
    BytePairs,
    Characters,
    Vocabulary,
    WordBeginnings,
    pad,
    restore,
)

CAPTIONS = [["a", "dog", "runs"], ["a", "cat", "runs"], ["a", "bird"]]


def test_special_words_have_ids_of_their_own_before_the_others():
    vocabulary = Vocabulary(["dog", "cat"])
    assert (PAD, BEGIN, END, UNKNOWN) == (0, 1, 2, 3) and len(set(SPECIAL)) == 4
    assert len(vocabulary) == 6
    assert vocabulary.encode(["cat", "dog"], 5) == [BEGIN, 5, 4, END]


def test_words_are_ordered_by_frequency_then_spelling():
    assert Vocabulary.from_captions(CAPTIONS).words == ("a", "runs", "bird", "cat", "dog")


def test_the_order_of_the_captions_does_not_matter():
    shuffled = random.Random(0).sample(CAPTIONS, 3)
    assert shuffled != CAPTIONS
    assert Vocabulary.from_captions(shuffled) == Vocabulary.from_captions(CAPTIONS)


@pytest.mark.parametrize(("minimum_count", "words"), [(2, ("a", "runs")), (3, ("a",)), (4, ())])
def test_rarer_words_are_unknown(minimum_count, words):
    vocabulary = Vocabulary.from_captions(CAPTIONS, minimum_count)
    assert vocabulary.words == words
    assert vocabulary.encode(["dog"], 5) == [BEGIN, UNKNOWN, END]


def test_a_caption_cannot_say_a_special_word():
    vocabulary = Vocabulary.from_captions([["<eos>", "dog", "<pad>"]])
    assert vocabulary.words == ("dog",)
    assert vocabulary.encode(["<eos>", "dog"], 5) == [BEGIN, UNKNOWN, 4, END]


def test_a_cut_caption_does_not_end():
    vocabulary = Vocabulary.from_captions(CAPTIONS)
    assert vocabulary.encode(["a", "dog", "runs"], 3) == [BEGIN, 4, 8, 5, END]
    assert vocabulary.encode(["a", "dog", "runs"], 2) == [BEGIN, 4, 8]


def test_decoding_gives_the_words_back():
    vocabulary = Vocabulary.from_captions(CAPTIONS)
    assert vocabulary.decode(vocabulary.encode(CAPTIONS[0], 5)) == CAPTIONS[0]


def test_decoding_stops_at_the_first_end_and_skips_padding():
    vocabulary = Vocabulary(["dog", "cat"])
    assert vocabulary.decode([BEGIN, 4, PAD, UNKNOWN, END, 5, END]) == ["dog", "<unk>"]
    assert vocabulary.decode([]) == []


def test_a_word_that_stands_twice_is_an_error():
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["dog", "dog"])


def test_vocabularies_are_equal_where_their_ids_are():
    assert Vocabulary(["dog", "cat"]) == Vocabulary(("dog", "cat"))
    assert Vocabulary(["dog", "cat"]) != Vocabulary(["cat", "dog"])
    assert Vocabulary(["dog"]) != ["dog"]


def test_images_with_fewer_or_shorter_captions_are_padded():
    padded = pad([[[BEGIN, 4, END], [BEGIN, END]], [[BEGIN, 5, 4, END]]])
    assert padded.tolist() == [
        [[BEGIN, 4, END, PAD], [BEGIN, END, PAD, PAD]],
        [[BEGIN, 5, 4, END], [PAD, PAD, PAD, PAD]],
    ]


def test_unknown_words_are_named_once_in_their_order():
    assert Vocabulary(["a", "dog"]).unknown("zebra a <unk> zebra dog ball".split()) == ["zebra", "<unk>", "ball"]


# Characters and byte pairs

TEXTS = [
    "A dog's ball, red!",
    "빨간 원이 파란 정사각형 위에 있다",
    "草地上的狗 iPhone",
    "हिन्दी में कुत्ता",
    "👩‍👩‍👧 ok",
    "a dog runs to a dog",
]
PARTS = {"characters": Characters.train(TEXTS), "byte pairs": BytePairs.train(TEXTS * 2, 330, 2)}
KNOWN = "".join(sorted({character for text in TEXTS for character in text}))
quickly = settings(deadline=None, max_examples=40)
each_kind = pytest.mark.parametrize("vocabulary", PARTS.values(), ids=PARTS)


@each_kind
@quickly
@given(st.text(st.sampled_from(KNOWN + "\n\u3000\u1100\u1161"), max_size=20))
def test_a_text_of_known_symbols_comes_back(vocabulary, text):
    assume("\u1100" not in text.replace("\u1100\u1161", "") and "\u1161" not in text.replace("\u1100\u1161", ""))
    assume(not vocabulary.unknown(vocabulary.cut(text)))
    units = vocabulary.cut(text)
    wanted = " ".join(unicodedata.normalize("NFC", text).split())
    assert vocabulary.join(units) == wanted == vocabulary.text(vocabulary.encode(units, len(units)))
    assert "".join(word.text for word in vocabulary.read(units)) == wanted.replace(" ", "")


@each_kind
@quickly
@given(st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Mn", "So", "Lo"]), max_size=9))
def test_any_text_is_cut_and_read(vocabulary, text):
    units = vocabulary.cut(text)
    ids = vocabulary.encode(units, 99)
    assert all(0 <= index < len(vocabulary) for index in ids)
    assert [index == UNKNOWN for index in ids[1:-1]] == [unit not in vocabulary.words for unit in units]
    assert vocabulary.join(units) == normalise(text)
    assert vocabulary.decode(ids) == [unit if unit in vocabulary.words else "<unk>" for unit in units]
    if vocabulary.units == "byte_pairs":
        assert UNKNOWN not in ids


@each_kind
@quickly
@given(st.lists(st.integers(0, 150), max_size=12), st.randoms(use_true_random=False))
def test_whatever_a_model_says_is_text(vocabulary, ids, chance):
    ids = [index % len(vocabulary) for index in ids] + [chance.randrange(len(vocabulary)) for _ in range(6)]
    text = vocabulary.text(ids)
    assert text.encode().decode() == text == normalise(text) and "\ufffd" not in text
    units = vocabulary.decode(ids)
    words = vocabulary.read(units)
    assert all(word.text and " " not in word.text for word in words)
    assert all(first.stop == second.start for first, second in itertools.pairwise(words))
    assert normalise("".join(word.text for word in words)) == normalise(text.replace(" ", ""))


def test_words_are_read_as_people_do():
    read = {
        name: [[word.text for word in vocabulary.read(vocabulary.cut(text))] for text in TEXTS]
        for name, vocabulary in PARTS.items()
    }
    assert read["characters"][0] == read["byte pairs"][0] == ["A", "dog's", "ball,", "red!"]
    assert read["characters"][1] == read["byte pairs"][1] == TEXTS[1].split()
    assert read["characters"][2] == [*"草地上的狗", "iPhone"]
    assert read["characters"][3] == read["byte pairs"][3] == TEXTS[3].split()


def test_the_units_of_a_word_hold_the_space_before_it():
    words = PARTS["characters"].read(list("a dog "))
    assert words == [("a", 0, 1), ("dog", 1, 5)]


def test_bytes_that_make_no_character_never_surface():
    byte_pairs = PARTS["byte pairs"]
    syllable = [next(unit for unit, byte in BYTES.items() if byte == each) for each in "원".encode()]
    assert byte_pairs.join(syllable) == "원" and byte_pairs.join(syllable[:2]) == "" == byte_pairs.join(syllable[1:])
    assert byte_pairs.join([*syllable[:2], "a"]) == "a" and byte_pairs.read(syllable[:2]) == []
    assert byte_pairs.read([*syllable[:2], "a"]) == [("a", 0, 3)]


def test_byte_pairs_are_the_same_in_whatever_order_the_captions_come():
    texts = [f"{colour} {shape}" for colour in ("red", "blue", "빨간") for shape in ("원", "circle", "star")] * 3
    again = [BytePairs.train(random.Random(seed).sample(texts, len(texts)), 280) for seed in range(3)]
    assert all(one == BytePairs.train(texts, 280) for one in again) and len(again[0].words) == 280
    assert again[0] != BytePairs.train(texts, 270)


def test_too_few_byte_pairs_are_refused():
    with pytest.raises(InputError, match="255 byte pairs are too few.*256 or more"):
        BytePairs.train(TEXTS, 255)


def test_rare_characters_are_unknown_and_a_long_caption_does_not_end():
    vocabulary = Characters.train(["aab", "ab c"], minimum_count=2)
    assert vocabulary.words == ("a", "b") and vocabulary.unknown(vocabulary.cut("abcc ")) == ["c"]
    assert vocabulary.encode(list("abab"), 3) == [BEGIN, 4, 5, 4]


def test_kinds_of_the_same_units_differ():
    assert Characters(["a", "b"]) != Vocabulary(["a", "b"]) != Vocabulary(["a", "b"], "unicode")
    assert str(Characters(["a"] + ["b"])) == "2 characters" and str(PARTS["byte pairs"]).endswith(" byte pairs")


# Filters


def following(vocabulary, said, banned=(), ngram=0):
    """What of the vocabulary may not follow."""
    ids = vocabulary.encode(vocabulary.cut(said), 99)[1:-1]
    return {vocabulary.words[index - 4] for index in vocabulary.filter(banned, ngram)(ids)}


def test_no_word_begins_with_a_banned_one():
    characters = PARTS["characters"]
    assert following(characters, "a do", ["dog"]) == {"g"} and following(characters, "do", ["Dog"]) == {"g"}
    assert following(characters, "a o", ["dog"]) == set() == following(characters, "ado", ["dog"])
    assert following(characters, "草", ["地上"]) == set() and following(characters, "草地", ["地上"]) == {"上"}
    byte_pairs = PARTS["byte pairs"]
    assert "Ġdog" in byte_pairs.words
    assert following(byte_pairs, "a", ["dog"]) == {"Ġdog"}
    split = byte_pairs.encode([*byte_pairs.cut("a"), "Ġ", "d", "o"], 99)[1:-1]  # as it would not cut it itself
    assert "g" in {byte_pairs.words[index - 4] for index in byte_pairs.filter(["dog"], 0)(split)}
    assert characters.filter([], 0) is None is Vocabulary(["a"]).filter(["a"], 2)


def test_no_sequence_of_words_is_said_twice():
    characters, byte_pairs = PARTS["characters"], PARTS["byte pairs"]
    assert following(characters, "a dog runs to a do", ngram=2) == {"g"}
    assert following(characters, "a dog runs to a", ngram=2) == set() == following(characters, "a dog do", ngram=2)
    assert following(characters, "a dog do", ngram=1) == {"g"} and following(characters, "do", ngram=1) == set()
    assert following(characters, "草地草", ngram=2) == {"地"} and following(characters, "草地", ngram=1) == {"草", "地"}
    assert following(byte_pairs, "a dog runs to a", ngram=2) == {"Ġdog"}
    assert following(byte_pairs, "a dog", ngram=2) == set()
    assert {"Ġdog", "Ġa"} == following(byte_pairs, "a dog", ngram=1)


@each_kind
@quickly
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_what_the_filter_leaves_has_no_repetition_and_no_banned_word(vocabulary, chance, number):
    allowed, ids = vocabulary.filter(["dog", "한", "草"], number), []
    favourites = vocabulary.encode([*" adog草地", "Ġ", "Ġa", "Ġdog"], 99)[1:-1]
    for _ in range(15):
        left = sorted(set(favourites) - {UNKNOWN, *allowed(ids)})
        if not left:
            break
        ids.append(chance.choice(left))
    words = [word.text for word in vocabulary.read(vocabulary.decode(ids))][:-1]  # the last may go on
    ngrams = [tuple(words[place : place + number]) for place in range(len(words) - number + 1)]
    assert len(set(ngrams)) == len(ngrams), words
    assert not any(word.startswith("dog") or "草" in word for word in words)


# What checkpoints keep


@pytest.mark.parametrize(
    "vocabulary", [Vocabulary(["a"]), Vocabulary(["a"], "unicode"), *PARTS.values()], ids=["ptb", "unicode", *PARTS]
)
def test_a_vocabulary_is_restored_from_plain_json(vocabulary):
    words, stored = json.loads(json.dumps([vocabulary.words, vocabulary.stored]))
    again = restore(words, stored, "a.ckpt")
    assert again == vocabulary and type(again) is type(vocabulary)
    assert [again.cut(text) for text in TEXTS] == [vocabulary.cut(text) for text in TEXTS]
    assert pickle.loads(pickle.dumps(again)) == again


def test_words_are_taught_with_what_they_begin_with():
    captions = [
        text.split() for text in ("빨간 별이 있다", "빨간 별은 큰 별과", "정사각형이 정사각형의", "별자리 있고")
    ]
    taught = WordBeginnings(captions)
    # 별 begins four words and 있 two; 정사각 begins none but those of 정사각형.
    words = {word for caption in captions for word in caption}
    assert set(taught.words) == words | {"별", "있", "정사각형"}
    assert taught.cut("빨간 별이 정사각형이") == ["빨간", "별", "별이", "정사각형", "정사각형이"]
    assert set(WordBeginnings(captions, 2).words) == {"빨간", "별", "있", "정사각형"}
    assert len(taught.encode(taught.cut("별이 " * 100), taught.longest)) == 202


BYTE_WORDS = list(PARTS["byte pairs"].words)


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ("abc", None),
        (["a", 1], None),
        (["a", "a"], None),
        (["a", ""], None),
        (["<eos>"], None),
        (["\ud800"], {"units": "characters"}),
        (["a"], []),
        (["a"], {}),
        (["a"], {"units": "sentences"}),
        (["a"], {"units": ["words"]}),
        (["a"], {"units": "words"}),
        (["a"], {"units": "words", "tokenizer": "moses"}),
        (["a"], {"units": "words", "tokenizer": ["ptb"]}),
        (["ab"], {"units": "characters"}),
        (["a"], {"units": "byte_pairs", "merges": []}),
        (BYTE_WORDS, {"units": "byte_pairs"}),
        (BYTE_WORDS, {"units": "byte_pairs", "merges": 3}),
        (BYTE_WORDS, {"units": "byte_pairs", "merges": [["a", "b", "c"]]}),
        (BYTE_WORDS, {"units": "byte_pairs", "merges": [["q", "x"]]}),
        (BYTE_WORDS, {"units": "byte_pairs", "merges": [[1, 2]]}),
        (BYTE_WORDS, {"units": "byte_pairs", "merges": [[["a"], "b"]]}),
        ([*BYTE_WORDS, "원"], {"units": "byte_pairs", "merges": []}),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_one_sentence(words, stored):
    with pytest.raises(InputError, match=r"^The vocabulary in a.ckpt cannot be used \([^()]+\): take another[^.]+\.$"):
        restore(words, stored, "a.ckpt")
