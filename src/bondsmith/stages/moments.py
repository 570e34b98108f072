"""Second moments: of what a matrix reads (`C = E[x x^T]`) and of the loss gradient at what it gives (`B = E[g g^T]`).

Here are those of one block, and what is read alone; `gradients.py` passes gradients back.

Legend: `T` tokens, `I` in features, `O` out features. Hidden states stream from disk; one block of weights is resident.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    trace_groups,
)
from bondsmith.stages.moment import Moment, gradient_weights, means_of, stream_weights
from bondsmith.stages.streams import Stream
from bondsmith.tensor.hybrid import UnseenShares

log = logging.getLogger("bondsmith")

_OVERFLOW = 1e18  # the square of an activation this large leaves float32 in a sum
_FEW = 64  # tokens on which it is tried what a block does with what its matrices give

Load = Callable[[range], list[nn.Module]]


def block_inputs(
    runner: BlockRunner,
    load: Load,
    ids: Tensor,
    streams: Sequence[Stream],
    batch: int,
    advance: Callable[[], None],
) -> None:
    """Fills `streams[k]` with the hidden states that enter block k (one more than there are blocks: that leave the last).

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
            block = load(range(k - 1, k))[0] if k else None
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


def input_moments(
    runner: BlockRunner,
    load: Load,
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
                seen = BlockSeen.of(runner, load(range(k, k + 1))[0], k, ids, streams[k].read(0, 1))
                for first in range(0, len(ids), batch):
                    seen.add(*seen.run(first, streams[k].read(first, batch)))
            seen.write(folder)
            del seen  # before the next block comes
        advance()


@dataclass(frozen=True, eq=False)
class BlockSeen:
    """Runs a block over windows and keeps the moments of what its matrices read, and the weights of the tokens in them."""

    runner: BlockRunner
    block: nn.Module
    k: int
    ids: Tensor
    groups: list[Group]
    bonds: list[HiddenBond]
    C: list[Moment]
    B: dict[str, _OutputMoment]
    weights: dict[str, list[Tensor]]

    @classmethod
    def of(
        cls, runner: BlockRunner, block: nn.Module, k: int, ids: Tensor, rows: Tensor, back: bool = False
    ) -> BlockSeen:
        """Returns one that has seen nothing; `rows`, those of the first window, tell what the block is made of.

        With `back` it has moments for the gradients of a pass back, too.
        """
        device = block_device(block)
        with torch.no_grad():
            rows = rows.to(device)
            groups = trace_groups(block, partial(runner.block, k, ids[:1], rows))
            bonds = find_hidden_bonds(block, groups, partial(runner.block, k, ids[:1, :_FEW], rows[:, :_FEW]))
        C = [Moment(g.in_features, device) for g in groups]
        B = {name: _OutputMoment(m, device) for name, m in matrices(block).items()} if back else {}
        return cls(runner, block, k, ids, groups, bonds, C, B, {})

    def unneeded(self, rows: Tensor) -> nn.Module | None:
        """Returns the matrix whose output nothing else in the block reads, and which the block adds to what leaves it; None without one."""
        if not self.groups or not self.groups[-1].last:
            return None
        rows = rows[:, :_FEW].to(block_device(self.block))
        run = partial(self.runner.block, self.k, self.ids[:1, :_FEW], rows)
        name = self.groups[-1].names[0]
        return self.block.get_submodule(name) if name in added_to_stream(self.block, self.groups, rows, run) else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The gradients at the outputs of all matrices come to `B` meanwhile."""
        table = matrices(self.block)
        handles = [table[name].register_forward_hook(_watch_gradient(moment)) for name, moment in self.B.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    def back(self, leaf: Tensor, out: Tensor, seen: Mapping[int, Tensor], gradient: Tensor) -> Tensor:
        """Passes a gradient back through what `run` returned, and adds it to the moments; returns the gradient at what entered."""
        found = torch.autograd.grad(out, leaf, gradient)[0]
        weights = self.add(leaf, out, seen, {name: m.squares for name, m in self.B.items() if m.came})
        for name, moment in self.B.items():
            moment.take(weights.get(name))
        return found

    def write(self, folder: Path) -> None:
        """Writes the moments and the structure of the block."""
        means = means_of(self.groups, self.C)
        found = {f"output.{name}": B for name, B in self._outputs().items()}
        found |= {f"left.{name}": m.shares.left() for name, m in self.B.items() if m.shares is not None}
        found |= {f"input.{g.names[0]}": C for g, C in zip(self.groups, means, strict=True) if C is not None}
        found |= {f"weights.{name}": torch.cat(parts) for name, parts in self.weights.items()}
        inputs = {name: g.names[0] for g in self.groups for name in g.names}
        structure = {"inputs": inputs, "bonds": [asdict(b) for b in self.bonds]}
        write_json(folder / f"structure-{self.k}.json", structure)
        write_shard(folder / f"block-{self.k}.safetensors", found)

    def _outputs(self) -> dict[str, Tensor]:
        """`B` by matrix. An expert counts as often as tokens were sent to it; one that none was sent to counts as one like the others."""
        tokens = self.ids.numel()
        found = {name: m.mean(name, tokens) for name, m in self.B.items() if m.seen}
        unseen = [name for group in self.groups if group.expert for name in group.names if name in self.B]
        for name in [name for name in unseen if name not in found]:
            leaf, rows = name.rpartition(".")[2], self.B[name].rows
            alike = [n for n in found if n.rpartition(".")[2] == leaf and len(found[n]) == rows]
            if alike:
                total = sum((found[n] for n in alike[1:]), found[alike[0]].clone())
                found[name] = total / sum(self.B[n].count for n in alike)
        return found


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
    def count(self) -> float:
        """Of the rows."""
        return self._moment.weight

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return shape(self.matrix)[0]

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

    def mean(self, name: str, tokens: int) -> Tensor:
        """Returns `B`, (O, O), per token of the model, of which this matrix may have seen some; ModelError as `Moment.mean`.

        The identity, by which a plan keeps the matrix, where no gradient came: it may matter to longer or other text.
        """
        B = self._moment.mean(name)
        if not self._squares:
            log.warning(
                "%s: no gradient reached it on the calibration text, which so does not say what it is worth", name
            )
            return B
        return B * (self._squares / tokens / float(B.trace()))


def _watch_gradient(moment: _OutputMoment) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: moment.came.append(g.reshape(-1, g.shape[-1])))

    return hook


def block_device(block: nn.Module) -> torch.device:
    """Returns the device that the weights of a block are on."""
    return next(block.parameters()).device
