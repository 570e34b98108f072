"""Speed of MPOLinear against nn.Linear, as the fraction reached of what the multiply-adds allow.

    python benchmarks/linear.py [--keep 0.5 0.3] [--tokens 1 64 1024] [--models smollm2 llama2 llama3]

`limit` is the time of `nn.Linear` times the ratio of multiply-adds; 1.00 means the network turned every saved
multiply-add into saved time; `products` are the two products of the cut with no layer around them. All alternate, the
fastest of several rounds counts. A gauged cut is held to `k (O + I - k)` multiply-adds, a plain one to `k (O + I)`.
Backward includes the forward pass.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from bondsmith.nn import MPOLinear
from bondsmith.tensor import parse_sites

SHAPES = {
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama2": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "llama3": [(1024, 4096), (14336, 4096), (4096, 14336)],
}
KINDS = [("matrix", False), ("matrix", True), ("thin:2", False)]


def network(spec: str, gauge: bool, keep: float, shape: tuple[int, int]) -> MPOLinear:
    """A random layer that keeps at most this share of the parameters, with bonds in multiples of 16 as plans have them."""
    sites = parse_sites(spec, *shape)
    bonds = sites.bonds_within(int(keep * shape[0] * shape[1]), gauge)
    layer = MPOLinear(sites, [b - b % 16 or b for b in bonds], bias=False, gauge=gauge)
    if layer.pivots is not None:
        layer.pivots.copy_(torch.randperm(shape[0]))
    return layer


class Products(nn.Module):
    """Two products of matrices: what a cut takes where a layer costs nothing."""

    def __init__(self, cut: MPOLinear):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn_like(core.weight)) for core in cut.cores)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.right.T @ self.left.T


def once(layer: nn.Module, x: Tensor, gradient: Tensor | None) -> float:
    """Seconds of one forward pass, or of forward and backward if there is a gradient."""
    start = time.perf_counter()
    if gradient is None:
        with torch.no_grad():
            layer(x)
    else:
        layer(x).backward(gradient)
    return time.perf_counter() - start


def race(layers: list[nn.Module], x: Tensor, gradient: Tensor | None, budget: float) -> list[float]:
    """The fastest time of each layer, all taking turns until `budget` seconds are spent (at least five rounds)."""
    best, spent, rounds = [float("inf")] * len(layers), 0.0, 0
    while spent < budget or rounds < 5:
        times = [once(layer, x, gradient) for layer in layers]
        best = [min(pair) for pair in zip(best, times, strict=True)]
        spent, rounds = spent + sum(times), rounds + 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama2", "llama3"], choices=SHAPES)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per table cell")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = [spec + (" gauge" if gauge else "") for spec, gauge in KINDS]
    heads = ["dense ms", "products", *names]
    print(f"{options.threads} threads; fraction of the multiply-add limit, forward / forward and backward")
    print(f"| model, matrix, keep, tokens | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for model in options.models:
        for shape in SHAPES[model]:
            dense = nn.Linear(shape[1], shape[0], bias=False)
            for keep in options.keep:
                networks = [network(spec, gauge, keep, shape) for spec, gauge in KINDS]
                ratios = [n.sites.multiply_adds(n.bonds, n.gauge) / (shape[0] * shape[1]) for n in networks]
                layers, ratios = [Products(networks[0]), *networks], [ratios[0], *ratios]
                for tokens in options.tokens:
                    x, gradient = torch.randn(tokens, shape[1], requires_grad=True), torch.randn(tokens, shape[0])
                    forward, both = (race([dense, *layers], x, g, options.seconds) for g in (None, gradient))
                    cells = [
                        f"{forward[0] * r / f:.2f} / {both[0] * r / b:.2f}"
                        for r, f, b in zip(ratios, forward[1:], both[1:], strict=True)
                    ]
                    times = f"{forward[0] * 1e3:.2f} / {both[0] * 1e3:.2f}"
                    row = f"{model} {shape[0]}x{shape[1]} keep {keep} T {tokens}"
                    print(f"| {row} | {times} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
