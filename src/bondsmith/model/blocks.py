"""Find the decoder blocks of any causal language model, and their matrices, by structure; run one block at a time.

A decoder block is an entry of the longest `ModuleList` of modules that contain linear layers; no architecture is named here.
The model's own `forward` stays the driver: `BlockRunner` lets it prepare masks and position tables, passes hidden states through
the blocks that are not wanted, and stops it after the one that is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bondsmith.model.source import ModelError


def find_blocks(model: nn.Module) -> str:
    """Returns the path of the `ModuleList` of decoder blocks: the longest outermost one whose entries hold linear layers."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and not inner and len(module) and all(matrices(m) for m in module):
            found[path] = module
    if not found:
        raise ModelError(f"{type(model).__name__}: no list of blocks with linear layers was found in it")
    return max(found, key=lambda path: (len(found[path]), sum(p.numel() for p in found[path].parameters())))


def matrices(block: nn.Module) -> dict[str, nn.Module]:
    """Returns the weight matrices of a block by their names inside it: its `nn.Linear` and `Conv1D` modules."""
    return {name: m for name, m in block.named_modules() if name and isinstance(m, nn.Linear | Conv1D)}


def shape(matrix: nn.Module) -> tuple[int, int]:
    """Returns (out features, in features); transformers' `Conv1D` stores its weight the other way round."""
    rows, columns = _stored(matrix).shape
    return (columns, rows) if isinstance(matrix, Conv1D) else (rows, columns)


def weight(matrix: nn.Module) -> Tensor:
    """Returns the weight as (out features, in features)."""
    return _stored(matrix).T if isinstance(matrix, Conv1D) else _stored(matrix)


@contextmanager
def replaced_weight(matrix: nn.Module, new: Tensor) -> Iterator[None]:
    """Has `new`, (out features, in features), as the weight of `matrix` meanwhile; modules that share the parameter see it too."""
    parameter = matrix.weight
    assert isinstance(parameter, nn.Parameter)
    old = parameter.data
    parameter.data = new.T.contiguous() if isinstance(matrix, Conv1D) else new
    try:
        yield
    finally:
        parameter.data = old


def _stored(matrix: nn.Module) -> Tensor:
    stored = matrix.weight
    assert isinstance(stored, Tensor)
    return stored


class _StopError(Exception):
    """The hidden state that was wanted is there; the rest of the forward pass is not needed."""


class _Gate(nn.Module):
    """Stands in the block list for a block: calls `act` on the hidden state, and passes attribute look-ups on."""

    def __init__(self, block: nn.Module, act: Callable[[Tensor, Callable[[Tensor], Any]], Any]):
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: state dicts and .to() must not see it twice
        self._act = act

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        hidden = kwargs.pop("hidden_states") if by_name else args[0]

        def run(value: Tensor) -> Any:
            return self._block(hidden_states=value, **kwargs) if by_name else self._block(value, *args[1:], **kwargs)

        return self._act(hidden, run)


class BlockRunner:
    """Runs a causal language model block by block: `enter`, then `block(0)`, `block(1)`, ..., then `logits`.

    Only the embedding, the block that runs and the head need weights; the others may stay on the meta device.
    Hidden states are (windows, tokens, width); input ids (windows, tokens), without padding.
    """

    def __init__(self, model: PreTrainedModel, path: str | None = None):
        self.model = model
        self.path = path or find_blocks(model)
        self._tuples = False

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.model.get_submodule(self.path)
        return blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self, ids: Tensor) -> Tensor:
        """Returns the hidden state that goes into the first block."""
        kept: list[Tensor] = []

        def act(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            kept.append(hidden)
            raise _StopError

        self._drive(ids, {0: act})
        return kept[0]

    def block(self, index: int, ids: Tensor, hidden: Tensor, module: nn.Module | None = None) -> Tensor:
        """Returns the hidden state after block `index`, or after `module` in its place, for `hidden` going in."""
        kept: list[Tensor] = []

        def act(arrived: Tensor, run: Callable[[Tensor], Any]) -> Any:
            if arrived.shape != hidden.shape:
                raise _WrongReturnError
            out = run(hidden)
            self._tuples = isinstance(out, tuple)
            kept.append(out[0] if isinstance(out, tuple) else out)
            raise _StopError

        try:
            self._drive(ids, {index: act}, {index: module} if module is not None else {})
        except _WrongReturnError:  # the model indexes what its blocks return
            self._tuples = not self._tuples
            self._drive(ids, {index: act}, {index: module} if module is not None else {})
        return kept[0]

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Returns the logits (windows, tokens, vocabulary) for the hidden state after the last block."""

        def act(arrived: Tensor, run: Callable[[Tensor], Any]) -> Any:
            return (hidden,) if self._tuples else hidden

        out: Tensor = self._drive(ids, {len(self) - 1: act}).logits
        return out

    def _drive(self, ids: Tensor, acts: dict[int, Any], modules: dict[int, nn.Module] | None = None) -> Any:
        with self._gates(acts, modules or {}):
            try:
                return self.model(input_ids=ids, use_cache=False)
            except _StopError:
                return None

    @contextmanager
    def resuming(self, index: int, folder: Path) -> Iterator[None]:
        """Lets the model's own forward passes start at block `index` meanwhile, for token ids that it has seen meanwhile.

        The hidden states that enter the block wait in `folder`. For a model in memory whose blocks before `index` do not change. Passes
        that keep keys and values (generation) or have a mask run from the start.
        """
        known: dict[bytes, Path] = {}
        key: bytes | None = None

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal key
            ids = args[0] if args else kwargs.get("input_ids")
            plain = kwargs.get("use_cache") is False and kwargs.get("attention_mask") is None
            known_by = (
                f"{tuple(ids.shape)}".encode() + ids.cpu().numpy().tobytes() if plain and ids is not None else None
            )
            key = known_by and hashlib.sha256(known_by).digest()

        def before(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            if key in known:
                return (hidden,) if self._tuples else hidden
            out = run(hidden)
            self._tuples = isinstance(out, tuple)
            return out

        def at(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            if key in known:
                return run(torch.load(known[key]).to(hidden.device))
            if key is not None and index:
                known[key] = folder / f"hidden-{len(known)}.pt"
                torch.save(hidden.cpu(), known[key])
            return run(hidden)

        acts: dict[int, Any] = {i: lambda hidden, run: run(hidden) for i in range(len(self))}
        acts |= dict.fromkeys(range(index), before) | {index: at}
        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self._gates(acts, {}):
                yield
        finally:
            handle.remove()
            for path in known.values():
                path.unlink(missing_ok=True)

    @contextmanager
    def _gates(self, acts: dict[int, Any], modules: dict[int, nn.Module]) -> Iterator[None]:
        blocks = self.blocks
        originals = list(blocks)

        def passing(hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
            return (hidden,) if self._tuples else hidden

        try:
            for i, original in enumerate(originals):
                blocks[i] = _Gate(modules.get(i, original), acts.get(i, passing))
            yield
        finally:
            for i, original in enumerate(originals):
                blocks[i] = original


class _WrongReturnError(Exception):
    """A block's stand-in returned a tensor where the model expects a tuple, or the other way round."""


@dataclass(frozen=True)
class Group:
    """Matrices of a block that read the same input, in call order.

    Attributes:
        names: their names inside the block.
        in_features: width of the input.
        writes: True where the output goes into the residual stream (attention output, MLP output).
        last: True for the last group of the block.
        every_token: True where the input has one row per token; experts of a mixture see only some.
    """

    names: tuple[str, ...]
    in_features: int
    writes: bool
    last: bool
    every_token: bool


def trace_groups(block: nn.Module, run: Callable[[], Tensor]) -> list[Group]:
    """Returns the groups of a block in call order, found by running it once; `run` gives the hidden state that leaves it.

    A matrix writes into the residual stream when it is alone on its input, gives the stream's width back and is not the first.
    """
    calls: list[tuple[str, Tensor]] = []
    handles = [
        matrix.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
        for name, matrix in matrices(block).items()
    ]
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    width, tokens = out.shape[-1], out.shape[:-1].numel()
    shared: list[tuple[list[str], Tensor]] = []
    for name, seen in calls:
        group = next((names for names, other in shared if other is seen or _same(other, seen)), None)
        if group is None:
            shared.append(([name], seen))
        elif name not in group:
            group.append(name)
    table = matrices(block)
    return [
        Group(
            tuple(names),
            seen.shape[-1],
            writes=i > 0 and len(names) == 1 and shape(table[names[0]])[0] == width,
            last=i == len(shared) - 1,
            every_token=seen.shape[:-1].numel() == tokens,
        )
        for i, (names, seen) in enumerate(shared)
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


@dataclass(frozen=True)
class HiddenBond:
    """The hidden channels between matrices of a block: `writers` give them, an elementwise function passes them on, `reader` takes them.

    A writer has `channels` rows, or a multiple where several are fused into one (gate and up).
    """

    writers: tuple[str, ...]
    reader: str
    channels: int

    def inside(self, prefix: str) -> HiddenBond:
        """Returns the bond with `prefix` before all names."""
        return HiddenBond(tuple(prefix + name for name in self.writers), prefix + self.reader, self.channels)

    def rows(self, kept: Tensor, out_features: int) -> Tensor:
        """Returns the rows of a writer of `out_features` rows that belong to the `kept` channels."""
        copies = out_features // self.channels
        return torch.cat([kept + copy * self.channels for copy in range(copies)])


@torch.no_grad()
def find_hidden_bonds(block: nn.Module, groups: list[Group], run: Callable[[], Tensor]) -> list[HiddenBond]:
    """Returns the bonds of a block whose channels can be dropped one by one; `run` gives the hidden state that leaves it.

    That a channel reaches only its own column of the reader's input is tried: every other one is scaled in the writers, and the rest
    must stay as it was. An MLP passes, attention does not.
    """
    found = []
    for before, group in pairwise(groups):
        reader, table = group.names[0], matrices(block)
        sizes = [shape(table[name])[0] for name in before.names]
        alone = len(group.names) == 1 and group.every_token and before.every_token
        if alone and all(size % group.in_features == 0 for size in sizes):
            bond = HiddenBond(before.names, reader, group.in_features)
            if _channels_are_apart(block, bond, group, run):
                found.append(bond)
    return found


def _channels_are_apart(block: nn.Module, bond: HiddenBond, group: Group, run: Callable[[], Tensor]) -> bool:
    odd = torch.arange(1, bond.channels, 2)
    if not len(odd):
        return False
    writers = [block.get_submodule(name) for name in bond.writers]
    rows = [bond.rows(odd, shape(m)[0]) for m in writers]
    with capture_inputs(block, [group]) as seen:
        run()
        plain = seen[0].clone()
        saved = [weight(m)[r].clone() for m, r in zip(writers, rows, strict=True)]
        for m, r in zip(writers, rows, strict=True):
            weight(m)[r] *= 1.5
        try:
            run()
            scaled = seen[0]
        finally:
            for m, r, values in zip(writers, rows, saved, strict=True):
                weight(m)[r] = values
    changed = (scaled - plain).abs().amax(0) > 1e-5 * plain.abs().max()
    return not changed[::2].any() and bool(changed[1::2].any())


class _ReachedError(Exception):
    """The matrix whose input was wanted has been called."""


@torch.no_grad()
def added_to_stream(block: nn.Module, groups: list[Group], entering: Tensor, run: Callable[[], Tensor]) -> set[str]:
    """Returns the matrices whose output is added, as it is, to the hidden states that enter a block; of Gemma's none is.

    Tested by running the block: with all others of them silent, what leaves it is what entered and what the matrix gave.
    """
    writers = [g.names[0] for g in groups if g.writes and g.every_token]
    found = set()
    for name in writers:
        given: list[Tensor] = []

        def silence(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return torch.zeros_like(out)

        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, given: list[Tensor] = given) -> None:
            given.append(out)

        with ExitStack() as stack:
            for other in writers:
                hook = keep if other == name else silence
                stack.callback(block.get_submodule(other).register_forward_hook(hook).remove)
            leaving = run()
        if (
            given
            and (leaving - entering - given[0].view_as(leaving)).norm()
            <= 1e-3 * given[0].norm() + 1e-6 * entering.norm()
        ):
            found.add(name)
    return found


@contextmanager
def capture_inputs(block: nn.Module, groups: list[Group], *, stop: bool = False) -> Iterator[dict[int, Tensor]]:
    """Collects the inputs of groups, (tokens, features), while a block runs: yields {position in `groups`: input}.

    With `stop`, the pass ends as soon as the last of them is there.
    """
    seen: dict[int, Tensor] = {}
    handles = []

    def hook(position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[position] = args[0].detach().reshape(-1, args[0].shape[-1])
            if stop and len(seen) == len(groups):
                raise _ReachedError

        return keep

    for position, group in enumerate(groups):
        handles.append(block.get_submodule(group.names[0]).register_forward_pre_hook(hook(position)))
    try:
        yield seen
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
