"""The settings of one healing, validated."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bondsmith.stages.training import cosine
from bondsmith.tensor.rounding import BITS

LOSS_ON = ("auto", "all", "answers")
PRECISIONS = ("auto", "float32", "bfloat16")
RATE = 0.0005  # of cores; docs/healing.md has what was measured
_LEAST_KL = 0.01  # nats a token; below this the rates are those of it


class HealError(ValueError):
    """Healing cannot start or go on; the message says why, at which step, and what helps."""


@dataclass(frozen=True)
class HealSettings:
    """Settings of `bondsmith heal`.

    Attributes:
        data: SPECs of training text, see `bondsmith.data`; equal shares of each.
        tokens: training tokens in all; text that is shorter is read again.
        window: tokens per window.
        batch: windows per optimizer step, over all processes.
        micro_batch: windows per forward pass of a process.
        learning_rate: how far a step moves a network's cores, as a share of their size; None is 0.0005, and where the divergence before
            training is under a nat so much less, `norm_rate` too, as its square root says.
        norm_rate: the same for norms, biases, scales, embedding and head.
        warmup: share of the steps in which the rate rises; a cosine brings it down to a fiftieth by the end.
        clip: largest norm of the gradient; 0 for none.
        kl_weight, ce_weight: of the divergence from the original and of the cross entropy of the text.
        top_k: words of the original's distribution that are kept.
        embeddings: train embedding and head too.
        round_bits, round_group: round every core to so many bits (groups of columns share a scale) in each forward pass while the full
            numbers are trained: for a model that is rounded afterwards. 0 bits: no rounding. Networks that are rounded already have
            their scales trained, whatever stands here.
        loss_on: all tokens, the assistant's answers only, or auto: answers without a teacher, all with one.
        validation_windows: windows per SPEC that are kept apart to validate on.
        evaluation: SPECs of other text that the healed model is measured on at the end, as many windows of each.
        validate_every, save_every: steps; 0 is eight times in all, and at every validation (and every ten minutes).
        patience: validations in a row without a gain that end the training, at half of the full rate or less; 0 for none.
        resident: ask the original while training, instead of its predictions on disk.
        checkpoint_activations: compute the blocks again in backward: less memory, a third more time.
        precision: of the products, the original's too; auto is bfloat16 where the accelerator has it, and float32 on a CPU, where
            several processes take the steps of one to 1e-4. bfloat16 takes two thirds of the time on CPUs with AVX512_BF16 or AMX.
        device, seed: as in `bondsmith compress`.
    """

    data: tuple[str, ...]
    tokens: int = 300_000
    window: int = 512
    batch: int = 4
    micro_batch: int = 2
    learning_rate: float | None = None
    norm_rate: float = 1e-3
    warmup: float = 0.05
    clip: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    top_k: int = 64
    embeddings: bool = False
    round_bits: int = 0
    round_group: int = 64
    loss_on: str = "auto"
    validation_windows: int = 4
    evaluation: tuple[str, ...] = ()
    validate_every: int = 0
    save_every: int = 0
    patience: int = 2
    resident: bool = False
    checkpoint_activations: bool = False
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "evaluation"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        self._check_types()
        self._check()

    def _check_types(self) -> None:
        for f in fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if kind == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise HealError(f"{f.name}: {value!r} is not a whole number")
            if kind == "float | None" and value is None:
                continue
            if kind.startswith("float") and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise HealError(f"{f.name}: {value!r} is not a number")
            if kind == "bool" and not isinstance(value, bool):
                raise HealError(f"{f.name}: {value!r} is neither true nor false")

    def _check(self) -> None:
        if not self.data:
            raise HealError("data: give at least one SPEC, e.g. --data my-text.jsonl")
        for name, least in (("window", 2), ("batch", 1), ("micro_batch", 1), ("top_k", 1), ("validation_windows", 1)):
            if getattr(self, name) < least:
                raise HealError(f"{name}: {getattr(self, name)} is less than {least}")
        if self.tokens < self.batch * self.window:
            raise HealError(
                f"tokens: {self.tokens} do not fill one step of {self.batch} windows of {self.window} tokens; "
                "give more tokens, a smaller batch or a smaller window"
            )
        for name in ("learning_rate", "norm_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise HealError(f"{name}: {value} is not above 0")
        for name in ("clip", "kl_weight", "ce_weight", "validate_every", "save_every", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise HealError(f"{name}: {getattr(self, name)} is negative")
        if not 0 <= self.warmup < 1:
            raise HealError(f"warmup: {self.warmup} is not in [0, 1)")
        if self.kl_weight == self.ce_weight == 0:
            raise HealError("kl_weight and ce_weight are both 0: nothing would be trained")
        if self.round_bits not in (0, *BITS):
            raise HealError(f"round_bits: {self.round_bits} is not one of 0, {', '.join(map(str, BITS))}")
        if self.round_group < 0:
            raise HealError(f"round_group: {self.round_group} is negative")
        for name, choices in (("loss_on", LOSS_ON), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise HealError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")

    def call(self, directory: str | Path, out: str | Path | None, teacher: str | Path | bool = True) -> str:
        """Returns the call from Python that heals `directory` with these settings.

        >>> HealSettings(("a.txt",), seed=2).call("small", None)
        "bondsmith.heal('small', data=['a.txt'], seed=2)"
        >>> HealSettings(("a.txt",)).call("small", None, teacher=False)
        "bondsmith.heal('small', teacher=False, data=['a.txt'])"
        """
        plain = HealSettings(self.data).to_dict()
        changed = {k: v for k, v in self.to_dict().items() if k == "data" or v != plain[k]}
        given = [repr(str(place)) for place in (directory, out) if place]
        if teacher is not True:
            given.append(f"teacher={teacher if teacher is False else str(teacher)!r}")
        return f"bondsmith.heal({', '.join([*given, *(f'{k}={v!r}' for k, v in changed.items())])})"

    def check_processes(self, world: int) -> None:
        """Raises HealError unless the windows of a step can be dealt out evenly."""
        if self.batch % world:
            raise HealError(
                f"batch: {self.batch} windows a step cannot be dealt out evenly to {world} processes; "
                f"give a multiple of {world}, e.g. --batch {world * -(-self.batch // world)}"
            )

    def halves(self, device: torch.device) -> bool:
        """True where matrices are multiplied in bfloat16: the student's and the original's."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        return device.type == "cuda" and torch.cuda.is_bf16_supported()

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.tokens // (self.batch * self.window)

    def rate(self, step: int) -> float:
        """Returns the share of the highest rate at a step: a straight rise, then a cosine down to a fiftieth."""
        return cosine(step, self.steps, self.warmup)

    def highest(self, kl: float | None) -> float:
        """Returns the share of both rates that is the highest, for a model that diverges by `kl` nats a token, or by who knows what.

        >>> settings = HealSettings(("a.txt",))
        >>> settings.highest(0.25), settings.highest(1.5), settings.highest(None), settings.core_rate
        (0.5, 1.0, 1.0, 0.0005)
        """
        if self.learning_rate is not None or kl is None or not math.isfinite(kl):
            return 1.0
        return min(1.0, math.sqrt(max(kl, _LEAST_KL)))

    @property
    def core_rate(self) -> float:
        """The learning rate of cores, before what `highest` takes off."""
        return RATE if self.learning_rate is None else self.learning_rate

    def validates(self, step: int) -> bool:
        """True where the state after `step` steps is validated."""
        every = self.validate_every or max(1, -(-self.steps // 8))
        return step % every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """True where a checkpoint is written after `step` steps."""
        return self.validates(step) or (self.save_every > 0 and step % self.save_every == 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, in field order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> HealSettings:
        """Returns the settings of a mapping; HealError names an unknown key and the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(known)}"
                raise HealError(f"unknown setting {key!r}{hint}")
        if "data" not in settings:
            raise HealError("data: give at least one SPEC, e.g. --data my-text.jsonl")
        return cls(**settings)
