"""The joint algebra of value and output projections against two separate cuts, on the output of attention itself.

    python benchmarks/value_output.py MODEL --text FILE.jsonl.gz [--blocks 2 15 27] [--tokens 2048] [--keep 0.75 0.5]

Only products `O_h V_g` count, so every key-value head has a free 64 x 64 gauge and its inner space can be cut for `v` and `o` at once:
keeping `r` of 64 directions keeps `r / 64` of both. Both ways are fitted on the first half of the tokens and compared on the
second: relative error of the attention output, biases and residual stream left out. Rotary embeddings leave queries and keys only
a complex number per frequency, which saves nothing worth having.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from observed import WINDOW, read_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bondsmith.tensor import Sites, moment_root, whitened_cut

DAMPING = 1e-4


@torch.no_grad()
def attended(model: torch.nn.Module, windows: Tensor, blocks: list[int]) -> dict[int, Tensor]:
    """What each head attends to, by block: its weighted mean of the inputs of `v`, (tokens, heads, width)."""
    seen: dict[int, Tensor] = {}
    found: dict[int, list[Tensor]] = {block: [] for block in blocks}
    handles = []
    for block in blocks:
        attention = model.get_submodule(f"model.layers.{block}.self_attn")

        def read(_: torch.nn.Module, inputs: tuple[Tensor, ...], block: int = block) -> None:
            seen[block] = inputs[0][0]

        def attend(_: torch.nn.Module, __: object, out: tuple[Tensor, Tensor], block: int = block) -> None:
            found[block].append(torch.einsum("hts,sd->thd", out[1][0], seen[block]))

        handles.append(attention.v_proj.register_forward_pre_hook(read))
        handles.append(attention.register_forward_hook(attend))
    for window in windows:
        model.model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {block: torch.cat(parts).to(torch.float64) for block, parts in found.items()}


def cut(W: Tensor, keep: float, C: Tensor, B: Tensor | None = None) -> Tensor:
    """The whitened cut with the gauge saving."""
    bond = Sites((len(W), 1), (1, W.shape[1])).bonds_within(int(keep * W.numel()), gauge=True, multiple=1)[0]
    return whitened_cut(W, bond, input_moment=C, output_moment=B, damping=DAMPING).to_matrix()


def separate(V: Tensor, O: Tensor, x: Tensor, keep: float) -> tuple[Tensor, Tensor]:  # noqa: E741
    """`V` cut for what it does to the output, then `O` cut for what the cut `V` gives it."""
    tokens, heads, _ = x.shape
    head, repeat = O.shape[1] // heads, heads * (O.shape[1] // heads) // len(V)
    B = torch.zeros(len(V), len(V), dtype=V.dtype)
    for h in range(heads):
        own = slice(h // repeat * head, (h // repeat + 1) * head)
        B[own, own] += O[:, h * head : (h + 1) * head].T @ O[:, h * head : (h + 1) * head]
    C = torch.einsum("thi,thj->ij", x, x) / tokens
    V = cut(V, keep, C, B)
    z = inner(V, x, head).flatten(1)
    return V, cut(O, keep, z.T @ z / tokens)


def joint(V: Tensor, O: Tensor, x: Tensor, keep: float) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Both through the best `keep` of every key-value head's inner space, then `O` fitted again to what is left."""
    tokens, heads, _ = x.shape
    head = O.shape[1] // heads
    groups, z = len(V) // head, inner(V, x, head)
    rank, V = round(keep * head), V.clone()
    for g in range(groups):
        members = range(g * heads // groups, (g + 1) * heads // groups)
        weigh = sum(O[:, h * head : (h + 1) * head].T @ O[:, h * head : (h + 1) * head] for h in members)
        seen = torch.einsum("thi,thj->ij", z[:, list(members)], z[:, list(members)]) / tokens
        own = slice(g * head, (g + 1) * head)
        inside = whitened_cut(torch.eye(head, dtype=V.dtype), rank, input_moment=seen, output_moment=weigh)
        V[own] = inside.to_matrix() @ V[own]
    small, wanted = inner(V, x, head).flatten(1), z.flatten(1) @ O.T
    root = moment_root(small.T @ small / tokens, 1e-6)
    return V, root.solve(small.T @ wanted / tokens).T


def inner(V: Tensor, x: Tensor, head: int) -> Tensor:
    """What every head hands to `O`, (tokens, heads, head)."""
    repeat = x.shape[1] * head // len(V)
    by_head = V.reshape(-1, head, V.shape[1]).repeat_interleave(repeat, 0)
    return torch.einsum("hkd,thd->thk", by_head, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 27])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(read_text(options.text)[: 8 * options.tokens], return_tensors="pt").input_ids[0, : options.tokens]
    print("| block, keep | separate cuts, gauge | joint |\n|---|---|---|")
    seen = attended(model, ids.reshape(-1, WINDOW), options.blocks)
    for block in options.blocks:
        attention = model.get_submodule(f"model.layers.{block}.self_attn")
        V, O = (p.weight.detach().to(torch.float64) for p in (attention.v_proj, attention.o_proj))  # noqa: E741
        train, test = seen[block].chunk(2)
        head = O.shape[1] // train.shape[1]
        true = inner(V, test, head).flatten(1) @ O.T
        for keep in options.keep:
            errors = []
            for way in (separate, joint):
                v, o = way(V, O, train, keep)
                errors.append(float((inner(v, test, head).flatten(1) @ o.T - true).norm() / true.norm()))
            print(f"| {block} {keep} | {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
