import shutil

import pytest
from matplotlib import get_data_path

from captioner import fonts
from captioner.fonts import DEFAULT, find_fonts


def letters(text):
    return frozenset(map(ord, text))


@pytest.fixture
def installed(monkeypatch):
    """Make fonts that have given letters the only ones, in that order."""

    def install(**families):
        fonts._cover.cache_clear()
        monkeypatch.setattr(fonts, "_installed", lambda scripts: iter(families.items()))

    yield install
    fonts._cover.cache_clear()


def test_what_matplotlibs_own_font_has_needs_no_other():
    assert find_fonts("a dog's ball: ёлка, שלום, كلب, ½") == ([DEFAULT], None)


def test_fonts_are_taken_until_all_letters_are_had(installed):
    installed(Latin=letters("adog"), Greek=letters("αβ"), Korean=letters("개"), Thai=letters("ไ"))
    assert find_fonts("a dog 개 α") == ([DEFAULT, "Latin", "Greek", "Korean"], None)


@pytest.mark.parametrize(
    ("text", "said", "packages"),
    [
        ("빨간 개", "Korean", "fonts-noto-cjk"),
        ("いぬ", "Japanese", "fonts-noto-cjk"),
        ("狗", "Han", "fonts-noto-cjk"),
        ("犬のボール", "Japanese, Han", "fonts-noto-cjk"),
        ("หมา", "Thai", "fonts-noto-core"),
        ("🐕", "emoji", "fonts-symbola"),
        ("개 🐕 👩‍🚀", "Korean, emoji", "fonts-noto-cjk fonts-symbola"),
    ],
)
def test_what_no_font_has_is_said_in_one_sentence_with_what_to_install(text, said, packages, installed):
    installed(Latin=letters("abc"))
    families, hint = find_fonts(f"a {text}")
    assert families == [DEFAULT, "Latin"]
    assert f"in these scripts, {said}," in hint and f"apt install {packages})." in hint and hint.count(".") == 1


def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_found(monkeypatch, tmp_path):
    path = shutil.copy(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", tmp_path)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts.fontManager, "ttflist", [])
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [path, str(tmp_path / "broken.ttf")])
    fonts._cover.cache_clear()
    assert find_fonts("a dog") == ([DEFAULT, "DejaVu Sans Mono"], None)
    fonts._cover.cache_clear()


def test_a_font_that_is_installed_after_letters_were_missed_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts.fontManager, "ttflist", [])
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    fonts._cover.cache_clear()
    assert "No installed font" in find_fonts("a dog")[1]
    path = shutil.copy(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", tmp_path)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [path])
    assert find_fonts("a dog") == ([DEFAULT, "DejaVu Sans Mono"], None)
    fonts._cover.cache_clear()


def test_han_is_drawn_as_the_letters_beside_it(monkeypatch):
    usual = [name for names in fonts.USUAL.values() for name in names]
    monkeypatch.setattr(fonts, "_letters", lambda path: letters("犬개のa") if path != DEFAULT else letters("a"))
    entries = [fonts.FontEntry(fname=name, name=name, style="normal") for name in [DEFAULT, *sorted(usual)]]
    monkeypatch.setattr(fonts.fontManager, "ttflist", entries)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    for text, first in (("犬 개", "KR"), ("犬 の", "JP"), ("犬", "SC")):
        fonts._cover.cache_clear()
        assert find_fonts(text)[0][1] == f"Noto Sans CJK {first}"
    fonts._cover.cache_clear()
