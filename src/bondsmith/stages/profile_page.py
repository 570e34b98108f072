"""A profile as a page: sections of text, figures and tables, from plain data.

`layer_sections` draws the measured layer profile, `fast_sections` the predicted one of the whole model, `spectrum_sections` Schmidt
spectra and entropies by depth, `figures.loss_map` a map of any value per matrix; `write_page` makes one self-contained HTML file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bondsmith.model.checkpoint import write_text
from bondsmith.stages.figures import (
    TONES,
    Axis,
    Curves,
    Line,
    Map,
    Panel,
    Point,
    axis,
    loss_map,
    place,
    short_labels,
)
from bondsmith.stages.profile import MatrixProfile, Profile
from bondsmith.stages.profile_layers import LayerPoint, LayerProfile
from bondsmith.stages.report import environment
from bondsmith.stages.wording import measured, number, percent
from bondsmith.tensor.algebra import entropy
from bondsmith.tensor.sites import Sites

_METRICS = {
    "frobenius": "by singular values of the weights alone (the paper's way)",
    "input": "so that its output changes least on the calibration text",
    "loss": "so that the loss changes least on the calibration text, by second moments of inputs and gradients",
}


@dataclass(frozen=True)
class PageTable:
    """A table that unfolds; its first `words` columns are text, the others figures."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[Curves | Map] = ()
    tables: Sequence[PageTable] = ()


def write_page(path: Path, title: str, sections: Iterable[Section], notes: Mapping[str, str] | None = None) -> None:
    """Writes a self-contained page; `notes` are name and value of how it was made."""
    page = environment().get_template("profile.html")
    write_text(path, page.render(title=title, sections=list(sections), notes=dict(notes or {})))


def layer_sections(profile: LayerProfile) -> list[Section]:
    """Returns the sections of a layer profile: one per figure (KL, perplexity, tasks), then all points as a table."""
    settings, baseline = profile.settings, profile.baseline
    how = (
        f"Each point is the whole model with one matrix replaced by a network of sites {settings['sites']}, cut "
        f"{_METRICS[settings['metric']]}; all else stays as it was. {baseline['windows']} windows, "
        f"{baseline['tokens']:,} predicted tokens; bars are one standard error over windows."
    )
    sections = [
        Section("KL to the original", [how], [_by_bond(profile, _kl), _by_share(profile, _kl)]),
        Section(
            "Perplexity",
            [f"The original has {number(baseline['perplexity'])} on the same tokens."],
            [_by_bond(profile, _perplexity)],
        ),
    ]
    for before in baseline["scores"]:
        name = f"{before['task']}, {before['metric']}"
        text = f"{before['rows']:,} rows; the original has {measured(before['score'], before['stderr'])}."
        sections.append(Section(name, [text], [_by_bond(profile, _task(before))]))
    kept = sorted({p.keep for p in profile.points})
    middle = kept[len(kept) // 2]
    values = {p.plan.name: p.probe.kl for p in profile.points if p.keep == middle}
    heat = loss_map(values, "KL to the original", "nats a token")
    title = f"Where it hurts, at {100 * middle:g} % of each matrix"
    sections += [Section(title, [], [heat])] if heat else []
    return [*sections, Section("All points", [], [], [_points_table(profile)])]


def fast_sections(profile: Profile) -> list[Section]:
    """Returns the sections of a fast profile: maps of predicted losses, curves against size, spectra and entropies."""
    unit = "nats a token" if profile.metric == "loss" else "of the output energy"
    label = f"predicted loss, {unit}"
    curves = {m.name: [(bond, _stored_share(m, bond)) for bond in _bonds(m)] for m in profile.matrices}
    losses = {m.name: m.cut_losses() for m in profile.matrices}
    half = {n: float(losses[n][min(spots, key=lambda b: abs(b[1] - 0.5))[0]]) for n, spots in curves.items()}
    maps = [loss_map(half, "Predicted loss at half of the parameters", unit)]
    text = ["Each matrix cut to half of its parameters, all else as it is."]
    if all(64 in m.rounding for m in profile.matrices):
        rounded = {m.name: m.unit * m.rounding[64] / (2**3 - 1) ** 2 for m in profile.matrices}
        text = [
            "Above: each matrix cut to half of its parameters. Below: each rounded to 3 bits in groups of 64, uncut."
        ]
        maps.append(loss_map(rounded, "Predicted loss of rounding to 3 bits", unit))
    placed = {name: place(name) for name in curves if place(name)[0] is not None}
    labels = short_labels(kind for _, kind in placed.values())
    deepest = max((block or 0 for block, _ in placed.values()), default=0)
    every = [float(losses[name][bond]) for name, spots in curves.items() for bond, _ in spots]
    x, y = axis("parameters kept, of the matrix", [0.0, 1.0]), axis(label, every, log=True)
    panels = []
    for kind, short in labels.items():
        lines = []
        for name, (block, own) in placed.items():
            if own == kind:
                points = tuple(Point(share, float(losses[name][bond])) for bond, share in curves[name])
                lines.append(Line(f"block {block}", round(9 * (block or 0) / max(1, deepest)), points))
        panels.append(Panel(short, tuple(lines), x, y))
    caption = f"{profile.metric} metric, {profile.tokens:,} calibration tokens; one line per block, the same axes in all panels."
    drawn = Curves(tuple(panels), caption, ramp=("block 0", f"block {deepest}"), marks=False)
    words = {"frobenius": "weights", "input": "weights in the metric of their inputs"}
    spectra = {m.name: m.spectrum for m in profile.matrices}
    return [
        Section("Predicted loss", text, [m for m in maps if m is not None]),
        Section("Predicted loss against size", [], [drawn]),
        *spectrum_sections(spectra, words.get(profile.metric, "weights in the metric of the loss")),
    ]


def _bonds(matrix: MatrixProfile) -> list[int]:
    """Returns some two dozen bonds from 1 to the last that cuts anything."""
    full = min(matrix.out_features, matrix.in_features)
    return sorted({max(1, round(full * i / 24)) for i in range(24)} - {full})


def _stored_share(matrix: MatrixProfile, bond: int) -> float:
    rows, columns = matrix.out_features, matrix.in_features
    return Sites((rows, 1), (1, columns)).parameters((bond,), gauge=True) / (rows * columns)


def spectrum_sections(spectra: Mapping[str, Tensor | Sequence[float]], metric: str) -> list[Section]:
    """Returns two sections, Schmidt spectra and their entropies by depth, of singular values by full matrix name.

    Args:
        metric: what the values are of, in words, for the captions: "weights", "weights in the loss metric".
    """
    found = {name: torch.as_tensor(values, dtype=torch.float64).flatten() for name, values in spectra.items()}
    placed = {name: place(name) for name in found if place(name)[0] is not None}
    labels = short_labels(kind for _, kind in placed.values())
    deepest = max((block or 0 for block, _ in placed.values()), default=0)
    spectrum = Curves(
        tuple(_spectrum_panel(label, kind, found, placed, deepest) for kind, label in labels.items()),
        "Singular values over the largest one of the same matrix; one line per block.",
        ramp=("block 0", f"block {deepest}"),
        marks=False,
    )
    text = [
        f"Singular values of the {metric}, matrix by matrix. Where a line falls early, few bond dimensions carry the matrix; "
        "a flat line bears no cut."
    ]
    return [
        Section("Schmidt spectra by depth", text, [spectrum]),
        Section("Entropy by depth", [_ENTROPY], [_entropies(found, placed, labels, deepest)]),
    ]


_ENTROPY = (
    "The entanglement entropy of the cut, −Σ p ln p with p the normalised squared singular values: e to this power is the number of "
    "bond dimensions that matter. Its largest value is the logarithm of the smaller side of the matrix."
)


def _spectrum_panel(
    label: str, kind: str, found: Mapping[str, Tensor], placed: Mapping[str, tuple[int | None, str]], deepest: int
) -> Panel:
    lines = []
    for name, (block, own) in placed.items():
        if own == kind:
            values = found[name] / found[name].max().clamp_min(1e-300)
            spots = torch.linspace(0, len(values) - 1, min(len(values), 80)).round().long().unique()
            points = tuple(Point((int(i) + 1) / len(values), float(values[i])) for i in spots)
            lines.append(Line(f"block {block}", round(9 * (block or 0) / max(1, deepest)), points))
    return Panel(label, tuple(lines), _SHARE_OF_RANK, _SIZE)


_SHARE_OF_RANK = axis("place of the singular value, of all", [0.0, 1.0])
_SIZE = axis("singular value, of the largest", [1e-3, 1.0], log=True)  # one scale in all panels; less does not matter


def _entropies(
    found: Mapping[str, Tensor], placed: Mapping[str, tuple[int | None, str]], labels: Mapping[str, str], deepest: int
) -> Curves:
    rows: dict[str, dict[int, list[tuple[float, int]]]] = {}
    for name, (block, kind) in placed.items():
        rows.setdefault(kind, {}).setdefault(block or 0, []).append((entropy(found[name]), len(found[name])))
    lines = []
    for tone, (kind, blocks) in enumerate(rows.items()):
        points = []
        for block, values in sorted(blocks.items()):
            mean = sum(v for v, _ in values) / len(values)
            title = f"block {block}, {labels[kind]}: {mean:.2f} nats, {math.exp(mean):.0f} of {values[0][1]} bond dimensions"
            points.append(Point(block, mean, title))
        lines.append(Line(labels[kind], tone % TONES, tuple(points)))
    every = [p.y for line in lines for p in line.points]
    panel = Panel("All matrices", tuple(lines), axis("block", [0.0, deepest]), axis("entropy, nats", every))
    return Curves((panel,))


Figure = tuple[str, Callable[[LayerPoint], tuple[float, float | None] | None], bool, float | None, str]


_kl: Figure = ("KL to the original, nats a token", lambda p: (p.probe.kl, p.probe.kl_stderr), True, None, "KL")
_perplexity: Figure = ("perplexity", lambda p: (p.probe.perplexity, None), True, -1.0, "perplexity")


def _task(before: Mapping[str, Any]) -> Figure:
    def read(point: LayerPoint) -> tuple[float, float | None] | None:
        found = next((s for s in point.scores if (s.task, s.metric) == (before["task"], before["metric"])), None)
        return None if found is None else (found.score, found.stderr)

    return f"{before['task']}, {before['metric']}", read, False, before["score"], before["metric"]


def _by_bond(profile: LayerProfile, figure: Figure) -> Curves:
    caption = (
        "Against the bond dimension, as in figure 5 of arXiv 2401.14109; one panel per block, the same axes in all."
    )
    x = axis("bond dimension", [p.bond for p in profile.points], log=True)
    return _panels(profile, figure, x, lambda p: p.bond, caption)


def _by_share(profile: LayerProfile, figure: Figure) -> Curves:
    caption = "The same against the share of the matrix's parameters that is stored."
    x = axis("parameters kept, of the matrix", [0.0, 1.0])
    return _panels(profile, figure, x, lambda p: p.share, caption)


def _panels(
    profile: LayerProfile, figure: Figure, x: Axis, across: Callable[[LayerPoint], float], caption: str
) -> Curves:
    label, read, log, rule, short = figure
    rule = profile.baseline["perplexity"] if rule == -1.0 else rule
    values = [value[0] for p in profile.points if (value := read(p)) is not None]
    log = log and max(values, default=1.0) > 5 * min(values, default=1.0)
    y = axis(label, [*values, *([rule] if rule is not None else [])], log=log)
    kinds = short_labels(place(p.plan.name)[1] for p in profile.points)
    tones = {kind: i % TONES for i, kind in enumerate(kinds)}
    panels = []
    for block in dict.fromkeys(p.plan.block for p in profile.points):
        lines: dict[str, list[Point]] = {}
        for p in profile.points:
            value = read(p)
            if p.plan.block == block and value is not None:
                said = f"{p.plan.name}, bond {p.bond}, {percent(p.share)} kept: {short} {measured(*value)}"
                lines.setdefault(p.plan.name, []).append(Point(across(p), value[0], said, value[1]))
        drawn = []
        for name, points in lines.items():
            kind = place(name)[1]
            drawn.append(Line(kinds[kind], tones[kind], tuple(sorted(points, key=lambda point: point.x))))
        panels.append(Panel(f"block {block}", tuple(drawn), x, y, rule))
    if log and min(values, default=y.low) < y.low:
        caption += f" What lies below {y.ticks[0][1]} is drawn on the lower edge."
    return Curves(tuple(panels), caption, "the original" if rule is not None else "")


def _points_table(profile: LayerProfile) -> PageTable:
    tasks = [(b["task"], b["metric"]) for b in profile.baseline["scores"]]
    head = ["matrix", "sites", "bonds", "kept", "relative error", "KL, nats a token", "nats lost a token", "perplexity"]
    head += ["top-1 agreement", *(f"{t}, {m}" for t, m in tasks)]
    rows = []
    for p in profile.points:
        scores = {(s.task, s.metric): measured(s.score, s.stderr) for s in p.scores}
        r = p.probe
        agreement = measured(100 * r.top1, None if r.top1_stderr is None else 100 * r.top1_stderr, " %")
        cells = [p.plan.name, str(p.plan.sites), ", ".join(map(str, p.plan.bonds)), percent(p.share), number(p.error)]
        cells += [
            measured(r.kl, r.kl_stderr),
            measured(r.nats_lost, r.nats_lost_stderr),
            number(r.perplexity),
            agreement,
        ]
        rows.append([*cells, *(scores.get(t, "") for t in tasks)])
    return PageTable(f"All {len(rows)} points", head, rows, 2)
