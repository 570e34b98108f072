"""What this machine reaches, from a second or two of trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """Rates of this machine: multiply-adds a second of products in float32 and float64, seconds of an `eigh` of 1024 rows."""

    single: float
    double: float
    eigh: float


def measure_speed(device: torch.device | str = "cpu", seconds: float = 0.4) -> Speed:
    """Returns what this machine reaches, from products and an eigenvalue problem of a second or two in all."""

    def rate(dtype: torch.dtype, n: int) -> float:
        a = torch.randn(n, n, dtype=dtype, device=device)
        times = _repeat(lambda: a @ a, seconds)
        return n**3 / min(times)

    symmetric = torch.randn(384, 384, dtype=torch.float64, device=device)
    symmetric = symmetric + symmetric.T
    eigh = min(_repeat(lambda: torch.linalg.eigh(symmetric), seconds)) * (1024 / 384) ** 3
    return Speed(rate(torch.float32, 1024), rate(torch.float64, 768), eigh)


def _repeat(work: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        result = work()
        if isinstance(result, torch.Tensor) and result.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times
