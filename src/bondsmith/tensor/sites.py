"""Site shapes of a weight matrix, and what a network over them costs.

Legend: `O` out features, `I` in features, `n` sites, `o_k`/`i_k` out and in leg of site `k`, `a, b` bonds.
A matrix `W[(o_1..o_n), (i_1..i_n)]` is cut between neighbouring sites; `n - 1` bonds join them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

log = logging.getLogger(__name__)

NEVER = 2**62  # tokens
_EXPLICIT = re.compile(r"^(\(\d+,\d+\))+$")
ROUND_FROM, ROUND_TO = 64, 8  # GEMMs like multiples of 8; below 64 the lost parameters cost more than that


@dataclass(frozen=True)
class Sites:
    """The legs of a network: site `k` has out leg `out_legs[k]` and in leg `in_legs[k]`.

    >>> sites = Sites((24, 24), (48, 32))
    >>> print(sites, sites.out_features, sites.in_features, sites.exact_bonds(), sites.parameters((16,)))
    (24,48)(24,32) 576 1536 (768,) 30720
    """

    out_legs: tuple[int, ...]
    in_legs: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_legs", tuple(self.out_legs))
        object.__setattr__(self, "in_legs", tuple(self.in_legs))
        if len(self.out_legs) != len(self.in_legs) or not self.out_legs:
            raise ValueError(
                f"{len(self.out_legs)} out legs and {len(self.in_legs)} in legs; every site has one of each"
            )
        for leg in self.out_legs + self.in_legs:
            if not _is_count(leg):
                raise ValueError(
                    f"legs are integers of at least 1, not {leg!r} (out {self.out_legs}, in {self.in_legs})"
                )

    @property
    def n(self) -> int:
        """Number of sites."""
        return len(self.out_legs)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return prod(self.out_legs)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return prod(self.in_legs)

    @property
    def is_matrix_cut(self) -> bool:
        """Whether this is `(O,1)(1,I)`, the plain low-rank factorisation."""
        return self.n == 2 and self.in_legs[0] == 1 and self.out_legs[1] == 1

    def exact_bonds(self) -> tuple[int, ...]:
        """The `n - 1` smallest bonds at which every matrix is represented exactly."""
        sizes = [o * i for o, i in zip(self.out_legs, self.in_legs, strict=True)]
        return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, self.n))

    def clip(self, bonds: int | Sequence[int]) -> tuple[int, ...]:
        """`bonds` (one integer for all, or one per cut) cut down to the exact ones; ValueError if one is no bond."""
        chosen = tuple(bonds) if isinstance(bonds, Sequence) else (bonds,) * (self.n - 1)
        if len(chosen) != self.n - 1:
            raise ValueError(f"{self} has {self.n - 1} bonds, not {len(chosen)}: {chosen}")
        for bond in chosen:
            if not _is_count(bond):
                raise ValueError(f"bonds are integers of at least 1, not {bond!r} (of {chosen}, sites {self})")
        return tuple(min(bond, exact) for bond, exact in zip(chosen, self.exact_bonds(), strict=True))

    def core_shapes(self, bonds: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """The `(a, o, i, b)` shape of every core."""
        left, right = (1, *bonds), (*bonds, 1)
        return list(zip(left, self.out_legs, self.in_legs, right, strict=True))

    def parameters(self, bonds: Sequence[int], gauge: bool = False) -> int:
        """Stored numbers at these bonds; a stored gauge saves the square of each."""
        stored = sum(prod(shape) for shape in self.core_shapes(bonds))
        return stored - self._gauge_saving(bonds, gauge)

    def multiply_adds(self, bonds: Sequence[int], gauge: bool = False) -> int:
        """Multiply-adds for one token, the cheapest way round; a stored gauge saves some in the matrix cut only."""
        cheapest = min(self.sweep_cost(bonds, from_right=True), self.sweep_cost(bonds, from_right=False))
        dense = self.materialise_cost(bonds) + self.out_features * self.in_features
        return min(cheapest, dense) - (self._gauge_saving(bonds, gauge) if self.is_matrix_cut else 0)

    def sweep_cost(self, bonds: Sequence[int], from_right: bool) -> int:
        """Multiply-adds per token of contracting site after site, starting at the last (or the first) one."""
        shapes = self.core_shapes(bonds)
        cost = 0
        for k, shape in enumerate(shapes):
            before, after = slice(0, k), slice(k + 1, None)
            done, waiting = (after, before) if from_right else (before, after)
            cost += prod(self.out_legs[done]) * prod(self.in_legs[waiting]) * prod(shape)
        return cost

    def materialise_cost(self, bonds: Sequence[int]) -> int:
        """Multiply-adds of rebuilding the matrix once, folding the sites in from the first to the last."""
        shapes = self.core_shapes(bonds)
        return sum(prod(self.out_legs[:k]) * prod(self.in_legs[:k]) * prod(shapes[k]) for k in range(1, self.n))

    def sweeps_from_right(self, bonds: Sequence[int]) -> bool:
        """Which end a contraction starts at: the cheaper one; the last site at a tie."""
        return self.sweep_cost(bonds, from_right=True) <= self.sweep_cost(bonds, from_right=False)

    def materialise_from(self, bonds: Sequence[int]) -> int:
        """The tokens at which rebuilding the matrix for one dense product costs less than contracting.

        >>> Sites((64, 1), (1, 64)).materialise_from((32,)) > 2**40, Sites((64, 1), (1, 64)).materialise_from((64,))
        (True, 64)
        """
        saved = self.sweep_cost(bonds, self.sweeps_from_right(bonds)) - self.out_features * self.in_features
        return -(-self.materialise_cost(bonds) // saved) if saved > 0 else NEVER // self.in_features

    def bonds_within(self, budget: int, gauge: bool = False, multiple: int = ROUND_TO) -> tuple[int, ...]:
        """The largest uniform bond, clipped to the exact ones, that stores at most `budget` numbers.

        Bonds of 64 and more are rounded down to a `multiple`. ValueError if not even bond 1 fits.

        >>> cut = Sites((576, 1), (1, 576))
        >>> cut.bonds_within(576 * 576 // 2), cut.bonds_within(576 * 576 // 2, gauge=True)
        ((144,), (168,))
        """
        least = self.parameters((1,) * (self.n - 1), gauge)
        if least > budget:
            raise ValueError(
                f"sites {self} need {least} parameters at bond 1, more than the budget of {budget}; "
                f"keep at least {least / (self.out_features * self.in_features):.2g} of the matrix or use more sites"
            )
        low, high = 1, max(self.exact_bonds(), default=1)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.parameters(self.clip(middle), gauge) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        if ROUND_FROM <= low < max(self.exact_bonds()):
            low = max(low - low % multiple, 1)
        return self.clip(low)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` takes it back."""
        return {"out_legs": list(self.out_legs), "in_legs": list(self.in_legs)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sites:
        """The sites a `to_json` dictionary describes."""
        return cls(tuple(data["out_legs"]), tuple(data["in_legs"]))

    def __str__(self) -> str:
        return "".join(f"({o},{i})" for o, i in zip(self.out_legs, self.in_legs, strict=True))

    def _gauge_saving(self, bonds: Sequence[int], gauge: bool) -> int:
        if not gauge:
            return 0
        for (a, o, i, b), bond in zip(self.core_shapes(bonds), bonds, strict=False):
            if b > a * o * i:
                raise ValueError(f"bond {bond} of {tuple(bonds)} has only {a * o * i} rows to its left in sites {self}")
        return sum(bond**2 for bond in bonds)


def clip_bonds(sites: Sites, bonds: int | Sequence[int]) -> tuple[int, ...]:
    """`sites.clip(bonds)`, with a note in the log where it cuts bonds down."""
    clipped = sites.clip(bonds)
    asked = bonds if isinstance(bonds, Sequence) else (bonds,) * (sites.n - 1)
    if any(bond > kept for bond, kept in zip(asked, clipped, strict=True)):
        log.info("sites %s are exact at bonds %s: bonds %s are cut down to these", sites, sites.exact_bonds(), bonds)
    return clipped


def parse_sites(spec: str, out_features: int, in_features: int) -> Sites:
    """The sites that `spec` names for an `(out_features, in_features)` matrix.

    `matrix` and `auto`: `(O,1)(1,I)`. `interleaved:N`: N sites, legs as equal as the factors allow. `thin:S`:
    `(O/S,S)(S,I/S)`. Or the legs themselves, `(24,48)(24,32)`. ValueError with the numbers and what would work.

    >>> print(parse_sites("interleaved:3", 576, 1536), parse_sites("thin:2", 576, 1536))
    (8,16)(8,12)(9,8) (288,2)(2,768)
    """
    kind, _, number = spec.strip().partition(":")
    if kind in ("matrix", "auto") and not number:
        return Sites((out_features, 1), (1, in_features))
    if kind in ("interleaved", "thin") and number.isdigit() and int(number) > 0:
        build = interleaved if kind == "interleaved" else thin
        return build(int(number), out_features, in_features)
    if _EXPLICIT.match(spec.replace(" ", "")):
        return _explicit(spec, out_features, in_features)
    raise ValueError(
        f"sites {spec!r} are not understood; use auto, matrix, interleaved:N, thin:S or legs like (24,24)(24,24)"
    )


def interleaved(n: int, out_features: int, in_features: int) -> Sites:
    """`n` sites with legs as equal as the factors of both dimensions allow, large out legs beside small in legs.

    Prime dimensions give legs of 1; only a site with both legs 1 is an error, which names the nearest sizes that work.
    """
    sites = _interleaved(n, out_features, in_features)
    if sites is None:
        raise ValueError(
            f"{out_features} x {in_features} has too few prime factors for {n} sites: one would be (1,1); use fewer "
            f"sites, 'matrix', or a size that splits ({_nearest(n, out_features)} x {_nearest(n, in_features)} does)"
        )
    return sites


def thin(s: int, out_features: int, in_features: int) -> Sites:
    """Two sites `(O/s,s)(s,I/s)`: a matrix cut with short legs crossed over; ValueError if `s` divides badly."""
    for name, features in (("out", out_features), ("in", in_features)):
        if features % s:
            workable = sorted(divisors(math.gcd(out_features, in_features)), key=lambda d: abs(d - s))[:3]
            raise ValueError(
                f"thin:{s} does not divide {name} features {features}: {features} % {s} = {features % s}; "
                f"try {', '.join(f'thin:{d}' for d in sorted(workable))}"
            )
    return Sites((out_features // s, s), (s, in_features // s))


def divisors(number: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def factorisations(number: int, n: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as `n` ascending factors.

    >>> list(factorisations(12, 2))
    [(1, 12), (2, 6), (3, 4)]
    """
    if n == 1:
        if number >= least:
            yield (number,)
        return
    for factor in divisors(number):
        if factor >= least and factor**n <= number:
            for rest in factorisations(number // factor, n - 1, factor):
                yield (factor, *rest)


def balanced(number: int, n: int) -> tuple[int, ...]:
    """The `n` ascending factors with the smallest sum, the most equal ones.

    >>> balanced(576, 3), balanced(7, 2)
    ((8, 8, 9), (1, 7))
    """
    return min(factorisations(number, n), key=lambda factors: (sum(factors), factors))


def _interleaved(n: int, out_features: int, in_features: int) -> Sites | None:
    if n > out_features.bit_length() + in_features.bit_length():  # more than both have prime factors
        return None
    sites = Sites(balanced(out_features, n), balanced(in_features, n)[::-1])
    return None if (1, 1) in zip(sites.out_legs, sites.in_legs, strict=True) else sites


def _nearest(n: int, features: int) -> int:
    """The size nearest to `features` whose most equal `n` factors lie within a factor of four of each other."""
    if features <= 2**n:
        return int(2**n)
    for distance in range(features + 4**n):
        for size in (features - distance, features + distance):
            if size >= 2**n:
                factors = balanced(size, n)
                if factors[0] > 1 and factors[-1] <= 4 * factors[0]:
                    return size
    raise AssertionError("2 ** n always splits")


def _explicit(spec: str, out_features: int, in_features: int) -> Sites:
    legs = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", spec.replace(" ", ""))]
    sites = Sites(tuple(leg[0] for leg in legs), tuple(leg[1] for leg in legs))
    if (sites.out_features, sites.in_features) != (out_features, in_features):
        fitting = _interleaved(sites.n, out_features, in_features) or "matrix"
        raise ValueError(
            f"sites {sites} multiply to {sites.out_features} x {sites.in_features}, the matrix is "
            f"{out_features} x {in_features}; a split that fits: {fitting}"
        )
    return sites


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
