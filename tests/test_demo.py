import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from captioner import demo
from captioner.cli import main
from captioner.model import Caption
from captioner.scenes import compose, describe


def told(description, scene, *, looks_right=True):
    """A caption as a perfect captioner would give it: each word looks at its own box, or into a far corner."""
    grid, cell = 8, scene.side / 8
    weights = torch.zeros(len(description.words), grid * grid)
    for word, boxes in enumerate(description.boxes):
        left, top, right, bottom = boxes[0] if boxes else (0, 0, 0, 0)
        x, y = (left + right) / 2, (top + bottom) / 2
        if not looks_right:
            x, y = scene.side - 1 - x, scene.side - 1 - y
        weights[word, int(y // cell) * grid + int(x // cell)] = 1
    return Caption(description.text, list(description.words), -1.0, -0.1, weights, (grid, grid), None)


@pytest.fixture(scope="module")
def scenes():
    generator = np.random.default_rng(5)
    composed = [compose(generator, unseen=False) for _ in range(20)]
    return composed, [describe(scene, generator) for scene in composed]


def test_true_captions_that_look_at_their_objects_reach_the_top(scenes):
    composed, descriptions = scenes
    captions = [told(each[0], scene) for each, scene in zip(descriptions, composed, strict=True)]
    references = [[description.text for description in each] for each in descriptions]
    scores = demo.score_scenes(captions, composed, references)
    assert scores.right == scores.pointing == 1.0
    assert scores.bleu4 == pytest.approx(1.0) and scores.cider_d > 1.5
    assert scores.right_shuffled < 0.2
    assert 0.02 < scores.pointing_uniform < 0.3


def test_looking_elsewhere_and_saying_other_things_is_seen(scenes):
    composed, descriptions = scenes
    references = [[description.text for description in each] for each in descriptions]
    away = [told(each[0], scene, looks_right=False) for each, scene in zip(descriptions, composed, strict=True)]
    assert demo.score_scenes(away, composed, references).pointing < 0.5
    others = [told(each[0], scene) for each, scene in zip(descriptions[2:] + descriptions[:2], composed, strict=True)]
    wrong = demo.score_scenes(others, composed, references)
    assert wrong.right < 0.2


def test_the_demo_runs_to_its_end_on_few_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SIZES", {"train": 40, "val": 6, "seen": 8, "unseen": 7})
    monkeypatch.setattr(demo, "OVERLAYS", 1)
    brief = tmp_path / "scenes.yaml"
    brief.write_text(demo.recipe("scenes.yaml").read_text() + "\nearly_stopping:\n  patience: 1\n")
    monkeypatch.setattr(demo, "recipe", lambda name: brief)
    output = tmp_path / "demo"
    assert main(["demo", "--output", str(output), "--seed", "3"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["seed"] == 3 and results["beam_size"] == 5 and results["seconds"] > 0
    for split, images in (("seen", 8), ("unseen", 7)):
        assert results[split]["images"] == images
        assert set(demo.SceneScores._fields) < set(results[split])
    assert len(list((output / "overlays").glob("*.png"))) == 2
    printed = capsys.readouterr().out
    checkpoint = next(line for line in printed.splitlines() if line.startswith("Checkpoint  ")).split()[-1]
    assert Path(checkpoint).is_file()


@pytest.mark.slow
def test_another_decoder_is_laid_over_the_recipe_and_without_attention_points_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SIZES", {"train": 40, "val": 6, "seen": 5, "unseen": 5})
    brief, blind = tmp_path / "brief.yaml", tmp_path / "blind.yaml"
    brief.write_text("trainer:\n  max_epochs: 2\n")
    blind.write_text("model:\n  decoder:\n    class_path: GRUDecoder\n    init_args:\n      attention: NoAttention\n")
    output = tmp_path / "demo"
    assert main(["demo", "--output", str(output), "--config", str(brief), "--config", str(blind)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["seen"]["pointing"] is None and results["seen"]["bleu4"] >= 0
    checkpoint = Path(capsys.readouterr().out.split("Checkpoint  ")[1].split()[0])
    decoder = demo.Captioner.from_checkpoint(checkpoint).decoder
    assert type(decoder).__name__ == "GRUDecoder" and decoder.hidden_dim == 192  # the recipe's own size is kept
    assert not list((output / "overlays").iterdir())


def test_a_configuration_that_is_not_there_is_one_sentence_and_nothing_is_drawn(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--config", str(tmp_path / "none.yaml")]) == 2
    assert "There is no file" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_demo_touches_no_folder_of_others(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_recipe_is_found_in_the_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    assert demo.recipe("scenes.yaml").is_file()
    installed = tmp_path / "captioner" / "configs"
    installed.mkdir(parents=True)
    shutil.copy(demo.recipe("scenes.yaml"), installed)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "captioner" / "demo.py"))
    assert demo.recipe("scenes.yaml") == installed / "scenes.yaml"


def test_korean_captions_are_judged_and_scored_as_korean():
    generator = np.random.default_rng(5)
    composed = [compose(generator, unseen=False) for _ in range(10)]
    descriptions = [describe(scene, generator, language="ko") for scene in composed]
    captions = [told(each[0], scene) for each, scene in zip(descriptions, composed, strict=True)]
    references = [[description.text for description in each] for each in descriptions]
    scores = demo.score_scenes(captions, composed, references, "ko")
    assert scores.right == scores.pointing == 1.0 and scores.bleu4 == pytest.approx(1.0)
    assert demo.score_scenes(captions, composed, references).right == 0
