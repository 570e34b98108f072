"""Rounding to few bits: grids of integers with a scale (and a minimum) per group.

Legend: `W` a `(O, I)` matrix, `g` columns that share a scale, `q` integer codes.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
CODEBOOKS = ("uniform", "nf4")


@dataclass(frozen=True)
class Grid:
    """How a matrix is rounded: `bits` a weight, one scale per `group` columns of a row (0: per row).

    A symmetric grid has a scale per group, an asymmetric one a scale and a minimum as well, both float16.

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
        if self.group < 0:
            raise ValueError(f"a group of {self.group} columns does not exist; 0 is one scale per row")

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`; the last one may be shorter."""
        return 1 if self.group == 0 else -(-columns // self.group)

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed integers, rows padded to whole bytes, and of scales and minima."""
        codes = rows * -(-columns * self.bits // 8)
        return codes + rows * self.groups(columns) * (2 if self.symmetric else 4)

    def bits_per_weight(self, columns: int) -> float:
        """Bits of a weight in a row of `columns`, scales and minima included."""
        return 8 * self.packed_bytes(1, columns) / columns

    def to_json(self) -> dict[str, int | bool | str]:
        """A plain dictionary; `Grid(**it)` takes it back."""
        return {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, "codebook": self.codebook}

    def __str__(self) -> str:
        kind = self.codebook if self.codebook != "uniform" else f"int{self.bits}"
        group = f"g{self.group}" if self.group else "row"
        return f"{kind}-{group}{'' if self.symmetric else '-min'}"
