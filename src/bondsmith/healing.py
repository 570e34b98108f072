"""Global distillation of a compressed directory: the order of what happens, in one process or in those of `torchrun`.

As in a compression, everything goes on in `OUT.partial` (`DIR.partial` where the directory is healed in place); the weight files of the
healed model are written at the end and the directory takes its name in one rename. Until then `DIR` is as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bondsmith.data import check_spec
from bondsmith.model.blocks import BlockRunner
from bondsmith.model.checkpoint import open_compressed, write_json
from bondsmith.model.hub import FORMAT, load
from bondsmith.model.skeleton import skeleton
from bondsmith.model.source import ModelError, Source, file_digest, load_tokenizer, load_whole
from bondsmith.nn.free import free_all
from bondsmith.nn.simulated import simulate_rounding
from bondsmith.recipe import grid_of
from bondsmith.rundir import (
    FINGERPRINT,
    LOG,
    WORK,
    RunError,
    changes,
    log,
    logging_to,
    move_into_place,
    open_directory,
    restore,
)
from bondsmith.stages.healing import output
from bondsmith.stages.healing.loop import Loop, Moment, Teacher
from bondsmith.stages.healing.ranks import Ranks, joined
from bondsmith.stages.healing.record import finished, record
from bondsmith.stages.healing.samples import Samples, join, read_samples
from bondsmith.stages.healing.settings import HealError, HealSettings
from bondsmith.stages.healing.shard import compute_again, keeps_apart, shard
from bondsmith.stages.healing.state import States
from bondsmith.stages.healing.teacher import Cache, ask, check_vocabulary, open_original, original_of
from bondsmith.stages.training import Steps, reduced_matrices, train_scales_inside, trainable

_OFTEN = 5.0
Progress = Callable[[str, float], None]
Tell = Callable[[Moment], None]


@dataclass(frozen=True)
class Healed:
    """A finished healing: where the model lies, and the section `healing` of its `results.json`."""

    path: Path
    healing: dict[str, Any]

    def load(self, **options: Any) -> PreTrainedModel:
        """Returns the model; options go to `from_pretrained`."""
        return load(self.path, **options)

    def __str__(self) -> str:
        lines = [
            f"step {e['step']:>6}  {e['tokens']:>9,} tokens  "
            + (f"KL {e['kl']:.4f}  " if "kl" in e else "")
            + f"perplexity {e['perplexity']:.3f}"
            for e in self.healing["curve"]
        ]
        return "\n".join([*lines, f"kept: step {self.healing['best_step']}"])


def heal(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    teacher: str | Path | bool = True,
    cache: str | Path | None = None,
    resume: bool = False,
    finish: bool = False,
    overwrite: bool = False,
    evaluate: bool = True,
    command: str | None = None,
    progress: Progress = lambda stage, share: None,
    tell: Tell = lambda moment: None,
    **settings: Any,
) -> Healed:
    """Trains the networks and norms of a compressed directory to predict what the original predicts; returns where the result is.

    Args:
        directory: what `bondsmith compress` wrote.
        out: where the healed model goes; without it, in the place of `directory`.
        teacher: the original (hub id, directory or GGUF file); True takes the one that `directory` names, False trains on the text alone.
        cache: directory of the original's predictions, to be shared by several healings; without it they are deleted at the end.
        resume: go on from the last checkpoint of an interrupted healing with the same settings; one that came to its end is left as
            it is.
        finish: write the best state of an interrupted healing, without training on.
        overwrite: replace what is in `out`, and drop what an interrupted run left.
        evaluate: measure quality on held-out text anew.
        progress: is called with the name of a stage and the share of it that is done.
        tell: is called after every step.
        settings: see `bondsmith.stages.healing.settings.HealSettings`: `data`, `tokens`, `learning_rate`, ...

    Raises:
        HealError, ModelError, DataError, RunError: before any long work; HealError also when the loss is no number.
        DiskFullError: later; what is done is kept for `resume`.
    """
    chosen = HealSettings.from_settings(settings)
    home = Path(directory).expanduser().absolute()
    place = home if out is None else Path(out).expanduser().absolute()
    for spec in (*chosen.data, *chosen.evaluation):
        check_spec(spec)
    with joined(chosen.device) as ranks:
        if ranks.main:
            restore(home)
            restore(place)
        ranks.wait()
        if (resume or finish) and (healing := finished(place, chosen)):
            log.info("%s was healed with these settings to the end: nothing is left to do", place)
            return Healed(place, healing)
        source = open_compressed(home)
        partial_place = place.with_name(place.name + ".partial")
        if ranks.main:
            open_directory(place, resume or finish, overwrite, replaces=place == home)
        ranks.wait()
        run = _Run(source, partial_place, chosen, ranks, teacher, command or chosen.call(directory, out, teacher))
        run.progress, run.tell = (progress, tell) if ranks.main else (run.progress, run.tell)
        run.cache = Path(cache).expanduser().absolute() if cache else partial_place / WORK
        if ranks.main and (home / LOG).is_file() and not (partial_place / LOG).exists():
            shutil.copyfile(home / LOG, partial_place / LOG)  # the healing's goes on from it
        with logging_to(partial_place / LOG) if ranks.main else nullcontext():
            healing = run.guarded(finish, evaluate)
        if ranks.main:
            move_into_place(partial_place, place)
        ranks.wait()
    return Healed(place, healing)


@dataclass
class _Run:
    """One healing in its directory; once `started`, what is there is worth keeping."""

    source: Source
    directory: Path
    settings: HealSettings
    ranks: Ranks
    teacher: str | Path | bool
    command: str
    progress: Progress = lambda stage, share: None
    tell: Tell = lambda moment: None
    cache: Path = Path()
    started: bool = False
    digests: dict[str, str] = field(default_factory=dict)  # of all input files

    @property
    def work(self) -> Path:
        return self.directory / WORK

    def guarded(self, finish: bool, evaluate: bool) -> dict[str, Any]:
        """Runs all; what goes wrong before anything is worth keeping leaves no directory behind."""
        self.started = (self.directory / FINGERPRINT).is_file()
        try:
            return self.all(finish, evaluate)
        except ValueError as error:
            log.error("%s", error)
            if not self.started and self.ranks.main:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def all(self, finish: bool, evaluate: bool) -> dict[str, Any]:
        """Runs what is not done yet; returns the section `healing` of the results."""
        self.settings.check_processes(self.ranks.world)
        log.info("bondsmith heal: %s", self.command)
        if finish and States(self.work, self.ranks).latest is None:
            raise HealError("there is no checkpoint to finish with: start the healing first")
        original = self.open_teacher()
        tokenizer = self.tokenizer(original)
        self.keep_fingerprint(original)
        samples = self.samples(tokenizer, original is not None)
        self.started = True
        log.info("%d windows to train on, %d held out", len(samples.train), len(samples.held))
        turns = self.settings.tokens / samples.train.ids.numel()
        if turns > _OFTEN:
            log.warning(
                "the text has %d tokens and is read %.0f times: more text teaches more",
                samples.train.ids.numel(),
                turns,
            )
        width = samples.train.ids.shape[1]
        if width < self.settings.window:
            log.info("windows have the %d tokens that the model has positions for", width)
            self.settings = replace(self.settings, window=width)
        apart = self.apart()
        if not apart:
            log.info(
                "the model takes no positions of several pieces in a window: short samples that share one see each other"
            )
        teacher = None if finish else self.predictions(original, samples, apart)
        student = self.student()
        loop, freed = self.loop(student, samples, teacher, apart)
        if finish:
            loop.finish()
        else:
            loop.run()
        trained = output.whole(loop.parameters)
        healing = self.section(loop, samples, original)
        if self.ranks.main:
            rewritten = output.REPORTS if (self.source.path / output.REPORTS[0]).is_file() else ()
            output.write_healed(self.source.path, self.directory, output.stored(student, freed, trained), rewritten)
            asked = original if evaluate else None
            advance = partial(self.progress, "quality")
            record(self.source.path, self.directory, healing, asked, samples.plain, self.ranks.device, advance)
        self.ranks.wait()
        return healing

    def tokenizer(self, original: Source | None) -> Any:
        """Returns the directory's tokenizer; the original's where it was written without one."""
        try:
            return load_tokenizer(self.source.path)
        except ModelError:
            if original is None:
                raise
            return load_tokenizer(original.path)

    def open_teacher(self) -> Source | None:
        """Returns the original, or None without one; ModelError where it is of another vocabulary."""
        if self.teacher is False:
            return None
        name = original_of(self.source.path) if self.teacher is True else self.teacher
        if self.ranks.main:
            open_original(name, self.work / "source")
        self.ranks.wait()
        original = open_original(name, self.work / "source")
        check_vocabulary(str(name), original, self.source)
        return original

    def keep_fingerprint(self, original: Source | None) -> None:
        """Writes the fingerprint, or compares it with the one found; RunError names what has changed."""
        specs = (*self.settings.data, *self.settings.evaluation)
        files = [Path(s).expanduser() for s in specs if not s.startswith("hf:")]
        inputs = [*self.source.files, self.source.path / "config.json", *files, *(original.files if original else ())]
        self.digests = self.ranks.once(lambda: {str(f): file_digest(f) for f in inputs})
        now = {
            "format": FORMAT,
            "torch": torch.__version__,
            "settings": self.settings.to_dict() | {"teacher": original.name if original else None},
            "files": self.digests,
        }
        path = self.directory / FINGERPRINT
        found = []
        if path.is_file():
            found = changes(json.loads(path.read_text()), now)
        elif self.ranks.main:
            write_json(path, now)
        if found:
            raise RunError(
                f"{self.directory} holds an unfinished run with other settings or files ({'; '.join(found)}): "
                "give the same ones, or --overwrite to start anew"
            )
        self.ranks.wait()

    def samples(self, tokenizer: Any, with_teacher: bool) -> Samples:
        """Returns the windows; made once by the main process, then read from disk."""
        if self.ranks.main and not Samples.saved(self.work):
            try:
                found = self._read_samples(tokenizer, with_teacher)
            except ValueError:
                if not self.started:
                    shutil.rmtree(self.directory, ignore_errors=True)
                raise
            found.save(self.work)
        self.ranks.wait()
        return Samples.load(self.work)

    def _read_samples(self, tokenizer: Any, with_teacher: bool) -> Samples:
        s = self.settings
        longest = int(getattr(self.source.config.get_text_config(), "max_position_embeddings", s.window))
        answers = s.loss_on == "answers" or (s.loss_on == "auto" and not with_teacher)
        return read_samples(
            s.data,
            tokenizer,
            tokens=s.tokens,
            held_out=s.validation_windows,
            window=min(s.window, longest),
            answers=answers,
            seed=s.seed,
            evaluation=s.evaluation,
        )

    def student(self) -> PreTrainedModel:
        """Returns the compressed model."""
        return load(self.source.path, dtype=torch.float32).to(self.ranks.device).eval()

    def apart(self) -> bool:
        """Returns whether pieces of a window can be kept apart; tried once, before the original takes its place in memory."""
        note = self.work / "apart.json"
        if self.ranks.main and not note.is_file():
            write_json(note, keeps_apart(self.student()))
        self.ranks.wait()
        return bool(json.loads(note.read_text()))

    def predictions(self, original: Source | None, samples: Samples, apart: bool) -> Teacher | None:
        """Returns the original's predictions by window, training windows first."""
        if original is None:
            return None
        windows = join([samples.train, samples.held])
        how = (self.settings.top_k, apart, self.settings.halves(self.ranks.device))
        if self.settings.resident:
            model = load_whole(original, self.ranks.device)
            return lambda index: ask(model, windows, index, *how)
        digests = {str(f): self.digests[str(f)] for f in original.files}
        vocabulary = int(original.config.get_text_config().vocab_size)
        cache = Cache.at(self.cache, windows, digests, self.settings.top_k, vocabulary, *how[1:])
        missing = cache.missing
        self.ranks.wait()
        if missing:
            log.info("the original's predictions on %d windows ...", len(windows))
            model = load_whole(original, self.ranks.device)
            for done, index in enumerate(missing):
                if index % self.ranks.world == self.ranks.rank:
                    cache.write(index, lambda places: ask(model, windows, places, *how))
                self.progress("teacher", (done + 1) / len(missing))
            del model
            self.ranks.wait()
            if self.ranks.main:
                cache.describe(original.name)
        log.info("the original's predictions: %.1f MB in %s", cache.bytes / 1e6, cache.folder)
        return cache.read

    def loop(
        self, student: PreTrainedModel, samples: Samples, teacher: Teacher | None, apart: bool
    ) -> tuple[Loop, list[str]]:
        """Returns the training loop, and the names of the networks that are in their free form meanwhile."""
        freed = (
            [] if self.settings.round_bits else free_all(student)
        )  # what is rounded later is the form that is stored
        if self.settings.round_bits:
            grid = grid_of(self.settings.round_bits, self.settings.round_group)
            simulate_rounding(student, grid, keeps=not self.ranks.several)
        train_scales_inside(student, self.settings.embeddings)
        dense = reduced_matrices(self.source.config.quantization_config)
        trainable(student, self.settings.embeddings, dense)
        if self.settings.checkpoint_activations:
            compute_again(self.blocks(student))
        if self.ranks.several:
            self.ranks.make_alike(student)
            shard(student, self.blocks(student), self.ranks)
        parameters = trainable(student, self.settings.embeddings, dense)
        optimizer = Steps(student, parameters, self.settings.core_rate, self.settings.norm_rate)
        states = States(self.work, self.ranks)
        loop = Loop(
            student,
            parameters,
            optimizer,
            samples.train,
            samples.held,
            teacher,
            apart,
            self.settings,
            self.ranks,
            states,
        )
        loop.tell = self.tell_all
        return loop, freed

    def blocks(self, student: PreTrainedModel) -> nn.ModuleList:
        """Returns the student's blocks; where they are is found on the architecture as it is without networks."""
        config = self.source.config.__class__.from_dict(self.source.config.to_dict())
        config.__dict__.pop("quantization_config", None)
        return BlockRunner(student, BlockRunner(skeleton(config)).path).blocks

    def tell_all(self, moment: Moment) -> None:
        """Passes a step on to the log, the bar and whoever else watches."""
        log.info("%s", moment)
        self.progress("heal", moment.step / moment.steps)
        self.tell(moment)

    def section(self, loop: Loop, samples: Samples, original: Source | None) -> dict[str, Any]:
        """Returns the section `healing` of `results.json`."""
        return {
            "command": self.command,
            "teacher": original.name if original else None,
            "settings": self.settings.to_dict(),
            "processes": self.ranks.world,
            "windows": len(samples.train),
            "documents": samples.train.documents,
            "split_documents": samples.train.split,
            "steps": loop.step,
            "best_step": loop.best,
            "tokens": loop.step * self.settings.batch * self.settings.window,
            "trained_parameters": sum(p.numel() for p in loop.parameters.values()),
            "seconds": loop.seconds,
            "curve": loop.history,
        }
