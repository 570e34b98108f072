"""What the measured layer profile is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bondsmith.data import SELF
from bondsmith.recipe import METRICS, RecipeError


@dataclass(frozen=True)
class LayerSettings:
    """Settings of the layer profile.

    Attributes:
        blocks: which blocks; empty: the first, the one at a sixth of the depth, the middle one and the last.
        keeps: shares of a matrix's parameters that its networks may store.
        metric: what the networks minimise: frobenius (sequential SVD, the paper), input or loss (whitened cuts, or fitted networks). auto
            is loss, or input, with a warning, where a pass back through one block does not fit into memory.
        sites: shape of the networks, as in `bondsmith compress`.
        gauge: count one identity block fewer per bond of a matrix cut.
        calibration: SPECs of the text that the moments come from; not needed for frobenius.
        tokens: calibration tokens in all.
        evaluation: SPECs of the text that is scored; empty: a held-out part of the calibration text.
        windows: scored windows in all.
        window: tokens per window.
        tasks: lm-evaluation-harness tasks to score as well.
        data: folder of local benchmark files, or None for hub data sets.
        limit: rows per task.
        batch_size: rows per forward pass of a task.
        damping: share of the mean eigenvalue added to every second moment, as of compress.
        seed, device: as in a recipe.
    """

    blocks: tuple[int, ...] = ()
    keeps: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    metric: str = "auto"
    sites: str = "matrix"
    gauge: bool = True
    calibration: tuple[str, ...] = (SELF,)
    tokens: int = 8192
    evaluation: tuple[str, ...] = ()
    windows: int = 4
    window: int = 256
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    batch_size: int = 8
    damping: float = 0.05
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(f.default, tuple):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        if self.metric not in ("auto", *METRICS):
            raise RecipeError(f"metric: {self.metric!r} is not one of auto, {', '.join(METRICS)}")
        if not self.keeps or not all(0 < k < 1 for k in self.keeps):
            raise RecipeError(f"keeps: {list(self.keeps)}: shares between 0 and 1 are needed, e.g. 0.1,0.5,0.9")
        if self.windows < 1 or self.window < 2:
            raise RecipeError(
                f"{self.windows} windows of {self.window} tokens: at least one window of two tokens is scored"
            )
        if self.tokens < self.window:
            raise RecipeError(f"tokens: {self.tokens} do not fill one window of {self.window} tokens")
