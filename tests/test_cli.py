"""The command line of `caption` and `faithfulness`: what it prints and writes, and what it says of a mistake."""

import json

import pytest
from PIL import Image

import captioner
from captioner import study_runs
from captioner.caption_command import picture_names
from captioner.cli import HELP, main
from captioner.demo import recipe as recipe_of
from captioner.errors import Interrupted
from captioner.images import find_images
from captioner.model import Captioner


def one_line(capsys):
    stderr = capsys.readouterr().err
    assert stderr.startswith("captioner: ") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


@pytest.fixture(scope="module")
def images(scenes):
    return find_images([scenes / "val"])


@pytest.fixture(scope="module")
def captions(best, images):
    return Captioner.from_checkpoint(best).caption(images)


# Which command


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help(args, capsys):
    assert main(args) == 0 and capsys.readouterr().out == HELP


def test_version(capsys, monkeypatch):
    monkeypatch.setitem(vars(captioner), "__version__", "1.2.3")
    assert main(["--version"]) == 0 and capsys.readouterr().out == "captioner 1.2.3\n"


def test_an_unknown_command_names_the_known_ones(capsys):
    assert main(["capton"]) == 2 and "choose from fit, validate, test, caption" in one_line(capsys)


@pytest.mark.parametrize("command", ["demo", "faithfulness", "study"])
def test_a_commands_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"usage: captioner {command}" in capsys.readouterr().out


def test_interrupting_is_no_traceback(monkeypatch, capsys, images, best):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Captioner, "annotate", interrupt)
    assert main(["caption", str(images[0]), "--checkpoint", str(best)]) == 130
    assert one_line(capsys) == "captioner: interrupted.\n"


def test_a_study_that_a_signal_stops_says_how_the_study_goes_on(monkeypatch, capsys):
    def stopped(*_):
        raise Interrupted("Stopped by SIGTERM after step 3.", 143)

    monkeypatch.setattr(study_runs, "make", stopped)
    monkeypatch.setattr(study_runs, "plan", lambda *_: [])
    command = ["study", "--config", str(recipe_of("study.yaml"))]
    assert main(command) == 143
    assert one_line(capsys) == f"captioner: The study is stopped: to go on, captioner {' '.join(command)}\n"


# Captions


def test_a_folder_is_captioned(scenes, images, captions, best, capsys):
    assert main(["caption", str(scenes / "val"), "--checkpoint", str(best)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{path}\t{caption.text}\n" for path, caption in zip(images, captions, strict=True))
    assert captured.err == "" and len({caption.text for caption in captions}) > 1


def test_beam_size_is_passed_on(images, best, capsys):
    assert main(["caption", str(images[0]), "--checkpoint", str(best), "--beam-size", "1"]) == 0
    greedy = Captioner.from_checkpoint(best).caption(images[0], beam_size=1)[0].text
    assert capsys.readouterr().out == f"{images[0]}\t{greedy}\n"


def test_output_and_overlays(images, captions, best, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    same_name = tmp_path / "other" / images[0].name
    same_name.write_bytes(images[1].read_bytes())
    out, overlays = tmp_path / "captions.jsonl", tmp_path / "new" / "overlays"
    flags = ["--checkpoint", str(best), "--output", str(out), "--overlay", str(overlays), "--precision", "float32"]
    assert main(["caption", str(images[0]), str(images[1]), str(same_name), *flags]) == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(images[0]), str(images[1]), str(same_name)]
    assert [line["caption"] for line in lines] == [captions[0].text, captions[1].text, captions[1].text]
    assert lines[0]["log_probability"] == pytest.approx(captions[0].log_probability, abs=1e-3)
    pictures = picture_names([images[0], images[1], same_name])
    assert {path.name for path in overlays.iterdir()} == set(pictures.values()) and len(pictures) == 3
    assert all(Image.open(path).width > 32 for path in overlays.iterdir())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"captions.jsonl", "captions.jsonl.journal", "new", "other"}  # nothing unfinished


def test_a_bad_image_is_named_and_the_rest_captioned(images, captions, best, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    assert main(["caption", str(images[0]), str(bad), str(images[1]), "--checkpoint", str(best)]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{images[0]}\t{captions[0].text}\n{images[1]}\t{captions[1].text}\n"
    first, last = captured.err.splitlines()
    assert first.startswith(f"captioner: {bad} is not an image") and last.endswith("1 of 3 images could not be read.")


def test_bad_images_alone(best, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("no picture")
    assert main(["caption", str(tmp_path), "--checkpoint", str(best), "--output", str(tmp_path / "out.jsonl")]) == 1
    assert "1 of 1 images" in capsys.readouterr().err and (tmp_path / "out.jsonl").read_text() == ""


# Mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["missing.jpg"], "no file or folder missing.jpg"),
        (["{empty}"], "holds no image"),
        (["{image}", "--nope"], "--nope"),
        (["{image}", "--beam-size", "0"], "give 1 or more"),
        (["{image}", "--beam-size", "two"], "--beam-size"),
        (["{image}", "--output", "{empty}/no/such/out.jsonl"], "out.jsonl cannot be written"),
        (["{image}", "--output", "{empty}"], "is a folder"),
        (["{image}", "--overlay", "{image}"], "cannot be made"),
        (["{image}", "--checkpoint", "missing.ckpt"], "no checkpoint missing.ckpt"),
        (["{image}", "--checkpoint", "{image}"], "not a checkpoint"),
        (["{image}", "--device", "abacus"], "abacus"),
        (["{image}", "--encoder", "torch.nn:Identity"], "brings its own encoder"),
        ([], "PATH"),
    ],
)
def test_a_mistake_is_one_line(args, said, images, best, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    args = [arg.format(image=images[0], empty=tmp_path / "empty") for arg in args]
    assert main(["caption", "--checkpoint", str(best), *args]) == 2
    assert said in one_line(capsys)


def test_an_earlier_output_survives_a_mistake(images, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("earlier")
    assert main(["caption", str(images[0]), "--checkpoint", "missing.ckpt", "--output", str(out)]) == 2
    assert out.read_text() == "earlier"


# Faithfulness


@pytest.fixture
def flickr(scenes, tmp_path):
    """The scenes to validate on in Flickr8k's form, which the command reads by default."""
    captions = json.loads((scenes / "captions_val.json").read_text())
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    (tmp_path / "Images").symlink_to(scenes / "val")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("\n".join(names.values()))
    lines = [f"{names[each['image_id']]}#{each['id']}\t{each['caption']}\n" for each in captions["annotations"]]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    return tmp_path


def test_faithfulness_reports_and_writes(flickr, best, tmp_path, capsys):
    flags = ["--checkpoint", str(best), "--root", str(flickr), "--beam-size", "2", "--images", "6"]
    assert main(["faithfulness", *flags, "--json", str(tmp_path / "found.json")]) == 0
    captured = capsys.readouterr()
    assert "permuted" in captured.out and "uniform" in captured.out
    assert "dev, 6 images, " in captured.out and "beam 2, seed 0" in captured.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 6 and found["content_words"] > 0 and 0 <= found["hiding"] <= 1


def test_faithfulness_names_the_splits(flickr, best, capsys):
    assert main(["faithfulness", "--checkpoint", str(best), "--root", str(flickr), "--split", "all"]) == 2
    assert "choose from train, dev, test" in one_line(capsys)
