import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from variants import ATTENTIONS, D, N, more_regions, of_image, same, some_annotations

from captioner.attention import Additive, Annotations, Dot, General, MultiHead, ScaledDot, Uniform
from captioner.errors import InputError

MASK = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]]
WEIGHING = [name for name in ATTENTIONS if name != "NoAttention"]
DEPENDENT = [name for name in WEIGHING if name != "Uniform"]


def attention_of(name, dtype=torch.float64):
    torch.manual_seed(0)
    return ATTENTIONS[name](D, D).to(dtype)


def queries(images, count, seed=1):
    return torch.randn(images, count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(attention, query, annotations, need_weights=True):
    return attention(query, attention.memory(annotations), need_weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WEIGHING)
def test_weights_are_not_negative_sum_to_one_and_are_zero_where_masked(name, dtype):
    annotations = some_annotations(3, mask=MASK)
    annotations = annotations._replace(values=annotations.values.to(dtype))
    attention = attention_of(name, dtype)
    context, weights = attend(attention, queries(3, 2).to(dtype), annotations)
    assert context.shape == (3, 2, attention.context_dim) and weights.shape == (3, 2, N)
    assert context.dtype == weights.dtype == dtype
    assert (weights >= 0).all()
    assert same(weights.sum(-1), torch.ones(3, 2, dtype=dtype), 1e-12 if dtype == torch.float64 else 1e-6)
    assert ((weights != 0) == annotations.mask[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_weights_that_nobody_needs_do_not_change_the_context(name, dtype):
    annotations = some_annotations(3, mask=MASK)
    annotations = annotations._replace(values=annotations.values.to(dtype))
    attention, query = attention_of(name, dtype), queries(3, 2).to(dtype)
    context, _ = attend(attention, query, annotations)
    alone, weights = attend(attention, query, annotations, need_weights=False)
    assert weights is None and alone.dtype == dtype
    assert same(alone, context, 1e-12 if dtype == torch.float64 else 1e-5)


def test_multi_head_forms_no_weights_that_nobody_needs(monkeypatch):
    monkeypatch.setattr(MultiHead, "weigh", None)
    context, weights = attend(attention_of("MultiHead"), queries(3, 2), some_annotations(3), need_weights=False)
    assert context.shape == (3, 2, 8) and weights is None


@pytest.mark.parametrize("name", [name for name in WEIGHING if name != "MultiHead"])
def test_the_context_is_the_expected_annotation(name):
    annotations = some_annotations(3, mask=MASK)
    context, weights = attend(attention_of(name), queries(3, 2), annotations)
    for image in range(3):
        for query in range(2):
            expected = sum(weights[image, query, i] * annotations.values[image, i] for i in range(N))
            assert same(context[image, query], expected)


def test_uniform_weighs_existing_regions_alike():
    _, weights = attend(attention_of("Uniform"), queries(3, 2), some_annotations(3, mask=MASK))
    expected = torch.tensor([[0.25] * 4, [0.5, 0, 0.5, 0], [0, 0, 1, 0]], dtype=torch.float64)
    assert torch.equal(weights, expected[:, None].expand(-1, 2, -1))


def test_uniform_is_exact_in_float64():
    annotations = some_annotations(1, regions=3)
    context, _ = attend(attention_of("Uniform"), queries(1, 1), annotations)
    assert same(context[0, 0], annotations.values[0].mean(0))


def test_no_attention_reads_an_empty_context_and_has_no_weights():
    context, weights = attend(attention_of("NoAttention"), queries(3, 2), some_annotations(3))
    assert context.shape == (3, 2, 0) and weights is None


@pytest.mark.parametrize("name", DEPENDENT)
def test_weights_depend_on_the_query(name):
    _, weights = attend(attention_of(name), queries(1, 2), some_annotations(1))
    assert (weights[0, 0] - weights[0, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", DEPENDENT)
def test_weights_depend_on_the_region(name):
    _, weights = attend(attention_of(name), queries(1, 1), some_annotations(1))
    assert weights.max() - weights.min() > 1e-3


@pytest.mark.parametrize("name", WEIGHING)
def test_regions_have_no_order(name):
    attention, annotations = attention_of(name), some_annotations(3, mask=MASK)
    order = [2, 0, 3, 1]
    permuted = Annotations(annotations.values[:, order], annotations.mask[:, order])
    context, weights = attend(attention, queries(3, 2), annotations)
    permuted_context, permuted_weights = attend(attention, queries(3, 2), permuted)
    assert same(permuted_context, context)
    assert same(permuted_weights, weights[..., order])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_memory_has_one_row_per_image(name):
    memory = attention_of(name).memory(some_annotations(3, mask=MASK))
    assert memory and all(len(part) == 3 for part in memory)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(name):
    attention, annotations, query = attention_of(name), some_annotations(3, mask=MASK), queries(3, 2)
    context, weights = attend(attention, query, annotations)
    for image in range(3):
        alone, alone_weights = attend(attention, query[image : image + 1, :1], of_image(annotations, image))
        assert same(alone[0, 0], context[image, 0])
        assert weights is None or same(alone_weights[0, 0], weights[image, 0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_regions_that_do_not_exist_change_nothing(name, need_weights):
    attention, annotations = attention_of(name), some_annotations(3, mask=MASK)
    context, weights = attend(attention, queries(3, 2), annotations, need_weights)
    padded, padded_weights = attend(attention, queries(3, 2), more_regions(annotations), need_weights)
    assert same(padded, context)
    assert weights is None or same(padded_weights[..., :N], weights)


@pytest.mark.parametrize("name", WEIGHING)
def test_no_mask_is_a_mask_of_ones(name):
    attention, annotations = attention_of(name), some_annotations(2)
    masked = annotations._replace(mask=annotations.existing())
    for without, with_mask in zip(
        attend(attention, queries(2, 2), annotations), attend(attention, queries(2, 2), masked), strict=True
    ):
        assert torch.equal(without, with_mask)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", WEIGHING)
def test_masked_regions_receive_no_gradient_and_no_nan(name, need_weights):
    annotations = some_annotations(3, mask=MASK)
    annotations.values.requires_grad_()
    context, _ = attend(attention_of(name), queries(3, 2), annotations, need_weights)
    context.square().sum().backward()
    gradient = annotations.values.grad
    assert gradient.isfinite().all()
    assert ((gradient != 0).any(-1) == annotations.mask).all()


def test_the_mean_is_over_existing_regions():
    values = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]]])
    assert Annotations(values, torch.tensor([[True, True, False]])).mean().tolist() == [[2.0, 4.0]]
    assert Annotations(values).mean().tolist() == [[18.0, pytest.approx(58 / 3)]]


def test_additive_attention_on_paper():
    # W = U = identity, b = 0, v = (1, 2); tanh(atanh(x)) = x, so the scores are 0.5 * 1 and 0.25 * 2 + 0.5 * 1.
    attention = Additive(2, 2, dim=2).double()
    with torch.no_grad():
        for layer in (attention.query, attention.key):
            layer.weight.copy_(torch.eye(2))
        attention.key.bias.zero_()
        attention.score.weight.copy_(torch.tensor([[1.0, 2.0]]))
    query = torch.tensor([[[math.atanh(0.5), 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[0.0, 0.0], [0.0, math.atanh(0.25)]]], dtype=torch.float64)
    _, weights = attend(attention, query, Annotations(values))
    second = math.exp(1.0) / (math.exp(0.5) + math.exp(1.0))
    assert weights[0, 0].tolist() == pytest.approx([1 - second, second], abs=1e-12)


def test_additive_attention_is_the_papers_equations_written_as_loops():
    attention, annotations, query = attention_of("Additive"), some_annotations(1), queries(1, 1)
    w, u, b = attention.query.weight.tolist(), attention.key.weight.tolist(), attention.key.bias.tolist()
    v = attention.score.weight.tolist()
    a, q = annotations.values[0].tolist(), query[0, 0].tolist()
    scores = []
    for i in range(N):
        score = 0.0
        for k in range(len(b)):
            inner = b[k] + sum(w[k][j] * q[j] for j in range(D)) + sum(u[k][j] * a[i][j] for j in range(D))
            score += v[0][k] * math.tanh(inner)  # Bahdanau et al., appendix A.1.2
        scores.append(score)
    alpha = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]  # eq. 5
    z = [sum(alpha[i] * a[i][j] for i in range(N)) for j in range(D)]  # eq. 13
    context, weights = attend(attention, query, annotations)
    assert weights[0, 0].tolist() == pytest.approx(alpha, abs=1e-12)
    assert context[0, 0].tolist() == pytest.approx(z, abs=1e-12)


def test_additive_is_concat():
    attention, annotations, query = attention_of("Additive"), some_annotations(1), queries(1, 1)
    joined = torch.cat((attention.query.weight, attention.key.weight), 1)  # W of Luong et al., section 3.1
    pairs = torch.cat((query[0].expand(N, -1), annotations.values[0]), 1)
    scores = torch.tanh(pairs @ joined.T + attention.key.bias) @ attention.score.weight[0]
    assert same(attend(attention, query, annotations)[1][0, 0], scores.softmax(0))


def test_the_products_are_those_of_their_papers():
    annotations, query = some_annotations(2), queries(2, 3)
    q, a = query.numpy(), annotations.values.numpy()
    general = attention_of("General")
    expected = {
        "Dot": (q[:, :, None] * a[:, None]).sum(-1),
        "ScaledDot": (q[:, :, None] * a[:, None]).sum(-1) / math.sqrt(D),
        "General": ((q @ general.key.weight.detach().numpy())[:, :, None] * a[:, None]).sum(-1),
    }
    for name, scores in expected.items():
        _, weights = attend(attention_of(name), query, annotations)
        assert same(weights, torch.from_numpy(scores).softmax(-1))


def test_scaled_dot_is_torchs():
    annotations, query = some_annotations(3, mask=MASK), queries(3, 2)
    context, _ = attend(ScaledDot(D, D), query, annotations)
    values = annotations.values
    assert same(context, F.scaled_dot_product_attention(query, values, values, attn_mask=annotations.mask[:, None]))


@pytest.mark.parametrize(("dim", "heads"), [(D, 2), (8, 4)])
def test_multi_head_is_torchs(dim, heads):
    torch.manual_seed(0)
    ours = MultiHead(dim, D, heads=heads, dim=dim).double()
    theirs = nn.MultiheadAttention(dim, heads, kdim=D, vdim=D, batch_first=True).double()
    with torch.no_grad():
        if dim == D:  # torch keeps the three in one where their sizes are equal
            theirs.in_proj_weight.copy_(torch.cat((ours.query.weight, ours.key.weight, ours.value.weight)))
        else:
            for name, own in (("q", ours.query), ("k", ours.key), ("v", ours.value)):
                getattr(theirs, f"{name}_proj_weight").copy_(own.weight)
        theirs.in_proj_bias.copy_(torch.cat((ours.query.bias, torch.zeros(dim), ours.value.bias)))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    annotations, values = some_annotations(3, mask=MASK), some_annotations(3).values
    query = torch.randn(3, 2, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    context, weights = attend(ours, query, annotations)
    their_context, their_weights = theirs(query, values, values, key_padding_mask=~annotations.mask)
    assert same(context, their_context, 1e-10) and same(weights, their_weights, 1e-10)
    assert same(attend(ours, query, annotations, need_weights=False)[0], their_context, 1e-10)
    _, of_heads = theirs(query, values, values, key_padding_mask=~annotations.mask, average_attn_weights=False)
    assert same(ours.weigh(query, ours.memory(annotations)), of_heads, 1e-10)


@pytest.mark.parametrize("kind", [Dot, ScaledDot])
def test_a_dot_product_of_unequal_sizes_is_an_error(kind):
    with pytest.raises(InputError, match=r"5 values.*6 values.*dim to 5"):
        kind(5, 6)


@pytest.mark.parametrize("heads", [4, 0, -2])
def test_heads_that_do_not_divide_are_an_error(heads):
    with pytest.raises(InputError, match=f"10 into {heads} heads"):
        MultiHead(D, D, heads=heads, dim=10)


@pytest.mark.parametrize("kind", [Additive, General, MultiHead, Uniform])
def test_a_query_and_an_annotation_may_differ_in_size(kind):
    attention = kind(3, D).double()
    context, weights = attend(attention, queries(2, 2)[..., :3], some_annotations(2))
    assert context.shape == (2, 2, attention.context_dim) and weights.shape == (2, 2, N)


def test_the_context_is_an_annotation_or_as_large_as_all_heads():
    sizes = {name: attention_of(name).context_dim for name in ATTENTIONS}
    assert sizes == {**dict.fromkeys(ATTENTIONS, D), "MultiHead": 8, "NoAttention": 0}
