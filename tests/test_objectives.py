import math
from functools import partial

import pytest
import torch

from captioner.attention import Annotations, MultiHead
from captioner.datamodule import Batch
from captioner.decoders import GRUDecoder, TransformerDecoder
from captioner.encoders import SmallCNN
from captioner.objectives import CrossEntropy, WordPresence, doubly_stochastic
from captioner.task import CaptioningTask
from captioner.vocabulary import END, PAD, Vocabulary

TARGETS = torch.tensor([[[4, END, PAD], [3, 4, END]], [[END, PAD, PAD], [PAD, PAD, PAD]]])  # (2, 2, 3)
LOGITS = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_words_and_ignores_padding(smoothing):
    losses = []
    for logits, target in zip(LOGITS.view(-1, 5).tolist(), TARGETS.flatten().tolist(), strict=True):
        if target != PAD:
            log_sum = math.log(sum(map(math.exp, logits)))
            wanted = log_sum - logits[target]
            losses.append((1 - smoothing) * wanted + smoothing * sum(log_sum - logit for logit in logits) / 5)
    assert len(losses) == 6
    loss = CrossEntropy(label_smoothing=smoothing)(LOGITS, TARGETS)
    assert loss.cross_entropy.item() == pytest.approx(sum(losses) / 6, abs=1e-6)
    assert loss.total.item() == loss.cross_entropy.item() and loss.attention.item() == 0


def test_cross_entropy_on_paper():
    logits = torch.tensor([[[[0.0, 0, 0, math.log(5)], [9.0, 0, 0, 0]]]])  # probabilities 1/8 1/8 1/8 5/8, then a pad
    assert CrossEntropy()(logits, torch.tensor([[[3, PAD]]])).total.item() == pytest.approx(math.log(8 / 5))


def test_logits_of_half_precision_are_scored_in_float32():
    loss = CrossEntropy()(LOGITS.bfloat16(), TARGETS)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(CrossEntropy()(LOGITS.bfloat16().float(), TARGETS).total.item(), abs=1e-6)


def test_the_doubly_stochastic_term_on_paper():
    weights = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    # Sums over the two words: 0.75 and 1.25; squares of what is missing: 1/16 and 1/16.
    assert doubly_stochastic(weights, torch.tensor([[[4, END]]])).item() == pytest.approx(1 / 16)
    # The second word is a pad: sums 0.5 and 0.5.
    assert doubly_stochastic(weights, torch.tensor([[[END, PAD]]])).item() == pytest.approx(1 / 4)


def test_the_doubly_stochastic_term_averages_over_captions_and_existing_regions():
    weights = torch.zeros(2, 2, 2, 3)
    weights[0, 0] = torch.tensor([[1.0, 0, 0], [0, 1, 0]])  # sums 1 1 0: squares 0 0 1
    weights[0, 1] = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0]])  # second is a pad; 0.5 0.5 0: 0.25 0.25 1
    weights[1, 0] = torch.tensor([[1.0, 0, 0], [1, 0, 0]])  # one region only; sum 2: 1
    weights[1, 1] = 1 / 3  # padding alone
    targets = torch.tensor([[[4, END], [END, PAD]], [[4, END], [PAD, PAD]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert doubly_stochastic(weights, targets, mask).item() == pytest.approx((0 + 0 + 1 + 0.25 + 0.25 + 1 + 1) / 7)
    # Without the mask the two regions that were never looked at count, at 1 each.
    assert doubly_stochastic(weights, targets).item() == pytest.approx((3.5 + 2) / 9)


def test_the_term_enters_with_its_weight():
    weights = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    loss = CrossEntropy(doubly_stochastic=0.5)(LOGITS, TARGETS, weights, mask)
    assert loss.attention.item() == pytest.approx(doubly_stochastic(weights, TARGETS, mask).item()) != 0
    assert loss.total.item() == pytest.approx(loss.cross_entropy.item() + 0.5 * loss.attention.item())


@pytest.mark.parametrize("decoder", [GRUDecoder, TransformerDecoder])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_training_forms_weights_only_for_an_objective_that_asks_for_them(weight, decoder, monkeypatch):
    objective = CrossEntropy(doubly_stochastic=weight)
    assert objective.needs_weights == (weight != 0)
    settings = {"attention": partial(MultiHead, heads=2, dim=8)} if decoder is GRUDecoder else {"layers": 2, "heads": 2}
    torch.manual_seed(0)
    task = CaptioningTask(SmallCNN(size=32, width=2), decoder=partial(decoder, **settings), embedding_dim=8)
    task.objective = objective
    task._build(Vocabulary(["a", "ball"]))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(task, "log_dict", lambda logged, **_: parts.update(logged))
    weighed, parts, weigh = [], {}, MultiHead.weigh
    monkeypatch.setattr(MultiHead, "weigh", lambda *given: weighed.append(given) or weigh(*given))
    tokens = torch.tensor([[[1, 4, 5, END]], [[1, 5, END, PAD]]])
    loss = task.training_step(Batch([0, 1], torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, tokens), 0)
    loss.backward()
    assert loss.isfinite() and bool(weighed) == ("train/attention" in parts) == bool(weight)


def test_padding_receives_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    weights = torch.full((2, 2, 3, 4), 0.25, requires_grad=True)
    CrossEntropy(label_smoothing=0.1)(logits, TARGETS, weights).total.backward()
    for tensor in (logits, weights):
        assert ((tensor.grad != 0).any(-1) == (TARGETS != PAD)).all()


def test_word_presence_by_hand():
    presence = WordPresence(2, 4 + 2)
    with torch.no_grad():
        presence.score.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        presence.score.bias.copy_(torch.tensor([0.0, -1.0]))
    values = torch.tensor([[[1.0, 0.0], [3.0, 1.0], [9.0, 9.0]]])  # the last region does not exist
    annotations = Annotations(values, torch.tensor([[True, True, False]]))
    tokens = torch.tensor([[[1, 4, 2, 0], [1, 4, 3, 2]]])  # says the first word, in both captions, and not the second
    first = math.log((math.exp(1) + math.exp(3)) / 2)
    second = math.log((math.exp(-1) + math.exp(1)) / 2)
    expected = math.log1p(math.exp(-first)) + math.log1p(math.exp(second))
    assert presence(annotations, tokens).item() == pytest.approx(expected, rel=1e-5)


def test_word_presence_teaches_the_region_that_shows_the_word_most():
    presence = WordPresence(2, 4 + 1)
    torch.nn.init.ones_(presence.score.weight)
    values = torch.tensor([[[5.0, 5.0], [0.0, 0.0]]], requires_grad=True)
    presence(Annotations(values), torch.tensor([[[1, 2]]])).backward()
    shown, other = values.grad[0].norm(dim=1).tolist()
    assert shown > 100 * other > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_of_packed_logits_is_torchs(dtype, count, smoothing):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 11, generator=random, dtype=dtype).requires_grad_()
    targets = torch.randint(1, 11, (1, 1, count), generator=random)
    loss = 3 * CrossEntropy(label_smoothing=smoothing)(logits, targets).total
    wanted = 3 * torch.nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, logits) for value in (loss, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_logits_of_half_precision_are_scored_in_float32(dtype):
    logits, targets = LOGITS[TARGETS != PAD].to(dtype).requires_grad_(), TARGETS
    loss = CrossEntropy(label_smoothing=0.1)(logits, targets).total
    exact = logits.detach().float().requires_grad_()
    wanted = CrossEntropy(label_smoothing=0.1)(exact, targets).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    (gradient,), (exactly,) = torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, exact)
    torch.testing.assert_close(gradient.float(), exactly, rtol=8e-3, atol=1e-6)


def test_the_gradient_of_half_precision_has_no_common_error():
    # 1 / 641 in bfloat16 is 0.2 % too small, for every value alike.
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(641, 200, generator=random).bfloat16().requires_grad_()
    targets = torch.randint(1, 200, (1, 1, 641), generator=random)
    exact = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(CrossEntropy()(logits, targets).total, logits)
    (wanted,) = torch.autograd.grad(CrossEntropy()(exact, targets).total, exact)
    assert (gradient.double() * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=1e-3)


def test_a_scaled_loss_of_float16_has_finite_gradients():
    logits = torch.zeros(1, 5, dtype=torch.float16, requires_grad=True)
    (65536 * CrossEntropy()(logits, torch.tensor([[[3]]])).total).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("logits, targets", [(5, 4), (128, 140)])
def test_logits_and_targets_that_do_not_match_are_an_error(logits, targets):
    with pytest.raises((ValueError, RuntimeError)):
        CrossEntropy()(torch.zeros(logits, 7), torch.full((1, 1, targets), 3))
