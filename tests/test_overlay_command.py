"""`captioner overlay`: its help, its options, the files that it leaves, and what it says of a mistake."""

import re
import shlex

import pytest
import torch
from test_model import captioner, small_cnn, some_images

from captioner import overlay_command
from captioner.checkpoint import KEY, pack
from captioner.cli import _parser, main
from captioner.ensemble import Ensemble
from captioner.model import Captioner
from captioner.overlay_command import HELP, add_options, understand

OTHER = "GRU-Dot-before"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    torch.save({KEY: pack(captioner(encoder=small_cnn()).contents())}, path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(some_images(3)):
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def overlay(checkpoint, capsys):
    """Run the command; return its exit code and what it said."""

    def run(*args):
        code = main(["overlay", "--checkpoint", str(checkpoint), *map(str, args)])
        captured = capsys.readouterr()
        assert not captured.out and all(line.startswith("captioner: ") for line in captured.err.splitlines())
        return code, captured.err

    return run


def words_of(page):
    return re.findall(r"<span>(.*?)</span><small", page.read_text())


def test_the_help_fits_one_screen(capsys):
    assert main(["overlay", "--help"]) == 0 == main(["overlay", "photo.jpg", "-h"])
    assert capsys.readouterr().out == 2 * HELP
    lines = HELP.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 104


def test_the_examples_of_the_help_are_understood_and_its_options_exist(capsys):
    examples = [line for line in HELP.splitlines() if line.startswith("  captioner overlay")]
    assert len(examples) == 3
    for example in examples:
        parser = _parser("overlay", "", add_help=False)
        add_options(parser)
        options = understand(parser, shlex.split(example)[2:])
        assert options.checkpoint[0].name == "best.ckpt" and options.output.stem and len(options.paths) == 1
    assert main(["overlay", "--help", "all"]) == 0
    known = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", known, re.MULTILINE) for name in re.findall("^  (--[a-z-]+)", HELP, re.M))


def test_a_folder_becomes_a_page(overlay, photos, tmp_path):
    page = tmp_path / "page.html"
    assert overlay(photos, "--output", page, "--title", "My <photos>", "--view", "raw", "--shared-scale") == (0, "")
    text = page.read_text()
    assert text.count("<article") == 3 and "<h1>My &lt;photos&gt;</h1>" in text
    assert 'value="raw" checked' in text and 'value="shared" checked' in text
    assert sorted(tmp_path.iterdir()) == [page, photos]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "beginning"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF"), ("webp", b"RIFF")]
)
def test_an_image_becomes_a_figure(overlay, photos, tmp_path, form, beginning):
    figure = tmp_path / f"figure.{form}"
    assert overlay(photos / "0.png", "--output", figure, "--beam-size", "2", "--min-words", 2) == (0, "")
    assert figure.read_bytes().startswith(beginning) and sorted(tmp_path.iterdir()) == [figure, photos]


def test_a_pdf_has_a_page_for_each_image(overlay, photos, tmp_path):
    assert overlay(photos, "--output", tmp_path / "figure.pdf", "--max-words", 3) == (0, "")
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "figure.pdf").read_bytes())) == 3


def test_a_caption_of_ones_own_is_shown_and_what_is_unknown_is_said_once(overlay, photos, tmp_path):
    page = tmp_path / "page.html"
    code, said = overlay(photos, "--output", page, "--say", "A red Zebra on a ball.")
    assert code == 0 and said.count("\n") == 1 and "does not know 'zebra'" in said
    assert words_of(page) == 3 * ["a", "red", "zebra", "on", "a", "ball"]


def test_an_image_that_cannot_be_read_is_named_and_left_out(overlay, photos, tmp_path):
    (photos / "1.png").write_bytes(b"no image")
    page = tmp_path / "page.html"
    code, said = overlay(photos, "--output", page, "--say", "a red ball")
    assert code == 1 and "1.png is not an image" in said and "1 of 3 images could not be read." in said
    assert words_of(page) == 2 * ["a", "red", "ball"]


@pytest.mark.parametrize("form", ["html", "png", "pdf"])
def test_where_no_image_can_be_read_nothing_is_written(overlay, tmp_path, form):
    (tmp_path / "one.png").write_bytes(b"no image")
    code, said = overlay(tmp_path / "one.png", "--output", tmp_path / f"new.{form}")
    assert code == 2 and "nothing is written" in said and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--output", "page.html"], "There is no IMAGE"),
        (["photos", "--output", "page.txt"], "must end in one of .html, .png, .webp, .svg, .pdf"),
        (["photos", "--output", "page.png"], "3 images do not go into one PNG"),
        (["photos", "--output", "missing/page.html"], "missing is no folder"),
        (["photos/0.png", "--output", "photos/0.png"], "is one of the images"),
        (["photos", "--output", "page.html", "--say", "zebra"], "no word that the model knows"),
        (["photos", "--output", "page.html", "--say", "a dog", "--beam-size", "3"], "--beam-size is for captions"),
        (["photos", "--output", "page.html", "--beam-size", "0"], "--beam-size"),
        (["photos", "--output", "page.pdf", "--title", "x"], "--title is that of an HTML page"),
        (["photos", "--output", "page.html", "--view", "round"], "--view"),
        (["nowhere", "--output", "page.html"], "no file or folder nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(overlay, photos, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    before = (photos / "0.png").read_bytes()
    code, error = overlay(*args)
    assert code == 2 and said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [photos] and (photos / "0.png").read_bytes() == before


def test_a_decoder_without_attention_has_nothing_to_show(photos, tmp_path, capsys):
    path = tmp_path / "blind.ckpt"
    torch.save({KEY: pack(captioner("GRU-NoAttention-before", encoder=small_cnn()).contents())}, path)
    assert main(["overlay", str(photos), "--checkpoint", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert "carries no attention" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_an_interruption_leaves_nothing_half_written(overlay, photos, tmp_path, monkeypatch, checkpoint):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(overlay_command, "BATCH", 1)
    monkeypatch.setattr("captioner.images.read_image", stop)
    assert overlay(photos, "--output", tmp_path / "page.html")[0] == 130
    assert list(tmp_path.iterdir()) == [photos]


def test_several_checkpoints_caption_together(overlay, checkpoint, photos, tmp_path):
    other, page = tmp_path / "other.ckpt", tmp_path / "page.html"
    torch.save({KEY: pack(captioner(OTHER, encoder=small_cnn(), scale=6).contents())}, other)
    models = [Captioner.from_checkpoint(path) for path in (checkpoint, other)]
    said = []
    for model in (*models, Ensemble(models)):
        said.append([word for caption in model.caption(sorted(photos.iterdir())) for word in caption.words])
    assert overlay(other, photos, "--output", page)[0] == 0
    assert words_of(page) == said[2] and said[2] not in said[:2]
