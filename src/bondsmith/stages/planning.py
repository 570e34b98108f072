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

from bondsmith.recipe import Recipe, RecipeError, parse_bytes
from bondsmith.stages.plan import MatrixPlan, Plan, PlanError, check_patterns
from bondsmith.stages.profile import BondProfile, MatrixProfile, Profile, Reduced
from bondsmith.stages.solver import InfeasibleError, Way, choose
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
    if recipe.spares(matrix.name):
        return [matrix]
    rows, columns = matrix.shape
    cut, full = Sites((rows, 1), (1, columns)), min(rows, columns)
    step = ROUND_TO * max(1, -(-full // (ROUND_TO * LEVELS)))
    bonds = sorted({*range(step, full, step), 1 if full <= step else step}, reverse=True)
    networks = [replace(matrix, sites=cut, bonds=(bond,), gauge=recipe.gauge) for bond in bonds if bond < full]
    useful = [matrix, *(n for n in networks if n.parameters < matrix.parameters)]
    low, high = _bounds(matrix.name, recipe)
    allowed = [c for c in useful if low <= c.parameters / matrix.dense_parameters <= high]
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


@dataclass(frozen=True, eq=False)
class _Option:
    """One way for an item: candidates of every member with their amounts, and a loss of its own, counted to the last member."""

    members: tuple[list[MatrixPlan], ...]
    losses: tuple[NDArray[np.float64], ...]
    loss: float = 0.0

    def way(self, itemsize: int) -> Way:
        """Returns what the solver sees of it."""
        pairs = zip(self.members, self.losses, strict=True)
        return Way(tuple(_amounts(own, loss, itemsize) for own, loss in pairs), self.loss)


def _solve(shapes: Shapes, other: int, recipe: Recipe, itemsize: int, profile: Profile | None, tables: Tables) -> Plan:
    """Returns the plan; without a profile every loss is zero, and only the budgets are looked at."""
    entries = {name: MatrixPlan(name, *dims) for name, dims in shapes.items()}
    options = _options(entries, recipe, profile, tables)
    budgets = _budgets(list(entries.values()), tables, other, recipe, itemsize)
    minimise = "bytes" if "loss" in budgets else "loss"
    try:
        choice = choose([[option.way(itemsize) for option in item] for item in options], budgets, minimise)
    except InfeasibleError as error:
        raise PlanError(_out_of_reach(error, other, itemsize, tables)) from error
    picked: dict[str, MatrixPlan] = {}
    for item, way, indices in zip(options, choice.ways, choice.candidates, strict=True):
        option = item[way]
        for own, losses, index in zip(option.members, option.losses, indices, strict=True):
            last = own is option.members[-1]
            picked[own[0].name] = replace(own[index], loss=float(losses[index]) + (option.loss if last else 0.0))
    loss = None if profile is None else math.fsum(p.loss or 0.0 for p in picked.values())
    chosen = [tuple(picked[name] for name in names) for names in (entries, [t.name for t in tables.plans])]
    return Plan(chosen[0], other, chosen[1], loss, choice.gap)


def _options(
    entries: Mapping[str, MatrixPlan], recipe: Recipe, profile: Profile | None, tables: Tables
) -> list[list[_Option]]:
    """Returns the ways of every item: of matrices on their own, of the matrices of an MLP together, of embedding and head."""
    curves = {m.name: m for m in profile.matrices} if profile else {}
    bonds = {name: b for b in (profile.bonds if profile else ()) for name in (*b.writers, b.reader)}
    found, done = [], set()
    for name in entries:
        if name in done:
            continue
        names = (*bonds[name].writers, bonds[name].reader) if name in bonds else (name,)
        done |= set(names)
        ways = [_whole([entries[n] for n in names], curves, recipe)]
        ways += [
            _reduced(entries, level, bonds[name], recipe) for level in (bonds[name].levels if name in bonds else ())
        ]
        useful = [way for way in ways if all(way.members)]
        if not useful:
            low, high = _bounds(name, recipe)
            raise PlanError(f"{name}: no bond keeps between {low:g} and {high:g} of its parameters; widen its bounds")
        found.append(useful)
    for table in tables.plans:
        own = [replace(table, grid=grid) for grid in recipe.grids]
        known = tables.losses.get(table.name, {})
        losses = np.array([known.get(c.grid.bits, 0.0) if c.grid else 0.0 for c in own])
        found.append([_Option((own,), (losses,))])
    return found


def _whole(entries: Sequence[MatrixPlan], curves: Mapping[str, MatrixProfile], recipe: Recipe) -> _Option:
    """Returns the way in which no channel is dropped."""
    members = tuple(candidates(m, recipe) for m in entries)
    losses = tuple(
        predicted(curves[m.name], own) if curves else np.zeros(len(own))
        for m, own in zip(entries, members, strict=True)
    )
    return _Option(members, losses)


def _reduced(entries: Mapping[str, MatrixPlan], level: Reduced, bond: BondProfile, recipe: Recipe) -> _Option:
    """Returns the way in which an MLP has fewer hidden channels."""
    members, losses = [], []
    for curve in level.matrices:
        whole = entries[curve.name]
        reads = curve.name == bond.reader
        small = (
            replace(whole, kept_columns=curve.in_features) if reads else replace(whole, kept_rows=curve.out_features)
        )
        members.append(candidates(small, recipe))
        losses.append(predicted(curve, members[-1]))
    return _Option(tuple(members), tuple(losses), level.loss)


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


def _out_of_reach(error: InfeasibleError, other: int, itemsize: int, tables: Tables) -> str:
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
