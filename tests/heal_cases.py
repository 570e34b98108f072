"""What the tests of healing share: a tiny model, its compressed form, and a healing of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import save_tiny, write_text

import bondsmith

SETTINGS: dict[str, Any] = {
    "tokens": 5120,
    "window": 64,
    "batch": 8,
    "micro_batch": 4,
    "learning_rate": 0.01,
    "validate_every": 2,
}


def make_home(path: Path) -> Path:
    """Returns the folder with a tiny model, a text and the compressed model."""
    save_tiny(path / "model")
    write_text(path / "text.txt", 8000)
    shared = {"evaluation": [str(path / "text.txt")], "window": 64, "evaluation_windows": 2}
    bondsmith.compress(path / "model", path / "small", keep=0.3, uniform=True, metric="frobenius", **shared)
    return path


def heal(home: Path, out: Path, **changes: Any) -> bondsmith.Healed:
    return bondsmith.heal(home / "small", out, **({"data": [str(home / "text.txt")]} | SETTINGS | changes))


def weights(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.glob("bondsmith-*"))}
