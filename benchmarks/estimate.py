"""What `bondsmith estimate` says a compression takes, beside what it takes: peak memory, disk, seconds by stage, size.

    python benchmarks/estimate.py MODEL --calibration FILE ... [--keep 0.8] [--tokens 8192] [--set uniform=true ...]

The compression runs in a process of its own, without measuring quality and speed; its work directory is watched ten times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bondsmith.model.facts import read_facts
from bondsmith.recipe import Recipe
from bondsmith.stages.estimate import Estimate, estimate
from bondsmith.stages.rates import measure_speed
from bondsmith.stages.wording import duration, number, size

CHILD = """
import json, resource, sys
import bondsmith
done = bondsmith.compress(sys.argv[1], sys.argv[2], evaluate=False, **json.loads(sys.argv[3]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": done.results["seconds"], "bytes": done.results["size"]["compressed"]["bytes"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--set", nargs="*", default=[], help="other settings, e.g. metric='\"input\"'")
    options = parser.parse_args()
    settings = {"keep": options.keep, "tokens": options.tokens, "calibration": options.calibration}
    settings |= {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in options.set)}
    found = estimate(read_facts(options.model), Recipe.from_settings(settings), measure_speed())
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", CHILD, options.model, str(Path(folder) / "out"), json.dumps(settings)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        disk = 0
        while child.poll() is None:
            disk = max(disk, used(Path(folder)))
            time.sleep(0.1)
        assert child.stdout is not None
        real = json.loads(child.stdout.read().splitlines()[-1])
    show(found, real, disk)


def used(folder: Path) -> int:
    """Returns the bytes of all files; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def show(found: Estimate, real: dict[str, Any], disk: int) -> None:
    """Prints estimate, reality and their ratio."""
    table = Table("", "estimate", "real", "estimate / real")
    for name, guess, truth, say in (
        ("size", found.bytes, real["bytes"], size),
        ("memory at the peak", found.needs.peak, real["peak"], size),
        ("disk", sum(found.needs.disk.values()), disk, size),
        ("time", sum(found.needs.seconds.values()), sum(real["seconds"].values()), duration),
    ):
        table.add_row(name, say(guess), say(truth), number(guess / truth))
    console = Console(width=120)
    console.print(table)
    console.print("estimated seconds:", {k: round(v, 1) for k, v in found.needs.seconds.items()})
    console.print("real seconds:", {k: round(v, 1) for k, v in real["seconds"].items()})
    console.print("estimated memory:", {k: size(v) for k, v in found.needs.memory.items()})
    console.print("estimated disk:", {k: size(v) for k, v in found.needs.disk.items()})


if __name__ == "__main__":
    main()
