"""Scales and centres as torch's int4 kernels read them: `(G, rows, 2)` bfloat16, what to multiply by and what to add.

Legend: `O` out features, `G` groups of a row; `rows` are the `O` and those that fill up a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def side_by_side(scales: Tensor, centres: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The same `(O, G)` tensors as views of one that lies as the kernels read it."""
    both = F.pad(torch.stack((scales.T, centres.T), -1), (0, 0, 0, rows - len(scales)))
    return both[:, : len(scales), 0].T, both[:, : len(scales), 1].T


def pairs(scales: Tensor, centres: Tensor | None, rows: int) -> Tensor:
    """`(G, rows, 2)`: a view where they lie side by side, else made now.

    Symmetric grids have no centres: the middle code of the kernels, `q = 8`, stands for half a step above zero.
    """
    given, groups = scales.shape
    if centres is not None and _lie_side_by_side(scales, centres, rows):
        return scales.as_strided((groups, rows, 2), (2 * rows, 2, 1))
    both = torch.empty(groups, rows, 2, dtype=torch.bfloat16, device=scales.device)
    both[:, :given, 0], both[:, given:] = scales.T, 0
    both[:, :given, 1] = scales.T / 2 if centres is None else centres.T
    return both


def _lie_side_by_side(scales: Tensor, centres: Tensor, rows: int) -> bool:
    as_pairs = scales.dtype == torch.bfloat16 and scales.stride() == centres.stride() == (2, 2 * rows)
    return as_pairs and centres.data_ptr() == scales.data_ptr() + scales.element_size()
