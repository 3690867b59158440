"""What the program needs, and what it fetches: no release known to be bad, and torchvision's weights alone."""

import ast
import hashlib
import re
import tomllib
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import torchvision
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_hostile_files import Payload

import captioner
from captioner.encoders import ResNet
from captioner.errors import InputError

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Releases that no requirement may let in: the last ones with a fault that matters to people who give the program files
# of others, or who work on it; and those that were taken over. Found in the PyPI advisory database, in GitHub's and in
# the release notes; last looked through in November 2026.
BAD = [
    ("lightning", "2.6.2", "GHSA-w37p-236h-pfx3: taken over, steals credentials when it is imported"),
    ("lightning", "2.6.3", "GHSA-w37p-236h-pfx3: taken over, steals credentials when it is imported"),
    ("lightning", "2.6.5", "2.6.6's notes: a checkpoint's _instantiator and _class_path run code"),
    ("lightning", "2.6.0", "CVE-2026-31221: load_from_checkpoint opens pickles"),
    ("torch", "2.5.1", "CVE-2025-32434: a file runs code although it is opened with weights_only=True"),
    ("torch", "2.9.1", "CVE-2026-24747: a file overwrites memory although it is opened with weights_only=True"),
    ("torch", "2.10.0", "CVE-2026-4538: loading a .pt2 file runs code"),
    ("pillow", "12.1.1", "CVE-2026-40192: an image that unpacks to more than the memory"),
    ("pillow", "12.2.0", "CVE-2026-54058 and others: images that reach outside their memory"),
    ("pillow", "12.3.0", "CVE-2026-112403: a JPEG overwrites memory"),
    ("numpy", "1.16.2", "CVE-2019-6446: numpy.load opens pickles unless it is told not to"),
    ("numpy", "1.21.6", "CVE-2021-41496: arrays of negative sizes overflow a buffer"),
    ("pyyaml", "5.3.1", "CVE-2020-14343: YAML runs code"),
    ("filelock", "3.20.0", "CVE-2025-68146: a link in a lock's place empties another file"),
    ("filelock", "3.20.2", "CVE-2026-22701: a link in a lock's place"),
    ("starlette", "0.39.2", "CVE-2024-47874: a form fills the memory"),
    ("starlette", "0.47.1", "CVE-2025-54121: a large upload blocks all others"),
    ("starlette", "0.49.0", "CVE-2025-62727: a header takes the processor for minutes"),
    ("starlette", "1.3.0", "CVE-2026-54283: limits of a form are not heeded"),
    ("uvicorn", "0.11.6", "CVE-2020-7694 and CVE-2020-7695: requests command the terminal, headers split answers"),
    ("nltk", "3.8.1", "CVE-2024-39705: data packages are pickles"),
    ("nltk", "3.9.2", "CVE-2025-14009: archives write outside their folder"),
    ("nltk", "3.9.4", "PYSEC-2026-3722: its checks of paths and pickles only warn"),
    ("nltk", "3.10.2", "CVE-2026-80206, fixed in 3.10.3"),
    ("jupyterlab", "4.5.6", "CVE-2026-42266 and CVE-2026-40171: a notebook's text steals the token"),
    ("jupyterlab", "4.6.1", "GHSA-whvh-wf3x-g77j: the list of allowed extensions is not heeded"),
    ("playwright", "1.55.0", "CVE-2025-59288: browsers are fetched over connections that are not verified"),
    ("pytest", "9.0.2", "CVE-2025-71176: others of the machine can take its temporary folder"),
]


def requirements():
    """Give what pyproject.toml asks for, in all extras, but for its own extras."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [each for each in map(Requirement, lines) if canonicalize_name(each.name) != "captioner"]


@pytest.mark.parametrize(("name", "release", "why"), BAD, ids=[f"{name} {release}" for name, release, _ in BAD])
def test_no_bad_release_is_let_in(name, release, why):
    asked = [each for each in requirements() if canonicalize_name(each.name) == name]
    assert asked, f"{name} is not asked for any longer: leave it out here"
    assert not [str(each) for each in asked if each.specifier.contains(release, prereleases=True)], why


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_installed_is_what_is_asked_for(requirement):
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    assert requirement.specifier.contains(installed, prereleases=True)


# What the program fetches

MODULES = re.compile(r"(urllib\.request|http\.client|requests|httpx2?|aiohttp|nltk|huggingface_hub|fsspec)\b")
NAMES = ("hub", "get_state_dict", "load_state_dict_from_url", "download_url_to_file", "urlopen", "from_pretrained")


def test_nothing_in_the_program_fetches_but_the_weights():
    found = set()
    for file in Path(captioner.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(file.stem, module) for module in modules if MODULES.match(module)}
            name = getattr(node, "attr", getattr(node, "id", ""))
            found |= {(file.stem, name)} if name in NAMES else set()
    assert found == {("encoders", "hub"), ("encoders", "get_state_dict")}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A torchvision that publishes other weights: the file, where it is kept when it was fetched, who asked for it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    made = tmp_path / "made.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), made)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()[:8]
    url = f"https://example.org/models/resnet18-{digest}.pth"
    enum = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(enum), "url", property(lambda self: url))
    asked = []

    class Answer:
        def __init__(self, request, **_):
            asked.append(request.full_url)
            self.file = open(made, "rb")

        def info(self):
            return Message()

        def read(self, size=-1):
            return self.file.read(size)

        def close(self):
            self.file.close()

        __enter__, __exit__ = lambda self: self, lambda self, *_: self.close()

    monkeypatch.setattr(torch.hub, "urlopen", Answer)
    return made, tmp_path / "checkpoints" / f"resnet18-{digest}.pth", asked


def load():
    ResNet(depth=18, stage=1, weights="IMAGENET1K_V1").load_weights()


def test_weights_are_fetched_once_and_their_hash_is_verified_each_time(weights):
    made, kept, asked = weights
    load()
    load()
    assert len(asked) == 1 and kept.is_file()
    kept.write_bytes(kept.read_bytes() + b"x")
    with pytest.raises(InputError, match="is not what was published as ResNet18_Weights.IMAGENET1K_V1, by its hash"):
        load()
    kept.unlink()
    made.write_bytes(made.read_bytes() + b"x")
    with pytest.raises(InputError, match="could not be downloaded .*hash"):
        load()
    assert not kept.exists()


def test_weights_that_are_kept_run_nothing(weights, tmp_path):
    _, kept, asked = weights
    kept.parent.mkdir()
    torch.save({"evil": Payload(tmp_path / "canary")}, kept)
    with pytest.raises(InputError, match="by its hash"):
        load()
    assert not asked and not (tmp_path / "canary").exists()


def test_torchvision_names_the_hash_in_each_file():
    for architecture in ("vgg16", *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))):
        for weights in torchvision.models.get_model_weights(architecture):
            assert re.search(r"-[0-9a-f]{8,}\.pth$", weights.url) and weights.url.startswith("https://")
