"""The fast profile: what the loss would rise by if a matrix were cut or rounded, for all matrices and all sizes at once.

A perturbation `D` of a weight raises the divergence from the original by about `1/2 tr(B D C D^T)` nats a token, with `C` the second
moment of its inputs and `B` that of the loss gradient at its outputs. For the best matrix cut at bond `k` that is half the sum of the
squared singular values of `B^1/2 W C^1/2` from place `k` on: one eigenvalue problem gives the whole curve. For rounding it follows from
the step of the grid and from what error compensation leaves of every input's variance.

Legend: `O, I` out and in features, `W` the weight, `k` a bond, `s` singular values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.stages.moments import TableMoments
from bondsmith.stages.wording import count
from bondsmith.tensor.algebra import entropy
from bondsmith.tensor.fit import Root, cut_spectrum, damped, moment_root
from bondsmith.tensor.rounding import Grid

FORMAT = 1


@dataclass(frozen=True, eq=False)
class MatrixProfile:
    """The curves of one matrix.

    Attributes:
        spectrum: singular values in the metric, descending, (min(O, I),) float64.
        unit: nats a token of half a squared singular value (1 in the loss metric before probes correct it).
        rounding: columns that share a scale (0: all) -> predicted loss of rounding the dense matrix, times the squared number of steps
            in a group's range.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    spectrum: Tensor
    unit: float = 1.0
    rounding: Mapping[int, float] = field(default_factory=dict)

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
class Profile:
    """The fast profile of a model: one entry per matrix, in depth order.

    Attributes:
        metric: loss, input or frobenius; only `loss` predicts nats, the others relative squared errors.
        tokens: calibration tokens behind it.
    """

    matrices: tuple[MatrixProfile, ...]
    metric: str
    tokens: int

    def __getitem__(self, name: str) -> MatrixProfile:
        return next(m for m in self.matrices if m.name == name)

    def rescaled(self, units: Mapping[str, float]) -> Profile:
        """Returns the profile with other units for the named matrices (from measured probes)."""
        return replace(self, matrices=tuple(replace(m, unit=units.get(m.name, m.unit)) for m in self.matrices))

    def save(self, directory: Path) -> None:
        """Writes `profile.safetensors` (spectra) and `profile.json` (all else; last)."""
        directory.mkdir(parents=True, exist_ok=True)
        write_shard(directory / "profile.safetensors", {m.name: m.spectrum for m in self.matrices})
        rows = [
            {"name": m.name, "block": m.block, "shape": [m.out_features, m.in_features], "unit": m.unit}
            | {
                "rounding": {str(g): v for g, v in m.rounding.items()},
                "entropy": m.entropy,
                "loss_if_dropped": float(m.cut_losses()[0]),
            }
            for m in self.matrices
        ]
        content = {"format": FORMAT, "metric": self.metric, "tokens": self.tokens, "matrices": rows}
        write_json(directory / "profile.json", content)

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
        matrices = tuple(_entry(m, spectra[m["name"]]) for m in content["matrices"])
        return cls(matrices, content["metric"], content["tokens"])

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


def _entry(row: Mapping[str, Any], spectrum: Tensor) -> MatrixProfile:
    rows, columns = row["shape"]
    rounding = {int(group): unit for group, unit in row["rounding"].items()}
    return MatrixProfile(row["name"], row["block"], rows, columns, spectrum, row["unit"], rounding)


def fast_profile(
    shapes: Mapping[str, tuple[int, int, int]],
    weight: Callable[[str], Tensor],
    moments: Callable[[int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    *,
    metric: str,
    tokens: int,
    damping: float,
    group: int = 64,
    advance: Callable[[float], None] = lambda share: None,
) -> Profile:
    """Returns the profile of all matrices.

    Args:
        shapes: matrix name -> (block, out features, in features), in depth order.
        weight: gives the (O, I) weight of a name.
        moments: gives `C` and `B` of the matrices of a block, by full name; a matrix without `B` has the identity there, one without
            either is profiled by its weight alone.
    """
    found: list[MatrixProfile] = []
    block = -1
    C: Mapping[str, Tensor] = {}
    B: Mapping[str, Tensor] = {}
    roots: dict[int, tuple[Root, Tensor]] = {}
    for i, (name, (own, _, _)) in enumerate(shapes.items()):
        if own != block:
            block, roots = own, {}
            C, B = moments(block)
        found.append(_profile(name, own, weight(name), C.get(name), B.get(name), damping, group, roots))
        advance((i + 1) / len(shapes))
    if metric != "loss":
        found = [replace(m, unit=1 / max(2 * float(m.cut_losses()[0]), 1e-300) * 2) for m in found]
    return Profile(tuple(found), metric, tokens)


def _profile(
    name: str,
    block: int,
    W: Tensor,
    C: Tensor | None,
    B: Tensor | None,
    damping: float,
    group: int,
    roots: dict[int, tuple[Root, Tensor]],
) -> MatrixProfile:
    """Returns one entry; `roots` keeps what matrices of one block with the same `C` share."""
    try:
        if C is None:
            spectrum, left = cut_spectrum(W, output_moment=B, damping=damping), None
        else:
            if id(C) not in roots:
                roots[id(C)] = moment_root(C, damping), conditional_variances(damped(C, damping))
            root, left = roots[id(C)]
            spectrum = cut_spectrum(W, input_root=root, output_moment=B, damping=damping)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    weights = None if B is None else B.diagonal()
    rounding = {g: rounding_unit(W, left, weights, g) for g in (0, group)}
    return MatrixProfile(name, block, W.shape[0], W.shape[1], spectrum, rounding=rounding)


def conditional_variances(moment: Tensor) -> Tensor:
    """Returns, per input, the part of its second moment that the inputs after it do not explain, (I,).

    Error-compensated rounding lets later weights absorb the error of earlier ones; what is left of a step's variance is this.

    >>> conditional_variances(torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    tensor([1., 1.], dtype=torch.float64)
    """
    factor = torch.linalg.cholesky(moment.to(torch.float64).flip(0).flip(1))
    return factor.diagonal().square().flip(0)


def rounding_unit(W: Tensor, inputs: Tensor | None, outputs: Tensor | None, group: int) -> float:
    """Returns `1/2 sum_oi B_oo r_oi^2 v_i / 12`: the predicted loss of rounding `W`, times the squared steps in a group's range.

    Args:
        inputs: `v`, variance of every input that counts, (I,), or None for one.
        outputs: diagonal of `B`, (O,), or None for one.
        group: columns that share a range `r`; 0 is the whole row.
    """
    rows, columns = W.shape
    pieces = W.split(group or columns, 1)
    ranges = torch.stack([p.amax(1) - p.amin(1) for p in pieces], 1).to(torch.float64).square()
    v = torch.ones(columns, dtype=torch.float64, device=W.device) if inputs is None else inputs.to(torch.float64)
    sums = torch.stack([piece.sum() for piece in v.split(group or columns)])
    b = torch.ones(rows, dtype=torch.float64, device=W.device) if outputs is None else outputs.to(torch.float64)
    return float(0.5 * (b @ (ranges @ sums)) / 12)


def table_losses(
    W: Tensor, seen: TableMoments, grids: Sequence[Grid | None], *, embeds: bool, predicts: bool
) -> dict[int, float]:
    """Returns bits -> predicted loss of rounding an embedding, a head, or the one matrix that is both (V, width)."""
    found = {}
    for grid in grids:
        if grid is None:
            continue
        unit = 0.0
        if predicts:
            unit += rounding_unit(W, conditional_variances(damped(seen.head_input, 1e-3)), seen.head_weight, grid.group)
        if embeds:
            unit += rounding_unit(W, seen.embedding_gradient.diagonal(), seen.embedding_weight, grid.group)
        found[grid.bits] = unit / (2**grid.bits - 1) ** 2
    return found
