"""The table of every network of a compressed model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bondsmith.model.source import ModelError
from bondsmith.stages.wording import count, size
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
    return [_row(name, network, itemsize) for name, network in quantization["networks"].items()], ""


def _row(name: str, network: dict[str, Any], itemsize: int) -> dict[str, Any]:
    sites = Sites(tuple(o for o, _ in network["sites"]), tuple(i for _, i in network["sites"]))
    bonds, gauge = tuple(network["bonds"]), bool(network["gauge"])
    parameters = sites.parameters(bonds, gauge)
    return {
        "name": name,
        "shape": [sites.out_features, sites.in_features],
        "sites": str(sites),
        "bonds": list(bonds),
        "gauge": gauge,
        "parameters": parameters,
        "bytes": parameters * itemsize + (4 * sites.out_features if gauge else 0),
        "multiply_adds": sites.multiply_adds(bonds, gauge),
        "dense_parameters": sites.out_features * sites.in_features,
        "error": None,
    }


def network_table(networks: Sequence[dict[str, Any]], metric: str) -> list[Table]:
    """Returns the table of all networks and one of the totals."""
    head = f"error ({metric})" if metric else "error"
    table = Table("matrix", "shape", "sites", "bonds", "parameters", "kept", "bytes", "multiply-adds", head)
    for n in networks:
        table.add_row(
            n["name"],
            "×".join(map(str, n["shape"])),
            (n["sites"] or "dense") + (" gauge" if n["gauge"] else ""),
            ",".join(map(str, n["bonds"])),
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
    kept, work = sum(n["parameters"] for n in networks), sum(n["multiply_adds"] for n in networks)
    total.add_row(
        str(len(networks)),
        count(kept),
        f"{kept / dense:.3f}",
        size(sum(n["bytes"] for n in networks)),
        count(work),
        f"{work / dense:.3f}",
    )
    return [table, total]
