"""Experts of a mixture with matrices of their own, in the place of a module that keeps all of them in tensors of three dimensions.

transformers describes such modules alike in all families: `gate_up_proj` (or `up_proj`) and `down_proj` with the experts in front, whether
they lie transposed, whether gate and up are halves or alternate, whether there are biases, and `_apply_gate`, what is done between them.

Legend: `T` tokens, `H` hidden size, `I` channels of an expert, `E` experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class Expert(nn.Module):
    """`down(gate(x) and up(x) combined)`; `gate_proj` is None in models without gates."""

    gate_proj: nn.Linear | None

    def __init__(self, shape: tuple[int, int], gated: bool, bias: bool, **factory: Any) -> None:
        super().__init__()
        channels, hidden = shape
        self.gate_proj = nn.Linear(hidden, channels, bias, **factory) if gated else None
        self.up_proj = nn.Linear(hidden, channels, bias, **factory)
        self.down_proj = nn.Linear(channels, hidden, bias, **factory)


class SplitExperts(nn.ModuleList):
    """What a fused module does, expert by expert; `fused` is one, and gives class and settings, not weights.

    `forward` takes hidden states `(T, H)` and, of every token, the experts chosen and their weights, `(T, chosen)`; returns `(T, H)`.
    """

    def __init__(self, fused: nn.Module, **factory: Any) -> None:
        shell: Any = copy.copy(fused)
        shell._parameters = dict.fromkeys(fused._parameters)
        count, shape = _sizes(fused)
        super().__init__(Expert(shape, shell.has_gate, shell.has_bias, **factory) for _ in range(count))
        self._shell = (shell,)  # in a tuple: no submodule
        self._sees_all = False

    @property
    def share(self) -> float:
        """Of the experts that a token is sent to, as far as the configuration tells, else 1."""
        chosen = getattr(getattr(self._shell[0], "config", None), "num_experts_per_tok", None)
        return min(1.0, chosen / len(self)) if isinstance(chosen, int) else 1.0

    @classmethod
    def without_weights(cls, fused: nn.Module) -> SplitExperts:
        """The experts of `fused`, on the meta device."""
        dtype = next(fused.parameters()).dtype
        return cls(fused, device="meta", dtype=dtype).requires_grad_(next(fused.parameters()).requires_grad)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See the class."""
        out = torch.zeros_like(hidden_states)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        # in training all are called: sharded over processes, each must have gradients for the same parameters
        for number in range(len(self)) if trains or self._sees_all else _chosen(top_k_index, len(self)):
            chosen = top_k_index == number
            if self._sees_all:
                tokens, share = torch.arange(len(chosen), device=chosen.device), (top_k_weights * chosen).sum(-1)
            else:
                tokens, place = chosen.nonzero(as_tuple=True)
                share = top_k_weights[tokens, place]
            given = self._run(self[number], hidden_states[tokens]) * share[:, None]
            out.index_add_(0, tokens, given.to(out.dtype))
        return out

    def _run(self, expert: Any, x: Tensor) -> Tensor:
        (shell,) = self._shell
        if expert.gate_proj is None:
            y: Tensor = expert.down_proj(shell.act_fn(expert.up_proj(x)))
            return y
        both = _joined((expert.gate_proj(x), expert.up_proj(x)), shell.is_concatenated, -1)
        z: Tensor = expert.down_proj(shell._apply_gate(both))
        return z

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The fused module they stand for; all matrices must be `nn.Linear`."""
        fused = copy.copy(self._shell[0])
        fused._parameters = {}
        leaves = ("weight", "bias") if fused.has_bias else ("weight",)
        for leaf in leaves:
            both, down = [], []
            for expert in self:
                up, gate = getattr(expert.up_proj, leaf), expert.gate_proj
                both.append(up if gate is None else _joined((getattr(gate, leaf), up), fused.is_concatenated, 0))
                down.append(getattr(expert.down_proj, leaf))
            ending = "" if leaf == "weight" else "_bias"
            for name, matrices in (("gate_up_proj" if fused.has_gate else "up_proj", both), ("down_proj", down)):
                stacked = torch.stack(matrices)
                lies = stacked.mT.contiguous() if leaf == "weight" and fused.is_transposed else stacked
                fused.register_parameter(name + ending, nn.Parameter(lies))
        return fused


@contextmanager
def all_tokens(module: nn.Module) -> Iterator[None]:
    """Every expert in `module` sees every token meanwhile, also those that count nothing there; what comes out is the same."""
    found = [m for m in module.modules() if isinstance(m, SplitExperts)]
    for experts in found:
        experts._sees_all = True
    try:
        yield
    finally:
        for experts in found:
            experts._sees_all = False


def routed(module: nn.Module) -> tuple[str, ...]:
    """Paths of the experts in `module`, each with a dot at its end: what lies there sees only the tokens that were sent to it."""
    return tuple(name + "." for name, m in module.named_modules() if isinstance(m, SplitExperts))


def token_shares(model: nn.Module) -> dict[str, float]:
    """Returns the share of the tokens that each matrix of an expert sees, by its path; all others see every one."""
    return {
        f"{path}.{name}": experts.share
        for path, experts in model.named_modules()
        if isinstance(experts, SplitExperts)
        for name, matrix in experts.named_modules()
        if isinstance(matrix, nn.Linear)
    }


def find_fused(module: nn.Module) -> dict[str, nn.Module]:
    """Modules in `module` that keep experts in tensors of three dimensions as told above, by their paths."""
    return {name: m for name, m in module.named_modules() if _is_fused(m)}


def split_experts(model: nn.Module) -> list[str]:
    """Puts `SplitExperts`, without weights, in the place of all fused experts; returns their paths."""
    found = find_fused(model)
    for name, fused in found.items():
        model.set_submodule(name, SplitExperts.without_weights(fused))
    return list(found)


def merge_experts(model: nn.Module) -> None:
    """Puts fused experts back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts):
            model.set_submodule(name, module.merged())


def split_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dictionary that `model` would have with its experts split; views of its tensors."""
    state = model.state_dict()
    for path, fused in find_fused(model).items():
        for leaf in fused._parameters:
            state.pop(f"{path}.{leaf}", None)
        state |= {f"{path}.{name}": tensor for name, tensor in _tensors(fused)}
    return state


def _tensors(fused: Any) -> Iterator[tuple[str, Tensor]]:
    first = "gate_up_proj" if fused.has_gate else "up_proj"
    for leaf in ("weight", "bias") if fused.has_bias else ("weight",):
        ending = "" if leaf == "weight" else "_bias"
        both, down = (getattr(fused, name + ending).detach() for name in (first, "down_proj"))
        if leaf == "weight" and fused.is_transposed:
            both, down = both.mT, down.mT
        for number in range(len(both)):
            if fused.has_gate:
                gate, up = _parted(both[number], fused.is_concatenated)
                yield f"{number}.gate_proj.{leaf}", gate
            else:
                up = both[number]
            yield f"{number}.up_proj.{leaf}", up
            yield f"{number}.down_proj.{leaf}", down[number]


def _parted(both: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Gate and up out of one tensor, along its first dimension."""
    if halves:
        gate, up = both.chunk(2)
        return gate, up
    return both[::2], both[1::2]


def _joined(parts: tuple[Tensor, Tensor], halves: bool, dim: int) -> Tensor:
    """Gate and up in one tensor, along the last or the first dimension."""
    if halves:
        return torch.cat(parts, dim)
    return torch.stack(parts, -1).flatten(-2) if dim == -1 else torch.stack(parts, 1).flatten(0, 1)


def _chosen(index: Tensor, count: int) -> list[int]:
    """The experts that some token was sent to; a number past the last stands for none."""
    found: list[int] = torch.bincount(index.flatten(), minlength=count)[:count].nonzero().flatten().tolist()
    return found


def _is_fused(module: Any) -> bool:
    if not all(hasattr(module, flag) for flag in _FLAGS) or getattr(module, "has_post_expert_norm", False):
        return False
    wide = {name for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    return wide == {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}


def _sizes(fused: Any) -> tuple[int, tuple[int, int]]:
    """The number of experts; channels and hidden size of each."""
    count, a, b = fused.down_proj.shape
    return count, (a, b) if fused.is_transposed else (b, a)
