"""What is wrong with a dataset is found before training, each fault where it is; and nothing where nothing is wrong."""

import shutil
import unicodedata

import pytest
from odd_images import unusual
from PIL import Image
from seeded_faults import FIRST, SEEDS, TREES, draw, sidecars, table

from captioner import image_stream
from captioner.annotation_files import AnyFormat, CaptionTable
from captioner.dataset_check import REMARKS, examine
from captioner.errors import InputError


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A clean tree of each form."""
    drawn = draw(tmp_path_factory.mktemp("drawn"))
    folder = tmp_path_factory.mktemp("trees")
    for tree in TREES:
        tree(folder / tree.__name__, drawn)
    return folder


@pytest.fixture
def copy(trees, tmp_path):
    def make(tree):
        return shutil.copytree(trees / tree.__name__, tmp_path / tree.__name__)

    return make


def examined(root, **settings):
    return examine(AnyFormat(root), **{"minimum_count": 2, **settings})


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)
def test_nothing_is_found_in_a_clean_dataset(tree, trees):
    found = examined(trees / tree.__name__)
    assert found.findings == [] and found.errors == 0
    assert {split.images for split in found.splits.values()} == {14, 5}
    assert sum(split.captions for split in found.splits.values()) == 5 * 24


def test_there_are_more_than_twenty_kinds():
    assert len({seed.kind for seed in SEEDS}) > 20 and len({seed.name for seed in SEEDS}) == len(SEEDS) > 40


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_each_fault_is_found_with_its_file_and_line_and_nothing_else(seed, copy):
    root = copy(seed.tree)
    seed.put(root)
    # A table without the columns that are known is recognised by none: it is named.
    files = CaptionTable(root) if seed.kind == "column" else AnyFormat(root)
    found = examine(files, minimum_count=2).findings
    assert [(one.file.name, one.line) for one in found if one.kind == seed.kind] == [(seed.file, seed.line)]
    assert {one.kind for one in found} <= {seed.kind, *seed.further}
    for one in found:
        assert "\n" not in one.message and one.message.endswith(".")
        if one.file is not None:
            assert one.file.name in one.message
        if one.line is not None:
            assert f"line {one.line}" in one.message or "first is" in one.message


def test_faults_do_not_hide_each_other(copy):
    root = copy(table)
    chosen = [seed for seed in SEEDS if seed.name in ("an image twice in a split", "no test split", "markup")]
    for seed in chosen:
        seed.put(root)
    (root / "images" / "val_000002.png").write_bytes(b"")
    (root / "images" / "val_000003.png").unlink()
    kinds = {one.kind for one in examined(root).findings}
    assert kinds == {"doubled image", "no test split", "markup", "damaged image", "missing image"}


def test_a_text_file_in_another_encoding_hides_no_other(copy):
    root = copy(sidecars)
    first, second, *_ = sorted(root.rglob("*.txt"))
    first.write_bytes("a red circle".encode("utf-16"))
    second.write_bytes(b"")
    assert {one.kind for one in examined(root).findings} >= {"encoding", "empty caption"}


def test_a_name_in_another_form_of_unicode_is_told_from_another_name(tmp_path):
    Image.radial_gradient("L").save(tmp_path / unicodedata.normalize("NFD", "b\xe4r.png"))
    (tmp_path / "captions.csv").write_text("image,caption\nb\xe4r.png,a bear\n", encoding="utf-8")
    (found,) = [one for one in examined(tmp_path).findings if one.kind == "missing image"]
    assert "the same letters composed otherwise in Unicode, rename it" in found.message


def test_unusual_images_are_no_faults(tmp_path):
    lines = ["image,caption,split"]
    for number, (name, data) in enumerate(unusual()):
        (tmp_path / name).write_bytes(data)
        lines.append(f"{name},a picture of the number {number},{('train', 'val', 'test')[number % 3]}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    kinds = {one.kind for one in examined(tmp_path, minimum_count=1).findings}
    assert kinds <= {"doubled image", "image in two splits", "small image", "blank image", "extreme shape"}


CAPTIONS = {
    "ko": ["빨간 원 위에 파란 삼각형이 있다", unicodedata.normalize("NFD", "노란 별 하나")],
    "zh": ["一只狗在草地上奔跑", "兩個人坐在桌子旁邊"],
    "ar": ["كلب يجري على العشب", "رجلان يجلسان"],
    "th": ["สุนัขวิ่งบนหญ้า", "คนสองคนนั่ง"],
    "de": ["Ein Hund läuft über die Wiese", "Füße, Größe – „schön“"],
    "emoji": ["🐕 🌳", "👩‍👩‍👧 🏖️"],
}


@pytest.mark.parametrize("language", CAPTIONS)
def test_captions_in_other_scripts_are_no_faults(language, tmp_path):
    lines = ["image,caption,split"]
    for number in range(6):
        drawn = Image.new("RGB", (48, 48), (40 * number, 0, 0))
        drawn.putpixel((0, 0), (255, 255, 255))
        drawn.save(tmp_path / f"{number}.png")
        lines += [f'{number}.png,"{text}",{("train", "val", "test")[number // 2]}' for text in CAPTIONS[language]]
    (tmp_path / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    assert examined(tmp_path, minimum_count=1).findings == []


def test_words_are_counted_as_training_cuts_them(tmp_path):
    lines = ["image,caption,split", "0.png,草地上的狗。,train", "1.png,草地。,val"]
    for number in range(2):
        Image.radial_gradient("L").resize((40 + number, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    found = examined(tmp_path, minimum_count=1)
    assert found.tokenizer == "unicode" and found.splits["train"].mean == 5 and found.coverage[0].words == 5


def test_the_figures_are_those_of_the_captions(tmp_path):
    lines = ["image,caption,split"]
    captions = [("train", "a red dog"), ("train", "a dog"), ("val", "a red cat")]
    for number, (split, text) in enumerate(captions):
        Image.radial_gradient("L").resize((40 + number, 40)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{text},{split}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    found = examined(tmp_path, minimum_count=1)
    assert found.splits["train"] == (2, 2, 2.5, (2, 2, 3, 3))
    assert list(found.splits) == ["train", "val"]
    first, second, *_ = found.coverage
    assert (first.minimum_count, first.words) == (1, 3) and first.known == {"train": 1.0, "val": pytest.approx(2 / 3)}
    assert (second.minimum_count, second.words) == (2, 2) and second.known["train"] == pytest.approx(4 / 5)
    assert {one.kind for one in found.findings} == {"no test split"}


def test_a_split_by_content_is_that_of_training_and_each_file_is_read_once(trees, tmp_path, monkeypatch):
    root = shutil.copytree(trees / "table" / "images", tmp_path / "photos")
    for path in root.iterdir():
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}\n")
    files = AnyFormat(root, shares=(0.4, 0.3, 0.3))
    expected = {split: len(files.records(split)) for split in ("train", "val", "test")}
    monkeypatch.setattr("captioner.caption_formats.digests_of", None)
    found = examine(AnyFormat(root, shares=(0.4, 0.3, 0.3)), minimum_count=1)
    assert {name: split.images for name, split in found.splits.items()} == expected
    found = examine(AnyFormat(root, shares=(1, 0, 0)), minimum_count=1)
    assert {one.kind for one in found.findings} == {"missing split", "no test split"}


def test_the_number_of_references_can_be_asked_for(trees):
    found = examined(trees / "table", references=6).findings
    assert [one.kind for one in found] == ["few references"] * 24
    assert not any(one.is_error for one in found)


def test_where_numbers_of_captions_vary_few_are_no_remark(copy):
    root = copy(table)
    file = root / "captions.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for number, line in enumerate(lines) if number % 7 != 3))
    assert examined(root).findings == []


def test_a_decoder_that_crashes_costs_its_image_alone(copy, monkeypatch):
    fault = """
import captioner.image_stream as stream
examine = stream._examine
def fault(path, *rest):
    if "train_000001" in path:
        import os; os.kill(os.getpid(), 9)
    return examine(path, *rest)
stream._examine = fault
"""
    start, last = image_stream.START.strip().rsplit("\n", 1)
    monkeypatch.setattr(image_stream, "START", f"{start}\n{fault}\n{last}")
    told = []
    found = examined(copy(table), workers=2, progress=lambda done, total: told.append((done, total)))
    assert [(one.kind, one.file.name) for one in found.findings] == [("damaged image", FIRST)]
    assert "SIGKILL" in found.findings[0].message and told == [(done, 24) for done in range(25)]


def test_processes_find_what_this_one_finds(copy):
    root = copy(table)
    for seed in SEEDS:
        if seed.tree is table and seed.kind in ("doubled image", "markup"):
            seed.put(root)
    (root / "images" / "val_000002.png").write_bytes(b"")
    assert examined(root, workers=2) == examined(root)


def test_what_is_no_dataset_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="fits no format"):
        examined(tmp_path)


def test_every_remark_is_seeded():
    assert set(REMARKS) <= {seed.kind for seed in SEEDS}
