"""The commands of the README and of docs/, and the recipes, mean something to the program as it is."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from captioner import app_command, caption_command, check_command, demo, overlay_command, study_runs
from captioner.cli import main
from captioner.training import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SEVERAL_GPUS = (ROOT / "docs" / "several_gpus.md").read_text()
DATA = (ROOT / "data" / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README + SEVERAL_GPUS + DATA, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if "captioner fit" in line]
STUDIES = [line for block in BLOCKS for line in block.splitlines() if "captioner study" in line]
CAPTIONS = [line for block in BLOCKS for line in block.splitlines() if "captioner caption" in line]
OVERLAYS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if "captioner overlay" in line]
APPS = [line for block in BLOCKS for line in block.splitlines() if "captioner app" in line]
DEMOS = [
    line.partition("captioner demo")[2] for block in BLOCKS for line in block.splitlines() if "captioner demo" in line
]
CHECKS = [line for block in BLOCKS for line in block.splitlines() if "captioner check" in line]
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))
FILES = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in FILES if not path.name.startswith("study")]  # which are laid over one, see test_study.py
FLAGS = re.findall(r"^\|[^|]*\| `(--[^`]*)`", README, re.MULTILINE)


def print_config(args, capsys):
    """Have a command parsed and checked to the last setting, and nothing run."""
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_each_recipe_is_understood(recipe, capsys):
    assert "encoder" in print_config(["fit", "--config", str(recipe)], capsys)


@pytest.mark.parametrize("recipe", FILES, ids=lambda path: path.name)
def test_each_recipe_says_what_it_is_for(recipe):
    header = "".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert all(word in header for word in ("Purpose", "Command", "Time", "Reached"))


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.name, marks=[] if path.name == "flickr8k.yaml" else pytest.mark.slow)
        for path in RECIPES
    ],
)
def test_each_decoder_and_bridge_is_laid_over_each_recipe(recipe, capsys):
    parts = {path.parent.name: [] for path in PARTS}
    for path in PARTS:
        assert path.read_text().startswith("# ")
        parts[path.parent.name].append(path)
    for decoder, bridge in itertools.product(parts["decoders"], parts["bridges"]):
        files = ["--config", str(recipe), "--config", str(decoder), "--config", str(bridge)]
        model = yaml.safe_load(print_config(["fit", *files], capsys))["model"]
        for part, path in (("decoder", decoder), ("bridge", bridge)):
            given = yaml.safe_load(path.read_text())["model"][part]
            assert model[part]["class_path"].endswith(f".{given['class_path']}")
            assert given.get("init_args", {}).items() <= model[part]["init_args"].items()
        # What the recipe says of the part before, such as its size, holds for the one that takes its place.
        dim = yaml.safe_load(recipe.read_text())["model"]["bridge"]["init_args"]["dim"]
        assert bridge.stem == "none" or model["bridge"]["init_args"]["dim"] == dim


@pytest.mark.parametrize("command", COMMANDS)
def test_each_fit_command_is_understood(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"(?<=encoder.module )\S+", "torch.nn.Identity", command))  # the reader's own module
    print_config(words[words.index("captioner") + 1 :], capsys)


@pytest.mark.parametrize("command", STUDIES)
def test_each_study_command_is_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    given = []
    monkeypatch.setattr(study_runs, "plan", lambda study, output, flags, _: given.append((*study.flags, *flags)))
    monkeypatch.setattr(study_runs, "make", lambda runs, output: True)
    monkeypatch.setattr(study_runs, "tabulate", lambda study, output: None)
    words = shlex.split(command)
    assert main(words[words.index("captioner") + 1 :]) == 0
    assert settings(given[0])["data"]["files"]["init_args"]["root"] == "data/flickr8k"


@pytest.mark.parametrize("command", CAPTIONS + OVERLAYS + APPS)
def test_each_caption_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "holiday").mkdir()
    (tmp_path / "docs").mkdir()
    parsed = []
    for each in (caption_command, overlay_command, app_command):
        monkeypatch.setattr(each, "run", lambda options, open_model: parsed.append(options) or 0)
    assert main(shlex.split(command)[1:]) == 0 and parsed[0].checkpoint[0].name == "best.ckpt"


@pytest.mark.parametrize("flags", DEMOS)
def test_each_demo_command_is_understood(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = []
    monkeypatch.setattr(demo, "run", lambda output, seed, started, configs, language: given.append((output, configs)))
    assert main(["demo", *shlex.split(flags)]) == 0
    ((output, configs),) = given
    assert str(output) == "captioner-demo" and all(path.is_file() for path in configs)


def test_the_first_picture_is_made_by_a_command():
    (picture,) = re.findall(r"^!\[.*\]\((.*)\)$", README.partition("## Two commands")[0], re.MULTILINE)
    assert sum(f"--output {picture}" in command for command in OVERLAYS) == 1
    assert (ROOT / picture).stat().st_size < 200_000


@pytest.mark.parametrize("command", CHECKS)
def test_each_check_command_is_understood(command, monkeypatch):
    parsed = []
    monkeypatch.setattr(check_command, "run", lambda options: parsed.append(options) or 0)
    assert main(shlex.split(command)[1:]) == 0 and len(parsed) == 1


@pytest.mark.parametrize("flags", FLAGS)
def test_each_flag_is_understood(flags, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    print_config(["fit", "--config", "configs/flickr8k.yaml", *shlex.split(flags)], capsys)


def test_there_are_commands_and_flags_to_test():
    assert len(COMMANDS) >= 2 and len(FLAGS) >= 5 and STUDIES and len(CAPTIONS) >= 4
    assert len(OVERLAYS) >= 3 and len(DEMOS) >= 2 and APPS and len(CHECKS) >= 5
