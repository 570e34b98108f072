"""The training loop: steps, validation on a schedule, checkpoints, and when to stop.

Everything that decides a step follows from its number and the seed, so a run that goes on from a checkpoint takes the very same steps,
and several processes take those of one: the windows of a step are dealt out, the loss is divided by the tokens of all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bondsmith.stages.healing.head import fits, head_sums
from bondsmith.stages.healing.losses import Sums, TopK, token_sums
from bondsmith.stages.healing.ranks import Ranks
from bondsmith.stages.healing.samples import Windows
from bondsmith.stages.healing.settings import HealError, HealSettings
from bondsmith.stages.healing.state import States
from bondsmith.stages.healing.teacher import logits_of
from bondsmith.stages.training import Steps

SAVE_SECONDS = 600.0  # a checkpoint at least so often
_TRIED = 16  # tokens on which it is tried whether the loss can be computed at the head

Teacher = Callable[[Tensor], TopK]


@dataclass(frozen=True)
class Moment:
    """Where the training is: what is told to whoever watches. `seconds` and `left` in seconds, `rate` in tokens per second."""

    step: int
    steps: int
    loss: float
    rate: float
    left: float
    validation: dict[str, float] | None = None

    def __str__(self) -> str:
        text = (
            f"step {self.step}/{self.steps}: loss {self.loss:.4f}, {self.rate:.0f} tokens/s, {_clock(self.left)} left"
        )
        if self.validation is None:
            return text
        kl = f"KL {self.validation['kl']:.4f}, " if "kl" in self.validation else ""
        return f"{text}; validation: {kl}perplexity {self.validation['perplexity']:.3f}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if math.isfinite(seconds) else "?"


@dataclass
class Loop:
    """One healing in its processes.

    Attributes:
        model: the student; `parameters` are those of it that are trained, by name.
        train, held: windows to train and to validate on.
        teacher: the original's predictions at the counted tokens of `train` followed by `held`, by window; None without a teacher.
        apart: whether pieces in a window are kept apart by their positions.
        states: where checkpoints go.
        tell: hears of every step.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    optimizer: Steps
    train: Windows
    held: Windows
    teacher: Teacher | None
    apart: bool
    settings: HealSettings
    ranks: Ranks
    states: States
    tell: Callable[[Moment], None] = lambda moment: None
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    best: int = 0
    seconds: float = 0.0
    at_head: bool = False  # whether the loss is computed at the head; tried at the start

    @torch.enable_grad()
    def run(self) -> None:
        """Trains to the end, or from the last checkpoint on; leaves the best state in the model."""
        self._begin()
        start, before = time.perf_counter(), self.step
        earlier = self.seconds
        saved = start
        self.ranks.order.waits = True
        while self.step < self.settings.steps and not self._stalls():
            loss, due, told = self._train_step(time.perf_counter() - saved > SAVE_SECONDS)
            self.step += 1
            self.seconds = earlier + time.perf_counter() - start
            rate = (self.step - before) * self.settings.batch * self.settings.window / (self.seconds - earlier)
            left = (self.settings.steps - self.step) * self.settings.batch * self.settings.window / rate
            found = self._validate(loss) if self.settings.validates(self.step) else None
            if due or told or self.settings.saves(self.step):
                self._save()
                saved = time.perf_counter()
            self.tell(Moment(self.step, self.settings.steps, loss, rate, left, found))
            if told:
                raise HealError(
                    f"told to stop (SIGTERM): the state of step {self.step} is kept, the same command with --resume goes on from it"
                )
        self.ranks.order.waits = False
        if self.best != self.step:
            self.states.load(self.best, self.parameters)

    def finish(self) -> None:
        """Leaves the best state so far in the model, without training on."""
        note = self.states.latest
        assert note is not None, "asked to finish without a checkpoint"
        self._recall(note)
        self.states.load(self.best, self.parameters)

    def _begin(self) -> None:
        ids = self.held.take(torch.tensor([0])).ids[:, :_TRIED].to(self.ranks.device)
        self.at_head = fits(self.model, partial(logits_of, self.model, ids, None, self.settings.halves(ids.device)))
        note = self.states.latest
        if note is not None:
            self._recall(note)
            self.states.load(self.step, self.parameters, self.optimizer)
            return
        self._validate(None)
        self._save()

    def _recall(self, note: dict[str, Any]) -> None:
        self.step, self.best, self.history, self.seconds = (note[n] for n in ("step", "best", "history", "seconds"))

    def _save(self) -> None:
        note = {"step": self.step, "best": self.best, "history": self.history, "seconds": self.seconds}
        self.states.save(self.parameters, self.optimizer, note)

    def _train_step(self, due: bool = False) -> tuple[float, bool, bool]:
        """Takes one step; returns the loss per token, whether a checkpoint is due (by the main process's clock), and whether any process
        was told to stop.

        HealError before anything moves if the loss, or the gradient, is not finite.
        """
        index = self._windows_of(self.step)
        tokens = int(self.train.counts[index].sum())
        self.optimizer.zero_grad()
        total = 0.0
        parts = index[self.ranks.rank :: self.ranks.world].split(self.settings.micro_batch)
        for part in parts:
            loss = self._sums(self.train, part, 0).loss
            (loss * (self.ranks.world / max(1, tokens))).backward()  # gradients are averaged over processes
            total += float(loss.detach())
        total, late, told = self.ranks.total([total, due and self.ranks.main, self.ranks.order.given])
        total /= max(1, tokens)
        norm = self._clip()
        if not (math.isfinite(total) and math.isfinite(norm)):
            kept = self.states.latest or {"step": 0}
            what = "loss" if not math.isfinite(total) else "gradient"
            value = total if what == "loss" else norm
            raise HealError(
                f"step {self.step + 1}: the {what} is {value} on windows {', '.join(map(str, sorted(index.tolist())))}; the state of "
                f"step {kept['step']} is kept: --finish writes the best one so far, --overwrite with a smaller --learning-rate "
                "starts anew"
            )
        self.optimizer.scale = self.settings.highest(self.history[0].get("kl")) * self.settings.rate(self.step)
        self.optimizer.step()
        return total, late > 0, told > 0

    def _clip(self) -> float:
        """Clips the gradient; returns its norm before."""
        largest = self.settings.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), largest)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _windows_of(self, step: int) -> Tensor:
        """Returns the windows of a step: the text is read in a new order each time it is used up."""
        count, places = len(self.train), range(step * self.settings.batch, (step + 1) * self.settings.batch)
        orders = {
            turn: torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed + 1_000_003 * turn))
            for turn in range(places[0] // count, places[-1] // count + 1)
        }
        return torch.stack([orders[place // count][place % count] for place in places])

    def _sums(self, windows: Windows, index: Tensor, first: int) -> Sums:
        """Returns the sums of the windows at `index`, the first of all windows at `first`."""
        teacher = self.teacher(index + first) if self.teacher else None
        batch, device = windows.take(index), self.ranks.device
        if teacher is not None:
            teacher = TopK(teacher.words.to(device), teacher.logp.to(device))
        ids, counts = batch.ids.to(device), batch.counts.to(device)
        positions = batch.positions.to(device) if self.apart else None
        run = partial(logits_of, self.model, ids, positions, self.settings.halves(device))
        weights = (self.settings.kl_weight, self.settings.ce_weight) if self.teacher else (0.0, 1.0)
        if self.at_head:
            return head_sums(self.model, run, ids, counts, teacher, weights)
        return token_sums(run(), ids, counts, teacher, weights)

    @torch.no_grad()
    def _validate(self, loss: float | None) -> dict[str, float]:
        """Returns KL and perplexity on the held-out windows, and remembers them; every process does as many forward passes."""
        rounds = -(-len(self.held) // self.ranks.world)
        kl = ce = tokens = 0.0
        for turn in range(rounds):
            place = turn * self.ranks.world + self.ranks.rank
            sums = self._sums(self.held, torch.tensor([place % len(self.held)]), len(self.train))
            if place < len(self.held):
                kl, ce, tokens = kl + float(sums.kl), ce + float(sums.ce), tokens + sums.tokens
        kl, ce, tokens = self.ranks.total([kl, ce, tokens])
        found = {"kl": kl / tokens} if self.teacher else {}
        found |= {"cross_entropy": ce / tokens, "perplexity": math.exp(min(ce / tokens, 700.0))}
        used = self.step * self.settings.batch * self.settings.window
        self.history.append({"step": self.step, "tokens": used, "loss": loss} | found)
        self.best = min(self.history, key=self._score)["step"]
        return found

    def _score(self, entry: dict[str, Any]) -> float:
        score = float(entry["kl" if self.teacher else "cross_entropy"])
        return score if math.isfinite(score) else math.inf

    def _stalls(self) -> bool:
        """True once `patience` validations in a row were no better than the best before them, at half of the full rate or less.

        At a high rate the divergence may stand still for a third of a run, and falls once the rate does.
        """
        since = sum(e["step"] > self.best and self.settings.rate(e["step"]) <= 0.5 for e in self.history)
        return bool(0 < self.settings.patience <= since)
