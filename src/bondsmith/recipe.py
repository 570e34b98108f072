"""The settings of one compression, validated, in and out of YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from bondsmith.tensor.rounding import BITS, CODEBOOKS, Grid

BUDGETS = ("keep", "bytes", "multiply_adds", "loss")
UNROUNDED = 16
GROUPS = (32, 64, 128)  # columns that may share a scale in a plan
ROUNDINGS = ("compensated", "searched", "nearest")
METRICS = ("frobenius", "input", "loss")
DTYPES = ("auto", "float32", "float16", "bfloat16")
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "not a whole number"),
    "float": (int | float, "not a number"),
    "bool": (bool, "neither true nor false"),
    "str": (str, "not a text"),
}
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SITES = re.compile(r"auto|matrix|interleaved:[2-9]|thin:[1-9]\d*|(\(\d+,\d+\))+")


class RecipeError(ValueError):
    """A setting is wrong; the message names it, its value and what would be right."""


@dataclass(frozen=True)
class Recipe:
    """Settings of `bondsmith compress`; every field is a key of a recipe file.

    Attributes:
        keep: share of the parameters of the tensorised matrices that is kept, in (0, 1].
        bytes: size of the weight files: a share of the original at 4 bytes a parameter ("0.07") or a size ("38MB").
        multiply_adds: share of the matrices' multiply-adds that may be left, in (0, 1].
        loss: predicted loss that is tolerated, in nats a token: the smallest file within it is planned.
            At least one of these four; a uniform plan takes either keep or bytes.
        uniform: every matrix keeps the same share, instead of what the profile says it can bear.
        bits: widths that a plan may round weights to, out of 16 (not rounded), 8, 4, 3, 2. Empty: 16 alone, or all where `bytes` or `loss`
            is given.
        rounding: compensated (later weights and cores make up for the errors of earlier ones; without moments as searched), searched (to
            nearest, each scale the best for its group) or nearest (to nearest, scales from the largest entry: what plain quantizers do).
        group: columns that share a scale in rounding to 4 bits and fewer; 0, a whole row, in a uniform plan.
        symmetric: no centre per group: levels lie evenly about zero.
        codebook: levels of 4 bits: uniform (evenly spaced, about a centre per group) or nf4 (those of QLoRA).
        plan: file of a plan to carry out as it is (`plan.json`); budgets are then not needed.
        profile: directory of a finished profile to go on from; the settings of calibration are taken from it.
        bounds: glob pattern of matrices -> (least, largest) share of their parameters that a plan keeps; the last match decides.
        probe_windows: calibration windows on which probes correct the scale of the profile, block by block; 0 leaves it as predicted.
        channels: a plan may also drop hidden channels of MLPs (their hidden bond), refitting the matrix that reads them.
        metric: error that the networks minimise: frobenius, input (second moments of inputs) or loss (also of gradients). auto is loss,
            or input, with a warning, where a pass back through one block does not fit into memory.
        sites: shape of the networks: auto, matrix, interleaved:N or thin:S.
        propagate: fit each matrix to the inputs that the already compressed layers before it produce.
        propagation_parts: of the calibration windows; ridge and strength of the corrections are those that do best on a part when fitted to
            all others. 1 judges nothing and halves them.
        propagation_strength: share of the propagation correction that enters, in [0, 1].
        stream_strength: share of the error of the residual stream that a matrix which writes into it makes up for, in [0, 1].
        gauge: store one identity block fewer per bond (same operator, fewer numbers).
        calibration: SPECs of calibration text, see `bondsmith.data`.
        tokens: calibration tokens in all.
        window: tokens per window.
        gradient_share: share of the windows that a pass back gives gradients for, in (0, 1]: fewer cost less time and accuracy.
        evaluation: SPECs of evaluation text; a held-out part of the calibration text is used always.
        evaluation_windows: windows per evaluation text.
        damping: share of the mean eigenvalue added to the second moments that networks are cut in: few tokens make rare directions look
            rarer than they are. Predictions and rounding take at most a thousandth.
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
    multiply_adds: float | None = None
    loss: float | None = None
    uniform: bool = False
    bits: tuple[int, ...] = ()
    rounding: str = "compensated"
    group: int = 64
    symmetric: bool = False
    codebook: str = "uniform"
    plan: str | None = None
    profile: str | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    probe_windows: int = 0
    channels: bool = True
    metric: str = "auto"
    sites: str = "auto"
    propagate: bool = True
    propagation_parts: int = 4
    propagation_strength: float = 1.0
    stream_strength: float = 1.0
    gauge: bool = True
    calibration: tuple[str, ...] = ("self",)
    tokens: int = 32768
    window: int = 512
    gradient_share: float = 1.0
    evaluation: tuple[str, ...] = ()
    evaluation_windows: int = 8
    damping: float = 0.05
    blockwise: int = 0
    blockwise_rate: float = 0.002
    blockwise_view: float = 0.0
    blockwise_ahead: int = 1
    keep_dense: tuple[str, ...] = field(default=())
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration", "evaluation", "keep_dense"):
            value = getattr(self, name)
            if not isinstance(value, str | list | tuple) or not all(isinstance(v, str) for v in value):
                raise RecipeError(f"{name}: {value!r} is neither a text nor a list of texts")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("bytes", "plan", "profile"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(value))
        bits = (self.bits,) if isinstance(self.bits, int) else self.bits
        object.__setattr__(self, "bits", tuple(bits))
        self._check_types()
        self._check_bounds()
        self._check_rounding()
        self._check_budgets()
        self._check()

    def _check_types(self) -> None:
        for one in fields(self):
            kind, _, none = str(one.type).partition(" | ")
            value = getattr(self, one.name)
            if kind not in _KINDS or (none and value is None):
                continue
            types, needed = _KINDS[kind]
            if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
                raise RecipeError(f"{one.name}: {value!r} is {needed}")

    def _check(self) -> None:
        if self.bytes is not None:
            parse_bytes(self.bytes, 4)
        if self.metric not in ("auto", *METRICS):
            raise RecipeError(f"metric: {self.metric!r} is not one of auto, {', '.join(METRICS)}")
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
        for name, least in (("evaluation_windows", 1), ("propagation_parts", 1), ("probe_windows", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name}: {getattr(self, name)} is less than {least}")
        for name in ("propagation_strength", "stream_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if not 0 < self.gradient_share <= 1:
            raise RecipeError(f"gradient_share: {self.gradient_share} is not in (0, 1]")
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

    def _check_budgets(self) -> None:
        if not self.planned and self.plan is None and len(self.grids) != 1:
            raise RecipeError(f"bits: a uniform plan has one width, not {', '.join(map(str, self.bits))}")
        if self.plan is not None:
            if any(getattr(self, name) is not None for name in BUDGETS) or self.uniform:
                raise RecipeError("plan: a finished plan needs no budget and is not uniform; give one or the other")
            said = [n for n in ("bits", "keep_dense", "bounds") if getattr(self, n)]
            said += [n for n in ("gauge", "channels") if not getattr(self, n)]
            if said:
                raise RecipeError(
                    f"plan: a finished plan says itself what becomes of every matrix; leave {', '.join(said)} away"
                )
            return
        if not self.planned:
            why = "uniform" if self.uniform else f"sites {self.sites}, which give every matrix the same share"
            if self.multiply_adds is not None or self.loss is not None or self.bounds:
                raise RecipeError(f"keep or bytes alone go with {why}; multiply_adds, loss and bounds need a plan")
            if (self.keep is None) == (self.bytes is None):
                raise RecipeError(
                    f"give either keep (share of parameters, e.g. 0.8) or bytes (e.g. 0.07 or 38MB) with {why}, not both or none"
                )
        if all(v is None for v in (self.keep, self.bytes, self.multiply_adds, self.loss)):
            raise RecipeError(
                "give a budget: keep (share of parameters, e.g. 0.8), bytes (e.g. 0.07 or 38MB), multiply_adds or loss"
            )
        for name in ("keep", "multiply_adds"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RecipeError(f"{name}: {value} is not in (0, 1]; 0.8 keeps four fifths")
        if self.loss is not None and not self.loss > 0:
            raise RecipeError(f"loss: {self.loss} nats a token is no tolerated loss; 0.03 is about 3 % of perplexity")
        if self.loss is not None and self.metric not in ("auto", "loss"):
            raise RecipeError(f"loss: the metric {self.metric!r} predicts no nats; use metric: loss")

    def _check_bounds(self) -> None:
        if not isinstance(self.bounds, Mapping):
            raise RecipeError(f"bounds: {self.bounds!r} is not a mapping of patterns to [least, largest] shares")
        checked: dict[str, tuple[float, float]] = {}
        for pattern, limits in self.bounds.items():
            pair = isinstance(limits, list | tuple) and len(limits) == 2
            if (
                not pair
                or any(type(limit) not in (int, float) for limit in limits)
                or not 0 <= limits[0] <= limits[1] <= 1
            ):
                raise RecipeError(
                    f"bounds: {pattern!r}: {limits!r} is not [least, largest] with 0 <= least <= largest <= 1"
                )
            checked[str(pattern)] = float(limits[0]), float(limits[1])
        object.__setattr__(self, "bounds", checked)

    def _check_rounding(self) -> None:
        for bits in self.bits:
            if bits != UNROUNDED and bits not in BITS:
                raise RecipeError(f"bits: {bits!r} is not one of 16 (not rounded), 8, 4, 3, 2")
        if self.codebook not in CODEBOOKS:
            raise RecipeError(f"codebook: {self.codebook!r} is not one of {', '.join(CODEBOOKS)}")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"rounding: {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if self.planned and self.rounding != "compensated":
            raise RecipeError(
                f"rounding: a plan predicts what compensated rounding loses; {self.rounding} goes with uniform: true"
            )
        if self.planned and self.rounds and self.group not in GROUPS:
            raise RecipeError(
                f"group: {self.group}: a plan knows the loss of rounding in groups of 32, 64 and 128 only"
            )
        if self.group < 8 and self.group != 0:
            raise RecipeError(
                f"group: {self.group} columns are too few to share a scale; 32, 64 and 128 are usual, 0 is a whole row"
            )

    def spares(self, name: str) -> bool:
        """Returns whether a matrix is to stay as it is."""
        return any(fnmatch(name, pattern) for pattern in self.keep_dense)

    @property
    def planned(self) -> bool:
        """True where bonds (and bits) are chosen from a profile; other site shapes than the matrix cut get uniform bonds."""
        return not self.uniform and self.plan is None and self.sites in ("auto", "matrix")

    @property
    def rounds(self) -> bool:
        """True where some numbers may be rounded."""
        return any(grid is not None for grid in self.grids)

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        """The ways a plan may store numbers; None is unrounded."""
        small = self.planned and (self.bytes is not None or self.loss is not None)  # the fewest bytes are asked for
        widths = self.bits or ((UNROUNDED, *reversed(BITS)) if small else (UNROUNDED,))
        order = sorted(set(widths), reverse=True)
        found = [None if b == UNROUNDED else grid_of(b, self.group, self.codebook, self.symmetric) for b in order]
        if self.planned and len(found) > 1:  # at two and three bits what the scales take is worth a choice
            found += [
                grid_of(b, 128, symmetric=self.symmetric) for b in sorted(set(widths)) if b <= 3 and self.group != 128
            ]
        return tuple(found)

    def for_rounding(self) -> Recipe:
        """Returns the recipe for a model that is compressed already, whose networks stay as they are and can only be rounded.

        RecipeError where it asks for anything else.
        """
        if not self.rounds:
            raise RecipeError(
                "a compressed model can only be rounded: give bits, or bytes, e.g. --bits 4 or --bytes 0.05"
            )
        if self.plan is not None or self.multiply_adds is not None or self.keep not in (None, 1.0):
            raise RecipeError(
                "a compressed model can only be rounded, its networks stay: give bits, or bytes, and neither a smaller keep, nor "
                "multiply_adds, nor a plan"
            )
        return self.changed(channels=False, bounds={"*": (1.0, 1.0)}) if self.planned else self

    @property
    def needs_moments(self) -> bool:
        """True unless the metric looks at the weights alone."""
        return self.metric != "frobenius"

    def parts(self, batches: int) -> int:
        """Returns in how many parts propagation deals so many batches."""
        return max(1, min(self.propagation_parts, batches)) if self.propagate else 1

    def held_out(self, windows: int) -> int:
        """Returns how many of the last windows judge block-wise training: neither fitted nor trained on."""
        return max(1, windows // 16) if self.blockwise and windows > 1 else 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, in field order."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return plain | {"bounds": {pattern: list(limits) for pattern, limits in self.bounds.items()}}

    def given(self) -> dict[str, Any]:
        """Returns the size and the settings that are not the defaults."""
        plain = Recipe(keep=1.0).to_dict()
        found = {k: v for k, v in self.to_dict().items() if k in ("keep", "bytes") or v != plain[k]}
        return {k: v for k, v in found.items() if v is not None}

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
        """Returns the recipe of a YAML file, or of one that comes with the package (`int4`), with `changes` laid over it."""
        settings = read_settings(path)
        if any(name in changes for name in BUDGETS):
            settings = {k: v for k, v in settings.items() if k not in BUDGETS}
        return cls.from_settings(settings | changes)

    def changed(self, **changes: Any) -> Recipe:
        """Returns a copy with other values."""
        return replace(self, **changes)


def ready_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package: name -> file."""
    installed, checkout = Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes"
    return {file.stem: file for folder in (checkout, installed) for file in sorted(folder.glob("*.yaml"))}


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML file, or in the ready recipe of that name; RecipeError where there are none."""
    ready = ready_recipes()
    file = path if path.is_file() else ready.get(str(path), path)
    if not file.is_file():
        raise RecipeError(f"{path}: no such recipe file; the ready recipes are {', '.join(ready)}")
    try:
        settings = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} must hold `key: value` lines")
    return settings


def grid_of(bits: int, group: int, codebook: str = "uniform", symmetric: bool = False) -> Grid:
    """Returns the grid a plan rounds to: 8 bits per row; fewer in groups with a centre, unless `symmetric` or of a four-bit `codebook`."""
    if bits == 8:
        return Grid(8, 0)
    if bits == 4 and codebook != "uniform":
        return Grid(4, group, codebook=codebook)
    return Grid(bits, group, symmetric=symmetric)


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
