"""Choose one candidate per matrix: the exact minimum of a sum under budgets on other sums.

A multiple-choice knapsack with alternatives. An item is decided in one of several ways; a way has members, and every member (a matrix)
takes one of its candidates. Each candidate has an amount of every quantity (`loss`, `parameters`, `bytes`, `multiply_adds`). One of them is
minimised, others have budgets. HiGHS (through scipy) solves it by branch and bound and proves how far it can be from the optimum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from bondsmith.stages.knapsack import Amounts, Choice, NoChoiceError, Problem, Way

_LARGE, _FEW = 0.02, 8  # of a budget; candidates
_TIGHT = 1 - 2e-6  # HiGHS takes a budget as met when it is passed by a millionth


class InfeasibleError(ValueError):
    """No choice meets the budgets: of `quantity` the smallest reachable amount, within the budgets of those `beside`, is `least`."""

    def __init__(self, quantity: str, budget: float, least: float, beside: tuple[str, ...] = ()):
        within = f" within the budgets of {', '.join(beside)}" if beside else ""
        super().__init__(f"{quantity}: a budget of {budget:g} cannot be met, the least reachable{within} is {least:g}")
        self.quantity, self.budget, self.least, self.beside = quantity, budget, least, beside


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
    least = {q: _least(items, q) for q in budgets}
    if any(least[q] > b + 1e-12 * abs(b) for q, b in budgets.items()):
        raise _unmet(items, budgets, gap, seconds)
    for limit in (1.0, _TIGHT):
        try:
            choice = _choose(items, budgets, minimise, limit, gap, time.monotonic() + seconds)
        except NoChoiceError:
            break
        if all(choice.totals[q] <= b + 1e-12 * abs(b) for q, b in budgets.items()):
            return choice
    raise _unmet(items, budgets, gap, seconds)


def _least(items: Sequence[Sequence[Way]], quantity: str) -> float:
    """Returns the smallest reachable total of a quantity, whatever the others come to."""
    return sum(min(way.least(quantity) for way in item) for item in items)


def _unmet(items: Sequence[Sequence[Way]], budgets: Mapping[str, float], gap: float, seconds: float) -> InfeasibleError:
    """Returns what says which budget cannot be met by itself or, where each can, how far one must be raised for the others to hold."""
    alone = {q: _least(items, q) for q in budgets}
    quantity = max(budgets, key=lambda q: (alone[q] - budgets[q]) / max(abs(budgets[q]), 1e-300))
    error = InfeasibleError(quantity, budgets[quantity], alone[quantity])
    if alone[quantity] > budgets[quantity] or len(budgets) == 1:
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
    whole = replace(Problem.build(items, budgets, minimise), limit=limit)
    bound, rises = whole.relax()
    rise_of = {(i, c): r for (i, _, m, c), r in zip(whole.place.tolist(), rises.tolist(), strict=True) if m == 0}
    branches = []
    for fixed, own in _branches(items, budgets):
        rise = sum(rise_of.get(pair, np.inf) for pair in fixed.items())  # inf: another candidate beats it
        if rise < np.inf:
            branches.append(((bound + rise) * whole.scale, fixed, own))
    best: Choice | None = None
    least = np.inf
    for bound, fixed, own in sorted(branches, key=lambda branch: branch[0]):
        if best is not None and bound >= best.totals[minimise] * (1 - gap):
            least = min(least, bound)
            break
        problem = replace(Problem.build(own, budgets, minimise), limit=limit)
        try:
            above = problem.relax()[0] * problem.scale
            if best is not None and above >= best.totals[minimise] * (1 - gap):
                least = min(least, above)
                continue
            found = _solve(own, problem, gap, deadline)
        except NoChoiceError:
            continue
        found = replace(
            found, candidates=tuple((fixed[i],) if i in fixed else c for i, c in enumerate(found.candidates))
        )
        least = min(least, found.totals[minimise] * (1 - found.gap))
        if best is None or found.totals[minimise] < best.totals[minimise]:
            best = found
    if best is None:
        raise NoChoiceError
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


def _solve(items: Sequence[Sequence[Way]], problem: Problem, gap: float, deadline: float) -> Choice:
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
            raise NoChoiceError
        room = max(10 * room, value - bound if x is not None else 0.0)
    proved = max(bound, min(proved, np.inf if everything else bound + room))
    return problem.read(items, x, max(0.0, (value - proved) / max(abs(value), 1e-300)))
