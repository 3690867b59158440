import re

import pytest

from captioner.decoding import Decoding
from captioner.errors import InputError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beam_size": 0}, "beam_size is 0: give 1"),
        ({"length_penalty": -0.1}, "length_penalty is -0.1: give 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"min_words": -1}, "min_words is -1"),
        ({"max_words": -1}, "max_words is -1"),
        ({"min_words": 9, "max_words": 8}, "min_words 9 is more than max_words 8"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"captions": 0}, "captions is 0"),
        ({"captions": 6}, "beam of 5 does not hold 6 captions: set beam_size to 6"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 2}, "2 groups cannot share out a beam of 5"),
        ({"groups": 5, "diversity": -1}, "diversity is -1"),
        ({"sample": True, "groups": 5}, "leave out one"),
        ({"sample": True, "temperature": 0}, "temperature is 0"),
        ({"sample": True, "temperature": float("inf")}, "temperature is inf"),
        ({"sample": True, "top_k": -1}, "top_k is -1"),
        ({"sample": True, "top_p": 0}, "top_p is 0"),
        ({"sample": True, "top_p": 1.1}, "top_p is 1.1"),
        ({"sample": True, "seed": -1}, "seed is -1"),
        ({"temperature": 0.5}, "temperature has no effect without sample: set sample"),
        ({"top_k": 5}, "top_k has no effect without sample"),
        ({"top_p": 0.5}, "top_p has no effect without sample"),
        ({"diversity": 0.7}, "diversity has no effect without groups: set groups"),
        ({"diversity": 0.7, "sample": True}, "diversity has no effect without groups"),
        ({"ban": "dog"}, r"give \['dog'\]"),
        ({"begin_with": "a photo of", "max_words": 2}, "'a photo of' is longer than max_words 2"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings, said):
    with pytest.raises(InputError) as error:
        Decoding(**settings)
    text = str(error.value)
    assert re.search(said, text.replace("`", ""))
    assert text.endswith(".") and not re.search(r"[.!?]\s", text) and "\n" not in text


def test_settings_at_their_ends_are_taken():
    Decoding(beam_size=1, length_penalty=0, max_words=0)
    Decoding(min_words=20, captions=5, groups=5, diversity=0)
    Decoding(sample=True, captions=100, top_p=1, temperature=1e-3)
    Decoding(begin_with="a photo of", max_words=3)


def test_a_decoding_may_be_compared_and_looked_up():
    assert Decoding(ban=["dog"]) == Decoding(ban=("dog",)) and {Decoding(): 1}[Decoding()] == 1
