"""Checks of what comes into the mathematics; each raises ValueError with the numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_matrix(weight: Tensor, name: str = "weight") -> None:
    """Nothing, or ValueError if `weight` is not a finite real matrix."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; a non-empty matrix (O, I) is needed")
    if not weight.is_floating_point():
        raise ValueError(f"{name} holds {weight.dtype}; floating point numbers are needed")
    check_finite(weight, name)


def check_finite(tensor: Tensor, name: str) -> None:
    """Nothing, or ValueError that counts the entries that are NaN or infinite."""
    bad = 0 if math.isfinite(float(tensor.detach().sum())) else int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite entries of {tensor.numel()}")


def check_moment(moment: Tensor, size: int, name: str) -> None:
    """Nothing, or ValueError if `moment` is not a finite symmetric `(size, size)` matrix with no negative diagonal."""
    if moment.shape != (size, size):
        raise ValueError(f"{name} has shape {tuple(moment.shape)}; the weight needs ({size}, {size})")
    check_finite(moment, name)
    scale = float(moment.diagonal().abs().max())
    panels = torch.split(moment, 512)  # no second copy of a large moment
    columns = torch.split(moment, 512, 1)
    asymmetry = max(float((rows - others.T).abs().max()) for rows, others in zip(panels, columns, strict=True))
    if asymmetry > 1e-3 * scale:
        raise ValueError(f"{name} is not symmetric: entries differ by {asymmetry:.3g} at a scale of {scale:.3g}")
    if float(moment.diagonal().min()) < 0:
        raise ValueError(
            f"{name} is not a second moment: its diagonal goes down to {float(moment.diagonal().min()):.3g}"
        )
