"""Plan a model: the bonds (and bits) of every matrix, chosen in one solve from the fast profile.

Every matrix has a list of candidates: dense, and cut at a grid of bonds, each at full precision or rounded. The solver picks one for each
so that the sum of the predicted losses is least within the budgets, or the file smallest within a tolerated loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import numpy as np
from numpy.typing import NDArray

from bondsmith.recipe import UNROUNDED, Recipe, RecipeError, parse_bytes
from bondsmith.stages.plan import MatrixPlan, Plan, PlanError, check_patterns
from bondsmith.stages.profile import MatrixProfile, Profile
from bondsmith.stages.solver import Choice, InfeasibleError, choose
from bondsmith.tensor.sites import ROUND_TO, Sites

Shapes = Mapping[str, tuple[int, int, int]]
LEVELS = 64  # bonds tried per matrix, at most


@dataclass(frozen=True)
class Tables:
    """Embedding and head as the planner sees them: what rounding each would cost, by bits."""

    plans: tuple[MatrixPlan, ...]
    losses: Mapping[str, Mapping[int, float]]


NO_TABLES = Tables((), {})


def candidates(matrix: MatrixPlan, recipe: Recipe) -> list[MatrixPlan]:
    """Returns what may become of a matrix, within the bounds that the recipe sets for it; the largest first.

    Bonds are multiples of 8 on a grid of at most 64; a rounded candidate exists for each of the recipe's bits.
    """
    if any(fnmatch(matrix.name, pattern) for pattern in recipe.keep_dense):
        return [matrix]
    cut = Sites((matrix.out_features, 1), (1, matrix.in_features))
    full = min(matrix.out_features, matrix.in_features)
    step = ROUND_TO * max(1, -(-full // (ROUND_TO * LEVELS)))
    bonds = sorted({*range(step, full, step), 1 if full <= step else step}, reverse=True)
    networks = [replace(matrix, sites=cut, bonds=(bond,), gauge=recipe.gauge) for bond in bonds if bond < full]
    useful = [matrix, *(n for n in networks if n.parameters < matrix.dense_parameters)]
    low, high = _bounds(matrix.name, recipe)
    allowed = [c for c in useful if low <= c.parameters / matrix.dense_parameters <= high]
    if not allowed:
        raise PlanError(
            f"{matrix.name}: no bond keeps between {low:g} and {high:g} of its parameters; widen its bounds"
        )
    return [replace(c, grid=grid) for grid in recipe.grids for c in allowed]


def check_budget(
    shapes: Shapes, other_parameters: int, recipe: Recipe, itemsize: int, tables: Tables = NO_TABLES
) -> Plan:
    """Returns some plan within the budgets; PlanError, before any work, if there is none."""
    check_patterns(shapes, recipe)
    for pattern in recipe.bounds:
        if not any(fnmatch(name, pattern) for name in shapes):
            raise RecipeError(f"bounds: {pattern!r} matches no matrix; names look like {next(iter(shapes))!r}")
    return _solve(shapes, other_parameters, recipe, itemsize, None, tables)


def planned(
    profile: Profile, shapes: Shapes, other_parameters: int, recipe: Recipe, itemsize: int, tables: Tables = NO_TABLES
) -> Plan:
    """Returns the plan with the least predicted loss within the budgets, or the smallest one within a tolerated loss.

    Raises:
        PlanError: no choice meets the budgets; says how far one can go and what holds it up.
    """
    return _solve(shapes, other_parameters, recipe, itemsize, profile, tables)


def _solve(shapes: Shapes, other: int, recipe: Recipe, itemsize: int, profile: Profile | None, tables: Tables) -> Plan:
    """Returns the plan; without a profile every loss is zero, and only the budgets are looked at."""
    entries = [MatrixPlan(name, *dims) for name, dims in shapes.items()]
    options = [candidates(m, recipe) for m in entries] + [_table_options(t, recipe) for t in tables.plans]
    curves = {m.name: m for m in profile.matrices} if profile else {}
    items = []
    for own in options:
        name = own[0].name
        if name in tables.losses:
            loss = np.array([tables.losses[name].get(c.grid.bits if c.grid else UNROUNDED, 0.0) for c in own])
        else:
            loss = predicted(curves[name], own) if profile else np.zeros(len(own))
        items.append(_amounts(own, loss, itemsize))
    budgets = _budgets(entries, tables, other, recipe, itemsize)
    minimise = "bytes" if "loss" in budgets else "loss"
    try:
        choice = choose(items, budgets, minimise)
    except InfeasibleError as error:
        raise PlanError(_out_of_reach(error, other, itemsize, tables, profile is None)) from error
    return _plan(options, items, choice, len(entries), other)


def predicted(profile: MatrixProfile, options: Sequence[MatrixPlan]) -> NDArray[np.float64]:
    """Returns the predicted loss of every candidate: of the cut, and of rounding what is left."""
    losses = profile.cut_losses().numpy()
    full = len(losses) - 1
    bonds = np.array([c.bonds[0] if c.sites is not None else full for c in options])
    cut = np.where(bonds < full, losses[bonds], 0.0)
    return cut + np.array([rounding_loss(profile, c) for c in options])


def rounding_loss(profile: MatrixProfile, candidate: MatrixPlan) -> float:
    """Returns the predicted loss of rounding the stored numbers of a candidate, in nats a token."""
    grid = candidate.grid
    if grid is None:
        return 0.0
    return profile.unit * profile.rounding[grid.group] / (2**grid.bits - 1) ** 2


def _table_options(table: MatrixPlan, recipe: Recipe) -> list[MatrixPlan]:
    return [replace(table, grid=grid) for grid in recipe.grids]


def _amounts(options: Sequence[MatrixPlan], loss: NDArray[np.float64], itemsize: int) -> dict[str, NDArray[np.float64]]:
    inside = options[0].block >= 0
    return {
        "loss": loss,
        "parameters": np.array([c.parameters if inside else 0 for c in options], dtype=np.float64),
        "bytes": np.array([c.bytes(itemsize) for c in options], dtype=np.float64),
        "multiply_adds": np.array([c.multiply_adds if inside else 0 for c in options], dtype=np.float64),
    }


def _budgets(
    entries: Sequence[MatrixPlan], tables: Tables, other: int, recipe: Recipe, itemsize: int
) -> dict[str, float]:
    """Returns quantity -> budget of the choices, what no choice changes taken off."""
    dense = sum(m.dense_parameters for m in entries)
    spared = sum(m.dense_parameters for m in entries if any(fnmatch(m.name, p) for p in recipe.keep_dense))
    found: dict[str, float] = {}
    if recipe.keep is not None:
        found["parameters"] = recipe.keep * (dense - spared) + spared
    if recipe.multiply_adds is not None:
        found["multiply_adds"] = recipe.multiply_adds * dense
    if recipe.bytes is not None:
        fixed = Plan((), other, tuple(tables.plans)).bytes(itemsize) - sum(t.bytes(itemsize) for t in tables.plans)
        found["bytes"] = parse_bytes(recipe.bytes, other + dense) - fixed
    if recipe.loss is not None:
        found["loss"] = recipe.loss
    return found


def _out_of_reach(error: InfeasibleError, other: int, itemsize: int, tables: Tables, before: bool) -> str:
    if error.quantity == "bytes":
        fixed = other * itemsize if not tables.plans else 0
        holds = (
            f"; embedding, head and norms alone take {fixed / 1e6:.1f} MB at {itemsize} bytes a parameter"
            if fixed
            else ""
        )
        return (
            f"bytes: {(error.budget + fixed) / 1e6:.1f} MB is out of reach, the smallest plan has {(error.least + fixed) / 1e6:.1f} MB"
            f"{holds}; give a larger size, fewer bits (bits: [8, 4, 3, 2]), or looser bounds"
        )
    if error.quantity == "loss":
        return f"loss: even with everything kept the predicted loss is {error.least:.4g} nats, over {error.budget:g}"
    return (
        f"{error.quantity}: a budget of {error.budget:,.0f} is out of reach, the least with these bounds and budgets is "
        f"{error.least:,.0f}; loosen the other budgets, bounds or keep_dense"
    )


def _bounds(name: str, recipe: Recipe) -> tuple[float, float]:
    """Returns the least and the largest share of its parameters that a matrix may keep; the last matching pattern decides."""
    matching = [limits for pattern, limits in recipe.bounds.items() if fnmatch(name, pattern)]
    return matching[-1] if matching else (0.0, 1.0)


def _plan(
    options: Sequence[Sequence[MatrixPlan]],
    items: Sequence[Mapping[str, NDArray[np.float64]]],
    choice: Choice,
    matrices: int,
    other: int,
) -> Plan:
    picked = [
        replace(own[i], loss=float(item["loss"][i]))
        for own, item, i in zip(options, items, choice.indices, strict=True)
    ]
    loss = math.fsum(p.loss or 0.0 for p in picked)
    return Plan(tuple(picked[:matrices]), other, tuple(picked[matrices:]), loss, choice.gap)
