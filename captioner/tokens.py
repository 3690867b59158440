"""A caption's tokens, and a caption back from its tokens.

Two tokenizers cut a caption into words: "ptb", which is COCO's for English (`captioner.penn_treebank`), and "unicode"
for all other languages (`unicode_tokenize`). Scores over the tokens of one do not compare with those of the other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import regex

from captioner.penn_treebank import ptb_tokenize

Tokenizer: TypeAlias = Literal["ptb", "unicode"]
TokenizerChoice: TypeAlias = Literal["auto", "ptb", "unicode"]
# What is said of them beside scores.
TOKENIZERS: dict[Tokenizer, str] = {
    "ptb": "Penn Treebank as COCO's evaluation, lower case, without punctuation",
    "unicode": "words by Unicode's Annex 29, lower case, without punctuation; not comparable with COCO's",
}

# Between a word and the second half that Treebank cuts off it: "do n't", "dog 's".
CONTRACTION = re.compile(r" (?=(?:n't|'(?:s|m|d|ll|re|ve))(?: |$))")
BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
MIRRORED = {"left": "right", "right": "left"}
BRACKETED = re.compile(r"(?<=[(\[{]) | (?=[)\]}])")
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)

SURROGATE = re.compile("[\ud800-\udfff]")
BOUNDARY = regex.compile(r"(?w)\b")  # Unicode's own rules for the ends of words, not Python's
WRITTEN = regex.compile(r"[\p{L}\p{M}\p{N}\p{S}]")  # what a token has at least one of
LETTER, LATIN = regex.compile(r"\p{L}"), regex.compile(r"\p{Script=Latin}")
# Scripts that put no spaces between words: Chinese, Japanese, and those of Thai, Lao, Khmer, Burmese and their like.
UNSPACED = regex.compile(r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Line_Break=SA}\u30fc\uff70]")
KATAKANA = regex.compile(r"[\p{Script=Katakana}\u30fc\uff70]")


def normalise(caption: str) -> str:
    """Return a caption in Unicode's NFC, with one space for white space of any kind and length and none at its ends.

    Half a character (a lone surrogate), which no file can hold, becomes U+FFFD.
    """
    return " ".join(unicodedata.normalize("NFC", SURROGATE.sub("\ufffd", caption)).split())


def choose_tokenizer(captions: Iterable[str], choice: TokenizerChoice = "auto") -> Tokenizer:
    """Return the tokenizer for some captions: the one that was chosen, or that of their script.

    Parameters
    ----------
    captions
        Such as the references of all images.
    choice
        "auto" chooses "unicode" where more than half of all letters are of other scripts than the Latin one, else
        "ptb", whose rules are for English: for other languages in Latin letters choose "unicode" by name.
    """
    if choice != "auto":
        return choice
    letters = latin = 0
    for caption in captions:
        if caption.isascii():  # most are, and are counted faster
            found = sum(map(str.isalpha, caption))
            letters, latin = letters + found, latin + found
        else:
            letters, latin = letters + len(LETTER.findall(caption)), latin + len(LATIN.findall(caption))
    return "unicode" if 2 * latin < letters else "ptb"


def tokenize(caption: str, tokenizer: Tokenizer = "ptb") -> list[str]:
    r"""Return the words of a caption: what scores count, and what vocabularies of words are made of.

    By default they are the tokens over which COCO's evaluation scores (`ptb_tokenize`), of the caption in Unicode's
    NFC, so that composed and decomposed letters are the same.

    Parameters
    ----------
    caption
        The caption as published or generated. A line break of whatever kind is a space.
    tokenizer
        "ptb" or "unicode", see `unicode_tokenize`.

    Returns
    -------
    list of str
        Without "." and the like; empty where the caption has nothing else.

    Examples
    --------
    >>> tokenize("A dog's ball.\nIt isn't (very) red!")
    ['a', 'dog', "'s", 'ball', 'it', 'is', "n't", '-lrb-', 'very', '-rrb-', 'red']
    """
    if tokenizer == "unicode":
        return unicode_tokenize(caption)
    return ptb_tokenize(unicodedata.normalize("NFC", caption))


def unicode_tokenize(caption: str) -> list[str]:
    r"""Return the words of a caption in any language, in lower case and NFC, without punctuation.

    Words end where Unicode's Annex 29 says (default word boundaries, as the package regex knows them), and what has no
    letter, mark, number or symbol is dropped. So a Korean word is what stands between spaces, its particle included;
    each Chinese character and each Hiragana is a word, and a run of Katakana is one; each letter of Thai, Lao, Khmer
    and Burmese with its marks is a word; "don't" and "3.14" are words, "well-known" is two; an emoji is a word.

    Examples
    --------
    >>> unicode_tokenize("빨간 원이 있다.")
    ['빨간', '원이', '있다']
    >>> unicode_tokenize("草地上的狗。")
    ['草', '地', '上', '的', '狗']
    """
    text = unicodedata.normalize("NFC", normalise(caption).lower())
    return [part for part in BOUNDARY.split(text) if WRITTEN.search(part)]


def mirror(words: Sequence[str]) -> list[str]:
    """Return the words of a caption for the mirrored image: "left" and "right" change places.

    This is English, and takes the two words as places: "turning left" is mended, "has left" and "right now" are spoilt.
    Of writing in an image the captions say what it says, though the mirrored image shows it in mirror writing.

    Examples
    --------
    >>> mirror(["a", "dog", "to", "the", "left"])
    ['a', 'dog', 'to', 'the', 'right']
    """
    return [MIRRORED.get(word, word) for word in words]


def mirror_text(caption: str) -> str:
    """Return a caption, not cut into words, for the mirrored image; see `mirror`."""

    def exchanged(found: re.Match[str]) -> str:
        other = MIRRORED[found[0].lower()]
        return other.capitalize() if found[0][0].isupper() else other

    return SIDES.sub(exchanged, caption)


def detokenize(words: Sequence[str], tokenizer: Tokenizer = "ptb") -> str:
    """Return the words as readable text.

    Those of "unicode" are joined by spaces, but for two words in scripts that put none between words. Those of "ptb"
    are joined by spaces, with contractions closed up and brackets as brackets.

    "do n't" becomes "don't", "dog 's" becomes "dog's" and "-lrb- red -rrb-" becomes "(red)"; "can not" stays as it is.
    Capitals and dropped punctuation do not come back. `tokenize` gives the same words again, but for rarities such as
    a bracket that closes up to a smiley.
    """
    if tokenizer == "unicode":
        return "".join(
            word if not place or _joins(words[place - 1], word) else f" {word}" for place, word in enumerate(words)
        )
    text = " ".join(BRACKETS.get(word, word) for word in words)
    return BRACKETED.sub("", CONTRACTION.sub("", text))


def is_unspaced(character: str) -> bool:
    """Tell whether a character is of a script that puts no spaces between words."""
    return UNSPACED.match(character) is not None


def _joins(before: str, word: str) -> bool:
    if not (is_unspaced(before[-1:]) and is_unspaced(word[:1])):
        return False
    return not (KATAKANA.match(before[-1:]) and KATAKANA.match(word[:1]))  # which would be one word then
