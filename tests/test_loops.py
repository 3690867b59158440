"""Loops over the words of given captions: the values and gradients of the plain path, at fewer products."""

import gc
import weakref

import pytest
import torch
from torch import nn

from captioner import loops
from captioner.attention import Additive, Annotations, Attention
from captioner.decoders import GRUDecoder, LSTMDecoder
from captioner.loops import Block

B, Q, N, D, H, A = 3, 2, 4, 5, 6, 7
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
WHOLE = Block(B, Q)
SOME = Block(2, Q, torch.tensor([3, 0, 2]))  # of two images, in any order, one query missing
TURNS = [WHOLE, SOME, Block(1, 1)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def numbers(*shape, seed=0, scale=1.0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def looks_of(attention, given, mask, loop, need_weights=True):
    memory = attention.memory(Annotations(given[0], mask))
    look = attention.looks(memory, need_weights) if loop else Attention.looks(attention, memory, need_weights)
    return [look(block, query) for block, query in zip(TURNS, given[1:], strict=True)]


def loss_of(turns, weighted, read=True):
    total = 0
    for index, (context, weights) in enumerate(turns):
        if read:
            total = total + (context * numbers(*context.shape, seed=index)).sum()
        if weighted:
            total = total + (weights.square() * (index + 1)).sum()
    return total


def inputs():
    return [numbers(B, N, D, seed=7), numbers(B * Q, H, seed=1), numbers(3, H, seed=2), numbers(1, H, seed=3)]


def differentiated(attention, mask, loop, weighted, read=True):
    given = inputs()
    turns = looks_of(attention, given, mask, loop)
    wanted = [*given, *attention.parameters()]
    return turns, torch.autograd.grad(loss_of(turns, weighted, read), wanted, allow_unused=True)


@pytest.mark.parametrize("weighted, read", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_additive_turns_have_the_values_and_gradients_of_the_plain_path(mask, weighted, read):
    attention = Additive(H, D, dim=A).double()
    (turns, gradients), (plain, wanted) = (
        differentiated(attention, mask, loop, weighted, read) for loop in (True, False)
    )
    for (context, weights), (plain_context, plain_weights) in zip(turns, plain, strict=True):
        torch.testing.assert_close(context, plain_context, rtol=0, atol=1e-13)
        torch.testing.assert_close(weights, plain_weights, rtol=0, atol=1e-13)
    for gradient, plainly in zip(gradients, wanted, strict=True):
        assert plainly.abs().max() > 1e-5
        torch.testing.assert_close(gradient, plainly, rtol=0, atol=1e-13)


def test_the_weights_are_given_where_they_are_needed():
    attention = Additive(H, D, dim=A).double()
    assert all(weights is None for _, weights in looks_of(attention, inputs(), MASK, loop=True, need_weights=False))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_a_loop_has_the_gradients_of_the_layer(bias):
    layer = nn.Linear(H, A, bias=bias).double()

    def run(product):
        states = [numbers(4, H)]
        for rows in (4, 3, 1):  # fewer from turn to turn
            states.append(torch.tanh(product(states[-1][:rows])) @ numbers(A, H, seed=9).detach())
        return states[-1].square().sum(), [states[0], *layer.parameters()]

    gradients = [torch.autograd.grad(*run(product)) for product in (layer, loops.linear(layer))]
    for plainly, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, plainly, rtol=0, atol=1e-12)


def test_a_second_backward_pass_gives_the_same_gradients():
    attention = Additive(H, D, dim=A).double()
    given = inputs()
    loss = loss_of(looks_of(attention, given, MASK, loop=True), weighted=True)
    # One that wants the queries' gradients alone leaves its sums of the others behind.
    torch.autograd.grad(loss, given[1:], retain_graph=True)
    first = torch.autograd.grad(loss, [given[0], *attention.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [given[0], *attention.parameters()])
    _, wanted = differentiated(attention, MASK, loop=False, weighted=True)
    for one, other, plainly in zip(first, again, [wanted[0], *wanted[len(given) :]], strict=True):
        torch.testing.assert_close(one, plainly, rtol=0, atol=1e-13)
        assert torch.equal(one, other)


def test_two_loops_over_one_layer_add_up():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    first, second = loops.linear(layer), loops.linear(layer)
    (first(x).square().sum() + second(x)[:2].sum() + first(x[1:]).sum()).backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    (layer(x).square().sum() + layer(x)[:2].sum() + layer(x[1:]).sum()).backward()
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=0, atol=1e-12)


def test_frozen_parts_take_no_gradient_and_stop_none():
    attention = Additive(H, D, dim=A).double().requires_grad_(False)
    given = inputs()
    loss_of(looks_of(attention, given, MASK, loop=True), weighted=False).backward()
    _, wanted = differentiated(Additive.requires_grad_(attention), MASK, loop=False, weighted=False)
    for value, plainly in zip(given, wanted, strict=False):
        torch.testing.assert_close(value.grad, plainly, rtol=0, atol=1e-13)
    given = [value.detach() for value in inputs()[:1]] + inputs()[1:]  # annotations of a frozen encoder
    loss_of(looks_of(attention.requires_grad_(False), given, MASK, loop=True), weighted=False).backward()
    torch.testing.assert_close(given[1].grad, wanted[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_pairs_are_those_of_tanh_and_have_finite_gradients(dtype):
    reach = torch.tensor([-100.0, -39.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 39.0, 100.0], dtype=dtype)
    queries = reach[:, None].expand(-1, A)[None].contiguous()  # (1, 9, A)
    keys = (0.5 * reach)[:, None].expand(-1, A)[None].contiguous()
    score = torch.linspace(-1, 1, A, dtype=dtype)[None] + 0.3
    limited = [part.clamp(-loops.LIMIT, loops.LIMIT) for part in (queries, keys)]
    wanted = torch.tanh(limited[0][:, :, None] + limited[1][:, None]) @ score[0]
    found = loops.additive_scores(queries, keys, score)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-5)
    leaves = [tensor.requires_grad_() for tensor in (queries.flatten(0, 1).clone(), keys.clone(), score)]
    turn = loops.additive(leaves[1], numbers(1, 9, D).to(dtype), torch.ones(1, 9, dtype=torch.bool), leaves[2])
    context, weights = turn(Block(1, 9), leaves[0])
    (context.sum() + weights.square().sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_attention_under_no_gradient_is_that_with_one():
    attention = Additive(H, D, dim=A).double()
    memory = attention.memory(Annotations(numbers(B, N, D), MASK))
    query = numbers(B, Q, H, seed=1)
    with torch.no_grad():
        context, weights = attention(query, memory)
    with_context, with_weights = attention(query, memory)
    torch.testing.assert_close(context, with_context.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(weights, with_weights.detach(), rtol=0, atol=1e-13)
    assert torch.equal(weights == 0, ~MASK[:, None].expand_as(weights))


@pytest.mark.parametrize("kind", [LSTMDecoder, GRUDecoder])
def test_in_bfloat16_a_step_is_as_close_to_float32_as_the_plain_path(kind):
    torch.manual_seed(0)
    decoder = kind(32, 24, attention=Additive, hidden_dim=48)
    words, values = torch.randn(10, 9, 32), torch.randn(5, 6, 24)
    lengths = torch.tensor([[9, 4], [3, 8], [1, 9], [5, 5], [7, 2]])

    def gradients(mixed):
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs, weights, _ = decoder(words, decoder.memory(Annotations(values)), lengths=lengths)
        (outputs.float().square().mean() + weights.square().mean()).backward()
        return outputs, torch.cat([p.grad.flatten() for p in decoder.parameters()])

    class Plain(Additive):
        """Of another class, so that its turns share nothing."""

    (exact, gradient), (rounded, rounded_gradient) = gradients(mixed=False), gradients(mixed=True)
    decoder.attention.__class__ = Plain
    plain, plain_gradient = gradients(mixed=True)

    def error(found, wanted):
        return ((found.float() - wanted).norm() / wanted.norm()).item()

    assert 0 < error(rounded, exact) < 1.5 * error(plain, exact) < 0.02
    assert 0 < error(rounded_gradient, gradient) < 1.5 * error(plain_gradient, gradient) < 0.05


def test_keys_are_exponentiated_once_and_never_repeated(monkeypatch):
    shapes, met = [], []
    exponential, meet = loops.exponential, loops.meet
    monkeypatch.setattr(loops, "exponential", lambda x: shapes.append(tuple(x.shape)) or exponential(x))
    monkeypatch.setattr(loops, "meet", lambda q, k, out: met.append((len(q), len(k))) or meet(q, k, out))
    attention = Additive(H, D, dim=A).double()
    given = inputs()
    memory = attention.memory(Annotations(given[0], MASK))
    look = attention.looks(memory)
    loss_of([look(block, query) for block, query in zip(TURNS, given[1:], strict=True)], weighted=False).backward()
    assert shapes == [(B, N, A), (B * Q, A), (3, A), (1, A)]
    assert met == [(B, B), (2, 2), (1, 1), (1, 1), (2, 2), (B, B)]  # forward, and back


def test_a_loops_tensors_go_with_its_graph():
    attention = Additive(H, D, dim=A).double()
    gc.disable()
    try:
        turns = looks_of(attention, inputs(), None, loop=True)
        kept = weakref.ref(turns[0][0])
        graph = weakref.ref(turns[0][0].grad_fn)
        del turns
        assert kept() is None and graph() is None
    finally:
        gc.enable()


def test_there_is_no_second_derivative():
    x, layer = numbers(4, H), nn.Linear(H, A).double()
    (gradient,) = torch.autograd.grad(loops.linear(layer)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("block", [WHOLE, SOME])
def test_a_block_fills_and_takes(block):
    rows = numbers(B * Q if block.places is None else len(block.places), D)
    filled = block.fill(rows)
    assert filled.shape == (block.images, block.queries, D)
    assert torch.equal(block.take(filled), rows)
    assert (filled == 0).all(-1).sum() == block.images * block.queries - len(rows)


@pytest.mark.parametrize("images", [1, 2, 100])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_scores_of_some_images_at_a_time_change_nothing(mask, images, monkeypatch):
    monkeypatch.setattr(loops, "CACHED_BYTES", images * Q * N * A * 8)
    attention = Additive(H, D, dim=A).double()
    (turns, gradients), (plain, wanted) = (
        differentiated(attention, mask, loop, weighted=True) for loop in (True, False)
    )
    for one, other in zip([*sum(turns, ()), *gradients], [*sum(plain, ()), *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_the_memory_of_scores_is_small_and_made_once(monkeypatch):
    monkeypatch.setattr(loops, "CACHED_BYTES", Q * N * A * 8)
    met, meet = [], loops.meet
    monkeypatch.setattr(loops, "meet", lambda q, k, out: met.append((len(q), out.data_ptr())) or meet(q, k, out))
    attention = Additive(H, D, dim=A).double()
    loss_of(looks_of(attention, inputs(), MASK, loop=True), weighted=False).backward()
    assert {images for images, _ in met} == {1}
    assert len({where for _, where in met}) == 1


def test_a_turn_may_ask_more_than_those_before_it():
    attention = Additive(H, D, dim=A).double()
    turns = [Block(1, 1), SOME, WHOLE]
    queries = [numbers(rows, H, seed=rows) for rows in (1, 3, B * Q)]
    found = []
    for looks in (attention.looks, lambda memory: Attention.looks(attention, memory)):
        values = numbers(B, N, D, seed=7)
        look = looks(attention.memory(Annotations(values, MASK)))
        loss = loss_of([look(block, query) for block, query in zip(turns, queries, strict=True)], weighted=True)
        found.append(torch.autograd.grad(loss, [values, *queries, *attention.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_loop_of_one_turn_drops_what_an_unfinished_backward_pass_left():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    product = loops.linear(layer)(x)
    torch.autograd.grad(product.sum(), x, retain_graph=True)
    (bias,) = torch.autograd.grad(product.sum(), layer.bias)
    torch.testing.assert_close(bias, torch.full_like(bias, 4.0))


def test_after_a_backward_pass_a_loop_keeps_no_sums():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    product = loops.linear(layer)(x)
    loop = product.grad_fn.loop
    product.sum().backward()
    assert not loop.inputs and not loop.gradients


def test_a_bias_is_summed_in_its_own_precision():
    layer, x = nn.Linear(1, 1), torch.zeros(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        turn = loops.linear(layer)
        loss = sum(turn(x).float().sum() * weight for weight in (256.0, 1.0))
    loss.backward()
    assert layer.bias.grad.item() == 257  # 256 in bfloat16


@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_no_number_is_never_hidden(where):
    attention = Additive(H, D, dim=A).double()
    values, query = numbers(B, N, D).detach(), numbers(B * Q, H, seed=1).detach()
    (query if where == "query" else values.view(-1, D))[0] = torch.nan
    memory = attention.memory(Annotations(values))
    _, weights = attention.looks(memory)(WHOLE, query)
    assert weights[0].isnan().all() and not weights[Q:].isnan().any()
    with torch.no_grad():
        _, weights = attention(query.view(B, Q, H), memory)
    assert weights[0, 0].isnan().all() and not weights[1:].isnan().any()


def test_pairs_within_the_limit_are_as_exact_as_tanh():
    reach = torch.linspace(-39, 39, 79, dtype=torch.float64)
    queries, keys = reach[None, :, None], reach.flip(0)[None, :, None] + 0.25
    wanted = torch.tanh(queries[0] + keys[0].T)
    found = loops.additive_scores(queries, keys, torch.ones(1, 1, dtype=torch.float64))[0]
    torch.testing.assert_close(found - found[0, 0], wanted - wanted[0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mixed", [True, False])
def test_scores_of_half_precision_are_summed_in_float32(mixed):
    queries, keys = numbers(B, Q, 64).bfloat16(), numbers(B, N, 64, seed=1).bfloat16()
    score = numbers(1, 64, seed=2).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = loops.additive_scores(queries, keys, score)
    met = torch.tanh(queries.double()[:, :, None] + keys.double()[:, None]) @ score[0].double()
    difference = found - met  # but for a constant
    assert found.dtype == torch.float32
    assert (difference - difference[0, 0, 0]).abs().max() < 1e-4


def test_an_attention_derived_from_the_additive_one_scores_as_it_says():
    class Sharper(Additive):
        def scores(self, query, keys):
            return 3 * super().scores(query, keys)

    attention = Sharper(H, D, dim=A).double()
    memory = attention.memory(Annotations(numbers(B, N, D), MASK))
    query = numbers(B, Q, H, seed=1)
    _, weights = attention.looks(memory)(WHOLE, query.flatten(0, 1))
    torch.testing.assert_close(weights, attention(query, memory)[1].flatten(0, 1), rtol=0, atol=1e-13)


def test_attention_has_no_second_derivative():
    keys, queries, score = numbers(B, N, A), numbers(B * Q, A, seed=1), numbers(1, A, seed=2)
    turn = loops.additive(keys, numbers(B, N, D), MASK, score)
    (gradient,) = torch.autograd.grad(turn(WHOLE, queries)[0].square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_loop_goes_after_a_backward_pass_that_asked_for_no_parameter(frozen):
    layer, x = nn.Linear(H, H).double().requires_grad_(not frozen), numbers(4, H)
    turn = loops.linear(layer)
    loss = turn(torch.tanh(turn(x))).sum()
    kept = weakref.ref(loss.grad_fn.next_functions[0][0].loop)
    torch.autograd.grad(loss, x)
    del turn, loss
    gc.collect()
    assert kept() is None


def test_a_pass_over_earlier_turns_takes_nothing_that_another_left():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    turn = loops.linear(layer)
    first, second = turn(x), turn(x)
    torch.autograd.grad(second.sum(), x, retain_graph=True)
    (bias,) = torch.autograd.grad(first.sum(), layer.bias)
    torch.testing.assert_close(bias, torch.full_like(bias, 4.0))


def test_parameters_changed_before_the_backward_pass_are_an_error():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    product = loops.linear(layer)(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_layer_of_another_class_or_with_hooks_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(H, A).double(), numbers(4, H)
    assert torch.equal(loops.linear(layer)(x), layer(x))
    layer, called = nn.Linear(H, A).double(), []
    layer.register_forward_hook(lambda *_: called.append(True))
    loops.linear(layer)(x)
    assert called


def test_float64_stays_float64_under_autocast():
    layer, x = nn.Linear(H, A).double(), numbers(4, H)
    with torch.autocast("cpu", torch.bfloat16):
        product, wanted = loops.linear(layer)(x), layer(x)
    assert product.dtype == wanted.dtype == torch.float64
    product.sum().backward()


def test_scores_are_the_same_with_and_without_a_gradient():
    attention = Additive(H, D, dim=A).double()
    query, keys = numbers(B, Q, H), attention.keys(numbers(B, N, D))
    with torch.no_grad():
        scores = attention.scores(query, keys)
    torch.testing.assert_close(scores, attention.scores(query, keys).detach(), rtol=0, atol=1e-13)
