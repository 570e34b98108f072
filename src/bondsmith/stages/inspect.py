"""The table of every network of a compressed model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import AutoConfig

from bondsmith.model.blocks import shape
from bondsmith.model.skeleton import skeleton
from bondsmith.model.source import ModelError
from bondsmith.nn.experts import token_shares
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.wording import count, size
from bondsmith.tensor.rounding import Grid
from bondsmith.tensor.sites import Sites


def read_networks(directory: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the rows of the table (as in `results.json`) and the metric of their errors.

    A directory that a user's `save_pretrained` wrote has no `results.json`: its rows come from config.json, without errors.

    Raises:
        ModelError: the directory holds no compressed model.
    """
    results, config = directory / "results.json", directory / "config.json"
    if results.is_file():
        content = json.loads(results.read_text())
        return content["networks"], content["settings"]["metric"]
    if not config.is_file():
        raise ModelError(f"{directory} is not a model: it has no config.json")
    settings = json.loads(config.read_text())
    quantization = settings.get("quantization_config") or {}
    if quantization.get("quant_method") != "bondsmith":
        raise ModelError(f"{directory} is not a compressed model: its config.json names no networks of bondsmith")
    itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}.get(str(settings.get("dtype")), 4)
    return [_row(m, itemsize) for m in _matrices(directory, quantization)], ""


def _matrices(directory: Path, quantization: dict[str, Any]) -> list[MatrixPlan]:
    """Returns what became of every matrix, from the entries of config.json and the shapes of the original."""
    networks, packed = quantization["networks"], quantization.get("packed") or {}
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    model = skeleton(config)
    grids = {name: Grid(**grid) for name, grid in packed.items()}
    alone = [n for n in packed if not n.startswith(tuple(f"{name}." for name in networks)) and n not in networks]
    found, shares = [], token_shares(model)
    for name in (*networks, *alone):
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            plan = _matrix(name, *shape(module), networks.get(name, {}), grids)
            found.append(replace(plan, tokens=shares.get(name, 1.0)))
    return found


def _matrix(name: str, rows: int, columns: int, network: dict[str, Any], grids: dict[str, Grid]) -> MatrixPlan:
    left, right = network.get("shape", (rows, columns))
    plan = MatrixPlan(
        name,
        -1,
        rows,
        columns,
        grid=grids.get(name),
        kept_rows=left if left != rows else None,
        kept_columns=right if right != columns else None,
        base=grids.get(f"{name}.rounded"),
    )
    if "sites" not in network:
        return plan
    sites = Sites(tuple(o for o, _ in network["sites"]), tuple(i for _, i in network["sites"]))
    inside = f"{name}.network" if network.get("hybrid") else name
    grid = next((g for n, g in grids.items() if n.startswith(f"{inside}.cores.")), None)
    return replace(plan, sites=sites, bonds=tuple(network["bonds"]), gauge=bool(network["gauge"]), grid=grid)


def _row(matrix: MatrixPlan, itemsize: int) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "shape": [matrix.out_features, matrix.in_features],
        "sites": None if matrix.sites is None else str(matrix.sites),
        "bonds": list(matrix.bonds),
        "gauge": matrix.gauge,
        "grid": matrix.rounding,
        "parameters": matrix.parameters,
        "bytes": matrix.tensor_bytes(itemsize),
        "multiply_adds": matrix.multiply_adds,
        "dense_parameters": matrix.dense_parameters,
        "dense_multiply_adds": matrix.dense_multiply_adds,
        "error": None,
    }


def network_table(networks: Sequence[dict[str, Any]], metric: str) -> list[Table]:
    """Returns the table of all networks and one of the totals."""
    head = f"error ({metric})" if metric else "error"
    table = Table("matrix", "shape", "sites", "bonds", "bits", "parameters", "kept", "bytes", "multiply-adds", head)
    for n in networks:
        table.add_row(
            n["name"],
            "×".join(map(str, n["shape"])),
            (n["sites"] or "dense") + (" gauge" if n["gauge"] else ""),
            ",".join(map(str, n["bonds"])),
            n.get("grid") or "",
            count(n["parameters"]),
            f"{n['parameters'] / n['dense_parameters']:.3f}",
            size(n["bytes"]),
            count(n["multiply_adds"]),
            "" if n["error"] is None else f"{n['error']:.4f}",
        )
    total = Table(
        "networks", "parameters", "of dense", "bytes", "multiply-adds per token", "of dense", title="all matrices"
    )
    dense = sum(n["dense_parameters"] for n in networks)
    full = sum(n.get("dense_multiply_adds", n["dense_parameters"]) for n in networks)
    kept, work = sum(n["parameters"] for n in networks), sum(n["multiply_adds"] for n in networks)
    total.add_row(
        str(len(networks)),
        count(kept),
        f"{kept / dense:.3f}",
        size(sum(n["bytes"] for n in networks)),
        count(work),
        f"{work / full:.3f}",
    )
    return [table, total]
