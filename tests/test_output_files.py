import json
import os

import pytest

from captioner.errors import InputError
from captioner.output_files import check_writable, write, write_parts


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "out.json"
    for text in ("one", "zwei, länger"):
        write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_character_is_escaped_as_in_json(tmp_path):
    write(tmp_path / "out.json", json.dumps("a\udc80b", ensure_ascii=False))
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == "a\udc80b"


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("before")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="out.json cannot be written .No space left"):
        write(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_parts_that_cannot_be_made_leave_what_was_there(tmp_path, error):
    def parts():
        yield "half"
        raise error

    path = tmp_path / "out.html"
    path.write_text("before")
    with pytest.raises(error):
        write_parts(path, parts())
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said_before(tmp_path):
    check_writable(tmp_path / "out.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match="missing is no folder"):
        check_writable(tmp_path / "missing" / "out.json")
