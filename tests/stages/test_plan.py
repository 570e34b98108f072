"""Plans as files: readable, editable, checked against the model entry by entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_cases import OTHER, SHAPES, profile

from bondsmith.recipe import Recipe
from bondsmith.stages.matrix_plan import MatrixPlan, PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import Profile
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites


@pytest.fixture(scope="module")
def known() -> Profile:
    return profile()


def test_profile_and_plan_survive_a_file(known: Profile, tmp_path: Path) -> None:
    known.save(tmp_path)
    again = Profile.load(tmp_path)
    recipe = Recipe(bytes="0.2")
    plan = planned(again, recipe)
    assert plan == planned(known, recipe)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert [m.to_json() for m in loaded.matrices] == [m.to_json() for m in plan.matrices]
    assert loaded.bytes(4) == plan.bytes(4)
    loaded.check(SHAPES, OTHER)
    assert "predicted loss" in str(loaded)


def edited(path: Path, change: Any) -> Plan:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["matrices"].pop(4),
            r"model\.layers\.1\.mlp\.up: the model has this matrix, the plan has no entry",
        ),
        (lambda c: c["matrices"][3].update(name="other"), r"layers\.1\.attn\.o: the model has this matrix"),
        (lambda c: c["matrices"][0].update(shape=[48, 40]), r"layers\.0\.attn\.o: the plan says block 0, 48 x 40"),
        (lambda c: c["matrices"][0].update(sites=[[48, 1], [1, 40]], bonds=[8]), r"layers\.0\.attn\.o: sites"),
        (
            lambda c: c["matrices"][0].update(sites=[[48, 1], [1, 48]], bonds=[0]),
            r"layers\.0\.attn\.o: bonds are integers",
        ),
        (
            lambda c: c["matrices"][0].update(sites=[[48, 1], [1, 48]], bonds=[64]),
            r"layers\.0\.attn\.o: bonds \[64\] are over",
        ),
        (lambda c: c["matrices"][0].update(grid={"bits": 5}), r"layers\.0\.attn\.o: ValueError: 5 bits do not exist"),
        (lambda c: c["matrices"][1].update(rows=200), r"layers\.0\.mlp\.up: 200 of 96 rows cannot be kept"),
        (lambda c: c.update(other_parameters=7), r"other_parameters: the plan counts 7"),
    ],
)
def test_an_edited_plan_is_checked_entry_by_entry(known: Profile, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    planned(known, Recipe(keep=0.9, channels=False)).save(path)
    with pytest.raises(PlanError, match=message):
        edited(path, change).check(SHAPES, OTHER)


def test_an_entry_twice_is_named(known: Profile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(known, Recipe(keep=0.9, channels=False)).save(path)
    with pytest.raises(PlanError, match=r"layers\.0\.attn\.o: the plan has two entries"):
        edited(path, lambda c: c["matrices"].append(c["matrices"][0])).check(SHAPES, OTHER)


def test_embedding_and_head_are_checked_too() -> None:
    shapes = {"embed": (300, 48)}
    plan = Plan((), 300 * 48, (MatrixPlan("embed", -1, 300, 48, grid=Grid(8, 0)),))
    plan.check({}, 300 * 48, shapes)
    with pytest.raises(PlanError, match="embed: the plan says 300 x 48 outside the blocks, the model has 200 x 48"):
        plan.check({}, 300 * 48, {"embed": (200, 48)})
    with pytest.raises(PlanError, match=r"embed: .* the model has none of this name, but wte"):
        plan.check({}, 300 * 48, {"wte": (300, 48)})


def test_channels_must_go_on_both_sides(known: Profile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(known, Recipe(keep=0.9, channels=False)).save(path)
    dense = {"sites": None, "bonds": [], "gauge": False}
    with pytest.raises(PlanError, match=r"0\.mlp\.up: the plan keeps 60 rows, but what reads them .* keeps no fewer"):
        edited(path, lambda c: c["matrices"][1].update(dense | {"rows": 60})).check(SHAPES, OTHER)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bond": [8]}, r"entry model\.layers\.0\.mlp\.up: .*there is no key 'bond'; the keys are name, block"),
        ({"sites": None}, r"mlp\.up: .*bonds and a gauge go with sites"),
        ({"gauge": "false"}, r"mlp\.up: .*gauge: 'false' is neither true nor false"),
        ({"grid": {"bits": 4, "group": 64.0}}, r"mlp\.up: .*a group of 64.0 columns is no whole number"),
    ],
)
def test_an_entry_that_says_nothing_sensible_is_named(
    known: Profile, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    path = tmp_path / "plan.json"
    planned(known, Recipe(keep=0.3, channels=False)).save(path)
    with pytest.raises(PlanError, match=match):
        edited(path, lambda c: c["matrices"][1].update(change))


def test_an_edited_plan_predicts_nothing(known: Profile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = planned(known, Recipe(keep=0.9, channels=False))
    plan.save(path)
    assert Plan.load(path).loss == pytest.approx(plan.loss, rel=1e-5)
    other = edited(path, lambda c: c["matrices"][1].update(sites=None, bonds=[], gauge=False))
    assert (other.loss, other.gap) == (None, None)


def test_a_plan_of_a_later_format_is_refused(known: Profile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(known, Recipe(keep=0.9)).save(path)
    with pytest.raises(PlanError, match="has format 2, this version of bondsmith reads 1"):
        edited(path, lambda c: c.update(format=2))


def test_an_embedding_cannot_be_cut() -> None:
    cut = MatrixPlan("embed", -1, 300, 48, Sites((300, 1), (1, 48)), (8,))
    with pytest.raises(PlanError, match="embed: embedding and head can be rounded"):
        Plan((), 300 * 48, (cut,)).check({}, 300 * 48, {"embed": (300, 48)})
    twice = MatrixPlan("embed", -1, 300, 48, grid=Grid(8, 0))
    with pytest.raises(PlanError, match="embed: the plan has two entries"):
        Plan((), 300 * 48, (twice, twice)).check({}, 300 * 48, {"embed": (300, 48)})


def test_what_is_no_plan_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{]")
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(tmp_path / "plan.json")


def test_bytes_of_a_candidate_follow_its_grid() -> None:
    plan = planned(profile(), Recipe(bytes="0.15"))
    for m in plan.matrices:
        if m.grid is not None and m.sites is None:
            assert m.bytes(4) - m.grid.packed_bytes(*m.shape) < 1000
    assert Grid(4, 64, symmetric=False).packed_bytes(2, 128) == 2 * (64 + 2 * 4)
