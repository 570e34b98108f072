"""Which moments predict what a cut costs: cuts fitted with each, judged token by token on text that was not fitted.

    python benchmarks/moments.py MODEL --text FILE ... [--blocks 3 12 20 27] [--tokens 12288] [--keep 0.8]

Half of the windows of every text gives the moments, the other half judges: `1/2 (g^T D x)^2`, `D` the change of the weight, `x` what the
matrix reads and `g` the loss gradient at its output, a token each; sums over the blocks, in thousandths of a nat a token. `--joint` adds
the cut of matrices that read one input with one bond, at as many numbers, judged the same way.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from observed import KINDS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bondsmith.data import read_windows
from bondsmith.model.blocks import matrices
from bondsmith.model.source import load_tokenizer, load_whole, open_source
from bondsmith.stages.moments import signed_gradient
from bondsmith.tensor import Sites, whitened_cut

JOINT = (("q", "k", "v"), ("gate", "up"))


def seen(model: nn.Module, windows: Tensor, names: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns by key of `names` what each matrix reads and the gradients at its output, (tokens, features)."""
    X: dict[str, list[Tensor]] = {key: [] for key in names}
    G: dict[str, list[Tensor]] = {key: [] for key in names}

    def hook(key: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        X[key].append(args[0].detach().flatten(0, -2))
        out.register_hook(lambda g: G[key].append(g.flatten(0, -2)))

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, key)) for key, name in names.items()]
    generator = torch.Generator().manual_seed(0)
    for row in windows:
        entering = model.get_input_embeddings()(row[None]).detach().requires_grad_()
        logits = model(inputs_embeds=entering, use_cache=False).logits
        torch.autograd.grad(logits, entering, signed_gradient(logits.detach().float().softmax(-1), generator))
    for handle in handles:
        handle.remove()
    return {k: torch.cat(v) for k, v in X.items()}, {k: torch.cat(v) for k, v in G.items()}


def moment(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """`E[w x x^T] / E[w]`."""
    w = torch.ones(len(rows)) if weights is None else weights
    return (rows * (w / w.sum())[:, None]).T @ rows


def shrunk(B: Tensor, share: float) -> Tensor:
    """`B` with a share of its mean eigenvalue added."""
    return B + share * B.diagonal().mean() * torch.eye(len(B))


def cut(W: Tensor, keep: float, C: Tensor, B: Tensor) -> Tensor:
    """The whitened cut that keeps this share of the numbers, with the gauge saving."""
    bond = Sites((len(W), 1), (1, W.shape[1])).bonds_within(int(keep * W.numel()), gauge=True, multiple=1)[0]
    return whitened_cut(W, bond, input_moment=C, output_moment=B).to_matrix()


def loss(D: Tensor, x: Tensor, g: Tensor) -> float:
    """`1/2 E[(g^T D x)^2]`."""
    return float(((g @ D) * x).sum(1).square().mean() / 2)


Weigh = Callable[[Tensor, Tensor], Tensor]  # of own gradients and of all those of the group: squares of their norms
WAYS: dict[str, tuple[Weigh | None, float]] = {
    "two moments": (None, 0.0),
    "B shrunk by 0.1": (None, 0.1),
    "B shrunk by 0.3": (None, 0.3),
    "B shrunk by 1": (None, 1.0),
    "B by 0.1, tokens by the group's gradients": (lambda own, group: group.sqrt(), 0.1),
    "B by 0.1, tokens by their own gradients": (lambda own, group: own.sqrt(), 0.1),
    "B by 0.1, tokens by the squares": (lambda own, group: group, 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 12, 20, 27])
    parser.add_argument("--tokens", type=int, default=12288, help="that are fitted; as many judge")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--joint", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(options.model, Path(folder) / "source")
        model = load_whole(source).requires_grad_(False)
    tokenizer = load_tokenizer(source.path)
    each = -(-options.tokens // (512 * len(options.text)))
    parts = [read_windows(spec, tokenizer, count=2 * each, window=512, seed=0).ids for spec in options.text]
    fitted, judged = (torch.cat([ids[half::2] for ids in parts]) for half in (0, 1))
    totals: dict[tuple[float, str, str], float] = {}

    def add(keep: float, way: str, kind: str, value: float) -> None:
        totals[keep, way, kind] = totals.get((keep, way, kind), 0.0) + 1000 * value

    for block in options.blocks:
        names = {kind: f"model.layers.{block}.{name}" for kind, name in KINDS.items()}
        assert all(name.split(".", 3)[3] in matrices(model.model.layers[block]) for name in names.values())
        (x, g), (xs, gs) = seen(model, fitted, names), seen(model, judged, names)
        W = {kind: model.get_submodule(name).weight.detach() for kind, name in names.items()}
        squares = {kind: rows.square().sum(1) for kind, rows in g.items()}
        group = {kind: sum(squares[k] for k in next((j for j in JOINT if kind in j), (kind,))) for kind in KINDS}
        for keep in options.keep:
            for way, (weigh, share) in WAYS.items():
                for kind in KINDS:
                    weights = weigh(squares[kind], group[kind]) if weigh else None
                    C, B = moment(x[kind], weights), shrunk(moment(g[kind]), share)
                    add(keep, way, kind, loss(W[kind] - cut(W[kind], keep, C, B), xs[kind], gs[kind]))
            for kinds in JOINT if options.joint else ():
                C = moment(x[kinds[0]])
                B = torch.block_diag(*[shrunk(moment(g[kind]), 0.1) for kind in kinds])
                together = torch.cat([W[kind] for kind in kinds])
                D = (together - cut(together, keep, C, B)).split([len(W[kind]) for kind in kinds])
                for kind, part in zip(kinds, D, strict=True):
                    add(keep, "B shrunk by 0.1, one bond", kind, loss(part, xs[kind], gs[kind]))
    table = Table("keep", "moments", *KINDS, "all")
    for keep, way in dict.fromkeys((keep, way) for keep, way, _ in totals):
        row = [totals.get((keep, way, kind)) for kind in KINDS]
        whole = f"{sum(v for v in row if v is not None):.2f}" if None not in row else ""
        table.add_row(f"{keep:g}", way, *("" if v is None else f"{v:.2f}" for v in row), whole)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
