import math
import re

import pytest
import torch
from torch import nn
from variants import (
    ATTENTIONS,
    DECODERS,
    EVERY,
    KINDS,
    TRANSFORMERS,
    D,
    E,
    H,
    N,
    more_regions,
    of_image,
    same,
    some_annotations,
    watch,
)

from captioner import decoders, loops
from captioner.attention import Additive, General, NoAttention, Uniform
from captioner.decoders import CausalSelfAttention, GRUDecoder, LSTMDecoder, TransformerDecoder, sinusoidal_positions
from captioner.errors import InputError

B, Q, T = 3, 2, 4
MASK = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]

every_decoder = pytest.mark.parametrize("name", EVERY)
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


def decoder_of(name):
    torch.manual_seed(0)
    return DECODERS[name](E, D).double().eval()


def some_words(rows=B * Q, seed=2, count=T, size=E):
    return torch.randn(rows, count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unroll(decoder, words, memory, need_weights=True):
    """Step word by word; the outputs as `forward` gives them."""
    state = decoder.start(memory, len(words) // len(memory[0]))
    steps = []
    for t in range(words.size(1)):
        steps.append(decoder.step(words[:, t], memory, state, need_weights))
        state = steps[-1].state
    return [
        None if steps[0][part] is None else torch.stack([step[part] for step in steps], dim)
        for part, dim in ((0, 1), (2, 2), (3, 2))
    ]


@every_decoder
def test_forward_equals_step_word_by_word(name):
    decoder = decoder_of(name)
    memory = decoder.memory(some_annotations(B, mask=MASK))
    forward = decoder(some_words(), memory)
    assert forward.outputs.shape == (B * Q, T, E)
    for whole, stepped in zip(forward, unroll(decoder, some_words(), memory), strict=True):
        assert same(whole, stepped)


@pytest.mark.parametrize(
    "multiple, lengths",
    [
        (1, [[1, 0], [2, 4], [3, 1]]),  # the longest is not the first
        (2, [[1, 2], [0, 0], [0, 2]]),
        (8, [[0, 0], [0, 0], [0, 0]]),
    ],
)
@every_decoder
def test_steps_behind_a_captions_end_change_nothing_before_it(name, multiple, lengths, monkeypatch):
    monkeypatch.setattr(decoders, "ROW_MULTIPLE", multiple)
    decoder = decoder_of(name)
    memory = decoder.memory(some_annotations(B, mask=MASK))
    whole, cut = decoder(some_words(), memory), decoder(some_words(), memory, lengths=torch.tensor(lengths))
    spoken = torch.arange(T) < torch.tensor(lengths)[..., None]  # (B, Q, T)
    assert cut.outputs.shape == whole.outputs.shape and cut.outputs.isfinite().all()
    assert same(cut.outputs[spoken.flatten(0, 1)], whole.outputs[spoken.flatten(0, 1)])
    for one, other in zip(cut[1:], whole[1:], strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and same(one[spoken], other[spoken]))


@pytest.mark.parametrize("multiple, wanted", [(1, [6, 3, 1, 1]), (2, [6, 4, 2, 2]), (4, [6, 4, 4, 4]), (8, [6] * 4)])
def test_a_caption_that_has_ended_takes_no_step(multiple, wanted, monkeypatch):
    monkeypatch.setattr(decoders, "ROW_MULTIPLE", multiple)
    decoder = LSTMDecoder(E, D).double()
    rows = []
    decoder.state_to_gates.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    lengths = torch.tensor([[1, 4], [2, 2], [0, 1]])
    with torch.no_grad():
        decoder(some_words(), decoder.memory(some_annotations(B)), lengths=lengths)
    assert rows == wanted  # an empty caption takes a first step


@every_decoder
def test_weights_that_nobody_needs_change_nothing_else(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B, mask=MASK))
    outputs, _, gates = decoder(words, memory)
    without = decoder(words, memory, need_weights=False)
    assert same(without.outputs, outputs) and without.weights is None and same(without.gates, gates)
    for whole, stepped in zip(without, unroll(decoder, words, memory, need_weights=False), strict=True):
        assert same(whole, stepped)
    state = decoder.start(memory, Q)
    for t in range(2):
        step, unweighed = (decoder.step(words[:, t], memory, state, needed) for needed in (True, False))
        assert all(same(one, other) for one, other in zip(step.state, unweighed.state, strict=True))
        assert same(step.output, unweighed.output) and unweighed.weights is None
        state = step.state


@every_decoder
def test_weights_and_gates_are_given_for_every_word(name):
    decoder = decoder_of(name)
    _, weights, gates = decoder(some_words(), decoder.memory(some_annotations(B, mask=MASK)))
    if "NoAttention" in name:
        assert weights is None and gates is None
        return
    assert weights.shape == (B, Q, T, N)
    assert same(weights.sum(-1), torch.ones(B, Q, T, dtype=torch.float64))
    assert ((weights != 0) == torch.tensor(MASK, dtype=torch.bool)[:, None, None]).all()
    assert (gates is not None) == ("gate" in name)
    if gates is not None:
        assert gates.shape == (B, Q, T) and (gates > 0).all() and (gates < 1).all()


@every_decoder
def test_a_later_word_never_changes_an_earlier_output(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B))
    before = decoder(words, memory)
    words[:, 2, 0] += 1  # not all values alike, which a layer norm would take out again
    after = decoder(words, memory)
    assert same(before.outputs[:, :2], after.outputs[:, :2])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert one is None or same(one[:, :, :2], other[:, :, :2])
    assert same(before.outputs[:, 2], after.outputs[:, 2], 1e-6) == ("blind" in name)
    assert same(before.outputs[:, 3], after.outputs[:, 3], 1e-6) == ("blind" in name)


@every_decoder
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(name):
    decoder, words, annotations = decoder_of(name), some_words(), some_annotations(B, mask=MASK)
    together = decoder(words, decoder.memory(annotations))
    for image in range(B):
        for query in range(Q):
            row = image * Q + query
            alone = decoder(words[row : row + 1], decoder.memory(of_image(annotations, image)))
            assert same(alone.outputs[0], together.outputs[row])
            for part, whole in zip(alone[1:], together[1:], strict=True):
                assert whole is None or same(part[0, 0], whole[image, query])


@every_decoder
def test_regions_that_do_not_exist_change_nothing(name):
    decoder, annotations = decoder_of(name), some_annotations(B, mask=MASK)
    plain = decoder(some_words(), decoder.memory(annotations))
    padded = decoder(some_words(), decoder.memory(more_regions(annotations)))
    assert same(plain.outputs, padded.outputs)
    assert plain.weights is None or same(plain.weights, padded.weights[..., :N])


@every_decoder
def test_memory_has_one_row_per_image_and_state_one_per_caption_image_by_image(name):
    decoder, annotations = decoder_of(name), some_annotations(B, mask=MASK)
    memory = decoder.memory(annotations)
    assert all(len(part) == B for part in memory)
    state = decoder.start(memory, Q)
    assert state and all(len(part) == B * Q for part in state)
    for image in range(B):
        alone = decoder.start(decoder.memory(of_image(annotations, image)), 1)
        for part, own in zip(state, alone, strict=True):
            assert same(part[image * Q : (image + 1) * Q], own.expand_as(part[:Q]))
    assert all(len(part) == B * Q for part in decoder.step(some_words()[:, 0], memory, state).state)


@every_decoder
def test_a_search_may_pick_and_double_the_rows_of_a_state_within_an_image(name):
    decoder, words, queries = decoder_of(name), some_words(B * 3), 3
    memory = decoder.memory(some_annotations(B, mask=MASK))
    state = decoder.start(memory, queries)
    for t in range(2):
        state = decoder.step(words[:, t], memory, state).state
    rows = torch.tensor([1, 2, 2, 3, 5, 4, 8, 6, 7])
    picked = tuple(part.index_select(0, rows) for part in state)
    plain, chosen = decoder.step(words[:, 2], memory, state), decoder.step(words[rows, 2], memory, picked)
    assert same(chosen.output, plain.output[rows])
    assert all(same(one, other[rows]) for one, other in zip(chosen.state, plain.state, strict=True))
    for one, other in ((chosen.weights, plain.weights), (chosen.gate, plain.gate)):
        assert one is None or same(one.flatten(0, 1), other.flatten(0, 1)[rows])


@pytest.mark.parametrize("need_weights", [True, False])
@every_decoder
def test_attention_sees_all_queries_of_an_image_at_once_and_no_repeated_memory(name, need_weights):
    decoder = decoder_of(name)
    seen = watch(decoder)
    memory = decoder.memory(some_annotations(B))
    with torch.no_grad():  # with gradients an attention may share work between the turns: test_loops.py
        decoder(some_words(), memory, need_weights)
    # A Transformer takes all words of all captions at once, once per layer.
    transformer = name in TRANSFORMERS
    calls = [Q * T] * decoder.layers if transformer else [Q] * T
    assert [query.shape[:2] for query, _ in seen] == [(B, queries) for queries in calls]
    decoder.step(some_words()[:, 0], memory, decoder.start(memory, Q), need_weights)
    in_step = seen[len(calls) :]
    assert [query.shape[:2] for query, _ in in_step] == [(B, Q)] * (decoder.layers if transformer else 1)
    for _, attended in seen:
        assert all(part.data_ptr() in {own.data_ptr() for own in memory} and len(part) == B for part in attended)


@every_decoder
def test_float32_is_close_to_float64(name):
    decoder, annotations = decoder_of(name), some_annotations(B, mask=MASK)
    exact = decoder(some_words(), decoder.memory(annotations))
    decoder.float()
    memory = decoder.memory(annotations._replace(values=annotations.values.float()))
    words = some_words().float()
    forward = decoder(words, memory)
    for part, stepped, double in zip(forward, unroll(decoder, words, memory), exact, strict=True):
        if double is None:
            continue
        assert part.dtype == torch.float32
        assert same(part, stepped, 1e-5) and same(part.double(), double, 1e-5)
    assert same(decoder(words, memory, need_weights=False).outputs, forward.outputs, 1e-5)


@every_decoder
def test_bfloat16_is_near_float32(name):
    decoder, annotations = decoder_of(name).float(), some_annotations(B, mask=MASK)
    annotations, words = annotations._replace(values=annotations.values.float()), some_words().float()
    exact = decoder(words, decoder.memory(annotations))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory = decoder.memory(annotations)
        for need_weights in (True, False):
            forward = decoder(words, memory, need_weights)
            stepped = unroll(decoder, words, memory, need_weights)
            for part, whole in zip((*forward, *stepped), (*exact, *exact), strict=True):
                assert part is None or same(part.float(), whole, 0.2)


@every_decoder
def test_the_image_reaches_the_output(name):
    decoder = decoder_of(name)
    one, other = (decoder(some_words(), decoder.memory(some_annotations(B, seed))).outputs[:, -1] for seed in (0, 1))
    assert ((one - other).abs().amax(1) > 1e-4).all()


@every_decoder
def test_dropout_is_for_training_only(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B))
    assert torch.equal(decoder(words, memory).outputs, decoder(words, memory).outputs)
    decoder.train()
    assert torch.equal(decoder(words, memory).outputs, decoder(words, memory).outputs) == (name not in TRANSFORMERS)


@every_decoder
def test_what_is_looked_at_follows_from_what_was_said(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B))
    before = decoder(words, memory).weights
    words[:, 0, 0] += 1
    after = decoder(words, memory).weights
    if "NoAttention" in name:
        assert before is None and after is None
    else:
        moved = (before - after).abs().amax() > 1e-6
        assert moved == ("blind" not in name and "Uniform" not in name)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_mean_of_existing_regions_feeds_the_first_state(attention):
    hidden_dim = D if "Dot" in attention else H
    decoder = LSTMDecoder(E, D, attention=ATTENTIONS[attention], hidden_dim=hidden_dim).double()
    annotations = some_annotations(B, mask=MASK)
    h, c = decoder.start(decoder.memory(annotations), 1)
    for image in range(B):
        existing = [annotations.values[image, i] for i in range(N) if MASK[image][i]]
        mean = torch.stack(existing).mean(0)
        assert same(h[image], torch.tanh(decoder.init_h.weight @ mean + decoder.init_h.bias))
        assert same(c[image], torch.tanh(decoder.init_c.weight @ mean + decoder.init_c.bias))


@pytest.mark.parametrize("reset", ["before", "after"])
def test_the_mean_of_existing_regions_is_the_first_state_of_a_gru(reset):
    decoder, annotations = GRUDecoder(E, D, hidden_dim=H, reset=reset).double(), some_annotations(B, mask=MASK)
    (s,) = decoder.start(decoder.memory(annotations), 1)
    for image in range(B):
        mean = annotations.values[image, annotations.mask[image]].mean(0)
        assert same(s[image], torch.tanh(decoder.init_s.weight @ mean + decoder.init_s.bias))


def test_a_first_state_of_zeros_is_zero_and_has_no_parameters():
    decoder = LSTMDecoder(E, D, hidden_dim=H, first_state="zero").double()
    assert all((part == 0).all() for part in decoder.start(decoder.memory(some_annotations(B)), Q))
    assert not [name for name, _ in decoder.named_parameters() if name.startswith("init")]


def test_a_decoder_that_never_sees_the_image_is_an_error():
    with pytest.raises(InputError, match="never sees the image"):
        LSTMDecoder(E, D, attention=NoAttention, first_state="zero")


def dot(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def add(*vectors):
    return [sum(values) for values in zip(*vectors, strict=True)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("attend", ["before", "after"])
def test_a_step_is_the_papers_equations_written_as_loops(attend, deep):
    torch.manual_seed(0)
    decoder = LSTMDecoder(
        E, D, attention=lambda q, a: Additive(q, a, dim=7), hidden_dim=H, attend=attend, deep_output=deep
    ).double()
    annotations, words = some_annotations(1), some_words(1)
    p = {name: parameter.tolist() for name, parameter in decoder.named_parameters()}
    a, y = annotations.values[0].tolist(), words[0, 0].tolist()
    mean = [sum(a[i][j] for i in range(N)) / N for j in range(D)]
    h = [math.tanh(x) for x in add(dot(p["init_h.weight"], mean), p["init_h.bias"])]
    c = [math.tanh(x) for x in add(dot(p["init_c.weight"], mean), p["init_c.bias"])]

    def look(h):
        scores = []
        for i in range(N):
            key = add(dot(p["attention.key.weight"], a[i]), p["attention.key.bias"])
            met = [math.tanh(x) for x in add(dot(p["attention.query.weight"], h), key)]
            scores += dot(p["attention.score.weight"], met)  # eq. 4
        alpha = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]  # eq. 5
        beta = sigmoid(add(dot(p["beta.weight"], h), p["beta.bias"])[0])  # section 4.2.1
        return alpha, beta, [beta * sum(alpha[i] * a[i][j] for i in range(N)) for j in range(D)]  # eq. 13

    if attend == "before":
        alpha, beta, z = look(h)
    gates = add(  # eq. 1
        dot(p["word_to_gates.weight"], y),
        dot(p["state_to_gates.weight"], z + h if attend == "before" else h),
        p["state_to_gates.bias"],
    )
    for k in range(H):
        i, f, o, g = gates[k], gates[H + k], gates[2 * H + k], gates[3 * H + k]
        c[k] = sigmoid(f) * c[k] + sigmoid(i) * math.tanh(g)  # eq. 2
        h[k] = sigmoid(o) * math.tanh(c[k])  # eq. 3
    if attend == "after":
        alpha, beta, z = look(h)
    output = add(dot(p["state_to_output.weight"], h), p["state_to_output.bias"])
    if deep or attend == "after":
        output = add(output, dot(p["context_to_output.weight"], z))
    if deep:
        output = add(output, y)  # eq. 7

    memory = decoder.memory(annotations)
    step = decoder.step(words[:, 0], memory, decoder.start(memory, 1))
    assert step.state[0][0].tolist() == pytest.approx(h, abs=1e-12)
    assert step.state[1][0].tolist() == pytest.approx(c, abs=1e-12)
    assert step.weights[0, 0].tolist() == pytest.approx(alpha, abs=1e-12)
    assert step.gate.item() == pytest.approx(beta, abs=1e-12)
    assert step.output[0].tolist() == pytest.approx([math.tanh(x) for x in output], abs=1e-12)


@pytest.mark.parametrize("attention", [NoAttention, Uniform, General])
def test_the_recurrence_is_torchs_lstm_cell(attention):
    torch.manual_seed(0)
    decoder = LSTMDecoder(E, D, attention=attention, hidden_dim=H, gate=False).double()
    context_dim = decoder.attention.context_dim
    cell = nn.LSTMCell(E + context_dim, H).double()
    order = torch.arange(4 * H).view(4, H)[[0, 1, 3, 2]].flatten()  # the paper's i f o g, torch's i f g o
    with torch.no_grad():
        context, recurrent = decoder.state_to_gates.weight[order].split((context_dim, H), 1)
        cell.weight_ih.copy_(torch.cat((decoder.word_to_gates.weight[order], context), 1))
        cell.weight_hh.copy_(recurrent)
        cell.bias_ih.copy_(decoder.state_to_gates.bias[order])
        cell.bias_hh.zero_()
    annotations, words = some_annotations(B), some_words(B)
    memory = decoder.memory(annotations)
    state = decoder.start(memory, 1)
    h, c = state
    for t in range(T):
        step = decoder.step(words[:, t], memory, state)
        state = step.state
        contexts = torch.empty(B, 0, dtype=torch.float64)
        if step.weights is not None:
            contexts = (step.weights[:, 0, :, None] * annotations.values).sum(1)
        h, c = cell(torch.cat((words[:, t], contexts), 1), (h, c))
        assert same(state[0], h) and same(state[1], c)


def test_a_blind_decoder_says_the_same_whatever_the_previous_words():
    decoder = LSTMDecoder(E, D, hidden_dim=H, feed_previous=False).double()
    memory = decoder.memory(some_annotations(B))
    assert torch.equal(decoder(some_words(seed=2), memory).outputs, decoder(some_words(seed=3), memory).outputs)


# The GRU


@pytest.mark.parametrize("name", ["GRU-Additive-before", "GRU-Additive-after"])
def test_a_step_of_the_gru_is_the_papers_equations_written_as_loops(name):
    decoder, annotations, words = decoder_of(name), some_annotations(1), some_words(1)
    p = {name: parameter.tolist() for name, parameter in decoder.named_parameters()}
    a = annotations.values[0].tolist()
    s = [
        math.tanh(x) for x in add(dot(p["init_s.weight"], [sum(v) / N for v in zip(*a, strict=True)]), p["init_s.bias"])
    ]

    def part(matrix, index):
        """Return one of the matrices in one: of z, of r and of the candidate."""
        return p[matrix][index * H : (index + 1) * H]

    memory = decoder.memory(annotations)
    state = decoder.start(memory, 1)
    for t in range(T):
        y = words[0, t].tolist()  # E y_{i-1}
        scores = []
        for j in range(N):  # appendix A.1.2
            key = add(dot(p["attention.key.weight"], a[j]), p["attention.key.bias"])
            met = [math.tanh(x) for x in add(dot(p["attention.query.weight"], s), key)]
            scores += dot(p["attention.score.weight"], met)
        alpha = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        c = [sum(alpha[j] * a[j][k] for j in range(N)) for k in range(D)]
        # The output is of s_{i-1}, as appendix A.2.2 prints it.
        pairs = add(dot(p["state_to_output.weight"], s), p["state_to_output.bias"])
        pairs = add(pairs, dot(p["word_to_output.weight"], y), dot(p["context_to_output.weight"], c))
        output = [max(pairs[2 * k], pairs[2 * k + 1]) for k in range(E)]
        z, r = (
            [
                sigmoid(x)
                for x in add(
                    dot(part("word_to_gates.weight", index), y),
                    dot(part("state_to_gates.weight", index), s),
                    dot(part("context_to_gates.weight", index), c),
                    part("word_to_gates.bias", index),
                )
            ]
            for index in (0, 1)
        )
        if "before" in name:
            recurrent = dot(p["state_to_candidate.weight"], [r[k] * s[k] for k in range(H)])
        else:
            recurrent = add(dot(p["state_to_candidate.weight"], s), p["state_to_candidate.bias"])
            recurrent = [r[k] * recurrent[k] for k in range(H)]
        inner = add(dot(part("word_to_gates.weight", 2), y), dot(part("context_to_gates.weight", 2), c))
        inner = add(inner, recurrent, part("word_to_gates.bias", 2))
        s = [(1 - z[k]) * s[k] + z[k] * math.tanh(inner[k]) for k in range(H)]

        step = decoder.step(words[:, t], memory, state)
        state = step.state
        assert step.weights[0, 0].tolist() == pytest.approx(alpha, abs=1e-12)
        assert step.output[0].tolist() == pytest.approx(output, abs=1e-12)
        assert state[0][0].tolist() == pytest.approx(s, abs=1e-12)


@pytest.mark.parametrize("attention", [NoAttention, Uniform, General])
def test_the_gru_that_resets_after_the_product_is_torchs_gru_cell(attention):
    torch.manual_seed(0)
    decoder = GRUDecoder(E, D, attention=attention, hidden_dim=H, reset="after").double()
    context_dim = decoder.attention.context_dim
    cell = nn.GRUCell(E + context_dim, H).double()
    z, r, candidate = torch.arange(3 * H).view(3, H)
    order = torch.cat((r, z, candidate))  # ours are z r n, torch's r z n
    sign = torch.ones(3 * H, dtype=torch.float64)
    sign[H : 2 * H] = -1  # torch keeps z of the state, the paper 1 - z, and sigmoid(-x) = 1 - sigmoid(x)
    with torch.no_grad():
        inward = [decoder.word_to_gates.weight]
        if context_dim:
            inward.append(decoder.context_to_gates.weight)
        cell.weight_ih.copy_(sign[:, None] * torch.cat(inward, 1)[order])
        recurrent = torch.cat((decoder.state_to_gates.weight, decoder.state_to_candidate.weight))
        cell.weight_hh.copy_(sign[:, None] * recurrent[order])
        cell.bias_ih.copy_(sign * decoder.word_to_gates.bias[order])
        cell.bias_hh.zero_()  # but for the candidate's, which the reset gate reaches
        cell.bias_hh[2 * H :] = decoder.state_to_candidate.bias
    annotations, words = some_annotations(B), some_words(B)
    memory = decoder.memory(annotations)
    state = decoder.start(memory, 1)
    (s,) = state
    for t in range(T):
        step = decoder.step(words[:, t], memory, state)
        state = step.state
        contexts = torch.empty(B, 0, dtype=torch.float64)
        if step.weights is not None:
            contexts = (step.weights[:, 0, :, None] * annotations.values).sum(1)
        s = cell(torch.cat((words[:, t], contexts), 1), s)
        assert same(state[0], s, 1e-10)


# The Transformer


def place(position, size):
    """The positional encoding of Vaswani et al. (2017), section 3.5, as printed."""
    values = []
    for i in range(size):
        angle = position / 10000 ** (2 * (i // 2) / size)
        values.append(math.cos(angle) if i % 2 else math.sin(angle))
    return values


def jolt(module):
    """Move norms and biases away from the ones and zeros that they begin with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def torchs(decoder):
    """The decoder that torch brings, with the same weights."""
    size = decoder.embedding_dim
    layer = nn.TransformerDecoderLayer(
        size, decoder.heads, decoder.feed_forward_dim, norm_first=decoder.norm_first, batch_first=True
    )
    norm = nn.LayerNorm(size) if decoder.norm_first else None
    theirs = nn.TransformerDecoder(layer, decoder.layers, norm=norm).double()
    if norm is not None:
        norm.load_state_dict(decoder.norm.state_dict())
    with torch.no_grad():
        for own, their in zip(decoder.stack, theirs.layers, strict=True):
            their.self_attn.in_proj_weight.copy_(own.self_attention.project.weight)
            their.self_attn.in_proj_bias.copy_(own.self_attention.project.bias)
            their.self_attn.out_proj.load_state_dict(own.self_attention.output.state_dict())
            cross, parts = their.multihead_attn, own.cross_attention
            cross.in_proj_weight.copy_(torch.cat((parts.query.weight, parts.key.weight, parts.value.weight)))
            cross.in_proj_bias.copy_(torch.cat((parts.query.bias, torch.zeros(size), parts.value.bias)))
            cross.out_proj.load_state_dict(parts.output.state_dict())
            their.linear1.load_state_dict(own.feed_forward[0].state_dict())
            their.linear2.load_state_dict(own.feed_forward[3].state_dict())
            for norm, copy in zip(own.norms, (their.norm1, their.norm2, their.norm3), strict=True):
                copy.load_state_dict(norm.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_transformer_is_torchs_weights_included(layers, norm_first):
    torch.manual_seed(0)
    size, heads, count = 8, 2, 5
    decoder = TransformerDecoder(size, size, layers=layers, heads=heads, feed_forward_dim=11, norm_first=norm_first)
    decoder = jolt(decoder.double().eval())
    annotations = some_annotations(B, mask=MASK, annotation_dim=size)
    words = some_words(count=count, size=size)
    theirs, looked = torchs(decoder), []

    def look(attention, given, settings):
        settings = {**settings, "need_weights": True, "average_attn_weights": False}
        looked.append(nn.MultiheadAttention.forward(attention, *given, **settings)[1])

    for layer in theirs.layers:
        layer.multihead_attn.register_forward_pre_hook(look, with_kwargs=True)
    expected = theirs(
        words + torch.tensor([place(t, size) for t in range(count)], dtype=torch.float64),
        annotations.values.repeat_interleave(Q, 0),  # torch's knows no queries that share an image
        tgt_mask=torch.ones(count, count, dtype=torch.bool).triu(1),
        memory_key_padding_mask=~annotations.mask.repeat_interleave(Q, 0),
    )
    memory = decoder.memory(annotations)
    for outputs, weights, _ in (decoder(words, memory), unroll(decoder, words, memory)):
        assert same(outputs, expected, 1e-10)
        assert same(weights, looked[-1].mean(1).unflatten(0, (B, Q)), 1e-10)
    assert same(decoder(words, memory, need_weights=False).outputs, expected, 1e-10)
    all_weights = torch.stack(looked, 1).unflatten(0, (B, Q))  # (B, Q, layers, heads, T, N)
    assert same(decoder.head_weights(words, memory), all_weights, 1e-10)


@every_transformer
def test_the_weights_of_all_heads_and_layers_can_be_had(name):
    decoder = decoder_of(name)
    memory = decoder.memory(some_annotations(B, mask=MASK))
    weights = decoder.head_weights(some_words(), memory)
    assert weights.shape == (B, Q, decoder.layers, decoder.heads, T, N)
    assert same(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    exists = torch.tensor(MASK, dtype=torch.bool)[:, None, None, None, None]
    assert ((weights > 0) == exists).all()
    assert same(weights[:, :, -1].mean(2), decoder(some_words(), memory).weights)
    assert not same(weights[:, :, -1, 0], weights[:, :, 0, 1], 1e-3)  # each head looks for itself


@pytest.mark.parametrize("name", [name for name in KINDS if name not in TRANSFORMERS])
def test_a_decoder_of_one_attention_has_one_layer_and_one_head(name):
    decoder = decoder_of(name)
    memory = decoder.memory(some_annotations(B, mask=MASK))
    weights, heads = decoder(some_words(), memory).weights, decoder.head_weights(some_words(), memory)
    assert heads is None if weights is None else same(heads, weights.view(B, Q, 1, 1, T, N))


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("first", [0, 1, 5000])
def test_sinusoidal_positions_are_the_papers_and_go_on(first, size):
    expected = torch.tensor([place(position, size) for position in range(first, first + 3)], dtype=torch.float64)
    assert same(sinusoidal_positions(first, first + 3, size, expected), expected, 1e-10)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_positions_tell_the_order_of_words(positions):
    # In one layer, the last word reads those before it as a set: nothing but positions can tell their order.
    torch.manual_seed(0)
    decoder = TransformerDecoder(E, D, layers=1, heads=2, positions=positions).double().eval()
    memory, words = decoder.memory(some_annotations(B)), some_words()
    exchanged = decoder(words[:, [1, 0, 2, 3]], memory).outputs[:, -1]
    assert (decoder(words, memory).outputs[:, -1] - exchanged).abs().amax(1).min() > 1e-6


def test_learned_positions_are_added_to_the_words():
    decoder, words = decoder_of("Transformer-learned-pre"), some_words(1)
    memory, moved = decoder.memory(some_annotations(1)), some_words(1, seed=3)
    plain = decoder(words, memory).outputs
    with torch.no_grad():
        decoder.position.weight[:T] += moved[0]
    assert not same(decoder(words, memory).outputs, plain, 1e-3)
    assert same(decoder(words - moved, memory).outputs, plain)


def test_a_caption_longer_than_learned_positions_is_an_error():
    decoder = TransformerDecoder(E, D, layers=1, heads=2, positions="learned", max_words=2).double().eval()
    memory, words = decoder.memory(some_annotations(B)), some_words()
    for run in (decoder, lambda words, memory: unroll(decoder, words, memory)):
        # Before a caption of two words comes what begins it.
        assert run(words[:, :3], memory)[0].shape == (B * Q, 3, E)
        with pytest.raises(InputError, match="3 words.* the 2 that.* learned.*max_words.*sinusoidal") as error:
            run(words, memory)
        assert not re.search(r"[.!?]\s|\n", str(error.value))


def test_sinusoidal_positions_go_on_beyond_any_length():
    decoder = TransformerDecoder(E, D, layers=1, heads=2, max_words=3).double().eval()
    words = some_words(B, count=200)
    assert decoder(words, decoder.memory(some_annotations(B))).outputs.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"heads": 3}, "4 values into 3 heads"),
        ({"heads": 0}, "0 heads"),
        ({"layers": 0}, "0 layers"),
        ({"feed_forward_dim": 0}, "feed_forward_dim 0"),
        ({"max_words": 0}, "max_words 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
    ],
)
def test_a_transformer_that_cannot_be_is_an_error(settings, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        TransformerDecoder(E, D, **{"heads": 2, **settings})
    assert not re.search(r"[.!?]\s|\n", str(error.value))


@every_transformer
def test_dropout_stands_where_its_description_says(name):
    decoder, dropped = decoder_of(name).train(), []
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == decoder.dropout == 0.1
            module.register_forward_hook(lambda _, given, __: dropped.append(tuple(given[0].shape)))
    decoder(some_words(), decoder.memory(some_annotations(B)))
    word, inner = (B * Q, T, E), (B * Q, T, decoder.feed_forward_dim)
    assert dropped == [word] + [word, word, inner, word] * decoder.layers


def test_layers_do_not_begin_alike():
    decoder = decoder_of("Transformer-sinusoidal-pre")
    first, second = (dict(layer.named_parameters()) for layer in decoder.stack)
    assert not any(torch.equal(first[key], second[key]) for key in first if "norms" not in key)


@every_transformer
def test_a_step_projects_one_word_whatever_the_number_before(name):
    decoder, words, seen = decoder_of(name), some_words(), []
    for module in decoder.modules():
        if isinstance(module, CausalSelfAttention):
            module.project.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    memory = decoder.memory(some_annotations(B))
    unroll(decoder, words, memory)
    assert seen == [(B * Q, 1, E)] * T * decoder.layers
    seen.clear()
    decoder(words, memory)
    assert seen == [(B * Q, T, E)] * decoder.layers


@every_transformer
def test_a_step_adds_one_word_to_the_state(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B))
    state = decoder.start(memory, Q)
    for t in range(T):
        assert len(state) == 2 * decoder.layers
        assert all(part.shape == (B * Q, decoder.heads, t, E // decoder.heads) for part in state)
        following = decoder.step(words[:, t], memory, state).state
        assert all(torch.equal(part[:, :, :t], before) for part, before in zip(following, state, strict=True))
        state = following


@pytest.mark.parametrize("kind", [LSTMDecoder, GRUDecoder])
@pytest.mark.parametrize("lengths", [None, [[4, 1], [2, 3], [4, 4]]])
def test_a_compiled_turn_changes_nothing(kind, lengths):
    decoder = kind(E, D).double()
    annotations, lengths = some_annotations(B, mask=MASK), None if lengths is None else torch.tensor(lengths)
    spoken = torch.ones(B, Q, T, dtype=torch.bool) if lengths is None else torch.arange(T) < lengths[..., None]

    def run():
        decoder.zero_grad()
        found = decoder(some_words(), decoder.memory(annotations), lengths=lengths)
        found = [None if part is None else part[spoken] for part in (found[0].unflatten(0, (B, Q)), *found[1:])]
        (found[0].square().sum() + found[1].square().sum()).backward()
        return *found, *(parameter.grad for parameter in decoder.parameters())

    plain = run()
    turns = []
    decoder.compile(backend=lambda graph, _: turns.append(graph) or graph.forward)  # torch's tracing, no compiler
    for one, other in zip(plain, run(), strict=True):
        assert same(one, other, 1e-10)
    assert len(turns) == 1  # one turn, whatever its number


def test_a_step_asks_the_fewest_images_and_places(monkeypatch):
    def asked(lengths):
        return [(block.images, block.queries) for block in decoders._Plan(3, 2, 4, lengths).blocks]

    lengths = torch.tensor([[1, 0], [2, 4], [3, 1]])
    assert asked(lengths) == [(3, 2)] * 4  # eight rows, or all
    monkeypatch.setattr(decoders, "ROW_MULTIPLE", 1)
    assert asked(lengths) == [(3, 2), (2, 2), (2, 1), (1, 1)]


@pytest.mark.parametrize("kind", [LSTMDecoder, GRUDecoder])
def test_the_turns_of_a_loop_share_their_layers(kind, monkeypatch):
    made, linear = [], loops.linear
    monkeypatch.setattr(loops, "linear", lambda layer: made.append(layer) or linear(layer))
    decoder = kind(E, D).double()
    decoder(some_words(), decoder.memory(some_annotations(B)))
    assert len(made) == len(set(made)) >= 3
