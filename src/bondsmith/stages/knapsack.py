"""A multiple-choice knapsack as columns of a linear programme: its relaxation, and branch and bound over what that leaves.

See `solver.py` for what the items, ways, members and candidates are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Amounts = Mapping[str, Floats]


class NoChoiceError(Exception):
    """No choice meets the budgets."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way to decide an item: the candidates of each member, and a loss that comes with the way itself."""

    members: tuple[Amounts, ...]
    loss: float = 0.0

    def least(self, quantity: str) -> float:
        """Returns the smallest amount of a quantity that it can come to."""
        own = self.loss if quantity == "loss" else 0.0
        return own + sum(float(member[quantity].min()) for member in self.members)


@dataclass(frozen=True)
class Choice:
    """The way taken for every item and the candidate of each of its members; totals; how far from optimal it can be at most.

    `gap` is relative: (value found - value proved) / value found; 0 is a proved optimum.
    """

    ways: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    totals: Mapping[str, float]
    gap: float


@dataclass(frozen=True, eq=False)
class Problem:
    """One column per candidate and per way: its cost, its amounts as shares of the budgets, and what it belongs to.

    Attributes:
        place: of candidates (item, way, member, index), of ways (item, way, -1, -1).
        group: number of the member that a candidate belongs to; of ways, of its item.
        way: number of the way of every column.
        limit: share of every budget that may be used.
    """

    cost: Floats
    amounts: Floats
    place: NDArray[np.int64]
    group: NDArray[np.int64]
    way: NDArray[np.int64]
    budgets: Mapping[str, float]
    limit: float = 1.0

    @classmethod
    def build(cls, items: Sequence[Sequence[Way]], budgets: Mapping[str, float], minimise: str) -> Problem:
        costs, amounts, places, groups, ways = [], [], [], [], []
        group, number = len(items), 0
        for i, item in enumerate(items):
            for w, way in enumerate(item):
                own = {"loss": way.loss}
                costs.append(np.array([own.get(minimise, 0.0)]))
                amounts.append(np.array([[own.get(q, 0.0)] for q in budgets]).reshape(len(budgets), 1))
                places.append(np.array([[i, w, -1, -1]]))
                groups.append(np.array([i]))
                ways.append(np.array([number]))
                for m, member in enumerate(way.members):
                    useful = _undominated(member, {minimise, *budgets})
                    costs.append(member[minimise][useful])
                    amounts.append(np.stack([member[q][useful] for q in budgets]).reshape(len(budgets), -1))
                    places.append(np.stack([np.full_like(useful, v) for v in (i, w, m)] + [useful], 1))
                    groups.append(np.full(len(useful), group))
                    ways.append(np.full(len(useful), number))
                    group += 1
                number += 1
        scale = np.array([max(abs(b), 1e-300) for b in budgets.values()]).reshape(-1, 1)
        shares = np.concatenate(amounts, 1) / scale
        columns = np.concatenate(places), np.concatenate(groups), np.concatenate(ways)
        return cls(np.concatenate(costs), shares, *columns, budgets)

    @property
    def is_way(self) -> NDArray[np.bool_]:
        """Which columns are ways."""
        marks: NDArray[np.bool_] = self.place[:, 2] < 0
        return marks

    @property
    def scale(self) -> float:
        """What costs are divided by for the solver."""
        return float(np.abs(self.cost).max()) or 1.0

    def equalities(self, columns: NDArray[np.int64]) -> tuple[Any, Floats]:
        """Returns the constraints: of every item one way; of every member of a way one candidate, if the way is taken."""
        from scipy.sparse import csr_array

        is_way = self.is_way[columns]
        rows, signs = [self.group[columns]], [np.ones(len(columns))]
        entries = [np.arange(len(columns))]
        ways = np.flatnonzero(is_way)
        position = {int(self.way[columns[c]]): int(c) for c in ways}
        members = sorted({(int(g), int(w)) for g, w in zip(self.group[columns], self.way[columns], strict=True)} - {
            (int(self.group[columns[c]]), int(self.way[columns[c]])) for c in ways
        })  # fmt: skip
        rows.append(np.array([g for g, _ in members], dtype=np.int64))
        entries.append(np.array([position[w] for _, w in members], dtype=np.int64))
        signs.append(-np.ones(len(members)))
        used, numbers = np.unique(np.concatenate(rows), return_inverse=True)
        matrix = csr_array((np.concatenate(signs), (numbers, np.concatenate(entries))), shape=(len(used), len(columns)))
        items = int(self.place[:, 0].max()) + 1
        return matrix, (used < items).astype(np.float64)

    def relax(self) -> tuple[float, Floats]:
        """Returns the value of the linear relaxation, and per column by how much the bound rises if it must be used."""
        prices = self._price() if len(self.amounts) == 1 else self._prices()
        least, reduced = self._least(self.cost / self.scale + prices @ self.amounts)
        return float(least - self.limit * prices.sum()), reduced

    def _price(self) -> Floats:
        """Returns the price of the only budget, by golden section on the dual, which is concave in it."""
        if self._least(self.amounts[0])[0] > self.limit * (1 + 1e-12):
            raise NoChoiceError
        cost = self.cost / self.scale

        def dual(exponent: float) -> float:
            price = 10.0**exponent
            return self._least(cost + price * self.amounts[0])[0] - self.limit * price

        low, high, ratio = -12.0, 12.0, (5**0.5 - 1) / 2
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = dual(left), dual(right)
        while high - low > 1e-9:
            if at_left >= at_right:
                high, right, at_right = right, left, at_left
                left = high - ratio * (high - low)
                at_left = dual(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + ratio * (high - low)
                at_right = dual(right)
        best = 10.0 ** ((low + high) / 2)
        return np.array([best if dual((low + high) / 2) > self._least(cost)[0] else 0.0])

    def _prices(self) -> Floats:
        """Returns the prices of several budgets, from the linear programme."""
        from scipy.optimize import linprog

        matrix, right = self.equalities(np.arange(len(self.cost)))
        limits = np.full(len(self.amounts), self.limit)
        found = linprog(self.cost / self.scale, self.amounts, limits, matrix, right, bounds=(0, 1), method="highs")
        if found.x is None:
            raise NoChoiceError
        return np.maximum(0.0, -found.ineqlin.marginals)

    def _least(self, priced: Floats) -> tuple[float, Floats]:
        """Returns the least total of `priced` with no budget, and by how much it rises when a column must be used."""
        own, ways, members, item_of_way = self._structure
        best = np.full(int(self.group.max()) + 1, np.inf)
        np.minimum.at(best, self.group[own], priced[own])
        totals = np.zeros(len(item_of_way))
        totals[self.way[ways]] += priced[ways]
        np.add.at(totals, members[:, 1], best[members[:, 0]])
        items = np.full(int(self.place[:, 0].max()) + 1, np.inf)
        np.minimum.at(items, item_of_way, totals)
        rise = (totals - items[item_of_way])[self.way]
        rise[own] += priced[own] - best[self.group[own]]
        return float(items.sum()), rise

    @cached_property
    def _structure(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Which columns are candidates and which ways; (member, way) pairs; the item of every way."""
        ways = self.is_way
        members = np.unique(np.stack([self.group[~ways], self.way[~ways]], 1), axis=0)
        item_of_way = np.zeros(int(self.way.max()) + 1, dtype=np.int64)
        item_of_way[self.way] = self.place[:, 0]
        return ~ways, ways, members, item_of_way

    def near(self, reduced: Floats, room: float) -> NDArray[np.int64]:
        """Returns the columns that a choice within `room` of the bound can use."""
        return np.flatnonzero(reduced <= room)

    def branch_and_bound(
        self, columns: NDArray[np.int64], gap: float, seconds: float
    ) -> tuple[NDArray[np.int64] | None, float, float]:
        """Returns the columns taken, their cost, and the cost proved to be least (both scaled); None where there is no choice."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        matrix, right = self.equalities(columns)
        cost = self.cost[columns] / self.scale
        with _silence():
            found = milp(
                cost,
                integrality=np.ones(len(columns)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(matrix, right, right),
                    LinearConstraint(self.amounts[:, columns], -np.inf, self.limit),
                ],
                options={"mip_rel_gap": gap, "time_limit": seconds},
            )
        if found.x is None:
            return None, np.inf, np.inf
        taken = np.flatnonzero(found.x > 0.5)
        return columns[taken], float(cost[taken].sum()), float(found.mip_dual_bound)

    def read(self, items: Sequence[Sequence[Way]], columns: NDArray[np.int64], gap: float) -> Choice:
        """Returns the choice that the taken columns stand for."""
        ways = [0] * len(items)
        picked: list[dict[int, int]] = [{} for _ in items]
        for i, w, m, index in self.place[columns].tolist():
            if m < 0:
                ways[i] = w
            else:
                picked[i][m] = index
        candidates = tuple(tuple(own[m] for m in sorted(own)) for own in picked)
        quantities = items[0][0].members[0] if items else {}
        totals = dict.fromkeys(quantities, 0.0)
        for item, w, own in zip(items, ways, candidates, strict=True):
            for q in totals:
                totals[q] += sum(float(m[q][c]) for m, c in zip(item[w].members, own, strict=True))
            if "loss" in totals:
                totals["loss"] += item[w].loss
        return Choice(tuple(ways), candidates, totals, gap)


def _undominated(item: Amounts, quantities: set[str]) -> NDArray[np.int64]:
    """Returns the candidates that no other one beats in all `quantities` (of equal ones the first)."""
    values = np.stack([item[q] for q in sorted(quantities)], 1)
    order = np.lexsort(values.T[::-1])
    values = values[order]
    beats = (values[:, None] <= values[None]).all(-1)
    first = np.triu(beats, 1).any(0)
    return np.sort(order[~first])


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what HiGHS writes past Python to standard output, whatever its settings say, off the screen."""
    sys.stdout.flush()
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard output
        yield
        return
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
