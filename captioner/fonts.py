"""Fonts for the letters of any script: which of the installed ones have them, and what to install where none has."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain

from matplotlib.font_manager import FontEntry, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font

DEFAULT = "DejaVu Sans"  # which matplotlib brings: Latin, Greek, Cyrillic, Hebrew, Arabic, and the faces of emoji
# The usual fonts of scripts, as the first word of a letter's Unicode name calls them. Han characters are drawn as in
# the language of the letters beside them: in a Korean caption as in Korea, in a Japanese one as in Japan.
USUAL = {
    "HANGUL": ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo"),
    "HIRAGANA": ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "IPAexGothic"),
    "KATAKANA": ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "IPAexGothic"),
    "CJK": ("Noto Sans CJK SC", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei"),
    "EMOJI": ("Noto Emoji", "Symbola", "Segoe UI Emoji"),
}
# What people call a script, a font that has it, and the package of that font on Debian and Ubuntu.
CJK = ("Noto Sans CJK", "fonts-noto-cjk")
MISSING = {
    "HANGUL": ("Korean", *CJK),
    "HIRAGANA": ("Japanese", *CJK),
    "KATAKANA": ("Japanese", *CJK),
    "CJK": ("Han", *CJK),
    "EMOJI": ("emoji", "Symbola, since coloured ones are not drawn,", "fonts-symbola"),
}


class FontWarning(UserWarning):
    """What is said of letters that no installed font has."""


def find_fonts(text: str) -> tuple[list[str], str | None]:
    """Find installed fonts that have the letters of a text together.

    Parameters
    ----------
    text
        Of any scripts.

    Returns
    -------
    families : list of str
        For matplotlib, which takes each letter from the first of them that has it.
    hint : str or None
        Where letters are in no font, and are drawn as boxes: which, and what to install.
    """
    letters = frozenset(filter(_is_drawn, text))
    families, missing = _cover(letters)
    if missing and list(_new_fonts({font.fname for font in fontManager.ttflist})):
        _cover.cache_clear()  # since that was found, fonts were installed
        families, missing = _cover(letters)
    if not missing:
        return [DEFAULT, *families], None
    lacking = [
        MISSING.get(script, (script.capitalize(), "Noto Sans", "fonts-noto-core"))
        for script in dict.fromkeys(map(_script, sorted(missing)))
    ]
    names, fonts, packages = (list(dict.fromkeys(each)) for each in zip(*lacking, strict=True))
    return [DEFAULT, *families], (
        f"No installed font has the letters of a caption in these scripts, {', '.join(names)}, so that they are drawn "
        f"as boxes: install {' and '.join(fonts)} (on Debian and Ubuntu: apt install {' '.join(packages)})."
    )


def _is_drawn(letter: str) -> bool:
    # Marks come with the letters that they stand on; a joiner or a choice of form has no shape.
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Mn", "Zl", "Zp", "Zs")


def _script(letter: str) -> str:
    if ord(letter) >= 0x1F000 and unicodedata.category(letter) in ("So", "Sk"):
        return "EMOJI"
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]


@functools.lru_cache(maxsize=256)
def _cover(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find families that have what the default has not, and the letters that are in none."""
    families = list[str]()
    for name, has in _installed({_script(letter) for letter in letters}):
        found = {letter for letter in letters if ord(letter) in has}
        if found and name != DEFAULT:
            families.append(name)
        letters -= found
        if not letters:
            break
    return tuple(families), letters


def _installed(scripts: set[str]) -> Iterator[tuple[str, frozenset[int]]]:
    """Give fonts and what they have: the default, the usual ones of the scripts, all others, those installed since."""
    known = {font.name: font for font in reversed(fontManager.ttflist) if font.style == "normal"}
    usual = chain.from_iterable(fonts for script, fonts in USUAL.items() if script in scripts)
    for name in dict.fromkeys((DEFAULT, *usual, *known)):
        if name in known:
            yield name, _letters(known[name].fname)
    # All of them, before one is used: a family's weights may be in several files.
    for font in list(_new_fonts({font.fname for font in fontManager.ttflist})):
        yield font.name, _letters(font.fname)


def _new_fonts(known: Iterable[str]) -> Iterator[FontEntry]:
    """Tell matplotlib of fonts that were installed after it made its list, which it keeps for good."""
    for path in sorted(set(findSystemFonts()).difference(known)):
        before = len(fontManager.ttflist)
        with suppress(Exception):  # a bitmap font, or a broken one
            fontManager.addfont(path)
        yield from fontManager.ttflist[before:]


@functools.lru_cache(maxsize=64)
def _letters(path: str) -> frozenset[int]:
    with suppress(Exception):  # the file is gone, or broken
        return frozenset(FT2Font(path).get_charmap())
    return frozenset()
