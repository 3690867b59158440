"""The web app: what it answers, to whom, and of what; its command; and its page in a real browser."""

import http.client
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit

import pytest
import torch
from PIL import Image
from test_model import captioner, small_cnn, some_images
from test_overlay_page import DESKTOP, HOSTILE, PHONE, Elements, lit, pixels

pytest.importorskip("starlette", reason="the extra 'app' is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'app' is not installed")

from captioner import app, app_command  # noqa: E402
from captioner.checkpoint import KEY, pack  # noqa: E402
from captioner.cli import main  # noqa: E402
from captioner.decoding import Decoding  # noqa: E402
from captioner.images import ORIENTATION  # noqa: E402
from captioner.overlay import make_figure, save_figure  # noqa: E402
from captioner.overlay_page import PageImage, write_page  # noqa: E402
from captioner.vocabulary import Characters  # noqa: E402

pytestmark = pytest.mark.sockets
IMAGES = some_images(4)
torch.manual_seed(0)  # of whose scores none are nearly equal
MODEL = captioner(encoder=small_cnn())


def encoded(image, form="png", **more):
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


@contextmanager
def serving():
    with app_command.listen(0) as listening:
        server = app.make_server(MODEL)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


@pytest.fixture
def ask(port):
    """Ask the server; return the status, the headers and what it answers."""

    def send(path, data=None, headers=None, **wish):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        method = "GET" if data is None else "POST"
        connection.request(method, f"{path}?{urlencode(wish)}" if wish else path, data, headers or {})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kind = answer.headers.get_content_type()
        return answer.status, answer.headers, json.loads(body) if kind == "application/json" else body

    return send


def said(answer):
    """The one sentence of a refusal."""
    status, _, body = answer
    assert status in (400, 413) and body.keys() == {"error"}
    assert re.fullmatch(r"[^\n]+\.", body["error"]) and "`" not in body["error"]
    return body["error"]


def found(image, name="one.png", **settings):
    """What the model itself says of an image."""
    seen = MODEL.annotate_pixels([MODEL.preprocessing.pixels(image)[None]])
    numbers = [zlib.crc32(name.encode())]
    return MODEL.caption_annotations(seen, Decoding(**{"captions": 5, **settings}), numbers=numbers)[0]


# What it answers


def test_the_page_needs_nothing_from_elsewhere_and_may_ask_its_server_alone(ask):
    status, headers, body = ask("/")
    elements = Elements(body.decode())
    assert status == 200 and not elements.open
    (policy,) = (given["content"] for given, _ in elements.of("meta") if given.get("http-equiv"))
    assert "default-src 'none'; img-src data:;" in policy and "connect-src 'self';" in policy
    for _, attributes, _ in elements.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert all(attributes[name].startswith("data:") for name in ("src", "href") if name in attributes)
    for tag in ("style", "script"):
        ((_, text),) = elements.of(tag)
        assert not re.search(r"https?:|url\(|@?\bimport\b", text)
    assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"


def test_an_image_gets_the_models_captions_with_their_probabilities(ask):
    status, _, body = ask("/look", encoded(IMAGES[0]), name="one.png")
    expected = found(IMAGES[0])
    assert status == 200 and len(expected) == 5 == len({caption.text for caption in expected})
    assert [caption["text"] for caption in body["captions"]] == [caption.text for caption in expected]
    for caption, wanted in zip(body["captions"], expected, strict=True):
        assert float(caption["logarithm"].replace("−", "-")) == pytest.approx(wanted.log_probability, abs=0.005)
        assert caption["probability"] == app.probability(wanted.log_probability)
    elements = Elements(body["article"])
    words = [text.split("β")[0] for _, text in elements.of("button", "word")]
    assert words == [word for caption in expected for word in caption.words]
    assert len(elements.of("div", "caption")) == 5 and body["note"] == ""


def test_characters_that_the_model_does_not_know_are_told():
    model = captioner(encoder=small_cnn(), vocabulary=Characters.train(["a red ball"]))
    wish = app.Wish("one.png", "a red fall", Decoding(), 0, "smooth", False)
    body = json.loads(app._look(model, wish, IMAGES[0]).body)
    assert body["note"].startswith("The model does not know 'f', and")
    assert [text.split("β")[0] for _, text in Elements(body["article"]).of("button", "word")] == ["a", "red", "fall"]


@pytest.mark.parametrize(
    ("logarithm", "read"), [(0, "100 %"), (-1, "37 %"), (-3, "5 %"), (-8.65, "0.018 %"), (-14, "below 0.0001 %")]
)
def test_probabilities_are_short(logarithm, read):
    assert app.probability(logarithm) == read


def test_beam_and_sampling_are_as_they_are_asked_for(ask):
    data = encoded(IMAGES[1])

    def texts(**wish):
        return [caption["text"] for caption in ask("/look", data, name="one.png", **wish)[2]["captions"]]

    assert texts(way="beam", beam_size=1) == [caption.text for caption in found(IMAGES[1], beam_size=1, captions=1)]
    assert texts(way="beam", beam_size=3) == [caption.text for caption in found(IMAGES[1], beam_size=3, captions=3)]
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    expected = dict.fromkeys(caption.text for caption in found(IMAGES[1], sample=True, **drawn))
    assert texts(way="sample", **drawn) == list(expected) == texts(way="sample", **drawn)
    assert texts(way="sample", **{**drawn, "seed": 8}) != list(expected)
    # Cold draws are all alike, and are shown once.
    assert len(texts(way="sample", temperature=1e-4)) == 1


def test_a_caption_of_ones_own_is_looked_at_and_its_unknown_words_are_named(ask):
    _, _, body = ask("/look", encoded(IMAGES[0]), caption="A red Zebra on a ball.")
    assert [text.split("β")[0] for _, text in Elements(body["article"]).of("button", "word")] == [
        *("a", "red", "zebra", "on", "a", "ball")
    ]
    assert "does not know 'zebra'" in body["note"]
    (caption,) = body["captions"]
    with pytest.warns(UserWarning, match="zebra"):
        wanted = MODEL.attend(IMAGES[0], "a red zebra on a ball").log_probability
    assert float(caption["logarithm"].replace("−", "-")) == pytest.approx(wanted, abs=0.005)
    assert "has no word that the model knows" in said(ask("/look", encoded(IMAGES[0]), caption="zebra"))
    assert "has 301 letters" in said(ask("/look", encoded(IMAGES[0]), caption="a" * 301))


@pytest.mark.parametrize(("view", "scale"), [("smooth", "shared"), ("raw", "own")])
def test_what_is_taken_is_what_python_makes(ask, tmp_path, view, scale):
    settings = {"view": view, "shared_scale": scale == "shared"}
    wish = {"name": "one.png", "view": view, "scale": scale}
    _, headers, figure = ask("/figure", encoded(IMAGES[0]), **wish, caption="a red ball")
    drawn = io.BytesIO()
    caption = MODEL.attend(IMAGES[0], "a red ball")
    save_figure(make_figure(IMAGES[0], caption, MODEL.preprocessing, **settings), drawn, "png")
    assert headers["Content-Type"] == "image/png" and figure == drawn.getvalue()
    _, headers, page = ask("/page", encoded(IMAGES[0]), **wish, rank=2)
    shown = PageImage("one.png", IMAGES[0], [found(IMAGES[0])[2]])
    write_page(tmp_path / "page.html", [shown], MODEL.preprocessing, **settings)
    assert page == (tmp_path / "page.html").read_bytes() and headers["Content-Disposition"] == "attachment"


def test_an_image_is_seen_upright(ask):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    _, _, body = ask("/look", encoded(IMAGES[0], "jpeg", exif=exif))
    ((given, _),) = Elements(body["article"]).of("img")
    assert (int(given["height"]), int(given["width"])) == IMAGES[0].size != IMAGES[0].size[::-1]


# What it refuses


@pytest.mark.parametrize("path", ["/look", "/figure", "/page"])
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "notes.txt is empty"),
        (b"no picture", "notes.txt is not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "notes.txt is not an image that can be read"),
        (encoded(IMAGES[0])[:-40], "notes.txt is damaged"),
        (encoded(Image.new("1", (20000, 20000))), "notes.txt has more than"),
    ],
    ids=["empty", "text", "postscript", "truncated", "bomb"],
)
def test_a_bad_upload_is_one_sentence(ask, path, data, sentence):
    assert said(ask(path, data, name="notes.txt")).startswith(sentence)


def test_an_upload_is_read_no_further_than_it_may_be_large(ask, monkeypatch):
    data = encoded(IMAGES[0])
    monkeypatch.setattr(app, "LARGEST", len(data))
    assert ask("/look", data)[0] == 200 == ask("/look", iter([data]))[0]
    # By its length where that is told, by counting where it comes in pieces.
    for more in (data + b"x", iter([data, b"x"])):
        answer = ask("/look", more)
        assert answer[0] == 413 and "MB: make it smaller" in said(answer)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"beam_size": "x"}, "The beam size is 'x': give a whole number."),
        ({"beam_size": 0}, "The beam size is 0: give 1 or more."),
        ({"beam_size": 10**6}, "The beam size is 1000000: give 20 or less."),
        ({"way": "sample", "temperature": "nan"}, "The temperature is nan"),
        ({"way": "sample", "temperature": ""}, "The temperature is '': give a number."),
        ({"way": "sample", "top_p": 3}, "The top p is 3.0"),
        ({"way": "sample", "seed": -1}, "The seed is -1"),
        ({"way": "sample", "seed": 2**32}, "The seed is 4294967296"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(ask, wish, sentence):
    assert said(ask("/look", encoded(IMAGES[0]), **wish)).startswith(sentence)


def test_drawings_that_cannot_be_are_one_sentence(ask):
    data = encoded(IMAGES[0])
    assert "no caption 5 of 5" in said(ask("/figure", data, rank=5))
    assert "no caption -1 of 5" in said(ask("/page", data, rank=-1))
    assert "no view 'round'" in said(ask("/figure", data, view="round"))


@pytest.mark.parametrize("name", [HOSTILE, "../../etc/passwd", "a\r\nSet-Cookie: x=1", "a\u202eb", "개 🐕.jpg", ""])
def test_names_and_captions_are_text(ask, name):
    status, headers, body = ask("/look", encoded(IMAGES[0]), name=name, caption=f"a red {HOSTILE} ball")
    elements = Elements(body["article"])
    assert status == 200 and "Set-Cookie" not in headers
    assert not elements.open and not elements.of("script") and len(elements.of("img")) == 1
    ((_, heading),) = elements.of("h2")
    assert heading == "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name or "The image"
    )
    for _, attributes, _ in elements.found:
        assert not any(given.startswith("on") or given == "style" for given in attributes)
    assert said(ask("/look", b"", name=name)).startswith(heading)
    page = Elements(ask("/page", encoded(IMAGES[0]), name=name)[2].decode())
    assert not page.open and len(page.of("script")) == 1 == len(page.of("img"))


def test_other_pages_and_other_names_are_turned_away(ask, port):
    data = encoded(IMAGES[0])
    for origin in ("http://example.org", "null", f"http://127.0.0.1:{port + 1}"):
        assert "another page" in said(ask("/look", data, {"Origin": origin}))
    assert ask("/look", data, {"Origin": f"http://127.0.0.1:{port}"})[0] == 200
    assert ask("/look", data, {"Host": "localhost:80", "Origin": "http://localhost:80"})[0] == 200
    for host in ("example.org", f"example.org:{port}", "127.0.0.1.example.org"):
        assert ask("/", headers={"Host": host})[0] == 400 == ask("/look", data, {"Host": host})[0]


# Several users


def test_users_at_the_same_time_get_their_own_answers_one_after_the_other(ask, monkeypatch):
    look, at_once, most = MODEL.annotate_pixels, [], []

    def watched(given):
        at_once.append(given)
        most.append(len(at_once))
        try:
            return look(given)
        finally:
            at_once.pop()

    wishes = [{"name": f"{number}.png", "beam_size": 2 + number % 3, "number": number % 4} for number in range(8)]

    def answer(wish):
        return ask("/look", encoded(IMAGES[wish["number"]]), **wish)[2]

    alone = [answer(wish) for wish in wishes]
    assert len({json.dumps(each) for each in alone}) == 8
    monkeypatch.setattr(MODEL, "annotate_pixels", watched)
    with ThreadPoolExecutor(8) as users:
        assert list(users.map(answer, wishes)) == alone
    assert len(most) == 8 and set(most) == {1}


def test_who_is_gone_is_not_worked_for(ask, port, monkeypatch):
    look, looked, begun, go_on = MODEL.annotate_pixels, [], threading.Event(), threading.Event()

    def slow(given):
        looked.append(given)
        begun.set()
        assert go_on.wait(30)
        return look(given)

    monkeypatch.setattr(MODEL, "annotate_pixels", slow)
    with ThreadPoolExecutor(1) as user:
        first = user.submit(ask, "/look", encoded(IMAGES[0]))
        assert begun.wait(30)
        for _ in range(3):
            gone = http.client.HTTPConnection("127.0.0.1", port)
            gone.request("POST", "/look", encoded(IMAGES[1]))
            gone.close()
        last = ThreadPoolExecutor(1).submit(ask, "/look", encoded(IMAGES[2]))
        go_on.set()
        assert first.result(30)[0] == 200 == last.result(30)[0]
    assert len(looked) == 2


def test_nothing_is_left_on_the_disk(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = []
    make = tempfile._get_candidate_names
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: made.append(1) or make())
    for path in ("/look", "/figure", "/page"):
        assert ask(path, encoded(IMAGES[0]), caption="a ball")[0] == 200
    assert not list(tmp_path.iterdir()) and not made


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    torch.save({KEY: pack(MODEL.contents())}, path)
    return path


@pytest.fixture
def command(checkpoint, capsys):
    def run(*args):
        code = main(["app", "--checkpoint", str(checkpoint), *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_says_where_the_app_is_and_listens_on_this_machine_alone(command, monkeypatch):
    given = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: given.extend([server, *sockets]))
    code, out, err = command("--port", "0")
    server, listening = given
    (number,) = re.findall(r"^The app is at http://127\.0\.0\.1:(\d+) ", out)
    assert (code, err) == (0, "") and out.count("\n") == 1 and int(number) > 0
    assert listening.fileno() == -1 and not server.config.access_log
    with app_command.listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_an_interruption_ends_it(command, monkeypatch):
    def interrupt(server, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupt)
    code, _, err = command("--port", "0")
    assert (code, err) == (130, "captioner: interrupted.\n")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--port", "99999"], "--port is 99999: give 0 to 65535."),
        (["--port", "x"], "--port"),
        (["photo.jpg", "--port", "0"], "photo.jpg is no checkpoint: give images on the app's page."),
        (["--device", "abacus", "--port", "0"], "The device 'abacus'"),
    ],
)
def test_a_mistake_is_one_sentence(command, args, sentence):
    code, out, err = command(*args)
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out


def test_a_port_that_is_taken_is_one_sentence(command, port):
    code, out, err = command("--port", port)
    assert code == 2 and err.startswith(f"captioner: Port {port} cannot be used (Address already in use): give another")
    assert err.count("\n") == 1 and not out


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_sentence(command, monkeypatch, package):
    find = app_command.find_spec
    monkeypatch.setattr(app_command, "find_spec", lambda name: None if name == package else find(name))
    code, _, err = command()
    assert code == 2 and err == (
        f"captioner: The app needs {package}, which is not installed: pip install 'captioner[app]'.\n"
    )


def test_a_decoder_without_attention_has_nothing_to_show(tmp_path, capsys):
    path = tmp_path / "blind.ckpt"
    torch.save({KEY: pack(captioner("GRU-NoAttention-before", encoder=small_cnn()).contents())}, path)
    assert main(["app", "--checkpoint", str(path), "--port", "0"]) == 2
    captured = capsys.readouterr()
    assert "carries no attention" in captured.err and not captured.out


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_the_command(checkpoint, signals):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from captioner.cli import main;"
        f"sys.exit(main(['app', '--checkpoint', {str(checkpoint)!r}, '--port', '0']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        address = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline().decode())
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200  # and the connection stays open
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().decode() == "captioner: interrupted.\n"


# In a browser


@pytest.fixture
def visit(browser, port):
    """Open the app's page; whatever asks for something elsewhere, or complains, is a failure."""
    contexts, asked, faults = [], [], []

    def open_page(device=DESKTOP):
        contexts.append(browser.new_context(**device))
        contexts[-1].set_default_timeout(60_000)  # a busy machine is slow
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("websocket", lambda socket: asked.append(socket.url))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: faults.append(dialog.message))
        tab.on("console", lambda message: faults.extend([message.text] * is_fault(message)))
        tab.goto(f"http://127.0.0.1:{port}/")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
    places = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert places == {f"127.0.0.1:{port}"}


def is_fault(message):
    # What is refused, or cannot be had without a network, is told there, too.
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def upload(tab, image, name="one.png"):
    data = image if isinstance(image, bytes) else encoded(image)
    tab.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})
    done(tab)


def done(tab):
    tab.locator("body:not(.busy)").wait_for()


def listed(tab):
    return tab.locator("#captions span").all_text_contents()


def words(tab):
    return tab.locator(".word span").all_text_contents()


@pytest.mark.slow
def test_an_uploaded_image_is_captioned_and_a_word_lights_it_up(visit):
    tab = visit()
    assert tab.locator("#shown").is_hidden()
    upload(tab, IMAGES[0])
    expected = found(IMAGES[0])
    assert listed(tab) == [caption.text for caption in expected] and words(tab) == expected[0].words
    assert not lit(tab) and tab.locator("canvas").is_hidden()
    pictures = []
    for index in (0, 1):
        tab.locator(".word").nth(index).hover()
        assert lit(tab) == [expected[0].words[index]] and tab.locator("canvas").is_visible()
        pictures.append((pixels(tab), tab.locator(".stage").screenshot()))
    assert (pictures[0][0] != pictures[1][0]).any() and pictures[0][1] != pictures[1][1]
    # The strongest region of the 2 x 2 has the brightest colour at its centre.
    row, column = divmod(int(expected[0].attention[1].argmax()), 2)
    height, width = pictures[1][0].shape[:2]
    here = pictures[1][0][height // 4 + row * height // 2, width // 4 + column * width // 2]
    assert here[3] == pictures[1][0][..., 3].max()
    # Another caption, other words; the keyboard goes through them.
    tab.locator("#captions input").nth(1).check()
    assert words(tab) == expected[1].words and not lit(tab)
    tab.locator(".word").first.focus()
    tab.keyboard.press("ArrowRight")
    assert lit(tab) == [expected[1].words[1]]
    box = tab.locator(".stage").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tab.locator(".numbers").text_content().startswith("Looked here")


@pytest.mark.slow
def test_settings_are_heeded_at_once(visit):
    tab = visit()
    upload(tab, IMAGES[0])
    tab.get_by_label("Beam size").fill("2")
    tab.get_by_label("Beam size").press("Enter")
    tab.locator("#captions label").nth(2).wait_for(state="detached")
    assert listed(tab) == [caption.text for caption in found(IMAGES[0], beam_size=2, captions=2)]
    tab.get_by_label("sampling").check()
    done(tab)
    assert tab.get_by_label("Beam size").is_hidden()
    drawn = dict.fromkeys(caption.text for caption in found(IMAGES[0], sample=True))
    assert listed(tab) == list(drawn)
    tab.get_by_label("Top-p").fill("")
    tab.get_by_label("Top-p").press("Enter")
    tab.get_by_text("The top p is '': give a number.").wait_for()
    assert listed(tab) == list(drawn)


@pytest.mark.slow
def test_a_typed_caption_is_looked_at(visit):
    tab = visit()
    upload(tab, IMAGES[0])
    tab.locator("#said").fill("A red zebra <b>on</b> a ball")
    tab.locator("#said").press("Enter")
    tab.locator("#captions .own").wait_for()
    assert words(tab)[:3] == ["a", "red", "zebra"] and "zebra" in tab.locator("#note").text_content()
    tab.locator(".word").nth(1).hover()
    assert lit(tab) == ["red"] and tab.locator("canvas").is_visible()
    tab.locator("#captions input").first.check()
    assert words(tab) == found(IMAGES[0])[0].words
    tab.locator("#said").fill("zebra")
    tab.get_by_role("button", name="Look").click()
    tab.get_by_text("has no word that the model knows").wait_for()
    assert tab.locator("#captions label").count() == 6


@pytest.mark.slow
def test_figure_and_page_can_be_taken(visit, tmp_path, browser):
    tab = visit()
    upload(tab, IMAGES[0], 'my "one".png')
    tab.locator("#said").fill("a red ball")
    tab.locator("#said").press("Enter")
    tab.locator("#captions .own").wait_for()
    done(tab)
    tab.get_by_label("blocks").check()
    with tab.expect_download() as taken:
        tab.get_by_role("button", name="PNG").click()
    drawn = io.BytesIO()
    caption = MODEL.attend(IMAGES[0], "a red ball")
    save_figure(make_figure(IMAGES[0], caption, MODEL.preprocessing, view="raw"), drawn, "png")
    assert taken.value.path().read_bytes() == drawn.getvalue()
    assert re.fullmatch("my .one.-attention.png", taken.value.suggested_filename)
    done(tab)
    with tab.expect_download() as taken:
        tab.get_by_role("button", name="HTML").click()
    taken.value.save_as(tmp_path / "page.html")
    other = browser.new_page()
    other.goto((tmp_path / "page.html").as_uri())
    assert words(other) == ["a", "red", "ball"]
    other.locator(".word").nth(1).hover()
    assert lit(other) == ["red"] and other.get_by_label("blocks").is_checked()
    other.close()


@pytest.mark.slow
def test_a_bad_upload_is_a_sentence_on_the_page_and_what_was_there_stays(visit, tmp_path):
    tab = visit()
    upload(tab, b"no picture", HOSTILE)
    assert tab.get_by_role("alert").text_content().startswith(f"{HOSTILE} is not an image that can be read")
    assert tab.locator("#shown").is_hidden()
    upload(tab, IMAGES[0])
    assert tab.locator("#fault").text_content() == "" and tab.locator("article").is_visible()
    (tmp_path / "large.png").write_bytes(encoded(IMAGES[1]) + bytes(app.LARGEST))
    tab.locator("#file").set_input_files(tmp_path / "large.png")
    tab.get_by_text("large.png has 20 MB, more than 20: make it smaller and try again.").wait_for()
    assert words(tab) == found(IMAGES[0])[0].words
    tab.context.set_offline(True)
    tab.locator("#captions input").nth(1).check()
    tab.get_by_role("button", name="PNG").click()
    tab.get_by_text("The program behind this page does not answer").wait_for()


@pytest.mark.slow
def test_an_image_can_be_dropped_and_pasted(visit):
    tab = visit()
    for number, (kind, at) in enumerate([("drop", "dataTransfer"), ("paste", "clipboardData")]):
        moved = tab.evaluate_handle(
            "bytes => { const moved = new DataTransfer();"
            "moved.items.add(new File([new Uint8Array(bytes)], 'one.png', { type: 'image/png' })); return moved }",
            list(encoded(IMAGES[number])),
        )
        tab.evaluate(
            "([kind, at, moved]) => document.body.dispatchEvent(new (kind === 'drop' ? DragEvent : ClipboardEvent)"
            "(kind, { [at]: moved, bubbles: true, cancelable: true }))",
            [kind, at, moved],
        )
        tab.locator("article").wait_for()
        done(tab)
        assert listed(tab) == [caption.text for caption in found(IMAGES[number])]


@pytest.mark.slow
def test_two_users_see_their_own(visit):
    tabs = [visit(), visit()]
    for tab, image in zip(tabs, IMAGES, strict=False):
        data = encoded(image)
        tab.locator("#file").set_input_files({"name": "one.png", "mimeType": "image/png", "buffer": data})
    for tab, image in zip(tabs, IMAGES, strict=False):
        tab.locator("article").wait_for()
        assert listed(tab) == [caption.text for caption in found(image)]
    assert listed(tabs[0]) != listed(tabs[1])


@pytest.mark.slow
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_the_screen(visit, device):
    tab, width = visit(device), device["viewport"]["width"]
    across = "document.documentElement.scrollWidth"
    assert tab.evaluate(across) <= width
    upload(tab, IMAGES[0], f"{'x' * 200}.png")
    tab.locator("#said").fill("a red ball " + "zebra" * 40)
    tab.locator("#said").press("Enter")
    tab.locator("#captions .own").wait_for()
    assert tab.evaluate(across) <= width and "zebrazebra" in tab.locator("#note").text_content()
    tab.get_by_label("sampling").check()
    done(tab)
    assert tab.evaluate(across) <= width
    if device is PHONE:
        tab.locator(".word").nth(1).tap()
        assert lit(tab) == words(tab)[1:2] and tab.locator("canvas").is_visible()
    boxes = [tab.locator(f".{part}").bounding_box() for part in ("seen", "panel")]
    assert (boxes[0]["x"] == boxes[1]["x"]) == (device is PHONE)  # one below the other, or side by side
    upload(tab, b"x", f"{'y' * 200}.png")
    assert "yyy" in tab.get_by_role("alert").text_content() and tab.evaluate(across) <= width
