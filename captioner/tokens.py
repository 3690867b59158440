"""A caption's tokens, and a caption back from its tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from captioner.penn_treebank import ptb_tokenize

# Between a word and the second half that Treebank cuts off it: "do n't", "dog 's".
CONTRACTION = re.compile(r" (?=(?:n't|'(?:s|m|d|ll|re|ve))(?: |$))")
BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}
MIRRORED = {"left": "right", "right": "left"}
BRACKETED = re.compile(r"(?<=[(\[{]) | (?=[)\]}])")


def tokenize(caption: str) -> list[str]:
    r"""Return the words of a caption: what vocabularies are made of and models learn to write.

    They are the tokens over which COCO's evaluation scores (`ptb_tokenize`), of the caption in Unicode's NFC, so that
    composed and decomposed letters are the same.

    Parameters
    ----------
    caption
        The caption as published or generated. A line break of whatever kind is a space.

    Returns
    -------
    list of str
        Without "." and the like; empty where the caption has nothing else.

    Examples
    --------
    >>> tokenize("A dog's ball.\nIt isn't (very) red!")
    ['a', 'dog', "'s", 'ball', 'it', 'is', "n't", '-lrb-', 'very', '-rrb-', 'red']
    """
    return ptb_tokenize(unicodedata.normalize("NFC", caption))


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


def detokenize(words: Sequence[str]) -> str:
    """Return the words as readable text: joined by spaces, with contractions closed up and brackets as brackets.

    "do n't" becomes "don't", "dog 's" becomes "dog's" and "-lrb- red -rrb-" becomes "(red)"; "can not" stays as it is.
    Capitals and dropped punctuation do not come back. `tokenize` gives the same words again, but for rarities such as
    a bracket that closes up to a smiley.
    """
    text = " ".join(BRACKETS.get(word, word) for word in words)
    return BRACKETED.sub("", CONTRACTION.sub("", text))
