"""What of a compressed model is trained, and by which steps; block by block or as a whole.

Trained are the floating parameters of networks and of packed matrices (their scales), matrices that lost channels, norms and biases;
embedding, head and matrices that stayed as they were are not, unless asked for: a parameter is left out when the module that owns it is
an ordinary linear layer or embedding outside of a network.

Cores are moved by the orthogonalised momentum of Jordan et al. 2024 (Muon): all directions of a core learn alike, not only those few that
dominate the gradient; it keeps one number a parameter where Adam keeps two. Everything else is moved by Adam. Every tensor moves
relative to the size of its own entries: cores of one model differ a hundredfold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from bondsmith.nn.linear import MPOLinear
from bondsmith.nn.packed import PackedMatrix

MOMENTUM = 0.95
BETAS = (0.9, 0.95)
_DENSE = (nn.Linear, nn.Embedding, Conv1D)
_STRIP = 64  # rows of a core that are made orthogonal to each other
_TOGETHER = 2**24  # numbers of cores that are levelled together
_TINY = 1e-18  # of norms that are divided by; its square is a float32
_SIZE_OF_ZEROS = 1e-2  # by which tensors move that are zero at the start
# Odd quintics one after the other, each the best for what the one before leaves (Amsel et al. 2025), by linear programming on a grid:
# singular values from 0.003 to 1 come within 0.2 of 1
_QUINTICS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)


def trainable(module: nn.Module, embeddings: bool = False, dense: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model or block that are trained, by name; every other one is frozen.

    Args:
        embeddings: train embedding and head too.
        dense: names of linear layers that are trained too: those that lost channels and are dense otherwise.

    >>> block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    >>> list(trainable(block))
    ['0.weight', '0.bias']
    """
    frozen = {id(p) for p in _dense_weights(module, embeddings, dense)}
    chosen = {}
    for name, parameter in module.named_parameters():
        train = parameter.is_floating_point() and id(parameter) not in frozen
        parameter.requires_grad_(train)
        if train:
            chosen[name] = parameter
    return chosen


def train_scales_inside(model: nn.Module, embeddings: bool = False) -> None:
    """Makes parameters of the scales of packed matrices; those of embedding and head only with `embeddings`."""
    ends = set() if embeddings else _ends(model)
    for module in model.modules():
        if isinstance(module, PackedMatrix) and id(module) not in ends:
            module.train_scales()


def reduced_matrices(quantization: Any) -> list[str]:
    """Returns the matrices that lost channels and are dense otherwise, from a `quantization_config`: they are no longer the original's.

    >>> reduced_matrices({"networks": {"a": {"shape": [4, 4]}, "b": {"sites": [[4, 1], [1, 4]]}}})
    ['a']
    """
    get = quantization.get if isinstance(quantization, dict) else lambda name: getattr(quantization, name, None)
    packed = get("packed") or {}
    return [
        name for name, network in (get("networks") or {}).items() if not network.get("sites") and name not in packed
    ]


def _dense_weights(module: nn.Module, embeddings: bool, dense: Collection[str]) -> Iterator[nn.Parameter]:
    """Yields the weights of linear layers and embeddings outside of networks, except `dense` and, with `embeddings`, both ends."""
    spared = _core_modules(module) | (_ends(module) if embeddings else set())
    spared |= {id(module.get_submodule(name)) for name in dense}
    for owner in module.modules():
        if isinstance(owner, _DENSE) and id(owner) not in spared:
            yield from (p for leaf, p in owner.named_parameters(recurse=False) if leaf == "weight")


def _core_modules(module: nn.Module) -> set[int]:
    return {id(core) for layer in module.modules() if isinstance(layer, MPOLinear) for core in layer.cores}


def _ends(module: nn.Module) -> set[int]:
    getters = (getattr(module, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return {id(get()) for get in getters if get is not None}


class Steps(torch.optim.Optimizer):
    """Moves cores by orthogonalised momentum and everything else by Adam, each at a rate relative to its size.

    Args:
        module: the model or block whose parameters these are.
        parameters: by name, from `trainable`.
        core_rate, other_rate: root mean square of a step's change over that of the tensor, before `scale`. `lr` of a group is that
            rate times the size of its tensor: schedulers that act on `lr` work.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], core_rate: float, other_rate: float):
        ends = {id(p) for m in module.modules() if id(m) in _ends(module) for p in m.parameters()}
        linear = (m.weight for m in module.modules() if isinstance(m, nn.Linear | Conv1D))
        cores = {id(weight) for weight in linear} - ends
        groups = []
        for parameter in parameters.values():
            is_core = id(parameter) in cores and parameter.dim() == 2
            rate = (core_rate if is_core else other_rate) * _size(parameter)
            groups.append({"params": [parameter], "core": is_core, "lr": rate})
        super().__init__(groups, {})
        self.scale = 1.0
        for parameter, group in self._all():
            names = ("momentum",) if group["core"] else ("mean", "square")
            self.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
            self.state[parameter]["step"] = torch.zeros(())

    def _all(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient; `scale` is the share of the full rate."""
        cores = []
        for parameter, group in self._all():
            if parameter.grad is None:
                continue
            self.state[parameter]["step"] += 1
            if group["core"]:
                cores.append((parameter, group))
            else:
                change = _adam_change(parameter, self.state[parameter])
                _part(parameter).add_(change, alpha=-group["lr"] * self.scale)
        for batch in _batches(cores):
            ahead = [_ahead(parameter, self.state[parameter]) for parameter, _ in batch]
            moved = [_whole(parameter, like) for (parameter, _), like in zip(batch, ahead, strict=True)]
            _add_levels(ahead, moved, [-group["lr"] * self.scale for _, group in batch])
            for (parameter, _), whole in zip(batch, moved, strict=True):
                if isinstance(parameter, DTensor):
                    parameter.to_local().add_(_share(whole, parameter))


def _batches(cores: list[tuple[nn.Parameter, dict[str, Any]]]) -> Iterator[list[tuple[nn.Parameter, dict[str, Any]]]]:
    """Yields cores together, up to `_TOGETHER` numbers; on every process the same ones in the same order."""
    batch: list[tuple[nn.Parameter, dict[str, Any]]] = []
    for core in cores:
        if batch and sum(parameter.numel() for parameter, _ in (*batch, core)) > _TOGETHER:
            yield batch
            batch = []
        batch.append(core)
    if batch:
        yield batch


def _part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is on this process; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _ahead(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Takes the gradient into the momentum; returns both mixed, of the whole core: every process levels all of it."""
    assert parameter.grad is not None
    gradient, momentum = _part(parameter.grad), _part(state["momentum"])
    momentum.lerp_(gradient, 1 - MOMENTUM)
    ahead = gradient.lerp_(momentum, MOMENTUM)
    if not isinstance(parameter, DTensor):
        return ahead
    mesh, places = parameter.device_mesh, parameter.placements
    parts = DTensor.from_local(ahead, mesh, places, run_check=False, shape=parameter.shape, stride=parameter.stride())
    whole: Tensor = parts.full_tensor()
    return whole


def _whole(parameter: Tensor, like: Tensor) -> Tensor:
    """What the change of a core is added to: the core, or where a process has only a part of it, zeros of its whole size."""
    return torch.zeros_like(like) if isinstance(parameter, DTensor) else parameter


def _share(change: Tensor, parameter: DTensor) -> Tensor:
    """The part of a change of the whole core that this process makes."""
    return distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _add_levels(matrices: Sequence[Tensor], moved: Sequence[Tensor], rates: Sequence[float]) -> None:
    """Adds to `moved` the orthogonal polar factors of matrices, nearly, with entries of root mean square `rates`.

    The small side is dealt into strips of at most `_STRIP`, each levelled by itself: what a strip costs grows with its square or cube.
    """
    alike = defaultdict(list)  # by their height
    for matrix, whole, rate in zip(matrices, moved, rates, strict=True):
        for strips, places in zip(_strips(matrix), _strips(whole), strict=True):
            alike[strips.shape[1]].append((strips, places, rate))
    for group in alike.values():
        factors = _factors([strips for strips, _, _ in group]).split([len(strips) for strips, _, _ in group])
        for factor, (strips, places, rate) in zip(factors, group, strict=True):
            places.baddbmm_(factor, strips, alpha=rate)


def _strips(matrix: Tensor) -> Iterator[Tensor]:
    """Yields views of the parts of a matrix that are levelled by themselves, as wide matrices of one height: at most two stacks."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    count = -(-len(wide) // _STRIP)
    height, higher = divmod(len(wide), count or 1)
    edge = higher * (height + 1)
    for rows, strips in ((wide[:edge], higher), (wide[edge:], count - higher)):
        if strips:
            yield rows.unflatten(0, (strips, -1))


def _factors(stacks: Sequence[Tensor]) -> Tensor:
    """Returns what strips of one height are multiplied by; all steps are on their Gram matrices, whose polynomials commute."""
    gram = torch.cat([x @ x.mT for x in stacks])
    norms = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() + _TINY
    start = gram = gram / norms.square()[:, None, None]
    square = gram @ gram
    bound = (square.norm(dim=(-2, -1)).sqrt() + 1e-12)[:, None, None]  # just above the largest eigenvalue
    gram, square = gram / bound, square / bound.square()
    product = None
    for k, (a, b, c) in enumerate(_QUINTICS):
        factor = (b * gram).add_(square, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if k + 1 < len(_QUINTICS):
            gram = factor @ gram @ factor
            square = gram @ gram
    assert product is not None
    sizes = ((product @ start) * product).sum((-2, -1)).clamp_min(0).sqrt() * norms  # Frobenius norms of what comes out
    counts = torch.cat([sizes.new_full((len(x),), x[0].numel()) for x in stacks])
    return product * (counts.sqrt() / (sizes + _TINY))[:, None, None]


def _adam_change(parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    assert parameter.grad is not None
    gradient, mean, square = _part(parameter.grad), _part(state["mean"]), _part(state["square"])
    (first, second), step = BETAS, float(state["step"])
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    return mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + 1e-12)


def _size(parameter: Tensor) -> float:
    tensor = parameter.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    size = float(whole.square().mean().sqrt()) if whole.numel() else 0.0
    return size or _SIZE_OF_ZEROS


def cosine(step: int, total: int, warmup: float, least: float = 0.02) -> float:
    """Returns the share of the full rate at a step from 0: a straight rise, then a cosine down to `least`.

    >>> [round(cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.51, 0.02]
    """
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
