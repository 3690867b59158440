"""Runs are found again by their configuration, and their logs gone on with."""

import os

import pytest
import torch
import yaml

from captioner.checkpoint import Progress
from captioner.errors import InputError
from captioner.run_folder import RunLog, find_last


@pytest.fixture
def settings(tmp_path):
    trainer = {"default_root_dir": str(tmp_path / "runs"), "logger": None, "max_epochs": 2}
    return {"seed_everything": 1, "trainer": trainer, "model": {"dropout": 0.1}, "ckpt_path": "last"}


def begin(folder, settings, time, checkpoint=None, **others):
    """A run's files, of some time."""
    folder.mkdir(parents=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "ckpt_path": None, **others}))
    os.utime(config, (time, time))
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"")
        os.utime(checkpoint, (time + 5, time + 5))


def test_the_last_run_of_the_configuration_is_found(settings, tmp_path):
    runs = tmp_path / "runs"
    assert find_last(settings) is None
    for number, (time, others) in enumerate([(10, {}), (20, {}), (30, {"model": {"dropout": 0.2}})]):
        begin(runs / str(number), settings, time, runs / str(number) / "checkpoints" / "last.ckpt", **others)
    found = find_last(settings)
    assert found.folder == runs / "1" and found.checkpoint == runs / "1" / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match="newest, .*/2, not in model.dropout, seed_everything: .*2/checkpoints/last"):
        find_last({**settings, "seed_everything": 5})
    assert find_last({**settings, "seed_everything": True}).folder == runs / "1"  # to be drawn
    begin(runs / "3", settings, 40)
    assert not find_last(settings).checkpoint.is_file()


def test_what_is_no_run_is_passed_over(settings, tmp_path):
    for name, text in {"a": "- 1", "b": "{", "c": "model: 3", "d": "\x00", "e": "[" * 900}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(text)
    assert find_last(settings) is None


def test_checkpoints_are_where_the_run_says(settings, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    with_folder = {**settings, "checkpoint": {"dirpath": str(elsewhere)}}
    begin(tmp_path / "runs" / "a", with_folder, 10, elsewhere / "last.ckpt")
    assert find_last(with_folder).checkpoint == elsewhere / "last.ckpt"
    begin(tmp_path / "runs" / "b", settings, 90, ckpt_path=str(tmp_path / "before" / "last.ckpt"))
    assert find_last(settings).checkpoint == tmp_path / "before" / "last.ckpt"


def test_folders_of_loggers_are_searched(settings, tmp_path):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    settings["trainer"]["logger"] = [logger]
    begin(tmp_path / "logs" / "lightning_logs" / "version_0", settings, 10)
    assert find_last(settings).folder == tmp_path / "logs" / "lightning_logs" / "version_0"


def logged(folder, begin=None, steps=()):
    log = RunLog(begin, save_dir=str(folder), name="", version="run")
    for step in steps:
        log.log_metrics({"loss": torch.tensor(float(step))}, step)
        if step % 2:
            log.log_metrics({"val/score": 1.0}, step)
    log.after_save_checkpoint(None)
    return (folder / "run" / "metrics.csv").read_text().splitlines()


def test_a_log_goes_on_after_the_last_step_of_the_checkpoint(tmp_path):
    whole = logged(tmp_path / "whole", steps=range(6))
    logged(tmp_path, steps=range(5))
    assert logged(tmp_path, Progress(1, 4, False, False), steps=range(4, 6)) == whole
    with_validation = [whole[0], *(line for line in whole[1:] if int(line.split(",")[1]) < 4)]
    assert logged(tmp_path, Progress(1, 4, False, False)) == with_validation
    assert logged(tmp_path, Progress(1, 4, True, False)) == with_validation[:-1]
