"""Rounding to few bits: grids of integers with a scale (and a centre) per group.

Legend: `W` a `(O, I)` matrix, `g` columns that share a scale, `G` groups of a row, `q` integer codes. A weight is
`scale * level(q)`, plus a centre where the grid is asymmetric: what its middle code `2^(b - 1)`, of level zero, stands for. Symmetric
levels of up to four bits are `q - (2^b - 1) / 2`: as many below zero as above, none on it, which is the better half of a bit at two
bits. Eight bits have `q - 128`. Scales and centres are bfloat16, in which torch's kernels multiply by them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bondsmith.tensor.checks import check_matrix
from bondsmith.tensor.packing import pack, row_bytes, unpack

BITS = (2, 3, 4, 8)
CODEBOOKS = ("uniform", "nf4")
SCALE_DTYPE = torch.bfloat16  # of scales and centres
_LARGEST = 1e18  # the square of a larger entry leaves float32 in a sum
# The normal-float levels of QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_SHRINK = {2: 0.35, 3: 0.45, 4: 0.6, 8: 0.95}  # smallest share of the largest entry that a scale search tries
_TRIALS = {2: 28, 3: 24, 4: 20, 8: 3}
_REFITS = 3


@dataclass(frozen=True)
class Grid:
    """How a matrix is rounded: `bits` a weight, one scale per `group` columns of a row (0: per row).

    A symmetric grid has a scale per group, an asymmetric one a scale and a centre as well, both bfloat16.

    >>> Grid(4, 64, symmetric=False).packed_bytes(576, 1536), Grid(4, 64, symmetric=False).bits_per_weight(1536)
    (497664, 4.5)
    """

    bits: int
    group: int = 64
    symmetric: bool = True
    codebook: str = "uniform"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits do not exist; choose one of {', '.join(map(str, BITS))}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook {self.codebook!r} is not one of {', '.join(CODEBOOKS)}")
        if self.codebook == "nf4" and (self.bits != 4 or not self.symmetric):
            raise ValueError("the codebook nf4 has 4 bits and is symmetric")
        if isinstance(self.group, bool) or not isinstance(self.group, int):
            raise ValueError(f"a group of {self.group!r} columns is no whole number")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric: {self.symmetric!r} is neither true nor false")
        if self.group < 0:
            raise ValueError(f"a group of {self.group} columns does not exist; 0 is one scale per row")

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`; the last one may be shorter."""
        return 1 if self.group == 0 else -(-columns // self.group)

    def slices(self, columns: int) -> list[slice]:
        """The columns of every group.

        >>> Grid(4, 4).slices(10)
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
        """
        step = self.group or columns
        return [slice(first, min(first + step, columns)) for first in range(0, columns, step)]

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed integers, rows padded to whole bytes, and of scales and centres."""
        codes = rows * row_bytes(columns, self.bits)
        return codes + rows * self.groups(columns) * (2 if self.symmetric else 4)

    def bits_per_weight(self, columns: int) -> float:
        """Bits of a weight in a row of `columns`, scales and centres included."""
        return 8 * self.packed_bytes(1, columns) / columns

    @property
    def offset(self) -> float:
        """The code, or the middle between two, that stands for zero times the scale."""
        odd = not self.symmetric or self.bits == 8
        return float(2 ** (self.bits - 1)) if odd else (2**self.bits - 1) / 2

    @property
    def top(self) -> float:
        """The largest level: the scale that just holds a row is its largest absolute entry over this."""
        return 1.0 if self.codebook == "nf4" else 2**self.bits - 1 - self.offset

    def levels(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The level of every code, before scale and centre."""
        if self.codebook == "nf4":
            return torch.tensor(NF4, dtype=dtype, device=codes.device)[codes.int()]
        return codes.to(dtype, copy=True).sub_(self.offset)

    def nearest(self, ratio: Tensor) -> Tensor:
        """The codes, as floating point numbers, of the levels nearest to `(W - centre) / scale`."""
        if self.codebook == "nf4":
            table = torch.tensor(NF4, dtype=ratio.dtype, device=ratio.device)
            return torch.bucketize(ratio, (table[1:] + table[:-1]) / 2).to(ratio.dtype)
        return (ratio + self.offset).round_().clamp_(0, 2**self.bits - 1)

    def to_json(self) -> dict[str, int | bool | str]:
        """A plain dictionary; `Grid(**it)` takes it back."""
        return {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, "codebook": self.codebook}

    def __str__(self) -> str:
        kind = self.codebook if self.codebook != "uniform" else f"int{self.bits}"
        group = f"g{self.group}" if self.group else "row"
        return f"{kind}-{group}{'' if self.symmetric else '-asym'}"


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded matrix: uint8 `codes` `(O, I)`, bfloat16 `scales` `(O, G)`, and `centres` of an asymmetric grid."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    centres: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The `(O, I)` matrix; exactly what a packed layer multiplies by in this dtype."""
        return scaled(self.grid, self.grid.levels(self.codes), self.scales, self.centres).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a weight file holds of it, by the names that the packed modules give."""
        centres = {} if self.centres is None else {"centres": self.centres}
        return {"codes": self.pack(), "scales": self.scales} | centres

    def pack(self) -> Tensor:
        """The codes as packed bytes, `(O, bytes)`."""
        return pack(self.codes, self.grid.bits)

    @classmethod
    def unpack(cls, grid: Grid, columns: int, packed: Tensor, scales: Tensor, centres: Tensor | None = None) -> Rounded:
        """The matrix of packed bytes, scales and centres."""
        return cls(grid, unpack(packed, grid.bits, columns), scales, centres)

    @property
    def bytes(self) -> int:
        """Of the packed matrix."""
        return self.grid.packed_bytes(*self.shape)


def packed_levels(grid: Grid, packed: Tensor, columns: int, out: Tensor | None = None) -> Tensor:
    """The `(O, I)` float32 levels of packed rows, written into `out` where it is given.

    >>> codes = torch.tensor([[0, 7, 3, 4, 1]], dtype=torch.uint8)
    >>> packed_levels(Grid(3), pack(codes, 3), 5)
    tensor([[-3.5000,  3.5000, -0.5000,  0.5000, -2.5000]])
    """
    if out is None:
        out = torch.empty(len(packed), columns, device=packed.device)
    if grid.codebook == "nf4":
        pairs = _nf4_pairs(packed.device).index_select(0, packed.reshape(-1).int())
        return out.copy_(pairs.view(torch.float32).view(len(packed), -1)[:, :columns])
    if grid.bits == 8:
        return out.copy_(packed.view(torch.int8))
    return out.copy_(unpack(packed, grid.bits, columns)).sub_(grid.offset)


@lru_cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The levels of both codes in a byte, as one number of 8 bytes: gathering that is faster than gathering each."""
    numbers = torch.arange(256)[:, None]
    levels = Grid(4, 0, codebook="nf4").levels((numbers >> torch.tensor([0, 4])) & 15)
    return levels.view(torch.int64).flatten().to(device)


def scaled(grid: Grid, levels: Tensor, scales: Tensor, centres: Tensor | None) -> Tensor:
    """`scale * level + centre`, `(O, I)`, from float32 levels, in float32; differentiable in scales and centres.

    Without gradients it takes the place of the levels in memory.
    """
    rows, columns = levels.shape
    group = grid.group or columns
    if columns % group:
        index = torch.arange(columns, device=levels.device) // group
        scales, centres = scales[:, index], None if centres is None else centres[:, index]
        group = 1
    scales, matrix = scales.float()[:, :, None], levels.view(rows, -1, group)
    taught = torch.is_grad_enabled() and (scales.requires_grad or (centres is not None and centres.requires_grad))
    matrix = matrix * scales if taught else matrix.mul_(scales)
    if centres is not None:
        centres = centres.float()[:, :, None]
        matrix = matrix + centres if taught else matrix.add_(centres)
    return matrix.view(rows, columns)


@torch.no_grad()
def round_to_nearest(weight: Tensor, grid: Grid, *, moment: Tensor | None = None, search: bool = True) -> Rounded:
    """`weight` rounded entry by entry; scales are searched for the smallest squared error.

    Args:
        weight: `(O, I)`, finite.
        moment: `(I,)` weights of the columns in that search, e.g. the diagonal of the input moment; all alike by default.
        search: False takes the scale from the largest entry of each group, as plain rounding does.

    Raises:
        ValueError: an entry is not finite, or its square is not.

    >>> rounded = round_to_nearest(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Grid(2, 4, symmetric=False))
    >>> rounded.codes.tolist(), rounded.dequantize().tolist()
    ([[0, 1, 2, 3]], [[0.0, 1.0, 2.0, 3.0]])
    """
    check_weight(weight)
    W = weight.to(torch.float32)
    codes, scales, centres = torch.empty(W.shape, dtype=torch.uint8, device=W.device), [], []
    for columns in grid.slices(W.shape[1]):
        part = W[:, columns]
        scale, centre = find_scale(part, grid, None if moment is None else moment[columns], search)
        codes[:, columns] = encode(part, grid, scale, centre).to(torch.uint8)
        scales.append(scale)
        centres.append(centre)
    return Rounded(grid, codes, as_stored(scales), None if grid.symmetric else as_stored(centres))


def check_weight(weight: Tensor) -> None:
    """Nothing, or ValueError if `weight` is no finite matrix, or an entry so large that its square is not finite."""
    check_matrix(weight)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > _LARGEST:
        raise ValueError(
            f"an entry of {largest:.4g} cannot be rounded (at most {_LARGEST:g}); keep this matrix unrounded"
        )


def encode(part: Tensor, grid: Grid, scale: Tensor, centre: Tensor) -> Tensor:
    """The codes, as floating point numbers, of `(O, g)` columns with `(O,)` scales and centres."""
    return grid.nearest((part if grid.symmetric else part - centre[:, None]) * inverse(scale)[:, None])


def inverse(scale: Tensor) -> Tensor:
    """`1 / scale`, and zero where that is not finite: every code of such a group is the middle one."""
    found = 1 / scale
    return torch.where(torch.isfinite(found), found, 0.0)


def as_stored(groups: Sequence[Tensor]) -> Tensor:
    """Scales or centres `(O,)` of every group as they are stored, `(O, G)`."""
    return torch.stack(tuple(groups), 1).to(SCALE_DTYPE)


def find_scale(part: Tensor, grid: Grid, weights: Tensor | None = None, search: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and centre `(O,)` of one group `(O, g)`, float32 numbers that are bfloat16 numbers.

    A search tries shares of the full range, then least squares on the codes found and rounding in turn. `weights` `(g,)`
    count the squared error of each column.
    """
    low, high = (-part.abs().amax(1), part.abs().amax(1)) if grid.symmetric else (part.amin(1), part.amax(1))
    w = torch.ones_like(part[0]) if weights is None else weights.to(part.dtype).clamp_min(0)
    w = w / w.mean().clamp_min(1e-30) + 1e-6  # columns that are never read still get a sensible scale
    best = _stored(*_range(low, high, grid))
    if not search:
        return best
    error = _error(part, grid, *best, w)
    trials, least = _TRIALS[grid.bits], _SHRINK[grid.bits]
    for trial in range(1, trials):
        share = 1 - (1 - least) * trial / (trials - 1)
        best, error = _better(part, grid, w, best, error, _range(low * share, high * share, grid))
    for _ in range(_REFITS):
        best, error = _better(part, grid, w, best, error, _least_squares(part, grid, *best, w))
    return best


def _range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        return high / grid.top, torch.zeros_like(high)
    scale = (high - low) / (2**grid.bits - 1)
    return scale, low + grid.offset * scale


def _stored(scale: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    return scale.to(SCALE_DTYPE).float(), centre.to(SCALE_DTYPE).float()


def _decoded(part: Tensor, grid: Grid, scale: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    codes = encode(part, grid, scale, centre)
    levels = grid.levels(codes, part.dtype)
    matrix = levels * scale[:, None]
    return levels, matrix if grid.symmetric else matrix + centre[:, None]


def _error(part: Tensor, grid: Grid, scale: Tensor, centre: Tensor, w: Tensor) -> Tensor:
    return (_decoded(part, grid, scale, centre)[1] - part).square() @ w


def _better(
    part: Tensor,
    grid: Grid,
    w: Tensor,
    best: tuple[Tensor, Tensor],
    error: Tensor,
    trial: tuple[Tensor, Tensor],
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The better of two scales, row by row, and its error."""
    scale, centre = _stored(*trial)
    found = _error(part, grid, scale, centre, w)
    better = found < error
    best = torch.where(better, scale, best[0]), torch.where(better, centre, best[1])
    return best, torch.where(better, found, error)


def _least_squares(part: Tensor, grid: Grid, scale: Tensor, centre: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and centre that fit best to the codes which the given ones lead to."""
    levels, _ = _decoded(part, grid, scale, centre)
    qq, qw = levels.square() @ w, (levels * part) @ w
    if grid.symmetric:
        return torch.where(qq > 0, qw / qq.clamp_min(1e-30), scale), centre
    total, q, v = w.sum(), levels @ w, part @ w
    determinant = total * qq - q.square()
    fits = determinant > 1e-6 * total * qq
    slope = torch.where(fits, (total * qw - q * v) / determinant.clamp_min(1e-30), scale)
    return slope, torch.where(fits, (v - slope * q) / total, centre)
