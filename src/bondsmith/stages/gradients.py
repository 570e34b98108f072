"""Gradients of the loss, drawn at the head and passed back through the blocks: the moments of what they are at every matrix.

The last blocks, as many as memory allows, pass forward and back in one go with the head; those before them one by one, each forward once
more. Hidden states and gradients between them stream from disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bondsmith.model.blocks import BlockRunner, matrices, shape
from bondsmith.model.checkpoint import write_shard
from bondsmith.model.tracing import gradient_only
from bondsmith.stages.moment import Moment
from bondsmith.stages.moments import BlockSeen, Load, block_device, block_inputs, input_moments
from bondsmith.stages.streams import Stream

_PIECE = 32  # tokens whose probabilities fit a cache
_TOGETHER = 2 * 2**30  # bytes that blocks which pass together may take


def collect_moments(
    runner: BlockRunner,
    load: Load,
    ids: Tensor,
    folder: Path,
    *,
    batch: int,
    blocks: int,
    seed: int | None,
    hybrids: bool = False,
    progress: Callable[[float], None],
) -> None:
    """Writes the moments of the first `blocks` blocks; with a `seed` of gradients those of all, and of the gradients at their outputs.

    Args:
        load, ids, hybrids: as of `output_moments`.
        progress: is called with the share that is done.
    """
    with torch.no_grad():
        width = runner.enter(ids[:1, :2]).shape[-1]
    last = blocks - 1 if seed is None else len(runner) - blocks_together(runner, load, ids, batch)
    streams = [Stream(folder / f"hidden-{k}", (*ids.shape, width)) for k in range(last + 1)]
    total = len(streams) + (blocks if seed is None else len(runner))
    steps = iter(range(1, total + 1))

    def advance() -> None:
        progress(next(steps) / total)

    block_inputs(runner, load, ids, streams, batch, advance)
    if seed is None:
        input_moments(runner, load, ids, streams, folder, batch=batch, advance=advance)
    else:
        output_moments(runner, load, ids, streams, folder, batch=batch, seed=seed, hybrids=hybrids, advance=advance)


@torch.no_grad()
def blocks_together(runner: BlockRunner, load: Load, ids: Tensor, batch: int) -> int:
    """Returns how many of the last blocks may pass forward and back in one go, at least one: their weights, moments and what a pass back
    through them keeps of a batch take 2 GB and a quarter of what is free at most.

    Every one of them saves a pass forward. What is kept is told from the first block, the rest from the largest.
    """
    (block,) = load(range(1))
    device, kept = block_device(block), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    window = runner.enter(ids[:1])
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        runner.block(0, ids[:1], window.detach().requires_grad_())
    largest = 0  # its weights and moments; known of blocks without weights, too, and the first may be the smallest
    for other in runner.blocks:
        sizes = [shape(m) for m in matrices(other).values()]
        weights = sum(p.numel() * p.element_size() for p in other.parameters())
        largest = max(largest, weights + sum(4 * (rows**2 + columns**2) for rows, columns in sizes))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(max(1, min(len(runner), min(_TOGETHER, free // 4) // (largest + batch * kept))))


@torch.enable_grad()
def output_moments(
    runner: BlockRunner,
    load: Load,
    ids: Tensor,
    streams: Sequence[Stream],
    folder: Path,
    *,
    batch: int,
    seed: int,
    hybrids: bool,
    advance: Callable[[], None],
) -> None:
    """Writes `folder/block-K.safetensors` with `B` and `C` of every matrix of block K, last blocks first.

    The loss is the divergence from the model itself: its curvature, the Fisher information, is sampled, so no data label enters.
    The blocks from the last of `streams` on pass forward and back in one go, and the head with them; those before one by one.
    Blocks that are written already are not computed again.

    Args:
        load: brings the weights of some blocks into the runner and returns them.
        ids: token windows, (windows, tokens).
        streams: hidden states that enter the first blocks, complete, up to those of the first block that goes together with the rest.
        hybrids: learn too what a network beside a rounded matrix is worth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gradients = [Stream(folder / f"gradient-{k}", s.shape) for k, s in enumerate(streams)]
    start = len(streams) - 1
    for blocks in (range(start, len(runner)), *(range(k, k + 1) for k in reversed(range(start)))):
        k, after = blocks.start, blocks.stop
        if not all((folder / f"block-{own}.safetensors").is_file() for own in blocks):
            end = _Head(runner, seed) if k == start else _Given(gradients[after])
            _pass_back(runner, load(blocks), k, ids, streams[k], end, gradients[k], folder, batch, hybrids)
        if k < start:
            gradients[after].remove()
        for _ in blocks:
            advance()
    if gradients[0].complete:
        entering = Moment(gradients[0].shape[-1])
        for first in range(0, len(ids), batch):
            entering.add(gradients[0].read(first, batch).flatten(0, 1))
        write_shard(folder / "embedding.safetensors", {"gradient": entering.mean("the gradient at the embedding")})
        gradients[0].remove()


@dataclass(frozen=True)
class _Given:
    """Gradients that were kept."""

    stream: Stream
    reads = False  # the hidden states themselves

    def gradient(self, first: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Returns the gradient at the hidden states of some windows."""
        return self.stream.read(first, len(ids)).to(hidden.device)

    def write(self, folder: Path) -> None:
        """Has nothing to write."""


class _Head:
    """Gradients at the last hidden states, drawn window by window, and the moments of the head."""

    reads = True

    def __init__(self, runner: BlockRunner, seed: int):
        self._runner, self._generator = runner, torch.Generator().manual_seed(seed)
        self._C: Moment | None = None
        self._weight: Tensor | None = None
        self._tokens = 0

    def gradient(self, first: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Returns a random gradient at the hidden states of some windows."""
        rows: list[Tensor] = []
        head = self._runner.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, -2)))
        found = []
        try:
            for own, states in zip(ids.split(1), hidden.detach().split(1), strict=True):
                gradient, spread = _head_gradient(self._runner, own, states.requires_grad_(), self._generator)
                self._C = self._C or Moment(rows[0].shape[-1], rows[0].device)
                self._C.add(rows.pop())
                self._weight = spread if self._weight is None else self._weight + spread
                found.append(gradient)
        finally:
            handle.remove()
        self._tokens += ids.numel()
        return torch.cat(found)

    def write(self, folder: Path) -> None:
        """Writes the moments."""
        assert self._C is not None
        assert self._weight is not None
        write_shard(
            folder / "head.safetensors", {"input": self._C.mean("the head"), "weight": self._weight / self._tokens}
        )


def _pass_back(
    runner: BlockRunner,
    blocks: Sequence[nn.Module],
    k: int,
    ids: Tensor,
    entering: Stream,
    end: _Given | _Head,
    into: Stream,
    folder: Path,
    batch: int,
    hybrids: bool,
) -> None:
    """Passes all windows through `blocks`, of which k is the first, and the gradients at their `end` back; writes their moments."""
    rows, seen = entering.read(0, 1), []
    for own, block in enumerate(blocks, k):
        seen.append(BlockSeen.of(runner, block, own, ids, rows, back=True))
        if block is not blocks[-1]:
            with torch.no_grad():
                rows = runner.block(own, ids[:1], rows.to(block_device(block)))
    batches = range(0, len(ids), batch)

    def back() -> Iterator[Tensor]:
        for first in batches:
            if hybrids and first and first == batches[len(batches) // 2]:
                for moment in (moment for block in seen for moment in block.B.values()):
                    moment.split()
            rows, ran = entering.read(first, batch), []
            for block in seen:
                ran.append(block.run(first, rows))
                rows = ran[-1][1].detach()
            gradient = end.gradient(first, ids[first : first + batch], rows)
            for block in reversed(seen):
                gradient = block.back(*ran.pop(), gradient)
            yield gradient

    unneeded = None if end.reads else seen[-1].unneeded(rows)
    with ExitStack() as stack:
        for block_seen in seen:
            stack.enter_context(block_seen.watched())
        if unneeded is not None:
            stack.enter_context(gradient_only(unneeded))
        into.write(back())
    end.write(folder)
    for block_seen in seen:
        block_seen.write(folder)


def _head_gradient(runner: BlockRunner, ids: Tensor, leaf: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns a random gradient at `leaf`, and the sum of `p (1 - p)` over the tokens, (V,)."""
    logits = runner.logits(ids, leaf).float()
    push, spread = torch.empty_like(logits), logits.new_zeros(logits.shape[-1])
    with torch.no_grad():
        for piece, into in zip(logits.split(_PIECE, 1), push.split(_PIECE, 1), strict=True):
            p = piece.softmax(-1)
            spread += p.sum((0, 1)) - p.square().sum((0, 1))
            into.copy_(signed_gradient(p, generator))
    return torch.autograd.grad(logits, leaf, push)[0], spread


def signed_gradient(p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a random gradient at logits of probabilities `p`, whose second moment is the Fisher information `diag(p) - p p^T`.

    It is that of `sum_v a_v log p_v` with `a = sqrt(p) s`, `s` random signs, and of mean zero, as that of a sampled label. But where the
    model is sure, a label gives nothing nearly always and much at times, and signs give a little every time.
    """
    push = p.sqrt().mul_(_signs(p.shape, generator).to(p.device))
    return push.addcmul_(p, push.sum(-1, keepdim=True), value=-1)


def _signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Returns random signs, the same on every device, any two of a row independent: products of two signs out of few."""
    side = math.isqrt(shape[-1] - 1) + 1
    few = torch.randint(2, (*shape[:-1], 2 * side), generator=generator).to(torch.float32).mul_(2).sub_(1)
    return (few[..., :side, None] * few[..., None, side:]).flatten(-2)[..., : shape[-1]]
