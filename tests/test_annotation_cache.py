"""The cache: the CNN sees each image once, and a cache that does not fit is never used."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from captioner.annotation_cache import AnnotationCache, fingerprint
from captioner.attention import Annotations
from captioner.errors import InputError
from captioner.images import Preprocessing

VALUES = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))


class Compute:
    """Gives the annotations in two batches and counts how often it is asked."""

    def __init__(self, values=VALUES, grid=(2, 2), mask=None):
        self.values, self.grid, self.mask, self.calls = values, grid, mask, 0

    def __call__(self):
        self.calls += 1
        for part in self.values.split(3):
            yield Annotations(part, self.mask, self.grid)


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message


def test_rows_are_what_was_computed_and_computed_once(tmp_path):
    compute = Compute()
    first = AnnotationCache.open(tmp_path, "a" * 64, 5, compute)
    again = AnnotationCache.open(tmp_path, "a" * 64, 5, compute)
    assert compute.calls == 1 and len(first) == len(again) == 5
    rows = again.rows([4, 0, 4])
    assert rows.values.dtype == torch.float32 and rows.grid == (2, 2) and rows.mask is None
    torch.testing.assert_close(rows.values, VALUES[[4, 0, 4]], atol=1e-3, rtol=1e-3)
    rows.values.zero_()  # the caller's own copy
    assert again.rows([4]).values.any()


def test_regions_without_a_grid(tmp_path):
    assert AnnotationCache.open(tmp_path, "a" * 64, 5, Compute(grid=None)).rows([0]).grid is None


DAMAGES = ["index missing", "index cut", "values missing", "another fingerprint", "fewer images"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_left_half_written_is_computed_again(damage, tmp_path):
    AnnotationCache.open(tmp_path, "a" * 64, 5, Compute(VALUES + 1))
    folder = tmp_path / ("a" * 16)
    index = folder / "index.json"
    (folder / "values.4242.tmp").write_bytes(b"half")
    if damage == "index missing":
        index.unlink()
    elif damage == "index cut":
        index.write_text(index.read_text()[:9])
    elif damage == "values missing":
        (folder / "values.npy").unlink()
    elif damage == "another fingerprint":  # of which the folder's name shows a part only
        index.write_text(json.dumps(json.loads(index.read_text()) | {"fingerprint": "a" * 63 + "b"}))
    else:
        index.write_text(json.dumps(json.loads(index.read_text()) | {"images": 4}))
    compute = Compute()
    cache = AnnotationCache.open(tmp_path, "a" * 64, 5, compute)
    assert compute.calls == 1
    torch.testing.assert_close(cache.rows([0]).values, VALUES[:1], atol=1e-3, rtol=1e-3)


def test_a_run_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path):
    def compute():
        yield Annotations(VALUES[:3], None, (2, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AnnotationCache.open(tmp_path, "a" * 64, 5, compute)
    assert not list((tmp_path / ("a" * 16)).iterdir())
    AnnotationCache.open(tmp_path, "a" * 64, 5, Compute())


@pytest.mark.parametrize("value", [1e5, -1e5, float("nan"), float("inf")])
def test_values_that_16_bits_cannot_hold_are_refused(value, tmp_path, recwarn):
    values = VALUES.clone()
    values[4, 1, 2] = value
    with pytest.raises(InputError, match="data.cache to null") as error:
        AnnotationCache.open(tmp_path, "a" * 64, 5, Compute(values))
    one_sentence(error)
    assert not list((tmp_path / ("a" * 16)).iterdir()) and not recwarn.list


def test_regions_that_differ_in_number_are_refused(tmp_path):
    with pytest.raises(InputError, match="number of regions") as error:
        AnnotationCache.open(tmp_path, "a" * 64, 5, Compute(mask=torch.ones(3, 4, dtype=torch.bool)))
    one_sentence(error)


# The fingerprint


def test_the_fingerprint_knows_images_weights_and_preprocessing(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(b"picture")
        os.utime(file, ns=(10**18, 10**18))
    settings = {"class": "SmallCNN", "preprocessing": {"size": 96}}
    tensors = [("w", torch.arange(4.0)), ("count", torch.tensor(3)), ("half", torch.ones(2, dtype=torch.bfloat16))]
    whole = fingerprint(settings, tensors, files)
    assert whole == fingerprint(dict(reversed(settings.items())), [(n, t.clone()) for n, t in tensors], list(files))

    others = [
        fingerprint(settings | {"preprocessing": {"size": 64}}, tensors, files),
        fingerprint(settings, [("w", torch.tensor([0.0, 1.0, 2.0, 3.0001])), *tensors[1:]], files),
        fingerprint(settings, [("v", torch.arange(4.0)), *tensors[1:]], files),
        fingerprint(settings, tensors, files[::-1]),
        fingerprint(settings, tensors, files[:1]),
    ]
    os.utime(files[1], ns=(10**18, 10**18 + 1))
    others.append(fingerprint(settings, tensors, files))
    files[1].write_bytes(b"another picture")
    os.utime(files[1], ns=(10**18, 10**18))
    others.append(fingerprint(settings, tensors, files))
    assert len({whole, *others}) == 1 + len(others)


# In training


class Counting(nn.Module):
    """A frozen encoder that counts the images it sees."""

    seen = 0
    preprocessing = Preprocessing("squash", 32)

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.map = nn.Conv2d(3, 12, 8, 8)

    def forward(self, x):
        type(self).seen += len(x)
        return self.map(x)


FOREIGN = ("--model.encoder", "captioner.encoders.ForeignEncoder", "--model.encoder.module", f"{__name__}.Counting")


def captions_of(cli):
    return cli.model._captions, cli.model.scores


def test_the_cnn_runs_once_per_image_and_not_at_all_in_the_second_run(fit, tmp_path):
    def images_seen(*flags):
        Counting.seen = 0
        cli = fit(*FOREIGN, "--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "5", *flags)
        assert not cli.model.captioner.encoder.learns
        return Counting.seen, captions_of(cli)

    blank = 1  # on which the annotations' size is measured
    cache = ("--data.cache", str(tmp_path))
    uncached, found = images_seen()
    assert uncached == blank + 10 * 22 + 2 * 9
    first, found_filling = images_seen(*cache)
    assert first == blank + 22 + 9
    second, found_cached = images_seen(*cache)
    assert second == blank
    assert found == found_filling == found_cached
    assert len({*found[0].values()}) > 1  # or the comparison would say little

    assert images_seen(*cache, "--model.encoder.grid", "2")[0] == blank + 22 + 9
    assert images_seen(*cache, "--trainer.max_epochs", "1", "--data.num_workers", "1")[0] == blank


def test_the_cache_holds_what_the_encoder_gives(fit, tmp_path):
    cli = fit(*FOREIGN, "--data.cache", str(tmp_path))
    data, captioner = cli.datamodule, cli.model.captioner.eval()
    for name in ("train", "val"):
        whole = torch.cat([captioner.annotate(images).values for images in data.images(name)])
        cached = data.caches[name].rows(range(len(whole)))
        assert np.allclose(cached.values, whole, atol=2e-3) and cached.grid == (4, 4)


def test_an_encoder_that_learns_cannot_be_cached(fit, tmp_path):
    with pytest.raises(InputError, match="data.cache to null") as error:
        fit("--data.cache", str(tmp_path))
    one_sentence(error)
