"""The health of attention: figures that are known beforehand, and a warning where attention is ill and nowhere else."""

import math
from functools import partial

import pytest
import torch
from rich.console import Console
from test_faithfulness import constructed, own
from torch import nn
from variants import DECODERS, KINDS, D, E, some_annotations

from captioner.attention import Additive, Annotations
from captioner.attention_health import Look, find_fault, in_words, report, show, sum_up, warn
from captioner.bridges import LinearBridge, NoBridge, TransformerBridge
from captioner.decoders import LSTMDecoder
from captioner.encoders import SmallCNN
from captioner.faithfulness import Hiding, attends, content_words, examine, intervene, relative_entropies
from captioner.images import Preprocessing
from captioner.metrics import paired_bootstrap, ptb_tokenize, score_captions
from captioner.model import Captioner
from captioner.scenes import Scene, SceneObject
from captioner.tokens import tokenize
from captioner.vocabulary import BEGIN, END, BytePairs, Characters, Vocabulary

MASK = torch.tensor([[True] * 6, [True, False, True, True, False, False]])


class Given(nn.Module):
    """An encoder that is never asked, since the annotations are given."""

    annotation_dim, preprocessing = D, Preprocessing("squash", 4)


def speaker(decoder, bridge=NoBridge, words=None):
    """A captioner with random weights, larger than at the start of training."""
    torch.manual_seed(0)
    words = words or Vocabulary("the red blue ball".split())
    captioner = Captioner(Given(), words, decoder=decoder, bridge=bridge, embedding_dim=E)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(3)
    return captioner.double().eval()


THE, RED, BLUE, BALL = 4, 5, 6, 7
CAPTIONS = [[THE, RED, BALL, END], [BALL, END]]


# The figures


def test_entropy_is_1_of_uniform_and_0_of_one_hot_weights_also_where_regions_are_masked():
    exists = MASK.float()
    even = (exists / exists.sum(-1, keepdim=True))[:, None]
    one_hot = torch.eye(6)[torch.tensor([[0], [2]])]
    half = torch.tensor([[[0.5, 0, 0.5, 0, 0, 0]], [[0.5, 0, 0.5, 0, 0, 0]]])
    for weights, expected in ((even, [1, 1]), (one_hot, [0, 0]), (half, [math.log(2) / math.log(n) for n in (6, 3)])):
        assert relative_entropies(weights, MASK)[:, 0].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in KINDS if "Attention" not in name and "Uniform" not in name])
def test_what_is_seen_is_what_the_weights_and_two_passes_say(name):
    captioner, annotations = speaker(DECODERS[name]), some_annotations(2, mask=[[1, 1, 1, 1], [1, 1, 0, 1]])
    looks = examine(captioner, annotations, ["a", "b"], CAPTIONS)
    assert not own(captioner)
    for image, (image_id, ids) in enumerate(zip("ab", CAPTIONS, strict=True)):
        alone = annotations._replace(
            values=annotations.values[image : image + 1], mask=annotations.mask[image : image + 1]
        )
        tokens = torch.tensor([[[BEGIN, *ids]]])
        logits, weights, _ = captioner(alone, tokens)
        with intervene(captioner, lambda given, mask: (mask.double() / mask.sum(-1, keepdim=True)).expand_as(given)):
            evenly, _, _ = captioner(alone, tokens)
        said, look = weights[0, 0], looks[image_id]
        words = [word.start for word in content_words(captioner, ids)]
        assert words == [t for t, word in enumerate(ids) if word in (RED, BLUE, BALL)]
        lost = [(logits.log_softmax(-1) - evenly.log_softmax(-1))[0, 0, t, ids[t]].item() for t in words]
        assert look.uniform_losses == pytest.approx(lost, abs=1e-9)
        assert list(look.peaks) == [said[t].argmax().item() for t in words]
        moved = [(said[t] - said.mean(0)).abs().sum().item() / 2 for t in words]
        assert look.movements == pytest.approx(moved, abs=1e-9)
        assert look.entropies == pytest.approx(relative_entropies(weights[:, 0], alone.mask)[0, words].tolist())
        assert look.hidden == look.points == () and look.uniform == ""


PARTS = {"characters": Characters.train(["The red ball."]), "byte pairs": BytePairs.train(["The red ball."] * 3, 260)}
of_parts = pytest.mark.parametrize("vocabulary", PARTS.values(), ids=PARTS)


def ids_of(vocabulary, caption):
    return vocabulary.encode(vocabulary.cut(caption), 99)[1:]


@of_parts
def test_figures_are_those_of_words_where_their_parts_are_said(vocabulary):
    captioner, annotations = speaker(DECODERS["GRU-Additive-before"], words=vocabulary), some_annotations(1)
    ids = ids_of(vocabulary, "The red ball.")
    (look,) = examine(captioner, annotations, ["a"], [ids], hiding=Hiding(0.5, 3)).values()
    tokens = torch.tensor([[[BEGIN, *ids]]])
    said = torch.tensor(ids)

    def passed(seen):
        logits, weights, _ = captioner(seen, tokens)
        return logits.log_softmax(-1)[0, 0, range(len(ids)), said], weights[0, 0]

    whole, weights = passed(annotations)
    with intervene(captioner, lambda given, mask: torch.full_like(given, 0.25)):
        evenly, _ = passed(annotations)
    the, *content = [slice(word.start, word.stop) for word in vocabulary.read(vocabulary.decode(ids))]
    assert len(content) == 2 and all(word.stop - word.start > 1 for word in content)
    mean = torch.stack([weights[word].mean(0) for word in (the, *content, slice(-1, None))]).mean(0)
    for place, word in enumerate(content):
        meant = weights[word].mean(0)
        without = annotations._replace(values=annotations.values[:, meant.topk(2, largest=False).indices])
        assert look.entropies[place] == pytest.approx(-torch.xlogy(meant, meant).sum().item() / math.log(4))
        assert look.movements[place] == pytest.approx((meant - mean).abs().sum().item() / 2)
        assert look.peaks[place] == meant.argmax().item()
        assert look.uniform_losses[place] == pytest.approx((whole - evenly)[word].sum().item(), abs=1e-9)
        assert look.hidden[place][0] == pytest.approx((whole - passed(without)[0])[word].sum().item(), abs=1e-9)


def test_function_words_are_none_with_capitals_punctuation_and_contractions_too():
    for vocabulary in PARTS.values():
        captioner = speaker(DECODERS["GRU-Additive-before"], words=vocabulary)
        ids = ids_of(vocabulary, "The red ball isn't on it, the dog's is. !")
        if vocabulary.units == "byte_pairs":  # which know all letters
            assert [word.text for word in content_words(captioner, ids)] == ["red", "ball", "dog's"]
        assert content_words(captioner, [END]) == []
    korean = Characters.train(["빨간 원이 있다"])
    captioner = speaker(DECODERS["GRU-Additive-before"], words=korean)
    assert [word.text for word in content_words(captioner, ids_of(korean, "빨간 원이"))] == ["빨간", "원이"]


def test_an_image_with_one_region_says_nothing_of_attention():
    captioner = speaker(DECODERS["GRU-Additive-before"])
    looks = examine(
        captioner, some_annotations(2, mask=[[1, 1, 1, 1], [0, 0, 1, 0]]), [1, 2], CAPTIONS, hiding=Hiding()
    )
    assert len(looks[1].peaks) == 2 and looks[2] == Look((), (), (), (), (), ())
    assert sum_up(looks).content_words == 2 and math.isfinite(sum_up(looks).entropy)
    assert sum_up({2: looks[2]}) is None


BRIDGES = {
    "none": NoBridge,
    "linear": partial(LinearBridge, dim=8),
    "transformer": partial(TransformerBridge, dim=8, layers=1, heads=2, positions=False),
}


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("name", ["LSTM", "GRU-Additive-before", "Transformer-sinusoidal-pre"])
def test_a_hidden_region_is_one_that_does_not_exist_for_the_model(name, bridge):
    """Half of four regions, the weights as given: the loss is that of the model without these regions."""
    name = next(kind for kind in KINDS if kind.startswith(name))
    captioner, annotations = speaker(DECODERS[name], BRIDGES[bridge]), some_annotations(1)
    (look,) = examine(captioner, annotations, ["a"], CAPTIONS[:1], hiding=Hiding(0.5, 200)).values()
    tokens = torch.tensor([[[BEGIN, *CAPTIONS[0]]]])
    logits, weights, _ = captioner(annotations, tokens)

    def lost(t, regions):
        rest = [region for region in range(4) if region not in regions]
        without, _, _ = captioner(annotations._replace(values=annotations.values[:, rest]), tokens)
        scores = (logits.log_softmax(-1) - without.log_softmax(-1))[0, 0, t]
        return scores[CAPTIONS[0][t]].item()

    for (strongest, random, smaller), t in zip(look.hidden, (1, 2), strict=True):
        first = lost(t, weights[0, 0, t].topk(2).indices.tolist())
        pairs = [lost(t, (one, other)) for one in range(4) for other in range(one)]
        assert strongest == pytest.approx(first, abs=1e-9)
        spread = max(pairs) - min(pairs)
        assert random == pytest.approx(sum(pairs) / 6, abs=spread / 4)  # of 200 draws of the six pairs
        assert smaller == pytest.approx(sum(pair < first - 1e-9 for pair in pairs) / 6, abs=0.15)


def test_the_draws_of_an_image_do_not_depend_on_the_others():
    captioner, annotations = speaker(DECODERS["GRU-Additive-before"]), some_annotations(2)
    both = examine(captioner, annotations, ["a", "b"], CAPTIONS, hiding=Hiding(0.5, 3))
    alone = examine(
        captioner, annotations._replace(values=annotations.values[1:]), ["b"], CAPTIONS[1:], hiding=Hiding(0.5, 3)
    )
    assert both["b"].hidden[0] == pytest.approx(alone["b"].hidden[0], abs=1e-9)
    other = examine(captioner, annotations, ["a", "b"], CAPTIONS, hiding=Hiding(0.5, 3, seed=1))
    assert other["a"].hidden[0][0] == both["a"].hidden[0][0] and other["a"].hidden != both["a"].hidden


def test_a_model_that_reads_one_region_loses_all_of_it_when_that_is_hidden_and_nothing_else():
    captioner = constructed()  # looks at the bright region: "cat" if it is red
    values = torch.zeros(1, 16, 2)
    values[0, 5] = torch.tensor([1.0, 1.0])
    dark = values.clone()
    dark[0, 5] = 0
    cat = [[4, END]]
    (look,) = examine(captioner, Annotations(values, grid=(4, 4)), [1], cat, hiding=Hiding(1 / 16, 50)).values()
    (blind,) = examine(captioner, Annotations(dark, grid=(4, 4)), [1], cat, hiding=Hiding(1 / 16, 50)).values()
    tokens = torch.tensor([[[BEGIN, 4, END]]])
    seen, unseen = (
        captioner(Annotations(each), tokens)[0].log_softmax(-1)[0, 0, 0, 4].item() for each in (values, dark)
    )
    ((strongest, random, smaller),) = look.hidden
    assert strongest == pytest.approx(seen - unseen, abs=1e-5) and strongest > 1
    # Of the draws those that hit the same region lose as much, and the others nothing.
    assert smaller * 50 == pytest.approx(round(smaller * 50)) and 0.8 <= smaller < 1 + 1e-9
    assert random == pytest.approx((1 - smaller) * strongest, abs=1e-4)
    assert look.peaks == (5,) and look.entropies[0] < 1e-6
    assert blind.entropies[0] == pytest.approx(1) and blind.hidden[0] == pytest.approx((0, 0, 0), abs=1e-5)


# Pointing


def scene():
    """A red ball in the upper left quarter and a blue one in the lower right."""
    objects = (
        SceneObject("circle", "red", "big", (2, 2, 14, 14)),
        SceneObject("square", "blue", "big", (18, 18, 30, 30)),
    )
    return Scene(32, objects, 0)


class Looking(nn.Module):
    """A decoder whose weights are set by hand, word by word."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, words, memory, need_weights=True, lengths=None):
        from captioner.decoders import Outputs

        return Outputs(torch.zeros(*words.shape[:2], 4), self.weights[None, None], None)

    def memory(self, annotations):
        return (annotations.values,)


def pointing_of(preprocessing, known):
    words = Vocabulary("a red circle is above blue square".split())
    encoder = Given()
    encoder.preprocessing = preprocessing
    captioner = Captioner(encoder, words, embedding_dim=4).eval()
    ids = [*words.encode("a red circle is above a red square blue square".split(), 20)[1:-1], END]
    regions = [3, 0, 3, 0, 0, 0, 0, 0, 3, 1]  # of 2 x 2; the last look is before the end
    weights = torch.full((11, 4), 0.1)
    weights[range(10), regions] = 0.7
    captioner.decoder = Looking(weights)
    annotations = Annotations(torch.zeros(1, 4, D), grid=(2, 2))
    (look,) = examine(captioner, annotations, [7], [ids], scenes=known).values()
    return look.points


def test_pointing_is_what_is_counted_by_hand():
    # "red" hits, "circle" does not, "red square" is not there, "blue" hits, "square" does not.
    expected = [(True, 0.25), (False, 0.25), (False, 0.0), (False, 0.0), (True, 0.25), (False, 0.25)]
    assert list(pointing_of(Preprocessing("squash", 32), {7: scene()})) == expected
    found = sum_up({7: Look((1.0,), (0.0,), (0,), (0.0,), (), tuple(expected))})
    assert found.pointing == pytest.approx(2 / 6) and found.pointing_uniform == pytest.approx(1 / 6)
    assert "pointing 0.33 (by chance 0.17)" in in_words(found)


def test_korean_words_of_characters_point_as_english_ones():
    vocabulary = Characters.train([said := "빨간 원은 파란 정사각형 왼쪽에 있다"])
    encoder = Given()
    encoder.preprocessing = Preprocessing("squash", 32)
    captioner = Captioner(encoder, vocabulary, embedding_dim=4).eval()
    ids = ids_of(vocabulary, said)
    weights = torch.full((len(ids), 4), 0.1)
    for word, region in zip(vocabulary.read(list(said)), [0, 3, 3, 0, 1, 1], strict=True):
        weights[word.start : word.stop, region] = 0.7
    captioner.decoder = Looking(weights)
    annotations = Annotations(torch.zeros(1, 4, D), grid=(2, 2))
    (look,) = examine(captioner, annotations, [7], [ids], scenes={7: scene()}).values()
    assert look.points == ((True, 0.25), (False, 0.25), (True, 0.25), (False, 0.25))


def test_nothing_points_where_boxes_are_unknown_or_the_crop_moves_them():
    assert pointing_of(Preprocessing("squash", 32), {8: scene()}) == ()
    assert pointing_of(Preprocessing("squash", 32), {}) == ()
    assert pointing_of(Preprocessing("crop", 28, resize=32), {7: scene()}) == ()


# The report


def made(losses=(0.3,), entropy=0.9, movement=0.2, peaks=None, images=40):
    """What was seen of images with one content word each."""
    peaks = peaks or range(images)
    return {
        k: Look((entropy,), (movement,), (peak,), (losses[k % len(losses)],), ((0.5, 0.1, 0.8), (0.0, 0.1, 0.2)), ())
        for k, peak in zip(range(images), peaks, strict=True)
    }


def test_captions_with_replaced_weights_are_scored_over_the_tokens_of_the_references():
    said = {k: f"草地上的{'狗' if k % 3 else '猫'}。" for k in range(40)}
    references = {k: [f"草地上的{'狗' if k % 2 else '猫'}。", "狗"] for k in said}
    looks = {k: look._replace(uniform="草地上的猫。", permuted="猫") for k, look in made().items()}
    tokens = {k: [tokenize(caption, "unicode") for caption in captions] for k, captions in references.items()}
    found = report(tokens, said, looks, tokenizer="unicode", beam_size=3, seed=4, hidden=0.2)
    for reached, captions in ((found.cider_d, said), (found.cider_d_uniform, dict.fromkeys(said, "草地上的猫。"))):
        assert reached == score_captions(references, captions, "unicode")["CIDEr-D"].corpus > 0


def test_costs_are_differences_of_scores_with_the_intervals_of_the_paired_bootstrap(capsys):
    said = {k: f"a {'red' if k % 3 else 'blue'} ball number {k % 5}" for k in range(40)}
    references = {k: [f"a {'red' if k % 2 else 'blue'} ball number {k % 5}", f"the ball {k}"] for k in range(40)}
    evenly = {k: "a red ball" for k in said}
    looks = {k: look._replace(uniform=evenly[k], permuted=said[k]) for k, look in made().items()}
    tokens = {k: [ptb_tokenize(caption) for caption in captions] for k, captions in references.items()}
    found = report(tokens, said, looks, tokenizer="ptb", beam_size=3, seed=4, hidden=0.2)
    trained, uniform = (score_captions(references, each)["CIDEr-D"] for each in (said, evenly))
    assert (found.cider_d, found.cider_d_uniform) == (trained.corpus, uniform.corpus)
    assert found.uniform_costs == paired_bootstrap(trained, uniform, seed=4)
    assert found.uniform_costs.low < found.uniform_costs.difference < found.uniform_costs.high
    assert found.permuted_costs == (0, 0, 0) and found.cider_d_permuted == found.cider_d
    assert (found.hiding, found.hiding_each) == pytest.approx((0.5, 0.5))
    assert (found.loss_strongest, found.loss_random) == pytest.approx((0.25, 0.1))
    assert found.as_json()["tokenizer"] == "ptb" and found.as_json()["entropy"] == pytest.approx(0.9)
    assert found.as_json()["hiding"] == 0.5
    show(found, "dev", Console(width=160))
    printed = " ".join(capsys.readouterr().out.split())
    low, high = (f"{100 * value:.1f}" for value in found.uniform_costs[1:])
    assert f"[{low},{high}]" in printed and "0.100 with random ones hidden" in printed and "50.0 %" in printed
    assert "dev, 40 images, 40 content words, beam 3, seed 4" in printed and "chance" not in printed


# Warnings


def test_health_is_the_mean_over_words_and_not_over_images():
    looks = {1: Look((1.0,), (0.3,), (2,), (0.9,), (), ()), 2: Look((0.7, 0.4), (0.0, 0.0), (2, 5), (0.3, 0.0), (), ())}
    found = sum_up(looks)
    assert found[:6] == (2, 3, pytest.approx(0.7), pytest.approx(0.1), pytest.approx(2 / 3), pytest.approx(0.4))
    assert found.pointing is None and "pointing" not in in_words(found)


@pytest.mark.parametrize(
    ("ill", "kind"),
    [
        ({}, None),
        ({"entropy": 0.99}, None),  # soft, and needed
        ({"entropy": 0.02}, None),  # sharp, at another place each time
        ({"peaks": [3] * 40}, None),  # the middle of the image, and not only that
        ({"entropy": 0.02, "peaks": [3] * 39 + [1]}, "collapsed"),
        ({"entropy": 0.02, "peaks": [3] * 36 + [1] * 4}, None),
        ({"movement": 0.0}, "still"),
        ({"movement": 0.0, "entropy": 0.02, "peaks": [3] * 40}, "collapsed"),  # which says more
        ({"losses": (0.004, -0.004)}, "idle"),
        ({"losses": (0.0,), "entropy": 0.3}, "idle"),
        ({"movement": 0.0, "images": 29}, None),  # too few to tell
    ],
)
def test_faults_are_told_apart(ill, kind, capsys):
    health = sum_up(made(**ill))
    fault = find_fault(health)
    warn(health)
    said = capsys.readouterr().err
    assert (fault.kind if fault else None) == kind
    if fault is None:
        assert said == ""
    else:
        begins = "The attention has collapsed: " if kind == "collapsed" else "The attention is dead: "
        assert said.startswith(f"captioner: {begins}") and said.count("\n") == 1 and said.endswith(".\n")


def untrained(attention=None):
    torch.manual_seed(1)
    words = Vocabulary([f"word{number}" for number in range(9)])
    decoder = partial(LSTMDecoder, hidden_dim=32, attention=attention or partial(Additive, dim=16))
    return Captioner(SmallCNN(size=32, width=4), words, decoder=decoder, embedding_dim=16).eval()


def seeing(attention=None):
    """One with random weights that looks sharply, moves, and says what it sees."""
    captioner = untrained(attention)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(3)
        captioner.decoder.attention.score.weight.mul_(4)
    return captioner


def health_of(captioner):
    """Of its captions of random regions, in batches as a validation has them."""
    generator = torch.Generator().manual_seed(2)
    looks = {}
    for batch in range(0, 40, 10):
        annotations = Annotations(torch.randn(10, 16, captioner.encoder.annotation_dim, generator=generator))
        found = captioner.search(annotations, beam_size=1, min_words=3, max_words=6)
        said = [hypotheses[0].tokens for hypotheses in found]
        looks |= examine(captioner, annotations, range(batch, batch + 10), said)
    return sum_up(looks)


def test_attention_that_is_made_to_look_without_asking_the_decoder_is_called_dead():
    captioner = seeing()
    assert find_fault(health_of(captioner)) is None
    with torch.no_grad():
        captioner.decoder.attention.query.weight.zero_()
    found = health_of(captioner)
    assert found.entropy < 0.9 and found.movement < 1e-6 and found.same_region < 0.5 and found.uniform_loss > 0.1
    assert find_fault(found).kind == "still" and "do not depend on the decoder's state" in find_fault(found).sentence


class First(Additive):
    """Looks at the first region, whatever it is asked and shown."""

    def scores(self, query, keys):
        return super().scores(query, keys) + 1000 * torch.eye(keys.size(1))[0]


def test_attention_that_is_made_to_look_at_the_first_region_always_is_called_collapsed():
    found = health_of(seeing(partial(First, dim=16)))
    assert found.same_region == 1 and found.entropy < 1e-6 and find_fault(found).kind == "collapsed"


def test_contexts_that_nobody_reads_are_called_dead_however_sharp_the_weights():
    captioner = seeing()
    with torch.no_grad():
        captioner.decoder.beta.weight.zero_()
        captioner.decoder.beta.bias.fill_(-50)  # beta is 0
    found = health_of(captioner)
    assert found.entropy < 0.9 and found.movement > 0.01 and abs(found.uniform_loss) < 1e-6
    assert find_fault(found).kind == "idle" and find_fault(health_of(seeing())) is None


def test_an_untrained_model_is_neither_called_still_nor_collapsed():
    found = health_of(untrained())
    assert found.entropy > 0.98 and find_fault(found).kind == "idle"  # it makes nothing of what it sees yet


def test_decoders_without_attention_are_known():
    for name in KINDS:
        assert attends(speaker(DECODERS[name])) == ("NoAttention" not in name and "Uniform" not in name)
