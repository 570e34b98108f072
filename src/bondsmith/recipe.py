"""The settings of one compression, validated, in and out of YAML."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

METRICS = ("frobenius", "input", "loss")
DTYPES = ("auto", "float32", "float16", "bfloat16")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SITES = re.compile(r"auto|matrix|interleaved:[2-9]|thin:[1-9]\d*|(\(\d+,\d+\))+")


class RecipeError(ValueError):
    """A setting is wrong; the message names it, its value and what would be right."""


@dataclass(frozen=True)
class Recipe:
    """Settings of `bondsmith compress`; every field is a key of a recipe file.

    Attributes:
        keep: share of the parameters of the tensorised matrices that is kept, in (0, 1]. Give this or `bytes`.
        bytes: size of the weight files: a share of the original at 4 bytes a parameter ("0.07") or a size ("38MB").
        metric: error that the networks minimise: frobenius, input (second moments of inputs) or loss (also of gradients).
        sites: shape of the networks: auto, matrix, interleaved:N or thin:S.
        propagate: fit each matrix to the inputs that the already compressed layers before it produce.
        propagation_strength: share of the propagation correction that is applied, in [0, 1].
        gauge: store one identity block fewer per bond (same operator, fewer numbers).
        calibration: SPECs of calibration text, see `bondsmith.data`.
        tokens: calibration tokens in all.
        window: tokens per window.
        evaluation: SPECs of evaluation text; a held-out part of the calibration text is used always.
        evaluation_windows: windows per evaluation text.
        damping: share of the mean eigenvalue added to every second moment.
        blockwise: passes over the calibration windows that train each block's networks and norms, right after they are fitted; 0 for none.
        blockwise_rate: how far a step moves a network's cores, as a share of their size.
        blockwise_view: share of the loss on the original's inputs instead of those of the compressed blocks before, in [0, 1).
        blockwise_ahead: original blocks after it through which the error is followed; each is in memory meanwhile.
        keep_dense: glob patterns of matrices that stay as they are, e.g. "*.layers.0.*".
        dtype: dtype of the saved weights; auto is the checkpoint's own (float32 for GGUF files).
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        seed: seed of everything random.
    """

    keep: float | None = None
    bytes: str | None = None
    metric: str = "loss"
    sites: str = "auto"
    propagate: bool = True
    propagation_strength: float = 0.5
    gauge: bool = True
    calibration: tuple[str, ...] = ("self",)
    tokens: int = 32768
    window: int = 512
    evaluation: tuple[str, ...] = ()
    evaluation_windows: int = 8
    damping: float = 1e-3
    blockwise: int = 0
    blockwise_rate: float = 0.01
    blockwise_view: float = 0.0
    blockwise_ahead: int = 1
    keep_dense: tuple[str, ...] = field(default=())
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration", "evaluation", "keep_dense"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.bytes is not None:
            object.__setattr__(self, "bytes", str(self.bytes))
        self._check_types()
        self._check()

    def _check_types(self) -> None:
        for name in ("tokens", "window", "evaluation_windows", "blockwise", "blockwise_ahead", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise RecipeError(f"{name}: {value!r} is not a whole number")
        numbers = ("keep", "propagation_strength", "damping", "blockwise_rate", "blockwise_view")
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise RecipeError(f"{name}: {value!r} is not a number")
        for name in ("propagate", "gauge"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name}: {getattr(self, name)!r} is neither true nor false")

    def _check(self) -> None:
        if (self.keep is None) == (self.bytes is None):
            raise RecipeError(
                "give either keep (share of parameters, e.g. 0.8) or bytes (e.g. 0.07 or 38MB), not both or none"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"keep: {self.keep} is not in (0, 1]; 0.8 keeps four fifths of the matrices' parameters")
        if self.bytes is not None:
            parse_bytes(self.bytes, 4)
        if self.metric not in METRICS:
            raise RecipeError(f"metric: {self.metric!r} is not one of {', '.join(METRICS)}")
        if not _SITES.fullmatch(self.sites):
            raise RecipeError(
                f"sites: {self.sites!r} is not auto, matrix, interleaved:N (N from 2 to 9), thin:S or legs like (24,24)(24,24)"
            )
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.calibration:
            raise RecipeError("calibration: at least one SPEC is needed; 'self' needs no data")
        if self.window < 2 or self.tokens < self.window:
            raise RecipeError(f"tokens: {self.tokens} do not fill one window of {self.window} tokens")
        if self.evaluation_windows < 1:
            raise RecipeError(f"evaluation_windows: {self.evaluation_windows} is less than 1")
        if not 0 <= self.propagation_strength <= 1:
            raise RecipeError(f"propagation_strength: {self.propagation_strength} is not in [0, 1]")
        if not 0 < self.damping < 1:
            raise RecipeError(f"damping: {self.damping} is not in (0, 1)")
        self._check_blockwise()

    def _check_blockwise(self) -> None:
        if self.blockwise < 0 or self.blockwise_ahead < 0:
            raise RecipeError(
                f"blockwise: {self.blockwise} passes, {self.blockwise_ahead} blocks ahead: neither may be negative"
            )
        if not self.blockwise:
            return
        if not self.propagate or not self.needs_moments:
            raise RecipeError(
                "blockwise: training a block needs what the compressed blocks before it produce: "
                "set propagate to true and metric to input or loss"
            )
        if not 0 < self.blockwise_rate < 1:
            raise RecipeError(f"blockwise_rate: {self.blockwise_rate} is not in (0, 1)")
        if not 0 <= self.blockwise_view < 1:
            raise RecipeError(f"blockwise_view: {self.blockwise_view} is not in [0, 1)")
        if self.tokens < 2 * self.window:
            raise RecipeError(
                f"blockwise: {self.tokens} tokens are one window of {self.window}; one to train on and one held out are needed"
            )

    @property
    def needs_moments(self) -> bool:
        """True unless the metric looks at the weights alone."""
        return self.metric != "frobenius"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, in field order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def save(self, path: Path) -> None:
        """Writes the settings as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Recipe:
        """Returns the recipe of a mapping; RecipeError names an unknown key and the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(known)}"
                raise RecipeError(f"unknown setting {key!r}{hint}")
        return cls(**settings)

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Recipe:
        """Returns the recipe of a YAML file with `changes` laid over it."""
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        try:
            settings = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        if not isinstance(settings, dict):
            raise RecipeError(f"{path} must hold `key: value` lines")
        if "keep" in changes or "bytes" in changes:
            settings = {k: v for k, v in settings.items() if k not in ("keep", "bytes")}
        return cls.from_settings(settings | changes)

    def changed(self, **changes: Any) -> Recipe:
        """Returns a copy with other values."""
        return replace(self, **changes)


def parse_bytes(text: str, parameters: int) -> int:
    """Returns the size in bytes that `text` names: a share of 4 * `parameters` ("0.07") or a size ("38MB", "1.5GiB").

    >>> parse_bytes("0.5", 1000), parse_bytes("38MB", 1)
    (2000, 38000000)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if not match or (unit and unit not in _UNITS):
        raise RecipeError(f"bytes: {text!r} is neither a share like 0.07 nor a size like 38MB")
    number = float(match[1])
    if not unit and not 0 < number <= 1:
        raise RecipeError(f"bytes: a share of {number:g} is not in (0, 1]; write a unit for a size, e.g. {number:g}MB")
    if number == 0:
        raise RecipeError("bytes: a size of 0 is impossible")
    return int(number * _UNITS[unit]) if unit else int(number * 4 * parameters)
