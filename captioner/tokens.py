"""A caption's tokens, and a caption back from its tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from nltk.tokenize.treebank import TreebankWordTokenizer

# The COCO server drops these after tokenising. Its list has the brackets too, but in upper case (-LRB-) while its
# tokens are in lower case (-lrb-), so brackets stay, and published scores were reached with them.
DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})

# What a keyboard's autocorrection writes, as the Treebank rules know it.
TYPEWRITTEN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "..."})

# Treebank's own rule sees only the last period of a text, and takes it from "Washington D.C." too. A period ends a
# sentence wherever a word ends with it, except after a single letter and in these abbreviations.
ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "etc", "ave", "blvd", "prof")
SENTENCE_END = re.compile(
    r"\.(?<!\.\.)(?<!\b[^\W\d_]\.)"
    + "".join(rf"(?<!\b{word}\.)" for word in ABBREVIATIONS)
    + r"(?=[\])}>\"']*(?:\s|$))"
)
DOTS = re.compile(r"\.{2,}")

# Between a word and the second half that Treebank cuts off it: "do n't", "dog 's".
CONTRACTION = re.compile(r" (?=(?:n't|'(?:s|m|d|ll|re|ve))(?: |$))")

_treebank = TreebankWordTokenizer()


def tokenize(caption: str) -> list[str]:
    r"""Return the lower-case Penn Treebank tokens of a caption, without the punctuation that COCO drops.

    These are, up to rare cases, the tokens over which the COCO server scores; exact parity with its Java tokenizer
    is not reached yet (times as 10:30am, "w/" and the like differ).

    Parameters
    ----------
    caption
        The caption as published or generated. A line break of whatever kind is a space. Composed and decomposed
        letters are the same (Unicode NFC).

    Returns
    -------
    list of str
        Without "." and the like; empty where the caption has nothing else.

    Examples
    --------
    >>> tokenize("A dog's ball.\nIt isn't (very) red!")
    ['a', 'dog', "'s", 'ball', 'it', 'is', "n't", '-lrb-', 'very', '-rrb-', 'red']
    """
    text = unicodedata.normalize("NFC", caption.lower()).translate(TYPEWRITTEN)
    text = DOTS.sub(" ... ", " ".join(text.split()))
    text = SENTENCE_END.sub(" .", text)
    # The period at the end keeps Treebank from looking for one in the last word; it is dropped again.
    tokens = _treebank.tokenize(f"{text} .", convert_parentheses=True)
    return [token for token in map(str.lower, tokens) if token not in DROPPED]


def detokenize(words: Sequence[str]) -> str:
    """Return the words as readable text: joined by spaces, with contractions closed up.

    "do n't" becomes "don't" and "dog 's" becomes "dog's"; "can not" stays as it is. Capitals and dropped
    punctuation do not come back. `tokenize` gives the same words again.
    """
    return CONTRACTION.sub("", " ".join(words))
