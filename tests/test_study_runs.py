"""A study's runs: each made once, whatever stops it, by however many processes; and what is kept of it."""

import json
import math
import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from test_annotation_cache import FOREIGN, Counting
from test_study_results import RESULT

from captioner import study_runs, training
from captioner.annotation_files import COCOCaptions
from captioner.attention import Annotations, Dot, Uniform
from captioner.cli import main
from captioner.decoders import LSTMDecoder
from captioner.encoders import SmallCNN
from captioner.errors import InputError
from captioner.faithfulness import measure
from captioner.model import Captioner, describe
from captioner.study import Row, Study
from captioner.study_results import Result, _like
from captioner.study_runs import Run, caption, given_by, make, plan, tabulate, train_and_caption
from captioner.vocabulary import BEGIN, Vocabulary

FORK = multiprocessing.get_context("fork")  # which has torch imported
OURS = Path(__file__).parents[1] / "configs" / "study.yaml"
ROWS = (Row("additive", "score function", (1, 2), ()), Row("Dot, 1", "score function", (1,), ("--x=1",)))
STUDY = Study(Path("recipe.yaml"), {}, "additive", ROWS)
REFERENCES = {1: ["a dog", "one dog"], "2.jpg": ["ein Hund"], 3: ["a cat on a mat", "the cat"]}
CAPTIONS = {1: "a dog", 3: "a cat on a dog", "2.jpg": "ein Hund"}


def runs(folder, **settings):
    return [
        Run(row, seed, folder / row.folder / str(seed), row.flags, settings, "captioner study")
        for row in ROWS
        for seed in row.seeds
    ]


def perform(made, run):
    made.append((run.row.name, run.seed))
    return replace(RESULT, settings=run.settings, captions=CAPTIONS), REFERENCES


def nothing(run):
    raise AssertionError(f"{run.name} is made again")


ALL = [("additive", 1), ("additive", 2), ("Dot, 1", 1)]


# Once each


def test_each_run_is_made_once_and_its_checkpoints_are_deleted(tmp_path, capsys):
    made = []

    def with_checkpoints(run):
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / "best.ckpt").write_text("large")
        return perform(made, run)

    assert make(runs(tmp_path), tmp_path, with_checkpoints) and made == ALL
    assert sorted(path.name for path in (tmp_path / "dot-1" / "1").iterdir()) == ["lock", "result.json"]
    assert Result.read(tmp_path / "dot-1" / "1" / "result.json").captions == CAPTIONS
    assert make(runs(tmp_path), tmp_path, nothing)
    assert "additive, seed 2 (2 of 3)" in capsys.readouterr().out


def test_an_interrupted_study_goes_on_where_it_was_stopped(tmp_path):
    made = []

    def stopped_at_the_second(run):
        if made:
            raise KeyboardInterrupt
        return perform(made, run)

    with pytest.raises(KeyboardInterrupt):
        make(runs(tmp_path), tmp_path, stopped_at_the_second)
    assert made == ALL[:1]
    assert make(runs(tmp_path), tmp_path, partial(perform, made)) and made == ALL


def test_other_settings_are_refused_before_anything_is_made(tmp_path):
    last = runs(tmp_path, gate=True, rate=0.1)[-1]
    make([last], tmp_path, partial(perform, []))
    with pytest.raises(
        InputError, match=r"dot-1/1 was made with other settings \(gate was true and is false and 1 more"
    ):
        make(runs(tmp_path, gate=False), tmp_path, nothing)
    with pytest.raises(InputError, match=r"\(size was \"the default\" and is 3\)"):
        make(runs(tmp_path, gate=True, rate=0.1, size=3), tmp_path, nothing)
    made = []
    last.result.unlink()
    assert make(runs(tmp_path, gate=False), tmp_path, partial(perform, made)) and made == ALL


def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path, capsys):
    made = []

    def second_fails(run):
        if run.seed == 2:
            raise InputError("It diverged.")
        return perform(made, run)

    assert not make(runs(tmp_path), tmp_path, second_fails)
    assert made == [ALL[0], ALL[2]] and "additive, seed 2 failed: It diverged." in capsys.readouterr().out
    assert make(runs(tmp_path), tmp_path, partial(perform, made)) and made[-1] == ALL[1]


def test_what_fails_at_once_would_fail_for_all(tmp_path):
    def fails(run):
        assert run.row.name == "additive" and run.seed == 1
        raise InputError("There is no data.")

    with pytest.raises(InputError, match="no data"):
        make(runs(tmp_path), tmp_path, fails)


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path, capsys):
    made = []
    folder = tmp_path / "additive" / "2"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert make(runs(tmp_path), tmp_path, partial(perform, made))
    assert made == [ALL[0], ALL[2]] and "is being made by another process" in capsys.readouterr().out


def together(barrier, path, run):
    with path.open("a") as file:
        file.write(f"{run.row.name} {run.seed}\n")
    if run.row.name == "additive":
        barrier.wait(60)  # for the other process, which must be making the other seed
    return perform([], run)


def test_two_processes_share_the_runs(tmp_path):
    work = partial(together, FORK.Barrier(2), tmp_path / "made")
    both = [FORK.Process(target=make, args=(runs(tmp_path), tmp_path, work)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted((tmp_path / "made").read_text().splitlines()) == ["Dot, 1 1", "additive 1", "additive 2"]
    assert all(run.result.is_file() for run in runs(tmp_path))


def test_a_run_done_meanwhile_is_not_made_again(tmp_path):
    made = []

    def meanwhile(run):
        if run.seed == 1 and run.row.name == "additive":
            make(runs(tmp_path)[1:2], tmp_path, partial(perform, made))  # as another process would
        return perform(made, run)

    assert make(runs(tmp_path), tmp_path, meanwhile)
    assert sorted(made) == sorted(ALL)


def test_other_references_are_said(tmp_path):
    make(runs(tmp_path)[:1], tmp_path, partial(perform, []))

    def on_other_images(run):
        return perform([], run)[0], REFERENCES | {4: ["a bird"]}

    make(runs(tmp_path), tmp_path, on_other_images)
    assert not runs(tmp_path)[1].result.is_file()


# The table


def test_the_table_is_made_of_what_is_there(tmp_path, capsys):
    make(runs(tmp_path)[1:], tmp_path, partial(perform, []))
    tabulate(STUDY, tmp_path)
    printed = capsys.readouterr().out
    assert "Missing: additive, seed 1." in printed and "Dot, 1" in printed
    assert (tmp_path / "study.png").is_file() and "seed 1" in (tmp_path / "study.md").read_text()


def test_without_a_result_there_is_no_table(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        tabulate(STUDY, tmp_path / "none")
    with pytest.raises(InputError, match="no result"):
        tabulate(STUDY, tmp_path)
    make(runs(tmp_path), tmp_path, partial(perform, []))
    (tmp_path / "references.json").write_text("[")
    with pytest.raises(InputError, match=r"references\.json cannot be read"):
        tabulate(STUDY, tmp_path)


# Settings


def written(folder, recipe, rows):
    """A study over the recipe of tiny scenes."""
    (folder / "recipe.yaml").write_text(recipe.read_text())
    budget = "budget: {trainer.max_epochs: 2}\n"
    (folder / "study.yaml").write_text(f"recipe: recipe.yaml\n{budget}reference: additive\nrows:\n{rows}")
    return folder / "study.yaml"


TWO = """\
  - {name: additive, group: score function, seeds: [1, 2]}
  - {name: blind, group: baseline, settings: {model.decoder.attention: NoAttention}}
"""


def test_a_rows_settings_stand_over_the_flags_and_those_over_the_budget(recipe, tmp_path):
    rows = "  - {name: additive, group: kind, settings: {model.decoder.gate: false}}\n"
    study = Study.read(written(tmp_path, recipe, rows))
    flags = ["--trainer.max_epochs", "5", "--model.decoder.gate=true", "--data.batch_size=4"]
    (run,) = plan(study, tmp_path / "out", flags, "captioner study")
    assert run.settings["trainer.max_epochs"] == 5 and run.settings["data.batch_size"] == 4
    assert run.settings["model.decoder.init_args.gate"] is False
    assert not [name for name in run.settings if name.startswith("trainer.default_root_dir")]
    assert run.settings == plan(study, tmp_path / "out", [*flags, "--data.num_workers=0"], "other")[0].settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed_everything", "2"], "--seed_everything is set by the study"),
        (["--trainer.devices=2"], "--trainer.devices is set by the study"),
        (["--modl.dropout", "2"], "The row 'additive' cannot be trained"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(flags, said, recipe, tmp_path, capsys):
    path = written(tmp_path, recipe, TWO)
    assert main(["study", "--config", str(path), "--output", str(tmp_path / "out"), *flags]) == 2
    stderr = capsys.readouterr().err
    assert said in stderr and stderr.count("\n") == 1 and not (tmp_path / "out").exists()


SMALL = ("--model.bridge.dim", "24", "--model.decoder.hidden_dim", "24", "--model.embedding_dim", "40")


@pytest.mark.slow
def test_every_row_of_ours_builds_its_captioner():
    study = Study.read(OURS)
    vocabulary = Vocabulary(["a", "dog", "runs"])
    annotations = Annotations(torch.randn(2, 9, 64), grid=(3, 3))
    tokens = torch.tensor([[[BEGIN, 4, 5, 6]], [[BEGIN, 6, 5, 4]]])
    built = {}
    parser = training._run(training._SettingsCLI, ["fit", *study.flags], None).parser
    for row in study.rows:
        flags = (*study.flags, "--model.encoder", "SmallCNN", "--model.encoder.width", "16", *SMALL, *row.flags)
        task = parser.instantiate(parser.parse_args(["fit", *flags]))["fit"]["model"]
        model = Captioner(task._encoder[0], vocabulary, **task._settings).eval()
        assert model(annotations, tokens)[0].shape == (2, 1, 3, len(vocabulary))
        decoder = describe(model)["decoder"]
        described = json.dumps([decoder, task.objective.doubly_stochastic, task.learning_rate], sort_keys=True)
        built[described] = row.name
        # What is timed for the table is the same model.
        like = _like(replace(RESULT, model=describe(model), words=3, annotation_dim=64))
        own = {name: part.shape for name, part in model.state_dict().items() if not name.startswith("encoder.")}
        assert {name: part.shape for name, part in like.state_dict().items()} == own
    assert len(built) == len(study.rows)  # no two are the same
    sizes = yaml.safe_load(study.recipe.read_text())["model"]
    assert sizes["bridge"]["init_args"]["dim"] == sizes["decoder"]["init_args"]["hidden_dim"]  # as dot products need
    for said in ("Dot", "ScaledDot", "General", '"heads": 8', "GRUDecoder", '"after"', "NoAttention", "Uniform"):
        assert any(said in described for described in built), said


# Training


@pytest.mark.slow
def test_a_study_runs_to_its_end_and_a_second_call_repeats_nothing(recipe, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = [
        "study",
        "--config",
        str(written(tmp_path, recipe, TWO)),
        "--output",
        str(out),
        "--data.batch_size",
        "11",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "additive, seed 2 (2 of 3)" in captured.out and "9 images are too few" in captured.out
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/result.json"))]
    first, second, blind = results
    assert first["captions"] != second["captions"] and len(blind["captions"]) == 9
    assert blind["entropy"] is blind["uniform_captions"] is None and 0 < first["entropy"] <= 1
    assert first["parameters"] > blind["parameters"] > 0 and first["epochs"] == 2 and first["minutes"] > 0
    assert not list(out.rglob("*.ckpt")) and (out / "additive" / "1" / "logs").is_dir()
    assert f"captioner study --config {tmp_path}" in (out / "study.md").read_text()

    def never(args):
        raise AssertionError("a run is repeated")

    monkeypatch.setattr(study_runs, "train", never)
    assert main(command) == 0
    assert [json.loads(path.read_text()) for path in sorted(out.glob("*/*/result.json"))] == results
    (out / "blind" / "1" / "result.json").unlink()
    assert main([*command, "--table-only"]) == 0
    assert "Missing: blind, seed 1." in capsys.readouterr().out


def test_uniform_weights_and_entropy_are_those_of_a_model_that_attends():
    """Of random weights that attend sharply; as a baseline that has them but for the score."""
    torch.manual_seed(4)
    words = Vocabulary(["a", "on", "the", "of", "in", *(f"word{number}" for number in range(4))])
    build = partial(Captioner, SmallCNN(size=32, width=4), words, embedding_dim=8)
    model, baseline = (build(decoder=partial(LSTMDecoder, hidden_dim=16, attention=kind)) for kind in (Dot, Uniform))
    for parameter in model.parameters():
        parameter.data *= 3
    baseline.load_state_dict(model.state_dict())
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    ids = [[1, "b"], [3, 4]]
    seen = [Annotations(torch.randn(2, 6, 16), mask) for _ in ids]
    found = caption(model.eval(), zip(ids, seen, strict=True), beam_size=2, max_words=6)

    entropies = []
    for of_batch, annotations in zip(ids, seen, strict=True):
        said, blind = (one.eval().search(annotations, beam_size=2, max_words=6) for one in (model, baseline))
        for place, image in enumerate(of_batch):
            texts = [" ".join(words.decode(hypotheses[place][0].tokens)) for hypotheses in (said, blind)]
            assert [found.captions[image], found.uniform_captions[image]] == texts
            regions = int(mask[place].sum())
            tokens = said[place][0].tokens
            alone = Annotations(annotations.values[place : place + 1, :regions])
            _, weights, _ = model(alone, torch.tensor([[[BEGIN, *tokens]]]))
            for word, share in zip(words.decode(tokens), weights[0, 0].tolist(), strict=False):
                if word.startswith("word"):
                    entropies.append(-sum(part * math.log(part) for part in share if part > 0) / math.log(regions))
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5) and found.entropy < 0.9
    assert {"a", "on", "the", "of", "in"} & {*" ".join(found.captions.values()).split()}  # which do not count
    assert found.captions != found.uniform_captions and list(found.captions) == [1, "b", 3, 4]


@pytest.fixture
def one(recipe, scenes, tmp_path):
    """A run of the recipe, long enough that attention matters, and its validation images."""
    flags = ("--config", str(recipe), "--trainer.max_epochs", "6", "--trainer.check_val_every_n_epoch", "2")
    row = Row("additive", "score function", (3,), ())
    records = COCOCaptions(scenes, "captions_{split}.json", "{split}", ("val",)).read("val")
    return Run(row, 3, tmp_path / "run", flags, given_by(flags), "captioner study"), records


@pytest.fixture
def trained(monkeypatch):
    """Do something between training and captioning."""

    def then(do):
        train = study_runs.train

        def training(args):
            cli = train(args)
            do(cli)
            return cli

        monkeypatch.setattr(study_runs, "train", training)

    return then


@pytest.mark.slow
def test_what_is_kept_is_of_the_best_checkpoint(one, trained):
    run, records = one
    (run.folder / "logs" / "of an interrupted run").mkdir(parents=True)
    trained(lambda cli: [parameter.data.zero_() for parameter in cli.model.captioner.parameters()])
    result, references = train_and_caption(run)
    assert len(list((run.folder / "logs").iterdir())) == 1
    best = run.folder / "checkpoints" / "best.ckpt"
    model = Captioner.from_checkpoint(best)
    said = model.caption([record.path for record in records], beam_size=3)
    assert result.captions == {record.image_id: caption.text for record, caption in zip(records, said, strict=True)}
    assert references == {record.image_id: list(record.captions) for record in records}
    assert result.entropy == pytest.approx(measure(model, records, beam_size=3).health.entropy, abs=1e-5)
    assert result.best_epoch == torch.load(best, weights_only=True)["epoch"] + 1 and result.epochs == 6
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert result.parameters == everything - sum(parameter.numel() for parameter in model.encoder.parameters())
    assert (result.regions, result.annotation_dim, result.grid) == (16, 16, (4, 4)) and result.beam_size == 3
    assert result.settings == run.settings and result.data == "COCOCaptions, split val"


def with_flags(run, *flags):
    return replace(run, flags=(*run.flags, *flags), settings=given_by((*run.flags, *flags)))


@pytest.mark.slow
def test_the_cnn_sees_no_image_again_where_there_is_a_cache(one, trained, tmp_path):
    run, records = one
    cached = (*FOREIGN, f"--data.cache={tmp_path / 'cache'}")
    run = with_flags(run, *cached, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1")
    trained(lambda cli: setattr(Counting, "seen", 0))
    result, _ = train_and_caption(run)
    assert Counting.seen == 0 and len(result.captions) == len(records) and result.annotation_dim == 12


@pytest.mark.slow
def test_a_study_needs_validation(one):
    run, _ = one
    with pytest.raises(InputError, match="there was no validation"):
        train_and_caption(with_flags(run, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"))


def test_a_configuration_that_changes_meanwhile_is_said(one):
    run, _ = one
    with pytest.raises(InputError, match="changed while it ran"):
        train_and_caption(replace(run, settings=run.settings | {"model.learning_rate": 0.5}))
