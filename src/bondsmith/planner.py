"""Profile a model, plan from the profile, and draw how small it can get: what precedes a compression, each on its own.

`profile` leaves a directory that `plan` and `frontier` read in seconds and `compress --profile` goes on from.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from transformers import PreTrainedModel

from bondsmith.data import check_spec
from bondsmith.recipe import BUDGETS, Recipe
from bondsmith.run import Progress, Run
from bondsmith.rundir import FINGERPRINT, LOG, WORK, RunError, call_of, check_apart, check_idle, logging_to
from bondsmith.stages.estimate import plan_needs
from bondsmith.stages.frontier import Frontier, frontier_sections, predict_frontier
from bondsmith.stages.matrix_plan import PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.planning import planned
from bondsmith.stages.profile import Profile
from bondsmith.stages.profile_page import fast_sections, write_page
from bondsmith.stages.rates import measure_speed

PAGE = "profile.html"
SHARED = (
    "metric",
    "calibration",
    "tokens",
    "window",
    "gradient_share",
    "seed",
    "evaluation",
    "evaluation_windows",
    "probe_windows",
)


@dataclass(frozen=True)
class Profiled:
    """A finished profile and where it lies."""

    path: Path
    profile: Profile

    def __str__(self) -> str:
        return str(self.profile)


def profile(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = lambda stage, share: None,
    **settings: Any,
) -> Profiled:
    """Profiles `model` into the directory `out`: what every matrix can bear, predicted from one pass forward and back.

    Args:
        model: a hub id, a directory, a `.gguf` file or a loaded model.
        resume: go on with what an interrupted run left in `out`.
        overwrite: replace what is in `out`.
        command: what the page says that was called; this call by default.
        settings: those of a recipe that concern calibration: metric, calibration, tokens, window, seed.

    Raises:
        ModelError, DataError, RecipeError, RunError: before any long work.
    """
    recipe = Recipe.from_settings({"keep": 1.0} | settings)
    out = Path(out).expanduser().absolute()
    for spec in (*recipe.calibration, *recipe.evaluation):
        check_spec(spec)
    check_apart(model, out)
    with _opened(out, resume, overwrite) as keep, logging_to(out / LOG):
        run = Run(out, recipe, progress, command or call_of("profile", model, out, settings))
        with run.stage("open"):
            opened = run.open(model, text=True)
            run.settle_metric(opened)
            run.keep_fingerprint(opened.source, evaluate=True)
        keep()
        run.recipe.save(out / "recipe.yaml")
        with run.stage("calibration text"):
            calibration, _ = run.windows(opened.source, opened.tokenizer, evaluate=True)
        job = run.job(opened.source, opened.runner, Plan((), 0), calibration, opened.dtype)
        run.gradients(job, hybrids=True)
        with run.stage("profile"):
            found = run.profile(opened, job)
    found.save(out)
    notes = {"command": run.command, "seconds": f"{sum(run.seconds.values()):.0f}"}
    write_page(out / PAGE, f"Profile of {found.model}", fast_sections(found), notes)
    return Profiled(out, found)


def plan(directory: str | Path, out: str | Path | None = None, **settings: Any) -> Plan:
    """Returns the plan that the profile in `directory` leads to; writes it to the file `out`.

    Args:
        settings: of a recipe: budgets (keep, bytes, multiply_adds, loss), bits, group, bounds, keep_dense, channels, gauge.

    Printed, it also says what carrying it out takes on this machine.

    Raises:
        ValueError: there is no profile, or PlanError: the budgets cannot be met.
    """
    profile, recipe = _load(directory), Recipe.from_settings(settings)
    if not recipe.planned:
        raise PlanError(
            "plan: uniform plans and sites other than the matrix cut are not chosen from a profile; give them to compress"
        )
    if recipe.dtype != "auto":
        profile = replace(profile, itemsize=getattr(torch, recipe.dtype).itemsize)
    found = planned(profile, recipe)
    taken = recipe.changed(**shared_settings(Path(directory).expanduser()))
    found = replace(found, needs=plan_needs(found, profile, taken, measure_speed()))
    if out is not None:
        found.save(Path(out))
    return found


def frontier(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    measured: Mapping[str, Path] | None = None,
    progress: Progress = lambda stage, share: None,
    **settings: Any,
) -> Frontier:
    """Returns how the predicted loss of the profiled model grows as it shrinks: cut alone, rounded alone, and both together.

    Args:
        directory: of a profile in the loss metric.
        out: page to draw it on.
        measured: labels -> compressed directories whose measured loss is drawn beside.
        settings: of a recipe, besides budgets: bits, group, bounds, keep_dense, channels, gauge.
    """
    settings = {k: v for k, v in settings.items() if k not in BUDGETS}
    found = predict_frontier(_load(directory), settings, measured or {}, lambda share: progress("frontier", share))
    if out is not None:
        write_page(Path(out), f"How small {found.model} can get", frontier_sections(found))
    return found


def plan_table(found: Plan) -> Table:
    """Returns the table of a plan by kind of matrix: how many, what is kept, bonds, channels, widths, predicted loss."""
    table = Table("matrices", "number", "kept", "bonds", "channels", "stored as", "predicted loss", title=str(found))
    kinds: dict[str, list[Any]] = {}
    for m in (*found.matrices, *found.tables):
        kinds.setdefault(m.name.rsplit(".", 1)[-1], []).append(m)
    for kind, members in kinds.items():
        bonds = [m.bonds[0] for m in members if m.sites is not None]
        channels = [m.kept_rows or m.kept_columns for m in members if m.kept_rows or m.kept_columns]
        widths = sorted({str(m.grid) if m.grid else "unrounded" for m in members})
        losses = [m.loss for m in members if m.loss is not None]
        kept = sum(m.parameters for m in members) / sum(m.dense_parameters for m in members)
        table.add_row(
            kind,
            str(len(members)),
            f"{kept:.3f}",
            f"{min(bonds)}-{max(bonds)}" + ("" if len(bonds) == len(members) else ", some dense") if bonds else "dense",
            f"{min(channels)}-{max(channels)}" if channels else "",
            ", ".join(widths),
            f"{math.fsum(losses):.4f}" if losses else "",
        )
    return table


def adopt(work: Path, directory: Path, files: Mapping[str, str]) -> None:
    """Links what a profile in `directory` holds into the `work` of a compression: windows, moments, spectra.

    Raises:
        RunError: it is no finished profile, or one of another model.
    """
    source = directory / WORK
    fingerprint = directory / FINGERPRINT
    if not (directory / "profile.json").is_file() or not fingerprint.is_file() or not source.is_dir():
        raise RunError(f"{directory} holds no finished profile: run `bondsmith profile MODEL --out {directory}`")
    known = json.loads(fingerprint.read_text())["files"]
    for file, digest in files.items():
        if known.get(file) != digest:
            raise RunError(f"{directory} is the profile of another model or of other files: {file} differs")
    for path in sorted(source.rglob("*")):
        target = work / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)


def shared_settings(directory: Path) -> dict[str, Any]:
    """Returns the settings that a compression takes over from the profile in `directory`."""
    path = directory / "recipe.yaml"
    if not path.is_file():
        raise RunError(
            f"{directory} holds no profile: it has no recipe.yaml; run `bondsmith profile MODEL --out {directory}`"
        )
    settings = yaml.safe_load(path.read_text())
    return {name: settings[name] for name in SHARED if name in settings}  # a setting may be younger than the profile


@contextmanager
def _opened(out: Path, resume: bool, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Makes the directory of a profile, or finds it again; what `overwrite` replaces is back if anything fails before `keep` is called."""
    if out.is_file():
        raise RunError(f"{out} is a file: give a directory")
    check_idle(out)
    aside = out.with_name(out.name + ".old")
    if aside.is_dir():  # a run was killed before it had opened the model
        shutil.rmtree(out, ignore_errors=True)
        os.rename(aside, out)
    if out.is_dir() and any(out.iterdir()):
        if overwrite:
            if not (out / FINGERPRINT).is_file():
                raise RunError(f"{out} holds something else than a profile: give another directory, or empty this one")
            os.rename(out, aside)
        elif not resume:
            raise RunError(f"{out} exists and is not empty: --resume goes on with it, --overwrite starts anew")
    (out / WORK).mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        if aside.is_dir():
            os.rename(aside, out / WORK / "replaced")
            shutil.rmtree(out / WORK / "replaced")

    try:
        yield keep
    except BaseException:
        if aside.is_dir():
            shutil.rmtree(out)
            os.rename(aside, out)
        raise


def check_profile_of(directory: Path, model: str | None, **asked: Any) -> None:
    """Raises RunError if the profile in `directory` is of another model than the one named, if any, or has other settings than asked."""
    known = _load(directory).model
    same = model is None or model == known or Path(model).expanduser().resolve() == Path(known).expanduser().resolve()
    if not same:
        raise RunError(f"{directory} is the profile of {known}, not of {model}: give another directory with --profile")
    has = shared_settings(directory)
    for name, value in asked.items():
        value = list(value) if isinstance(value, tuple | list) else value
        if name in has and has[name] != value:
            raise RunError(
                f"{directory} has a profile with {name} {has[name]}, not {value}: give another directory with --profile"
            )


def _load(directory: str | Path) -> Profile:
    try:
        return Profile.load(Path(directory).expanduser())
    except ValueError as error:
        raise PlanError(str(error)) from error
