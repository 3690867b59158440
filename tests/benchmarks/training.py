"""How near the machine's limit a training step of the decoder is, and how far ahead of the usual way.

python tests/benchmarks/training.py [--images N] [--rounds N] [--precision bf16|32] [--captions PATH]

The floor is the time that the step's arithmetic takes at the speeds that this machine reaches by itself in the same
run: matrix products (forward and backward, of real words only) at that of a large product, tanh of the scores at that
of torch's tanh, and the scores' passes through memory at that of a copy. "As is usual" is the way of the known
implementations: keys computed anew at every step, the vocabulary product inside the loop, each caption with an image
of its own, padding and all.
"""

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from captioner.annotation_files import open_captions
from captioner.attention import Additive, Annotations
from captioner.bridges import LinearBridge
from captioner.decoders import LSTMDecoder
from captioner.encoders import ResNet, SmallCNN
from captioner.model import Captioner
from captioner.objectives import CrossEntropy
from captioner.tokens import tokenize
from captioner.vocabulary import BEGIN, END, PAD, SPECIAL, Vocabulary, pad

REGIONS, ANNOTATION_DIM, DIM, VOCABULARY, CAPTIONS = 49, 1024, 512, 2500, 5
IMAGES_OF_FLICKR8K = 6000
WARM_UP = 10
PASSES = 8  # of a score tensor through memory: written and read forward (sum, tanh) and backward (tanh, its two sums)


def median_seconds(work, rounds):
    work()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def speeds(dtype, rounds):
    """What the machine reaches: floating-point operations, tanh and bytes a second."""
    size = 2048
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    values = torch.randn(24, 5, REGIONS, DIM, dtype=dtype)
    result = torch.empty_like(values)
    large = torch.empty(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(large)
    return (
        2 * size**3 / median_seconds(lambda: a @ b, rounds),
        values.numel() / median_seconds(lambda: torch.tanh(values, out=result), rounds),
        2 * large.numel() / median_seconds(lambda: target.copy_(large), rounds),
    )


def floor_seconds(images, words, speed, bytes_of_value):
    """The step's arithmetic at the machine's speeds, for a number of real words in all captions."""
    products, tanhs, memory = speed
    once = images * REGIONS * (2 * ANNOTATION_DIM * DIM * (2 / 3) + 2 * DIM * DIM)  # no gradient enters the encoder
    each = 2 * DIM * DIM  # the query
    each += 2 * DIM * 4 * DIM * 3  # the LSTM's gates: word, context, state
    each += 2 * 2 * DIM * DIM  # the deep output layer: state and context
    each += 2 * DIM * VOCABULARY
    each += 2 * REGIONS * DIM * 2  # the scores' product with v, and the context
    scores = words * REGIONS * DIM
    return 3 * (once + words * each) / products + scores / tanhs + PASSES * scores * bytes_of_value / memory


def make_batches(path, images, count):
    random = Random(0)
    if path is None:  # lengths as Flickr8k's, 4 to 22 words, 12 in the mean
        captions = [
            [min(max(round(random.gauss(11.8, 3.7)), 4), 22) for _ in range(CAPTIONS)] for _ in range(images * count)
        ]
    else:
        records = open_captions(path).records("train" if path.is_dir() else None)
        random.shuffle(records)
        captions = [
            [min(len(tokenize(text)), 30) for text in one.captions[:CAPTIONS]] for one in records[: images * count]
        ]
    ids = [
        [[BEGIN, *random.choices(range(len(SPECIAL), VOCABULARY), k=length), END] for length in image]
        for image in captions
    ]
    return [pad(ids[first : first + images]) for first in range(0, images * count, images)]


class AsIsUsual(torch.nn.Module):
    """The way of the known implementations, with the same sizes."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, DIM)
        self.key = torch.nn.Linear(ANNOTATION_DIM, DIM)
        self.query = torch.nn.Linear(DIM, DIM)
        self.score = torch.nn.Linear(DIM, 1)
        self.beta = torch.nn.Linear(DIM, ANNOTATION_DIM)
        self.cell = torch.nn.LSTMCell(DIM + ANNOTATION_DIM, DIM)
        self.output = torch.nn.Linear(DIM, VOCABULARY)

    def forward(self, values, tokens):
        values = values.repeat_interleave(tokens.size(1), 0)
        tokens = tokens.flatten(0, 1)
        h = c = values.new_zeros(len(values), DIM)
        logits = []
        for t in range(tokens.size(1) - 1):
            met = torch.tanh(self.key(values) + self.query(h)[:, None])
            weights = self.score(met).squeeze(-1).softmax(1)
            context = torch.sigmoid(self.beta(h)) * (weights[..., None] * values).sum(1)
            h, c = self.cell(torch.cat((self.embedding(tokens[:, t]), context), 1), (h, c))
            logits.append(self.output(h))
        logits = torch.stack(logits, 1)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=PAD)


def trainer(model, loss_of, fused):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step(tokens):
        loss_of(tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoder_table(options, dtype, mixed):
    """Seconds of the floor, of our step and of the usual one; and the machine's speeds meanwhile."""
    vocabulary = Vocabulary([f"word{index}" for index in range(VOCABULARY - len(SPECIAL))])
    model = Captioner(
        SmallCNN(width=ANNOTATION_DIM // 4),
        vocabulary,
        bridge=partial(LinearBridge, dim=DIM),
        decoder=partial(LSTMDecoder, attention=partial(Additive, dim=DIM), hidden_dim=DIM),
        embedding_dim=DIM,
    )
    usual, objective = AsIsUsual(), CrossEntropy()
    values = torch.randn(options.images, REGIONS, ANNOTATION_DIM)

    def our_loss(tokens):
        with mixed():
            logits, weights, _ = model.score_words(Annotations(values), tokens, objective.needs_weights)
            return objective(logits, tokens[..., 1:], weights).total

    def usual_loss(tokens):
        with mixed():
            return usual(values, tokens)

    steps = {"Captioner": trainer(model, our_loss, fused=True), "as is usual": trainer(usual, usual_loss, fused=False)}
    # The first batches warm up: oneDNN makes a kernel for every number of rows that it meets.
    batches = make_batches(options.captions, options.images, WARM_UP + options.rounds)
    seconds, floors, machine = {name: [] for name in steps}, [], []
    for index, tokens in enumerate(batches):
        speed = speeds(dtype, 3)
        for name, step in steps.items():
            if name == "as is usual" and not WARM_UP - 1 <= index < WARM_UP + 3:
                continue  # slow, and one step differs little from the next
            begun = time.perf_counter()
            step(tokens)
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - begun)
        if index >= WARM_UP:
            machine.append(speed)
            words = int((tokens[..., 1:] != PAD).sum())
            floors.append(floor_seconds(options.images, words, speed, dtype.itemsize))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    floor = statistics.median(floors)
    table = Table(
        title=f"A training step of {options.images} images with {CAPTIONS} captions, {options.rounds} batches"
    )
    for column in ("", "seconds", "floor's share", "captions/s", "minutes an epoch of Flickr8k"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in {"floor": floor, **medians}.items():
        table.add_row(
            name,
            f"{found:.3f}",
            f"{floor / found:.2f}",
            f"{options.images * CAPTIONS / found:.0f}",
            f"{IMAGES_OF_FLICKR8K / options.images * found / 60:.1f}",
        )
    return table, [statistics.median(column) for column in zip(*machine, strict=True)]


def encoder_table(options, dtype, mixed, products):
    """Seconds of annotating and of fine-tuning, beside those of the products alone."""
    pixels = torch.randint(0, 256, (options.images, 3, 224, 224), dtype=torch.uint8)
    table = Table(title=f"ResNet-50, third stage, 224 pixels, {options.images} images")
    for column in ("", "seconds", "GFLOP", "floor's share", "images/s", "minutes for 6,000 images"):
        table.add_column(column, justify="right" if column else "left")

    def row(name, work, flops=None):
        if flops is None:
            with FlopCounterMode(display=False) as counter:
                work()
            flops = counter.get_total_flops()
        seconds = median_seconds(work, max(2, options.rounds // 3))
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{flops / 1e9:.0f}",
            f"{flops / products / seconds:.2f}",
            f"{options.images / seconds:.1f}",
            f"{IMAGES_OF_FLICKR8K / options.images * seconds / 60:.1f}",
        )
        return flops

    frozen = ResNet(stage=3, grid=7, learns=False)
    model = Captioner(frozen, Vocabulary(["word"]))
    normalised = frozen.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last)

    def bare():
        with torch.inference_mode(), mixed():
            frozen.body(normalised)

    def annotate():
        with torch.inference_mode(), mixed():
            model.annotate(pixels)

    flops = row("the bare CNN", bare)
    row("annotating, as the cache does", annotate, flops)
    for learns in ("layer3", True):
        tuned = Captioner(ResNet(stage=3, grid=7, learns=learns), Vocabulary(["word"])).train()

        def tune(model=tuned):
            with mixed():
                loss = model.annotate(pixels).values.float().mean()
            loss.backward()

        row("fine-tuning " + ("from layer3 on" if learns == "layer3" else "of all stages"), tune)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", choices=("bf16", "32"), default="bf16")
    parser.add_argument("--captions", type=Path, help="a dataset's folder or caption file, for its captions' lengths")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    mixed = partial(torch.autocast, "cpu", dtype) if options.precision == "bf16" else nullcontext
    torch.manual_seed(0)
    decoder, (products, tanhs, memory) = decoder_table(options, dtype, mixed)
    console = Console()
    console.print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {options.precision}, medians of the run: "
        f"{products / 1e9:.0f} GFLOP/s in products, {tanhs / 1e9:.2f} G tanh/s, {memory / 1e9:.1f} GB/s in copies"
    )
    console.print(decoder)
    console.print(encoder_table(options, dtype, mixed, products))


if __name__ == "__main__":
    main()
