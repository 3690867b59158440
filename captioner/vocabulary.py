"""Words and their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class Vocabulary:
    """The words that a model can say, each with its id.

    Ids 0 to 3 are padding, the beginning and the end of a caption, and the unknown word; the words follow.

    Parameters
    ----------
    words : sequence of str
        The words, without the special ones, in the order of their ids.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words, len(SPECIAL))}
        if len(self._ids) != len(self.words):
            raise ValueError("A word stands twice in the vocabulary.")

    @classmethod
    def from_captions(cls, captions: Iterable[Sequence[str]], minimum_count: int = 1) -> Vocabulary:
        """Collect the words of tokenised captions.

        Parameters
        ----------
        captions : iterable of sequences of str
            The tokens of each caption.
        minimum_count : int
            A word that occurs less often is left to the unknown word.
        """
        counts = Counter(token for tokens in captions for token in tokens)
        frequent = (word for word, count in counts.items() if count >= minimum_count and word not in SPECIAL)
        # By frequency, then by spelling: the same captions give the same ids in whatever order they come.
        return cls(sorted(frequent, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        """Return the number of ids, special ones included."""
        return len(SPECIAL) + len(self.words)

    def __eq__(self, other: object) -> bool:
        """Tell whether the other vocabulary gives the same ids to the same words."""
        return isinstance(other, Vocabulary) and self.words == other.words

    __hash__ = None  # type: ignore[assignment]

    def encode(self, tokens: Sequence[str], max_words: int) -> list[int]:
        """Return the ids of ``<bos>``, at most `max_words` tokens, and ``<eos>``.

        A caption that is cut gets no ``<eos>``: it does not end there, and must not teach that it does.
        """
        ids = [self._ids.get(token, UNKNOWN) for token in tokens]
        return [BEGIN, *ids, END] if len(ids) <= max_words else [BEGIN, *ids[:max_words]]

    def unknown(self, tokens: Iterable[str]) -> list[str]:
        """Return those of some tokens that are not in the vocabulary, each once, in their order."""
        return [token for token in dict.fromkeys(tokens) if token not in self._ids]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words up to the first ``<eos>``, without ``<bos>`` and padding."""
        words = []
        for index in ids:
            if index == END:
                break
            if index not in (PAD, BEGIN):
                words.append(SPECIAL[index] if index < len(SPECIAL) else self.words[index - len(SPECIAL)])
        return words


def pad(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return the ids of B images' captions, (B, Q, T) and padded; an image with fewer captions gets empty ones."""
    most = max(len(image) for image in captions)
    longest = max(len(ids) for image in captions for ids in image)
    tokens = torch.full((len(captions), most, longest), PAD)
    for row, image in enumerate(captions):
        for place, ids in enumerate(image):
            tokens[row, place, : len(ids)] = torch.as_tensor(ids)
    return tokens
