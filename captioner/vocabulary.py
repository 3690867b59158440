"""What a model says, a unit at a time, and the units' ids: words, characters, or byte pairs.

A caption is cut into units (`cut`), and units are joined to a caption as people write it (`join`). Words lose capitals
and punctuation. Characters and byte pairs keep all but the kind and the number of white spaces: every caption in NFC
comes back as it was.
"""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from captioner.errors import InputError
from captioner.tokens import SURROGATE, TOKENIZERS, Tokenizer, detokenize, is_unspaced, normalise, tokenize

if TYPE_CHECKING:
    import tokenizers

Units: TypeAlias = Literal["words", "characters", "byte_pairs"]

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

# What byte pairs stay within: letters with their marks, digits, or signs, each with the space before.
PARTS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+"


class Word(NamedTuple):
    """A word as people read it: what is written, and the units of a caption, `start` to `stop`, that say it."""

    text: str
    start: int
    stop: int


class Vocabulary:
    """The words that a model can say, each with its id; the base of other units.

    Ids 0 to 3 are padding, the beginning and the end of a caption, and the unknown word; the words follow.

    Parameters
    ----------
    words : sequence of str
        The words, without the special ones, in the order of their ids.
    tokenizer : str
        What cuts captions into words, see `captioner.tokens`.

    Attributes
    ----------
    units : str
        "words", "characters" or "byte_pairs".
    longest : int
        Units of the longest caption that is found or learnt from, where nothing else is asked for.
    """

    units: ClassVar[Units] = "words"
    longest: ClassVar[int] = 20

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer = "ptb") -> None:
        self.words, self.tokenizer = tuple(words), tokenizer
        self._ids = {word: index for index, word in enumerate(self.words, len(SPECIAL))}
        if len(self._ids) != len(self.words):
            raise ValueError("A word stands twice in the vocabulary.")

    @classmethod
    def from_captions(
        cls, captions: Iterable[Sequence[str]], minimum_count: int = 1, tokenizer: Tokenizer = "ptb"
    ) -> Vocabulary:
        """Collect the words of tokenised captions.

        Parameters
        ----------
        captions : iterable of sequences of str
            The tokens of each caption.
        minimum_count : int
            A word that occurs less often is left to the unknown word.
        tokenizer : str
            What has cut them.
        """
        return cls(_frequent(captions, minimum_count), tokenizer)

    def __len__(self) -> int:
        """Return the number of ids, special ones included."""
        return len(SPECIAL) + len(self.words)

    def __eq__(self, other: object) -> bool:
        """Tell whether the other vocabulary cuts captions into the same units and gives these the same ids."""
        return isinstance(other, Vocabulary) and self.words == other.words and self.stored == other.stored

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{len(self.words):,} {self.units.replace('_', ' ')}"

    @property
    def stored(self) -> dict[str, Any] | None:
        """What a checkpoint keeps beside the words, plain JSON; None: words as they always were, cut as COCO's."""
        return None if self.tokenizer == "ptb" else {"units": self.units, "tokenizer": self.tokenizer}

    def cut(self, caption: str) -> list[str]:
        """Return the units of a caption."""
        return tokenize(caption, self.tokenizer)

    def join(self, units: Sequence[str]) -> str:
        """Return units as readable text."""
        return detokenize(units, self.tokenizer)

    def read(self, units: Sequence[str]) -> list[Word]:
        """Return the words of a caption as people read them."""
        return [Word(unit, place, place + 1) for place, unit in enumerate(units)]

    def encode(self, tokens: Sequence[str], max_words: int) -> list[int]:
        """Return the ids of ``<bos>``, at most `max_words` units, and ``<eos>``.

        A caption that is cut short gets no ``<eos>``: it does not end there, and must not teach that it does.
        """
        ids = [self._ids.get(token, UNKNOWN) for token in tokens]
        return [BEGIN, *ids, END] if len(ids) <= max_words else [BEGIN, *ids[:max_words]]

    def unknown(self, tokens: Iterable[str]) -> list[str]:
        """Return those of some units that are not in the vocabulary, each once, in their order."""
        return [token for token in dict.fromkeys(tokens) if token not in self._ids]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the units up to the first ``<eos>``, without ``<bos>`` and padding."""
        words = []
        for index in ids:
            if index == END:
                break
            if index not in (PAD, BEGIN):
                words.append(SPECIAL[index] if index < len(SPECIAL) else self.words[index - len(SPECIAL)])
        return words

    def text(self, ids: Iterable[int]) -> str:
        """Return a caption's ids as readable text."""
        return self.join(self.decode(ids))

    def ban(self, said: str) -> list[int]:
        """Return the ids without which something is never said; units that are parts of words have none.

        Raises
        ------
        InputError
            Where it is several words.
        """
        if len(words := self.cut(said)) > 1:
            raise InputError(f"{said!r} is {len(words)} words to the model and cannot be banned: ban single words.")
        # A word list of the user's own may hold words that would not be cut so.
        return [self._ids[word] for word in {said, *words} if word in self._ids]

    def filter(self, banned: Sequence[str], no_repeat_ngram: int) -> Callable[[Sequence[int]], list[int]] | None:
        """Return what says which ids may not follow some others, where ids are parts of words; None: nothing is."""
        return None


class WordBeginnings(Vocabulary):
    """Words, and what several of them begin with: what is taught of an image, and not what a model says.

    Korean, Turkish and many other languages put endings to a word, and each makes another word of it: 별이, 별은, 별과.
    What an image shows is named by the beginning, 별. One at which words part is kept, and so is each word.

    Parameters
    ----------
    captions : iterable of sequences of str
        The words of each caption.
    minimum_count : int
        One with which fewer words begin is left out.
    """

    longest = 1000

    def __init__(self, captions: Iterable[Sequence[str]], minimum_count: int = 1) -> None:
        counts = Counter[str]()
        ways: dict[str, set[str]] = {}  # in which words go on, or end
        for word in chain.from_iterable(captions):
            for end in range(1, len(word) + 1):
                counts[word[:end]] += 1
                ways.setdefault(word[:end], set()).add(word[end : end + 1])
        kept = (each for each, count in counts.items() if count >= minimum_count)
        super().__init__(sorted(each for each in kept if len(ways[each]) > 1 or "" in ways[each]), "unicode")

    def cut(self, caption: str) -> list[str]:
        """Return the beginnings of a caption's words."""
        words = tokenize(caption, self.tokenizer)
        return [word[:end] for word in words for end in range(1, len(word) + 1) if word[:end] in self._ids]


class _Parts(Vocabulary):
    """Units that are parts of words: a word is said by one or more of them, the space before it included."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(words, "unicode")

    @property
    def stored(self) -> dict[str, Any]:
        return {"units": self.units}

    def _bytes(self, unit: str) -> bytes:
        """Return what a unit writes, in UTF-8."""
        return unit.encode()

    def join(self, units: Sequence[str]) -> str:
        # What is no whole character is left out.
        return normalise(b"".join(map(self._bytes, units)).decode(errors="ignore"))

    def read(self, units: Sequence[str]) -> list[Word]:
        """Return the words of a caption as people read them.

        They are parted by spaces, and in scripts without spaces a unit that begins with a character begins a word. The
        space before a word is of its units.
        """
        words = [word._replace(text=normalise(word.text)) for word in self._groups(units)]
        return [word for word in words if word.text]  # without a last space, and less than a character

    def _groups(self, units: Sequence[str]) -> list[Word]:
        """Return all units in groups of those of a word; the last may be of a word of which there is no letter yet."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        groups: list[Word] = []
        start = 0  # of units that have not made a character yet
        for place, unit in enumerate(units, 1):
            text = decoder.decode(self._bytes(unit))
            if not text:
                continue
            last = groups[-1] if groups else None
            if last is None or (last.text.strip() and _parted(last.text[-1], text[0])):
                groups.append(Word(text, start, place))
            else:
                groups[-1] = Word(last.text + text, last.start, place)
            start = place
        return groups if start == len(units) else [*groups, Word("", start, len(units))]

    def ban(self, said: str) -> list[int]:
        return []

    def filter(self, banned: Sequence[str], no_repeat_ngram: int) -> Callable[[Sequence[int]], list[int]] | None:
        """Return what says which ids may not follow some others.

        No word begins with one that is banned, as typed, in small letters, in capitals or with a capital; one of a
        script without spaces stands nowhere. No sequence of so many words, as :meth:`read` gives them, occurs twice.
        """
        texts = [normalise(each) for each in banned]
        forms = {form for text in texts for form in (text, text.lower(), text.upper(), text.capitalize()) if form}
        patterns = [(form if is_unspaced(form[0]) else f" {form}").encode() for form in sorted(forms)]
        if not patterns and not no_repeat_ngram:
            return None
        written = [b"", b"", b"", b"", *map(self._bytes, self.words)]

        @cache
        def completing(tail: bytes) -> list[int]:
            return [index for index, more in enumerate(written) if any(pattern in tail + more for pattern in patterns)]

        def forbidden(ids: Sequence[int]) -> list[int]:
            found: list[int] = []
            if patterns:
                found += completing(_begun(b" " + b"".join(written[index] for index in ids), patterns))
            if no_repeat_ngram:
                again = self._repeated(ids, no_repeat_ngram)
                spaced = bool(ids) and written[ids[-1]].endswith(b" ")  # and one space is as good as two
                found += [
                    index for index, more in enumerate(written) if more in again or (spaced and more.startswith(b" "))
                ]
            return found

        return forbidden

    def _repeated(self, ids: Sequence[int], number: int) -> set[bytes]:
        """Return what, written next, would end a sequence of `number` words for the second time."""
        units = self.decode(ids)
        groups = self._groups(units)
        said = [b"".join(map(self._bytes, units[group.start : group.stop])).strip(b" ") for group in groups]
        last = groups[-1].text[-1:] if groups else ""
        found = set()
        for first in range(len(said) - number + 1):
            *before, again = said[first : first + number]
            # The next unit begins another word, behind a space where the script has them ...
            if before == said[len(said) - len(before) :]:
                found.add(b" " + again)
                if is_unspaced(last) or is_unspaced(again.decode(errors="ignore")[:1]):
                    found.add(again)
            # ... or it goes on with the last one, which is not compared with itself.
            if first + number < len(said) and before == said[-number:-1] and again.startswith(said[-1]):
                found.add(again.removeprefix(said[-1]))
        return found - {b""}


def _begun(written: bytes, patterns: Sequence[bytes]) -> bytes:
    """Return the longest end of what is written with which a pattern may have begun."""
    longest = max(map(len, patterns)) - 1
    ends = (written[len(written) - length :] for length in range(min(longest, len(written)), 0, -1))
    return next((end for end in ends if any(pattern.startswith(end) for pattern in patterns)), b"")


def _parted(before: str, behind: str) -> bool:
    if behind.isspace() or before.isspace():
        return behind.isspace()
    return (is_unspaced(before) or is_unspaced(behind)) and not unicodedata.category(behind).startswith("M")


class Characters(_Parts):
    """The characters that a model can say, each Unicode character of a caption in NFC a unit, the space among them.

    Parameters
    ----------
    words : sequence of str
        The characters in the order of their ids.
    """

    units = "characters"
    longest = 120

    @classmethod
    def train(cls, captions: Iterable[str], minimum_count: int = 1) -> Characters:
        """Collect the characters of captions; one that occurs less often is left to the unknown one."""
        return cls(_frequent((normalise(caption) for caption in captions), minimum_count))

    def cut(self, caption: str) -> list[str]:  # noqa: D102
        return list(normalise(caption))


class BytePairs(_Parts):
    """Byte pairs (Sennrich et al., 2016): frequent sequences of bytes, found by joining the most frequent pairs first.

    All 256 bytes are among them, so that no text is unknown. They are written as GPT-2's: a byte is a printable
    character (`BYTES`), the space among them "Ġ".

    Parameters
    ----------
    words : sequence of str
        The sequences in the order of their ids.
    merges : sequence of (str, str)
        The pairs that are joined, in this order.
    """

    units = "byte_pairs"
    longest = 40

    def __init__(self, words: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        super().__init__(words)
        self.merges = tuple(merges)

    @classmethod
    def train(cls, captions: Iterable[str], size: int, minimum_count: int = 1) -> BytePairs:
        """Learn pairs from captions, with Hugging Face's tokenizers; the same captions give the same, in any order.

        Parameters
        ----------
        captions : iterable of str
            As published.
        size : int
            Units at most; 256 are the bytes.
        minimum_count : int
            A pair that occurs less often is not joined.

        Raises
        ------
        InputError
            Where there are fewer units than bytes.
        """
        if size < len(BYTES):
            raise InputError(f"{size} byte pairs are too few, since each byte is one: give {len(BYTES)} or more.")
        # Else it warns of its threads in each process that is forked later, and reads images there.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        tokenizer = _tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=minimum_count,
            initial_alphabet=sorted(BYTES),
            show_progress=False,
        )
        tokenizer.train_from_iterator((f" {normalise(caption)}" for caption in captions), trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return cls(sorted(model["vocab"], key=model["vocab"].__getitem__), merges)

    @property
    def stored(self) -> dict[str, Any]:  # noqa: D102
        return {"units": self.units, "merges": [list(merge) for merge in self.merges]}

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        import tokenizers

        return _tokenizer(tokenizers.models.BPE(dict(self._ids), list(self.merges)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def cut(self, caption: str) -> list[str]:  # noqa: D102
        text = normalise(caption)
        return list(self._tokenizer.encode(f" {text}").tokens) if text else []

    def _bytes(self, unit: str) -> bytes:
        return unit.encode() if unit in SPECIAL else bytes(BYTES[character] for character in unit)


def _gpt2_bytes() -> dict[str, int]:
    """Return the printable character that stands for each byte: itself in Latin-1, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _gpt2_bytes()


def _tokenizer(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _frequent(captions: Iterable[Iterable[str]], minimum_count: int) -> list[str]:
    counts = Counter(token for tokens in captions for token in tokens)
    frequent = (word for word, count in counts.items() if count >= minimum_count and word not in SPECIAL)
    # By frequency, then by spelling: the same captions give the same ids in whatever order they come.
    return sorted(frequent, key=lambda word: (-counts[word], word))


class _Fault(ValueError):
    """Says why something is no vocabulary."""


def restore(words: object, stored: object, source: object) -> Vocabulary:
    """Return the vocabulary of a checkpoint, of which nothing is trusted.

    Parameters
    ----------
    words
        The units in the order of their ids.
    stored
        What :attr:`Vocabulary.stored` gave; None from a checkpoint of words that says nothing about them.
    source
        The file, for the message.

    Raises
    ------
    InputError
        Where it is no vocabulary.
    """
    try:
        return _restore(words, {"units": "words", "tokenizer": "ptb"} if stored is None else stored)
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, _Fault) else "it is damaged"
        raise InputError(
            f"The vocabulary in {source} cannot be used ({reason}): take another copy, or install the release of "
            "captioner that wrote it."
        ) from None


def _restore(words: Any, stored: Any) -> Vocabulary:
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
        raise _Fault("it is no list of words")
    if not isinstance(stored, Mapping):
        raise _Fault("its settings are none")
    if SURROGATE.search("".join(words)):
        raise _Fault("half a character is among its words")
    if set(words) & set(SPECIAL):
        raise _Fault("a special word is among the others")
    units = stored["units"]
    if units == "words" and stored["tokenizer"] in TOKENIZERS:
        return Vocabulary(words, stored["tokenizer"])
    if units == "characters":
        if any(len(word) > 1 for word in words):
            raise _Fault("a character is none")
        return Characters(words)
    if units == "byte_pairs":
        merges = [(left, right) for left, right in stored["merges"]]
        known = set(words)
        if not BYTES.keys() <= known or not set("".join(words)) <= BYTES.keys():
            raise _Fault("its byte pairs are not made of bytes")
        if not all({left, right, left + right} <= known for left, right in merges):
            raise _Fault("it joins byte pairs that it does not have")
        return BytePairs(words, merges)
    raise _Fault("its units are unknown")


def pad(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return the ids of B images' captions, (B, Q, T) and padded; an image with fewer captions gets empty ones."""
    most = max(len(image) for image in captions)
    longest = max(len(ids) for image in captions for ids in image)
    tokens = torch.full((len(captions), most, longest), PAD)
    for row, image in enumerate(captions):
        for place, ids in enumerate(image):
            tokens[row, place, : len(ids)] = torch.as_tensor(ids)
    return tokens
