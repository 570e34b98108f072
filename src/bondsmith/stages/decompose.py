"""Compress a model block by block, in depth order: moments of what each matrix reads, a network fitted to them, one file per block.

With error propagation two streams of hidden states run through the model: `x` of the original and `xh` of what is compressed so far.
Within a block the matrices are fitted in call order, each to the inputs that the networks before it really produce. At any time at
most two blocks of weights are resident, the original and its compressed copy; hidden states and inputs wait on disk.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bondsmith.model.blocks import BlockRunner, shape, weight
from bondsmith.model.checkpoint import shard_name, write_json, write_shard
from bondsmith.model.source import ModelError, Source, empty, fill, stored_names
from bondsmith.model.tracing import Group, added_to_stream, capture_inputs, trace_groups
from bondsmith.nn.packed import saved_state
from bondsmith.recipe import Recipe
from bondsmith.stages import blockwise
from bondsmith.stages.fitting import Difference, fit_matrix, plain_form
from bondsmith.stages.moment_files import load_output_moments, load_token_weights
from bondsmith.stages.moments import Moment, stream_weights
from bondsmith.stages.plan import MatrixPlan, Plan
from bondsmith.stages.reduction import drop_channels
from bondsmith.stages.rounding import rounded_embedding, rounded_tables
from bondsmith.stages.streams import Stream
from bondsmith.tensor.fit import output_difference


@dataclass(frozen=True)
class Job:
    """What the compression of one model needs: where it comes from, what becomes of it, and where things lie.

    Attributes:
        runner: the model's skeleton, with embedding and head in place.
        ids: calibration windows, (windows, tokens); empty for the Frobenius metric.
        out: directory of the weight files.
        work: directory of what is needed only until the end.
        fisher: directory of output moments, or None without the `loss` metric.
        moments: directory of what the windows that gave gradients showed: which channels of an MLP to drop follows from it.
        batch: windows per forward pass.
        width: of the hidden states.
        dtype: of the saved weights.
    """

    runner: BlockRunner
    source: Source
    plan: Plan
    recipe: Recipe
    ids: Tensor
    out: Path
    work: Path
    fisher: Path | None
    moments: Path
    batch: int
    width: int
    device: torch.device
    dtype: torch.dtype

    def shard(self, block: int) -> Path:
        """Returns the weight file of a block; -1 is all that is outside the blocks."""
        return self.out / shard_name(block + 1, len(self.runner) + 1)

    def load(self, block: int) -> nn.Module:
        """Brings the original weights of a block into the runner and returns it."""
        module = self.runner.blocks[block]
        prefix = f"{self.runner.path}.{block}."
        names = [name for name in self.source.places if name.startswith(prefix)]
        tensors = self.source.read(names)
        fill(module, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, self.device)
        return module

    def batches(self) -> range:
        """Returns the first window of every batch."""
        return range(0, len(self.ids), self.batch)


def compress_rest(job: Job) -> None:
    """Writes the weight file of everything outside the blocks, in the dtype of the saved model."""
    if not job.shard(-1).is_file():
        names = [n for n in stored_names(job.runner.model) if not n.startswith(job.runner.path + ".")]
        tensors = job.source.read(names)
        rounded = rounded_tables(job.plan, tensors, job.fisher)
        state = {name: t.to(job.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        write_shard(job.shard(-1), state | rounded)


def compress_blocks(job: Job, advance: Callable[[int], None]) -> None:
    """Writes the weight file and the errors of every block that has none yet; `advance` hears of each finished block."""
    count = len(job.runner)
    for k in range(count):
        if not job.shard(k).is_file():
            _compress_block(job, k)
            empty(job.runner.blocks[k])
        for name in ("original", "compressed"):
            (job.work / f"{name}-{k}").unlink(missing_ok=True)
        advance(k)


def read_errors(job: Job) -> dict[str, float]:
    """Returns the relative error in the metric of every network, by matrix name."""
    errors: dict[str, float] = {}
    for k in range(len(job.runner)):
        errors |= json.loads((job.work / f"errors-{k}.json").read_text())
    return errors


def read_training(job: Job) -> list[dict[str, Any]]:
    """Returns what block-wise distillation gave, one entry per block that was trained."""
    files = (job.work / f"blockwise-{k}.json" for k in range(len(job.runner)))
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def _stream(job: Job, name: str, k: int) -> Stream:
    """Returns the hidden states that enter block k; those of the first block are made here."""
    stream = Stream(job.work / f"{name}-{k}", (*job.ids.shape, job.width))
    if k == 0 and not stream.complete:
        saved = rounded_embedding(job.runner.model, job.plan, job.shard(-1), job.device)
        with torch.no_grad(), saved if name == "compressed" else nullcontext():
            stream.write(job.runner.enter(_ids(job, first)) for first in job.batches())
    return stream


def _temporary(job: Job, name: str, width: int) -> Stream:
    """Returns a stream that no resumed run looks for."""
    return Stream(job.work / name, (*job.ids.shape, width), durable=False)


def _compress_block(job: Job, k: int) -> None:
    original = job.load(k)
    prefix = f"{job.runner.path}.{k}."
    plans = {m.name.removeprefix(prefix): m for m in job.plan.block(k)}
    planned = {name: m for name, m in plans.items() if m.fitted}
    compressed = copy.deepcopy(original)
    outputs = load_output_moments(job.fisher, k) if job.fisher else {}
    reduced = drop_channels(compressed, plans, job.moments, k, outputs, job.recipe.damping)
    layers: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}

    def put(name: str, C: Tensor | None, D: Difference | None) -> None:
        if name in reduced and C is not None and len(C) != plans[name].columns:
            C = C[reduced[name].kept][:, reduced[name].kept]
        matrix, B = compressed.get_submodule(name), outputs.get(name)
        layers[name], error = fit_matrix(matrix, planned[name], C, D, B, job.recipe, job.dtype)
        lost = reduced[name].error if name in reduced else 0.0
        errors[prefix + name] = math.hypot(error, lost)
        compressed.set_submodule(name, plain_form(layers[name]))  # one GEMM is faster where thousands of tokens pass

    if not job.recipe.needs_moments:
        for name in planned:
            put(name, None, None)
    else:
        fit = _fit_propagated if job.recipe.propagate else _fit_from_original
        fit(job, k, original, compressed, planned, put)
    for name, layer in layers.items():
        compressed.set_submodule(name, layer)
    if job.recipe.blockwise and layers:
        dense = [name for name in reduced if isinstance(compressed.get_submodule(name), nn.Linear | Conv1D)]
        compressed = _train(job, k, compressed, dense)
    write_json(job.work / f"errors-{k}.json", errors)
    write_shard(job.shard(k), {prefix + n: t for n, t in saved_state(compressed, job.dtype).items()})


def _train(job: Job, k: int, compressed: nn.Module, dense: list[str]) -> nn.Module:
    """Returns the block after block-wise distillation; what leaves it goes to the stream of the next one."""
    streams = (_stream(job, "compressed", k), _stream(job, "original", k), _stream(job, "original", k + 1))
    further = range(k + 1, min(k + 1 + job.recipe.blockwise_ahead, len(job.runner)))
    for j in further:
        job.load(j)
    ahead = tuple(partial(job.runner.block, j) for j in further)
    lesson = blockwise.Lesson(job.runner, k, job.ids, *streams, job.device, ahead)
    trained, outcome = blockwise.distill(lesson, compressed, job.recipe, job.dtype, dense)
    for j in further:
        empty(job.runner.blocks[j])
    if k + 1 < len(job.runner):
        _leave(job, k, trained)
    write_json(job.work / f"blockwise-{k}.json", asdict(outcome) | {"block": k})
    return trained


@torch.no_grad()
def _leave(job: Job, k: int, compressed: nn.Module) -> None:
    """Writes the hidden states that leave the compressed block k."""
    xh, leave = _stream(job, "compressed", k), _stream(job, "compressed", k + 1)
    leave.write(job.runner.block(k, _ids(job, f), _rows(job, xh, f), compressed) for f in job.batches())


Put = Callable[[str, Tensor, Difference | None], None]


def _groups(
    job: Job, k: int, block: nn.Module, x: Stream, planned: dict[str, MatrixPlan]
) -> tuple[list[Group], list[Group]]:
    """Returns the groups with a matrix to fit, and all groups of the block."""
    with torch.no_grad():
        groups = trace_groups(block, lambda: job.runner.block(k, _ids(job, 0, 1), _rows(job, x, 0, 1)))
    reached = {name for group in groups for name in group.names}
    for name, matrix in planned.items():
        if name not in reached:
            raise ModelError(
                f"{matrix.name}: no calibration token reached this matrix; calibrate on more or other text, "
                f"or keep it dense (keep_dense: '{matrix.name}')"
            )
    return [g for g in groups if any(name in planned for name in g.names)], groups


@torch.no_grad()
def _fit_from_original(
    job: Job, k: int, original: nn.Module, compressed: nn.Module, planned: dict[str, MatrixPlan], put: Put
) -> None:
    """One pass of the original block over its own inputs gives the moments of all groups."""
    x, after = _stream(job, "original", k), _stream(job, "original", k + 1)
    groups, _ = _groups(job, k, original, x, planned)
    moments = [Moment(g.in_features, job.device) for g in groups]
    weights = [_gradient_weights(job, k, g) for g in groups]
    with after.writer() as put_rows:
        for first in job.batches():
            rows = _rows(job, x, first)
            with capture_inputs(original, groups) as seen:
                out = job.runner.block(k, _ids(job, first), rows)
            put_rows(out)
            for position, read in seen.items():
                norms = weights[position]
                w = stream_weights(groups[position], rows, out) if norms is None else _batch(job, norms, first)
                moments[position].add(read, w)
    for group, moment in zip(groups, moments, strict=True):
        C = moment.mean(_full(job, k, group))
        for name in group.names:
            if name in planned:
                put(name, C, None)


@torch.no_grad()
def _fit_propagated(
    job: Job, k: int, original: nn.Module, compressed: nn.Module, planned: dict[str, MatrixPlan], put: Put
) -> None:
    """Group after group, the compressed copy runs up to it; the original's inputs come from one pass kept on disk."""
    x, after = _stream(job, "original", k), _stream(job, "original", k + 1)
    groups, every = _groups(job, k, original, x, planned)
    inputs = [_temporary(job, f"input-{i}", g.in_features) for i, g in enumerate(groups)]
    _keep_inputs(job, k, original, groups, x, after, inputs)
    entering = _rows(job, x, 0, 1)
    added = added_to_stream(original, every, entering, lambda: job.runner.block(k, _ids(job, 0, 1), entering))
    trains = bool(job.recipe.blockwise and groups)  # then what leaves the block is computed after the training
    leaves = k + 1 < len(job.runner) and not trains
    last = None
    if leaves and groups and groups[-1].last and groups[-1].names[0] in added:
        last = _LastMatrix.of(job, groups[-1].names[0], compressed)
    for group, before in zip(groups, inputs, strict=True):
        ending = last if group.last else None
        corrects = bool(job.recipe.stream_strength) and group.names[0] in added
        C, D = _propagated_moments(job, k, original, compressed, group, before, x, after, ending, corrects)
        for name in group.names:
            if name in planned:
                put(name, C, D)
        before.remove()
    if last is not None:
        last.finish(compressed, _stream(job, "compressed", k + 1))
    elif leaves:
        _leave(job, k, compressed)


def _propagated_moments(
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
) -> tuple[Tensor, Difference | None]:
    """Returns `C = E[xh xh^T]` of one group, `xh` being what reaches it in the compressed copy, and how far that is from the original.

    That is `E[(x - xh) xh^T]`; or, where a matrix reads fewer channels than its original, `E[(W x - W' xh) xh^T]`. A group that `corrects`
    also learns `E[(r - rh) xh^T]` of the residual stream that it is added to.
    """
    xh, now, was = _stream(job, "compressed", k), *(b.get_submodule(group.names[0]) for b in (compressed, original))
    width = shape(now)[1]
    moved = width != group.in_features
    C, D = Moment(width, job.device), Moment(shape(now)[0] if moved else width, job.device, width)
    R = Moment(shape(now)[0], job.device, width) if corrects else None
    norms, whole = _gradient_weights(job, k, group), ending is not None or (corrects and group.last)
    with ExitStack() as stack:
        keep = stack.enter_context(ending.writer()) if ending else None
        for first in job.batches():
            with capture_inputs(compressed, [group], stop=not whole) as seen:
                out = job.runner.block(k, _ids(job, first), _rows(job, xh, first), compressed)
            if keep is not None:
                keep(out, seen[0])
            if not group.every_token:
                if 0 in seen:
                    C.add(seen[0])
                continue
            w = None if norms is None else _batch(job, norms, first)
            if group.writes:
                w = stream_weights(group, _rows(job, x, first), _rows(job, after, first))
            C.add(seen[0], w)
            was_seen = _rows(job, before, first).flatten(0, 1)
            D.add(was_seen @ weight(was).T - seen[0] @ weight(now).T if moved else was_seen - seen[0], w, seen[0])
            if R is not None:
                error = _rows(job, after, first) - out if group.last else _rows(job, x, first) - _rows(job, xh, first)
                R.add(error.flatten(0, 1), w, seen[0])
    name = _full(job, k, group)
    if not group.every_token:
        return C.mean(name), None
    given, stream = D.mean(name), None if R is None else R.mean(name)
    if stream is not None and group.last:  # what leaves the block differs by what the matrix was given, too
        stream -= given if moved else output_difference(weight(was), given)
    return C.mean(name), Difference(given, moved, stream)


def _gradient_weights(job: Job, k: int, group: Group) -> Tensor | None:
    """Returns the weights that gradients gave to all tokens, (windows, tokens), or None if they gave none."""
    if job.fisher is None or group.writes or not group.every_token:
        return None
    return load_token_weights(job.fisher, k, group.names[0], len(job.ids))


def _batch(job: Job, weights: Tensor, first: int) -> Tensor:
    return weights[first : first + job.batch].flatten().to(job.device)


def _keep_inputs(
    job: Job, k: int, block: nn.Module, groups: list[Group], x: Stream, after: Stream, inputs: list[Stream]
) -> None:
    """Runs the original block over all windows; writes what leaves it and what each group reads."""
    with ExitStack() as stack:
        put_after = stack.enter_context(after.writer())
        puts = {i: stack.enter_context(inputs[i].writer()) for i, g in enumerate(groups) if g.every_token}
        for first in job.batches():
            with capture_inputs(block, groups) as seen:
                put_after(job.runner.block(k, _ids(job, first), _rows(job, x, first)))
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
        fed = _temporary(job, "last-input", shape(starting)[1])
        return cls(job, name, starting, _temporary(job, "last-out", job.width), fed)

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
        leave.write(_rows(job, self.out, f) + _rows(job, self.fed, f) @ change.T for f in job.batches())
        self.out.remove()
        self.fed.remove()


def _ids(job: Job, first: int, count: int | None = None) -> Tensor:
    return job.ids[first : first + (count or job.batch)].to(job.device)


def _rows(job: Job, stream: Stream, first: int, count: int | None = None) -> Tensor:
    return stream.read(first, count or job.batch).to(job.device)


def _full(job: Job, k: int, group: Group) -> str:
    return f"{job.runner.path}.{k}.{group.names[0]}"
