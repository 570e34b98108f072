"""Measured sensitivity: change one matrix of a model, and see what it costs in KL to the original, perplexity and first choices.

All probes go through the model together, in depth order: each block is loaded once and serves every probe that has reached it. A probe
starts from the hidden states that the original sends into the changed block, so a deep probe costs a few blocks and the head. Hidden
states wait on disk; the original's are kept between calls, its log-probabilities are computed anew a few tokens at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import BlockRunner, replaced_weight, shape, weight
from bondsmith.model.skeleton import empty, fill, stored_names
from bondsmith.model.source import ModelError, Source
from bondsmith.stages.streams import Stream

Change = Callable[[Tensor], Tensor] | Tensor
_BATCH_TOKENS = 2048
_LOGITS = 2**24  # most float32 logits of one model at a time (64 MB)


@dataclass(frozen=True, eq=False)
class Probe:
    """One matrix changed: its full name and the new weight, or a function that makes it from the old one, both (out, in) in float32.

    The embedding and the head can be named too; where they are tied both change. `label` is handed on to the result.
    """

    name: str
    change: Change
    label: str = ""


@dataclass(frozen=True)
class ProbeResult:
    """What a change costs, means over all predictions; standard errors are over windows, None where there is one only.

    Attributes:
        name, label: of the probe.
        windows, tokens: how many windows were scored, and predictions in them.
        kl: KL(original || changed) of the next-token distributions, nats a token.
        nats_lost: mean negative log-likelihood of the changed model minus the original's, nats a token.
        top1: share of tokens where both find the same next token most likely.
        loss: mean negative log-likelihood of the changed model, nats a token.
    """

    name: str
    label: str
    windows: int
    tokens: int
    kl: float
    kl_stderr: float | None
    nats_lost: float
    nats_lost_stderr: float | None
    top1: float
    top1_stderr: float | None
    loss: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the changed model over the original's."""
        return math.exp(min(self.nats_lost, 700.0))

    @property
    def perplexity(self) -> float:
        """Perplexity of the changed model."""
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain data; `ProbeResult(**it)` takes it back."""
        return asdict(self)


@torch.no_grad()
def measure_probes(
    source: Source,
    runner: BlockRunner,
    ids: Tensor,
    probes: Sequence[Probe],
    work_dir: Path,
    device: torch.device | str = "cpu",
    advance: Callable[[float], None] = lambda share: None,
) -> list[ProbeResult]:
    """Returns what each probe costs, in the order of `probes`.

    Blocks on the meta device are filled from `source` one at a time and emptied again; a model in memory is used as it is.

    Args:
        runner: the model, with or without weights.
        ids: token windows, (windows, tokens), at least two tokens each.
        work_dir: where hidden states wait; those of the original stay there for the next call with the same model and windows.
        advance: hears the share of the work that is done.

    Raises:
        ModelError: a probe names no matrix of the model, or gives one of another shape.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ModelError(f"probes need windows of at least two tokens, not ids of shape {tuple(ids.shape)}")
    sweep = _Sweep(source, runner, ids, [_place(runner, p) for p in probes], work_dir, torch.device(device), advance)
    if not probes:
        return []
    sweep.fill_outside()
    try:
        sweep.run()
        values = sweep.score()
    finally:
        sweep.clear()
    return [_result(p, v, ids.shape[1] - 1) for p, v in zip(probes, values, strict=True)]


@dataclass(frozen=True, eq=False)
class _Placed:
    """A probe and where it starts: `block` is the first one that runs differently, the number of blocks for the head alone.

    `outside`: the matrix lies outside the blocks; `embeds`: it is (also) what tokens enter by.
    """

    probe: Probe
    block: int
    outside: bool = False
    embeds: bool = False


def _place(runner: BlockRunner, probe: Probe) -> _Placed:
    try:
        module = runner.model.get_submodule(probe.name)
    except AttributeError as error:
        raise ModelError(
            f"{probe.name}: the model has no such matrix; a block's are named like "
            f"{runner.path}.0.{next(n for n, m in runner.blocks[0].named_modules() if isinstance(m, nn.Linear) or n)}"
        ) from error
    if isinstance(probe.change, Tensor) and tuple(probe.change.shape) != shape(module):
        raise ModelError(_wrong_shape(probe, probe.change, shape(module)))
    prefix = runner.path + "."
    if probe.name.startswith(prefix):
        return _Placed(probe, int(probe.name.removeprefix(prefix).split(".")[0]))
    head = runner.model.get_output_embeddings()
    alone = module is head and not runner.model.config.get_text_config().tie_word_embeddings
    return _Placed(probe, len(runner) if alone else 0, outside=True, embeds=not alone)


def _wrong_shape(probe: Probe, new: Tensor, wanted: tuple[int, int]) -> str:
    got = " x ".join(map(str, new.shape))
    return f"{probe.name}: the probe {probe.label!r} gives a weight of {got}, the matrix is {wanted[0]} x {wanted[1]}"


@dataclass
class _Sweep:
    """One pass over the depth of the model with all probes."""

    source: Source
    runner: BlockRunner
    ids: Tensor
    placed: list[_Placed]
    work: Path
    device: torch.device
    advance: Callable[[float], None]

    def __post_init__(self) -> None:
        self.count = len(self.runner)
        self.batch = max(1, _BATCH_TOKENS // self.ids.shape[1])
        self.folder = self.work / f"original-{self._key()}"
        self.width = 0
        self.live: dict[int, Stream] = {}
        self.done = self.total = 0.0

    def fill_outside(self) -> None:
        """Brings embedding, head and norms into memory, unless they are there."""
        model = self.runner.model
        state = model.state_dict()
        outside = [n for n in stored_names(model) if not n.startswith(self.runner.path + ".")]
        missing = [n for n in outside if state[n].is_meta]
        if missing:
            fill(model, self.source.read(missing), self.device)
            model.tie_weights()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.width = self.runner.enter(self.ids[:1, :2].to(self.device)).shape[-1]

    def run(self) -> None:
        """Brings the hidden states of the original and of every probe to the end of the last block."""
        steps = self._original_steps()
        self.total = len(steps - {-1}) + sum(self.count - p.block for p in self.placed) + 0.3 * len(self.placed)
        if -1 in steps:
            self._write(self._original(0), lambda ids, _: self.runner.enter(ids), None)
        for i, placed in enumerate(self.placed):
            if placed.embeds:
                with self._changed(placed):
                    self.live[i] = self._write(self._probe(i, 0), lambda ids, _: self.runner.enter(ids), None)
        for k in range(self.count):
            starting = [i for i, p in enumerate(self.placed) if p.block == k and not p.outside]
            if k in steps or starting or self.live:
                with self._block(k):
                    self._pass(k, k in steps, starting)

    def score(self) -> list[Tensor]:
        """Returns per probe the means over each window's predictions, (windows, 4): both losses, KL, agreement."""
        last = self._original(self.count)
        values = [torch.zeros(len(self.ids), 4, dtype=torch.float64) for _ in self.placed]
        for w in range(len(self.ids)):
            ids = self.ids[w : w + 1].to(self.device)
            hidden = last.read(w, 1).to(self.device)
            for part in self._parts():
                first = self._log_probs(ids, hidden, part)
                for i, placed in enumerate(self.placed):
                    own = self.live[i].read(w, 1).to(self.device) if i in self.live else hidden
                    with self._changed(placed) if placed.outside else nullcontext():
                        second = self._log_probs(ids, own, part)
                    targets = ids[0, part.start + 1 : part.stop + 1]
                    values[i][w] += _sums(first, second, targets).to("cpu", torch.float64)
            self._advance(0.3 * len(self.placed) / len(self.ids))
        return [v / (self.ids.shape[1] - 1) for v in values]

    def clear(self) -> None:
        """Deletes the probes' hidden states."""
        for stream in self.live.values():
            stream.remove()

    def _pass(self, k: int, original: bool, starting: list[int]) -> None:
        """Runs block k over everything that goes through it."""

        def step(ids: Tensor, hidden: Tensor) -> Tensor:
            return self.runner.block(k, ids, hidden)

        before = self._original(k)
        if original:
            self._write(self._original(k + 1), step, before)
            self._advance(1)
        for i, old in list(self.live.items()):
            self.live[i] = self._write(self._probe(i, k + 1), step, old)
            old.remove()
            self._advance(1)
        for i in starting:
            with self._changed(self.placed[i]):
                self.live[i] = self._write(self._probe(i, k + 1), step, before)
            self._advance(1)
        if k not in self._wanted() and before.path.is_file() and original:
            before.remove()

    def _write(self, stream: Stream, step: Callable[[Tensor, Tensor], Tensor], before: Stream | None) -> Stream:
        """Fills `stream` with `step` of the token ids and of what is in `before`; returns it."""
        nothing = torch.zeros(0)

        def rows() -> Iterator[Tensor]:
            for first in range(0, len(self.ids), self.batch):
                ids = self.ids[first : first + self.batch].to(self.device)
                yield step(ids, before.read(first, self.batch).to(self.device) if before else nothing)

        stream.write(rows())
        return stream

    def _parts(self) -> list[slice]:
        """Returns the positions of a window that predict something, in pieces whose logits are small."""
        vocabulary = int(self.runner.model.config.get_text_config().vocab_size)
        size = max(16, _LOGITS // vocabulary)
        last = self.ids.shape[1] - 1
        return [slice(first, min(first + size, last)) for first in range(0, last, size)]

    def _log_probs(self, ids: Tensor, hidden: Tensor, part: slice) -> Tensor:
        return self.runner.logits(ids[:, part], hidden[:, part])[0].float().log_softmax(-1)

    def _original_steps(self) -> set[int]:
        """Returns the blocks that the original has to be run through for the hidden states that are wanted; -1 is the embedding."""
        steps: set[int] = set()
        for k in self._wanted():
            while k >= 0 and not self._original(k).complete:
                k -= 1
                steps.add(k)
        return steps

    def _wanted(self) -> set[int]:
        """Returns the block boundaries where the original's hidden states are needed: before changed blocks, and at the end."""
        return {p.block for p in self.placed if not p.embeds} | {self.count}

    @contextmanager
    def _block(self, k: int) -> Iterator[None]:
        """Has the weights of block k in memory."""
        block, prefix = self.runner.blocks[k], f"{self.runner.path}.{k}."
        missing = [f"{prefix}{n}" for n, p in block.named_parameters() if p.is_meta]
        if missing:
            names = [n for n in self.source.places if n.startswith(prefix)]
            fill(block, {n.removeprefix(prefix): t for n, t in self.source.read(names).items()}, self.device)
        try:
            yield
        finally:
            if missing:
                empty(block)

    @contextmanager
    def _changed(self, placed: _Placed) -> Iterator[None]:
        """Has the probe's weight in the place of the original's."""
        probe = placed.probe
        module = self.runner.model.get_submodule(probe.name)
        old = weight(module)
        new = probe.change if isinstance(probe.change, Tensor) else probe.change(old)
        if new.shape != old.shape:
            raise ModelError(_wrong_shape(probe, new, shape(module)))
        with replaced_weight(module, new.to(old)):
            yield

    def _original(self, k: int) -> Stream:
        return Stream(self.folder / f"{k}", (*self.ids.shape, self.width))

    def _probe(self, i: int, k: int) -> Stream:
        return Stream(self.work / f"probe-{i}-{k}", (*self.ids.shape, self.width), durable=False)

    def _key(self) -> str:
        """Returns what tells the original's hidden states of one model and one text from others'."""
        digest = hashlib.sha256(self.ids.cpu().contiguous().numpy().tobytes())
        for file in sorted({file for file, _ in self.source.places.values()}):
            facts = file.stat()
            digest.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns};".encode())
        return digest.hexdigest()[:12]

    def _advance(self, work: float) -> None:
        self.done += work
        self.advance(min(1.0, self.done / self.total))


def _sums(first_TV: Tensor, second_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Returns sums over tokens of both negative log-likelihoods, KL and agreement, from log-probabilities.

    `sum p d` with `d = log p - log q` loses small divergences to the rounding of the normalisers. `sum p (d + exp(-d) - 1)` is the
    same number, for both distributions sum to one, and sees that rounding in second order only.
    """
    losses = [-p.gather(1, targets_T[:, None]).sum() for p in (first_TV, second_TV)]
    same = (first_TV.argmax(-1) == second_TV.argmax(-1)).sum()
    p, d = first_TV.exp(), first_TV - second_TV
    small = p * (d + torch.expm1(-d.clamp(-1, 1)))
    kl = torch.where(d.abs() < 1, small, p * (d - 1) + second_TV.exp()).sum(-1).sum(dtype=torch.float64)
    return torch.stack([t.double() for t in (*losses, kl, same)])


def _result(probe: Probe, values_W4: Tensor, predictions: int) -> ProbeResult:
    windows = len(values_W4)
    loss, kl, same = values_W4[:, 1], values_W4[:, 2], values_W4[:, 3]
    lost = loss - values_W4[:, 0]

    def error(column: Tensor) -> float | None:
        return (column.std() / math.sqrt(windows)).item() if windows > 1 else None

    return ProbeResult(
        probe.name,
        probe.label,
        windows,
        windows * predictions,
        kl.mean().item(),
        error(kl),
        lost.mean().item(),
        error(lost),
        same.mean().item(),
        error(same),
        loss.mean().item(),
    )
