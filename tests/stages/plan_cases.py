"""What the tests of plans share: a small made-up model, and its profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bondsmith.model.tracing import HiddenBond
from bondsmith.stages.fast_profile import Seen, fast_profile
from bondsmith.stages.profile import Profile, TableProfile

SHAPES = {
    f"model.layers.{k}.{name}": (k, *shape)
    for k in range(3)
    for name, shape in {"attn.o": (48, 48), "mlp.up": (96, 48), "mlp.down": (48, 96)}.items()
}
OTHER = 64 * 48 + 100


def moment(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.logspace(0, -2, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(o, i, generator=generator) * (1 + k) for n, (k, o, i) in SHAPES.items()}


def profile(**changes: Any) -> Profile:
    W = weights()

    def seen(k: int) -> Seen:
        own = {n: s for n, s in SHAPES.items() if s[0] == k}
        C = {n: moment(s[2], 10 * k + i) for i, (n, s) in enumerate(own.items())}
        B = {n: moment(s[1], 100 + 10 * k + i) for i, (n, s) in enumerate(own.items())}
        prefix = f"model.layers.{k}.mlp."
        return Seen(C, B, [HiddenBond((prefix + "up",), prefix + "down", 96)])

    matrices, bonds = fast_profile(SHAPES, W.__getitem__, seen, metric="loss", damping=1e-6)
    table = TableProfile("model.embed", 64, 48, dict.fromkeys((0, 32, 64, 128), 0.5))
    found = Profile("test", 4, OTHER, "loss", 1000, matrices, bonds, (table,))
    return replace(found, **changes)
