"""Options of the benchmarks that pytest runs."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--images", type=int, default=200, help="photographs that are captioned")
    parser.addoption("--rounds", type=int, default=3, help="that medians are of")


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")
