"""The command `bondsmith`: options in, tables out; the work is done elsewhere."""

from __future__ import annotations

import logging
import os
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
    from bondsmith.stages.healing.settings import HealError
    from bondsmith.stages.plan import PlanError
    from bondsmith.stages.rows import TaskError

    try:
        app()
    except (DataError, DiskFullError, HealError, ModelError, PlanError, RecipeError, RunError, TaskError) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; what is finished is kept: the same command with --resume goes on")
        sys.exit(130)


RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML file of settings, or a ready one by name (int4); options override it.")
]


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
    profile_: Annotated[
        Path | None, typer.Option("--profile", help="Go on from this finished profile; calibration is taken from it.")
    ] = None,
    no_channels: Annotated[bool, typer.Option("--no-channels", help="Do not drop hidden channels of MLPs.")] = False,
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
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of settings, or a ready one by name; options given here override it.")
    ] = None,
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
        "profile": None if profile_ is None else str(profile_),
        "channels": False if no_channels else None,
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


@app.command()
def heal(
    directory: Annotated[Path, typer.Argument(help="A compressed directory.")],
    data: Annotated[list[str], typer.Option(help="FILE.txt, FILE.jsonl[.gz] or hf:DATASET to train on. Repeatable.")],
    to: Annotated[Path | None, typer.Option("--out", help="Where the healed model goes; DIRECTORY without it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all (300000).")] = None,
    teacher: Annotated[str | None, typer.Option(help="The original; the one DIRECTORY names without it.")] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Train on the text alone (fine-tuning).")] = False,
    resident: Annotated[
        bool, typer.Option("--resident", help="Keep the original in memory instead of its predictions on disk.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep the original's predictions here, for other runs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Share of a core's size that a step moves it.")] = None,
    kl_weight: Annotated[float | None, typer.Option(help="Of the divergence from the original.")] = None,
    ce_weight: Annotated[float | None, typer.Option(help="Of the cross entropy of the text.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step, over all processes (4).")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass (2).")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window (512).")] = None,
    loss_on: Annotated[str | None, typer.Option(help="all tokens, or answers of chats; auto.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Train embedding and head too.")] = False,
    round_bits: Annotated[
        int | None, typer.Option(help="Round the cores to so many bits in every pass, for a rounding to come.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory, a third more time.")
    ] = False,
    validation_windows: Annotated[int | None, typer.Option(help="Windows per text that are held out (4).")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations (eight in all).")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints besides.")] = None,
    patience: Annotated[int | None, typer.Option(help="Validations without a gain that end it (4; 0 never).")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of settings, or a ready one by name; options given here override it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Write the best state of an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out; drop an interrupted run.")] = False,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Do not measure quality anew.")] = False,
) -> None:
    """Train the networks of a compressed directory to predict what the original predicts. Also under torchrun."""
    from bondsmith.healing import heal as heal_directory
    from bondsmith.recipe import read_settings

    given = {
        "data": data,
        "tokens": tokens,
        "window": window,
        "batch": batch,
        "micro_batch": micro_batch,
        "learning_rate": learning_rate,
        "kl_weight": kl_weight,
        "ce_weight": ce_weight,
        "embeddings": embeddings or None,
        "round_bits": round_bits,
        "loss_on": loss_on,
        "validation_windows": validation_windows,
        "validate_every": validate_every,
        "save_every": save_every,
        "patience": patience,
        "resident": resident or None,
        "checkpoint_activations": checkpoint_activations or None,
        "precision": precision,
        "device": device,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    with progress_bars() as show:
        done = heal_directory(
            directory,
            to,
            teacher=False if no_teacher else teacher or True,
            cache=cache,
            resume=resume,
            finish=finish,
            overwrite=overwrite,
            evaluate=not no_evaluate,
            command=shlex.join(["bondsmith", *sys.argv[1:]]),
            progress=show,
            tell=_tell,
            **((read_settings(recipe) if recipe else {}) | changes),
        )
    if os.environ.get("RANK", "0") == "0":
        out.print(str(done), highlight=False)
        out.print(f"model   {done.path}", highlight=False, soft_wrap=True)


def _tell(moment: Any) -> None:
    if moment.validation is not None:
        err.print(str(moment), highlight=False, soft_wrap=True)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.")],
    directory: Annotated[Path, typer.Option("--out", help="Where the profile goes.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure: cut one matrix at a time, in some blocks, and score the model.")
    ] = False,
    blocks: Annotated[
        str | None, typer.Option(help="With --layers: which blocks, 0,5,15,29 (four by default).")
    ] = None,
    keeps: Annotated[
        str | None, typer.Option(help="With --layers: shares of the parameters kept (0.1,0.25,0.5,0.75,0.9).")
    ] = None,
    sites: Annotated[str | None, typer.Option(help="With --layers: matrix, interleaved:N, thin:S or legs.")] = None,
    metric: Annotated[str | None, typer.Option(help="frobenius, input or loss (the default).")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="As of compress. Repeatable.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768, 8192 with --layers).")] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="With --layers: text to score (held-out calibration text). Repeatable.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="With --layers: windows scored (4).")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window (512, 256 with --layers).")] = None,
    tasks: Annotated[str | None, typer.Option(help="With --layers: lm-eval tasks to score, comma separated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of local benchmark files instead of hub data sets.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows per task.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    probes: Annotated[
        int | None, typer.Option(help="Windows on which probes correct the scale of the predictions (none).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew.")] = False,
) -> None:
    """Show what each matrix of MODEL can bear: predicted for the whole model from one pass, or measured with --layers."""
    from bondsmith import profiling

    if not layers:
        from bondsmith.planner import PAGE
        from bondsmith.planner import profile as fast

        wanted = {"metric": metric, "calibration": calibration, "evaluation": evaluation, "tokens": tokens}
        wanted |= {"window": window, "device": device, "seed": seed, "probe_windows": probes}
        with progress_bars() as show:
            found = fast(
                model,
                directory,
                resume=resume,
                overwrite=overwrite,
                progress=show,
                **{k: v for k, v in wanted.items() if v not in (None, [])},
            )
        out.print(found.profile.table())
        out.print(f"page   {found.path / PAGE}", highlight=False, soft_wrap=True)
        return
    given: dict[str, Any] = {
        "blocks": _numbers("--blocks", blocks, int),
        "keeps": _numbers("--keeps", keeps, float),
        "sites": sites,
        "metric": metric,
        "calibration": calibration,
        "tokens": tokens,
        "evaluation": evaluation,
        "windows": windows,
        "window": window,
        "tasks": tasks and tuple(name.strip() for name in tasks.split(",") if name.strip()),
        "data": str(data) if data else None,
        "limit": limit,
        "device": device,
        "seed": seed,
    }
    settings = profiling.LayerSettings(**{k: v for k, v in given.items() if v not in (None, [])})
    with progress_bars() as show:
        done = profiling.profile_layers(
            model,
            directory,
            settings,
            resume=resume,
            overwrite=overwrite,
            command=shlex.join(["bondsmith", *sys.argv[1:]]),
            progress=show,
        )
    for table in done.tables():
        out.print(table)
    out.print(f"page   {directory / profiling.PAGE}", highlight=False, soft_wrap=True)


@app.command("plan")
def make_plan(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished profile.")],
    to: Annotated[Path | None, typer.Option("--out", help="File for the plan (DIRECTORY/plan.json).")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the matrices' parameters to keep, e.g. 0.8.")] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Size of the weight files: share of 4 bytes a parameter, or 38MB.")
    ] = None,
    multiply_adds: Annotated[float | None, typer.Option(help="Share of the matrices' multiply-adds left.")] = None,
    loss: Annotated[
        float | None, typer.Option(help="Predicted loss tolerated, nats a token: the smallest file within it.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(help="16 (not rounded), 8, 4, 3, 2. Repeatable.")] = None,
    keep_dense: Annotated[list[str] | None, typer.Option(help="Matrices to leave alone. Repeatable.")] = None,
    no_gauge: Annotated[bool, typer.Option("--no-gauge", help="Store full cores.")] = False,
    no_channels: Annotated[bool, typer.Option("--no-channels", help="Do not drop hidden channels of MLPs.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of settings, or a ready one by name; options given here override it.")
    ] = None,
) -> None:
    """Choose bonds, channels and bits for every matrix of a profiled model: the least predicted loss within the budgets."""
    from bondsmith import planner
    from bondsmith.recipe import Recipe

    given: dict[str, Any] = {"keep": keep, "bytes": bytes_, "multiply_adds": multiply_adds, "loss": loss, "bits": bits}
    given |= {
        "keep_dense": keep_dense,
        "gauge": False if no_gauge else None,
        "channels": False if no_channels else None,
    }
    changes = {name: value for name, value in given.items() if value not in (None, [])}
    settings = Recipe.read(recipe, **changes).to_dict() if recipe else changes
    to = to or directory / "plan.json"
    out.print(planner.plan_table(planner.plan(directory, to, **settings)))
    out.print(f"plan   {to}", highlight=False, soft_wrap=True)


@app.command()
def frontier(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished profile in the loss metric.")],
    to: Annotated[Path | None, typer.Option("--out", help="Page to draw it on (frontier.html).")] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Compressed directory to draw beside, as measured. Repeatable.")
    ] = None,
) -> None:
    """Show how small a profiled model can get for how much loss: cut, rounded, and both."""
    from bondsmith import planner

    page = to or directory / "frontier.html"
    with progress_bars() as show:
        found = planner.frontier(directory, page, measured={p.name: p for p in measured or ()}, progress=show)
    out.print(found.table())
    out.print(f"page   {page}", highlight=False, soft_wrap=True)


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 1,5,9", param_hint=option) from error


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub id, .gguf file or directory; a config.json alone will do.")],
    keep: Annotated[float | None, typer.Option(help="Share of the matrices' parameters to keep, e.g. 0.8.")] = None,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Size instead: share of 4 bytes a parameter (0.07) or 38MB.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the saved weights: auto, float32, float16, bfloat16.")] = None,
    sites: Annotated[str | None, typer.Option(help="As of compress.")] = None,
    metric: Annotated[str | None, typer.Option(help="frobenius, input or loss (the default).")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="As of compress; self needs the whole model.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768).")] = None,
    keep_dense: Annotated[list[str] | None, typer.Option(help="Matrices to leave alone. Repeatable.")] = None,
    no_gauge: Annotated[bool, typer.Option("--no-gauge", help="Store full cores.")] = False,
    no_propagate: Annotated[bool, typer.Option("--no-propagate", help="Calibrate on the original's inputs.")] = False,
) -> None:
    """Show what compressing MODEL would give and take, from its configuration alone: sizes, memory, disk and time."""
    from bondsmith.model.facts import read_facts
    from bondsmith.recipe import Recipe
    from bondsmith.stages import estimate as stage

    given: dict[str, Any] = {"keep": keep, "bytes": bytes_, "dtype": dtype, "sites": sites, "metric": metric}
    given |= {"calibration": calibration, "tokens": tokens, "keep_dense": keep_dense}
    given |= {"gauge": False if no_gauge else None, "propagate": False if no_propagate else None}
    settings = Recipe.from_settings({name: value for name, value in given.items() if value not in (None, [])})
    for table in stage.estimate(read_facts(model), settings, stage.measure_speed()).tables():
        out.print(table)


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
