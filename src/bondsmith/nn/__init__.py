"""Modules that run networks."""

from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedEmbedding, PackedHead, PackedLinear

__all__ = ["MPOLinear", "PackedEmbedding", "PackedHead", "PackedLinear"]
