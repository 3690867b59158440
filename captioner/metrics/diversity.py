"""What scores hide: how varied captions are, and how they end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from captioner.errors import InputError

# What hardly any English caption ends with (18 of Flickr8k's 35,000); not "on" or "her", which may well be a last word.
# Captioners trained on CIDEr-D alone learn such endings, since the score does not punish them (Guo et al., "Improving
# Reinforcement Learning Based Image Captioning with Natural Language Prior", 2018).
UNFINISHED = frozenset(
    ["a", "an", "the", "his", "its", "their", "my", "your", "our", "and", "or", "but", "of", "with", "at", "to", "for"]
    + ["from", "into", "onto", "while", "as", "is", "are", "was", "were", "has", "have"]
)


class Diversity(NamedTuple):
    """How varied captions are.

    Attributes
    ----------
    captions : int
        How many there are.
    distinct : int
        How many of them differ, token for token.
    vocabulary : int
        How many distinct tokens they use.
    mean_length : float
        In tokens.
    bad_endings : float
        The share of captions whose last token ends hardly any English caption ("on a", "with the"), see `UNFINISHED`.
    new : float, optional
        The share of captions that are not, token for token, a training caption. None if no training captions are given.
    """

    captions: int
    distinct: int
    vocabulary: int
    mean_length: float
    bad_endings: float
    new: float | None


def diversity(captions: Sequence[Sequence[str]], training: Iterable[Sequence[str]] | None = None) -> Diversity:
    """Describe captions.

    Parameters
    ----------
    captions
        The tokens of each caption.
    training
        The tokens of each caption that the system was trained on.

    Raises
    ------
    InputError
        If there is no caption.
    """
    if not captions:
        raise InputError("There is no caption to describe: give one at least.")
    distinct = {tuple(caption) for caption in captions}
    known = None if training is None else {tuple(caption) for caption in training}
    return Diversity(
        captions=len(captions),
        distinct=len(distinct),
        vocabulary=len({token for caption in distinct for token in caption}),
        mean_length=sum(map(len, captions)) / len(captions),
        bad_endings=sum(bool(caption) and caption[-1] in UNFINISHED for caption in captions) / len(captions),
        new=None if known is None else sum(tuple(caption) not in known for caption in captions) / len(captions),
    )
