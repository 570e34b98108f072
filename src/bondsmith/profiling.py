"""The layer profile of a model from beginning to end: text, moments, cuts, probes, benchmark tasks, the page.

What is finished is kept matrix by matrix in `DIR/profile-layers.json`; hidden states and moments wait in `DIR/work-layers`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bondsmith.data import SELF, Windows, check_spec, read_windows, sample_windows, split_windows
from bondsmith.limits import settled_metric
from bondsmith.model.blocks import BlockRunner, matrices
from bondsmith.model.skeleton import empty, fill, skeleton, stored_names
from bondsmith.model.source import ModelError, file_digest, load_tokenizer, load_whole, open_source
from bondsmith.recipe import Recipe
from bondsmith.rundir import RunError
from bondsmith.stages import describe, moment_files
from bondsmith.stages.gradients import collect_moments
from bondsmith.stages.layer_settings import LayerSettings as LayerSettings
from bondsmith.stages.matrix_plan import MatrixPlan
from bondsmith.stages.probe import Probe, measure_probes
from bondsmith.stages.profile_layers import (
    FILE,
    LayerPoint,
    LayerProfile,
    Score,
    Variants,
    cut,
    default_blocks,
    plan_points,
)
from bondsmith.stages.profile_page import layer_sections, write_page
from bondsmith.stages.shapes import model_shapes, table_plans
from bondsmith.tensor.mpo import MPO

Progress = Callable[[str, float], None]
WORK = "work-layers"
PAGE = "profile-layers.html"
_BATCH_TOKENS = 2048


def profile_layers(
    model: str | Path,
    out: str | Path,
    settings: LayerSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = lambda stage, share: None,
    **changes: Any,
) -> LayerProfile:
    """Returns the layer profile of `model`; `out` holds `profile-layers.json` and `profile-layers.html` afterwards.

    Args:
        model: a hub id, a directory or a `.gguf` file.
        settings: or give them as keywords, `profile_layers(model, out, blocks=[0, 15], metric="input")`.
        resume: go on with what an interrupted run with the same settings left in `out`.
        overwrite: start anew.

    Raises:
        ModelError, DataError, RecipeError, PlanError, RunError, TaskError: before any long work.
    """
    settings = replace(settings or LayerSettings(), **changes)
    out = Path(out).expanduser().absolute()
    for spec in (*settings.calibration, *settings.evaluation):
        check_spec(spec)
    if settings.tasks:
        from bondsmith.stages.benchmark import check_tasks

        check_tasks(settings.tasks, Path(settings.data) if settings.data else None, limit=settings.limit)
    before = _find(out, resume, overwrite)
    run = _Run(str(model), out, settings, progress)
    done = run.all(before, command or f"bondsmith.profiling.profile_layers({str(model)!r}, {str(out)!r}, ...)")
    shown = Path(done.model).name if Path(done.model).exists() else done.model
    write_page(out / PAGE, f"{shown}: layer profile", layer_sections(done), _notes(done))
    shutil.rmtree(out / WORK, ignore_errors=True)
    return done


def _find(out: Path, resume: bool, overwrite: bool) -> LayerProfile | None:
    """Returns the profile to go on with, or None; RunError where one is in the way."""
    if out.is_file():
        raise RunError(f"{out} is a file: give a directory")
    if overwrite:
        (out / FILE).unlink(missing_ok=True)
        shutil.rmtree(out / WORK, ignore_errors=True)
    if not (out / FILE).is_file():
        return None
    if not resume:
        raise RunError(f"{out} holds a layer profile already: --resume goes on with it, --overwrite starts anew")
    return LayerProfile.load(out)


def _notes(profile: LayerProfile) -> dict[str, str]:
    run, machine = profile.run, profile.run["machine"]
    return {
        "command": run["command"],
        "text": ", ".join(f"{t['spec']} ({t['tokens']:,} tokens)" for t in run["texts"]),
        "machine": f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used",
        "versions": ", ".join(f"{k} {v}" for k, v in run["versions"].items()),
    }


@dataclass
class _Run:
    """One run; the stages in order."""

    name: str
    out: Path
    settings: LayerSettings
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.out / WORK

    def all(self, before: LayerProfile | None, command: str) -> LayerProfile:
        """Runs what is not done yet; returns the whole profile."""
        s = self.settings
        self.work.mkdir(parents=True, exist_ok=True)
        with self.stage("open"):
            self.source = open_source(self.name, self.work / "source")
            self.device = torch.device(
                s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            )
            self.runner = self._runner()
            s = self.settings = self.settled(before)
            blocks = s.blocks or default_blocks(len(self.runner))
            points = plan_points(self.runner, blocks, s.keeps, s.sites, s.gauge)
            self.tokenizer = load_tokenizer(self.source.path)
        with self.stage("text"):
            calibration, scored = self.windows()
        self.ids = torch.cat([w.ids for w in scored])
        profile = self._begin(before, command, len(points), calibration, scored)
        if profile.complete:
            return profile
        todo = points[len(profile.points) :]
        self.moments(torch.cat([w.ids for w in calibration]) if calibration else None, {p.block for _, p in todo})
        with self.stage("probes"):
            for block, members in groupby(todo, key=lambda point: point[1].block):
                for found in self._block(block, list(members)):
                    profile = profile.with_points(found)
                    profile.save(self.out)
                    self.progress("probes", len(profile.points) / profile.planned)
        profile = replace(profile, run={**profile.run, "seconds": self.seconds})
        profile.save(self.out)
        return profile

    def settled(self, before: LayerProfile | None) -> LayerSettings:
        """Returns the settings with a metric in the place of `auto`: that of the profile gone on with, or what memory allows."""
        s = self.settings
        if s.metric not in ("auto", "loss"):
            return s
        if before is not None and s.metric == "auto":
            return replace(s, metric=before.settings["metric"])
        recipe = Recipe(keep=1.0, metric=s.metric, window=s.window, tokens=s.tokens, device=s.device)
        lost = "networks then minimise the error of outputs, not nats"
        return replace(s, metric=settled_metric(model_shapes(self.runner)[0], table_plans(self.runner), recipe, lost))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells of a stage and keeps its time."""
        self.progress(name, 0.0)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.progress(name, 1.0)

    def _runner(self) -> BlockRunner:
        """Returns the model, in memory where it takes at most half of what is free; benchmark tasks and samples need it there."""
        model = skeleton(self.source.config, self.device)
        state = model.state_dict()
        needed, free = 4 * sum(state[n].numel() for n in stored_names(model)), psutil.virtual_memory().available
        self.whole = needed <= 0.5 * free
        needs = [
            *self.settings.tasks[:1],
            *[x for x in (*self.settings.calibration, *self.settings.evaluation) if x == SELF],
        ]
        if not self.whole and needs:
            raise RunError(
                f"{needs[0]!r} needs the whole model in memory ({needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free, half of it "
                "is used): give --calibration FILE and no tasks, or use a larger machine"
            )
        return BlockRunner(load_whole(self.source, self.device) if self.whole else model)

    def windows(self) -> tuple[list[Windows], list[Windows]]:
        """Returns calibration and scored windows, of different documents; `self` means samples of the model."""
        s = self.settings
        specs = tuple(dict.fromkeys(s.calibration)) if s.metric != "frobenius" else ()
        apart = tuple(dict.fromkeys(s.evaluation)) or specs or (SELF,)
        tokens, share = -(-s.tokens // max(1, len(specs))), -(-s.windows // len(apart))
        calibration: list[Windows] = []
        scored: list[Windows] = []
        for spec in dict.fromkeys((*specs, *apart)):
            held = share if spec in apart else 0
            if spec == SELF:
                own = -(-tokens // s.window) if spec in specs else 0
                ids = self._sample(own + held)
                both = [Windows(SELF, ids[held:], own)], [Windows(SELF, ids[:held], held)]
            elif spec in specs:
                options = {"tokens": max(tokens, s.window), "held_out": held, "window": s.window, "seed": s.seed}
                both = split_windows([spec], self.tokenizer, **options)
            else:
                both = [], [read_windows(spec, self.tokenizer, count=held, window=s.window, seed=s.seed)]
            calibration += [w for w in both[0] if len(w.ids)]
            scored += [w for w in both[1] if len(w.ids)]
        return calibration, scored

    def _sample(self, count: int) -> Tensor:
        """Returns windows that the model writes itself, shuffled."""
        seed, draw = self.settings.seed, partial(self.progress, "text")
        shared = {"count": count, "window": self.settings.window, "seed": seed}
        ids = sample_windows(self.runner.model, self.tokenizer, advance=draw, **shared)
        return ids[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]

    def _begin(
        self, before: LayerProfile | None, command: str, planned: int, calibration: list[Windows], scored: list[Windows]
    ) -> LayerProfile:
        """Returns the profile without points, or the one found; RunError where its settings or files are others."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        files = {f.name: file_digest(f) for f in self.source.files}
        texts = [w.describe() for w in scored]
        if before is not None:
            now = {"settings": settings, "files": files, "texts": [t["sha256"] for t in texts]}
            old = {
                "settings": dict(before.settings),
                "files": before.run["files"],
                "texts": [t["sha256"] for t in before.run["texts"]],
            }
            for what in now:
                if now[what] != old[what]:
                    raise RunError(
                        f"{self.out / FILE} was measured with other {what}{_difference(old[what], now[what])}: "
                        "give the same ones to go on with it, or --overwrite to start anew"
                    )
            return before
        with self.stage("original"):
            baseline = self._baseline()
        run = {
            "command": command,
            "versions": describe.versions(),
            "machine": describe.machine(),
            "files": files,
            "calibration": [w.describe() for w in calibration],
            "texts": texts,
        }
        profile = LayerProfile(self.name, settings, run, baseline, planned)
        profile.save(self.out)
        return profile

    def _baseline(self) -> dict[str, Any]:
        """Returns the original's perplexity on the scored windows and its benchmark scores."""
        last = len(self.runner) - 1
        inside = list(matrices(self.runner.blocks[last]))[-1]
        (own,) = self._measure([Probe(f"{self.runner.path}.{last}.{inside}", lambda W: W)])
        scores = self._score({"original": self.runner.model})["original"] if self.settings.tasks else []
        facts = {"perplexity": own.perplexity, "windows": own.windows, "tokens": own.tokens}
        return facts | {"scores": [asdict(s) for s in scores]}

    def moments(self, ids: Tensor | None, blocks: set[int]) -> None:
        """Sets `self.C` and `self.B`: functions from a block to moments by matrix name inside it."""
        nothing: Callable[[int], Mapping[str, Tensor]] = lambda k: {}  # noqa: E731
        self.C = self.B = nothing
        if ids is None:
            return
        ids = ids.to(self.device)
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        folder = self.work / "moments"
        folder.mkdir(exist_ok=True)
        self._fill_outside()
        loss = self.settings.metric == "loss"
        with self.stage("moments"):
            collect_moments(
                self.runner,
                self._load,
                ids,
                folder,
                batch=batch,
                blocks=max(blocks) + 1,
                seed=self.settings.seed if loss else None,
                progress=partial(self.progress, "moments"),
            )
            if loss:
                self.B = partial(moment_files.load_output_moments, folder)
            self.C = partial(moment_files.load_input_moments, folder)

    def _block(self, k: int, points: list[tuple[float, MatrixPlan]]) -> Iterator[list[LayerPoint]]:
        """Yields the points of block k: matrix by matrix where the model is in memory, else all at once, to load blocks once only."""
        self._load(range(k, k + 1))
        C, B = self.C(k), self.B(k)
        prefix = f"{self.runner.path}.{k}."
        ready: list[_Cut] = []
        for name, members in groupby(points, key=lambda point: point[1].name):
            inside = name.removeprefix(prefix)
            matrix = self.runner.model.get_submodule(name)
            if self.settings.metric != "frobenius" and inside not in C:
                raise ModelError(
                    f"{name}: no calibration token reached this matrix; calibrate on more or other text, or profile with "
                    "--metric frobenius"
                )
            for keep, plan in members:
                ready.append((keep, plan, *cut(matrix, plan, C.get(inside), B.get(inside), self.settings.damping)))
            if self.whole:
                yield self._points(ready)
                ready = []
        if ready:
            empty(self.runner.blocks[k])
            yield self._points(ready)

    def _points(self, ready: Sequence[_Cut]) -> list[LayerPoint]:
        results = self._measure([Probe(p.name, partial(_matrix, mpo), str(p.bonds)) for _, p, mpo, _ in ready])
        scores: dict[str, list[Score]] = {}
        if self.settings.tasks:
            plan = ready[0][1]
            weights = {str(p.bonds): mpo.to_matrix() for _, p, mpo, _ in ready}
            folder = self.work / f"tasks-{plan.block}"
            folder.mkdir(exist_ok=True)
            with (
                Variants.of(self.runner.model, plan.name, weights) as variants,
                self.runner.resuming(plan.block, folder),
            ):
                scores = self._score(variants)
        return [
            LayerPoint(plan, keep, error, result, tuple(scores.get(str(plan.bonds), ())))
            for (keep, plan, _, error), result in zip(ready, results, strict=True)
        ]

    def _measure(self, probes: list[Probe]) -> list[Any]:
        return measure_probes(self.source, self.runner, self.ids, probes, self.work, self.device)

    def _score(self, models: Mapping[str, Any]) -> dict[str, list[Score]]:
        from bondsmith.stages.benchmark import run_tasks

        s = self.settings
        data = Path(s.data) if s.data else None
        rows = run_tasks(
            models, self.tokenizer, s.tasks, data=data, limit=s.limit, batch_size=s.batch_size, seed=s.seed
        )
        scores: dict[str, list[Score]] = {}
        for row in rows:
            scores.setdefault(row.model, []).append(Score(row.task, row.metric, row.rows, row.score, row.stderr))
        return scores

    def _load(self, wanted: range) -> list[nn.Module]:
        """Returns some blocks with their weights; where the model is not in memory, the others give theirs back."""
        blocks = list(self.runner.blocks)
        if not self.whole:
            for k, block in enumerate(blocks):
                if k not in wanted:
                    empty(block)
            for k in wanted:
                prefix = f"{self.runner.path}.{k}."
                names = [n for n in self.source.places if n.startswith(prefix)]
                fill(blocks[k], {n.removeprefix(prefix): t for n, t in self.source.read(names).items()}, self.device)
        return [blocks[k] for k in wanted]

    def _fill_outside(self) -> None:
        if not self.whole:
            model = self.runner.model
            names = [n for n in stored_names(model) if not n.startswith(self.runner.path + ".")]
            fill(model, self.source.read(names), self.device)
            model.tie_weights()


_Cut = tuple[float, MatrixPlan, MPO, float]  # keep, network planned, network, relative error


def _matrix(mpo: MPO, W: Tensor) -> Tensor:
    return mpo.to_matrix()


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict):
        return ""
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return " (" + "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in keys) + ")"
