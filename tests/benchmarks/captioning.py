"""How fast images become captions, beside the bare encoder, and the search beside the usual way of searching.

pytest -n 0 --override-ini addopts= tests/benchmarks/captioning.py --images 200 --rounds 3

Photographs of 500 x 375 pixels are drawn and stored as JPEG files. The encoder has the size of the one of the recipes,
a ResNet-50 with 49 regions of 2,048 values, and nothing here has learnt: so that captions are as long as people's, all
have 11 words. "As is usual" is the search of the known implementations: one image at a time, its regions copied for
every hypothesis, their keys computed anew at every step.
"""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from captioner.annotator import Annotator
from captioner.attention import Additive, Annotations
from captioner.bridges import LinearBridge
from captioner.decoders import LSTMDecoder
from captioner.decoding import Decoding
from captioner.encoders import ResNet
from captioner.image_stream import read_images
from captioner.model import Captioner
from captioner.vocabulary import BEGIN, END, PAD, UNKNOWN, Vocabulary

WORDS = 11  # of Flickr8k's captions, in the mean
BATCH = 32
SIZES = (2500, 10_000)  # of the vocabulary
BEAMS = {"greedy": 1, "beam 5": 5}
USUAL_IMAGES = 20  # that are searched one by one
medians = {}  # seconds an image


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


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compiled"])
def looking(request):
    """The model whose encoder is looked through, plain and compiled."""
    model = captioner(SIZES[0])
    return SimpleNamespace(
        model=model,
        annotator=Annotator(model, compiled_for=BATCH if request.param else None),
        name=["plain", "compiled"][request.param],
    )


@pytest.fixture(scope="module")
def annotations():
    return Annotations(torch.rand(BATCH, 49, 2048, generator=torch.Generator().manual_seed(0)), None, (7, 7))


def measure(benchmark, name, work, images, rounds):
    benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)
    medians[name] = benchmark.stats.stats.median / images
    benchmark.extra_info["images a second"] = round(1 / medians[name], 1)


@pytest.mark.parametrize("batch", [16, 32, 64])
def test_bare_encoder(benchmark, looking, batch, rounds):
    model = looking.model
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    images = model.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)
    lower = looking.annotator.precision != torch.float32

    @torch.inference_mode()
    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            model.encoder(images)

    measure(benchmark, ("encoder", looking.name, batch), work, batch, 2 * rounds)


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("words", SIZES)
def test_search(benchmark, annotations, words, beam, rounds):
    model, decoding = captioner(words), Decoding(BEAMS[beam], min_words=WORDS, max_words=WORDS)
    measure(
        benchmark, ("search", words, beam), lambda: model.caption_annotations(annotations, decoding), BATCH, 2 * rounds
    )


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
def test_search_as_is_usual(benchmark, annotations, words, beam, rounds):
    model = captioner(words)
    few = annotations._replace(values=annotations.values[:USUAL_IMAGES])
    measure(
        benchmark,
        ("usual", words, beam),
        lambda: search_as_is_usual(model, few, BEAMS[beam]),
        USUAL_IMAGES,
        rounds,
    )
    decoding = Decoding(BEAMS[beam], min_words=WORDS, max_words=WORDS, length_penalty=0.0)
    same = [captions[0].words for captions in model.caption_annotations(few, decoding)]
    usual = [model.vocabulary.decode(ids) for ids in search_as_is_usual(model, few, BEAMS[beam])]
    assert sum(a != b for a, b in zip(same, usual, strict=True)) <= 1  # but for rounding the same search


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("words", SIZES)
def test_files_to_captions(benchmark, looking, photographs, tmp_path, words, beam, rounds):
    model, decoding = captioner(words), Decoding(BEAMS[beam], min_words=WORDS, max_words=WORDS)
    model.encoder = looking.model.encoder  # which is compiled already
    annotator = Annotator(model, str(looking.annotator.precision).removeprefix("torch."))
    annotator([torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8)])  # from now on smaller batches take the plain way
    workers = min(4, os.cpu_count() or 1)

    def work():
        with open(tmp_path / "captions.jsonl", "w") as file:
            for batch in read_images(photographs, model.preprocessings, workers, BATCH):
                pixels = [torch.stack(squares) for squares in zip(*(squares for *_, squares in batch), strict=True)]
                captions = model.caption_annotations(annotator(pixels), decoding)
                for (_, path, _), (caption, *_) in zip(batch, captions, strict=True):
                    file.write(json.dumps({"image": str(path), "caption": caption.text}) + "\n")

    measure(benchmark, ("files", looking.name, words, beam), work, len(photographs), rounds)
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == len(photographs)


def test_the_table(photographs):
    """Not a test: what all of it comes to."""
    table = Table(title=f"{len(photographs)} photographs, {os.cpu_count()} cores, medians")
    for column in ("", *(f"V = {words:,}, {beam}" for words in SIZES for beam in BEAMS)):
        table.add_column(column, justify="right")
    each = [(words, beam) for words in SIZES for beam in BEAMS]
    for way in ("plain", "compiled"):
        fastest = min(seconds for name, seconds in medians.items() if name[:2] == ("encoder", way))
        table.add_row(f"bare encoder, {way}: images/s", *[f"{1 / fastest:.1f}"] * len(each))
        seconds = [medians["files", way, *one] for one in each]
        table.add_row(f"files to captions, {way}: images/s", *(f"{1 / one:.1f}" for one in seconds))
        table.add_row("share of the bare encoder", *(f"{fastest / one:.2f}" for one in seconds), end_section=True)
    search, usual = ([medians[way, *one] for one in each] for way in ("search", "usual"))
    table.add_row("search alone: ms/image", *(f"{1000 * one:.2f}" for one in search))
    table.add_row("as is usual: ms/image", *(f"{1000 * one:.2f}" for one in usual))
    table.add_row("times as fast", *(f"{b / a:.1f}" for a, b in zip(search, usual, strict=True)))
    Console(width=140).print(table)
