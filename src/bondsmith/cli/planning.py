"""Commands that come before: profile, plan, frontier, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bondsmith.cli.options import (
    BenchmarkData,
    Bits,
    Bytes,
    Device,
    Dtype,
    Keep,
    KeepDense,
    Limit,
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
from bondsmith.cli.screen import app, command_line, given, out, progress_bars


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
    metric: Metric = None,
    calibration: Annotated[list[str] | None, typer.Option(help="As of compress. Repeatable.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768, 8192 with --layers).")] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="With --layers: text to score (held-out calibration text). Repeatable.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="With --layers: windows scored (4).")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window (512, 256 with --layers).")] = None,
    tasks: Annotated[str | None, typer.Option(help="With --layers: lm-eval tasks to score, comma separated.")] = None,
    data: BenchmarkData = None,
    limit: Limit = None,
    device: Device = None,
    seed: Seed = None,
    probes: Annotated[
        int | None, typer.Option(help="Windows on which probes correct the scale of the predictions (none).")
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew.")] = False,
) -> None:
    """Show what each matrix of MODEL can bear: predicted for the whole model from one pass, or measured with --layers."""
    from bondsmith import profiling

    of_layers: dict[str, Any] = {"--blocks": blocks, "--keeps": keeps, "--sites": sites, "--windows": windows}
    of_layers |= {"--tasks": tasks, "--data": data, "--limit": limit}
    idle = given({"--probes": probes} if layers else of_layers)
    if idle:
        raise typer.BadParameter(f"{', '.join(idle)}: only {'without' if layers else 'with'} --layers")
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
                command=command_line(),
                progress=show,
                **given(wanted),
            )
        out.print(found.profile.table())
        out.print(f"page   {found.path / PAGE}", highlight=False, soft_wrap=True)
        return
    chosen = {
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
    settings = profiling.LayerSettings(**given(chosen))
    with progress_bars() as show:
        done = profiling.profile_layers(
            model,
            directory,
            settings,
            resume=resume,
            overwrite=overwrite,
            command=command_line(),
            progress=show,
        )
    for table in done.tables():
        out.print(table)
    out.print(f"page   {directory / profiling.PAGE}", highlight=False, soft_wrap=True)


@app.command("plan")
def make_plan(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished profile.")],
    to: Annotated[Path | None, typer.Option("--out", help="File for the plan (DIRECTORY/plan.json).")] = None,
    keep: Keep = None,
    bytes_: Bytes = None,
    multiply_adds: MultiplyAdds = None,
    loss: Loss = None,
    bits: Bits = None,
    keep_dense: KeepDense = None,
    no_gauge: NoGauge = False,
    no_channels: NoChannels = False,
    recipe: RecipeFile = None,
) -> None:
    """Choose bonds, channels and bits for every matrix of a profiled model: the least predicted loss within the budgets."""
    from bondsmith import planner
    from bondsmith.recipe import Recipe

    chosen: dict[str, Any] = {"keep": keep, "bytes": bytes_, "multiply_adds": multiply_adds, "loss": loss, "bits": bits}
    chosen |= {
        "keep_dense": keep_dense,
        "gauge": False if no_gauge else None,
        "channels": False if no_channels else None,
    }
    changes = given(chosen)
    settings = Recipe.read(recipe, **changes).to_dict() if recipe else changes
    to = to or directory / "plan.json"
    out.print(planner.plan_table(planner.plan(directory, to, **settings)))
    out.print(f"plan   {to}", highlight=False, soft_wrap=True)


@app.command()
def frontier(
    model: Annotated[str, typer.Argument(help="Hub id, local directory, .gguf file, or the directory of a profile.")],
    to: Annotated[Path | None, typer.Option("--out", help="Page to draw it on (frontier.html).")] = None,
    carry: Annotated[
        list[str] | None,
        typer.Option("--carry-out", help="Size to compress to and measure: 0.07, 38MB or keep=0.8. Repeatable."),
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Compressed directory to draw beside, as measured. Repeatable.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--profile", help="Where the profile of a model goes, or is (NAME-profile).")
    ] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="As of compress. Repeatable.")] = None,
    evaluation: Annotated[list[str] | None, typer.Option(help="As of compress. Repeatable.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768).")] = None,
    window: Window = None,
    device: Device = None,
    seed: Seed = None,
) -> None:
    """Show how small a model can get for how much loss: cut, rounded, and both; at some sizes carried out and measured."""
    from bondsmith import pipeline, planner

    finished = (Path(model) / "profile.json").is_file()
    home = Path(model) if finished else directory or Path(f"{Path(model).name.removesuffix('.gguf')}-profile")
    wanted: dict[str, Any] = {"calibration": calibration, "evaluation": evaluation, "tokens": tokens, "window": window}
    wanted = given(wanted | {"device": device, "seed": seed})
    with progress_bars() as show:
        if (home / "profile.json").is_file():
            planner.check_profile_of(home, None if finished else model, **wanted)
        else:
            begun = home.is_dir() and any(home.iterdir())
            planner.profile(model, home, resume=begun, command=command_line(), progress=show, **wanted)
        names = [p.name for p in measured or ()]
        known = {p.name if names.count(p.name) == 1 else str(p): p for p in measured or ()}
        known |= pipeline.carry_out(home, carry or (), show)
        page = to or home / "frontier.html"
        found = planner.frontier(home, page, measured=known, progress=show)
    out.print(found.table())
    out.print(f"page   {page}", highlight=False, soft_wrap=True)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub id, .gguf file or directory; a config.json alone will do.")],
    keep: Keep = None,
    bytes_: Bytes = None,
    dtype: Dtype = None,
    sites: Annotated[str | None, typer.Option(help="As of compress.")] = None,
    metric: Metric = None,
    calibration: Annotated[list[str] | None, typer.Option(help="As of compress; self needs the whole model.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all (32768).")] = None,
    keep_dense: KeepDense = None,
    no_gauge: NoGauge = False,
    no_propagate: NoPropagate = False,
) -> None:
    """Show what compressing MODEL would give and take, from its configuration alone: sizes, memory, disk and time."""
    from bondsmith.model.facts import read_facts
    from bondsmith.recipe import Recipe
    from bondsmith.stages.estimate import estimate as estimated
    from bondsmith.stages.rates import measure_speed

    chosen: dict[str, Any] = {"keep": keep, "bytes": bytes_, "dtype": dtype, "sites": sites, "metric": metric}
    chosen |= {"calibration": calibration, "tokens": tokens, "keep_dense": keep_dense}
    chosen |= {"gauge": False if no_gauge else None, "propagate": False if no_propagate else None}
    settings = Recipe.from_settings(given(chosen))
    for table in estimated(read_facts(model), settings, measure_speed()).tables():
        out.print(table)


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 1,5,9", param_hint=option) from error
