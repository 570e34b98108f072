"""Ways to round a matrix to few bits: ours, and the rivals of `bits.py`, each from its own package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bondsmith.tensor.gptq import gptq
from bondsmith.tensor.rounding import Grid, round_to_nearest

Round = Callable[[Tensor, Tensor | None], tuple[Tensor, int]]


def ours(grid: Grid, sweeps: int = 2) -> Round:
    def run(W: Tensor, C: Tensor | None) -> tuple[Tensor, int]:
        rounded = gptq(W, grid, C, sweeps=sweeps) if C is not None else round_to_nearest(W, grid)
        return rounded.dequantize(), rounded.bytes

    return run


def nearest(grid: Grid, search: bool) -> Round:
    def run(W: Tensor, C: Tensor | None) -> tuple[Tensor, int]:
        rounded = round_to_nearest(W, grid, search=search)
        return rounded.dequantize(), rounded.bytes

    return run


def hqq(bits: int, group: int) -> Round:
    from hqq.core.quantize import Quantizer

    def run(W: Tensor, C: Tensor | None) -> tuple[Tensor, int]:
        options = {"nbits": bits, "channel_wise": True, "group_size": group, "optimize": True, "round_zero": bits == 4}
        codes, meta = Quantizer.quantize(W, axis=1, device="cpu", compute_dtype=torch.float32, **options)
        return Quantizer.dequantize(codes, meta).float(), Grid(bits, group, symmetric=False).packed_bytes(*W.shape)

    return run


def nf4(block: int) -> Round:
    import bitsandbytes.functional as F  # noqa: N812

    def run(W: Tensor, C: Tensor | None) -> tuple[Tensor, int]:
        codes, state = F.quantize_4bit(W, quant_type="nf4", blocksize=block)
        return F.dequantize_4bit(codes, state), codes.numel() + 4 * state.absmax.numel()

    return run


def rowwise_int8(W: Tensor, C: Tensor | None) -> tuple[Tensor, int]:
    """LLM.int8() keeps a float32 scale a row, of the largest entry."""
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale).round() * scale, W.numel() + 4 * len(W)


def methods(bits: int, group: int) -> dict[str, Callable[[], Round]]:
    """Returns what is compared at a width, all of the same bytes or nearly."""
    if bits == 8:
        grid = Grid(8, 0)
        return {
            "round to nearest": lambda: nearest(grid, False),
            "bitsandbytes int8": lambda: rowwise_int8,
            "ours": lambda: ours(grid),
        }
    grid = Grid(bits, group, symmetric=False)
    found = {
        "round to nearest": lambda: nearest(grid, False),
        "searched scales": lambda: nearest(grid, True),
        "HQQ": lambda: hqq(bits, group),
        "GPTQ": lambda: ours(grid, 0),
        "ours": lambda: ours(grid),
    }
    return found | (
        {"bitsandbytes NF4": lambda: nf4(group), "ours, NF4": lambda: ours(Grid(4, group, codebook="nf4"))}
        if bits == 4
        else {}
    )
