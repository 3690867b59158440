"""Self-critical training (Rennie et al., 2017): captions that the model draws are rewarded by their CIDEr-D.

Cross-entropy asks for the next word of people's captions, given theirs; this asks for whole captions that people would
agree with, given the model's own words.

Shapes: B images, K samples of each, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.attention import Annotations
from captioner.errors import InputError
from captioner.metrics import CIDErD, DocumentFrequencies
from captioner.metrics.score import ImageId
from captioner.model import Captioner
from captioner.objectives import CrossEntropy, average
from captioner.search import Samples
from captioner.tokens import TokenizerChoice, choose_tokenizer, tokenize
from captioner.vocabulary import BEGIN, END, PAD, SPECIAL, Vocabulary

END_WORD = SPECIAL[END]


class Reward(Generic[ImageId]):
    """CIDEr-D of drawn captions against the references of their images, the end counted as a word.

    Without it a caption that breaks off ("a dog on a") would be as good as one that is complete. The tokens are those
    of the metric: of the caption as text, written and cut again.

    Parameters
    ----------
    references : mapping
        For each image its captions as published. Document frequencies are counted over these.
    vocabulary : Vocabulary
        What the ids of drawn captions mean.
    tokenizer : str
        That of the metric; "auto" chooses by the references.

    Raises
    ------
    InputError
        If there is no image, or one without a caption.
    """

    def __init__(
        self,
        references: Mapping[ImageId, Sequence[str]],
        vocabulary: Vocabulary,
        tokenizer: TokenizerChoice = "auto",
    ) -> None:
        self._tokenizer = choose_tokenizer(chain.from_iterable(references.values()), tokenizer)
        tokens = {
            image_id: [[*tokenize(caption, self._tokenizer), END_WORD] for caption in captions]
            for image_id, captions in references.items()
        }
        self.vocabulary, self._words = vocabulary, (*SPECIAL, *vocabulary.words)
        self.document_frequencies = DocumentFrequencies.from_references(tokens)
        self._cider_d = CIDErD(tokens, self.document_frequencies)

    def __call__(self, image_ids: Sequence[ImageId], samples: Samples) -> Tensor:
        """Return the rewards (B, K), float32, in COCO's units: a CIDEr-D of 0.5, not 50.

        Raises
        ------
        InputError
            If an image has no references here.
        """
        captions = [self._tokens(ids) for image in samples.tokens.tolist() for ids in image]
        each = [image_id for image_id in image_ids for _ in range(samples.tokens.size(1))]
        rewards = torch.from_numpy(self._cider_d.rewards(each, captions)).float()
        return rewards.view(samples.lengths.shape).to(samples.tokens.device)

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        ends = END in ids
        words = [self._words[index] for index in ids[: ids.index(END) if ends else None]]
        caption = self.vocabulary.join(words)
        return [*tokenize(caption, self._tokenizer), *([END_WORD] if ends else [])]


class SelfCriticalLoss(NamedTuple):
    """The loss, and what is worth watching: scalar tensors, the latter two without gradient.

    Attributes
    ----------
    total : Tensor
        What is minimised.
    reward : Tensor
        Mean reward of the drawn captions.
    cross_entropy : Tensor
        Of people's captions, per word; 0 where it has no share.
    """

    total: Tensor
    reward: Tensor
    cross_entropy: Tensor


class SelfCritical(nn.Module):
    """The policy gradient of the expected reward, each sample held against the mean of its image's others.

    For samples w_1 ... w_K of an image with rewards r the loss is

        - 1/K sum_k (r_k - 1/(K-1) sum_{j != k} r_j) log p(w_k)

    averaged over the images: the score function estimator (Williams, 1992) with the leave-one-out baseline (Kool et
    al., 2019), whose expected gradient is that of the expected reward. The samples are drawn from the policy that is
    improved: all words allowed, temperature 1, and dropout off both where they are drawn and where they are scored.

    Parameters
    ----------
    samples : int
        K, captions drawn of each image.
    cross_entropy : float
        Share of cross-entropy in the loss, which holds the language: 0 is none. Here it is summed over a caption's
        words, as log p is; its dropout is on.
    label_smoothing : float
        Of that share.

    Raises
    ------
    InputError
        Where there are fewer than two samples, or the share is no share.
    """

    def __init__(self, samples: int = 5, cross_entropy: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if samples < 2 or not 0 <= cross_entropy < 1:
            raise InputError(
                f"There is no self-critical training with samples {samples} and a cross_entropy of {cross_entropy}: "
                "give at least 2 samples, which are held against each other, and a share from 0 to below 1."
            )
        self.samples, self.cross_entropy, self.label_smoothing = samples, cross_entropy, label_smoothing
        self._teacher = CrossEntropy(label_smoothing, doubly_stochastic=0.0)

    def forward(
        self,
        captioner: Captioner,
        annotations: Annotations,
        tokens: Tensor,
        image_ids: Sequence[ImageId],
        reward: Reward[ImageId],
        max_words: int = 20,
    ) -> SelfCriticalLoss:
        """Return the loss of a batch.

        Parameters
        ----------
        captioner : Captioner
            The policy.
        annotations : Annotations
            Of B images.
        tokens : Tensor
            (B, Q, T + 1) ids of people's captions, from ``<bos>`` on, padded.
        image_ids : sequence
            Of the images, as the reward knows them.
        reward : Reward
            Of the same words as the policy's.
        max_words : int
            Longest drawn caption, its end not counted; one that goes on is broken off behind the next word.

        Raises
        ------
        InputError
            Where the reward was made for another vocabulary.
        """
        if reward.vocabulary != captioner.vocabulary:
            raise InputError(
                f"The reward was made for {len(reward.vocabulary)} words, but not those that the captioner says: make "
                "it with the captioner's vocabulary."
            )
        training = captioner.training
        captioner.eval()
        try:
            samples = captioner.sample(annotations, samples=self.samples, max_tokens=max_words + 1)
            # What autocast has converted while nothing was recorded must not serve where gradients are.
            torch.clear_autocast_cache()
            log_probabilities = rescore(captioner, annotations, samples)
        finally:
            captioner.train(training)
        rewards = reward(image_ids, samples)
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        total = -((rewards - others) * log_probabilities).mean() * (1 - self.cross_entropy)
        total = total.to(torch.promote_types(captioner.embedding.weight.dtype, torch.float32))
        cross_entropy = total.new_zeros(())
        if self.cross_entropy:
            logits, _, _ = captioner.score_words(annotations, tokens, need_weights=False)
            cross_entropy = self._teacher(logits, tokens[..., 1:]).cross_entropy
            spoken = tokens[..., 1:] != PAD
            # Of a caption, over all processes as the cross-entropy is: words count alike in whichever they are.
            words, captions = average(torch.stack([spoken.sum(), spoken.any(-1).sum()]))
            total = total + self.cross_entropy * words / captions * cross_entropy
        return SelfCriticalLoss(total, rewards.mean(), cross_entropy.detach())


def rescore(captioner: Captioner, annotations: Annotations, samples: Samples) -> Tensor:
    """Return the log-probabilities (B, K) of drawn captions, float64, from one teacher-forced pass with gradients."""
    begin = samples.tokens.new_full((*samples.lengths.shape, 1), BEGIN)
    tokens = torch.cat((begin, samples.tokens), 2)
    logits, _, _ = captioner.score_words(annotations, tokens, need_weights=False, lengths=samples.lengths)
    drawn = torch.arange(samples.tokens.size(2), device=tokens.device) < samples.lengths[..., None]
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(exact, samples.tokens[drawn], reduction="none")
    return -each.new_zeros(drawn.shape, dtype=torch.float64).masked_scatter(drawn, each.double()).sum(2)
