"""Fast captioning: what the plain way gives, up to the stated rounding, for one model and for several."""

import shutil

import pytest
import torch
from test_model import captioner

from captioner.decoding import Decoding
from captioner.encoders import SmallCNN
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.fast_captioner import FastCaptioner

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
    plain, fast = model.annotate_pixels(pixels), FastCaptioner(model, precision).annotate_pixels(pixels)
    assert fast.values.dtype == torch.float32 and fast.grid == plain.grid
    if precision == "bfloat16":
        assert distance(fast, plain) > 0  # or nothing was done
    assert distance(fast, plain) <= ROUNDING[precision]
    assert len(model.caption_annotations(fast)) == 5


def test_all_members_of_an_ensemble_are_looked_through_in_the_precision():
    ensemble = Ensemble([a_model(), a_model()])
    pixels = some_pixels(2, ensemble)
    for fast, plain in zip(
        FastCaptioner(ensemble, "bfloat16").annotate_pixels(pixels), ensemble.annotate_pixels(pixels), strict=True
    ):
        assert fast.values.dtype == torch.float32
        assert 0 < distance(fast, plain) <= ROUNDING["bfloat16"]


def test_the_decoder_stays_in_its_own_precision():
    model = a_model()
    seen = []
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    model.caption_annotations(FastCaptioner(model, "bfloat16").annotate_pixels(some_pixels(2, model)))
    assert seen == [torch.float32]


def test_attention_is_left_out_where_it_is_not_wanted():
    model = a_model()
    pixels, decoding = some_pixels(3, model), Decoding(beam_size=2, captions=2)
    fast = FastCaptioner(model, "float32")
    for one, other in zip(
        sum(fast.caption_pixels(pixels, decoding), []),
        sum(fast.caption_pixels(pixels, decoding, with_attention=False), []),
        strict=True,
    ):
        assert (one.text, one.log_probability) == (other.text, other.log_probability)
        assert one.attention is not None and other.attention is None and other.gates is None


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
    plain = {images: ensemble.annotate_pixels(some_pixels(images, ensemble)) for images in (1, 3, 4)}
    assert distance(*plain[4]) > 0.1
    fast_ensemble = FastCaptioner(ensemble, precision, compiled_for=4)
    torch._dynamo.utils.counters.clear()
    for images in (3, 4, 1, 3, 4):
        for fast, one in zip(fast_ensemble.annotate_pixels(some_pixels(images, ensemble)), plain[images], strict=True):
            assert len(fast.values) == images
            assert distance(fast, one) <= max(ROUNDING[precision], 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the weights are constants of each
    assert not torch._inductor.config.freezing


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
@pytest.mark.parametrize("members", [1, 2])
def test_a_compiled_search_finds_what_the_plain_one_finds(members):
    torch.compiler.reset()
    models = [a_model() for _ in range(members)]
    with torch.no_grad():
        for parameter in models[-1].parameters():
            parameter.mul_(1.3)
    model = models[0] if members == 1 else Ensemble(models)
    pixels, decoding = some_pixels(4, model), Decoding(beam_size=3, captions=2, min_words=2, max_words=6)
    plain = [model.caption_annotations(model.annotate_pixels([pixels[0][:n]]), decoding) for n in (4, 3, 1)]
    fast = FastCaptioner(model, "float32", compiled_for=4)
    torch._dynamo.utils.counters.clear()
    compiled = torch._dynamo.utils.counters["stats"]
    graphs = []
    for expected, images in zip(plain, (4, 3, 1), strict=True):
        found = fast.caption_pixels([pixels[0][:images]], decoding)
        for one, other in zip(sum(found, []), sum(expected, []), strict=True):
            assert one.words == other.words and one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
            assert torch.allclose(one.attention, other.attention, atol=1e-4)
        graphs.append(compiled["unique_graphs"])
    assert graphs[0] > members and graphs[0] == graphs[1] == graphs[2]  # whatever the number of images


@pytest.mark.slow
def test_without_a_compiler_it_says_so():
    torch.compiler.reset()
    model = a_model()
    missing = torch._inductor.config.patch({"cpp.cxx": ("/no/compiler",), "force_disable_caches": True})
    with missing, pytest.raises(InputError, match="cannot be compiled here"):
        FastCaptioner(model, "float32", compiled_for=2).annotate_pixels(some_pixels(2, model))


def test_a_device_without_the_precision_is_one_sentence():
    with pytest.raises(InputError, match="has no bfloat16"):
        FastCaptioner(a_model().to("meta"), "bfloat16")
