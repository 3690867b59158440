"""Two processes on a CPU, which speak through gloo: they train and score as one does, and fail with one sentence."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_annotation_cache import FOREIGN

import captioner
from captioner.checkpoint import read
from captioner.task import CaptioningTask
from captioner.training import train

pytestmark = pytest.mark.sockets
# Runs the command line, and has each process note what it ends with.
SCRIPT = """\
import signal
import sys
import torch
from test_annotation_cache import Counting
from test_distributed import poison, seed_the_build
from captioner.cli import main
from captioner.training import train

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may ignore it

if __name__ == "__main__":
    if sys.argv[1] in ("main", "poisoned"):
        if sys.argv[1] == "poisoned":
            poison(setattr)
        sys.exit(main(sys.argv[2:]))
    seed_the_build(setattr)
    cli = train(sys.argv[2:])
    task, trainer = cli.model, cli.trainer
    found = {
        "world": trainer.world_size,
        "steps": trainer.global_step,
        "images": task.scored_images,
        "scores": task.scores,
        "health": None if task.health is None else tuple(task.health),
        "looks": {image_id: look.hidden for image_id, look in task._looks.items()},
        "words": task.captioner.vocabulary.words,
        "weights": task.state_dict(),
        "annotated": Counting.seen,
        "drawn": torch.rand(4),
    }
    torch.save(found, f"{sys.argv[1]}/{trainer.global_rank}.pt")
"""


def seed_the_build(setattr):
    """Let one process begin with the weights of two, for which Lightning sets the seed again."""
    build = CaptioningTask._build

    def seeded(task, vocabulary):
        torch.manual_seed(5)
        build(task, vocabulary)

    setattr(CaptioningTask, "_build", seeded)


def poison(setattr):
    """Let the second process have no loss at its second step."""
    step = CaptioningTask._cross_entropy
    calls = []

    def spoilt(task, *args):
        total, parts = step(task, *args)
        calls.append(total)
        if task.trainer.global_rank == 1:
            print("poisoned" if len(calls) == 2 else "well", flush=True)
        return total * float("nan") if len(calls) == 2 and task.trainer.global_rank == 1 else total, parts

    setattr(CaptioningTask, "_cross_entropy", spoilt)


def start(to, command, recipe, folder, *flags):
    """Start a command in two processes, which note what they end with in the folder `to`, unless it is "main"."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(captioner.__file__).parents[1]), str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    devices = ["--trainer.devices", "2", "--trainer.default_root_dir", str(folder / "runs")]
    return subprocess.Popen(
        [sys.executable, str(script), str(to), command, "--config", str(recipe), *devices, *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that both can be interrupted together, as a terminal does it
    )


def in_two(command, recipe, folder, *flags):
    """Return what each of two processes found, and what they printed."""
    out, err = start(folder, command, recipe, folder, *flags).communicate(timeout=120)
    assert "Traceback" not in err and "Warning" not in err, err
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    return first, second, out


def sentences(process):
    """Return what two processes said on stderr until both had ended, without Lightning's word that they are two."""
    _, err = process.communicate(timeout=120)
    return [line for line in err.splitlines() if not line.startswith("Initializing distributed")]


def logged(folder, kind):
    """Return the figures of a kind, "train" or "val", as a run logged them one after the other."""
    with open(folder / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    found = [{name: value for name, value in row.items() if name.startswith(f"{kind}/")} for row in rows]
    return [row for row in found if row]


def losses(folder):
    """Return the loss and its parts as the one step of a run logged them."""
    (line,) = logged(folder, "train")
    return line


def moments(folder):
    """Return Adam's mean gradients, which after one step are a tenth of the gradients, by the parameter's number."""
    (optimizer,) = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    return {number: state["exp_avg"] for number, state in optimizer["state"].items()}


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def uneven(scenes, tmp_path_factory):
    """The scenes with one to five captions each in training, so that two halves of them hold different numbers."""
    folder = tmp_path_factory.mktemp("uneven")
    shutil.copytree(scenes, folder, dirs_exist_ok=True)
    path = folder / "captions_train.json"
    content = json.loads(path.read_text())
    captions = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation)
    kept = [annotation for place, all_ in enumerate(captions.values()) for annotation in all_[: 1 + place % 5]]
    path.write_text(json.dumps(content | {"annotations": kept}))
    return folder


@pytest.mark.slow
def test_two_halves_of_a_batch_train_as_the_whole(uneven, recipe, fit, tmp_path, monkeypatch):
    flags = ["--data.files.root", str(uneven), "--trainer.precision", "64-true", "--trainer.max_epochs", "1"]
    flags += [*FOREIGN, "--model.encoder.learns", "true", "--model.word_presence", "0.3"]
    seed_the_build(monkeypatch.setattr)
    one = fit(*flags, "--data.batch_size", "22")
    first, second, out = in_two("fit", recipe, tmp_path, *flags, "--data.batch_size", "11")
    (run,), one_run = (tmp_path / "runs").iterdir(), Path(one.trainer.loggers[0].log_dir)

    assert first["steps"] == one.trainer.global_step == 1
    assert_same(first["weights"], second["weights"], 0)
    assert_same(moments(run), moments(one_run), 1e-12)
    assert_same(first["weights"], one.model.state_dict(), 1e-12)
    assert losses(run) == pytest.approx(losses(one_run)) and len(losses(run)) == 4
    assert first["words"] == second["words"] == one.datamodule.vocabulary.words
    assert first["images"] == 9 and first["scores"] == second["scores"] == pytest.approx(one.model.scores)
    assert not torch.equal(first["drawn"], second["drawn"])  # dropout and captions

    assert out.count("epoch 1") == out.count("CIDEr-D") / 2 == out.count("Checkpoint: ") == 1
    names = sorted(path.name for path in run.rglob("*") if path.is_file() and not path.name.startswith("events.out"))
    assert names == ["best.ckpt", "best.md", "config.yaml", "hparams.yaml", "last.ckpt", "metrics.csv"]


@pytest.mark.slow
def test_two_processes_have_the_losses_and_scores_of_one(uneven, recipe, fit, tmp_path, monkeypatch):
    # A batch is the whole split, of which each of two processes takes a half: it is the same in whichever order. All
    # captions come along, and there is no dropout.
    flags = ["--data.files.root", str(uneven), "--data.captions_per_image", "5", "--model.dropout", "0", *FOREIGN]
    flags += ["--trainer.max_epochs", "20", "--early_stopping.patience", "99", "--trainer.gradient_clip_val", "1"]
    seed_the_build(monkeypatch.setattr)
    one = fit(*flags, "--data.batch_size", "22")
    first, second, out = in_two("fit", recipe, tmp_path, *flags, "--data.batch_size", "11")
    (run,), one_run = (tmp_path / "runs").iterdir(), Path(one.trainer.loggers[0].log_dir)
    found, expected = logged(run, "train"), logged(one_run, "train")
    assert (
        len(found) == len(expected) == first["steps"] == 20 and expected[-1]["train/loss"] < expected[0]["train/loss"]
    )
    assert all(row == pytest.approx(other, abs=1e-5) for row, other in zip(found, expected, strict=True))
    found, expected = logged(run, "val"), logged(one_run, "val")
    assert len(found) == len(expected) == 20 and expected[-1]["val/CIDEr-D"] > 0
    assert all(row == pytest.approx(other, abs=1e-9) for row, other in zip(found, expected, strict=True))
    assert first["scores"] == second["scores"] == pytest.approx(one.model.scores, abs=1e-9)
    assert out.count("epoch ") == 20 and len(list(run.glob("events.out*"))) == len(list(run.glob("**/*.csv"))) == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_both(recipe, tmp_path):
    process = start("poisoned", "fit", recipe, tmp_path, "--data.batch_size", "4")
    out, err = process.communicate(timeout=120)
    (said,) = (line for line in err.splitlines() if not line.startswith("Initializing distributed"))
    assert said.startswith("captioner: The loss is nan in step 2 (epoch 1), where the images were ")
    assert said.partition("images were ")[2].partition(";")[0].count(",") == 3  # those of one process
    assert (
        process.returncode == 2
        and [line for line in out.splitlines() if "ell" in line or "poi" in line][-1] == "poisoned"
    )


@pytest.mark.slow
def test_two_processes_go_on_with_a_cache_that_one_of_them_filled(recipe, tmp_path):
    # A blind decoder leaves the embedding unread, and DDP waits for the gradients of all that learns.
    flags = [*FOREIGN, "--data.cache", str(tmp_path / "cache"), "--model.decoder.feed_previous", "false"]
    flags += ["--pictures.images", "4"]
    first, second, _ = in_two("fit", recipe, tmp_path, *flags)
    blank = 1  # on which the annotations' size is measured
    assert first["annotated"] + second["annotated"] == 2 * blank + 22 + 9  # by the one that had the lock first
    assert first["steps"] == 2 and first["images"] == 9
    (log,) = tmp_path.glob("runs/*/events.out*")  # of the first process, which alone draws, from all captions
    accumulator = EventAccumulator(str(log))
    accumulator.Reload()
    assert [len(accumulator.Images(tag)) for tag in accumulator.Tags()["images"]] == [1] * 4
    last = next(tmp_path.glob("runs/*/checkpoints/last.ckpt"))
    first, second, _ = in_two("fit", recipe, tmp_path, *flags, "--ckpt_path", str(last), "--trainer.max_epochs", "2")
    assert first["annotated"] == second["annotated"] == blank
    assert first["steps"] == torch.load(last, weights_only=True)["global_step"] == 4
    assert_same(first["weights"], second["weights"], 0)


@pytest.mark.slow
def test_validation_counts_each_image_once(recipe, best, tmp_path):
    first, second, out = in_two("validate", recipe, tmp_path, "--ckpt_path", str(best))
    assert first["images"] == 9 and "val, 9 images" in out  # an odd number: the sampler gives one of them twice
    assert first["scores"] == second["scores"] == pytest.approx(read(best).scores)
    one = train(["validate", "--config", str(recipe), "--ckpt_path", str(best)]).model.health
    assert first["health"] == second["health"] == pytest.approx(tuple(one), abs=1e-5)


@pytest.mark.slow
def test_two_processes_hide_the_regions_that_one_hides(recipe, best, tmp_path):
    first, second, out = in_two("test", recipe, tmp_path, "--ckpt_path", str(best))
    one = train(["test", "--config", str(recipe), "--ckpt_path", str(best)]).model._looks
    assert first["looks"].keys() == second["looks"].keys() == one.keys() and out.count("relative entropy") == 1
    for image_id, look in one.items():
        for found, expected in zip(first["looks"][image_id], look.hidden, strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_processes_test_an_ensemble_and_write_its_captions_once(recipe, best, tmp_path):
    flags = ["--ckpt_path", str(best), "--model.ensemble", str(best), "--model.results", str(tmp_path / "found.json")]
    first, second, out = in_two("test", recipe, tmp_path, *flags)
    one = train(["test", "--config", str(recipe), "--ckpt_path", str(best)])
    assert first["images"] == 5 and out.count("seen, 5 images, mean probability of 2 models") == 1
    assert first["scores"] == second["scores"] == pytest.approx(one.model.scores)
    records = json.loads((tmp_path / "found.json").read_text())
    assert {record["image_id"]: record["caption"] for record in records} == one.model.captions


@pytest.mark.slow
def test_a_mistake_that_one_process_meets_ends_both_with_one_sentence(scenes, recipe, tmp_path):
    shutil.copytree(scenes, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "000001.png").write_text("no picture")
    process = start("main", "fit", recipe, tmp_path, "--data.files.root", str(tmp_path))
    (said,) = sentences(process)
    assert said.startswith("captioner: ") and "000001.png is not an image" in said and process.returncode == 2


@pytest.mark.slow
def test_an_interrupt_ends_both_after_the_same_step_with_one_sentence(recipe, tmp_path):
    endless = ["--trainer.max_epochs", "9999", "--early_stopping.patience", "9999"]
    process = start("main", "fit", recipe, tmp_path, *endless)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    (said,) = (line for line in sentences(process) if line)
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert said.startswith(f"captioner: Stopped by SIGINT after step {step}, saved in {last}: to go on, captioner fit")
    assert process.returncode == 130


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_and_they_go_on_exactly(recipe, tmp_path):
    flags = ["--trainer.max_epochs", "12", "--early_stopping.patience", "99", "--model.dropout", "0.3"]
    flags += ["--data.batch_size", "2", "--model.attention_health", "false", "--ckpt_path", "last"]
    ends = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        process = start("main", "fit", recipe, folder, *flags)
        if name == "stopped":
            while not process.stdout.readline().startswith("epoch 2 "):
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)  # to the first one alone
            (said,) = sentences(process)
            assert said.startswith("captioner: Stopped by SIGTERM after step ") and process.returncode == 143
            process = start("main", "fit", recipe, folder, *flags)
        assert sentences(process) == [] and process.returncode == 0
        (last,) = folder.glob("runs/*/checkpoints/last.ckpt")
        ends.append(torch.load(last, weights_only=True))
    one, other = ends
    assert one["global_step"] == other["global_step"] == 12 * 6
    assert_same(one["state_dict"], other["state_dict"], 0)
