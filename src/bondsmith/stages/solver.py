"""Choose one candidate per matrix: the exact minimum of a sum under budgets on other sums.

A multiple-choice knapsack: each item (a matrix) has a list of candidates, each with an amount of every quantity (`loss`, `parameters`,
`bytes`, `multiply_adds`). One quantity is minimised, others have budgets. HiGHS (through scipy) solves it by branch and bound and
reports the gap between what it found and what it proved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FULL = 1 - 2e-6  # HiGHS takes a budget as met when it is passed by a millionth
Amounts = Mapping[str, NDArray[np.float64]]


class InfeasibleError(ValueError):
    """No choice meets the budgets; `quantity` is the one that cannot be met, `least` the smallest reachable amount."""

    def __init__(self, quantity: str, budget: float, least: float):
        super().__init__(f"{quantity}: a budget of {budget:g} cannot be met, the least reachable is {least:g}")
        self.quantity, self.budget, self.least = quantity, budget, least


@dataclass(frozen=True)
class Choice:
    """The chosen candidate of every item, the totals of all quantities, and how far from optimal the choice can be at most.

    `gap` is relative: (value found - value proved) / value found; 0 is a proved optimum.
    """

    indices: tuple[int, ...]
    totals: Mapping[str, float]
    gap: float


def choose(
    items: Sequence[Amounts],
    budgets: Mapping[str, float],
    minimise: str = "loss",
    *,
    gap: float = 1e-4,
    seconds: float = 20.0,
) -> Choice:
    """Returns the choice with the least total of `minimise` among those within all `budgets`.

    Args:
        items: per item, quantity -> amounts of its candidates, all of one length.
        budgets: quantity -> largest total allowed.
        gap: stop once the found value is proved to be within this share of the optimum.
        seconds: stop then at the latest, with the best found.

    Raises:
        InfeasibleError: nothing meets the budgets.

    >>> import numpy as np
    >>> item = {"loss": np.array([0.0, 1.0, 3.0]), "bytes": np.array([8.0, 4.0, 2.0])}
    >>> choose([item, item], {"bytes": 12}).indices in [(0, 1), (1, 0)]
    True
    """
    useful = [_undominated(item, {minimise, *budgets}) for item in items]
    small = [{q: v[keep] for q, v in item.items()} for item, keep in zip(items, useful, strict=True)]
    for quantity, budget in budgets.items():
        least = float(sum(item[quantity].min() for item in small))
        if least > budget * (1 + 1e-12):
            raise InfeasibleError(quantity, budget, least)
    picked, found_gap = _solve(small, budgets, minimise, gap, seconds)
    indices = tuple(int(keep[i]) for keep, i in zip(useful, picked, strict=True))
    quantities = items[0] if items else {}
    totals = {q: float(sum(item[q][i] for item, i in zip(items, indices, strict=True))) for q in quantities}
    return Choice(indices, totals, found_gap)


def _undominated(item: Amounts, quantities: set[str]) -> NDArray[np.int64]:
    """Returns the candidates that no other one beats in all `quantities` (of equal ones the first)."""
    values = np.stack([item[q] for q in sorted(quantities)], 1)
    order = np.lexsort(values.T[::-1])
    values = values[order]
    beats = (values[:, None] <= values[None]).all(-1)
    first = np.triu(beats, 1).any(0)
    return np.sort(order[~first])


def _solve(
    items: Sequence[Amounts], budgets: Mapping[str, float], minimise: str, gap: float, seconds: float
) -> tuple[list[int], float]:
    """Returns the picked candidates and the relative gap.

    The linear relaxation gives prices of the budgets and with them a bound on every choice that uses a candidate. Only candidates whose
    bound is near the relaxation's value go into the branch and bound; its answer is optimal if it is nearer still, else more go in.
    """
    cost = np.concatenate([item[minimise] for item in items])
    amounts = np.stack([np.concatenate([item[q] for item in items]) / max(b, 1e-300) for q, b in budgets.items()])
    owners = np.repeat(np.arange(len(items)), [len(item[minimise]) for item in items])
    scale = float(np.abs(cost).max()) or 1.0
    bound, reduced = _relax(cost / scale, amounts, owners, len(items), budgets, items)
    room = max(1e-3 * abs(bound), 1e-12)
    while True:
        near = np.flatnonzero(reduced <= room)
        picked, value, proved = _branch_and_bound(
            cost[near] / scale, amounts[:, near], owners[near], len(items), gap, seconds
        )
        if picked is not None and (value <= bound + room or len(near) == len(cost)):
            break
        if len(near) == len(cost):
            raise InfeasibleError("+".join(budgets), *_tightest(items, budgets))
        room *= 10
    firsts = np.concatenate([[0], np.cumsum([len(item[minimise]) for item in items])])
    chosen = near[picked]
    proved = max(bound, min(proved, bound + room if len(near) < len(cost) else np.inf))
    return [int(c - firsts[owners[c]]) for c in chosen], max(0.0, (value - proved) / max(abs(value), 1e-300))


def _relax(
    cost: NDArray[np.float64],
    amounts: NDArray[np.float64],
    owners: NDArray[np.int64],
    count: int,
    budgets: Mapping[str, float],
    items: Sequence[Amounts],
) -> tuple[float, NDArray[np.float64]]:
    """Returns the value of the linear relaxation, and per candidate by how much the bound rises if it must be used."""
    from scipy.optimize import linprog

    found = linprog(
        cost,
        A_ub=amounts,
        b_ub=np.full(len(amounts), _FULL),
        A_eq=_one_each(owners, count),
        b_eq=np.ones(count),
        bounds=(0, 1),
        method="highs",
    )
    if found.x is None:
        raise InfeasibleError("+".join(budgets), *_tightest(items, budgets))
    prices = np.maximum(0.0, -found.ineqlin.marginals)
    priced = cost + prices @ amounts
    least = np.full(count, np.inf)
    np.minimum.at(least, owners, priced)
    return float(least.sum() - _FULL * prices.sum()), priced - least[owners]


def _branch_and_bound(
    cost: NDArray[np.float64],
    amounts: NDArray[np.float64],
    owners: NDArray[np.int64],
    count: int,
    gap: float,
    seconds: float,
) -> tuple[NDArray[np.int64] | None, float, float]:
    """Returns the picked columns, one per owner in order, their cost, and the cost proved to be least; None where there is no choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    found = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(_one_each(owners, count), 1, 1), LinearConstraint(amounts, -np.inf, _FULL)],
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if found.x is None:
        return None, np.inf, np.inf
    chosen = np.flatnonzero(found.x > 0.5)
    return chosen[np.argsort(owners[chosen])], float(cost[chosen].sum()), float(found.mip_dual_bound)


def _one_each(owners: NDArray[np.int64], count: int) -> Any:
    from scipy.sparse import csr_array

    columns = np.arange(len(owners))
    return csr_array((np.ones(len(owners)), (owners, columns)), shape=(count, len(owners)))


def _tightest(items: Sequence[Amounts], budgets: Mapping[str, float]) -> tuple[float, float]:
    """Returns budget and least amount of the quantity with the least room, where only all budgets together cannot be met."""
    least = {q: float(sum(item[q].min() for item in items)) for q in budgets}
    quantity = min(budgets, key=lambda q: budgets[q] / max(least[q], 1e-300))
    return budgets[quantity], least[quantity]
