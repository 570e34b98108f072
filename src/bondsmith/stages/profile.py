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

from bondsmith.model.blocks import HiddenBond
from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.stages.moments import TableMoments
from bondsmith.stages.wording import count
from bondsmith.tensor.algebra import entropy
from bondsmith.tensor.channels import eliminate_channels
from bondsmith.tensor.fit import cut_spectrum
from bondsmith.tensor.metric import Root, damped, moment_root
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
class Profile:
    """The fast profile of a model: one entry per matrix, in depth order.

    Attributes:
        bonds: the hidden bonds, by block; empty where channels are not to be dropped.
        metric: loss, input or frobenius; only `loss` predicts nats, the others relative squared errors.
        tokens: calibration tokens behind it.
    """

    matrices: tuple[MatrixProfile, ...]
    metric: str
    tokens: int
    bonds: tuple[BondProfile, ...] = ()

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
        bonds = [
            {"writers": list(b.writers), "reader": b.reader, "channels": b.channels}
            | {
                "levels": [
                    {"channels": v.channels, "loss": v.loss, "matrices": [_row(m) for m in v.matrices]}
                    for v in b.levels
                ]
            }
            for b in self.bonds
        ]
        content = {"format": FORMAT, "metric": self.metric, "tokens": self.tokens}
        write_json(directory / "profile.json", content | {"matrices": [_row(m) for m in self.matrices], "bonds": bonds})

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
        bonds = [
            BondProfile(
                tuple(b["writers"]),
                b["reader"],
                b["channels"],
                tuple(
                    Reduced(
                        v["channels"],
                        v["loss"],
                        tuple(_entry(m, spectra[f"{m['name']}@{v['channels']}"]) for m in v["matrices"]),
                    )
                    for v in b["levels"]
                ),
            )
            for b in content["bonds"]
        ]
        matrices = tuple(_entry(m, spectra[m["name"]]) for m in content["matrices"])
        return cls(matrices, content["metric"], content["tokens"], tuple(bonds))

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
    rounding = {str(group): unit for group, unit in m.rounding.items()}
    known = {"name": m.name, "block": m.block, "shape": [m.out_features, m.in_features], "unit": m.unit}
    return known | {"rounding": rounding, "entropy": m.entropy, "loss_if_dropped": float(m.cut_losses()[0])}


def _entry(row: Mapping[str, Any], spectrum: Tensor) -> MatrixProfile:
    rows, columns = row["shape"]
    rounding = {int(group): unit for group, unit in row["rounding"].items()}
    return MatrixProfile(row["name"], row["block"], rows, columns, spectrum, row["unit"], rounding)


@dataclass(frozen=True, eq=False)
class Seen:
    """What the matrices of a block see, by full name: `C`, `B`, and the bonds whose channels may be dropped."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    bonds: Sequence[HiddenBond] = ()


def fast_profile(
    shapes: Mapping[str, tuple[int, int, int]],
    weight: Callable[[str], Tensor],
    seen: Callable[[int], Seen],
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
        seen: gives what the matrices of a block see; one without `B` has the identity there, one without either is profiled by its
            weight alone.
        group: columns that share a scale in rounding.
    """
    found: list[MatrixProfile] = []
    bonds: list[BondProfile] = []
    for block in dict.fromkeys(own for own, _, _ in shapes.values()):
        names = [name for name, (own, _, _) in shapes.items() if own == block]
        profiler = _Profiler(block, seen(block), weight, damping, group)
        found += [profiler.matrix(name, weight(name)) for name in names]
        bonds += [profiler.bond(bond) for bond in profiler.seen.bonds]
        advance(len(found) / len(shapes))
    profile = Profile(tuple(found), metric, tokens, tuple(bonds))
    if metric == "loss":
        return profile
    return profile.rescaled({m.name: 1 / max(float(m.cut_losses()[0]), 1e-300) for m in found})


@dataclass(eq=False)
class _Profiler:
    """Profiles the matrices of one block; keeps the root of every `C` that several share."""

    block: int
    seen: Seen
    weight: Callable[[str], Tensor]
    damping: float
    group: int
    roots: dict[int, tuple[Root, Tensor]] = field(default_factory=dict)

    def matrix(self, name: str, W: Tensor) -> MatrixProfile:
        """Returns the curves of a whole matrix."""
        return self.curves(name, W, self.seen.inputs.get(name), self.seen.outputs.get(name))

    def curves(self, name: str, W: Tensor, C: Tensor | None, B: Tensor | None) -> MatrixProfile:
        """Returns the curves of a matrix that sees these moments."""
        left = None
        try:
            if C is None:
                spectrum = cut_spectrum(W, output_moment=B, damping=self.damping)
            elif W.shape[0] <= W.shape[1] and id(C) not in self.roots:
                spectrum = cut_spectrum(W, input_moment=C, output_moment=B, damping=self.damping)
                left = conditional_variances(damped(C, self.damping))
            else:
                root, left = self.roots.get(id(C)) or self._root(C)
                spectrum = cut_spectrum(W, input_root=root, output_moment=B, damping=self.damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        weights = None if B is None else B.diagonal()
        rounding = {g: rounding_unit(W, left, weights, g) for g in (0, self.group)}
        return MatrixProfile(name, self.block, W.shape[0], W.shape[1], spectrum, rounding=rounding)

    def _root(self, C: Tensor) -> tuple[Root, Tensor]:
        self.roots[id(C)] = moment_root(C, self.damping), conditional_variances(damped(C, self.damping))
        return self.roots[id(C)]

    def bond(self, bond: HiddenBond) -> BondProfile:
        """Returns the sizes that a hidden bond may be reduced to, with the curves of what is left of its matrices."""
        C, B = self.seen.inputs[bond.reader], self.seen.outputs.get(bond.reader)
        counts = [n for n in channel_counts(bond.channels) if n < bond.channels]
        found = eliminate_channels(
            self.weight(bond.reader), counts, input_moment=C, output_moment=B, damping=self.damping
        )
        levels = []
        for number, channels in sorted(found.items(), reverse=True):
            S = channels.kept
            curves = []
            for name in bond.writers:
                W = self.weight(name)
                rows = bond.rows(S, W.shape[0])
                own = self.seen.outputs.get(name)
                small = None if own is None else own[rows][:, rows]
                curves.append(self.curves(name, W[rows], self.seen.inputs.get(name), small))
            curves.append(self.curves(bond.reader, channels.weight, C[S][:, S], B))
            levels.append(Reduced(number, channels.error / 2, tuple(curves)))
        return BondProfile(bond.writers, bond.reader, bond.channels, tuple(levels))


def channel_counts(channels: int) -> list[int]:
    """Returns the numbers of channels worth trying, largest first: tenths from all to three, in multiples of 16 where that is fine enough.

    >>> channel_counts(1536), channel_counts(64)
    ([1536, 1376, 1216, 1072, 912, 768, 608, 448], [64, 57, 51, 44, 38, 32, 25, 19])
    """
    step = 16 if channels >= 512 else 1
    tenths = [channels * tenth // 10 // step * step for tenth in range(9, 2, -1)]
    return [channels, *(n for n in dict.fromkeys(tenths) if 0 < n < channels)]


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
