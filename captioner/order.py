"""The order of training: which images stand in a batch and what is drawn for them, from seed, epoch and position alone.

No loader and no worker holds a random state, so that a run can be taken up at any batch, with any number of workers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DistributedSampler


class Draw(NamedTuple):
    """What a batch is made of.

    Attributes
    ----------
    indices : list of int
        Places of its images among all.
    seeds : list of int
        From which follows what is drawn for each of them: whether it is mirrored, its part, its captions.
    """

    indices: list[int]
    seeds: list[int]


def mix(*parts: int | str) -> int:
    """Return a seed, below 2**63, that follows from all parts; seeds of different parts have nothing to do."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_generators(*parts: int | str) -> None:
    """Seed the generators of python, numpy and torch, those of GPUs in use too, with what follows from all parts."""
    seed = mix(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which takes ten times as long: for GPUs that are not in use it keeps where it was called.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


class Order(DistributedSampler[Draw]):  # so that Lightning hands it the epoch, and puts no sampler of its own over it
    """Gives the batches of an epoch, of this process: all images once, in an order drawn anew for each epoch.

    Where there are several processes, batches of the same position together are what one process with a batch as large
    as all of theirs would see. They get equally many images: up to one less than there are processes comes twice.

    Parameters
    ----------
    images : int
        N, of all.
    batch_size : int
        Of each process.
    seed : int
        Of the run.
    processes, rank : int
        How many there are, and which this is.
    epoch, position : int
        Where to begin: in this epoch so many batches are left out.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        processes: int = 1,
        rank: int = 0,
        epoch: int = 0,
        position: int = 0,
    ) -> None:
        super().__init__(range(images), processes, rank, seed=seed)  # type: ignore[arg-type]  # it wants the length only
        self.batch_size, self.epoch, self.position = batch_size, epoch, position

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; one that was begun elsewhere is gone on with where it was left."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch, those left out too."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        """Give the batches that are left of this epoch."""
        images = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(mix("order", self.seed, self.epoch))
        order = torch.randperm(images, generator=generator)
        seeds = torch.randint(2**62, (images,), generator=generator)
        whole = order.repeat(-(-self.total_size // images))[: self.total_size]
        own = whole[self.rank :: self.num_replicas]
        for position in range(self.position, len(self)):
            places = own[position * self.batch_size : (position + 1) * self.batch_size]
            yield Draw(places.tolist(), seeds[places].tolist())
