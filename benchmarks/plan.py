"""Time of the solver: 1,000 matrices x 60 candidates, one to three budgets; and of a plan from a profile.

    python benchmarks/plan.py [PROFILE --keep 0.6 | --bytes 0.07]

The matrices are made up: sizes of a thousandfold spread, losses that fall with size and bits. Times are those of the solver alone; for
a profile also with reading its files.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bondsmith.recipe import Recipe
from bondsmith.stages.knapsack import Way
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import Profile
from bondsmith.stages.solver import choose

BUDGETS = {"bytes": 0.12, "parameters": 0.6, "multiply_adds": 0.6}


def made_up(seed: int = 0) -> list[list[Way]]:
    """Returns 1,000 matrices with 15 bonds x 4 widths each."""
    generator = np.random.default_rng(seed)
    items = []
    for _ in range(1000):
        kept, bits = np.repeat(np.sort(generator.uniform(0.05, 1, 15)), 4), np.tile([16.0, 8.0, 4.0, 3.0], 15)
        size = kept * 1e6 * generator.choice([1, 3, 10])
        loss = generator.lognormal(0, 2) * ((1 - kept) ** 3 + 3 * 4.0**-bits)
        amounts = {"loss": loss, "bytes": size * bits / 8, "parameters": size, "multiply_adds": size}
        items.append([Way((amounts,))])
    return items


def tables(matrices: int) -> list[list[Way]]:
    """Returns an embedding and a head of a tenth of all numbers each, in 16, 8, 4 and, in two kinds of groups, 3 and 2 bits."""
    bits = np.array([16.0, 8.5, 4.5, 3.5, 3.25, 2.5, 2.25])
    size = np.full(7, matrices * 3e5)
    amounts = {"bytes": size * bits / 8, "parameters": 0 * size, "multiply_adds": 0 * size}
    return [[Way(({"loss": harm * matrices * 4.0**-bits} | amounts,))] for harm in (0.3, 3.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", type=Path)
    parser.add_argument("--keep", type=float)
    parser.add_argument("--bytes")
    options = parser.parse_args()
    table = Table("problem", "seconds", "proved gap")
    alone = made_up()
    for number, items in [*((n, alone) for n in (1, 2, 3)), *((n, [*alone, *tables(1000)]) for n in (1, 2))]:
        chosen = dict(list(BUDGETS.items())[:number])
        full = {q: sum(float(item[0].members[0][q].max()) for item in items) for q in chosen}
        start = time.perf_counter()
        choice = choose(items, {q: share * full[q] * (2 if q == "bytes" else 1) for q, share in chosen.items()})
        beside = "" if items is alone else " with embedding and head"
        table.add_row(
            f"1,000 x 60{beside}, {', '.join(chosen)}",
            f"{time.perf_counter() - start:.1f}",
            f"{max(0.0, choice.gap):.1g}",
        )
    if options.profile:
        budget = {"bytes": options.bytes} if options.bytes else {"keep": options.keep or 0.6}
        start = time.perf_counter()
        plan = planned(Profile.load(options.profile), Recipe.from_settings(dict(budget)))
        seconds = time.perf_counter() - start
        table.add_row(f"{options.profile.name}, {budget}", f"{seconds:.1f}", f"{plan.gap or 0:.1g}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
