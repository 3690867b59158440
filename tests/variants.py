"""The variants that the laws are tested over: an attention or a decoder more is one entry more."""

from functools import partial
from itertools import product

import torch

from captioner.attention import Additive, Annotations, Dot, General, MultiHead, NoAttention, ScaledDot, Uniform
from captioner.decoders import LSTMDecoder

E, D, H, N = 4, 6, 5, 4

# Each builds an attention from the sizes of a query and of an annotation vector. Concat is Additive by another name.
ATTENTIONS = {
    "Additive": partial(Additive, dim=7),
    "Dot": Dot,
    "ScaledDot": ScaledDot,
    "General": General,
    "MultiHead": partial(MultiHead, heads=2, dim=8),
    "Uniform": Uniform,
    "NoAttention": NoAttention,
}


def lstm(attention, attend, words, gate, output, first_state):
    settings = {
        "attention": ATTENTIONS[attention],
        "attend": attend,
        "feed_previous": words == "fed",
        "gate": gate == "gate",
        "deep_output": output == "deep",
        "first_state": first_state,
    }

    def build(embedding_dim, annotation_dim):
        hidden_dim = annotation_dim if "Dot" in attention else H
        return LSTMDecoder(embedding_dim, annotation_dim, hidden_dim=hidden_dim, **settings)

    return build


# Without attention there is no gate and no context to place, and a first state of zeros is an error.
LSTMS = [
    choice
    for choice in product(
        ATTENTIONS, ("before", "after"), ("fed", "blind"), ("gate", "open"), ("deep", "shallow"), ("mean", "zero")
    )
    if choice[0] != "NoAttention" or (choice[1], choice[3], choice[5]) == ("before", "open", "mean")
]

# Each builds a decoder from E and D. "blind" in a name: the previous word is not fed back.
DECODERS = {"-".join(("LSTM", *choice)): lstm(*choice) for choice in LSTMS}


def some_annotations(images, seed=0, regions=N, annotation_dim=D, mask=None):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(images, regions, annotation_dim, generator=generator, dtype=torch.float64)
    return Annotations(values, None if mask is None else torch.tensor(mask, dtype=torch.bool))


def of_image(annotations, index):
    mask = None if annotations.mask is None else annotations.mask[index : index + 1]
    return annotations._replace(values=annotations.values[index : index + 1], mask=mask)


def more_regions(annotations, count=3):
    """Regions that do not exist, full of numbers that would show."""
    values = torch.cat((annotations.values, torch.full_like(annotations.values[:, :1], 1e3).expand(-1, count, -1)), 1)
    mask = torch.nn.functional.pad(annotations.existing(), (0, count))
    return annotations._replace(values=values, mask=mask)


def same(one, other, tolerance=1e-12):
    """Equal in float64, up to the order of summation that a matrix product chooses."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=tolerance)
