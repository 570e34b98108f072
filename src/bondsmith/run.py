"""A run over a model, as far as compressing and profiling go together: opened model, windows of text, gradients, profile, plan.

Everything lies in a directory; each step finds what an earlier run left there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from bondsmith.data import SELF, Windows, read_windows, sample_windows, save_windows, saved_windows, split_windows
from bondsmith.limits import check_memory, device_of, settled_metric
from bondsmith.model.blocks import BlockRunner, fused_experts, weight
from bondsmith.model.checkpoint import open_model, write_json
from bondsmith.model.skeleton import empty, fill, skeleton, stored_names
from bondsmith.model.source import Source, load_whole, tokenizer_of
from bondsmith.nn.experts import token_shares
from bondsmith.recipe import Recipe
from bondsmith.rundir import FINGERPRINT, WORK, RunError, changes, fingerprint, log
from bondsmith.stages import moment_files
from bondsmith.stages.estimate import gradient_windows
from bondsmith.stages.fast_profile import Seen, fast_profile, table_profile
from bondsmith.stages.fitting import LEAST_DAMPING
from bondsmith.stages.gradients import collect_moments
from bondsmith.stages.job import Job
from bondsmith.stages.matrix_plan import MatrixPlan, PlanError
from bondsmith.stages.plan import Plan
from bondsmith.stages.planning import planned
from bondsmith.stages.probe import measure_probes
from bondsmith.stages.profile import Profile, TableProfile
from bondsmith.stages.scaling import parts, probe_of, scaled
from bondsmith.stages.shapes import model_shapes, table_plans
from bondsmith.stages.uniform import uniform_plan

Progress = Callable[[str, float], None]
_BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that is open and whose shapes are known; no weight has been read.

    Attributes:
        dtype: of the saved weights.
        shapes: matrix name -> (block, out features, in features), in depth order.
        other_parameters: stored scalars outside these matrices.
        tables: embedding, and head where it is not tied, as they would be if kept as they are.
        shares: of the tokens that reach a matrix, where it is not all.
        tokenizer: None where no text is needed.
    """

    source: Source
    runner: BlockRunner
    dtype: torch.dtype
    shapes: dict[str, tuple[int, int, int]]
    other_parameters: int
    tables: tuple[MatrixPlan, ...]
    shares: dict[str, float]
    tokenizer: Any


@dataclass
class Run:
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

    def open(self, model: str | Path | PreTrainedModel, text: bool) -> Opened:
        """Returns the model, opened; `text` says whether a tokenizer is needed."""
        source = open_model(model, self.work / "source")
        runner = BlockRunner(skeleton(source.config, device_of(self.recipe)))
        dtype = source.dtype if self.recipe.dtype == "auto" else getattr(torch, self.recipe.dtype)
        shapes, other = model_shapes(runner)
        fused_experts(runner.model, source.name)
        tokenizer = tokenizer_of(model, source) if text else None
        shares = token_shares(runner.model)
        return Opened(source, runner, dtype, shapes, other, table_plans(runner), shares, tokenizer)

    def settle_metric(self, opened: Opened) -> None:
        """Makes `auto` one of the metrics: loss where a pass back through a block fits into memory, input otherwise, with a warning.

        An interrupted run keeps the metric that it had. RunError where the loss metric is asked for by name and does not fit.
        """
        if self.recipe.metric not in ("auto", "loss"):
            return
        known = self.directory / "recipe.yaml"
        if known.is_file() and self.recipe.metric == "auto":
            self.recipe = self.recipe.changed(metric=yaml.safe_load(known.read_text())["metric"])
            return
        lost = "plans then rank matrices by their relative errors, not by nats, and predict no loss"
        self.recipe = self.recipe.changed(metric=settled_metric(opened.shapes, opened.tables, self.recipe, lost))

    def first_plan(self, opened: Opened) -> Plan:
        """Returns the plan if it needs no profile; otherwise, from the shapes alone, one that shows that the budgets can be met."""
        shapes, other, itemsize = opened.shapes, opened.other_parameters, opened.dtype.itemsize
        if self.recipe.plan is not None:
            plan = Plan.load(Path(self.recipe.plan).expanduser())
            plan.check(shapes, other, {t.name: (t.out_features, t.in_features) for t in opened.tables})
            plan = replace(plan, itemsize=itemsize).with_shares(opened.shares)
            if plan.drops_channels and not self.recipe.needs_moments:
                raise PlanError(
                    "plan: it drops hidden channels, which the frobenius metric cannot; use metric loss or input"
                )
            return plan
        tables = opened.tables if self.recipe.rounds else ()
        if self.recipe.planned:
            blank = tuple(TableProfile(t.name, t.out_features, t.in_features) for t in tables)
            return planned(replace(Profile.blank(shapes, other, itemsize, blank), shares=opened.shares), self.recipe)
        return uniform_plan(shapes, other, self.recipe, itemsize, tables).with_shares(opened.shares)

    def plan(self, opened: Opened, job: Job, first: Plan) -> Plan:
        """Returns the plan to carry out: `first`, or the one that the profile of the model leads to."""
        path = self.directory / "plan.json"
        if self.recipe.plan is not None or not self.recipe.planned:
            first.save(path)
            return first
        if not path.is_file():
            with self.stage("profile"):
                profile = self.profile(opened, job)
            with self.stage("plan"):
                found = planned(profile, self.recipe)
            found.save(path)
        return replace(Plan.load(path), itemsize=opened.dtype.itemsize)

    def profile(self, opened: Opened, job: Job) -> Profile:
        """Returns the fast profile of all matrices, from the moments that the gradients stage left."""
        folder = self.work / "profile"
        if (folder / "profile.json").is_file():  # maybe taken over from a run that saves in another dtype
            return replace(Profile.load(folder), itemsize=opened.dtype.itemsize)
        path, metric = opened.runner.path, self.recipe.metric

        def seen(k: int) -> Seen:
            for other in range(len(opened.runner)):
                empty(opened.runner.blocks[other])
            job.load(k)
            if metric == "frobenius":
                return Seen({}, {})
            prefix, folder = f"{path}.{k}.", self.gradients_folder
            C = _named(moment_files.load_input_moments(folder, k), prefix)
            bonds = [b.inside(prefix) for b in moment_files.load_hidden_bonds(folder, k)]
            if metric != "loss":
                return Seen(C, {}, bonds)
            B, left = moment_files.load_output_moments(folder, k), moment_files.load_shares_left(folder, k)
            return Seen(C, _named(B, prefix), bonds, _named(left, prefix))

        curves, bonds = fast_profile(
            opened.shapes,
            lambda name: weight(opened.runner.model.get_submodule(name)),
            seen,
            metric=metric,
            damping=min(self.recipe.damping, LEAST_DAMPING),
            advance=lambda share: self.progress("profile", share),
        )
        for other in range(len(opened.runner)):
            empty(opened.runner.blocks[other])
        itemsize, other_parameters = opened.dtype.itemsize, opened.other_parameters
        tokens = self.gradient_ids(job).numel() if metric != "frobenius" else 0
        tables = self.tables(opened, job)
        name, shares = opened.source.name, opened.shares
        profile = Profile(name, itemsize, other_parameters, metric, tokens, curves, bonds, tables, shares)
        if self.recipe.probe_windows and metric == "loss":
            profile = self.scaled(opened, job, profile)
        profile.save(folder)
        return profile

    def scaled(self, opened: Opened, job: Job, profile: Profile) -> Profile:
        """Returns the profile with its scale corrected by measured probes."""

        def seen(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            block = opened.shapes[name][0]
            inside = name.removeprefix(f"{opened.runner.path}.{block}.")
            folder = self.gradients_folder
            C, B = moment_files.load_input_moments(folder, block), moment_files.load_output_moments(folder, block)
            return C[inside], B[inside]

        with self.stage("probes"):
            found = parts(profile)
            results = measure_probes(
                opened.source,
                opened.runner,
                job.ids[: self.recipe.probe_windows],
                [probe_of(part, seen, self.recipe.damping) for part in found],
                self.work / "probes",
                job.device,
                lambda share: self.progress("probes", share),
            )
            for part, result in zip(found, results, strict=True):
                log.info(
                    "probe %s at bond %d: %.5f predicted, %.5f measured",
                    part.probed,
                    part.bond,
                    part.predicted,
                    result.kl,
                )
        return scaled(profile, found, results)

    def tables(self, opened: Opened, job: Job) -> tuple[TableProfile, ...]:
        """Returns embedding and head with the predicted loss of rounding them."""
        seen = None
        if self.recipe.metric == "loss":
            seen = moment_files.load_table_moments(self.gradients_folder, self.gradient_ids(job))
        tied = len(opened.tables) == 1
        found = []
        for i, table in enumerate(opened.tables):
            W = weight(opened.runner.model.get_submodule(table.name))
            found.append(table_profile(table.name, W, seen, embeds=i == 0, predicts=tied or i == 1))
        return tuple(found)

    @property
    def gradients_folder(self) -> Path:
        """Where the moments of the gradients stage lie."""
        return self.work / "fisher"

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
        if not (self.work / "windows.json").is_file():
            save_windows(self.work, *self.make_windows(source, tokenizer, evaluate))
        calibration, held_out = saved_windows(self.work)
        known = {w.spec for w in held_out}
        if more := [s for s in self._apart() if s not in known] if evaluate else []:  # than the profile has
            held_out += self._windows_apart(source, tokenizer, more)
            save_windows(self.work, calibration, held_out)
        return calibration, held_out

    def _apart(self) -> list[str]:
        """Returns the SPECs that are evaluated on and not calibrated on."""
        texts = {s for s in self.recipe.calibration if self.recipe.needs_moments}
        return [s for s in self.recipe.evaluation if s not in texts]

    def _windows_apart(self, source: Source, tokenizer: Any, specs: list[str]) -> list[Windows]:
        count, window, seed = self.recipe.evaluation_windows, self._window(source), self.recipe.seed
        return [
            Windows(SELF, self.sample(source, tokenizer, count, window), count)
            if spec == SELF
            else read_windows(spec, tokenizer, count=count, window=window, seed=seed)
            for spec in specs
        ]

    def _window(self, source: Source) -> int:
        return min(self.recipe.window, int(getattr(source.config, "max_position_embeddings", self.recipe.window)))

    def make_windows(self, source: Source, tokenizer: Any, evaluate: bool) -> tuple[list[Windows], list[Windows]]:
        """Reads or samples the windows of all SPECs."""
        r = self.recipe
        window = self._window(source)
        held = r.evaluation_windows if evaluate else 0
        specs = tuple(dict.fromkeys(r.calibration)) if r.needs_moments else ()
        texts = [s for s in specs if s != SELF]
        tokens = r.tokens * len(texts) // max(1, len(specs))
        calibration, held_out = split_windows(
            texts, tokenizer, tokens=tokens, held_out=held, window=window, seed=r.seed
        )
        if held:
            held_out += self._windows_apart(source, tokenizer, [s for s in self._apart() if s != SELF])
        own = -(-(r.tokens - tokens) // window) if SELF in specs else 0
        extra = held if SELF in (*specs, *r.evaluation) or (held and not held_out) else 0
        if own or extra:
            samples = self.sample(source, tokenizer, own + extra, window)
            calibration += [Windows(SELF, samples[extra:], own)] if own else []
            held_out += [Windows(SELF, samples[:extra], extra)] if extra else []
        return calibration, held_out

    def sample(self, source: Source, tokenizer: Any, count: int, window: int) -> torch.Tensor:
        """Returns windows that the original model writes itself, shuffled; the whole model is in memory meanwhile."""
        check_memory(source, 1, "calibrating on the model's own samples", "give a text with --calibration FILE")
        model = load_whole(source, device_of(self.recipe))
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
    ) -> Job:
        """Returns the compression job: embedding and head are loaded here."""
        device = device_of(self.recipe)
        ids = torch.cat([w.ids for w in calibration]) if calibration else torch.zeros(0, 2, dtype=torch.int64)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.recipe.seed))
        outside = [n for n in stored_names(runner.model) if not n.startswith(runner.path + ".")]
        fill(runner.model, source.read(outside), device)
        runner.model.tie_weights()
        width = 0
        if len(ids):
            with torch.no_grad():
                width = runner.enter(ids[:1, :2].to(device)).shape[-1]
        fisher = self.gradients_folder if self.recipe.metric == "loss" else None
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        return Job(
            runner,
            source,
            plan,
            self.recipe,
            ids[order],
            self.directory,
            self.work,
            fisher,
            self.gradients_folder,
            batch,
            width,
            device,
            dtype,
        )

    def gradient_ids(self, job: Job) -> torch.Tensor:
        """Returns the windows that give gradients."""
        return job.ids[: gradient_windows(self.recipe, *job.ids.shape)].to(job.device)

    def gradients(self, job: Job, hybrids: bool) -> None:
        """Runs forward and backward once through the original on some of the windows, where fit or plan ask for it.

        Args:
            hybrids: a plan may want to know what a network beside a rounded matrix is worth.
        """
        plans = self.recipe.planned or job.plan.drops_channels
        back = self.recipe.metric == "loss"
        wanted = back or (plans and self.recipe.needs_moments)
        if not wanted or (job.work / "fisher.done").is_file():
            return
        folder = self.gradients_folder
        folder.mkdir(parents=True, exist_ok=True)
        ids = self.gradient_ids(job)
        count = len(job.runner)
        with self.stage("gradients"):

            def load(blocks: range) -> list[torch.nn.Module]:
                for other in range(count):
                    if other not in blocks:
                        empty(job.runner.blocks[other])
                return [job.load(k) for k in blocks]

            collect_moments(
                job.runner,
                load,
                ids,
                folder,
                batch=job.batch,
                blocks=count,
                seed=self.recipe.seed if back else None,
                hybrids=hybrids,
                progress=partial(self.progress, "gradients"),
            )
        write_json(job.work / "fisher.done", True)
        for path in (*folder.glob("hidden-*"), *folder.glob("gradient-*")):
            path.unlink()


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
