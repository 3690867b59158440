"""The file of a study: what it means, and what is said of a mistake in it."""

from pathlib import Path

import pytest
import yaml

from captioner.cli import main
from captioner.study import Study

OURS = Path(__file__).parents[1] / "configs" / "study.yaml"
GIVEN = {"recipe": "recipe.yaml", "reference": "one", "rows": [{"name": "one", "group": "kind"}]}


def written(folder, study):
    (folder / "recipe.yaml").write_text("trainer: {}")
    (folder / "study.yaml").write_text(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def test_what_a_study_says_is_given_to_fit_as_flags(tmp_path):
    settings = {"model.decoder.gate": False, "model.decoder.attention": "Dot", "data.cache": None, "data.x": {"y": [1]}}
    row = {"name": "No gate, 2", "group": "parts", "seeds": [3, 5], "configs": ["recipe.yaml"], "settings": settings}
    rows = [*GIVEN["rows"], row]
    study = Study.read(written(tmp_path, GIVEN | {"budget": {"model.learning_rate": 1e-3}, "rows": rows}))
    recipe = str(tmp_path / "recipe.yaml")
    assert study.flags == ("--config", recipe, "--model.learning_rate=0.001")
    assert study.rows[0].seeds == (1,) and study.rows[0].flags == ()
    assert study.rows[1].flags == (
        *("--config", recipe, "--model.decoder.gate=false", "--model.decoder.attention=Dot"),
        *("--data.cache=null", '--data.x={"y": [1]}'),
    )
    assert study.rows[1].seeds == (3, 5) and study.rows[1].folder == "no-gate-2"


def test_ours_holds_what_is_to_be_compared():
    study = Study.read(OURS)
    seeds = {row.name: row.seeds for row in study.rows}
    assert study.reference == "additive" and seeds["additive"] == (1, 2, 3)
    groups = {group: [row for row in study.rows if row.group == group] for group in {row.group for row in study.rows}}
    assert len(groups["score function"]) == 5 and len(groups["decoder"]) == 2 and len(groups["switched off"]) == 4
    assert [row.seeds for row in groups["no attention"]] == [(1, 2, 3)] * 3


ROW = {"name": "two", "group": "kind"}


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("rows: [", "no YAML"),
        ("[1, 2]", "holds no settings"),
        (GIVEN | {"rows": []}, "no list of rows"),
        (GIVEN | {"row": []}, "'row', which is unknown"),
        ({"recipe": "recipe.yaml", "rows": GIVEN["rows"]}, "lacks 'reference'"),
        (GIVEN | {"recipe": "none.yaml"}, "The recipe of"),
        (GIVEN | {"reference": "two"}, "'two', which is no row"),
        (GIVEN | {"budget": [1]}, "The budget of"),
        (GIVEN | {"budget": {"seed_everything": 2}}, "sets seed_everything"),
        (GIVEN | {"rows": [*GIVEN["rows"], "two"]}, "Row 2 of"),
        (GIVEN | {"rows": [*GIVEN["rows"], {"name": "two"}]}, "lacks 'group'"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"name": "-"}]}, "has the name '-'"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"name": "One!"}]}, "'One!', is named like another"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"seeds": 3}]}, "has the seeds 3"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"seeds": [1, 1]}]}, "has the seeds [1, 1]"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"seeds": []}]}, "has the seeds []"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"seeds": [-1]}]}, "has the seeds [-1]"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"configs": "recipe.yaml"}]}, "has the configs 'recipe.yaml'"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"configs": ["gru.yaml"]}]}, "configuration of row 2"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"settings": ["--x"]}]}, "no names with values"),
        (GIVEN | {"rows": [*GIVEN["rows"], ROW | {"settings": {"ckpt_path": "x"}}]}, "sets ckpt_path"),
    ],
)
def test_a_mistake_is_one_line(study, said, tmp_path, capsys):
    assert main(["study", "--config", str(written(tmp_path, study)), "--output", str(tmp_path / "out")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("captioner: ") and stderr.count("\n") == 1 and said in stderr, stderr
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["study", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
