"""Structured relatives of the matrix cut on real weights, at equal parameters, in the metric of the fit.

    python benchmarks/relatives.py MODEL --text FILE.jsonl.gz [--gradient-tokens 2048] [--keep 0.5 0.3] [--cache FILE]

Every relative is fitted as well as we know how and counted kindly (indices are free); the reference is the whitened cut with
the gauge saving. Relative error `sqrt(tr(B D C D^T) / tr(B W C W^T))`, `B = 1` without gradient tokens.

- `columns`: a cut and some exact columns (outlier channels); the optimum is a cut in the Schur complement of their moment.
- `rows`: the same on the output side.
- `scalars`: a cut and the entries that cost most, fitted in turn.
- `blocks`: block-diagonal plus a cut, fitted in turn.
- `blast`: `W_ij = U_i diag(s_ij) V_j^T` over b x b blocks (BLAST, arXiv 2410.21262), alternating least squares from the cut.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from observed import Matrix, add_arguments, observe
from torch import Tensor

from bondsmith.tensor import Sites, exact_cut, relative_error, whitened_cut
from bondsmith.tensor.exact import Side
from bondsmith.tensor.metric import damped

DAMPING = 1e-6
SHARES = (0.02, 0.1, 0.3)  # of the budget that goes to columns, rows or scalars
BLOCKS = (2, 4, 8, 16)


def cut_within(rows: int, columns: int, budget: float) -> int:
    """The largest bond with `k (O + I - k)` numbers."""
    return Sites((rows, 1), (1, columns)).bonds_within(int(budget), gauge=True, multiple=1)[0]


def cut(W: Tensor, C: Tensor, B: Tensor | None, budget: float) -> Tensor:
    """The whitened cut with the gauge saving."""
    bond = cut_within(*W.shape, budget)
    return whitened_cut(W, bond, input_moment=C, output_moment=B, damping=DAMPING).to_matrix()


def with_channels(W: Tensor, C: Tensor, B: Tensor | None, budget: float, share: float, side: Side) -> Tensor:
    """Exact columns or rows for this share of the budget, and a cut of the others."""
    long = len(W) if side == "columns" else W.shape[1]
    count = max(1, round(share * budget / long))
    rows, columns = (len(W), W.shape[1] - count) if side == "columns" else (len(W) - count, W.shape[1])
    bond = cut_within(rows, columns, budget - count * long)
    return exact_cut(W, count, bond, side=side, input_moment=C, output_moment=B, damping=DAMPING).to_matrix()


def with_scalars(W: Tensor, C: Tensor, B: Tensor | None, budget: float, share: float) -> Tensor:
    """A cut and single entries, in turn: entries by their own cost, the cut fitted to the rest."""
    count, sparse = int(share * budget), torch.zeros_like(W)
    weight = C.diagonal() if B is None else B.diagonal()[:, None] * C.diagonal()
    for _ in range(3):
        low = cut(W - sparse, C, B, budget - count)
        D = W - low
        kept = (D.square() * weight).flatten().topk(count)[1]
        sparse = torch.zeros_like(W).flatten().index_copy(0, kept, D.flatten()[kept]).reshape(W.shape)
    return low + sparse


def with_blocks(W: Tensor, C: Tensor, B: Tensor | None, budget: float, count: int) -> Tensor | None:
    """`count` diagonal blocks, each a regression on its inputs, and a cut, in turn; None where blocks leave no room."""
    if W.numel() / count > 0.8 * budget or W.shape[0] % count or W.shape[1] % count:
        return None
    diagonal, o, i = torch.zeros_like(W), W.shape[0] // count, W.shape[1] // count
    for _ in range(6):
        low = cut(W - diagonal, C, B, budget - W.numel() / count)
        moved = (W - low) @ C
        for b in range(count):
            rows, columns = slice(b * o, (b + 1) * o), slice(b * i, (b + 1) * i)
            own = damped(C[columns, columns], DAMPING)
            diagonal[rows, columns] = torch.linalg.solve(own, moved[rows, columns], left=False)
    return low + diagonal


def blast(W: Tensor, C: Tensor, B: Tensor | None, budget: float, count: int) -> Tensor | None:
    """BLAST factors in the input metric, twelve rounds of exact solves for `U` and `s` and conjugate gradients for `V`."""
    if B is not None or W.shape[0] % count or W.shape[1] % count:
        return None
    r, o, i = int(budget / (sum(W.shape) + count**2)), W.shape[0] // count, W.shape[1] // count
    start = whitened_cut(W, r, input_moment=C, damping=DAMPING)
    U, V = start.cores[0][0, :, 0].reshape(count, o, r), start.cores[1][:, 0, :, 0].T.reshape(count, i, r)
    U, V = U / (scale := (U.norm() / V.norm()).sqrt()), V * scale
    s, M = torch.ones(count, count, r, dtype=W.dtype), C.reshape(count, i, count, i).transpose(1, 2)
    WC = (W @ C).reshape(count, o, count, i).transpose(1, 2)

    def matrix(V: Tensor) -> Tensor:
        return torch.einsum("xor,xyr,yir->xoyi", U, s, V).reshape(W.shape)

    def gradient(D: Tensor) -> Tensor:
        return torch.einsum("xoyi,xor,xyr->yir", (D @ C).reshape(count, o, count, i), U, s)

    for _ in range(12):
        inner = torch.einsum("yir,yzij,zjt->yrzt", V, M, V)
        for x in range(count):  # U_x, then s_x given it
            gram = torch.einsum("yr,yrzt,zt->rt", s[x], inner, s[x])
            U[x] = torch.linalg.solve(damped(gram, 1e-9), torch.einsum("yoi,yir,yr->or", WC[x], V, s[x]), left=False)
            gram = (inner * (U[x].T @ U[x])[:, None, :]).reshape(count * r, count * r)
            right = torch.einsum("yoi,yir,or->yr", WC[x], V, U[x]).flatten()
            s[x] = torch.linalg.solve(damped(gram, 1e-9), right).reshape(count, r)
        residual = gradient(W - matrix(V))
        direction, size = residual, residual.square().sum()
        for _ in range(8):
            image = gradient(matrix(direction))
            step = size / (direction * image).sum()
            V, residual = V + step * direction, residual - step * image
            last, size = size, residual.square().sum()
            direction = residual + size / last * direction
    return matrix(V)


def best(tries: dict[object, Tensor | None], W: Tensor, C: Tensor, B: Tensor | None) -> str:
    """The smallest error and the setting that gave it."""
    errors = {key: relative_error(W, found, C, B) for key, found in tries.items() if found is not None}
    if not errors:
        return "-"
    key = min(errors, key=errors.__getitem__)
    return f"{errors[key]:.4f} ({key})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--kinds", nargs="+", default=["q", "v", "o", "gate", "down"])
    parser.add_argument("--metrics", nargs="+", default=["input", "loss"])
    options = parser.parse_args()
    methods: dict[str, tuple[Callable[..., Tensor | None], tuple[object, ...]]] = {
        "columns": (partial(with_channels, side="columns"), SHARES),
        "rows": (partial(with_channels, side="rows"), SHARES),
        "scalars": (with_scalars, SHARES),
        "blocks": (with_blocks, BLOCKS),
        "blast": (blast, (4,)),
    }
    print(f"| matrix, keep, metric | cut | {' | '.join(methods)} |\n|{'---|' * (len(methods) + 2)}", flush=True)
    for name, seen in observe(options).items():
        if name.split(".")[1] not in options.kinds:
            continue
        for keep in options.keep:
            for metric in options.metrics:
                print(row(name, seen, keep, metric, methods), flush=True)


def row(
    name: str,
    seen: Matrix,
    keep: float,
    metric: str,
    methods: dict[str, tuple[Callable[..., Tensor | None], tuple[object, ...]]],
) -> str:
    """One line of the table."""
    W = seen.W.to(torch.float64)
    C, B = damped(seen.C, DAMPING), damped(seen.B, DAMPING) if metric == "loss" else None
    budget = keep * W.numel()
    reference = relative_error(W, cut(W, C, B, budget), C, B)
    cells = [best({s: fit(W, C, B, budget, s) for s in settings}, W, C, B) for fit, settings in methods.values()]
    return f"| {name} {keep} {metric} | {reference:.4f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
