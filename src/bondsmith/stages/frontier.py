"""How small a model can get for how much loss: one plan per size, by cutting alone, by rounding alone, and by both together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bondsmith.recipe import Recipe
from bondsmith.stages.figures import Curves, Line, Panel, Point, axis
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import Profile
from bondsmith.stages.profile_page import PageTable, Section
from bondsmith.stages.wording import number, percent, size

MODES: Mapping[str, Mapping[str, Any]] = {
    "cut and rounded": {"bits": [16, 8, 4, 3, 2]},
    "rounded alone": {"bits": [16, 8, 4, 3, 2], "channels": False, "bounds": {"*": [1, 1]}},
    "cut alone": {"bits": [16]},
}
LOSSES = (0.01, 0.03, 0.1)  # tolerated rise of perplexity
STEPS = 14  # sizes per mode, even on a logarithmic axis
_NEAR_ALL = (0.95, 0.9, 0.85, 0.8)  # and of the original, where cuts begin
_SMALLEST = 1 / 60  # of the original at four bytes a parameter


@dataclass(frozen=True)
class Step:
    """A plan on the frontier: bytes of its weight files, parameters of the model, loss to be expected in nats a token."""

    mode: str
    bytes: int
    parameters: int
    loss: float


@dataclass(frozen=True)
class Measured:
    """A compressed model: its size, its divergence from the original as measured and as its plan predicted, nats a token.

    `predicted` is None where the plan was not chosen by predicted loss.
    """

    label: str
    bytes: int
    parameters: int
    kl: float
    predicted: float | None = None


@dataclass(frozen=True)
class Scale:
    """From predicted to expected loss, through what was measured: a straight line between models on logarithmic axes, steady ratios beyond.

    >>> scale = Scale.through([Measured("a", 1, 1, kl=0.3, predicted=0.1), Measured("b", 1, 1, kl=4.0, predicted=1.0)])
    >>> [round(loss, 6) for loss in (scale.expected(0.1), scale.expected(0.01), scale.predicted(0.3))]
    [0.3, 0.03, 0.1]
    """

    points: tuple[tuple[float, float], ...] = ()  # log predicted, log ratio

    @classmethod
    def through(cls, measured: Sequence[Measured]) -> Scale:
        """The scale that these models set; models without a prediction say nothing of it."""
        known = [(m.predicted, m.kl) for m in measured if m.predicted and m.kl > 0]
        return cls(tuple(sorted((math.log(p), math.log(kl / p)) for p, kl in known)))

    def expected(self, predicted: float) -> float:
        """The loss to expect where `predicted` is predicted."""
        if not self.points or predicted <= 0:
            return predicted
        x, ratio = zip(*self.points, strict=True)
        return predicted * math.exp(float(np.interp(math.log(predicted), x, ratio)))

    def predicted(self, expected: float) -> float:
        """The largest predicted loss at which no more than `expected` is to be expected."""
        low, high = expected / 1e3, expected * 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.expected(middle) <= expected else (low, middle)
        return float(f"{low:.9g}")


@dataclass(frozen=True)
class Frontier:
    """Loss to be expected against size, and the smallest sizes for tolerated rises of perplexity (None where out of reach).

    Attributes:
        full: bytes of the original at four bytes a parameter.
        answers: (mode, tolerated rise) -> bytes of the smallest plan.
    """

    model: str
    full: int
    parameters: int
    steps: tuple[Step, ...]
    answers: Mapping[tuple[str, float], int | None]
    measured: tuple[Measured, ...] = field(default=())

    @property
    def note(self) -> str:
        """Returns what the losses are worth."""
        if Scale.through(self.measured).points:
            return "Predicted losses are scaled by what the measured models lost over what was predicted for them."
        return (
            "Predicted losses are of second order; measured ones are often two to three times as large, more where much is lost. "
            "With models that were compressed and measured beside them (--measured DIR) they are scaled by these."
        )

    def table(self) -> Table:
        """Returns how small the model can get, by tolerated rise of perplexity."""
        heads = (f"{percent(r)} loss" for r in LOSSES)
        table = Table("smallest weight files", *heads, title=self.model, caption=self.note)
        for mode in dict.fromkeys(mode for mode, _ in self.answers):
            cells = (self.answers[mode, rise] for rise in LOSSES)
            table.add_row(mode, *("-" if b is None else f"{size(b)} ({percent(b / self.full)})" for b in cells))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def predict_frontier(
    profile: Profile,
    settings: Mapping[str, Any],
    measured: Mapping[str, Path],
    advance: Callable[[float], None] = lambda share: None,
) -> Frontier:
    """Returns the frontier of a profiled model.

    Args:
        profile: in the loss metric; others predict no nats.
        settings: of a recipe, besides budgets, bits and channels.
        measured: labels -> compressed directories with a `results.json`.

    Raises:
        PlanError: the profile is of another metric, or holds no loss of rounding.
    """
    if profile.metric != "loss":
        raise PlanError(
            f"frontier: the profile is in the {profile.metric} metric, which predicts no nats; profile with --metric loss"
        )
    total = profile.other_parameters + sum(m.out_features * m.in_features for m in profile.matrices)
    found = tuple(_measured(label, directory, total) for label, directory in measured.items())
    scale = Scale.through(found)
    steps: list[Step] = []
    answers: dict[tuple[str, float], int | None] = {}
    for i, (mode, own) in enumerate(MODES.items()):
        shared = {k: v for k, v in settings.items() if k not in own} | dict(own)
        steps += _steps(profile, shared, mode, 4 * total, scale)
        for j, rise in enumerate(LOSSES):
            plan = _plan(profile, shared | {"loss": scale.predicted(math.log1p(rise))})
            answers[mode, rise] = None if plan is None else plan.bytes(profile.itemsize)
            advance((i + (j + 1) / len(LOSSES)) / len(MODES))
    return Frontier(profile.model, 4 * total, total, tuple(steps), answers, found)


def frontier_sections(frontier: Frontier) -> list[Section]:
    """Returns the sections of the page: loss against bytes and against parameters, and the table of sizes."""
    losses = [*(s.loss for s in frontier.steps), *(m.kl for m in frontier.measured)]
    y = axis("loss, nats a token", [v for v in losses if v > 0], log=True)
    panels = []
    for title, key, whole in (
        ("against bytes", "bytes", frontier.full),
        ("against parameters", "parameters", frontier.parameters),
    ):
        shares = [getattr(s, key) / whole for s in (*frontier.steps, *frontier.measured)]
        x = axis(f"{key}, of the original" + (" at 4 a parameter" if key == "bytes" else ""), shares, log=True)
        lines = []
        for tone, mode in enumerate(MODES):
            own = [s for s in frontier.steps if s.mode == mode and s.loss > 0]
            points = [Point(getattr(s, key) / whole, s.loss, f"{size(s.bytes)}: {number(s.loss)} nats") for s in own]
            lines.append(Line(mode, tone, tuple(sorted(points, key=lambda p: p.x))))
        for tone, m in enumerate(frontier.measured, len(MODES)):
            lines.append(Line(f"{m.label} (measured)", tone, (Point(getattr(m, key) / whole, m.kl, m.label),)))
        panels.append(Panel(title, tuple(lines), x, y))
    head = ["plan", "bytes", "of the original", "parameters", "loss, nats a token"]
    rows = [
        [s.mode, size(s.bytes), percent(s.bytes / frontier.full), f"{s.parameters:,}", number(s.loss)]
        for s in frontier.steps
    ]
    rows += [
        [f"{m.label} (measured)", size(m.bytes), percent(m.bytes / frontier.full), f"{m.parameters:,}", number(m.kl)]
        for m in frontier.measured
    ]
    text = [
        "Lines: divergence from the original to be expected of the best plan for each number of bytes, in the right panel drawn against "
        "its parameters; single marks: compressed models, measured. " + frontier.note,
        *(
            f"{mode}: "
            + ", ".join(
                f"{percent(rise)} loss at {'no size' if b is None else size(b)}"
                for rise in LOSSES
                for b in [frontier.answers[mode, rise]]
            )
            for mode in MODES
        ),
    ]
    return [
        Section("How small for how much loss", text, [Curves(tuple(panels))], [PageTable("All points", head, rows)])
    ]


def _steps(profile: Profile, settings: Mapping[str, Any], mode: str, full: int, scale: Scale) -> list[Step]:
    found = []
    even = [_SMALLEST ** (i / (STEPS - 1)) for i in range(STEPS)]
    for share in sorted({*even, *_NEAR_ALL}, reverse=True):
        plan = _plan(profile, dict(settings) | {"bytes": f"{share * full:.0f}B"})
        if plan is not None:
            found.append(Step(mode, plan.bytes(profile.itemsize), plan.parameters, scale.expected(plan.loss or 0.0)))
    return list({step.bytes: step for step in found}.values())


def _plan(profile: Profile, settings: Mapping[str, Any]) -> Plan | None:
    recipe = Recipe.from_settings(dict(settings))
    try:
        return planned(profile, recipe)
    except PlanError:
        return None


def _measured(label: str, directory: Path, parameters: int) -> Measured:
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise PlanError(f"{directory} has no results.json: give a directory that `bondsmith compress` wrote")
    results = json.loads(path.read_text())
    rows, sizes, before = results.get("quality") or [], results["size"]["compressed"], results["size"]["original"]
    if before["parameters"] != parameters:
        raise PlanError(
            f"{directory} was made from a model of {before['parameters']:,} parameters, the profile is of one of {parameters:,}: give a "
            "directory that was compressed from the same model"
        )
    if not rows:
        raise PlanError(
            f"{directory} was compressed with --no-evaluate: there is no measured divergence in its results.json"
        )
    kl = sum(row["kl"] for row in rows) / len(rows)
    plan = Plan.load(Path(directory) / "plan.json") if (Path(directory) / "plan.json").is_file() else None
    return Measured(label, sizes["bytes"], sizes["parameters"], kl, plan.loss if plan else None)
