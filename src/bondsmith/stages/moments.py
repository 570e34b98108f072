"""Second moments: of what a matrix reads (`C = E[x x^T]`) and of the loss gradient at what it gives (`B = E[g g^T]`).

Legend: `T` tokens, `I` in features, `O` out features. Hidden states stream from disk; one block of weights is resident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import BlockRunner, matrices, shape, weight
from bondsmith.model.checkpoint import write_json, write_shard
from bondsmith.model.source import ModelError
from bondsmith.model.tracing import (
    Group,
    HiddenBond,
    added_to_stream,
    capture_inputs,
    find_hidden_bonds,
    gradient_only,
    trace_groups,
)
from bondsmith.stages.moment import Moment, gradient_weights, stream_weights
from bondsmith.stages.streams import Stream
from bondsmith.tensor.hybrid import UnseenShares

_OVERFLOW = 1e18  # the square of an activation this large leaves float32 in a sum
_PIECE = 32  # tokens whose probabilities fit a cache
_FEW = 64  # tokens on which it is tried what a block does with what its matrices give


def block_inputs(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    batch: int,
    advance: Callable[[], None],
) -> None:
    """Fills `streams[k]` with the hidden states that enter block k (the last one: that leave the last block).

    Streams that are complete are not computed again.
    """

    def rows(k: int) -> Callable[[int], Tensor]:
        if k == 0:
            return lambda first: runner.enter(ids[first : first + batch])
        return lambda first: runner.block(
            k - 1, ids[first : first + batch], streams[k - 1].read(first, batch).to(ids.device)
        )

    for k, stream in enumerate(streams):
        if not stream.complete:
            block = load(k - 1) if k else None
            with torch.no_grad():
                stream.write(
                    _checked(rows(k), first, block, f"{runner.path}.{k - 1}") for first in range(0, len(ids), batch)
                )
        advance()


def _checked(rows: Callable[[int], Tensor], first: int, block: nn.Module | None, name: str) -> Tensor:
    """Returns the hidden states of a batch; ModelError names the matrix of `block` whose input overflows on the way to them."""
    out = rows(first)
    if block is None or float(out.abs().amax()) < _OVERFLOW:
        return out
    found: list[str] = []

    def watch(matrix: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not float(args[0].abs().amax()) < _OVERFLOW:
                found.append(matrix)

        return look

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in matrices(block).items()]
    try:
        rows(first)
    finally:
        for handle in handles:
            handle.remove()
    what = f"{name}.{found[0]}: the second moment of its input" if found else f"{name}: what leaves it"
    raise ModelError(f"{what} is not finite; an activation before it overflows")


@torch.enable_grad()
def output_moments(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    folder: Path,
    *,
    batch: int,
    seed: int,
    hybrids: bool,
    advance: Callable[[], None],
) -> None:
    """Writes `folder/block-K.safetensors` with `B` and `C` of every matrix of block K, last block first.

    The loss is the divergence from the model itself: its curvature, the Fisher information, is sampled, so no data label enters.
    Blocks that are written already are not computed again.

    Args:
        load: brings the weights of a block into the runner and returns it.
        ids: token windows, (windows, tokens).
        streams: hidden states at every block boundary, one more than there are blocks, complete.
        hybrids: learn too what a network beside a rounded matrix is worth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gradients = [Stream(folder / f"gradient-{k}", s.shape) for k, s in enumerate(streams)]
    if not gradients[-1].complete and not (folder / "block-0.safetensors").is_file():
        gradients[-1].write(_head_gradients(runner, ids, streams[-1], folder, seed))
    for k in reversed(range(len(runner))):
        if not (folder / f"block-{k}.safetensors").is_file():
            _block_moments(runner, load(k), k, ids, streams, gradients, folder, batch, hybrids)
        gradients[k + 1].remove()
        advance()
    if gradients[0].complete:
        entering = Moment(gradients[0].shape[-1])
        for first in range(0, len(ids), batch):
            entering.add(gradients[0].read(first, batch).flatten(0, 1))
        write_shard(folder / "embedding.safetensors", {"gradient": entering.mean("the gradient at the embedding")})
        gradients[0].remove()


def _head_gradients(runner: BlockRunner, ids: Tensor, hidden: Stream, folder: Path, seed: int) -> Iterator[Tensor]:
    """Yields the gradient at the last hidden states, window by window; at the end writes the moments of the head."""
    generator = torch.Generator().manual_seed(seed)
    head = runner.model.get_output_embeddings()
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    C: Moment | None = None
    weight: Tensor | None = None
    try:
        for first in range(len(ids)):
            leaf = hidden.read(first, 1).to(ids.device).requires_grad_()
            gradient, spread = _head_gradient(runner, ids[first : first + 1], leaf, generator)
            rows = seen.pop()
            C = C or Moment(rows.shape[-1], rows.device)
            C.add(rows)
            weight = spread if weight is None else weight + spread
            yield gradient
    finally:
        handle.remove()
    assert C is not None
    assert weight is not None
    write_shard(folder / "head.safetensors", {"input": C.mean("the head"), "weight": weight / ids.numel()})


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


def input_moments(
    runner: BlockRunner,
    load: Callable[[int], nn.Module],
    ids: Tensor,
    streams: Sequence[Stream],
    folder: Path,
    *,
    batch: int,
    advance: Callable[[], None],
) -> None:
    """Writes what `output_moments` does without `B`, for the blocks that `streams` enter: no pass back is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(min(len(runner), len(streams))):
        if not (folder / f"block-{k}.safetensors").is_file():
            with torch.no_grad():
                seen = _BlockSeen.of(runner, load(k), k, ids, streams[k])
                for first in range(0, len(ids), batch):
                    seen.add(*seen.run(first, streams[k].read(first, batch)))
            seen.write(folder, {})
            del seen  # before the next block comes
        advance()


@dataclass(frozen=True, eq=False)
class _BlockSeen:
    """Runs a block over windows and keeps the moments of what its matrices read, and the weights of the tokens in them."""

    runner: BlockRunner
    block: nn.Module
    k: int
    ids: Tensor
    groups: list[Group]
    bonds: list[HiddenBond]
    C: list[Moment]
    weights: dict[str, list[Tensor]]

    @classmethod
    def of(cls, runner: BlockRunner, block: nn.Module, k: int, ids: Tensor, entering: Stream) -> _BlockSeen:
        device = block_device(block)
        with torch.no_grad():
            rows = entering.read(0, 1).to(device)
            groups = trace_groups(block, partial(runner.block, k, ids[:1], rows))
            bonds = find_hidden_bonds(block, groups, partial(runner.block, k, ids[:1, :_FEW], rows[:, :_FEW]))
        return cls(runner, block, k, ids, groups, bonds, [Moment(g.in_features, device) for g in groups], {})

    def unneeded(self, entering: Stream) -> nn.Module | None:
        """Returns the matrix whose output nothing else in the block reads, and which the block adds to what leaves it; None without one."""
        if not self.groups or not self.groups[-1].last:
            return None
        rows = entering.read(0, 1)[:, :_FEW].to(block_device(self.block))
        run = partial(self.runner.block, self.k, self.ids[:1, :_FEW], rows)
        name = self.groups[-1].names[0]
        return self.block.get_submodule(name) if name in added_to_stream(self.block, self.groups, rows, run) else None

    def run(self, first: int, rows: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Runs some windows; returns what entered the block, on its device, what leaves it, and what each group reads."""
        leaf = rows.to(block_device(self.block))
        if torch.is_grad_enabled():
            leaf.requires_grad_()
        with capture_inputs(self.block, self.groups) as seen:
            out = self.runner.block(self.k, self.ids[first : first + len(rows)], leaf)
        return leaf, out, seen

    def add(
        self, leaf: Tensor, out: Tensor, seen: Mapping[int, Tensor], squares: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Adds what `run` returned to the moments; `squares` of the loss gradients at the outputs of every matrix, (T,), weigh tokens.

        Returns the weights, (T,), by the name of each matrix whose gradients gave some.
        """
        given: dict[str, Tensor] = {}
        weights: Tensor | None
        for position, read in seen.items():
            group = self.groups[position]
            if squares and group.every_token:
                weights = gradient_weights([squares[name] for name in group.names])
                self.weights.setdefault(group.names[0], []).append(weights.view(out.shape[:-1]))
                given |= dict.fromkeys(group.names, weights)
            else:
                weights = stream_weights(group, leaf.detach(), out.detach())
            self.C[position].add(read, weights)
        return given

    def write(self, folder: Path, found: dict[str, Tensor]) -> None:
        """Writes the moments, `found` among them, and the structure of the block."""
        pairs = zip(self.groups, self.C, strict=True)
        found |= {f"input.{g.names[0]}": m.mean(g.names[0]) for g, m in pairs if m.seen}
        found |= {f"weights.{name}": torch.cat(parts) for name, parts in self.weights.items()}
        inputs = {name: g.names[0] for g in self.groups for name in g.names}
        structure = {"inputs": inputs, "bonds": [asdict(b) for b in self.bonds]}
        write_json(folder / f"structure-{self.k}.json", structure)
        write_shard(folder / f"block-{self.k}.safetensors", found)


def _block_moments(
    runner: BlockRunner,
    block: nn.Module,
    k: int,
    ids: Tensor,
    streams: Sequence[Stream],
    gradients: list[Stream],
    folder: Path,
    batch: int,
    hybrids: bool,
) -> None:
    seen = _BlockSeen.of(runner, block, k, ids, streams[k])
    table = matrices(block)
    B = {name: _OutputMoment(m, block_device(block)) for name, m in table.items()}
    handles = [m.register_forward_hook(_watch_gradient(B[name])) for name, m in table.items()]

    def back() -> Iterator[Tensor]:
        batches = range(0, len(ids), batch)
        for first in batches:
            if hybrids and first and first == batches[len(batches) // 2]:
                for moment in B.values():
                    moment.split()
            leaf, out, read = seen.run(first, streams[k].read(first, batch))
            gradient = torch.autograd.grad(out, leaf, gradients[k + 1].read(first, batch).to(out.device))[0]
            weights = seen.add(leaf, out, read, {name: m.squares for name, m in B.items() if m.came})
            for name, moment in B.items():
                moment.take(weights.get(name))
            yield gradient

    unneeded = seen.unneeded(streams[k])
    try:
        with gradient_only(unneeded) if unneeded else nullcontext():
            gradients[k].write(back())
    finally:
        for handle in handles:
            handle.remove()
    found = {f"output.{name}": m.mean(name) for name, m in B.items() if m.seen}
    found |= {f"left.{name}": m.shares.left() for name, m in B.items() if m.shares is not None}
    seen.write(folder, found)


class _OutputMoment:
    """`B` of a matrix: `E[g g^T / w]` where the group's tokens have weights `w`, with the trace of `E[g g^T]`.

    Once `split`, later rows also judge what the leading directions of the earlier ones are worth to a hybrid.
    """

    def __init__(self, matrix: nn.Module, device: torch.device):
        self.matrix = matrix
        self.came: list[Tensor] = []
        self.shares: UnseenShares | None = None
        self._moment = Moment(shape(matrix)[0], device)
        self._squares = 0.0

    @property
    def seen(self) -> bool:
        """True once there was a row."""
        return self._moment.seen

    @property
    def squares(self) -> Tensor:
        """Of the norms of the rows that came last, (T,)."""
        return torch.linalg.vector_norm(self.came[-1], dim=1).square()

    def take(self, weights_T: Tensor | None) -> None:
        """Adds the rows that came, those of tokens with weights over their roots."""
        for rows in self.came:
            self._squares += float(torch.linalg.vector_norm(rows)) ** 2
            own = rows if weights_T is None else rows / weights_T.sqrt()[:, None]
            self._moment.add(own)
            if self.shares is not None:
                self.shares.see(own)
        self.came.clear()

    def split(self) -> None:
        """Chooses the directions."""
        if self.seen:
            W = weight(self.matrix)
            self.shares = UnseenShares(self._moment.mean("gradients"), W.amax(1) - W.amin(1))

    def mean(self, name: str) -> Tensor:
        """Returns `B`, (O, O); ModelError as `Moment.mean`."""
        B = self._moment.mean(name)
        return B * (self._squares / self._moment.weight / max(float(B.trace()), 1e-300))


def _watch_gradient(moment: _OutputMoment) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: moment.came.append(g.reshape(-1, g.shape[-1])))

    return hook


def block_device(block: nn.Module) -> torch.device:
    """Returns the device that the weights of a block are on."""
    return next(block.parameters()).device
