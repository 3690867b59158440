"""The task: it scores what a user of the checkpoint would get, each image once."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from captioner import loops
from captioner.annotation_files import COCOCaptions
from captioner.attention import Additive, Attention
from captioner.attention_health import in_words
from captioner.checkpoint import read
from captioner.decoders import LSTMDecoder
from captioner.demo import score_scenes
from captioner.encoders import SmallCNN
from captioner.ensemble import Ensemble
from captioner.errors import InputError
from captioner.evaluation import ReferenceCaptions, evaluate
from captioner.faithfulness import measure
from captioner.images import read_image
from captioner.metrics import score_captions
from captioner.model import Captioner
from captioner.scenes import read_scenes
from captioner.task import CaptioningTask
from captioner.tokens import detokenize
from captioner.training import train
from captioner.vocabulary import Vocabulary


def scored_by_hand(best, scenes, split, beam_size):
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", (split,)).read(split)
    captions = Captioner.from_checkpoint(best).caption([record.path for record in records], beam_size=beam_size)
    references = {record.image_id: record.captions for record in records}
    hypotheses = {record.image_id: caption.text for record, caption in zip(records, captions, strict=True)}
    return {name: score.corpus for name, score in score_captions(references, hypotheses).items()}, hypotheses


def test_the_test_scores_what_caption_gives_with_the_same_beam(recipe, best, scenes):
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best)])
    scores, captions = scored_by_hand(best, scenes, "seen", beam_size=3)
    assert cli.model.scores == scores and cli.model.scored_images == 5
    assert cli.model.captions == captions and len({*captions.values()}) > 1
    logged = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    assert logged == pytest.approx({f"test/{name}": value for name, value in scores.items()}, rel=1e-6)


def test_the_test_says_how_sure_its_scores_are_as_the_score_command_does(recipe, best, scenes, tmp_path):
    results = tmp_path / "results.json"
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best), "--model.results", str(results)])
    references = ReferenceCaptions.read(scenes / "captions_seen.json")
    told, (found,) = evaluate(references, [results]), cli.model.evaluation.systems
    (system,) = told.systems
    assert (found.captions, found.intervals, found.diversity) == (system.captions, system.intervals, system.diversity)
    assert {name: score.corpus for name, score in system.scores.items()} == cli.model.scores
    assert cli.model.evaluation.human == told.human and cli.model.evaluation.fingerprint == told.fingerprint


def test_the_test_measures_attention_as_the_faithfulness_command_does(recipe, best, scenes, capsys):
    # Of the images to train on, in which it finds things.
    flags = ["--data.files.splits", "[train]", "--data.test_split", "train"]
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best), *flags])
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("train",)).read("train")
    model = Captioner.from_checkpoint(best)
    found = measure(model, records, beam_size=3, batch_size=8)
    report, truths = cli.model.report, read_scenes(scenes, "train")
    # The command is told of no boxes.
    unpointed = report.health._replace(pointing=None, pointing_uniform=None)
    assert report._replace(health=found.health, permuted_costs=None) == found._replace(permuted_costs=None)
    assert unpointed == found.health
    captions = model.caption([record.path for record in records], beam_size=3)
    told = score_scenes(captions, [truths[each.image_id] for each in records], [each.captions for each in records])
    assert report.health.pointing == pytest.approx(told.pointing)
    assert report.health.pointing_uniform == pytest.approx(told.pointing_uniform) and told.pointing_uniform > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"train, 22 images, {found.health.content_words} content words, beam 3, seed 0" in printed
    assert f"{100 * told.pointing:.1f} % {100 * told.pointing_uniform:.1f} % by chance" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.attention_health", "false"], "model.attention_health is false"),
        (["--model.ensemble", "{best}"], "test them one by one"),
    ],
)
def test_where_attention_is_not_measured_one_line_says_why(flags, said, recipe, best, capsys):
    flags = [flag.format(best=best) for flag in flags]
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best), *flags])
    *_, last = capsys.readouterr().out.splitlines()
    assert said in last and cli.model.report is None


@pytest.mark.parametrize("attention", ["NoAttention", "Uniform"])
def test_a_decoder_that_does_not_choose_where_to_look_has_no_health(attention, fit, recipe, capsys):
    flags = ["--model.decoder.attention", attention]
    cli = fit(*flags, "--trainer.max_epochs", "1")
    assert "entropy" not in capsys.readouterr().out and not [name for name in rows(cli)[0] if "attention/" in name]
    best = cli.trainer.checkpoint_callback.best_model_path
    assert train(["test", "--config", str(recipe), "--ckpt_path", best, *flags]).model.report is None
    assert "has no attention that could be measured" in capsys.readouterr().out.splitlines()[-1]


def test_each_validation_logs_the_health_of_attention(run, recipe, best, capsys):
    lines = [line for line in rows(run) if line["attention/entropy"]]
    assert len(lines) == len([line for line in rows(run) if line["val/CIDEr-D"]]) == 6
    names = ("entropy", "movement", "same_region", "uniform_loss", "pointing", "pointing_uniform")
    assert all(0 <= float(line[f"attention/{name}"]) <= 1 for line in lines for name in names if name != "uniform_loss")
    cli = train(["validate", "--config", str(recipe), "--ckpt_path", str(best)])
    epoch = torch.load(best, weights_only=True)["epoch"]
    (line,) = (line for line in lines if int(line["epoch"]) == epoch)
    for name, value in cli.model.health._asdict().items():
        if name in names:
            assert float(line[f"attention/{name}"]) == pytest.approx(value, abs=1e-5)
    assert f"Attention: {in_words(cli.model.health)}" in " ".join(capsys.readouterr().out.split("\n"))
    card = best.with_suffix(".md").read_text()
    assert f"entropy of its weights is {cli.model.health.entropy:.2f}" in card
    assert f"over the {cli.model.health.content_words} content words" in card


@pytest.fixture(scope="module")
def larger(fit):
    """A checkpoint of the same words with another encoder, for larger images, and another decoder."""
    flags = ["--model.encoder.size", "48", "--trainer.max_epochs", "2", "--seed_everything", "3"]
    flags += ["--model.decoder", "GRUDecoder", "--model.decoder.attention", "Additive"]
    cli = fit(*flags, "--model.decoder.attention.dim", "16", "--model.decoder.hidden_dim", "24")
    return Path(cli.trainer.checkpoint_callback.best_model_path)


def test_an_ensemble_is_tested_on_what_each_member_sees(recipe, best, larger, scenes):
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best), "--model.ensemble", str(larger)])
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("seen",)).read("seen")
    members = [Captioner.from_checkpoint(path) for path in (best, larger)]
    assert [member.preprocessing.size for member in members] == [32, 48]
    ensemble = Ensemble(members)
    images = [read_image(record.path) for record in records]
    annotations = ensemble.annotate(lambda given: torch.stack([given.pixels(image) for image in images]))
    found = ensemble.search(annotations, beam_size=3)
    captions = [detokenize(members[0].vocabulary.decode(hypotheses[0].tokens)) for hypotheses in found]
    assert list(cli.model.captions.values()) == captions
    for path in (best, larger):
        assert captions != [each.text for each in Captioner.from_checkpoint(path).caption(images, beam_size=3)]


def test_an_ensemble_of_a_checkpoint_and_itself_changes_nothing(recipe, best, scenes):
    both = f"[{best}, {best}]"
    cli = train(["test", "--config", str(recipe), "--ckpt_path", str(best), "--model.ensemble", both])
    assert cli.model.scores == scored_by_hand(best, scenes, "seen", beam_size=3)[0]


@pytest.mark.parametrize("setting", ["ensemble", "results"])
def test_what_is_of_the_test_is_refused_elsewhere(setting, recipe, best, tmp_path):
    flags = ["--config", str(recipe), "--trainer.default_root_dir", str(tmp_path), f"--model.{setting}", str(best)]
    for command, more in (("fit", []), ("validate", ["--ckpt_path", str(best)])):
        with pytest.raises(InputError, match=f"model.{setting} .*leave it out of `captioner {command}`"):
            train([command, *flags, *more])
    task = CaptioningTask(SmallCNN(size=32, width=4), **{setting: best})
    with pytest.raises(InputError, match=f"model.{setting}"):
        task.setup("fit")
    assert not list(tmp_path.iterdir())


def test_results_never_replace_a_checkpoint_and_are_refused_before_the_work(recipe, best, larger, tmp_path):
    flags = ["test", "--config", str(recipe), "--ckpt_path", str(best), "--model.ensemble", str(larger)]
    before = larger.read_bytes()
    for results, said in ((larger, "is a checkpoint"), (best, "is a checkpoint"), (tmp_path / "no" / "x", "cannot be")):
        with pytest.raises(InputError, match=said):
            train([*flags, "--model.results", str(results)])
    assert larger.read_bytes() == before


def test_a_test_of_no_image_says_so(recipe, best):
    with pytest.raises(InputError, match="limit_test_batches"):
        train(["test", "--config", str(recipe), "--ckpt_path", str(best), "--trainer.limit_test_batches", "0"])


def test_validation_scores_what_caption_gives_greedily(recipe, run, best, scenes):
    cli = train(["validate", "--config", str(recipe), "--ckpt_path", str(best)])
    scores, captions = scored_by_hand(best, scenes, "val", beam_size=1)
    assert cli.model.scores == scores == read(best).scores and cli.model.scored_images == 9
    assert run.trainer.checkpoint_callback.best_model_score.item() == pytest.approx(scores["CIDEr-D"], rel=1e-6)
    assert len({*captions.values()}) > 1


def test_it_learns(run):
    losses = [float(line["train/loss"]) for line in rows(run) if line["train/loss"]]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert read(run.trainer.checkpoint_callback.best_model_path).scores["BLEU-1"] > 0.4


def rows(cli):
    import csv

    with open(Path(cli.trainer.loggers[0].log_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_the_losses_parts_are_logged(run):
    line = next(line for line in rows(run) if line["train/loss"])
    total, words, attention = (float(line[f"train/{name}"]) for name in ("loss", "cross_entropy", "attention"))
    assert total == pytest.approx(words + attention, rel=1e-4) and attention > 0


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_both_precisions_run(precision, fit):
    cli = fit("--trainer.precision", precision)
    assert cli.model.scored_images == 9
    assert all(parameter.dtype == torch.float32 for parameter in cli.model.captioner.parameters())
    weights, *_ = Captioner.from_checkpoint(cli.trainer.checkpoint_callback.best_model_path).parameters()
    assert weights.dtype == torch.float32 and weights.isfinite().all()


@pytest.mark.slow
def test_the_learning_rate_rises_and_falls_over_all_steps(fit):
    cli = fit("--trainer.max_epochs", "4", "--model.warmup", "0.25")
    rates = [float(line["lr-AdamW/pg1"]) for line in rows(cli) if line["lr-AdamW/pg1"]]
    assert len(rates) == 12 and rates[:3] == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02])
    assert rates[3] == pytest.approx(0.02) and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.002


def test_only_matrices_decay(run):
    decays, stays = run.trainer.optimizers[0].param_groups
    assert decays["weight_decay"] == run.model.weight_decay and stays["weight_decay"] == 0
    assert all(parameter.dim() > 1 for parameter in decays["params"])
    embedding = run.model.captioner.embedding.weight
    assert any(parameter is embedding for parameter in stays["params"])
    assert sum(len(group["params"]) for group in (decays, stays)) == len(list(run.model.parameters()))


def test_pretrained_weights_are_loaded_to_train_and_not_to_test(fit, recipe, last, monkeypatch):
    loaded = []
    monkeypatch.setattr(SmallCNN, "load_weights", lambda self: loaded.append(self))
    train(["test", "--config", str(recipe), "--ckpt_path", str(last)])
    assert not loaded  # a checkpoint brings them
    cli = fit("--trainer.fast_dev_run", "true")
    assert loaded == [cli.model.captioner.encoder]


def test_a_module_is_named_once_in_the_state_dict(run):
    names = list(run.model.state_dict())
    assert all(name.startswith("model.") for name in names)
    assert sum("encoder.body.0.0.weight" in name for name in names) == 1


def test_a_foreign_module_is_wrapped():
    assert CaptioningTask(nn.Conv2d(3, 4, 1))._encoder[0].annotation_dim == 4


def test_without_captions_data_it_says_so():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(InputError, match="datamodule="):
        trainer.fit(CaptioningTask(SmallCNN(size=32, width=4)), datamodule=LightningDataModule())


def test_testing_without_a_checkpoint_says_so(recipe):
    with pytest.raises(InputError, match="--ckpt_path"):
        train(["test", "--config", str(recipe)])


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("feed_previous", [False, True])
def test_what_learns_is_read(feed_previous, tie_weights):
    decoder = partial(LSTMDecoder, feed_previous=feed_previous)
    task = CaptioningTask(SmallCNN(size=32, width=2), decoder=decoder, embedding_dim=8, tie_weights=tie_weights)
    task._build(Vocabulary(["ball"]))
    assert task.captioner.embedding.weight.requires_grad == (feed_previous or tie_weights)


FROZEN = ("captioner.encoders.ResNet", "--model.encoder.depth", "18", "--model.encoder.stage", "1")
FROZEN += ("--model.encoder.learns", "false", "--model.encoder.preprocessing.size", "32")


@pytest.fixture(scope="module")
def losses_of(fit):
    """The losses of nine steps with a frozen encoder, which starts the same each time."""

    def losses(*flags):
        cli = fit("--model.encoder", *FROZEN, "--trainer.max_epochs", "3", *flags)
        return [float(line["train/loss"]) for line in rows(cli) if line["train/loss"]]

    return losses


@pytest.fixture(scope="module")
def losses(losses_of):
    found = losses_of()
    assert len(found) == 9 and found[-1] < 0.9 * found[0]
    return found


@pytest.mark.slow
def test_the_losses_on_cached_annotations_are_those_on_images(losses, losses_of, tmp_path):
    assert losses_of("--data.cache", str(tmp_path)) == pytest.approx(losses, rel=1e-3)  # kept in float16


@pytest.mark.slow
def test_the_losses_in_bfloat16_are_close_to_those_in_float32(losses, losses_of):
    rounded = losses_of("--trainer.precision", "bf16-mixed")
    assert rounded == pytest.approx(losses, rel=1e-2) and rounded != losses


def test_the_losses_are_those_of_the_plain_path(losses, losses_of, monkeypatch):
    """No rows dropped, nothing shared between turns, padding scored and then ignored: equation by equation."""
    monkeypatch.setattr(Captioner, "score_words", Captioner.forward)
    monkeypatch.setattr(Additive, "looks", Attention.looks)
    monkeypatch.setattr(loops, "linear", lambda layer: layer)
    assert losses_of() == pytest.approx(losses, rel=1e-4)
