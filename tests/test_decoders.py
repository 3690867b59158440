import math

import pytest
import torch
from torch import nn
from variants import ATTENTIONS, DECODERS, D, E, H, N, more_regions, of_image, same, some_annotations

from captioner.attention import Additive, Attention, General, NoAttention, Uniform
from captioner.decoders import LSTMDecoder
from captioner.errors import InputError

B, Q, T = 3, 2, 4
MASK = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]

every_decoder = pytest.mark.parametrize("name", DECODERS)


def decoder_of(name):
    torch.manual_seed(0)
    return DECODERS[name](E, D).double()


def some_words(rows=B * Q, seed=2):
    return torch.randn(rows, T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unroll(decoder, words, memory):
    """Step word by word; the outputs as `forward` gives them."""
    state = decoder.start(memory, len(words) // len(memory[0]))
    steps = []
    for t in range(words.size(1)):
        steps.append(decoder.step(words[:, t], memory, state))
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
    words[:, 2] += 1
    after = decoder(words, memory)
    assert same(before.outputs[:, :2], after.outputs[:, :2])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert one is None or same(one[:, :, :2], other[:, :, :2])
    assert torch.equal(before.outputs[:, 2:], after.outputs[:, 2:]) == ("blind" in name)


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
def test_attention_sees_all_queries_of_an_image_at_once_and_no_repeated_memory(name):
    decoder = decoder_of(name)
    seen = []
    for module in decoder.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, given: seen.append(given))
    memory = decoder.memory(some_annotations(B))
    decoder(some_words(), memory)
    decoder.step(some_words()[:, 0], memory, decoder.start(memory, Q))
    assert seen
    for query, attended in seen:
        assert query.shape[:2] == (B, Q)
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
        assert same(part, stepped, 1e-6) and same(part.double(), double, 1e-5)


@every_decoder
def test_the_image_reaches_the_output(name):
    decoder = decoder_of(name)
    one, other = (decoder(some_words(), decoder.memory(some_annotations(B, seed))).outputs[:, -1] for seed in (0, 1))
    assert ((one - other).abs().amax(1) > 1e-4).all()


@every_decoder
def test_what_is_looked_at_follows_from_what_was_said(name):
    decoder, words = decoder_of(name), some_words()
    memory = decoder.memory(some_annotations(B))
    before = decoder(words, memory).weights
    words[:, 0] += 1
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
