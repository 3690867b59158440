r"""The tokens of COCO's evaluation, without Java.

COCO's tools cut captions with PTBTokenizer of Stanford CoreNLP 3.4.1, in lower case, and drop most punctuation (Chen et
al., "Microsoft COCO Captions: Data Collection and Evaluation Server", 2015). Scores compare only over the very same
tokens, so `ptb_tokenize` gives these, quirks and all. Its rules were found by comparing outputs: of every character, of
all words of up to five letters with a period, and of millions of random strings.

At each place the rule that looks at most characters wins, the ones behind its token included, and of two as long the
one that stands first. Rules see a transcript of the caption in which a character outside ASCII is replaced by one that
stands for its class (`_Transcript`), so that they can say [A-Za-zé] for the letters of all scripts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

# Dropped after tokenising. COCO's list has the brackets too, but in upper case (-LRB-) while its tokens are in lower
# case (-lrb-), so brackets stay, and published scores were reached with them.
DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})


def ptb_tokenize(caption: str) -> list[str]:
    r"""Return the lower-case Penn Treebank tokens of a caption, without the punctuation that COCO drops.

    They are those of COCO's evaluation, with two exceptions, in both of which it gives a caption to the wrong image or
    lets the next caption change this one: a line separator of any kind (CR, VT, FF, NEL, U+2028, U+2029) is a space
    here, as a line feed is there, and a last word such as "b." keeps its period whatever the next caption begins with.

    Parameters
    ----------
    caption
        The caption as published or generated.

    Returns
    -------
    list of str
        Without "." and the like; empty where the caption has nothing else. A token may hold a no-break space, where
        CoreNLP joins two words ("1\xa01/2").

    Examples
    --------
    >>> ptb_tokenize("A dog's ball.\nIt isn't (very) red!")
    ['a', 'dog', "'s", 'ball', 'it', 'is', "n't", '-lrb-', 'very', '-rrb-', 'red']
    """
    caption = _SEPARATOR.sub(" ", caption)
    transcript = caption.translate(_transcript)
    end = len(transcript)
    transcript += "  "  # a rule that looks behind its token finds what it finds before a further word
    rules = [rule for rule in _RULES if rule.needs in transcript]
    written = []
    position = 0
    while position < end:
        if plain := _PLAIN.match(transcript, position):
            words = _SPLIT.sub(r"\1 ", plain[0]).replace("'s", " 's").replace("n't", " n't")
            written.append(words.translate(_spaced))
            position = plain.end()
            continue
        longest = position
        for rule in rules:
            found = rule.match(transcript, position)
            if found and found.end() > longest:  # one does: the last two rules take any character
                longest, stop, write = found.end(), found.end("token"), rule.write
        written.append(write(caption[position:stop]))
        position = stop
    return [token for token in " ".join(written).lower().split(" ") if token and token not in DROPPED]


def _characters(ranges: str) -> frozenset[int]:
    bounds = [part.partition("-")[::2] for part in ranges.split()]
    return frozenset(code for first, last in bounds for code in range(int(first, 16), int(last or first, 16) + 1))


# Characters that are letters today and were not yet when CoreNLP's tables were made.
_LATER = _characters("""
    037f 0528-052f 0560 0588 05ef 0860-086a 0870-0887 0889-088f 08a1 08ad-08c9 0978 0980 09fc 0af9 0c34 0c5a
    0c5c-0c5d 0c80 0cdc-0cdd 0d04 0d54-0d56 0d5f 0de6-0def 0e86 0e89 0e8c 0e8e-0e93 0e98 0ea0 0ea8-0ea9 0eac 13f5
    13f8-13fd 16f1-16f8 170d 171f 1878 191d-191e 19b0-19c0 19c8-19c9 1b4c 1c80-1c8a 1c90-1cba 1cbd-1cbf 1cf2-1cf3
    1cfa 2c2f 2c5f 312e-312f 31bb-31bf 4db6-4dbf 9fcd-9fff a698-a69d a78f a794-a79f a7ab-a7dc a7f1-a7f7 a8fd-a8fe
    a9e0-a9e4 a9e6-a9ef a9f0-a9f9 a9fa-a9fe aa7e-aa7f ab30-ab5a ab5c-ab69 ab70-abbf
""")
# Marks and modifiers that its words may hold: accents, vowel signs, and their neighbours in the code charts.
_MARKS = _characters("""
    02c2-02c5 02d2-02df 02e5-02eb 02ed 02ef-036f 0375 0378-0379 0384-0385 03f6 0483-0487 055a-055f 0591-05bd 05bf
    05c1-05c2 05c4-05c5 05c7 0615-061a 064b-065e 0670 06d6-06e4 06e7-06ed 06fd-06fe 070f 0711 0730-074c 07a6-07b0
    07eb-07f3 0900-0903 093c 093e-094e 0951-0955 0962-0963 0981-0983 09bc 09be-09c4 09c7-09c8 09cb-09cd 09d7
    09e2-09e3 0a01-0a03 0a3c 0a3e-0a4f 0a81-0a83 0abc 0abe-0acf 0b82 0bbe-0bc2 0bc6-0bc8 0bca-0bcd 0c01-0c03
    0c3e-0c56 0d3e-0d44 0d46-0d48 0e31 0e34-0e3a 0e47-0e4e 0eb1 0eb4-0ebc 0ec8-0ecd
""")
# Characters that it keeps as tokens of their own.
_SYMBOLS = _characters("""
    00a1 00a5-00a9 00ac 00ae-00b1 00b4 00b6-00b8 00bf 00d7 00f7 037e 0387 0589 05be 05c0 05c3 05c6 05f3-05f4
    0600-0603 0606-060c 0614 061b 061e-061f 066a 066d 06d4 0700-070d 07f6-07f8 0964-0965 0e3f 0e4f 1fbd 2016-2017
    2020-2023 2030-2038 203b 203e-2042 207c-207e 208c-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118
    211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 2155-215e 2190-2bff 3002 3012 30fb ff01-ff0f
    ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6
""")
_SUPERSCRIPTS = _characters("00b2-00b3 00b9 2070 2074-2079")
_SUBSCRIPTS = _characters("2080-2089")
_SIGNS = _characters("207a-207b 208a-208b")  # raised and lowered plus and minus
_WIDE_SPACES = _characters("2000-200a 3000")
_THEMSELVES = _characters("0009 0020-007e 00a0") | frozenset(
    map(ord, "、“”‘’‛«»‹›‚„‟\x91\x92\x93\x94–—―\x96\x97…½¼¾⅓⅔⁄¢£¤€₠\x80\xad\u066b\u066c\u058a\u2010\u2011")
)


class _Transcript(dict[int, str]):
    """The table for `str.translate`, filled as characters come."""

    def __missing__(self, code: int) -> str:
        classes = [
            (_THEMSELVES, chr(code)),
            (_WIDE_SPACES, "\u3000"),
            (_MARKS, "\u0301"),
            (_SUPERSCRIPTS, "²"),
            (_SUBSCRIPTS, "₂"),
            (_SIGNS, "⁻"),
            (_SYMBOLS, "§"),
        ]
        known = [representative for characters, representative in classes if code in characters]
        self[code] = known[0] if known else self._letter(code)
        return self[code]

    @staticmethod
    def _letter(code: int) -> str:
        # CoreNLP reads UTF-16: a character beyond the first 65,536 is two halves to it, and neither a letter.
        category = unicodedata.category(chr(code))
        if code > 0xFFFF or code in _LATER:
            return "\uffff"
        if category == "Nd":
            return "٠"
        return "é" if category.startswith("L") or code in (0x1885, 0x1886) else "\uffff"  # Mongolian, marks since


_transcript = _Transcript()


def _as_it_is(token: str) -> str:
    return token.replace(" ", "\xa0")


def _without_soft_hyphens(token: str) -> str:
    return token.replace("\xad", "") or "-"


def _nothing(token: str) -> str:
    return ""


_CLITIC_MARKS = {"’": "'", "\x92": "'", "&apos;": "'", "‘": "`", "‛": "`", "\x91": "`"}


def _clitic(token: str) -> str:
    for mark, written in _CLITIC_MARKS.items():
        token = token.replace(mark, written)
    return token


def _dashes(token: str) -> str:
    return "--" if len(token) <= 4 else token


def _smiley(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _telephone(token: str) -> str:
    return _smiley(_as_it_is(token))


def _ampersand(token: str) -> str:
    return re.sub("(?i)&amp;", "&", token)


_REPLACED = {
    **{"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"},
    **{"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"},
    **{"¢": "cents", "£": "#", "¤": "$", "€": "$", "₠": "$", "\x80": "$"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
}
_NAMED = {"&quot;": "''", "&apos;": "'", "\xad": "-"}


def _replaced(token: str) -> str:
    return _NAMED.get(token) or "".join(_REPLACED.get(character, character) for character in token)


def _either(words: str) -> str:
    return "|".join(words.split())


def _capitalised(words: str) -> str:
    """Return a pattern of words whose first letter must be a capital."""
    return "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in words.split())


_SPACE = r"[ \t\xa0\u3000]"
_DIGIT = "[0-9٠]"
_ENTITY = "(?i:&[aeiou](?:acute|grave|uml);)"
_LETTER = rf"(?:[A-Za-zé\u0301\xad]|{_ENTITY})"
_LETTER_OR_DIGIT = rf"(?:[A-Za-zé\u0301\xad0-9٠]|{_ENTITY})"
_WORD = rf"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
_APOSTROPHE = r"(?:['’\x92]|(?i:&apos;))"
_QUOTE = r"(?:['’\x92`‘‛\x91]|(?i:&apos;))"  # any single quotation mark may be meant as an apostrophe
_CLITIC = "(?i:[msd]|re|ve|ll)"
_NOT = rf"[nN]{_QUOTE}[tT]"
_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG = (
    r"<[!?][A-Za-z\-][^>]*>"
    rf"|</{_NAME} *>"
    rf"""|<{_NAME}(?: +{_NAME}(?: *= *(?:'[^']*'|"[^"]*"))?)* *(?:/ *)?>"""
)
_HOST = r'[^ \t"<>|.!?(){},]'
# From , to _ is a range, with digits and capitals in it: an address that has one of these is cut up.
_BARE_HOST = r"""[^ \t"`'|!(){}$,-_]"""
_PATH = r'/[^ \t"<>|()]+[^ \t"<>|.!?(){},\-]'
_MAIL = r'[^ \t\xa0"<>|(){}]'
_MAIL_HOST = r'[^ \t\xa0"<>|(){}.]'
_ALPHANUMERIC = "[A-Za-z0-9é٠]"
_ELIDED = rf"[dDoOlL]{_QUOTE}{_ALPHANUMERIC}{{2,}}"  # o'clock, d'Arc
_COMPOUND_PART = rf"(?:{_ELIDED}|{_ALPHANUMERIC}+)"
_COMPOUND = rf"{_COMPOUND_PART}(?:[-_\u058a\u2010\u2011]{_COMPOUND_PART})*"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
_INITIALS_OF_TWO = r"(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r))"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*+(?:-(?:{_INITIALS}\.|[A-Za-z0-9\xad]+))+"
_JOINED = "[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"

# Words that keep their period. After those of the first list a sentence may end, and "Inc.x" is two tokens.
_ABBREVIATIONS = "|".join([
    "(?i:" + _either("""
        al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec ed\\.d esq est etc
        ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct
        okla penn ph\\.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
    """) + ")",
    _capitalised("ark az del ill la mass miss ore pa tex wash"),
    "(?i:pp?t)[ey][Ss]?",
])  # fmt: skip
_TITLES = "|".join([
    "(?i:" + _either("""
        adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen
        gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep
        reps rev sen sens sfc sgt spc st ste supt supts treas vs wm
    """) + ")",
    "[Mm][ft][Gg]",
    _INITIALS,
    "[A-Za-z]",
])  # fmt: skip
_NUMBERED = _either("art ca fig figs no nos op pp prop")  # keep their period before a number
# Before these a single letter loses its period: a sentence has ended.
_STARTERS = _capitalised(r"""
    a about according additionally after an as at but earlier he her here however if in it last many more mr\. ms\. now
    once one other our she since so some such that the their then there these they this we what when while yet you
""")
_NAME_PART = rf"(?:[A-Za-zé\u0301\xad0-9٠]++|{_ENTITY})++"  # of letters and digits
_EXTENSIONS = _either("""
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip
""")
_NUMBER = rf"(?:{_DIGIT}*(?:[.:,\xad\u066b\u066c]{_DIGIT}+)+|{_DIGIT}+)"
_IGNORED = r"\uffff\u2010\u2011\u058a\u066b\u066c"


class _Rule(NamedTuple):
    match: Callable[[str, int], re.Match[str] | None]
    write: Callable[[str], str]  # what becomes of the token
    needs: str  # without it in the caption the rule cannot match


def _rule(token: str, behind: str = "", write: Callable[[str], str] = _as_it_is, needs: str = "") -> _Rule:
    return _Rule(re.compile(f"(?P<token>{token}){behind}").match, write, needs)


_SEPARATOR = re.compile(r"[\n\r\v\f\x85\u2028\u2029]")
# Most captions are plain words. These need no rule: none looks past a space behind a word that begins with a letter.
_PLAIN_WORD = "[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*(?:'s)?|[A-Za-z]*[A-MO-Za-mo-z]n't"
_PLAIN_END = rf"(?:(?!(?:{_ABBREVIATIONS}|{_TITLES})\.)[A-Za-z][A-Za-z0-9]+)?[.!?] +$"
_PLAIN = re.compile(f"(?:(?:(?:{_PLAIN_WORD}),?|,)? )+(?:{_PLAIN_END}|(?!{_SPACE}))|{_PLAIN_END}")
_SPLIT = re.compile(
    "(?i)(?<![^ ])(can(?=not_)|gon(?=na_)|got(?=ta_)|lem(?=me_)|gim(?=me_)|wan(?=na_))".replace("_", "[ ,.!?]")
)
_spaced = str.maketrans(",.!?", "    ")

_RULES = [
    _rule("(?i:cannot|gonna|gotta|lemme|gimme|wanna)", write=lambda token: f"{token[:3]} {token[3:]}"),
    _rule(_TAG, needs="<"),
    _rule(r"(?i:&(?:md|mdash|ndash);)|[\x96\x97–—―]", write=_nothing),
    _rule("(?i:&amp;)", write=_ampersand, needs="&"),
    _rule("(?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);)", needs="&"),
    _rule("(?i:&nbsp;)", write=_nothing, needs="&"),
    _rule("(?i:&lt;)", write=lambda token: "<", needs="&"),
    _rule("(?i:&gt;)", write=lambda token: ">", needs="&"),
    _rule(_WORD, _APOSTROPHE + _CLITIC, _without_soft_hyphens),  # dog | 's
    _rule(rf"[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*(?={_NOT})", _NOT, _without_soft_hyphens),  # do | n't
    _rule(_WORD, write=_without_soft_hyphens),
    _rule(f"{_APOSTROPHE}[nN]{_APOSTROPHE}?|[lLdDjJ]{_APOSTROPHE}"),  # rock 'n' roll, l'
    _rule(
        f"(?i:dunkin|somethin|ol){_APOSTROPHE}|{_APOSTROPHE}(?i:em|till?|cause)|(?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est)"
    ),
    _rule(r"(?i:cont'd\.?|e'er|ev'ry|nat'l|nor'easter|s'mores|c'mon)|[lL][iI]'l", needs="'"),
    _rule(f"{_APOSTROPHE}(?:[2-9]0[sS]|[0-9]{{2}}(?={_SPACE}))"),  # '90s, '90
    _rule(f"[A-Za-zé]+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z][A-Za-zé]*|(?i:o{_QUOTE}o)"),  # ma'am
    _rule(f"[yY]{_APOSTROPHE}", "[A-Za-zé]"),  # y' | all
    _rule("'[tT]", "(?i:is|was)"),  # 't | is
    _rule(r'(?i:https?)://[^ \t"<>|(){}]+[^ \t"<>|.!?(){},\-]', needs="/"),
    _rule(rf"(?i:www)\.(?:{_HOST}+\.)+[a-zA-Z]{{2,4}}{_PATH}", needs="/"),
    _rule(rf"(?i:www)\.(?:{_HOST}+\.)+[a-zA-Z]{{2,4}}", needs="."),
    _rule(rf"(?:{_BARE_HOST}+\.)+(?i:com|net|org|edu){_PATH}", needs="/"),
    _rule(rf"(?:{_BARE_HOST}+\.)+(?i:com|net|org|edu)", needs="."),
    _rule(rf"(?:<|(?i:&lt;))?[a-zA-Z0-9]{_MAIL}*@(?:{_MAIL_HOST}+\.)*{_MAIL_HOST}+(?:>|(?i:&gt;))?", needs="@"),
    _rule("@[A-Za-z_][A-Za-z_0-9]*", needs="@"),
    _rule(f"#{_LETTER}+", needs="#"),
    _rule(_APOSTROPHE + _CLITIC, "[^A-Za-z]", _clitic),
    _rule(rf"{_DIGIT}{{1,2}}[\-/]{_DIGIT}{{1,2}}[\-/]{_DIGIT}{{2,4}}"),  # a date
    _rule(rf"[\-+]?{_NUMBER}", write=_without_soft_hyphens),
    _rule(rf"(?:{_DIGIT}{{1,4}}[\- \xa0])?{_DIGIT}{{1,4}}(?:\\?/|⁄){_DIGIT}{{1,4}}"),  # a fraction
    _rule("⁻?(?:²+|₂+)"),
    _rule(r"[A-Z]*\$|#+"),
    _rule(rf"(?:{_ABBREVIATIONS})\.", r"[\s\S]{2}", _without_soft_hyphens, "."),
    _rule("[A-Za-z]", rf"\.{_SPACE}+(?:{_STARTERS}|{_TAG}){_SPACE}", needs="."),
    _rule(rf"(?:{_TITLES})\.", write=_without_soft_hyphens, needs="."),
    _rule(rf"(?i:{_NUMBERED})\.", f"{_SPACE}?{_DIGIT}", needs="."),
    _rule(_INITIALS_OF_TWO, _SPACE, needs="."),
    # Before one of ,;: a word, and whatever else looks like one, keeps its period.
    _rule(rf"{_WORD}\.", "[,;:\u3001]", _without_soft_hyphens, "."),
    _rule(rf"{_COMPOUND}\.", "[,;:\u3001]", _without_soft_hyphens, "."),
    _rule(rf"{_HYPHENATED}\.", "[,;:\u3001]", _without_soft_hyphens, "."),
    _rule(rf"{_JOINED}\.", "[,;:\u3001]", _ampersand, "."),
    _rule(f"[nA-HJ-XZ]{_QUOTE}[A-Za-zé]{{2,}}"),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", needs="/"),  # and/or
    _rule(_JOINED, write=_ampersand),  # AT&T
    _rule("(?i:s(?:&|&amp;)ls)", write=_ampersand, needs="&"),  # savings and loans
    _rule(_COMPOUND),
    _rule(_HYPHENATED, write=_without_soft_hyphens),
    _rule(_NOT, "[^A-Za-z]", _clitic),
    _rule("'", r"[A-Za-z][^ \t\xa0]", _nothing),  # an opening quotation mark
    _rule(_APOSTROPHE + _CLITIC, write=_clitic),
    _rule("(?i:anti|pro)-", needs="-"),
    _rule(r"(?:\\[*]){1,3}"),
    _rule(r"(?i:c\+\+|[cf]#)"),
    _rule(rf"{_NAME_PART}(?:\.{_NAME_PART})*\.(?i:{_EXTENSIONS})", f"(?:{_SPACE}|[.?!,])", needs="."),
    _rule(  # a telephone number
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
        r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        write=_telephone,
    ),
    _rule('"', write=_nothing, needs='"'),
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", _smiley),  # :-)
    _rule(
        r"[\^x=~<>]\.\[\^[xX]=[^<]*<>\]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"
        "|[Oo]_[Oo]|[Tt]_[Tt]",
        write=_smiley,
    ),
    _rule(r"[`“”‘’‛«»‹›‚„‟\x91-\x94]{1,2}|''|'|(?i:&(?:quot|apos);)", write=_replaced),
    _rule(r"\.{3,5}|\.(?:[ \xa0]\.){2,4}|…", write=_nothing),
    _rule("[!?]+"),
    _rule("-+", write=_dashes),
    _rule(r"\*+|_+|@+|#+|<<|>>"),
    _rule(rf"{_SPACE}+|[{_IGNORED}]", write=_nothing),
    _rule(rf"[^ \t\xa0\u3000{_IGNORED}]", write=_replaced),
]
