"""From a model to a smaller one: the order of the stages, the run directory, fingerprints and resume.

A run writes into `OUT.partial` beside `OUT`: finished weight files under their final names, and in `work/` what is needed only until
the end. When all is there the directory takes the name `OUT`, in one rename; until then `OUT` is as it was. A fingerprint of the
settings and the contents of the input files says whether a later run may go on from what it finds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bondsmith.data import DataError, Windows, check_spec, fitted_sample
from bondsmith.limits import check_disk, check_memory, device_of
from bondsmith.model.checkpoint import (
    is_compressed,
    open_compressed,
    shard_name,
    write_config,
    write_index,
    write_json,
)
from bondsmith.model.hub import load
from bondsmith.model.source import ModelError, Source, file_digest, load_whole, open_source
from bondsmith.nn.experts import merge_experts
from bondsmith.nn.packed import is_packed
from bondsmith.planner import SHARED, adopt, shared_settings
from bondsmith.recipe import Recipe, RecipeError, parse_bytes
from bondsmith.run import Progress, Run
from bondsmith.rundir import (
    FINGERPRINT,
    LOG,
    RunError,
    call_of,
    check_apart,
    log,
    logging_to,
    move_into_place,
    open_directory,
)
from bondsmith.stages import decompose, describe, quality, report, speed
from bondsmith.stages.job import Job
from bondsmith.stages.profile import Profile
from bondsmith.stages.reduction import check_channels, fused_copies


@dataclass(frozen=True)
class Compressed:
    """A finished compression: where it lies and its figures (the content of `results.json`)."""

    path: Path
    results: dict[str, Any]

    def load(self, **options: Any) -> PreTrainedModel:
        """Returns the model; options go to `from_pretrained`."""
        return load(self.path, **options)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110)
        with console.capture() as capture:
            console.print(report.summary_table(self.results))
        return capture.get()


def compress(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    evaluate: bool = True,
    command: str | None = None,
    progress: Progress = lambda stage, share: None,
    **settings: Any,
) -> Compressed:
    """Compresses `model` into the directory `out`; returns where it is and its figures.

    Args:
        model: a hub id, a directory, a `.gguf` file or a loaded model (whose tokenizer is looked for at its `name_or_path`); or a
            directory that this wrote, maybe healed, whose cores are rounded then and nothing else.
        recipe: the settings; or give them as keywords: `compress(model, out, keep=0.8, metric="loss")`.
        resume: go on with what an interrupted run with the same settings left in `OUT.partial`.
        overwrite: replace what is in `out`, once the new model is complete; drop what an interrupted run left.
        evaluate: measure quality and speed, and write them into the report.
        command: the command line, for the report.
        progress: is called with the name of a stage and the share of it that is done.

    Raises:
        ModelError, DataError, RecipeError, PlanError, RunError: before any long work, with the numbers and the remedy.
        DiskFullError: later; what is done is kept for `resume`.
    """
    recipe = recipe.changed(**settings) if recipe else Recipe.from_settings(settings)
    if is_compressed(model):
        recipe = _of_the_original(recipe.for_rounding(), Path(str(model)).expanduser())
    if recipe.profile is not None:
        recipe = _with_profile(recipe)
    out = Path(out).expanduser().absolute()
    for spec in (*recipe.calibration, *recipe.evaluation):
        check_spec(spec)
    check_apart(model, out)
    directory = open_directory(out, resume, overwrite)
    with logging_to(directory / LOG):
        run = _Compression(directory, recipe, progress, command or call_of("compress", model, out, recipe.given()))
        run.started = (directory / FINGERPRINT).is_file()
        try:
            results = run.all(model, evaluate)
        except (ModelError, DataError, ValueError) as error:
            log.error("%s", error)
            if not run.started:
                shutil.rmtree(directory, ignore_errors=True)
            raise
    move_into_place(directory, out)
    return Compressed(out, results)


def carry_out(
    directory: str | Path, sizes: Sequence[str], progress: Progress = lambda stage, share: None
) -> dict[str, Path]:
    """Compresses and measures a profiled model at some sizes; returns label -> directory, for `frontier`.

    What is there already is not made again, and an interrupted one is gone on with.

    Args:
        directory: of a finished profile; models go into `measured` inside it.
        sizes: of the weight files, as `bytes` of a recipe ("0.07", "38MB"), or shares of the parameters ("keep=0.8").

    Raises:
        RecipeError, RunError: before any work.
    """
    home = Path(directory).expanduser().absolute()
    recipes = {}
    for text in sizes:
        budget, _, value = text.rpartition("=")
        if budget not in ("", "keep", "bytes"):
            raise RecipeError(f"{text!r} is no size: write 0.07, 38MB or keep=0.8")
        try:
            settings = {"keep": float(value)} if budget == "keep" else {"bytes": value}
        except ValueError as error:
            raise RecipeError(f"{text!r}: {value!r} is not a number") from error
        recipes[text] = Recipe.from_settings({"profile": str(home), **settings, **shared_settings(home)})
    model = Profile.load(home).model
    places = {text: home / "measured" / text.replace("=", "-") for text in sizes}
    for text, recipe in recipes.items():
        place = places[text]
        if not (place / "results.json").is_file():
            resume = place.with_name(place.name + ".partial").is_dir()
            compress(model, place, recipe, resume=resume, progress=progress)
    return places


@dataclass
class _Compression(Run):
    """A run to its end: a compressed model with its figures."""

    def all(self, model: str | Path | PreTrainedModel, evaluate: bool) -> dict[str, Any]:
        """Runs what is not done yet; returns the results."""
        log.info("bondsmith %s: %s", describe.versions()["bondsmith"], self.command)
        with self.stage("open"):
            opened = self.open(model, text=self.recipe.needs_moments or evaluate)
            source, runner, dtype, tokenizer = opened.source, opened.runner, opened.dtype, opened.tokenizer
            self.settle_metric(opened)
            first = self.first_plan(opened)
            check_disk(self.directory, first, runner, self.recipe, dtype)
            if self.recipe.profile is not None:
                files = {str(f): file_digest(f) for f in source.files}
                adopt(self.work, Path(self.recipe.profile).expanduser(), files)
            self.keep_fingerprint(source, evaluate)
        self.recipe.save(self.directory / "recipe.yaml")
        with self.stage("calibration text"):
            calibration, held_out = self.windows(source, tokenizer, evaluate)
        self.started = True
        job = self.job(source, runner, first, calibration, dtype)
        if self.recipe.plan is not None:
            check_channels(job)
        self.gradients(job, hybrids=self.recipe.planned and self.recipe.rounds)
        job = replace(job, plan=self.plan(opened, job, first))
        log.info("plan: %s", job.plan)
        with self.stage("decompose"):
            decompose.compress_rest(job)
            count = len(runner)
            decompose.compress_blocks(job, lambda k: self.progress("decompose", (k + 1) / count))
        self.finish_model(job, tokenizer)
        results = self.describe(job, calibration)
        if training := decompose.read_training(job):
            results["blockwise"] = training
        if is_compressed(source.path):
            results = _carried_on(results, source.path)
        del job, runner, opened
        if evaluate:
            results |= self.evaluate(self.original(source, results), held_out, calibration)
        results["seconds"] = self.seconds
        write_json(self.directory / "results.json", results)
        report.write_report(self.directory, results)
        log.info("done")
        return results

    def finish_model(self, job: Job, tokenizer: Any) -> None:
        """Writes tokenizer, index and configuration: with them the directory is a model."""
        if tokenizer is not None:
            tokenizer.save_pretrained(self.directory)
        count = len(job.runner) + 1
        write_index(self.directory, [shard_name(i, count) for i in range(count)])
        networks = dict(getattr(job.source.config, "quantization_config", None) or {}).get("networks", {})
        networks = networks | {m.name: m.network() for m in job.plan.matrices if m.network()}
        for name, copies in fused_copies(job.plan, job.moments, job.runner.path).items():
            networks[name]["copies"] = copies
        write_config(self.directory, job.source, networks, job.dtype, job.plan.packed())

    def describe(self, job: Job, calibration: list[Windows]) -> dict[str, Any]:
        """Returns the sections of `results.json` that need no measurement."""
        return describe.describe_run(
            job.source,
            job.plan,
            self.recipe,
            job.dtype,
            calibration,
            decompose.read_errors(job),
            self.directory,
            self.command,
        )

    def original(self, source: Source, results: dict[str, Any]) -> Source:
        """Returns what the result is compared with: of a compressed model that was rounded, the original where it can be found."""
        if not is_compressed(source.path):
            return source
        name = results["model"]["name"]
        try:
            return open_source(name, self.work / "original")
        except ModelError as error:
            log.warning("%s: figures compare with %s, which was not rounded yet (%s)", name, source.path, error)
            return source

    def evaluate(self, source: Source, held_out: Sequence[Windows], calibration: Sequence[Windows]) -> dict[str, Any]:
        """Returns quality on held-out text, on text that was fitted, and speed, measured on the model as it was written, read back."""
        device = device_of(self.recipe)
        compressed = open_compressed(self.directory)
        with self.stage("quality"):
            texts = [*held_out, *fitted_sample(calibration, self.recipe.evaluation_windows)]
            rows = quality.compare(source, compressed, texts, device, lambda s: self.progress("quality", s))
            found: dict[str, Any] = {"quality": rows[: len(held_out)]}
            if len(rows) > len(held_out):
                found["quality_fitted"] = rows[-1]
        try:
            check_memory(source, 2, "measuring speed", "measure it on a larger machine")
        except RunError as reason:
            return found | {"speed_skipped": str(reason)}
        with self.stage("speed"):
            models = load_whole(source, device), load(self.directory, dtype=torch.float32).to(device)
            merge_experts(models[0])  # as transformers runs it
            rates = speed.compare_speed(*models, seed=self.recipe.seed, advance=lambda s: self.progress("speed", s))
            if is_packed(models[1]):  # in bfloat16 they have kernels
                low = speed.compare_speed(*(model.to(torch.bfloat16) for model in models), seed=self.recipe.seed)
                rates |= {f"{name} in bfloat16": run for name, run in low.items()}
        return found | {"speed": rates}


def _with_profile(recipe: Recipe) -> Recipe:
    """Returns the recipe with the settings that its profile was made with; what was asked otherwise is told.

    Texts to evaluate on are added to those of the profile.
    """
    plain = Recipe(keep=1.0)
    changed = recipe.changed(**shared_settings(Path(str(recipe.profile)).expanduser()))
    for name in SHARED:
        asked, has = getattr(recipe, name), getattr(changed, name)
        if name != "evaluation" and asked not in (has, getattr(plain, name)):
            log.warning("%s: the profile %s has %s; %s is not used", name, recipe.profile, has, asked)
    return changed.changed(evaluation=tuple(dict.fromkeys((*changed.evaluation, *recipe.evaluation))))


def _of_the_original(recipe: Recipe, before: Path) -> Recipe:
    """Returns the recipe with a size in bytes where it was a share: of the original, not of the compressed model `before`."""
    file = before / "results.json"
    if recipe.bytes is None or not file.is_file():
        return recipe
    parameters = json.loads(file.read_text())["size"]["original"]["parameters"]
    return recipe.changed(bytes=f"{parse_bytes(recipe.bytes, parameters)}B")


def _carried_on(results: dict[str, Any], before: Path) -> dict[str, Any]:
    """Returns the results of rounding a compressed model: the original, and its healing, are those of the directory `before`."""
    file = before / "results.json"
    if not file.is_file():
        return results
    old = json.loads(file.read_text())
    sizes = {**results["size"], "original": old["size"]["original"]}
    kept = {name: old[name] for name in ("blockwise", "healing") if name in old}
    if "healing" in kept:
        kept["healing"] = kept["healing"] | {"before_rounding": True}
    return kept | results | {"model": old["model"] | {"rounded_from": str(before)}, "size": sizes}
