"""What a checkpoint is: all that captioning needs, in a file that can hold no code."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from lightning.pytorch.cli import LightningCLI
from torch import nn

import captioner as captioner_package
from captioner.checkpoint import KEY, VERSION, pack, read
from captioner.cli import main
from captioner.decoders import LSTMDecoder
from captioner.encoders import ForeignEncoder, ResNet, SmallCNN
from captioner.errors import InputError
from captioner.images import Preprocessing, find_images
from captioner.model import Captioner
from captioner.training import TrainingCLI, train
from captioner.vocabulary import Vocabulary

WORDS = [f"word{number}" for number in range(30)]

FOREIGN = """\
import torch
from torch import nn

class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 12, 8, 8)

    def forward(self, x):
        return self.map(x)

class Others(Patches):
    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 10, 8, 8)
"""


def captioner(encoder):
    """A captioner of random weights, which are large enough that it says something else of every image."""
    torch.manual_seed(2)
    decoder = partial(LSTMDecoder, hidden_dim=24)
    model = Captioner(encoder, Vocabulary(WORDS), decoder=decoder, embedding_dim=24)
    with torch.no_grad():
        for part in (model.decoder, model.output):
            for parameter in part.parameters():
                parameter.mul_(4)
    return model.eval()


def save(model, path):
    torch.save({KEY: pack(model.contents({"CIDEr-D": 0.5}))}, path)
    return path


def said(model, images):
    captions = model.caption(images)
    return [(caption.text, round(caption.log_probability, 3)) for caption in captions]


@pytest.fixture(scope="module")
def images(scenes):
    return find_images([scenes / "val"])


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    (tmp_path / "her_encoders.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("her_encoders")
    del sys.modules["her_encoders"]


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message


# Complete


OPEN = """\
import json, socket, sys
import torch

def refuse(*_, **__):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
load = torch.load

def loaded(*args, weights_only=None, **kwargs):
    assert weights_only is True
    return load(*args, weights_only=weights_only, **kwargs)

torch.load = loaded
from captioner.model import Captioner
images = sys.argv[1].split("|")
for path in sys.argv[2:]:
    captions = Captioner.from_checkpoint(path).caption(images)
    print(json.dumps([(caption.text, round(caption.log_probability, 3)) for caption in captions]))
"""


@pytest.mark.slow
def test_it_opens_in_a_new_process_with_nothing_else(images, best, tmp_path):
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    resnet = ResNet(depth=18, stage=2, weights=str(weights), grid=3, preprocessing=Preprocessing("squash", 32))
    resnet.load_weights()
    models = [captioner(SmallCNN(size=32, width=4)), captioner(resnet), Captioner.from_checkpoint(best)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, model in enumerate(models[:2]):
        save(model, elsewhere / f"{number}.ckpt")
    (elsewhere / "2.ckpt").write_bytes(best.read_bytes())
    weights.unlink()
    result = subprocess.run(
        [sys.executable, "-c", OPEN, "|".join(map(str, images)), "0.ckpt", "1.ckpt", "2.ckpt"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(Path(captioner_package.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    expected = [said(model, images) for model in models]
    assert [[tuple(caption) for caption in json.loads(line)] for line in result.stdout.splitlines()] == expected
    assert all(len(set(captions)) > 1 for captions in expected)  # else equal captions would show nothing


def test_what_fit_wrote_holds_words_scores_and_preprocessing(run, best):
    contents = read(best)
    assert contents.words == list(run.datamodule.vocabulary.words)
    reached = run.trainer.checkpoint_callback.best_model_score.item()
    assert contents.scores["CIDEr-D"] == pytest.approx(reached, rel=1e-5)
    described = {"class": "SmallCNN", "size": 32, "region": 8, "width": 4, "recompute": False}
    assert contents.settings["encoder"] == described
    assert json.loads(json.dumps(contents.settings)) == contents.settings


# Foreign encoders


def test_a_foreign_encoder_is_asked_for_and_then_taken(foreign, images, tmp_path, capsys, monkeypatch):
    wrapped = ForeignEncoder(foreign.Patches(), grid=3, preprocessing=Preprocessing("squash", 32))
    model = captioner(wrapped)
    path = save(model, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="her_encoders:Patches.*--encoder package:Class.*encoder=") as error:
        Captioner.from_checkpoint(path)
    one_sentence(error)
    again = Captioner.from_checkpoint(path, encoder=foreign.Patches())
    assert said(again, images) == said(model, images) and again.encoder.grid == 3

    monkeypatch.chdir(tmp_path)
    picture = str(images[0])
    assert main(["caption", picture, "--checkpoint", str(path), "--encoder", "her_encoders:Patches"]) == 0
    assert capsys.readouterr().out == f"{picture}\t{said(model, images)[0][0]}\n"
    for encoder in ((), ("--encoder", "her_encoders:Others"), ("--encoder", "nowhere:Class"), ("--encoder", "colon")):
        assert main(["caption", picture, "--checkpoint", str(path), *encoder]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_opening_imports_no_foreign_code(foreign, tmp_path):
    path = save(captioner(ForeignEncoder(foreign.Patches())), tmp_path / "foreign.ckpt")
    del sys.modules["her_encoders"]
    with pytest.raises(InputError):
        Captioner.from_checkpoint(path)
    assert "her_encoders" not in sys.modules
    sys.modules["her_encoders"] = foreign


def test_an_encoder_too_many_is_refused(tmp_path):
    path = save(captioner(SmallCNN(size=32, width=4)), tmp_path / "own.ckpt")
    with pytest.raises(InputError, match="brings its own encoder") as error:
        Captioner.from_checkpoint(path, encoder=nn.Identity())
    one_sentence(error)


# Not ours


def broken(kind, path):
    whole = save(captioner(SmallCNN(size=32, width=4)), path).read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "a state dict":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif kind == "a tensor":
        torch.save(torch.ones(2), path)
    elif kind == "a module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "Lightning's":
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", KEY: "something"}, path)
    elif kind == "newer":
        torch.save({KEY: torch.load(path, weights_only=True)[KEY] | {"version": VERSION + 1}}, path)
    return path


BROKEN = ["missing", "text", "empty", "truncated", "a state dict", "a tensor", "a module", "Lightning's", "newer"]


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_ours_is_said_in_one_sentence(kind, tmp_path, recipe, images, capsys):
    path = broken(kind, tmp_path / "some.ckpt")
    with pytest.raises(InputError, match="some.ckpt") as error:
        read(path)
    one_sentence(error)
    for command in (["caption", str(images[0]), "--checkpoint"], ["test", "--config", str(recipe), "--ckpt_path"]):
        assert main([*command, str(path)]) == 2
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1 and "some.ckpt" in stderr and "Traceback" not in stderr


def test_a_later_version_is_named(tmp_path):
    with pytest.raises(InputError, match=f"version {VERSION + 1}.*reads version {VERSION}"):
        read(broken("newer", tmp_path / "some.ckpt"))


def test_tensors_that_do_not_fit_their_settings(tmp_path):
    contents = captioner(SmallCNN(size=32, width=4)).contents()
    contents.tensors.popitem()
    torch.save({KEY: pack(contents)}, tmp_path / "some.ckpt")
    with pytest.raises(InputError, match="damaged") as error:
        Captioner.from_checkpoint(tmp_path / "some.ckpt")
    one_sentence(error)


# No code, no settings


RESUMED = ["--trainer.max_epochs", "28", "--trainer.check_val_every_n_epoch", "4"]


class Marker(nn.Module):
    """Shows that a constructor named in a file was run."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        open(marker, "w").close()


@pytest.fixture
def malicious(last, tmp_path):
    """A checkpoint of ours whose hyper-parameters name a constructor, and settings other than the recipe's."""
    marker = tmp_path / "marker"
    file = torch.load(last, weights_only=True)
    module = {"class_path": f"{__name__}.Marker", "init_args": {"marker": str(marker)}}
    file["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "encoder": module,
        "learning_rate": 123.0,
        "beam_size": 1,
    }
    file["datamodule_hyper_parameters"] = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "batch_size": 1}
    torch.save(file, tmp_path / "malicious.ckpt")
    return tmp_path / "malicious.ckpt", marker


@pytest.mark.parametrize("command", ["test", "validate", "fit"])
def test_nothing_but_weights_is_taken_from_a_file(command, malicious, recipe, tmp_path):
    path, marker = malicious
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(path)]
    cli = train([command, *flags, *(RESUMED if command == "fit" else [])])
    assert not marker.exists()
    assert (cli.model.learning_rate, cli.model.beam_size, cli.datamodule.batch_size) == (0.02, 3, 8)
    assert isinstance(cli.model.captioner.encoder, SmallCNN)


def test_lightnings_own_way_would_run_the_constructor(malicious, recipe, monkeypatch):
    path, marker = malicious
    monkeypatch.setattr(TrainingCLI, "_parse_ckpt_path", LightningCLI._parse_ckpt_path)
    with pytest.raises(Exception):  # noqa: B017 - what becomes of it is no matter
        train(["test", "--config", str(recipe), "--ckpt_path", str(path)])
    assert marker.exists()  # or the test above would prove nothing


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("command", ["test", "fit", "caption"])
def test_a_pickled_payload_is_not_run(command, last, recipe, images, tmp_path, capsys):
    marker, path = tmp_path / "marker", tmp_path / "payload.ckpt"
    torch.save({**torch.load(last, weights_only=True), "extra": Payload(str(marker))}, path)
    if command == "caption":
        args = ["caption", str(images[0]), "--checkpoint", str(path)]
    else:
        args = [command, "--config", str(recipe), "--ckpt_path", str(path)]
    assert main(args) == 2
    assert not marker.exists() and capsys.readouterr().err.count("\n") == 1


def test_a_class_outside_the_table_is_never_built(tmp_path):
    contents = captioner(SmallCNN(size=32, width=4)).contents()
    contents.settings["encoder"] = {"class": "os.system", "command": "true"}
    torch.save({KEY: pack(contents)}, tmp_path / "some.ckpt")
    with pytest.raises(InputError, match="os.system") as error:
        Captioner.from_checkpoint(tmp_path / "some.ckpt")
    one_sentence(error)
