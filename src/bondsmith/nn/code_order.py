"""How the codes of a packed matrix lie: as in the file, or as an int4 kernel wants them. Their shape tells which.

- In the file: packed rows `(O, bytes)`.
- For the CPU's kernel: `(blocks, I, block / 2)` with codes of four bits, filled up to whole blocks of rows and groups of columns.
- For CUDA's: `(1, 1, O, I / 2)`.

So it survives copies, other devices and machines, and whoever handles buffers without knowing of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bondsmith.nn import cuda_int4, kernels
from bondsmith.tensor.packing import pack, row_bytes, unpack
from bondsmith.tensor.rounding import Grid

_ORDERS = {2: "file", 3: "cpu", 4: "cuda"}


def order(codes: Tensor) -> str:
    """`file`, `cpu` or `cuda`."""
    return _ORDERS[codes.dim()]


def kernel_grid(grid: Grid) -> Grid:
    """The same grid with the four bits of the kernels."""
    return replace(grid, bits=4)


def shift(grid: Grid) -> int:
    """What fewer bits than four are raised by for the CPU's kernel: around the middle of its range it is exact enough."""
    return max(0, 8 - 2 ** (grid.bits - 1))


def to_file(codes: Tensor, grid: Grid, rows: int, columns: int) -> Tensor:
    """The packed rows `(O, bytes)` of codes in any order, alone in their memory."""
    if order(codes) == "file":
        return codes
    if order(codes) == "cuda":
        return cuda_int4.from_order(codes[0, 0])
    return _narrow(kernels.from_int4_order(codes)[:rows], grid, columns).clone(memory_format=torch.contiguous_format)


def to_cpu_kernel(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Packed rows in the order of the CPU's int4 kernel; two and three bits become four with the same levels."""
    if grid.bits != 4:
        packed = pack(unpack(packed, grid.bits, columns) + shift(grid), 4)
    return kernels.to_int4_order(kernels.fill_up(packed, kernel_grid(grid), columns))


def to_cuda_kernel(packed: Tensor) -> Tensor:
    """Packed rows in the order of CUDA's int4 kernel."""
    return cuda_int4.to_order(packed)[None, None]


def packed_rows(codes: Tensor, rows: Tensor, grid: Grid, columns: int) -> Tensor:
    """The rows with these numbers as in the file, `(n, bytes)`, from codes in any order."""
    if order(codes) == "file":
        return codes[rows]
    if order(codes) == "cuda":
        return cuda_int4.rows_from_order(codes[0, 0], rows)
    return _narrow(kernels.rows_from_int4_order(codes, rows), grid, columns)


def _narrow(packed: Tensor, grid: Grid, columns: int) -> Tensor:
    """Rows of four bits, perhaps filled up, as rows of the grid's bits."""
    if grid.bits == 4:
        return packed[:, : row_bytes(columns, 4)]
    return pack(unpack(packed, 4, columns) - shift(grid), grid.bits)
