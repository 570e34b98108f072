"""What a figure needs to be trusted: versions, machine, sizes; the part of `results.json` that is known without measuring."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from bondsmith._version import __version__
from bondsmith.data import Windows
from bondsmith.model.source import Source
from bondsmith.recipe import Recipe
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.plan import Plan

# Relative error that no rounding to few bits has; scales that go from float16 to bfloat16 alone lose 2e-3.
_EXACT = 3e-3


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide figures."""
    found = {"bondsmith": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Returns processor, cores, threads, memory and platform."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
    } | ({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_run(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    dtype: torch.dtype,
    calibration: Sequence[Windows],
    errors: Mapping[str, float],
    directory: Path,
    command: str,
) -> dict[str, Any]:
    """Returns the sections of `results.json` that need no measurement; see `docs/results.md`."""
    before = sum(m.dense_parameters for m in plan.matrices)
    total = plan.other_parameters + before
    written = sum(f.stat().st_size for f in directory.glob("bondsmith-*.safetensors"))
    head = _head_multiply_adds(source)
    exact = [m.name for m in (*plan.matrices, *plan.tables) if _is_repacked(m, errors.get(m.name))]
    repacked = {"repacked": exact} if exact else {}
    return repacked | {
        "format": 1,
        "bondsmith": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(),
        "model": {
            "name": source.name,
            "architecture": (source.config.architectures or [source.config.model_type])[0],
            "blocks": 1 + max(m.block for m in plan.matrices),
            "license": _license(source.path),
            "base_model": None if Path(source.name).exists() else source.name,
        },
        "settings": recipe.to_dict(),
        "calibration": {
            "tokens": sum(w.ids.numel() for w in calibration),
            "window": calibration[0].ids.shape[1] if calibration else recipe.window,
            "sources": [w.describe() for w in calibration],
        },
        "size": {
            "original": {
                "parameters": total,
                "matrix_parameters": before,
                "bytes_fp32": 4 * total,
                "bytes": source.stored_bytes,
                "dtype": "GGUF" if source.files[0].suffix == ".gguf" else str(source.dtype).removeprefix("torch."),
                "multiply_adds": sum(m.dense_multiply_adds for m in plan.matrices) + head,
            },
            "compressed": {
                "parameters": plan.parameters,
                "matrix_parameters": plan.parameters - plan.other_parameters,
                "bytes_fp32": 4 * plan.parameters,
                "bytes": written,
                "dtype": str(dtype).removeprefix("torch."),
                "multiply_adds": sum(m.multiply_adds for m in plan.matrices) + head,
            },
        },
        "networks": [_network(m, dtype, errors.get(m.name)) for m in plan.matrices],
    }


def _is_repacked(matrix: MatrixPlan, error: float | None) -> bool:
    """Returns True where few bits lose nothing but digits of scales: the weights of the source lie on that very grid already."""
    few = matrix.grid is not None and matrix.grid.bits < 8 and matrix.sites is None
    return few and error is not None and error < _EXACT


def _license(path: Path) -> str | None:
    """Returns the licence that the original's model card names, or None."""
    card = path / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return str(found) if found else None


def _head_multiply_adds(source: Source) -> int:
    config = source.config.get_text_config()
    return int(config.vocab_size) * int(config.hidden_size)


def _network(matrix: MatrixPlan, dtype: torch.dtype, error: float | None) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "block": matrix.block,
        "shape": [matrix.out_features, matrix.in_features],
        "sites": None if matrix.sites is None else str(matrix.sites),
        "bonds": list(matrix.bonds),
        "gauge": matrix.gauge,
        "parameters": matrix.parameters,
        "grid": matrix.rounding,
        "bytes": matrix.tensor_bytes(dtype.itemsize),
        "multiply_adds": matrix.multiply_adds,
        "dense_parameters": matrix.dense_parameters,
        "error": error,
        **({"dense_multiply_adds": matrix.dense_multiply_adds} if matrix.tokens != 1 else {}),
    }
