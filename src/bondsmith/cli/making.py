"""Commands that make models: compress, heal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bondsmith.cli.options import (
    Bits,
    Bytes,
    Device,
    Dtype,
    Keep,
    KeepDense,
    Loss,
    Metric,
    MultiplyAdds,
    NoChannels,
    NoGauge,
    NoPropagate,
    RecipeFile,
    Resume,
    Seed,
    Window,
)
from bondsmith.cli.screen import app, command_line, err, given, out, progress_bars


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Hub id, local directory or .gguf file.")],
    directory: Annotated[Path, typer.Option("--out", help="Where the compressed model goes.")],
    keep: Keep = None,
    bytes_: Bytes = None,
    metric: Metric = None,
    sites: Annotated[
        str | None, typer.Option(help="auto, matrix, interleaved:N, thin:S or legs (24,24)(24,24).")
    ] = None,
    multiply_adds: MultiplyAdds = None,
    loss: Loss = None,
    bits: Bits = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan.json instead of planning.")] = None,
    profile_: Annotated[
        Path | None, typer.Option("--profile", help="Go on from this finished profile; calibration is taken from it.")
    ] = None,
    no_channels: NoChannels = False,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same keep for every matrix, for comparisons; no plan.")
    ] = False,
    no_propagate: NoPropagate = False,
    no_gauge: NoGauge = False,
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
    keep_dense: KeepDense = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Seed = None,
    recipe: RecipeFile = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Compress and save only.")] = False,
) -> None:
    """Compress MODEL into a Hugging Face directory."""
    from bondsmith import pipeline
    from bondsmith.recipe import Recipe

    changes = given(
        {
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
    )
    settings = Recipe.read(recipe, **changes) if recipe else Recipe.from_settings(changes)
    with progress_bars() as show:
        done = pipeline.compress(
            model,
            directory,
            settings,
            resume=resume,
            overwrite=overwrite,
            evaluate=not no_evaluate,
            command=command_line(),
            progress=show,
        )
    _show_results(done.path, done.results)


@app.command()
def heal(
    directory: Annotated[Path, typer.Argument(help="A compressed directory.")],
    data: Annotated[
        list[str] | None, typer.Option(help="FILE.txt, FILE.jsonl[.gz] or hf:DATASET to train on. Repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Where the healed model goes; DIRECTORY without it.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all (300000).")] = None,
    teacher: Annotated[str | None, typer.Option(help="The original; the one DIRECTORY names without it.")] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Train on the text alone (fine-tuning).")] = False,
    resident: Annotated[
        bool, typer.Option("--resident", help="Keep the original in memory instead of its predictions on disk.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep the original's predictions here, for other runs.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Share of a core's size that a step moves it (0.0005, less where little was lost)."),
    ] = None,
    kl_weight: Annotated[float | None, typer.Option(help="Of the divergence from the original.")] = None,
    ce_weight: Annotated[float | None, typer.Option(help="Of the cross entropy of the text.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step, over all processes (4).")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Windows per forward pass (2).")] = None,
    window: Window = None,
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
    evaluation: Annotated[
        list[str] | None, typer.Option(help="Other text to measure the healed model on. Repeatable.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Late validations without a gain that end it (2; 0 never).")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Device = None,
    seed: Seed = None,
    recipe: RecipeFile = None,
    resume: Resume = False,
    finish: Annotated[bool, typer.Option("--finish", help="Write the best state of an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out; drop an interrupted run.")] = False,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Do not measure quality anew.")] = False,
) -> None:
    """Train the networks of a compressed directory to predict what the original predicts. Also under torchrun."""
    from bondsmith.healing import heal as heal_directory
    from bondsmith.recipe import read_settings

    if teacher and no_teacher:
        raise typer.BadParameter("give --teacher or --no-teacher, not both")
    changes = given(
        {
            "data": data or None,
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
            "evaluation": evaluation or None,
            "validate_every": validate_every,
            "save_every": save_every,
            "patience": patience,
            "resident": resident or None,
            "checkpoint_activations": checkpoint_activations or None,
            "precision": precision,
            "device": device,
            "seed": seed,
        }
    )
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
            command=command_line(),
            progress=show,
            tell=lambda moment: _tell(moment, show),
            **((read_settings(recipe) if recipe else {}) | changes),
        )
    if os.environ.get("RANK", "0") == "0":
        out.print(str(done), highlight=False)
        out.print(f"model   {done.path}", highlight=False, soft_wrap=True)


def _tell(moment: Any, show: Any) -> None:
    show("heal", moment.step / moment.steps, f"loss {moment.loss:.4f}, {moment.rate:.0f} tokens/s")
    if moment.validation is not None:
        err.print(str(moment), highlight=False, soft_wrap=True)


def _show_results(path: Path, results: dict[str, Any]) -> None:
    from bondsmith.stages.report import summary_table

    out.print(summary_table(results))
    out.print(f"model   {path}", highlight=False, soft_wrap=True)
    out.print(f"report  {path / 'report.html'}", highlight=False, soft_wrap=True)
