"""What a run has: a device, memory and disk; and whether that is enough, before any work."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from bondsmith.model.blocks import BlockRunner
from bondsmith.model.source import Source
from bondsmith.recipe import Recipe
from bondsmith.rundir import RunError, log
from bondsmith.stages.estimate import memory_needed
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.plan import Plan
from bondsmith.stages.wording import size


def device_of(recipe: Recipe) -> torch.device:
    if recipe.device != "auto":
        return torch.device(recipe.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_disk(directory: Path, plan: Plan, runner: BlockRunner, recipe: Recipe, dtype: torch.dtype) -> None:
    width = runner.model.get_input_embeddings().weight.shape[1]
    boundaries = 4 + (len(runner) * recipe.gradient_share if recipe.metric == "loss" else 0)
    outputs = sum(m.out_features**2 for m in plan.matrices) * 4 if recipe.metric == "loss" else 0
    inputs = max(sum(m.in_features for m in plan.block(k)) for k in range(len(runner))) if recipe.needs_moments else 0
    hidden = recipe.tokens * 4 * (width * boundaries + inputs) if recipe.needs_moments else 0
    needed = int(plan.bytes(dtype.itemsize) + hidden + outputs)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise RunError(
            f"{directory}: about {needed / 1e6:.1f} MB are needed until the end (weights {plan.bytes(dtype.itemsize) / 1e6:.1f}, "
            f"hidden states {hidden / 1e6:.1f}, gradients {outputs / 1e6:.1f}), {free / 1e6:.1f} MB are free: make room, "
            "choose another --out or fewer --tokens"
        )


def free_memory(device: torch.device) -> float:
    """Returns the free bytes of a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def check_memory(source: Source, copies: int, purpose: str, remedy: str) -> None:
    files = {file for file, _ in source.places.values()}  # of a GGUF file: the rewritten copy
    parameters = sum(file.stat().st_size for file in files) / source.dtype.itemsize
    needed = copies * 4 * parameters
    free = psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RunError(
            f"{purpose} needs the whole model in memory ({needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free): {remedy}"
        )


def settled_metric(
    shapes: Mapping[str, tuple[int, int, int]], tables: Sequence[MatrixPlan], recipe: Recipe, lost: str
) -> str:
    """Returns loss where a pass back through a block fits into memory, else input, with a warning that says what is `lost`.

    RunError where it does not fit and the recipe asks for the loss metric, or for a tolerated loss.
    """
    sizes = {t.name: (t.out_features, t.in_features) for t in tables}
    needed = memory_needed(shapes, sizes, recipe.changed(metric="loss"))
    free = free_memory(device_of(recipe))
    if needed <= free:
        return "loss"
    numbers = (
        f"the loss metric needs {size(needed)} of memory, most of it for gradients of one block, {size(free)} are free"
    )
    if recipe.metric == "loss" or recipe.loss is not None:
        raise RunError(f"{numbers}: free some, take a smaller --window, or --metric input, which needs no gradients")
    log.warning("%s: going on with the input metric; %s", numbers, lost)
    warnings.warn(f"{numbers}: going on with the input metric; {lost}", stacklevel=3)
    return "input"
