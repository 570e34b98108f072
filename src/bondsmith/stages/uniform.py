"""The plan in which every matrix keeps the same share: what plans are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from bondsmith.recipe import Recipe, RecipeError, parse_bytes
from bondsmith.stages.matrix_plan import MatrixPlan, PlanError
from bondsmith.stages.plan import Plan
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import parse_sites


def uniform_plan(
    shapes: Mapping[str, tuple[int, int, int]],
    other_parameters: int,
    recipe: Recipe,
    itemsize: int,
    tables: tuple[MatrixPlan, ...] = (),
) -> Plan:
    """Returns the plan in which every matrix keeps the same share of its parameters, all rounded to the recipe's one grid or not.

    Args:
        shapes: matrix name -> (block, out features, in features), in depth order.
        other_parameters: stored scalars outside these matrices.
        itemsize: bytes per stored scalar.

    Raises:
        PlanError: a site shape does not fit a matrix, or the share or size is out of reach.
    """
    check_patterns([*shapes, *(t.name for t in tables)], recipe)
    if recipe.keep is not None:
        return _plan(shapes, other_parameters, recipe, recipe.keep, tables)
    total = other_parameters + sum(o * i for _, o, i in shapes.values())
    budget = parse_bytes(str(recipe.bytes), total)
    whole = _plan(shapes, other_parameters, recipe, 1.0, tables)
    if whole.bytes(itemsize) <= budget:
        return whole
    low, high, best = 0.0, 1.0, None
    for _ in range(24):
        keep = (low + high) / 2
        try:
            plan = _plan(shapes, other_parameters, recipe, keep, tables)
        except PlanError:
            low = keep
            continue
        if plan.bytes(itemsize) <= budget:
            best, low = plan, keep
        else:
            high = keep
    if best is None:
        floor = Plan((), other_parameters, whole.tables).bytes(itemsize)
        raise PlanError(
            f"bytes: {recipe.bytes} is {budget / 1e6:.1f} MB, but embedding, head and norms alone take {floor / 1e6:.1f} MB "
            f"at {itemsize} bytes a parameter; give a larger size or a smaller dtype"
        )
    return best


def check_patterns(names: Sequence[str], recipe: Recipe) -> None:
    """Raises RecipeError if a pattern of matrices to keep as they are matches none of these."""
    for pattern in recipe.keep_dense:
        if not any(fnmatch(name, pattern) for name in names):
            raise RecipeError(f"keep_dense: {pattern!r} matches no matrix; names look like {names[0]!r}")


def _plan(
    shapes: Mapping[str, tuple[int, int, int]],
    other: int,
    recipe: Recipe,
    keep: float,
    tables: tuple[MatrixPlan, ...],
) -> Plan:
    (grid,) = recipe.grids
    rounded = tuple(t if recipe.spares(t.name) else replace(t, grid=grid) for t in tables) if grid is not None else ()
    return Plan(tuple(_matrix(name, *dims, recipe, keep, grid) for name, dims in shapes.items()), other, rounded)


def _matrix(
    name: str, block: int, rows: int, columns: int, recipe: Recipe, keep: float, grid: Grid | None
) -> MatrixPlan:
    dense = MatrixPlan(name, block, rows, columns, grid=grid)
    if recipe.spares(name):
        return replace(dense, grid=None)
    try:
        sites = parse_sites(recipe.sites, rows, columns)
        gauge = recipe.gauge and sites.is_matrix_cut
        bonds = sites.bonds_within(int(keep * rows * columns), gauge)
    except ValueError as error:
        raise PlanError(f"{name}: {rows} x {columns} at keep {keep:g}: {error}") from error
    network = MatrixPlan(name, block, rows, columns, sites, bonds, gauge, grid)
    return network if network.parameters < dense.parameters else dense
