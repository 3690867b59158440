"""Files of captions: what is in them, and that a run goes on from wherever it was stopped."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from pycocotools.coco import COCO

from captioner.caption_files import FORMATS, CaptionFile, Outcome, Sidecars, format_of
from captioner.errors import InputError, in_one_line
from captioner.results import Result, read_results

NAMES = ["a, b.jpg", 'a "b".jpg', "a\nb\r.jpg", "a\tb.jpg", " ;한글\u2028.jpg", "half\udc80.jpg", "a=b\\n.jpg"]
TEXT = 'two "dogs", one\u2028cat'
SETTINGS = {"beam_size": 5, "banned": ("man",), "checkpoints": ["abc"]}


def outcomes_of(images, captions=1):
    """Captions that tell the images apart, and logarithms that no short decimal holds."""
    return [
        Outcome(image, [(f"{TEXT} {rank} of {number}", -1 / 3 - number - rank) for rank in range(captions)])
        for number, image in enumerate(images)
    ]


def write(file, outcomes, *, form="jsonl", captions=1, batch=2):
    """An undisturbed run."""
    output = CaptionFile(FORMATS[form](file, captions), SETTINGS)
    images = [outcome.image for outcome in outcomes]
    with output.held():
        assert output.begin(images) == images
        for first in range(0, len(outcomes), batch):
            output.add(outcomes[first : first + batch])
        output.finish(images)
    return file


# Formats


@pytest.mark.parametrize("captions", [1, 3])
def test_json_lines(tmp_path, captions):
    images = [Path("folder") / name for name in NAMES]
    outcomes = outcomes_of(images, captions)
    file = write(tmp_path / "out.jsonl", outcomes, captions=captions)
    assert read_results(file) == [Result(str(one.image), one.captions[0][0]) for one in outcomes]
    for line, one in zip(file.read_bytes().split(b"\n"), outcomes, strict=False):
        record = json.loads(line)
        several = [{"caption": text, "log_probability": value} for text, value in one.captions]
        assert record == {"image": str(one.image), **several[0], **({"captions": several} if captions > 1 else {})}


@pytest.mark.parametrize("captions", [1, 3])
def test_csv_survives_commas_quotes_and_newlines(tmp_path, captions):
    images = [Path("folder") / name for name in NAMES]
    outcomes = outcomes_of(images, captions)
    outcomes[1] = outcomes[1]._replace(captions=outcomes[1].captions[:1])  # a beam may find fewer
    file = write(tmp_path / "out.csv", outcomes, form="csv", captions=captions)
    named = [str(image).encode("utf-8", "backslashreplace").decode() for image in images]
    assert read_results(file) == [Result(name, one.captions[0][0]) for name, one in zip(named, outcomes, strict=True)]
    with open(file, encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["image"] for row in rows] == named
    for row, one in zip(rows, outcomes, strict=True):
        for rank in range(captions):
            mark = f"_{rank + 1}" if rank else ""
            text, value = one.captions[rank] if rank < len(one.captions) else ("", "")
            assert (row[f"caption{mark}"], row[f"log_probability{mark}"]) == (text, str(value))


def test_coco_results_are_loaded_by_pycocotools(tmp_path):
    images = [Path("val") / f"COCO_val2014_{number:012d}.jpg" for number in (9, 42)] + [Path("000000000100.png")]
    outcomes = outcomes_of(images)
    file = write(tmp_path / "out.json", outcomes, form="coco")
    references = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (9, 42, 100)],
        "annotations": [{"id": 1, "image_id": 42, "caption": "a cat"}],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(tmp_path / "references.json")).loadRes(str(file))
    assert {number: loaded.imgToAnns[number][0]["caption"] for number in (9, 42, 100)} == {
        number: one.captions[0][0] for number, one in zip((9, 42, 100), outcomes, strict=True)
    }


def test_coco_results_name_other_images_by_their_files(tmp_path):
    images = [Path("a") / name for name in (*NAMES, "42.jpg", "COCO_42.jpg", "0000000000420.jpg")]
    file = write(tmp_path / "out.json", outcomes_of(images), form="coco")
    assert [result.image for result in read_results(file)] == [image.name for image in images]


def test_coco_results_hold_one_caption_of_an_image_each(tmp_path):
    with pytest.raises(InputError, match="one caption of each image, and not 2"):
        FORMATS["coco"](tmp_path / "out.json", 2).check([Path("a.jpg")])
    with pytest.raises(InputError, match="a/x.jpg and b/x.jpg 'x.jpg'"):
        FORMATS["coco"](tmp_path / "out.json", 1).check([Path("a/x.jpg"), Path("b/x.jpg")])


@pytest.mark.parametrize("captions", [1, 2])
def test_metadata_names_images_from_its_own_folder(tmp_path, monkeypatch, captions):
    monkeypatch.chdir(tmp_path)
    images = [Path("photos/sub") / name for name in NAMES] + [tmp_path / "photos" / "x.jpg"]
    Path("photos").mkdir()
    outcomes = outcomes_of(images, captions)
    file = write(Path("photos/metadata.jsonl"), outcomes, form="metadata", captions=captions)
    records = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    assert [record["file_name"] for record in records] == [*(f"sub/{name}" for name in NAMES), "x.jpg"]
    texts = [[text for text, _ in one.captions] for one in outcomes]
    assert [record["text"] for record in records] == [each if captions > 1 else each[0] for each in texts]


def test_metadata_names_nothing_outside(tmp_path):
    with pytest.raises(InputError, match="outside its own folder, such as .*b/x.jpg"):
        FORMATS["metadata"](tmp_path / "a" / "metadata.jsonl", 1).check([tmp_path / "b" / "x.jpg"])


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_without_captions_is_one_still(tmp_path, form):
    output = CaptionFile(FORMATS[form](tmp_path / "out", 1), SETTINGS)
    images = [tmp_path / "a.jpg"]
    output.begin(images)
    output.add([Outcome(images[0], fault="a.jpg is no image.")])
    output.finish(images)
    assert output.failed == images
    empty = {"coco": b"[]\n", "csv": b"image,caption,log_probability\r\n"}
    assert output.file.read_bytes() == empty.get(form, b"")


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jsonl", "jsonl"), ("a.JSON", "coco"), ("a.csv", "csv"), ("x/metadata.jsonl", "metadata")],
)
def test_a_format_is_known_by_its_name(name, form):
    assert format_of(Path(name)) == form


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match=r"end it in .jsonl, .csv, .json, call it metadata.jsonl, or give --format"):
        format_of(Path("captions.txt"))


def test_a_line_stays_a_line():
    assert in_one_line("a\tb\nc\r\x1b[31m\u2028\udc80한 글") == r"a\tb\nc\r\x1b[31m\u2028\udc80한 글"


def test_sidecars(tmp_path):
    outcome = Outcome(tmp_path / "a.b.png", [("a dog", -1.0), ("a cat", -2.0)])
    Sidecars().write(outcome)
    Sidecars(".caption", "sks, ", " (photo)").write(outcome)
    assert (tmp_path / "a.b.txt").read_text() == "a dog\na cat\n"
    assert (tmp_path / "a.b.caption").read_text() == "sks, a dog (photo)\nsks, a cat (photo)\n"
    assert len(list(tmp_path.iterdir())) == 2


# Going on


@pytest.fixture
def images(tmp_path):
    """Five files, of which the second is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b", "c", "d", "e\n"):
        (folder / f"{name}.jpg").write_text(name)
    return sorted(folder.iterdir())


@pytest.fixture
def outcomes(images):
    outcomes = outcomes_of(images)
    outcomes[1] = Outcome(images[1], fault="b.jpg is no image.")
    return outcomes


@pytest.fixture
def undisturbed(outcomes, tmp_path):
    return write(tmp_path / "undisturbed.jsonl", outcomes).read_bytes()


def go_on(output, outcomes, batch=2, **options):
    """What is left to do, done."""
    known = {outcome.image: outcome for outcome in outcomes}
    images = list(known)
    with output.held():
        todo = output.begin(images, **options)
        for first in range(0, len(todo), batch):
            output.add([known[image] for image in todo[first : first + batch]])
        output.finish(images)
    return todo


def captioned(tmp_path, **settings):
    return CaptionFile(FORMATS["jsonl"](tmp_path / "out.jsonl", 1), {**SETTINGS, **settings})


def test_a_journal_cut_off_at_any_byte_is_gone_on_from(tmp_path, images, outcomes, undisturbed, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes its time, and there are many bytes
    output = captioned(tmp_path)
    output.begin(images)
    ends = []
    for first in (0, 2, 4):
        output.add(outcomes[first : first + 2])
        ends.append(output.journal.stat().st_size)
    journal = output.journal.read_bytes()
    start = journal.index(b"\n") + 1
    around = {start, *(byte for end in ends for byte in (end - 1, end, end + 1) if byte <= ends[-1])}
    for length in sorted(around | set(range(start, ends[-1], 11))):
        output.journal.write_bytes(journal[:length])
        batches = sum(length >= end for end in ends)
        todo = go_on(captioned(tmp_path), outcomes)
        assert todo == [*images[2 * batches :], *([images[1]] if batches else [])]
        assert output.file.read_bytes() == undisturbed
        output.file.unlink()
        output.journal.unlink()


def test_a_batch_that_was_cut_off_leaves_nothing_behind_a_shorter_one(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes[:1])
    output.add(outcomes[1:])
    output.journal.write_bytes(output.journal.read_bytes()[:-1])
    assert output.begin(images) == images[1:]
    for damaged in (b"5\n", b'{"a": 1}\n', b"[]\n"):
        output.journal.write_bytes(output.journal.read_bytes() + damaged)
        assert output.begin(images) == images[1:]
    output.add(outcomes[1:2])
    assert output.journal.read_bytes().count(b"\n") == 3 and output.journal.read_bytes().endswith(b"\n")


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from captioner.caption_files import FORMATS, CaptionFile, Outcome

moment, file, batch, overwrite, outcomes = int(sys.argv[1]), *map(json.loads, sys.argv[2:])
outcomes = [Outcome(Path(image), captions, fault) for image, captions, fault in outcomes]
known = {outcome.image: outcome for outcome in outcomes}
output = CaptionFile(FORMATS["jsonl"](Path(file), 1), {"a": 1})

def look(event, args):
    global moment
    if event in ("open", "os.rename", "os.remove", "os.truncate"):
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
with output.held():
    todo = output.begin(list(known), overwrite)
    for first in range(0, len(todo), batch):
        output.add([known[image] for image in todo[first : first + batch]])
    output.finish(list(known))
"""


@pytest.mark.parametrize(
    "before", ["nothing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fewer", "others overwritten"))]
)
def test_killed_before_any_change_of_a_file_it_goes_on(tmp_path, outcomes, undisturbed, before):
    file, overwrite = tmp_path / "out.jsonl", before == "others overwritten"
    given = [[str(image), captions, fault] for image, captions, fault in outcomes]
    output = CaptionFile(FORMATS["jsonl"](file, 1), {"a": 1})
    for moment in range(1, 100):
        if before == "fewer":
            go_on(output, outcomes[:2])
        elif before == "others overwritten":
            go_on(output, [Outcome(one.image, [("other", -1.0)]) for one in outcomes])
        earlier = file.read_bytes() if file.exists() else None
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(moment), *map(json.dumps, (str(file), 2, overwrite, given))],
            capture_output=True,
        )
        assert ran.returncode in (0, -9), ran.stderr
        if file.exists():
            assert file.read_bytes() in (undisturbed, earlier)  # whole, or not there
        if ran.returncode == 0:
            break
        go_on(output, outcomes, overwrite=overwrite)
        assert file.read_bytes() == undisturbed
        left = {path.name for path in tmp_path.iterdir()} - {"images"}
        assert left == {
            f"{name}{more}" for name in ("out.jsonl", "undisturbed.jsonl") for more in ("", ".journal", ".failures.txt")
        }
        for path in tmp_path.glob("out.jsonl*"):
            path.unlink()
    assert moment > 12  # moments at which it was killed


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, images, outcomes, undisturbed, monkeypatch):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes[:2])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device.: see to it, and the same command goes on"):
            output.add(outcomes[2:4])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(InputError, match=r"out.jsonl.failures.txt cannot be written"):
            output.finish(images)
    go_on(captioned(tmp_path), outcomes)
    assert output.file.read_bytes() == undisturbed


def test_failures_are_tried_again_last_and_listed(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes[:3])
    assert output.begin(images) == [*images[3:], images[1]]
    output.add([*outcomes[3:], outcomes[1]._replace(captions=[("mended", -1.0)], fault="")])
    output.finish(images)
    assert output.failed == [] and not output.failures.exists()
    assert [result.image for result in read_results(output.file)] == [str(image) for image in images]
    assert go_on(captioned(tmp_path), [*outcomes[:4], Outcome(images[4], fault="no")], overwrite=True) == images
    assert output.failures.read_text() == f"{images[1]}\tb.jpg is no image.\n{in_one_line(images[4])}\tno\n"


def test_an_image_that_changed_since_is_captioned_anew_and_a_new_one_too(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.begin(images)
    output.add([outcomes[0], outcomes[2], outcomes[4]])
    images[2].write_text("another")
    new = images[0].with_name("aa.jpg")
    with pytest.raises(InputError, match=f"would lose the captions of 1 image not given now, such as {images[4]}"):
        output.begin([images[0], new, images[2]])
    images[4].unlink()
    assert output.begin([images[0], new, images[2]]) == [new, images[2]]
    output.add([Outcome(new, [("new", -1.0)]), Outcome(images[2], [("anew", -1.0)])])
    output.finish([images[0], new, images[2]])
    results = {Path(result.image): result.caption for result in read_results(output.file)}
    assert list(results.items()) == [(images[0], outcomes[0].captions[0][0]), (new, "new"), (images[2], "anew")]


def test_an_image_that_goes_while_the_run_goes_on_keeps_its_caption(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes)
    images[0].unlink()
    output.finish(images)
    assert len(read_results(output.file)) == 4


def test_other_settings_are_not_mixed_in(tmp_path, images, outcomes, undisturbed):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes[:2])
    journal = output.journal.read_bytes()
    other = captioned(tmp_path, beam_size=3, checkpoints=["def"])
    with pytest.raises(InputError, match=r"journal was begun with .* \(--beam-size 5 and not 3, another checkpoint\)"):
        other.begin(images)
    assert output.journal.read_bytes() == journal
    assert go_on(other, outcomes, overwrite=True) == images
    assert output.file.read_bytes() == undisturbed


def test_what_was_begun_with_overwrite_goes_on_with_it(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.file.write_text("earlier")
    output.begin(images, overwrite=True)
    output.add(outcomes[:2])
    assert output.file.read_text() == "earlier"
    with pytest.raises(InputError, match="being overwritten by a run that was stopped: give --overwrite again"):
        captioned(tmp_path).begin(images[:2])
    assert captioned(tmp_path, beam_size=3).begin(images, overwrite=True) == images
    assert captioned(tmp_path).begin(images[3:], overwrite=True) == images[3:]
    assert go_on(captioned(tmp_path), outcomes, overwrite=True) == [*images[2:], images[1]]
    assert len(read_results(output.file)) == 4
    assert captioned(tmp_path).begin(images, overwrite=True) == images  # it is complete: anew


def test_a_stopped_run_is_overwritten(tmp_path, images, outcomes, undisturbed):
    output = captioned(tmp_path)
    output.begin(images)
    output.add([outcome._replace(captions=[("earlier", -1.0)], fault="") for outcome in outcomes[:3]])
    assert go_on(captioned(tmp_path), outcomes, overwrite=True) == images
    assert output.file.read_bytes() == undisturbed


def test_a_run_that_did_nothing_leaves_nothing(tmp_path, images):
    output = captioned(tmp_path)
    with output.held():
        output.begin(images)
    assert captioned(tmp_path, beam_size=7).begin(images) == images
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_two_processes_do_not_write_one_file(tmp_path):
    output = captioned(tmp_path)
    with FileLock(tmp_path / "out.jsonl.lock"), pytest.raises(InputError, match="another process"), output.held():
        pass
    with output.held():
        pass


def test_a_journal_of_others_is_left_alone(tmp_path, images):
    output = captioned(tmp_path)
    for text in ("thesis\n", '{"settings": {}}\n', "[]"):
        output.journal.write_text(text)
        with pytest.raises(InputError, match="is not of this captioner"):
            output.begin(images, overwrite=True)
        assert output.journal.read_text() == text


@pytest.mark.parametrize("form", FORMATS)
def test_a_complete_file_is_left_as_it_is(tmp_path, form):
    images = [tmp_path / name for name in NAMES]
    for image in images:
        image.touch()
    file = write(tmp_path / "out", outcomes_of(images), form=form)
    state, before = file.stat(), file.read_bytes()
    for given in (images, images[::2]):
        output = CaptionFile(FORMATS[form](file, 1), SETTINGS)
        assert output.begin(given) == []
        output.finish(given)
    assert (file.stat(), file.read_bytes(), output.failed) == (state, before, [])
    assert output.begin(images, overwrite=True) == images
    file.unlink()
    assert output.begin(images) == images  # who deletes it wants it anew
    output.journal.write_text("")  # as a power cut may leave it
    assert output.begin(images) == images


@pytest.mark.parametrize("form", FORMATS)
def test_a_complete_file_grows(tmp_path, form, images, outcomes):
    few = [outcome for outcome in outcomes if outcome.captions][:2]
    file = write(tmp_path / "out", few, form=form)
    whole = write(tmp_path / "whole", outcomes, form=form).read_bytes().replace(b"whole", b"out")

    def output():
        return CaptionFile(FORMATS[form](file, 1), SETTINGS)

    assert go_on(output(), outcomes) == [image for image in images if image not in [one.image for one in few]]
    assert file.read_bytes() == whole
    assert output().failures.read_bytes() == (tmp_path / "whole.failures.txt").read_bytes()
    state = file.stat()
    assert go_on(output(), outcomes) == [images[1]] and file.stat() == state  # which fails again
    mended = [outcome._replace(captions=outcome.captions or [("mended", -1.0)], fault="") for outcome in outcomes]
    assert go_on(output(), mended) == [images[1]] and not output().failures.exists()
    assert file.read_bytes() == write(tmp_path / "mended", mended, form=form).read_bytes()


def test_growing_is_stopped_and_gone_on_with(tmp_path, images, outcomes, undisturbed):
    file = write(tmp_path / "out.jsonl", outcomes[2:4])
    before = file.read_bytes()
    output = captioned(tmp_path)
    assert output.begin(images) == [images[0], images[1], images[4]]
    output.add(outcomes[:1])
    assert file.read_bytes() == before
    file.write_text("corrected by hand")
    with pytest.raises(InputError, match="was changed since it was written"):
        captioned(tmp_path).begin(images)
    file.write_bytes(before)
    assert go_on(captioned(tmp_path), outcomes) == [images[1], images[4]]
    assert file.read_bytes() == undisturbed


def test_a_complete_file_is_what_its_journal_says(tmp_path, images, outcomes, undisturbed):
    output = captioned(tmp_path)
    output.begin(images)
    output.add(outcomes)  # and is killed
    with pytest.raises(InputError, match="would lose the captions of 2 images not given now"):
        captioned(tmp_path).begin(images[:3])
    assert go_on(captioned(tmp_path), outcomes) == [images[1]]
    away = tmp_path / "away.jpg"
    images[2].rename(away)  # as with a disk that is not there
    output = captioned(tmp_path)
    given = [image for image in images if image != images[2]]
    assert output.begin(given) == [images[1]] and output.gone == 1
    output.finish(given)
    assert len(read_results(output.file)) == 3
    away.rename(images[2])
    assert go_on(captioned(tmp_path), outcomes) == [images[2], images[1]]
    assert output.file.read_bytes() == undisturbed


def test_an_image_that_is_replaced_while_it_is_captioned_is_captioned_again(tmp_path, images, outcomes):
    output = captioned(tmp_path)
    output.begin(images)
    images[0].write_text("another image")
    output.add(outcomes)
    output.finish(images)
    again = captioned(tmp_path)
    assert again.begin(images) == [images[0], images[1]] and again.changed == {images[0]}


def test_a_complete_file_loses_nothing(tmp_path, images, outcomes):
    file = write(tmp_path / "out.jsonl", outcomes[:3])
    before = {path: path.read_bytes() for path in tmp_path.glob("out.jsonl*")}
    with pytest.raises(InputError, match=r"out.jsonl was made with other settings \(--beam-size 5 and not 3\)"):
        captioned(tmp_path, beam_size=3).begin(images)
    with pytest.raises(InputError, match="would lose the captions of 2 images not given now"):
        captioned(tmp_path).begin(images[3:])
    assert {path: path.read_bytes() for path in tmp_path.glob("out.jsonl*")} == before
    file.write_text("corrected by hand")
    output = captioned(tmp_path)
    assert output.begin([images[0], images[2]]) == [] and output.edited
    with pytest.raises(InputError, match="was changed since it was written"):
        captioned(tmp_path).begin(images)
    output = captioned(tmp_path)
    output.journal.unlink()
    with pytest.raises(InputError, match="is there already, and nothing beside it says how it was made"):
        output.begin(images)
    assert file.read_text() == "corrected by hand" and output.begin(images, overwrite=True) == images
