"""As a new user: a folder of images with a text file beside each, one command to train and one to caption."""

import json
from pathlib import Path

import pytest

from captioner.cli import main
from captioner.scenes import write_scenes

ROOT = Path(__file__).parents[1]
SMALL = ["--model.encoder", "SmallCNN", "--model.encoder.size", "32", "--model.encoder.width", "4"]
SMALL += ["--data.cache", "null", "--trainer.max_epochs", "8", "--trainer.accelerator", "cpu"]
SMALL += ["--trainer.precision", "32-true", "--trainer.check_val_every_n_epoch", "8"]


@pytest.fixture
def photos(tmp_path):
    """A folder of drawn scenes as people's folders are: sub-folders, and one image without its text."""
    write_scenes(tmp_path / "drawn", {"train": 40}, seed=1, side=32)
    listed = json.loads((tmp_path / "drawn" / "captions_train.json").read_text())
    folder = tmp_path / "photos"
    for image in listed["images"]:
        captions = [one["caption"] for one in listed["annotations"] if one["image_id"] == image["id"]]
        file = folder / str(image["id"] % 2) / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((tmp_path / "drawn" / "train" / image["file_name"]).read_bytes())
        file.with_suffix(".txt").write_text("\n".join(captions))
    (folder / "new.png").write_bytes(file.read_bytes())
    return folder


@pytest.mark.slow
def test_from_a_folder_of_images_to_captions(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    recipe = str(ROOT / "configs" / "own.yaml")
    assert main(["fit", "--config", recipe, "--data.files.root", "photos", *SMALL]) == 0
    said = capsys.readouterr().out
    checkpoint = said.partition("Checkpoint: ")[2].strip()
    assert main(["caption", "photos/new.png", "--checkpoint", checkpoint]) == 0
    name, caption = capsys.readouterr().out.strip("\n").split("\t")
    assert name == "photos/new.png" and caption
    assert "ImageFolder, folder `photos`" in Path(checkpoint).with_suffix(".md").read_text()
