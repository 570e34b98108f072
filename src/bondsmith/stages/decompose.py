"""Compress a model block by block, in depth order: moments of what each matrix reads, a network fitted to them, one file per block.

With error propagation two streams of hidden states run through the model: `x` of the original and `xh` of what is compressed so far.
Within a block the matrices are fitted in call order, each to the inputs that the networks before it really produce. At any time at
most two blocks of weights are resident, the original and its compressed copy; hidden states and inputs wait on disk.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bondsmith.model.blocks import BlockRunner, Group, capture_inputs, trace_groups, weight
from bondsmith.model.checkpoint import shard_name, write_json, write_shard
from bondsmith.model.source import ModelError, Source, empty, fill, stored_names
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedLinear, saved_state
from bondsmith.recipe import Recipe
from bondsmith.stages.moments import Moment, load_output_moments, stream_weights, table_moment
from bondsmith.stages.plan import MatrixPlan, Plan
from bondsmith.stages.streams import Stream
from bondsmith.tensor.fit import moment_root, propagated_target, relative_error, sequential_svd, whitened_cut
from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.mpo import MPO
from bondsmith.tensor.rounded import round_network
from bondsmith.tensor.rounding import Rounded, round_to_nearest
from bondsmith.tensor.weighted import fit_mpo


@dataclass(frozen=True)
class Job:
    """What the compression of one model needs: where it comes from, what becomes of it, and where things lie.

    Attributes:
        runner: the model's skeleton, with embedding and head in place.
        ids: calibration windows, (windows, tokens); empty for the Frobenius metric.
        out: directory of the weight files.
        work: directory of what is needed only until the end.
        fisher: directory of output moments, or None without the `loss` metric.
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
    """Writes the weight file of everything outside the blocks: in the dtype of the saved model, embedding and head as planned."""
    if not job.shard(-1).is_file():
        names = [n for n in stored_names(job.runner.model) if not n.startswith(job.runner.path + ".")]
        tensors = job.source.read(names)
        for table in job.plan.tables:
            if table.grid is not None:
                rounded = round_table(
                    tensors.pop(f"{table.name}.weight"), table, job.fisher, tied=len(job.plan.tables) == 1
                )
                tensors |= {f"{table.name}.{leaf}": t for leaf, t in rounded.tensors().items()}
        kept = tuple(f"{table.name}." for table in job.plan.tables if table.grid is not None)
        write_shard(job.shard(-1), {n: t if n.startswith(kept) else _cast(t, job.dtype) for n, t in tensors.items()})


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


def _stream(job: Job, name: str, k: int) -> Stream:
    """Returns the hidden states that enter block k; those of the first block are made here."""
    stream = Stream(job.work / f"{name}-{k}", (*job.ids.shape, job.width))
    if k == 0 and not stream.complete:
        with torch.no_grad(), _rounded_embedding(job) if name == "compressed" else nullcontext():
            stream.write(job.runner.enter(_ids(job, first)) for first in job.batches())
    return stream


@contextmanager
def _rounded_embedding(job: Job) -> Iterator[None]:
    """The embedding as it was saved stands in the runner, where it is rounded: later blocks see its error."""
    model = job.runner.model
    plain = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is plain)
    table = next((t for t in job.plan.tables if t.name == name and t.grid is not None), None)
    if table is None:
        yield
        return
    assert table.grid is not None
    packed = PackedEmbedding(plain, table.grid, dtype=torch.float32)
    stored = load_file(job.shard(-1))
    fill(packed, {leaf: stored[f"{name}.{leaf}"] for leaf in packed.state_dict()}, job.device)
    try:
        model.set_submodule(name, packed)
        yield
    finally:
        model.set_submodule(name, plain)


def _temporary(job: Job, name: str, width: int) -> Stream:
    """Returns a stream that no resumed run looks for."""
    return Stream(job.work / name, (*job.ids.shape, width), durable=False)


def _compress_block(job: Job, k: int) -> None:
    original = job.load(k)
    planned = {m.name.removeprefix(f"{job.runner.path}.{k}."): m for m in job.plan.block(k) if m.changed}
    compressed = copy.deepcopy(original)
    layers: dict[str, MPOLinear | PackedLinear] = {}
    errors: dict[str, float] = {}
    prefix = f"{job.runner.path}.{k}."

    def put(name: str, C: Tensor | None, D: Tensor | None, B: Tensor | None) -> None:
        layers[name], errors[prefix + name] = fit_matrix(compressed.get_submodule(name), planned[name], C, D, B, job)
        compressed.set_submodule(name, layers[name].materialise())  # one GEMM is faster where thousands of tokens pass

    if not job.recipe.needs_moments:
        for name in planned:
            put(name, None, None, None)
    else:
        outputs = load_output_moments(job.fisher, k) if job.fisher else {}
        fit = _fit_propagated if job.recipe.propagate else _fit_from_original
        fit(job, k, original, compressed, planned, lambda name, C, D: put(name, C, D, outputs.get(name)))
    for name, layer in layers.items():
        compressed.set_submodule(name, layer)
    write_json(job.work / f"errors-{k}.json", errors)
    write_shard(job.shard(k), {prefix + n: t for n, t in saved_state(compressed, job.dtype).items()})


Put = Callable[[str, Tensor, Tensor | None], None]


def _groups(job: Job, k: int, block: nn.Module, x: Stream, planned: dict[str, MatrixPlan]) -> list[Group]:
    with torch.no_grad():
        groups = trace_groups(block, lambda: job.runner.block(k, _ids(job, 0, 1), _rows(job, x, 0, 1)))
    reached = {name for group in groups for name in group.names}
    for name, matrix in planned.items():
        if name not in reached:
            raise ModelError(
                f"{matrix.name}: no calibration token reached this matrix; calibrate on more or other text, "
                f"or keep it dense (keep_dense: '{matrix.name}')"
            )
    return [g for g in groups if any(name in planned for name in g.names)]


@torch.no_grad()
def _fit_from_original(
    job: Job, k: int, original: nn.Module, compressed: nn.Module, planned: dict[str, MatrixPlan], put: Put
) -> None:
    """One pass of the original block over its own inputs gives the moments of all groups."""
    x, after = _stream(job, "original", k), _stream(job, "original", k + 1)
    groups = _groups(job, k, original, x, planned)
    moments = [Moment(g.in_features, job.device) for g in groups]
    with after.writer() as put_rows:
        for first in job.batches():
            rows = _rows(job, x, first)
            with capture_inputs(original, groups) as seen:
                out = job.runner.block(k, _ids(job, first), rows)
            put_rows(out)
            for position, group in enumerate(groups):
                if position in seen:
                    moments[position].add(seen[position], stream_weights(group, rows, out))
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
    groups = _groups(job, k, original, x, planned)
    inputs = [_temporary(job, f"input-{i}", g.in_features) for i, g in enumerate(groups)]
    _keep_inputs(job, k, original, groups, x, after, inputs)
    last = _LastMatrix.of(job, k, groups[-1]) if groups else None
    for group, before in zip(groups, inputs, strict=True):
        ending = last if group is groups[-1] else None
        C, D = _propagated_moments(job, k, compressed, group, before, x, after, ending)
        for name in group.names:
            if name in planned:
                put(name, C, D)
        before.remove()
    if k + 1 < len(job.runner):
        leave = _stream(job, "compressed", k + 1)
        if last is None or not last.finish(original, compressed, leave):
            xh = _stream(job, "compressed", k)
            leave.write(job.runner.block(k, _ids(job, f), _rows(job, xh, f), compressed) for f in job.batches())


def _propagated_moments(
    job: Job,
    k: int,
    compressed: nn.Module,
    group: Group,
    before: Stream,
    x: Stream,
    after: Stream,
    ending: _LastMatrix | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns `C = E[xh xh^T]` and `D = E[(x - xh) xh^T]` of one group, `xh` being what reaches it in the compressed copy."""
    xh = _stream(job, "compressed", k)
    C, D = Moment(group.in_features, job.device), Moment(group.in_features, job.device)
    with ExitStack() as stack:
        keep = stack.enter_context(ending.writer()) if ending else None
        for first in job.batches():
            with capture_inputs(compressed, [group], stop=keep is None) as seen:
                out = job.runner.block(k, _ids(job, first), _rows(job, xh, first), compressed)
            if keep is not None:
                keep(out, seen[0])
            if not group.every_token:
                if 0 in seen:
                    C.add(seen[0])
                continue
            w = stream_weights(group, _rows(job, x, first), _rows(job, after, first)) if group.writes else None
            C.add(seen[0], w)
            D.add(_rows(job, before, first).flatten(0, 1) - seen[0], w, seen[0])
    name = _full(job, k, group)
    return C.mean(name), D.mean(name) if group.every_token else None


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

    `out` with the original matrix W and the input `x` of it are kept; with W' in its place the block gives `out + x (W' - W)^T`.
    That the matrix does add to the output is tested on the first windows against the block itself; Gemma's does not.
    """

    job: Job
    k: int
    name: str
    out: Stream
    fed: Stream

    @classmethod
    def of(cls, job: Job, k: int, group: Group) -> _LastMatrix | None:
        """Returns what the last group needs, or None where the trick has no place: no next block, or not one matrix for all tokens."""
        if k + 1 == len(job.runner) or not (group.last and group.writes and group.every_token):
            return None
        out, fed = _temporary(job, "last-out", job.width), _temporary(job, "last-input", group.in_features)
        return cls(job, k, group.names[0], out, fed)

    @contextmanager
    def writer(self) -> Iterator[Callable[[Tensor, Tensor], None]]:
        """Yields a function that keeps the output of the block and the input of its last matrix for a batch."""
        with self.out.writer() as put_out, self.fed.writer() as put_fed:

            def keep(out: Tensor, fed: Tensor) -> None:
                put_out(out)
                put_fed(fed)

            yield keep

    def finish(self, original: nn.Module, compressed: nn.Module, leave: Stream) -> bool:
        """Writes the hidden states that leave the block to `leave`; False, and nothing written, where they do not follow."""
        job = self.job
        change = weight(compressed.get_submodule(self.name)) - weight(original.get_submodule(self.name))

        def follow(first: int, count: int | None = None) -> Tensor:
            return _rows(job, self.out, first, count) + _rows(job, self.fed, first, count) @ change.T

        entering = _stream(job, "compressed", self.k)
        true = job.runner.block(self.k, _ids(job, 0, 1), _rows(job, entering, 0, 1), compressed)
        moved = true - _rows(job, self.out, 0, 1)
        follows = bool((follow(0, 1) - true).norm() <= 1e-3 * moved.norm() + 1e-6 * true.norm())
        if follows:
            leave.write(follow(first) for first in job.batches())
        self.out.remove()
        self.fed.remove()
        return follows


def fit_matrix(
    matrix: nn.Module, plan: MatrixPlan, C: Tensor | None, D: Tensor | None, B: Tensor | None, job: Job
) -> tuple[MPOLinear | PackedLinear, float]:
    """Returns the layer that replaces `matrix`, with weights rounded as saved, and its relative error in the metric.

    Args:
        C: moment of the inputs that the layer will see, or None for the Frobenius metric.
        D: `E[(x - xh) xh^T]`, how far those are from the original's, or None.
        B: moment of the loss gradient at the output, or None.
    """
    W = weight(matrix)
    bias = getattr(matrix, "bias", None)
    try:
        target = W
        if C is not None and D is not None:
            target = propagated_target(W, C + D, C, job.recipe.propagation_strength, job.recipe.damping)
        layer = _layer(target, plan, C, B, bias, job)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{plan.name}: {error}") from error
    layer.to(torch.float32).requires_grad_(False)
    return layer, relative_error(W, layer.to_matrix(), C, B)


def _layer(
    target: Tensor, plan: MatrixPlan, C: Tensor | None, B: Tensor | None, bias: Tensor | None, job: Job
) -> MPOLinear | PackedLinear:
    if plan.sites is None:
        assert plan.grid is not None
        rounded = round_to_nearest(target, plan.grid) if C is None else gptq(target, plan.grid, C)
        return PackedLinear.from_rounded(rounded, None if bias is None else bias.to(job.dtype))
    mpo = _fit(target, plan, C, B, job.recipe)
    layer = MPOLinear.from_mpo(mpo, bias=bias, gauge=plan.gauge, dtype=job.dtype)
    if plan.grid is not None:
        damping = job.recipe.damping
        network = round_network(
            target, mpo, plan.grid, input_moment=C, output_moment=B, gauge=plan.gauge, damping=damping
        )
        layer.pivots = None if network.pivots is None else network.pivots.to(torch.int32)
        for k, rounded_core in enumerate(network.weights):
            if rounded_core is not None:
                layer.cores[k] = PackedLinear.from_rounded(rounded_core)
    return layer


def round_table(weight: Tensor, table: MatrixPlan, moments: Path | None, *, tied: bool) -> Rounded:
    """Returns an embedding or head, (vocabulary, width), rounded in the metric of what it is used for.

    Args:
        moments: directory of the gradients stage: what the head reads, and the loss gradient at the embedding's output.
        tied: the matrix is embedding and head at once.
    """
    assert table.grid is not None
    metric = table_moment(moments, table.name, tied) if moments is not None else None
    try:
        return round_to_nearest(weight, table.grid) if metric is None else gptq(weight, table.grid, metric)
    except ValueError as error:
        raise ModelError(f"{table.name}: {error}") from error


def _fit(W: Tensor, plan: MatrixPlan, C: Tensor | None, B: Tensor | None, recipe: Recipe) -> MPO:
    assert plan.sites is not None
    if C is None:
        return sequential_svd(W, plan.sites, plan.bonds)
    if not plan.sites.is_matrix_cut:
        return fit_mpo(W, plan.sites, plan.bonds, input_moment=C, output_moment=B, damping=recipe.damping).mpo
    rows_in = W.shape[0] > W.shape[1]
    roots = {"input_root": moment_root(C, recipe.damping)} if rows_in else {"input_moment": C}
    return whitened_cut(W, plan.bonds[0], output_moment=B, damping=recipe.damping, **roots)


def _ids(job: Job, first: int, count: int | None = None) -> Tensor:
    return job.ids[first : first + (count or job.batch)].to(job.device)


def _rows(job: Job, stream: Stream, first: int, count: int | None = None) -> Tensor:
    return stream.read(first, count or job.batch).to(job.device)


def _full(job: Job, k: int, group: Group) -> str:
    return f"{job.runner.path}.{k}.{group.names[0]}"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
