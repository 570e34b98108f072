"""The layer profile: what every matrix of some blocks costs when it alone is cut, bond by bond (figure 5 of arXiv 2401.14109).

Measured, not predicted: each point is a forward pass with one matrix replaced by its network. `docs/profile.md` holds the schema of the
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from bondsmith.model.blocks import BlockRunner, matrices, replaced_weight, shape, weight
from bondsmith.model.checkpoint import write_json
from bondsmith.stages.fitting import fit_network
from bondsmith.stages.matrix_plan import MatrixPlan, PlanError
from bondsmith.stages.probe import ProbeResult
from bondsmith.stages.wording import measured, number
from bondsmith.tensor.fit import relative_error
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.sites import parse_sites

FORMAT = 1
FILE = "profile-layers.json"


@dataclass(frozen=True)
class Score:
    """A benchmark score: `metric` as lm-eval names it, standard error over rows."""

    task: str
    metric: str
    rows: int
    score: float
    stderr: float | None


@dataclass(frozen=True)
class LayerPoint:
    """One matrix at one size: its network, the relative error of it in the metric, and what it costs the model."""

    plan: MatrixPlan
    keep: float
    error: float
    probe: ProbeResult
    scores: tuple[Score, ...] = ()

    @property
    def bond(self) -> int:
        """The largest bond of the network."""
        return max(self.plan.bonds)

    @property
    def share(self) -> float:
        """Share of the matrix's parameters that the network stores."""
        return self.plan.parameters / self.plan.dense_parameters

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of `profile-layers.json`."""
        return self.plan.to_json() | {
            "keep": self.keep,
            "parameters": self.plan.parameters,
            "error": self.error,
            "probe": {k: v for k, v in self.probe.to_json().items() if k not in ("name", "label")},
            "scores": [asdict(s) for s in self.scores],
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> LayerPoint:
        """Returns the point of an entry."""
        plan = MatrixPlan.from_json(entry)
        probe = ProbeResult(name=plan.name, label=str(plan.bonds), **entry["probe"])
        return cls(plan, entry["keep"], entry["error"], probe, tuple(Score(**s) for s in entry["scores"]))


@dataclass(frozen=True)
class LayerProfile:
    """The points measured so far, in depth order; `settings` and `run` say how and on what.

    Attributes:
        model: name of the model.
        settings: the settings of the profile, plain data.
        run: command, versions, machine, texts, seconds.
        baseline: perplexity of the original on the windows, `windows`, `tokens`; benchmark scores under `scores`.
        planned: how many points there will be.
    """

    model: str
    settings: Mapping[str, Any]
    run: Mapping[str, Any]
    baseline: Mapping[str, Any]
    planned: int
    points: tuple[LayerPoint, ...] = field(default=())

    _HEAD: ClassVar = ("model", "settings", "run", "baseline", "planned")

    @property
    def complete(self) -> bool:
        """True once all points are there."""
        return len(self.points) == self.planned

    def with_points(self, points: Sequence[LayerPoint]) -> LayerProfile:
        """Returns the profile with more points."""
        return replace(self, points=(*self.points, *points))

    def save(self, directory: Path) -> None:
        """Writes `profile-layers.json`, whole or not at all."""
        head = {"format": FORMAT, "complete": self.complete} | {k: getattr(self, k) for k in self._HEAD}
        write_json(directory / FILE, head | {"points": [p.to_json() for p in self.points]})

    @classmethod
    def load(cls, directory: Path) -> LayerProfile:
        """Returns the profile in a directory; ValueError if there is none or it is of a newer format."""
        path = directory / FILE
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no layer profile: run bondsmith profile MODEL --layers --out {directory}"
            )
        content = json.loads(path.read_text())
        if content["format"] > FORMAT:
            raise ValueError(f"{path} has format {content['format']}, this bondsmith reads up to {FORMAT}: upgrade it")
        points = tuple(LayerPoint.from_json(p) for p in content["points"])
        model, settings, run, baseline, planned = (content[k] for k in cls._HEAD)
        return cls(model, settings, run, baseline, planned, points)

    def tables(self) -> list[Table]:
        """Returns one table per figure: KL, perplexity, and each benchmark task; a row per matrix, a column per size."""
        tables = [
            self._table(
                "KL to the original, nats a token",
                lambda p: measured(p.probe.kl, p.probe.kl_stderr),
                "± one standard error",
            ),
            self._table(
                "perplexity",
                lambda p: number(p.probe.perplexity),
                f"the original has {number(self.baseline['perplexity'])} on the same {self.baseline['tokens']:,} tokens",
            ),
        ]
        for before in self.baseline["scores"]:
            title = f"{before['task']}, {before['metric']}, {before['rows']:,} rows"
            note = f"the original has {measured(before['score'], before['stderr'])}; ± one standard error"
            tables.append(self._table(title, _score_cell(before["task"], before["metric"]), note))
        return tables

    def _table(self, title: str, cell: Any, note: str) -> Table:
        keeps = sorted({p.keep for p in self.points})
        table = Table(
            title=title,
            caption=f"{self.settings['metric']} metric, sites {self.settings['sites']}; {note}",
            caption_justify="left",
        )
        table.add_column("block", justify="right", no_wrap=True)
        table.add_column("matrix", no_wrap=True)
        table.add_column("out × in", justify="right", no_wrap=True)
        for keep in keeps:
            table.add_column(f"{100 * keep:g} % kept", justify="right")
        found = {(p.plan.name, p.keep): p for p in self.points}
        block = None
        for plan in {p.plan.name: p.plan for p in self.points}.values():
            if plan.block != block:
                table.add_section()
            cells = [cell(found[plan.name, k]) if (plan.name, k) in found else "" for k in keeps]
            kind = plan.name.rpartition(f".{plan.block}.")[2]
            head = "" if plan.block == block else str(plan.block)
            table.add_row(head, kind, f"{plan.out_features} × {plan.in_features}", *cells)
            block = plan.block
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as capture:
            for table in self.tables():
                console.print(table)
        return capture.get()


def _score_cell(task: str, metric: str) -> Any:
    def cell(point: LayerPoint) -> str:
        found = next((s for s in point.scores if (s.task, s.metric) == (task, metric)), None)
        return "" if found is None else measured(found.score, found.stderr)

    return cell


def default_blocks(count: int) -> list[int]:
    """Returns the first block, the one at a sixth of the depth, the middle one and the last.

    >>> default_blocks(30), default_blocks(2)
    ([0, 5, 15, 29], [0, 1])
    """
    return sorted({0, count // 6, count // 2, count - 1})


def plan_points(
    runner: BlockRunner, blocks: Sequence[int], keeps: Sequence[float], sites: str, gauge: bool
) -> list[tuple[float, MatrixPlan]]:
    """Returns (keep, network) of every point, in depth order, smallest first; equal networks of one matrix once.

    Raises:
        PlanError: a block that is not there, or sites that do not fit or are too large for a keep; names it.
    """
    for k in blocks:
        if not 0 <= k < len(runner):
            raise PlanError(f"blocks: {k} is not there; the model has blocks 0 to {len(runner) - 1}")
    points: list[tuple[float, MatrixPlan]] = []
    for k in sorted(set(blocks)):
        for name, matrix in matrices(runner.blocks[k]).items():
            seen = set()
            for keep in sorted(set(keeps)):
                plan = _network(f"{runner.path}.{k}.{name}", k, *shape(matrix), keep, sites, gauge)
                if plan.bonds not in seen:
                    seen.add(plan.bonds)
                    points.append((keep, plan))
    return points


def _network(name: str, block: int, rows: int, columns: int, keep: float, sites: str, gauge: bool) -> MatrixPlan:
    try:
        shaped = parse_sites(sites, rows, columns)
        pivoted = gauge and shaped.is_matrix_cut
        bonds = shaped.bonds_within(int(keep * rows * columns), pivoted)
    except ValueError as error:
        raise PlanError(f"{name}: {rows} x {columns} at keep {keep:g}: {error}") from error
    return MatrixPlan(name, block, rows, columns, shaped, bonds, pivoted)


@torch.no_grad()
def cut(matrix: nn.Module, plan: MatrixPlan, C: Tensor | None, B: Tensor | None, damping: float) -> tuple[MPO, float]:
    """Returns the network of `plan` for `matrix`, and its relative error in the metric."""
    W = weight(matrix)
    try:
        mpo = fit_network(W, plan, C, B, damping)
    except (ValueError, RuntimeError) as error:
        raise PlanError(f"{plan.name}: {error}") from error
    return mpo, relative_error(W, mpo.to_matrix(), C, B)


class Variants(Mapping[str, PreTrainedModel]):
    """One model in memory under several names: asking for a name puts that name's weight in the place of a matrix's.

    >>> layer = nn.Sequential(nn.Linear(1, 1))
    >>> with Variants.of(layer, "0", {"zero": torch.zeros(1, 1)}) as variants:
    ...     [float(model[0].weight) for model in variants.values()]
    [0.0]
    """

    def __init__(self, model: Any, matrix: str, weights: Mapping[str, Tensor]):
        self._model, self._matrix, self._weights = model, model.get_submodule(matrix), weights
        self._open: Any = None

    @classmethod
    @contextmanager
    def of(cls, model: Any, matrix: str, weights: Mapping[str, Tensor]) -> Iterator[Variants]:
        """Yields the variants; the model is as it was afterwards."""
        variants = cls(model, matrix, weights)
        try:
            yield variants
        finally:
            variants._close()

    def __getitem__(self, label: str) -> PreTrainedModel:
        self._close()
        self._open = replaced_weight(self._matrix, self._weights[label])
        self._open.__enter__()
        return self._model

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
