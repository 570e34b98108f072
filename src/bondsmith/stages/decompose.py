"""Compress a model block by block, in depth order: moments of what each matrix reads, a network fitted to them, one file per block.

With error propagation two streams of hidden states run through the model: `x` of the original and `xh` of what is compressed so far.
Within a block the matrices are fitted in call order, each to the inputs that the networks before it really produce. At any time at
most two blocks of weights are resident, the original and its compressed copy; hidden states and inputs wait on disk.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.model.skeleton import empty, stored_names
from bondsmith.model.tracing import capture_inputs
from bondsmith.nn.packed import saved_state
from bondsmith.stages import blockwise
from bondsmith.stages.fitting import fit_matrix, plain_form
from bondsmith.stages.job import Job
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.moment import Moment, stream_weights
from bondsmith.stages.moment_files import load_output_moments
from bondsmith.stages.propagation import Fitting, fit_propagated, leave, traced_groups
from bondsmith.stages.reduction import drop_channels
from bondsmith.stages.rounding import rounded_tables
from bondsmith.stages.shapes import table_plans


def compress_rest(job: Job) -> None:
    """Writes the weight file of everything outside the blocks, in the dtype of the saved model."""
    if not job.shard(-1).is_file():
        names = [n for n in stored_names(job.runner.model) if not n.startswith(job.runner.path + ".")]
        tensors = job.source.read(names)
        ends = [table.name for table in table_plans(job.runner)]
        rounded, errors = rounded_tables(job.plan, tensors, job.fisher, ends, job.recipe.rounding)
        state = {name: t.to(job.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        write_json(job.work / "errors-tables.json", errors)
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
    """Returns the relative error in the metric of every matrix that changed, by name; of embedding and head that of their entries."""
    errors: dict[str, float] = json.loads((job.work / "errors-tables.json").read_text())
    for k in range(len(job.runner)):
        errors |= json.loads((job.work / f"errors-{k}.json").read_text())
    return errors


def read_training(job: Job) -> list[dict[str, Any]]:
    """Returns what block-wise distillation gave, one entry per block that was trained."""
    files = (job.work / f"blockwise-{k}.json" for k in range(len(job.runner)))
    return [json.loads(file.read_text()) for file in files if file.is_file()]


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

    def put(name: str, C: Tensor | None, shift: Tensor | None) -> None:
        if name in reduced and C is not None and len(C) != plans[name].columns:
            C = C[reduced[name].kept][:, reduced[name].kept]
        matrix, B = compressed.get_submodule(name), outputs.get(name)
        layers[name], error = fit_matrix(matrix, planned[name], C, shift, B, job.recipe, job.dtype)
        lost = reduced[name].error if name in reduced else 0.0
        errors[prefix + name] = math.hypot(error, lost)
        compressed.set_submodule(name, plain_form(layers[name]))  # one GEMM is faster where thousands of tokens pass

    if not job.recipe.needs_moments:
        for name in planned:
            put(name, None, None)
    elif job.recipe.propagate:
        fit_propagated(job, k, original, Fitting(compressed, planned, outputs, put))
    else:
        _fit_from_original(job, k, original, planned, put)
    for name, layer in layers.items():
        compressed.set_submodule(name, layer)
    if job.recipe.blockwise and layers:
        dense = [name for name in reduced if isinstance(compressed.get_submodule(name), nn.Linear | Conv1D)]
        compressed = _train(job, k, compressed, dense)
    write_json(job.work / f"errors-{k}.json", errors)
    write_shard(job.shard(k), {prefix + n: t for n, t in saved_state(compressed, job.dtype).items()})


def _train(job: Job, k: int, compressed: nn.Module, dense: list[str]) -> nn.Module:
    """Returns the block after block-wise distillation; what leaves it goes to the stream of the next one."""
    streams = (job.stream("compressed", k), job.stream("original", k), job.stream("original", k + 1))
    further = range(k + 1, min(k + 1 + job.recipe.blockwise_ahead, len(job.runner)))
    for j in further:
        job.load(j)
    ahead = tuple(partial(job.runner.block, j) for j in further)
    lesson = blockwise.Lesson(job.runner, k, job.ids, *streams, job.device, ahead)
    trained, outcome = blockwise.distill(lesson, compressed, job.recipe, job.dtype, dense)
    for j in further:
        empty(job.runner.blocks[j])
    if k + 1 < len(job.runner):
        leave(job, k, trained)
    write_json(job.work / f"blockwise-{k}.json", asdict(outcome) | {"block": k})
    return trained


Put = Callable[[str, Tensor | None, Tensor | None], None]


@torch.no_grad()
def _fit_from_original(job: Job, k: int, original: nn.Module, planned: dict[str, MatrixPlan], put: Put) -> None:
    """One pass of the original block over its own inputs gives the moments of all groups."""
    x, after = job.stream("original", k), job.stream("original", k + 1)
    groups, _ = traced_groups(job, k, original, x, planned)
    moments = [Moment(g.in_features, job.device) for g in groups]
    weights = [job.token_weights(k, g) for g in groups]
    with after.writer() as put_rows:
        for first in job.batches():
            rows = job.rows(x, first)
            with capture_inputs(original, groups) as seen:
                out = job.runner.block(k, job.windows(first), rows)
            put_rows(out)
            for position, read in seen.items():
                norms = weights[position]
                w = stream_weights(groups[position], rows, out) if norms is None else job.of_batch(norms, first)
                moments[position].add(read, w)
    for group, moment in zip(groups, moments, strict=True):
        C = moment.mean(job.full_name(k, group.names[0]))
        for name in group.names:
            if name in planned:
                put(name, C, None)
