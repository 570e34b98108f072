"""Decide, before any weight is read, what becomes of every matrix: its sites, bonds and cost, or that it stays dense."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bondsmith.model.digest import digest_of_json
from bondsmith.stages.matrix_plan import HEADER_BYTES, KEYS, MatrixPlan, PlanError
from bondsmith.stages.wording import duration, size

FORMAT = 1


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

    def with_shares(self, shares: Mapping[str, float]) -> Plan:
        """Returns the plan with the share of the tokens that each matrix sees, by name; all where it has none."""
        matrices = tuple(replace(m, tokens=shares.get(m.name, 1.0)) for m in self.matrices)
        return replace(self, matrices=matrices)

    def __str__(self) -> str:
        dense = sum(m.sites is None for m in self.matrices)
        before = sum(m.dense_parameters for m in self.matrices)
        work, full = sum(m.multiply_adds for m in self.matrices), sum(m.dense_multiply_adds for m in self.matrices)
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
            f"{work / 1e6:.1f} M multiply-adds a token in the matrices ({work / full:.2f} of them){rounded}{loss}{needs}"
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


def _entry(entry: Mapping[str, Any], path: Path) -> MatrixPlan:
    try:
        unknown = [key for key in entry if key not in KEYS]
        if unknown:
            raise ValueError(f"there is no key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
        return MatrixPlan.from_json(entry)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError(f"{path}: entry {entry.get('name', '?')}: {type(error).__name__}: {error}") from error
