"""What the report's two charts show: relative error over blocks and kinds of matrix, and parameters kept per kind.

Geometry and colour belong to `templates/charts.html`; here are the groups, the scale and the texts.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bondsmith.stages.wording import number, percent

SHADES = 10


@dataclass(frozen=True)
class Cell:
    """One square of the heat map: the step of the scale it falls in, None for a matrix that was kept dense."""

    column: int
    level: int | None
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Relative error over blocks (columns) and kinds of matrix (rows); level `l` spans `edges[l]` to `edges[l + 1]`."""

    blocks: list[int]
    rows: list[tuple[str, list[Cell]]]
    edges: list[str]

    @property
    def levels(self) -> int:
        """How many steps the scale has; 0 where every matrix was kept dense."""
        return max(0, len(self.edges) - 1)

    def shade(self, level: int) -> int:
        """The colour of a level, from 0 to `SHADES - 1`: the ends of the scale are always the ends of the ramp."""
        return round((SHADES - 1) * level / max(1, self.levels - 1))

    @property
    def ticks(self) -> list[tuple[int, int]]:
        """(column, block) of the blocks that get a number under the map."""
        step = 1 if len(self.blocks) <= 12 else 5 if len(self.blocks) <= 60 else 10
        return [(column, block) for column, block in enumerate(self.blocks) if block % step == 0]


@dataclass(frozen=True)
class Bar:
    """Parameters of all matrices of one kind, stored (`kept`) and in the original (`dense`)."""

    label: str
    title: str
    kept: int
    dense: int


def heat_map(networks: Iterable[Mapping[str, Any]]) -> HeatMap | None:
    """The error of every matrix that lies in a block, None if there is none.

    Experts of one block share a square, which shows their mean.
    """
    inside = [network for network in networks if network["block"] is not None]
    if not inside:
        return None
    errors = [network["error"] for network in inside if network["error"] is not None]
    step = _step(max(errors, default=0.0))
    bins = max(1, math.ceil(max(errors, default=0.0) / step - 1e-9))
    blocks = sorted({network["block"] for network in inside})
    rows = []
    for label, members in _by_kind(inside):
        members.sort(key=lambda network: network["block"])
        squares = [(block, list(group)) for block, group in groupby(members, key=lambda network: network["block"])]
        rows.append((label, [_cell(blocks.index(block), group, step, bins) for block, group in squares]))
    return HeatMap(blocks, rows, [f"{edge * step:g}" for edge in range(bins + 1)] if errors else [])


def bars(networks: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """Parameters kept per kind of matrix, in the order of first appearance."""
    return [
        Bar(
            label,
            f"{len(members)} × {_kind(members[0])}",
            sum(network["parameters"] for network in members),
            sum(network["dense_parameters"] for network in members),
        )
        for label, members in _by_kind(networks)
    ]


def _kind(network: Mapping[str, Any]) -> str:
    """`mlp.experts.*.down_proj` for `model.layers.3.mlp.experts.17.down_proj` of block 3."""
    inside = network["name"].partition(f".{network['block']}.")[2] or network["name"]
    return re.sub(r"\.\d+(?=\.|$)", ".*", inside)


def _by_kind(networks: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(label, networks) per kind; the label is the last part of the name where that is unique (`q_proj`)."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for network in networks:
        kinds.setdefault(_kind(network), []).append(network)
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [(short if last.count(short) == 1 else kind, kinds[kind]) for kind, short in zip(kinds, last, strict=True)]


def _cell(column: int, group: list[Mapping[str, Any]], step: float, bins: int) -> Cell:
    errors = [network["error"] for network in group if network["error"] is not None]
    share = percent(
        sum(network["parameters"] for network in group) / sum(network["dense_parameters"] for network in group)
    )
    name = (
        group[0]["name"] if len(group) == 1 else f"block {group[0]['block']}, {_kind(group[0])}, {len(group)} matrices"
    )
    if not errors:
        return Cell(column, None, f"{name}: kept dense")
    mean = sum(errors) / len(errors)
    spread = f" (mean; {number(min(errors))} to {number(max(errors))})" if len(errors) > 1 else ""
    return Cell(
        column,
        min(int(mean / step + 1e-9), bins - 1),
        f"{name}: error {number(mean)}{spread}, {share} of the parameters",
    )


def _step(largest: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that covers `largest` in at most `SHADES` steps."""
    if largest <= 0:
        return 0.1
    scale = 10.0 ** math.floor(math.log10(largest / SHADES))
    return next(step for step in (scale, 2 * scale, 5 * scale, 10 * scale) if largest <= SHADES * step * (1 + 1e-9))
