"""What tests share: a data set of drawn scenes, a recipe for it, and one run; a browser for the tests of pages.

None of them is on the network, see `offline/sitecustomize.py`.
"""

import os
import shutil
from pathlib import Path

import pytest
from refusals import REFUSED, take_refused

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: each of the test processes has a core, and threads that wait for each other only cost.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from captioner.scenes import write_scenes  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RECIPE = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 1
  default_root_dir: {runs}
  enable_model_summary: false
data:
  files:
    class_path: COCOCaptions
    init_args:
      root: {root}
      captions: captions_{{split}}.json
      images: "{{split}}"
      splits: [train, val, seen]
  test_split: seen
  batch_size: 8
  minimum_count: 1
model:
  encoder:
    class_path: SmallCNN
    init_args: {{size: 32, width: 4}}
  bridge:
    class_path: LinearBridge
    init_args: {{dim: 32}}
  decoder:
    class_path: LSTMDecoder
    init_args:
      hidden_dim: 32
      attention:
        class_path: Additive
        init_args: {{dim: 16}}
  embedding_dim: 32
  learning_rate: 2.0e-2
  beam_size: 3
pictures:
  images: 0
"""


def pytest_unconfigure():
    REFUSED.unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    os.environ["CAPTIONER_TESTS_SOCKETS"] = "none" if item.get_closest_marker("sockets") is None else "local"
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    try:
        return (yield)
    finally:
        assert not take_refused(), "a test opened a socket"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """22 scenes to train on, so that the last batch of 8 is a partial one, 9 to validate and 5 to test."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, {"train": 22, "val": 9, "seen": 5}, seed=1, side=32)
    return folder


@pytest.fixture(scope="session")
def recipe(scenes, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(root=scenes, runs=path.parent / "runs"))
    return path


@pytest.fixture(scope="session")
def fit(recipe, tmp_path_factory):
    """Train in-process by the recipe and flags; a run goes to a folder of its own."""
    from captioner.training import train

    def run(*flags, folder=None):
        folder = folder or tmp_path_factory.mktemp("run")
        return train(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(folder), *flags])

    return run


@pytest.fixture(scope="session")
def run(fit):
    """One run, long enough that captions differ from image to image."""
    return fit("--trainer.max_epochs", "24", "--trainer.check_val_every_n_epoch", "4")


@pytest.fixture(scope="session")
def best(run) -> Path:
    return Path(run.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="session")
def last(run) -> Path:
    return Path(run.trainer.checkpoint_callback.last_model_path)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
