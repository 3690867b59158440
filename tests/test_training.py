"""The training command line, in-process: what it writes, how it goes on, and what it says of a mistake."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from test_annotation_cache import FOREIGN
from test_task import rows

from captioner.attention_health import Health
from captioner.checkpoint import read
from captioner.cli import main
from captioner.encoders import SmallCNN
from captioner.errors import InputError
from captioner.results import read_results
from captioner.scenes import write_scenes
from captioner.task import CaptioningTask
from captioner.training import ScoreLines, train


def one_line(capsys):
    """What stands on stderr, which is one line and no traceback."""
    stderr = capsys.readouterr().err
    assert stderr.startswith("captioner: ") and stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


# What a run writes


def test_a_run_writes_checkpoints_scores_and_its_configuration(run, best, last):
    folder = best.parent.parent
    assert best.name == "best.ckpt" and last.name == "last.ckpt" and best.parent == last.parent
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert any(path.name.startswith("events.out") for path in folder.iterdir())
    assert sorted(path.name for path in best.parent.iterdir()) == ["best.ckpt", "best.md", "last.ckpt"]


def test_the_last_checkpoint_is_that_of_the_last_validation(fit):
    still = ("--model.learning_rate", "0.0", *FOREIGN)  # without batch norm: no epoch is better than the first
    checkpoints = fit("--trainer.max_epochs", "3", *still).trainer.checkpoint_callback
    saved = [torch.load(path, weights_only=True) for path in (checkpoints.best_model_path, checkpoints.last_model_path)]
    assert [each["global_step"] for each in saved] == [3, 9]


def test_the_saved_configuration_runs_the_test(best, capsys):
    assert main(["test", "--config", str(best.parent.parent / "config.yaml"), "--ckpt_path", str(best)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.startswith(
        "seen, 5 images, beam 3, length penalty 0.7, precision 32-true\n"
    )
    rows = [line.split() for line in captured.out.splitlines() if line.split()]
    (cider,) = (row for row in rows if row[0] == "CIDEr-D")  # one table, ours
    score, low, high = map(float, re.fullmatch(r"(.*)\[(.*),(.*)\]", "".join(cider[1:])).groups())
    assert low < score < high
    assert {"distinct", "vocabulary", "mean", "bad"} <= {row[0] for row in rows}


def test_what_a_user_reads(recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    watch, first, *_, end = captured.out.splitlines()
    (folder,) = tmp_path.iterdir()
    assert watch == f"To watch {folder}: tensorboard --logdir {tmp_path} --samples_per_plugin images=100"
    assert first.startswith("epoch 1  0:") and "loss" in first and "CIDEr-D" in first
    best = Path(end.removeprefix("Checkpoint: "))
    assert best.is_file() and f"{100 * read(best).scores['CIDEr-D']:.1f}" in captured.out


def test_the_configuration_is_kept_beside_the_checkpoints_and_nowhere_else(run, best, recipe, tmp_path):
    assert (best.parents[1] / "config.yaml").is_file()
    flags = ["--ckpt_path", str(best), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["test", "--config", str(recipe), *flags]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(fit):
    one, same, other = (fit("--seed_everything", seed).model.captioner.state_dict() for seed in ("3", "3", "4"))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_trial_and_a_run_without_validation_end_well(recipe, tmp_path):
    for flags in (["--trainer.fast_dev_run", "true"], ["--trainer.limit_val_batches", "0"]):
        assert main(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), *flags]) == 0


def test_a_fault_of_attention_is_said_once_after_the_first_epochs_and_again_where_it_comes_back(capsys):
    well = Health(40, 100, 0.9, 0.2, 0.1, 0.3, None, None)
    ill, worse = well._replace(movement=0.0), well._replace(entropy=0.01, same_region=1.0)
    task, lines, said = CaptioningTask(SmallCNN(size=32, width=4)), ScoreLines(), []
    for epoch, health in enumerate([ill, ill, ill, ill, worse, worse, well, None, ill]):
        state = SimpleNamespace(fn=TrainerFn.FITTING)
        task.health = health
        trainer = SimpleNamespace(
            state=state, sanity_checking=False, is_global_zero=True, current_epoch=epoch, callback_metrics={}
        )
        lines.on_validation_end(trainer, task)
        captured = capsys.readouterr()
        assert captured.out.count("\n") == 1 and ("entropy" in captured.out) == (health is not None)
        said.append("collapsed" if "collapsed" in captured.err else "dead" if "dead" in captured.err else captured.err)
    assert said == ["", "", "dead", "", "collapsed", "", "", "", "dead"]


# Going on


def test_a_run_needs_no_logger(fit):
    assert fit("--trainer.logger", "false").trainer.global_step == 3


def test_resuming_goes_on_where_it_ended(fit):
    cut = fit("--trainer.max_epochs", "1")
    last = cut.trainer.checkpoint_callback.last_model_path
    saved = torch.load(last, weights_only=True)
    assert saved["epoch"] == 0 and saved["global_step"] == 3
    resumed = fit("--trainer.max_epochs", "2", "--ckpt_path", last)
    assert resumed.trainer.current_epoch == 2 and resumed.trainer.global_step == 6
    state = resumed.trainer.optimizers[0].state_dict()["state"]
    assert {int(each["step"]) for each in state.values()} == {6}  # Adam's own count, which begins at 0 in a new run


def test_resuming_keeps_the_best_so_far(run, fit, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("best.ckpt", "last.ckpt"):
        (folder / name).write_bytes((Path(run.trainer.checkpoint_callback.best_model_path).parent / name).read_bytes())
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    state = next(value for name, value in saved["callbacks"].items() if name.startswith("BestAndLast"))
    # As if the run had been here, with a best that the next epochs cannot reach.
    unreachable = torch.tensor(99.0)
    state |= {"dirpath": str(folder), "best_model_path": str(folder / "best.ckpt"), "best_model_score": unreachable}
    state |= {"best_k_models": {str(folder / "best.ckpt"): unreachable}, "kth_value": unreachable}
    state |= {"kth_best_model_path": str(folder / "best.ckpt")}
    torch.save(saved, folder / "last.ckpt")
    before = (folder / "best.ckpt").read_bytes()
    flags = ("--trainer.max_epochs", "28", "--trainer.check_val_every_n_epoch", "4")
    resumed = fit(*flags, "--ckpt_path", str(folder / "last.ckpt"))
    assert resumed.trainer.checkpoint_callback.best_model_score == 99
    assert (folder / "best.ckpt").read_bytes() == before
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 28 * 3


LONGER = ["--trainer.max_epochs", "28"]


def test_another_vocabulary_is_said(last, recipe, capsys):
    assert main(["fit", "--config", str(recipe), "--ckpt_path", str(last), "--data.minimum_count", "40", *LONGER]) == 2
    assert "minimum_count that it was trained with" in one_line(capsys)


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("other", [("--model.embedding_dim", "16"), ("--model.decoder.gate", "false")])
def test_another_models_weights_are_said(command, other, last, recipe, tmp_path, capsys):
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", str(last), *other]
    assert main([command, *flags]) == 2
    assert "weights are another model's" in one_line(capsys)


def test_weights_alone_cannot_be_gone_on_from(last, recipe, tmp_path, capsys):
    weights = {name: value for name, value in torch.load(last, weights_only=True).items() if name != "optimizer_states"}
    torch.save(weights, tmp_path / "weights.ckpt")
    assert main(["fit", "--config", str(recipe), "--ckpt_path", str(tmp_path / "weights.ckpt")]) == 2
    assert "no state of the optimiser" in one_line(capsys)


# Mistakes


def test_help_begins_with_five_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Five examples:") and text.index("  captioner fit --config") < text.index("usage:")
    assert text[: text.index("usage:")].count("\n  captioner ") == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.dropuot", "0.1"], "--model.dropuot"),
        (["--model.dropout", "much"], "model.dropout"),
        (["--data.batch_size", "2.5"], "data.batch_size"),
        (["--data.train_split", "nope"], "no split 'nope'"),
        (["--data.files.root", "/nowhere"], "/nowhere does not exist"),
        (["--model.encoder", "NoSuchEncoder"], "NoSuchEncoder"),
        (["--model.encoder.size", "33"], "multiple of 4"),
        (["--model.bridge.dim", "16", "--model.decoder.attention", "Dot"], "equally long"),
        (["--model.decoder", "TransformerDecoder", "--model.decoder.heads", "7"], "32 values into 7 heads"),
        (["--model.decoder", "TransformerDecoder", "--model.decoder.feed_forward_dim", "0"], "feed_forward_dim 0"),
        (["--model.decoder", "TransformerDecoder", "--model.decoder.dropout", "2"], "dropout 2"),
        (["--model.bridge", "TransformerBridge", "--model.bridge.layers", "0"], "0 layers"),
        (["--model.bridge", "TransformerBridge", "--model.bridge.heads", "5"], "into 5 heads"),
        (["--config", "missing.yaml"], "no file missing.yaml"),
        (["--ckpt_path", "missing.ckpt"], "no checkpoint missing.ckpt"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "0"], "trainer's settings"),
    ],
)
def test_a_wrong_setting_is_one_line(flags, said, recipe, tmp_path, capsys):
    assert main(["fit", "--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("learning_rate", "learning_rat", "learning_rat"),
        ("batch_size: 8", "batch_size: many", "data.batch_size"),
        ("class_path: Additive", "class_path: Subtractive", "Subtractive"),
        ("width: 4", "breadth: 4", "breadth"),
        ("trainer:", "trainer: [", "config"),
        ("trainer:", "\ttrainer:", "config"),
    ],
)
def test_a_wrong_configuration_is_one_line(old, new, said, recipe, tmp_path, capsys):
    text = recipe.read_text()
    assert old in text
    (tmp_path / "wrong.yaml").write_text(text.replace(old, new, 1))
    assert main(["fit", "--config", str(tmp_path / "wrong.yaml")]) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize("text", ["", "- model\n- trainer\n", "model"])
def test_a_configuration_without_settings_is_one_line(text, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text(text)
    for command in (["fit"], ["demo", "--output", str(tmp_path / "demo")]):
        assert main([*command, "--config", str(tmp_path / "empty.yaml")]) == 2
        assert "empty.yaml holds no settings" in one_line(capsys)
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def own_data(tmp_path):
    """Two images a split in Flickr8k's form."""
    (tmp_path / "Images").mkdir()
    lines = []
    for split in ("train", "dev"):
        names = [f"{split}{number}.jpg" for number in range(2)]
        for name in names:
            Image.new("RGB", (32, 32), "red").save(tmp_path / "Images" / name)
            lines += [f"{name}#{k}\tA red square .\n" for k in range(2)]
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names))
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("none", ""),
        ("missing image", "train1.jpg"),
        ("text as image", "train1.jpg is not an image"),
        ("text as image, in a worker", "train1.jpg is not an image"),
        ("bad line", "Flickr8k.token.txt, line 3"),
    ],
)
def test_a_fault_in_the_data_is_one_line(mistake, said, own_data, recipe, capsys):
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(own_data / "runs")]
    flags += ["--data.files", "Flickr8k", "--data.files.root", str(own_data), "--data.val_split", "dev"]
    picture = own_data / "Images" / "train1.jpg"
    if mistake == "missing image":
        picture.unlink()
    elif mistake.startswith("text"):
        picture.write_text("no picture")
        flags += ["--data.num_workers", "1" if "worker" in mistake else "0"]
    elif mistake == "bad line":
        path = own_data / "Flickr8k.token.txt"
        path.write_text(path.read_text().replace("train1.jpg#0\t", "train1.jpg "))
    code = main(["fit", *flags])
    if mistake == "none":
        assert code == 0
    else:
        assert code == 2 and said in one_line(capsys)


def test_an_error_reaches_python_as_it_is(recipe):
    with pytest.raises(InputError, match="no split"):
        train(["fit", "--config", str(recipe), "--data.val_split", json.dumps("nope")])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiles for the CPU")
def test_a_compiled_run_has_the_losses_of_a_plain_one(fit):
    epochs = ("--trainer.max_epochs", "3", "--early_stopping.patience", "99")
    plain, compiled = (rows(fit(*epochs, "--model.compile", flag)) for flag in ("false", "true"))
    losses = [[float(line["train/loss"]) for line in run if line["train/loss"]] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()  # of what another test has compiled
    flags = ["--model.compile", "true", "--trainer.default_root_dir", str(tmp_path)]
    with torch._inductor.config.patch({"cpp.cxx": ("missing-compiler",)}):  # monkeypatch would delete it at its end
        assert main(["fit", "--config", str(recipe), *flags]) == 2
    said = capsys.readouterr().err
    assert "model.compile" in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize("units", ["characters", "byte_pairs"])
def test_from_korean_captions_to_a_checkpoint_and_captions_in_utf8(units, fit, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    write_scenes(scenes, {"train": 8, "val": 3}, seed=1, side=32, language="ko")
    files = ("--data.files.root", str(scenes), "--data.files.splits", "[train, val]", "--data.units", units)
    run = fit(*files, "--model.word_presence", "0.3")
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    assert "Annex 29" in capsys.readouterr().out and run.model.scored_by == "unicode"
    assert run.model.presence.score.out_features == len(run.datamodule.words.words)
    card = Path(checkpoint).with_suffix(".md").read_text(encoding="utf-8")
    assert f" {units.replace('_', ' ')}" in card and "rules for English" not in card
    settings = ["--config", str(Path(run.trainer.log_dir, "config.yaml")), "--data.test_split", "val"]
    assert main(["test", *settings, "--ckpt_path", checkpoint]) == 0
    assert "Annex 29" in capsys.readouterr().out
    outputs = [tmp_path / f"captions.{suffix}" for suffix in ("csv", "jsonl")]
    for output in outputs:
        command = ["caption", str(scenes / "val"), "--checkpoint", checkpoint, "--output", str(output)]
        # Hardly trained, it would say nothing.
        assert main([*command, "--begin-with", "빨간 원", "--min-words", "12", "--workers", "0"]) == 0
        results = read_results(output)
        assert len(results) == 3 and all(one.caption.startswith("빨간 원") for one in results)
        assert "빨간 원".encode() in output.read_bytes()
