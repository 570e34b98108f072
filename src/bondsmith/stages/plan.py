"""Decide, before any weight is read, what becomes of every matrix: its sites, bonds and cost, or that it stays dense."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bondsmith.model.digest import digest_of_json
from bondsmith.stages.wording import duration, size
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites

PIVOT_BYTES = 4  # a gauged network stores the order of its output rows as int32
FORMAT = 1
_KEYS = ("name", "block", "shape", "sites", "bonds", "gauge", "rows", "columns", "grid", "base", "loss")
HEADER_BYTES = 192  # of a safetensors file per tensor: name, dtype, shape, offsets


class PlanError(ValueError):
    """The plan asked for is impossible; the message names the matrix, the numbers and the remedy."""


@dataclass(frozen=True)
class MatrixPlan:
    """What becomes of one matrix: a network (`sites` and `bonds`) or the dense matrix (`sites` is None), rounded to a `grid` or not.

    `parameters` are stored scalars, `multiply_adds` per token; a dense matrix has O * I of both. `loss` is the predicted loss in nats
    a token, where there is a prediction. Embedding and head have `block` -1. Where hidden channels are dropped, `kept_rows` (of what
    writes them) or `kept_columns` (of what reads them) says how many stay, and `sites` belong to the smaller matrix. With a `base` the
    matrix is a hybrid: all of it rounded to that grid, and the network (a matrix cut without gauge) added to it.
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
        dense = self.rows * self.columns
        if self.sites is None:
            return dense
        return self.sites.multiply_adds(self.bonds, self.gauge) + (0 if self.base is None else dense)

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
        """How the numbers are rounded, for people: `int4-g64-min`, of a hybrid `int2-g64-min + int4-g64`; None where they are not."""
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
        )


@dataclass(frozen=True)
class Needs:
    """What carrying a plan out takes, by what it is for: bytes in memory at the peak, bytes on disk, seconds; None if not measured."""

    memory: Mapping[str, float]
    disk: Mapping[str, float]
    seconds: Mapping[str, float] | None

    @property
    def peak(self) -> float:
        """Bytes in memory at the peak."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        time = "" if self.seconds is None else f" and {duration(sum(self.seconds.values()))}"
        return f"takes about {size(self.peak)} of memory, {size(sum(self.disk.values()))} of disk{time}"


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model: one entry per matrix in depth order, and what is not a matrix of a block.

    Attributes:
        matrices: what becomes of every matrix.
        other_parameters: stored scalars outside the matrices: embedding, head, norms, biases.
        tables: embedding and head, where they are rounded.
        loss: predicted loss in nats a token, or None.
        gap: how far from the optimum the choice can be at most, relative; None where nothing was chosen.
        needs: what carrying it out takes, where that was estimated.
        itemsize: bytes that a number which is not rounded will take, where that is known.
    """

    matrices: tuple[MatrixPlan, ...]
    other_parameters: int
    tables: tuple[MatrixPlan, ...] = ()
    loss: float | None = None
    gap: float | None = None
    needs: Needs | None = field(default=None, compare=False)
    itemsize: int | None = field(default=None, compare=False)

    @property
    def parameters(self) -> int:
        """Stored scalars of the compressed model, tied ones once."""
        return self.other_parameters + sum(m.parameters for m in self.matrices)

    @property
    def keep(self) -> float:
        """Share of the matrices' parameters that is kept."""
        return sum(m.parameters for m in self.matrices) / sum(m.dense_parameters for m in self.matrices)

    def bytes(self, itemsize: int) -> int:
        """Size of the weight files, scales, indices and headers included (headers estimated from above)."""
        rest = self.other_parameters - sum(t.dense_parameters for t in self.tables)
        inside = sum(m.bytes(itemsize) + HEADER_BYTES for m in self.matrices)
        return rest * itemsize + inside + sum(t.bytes(itemsize) for t in self.tables)

    @property
    def drops_channels(self) -> bool:
        """True where some MLP loses hidden channels."""
        return any(m.kept_columns is not None for m in self.matrices)

    def packed(self) -> dict[str, dict[str, Any]]:
        """Returns module name -> grid of everything that is rounded: dense matrices, cores that hold numbers, embedding and head."""
        found: dict[str, dict[str, Any]] = {}
        for m in (*self.tables, *self.matrices):
            network = m.name if m.base is None else f"{m.name}.network"
            if m.base is not None:
                found[f"{m.name}.rounded"] = dict(m.base.to_json())
            if m.grid is not None:
                for k, (rows, columns) in enumerate(m.stored_shapes()):
                    if rows * columns:
                        found[m.name if m.sites is None else f"{network}.cores.{k}"] = dict(m.grid.to_json())
        return found

    def block(self, index: int) -> list[MatrixPlan]:
        """Returns the matrices of one block."""
        return [m for m in self.matrices if m.block == index]

    def save(self, path: Path) -> None:
        """Writes `plan.json`: one line per matrix, to be read, edited and compared."""
        head: dict[str, Any] = {"format": FORMAT, "other_parameters": self.other_parameters}
        if self.loss is not None:
            head |= {"loss": float(f"{self.loss:.6g}"), "gap": self.gap}
            head["checksum"] = _checksum(self.matrices, self.tables)
        lists = {"tables": self.tables, "matrices": self.matrices}
        body = [
            f'"{name}": [\n' + ",\n".join("  " + json.dumps(m.to_json()) for m in rows) + "\n]"
            for name, rows in lists.items()
            if rows
        ]
        path.write_text(",\n".join([json.dumps(head)[:-1], *body]) + "}\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Returns the plan of a `plan.json`; PlanError where it cannot be read, naming the entry."""
        try:
            content = json.loads(path.read_text())
            if content.get("format") != FORMAT:
                raise PlanError(
                    f"{path} has format {content.get('format')!r}, this version of bondsmith reads {FORMAT}"
                )
            lists = [tuple(_entry(m, path) for m in content.get(k, ())) for k in ("matrices", "tables")]
            known = content.get("checksum") in (None, _checksum(*lists))
            loss, gap = (content.get("loss"), content.get("gap")) if known else (None, None)
            plan = cls(lists[0], content["other_parameters"], lists[1], loss, gap)
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is not a plan: {type(error).__name__}: {error}") from error
        return plan

    def check(
        self,
        shapes: Mapping[str, tuple[int, int, int]],
        other_parameters: int,
        tables: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Raises PlanError unless this plan fits a model; names the first entry that does not.

        Args:
            shapes: matrix name -> (block, out features, in features) of the model.
            other_parameters: its stored scalars outside these matrices.
            tables: (rows, columns) of embedding, and of head where it has weights of its own; None leaves them unchecked.
        """
        given = {m.name: m for m in self.matrices}
        if len(given) < len(self.matrices):
            twice = next(m.name for i, m in enumerate(self.matrices) if m.name in {n.name for n in self.matrices[:i]})
            raise PlanError(f"{twice}: the plan has two entries for this matrix")
        for name, (block, rows, columns) in shapes.items():
            matrix = given.pop(name, None)
            if matrix is None:
                raise PlanError(
                    f"{name}: the model has this matrix, the plan has no entry for it; is it a plan of another model?"
                )
            if (matrix.block, matrix.out_features, matrix.in_features) != (block, rows, columns):
                raise PlanError(
                    f"{name}: the plan says block {matrix.block}, {matrix.out_features} x {matrix.in_features}, the model has "
                    f"block {block}, {rows} x {columns}"
                )
            matrix.check()
        if given:
            raise PlanError(
                f"{next(iter(given))}: the plan has this matrix, the model has not; is it a plan of another model?"
            )
        for block in dict.fromkeys(m.block for m in self.matrices if m.kept_rows or m.kept_columns):
            _check_channels(self.block(block))
        names = [table.name for table in self.tables]
        if len(set(names)) < len(names):
            raise PlanError(f"{max(names, key=names.count)}: the plan has two entries for this matrix")
        for table in self.tables:
            if tables is not None and tables.get(table.name) != (table.out_features, table.in_features):
                has = " x ".join(map(str, tables.get(table.name, ()))) or f"none of this name, but {', '.join(tables)}"
                raise PlanError(
                    f"{table.name}: the plan says {table.out_features} x {table.in_features} outside the blocks, the model has {has}"
                )
            table.check()
            table.check_table()
        if self.other_parameters != other_parameters:
            raise PlanError(
                f"other_parameters: the plan counts {self.other_parameters}, the model has {other_parameters} outside its matrices"
            )

    def __str__(self) -> str:
        dense = sum(m.sites is None for m in self.matrices)
        before = sum(m.dense_parameters for m in self.matrices)
        work = sum(m.multiply_adds for m in self.matrices)
        stored = "" if self.itemsize is None else f" in {size(self.bytes(self.itemsize))}"
        needs = "" if self.needs is None else f"; {self.needs}"
        loss = "" if self.loss is None else f", predicted loss {self.loss:.4f} nats a token (gap {self.gap or 0:.1g})"
        bits: dict[str, int] = {}
        for m in (*self.matrices, *self.tables):
            if m.rounding is not None:
                bits[m.rounding] = bits.get(m.rounding, 0) + 1
        rounded = f", rounded: {', '.join(f'{n} x {g}' for g, n in sorted(bits.items()))}" if bits else ""
        return (
            f"{len(self.matrices)} matrices ({dense} stay dense): keep {self.keep:.3f}, "
            f"{self.parameters / 1e6:.1f} M parameters of {(self.other_parameters + before) / 1e6:.1f} M{stored}, "
            f"{work / 1e6:.1f} M multiply-adds a token in the matrices ({work / before:.2f} of them){rounded}{loss}{needs}"
        )


def _checksum(matrices: Sequence[MatrixPlan], tables: Sequence[MatrixPlan]) -> str:
    """Of the entries that a predicted loss belongs to: edited by hand, a plan has none."""
    return digest_of_json([[m.to_json() for m in some] for some in (matrices, tables)])


def _check_channels(matrices: Sequence[MatrixPlan]) -> None:
    """Raises PlanError unless every matrix of a block that loses rows has one that loses as many columns, and the other way round."""
    readers = {(m.in_features, m.columns) for m in matrices if m.kept_columns is not None}
    written = set()
    for m in matrices:
        if m.kept_rows is None:
            continue
        pairs = {(n, c) for n, c in readers if m.out_features % n == 0 and m.rows == m.out_features // n * c}
        if not pairs:
            stay = ", ".join(f"{c} of {n}" for n, c in sorted(readers)) or "no fewer"
            raise PlanError(
                f"{m.name}: the plan keeps {m.rows} rows, but what reads them in its block keeps {stay} columns"
            )
        written |= pairs
    for m in matrices:
        if m.kept_columns is not None and (m.in_features, m.columns) not in written:
            raise PlanError(
                f"{m.name}: the plan keeps {m.columns} columns, but nothing in its block writes so few rows"
            )


def _tensors(grid: Grid | None) -> int:
    """Tensors in the file of one stored matrix."""
    return 1 if grid is None else 2 if grid.symmetric else 3


def _entry(entry: Mapping[str, Any], path: Path) -> MatrixPlan:
    try:
        unknown = [key for key in entry if key not in _KEYS]
        if unknown:
            raise ValueError(f"there is no key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
        return MatrixPlan.from_json(entry)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError(f"{path}: entry {entry.get('name', '?')}: {type(error).__name__}: {error}") from error
