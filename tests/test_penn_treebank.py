"""The tokens against CoreNLP's own: `python tests/test_penn_treebank.py` writes its tokens into golden_tokens.json."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captioner import penn_treebank
from captioner.penn_treebank import DROPPED, ptb_tokenize
from captioner.tokens import detokenize, tokenize

FLICKR8K = Path(__file__).parents[2] / "shared" / "flickr8k"
GOLDEN_FILE = Path(__file__).with_name("golden_tokens.json")
GOLDEN: dict[str, list[str]] = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
PLAIN_ENGLISH = [caption for caption in GOLDEN if re.fullmatch(r"[A-Za-z0-9 ,.!?;:'\"()-]*", caption)]
SEPARATORS = ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"]
NEUTRAL = "zz"  # CoreNLP's rules look across line ends, so a line that changes nothing stands between two captions


def tokens_of_java(captions: Sequence[str], neutral: str | None = NEUTRAL) -> list[list[str]]:
    """Return the tokens of each caption by pycocoevalcap's own class, one caption an image."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    images = {}
    for number, caption in enumerate(captions):
        images[number, caption] = [{"caption": caption}]
        if neutral is not None:
            images[number, None] = [{"caption": neutral}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8")
        tokenized = PTBTokenizer().tokenize(images)
    assert all(tokenized[image] == [neutral] for image in images if image[1] is None)
    lines = [tokenized[image][0] for image in images if image[1] is not None]
    return [[token for token in line.split(" ") if token] for line in lines]


def why_not_live() -> str:
    if shutil.which("java") is None:
        return "needs Java"
    if find_spec("pycocoevalcap") is None:
        return "needs pycocoevalcap"
    (folder,) = find_spec("pycocoevalcap").submodule_search_locations
    writable = os.access(Path(folder) / "tokenizer", os.W_OK)
    return "" if writable else "needs pycocoevalcap where it may write, as its tokenizer does beside itself"


live = pytest.mark.skipif(bool(why_not_live()), reason=why_not_live() or "none")


def pieces(seed: int, number: int) -> Iterator[str]:
    """Words of the golden captions, glued together, in a row or taken apart."""
    random = Random(seed)
    # CoreNLP reads UTF-16 and has its own notion of the last sigma of a word; both are seen among golden captions.
    words = [word for caption in GOLDEN for word in caption.split(" ")]
    words = [word for word in words if not re.search("[\u03a3\U00010000-\U0010ffff]", word)]
    letters = "".join(words)
    for _ in range(number):
        kind = random.random()
        if kind < 0.4:
            yield "".join(random.choices(words, k=random.randint(1, 4)))
        elif kind < 0.7:
            yield " ".join("".join(random.choices(words, k=random.choice([1, 1, 2]))) for _ in range(3))
        else:
            yield "".join(random.choices(letters, k=random.randint(1, 9)))


def as_people_write(caption: str) -> str:
    """Return a caption of Flickr8k without the spaces before and behind its punctuation."""
    caption = re.sub(r" ([.,!?;:)]|(?:'s|n't|'ll|'re|'d|'m|'ve)\b)", r"\1", caption)
    return re.sub(r'" ([^"]*?) "', r'"\1"', caption.replace("( ", "("))


def assert_equal(captions: Sequence[str], expected: Sequence[list[str]]) -> None:
    pairs = zip(captions, expected, strict=True)
    differing = [(caption, java, ours) for caption, java in pairs if (ours := ptb_tokenize(caption)) != java]
    assert not differing[:10]


def by_all_rules(caption: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penn_treebank, "_PLAIN", re.compile("(?!)"))
        return ptb_tokenize(caption)


# Tokens that CoreNLP gave.


@pytest.mark.parametrize("caption", GOLDEN)
def test_tokens_are_those_of_corenlp(caption):
    assert ptb_tokenize(caption) == GOLDEN[caption]


@live
def test_golden_tokens_are_those_of_java():
    assert_equal(list(GOLDEN), tokens_of_java(list(GOLDEN)))
    assert list(GOLDEN.values()) == tokens_of_java(list(GOLDEN))


@live
def test_tokens_of_random_strings_are_those_of_java():
    captions = list(pieces(seed=1, number=10_000))
    assert_equal(captions, tokens_of_java(captions))


@live
@pytest.mark.slow
def test_tokens_of_every_character_are_those_of_java():
    characters = [chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000]
    captions = [f"a{c}b {c}. 1{c}2 dog{c}s" for c in characters if c not in SEPARATORS]
    assert_equal(captions, tokens_of_java(captions))


@pytest.mark.slow
@live
@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k in ../shared")
def test_tokens_of_flickr8k_are_those_of_java():
    lines = (FLICKR8K / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    published = [line.split("\t", 1)[1] for line in lines]
    captions = list(dict.fromkeys(published + [as_people_write(caption) for caption in published]))
    assert len(published) == 35_000
    assert_equal(captions, tokens_of_java(captions))


# The exceptions: what COCO's tools do at the ends of lines.


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize(
    "caption",
    [
        "a dog{}runs{}",
        "1{}1/2 cups",
        "(555){}555-1234",
        "<a{}b> c",
        "grade b.{}The dog",
        "U.S.{}",
        "{}",
        "It isn't{}so",
    ],
)
def test_line_separators_are_spaces(caption, separator):
    assert ptb_tokenize(caption.replace("{}", separator)) == ptb_tokenize(caption.replace("{}", " " * len(separator)))


@live
def test_only_java_looks_into_the_next_caption():
    captions = ["his grade is b.", "The dog"]
    assert [ptb_tokenize(caption) for caption in captions] == [["his", "grade", "is", "b."], ["the", "dog"]]
    assert tokens_of_java(captions) == [["his", "grade", "is", "b."], ["the", "dog"]]
    assert tokens_of_java(captions, neutral=None) == [["his", "grade", "is", "b"], ["the", "dog"]]


# Laws over any text.

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too
WORDS = sorted({word for caption in GOLDEN for word in caption.split(" ")})
MARKS = list(" .,;:!?'\"()-/&%$#@<>*’“”—…")
MIXED = st.lists(st.sampled_from(WORDS) | st.sampled_from([*MARKS, *"    "]), max_size=12).map("".join)
ENGLISH = st.lists(
    st.sampled_from(["a", "dog", "Dog", "it", "can", "don", "Inc", "St", "mr", "b", "no", "cannot", "Gonna", "x1", "T"])
    | st.sampled_from(["can't", "dog's", "isn't", "mother-in-law", "U.S", "wanna-be", "5", "1990", "n't", "'s", "The"])
    | st.sampled_from([" ", " ", " ", ", ", ",", " , ", ". ", ".", " . ", "!", "? ", "'", "-", "'s ", "n't "]),
    max_size=12,
).map("".join)
fixed = settings(derandomize=True, deadline=None, max_examples=300, database=None)


@fixed
@given(ANY_TEXT | MIXED)
def test_any_text_gives_tokens(text):
    tokens = ptb_tokenize(text)
    assert all(tokens) and not DROPPED.intersection(tokens)
    assert not re.search("[ \n\r\v\f\x85\u2028\u2029]", "".join(tokens))


@fixed
@given(ANY_TEXT | MIXED | ENGLISH, st.sampled_from([" ", "  ", "\n", "\r\n "]), st.sampled_from(["", " ", "\n\n"]))
@example("grade b.", " ", " ")
def test_spaces_around_change_nothing(text, before, behind):
    assert ptb_tokenize(before + text + behind) == ptb_tokenize(text)


@fixed
@given(ANY_TEXT | MIXED | ENGLISH)
@example("gonna-be")
@example("a dog \xa0site.com")
@example("x. cannot, can't. Mr. n't 's")
def test_short_cut_for_plain_words_changes_nothing(text):
    assert ptb_tokenize(text) == by_all_rules(text)


@pytest.mark.slow
@settings(fixed, max_examples=1000)
@given(ENGLISH)
def test_short_cut_for_plain_words_changes_nothing_in_english(text):
    assert ptb_tokenize(text) == by_all_rules(text)


def test_short_cut_changes_no_golden_tokens():
    assert {caption: by_all_rules(caption) for caption in GOLDEN} == GOLDEN


@pytest.mark.parametrize(
    "piece",
    ["a", "é", ".", ". ", " ", "a.", "a,", "a@", "a@.", "a'", "a' ", "'", "n't", "1-", "1.", "1,", "555 ", "(555) "]
    + ["&", "&amp;", "&eacute;", "http://", "www.", "site.com/", "<a ", "<a", "<!a", "</a", "<a b='", "a/", "a-", "a_"]
    + ["A&", "\\*", "-", "...", "!", "\xad", "a\xad", "U.S.-", "\xa0", "\u3000", "\ud800", "😀", "cannot", "d'ab-"],
)  # fmt: skip
def test_long_captions_take_no_longer_than_they_are(piece):
    start = time.process_time()
    ptb_tokenize((piece * 20_000)[:20_000])
    assert time.process_time() - start < 10


# A run of these without spaces takes its length squared, as rules for file names and hosts look to the run's end.
@pytest.mark.parametrize("piece", ["1a.", "1U.S.", "*.", "1www."])
def test_long_runs_with_periods_take_their_length_squared(piece):
    start = time.process_time()
    ptb_tokenize((piece * 2000)[:2000])
    ptb_tokenize((piece + " ") * 4000)
    assert time.process_time() - start < 5


# Plain English that `detokenize` does not give back, and what is lost.
LOST = {
    "brackets inside a token": [
        "call 555-1234 or (555) 555-1234 or 555.555.1234",
        "call (020) 7946 0958, (02)1234 5678",
        "nice :) dog :-( end:D :Dog :D1",
    ],
    "capitals, without which these are words at the end of a sentence": [
        "Ark. Az. Del. Ill. La. Mass. Miss. Ore. Pa. Tex. Wash. x",
        "ARK. MASS. ILL. PA. TEX. x",
    ],
    "the comma or space that keeps the period": [
        "dog., cat.; bird.: end.,",
        "Dog-cat., X-1.; o'clock.,",
        "1.2.; a1.; A-1.: b",
        "1.5-litre., a.b-c.; x,y-z.: dog",
        "Ph.D.s, M.D., B.A., M.Sc., Ph. D.",
        "1st., 2nd., No.5., no.x, No.",
        "dog.jpg, DOG.JPG, dog.jpg., my dog.png, dog.tar.gz , x.py!, x.mp3, x.mp3y, dog.bmp?",
    ],
    "the space between two halves of words": [
        "do n't, did n't, n't, N'T, n'ts",
        "dont't, nn't, ann't, an't, n't.",
        "should've, shouldn't've, y'all'd've, I'd've",
        "'t is, 'tis., 'T was, 'TIS",
    ],
}
UNREADABLE = {caption for captions in LOST.values() for caption in captions}


@pytest.mark.parametrize("caption", PLAIN_ENGLISH)
def test_tokens_survive_detokenizing(caption):
    tokens = tokenize(caption)
    assert (tokenize(detokenize(tokens)) == tokens) is (caption not in UNREADABLE)


if __name__ == "__main__":
    golden = dict(zip(GOLDEN, tokens_of_java(list(GOLDEN)), strict=True))
    entries = [f"{json.dumps(c, ensure_ascii=False)}: {json.dumps(t, ensure_ascii=False)}" for c, t in golden.items()]
    GOLDEN_FILE.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
