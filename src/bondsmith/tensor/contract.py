"""Contraction of a network with vectors, site by site, as GEMMs only.

Legend: `T` tokens, `o`/`i` legs, `a, b` bonds. Contracting a site is a linear layer. From the last site to the first
its weight is `(a o, i b)`; from the first to the last it is `(b o, i a)`: the same network read from the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bondsmith.tensor.sites import Sites


def core_to_weight(core_aoib: Tensor, from_right: bool) -> Tensor:
    """The weight `(a o, i b)`, or `(b o, i a)` from the left, of the linear layer that contracts this core."""
    core = core_aoib if from_right else core_aoib.permute(3, 1, 2, 0)
    return core.reshape(core.shape[0] * core.shape[1], core.shape[2] * core.shape[3])


def weight_to_core(weight: Tensor, shape_aoib: tuple[int, int, int, int], from_right: bool) -> Tensor:
    """The `(a, o, i, b)` core whose `core_to_weight` is `weight`."""
    a, o, i, b = shape_aoib
    return weight.reshape(a, o, i, b) if from_right else weight.reshape(b, o, i, a).permute(3, 1, 2, 0)


def sweep(
    sites: Sites, bonds: Sequence[int], layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, from_right: bool
) -> Tensor:
    """`W x` for `x` of shape `(..., I)`: `(..., O)`, one call of `layers[k]` per site.

    Before a site the state is `(T, out legs done, in legs waiting, i b)`; its layer turns `i b` into `a o`, and one
    transpose moves `o` out of the way. Coming from the right the out legs end up reversed, from the left the in legs
    start reversed.
    """
    order = range(sites.n - 1, -1, -1) if from_right else range(sites.n)
    joined = (1, *bonds, 1)
    state = x if from_right else _reverse(x.reshape(-1, *sites.in_legs))
    done, waiting = 1, sites.in_features
    for k in order:
        o, i = sites.out_legs[k], sites.in_legs[k]
        behind, ahead = (joined[k + 1], joined[k]) if from_right else (joined[k], joined[k + 1])
        waiting //= i
        state = layers[k](state.reshape(-1, done, waiting, i * behind))
        state = state.reshape(-1, done, waiting * ahead, o).transpose(-1, -2)
        done *= o
    state = state.reshape(-1, *(sites.out_legs[k] for k in order))
    return (_reverse(state) if from_right else state).reshape(*x.shape[:-1], sites.out_features)


def _reverse(x: Tensor) -> Tensor:
    return x.permute(0, *range(x.dim() - 1, 0, -1))
