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
from dataclasses import dataclass
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
from bondsmith.stages.moment import token_weights
from bondsmith.stages.moments import signed_gradient
from bondsmith.tensor import Sites, whitened_cut

JOINT = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True, eq=False)
class Seen:
    """What the matrices of a block read, the loss gradients at their outputs, and the stream they write into, (tokens, features)."""

    x: dict[str, Tensor]
    g: dict[str, Tensor]
    stream: dict[str, Tensor]

    def group(self, kind: str) -> Tensor:
        """Norms of the gradients at all matrices that read what `kind` reads, (tokens,)."""
        together = next((kinds for kinds in JOINT if kind in kinds), (kind,))
        return sum(self.g[k].square().sum(1) for k in together).sqrt().clamp_min(1e-15)

    def own(self, kind: str) -> Tensor:
        """Norms of the gradients at one matrix, (tokens,)."""
        return self.g[kind].square().sum(1).sqrt().clamp_min(1e-15)

    def into(self, kind: str) -> Tensor:
        """Token weights by the residual stream a matrix writes into; by the gradients of the group for one that does not."""
        return token_weights(self.stream[kind]) if kind in self.stream else self.group(kind)


def seen(model: nn.Module, windows: Tensor, block: int, names: dict[str, str]) -> Seen:
    """Runs windows forward and back; `names` of the matrices by kind."""
    found: dict[tuple[str, str], list[Tensor]] = {}

    def keep(what: str, kind: str, rows: Tensor) -> None:
        found.setdefault((what, kind), []).append(rows.detach().flatten(0, -2))

    def hook(kind: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        keep("x", kind, args[0])
        out.register_hook(lambda g: keep("g", kind, g))

    def around(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        keep("stream", "o", args[0])
        keep("stream", "down", out)

    handles = [model.get_submodule(name).register_forward_hook(partial(hook, kind)) for kind, name in names.items()]
    handles.append(model.get_submodule(f"model.layers.{block}").register_forward_hook(around))
    generator = torch.Generator().manual_seed(0)
    for row in windows:
        entering = model.get_input_embeddings()(row[None]).detach().requires_grad_()
        logits = model(inputs_embeds=entering, use_cache=False).logits
        torch.autograd.grad(logits, entering, signed_gradient(logits.detach().float().softmax(-1), generator))
    for handle in handles:
        handle.remove()
    joined = {key: torch.cat(rows) for key, rows in found.items()}
    return Seen(*({kind: rows for (w, kind), rows in joined.items() if w == what} for what in ("x", "g", "stream")))


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


def balanced(seen: Seen, kind: str) -> Tensor:
    """`E[g g^T / |g|]`, `|g|` of the group, with the trace of `E[g g^T]`: what is left once `C` has the other half of the square."""
    g = seen.g[kind]
    B = moment(g, 1 / seen.group(kind))
    return B * (g.square().sum(1).mean() / B.trace())


Weigh = Callable[[Seen, str], Tensor | None]
# Weights of tokens in `C`, `B`, and the share of its mean eigenvalue added to it.
WAYS: dict[str, tuple[Weigh, Weigh, float]] = {
    "two moments": (lambda s, k: None, lambda s, k: moment(s.g[k]), 0.0),
    "B shrunk by 0.1": (lambda s, k: None, lambda s, k: moment(s.g[k]), 0.1),
    "B shrunk by 1": (lambda s, k: None, lambda s, k: moment(s.g[k]), 1.0),
    "B by 0.1, tokens by the group's gradients": (Seen.group, lambda s, k: moment(s.g[k]), 0.1),
    "B by 0.1, tokens by their own gradients": (Seen.own, lambda s, k: moment(s.g[k]), 0.1),
    "B by 0.1, tokens by the squares": (lambda s, k: s.group(k).square(), lambda s, k: moment(s.g[k]), 0.1),
    "B by 0.1, o and down by the stream": (Seen.into, lambda s, k: moment(s.g[k]), 0.1),
    "B balanced, by 0.1, tokens by the group's": (Seen.group, balanced, 0.1),
    "B balanced, by 0.3, tokens by the group's": (Seen.group, balanced, 0.3),
    "B balanced, by 0.3, o and down by the stream": (Seen.into, balanced, 0.3),
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
        fit, judge = seen(model, fitted, block, names), seen(model, judged, block, names)
        W = {kind: model.get_submodule(name).weight.detach() for kind, name in names.items()}
        for keep in options.keep:
            for way, (weigh, output_moment, share) in WAYS.items():
                for kind in KINDS:
                    C, B = moment(fit.x[kind], weigh(fit, kind)), shrunk(output_moment(fit, kind), share)
                    D = W[kind] - cut(W[kind], keep, C, B)
                    add(keep, way, kind, loss(D, judge.x[kind], judge.g[kind]))
                    add(keep, way, f"{kind} predicted", float(((B @ D @ C) * D).sum() / 2))
            for kinds in JOINT if options.joint else ():
                C = moment(fit.x[kinds[0]])
                B = torch.block_diag(*[shrunk(moment(fit.g[kind]), 0.1) for kind in kinds])
                together = torch.cat([W[kind] for kind in kinds])
                D = (together - cut(together, keep, C, B)).split([len(W[kind]) for kind in kinds])
                for kind, part in zip(kinds, D, strict=True):
                    add(keep, "B shrunk by 0.1, one bond", kind, loss(part, judge.x[kind], judge.g[kind]))
    table = Table("keep", "moments", *KINDS, "all", "predicted")
    for keep, way in dict.fromkeys((keep, way) for keep, way, _ in totals):
        row = [totals.get((keep, way, kind)) for kind in KINDS]
        whole = f"{sum(v for v in row if v is not None):.2f}" if None not in row else ""
        predicted = [totals.get((keep, way, f"{kind} predicted")) for kind in KINDS]
        both = f"{sum(v for v in predicted if v is not None):.2f}" if None not in predicted else ""
        table.add_row(f"{keep:g}", way, *("" if v is None else f"{v:.2f}" for v in row), whole, both)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
