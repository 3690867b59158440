"""The captions of drawn scenes as sentences: how English and Korean write them, and how they are read again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "to the left of", "to the right of")
COUNTS = {"two": 2, "three": 3, "four": 4}

LONGEST = 16  # words


class Name(NamedTuple):
    """What an object is called by, in English words."""

    size: str
    colour: str
    shape: str


class Mention(NamedTuple):
    """An object named by words ``start`` to ``stop`` (exclusive) of a caption: [size] colour shape."""

    start: int
    stop: int
    size: str | None
    colour: str
    shape: str


class Relation(NamedTuple):
    """A relation said by words ``start`` to ``stop``, under its English name."""

    start: int
    stop: int
    name: str


class Count(NamedTuple):
    """A number of objects said by words ``start`` to ``stop``."""

    start: int
    stop: int
    value: int


Item = Mention | Relation | Count | str  # a str is a function word
Link = tuple[Relation, list[Mention], Mention]  # a relation, its subjects, its object


class Reading(NamedTuple):
    """What a caption says, and what is wrong with it as a sentence."""

    items: list[Item]
    links: list[Link]
    problems: list[str]


class Sentence(NamedTuple):
    """What a caption is to say: A stands in the relation to B, and so does C, or A to C.

    Attributes
    ----------
    a, b : Name
        The objects.
    thirds : tuple of Name
        Those of which one may be C.
    relation : str
        Its English name.
    number : str
        How many objects the scene has, "two" to "four".
    """

    a: Name
    b: Name
    thirds: tuple[Name, ...]
    relation: str
    number: str


class Grammar(ABC):
    """A language's captions of scenes.

    Attributes
    ----------
    of_two : tuple of str
        Templates of two objects and a relation.
    of_subjects, of_objects : str
        Templates of three objects: A and C are related to B, or A to B and C.
    """

    of_two: tuple[str, ...]
    of_subjects: str
    of_objects: str

    @abstractmethod
    def write(self, template: str, sentence: Sentence, generator: np.random.Generator) -> str:
        """Return a template filled with what a sentence says; the generator chooses sizes, articles, synonyms."""

    @abstractmethod
    def read(self, words: Sequence[str]) -> Reading:
        """Read a caption, whoever wrote it, phrase by phrase."""

    @abstractmethod
    def names(self, word: str) -> bool:
        """Tell whether a word is a colour's or a shape's, whatever its ending."""


class _English(Grammar):
    nouns = ("shapes", "objects")
    pictures = ("picture", "image")
    articles = ("a", "an", "the")
    function_words = (*pictures, "is", "are", "there", "shows", "with", "and", "where", "it")

    # A stands in relation R to B; a third object C, where there is one, stands in R to B too, or A in R to it.
    of_two = (
        "{a} is {r} {b}",
        "there is {a} {r} {b}",
        "{r} {b} is {a}",
        "{r} {b} there is {a}",
        "{b} and {a} {r} it",
        "{b} with {a} {r} it",
        "the {picture} shows {a} {r} {b}",
        "{count} {noun} where {a} is {r} {b}",
        "there are {count} {noun} with {a} {r} {b}",
        "the {picture} shows {count} {noun} and {a} is {r} {b}",
    )
    of_subjects = "{a} and {c} are {r} {b}"
    of_objects = "the {picture} shows {a} {r} {b} and {c}"

    def write(self, template: str, sentence: Sentence, generator: np.random.Generator) -> str:
        return template.format(
            a=self._phrase(sentence.a, generator),
            b=self._phrase(sentence.b, generator),
            c=self._phrase(sentence.thirds[generator.integers(len(sentence.thirds))], generator),
            r=sentence.relation,
            count=sentence.number,
            noun=self.nouns[generator.integers(len(self.nouns))],
            picture=self.pictures[generator.integers(len(self.pictures))],
        )

    def _phrase(self, item: Name, generator: np.random.Generator) -> str:
        """Name an object: always by colour and shape, sometimes by size."""
        name = f"{item.colour} {item.shape}"
        if generator.random() < 0.25:
            name = f"{item.size} {name}"
        if generator.random() < 0.3:
            return f"the {name}"
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"

    def names(self, word: str) -> bool:
        return word in COLOURS or word in SHAPES

    def read(self, words: Sequence[str]) -> Reading:
        items, problems = self._items(words)
        links, dangling = self._links(items)
        return Reading(items, links, problems + dangling)

    def _items(self, words: Sequence[str]) -> tuple[list[Item], list[str]]:
        """Read a caption's phrases in order, articles dropped, and what is wrong with them."""
        items: list[Item] = []
        problems: list[str] = []
        start = 0
        while start < len(words):
            word, phrase = words[start], self._phrase_at(words, start)
            if phrase is not None:
                if isinstance(phrase, Mention):
                    match items:
                        case [*_, Mention()]:
                            problems.append(f"nothing joins the object at word {start + 1} to the one before")
                        case [*_, Mention(colour=phrase.colour, shape=phrase.shape), "and"]:
                            problems.append(f"the object at word {start + 1} is joined to itself")
                items.append(phrase)
                start = phrase.stop
                continue
            following = words[start + 1] if start + 1 < len(words) else ""
            if word in self.articles:
                if not any(following in nouns for nouns in (SIZES, COLOURS, SHAPES, self.pictures)):
                    problems.append(f"the article at word {start + 1} has no noun")
            elif word in self.function_words:
                if word == following:
                    problems.append(f"word {start + 1}, '{word}', is repeated")
                items.append(word)
            elif word in SIZES or word in COLOURS or word in SHAPES or word in COUNTS or word in self.nouns:
                problems.append(f"word {start + 1}, '{word}', is part of no phrase")
            else:
                problems.append(f"word {start + 1}, '{word}', is unknown")
            start += 1
        if items and isinstance(items[-1], str) and items[-1] != "it":
            problems.append(f"the caption breaks off after '{items[-1]}'")
        return items, problems

    def _phrase_at(self, words: Sequence[str], start: int) -> Mention | Relation | Count | None:
        """Read the phrase that starts at a word: an object, a relation or a count."""
        for name in RELATIONS:
            stop = start + len(name.split())
            if " ".join(words[start:stop]) == name:
                return Relation(start, stop, name)
        first, second, third = (*words[start : start + 3], "", "", "")[:3]
        if first in COUNTS and second in self.nouns:
            return Count(start, start + 2, COUNTS[first])
        if first in COLOURS and second in SHAPES:
            return Mention(start, start + 2, None, first, second)
        if first in SIZES and second in COLOURS and third in SHAPES:
            return Mention(start, start + 3, first, second, third)
        return None

    def _links(self, items: Sequence[Item]) -> tuple[list[Link], list[str]]:
        """Link every relation's subjects to its object: "A is R B", "A and C are R B", "R B is A", "B and A R it"."""
        links: list[Link] = []
        problems: list[str] = []
        for k, relation in enumerate(items):
            if not isinstance(relation, Relation):
                continue
            before, after = list(items[:k]), list(items[k + 1 :])
            verb = before.pop() if before and before[-1] in ("is", "are") else None
            subjects: list[Mention] = []
            while before and isinstance(subject := before.pop(), Mention):
                subjects.append(subject)
                if verb != "are" or not before or before.pop() != "and":
                    break
            target = after[0] if after else None
            if target == "it":  # what was named last before the subject
                target = next((item for item in reversed(before) if isinstance(item, Mention)), None)
            elif not subjects and verb is None:
                following = [item for item in after[1:4] if item != "there"]
                if following[:1] == ["is"]:
                    subjects += [item for item in following[1:2] if isinstance(item, Mention)]
            if not subjects or not isinstance(target, Mention):
                problems.append(f"'{relation.name}' does not relate two objects")
            elif any((a.colour, a.shape) == (target.colour, target.shape) for a in subjects):
                problems.append(f"'{relation.name}' relates an object to itself")
            else:
                links.append((relation, subjects, target))
                match after:  # "A R B and C" says that A is R both, unless C begins a clause of its own
                    case [Mention(), "and", Mention() as second, *rest] if not rest or not (
                        isinstance(rest[0], Relation) or rest[0] in ("is", "are")
                    ):
                        links.append((relation, subjects, second))
        return links, problems


def _final(word: str) -> int:
    """Return the number of the consonant that a Hangul syllable ends with; 0: none."""
    return (ord(word[-1]) - 0xAC00) % 28


class Named(NamedTuple):
    """A shape's word with its particle: the shape, and what the particle makes of it."""

    shape: str
    role: str


class _Korean(Grammar):
    """Korean, in the plain style of written captions; colours stand before the shape, particles behind it."""

    shapes = dict(zip(SHAPES, ("원", "정사각형", "삼각형", "별", "십자가", "고리"), strict=True))
    colours = dict(zip(COLOURS, ("빨간", "초록색", "파란", "노란", "보라색", "주황색", "하얀", "검은"), strict=True))
    sizes = dict(zip(SIZES, ("작은", "큰"), strict=True))
    relations = dict(zip(RELATIONS, ("위에", "아래에", "왼쪽에", "오른쪽에"), strict=True))
    counts = dict(zip(COUNTS, ("두", "세", "네"), strict=True))
    nouns = ("도형", "물체")
    pictures = ("그림", "이미지")
    # Behind a consonant, and behind a vowel. "is" is the copula, which ends a sentence; "of" joins to a relation.
    particles = {
        "topic": ("은", "는"),
        "subject": ("이", "가"),
        "and": ("과", "와"),
        "of": ("의", "의"),
        "is": ("이다", "다"),
        "bare": ("", ""),
    }
    # 그: it; 있다, 있고, 있는: is, is and, that is; 보인다, 보이고, 보이는: the same of seen; 것은: what is so;
    # 중: of these.
    function_words = ("그", "있다", "있고", "있는", "것은", "보인다", "보이고", "보이는", "중")
    endings = ("있다", "보인다")

    # What is new to the reader stands behind the place where it is, as Korean has it; a topic stands before it. Mostly
    # a word such as 있는 parts a relation from the object that it leads to, as "a" and "the" do in English: a decoder
    # looks at the image before it reads the word before (Xu et al., eq. 4 and 5), so it could not look there at once.
    of_two = (
        "{a:topic} {b:at} {r} 있다",
        "{b:at} {r} {a:subject} 있다",
        "{b:at} {r} 있는 것은 {a:is}",
        "{b:at} {r} 보이는 것은 {a:is}",
        "{b:and} 그 {r} 있는 {a:bare}",
        "{b:subject} 있고 그 {r} 있는 것은 {a:is}",
        "{picture}에 {b:at} {r} 있는 {a:subject} 보인다",
        "{noun} {count} 개 중 {b:at} {r} 있는 것은 {a:is}",
        "{noun:subject} {count} 개 있고 {b:at} {r} 있는 것은 {a:is}",
        "{picture}에 {noun:subject} {count} 개 보이고 {b:at} {r} 보이는 것은 {a:is}",
    )
    of_subjects = "{a:and} {c:topic} {b:at} {r} 있다"
    of_objects = "{picture}에 {b:and} {c:at} {r} 있는 {a:subject} 보인다"

    def write(self, template: str, sentence: Sentence, generator: np.random.Generator) -> str:
        # "at" is what stands before a relation, with or without its particle.
        at = "of" if generator.random() < 0.3 else "bare"
        return template.replace(":at}", f":{at}}}").format(
            a=self._phrase(sentence.a, generator),
            b=self._phrase(sentence.b, generator),
            c=self._phrase(sentence.thirds[generator.integers(len(sentence.thirds))], generator),
            r=self.relations[sentence.relation],
            count=self.counts[sentence.number],
            noun=_Noun(self.nouns[generator.integers(len(self.nouns))]),
            picture=self.pictures[generator.integers(len(self.pictures))],
        )

    def _phrase(self, item: Name, generator: np.random.Generator) -> _Noun:
        name = f"{self.colours[item.colour]} {self.shapes[item.shape]}"
        return _Noun(f"{self.sizes[item.size]} {name}" if generator.random() < 0.25 else name)

    def names(self, word: str) -> bool:
        return word in self._named or word in self.colours.values()

    @property
    def _named(self) -> Mapping[str, Named]:
        return _NAMED

    def read(self, words: Sequence[str]) -> Reading:
        items: list[Item] = []
        roles: dict[Mention, str] = {}
        problems: list[str] = []
        start = 0
        while start < len(words):
            found = self._phrase_at(words, start)
            word = words[start]
            if isinstance(found, Mention):
                named = self._named[words[found.stop - 1]]
                before = items[-1] if items else None
                if isinstance(before, Mention):
                    if roles[before] not in ("and", "topic"):
                        problems.append(f"nothing joins the object at word {start + 1} to the one before")
                    elif (before.colour, before.shape) == (found.colour, found.shape):
                        problems.append(f"the object at word {start + 1} is joined to itself")
                roles[found] = named.role
            if found is not None:
                items.append(found)
                start = found.stop
                continue
            if word in self.function_words or word.removesuffix("에") in self.pictures:
                if words[start + 1 : start + 2] == [word]:
                    problems.append(f"word {start + 1}, '{word}', is repeated")
                items.append(word)
            else:
                problems.append(f"word {start + 1}, '{word}', is unknown, or part of no phrase")
            start += 1
        last = items[-1] if items else None
        ends = roles[last] in ("bare", "is") if isinstance(last, Mention) else last in self.endings
        if items and not ends:
            problems.append(f"the caption breaks off after '{words[-1]}'")
        links, dangling = self._links(items, roles)
        return Reading(items, links, problems + dangling)

    def _phrase_at(self, words: Sequence[str], start: int) -> Mention | Relation | Count | None:
        colours = {korean: english for english, korean in self.colours.items()}
        sizes = {korean: english for english, korean in self.sizes.items()}
        first, second, third = (*words[start : start + 3], "", "", "")[:3]
        for name, said in self.relations.items():
            if first in (said, f"{said}는"):
                return Relation(start, start + 1, name)
        counted = [noun for noun in self.nouns if first in (noun, f"{_Noun(noun):subject}")]
        for number, said in self.counts.items():
            if counted and (second, third) == (said, "개"):
                return Count(start, start + 3, COUNTS[number])
        if first in colours and second in self._named:
            return Mention(start, start + 2, None, colours[first], self._named[second].shape)
        if first in sizes and second in colours and third in self._named:
            return Mention(start, start + 3, sizes[first], colours[second], self._named[third].shape)
        return None

    def _links(self, items: Sequence[Item], roles: Mapping[Mention, str]) -> tuple[list[Link], list[str]]:
        """Link every relation's subjects to its object: "A는 B R 있다", "B R A가 있다", "B R 있는 A", "B와 그 R A"."""
        links: list[Link] = []
        problems: list[str] = []
        for place, relation in enumerate(items):
            if not isinstance(relation, Relation):
                continue
            before, behind = list(items[:place]), iter(items[place + 1 :])
            targets = self._targets(before, roles)
            subjects = self._subjects_behind(behind) or self._subjects_before(before, roles)
            if not targets or not subjects:
                problems.append(f"'{relation.name}' does not relate two objects")
            elif any((a.colour, a.shape) == (b.colour, b.shape) for a in subjects for b in targets):
                problems.append(f"'{relation.name}' relates an object to itself")
            else:
                links += [(relation, subjects, target) for target in targets]
        return links, problems

    def _targets(self, before: list[Item], roles: Mapping[Mention, str]) -> list[Mention]:
        """Take from the end of what stands before a relation the objects that it relates to."""
        last = before.pop() if before else None
        if last == "그":  # what was named last
            return next(([item] for item in reversed(before) if isinstance(item, Mention)), [])
        if not isinstance(last, Mention) or roles[last] not in ("bare", "of"):
            return []
        targets = [last]
        while before and isinstance(one := before[-1], Mention) and roles[one] == "and":
            targets.append(one)
            before.pop()
        return targets

    def _subjects_behind(self, behind: Iterator[Item]) -> list[Mention]:
        following = next(behind, None)
        if following in ("있는", "보이는"):
            following = next(behind, None)
            if following == "것은":
                following = next(behind, None)
        return [following] if isinstance(following, Mention) else []

    def _subjects_before(self, before: list[Item], roles: Mapping[Mention, str]) -> list[Mention]:
        subjects: list[Mention] = []
        while before and isinstance(one := before.pop(), Mention):
            if roles[one] != ("and" if subjects else "topic"):
                break
            subjects.append(one)
        return subjects


class _Noun(str):
    """A Korean noun, to which a format adds the particle that fits its last sound."""

    def __format__(self, role: str) -> str:
        return f"{str(self)}{_Korean.particles[role][not _final(self)]}" if role else str(self)


_NAMED = {
    f"{_Noun(said):{role}}": Named(shape, role) for shape, said in _Korean.shapes.items() for role in _Korean.particles
}
GRAMMARS: dict[str, Grammar] = {"en": _English(), "ko": _Korean()}


def language_of(words: Sequence[str]) -> str:
    """Return the language of a caption: that of its first colour or shape, and English where it has none."""
    named = (language for word in words for language, grammar in GRAMMARS.items() if grammar.names(word))
    return next(named, "en")
