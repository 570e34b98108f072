"""The free form of a gauged network: all numbers of every core, balanced, as training wants it; and back.

A gauged network stores rows of its matrix and coefficients of them: compact, but a poor basis to walk in. The same operator with full
cores, the Schmidt values of every bond shared evenly by its two sides, learns faster (measured in docs/healing.md), and a step costs
less. Back comes by pivoting, without loss.

Legend: `a, b` bonds, `o, i` legs, `s` Schmidt values at a bond.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bondsmith.nn.linear import MPOLinear
from bondsmith.tensor.algebra import move_center
from bondsmith.tensor.contract import core_to_weight
from bondsmith.tensor.mpo import MPO

_SMALLEST = 1e-4  # of the largest root of a Schmidt value: directions below it are not blown up


def free(layer: MPOLinear) -> MPOLinear:
    """Returns the layer with full, balanced cores and the same matrix.

    `layer` itself comes back without a gauge, with bonds past the exact ones, or with cores of another
    kind: packed ones, whose integers stay, or adapters.

    >>> layer = MPOLinear.from_mpo(MPO((torch.randn(1, 6, 1, 2), torch.randn(2, 1, 4, 1))), gauge=True)
    >>> loose = free(layer)
    >>> loose.gauge, torch.allclose(loose.to_matrix(), layer.to_matrix(), atol=1e-5)
    (False, True)
    """
    if not layer.gauge or any(type(core) is not nn.Linear for core in layer.cores):
        return layer
    cores, like = _balanced(layer.to_mpo()), next(layer.parameters())
    if tuple(core.shape[3] for core in cores[:-1]) != layer.bonds:
        return layer
    loose = MPOLinear(layer.sites, layer.bonds, bias=layer.bias is not None, device="meta")
    from_right = layer.sites.sweeps_from_right(layer.bonds)
    for core, full in zip(loose.cores, cores, strict=True):
        weight = core_to_weight(full, from_right).to(like.dtype).contiguous()
        core.weight = nn.Parameter(weight, requires_grad=like.requires_grad)
    loose.bias = layer.bias
    return loose


def pivoted(loose: MPOLinear, dtype: torch.dtype | None = None) -> MPOLinear:
    """Returns the gauged layer with the matrix of a free one."""
    bias = None if loose.bias is None else loose.bias.detach()
    return MPOLinear.from_mpo(loose.to_mpo(), bias=bias, gauge=True, dtype=dtype)


def free_all(module: nn.Module) -> list[str]:
    """Puts the free form in the place of every gauged network of a model or block; returns their names."""
    freed = []
    for name, layer in list(module.named_modules()):
        if isinstance(layer, MPOLinear) and layer.gauge and (loose := free(layer)) is not layer:
            module.set_submodule(name, loose)
            freed.append(name)
    return freed


def pivot_all(module: nn.Module, freed: list[str]) -> None:
    """Gives the networks that `free_all` freed their gauge back."""
    for name in freed:
        loose = module.get_submodule(name)
        assert isinstance(loose, MPOLinear)
        layer = pivoted(loose)
        for parameter, like in zip(layer.parameters(), loose.parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
        module.set_submodule(name, layer)


def _balanced(mpo: MPO) -> list[Tensor]:
    """Returns the cores with `s^1/2` on either side of every bond, in float64."""
    cores = [core.to(torch.float64) for core in mpo.cores]
    move_center(cores, len(cores) - 1)
    move_center(cores, 0)
    roots: list[Tensor] = []
    for k in range(len(cores) - 1):
        a, o, i, b = cores[k].shape
        u, s, vt = torch.linalg.svd(cores[k].reshape(a * o * i, b), full_matrices=False)
        cores[k], cores[k + 1] = u.reshape(a, o, i, -1), torch.tensordot(s[:, None] * vt, cores[k + 1], 1)
        least = _SMALLEST * float(s[0].sqrt()) or 1.0  # a matrix of zeros has nothing to share
        roots.append(s.sqrt().clamp_min(least))
    for k, root in enumerate(roots):
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores
