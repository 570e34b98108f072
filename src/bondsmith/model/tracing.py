"""What the matrices of a block do, found by running it: which read one input, write into the residual stream, share hidden channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bondsmith.model.blocks import matrices, shape, weight
from bondsmith.nn.experts import all_tokens, routed


@dataclass(frozen=True)
class Group:
    """Matrices of a block that read the same input, in call order.

    Attributes:
        names: their names inside the block.
        in_features: width of the input.
        writes: True where the output goes into the residual stream (attention output, MLP output).
        last: True for the last group of the block.
        every_token: True where the input has one row per token; experts of a mixture see only some.
        expert: path of the expert of a mixture that the matrices belong to, with a dot at its end, else empty.
    """

    names: tuple[str, ...]
    in_features: int
    writes: bool
    last: bool
    every_token: bool
    expert: str = ""


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
        with all_tokens(block):
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
    table, mixtures = matrices(block), routed(block)

    def expert(name: str) -> str:
        path = next((path for path in mixtures if name.startswith(path)), None)
        return "" if path is None else path + name.removeprefix(path).partition(".")[0] + "."

    return [
        Group(
            tuple(names),
            seen.shape[-1],
            writes=i > 0 and len(names) == 1 and shape(table[names[0]])[0] == width,
            last=i == len(shared) - 1,
            every_token=seen.shape[:-1].numel() == tokens and not expert(names[0]),
            expert=expert(names[0]),
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

    It is tried: with every other channel dropped, the others must reach the reader as before, and the block give what it gives when the
    reader takes nothing from those. An MLP passes, attention does not, nor does what has parameters for every channel between writers
    and reader (convolutions, norms).
    """
    found: list[HiddenBond] = []
    of_experts: dict[tuple[str, str, int], HiddenBond | None] = {}
    for i, group in enumerate(groups):
        if len(group.names) > 1:
            continue
        inner = group.names[0].removeprefix(group.expert)
        kind = group.expert.rstrip(".").rpartition(".")[0], inner, group.in_features  # experts of a mixture are alike
        if not group.expert or kind not in of_experts:
            bond = _bond_to(block, group, groups[:i], run)
            if bond and group.expert:
                bond = HiddenBond(tuple(n.removeprefix(group.expert) for n in bond.writers), inner, bond.channels)
            of_experts[kind] = bond
        if (bond := of_experts[kind]) is not None:
            found.append(bond.inside(group.expert))
    return found


def _bond_to(block: nn.Module, group: Group, earlier: list[Group], run: Callable[[], Tensor]) -> HiddenBond | None:
    """Returns the bond from matrices of an earlier group to `group`, tried from the nearest on."""
    table = matrices(block)
    for before in reversed(earlier):
        alike = (group.every_token and before.every_token) or (group.expert and group.expert == before.expert)
        fit = [name for name in before.names if shape(table[name])[0] % group.in_features == 0]
        if not alike or not fit:
            continue
        if len(fit) > 1:
            fit = _reaching(block, fit, group, run)
        bond = HiddenBond(tuple(fit), group.names[0], group.in_features)
        if fit and _channels_are_apart(block, bond, group, run):
            return bond
    return None


def _tried(
    block: nn.Module, group: Group, modules: dict[str, nn.Linear], run: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns what `group` reads and what leaves the block with some of its matrices replaced meanwhile."""
    originals = {name: block.get_submodule(name) for name in modules}
    for name, module in modules.items():
        block.set_submodule(name, module)
    try:
        with capture_inputs(block, [group]) as seen, all_tokens(block):
            out = run()
    finally:
        for name, original in originals.items():
            block.set_submodule(name, original)
    return seen[0], out


def _reaching(block: nn.Module, names: list[str], group: Group, run: Callable[[], Tensor]) -> list[str]:
    """Returns those of the matrices on which depends what `group` reads."""
    plain, _ = _tried(block, group, {}, run)
    found = []
    for name in names:
        handle = block.get_submodule(name).register_forward_hook(lambda _, args, out: out / 2)
        try:
            changed, _ = _tried(block, group, {}, run)
        finally:
            handle.remove()
        if not torch.equal(changed, plain):
            found.append(name)
    return found


def _channels_are_apart(block: nn.Module, bond: HiddenBond, group: Group, run: Callable[[], Tensor]) -> bool:
    if bond.channels < 2:
        return False
    table, columns = matrices(block), slice(0, None, 2)
    even = torch.arange(bond.channels)[columns]

    def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = torch.zeros_like(args[0])
        kept[..., columns] = args[0][..., columns]
        return kept, *args[1:]

    handle = table[bond.reader].register_forward_pre_hook(silence)
    try:
        whole, out = _tried(block, group, {}, run)
    finally:
        handle.remove()
    narrow = {}
    for name in bond.writers:
        rows = columns if bond.channels % 2 == 0 else bond.rows(even, shape(table[name])[0])
        narrow[name] = _part(table[name], rows)
    narrow[bond.reader] = _part(table[bond.reader], columns=columns)
    try:
        found = _tried(block, group, narrow, run)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # something counts on all channels
        return False
    return _alike(found[0], whole[:, columns]) and _alike(found[1], out)


def _alike(a: Tensor, b: Tensor) -> bool:
    within = torch.finfo(b.dtype).eps ** 0.7  # 1e-5 in float32: sums of other lengths round differently
    return a.shape == b.shape and bool(((a - b).abs() <= within * b.abs().max()).all())


def _part(matrix: nn.Module, rows: Tensor | slice = slice(None), columns: slice = slice(None)) -> nn.Linear:
    """Returns some rows and columns of a matrix as a module; they are a view of its weight where `rows` is a slice."""
    part, bias = weight(matrix)[rows, columns], matrix.bias
    linear = nn.Linear(part.shape[1], part.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(part, requires_grad=False)
    if bias is not None:
        assert isinstance(bias, Tensor)
        linear.bias = nn.Parameter(bias[rows], requires_grad=False)
    return linear


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
        if given:
            rest = leaving - entering - given[0].view_as(leaving)
            if rest.norm() <= 1e-3 * given[0].norm() + 1e-6 * entering.norm():
                found.add(name)
    return found


@contextmanager
def gradient_only(matrix: nn.Module) -> Iterator[None]:
    """Has `matrix` give zeros meanwhile, with the gradient of what it would have given: for outputs that are only added to others.

    A pass back through a block needs no product with its last matrix on the way forward.
    """
    matrix.forward = lambda rows: _GradientOnly.apply(rows, weight(matrix))
    try:
        yield
    finally:
        del matrix.forward  # that of its class comes back


class _GradientOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return rows.new_zeros(*rows.shape[:-1], len(W))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return gradient @ W, None


class _ReachedError(Exception):
    """The matrix whose input was wanted has been called."""


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
