"""What becomes of one matrix: sites, bonds, bits and cost, or that it stays; an entry of `plan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites

PIVOT_BYTES = 4  # a gauged network stores the order of its output rows as int32
HEADER_BYTES = 192  # of a safetensors file per tensor: name, dtype, shape, offsets
KEYS = ("name", "block", "shape", "sites", "bonds", "gauge", "rows", "columns", "grid", "base", "loss", "tokens")


class PlanError(ValueError):
    """The plan asked for is impossible; the message names the matrix, the numbers and the remedy."""


@dataclass(frozen=True)
class MatrixPlan:
    """What becomes of one matrix: a network (`sites` and `bonds`) or the dense matrix (`sites` is None), rounded to a `grid` or not.

    `parameters` are stored scalars, `multiply_adds` per token of the model; a dense matrix has O * I of both. `loss` is the
    predicted loss in nats a token, where there is a prediction. Embedding and head have `block` -1. Where hidden channels are
    dropped, `kept_rows` (of what writes them) or `kept_columns` (of what reads them) says how many stay, and `sites` belong to
    the smaller matrix. With a `base` the matrix is a hybrid: all of it rounded to that grid, and the network (a matrix cut
    without gauge) added to it. `tokens` is the share of the tokens that reach it: less than 1 in experts of a mixture.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    sites: Sites | None = None
    bonds: tuple[int, ...] = ()
    gauge: bool = False
    grid: Grid | None = None
    loss: float | None = None
    kept_rows: int | None = None
    kept_columns: int | None = None
    base: Grid | None = None
    tokens: float = 1.0

    @property
    def rows(self) -> int:
        return self.out_features if self.kept_rows is None else self.kept_rows

    @property
    def columns(self) -> int:
        return self.in_features if self.kept_columns is None else self.kept_columns

    @property
    def dense_parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def fitted(self) -> bool:
        """True where numbers change: a network, rounded ones, or a matrix that makes up for channels it no longer reads."""
        return self.sites is not None or self.grid is not None or self.kept_columns is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of what is left."""
        return self.rows, self.columns

    @property
    def parameters(self) -> int:
        dense = self.rows * self.columns
        if self.sites is None:
            return dense
        return self.sites.parameters(self.bonds, self.gauge) + (0 if self.base is None else dense)

    @property
    def multiply_adds(self) -> int:
        once = self.rows * self.columns
        if self.sites is not None:
            once = self.sites.multiply_adds(self.bonds, self.gauge) + (0 if self.base is None else once)
        return round(self.tokens * once)

    @property
    def dense_multiply_adds(self) -> int:
        return round(self.tokens * self.dense_parameters)

    def bytes(self, itemsize: int) -> int:
        """Bytes in the weight file at `itemsize` bytes a number that is not rounded: numbers, scales, orders of rows, headers."""
        headers = len(self.stored_shapes()) * _tensors(self.grid) + (1 if self.gauge else 0)
        headers += 0 if self.base is None else _tensors(self.base)
        return self.tensor_bytes(itemsize) + headers * HEADER_BYTES

    def tensor_bytes(self, itemsize: int) -> int:
        """The same without headers."""
        base = 0 if self.base is None else self.base.packed_bytes(*self.shape)
        pivots = self.rows * PIVOT_BYTES if self.gauge else 0
        shapes = self.stored_shapes()
        stored = sum(r * c * itemsize if self.grid is None else self.grid.packed_bytes(r, c) for r, c in shapes)
        return stored + pivots + base

    @property
    def rounding(self) -> str | None:
        """How the numbers are rounded, for people: `int4-g64-asym`, of a hybrid `int2-g64-asym + int4-g64`; None where they are not."""
        return " + ".join(str(g) for g in (self.base, self.grid) if g is not None) or None

    def stored_shapes(self) -> list[tuple[int, int]]:
        """Returns the (rows, columns) of every stored matrix: of the dense one, or of the cores as linear layers (the base apart)."""
        if self.sites is None:
            return [self.shape]
        from_right = self.sites.sweeps_from_right(self.bonds)
        cores = self.sites.core_shapes(self.bonds)
        shapes = [(a * o, i * b) if from_right else (b * o, i * a) for a, o, i, b in cores]
        if self.gauge:
            shapes[:-1] = [(a * o * i - b, b) for a, o, i, b in cores[:-1]]
        return shapes

    def check(self) -> None:
        """Raises PlanError unless sites, bonds and grid go with the shape."""
        for what, kept, features in (
            ("rows", self.kept_rows, self.out_features),
            ("columns", self.kept_columns, self.in_features),
        ):
            if kept is not None and not (isinstance(kept, int) and 1 <= kept <= features):
                raise PlanError(f"{self.name}: {kept} of {features} {what} cannot be kept")
        if self.base is not None and (self.sites is None or not self.sites.is_matrix_cut or self.gauge):
            raise PlanError(f"{self.name}: a base goes with a matrix cut without gauge only")
        if self.sites is None:
            return
        if (self.sites.out_features, self.sites.in_features) != self.shape:
            raise PlanError(
                f"{self.name}: sites {self.sites} multiply to {self.sites.out_features} x {self.sites.in_features}, "
                f"the matrix is {self.rows} x {self.columns}"
            )
        try:
            clipped = self.sites.clip(self.bonds)
            self.sites.parameters(clipped, self.gauge)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{self.name}: {error}") from error
        if clipped != tuple(self.bonds):
            raise PlanError(f"{self.name}: bonds {list(self.bonds)} are over the exact ones, {list(clipped)}")

    def check_table(self) -> None:
        """Raises PlanError unless the entry says of an embedding or head what can be carried out: a grid, or that it stays."""
        if self.sites is not None or self.base is not None or self.kept_rows or self.kept_columns:
            raise PlanError(f"{self.name}: embedding and head can be rounded (`grid`), not cut")

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `plan.json`."""
        entry: dict[str, Any] = {"name": self.name, "block": self.block, "shape": [self.out_features, self.in_features]}
        if self.sites is not None:
            legs = zip(self.sites.out_legs, self.sites.in_legs, strict=True)
            entry |= {"sites": [list(pair) for pair in legs], "bonds": list(self.bonds), "gauge": self.gauge}
        if self.kept_rows is not None:
            entry["rows"] = self.kept_rows
        if self.kept_columns is not None:
            entry["columns"] = self.kept_columns
        if self.grid is not None:
            entry["grid"] = self.grid.to_json()
        if self.base is not None:
            entry["base"] = self.base.to_json()
        if self.loss is not None:
            entry["loss"] = float(f"{self.loss:.6g}")
        if self.tokens != 1:
            entry["tokens"] = self.tokens
        return entry

    def network(self) -> dict[str, Any]:
        """Returns the entry in `networks` of the configuration; empty where the matrix keeps its shape and is no network."""
        entry: dict[str, Any] = {}
        if self.sites is not None:
            legs = zip(self.sites.out_legs, self.sites.in_legs, strict=True)
            entry = {"sites": [list(pair) for pair in legs], "bonds": list(self.bonds), "gauge": self.gauge}
        if self.base is not None:
            entry["hybrid"] = True
        if self.shape != (self.out_features, self.in_features):
            entry["shape"] = list(self.shape)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MatrixPlan:
        """Returns the matrix of an entry of `plan.json`."""
        pairs, gauge = entry.get("sites"), entry.get("gauge", False)
        if not isinstance(gauge, bool):
            raise ValueError(f"gauge: {gauge!r} is neither true nor false")
        if not pairs and (entry.get("bonds") or gauge):
            raise ValueError("bonds and a gauge go with sites, like [[rows, 1], [1, columns]] for a matrix cut")
        sites = Sites(tuple(o for o, _ in pairs), tuple(i for _, i in pairs)) if pairs else None
        rows, columns = entry["shape"]
        return cls(
            entry["name"],
            entry["block"],
            rows,
            columns,
            sites,
            tuple(entry.get("bonds", ())),
            gauge,
            Grid(**entry["grid"]) if entry.get("grid") else None,
            entry.get("loss"),
            entry.get("rows"),
            entry.get("columns"),
            Grid(**entry["base"]) if entry.get("base") else None,
            entry.get("tokens", 1.0),
        )


def _tensors(grid: Grid | None) -> int:
    """Tensors in the file of one stored matrix."""
    return 1 if grid is None else 2 if grid.symmetric else 3
