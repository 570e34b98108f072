"""The site shapes worth trying for a matrix, and the search among them.

Legend: `O` out features, `I` in features, `s, t` short legs, `n` sites.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bondsmith.tensor.metric import DAMPING
from bondsmith.tensor.sites import Sites, divisors, factorisations
from bondsmith.tensor.weighted import Fit, fit_mpo

SHORT_LEGS = (1, 2, 4)


def candidate_sites(out_features: int, in_features: int, *, most_sites: int = 3, limit: int = 24) -> list[Sites]:
    """At most `limit` different shapes, the cheapest to run first at half of the parameters.

    The matrix cut, thin legs `(O/s,t)(s,I/t)` with `s, t` up to 4, and for 2 to `most_sites` sites the pairs of the two
    most equal factorisations of each dimension, the out legs ascending, the in legs descending.

    >>> for sites in candidate_sites(6, 9):
    ...     print(sites)
    (6,1)(1,9)
    (3,1)(2,9)
    (2,3)(3,3)
    """
    found = {Sites((out_features, 1), (1, in_features))}
    for s in SHORT_LEGS:
        for t in SHORT_LEGS:
            if out_features % s == 0 and in_features % t == 0 and s < out_features and t < in_features:
                found.add(Sites((out_features // s, s), (t, in_features // t)))
    for n in range(2, most_sites + 1):
        for out_legs in _most_equal(out_features, n):
            for in_legs in _most_equal(in_features, n):
                if min(out_legs + in_legs) > 1:
                    found.add(Sites(out_legs, in_legs[::-1]))
    affordable = [sites for sites in found if sites.parameters((1,) * (sites.n - 1)) <= _half(sites)]
    return sorted(affordable, key=lambda sites: (_cost(sites), str(sites)))[:limit]


def search_sites(
    weight: Tensor,
    budget: int,
    *,
    candidates: Sequence[Sites] | None = None,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
    damping: float = DAMPING,
    gauge: bool = True,
    refine: int = 2,
) -> list[Fit]:
    """Fits of at most `budget` stored numbers, the smallest error in the metric first.

    Every candidate is started; the matrix cut, whose start is its end, and the `refine` best of the others, swept to
    convergence, are returned. `gauge` spends the numbers that a stored gauge saves on larger bonds. ValueError if nothing
    fits the budget.
    """
    shapes = list(candidate_sites(*weight.shape) if candidates is None else candidates)
    affordable = [sites for sites in shapes if sites.parameters((1,) * (sites.n - 1)) <= budget]
    if not shapes:
        raise ValueError(f"a {weight.shape[0]} x {weight.shape[1]} matrix has no sites whose bond 1 saves anything")
    if not affordable:
        least = min(sites.parameters((1,) * (sites.n - 1)) for sites in shapes)
        raise ValueError(f"no candidate of {len(shapes)} fits {budget} numbers; the smallest needs {least} at bond 1")

    def fit(sites: Sites, sweeps: int) -> Fit:
        bonds = sites.bonds_within(budget, gauge)
        return fit_mpo(
            weight,
            sites,
            bonds,
            input_moment=input_moment,
            output_moment=output_moment,
            damping=damping,
            max_sweeps=sweeps,
        )

    started = sorted((fit(sites, 0) for sites in affordable), key=lambda start: start.error)
    cuts = [start for start in started if start.mpo.sites.is_matrix_cut]
    others = [start for start in started if not start.mpo.sites.is_matrix_cut]
    swept = [fit(start.mpo.sites, 40) for start in others[:refine]]
    return sorted(cuts + swept, key=lambda done: done.error)


def _most_equal(number: int, n: int, few: int = 2) -> list[tuple[int, ...]]:
    if n == 2:  # the common case, without listing all factorisations
        below = [d for d in divisors(number) if d * d <= number]
        return [(d, number // d) for d in below[::-1][:few]]
    return sorted(factorisations(number, n), key=lambda factors: (sum(factors), factors))[:few]


def _half(sites: Sites) -> int:
    return max(1, sites.out_features * sites.in_features // 2)


def _cost(sites: Sites) -> int:
    return sites.multiply_adds(sites.bonds_within(_half(sites)))
