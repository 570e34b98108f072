"""Train first or round first: what is left of a compressed model's divergence, at the same bytes and tokens.

    python benchmarks/order.py MODEL --text FILE ... [--keep 0.5 --bits 3 --tokens 300000 --work DIR]

One model is compressed once. Then: it is rounded, or rounded and healed (scales, centres and norms over frozen integers), or healed and
rounded, or healed with the rounding simulated and rounded, or healed by half of the tokens before and half after. All see the same
text, and are judged on the same held-out windows of the same texts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from healing import given, unfinished
from rich.console import Console
from rich.table import Table

import bondsmith

ROWS = (
    "cut",
    "cut, healed",
    "cut, rounded",
    "cut, rounded, healed",
    "cut, healed, rounded",
    "cut, healed as rounded, rounded",
    "cut, half healed, rounded, healed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--compress", nargs="*", default=[], help='other settings of the cut, e.g. profile="P"')
    parser.add_argument(
        "--heal", nargs="*", default=[], help='other settings of the healing, e.g. precision="bfloat16"'
    )
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, options.work or Path(folder))


def compare(options: argparse.Namespace, work: Path) -> None:
    shared = {"calibration": options.text, "tokens": options.calibration_tokens, "window": options.window}
    shared |= {"evaluation_windows": 16}
    few = {"uniform": True, "keep": 1.0, "bits": options.bits, "group": options.group, "metric": "loss"}

    def path(name: str) -> Path:
        return work / name.replace(" ", "-")

    def rounded(source: str, name: str) -> None:
        if not path(name).exists():
            bondsmith.compress(path(source), path(name), resume=unfinished(path(name)), **shared, **few)

    def healed(source: str, name: str, share: float = 1.0, **more: Any) -> None:
        if not path(name).exists():
            settings = {
                "data": options.text,
                "window": options.window,
                "validation_windows": 16,
                "teacher": options.model,
                "resume": unfinished(path(name)),
            }
            tokens = int(share * options.tokens)
            bondsmith.heal(
                path(source),
                path(name),
                tokens=tokens,
                cache=work / "teacher",
                **settings,
                **more,
                **given(options.heal),
            )

    if not path("cut").exists():
        bondsmith.compress(
            options.model,
            path("cut"),
            keep=options.keep,
            resume=unfinished(path("cut")),
            **shared,
            **given(options.compress),
        )
    rounded("cut", "cut, rounded")
    healed("cut", "cut, healed")
    healed("cut, rounded", "cut, rounded, healed")
    rounded("cut, healed", "cut, healed, rounded")
    healed("cut", "cut, healed as rounded", round_bits=options.bits, round_group=options.group)
    rounded("cut, healed as rounded", "cut, healed as rounded, rounded")
    healed("cut", "cut, half healed", 0.5)
    rounded("cut, half healed", "cut, half healed, rounded")
    healed("cut, half healed, rounded", "cut, half healed, rounded, healed", 0.5)
    table = Table("model", "MB", "KL, held out", "perplexity")
    for name in ROWS:
        table.add_row(name, *figures(path(name)))
    Console(width=110).print(table)


def figures(directory: Path) -> tuple[str, str, str]:
    """Returns the size, and means over the held-out texts as `results.json` has them."""
    results = json.loads((directory / "results.json").read_text())
    rows = results["quality"]
    size = sum(f.stat().st_size for f in directory.glob("bondsmith-*.safetensors"))
    kl = sum(row["kl"] for row in rows) / len(rows)
    perplexity = sum(row["perplexity"]["compressed"] for row in rows) / len(rows)
    return f"{size / 1e6:.2f}", f"{kl:.4f}", f"{perplexity:.2f}"


if __name__ == "__main__":
    main()
