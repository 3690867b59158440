"""The page of overlays: what is in the file, its maps by the numbers, and what it does in a real browser."""

import base64
import hashlib
import html
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_overlay import CROP, SQUASH, caption_of

from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.overlay import _spread, attention_map, region_weights, relative_entropy
from captioner.overlay_page import BYTES, SIDE, PageImage, _jpeg, article, write_page

HOSTILE = "\"><script>alert('a')</script><img src=http://example.org/x.png onerror=alert(1)>"


def photograph(width, height, seed=0):
    """Something smooth, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class Elements(HTMLParser):
    """All elements of a page with their attributes and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def of(self, tag, kind=None):
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.found
            if name == tag and (kind is None or attributes.get("class") == kind)
        ]


@pytest.fixture
def page(tmp_path):
    def make(*images, preprocessing=CROP, **more):
        path = tmp_path / "page.html"
        write_page(path, images, preprocessing, **more)
        return Elements(path.read_text(encoding="utf-8"))

    return make


# The file


def test_a_page_has_each_image_once_and_each_word_with_its_numbers(page):
    captions = [caption_of("a dog on grass"), caption_of("two cats", gates=False, grid=(14, 14))]
    elements = page(
        PageImage("one.jpg", photograph(300, 200), captions[:1]), PageImage("two.jpg", photograph(50, 90), captions[1:])
    )
    assert not elements.open
    assert [text for _, text in elements.of("h2")] == ["one.jpg", "two.jpg"]
    images = elements.of("img")
    assert [attributes["alt"] for attributes, _ in images] == ["a dog on grass", "two cats"]
    for (attributes, _), size in zip(images, ((300, 200), (50, 90)), strict=True):
        assert (int(attributes["width"]), int(attributes["height"])) == size
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == size
    words = elements.of("button", "word")
    entropies = [entropy for caption in captions for entropy in relative_entropy(caption)]
    gates = [f"β {gate:.2f} " for gate in captions[0].gates] + ["", ""]
    said = "a dog on grass two cats".split()
    for (_, text), word, gate, entropy in zip(words, said, gates, entropies, strict=True):
        assert text == f"{word}{gate}H {entropy:.2f}"


def test_an_image_may_have_several_captions(page):
    elements = page(PageImage("one.jpg", photograph(30, 20), [caption_of("a dog"), caption_of("two cats")]))
    assert [text.split("β")[0].strip() for _, text in elements.of("button", "word")] == ["a", "dog", "two", "cats"]
    assert len(elements.of("div", "caption")) == 2 and len(elements.of("img")) == 1


@pytest.mark.parametrize("preprocessing", [CROP, SQUASH, Preprocessing("crop", 96)])
@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 5)])
@pytest.mark.parametrize("view", ["smooth", "raw"])
def test_the_page_has_the_numbers_of_the_maps(page, preprocessing, grid, view):
    caption = caption_of("a dog", grid)
    elements = page(PageImage("one.jpg", photograph(240, 200), [caption]), preprocessing=preprocessing)
    (given,) = (attributes for attributes, _ in elements.of("article"))
    shape = tuple(map(int, given["data-grid"].split()))
    left, top, right, bottom = map(float, given["data-box"].split())
    assert shape == grid
    for index, (attributes, _) in enumerate(elements.of("button", "word")):
        weights = np.frombuffer(base64.b64decode(attributes["data-weights"]), dtype="<u2").reshape(grid) / 65535
        wanted = attention_map(caption, index, (240, 200), preprocessing, view)
        found = _spread(weights, (200, 240), (240 * left, 200 * top, 240 * right, 200 * bottom), view)
        assert np.abs(found - wanted).max() < 2e-5 * wanted.max()


@pytest.mark.parametrize(
    "text", [HOSTILE, "</title></script><!--", "a' onclick='x", "a\u202eb\n\x00c", "a\udc80b", "개 🐕 👩‍🚀"]
)
def test_what_captions_and_names_say_is_text(page, text):
    words = text.split()
    caption = caption_of(" ".join(["w"] * len(words)))
    caption.words[:] = words
    elements = page(PageImage(text, photograph(30, 20), [caption]), title=text)
    assert not elements.open and len(elements.of("script")) == 1 and len(elements.of("img")) == 1
    plain = text.encode("utf-8", "backslashreplace").decode()
    assert [shown.split("β")[0].strip() for _, shown in elements.of("button", "word")] == plain.split()
    ((_, title),), ((_, heading),) = elements.of("title"), elements.of("h2")
    assert title == heading and all(letter.isprintable() for letter in title)


def test_nothing_runs_but_its_own_script_and_nothing_is_fetched(page):
    elements = page(PageImage(HOSTILE, photograph(30, 20), [caption_of("a dog")]))
    (policy,) = (given["content"] for given, _ in elements.of("meta") if given.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    kinds = ("default-src", "img-src", "style-src", "script-src", "connect-src", "base-uri", "form-action")
    assert tuple(rules) == kinds and rules["img-src"] == "data:"
    assert all(rules[kind] == "'none'" for kind in ("default-src", "connect-src", "base-uri", "form-action"))
    for tag in ("style", "script"):
        ((attributes, text),) = elements.of(tag)
        own = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert not attributes and rules[f"{tag}-src"] == f"'sha256-{own}'"
        assert "http" not in text and "url(" not in text and "import" not in text
    for _, attributes, _ in elements.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert all(attributes[name].startswith("data:") for name in ("src", "href") if name in attributes)


def test_words_run_as_their_letters_do(page):
    elements = page(PageImage("one.jpg", photograph(30, 20), [caption_of("كلب يركض")]))
    ((caption, _),) = elements.of("div", "caption")
    assert caption["dir"] == "auto"


def test_a_hundred_images_stay_below_20_mb():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8))
    data, size = _jpeg(noise)  # no photograph is larger
    assert len(data) <= BYTES and size == (SIDE, SIDE)
    worst = article(PageImage("x" * 200, noise, [caption_of(" ".join(["word"] * 20), (14, 14))]), CROP)
    assert 100 * len(worst.encode()) < 19.9e6


@pytest.mark.parametrize(("size", "shown"), [((3000, 1500), (640, 320)), ((2, 3000), (1, 640)), ((5, 3), (5, 3))])
def test_photographs_are_made_small_and_never_large(size, shown):
    assert _jpeg(photograph(*size))[1] == shown


def test_a_caption_without_attention_leaves_no_page(tmp_path):
    caption = replace(caption_of("a dog"), attention=None)
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(InputError, match="carries no attention"):
        write_page(path, [PageImage("one.jpg", photograph(30, 20), [caption])], CROP)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# In a browser

DESKTOP = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
IMAGES = [
    PageImage("one.jpg", photograph(300, 250), [caption_of("a dog on grass")]),
    PageImage(HOSTILE, photograph(40, 60, 1), [caption_of(f"two cats {html.escape('<i>')}", (3, 5), gates=False)]),
]


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page of two images; whatever it asks for or complains of is a failure."""
    contexts, asked, faults = [], [], []

    def open_page(device=DESKTOP, preprocessing=CROP, **more):
        path = tmp_path / "page.html"
        write_page(path, IMAGES, preprocessing, **more)
        contexts.append(browser.new_context(**device))
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: faults.extend([message.text] * (message.type == "error")))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: faults.append(dialog.message))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
    assert asked and all(url.startswith(("data:", "file:")) for url in asked)


def pixels(tab, image=0):
    """What is drawn over an image: (height, width, 4)."""
    url = tab.evaluate("image => document.querySelectorAll('canvas')[image].toDataURL()", image)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))


def lit(tab):
    return tab.evaluate("[...document.querySelectorAll('.word.shown span')].map(word => word.textContent)")


@pytest.mark.slow
@pytest.mark.parametrize(("preprocessing", "view"), [(CROP, "smooth"), (SQUASH, "raw")])
def test_the_browsers_maps_are_those_of_python(visit, view, preprocessing):
    tab = visit(preprocessing=preprocessing, view=view)
    caption = IMAGES[0].captions[0]
    for index in range(len(caption.words)):
        shares, seen, values = tab.evaluate(
            "index => { const article = document.querySelector('article'), word = wordsOf(article)[index];"
            "const { size, grid, box } = geometry(article);"
            "return [[...spread(weightsOf(word), grid, size, box, chosen('view'))], [...mapsOf(article).seen],"
            "[...mapOf(article, word).values]] }",
            index,
        )
        wanted = attention_map(caption, index, (300, 250), preprocessing, view).flatten()
        assert np.abs(np.array(shares) - wanted).max() < 2e-5 * wanted.max()
        part = np.array(seen) > 0
        assert np.allclose(np.array(values)[part] * np.array(seen)[part], wanted[part], atol=2e-5 * wanted.max())


@pytest.mark.slow
def test_a_word_lights_up_the_image_and_a_click_keeps_it(visit):
    tab = visit()
    words = tab.locator("article").first.locator(".word")
    assert not lit(tab) and tab.locator("canvas").first.is_hidden()
    pictures = []
    for index, word in enumerate("a dog on grass".split()):
        words.nth(index).hover()
        assert lit(tab) == [word] and tab.locator("canvas").first.is_visible()
        pictures.append(pixels(tab))
        attention = attention_map(IMAGES[0].captions[0], index, (300, 250), CROP)
        row, column = np.unravel_index(attention.argmax(), attention.shape)
        # The brightest colour and the most of it stand where the map has its peak.
        assert pictures[-1][row, column].tolist()[:3] == [252, 255, 164] and pictures[-1][row, column, 3] == 191
    assert all(not np.array_equal(one, other) for one, other in zip(pictures, pictures[1:], strict=False))
    left = CROP.visible_box(300, 250)[0]
    assert (pictures[0][:, : int(left), :3] == 255).all() and (pictures[0][:, int(left) + 1 : 150, :3] < 255).any()
    tab.mouse.move(5, 5)
    assert not lit(tab)
    words.nth(1).click()
    words.nth(3).hover()
    assert lit(tab) == ["grass"]
    tab.mouse.move(5, 5)
    assert lit(tab) == ["dog"] and words.nth(1).get_attribute("aria-pressed") == "true"
    words.nth(1).click()
    tab.mouse.move(5, 5)
    tab.evaluate("document.activeElement.blur()")
    assert not lit(tab)


@pytest.mark.slow
def test_pointing_at_the_image_lights_up_the_words_that_looked_there(visit):
    tab = visit()
    caption, stage = IMAGES[0].captions[0], tab.locator(".stage").first
    maps = [attention_map(caption, index, (300, 250), CROP) for index in range(4)]
    box = stage.bounding_box()
    for x, y in ((0.5, 0.5), (0.3, 0.7), (0.71, 0.22)):
        tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        heats = [
            float(word.evaluate("word => word.style.getPropertyValue('--heat')"))
            for word in tab.locator("article").first.locator(".word").all()
        ]
        row, column = int(250 * y), int(300 * x)
        assert heats == pytest.approx([each[row, column] / each.max() for each in maps], abs=0.08)
        assert max(heats) > 0.05 and "Looked here" in tab.locator(".numbers").first.text_content()
    tab.mouse.move(box["x"] + 3, box["y"] + 3)
    assert tab.locator(".numbers").first.text_content() == "Not seen: outside the crop."
    tab.mouse.move(5, 5)
    assert tab.locator("article").first.locator(".word").first.get_attribute("style") in (None, "")


@pytest.mark.slow
def test_the_keyboard_does_all_that_the_mouse_does(visit):
    tab = visit()
    first = tab.locator("article").first
    first.locator(".word").first.focus()
    assert lit(tab) == ["a"]
    tab.keyboard.press("ArrowRight")
    assert lit(tab) == ["dog"]
    tab.keyboard.press("Enter")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert lit(tab) == ["grass"]
    tab.keyboard.press("Tab")
    assert set(lit(tab)) == {"dog"}  # what was kept; the next image's stage has the focus
    assert tab.evaluate("document.activeElement.className") == "stage"
    before = tab.locator(".numbers").nth(1).text_content()
    for _ in range(2):
        tab.keyboard.press("ArrowUp")
    assert before.startswith("Looked here") and tab.locator(".marker").nth(1).is_visible()
    assert tab.locator(".marker").nth(1).evaluate("marker => parseFloat(marker.style.top)") < 1
    first.locator(".word").nth(1).focus()
    tab.keyboard.press("Escape")
    assert not lit(tab)


@pytest.mark.slow
def test_view_scale_and_colours_of_the_page_can_be_switched(visit):
    tab = visit()
    tab.locator(".word").nth(0).click()
    numbers = tab.locator(".numbers").first
    pictures, told = [pixels(tab)], [numbers.text_content()]
    for label in ("blocks", "shared", "smooth", "per word"):
        tab.get_by_label(label, exact=True).check()
        pictures.append(pixels(tab))
        told.append(numbers.text_content())
    assert np.array_equal(pictures[0], pictures[4])
    weights = region_weights(IMAGES[0].captions[0]).max((1, 2))
    assert weights[0] < weights.max()
    bright = [picture[..., 3][picture[..., :3].min(-1) < 255].max() for picture in pictures]
    assert bright[0] == bright[1] == 191 and max(bright[2], bright[3]) < 191
    even = attention_map(caption_of("word", (1, 1)), 0, (300, 250), CROP, "raw")
    maps = [attention_map(IMAGES[0].captions[0], index, (300, 250), CROP) for index in range(4)]
    tops = [(each[even > 0] / even[even > 0]).max() for each in maps]
    own, shared = f"At its brightest: {tops[0]:.1f} times an even share", f"shared scale is {max(tops):.1f}."
    assert told[0] == told[4] and told[0].endswith(f" {own}.")
    assert tops[0] < max(tops) and told[3].endswith(f" {own}; the brightest colour of the {shared}")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(ground)
    tab.locator("#theme").click()
    assert tab.evaluate(ground) != light
    tab.locator("#theme").click()
    assert tab.evaluate(ground) == light


@pytest.mark.slow
def test_a_phone_shows_it_in_its_width_and_a_tap_is_enough(visit):
    tab = visit(PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(word.bounding_box()["height"] >= 44 for word in tab.locator(".word").all())
    words = tab.locator("article").first.locator(".word")
    words.nth(1).tap()
    assert lit(tab) == ["dog"] and tab.locator("canvas").first.is_visible()
    words.nth(2).tap()
    assert lit(tab) == ["on"]
    tab.locator(".stage").first.tap()
    assert "Looked here" in tab.locator(".numbers").first.text_content()
    heat = "word => word.style.getPropertyValue('--heat')"
    assert float(words.nth(0).evaluate(heat)) >= 0 and lit(tab) == ["on"]
    words.nth(0).tap()
    assert words.nth(0).evaluate(heat) == "" and "“a”" in tab.locator(".numbers").first.text_content()
