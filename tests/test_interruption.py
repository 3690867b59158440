"""Signals: what is saved, with which code and sentence a training ends, and how the same command goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import captioner
import captioner.checkpoint_files as checkpoint_files
from captioner.checkpoint_files import claim
from captioner.cli import main
from captioner.task import CaptioningTask
from captioner.training import BestAndLast

FLAGS = ["--trainer.max_epochs", "3", "--model.attention_health", "false", "--model.dropout", "0.3"]


@pytest.fixture
def command(recipe, tmp_path):
    """What is typed, each time."""
    root = ["--trainer.default_root_dir", str(tmp_path / "runs")]
    return ["fit", "--config", str(recipe), *root, *FLAGS, "--ckpt_path", "last"]


def send(monkeypatch, number, method, when=lambda task: True):
    """Have a method of the task send a signal once, where it is called as the condition says."""
    plain, sent = getattr(CaptioningTask, method), []

    def sending(task, *args):
        if not sent and when(task):
            sent.append(number)
            os.kill(os.getpid(), number)
        return plain(task, *args)

    monkeypatch.setattr(CaptioningTask, method, sending)


def saved(folder):
    (path,) = folder.glob("runs/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True), path


def lines(folder):
    """The log of a run, as it can be compared."""
    (path,) = folder.glob("runs/*/metrics.csv")
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def undisturbed(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(*FLAGS, folder=folder / "runs")
    return folder


def assert_ends_the_same(folder, undisturbed):
    found, wanted = saved(folder)[0], saved(undisturbed)[0]
    assert found["global_step"] == wanted["global_step"] == 9
    assert all(torch.equal(value, found["state_dict"][name]) for name, value in wanted["state_dict"].items())
    assert lines(folder) == lines(undisturbed)


@pytest.mark.parametrize(
    ("number", "method", "epoch", "step"),
    [
        pytest.param(signal.SIGTERM, "training_step", 1, 4, marks=pytest.mark.slow),
        (signal.SIGINT, "training_step", 0, 1),
        pytest.param(signal.SIGTERM, "validation_step", 1, 6, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_saved_and_the_same_command_goes_on(
    number, method, epoch, step, command, undisturbed, tmp_path, monkeypatch, capsys
):
    before = signal.getsignal(number)
    send(monkeypatch, number, method, lambda task: task.trainer.current_epoch == epoch)
    assert main(command) == 128 + number
    checkpoint, path = saved(tmp_path)
    assert checkpoint["global_step"] == step and signal.getsignal(number) is before
    captured = capsys.readouterr()
    assert captured.err == (
        f"captioner: Stopped by {number.name} after step {step}, saved in {path}: to go on, captioner "
        f"{' '.join(command)}\n"
    )
    assert "There is no run yet: this one begins anew." in captured.out
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.startswith(f"Going on with {path.parents[1]}.\n")
    assert_ends_the_same(tmp_path, undisturbed)
    assert main(command) == 0
    assert capsys.readouterr().out == (
        f"{path.parents[1]} has come to its end: there is nothing to go on with. To train it longer: --ckpt_path "
        f"{path} and a larger trainer.max_epochs.\n"
    )
    assert_ends_the_same(tmp_path, undisturbed)


def test_a_signal_before_the_first_step_ends_it_at_once(command, tmp_path, monkeypatch, capsys):
    send(monkeypatch, signal.SIGTERM, "configure_optimizers")
    assert main(command) == 143
    assert capsys.readouterr().err.startswith("captioner: Stopped by SIGTERM before anything had to be saved: to go on")
    assert not list(tmp_path.rglob("*.ckpt"))
    assert main([*command, "--trainer.max_epochs", "3", "--trainer.limit_train_batches", "1"]) == 2
    assert "trainer.limit_train_batches: to go on with a run" in capsys.readouterr().err
    assert main(command) == 0
    assert "was stopped before its first checkpoint: this one begins anew." in capsys.readouterr().out


def test_a_run_with_other_settings_is_named(command, tmp_path, monkeypatch, capsys):
    send(monkeypatch, signal.SIGTERM, "training_step")
    assert main(command) == 143
    checkpoint, path = saved(tmp_path)
    capsys.readouterr()
    assert main([*command, "--model.dropout", "0.1", "--data.batch_size", "9"]) == 2
    said = capsys.readouterr().err
    assert f"the newest, {path.parents[1]}, not in data.batch_size, model.dropout: to go on" in said
    assert said.endswith(f"--ckpt_path {path}.\n") and said.count("\n") == 1


@pytest.mark.slow
def test_the_best_checkpoint_moves_with_its_folder(command, fit, tmp_path, monkeypatch):
    send(monkeypatch, signal.SIGTERM, "training_step", lambda task: task.trainer.current_epoch == 2)
    assert main(command) == 143
    checkpoint, path = saved(tmp_path)
    shutil.move(path.parents[1], tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints"
    never = ("--trainer.limit_val_batches", "0")
    best = fit(*FLAGS, *never, "--ckpt_path", str(moved / "last.ckpt")).trainer.checkpoint_callback
    assert best.best_model_path == str(moved / "best.ckpt") and best.best_model_score is not None
    assert list(best.best_k_models) == [best.best_model_path]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, "the job 17_3 is queued again."),
        pytest.param(1, "(no such job): to go on", marks=pytest.mark.slow),
    ],
)
def test_slurm_queues_the_job_again(code, said, command, undisturbed, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\necho no such job >&2\nexit {code}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    job = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "JOB_NAME": "train", "JOB_ID": "20", "PROCID": "0"}
    job |= {"LOCALID": "0", "NODEID": "0", "NODELIST": "localhost", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "3"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    send(monkeypatch, signal.SIGUSR1, "training_step", lambda task: task.trainer.current_epoch == 1)
    assert main(command) == 128 + signal.SIGUSR1
    assert (tmp_path / "called").read_text() == "requeue 17_3\n"
    assert said in capsys.readouterr().err
    assert main(command) == 0
    assert_ends_the_same(tmp_path, undisturbed)


SCRIPT = """\
import signal
import sys
import time
from captioner.cli import main
from captioner.task import CaptioningTask

def hang(task, *args):
    print("hangs", flush=True)
    while True:
        time.sleep(0.1)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it
CaptioningTask.training_step = hang
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(command, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *command],
        env={**os.environ, "PYTHONPATH": str(Path(captioner.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "hangs\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_steps_ends_as_one_that_is_not(command, undisturbed, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, random, signal, sys\n"
        "from captioner.cli import main\n"
        "from captioner.task import CaptioningTask\n"
        "plain, left = CaptioningTask.training_step, random.randrange(4)\n"
        "def step(*args):\n"
        "    global left\n"
        "    if left == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left -= 1\n"
        "    return plain(*args)\n"
        "CaptioningTask.training_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["--checkpoint.every_n_train_steps", "1", "--data.num_workers", "2"]
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(subprocess.run([sys.executable, script, *command, *flags], timeout=100).returncode)
        assert len(codes) < 30
    assert codes[-1] == 0 and len(codes) > 1
    found, wanted = saved(tmp_path)[0], saved(undisturbed)[0]
    assert found["global_step"] == 9
    assert all(torch.equal(value, found["state_dict"][name]) for name, value in wanted["state_dict"].items())
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_second_training_touches_nothing_of_the_first(command, tmp_path, monkeypatch, capsys):
    send(monkeypatch, signal.SIGTERM, "training_step", lambda task: task.trainer.current_epoch == 1)
    assert main(command) == 143
    _, path = saved(tmp_path)
    with open(path.parents[1] / "metrics.csv", "a") as log:  # what the first one logs after its last checkpoint
        log.write("1,,,,7\n")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(checkpoint_files, "PATIENCE", 0.3)
    held = claim(path.parent)
    capsys.readouterr()
    assert main(command) == 2
    assert "Another training writes its checkpoints in" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    os.close(held)
    assert main(command) == 0


@pytest.mark.slow
def test_the_checkpoint_of_another_run_is_not_gone_on_with(command, tmp_path, monkeypatch, capsys):
    shared = ["--trainer.logger", "false", "--data.num_workers", "0"]
    other = [*command, *shared, "--model.dropout", "0.2"]
    assert main([*command, *shared]) == 0
    capsys.readouterr()
    send(monkeypatch, signal.SIGTERM, "training_step")
    monkeypatch.setattr(BestAndLast, "save_now", lambda *_: None)  # as if it were killed
    assert main(other[: other.index("--ckpt_path")] + other[other.index("last") + 1 :]) == 143
    assert main(other) == 0
    assert "was stopped before its first checkpoint: this one begins anew" in capsys.readouterr().out


def test_without_a_last_checkpoint_there_is_none_to_go_on_from(command, capsys):
    assert main([*command, "--checkpoint.save_last", "false"]) == 2
    assert "set it to true" in capsys.readouterr().err
