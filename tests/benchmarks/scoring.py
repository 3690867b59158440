"""What scoring costs, from raw captions to BLEU, ROUGE-L and CIDEr-D, beside pycocoevalcap with its own Java.

python tests/benchmarks/scoring.py [--images N] [--rounds N] [--captions PATH]

Both score the same captions in turn, and the largest difference of any figure is printed: corpus or image. A reward is
what self-critical training asks for 32 images with 5 samples each, against references that were counted once.
"""

import argparse
import contextlib
import io
import os
import statistics
import time
from pathlib import Path
from random import Random

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from rich.console import Console
from rich.table import Table

from captioner.annotation_files import open_captions
from captioner.metrics import CIDErD, bleu, cider_d, ptb_tokenize, rouge_l

REWARDED, SAMPLES = 32, 5
STEPS = ("tokens", "BLEU", "ROUGE-L", "CIDEr-D", "all")


def make_captions(images, random):
    """Captions of some 11 words that a few hundred words make up, the frequent ones more often."""
    words = ["a", "the", "dog", "man's", "T-shirt", "isn't", *(f"word{number}" for number in range(2000))]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def caption():
        return " ".join(random.choices(words, weights, k=random.randint(5, 15))).capitalize() + " outside."

    return {image: [caption() for _ in range(5)] for image in range(images)}


def vary(caption, random):
    """A caption as a system might give it: some words of a reference changed, the end cut off."""
    words = caption.split()
    for _ in range(3):
        words[random.randrange(len(words))] = random.choice(["a", "dog", "the", "of"])
    return " ".join(words[: random.randint(4, 14)])


def timed(steps):
    """Run steps one after the other: their results, and the seconds of each and of all."""
    results, seconds = [], []
    for step in steps:
        begun = time.perf_counter()
        results.append(step(*results))
        seconds.append(time.perf_counter() - begun)
    return results, [*seconds, sum(seconds)]


def ours(references, hypotheses):
    return timed(
        [
            lambda: (
                {image: [ptb_tokenize(one) for one in captions] for image, captions in references.items()},
                {image: ptb_tokenize(caption) for image, caption in hypotheses.items()},
            ),
            lambda tokens: bleu(*tokens),
            lambda tokens, *_: rouge_l(*tokens),
            lambda tokens, *_: cider_d(*tokens),
        ]
    )


def theirs(references, hypotheses):
    tokenizer = PTBTokenizer()
    return timed(
        [
            lambda: (
                tokenizer.tokenize({image: [{"caption": one} for one in some] for image, some in references.items()}),
                tokenizer.tokenize({image: [{"caption": caption}] for image, caption in hypotheses.items()}),
            ),
            lambda tokens: Bleu(4).compute_score(*tokens, verbose=0),
            lambda tokens, *_: Rouge().compute_score(*tokens),
            lambda tokens, *_: Cider().compute_score(*tokens),
        ]
    )


def largest_difference(our_results, their_results):
    (_, our_bleu, our_rouge, our_cider), (_, (corpora, images), rouge, cider) = our_results, their_results
    pairs = [
        *zip(our_bleu.values(), zip(corpora, images, strict=True), strict=True),
        (our_rouge, rouge),
        (our_cider, cider),
    ]
    return max(
        max(abs(score.corpus - corpus), np.abs(score.per_image - np.array(per_image)).max())
        for score, (corpus, per_image) in pairs
    )


def milliseconds_of_rewards(tokens, random, rounds):
    references, hypotheses = tokens
    scorer = CIDErD(references)
    seconds = []
    for _ in range(rounds):
        images = [image for image in random.sample([*references], min(REWARDED, len(references)))] * SAMPLES
        samples = [hypotheses[random.choice([*hypotheses])] for _ in images]
        begun = time.perf_counter()
        scorer.rewards(images, samples)
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captions", type=Path, help="a dataset's folder or caption file; default: made-up captions")
    options = parser.parse_args()
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8"  # Java 17 and older decode by the computer's settings
    random = Random(0)
    if options.captions is None:
        references = make_captions(options.images, random)
    else:
        records = open_captions(options.captions).records()[: options.images]
        references = {record.image_id: list(record.captions) for record in records}
    hypotheses = {image: vary(random.choice(captions), random) for image, captions in references.items()}

    seconds = {"Captioner": [], "pycocoevalcap": []}
    for _ in range(options.rounds):
        our_results, found = ours(references, hypotheses)
        seconds["Captioner"].append(found)
        with contextlib.redirect_stdout(io.StringIO()):
            their_results, found = theirs(references, hypotheses)
        seconds["pycocoevalcap"].append(found)

    table = Table(title=f"Scoring {len(references):,} images in seconds, median of {options.rounds}")
    for column in ("", *STEPS):
        table.add_column(column, justify="right" if column else "left")
    medians = {name: np.median(rows, axis=0) for name, rows in seconds.items()}
    for name, row in medians.items():
        table.add_row(name, *(f"{value:.2f}" for value in row))
    table.add_row("ratio", *(f"{value:.2f}" for value in medians["Captioner"] / medians["pycocoevalcap"]))
    console = Console()
    console.print(table)
    console.print(f"Largest difference of any figure: {largest_difference(our_results, their_results):.1e}")
    rewards = milliseconds_of_rewards(our_results[0], random, 50)
    console.print(f"CIDEr-D rewards of {REWARDED * SAMPLES} hypotheses: {rewards:.1f} ms, median of 50")


if __name__ == "__main__":
    main()
