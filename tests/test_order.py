"""The order of training: every image once an epoch, and all of it from seed, epoch and position."""

import random

import numpy as np
import pytest
import torch

from captioner.order import Order, mix, seed_generators


def drawn(**settings):
    return [(draw.indices, draw.seeds) for draw in Order(**{"images": 23, "batch_size": 4, "seed": 7, **settings})]


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
    orders = [[place for indices, _ in drawn(epoch=epoch) for place in indices] for epoch in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != sorted(orders[0])
    assert drawn(seed=8) != drawn()
    assert [len(indices) for indices, _ in drawn()] == [4, 4, 4, 4, 4, 3] and len(Order(23, 4, 7)) == 6


def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch():
    def seeds(**settings):
        return {place: seed for indices, seeds in drawn(**settings) for place, seed in zip(indices, seeds, strict=True)}

    assert seeds() == seeds(batch_size=9) and len(set(seeds().values())) == 23
    assert not set(seeds().values()) & set(seeds(epoch=1).values())


@pytest.mark.parametrize("position", [0, 1, 5, 6])
def test_an_epoch_is_gone_on_with_and_the_next_one_is_whole(position):
    torch.manual_seed(3)
    assert drawn(epoch=2, position=position) == drawn(epoch=2)[position:]
    order = Order(23, 4, 7, epoch=2, position=position)
    order.set_epoch(2)  # as Lightning does, where it is there already
    assert len(list(order)) == 6 - position and len(order) == 6
    order.set_epoch(3)
    assert [(draw.indices, draw.seeds) for draw in order] == drawn(epoch=3)


@pytest.mark.parametrize("images", [24, 23, 1])
def test_processes_share_the_batches_of_one(images):
    one = drawn(images=images, batch_size=8)
    shares = [drawn(images=images, processes=2, rank=rank) for rank in (0, 1)]
    assert len({len(share) for share in shares}) == 1
    for (whole, _), *parts in zip(one, *shares, strict=True):
        together = [place for indices, _ in parts for place in indices]
        # Where they cannot be shared equally one comes twice.
        assert set(whole) <= set(together) and len(together) == len(whole) + len(whole) % 2


def test_generators_are_seeded_by_what_is_said():
    def draw(*parts):
        seed_generators(*parts)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    one, same, other = draw("step", 1, 2), draw("step", 1, 2), draw("step", 12)
    assert one == same and not set(one) & set(other)
    assert mix("a", 1) != mix("a", 2) and 0 <= mix("a", 1) < 2**63
