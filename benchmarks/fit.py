"""Error of every site shape on real weights at equal parameters, in the metric of what the layer sees.

    python benchmarks/fit.py MODEL --text FILE.jsonl.gz [--blocks 2 15 20 27] [--tokens 8192] [--cache FILE]

For q, o, gate and down of the blocks: relative error `sqrt(tr(D C D^T) / tr(W C W^T))` at keep 0.3 / 0.5, by the plain
sequential SVD (the published method) and by the weighted fit, with the seconds the fits took. Prints a Markdown table.
Bonds are the largest that fit the budget, not rounded.
"""

from __future__ import annotations

import argparse
import time

from observed import add_arguments, observe
from torch import Tensor

from bondsmith.tensor import Sites, fit_mpo, parse_sites, relative_error, sequential_svd

CHOSEN = ("q", "o", "gate", "down")
FITTED = ["thin:2", "thin:4", "interleaved:2", "interleaved:3"]
KEEPS = (0.3, 0.5)


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
    add_arguments(parser)
    heads = ["cut SVD", "cut whitened", "+ gauge", *(f"{s} {w}" for s in FITTED for w in ("SVD", "fit")), "fit seconds"]
    print(f"| matrix | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, matrix in observe(parser.parse_args()).items():
        if name.split(".")[1] not in CHOSEN:
            continue
        weight, moment, columns, seconds = matrix.W, matrix.C, [], 0.0
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
