"""Fit the matrices of a block in call order, each to the inputs that the networks before it really produce.

Two streams of hidden states run through the model: `x` of the original and `xh` of what is compressed so far. A matrix makes up for what
the ones before it lost, by a regression on `xh`. Calibration text is little for that, so its windows are dealt into parts: ridge and
strength of each regression are those that do best on a part when fitted to all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import shape, weight
from bondsmith.model.source import ModelError
from bondsmith.model.tracing import Group, added_to_stream, capture_inputs, trace_groups
from bondsmith.rundir import log
from bondsmith.stages.job import Job
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.moment import Moment, means_of, stream_weights
from bondsmith.stages.streams import Stream
from bondsmith.tensor.fit import output_difference, shifted_target
from bondsmith.tensor.regression import Choice, LeftOut

FEW = 0.5  # strength of a correction that no part left out can judge


def traced_groups(
    job: Job, k: int, block: nn.Module, x: Stream, planned: dict[str, MatrixPlan]
) -> tuple[list[Group], list[Group]]:
    """Returns the groups with a matrix to fit, and all groups of the block."""
    with torch.no_grad():
        groups = trace_groups(block, lambda: job.runner.block(k, job.windows(0, 1), job.rows(x, 0, 1)))
    reached = {name for group in groups for name in group.names}
    for name, matrix in planned.items():
        if name not in reached:
            raise ModelError(
                f"{matrix.name}: no calibration token reached this matrix; calibrate on more or other text, "
                f"or keep it dense (keep_dense: '{matrix.name}')"
            )
    return [g for g in groups if any(name in planned for name in g.names)], groups


@dataclass(frozen=True, eq=False)
class Fitting:
    """What fits the matrices of one block.

    Attributes:
        block: the compressed block.
        planned: plans of the matrices to fit, by name in the block.
        outputs: `B` by name.
        put: replaces a matrix by what is fitted to the moment `C` of what it reads and a shift of its weight, (O, I).
    """

    block: nn.Module
    planned: dict[str, MatrixPlan]
    outputs: dict[str, Tensor]
    put: Callable[[str, Tensor | None, Tensor | None], None]


@torch.no_grad()
def fit_propagated(job: Job, k: int, original: nn.Module, fitting: Fitting) -> None:
    """Group after group, the compressed block runs up to it; the original's inputs come from one pass kept on disk."""
    x, after = job.stream("original", k), job.stream("original", k + 1)
    groups, every = traced_groups(job, k, original, x, fitting.planned)
    inputs = [job.temporary(f"input-{i}", g.in_features) for i, g in enumerate(groups)]
    _keep_inputs(job, k, original, groups, x, after, inputs)
    entering = job.rows(x, 0, 1)
    added = added_to_stream(original, every, entering, lambda: job.runner.block(k, job.windows(0, 1), entering))
    trains = bool(job.recipe.blockwise and groups)  # then what leaves the block is computed after the training
    leaves = k + 1 < len(job.runner) and not trains
    last, fitted = None, list[Group]()
    if leaves and groups and groups[-1].last and groups[-1].names[0] in added:
        last = _LastMatrix.of(job, groups[-1].names[0], fitting.block)
    for group, before in zip(groups, inputs, strict=True):
        if group.expert:
            if group not in fitted:
                fitted += _fit_experts(job, k, groups, group, fitting)
            continue
        ending = last if group.last else None
        corrects = bool(job.recipe.stream_strength) and group.names[0] in added
        compared = shape(fitting.block.get_submodule(group.names[0]))[1] != group.in_features
        found = _seen_by_part(job, k, original, fitting.block, group, before, x, after, ending, corrects)
        _fit_group(job, k, group, fitting, found, compared)
        before.remove()
    if last is not None:
        last.finish(fitting.block, job.stream("compressed", k + 1))
    elif leaves:
        leave(job, k, fitting.block)


def _fit_experts(job: Job, k: int, groups: list[Group], first: Group, fitting: Fitting) -> list[Group]:
    """Fits all experts that come with `first` in one pass: they do not read one another; returns their groups.

    They make up for nothing that was lost before, as the tokens that were sent to one are others in the compressed model.
    """
    name = first.names[0].removeprefix(first.expert)
    together = [g for g in groups if g.expert and g.names[0].removeprefix(g.expert) == name]
    xh, moments = (
        job.stream("compressed", k),
        [Moment(shape(fitting.block.get_submodule(g.names[0]))[1], job.device) for g in together],
    )
    for start, count in job.fitted():
        with capture_inputs(fitting.block, together) as seen:
            job.runner.block(k, job.windows(start, count), job.rows(xh, start, count), fitting.block)
        for i, rows in seen.items():
            moments[i].add(rows)
    for group, C in zip(together, means_of(together, moments), strict=True):
        for name in group.names:
            if name in fitting.planned:
                fitting.put(name, C, None)
    return together


@torch.no_grad()
def leave(job: Job, k: int, compressed: nn.Module) -> None:
    """Writes the hidden states that leave the compressed block k."""
    xh, stream = job.stream("compressed", k), job.stream("compressed", k + 1)
    stream.write(job.runner.block(k, job.windows(f), job.rows(xh, f), compressed) for f in job.batches())


@dataclass(frozen=True, eq=False)
class _Seen:
    """Sums over some windows, for one group: `xh` being what reaches it in the compressed copy, `x` what reaches the original.

    Attributes:
        C: `E[xh xh^T]`.
        D: `E[(x - xh) xh^T]`, or `E[(W x - W' xh) xh^T]` where a matrix reads fewer channels than its original.
        R: `E[(r - rh) xh^T]` for the residual stream `r` that the group is added to, or None.
    """

    C: Moment
    D: Moment
    R: Moment | None

    def plus(self, other: _Seen) -> _Seen:
        """Returns the sums over the windows of both."""
        R = None if self.R is None or other.R is None else self.R.plus(other.R)
        return _Seen(self.C.plus(other.C), self.D.plus(other.D), R)

    def moved(self, W: Tensor, job: Job, name: str, compared: bool, last: bool) -> Tensor:
        """`E[e xh^T]`, (O, I) in float64, of what a matrix with weight `W` is to make up for.

        Args:
            compared: `D` is that of outputs.
            last: `R` is that of what leaves the block, and so has the matrix' own share in it.
        """
        given = self.D.mean(name)
        given = given.to(torch.float64) if compared else output_difference(W, given)
        moved = job.recipe.propagation_strength * given
        if self.R is not None:
            moved += job.recipe.stream_strength * (self.R.mean(name) - given if last else self.R.mean(name))
        return moved


class _Parts:
    """What one group sees, in all and part by part; the parts wait on disk."""

    def __init__(self, job: Job, seen: Iterator[_Seen]):
        self._job = job
        self.whole = next(seen)
        torch.save(self.whole, self._file(0))
        self.count, self.judge = 1, self.whole.D.seen
        for part in seen:
            torch.save(part, self._file(self.count))
            self.whole = self.whole.plus(part)
            self.count, self.judge = self.count + 1, self.judge and part.D.seen

    def __iter__(self) -> Iterator[_Seen]:
        """Yields each part."""
        for i in range(self.count):
            yield torch.load(self._file(i), weights_only=False)

    def remove(self) -> None:
        """Deletes what waits on disk."""
        for i in range(self.count):
            self._file(i).unlink()

    def _file(self, part: int) -> Path:
        return self._job.work / f"part-{part}.pt"


def _fit_group(job: Job, k: int, group: Group, fitting: Fitting, seen: Iterator[_Seen], compared: bool) -> None:
    """Fits the matrices of a group."""
    full = job.full_name(k, group.names[0])
    parts = _Parts(job, seen)
    C = parts.whole.C.mean(full)
    names = [name for name in group.names if name in fitting.planned]
    unfitted = {name: weight(fitting.block.get_submodule(name)) for name in names}
    how = (job, full, compared, group.last)
    best = dict.fromkeys(names, (job.recipe.damping, FEW))
    moved = {name: parts.whole.moved(W, *how).float() for name, W in unfitted.items()} if parts.whole.D.seen else {}
    if parts.count > 1 and parts.judge:
        choices = {name: Choice(fitting.outputs.get(name)) for name in names}
        for own in parts:
            left_out = LeftOut.of(parts.whole.C.plus(own.C, -1.0).mean(full), own.C.mean(full), own.C.weight)
            share = own.D.weight / (parts.whole.D.weight - own.D.weight)
            for name, W in unfitted.items():
                of_own = own.moved(W, *how).float()
                of_others = moved[name] + (moved[name] - of_own) * share
                choices[name].see(left_out, of_others, of_own)
        best = {name: choice.best() for name, choice in choices.items()}
    parts.remove()
    for name, W in unfitted.items():
        ridge, strength = best[name]
        log.debug("%s: ridge %g, strength %.2f", job.full_name(k, name), ridge, strength)
        shift = shifted_target(W, moved[name], C, strength, ridge) - W if name in moved else None
        fitting.put(name, C, shift)


def _seen_by_part(
    job: Job,
    k: int,
    original: nn.Module,
    compressed: nn.Module,
    group: Group,
    before: Stream,
    x: Stream,
    after: Stream,
    ending: _LastMatrix | None,
    corrects: bool,
) -> Iterator[_Seen]:
    """Yields what one group sees in the compressed block, part by part."""
    xh, was, now = job.stream("compressed", k), *(b.get_submodule(group.names[0]) for b in (original, compressed))
    (rows, width), device = shape(now), job.device
    compared = width != group.in_features
    norms, whole = job.token_weights(k, group), ending is not None or (corrects and group.last)
    with ExitStack() as stack:
        keep = stack.enter_context(ending.writer()) if ending else None
        for part in _dealt(job.fitted(), job.recipe.parts(len(job.fitted()))):
            C, D = Moment(width, device), Moment(rows if compared else width, device, width)
            R = Moment(rows, device, width) if corrects else None
            for first, count in part:
                with capture_inputs(compressed, [group], stop=not whole) as seen:
                    out = job.runner.block(k, job.windows(first, count), job.rows(xh, first, count), compressed)
                if keep is not None:
                    keep(out, seen[0])
                if not group.every_token:
                    if 0 in seen:
                        C.add(seen[0])
                    continue
                if norms is not None:
                    w: Tensor | None = job.of_batch(norms, first, count)
                else:
                    w = stream_weights(group, job.rows(x, first, count), job.rows(after, first, count))
                C.add(seen[0], w)
                was_seen = job.rows(before, first, count).flatten(0, 1)
                moved = was_seen @ weight(was).T - seen[0] @ weight(now).T if compared else was_seen - seen[0]
                D.add(moved, w, seen[0])
                if R is not None:
                    given = out if group.last else job.rows(xh, first, count)
                    R.add((job.rows(after if group.last else x, first, count) - given).flatten(0, 1), w, seen[0])
            yield _Seen(C, D, R)


def _dealt(batches: list[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """Returns the batches of each part, one after another."""
    ends = [len(batches) * (i + 1) // parts for i in range(parts)]
    return [batches[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def _keep_inputs(
    job: Job, k: int, block: nn.Module, groups: list[Group], x: Stream, after: Stream, inputs: list[Stream]
) -> None:
    """Runs the original block over all windows; writes what leaves it and what each group reads."""
    with ExitStack() as stack:
        put_after = stack.enter_context(after.writer())
        puts = {i: stack.enter_context(inputs[i].writer()) for i, g in enumerate(groups) if g.every_token}
        for first in job.batches():
            with capture_inputs(block, groups) as seen:
                put_after(job.runner.block(k, job.windows(first), job.rows(x, first)))
            for i, write in puts.items():
                write(seen[i])


@dataclass(frozen=True)
class _LastMatrix:
    """Saves the last pass over a block: where its last matrix adds to the output, the output follows from the pass that read its input.

    `out` with the matrix W in place at first and the input `x` of it are kept; with W' in its place the block gives `out + x (W' - W)^T`.
    """

    job: Job
    name: str
    starting: nn.Module
    out: Stream
    fed: Stream

    @classmethod
    def of(cls, job: Job, name: str, compressed: nn.Module) -> _LastMatrix:
        """Returns what the matrix `name`, as it is now in the compressed block, needs."""
        starting = compressed.get_submodule(name)
        fed = job.temporary("last-input", shape(starting)[1])
        return cls(job, name, starting, job.temporary("last-out", job.width), fed)

    @contextmanager
    def writer(self) -> Iterator[Callable[[Tensor, Tensor], None]]:
        """Yields a function that keeps the output of the block and the input of its last matrix for a batch."""
        with self.out.writer() as put_out, self.fed.writer() as put_fed:

            def keep(out: Tensor, fed: Tensor) -> None:
                put_out(out)
                put_fed(fed)

            yield keep

    def finish(self, compressed: nn.Module, leave: Stream) -> None:
        """Writes the hidden states that leave the block to `leave`."""
        change = weight(compressed.get_submodule(self.name)) - weight(self.starting)
        job = self.job
        leave.write(job.rows(self.out, f) + job.rows(self.fed, f) @ change.T for f in job.batches())
        self.out.remove()
        self.fed.remove()
