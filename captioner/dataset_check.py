"""A dataset examined before training: what would stop it, what would falsify its scores, and what is odd."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from captioner.annotation_files import AnyFormat, CaptionedImage, CaptionFiles, CaptionList, ImageFolder
from captioner.caption_formats import CaptionLine, check_on_disk, found_beside, meaning_of
from captioner.content_splits import SPLITS
from captioner.errors import InputError, in_one_line
from captioner.image_stream import ImageFacts, examine_images
from captioner.images import find_images
from captioner.text_files import Fault
from captioner.tokens import Tokenizer, TokenizerChoice, choose_tokenizer, tokenize

# What neither stops training nor falsifies scores; every other kind of finding is an error.
REMARKS = (
    "no test split",
    "no split",
    "image without captions",
    "captions without image",
    "doubled image",
    "blank image",
    "small image",
    "extreme shape",
    "doubled caption",
    "few references",
    "unknown words",
    "long caption",
    "short caption",
    "garbled characters",
    "markup",
)
COUNTS = (1, 2, 3, 5, 10)  # the minimum counts whose vocabularies are told
SMALLEST = 32  # pixels of the shorter side
LONGEST_SHAPE = 5.0  # times the shorter side
OUTLIER = 4  # a caption is long or short if its words are that many times more or fewer than the median caption's
LONG = 20  # words: no caption that has no more is called long
USUAL = 0.9  # share of the images that must have as many captions before fewer are called few
# A replacement character, control characters that Latin-1 makes of other bytes, and UTF-8 that was read as Latin-1.
GARBLED = re.compile("[\ufffd\x00-\x08\x0e-\x1f\x7f-\x9f]")
TWICE = re.compile("[\xc2-\xf4][^\x00-\x7f]")
MARKUP = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|[a-zA-Z]{2,8});|</?[a-zA-Z][^<>]*>")


class Finding(NamedTuple):
    """Something about a dataset that is wrong or odd.

    Attributes
    ----------
    kind : str
        What it is, in a word or two.
    message : str
        A sentence that begins with the place.
    file : Path or None
        The file.
    line : int or None
        The line, counted from 1, where it has one.
    """

    kind: str
    message: str
    file: Path | None = None
    line: int | None = None

    @property
    def is_error(self) -> bool:
        """Whether it stops training or falsifies scores."""
        return self.kind not in REMARKS


class SplitFigures(NamedTuple):
    """The sizes of a split.

    Attributes
    ----------
    images, captions : int
        Images with a caption, and their captions.
    mean : float
        Mean number of words of a caption.
    percentiles : tuple of int
        Words of a caption: the 5th, 50th, 95th and 100th percentile.
    """

    images: int
    captions: int
    mean: float
    percentiles: tuple[int, ...]


class Coverage(NamedTuple):
    """A vocabulary of the training captions' words.

    Attributes
    ----------
    minimum_count : int
        How often the training captions hold each word at least.
    words : int
        Its size.
    known : dict
        By split the share of the words of its captions that are in it.
    """

    minimum_count: int
    words: int
    known: dict[str, float]


@dataclass
class Examination:
    """What was found of a dataset.

    Attributes
    ----------
    dataset, format : str
        Where it is, and the name of its format.
    splits : dict
        The figures of each split, as the dataset calls it.
    coverage : list of Coverage
        Of each of `COUNTS`.
    findings : list of Finding
        The errors first, those of a kind together, by file and line.
    tokenizer : str
        What cut captions into words, see `captioner.tokens`.
    """

    dataset: str
    format: str
    splits: dict[str, SplitFigures] = field(default_factory=dict)
    coverage: list[Coverage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tokenizer: Tokenizer = "ptb"

    @property
    def errors(self) -> int:
        """Number of findings that stop training or falsify scores."""
        return sum(finding.is_error for finding in self.findings)


def examine(
    files: CaptionFiles,
    *,
    minimum_count: int = 5,
    references: int | None = None,
    tokenizer: TokenizerChoice = "auto",
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Examine a dataset: its caption files, its splits, every image and every caption.

    Parameters
    ----------
    files
        The dataset.
    minimum_count
        A word that the training captions hold less often is unknown.
    references
        An image with fewer captions has too few. By default as many as most images have, if nine in ten have as many.
    tokenizer
        What cuts captions into words; "auto" chooses as training would.
    workers
        Processes that read images, see `read_images`.
    progress
        Told how many images were read, and of how many.

    Raises
    ------
    InputError
        If there is no dataset.
    """
    files = files.files if isinstance(files, AnyFormat) else files
    found: dict[str, Finding] = {}  # by message: each is told once, however often a file is read

    def note(fault: Fault) -> None:
        if fault.kind != "missing image":  # each of which is told below
            found.setdefault(str(fault), Finding(fault.kind, in_one_line(fault), fault.path, fault.line))

    try:
        read = files.by_split(note)
    except Fault as fault:
        note(fault)
        read = {}
    by_path = {record.path: record for name, records in read.items() if name != "" for record in records}
    check_on_disk(list(by_path.values()), files.folders, note)
    present = [path for path in by_path if path.exists()]
    facts: dict[Path, ImageFacts] = {}
    progress(0, len(present))
    with closing(examine_images(present, workers)) as examined:
        for path, fact in zip(present, examined, strict=True):
            facts[path] = fact
            progress(len(facts), len(present))

    splits = _assigned(files, read, facts)
    findings = [
        *found.values(),
        *(_of_splits(files, splits, read) if read else ()),  # or what is told already is why there are none
        *_of_files(by_path, facts),
        *_of_copies(splits, facts),
        *_of_folders(files, read, by_path),
    ]
    taught = (caption for record in splits.get(_train(splits), []) for caption in record.captions)
    chosen = choose_tokenizer(taught, tokenizer)
    tokens = {
        name: [[tokenize(caption, chosen) for caption in record.captions] for record in records]
        for name, records in splits.items()
    }
    counts = Counter(word for image in tokens.get(_train(splits), []) for caption in image for word in caption)
    bad = {(finding.file, finding.line) for finding in findings if finding.line is not None}
    of_captions = _of_captions(files, splits, tokens, counts, minimum_count, references)
    # A line whose bytes are no UTF-8 holds replacement characters, too.
    findings += (one for one in of_captions if one.kind != "garbled characters" or (one.file, one.line) not in bad)
    return Examination(
        in_one_line(files),
        files.format,
        {name: _figures(images) for name, images in tokens.items()},
        _coverage(counts, tokens),
        sorted(findings, key=lambda one: (not one.is_error, one.kind, str(one.file or ""), one.line or 0)),
        chosen,
    )


def _train(splits: dict[str, list[CaptionedImage]]) -> str:
    return next((name for name in splits if meaning_of(name) == "train"), "train")


def _assigned(
    files: CaptionFiles, read: dict[str | None, list[CaptionedImage]], facts: dict[Path, ImageFacts]
) -> dict[str, list[CaptionedImage]]:
    """Return the images of each split, those of a split by content where their files say."""
    splits = {name: records for name, records in read.items() if name}
    if None in read:
        assert isinstance(files, CaptionList)
        splits |= {name: [] for name in files.splits}
        for record in read[None]:
            if (fact := facts.get(record.path)) is not None and fact.digest:
                splits[files.content_split.of(bytes.fromhex(fact.digest))].append(record)
    return dict(sorted(splits.items(), key=lambda item: [*SPLITS, meaning_of(item[0])].index(meaning_of(item[0]))))


def _of_splits(
    files: CaptionFiles, splits: dict[str, list[CaptionedImage]], read: dict[str | None, list[CaptionedImage]]
) -> Iterator[Finding]:
    """Tell which splits are missing or empty."""
    for wanted in SPLITS:
        names = [name for name in splits if meaning_of(name) == wanted]
        if any(record.captions for name in names for record in splits[name]):
            continue
        file = _file_of(files, names[0] if names else wanted)
        what, advice = f"has no image in the split {wanted!r}", "say which images are in it"
        if None in read:
            advice = "by their contents the images fall into the others, so set other shares, another seed or a column"
        kind = "missing split" if wanted != "test" else "no test split"
        yield Finding(kind, f"{in_one_line(file)} {what}: {advice}.", file)
    if left := read.get(""):
        file = _file_of(files, "")
        yield Finding("no split", f"{in_one_line(file)} has captions of {len(left)} images that are in no split.", file)


def _file_of(files: CaptionFiles, split: str) -> Path:
    return Path(str(files).replace("{split}", split))


def _of_files(by_path: dict[Path, CaptionedImage], facts: dict[Path, ImageFacts]) -> Iterator[Finding]:
    """Tell which image files are missing or damaged, and what is odd about the others."""
    listings: dict[Path, dict[str, str]] = {}
    for path, record in by_path.items():
        name = in_one_line(path)
        fact = facts.get(path)
        if fact is None:
            listed = [caption for caption in record.captions if isinstance(caption, CaptionLine)]
            by = f", which {in_one_line(listed[0].file)} names in line {listed[0].line}" if listed else ""
            if path.parent not in listings:
                there = path.parent.iterdir() if path.parent.is_dir() else ()
                listings[path.parent] = {_plain(other.name): other.name for other in there}
            similar = listings[path.parent].get(_plain(path.name))
            advice = "put it there"
            if similar:
                composed = {unicodedata.normalize("NFC", each) for each in (similar, path.name)}
                how = ", the same letters composed otherwise in Unicode" if len(composed) == 1 else ""
                advice = f"there is {similar!r}{how}, rename it"
            yield Finding("missing image", f"{name} is missing{by}: {advice}.", path)
        elif fact.fault:
            yield Finding("damaged image", fact.fault, path)
        else:
            short, long = sorted(fact.size)
            size = f"{fact.size[0]} x {fact.size[1]} pixels"
            if fact.is_blank:
                yield Finding("blank image", f"{name} shows one colour only: see whether it is a stand-in.", path)
            if short < SMALLEST:
                yield Finding("small image", f"{name} has {size}, fewer than {SMALLEST} on a side.", path)
            if long > LONGEST_SHAPE * short:
                yield Finding("extreme shape", f"{name} has {size}, of which a square shows little.", path)


def _plain(name: str) -> str:
    """Return a file name as those take it that tell neither case nor Unicode's forms apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _of_copies(splits: dict[str, list[CaptionedImage]], facts: dict[Path, ImageFacts]) -> Iterator[Finding]:
    """Tell which images are in two splits, and which are twice in one."""
    same: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for name, records in splits.items():
        for record in records:
            fact = facts.get(record.path, ImageFacts(""))
            # What cannot be decoded is told by its bytes, and what cannot be read by its name.
            same[fact.pixels or fact.digest or str(record.path)].append((name, record.path))
    for (split, first), *others in same.values():
        for other, path in others:
            what = f"shows the same pixels as {in_one_line(first)}, and is"
            if path == first:
                what = "is"
            elif facts[path].digest == facts[first].digest:
                what = f"is a copy of {in_one_line(first)}, and so is"
            if other != split:
                advice = "leave it out of one, since scores on known images are too high"
                yield Finding(
                    "image in two splits", f"{in_one_line(path)} {what} in {other!r} and in {split!r}: {advice}.", path
                )
            else:
                yield Finding("doubled image", f"{in_one_line(path)} {what} twice in {split!r}: leave one out.", path)


def _of_folders(
    files: CaptionFiles, read: dict[str | None, list[CaptionedImage]], by_path: dict[Path, CaptionedImage]
) -> Iterator[Finding]:
    """Tell which images have no caption."""
    known = {record.path for records in read.values() for record in records}
    stems = {path.with_suffix("") for path in known}
    for path, record in by_path.items():
        if not record.captions:
            yield Finding("image without captions", f"{in_one_line(path)} has no caption.", path)
    for folder in sorted(files.folders):
        for path in _lying_in(folder):
            if path not in known:
                yield Finding(
                    "image without captions", f"{in_one_line(path)} has no caption in {in_one_line(files)}.", path
                )

    if isinstance(files, ImageFolder):
        for folder in sorted(files.folders):
            extension = files.captions or found_beside(folder) or ""
            for text in _lying_in(folder, (extension,)) if extension.startswith(".") else ():
                if text.with_suffix("") not in stems:
                    yield Finding("captions without image", f"{in_one_line(text)} is beside no image.", text)


def _lying_in(folder: Path, suffixes: tuple[str, ...] | None = None) -> list[Path]:
    """Return the images in a folder and those in it, or other files."""
    try:
        return find_images([folder], suffixes)
    except InputError:  # there is none, or no folder
        return []


def _of_captions(
    files: CaptionFiles,
    splits: dict[str, list[CaptionedImage]],
    tokens: dict[str, list[list[list[str]]]],
    counts: Counter[str],
    minimum_count: int,
    references: int | None,
) -> Iterator[Finding]:
    """Tell which captions are wrong or odd."""
    lengths = [len(words) for images in tokens.values() for image in images for words in image]
    middle = median(lengths) if lengths else 0
    longest = max(OUTLIER * middle, LONG)
    expected = (
        _expected([len(image) for images in tokens.values() for image in images]) if references is None else references
    )
    for split, records in splits.items():
        for record, image in zip(records, tokens[split], strict=True):
            if 0 < len(record.captions) < expected:
                has = f"has {len(record.captions)} of {expected} captions"
                yield Finding("few references", f"{in_one_line(record.path)} {has}.", record.path)
            seen: set[str] = set()
            for caption, words in zip(record.captions, image, strict=True):
                place = _Place(files, split, record, caption)
                plain = " ".join(unicodedata.normalize("NFC", caption).split())
                if plain in seen:
                    yield place.finding("doubled caption", "repeats a caption of its image")
                seen.add(plain)
                if not any(unicodedata.category(letter)[0] in "LNS" for letter in caption):
                    yield place.finding("caption without words", "has a caption without a word: write or remove it")
                elif counts and words and all(counts[word] < minimum_count for word in words):
                    rare = f"none of which stands {minimum_count} times in the training captions"
                    yield place.finding("unknown words", f"has a caption of unknown words only, {rare}")
                if len(words) > longest:
                    yield place.finding("long caption", f"has a caption of {len(words)} words, {middle:g} are usual")
                elif OUTLIER * len(words) < middle:
                    yield place.finding("short caption", f"has a caption of {len(words)} words, {middle:g} are usual")
                if GARBLED.search(caption) or _is_encoded_twice(caption):
                    yield place.finding("garbled characters", "has garbled characters: see how it was encoded")
                if mark := MARKUP.search(caption):
                    yield place.finding("markup", f"has {mark[0]!r} in a caption: remove what is no language")


class _Place(NamedTuple):
    """Where a caption stands."""

    files: CaptionFiles
    split: str
    record: CaptionedImage
    caption: str

    def finding(self, kind: str, what: str) -> Finding:
        """Return a finding of this caption."""
        shown = in_one_line(self.caption if len(self.caption) <= 60 else f"{self.caption[:57]}...")
        file, line = _file_of(self.files, self.split), None
        where = f"{in_one_line(file)}, image {in_one_line(self.record.image_id)}"
        if isinstance(self.caption, CaptionLine):
            file, line = self.caption.file, self.caption.line
            where = f"{in_one_line(file)}, line {line}"
        return Finding(kind, f"{where} {what} ({shown}).", file, line)


def _expected(numbers: Sequence[int]) -> int:
    """Return how many captions most images have, if nearly all have as many, or else one."""
    captioned = [number for number in numbers if number]
    if not captioned:
        return 1
    most = Counter(captioned).most_common(1)[0][0]
    return most if sum(number >= most for number in captioned) >= USUAL * len(captioned) else 1


def _is_encoded_twice(caption: str) -> bool:
    """Tell whether a caption is UTF-8 that was read as Windows' Western encoding: "Ã¤" for "ä"."""
    if not TWICE.search(caption):
        return False
    try:
        return caption.encode("cp1252").decode() != caption
    except UnicodeError:
        return False


def _figures(images: Iterable[Sequence[Sequence[str]]]) -> SplitFigures:
    captioned = [image for image in images if image]
    lengths = sorted(len(words) for image in captioned for words in image)
    if not lengths:
        return SplitFigures(0, 0, 0.0, (0, 0, 0, 0))
    percentiles = tuple(lengths[round(share * (len(lengths) - 1))] for share in (0.05, 0.5, 0.95, 1))
    return SplitFigures(len(captioned), len(lengths), sum(lengths) / len(lengths), percentiles)


def _coverage(counts: Counter[str], tokens: dict[str, list[list[list[str]]]]) -> list[Coverage]:
    """Return the vocabulary at each minimum count, and what it knows of each split."""
    spoken = {
        name: Counter(word for image in images for words in image for word in words) for name, images in tokens.items()
    }
    found = []
    for minimum in COUNTS:
        known = {
            name: sum(number for word, number in said.items() if counts[word] >= minimum) / said.total()
            for name, said in spoken.items()
            if said
        }
        found.append(Coverage(minimum, sum(number >= minimum for number in counts.values()), known))
    return found
