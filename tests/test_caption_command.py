"""`captioner caption`: its help, its options, the files that it leaves, and that it goes on where it was stopped."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import time
from dataclasses import fields

import pytest
from PIL import Image
from pycocotools.coco import COCO

from captioner import caption_command, fast_captioner
from captioner.annotation_files import ImageFolder
from captioner.caption_command import DECODING, HELP, add_options, picture_names, understand
from captioner.cli import _parser, main
from captioner.decoding import Decoding
from captioner.images import find_images
from captioner.model import Captioner
from captioner.results import read_results
from captioner.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def images(scenes):
    return find_images([scenes / "val"])


@pytest.fixture(scope="module")
def captions(best, images):
    return [caption.text for caption in Captioner.from_checkpoint(best).caption(images)]


@pytest.fixture
def folder(images, tmp_path):
    """Copies of the 9 images, called as COCO calls its own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images, 1):
        (folder / f"COCO_val2014_{number:012d}.png").write_bytes(image.read_bytes())
    return folder


@pytest.fixture
def caption(best, capsys, monkeypatch):
    """Run the command in the precision of `captions`; return its exit code, what it printed, and what it said."""
    monkeypatch.setattr(caption_command, "_faster_precision", lambda device: "float32")

    def run(*args):
        code = main(["caption", "--workers", "0", "--checkpoint", str(best), *map(str, args)])
        captured = capsys.readouterr()
        assert all(line.startswith("captioner: ") for line in captured.err.splitlines())
        return code, captured.out, captured.err

    return run


def parse(*args):
    parser = _parser("caption", "", add_help=False)
    add_options(parser)
    return understand(parser, list(args))


# Help


def test_the_help_fits_one_screen(capsys):
    assert main(["caption", "--help"]) == 0 == main(["caption", "photo.jpg", "-h"])
    assert capsys.readouterr().out == 2 * HELP
    lines = HELP.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 100


def test_the_examples_of_the_help_are_understood_and_its_options_exist(capsys):
    examples = [line for line in HELP.splitlines() if line.startswith("  captioner caption")]
    assert len(examples) == 3
    for example in examples:
        assert parse(*shlex.split(example)[2:]).checkpoint[0].name == "best.ckpt"
    assert main(["caption", "--help", "all"]) == 0
    known = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", known, re.MULTILINE) for name in re.findall("^  (--[a-z-]+)", HELP, re.M))


def test_every_setting_of_decoding_has_a_flag_that_tells_its_default():
    assert [flag.field for flag in DECODING] == [field.name for field in fields(Decoding)]
    for flag in DECODING:
        default = re.search(r"\(default ([\d.]+)", flag.help)
        value = Vocabulary.longest if flag.field == "max_words" else getattr(Decoding(), flag.field)
        assert (default and flag.type(default[1])) == (value or (0 if flag.type is int else None)), flag


def test_every_flag_of_decoding_reaches_it(monkeypatch, images, best):
    given = {flag.field: ["9"] if flag.type is not bool else [] for flag in DECODING} | {"ban": ["a, b", "--ban", "c"]}
    words = [word for flag in DECODING for word in (flag.name, *given[flag.field])]
    seen = {}

    def stop(*_, **settings):
        seen.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("captioner.decoding.Decoding", stop)
    main(["caption", str(images[0]), "--checkpoint", str(best), *words])
    wanted = {flag.field: flag.type("9") for flag in DECODING} | {"ban": ["a", "b", "c"], "sample": True}
    assert seen == wanted and {type(value) for value in seen.values()} == {int, float, str, bool, list}


@pytest.mark.parametrize(
    ("words", "paths", "checkpoints"),
    [
        ("--checkpoint x.ckpt a.jpg holiday --sidecar", ["a.jpg", "holiday"], ["x.ckpt"]),
        ("--checkpoint x.ckpt y.ckpt --checkpoint z.ckpt - --sidecar .caption", ["-"], ["x.ckpt", "y.ckpt", "z.ckpt"]),
        ("a.jpg --checkpoint x.ckpt --beam-size 3 b.jpg --sidecar c.jpg", ["a.jpg", "b.jpg", "c.jpg"], ["x.ckpt"]),
        ("--checkpoint x --sidecar -- a.jpg", ["a.jpg"], ["x"]),
        ("b.jpg --sidecar --checkpoint x -- -odd.jpg --all", ["b.jpg", "-odd.jpg", "--all"], ["x"]),
        ("--sidecar --checkpoint x --ban a,man holiday", ["holiday"], ["x"]),
    ],
)
def test_paths_may_stand_anywhere(words, paths, checkpoints):
    options = parse(*words.split())
    assert options.paths == paths and [str(path) for path in options.checkpoint] == checkpoints
    assert options.sidecar == (".caption" if ".caption" in words else ".txt")


def test_a_folder_is_no_checkpoint(tmp_path):
    assert parse("--checkpoint", "x", str(tmp_path)).paths == [str(tmp_path)]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prefix", "sks"], "give --sidecar, too"),
        (["--format", "csv"], "give --output FILE, too"),
        (["--begin-with", "a red box", "--max-words", "2"], "--begin-with 'a red box' is longer than --max-words 2"),
        (["--top-k", "3"], "--top-k has no effect without --sample: set --sample, too"),
        (["--overlay", "{folder}"], ".png: give a folder of its own"),
        (["--begin-with", "a sample of ban", "--max-words", "2"], "--begin-with 'a sample of ban' is longer"),
        (["--diversity", "1"], "--diversity has no effect without --groups: set --groups, too"),
        (["--output", "captions.txt"], "is not known from its name"),
        (["--output", "out", "--format", "xml"], "--format"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--workers", "-1"], "--workers is -1"),
        (["--sidecar", ".png"], "is what images are called"),
        (["--sidecar", ".JPG", "--overwrite"], "is what images are called"),
        (["--output", "{folder}/sub.json", "--captions", "2"], "one caption of each image, and not 2"),
        (["--output", "{folder}/../elsewhere/metadata.jsonl"], "outside its own folder"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(args, said, folder, caption, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (folder / "sub.png").write_bytes(next(folder.iterdir()).read_bytes())
    (folder / "sub.jpg").write_bytes((folder / "sub.png").read_bytes())
    monkeypatch.setattr(Captioner, "from_checkpoint", None)  # so much is seen before the model is opened
    before = sorted(tmp_path.rglob("*"))
    code, printed, line = caption(folder, *[arg.format(folder=folder) for arg in args])
    assert code == 2 and printed == "" and said in line and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# Files


def test_coco_results_are_those_of_pycocotools_and_of_the_scores(folder, caption, captions, tmp_path):
    out = tmp_path / "out.json"
    assert caption(folder, "--output", out) == (0, "", "")
    references = {
        "images": [{"id": number, "file_name": f"COCO_val2014_{number:012d}.png"} for number in range(1, 10)],
        "annotations": [{"id": number, "image_id": number, "caption": "a square"} for number in range(1, 10)],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(tmp_path / "references.json")).loadRes(str(out))
    assert [loaded.imgToAnns[number][0]["caption"] for number in range(1, 10)] == captions
    assert main(["score", str(tmp_path / "references.json"), str(out)]) == 0


def test_csv_and_json_lines_hold_the_same(folder, caption, captions, tmp_path):
    for name in ("out.csv", "out.jsonl"):
        assert caption(folder, "--output", tmp_path / name, "--captions", 2)[0] == 0
        results = read_results(tmp_path / name)
        assert [(result.image, result.caption) for result in results] == [
            (str(image), text) for image, text in zip(sorted(folder.iterdir()), captions, strict=True)
        ]
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    for row, line in zip(rows, (tmp_path / "out.jsonl").read_text().splitlines(), strict=True):
        first, second = json.loads(line)["captions"]
        assert (first["caption"], second["caption"]) == (row["caption"], row["caption_2"]) and first != second


def test_several_captions_are_several_lines(images, caption, captions):
    _, printed, _ = caption(images[0], "--captions", 2)
    first, second = printed.splitlines()
    assert first == f"{images[0]}\t{captions[0]}" and second.startswith(f"{images[0]}\t") and first != second


def test_a_name_does_not_break_a_line(images, caption, captions, tmp_path):
    odd = tmp_path / "a\tb\n\x1b[31m.png"
    odd.write_bytes(images[0].read_bytes())
    (tmp_path / "b\n.png").write_text("no image")
    code, printed, said = caption(tmp_path)
    assert code == 1 and printed == f"{tmp_path}/a\\tb\\n\\x1b[31m.png\t{captions[0]}\n"
    assert [line.partition("b\\n.png")[1] for line in said.splitlines()] == ["b\\n.png", ""]


def test_metadata_and_failures(folder, caption, captions):
    (folder / "bad.png").write_text("no image")
    out = folder / "metadata.jsonl"
    code, _, said = caption(folder, "--output", out)
    assert code == 1 and said.splitlines()[-1] == (
        f"captioner: 1 of 10 images could not be read; {out}.failures.txt lists them."
    )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["text"] for record in records] == captions
    assert all((folder / record["file_name"]).is_file() for record in records)
    assert (folder / "metadata.jsonl.failures.txt").read_text().startswith(f"{folder / 'bad.png'}\t")
    before = out.read_bytes()
    code, _, said = caption(folder, "--output", out)
    assert code == 1 and "9 of 10 images are done already; --overwrite" in said and "1 of 10 images could not" in said
    assert out.read_bytes() == before
    Image.new("RGB", (40, 40)).save(folder / "bad.png")
    assert caption(folder, "--output", out)[0] == 0 and out.read_bytes().startswith(before[:100])
    assert len(out.read_text().splitlines()) == 10 and not (folder / "metadata.jsonl.failures.txt").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_training_reads_back_what_is_written_beside_the_images(number, folder, caption, captions):
    for flags, reader in (
        (["--output", folder / "metadata.jsonl"], ImageFolder(folder.parent, splits=("photos",))),
        (["--sidecar"], ImageFolder(folder.parent, captions=".txt", splits=("photos",))),
    ):
        assert caption(folder, *flags, "--captions", number) == (0, "", "")
        records = reader.read("photos")
        assert [record.path for record in records] == sorted(folder.glob("*.png"))
        assert [record.captions[0] for record in records] == captions
        assert {len(record.captions) for record in records} == {number}


def test_sidecars_are_written_once(folder, caption, captions, monkeypatch):
    first, second, *_, last = sorted(folder.iterdir())
    first.with_suffix(".txt").write_text("mine")
    assert caption(folder, "--sidecar") == (
        0,
        "",
        "captioner: 1 of 9 images is done already; --overwrite captions them anew.\n",
    )
    texts = sorted(folder.glob("*.txt"))
    assert [text.read_text() for text in texts] == ["mine", *(f"{text}\n" for text in captions[1:])]
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "from_checkpoint", None)  # with nothing to do there is nothing to open
        assert caption(folder, "--sidecar")[0] == 0
    assert caption(folder, "--sidecar", "--overwrite", "--prefix", "sks, ", "--suffix", "!")[0] == 0
    assert [text.read_text() for text in texts] == [f"sks, {text}!\n" for text in captions]
    assert caption(folder, "--sidecar", ".caption")[0] == 0
    assert last.with_suffix(".caption").read_text() == f"{captions[-1]}\n"
    assert len(list(folder.iterdir())) == 27


def test_images_that_would_share_a_text_file(folder, caption, captions):
    first, second = sorted(folder.iterdir())[:2]
    Image.open(second).save(first.with_suffix(".bmp"))
    code, _, said = caption(first, first.with_suffix(".bmp"), "--sidecar")
    assert code == 0 and f"as {first.with_suffix('.bmp')} with {first}: the first of them has it" in said
    assert first.with_suffix(".txt").read_text() == f"{captions[0]}\n"


def test_a_complete_file_gets_its_sidecars(folder, caption, captions, tmp_path):
    assert caption(folder, "--output", tmp_path / "out.jsonl")[0] == 0
    code, _, said = caption(folder, "--output", tmp_path / "out.jsonl", "--sidecar")
    assert (code, said) == (0, "") and len(list(folder.glob("*.txt"))) == 9
    next(folder.glob("*.txt")).unlink()
    before = (tmp_path / "out.jsonl").stat()
    code, _, said = caption(folder, "--output", tmp_path / "out.jsonl", "--sidecar", ".txt")
    assert code == 0 and "8 of 9 images are done already" in said and len(list(folder.glob("*.txt"))) == 9
    assert (tmp_path / "out.jsonl").stat() == before


def test_a_file_of_another_model_is_not_taken_for_complete(folder, caption, tmp_path):
    out = tmp_path / "out.jsonl"
    assert caption(folder, "--output", out)[0] == 0
    before = out.read_bytes()
    code, _, said = caption(folder, "--output", out, "--captions", 2, "--begin-with", "a")
    wanted = "out.jsonl was made with other settings (--begin-with by default and not 'a', --captions by default and "
    assert code == 2 and wanted in said and out.read_bytes() == before
    assert caption(folder, "--output", out, "--seed", 3, "--beam-size", 5)[0] == 0  # which make no difference
    code, _, said = caption(folder, "--output", out, "--overwrite", "--captions", 2)
    assert (code, said) == (0, "") and out.read_bytes() != before


def test_what_is_beside_a_changed_image_changes_with_the_file(folder, caption, tmp_path):
    flags = ("--output", tmp_path / "out.jsonl", "--sidecar")
    assert caption(folder, *flags)[0] == 0
    first, *others = sorted(folder.glob("*.png"))
    first.with_suffix(".txt").write_text("old")
    others[0].with_suffix(".txt").write_text("mine")
    Image.new("RGB", (40, 40)).save(first)
    code, _, said = caption(folder, *flags)
    assert code == 0 and "8 of 9 images are done already" in said
    text = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["caption"]
    assert first.with_suffix(".txt").read_text() == f"{text}\n" and others[0].with_suffix(".txt").read_text() == "mine"


def test_a_failure_beside_a_complete_file_counts(folder, caption, tmp_path):
    flags = ("--output", tmp_path / "out.jsonl")
    image, state = next(folder.iterdir()), next(folder.iterdir()).stat()
    assert caption(folder, *flags)[0] == 0
    image.write_bytes(b"x" * state.st_size)
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    code, _, said = caption(folder, *flags, "--sidecar")
    assert code == 1 and said.splitlines()[-1] == "captioner: 1 of 9 images could not be read."


def test_images_that_are_gone_leave_the_file_and_a_file_of_others_is_left(folder, caption, tmp_path):
    out = tmp_path / "out.jsonl"
    assert caption(folder, "--output", out)[0] == 0
    image = next(folder.iterdir())
    image.rename(tmp_path / "elsewhere.png")
    code, _, said = caption(folder, "--output", out)
    assert code == 0 and f"1 image is no longer there: their captions leave {out}" in said
    assert len(out.read_text().splitlines()) == 8
    (tmp_path / "elsewhere.png").rename(image)
    assert "8 of 9 images are done already" in caption(folder, "--output", out)[2]
    assert len(out.read_text().splitlines()) == 9
    out.write_text("corrected")
    code, _, said = caption(folder, "--output", out)
    assert code == 0 and "out.jsonl was changed since it was written, and is left as it is" in said
    assert out.read_text() == "corrected"


def test_overlays_in_the_folder_that_is_captioned_get_no_captions(folder, caption):
    for image in sorted(folder.iterdir())[2:]:
        image.unlink()
    flags = ("--overlay", folder / "overlays", "--max-words", 2)
    first = caption(folder, *flags)
    assert first[0] == 0 and len(list((folder / "overlays").iterdir())) == 2
    code, printed, said = caption(folder, *flags)
    assert (code, printed) == (0, first[1]) and "2 images in" in said and "where overlays go, are left out" in said


def test_draws_do_not_depend_on_what_else_is_captioned(folder, caption):
    drawn = caption(folder, "--sample", "--temperature", 3, "--batch-size", 2)[1].splitlines()
    assert len({line.partition("\t")[2] for line in drawn}) > 1
    few = caption(*sorted(folder.iterdir(), reverse=True)[::3], "--sample", "--temperature", 3)[1].splitlines()
    assert sorted(few) == sorted(line for line in drawn if line in few) and len(few) == 3
    assert caption(folder, "--sample", "--temperature", 3, "--seed", 1)[1].splitlines() != drawn


def test_overlays_of_one_name_get_numbers(tmp_path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.jpg", "c/y.png", "b/x.gif", "e/한 글.gif")]
    names = picture_names(paths)
    assert len(set(names.values())) == 5 and names[paths[2]] == "y.png" and names[paths[4]] == "한 글.png"
    assert all(re.fullmatch(r"x-[0-9a-f]{8}\.png", names[paths[place]]) for place in (0, 1, 3))
    more = picture_names([tmp_path / "0" / "x.png", *reversed(paths)])  # no picture becomes another's
    assert all(more[path] == name for path, name in names.items())


def test_a_full_disk_is_one_line(folder, caption, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for flags in (["--sidecar"], ["--output", tmp_path / "out.csv"], ["--overlay", tmp_path / "overlays"]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            code, _, said = caption(folder, *flags)
        assert code == 2 and "No space left on device" in said and said.count("\n") == 1


# Going on


def interrupt_after(monkeypatch, batches):
    """Press Ctrl-C while the model is at work on the next batch."""
    annotate, left = Captioner.annotate, [batches]

    def interrupted(self, images):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return annotate(self, images)

    monkeypatch.setattr(Captioner, "annotate", interrupted)
    monkeypatch.setattr(fast_captioner, "THREADS", 1)  # one batch after the other


@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_interrupted_it_goes_on_to_the_same_file(name, batches, folder, caption, tmp_path, monkeypatch):
    (folder / "bad.png").write_text("no image")
    whole, out = tmp_path / f"whole-{name}", tmp_path / name
    assert caption(folder, "--output", whole, "--batch-size", 2)[0] == 1
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches)
        code, _, said = caption(folder, "--output", out, "--batch-size", 2)
    assert code == 130 and not out.exists()
    assert said == f"captioner: interrupted after {2 * batches} of 10 images: the same command goes on from there.\n"
    code, _, said = caption(folder, "--output", out, "--batch-size", 2)
    assert code == 1 and out.read_bytes() == whole.read_bytes()
    assert (f"{2 * batches} of 10 images are done already" in said) == (batches > 0)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".lock", ".tmp")]


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(folder, caption, tmp_path, monkeypatch):
    faster = iter(["bfloat16", "float32", "no more"])
    monkeypatch.setattr(caption_command, "_faster_precision", lambda device: next(faster))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    caption(folder, "--output", whole, "--batch-size", 2, "--precision", "bfloat16")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        caption(folder, "--output", out, "--batch-size", 2)
    assert caption(folder, "--output", out, "--batch-size", 2)[0] == 0
    assert out.read_bytes() == whole.read_bytes()
    caption(folder, "--output", out, "--batch-size", 2, "--overwrite")  # begins anew, in what is faster now
    assert out.read_bytes() != whole.read_bytes()


def test_interrupted_sidecars_go_on(folder, caption, captions, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        code, _, said = caption(folder, "--sidecar", "--batch-size", 2)
    assert code == 130 and "interrupted after 4 of 9 images" in said
    assert "4 of 9 images are done already" in caption(folder, "--sidecar", "--batch-size", 2)[2]
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == [f"{text}\n" for text in captions]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        said = caption(folder, "--sidecar", "--overwrite", "--batch-size", 2)[2]
    assert "with --overwrite the same command begins anew" in said


def test_a_run_with_another_beam_does_not_mix_with_it(folder, caption, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        caption(folder, "--output", out, "--batch-size", 2)
    code, _, said = caption(folder, "--output", out, "--beam-size", 3)
    assert code == 2 and "(--beam-size by default and not 3)" in said and said.count("\n") == 1


def run(*args):
    sys.exit(main(args))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_every_image_is_there_once(images, best, tmp_path):
    folder, kills = tmp_path / "photos", 20
    folder.mkdir()
    for number in range(300):
        Image.open(images[number % 9]).rotate(number).save(folder / f"{number}.png")
    (folder / "150.png").write_text("no image")
    processes = multiprocessing.get_context("forkserver")  # importing torch is most of what a short run does
    processes.set_forkserver_preload(["captioner.fast_captioner", "captioner.caption_command", "captioner.cli"])

    def start(name):
        flags = ("--output", str(tmp_path / name), "--checkpoint", str(best), "--batch-size", "4")
        process = processes.Process(target=run, args=("caption", str(folder), *flags, "--precision", "float32"))
        process.start()
        return process

    start("whole.jsonl").join()  # the first starts the server, too
    for path in tmp_path.glob("whole.jsonl*"):
        path.unlink()
    began = time.monotonic()
    start("whole.jsonl").join()
    seconds = time.monotonic() - began
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [result.image for result in read_results(tmp_path / "whole.jsonl")] == [
        str(path) for path in find_images([folder]) if path.name != "150.png"
    ]
    out, draw, killed, progress = tmp_path / "out.jsonl", random.Random(0), 0, set()
    while killed < kills or not out.exists():
        process = start(out.name)
        process.join(draw.uniform(0, seconds) if killed < kills else None)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (1, -signal.SIGKILL)
        journal = out.with_name("out.jsonl.journal")
        progress.add(journal.stat().st_size if journal.exists() else 0)
        if out.exists():
            assert out.read_bytes() == whole
            if killed < kills:
                out.unlink()
    assert out.read_bytes() == whole and len(progress) > 5  # it was killed at work, too
    assert {path.name for path in tmp_path.iterdir()} == {
        "photos",
        *(f"{name}.jsonl{more}" for name in ("whole", "out") for more in ("", ".journal", ".failures.txt")),
    }


# On a terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_captions_stay_out_of_it(images, best, captions, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["caption", *map(str, images[:3]), "--checkpoint", str(best), "--batch-size", "1"]) == 0
    assert "Captioning" in terminal.getvalue() and "3/3" in terminal.getvalue() and "images/s" in terminal.getvalue()
    assert captions[0] not in terminal.getvalue()  # standard output is a file here
    assert capsys.readouterr().out.count("\n") == 3
