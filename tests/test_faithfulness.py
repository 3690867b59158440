"""Faithfulness: the interventions do what they say, and the report sees what a model depends on."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from variants import DECODERS, KINDS, D, E, attentions, same, some_annotations

from captioner.annotation_files import CaptionedImage, COCOCaptions
from captioner.attention import Additive, Annotations, Attention, MultiHead, NoAttention
from captioner.attention import Uniform as UniformAttention
from captioner.attention_health import show
from captioner.decoders import LSTMDecoder, TransformerDecoder
from captioner.encoders import ForeignEncoder, SmallCNN
from captioner.errors import InputError
from captioner.faithfulness import intervene, measure, permuted, uniform
from captioner.images import Preprocessing
from captioner.model import Captioner
from captioner.vocabulary import BEGIN, END, Vocabulary, pad

MASK = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
HEADS = {"Additive": partial(Additive, dim=8), "MultiHead": partial(MultiHead, heads=2, dim=8)}


def model(attention="Additive", decoder=None, **settings):
    torch.manual_seed(1)
    decoder = decoder or partial(LSTMDecoder, hidden_dim=12, attention=HEADS.get(attention, attention), **settings)
    words = Vocabulary([f"word{number}" for number in range(9)])
    return Captioner(SmallCNN(size=32, width=4), words, decoder=decoder, embedding_dim=8).eval()


def score(captioner):
    annotations = Annotations(torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)), MASK)
    tokens = torch.tensor([[[BEGIN, 4, 5, 6, END]], [[BEGIN, 7, 8, 4, END]]])
    with torch.no_grad():  # as captions are explained; with gradients turns may share work, which rounds otherwise
        logits, weights, _ = captioner(annotations, tokens)
    return logits, weights


def own(captioner):
    return [module for module in attentions(captioner) if {"weigh", "contexts"} & {*vars(module)}]


# Interventions


@pytest.mark.parametrize("attention", HEADS)
def test_identity_changes_nothing_and_leaves_nothing_behind(attention):
    captioner = model(attention)
    before = score(captioner)
    with intervene(captioner, lambda weights, mask: weights):
        assert own(captioner)
        assert all(torch.equal(one, other) for one, other in zip(before, score(captioner), strict=True))
    assert not own(captioner)
    assert captioner.decoder.attention.weigh.__func__ is type(captioner.decoder.attention).weigh


def test_the_classs_method_is_back_after_an_exception():
    captioner = model()
    before = score(captioner)
    with pytest.raises(RuntimeError, match="on the way"), intervene(captioner, uniform):
        score(captioner)
        raise RuntimeError("on the way")
    assert not own(captioner)
    assert all(torch.equal(one, other) for one, other in zip(before, score(captioner), strict=True))


def test_interventions_reach_the_captions_context():
    captioner = model()
    with intervene(captioner, uniform):
        changed, weights = score(captioner)
    plain, _ = score(captioner)
    assert not torch.allclose(changed, plain)
    assert torch.allclose(weights, (MASK / MASK.sum(1, keepdim=True))[:, None, None].expand_as(weights))
    as_baseline = model(UniformAttention)  # has the same parameters but for those that score
    as_baseline.load_state_dict(captioner.state_dict(), strict=False)
    torch.testing.assert_close(score(as_baseline)[0], changed)


# Over all decoders that weigh regions

every_weighing = pytest.mark.parametrize("name", [name for name in KINDS if "NoAttention" not in name])
PADDED = [[1, 1, 1, 1], [1, 1, 0, 1]]


class Given(nn.Module):
    """An encoder that is never asked, since the annotations are given."""

    annotation_dim, preprocessing = D, Preprocessing("squash", 4)


def speaker(name):
    torch.manual_seed(0)
    captioner = Captioner(Given(), Vocabulary("a red blue ball".split()), decoder=DECODERS[name], embedding_dim=E)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(3)
        captioner.output.bias[END] -= 4
    return captioner.double().eval()


def only(region):
    """All weight on one region."""

    def change(weights, mask):
        changed = torch.zeros_like(weights)
        changed[..., region] = 1
        return changed

    return change


def search(captioner, annotations):
    return captioner.search(annotations, beam_size=3, max_words=4)


def forced(captioner, annotations, found):
    """The log-probabilities of found captions by teacher forcing, with weights and without."""
    tokens = pad([[[BEGIN, *hypothesis.tokens] for hypothesis in hypotheses] for hypotheses in found])
    for need_weights in (True, False):
        scores = captioner(annotations, tokens, need_weights)[0].log_softmax(-1).gather(-1, tokens[..., 1:, None])
        yield (scores.squeeze(-1) * (tokens[..., 1:] != 0)).sum(-1).tolist()


@pytest.mark.parametrize("kind", ["uniform", "permuted", "one region"])
@every_weighing
def test_interventions_reach_captions_whatever_the_decoder_and_leave_nothing_behind(name, kind):
    captioner, annotations = speaker(name), some_annotations(2, mask=PADDED)
    before = search(captioner, annotations)
    with intervene(captioner, only(1) if kind == "one region" else uniform):
        assert len(own(captioner)) == len(attentions(captioner))
        found = search(captioner, annotations)
        log_probabilities = [[hypothesis.log_probability for hypothesis in hypotheses] for hypotheses in found]
        for expected in forced(captioner, annotations, found):
            for one, other in zip(log_probabilities, expected, strict=True):
                assert one == pytest.approx(other, abs=1e-9)
    if kind == "permuted":
        with intervene(captioner, permuted(torch.Generator().manual_seed(4))):
            found = search(captioner, annotations)
    scores = [[hypothesis.score for hypotheses in result for hypothesis in hypotheses] for result in (found, before)]
    # What is uniform already, neither of the first two changes.
    assert (scores[0] == pytest.approx(scores[1], abs=1e-10)) == ("Uniform" in name and kind != "one region")
    assert not own(captioner) and search(captioner, annotations) == before


@pytest.mark.parametrize("need_weights", [True, False])
@every_weighing
def test_with_all_weight_on_one_region_the_others_are_not_read(name, need_weights):
    captioner, annotations = speaker(name), some_annotations(2)
    tokens = pad([[[BEGIN, 4, 5, 6, END], [BEGIN, 7, 7, END]], [[BEGIN, 4, 4, 5, END], [BEGIN, END]]])
    others = annotations.values.clone()
    others[:, 0] += 1  # and the mean, from which a first state comes, stays
    others[:, 2] -= 1
    both = annotations, annotations._replace(values=others)
    with intervene(captioner, only(1)):
        (logits, weights, _), (changed, _, _) = (captioner(given, tokens, need_weights) for given in both)
    assert same(logits, changed, 1e-9)
    if need_weights:
        assert (weights[..., 1] == 1).all() and (weights.sum(-1) == 1).all()
    plain, also = (captioner(given, tokens, need_weights)[0] for given in both)
    assert same(plain, also, 1e-6) == ("Uniform" in name) and not same(plain, logits, 1e-6)


def random_weights(shape, mask):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 4, 3, 6)], ids=["one head", "four heads"])
def test_uniform_and_permuted_do_what_they_say(shape):
    mask = MASK.view(2, *[1] * (len(shape) - 2), 6)
    weights = random_weights(shape, mask)
    even = uniform(weights, mask)
    assert even.shape == weights.shape
    assert torch.equal(even, torch.where(mask, 1 / mask.sum(-1, keepdim=True), 0.0).expand_as(weights))

    dealt = permuted(torch.Generator().manual_seed(4))(weights, mask)
    assert torch.equal(dealt.sort(-1).values, weights.sort(-1).values)  # the same weights
    assert (dealt.masked_select(~mask.expand_as(dealt)) == 0).all()  # none where there is no region
    assert (dealt != weights).any(-1).all()


def test_permutations_are_drawn_evenly_for_each_query():
    weights = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(1, 3000, 4)
    dealt = permuted(torch.Generator().manual_seed(5))(weights, torch.tensor([[[True, True, True, False]]]))
    places = torch.bincount(dealt[0].argmax(-1), minlength=4).tolist()
    assert places[3] == 0 and all(abs(place - 1000) < 100 for place in places[:3])


# The measurement


class Pixels(nn.Module):
    """Each of 4 x 4 pixels is a region: its red value, and whether it is bright."""

    preprocessing = Preprocessing("squash", 4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, x):
        return torch.cat((x[:, :1], (x[:, 2:] > 0.5).float()), 1)


def constructed():
    """A captioner that looks at the bright region and says "cat" if it is red, "dog" if not, and then ends."""
    decoder = partial(LSTMDecoder, hidden_dim=1, attention=Only, attend="after", gate=False, first_state="zero")
    captioner = Captioner(ForeignEncoder(Pixels()), Vocabulary(["cat", "dog"]), decoder=decoder, embedding_dim=4)
    cat, dog = 4, 5
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.zero_()
        captioner.decoder.context_to_output.weight[0] = torch.tensor([4.0, -2.0])  # 2 if red, -2 if not, 0 if unseen
        captioner.decoder.state_to_output.bias[0] = -0.5  # so that what is half seen is a dog
        captioner.embedding.weight[[cat, dog], 1] = 9.0  # deep output: a word said before asks for the end
        captioner.output.weight[cat, 0], captioner.output.weight[dog, 0] = 5.0, -5.0
        captioner.output.weight[END, 1] = 40.0
        captioner.output.bias[[0, 1, 2, 3]] = -20.0
    return captioner.eval()


def constructed_transformer():
    """The same captioner with a Transformer in place of the LSTM: all that is not set is zero."""
    decoder = partial(TransformerDecoder, layers=1, heads=1, positions="learned")
    captioner = Captioner(ForeignEncoder(Pixels()), Vocabulary(["cat", "dog"]), decoder=decoder, embedding_dim=4)
    cat, dog = 4, 5
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.zero_()
        attention = captioner.decoder.stack[0].cross_attention
        attention.query.bias[0] = 1.0
        attention.key.weight[0, 1] = 100.0  # divided by sqrt(4)
        attention.value.weight[0] = torch.tensor([4.0, -2.0])
        attention.output.weight[0, 0] = 0.1  # little beside a word
        attention.output.bias[0], attention.output.bias[2] = (
            -0.05,
            0.1,
        )  # beside a constant, a norm keeps how much it is
        captioner.decoder.norm.weight.fill_(1.0)
        captioner.embedding.weight[[cat, dog], 1] = 2.0
        captioner.output.weight[cat, 0], captioner.output.weight[dog, 0] = 2.0, -2.0
        captioner.output.weight[END, 1] = 40.0
        captioner.output.bias[[0, 1, 3]] = -20.0
        captioner.output.bias[END] = -50.0
    return captioner.eval()


class Only(Attention):
    """Looks at the bright region, and evenly at all where there is none."""

    def scores(self, query, keys):
        return 50 * keys[..., 1][:, None].expand(-1, query.size(1), -1)


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(1)
    records = []
    for number in range(8):
        pixels = np.zeros((4, 4, 3), np.uint8)
        row, column = random.integers(4, size=2)
        red = number % 2
        pixels[row, column] = (255 * red, 0, 255)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        records.append(CaptionedImage(number, tmp_path / f"{number}.png", ("cat" if red else "dog",)))
    return records


@pytest.mark.parametrize("construct", [constructed, constructed_transformer])
def test_a_model_that_depends_on_one_region_is_seen_to(pictures, construct):
    captioner = construct()
    captions = captioner.caption([record.path for record in pictures])
    assert [caption.words for caption in captions] == [[*record.captions] for record in pictures]
    report = measure(captioner, pictures, beam_size=1, hidden=1 / 16, draws=3, batch_size=3)
    assert report.health.content_words == 8 and report.health.images == 8
    assert report.hiding == 1.0 and report.loss_strongest > 0.5
    assert 0 <= report.loss_random < report.loss_strongest and report.health.entropy < 0.01
    assert report.cider_d > report.cider_d_uniform and report.cider_d > report.cider_d_permuted
    for (loss, low, high), reached in (
        (report.uniform_costs, report.cider_d_uniform),
        (report.permuted_costs, report.cider_d_permuted),
    ):
        assert loss == pytest.approx(report.cider_d - reached) and low <= loss <= high
    assert not own(captioner)


def test_a_model_that_does_not_use_its_attention_is_seen_not_to(pictures):
    captioner = constructed()
    with torch.no_grad():
        captioner.decoder.context_to_output.weight.zero_()
        captioner.output.bias[4] += 20.0  # always a cat
    report = measure(captioner, pictures, beam_size=1, hidden=1 / 16, draws=3)
    assert report.hiding == 0.0 and report.loss_strongest == pytest.approx(0.0, abs=1e-6)
    assert report.uniform_costs == report.permuted_costs == (0.0, 0.0, 0.0)


def test_a_small_run_is_reported(run, best, scenes, capsys):
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("val",)).read("val")
    captioner = Captioner.from_checkpoint(best)
    report, again = (measure(captioner, records, beam_size=2, batch_size=4) for _ in range(2))
    assert report == again  # one seed, one answer
    assert report.cider_d == pytest.approx(measure(captioner, records, beam_size=2).cider_d)
    assert 0 <= report.hiding <= 1 and 0 < report.health.entropy <= 1 + 1e-6 and math.isfinite(report.loss_random)
    capsys.readouterr()
    show(report, "val", Console(width=120))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"val, 9 images, {report.health.content_words} content words, beam 2, seed 0" in printed


def test_a_transformer_is_measured_like_any_other(scenes):
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("val",)).read("val")
    decoder = partial(TransformerDecoder, layers=2, heads=2)
    report, again = (measure(model(decoder=decoder), records, beam_size=2, batch_size=4) for _ in range(2))
    assert report == again and report.health.content_words > 0
    assert 0 <= report.hiding <= 1 and 0 < report.health.entropy <= 1 + 1e-6 and math.isfinite(report.loss_random)


def test_without_attention_there_is_nothing_to_measure(scenes):
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("val",)).read("val")
    with pytest.raises(InputError, match="no attention") as error:
        measure(model(NoAttention), records, beam_size=1)
    assert "\n" not in str(error.value)


def test_without_content_words_there_is_nothing_to_measure(pictures):
    captioner = constructed()
    captioner.vocabulary = Vocabulary(["a", "the"])
    with pytest.raises(InputError, match="no content word"):
        measure(captioner, pictures, beam_size=1)
