import json
import re
from dataclasses import fields
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from variants import ATTENTIONS, DECODERS, D, E, N, same, some_annotations

from captioner.attention import Annotations
from captioner.bridges import LinearBridge, NoBridge
from captioner.checkpoint import KEY, pack
from captioner.encoders import VGG16, ForeignEncoder, ResNet, SmallCNN
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import PARTS, Captioner, describe, rebuild
from captioner.objectives import CrossEntropy
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary, pad

WORDS = Vocabulary("a red blue ball box on under".split())
SIZE, GRID = 16, (2, 2)
TINY = Preprocessing(fit="squash", size=SIZE)
# Captions of two images, one of which has fewer.
TOKENS = pad([[[BEGIN, 4, 5, 7, END], [BEGIN, 4, 6, 8, 9, END]], [[BEGIN, 10, 4, UNKNOWN]]])

every_decoder = pytest.mark.parametrize("name", DECODERS)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


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


def captioner(decoder="LSTM-Additive-before-fed-gate-deep-mean", encoder=None, **settings):
    """A model that speaks before it learns: images and words matter to it, and it is slow to end."""
    torch.manual_seed(0)
    model = Captioner(encoder or Patches(), WORDS, decoder=DECODERS[decoder], embedding_dim=E, **settings)
    with torch.no_grad():
        for part in (model.decoder, model.output):
            for parameter in part.parameters():
                parameter.mul_(4)
        model.output.bias[END] -= 4
    return model.eval()


def lstm_of(attention):
    return next(name for name in DECODERS if name.startswith(f"LSTM-{attention}-before-fed"))


def some_images(count=5):
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(2, (count, 2, 2, 3), generator=generator, dtype=torch.uint8) * 255  # of each quarter
    pixels = colours.repeat_interleave(10, 1).repeat_interleave(12, 2)
    return [Image.fromarray(image.numpy()) for image in pixels]


def teacher_forced(model, image, words):
    """The log-probability and the attention of a caption, one word at a time through `step` of the decoder."""
    ids = [BEGIN, *(WORDS.words.index(word) + 4 for word in words), END]
    with torch.no_grad():
        memory = model.memory(model.annotate(model.preprocessing.pixels(image)[None]))
        state, total, weights = model.decoder.start(memory, 1), 0.0, []
        for previous, following in zip(ids, ids[1:], strict=False):
            step = model.decoder.step(model.embedding(torch.tensor([previous])), memory, state)
            total += model.output(step.output).log_softmax(-1)[0, following].item()
            state = step.state
            weights.append(step.weights)
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
    dead = {
        key
        for key, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() < 1e-9
    }
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


@every_attention
def test_keys_are_computed_once_per_image_in_training_and_in_a_beam_search(attention):
    model, annotations = captioner(lstm_of(attention)).double(), some_annotations(2)
    attends = model.decoder.attention
    memories, keys, attended = [], [], []
    compute = attends.memory
    attends.memory = lambda annotations: memories.append(annotations.values.shape) or compute(annotations)
    for name, module in attends.named_modules():
        if name in ("key", "value"):
            module.register_forward_hook(lambda _, given, __: keys.append(given[0].shape))
    attends.register_forward_pre_hook(lambda _, given: attended.append(given))
    expected_keys = {"Additive": 1, "General": 1, "MultiHead": 2}.get(attention, 0)

    model(annotations, TOKENS)
    assert memories == [(2, N, D)] and keys == [(2, N, D)] * expected_keys and len(attended) == 5
    memories.clear(), keys.clear(), attended.clear()
    model.search(annotations, beam_size=3, max_words=4)
    assert memories == [(2, N, D)] and keys == [(2, N, D)] * expected_keys and len(attended) > 1
    for query, memory in attended:
        assert query.shape[:2] == (2, 3) and all(len(part) == 2 for part in memory)


# Search


@every_attention
def test_searching_a_batch_equals_one_image_at_a_time(attention):
    model, annotations = captioner(lstm_of(attention)).double(), some_annotations(4)
    together = model.search(annotations, beam_size=3, max_words=6)
    for image, found in enumerate(together):
        (alone,) = model.search(Annotations(annotations.values[image : image + 1]), beam_size=3, max_words=6)
        assert [hypothesis.tokens for hypothesis in alone] == [hypothesis.tokens for hypothesis in found]
        for one, other in zip(alone, found, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
    assert len({tuple(found[0].tokens) for found in together}) > 1


@every_attention
def test_every_hypothesis_has_the_log_probability_of_teacher_forcing(attention):
    model, annotations = captioner(lstm_of(attention)).double(), some_annotations(2)
    for image, found in enumerate(model.search(annotations, beam_size=4, max_words=6)):
        alone = Annotations(annotations.values[image : image + 1])
        for tokens, log_probability, score in found:
            ids = torch.tensor([[[BEGIN, *tokens]]])
            scores = model(alone, ids)[0].log_softmax(-1)
            total = scores.gather(-1, ids[..., 1:, None]).sum().item()
            assert log_probability == pytest.approx(total, abs=1e-5)
            assert score == pytest.approx(total / len(tokens) ** 0.7, abs=1e-5)


def test_padding_and_the_unknown_word_are_never_said():
    model = captioner().double()
    with torch.no_grad():
        model.output.bias[[PAD, BEGIN, UNKNOWN]] += 100
    for found in model.search(some_annotations(2), beam_size=4, max_words=5):
        assert not any({PAD, BEGIN, UNKNOWN} & set(hypothesis.tokens) for hypothesis in found)
        assert found[0].log_probability < -90  # not renormalised


# Captions


@pytest.mark.parametrize("beam_size", [1, 3])
@every_attention
def test_a_caption_brings_the_log_probability_and_the_attention_of_its_words(attention, beam_size):
    model = captioner(lstm_of(attention))
    images = some_images()
    captions = model.caption(images, beam_size=beam_size, max_words=6, length_penalty=0.5)
    assert len(captions) == len(images)
    for image, caption in zip(images, captions, strict=True):
        total, weights = teacher_forced(model, image, caption.words)
        assert caption.text == " ".join(caption.words) and len(caption.words) <= 6
        assert caption.log_probability == pytest.approx(total, abs=1e-4)
        assert caption.score == pytest.approx(total / (len(caption.words) + 1) ** 0.5, abs=1e-4)
        assert caption.grid == GRID
        if attention == "NoAttention":
            assert caption.attention is None and caption.gates is None
            continue
        assert caption.attention.shape == (len(caption.words), N) and caption.attention.dtype == torch.float32
        assert same(caption.attention.sum(1), torch.ones(len(caption.words)), 1e-5)
        assert same(caption.attention, weights, 1e-5)
        assert caption.gates.shape == (len(caption.words),)
    assert any(len(caption.words) > 1 for caption in captions)


def test_attention_is_read_from_one_teacher_forced_pass():
    model, passes = captioner(), []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    model.caption(some_images(3), beam_size=2)
    assert len(passes) == 1


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


# Describing and rebuilding


def parts():
    """Every part with settings that are not the default, and the neighbours that decide its sizes."""
    for name, attention in ATTENTIONS.items():
        yield name, attention, (D, D)
    yield "NoBridge", NoBridge, (D,)
    yield "LinearBridge", partial(LinearBridge, dim=3, dropout=0.25, positions=True), (D,)
    for name, decoder in DECODERS.items():
        yield name, decoder, (E, D)
    trained = {"grid": 3, "preprocessing": TINY, "learns": False}
    yield "SmallCNN", partial(SmallCNN, size=24, width=3), ()
    yield "ResNet", partial(ResNet, depth=34, stage=2, weights="IMAGENET1K_V1", **trained), ()
    yield "ResNet by default", ResNet, ()
    yield "VGG16", partial(VGG16, weights="IMAGENET1K_V1", **trained), ()
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
