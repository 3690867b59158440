"""The faster numbers are found by timing, whatever the machine."""

import time

import pytest
import torch

from captioner.precision import faster_precision


@pytest.mark.parametrize("slower", [torch.float32, torch.bfloat16])
def test_the_slower_one_is_not_taken(monkeypatch, slower):
    def forward(self, images):  # no convolution, which takes its time in an emulated precision
        if torch.is_autocast_enabled("cpu") == (slower == torch.bfloat16):
            time.sleep(0.05)
        return self.bias

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    assert faster_precision(torch.device("cpu")) == {torch.float32, torch.bfloat16}.difference([slower]).pop()


def test_it_may_be_asked_where_gradients_are_off():
    with torch.inference_mode():
        assert faster_precision(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_a_device_of_another_kind_gets_float32():
    assert faster_precision(torch.device("meta")) == torch.float32
