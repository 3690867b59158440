"""All metrics over captions as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from captioner.errors import InputError
from captioner.metrics.bleu import bleu
from captioner.metrics.cider import cider_d
from captioner.metrics.rouge import rouge_l
from captioner.metrics.score import ImageId, Score
from captioner.tokens import Tokenizer, tokenize


def score_captions(
    references: Mapping[ImageId, Sequence[str]], hypotheses: Mapping[ImageId, str], tokenizer: Tokenizer = "ptb"
) -> dict[str, Score]:
    """Tokenise captions, as COCO's evaluation does by default, and return BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D.

    Parameters
    ----------
    references
        For each image its reference captions, as published: rare words and all.
    hypotheses
        For each image its generated caption.
    tokenizer
        What cuts both into tokens, see `captioner.tokens`. Scores over other tokens do not compare.

    Returns
    -------
    dict
        The scores under "BLEU-1" to "BLEU-4", "ROUGE-L" and "CIDEr-D".

    Raises
    ------
    InputError
        If the ids of references and hypotheses differ, if there are none, if an image's references are one text, or
        its caption is none.
    """
    for image_id, captions in references.items():
        if isinstance(captions, str):  # a sequence of strings too, each of one letter
            raise InputError(f"The references of image {image_id!r} are one text: give a list of captions.")
    for image_id, caption in hypotheses.items():
        if not isinstance(caption, str):
            raise InputError(f"The caption of image {image_id!r} is a {type(caption).__name__}: give one text.")
    return score_tokens(
        {image_id: [tokenize(one, tokenizer) for one in captions] for image_id, captions in references.items()},
        {image_id: tokenize(caption, tokenizer) for image_id, caption in hypotheses.items()},
    )


def score_tokens(
    references: Mapping[ImageId, Sequence[Sequence[str]]], hypotheses: Mapping[ImageId, Sequence[str]]
) -> dict[str, Score]:
    """Return the scores of `score_captions` for captions that are tokens already."""
    return {
        **bleu(references, hypotheses),
        "ROUGE-L": rouge_l(references, hypotheses),
        "CIDEr-D": cider_d(references, hypotheses),
    }
