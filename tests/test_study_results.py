"""A study's figures against others of the same captions, computed apart; its files; its clock."""

import random
from dataclasses import replace

import numpy as np
import pytest

from captioner.errors import InputError
from captioner.metrics import bootstrap, paired_bootstrap, score_captions
from captioner.study import Row
from captioner.study_results import Result, milliseconds, score

WORDS = "a dog cat red ball runs sits on the grass near big small tree".split()
RECURRENT = {"class": "LSTMDecoder", "attention": {"class": "Additive", "dim": 4}, "hidden_dim": 8}
MODEL = {"class": "Captioner", "bridge": {"class": "LinearBridge", "dim": 8}, "decoder": RECURRENT}
RESULT = Result(
    settings={"model.decoder.init_args.gate": False},
    captions={1: "a dog", "2.jpg": "ein Hund, größer"},
    uniform_captions=None,
    entropy=None,
    minutes=1.5,
    epochs=3,
    best_epoch=2,
    parameters=1000,
    model=MODEL | {"embedding_dim": 8, "dropout": 0.0, "tie_weights": False},
    words=20,
    regions=4,
    annotation_dim=6,
    grid=(2, 2),
    beam_size=3,
    data="scenes, split val",
    encoder="SmallCNN, 32-true",
    command="captioner study --config study.yaml",
    made="2026-01-31",
)


def saying(generator, count=40):
    return {image: " ".join(generator.choices(WORDS, k=generator.randint(3, 8))) for image in range(count)}


@pytest.fixture(scope="module")
def references():
    generator = random.Random(1)
    sets = [saying(generator) for _ in range(3)]
    return {image: [one[image] for one in sets] for image in sets[0]}


@pytest.fixture(scope="module")
def results(references):
    """Two rows, of three seeds and of one, that say some of the references, in another order."""
    generator = random.Random(2)

    def some(share):
        said = saying(generator)
        right = {image: generator.choice(each) for image, each in references.items() if generator.random() < share}
        return dict(reversed((said | right).items()))

    three = [replace(RESULT, captions=some(0.6), uniform_captions=some(0.4), entropy=e) for e in (0.8, 0.9, 1.0)]
    rows = (Row("additive", "score function", (1, 2, 3), ()), Row("none", "baseline", (1,), ()))
    return {rows[0]: three, rows[1]: [replace(RESULT, captions=some(0.3))]}


# Figures


def test_one_seed_has_the_figures_of_score(results, references):
    first, other = results
    one = {first: results[first][:1], other: results[other]}
    lines = score(one, "additive", references)

    def scored(captions, name="CIDEr-D"):
        return score_captions(references, {image: captions[image] for image in references})[name]

    held, said = results[first][0], results[other][0]
    for line, result in zip(lines, (held, said), strict=True):
        cider_d, bleu_4 = scored(result.captions), scored(result.captions, "BLEU-4")
        assert line.cider_d == pytest.approx((cider_d.corpus, *bootstrap(cider_d)))
        assert line.bleu_4 == pytest.approx((bleu_4.corpus, *bootstrap(bleu_4)))
        assert line.each == [pytest.approx(cider_d.corpus)]
    assert lines[1].difference == pytest.approx(paired_bootstrap(scored(said.captions), scored(held.captions)))
    assert lines[0].cost == pytest.approx(paired_bootstrap(scored(held.captions), scored(held.uniform_captions)))
    assert lines[0].difference is None and lines[1].cost is None and lines[1].entropy is None


def test_of_several_seeds_the_mean_is_taken_within_each_draw(results, references):
    """From the scores of each image, one seed after the other, and draws made here."""
    lines = score(results, "additive", references, seed=7)
    first, other = results

    def per_image(captions):
        return score_captions(references, {image: captions[image] for image in references})["CIDEr-D"].per_image

    trained = np.mean([per_image(result.captions) for result in results[first]], axis=0)
    uniform = np.mean([per_image(result.uniform_captions) for result in results[first]], axis=0)
    worse = per_image(results[other][0].captions)
    generator = np.random.default_rng(7)
    draws = np.array([generator.integers(40, size=40) for _ in range(1000)])
    for found, values in (
        (lines[0].cider_d, trained),
        (lines[0].cost, trained - uniform),
        (lines[1].difference, worse - trained),
    ):
        means = values[draws].mean(1)
        assert found == pytest.approx((values.mean(), *np.percentile(means, [2.5, 97.5])))
    assert lines[0].each == [pytest.approx(per_image(result.captions).mean()) for result in results[first]]
    assert lines[0].entropy == pytest.approx(0.9)
    assert lines[1].difference.distinguishable


def test_without_the_reference_there_is_no_difference(results, references):
    _, other = results
    (line,) = score({other: results[other]}, "additive", references)
    assert line.difference is None and line.cider_d.low < line.cider_d.value < line.cider_d.high


def test_captions_of_other_images_are_said(results, references):
    first, _ = results
    missing = {image: caption for image, caption in results[first][0].captions.items() if image}
    with pytest.raises(InputError, match="39 images that are not the study's 40"):
        score({first: [replace(RESULT, captions=missing)]}, "additive", references)


# Files


def test_a_result_is_read_as_it_was_written(tmp_path):
    for result in (RESULT, replace(RESULT, uniform_captions={1: "", "2.jpg": "b"}, entropy=0.5, grid=None)):
        result.write(tmp_path / "result.json")
        assert Result.read(tmp_path / "result.json") == result
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"captions": 1, "uniform_captions": null, "grid": null}'])
def test_another_file_is_no_result(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match="no result of this release"):
        Result.read(tmp_path / "result.json")


# Time


def test_each_model_has_its_own_time(monkeypatch):
    transformer = {"class": "TransformerDecoder", "layers": 6, "heads": 2, "feed_forward_dim": 8, "max_words": 32}
    transformer |= {"positions": "sinusoidal", "norm_first": True, "dropout": 0.0}
    deep = replace(RESULT, model=RESULT.model | {"decoder": transformer}, grid=None)
    blind = replace(RESULT, model=RESULT.model | {"decoder": RECURRENT | {"attention": {"class": "NoAttention"}}})
    quick, slow, quickest = milliseconds([RESULT, deep, blind], rounds=5)
    assert 0 < quickest < slow and quick < slow
