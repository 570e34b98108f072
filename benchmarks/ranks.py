"""How well the fast profile predicts the measured one: rank correlation and scale, over all points of a layer profile.

    bondsmith profile MODEL --out profile --calibration ... && bondsmith profile MODEL --out layers --layers --calibration ...
    python benchmarks/ranks.py profile layers

Every point of the layer profile is one matrix cut to one bond, and the divergence that was measured for it; the fast profile predicts
the same from moments.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from bondsmith.stages.profile import Profile


def pairs(profile: Profile, layers: Path) -> list[tuple[str, float, float]]:
    """Returns (kind of matrix, predicted, measured) of every point that is a matrix cut short of its full bond, in nats a token."""
    found = []
    for point in json.loads((layers / "profile-layers.json").read_text())["points"]:
        curve = profile[point["name"]].cut_losses()
        (bond,) = point["bonds"]
        if bond < len(curve) - 1:
            found.append((point["name"].rsplit(".", 1)[-1], float(curve[bond]), point["probe"]["kl"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="of `bondsmith profile`")
    parser.add_argument("layers", type=Path, help="of `bondsmith profile --layers`, in matrix cuts")
    options = parser.parse_args()
    found = pairs(Profile.load(options.profile), options.layers)
    table = Table("matrices", "probes", "rank correlation", "measured over predicted: median", "quartiles")
    kinds = dict.fromkeys(kind for kind, _, _ in found)
    for kind in (*kinds, "all"):
        own = [(p, m) for k, p, m in found if kind in (k, "all")]
        ratios = [m / p for p, m in own if p > 0]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [float("nan")] * 3
        rank = spearmanr([p for p, _ in own], [m for _, m in own]).statistic if len(own) > 2 else float("nan")
        table.add_row(kind, str(len(own)), f"{rank:.3f}", f"{middle:.2f}", f"{low:.2f}, {high:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
