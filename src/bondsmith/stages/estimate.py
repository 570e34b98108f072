"""What a compression will give and what it will take, from the configuration of a model alone: no weight is read.

Sizes follow from the plan and are exact but for file headers. Memory, disk and time follow from counts of numbers and multiply-adds of
the stages, the time with rates that this machine reaches in a second of trial; `docs/profile.md` compares them with real runs.

Legend: `O, I` out and in features of a matrix, `n` its smaller side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import psutil
import torch
from rich.table import Table
from rich.text import Text

from bondsmith.data import SELF
from bondsmith.model.facts import Facts
from bondsmith.recipe import UNROUNDED, Recipe, RecipeError, parse_bytes
from bondsmith.stages.matrix_plan import MatrixPlan, PlanError
from bondsmith.stages.plan import Needs, Plan
from bondsmith.stages.profile import Profile
from bondsmith.stages.rates import Speed
from bondsmith.stages.uniform import uniform_plan
from bondsmith.stages.wording import count, duration, number, size
from bondsmith.tensor.sites import parse_sites

# One calibration window in six also gives gradients, since a backward pass costs four times a forward pass; but so many tokens at least.
GRADIENT_LEAST = 4096
_BATCH_TOKENS = 2048
_PROCESS = 450e6  # bytes of Python, torch and transformers
_FORWARD = 1.35  # a pass over its matrices' multiply-adds: attention, norms, activations (measured)
_ROUNDING = 12  # passes of rows x columns^2 multiply-adds that error compensation and fitted scales take, about
_BACKWARD = 2.4  # a backward pass with second moments, over a forward pass


Shapes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Estimate:
    """Sizes before and after, and what it takes.

    >>> shapes = {"blocks.0.up": (0, 64, 32), "blocks.0.down": (0, 32, 64)}
    >>> facts = Facts("tiny", "Tiny", shapes, {"embed": (100, 32)}, 3300, 3200, 64, 32, 100, torch.float16, 14792, "its configuration")
    >>> found = estimate(facts, Recipe(keep=0.5))
    >>> found.plan.parameters, found.multiply_adds
    (5316, (7296, 5216))
    """

    facts: Facts
    recipe: Recipe
    dtype: torch.dtype
    plan: Plan
    bits: int
    needs: Needs

    @property
    def bytes(self) -> int:
        """Size of the compressed weight files."""
        return self.plan.bytes(self.dtype.itemsize)

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Multiply-adds a token before and after, matrices and head; attention scores come on top."""
        after = sum(m.multiply_adds for m in self.plan.matrices)
        return self.facts.multiply_adds + self.facts.head, after + self.facts.head

    def tables(self) -> list[Table]:
        """Returns the table of sizes and that of needs."""
        return [self._sizes(), self._needs()]

    def _sizes(self) -> Table:
        f, p = self.facts, self.plan
        own, saved = str(f.dtype).removeprefix("torch."), str(self.dtype).removeprefix("torch.")
        table = Table(
            title=Text(f"{f.name}: {f.architecture}, {f.blocks} blocks, {len(f.shapes)} matrices"),
            caption=Text(
                f"dtype and size of the checkpoint: from {f.known_from}. Head included in multiply-adds, attention scores not."
            ),
            caption_justify="left",
        )
        table.add_column("")
        for heading in (
            "original",
            f"keep {p.keep:.3f}" + (f", {self.bits} bits" if self.bits != UNROUNDED else ""),
            "change",
        ):
            table.add_column(heading, justify="right", no_wrap=True)

        def row(label: str, before: float, after: float, say: Callable[[float], str]) -> None:
            table.add_row(label, say(before), say(after), f"× {number(after / before)}")

        row("parameters", f.parameters, p.parameters, count)
        row("parameters of the matrices", f.matrix_parameters, p.parameters - p.other_parameters, count)
        for name, (rows, columns) in f.tables.items():
            row(f"parameters of {name}", rows * columns, rows * columns, count)
        if self.bits == UNROUNDED:
            row("bytes in float32", 4 * f.parameters, p.bytes(4), size)
            row("bytes in float16", 2 * f.parameters, p.bytes(2), size)
        else:
            saved = f"{self.bits} bits"
        row(f"checkpoint ({own}) → {saved}", f.stored_bytes, self.bytes, size)
        if self.bits != UNROUNDED or self.dtype.itemsize != 4:
            row(f"4 bytes a parameter → {saved}", 4 * f.parameters, self.bytes, size)
        row("multiply-adds a token", *self.multiply_adds, count)
        if f.cache_per_token is not None:
            cache = 1000 * f.cache_per_token * self.dtype.itemsize
            row(f"cache of 1,000 tokens ({str(self.dtype).removeprefix('torch.')})", cache, cache, size)
        return table

    def _needs(self) -> Table:
        free = psutil.virtual_memory().available
        r = self.recipe
        how = f"{r.metric} metric, {r.tokens:,} calibration tokens" if r.needs_moments else "frobenius metric, no text"
        table = Table(
            title=f"to carry it out, about ({how})",
            caption=f"{size(free)} of memory are free here; block by block, so depth costs no memory. Without measuring quality and speed.",
            caption_justify="left",
        )
        table.add_column("")
        table.add_column("in all", justify="right", no_wrap=True)
        table.add_column("of that")
        parts: list[tuple[str, Mapping[str, float], Callable[[float], str]]] = [
            ("memory at the peak", self.needs.memory, size),
            ("disk besides the original", self.needs.disk, size),
        ]
        if self.needs.seconds is not None:
            parts.append(("time on this machine", self.needs.seconds, duration))
        for label, found, say in parts:
            shown = ", ".join(f"{name} {say(value)}" for name, value in found.items() if value)
            table.add_row(label, say(sum(found.values())), shown)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            for table in self.tables():
                console.print(table)
        return capture.get()


def estimate(facts: Facts, recipe: Recipe, speed: Speed | None = None) -> Estimate:
    """Returns sizes and needs of compressing a model by a recipe, all matrices alike.

    A planner may spend the same budget better, matrix by matrix; that needs the weights. Where a size is given and several bit widths
    are allowed, the widest at which at least `MOSTLY` of the parameters stay is taken, or else the one at which most stay.

    Args:
        speed: rates of the machine, from `measure_speed`; without them no time is estimated.

    Raises:
        PlanError: the budget cannot be met; says the smallest size that can, and what holds it up.
        RecipeError: the budget is a predicted loss, which needs the weights.
    """
    if recipe.keep is None and recipe.bytes is None:
        raise RecipeError("an estimate takes keep or bytes: what other budgets lead to is decided by the weights")
    if recipe.metric == "auto":
        recipe = recipe.changed(metric="loss")
    dtype = facts.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    plan, bits = _alike(facts, recipe, dtype)
    needs = Needs(_memory(facts, recipe), _disk(facts, recipe, plan, dtype), _seconds(facts, recipe, plan, speed))
    return Estimate(facts, recipe, dtype, plan, bits, needs)


MOSTLY = 0.75


def plan_needs(plan: Plan, profile: Profile, recipe: Recipe, speed: Speed) -> Needs:
    """Returns what it takes to carry out a plan whose profile is at hand: gradients and curves need not be made again.

    Args:
        recipe: with the calibration of the profile.
    """
    shapes = {m.name: (m.block, m.out_features, m.in_features) for m in profile.matrices}
    tables = {t.name: (t.rows, t.columns) for t in profile.tables}
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[profile.itemsize]
    facts = _facts(profile.model, shapes, tables, profile.other_parameters, dtype)
    seconds = _seconds(facts, recipe, plan, speed) or {}
    left = {k: v for k, v in seconds.items() if k not in ("gradients", "profile", "writing text")}
    disk = {k: v for k, v in _disk(facts, recipe, plan, dtype).items() if k != "gradients"}
    return Needs(_memory(facts, recipe), disk, left)


def _alike(facts: Facts, recipe: Recipe, dtype: torch.dtype) -> tuple[Plan, int]:
    """Returns the plan in which all matrices are alike, and its bits (16: not rounded)."""
    found: list[tuple[Plan, int]] = []
    failed: PlanError | None = None
    for grid in recipe.grids:
        bits = grid.bits if grid else UNROUNDED
        own = recipe.changed(uniform=True, bits=(bits,), multiply_adds=None, loss=None)
        try:
            plan = uniform_plan(facts.shapes, facts.other_parameters, own, dtype.itemsize, _tables(facts)).with_shares(
                facts.shares
            )
        except PlanError as error:
            failed = error
            continue
        found.append((plan, bits))
        if plan.keep >= MOSTLY:
            break
    if not found:
        assert failed is not None
        raise PlanError(_out_of_reach(facts, recipe, dtype, failed)) from failed
    return max(found, key=lambda pair: pair[0].keep)


def _tables(facts: Facts) -> tuple[MatrixPlan, ...]:
    return tuple(MatrixPlan(name, -1, *shape) for name, shape in facts.tables.items())


def smallest_plan(facts: Facts, recipe: Recipe) -> tuple[Plan, str]:
    """Returns the smallest plan in which all matrices are alike, and the matrix that forbids a smaller one, at bond 1."""
    least = {}
    for name, (_, rows, columns) in facts.shapes.items():
        if not any(fnmatch(name, pattern) for pattern in recipe.keep_dense):
            sites = parse_sites(recipe.sites, rows, columns)
            stored = sites.parameters(sites.clip(1), recipe.gauge and sites.is_matrix_cut)
            least[name] = min(1.0, (stored + 0.5) / (rows * columns))
    name = max(least, key=lambda n: least[n], default="")
    bits = min(grid.bits if grid else UNROUNDED for grid in recipe.grids)
    own = recipe.changed(
        keep=least.get(name, 1.0), bytes=None, uniform=True, bits=(bits,), multiply_adds=None, loss=None
    )
    return uniform_plan(facts.shapes, facts.other_parameters, own, 2, _tables(facts)), name


def _out_of_reach(facts: Facts, recipe: Recipe, dtype: torch.dtype, error: PlanError) -> str:
    """Returns what to say of a budget that nothing meets."""
    try:
        least, tightest = smallest_plan(facts, recipe)
    except ValueError:  # the sites do not fit a matrix: the error says which
        return str(error)
    each = dtype.itemsize
    asked = f"keep: {recipe.keep}"
    if recipe.bytes is not None:
        asked = f"bytes: {recipe.bytes} is {size(parse_bytes(recipe.bytes, facts.parameters))}"
    grid = next((m.grid for m in least.matrices if m.grid), None)
    stored = str(dtype).removeprefix("torch.") if grid is None else f"{grid.bits} bits"
    stays = {m.name: m.bytes(each) for m in (least.tables or _tables(facts))}
    ends = sum(r * c for r, c in facts.tables.values())
    stays["norms and biases"] = (facts.other_parameters - ends - facts.experts) * each
    stays["experts in tensors of three dimensions"] = facts.experts * each
    stays["networks"] = sum(m.bytes(each) for m in least.matrices if m.sites is not None)
    stays["matrices kept dense"] = sum(m.bytes(each) for m in least.matrices if m.sites is None)
    parts = ", ".join(f"{n} {size(v)}" for n, v in sorted(stays.items(), key=lambda kv: -kv[1]) if v)
    total = least.bytes(each)
    share = total / (4 * facts.parameters)
    text = f"{asked}, but the smallest size in {stored} is {size(total)} ({share:.4f} of 4 bytes a parameter): {parts}"
    if tightest:
        text += f". At keep {least.keep:.4f} {tightest} is down to bond 1"
    looser = " or fewer bits" if grid is None or grid.bits > 2 else ""
    return f"{text}; give a larger budget{looser}"


def gradient_windows(recipe: Recipe, windows: int, window: int) -> int:
    """Returns how many of the windows, of `window` tokens each, give gradients."""
    return min(windows, max(math.ceil(recipe.gradient_share * windows), -(-GRADIENT_LEAST // window)))


def _gradient_tokens(recipe: Recipe) -> int:
    if recipe.metric != "loss":
        return 0
    return recipe.window * gradient_windows(recipe, recipe.tokens // recipe.window, recipe.window)


def _memory(facts: Facts, recipe: Recipe, sampling: bool = True) -> dict[str, float]:
    """Returns the bytes in memory at the peak, by what they are; `sampling`: the model may have to write its own text."""
    largest = max(sum(o * i for o, i in facts.block(k)) for k in range(facts.blocks))
    found = {
        "process": _PROCESS,
        "embedding and head": 4.0 * sum(r * c for r, c in facts.tables.values()),
        "two blocks": 8.0 * largest,
    }
    if not recipe.needs_moments:
        return found | {"fit": max(24.0 * o * i for _, o, i in facts.shapes.values())}
    rows = [o * i for _, o, i in facts.shapes.values()], [i * i for _, _, i in facts.shapes.values()]
    moments = 8.0 if recipe.parts(recipe.tokens // _BATCH_TOKENS) > 1 else 0.0  # of one part, and of all others
    fit = max(24.0 * oi + 40.0 * ii + moments * (2 * ii + oi) for oi, ii in zip(*rows, strict=True))
    passing = 4.0 * _BATCH_TOKENS * max(sum(o + i for o, i in facts.block(k)) for k in range(facts.blocks)) / 2
    gradients = _gradient_memory(facts, recipe) if recipe.metric == "loss" else 0.0
    stage = "fit of the largest matrix" if fit >= gradients else "gradients"
    found |= {stage: max(fit, gradients), "hidden states of a batch": passing}
    if sampling and SELF in recipe.calibration:
        whole = 4.0 * facts.parameters
        inside = sum(found.values()) - _PROCESS
        if whole > inside:
            return {"process": _PROCESS, "the whole model, to write its own calibration text": whole * 1.05}
    return found


def _gradient_memory(facts: Facts, recipe: Recipe) -> float:
    """Returns the bytes that a pass back through one block takes, its moments and the logits of a window included."""
    outputs = max(sum(o * o + i * i for o, i in facts.block(k)) for k in range(facts.blocks))
    return 4.0 * (5 * recipe.window * facts.vocabulary + outputs)


def memory_needed(shapes: Shapes, tables: Mapping[str, tuple[int, int]], recipe: Recipe) -> float:
    """Returns the bytes in memory at the peak of a compression besides the process, from the shapes of a model alone.

    Args:
        shapes: matrix name -> (block, out features, in features).
        tables: embedding, and head where it has weights of its own: name -> (vocabulary, width).
    """
    found = _memory(_facts("", shapes, tables, 0, torch.float32), recipe, sampling=False)
    return sum(found.values()) - found["process"]


def _facts(name: str, shapes: Shapes, tables: Mapping[str, tuple[int, int]], other: int, dtype: torch.dtype) -> Facts:
    vocabulary, width = max(tables.values(), default=(0, 0))
    return Facts(name, "", shapes, tables, other, vocabulary * width, None, width, vocabulary, dtype, 0, "")


def _disk(facts: Facts, recipe: Recipe, plan: Plan, dtype: torch.dtype) -> dict[str, float]:
    found: dict[str, float] = {"weights": plan.bytes(dtype.itemsize)}
    if recipe.needs_moments:
        inputs = max(sum(i for _, i in facts.block(k)) for k in range(facts.blocks))
        found["hidden states"] = 4.0 * recipe.tokens * (4 * facts.width + inputs)
    if recipe.metric == "loss":
        moments = sum(o * o for _, o, _ in facts.shapes.values()) + sum(_groups(facts.block(0))) * facts.blocks
        found["gradients"] = 4.0 * (_gradient_tokens(recipe) * facts.width * (facts.blocks + 3) + moments)
    return found


def _groups(matrices: list[tuple[int, int]]) -> list[int]:
    """Returns the squared widths of the inputs that are told apart: neighbours of the same width count as one."""
    widths: list[int] = []
    for _, i in matrices:
        if not widths or widths[-1] != i:
            widths.append(i)
    return [w * w for w in widths]


def _seconds(facts: Facts, recipe: Recipe, plan: Plan, speed: Speed | None) -> dict[str, float] | None:
    """Returns seconds by stage."""
    if speed is None:
        return None
    inside, found = facts.multiply_adds, {}
    if SELF in recipe.calibration:
        share = recipe.tokens // len(recipe.calibration)
        found["writing text"] = share * (inside + facts.head) * _FORWARD * 2.5 / speed.single
    if recipe.metric == "loss":
        once = (inside + facts.head) * _FORWARD / speed.single
        found["gradients"] = _gradient_tokens(recipe) * once * (1 + _BACKWARD)
    if recipe.needs_moments:
        moments = sum(_groups(facts.block(0))) * facts.blocks * (1.6 if recipe.propagate else 0.6)
        passes = 3.2 if recipe.propagate else 1.1  # measured: closed_form.py in docs/decisions.md
        found["passes and moments"] = recipe.tokens * (passes * inside * _FORWARD + 2.0 * moments) / speed.single
    if recipe.planned:
        found["profile"] = sum(_fit_seconds(m, recipe.changed(propagate=False), speed) for m in plan.matrices)
    found["networks"] = sum(_fit_seconds(m, recipe, speed) for m in plan.matrices if m.sites is not None)
    parts = recipe.parts(recipe.tokens // _BATCH_TOKENS)
    if parts > 1:
        found["parts left out"] = parts * sum(_judge_seconds(m, speed) for m in plan.matrices if m.fitted)
    if recipe.needs_moments:
        rounded = [m for m in (*plan.matrices, *plan.tables) if m.grid is not None]
        found["rounding"] = sum(_ROUNDING * m.rows * m.columns**2 for m in rounded) / speed.double
    return found


def _fit_seconds(matrix: MatrixPlan, recipe: Recipe, speed: Speed) -> float:
    rows, columns = matrix.out_features, matrix.in_features
    n = min(rows, columns)
    roots = {"frobenius": 1, "input": 1 + (rows > columns), "loss": 2}[recipe.metric]
    products = rows * columns * (2 * n + (columns if recipe.needs_moments else 0))
    solve = columns**2 * (rows + columns) if recipe.needs_moments and recipe.propagate else 0
    many = 1 if matrix.sites is None or matrix.sites.is_matrix_cut else 6
    return many * (roots * speed.eigh * (n / 1024) ** 3 + (products + solve) / speed.double)


def _judge_seconds(matrix: MatrixPlan, speed: Speed) -> float:
    """Returns the seconds in which all ridges are judged on one part; matrices with one input share its eigenvectors, about two do."""
    rows, columns = matrix.rows, matrix.columns
    products = rows * columns * (rows + 3 * columns) + columns**3
    return speed.eigh * (columns / 1024) ** 3 / 2 + products / speed.single + rows * columns**2 / speed.double
