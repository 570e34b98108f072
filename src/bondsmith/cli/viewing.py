"""Commands that look at models: eval, inspect, chat, version."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bondsmith.cli.options import BenchmarkData, Limit
from bondsmith.cli.screen import app, out, progress_bars


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed directory, or any model that transformers opens.")],
    tasks: Annotated[str, typer.Option(help="Task names of lm-evaluation-harness, comma separated.")],
    data: BenchmarkData = None,
    limit: Limit = None,
    against: Annotated[
        str | None, typer.Option(help="The original model, scored on the same rows in the same run.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
) -> None:
    """Score models on benchmark tasks; the results of a compressed directory and its report are brought up to date."""
    from bondsmith.scoring import score

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with progress_bars() as show:
        rows = score(model, names, data=data, limit=limit, against=against, batch_size=batch_size, progress=show)
    _show_tasks(rows)


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="A compressed directory.")]) -> None:
    """Show every network of a compressed model: sites, bonds, parameters, bytes, multiply-adds, error."""
    from bondsmith.stages.inspect import network_table, read_networks

    for table in network_table(*read_networks(directory)):
        out.print(table)


@app.command()
def chat(
    directory: Annotated[str, typer.Argument(help="A compressed directory, or any model that transformers opens.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop; without it, a conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a reply.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it."""
    from bondsmith.stages.chat import Conversation

    conversation = Conversation(directory, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        conversation.say(prompt, out=print_piece)
        return
    while text := _ask():
        conversation.say(text, out=print_piece)


@app.command()
def version() -> None:
    """Show the versions that figures depend on."""
    from bondsmith.stages.describe import versions

    for package, number in versions().items():
        out.print(f"{package} {number}", highlight=False)


def print_piece(text: str) -> None:
    """Writes a piece of a reply as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _ask() -> str:
    try:
        return out.input("[bold]> [/bold]")
    except EOFError:
        return ""


def _show_tasks(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    models = list(dict.fromkeys(row["model"] for row in rows))
    table = Table("task", "metric", "rows", *models)
    for task in dict.fromkeys((row["task"], row["metric"], row["rows"]) for row in rows):
        scores = {r["model"]: r for r in rows if (r["task"], r["metric"], r["rows"]) == task}
        cells = [
            f"{scores[m]['score']:.4f}" + (f" ± {scores[m]['stderr']:.4f}" if scores[m]["stderr"] is not None else "")
            for m in models
        ]
        table.add_row(task[0], task[1], str(task[2]), *cells)
    out.print(table)
