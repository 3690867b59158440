"""Decoding: all that can be asked of the captions of an image, in words, and the same for every model."""

from __future__ import annotations

from dataclasses import dataclass

from captioner.errors import InputError
from captioner.tokens import tokenize


@dataclass(frozen=True)
class Decoding:
    """How captions are found: by a beam, by diverse beams, or at random.

    The limits (`min_words` to `begin_with`) hold for all three. They and what is drawn from change no log-probability
    of a caption, which is the model's own.

    Attributes
    ----------
    beam_size : int
        Hypotheses per image; 1 is greedy. Nothing where captions are drawn.
    length_penalty : float
        0 ranks captions by their log-probability, 1 by its mean per word, the end counted as one.
    min_words : int
        Shortest caption, in what the model says: words, or else characters or byte pairs.
    max_words : int, optional
        Longest caption, likewise; by default 20 words, 120 characters or 40 byte pairs.
    no_repeat_ngram : int
        No sequence of so many words occurs twice in a caption, whatever the model says them by; 0: whatever occurs.
    ban : tuple of str
        Words that are never said, beside those that are none, as ``<unk>``. One that the model does not know bans
        nothing: it would not be said in any case, so one list serves many models. Where a model says characters or byte
        pairs, words that begin with a banned one are not said either.
    begin_with : str
        What every caption begins with. It counts as the rest does, in lengths and log-probabilities.
    captions : int
        How many of each image: the best of the beam, of all groups, or so many drawn at random, of which some may be
        equal. Best first; beams give fewer where they have found fewer.
    groups : int
        Beams that share `beam_size` out among them and avoid each other's words (Vijayakumar et al., 2016); 1: one.
    diversity : float
        What a word loses in log-probability for each hypothesis of earlier groups that says it at the same place.
    sample : bool
        Draw captions at random.
    temperature : float
        Of drawing: below 1 the probable becomes more so, above 1 less.
    top_k : int
        Draw from so many words, the most probable; 0: from all.
    top_p : float
        Draw from the fewest words that have this share of the probability together; 1: from all.
    seed : int
        Of drawing: with one seed an image's captions are the same again.

    Raises
    ------
    InputError
        Where a setting is out of its range, or two exclude each other.
    """

    beam_size: int = 5
    length_penalty: float = 0.7
    min_words: int = 0
    max_words: int | None = None
    no_repeat_ngram: int = 0
    ban: tuple[str, ...] = ()
    begin_with: str = ""
    captions: int = 1
    groups: int = 1
    diversity: float = 0.5
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ban, str):
            raise InputError(f"`ban` is a list of words and not the text {self.ban!r}: give [{self.ban!r}].")
        object.__setattr__(self, "ban", tuple(self.ban))
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not (value is None or value >= least):  # nor if it is not a number
                raise InputError(f"`{name}` is {getattr(self, name)}: give {least} or more.")
        if self.max_words is not None and self.min_words > self.max_words:
            raise InputError(
                f"`min_words` {self.min_words} is more than `max_words` {self.max_words}: lower the first or raise the "
                "second."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` is {self.top_p}: give a share above 0, and 1 to draw from all words.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"`temperature` is {self.temperature}: give a number above 0, and 1 to change nothing.")
        # The seed and the size of the beam may be given always.
        for name, needs, given in (
            ("temperature", "sample", self.sample),
            ("top_k", "sample", self.sample),
            ("top_p", "sample", self.sample),
            ("diversity", "groups", self.groups > 1),
        ):
            if not given and getattr(self, name) != getattr(Decoding, name):
                raise InputError(f"`{name}` has no effect without `{needs}`: set `{needs}`, too, or leave it out.")
        if self.sample and self.groups > 1:
            raise InputError(
                "Captions are drawn (`sample`) or searched by `groups` of a beam: leave out one of the two."
            )
        if not self.sample:
            if self.captions > self.beam_size:
                raise InputError(
                    f"A beam of {self.beam_size} does not hold {self.captions} captions: set `beam_size` to "
                    f"{self.captions} or more."
                )
            if self.beam_size % self.groups:
                raise InputError(
                    f"{self.groups} groups cannot share out a beam of {self.beam_size}: set `beam_size` to a multiple "
                    f"of {self.groups}."
                )
        # Whatever a model says, it is no fewer characters or byte pairs. The model's own words are counted again.
        if self.max_words is not None and len(tokenize(self.begin_with)) > self.max_words:
            raise InputError(
                f"`begin_with` {self.begin_with!r} is longer than `max_words` {self.max_words}: shorten the one or "
                "raise the other."
            )


LEAST = {
    "beam_size": 1,
    "length_penalty": 0,
    "min_words": 0,
    "max_words": 0,
    "no_repeat_ngram": 0,
    "captions": 1,
    "groups": 1,
    "diversity": 0,
    "top_k": 0,
    "seed": 0,
}
