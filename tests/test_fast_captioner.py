"""Fast captioning: what the plain way gives, up to the stated rounding, for one model and for several."""

import shutil
import time
from threading import Barrier, get_ident

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


@pytest.fixture
def four_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("expected", "threads"), [(1, [4]), (4, [2, 2]), (9, [1, 1, 1, 1])])
def test_a_cpu_works_on_several_batches_at_a_time(expected, threads, four_cores):
    fast, together = FastCaptioner(a_model(), "float32"), Barrier(len(threads))

    def work(batch):
        if batch < len(threads):
            together.wait(timeout=20)  # breaks unless so many work at a time
        time.sleep(0.01 * (batch % 3 == 0))  # they end in another order
        return batch, torch.get_num_threads(), get_ident()

    found = list(fast.work_through(iter(range(expected)), work, expected))
    assert [batch for batch, _, _ in found] == list(range(expected))
    assert {cores for _, cores, _ in found} == set(threads) and len({each for *_, each in found}) == len(threads)
    assert torch.get_num_threads() == 4


def test_batches_are_taken_a_few_ahead(four_cores):
    taken = []
    batches = (taken.append(batch) or batch for batch in range(100))
    work = FastCaptioner(a_model(), "float32").work_through(batches, lambda batch: batch, 100)
    assert [next(work), next(work)] == [0, 1]
    assert len(taken) <= 2 + 4
    work.close()
    assert len(taken) <= 2 + 4 and torch.get_num_threads() == 4


def test_what_goes_wrong_with_a_batch_is_raised_after_those_before_it(four_cores):
    def work(batch):
        if batch == 3:
            raise InputError("No.")
        return batch

    done = []
    with pytest.raises(InputError, match="No"):
        for batch in FastCaptioner(a_model(), "float32").work_through(range(100), work, 100):
            done.append(batch)
    assert done == [0, 1, 2] and torch.get_num_threads() == 4


@pytest.mark.parametrize("members", [1, 2])
def test_batches_at_a_time_are_captioned_as_one_after_the_other(members, four_cores):
    model = a_model() if members == 1 else Ensemble([a_model(), a_model()])
    fast, decoding = FastCaptioner(model, "float32"), Decoding(beam_size=3, captions=2, max_words=6)
    batches = [some_pixels(images, model) for images in (3, 1, 4, 2, 3, 4, 4, 1)]
    torch.set_num_threads(1)
    alone = [fast.caption_pixels(batch, decoding) for batch in batches]
    torch.set_num_threads(4)
    for one, other in zip(
        fast.work_through(batches, lambda batch: fast.caption_pixels(batch, decoding), len(batches)), alone, strict=True
    ):
        for ours, theirs in zip(sum(one, []), sum(other, []), strict=True):
            assert (ours.text, ours.log_probability) == (theirs.text, theirs.log_probability)


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
