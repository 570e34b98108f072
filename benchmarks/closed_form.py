"""Time of closed-form compression (moments, networks, saving; no evaluation) in forward passes over the same tokens.

    python benchmarks/closed_form.py MODEL --calibration FILE ... --tokens 32768 [--recipe fast | --profile DIR]

Times one forward pass of the whole model over the calibration tokens before and after the compression, in the same process; with
--profile before and after `bondsmith profile`, whose profile goes to DIR.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import bondsmith
from bondsmith.data import split_windows
from bondsmith.model.source import load_tokenizer, load_whole, open_source
from bondsmith.recipe import Recipe


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, ids: torch.Tensor, batch: int = 4) -> float:
    """Returns the time of one pass over all windows, logits included."""
    start = time.perf_counter()
    for first in range(0, len(ids), batch):
        model(input_ids=ids[first : first + batch], use_cache=False)
    return time.perf_counter() - start


def profile_seconds(model: Path, out: Path, recipe: Recipe) -> dict[str, float]:
    """Returns the time of each stage of `bondsmith profile`."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}

    def progress(stage: str, share: float) -> None:
        began.setdefault(stage, time.perf_counter())
        ended[stage] = time.perf_counter()

    settings = {name: getattr(recipe, name) for name in ("calibration", "tokens", "window", "gradient_share", "seed")}
    bondsmith.profile(model, out, progress=progress, metric="loss", **settings)
    return {stage: ended[stage] - start for stage, start in began.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--no-propagate", action="store_true")
    parser.add_argument("--recipe", type=Path, help="file or name of a recipe")
    parser.add_argument("--profile", type=Path, help="time the profile alone, and write it here")
    parser.add_argument("--set", nargs="*", default=[], help="other settings, e.g. gradient_share=0.5")
    options = parser.parse_args()
    if options.profile is not None and options.profile.exists():
        parser.error(f"--profile: {options.profile} is there already")
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        tokenizer = load_tokenizer(source.path)
        parts, _ = split_windows(options.calibration, tokenizer, tokens=options.tokens, held_out=0, window=512, seed=0)
        ids = torch.cat([p.ids for p in parts])
        model = load_whole(source)
        forward_seconds(model, ids[:4])
        before = forward_seconds(model, ids)
        settings = {"keep": options.keep, "metric": options.metric, "propagate": not options.no_propagate}
        settings |= {name: json.loads(value) for name, value in (pair.split("=") for pair in options.set)}
        settings |= {"calibration": options.calibration, "tokens": options.tokens}
        recipe = Recipe.read(options.recipe, **settings) if options.recipe else Recipe.from_settings(settings)
        start = time.perf_counter()
        if options.profile:
            stages = profile_seconds(source.path, options.profile, recipe)
        else:
            stages = bondsmith.compress(source.path, Path(folder) / "out", recipe, evaluate=False).results["seconds"]
        seconds = time.perf_counter() - start
        after = forward_seconds(model, ids)
    table = Table("", "seconds", "forward passes")
    forward = (before + after) / 2
    table.add_row(f"one forward pass, {ids.numel()} tokens", f"{forward:.1f}", "1")
    for stage, spent in stages.items():
        table.add_row(stage, f"{spent:.1f}", f"{spent / forward:.2f}")
    table.add_row("in all", f"{seconds:.1f}", f"{seconds / forward:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
