"""Files that attack: through every public loader none runs anything, and each is refused in one sentence, unexpanded.

Each file would leave a canary where something in it were run. What it may take of memory and time is measured.
"""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import nn

from captioner.annotation_files import open_captions
from captioner.cache_folder import CacheFault, CacheFolder
from captioner.caption_files import CSV, Outcome
from captioner.caption_formats import Flickr8k, Flickr30k, ImageFolder
from captioner.checkpoint import KEY, pack
from captioner.cli import main
from captioner.decoders import LSTMDecoder
from captioner.encoders import PrecomputedRegions, ResNet, SmallCNN
from captioner.errors import InputError
from captioner.images import read_image
from captioner.model import Captioner
from captioner.model_card import _table
from captioner.region_files import count_regions, read_regions
from captioner.results import read_results
from captioner.scenes import read_scenes
from captioner.study_results import Result
from captioner.study_runs import read_references
from captioner.text_files import as_cell, from_cell
from captioner.training import TrainingCLI, train
from captioner.vocabulary import Vocabulary

MEMORY, SECONDS = 100_000_000, 10.0  # that a refusal may take, of the processor; the bombs are of more
ZEROS = 150_000_000  # bytes that a bomb unpacks to


class Payload:
    """What a pickle runs when it is opened."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


class Marker(nn.Module):
    """Shows that a constructor named in a file was run."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        open(marker, "w").close()


@pytest.fixture
def canary(tmp_path):
    """Where the files that attack leave their mark; nothing may be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()  # or the tests below would prove nothing


def _highest() -> int:
    """Return the most memory that this process had since `_forget`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _forget():
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def bounded():
    """See that what follows takes little memory and time, wherever the system tells."""
    before, started = None, time.process_time()
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        _forget()
        before = _highest()
    yield
    assert time.process_time() - started < SECONDS
    if before is not None:
        assert _highest() - before < MEMORY


def test_the_measure_of_memory_works():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell")
    _forget()
    before = _highest()
    del (block := [bytearray(b"x" * 2 * MEMORY)])[:]
    assert not block and _highest() - before > MEMORY


def one_sentence(error):
    assert "\n" not in str(error) and str(error).endswith("."), str(error)


def refused(call, *args):
    with pytest.raises(InputError) as error:
        call(*args)
    one_sentence(error.value)
    return str(error.value)


def refused_by_command(args, capsys, code=2):
    assert main([str(arg) for arg in args]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("captioner: ") and "Traceback" not in said, said
    assert "\x1b" not in said
    return said


# Checkpoints


def new_captioner(encoder=None, embedding_dim=8):
    torch.manual_seed(0)
    words = Vocabulary([f"word{number}" for number in range(30)])
    decoder = partial(LSTMDecoder, hidden_dim=8)
    return Captioner(encoder or SmallCNN(size=16, width=2), words, decoder=decoder, embedding_dim=embedding_dim).eval()


GOOD = pack(new_captioner().contents({"CIDEr-D": 0.5}))
SETTINGS, TENSORS = GOOD["settings"], GOOD["tensors"]


def saved(path, value, **how):
    with warnings.catch_warnings(action="ignore"):  # of what torch thinks of quantised tensors, and the like
        torch.save(value, path, **how)
    return path


def with_encoder(**settings):
    return {"settings": {**SETTINGS, "encoder": settings}}


def with_settings(**settings):
    return {"settings": {**SETTINGS, **settings}}


def all_tensors(change):
    return {"tensors": {name: change(value) for name, value in TENSORS.items()}}


def nested(depth):
    value = {"class": "Preprocessing"}
    for _ in range(depth):
        value = {"class": "Preprocessing", "mean": value}
    return value


def shared(depth):
    """A list that is a few bytes in a pickle, and 2 to the power of `depth` lists for whoever walks through it."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def in_itself():
    value = []
    value.append(value)
    return value


def said_to_be(**sizes):
    """A model of other sizes, whose tensors fit its settings and have one value each in the file."""
    with torch.device("meta"):
        model = new_captioner(**sizes)
    contents = pack(model.contents())
    return {**contents, "tensors": {name: torch.zeros(()).expand(x.shape) for name, x in contents["tensors"].items()}}


CONTENTS = {
    "words that are one text": {"words": "abc"},
    "words that are numbers": {"words": list(range(30))},
    "words that are lists": {"words": [["a"]] * 30},
    "no words": {"words": None},
    "one word twice": {"words": ["a"] * 30},
    "a word too many": {"words": [f"word{number}" for number in range(31)]},
    "settings that are a list": {"settings": [1]},
    "no settings": {"settings": {}},
    "settings named by numbers": {"settings": {**SETTINGS, 1: 1}},
    "a setting that is a tensor": with_settings(embedding_dim=torch.ones(3)),
    "an unknown setting": with_settings(evil=1),
    "settings in settings in settings": with_settings(decoder=nested(100)),
    "settings shared a quadrillion times": with_settings(decoder=shared(50)),
    "settings that hold themselves": with_settings(decoder=in_itself()),
    "a gigantic number": with_settings(embedding_dim=10**5000),
    "an embedding of gigabytes": with_settings(embedding_dim=10**7),
    "an embedding of terabytes": with_settings(embedding_dim=10**12),
    "an embedding that is a text": with_settings(embedding_dim="x"),
    "a decoder that is a function": with_settings(decoder="os.system"),
    "a decoder of a million layers": with_settings(decoder={"class": "TransformerDecoder", "layers": 10**6}),
    "an encoder that is a text": with_settings(encoder="os.system"),
    "an encoder by its path": with_encoder(**{"class": "os.system"}),
    "an encoder that jsonargparse would build": with_encoder(class_path="os.system", init_args={"command": "true"}),
    "an encoder without its module": with_encoder(**{"class": "ForeignEncoder"}),
    "an encoder from a module": with_encoder(**{"class": "ForeignEncoder", "module": "os:system"}),
    "a decoder in the encoder's place": with_encoder(**{"class": "LSTMDecoder", "hidden_dim": 4}),
    "an encoder with a setting too many": with_encoder(**{"class": "SmallCNN", "evil": 1}),
    "an encoder of gigabytes": with_encoder(**{"class": "SmallCNN", "size": 16, "region": 8, "width": 20_000}),
    "an encoder that reads a file": with_encoder(**{"class": "VGG16", "weights": "/etc/passwd"}),
    "images of terabytes": with_encoder(**{"class": "SmallCNN", "size": 8 * 10**8, "region": 8, "width": 2}),
    "regions of terabytes": with_encoder(**{"class": "ResNet", "depth": 18, "stage": 1, "grid": 10**6}),
    "no tensors": {"tensors": None},
    "tensors that are texts": all_tensors(lambda value: "x"),
    "tensors named by numbers": {"tensors": {1: torch.ones(1)}},
    "tensors without values": all_tensors(lambda value: value.to("meta")),
    "tensors of complex numbers": all_tensors(lambda value: value.to(torch.complex64)),
    "sparse tensors": all_tensors(lambda value: value.to_sparse() if value.dim() else value),
    "a value that is said to be a terabyte": {"tensors": {**TENSORS, "evil": torch.zeros(1).expand(10**12)}},
    "a model that is said to be a terabyte": said_to_be(embedding_dim=10**9),
    "scores that are texts": {"scores": {"CIDEr-D": "[red]"}},
    "a version that is a tensor": {"version": torch.ones(3)},
    "a version that is a text": {"version": "1"},
}


def raw_pickle(path, canary):
    path.write_bytes(pickle.dumps(Payload(canary)))


def pickle_beside(path, canary):
    saved(path, {KEY: GOOD, "extra": Payload(canary)})


def pickle_in_settings(path, canary):
    saved(path, {KEY: {**GOOD, "settings": {**SETTINGS, "dropout": Payload(canary)}}})


def older_form(path, canary):
    saved(path, {KEY: GOOD, "extra": Payload(canary)}, _use_new_zipfile_serialization=False)


def oldest_form(path, canary):
    data = pickle.dumps(Payload(canary))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            part = tarfile.TarInfo(name)
            part.size = len(data)
            archive.addfile(part, io.BytesIO(data))


def script_module(path, canary):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(path))


def archive_in_archive(path, canary):
    inner = saved(path.with_suffix(".inner"), {KEY: GOOD, "extra": Payload(canary)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "archive/data.pkl")
        archive.writestr("archive/version", "3\n")


def packed_again(good, path, change):
    """Write a checkpoint's parts as a zip archive of another kind."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.infolist():
            change(new, part.filename, old.read(part))


def bomb_of_values(path, canary):
    def change(new, name, data):
        bomb = name.endswith("data/0")
        new.writestr(name, bytes(ZEROS) if bomb else data, zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED, 1)

    packed_again(saved(path.with_suffix(".good"), {KEY: GOOD}), path, change)


def bomb_of_pickle(path, canary):
    def change(new, name, data):
        bomb = name.endswith("data.pkl")
        new.writestr(
            name,
            b"\x80\x02X" + struct.pack("<I", ZEROS) + bytes(ZEROS) + b"." if bomb else data,
            zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED,
            1,
        )

    packed_again(saved(path.with_suffix(".good"), {KEY: GOOD}), path, change)


def without_a_part(path, canary):
    def change(new, name, data):
        if not name.endswith("data/0"):
            new.writestr(name, data)

    packed_again(saved(path.with_suffix(".good"), {KEY: GOOD}), path, change)


def truncated(path, canary):
    whole = saved(path.with_suffix(".good"), {KEY: GOOD}).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


FILES = {
    one.__name__.replace("_", " "): one
    for one in (
        raw_pickle,
        pickle_beside,
        pickle_in_settings,
        older_form,
        oldest_form,
        script_module,
        archive_in_archive,
        bomb_of_values,
        bomb_of_pickle,
        without_a_part,
        truncated,
    )
}


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint(make, image, canary, tmp_path, capsys, request):
    make(tmp_path / "evil.ckpt", canary)
    request.getfixturevalue("bounded")
    said = refused_by_command(["caption", image, "--checkpoint", tmp_path / "evil.ckpt"], capsys)
    assert "evil.ckpt is not a checkpoint of captioner" in said


@pytest.mark.parametrize("change", CONTENTS.values(), ids=CONTENTS)
def test_a_checkpoint_that_holds_what_is_none(change, tmp_path, request):
    path = saved(tmp_path / "evil.ckpt", {KEY: {**GOOD, **change}})
    request.getfixturevalue("bounded")
    refused(Captioner.from_checkpoint, path)


@pytest.mark.parametrize("name", ["a value that is said to be a terabyte", "a model that is said to be a terabyte"])
def test_memory_is_not_asked_for_first(name, tmp_path):
    path = saved(tmp_path / "evil.ckpt", {KEY: {**GOOD, **CONTENTS[name]}})
    assert "is no tensor with values" in refused(Captioner.from_checkpoint, path)


def test_a_tensor_that_is_said_to_reach_behind_the_end_of_the_file(tmp_path, request):
    """Mapped, and read, it would end the process."""

    def change(new, name, data):
        if name.endswith("data.pkl"):
            for old, long in ((b"K\x7bt", b"J\xff\xff\xff\x7ft"), (b"K\x7b\x85", b"J\xff\xff\xff\x7f\x85")):
                assert data.count(old) == 1, "torch pickles otherwise by now"
                data = data.replace(old, long)
        new.writestr(name, data)

    saved(tmp_path / "good", {KEY: {**GOOD, "tensors": {**TENSORS, "evil": torch.zeros(123)}}})
    packed_again(tmp_path / "good", tmp_path / "evil.ckpt", change)
    request.getfixturevalue("bounded")
    refused(Captioner.from_checkpoint, tmp_path / "evil.ckpt")


def test_the_checkpoint_that_these_are_made_of_is_a_good_one(tmp_path):
    assert Captioner.from_checkpoint(saved(tmp_path / "good.ckpt", {KEY: GOOD})).vocabulary.words[0] == "word0"


@pytest.fixture(scope="module")
def last(fit):
    """What a training of one epoch leaves behind."""
    return Path(fit("--trainer.max_epochs", "1").trainer.checkpoint_callback.last_model_path)


COMMANDS = {
    "caption": "caption {image} --checkpoint {evil}",
    "caption, as the second of an ensemble": "caption {image} --checkpoint {good} {evil}",
    "overlay": "overlay {image} --checkpoint {evil} --output {folder}/page.html",
    "app": "app --checkpoint {evil} --port 0",
    "faithfulness": "faithfulness --checkpoint {evil} --files COCOCaptions --root {folder} --split val",
    "fit": "fit --config {recipe} --ckpt_path {evil}",
    "fit, to begin with": "fit --config {recipe} --model.initial_weights {evil}",
    "fit, an encoder's": "fit --config {recipe} --model.encoder captioner.ResNet --model.encoder.depth 18 "
    "--model.encoder.weights {evil} --model.encoder.preprocessing.size 32",
    "validate": "validate --config {recipe} --ckpt_path {evil}",
    "test": "test --config {recipe} --ckpt_path {evil}",
    "test, as an ensemble's": "test --config {recipe} --ckpt_path {good} --model.ensemble {evil}",
}


@pytest.mark.sockets  # the app's
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_runs_a_pickle(command, last, recipe, scenes, image, canary, tmp_path, capsys, monkeypatch):
    if command.startswith("app"):
        pytest.importorskip("uvicorn", reason="the extra 'app' is not installed")
    if command.startswith("faithfulness"):
        shutil.copytree(scenes / "val", tmp_path / "val2017")
        (tmp_path / "annotations").mkdir()
        shutil.copy(scenes / "captions_val.json", tmp_path / "annotations" / "captions_val2017.json")
    monkeypatch.chdir(tmp_path)  # for what a command might leave behind
    evil = saved(tmp_path / "evil.ckpt", {**torch.load(last, weights_only=True), "extra": Payload(canary)})
    places = {"recipe": recipe, "image": image, "folder": tmp_path, "good": last, "evil": evil}
    args = [arg.format(**places) for arg in command.split(" ") if arg]
    if args[0] in ("fit", "validate", "test"):
        args += ["--trainer.default_root_dir", str(tmp_path / "runs")]
    assert "evil.ckpt" in refused_by_command(args, capsys)
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def payloads(last, canary):
    """What Lightning and jsonargparse would build of hyper-parameters in a checkpoint, beside a good one."""
    module = {"class_path": f"{__name__}.Marker", "init_args": {"marker": str(canary)}}
    command = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}
    instantiator = "lightning.pytorch.cli.instantiate_module"
    return {
        **torch.load(last, weights_only=True),
        "hparams_name": "kwargs",
        "hparams_type": f"{__name__}.Marker",
        "hyper_parameters": {"_instantiator": instantiator, "_class_path": f"{__name__}.Marker", "encoder": module},
        "datamodule_hyper_parameters": {"_instantiator": instantiator, "_class_path": "subprocess.Popen", **command},
    }


RESUMED = ["--trainer.max_epochs", "2"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "caption"])
def test_hyper_parameters_of_a_checkpoint_are_not_heeded(command, payloads, recipe, image, canary, tmp_path):
    path = saved(tmp_path / "evil.ckpt", payloads)
    args = [command, "--config", recipe, "--ckpt_path", path, "--trainer.default_root_dir", tmp_path / "runs"]
    if command == "caption":
        args = [command, image, "--checkpoint", path]
    assert main([str(arg) for arg in (*args, *(RESUMED if command == "fit" else []))]) == 0
    assert not canary.exists()


def test_lightnings_own_way_would_heed_them(payloads, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingCLI, "_parse_ckpt_path", LightningCLI._parse_ckpt_path)
    del payloads["hyper_parameters"]["_class_path"]  # which is of another of its ways
    path = saved(tmp_path / "evil.ckpt", payloads)
    with pytest.raises(Exception):  # noqa: B017 - what becomes of it is no matter
        train(["test", "--config", str(recipe), "--ckpt_path", str(path)])
    (tmp_path / "canary").unlink()  # or the test above would prove nothing


BESIDE = {
    "no version": {"pytorch-lightning_version": None},
    "a version that is none": {"pytorch-lightning_version": "x"},
    "a state that is a text": {"state_dict": "x"},
    "loops that are a text": {"loops": "x"},
    "optimisers that are a list of numbers": {"optimizer_states": [1]},
    "no state of an optimiser": {"optimizer_states": []},
    "schedules that are a text": {"lr_schedulers": ["x"]},
}


@pytest.mark.parametrize("change", BESIDE.values(), ids=BESIDE)
def test_a_checkpoint_that_cannot_be_gone_on_from(change, last, recipe, tmp_path, capsys):
    path = saved(tmp_path / "evil.ckpt", {**torch.load(last, weights_only=True), **change})
    args = ["fit", "--config", recipe, "--ckpt_path", path, "--trainer.default_root_dir", tmp_path / "runs", *RESUMED]
    assert "--ckpt_path is damaged" in refused_by_command(args, capsys).splitlines()[-1]


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_variable_of_the_shell_lets_pickles_in(variable, last, recipe, image, canary, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "1")
    evil = saved(tmp_path / "evil.ckpt", {**torch.load(last, weights_only=True), "extra": Payload(canary)})
    refused_by_command(["caption", image, "--checkpoint", evil], capsys)
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: asked.append(how["weights_only"]) or load(*args, **how))
    assert main(["test", "--config", str(recipe), "--ckpt_path", str(last)]) == 0
    assert asked and all(each is True for each in asked)


def test_words_of_a_checkpoint_cannot_command_a_terminal(image, tmp_path, capsys):
    evil = ["\x1b]0;gotcha\x07", "\x9b31m", "[red]loud[/red]", "</script><script>alert(1)</script>"]
    model = new_captioner()
    with torch.no_grad():
        model.output.bias[4:8] = 1e4  # says these
    contents = pack(model.contents())
    words = [*evil, *contents["words"][4:]]
    path = saved(tmp_path / "evil.ckpt", {KEY: {**contents, "words": words}})
    assert main(["caption", str(image), "--checkpoint", str(path)]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & set(said) and ("gotcha" in said or "31m" in said or "loud" in said)


# Weights of encoders


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_weights_that_are_none(make, canary, tmp_path, request):
    make(tmp_path / "evil.pth", canary)
    encoder = ResNet(depth=18, stage=1, weights=str(tmp_path / "evil.pth"))
    request.getfixturevalue("bounded")
    assert "evil.pth" in refused(encoder.load_weights)


# Regions


def array_file(shape, data=b"", dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def zipped(**parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in parts.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def objects(canary, save=np.save):
    file = io.BytesIO()
    save(file, np.array([[Payload(canary)]], object), **({"allow_pickle": True} if save is np.save else {}))
    return file.getvalue()


D = 6
REGIONS = {
    "a pickle.npy": lambda canary: pickle.dumps(Payload(canary)),
    "a pickle.npz": lambda canary: pickle.dumps(Payload(canary)),
    "an array of objects.npy": objects,
    "an array of objects.npz": lambda canary: objects(canary, np.savez),
    "a pickle in an archive.npz": lambda canary: zipped(features=pickle.dumps(Payload(canary))),
    "an archive in an archive.npz": lambda canary: zipped(features=zipped(features=array_file((1, D), bytes(4 * D)))),
    "a bomb.npz": lambda canary: zipped(features=array_file((ZEROS // 4 // D, D), bytes(ZEROS // 4 // D * 4 * D))),
    "terabytes.npy": lambda canary: array_file((10**12, D)),
    "terabytes.npz": lambda canary: zipped(features=array_file((10**12, D))),
    "more than there are numbers.npy": lambda canary: array_file((10**40, D)),
    "less than nothing.npy": lambda canary: array_file((-4, D), bytes(4 * D * 4)),
    "values that are not there.npy": lambda canary: array_file((1000, D)),
    "a type of gigabytes.npy": lambda canary: array_file((1, D), dtype="<U400000000"),
    "a header of brackets.npy": lambda canary: b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 8999 + b"\n",
    "a header of gigabytes.npy": lambda canary: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
    "a header that is code.npy": lambda canary: (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"__import__('os').system('touch canary')".ljust(59) + b"\n"
    ),
    "nothing.npz": lambda canary: zipped(),
    "ten thousand arrays.npz": lambda canary: zipped(**{f"a{number}": b"" for number in range(10_000)}),
}


@pytest.mark.parametrize("name", REGIONS)
def test_regions(name, canary, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(REGIONS[name](canary))
    request.getfixturevalue("bounded")
    said = refused(read_regions, tmp_path / name, D)
    assert name in said and len(said) < 1000
    if name not in ("values that are not there.npy",):  # which the header does not show
        refused(count_regions, tmp_path / name, D)


def test_regions_that_attack_are_named_by_the_command(canary, tmp_path, capsys):
    good = saved(tmp_path / "good.ckpt", {KEY: pack(new_captioner(PrecomputedRegions(dim=D)).contents())})
    for name in ("an array of objects.npy", "a bomb.npz"):
        (tmp_path / name).write_bytes(REGIONS[name](canary))
        assert main(["caption", str(tmp_path / name), "--checkpoint", str(good)]) == 1
        assert f"{name} " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.npy", "captions.csv"):
        os.mkfifo(tmp_path / name)
    refused(read_regions, tmp_path / "a.npy", D)
    assert "it is a pipe" in refused(read_results, tmp_path / "captions.csv")


# Cached annotations

INDEX = {
    "format": 2, "fingerprint": "0" * 16, "images": 2, "dataset": "\x1b[31m[red]", "split": "a\nb", "encoder": "e",
    "view": "upright", "done": 2, "regions": 2, "size": 3, "grid": [1, 2], "made": "", "ragged": True, "missing": [],
}  # fmt: skip


def cache(folder, index=INDEX, values=None, counts=None):
    folder.mkdir()
    (folder / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    np.save(folder / "values.npy", np.zeros((2, 2, 3), np.float16))
    np.save(folder / "counts.npy", np.ones(2, np.int32))
    for name, data in (("values.npy", values), ("counts.npy", counts)):
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


BRACKETS = "[" * 100_000 + "]" * 100_000
CACHES = {
    "a pickle": lambda canary: {"values": pickle.dumps(Payload(canary))},
    "objects": lambda canary: {"values": objects(canary)},
    "an archive": lambda canary: {"values": zipped(values=array_file((2, 2, 3), bytes(24), "<f2"))},
    "counts in an archive": lambda canary: {"counts": zipped(values=array_file((2,), bytes(8), "<i4"))},
    "counts that are objects": lambda canary: {"counts": objects(canary)},
    "terabytes": lambda canary: {"values": array_file((2, 10**12, 3), dtype="<f2")},
    "another header": lambda canary: {"values": array_file((2, 3, 2), bytes(24), "<f2")},
    "counts that are too many": lambda canary: {"counts": array_file((2,), b"\xff\xff\xff\x7f" * 2, "<i4")},
    "brackets": lambda canary: {"index": BRACKETS},
    "a list": lambda canary: {"index": "[]"},
    "another grid": lambda canary: {"index": {**INDEX, "grid": [10**9, 10**9]}},
    "negative numbers": lambda canary: {"index": {**INDEX, "images": -1}},
    "rows that are not there": lambda canary: {"index": {**INDEX, "missing": [10**9]}},
    "a setting too many": lambda canary: {"index": {**INDEX, "__class__": "os.system"}},
}


@pytest.mark.parametrize("change", CACHES.values(), ids=CACHES)
def test_caches(change, canary, tmp_path, capsys, request):
    folder = cache(tmp_path / ("0" * 16), **change(canary))
    request.getfixturevalue("bounded")
    with pytest.raises(CacheFault) as error:
        CacheFolder(folder).read()
    one_sentence(error.value)
    assert main(["cache", "list", str(tmp_path)]) == 0
    assert "damaged" in (said := capsys.readouterr().out) or "other values" in said


def test_a_cache_cannot_command_a_terminal(tmp_path, capsys):
    cache(tmp_path / ("0" * 16))
    assert main(["cache", "list", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "[red]" in said and "a\\nb" in said


# Text


def test_lists_in_lists_in_lists_and_numbers_of_thousands_of_digits(tmp_path, capsys, bounded):
    digits = "9" * 10_000
    for evil in (BRACKETS, '{"a":' * 100_000, digits, f'{{"captioner journal": 1, "settings": {BRACKETS}}}'):
        for name in ("captions.json", "result.json", "references.json", "scenes_val.json", "out.jsonl.journal"):
            (tmp_path / name).write_text(evil)
        (tmp_path / "captions.jsonl").write_text('{"image": "a.jpg", "caption": ' + evil + "}\n")
        for name in ("captions.json", "captions.jsonl"):
            refused(lambda name=name: open_captions(tmp_path / name).records())
            if evil != digits:
                refused(read_results, tmp_path / name)
        refused(Result.read, tmp_path / "result.json")
        refused(read_references, tmp_path)
        refused(read_scenes, tmp_path, "val")
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        good = saved(tmp_path / "good.ckpt", {KEY: GOOD})
        args = ["caption", tmp_path / "a.png", "--checkpoint", good, "--output", tmp_path / "out.jsonl"]
        assert "out.jsonl.journal stands where" in refused_by_command(args, capsys)


def test_a_caption_in_lists_in_lists(tmp_path):
    for depth in (10, 400, 900):
        line = '{"image": "a.jpg", "caption": ' + "[" * depth + '"a"' + "]" * depth + "}\n"
        (tmp_path / "captions.jsonl").write_text(line)
        refused(lambda: open_captions(tmp_path / "captions.jsonl").records())


HEADER = {"captioner journal": 1, "settings": {}, "overwrites": False, "replaces": None}
JOURNALS = {
    "settings that are a list": [{**HEADER, "settings": [1]}],
    "settings that are a text": [{**HEADER, "settings": "x"}],
    "a pickle's name": [{**HEADER, "overwrites": "os.system"}],
    "a digest that is a list": [{**HEADER, "replaces": [1]}],
    "a list": [[1]],
    "nothing it knows": [{"captioner journal": 2}],
}


@pytest.mark.parametrize("lines", JOURNALS.values(), ids=JOURNALS)
def test_journals(lines, image, tmp_path, capsys):
    (tmp_path / "out.jsonl.journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    good = saved(tmp_path / "good.ckpt", {KEY: GOOD})
    said = refused_by_command(["caption", image, "--checkpoint", good, "--output", tmp_path / "out.jsonl"], capsys)
    assert "out.jsonl.journal stands where" in said


LINES = [
    {"image": ["a"], "state": None, "captions": [], "fault": "", "left": 0},
    {"image": "a", "state": None, "captions": [["text"]], "fault": "", "left": 0},
    {"image": "a", "state": None, "captions": [[1, "x"]], "fault": "", "left": 0},
    {"image": "a", "state": None, "captions": 1, "fault": "", "left": 0},
    {"image": "a", "captions": [], "fault": None, "left": "x"},
    {"finished": [1]},
    {"replaces": {"a": 1}},
    [],
    1,
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_line_that_is_no_journals_ends_it(line, image, tmp_path):
    good = saved(tmp_path / "good.ckpt", {KEY: GOOD})
    args = ["caption", str(image), "--checkpoint", str(good), "--output", str(tmp_path / "out.jsonl")]
    args += ["--precision", "float32"]
    assert main(args) == 0
    journal = tmp_path / "out.jsonl.journal"
    header, *lines = journal.read_text().splitlines()
    if isinstance(line, dict) and "image" in line:
        line = {**line, "image": str(image) if line["image"] == "a" else line["image"]}
    journal.write_text("\n".join([header, json.dumps(line), *lines]) + "\n")
    (tmp_path / "out.jsonl").unlink()
    assert main(args) == 0  # what was cut off is done again
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


YAML = {
    "a command": "!!python/object/apply:os.system ['touch canary']",
    "an object": "trainer: !!python/object/new:os.system ['touch canary']",
    "a module": "trainer: !!python/module:antigravity ''",
    "lists in lists": "a: " + "[" * 3000 + "]" * 3000,
    "a gigantic number": "a: " + "9" * 10_000,
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
@pytest.mark.parametrize("command", ["fit", "study"])
def test_yaml(command, text, canary, tmp_path, capsys, monkeypatch, bounded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text(text)
    assert "evil.yaml " in refused_by_command([command, "--config", "evil.yaml"], capsys)


# Paths

OUTSIDE = ["../a.jpg", "b/../../a.jpg", "/etc/a.jpg", "..\\a.jpg", "C:\\a.jpg", "\\\\host\\a.jpg"]
NO_NAMES = ["a\0.jpg", "a" * 5000, "a/" * 3000 + "b.jpg"]


def coco(root, name):
    lists = {"images": [{"id": 1, "file_name": name}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
    (root / "captions.json").write_text(json.dumps(lists))
    return open_captions(root / "captions.json")


def karpathy(root, name):
    image = {"filepath": "", "filename": name, "split": "train", "sentences": [{"raw": "a"}]}
    (root / "dataset_x.json").write_text(json.dumps({"images": [image]}))
    return open_captions(root / "dataset_x.json")


def karpathys_folder(root, name):
    image = {"filepath": name, "filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    (root / "dataset_x.json").write_text(json.dumps({"images": [image]}))
    return open_captions(root / "dataset_x.json")


def hugging_face(root, name):
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}) + "\n")
    return ImageFolder(root)


def table(root, name):
    with open(root / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), (name, "a")])
    return open_captions(root / "captions.csv")


def json_lines(root, name):
    (root / "captions.jsonl").write_text(json.dumps({"image": name, "caption": "a"}) + "\n")
    return open_captions(root / "captions.jsonl")


def flickr8k(root, name):
    (root / "Flickr8k.token.txt").write_text(f"{name}#0\ta\n")
    return Flickr8k(root)


def flickr30k(root, name):
    (root / "results.csv").write_text(f"image_name| comment_number| comment\n{name}| 0| a\n")
    return Flickr30k(root)


FORMATS = [coco, karpathy, karpathys_folder, hugging_face, table, json_lines, flickr8k, flickr30k]


@pytest.mark.parametrize("make", FORMATS)
def test_names_of_images_stay_in_the_dataset(make, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")  # which the first of the names would reach
    for name in OUTSIDE:
        assert "outside the dataset's folder" in refused(make(tmp_path / "data", name).records)
    for name in NO_NAMES:
        refused(make(tmp_path / "data", name).records)
        refused(make(tmp_path / "data", name).read, "train")


def test_the_command_refuses_them_too(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    hugging_face(tmp_path / "data", "../\x1b[31ma.jpg")
    assert main(["check", str(tmp_path / "data")]) == 1
    said = capsys.readouterr()
    assert "outside the dataset's folder" in said.out + said.err and "\x1b" not in said.out + said.err


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there are no such devices")
def test_links_to_what_has_no_end(tmp_path, bounded):
    for name in ("captions.json", "captions.csv", "Flickr8k.token.txt", "scenes_val.json", "result.json", "a.jpg"):
        (tmp_path / name).symlink_to("/dev/zero")
    (tmp_path / "captions.csv").unlink()
    table(tmp_path, "a.jpg")
    refused(Flickr8k(tmp_path).records)
    refused(read_results, tmp_path / "captions.json")
    refused(Result.read, tmp_path / "result.json")
    refused(read_scenes, tmp_path, "val")
    refused(read_image, tmp_path / "a.jpg")
    refused(open_captions(tmp_path / "captions.csv").read, "train")  # hashes the images
    folder = cache(tmp_path / ("0" * 16))
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to("/dev/zero")
    refused(CacheFolder(folder).read)


def test_a_file_that_is_larger_than_text_is(tmp_path, bounded):
    with open(tmp_path / "results.json", "wb") as file:
        file.truncate(2**42)  # of which nothing is on the disk
    assert "more than 4,000 MB" in refused(read_results, tmp_path / "results.json")


# Images


def png_of(width, height):
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


IMAGES = {
    "bomb.png": lambda: png_of(60_000, 60_000),
    "line.png": lambda: png_of(2_000_000, 1),
    "postscript.jpg": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touch canary) system\n"
    ),
    "pickle.jpg": lambda: pickle.dumps(Payload("canary")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, canary, tmp_path, monkeypatch, bounded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(IMAGES[name]())
    assert name in refused(read_image, tmp_path / name)


# What is written

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://example.org")', "'=1", "''+1", "＝1"]
TEXTS = ["a dog", "'a dog'", "''", "a = b", "1 - 1", "", "'", "don't"]


def test_no_cell_is_a_formula_and_each_is_read_as_it_was(tmp_path):
    for text in FORMULAS:
        assert as_cell(text).startswith("'") and as_cell(text) != text
    for text in TEXTS:
        assert as_cell(text) == text
    for text in FORMULAS + TEXTS:
        assert from_cell(as_cell(text)) == text
    captions = [text for text in FORMULAS + TEXTS if text.strip()]
    file = tmp_path / "captions.csv"
    outcomes = [Outcome(Path(f"={number}.jpg"), [(text, -1.5), (text, -2.5)]) for number, text in enumerate(captions)]
    file.write_text("".join(CSV(file, 2).parts(outcomes)), newline="")
    with open(file, newline="") as opened:
        cells = [cell for row in csv.reader(opened) for cell in row]
    numbers = {"-1.5", "-2.5"}
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r") and cell and cell not in numbers]
    assert [(one.image, one.caption) for one in read_results(file)] == [
        (f"={number}.jpg", text) for number, text in enumerate(captions)
    ]
    records = open_captions(file).records()
    assert [record.captions for record in records] == [(text, text) for text in captions]
    # Other people's tables are read letter by letter.
    (tmp_path / "theirs.csv").write_text("image,caption\n'=1.jpg,'=1\n")
    (record,) = open_captions(tmp_path / "theirs.csv").records()
    assert (record.image_id, record.captions) == ("'=1.jpg", ("'=1",))
    (one,) = read_results(tmp_path / "theirs.csv")
    assert (one.image, one.caption) == ("'=1.jpg", "'=1")


def test_a_model_card_holds_no_markup_but_its_own():
    text = _table([("<script>alert(1)</script>", "a | b\n| c |")])
    assert "<script>" not in text and text.count("\n") == 2 and text.count("\\|") == 3


def test_what_an_error_says_cannot_command_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "\x1b]0;gotcha\x07\ncaptioner.errors.InputError: all is well.jpg"
    said = refused_by_command(["caption", evil, "--checkpoint", "none.ckpt"], capsys)
    assert "gotcha" in said and "\x07" not in said
