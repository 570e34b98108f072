"""Layers whose weights are a few bits each, in memory as on disk.

- Codes are packed bytes, scales and centres bfloat16; no float copy of the matrix outlives a call.
- bfloat16 activations go through torch's kernels while tokens are few: int8 and int4 on a CPU, int4 on CUDA; everything else unpacks
  some rows at a time and multiplies.
- Gradients reach inputs, and scales once `train_scales` made parameters of them; the integers stay.
- `.to(dtype)` leaves scales alone: their bits are the format's.

Legend: `T` tokens, `O` out features, `I` in features, `G` groups of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bondsmith.nn import code_order, cuda_int4, kernels, pairs
from bondsmith.tensor.packing import row_bytes
from bondsmith.tensor.rounding import SCALE_DTYPE, Grid, Rounded, packed_levels, scaled


class PackedMatrix(nn.Module):
    """A rounded `(O, I)` matrix as buffers `codes`, `scales`, `centres`; zeros until it is filled."""

    codes: Tensor
    scales: Tensor
    centres: Tensor | None

    def __init__(self, rows: int, columns: int, grid: Grid, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.grid, self.rows, self.columns = grid, rows, columns
        self._kernel_grid = code_order.kernel_grid(grid)
        groups = (rows, grid.groups(columns))
        self.register_buffer(
            "codes", torch.zeros(rows, row_bytes(columns, grid.bits), dtype=torch.uint8, device=device)
        )
        self.register_buffer("scales", torch.zeros(groups, dtype=SCALE_DTYPE, device=device))
        centres = None if grid.symmetric else torch.zeros(groups, dtype=SCALE_DTYPE, device=device)
        self.register_buffer("centres", centres)

    def put(self, rounded: Rounded) -> None:
        """Takes the codes, scales and centres of a rounded matrix; ValueError if it has another shape or grid."""
        if rounded.grid != self.grid or rounded.shape != (self.rows, self.columns):
            raise ValueError(
                f"a {rounded.shape[0]} x {rounded.shape[1]} matrix on {rounded.grid} does not fit into a packed one of "
                f"{self.rows} x {self.columns} on {self.grid}"
            )
        self.codes, self.scales, self.centres = rounded.pack(), rounded.scales, rounded.centres

    def packed_codes(self) -> Tensor:
        """The packed bytes in the order of the file format."""
        return code_order.to_file(self.codes, self.grid, self.rows, self.columns)

    def widen(self) -> bool:
        """Keeps codes of two and three bits as four, for torch's int4 kernel; returns whether it takes such a matrix.

        Weights stay what they are, to the bit, and so does what is saved; memory is that of four bits.
        """
        if self.grid.bits not in (2, 3) or self.codes.device.type != "cpu":
            return False
        if kernels.has_int4(self._kernel_grid, self.rows, self.columns):
            self._bring_into("cpu")
        return code_order.order(self.codes) == "cpu"

    def to_rounded(self) -> Rounded:
        """The rounded matrix."""
        scales = _stored(self.scales)
        centres = None if self.centres is None else _stored(self.centres)
        return Rounded.unpack(self.grid, self.columns, self.packed_codes(), scales, centres)

    def to_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The `(O, I)` matrix, differentiable in scales and centres."""
        return self._rows(self.packed_codes(), self.scales, self.centres, dtype)

    def train_scales(self, mode: bool = True) -> None:
        """Makes float32 parameters of scales and centres, or rounds them back to bfloat16 buffers."""
        for name in ("scales", "centres"):
            old = getattr(self, name)
            if old is None or isinstance(old, nn.Parameter) == mode:
                continue
            delattr(self, name)
            if mode:
                self.register_parameter(name, nn.Parameter(old.float()))
            else:
                self.register_buffer(name, _stored(old))

    def _rows(self, codes: Tensor, scales: Tensor, centres: Tensor | None, dtype: torch.dtype) -> Tensor:
        return scaled(self.grid, packed_levels(self.grid, codes, self.columns), scales, centres).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """Moves like any module, but casts neither scales nor centres: `.half()` and `.to(dtype)` leave the weights as they are."""
        before = {name: t.detach() for name in ("scales", "centres") if (t := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype == old.dtype:
                continue
            if isinstance(new, nn.Parameter):
                new.data = old.to(new.device)
            else:
                setattr(self, name, old.to(new.device))
        device = self.codes.device
        if device.type == "meta":
            self.codes = torch.empty(
                self.rows, row_bytes(self.columns, self.grid.bits), dtype=torch.uint8, device=device
            )
        elif code_order.order(self.codes) not in ("file", device.type):
            self.codes = self.packed_codes()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.packed_codes()
        for key in (prefix + "scales", prefix + "centres"):
            if key in destination:
                destination[key] = destination[key].contiguous()  # they may be views of one tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        self.codes = self.packed_codes()
        super()._load_from_state_dict(*args)

    def multiply(self, x: Tensor) -> Tensor:
        """`x W^T`, `(..., O)`; in the dtype of autocast where that is on, as of `nn.Linear`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and (x.requires_grad or self.scales.requires_grad):
            y: Tensor = _Multiply.apply(x, self, self.scales, self.centres)
            return y
        return self._multiply_flat(x.reshape(-1, self.columns)).reshape(*x.shape[:-1], self.rows)

    def _multiply_flat(self, x: Tensor) -> Tensor:
        low, codes = x.dtype == torch.bfloat16, self.codes
        if x.device.type == "cpu":
            if code_order.order(codes) == "cpu" or (low and kernels.has_int4(self.grid, self.rows, self.columns)):
                return self._multiply_int4(x.contiguous())
            few = low and x.shape[0] <= kernels.INT8_UP_TO
            if few and kernels.has_int8(self.grid, self.rows, self.columns):
                if not kernels.is_aligned(codes):  # as read from a file
                    with torch.inference_mode(False):
                        self.codes = codes = codes.clone()
                return kernels.int8_matmul(x, codes, self.scales.reshape(-1).to(SCALE_DTYPE))
        few = low and x.device.type == "cuda" and x.shape[0] <= cuda_int4.UP_TO
        if few and cuda_int4.has_int4(self.grid, self.rows, self.columns, x.device):
            self._bring_into("cuda")
            return cuda_int4.matmul(x.contiguous(), self.codes[0, 0], self.grid, self.scales, self.centres)
        few = x.device.type == "cpu" and x.element_size() == 2 and x.shape[0] <= kernels.FLOAT_UP_TO
        y, wide = x.new_empty(x.shape[0], self.rows), x.float() if few else x.to(kernels.gemm_dtype(x))
        for part, matrix in self._parts(wide.dtype):
            if y.dtype == matrix.dtype:
                torch.mm(wide, matrix.T, out=y[:, part])
            else:
                y[:, part] = wide @ matrix.T
        return y

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields some rows at a time: which, and the matrix they are, each in the memory of the one before."""
        codes, step = self.packed_codes(), min(self.rows, max(1, kernels.CHUNK // self.columns))
        levels = torch.empty(step, self.columns, device=codes.device)
        cast = levels if dtype == levels.dtype else torch.empty_like(levels, dtype=dtype)
        for first in range(0, self.rows, step):
            part = slice(first, min(first + step, self.rows))
            into = slice(part.stop - first)
            found = packed_levels(self.grid, codes[part], self.columns, levels[into])
            found = scaled(self.grid, found, self.scales[part], None if self.centres is None else self.centres[part])
            yield part, found if cast is levels else cast[into].copy_(found)

    def _multiply_int4(self, x: Tensor) -> Tensor:
        self._bring_into("cpu")
        few = x.dtype == torch.bfloat16 and x.shape[0] <= kernels.INT4_UP_TO
        multiply = kernels.int4_matmul if few else kernels.int4_unpacked_matmul
        y = multiply(x, self.codes, self._kernel_grid, self.scales, self.centres)
        return y if y.shape[1] == self.rows else y[:, : self.rows]

    def _bring_into(self, order: str) -> None:
        """Has codes, scales and centres as a kernel reads them; each is replaced at once, as others may be reading."""
        if code_order.order(self.codes) == order and (order != "cpu" or kernels.is_of_this_machine(self.codes)):
            return
        with torch.inference_mode(False):
            packed = self.packed_codes()
            if order == "cuda":
                self.codes = code_order.to_cuda_kernel(packed)
            else:
                self.codes = code_order.to_cpu_kernel(packed, self.grid, self.columns)
            if self.centres is not None and not isinstance(self.centres, nn.Parameter):
                more = 0 if order == "cuda" else -self.rows % kernels.int4_block()
                self.scales, self.centres = pairs.side_by_side(self.scales, self.centres, self.rows + more)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns}, {self.grid}"


class _Multiply(torch.autograd.Function):
    """`x W^T` whose backward pass unpacks the matrix again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix, scales: Tensor, centres: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] else None)
        return matrix._multiply_flat(x.reshape(-1, matrix.columns)).reshape(*x.shape[:-1], matrix.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        (gradient,), matrix = gradients, ctx.matrix
        dx, wide = None, gradient.to(kernels.gemm_dtype(gradient))
        if ctx.needs_input_grad[0]:
            dx = (wide @ matrix.to_matrix(wide.dtype).detach()).to(gradient.dtype)
        (x,) = ctx.saved_tensors
        if x is None:
            return dx, None, None, None
        dW = wide.reshape(-1, matrix.rows).T @ x.reshape(-1, matrix.columns).to(wide.dtype)
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().float().requires_grad_() for t in (matrix.scales, matrix.centres)
            ]
            W = matrix._rows(matrix.packed_codes(), leaves[0], leaves[1], torch.float32)
        found = torch.autograd.grad(W, [leaf for leaf in leaves if leaf is not None], dW.to(torch.float32))
        return dx, None, found[0], found[1] if len(found) > 1 else None


class PackedLinear(PackedMatrix):
    """`y = W x + bias` with `W` `(O, I)` rounded to a grid; in the place of `nn.Linear` or transformers' `Conv1D`.

    >>> from bondsmith.tensor.rounding import round_to_nearest
    >>> layer = PackedLinear.from_rounded(round_to_nearest(torch.randn(8, 6), Grid(4, 2)))
    >>> x = torch.randn(3, 6)
    >>> torch.equal(layer(x), x @ layer.to_matrix().T), sum(b.nbytes for b in layer.buffers())
    (True, 72)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, grid, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_rounded(cls, rounded: Rounded, bias: Tensor | None = None) -> PackedLinear:
        """The layer of a rounded matrix."""
        rows, columns = rounded.shape
        layer = cls(columns, rows, rounded.grid, bias=False, device="meta")
        layer.put(rounded)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`(..., O)` for `x` of shape `(..., I)`, in the dtype of `x`."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def materialise(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary `nn.Linear` with the same matrix and bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.to_matrix(dtype))
        linear.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias.detach().clone()))
        return linear


class PackedEmbedding(PackedMatrix):
    """A rounded table of vectors; rows are unpacked as they are looked up.

    `plain` is the module whose place it takes; of its class and settings, kept without weights, is what `materialise` makes. Vectors are
    multiplied by its `embed_scale`, where it has one (Gemma), and come in `dtype`, which follows `.to(dtype)`.
    """

    _like: Tensor

    def __init__(
        self,
        plain: nn.Embedding,
        grid: Grid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, grid, device)
        if type(plain).forward is not nn.Embedding.forward and not hasattr(plain, "embed_scale"):
            raise ValueError(f"an embedding of class {type(plain).__name__} cannot be packed; keep it unrounded")
        self.num_embeddings, self.embedding_dim, self.padding_idx = self.rows, self.columns, plain.padding_idx
        scale = getattr(plain, "scalar_embed_scale", getattr(plain, "embed_scale", None))
        self.embed_scale = None if scale is None else float(scale)
        self._plain = (_emptied(plain),)  # in a tuple: no submodule
        like = torch.empty(0, device=device, dtype=dtype or plain.weight.dtype)
        self.register_buffer("_like", like, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """`(..., I)` for integers of any shape."""
        flat = ids.reshape(-1)
        codes = code_order.packed_rows(self.codes, flat, self.grid, self.columns)
        centres = None if self.centres is None else self.centres[flat]
        dtype = self._like.dtype
        rows = self._rows(codes, self.scales[flat], centres, dtype).view(*ids.shape, self.columns)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale, dtype=dtype)

    @torch.no_grad()
    def materialise(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """The embedding it stands for, filled."""
        plain = _emptied(self._plain[0])
        plain.weight = nn.Parameter(self.to_matrix(dtype))
        if isinstance(
            getattr(plain, "embed_scale", None), Tensor
        ):  # a model that is being loaded has it on the meta device
            plain.embed_scale = torch.tensor(self.embed_scale, device=self.codes.device)
        return plain


def _emptied(plain: nn.Embedding) -> nn.Embedding:
    """A copy without its weights; the module itself keeps them."""
    other = copy.copy(plain)
    other._parameters, other._buffers = dict(plain._parameters), dict(plain._buffers)
    other.weight = nn.Parameter(torch.empty_like(plain.weight, device="meta"), requires_grad=False)
    return other


class PackedHead(nn.Module):
    """A head that shares the matrix of a packed embedding: no weights of its own but a bias."""

    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: no submodule, so that the matrix is saved once
        self.in_features, self.out_features = embedding.columns, embedding.rows
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> PackedEmbedding:
        """Whose matrix it is."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., vocabulary)` for hidden states `(..., I)`."""
        y = self.embedding.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_packed(model: nn.Module) -> bool:
    """Whether any matrix of a model is packed."""
    return any(isinstance(module, PackedMatrix) for module in model.modules())


def widen(model: nn.Module) -> int:
    """Does `PackedMatrix.widen` for every packed module; returns by how many bytes the model grew in memory.

    Torch has CPU kernels for four bits only. Without them every token unpacks the whole model; see docs/bits.md for what it gives.
    """
    grown = 0
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            before = module.codes.nbytes
            module.widen()
            grown += module.codes.nbytes - before
    return grown


def train_scales(model: nn.Module, mode: bool = True) -> None:
    """Does `PackedMatrix.train_scales` for every packed module of a model or block."""
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.train_scales(mode)


def stored_scales(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dictionary of `model` with the scales that are being trained rounded to the bfloat16 of the format."""
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            for leaf in ("scales", "centres"):
                key = f"{name}.{leaf}".lstrip(".")
                if key in state:
                    state[key] = state[key].to(SCALE_DTYPE)
    return state


def _stored(values: Tensor) -> Tensor:
    """Scales or centres as they are stored, alone in their memory."""
    return values.detach().to(SCALE_DTYPE).clone(memory_format=torch.contiguous_format)


def saved_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what a weight file holds of `module`: floating point tensors in `dtype`, scales and centres as they are."""
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in module.state_dict().items()}
    for name, packed in module.named_modules():
        if isinstance(packed, PackedMatrix):
            prefix = f"{name}." if name else ""
            kept = {leaf: getattr(packed, leaf) for leaf in ("scales", "centres")}
            state |= {prefix + leaf: _stored(t) for leaf, t in kept.items() if t is not None}
    return state
