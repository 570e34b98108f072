"""torch's kernels for packed weights on a CPU: int8 with a scale per row, int4 in groups; activations in bfloat16.

Legend: `T` tokens, `O` out features, `I` in features, `G` groups of a row. The int4 kernel wants the codes in another order:
blocks of 64 (AVX-512) or 32 rows, column after column, the first half of a block's rows in the low four bits and the second in
the high ones: `(blocks, I, block / 2)` bytes, as `to_int4_order` makes them. A group of a grid may be several of the kernel's, which then
have the same scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bondsmith.nn.pairs import pairs
from bondsmith.tensor.rounding import Grid

# Up to here the kernels beat unpacking the matrix for one bfloat16 GEMM: they hardly gain from more tokens.
INT8_UP_TO = 40
INT4_UP_TO = 48
FLOAT_UP_TO = 8  # tokens for which casting an unpacked matrix takes longer than multiplying by it in float32
CHUNK = 2**20  # numbers of a matrix that are unpacked at a time: with fewer, calls cost more than caches save
_INT4_GROUPS = (256, 128, 64, 32)


def gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype for the product of `x` with an unpacked matrix: its own, or float32 where a CPU has no GEMM of 16 bits."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in _SLOW else x.dtype


def _has_gemm(asked: str) -> bool:
    try:
        return bool(getattr(torch.ops.mkldnn, asked)())
    except (AttributeError, RuntimeError):
        return False


_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# What oneDNN does not multiply on this processor: torch's own loops take 4 to 100 times as long as float32.
_SLOW = {dtype for dtype, asked in _ASKED.items() if not _has_gemm(asked)}


def has_int8(grid: Grid, out_features: int, in_features: int) -> bool:
    """Whether the int8 kernel takes such a matrix."""
    plain = grid.bits == 8 and grid.symmetric and grid.groups(in_features) == 1
    return plain and out_features % 16 == 0 and in_features % 16 == 0 and hasattr(torch.ops.aten, "_weight_int8pack_mm")


def has_int4(grid: Grid, out_features: int, in_features: int) -> bool:
    """Whether the int4 kernel takes such a matrix, and its order of codes is the one known here.

    Rows are filled up to whole blocks, columns to whole groups, each by at most a third.
    """
    known = grid.bits == 4 and grid.codebook == "uniform" and int4_block() > 0
    return known and int4_group(grid, in_features) > 0 and 3 * (-out_features % int4_block()) <= out_features


@cache
def int4_group(grid: Grid, in_features: int) -> int:
    """The kernel's group for this grid: one that its groups are made of, with which columns are filled up least; 0 if none fits."""
    known = [g for g in _INT4_GROUPS if grid.group % g == 0 and 3 * (-in_features % g) <= in_features]
    return min(known, key=lambda g: -in_features % g, default=0)


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts where torch lets one start; the int8 kernel crashes on others, such as views and files in memory."""
    return tensor.data_ptr() % 64 == 0


def is_of_this_machine(ordered: Tensor) -> bool:
    """Whether codes in the int4 kernel's order have the blocks of this processor: others come with a model pickled elsewhere."""
    return 2 * ordered.shape[2] == int4_block()


def int8_matmul(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """`(T, O)` from `(T, I)` bfloat16 activations, bytes `(O, I)`, which are signed integers as they lie, and bfloat16 scales `(O,)`."""
    x = x.contiguous() if is_aligned(x) or not x.is_contiguous() else x.clone()
    return torch.ops.aten._weight_int8pack_mm(x, packed.view(torch.int8), scales)


def int4_matmul(x: Tensor, ordered: Tensor, grid: Grid, scales: Tensor, centres: Tensor | None) -> Tensor:
    """`(T, rows of whole blocks)` from `(T, I)` bfloat16 activations and codes in the kernel's order, which it reads as `q - 8`."""
    values = int4_scales(ordered, grid, scales, centres, x.shape[1])
    codes = ordered.view(_filled_rows(ordered), -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(_filled(x, ordered), codes, int4_group(grid, x.shape[1]), values)


def int4_scales(ordered: Tensor, grid: Grid, scales: Tensor, centres: Tensor | None, in_features: int) -> Tensor:
    """What the int4 kernel multiplies by and adds, `(G, rows of whole blocks, 2)` bfloat16."""
    return _spread(pairs(scales, centres, _filled_rows(ordered)), grid, in_features, 0)


def _spread(values: Tensor, grid: Grid, in_features: int, dim: int) -> Tensor:
    """Values of the grid's groups for the groups of the kernel that they are made of."""
    group = int4_group(grid, in_features)
    needed = -(-in_features // group)
    times = grid.group // group if grid.group else needed
    return values if times == 1 else values.repeat_interleave(times, dim).narrow(dim, 0, needed)


def _filled(x: Tensor, ordered: Tensor) -> Tensor:
    """`x` with zeros for the columns that the kernel's order has more."""
    more = ordered.shape[1] - x.shape[1]
    return F.pad(x, (0, more)) if more else x


def _filled_rows(ordered: Tensor) -> int:
    return 2 * ordered.shape[0] * ordered.shape[2]


def fill_up(packed: Tensor, grid: Grid, in_features: int) -> Tensor:
    """Packed rows of four bits with zeros up to whole groups of columns and whole blocks of rows."""
    group = int4_group(grid, in_features)
    width = -(-in_features // group) * group // 2
    return F.pad(packed, (0, width - packed.shape[1], 0, -len(packed) % int4_block()))


def to_int4_order(packed: Tensor) -> Tensor:
    """Packed rows `(O, I / 2)`, `O` whole blocks, in the kernel's order `(blocks, I, block / 2)`."""
    block = int4_block()
    rows, half = packed.shape
    low, high = packed & 15, packed >> 4  # even and odd columns
    codes = torch.stack((low, high), -1).reshape(rows // block, 2, block // 2, 2 * half)
    return (codes[:, 0] | (codes[:, 1] << 4)).transpose(1, 2).contiguous()


def from_int4_order(ordered: Tensor) -> Tensor:
    """The inverse of `to_int4_order`, also of another machine's, whose blocks may be of another size."""
    split = ordered.transpose(1, 2)
    codes = torch.stack((split & 15, split >> 4), 1).reshape(_filled_rows(ordered), -1, 2)
    return codes[..., 0] | (codes[..., 1] << 4)


def int4_unpacked_matmul(x: Tensor, ordered: Tensor, grid: Grid, scales: Tensor, centres: Tensor | None) -> Tensor:
    """`(T, rows of whole blocks)` from codes in the kernel's order: some blocks at a time are unpacked for a GEMM.

    Each byte holds two rows half a block apart: first come all in the low bits, then all in the high ones, each a GEMM of its own.
    """
    (_, columns, half), rows, wide = ordered.shape, _filled_rows(ordered), x.to(gemm_dtype(x))
    blocks = min(len(ordered), max(1, CHUNK // (2 * half * columns)))
    y, wide = x.new_empty(len(x), len(ordered), 2, half), _filled(wide, ordered)

    def by_half(values: Tensor) -> Tensor:  # (rows, G) as (2, G, 1, blocks, block / 2)
        spread = F.pad(_spread(values.float(), grid, x.shape[1], 1), (0, 0, 0, rows - len(values)))
        return spread.view(len(ordered), 2, half, -1).permute(1, 3, 0, 2)[:, :, None].contiguous()

    scales, centres = by_half(scales), None if centres is None else by_half(centres)
    space, groups = torch.empty(2 * columns * blocks * half, device=x.device), scales.shape[1]
    for first in range(0, len(ordered), blocks):
        part = slice(first, min(first + blocks, len(ordered)))
        codes = ordered[part].transpose(0, 1).contiguous().view(groups, -1, part.stop - first, half)
        levels = space[: 2 * codes.numel()].view(2, *codes.shape)
        levels[0].copy_(codes & 15)
        levels[1].copy_(codes >> 4)
        levels.sub_(grid.offset).mul_(scales[:, :, :, part])
        if centres is not None:
            levels.add_(centres[:, :, :, part])
        matrices = levels.to(wide.dtype).view(2, columns, -1)
        for side in (0, 1):
            y[:, part, side] = (wide @ matrices[side]).view(len(x), part.stop - first, half)
    return y.view(len(x), rows)


def rows_from_int4_order(ordered: Tensor, rows: Tensor) -> Tensor:
    """The packed rows with these numbers, `(n, I / 2)` in the order of the file format, of a matrix in the kernel's order."""
    half = ordered.shape[2]
    place = rows % (2 * half)
    columns = ordered[rows // (2 * half), :, place % half]
    codes = (columns >> (4 * (place >= half)).to(torch.uint8)[:, None]) & 15
    return codes[:, ::2] | (codes[:, 1::2] << 4)


@cache
def int4_block() -> int:
    """Rows in a block of the int4 kernel's order on this machine: 64 or 32, or 0 where there is no kernel or another order."""
    try:
        generator = torch.Generator().manual_seed(0)  # no two rows alike
        codes = torch.randint(16, (128, 32), generator=generator, dtype=torch.int32, device="cpu")
        there = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).reshape(128, 16)
    except (AttributeError, RuntimeError, NotImplementedError):
        return 0
    for block in (64, 32):
        split = codes.to(torch.uint8).reshape(128 // block, 2, block // 2, 32)
        if torch.equal((split[:, 0] | (split[:, 1] << 4)).transpose(1, 2).reshape(128, 16), there):
            return block
    return 0
