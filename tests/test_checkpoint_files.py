"""Checkpoints on the disk: what kills, full disks and refused writes leave of them, through the plugin and `fit`."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from test_training import one_line

import captioner
import captioner.checkpoint_files as checkpoint_files
from captioner.checkpoint_files import (
    CheckpointFiles,
    check_folder,
    claim,
    clear_unfinished,
    explaining,
    replacing,
    use_checkpoint_files,
)
from captioner.cli import main
from captioner.errors import InputError
from captioner.training import BestAndLast, Interval

LEFT = "last.ckpt.0123456789abcdef.unfinished"
NUMBER = 100  # kills
# Saves in a child that is killed, again and again, and looks at what is left each time.
KILLS = """\
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from captioner.checkpoint import KEY, Contents, pack, read
from captioner.checkpoint_files import CheckpointFiles, clear_unfinished

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
path, draw = folder / "last.ckpt", random.Random(3)

def save(number):
    tensors = {name: torch.full((500_000,), float(number)) for name in "abc"}  # 6 MB
    CheckpointFiles().save_checkpoint({KEY: pack(Contents({"number": number}, [], tensors, {}))}, path)

started = time.monotonic()
for number in range(3):
    save(number)
takes = (time.monotonic() - started) / 3
found = {"torn": 0, "left": [], "kept": [], "numbers": []}
for _ in range(kills):
    child = os.fork()
    if child == 0:
        clear_unfinished(folder)
        while True:
            number += 1
            save(number)
    time.sleep(3 * takes * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found["left"].append(len(list(folder.iterdir())) - 1)
    try:
        contents = read(path)
        number = contents.settings["number"]
        found["torn"] += any((tensor != number).any().item() for tensor in contents.tensors.values())
        found["numbers"].append(number)
    except Exception:
        found["torn"] += 1
clear_unfinished(folder)
found["kept"] = sorted(each.name for each in folder.iterdir())
print(json.dumps(found))
"""
# Fills a small disk by training, then makes it read-only; the disk is there for this process alone.
SMALL_DISK = """\
import contextlib, io, json, subprocess, sys, torch
from pathlib import Path
from captioner.checkpoint import read
from captioner.cli import main

disk, recipe = Path(sys.argv[1]), sys.argv[2]
mount = ["mount", "-t", "tmpfs", "-o"]
if subprocess.run([*mount, "size=2m", "none", disk], capture_output=True).returncode:
    sys.exit(77)
flags = ["--config", recipe, "--trainer.default_root_dir", str(disk / "runs"), "--checkpoint.dirpath", str(disk)]
flags += ["--model.decoder.hidden_dim", "64", "--trainer.max_epochs", "4"]

def attempt(name):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["fit", *flags])
    steps = {}
    for path in disk.glob("*.ckpt"):
        read(path)
        steps[path.name] = torch.load(path, weights_only=True)["global_step"]
    return {"code": code, "said": said.getvalue(), "steps": steps, "left": [p.name for p in disk.rglob("*.unfinished")]}

found = [attempt("full")]
subprocess.run(["mount", "-o", "remount,ro", "none", disk], check=True)
found.append(attempt("read-only"))
print(json.dumps(found))
"""


def run_script(text, folder, *args, before=()):
    script = folder / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(captioner.__file__).parents[1])}
    command = [*before, sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@contextmanager
def largest_file(size):
    """Let this process write no file larger than so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Kills


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["same", "memory"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(disk, tmp_path):
    folder = tmp_path / "checkpoints"
    if disk == "memory":
        memory = Path("/dev/shm")
        if not (memory.is_dir() and os.access(memory, os.W_OK)):
            pytest.skip("there is no file system in memory at /dev/shm")
        folder = memory / f"captioner-test-{os.getpid()}"
    folder.mkdir()
    try:
        result = run_script(KILLS, tmp_path, folder, NUMBER)
    finally:
        if disk == "memory":
            shutil.rmtree(folder)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["torn"] == 0 and len(found["numbers"]) == NUMBER and found["numbers"][-1] > NUMBER / 3
    assert found["kept"] == ["last.ckpt"]
    # Kills did meet it at its work, and each start cleared away what the kill before had left.
    assert max(found["left"]) == 1 and sum(found["left"]) >= NUMBER / 5


def test_only_what_nobody_is_writing_is_cleared_away(tmp_path):
    others = ["last.ckpt", "best.ckpt.tmp", "notes.unfinished", "last.ckpt.0123.unfinished"]
    for name in (LEFT, *others):
        (tmp_path / name).write_text("what a killed run has left")
    with replacing(tmp_path / "other.ckpt") as file:
        file.write(b"new")
        clear_unfinished(tmp_path)
        assert not (tmp_path / LEFT).exists() and Path(file.name).exists() and not (tmp_path / "other.ckpt").exists()
    assert names(tmp_path) == sorted([*others, "other.ckpt"]) and (tmp_path / "other.ckpt").read_bytes() == b"new"
    clear_unfinished(tmp_path / "missing")


def test_a_file_that_is_taken_for_a_killed_runs_before_it_is_locked_is_begun_anew(tmp_path, monkeypatch):
    import fcntl

    taken = []

    def late(file, kind):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)

    monkeypatch.setattr(fcntl, "flock", late)
    with replacing(tmp_path / "last.ckpt") as file:
        file.write(b"new")
    assert taken and names(tmp_path) == ["last.ckpt"]


def test_a_file_reaches_the_disk_before_it_takes_its_place_and_its_name_after(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (done.append(os.path.isdir(f"/proc/self/fd/{number}")), sync(number))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    CheckpointFiles().save_checkpoint({"a": torch.ones(3)}, tmp_path / "new" / "last.ckpt")
    assert done == [False, "replaced", True]


# Full disks


@pytest.mark.parametrize("size", [0, 100, 70_000, 3_000_000])
def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(size, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"before")
    with (
        largest_file(size),
        pytest.raises(
            InputError, match="last.ckpt cannot be written .File too large., and the one before is kept: make"
        ),
    ):
        CheckpointFiles().save_checkpoint({"a": torch.zeros(1_000_000), "b": [1, 2]}, path)
    assert path.read_bytes() == b"before" and names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("code", "mend"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EROFS, "see that"), (errno.EIO, "see that")],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_disk_says_late_is_one_sentence(code, mend, call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=rf"last.ckpt cannot be written \({os.strerror(code)}\): {mend}"):
        CheckpointFiles().save_checkpoint({"a": torch.zeros(10)}, tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_other_errors_of_saving_pass(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        CheckpointFiles().save_checkpoint({"a": lambda: None}, tmp_path / "last.ckpt")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "last.ckpt"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(recipe, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--checkpoint.dirpath", str(folder)]
    assert main(["fit", *flags]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / LEFT).write_text("what a killed run has left")
    flags += ["--trainer.max_epochs", "2", "--ckpt_path", str(folder / "last.ckpt")]
    capsys.readouterr()
    with largest_file(300_000):
        assert main(["fit", *flags]) == 2
    said = one_line(capsys)
    assert ".ckpt cannot be written (File too large), and the one before is kept" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert main(["fit", *flags]) == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.slow
def test_a_small_disk_and_one_that_is_read_only(recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this process may not have mounts of its own")
    result = run_script(SMALL_DISK, tmp_path, disk, recipe, before=alone)
    if result.returncode == 77:
        pytest.skip("this process may not mount a file system in memory")
    assert result.returncode == 0, result.stderr
    full, refused = json.loads(result.stdout)
    assert full["code"] == refused["code"] == 2 and full["left"] == refused["left"] == []
    assert full["steps"] == refused["steps"] == {"best.ckpt": 3, "last.ckpt": 3}
    for found, sentence in ((full, "No space left on device), and the one before is kept"), (refused, "see that")):
        assert found["said"].startswith("captioner: ") and found["said"].count("\n") == 1 and sentence in found["said"]


# Refused writes


@pytest.mark.slow
def test_two_trainings_do_not_write_in_one_folder(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_files, "PATIENCE", 0.3)
    held = claim(tmp_path / "checkpoints")
    flags = ["--checkpoint.dirpath", str(tmp_path / "checkpoints"), "--trainer.logger", "false"]
    fit = ["fit", "--config", str(recipe), *flags, "--trainer.default_root_dir", str(tmp_path)]
    assert main(fit) == 2
    assert f"Another training writes its checkpoints in {tmp_path / 'checkpoints'}" in one_line(capsys)
    os.close(held)
    assert main(fit) == main(fit) == 0  # and the first leaves it to the second


def test_a_folder_that_takes_no_files_is_said_before_the_work(tmp_path, monkeypatch):
    check_folder(tmp_path / "not" / "yet")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be made in .*file, or"):
        check_folder(tmp_path / "file" / "checkpoints")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere else
    with pytest.raises(InputError, match="see that they can be made in"):
        check_folder(tmp_path / "checkpoints")


def test_a_run_that_can_save_nothing_does_not_begin(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoints"
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--checkpoint.dirpath", str(folder)]
    assert main(["fit", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"captioner: Files in {folder} cannot be written: see that they can be made in")
    assert captured.err.count("\n") == 1 and "epoch 1" not in captured.out


def test_what_a_logger_cannot_write_is_one_sentence(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # from a stream, which does not know its name
    with pytest.raises(InputError, match="^Files in .* cannot be written .No space left on device.: make"):
        with explaining(tmp_path):
            raise full
    for path, raised in ((tmp_path / "metrics.csv", InputError), ("/elsewhere/image.jpg", PermissionError)):
        with pytest.raises(raised), explaining(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
    with pytest.raises(InputError, match="first"), explaining(tmp_path):
        try:
            raise InputError("The first failure.")
        finally:
            raise full


# Which trainers


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_every_trainer_writes_so(strategy, tmp_path):
    settings = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, "barebones": False}
    trainer = Trainer(strategy=strategy, devices=1, **settings)
    use_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles
    trainer = Trainer(plugins=[AsyncCheckpointIO()], **settings)
    use_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is AsyncCheckpointIO
    assert type(trainer.strategy.checkpoint_io.checkpoint_io) is CheckpointFiles
    trainer = Trainer(strategy=DDPStrategy(checkpoint_io=TorchCheckpointIO()), devices=1, **settings)
    use_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles

    class Own(TorchCheckpointIO):
        pass

    trainer = Trainer(plugins=[Own()], **settings)
    use_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is Own


# When


@pytest.fixture
def written(monkeypatch):
    """What a run writes: names and steps."""
    files = []
    save = CheckpointFiles.save_checkpoint

    def spy(self, checkpoint, path, storage_options=None):
        files.append((Path(path).name.removesuffix(".ckpt"), checkpoint["global_step"]))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", spy)
    return files


def test_the_last_checkpoint_is_written_every_n_steps_too_and_the_best_as_ever(fit, written):
    # By the number of the epoch, of which each is better than the one before.
    intervals = ["--checkpoint.every_n_train_steps", "2", "--checkpoint.train_time_interval.minutes", "10"]
    fit("--trainer.max_epochs", "2", *intervals, "--checkpoint.monitor", "epoch")
    assert written == [
        ("last", 2),
        *[("best", 3), ("last", 3)],
        ("last", 4),
        *[("last", 6), ("best", 6), ("last", 6)],  # a validation may be long, or the end
    ]


def test_the_last_checkpoint_is_written_every_so_many_minutes_too(fit, written, tmp_path):
    recipe = tmp_path / "often.yaml"
    recipe.write_text("checkpoint:\n  train_time_interval:\n    minutes: 1.0e-9\n")
    fit("--config", str(recipe), "--trainer.accumulate_grad_batches", "2")  # the third batch is a step of its own
    assert written == [("last", 1), ("last", 2), ("best", 2), ("last", 2)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_n_train_steps": -1}, "every_n_train_steps is -1"),
        ({"train_time_interval": Interval(0.0)}, "minutes is 0.0"),
        ({"train_time_interval": Interval(float("nan"))}, "minutes is nan"),
        ({"every_n_train_steps": 9, "save_last": False}, "save_last false"),
    ],
)
def test_an_interval_that_is_none_is_said(settings, said):
    with pytest.raises(InputError, match=said):
        BestAndLast(**settings)
