"""Options of the benchmarks that pytest runs, and the table of what they have measured."""

import os

import pytest
from rich.console import Console
from rich.table import Table

MEDIANS = pytest.StashKey()  # seconds an image, by what was measured


def pytest_addoption(parser):
    parser.addoption("--images", type=int, default=200, help="photographs that are captioned")
    parser.addoption("--rounds", type=int, default=3, help="that medians are of")


def pytest_configure(config):
    config.stash[MEDIANS] = {}


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture
def measure(benchmark, request):
    def run(name, work, images, rounds):
        benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)
        seconds = benchmark.stats.stats.median / images
        request.config.stash[MEDIANS][name] = seconds
        benchmark.extra_info["images a second"] = round(1 / seconds, 1)

    return run


def pytest_terminal_summary(config):
    medians = config.stash[MEDIANS]
    each = [name[1:] for name in medians if name[0] == "search"]
    encoders = {name[1:]: seconds for name, seconds in medians.items() if name[0] == "encoder"}
    if not each or not encoders:
        return
    fastest = min(encoders.values())
    table = Table(title=f"{config.getoption('--images')} photographs, {os.cpu_count()} cores, medians")
    for column in ("", *(f"V = {words:,}, {beam}" for words, beam in each)):
        table.add_column(column, justify="right")

    def row(label, names, figure):
        table.add_row(label, *(figure(medians[name]) if name in medians else "" for name in names))

    for (way, batch), seconds in encoders.items():
        table.add_row(f"bare encoder, {way}, batches of {batch}: images/s", *[f"{1 / seconds:.1f}"] * len(each))
    table.add_section()
    for way in dict.fromkeys(way for way, _ in encoders):
        names = [("files", way, *one) for one in each]
        row(f"files to captions, {way}: images/s", names, lambda seconds: f"{1 / seconds:.1f}")
        row("share of the fastest bare encoder", names, lambda seconds: f"{fastest / seconds:.2f}")
    table.add_section()
    row("search alone: ms/image", [("search", *one) for one in each], lambda seconds: f"{1000 * seconds:.2f}")
    row("as is usual: ms/image", [("usual", *one) for one in each], lambda seconds: f"{1000 * seconds:.2f}")
    times = [
        f"{medians['usual', *one] / medians['search', *one]:.1f}" if ("usual", *one) in medians else "" for one in each
    ]
    table.add_row("times as fast", *times)
    Console(width=160).print(table)
