"""The variants that the laws are tested over: an attention, a bridge or a decoder more is one entry more."""

from functools import partial
from itertools import combinations, product

import pytest
import torch

from captioner.attention import (
    Additive,
    Annotations,
    Attention,
    Dot,
    General,
    MultiHead,
    NoAttention,
    ScaledDot,
    Uniform,
)
from captioner.bridges import LinearBridge, NoBridge, TransformerBridge
from captioner.decoders import GRUDecoder, LSTMDecoder, TransformerDecoder

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

# Each builds a bridge from D.
linear = partial(LinearBridge, dim=8)
transformer = partial(TransformerBridge, dim=8, layers=2, heads=2, feed_forward_dim=10)
BRIDGES = {
    "NoBridge": NoBridge,
    "LinearBridge": linear,
    "LinearBridge with positions": partial(linear, positions=True),
    "TransformerBridge": partial(transformer, positions=False),
    "TransformerBridge with positions": transformer,
    "TransformerBridge, post-norm": partial(transformer, positions=False, norm_first=False),
    "TransformerBridge with positions, post-norm": partial(transformer, norm_first=False),
}


def recurrent(kind, attention, **settings):
    def build(embedding_dim, annotation_dim):
        hidden_dim = annotation_dim if "Dot" in attention else H
        return kind(embedding_dim, annotation_dim, attention=ATTENTIONS[attention], hidden_dim=hidden_dim, **settings)

    return build


def lstm(attention, attend, words, gate, output, first_state):
    return recurrent(
        LSTMDecoder,
        attention,
        attend=attend,
        feed_previous=words == "fed",
        gate=gate == "gate",
        deep_output=output == "deep",
        first_state=first_state,
    )


# Without attention there is no gate and no context to place, and a first state of zeros is an error.
LSTMS = [
    choice
    for choice in product(
        ATTENTIONS, ("before", "after"), ("fed", "blind"), ("gate", "open"), ("deep", "shallow"), ("mean", "zero")
    )
    if choice[0] != "NoAttention" or (choice[1], choice[3], choice[5]) == ("before", "open", "mean")
]

# The dropout is not zero, so what is not for training is tried after `eval()`.
TRANSFORMERS = {
    f"Transformer-{positions}-{norm}": partial(
        TransformerDecoder, layers=2, heads=2, positions=positions, max_words=32, norm_first=norm == "pre", dropout=0.1
    )
    for positions, norm in product(("sinusoidal", "learned"), ("pre", "post"))
}
TRANSFORMERS["Transformer-1-layer"] = partial(TransformerDecoder, layers=1, heads=4, feed_forward_dim=7)

# Each builds a decoder from E and D. "blind" in a name: the previous word is not fed back.
DECODERS = {
    **{"-".join(("LSTM", *choice)): lstm(*choice) for choice in LSTMS},
    **{
        f"GRU-{attention}-{reset}": recurrent(GRUDecoder, attention, reset=reset)
        for attention, reset in product(ATTENTIONS, ("before", "after"))
    },
    **TRANSFORMERS,
}


def covering(choices, size):
    """Of all choices some that hold all pairs of settings, or so many: what fails with a pair of them fails here."""
    found, seen = [], set()
    while True:
        new = {choice: set(combinations(enumerate(choice), size)) - seen for choice in choices}
        best = max(choices, key=lambda choice: len(new[choice]))
        if not new[best]:
            return found
        found.append(best)
        seen |= new[best]


# For the laws: LSTMs with all pairs of settings, and for `pytest -m slow` with all triples.
PAIRS, TRIPLES = ({"-".join(("LSTM", *choice)) for choice in covering(LSTMS, size)} for size in (2, 3))
EVERY = [
    pytest.param(name, marks=pytest.mark.slow) if name in TRIPLES - PAIRS else name
    for name in DECODERS
    if not name.startswith("LSTM") or name in PAIRS | TRIPLES
]

# One LSTM and one GRU per attention and every Transformer: for what their other switches cannot change.
KINDS = [
    *(next(name for name in DECODERS if name.startswith(f"LSTM-{attention}-before-fed")) for attention in ATTENTIONS),
    *(f"GRU-{attention}-before" for attention in ATTENTIONS),
    *TRANSFORMERS,
]


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def watch(model):
    """Note the query and the memory of each call of an attention, fused or not."""
    seen = []

    def noting(call):
        return lambda query, memory, *more: seen.append((query, memory)) or call(query, memory, *more)

    for attention in attentions(model):
        names = ["weigh"]
        if isinstance(attention, NoAttention):
            names = ["forward"]  # which weighs nothing
        elif type(attention).contexts is not Attention.contexts:
            names.append("contexts")  # which does not weigh, either
        for name in names:
            setattr(attention, name, noting(getattr(attention, name)))
    return seen


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
