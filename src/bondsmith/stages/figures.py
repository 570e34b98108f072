"""What the figures of a profile show: curves in panels with shared axes, and maps of blocks against kinds of matrix.

Plain data in, coordinates from 0 to 1 and texts out; geometry and colour belong to `templates/figures.html`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bondsmith.stages.charts import SHADES, Cell, HeatMap
from bondsmith.stages.wording import number

TONES = 8  # colours and marks that lines can be told apart by
_DECADES = 6  # most that a scale spans; what lies below is drawn at its lower end


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with named ticks."""

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The place of a value, from 0 to 1; values beyond an end lie on it."""
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Point:
    """A point of a line, what it says when pointed at, and one standard error up and down."""

    x: float
    y: float
    title: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Line:
    """A line: its `tone` picks colour and mark (from 0), or the place in the ramp of depth."""

    label: str
    tone: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One set of axes; `rule` is a horizontal line to compare with (the original)."""

    title: str
    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    rule: float | None = None


@dataclass(frozen=True)
class Curves:
    """Panels side by side. With `ramp` tones are steps of depth, named by the ramp's two ends; else the legend names them."""

    panels: tuple[Panel, ...]
    caption: str = ""
    rule: str = ""
    ramp: tuple[str, str] | None = None
    marks: bool = True
    kind: str = field(default="curves", init=False)

    @property
    def legend(self) -> list[tuple[str, int]]:
        """(label, tone) of every line, once."""
        return list(dict.fromkeys((line.label, line.tone) for panel in self.panels for line in panel.lines))


@dataclass(frozen=True)
class Map:
    """A heat map with its own words; `blank` names the squares without a value."""

    heat: HeatMap
    label: str
    caption: str = ""
    blank: str = ""
    unit: str = ""
    kind: str = field(default="map", init=False)


def axis(label: str, values: Iterable[float], *, log: bool = False, low: float | None = None) -> Axis:
    """An axis that covers the values; `low` moves its lower end.

    >>> [text for _, text in axis("x", [0.1, 0.9]).ticks]
    ['0', '0.2', '0.4', '0.6', '0.8', '1']
    >>> [text for _, text in axis("y", [0.004, 2.0], log=True).ticks]
    ['0.001', '0.01', '0.1', '1', '10']
    """
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    bottom, top = min(finite) if low is None else low, max(finite)
    return _log_axis(label, bottom, top) if log else _linear_axis(label, bottom, top, low is None)


def place(name: str) -> tuple[int | None, str]:
    """The block of a matrix by its full name, and its kind, with `*` for experts.

    >>> place("model.layers.3.mlp.experts.17.down_proj"), place("lm_head")
    ((3, 'mlp.experts.*.down_proj'), (None, 'lm_head'))
    """
    match = re.search(r"\.(\d+)\.(.+)$", name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"\.\d+(?=\.|$)", ".*", match[2])


def short_labels(kinds: Iterable[str]) -> dict[str, str]:
    """The last part of each kind where that is unique, else the whole."""
    every = list(dict.fromkeys(kinds))
    last = [kind.rpartition(".")[2] for kind in every]
    return {kind: short if last.count(short) == 1 else kind for kind, short in zip(every, last, strict=True)}


def loss_map(
    values: Mapping[str, float], label: str, unit: str, *, caption: str = "", blank: str = "not measured"
) -> Map | None:
    """Values of matrices, by full name, as a map of blocks against kinds; None if no name has a block.

    The scale is logarithmic where values span more than a factor of ten. Experts of one block share a square: their mean.
    """
    squares: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        block, kind = place(name)
        if block is not None:
            squares.setdefault(kind, {}).setdefault(block, []).append(value)
    if not squares:
        return None
    means = {kind: {b: sum(vs) / len(vs) for b, vs in row.items()} for kind, row in squares.items()}
    every = [v for row in means.values() for v in row.values() if math.isfinite(v)]
    edges = _edges(every)
    blocks = sorted({b for row in means.values() for b in row})
    labels = short_labels(means)
    rows = []
    for kind, row in means.items():
        cells = [
            Cell(column, _level(row[b], edges) if b in row else None, _title(b, labels[kind], row.get(b), unit, blank))
            for column, b in enumerate(blocks)
        ]
        rows.append((labels[kind], cells))
    full = all(len(row) == len(blocks) for row in means.values())
    return Map(HeatMap(blocks, rows, [_tick(e) for e in edges]), label, caption, "" if full else blank, unit)


def _title(block: int, kind: str, value: float | None, unit: str, blank: str) -> str:
    return f"block {block}, {kind}: " + (blank if value is None else f"{number(value)} {unit}".strip())


def _level(value: float, edges: Sequence[float]) -> int:
    return max(0, min(sum(value >= e for e in edges) - 1, len(edges) - 2))


def _edges(values: Sequence[float]) -> list[float]:
    """The edges of at most `SHADES` steps: 1, 2, 5, 10, ... or coarser where values span more than a factor of ten, else equal steps."""
    positive = [v for v in values if v > 0]
    if not positive:
        return [0.0, 1.0]
    top = max(positive)
    bottom = max(min(positive), top * 10.0**-_DECADES)
    if top <= bottom:
        return [0.0, _step(top, 1)]
    if len(positive) == len(values) and top <= 10 * bottom:
        step = _step(top - bottom, SHADES - 2)
        first = math.floor(bottom / step + 1e-9)
        return [step * i for i in range(first, math.ceil(top / step - 1e-9) + 1)]
    decades = math.log10(top / bottom)
    steps = next((m for m in ((1, 2, 5), (1, 3)) if decades * len(m) <= SHADES - 2), (1,))
    marks = [m * 10.0**e for e in range(math.floor(math.log10(bottom)) - 1, 12) for m in steps]
    first = max(i for i, m in enumerate(marks) if m <= bottom * (1 + 1e-9))
    last = min(i for i, m in enumerate(marks) if m >= top * (1 - 1e-9))
    return marks[max(first, last - SHADES) : last + 1]


def _linear_axis(label: str, bottom: float, top: float, from_zero: bool) -> Axis:
    """Starts at 0 where the values lie near it."""
    if from_zero and 0 <= bottom < 0.5 * top:
        bottom = 0.0
    if top <= bottom:
        top = bottom + (abs(bottom) or 1.0)
    step = _step(top - bottom, 6)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    ticks = tuple((i * step, _tick(i * step)) for i in range(first, last + 1))
    return Axis(label, first * step, last * step, False, ticks)


def _log_axis(label: str, bottom: float, top: float) -> Axis:
    bottom = max(bottom, top * 10.0**-_DECADES)
    marks = (1, 2, 5) if top / bottom <= 30 else (1,)
    every = [
        m * 10.0**e for e in range(math.floor(math.log10(bottom)) - 1, math.ceil(math.log10(top)) + 2) for m in marks
    ]
    first = max(i for i, m in enumerate(every) if m <= bottom * (1 + 1e-9))
    last = min(i for i, m in enumerate(every) if m >= top * (1 - 1e-9))
    last = max(last, first + 1)
    return Axis(label, every[first], every[last], True, tuple((v, _tick(v)) for v in every[first : last + 1]))


def _step(span: float, most: int) -> float:
    """The smallest 1, 2 or 5 times a power of ten that covers `span` in at most `most` steps."""
    scale = 10.0 ** math.floor(math.log10(span / most))
    return next(s for s in (scale, 2 * scale, 5 * scale, 10 * scale) if span <= most * s * (1 + 1e-9))


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _tick(value: float) -> str:
    """A tick's text: plain from 0.0001 to 99,999, else a power of ten.

    >>> _tick(0.25), _tick(3e-5), _tick(4096.0)
    ('0.25', '3·10⁻⁵', '4,096')
    """
    if value == 0 or 1e-4 <= abs(value) * (1 + 1e-9) < 1e5:
        return f"{value:,.6g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = f"{value / 10.0**exponent:.3g}"
    power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa}·{power}"
