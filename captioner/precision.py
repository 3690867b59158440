"""Which numbers a machine multiplies faster."""

from __future__ import annotations

import time

import torch


def faster_precision(device: torch.device) -> torch.dtype:
    """Return the one of float32 and bfloat16 in which a device convolves faster, under autocast.

    Some processors are twice as fast in bfloat16, others ten times slower, and none says which; so a convolution is
    timed in both. That takes some milliseconds, or a second where bfloat16 is emulated. A GPU is asked.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    with torch.inference_mode(False), torch.enable_grad():  # wherever it is called from
        convolution = torch.nn.Conv2d(128, 128, 3, padding=1)
        images = torch.rand(32, 128, 8, 8).contiguous(memory_format=torch.channels_last)
        seconds: dict[torch.dtype, float] = {}
        for precision in (torch.float32, torch.bfloat16) * 3:  # the first round warms up, and the best of all counts
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                convolution(images).float().sum().backward()
            seconds[precision] = min(seconds.get(precision, float("inf")), time.perf_counter() - begun)
    return min(seconds, key=seconds.__getitem__)
