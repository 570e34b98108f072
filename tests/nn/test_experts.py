"""Experts of a mixture, apart and together: what they compute, and how their tensors lie."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from conftest import IDS, tiny_model
from torch import Tensor, nn

from bondsmith.nn.experts import (
    SplitExperts,
    all_tokens,
    find_fused,
    merge_experts,
    routed,
    split_experts,
    split_state,
    token_shares,
)

EXPERTS, HIDDEN, CHANNELS = 3, 6, 4


class Fused(nn.Module):
    """As transformers describes such modules; computes one expert after the other, for one token after the other."""

    def __init__(self, has_gate: bool, has_bias: bool, is_transposed: bool, is_concatenated: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias = has_gate, has_bias
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.act_fn = nn.Tanh()
        rows = 2 * CHANNELS if has_gate else CHANNELS
        self.first = "gate_up_proj" if has_gate else "up_proj"
        for name, out, wide in ((self.first, rows, HIDDEN), ("down_proj", HIDDEN, CHANNELS)):
            shape = (EXPERTS, wide, out) if is_transposed else (EXPERTS, out, wide)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if has_bias:
                self.register_parameter(name + "_bias", nn.Parameter(torch.randn(EXPERTS, out)))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * (up + 1)

    def _product(self, name: str, number: int, x: Tensor) -> Tensor:
        W = getattr(self, name)[number]
        y = x @ W if self.is_transposed else W @ x
        return y + getattr(self, name + "_bias")[number] if self.has_bias else y

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = []
        for x, experts, shares in zip(hidden, index, weights, strict=True):
            total = torch.zeros(HIDDEN)
            for number, share in zip(experts.tolist(), shares, strict=True):
                if number < EXPERTS:
                    both = self._product(self.first, number, x)
                    z = self._apply_gate(both) if self.has_gate else self.act_fn(both)
                    total = total + share * self._product("down_proj", number, z)
            out.append(total)
        return torch.stack(out)


@pytest.mark.parametrize("flags", list(product([True, False], repeat=4)), ids=str)
def test_every_layout_comes_apart_and_together(flags: tuple[bool, bool, bool, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("experts", Fused(*flags))
    state, fused = split_state(model), model.experts
    x, index, weights = torch.randn(5, HIDDEN), torch.tensor([[0, 2], [1, 0], [2, 3], [0, 2], [3, 3]]), torch.rand(5, 2)
    expected = fused(x, index, weights)
    assert split_experts(model) == ["experts"]
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(state, assign=True)
    apart = model.experts
    assert isinstance(apart, SplitExperts)
    assert (apart[0].gate_proj is None) == (not flags[0])
    assert torch.allclose(apart(x, index, weights), expected, atol=1e-5)
    calls: list[int] = []
    for number, expert in enumerate(apart):
        expert.down_proj.register_forward_pre_hook(lambda _, args, n=number: calls.append(n))
    with torch.no_grad():
        assert torch.allclose(apart(x[:2], index[:1].expand(2, 2), weights[:2])[0], expected[0], atol=1e-5)
        assert calls == [0, 2]
        with all_tokens(model):
            assert torch.allclose(apart(x, index, weights), expected, atol=1e-5)
        assert calls == [0, 2, 0, 1, 2]
    apart.requires_grad_()
    apart(x[:1], index[:1], weights[:1]).sum().backward()
    assert all(p.grad is not None for p in apart.parameters())
    assert not apart[1].up_proj.weight.grad.any()
    apart.requires_grad_(False)
    merge_experts(model)
    assert all(torch.equal(p, dict(fused.named_parameters())[name]) for name, p in model.experts.named_parameters())
    assert torch.equal(model.experts(x, index, weights), expected)


def test_gradients_are_those_of_the_fused_experts() -> None:
    model = tiny_model("gpt_oss")
    apart, state = copy.deepcopy(model), split_state(model)
    split_experts(apart)
    apart.load_state_dict(state, assign=True)
    apart.requires_grad_()
    for one in (model, apart):
        one(input_ids=IDS).logits.square().mean().backward()
    found, expected = (one.get_input_embeddings().weight.grad for one in (apart, model))
    assert torch.allclose(found, expected, atol=1e-5)


def test_who_sees_what() -> None:
    model = tiny_model("mixtral")
    split_experts(model)
    assert routed(model) == tuple(f"model.layers.{k}.mlp.experts." for k in range(3))
    shares = token_shares(model)
    assert len(shares) == 3 * 4 * 3
    assert set(shares.values()) == {0.5}
    assert shares["model.layers.2.mlp.experts.3.down_proj"] == 0.5


def test_other_modules_with_such_tensors_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    normed: Any = Fused(True, False, False, True)
    normed.has_post_expert_norm = True
    model = nn.Sequential(Odd(), normed)
    assert not find_fused(model)
    assert split_experts(model) == []
