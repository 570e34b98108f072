"""Modules that run networks."""

from bondsmith.nn.linear import MPOLinear

__all__ = ["MPOLinear"]
