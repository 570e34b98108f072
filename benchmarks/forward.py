"""Forward speed of compressed models against what their multiply-adds allow, original and compressed alternating.

    python benchmarks/forward.py MODEL --keep 0.5 0.3 --calibration FILE ...

times what `bondsmith compress MODEL --keep F` gives: a plan of cuts and channels, from few tokens. `--uniform` times the same cut for every
matrix instead, from plain SVD. The limit is the ratio of all multiply-adds of the pass (block matrices, head, attention scores), a gauged
cut counted at k (O + I - k). "done" counts what is done: with many tokens the full left factor, k (O + I), costs less than a gather.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bondsmith
from bondsmith.model.source import load_whole, open_source
from bondsmith.nn.linear import GATHER_FROM, GATHER_UP_TO, MPOLinear
from bondsmith.stages.speed import time_prefill


def _not_saved(model: torch.nn.Module) -> int:
    """Returns the multiply-adds a token of full left factors beyond those of gauged ones."""
    cuts = [m for m in model.modules() if isinstance(m, MPOLinear) and m.gauge]
    return sum(m.bonds[0] ** 2 for m in cuts if m.bonds[0] ** 2 <= GATHER_FROM * m.out_features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--no-gauge", action="store_true")
    parser.add_argument("--calibration", nargs="+", default=["self"])
    parser.add_argument("--calibrate-on", type=int, default=4096, help="tokens that the plan comes from")
    options = parser.parse_args()
    headings = (
        "keep",
        "multiply-adds",
        "limit",
        "speed",
        "of the limit",
        "done",
        "of its limit",
        "original ms",
        "compressed ms",
    )
    table = Table(*headings)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        original = load_whole(source)
        config = source.config
        scores = 2 * config.num_hidden_layers * config.hidden_size * options.tokens / 2  # causal: half of all pairs
        ids = torch.randint(
            0, config.vocab_size, (options.batch, options.tokens), generator=torch.Generator().manual_seed(0)
        )
        for keep in options.keep:
            settings = {"keep": keep, "gauge": not options.no_gauge}
            if options.uniform:
                settings |= {"uniform": True, "metric": "frobenius"}
            else:
                settings |= {"calibration": options.calibration, "tokens": options.calibrate_on}
            done = bondsmith.compress(source.path, Path(folder) / "out", overwrite=True, evaluate=False, **settings)
            compressed = done.load(dtype=torch.float32)
            size = done.results["size"]
            before, after = (size[m]["multiply_adds"] + scores for m in ("original", "compressed"))
            time_prefill(original, ids), time_prefill(compressed, ids)
            pairs = [(time_prefill(original, ids), time_prefill(compressed, ids)) for _ in range(options.rounds)]
            speed = statistics.median(a / b for a, b in pairs)
            times = [statistics.median(column) * 1000 for column in zip(*pairs, strict=True)]
            carried_out = after + (_not_saved(compressed) if ids.numel() > GATHER_UP_TO else 0)
            cells = (f"{after / before:.3f}", f"{before / after:.2f}", f"{speed:.2f}", f"{speed * after / before:.2f}")
            cells += (f"{carried_out / before:.3f}", f"{speed * carried_out / before:.2f}")
            table.add_row(f"{keep:g}", *cells, *(f"{t:.0f}" for t in times))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
