"""The fast profile as data: what the loss would rise by if a matrix were cut or rounded, for all matrices and all sizes at once.

A perturbation `D` of a weight raises the divergence from the original by about `1/2 tr(B D C D^T)` nats a token, with `C` the second
moment of its inputs and `B` that of the loss gradient at its outputs. For the best matrix cut at bond `k` that is half the sum of the
squared singular values of `B^1/2 W C^1/2` from place `k` on: one eigenvalue problem gives the whole curve. For rounding it follows from
the step of the grid and from what error compensation leaves of every input's variance.

Legend: `O, I` out and in features, `W` the weight, `k` a bond, `s` singular values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.stages.wording import count
from bondsmith.tensor.algebra import entropy

FORMAT = 1


@dataclass(frozen=True, eq=False)
class MatrixProfile:
    """The curves of one matrix.

    Attributes:
        spectrum: singular values in the metric, descending, (min(O, I),) float64.
        unit: nats a token of half a squared singular value (1 in the loss metric before probes correct it).
        rounding: columns that share a scale (0: all) -> predicted loss of rounding the dense matrix, times the squared number of steps
            in a group's range.
        left: share of that loss which a cut of bond 0, 1, ... beside the rounded matrix leaves; empty where it is not known.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    spectrum: Tensor
    unit: float = 1.0
    rounding: Mapping[int, float] = field(default_factory=dict)
    left: tuple[float, ...] = ()

    def cut_losses(self) -> Tensor:
        """Returns the predicted loss at every bond from 0 to min(O, I), (min(O, I) + 1,) float64, in nats a token."""
        squares = self.spectrum.to(torch.float64).square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return 0.5 * self.unit * tails

    @property
    def entropy(self) -> float:
        """The entanglement entropy of the cut in the metric, in nats."""
        return entropy(self.spectrum)

    def bond_for(self, share: float) -> int:
        """Returns the smallest bond whose predicted loss is at most `share` of the loss of dropping the whole matrix."""
        losses = self.cut_losses()
        return int((losses > share * losses[0]).sum())


@dataclass(frozen=True, eq=False)
class Reduced:
    """An MLP with hidden channels dropped: how many stay, the predicted loss of that, the curves of what is left of its matrices."""

    channels: int
    loss: float
    matrices: tuple[MatrixProfile, ...]


@dataclass(frozen=True, eq=False)
class BondProfile:
    """A hidden bond (the channels of an MLP) with names of the whole model, and the sizes it may be reduced to, largest first."""

    writers: tuple[str, ...]
    reader: str
    channels: int
    levels: tuple[Reduced, ...]


@dataclass(frozen=True, eq=False)
class TableProfile:
    """Embedding or head: its (vocabulary, width) matrix, and what rounding it would cost, as in `MatrixProfile`."""

    name: str
    rows: int
    columns: int
    rounding: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Profile:
    """The fast profile of a model: one entry per matrix, in depth order.

    Attributes:
        model: what the user called it.
        itemsize: bytes of an unrounded number in the saved model.
        other_parameters: stored scalars outside the matrices, embedding and head included.
        tables: embedding, and head where it has weights of its own.
        bonds: the hidden bonds, by block; empty where channels are not to be dropped.
        metric: loss, input or frobenius; only `loss` predicts nats, the others relative squared errors.
        tokens: calibration tokens behind it.
        shares: of the tokens that reach a matrix, where it is not all: experts of a mixture.
    """

    model: str
    itemsize: int
    other_parameters: int
    metric: str
    tokens: int
    matrices: tuple[MatrixProfile, ...]
    bonds: tuple[BondProfile, ...] = ()
    tables: tuple[TableProfile, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def blank(
        cls,
        shapes: Mapping[str, tuple[int, int, int]],
        other_parameters: int,
        itemsize: int,
        tables: tuple[TableProfile, ...] = (),
    ) -> Profile:
        """Returns a profile that predicts no loss at all: what is known before any work."""
        matrices = tuple(
            MatrixProfile(name, block, rows, columns, torch.zeros(min(rows, columns)))
            for name, (block, rows, columns) in shapes.items()
        )
        return cls("", itemsize, other_parameters, "none", 0, matrices, (), tables)

    def __getitem__(self, name: str) -> MatrixProfile:
        return next(m for m in self.matrices if m.name == name)

    def rescaled(self, factors: Mapping[str, float]) -> Profile:
        """Returns the profile with the predictions of the named matrices multiplied by factors (from measured probes)."""

        def scaled(m: MatrixProfile) -> MatrixProfile:
            return replace(m, unit=m.unit * factors.get(m.name, 1.0))

        bonds = [
            replace(
                b,
                levels=tuple(
                    replace(v, loss=v.loss * factors.get(b.reader, 1.0), matrices=tuple(scaled(m) for m in v.matrices))
                    for v in b.levels
                ),
            )
            for b in self.bonds
        ]
        return replace(self, matrices=tuple(scaled(m) for m in self.matrices), bonds=tuple(bonds))

    def save(self, directory: Path) -> None:
        """Writes `profile.safetensors` (spectra) and `profile.json` (all else; last)."""
        directory.mkdir(parents=True, exist_ok=True)
        spectra = {m.name: m.spectrum for m in self.matrices}
        for bond in self.bonds:
            spectra |= {f"{m.name}@{v.channels}": m.spectrum for v in bond.levels for m in v.matrices}
        write_shard(directory / "profile.safetensors", spectra)
        content = {"format": FORMAT, "model": self.model, "itemsize": self.itemsize, "metric": self.metric}
        content |= {"tokens": self.tokens, "other_parameters": self.other_parameters}
        content |= {"shares": dict(self.shares)} if self.shares else {}
        content |= {"tables": [_table_row(t) for t in self.tables], "bonds": [_bond_row(b) for b in self.bonds]}
        write_json(directory / "profile.json", content | {"matrices": [_row(m) for m in self.matrices]})

    @classmethod
    def load(cls, directory: Path) -> Profile:
        """Returns the profile in a directory; ValueError if there is none or it is of a newer format."""
        path = directory / "profile.json"
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no profile: it has no profile.json; run `bondsmith profile MODEL --out DIR`"
            )
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] > FORMAT:
            raise ValueError(f"{path} has format {content['format']}, this bondsmith reads up to {FORMAT}")
        spectra = load_file(directory / "profile.safetensors")
        bonds = tuple(_bond_entry(b, spectra) for b in content["bonds"])
        tables = tuple(_table_entry(t) for t in content["tables"])
        matrices = tuple(_entry(m, spectra[m["name"]]) for m in content["matrices"])
        return cls(
            content["model"],
            content["itemsize"],
            content["other_parameters"],
            content["metric"],
            content["tokens"],
            matrices,
            bonds,
            tables,
            content.get("shares", {}),
        )

    def table(self) -> Table:
        """Returns the table by kind of matrix: parameters, losses if dropped or cut, entropies."""
        unit = "nats a token" if self.metric == "loss" else "relative squared error"
        table = Table(
            "matrices", "number", "parameters", "if dropped", "cut to 3/4", "cut to 1/2", "cut to 1/4", "entropy",
            title=f"predicted loss, {unit}, mean over the blocks ({self.metric} metric, {count(self.tokens)} tokens)",
        )  # fmt: skip
        kinds: dict[str, list[MatrixProfile]] = {}
        for m in self.matrices:
            kinds.setdefault(m.name.rsplit(".", 1)[-1], []).append(m)
        for kind, members in kinds.items():
            curves = [m.cut_losses() for m in members]
            at = [[float(c[int(share * (len(c) - 1))]) for c in curves] for share in (0, 0.75, 0.5, 0.25)]
            means = [f"{sum(column) / len(column):.4f}" for column in at]
            size = count(sum(m.out_features * m.in_features for m in members))
            mean_entropy = sum(m.entropy for m in members) / len(members)
            table.add_row(kind, str(len(members)), size, *means, f"{mean_entropy:.2f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _row(m: MatrixProfile) -> dict[str, Any]:
    known = {"name": m.name, "block": m.block, "shape": [m.out_features, m.in_features], "unit": m.unit}
    known |= {"rounding": {str(group): unit for group, unit in m.rounding.items()}}
    known |= {"left": [round(share, 5) for share in m.left]} if m.left else {}
    return known | {"entropy": m.entropy, "loss_if_dropped": float(m.cut_losses()[0])}


def _entry(row: Mapping[str, Any], spectrum: Tensor) -> MatrixProfile:
    rows, columns = row["shape"]
    rounding, left = _rounding(row["rounding"]), tuple(row.get("left", ()))
    return MatrixProfile(row["name"], row["block"], rows, columns, spectrum, row["unit"], rounding, left)


def _rounding(row: Mapping[str, float]) -> dict[int, float]:
    return {int(group): unit for group, unit in row.items()}


def _bond_row(b: BondProfile) -> dict[str, Any]:
    levels = [{"channels": v.channels, "loss": v.loss, "matrices": [_row(m) for m in v.matrices]} for v in b.levels]
    return {"writers": list(b.writers), "reader": b.reader, "channels": b.channels, "levels": levels}


def _bond_entry(row: Mapping[str, Any], spectra: Mapping[str, Tensor]) -> BondProfile:
    levels = tuple(
        Reduced(
            v["channels"],
            v["loss"],
            tuple(_entry(m, spectra[f"{m['name']}@{v['channels']}"]) for m in v["matrices"]),
        )
        for v in row["levels"]
    )
    return BondProfile(tuple(row["writers"]), row["reader"], row["channels"], levels)


def _table_row(t: TableProfile) -> dict[str, Any]:
    return {"name": t.name, "shape": [t.rows, t.columns]} | {
        "rounding": {str(group): unit for group, unit in t.rounding.items()}
    }


def _table_entry(row: Mapping[str, Any]) -> TableProfile:
    rows, columns = row["shape"]
    return TableProfile(row["name"], rows, columns, _rounding(row["rounding"]))
