"""Decide, before any weight is read, what becomes of every matrix: its sites, bonds and cost, or that it stays dense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bondsmith.recipe import Recipe, RecipeError, parse_bytes
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites, parse_sites

PIVOT_BYTES = 4  # a gauged network stores the order of its output rows as int32
HEADER_BYTES = 160  # of a safetensors file per tensor: name, dtype, shape, offsets


class PlanError(ValueError):
    """The plan asked for is impossible; the message names the matrix, the numbers and the remedy."""


@dataclass(frozen=True)
class MatrixPlan:
    """What becomes of one matrix: a network (`sites` and `bonds`) or the dense matrix (`sites` is None), rounded to a `grid` or not.

    `parameters` are stored scalars, `multiply_adds` per token; a dense matrix has O * I of both.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    sites: Sites | None = None
    bonds: tuple[int, ...] = ()
    gauge: bool = False
    grid: Grid | None = None

    @property
    def dense_parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        return self.dense_parameters if self.sites is None else self.sites.parameters(self.bonds, self.gauge)

    @property
    def multiply_adds(self) -> int:
        if self.sites is None:
            return self.dense_parameters
        return self.sites.multiply_adds(self.bonds, self.gauge)

    @property
    def extra_bytes(self) -> int:
        """Bytes that are no parameters: the order of rows of a gauged network and the file's tensor headers."""
        cores = 1 if self.sites is None else self.sites.n
        pivots = self.out_features * PIVOT_BYTES + HEADER_BYTES if self.gauge else 0
        return cores * HEADER_BYTES + pivots

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `plan.json`."""
        entry: dict[str, Any] = {"name": self.name, "block": self.block, "shape": [self.out_features, self.in_features]}
        if self.sites is not None:
            legs = zip(self.sites.out_legs, self.sites.in_legs, strict=True)
            entry |= {"sites": [list(pair) for pair in legs], "bonds": list(self.bonds), "gauge": self.gauge}
        if self.grid is not None:
            entry["grid"] = self.grid.to_json()
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MatrixPlan:
        """Returns the matrix of an entry of `plan.json`."""
        pairs = entry.get("sites")
        sites = Sites(tuple(o for o, _ in pairs), tuple(i for _, i in pairs)) if pairs else None
        rows, columns = entry["shape"]
        bonds = tuple(entry.get("bonds", ()))
        grid = Grid(**entry["grid"]) if entry.get("grid") else None
        return cls(entry["name"], entry["block"], rows, columns, sites, bonds, bool(entry.get("gauge", False)), grid)


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model: one entry per matrix in depth order, and what is not a matrix."""

    matrices: tuple[MatrixPlan, ...]
    other_parameters: int

    @property
    def parameters(self) -> int:
        """Stored scalars of the compressed model, tied ones once."""
        return self.other_parameters + sum(m.parameters for m in self.matrices)

    @property
    def keep(self) -> float:
        """Share of the matrices' parameters that is kept."""
        return sum(m.parameters for m in self.matrices) / sum(m.dense_parameters for m in self.matrices)

    def bytes(self, itemsize: int) -> int:
        """Size of the weight files, indices and headers included (headers estimated from above)."""
        return (
            self.parameters * itemsize + sum(m.extra_bytes for m in self.matrices) + len(self.matrices) * HEADER_BYTES
        )

    def block(self, index: int) -> list[MatrixPlan]:
        """Returns the matrices of one block."""
        return [m for m in self.matrices if m.block == index]

    def save(self, path: Path) -> None:
        """Writes `plan.json`."""
        rows = ",\n".join("  " + json.dumps(m.to_json()) for m in self.matrices)
        head = f'{{"format": 1, "other_parameters": {self.other_parameters}, "matrices": [\n'
        path.write_text(f"{head}{rows}\n]}}\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Returns the plan of a `plan.json`."""
        content = json.loads(path.read_text())
        return cls(tuple(MatrixPlan.from_json(m) for m in content["matrices"]), content["other_parameters"])

    def __str__(self) -> str:
        dense = sum(m.sites is None for m in self.matrices)
        before = sum(m.dense_parameters for m in self.matrices)
        work = sum(m.multiply_adds for m in self.matrices) / before
        return (
            f"{len(self.matrices)} matrices ({dense} stay dense): keep {self.keep:.3f}, "
            f"{self.parameters / 1e6:.1f} M parameters of {(self.other_parameters + before) / 1e6:.1f} M, "
            f"{work:.2f} of the matrices' multiply-adds"
        )


def uniform_plan(
    shapes: Mapping[str, tuple[int, int, int]], other_parameters: int, recipe: Recipe, itemsize: int
) -> Plan:
    """Returns the plan in which every matrix keeps the same share of its parameters.

    Args:
        shapes: matrix name -> (block, out features, in features), in depth order.
        other_parameters: stored scalars outside these matrices.
        itemsize: bytes per stored scalar.

    Raises:
        PlanError: a site shape does not fit a matrix, or the share or size is out of reach.
    """
    _check_patterns(shapes, recipe)
    if recipe.keep is not None:
        return _plan(shapes, other_parameters, recipe, recipe.keep)
    total = other_parameters + sum(o * i for _, o, i in shapes.values())
    budget = parse_bytes(str(recipe.bytes), total)
    if _plan(shapes, other_parameters, recipe, 1.0).bytes(itemsize) <= budget:
        return _plan(shapes, other_parameters, recipe, 1.0)
    return _largest_within(shapes, other_parameters, recipe, itemsize, budget)


def _largest_within(
    shapes: Mapping[str, tuple[int, int, int]], other: int, recipe: Recipe, itemsize: int, budget: int
) -> Plan:
    low, high, best = 0.0, 1.0, None
    for _ in range(24):
        keep = (low + high) / 2
        try:
            plan = _plan(shapes, other, recipe, keep)
        except PlanError:
            low = keep
            continue
        if plan.bytes(itemsize) <= budget:
            best, low = plan, keep
        else:
            high = keep
    if best is None:
        floor = other * itemsize
        raise PlanError(
            f"bytes: {recipe.bytes} is {budget / 1e6:.1f} MB, but embedding, head and norms alone take {floor / 1e6:.1f} MB "
            f"at {itemsize} bytes a parameter; give a larger size or a smaller dtype"
        )
    return best


def _check_patterns(shapes: Mapping[str, tuple[int, int, int]], recipe: Recipe) -> None:
    for pattern in recipe.keep_dense:
        if not any(fnmatch(name, pattern) for name in shapes):
            raise RecipeError(f"keep_dense: {pattern!r} matches no matrix; names look like {next(iter(shapes))!r}")


def _plan(shapes: Mapping[str, tuple[int, int, int]], other: int, recipe: Recipe, keep: float) -> Plan:
    return Plan(tuple(_matrix(name, *dims, recipe, keep) for name, dims in shapes.items()), other)


def _matrix(name: str, block: int, rows: int, columns: int, recipe: Recipe, keep: float) -> MatrixPlan:
    dense = MatrixPlan(name, block, rows, columns)
    if any(fnmatch(name, pattern) for pattern in recipe.keep_dense):
        return dense
    try:
        sites = parse_sites(recipe.sites, rows, columns)
        gauge = recipe.gauge and sites.is_matrix_cut
        bonds = sites.bonds_within(int(keep * rows * columns), gauge)
    except ValueError as error:
        raise PlanError(f"{name}: {rows} x {columns} at keep {keep:g}: {error}") from error
    network = MatrixPlan(name, block, rows, columns, sites, bonds, gauge)
    return network if network.parameters < dense.parameters else dense
