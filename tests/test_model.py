import json
import re
from dataclasses import fields
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from variants import (
    ATTENTIONS,
    BRIDGES,
    DECODERS,
    EVERY,
    KINDS,
    TRANSFORMERS,
    D,
    E,
    N,
    attentions,
    more_regions,
    of_image,
    same,
    some_annotations,
    watch,
)

from captioner.attention import Annotations, MultiHead
from captioner.bridges import LinearBridge, TransformerBridge
from captioner.checkpoint import KEY, pack
from captioner.decoding import Decoding
from captioner.encoders import VGG16, ForeignEncoder, PrecomputedRegions, ResNet, SmallCNN
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import PARTS, Captioner, describe, find_captions, limits_of, rebuild
from captioner.objectives import CrossEntropy
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, BytePairs, Characters, Vocabulary, pad

WORDS = Vocabulary("a red blue ball box on under".split())
SIZE, GRID = 16, (2, 2)
TINY = Preprocessing(fit="squash", size=SIZE)
# Captions of two images, one of which has fewer.
TOKENS = pad([[[BEGIN, 4, 5, 7, END], [BEGIN, 4, 6, 8, 9, END]], [[BEGIN, 10, 4, UNKNOWN]]])

every_decoder = pytest.mark.parametrize("name", EVERY)
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Patches(nn.Module):
    """An encoder of somebody else's, with a batch norm that could drift."""

    annotation_dim = D
    preprocessing = TINY

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, D, 8, 8, bias=False), nn.BatchNorm2d(D)

    def forward(self, images):
        return self.norm(self.convolution(images))


def small_cnn():
    return SmallCNN(size=SIZE, width=2)  # 2 x 2 regions, too


def captioner(decoder="LSTM-Additive-before-fed-gate-deep-mean", encoder=None, vocabulary=WORDS, scale=4, **settings):
    """A model that speaks before it learns: images and words matter to it, and it is slow to end."""
    torch.manual_seed(0)
    model = Captioner(encoder or Patches(), vocabulary, decoder=DECODERS[decoder], embedding_dim=E, **settings)
    with torch.no_grad():
        for part in (model.decoder, model.output):
            for parameter in part.parameters():
                parameter.mul_(scale)
        model.output.bias[END] -= 4
    return model.eval()


def some_images(count=5):
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(2, (count, 2, 2, 3), generator=generator, dtype=torch.uint8) * 255  # of each quarter
    pixels = colours.repeat_interleave(10, 1).repeat_interleave(12, 2)
    return [Image.fromarray(image.numpy()) for image in pixels]


def teacher_forced(model, image, words):
    """The log-probability and the attention of a caption, one word at a time through `step`."""
    ids = [BEGIN, *(WORDS.words.index(word) + 4 for word in words), END]
    steps, take = [], model.decoder.step
    with (
        torch.no_grad(),
        patch.object(model.decoder, "step", lambda *given, **_: steps.append(take(*given)) or steps[-1]),
    ):
        memory = model.memory(model.annotate(model.preprocessing.pixels(image)[None]))
        state, total = model.decoder.start(memory, 1), 0.0
        for previous, following in zip(ids, ids[1:], strict=False):
            log_probabilities, state = model.step(torch.tensor([previous]), memory, state)
            total += log_probabilities[0, following].item()
    weights = [step.weights for step in steps]
    return total, None if weights[0] is None else torch.cat(weights)[:-1, 0]


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and not re.search(r"[.!?]\s", text) and "\n" not in text
    return True


# Construction


def test_sizes_are_read_off_the_parts():
    model = captioner(bridge=partial(LinearBridge, dim=9))
    assert (model.bridge.annotation_dim, model.decoder.annotation_dim, model.decoder.embedding_dim) == (9, 9, E)
    assert model.output.out_features == model.embedding.num_embeddings == len(WORDS)
    assert captioner().decoder.annotation_dim == captioner().encoder.annotation_dim == D


def test_tied_weights_are_one_tensor():
    model = captioner(tie_weights=True)
    assert model.output.weight is model.embedding.weight
    model = captioner(tie_weights=False)
    assert model.output.weight is not model.embedding.weight


@pytest.mark.parametrize("tie_weights", [True, False])
def test_an_embedding_begins_with_unit_variance_or_as_the_output_layer_needs_it(tie_weights):
    words = Vocabulary([f"word{number}" for number in range(500)])
    model = Captioner(Patches(), words, embedding_dim=64, tie_weights=tie_weights)
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8 if tie_weights else 1.0, rel=0.05)
    assert (model.embedding.weight[PAD] == 0).all() and model.embedding.padding_idx == PAD


@pytest.mark.parametrize("tie_weights", [True, False])
@every_kind
def test_a_tied_embeddings_words_are_scaled_for_a_transformer_alone(name, tie_weights):
    model, seen = captioner(name, tie_weights=tie_weights), []
    step = model.decoder.step
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.decoder.step = lambda word, *given, **more: seen.append(word) or step(word, *given, **more)
    annotations = Annotations(some_annotations(2).values.float())
    model(annotations, TOKENS)
    memory = model.memory(annotations)
    model.step(TOKENS[..., 1].flatten(), memory, model.decoder.start(memory, 2))
    scale = 2 if tie_weights and name in TRANSFORMERS else 1  # the square root of E, section 3.4
    assert torch.equal(seen[0], scale * model.embedding.weight[TOKENS[..., :-1].flatten(0, 1)])
    assert torch.equal(seen[1], scale * model.embedding.weight[TOKENS[..., 1].flatten()])


def test_any_module_may_be_the_encoder():
    model = captioner()
    assert isinstance(model.encoder, ForeignEncoder) and model.preprocessing == TINY
    annotations = model.annotate(torch.stack([TINY.pixels(image) for image in some_images(2)]))
    assert annotations.values.shape == (2, 4, D) and annotations.grid == GRID


# Teacher forcing


@every_decoder
def test_forward_equals_step_word_by_word(name):
    model = captioner(name).double()
    annotations = some_annotations(2)
    logits, weights, gates = model(annotations, TOKENS)
    assert logits.shape == (2, 2, 5, len(WORDS))
    memory = model.memory(annotations)
    state = model.decoder.start(memory, 2)
    for t in range(5):
        log_probabilities, state = model.step(TOKENS[..., t].flatten(), memory, state)
        assert same(log_probabilities.view(2, 2, -1), logits[:, :, t].log_softmax(-1), 1e-12)
    for part in (weights, gates):
        assert part is None or part.shape[:3] == (2, 2, 5)


@every_decoder
def test_scoring_no_padding_gives_the_same_loss_and_gradients(name):
    model = captioner(name).double()
    annotations = some_annotations(len(TOKENS))
    gradients = []
    for score in (model, model.score_words):
        model.zero_grad()
        logits, weights, _ = score(annotations, TOKENS)
        loss = CrossEntropy(label_smoothing=0.1)(logits, TOKENS[..., 1:], weights)
        loss.total.backward()
        gradients.append([loss.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    spoken = TOKENS[..., 1:] != PAD
    assert not spoken.all()  # or this would show nothing
    assert logits.shape == (spoken.sum(), logits.shape[-1])
    assert all(same(one, other, 1e-10) for one, other in zip(*gradients, strict=True))


def without_gradient(parameter):
    return parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() < 1e-9


@pytest.mark.parametrize("tie_weights", [True, False])
@every_decoder
def test_a_gradient_reaches_every_parameter_that_is_trained(name, tie_weights):
    bridge = partial(LinearBridge, dim=D, positions=True)
    encoder = ForeignEncoder(Patches(), learns=True)
    model = captioner(name, encoder, bridge=bridge, tie_weights=tie_weights).double().train()
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    annotations = model.encoder(images)
    logits, weights, _ = model(annotations, TOKENS)
    CrossEntropy()(logits, TOKENS[..., 1:], weights, annotations.mask).total.backward()
    dead = {key for key, parameter in model.named_parameters() if without_gradient(parameter)}
    # A blind decoder reads no word.
    assert dead == ({"embedding.weight"} if "blind" in name and not tie_weights else set())


@pytest.mark.parametrize(
    "encoder",
    [
        lambda learns: ForeignEncoder(Patches(), learns=learns),
        lambda learns: ResNet(depth=18, stage=1, preprocessing=TINY, learns=learns),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_a_frozen_encoder_takes_no_gradient_and_its_batch_norm_does_not_drift(encoder, learns):
    model = captioner(encoder=encoder(learns)).train()
    buffers = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    annotations = model.annotate(torch.stack([TINY.pixels(image) for image in some_images(2)]))
    logits, weights, _ = model(annotations, TOKENS)
    CrossEntropy()(logits, TOKENS[..., 1:], weights).total.backward()
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.encoder.named_buffers()) != learns
    assert all(parameter.grad is None for parameter in model.encoder.parameters()) != learns
    assert all(parameter.requires_grad == learns for parameter in model.encoder.parameters())


@every_kind
def test_keys_are_computed_once_per_image_in_training_and_in_a_beam_search(name):
    model, annotations = captioner(name).double(), some_annotations(2)
    memories, keys = [], []
    for attends in attentions(model):
        attends.memory = lambda given, compute=attends.memory: memories.append(given.values.shape) or compute(given)
        for key, module in attends.named_modules():
            if key in ("key", "value"):
                module.register_forward_hook(lambda _, given, __: keys.append(given[0].shape))
    attended = watch(model)
    layers = len(attentions(model))
    per_layer = 2 if name in TRANSFORMERS else {"Additive": 1, "General": 1, "MultiHead": 2}.get(name.split("-")[1], 0)

    with torch.no_grad():
        model(annotations, TOKENS)
    assert memories == [(2, N, D)] * layers and keys == [(2, N, D)] * layers * per_layer
    assert len(attended) == (layers if name in TRANSFORMERS else 5)
    memories.clear(), keys.clear(), attended.clear()
    model.search(annotations, beam_size=3, max_words=4)
    assert memories == [(2, N, D)] * layers and keys == [(2, N, D)] * layers * per_layer
    assert len(attended) > layers
    for query, memory in attended:  # of each image, whatever its beam; one that is done has left
        assert len(query) <= 2 and all(len(part) == len(query) for part in memory)
    queries = [query.size(1) for query, _ in attended]
    assert queries == [1] * layers + [3] * (len(queries) - layers)


@pytest.mark.parametrize("name", [name for name in KINDS if "MultiHead" in name or name in TRANSFORMERS])
def test_weights_are_formed_only_where_they_are_needed(name, monkeypatch):
    model, annotations, weighed = captioner(name).double(), some_annotations(2), []
    weigh = MultiHead.weigh
    monkeypatch.setattr(MultiHead, "weigh", lambda *given: weighed.append(given) or weigh(*given))
    logits, weights, _ = model(annotations, TOKENS)
    # Of a Transformer, those of the last layer are.
    assert weights is not None and len(weighed) == (1 if name in TRANSFORMERS else 5)
    weighed.clear()
    without, weights, _ = model(annotations, TOKENS, need_weights=False)
    model.search(annotations, beam_size=3, max_words=4)
    assert weights is None and same(without, logits) and not weighed


# Bridges before decoders

FEW_DECODERS = [
    *("LSTM-Additive-before-fed-gate-deep-mean", "LSTM-MultiHead-after-fed-open-shallow-zero"),
    *("GRU-Dot-before", "GRU-General-after", "GRU-NoAttention-before"),
    *("Transformer-sinusoidal-pre", "Transformer-learned-post"),
]
MASK = [[1, 1, 1, 1], [1, 0, 0, 1]]


def over_bridges(without_positions=False):
    bridges = [name for name in BRIDGES if not (without_positions and "with" in name)]
    return pytest.mark.parametrize(("bridge", "name"), list(product(bridges, FEW_DECODERS)))


def bridged(bridge, name):
    return captioner(name, bridge=BRIDGES[bridge]).double(), some_annotations(2, mask=MASK)._replace(grid=GRID)


def stepped(model, annotations, tokens):
    """What `forward` gives as log-probabilities, word by word."""
    memory = model.memory(annotations)
    state = model.decoder.start(memory, tokens.size(1))
    found = []
    for t in range(tokens.size(2) - 1):
        log_probabilities, state = model.step(tokens[..., t].flatten(), memory, state)
        found.append(log_probabilities.unflatten(0, tokens.shape[:2]))
    return torch.stack(found, 2)


@pytest.mark.parametrize("gradient", [True, False])
@over_bridges()
def test_behind_any_bridge_forward_equals_step(bridge, name, gradient):
    model, annotations = bridged(bridge, name)
    with torch.set_grad_enabled(gradient):
        logits, weights, _ = model(annotations, TOKENS)
        assert same(stepped(model, annotations, TOKENS), logits.log_softmax(-1))
    if weights is not None:
        assert same(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
        assert ((weights != 0) == annotations.mask[:, None, None]).all()


@over_bridges()
def test_behind_any_bridge_a_result_does_not_depend_on_what_else_is_in_the_batch(bridge, name):
    model, annotations = bridged(bridge, name)
    logits, weights, _ = model(annotations, TOKENS)
    for image, caption in product(range(2), range(2)):
        alone, looked, _ = model(of_image(annotations, image), TOKENS[image : image + 1, caption : caption + 1])
        assert same(alone[0, 0], logits[image, caption])
        assert weights is None or same(looked[0, 0], weights[image, caption])


@over_bridges(without_positions=True)  # more regions are no grid
def test_behind_any_bridge_regions_that_do_not_exist_change_nothing(bridge, name):
    model, annotations = bridged(bridge, name)
    logits, weights, _ = model(annotations, TOKENS)
    padded, more, _ = model(more_regions(annotations), TOKENS)
    assert same(padded, logits)
    assert weights is None or same(more[..., :N], weights) and (more[..., N:] == 0).all()


@over_bridges()
def test_behind_any_bridge_a_gradient_reaches_every_parameter(bridge, name):
    model, annotations = bridged(bridge, name)
    logits, weights, _ = model(annotations, TOKENS)
    CrossEntropy()(logits, TOKENS[..., 1:], weights, annotations.mask).total.backward()
    dead = {key for key, parameter in model.named_parameters() if "encoder" not in key and without_gradient(parameter)}
    assert not dead


@over_bridges()
def test_behind_any_bridge_a_rebuilt_model_gives_the_same_logits(bridge, name):
    model, annotations = bridged(bridge, name)
    contents = model.contents()
    contents = contents._replace(settings=json.loads(json.dumps(contents.settings)))
    again = Captioner.from_contents(contents, encoder=Patches()).double()
    again.load_state_dict(model.state_dict())  # in float64
    for one, other in zip(model(annotations, TOKENS), again(annotations, TOKENS), strict=True):
        assert one is None if other is None else torch.equal(one, other)


# Search


def find_apart(model, annotations, images, decoding):
    """Find captions of images that are due to end after 1 to 7 words, whatever the model would say."""
    images, memory = torch.tensor(images), model.memory(annotations)

    def step(words, memory, state):
        log_probabilities, following = model.step(words, memory[1:], state[1:])
        due = memory[0].repeat_interleave(len(words) // len(memory[0])) * 3 % 7 + 1
        batches.append(len(memory[0]))
        log_probabilities[:, END] += torch.where(state[0] < due, -500, 500)
        return log_probabilities, (state[0] + 1, *following)

    batches, start = [], (torch.zeros_like(images), *model.decoder.start(memory, 1))
    with torch.no_grad():
        found = find_captions(step, (images, *memory), start, model.vocabulary, decoding, images.tolist())
    return found, batches


# Each option means the same for every decoder; the first is what all else is measured by.
DECODINGS = {
    "beam": {"beam_size": 3},
    "greedy": {"beam_size": 1},
    "limits": {"beam_size": 3, "min_words": 3, "no_repeat_ngram": 2, "ban": ("box",), "begin_with": "a red"},
    "groups": {"beam_size": 4, "groups": 2, "diversity": 1.0},
    "samples": {"sample": True, "captions": 3, "seed": 2, "temperature": 0.7, "top_p": 0.9},
}
over_decodings = pytest.mark.parametrize("settings", DECODINGS.values(), ids=DECODINGS)


@over_decodings
@every_kind
def test_searching_a_batch_equals_one_image_at_a_time(name, settings):
    model, annotations = captioner(name).double(), some_annotations(5)
    together, batches = find_apart(model, annotations, range(5), Decoding(**settings))
    assert batches == sorted(batches, reverse=True) and batches[0] == 5 > batches[-1]
    assert len({len(found[0].tokens) for found in together}) > 3  # they end at different steps
    for image, found in enumerate(together):
        (alone,), _ = find_apart(model, of_image(annotations, image), [image], Decoding(**settings))
        assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in alone]
        for one, other in zip(found, alone, strict=True):  # exactly, but for the order of a matrix product's sums
            assert one[1:] == pytest.approx(other[1:], rel=1e-12, abs=1e-11)


@every_kind
def test_in_float32_a_batch_differs_from_one_image_only_where_two_captions_are_near(name):
    exact, narrow, annotations = captioner(name).double(), captioner(name), some_annotations(6)
    single = annotations._replace(values=annotations.values.float())
    for image, found in enumerate(narrow.search(single, beam_size=3, max_words=6)):
        (alone,) = narrow.search(of_image(single, image), beam_size=3, max_words=6)
        tokens = [found[0].tokens, alone[0].tokens]
        if tokens[0] != tokens[1]:
            scores = []
            for ids in tokens:
                each = torch.tensor([[[BEGIN, *ids]]])
                logits = exact(of_image(annotations, image), each)[0].log_softmax(-1)
                scores.append(logits.gather(-1, each[..., 1:, None]).sum().item() / len(ids) ** 0.7)
            assert abs(scores[0] - scores[1]) < 1e-4


@over_decodings
@every_kind
def test_every_hypothesis_has_the_log_probability_of_teacher_forcing(name, settings):
    model, annotations = captioner(name).double(), some_annotations(2)
    for image, found in enumerate(model.search(annotations, max_words=6, **settings)):
        assert found
        for tokens, log_probability, score in found:
            ids = torch.tensor([[[BEGIN, *tokens]]])
            with torch.no_grad():
                scores = model(of_image(annotations, image), ids)[0].log_softmax(-1)
            total = scores.gather(-1, ids[..., 1:, None]).sum().item()
            assert log_probability == pytest.approx(total, abs=1e-5)
            assert score <= total / len(tokens) ** 0.7 + 1e-5
            assert settings.get("groups") or score == pytest.approx(total / len(tokens) ** 0.7, abs=1e-5)
            words = model.vocabulary.decode(tokens)
            if settings is DECODINGS["limits"]:
                assert words[:2] == ["a", "red"] and len(words) >= 3 and "box" not in words
                assert len({*pairwise(words)}) == len(words) - 1


FEW_WORDS = Vocabulary("red blue ball".split())


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@every_kind
def test_a_wide_beam_is_brute_force(name, length_penalty):
    model, annotations = captioner(name, vocabulary=FEW_WORDS).double(), some_annotations(2)
    scores = [{}, {}]
    for length in range(4):
        for said in product((4, 5, 6), repeat=length):
            ids = torch.tensor([BEGIN, *said, END])
            with torch.no_grad():
                found = model(annotations, ids.expand(2, 1, -1))[0].log_softmax(-1)
            totals = found.gather(-1, ids[1:].expand(2, 1, -1)[..., None]).sum((1, 2, 3)).tolist()
            for image, total in enumerate(totals):
                scores[image][(*said, END)] = total, total / (length + 1) ** length_penalty
    searched = model.search(annotations, beam_size=40, max_words=3, length_penalty=length_penalty)
    for expected, found in zip(scores, searched, strict=True):
        assert len(expected) == 1 + 3 + 9 + 27
        best_first = sorted(expected, key=lambda tokens, expected=expected: -expected[tokens][1])
        assert [tuple(hypothesis.tokens) for hypothesis in found] == best_first
        for tokens, log_probability, score in found:
            assert (log_probability, score) == pytest.approx(expected[tuple(tokens)], abs=1e-9)


@every_kind
def test_a_beam_of_one_is_greedy(name):
    model, annotations = captioner(name).double(), some_annotations(3)
    for image, (hypothesis,) in enumerate(model.search(annotations, beam_size=1, max_words=6)):
        ids = [BEGIN]
        while ids[-1] != END:
            with torch.no_grad():  # the caption so far anew, without any state
                scores = model(of_image(annotations, image), torch.tensor([[[*ids, PAD]]]))[0][0, 0, -1]
            scores[[PAD, BEGIN, UNKNOWN]] = -torch.inf
            ids.append(END if len(ids) > 6 else scores.argmax().item())
        assert hypothesis.tokens == ids[1:]


@every_kind
def test_a_search_in_bfloat16_is_near_one_in_float32(name):
    model, annotations = captioner(name, vocabulary=FEW_WORDS, scale=1), some_annotations(2)
    annotations = annotations._replace(values=annotations.values.float())
    exact = model.search(annotations, beam_size=40, max_words=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.search(annotations, beam_size=40, max_words=3)
    for one, other in zip(exact, found, strict=True):
        expected = {tuple(hypothesis.tokens): hypothesis.log_probability for hypothesis in one}
        assert len(other) == 40
        for tokens, log_probability, _ in other:
            assert log_probability == pytest.approx(expected[tuple(tokens)], abs=0.2)


def test_a_caption_beyond_the_learned_positions_is_an_error():
    model = captioner("Transformer-learned-pre").double()  # of 32 places
    with torch.no_grad():
        model.output.bias[END] -= 100
    found = model.search(some_annotations(2), beam_size=2, max_words=32)
    assert len(found[0][0].tokens) == 33
    with pytest.raises(InputError, match="33 words.* the 32 .*learned positions") as error:
        model.search(some_annotations(2), beam_size=2, max_words=33)
    assert one_sentence(error)


def test_padding_and_the_unknown_word_are_never_said():
    model = captioner().double()
    with torch.no_grad():
        model.output.bias[[PAD, BEGIN, UNKNOWN]] += 100
    for found in model.search(some_annotations(2), beam_size=4, max_words=5):
        assert not any({PAD, BEGIN, UNKNOWN} & set(hypothesis.tokens) for hypothesis in found)
        assert found[0].log_probability < -90  # not renormalised


def test_a_banned_word_is_found_as_it_is_written_or_as_captions_are_cut():
    model = captioner(vocabulary=Vocabulary(["red", "Blue", "ball"])).double()
    for banned, left in (
        ((), {4, 5, 6}),
        (("RED",), {5, 6}),
        (("Blue",), {4, 6}),
        (("zebra", "<unk>", "."), {4, 5, 6}),
    ):
        found = model.search(some_annotations(2), beam_size=40, max_words=2, ban=banned)
        assert {index for image in found for hypothesis in image for index in hypothesis.tokens} - {END} == left


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ban": ["hot dog"]}, "'hot dog' is 2 words .*single words"),
        ({"ban": ["Red"], "begin_with": "a red"}, "'Red' is in both `ban` and `begin_with`"),
        ({"begin_with": " ".join(["red"] * 21)}, "longer than `max_words` 20"),
        ({"min_words": 21}, "`min_words` 21 is more than `max_words` 20"),
    ],
)
def test_limits_that_no_caption_can_keep_are_one_sentence(settings, said):
    with pytest.raises(InputError, match=said) as error:
        limits_of(Decoding(**settings), WORDS)
    assert one_sentence(error)


def test_a_beginning_is_cut_as_captions_are():
    vocabulary = Vocabulary("a photo of the dog 's ball".split())
    assert limits_of(Decoding(begin_with="A photo, of the dog's ball"), vocabulary).prefix == (4, 5, 6, 7, 8, 9, 10)


def test_a_beginning_of_words_that_the_model_does_not_know_is_an_error():
    with pytest.raises(InputError, match="'zebra'.* does not know") as error:
        captioner().double().search(some_annotations(2), begin_with="a red zebra on a giraffe")
    assert one_sentence(error)


def test_a_setting_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="beamsize"):
        captioner().double().search(some_annotations(1), beamsize=3)


def test_settings_stand_before_those_of_a_decoding():
    model, annotations = captioner().double(), some_annotations(2)
    decoding = Decoding(beam_size=2, max_words=4)
    assert model.search(annotations, decoding) == model.search(annotations, beam_size=2, max_words=4)
    assert model.search(annotations, decoding, beam_size=3) == model.search(annotations, beam_size=3, max_words=4)


# Captions


@pytest.mark.parametrize("beam_size", [1, 3])
@every_kind
def test_a_caption_brings_the_log_probability_and_the_attention_of_its_words(name, beam_size):
    model = captioner(name).double()  # where the fused attention differs less
    with torch.no_grad():
        model.output.bias[END] -= 20
    images = some_images()
    captions = model.caption(images, beam_size=beam_size, max_words=6, length_penalty=0.5)
    assert len(captions) == len(images)
    for image, caption in zip(images, captions, strict=True):
        total, weights = teacher_forced(model, image, caption.words)
        assert caption.text == " ".join(caption.words) and len(caption.words) <= 6
        assert caption.log_probability == pytest.approx(total, abs=1e-6)
        assert caption.score == pytest.approx(total / (len(caption.words) + 1) ** 0.5, abs=1e-6)
        assert caption.grid == GRID
        if "NoAttention" in name:
            assert caption.attention is None and caption.gates is None
            continue
        assert caption.attention.shape == (len(caption.words), N) and caption.attention.dtype == torch.float32
        assert same(caption.attention.sum(1), torch.ones(len(caption.words)), 1e-5)
        assert same(caption.attention.double(), weights, 1e-6)
        assert caption.gates.shape == (len(caption.words),) if "gate" in name else caption.gates is None
    assert any(len(caption.words) > 1 for caption in captions)


@pytest.mark.parametrize("training", [True, False])
@every_kind
def test_the_attention_of_all_heads_is_that_of_the_caption(name, training):
    model, image = captioner(name, dropout=0.5, tie_weights=True).double().train(training), some_images(1)[0]
    (caption,) = model.caption(image, beam_size=2, max_words=5)
    words = caption.words or ["red"]
    weights = model.head_weights(image, words)
    assert model.training == training
    if "NoAttention" in name:
        assert weights is None
        return
    layers, heads = (model.decoder.layers, model.decoder.heads) if name in TRANSFORMERS else (1, 1)
    assert weights.shape == (layers, heads, len(words), N) and not weights.requires_grad
    assert same(weights.sum(-1), torch.ones(layers, heads, len(words), dtype=torch.float64))
    if caption.words:
        assert same(weights[-1].mean(0).float(), caption.attention, 1e-6)


def test_the_attention_of_any_words_can_be_asked_for(tmp_path):
    model, image = captioner("Transformer-learned-pre"), some_images(1)[0]
    image.save(tmp_path / "image.png")
    long = ["red"] * 32
    assert model.head_weights(image, long).shape == (2, 2, 32, N)
    assert torch.equal(model.head_weights(tmp_path / "image.png", long), model.head_weights(image, long))
    # An unknown word is <unk>, and what is said later changes nothing.
    one, other = (model.head_weights(image, words) for words in (["a", "zebra", "red"], ["a", "<unk>", "blue"]))
    assert torch.equal(one, other) and one.shape[2] == 3
    assert model.head_weights(image, []).shape == (2, 2, 0, N)
    with pytest.raises(InputError, match="33 words") as error:
        model.head_weights(image, [*long, "red"])
    assert one_sentence(error)
    with pytest.raises(InputError):
        model.head_weights(tmp_path / "missing.png", long)


@pytest.mark.parametrize("settings", [{"beam_size": 2}, {"captions": 3}, {"captions": 3, "sample": True}], ids=str)
def test_attention_is_read_from_one_teacher_forced_pass_over_all_captions(settings):
    model, passes = captioner(), []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    found = list(model.caption_stream(some_images(3), **settings))
    assert len(passes) == 1 and [len(captions) for captions in found] == [settings.get("captions", 1)] * 3


@over_decodings
@pytest.mark.parametrize(
    "name", ["LSTM-Additive-before-fed-gate-deep-mean", "GRU-MultiHead-before", "Transformer-learned-pre"]
)
def test_each_of_several_captions_brings_its_own_attention(name, settings):
    model, images = captioner(name).double(), some_images(3)
    settings = {"captions": min(3, settings.get("beam_size", 3)), **settings}
    for image, captions in zip(images, model.caption_stream(images, max_words=6, **settings), strict=True):
        assert [caption.score for caption in captions] == sorted((one.score for one in captions), reverse=True)
        for caption in captions:
            total, weights = teacher_forced(model, image, caption.words)
            assert caption.log_probability == pytest.approx(total, abs=1e-6)
            assert (caption.attention is None) == (weights is None)
            if weights is not None:
                assert same(caption.attention.double(), weights, 1e-6)


def test_a_stream_holds_a_batch_at_a_time_and_gives_what_the_images_give_alone():
    model, images, taken = captioner().double(), some_images(5), []
    settings = {"max_words": 6, "sample": True, "captions": 2, "seed": 3}

    def source():
        for image in images:
            taken.append(image)
            yield image

    stream = model.caption_stream(source(), batch_size=2, **settings)
    assert taken == []
    said = [[caption.text for caption in next(stream)]]
    assert len(taken) == 2
    said += [[caption.text for caption in captions] for captions in stream]
    assert len(said) == len(taken) == 5
    # Nor do an image's samples depend on the size of the batches.
    assert [[caption.text for caption in captions] for captions in model.caption_stream(images, **settings)] == said
    best = [caption.text for caption in model.caption(images, batch_size=3, **settings)]
    assert best == [texts[0] for texts in said]


@pytest.mark.parametrize("path", [str, Path])
def test_one_image_is_a_stream_of_one(tmp_path, path):
    model, image = captioner(), some_images(1)[0]
    image.save(tmp_path / "a.png")
    for one in (image, np.asarray(image), path(tmp_path / "a.png")):
        assert [captions[0].text for captions in model.caption_stream(one)] == [model.caption(image)[0].text]


def test_what_a_stream_cannot_do_it_says_at_once():
    with pytest.raises(InputError, match="batch_size is 0") as error:
        captioner().caption_stream(some_images(1), batch_size=0)
    assert one_sentence(error)
    with pytest.raises(InputError, match="beam_size"):
        captioner().caption_stream(some_images(1), beam_size=0)


def test_images_may_be_arrays_and_tensors_one_or_many():
    model, images = captioner(), some_images(3)
    expected = [caption.text for caption in model.caption(images)]
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).movedim(2, 0) for array in arrays]
    for many in (
        arrays,
        np.stack(arrays),
        tensors,
        torch.stack(tensors),
        tuple(arrays),
        [images[0], arrays[1], tensors[2]],
    ):
        assert [caption.text for caption in model.caption(many)] == expected
    for one in (arrays[0], tensors[0]):
        assert [caption.text for caption in model.caption(one)] == expected[:1]
    grey = images[0].convert("L")
    assert model.caption(np.asarray(grey))[0].text == model.caption(grey)[0].text


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 5, 3)), r"Image 1 is an array \(4, 5, 3\) of float64"),
        (np.zeros((3, 4, 5), np.uint8), r"an array \(3, 4, 5\) of uint8"),
        (np.zeros((0, 5, 3), np.uint8), r"an array \(0, 5, 3\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"a tensor \(4, 5, 3\) of torch.uint8"),
        (torch.zeros(3, 4, 5), r"a tensor \(3, 4, 5\) of torch.float32"),
        (torch.zeros(3, dtype=torch.uint8), r"a tensor \(3,\)"),
        (None, "of type NoneType"),
    ],
    ids=str,
)
def test_what_is_no_image_is_named(image, said):
    with pytest.raises(InputError, match=said) as error:
        captioner().caption([some_images(1)[0], image])
    assert one_sentence(error)


def test_pixels_and_annotations_are_captioned_as_the_images_are():
    model, images = captioner().double(), some_images(3)
    assert model.preprocessings == [TINY]
    annotations = model.annotate_pixels([torch.stack([TINY.pixels(image) for image in images])])
    found = model.caption_annotations(annotations, Decoding(captions=2))
    for captions, others in zip(found, model.caption_stream(images, captions=2), strict=True):
        assert [caption.log_probability for caption in captions] == [caption.log_probability for caption in others]
    drawn = Decoding(sample=True, captions=4)
    one = model.caption_annotations(of_image(annotations, 2), drawn, numbers=[2])[0]
    assert [caption.words for caption in model.caption_annotations(annotations, drawn)[2]] == [
        each.words for each in one
    ]


def test_captions_do_not_depend_on_the_batch_size():
    model, images = captioner(), some_images()
    by_size = [model.caption(images, batch_size=size, max_words=6) for size in (1, 2, 32)]
    assert len({caption.text for caption in by_size[0]}) > 1
    for captions in by_size[1:]:
        for caption, first in zip(captions, by_size[0], strict=True):
            assert caption.words == first.words
            assert caption.log_probability == pytest.approx(first.log_probability, abs=1e-4)
            assert same(caption.attention, first.attention, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_captioning_leaves_the_mode_as_it_was_and_drops_nothing(training, tmp_path):
    model = captioner(dropout=0.5).train(training)
    modes = [module.training for module in model.modules()]
    images = some_images(2)
    assert [caption.log_probability for caption in model.caption(images)] == [
        caption.log_probability for caption in model.caption(images)
    ]
    with pytest.raises(InputError):
        model.caption(tmp_path / "missing.png")
    assert [module.training for module in model.modules()] == modes


def test_images_may_be_paths_or_opened_many_or_one(tmp_path):
    model, images = captioner(), some_images(2)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png")]
    expected = [caption.text for caption in model.caption(images)]
    assert [caption.text for caption in model.caption(paths)] == expected
    assert [caption.text for one in (images[0], paths[1]) for caption in model.caption(one)] == expected
    assert model.caption([]) == []


# Captions that are given


@every_kind
def test_a_caption_that_was_found_is_attended_to_alike_when_it_is_given(name):
    model = captioner(name).double()
    with torch.no_grad():
        model.output.bias[END] -= 20
    for image, found in zip(some_images(), model.caption(some_images(), max_words=5), strict=True):
        given = model.attend(image, found.text)
        assert (given.text, given.words, given.grid) == (found.text, found.words, found.grid)
        assert given.log_probability == given.score == pytest.approx(found.log_probability, abs=1e-6)
        for own, other in ((given.attention, found.attention), (given.gates, found.gates)):
            assert (own is None) == (other is None)
            assert own is None or same(own, other, 1e-6)


def test_given_captions_of_a_batch_are_attended_to_as_alone_in_one_pass_each(monkeypatch):
    model, images = captioner().double(), some_images(3)
    said = ["a red", "red", "blue a ball red"]
    alone = [model.attend(image, caption) for image, caption in zip(images, said, strict=True)]
    passes = []
    take = type(model.decoder).forward
    monkeypatch.setattr(
        type(model.decoder), "forward", lambda *given, **named: passes.append(1) or take(*given, **named)
    )
    seen = model.annotate_pixels([torch.stack([model.preprocessing.pixels(image) for image in images])])
    for one, other in zip(model.train().attend_annotations(seen, said), alone, strict=True):
        assert one.words == other.words and one.attention.shape == (len(one.words), N)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-9)
        assert same(one.attention, other.attention, 1e-6) and same(one.gates, other.gates, 1e-6)
    assert passes == [1] and model.training


def test_of_a_given_word_that_the_model_does_not_know_it_warns_once():
    model, image = captioner(), some_images(1)[0]
    with pytest.warns(UserWarning) as warned:
        given = model.attend(image, "A red Zebra, a zebra.")
    assert [str(each.message) for each in warned] == [
        "The model does not know 'zebra', and reads <unk> there: of these words its attention says little."
    ]
    assert given.words == ["a", "red", "zebra", "a", "zebra"] and given.text == "a red zebra a zebra"
    words = model.head_weights(image, ["a", "red", "<unk>", "a", "<unk>"])[0, 0]
    assert torch.allclose(given.attention, words, atol=1e-6)
    for nothing in ("zebra zebra", "", "...", "<unk>"):
        with pytest.raises(InputError, match="no word that the model knows") as error:
            model.attend(image, nothing)
        assert one_sentence(error)


# Describing and rebuilding


def parts():
    """Every part with settings that are not the default, and the neighbours that decide its sizes."""
    for name, attention in ATTENTIONS.items():
        yield name, attention, (D, D)
    for name, bridge in BRIDGES.items():
        yield name, bridge, (D,)
    yield "LinearBridge with dropout", partial(LinearBridge, dim=3, dropout=0.25, positions=True), (D,)
    dropout = {"dropout": 0.25, "layer_dropout": 0.5}
    yield "TransformerBridge with dropout", partial(TransformerBridge, dim=6, layers=1, heads=3, **dropout), (D,)
    for name, decoder in DECODERS.items():
        yield name, decoder, (E, D)
    trained = {"grid": 3, "preprocessing": TINY, "learns": False}
    yield "SmallCNN", partial(SmallCNN, size=24, width=3), ()
    yield "ResNet", partial(ResNet, depth=34, stage=2, weights="IMAGENET1K_V1", **trained), ()
    yield "ResNet by default", ResNet, ()
    yield "VGG16", partial(VGG16, weights="IMAGENET1K_V1", **trained), ()
    yield "PrecomputedRegions", partial(PrecomputedRegions, dim=5), ()
    yield "ForeignEncoder", partial(ForeignEncoder, grid=2, preprocessing=TINY, learns=True), (Patches(),)
    yield "Preprocessing", partial(Preprocessing, "crop", 20, 24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ()


PARTS_BUILT = {name: (build, neighbours) for name, build, neighbours in parts()}


@pytest.mark.parametrize("name", PARTS_BUILT)
def test_a_part_is_rebuilt_from_its_description_by_way_of_json(name):
    build, neighbours = PARTS_BUILT[name]
    with torch.device("meta"):  # no time spent on the weights of VGG-16
        part = build(*neighbours)
        described = describe(part)
        again = rebuild(json.loads(json.dumps(described)), *neighbours)
    assert type(again) is type(part) and describe(again) == described
    if isinstance(part, nn.Module):
        shapes = {key: tensor.shape for key, tensor in part.state_dict().items()}
        assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes


def test_every_part_that_a_checkpoint_can_name_is_tried():
    tried = set()
    for build, neighbours in PARTS_BUILT.values():
        with torch.device("meta"):
            tried.add(describe(build(*neighbours))["class"])
    assert tried == set(PARTS)


@pytest.mark.parametrize("tie_weights", [True, False])
@every_decoder
def test_a_model_rebuilt_from_its_contents_gives_the_same_logits(name, tie_weights):
    model = captioner(name, bridge=partial(LinearBridge, dim=D, positions=True), tie_weights=tie_weights)
    contents = model.contents({"CIDEr-D": 0.5})
    contents = contents._replace(settings=json.loads(json.dumps(contents.settings)))
    again = Captioner.from_contents(contents, encoder=Patches())
    annotations = Annotations(torch.randn(2, N, D), grid=GRID)
    for one, other in zip(model(annotations, TOKENS), again(annotations, TOKENS), strict=True):
        assert one is None if other is None else torch.equal(one, other)
    assert again.vocabulary == WORDS and not again.training
    assert (again.output.weight is again.embedding.weight) == tie_weights
    assert describe(again) == describe(model) and again.contents().settings == model.contents().settings


def test_a_checkpoint_is_all_there_is_to_know(tmp_path):
    model = captioner(encoder=small_cnn())
    torch.save({KEY: pack(model.contents()), "optimizer": {"lr": 1}}, tmp_path / "model.ckpt")
    again = Captioner.from_checkpoint(tmp_path / "model.ckpt")
    assert not again.training
    for caption, other in zip(model.caption(some_images()), again.caption(some_images()), strict=True):
        for field in fields(caption):
            one, two = getattr(caption, field.name), getattr(other, field.name)
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_foreign_encoder_is_never_loaded_but_asked_for():
    contents = captioner().contents()
    with pytest.raises(InputError, match=f"{Patches.__module__}:Patches.*encoder=") as error:
        Captioner.from_contents(contents)
    assert one_sentence(error)
    assert Captioner.from_contents(contents, encoder=Patches()).preprocessing == TINY


def test_an_encoder_that_is_not_needed_is_an_error():
    with pytest.raises(InputError, match="leave out the encoder") as error:
        Captioner.from_contents(captioner(encoder=small_cnn()).contents(), encoder=Patches())
    assert one_sentence(error)


def test_another_encoder_than_the_trained_one_is_an_error():
    class Other(Patches):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(InputError, match="do not fit the encoder") as error:
        Captioner.from_contents(captioner().contents(), encoder=Other())
    assert one_sentence(error)


def test_tensors_that_do_not_fit_their_settings_are_an_error():
    contents = captioner(encoder=small_cnn()).contents()
    del contents.tensors["output.bias"]
    with pytest.raises(InputError, match="damaged") as error:
        Captioner.from_contents(contents)
    assert one_sentence(error)


# Characters and byte pairs

SAID = ["a red ball", "빨간 공이 있다", "a ball, red!"]
PARTS_OF_WORDS = {"characters": Characters.train(SAID), "byte pairs": BytePairs.train(SAID * 2, 290)}
of_parts = pytest.mark.parametrize("vocabulary", PARTS_OF_WORDS.values(), ids=PARTS_OF_WORDS)


@of_parts
def test_words_of_parts_have_the_mean_attention_of_their_parts(vocabulary):
    model, (image,) = captioner(vocabulary=vocabulary).double(), some_images(1)
    for text in SAID:
        caption = model.attend(image, text)
        assert caption.text == text and caption.words == text.split()
        tokens = pad([[vocabulary.encode(vocabulary.cut(text), 99)]])
        with torch.no_grad():
            annotations = model.annotate_pixels([model.preprocessing.pixels(image)[None]])
            logits, weights, gates = model(annotations, tokens)
        for word, row, gate in zip(
            vocabulary.read(vocabulary.cut(text)), caption.attention, caption.gates, strict=True
        ):
            torch.testing.assert_close(row, weights[0, 0, word.start : word.stop].mean(0).float())
            torch.testing.assert_close(gate, gates[0, 0, word.start : word.stop].mean().float())
        each = logits.log_softmax(-1)[0, 0].gather(1, tokens[0, 0, 1:, None])  # probabilities multiply
        assert caption.log_probability == pytest.approx(each.sum().item())


@of_parts
def test_limits_hold_for_parts_of_words(vocabulary):
    model, images = captioner(vocabulary=vocabulary).double(), some_images(3)
    for caption in model.caption(images, begin_with="a red", beam_size=3, max_words=12, ban=["ball"]):
        assert caption.text.startswith("a red") and not any(word.startswith("ball") for word in caption.words)
        assert caption.attention.shape == (len(caption.words), N)
        assert len(vocabulary.cut("a red")) <= 12
    with pytest.raises(InputError, match="`begin_with` 'a red ball' holds a word that is in `ban`"):
        model.caption(images, begin_with="a red ball", ban=["ball"])
    assert limits_of(Decoding(), vocabulary).max_words == vocabulary.longest > 20
    assert limits_of(Decoding(no_repeat_ngram=2), vocabulary).no_repeat_ngram == 0  # but by the filter
    (found,) = {
        len(image[0].tokens) for image in model.search(some_annotations(3), beam_size=1, min_words=7, max_words=7)
    }
    assert found == 8


@of_parts
def test_what_is_drawn_keeps_the_filter(vocabulary):
    model = captioner(vocabulary=vocabulary).double()
    settings = {"sample": True, "captions": 4, "temperature": 3, "no_repeat_ngram": 1, "max_words": 15}
    for captions in model.caption_stream(some_images(2), **settings):
        for caption in captions:
            assert len(set(caption.words[:-1])) == len(caption.words[:-1])


@of_parts
def test_a_checkpoint_keeps_what_the_model_says(vocabulary, tmp_path):
    model, images = captioner(encoder=small_cnn(), vocabulary=vocabulary), some_images(2)
    torch.save({KEY: pack(model.contents())}, tmp_path / "a.ckpt")
    again = Captioner.from_checkpoint(tmp_path / "a.ckpt")
    assert again.vocabulary == vocabulary
    assert [one.text for one in again.caption(images)] == [one.text for one in model.caption(images)]
    assert pack(model.contents())["version"] == 2  # which a release that knows words alone refuses


def test_a_checkpoint_of_words_is_what_it_always_was(tmp_path):
    model = captioner(encoder=small_cnn())
    packed = pack(model.contents())
    assert packed.keys() == {"version", "settings", "words", "tensors", "scores"} and packed["version"] == 1
    torch.save({KEY: packed}, tmp_path / "a.ckpt")
    assert Captioner.from_checkpoint(tmp_path / "a.ckpt").vocabulary == WORDS


def test_a_checkpoint_whose_words_are_none_is_refused(tmp_path):
    contents = captioner(encoder=small_cnn(), vocabulary=PARTS_OF_WORDS["byte pairs"]).contents()
    hostile = {"units": "byte_pairs", "merges": [["a", "zzz"]]}
    torch.save({KEY: pack(contents._replace(vocabulary=hostile))}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="cannot be used .it joins byte pairs that it does not have") as error:
        Captioner.from_checkpoint(tmp_path / "a.ckpt")
    assert one_sentence(error)


def test_models_of_other_units_choose_no_words_together():
    letters = Characters(["a", "b"])
    with pytest.raises(InputError, match="knows 2 words, but not those"):
        Ensemble([captioner(vocabulary=letters), captioner(vocabulary=Vocabulary(["a", "b"]))])
