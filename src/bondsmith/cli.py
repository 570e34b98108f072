"""The command `bondsmith`: options in, tables out; the work is done elsewhere."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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


def main() -> None:
    """Runs the command line: one clear sentence and a non-zero exit for what a person can put right."""
    quiet()
    from bondsmith.data import DataError
    from bondsmith.model.checkpoint import DiskFullError
    from bondsmith.model.source import ModelError
    from bondsmith.recipe import RecipeError
    from bondsmith.rundir import RunError
    from bondsmith.stages.plan import PlanError
    from bondsmith.stages.rows import TaskError

    try:
        app()
    except (DataError, DiskFullError, ModelError, PlanError, RecipeError, RunError, TaskError) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; what is finished is kept: the same command with --resume goes on")
        sys.exit(130)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.")],
    directory: Annotated[Path, typer.Option("--out", help="Where the compressed model goes.")],
    keep: Annotated[float | None, typer.Option(help="Share of the matrices' parameters to keep, e.g. 0.8.")] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Size instead: share of 4 bytes a parameter (0.07) or 38MB.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="frobenius, input or loss (the default).")] = None,
    sites: Annotated[
        str | None, typer.Option(help="auto, matrix, interleaved:N, thin:S or legs (24,24)(24,24).")
    ] = None,
    multiply_adds: Annotated[
        float | None, typer.Option(help="Share of the matrices' multiply-adds that may be left.")
    ] = None,
    loss: Annotated[
        float | None, typer.Option(help="Predicted loss tolerated, nats a token: the smallest file within it.")
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Widths to round to: 16 (not rounded), 8, 4, 3, 2. Repeatable; all of them with --bytes."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan.json instead of planning.")] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same keep for every matrix, for comparisons; no plan.")
    ] = False,
    no_propagate: Annotated[
        bool, typer.Option("--no-propagate", help="Calibrate on the original's inputs only.")
    ] = False,
    no_gauge: Annotated[bool, typer.Option("--no-gauge", help="Store full cores, for comparisons.")] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="self (the model's own samples, the default), FILE.txt, FILE.jsonl[.gz] or hf:DATASET. Repeatable."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768).")] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="More text to evaluate on, like --calibration. Repeatable.")
    ] = None,
    keep_dense: Annotated[
        list[str] | None, typer.Option(help="Matrices to leave alone, e.g. '*.layers.0.*'. Repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the saved weights: auto, float32, float16, bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings; options given here override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Compress and save only.")] = False,
) -> None:
    """Compress MODEL into a Hugging Face directory."""
    from bondsmith import pipeline
    from bondsmith.recipe import Recipe

    given = {
        "keep": keep,
        "bytes": bytes_,
        "multiply_adds": multiply_adds,
        "loss": loss,
        "bits": bits,
        "plan": None if plan is None else str(plan),
        "uniform": uniform or None,
        "metric": metric,
        "sites": sites,
        "propagate": False if no_propagate else None,
        "gauge": False if no_gauge else None,
        "calibration": calibration,
        "tokens": tokens,
        "evaluation": evaluation,
        "keep_dense": keep_dense,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value not in (None, [])}
    settings = Recipe.read(recipe, **changes) if recipe else Recipe.from_settings(changes)
    with progress_bars() as show:
        done = pipeline.compress(
            model,
            directory,
            settings,
            resume=resume,
            overwrite=overwrite,
            evaluate=not no_evaluate,
            command=shlex.join(["bondsmith", *sys.argv[1:]]),
            progress=show,
        )
    _show_results(done.path, done.results)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A compressed directory, or any model that transformers opens.")],
    tasks: Annotated[str, typer.Option(help="Task names of lm-evaluation-harness, comma separated.")],
    data: Annotated[Path | None, typer.Option(help="Folder of local benchmark files instead of hub data sets.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows per task.")] = None,
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


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Yields a function (stage, share) that draws one bar per stage with the time it still needs."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err) as progress:

        def show(stage: str, share: float) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0)
            progress.update(bars[stage], completed=share)

        try:
            yield show
        except BaseException:
            for bar in progress.tasks:
                if not bar.finished:
                    progress.remove_task(bar.id)
            raise


def _show_results(path: Path, results: dict[str, Any]) -> None:
    from bondsmith.stages.report import summary_table

    out.print(summary_table(results))
    out.print(f"model   {path}", highlight=False, soft_wrap=True)
    out.print(f"report  {path / 'report.html'}", highlight=False, soft_wrap=True)


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


def quiet() -> None:
    """Keeps the libraries' own bars and warnings off the screen; ours say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
