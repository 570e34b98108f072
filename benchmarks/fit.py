"""Error of every site shape on real weights at equal parameters, in the metric of what the layer sees.

    python benchmarks/fit.py MODEL --text FILE.jsonl.gz [--blocks 2 15 20 27] [--tokens 8192]

For q, o, gate and down of the blocks: relative error `sqrt(tr(D C D^T) / tr(W C W^T))` at keep 0.3 / 0.5, by the plain
sequential SVD (the published method) and by the weighted fit, with the seconds the fits took. Prints a Markdown table.
Bonds are the largest that fit the budget, not rounded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bondsmith.tensor import Sites, fit_mpo, parse_sites, relative_error, sequential_svd

KINDS = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
FITTED = ["thin:2", "thin:4", "interleaved:2", "interleaved:3"]
KEEPS = (0.3, 0.5)


def read_text(path: Path) -> str:
    """The texts of a `.jsonl[.gz]` file, joined."""
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return "\n\n".join(row.get("page") or row["text"] for row in rows)


@torch.no_grad()
def weights_and_moments(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """`{name: (weight, input moment)}` of the chosen matrices, moments in float64 over windows of 512 tokens."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(read_text(options.text)[: 8 * options.tokens], return_tensors="pt").input_ids[0, : options.tokens]
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        size = module.in_features
        found[name] = (module.weight.detach(), torch.zeros(size, size, dtype=torch.float64))

        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, size).to(torch.float64)
            found[name][1].add_(x.T @ x)

        module.register_forward_pre_hook(add)

    for block in options.blocks:
        for kind, path in KINDS.items():
            watch(f"{block}.{kind}", model.get_submodule(f"model.layers.{block}.{path}"))
    for window in ids.reshape(-1, 512):
        model.model(window[None], use_cache=False)
    return found


def cut_errors(weight: Tensor, moment: Tensor, keep: float) -> list[float]:
    """Errors of the matrix cut: plain, whitened, whitened with the gauge saving."""
    sites, budget = parse_sites("matrix", *weight.shape), int(keep * weight.numel())
    bonds = sites.bonds_within(budget, multiple=1)
    plain = sequential_svd(weight, sites, bonds).to_matrix()
    gauged = sites.bonds_within(budget, gauge=True, multiple=1)
    fits = [fit_mpo(weight, sites, b, input_moment=moment, damping=1e-6).error for b in (bonds, gauged)]
    return [relative_error(weight, plain, moment), *fits]


def network_errors(weight: Tensor, moment: Tensor, keep: float, sites: Sites) -> tuple[list[float], float]:
    """Errors by plain sequential SVD and by the weighted fit, and the seconds of the fit."""
    bonds = sites.bonds_within(int(keep * weight.numel()), multiple=1)
    plain = relative_error(weight, sequential_svd(weight, sites, bonds).to_matrix(), moment)
    start = time.perf_counter()
    fit = fit_mpo(weight, sites, bonds, input_moment=moment, damping=1e-6)
    return [plain, fit.error], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 20, 27])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = ["cut SVD", "cut whitened", "+ gauge", *(f"{s} {w}" for s in FITTED for w in ("SVD", "fit")), "fit seconds"]
    print(f"| matrix | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, (weight, moment) in weights_and_moments(options).items():
        columns, seconds = [], 0.0
        for keep in KEEPS:
            row = cut_errors(weight, moment, keep)
            for spec in FITTED:
                errors, spent = network_errors(weight, moment, keep, parse_sites(spec, *weight.shape))
                row, seconds = row + errors, seconds + spent
            columns.append(row)
        cells = ["/".join(f"{error:.3f}"[1:] for error in pair) for pair in zip(*columns, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
