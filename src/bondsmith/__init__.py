"""Makes language models small with tensor networks.

Importing the package teaches transformers to load compressed models; the rest is imported when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import bondsmith.model.hub  # noqa: F401  registers the quantizer, so that from_pretrained works
from bondsmith._version import __version__

if TYPE_CHECKING:
    from bondsmith.healing import Healed, heal
    from bondsmith.model.hub import load
    from bondsmith.model.source import ModelError
    from bondsmith.nn.linear import MPOLinear
    from bondsmith.nn.packed import PackedEmbedding, PackedLinear
    from bondsmith.pipeline import Compressed, compress
    from bondsmith.planner import Profiled, frontier, plan, profile
    from bondsmith.recipe import Recipe
    from bondsmith.stages.plan import Plan
    from bondsmith.stages.profile import Profile
    from bondsmith.tensor.rounding import Grid

_HOMES = {
    "Compressed": "bondsmith.pipeline",
    "Healed": "bondsmith.healing",
    "MPOLinear": "bondsmith.nn.linear",
    "Grid": "bondsmith.tensor.rounding",
    "ModelError": "bondsmith.model.source",
    "PackedEmbedding": "bondsmith.nn.packed",
    "PackedLinear": "bondsmith.nn.packed",
    "Plan": "bondsmith.stages.plan",
    "Profile": "bondsmith.stages.profile",
    "Profiled": "bondsmith.planner",
    "Recipe": "bondsmith.recipe",
    "compress": "bondsmith.pipeline",
    "frontier": "bondsmith.planner",
    "heal": "bondsmith.healing",
    "load": "bondsmith.model.hub",
    "plan": "bondsmith.planner",
    "profile": "bondsmith.planner",
}

__all__ = [
    "Compressed",
    "Grid",
    "Healed",
    "MPOLinear",
    "ModelError",
    "PackedEmbedding",
    "PackedLinear",
    "Plan",
    "Profile",
    "Profiled",
    "Recipe",
    "__version__",
    "compress",
    "frontier",
    "heal",
    "load",
    "plan",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bondsmith' has no attribute {name!r}")
