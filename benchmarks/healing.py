"""The curve of accuracy against healing tokens: block by block, as a whole, and both, at several sizes; one figure.

    python benchmarks/healing.py MODEL --text FILE ... --keep 0.8 0.5 0.3 --tokens 300000 --work DIR

For every keep two models are compressed, without and with block-wise distillation (`--blockwise` passes over `--calibration-tokens`), and
each is healed with `--tokens` tokens of the same text. KL and perplexity are those of the held-out windows at every validation; with
`--tasks` the models are scored before and after, and the original too. DIR holds everything: the same command goes on where it was
interrupted, and asks further tasks of the models that are there. It prints tables and writes DIR/healing.html, the figure, and
DIR/healing.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bondsmith
from bondsmith.scoring import score
from bondsmith.stages.figures import Curves, Line, Panel, Point, axis
from bondsmith.stages.profile_page import Section, write_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--blockwise", type=int, nargs="+", default=[0, 1], help="passes; 0 is without")
    parser.add_argument(
        "--compress", nargs="*", default=[], help="other settings of the compression, e.g. uniform=true"
    )
    parser.add_argument("--heal", nargs="*", default=[], help="other settings of the healing, e.g. batch=8")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--data", type=Path, help="folder of local benchmark files")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for keep in options.keep:
        for passes in options.blockwise:
            rows.append(run(options, keep, passes))
            (options.work / "healing.json").write_text(json.dumps(rows, indent=1))
    original = scores(options, place(options, options.keep[0], options.blockwise[0]), "original")
    draw(options.work / "healing.html", rows, original)
    show(rows, original)


def run(options: argparse.Namespace, keep: float, passes: int) -> dict[str, Any]:
    """Returns the curve of one model: compressed and healed in DIR, or found there."""
    small = place(options, keep, passes)
    healed = small.with_name(small.name + "-healed")
    if not small.exists():
        settings = {"keep": keep, "tokens": options.calibration_tokens, "blockwise": passes} | given(options.compress)
        bondsmith.compress(
            options.model, small, calibration=options.text, evaluate=False, resume=unfinished(small), **settings
        )
    if not healed.exists():
        bondsmith.heal(
            small,
            healed,
            teacher=options.model,
            data=options.text,
            tokens=options.tokens,
            cache=options.work,
            resume=unfinished(healed),
            evaluate=False,
            tell=lambda moment: print(f"keep {keep:g}, blockwise {passes}: {moment}", flush=True),
            **given(options.heal),
        )
    results = json.loads((healed / "results.json").read_text())
    row = {"keep": keep, "blockwise": passes, "healing": results["healing"], "tasks": {}}
    for label, directory in (("fitted", small), ("healed", healed)):
        row["tasks"][label] = scores(options, directory)
    return row


def place(options: argparse.Namespace, keep: float, passes: int) -> Path:
    """Returns where a compressed model lies in DIR."""
    where: Path = options.work / f"keep-{keep:g}-blockwise-{passes}"
    return where


def scores(options: argparse.Namespace, directory: Path, which: str = "compressed") -> list[dict[str, Any]]:
    """Returns the scores of a compressed model, or of its original, asked once: they are kept in DIR."""
    names = [n for n in options.tasks.split(",") if n]
    if not names:
        return []
    kept = options.work / "scores.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    against = options.model if which == "original" else None
    key = f"{directory.name if against is None else which} {options.tasks} {options.limit}"
    if key not in found:
        rows = score(directory, names, data=options.data, limit=options.limit, against=against)
        found[key] = [row for row in rows if row["model"] == which]
        kept.write_text(json.dumps(found, indent=1))
    asked: list[dict[str, Any]] = found[key]
    return asked


def given(pairs: list[str]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def unfinished(out: Path) -> bool:
    return out.with_name(out.name + ".partial").exists()


def name(row: dict[str, Any]) -> str:
    return f"keep {row['keep']:g}, {'block-wise, then ' if row['blockwise'] else ''}global"


def draw(path: Path, rows: list[dict[str, Any]], original: list[dict[str, Any]]) -> None:
    """Writes the figure: KL, perplexity and scores against tokens, a line per model."""
    panels = []
    for field, title in (("kl", "KL to the original, nats a token"), ("perplexity", "perplexity")):
        lines = tuple(
            Line(
                name(row),
                tone,
                tuple(Point(e["tokens"] / 1000, e[field], f"{e[field]:.4g}") for e in row["healing"]["curve"]),
            )
            for tone, row in enumerate(rows)
        )
        points = [p for line in lines for p in line.points]
        x = axis("healing tokens, thousands", [p.x for p in points], low=0.0)
        panels.append(Panel(title, lines, x, axis(title, [p.y for p in points], log=True)))
    for k, asked in enumerate(original):
        if not asked["metric"].startswith("acc"):
            continue
        title = f"{asked['task']}, {asked['metric']}, {asked['rows']} rows"
        lines = tuple(Line(name(row), tone, tuple(score_points(row, k))) for tone, row in enumerate(rows))
        points = [p for line in lines for p in line.points]
        x = axis("healing tokens, thousands", [p.x for p in points], low=0.0)
        y = axis(asked["metric"], [asked["score"], *(p.y for p in points)])
        panels.append(Panel(title, lines, x, y, rule=asked["score"]))
    caption = "KL and perplexity are those of held-out windows of the training texts. Drawn by benchmarks/healing.py."
    figure = Curves(tuple(panels), caption, rule="the original" if original else "")
    write_page(path, "Accuracy against healing tokens", [Section("The curve", figures=(figure,))])


def score_points(row: dict[str, Any], k: int) -> Iterator[Point]:
    """Yields the score of task `k` before and after healing."""
    for label, tokens in (("fitted", 0), ("healed", row["healing"]["tokens"])):
        asked = row["tasks"][label][k]
        yield Point(tokens / 1000, asked["score"], f"{asked['score']:.3f} ± {asked['stderr']:.3f}", asked["stderr"])


def show(rows: list[dict[str, Any]], original: list[dict[str, Any]]) -> None:
    table = Table("model", "tokens", "KL", "perplexity", "seconds a 1000 tokens")
    for row in rows:
        rate = 1000 * row["healing"]["seconds"] / row["healing"]["tokens"]
        for entry in row["healing"]["curve"]:
            cells = f"{entry['tokens']:,}", f"{entry['kl']:.4f}", f"{entry['perplexity']:.2f}", f"{rate:.1f}"
            table.add_row(name(row), *cells)
        table.add_section()
    console = Console(width=120)
    console.print(table)
    if not original:
        return
    table = Table(
        "", *(f"{s['task']} {s['metric']}" for s in original), title=f"scores, {original[0]['rows']} rows each"
    )
    table.add_row("original", *map(percent, original))
    for row in rows:
        for label, asked in row["tasks"].items():
            table.add_row(f"{name(row)}: {label}", *map(percent, asked))
    console.print(table)


def percent(asked: dict[str, Any]) -> str:
    return f"{100 * asked['score']:.1f} ± {100 * asked['stderr']:.1f}"


if __name__ == "__main__":
    main()
