"""Time and error of the truncated SVD against `torch.linalg.svd`, side by side.

    python benchmarks/svd.py [--shape 4096 11008] [--rank 896]

The matrix is random with the singular values `1 / (1 + k) ** 0.35`, a decay as slow as that of real weights. Error:
Frobenius norm of what is lost, relative to the smallest possible.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bondsmith.tensor.svd import truncated_svd


def slow_decay(rows: int, columns: int) -> Tensor:
    """A float32 matrix with a known slow spectrum; its singular vectors are columns of random orthogonal matrices."""
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (rows, columns))
    return left * (1.0 + torch.arange(rank)) ** -0.35 @ right.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--rank", type=int, default=896)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    matrix = slow_decay(*options.shape)
    best = ((1.0 + torch.arange(options.rank, min(matrix.shape), dtype=torch.float64)) ** -0.7).sum().sqrt()
    methods: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "truncated_svd": lambda: truncated_svd(matrix, options.rank),
        "torch.linalg.svd": lambda: torch.linalg.svd(matrix, full_matrices=False),
    }
    print(f"{tuple(matrix.shape)}, rank {options.rank}, {options.threads} threads")
    print("| method | seconds | error |\n|---|---|---|")
    for name, method in methods.items():
        start = time.perf_counter()
        U, s, Vh = method()
        seconds, r = time.perf_counter() - start, options.rank
        lost = (matrix - U[:, :r] * s[:r] @ Vh[:r]).norm()
        print(f"| {name} | {seconds:.1f} | {float(lost / best):.4f} |", flush=True)


if __name__ == "__main__":
    main()
