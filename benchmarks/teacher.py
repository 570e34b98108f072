"""Healing with the original's predictions on disk against the original in memory: time a step, loss, size of the cache.

    python benchmarks/teacher.py SMALL --teacher MODEL --text FILE ... --tokens 16384

Heals the same compressed directory twice with the same settings. The time of asking the original once is given apart: it is spent once
for any number of healings on the same text.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

import bondsmith


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    table = Table("the original", "seconds of steps", "loss of the last step", "KL, held out", "cache", "asked once")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, resident in (("on disk", False), ("in memory", True)):
            done = bondsmith.heal(
                options.small,
                work / name,
                teacher=options.teacher,
                data=options.text,
                cache=work / "cache",
                resident=resident,
                tokens=options.tokens,
                window=options.window,
                validation_windows=1,
                validate_every=10**6,
                evaluate=False,
            )
            last = done.healing["curve"][-1]
            size = sum(f.stat().st_size for f in work.glob("cache/teacher-*/*.safetensors"))
            cells = ("", "") if resident else (f"{size / 1e6:.1f} MB", f"{asking(done.path):.1f} s")
            table.add_row(name, f"{done.healing['seconds']:.1f}", f"{last['loss']:.4f}", f"{last['kl']:.4f}", *cells)
            found.append(done.healing["seconds"])
    console = Console(width=120)
    console.print(table)
    console.print(f"on disk is {found[1] / found[0]:.2f} times as fast")


def asking(directory: Path) -> float:
    """Returns the seconds that the original was asked, from the log."""
    lines = (directory / "log.txt").read_text().splitlines()
    ends = [line for line in lines if "the original's predictions" in line]
    times = [datetime.strptime(re.split(r",", line)[0], "%Y-%m-%d %H:%M:%S") for line in ends]
    return (times[1] - times[0]).total_seconds() if len(times) > 1 else 0.0


if __name__ == "__main__":
    main()
