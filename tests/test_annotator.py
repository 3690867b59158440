"""The fast look at images: what the plain one gives, up to the stated rounding, for one model and for several."""

import shutil

import pytest
import torch
from test_model import captioner

from captioner.annotator import Annotator
from captioner.encoders import SmallCNN
from captioner.ensemble import Ensemble

NAME = "LSTM-Additive-before-fed-gate-deep-mean"
ROUNDING = {"float32": 0.0, "bfloat16": 2**-6}  # of a vector, relative to its length


def a_model(**settings):
    torch.manual_seed(0)
    return captioner(NAME, encoder=SmallCNN(size=32, region=8, width=8), **settings).eval()


def some_pixels(images, model):
    size = model.preprocessings[0].size
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)]


def distance(one, other):
    return ((one.values - other.values).norm() / other.values.norm()).item()


@pytest.mark.parametrize("precision", ROUNDING)
def test_it_gives_what_the_plain_look_gives(precision):
    model = a_model()
    pixels = some_pixels(5, model)
    plain, fast = model.annotate_pixels(pixels), Annotator(model, precision)(pixels)
    assert fast.values.dtype == torch.float32 and fast.grid == plain.grid
    if precision == "bfloat16":
        assert distance(fast, plain) > 0  # or nothing was done
    assert distance(fast, plain) <= ROUNDING[precision]
    assert len(model.caption_annotations(fast)) == 5


def test_all_members_of_an_ensemble_are_looked_through_in_the_precision():
    ensemble = Ensemble([a_model(), a_model()])
    pixels = some_pixels(2, ensemble)
    for fast, plain in zip(Annotator(ensemble, "bfloat16")(pixels), ensemble.annotate_pixels(pixels), strict=True):
        assert fast.values.dtype == torch.float32
        assert 0 < distance(fast, plain) <= ROUNDING["bfloat16"]


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_by_default_the_faster_precision_is_taken(monkeypatch, faster):
    monkeypatch.setattr("captioner.annotator.faster_precision", lambda device: faster)
    assert Annotator(a_model()).precision == faster


def test_the_decoder_stays_in_its_own_precision():
    model = a_model()
    seen = []
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    model.caption_annotations(Annotator(model, "bfloat16")(some_pixels(2, model)))
    assert seen == [torch.float32]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
@pytest.mark.parametrize("precision", ROUNDING)
def test_a_compiled_encoder_serves_full_batches_and_leaves_smaller_ones_to_the_plain_way(precision):
    torch.compiler.reset()
    model = a_model()
    plain = {images: model.annotate_pixels(some_pixels(images, model)) for images in (4, 3)}
    annotator = Annotator(model, precision, compiled=True)
    torch._dynamo.utils.counters.clear()
    for images in (4, 4, 3, 4):
        fast = annotator(some_pixels(images, model))
        assert distance(fast, plain[images]) <= max(ROUNDING[precision], 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    uncompiled = Annotator(a_model(), precision)
    assert distance(annotator(some_pixels(3, model)), uncompiled(some_pixels(3, model))) == 0
