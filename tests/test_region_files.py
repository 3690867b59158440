"""Regions that were computed beforehand: read safely, trained on, cached, and the same whatever fills them up."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from variants import more_regions, same

from captioner.annotation_cache import AnnotationCache
from captioner.caption_formats import CaptionedImage
from captioner.cli import main
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.model import Captioner
from captioner.region_files import check_regions, count_regions, find_regions, pad_regions, read_regions
from captioner.training import train
from captioner.vocabulary import pad

D = 6
WORDS = ["dog", "cat", "bird", "horse"]
TINY = """\
trainer: {{accelerator: cpu, max_epochs: 30, check_val_every_n_epoch: 15, default_root_dir: {runs}}}
data:
  files: {{class_path: CaptionTable, init_args: {{root: {root}}}}}
  regions: {root}/regions
  batch_size: 8
  minimum_count: 1
model:
  encoder: {{class_path: PrecomputedRegions, init_args: {{dim: 6}}}}
  bridge: {{class_path: LinearBridge, init_args: {{dim: 16}}}}
  decoder:
    class_path: LSTMDecoder
    init_args: {{hidden_dim: 16, attention: {{class_path: Additive, init_args: {{dim: 8}}}}}}
  embedding_dim: 16
  learning_rate: 3.0e-2
  beam_size: 2
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images of which only the regions are there: one to five, of which one says what the caption says."""
    root = tmp_path_factory.mktemp("regions")
    (root / "regions").mkdir()
    generator = np.random.default_rng(1)
    rows = ["image,caption,split"]
    for number in range(36):
        word = number % len(WORDS)
        regions = generator.normal(0, 0.1, (1 + number % 5, D)).astype(np.float32 if number % 2 else np.float16)
        regions[generator.integers(len(regions)), word] = 3
        if number % 3:
            np.save(root / "regions" / f"{number}.npy", regions)
        else:
            np.savez_compressed(root / "regions" / f"{number}.npz", boxes=np.zeros((2, 4)), features=regions)
        split = "train" if number < 24 else "val" if number < 30 else "test"
        rows += [f"{number}.jpg,a {WORDS[word]} {verb},{split}" for verb in ("runs", "sits")]
    (root / "captions.csv").write_text("\n".join(rows))
    (root / "tiny.yaml").write_text(TINY.format(root=root, runs=root / "runs"))
    return root


@pytest.fixture(scope="module")
def run(dataset):
    return train(["fit", "--config", str(dataset / "tiny.yaml")])


@pytest.fixture(scope="module")
def best(run):
    return Path(run.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="module")
def model(best):
    return Captioner.from_checkpoint(best)


def paths(dataset):
    return [next((dataset / "regions").glob(f"{number}.np[yz]")) for number in range(36)]


def test_it_learns_and_the_test_scores_what_caption_gives(dataset, best, model):
    cli = train(["test", "--config", str(dataset / "tiny.yaml"), "--ckpt_path", str(best)])
    found = [caption.text for caption in model.caption(paths(dataset)[30:], beam_size=2)]
    assert list(cli.model.captions.values()) == found
    right = sum(caption.split()[1] == WORDS[number % 4] for number, caption in zip(range(30, 36), found, strict=True))
    assert right >= 5  # of 6; without the regions a quarter of them


@pytest.mark.slow
def test_with_a_cache_it_learns_the_same(dataset, run, tmp_path):
    flags = ["fit", "--config", str(dataset / "tiny.yaml"), "--data.cache", str(tmp_path / "cache")]
    flags += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path)]
    cli = train([*flags, "--trainer.check_val_every_n_epoch", "1"])
    cache = cli.datamodule.caches["train"]
    for rows in ([3], [0, 9, 4], [20, 1]):
        found, plain = cache.rows(rows), pad_regions([read_regions(paths(dataset)[row], D) for row in rows])
        assert torch.equal(found.mask, plain.mask) and found.values.shape == plain.values.shape
        assert torch.equal(found.values, plain.values.half().float())
    moved = cache.to(torch.device("cpu")).rows([0, 4])
    assert torch.equal(moved.values, cache.rows([0, 4]).values) and torch.equal(moved.mask, cache.rows([0, 4]).mask)
    # What is damaged is built anew, and what is there is found.
    counts = cache.folder / "counts.npy"
    before = counts.stat().st_mtime_ns
    train(flags)
    assert counts.stat().st_mtime_ns == before
    counts.write_bytes(counts.read_bytes()[:-4])
    train(flags)
    assert torch.equal(AnnotationCache(cache.folder).rows([0, 4]).mask, moved.mask)


def test_scores_do_not_depend_on_what_fills_regions_up(dataset, model):
    double = copy.deepcopy(model).double()
    regions = [read_regions(path, D) for path in paths(dataset)[:7]]
    captions = ["a dog runs", "a cat sits", "a bird runs"]
    words = [caption.split() for caption in captions]
    ids = pad([[double.vocabulary.encode(each, max_words=5) for each in words]] * len(regions))
    batch = double.annotate_regions(pad_regions(regions))
    with torch.no_grad():
        logits, weights, _ = double(batch, ids)
        filled, more, _ = double(more_regions(batch, 9), ids)  # with numbers that would show
        assert same(logits, filled) and same(weights, more[..., : weights.shape[-1]]) and not more[..., -9:].any()
        for row, alone in enumerate(regions):
            one, _, _ = double(double.annotate_regions(pad_regions([alone])), ids[row : row + 1])
            assert same(one, logits[row : row + 1])
    found = [[(each.text, each.log_probability) for each in image] for image in double.caption_annotations(batch)]
    again = [[(c.text, c.log_probability) for c in image] for image in double.caption_annotations(more_regions(batch))]
    for one, other in zip(found, again, strict=True):
        assert [text for text, _ in one] == [text for text, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=1e-12)


def test_captions_of_files_of_a_folder_of_arrays_and_by_an_ensemble(dataset, best, model, tmp_path, capsys):
    several = sorted(paths(dataset)[:5])
    expected = [caption.text for caption in model.caption(several)]
    arrays = [read_regions(path, D) for path in several]
    assert [caption.text for caption in model.caption([*arrays[:3], *map(torch.from_numpy, arrays[3:])])] == expected
    assert [caption.text for caption in Ensemble([model, model]).caption(several)] == expected
    assert model.attend(several[0], "a dog runs").attention.shape == (3, len(arrays[0]))
    (tmp_path / "files").mkdir()
    for path in several:
        (tmp_path / "files" / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "files" / "z.npy"
    np.save(bad, np.full((2, D), np.nan))
    results = tmp_path / "captions.jsonl"
    for given in ([tmp_path / "files"], [tmp_path / "files" / "*.np*"], [*several, bad]):
        args = ["caption", *map(str, given), "--checkpoint", str(best), "--output", str(results), "--overwrite"]
        assert main(args) == 1
        assert "z.npy holds values that are not finite" in capsys.readouterr().err
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        assert [line["caption"] for line in lines] == expected
    # Images beside which the regions lie are called so themselves.
    first = tmp_path / "files" / several[0].name
    Image.new("RGB", (4, 4)).save(first.with_suffix(".jpg"))
    assert main(["caption", str(first.with_suffix(".jpg")), "--checkpoint", str(best)]) == 0
    assert capsys.readouterr().out == f"{first.with_suffix('.jpg')}\t{expected[0]}\n"
    first.unlink()
    assert main(["caption", str(first.with_suffix(".jpg")), "--checkpoint", str(best)]) == 1
    assert "has no regions beside it" in capsys.readouterr().err
    assert main(["caption", str(several[1]), "--checkpoint", str(best), "--overlay", str(tmp_path / "o")]) == 2
    assert "--overlay draws on images" in capsys.readouterr().err


BAD = {
    "three axes": (np.zeros((2, 3, D)), "holds 2 x 3 x 6 and not N x 6 values"),
    "other size": (np.zeros((2, 5)), "holds 2 x 5 and not N x 6 values"),
    "no region": (np.zeros((0, D)), "holds 0 x 6 and not"),
    "one value": (np.float32(1), "holds a single value and not"),
    "whole numbers": (np.zeros((2, D), int), "holds values of the type int64"),
    "objects": (np.array([{"a": 1}], object), r"is no \.npy or \.npz file that can be read"),
    "not finite": (np.array([[1.0] * D, [1.0] * 5 + [np.inf]]), "not finite, in region 1 first"),
    "too large": (np.full((1, D), 1e300), "not finite"),
}


@pytest.mark.parametrize(("array", "message"), BAD.values(), ids=BAD)
def test_bad_regions_are_refused_by_name(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as raised:
        read_regions(tmp_path / "a.npy", D)
    assert str(raised.value).startswith(str(tmp_path / "a.npy")) and "\n" not in str(raised.value)
    if array.dtype != object:
        with pytest.raises(InputError, match="^Image 3 holds"):
            check_regions(array, D, "Image 3")


def test_damaged_files_and_missing_ones_are_told(tmp_path):
    file, packed = tmp_path / "a.npy", tmp_path / "b.npz"
    np.save(file, np.ones((3, D), np.float32))
    np.savez(packed, one=np.ones((3, D)), two=np.ones((3, D)))
    assert count_regions(file, D) == 3
    for read in (lambda path: count_regions(path, D), lambda path: read_regions(path, D)):
        with pytest.raises(InputError, match=r"holds 2 arrays \(one, two\): save one, or call the regions 'features'"):
            read(packed)
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path / "c.npy")
    np.savez(packed, ones=np.ones((4, D)))
    assert count_regions(packed, D) == 4 == len(read_regions(packed, D))
    for path in (file, packed):
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(InputError, match=f"{path.name} is no .npy or .npz file"):
            read_regions(path, D)
    records = [CaptionedImage(9, tmp_path / "0009.jpg", ()), CaptionedImage("sub/c.jpg", tmp_path / "sub/c.jpg", ())]
    with pytest.raises(InputError, match=r"2 of 2 images have no regions in .*, the first is 9: put 0009\.npy or 0009"):
        find_regions(tmp_path, records)
    (tmp_path / "sub").mkdir()
    for name in ("9.npy", "sub/c.npz"):
        (tmp_path / name).touch()
    assert [record.path for record in find_regions(tmp_path, records)] == [tmp_path / "9.npy", tmp_path / "sub/c.npz"]
    with pytest.raises(InputError, match=r"data\.regions does not exist"):
        find_regions(tmp_path / "nowhere", records)


@pytest.fixture
def spoilt(dataset, tmp_path):
    """A copy of the dataset in which training images 4 and 9 have no regions that can be used."""
    root = tmp_path / "spoilt"
    shutil.copytree(dataset / "regions", root / "regions")
    shutil.copy(dataset / "captions.csv", root)
    (root / "tiny.yaml").write_text(TINY.format(root=root, runs=root / "runs"))
    np.save(root / "regions" / "4.npy", np.zeros((0, D), np.float32))  # in which a detector found nothing
    (root / "regions" / "9.npz").write_bytes((root / "regions" / "9.npz").read_bytes()[:-50])
    return root


@pytest.mark.parametrize("flags", [[], ["--data.cache", "cache"], ["--data.num_workers", "1"]])
def test_damaged_regions_of_training_images_are_named_counted_and_left_out(flags, spoilt, capsys, monkeypatch):
    monkeypatch.chdir(spoilt)
    brief = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1", *flags]
    cli = train([*brief, "--data.max_damaged", "0.1"])
    assert sorted(cli.datamodule.damaged) == [4, 9]
    said = capsys.readouterr().out
    assert said.count("Left out, ") == 2 and "2 of 24 training images so far" in said
    assert "4.npy holds 0 x 6 and not N x 6 values" in said and "9.npz is no .npy or .npz file" in said
    with pytest.raises(InputError, match=r"2 of 24 training images .* data.max_damaged 0.05 allows: .*4\.npy.*9\.npz"):
        train([*brief, "--data.max_damaged", "0.05"])


def test_scores_are_never_over_fewer_regions(spoilt, best):
    np.save(spoilt / "regions" / "31.npy", np.full((2, D), np.nan, np.float32))
    with pytest.raises(InputError, match=r"31\.npy holds values that are not finite"):
        train(["test", "--config", str(spoilt / "tiny.yaml"), "--ckpt_path", str(best), "--data.max_damaged", "0.5"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.regions", "null"], "data.regions and the encoder PrecomputedRegions belong together"),
        (["--model.encoder", "SmallCNN"], "data.regions and the encoder PrecomputedRegions belong together"),
        (["--data.flip", "true"], "data.regions are read as they are"),
        (["--model.encoder.dim", "7"], "and not N x 7 values"),
    ],
)
def test_settings_that_do_not_fit_are_told(flags, message, dataset, tmp_path):
    if "null" in flags:
        for number in range(36):
            Image.new("RGB", (4, 4)).save(dataset / f"{number}.jpg")
    with pytest.raises(InputError, match=message):
        train(["fit", "--config", str(dataset / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path), *flags])
