"""What the matrices of a model see, for the benchmarks of fits: weights, input moments, gradient moments.

`C = E[x x^T]` over windows of 512 tokens of a text; `B = E[g g^T]` of the loss with labels sampled from the model, over
the first windows. `--cache FILE` keeps them, so that several benchmarks share one pass.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bondsmith.model.source import load_tokenizer, load_whole, open_source

KINDS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
WINDOW = 512


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight `(O, I)`, its input moment `(I, I)` and the moment `(O, O)` of the loss gradient at its output."""

    W: Tensor
    C: Tensor
    B: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the options that say what is observed."""
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 20, 27])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--gradient-tokens", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int, default=2)


def read_text(path: Path) -> str:
    """Returns the texts of a `.jsonl[.gz]` file, joined."""
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return "\n\n".join(row.get("page") or row["text"] for row in rows)


def observe(options: argparse.Namespace) -> dict[str, Matrix]:
    """Returns `{"BLOCK.KIND": Matrix}`; without gradient tokens every `B` is zero."""
    torch.set_num_threads(options.threads)
    if options.cache and options.cache.is_file():
        return {name: Matrix(*parts) for name, parts in torch.load(options.cache).items()}
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        model, tokenizer = load_whole(source).requires_grad_(False), load_tokenizer(source.path)
    ids = tokenizer(read_text(options.text)[: 8 * options.tokens], return_tensors="pt").input_ids[0, : options.tokens]
    found = {f"{b}.{k}": model.get_submodule(f"model.layers.{b}.{p}") for b in options.blocks for k, p in KINDS.items()}
    C = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in found.items()}
    B = {name: torch.zeros(m.out_features, m.out_features, dtype=torch.float64) for name, m in found.items()}
    windows = ids.reshape(-1, WINDOW)
    _add_inputs(model, windows, found, C)
    if options.gradient_tokens:
        _add_gradients(model, windows[: options.gradient_tokens // WINDOW], found, B)
    matrices = {name: Matrix(m.weight.detach(), C[name], B[name]) for name, m in found.items()}
    if options.cache:
        torch.save({name: (m.W, m.C, m.B) for name, m in matrices.items()}, options.cache)
    return matrices


@torch.no_grad()
def _add_inputs(model: nn.Module, windows: Tensor, found: dict[str, nn.Module], C: dict[str, Tensor]) -> None:
    shared = {"k": "q", "v": "q", "up": "gate"}  # these read the same
    for name, module in found.items():
        block, kind = name.split(".")
        if kind in shared:
            C[name] = C[f"{block}.{shared[kind]}"]
            continue

        def add(_: nn.Module, inputs: tuple[Tensor, ...], total: Tensor = C[name]) -> None:
            x = inputs[0].flatten(0, -2)
            total.add_((x.T @ x).to(torch.float64))

        module.register_forward_pre_hook(add)
    for window in windows:
        model.model(window[None], use_cache=False)
    for module in found.values():
        module._forward_pre_hooks.clear()
    for name in C:
        if name.split(".")[1] not in shared:
            C[name] /= windows.numel()


def _add_gradients(model: nn.Module, windows: Tensor, found: dict[str, nn.Module], B: dict[str, Tensor]) -> None:
    for name, module in found.items():

        def watch(_: nn.Module, __: object, out: Tensor, total: Tensor = B[name]) -> None:
            out.register_hook(lambda gradient: _add(total, gradient[0]))

        module.register_forward_hook(watch)
    generator = torch.Generator().manual_seed(0)
    for window in windows:
        embedded = model.get_input_embeddings()(window[None]).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for total in B.values():
        total /= windows.numel()


def _add(total: Tensor, rows: Tensor) -> None:
    total.add_((rows.T @ rows).to(torch.float64))
