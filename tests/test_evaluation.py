import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.cli import main
from captioner.errors import InputError
from captioner.evaluation import ReferenceCaptions, evaluate, listed, match
from captioner.metrics import DocumentFrequencies, bootstrap, ptb_tokenize, score_captions
from captioner.results import Result

CAPTIONS = {
    "a.jpg": ["A dog runs.", "The brown dog is running on the grass."],
    "b.jpg": ["Two men sit on a bench.", "Men sitting."],
    "c.jpg": ["A red ball.", "A ball on the grass."],
}
GIVEN = {"a.jpg": "a dog runs", "b.jpg": "two men on a", "c.jpg": "a ball on the grass"}


@pytest.fixture
def flickr8k(tmp_path):
    """A folder without a single image file: scoring needs none."""
    root = tmp_path / "flickr8k"
    root.mkdir()
    lines = [f"{name}#{n}\t{text}\n" for name, texts in CAPTIONS.items() for n, text in enumerate(texts)]
    (root / "Flickr8k.token.txt").write_text("".join(lines))
    (root / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (root / "Flickr_8k.devImages.txt").write_text("b.jpg\nc.jpg\n")
    return root


@pytest.fixture
def coco(tmp_path):
    """The same captions under COCO's numbers, and an image without any."""
    images = [{"id": number, "file_name": name} for number, name in enumerate([*CAPTIONS, "d.jpg"], 10)]
    texts = [(number, text) for number, texts in enumerate(CAPTIONS.values(), 10) for text in texts]
    annotations = [{"id": key, "image_id": number, "caption": text} for key, (number, text) in enumerate(texts)]
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


@pytest.fixture
def results(tmp_path):
    def write(captions, name="results.json"):
        path = tmp_path / name
        path.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in captions]))
        return path

    return write


def run(capsys, *args):
    code = main(["score", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_scores_and_everything_to_compare_them_by(flickr8k, results, tmp_path, capsys):
    path = results(GIVEN.items())
    train = tmp_path / "train.txt"
    train.write_text("x.jpg#0\tA dog runs.\nx.jpg#1\tSomething else.\n")
    code, out, err = run(capsys, flickr8k, path, "--json", tmp_path / "scores.json", "--train", train)
    assert code == 0 and not err
    expected = score_captions(CAPTIONS, GIVEN)
    report = json.loads((tmp_path / "scores.json").read_text())
    for metric, score in expected.items():
        assert report[metric] == score.corpus
        low, high = report["intervals"][metric]
        assert (low, high) == bootstrap(score)
        assert low <= score.corpus <= high
        assert f"{100 * score.corpus:.1f} [{100 * low:.1f},{100 * high:.1f}]" in out
    assert report["images"] == 3 and report["references"] == 6
    assert report["diversity"] == {
        "captions": 3,
        "distinct": 3,
        "vocabulary": 9,
        "mean_length": 4.0,
        "bad_endings": 1 / 3,
        "new": 2 / 3,
    }
    tokens = {key: [ptb_tokenize(text) for text in texts] for key, texts in CAPTIONS.items()}
    fingerprint = DocumentFrequencies.from_references(tokens).fingerprint
    assert report["document_frequencies_fingerprint"] == fingerprint
    assert report["references_path"] == str(flickr8k) and report["train"] == str(train)
    for text in ("3 images, 6 references", "seed 0", "1,000 bootstrap samples", "Penn Treebank", "of these references"):
        assert text in out
    assert "33.3%" in out and "66.7%" in out


def test_a_split_alone_is_scored(flickr8k, results, tmp_path, capsys):
    path = results((key, GIVEN[key]) for key in ("c.jpg", "b.jpg"))
    assert run(capsys, flickr8k, path, "--split", "dev", "--json", tmp_path / "scores.json")[0] == 0
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 2
    code, _, err = run(capsys, flickr8k, path)
    assert code == 2 and "does not caption, of" in err and "1 image (a.jpg)" in err
    code, _, err = run(capsys, flickr8k, results(GIVEN.items()), "--split", "dev")
    assert code == 2 and f"no image with a reference in the split dev of {flickr8k} 1 image (a.jpg)" in err


def test_training_captions(flickr8k, results, tmp_path, capsys):
    path = results(GIVEN.items())
    code, _, err = run(capsys, flickr8k, path, "--train", flickr8k, "--json", tmp_path / "scores.json")
    assert code == 0 and "trains on images that are scored: 1 image (a.jpg)" in err
    assert json.loads((tmp_path / "scores.json").read_text())["diversity"]["new"] == 2 / 3
    (tmp_path / "empty.json").write_text(json.dumps({"images": [], "annotations": []}))
    code, _, err = run(capsys, flickr8k, path, "--train", tmp_path / "empty.json")
    assert code == 2 and "has no caption: give the training captions" in err


@pytest.mark.parametrize("key", [int, str, lambda number: f"val2017/{[*CAPTIONS][number - 10]}"])
def test_coco_by_number_by_text_and_by_file_name(coco, results, tmp_path, capsys, key):
    path = results((key(number), GIVEN[name]) for number, name in enumerate(CAPTIONS, 10))
    code, _, err = run(capsys, coco, path, "--json", tmp_path / "s.json", "--per-image", tmp_path / "images.jsonl")
    assert code == 0
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["CIDEr-D"] == score_captions(CAPTIONS, GIVEN)["CIDEr-D"].corpus
    assert report["without_references"] == [13]
    assert "has no reference of 1 image (13), not scored" in err
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [10, 11, 12]
    expected = score_captions(CAPTIONS, GIVEN)["ROUGE-L"].per_image
    assert [line["ROUGE-L"] for line in lines] == list(expected)
    assert [line["caption"] for line in lines] == list(GIVEN.values())


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_other_forms_of_results(flickr8k, tmp_path, capsys, form):
    path = tmp_path / f"results.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"image": key, "caption": text}) + "\n" for key, text in GIVEN.items()))
    else:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("image_id", "caption"), *GIVEN.items()])
        path.write_text(text.getvalue(), newline="")
    assert run(capsys, flickr8k, path, "--json", tmp_path / "scores.json")[0] == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["BLEU-4"] == score_captions(CAPTIONS, GIVEN)["BLEU-4"].corpus


@pytest.mark.parametrize(
    ("image", "found"),
    [("x/1.jpg", 1), ("/data/x/1.jpg", 1), ("y\\1.jpg", 2), ("1.jpg", None), ("z/1.jpg", None), ("x/1", None)],
)
def test_a_file_name_belongs_to_the_only_image_whose_path_agrees(tmp_path, image, found):
    images = [{"id": 1, "file_name": "x/1.jpg"}, {"id": 2, "file_name": "y/1.jpg"}]
    annotations = [{"id": key, "image_id": key, "caption": "a"} for key in (1, 2)]
    (tmp_path / "refs.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    references = ReferenceCaptions.read(tmp_path / "refs.json")
    given = [Result(image, "this one"), Result(3 - found if found else 2, "the other")]
    if found:
        assert match(given, references, tmp_path)[found] == "this one"
    else:
        with pytest.raises(InputError, match="no image with a reference"):
            match(given, references, tmp_path)


def many(random, words):
    """Thirty images whose captions are drawn anew."""
    return {f"{number}.jpg": " ".join(random.choices(words, k=8)) for number in range(30)}


def test_two_systems(tmp_path, results, capsys):
    random = Random(0)
    words = [f"word{number}" for number in range(12)]
    texts = many(random, words)
    references = tmp_path / "references.txt"
    references.write_text("".join(f"{key}#0\t{text}\n" for key, text in texts.items()))
    better = results(texts.items(), "better.json")
    worse = results(many(random, words).items(), "worse.json")
    report = tmp_path / "scores.json"
    code, out, err = run(capsys, references, better, worse, "--json", report, "--per-image", tmp_path / "images.jsonl")
    assert code == 0 and not err
    assert "first: better.json" in out and "second: worse.json" in out and " yes " in out
    scores = json.loads(report.read_text())
    for metric in ("BLEU-1", "ROUGE-L", "CIDEr-D"):
        difference = scores["difference"][metric]
        assert difference["difference"] == pytest.approx(scores[metric] - scores["other"][metric])
        assert 0 < difference["low"] < difference["difference"] < difference["high"]
        assert difference["distinguishable"] is True
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [(line["results"], line["image_id"]) for line in lines] == [
        (str(path), key) for path in (better, worse) for key in texts
    ]
    code, out, _ = run(capsys, references, worse, worse)
    assert code == 0 and " yes " not in out and out.count(" no ") == 6
    code, _, err = run(capsys, references, better, better, better)
    assert code == 2 and "3 files of results are too many" in err


@pytest.mark.slow
def test_systems_that_are_as_good_are_rarely_told_apart(tmp_path, results):
    random = Random(3)
    words = [f"word{number}" for number in range(6)]
    told = 0
    for _ in range(10):
        references = tmp_path / "references.txt"
        references.write_text("".join(f"{key}#0\t{text}\n" for key, text in many(random, words).items()))
        paths = [results(many(random, words).items(), name) for name in ("a.json", "b.json")]
        told += evaluate(ReferenceCaptions.read(references), paths).verdicts["ROUGE-L"]
    assert told <= 3


def test_few_images_tell_no_systems_apart(flickr8k, results, tmp_path, capsys):
    better = results({key: texts[0] for key, texts in CAPTIONS.items()}.items(), "better.json")
    worse = results({key: "a cat on a" for key in CAPTIONS}.items(), "worse.json")
    code, out, err = run(capsys, flickr8k, better, worse, "--json", tmp_path / "scores.json")
    assert code == 0 and " yes " not in out and " no " not in out
    assert "3 images are too few to tell two systems apart" in err
    assert json.loads((tmp_path / "scores.json").read_text())["difference"]["CIDEr-D"]["distinguishable"] is None


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([*GIVEN.items(), ("a.jpg", "a")], "captions more than once 1 image (a.jpg)"),
        ([*GIVEN.items(), ("x/c.jpg", "a"), ("Images/c.jpg", "b")], "captions more than once 1 image (c.jpg)"),
        ([*GIVEN.items(), ("x.jpg", "a")], "1 image (x.jpg)"),
        ([*GIVEN.items(), ("a\u2028b\x1b.jpg", "a")], "1 image ('a\\u2028b\\x1b.jpg')"),
        ([*GIVEN.items()][1:], "does not caption, of"),
        ([], "3 images (a.jpg, b.jpg, c.jpg)"),
    ],
)
def test_ids_that_do_not_match_are_named_and_nothing_is_written(flickr8k, results, tmp_path, capsys, captions, message):
    code, out, err = run(capsys, flickr8k, results(captions), "--json", tmp_path / "scores.json")
    assert code == 2 and not out
    assert message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "scores.json").exists()


def test_all_that_does_not_match_is_told_at_once(flickr8k, results, capsys):
    _, _, err = run(capsys, flickr8k, results([("a.jpg", "a"), ("a.jpg", "b"), ("b", "a")]))
    assert "1 image (b); it captions more than once 1 image (a.jpg); it does not caption" in err
    assert "2 images (b.jpg, c.jpg)" in err


def test_an_image_without_references_is_no_image_to_score(coco, results, capsys):
    path = results([(10, "a"), (11, "a"), (12, "a"), (13, "a")])
    code, _, err = run(capsys, coco, path)
    assert code == 2 and "no image with a reference" in err and "1 image (13)" in err


def test_empty_captions_are_scored_and_named(flickr8k, results, tmp_path, capsys):
    captions = GIVEN | {"a.jpg": "", "b.jpg": " . "}
    code, _, err = run(capsys, flickr8k, results(captions.items()), "--json", tmp_path / "scores.json")
    assert code == 0
    assert "captions without a word of 2 images (a.jpg, b.jpg), scored as they are" in err
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["empty"] == ["a.jpg", "b.jpg"] and report["images"] == 3
    assert report["BLEU-1"] == score_captions(CAPTIONS, captions)["BLEU-1"].corpus


def test_mistakes_of_every_kind(flickr8k, coco, results, tmp_path, capsys):
    path = results(GIVEN.items())
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, message in [
        ((tmp_path / "nowhere", path), "does not exist"),
        ((empty, path), "fits no format of captions: there is none of Flickr8k.token.txt"),
        ((path, path), "is JSON but not COCO's"),
        ((flickr8k, tmp_path / "nowhere.json"), "does not exist"),
        ((flickr8k, path, "--split", "seen"), "no split 'seen'; choose from train, dev, test"),
        ((coco, path, "--split", "val"), "leave the split out"),
        ((flickr8k, path, "--train", tmp_path / "nowhere"), "does not exist"),
        ((flickr8k, path, "--json", tmp_path / "no" / "where.json"), "cannot be written"),
        ((flickr8k, path, "--per-image", tmp_path), "it is a folder"),
        ((flickr8k, path, "--seed", "-1"), "not a whole number"),
        ((flickr8k, path, "--json", path), "is named twice"),
        ((flickr8k, path, "--per-image", flickr8k / ".." / path.name), "is named twice"),
        ((coco, path, "--json", coco), "is named twice"),
        ((flickr8k, path, "--json", tmp_path / "x", "--per-image", tmp_path / "x"), "is named twice"),
        ((flickr8k,), "RESULTS"),
    ]:
        code, out, err = run(capsys, *args)
        assert code == 2 and not out, args
        assert message in err and len(err.splitlines()) == 1, err


def test_listed():
    assert listed([1]) == "1 image (1)"
    assert listed([1, "b\n"]) == "2 images (1, 'b\\n')"
    assert listed(range(22)).endswith("18, 19 and 2 more)")


def test_references_without_a_word_and_an_image_alone_are_remarked_on(tmp_path, results, capsys):
    references = tmp_path / "references.txt"
    references.write_text("a.jpg#0\t...\na.jpg#1\t!\n")
    code, _, err = run(capsys, references, results([("a.jpg", "a dog")]))
    assert code == 0
    assert "references without a word of 1 image (a.jpg)" in err
    assert "CIDEr-D of one image alone is 0" in err


def test_files_are_written_though_nobody_reads_the_tables(flickr8k, results, tmp_path):
    command = [sys.executable, "-c", "import sys; from captioner.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["score", flickr8k, results(GIVEN.items()), "--json", tmp_path / "scores.json"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.read()
    process.wait()
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 3


@pytest.mark.parametrize("missing", ["pycocoevalcap", "java", "a java that runs"])
def test_meteor_says_what_it_lacks(flickr8k, results, tmp_path, capsys, monkeypatch, missing):
    if missing == "pycocoevalcap":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        pytest.importorskip("pycocoevalcap")
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        if missing == "a java that runs":
            make_java(folder, "exit 1")
    code, out, err = run(capsys, flickr8k, results(GIVEN.items()), "--meteor")
    assert code == 2 and not out and err.startswith("captioner: METEOR needs ") and len(err.splitlines()) == 1
    assert ("captioner[java]" in err) == (missing == "pycocoevalcap")


def make_java(folder, script):
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)


@pytest.mark.parametrize("answer", ["exit 1", "echo nonsense"])
def test_a_meteor_that_fails_is_one_sentence_and_hangs_nothing(
    flickr8k, results, tmp_path, capsys, monkeypatch, answer
):
    pytest.importorskip("pycocoevalcap")
    folder = tmp_path / "bin"
    folder.mkdir()
    make_java(folder, f'[ "$1" = -version ] && exit 0\n{answer}')
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    code, out, err = run(capsys, flickr8k, results(GIVEN.items()), "--meteor")
    assert code == 2 and not out and "METEOR's program gave no score" in err and len(err.splitlines()) == 1


@pytest.mark.slow  # Java reads its tables twice
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor(flickr8k, results, tmp_path, capsys):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.meteor.meteor import Meteor

    captions = GIVEN | {"a.jpg": "a dog is running", "c.jpg": ""}
    code, out, _ = run(
        capsys, flickr8k, results(captions.items()), "--meteor", "--json", tmp_path / "s.json", "--per-image",
        tmp_path / "images.jsonl",
    )  # fmt: skip
    assert code == 0 and "METEOR" in out
    references = {key: [" ".join(ptb_tokenize(text)) for text in texts] for key, texts in CAPTIONS.items()}
    corpus, per_image = Meteor().compute_score(
        references, {key: [" ".join(ptb_tokenize(text))] for key, text in captions.items()}
    )
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["METEOR"] == pytest.approx(corpus, abs=1e-12)
    assert "METEOR" not in report["intervals"]
    lines = (tmp_path / "images.jsonl").read_text().splitlines()
    assert [json.loads(line)["METEOR"] for line in lines] == pytest.approx(per_image, abs=1e-12)


def test_its_help_fits_a_screen():
    code = "from captioner.cli import main; main(['score', '--help'])"
    environment = os.environ | {"COLUMNS": "80"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "RESULTS" in result.stdout
    assert len(result.stdout.splitlines()) <= 24
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_five_thousand_images_take_seconds(tmp_path):
    random = Random(0)
    words = [f"word{number}" for number in range(500)]

    def caption():
        return " ".join(random.choices(words, k=11)) + "."

    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(5000)]
    annotations = [{"id": key, "image_id": key % 5000, "caption": caption()} for key in range(25_000)]
    (tmp_path / "refs.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": number, "caption": caption()} for number in range(5000)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    code = (
        "import sys; from captioner.cli import main; "
        f"code = main(['score', {str(tmp_path / 'refs.json')!r}, {str(tmp_path / 'results.json')!r}]); "
        "assert not {'torch', 'lightning', 'nltk'} & set(sys.modules); sys.exit(code)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 20  # about 4 s; a busy machine may take longer


texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["a dog", "A dog.\u2028A cat", "a\rdog", "one\vtwo\ftwo", "", ".", "\x85", "5 1/2 dogs", "a dog runs on the grass"]
)
sets = st.dictionaries(st.integers(), st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=6)
deterministic = settings(derandomize=True, deadline=None, max_examples=40)


@deterministic
@given(sets, st.randoms(use_true_random=False))
def test_any_captions_have_scores_in_range_whatever_their_order(images, random):
    references = {key: list(captions) for key, (captions, _) in images.items()}
    hypotheses = {key: caption for key, (_, caption) in images.items()}
    scores = score_captions(references, hypotheses)
    order = random.sample([*images], len(images))
    shuffled = score_captions(
        {key: random.sample(references[key], len(references[key])) for key in reversed(order)},
        {key: hypotheses[key] for key in order},
    )
    place = [list(hypotheses).index(key) for key in order]
    for metric, score in scores.items():
        top = 10 if metric == "CIDEr-D" else 1
        for value in (score.corpus, *score.per_image):
            assert -1e-9 <= value <= top + 1e-9
        assert shuffled[metric].corpus == pytest.approx(score.corpus, abs=1e-9)
        assert shuffled[metric].per_image == pytest.approx(score.per_image[place], abs=1e-9)


@pytest.mark.slow
@deterministic
@given(st.lists(texts, min_size=2, max_size=8), st.sampled_from(["json", "jsonl", "csv"]))
def test_a_caption_never_reaches_another_image(tmp_path_factory, captions, form):
    # Each image's reference is its caption, with a word that no other has: only the right image scores.
    folder = tmp_path_factory.mktemp("aligned")
    marked = {number: f"image{number} {caption}" for number, caption in enumerate(captions)}
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in marked]
    annotations = [{"id": number, "image_id": number, "caption": text} for number, text in marked.items()]
    (folder / "refs.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    records = [{"image_id": number, "caption": text} for number, text in marked.items()]
    if form == "json":
        content = json.dumps(records, ensure_ascii=False)
    elif form == "jsonl":
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("image_id", "caption"), *marked.items()])
        content = text.getvalue()
    (folder / "results").write_bytes(content.encode())
    system = evaluate(ReferenceCaptions.read(folder / "refs.json"), [folder / "results"]).systems[0]
    assert system.captions == marked
    assert system.scores["ROUGE-L"].per_image == pytest.approx(1)
    assert system.scores["BLEU-1"].per_image == pytest.approx(1, abs=1e-6)


# Other languages

KOREAN = {1: ["빨간 원이 있다.", "원이 하나 있다"], 2: ["파란 별", "별이 보인다"]}


@pytest.fixture
def korean(tmp_path):
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in KOREAN]
    texts = [(number, text) for number, texts in KOREAN.items() for text in texts]
    annotations = [{"id": key, "image_id": number, "caption": text} for key, (number, text) in enumerate(texts)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters_score_alike(form, korean, results, tmp_path):
    captions = [(number, unicodedata.normalize(form, texts[0])) for number, texts in KOREAN.items()]
    assert main(["score", str(korean), str(results(captions)), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["BLEU-1"] == pytest.approx(1)
    german = score_captions({1: ["ein schöner Hund"]}, {1: unicodedata.normalize(form, "Ein schöner Hund")})
    assert german["BLEU-1"].corpus == pytest.approx(1)


def test_the_tokens_are_those_of_the_references_script_or_as_asked_and_are_said(korean, results, tmp_path, capsys):
    path = results([(1, "빨간 원이 있다"), (2, "파란 별 · 하나")])
    said, figures = {}, {}
    for choice in ("auto", "unicode", "ptb"):
        out = tmp_path / f"{choice}.json"
        assert main(["score", str(korean), str(path), "--tokenizer", choice, "--json", str(out)]) == 0
        (said[choice],) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Tokens: ")]
        figures[choice] = json.loads(out.read_text())
    assert said["auto"] == said["unicode"] != said["ptb"] and "Annex 29" in said["auto"] and "Penn" in said["ptb"]
    assert figures["auto"] == figures["unicode"] and figures["auto"]["tokenizer"] != figures["ptb"]["tokenizer"]
    assert figures["auto"]["BLEU-1"] != figures["ptb"]["BLEU-1"]  # "·" is a word of the one


def test_meteor_is_for_english(korean, results, capsys, monkeypatch):
    monkeypatch.setattr("captioner.metrics.find_meteor", lambda: None)
    assert main(["score", str(korean), str(results([(1, "원"), (2, "별")])), "--meteor"]) == 2
    assert "METEOR is for English captions" in capsys.readouterr().err
