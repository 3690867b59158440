import json

import pytest

from captioner.errors import InputError
from captioner.results import Result, read_results, write_results

TEXT = 'a "dog"; two\u2028cats,\r\n\x0b\x0c\x85 é ünd 한글 😀'
RECORDS = [{"image_id": 42, "caption": TEXT}, {"image_id": "b.jpg", "caption": ""}]


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("ascii_only", [True, False])
def test_coco_results(tmp_path, ascii_only):
    path = write(tmp_path / "results.json", json.dumps(RECORDS, ensure_ascii=ascii_only, indent=1))
    assert read_results(path) == [Result(42, TEXT), Result("b.jpg", "")]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {42: TEXT, "b.jpg": ""})
    assert json.loads(path.read_text(encoding="utf-8")) == RECORDS
    assert read_results(path) == [Result(42, TEXT), Result("b.jpg", "")]
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path = write(tmp_path / "results.jsonl", lines[0] + "\r\n\n" + lines[1])
    assert read_results(path) == [Result(42, TEXT), Result("b.jpg", "")]


def test_one_json_line_is_a_result(tmp_path):
    path = write(tmp_path / "results.jsonl", json.dumps({"image": "a.jpg", "caption": "a", "log_probability": -1.5}))
    assert read_results(path) == [Result("a.jpg", "a")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(tmp_path, end):
    text = end.join(["score,file_name,caption", f"1,42,{quoted(TEXT)}", "2,b.jpg,", ""])
    path = write(tmp_path / "results.csv", "\ufeff" + text)
    assert read_results(path) == [Result("42", TEXT), Result("b.jpg", "")]


@pytest.mark.parametrize("delimiter", [";", "\t", ", "])
def test_csv_of_spreadsheets(tmp_path, delimiter):
    lines = [delimiter.join(("image_id", "caption")), delimiter.join(("7", "a dog")), " "]
    path = write(tmp_path / "results.csv", "\r\n".join(lines))
    assert [(result.image, result.caption.strip()) for result in read_results(path)] == [("7", "a dog")]


def test_whole_numbers_of_any_kind_and_empty_names(tmp_path):
    records = [{"image_id": 7.0, "caption": "a"}, {"image_id": None, "image": "", "file_name": "x.jpg", "caption": "b"}]
    assert read_results(write(tmp_path / "results.json", json.dumps(records))) == [Result(7, "a"), Result("x.jpg", "b")]


def test_image_id_comes_before_other_names(tmp_path):
    record = {"file_name": "x.jpg", "image": "y.jpg", "image_id": 1, "caption": "a"}
    assert read_results(write(tmp_path / "results.json", json.dumps([record]))) == [Result(1, "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[{]", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"image_id": 1,\n"caption": "a"}', "line 1 is not valid JSON: give a JSON list"),
        ('{"image_id": 1, "caption": "a"}\n{', "line 2 is not valid JSON"),
        ("[1]", "record 1 is not an object"),
        ('[{"caption": "a"}]', "record 1 names no image"),
        ('[{"image_id": null, "caption": "a"}]', "record 1 names no image"),
        ('[{"image_id": true, "caption": "a"}]', "record 1 names no image"),
        ('[{"image_id": 1.5, "caption": "a"}]', "record 1 names no image"),
        ('[{"image_id": "", "caption": "a"}]', "record 1 names no image"),
        ("[{}" + "0" * 5000 + "]", "is not valid JSON"),
        ('[{"image_id": 1' + "0" * 5000 + ', "caption": "a"}]', "is not valid JSON"),
        ('[{"image_id": 1, "caption": "\\ud800"}]', "half a character"),
        ('image_id"x,"caption\n', "is not valid CSV"),
        ('"image_id"x,caption\n', "line 1 is not valid CSV"),
        ("image_id,caption,caption\n", "each once"),
        ('{"annotations": [{"image_id": 1, "caption": "a"}]}', "line 1 names no image"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 7}]', r"record 2 \(image 7\) has no caption"),
        ('[{"image_id": 1, "caption": ["a"]}]', r"record 1 \(image 1\) has no caption"),
        ("a dog\na cat\n", "neither JSON nor CSV with the columns image_id and caption"),
        ("image_id,text\n1,a\n", "neither JSON nor CSV"),
        ("name,caption\n1,a\n", "neither JSON nor CSV"),
        ("image_id,caption\n1,a dog, running\n", "line 2 has more values than columns"),
        ("image_id,caption\n1,a\n2\n", r"line 3 \(image '2'\) has no caption"),
        ('image_id,caption\n1,"a" b\n', "line 2 is not valid CSV"),
        ('image_id,caption\n1,"a\n', "is not valid CSV"),
    ],
)
def test_damaged_file(tmp_path, content, message):
    path = write(tmp_path / "results", content)
    with pytest.raises(InputError, match=message) as raised:
        read_results(path)
    assert str(path) in str(raised.value)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_results(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path)
    (tmp_path / "latin.csv").write_bytes("image_id,caption\n1,é".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8"):
        read_results(tmp_path / "latin.csv")
