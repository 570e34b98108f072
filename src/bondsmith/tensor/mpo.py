"""The matrix product operator: a matrix as a chain of cores.

Legend: `O` out features, `I` in features, `o, i` legs of a site, `a, b` bonds left and right of it, `T` tokens.
`W[(o_1..o_n), (i_1..i_n)] = sum_a G_1[1,o_1,i_1,a_1] G_2[a_1,o_2,i_2,a_2] ... G_n[a_{n-1},o_n,i_n,1]`.

A batch of networks of the same legs and bonds (the experts of a mixture) is one object with leading dimensions: cores
`(N, a, o, i, b)`, matrices `(N, O, I)`. All of the algebra works on it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bondsmith.tensor.checks import check_finite
from bondsmith.tensor.contract import core_to_weight, sweep
from bondsmith.tensor.sites import Sites


@dataclass(frozen=True, eq=False)
class MPO:
    """A network of cores `(..., a, o, i, b)`; ValueError if the bonds do not meet or an entry is not finite.

    >>> mpo = MPO((torch.ones(1, 2, 1, 3), torch.ones(3, 1, 4, 1)))
    >>> print(mpo, mpo.to_matrix().shape, float(mpo.to_matrix()[0, 0]))
    MPO (2,1)(1,4) bonds (3,), 18 parameters torch.Size([2, 4]) 3.0
    >>> print(MPO.stack([mpo, mpo]))
    2 times MPO (2,1)(1,4) bonds (3,), 36 parameters
    """

    cores: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cores", tuple(self.cores))
        shapes = [tuple(core.shape) for core in self.cores]
        if not shapes or any(len(shape) < 4 or 0 in shape for shape in shapes):
            raise ValueError(f"cores have shapes {shapes}; each needs four legs (a, o, i, b) of at least 1")
        if len({shape[:-4] for shape in shapes}) > 1:
            raise ValueError(f"cores have shapes {shapes}; the dimensions before (a, o, i, b) differ")
        left, right = [1, *(shape[-1] for shape in shapes)], [*(shape[-4] for shape in shapes), 1]
        if left != right:
            raise ValueError(
                f"cores of shapes {shapes} do not meet: bonds {left} from the left, {right} from the right"
            )
        for k, core in enumerate(self.cores):
            check_finite(core, f"core {k} of {len(shapes)}")

    @property
    def sites(self) -> Sites:
        """The legs."""
        return Sites(tuple(core.shape[-3] for core in self.cores), tuple(core.shape[-2] for core in self.cores))

    @property
    def batch(self) -> torch.Size:
        """The leading dimensions; empty for one network."""
        return self.cores[0].shape[:-4]

    @property
    def bonds(self) -> tuple[int, ...]:
        """The `n - 1` bond dimensions."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores)

    @property
    def dtype(self) -> torch.dtype:
        """Of the cores."""
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the cores."""
        return self.cores[0].device

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MPO:
        """The same network in another dtype or place."""
        return MPO(tuple(core.to(dtype=dtype or core.dtype, device=device or core.device) for core in self.cores))

    @classmethod
    def stack(cls, mpos: Sequence[MPO]) -> MPO:
        """Networks of the same legs as a batch; bonds are filled up with zeros to the largest."""
        if any(mpo.batch for mpo in mpos):
            raise ValueError("batches of networks do not make a batch; take their networks one by one")
        if len({mpo.sites for mpo in mpos}) != 1:
            raise ValueError(f"networks with sites {[str(mpo.sites) for mpo in mpos]} do not make a batch: other legs")
        bonds = [max(sizes) for sizes in zip(*(mpo.bonds for mpo in mpos), strict=True)]
        shapes = mpos[0].sites.core_shapes(bonds)
        return cls(tuple(torch.stack([_filled(mpo.cores[k], shape) for mpo in mpos]) for k, shape in enumerate(shapes)))

    def __getitem__(self, index: int) -> MPO:
        """Network `index` of a batch; IndexError if there is none."""
        if not self.batch:
            raise IndexError(f"{self} is one network, not a batch")
        return MPO(tuple(core[index] for core in self.cores))

    def to_matrix(self) -> Tensor:
        """The `(..., O, I)` matrix."""
        return fold(self.cores)

    def apply(self, x: Tensor) -> Tensor:
        """`W x` for `x` of shape `(..., I)`: `(..., O)`, from the end that costs less, or by the matrix where that does.

        A batch of `N` networks takes `(N, ..., I)`, each its own part.
        """
        if x.shape[-1:] != (self.sites.in_features,):
            raise ValueError(f"x has shape {tuple(x.shape)}; sites {self.sites} take {self.sites.in_features} features")
        if self.batch:
            if x.shape[: len(self.batch)] != self.batch:
                raise ValueError(f"x has shape {tuple(x.shape)}; {tuple(self.batch)} networks need as many parts")
            parts = x.flatten(0, len(self.batch) - 1) if len(self.batch) > 1 else x
            flat = MPO(tuple(core.flatten(0, -5) for core in self.cores))
            y = torch.stack([flat[n].apply(part) for n, part in enumerate(parts)])
            return y.reshape(*x.shape[:-1], -1)
        if x.numel() >= self.sites.in_features * self.sites.materialise_from(self.bonds):
            return F.linear(x, self.to_matrix())
        from_right = self.sites.sweeps_from_right(self.bonds)
        layers = [partial(F.linear, weight=core_to_weight(core, from_right)) for core in self.cores]
        return sweep(self.sites, self.bonds, layers, x, from_right)

    def save(self, path: str | Path) -> None:
        """Write the cores to one file; `load` takes it back bit by bit."""
        torch.save({"cores": [core.clone(memory_format=torch.contiguous_format) for core in self.cores]}, path)

    @classmethod
    def load(cls, path: str | Path) -> MPO:
        """The network that `save` wrote; ValueError if the file holds something else."""
        data = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(data, dict) or set(data) != {"cores"}:
            raise ValueError(f"{path} holds no network that MPO.save wrote")
        return cls(tuple(data["cores"]))

    def __str__(self) -> str:
        count = f"{self.batch.numel()} times " if self.batch else ""
        return f"{count}MPO {self.sites} bonds {self.bonds}, {self.parameters} parameters"


def fold(cores: Sequence[Tensor]) -> Tensor:
    """The `(..., O, I)` matrix of a chain of cores `(..., a, o, i, b)`, folded in from the first on, one GEMM each."""
    block = cores[0].squeeze(-4)
    batch = block.shape[:-3]
    for core in cores[1:]:
        rows, columns, _ = block.shape[-3:]
        a, o, i, b = core.shape[-4:]
        block = block.reshape(*batch, rows * columns, a) @ core.reshape(*batch, a, o * i * b)
        block = block.reshape(*batch, rows, columns, o, i, b).transpose(-4, -3)
        block = block.reshape(*batch, rows * o, columns * i, b)
    return block[..., 0]


def _filled(core: Tensor, shape: Sequence[int]) -> Tensor:
    a, _, _, b = core.shape
    return torch.nn.functional.pad(core, (0, shape[3] - b, 0, 0, 0, 0, 0, shape[0] - a))
