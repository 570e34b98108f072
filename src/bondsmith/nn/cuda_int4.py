"""torch's kernel for four-bit weights on CUDA devices; activations in bfloat16.

How it wants the codes to lie depends on the version and is not documented. So torch's own conversion is sent numbered codes, which shows
where each comes to lie; and the kernel is used only on a device where one product with it has been seen to be right.

Legend: `O` out features, `I` in features, `G` groups of a row. Codes come in tiles of 8 rows and 32, 64 or 128 columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bondsmith.nn.pairs import pairs
from bondsmith.tensor.rounding import Grid, round_to_nearest

log = logging.getLogger(__name__)
UP_TO = 32  # tokens; beyond, the matrix is unpacked for one GEMM
_ROWS, _STEP, _INNER = 8, 16, (8, 4, 2)
_GROUPS = (32, 64, 128, 256)


def has_int4(grid: Grid, out_features: int, in_features: int, device: torch.device) -> bool:
    """Whether the kernel takes such a matrix, and works on the device."""
    known = grid.bits == 4 and grid.codebook == "uniform" and grid.group in _GROUPS
    fits = out_features % _ROWS == 0 and in_features % (_STEP * _INNER[-1]) == 0
    return known and fits and in_features % grid.group == 0 and _works(device)


def to_order(packed: Tensor) -> Tensor:
    """Packed rows `(O, I / 2)` in the kernel's order, the same shape and bytes."""
    return _convert(packed, _inner(2 * packed.shape[1])).view(packed.shape)


def from_order(ordered: Tensor) -> Tensor:
    """The inverse of `to_order`, on any device."""
    inner = _inner(2 * ordered.shape[1])
    return from_tiles(ordered, _places(inner).to(ordered.device), _ROWS, _STEP * inner)


def rows_from_order(ordered: Tensor, rows: Tensor) -> Tensor:
    """The packed rows with these numbers, `(n, I / 2)` in the order of the file format."""
    half = ordered.shape[1]
    tiles = ordered.view(-1, _ROWS * half)[rows // _ROWS].view(-1, half)
    return from_order(tiles).view(-1, _ROWS, half)[torch.arange(len(rows), device=rows.device), rows % _ROWS]


def matmul(x: Tensor, ordered: Tensor, grid: Grid, scales: Tensor, centres: Tensor | None) -> Tensor:
    """`(T, O)` from `(T, I)` bfloat16 activations and codes in the kernel's order, which it reads as `q - 8`."""
    rows, columns = ordered.shape[0], 2 * ordered.shape[1]
    inner = _inner(columns)
    tiles = ordered.view(torch.int32).view(rows // _ROWS, columns // (_STEP * inner), 32, inner // 2)
    return torch.ops.aten._weight_int4pack_mm(x, tiles, grid.group, pairs(scales, centres, rows))


def learn_places(convert: Callable[[Tensor], Tensor], rows: int, columns: int) -> Tensor:
    """Where the codes of a tile come to lie: for each, row by row, the number of its half byte after `convert`, low halves first.

    `convert` takes packed rows `(rows, columns / 2)`, even columns in the low halves. ValueError if it does more than move codes.
    """
    number = torch.arange(rows * columns)
    found = torch.zeros_like(number)
    for digit in range(0, max(1, int(number[-1]).bit_length()), 4):
        codes = (number >> digit & 15).to(torch.uint8).view(rows, columns)
        there = convert(codes[:, ::2] | codes[:, 1::2] << 4).flatten().view(torch.uint8).cpu()
        found |= torch.stack((there & 15, there >> 4), -1).flatten().to(torch.int64) << digit
    if not torch.equal(found.sort().values, number):
        raise ValueError("the codes are not only moved")
    return found.argsort()


def from_tiles(ordered: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Packed rows, in the order of the file format, of a matrix whose tiles of `rows` x `columns` codes lie one after the other."""
    shape, size = ordered.shape, rows * columns
    halves = torch.stack((ordered & 15, ordered >> 4), -1).view(-1, size)
    tiles = halves[:, places].view(shape[0] // rows, -1, rows, columns)
    codes = tiles.transpose(1, 2).reshape(shape[0], shape[1], 2)
    return codes[..., 0] | codes[..., 1] << 4


def _inner(columns: int) -> int:
    return next(inner for inner in _INNER if columns % (_STEP * inner) == 0)


def _convert(packed: Tensor, inner: int) -> Tensor:
    swapped = packed << 4 | packed >> 4
    return torch.ops.aten._convert_weight_to_int4pack(swapped, inner).contiguous().view(torch.uint8)


@cache
def _places(inner: int) -> Tensor:
    return learn_places(lambda packed: _convert(packed.cuda(), inner), _ROWS, _STEP * inner)


@cache
def _works(device: torch.device) -> bool:
    """Whether products, and the way back from the kernel's order, are right on the device."""
    grid, generator = Grid(4, 64, symmetric=False), torch.Generator().manual_seed(0)
    try:
        for columns in (128, 192):
            rounded = round_to_nearest(torch.randn(64, columns, generator=generator), grid)
            x, packed = torch.randn(4, columns, generator=generator), rounded.pack().to(device)
            assert rounded.centres is not None
            ordered, scales, centres = to_order(packed), rounded.scales.to(device), rounded.centres.to(device)
            y = matmul(x.to(device, torch.bfloat16), ordered, grid, scales, centres)
            expected = x @ rounded.dequantize().T
            if not torch.equal(from_order(ordered), packed) or (y.cpu() - expected).norm() > 0.02 * expected.norm():
                raise ValueError("a product is wrong")
    except (AttributeError, RuntimeError, NotImplementedError, ValueError) as error:
        log.info("%s: four-bit matrices are unpacked for every call; torch's kernel does not serve: %s", device, error)
        return False
    return True
