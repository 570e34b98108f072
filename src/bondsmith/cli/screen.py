"""The command itself, the two consoles, and the progress bars."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make language models small with tensor networks.",
)
out, err = Console(), Console(stderr=True)


def command_line() -> str:
    """Returns the command that is running, as a user would type it."""
    return shlex.join(["bondsmith", *sys.argv[1:]])


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that were given a value."""
    return {name: value for name, value in options.items() if value not in (None, [])}


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Yields a function (stage, share, note) that draws one bar per stage with the time it still needs and, behind it, a note."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    bars: dict[str, TaskID] = {}
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=err) as progress:

        def show(stage: str, share: float, note: str = "") -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, note="")
            progress.update(bars[stage], completed=share, note=note)

        try:
            yield show
        except BaseException:
            for bar in progress.tasks:
                if not bar.finished:
                    progress.remove_task(bar.id)
            raise
