import random

import pytest

from captioner.vocabulary import BEGIN, END, PAD, SPECIAL, UNKNOWN, Vocabulary, pad

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
