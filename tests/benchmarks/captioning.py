"""How fast images become captions, beside the bare encoder, and the search beside the usual way of searching.

pytest -n 0 --override-ini addopts= tests/benchmarks/captioning.py --images 200 --rounds 3

Photographs of 500 x 375 pixels are drawn and stored as JPEG files. The encoder has the size of the one of the recipes,
a ResNet-50 with 49 regions of 2,048 values, and nothing here has learnt: so that captions are as long as people's, all
have 11 words. "Files to captions" is the command `captioner caption --output`, but for opening the checkpoint and for
compiling. "As is usual" is the search of the known implementations: one image at a time, its regions copied for every
hypothesis, their keys computed anew at every step.
"""

import argparse
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.attention import Additive, Annotations
from captioner.bridges import LinearBridge
from captioner.caption_command import add_options, run, understand
from captioner.decoders import LSTMDecoder
from captioner.decoding import Decoding
from captioner.encoders import ResNet
from captioner.model import Captioner
from captioner.precision import faster_precision
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary

WORDS = 11  # of Flickr8k's captions, in the mean
BATCH = 32
SIZES = (2500, 10_000)  # of the vocabulary
BEAMS = {"greedy": 1, "beam 5": 5}
USUAL_IMAGES = 20  # that are searched one by one


def captioner(words):
    torch.manual_seed(0)
    vocabulary = Vocabulary([f"word{index}" for index in range(words - 4)])
    decoder = partial(LSTMDecoder, attention=partial(Additive, dim=512))
    return Captioner(ResNet(depth=50, stage=4), vocabulary, bridge=LinearBridge, decoder=decoder).eval()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, request):
    """JPEG files that take about as long to decode as photographs do."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    paths = []
    for number in range(request.config.getoption("--images")):
        large = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        pixels = np.asarray(large, dtype=np.int16) + random.integers(-12, 13, (375, 500, 3))
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


@pytest.fixture(scope="module", params=["plain", "compiled"])
def encoder(request):
    """The encoder, plain and compiled; the precision, the one that is faster here."""
    module = captioner(SIZES[0]).encoder
    precision = faster_precision(torch.device("cpu"))
    return SimpleNamespace(module=module, precision=precision, way=request.param)


@pytest.fixture(scope="module")
def models():
    """Captioners by the encoder's way and the number of words, each of which is compiled once."""
    made = {}
    return lambda way, words: made.setdefault((way, words), captioner(words))


@pytest.fixture(scope="module")
def annotations():
    return Annotations(torch.rand(BATCH, 49, 2048, generator=torch.Generator().manual_seed(0)), None, (7, 7))


@pytest.mark.parametrize("batch", [16, 32, 64])
def test_bare_encoder(measure, encoder, batch, rounds):
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    images = encoder.module.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)
    lower = torch.autocast("cpu", torch.bfloat16, enabled=encoder.precision != torch.float32)
    if encoder.way == "compiled":
        encoder.module.compile(dynamic=False)

    def work():
        with torch.no_grad(), lower, torch._inductor.config.patch(freezing=True):
            encoder.module(images)

    measure(("encoder", encoder.way, batch), work, batch, 2 * rounds)


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("words", SIZES)
def test_search(measure, annotations, words, beam, rounds):
    model, decoding = captioner(words), Decoding(BEAMS[beam], min_words=WORDS, max_words=WORDS)

    def work():
        model.caption_annotations(annotations, decoding, with_attention=False)

    measure(("search", words, beam), work, BATCH, 2 * rounds)


@torch.inference_mode()
def search_as_is_usual(model, annotations, beam_size):
    """One image at a time, and everything but the encoder and the bridge at every step."""
    found = []
    for image in range(len(annotations.values)):
        regions = model.bridge(annotations._replace(values=annotations.values[image : image + 1]))
        copies = regions._replace(values=regions.values.expand(beam_size, -1, -1).contiguous())
        state = model.decoder.start(model.decoder.memory(copies), 1)
        tokens = [[BEGIN] for _ in range(beam_size)]
        totals = torch.full((beam_size,), -torch.inf)
        totals[0] = 0
        for _ in range(WORDS):
            memory = model.decoder.memory(copies)
            log_probabilities, state = model.step(torch.tensor([ids[-1] for ids in tokens]), memory, state)
            log_probabilities[:, [PAD, BEGIN, END, UNKNOWN]] = -torch.inf
            totals, choices = (totals[:, None] + log_probabilities).flatten().topk(beam_size)
            parents = (choices // log_probabilities.size(1)).tolist()
            words = (choices % log_probabilities.size(1)).tolist()
            tokens = [[*tokens[parent], word] for parent, word in zip(parents, words, strict=True)]
            state = tuple(part[parents] for part in state)
        memory = model.decoder.memory(copies)
        log_probabilities, _ = model.step(torch.tensor([ids[-1] for ids in tokens]), memory, state)
        best = (totals + log_probabilities[:, END]).argmax().item()
        found.append(tokens[best][1:])
    return found


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("words", SIZES)
def test_search_as_is_usual(measure, annotations, words, beam, rounds):
    model = captioner(words)
    few = annotations._replace(values=annotations.values[:USUAL_IMAGES])
    measure(("usual", words, beam), lambda: search_as_is_usual(model, few, BEAMS[beam]), USUAL_IMAGES, rounds)
    decoding = Decoding(BEAMS[beam], min_words=WORDS, max_words=WORDS, length_penalty=0.0)
    same = [captions[0].words for captions in model.caption_annotations(few, decoding)]
    usual = [model.vocabulary.decode(ids) for ids in search_as_is_usual(model, few, BEAMS[beam])]
    assert sum(a != b for a, b in zip(same, usual, strict=True)) <= 1  # but for rounding the same search


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("words", SIZES)
def test_files_to_captions(measure, encoder, models, photographs, tmp_path, words, beam, rounds):
    model = models(encoder.way, words)
    checkpoint, out = tmp_path / "best.ckpt", tmp_path / "captions.jsonl"
    checkpoint.write_text("whose model is open")
    flags = ["--checkpoint", checkpoint, "--output", out, "--overwrite", "--batch-size", BATCH]
    flags += ["--beam-size", BEAMS[beam], "--min-words", WORDS, "--max-words", WORDS]
    flags += ["--precision", str(encoder.precision).removeprefix("torch.")]
    flags += ["--compile"] if encoder.way == "compiled" else []
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)

    def work():
        assert run(understand(parser, [str(photographs[0].parent), *map(str, flags)]), lambda: model) == 0

    measure(("files", encoder.way, words, beam), work, len(photographs), rounds)
    assert len(out.read_text().splitlines()) == len(photographs)
