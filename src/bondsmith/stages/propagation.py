"""Fit the matrices of a block in call order, each to the inputs that the networks before it really produce.

Two streams of hidden states run through the model: `x` of the original and `xh` of what is compressed so far. A matrix makes up for what
the ones before it lost, by a regression on `xh`. Calibration text is little for that, so its windows are dealt into parts, and each runs
through a copy of the block of its own that was fitted without it: what the copies give is what the compressed model gives on text it
never saw, and so are the errors to make up for. Ridge and strength of each regression are those that do best on the part left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bondsmith.model.blocks import shape, weight
from bondsmith.model.source import ModelError
from bondsmith.model.tracing import Group, added_to_stream, capture_inputs, trace_groups
from bondsmith.rundir import log
from bondsmith.stages.fitting import dense_layer, plain_form
from bondsmith.stages.job import Job
from bondsmith.stages.moment import Moment, stream_weights
from bondsmith.stages.plan import MatrixPlan
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
        block: the compressed block; where there are no copies, matrices are replaced in it as they are fitted.
        planned: plans of the matrices to fit, by name in the block.
        outputs: `B` by name.
        fit: gives the layer for a matrix from the moment `C` of what it reads and a shift of its weight, (O, I); keeps nothing.
        put: the same, and the layer is kept to be saved; gives its dense form.
    """

    block: nn.Module
    planned: dict[str, MatrixPlan]
    outputs: dict[str, Tensor]
    fit: Callable[[str, Tensor | None, Tensor | None], nn.Module]
    put: Callable[[str, Tensor | None, Tensor | None], nn.Module]


@torch.no_grad()
def fit_propagated(job: Job, k: int, original: nn.Module, fitting: Fitting) -> None:
    """Group after group, copies of the block run up to it; the original's inputs come from one pass kept on disk.

    Where the windows make up one part only, the compressed block itself takes the place of the copies.
    """
    x, after = job.stream("original", k), job.stream("original", k + 1)
    groups, every = traced_groups(job, k, original, x, fitting.planned)
    inputs = [job.temporary(f"input-{i}", g.in_features) for i, g in enumerate(groups)]
    _keep_inputs(job, k, original, groups, x, after, inputs)
    entering = job.rows(x, 0, 1)
    added = added_to_stream(original, every, entering, lambda: job.runner.block(k, job.windows(0, 1), entering))
    leaves = k + 1 < len(job.runner) and not (
        job.recipe.blockwise and groups
    )  # a trained block leaves its stream itself
    copies = _Copies(job, fitting.block, job.recipe.parts(len(job.batches())))
    last = None
    if leaves and groups and groups[-1].last and groups[-1].names[0] in added:
        last = _LastMatrix.of(job, groups[-1].names[0], fitting.block)
    for group, before in zip(groups, inputs, strict=True):
        ending = last if group.last else None
        corrects = bool(job.recipe.stream_strength) and group.names[0] in added
        compared = shape(fitting.block.get_submodule(group.names[0]))[1] != group.in_features
        found = _seen_by_part(job, k, original, copies, group, before, x, after, ending, corrects)
        _fit_group(job, k, group, fitting, copies, found, compared)
        before.remove()
    if last is not None:
        last.finish(copies, job.stream("compressed", k + 1))
    elif leaves:
        leave(job, k, copies.of_batch)
    copies.remove()


@torch.no_grad()
def leave(job: Job, k: int, block_of: Callable[[int], nn.Module]) -> None:
    """Writes the hidden states that leave block k as `block_of` gives it for the batch that starts at a window."""
    xh, stream = job.stream("compressed", k), job.stream("compressed", k + 1)
    stream.write(job.runner.block(k, job.windows(f), job.rows(xh, f), block_of(f)) for f in job.batches())


class _Copies:
    """The compressed block once for each part of the windows, one after another in memory: weights that differ wait on disk."""

    def __init__(self, job: Job, block: nn.Module, parts: int):
        self.parts = parts
        self._job = job
        shared = {id(t): t for t in (*block.parameters(), *block.buffers())}
        self._block = block if parts == 1 else copy.deepcopy(block, shared)
        self._names: set[str] = set()
        self._now: int | None = None

    def part(self, first: int) -> int:
        """Returns the part of the batch that starts at a window."""
        batches = self._job.batches()
        return batches.index(first) * self.parts // len(batches)

    def of_batch(self, first: int) -> nn.Module:
        """Returns the copy that has not seen the batch that starts at a window; it holds until another part's is asked for."""
        part = self.part(first)
        if part != self._now:
            for name in self._names:
                self._block.set_submodule(name, self.matrix(part, name))
            self._now = part
        return self._block

    def put(self, part: int, name: str, layer: nn.Module) -> None:
        """Replaces a matrix of one copy by a dense one."""
        if self.parts == 1:
            self._block.set_submodule(name, layer)
            return
        bias = getattr(layer, "bias", None)
        tensors = {"weight": weight(layer)} | ({} if bias is None else {"bias": bias.detach()})
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, self._file(part, name))
        self._names.add(name)
        self._now = None

    def matrix(self, part: int, name: str) -> nn.Module:
        """Returns a matrix of one copy."""
        if name not in self._names:
            return self._block.get_submodule(name)
        tensors = load_file(self._file(part, name), str(self._job.device))
        return dense_layer(tensors["weight"], tensors.get("bias"))

    def remove(self) -> None:
        """Deletes what waits on disk."""
        for part in range(self.parts):
            for name in self._names:
                self._file(part, name).unlink()

    def _file(self, part: int, name: str) -> Path:
        return self._job.work / f"part-{part}-{name}.safetensors"


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

    def plus(self, other: _Seen, sign: float = 1.0) -> _Seen:
        """Returns the sums over the windows of both, or with sign -1 those without the windows of `other`."""
        R = None if self.R is None or other.R is None else self.R.plus(other.R, sign)
        return _Seen(self.C.plus(other.C, sign), self.D.plus(other.D, sign), R)

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

    def __iter__(self) -> Iterator[tuple[_Seen, _Seen]]:
        """Yields each part, and all others together."""
        for i in range(self.count):
            part = torch.load(self._file(i), weights_only=False)
            yield part, self.whole.plus(part, -1.0)

    def remove(self) -> None:
        """Deletes what waits on disk."""
        for i in range(self.count):
            self._file(i).unlink()

    def _file(self, part: int) -> Path:
        return self._job.work / f"part-{part}.pt"


def _fit_group(
    job: Job, k: int, group: Group, fitting: Fitting, copies: _Copies, seen: Iterator[_Seen], compared: bool
) -> None:
    """Fits the matrices of a group, and those of the copies to all parts but their own."""
    full = job.full_name(k, group.names[0])
    parts = _Parts(job, seen)
    whole = parts.whole
    C = whole.C.mean(full)
    names = [name for name in group.names if name in fitting.planned]
    unfitted = {name: weight(fitting.block.get_submodule(name)) for name in names}
    how = (job, full, compared, group.last)
    if parts.count == 1 or not parts.judge:
        for name, W in unfitted.items():
            shift = shifted_target(W, whole.moved(W, *how), C, FEW, job.recipe.damping) - W if whole.D.seen else None
            layer = fitting.put(name, C, shift)
            for part in range(parts.count):
                copies.put(part, name, layer)
        parts.remove()
        return
    choices = {name: Choice(fitting.outputs.get(name)) for name in names}
    for own, others in parts:
        left_out = LeftOut.of(others.C.mean(full), own.C.mean(full), own.C.weight)
        for name, W in unfitted.items():
            choices[name].see(left_out, others.moved(W, *how), own.moved(W, *how))
    best, shifts, layers = {name: choice.best() for name, choice in choices.items()}, {}, {}
    for name, W in unfitted.items():
        ridge, strength = best[name]
        log.debug("%s: ridge %g, strength %.2f", job.full_name(k, name), ridge, strength)
        shifts[name] = shifted_target(W, whole.moved(W, *how), C, strength, ridge) - W
        layers[name] = fitting.put(name, C, shifts[name])
    for part, (_, others) in enumerate(parts):
        C_others = others.C.mean(full)
        for name, W in unfitted.items():
            ridge, strength = best[name]
            plan, shift = fitting.planned[name], shifted_target(W, others.moved(W, *how), C_others, strength, ridge) - W
            if plan.sites is not None and plan.sites.is_matrix_cut and plan.grid is None:
                copies.put(part, name, plain_form(fitting.fit(name, C_others, shift)))
            else:  # rounding and longer chains take long: what the shifts differ by is the most of it
                bias = getattr(layers[name], "bias", None)
                copies.put(part, name, dense_layer(weight(layers[name]) + shift - shifts[name], bias))
    parts.remove()


def _seen_by_part(
    job: Job,
    k: int,
    original: nn.Module,
    copies: _Copies,
    group: Group,
    before: Stream,
    x: Stream,
    after: Stream,
    ending: _LastMatrix | None,
    corrects: bool,
) -> Iterator[_Seen]:
    """Yields what one group sees in the copies, part by part."""
    xh, was = job.stream("compressed", k), original.get_submodule(group.names[0])
    now = copies.matrix(0, group.names[0])
    (rows, width), device = shape(now), job.device
    compared = width != group.in_features
    norms, whole = job.token_weights(k, group), ending is not None or (corrects and group.last)
    with ExitStack() as stack:
        keep = stack.enter_context(ending.writer()) if ending else None
        for part in range(copies.parts):
            C, D = Moment(width, device), Moment(rows if compared else width, device, width)
            R = Moment(rows, device, width) if corrects else None
            for first in job.batches():
                if copies.part(first) != part:
                    continue
                block = copies.of_batch(first)
                with capture_inputs(block, [group], stop=not whole) as seen:
                    out = job.runner.block(k, job.windows(first), job.rows(xh, first), block)
                if keep is not None:
                    keep(out, seen[0])
                if not group.every_token:
                    if 0 in seen:
                        C.add(seen[0])
                    continue
                if norms is not None:
                    w: Tensor | None = job.of_batch(norms, first)
                else:
                    w = stream_weights(group, job.rows(x, first), job.rows(after, first))
                C.add(seen[0], w)
                was_seen = job.rows(before, first).flatten(0, 1)
                moved = was_seen @ weight(was).T - seen[0] @ weight(now).T if compared else was_seen - seen[0]
                D.add(moved, w, seen[0])
                if R is not None:
                    error = job.rows(after, first) - out if group.last else job.rows(x, first) - job.rows(xh, first)
                    R.add(error.flatten(0, 1), w, seen[0])
            yield _Seen(C, D, R)


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

    def finish(self, copies: _Copies, leave: Stream) -> None:
        """Writes the hidden states that leave the copies to `leave`."""
        changes = [weight(copies.matrix(i, self.name)) - weight(self.starting) for i in range(copies.parts)]
        job = self.job
        leave.write(job.rows(self.out, f) + job.rows(self.fed, f) @ changes[copies.part(f)].T for f in job.batches())
        self.out.remove()
        self.fed.remove()
