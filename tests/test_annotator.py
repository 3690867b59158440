"""The fast look at images: what the plain one gives, up to the stated rounding, for one model and for several."""

import shutil

import pytest
import torch
from test_model import captioner

from captioner.annotator import Annotator
from captioner.encoders import SmallCNN
from captioner.ensemble import Ensemble
from captioner.errors import InputError

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
def test_compiled_members_see_what_each_saw_before_in_batches_of_any_size(precision):
    torch.compiler.reset()
    ensemble = Ensemble([a_model(), a_model()])
    with torch.no_grad():
        for parameter in ensemble.captioners[1].encoder.parameters():
            parameter.mul_(1.2)
    ensemble = Ensemble(ensemble.captioners)  # they are two now
    plain = {images: ensemble.annotate_pixels(some_pixels(images, ensemble)) for images in (3, 4)}
    assert distance(*plain[4]) > 0.1
    annotator = Annotator(ensemble, precision, compiled_for=4)
    torch._dynamo.utils.counters.clear()
    for images in (3, 4, 3, 4):
        for fast, one in zip(annotator(some_pixels(images, ensemble)), plain[images], strict=True):
            assert len(fast.values) == images
            assert distance(fast, one) <= max(ROUNDING[precision], 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the weights are constants of each
    assert not torch._inductor.config.freezing


@pytest.mark.slow
def test_without_a_compiler_it_says_so(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    model = a_model()
    with pytest.raises(InputError, match="cannot be compiled here"):
        Annotator(model, "float32", compiled_for=2)(some_pixels(2, model))


def test_a_device_without_the_precision_is_one_sentence():
    with pytest.raises(InputError, match="has no bfloat16"):
        Annotator(a_model().to("meta"), "bfloat16")
