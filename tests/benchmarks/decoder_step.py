"""What a step of a beam search costs, by decoder and by the number of words said before it.

python tests/benchmarks/decoder_step.py [--images N] [--beam-size N] [--rounds N]

A step is what the search does for one more word: the decoder, the output layer and its softmax, and the state's rows
taken in the order of their parents. Sizes are 512 (256 of the attention), the vocabulary that of Flickr8k.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from captioner.attention import Additive, Annotations
from captioner.bridges import LinearBridge
from captioner.decoders import GRUDecoder, LSTMDecoder, TransformerDecoder
from captioner.encoders import SmallCNN
from captioner.model import Captioner
from captioner.vocabulary import Vocabulary

WORDS_BEFORE = (1, 10, 20)
REGIONS, ANNOTATION_DIM, VOCABULARY = 49, 1024, 2538
DECODERS = {
    "LSTM": partial(LSTMDecoder, attention=partial(Additive, dim=256)),
    "GRU": partial(GRUDecoder, attention=partial(Additive, dim=256)),
    "Transformer, 3 layers": TransformerDecoder,
}


@torch.inference_mode()
def milliseconds(model, images, beam_size, rounds):
    """Time the steps of captions in the making: {words before: median milliseconds}."""
    memory = model.memory(Annotations(torch.randn(images, REGIONS, model.bridge.norm.normalized_shape[0])))
    words = torch.randint(4, VOCABULARY, (images * beam_size,))
    parents = torch.randperm(beam_size).repeat(images, 1) + torch.arange(images)[:, None] * beam_size
    seconds = {said: [] for said in WORDS_BEFORE}
    for _ in range(rounds):
        state = model.decoder.start(memory, beam_size)
        for said in range(max(WORDS_BEFORE) + 1):
            begun = time.perf_counter()
            _, state = model.step(words, memory, state)
            state = tuple(part.index_select(0, parents.flatten()) for part in state)
            if said in seconds:
                seconds[said].append(time.perf_counter() - begun)
    return {said: 1000 * statistics.median(times) for said, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    vocabulary = Vocabulary([f"word{index}" for index in range(VOCABULARY - 4)])
    table = Table(title=f"A step in ms, {options.images} images, beam {options.beam_size}, median of {options.rounds}")
    table.add_column("words said before")
    for said in WORDS_BEFORE:
        table.add_column(str(said), justify="right")
    for name, decoder in DECODERS.items():
        encoder = SmallCNN(width=ANNOTATION_DIM // 4)
        model = Captioner(encoder, vocabulary, bridge=LinearBridge, decoder=decoder).eval()
        found = milliseconds(model, options.images, options.beam_size, options.rounds)
        table.add_row(name, *(f"{found[said]:.2f}" for said in WORDS_BEFORE))
    Console().print(table)


if __name__ == "__main__":
    main()
