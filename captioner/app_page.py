"""The page of the web app: an image goes to the server with every wish, what comes back is shown as overlays are."""

from __future__ import annotations

from captioner.overlay_page import HELP, HINT, colours, controls, head, resource


def app_page(formats: str, largest: int, longest: int, most_hypotheses: int) -> str:
    """Return the page.

    Parameters
    ----------
    formats
        Of images that can be read, as a file input's `accept` has them.
    largest
        Bytes that an image may have.
    longest
        Letters that a caption of one's own may have.
    most_hypotheses
        That a beam may have.
    """
    # One after the other they are one script, in which the second calls what the first defines.
    script = resource("overlay_page.js") + resource("app_page.js")
    style = resource("overlay_page.css") + resource("app_page.css")
    return f"""{head("Captioner", style, script, connects="'self'")}
<body class="app" data-largest="{largest}">
<h1>Captioner</h1>
<label class="drop" id="drop">
<input type="file" id="file" accept="{formats}">
<span><b>Drop an image here</b>, paste it, or <u>choose one</u></span>
<small>The model writes a caption, and shows where it looked for each word. The image stays on the machine that runs
this program, and is not kept.</small>
</label>
<p class="state" id="state" role="status"></p>
<p class="fault" id="fault" role="alert"></p>
<div class="columns" id="shown" hidden>
<div class="seen">
<main data-colours="{colours()}"></main>
{controls()}
<details class="help"><summary>{HINT}</summary><p>{HELP}</p></details>
</div>
<div class="panel">
<section>
<h2>Captions</h2>
<div id="captions" role="radiogroup" aria-label="Captions, with their probabilities"></div>
<p class="note" id="note" role="status"></p>
<p class="note">Percent: how probable the model finds the whole caption. The best stands first, and length counts.</p>
</section>
<section>
<h2><label for="said">A caption of your own</label></h2>
<form id="say">
<input type="text" id="said" maxlength="{longest}" placeholder="a dog on a sofa" autocomplete="off" dir="auto" required>
<button type="submit">Look</button>
</form>
<p class="note">Where would the model look while it said this?</p>
</section>
<section>
<h2>How captions are found</h2>
<form id="settings">
<div class="ways" role="radiogroup" aria-label="How captions are found">
<label><input type="radio" name="way" value="beam" checked> beam</label>
<label><input type="radio" name="way" value="sample"> sampling</label>
</div>
<div class="numbers-in" data-way="beam">
{_number("beam_size", "Beam size", 5, 1, most_hypotheses, 1)}
</div>
<div class="numbers-in" data-way="sample" hidden>
{_number("temperature", "Temperature", 1, 0.1, 5, 0.1)}
{_number("top_p", "Top-p", 1, 0.05, 1, 0.05)}
{_number("seed", "Seed", 0, 0, 2**32 - 1, 1)}
</div>
</form>
</section>
<section>
<h2>Take it with you</h2>
<p class="note">The chosen caption, and where the model looked.</p>
<div class="takes">
<button type="button" data-form="figure" data-suffix="png">Figure (PNG)</button>
<button type="button" data-form="page" data-suffix="html">Page (HTML)</button>
</div>
</section>
</div>
</div>
<script>{script}</script>
</body>
</html>
"""


def _number(name: str, label: str, value: float, least: float, most: float, step: float) -> str:
    return (
        f'<label>{label} <input type="number" name="{name}" value="{value}" min="{least}" max="{most}" step="{step}" '
        "required></label>"
    )
