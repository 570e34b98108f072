"""File, memory and speed of a model packed to few bits, against bfloat16, planned models and other packages; the `--speed` of `bits.py`.

    python benchmarks/packed_speed.py MODEL [--rounds 9]

prints the limit of decoding alone: all matrix products of a token, one after the other as in the model, by modules and by bare kernels.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from bondsmith.model.blocks import find_blocks, matrices, weight
from bondsmith.model.hub import BondsmithConfig, attach, load, pack_embedding, packed_section
from bondsmith.nn import kernels
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, PackedMatrix
from bondsmith.stages.speed import _decode, time_prefill
from bondsmith.tensor.rounding import Grid, round_to_nearest


def packed_model(model: PreTrainedModel, grid: Grid) -> PreTrainedModel:
    """Returns a bfloat16 copy whose matrices, embedding and head are packed."""
    other = copy.deepcopy(model)
    path = find_blocks(other)
    for name, matrix in [(n, m) for n, m in matrices(other).items() if n.startswith(path + ".")]:
        rounded = round_to_nearest(weight(matrix).detach(), grid, search=False)
        other.set_submodule(name, PackedLinear.from_rounded(rounded, getattr(matrix, "bias", None)))
    for module in (other.get_input_embeddings(), other.get_output_embeddings()):
        name = next((n for n, m in other.named_modules() if m is module), None)
        if name is None or isinstance(other.get_submodule(name), PackedMatrix) or not hasattr(module, "weight"):
            continue
        rounded = round_to_nearest(module.weight.detach(), grid, search=False)
        if isinstance(module, nn.Embedding):
            packed = PackedEmbedding(module, grid)
            packed.put(rounded)
            pack_embedding(other, name, packed)
        elif any(m is module for m in other.modules()):
            other.set_submodule(name, PackedLinear.from_rounded(rounded, getattr(module, "bias", None)))
    attach(other, BondsmithConfig(packed=packed_section(other)))
    return other.to(torch.bfloat16)


def hqq_model(model: PreTrainedModel, group: int) -> PreTrainedModel:
    """Returns a bfloat16 copy whose matrices are HQQ's own four-bit modules; embedding and head stay as they are."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    other = copy.deepcopy(model).to(torch.bfloat16)
    path = find_blocks(other)
    for name, matrix in [(n, m) for n, m in matrices(other).items() if n.startswith(path + ".")]:
        config = BaseQuantizeConfig(nbits=4, group_size=group)
        other.set_submodule(name, HQQLinear(matrix, config, compute_dtype=torch.bfloat16, device="cpu"))
    return other


def resident_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of all tensors that a model keeps, also of those that other packages keep beside parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        meta = getattr(module, "meta", None)  # HQQ: scales and zeros
        beside = [*meta.values()] if isinstance(meta, dict) else []
        beside += [getattr(getattr(weight, "quant_state", None), "absmax", None), getattr(weight, "SCB", None)]
        tensors += [t for t in (*beside, getattr(module, "W_q", None)) if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.numel()}.values())


def contestants(
    model: PreTrainedModel, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, PreTrainedModel, int | None]]:
    """Yields name, model in bfloat16 as `from_pretrained` gives it, and bytes of its weight files (None where none were written).

    First the original, then its matrices packed as the recipes do, then `--models`, then what other packages make of it.
    """
    low = copy.deepcopy(model).to(torch.bfloat16)
    low.save_pretrained(folder / "bfloat16")
    grids = {f"int{bits}, group {options.group}": Grid(bits, options.group, symmetric=False) for bits in (4, 3, 2)}
    for name, grid in {"int8, per row": Grid(8, 0), **grids}.items():
        packed_model(model, grid).save_pretrained(folder / name)
    places = {name: folder / name for name in ("bfloat16", "int8, per row", *grids)}
    for name, place in {**places, **{m.name: m for m in options.models}}.items():
        size = sum(f.stat().st_size for f in place.glob("*.safetensors"))
        yield name, load(place, dtype=torch.bfloat16), size
        if place in options.models:
            yield f"{name}, widened", load(place, widen=True, dtype=torch.bfloat16), size

    def bitsandbytes(**settings: Any) -> PreTrainedModel:
        config = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    for name, make in {
        "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
        "bitsandbytes NF4": lambda: bitsandbytes(**nf4),
        "HQQ int4": lambda: hqq_model(model, options.group),
    }.items():
        try:
            other = make()
        except (ImportError, RuntimeError, ValueError, TypeError) as error:
            print(f"{name}: left out, {str(error).splitlines()[0]}", flush=True)
            continue
        yield name, other, None


def speeds(model: PreTrainedModel, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Returns file bytes, resident bytes and speeds of all contestants, timed in alternation; medians, and ratios to the first."""
    found = list(contestants(model, options, folder))
    gc.collect()
    ids = torch.randint(0, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in found}
    with torch.no_grad():
        for _, other, _ in found:
            _decode(other, ids[:, :16], 2)
        for _ in range(options.rounds):
            for name, other, _ in found:
                times[name].append((time_prefill(other, ids), _decode(other, ids[:, :64], 16)))
    first = times[found[0][0]]
    rows = []
    for name, other, size in found:
        row: dict[str, Any] = {"model": name, "file": size, "resident": resident_bytes(other)}
        for i, (kind, tokens) in enumerate((("prefill", 256), ("decode", 16))):
            row[kind] = tokens / statistics.median(pair[i] for pair in times[name])
            row[f"{kind}_ratio"] = statistics.median(a[i] / b[i] for a, b in zip(first, times[name], strict=True))
        rows.append(row)
    return rows


def show_speeds(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "bfloat16 activations", "file MB", "resident MB", "prefill, tokens/s", "decode, tokens/s", "of bfloat16"
    )
    for row in rows:
        file = "" if row["file"] is None else f"{row['file'] / 1e6:.1f}"
        ratios = f"{row['prefill_ratio']:.2f}, {row['decode_ratio']:.2f}"
        cells = (file, f"{row['resident'] / 1e6:.1f}", f"{row['prefill']:.0f}", f"{row['decode']:.1f}", ratios)
        table.add_row(row["model"], *cells)
    Console(width=120).print(table)


def products(model: PreTrainedModel, bare: bool) -> float:
    """Returns the seconds of all matrix products of one token; `bare` by kernels whose scales are ready, not by modules."""
    calls: list[Callable[[], Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            x = torch.randn(1, module.in_features, dtype=torch.bfloat16)
            calls.append(partial(F.linear if bare else module, x, *([module.weight] if bare else [])))
        elif isinstance(module, PackedLinear | PackedHead):
            x = torch.randn(1, module.in_features, dtype=torch.bfloat16)
            matrix = module.embedding if isinstance(module, PackedHead) else module
            module(x)  # brings codes into the order of the kernel
            calls.append(_kernel(matrix, x) if bare else partial(module, x))
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _kernel(matrix: PackedMatrix, x: Tensor) -> Callable[[], Tensor]:
    grid, ops = matrix.grid, torch.ops.aten
    if grid.bits == 8:
        return partial(
            ops._weight_int8pack_mm, x, matrix.codes.view(torch.int8), matrix.scales[:, 0].to(torch.bfloat16)
        )
    scales = kernels.int4_scales(matrix.codes, grid, matrix.scales, matrix.centres, matrix.columns)
    codes = matrix.codes.view(scales.shape[1], -1)
    return partial(ops._weight_int4pack_mm_for_cpu, x, codes, kernels.int4_group(grid, matrix.columns), scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    models = {
        "int8, per row": packed_model(plain, Grid(8, 0)),
        f"int4, group {options.group}": packed_model(plain, Grid(4, options.group, symmetric=False)),
    }
    models = {"bfloat16": plain.to(torch.bfloat16), **models}
    found: dict[tuple[str, bool], list[float]] = {}
    with torch.no_grad():
        for _ in range(options.rounds + 1):
            for name, model in models.items():
                for bare in (False, True):
                    found.setdefault((name, bare), []).append(products(model, bare))
    table = Table("products of one token", "modules, ms", "bare kernels, ms", "of bfloat16")
    for name in models:
        cells = [statistics.median(found[name, bare][1:]) * 1e3 for bare in (False, True)]
        ratios = [
            statistics.median(a / b for a, b in zip(found["bfloat16", bare][1:], found[name, bare][1:], strict=True))
            for bare in (False, True)
        ]
        table.add_row(name, *(f"{ms:.1f}" for ms in cells), ", ".join(f"{ratio:.2f}" for ratio in ratios))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
