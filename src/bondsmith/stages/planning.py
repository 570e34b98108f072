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
from bondsmith.stages.knapsack import Way
from bondsmith.stages.matrix_plan import HEADER_BYTES, MatrixPlan, PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.profile import BondProfile, MatrixProfile, Profile, Reduced, TableProfile
from bondsmith.stages.solver import InfeasibleError, choose
from bondsmith.stages.uniform import check_patterns
from bondsmith.stages.wording import size
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import ROUND_TO, Sites

# bits -> what error compensation and fitted scales leave of an even error over a step; how much more of it the cores of a cut make
_RESIDUE = {8: (1.0, 6.0), 4: (0.55, 4.0), 3: (0.52, 2.0), 2: (0.36, 1.0)}
_CORES = 0.02  # of what a network beside a rounded matrix takes out, its own four-bit cores leave that much
HYBRID_BITS = (0.06, 0.12, 0.25, 0.5)  # a weight that such a network may have
HYBRID_BASE = 3  # bits of the matrix, at most: at four a network gains a few per cent and halves the speed of decoding
LEVELS = 64  # bonds tried per matrix, at most
ROUNDED_LEVELS = 12  # of them with rounded cores


def candidates(matrix: MatrixPlan, recipe: Recipe, largest_beside: int = 0) -> list[MatrixPlan]:
    """Returns what may become of a matrix, within the bounds that the recipe sets for it; the largest first.

    Bonds are multiples of 8 on a grid of at most 64; a rounded candidate exists for each of the recipe's bits, and hybrids of up to
    three bits with a network of bond `largest_beside` at most, unless the bounds want the matrix as it is.
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
    coarse = [c for i, c in enumerate(allowed) if c.sites is None or i % max(1, len(allowed) // ROUNDED_LEVELS) == 0]
    found = [replace(c, grid=grid) for grid in recipe.grids for c in (allowed if grid is None else coarse)]
    return found if high < 1 or low == 1 else found + _hybrids(matrix, recipe, min(largest_beside, full // 2))


def _hybrids(matrix: MatrixPlan, recipe: Recipe, largest: int) -> list[MatrixPlan]:
    """Returns few-bit matrices with a small network of four-bit cores on what they get wrong."""
    (rows, columns), cores = matrix.shape, Grid(4, recipe.group)
    sizes = [bits * rows * columns / (4 * (rows + columns)) for bits in HYBRID_BITS]
    bonds = {ROUND_TO * round(size / ROUND_TO) for size in sizes}
    cut = Sites((rows, 1), (1, columns))
    return [
        replace(matrix, sites=cut, bonds=(bond,), gauge=False, grid=cores, base=grid)
        for grid in recipe.grids
        if grid is not None and grid.bits <= HYBRID_BASE
        for bond in sorted(bonds)
        if 0 < bond <= largest
    ]


def planned(profile: Profile, recipe: Recipe) -> Plan:
    """Returns the plan with the least predicted loss within the budgets, or the smallest one within a tolerated loss.

    With a blank profile every loss is zero and only the budgets count: a check before any work.

    Raises:
        PlanError: no choice meets the budgets; says how far one can go and what holds it up.
        RecipeError: a pattern matches no matrix.
    """
    shapes = {m.name: (m.block, m.out_features, m.in_features) for m in profile.matrices}
    check_patterns([*shapes, *(t.name for t in profile.tables)], recipe)
    for pattern in recipe.bounds:
        if not any(fnmatch(name, pattern) for name in shapes):
            raise RecipeError(f"bounds: {pattern!r} matches no matrix; names look like {next(iter(shapes))!r}")
    entries = {name: MatrixPlan(name, *dims, tokens=profile.shares.get(name, 1.0)) for name, dims in shapes.items()}
    tables = [MatrixPlan(t.name, -1, t.rows, t.columns) for t in profile.tables] if recipe.rounds else []
    options = _options(entries, recipe, profile)
    options += [_table(t, plan, recipe) for t, plan in zip(profile.tables, tables, strict=False)]
    budgets = _budgets(list(entries.values()), tables, profile, recipe)
    minimise = "bytes" if "loss" in budgets else "loss"
    try:
        choice = choose([[option.way(profile.itemsize) for option in item] for item in options], budgets, minimise)
    except InfeasibleError as error:
        raise PlanError(_out_of_reach(error, tables, profile)) from error
    picked: dict[str, MatrixPlan] = {}
    for item, way, indices in zip(options, choice.ways, choice.candidates, strict=True):
        option = item[way]
        for own, losses, index in zip(option.members, option.losses, indices, strict=True):
            last = own is option.members[-1]
            picked[own[0].name] = replace(own[index], loss=float(losses[index]) + (option.loss if last else 0.0))
    loss = math.fsum(p.loss or 0.0 for p in picked.values())
    matrices, rounded = tuple(picked[n] for n in entries), tuple(picked[t.name] for t in tables)
    known = profile.metric == "loss"
    if not known:
        matrices, rounded = (tuple(replace(m, loss=None) for m in some) for some in (matrices, rounded))
    known_loss = loss if known else None
    return Plan(matrices, profile.other_parameters, rounded, known_loss, choice.gap, itemsize=profile.itemsize)


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


def _options(entries: Mapping[str, MatrixPlan], recipe: Recipe, profile: Profile) -> list[list[_Option]]:
    """Returns the ways of every item: of matrices on their own, of the matrices of an MLP together."""
    curves = {m.name: m for m in profile.matrices}
    bonds = {name: b for b in profile.bonds if recipe.channels for name in (*b.writers, b.reader)}
    found, done = [], set()
    for name in entries:
        if name in done:
            continue
        names = (*bonds[name].writers, bonds[name].reader) if name in bonds else (name,)
        done |= set(names)
        ways = [_whole([entries[n] for n in names], curves, recipe)]
        if name in bonds and not any(recipe.spares(n) for n in names):
            ways += [_reduced(entries, level, bonds[name], recipe) for level in bonds[name].levels]
        useful = [way for way in ways if all(way.members)]
        if not useful:
            low, high = _bounds(name, recipe)
            raise PlanError(f"{name}: no bond keeps between {low:g} and {high:g} of its parameters; widen its bounds")
        found.append(useful)
    return found


def _table(profile: TableProfile, whole: MatrixPlan, recipe: Recipe) -> list[_Option]:
    """Returns the ways of an embedding or a head: one, with a candidate for each width."""
    own = [whole] if recipe.spares(whole.name) else [replace(whole, grid=grid) for grid in recipe.grids]
    losses = [0.0 if c.grid is None else rounding_loss(profile.rounding, 1.0, c.grid) for c in own]
    return [_Option((own,), (np.array(losses),))]


def _whole(entries: Sequence[MatrixPlan], curves: Mapping[str, MatrixProfile], recipe: Recipe) -> _Option:
    """Returns the way in which no channel is dropped."""
    members = tuple(candidates(m, recipe, len(curves[m.name].left) - 1) for m in entries)
    losses = tuple(predicted(curves[m.name], own) for m, own in zip(entries, members, strict=True))
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
        members.append(candidates(small, recipe, len(curve.left) - 1))
        losses.append(predicted(curve, members[-1]))
    return _Option(tuple(members), tuple(losses), level.loss)


def predicted(profile: MatrixProfile, options: Sequence[MatrixPlan]) -> NDArray[np.float64]:
    """Returns the predicted loss of every candidate: of the cut, and of rounding what is left."""
    losses = profile.cut_losses().numpy()
    full = len(losses) - 1

    def loss(c: MatrixPlan) -> float:
        if c.base is not None:
            left = profile.left[c.bonds[0]]
            return rounding_loss(profile.rounding, profile.unit, c.base) * (left + _CORES * (1 - left))
        bond = full if c.sites is None else c.bonds[0]
        cut = 0.0 if bond == full else float(losses[bond])
        return cut + (0.0 if c.grid is None else rounding_loss(profile.rounding, profile.unit, c.grid, bond / full))

    return np.array([loss(c) for c in options])


def rounding_loss(rounding: Mapping[int, float], unit: float, grid: Grid, share: float = 1.0) -> float:
    """Returns the predicted loss of rounding a matrix, or the cores of its cut at `share` of the full bond, in nats a token.

    Cores cost more than the matrix that they make, the more so the fewer the bits that could be lost; the factors were measured, see
    docs/bits.md. 0 where nothing is known.
    """
    left, spread = _RESIDUE[grid.bits]
    return unit * rounding.get(grid.group, 0.0) / (2**grid.bits - 1) ** 2 * left * (1 + spread * (1 - share) ** 0.5)


def _amounts(options: Sequence[MatrixPlan], loss: NDArray[np.float64], itemsize: int) -> dict[str, NDArray[np.float64]]:
    inside = options[0].block >= 0
    return {
        "loss": loss,
        "parameters": np.array([c.parameters if inside else 0 for c in options], dtype=np.float64),
        "bytes": np.array([c.bytes(itemsize) for c in options], dtype=np.float64),
        "multiply_adds": np.array([c.multiply_adds if inside else 0 for c in options], dtype=np.float64),
    }


def _budgets(
    entries: Sequence[MatrixPlan], tables: Sequence[MatrixPlan], profile: Profile, recipe: Recipe
) -> dict[str, float]:
    """Returns quantity -> budget of the choices, what no choice changes taken off."""
    dense = sum(m.dense_parameters for m in entries)
    spared = sum(m.dense_parameters for m in entries if recipe.spares(m.name))
    found: dict[str, float] = {}
    if recipe.keep is not None:
        found["parameters"] = recipe.keep * (dense - spared) + spared
    if recipe.multiply_adds is not None:
        found["multiply_adds"] = recipe.multiply_adds * sum(m.dense_multiply_adds for m in entries)
    if recipe.bytes is not None:
        fixed = _fixed_bytes(tables, profile)
        found["bytes"] = parse_bytes(recipe.bytes, profile.other_parameters + dense) - fixed
    if recipe.loss is not None:
        found["loss"] = recipe.loss
    return found


def _fixed_bytes(tables: Sequence[MatrixPlan], profile: Profile) -> int:
    """Returns the bytes of what no choice changes: norms and biases, and embedding and head where they are not rounded."""
    rest = profile.other_parameters - sum(t.dense_parameters for t in tables)
    return rest * profile.itemsize + len(profile.matrices) * HEADER_BYTES


def _out_of_reach(error: InfeasibleError, tables: Sequence[MatrixPlan], profile: Profile) -> str:
    if error.beside:
        fixed = _fixed_bytes(tables, profile) if error.quantity == "bytes" else 0
        return (
            f"{error.quantity}: {_amount(error.quantity, error.budget + fixed)} cannot be met together with the budget of "
            f"{' and '.join(error.beside)}: within that the least is {_amount(error.quantity, error.least + fixed)}; "
            "loosen one of them"
        )
    if error.quantity == "bytes":
        fixed = _fixed_bytes(tables, profile)
        what = "norms and biases" if tables else "embedding, head and norms"
        return (
            f"bytes: {size(error.budget + fixed)} is out of reach, the smallest plan has {size(error.least + fixed)}, "
            f"{size(fixed)} of them {what} at {profile.itemsize} bytes a parameter; give a larger size, fewer bits, or looser bounds"
        )
    if error.quantity == "loss":
        return f"loss: even with everything kept the predicted loss is {error.least:.4g} nats, over {error.budget:g}"
    return (
        f"{error.quantity}: a budget of {error.budget:,.0f} is out of reach, the least with these bounds and budgets is "
        f"{error.least:,.0f}; loosen the other budgets, bounds or keep_dense"
    )


def _amount(quantity: str, value: float) -> str:
    if quantity == "loss":
        return f"{value:.4g} nats"
    return size(value) if quantity == "bytes" else f"{value:,.0f}"


def _bounds(name: str, recipe: Recipe) -> tuple[float, float]:
    """Returns the least and the largest share of its parameters that a matrix may keep; the last matching pattern decides."""
    matching = [limits for pattern, limits in recipe.bounds.items() if fnmatch(name, pattern)]
    return matching[-1] if matching else (0.0, 1.0)
