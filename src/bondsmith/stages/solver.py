"""Choose one candidate per matrix: the exact minimum of a sum under budgets on other sums.

A multiple-choice knapsack with alternatives. An item is decided in one of several ways; a way has members, and every member (a matrix)
takes one of its candidates. Each candidate has an amount of every quantity (`loss`, `parameters`, `bytes`, `multiply_adds`). One of them is
minimised, others have budgets. HiGHS (through scipy) solves it by branch and bound and proves how far it can be from the optimum.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Amounts = Mapping[str, Floats]
_LARGE, _FEW = 0.02, 8  # of a budget; candidates
_TIGHT = 1 - 2e-6  # HiGHS takes a budget as met when it is passed by a millionth


class InfeasibleError(ValueError):
    """No choice meets the budgets: of `quantity` the smallest reachable amount, within the budgets of those `beside`, is `least`."""

    def __init__(self, quantity: str, budget: float, least: float, beside: tuple[str, ...] = ()):
        within = f" within the budgets of {', '.join(beside)}" if beside else ""
        super().__init__(f"{quantity}: a budget of {budget:g} cannot be met, the least reachable{within} is {least:g}")
        self.quantity, self.budget, self.least, self.beside = quantity, budget, least, beside


class _NoneError(Exception):
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


def choose(
    items: Sequence[Sequence[Way]],
    budgets: Mapping[str, float],
    minimise: str = "loss",
    *,
    gap: float = 1e-4,
    seconds: float = 20.0,
) -> Choice:
    """Returns the choice with the least total of `minimise` among those within all `budgets`.

    Args:
        items: the ways of every item.
        budgets: quantity -> largest total allowed.
        gap: stop once the found value is proved to be within this share of the optimum.
        seconds: stop then at the latest, with the best found.

    Raises:
        InfeasibleError: nothing meets the budgets.

    >>> import numpy as np
    >>> item = [Way(({"loss": np.array([0.0, 1.0, 3.0]), "bytes": np.array([8.0, 4.0, 2.0])},))]
    >>> choose([item, item], {"bytes": 12}).candidates in [((0,), (1,)), ((1,), (0,))]
    True
    """
    for limit in (1.0, _TIGHT):
        try:
            choice = _choose(items, budgets, minimise, limit, gap, time.monotonic() + seconds)
        except _NoneError:
            raise _unmet(items, budgets, gap, seconds) from None
        if all(choice.totals[q] <= b * (1 + 1e-12) for q, b in budgets.items()):
            break
    return choice


def _unmet(items: Sequence[Sequence[Way]], budgets: Mapping[str, float], gap: float, seconds: float) -> InfeasibleError:
    """Returns what says which budget cannot be met by itself or, where each can, how far one must be raised for the others to hold."""
    alone = {q: sum(min(way.least(q) for way in item) for item in items) for q in budgets}
    quantity = max(budgets, key=lambda q: alone[q] / max(abs(budgets[q]), 1e-300))
    error = InfeasibleError(quantity, budgets[quantity], alone[quantity])
    if alone[quantity] > budgets[quantity]:
        return error
    for quantity, budget in budgets.items():
        others = {q: b for q, b in budgets.items() if q != quantity}
        try:
            least = choose(items, others, quantity, gap=gap, seconds=seconds).totals[quantity]
        except InfeasibleError as found:
            error = found
            continue
        for other in tuple(others):  # those that have no part in it
            fewer = {q: b for q, b in others.items() if q != other}
            if not fewer:
                break
            lower = choose(items, fewer, quantity, gap=gap, seconds=seconds).totals[quantity]
            if lower > budget:
                others, least = fewer, lower
        return InfeasibleError(quantity, budget, least, tuple(others))
    return error


def _choose(
    items: Sequence[Sequence[Way]],
    budgets: Mapping[str, float],
    minimise: str,
    limit: float,
    gap: float,
    deadline: float,
) -> Choice:
    """Returns the choice: large items are tried candidate by candidate, in the order of what each can lead to at best."""
    branches: list[tuple[float, _Problem, list[Sequence[Way]], dict[int, int]]] = []
    for fixed, own in _branches(items, budgets):
        problem = replace(_Problem.build(own, budgets, minimise), limit=limit)
        try:
            branches.append((problem.relax()[0] * problem.scale, problem, own, fixed))
        except _NoneError:
            continue
    best: Choice | None = None
    least = np.inf
    for bound, problem, own, fixed in sorted(branches, key=lambda branch: branch[0]):
        if best is not None and bound >= best.totals[minimise] * (1 - gap):
            least = min(least, bound)
            break
        try:
            found = _solve(own, problem, gap, deadline)
        except _NoneError:
            continue
        found = replace(
            found, candidates=tuple((fixed[i],) if i in fixed else c for i, c in enumerate(found.candidates))
        )
        least = min(least, found.totals[minimise] * (1 - found.gap))
        if best is None or found.totals[minimise] < best.totals[minimise]:
            best = found
    if best is None:
        raise _NoneError
    value = best.totals[minimise]
    return replace(best, gap=max(0.0, (value - least) / max(abs(value), 1e-300)))


def _branches(
    items: Sequence[Sequence[Way]], budgets: Mapping[str, float]
) -> Iterator[tuple[dict[int, int], list[Sequence[Way]]]]:
    """Yields the items with every combination of the candidates of large ones fixed: item -> candidate, and what is left.

    An item is large if its candidates differ by much of a budget (an embedding): the linear relaxation would take fractions of it.
    """
    large = [
        i
        for i, item in enumerate(items)
        if len(item) == 1 and len(item[0].members) == 1 and _spread(item[0].members[0], budgets) > _LARGE
    ]
    large = sorted(large, key=lambda i: -_spread(items[i][0].members[0], budgets))[:2]
    choices = [range(len(next(iter(items[i][0].members[0].values())))) for i in large]
    for picked in product(*choices):
        fixed = dict(zip(large, picked, strict=True))
        own = list(items)
        for i, c in fixed.items():
            member = {q: v[c : c + 1] for q, v in items[i][0].members[0].items()}
            own[i] = [Way((member,), items[i][0].loss)]
        yield fixed, own


def _spread(member: Amounts, budgets: Mapping[str, float]) -> float:
    """Returns the largest difference between candidates, as a share of a budget; only of few candidates, which can all be tried."""
    if len(next(iter(member.values()))) > _FEW:
        return 0.0
    return max((float(np.ptp(member[q])) / max(abs(b), 1e-300) for q, b in budgets.items() if q != "loss"), default=0.0)


def _solve(items: Sequence[Sequence[Way]], problem: _Problem, gap: float, deadline: float) -> Choice:
    """Returns the choice; the linear relaxation bounds what any column can lead to, and only near ones go into the branch and bound."""
    bound, reduced = problem.relax()
    room = max(1e-3 * abs(bound), 1e-12)
    while True:
        columns = problem.near(reduced, room)
        x, value, proved = problem.branch_and_bound(columns, gap, max(2.0, deadline - time.monotonic()))
        everything = len(columns) == len(problem.cost)
        late = time.monotonic() > deadline
        if x is not None and (value <= bound + max(room, gap * abs(value)) or everything or late):
            break
        if everything:
            raise _NoneError
        room = max(10 * room, value - bound if x is not None else 0.0)
    proved = max(bound, min(proved, np.inf if everything else bound + room))
    return problem.read(items, x, max(0.0, (value - proved) / max(abs(value), 1e-300)))


@dataclass(frozen=True, eq=False)
class _Problem:
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
    def build(cls, items: Sequence[Sequence[Way]], budgets: Mapping[str, float], minimise: str) -> _Problem:
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
            raise _NoneError
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
            raise _NoneError
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
