"""The notebook: as it is kept, and executed from a clean kernel."""

import ast
import base64
import io
import os
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from refusals import GUARD

import captioner

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "attention_overlay.ipynb"
pytestmark = pytest.mark.sockets  # through which a kernel is spoken to


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_short_and_without_outputs(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 10 and notebook.cells[0].cell_type == "markdown"
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_uses_what_is_public(notebook):
    tree = ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all("." not in alias.name for alias in node.names if alias.name.startswith("captioner"))
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "captioner":
            assert node.module == "captioner" and {alias.name for alias in node.names} <= set(captioner.__all__)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
            if isinstance(node.value, ast.Name) and node.value.id == "captioner":
                assert node.attr in captioner.__all__


def run(notebook, folder, monkeypatch, **environment):
    """Execute it in a folder, from a clean kernel that reaches no other machine; return what the cells gave."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(GUARD), str(ROOT)]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    for name in ("CAPTIONER_CHECKPOINT", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (folder / "work").mkdir()
    resources = {"metadata": {"path": str(folder / "work")}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(outputs):
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]


@pytest.mark.slow
def test_it_runs_in_three_minutes_and_its_model_sees(notebook, tmp_path, monkeypatch):
    started = time.monotonic()
    outputs = run(notebook, tmp_path, monkeypatch)
    seconds = time.monotonic() - started
    assert not [output for output in outputs if output.get("name") == "stderr"]
    said = "".join(output.get("text", "") for output in outputs)
    right, shuffled, pointing, chance = (int(share) / 100 for share in re.findall(r"^(\d+)% ", said, re.MULTILINE))
    # What likely words reach without the image, and what regions reach by chance, is far below.
    assert right > 0.1 and right > 4 * shuffled and pointing > 2 * chance
    # A scene, three of its captions, one of an image of one's own, one that was typed, and two score functions.
    drawn = pictures(outputs)
    assert len(drawn) == 7
    assert all(len(picture.getcolors(2**24)) > 1000 for picture in drawn)
    (page,) = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert page.count("&lt;article") == 6 and "srcdoc" in page
    written = tmp_path / "work" / "captioner-notebook"
    assert (written / "overlay.pdf").read_bytes().startswith(b"%PDF") and (written / "overlays.html").is_file()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [written.name]
    if "PYTEST_XDIST_WORKER" not in os.environ:  # alone on the machine, or nearly
        assert seconds < 180
