"""Plans: within their budgets, bounded by patterns; the profile behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plan_cases import OTHER, SHAPES, moment, profile, weights

from bondsmith.recipe import Recipe, RecipeError
from bondsmith.stages.fast_profile import conditional_variances, rounding_unit
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import MatrixProfile, Profile
from bondsmith.stages.uniform import uniform_plan
from bondsmith.tensor.fit import whitened_cut
from bondsmith.tensor.metric import energy
from bondsmith.tensor.rounding import Grid


@pytest.fixture(scope="module")
def known() -> Profile:
    return profile()


def test_the_curve_is_half_the_error_of_the_best_cut(known: Profile) -> None:
    name = "model.layers.1.attn.o"
    C, B, W = moment(48, 10), moment(48, 110), weights()[name]
    losses = known[name].cut_losses()
    assert len(losses) == 49
    assert losses[-1] == 0
    for bond in (1, 7, 30):
        cut = whitened_cut(W.double(), bond, input_moment=C, output_moment=B, damping=1e-6).to_matrix()
        assert float(losses[bond]) == pytest.approx(0.5 * energy(W.double() - cut, C, B), rel=1e-3)


def test_rounding_is_predicted_from_the_step_and_what_compensation_leaves() -> None:
    """Against errors drawn evenly over a step, each compensated by the inputs after it: the definition of the residue."""
    C = moment(12, 3)
    v = conditional_variances(C)
    for i in range(12):
        rest = list(range(i + 1, 12))
        explained = C[i, rest] @ torch.linalg.solve(C[rest][:, rest], C[rest, i]) if rest else torch.zeros(())
        assert float(v[i]) == pytest.approx(float(C[i, i] - explained), rel=1e-6)
    W = torch.rand(5, 12, dtype=torch.float64)
    spread = sum(
        0.5 * float((W[o, a : a + 4].max() - W[o, a : a + 4].min()) ** 2 * v[a : a + 4].sum()) / 12
        for o in range(5)
        for a in (0, 4, 8)
    )
    assert rounding_unit(W, v, None, 4) == pytest.approx(spread)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.25])
def test_a_plan_keeps_its_budget_and_is_no_worse_than_a_uniform_one(known: Profile, keep: float) -> None:
    plan = planned(known, Recipe(keep=keep))
    assert 0.97 * keep < plan.keep <= keep
    assert plan.loss == pytest.approx(sum(m.loss or 0 for m in plan.matrices))
    even = uniform_plan(SHAPES, OTHER, Recipe(keep=keep, uniform=True), 4)
    losses = [float(known[m.name].cut_losses()[m.bonds[0]]) for m in even.matrices if m.sites is not None]
    assert plan.loss is not None
    assert plan.loss < sum(losses)


def test_dropping_channels_beats_cutting_alone_when_much_must_go(known: Profile) -> None:
    both, cuts = (planned(known, Recipe(keep=0.3, channels=c)) for c in (True, False))
    assert both.drops_channels
    assert not cuts.drops_channels
    assert both.loss is not None
    assert cuts.loss is not None
    assert both.loss < cuts.loss
    for k in range(3):
        up, down = (next(m for m in both.matrices if m.name == f"model.layers.{k}.mlp.{n}") for n in ("up", "down"))
        assert up.rows == down.columns


def test_bytes_count_everything_and_bits_are_chosen(known: Profile) -> None:
    total = OTHER + sum(o * i for _, o, i in SHAPES.values())
    for share in (0.5, 0.25, 0.2):
        plan = planned(known, Recipe(bytes=f"{share}"))
        assert plan.bytes(4) <= share * 4 * total
        assert plan.tables[0].name == "model.embed"
    assert any(m.grid is not None for m in plan.matrices)
    unrounded = planned(known, Recipe(bytes="0.5", bits=(16,)))
    assert not unrounded.tables
    assert all(m.grid is None for m in unrounded.matrices)


def test_several_budgets_hold_at_once(known: Profile) -> None:
    plan = planned(known, Recipe(keep=0.6, multiply_adds=0.5, bytes="0.3"))
    dense = sum(o * i for _, o, i in SHAPES.values())
    assert plan.keep <= 0.6
    assert sum(m.multiply_adds for m in plan.matrices) <= 0.5 * dense
    assert plan.bytes(4) <= 0.3 * 4 * (OTHER + dense)


def test_a_tolerated_loss_gives_the_smallest_file(known: Profile) -> None:
    loose, tight = (planned(known, Recipe(loss=loss, bits=(16,))) for loss in (1.0, 0.01))
    assert loose.loss is not None
    assert tight.loss is not None
    assert loose.loss <= 1.0
    assert tight.loss <= 0.01
    assert loose.bytes(4) < tight.bytes(4)
    again = planned(known, Recipe(bytes=f"{loose.bytes(4) - 500}B", bits=(16,)))
    assert again.loss is not None
    assert again.loss > 0.98 * loose.loss


def test_patterns_protect_and_bound(known: Profile) -> None:
    recipe = Recipe(
        keep=0.5, keep_dense=("*.layers.2.*",), bounds={"*.layers.0.*": (0.8, 1.0), "*.1.attn.o": (0.0, 0.35)}
    )
    plan = planned(known, recipe)
    for m in plan.matrices:
        share = m.parameters / m.dense_parameters
        if m.block == 2:
            assert not m.fitted
        if m.block == 0:
            assert share >= 0.8
        if m.name == "model.layers.1.attn.o":
            assert share <= 0.35


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bytes": "3kB", "bits": (16,)},
            r"bytes: 3.0 kB is out of reach, the smallest plan has .* embedding, head and norms",
        ),
        ({"keep": 0.001}, r"parameters: a budget of \d+ is out of reach, the least .* is"),
        ({"keep": 0.5, "bounds": {"*.mlp.*": (0.9, 1.0)}}, r"parameters: a budget of [\d,]+ is out of reach"),
    ],
)
def test_a_budget_out_of_reach_says_how_far_one_can_go(known: Profile, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(known, Recipe(**settings))
    blank = Profile.blank(SHAPES, OTHER, 4, known.tables)
    with pytest.raises(PlanError, match=message):
        planned(blank, Recipe(**settings))  # the same before any work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give a budget"),
        ({"uniform": True, "keep": 0.5, "bytes": "0.3"}, "either keep"),
        ({"uniform": True, "keep": 0.5, "bits": (4, 3)}, "one width"),
        ({"keep": 0.5, "bits": (5,)}, "bits: 5 is not one of"),
        ({"keep": 0.5, "bounds": {"*": (0.6, 0.2)}}, "is not .least, largest."),
        ({"loss": 0.1, "metric": "input"}, "predicts no nats"),
        ({"plan": "plan.json", "keep": 0.5}, "needs no budget"),
        ({"bytes": "0.2", "group": 48}, "groups of 32, 64 and 128 only"),
        ({"bytes": "0.2", "codebook": "fp4"}, "codebook: 'fp4' is not one of uniform, nf4"),
        ({"keep": 0.5, "probe_windows": -1}, "probe_windows: -1"),
        ({"multiply_adds": 1.5}, "multiply_adds: 1.5 is not in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**settings)


def test_a_pattern_that_matches_nothing_is_named(known: Profile) -> None:
    with pytest.raises(RecipeError, match=r"bounds: .\*.wrong. matches no matrix"):
        planned(known, Recipe(keep=0.5, bounds={"*.wrong": (0.5, 1.0)}))


def test_bounds_that_keep_all_leave_no_hybrid(known: Profile) -> None:
    alone = planned(known, Recipe(bytes="0.2", channels=False, bounds={"*": (1, 1)}))
    assert all(m.sites is None and m.grid is not None for m in alone.matrices)


def test_what_is_not_rounded_may_be_more_than_the_budget(known: Profile) -> None:
    with pytest.raises(PlanError, match="is out of reach, the smallest plan has"):
        planned(known, Recipe(bytes="0.05", bits=16))


def test_a_tolerated_loss_may_round(known: Profile) -> None:
    """The smallest file within a loss is not the smallest without bits."""
    tolerant = Recipe(loss=0.2)
    assert {None, 8, 4, 3, 2} == {grid and grid.bits for grid in tolerant.grids}
    assert planned(known, tolerant).bytes(4) < planned(known, Recipe(loss=0.2, bits=16)).bytes(4)


def test_budgets_that_exclude_each_other_are_named_with_their_numbers(known: Profile) -> None:
    with pytest.raises(PlanError, match=r"cannot be met together with the budget of .*: within that the least is"):
        planned(known, Recipe(keep=0.3, loss=1e-6))


def test_bonds_are_useful_multiples(known: Profile) -> None:
    bonds = {b for m in planned(known, Recipe(keep=0.5)).matrices for b in m.bonds}
    assert bonds
    assert all(bond % 8 == 0 for bond in bonds)


def test_probes_correct_the_scale_part_by_part(tmp_path: Path) -> None:
    """On a real tiny model; the corrected prediction of a probed cut is what was measured."""
    from conftest import save_tiny, write_text

    from bondsmith import planner
    from bondsmith.stages.scaling import parts

    save_tiny(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 3000)
    shared = {"calibration": [str(text)], "tokens": 1024, "window": 32}
    plain = planner.profile(tmp_path / "model", tmp_path / "plain", **shared).profile
    probed = planner.profile(tmp_path / "model", tmp_path / "probed", probe_windows=4, **shared).profile
    log = (tmp_path / "probed" / "log.txt").read_text()
    assert len(parts(plain)) == 6
    for part in parts(plain):
        line = next(line for line in log.splitlines() if f"probe {part.probed} at bond {part.bond}:" in line)
        measured = float(line.split(" predicted, ")[1].split()[0])
        factor = min(50.0, max(0.2, measured / part.predicted))
        for name in part.members:
            before, after = (float(p[name].cut_losses()[part.bond]) for p in (plain, probed))
            assert after == pytest.approx(factor * before, rel=0.05)


def test_hybrids_are_chosen_where_few_outputs_carry_the_loss() -> None:
    steep = tuple(torch.logspace(0, -4, 65, dtype=torch.float64).tolist())
    flat = tuple(1 - k / 256 for k in range(65))
    matrices = tuple(
        MatrixProfile(
            f"blocks.0.{name}", 0, 256, 256, torch.ones(256, dtype=torch.float64), 1.0, {64: 1.0, 128: 1.2}, left
        )
        for name, left in {"q": steep, "v": flat, "o": ()}.items()
    )
    found = planned(
        Profile("test", 4, 0, "loss", 1000, matrices), Recipe.from_settings({"bytes": 0.09, "bits": [2, 3]})
    )
    q, v, o = found.matrices
    assert q.base is not None
    assert q.grid == Grid(4, 64)
    assert v.base is None
    assert o.base is None
    assert found.bytes(4) <= 0.09 * 4 * 3 * 256 * 256
    q.check()
    narrow = planned(
        Profile("test", 4, 0, "loss", 1000, matrices),
        Recipe.from_settings({"bytes": 0.09, "bits": [2, 3], "bounds": {"*.q": [0, 0.99]}}),
    )
    assert narrow.matrices[0].base is None
