"""From a model to a smaller one: the order of the stages, the run directory, fingerprints and resume.

A run writes into `OUT.partial` beside `OUT`: finished weight files under their final names, and in `work/` what is needed only until
the end. When all is there the directory takes the name `OUT`, in one rename; until then `OUT` is as it was. A fingerprint of the
settings and the contents of the input files says whether a later run may go on from what it finds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bondsmith.data import SELF, DataError, Windows, check_spec, read_windows, sample_windows, split_windows
from bondsmith.model.blocks import BlockRunner, matrices, shape
from bondsmith.model.checkpoint import open_compressed, shard_name, write_config, write_index, write_json, write_shard
from bondsmith.model.hub import load
from bondsmith.model.source import (
    ModelError,
    Source,
    empty,
    fill,
    load_tokenizer,
    load_whole,
    open_source,
    skeleton,
    stored_names,
)
from bondsmith.recipe import Recipe
from bondsmith.rundir import (
    FINGERPRINT,
    WORK,
    RunError,
    changes,
    fingerprint,
    log,
    logging_to,
    move_into_place,
    open_directory,
)
from bondsmith.stages import decompose, describe, moments, quality, report, speed
from bondsmith.stages.plan import Plan, uniform_plan
from bondsmith.stages.streams import Stream

Progress = Callable[[str, float], None]
FISHER_LEAST = 4096  # tokens, where there are so many
FISHER_SHARE = 6  # one calibration window in six also gives gradients: a backward pass costs four times a forward pass
_BATCH_TOKENS = 2048


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
        model: a hub id, a directory, a `.gguf` file or a loaded model (whose tokenizer is looked for at its `name_or_path`).
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
    out = Path(out).expanduser().absolute()
    for spec in (*recipe.calibration, *recipe.evaluation):
        check_spec(spec)
    directory = open_directory(out, resume, overwrite)
    with logging_to(directory / "log.txt"):
        run = _Run(directory, recipe, progress, command or _python_command(model, out, recipe))
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


@dataclass
class _Run:
    """One run in its directory; the stages in order. Once `started`, what is there is worth keeping."""

    directory: Path
    recipe: Recipe
    progress: Progress
    command: str
    started: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.directory / WORK

    def all(self, model: str | Path | PreTrainedModel, evaluate: bool) -> dict[str, Any]:
        """Runs what is not done yet; returns the results."""
        log.info("bondsmith %s: %s", describe.versions()["bondsmith"], self.command)
        with self.stage("open"):
            source = open_source(model, self.work / "source")
            runner = BlockRunner(skeleton(source.config, _device(self.recipe)))
            dtype = source.dtype if self.recipe.dtype == "auto" else getattr(torch, self.recipe.dtype)
            plan = _plan(runner, self.recipe, dtype)
            log.info("plan: %s", plan)
            _check_disk(self.directory, plan, runner, self.recipe, dtype)
            tokenizer = _tokenizer(model, source) if self.recipe.needs_moments or evaluate else None
            self.keep_fingerprint(source, evaluate)
        plan.save(self.directory / "plan.json")
        self.recipe.save(self.directory / "recipe.yaml")
        with self.stage("calibration text"):
            calibration, held_out = self.windows(source, tokenizer, evaluate)
        self.started = True
        job = self.job(source, runner, plan, calibration, dtype)
        self.fisher(job)
        with self.stage("decompose"):
            decompose.compress_rest(job)
            count = len(runner)
            decompose.compress_blocks(job, lambda k: self.progress("decompose", (k + 1) / count))
        self.finish_model(job, tokenizer)
        results = self.describe(job, calibration)
        if training := decompose.read_training(job):
            results["blockwise"] = training
        del job, runner
        if evaluate:
            results |= self.evaluate(source, held_out)
        results["seconds"] = self.seconds
        write_json(self.directory / "results.json", results)
        report.write_report(self.directory, results)
        log.info("done")
        return results

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Logs a stage and keeps its time."""
        log.info("%s ...", name)
        self.progress(name, 0.0)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1.0)
        log.info("%s: %.1f s", name, self.seconds[name])

    def keep_fingerprint(self, source: Source, evaluate: bool) -> None:
        """Writes the fingerprint, or compares it with the one found; RunError names what has changed."""
        now = fingerprint(source, self.recipe, evaluate)
        path = self.directory / FINGERPRINT
        if path.is_file():
            found = changes(json.loads(path.read_text()), now)
            if found:
                raise RunError(
                    f"{self.directory} holds an unfinished run with other settings or files ({'; '.join(found)}): "
                    "give the same ones, or --overwrite to start anew"
                )
        else:
            write_json(path, now)

    def windows(self, source: Source, tokenizer: Any, evaluate: bool) -> tuple[list[Windows], list[Windows]]:
        """Returns calibration and held-out windows; made once, then read from `work/windows.safetensors`."""
        file, notes = self.work / "windows.safetensors", self.work / "windows.json"
        if not notes.is_file():
            calibration, held_out = self.make_windows(source, tokenizer, evaluate)
            write_shard(file, {f"{i}": w.ids for i, w in enumerate([*calibration, *held_out])})
            rows = [[kind, w.spec, w.documents] for kind, ws in (("c", calibration), ("h", held_out)) for w in ws]
            write_json(notes, rows)
        ids = load_file(file)
        rows = json.loads(notes.read_text())
        found = [(kind, Windows(spec, ids[f"{i}"], documents)) for i, (kind, spec, documents) in enumerate(rows)]
        return [w for kind, w in found if kind == "c"], [w for kind, w in found if kind == "h"]

    def make_windows(self, source: Source, tokenizer: Any, evaluate: bool) -> tuple[list[Windows], list[Windows]]:
        """Reads or samples the windows of all SPECs."""
        r = self.recipe
        window = min(r.window, int(getattr(source.config, "max_position_embeddings", r.window)))
        held = r.evaluation_windows if evaluate else 0
        specs = tuple(dict.fromkeys(r.calibration)) if r.needs_moments else ()
        texts = [s for s in specs if s != SELF]
        tokens = r.tokens * len(texts) // max(1, len(specs))
        options = {"window": window, "seed": r.seed}
        calibration, held_out = split_windows(texts, tokenizer, tokens=tokens, held_out=held, **options)
        own_evaluation = [s for s in r.evaluation if s not in texts and s != SELF]
        if held:
            held_out += [read_windows(spec, tokenizer, count=held, **options) for spec in own_evaluation]
        own = -(-(r.tokens - tokens) // window) if SELF in specs else 0
        extra = held if SELF in (*specs, *r.evaluation) or (held and not held_out) else 0
        if own or extra:
            samples = self.sample(source, tokenizer, own + extra, window)
            calibration += [Windows(SELF, samples[extra:], own)] if own else []
            held_out += [Windows(SELF, samples[:extra], extra)] if extra else []
        return calibration, held_out

    def sample(self, source: Source, tokenizer: Any, count: int, window: int) -> torch.Tensor:
        """Returns windows that the original model writes itself, shuffled; the whole model is in memory meanwhile."""
        _check_memory(source, 1, "calibrating on the model's own samples", "give a text with --calibration FILE")
        model = load_whole(source, _device(self.recipe))
        samples = sample_windows(
            model,
            tokenizer,
            count=count,
            window=window,
            seed=self.recipe.seed,
            advance=lambda share: self.progress("calibration text", share),
        )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.recipe.seed))
        return samples[order]

    def job(
        self, source: Source, runner: BlockRunner, plan: Plan, calibration: list[Windows], dtype: torch.dtype
    ) -> decompose.Job:
        """Returns the compression job: embedding and head are loaded here."""
        device = _device(self.recipe)
        ids = torch.cat([w.ids for w in calibration]) if calibration else torch.zeros(0, 2, dtype=torch.int64)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.recipe.seed))
        outside = [n for n in stored_names(runner.model) if not n.startswith(runner.path + ".")]
        fill(runner.model, source.read(outside), device)
        runner.model.tie_weights()
        width = 0
        if len(ids):
            with torch.no_grad():
                width = runner.enter(ids[:1, :2].to(device)).shape[-1]
        fisher = self.work / "fisher" if self.recipe.metric == "loss" else None
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        return decompose.Job(
            runner,
            source,
            plan,
            self.recipe,
            ids[order],
            self.directory,
            self.work,
            fisher,
            batch,
            width,
            device,
            dtype,
        )

    def fisher(self, job: decompose.Job) -> None:
        """Runs forward and backward once through the original on some of the windows, for the `loss` metric."""
        if job.fisher is None or (job.work / "fisher.done").is_file():
            return
        job.fisher.mkdir(parents=True, exist_ok=True)
        windows, tokens = job.ids.shape
        ids = job.ids[: max(windows // FISHER_SHARE, -(-FISHER_LEAST // tokens))].to(job.device)
        count = len(job.runner)
        streams = [Stream(job.fisher / f"hidden-{k}", (*ids.shape, job.width)) for k in range(count + 1)]
        steps = iter(range(1, 2 * count + 2))
        with self.stage("gradients"):

            def advance() -> None:
                self.progress("gradients", next(steps) / (2 * count + 1))

            def load(k: int) -> torch.nn.Module:
                for other in range(count):
                    empty(job.runner.blocks[other])
                return job.load(k)

            moments.block_inputs(job.runner, load, ids, streams, job.batch, advance)
            moments.output_moments(
                job.runner, load, ids, streams, job.fisher, batch=job.batch, seed=self.recipe.seed, advance=advance
            )
        write_json(job.work / "fisher.done", True)
        for stream in streams:
            stream.remove()

    def finish_model(self, job: decompose.Job, tokenizer: Any) -> None:
        """Writes tokenizer, index and configuration: with them the directory is a model."""
        if tokenizer is not None:
            tokenizer.save_pretrained(self.directory)
        count = len(job.runner) + 1
        write_index(self.directory, [shard_name(i, count) for i in range(count)])
        networks = {m.name: _network(m.to_json()) for m in job.plan.matrices if m.sites is not None}
        write_config(self.directory, job.source, networks, job.dtype)

    def describe(self, job: decompose.Job, calibration: list[Windows]) -> dict[str, Any]:
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

    def evaluate(self, source: Source, held_out: Sequence[Windows]) -> dict[str, Any]:
        """Returns quality on held-out text and speed, measured on the model as it was written, read back."""
        device = _device(self.recipe)
        compressed = open_compressed(self.directory)
        with self.stage("quality"):
            rows = quality.compare(source, compressed, held_out, device, lambda s: self.progress("quality", s))
        try:
            _check_memory(source, 2, "measuring speed", "measure it on a larger machine")
        except RunError as reason:
            return {"quality": rows, "speed_skipped": str(reason)}
        with self.stage("speed"):
            models = load_whole(source, device), load(self.directory, dtype=torch.float32).to(device)
            rates = speed.compare_speed(*models, seed=self.recipe.seed, advance=lambda s: self.progress("speed", s))
        return {"quality": rows, "speed": rates}


def _plan(runner: BlockRunner, recipe: Recipe, dtype: torch.dtype) -> Plan:
    shapes = {
        f"{runner.path}.{k}.{name}": (k, *shape(matrix))
        for k, block in enumerate(runner.blocks)
        for name, matrix in matrices(block).items()
    }
    state = runner.model.state_dict()
    total = sum(state[name].numel() for name in stored_names(runner.model))
    return uniform_plan(shapes, total - sum(o * i for _, o, i in shapes.values()), recipe, dtype.itemsize)


def _network(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("sites", "bonds", "gauge")}


def _tokenizer(model: str | Path | PreTrainedModel, source: Source) -> Any:
    if isinstance(model, PreTrainedModel):
        return load_tokenizer(Path(str(model.name_or_path)))
    return load_tokenizer(source.path)


def _device(recipe: Recipe) -> torch.device:
    if recipe.device != "auto":
        return torch.device(recipe.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_disk(directory: Path, plan: Plan, runner: BlockRunner, recipe: Recipe, dtype: torch.dtype) -> None:
    width = runner.model.get_input_embeddings().weight.shape[1]
    boundaries = 4 + (len(runner) / FISHER_SHARE if recipe.metric == "loss" else 0)
    outputs = sum(m.out_features**2 for m in plan.matrices) * 4 if recipe.metric == "loss" else 0
    inputs = max(sum(m.in_features for m in plan.block(k)) for k in range(len(runner))) if recipe.needs_moments else 0
    hidden = recipe.tokens * 4 * (width * boundaries + inputs) if recipe.needs_moments else 0
    needed = int(plan.bytes(dtype.itemsize) + hidden + outputs)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise RunError(
            f"{directory}: about {needed / 1e6:.1f} MB are needed until the end (weights {plan.bytes(dtype.itemsize) / 1e6:.1f}, "
            f"hidden states {hidden / 1e6:.1f}, gradients {outputs / 1e6:.1f}), {free / 1e6:.1f} MB are free: make room, "
            "choose another --out or fewer --tokens"
        )


def _check_memory(source: Source, copies: int, purpose: str, remedy: str) -> None:
    files = {file for file, _ in source.places.values()}  # of a GGUF file: the rewritten copy
    parameters = sum(file.stat().st_size for file in files) / source.dtype.itemsize
    needed = copies * 4 * parameters
    free = psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RunError(
            f"{purpose} needs the whole model in memory ({needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free): {remedy}"
        )


def _python_command(model: str | Path | PreTrainedModel, out: Path, recipe: Recipe) -> str:
    name = type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)
    changed = {
        k: v for k, v in recipe.to_dict().items() if k in ("keep", "bytes") or v != Recipe(keep=1.0).to_dict()[k]
    }
    given = ", ".join(f"{k}={v!r}" for k, v in changed.items() if v is not None)
    return f"bondsmith.compress({name!r}, {str(out)!r}, {given})"
