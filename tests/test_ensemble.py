"""The ensemble: the laws of a mean of probabilities, which images its members look at, and who may be a member."""

import copy
from dataclasses import replace

import pytest
import torch
from test_model import captioner, every_kind, one_sentence, over_decodings, some_images
from torch import nn
from variants import KINDS, of_image, some_annotations

from captioner.checkpoint import KEY, pack, read
from captioner.decoding import Decoding
from captioner.encoders import ForeignEncoder, SmallCNN
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.model import Captioner
from captioner.vocabulary import BEGIN, Vocabulary

LSTM, GRU = "LSTM-Additive-before-fed-gate-deep-mean", "GRU-Additive-before"
TRANSFORMER = "Transformer-sinusoidal-pre"


def member(name, seed=0, **settings):
    """A captioner in float64 whose bridge, decoder and words are its own, and the encoder that of all."""
    model = captioner(name, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (model.decoder, model.output):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul(0.5))
    return model


def found_by(searcher, annotations, **settings):
    return searcher.search(annotations, beam_size=3, max_words=6, **settings)


def save(model, path):
    torch.save({KEY: pack(model.contents())}, path)
    return path


# The mean


@pytest.mark.parametrize("times", [1, 2])
@every_kind
def test_one_captioner_however_often_is_itself(name, times):
    model, annotations = captioner(name).double(), some_annotations(3)
    alone, together = found_by(model, annotations), found_by(Ensemble([model] * times), [annotations] * times)
    for one, other in zip(alone, together, strict=True):
        assert [hypothesis.tokens for hypothesis in one] == [hypothesis.tokens for hypothesis in other]
        for a, b in zip(one, other, strict=True):
            assert (a.log_probability, a.score) == pytest.approx((b.log_probability, b.score), abs=1e-12)


@pytest.mark.parametrize("names", [(LSTM, LSTM), (LSTM, GRU), (TRANSFORMER, LSTM, GRU)], ids=len)
def test_a_log_probability_is_that_of_the_mean_probabilities_word_by_word(names):
    assert set(names) <= set(KINDS)
    models = [member(name, seed) for seed, name in enumerate(names)]
    annotations = [some_annotations(2, seed) for seed in range(len(models))]
    together = found_by(Ensemble(models), annotations)
    for image, hypotheses in enumerate(together):
        for tokens, log_probability, score in hypotheses:
            ids = torch.tensor([[[BEGIN, *tokens]]])
            probabilities = []
            for model, each in zip(models, annotations, strict=True):
                with torch.no_grad():
                    logits, _, _ = model(each._replace(values=each.values[image : image + 1]), ids)
                probabilities.append(logits.softmax(-1).gather(-1, ids[..., 1:, None]).flatten())
            total = torch.stack(probabilities).mean(0).log().sum().item()
            assert log_probability == pytest.approx(total, abs=1e-9)
            assert score == pytest.approx(total / len(tokens) ** 0.7, abs=1e-9)
    for model, each in zip(models, annotations, strict=True):  # no member decides alone
        assert found_by(model, each) != together


def test_the_order_of_the_members_decides_nothing():
    models, annotations = [member(LSTM, 1), member(GRU, 2)], [some_annotations(3, seed) for seed in (1, 2)]
    one = found_by(Ensemble(models), annotations, length_penalty=0.0)
    other = found_by(Ensemble(models[::-1]), annotations[::-1], length_penalty=0.0)
    assert [[hypothesis.tokens for hypothesis in image] for image in one] == [
        [hypothesis.tokens for hypothesis in image] for image in other
    ]


@pytest.mark.parametrize("names", [(LSTM, GRU), (TRANSFORMER, LSTM, GRU)], ids=len)
@over_decodings
def test_images_that_are_done_leave_all_members(settings, names):
    models = [member(name, seed) for seed, name in enumerate(names)]
    annotations = [some_annotations(5, seed) for seed in range(len(models))]
    ensemble = Ensemble(models)
    together = ensemble.search(annotations, max_words=9, **settings)
    for image, found in enumerate(together):
        numbers = {"numbers": [image]} if "sample" in settings else {}
        (alone,) = ensemble.search([of_image(each, image) for each in annotations], max_words=9, **settings, **numbers)
        assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in alone]
        for one, other in zip(found, alone, strict=True):
            assert one[1:] == pytest.approx(other[1:], abs=1e-10)
    if settings == {"beam_size": 3}:
        assert len({len(found[0].tokens) for found in together}) > 1


# Its captions


def test_an_ensemble_captions_as_a_captioner_does_and_the_first_shows_where_it_looks():
    first, second = member(LSTM, 1), member(GRU, 2)
    second.encoder.preprocessing = replace(first.preprocessing, fit="crop")
    ensemble, images = Ensemble([first, second, first]), some_images(3)
    assert ensemble.preprocessings == [first.preprocessing, second.preprocessing]
    pixels = [torch.stack([each.pixels(image) for image in images]) for each in ensemble.preprocessings]
    seen = ensemble.annotate_pixels(pixels)
    decoding = Decoding(beam_size=3, captions=2, max_words=6)
    streamed = list(ensemble.caption_stream(images, decoding, batch_size=2))
    for captions, others, found in zip(
        ensemble.caption_annotations(seen, decoding), streamed, ensemble.search(seen, decoding), strict=True
    ):
        assert [caption.words for caption in captions] == [first.vocabulary.decode(each.tokens) for each in found[:2]]
        assert [caption.log_probability for caption in captions] == [each.log_probability for each in found[:2]]
        assert [caption.text for caption in captions] == [caption.text for caption in others]
    for image, captions in zip(images, streamed, strict=True):
        for caption in captions:
            weights = first.head_weights(image, caption.words)
            assert torch.allclose(caption.attention, weights[0, 0].float(), atol=1e-6) and caption.grid == (2, 2)
    assert [caption.text for caption in ensemble.caption(images, decoding)] == [found[0].text for found in streamed]


def test_a_given_caption_has_the_mean_probability_of_the_members_and_the_attention_of_the_first():
    first, second = member(LSTM, 1), member(GRU, 2)
    second.encoder.preprocessing = replace(first.preprocessing, fit="crop")
    ensemble, image = Ensemble([first, second]), some_images(1)[0]
    found = ensemble.caption(image, beam_size=3, min_words=3, max_words=6)[0]
    given = ensemble.attend(image, found.text)
    assert given.words == found.words
    assert given.log_probability == pytest.approx(found.log_probability, abs=1e-9)
    assert torch.allclose(given.attention, found.attention, atol=1e-6)
    assert not torch.allclose(given.attention, second.attend(image, found.text).attention, atol=1e-2)


def test_captioning_leaves_every_member_in_its_mode():
    first, second = captioner(dropout=0.5).train(), captioner(dropout=0.5)
    ensemble = Ensemble([first, second])
    texts = [[(each.text, each.log_probability) for each in ensemble.caption(some_images(3))] for _ in range(2)]
    assert texts[0] == texts[1] and first.training and first.decoder.training and not second.training


# Its eyes


def looks(models, images):
    """The annotations for each member, and the preprocessing of each look at the images."""
    seen = []

    def pixels(preprocessing):
        seen.append(preprocessing)
        return torch.stack([preprocessing.pixels(image) for image in images])

    return Ensemble(models).annotate(pixels), seen


def test_members_with_the_same_encoder_share_a_look(tmp_path):
    model, images = captioner(encoder=SmallCNN(size=16, width=2)), some_images(2)
    again = Captioner.from_checkpoint(save(model, tmp_path / "again.ckpt"))
    other = copy.deepcopy(again)
    with torch.no_grad():
        next(other.encoder.parameters())[0] += 0.1
    annotations, seen = looks([model, again, other, again], images)
    assert len(seen) == 2 and annotations[0] is annotations[1] is annotations[3]
    assert torch.equal(annotations[0].values, again.annotate(stacked(again, images)).values)
    assert torch.equal(annotations[2].values, other.annotate(stacked(other, images)).values)
    assert not torch.equal(annotations[0].values, annotations[2].values)


def test_each_encoder_sees_the_images_as_it_was_trained_to():
    """The tensors are equal here, and what an image goes through before them is not."""
    first, images = captioner(), some_images(2)
    settings = first.preprocessing
    second = copy.deepcopy(first)
    second.encoder.preprocessing = replace(settings, fit="crop")
    assert second.preprocessing != settings
    annotations, seen = looks([first, second], images)
    assert seen == [first.preprocessing, second.preprocessing]
    for model, each in zip((first, second), annotations, strict=True):
        assert torch.equal(each.values, model.annotate(stacked(model, images)).values)


def test_a_frozen_and_a_learning_encoder_of_the_same_tensors_share_a_look():
    first = captioner()
    second = copy.deepcopy(first)
    second.encoder.learns = not first.encoder.learns
    assert len(looks([first, second], some_images(1))[1]) == 1


def stacked(model, images):
    return torch.stack([model.preprocessing.pixels(image) for image in images])


# Its members


def test_a_foreign_members_encoder_is_a_copy_filled_with_its_own_tensors(tmp_path):
    first = captioner()
    assert isinstance(first.encoder, ForeignEncoder)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.encoder.module.convolution.weight.mul_(2)
    before = first.encoder.module.convolution.weight.clone()
    ensemble = Ensemble.open(first.double(), [save(second, tmp_path / "second.ckpt")])
    opened = ensemble.captioners[1]
    assert torch.equal(first.encoder.module.convolution.weight, before.double())
    assert torch.equal(opened.encoder.module.convolution.weight, 2 * before.double())
    assert opened.device == first.device and opened.embedding.weight.dtype == torch.float64 and not opened.training


class Other(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 6, 8, 8)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda: captioner(vocabulary=Vocabulary(["red", "ball"])), "second.ckpt knows 2 words.*minimum_count"),
        (lambda: captioner(encoder=Other()), "second.ckpt needs an encoder .*test_ensemble:Other"),
    ],
)
def test_who_cannot_join_is_said_in_one_sentence(second, said, tmp_path):
    path = save(second(), tmp_path / "second.ckpt")
    with pytest.raises(InputError, match=said) as error:
        Ensemble.open(captioner(), [path])
    assert one_sentence(error)


def test_a_damaged_member_is_named(tmp_path):
    contents = captioner().contents()
    tensors = {name: value for name, value in contents.tensors.items() if not name.startswith("output")}
    torch.save({KEY: pack(contents._replace(tensors=tensors))}, tmp_path / "second.ckpt")
    assert read(tmp_path / "second.ckpt").words
    with pytest.raises(InputError, match="second.ckpt cannot join the ensemble: .*do not fit"):
        Ensemble.open(captioner(), [tmp_path / "second.ckpt"])


def test_captioners_of_other_words_and_none_at_all_are_refused():
    with pytest.raises(InputError, match="Captioner 2 of the ensemble knows 2 words") as error:
        Ensemble([captioner(), captioner(vocabulary=Vocabulary(["red", "ball"]))])
    assert one_sentence(error)
    with pytest.raises(InputError, match="no captioners") as error:
        Ensemble([])
    assert one_sentence(error)
