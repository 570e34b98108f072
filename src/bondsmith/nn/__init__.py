"""Modules that run networks."""

from bondsmith.nn.exact import ExactLinear
from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear, widen

__all__ = ["ExactLinear", "MPOLinear", "PackedEmbedding", "PackedHead", "PackedLinear", "widen"]
